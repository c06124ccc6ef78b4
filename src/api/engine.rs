//! Engine that callers drive: submit, tick, wait, score.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::path::PathBuf;
use std::sync::Arc;

use super::core::{AnyCore, on_core};
use super::handle::{Asked, Failure, Generation, RequestHandle};
use super::options::{Options, Prompt, default_length};
use super::text::TextRules;
use crate::chat::{ChatTemplate, Conversation};
use crate::config::{AttentionMask, ModelConfig};
use crate::engine::{Engine as EngineCore, EngineStats};
use crate::error::{Error, Result};
use crate::request::{self, Bos, Request, STOP_IN_A_HOLE, StopOptions};
use crate::schedule::Defaults;
use crate::scoring::scoring_request;
use crate::tokenizer::Tokenizer;

/// What a loaded model is.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct ModelInfo {
    /// Name of its family: `llada`, `bd3lm`, ... (README lists them).
    pub architecture: String,
    /// Ids that its rows hold.
    pub vocab_size: usize,
    /// Longest sequence that is served, in positions.
    pub max_length: usize,
    /// Length that it was trained with, in positions.
    pub trained_length: usize,
    /// Block length of a block diffusion model; `None` where attention is full or causal.
    pub block_len: Option<usize>,
    /// Whether it generates text: all that load do.
    pub generates: bool,
    /// Whether it predicts each token from those before it alone: it continues a text, one token a
    /// forward, and cannot fill holes or refine.
    pub autoregressive: bool,
    /// What its directory says that was not followed, and why.
    pub warnings: Vec<String>,
}

/// A loaded model that serves requests.
///
/// ```no_run
/// use redraft::{Engine, Options};
///
/// # fn main() -> redraft::Result<()> {
/// let text = Engine::open("models/redraft-stories-10m")?.generate("Once upon a time", Options::default())?.text;
/// println!("{text}");
/// # Ok(())
/// # }
/// ```
///
/// The result of a request depends on the request alone, bit for bit: not on other requests, on
/// threads, or on how the engine is driven.
pub struct Engine {
    pub(super) core: AnyCore,
    /// Directory of the first model.
    pub(super) dir: PathBuf,
    /// Why `Device::Auto` did not take the GPU that is there.
    pub(super) passed_over: Option<Error>,
    /// Why the engine's thread ended, where it has one and it did.
    pub(super) thread: Option<Failure>,
    /// Chat template of the directory, read when it is first asked for.
    pub(super) template: OnceCell<Result<Box<ChatTemplate>>>,
}

impl Engine {
    /// Writes one text and returns it whole. Other requests that were submitted advance meanwhile.
    ///
    /// Errors: [`Error::Request`] for a prompt, length or schedule that the model cannot serve, and
    /// those of the device.
    pub fn generate(&mut self, prompt: impl Into<Prompt>, options: Options) -> Result<Generation> {
        let handle = self.submit(prompt, options)?;
        self.wait(&handle)
    }

    /// Writes one text for each prompt, all in one batch; sample i has the draws of request i
    /// alone.
    ///
    /// Errors: those of [`Engine::submit`] for the first prompt that is refused; afterwards each
    /// text has its own result.
    pub fn generate_batch<P: Into<Prompt>>(
        &mut self,
        prompts: impl IntoIterator<Item = P>,
        options: &Options,
    ) -> Result<Vec<Result<Generation>>> {
        let handles = prompts.into_iter().map(|prompt| self.submit(prompt, options.clone())).collect::<Result<Vec<_>>>()?;
        Ok(handles.iter().map(|handle| self.wait(handle)).collect())
    }

    /// Queues a request. It advances with each [`Engine::tick`].
    ///
    /// Errors: [`Error::Request`] for a prompt, length or schedule that the model cannot serve.
    pub fn submit(&mut self, prompt: impl Into<Prompt>, options: Options) -> Result<RequestHandle> {
        let (request, asked) = self.request(prompt.into(), options)?;
        let handle = on_core!(&mut self.core, |core| core.submit(request))?;
        Ok(RequestHandle::new(handle, asked, self.thread.clone()))
    }

    /// One iteration: admits queued requests, runs one forward (or several that the device samples
    /// by itself) over the requests in flight, and sends their events. False once nothing is left
    /// to do.
    ///
    /// Errors: those of the device. A request that fails alone fails its own handle and not the
    /// tick.
    pub fn tick(&mut self) -> Result<bool> {
        on_core!(&mut self.core, |core| core.tick())
    }

    /// Ticks until the request is finished.
    ///
    /// Errors: the request's own, or those of the device.
    pub fn wait(&mut self, handle: &RequestHandle) -> Result<Generation> {
        loop {
            let busy = self.tick();
            if let Some(result) = handle.try_wait() {
                return result;
            }
            if !busy? {
                return Err(Error::EngineGone);
            }
        }
    }

    /// Negative log-likelihood of each token of `text` in nats, under the model's own
    /// factorisation: next tokens for an autoregressive checkpoint; left to right within trained
    /// blocks, each token revealed in turn, for block diffusion; left to right with the rest of the
    /// text masked for full attention.
    ///
    /// Errors: [`Error::Request`] for an empty text or one that is longer than the model serves.
    pub fn score(&mut self, text: &str) -> Result<Vec<f64>> {
        let tokens = self.tokenizer()?.encode(text)?;
        self.score_tokens(&tokens)
    }

    /// [`Engine::score`] of token ids, without the BOS before them.
    pub fn score_tokens(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        if tokens.is_empty() {
            return Err(Error::request("score: expected at least one token, found none"));
        }
        let (attention, bos_id) = (self.config().attention, self.config().first_id()?);
        let with_bos = [&[bos_id], tokens].concat();
        if attention == AttentionMask::Causal {
            return on_core!(&mut self.core, |core| core.causal_nll(&with_bos));
        }
        let request = scoring_request(with_bos, attention.visibility())?;
        let handle = on_core!(&mut self.core, |core| core.submit(request))?;
        let output = loop {
            let busy = self.tick()?;
            handle.events().for_each(drop);
            match handle.take_output() {
                Some(output) => break output?,
                None if !busy => return Err(Error::EngineGone),
                None => {}
            }
        };
        Ok(output.log_prob.iter().map(|log_prob| -f64::from(*log_prob)).collect())
    }

    /// Ends every request with the error.
    pub(super) fn abandon(&mut self, error: &Error) {
        on_core!(&mut self.core, |core| core.abandon(error))
    }

    /// What the first model is.
    pub fn model(&self) -> ModelInfo {
        let config = self.config();
        ModelInfo {
            architecture: config.family.name.to_owned(),
            vocab_size: config.vocab_size,
            max_length: config.max_len(),
            trained_length: config.model_length,
            block_len: match config.attention {
                AttentionMask::BlockCausal(block_len) => Some(block_len),
                AttentionMask::Full | AttentionMask::Causal => None,
            },
            generates: true,
            autoregressive: config.is_autoregressive(),
            warnings: config.warnings.clone(),
        }
    }

    /// The first model's configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        on_core!(&self.core, |core| core.config())
    }

    /// The tokenizer. Errors: [`Error::Tokenizer`] that says why there is none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        on_core!(&self.core, |core| core.tokenizer())
    }

    /// What is in flight, and the work done since the engine was opened.
    pub fn stats(&self) -> EngineStats {
        on_core!(&self.core, |core| core.stats())
    }

    /// Device, instruction set or GPU, and threads: `cpu (avx512-bf16, 2 threads)`.
    pub fn device_name(&self) -> String {
        on_core!(&self.core, |core| crate::backend::Backend::name(core.backend()))
    }

    /// Why [`crate::Device::Auto`] fell back to the CPU although there is a GPU.
    pub fn passed_over(&self) -> Option<&Error> {
        self.passed_over.as_ref()
    }

    /// Ids of a text as a prompt, with what [`Options::bos`] puts before it.
    ///
    /// Errors: [`Error::Tokenizer`] where there is none; a checkpoint that names neither BOS nor
    /// end of text, where one is asked for.
    pub fn encode_text(&self, text: &str, bos: Bos) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        Ok([bos.before(text, self.config(), tokenizer)?, tokenizer.encode(text)?].concat())
    }

    /// Ids of a conversation, as the chat template of the model's directory renders it.
    ///
    /// Errors: [`Error::Tokenizer`] where there is no template, or it refuses the conversation.
    pub fn encode_chat(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let template = self.template.get_or_init(|| ChatTemplate::load(&self.dir).map(Box::new));
        template.as_ref().map_err(Clone::clone)?.encode_conversation(conversation, self.tokenizer()?)
    }

    /// Resolves a prompt and its options against the model.
    fn request(&self, prompt: Prompt, options: Options) -> Result<(Request, Asked)> {
        let config = self.config();
        let schedule = options.resolve(config)?;
        let infills = matches!(prompt, Prompt::Infill(_) | Prompt::Canvas(_));
        let mut draft = Vec::new();
        let length = |fixed: usize| options.length.unwrap_or_else(|| default_length(config, fixed));
        let chat = |conversation: &Conversation| -> Result<request::Prompt> {
            let tokens = self.encode_chat(conversation)?;
            Ok(request::Prompt::Tokens { length: length(tokens.len()), tokens })
        };
        let prompt = match prompt {
            Prompt::Text(text) => {
                let tokens = self.encode_text(&text, options.bos)?;
                request::Prompt::Tokens { length: length(tokens.len()), tokens }
            }
            Prompt::Tokens(tokens) => request::Prompt::Tokens { length: length(tokens.len()), tokens },
            Prompt::Chat(messages) => chat(&Conversation::new(&messages))?,
            Prompt::Conversation(conversation) => chat(&conversation)?,
            Prompt::Infill(segments) => request::Prompt::Infill(segments),
            Prompt::Canvas(canvas) => request::Prompt::Canvas(canvas),
            Prompt::Refine { prompt, draft: text } => {
                let tokenizer = self.tokenizer()?;
                let given = self.encode_text(&prompt, options.bos)?;
                let mut canvas: Vec<Option<u32>> = given.into_iter().map(Some).collect();
                // Encoded together, so that a token may span neither side by accident of the split.
                let tokens = tokenizer.encode(&text)?;
                if tokens.is_empty() {
                    return Err(Error::request("refine: expected a text to refine, found none"));
                }
                if schedule.stages().len() < 2 {
                    return Err(Error::request("refine: expected a schedule with a stage that remasks, such as did-lift"));
                }
                draft = canvas.iter().map(|id| id.expect("given")).chain(tokens.iter().copied()).collect();
                canvas.extend(std::iter::repeat_n(None, tokens.len()));
                request::Prompt::Canvas(canvas)
            }
        };
        let infills = infills && draft.is_empty();
        if infills && !options.stop.is_empty() {
            return Err(Error::request(STOP_IN_A_HOLE));
        }
        let ignore_eos = options.ignore_eos || !draft.is_empty();
        let before = match &prompt {
            request::Prompt::Tokens { tokens, .. } => tokens.clone(),
            request::Prompt::Canvas(canvas) => canvas.iter().map_while(|token| *token).collect(),
            _ => Vec::new(),
        };
        let rules = TextRules {
            tokenizer: self.tokenizer().ok().cloned(),
            before,
            ends: if ignore_eos || infills { Vec::new() } else { config.stop_ids.clone() },
            stop: options.stop.clone(),
            infills,
        };
        let asked = Asked { rules, seed: options.seed, schedule: schedule.clone() };
        let mut request = Request::new(prompt, schedule, options.seed, options.sample);
        request.priority = options.priority;
        request.stop = StopOptions { ignore_eos, texts: options.stop, entropy: options.stop_entropy };
        request.draft = draft;
        request.bos = options.bos;
        Ok((request, asked))
    }

    /// Sampling defaults that fit the model: what its directory recommends.
    pub fn defaults(&self) -> Defaults {
        EngineCore::<crate::cpu::Cpu>::defaults(self.config())
    }
}
