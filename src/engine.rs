//! The one place that knows everyone: [`Engine::tick`] admits, schedules, plans steps, runs them,
//! applies their outcomes, and retires.
//!
//! Requests are submitted at any time and come back through their [`SubmittedRequest`]: events as
//! they happen, then one [`Output`]. Requests of different lengths, schedules and stages share
//! forwards. The engine prints nothing, starts no thread of its own (the backend may), and holds
//! memory for admitted requests only.
#![forbid(unsafe_code)]

mod joint;
mod joint_steps;
mod steps;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::backend::{Backend, BannedIds, HostReason};
use crate::config::{AttentionMask, ModelConfig, config_file};
use crate::error::{Error, Result};
use crate::model::registry;
use crate::model::step::StepNetwork;
use crate::model::{Model, Progress, Scratch};
use crate::pages::{PagePool, PageTable, PrefixKey, PrefixState};
use crate::plan::{NO_MASK, Visibility};
use crate::request::{Bos, Mailbox, Message, Output, Prompt, Request, Segment, SubmittedRequest, Timings, stop_at};
use crate::sampling::{TopKOrder, top_k_of};
use crate::schedule::{Defaults, Eos, Schedule, Scope, Stage};
use crate::scheduler::{self, Budget, Need};
use crate::sequence::{Event, EventKind, Finish, Forwards, Next, Sequence, SequenceSpec, Step, Stop};
use crate::tokenizer::{self, Tokenizer};
use crate::weights::Weights;

/// Sizes of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Rows and sequences of a forward.
    pub budget: Budget,
    /// K/V pages in the pool; `None` makes room for `budget.max_sequences` sequences of the model's
    /// length, and for one of the longest that is served.
    pub kv_pages: Option<usize>,
    /// Positions per page.
    pub page_size: usize,
    /// Fill freed pages with NaN, so that a read of a stale slot shows (tests).
    pub poison_freed_pages: bool,
    /// Use this one instead of reading the directory's `tokenizer.json`.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

impl Default for EngineOptions {
    /// 512 rows a forward, 8 sequences, pages of 16.
    fn default() -> Self {
        EngineOptions {
            budget: Budget { max_rows: 512, max_sequences: 8 },
            kv_pages: None,
            page_size: 16,
            poison_freed_pages: false,
            tokenizer: None,
        }
    }
}

impl EngineOptions {
    /// With as many pages as `budget.max_sequences` sequences of `len` decoded positions take.
    ///
    /// A schedule may decode more positions than a request asks for
    /// ([`Sequence::decoded_len`]).
    pub fn with_pages_for(self, len: usize) -> EngineOptions {
        let pages = len.div_ceil(self.page_size.max(1)).saturating_mul(self.budget.max_sequences);
        EngineOptions { kv_pages: Some(pages), ..self }
    }

    /// Pages of a K/V store beyond those of the pool: one that is never written, and so holds NaN,
    /// where freed pages take its place.
    fn spare_pages(&self) -> usize {
        usize::from(self.poison_freed_pages)
    }
}

/// What is in flight in an engine, and the work that it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests in flight.
    pub running: usize,
    /// Requests that wait for admission.
    pub queued: usize,
    /// K/V pages of the pool.
    pub kv_pages: usize,
    /// K/V pages that requests hold.
    pub kv_pages_used: usize,
    /// Forwards by kind; one that several requests share counts for each of them.
    pub forwards: Forwards,
    /// Query rows processed.
    pub rows: u64,
    /// Positions that denoising forwards were run for: of the open block, or of the canvas.
    pub canvas_positions: u64,
    /// Positions that were masked again.
    pub remasked: u64,
    /// Tokens of finished requests.
    pub tokens: u64,
}

impl EngineStats {
    /// Adds the work of a sequence.
    fn add(&mut self, sequence: &Sequence) {
        for report in sequence.reports() {
            self.forwards += report.forwards;
            self.rows += report.rows as u64;
            self.canvas_positions += report.canvas_positions as u64;
            self.remasked += report.remasked.len() as u64;
        }
    }
}

struct RunningSequence {
    id: u64,
    sequence: Sequence,
    table: PageTable,
    committed_pages: usize,
    /// See [`Need::priority`].
    priority: i32,
    /// Rows that count as served when it was admitted.
    head_start: usize,
    prefix: Option<PrefixKey>,
    /// Where the request ends its text.
    stop: Stop,
    messages: Mailbox,
    cancel: Arc<AtomicBool>,
    submitted: Instant,
    admitted: Instant,
    timings: Timings,
    failed: Option<Error>,
}

/// One model with its own K/V store; page numbers mean the same in all of them.
pub(crate) struct LoadedModel<B: Backend> {
    pub(crate) model: Model<B>,
    pub(crate) kv: B::KvCache,
    pub(crate) scratch: Scratch<B>,
    pub(crate) joint: Option<joint_steps::LoadedJoint<B>>,
}

impl<B: Backend> LoadedModel<B> {
    fn new(backend: &B, model: Model<B>, num_pages: usize, options: &EngineOptions) -> Result<LoadedModel<B>> {
        let page_size = options.page_size;
        let bytes = model.config().kv_bytes_per_token(backend.dtype().bytes()).checked_mul(num_pages * page_size);
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize / 4) {
            return Err(Error::request(format!("{num_pages} K/V pages of {page_size} positions are more than can be addressed")));
        }
        let kv = backend.kv_cache(model.kv_shape(num_pages + options.spare_pages(), page_size, 0)).map_err(|error| match error {
            Error::Device { what } => {
                let next = "lower `kv_pages` or `max_sequences`";
                Error::device(format!("K/V of {num_pages} pages of {page_size} positions: {what}; {next}"))
            }
            other => other,
        })?;
        let scratch = Scratch::new(backend, model.config(), 16)?;
        Ok(LoadedModel { model, kv, scratch, joint: None })
    }

    /// As runners take it.
    pub(crate) fn network(&mut self) -> StepNetwork<'_, B> {
        let LoadedModel { model, kv, scratch, joint } = self;
        StepNetwork { model, kv, scratch, joint: joint.as_mut().map(joint_steps::LoadedJoint::sampler) }
    }
}

/// How LLaDA's tokenizer spells the end of a turn, which its config.json does not list.
const END_OF_TURN: &str = "<|eot_id|>";

/// Models on a backend, and everything in flight.
pub struct Engine<B: Backend> {
    pub(crate) backend: B,
    /// Never empty; 0 is the one the engine was loaded with, the others belong to stages that name
    /// them.
    pub(crate) models: Vec<LoadedModel<B>>,
    tokenizer: std::result::Result<Arc<Tokenizer>, Error>,
    pub(crate) banned: BannedIds,
    pub(crate) runner: B::Runner,
    /// Ticks that the host sampled where a device might have, by the reason.
    host_steps: BTreeMap<HostReason, usize>,
    pub(crate) options: EngineOptions,
    pub(crate) pool: PagePool,
    queue: VecDeque<RunningSequence>,
    active: Vec<RunningSequence>,
    /// Work of requests that left.
    retired: EngineStats,
    next_id: u64,
    /// A tick began and did not come to its end: it runs now, or it panicked.
    ticking: bool,
}

impl<B: Backend> Engine<B> {
    /// Opens a Hugging Face directory. A missing tokenizer is an error only for calls that need
    /// text.
    pub fn load(model_dir: &Path, backend: B, options: EngineOptions) -> Result<Engine<B>> {
        Engine::load_with_progress(model_dir, backend, options, &mut |_, _| {})
    }

    /// [`Engine::load`], reporting bytes of tensors packed and bytes in all.
    pub fn load_with_progress(model_dir: &Path, backend: B, options: EngineOptions, progress: Progress) -> Result<Engine<B>> {
        let config = registry::read_config(model_dir)?;
        let tokenizer = match &options.tokenizer {
            Some(tokenizer) => Ok(tokenizer.clone()),
            None => Tokenizer::of(model_dir, config.vocab_size, config.mask_id).map(Arc::new),
        };
        Engine::build(config, &Weights::open(model_dir)?, tokenizer, backend, options, progress)
    }

    /// Untrained weights of a given shape, for benches.
    pub fn random(config: ModelConfig, backend: B, options: EngineOptions) -> Result<Engine<B>> {
        let tokenizer = Err(Error::tokenizer(&config.dir, "random weights have no tokenizer"));
        Engine::build(config, &Weights::random(), tokenizer, backend, options, &mut |_, _| {})
    }

    fn build(
        config: ModelConfig,
        weights: &Weights,
        tokenizer: Result<Arc<Tokenizer>>,
        backend: B,
        options: EngineOptions,
        progress: Progress,
    ) -> Result<Engine<B>> {
        let model = registry::load(&backend, config, weights, progress)?;
        let config = model.config();
        if options.page_size == 0 || options.budget.max_rows == 0 || options.budget.max_sequences == 0 {
            return Err(Error::request("page size, row budget and sequence limit must be at least 1"));
        }
        let pages_for = |len: usize| len.div_ceil(options.page_size);
        let trained = pages_for(config.decoded_length()).saturating_mul(options.budget.max_sequences);
        let num_pages = options.kv_pages.unwrap_or(trained.max(pages_for(config.max_len()))).max(1);
        if num_pages > u32::MAX as usize / options.page_size {
            return Err(Error::request(format!("{num_pages} K/V pages of {} positions are more than can be addressed", options.page_size)));
        }
        // MASK, padding and embedding rows without a token are never drawn.
        let mut banned: Vec<u32> = config.mask_id.into_iter().chain(config.pad_id).collect();
        if let Ok(tokenizer) = &tokenizer {
            banned.extend(tokenizer.unused_ids(config.vocab_size));
        }
        banned.sort_unstable();
        banned.dedup();
        // LLaDA (appendix B.4) bans the end of text alone, and holds back the end of a turn too.
        let mut last = config.stop_ids.clone();
        last.extend(tokenizer.as_ref().ok().and_then(|tokenizer| tokenizer.id(END_OF_TURN)));
        let banned = BannedIds::new(banned, config.eos_id.into_iter().collect(), last);
        // Before the list of the pages, which is small beside them.
        let models = vec![LoadedModel::new(&backend, model, num_pages, &options)?];
        let pool = PagePool::new(num_pages, options.page_size);
        Ok(Engine {
            backend,
            models,
            tokenizer,
            banned,
            runner: B::Runner::default(),
            host_steps: BTreeMap::new(),
            options,
            pool,
            queue: VecDeque::new(),
            active: Vec::new(),
            retired: EngineStats::default(),
            next_id: 0,
            ticking: false,
        })
    }

    /// Loads another model for stages that name it (`weights=INDEX`), with K/V pages of its own.
    /// Returns the index. Ids that not every model knows are never drawn from then on.
    ///
    /// Errors: as [`Engine::load`], or a vocabulary that is not the first model's. Models may have
    /// embeddings for different numbers of ids, as where one of them has MASK among its padding, if
    /// their tokenizers can be compared.
    pub fn add_model(&mut self, model_dir: &Path, progress: Progress) -> Result<usize> {
        let config = registry::read_config(model_dir)?;
        let unknown = self.unknown_ids(model_dir, &config)?;
        let model = registry::load(&self.backend, config, &Weights::open(model_dir)?, progress)?;
        self.models.push(LoadedModel::new(&self.backend, model, self.pool.capacity(), &self.options)?);
        if !unknown.is_empty() {
            let BannedIds { never, end, last, .. } = std::mem::take(&mut self.banned);
            let never: BTreeSet<u32> = never.into_iter().chain(unknown).collect();
            self.banned = BannedIds::new(never.into_iter().collect(), end, last);
        }
        Ok(self.models.len() - 1)
    }

    /// Ids that another model or the ones before it cannot read or write: those past the smaller
    /// table of embeddings, those without a token in one of the vocabularies, and its MASK.
    ///
    /// Refuses a model whose ids mean other tokens than the first model's. Published ones have no
    /// tokenizer of their own: they are not asked, and must have as many ids.
    fn unknown_ids(&self, model_dir: &Path, config: &ModelConfig) -> Result<Vec<u32>> {
        let first = self.config();
        let place = || config_file(model_dir);
        let before = self.models.iter().map(|loaded| loaded.model.config()).find(|config| config.mask_id.is_some());
        if let (Some(mask), Some(&ModelConfig { vocab_size, mask_id: Some(expected), .. })) = (config.mask_id, before)
            && mask != expected
        {
            let found = config.vocab_size;
            let what =
                format!("vocabulary of {found} tokens, MASK {mask}: expected that of the model before, {vocab_size}, MASK {expected}");
            return Err(Error::config(&place(), what));
        }
        let mut unknown: Vec<u32> = config.mask_id.into_iter().collect();
        let sizes = self.models.iter().map(|loaded| loaded.model.config().vocab_size).chain([config.vocab_size]);
        let (least, most) = sizes.fold((usize::MAX, 0), |(least, most), size| (least.min(size), most.max(size)));
        unknown.extend(least as u32..most as u32);
        let (Ok(tokenizer), true) = (&self.tokenizer, Tokenizer::is_in(model_dir)) else {
            if config.vocab_size != first.vocab_size {
                let (found, expected) = (config.vocab_size, first.vocab_size);
                let what =
                    format!("vocabulary of {found} tokens: expected that of the first model, {expected}, or two tokenizers to compare");
                return Err(Error::config(&place(), what));
            }
            return Ok(unknown);
        };
        let other = Tokenizer::of(model_dir, config.vocab_size, config.mask_id)?;
        match tokenizer.known_to_one(&other) {
            Ok(alone) => unknown.extend(alone),
            Err((id, expected, found)) => {
                let what = format!("id {id} is `{found}`: expected the first model's vocabulary, where it is `{expected}`");
                return Err(Error::tokenizer(&tokenizer::place(model_dir)?, what));
            }
        }
        Ok(unknown)
    }

    /// What a masked position holds: MASK of the models that have one.
    fn hidden_id(&self) -> u32 {
        self.models.iter().find_map(|loaded| loaded.model.config().mask_id).unwrap_or(NO_MASK)
    }

    /// Ids that every model has an embedding of.
    fn vocab_size(&self) -> usize {
        self.models.iter().map(|loaded| loaded.model.config().vocab_size).min().unwrap_or(0)
    }

    /// The first model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.models[0].model.config()
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The tokenizer, or why there is none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().map_err(Clone::clone)
    }

    /// Ids that are never drawn, ascending.
    pub fn banned(&self) -> &[u32] {
        &self.banned.never
    }

    /// Ticks that the host sampled although the backend has a device that samples, by the reason.
    pub fn host_steps(&self) -> &BTreeMap<HostReason, usize> {
        &self.host_steps
    }

    /// Sampling defaults that fit the model: what its directory recommends; block scope for block
    /// diffusion, canvas scope for full attention, blocks of one for autoregressive checkpoints.
    pub fn defaults(config: &ModelConfig) -> Defaults {
        let scope = if config.attention == AttentionMask::Full { Scope::Canvas } else { Scope::Block };
        let general = Defaults::default();
        Defaults {
            temperature: config.sampling.temperature.unwrap_or(general.temperature),
            top_p: config.sampling.top_p.unwrap_or(general.top_p),
            top_k: top_k_of(config.sampling.top_k.unwrap_or(0), TopKOrder::Before),
            scope,
            block_len: match config.attention {
                AttentionMask::BlockCausal(len) => len,
                AttentionMask::Causal => 1,
                // A block is only what is sampled together.
                AttentionMask::Full => general.block_len,
            },
            ..general
        }
    }

    /// Refuses schedules that the models cannot follow: an autoregressive one writes blocks of one
    /// position, each from those before it, and has no MASK to hide one again. So it drafts, and
    /// what refines is another model. `models` are those that stages name, by index.
    ///
    /// Errors: [`Error::Request`] that names the first such stage, and what was expected.
    pub fn check_schedule(models: &[&ModelConfig], schedule: &Schedule) -> Result<()> {
        let is_sound = |index: usize, stage: &Stage| {
            index == 0 && stage.visibility() == Visibility::BlockCausal(1) && !stage.is_joint() && stage.edit().is_none()
        };
        for (index, stage) in schedule.stages().iter().enumerate() {
            if let Some(config) = models.get(stage.weights).filter(|config| config.is_autoregressive() && !is_sound(index, stage)) {
                return Err(Error::request(format!(
                    "{}: stage {index}: this checkpoint is autoregressive, it writes from left to right, one token a forward: expected it \
                     in the first stage alone, with block=1,visible=block (preset ar), without edit and sampler, found {stage}",
                    config.dir.display()
                )));
            }
        }
        Ok(())
    }

    /// The canvas of a prompt, with the first tokens of [`Bos::Auto`] where it is text.
    pub fn canvas(&self, prompt: &Prompt) -> Result<Vec<Option<u32>>> {
        self.canvas_after(Bos::Auto, prompt)
    }

    /// The canvas of a prompt; `bos` says what stands before text.
    pub fn canvas_after(&self, bos: Bos, prompt: &Prompt) -> Result<Vec<Option<u32>>> {
        let config = self.config();
        let holes = |length: usize, fixed: usize| -> Result<std::iter::RepeatN<Option<u32>>> {
            if length == 0 {
                return Err(Error::request("length: expected at least 1 generated token, found 0"));
            }
            self.check_len(length.saturating_add(fixed))?;
            Ok(std::iter::repeat_n(None, length))
        };
        let mut canvas = Vec::new();
        if matches!(prompt, Prompt::Text { .. } | Prompt::Infill(_)) {
            let text = match prompt {
                Prompt::Text { text, .. } => text,
                Prompt::Infill(segments) => match segments.first() {
                    Some(Segment::Text(text)) => text,
                    _ => "",
                },
                _ => "",
            };
            canvas.extend(bos.before(text, config, self.tokenizer()?)?.into_iter().map(Some));
        }
        match prompt {
            Prompt::Text { text, length } => {
                canvas.extend(self.tokenizer()?.encode(text)?.into_iter().map(Some));
                canvas.extend(holes(*length, canvas.len())?);
            }
            Prompt::Tokens { tokens, length } => {
                canvas = tokens.iter().copied().map(Some).collect();
                canvas.extend(holes(*length, canvas.len())?);
            }
            Prompt::Infill(segments) => {
                for segment in segments {
                    match segment {
                        Segment::Text(text) => canvas.extend(self.tokenizer()?.encode(text)?.into_iter().map(Some)),
                        Segment::Hole(length) => canvas.extend(holes(*length, canvas.len())?),
                    }
                }
            }
            Prompt::Canvas(given) => canvas.clone_from(given),
        }
        self.check_len(canvas.len())?;
        let vocab_size = self.vocab_size();
        if let Some(id) = canvas.iter().flatten().find(|id| **id as usize >= vocab_size) {
            return Err(Error::request(format!("token id {id} is outside the vocabulary of {vocab_size}")));
        }
        Ok(canvas)
    }

    pub(crate) fn check_len(&self, len: usize) -> Result<()> {
        // Every stage's model sees every position.
        self.models.iter().try_for_each(|loaded| loaded.model.config().check_len(len))
    }

    /// Tokens that end a text of a schedule: those of every model that runs a stage of it,
    /// ascending.
    pub fn ends(&self, schedule: &Schedule) -> Vec<u32> {
        let models = schedule.stages().iter().filter_map(|stage| self.models.get(stage.weights));
        let ends: BTreeSet<u32> = models.flat_map(|loaded| loaded.model.config().stop_ids.iter().copied()).collect();
        ends.into_iter().collect()
    }

    /// Queues a request. Errors: a prompt or schedule that cannot be served, or more pages than the
    /// pool has in all.
    pub fn submit(&mut self, request: Request) -> Result<SubmittedRequest> {
        if let Some(missing) = request.schedule.stages().iter().map(|s| s.weights).find(|w| *w >= self.models.len()) {
            return Err(Error::request(format!(
                "a stage names weights={missing}, {} models are loaded (counted from 0)",
                self.models.len()
            )));
        }
        let ends = |eos: Eos| match eos {
            Eos::Free => true,
            Eos::Never => !self.banned.end.is_empty(),
            Eos::Last => !self.banned.last.is_empty(),
            Eos::NeverLast => !self.banned.end.is_empty(),
        };
        if let Some(index) = request.schedule.stages().iter().position(|s| !ends(s.eos)) {
            let eos = request.schedule.stages()[index].eos;
            return Err(Error::request(format!(
                "stage {index}: eos={eos}, but the checkpoint's `eos_token_id` names no token that ends a text"
            )));
        }
        let configs: Vec<&ModelConfig> = self.models.iter().map(|loaded| loaded.model.config()).collect();
        Self::check_schedule(&configs, &request.schedule)?;
        let stages_joint = self.check_joint(&request.schedule)?;
        let fixed = self.canvas_after(request.bos, &request.prompt)?;
        if configs[request.schedule.stages()[0].weights].is_autoregressive() {
            check_continues(&fixed)?;
        }
        let mut stop = Stop { tokens: Vec::new(), entropy: request.stop.entropy, text: None };
        if !request.stop.ignore_eos {
            stop.tokens = self.ends(&request.schedule);
        }
        if let Some(empty) = request.stop.texts.iter().find(|t| t.is_empty()) {
            return Err(Error::request(format!("stop text `{empty}` is empty")));
        }
        if !request.stop.texts.is_empty() {
            let before: Vec<u32> = fixed.iter().map_while(|token| *token).collect();
            if fixed[before.len()..].iter().any(Option::is_some) {
                return Err(Error::request("stop texts end a continuation: expected none where holes of a given text are filled"));
            }
            let (tokenizer, texts) = (self.tokenizer()?.clone(), request.stop.texts.clone());
            stop.text = Some(Arc::new(move |tokens: &[u32]| stop_at(&tokenizer, &texts, &before, tokens)));
        }
        let decoded = Sequence::decoded_len(&request.schedule, &fixed);
        self.check_len(decoded)?;
        let needed = self.pool.pages_for(decoded);
        if needed > self.pool.capacity() {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let sequence = Sequence::new(SequenceSpec {
            fixed,
            mask_id: self.hidden_id(),
            schedule: request.schedule,
            shifted: self.models.iter().map(|loaded| loaded.model.config().logits_rows().are_shifted()).collect(),
            seed: request.seed,
            sample: request.sample,
            stop: stop.clone(),
            separate_commit: request.separate_commit,
            forced: request.forced,
            draft: request.draft,
            draws: request.draws,
        })?;
        let (messages, submitted) = SubmittedRequest::new();
        let prefix_len = sequence.prefix_len();
        let prefix = (prefix_len > 0).then(|| PrefixKey {
            weights: sequence.prefix_weights(),
            block_len: sequence.prefix_block_len(),
            joint: stages_joint,
            tokens: sequence.canvas().tokens()[..prefix_len].to_vec(),
        });
        let now = Instant::now();
        let priority = request.priority;
        // Behind all that came before with the same priority.
        let place = self.queue.partition_point(|waiting| waiting.priority <= priority);
        self.queue.insert(
            place,
            RunningSequence {
                id: self.next_id,
                sequence,
                table: PageTable::default(),
                committed_pages: needed,
                priority,
                head_start: 0,
                prefix,
                stop,
                messages,
                cancel: submitted.cancel.clone(),
                submitted: now,
                admitted: now,
                timings: Timings::default(),
                failed: None,
            },
        );
        self.next_id += 1;
        Ok(submitted)
    }

    /// True while something is queued or in flight.
    pub fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.active.is_empty()
    }

    /// What is in flight, and the work done since the engine was made.
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.retired;
        self.active.iter().for_each(|running| stats.add(&running.sequence));
        let kv_pages = self.pool.capacity();
        EngineStats {
            running: self.active.len(),
            queued: self.queue.len(),
            kv_pages,
            kv_pages_used: kv_pages - self.pool.num_free(),
            ..stats
        }
    }

    /// Pages not held by any sequence, for tests and reports.
    pub fn free_pages(&self) -> usize {
        self.pool.num_free()
    }

    /// Runs until nothing is left to do.
    pub fn run(&mut self) -> Result<()> {
        while self.tick()? {}
        Ok(())
    }

    /// One iteration: admit, schedule, plan steps, run them, apply their outcomes, retire.
    /// False when idle. A request that fails ends with its error in its handle and leaves the
    /// others alone; an error here means the engine itself cannot go on: all requests end with it.
    pub fn tick(&mut self) -> Result<bool> {
        if self.ticking {
            let error = Error::device("an earlier tick of this engine panicked: it cannot go on");
            self.abandon(&error);
            return Err(error);
        }
        self.ticking = true;
        let outcome = self.tick_once();
        self.ticking = false;
        if let Err(error) = &outcome {
            self.active.iter_mut().chain(&mut self.queue).for_each(|running| running.fail(error.clone()));
            self.retire();
        }
        outcome
    }

    /// Ends every request with the error, and leaves everything else as it stands.
    pub(crate) fn abandon(&mut self, error: &Error) {
        for mut running in self.queue.drain(..).chain(self.active.drain(..)) {
            running.failed = Some(error.clone());
            running.finish();
        }
    }

    fn tick_once(&mut self) -> Result<bool> {
        self.drop_cancelled();
        self.admit();
        let (weights, chosen) = self.schedule();
        if !chosen.is_empty() {
            let steps = self.plan_steps(&chosen, weights)?;
            self.run_steps(&chosen, weights, steps)?;
        }
        self.retire();
        Ok(self.is_busy())
    }

    /// Cancelled requests, and those whose handle is gone, end at once.
    fn drop_cancelled(&mut self) {
        let gone = |a: &RunningSequence| a.cancel.load(Ordering::Relaxed) || Arc::strong_count(&a.cancel) == 1;
        for active in self.active.iter_mut().chain(&mut self.queue).filter(|a| gone(a)) {
            active.sequence.cancel();
        }
    }

    fn admit(&mut self) {
        while self.active.len() < self.options.budget.max_sequences
            && let Some(waiting) = self.queue.front()
            && self.pool.commit(waiting.committed_pages)
        {
            let mut active = self.queue.pop_front().expect("looked at above");
            active.admitted = Instant::now();
            active.timings.queued_ms = ms(active.submitted, active.admitted);
            // A newcomer is not owed the rows that others got before it came.
            active.head_start = self.active.iter().map(RunningSequence::served).min().unwrap_or(0);
            active.sequence.start();
            self.active.push(active);
        }
    }

    /// The model that runs next, and the sequences whose next forward it is.
    fn schedule(&mut self) -> (usize, Vec<usize>) {
        let needs = self.advance();
        scheduler::schedule(&needs, &self.options.budget)
    }

    /// Brings every sequence to its next forward and says how many rows it needs; `None` for those
    /// that wait or are done.
    fn advance(&mut self) -> Vec<Option<Need>> {
        let mut needs = Vec::with_capacity(self.active.len());
        for active in &mut self.active {
            if active.sequence.wants_prefix()
                && active.sequence.step().is_none()
                && let Some(key) = &active.prefix
            {
                match self.pool.prefix(key, active.id) {
                    PrefixState::Yours => {}
                    PrefixState::Pending => {
                        needs.push(None);
                        continue;
                    }
                    PrefixState::Ready(pages) => {
                        active.table.adopt(pages);
                        active.sequence.skip_prefill();
                    }
                }
            }
            let mut events = Vec::new();
            let next = active.sequence.next(&mut events);
            active.send(events);
            needs.push(match next {
                Next::Forward => active.sequence.step().map(|step| Need {
                    rows: step.rows.len(),
                    weights: step.weights,
                    priority: active.priority,
                    served: active.served(),
                }),
                Next::Finished => None,
            });
        }
        needs
    }

    /// Finished sequences leave: their pages return, their output goes to the handle.
    fn retire(&mut self) {
        for queue in [true, false] {
            let count = if queue { self.queue.len() } else { self.active.len() };
            for i in (0..count).rev() {
                let active = if queue { &self.queue[i] } else { &self.active[i] };
                if active.sequence.is_finished() {
                    let mut done = if queue { self.queue.remove(i).expect("counted") } else { self.active.remove(i) };
                    let freed = done.table.truncate(&mut self.pool, 0);
                    self.pool.abandon(done.id);
                    if !queue {
                        self.pool.uncommit(done.committed_pages);
                    }
                    self.poison(&freed);
                    if queue {
                        // It never ran: all of its time was spent waiting.
                        done.admitted = Instant::now();
                        done.timings.queued_ms = ms(done.submitted, done.admitted);
                    }
                    self.retired.add(&done.sequence);
                    self.retired.tokens += done.sequence.canvas().generated().count() as u64;
                    done.finish();
                }
            }
        }
    }

    pub(crate) fn poison(&mut self, pages: &[u32]) {
        if self.options.poison_freed_pages {
            let never_written = self.pool.capacity() as u32;
            for &page in pages {
                for loaded in &mut self.models {
                    self.backend.copy_page(&mut loaded.kv, never_written, page).expect("poisoning is for tests");
                }
            }
        }
    }
}

/// Requests in flight end with an error: their handles may outlive the engine.
impl<B: Backend> Drop for Engine<B> {
    fn drop(&mut self) {
        let panicked = || Error::device("the engine's thread panicked before the request ended");
        let error = if std::thread::panicking() { panicked() } else { Error::EngineGone };
        self.abandon(&error);
    }
}

impl RunningSequence {
    /// See [`Need::served`].
    fn served(&self) -> usize {
        self.head_start + self.sequence.reports().iter().map(|report| report.rows).sum::<usize>()
    }

    /// The step that it was chosen for.
    fn step(&self) -> &Step {
        self.sequence.step().expect("chosen for its step")
    }

    /// Ends with an error.
    fn fail(&mut self, error: Error) {
        self.failed = Some(error);
        self.sequence.cancel();
    }

    /// Gives back what lies beyond the end of a draft that ended early: the pages that are free
    /// now.
    fn shorten(&mut self, pool: &mut PagePool) -> Vec<u32> {
        let len = self.sequence.canvas().len();
        let freed = self.table.truncate(pool, len);
        let needed = pool.pages_for(len);
        pool.uncommit(self.committed_pages - needed);
        self.committed_pages = needed;
        freed
    }

    fn send(&mut self, events: Vec<Event>) {
        for event in events {
            let now = || ms(self.admitted, Instant::now());
            match event.kind {
                EventKind::Unmask if self.timings.first_token_ms == 0.0 => self.timings.first_token_ms = now(),
                EventKind::Commit if self.timings.first_final_ms == 0.0 && self.sequence.is_last_stage(event.stage) => {
                    self.timings.first_final_ms = now();
                }
                _ => {}
            }
            self.messages.send(Message::Event(event));
        }
    }

    fn finish(mut self) {
        let result = match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(self.output()),
        };
        self.messages.send(Message::Finished(Box::new(result)));
    }

    /// Why the text ends where it does: a later stage may have left what ends a text in a draft of
    /// full length.
    fn finish_of(&self, tokens: &[u32]) -> Finish {
        let finish = self.sequence.finish();
        let continues = self.sequence.prompt_len() + tokens.len() == self.sequence.canvas().len();
        if finish != Finish::Length || !continues {
            finish
        } else if tokens.iter().any(|token| self.stop.tokens.contains(token)) {
            Finish::EndOfText
        } else if self.stop.text.as_ref().is_some_and(|stop| stop(tokens).is_some()) {
            Finish::StopText
        } else {
            finish
        }
    }

    fn output(&self) -> Output {
        let canvas = self.sequence.canvas();
        let positions: Vec<usize> = canvas.generated().collect();
        let stages = self.sequence.reports().to_vec();
        let draft_ms = stages.first().map_or(0.0, |s| s.ms);
        // The sum of nothing is -0.
        let refine_ms = stages.iter().skip(1).fold(0.0, |sum, s| sum + s.ms);
        let tokens: Vec<u32> = positions.iter().map(|p| canvas.tokens()[*p]).collect();
        Output {
            sample: self.sequence.sample(),
            finish: self.finish_of(&tokens),
            prompt_tokens: self.sequence.prompt_len(),
            canvas: canvas.tokens().to_vec(),
            tokens,
            draft: self.sequence.draft().to_vec(),
            confidence: positions.iter().map(|p| canvas.confidence(*p)).collect(),
            log_prob: positions.iter().map(|p| self.sequence.log_prob(*p)).collect(),
            revealed_at: positions.iter().map(|p| canvas.revealed_at(*p)).collect(),
            positions,
            stages,
            timings: Timings { draft_ms, refine_ms, total_ms: ms(self.admitted, Instant::now()), ..self.timings },
        }
    }
}

/// What an autoregressive model can continue: given tokens, then positions to generate.
fn check_continues(fixed: &[Option<u32>]) -> Result<()> {
    let given = fixed.iter().take_while(|token| token.is_some()).count();
    if given == 0 && !fixed.is_empty() {
        let what = "an autoregressive checkpoint predicts each token from those before it: expected a prompt, or BOS before it";
        return Err(Error::request(what));
    }
    if let Some(after) = fixed[given..].iter().position(Option::is_some) {
        let what =
            format!("position {} is given after a hole: an autoregressive checkpoint continues a text, it fills no holes", given + after);
        return Err(Error::request(what));
    }
    Ok(())
}

pub(crate) fn ms(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine may be built on one thread and ticked on another; its handles may live on a third.
    #[test]
    fn engines_and_handles_cross_threads() {
        fn crosses<T: Send>() {}
        crosses::<Engine<crate::cpu::Cpu>>();
        crosses::<SubmittedRequest>();
    }
}
