//! Uncertainty: percentile bootstrap intervals over samples (Efron, "Bootstrap methods:
//! another look at the jackknife", Annals of Statistics 7, 1979).
//!
//! Every figure is a ratio of sums over samples, mapped: a mean has 1 in every denominator, a
//! pooled loss has its token count. All figures of a run are resampled by the same draws, so that a
//! figure never depends on which others are asked for.
#![forbid(unsafe_code)]

use serde::Serialize;

/// Resamples behind an interval.
pub const NUM_RESAMPLES: usize = 2000;

/// Share of the resamples inside an interval.
pub const LEVEL: f64 = 0.95;

/// A measured value with its interval, absent where the value is not a statistic over samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    pub value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// The largest over the samples, where that says more than the mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Figure {
    /// A value without an interval; absent if it is not a number.
    pub fn plain(value: f64) -> Option<Figure> {
        value.is_finite().then_some(Figure { value, low: None, high: None, max: None })
    }
}

/// What one sample adds to a figure: numerator and denominator. A sample that says nothing has 0 in
/// both.
pub type Part = (f64, f64);

/// A sample's value as a part of a mean.
pub fn part(value: Option<f64>) -> Part {
    value.map_or((0.0, 0.0), |v| (v, 1.0))
}

/// Which samples each resample holds: `NUM_RESAMPLES` rows of n indices, drawn once.
pub struct Resamples {
    num_samples: usize,
    index: Vec<u32>,
}

impl Resamples {
    /// Draws for sets of `num_samples` samples. `uniforms` returns two independent uniforms in
    /// [0, 1) for a resample and a pair of its positions; equal uniforms give equal intervals.
    pub fn draw(num_samples: usize, uniforms: impl Fn(u32, u32) -> [f64; 2]) -> Resamples {
        let chosen = |u: f64| ((u * num_samples as f64) as usize).min(num_samples - 1) as u32;
        let mut index = Vec::with_capacity(NUM_RESAMPLES * num_samples);
        for resample in 0..NUM_RESAMPLES as u32 {
            let pairs = 0..num_samples.div_ceil(2) as u32;
            index.extend(pairs.flat_map(|pair| uniforms(resample, pair).map(chosen)).take(num_samples));
        }
        Resamples { num_samples, index }
    }

    /// Samples in a set.
    pub fn num_samples(&self) -> usize {
        self.num_samples
    }

    /// `map(sum of numerators / sum of denominators)` with its interval. Absent where no sample
    /// says anything or the value is not finite; resamples of which that is true are left out.
    ///
    /// Panics if `parts` has another length than the sets that the draws were made for.
    pub fn figure(&self, parts: &[Part], map: impl Fn(f64) -> f64) -> Option<Figure> {
        assert_eq!(parts.len(), self.num_samples, "one part a sample");
        let ratio = |sum: Part| (sum.1 > 0.0).then(|| map(sum.0 / sum.1)).filter(|v| v.is_finite());
        let add = |sum: Part, part: Part| (sum.0 + part.0, sum.1 + part.1);
        let value = ratio(parts.iter().copied().fold((0.0, 0.0), add))?;
        let mut values: Vec<f64> = self
            .index
            .chunks_exact(self.num_samples)
            .filter_map(|chosen| ratio(chosen.iter().map(|i| parts[*i as usize]).fold((0.0, 0.0), add)))
            .collect();
        values.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - LEVEL) / 2.0;
        Some(Figure { value, low: quantile(&values, tail), high: quantile(&values, 1.0 - tail), max: None })
    }

    /// The mean of the values that are there.
    pub fn mean(&self, values: &[Option<f64>]) -> Option<Figure> {
        let parts: Vec<Part> = values.iter().copied().map(part).collect();
        self.figure(&parts, |mean| mean)
    }
}

/// Linear interpolation between order statistics (definition 7 of Hyndman and Fan, 1996). `sorted`
/// ascends.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::resamples;

    #[test]
    fn quantiles_of_a_small_list() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(quantile(&sorted, 0.0), Some(1.0));
        assert_eq!(quantile(&sorted, 1.0), Some(8.0));
        // 0.5 x 3 = 1.5: half way between the second and the third.
        assert_eq!(quantile(&sorted, 0.5), Some(3.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn figures_are_ratios_of_sums() {
        let resamples = resamples(3);
        let pooled = resamples.figure(&[(2.0, 1.0), (9.0, 3.0), (0.0, 0.0)], f64::exp).unwrap();
        assert!((pooled.value - (11.0f64 / 4.0).exp()).abs() < 1e-12, "{pooled:?}");
        // Every resample that says anything lies between the two samples' own values.
        let (low, high) = (pooled.low.unwrap(), pooled.high.unwrap());
        assert!(2.0f64.exp() - 1e-9 <= low && low < pooled.value && pooled.value < high && high <= 3.0f64.exp() + 1e-9, "{pooled:?}");
        assert_eq!(resamples.mean(&[Some(1.0), None, Some(3.0)]).unwrap().value, 2.0);
        assert_eq!(resamples.mean(&[None; 3]), None);
        assert_eq!(resamples.figure(&[(1.0, 1.0); 3], |_| f64::NAN), None);
    }

    #[test]
    fn equal_values_have_no_spread_and_one_sample_has_no_choice() {
        let same = resamples(5).mean(&[Some(0.25); 5]).unwrap();
        assert_eq!((same.low, same.value, same.high), (Some(0.25), 0.25, Some(0.25)));
        let one = resamples(1).mean(&[Some(7.0)]).unwrap();
        assert_eq!((one.low, one.value, one.high), (Some(7.0), 7.0, Some(7.0)));
    }

    /// Skewed values (squares of uniforms, mean 1/3): of 300 sets of 40, the share whose interval
    /// holds the mean is near 95 %. The percentile interval of a mean of 40 is a little short, so
    /// the bounds are those of 93 % plus and minus 4 standard errors.
    #[test]
    fn intervals_cover_what_they_should() {
        let resamples = resamples(40);
        let mut random = fastrand::Rng::with_seed(1);
        let covered = (0..300)
            .filter(|_| {
                let values: Vec<Option<f64>> = (0..40).map(|_| random.f64()).map(|u| Some(u * u)).collect();
                let figure = resamples.mean(&values).unwrap();
                figure.low.unwrap() <= 1.0 / 3.0 && 1.0 / 3.0 <= figure.high.unwrap()
            })
            .count() as f64;
        let error = (0.93f64 * 0.07 / 300.0).sqrt();
        assert!((covered / 300.0 - 0.93).abs() < 4.0 * error, "{covered} of 300");
    }

    /// Within a resample every sample is drawn equally often on average: 5 sigma of a binomial
    /// count.
    #[test]
    fn draws_are_even() {
        let resamples = resamples(7);
        let mut counts = [0f64; 7];
        resamples.index.iter().for_each(|i| counts[*i as usize] += 1.0);
        let (n, p) = ((NUM_RESAMPLES * 7) as f64, 1.0 / 7.0);
        for count in counts {
            assert!((count - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt(), "{counts:?}");
        }
    }
}
