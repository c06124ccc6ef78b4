//! Owns the law of decisions: which token a masked row takes, which rows are revealed, which positions are masked again.
//!
//! Plain numbers in, plain numbers out, no tensors and no pages. The backends' `decide` kernels are held to
//! [`decide_row`]; the engine calls [`select`] and [`remask`] directly. Ties go to the lower token id, then to the lower
//! position; at least one position is revealed per step; NaN is an error, never a loop (docs/architecture.md, progress).
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::sampling::{Decision, Draw, Rank, Score, TopK, TopKOrder, TopPRule, Unmask};

/// Token, confidence and shape of one row's distribution, in f64: the specification of `Backend::decide`.
///
/// The draw is an inverse CDF over ascending token ids: the smallest kept id whose cumulative mass exceeds `u * total`.
/// One 53-bit uniform per row keeps the full resolution of the distribution (law 2).
///
/// Errors: [`Error::Kernel`] if a logit that is not banned is NaN or +inf, or if every id is banned.
pub fn decide_row(logits: &[f32], banned: &[u32], draw: &Draw) -> Result<Decision> {
    let allowed = |id: usize| !banned.contains(&(id as u32));
    let mut top = [(f64::NEG_INFINITY, usize::MAX); 2];
    for (id, &logit) in logits.iter().enumerate() {
        if !allowed(id) {
            continue;
        }
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(Error::kernel(format!("logit of token {id} is {logit}: the weights or activations are not finite")));
        }
        let logit = f64::from(logit);
        if logit > top[0].0 || top[0].1 == usize::MAX {
            top = [(logit, id), top[0]];
        } else if logit > top[1].0 {
            top[1] = (logit, id);
        }
    }
    let (max, argmax) = top[0];
    if argmax == usize::MAX || max == f64::NEG_INFINITY {
        return Err(Error::kernel("no token has a finite logit that is not banned"));
    }
    let masses = |temperature: f64| -> Vec<f64> {
        logits.iter().enumerate().map(|(id, &l)| if allowed(id) { ((f64::from(l) - max) / temperature).exp() } else { 0.0 }).collect()
    };
    let raw = masses(1.0);
    let sum: f64 = raw.iter().sum();
    let mut entropy =
        sum.ln() - logits.iter().zip(&raw).filter(|(_, m)| **m > 0.0).map(|(&l, m)| m * (f64::from(l) - max)).sum::<f64>() / sum;
    let second = if top[1].1 == usize::MAX { 0.0 } else { (top[1].0 - max).exp() };
    let mut margin = (1.0 - second) / sum;

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        None if draw.temperature == 0.0 && !draw.truncated_confidence => argmax,
        None => {
            let greedy = draw.temperature == 0.0;
            let mut mass = masses(if greedy { 1.0 } else { f64::from(draw.temperature) });
            let top_k = |mass: &mut [f64], now: TopKOrder| match draw.top_k {
                Some(TopK { k, order }) if order == now => most_probable(mass, logits, banned, k as usize),
                _ => {}
            };
            top_k(&mut mass, TopKOrder::Before);
            if draw.top_p < 1.0 {
                nucleus(&mut mass, logits, f64::from(draw.top_p), draw.top_p_rule);
            }
            top_k(&mut mass, TopKOrder::After);
            let total: f64 = mass.iter().sum();
            let target = draw.u * total;
            let mut cumulative = 0.0;
            let mut token = argmax;
            for (id, m) in mass.iter().enumerate().filter(|(_, m)| **m > 0.0) {
                cumulative += m;
                token = id;
                if cumulative > target {
                    break;
                }
            }
            if greedy {
                token = argmax;
            }
            if draw.truncated_confidence {
                // [Dream] All three are of what is left of the distribution.
                kept_share = Some(mass[token] / total);
                margin = (mass[argmax] - mass.get(top[1].1).copied().unwrap_or(0.0)) / total;
                entropy = total.ln() - mass.iter().filter(|m| **m > 0.0).map(|m| m * m.ln()).sum::<f64>() / total;
            }
            token
        }
    };
    let Some(&logit) = logits.get(token).filter(|_| allowed(token)) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - max - sum.ln();
    let confidence = kept_share.unwrap_or_else(|| log_prob.exp());
    Ok(Decision {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: margin as f32,
        entropy: entropy.max(0.0) as f32,
    })
}

/// Zeroes the mass of every token outside the nucleus. Order: larger logit first, ties to the lower id.
fn nucleus(mass: &mut [f64], logits: &[f32], top_p: f64, rule: TopPRule) {
    let total: f64 = mass.iter().sum();
    let mut order: Vec<usize> = (0..mass.len()).filter(|&id| mass[id] > 0.0).collect();
    // No NaN gets here; 0.0 and -0.0 are the same logit.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b)));
    let mut cumulative = 0.0;
    let mut open = true;
    for (rank, &id) in order.iter().enumerate() {
        let before = cumulative;
        cumulative += mass[id] / total;
        open = open
            && match rule {
                TopPRule::Within => cumulative <= top_p,
                TopPRule::Crossing => before < top_p,
            };
        if rank > 0 && !open {
            mass[id] = 0.0;
        }
    }
}

/// Zeroes the mass of every token whose logit is below the k-th largest that is not banned.
fn most_probable(mass: &mut [f64], logits: &[f32], banned: &[u32], k: usize) {
    let mut order: Vec<f32> = logits.iter().enumerate().filter(|(id, _)| !banned.contains(&(*id as u32))).map(|(_, l)| *l).collect();
    order.sort_by(|a, b| b.total_cmp(a));
    let last = order[k.clamp(1, order.len()) - 1];
    for (mass, _) in mass.iter_mut().zip(logits).filter(|(_, logit)| **logit < last) {
        *mass = 0.0;
    }
}

/// A masked position of the current block with what the forward said about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub position: usize,
    pub decision: Decision,
    /// The order uniform of this position and step; its time under [`Unmask::Ancestral`].
    pub order: f64,
}

/// Where a block stands when its next reveals are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockProgress {
    /// Positions of a whole block (of a part of one, where a stage has such).
    pub block_len: usize,
    /// Masks the block held when the stage reached it.
    pub masks_at_start: usize,
    /// Masks it holds now.
    pub masks: usize,
    /// Schedule step of this forward within the block, from 0.
    pub step: usize,
}

/// How many reveals `unmask` wants at this step, where it counts steps (of [`Unmask::Above`]: at least); `None` for rules that look at
/// the candidates instead.
pub fn quota(unmask: &Unmask, progress: BlockProgress) -> Option<usize> {
    let BlockProgress { block_len, masks_at_start, masks, step } = progress;
    // The remainder goes to the first steps.
    let share = |count: usize, steps: usize| count / steps + usize::from(step < count % steps);
    match *unmask {
        Unmask::Count { n, .. } => Some(n),
        // [LLaDA] get_num_transfer_tokens, of what is masked.
        Unmask::Linear { steps, .. } => Some(share(masks_at_start, steps)),
        // [SDAR] get_num_transfer_tokens, of the block: a prompt's tail in it takes nothing off.
        Unmask::Fixed { steps, .. } | Unmask::Above { steps: Some(steps), .. } => Some(share(block_len, steps)),
        Unmask::Above { steps: None, .. } => Some(1),
        Unmask::Timestep { steps, .. } if step + 1 >= steps => Some(masks),
        Unmask::Timestep { steps, eps, .. } => {
            // [Dream] f32 arithmetic decides the truncation: t and s are elements of linspace(1, eps, steps + 1).
            let (t, s) = (linspace_f32(eps, steps, step), linspace_f32(eps, steps, step + 1));
            Some((masks as f64 * f64::from(1.0 - s / t)) as usize)
        }
        Unmask::Ancestral { .. } | Unmask::Threshold(_) | Unmask::Factor(_) | Unmask::EntropyBound(_) => None,
    }
}

/// Element `index` of `linspace(1, eps, steps + 1)` as PyTorch computes it in f32: from the nearer end.
fn linspace_f32(eps: f32, steps: usize, index: usize) -> f32 {
    let delta = (eps - 1.0) / steps as f32;
    if index < steps.div_ceil(2) { 1.0 + delta * index as f32 } else { eps - delta * (steps - index) as f32 }
}

/// The first step at or after `progress.step` that reveals something: the others need no forward. `times` are the masked positions', of
/// [`Unmask::Ancestral`].
pub fn next_step(unmask: &Unmask, mut progress: BlockProgress, times: impl Iterator<Item = f64>) -> usize {
    if let Unmask::Ancestral { steps, eps } = *unmask {
        // [Dream] `origin`: with p = 1 - s/t at every step, a position's step is the one in which its time lies.
        let latest = times.fold(0.0, f64::max);
        while progress.step + 1 < steps && latest < f64::from(linspace_f32(eps, steps, progress.step + 1)) {
            progress.step += 1;
        }
        return progress.step;
    }
    while progress.masks > 0 && quota(unmask, progress) == Some(0) {
        progress.step += 1;
        if let Unmask::Linear { steps, .. } | Unmask::Fixed { steps, .. } | Unmask::Above { steps: Some(steps), .. } = unmask
            && progress.step >= *steps
        {
            break;
        }
    }
    progress.step
}

/// The positions to reveal now: indices into `candidates`, ascending. At least one and never more than there are.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence, margin or entropy is NaN.
pub fn select(unmask: &Unmask, progress: BlockProgress, candidates: &[Candidate]) -> Result<Vec<usize>> {
    select_tempered(unmask, 0.0, progress, candidates)
}

/// [`select`] where rankings by confidence, margin or entropy are draws of this `temperature`: positions one after the other, without
/// putting back, with weights `exp(rank / temperature)` (Dream's `alg_temp`; the rank of an entropy is its negative).
///
/// The n smallest of `E exp(-rank / temperature)`, E exponential, are such a draw (Efraimidis and Spirakis 2006; in logarithms, Gumbel-top-k).
pub fn select_tempered(unmask: &Unmask, temperature: f32, progress: BlockProgress, candidates: &[Candidate]) -> Result<Vec<usize>> {
    for c in candidates {
        let Decision { confidence, margin, entropy, .. } = c.decision;
        if confidence.is_nan() || margin.is_nan() || entropy.is_nan() {
            return Err(Error::kernel(format!("position {}: confidence {confidence}, margin {margin}, entropy {entropy}", c.position)));
        }
    }
    let best_first = |rank: Rank| {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        let key = |c: &Candidate| {
            let value = match rank {
                Rank::Uniform => return c.order,
                Rank::Left => return 0.0,
                Rank::Confidence => -f64::from(c.decision.confidence),
                Rank::Margin => -f64::from(c.decision.margin),
                Rank::Entropy => f64::from(c.decision.entropy),
            };
            if temperature > 0.0 { (-(-c.order).ln_1p()).ln() + value / f64::from(temperature) } else { value }
        };
        order.sort_by(|&a, &b| {
            let (a, b) = (&candidates[a], &candidates[b]);
            key(a).total_cmp(&key(b)).then(a.position.cmp(&b.position))
        });
        order
    };
    let mut chosen = match *unmask {
        Unmask::Count { rank, .. } | Unmask::Linear { rank, .. } | Unmask::Fixed { rank, .. } | Unmask::Timestep { rank, .. } => {
            let n = quota(unmask, progress).unwrap_or(1).max(1);
            let mut order = best_first(rank);
            order.truncate(n);
            order
        }
        Unmask::Threshold(threshold) => {
            let order = best_first(Rank::Confidence);
            order.iter().enumerate().filter(|(i, c)| *i == 0 || candidates[**c].decision.confidence >= threshold).map(|(_, c)| *c).collect()
        }
        Unmask::Above { bound, .. } => {
            let least = quota(unmask, progress).unwrap_or(1).max(1);
            let order = best_first(Rank::Confidence).into_iter().enumerate();
            order.filter(|(i, c)| *i < least || candidates[*c].decision.confidence > bound).map(|(_, c)| c).collect()
        }
        Unmask::Factor(factor) => {
            let mut order = best_first(Rank::Confidence);
            // The last one of all is never asked, see `Unmask::Factor`. Rank r counts from 1, i from 0.
            let short = |i: &usize| f64::from(candidates[order[*i]].decision.confidence) < 1.0 - f64::from(factor) / (*i + 2) as f64;
            if let Some(n) = (1..order.len().saturating_sub(1)).find(short) {
                order.truncate(n);
            }
            order
        }
        Unmask::Ancestral { steps, eps } => {
            let next = if progress.step + 1 < steps { f64::from(linspace_f32(eps, steps, progress.step + 1)) } else { 0.0 };
            let mut order: Vec<usize> = (0..candidates.len()).filter(|i| candidates[*i].order >= next).collect();
            if order.is_empty() {
                // Not where the step is that of `next_step`.
                order.extend((0..candidates.len()).rev().max_by(|a, b| candidates[*a].order.total_cmp(&candidates[*b].order)));
            }
            order
        }
        Unmask::EntropyBound(bound) => {
            let order = best_first(Rank::Entropy);
            let mut sum = 0.0;
            let mut within = |c: &usize| {
                let entropy = f64::from(candidates[*c].decision.entropy);
                sum += entropy;
                // In ascending order the largest so far is the newest.
                sum - entropy <= f64::from(bound)
            };
            order.into_iter().enumerate().take_while(|(i, c)| within(c) || *i == 0).map(|(_, c)| c).collect()
        }
    };
    chosen.sort_unstable();
    Ok(chosen)
}

/// Which tokens that stand give way (LLaDA2.1): indices, ascending, of the answers that name another token with a confidence above `bound`.
/// Each candidate comes with the token that its position holds.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence is NaN.
pub fn edits(bound: f32, standing: &[(Candidate, u32)]) -> Result<Vec<usize>> {
    if let Some((c, _)) = standing.iter().find(|(c, _)| c.decision.confidence.is_nan()) {
        return Err(Error::kernel(format!("position {}: confidence NaN", c.position)));
    }
    let gives_way = |(c, token): &(Candidate, u32)| c.decision.token != *token && c.decision.confidence > bound;
    Ok((0..standing.len()).filter(|i| gives_way(&standing[*i])).collect())
}

/// Score of a token by the answer of a scoring forward that was forced to it; `snapshot`: its probability when it was revealed.
pub fn score(score: Score, decision: &Decision, snapshot: f32) -> f64 {
    match score {
        // The probability itself, not its logarithm: what events report.
        Score::Probability => f64::from(decision.confidence),
        Score::Typicality => f64::from(decision.log_prob) + f64::from(decision.entropy),
        Score::Lift => f64::from(decision.log_prob) - f64::from(snapshot).ln(),
    }
}

/// Positions to mask again: the `floor(ratio * N)` lowest of N scores over the whole sequence, ties to the lower position; ascending.
pub fn remask(ratio: f64, scores: &[(usize, f64)]) -> Vec<usize> {
    let count = ((ratio * scores.len() as f64).floor() as usize).min(scores.len());
    let mut order = scores.to_vec();
    order.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let mut chosen: Vec<usize> = order[..count].iter().map(|(position, _)| *position).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{DrawKey, TIME_STEP, uniforms};

    const PLAIN: Draw =
        Draw { u: 0.0, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, top_k: None, forced: None, truncated_confidence: false };

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn draw_is_an_inverse_cdf_over_ascending_ids() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        for (u, token) in [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.5999, 2), (0.6001, 3), (0.9999, 3)] {
            assert_eq!(decide_row(&l, &[], &Draw { u, ..PLAIN }).unwrap().token, token, "u = {u}");
        }
        let d = decide_row(&l, &[], &Draw { u: 0.5, ..PLAIN }).unwrap();
        assert!((d.confidence - 0.3).abs() < 1e-6 && (d.margin - 0.1).abs() < 1e-6 && (d.log_prob - 0.3f32.ln()).abs() < 1e-6);
        let entropy: f32 = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| -p * p.ln()).sum();
        assert!((d.entropy - entropy).abs() < 1e-6);
    }

    /// Sorted 0.4 0.3 0.2 0.1: within 0.75 keeps two (0.7), crossing keeps three (0.9).
    #[test]
    fn the_two_nucleus_rules_differ_by_the_crossing_token() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        let token = |u, rule| decide_row(&l, &[], &Draw { u, top_p: 0.75, top_p_rule: rule, ..PLAIN }).unwrap().token;
        assert_eq!(token(0.0, TopPRule::Within), 2);
        assert_eq!(token(0.0, TopPRule::Crossing), 1);
        // Within: boundary at 0.3 / 0.7; crossing: 0.2 / 0.9 and 0.5 / 0.9.
        assert_eq!([0.428, 0.429].map(|u| token(u, TopPRule::Within)), [2, 3]);
        assert_eq!([0.222, 0.223, 0.555, 0.556].map(|u| token(u, TopPRule::Crossing)), [1, 2, 2, 3]);
        // The first is kept even where it alone exceeds p; its truncated confidence is 1, its raw one is not.
        let draw = Draw { u: 0.99, top_p: 0.1, ..PLAIN };
        assert_eq!(decide_row(&l, &[], &draw).unwrap().confidence, 0.4);
        let d = decide_row(&l, &[], &Draw { truncated_confidence: true, ..draw }).unwrap();
        assert_eq!((d.token, d.confidence), (3, 1.0));
    }

    /// Sorted 0.4 0.3 0.2 0.1 at temperature 0.5 is 16 9 4 1 of 30; crossing 0.75 keeps two, 16 and 9 of 25.
    #[test]
    fn truncated_quantities_are_those_of_what_is_left() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        let draw = Draw { temperature: 0.5, top_p: 0.75, top_p_rule: TopPRule::Crossing, truncated_confidence: true, ..PLAIN };
        let close = |d: Decision, p: [f64; 2], token, confidence: f64| {
            let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let found = [d.confidence, d.margin, d.entropy].map(f64::from);
            let wanted = [confidence, p[0] - p[1], entropy];
            assert!(d.token == token && found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-6), "{d:?}, expected {wanted:?}");
            assert!((f64::from(d.log_prob) - f64::from(l[token as usize])).abs() < 1e-6, "{d:?}: a log probability is raw");
        };
        close(decide_row(&l, &[], &Draw { u: 0.2, ..draw }).unwrap(), [0.64, 0.36], 2, 0.36);
        close(decide_row(&l, &[], &Draw { u: 0.5, ..draw }).unwrap(), [0.64, 0.36], 3, 0.64);
        // One is left.
        close(decide_row(&l, &[], &Draw { top_p: 0.1, ..draw }).unwrap(), [1.0, 0.0], 3, 1.0);
        // [Dream] At temperature 0 the nucleus is that of temperature 1: 0.4 and 0.3 reach 0.6, and the first is taken.
        close(decide_row(&l, &[], &Draw { temperature: 0.0, top_p: 0.6, ..draw }).unwrap(), [4.0 / 7.0, 3.0 / 7.0], 3, 4.0 / 7.0);
        let forced = decide_row(&l, &[], &Draw { forced: Some(0), ..draw }).unwrap();
        assert_eq!(forced, decide_row(&l, &[], &Draw { forced: Some(0), ..PLAIN }).unwrap());
    }

    #[test]
    fn bans_ties_temperature_zero_and_forced_tokens() {
        let l = [1.0, 3.0, 3.0, 9.0];
        let d = decide_row(&l, &[3], &Draw { temperature: 0.0, u: 0.999, ..PLAIN }).unwrap();
        assert_eq!((d.token, d.margin), (1, 0.0));
        assert!(d.confidence < 0.5);
        let forced = decide_row(&l, &[3], &Draw { forced: Some(2), ..PLAIN }).unwrap();
        assert_eq!((forced.token, forced.confidence), (2, d.confidence));
        assert!(decide_row(&l, &[3], &Draw { forced: Some(3), ..PLAIN }).is_err());
        assert!(decide_row(&l, &[3], &Draw { forced: Some(4), ..PLAIN }).is_err());
        // Equal logits under nucleus: ties are kept from the lower id on. 4 x 0.25, within 0.6 keeps ids 0 and 1.
        let d = decide_row(&[2.0; 4], &[], &Draw { top_p: 0.6, u: 0.999, ..PLAIN }).unwrap();
        assert_eq!(d.token, 1);
    }

    #[test]
    fn broken_logits_are_errors() {
        assert!(decide_row(&[0.0, f32::NAN], &[], &PLAIN).is_err());
        assert!(decide_row(&[0.0, f32::INFINITY], &[], &PLAIN).is_err());
        assert!(decide_row(&[f32::NEG_INFINITY; 3], &[], &PLAIN).is_err());
        assert!(decide_row(&[0.0; 2], &[0, 1], &PLAIN).is_err());
        // A banned NaN is nobody's business; huge logits do not overflow.
        assert_eq!(decide_row(&[3e38, f32::NAN, -3e38], &[1], &Draw { u: 0.9, ..PLAIN }).unwrap().token, 0);
    }

    fn candidates(rows: &[(f32, f32, f32, f64)]) -> Vec<Candidate> {
        rows.iter()
            .enumerate()
            .map(|(i, &(confidence, margin, entropy, order))| Candidate {
                position: 10 + i,
                decision: Decision { token: 0, confidence, log_prob: confidence.ln(), margin, entropy },
                order,
            })
            .collect()
    }

    fn at(masks_at_start: usize, masks: usize, step: usize) -> BlockProgress {
        BlockProgress { block_len: masks_at_start, masks_at_start, masks, step }
    }

    fn confident(values: &[f32]) -> Vec<Candidate> {
        candidates(&values.iter().map(|c| (*c, 0.0, 0.0, 0.0)).collect::<Vec<_>>())
    }

    #[test]
    fn rankings_and_their_ties() {
        let c = candidates(&[(0.5, 0.1, 2.0, 0.9), (0.9, 0.1, 1.0, 0.2), (0.5, 0.4, 1.0, 0.1), (0.1, 0.0, 3.0, 0.5)]);
        let pick = |rank, n| select(&Unmask::Count { rank, n }, at(4, 4, 0), &c).unwrap();
        assert_eq!(pick(Rank::Uniform, 1), [2]);
        assert_eq!(pick(Rank::Uniform, 2), [1, 2]);
        assert_eq!(pick(Rank::Confidence, 2), [0, 1], "tie at 0.5 goes to the lower position");
        assert_eq!(pick(Rank::Margin, 2), [0, 2], "tie at 0.1 goes to the lower position");
        assert_eq!(pick(Rank::Entropy, 1), [1], "tie at 1.0 goes to the lower position");
        assert_eq!(pick(Rank::Left, 3), [0, 1, 2]);
        assert_eq!(pick(Rank::Left, 99), [0, 1, 2, 3], "clamped to what is masked");
    }

    #[test]
    fn threshold_is_inclusive_and_always_reveals_the_best() {
        let c = candidates(&[(0.5, 0.0, 0.0, 0.0), (0.8, 0.0, 0.0, 0.0), (0.79, 0.0, 0.0, 0.0)]);
        let pick = |t| select(&Unmask::Threshold(t), at(3, 3, 0), &c).unwrap();
        assert_eq!(pick(0.8), [1]);
        assert_eq!(pick(0.79), [1, 2]);
        assert_eq!(pick(0.95), [1]);
        assert_eq!(pick(0.0), [0, 1, 2]);
    }

    /// Entropies 0.1 0.2 0.4: cumulative minus largest is 0, 0.1, 0.3.
    #[test]
    fn entropy_bound_sums_all_but_the_largest() {
        let c = candidates(&[(0.5, 0.0, 0.4, 0.0), (0.5, 0.0, 0.1, 0.0), (0.5, 0.0, 0.2, 0.0)]);
        let pick = |b| select(&Unmask::EntropyBound(b), at(3, 3, 0), &c).unwrap();
        assert_eq!(pick(0.0), [1]);
        assert_eq!(pick(0.15), [1, 2]);
        assert_eq!(pick(0.35), [0, 1, 2]);
    }

    /// [LLaDA] 10 masks over 4 steps: 3 3 2 2. 3 masks over 5 steps: 1 1 1, and the empty steps are never reached.
    #[test]
    fn linear_quota_gives_the_remainder_to_the_first_steps() {
        let rule = Unmask::Linear { rank: Rank::Confidence, steps: 4 };
        assert_eq!([0, 1, 2, 3].map(|step| quota(&rule, at(10, 10, step)).unwrap()), [3, 3, 2, 2]);
        let rule = Unmask::Linear { rank: Rank::Confidence, steps: 5 };
        assert_eq!([0, 1, 2, 3, 4].map(|step| quota(&rule, at(3, 3, step)).unwrap()), [1, 1, 1, 0, 0]);
    }

    /// Counts of the integer schedule in Dream's `generation_utils.py`, f32 arithmetic included.
    #[test]
    fn timestep_quota_matches_dream() {
        let counts = |length: usize, steps: usize| {
            let rule = Unmask::Timestep { rank: Rank::Confidence, steps, eps: 1e-3 };
            let mut masks = length;
            (0..steps)
                .map(|step| {
                    let n = quota(&rule, at(length, masks, step)).unwrap();
                    masks -= n;
                    n
                })
                .collect::<Vec<_>>()
        };
        for length in [32, 64, 128, 256, 512] {
            let c = counts(length, length);
            assert_eq!((c[0], c[length - 1]), (0, 2), "length {length}");
            assert!(c[1..length - 1].iter().all(|n| *n == 1), "length {length}: {c:?}");
        }
        let c = counts(256, 64);
        assert!(c[0] == 3 && c[63] == 5 && c[1..63].iter().all(|n| *n == 4), "{c:?}");
        let c = counts(127, 32);
        assert_eq!((&c[..3], c[31]), (&[3, 3, 4][..], 5), "{c:?}");
        let c = counts(256, 128);
        assert!(c[0] == 1 && c[127] == 3 && c[1..127].iter().all(|n| *n == 2), "{c:?}");
        // The empty first step is skipped without a forward.
        let rule = Unmask::Timestep { rank: Rank::Confidence, steps: 32, eps: 1e-3 };
        assert_eq!(next_step(&rule, at(32, 32, 0), std::iter::empty()), 1);
    }

    /// [SDAR] Strictly above, and never fewer than the quota: 8 positions over 3 steps are 3 3 2, also where only 5 are masked.
    #[test]
    fn above_is_strict_and_reveals_the_quota_at_least() {
        let c = confident(&[0.5, 0.8, 0.79, 0.1, 0.9]);
        let pick =
            |bound, steps, step| select(&Unmask::Above { bound, steps }, BlockProgress { block_len: 8, ..at(5, 5, step) }, &c).unwrap();
        assert_eq!([pick(0.8, None, 0), pick(0.79, None, 0), pick(0.95, None, 7)], [vec![4], vec![1, 4], vec![4]]);
        assert_eq!([pick(0.8, Some(3), 0), pick(0.95, Some(3), 2), pick(0.4, Some(3), 2)], [vec![1, 2, 4], vec![1, 4], vec![0, 1, 2, 4]]);
        assert_eq!(pick(0.95, Some(1), 0), [0, 1, 2, 3, 4], "clamped to what is masked");
        let fixed = Unmask::Fixed { rank: Rank::Left, steps: 3 };
        assert_eq!([0, 1, 2].map(|step| quota(&fixed, BlockProgress { block_len: 8, ..at(5, 5, step) }).unwrap()), [3, 3, 2]);
    }

    /// Factor 1: ranks 2, 3, 4 need 1 - 1/3, 1 - 1/4, 1 - 1/5.
    #[test]
    fn factor_needs_more_of_every_further_one_and_never_leaves_one_alone() {
        let pick = |values: &[f32], factor| select(&Unmask::Factor(factor), at(5, 5, 0), &confident(values)).unwrap();
        assert_eq!(pick(&[0.1, 0.99, 0.7, 0.74, 0.2], 1.0), [1, 3], "0.7 is below 3/4");
        assert_eq!(pick(&[0.1, 0.99, 0.76, 0.74, 0.2], 1.0), [1, 2], "0.74 is below 3/4, though above 2/3");
        assert_eq!(pick(&[0.1, 0.3, 0.2], 1.0), [1]);
        assert_eq!(pick(&[0.1, 0.99, 0.76], 1.0), [0, 1, 2], "the last one goes along");
        assert_eq!((pick(&[0.1, 0.2], 1.0), pick(&[0.1], 0.0)), (vec![0, 1], vec![0]));
        assert_eq!(pick(&[0.1, 0.3, 0.2, 0.15], 9.0), [0, 1, 2, 3]);
    }

    /// [Dream] `origin` reveals at step i with probability 1 - s/t what is still masked: over all steps, t - s of the positions, the rest
    /// in the last one. 40,000 times: five deviations of a share are below 1.3 %.
    #[test]
    fn ancestral_steps_are_independent_draws() {
        let (steps, eps) = (6, 0.1);
        let rule = Unmask::Ancestral { steps, eps };
        let time = |position| uniforms(DrawKey { seed: 5, sample: 0, stage: 0, block: 0, step: TIME_STEP, position }).order;
        let mut left: Vec<Candidate> =
            (0..40_000).map(|p| Candidate { order: time(p), ..candidates(&[(0.5, 0.0, 0.0, 0.0)])[0] }).collect();
        let (mut step, mut shares) = (0, Vec::new());
        while !left.is_empty() {
            step = next_step(&rule, at(40_000, left.len(), step), left.iter().map(|c| c.order));
            let chosen = select(&rule, at(40_000, left.len(), step), &left).unwrap();
            shares.push(chosen.len() as f64 / 40_000.0);
            let mut at = 0..;
            left.retain(|_| at.next().is_some_and(|i| chosen.binary_search(&i).is_err()));
            step += 1;
        }
        assert_eq!(shares.len(), steps);
        for (i, share) in shares.iter().enumerate() {
            assert!((share - if i + 1 < steps { 0.15 } else { 0.25 }).abs() < 0.013, "step {i}: {shares:?}");
        }
        // Empty steps are skipped: times 0.9 and 0.2 lie in the first of six steps and in the last.
        let two: Vec<Candidate> = [0.9, 0.2].map(|order| Candidate { order, ..left_over() }).into();
        assert_eq!((next_step(&rule, at(2, 2, 0), [0.9, 0.2].into_iter()), select(&rule, at(2, 2, 0), &two).unwrap()), (0, vec![0]));
        assert_eq!((next_step(&rule, at(2, 1, 1), [0.2].into_iter()), select(&rule, at(2, 1, 5), &two[1..]).unwrap()), (5, vec![0]));
    }

    fn left_over() -> Candidate {
        candidates(&[(0.5, 0.0, 0.0, 0.0)])[0]
    }

    /// Draws without putting back: pairs of three positions with weights exp(c / 0.5), against their probabilities.
    #[test]
    fn tempered_rankings_draw_without_putting_back() {
        let values = [0.9f32, 0.5, 0.1];
        let rule = Unmask::Count { rank: Rank::Confidence, n: 2 };
        let (mut seen, draws) = ([0usize; 3], 20_000u32);
        for sample in 0..draws {
            let mut c = confident(&values);
            for (position, c) in c.iter_mut().enumerate() {
                c.order = uniforms(DrawKey { seed: 1, sample, stage: 0, block: 0, step: 0, position: position as u32 }).order;
            }
            let pair = select_tempered(&rule, 0.5, at(3, 3, 0), &c).unwrap();
            seen[3 - pair[0] - pair[1]] += 1;
        }
        let weights = values.map(|c| f64::from(c / 0.5).exp());
        let total: f64 = weights.iter().sum();
        for missing in 0..3 {
            let (a, b) = (weights[(missing + 1) % 3], weights[(missing + 2) % 3]);
            let p = a / total * b / (total - a) + b / total * a / (total - b);
            let share = seen[missing] as f64 / f64::from(draws);
            assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt(), "without {missing}: {share}, expected {p}");
        }
        // Temperature 0 is the ranking itself.
        assert_eq!(select_tempered(&rule, 0.0, at(3, 3, 0), &confident(&values)).unwrap(), [0, 1]);
    }

    #[test]
    fn another_token_above_the_bound_takes_the_place() {
        let standing = |confidence: f32, token: u32, held: u32| {
            let mut candidate = confident(&[confidence])[0];
            candidate.decision.token = token;
            (candidate, held)
        };
        let all = [standing(0.9, 5, 5), standing(0.9, 6, 5), standing(0.5, 6, 5), standing(0.500_001, 6, 5), standing(0.1, 6, 5)];
        assert_eq!(edits(0.5, &all).unwrap(), [1, 3], "strictly above, and another token");
        assert_eq!(edits(0.0, &all).unwrap(), [1, 2, 3, 4]);
        assert_eq!(edits(0.0, &[]).unwrap(), Vec::<usize>::new());
        assert!(edits(0.5, &[all[1], standing(f32::NAN, 5, 5)]).unwrap_err().to_string().contains("NaN"));
    }

    #[test]
    fn remask_takes_the_floor_of_the_lowest_with_stable_ties() {
        let scores = [(5, 0.3), (6, 0.1), (7, 0.3), (8, 0.9), (9, 0.3)];
        assert_eq!(remask(0.5, &scores), [5, 6]);
        assert_eq!(remask(0.6, &scores), [5, 6, 7], "ties at 0.3: lower positions first");
        assert_eq!(remask(0.19, &scores), Vec::<usize>::new());
        assert_eq!(remask(1.0, &scores), [5, 6, 7, 8, 9]);
        assert_eq!(remask(1.0, &[]), Vec::<usize>::new());
    }

    #[test]
    fn nan_is_an_error_and_every_rule_reveals_something() {
        let bad = candidates(&[(f32::NAN, 0.0, 0.0, 0.0)]);
        let good = candidates(&[(0.0, 0.0, 9.0, 0.5), (0.0, 0.0, 9.0, 0.5)]);
        for rule in [
            Unmask::Count { rank: Rank::Confidence, n: 1 },
            Unmask::Linear { rank: Rank::Uniform, steps: 7 },
            Unmask::Fixed { rank: Rank::Left, steps: 50 },
            Unmask::Timestep { rank: Rank::Entropy, steps: 50, eps: 1e-3 },
            Unmask::Ancestral { steps: 50, eps: 1e-3 },
            Unmask::Threshold(1.0),
            Unmask::Above { bound: 1.0, steps: None },
            Unmask::Above { bound: 1.0, steps: Some(50) },
            Unmask::Factor(0.0),
            Unmask::EntropyBound(0.0),
        ] {
            assert!(select(&rule, at(1, 1, 0), &bad).is_err());
            for step in 0..60 {
                assert!(!select(&rule, at(2, 2, step), &good).unwrap().is_empty(), "{rule} at step {step}");
            }
        }
    }
}
