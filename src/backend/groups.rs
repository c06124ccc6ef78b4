//! Weights in groups of 32 along k: what a group holds, and how values become one.
//!
//! | format | a value | bits each |
//! |---|---|---|
//! | q8 | `scale * code`, code in -127..=127 | 8.5 |
//! | q4 | `scale * code + min`, code in 0..=15 | 5 |
//!
//! Scale and min are f16. A group belongs to one row of the weight; the last one of a row is
//! shorter where k is no multiple of 32. Both are what GGUF calls Q8_0 and Q4_1, whose groups are
//! kept as they are.
#![forbid(unsafe_code)]

use half::f16;

use crate::error::{Error, Result};

/// Values of a group.
pub const GROUP: usize = 32;

/// Values as `scale * code`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group8 {
    pub scale: f16,
    pub codes: [i8; GROUP],
}

/// Values as `scale * code + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group4 {
    pub scale: f16,
    pub min: f16,
    /// Each below 16.
    pub codes: [u8; GROUP],
}

impl Group8 {
    /// Zeros.
    pub const ZERO: Group8 = Group8 { scale: f16::ZERO, codes: [0; GROUP] };

    /// The nearest codes under the scale that gives the largest magnitude 127.
    ///
    /// Errors: a magnitude beyond what the scale can hold, 8.3 million.
    #[inline(always)]
    pub fn of(values: &[f32; GROUP]) -> Result<Group8> {
        let [low, high] = range(values);
        let largest = low.abs().max(high.abs());
        let scale = f16::from_f32(largest / 127.0);
        if !scale.is_finite() {
            return Err(too_large(largest));
        }
        let step = scale.to_f32();
        let mut codes = [0; GROUP];
        if step > 0.0 {
            for (code, value) in codes.iter_mut().zip(values) {
                *code = nearest(value / step, -127.0, 127.0) as u8 as i8;
            }
        }
        Ok(Group8 { scale, codes })
    }

    /// The values that it stands for.
    #[inline(always)]
    pub fn values(&self) -> [f32; GROUP] {
        let scale = self.scale.to_f32();
        self.codes.map(|code| scale * f32::from(code))
    }
}

impl Group4 {
    /// Zeros.
    pub const ZERO: Group4 = Group4 { scale: f16::ZERO, min: f16::ZERO, codes: [0; GROUP] };

    /// Of some ranges, the one whose codes give the smallest sum of squared errors: the range of
    /// all values, and narrower ones that sacrifice the outermost. Scale and min of a range are the
    /// least squares fit to its codes. Over the weights of the two models that ship that takes 12
    /// and 15 % off the squared error of the full range alone.
    ///
    /// Errors: a magnitude beyond what f16 can hold.
    #[inline(always)]
    pub fn of(values: &[f32; GROUP]) -> Result<Group4> {
        let [low, high] = range(values);
        let largest = low.abs().max(high.abs());
        if !f16::from_f32(largest).is_finite() {
            return Err(too_large(largest));
        }
        let mut best = Group4 { scale: f16::from_f32((high - low) / 15.0), min: f16::from_f32(low), codes: [0; GROUP] };
        let mut least = best.encode(values);
        for narrowing in NARROWINGS {
            let width = (high - low) * (1.0 - narrowing);
            let mut group = Group4 { scale: f16::from_f32(width / 15.0), min: f16::from_f32(low + (high - low) * narrowing / 2.0), ..best };
            group.encode(values);
            group.fit(values);
            let error = group.encode(values);
            if error < least {
                (best, least) = (group, error);
            }
        }
        Ok(best)
    }

    /// Takes the nearest codes, and returns the sum of squared errors.
    #[inline(always)]
    fn encode(&mut self, values: &[f32; GROUP]) -> f32 {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        let per_step = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut errors = [0.0; GROUP];
        for ((code, value), error) in self.codes.iter_mut().zip(values).zip(&mut errors) {
            *code = nearest((value - min) * per_step, 0.0, 15.0) as u8;
            let difference = scale * f32::from(*code) + min - value;
            *error = difference * difference;
        }
        sum(&errors)
    }

    /// Scale and min by least squares over the codes.
    #[inline(always)]
    fn fit(&mut self, values: &[f32; GROUP]) {
        let (mut code_sum, mut square_sum, mut products) = (0, 0, [0.0; GROUP]);
        for ((code, value), product) in self.codes.iter().zip(values).zip(&mut products) {
            let code = i32::from(*code);
            (code_sum, square_sum) = (code_sum + code, square_sum + code * code);
            *product = code as f32 * value;
        }
        let (value_sum, product_sum) = (sum(values), sum(&products));
        let (n, code_sum, square_sum) = (GROUP as f32, code_sum as f32, square_sum as f32);
        let determinant = n * square_sum - code_sum * code_sum;
        // All codes are equal.
        if determinant <= 0.0 {
            return;
        }
        let scale = (n * product_sum - code_sum * value_sum) / determinant;
        self.scale = f16::from_f32(scale);
        self.min = f16::from_f32((value_sum - self.scale.to_f32() * code_sum) / n);
    }

    /// The values that it stands for.
    #[inline(always)]
    pub fn values(&self) -> [f32; GROUP] {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        self.codes.map(|code| scale * f32::from(code) + min)
    }
}

/// The sum, eight by eight, so that it runs on vectors.
#[inline(always)]
fn sum(values: &[f32; GROUP]) -> f32 {
    let mut lanes = [0.0; 8];
    for part in values.as_chunks::<8>().0 {
        for (lane, value) in lanes.iter_mut().zip(part) {
            *lane += value;
        }
    }
    lanes.iter().sum()
}

/// The least and the largest value, likewise.
#[inline(always)]
fn range(values: &[f32; GROUP]) -> [f32; 2] {
    let (mut low, mut high) = ([values[0]; 8], [values[0]; 8]);
    for part in values.as_chunks::<8>().0 {
        for ((low, high), value) in low.iter_mut().zip(&mut high).zip(part) {
            (*low, *high) = (low.min(*value), high.max(*value));
        }
    }
    [low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max)]
}

/// Shares of the range that [`Group4::of`] gives up, half on each side.
const NARROWINGS: [f32; 5] = [0.0, 0.06, 0.12, 0.18, 0.25];

/// The bits of a number whose low byte is the integer nearest to `x`, ties to even, clamped to
/// `low..=high`, which lie within -128..=127: 1.5 * 2^23 leaves no bits for a fraction. Unlike a
/// conversion it is two instructions on vectors.
#[inline(always)]
pub fn nearest(x: f32, low: f32, high: f32) -> u32 {
    (x.max(low).min(high) + 12_582_912.0).to_bits()
}

fn too_large(largest: f32) -> Error {
    Error::request(format!("a weight of magnitude {largest} does not fit a group of 8 or 4 bits, whose scale is f16"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> [f32; GROUP] {
        std::array::from_fn(|i| {
            let hash =
                |key: u64| (seed * 1000 + key + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let uniform = |key: u64| (hash(key) >> 40) as f32 / (1u64 << 24) as f32;
            (0..6).map(|j| uniform(i as u64 * 7 + j) - 0.5).sum::<f32>() * 0.05
        })
    }

    #[test]
    fn q8_errs_by_half_a_step_at_most() {
        for seed in 0..200 {
            let values = noise(seed);
            let group = Group8::of(&values).unwrap();
            let step = group.scale.to_f32();
            // The scale is rounded: the largest may fall off the end by its relative error.
            for (value, kept) in values.iter().zip(group.values()) {
                assert!((value - kept).abs() <= step * (0.5 + 127.0 / 2048.0), "{value} as {kept}, step {step}");
            }
        }
    }

    /// Never worse than the whole range, and on the whole better.
    #[test]
    fn q4_takes_the_range_with_the_least_error() {
        let (mut taken, mut whole) = (0.0, 0.0);
        for seed in 0..200 {
            let values = noise(seed);
            let error = |group: &Group4| group.values().iter().zip(values).map(|(kept, value)| (kept - value).powi(2)).sum::<f32>();
            let best = Group4::of(&values).unwrap();
            let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
            let mut plain = Group4 { scale: f16::from_f32((high - low) / 15.0), min: f16::from_f32(low), codes: [0; GROUP] };
            plain.encode(&values);
            assert!(error(&best) <= error(&plain) * 1.000_01, "{} against {}", error(&best), error(&plain));
            assert!(best.codes.iter().all(|code| *code < 16));
            (taken, whole) = (taken + error(&best), whole + error(&plain));
        }
        assert!(taken < 0.9 * whole, "{taken} against {whole}");
    }

    #[test]
    fn zeros_equal_values_and_sizes_at_the_ends() {
        for value in [0.0, 1.0, -3.5, 1e-7, -1e-9, 60000.0] {
            let group = Group4::of(&[value; GROUP]).unwrap();
            assert!(group.values().iter().all(|kept| *kept == f16::from_f32(value).to_f32()), "{value}: {group:?}");
        }
        assert_eq!(Group8::of(&[0.0; GROUP]).unwrap().values(), [0.0; GROUP]);
        assert!(Group4::of(&[1e6; GROUP]).is_err() && Group8::of(&[1e7; GROUP]).is_err());
    }

    #[test]
    fn nearest_rounds_ties_to_even() {
        for (x, expected) in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.4, 126), (300.0, 127), (-300.0, -127)] {
            assert_eq!(nearest(x, -127.0, 127.0) as u8 as i8, expected, "{x}");
        }
    }
}
