//! Unmask rules: which masked positions a forward unmasks, and which tokens it overwrites.
//!
//! Plain numbers in, plain numbers out. Ties go to the lower position; at least one position is
//! revealed per step; NaN is an error, never a loop (docs/architecture.md, progress).
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::sampling::types::{Rank, SampledToken, Unmask};

/// A masked position of the current block with what the forward said about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub position: usize,
    pub sampled: SampledToken,
    /// The order uniform of this position and step; its time under [`Unmask::Ancestral`].
    pub order: f64,
}

/// Where a block stands when the next positions are chosen.
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

/// How many positions `unmask` wants at this step, where it counts steps (of [`Unmask::Above`]: at
/// least); `None` for rules that look at the candidates instead.
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
            // [Dream] f32 arithmetic decides the truncation: t and s are elements of linspace(1,
            // eps, steps + 1).
            let (t, s) = (linspace_f32(eps, steps, step), linspace_f32(eps, steps, step + 1));
            Some((masks as f64 * f64::from(1.0 - s / t)) as usize)
        }
        Unmask::Ancestral { .. } | Unmask::Threshold(_) | Unmask::Factor(_) | Unmask::EntropyBound(_) => None,
    }
}

/// Element `index` of `linspace(1, eps, steps + 1)` as PyTorch computes it in f32: from the nearer
/// end.
fn linspace_f32(eps: f32, steps: usize, index: usize) -> f32 {
    let delta = (eps - 1.0) / steps as f32;
    if index < steps.div_ceil(2) { 1.0 + delta * index as f32 } else { eps - delta * (steps - index) as f32 }
}

/// The first step at or after `progress.step` that unmasks something: the others need no forward.
/// `times` are the masked positions', of [`Unmask::Ancestral`].
pub fn next_step(unmask: &Unmask, mut progress: BlockProgress, times: impl Iterator<Item = f64>) -> usize {
    if let Unmask::Ancestral { steps, eps } = *unmask {
        // [Dream] `origin`: with p = 1 - s/t at every step, a position's step is the one in which
        // its time lies.
        let latest = times.fold(0.0, f64::max);
        progress.step = progress.step.max(ancestral_start(eps, steps, latest));
        while progress.step + 1 < steps && latest < f64::from(linspace_f32(eps, steps, progress.step + 1)) {
            progress.step += 1;
        }
        return progress.step;
    }
    if progress.masks == 0 || quota(unmask, progress) != Some(0) {
        return progress.step;
    }
    match *unmask {
        // Shares fall from step to step: once they are nothing, they stay so.
        Unmask::Linear { steps, .. } | Unmask::Fixed { steps, .. } | Unmask::Above { steps: Some(steps), .. } => {
            progress.step.saturating_add(1).max(steps)
        }
        Unmask::Timestep { steps, eps, .. } => {
            progress.step = progress.step.max(timestep_start(eps, steps, progress.masks));
            while quota(unmask, progress) == Some(0) {
                progress.step += 1;
            }
            progress.step
        }
        _ => progress.step,
    }
}

/// A step before which [`Unmask::Ancestral`] reveals no position of the time `latest`, so that a
/// schedule of 2^32 steps is not walked through: steps are counted from here on.
///
/// Times of f32 are within 2^-22 of the line that they lie on.
fn ancestral_start(eps: f32, steps: usize, latest: f64) -> usize {
    let delta = (1.0 - f64::from(eps)) / steps as f64;
    if delta <= 0.0 {
        return 0;
    }
    let first = ((1.0 - latest - 2f64.powi(-22)) / delta).floor() - 2.0;
    // A float that is negative becomes 0.
    (first as usize).min(steps.saturating_sub(1))
}

/// A step before which [`Unmask::Timestep`] reveals none of `masks` positions.
///
/// It reveals one where `1 - s/t`, with `s = t - delta`, is at least `1 / masks`, that is where `t`
/// is at most `delta * masks`; what f32 makes of `1 - s/t` is within 2^-21 of it.
fn timestep_start(eps: f32, steps: usize, masks: usize) -> usize {
    let delta = (1.0 - f64::from(eps)) / steps as f64;
    let share = 1.0 / masks as f64 - 2f64.powi(-21);
    if delta <= 0.0 || share <= 0.0 {
        return 0;
    }
    let latest = delta / share + 2f64.powi(-22);
    let first = ((1.0 - latest) / delta).floor() - 2.0;
    (first as usize).min(steps.saturating_sub(1))
}

/// The positions to unmask now: indices into `candidates`, ascending. At least one and never more
/// than there are.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence, margin or entropy is NaN.
pub fn select(unmask: &Unmask, progress: BlockProgress, candidates: &[Candidate]) -> Result<Vec<usize>> {
    select_tempered(unmask, 0.0, progress, candidates)
}

/// [`select`] where rankings by confidence, margin or entropy are draws of this `temperature`:
/// positions one after the other, without putting back, with weights `exp(rank / temperature)`
/// (Dream's `alg_temp`; the rank of an entropy is its negative).
///
/// The n smallest of `E exp(-rank / temperature)`, E exponential, are such a draw (Efraimidis and
/// Spirakis 2006; in logarithms, Gumbel-top-k).
pub fn select_tempered(unmask: &Unmask, temperature: f32, progress: BlockProgress, candidates: &[Candidate]) -> Result<Vec<usize>> {
    for c in candidates {
        let SampledToken { confidence, margin, entropy, .. } = c.sampled;
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
                Rank::Confidence => -f64::from(c.sampled.confidence),
                Rank::Margin => -f64::from(c.sampled.margin),
                Rank::Entropy => f64::from(c.sampled.entropy),
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
            order.iter().enumerate().filter(|(i, c)| *i == 0 || candidates[**c].sampled.confidence >= threshold).map(|(_, c)| *c).collect()
        }
        Unmask::Above { bound, .. } => {
            let least = quota(unmask, progress).unwrap_or(1).max(1);
            let order = best_first(Rank::Confidence).into_iter().enumerate();
            order.filter(|(i, c)| *i < least || candidates[*c].sampled.confidence > bound).map(|(_, c)| c).collect()
        }
        Unmask::Factor(factor) => {
            let mut order = best_first(Rank::Confidence);
            // The last one of all is never compared, see `Unmask::Factor`. Rank r counts from 1, i
            // from 0.
            let short = |i: &usize| f64::from(candidates[order[*i]].sampled.confidence) < 1.0 - f64::from(factor) / (*i + 2) as f64;
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
                let entropy = f64::from(candidates[*c].sampled.entropy);
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

/// Token editing (LLaDA2.1): indices, ascending, of unmasked positions whose sampled
/// token differs from the current one and has a confidence above `bound`. Each candidate comes with
/// the current token of its position.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence is NaN.
pub fn edits(bound: f32, unmasked: &[(Candidate, u32)]) -> Result<Vec<usize>> {
    if let Some((c, _)) = unmasked.iter().find(|(c, _)| c.sampled.confidence.is_nan()) {
        return Err(Error::kernel(format!("position {}: confidence NaN", c.position)));
    }
    let is_overwritten = |(c, token): &(Candidate, u32)| c.sampled.token != *token && c.sampled.confidence > bound;
    Ok((0..unmasked.len()).filter(|i| is_overwritten(&unmasked[*i])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{DrawKey, TIME_STEP, uniforms};

    fn candidates(rows: &[(f32, f32, f32, f64)]) -> Vec<Candidate> {
        rows.iter()
            .enumerate()
            .map(|(i, &(confidence, margin, entropy, order))| Candidate {
                position: 10 + i,
                sampled: SampledToken { token: 0, confidence, log_prob: confidence.ln(), margin, entropy },
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

    /// What is skipped in closed form is what walking skips.
    #[test]
    fn steps_are_skipped_as_walking_skips_them() {
        let walk = |unmask: &Unmask, mut progress: BlockProgress| {
            let last = |step: usize| match *unmask {
                Unmask::Linear { steps, .. } | Unmask::Fixed { steps, .. } => step >= steps,
                _ => false,
            };
            while progress.masks > 0 && quota(unmask, progress) == Some(0) {
                progress.step += 1;
                if last(progress.step) {
                    break;
                }
            }
            progress.step
        };
        for steps in [1, 2, 3, 7, 64, 512, 1000, 4099, 70_001] {
            for masks in [1, 2, 3, 8, 31, 300, 4096] {
                for step in [0, 1, steps / 3, steps - 1, steps] {
                    let progress = BlockProgress { block_len: 300, masks_at_start: masks + 1, masks, step };
                    for eps in [1e-3, 0.2, 1e-6] {
                        let timestep = Unmask::Timestep { steps, rank: Rank::Left, eps };
                        assert_eq!(
                            next_step(&timestep, progress, std::iter::empty()),
                            walk(&timestep, progress),
                            "{timestep:?} {progress:?}"
                        );
                        let ancestral = Unmask::Ancestral { steps, eps };
                        for latest in [0.0, 1e-3, 0.1, 0.5, 0.999, 1.0 - 1e-9] {
                            let mut walked = step;
                            while walked + 1 < steps && latest < f64::from(linspace_f32(eps, steps, walked + 1)) {
                                walked += 1;
                            }
                            assert_eq!(next_step(&ancestral, progress, std::iter::once(latest)), walked, "{ancestral:?} {latest} {step}");
                        }
                    }
                    for unmask in [Unmask::Linear { steps, rank: Rank::Left }, Unmask::Fixed { steps, rank: Rank::Left }] {
                        assert_eq!(next_step(&unmask, progress, std::iter::empty()), walk(&unmask, progress), "{unmask:?} {progress:?}");
                    }
                }
            }
        }
        // As many as a stage may name: walking would take a minute for each call.
        let steps = 1 << 32;
        let progress = BlockProgress { block_len: 300, masks_at_start: 300, masks: 300, step: 300 };
        for _ in 0..1000 {
            assert_eq!(next_step(&Unmask::Timestep { steps, rank: Rank::Left, eps: 1e-3 }, progress, std::iter::empty()), steps - 1);
            let step = next_step(&Unmask::Ancestral { steps, eps: 1e-3 }, progress, std::iter::once(0.5));
            assert!((step as f64 / steps as f64 - 0.5).abs() < 1e-3, "{step}");
            assert_eq!(next_step(&Unmask::Linear { steps, rank: Rank::Left }, progress, std::iter::empty()), steps);
        }
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

    /// [LLaDA] 10 masks over 4 steps: 3 3 2 2. 3 masks over 5 steps: 1 1 1, and the empty steps are
    /// never reached.
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

    /// [SDAR] Strictly above, and never fewer than the quota: 8 positions over 3 steps are 3 3 2,
    /// also where only 5 are masked.
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

    /// [Dream] `origin` unmasks at step i with probability 1 - s/t what is still masked: over all
    /// steps, t - s of the positions, the rest in the last one. 40,000 times: five deviations of a
    /// share are below 1.3 %.
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

    /// Draws without putting back: pairs of three positions with weights exp(c / 0.5), against
    /// their probabilities.
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
        let unmasked = |confidence: f32, token: u32, current: u32| {
            let mut candidate = confident(&[confidence])[0];
            candidate.sampled.token = token;
            (candidate, current)
        };
        let all = [unmasked(0.9, 5, 5), unmasked(0.9, 6, 5), unmasked(0.5, 6, 5), unmasked(0.500_001, 6, 5), unmasked(0.1, 6, 5)];
        assert_eq!(edits(0.5, &all).unwrap(), [1, 3], "strictly above, and another token");
        assert_eq!(edits(0.0, &all).unwrap(), [1, 2, 3, 4]);
        assert_eq!(edits(0.0, &[]).unwrap(), Vec::<usize>::new());
        assert!(edits(0.5, &[all[1], unmasked(f32::NAN, 5, 5)]).unwrap_err().to_string().contains("NaN"));
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
