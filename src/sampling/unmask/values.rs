//! Numbers that rules take: counts, probabilities, bounds, and the shares of a quota.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};

/// A count of at least 1 and at most 2^32.
pub fn count(text: &str) -> Result<NonZeroUsize> {
    let count = text.parse().ok().filter(|n: &NonZeroUsize| n.get() <= 1 << 32);
    count.ok_or_else(|| Error::request(format!("expected a number from 1 to 2^32, found `{text}`")))
}

/// A number, before it is checked.
pub fn number(text: Option<&str>) -> Result<f32> {
    let text = text.unwrap_or_default();
    text.parse().map_err(|_| Error::request(format!("expected a number, found `{text}`")))
}

/// A probability from 0 to 1.
pub fn probability(p: f32) -> Result<f32> {
    Some(p).filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| Error::request(format!("expected a probability from 0 to 1, found {p}")))
}

/// A finite number of at least 0.
pub fn not_negative(x: f32) -> Result<f32> {
    Some(x)
        .filter(|x| x.is_finite() && *x >= 0.0)
        .ok_or_else(|| Error::request(format!("expected a finite number of at least 0, found {x}")))
}

/// Share of step `step` where `count` positions go to `steps` steps: `count / steps`, and one more
/// in the first `count % steps`.
pub fn share(count: usize, steps: usize, step: usize) -> usize {
    count / steps + usize::from(step < count % steps)
}

/// The first step at or after `step` with a share above 0, `steps` where there is none: shares
/// never grow, so once one is 0 all later ones are.
pub fn next_share(count: usize, steps: usize, step: usize) -> usize {
    if share(count, steps, step) > 0 { step } else { step.max(steps) }
}
