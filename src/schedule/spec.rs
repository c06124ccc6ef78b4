//! Stages as typed: every key optional, filled in and checked against a request's defaults.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::sampling::{Rank, RemaskBy, RemaskRule, RuleArguments, Score, TopK, TopKOrder, TopPRule, Unmask, UnmaskRule};
use crate::sampling::{parse_remask, parse_unmask, top_k_of};
use crate::schedule::stage::{
    Bans, BlockLen, BlockOrigin, Blocks, Decoding, Defaults, Edit, Eos, ExactKv, JointChoice, KvPolicy, LastBlock, Remask, SamplingParams,
    Scope, Stage,
};

/// Maximum number of forwards over a block without masks where `passes` is not given: what LLaDA2.1
/// publishes.
const PASSES: usize = 16;

/// A stage as typed, `"block=4,unmask=uniform:1".parse()?`; keys that are not given take the
/// request's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageSpec {
    pub(super) block: Option<BlockSpec>,
    pub(super) visible: Option<Scope>,
    pub(super) from: Option<BlockOrigin>,
    pub(super) sub: Option<NonZeroUsize>,
    pub(super) remask: Option<f64>,
    pub(super) by: Option<RemaskSpec>,
    pub(super) score: Option<Score>,
    pub(super) unmask: Option<UnmaskSpec>,
    pub(super) order: Option<Rank>,
    pub(super) steps: Option<NonZeroUsize>,
    pub(super) eps: Option<f32>,
    pub(super) order_temperature: Option<f32>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_p_rule: Option<TopPRule>,
    /// 0 keeps everything.
    pub(super) top_k: Option<u32>,
    pub(super) top_k_order: Option<TopKOrder>,
    pub(super) kv: Option<KvPolicy>,
    pub(super) guidance: Option<f32>,
    pub(super) eos: Option<Eos>,
    pub(super) edit: Option<f32>,
    pub(super) passes: Option<usize>,
    /// `Some(None)` where `unmask` says how many.
    pub(super) sampler: Option<Option<NonZeroUsize>>,
    pub(super) bans: Option<Bans>,
    /// `Some(None)` is all ids.
    pub(super) shortlist: Option<Option<NonZeroUsize>>,
    pub(super) last: Option<LastBlock>,
    pub(super) truncated_confidence: Option<bool>,
    pub(super) weights: Option<usize>,
}

/// `block=` as typed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum BlockSpec {
    Full,
    /// [`Defaults::block_len`].
    Trained,
    Of(NonZeroUsize),
}

/// `unmask=` as typed, or a caller's own rule.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum UnmaskSpec {
    Text(String),
    Rule(Unmask),
}

/// `by=` as typed, or a caller's own rule.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RemaskSpec {
    Text(String),
    Rule(RemaskBy),
}

impl StageSpec {
    /// Unmasks by a rule of the caller's own, in the place of `unmask` and the keys beside it.
    pub fn with_unmask(mut self, rule: impl UnmaskRule + 'static) -> StageSpec {
        self.unmask = Some(UnmaskSpec::Rule(Unmask::new(rule)));
        self
    }

    /// Masks the `ratio` (0 to 1) weakest tokens again by a rule of the caller's own, in the place
    /// of `remask`, `by` and `score`.
    pub fn with_remask(mut self, ratio: f64, rule: impl RemaskRule + 'static) -> StageSpec {
        self.remask = Some(ratio);
        self.by = Some(RemaskSpec::Rule(RemaskBy::new(rule)));
        self
    }

    /// Fills in the defaults and checks the stage in its place (`index` 0 drafts).
    pub(super) fn resolve(&self, index: usize, defaults: &Defaults, previous: Option<&Stage>) -> Result<Stage> {
        let stage = self.fill_in(index, defaults).map_err(|error| match error {
            Error::Request { what } => Error::request(format!("stage {index}: {what}")),
            other => other,
        })?;
        stage.check(index, previous)?;
        Ok(stage)
    }

    fn fill_in(&self, index: usize, defaults: &Defaults) -> Result<Stage> {
        Ok(Stage {
            blocks: self.blocks(defaults)?,
            remask: self.remask(index)?,
            unmask: self.unmask()?,
            sampling: self.sampling(defaults)?,
            decoding: self.decoding()?,
            eos: self.eos.unwrap_or_default(),
            weights: self.weights.unwrap_or(0),
        })
    }

    fn blocks(&self, defaults: &Defaults) -> Result<Blocks> {
        let scope = self.visible.unwrap_or(defaults.scope);
        let from = self.from.unwrap_or_default();
        let len = match self.block.unwrap_or(BlockSpec::Full) {
            BlockSpec::Full => None,
            BlockSpec::Trained => NonZeroUsize::new(defaults.block_len),
            BlockSpec::Of(len) => Some(len),
        };
        let fills = self.last == Some(LastBlock::Fill);
        let Some(len) = len else {
            return match (self.sub, fills) {
                (Some(_), _) => Err(Error::request("sub goes with block=LENGTH, a multiple of it")),
                (_, true) => Err(Error::request("last=fill is for the first stage, with visible=block and block=LENGTH")),
                _ => Ok(Blocks::Full { from }),
            };
        };
        let block = BlockLen::new(len, self.sub)?;
        match scope {
            // [SDAR] Block-causal attention counts blocks from position 0, and finished blocks are
            // never seen again anyway.
            Scope::Block if from == BlockOrigin::Prompt => {
                Err(Error::request("from=prompt needs visible=canvas: block-causal attention counts from position 0"))
            }
            Scope::Block => Ok(Blocks::Causal { block, last: self.last.unwrap_or_default() }),
            Scope::Canvas if fills => Err(Error::request("last=fill is for the first stage, with visible=block and block=LENGTH")),
            Scope::Canvas => Ok(Blocks::Canvas { block, from }),
        }
    }

    fn remask(&self, index: usize) -> Result<Option<Remask>> {
        let Some(ratio) = self.remask else {
            // A later stage without a ratio is refused by `Stage::check`.
            return match self.by.is_some() || self.score.is_some() {
                true if index == 0 => Err(Error::request("the first stage drafts, it has nothing to remask")),
                _ => Ok(None),
            };
        };
        let by = match &self.by {
            None => parse_remask("snapshot", self.score)?,
            Some(RemaskSpec::Text(text)) => parse_remask(text, self.score)?,
            Some(RemaskSpec::Rule(_)) if self.score.is_some() => {
                return Err(Error::request("score goes with by=, not with a rule of the caller's own"));
            }
            Some(RemaskSpec::Rule(rule)) => rule.clone(),
        };
        Ok(Some(Remask { ratio, by }))
    }

    /// The unmask rule with the keys that belong to it.
    fn unmask(&self) -> Result<Unmask> {
        let keys = RuleArguments {
            value: None,
            order: self.order,
            order_temperature: self.order_temperature.filter(|t| *t != 0.0),
            steps: self.steps,
            eps: self.eps,
        };
        match (&self.unmask, self.sampler) {
            (Some(_), Some(Some(_))) => {
                Err(Error::request("sampler=joint:K says how many a forward unmasks: without unmask, or sampler=joint"))
            }
            (None, Some(Some(k))) => parse_unmask(&format!("entropy:{k}"), keys),
            (None, _) if self.steps.is_some() => parse_unmask("uniform", keys),
            (None, _) => parse_unmask("uniform:1", keys),
            (Some(UnmaskSpec::Text(text)), _) => parse_unmask(text, keys),
            (Some(UnmaskSpec::Rule(rule)), _) => match keys.given().next() {
                Some(key) => Err(Error::request(format!("{key} goes with unmask=, not with a rule of the caller's own"))),
                None => Ok(rule.clone()),
            },
        }
    }

    fn sampling(&self, defaults: &Defaults) -> Result<SamplingParams> {
        let top_k = match (self.top_k, self.top_k_order) {
            (Some(0), Some(_)) => return Err(Error::request("top_k_order goes with a top-k, found top_k=all")),
            (None, Some(_)) if defaults.top_k.is_none() => return Err(Error::request("top_k_order goes with top_k=K")),
            (k, order) => {
                let base = defaults.top_k.unwrap_or(TopK { k: 0, order: TopKOrder::Before });
                top_k_of(k.unwrap_or(base.k), order.unwrap_or(base.order))
            }
        };
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_p_rule: self.top_p_rule.unwrap_or(defaults.top_p_rule),
            top_k,
            truncated_confidence: self.truncated_confidence.unwrap_or(false),
        })
    }

    fn decoding(&self) -> Result<Decoding> {
        let kv = self.kv.unwrap_or(KvPolicy::Exact);
        let exact = match kv {
            KvPolicy::Exact => Some(ExactKv::Exact),
            KvPolicy::Recompute => Some(ExactKv::Recompute),
            _ => None,
        };
        let guidance = self.guidance.unwrap_or(0.0);
        let edit = match (self.edit, self.passes) {
            (Some(bound), passes) => Some(Edit { bound, passes: passes.unwrap_or(PASSES) }),
            (None, Some(_)) => return Err(Error::request("passes goes with edit=T")),
            (None, None) => None,
        };
        let refuse = |what| Err(Error::request(what));
        if self.sampler.is_some() {
            let Some(kv) = exact else {
                return refuse("sampler=joint carries on the states of a forward over the whole block: it needs kv=exact");
            };
            if guidance > 0.0 || edit.is_some() {
                return refuse("sampler=joint goes without guidance and edit, which run the model twice");
            }
            let choice = match (self.bans.unwrap_or_default(), self.shortlist.flatten()) {
                (Bans::Every, shortlist) => JointChoice::Banned { shortlist },
                (Bans::First, None) => JointChoice::Published,
                (Bans::First, Some(_)) => {
                    return refuse("bans=first goes without a shortlist, which holds no id that the model's own rows ban");
                }
            };
            return Ok(Decoding::Joint { kv, choice });
        }
        if self.bans.is_some() || self.shortlist.is_some() {
            return refuse("bans and shortlist are about the passes of a joint sampler: they go with sampler=joint");
        }
        match exact {
            Some(kv) if guidance > 0.0 || edit.is_some() => Ok(Decoding::Complete { kv, guidance, edit }),
            None if guidance > 0.0 => refuse("guidance runs every forward twice over all rows: it needs visible=canvas and kv=exact"),
            None if edit.is_some() => refuse("edit samples the whole block again: it needs kv=exact and no sub"),
            _ => Ok(Decoding::Independent { kv }),
        }
    }
}
