//! Stages as data: blocks, decoding, unmask and remask rules, sampling parameters.
//!
//! Nested so that most combinations which make no sense have no value: a stage with a joint sampler
//! has no approximate K/V policy, blocks that span the sequence have no last block to fill.
//! [`Stage::check`] holds the rules that remain.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::plan::Visibility;
use crate::sampling::{RemaskBy, ScoringForwards, TopK, TopPRule, Unmask, valid_temperature, valid_top_p};

/// Models one engine may hold.
pub const MAX_MODELS: usize = 16;

/// Length of a block, and of the parts in which it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLen {
    len: NonZeroUsize,
    sub: Option<NonZeroUsize>,
}

impl BlockLen {
    /// `len` positions; with `sub`, tokens are decoded left to right in parts of that length while
    /// attention is the block's ([Fast-dLLM v2]).
    ///
    /// Errors: [`Error::Request`] where `len` is no multiple of `sub`.
    pub fn new(len: NonZeroUsize, sub: Option<NonZeroUsize>) -> Result<BlockLen> {
        match sub {
            Some(sub) if len.get() % sub != 0 => {
                Err(Error::request(format!("sub goes with block=LENGTH, a multiple of it; found {len} and {sub}")))
            }
            _ => Ok(BlockLen { len, sub }),
        }
    }

    /// Positions of a block.
    pub fn positions(&self) -> usize {
        self.len.get()
    }

    /// Positions of a part.
    pub fn sub(&self) -> Option<usize> {
        self.sub.map(NonZeroUsize::get)
    }
}

/// Position at which block 0 begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockOrigin {
    /// Position 0.
    #[default]
    Start,
    /// The first position to be generated.
    Prompt,
}

/// A last block that the length does not fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LastBlock {
    /// It ends where the text ends.
    #[default]
    Cut,
    /// It is decoded to its end, beyond the length that was asked for, and cut afterwards (SDAR,
    /// LLaDA2).
    Fill,
}

/// The blocks that a stage decodes left to right, and how far attention reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// One block that spans the sequence; full attention.
    Full {
        /// Where it begins.
        from: BlockOrigin,
    },
    /// Attention ends with the block ([`Visibility::BlockCausal`]): what block diffusion models are
    /// trained with. Blocks count from position 0.
    Causal {
        /// Length of a block.
        block: BlockLen,
        /// The last block.
        last: LastBlock,
    },
    /// Full attention; only decoding is restricted to the block (LLaDA's semi-autoregressive mode).
    Canvas {
        /// Length of a block.
        block: BlockLen,
        /// Where block 0 begins.
        from: BlockOrigin,
    },
}

/// Which K/V a stage may reuse (docs/architecture.md, exact K/V by default).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPolicy {
    /// Everything visible is recomputed wherever reuse would not be exact.
    Exact,
    /// All rows every r forwards; between them only masked rows and rows unmasked since the last
    /// forward. Approximate.
    Refresh(NonZeroUsize),
    /// As `Refresh`, without any full forward: the previous stage's K/V serve the kept tokens.
    /// Approximate.
    Draft,
    /// Nothing is reused: every forward recomputes all rows it can see. The slow twin of `Exact`,
    /// equal to it token for token.
    Recompute,
    /// Fast-dLLM's prefix cache for full attention: all rows in a block's first forward, in the
    /// others the block and everything after it. Approximate.
    Prefix,
    /// Fast-dLLM's dual cache: all rows in a block's first forward, in the others the block alone.
    /// Under block-causal attention, Fast-dLLM v2's cache inside a block: the block while the first
    /// position of the part is masked, then the part alone. Approximate.
    Dual,
}

/// The K/V policies under which a forward has every row of its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExactKv {
    /// [`KvPolicy::Exact`].
    #[default]
    Exact,
    /// [`KvPolicy::Recompute`].
    Recompute,
}

impl From<ExactKv> for KvPolicy {
    fn from(kv: ExactKv) -> KvPolicy {
        match kv {
            ExactKv::Exact => KvPolicy::Exact,
            ExactKv::Recompute => KvPolicy::Recompute,
        }
    }
}

/// Token editing (LLaDA2.1): unmasked tokens may be overwritten while their block is decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// A token of the block that the model chose, and would now choose otherwise with a confidence
    /// above this, is overwritten. From 0 to 1.
    pub bound: f32,
    /// Maximum number of forwards over the block once no position of it is masked. The first of
    /// them that overwrites nothing is the last.
    pub passes: usize,
}

/// Rows of a joint stage in which the ids are banned that are never sampled: MASK, padding, ids
/// without a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bans {
    /// The model's rows and the sampler's.
    #[default]
    Every,
    /// The model's alone, as the published code does. A pass that samples MASK leaves its position
    /// masked: one unmasking of the forward is spent, and a later pass or forward may take the
    /// position.
    First,
}

/// What the passes of a joint sampler choose among.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JointChoice {
    /// Ids that are not banned ([`Bans::Every`]); with a shortlist, of so many ids at each
    /// position, at least 2: the most probable of the model's own row.
    Banned {
        /// Ids at each position; `None` is all.
        shortlist: Option<NonZeroUsize>,
    },
    /// All ids ([`Bans::First`]).
    Published,
}

/// How the rows of a denoising forward become tokens, and which K/V it may reuse.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decoding {
    /// Tokens are sampled independently of each other.
    Independent {
        /// What a forward reuses.
        kv: KvPolicy,
    },
    /// As `Independent`, with guidance, editing or both, which need every row of the block.
    Complete {
        /// What a forward reuses.
        kv: ExactKv,
        /// Classifier-free guidance: logits are `u + (guidance + 1) (l - u)`, u the logits where
        /// every given position is masked too; 0 is none (LLaDA's `cfg_scale`).
        guidance: f32,
        /// Token editing.
        edit: Option<Edit>,
    },
    /// Tokens of a forward are unmasked one at a time, passes of the joint sampler in between
    /// (ADJUST).
    Joint {
        /// What a forward reuses.
        kv: ExactKv,
        /// What the passes choose among.
        choice: JointChoice,
    },
}

/// What becomes of tokens that end the text (LLaDA, appendix B.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eos {
    /// They are tokens like others.
    #[default]
    Free,
    /// The end of text is never sampled (`logits_eos_inf`).
    Never,
    /// They may be sampled but have confidence 0, so they are unmasked after all others, whose
    /// confidence is that among the others alone (`confidence_eos_eot_inf`).
    Last,
    /// Both: the end of text is never sampled, and of what else ends the confidence is 0.
    NeverLast,
}

/// Masks `floor(ratio * N)` of the N generated positions again.
#[derive(Clone, Debug, PartialEq)]
pub struct Remask {
    /// From 0 to 1.
    pub ratio: f64,
    /// Which are the weakest.
    pub by: RemaskBy,
}

/// How a row's distribution becomes a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Softmax temperature, finite and at least 0; 0 takes the most probable token.
    pub temperature: f32,
    /// Nucleus, above 0 and at most 1.
    pub top_p: f32,
    /// Which published nucleus.
    pub top_p_rule: TopPRule,
    /// How many of the most probable tokens; `None` is all.
    pub top_k: Option<TopK>,
    /// Record and rank by confidence, margin and entropy of the distribution after temperature,
    /// top-k and nucleus instead of the raw ones.
    pub truncated_confidence: bool,
}

/// Whether attention spans the canvas or ends with the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// [`Blocks::Causal`].
    Block,
    /// [`Blocks::Canvas`].
    Canvas,
}

/// One entry of a schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// What is decoded together, and what attention sees.
    pub blocks: Blocks,
    /// What is masked again before; `None` in the first stage alone.
    pub remask: Option<Remask>,
    /// Which positions a forward unmasks.
    pub unmask: Unmask,
    /// How rows become tokens.
    pub sampling: SamplingParams,
    /// K/V reuse, guidance, editing, joint sampling.
    pub decoding: Decoding,
    /// Tokens that end the text.
    pub eos: Eos,
    /// Which of the engine's models runs the stage: 0 is the one it was loaded with.
    pub weights: usize,
}

impl Stage {
    /// Which keys a query sees in this stage.
    pub fn visibility(&self) -> Visibility {
        match self.blocks {
            Blocks::Causal { block, .. } => Visibility::BlockCausal(block.positions()),
            Blocks::Full { .. } | Blocks::Canvas { .. } => Visibility::Full,
        }
    }

    fn block(&self) -> Option<BlockLen> {
        match self.blocks {
            Blocks::Full { .. } => None,
            Blocks::Causal { block, .. } | Blocks::Canvas { block, .. } => Some(block),
        }
    }

    /// Length of a block; `None` is `full`, one block that spans the sequence.
    pub fn block_len(&self) -> Option<usize> {
        self.block().map(|block| block.positions())
    }

    /// Length of the parts in which a block is decoded.
    pub fn sub_len(&self) -> Option<usize> {
        self.block().and_then(|block| block.sub())
    }

    /// Length of a block in a sequence of `len` positions.
    pub fn block_len_in(&self, len: usize) -> usize {
        self.block_len().unwrap_or(len).clamp(1, len.max(1))
    }

    /// Whether blocks count from the first position to be generated.
    pub fn from_prompt(&self) -> bool {
        matches!(self.blocks, Blocks::Full { from: BlockOrigin::Prompt } | Blocks::Canvas { from: BlockOrigin::Prompt, .. })
    }

    /// Whether the last block is decoded to its end.
    pub fn fills_last_block(&self) -> bool {
        matches!(self.blocks, Blocks::Causal { last: LastBlock::Fill, .. })
    }

    /// Positions that the stage decodes where `len` are asked for, the last of them to be
    /// generated.
    pub fn decoded_len(&self, len: usize) -> usize {
        if self.fills_last_block() { len.next_multiple_of(self.block_len_in(len)) } else { len }
    }

    /// Where block 0 begins in a sequence whose first `prompt_len` positions are given.
    pub fn origin(&self, prompt_len: usize) -> usize {
        if self.from_prompt() { prompt_len } else { 0 }
    }

    /// What a forward reuses.
    pub fn kv(&self) -> KvPolicy {
        match self.decoding {
            Decoding::Independent { kv } => kv,
            Decoding::Complete { kv, .. } | Decoding::Joint { kv, .. } => kv.into(),
        }
    }

    /// Scale of classifier-free guidance; 0 is none.
    pub fn guidance(&self) -> f32 {
        if let Decoding::Complete { guidance, .. } = self.decoding { guidance } else { 0.0 }
    }

    /// Token editing.
    pub fn edit(&self) -> Option<Edit> {
        if let Decoding::Complete { edit, .. } = self.decoding { edit } else { None }
    }

    /// Whether a joint sampler unmasks the tokens of a forward.
    pub fn is_joint(&self) -> bool {
        matches!(self.decoding, Decoding::Joint { .. })
    }

    /// Rows in which ids are banned.
    pub fn bans(&self) -> Bans {
        if matches!(self.decoding, Decoding::Joint { choice: JointChoice::Published, .. }) { Bans::First } else { Bans::Every }
    }

    /// Ids among which a joint pass chooses at each position; `None` is all.
    pub fn shortlist(&self) -> Option<usize> {
        match self.decoding {
            Decoding::Joint { choice: JointChoice::Banned { shortlist }, .. } => shortlist.map(NonZeroUsize::get),
            _ => None,
        }
    }

    /// Checks what the types leave open, for stage `index` of a schedule (0 drafts) after
    /// `previous`.
    ///
    /// Errors: [`Error::Request`] that names the stage, and what was expected.
    pub fn check(&self, index: usize, previous: Option<&Stage>) -> Result<()> {
        self.mistake(index, previous).map_or(Ok(()), |what| Err(Error::request(format!("stage {index}: {what}"))))
    }

    fn mistake(&self, index: usize, previous: Option<&Stage>) -> Option<String> {
        let SamplingParams { temperature, top_p, top_k, .. } = self.sampling;
        let kv = self.kv();
        let causal = matches!(self.blocks, Blocks::Causal { .. });
        let forwards = self.remask.as_ref().map(|remask| remask.by.forwards());
        let rules = [
            (!valid_temperature(temperature), "temperature wants a finite number of at least 0"),
            (!valid_top_p(top_p), "top_p wants a number above 0, at most 1"),
            (top_k.is_some_and(|top_k| top_k.k == 0), "top_k wants a number of tokens, at least 1"),
            (index == 0 && self.remask.is_some(), "the first stage drafts, it has nothing to remask"),
            (index > 0 && self.remask.is_none(), "a refining stage needs remask=RATIO"),
            (self.remask.as_ref().is_some_and(|remask| !(0.0..=1.0).contains(&remask.ratio)), "remask wants a ratio from 0 to 1"),
            (
                matches!(self.eos, Eos::Last | Eos::NeverLast) && !self.unmask.by_confidence(),
                "eos=last gives confidence 0 to ends of the text, so the rule must go by confidence",
            ),
            (kv == KvPolicy::Draft && index == 0, "kv=draft reuses the K/V of an earlier stage, the first stage has none"),
            (
                kv == KvPolicy::Draft && forwards.is_some_and(|forwards| matches!(forwards, ScoringForwards::HeldOut(_))),
                "kv=draft cannot follow held-out scoring, whose forwards overwrite the draft's K/V; use kv=refresh:R",
            ),
            (
                causal && (kv == KvPolicy::Prefix || kv == KvPolicy::Dual && self.sub_len().is_none()),
                "kv=prefix and kv=dual are for visible=canvas, or kv=dual with sub: under block-causal attention kv=exact reuses more, exactly",
            ),
            (!valid_temperature(self.guidance()), "guidance wants a finite number of at least 0"),
            (causal && self.guidance() > 0.0, "guidance runs every forward twice over all rows: it needs visible=canvas and kv=exact"),
            (self.edit().is_some_and(|edit| !(0.0..=1.0).contains(&edit.bound)), "edit wants a probability from 0 to 1"),
            (self.edit().is_some() && self.sub_len().is_some(), "edit samples the whole block again: it needs kv=exact and no sub"),
            (
                self.is_joint() && self.unmask.ranking().is_none(),
                "sampler=joint unmasks a number of tokens a forward: unmask=RANK:K, linear, fixed or timestep",
            ),
            (self.is_joint() && matches!(self.eos, Eos::Last | Eos::NeverLast), "sampler=joint goes without eos=last"),
            (self.shortlist() == Some(1), "shortlist wants a number of ids, at least 2, or all"),
            (index > 0 && self.fills_last_block(), "last=fill is for the first stage, with visible=block and block=LENGTH"),
            (self.weights >= MAX_MODELS, "weights wants the index of a --model, from 0"),
            (
                kv == KvPolicy::Draft && previous.is_some_and(|previous| previous.weights != self.weights),
                "kv=draft cannot reuse the K/V of other weights; use kv=refresh:R",
            ),
        ];
        rules.into_iter().find(|(broken, _)| *broken).map(|(_, what)| what.to_owned())
    }
}

/// Sampling parameters that stages inherit unless they say otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// Softmax temperature.
    pub temperature: f32,
    /// Nucleus.
    pub top_p: f32,
    /// Which published nucleus.
    pub top_p_rule: TopPRule,
    /// How many of the most probable tokens.
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
