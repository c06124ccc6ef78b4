//! Owns the law of decisions: which token a masked row takes, which rows are revealed, which positions are masked again.
//!
//! Plain numbers in, plain numbers out, no tensors and no pages. The backends' `decide` kernels are held to
//! [`decide_row`]; the engine calls [`select`] and [`remask`] directly. Ties go to the lower token id, then to the lower
//! position; at least one position is revealed per step; NaN is an error, never a loop (design section 5, law 3).
#![forbid(unsafe_code)]

use crate::backend::{Decision, Draw, TopPRule};
use crate::error::{Error, Result};
use crate::schedule::{Rank, Score, Unmask};

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
    let entropy = sum.ln() - logits.iter().zip(&raw).filter(|(_, m)| **m > 0.0).map(|(&l, m)| m * (f64::from(l) - max)).sum::<f64>() / sum;
    let second = if top[1].1 == usize::MAX { 0.0 } else { (top[1].0 - max).exp() };

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        None if draw.temperature == 0.0 => argmax,
        None => {
            let mut mass = masses(f64::from(draw.temperature));
            if draw.top_p < 1.0 {
                nucleus(&mut mass, logits, f64::from(draw.top_p), draw.top_p_rule);
            }
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
            kept_share = Some(mass[token] / total);
            token
        }
    };
    let Some(&logit) = logits.get(token).filter(|_| allowed(token)) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - max - sum.ln();
    let confidence = match kept_share {
        Some(share) if draw.truncated_confidence => share,
        None if draw.truncated_confidence && draw.forced.is_none() => 1.0,
        _ => log_prob.exp(),
    };
    Ok(Decision {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: ((1.0 - second) / sum) as f32,
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

/// A masked position of the current block with what the forward said about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub position: usize,
    pub decision: Decision,
    /// The order uniform of this position and step.
    pub order: f64,
}

/// Where a block stands when its next reveals are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockProgress {
    /// Masks the block held when the stage reached it.
    pub masks_at_start: usize,
    /// Masks it holds now.
    pub masks: usize,
    /// Schedule step of this forward within the block, from 0.
    pub step: usize,
}

/// How many reveals `unmask` wants at this step, where it counts steps; `None` for rules that look at the candidates instead.
pub fn quota(unmask: &Unmask, progress: BlockProgress) -> Option<usize> {
    let BlockProgress { masks_at_start, masks, step } = progress;
    match *unmask {
        Unmask::Count { n, .. } => Some(n),
        // [LLaDA] get_num_transfer_tokens: the remainder goes to the first steps.
        Unmask::Linear { steps, .. } => Some(masks_at_start / steps + usize::from(step < masks_at_start % steps)),
        Unmask::Timestep { steps, .. } if step + 1 >= steps => Some(masks),
        Unmask::Timestep { steps, .. } => {
            // [Dream] f32 arithmetic decides the truncation: t and s are elements of linspace(1, 1e-3, steps + 1).
            let (t, s) = (linspace_f32(steps, step), linspace_f32(steps, step + 1));
            Some((masks as f64 * f64::from(1.0 - s / t)) as usize)
        }
        Unmask::Threshold(_) | Unmask::EntropyBound(_) => None,
    }
}

/// Element `index` of `linspace(1, 1e-3, steps + 1)` as PyTorch computes it in f32: from the nearer end.
fn linspace_f32(steps: usize, index: usize) -> f32 {
    let (start, end) = (1.0f32, 1e-3f32);
    let delta = (end - start) / steps as f32;
    if index < steps.div_ceil(2) { start + delta * index as f32 } else { end - delta * (steps - index) as f32 }
}

/// The first step at or after `progress.step` that reveals something: steps with an empty quota need no forward.
pub fn next_step(unmask: &Unmask, mut progress: BlockProgress) -> usize {
    while progress.masks > 0 && quota(unmask, progress) == Some(0) {
        progress.step += 1;
        if let Unmask::Linear { steps, .. } = unmask
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
    for c in candidates {
        let Decision { confidence, margin, entropy, .. } = c.decision;
        if confidence.is_nan() || margin.is_nan() || entropy.is_nan() {
            return Err(Error::kernel(format!("position {}: confidence {confidence}, margin {margin}, entropy {entropy}", c.position)));
        }
    }
    let best_first = |rank: Rank| {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        let key = |c: &Candidate| match rank {
            Rank::Uniform => c.order,
            Rank::Confidence => -f64::from(c.decision.confidence),
            Rank::Margin => -f64::from(c.decision.margin),
            Rank::Entropy => f64::from(c.decision.entropy),
            Rank::Left => 0.0,
        };
        order.sort_by(|&a, &b| {
            let (a, b) = (&candidates[a], &candidates[b]);
            key(a).total_cmp(&key(b)).then(a.position.cmp(&b.position))
        });
        order
    };
    let mut chosen = match *unmask {
        Unmask::Count { rank, .. } | Unmask::Linear { rank, .. } | Unmask::Timestep { rank, .. } => {
            let n = quota(unmask, progress).unwrap_or(1).max(1);
            let mut order = best_first(rank);
            order.truncate(n);
            order
        }
        Unmask::Threshold(threshold) => {
            let order = best_first(Rank::Confidence);
            order.iter().enumerate().filter(|(i, c)| *i == 0 || candidates[**c].decision.confidence >= threshold).map(|(_, c)| *c).collect()
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

    const PLAIN: Draw =
        Draw { u: 0.0, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, forced: None, truncated_confidence: false };

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
        BlockProgress { masks_at_start, masks, step }
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

    /// Counts from the reference (adjust-dream-llada B5), f32 arithmetic included.
    #[test]
    fn timestep_quota_matches_dream() {
        let counts = |length: usize, steps: usize| {
            let rule = Unmask::Timestep { rank: Rank::Confidence, steps };
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
        assert_eq!(next_step(&Unmask::Timestep { rank: Rank::Confidence, steps: 32 }, at(32, 32, 0)), 1);
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
            Unmask::Timestep { rank: Rank::Entropy, steps: 50 },
            Unmask::Threshold(1.0),
            Unmask::EntropyBound(0.0),
        ] {
            assert!(select(&rule, at(1, 1, 0), &bad).is_err());
            for step in 0..60 {
                assert!(!select(&rule, at(2, 2, step), &good).unwrap().is_empty(), "{rule} at step {step}");
            }
        }
    }
}
