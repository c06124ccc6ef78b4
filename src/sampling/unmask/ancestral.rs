//! `ancestral:STEPS`: the reverse process itself, each masked position alone.
#![forbid(unsafe_code)]

use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::times::Times;

/// Unmasks each masked position by itself, with probability `1 - s/t` in the step from time t to
/// time s, and all in the last step (Dream, `origin`).
///
/// A position draws one time in [0, 1), and the step in which that time lies unmasks it. Steps in
/// which no time lies run no forward.
#[derive(Clone, Copy, Debug)]
pub struct Ancestral {
    /// Times of the steps.
    pub times: Times,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "ancestral",
    argument: "STEPS",
    keys: &["eps"],
    doc: "Dream's `origin`: each masked position by itself, with probability `1 - s/t` from time t to time s, the rest in the last of STEPS steps",
    parse: |arguments| Ok(Unmask::new(Ancestral { times: Times::parse(arguments)? })),
};

impl UnmaskRule for Ancestral {
    fn value(&self) -> String {
        format!("ancestral:{}", self.times.steps())
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.times.eps_key().into_iter().collect()
    }

    fn select(&self, progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let next = if progress.step + 1 < self.times.steps() { f64::from(self.times.at(progress.step + 1)) } else { 0.0 };
        let mut chosen: Vec<usize> = (0..candidates.len()).filter(|i| candidates[*i].order >= next).collect();
        if chosen.is_empty() {
            // No time lies in a step that `next_step` did not choose.
            chosen.extend((0..candidates.len()).rev().max_by(|a, b| candidates[*a].order.total_cmp(&candidates[*b].order)));
        }
        chosen
    }

    fn next_step(&self, progress: BlockProgress, times: &mut dyn Iterator<Item = f64>) -> usize {
        let latest = times.fold(0.0, f64::max);
        let ends_before = |step: usize| step + 1 < self.times.steps() && latest < f64::from(self.times.at(step + 1));
        let mut step = progress.step;
        if ends_before(step) {
            step = step.max(self.times.before(latest).saturating_sub(1));
        }
        while ends_before(step) {
            step += 1;
        }
        step
    }

    fn draws_times(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::rng::{DrawKey, TIME_STEP, uniforms};
    use crate::sampling::unmask::testing::{block, confident};

    fn rule(steps: usize, eps: f32) -> Ancestral {
        Ancestral { times: Times::new(NonZeroUsize::new(steps).unwrap(), eps).unwrap() }
    }

    fn at_time(order: f64) -> Candidate {
        Candidate { order, ..confident(&[0.5])[0] }
    }

    /// A step unmasks with probability 1 - s/t what is still masked: over all steps, t - s of the
    /// positions, the rest in the last one. 40,000 times: five deviations of a share are below
    /// 1.3 %.
    #[test]
    fn steps_are_independent_draws() {
        let (steps, eps) = (6, 0.1);
        let rule_of = rule(steps, eps);
        let time = |position| uniforms(DrawKey { seed: 5, sample: 0, stage: 0, block: 0, step: TIME_STEP, position }).order;
        let mut left: Vec<Candidate> = (0..40_000).map(|p| at_time(time(p))).collect();
        let (mut step, mut shares) = (0, Vec::new());
        while !left.is_empty() {
            step = rule_of.next_step(block(40_000, left.len(), step), &mut left.iter().map(|c| c.order));
            let chosen = rule_of.select(block(40_000, left.len(), step), &left);
            shares.push(chosen.len() as f64 / 40_000.0);
            let mut index = 0..;
            left.retain(|_| index.next().is_some_and(|i| chosen.binary_search(&i).is_err()));
            step += 1;
        }
        assert_eq!(shares.len(), steps);
        for (i, share) in shares.iter().enumerate() {
            assert!((share - if i + 1 < steps { 0.15 } else { 0.25 }).abs() < 0.013, "step {i}: {shares:?}");
        }
        // Empty steps are skipped: times 0.9 and 0.2 lie in the first of six steps and in the last.
        let two = [0.9, 0.2].map(at_time);
        assert_eq!((rule_of.next_step(block(2, 2, 0), &mut [0.9, 0.2].into_iter()), rule_of.select(block(2, 2, 0), &two)), (0, vec![0]));
        assert_eq!((rule_of.next_step(block(2, 1, 1), &mut [0.2].into_iter()), rule_of.select(block(2, 1, 5), &two[1..])), (5, vec![0]));
    }

    /// As a walk over all steps finds it, and for 2^32 steps at once.
    #[test]
    fn empty_steps_are_skipped_without_a_walk() {
        for steps in [1, 2, 7, 100, 30_000] {
            for k in 0..=20 {
                let (rule, latest) = (rule(steps, 1e-3), f64::from(k) / 20.0);
                let walked = (0..).find(|s| s + 1 >= steps || latest >= f64::from(rule.times.at(s + 1))).unwrap();
                assert_eq!(rule.next_step(block(1, 1, 0), &mut [latest].into_iter()), walked, "{steps} steps, time {latest}");
            }
        }
        let step = rule(1 << 32, 1e-3).next_step(block(1, 1, 0), &mut [0.25].into_iter());
        assert!((3_200_000_000..3_300_000_000).contains(&step), "{step}");
    }
}
