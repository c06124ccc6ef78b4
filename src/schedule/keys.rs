//! Table of stage keys, from which parser, printer, errors and documentation come.
//!
//! [`Stage`]'s `Display` is the canonical form: every key that has a value, in the order of the
//! table. It parses back to the same stage.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::sampling::unmask::values;
use crate::sampling::{RuleArguments, TopKOrder, TopPRule, parse_remask, parse_unmask, valid_temperature, valid_top_p};
use crate::schedule::spec::{BlockSpec, RemaskSpec, StageSpec, UnmaskSpec};
use crate::schedule::stage::{Bans, BlockOrigin, Blocks, Eos, KvPolicy, LastBlock, MAX_MODELS, Scope, Stage};

/// A key of a stage.
#[derive(Clone, Copy, Debug)]
pub struct StageKey {
    /// The text before `=`.
    pub name: &'static str,
    /// What may follow it, as errors say it.
    pub values: &'static str,
    /// What a stage has that does not give the key.
    pub default: &'static str,
    /// What it means, with its source.
    pub doc: &'static str,
    set: fn(&mut StageSpec, &str) -> std::result::Result<(), Refusal>,
    print: fn(&Stage) -> Option<String>,
}

/// Why a value is not taken.
enum Refusal {
    /// The key was given before.
    Twice,
    /// The value is none of [`StageKey::values`].
    Value,
    /// The table of rules says why.
    Rule(Error),
}

/// Every key, in the order in which stages print them.
pub static STAGE_KEYS: [StageKey; 28] = [
    StageKey {
        name: "block",
        values: "a length of at least 1, trained or full",
        default: "`full`",
        doc: "the unit that is denoised, left to right: a length, `trained` (the block length of a block diffusion model; 4 for others), or \
              `full`, the whole sequence",
        set: |spec, text| {
            let block = match text {
                "full" => Some(BlockSpec::Full),
                "trained" => Some(BlockSpec::Trained),
                _ => count(text).map(BlockSpec::Of),
            };
            fill(&mut spec.block, block)
        },
        print: |stage| Some(stage.block_len().map_or("full".into(), |len| len.to_string())),
    },
    StageKey {
        name: "visible",
        values: "block or canvas",
        default: "`block`; `canvas` for models trained with full attention",
        doc: "`block`: attention ends with the block (block diffusion). `canvas`: attention spans the canvas, only decoding is restricted to \
              the block (LLaDA's semi-autoregressive mode). Without meaning where `block=full`",
        set: |spec, text| fill(&mut spec.visible, named(&[("block", Scope::Block), ("canvas", Scope::Canvas)], text)),
        print: |stage| match stage.blocks {
            Blocks::Full { .. } => None,
            Blocks::Causal { .. } => Some("block".into()),
            Blocks::Canvas { .. } => Some("canvas".into()),
        },
    },
    StageKey {
        name: "from",
        values: "start or prompt",
        default: "`start`",
        doc: "where block 0 begins: `start` (position 0) or `prompt` (the first position to be generated; with `visible=canvas`)",
        set: |spec, text| fill(&mut spec.from, named(&[("start", BlockOrigin::Start), ("prompt", BlockOrigin::Prompt)], text)),
        print: |stage| stage.from_prompt().then(|| "prompt".into()),
    },
    StageKey {
        name: "sub",
        values: "a length of at least 1",
        default: "",
        doc: "decode the block in parts of this length, left to right, while attention is the block's (Fast-dLLM v2); `block` is a multiple",
        set: |spec, text| fill(&mut spec.sub, count(text)),
        print: |stage| stage.sub_len().map(|sub| sub.to_string()),
    },
    StageKey {
        name: "remask",
        values: "a ratio from 0 to 1",
        default: "",
        doc: "share of the generated tokens to mask again, `floor(ratio * N)` of them; required from the second stage on",
        set: |spec, text| fill(&mut spec.remask, text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio))),
        print: |stage| stage.remask.as_ref().map(|remask| remask.ratio.to_string()),
    },
    StageKey {
        name: "by",
        values: "a remask rule",
        default: "`snapshot`",
        doc: "which tokens are the weakest: a [remask rule](#remask-rules)",
        set: |spec, text| {
            let rule = parse_remask(text, None).map(|_| RemaskSpec::Text(text.into()));
            fill(&mut spec.by, Some(rule.map_err(Refusal::Rule)?))
        },
        print: |stage| stage.remask.as_ref().map(|remask| remask.by.value()),
    },
    StageKey {
        name: "score",
        values: "probability, typicality or lift",
        default: "`probability`",
        doc: "what a scoring forward (`post-hoc`, `held-out`) makes of its distribution: a [score](#remask-rules)",
        set: |spec, text| fill(&mut spec.score, text.parse().ok()),
        print: |stage| stage.remask.as_ref().and_then(|remask| key_of(&remask.by.keys(), "score")),
    },
    StageKey {
        name: "unmask",
        values: "an unmask rule",
        default: "`uniform:1`",
        doc: "which positions a forward unmasks: an [unmask rule](#unmask-rules)",
        set: |spec, text| {
            let rule = parse_unmask(text, RuleArguments::default()).map(|_| UnmaskSpec::Text(text.into()));
            fill(&mut spec.unmask, Some(rule.map_err(Refusal::Rule)?))
        },
        print: |stage| Some(stage.unmask.value()),
    },
    StageKey {
        name: "order",
        values: "uniform, confidence, margin, entropy or left",
        default: "`confidence`",
        doc: "ranking of `linear`, `fixed` and `timestep`",
        set: |spec, text| fill(&mut spec.order, text.parse().ok()),
        print: |stage| key_of(&stage.unmask.keys(), "order"),
    },
    StageKey {
        name: "steps",
        values: "a number of forwards, at least 1",
        default: "",
        doc: "with a ranking alone: `unmask=uniform,steps=12` is `unmask=linear:12,order=uniform`. With `above`: unmask the quota of \
              `fixed:STEPS` at least",
        set: |spec, text| fill(&mut spec.steps, count(text)),
        print: |stage| key_of(&stage.unmask.keys(), "steps"),
    },
    StageKey {
        name: "eps",
        values: "a time above 0 and below 1",
        default: "0.001",
        doc: "last time of `timestep` and `ancestral`, whose times are `linspace(1, eps, STEPS + 1)`",
        set: |spec, text| fill(&mut spec.eps, text.parse().ok().filter(|eps| *eps > 0.0 && *eps < 1.0)),
        print: |stage| key_of(&stage.unmask.keys(), "eps"),
    },
    StageKey {
        name: "order_temperature",
        values: "a finite number of at least 0",
        default: "0",
        doc: "above 0, positions are drawn by `exp(rank / T)` without replacement instead of ranked by confidence, margin or entropy (Dream's \
              `alg_temp`)",
        set: |spec, text| fill(&mut spec.order_temperature, text.parse().ok().filter(|t| valid_temperature(*t))),
        print: |stage| key_of(&stage.unmask.keys(), "order_temperature"),
    },
    StageKey {
        name: "temperature",
        values: "a finite number of at least 0",
        default: "`--temperature`, or what the model's `generation_config.json` recommends, or 1",
        doc: "softmax temperature; 0 takes the most probable token",
        set: |spec, text| fill(&mut spec.temperature, text.parse().ok().filter(|t| valid_temperature(*t))),
        print: |stage| Some(stage.sampling.temperature.to_string()),
    },
    StageKey {
        name: "top_p",
        values: "a number above 0, at most 1",
        default: "`--top-p`, or what the model recommends, or 0.9",
        doc: "nucleus: the most probable tokens up to a mass of p",
        set: |spec, text| fill(&mut spec.top_p, text.parse().ok().filter(|p| valid_top_p(*p))),
        print: |stage| Some(stage.sampling.top_p.to_string()),
    },
    StageKey {
        name: "top_p_rule",
        values: "within or crossing",
        default: "`--top-p-rule`, or `within`",
        doc: "`within`: the nucleus ends before the token that crosses p (BD3-LM). `crossing`: after it (Hugging Face, Dream)",
        set: |spec, text| fill(&mut spec.top_p_rule, named(&TOP_P_RULES, text)),
        print: |stage| Some(name_of(&TOP_P_RULES, stage.sampling.top_p_rule)),
    },
    StageKey {
        name: "top_k",
        values: "a number of tokens, at least 1, or all",
        default: "`--top-k`, or what the model recommends, or `all`",
        doc: "sample from the K most probable tokens and those as probable as the last of them",
        set: |spec, text| fill(&mut spec.top_k, if text == "all" { Some(0) } else { text.parse().ok().filter(|k| *k > 0) }),
        print: |stage| Some(stage.sampling.top_k.map_or("all".into(), |top_k| top_k.k.to_string())),
    },
    StageKey {
        name: "top_k_order",
        values: "before or after (the nucleus)",
        default: "`before`",
        doc: "`before` the nucleus, which is then one of those K (Hugging Face, SDAR, LLaDA2), or `after` it (Dream)",
        set: |spec, text| fill(&mut spec.top_k_order, named(&TOP_K_ORDERS, text)),
        print: |stage| stage.sampling.top_k.map(|top_k| name_of(&TOP_K_ORDERS, top_k.order)),
    },
    StageKey {
        name: "kv",
        values: "exact, refresh:FORWARDS, draft, prefix, dual or recompute",
        default: "`exact`",
        doc: "which keys and values a forward reuses: a [K/V policy](#kv-policies)",
        set: |spec, text| {
            let kv = match text.split_once(':') {
                Some(("refresh", forwards)) => count(forwards).map(KvPolicy::Refresh),
                Some(_) => None,
                None => named(&KV_POLICIES, text),
            };
            fill(&mut spec.kv, kv)
        },
        print: |stage| match stage.kv() {
            KvPolicy::Refresh(forwards) => Some(format!("refresh:{forwards}")),
            kv => Some(name_of(&KV_POLICIES, kv)),
        },
    },
    StageKey {
        name: "guidance",
        values: "a finite number of at least 0",
        default: "0",
        doc: "S above 0: logits `u + (S + 1)(l - u)`, u those of a second forward in which every given position is masked too (LLaDA's \
              `cfg_scale`); with `visible=canvas`, `kv=exact`",
        set: |spec, text| fill(&mut spec.guidance, text.parse().ok().filter(|s| valid_temperature(*s))),
        print: |stage| Some(stage.guidance()).filter(|scale| *scale > 0.0).map(|scale| scale.to_string()),
    },
    StageKey {
        name: "eos",
        values: "free, never, last or never+last",
        default: "`free`",
        doc: "tokens that end the text: `free`, `never` (the end of text is not sampled), `last` (they have confidence 0, so they are unmasked \
              after all others), `never+last`",
        set: |spec, text| fill(&mut spec.eos, named(&EOS, text)),
        print: |stage| Some(stage.eos).filter(|eos| *eos != Eos::Free).map(|eos| eos.to_string()),
    },
    StageKey {
        name: "edit",
        values: "a probability from 0 to 1",
        default: "",
        doc: "T: a forward over a block also overwrites tokens of it that the model chose earlier, where it would now choose another with a \
              confidence above T (LLaDA2.1); with `kv=exact`",
        set: |spec, text| fill(&mut spec.edit, text.parse().ok().filter(|bound: &f32| (0.0..=1.0).contains(bound))),
        print: |stage| stage.edit().map(|edit| edit.bound.to_string()),
    },
    StageKey {
        name: "passes",
        values: "a number of forwards",
        default: "16",
        doc: "with `edit`: maximum number of forwards over a block without masks; the first of them that overwrites nothing is the last",
        set: |spec, text| fill(&mut spec.passes, text.parse().ok().filter(|n| *n <= 1 << 32)),
        print: |stage| stage.edit().map(|edit| edit.passes.to_string()),
    },
    StageKey {
        name: "sampler",
        values: "joint:K, or joint beside unmask=RANK:K",
        default: "",
        doc: "`joint:K`: K tokens a forward, one at a time in order of entropy, a pass of the [joint sampler](#joint-sampling) in between; \
              `joint` beside any `unmask` that counts (`RANK:K`, `linear`, `fixed`, `timestep`)",
        set: |spec, text| {
            let joint = match text.split_once(':') {
                None if text == "joint" => Some(None),
                Some(("joint", k)) => count(k).map(Some),
                _ => None,
            };
            fill(&mut spec.sampler, joint)
        },
        print: |stage| stage.is_joint().then(|| "joint".into()),
    },
    StageKey {
        name: "bans",
        values: "every or first",
        default: "`every`",
        doc: "rows in which ids are banned that are never sampled, beside `sampler=joint`: `every` row, or the model's own (`first`) alone, as \
              the [published code](#joint-sampling) does",
        set: |spec, text| fill(&mut spec.bans, named(&[("every", Bans::Every), ("first", Bans::First)], text)),
        print: |stage| (stage.bans() == Bans::First).then(|| "first".into()),
    },
    StageKey {
        name: "shortlist",
        values: "a number of ids, at least 2, or all",
        default: "`all`",
        doc: "N: passes of the [joint sampler](#joint-sampling) choose at each position among the N most probable ids of the model's own row",
        set: |spec, text| {
            let ids = if text == "all" { Some(None) } else { count(text).filter(|n| n.get() >= 2).map(Some) };
            fill(&mut spec.shortlist, ids)
        },
        print: |stage| stage.shortlist().map(|n| n.to_string()),
    },
    StageKey {
        name: "last",
        values: "cut or fill",
        default: "`cut`",
        doc: "a last block that the length does not fill: `cut` (it ends where the text ends) or `fill` (it is decoded to its end, and what \
              exceeds the length is cut afterwards; SDAR, LLaDA2); first stage, `visible=block`",
        set: |spec, text| fill(&mut spec.last, named(&[("cut", LastBlock::Cut), ("fill", LastBlock::Fill)], text)),
        print: |stage| stage.fills_last_block().then(|| "fill".into()),
    },
    StageKey {
        name: "confidence",
        values: "raw or truncated",
        default: "`raw`",
        doc: "what the snapshot records and rules go by, margins and entropies too: `raw`, or of the distribution after temperature, top-k and \
              nucleus (`truncated`; at temperature 0, what they leave at temperature 1)",
        set: |spec, text| fill(&mut spec.truncated_confidence, named(&[("raw", false), ("truncated", true)], text)),
        print: |stage| Some(if stage.sampling.truncated_confidence { "truncated".into() } else { "raw".into() }),
    },
    StageKey {
        name: "weights",
        values: "the index of a --model, from 0",
        default: "0",
        doc: "which `--model` runs the stage (give `--model` more than once; same tokenizer, K/V pages of its own)",
        set: |spec, text| fill(&mut spec.weights, text.parse().ok().filter(|n| *n < MAX_MODELS)),
        print: |stage| Some(stage.weights).filter(|index| *index > 0).map(|index| index.to_string()),
    },
];

const TOP_P_RULES: [(&str, TopPRule); 2] = [("within", TopPRule::Within), ("crossing", TopPRule::Crossing)];
const TOP_K_ORDERS: [(&str, TopKOrder); 2] = [("before", TopKOrder::Before), ("after", TopKOrder::After)];
const EOS: [(&str, Eos); 4] = [("free", Eos::Free), ("never", Eos::Never), ("last", Eos::Last), ("never+last", Eos::NeverLast)];
const KV_POLICIES: [(&str, KvPolicy); 5] = [
    ("exact", KvPolicy::Exact),
    ("draft", KvPolicy::Draft),
    ("recompute", KvPolicy::Recompute),
    ("prefix", KvPolicy::Prefix),
    ("dual", KvPolicy::Dual),
];

fn named<T: Copy>(names: &[(&str, T)], text: &str) -> Option<T> {
    names.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: T) -> String {
    names.iter().find(|(_, named)| *named == value).map_or_else(String::new, |(name, _)| (*name).to_owned())
}

fn key_of(keys: &[(&'static str, String)], name: &str) -> Option<String> {
    keys.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())
}

/// A count of at least 1, as rules take it.
fn count(text: &str) -> Option<NonZeroUsize> {
    values::count(text).ok()
}

fn fill<T>(slot: &mut Option<T>, value: Option<T>) -> std::result::Result<(), Refusal> {
    if slot.is_some() {
        return Err(Refusal::Twice);
    }
    *slot = Some(value.ok_or(Refusal::Value)?);
    Ok(())
}

fn key_names() -> String {
    STAGE_KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")
}

impl FromStr for StageSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut spec = StageSpec::default();
        for item in text.split(',') {
            let fail = |what: String| Error::request(format!("stage `{text}`: {what}"));
            let (name, value) =
                item.split_once('=').ok_or_else(|| fail(format!("expected key=value, found `{item}`; keys: {}", key_names())))?;
            let key = STAGE_KEYS.iter().find(|key| key.name == name);
            let key = key.ok_or_else(|| fail(format!("unknown key `{name}`; keys: {}", key_names())))?;
            (key.set)(&mut spec, value).map_err(|refusal| match refusal {
                Refusal::Twice => fail(format!("{name} is given twice")),
                Refusal::Value => fail(format!("{name} wants {}, found `{value}`", key.values)),
                Refusal::Rule(Error::Request { what }) => fail(what),
                Refusal::Rule(other) => other,
            })?;
        }
        Ok(spec)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (key, value) in STAGE_KEYS.iter().filter_map(|key| (key.print)(self).map(|value| (key.name, value))) {
            write!(f, "{comma}{key}={value}")?;
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Display for Eos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name_of(&EOS, *self))
    }
}

impl fmt::Display for KvPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvPolicy::Refresh(forwards) => write!(f, "refresh:{forwards}"),
            kv => f.write_str(&name_of(&KV_POLICIES, *kv)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::TopK;
    use crate::schedule::stage::{Decoding, Edit, ExactKv, JointChoice};
    use crate::schedule::{PRESETS, Preset, Schedule};
    use proptest::prelude::*;

    use crate::sampling::{Count, Linear};
    use crate::sampling::{REMASK_RULES, UNMASK_RULES, Unmask, top_k_of};
    use crate::sampling::{Rank, Ranking};
    use crate::schedule::stage::Defaults;

    fn one(index: usize, text: &str) -> Result<Stage> {
        text.parse::<StageSpec>()?.resolve(index, &Defaults::default(), None)
    }

    #[test]
    fn presets_resolve_and_print_back() {
        for preset in &PRESETS {
            let name = preset.name;
            let schedule = Schedule::preset(name, &Defaults::default()).unwrap();
            for (index, stage) in schedule.stages().iter().enumerate() {
                assert_eq!(one(index, &stage.to_string()).unwrap(), *stage, "{name}: {stage}");
            }
        }
    }

    #[test]
    fn steps_is_a_quota_over_a_ranking() {
        let three = NonZeroUsize::new(3).unwrap();
        let rule = |text: &str| one(0, text).unwrap().unmask;
        let linear = |rank: Rank| Unmask::new(Linear { ranking: rank.into(), steps: three });
        assert_eq!(rule("block=4,unmask=uniform,steps=3"), linear(Rank::Uniform));
        assert_eq!(rule("block=4,steps=3"), linear(Rank::Uniform));
        assert_eq!(rule("block=4,unmask=linear:3"), linear(Rank::Confidence));
        assert_eq!(rule("block=4"), Unmask::new(Count { ranking: Ranking::from(Rank::Uniform), n: NonZeroUsize::MIN }));
    }

    #[test]
    fn top_k_starts_where_the_model_recommends() {
        let defaults = Defaults { top_k: top_k_of(20, TopKOrder::Before), ..Defaults::default() };
        let k = |text: &str| text.parse::<StageSpec>().unwrap().resolve(0, &defaults, None).unwrap().sampling.top_k.map(|k| (k.k, k.order));
        assert_eq!(k("block=4"), Some((20, TopKOrder::Before)));
        assert_eq!(k("block=4,top_k_order=after"), Some((20, TopKOrder::After)));
        assert_eq!(k("block=4,top_k=3"), Some((3, TopKOrder::Before)));
        assert_eq!(k("block=4,top_k=all"), None);
        for Preset { name, stages, .. } in &PRESETS {
            // Published samplers are what they are whatever a model recommends.
            let published = stages[0].contains("temperature=");
            assert_eq!(Schedule::preset(name, &defaults).unwrap().stages()[0].sampling.top_k.is_none(), published, "{name}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (index, text, word) in [
            (0, "nonsense", "key=value"),
            (0, "colour=red", "unknown key"),
            (0, "block=0", "at least 1"),
            (0, "block=-4", "at least 1"),
            (0, "block=99999999999999999999", "at least 1"),
            (0, "block=4,block=8", "twice"),
            (0, "block=4,remask=0.5", "drafts"),
            (0, "block=4,by=random", "drafts"),
            (0, "kv=draft", "earlier stage"),
            (1, "block=full", "remask=RATIO"),
            (1, "remask=1.5", "0 to 1"),
            (1, "remask=nan", "0 to 1"),
            (1, "remask=0.5,by=held-out:1", "GROUPS"),
            (1, "remask=0.5,by=held-out:4,kv=draft", "overwrite"),
            (1, "remask=0.5,kv=refresh:0", "FORWARDS"),
            (0, "unmask=uniform:0", "uniform:N"),
            (0, "unmask=threshold:2", "threshold:T"),
            (0, "unmask=uniform:1,steps=4", "ranking alone"),
            (0, "unmask=confidence:1,order=left", "order goes with"),
            (0, "temperature=-1", "at least 0"),
            (0, "temperature=inf", "at least 0"),
            (0, "top_p=0", "above 0"),
            (0, "top_k=0", "or all"),
            (0, "top_k=-3", "or all"),
            (0, "top_k=5,top_k_order=beside", "before or after"),
            (0, "top_k_order=after", "goes with top_k=K"),
            (0, "top_k=all,top_k_order=after", "found top_k=all"),
            (0, "", "key=value"),
            (0, "block=4,from=prompt,visible=block", "visible=canvas"),
            (0, "from=middle", "start or prompt"),
            (0, "block=4,kv=dual,visible=block", "visible=canvas"),
            (0, "sub=4", "block=LENGTH"),
            (0, "block=32,sub=5", "a multiple of it"),
            (0, "block=32,sub=0", "at least 1"),
            (0, "unmask=above:1.5", "above:T"),
            (0, "unmask=factor:-1", "factor:F"),
            (0, "unmask=threshold:0.9,steps=4", "unmask=above:T"),
            (0, "unmask=ancestral:0", "ancestral:STEPS"),
            (0, "unmask=ancestral:4,order=left", "order goes with"),
            (0, "unmask=linear:4,eps=0.1", "eps goes with"),
            (0, "unmask=timestep:4,eps=1", "below 1"),
            (0, "sampler=joint:0", "joint:K"),
            (0, "sampler=marginal", "joint:K"),
            (0, "sampler=joint:2,unmask=entropy:2", "says how many"),
            (0, "sampler=joint,unmask=threshold:0.9", "a number of tokens"),
            (0, "sampler=joint:2,eos=last", "eos=last"),
            (0, "sampler=joint:2,kv=refresh:2", "kv=exact"),
            (0, "sampler=joint:2,visible=canvas,guidance=1", "without guidance"),
            (0, "unmask=entropy:2,bans=first", "sampler=joint"),
            (0, "unmask=entropy:2,shortlist=all", "sampler=joint"),
            (0, "sampler=joint:2,bans=last", "every or first"),
            (0, "sampler=joint:2,shortlist=1", "at least 2"),
            (0, "sampler=joint:2,shortlist=-4", "or all"),
            (0, "sampler=joint:2,shortlist=8,bans=first", "without a shortlist"),
            (0, "unmask=uniform:1,order_temperature=0.1", "goes with"),
            (0, "unmask=threshold:0.9,order_temperature=0.5", "goes with"),
            (0, "order_temperature=nan", "finite"),
            (0, "guidance=-1", "at least 0"),
            (0, "block=4,visible=block,guidance=1", "visible=canvas"),
            (0, "block=full,guidance=1,kv=refresh:2", "kv=exact"),
            (0, "eos=last", "by confidence"),
            (0, "eos=maybe", "free, never, last or never+last"),
            (0, "edit=1.5", "0 to 1"),
            (0, "edit=0.9,passes=-1", "number of forwards"),
            (0, "passes=3", "goes with edit"),
            (0, "block=8,edit=0.9,kv=refresh:2", "kv=exact"),
            (0, "block=8,sub=4,edit=0.9", "no sub"),
            (0, "block=8,last=whole", "cut or fill"),
            (0, "block=full,last=fill", "block=LENGTH"),
            (0, "block=8,visible=canvas,last=fill", "visible=block"),
            (1, "block=8,remask=0.5,last=fill", "first stage"),
            (0, "weights=-1", "--model"),
            (0, "weights=16", "--model"),
        ] {
            let error = one(index, text).expect_err(text).to_string();
            assert!(error.contains(word), "`{text}` says: {error}");
        }
        assert!(Schedule::resolve(&[], &Defaults::default()).is_err());
        let other = ["block=4", "remask=0.5,kv=draft,weights=1"].map(|s| s.parse().unwrap());
        assert!(Schedule::resolve(&other, &Defaults::default()).unwrap_err().to_string().contains("other weights"));
        assert!(Schedule::preset("best", &Defaults::default()).unwrap_err().to_string().contains("did"));
    }

    /// A stage of the caller's own is held to the same rules as a typed one.
    #[test]
    fn stages_made_by_hand_are_checked() {
        let draft = one(0, "block=8,sub=4").unwrap();
        let refine = one(1, "block=full,remask=0.5,by=held-out:2").unwrap();
        assert!(Schedule::new(vec![draft.clone(), refine.clone()]).is_ok());
        assert!(Schedule::new(vec![]).unwrap_err().to_string().contains("at least one stage"));
        assert!(Schedule::new(vec![draft.clone(); 256]).is_err());
        let broken = |index: usize, change: &dyn Fn(&mut Stage), word: &str| {
            let mut stages = vec![draft.clone(), refine.clone()];
            change(&mut stages[index]);
            let error = Schedule::new(stages).expect_err(word).to_string();
            assert!(error.contains(word) && error.contains(&format!("stage {index}")), "{word}: {error}");
        };
        for temperature in [f32::NAN, f32::INFINITY, -1.0] {
            broken(0, &|stage| stage.sampling.temperature = temperature, "temperature");
        }
        for p in [f32::NAN, 0.0, -1.0, 2.0] {
            broken(0, &|stage| stage.sampling.top_p = p, "top_p");
        }
        for ratio in [f64::NAN, f64::INFINITY, -1.0, 2.0] {
            broken(1, &|stage| stage.remask.as_mut().unwrap().ratio = ratio, "ratio");
        }
        broken(0, &|stage| stage.sampling.top_k = Some(TopK { k: 0, order: TopKOrder::Before }), "top_k");
        broken(0, &|stage| stage.decoding = Decoding::Independent { kv: KvPolicy::Draft }, "kv=draft");
        broken(1, &|stage| stage.remask = None, "remask=RATIO");
        broken(0, &|stage| stage.remask.clone_from(&refine.remask), "drafts");
        let edit = |bound| Some(Edit { bound, passes: 1 });
        broken(1, &|stage| stage.decoding = Decoding::Complete { kv: ExactKv::Exact, guidance: f32::NAN, edit: None }, "guidance");
        broken(1, &|stage| stage.decoding = Decoding::Complete { kv: ExactKv::Exact, guidance: 0.0, edit: edit(2.0) }, "edit");
        broken(0, &|stage| stage.decoding = Decoding::Complete { kv: ExactKv::Exact, guidance: 0.0, edit: edit(0.5) }, "no sub");
        broken(0, &|stage| stage.weights = MAX_MODELS, "weights");
        let listed = JointChoice::Banned { shortlist: NonZeroUsize::new(1) };
        broken(0, &|stage| stage.decoding = Decoding::Joint { kv: ExactKv::Exact, choice: listed }, "shortlist");
    }

    /// Values that the table's keys may take, legal and not, for random stages.
    fn some_values(key: &str) -> Vec<String> {
        let list = |text: &str| text.split(' ').map(String::from).collect();
        match key {
            "block" => list("full trained 3 8 96"),
            "visible" => list("block canvas"),
            "from" => list("start prompt"),
            "sub" => list("4 8"),
            "remask" => list("0 0.35 1"),
            "by" => REMASK_RULES.iter().map(|row| row.usage()[3..].replace("GROUPS", "3")).collect(),
            "score" => list("probability typicality lift"),
            "unmask" => UNMASK_RULES
                .iter()
                .map(|row| format!("{}:{}", row.name, if ["N", "STEPS"].contains(&row.argument) { "7" } else { "0.25" }))
                .collect(),
            "order" => list("uniform entropy left"),
            "steps" => list("3"),
            "eps" => list("0.5"),
            "order_temperature" => list("0 0.5"),
            "temperature" => list("0 0.7 1"),
            "top_p" => list("0.5 1"),
            "top_p_rule" => list("within crossing"),
            "top_k" => list("all 5"),
            "top_k_order" => list("before after"),
            "kv" => list("exact recompute refresh:3 prefix dual draft"),
            "guidance" => list("0 1.5"),
            "eos" => list("free never last never+last"),
            "edit" => list("0.9"),
            "passes" => list("3"),
            "sampler" => list("joint joint:3"),
            "bans" => list("every first"),
            "shortlist" => list("all 9"),
            "last" => list("cut fill"),
            "confidence" => list("raw truncated"),
            "weights" => list("0 3"),
            other => panic!("no value for the key {other}"),
        }
    }

    /// Every legal stage of 40,000 random ones prints a text that is read back as the same stage,
    /// and every value of every key is among them.
    #[test]
    fn stages_print_back() {
        let mut state = 1u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let values: Vec<Vec<String>> = STAGE_KEYS.iter().map(|key| some_values(key.name)).collect();
        let (mut seen, mut legal) = (std::collections::BTreeSet::new(), 0);
        for _ in 0..40_000 {
            let index = random(2);
            let count = 1 + random(6);
            let mut chosen: Vec<usize> = (0..count).map(|_| random(STAGE_KEYS.len())).collect();
            if index == 1 {
                chosen.push(STAGE_KEYS.iter().position(|key| key.name == "remask").unwrap());
            }
            chosen.sort_unstable();
            chosen.dedup();
            let items: Vec<_> =
                chosen.iter().map(|key| format!("{}={}", STAGE_KEYS[*key].name, values[*key][random(values[*key].len())])).collect();
            let text = items.join(",");
            if let Ok(stage) = one(index, &text) {
                assert_eq!(one(index, &stage.to_string()).unwrap_or_else(|error| panic!("{text}: {stage}: {error}")), stage, "{text}");
                seen.extend(items);
                legal += 1;
            }
        }
        let all = STAGE_KEYS.iter().zip(&values).flat_map(|(key, values)| values.iter().map(move |value| format!("{}={value}", key.name)));
        let missing: Vec<_> = all.filter(|item| !seen.contains(item)).collect();
        assert!(legal > 4000 && missing.is_empty(), "{legal} legal stages, never in one: {missing:?}");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "[a-z_=:,.0-9-]{0,60}") {
            let _ = text.parse::<StageSpec>().map(|spec| spec.resolve(1, &Defaults::default(), None));
        }
    }
}
