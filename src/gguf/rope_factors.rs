//! The tensor `rope_freqs.weight`: for each pair of a head, by what its frequency is divided.
//!
//! llama.cpp's converter computes it from the `rope_scaling` of Llama 3.1 and later and leaves the
//! numbers of that out; here they are found again, so that frequencies are computed as those of a
//! directory are. Published models all have `low_freq_factor` 1 and `high_freq_factor` 4.
#![forbid(unsafe_code)]

use serde_json::{Value, json};

/// What the tensor is called.
pub const TENSOR: &str = "rope_freqs.weight";

const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
/// Relative difference of a factor at most: the converter computes in f32.
const TOLERANCE: f64 = 1e-4;

/// `rope_scaling` of a config.json that gives these factors, null where all are 1.
///
/// Errors: factors that no such scaling gives.
pub fn scaling(factors: &[f32], base: f64) -> Result<Value, String> {
    if factors.iter().all(|factor| *factor == 1.0) {
        return Ok(Value::Null);
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let original = original_len(factors, base, factor).filter(|len| {
        let expected = |i: usize| expected(wavelength(i, factors.len(), base), factor, *len);
        factors.iter().enumerate().all(|(i, found)| (f64::from(*found) / expected(i) - 1.0).abs() < TOLERANCE)
    });
    let Some(original) = original else {
        return Err(format!("factors up to {factor} are not those of the scaling of Llama 3.1, the only one that is supported"));
    };
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": original,
    }))
}

/// Positions of a whole turn of a pair.
fn wavelength(pair: usize, pairs: usize, base: f64) -> f64 {
    std::f64::consts::TAU * base.powf(pair as f64 / pairs as f64)
}

/// What the scaling divides a frequency by.
fn expected(wavelength: f64, factor: f64, original: f64) -> f64 {
    let kept = ((original / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
    1.0 / ((1.0 - kept) / factor + kept)
}

/// The length of the first training: each mixed frequency gives it; where there is none, all
/// lengths between the kept and the divided frequencies are the same.
fn original_len(factors: &[f32], base: f64, factor: f64) -> Option<f64> {
    let (mut sum, mut count, mut low, mut high) = (0.0, 0.0, 0.0f64, f64::INFINITY);
    for (i, found) in factors.iter().enumerate() {
        let (found, wavelength) = (f64::from(*found), wavelength(i, factors.len(), base));
        if found == 1.0 {
            low = low.max(HIGH * wavelength);
        } else if found == factor {
            high = high.min(LOW * wavelength);
        } else {
            let kept = (1.0 / found - 1.0 / factor) / (1.0 - 1.0 / factor);
            sum += wavelength * (LOW + (HIGH - LOW) * kept);
            count += 1.0;
        }
    }
    let len = if count > 0.0 { sum / count } else { (low + high.min(2.0 * low)) / 2.0 };
    Some(len.round()).filter(|len| len.is_finite() && (1.0..1e9).contains(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(pairs: usize, base: f64, factor: f64, original: f64) -> Vec<f32> {
        (0..pairs).map(|i| expected(wavelength(i, pairs, base), factor, original) as f32).collect()
    }

    #[test]
    fn published_scalings_are_found() {
        for (pairs, base, factor, original) in [(64, 500_000.0, 8.0, 8192.0), (32, 500_000.0, 32.0, 8192.0), (8, 10_000.0, 8.0, 40.0)] {
            let found = scaling(&factors(pairs, base, factor, original), base).unwrap();
            assert_eq!(found["original_max_position_embeddings"], original);
            assert_eq!(found["factor"], factor);
        }
        assert_eq!(scaling(&[1.0; 8], 10_000.0), Ok(Value::Null));
    }

    #[test]
    fn other_factors_are_refused() {
        let mut other = factors(64, 500_000.0, 8.0, 8192.0);
        other[40] *= 1.01;
        for factors in [other, vec![1.0, 2.0, 3.0, 4.0], vec![f32::NAN; 4], vec![0.0; 4], vec![f32::INFINITY; 4]] {
            assert!(scaling(&factors, 500_000.0).is_err(), "{factors:?}");
        }
    }
}
