//! Steps as data: what is planned, what came of it, and the sequences that it is applied to.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::time::Instant;

use crate::canvas::Canvas;
use crate::error::Result;
use crate::plan::{LogitsRows, Plan};
use crate::sampling::{Draw, SampledToken, UnmaskStep};

/// One forward over rows of several sequences, and how its rows are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStep {
    /// Under [`StepSampling::Rules`] token ids are ignored, since the device reads its canvas, and
    /// the rows of a sequence are consecutive positions.
    pub plan: Plan,
    pub sampling: StepSampling,
}

/// How the rows of a step are sampled.
#[derive(Clone, Debug, PartialEq)]
pub enum StepSampling {
    /// By rules that are known before the steps ahead of this one are sampled.
    Rules(RuleSampling),
    /// Row by row on the host.
    Draws(HostSampling),
}

/// What a device needs to sample a step by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSampling {
    /// One for each sequence of the plan.
    pub sequences: Vec<SequenceStep>,
    /// Where a sequence samples jointly.
    pub joint: Option<PlannedJoint>,
}

/// One sequence's part of a step that is sampled on the device: which masked positions are sampled,
/// and how they are revealed.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceStep {
    /// Positions masked again before the step: the lowest snapshot confidences of the whole
    /// sequence.
    pub remask: Option<usize>,
    pub stage: u8,
    pub block: u32,
    /// Denoising forward within the stage.
    pub step: u32,
    /// Every position of it that is masked then is sampled.
    pub range: Range<usize>,
    /// How many those are.
    pub num_sampled: usize,
    /// Which rows hold their logits. Under [`LogitsRows::Before`] position 0, which no row is
    /// before, is not among those sampled.
    pub logits: LogitsRows,
    /// Without `u`, which the device takes from the counter RNG, and `forced`.
    pub draw: Draw,
    pub unmask: UnmaskStep,
}

/// What a joint sampler does after the forward of a step. Rows are those of the forward's plan.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedJoint {
    /// For each row of the first pass, the one whose final row its state begins as.
    pub inside: Vec<u32>,
    /// Rows outside of their sequence's window, ascending: they append the sampler's K/V.
    pub outside: Vec<u32>,
    pub passes: Vec<PlannedPass>,
}

/// One pass of a joint sampler, and what is sampled by it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedPass {
    /// The windows of the sequences that still unmask something, ascending; all of them are among
    /// those of the pass before.
    pub rows: Vec<u32>,
    /// One for each sequence of the plan; those that are through sample nothing.
    pub sequences: Vec<SequenceStep>,
}

/// What the host needs to sample a step.
#[derive(Clone, Debug, PartialEq)]
pub struct HostSampling {
    /// One for each sequence of the plan.
    pub sequences: Vec<HostSequence>,
    /// The same forward without the prompt, of the sequences that are guided.
    pub guide: Option<Plan>,
    /// Why a runner that could let a device sample leaves this step to the host.
    pub because: Option<HostReason>,
}

/// What the host samples of one sequence in a forward or in a pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostSequence {
    /// Sampled positions, their rows (counted among the sequence's own) and draws.
    pub positions: Vec<usize>,
    pub rows: Vec<u32>,
    pub draws: Vec<Draw>,
    pub rule: HostRule,
    /// Where sampling is joint: what the sampler takes from the forward.
    pub window: Option<HostWindow>,
}

/// What neighbours have in common that are sampled together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostRule {
    pub banned: BannedSet,
    /// Tokens that end a text get confidence 0, and the others the one that they have without
    /// those.
    pub ends_last: bool,
    /// Scale of guidance, 0 for none (LLaDA counts from 0).
    pub guidance: f32,
}

/// The window of a sequence that samples jointly. Rows are counted among the sequence's own.
#[derive(Clone, Debug, PartialEq)]
pub struct HostWindow {
    /// First position of the window.
    pub start: u32,
    /// For each position of the window, the row whose final row its state begins as.
    pub inside: Vec<u32>,
    pub outside: Vec<u32>,
    /// Ids that the passes choose among at each sampled position; `None`: all.
    pub shortlist: Option<usize>,
}

/// A pass of a joint sampler that the host samples.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPass {
    /// The windows of the sequences that still unmask something, with their tokens as they are now.
    pub plan: Plan,
    /// One for each sequence of the step; `None` where it is through.
    pub sequences: Vec<Option<HostSequence>>,
}

/// Which ids a row may not choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BannedSet {
    #[default]
    Never,
    NeverAndEnd,
    End,
    Nothing,
}

/// The ids that rows may not choose, each list ascending.
#[derive(Clone, Debug, Default)]
pub struct BannedIds {
    /// MASK, padding, and ids without a token.
    pub never: Vec<u32>,
    /// The end of text.
    pub end: Vec<u32>,
    /// Everything that ends a text, and the end of a turn.
    pub last: Vec<u32>,
    /// `never` with `end`, and with `last`.
    pub never_and_end: Vec<u32>,
    pub never_and_last: Vec<u32>,
}

impl BannedIds {
    pub fn new(never: Vec<u32>, end: Vec<u32>, last: Vec<u32>) -> BannedIds {
        let union = |more: &[u32]| {
            let mut all = [&never[..], more].concat();
            all.sort_unstable();
            all.dedup();
            all
        };
        BannedIds { never_and_end: union(&end), never_and_last: union(&last), never, end, last }
    }

    pub fn ids(&self, set: BannedSet) -> &[u32] {
        match set {
            BannedSet::Never => &self.never,
            BannedSet::NeverAndEnd => &self.never_and_end,
            BannedSet::End => &self.end,
            BannedSet::Nothing => &[],
        }
    }
}

/// Why a step is sampled on the host although the backend has a device that samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostReason {
    NothingToSample,
    Scoring,
    ForcedTokens,
    GivenDraft,
    InjectedDraws,
    KvPolicy,
    FirstPosition,
    UnmaskRule,
    OrderTemperature,
    Guidance,
    Eos,
    Edit,
    Shortlist,
    BansFirst,
}

impl HostReason {
    /// The words of the schedule where there are any.
    pub fn name(self) -> &'static str {
        match self {
            HostReason::NothingToSample => "a prefill or commit samples nothing",
            HostReason::Scoring => "scoring for a remask",
            HostReason::ForcedTokens => "forced tokens",
            HostReason::GivenDraft => "a given draft",
            HostReason::InjectedDraws => "draws of a test",
            HostReason::KvPolicy => "kv: rows depend on what was unmasked",
            HostReason::FirstPosition => "shifted logits: position 0 is not given",
            HostReason::UnmaskRule => "unmask: a rule that the device does not know",
            HostReason::OrderTemperature => "order_temperature",
            HostReason::Guidance => "guidance",
            HostReason::Eos => "eos",
            HostReason::Edit => "edit",
            HostReason::Shortlist => "shortlist",
            HostReason::BansFirst => "bans=first",
        }
    }
}

impl fmt::Display for HostReason {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Steps of the same sequences that were planned together.
#[derive(Clone, Debug)]
pub struct PlannedRun<'a> {
    /// At least one. Several only where all of them are sampled by rules.
    pub steps: Vec<PlannedStep>,
    pub banned: &'a BannedIds,
    pub mask_id: u32,
}

/// A sequence at the start of a run.
#[derive(Clone, Copy, Debug)]
pub struct RunCanvas<'a> {
    pub canvas: &'a Canvas,
    pub seed: u64,
    pub sample: u32,
}

/// What was sampled by a forward, or by a pass of a joint sampler after it.
#[derive(Clone, Debug)]
pub struct StepOutcome {
    /// `None`: the forward's.
    pub pass: Option<usize>,
    /// When the step began, where it is not the first of its run.
    pub began: Option<Instant>,
    /// One for each sequence; `None` where it took no part.
    pub sequences: Vec<Option<Result<Vec<RowOutcome>>>>,
}

/// What was sampled at one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowOutcome {
    pub position: usize,
    pub sampled: SampledToken,
    /// Whether the device revealed it; `None` where the host has yet to choose.
    pub revealed: Option<bool>,
}

/// The sequences of a run, as its runner sees them.
pub trait Sequences {
    /// As they are when the run begins.
    fn canvases(&self) -> Vec<RunCanvas<'_>>;
    /// Takes what was sampled, in the order of the steps and passes.
    fn apply(&mut self, outcome: StepOutcome);
    /// The pass that a joint sampler runs next, after what was applied; `None`: the step is
    /// through.
    fn next_pass(&mut self) -> Option<HostPass>;
}

/// Times of one forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// Milliseconds of a forward, each the mean over the launches of a run.
    pub times_ms: Vec<f64>,
    /// Launches of a run.
    pub launches: usize,
    /// Launched from a recording, without the host's share.
    pub recorded: bool,
}

/// Numbers of rows that a step needs buffers for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepRows {
    pub forward: usize,
    /// States of a joint sampler: of the windows, and of rows outside them.
    pub inside: usize,
    pub outside: usize,
}

impl StepRows {
    /// The larger of both.
    pub fn max(self, other: StepRows) -> StepRows {
        StepRows {
            forward: self.forward.max(other.forward),
            inside: self.inside.max(other.inside),
            outside: self.outside.max(other.outside),
        }
    }
}

/// Lists of the `n` most probable ids of some rows of the windows.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowShortlist {
    pub rows: Vec<u32>,
    pub n: usize,
    pub banned: Vec<u32>,
}
