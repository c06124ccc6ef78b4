//! What a sequence tells about itself: events, reports of stages, and where a text ends.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::schedule::Stage;

/// Number of trailing tokens the low-entropy stop looks at ([BD3-LM] `_check_stop_conds`).
pub const ENTROPY_WINDOW: usize = 256;

/// Given the generated tokens so far: how many of them to keep, if the text should end there.
pub type TextStop = Arc<dyn Fn(&[u32]) -> Option<usize> + Send + Sync>;

/// When a draft ends before its length. Checked whenever a block of stage 0 is finished; needs
/// generated positions up to the end.
#[derive(Clone, Default)]
pub struct Stop {
    /// Any of these tokens ends the text, and is kept as its last token.
    pub tokens: Vec<u32>,
    /// Ends the text before its last 256 tokens when their unigram entropy (nats) falls below this
    /// ([BD3-LM] uses 4.0).
    pub entropy: Option<f64>,
    pub text: Option<TextStop>,
}

/// Why a sequence ended where it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It has the requested length.
    Length,
    /// At a token that ends the text.
    EndOfText,
    /// Before a stop text.
    StopText,
    /// Where its tokens repeated: the unigram entropy fell below the limit.
    LowEntropy,
    /// Where it was cancelled.
    Cancelled,
}

impl Finish {
    /// As the JSON output spells it: `end-of-text`.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Length => "length",
            Finish::EndOfText => "end-of-text",
            Finish::StopText => "stop-text",
            Finish::LowEntropy => "low-entropy",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// What happened to a set of positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Masked positions took these tokens. Positions beyond the length that was asked for may be
    /// among them where the last block is decoded to its end; they are cut before the block is
    /// committed.
    Unmask,
    /// Tokens that stood were overwritten with these, by the forward of the same step whose
    /// unmasked tokens, if it had any, are the event before. `confidence` is theirs, and their
    /// snapshot from now on. A position may be edited any number of times until its block is
    /// committed.
    Edit,
    /// These tokens were masked again; `confidence` holds the scores that chose them.
    Remask,
    /// A block of the stage is finished.
    Commit,
    /// The sequence is finished: all generated positions.
    Done,
}

/// One step of a sequence, as `--trace` writes it and library callers receive it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Index of the sample among those of one seed.
    pub sample: u32,
    /// Index of the stage in the schedule.
    pub stage: u8,
    /// Index of the block in the stage.
    pub block: usize,
    /// Denoising forwards of the stage before this one.
    pub step: u32,
    /// What happened.
    pub kind: EventKind,
    /// Where, ascending.
    pub positions: Vec<usize>,
    /// The token at each position.
    pub tokens: Vec<u32>,
    /// Snapshot confidence at each position; scores where tokens are masked again.
    pub confidence: Vec<f32>,
}

/// Forwards of a stage by kind; each forward counts once (rows committed inside a denoising forward
/// cost rows, not forwards).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Forwards {
    /// Forwards over a prompt's whole blocks.
    pub prefill: usize,
    /// Forwards that unmask tokens: NFE.
    pub denoise: usize,
    /// Forwards that only write final K/V.
    pub commit: usize,
    /// Passes of a joint sampler.
    pub joint: usize,
    /// Scoring forwards of post-hoc and held-out remasking.
    pub score: usize,
    /// Second runs of denoising forwards, without the prompt, for guidance.
    pub guide: usize,
}

impl Forwards {
    /// All of them, passes of a joint sampler too.
    pub fn total(&self) -> usize {
        let Forwards { prefill, denoise, commit, joint, score, guide } = self;
        prefill + denoise + commit + joint + score + guide
    }
}

impl std::ops::AddAssign for Forwards {
    fn add_assign(&mut self, other: Forwards) {
        let Forwards { prefill, denoise, commit, joint, score, guide } = other;
        self.prefill += prefill;
        self.denoise += denoise;
        self.commit += commit;
        self.joint += joint;
        self.score += score;
        self.guide += guide;
    }
}

/// What a stage did and cost.
#[derive(Clone, Debug, PartialEq)]
pub struct StageReport {
    /// The stage itself.
    pub stage: Stage,
    /// Forwards by kind.
    pub forwards: Forwards,
    /// Query rows processed.
    pub rows: usize,
    /// Positions of the open block, or of the canvas, summed over the denoising forwards.
    pub canvas_positions: usize,
    /// Positions masked again, ascending.
    pub remasked: Vec<usize>,
    /// Remasked tokens that came back different.
    pub changed: usize,
    /// Tokens overwritten while their block was decoded, a position once for each time.
    pub edited: usize,
    /// Wall time, in milliseconds.
    pub ms: f64,
    /// Positions masked again, paired with the token each held.
    pub(super) before: Vec<(usize, u32)>,
}

impl StageReport {
    /// Denoising forwards, as the papers count them: commits, prefill and scoring are not included
    /// ([BD3-LM] B.9).
    pub fn nfe(&self) -> usize {
        self.forwards.denoise
    }
}

/// Unigram entropy of a token sequence, in nats.
pub fn unigram_entropy(tokens: &[u32]) -> f64 {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    let n = tokens.len() as f64;
    sorted.chunk_by(|a, b| a == b).map(|run| run.len() as f64 / n).map(|p| -p * p.ln()).sum()
}
