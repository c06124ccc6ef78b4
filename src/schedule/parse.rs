//! Spelling of stages: `key=value,...` as typed, resolved once against the request's
//! defaults and checked. [`Stage`]'s `Display` is the canonical spelling and parses back to the
//! same stage.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::sampling::{Rank, Score, TopK, TopKOrder, TopPRule, Unmask, top_k_of, valid_temperature, valid_top_p};
use crate::schedule::stage::{Bans, Defaults, Edit, Eos, KvPolicy, MAX_MODELS, Remask, RemaskBy, Scope, Stage};

/// A stage as typed: everything optional.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageSpec {
    block: Option<Block>,
    scope: Option<Scope>,
    from_prompt: Option<bool>,
    sub: Option<usize>,
    ratio: Option<f64>,
    by: Option<RemaskBy>,
    score: Option<Score>,
    unmask: Option<UnmaskSpec>,
    order: Option<Rank>,
    steps: Option<usize>,
    eps: Option<f32>,
    order_temperature: Option<f32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_p_rule: Option<TopPRule>,
    /// 0 keeps everything.
    top_k: Option<u32>,
    top_k_order: Option<TopKOrder>,
    guidance: Option<f32>,
    eos: Option<Eos>,
    edit: Option<f32>,
    passes: Option<usize>,
    fill: Option<bool>,
    /// `Some(None)` where `unmask` says how many.
    joint: Option<Option<usize>>,
    bans: Option<Bans>,
    /// `Some(None)` is all ids.
    shortlist: Option<Option<usize>>,
    kv: Option<KvPolicy>,
    truncated_confidence: Option<bool>,
    weights: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    Full,
    /// [`Defaults::block_len`].
    Trained,
    Of(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum UnmaskSpec {
    Rank(Rank, Option<usize>),
    Linear(usize),
    Fixed(usize),
    Timestep(usize),
    Ancestral(usize),
    Threshold(f32),
    Above(f32),
    Factor(f32),
    EntropyBound(f32),
}

const KEYS: &str = "block, visible, from, sub, remask, by, score, unmask, order, steps, eps, order_temperature, temperature, top_p, top_p_rule, \
                    top_k, top_k_order, guidance, eos, edit, passes, last, sampler, bans, shortlist, kv, confidence, weights";

/// Forwards over a block without masks where `passes` is not given: what LLaDA2.1 publishes.
const PASSES: usize = 16;

/// The last time of Dream's schedules where `eps` is not given.
const EPS: f32 = 1e-3;

impl FromStr for StageSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut spec = StageSpec::default();
        for item in text.split(',') {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| Error::request(format!("stage `{text}`: expected key=value, found `{item}`; keys: {KEYS}")))?;
            let bad = |want: &str| Error::request(format!("stage `{text}`: {key} wants {want}, found `{value}`"));
            fn set<T>(slot: &mut Option<T>, value: Option<T>, twice: Error, bad: Error) -> Result<()> {
                if slot.is_some() {
                    return Err(twice);
                }
                *slot = Some(value.ok_or(bad)?);
                Ok(())
            }
            let twice = Error::request(format!("stage `{text}`: {key} is given twice"));
            match key {
                "block" => set(&mut spec.block, parse_block(value), twice, bad("a length of at least 1, trained or full"))?,
                "visible" => {
                    let scope = match value {
                        "block" => Some(Scope::Block),
                        "canvas" => Some(Scope::Canvas),
                        _ => None,
                    };
                    set(&mut spec.scope, scope, twice, bad("block or canvas"))?;
                }
                "from" => {
                    let from = match value {
                        "start" => Some(false),
                        "prompt" => Some(true),
                        _ => None,
                    };
                    set(&mut spec.from_prompt, from, twice, bad("start or prompt"))?;
                }
                "sub" => set(&mut spec.sub, parse_count(value), twice, bad("a length of at least 1"))?,
                "remask" => {
                    let ratio = value.parse().ok().filter(|r| (0.0..=1.0).contains(r));
                    set(&mut spec.ratio, ratio, twice, bad("a ratio from 0 to 1"))?;
                }
                "by" => set(&mut spec.by, parse_by(value), twice, bad("snapshot, post-hoc, held-out:GROUPS (2 or more) or random"))?,
                "score" => set(&mut spec.score, parse_score(value), twice, bad("probability, typicality or lift"))?,
                "unmask" => {
                    let want = "uniform:N, confidence:N, margin:N, entropy:N, left:N, threshold:T, above:T, factor:F, linear:STEPS, \
                                fixed:STEPS, timestep:STEPS, ancestral:STEPS or entropy-bound:NATS";
                    set(&mut spec.unmask, parse_unmask(value), twice, bad(want))?;
                }
                "order" => set(&mut spec.order, parse_rank(value), twice, bad("uniform, confidence, margin, entropy or left"))?,
                "steps" => set(&mut spec.steps, parse_count(value), twice, bad("a number of forwards, at least 1"))?,
                "eps" => {
                    let eps = value.parse().ok().filter(|e| *e > 0.0 && *e < 1.0);
                    set(&mut spec.eps, eps, twice, bad("a time above 0 and below 1"))?;
                }
                "order_temperature" => {
                    let t = value.parse().ok().filter(|t| valid_temperature(*t));
                    set(&mut spec.order_temperature, t, twice, bad("a finite number of at least 0"))?;
                }
                "temperature" => {
                    let t = value.parse().ok().filter(|t| valid_temperature(*t));
                    set(&mut spec.temperature, t, twice, bad("a finite number of at least 0"))?;
                }
                "top_p" => set(&mut spec.top_p, value.parse().ok().filter(|p| valid_top_p(*p)), twice, bad("a number above 0, at most 1"))?,
                "top_p_rule" => {
                    let rule = match value {
                        "within" => Some(TopPRule::Within),
                        "crossing" => Some(TopPRule::Crossing),
                        _ => None,
                    };
                    set(&mut spec.top_p_rule, rule, twice, bad("within or crossing"))?;
                }
                "top_k" => {
                    let k = if value == "all" { Some(0) } else { value.parse().ok().filter(|k| *k > 0) };
                    set(&mut spec.top_k, k, twice, bad("a number of tokens, at least 1, or all"))?;
                }
                "top_k_order" => {
                    let order = match value {
                        "before" => Some(TopKOrder::Before),
                        "after" => Some(TopKOrder::After),
                        _ => None,
                    };
                    set(&mut spec.top_k_order, order, twice, bad("before or after (the nucleus)"))?;
                }
                "guidance" => {
                    let scale = value.parse().ok().filter(|s| valid_temperature(*s));
                    set(&mut spec.guidance, scale, twice, bad("a finite number of at least 0"))?;
                }
                "eos" => set(&mut spec.eos, parse_eos(value), twice, bad("free, never, last or never+last"))?,
                "edit" => {
                    let bound = value.parse().ok().filter(|t: &f32| (0.0..=1.0).contains(t));
                    set(&mut spec.edit, bound, twice, bad("a probability from 0 to 1"))?;
                }
                "passes" => {
                    let passes = value.parse().ok().filter(|n| *n <= 1 << 32);
                    set(&mut spec.passes, passes, twice, bad("a number of forwards"))?;
                }
                "last" => {
                    let fill = match value {
                        "cut" => Some(false),
                        "fill" => Some(true),
                        _ => None,
                    };
                    set(&mut spec.fill, fill, twice, bad("cut or fill"))?;
                }
                "sampler" => {
                    let joint = match value.split_once(':') {
                        None if value == "joint" => Some(None),
                        Some(("joint", count)) => parse_count(count).map(Some),
                        _ => None,
                    };
                    set(&mut spec.joint, joint, twice, bad("joint:K, or joint beside unmask=RANK:K"))?;
                }
                "bans" => {
                    let bans = match value {
                        "every" => Some(Bans::Every),
                        "first" => Some(Bans::First),
                        _ => None,
                    };
                    set(&mut spec.bans, bans, twice, bad("every or first"))?;
                }
                "shortlist" => {
                    let n = if value == "all" { Some(None) } else { parse_count(value).filter(|n| *n >= 2).map(Some) };
                    set(&mut spec.shortlist, n, twice, bad("a number of ids, at least 2, or all"))?;
                }
                "kv" => set(&mut spec.kv, parse_kv(value), twice, bad("exact, refresh:FORWARDS, draft, prefix, dual or recompute"))?,
                "confidence" => {
                    let truncated = match value {
                        "raw" => Some(false),
                        "truncated" => Some(true),
                        _ => None,
                    };
                    set(&mut spec.truncated_confidence, truncated, twice, bad("raw or truncated"))?;
                }
                "weights" => {
                    let index = value.parse().ok().filter(|n| *n < MAX_MODELS);
                    set(&mut spec.weights, index, twice, bad("the index of a --model, from 0"))?;
                }
                _ => return Err(Error::request(format!("stage `{text}`: unknown key `{key}`; keys: {KEYS}"))),
            }
        }
        Ok(spec)
    }
}

fn parse_count(text: &str) -> Option<usize> {
    text.parse().ok().filter(|n| (1..=1 << 32).contains(n))
}

fn parse_block(text: &str) -> Option<Block> {
    match text {
        "full" => Some(Block::Full),
        "trained" => Some(Block::Trained),
        _ => parse_count(text).map(Block::Of),
    }
}

fn parse_rank(text: &str) -> Option<Rank> {
    [Rank::Uniform, Rank::Confidence, Rank::Margin, Rank::Entropy, Rank::Left].into_iter().find(|r| r.to_string() == text)
}

fn parse_by(text: &str) -> Option<RemaskBy> {
    match text.split_once(':') {
        None => match text {
            "snapshot" => Some(RemaskBy::Snapshot),
            "post-hoc" => Some(RemaskBy::PostHoc),
            "random" => Some(RemaskBy::Random),
            _ => None,
        },
        Some(("held-out", groups)) => parse_count(groups).filter(|g| *g >= 2).map(RemaskBy::HeldOut),
        Some(_) => None,
    }
}

fn parse_score(text: &str) -> Option<Score> {
    [Score::Probability, Score::Typicality, Score::Lift].into_iter().find(|s| s.to_string() == text)
}

fn parse_unmask(text: &str) -> Option<UnmaskSpec> {
    let Some((rule, value)) = text.split_once(':') else {
        return parse_rank(text).map(|rank| UnmaskSpec::Rank(rank, None));
    };
    match rule {
        "linear" => parse_count(value).map(UnmaskSpec::Linear),
        "fixed" => parse_count(value).map(UnmaskSpec::Fixed),
        "timestep" => parse_count(value).map(UnmaskSpec::Timestep),
        "ancestral" => parse_count(value).map(UnmaskSpec::Ancestral),
        "threshold" => value.parse().ok().filter(|t: &f32| (0.0..=1.0).contains(t)).map(UnmaskSpec::Threshold),
        "above" => value.parse().ok().filter(|t: &f32| (0.0..=1.0).contains(t)).map(UnmaskSpec::Above),
        "factor" => value.parse().ok().filter(|f: &f32| f.is_finite() && *f >= 0.0).map(UnmaskSpec::Factor),
        "entropy-bound" => value.parse().ok().filter(|b: &f32| b.is_finite() && *b >= 0.0).map(UnmaskSpec::EntropyBound),
        _ => Some(UnmaskSpec::Rank(parse_rank(rule)?, Some(parse_count(value)?))),
    }
}

fn parse_kv(text: &str) -> Option<KvPolicy> {
    match text.split_once(':') {
        None if text == "exact" => Some(KvPolicy::Exact),
        None if text == "draft" => Some(KvPolicy::Draft),
        None if text == "recompute" => Some(KvPolicy::Recompute),
        None if text == "prefix" => Some(KvPolicy::Prefix),
        None if text == "dual" => Some(KvPolicy::Dual),
        Some(("refresh", r)) => parse_count(r).map(KvPolicy::Refresh),
        _ => None,
    }
}

fn parse_eos(text: &str) -> Option<Eos> {
    [Eos::Free, Eos::Never, Eos::Last, Eos::NeverLast].into_iter().find(|e| e.to_string() == text)
}

impl StageSpec {
    /// The unmask rule with what belongs to it: `order`, `steps`, `eps`.
    fn unmask(&self) -> std::result::Result<Unmask, &'static str> {
        let rank = self.order.unwrap_or(Rank::Confidence);
        let eps = self.eps.unwrap_or(EPS);
        let spelled = match self.joint {
            Some(Some(_)) if self.unmask.is_some() => {
                return Err("sampler=joint:K says how many a forward unmasks: without unmask, or sampler=joint");
            }
            Some(Some(k)) => Some(UnmaskSpec::Rank(Rank::Entropy, Some(k))),
            _ => self.unmask,
        };
        let unmask = match (spelled.unwrap_or(UnmaskSpec::Rank(Rank::Uniform, None)), self.steps) {
            (UnmaskSpec::Rank(rank, n), None) => Unmask::Count { rank, n: n.unwrap_or(1) },
            (UnmaskSpec::Rank(rank, None), Some(steps)) => Unmask::Linear { rank, steps },
            (UnmaskSpec::Linear(steps), None) => Unmask::Linear { rank, steps },
            (UnmaskSpec::Fixed(steps), None) => Unmask::Fixed { rank, steps },
            (UnmaskSpec::Timestep(steps), None) => Unmask::Timestep { rank, steps, eps },
            (UnmaskSpec::Ancestral(steps), None) => Unmask::Ancestral { steps, eps },
            (UnmaskSpec::Threshold(t), None) => Unmask::Threshold(t),
            (UnmaskSpec::Above(bound), steps) => Unmask::Above { bound, steps },
            (UnmaskSpec::Factor(f), None) => Unmask::Factor(f),
            (UnmaskSpec::EntropyBound(b), None) => Unmask::EntropyBound(b),
            (_, Some(_)) => return Err("steps goes with a ranking alone, as in unmask=uniform,steps=12, or with unmask=above:T"),
        };
        if self.order.is_some() && !matches!(spelled, Some(UnmaskSpec::Linear(_) | UnmaskSpec::Fixed(_) | UnmaskSpec::Timestep(_))) {
            return Err("order goes with unmask=linear:STEPS, unmask=fixed:STEPS or unmask=timestep:STEPS");
        }
        if self.eps.is_some() && !matches!(spelled, Some(UnmaskSpec::Timestep(_) | UnmaskSpec::Ancestral(_))) {
            return Err("eps goes with unmask=timestep:STEPS or unmask=ancestral:STEPS");
        }
        Ok(unmask)
    }

    /// Fills in the defaults and checks the stage in its place (`index` 0 drafts).
    pub(super) fn resolve(&self, index: usize, defaults: &Defaults, previous: Option<&Stage>) -> Result<Stage> {
        let fail = |what: &str| Err(Error::request(format!("stage {index}: {what}")));
        let unmask = match self.unmask() {
            Ok(unmask) => unmask,
            Err(what) => return fail(what),
        };
        let order_temperature = self.order_temperature.unwrap_or(0.0);
        if order_temperature > 0.0 && !matches!(unmask.rank(), Some(Rank::Confidence | Rank::Margin | Rank::Entropy)) {
            return fail("order_temperature goes with a ranking by confidence, margin or entropy that counts, not with a threshold");
        }
        let eos = self.eos.unwrap_or_default();
        if matches!(eos, Eos::Last | Eos::NeverLast) && !unmask.by_confidence() {
            return fail("eos=last gives confidence 0 to ends of the text, so the rule must go by confidence");
        }
        let remask = match (index, self.ratio) {
            (0, None) if self.by.is_none() && self.score.is_none() => None,
            (0, _) => return fail("the first stage drafts, it has nothing to remask"),
            (_, None) => return fail("a refining stage needs remask=RATIO"),
            (_, Some(ratio)) => {
                let (by, score) = (self.by.unwrap_or(RemaskBy::Snapshot), self.score.unwrap_or(Score::Probability));
                if score != Score::Probability && !matches!(by, RemaskBy::PostHoc | RemaskBy::HeldOut(_)) {
                    return fail("score=typicality and score=lift need a scoring forward: by=post-hoc or by=held-out:GROUPS");
                }
                Some(Remask { ratio, by, score })
            }
        };
        let kv = self.kv.unwrap_or(KvPolicy::Exact);
        if kv == KvPolicy::Draft && index == 0 {
            return fail("kv=draft reuses the K/V of an earlier stage, the first stage has none");
        }
        if kv == KvPolicy::Draft && matches!(remask, Some(Remask { by: RemaskBy::HeldOut(_), .. })) {
            return fail("kv=draft cannot follow held-out scoring, whose forwards overwrite the draft's K/V; use kv=refresh:R");
        }
        let block_len = match self.block.unwrap_or(Block::Full) {
            Block::Full => None,
            Block::Trained => Some(defaults.block_len),
            Block::Of(len) => Some(len),
        };
        let scope = self.scope.unwrap_or(defaults.scope);
        if scope == Scope::Block && block_len.is_some() {
            // [SDAR] Block-causal attention counts blocks from position 0, and finished blocks are
            // never seen again anyway.
            if self.from_prompt == Some(true) {
                return fail("from=prompt needs visible=canvas: block-causal attention counts from position 0");
            }
            if kv == KvPolicy::Prefix || kv == KvPolicy::Dual && self.sub.is_none() {
                return fail(
                    "kv=prefix and kv=dual are for visible=canvas, or kv=dual with sub: under block-causal attention kv=exact reuses more, exactly",
                );
            }
        }
        if let Some(sub) = self.sub
            && block_len.is_none_or(|block| block % sub != 0)
        {
            return fail("sub goes with block=LENGTH, a multiple of it");
        }
        let guidance = self.guidance.unwrap_or(0.0);
        if guidance > 0.0 && (scope == Scope::Block && block_len.is_some() || !matches!(kv, KvPolicy::Exact | KvPolicy::Recompute)) {
            return fail("guidance runs every forward twice over all rows: it needs visible=canvas and kv=exact");
        }
        let top_k = match (self.top_k, self.top_k_order) {
            (Some(0), Some(_)) => return fail("top_k_order goes with a top-k, found top_k=all"),
            (None, Some(_)) if defaults.top_k.is_none() => return fail("top_k_order goes with top_k=K"),
            (k, order) => {
                let base = defaults.top_k.unwrap_or(TopK { k: 0, order: TopKOrder::Before });
                top_k_of(k.unwrap_or(base.k), order.unwrap_or(base.order))
            }
        };
        let edit = match (self.edit, self.passes) {
            (Some(bound), passes) => Some(Edit { bound, passes: passes.unwrap_or(PASSES) }),
            (None, Some(_)) => return fail("passes goes with edit=T"),
            (None, None) => None,
        };
        if edit.is_some() && (self.sub.is_some() || !matches!(kv, KvPolicy::Exact | KvPolicy::Recompute)) {
            return fail("edit samples the whole block again: it needs kv=exact and no sub");
        }
        let joint = self.joint.is_some();
        if joint {
            if unmask.rank().is_none() {
                return fail("sampler=joint unmasks a number of tokens a forward: unmask=RANK:K, linear, fixed or timestep");
            }
            if !matches!(kv, KvPolicy::Exact | KvPolicy::Recompute) {
                return fail("sampler=joint carries on the states of a forward over the whole block: it needs kv=exact");
            }
            if guidance > 0.0 || edit.is_some() || matches!(eos, Eos::Last | Eos::NeverLast) {
                return fail("sampler=joint goes without guidance, edit and eos=last, which ask the model twice");
            }
        }
        let (bans, shortlist) = (self.bans.unwrap_or_default(), self.shortlist.flatten());
        if !joint && (self.bans.is_some() || self.shortlist.is_some()) {
            return fail("bans and shortlist are about the passes of a joint sampler: they go with sampler=joint");
        }
        if bans == Bans::First && shortlist.is_some() {
            return fail("bans=first goes without a shortlist, on which nothing stands that the model's own answers ban");
        }
        let fill = self.fill.unwrap_or(false);
        if fill && (index > 0 || scope != Scope::Block || block_len.is_none()) {
            return fail("last=fill is for the first stage, with visible=block and block=LENGTH");
        }
        let weights = self.weights.unwrap_or(0);
        if kv == KvPolicy::Draft && previous.is_some_and(|p| p.weights != weights) {
            return fail("kv=draft cannot reuse the K/V of other weights; use kv=refresh:R");
        }
        Ok(Stage {
            block_len,
            scope,
            from_prompt: self.from_prompt.unwrap_or(false),
            sub_len: self.sub,
            remask,
            unmask,
            order_temperature,
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_p_rule: self.top_p_rule.unwrap_or(defaults.top_p_rule),
            top_k,
            guidance,
            eos,
            edit,
            joint,
            bans,
            shortlist,
            fill,
            kv,
            truncated_confidence: self.truncated_confidence.unwrap_or(false),
            weights,
        })
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rank::Uniform => "uniform",
            Rank::Confidence => "confidence",
            Rank::Margin => "margin",
            Rank::Entropy => "entropy",
            Rank::Left => "left",
        })
    }
}

impl fmt::Display for Unmask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Unmask::Count { rank, n } => write!(f, "{rank}:{n}"),
            Unmask::Linear { rank, steps } => write!(f, "linear:{steps},order={rank}"),
            Unmask::Fixed { rank, steps } => write!(f, "fixed:{steps},order={rank}"),
            Unmask::Timestep { rank, steps, eps } => {
                write!(f, "timestep:{steps},order={rank}")?;
                if eps == EPS { Ok(()) } else { write!(f, ",eps={eps}") }
            }
            Unmask::Ancestral { steps, eps } => {
                write!(f, "ancestral:{steps}")?;
                if eps == EPS { Ok(()) } else { write!(f, ",eps={eps}") }
            }
            Unmask::Threshold(t) => write!(f, "threshold:{t}"),
            Unmask::Above { bound, steps: None } => write!(f, "above:{bound}"),
            Unmask::Above { bound, steps: Some(steps) } => write!(f, "above:{bound},steps={steps}"),
            Unmask::Factor(factor) => write!(f, "factor:{factor}"),
            Unmask::EntropyBound(b) => write!(f, "entropy-bound:{b}"),
        }
    }
}

impl fmt::Display for Eos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Eos::Free => "free",
            Eos::Never => "never",
            Eos::Last => "last",
            Eos::NeverLast => "never+last",
        })
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Score::Probability => "probability",
            Score::Typicality => "typicality",
            Score::Lift => "lift",
        })
    }
}

impl fmt::Display for RemaskBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RemaskBy::Snapshot => f.write_str("snapshot"),
            RemaskBy::PostHoc => f.write_str("post-hoc"),
            RemaskBy::HeldOut(groups) => write!(f, "held-out:{groups}"),
            RemaskBy::Random => f.write_str("random"),
        }
    }
}

impl fmt::Display for KvPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvPolicy::Exact => f.write_str("exact"),
            KvPolicy::Refresh(r) => write!(f, "refresh:{r}"),
            KvPolicy::Draft => f.write_str("draft"),
            KvPolicy::Recompute => f.write_str("recompute"),
            KvPolicy::Prefix => f.write_str("prefix"),
            KvPolicy::Dual => f.write_str("dual"),
        }
    }
}

impl fmt::Display for TopPRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TopPRule::Within => "within",
            TopPRule::Crossing => "crossing",
        })
    }
}

impl fmt::Display for TopKOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TopKOrder::Before => "before",
            TopKOrder::After => "after",
        })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.block_len {
            Some(block_len) => write!(f, "block={block_len}")?,
            None => f.write_str("block=full")?,
        }
        f.write_str(match self.scope {
            Scope::Block => ",visible=block",
            Scope::Canvas => ",visible=canvas",
        })?;
        if self.from_prompt {
            f.write_str(",from=prompt")?;
        }
        if let Some(sub) = self.sub_len {
            write!(f, ",sub={sub}")?;
        }
        if let Some(remask) = self.remask {
            write!(f, ",remask={},by={}", remask.ratio, remask.by)?;
            if remask.score != Score::Probability {
                write!(f, ",score={}", remask.score)?;
            }
        }
        write!(f, ",unmask={}", self.unmask)?;
        if self.order_temperature > 0.0 {
            write!(f, ",order_temperature={}", self.order_temperature)?;
        }
        write!(f, ",temperature={},top_p={},top_p_rule={}", self.temperature, self.top_p, self.top_p_rule)?;
        match self.top_k {
            None => f.write_str(",top_k=all")?,
            Some(TopK { k, order }) => write!(f, ",top_k={k},top_k_order={order}")?,
        }
        write!(f, ",kv={}", self.kv)?;
        if self.guidance > 0.0 {
            write!(f, ",guidance={}", self.guidance)?;
        }
        if self.eos != Eos::Free {
            write!(f, ",eos={}", self.eos)?;
        }
        if let Some(Edit { bound, passes }) = self.edit {
            write!(f, ",edit={bound},passes={passes}")?;
        }
        if self.joint {
            f.write_str(",sampler=joint")?;
        }
        if self.bans == Bans::First {
            f.write_str(",bans=first")?;
        }
        if let Some(n) = self.shortlist {
            write!(f, ",shortlist={n}")?;
        }
        if self.fill {
            f.write_str(",last=fill")?;
        }
        f.write_str(if self.truncated_confidence { ",confidence=truncated" } else { ",confidence=raw" })?;
        if self.weights > 0 { write!(f, ",weights={}", self.weights) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{PRESETS, Schedule};
    use proptest::prelude::*;

    fn one(index: usize, text: &str) -> Result<Stage> {
        text.parse::<StageSpec>()?.resolve(index, &Defaults::default(), None)
    }

    #[test]
    fn presets_resolve_and_print_back() {
        for (name, _) in PRESETS {
            let schedule = Schedule::preset(name, &Defaults::default()).unwrap();
            for (index, stage) in schedule.stages.iter().enumerate() {
                assert_eq!(one(index, &stage.to_string()).unwrap(), *stage, "{name}: {stage}");
            }
        }
    }

    #[test]
    fn steps_is_a_quota_over_a_ranking() {
        assert_eq!(one(0, "block=4,unmask=uniform,steps=3").unwrap().unmask, Unmask::Linear { rank: Rank::Uniform, steps: 3 });
        assert_eq!(one(0, "block=4,unmask=linear:3").unwrap().unmask, Unmask::Linear { rank: Rank::Confidence, steps: 3 });
        assert_eq!(one(0, "block=4").unwrap().unmask, Unmask::Count { rank: Rank::Uniform, n: 1 });
    }

    #[test]
    fn top_k_starts_where_the_model_recommends() {
        let defaults = Defaults { top_k: top_k_of(20, TopKOrder::Before), ..Defaults::default() };
        let k = |text: &str| text.parse::<StageSpec>().unwrap().resolve(0, &defaults, None).unwrap().top_k.map(|k| (k.k, k.order));
        assert_eq!(k("block=4"), Some((20, TopKOrder::Before)));
        assert_eq!(k("block=4,top_k_order=after"), Some((20, TopKOrder::After)));
        assert_eq!(k("block=4,top_k=3"), Some((3, TopKOrder::Before)));
        assert_eq!(k("block=4,top_k=all"), None);
        for (name, stages) in &PRESETS {
            // Published samplers are what they are whatever a model recommends.
            let published = stages[0].contains("temperature=");
            assert_eq!(Schedule::preset(name, &defaults).unwrap().stages[0].top_k.is_none(), published, "{name}");
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
            (0, "sampler=joint:2,kv=refresh:2", "kv=exact"),
            (0, "sampler=joint:2,visible=canvas,guidance=1", "without guidance"),
            (0, "unmask=entropy:2,bans=first", "sampler=joint"),
            (0, "unmask=entropy:2,shortlist=all", "sampler=joint"),
            (0, "sampler=joint:2,bans=last", "every or first"),
            (0, "sampler=joint:2,shortlist=1", "at least 2"),
            (0, "sampler=joint:2,shortlist=-4", "or all"),
            (0, "sampler=joint:2,shortlist=8,bans=first", "without a shortlist"),
            (0, "unmask=uniform:1,order_temperature=0.1", "goes with a ranking"),
            (0, "unmask=threshold:0.9,order_temperature=0.5", "goes with a ranking"),
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

    proptest! {
        #[test]
        fn parsing_never_panics(text in "[a-z_=:,.0-9-]{0,60}") {
            let _ = text.parse::<StageSpec>().map(|spec| spec.resolve(1, &Defaults::default(), None));
        }

        #[test]
        fn every_stage_prints_back(block in prop_oneof![Just(None), (1usize..2000).prop_map(Some)], ratio in 0.0f64..=1.0, n in 1usize..99,
                                   rule in 0usize..14, by in 0usize..4, kv in 0usize..5, t in 0.0f32..3.0, p in 0.01f32..=1.0, flags in 0usize..8) {
            let rank = [Rank::Uniform, Rank::Confidence, Rank::Margin, Rank::Entropy, Rank::Left][n % 5];
            let eps = [EPS, t / 4.0 + 0.1][n % 2];
            let unmask = match rule {
                0..5 => Unmask::Count { rank, n },
                5 => Unmask::Linear { rank, steps: n },
                6 => Unmask::Timestep { rank, steps: n, eps },
                7 => Unmask::Threshold(t / 3.0),
                8 => Unmask::Fixed { rank, steps: n },
                9 => Unmask::Ancestral { steps: n, eps },
                10 => Unmask::Above { bound: t / 3.0, steps: None },
                11 => Unmask::Above { bound: t / 3.0, steps: Some(n) },
                12 => Unmask::Factor(t),
                _ => Unmask::EntropyBound(t),
            };
            let by_value = matches!(unmask.rank(), Some(Rank::Confidence | Rank::Margin | Rank::Entropy));
            let canvas = flags & 1 != 0 || block.is_none();
            // Of the five policies below, these compute every row.
            let exact = if canvas { kv % 2 == 0 && kv < 3 } else { kv % 3 != 1 };
            let edit = [None, Some(Edit { bound: t / 3.0, passes: n })][usize::from(exact && n.is_multiple_of(3))];
            let guidance = if canvas && kv.is_multiple_of(2) && kv < 3 { t } else { 0.0 };
            let eos = [Eos::Free, Eos::Never, Eos::Last, Eos::NeverLast][if unmask.by_confidence() { n % 4 } else { n % 2 }];
            let once = guidance == 0.0 && edit.is_none() && matches!(eos, Eos::Free | Eos::Never);
            let joint = exact && once && unmask.rank().is_some() && flags & 4 == 0;
            let stage = Stage {
                block_len: block,
                scope: if flags & 1 == 0 { Scope::Block } else { Scope::Canvas },
                remask: Some(Remask {
                    ratio,
                    by: [RemaskBy::Snapshot, RemaskBy::PostHoc, RemaskBy::HeldOut(n + 1), RemaskBy::Random][by],
                    score: [Score::Probability, Score::Typicality, Score::Lift][if by == 1 || by == 2 { n % 3 } else { 0 }],
                }),
                from_prompt: canvas && n.is_multiple_of(2),
                sub_len: block.filter(|b| b.is_multiple_of(3) && !n.is_multiple_of(3)).map(|b| b / 3),
                unmask,
                order_temperature: if by_value && n.is_multiple_of(3) { t } else { 0.0 },
                guidance,
                eos,
                edit,
                joint,
                bans: if joint && n % 3 == 1 { Bans::First } else { Bans::Every },
                shortlist: Some(n + 2).filter(|_| joint && n % 3 == 2),
                fill: false,
                temperature: t,
                top_p: p,
                top_p_rule: if flags & 2 == 0 { TopPRule::Within } else { TopPRule::Crossing },
                top_k: [None, Some(TopK { k: n as u32, order: [TopKOrder::Before, TopKOrder::After][kv % 2] })][n % 2],
                kv: [KvPolicy::Exact, KvPolicy::Refresh(n), KvPolicy::Recompute, KvPolicy::Prefix, KvPolicy::Dual][if canvas { kv } else { kv % 3 }],
                truncated_confidence: flags & 4 != 0,
                weights: n % MAX_MODELS,
            };
            prop_assert_eq!(one(1, &stage.to_string()).unwrap(), stage);
        }
    }
}
