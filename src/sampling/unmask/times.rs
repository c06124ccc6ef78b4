//! Dream's times: `linspace(1, eps, steps + 1)` in f32, as PyTorch computes it.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::sampling::unmask::rule::RuleArguments;
use crate::sampling::unmask::values::count;

/// The last time where a stage does not give `eps`.
const EPS: f32 = 1e-3;

/// Twice the rounding error of `1 - s/t` and of an element of the times: a few units of 2^-24.
const ROUNDING: f64 = 1e-6;

/// Times from 1 down to `eps`, one for the beginning of each step and one for the end of the last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    steps: NonZeroUsize,
    eps: f32,
}

impl Times {
    /// Errors: [`Error::Request`] where `eps` is not above 0 and below 1.
    pub fn new(steps: NonZeroUsize, eps: f32) -> Result<Times> {
        if eps > 0.0 && eps < 1.0 {
            Ok(Times { steps, eps })
        } else {
            Err(Error::request(format!("eps: expected a time above 0 and below 1, found {eps}")))
        }
    }

    /// The text after the colon, and the key `eps`.
    pub(super) fn parse(arguments: &RuleArguments) -> Result<Times> {
        Times::new(count(arguments.value.unwrap_or_default())?, arguments.eps.unwrap_or(EPS))
    }

    /// The stage key of an `eps` that is not the default.
    pub(super) fn eps_key(&self) -> Option<(&'static str, String)> {
        (self.eps != EPS).then(|| ("eps", self.eps.to_string()))
    }

    /// Steps, at least 1.
    pub fn steps(&self) -> usize {
        self.steps.get()
    }

    /// Element `index` of `linspace(1, eps, steps + 1)`, counted from the nearer end.
    pub fn at(&self, index: usize) -> f32 {
        let steps = self.steps.get();
        let delta = (self.eps - 1.0) / steps as f32;
        if index < steps.div_ceil(2) { 1.0 + delta * index as f32 } else { self.eps - delta * (steps - index) as f32 }
    }

    /// The probability that a mask at the beginning of step `step` is none at its end: `1 - s/t`,
    /// s and t the times there.
    pub fn unmasked_share(&self, step: usize) -> f64 {
        f64::from(1.0 - self.at(step + 1) / self.at(step))
    }

    /// An element before the first that is below `time` whatever the rounding, at most the last:
    /// where a search for that element may begin.
    pub fn before(&self, time: f64) -> usize {
        let steps = self.steps.get() as f64;
        let index = (1.0 - time - ROUNDING) / (1.0 - f64::from(self.eps)) * steps - 2.0;
        index.clamp(0.0, steps) as usize
    }

    /// A step before the first whose [`Times::unmasked_share`] is `share` or more, whatever the
    /// rounding.
    pub fn before_share(&self, share: f64) -> usize {
        // d/t >= share - ROUNDING where t <= d / (share - ROUNDING).
        let delta = (1.0 - f64::from(self.eps)) / self.steps.get() as f64;
        let share = share - ROUNDING;
        if share <= 0.0 { 0 } else { self.before(delta / share) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The searches begin before what they look for, and close to it.
    #[test]
    fn searches_begin_before_what_they_look_for() {
        for (steps, eps) in [(1, 0.5), (7, 1e-3), (64, 1e-3), (1000, 0.3), (65_536, 1e-3), (1 << 20, 0.9)] {
            let times = Times::new(NonZeroUsize::new(steps).unwrap(), eps).unwrap();
            for k in 0..=40 {
                let time = f64::from(eps) + (1.0 - f64::from(eps)) * f64::from(k) / 40.0;
                let first = (0..=steps).find(|i| f64::from(times.at(*i)) < time).unwrap_or(steps);
                let begin = times.before(time);
                assert!(begin <= first && first - begin <= 10 + steps / 10_000, "{steps} steps, time {time}: {begin}, {first}");
            }
            for masks in [1, 2, 3, 10, 100, 5000] {
                let share = 1.0 / f64::from(masks);
                let first = (0..steps - 1).find(|i| times.unmasked_share(*i) >= share).unwrap_or(steps);
                assert!(times.before_share(share) <= first, "{steps} steps, {masks} masks");
            }
        }
    }
}
