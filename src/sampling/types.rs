//! Plain data of sampling: draws and what comes of them, rankings, unmask rules, scores.
//!
//! A leaf: the backends, the schedule and the sampling rules share these types, and nothing here
//! knows any of them.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Which published nucleus rule applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TopPRule {
    /// Keep tokens, most probable first, while the cumulative sum *including* the token is <= p;
    /// always the first. [BD3-LM]
    Within,
    /// Also keep the token that crosses p (Hugging Face, Dream).
    Crossing,
}

/// Which of the most probable tokens may be drawn: k of them, and those that are as probable as the
/// last of these. Banned ids are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopK {
    /// At least 1.
    pub k: u32,
    /// Before or after the nucleus.
    pub order: TopKOrder,
}

/// Which published order of top-k and nucleus applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TopKOrder {
    /// The nucleus is one of what top-k leaves (Hugging Face, SDAR, LLaDA2).
    #[default]
    Before,
    /// The nucleus is one of the whole distribution (Dream).
    After,
}

/// What is asked of one masked row: a token draw, or the probability of a given token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Uniform in [0, 1) with 53 random bits.
    pub u: f64,
    /// 0 takes the most probable token (ties: lowest id) and ignores `u`.
    pub temperature: f32,
    /// In (0, 1]; 1 keeps everything.
    pub top_p: f32,
    /// Which published nucleus.
    pub top_p_rule: TopPRule,
    /// `None` keeps everything.
    pub top_k: Option<TopK>,
    /// `Some(t)`: choose t instead of drawing (scoring, teacher forcing).
    pub forced: Option<u32>,
    /// Report confidence, margin and entropy of the distribution that the token is drawn from,
    /// after temperature, top-k and nucleus, instead of the raw ones. At temperature 0 that is what
    /// they leave at temperature 1. Nothing for a forced token.
    pub truncated_confidence: bool,
}

/// The token sampled from one row. Raw quantities are under softmax(logits) with banned ids
/// excluded, before temperature, top-k and nucleus; `log_prob` always is, the others unless the
/// draw says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampledToken {
    /// Id of the token.
    pub token: u32,
    /// Probability of `token`: raw, or after temperature, top-k and nucleus where the draw asks for
    /// it.
    pub confidence: f32,
    /// ln of the raw probability of `token`.
    pub log_prob: f32,
    /// Top-1 minus top-2 probability.
    pub margin: f32,
    /// Entropy in nats.
    pub entropy: f32,
}

/// The ranking by which masked positions are revealed, best first; ties to the lower position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// A uniformly random order. With one reveal per forward this is BD3-LM's first-hitting
    /// sampler.
    Uniform,
    /// Highest probability of the chosen token first.
    Confidence,
    /// Largest top-1 minus top-2 probability first.
    Margin,
    /// Lowest entropy first.
    Entropy,
    /// Lowest position first.
    Left,
}

impl Rank {
    /// Every ranking with its name in a stage.
    pub const ALL: [(Rank, &str); 5] = [
        (Rank::Uniform, "uniform"),
        (Rank::Confidence, "confidence"),
        (Rank::Margin, "margin"),
        (Rank::Entropy, "entropy"),
        (Rank::Left, "left"),
    ];
}

impl FromStr for Rank {
    type Err = Error;

    fn from_str(text: &str) -> Result<Rank> {
        let found = Rank::ALL.iter().find(|(_, name)| *name == text).map(|(rank, _)| *rank);
        found.ok_or_else(|| Error::request(format!("expected uniform, confidence, margin, entropy or left, found `{text}`")))
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name) = Rank::ALL.iter().find(|(rank, _)| rank == self).expect("every ranking has a name");
        f.write_str(name)
    }
}

/// The unmask rule of one step, its quota already counted:
/// [`UnmaskRule::on_device`](crate::sampling::UnmaskRule::on_device).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UnmaskStep {
    /// The best `n` by `rank`.
    Best {
        /// By what positions are ranked.
        rank: Rank,
        /// Positions, at least 1.
        n: usize,
    },
    /// Everything with confidence >= the threshold, and always the most confident.
    Threshold(f32),
    /// Lowest entropies first while (cumulative sum - largest so far) <= the bound, in nats.
    EntropyBound(f32),
}

/// Finite and not negative.
pub fn valid_temperature(t: f32) -> bool {
    t.is_finite() && t >= 0.0
}

/// Above 0 and at most 1.
pub fn valid_top_p(p: f32) -> bool {
    p > 0.0 && p <= 1.0
}

/// As configurations spell top-k: 0 keeps everything.
pub fn top_k_of(k: u32, order: TopKOrder) -> Option<TopK> {
    (k > 0).then_some(TopK { k, order })
}
