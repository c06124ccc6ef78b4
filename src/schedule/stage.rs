//! Stages as data: block, scope, unmask and remask rules, K/V policy, sampling parameters.
#![forbid(unsafe_code)]

use crate::plan::Visibility;
use crate::sampling::{Score, TopK, TopPRule, Unmask};

/// By which score the tokens to mask again are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemaskBy {
    /// Lowest probability at the forward that revealed the token. Free.
    Snapshot,
    /// Lowest probability in one forward over the finished text, nothing masked.
    PostHoc,
    /// Lowest probability while masked: g forwards, each hiding one of g interleaved groups.
    HeldOut(usize),
    /// Uniformly random.
    Random,
}

/// Masks `floor(ratio * N)` of the N generated positions again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remask {
    pub ratio: f64,
    pub by: RemaskBy,
    pub score: Score,
}

/// Which K/V a stage may reuse (docs/architecture.md, exact K/V by default).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPolicy {
    /// Everything visible is recomputed wherever reuse would not be exact.
    Exact,
    /// All rows every r forwards; between them only masked rows and rows revealed since the last
    /// forward. Approximate.
    Refresh(usize),
    /// As `Refresh`, without any full forward: the previous stage's K/V serve the kept tokens.
    /// Approximate.
    Draft,
    /// Nothing is reused: every forward recomputes all rows it can see. The slow twin of `Exact`,
    /// equal to it token for token.
    Recompute,
    /// Fast-dLLM's prefix cache for full attention: all rows in a block's first forward, in the
    /// others the block and everything behind it. Approximate.
    Prefix,
    /// Fast-dLLM's dual cache: all rows in a block's first forward, in the others the block alone.
    /// Under block-causal attention, Fast-dLLM v2's cache inside a block: the block while the first
    /// position of the part is masked, then the part alone. Approximate.
    Dual,
}

/// What becomes of tokens that end the text (LLaDA, appendix B.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eos {
    /// They are tokens like others.
    #[default]
    Free,
    /// The end of text is never drawn (`logits_eos_inf`).
    Never,
    /// They may be drawn but have confidence 0, so they are revealed behind all others, whose
    /// confidence is that among the others alone (`confidence_eos_eot_inf`).
    Last,
    /// Both: the end of text is never drawn, and of what else ends the confidence is 0.
    NeverLast,
}

/// Tokens that stand may give way while their block is decoded (LLaDA2.1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// A token of the block that the model chose, and would now choose otherwise with a confidence
    /// above this, is overwritten.
    pub bound: f32,
    /// Forwards at most over the block once no position of it is masked. The first of them that
    /// overwrites nothing is the last.
    pub passes: usize,
}

/// Where a joint stage bans what is never drawn: MASK, padding, ids without a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bans {
    /// In the model's answers and in the sampler's.
    #[default]
    Every,
    /// In the model's alone, as the published code does. A pass that draws MASK leaves its position
    /// masked: one of the round's tokens is spent, and a later pass or forward may take the
    /// position.
    First,
}

/// Whether the model's attention spans the canvas or ends with the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Visibility `block_causal(block_len)`: what block diffusion models are trained with.
    Block,
    /// Visibility full; only sampling is restricted to the block (LLaDA's semi-autoregressive
    /// mode).
    Canvas,
}

/// One entry of a schedule, resolved and checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// `None` is `full`: one block spanning the sequence.
    pub block_len: Option<usize>,
    pub scope: Scope,
    /// Blocks count from the first position to be generated and not from position 0.
    pub from_prompt: bool,
    /// Within a block, tokens are sampled left to right in parts of this length; attention is the
    /// block's ([Fast-dLLM v2]).
    pub sub_len: Option<usize>,
    pub remask: Option<Remask>,
    pub unmask: Unmask,
    /// Above 0, a ranking by confidence, margin or entropy becomes a draw: positions one after the
    /// other, without putting back, with weights `exp(rank / temperature)` (Dream's `alg_temp`).
    pub order_temperature: f32,
    pub temperature: f32,
    pub top_p: f32,
    pub top_p_rule: TopPRule,
    pub top_k: Option<TopK>,
    /// Classifier-free guidance: logits are `u + (guidance + 1) (l - u)`, u the logits where every
    /// given position is masked too; 0 is none (LLaDA's `cfg_scale`).
    pub guidance: f32,
    pub eos: Eos,
    pub edit: Option<Edit>,
    /// A forward's tokens are sampled one at a time, the joint sampler's passes in between
    /// (ADJUST).
    pub joint: bool,
    pub bans: Bans,
    /// The sampler's passes choose among so many ids at each position, the most probable ones of
    /// the model's own answer there; `None` is all of them.
    pub shortlist: Option<usize>,
    /// The last block is decoded to its end, beyond the length that was asked for, and cut
    /// afterwards (SDAR, LLaDA2).
    pub fill: bool,
    pub kv: KvPolicy,
    /// Record and rank by confidence, margin and entropy of the distribution after temperature,
    /// top-k and nucleus instead of the raw ones.
    pub truncated_confidence: bool,
    /// Which of the engine's models runs the stage: 0 is the one it was loaded with.
    pub weights: usize,
}

impl Stage {
    /// Who sees whom in this stage.
    pub fn visibility(&self) -> Visibility {
        match (self.block_len, self.scope) {
            (Some(block_len), Scope::Block) => Visibility::BlockCausal(block_len),
            _ => Visibility::Full,
        }
    }

    /// Length of a block that is sampled together in a sequence of `len` positions.
    pub fn block_len_in(&self, len: usize) -> usize {
        self.block_len.unwrap_or(len).clamp(1, len.max(1))
    }

    /// Positions that the stage decodes where `len` are asked for, the last of them to be
    /// generated.
    pub fn decoded_len(&self, len: usize) -> usize {
        if self.fill { len.next_multiple_of(self.block_len_in(len)) } else { len }
    }

    /// Where block 0 begins in a sequence whose first `prompt_len` positions are given.
    pub fn origin(&self, prompt_len: usize) -> usize {
        if self.from_prompt { prompt_len } else { 0 }
    }
}

/// Sampling parameters that stages inherit unless they say otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_p_rule: TopPRule,
    pub top_k: Option<TopK>,
    /// Scope of stages that do not name one: `Block` for block diffusion models, `Canvas` for
    /// models trained with full attention.
    pub scope: Scope,
    /// What `block=trained` is: the block length of a block diffusion model.
    pub block_len: usize,
}

impl Default for Defaults {
    /// Temperature 1, nucleus 0.9 by the BD3-LM rule, no top-k, blocks of 4 that end attention.
    fn default() -> Self {
        Defaults { temperature: 1.0, top_p: 0.9, top_p_rule: TopPRule::Within, top_k: None, scope: Scope::Block, block_len: 4 }
    }
}

/// Models one engine may hold.
pub const MAX_MODELS: usize = 16;
