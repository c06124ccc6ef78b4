//! What is asked of a text: prompt, length, schedule, sampling.
#![forbid(unsafe_code)]

use crate::chat::{Conversation, Message};
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::Engine as EngineCore;
use crate::error::{Error, Result};
use crate::request::{Bos, Segment, parse_infill};
use crate::sampling::{TopKOrder, TopPRule, top_k_of, valid_temperature, valid_top_p};
use crate::schedule::{Defaults, Schedule, StageSpec};

/// Schedule of requests that name none: what an autoregressive checkpoint can follow, or the one
/// that the evidence is for.
pub(crate) fn default_preset(config: &ModelConfig) -> &'static str {
    if config.is_autoregressive() { "ar" } else { "did-lift" }
}

/// Tokens that are generated where a request names no length and the model serves as many.
pub(crate) const DEFAULT_LENGTH: usize = 192;

/// Tokens to generate after `fixed` given ones where a request names no length.
pub(crate) fn default_length(config: &ModelConfig, fixed: usize) -> usize {
    let room = config.model_length.saturating_sub(fixed);
    if room == 0 { DEFAULT_LENGTH } else { DEFAULT_LENGTH.min(room) }
}

/// What is given of the text. `&str` and `String` are text, `Vec<u32>` is tokens, `Vec<Message>` is
/// a chat.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Prompt {
    /// This text, which the model continues; [`Options::bos`] says which token comes before it.
    Text(String),
    /// These ids as they are, which the model continues.
    Tokens(Vec<u32>),
    /// Messages, through the chat template of the model's directory.
    Chat(Vec<Message>),
    /// Messages with tools, documents and other arguments of the chat template.
    Conversation(Conversation),
    /// Text and holes in turn; the model fills the holes.
    Infill(Vec<Segment>),
    /// Every position: `Some(id)` is given, `None` is generated.
    Canvas(Vec<Option<u32>>),
    /// A text of the caller's own in the place of the draft: the later stages of the schedule
    /// refine it. Its tokens take the confidence that the model gives them in the order of the
    /// first stage.
    Refine {
        /// Given text before it; may be empty.
        prompt: String,
        /// The text to refine.
        draft: String,
    },
}

impl Prompt {
    /// Text with holes: `"The [____:12] sat."` has a hole of twelve tokens. A space before a hole
    /// belongs to it.
    ///
    /// Errors: [`Error::Request`] where there is no hole, or one of no tokens.
    pub fn infill(text: &str) -> Result<Prompt> {
        parse_infill(text).map(Prompt::Infill)
    }

    /// A text of the caller's own that is refined, after a given text that may be empty.
    pub fn refine(prompt: impl Into<String>, draft: impl Into<String>) -> Prompt {
        Prompt::Refine { prompt: prompt.into(), draft: draft.into() }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Prompt {
        Prompt::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Prompt {
        Prompt::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Prompt {
        Prompt::Tokens(tokens)
    }
}

impl From<Conversation> for Prompt {
    fn from(conversation: Conversation) -> Prompt {
        Prompt::Conversation(conversation)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Prompt {
        Prompt::Chat(messages)
    }
}

/// How the text is made. [`Options::default`] is the preset `did-lift`, or `ar` for an
/// autoregressive checkpoint, with what the model's directory recommends.
///
/// ```
/// use redraft::Options;
/// let options = Options::default().preset("did").length(64).seed(7).temperature(0.8).stop("\n\n");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(super) schedule: Option<Stages>,
    pub(super) length: Option<usize>,
    pub(super) seed: u64,
    pub(super) sample: u32,
    pub(super) priority: i32,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_p_rule: Option<TopPRule>,
    pub(super) top_k: Option<u32>,
    pub(super) stop: Vec<String>,
    pub(super) ignore_eos: bool,
    pub(super) stop_entropy: Option<f64>,
    pub(super) bos: Bos,
}

/// The stages of a request, not yet resolved.
#[derive(Clone, Debug)]
pub(super) enum Stages {
    Preset(String),
    Specs(Vec<StageSpec>),
    Resolved(Schedule),
}

impl Options {
    /// A named schedule: `draft`, `did`, `did-lift`, `llada`, ... (docs/schedules.md lists them).
    pub fn preset(mut self, name: impl Into<String>) -> Self {
        self.schedule = Some(Stages::Preset(name.into()));
        self
    }

    /// A schedule as text: the name of a preset, or stages with a semicolon between two:
    /// `"block=4,unmask=uniform:1; block=full,remask=0.25,by=snapshot,unmask=linear:12"`.
    ///
    /// Errors: [`Error::Request`] for a stage that does not parse. An unknown preset is told when
    /// the request is submitted.
    pub fn schedule_text(self, text: &str) -> Result<Self> {
        if !text.contains('=') {
            return Ok(self.preset(text.trim()));
        }
        let stages: Result<Vec<StageSpec>> = text.split(';').map(|stage| stage.trim().parse()).collect();
        Ok(self.stages(stages?))
    }

    /// Stages as they are spelled: `"block=4,unmask=uniform:1".parse()?`.
    pub fn stages(mut self, stages: impl IntoIterator<Item = StageSpec>) -> Self {
        self.schedule = Some(Stages::Specs(stages.into_iter().collect()));
        self
    }

    /// A schedule that is resolved already.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = Some(Stages::Resolved(schedule));
        self
    }

    /// Tokens to generate, for prompts that are continued. By default 192, or as many as the model
    /// serves.
    pub fn length(mut self, tokens: usize) -> Self {
        self.length = Some(tokens);
        self
    }

    /// Seed of the counter-based generator; 0 by default.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Index of this sample among those of one seed; 0 by default.
    pub fn sample(mut self, index: u32) -> Self {
        self.sample = index;
        self
    }

    /// Softmax temperature of stages that name none; 0 takes the most probable token.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// Nucleus of stages that name none: above 0, at most 1.
    pub fn top_p(mut self, p: f32) -> Self {
        self.top_p = Some(p);
        self
    }

    /// Whether the token that crosses p is in the nucleus.
    pub fn top_p_rule(mut self, rule: TopPRule) -> Self {
        self.top_p_rule = Some(rule);
        self
    }

    /// How many of the most probable tokens stages draw from that name no number; 0 for all.
    pub fn top_k(mut self, k: u32) -> Self {
        self.top_k = Some(k);
        self
    }

    /// Who goes first where not all requests fit: lower values before higher ones; 0 by default. No
    /// text depends on it.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Ends the text before this string. May be called more than once.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Treats the end-of-text token as an ordinary one: the text has its full length.
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Whether a token comes before prompts of text. By default what the family's own script and
    /// its tokenizer put there.
    pub fn bos(mut self, bos: Bos) -> Self {
        self.bos = bos;
        self
    }

    /// Ends the draft where the unigram entropy of its last 256 tokens falls below this many nats.
    pub fn stop_entropy(mut self, nats: f64) -> Self {
        self.stop_entropy = Some(nats);
        self
    }

    /// These options over what the model recommends.
    pub(crate) fn defaults(&self, config: &ModelConfig) -> Result<Defaults> {
        let mut defaults = EngineCore::<Cpu>::defaults(config);
        if let Some(temperature) = self.temperature {
            if !valid_temperature(temperature) {
                return Err(Error::request(format!("temperature: expected a finite number of at least 0, found {temperature}")));
            }
            defaults.temperature = temperature;
        }
        if let Some(p) = self.top_p {
            if !valid_top_p(p) {
                return Err(Error::request(format!("top_p: expected a number above 0, at most 1, found {p}")));
            }
            defaults.top_p = p;
        }
        if self.stop_entropy.is_some_and(|nats| !nats.is_finite() || nats < 0.0) {
            return Err(Error::request("stop_entropy: expected a finite number of nats, at least 0"));
        }
        defaults.top_p_rule = self.top_p_rule.unwrap_or(defaults.top_p_rule);
        if let Some(k) = self.top_k {
            defaults.top_k = top_k_of(k, TopKOrder::Before);
        }
        Ok(defaults)
    }

    /// The schedule for a model.
    pub(crate) fn resolve(&self, config: &ModelConfig) -> Result<Schedule> {
        let defaults = self.defaults(config)?;
        match &self.schedule {
            None => Schedule::preset(default_preset(config), &defaults),
            Some(Stages::Preset(name)) => Schedule::preset(name, &defaults),
            Some(Stages::Specs(specs)) => Schedule::resolve(specs, &defaults),
            Some(Stages::Resolved(schedule)) => Ok(schedule.clone()),
        }
    }
}
