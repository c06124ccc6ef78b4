//! Plain data of sampling: draws and what comes of them, rankings, unmask rules, scores.
//!
//! A leaf: the backends, the schedule and the sampling rules share these types, and nothing here
//! knows any of them.
#![forbid(unsafe_code)]

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

/// How one masked row is sampled: a token draw, or the probability of a given token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Uniform in [0, 1) with 53 random bits.
    pub u: f64,
    /// 0 takes the most probable token (ties: lowest id) and ignores `u`.
    pub temperature: f32,
    /// In (0, 1]; 1 keeps everything.
    pub top_p: f32,
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

/// The answer for one row. Raw quantities are under softmax(logits) with banned ids excluded,
/// before temperature, top-k and nucleus; `log_prob` always is, the others unless the draw asks
/// otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampledToken {
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
    /// A uniformly random order. With one token per forward this is BD3-LM's first-hitting
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

/// Which masked positions of the current block a forward unmasks. Every rule unmasks at least one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unmask {
    /// The best `n`.
    Count { rank: Rank, n: usize },
    /// LLaDA's quota: m masks over `steps` forwards, `m / steps` each and one more in the first `m
    /// % steps`.
    Linear { rank: Rank, steps: usize },
    /// SDAR's quota: a block of L positions over `steps` forwards, `L / steps` each and one more in
    /// the first `L % steps`, however many of them are masked.
    Fixed { rank: Rank, steps: usize },
    /// Dream's integer schedule over `linspace(1, eps, steps + 1)` in f32: `floor(masks left * (1 -
    /// s/t))`, the rest in the last step. Steps whose count is zero are skipped without a forward:
    /// Dream runs them, and throws their result away.
    Timestep { rank: Rank, steps: usize, eps: f32 },
    /// Dream's `origin` over the same times: each masked position by itself, with probability `1 -
    /// s/t` and in the last step surely. Drawn as one time in [0, 1) for each position, revealed by
    /// the step in which it lies: the reverse process itself. Steps in which no time lies are
    /// skipped without a forward.
    Ancestral { steps: usize, eps: f32 },
    /// Everything with confidence >= the threshold, and always the most confident (Fast-dLLM).
    Threshold(f32),
    /// Everything with confidence > the bound, and at least the most confident ones of
    /// [`Unmask::Fixed`]'s quota over `steps`, one without (SDAR `low_confidence_dynamic`,
    /// Fast-dLLM v2).
    Above { bound: f32, steps: Option<usize> },
    /// Fast-dLLM's factor f: of the confidences in descending order the first, and on from there
    /// while the r-th is at least `1 - f / (r + 1)`. As in its code, a last mask that alone falls
    /// short goes along.
    Factor(f32),
    /// Lowest entropies first while (cumulative sum - largest so far) <= the bound, in nats.
    EntropyBound(f32),
}

impl Unmask {
    /// The ranking of the rules that count.
    pub fn rank(&self) -> Option<Rank> {
        match *self {
            Unmask::Count { rank, .. } | Unmask::Linear { rank, .. } | Unmask::Fixed { rank, .. } | Unmask::Timestep { rank, .. } => {
                Some(rank)
            }
            _ => None,
        }
    }

    /// Whether confidence alone says what is revealed.
    pub fn by_confidence(&self) -> bool {
        self.rank() == Some(Rank::Confidence) || matches!(self, Unmask::Threshold(_) | Unmask::Above { .. } | Unmask::Factor(_))
    }
}

/// The unmask rule of one step, its quota already counted (`sampling::quota`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UnmaskStep {
    /// The best `n` by `rank`.
    Best { rank: Rank, n: usize },
    /// Everything with confidence >= the threshold, and always the most confident.
    Threshold(f32),
    /// Lowest entropies first while (cumulative sum - largest so far) <= the bound, in nats.
    EntropyBound(f32),
}

/// What a scoring forward (post-hoc, held-out) makes of the answer p at a position; the lowest are
/// masked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// `ln p(token)`: improbable tokens, mistakes and rare words alike.
    Probability,
    /// `ln p(token) + H(p)`: less probable than a draw from p would be on average (after Meister et
    /// al., "Locally typical sampling", arXiv 2202.00666, equation 6, one-sided). A rare word among
    /// many possible ones is not low.
    Typicality,
    /// `ln p(token) - ln snapshot(token)`: what the forward that revealed the token believed, and
    /// this one no longer does.
    Lift,
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
