//! Arithmetic of the tensor cores: how one `mma.m16n8k16` on bf16 operands rounds, by architecture.
//!
//! The instruction adds several products and the accumulator at once. Each of these terms is
//! aligned to the largest exponent among them and cut, toward zero, a fixed number of bits below
//! it; their sum is exact, and is cut toward zero once more when it becomes an f32. So a sum
//! differs in its last bits from one that rounds after every addition, and it differs between
//! generations:
//!
//! | architecture | products in a sum | fraction bits |
//! |---|---|---|
//! | sm_80, sm_86, sm_89 | 8, then 8 more on top of the result | 24 |
//! | sm_90 and later | 16 | 25 |
//!
//! Found on hardware by others: Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores
//! and Matrix Cores", arXiv 2511.10909 (random tests, bit for bit, on A100, H100, B200 and others),
//! and Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv 2512.07004.
//! `emulate_mma_work` in `runtime/emulate.cpp` computes the same in f64 and vectors; the tests
//! compare both.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Products of one instruction for an element: K of `m16n8k16`.
pub const MMA_K: usize = 16;

/// A generation of tensor cores, by how it adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorCore {
    /// sm_80 to sm_89.
    Ampere,
    /// sm_90 to sm_120.
    Hopper,
}

impl TensorCore {
    /// The generation of an architecture such as `sm_90a`.
    ///
    /// Errors: [`Error::Architecture`] for a name that is no architecture from sm_80 on.
    pub fn for_arch(arch: &str) -> Result<TensorCore> {
        let digits = arch.strip_prefix("sm_").map(|rest| rest.strip_suffix(['a', 'f']).unwrap_or(rest));
        match digits.and_then(|digits| digits.parse::<u32>().ok()) {
            Some(80..90) => Ok(TensorCore::Ampere),
            Some(90..) => Ok(TensorCore::Hopper),
            _ => Err(Error::Architecture { arch: arch.to_owned() }),
        }
    }

    /// Products that enter one sum together.
    pub fn products_in_a_sum(self) -> usize {
        match self {
            TensorCore::Ampere => 8,
            TensorCore::Hopper => 16,
        }
    }

    /// Bits that a term keeps below the largest exponent of its sum.
    pub fn fraction_bits(self) -> i32 {
        match self {
            TensorCore::Ampere => 24,
            TensorCore::Hopper => 25,
        }
    }

    /// What `mma.m16n8k16` makes of the element `sum` with row `a` of the first operand and column
    /// `b` of the second: at most [`MMA_K`] numbers each that bf16 holds; those that are missing
    /// are zeros.
    pub fn mma(self, sum: f32, a: &[f32], b: &[f32]) -> f32 {
        assert!(a.len() == b.len() && a.len() <= MMA_K, "{} and {} operands of an mma", a.len(), b.len());
        let parts = a.chunks(self.products_in_a_sum()).zip(b.chunks(self.products_in_a_sum()));
        parts.fold(sum, |sum, (a, b)| fused_sum(sum, a, b, self.fraction_bits()))
    }

    /// The sum of products that `gemm.cuh` specifies for bf16: segments of 256 from zero, 16
    /// products at a time, and the sums of the segments added in order. `x` and `w` are equally
    /// long and hold bf16 numbers.
    pub fn dot(self, x: &[f32], w: &[f32]) -> f32 {
        let segment = |x: &[f32], w: &[f32]| x.chunks(MMA_K).zip(w.chunks(MMA_K)).fold(0.0, |sum, (x, w)| self.mma(sum, x, w));
        x.chunks(256).zip(w.chunks(256)).fold(0.0, |total, (x, w)| total + segment(x, w))
    }

    /// A bound on how far one segment of [`TensorCore::dot`] is from the exact sum, as a multiple
    /// of the largest magnitude that any product or partial sum of it has. A term is cut by less
    /// than 2^-fraction_bits of a power of two that is at most that magnitude, and a result by less
    /// than an f32 epsilon of itself.
    pub fn segment_error(self) -> f64 {
        let terms = (self.products_in_a_sum() + 1) as f64;
        let cuts = terms * f64::from(-self.fraction_bits()).exp2() + f64::from(f32::EPSILON);
        (256 / self.products_in_a_sum()) as f64 * cuts
    }
}

/// A finite number as `significand * 2^(exponent - 23)`. The exponent is that of the format, so
/// subnormal numbers have -126; zero has none.
fn significand_and_exponent(value: f32) -> Option<(i64, i32)> {
    let bits = value.to_bits();
    let (exponent, fraction) = ((bits >> 23 & 0xff) as i32, i64::from(bits & 0x7f_ffff));
    let significand = if exponent == 0 { fraction } else { fraction | 1 << 23 };
    (significand != 0).then_some((if value < 0.0 { -significand } else { significand }, exponent.max(1) - 127))
}

fn fused_sum(sum: f32, a: &[f32], b: &[f32], fraction_bits: i32) -> f32 {
    // A product of bf16 numbers is exact in f64, and only infinities and NaN make these sums
    // anything but finite.
    let plain = a.iter().zip(b).fold(f64::from(sum), |total, (a, b)| total + f64::from(*a) * f64::from(*b));
    if plain.is_nan() {
        return f32::from_bits(0x7fff_ffff);
    }
    if plain.is_infinite() {
        return plain as f32;
    }
    // Terms as (significand, exponent, fraction bits of the significand). A product's exponent is
    // the sum of its factors' exponents, whether or not its significand is 2 or more.
    let product = |(a, b): (&f32, &f32)| {
        let ((a, a_exponent), (b, b_exponent)) = (significand_and_exponent(*a)?, significand_and_exponent(*b)?);
        Some((a * b, a_exponent + b_exponent, 46))
    };
    let accumulator = significand_and_exponent(sum).map(|(significand, exponent)| (significand, exponent, 23));
    let terms: Vec<(i64, i32, i32)> = a.iter().zip(b).filter_map(product).chain(accumulator).collect();
    let Some(largest) = terms.iter().map(|(_, exponent, _)| *exponent).max() else { return 0.0 };
    // In units of 2^(largest - fraction_bits).
    let cut = |&(significand, exponent, bits): &(i64, i32, i32)| {
        let shift = fraction_bits - bits + exponent - largest;
        let magnitude = significand.abs();
        let units = if shift >= 0 { magnitude << shift } else { magnitude.checked_shr(shift.unsigned_abs()).unwrap_or(0) };
        units * significand.signum()
    };
    toward_zero(terms.iter().map(cut).sum(), largest - fraction_bits)
}

/// `units * 2^exponent`, cut to the f32 next toward zero; infinite from 2^128 on. A sum of zero is
/// +0.
fn toward_zero(units: i64, exponent: i32) -> f32 {
    let magnitude = units.unsigned_abs();
    if magnitude == 0 {
        return 0.0;
    }
    let top = 63 - magnitude.leading_zeros() as i32 + exponent;
    if top >= 128 {
        return if units < 0 { f32::NEG_INFINITY } else { f32::INFINITY };
    }
    // The exponent of the last bit that the result has.
    let last = top.max(-126) - 23;
    let shift = exponent - last;
    let kept = if shift >= 0 { magnitude << shift } else { magnitude.checked_shr(shift.unsigned_abs()).unwrap_or(0) };
    // Exact: 24 bits, and 2^last is an f64.
    let value = kept as f64 * f64::from(last).exp2();
    (if units < 0 { -value } else { value }) as f32
}

#[cfg(test)]
mod tests {
    use super::TensorCore::{Ampere, Hopper};
    use super::*;

    #[test]
    fn generations_by_name() {
        for (arch, core) in
            [("sm_80", Ampere), ("sm_86", Ampere), ("sm_89", Ampere), ("sm_90a", Hopper), ("sm_100", Hopper), ("sm_120", Hopper)]
        {
            assert_eq!(TensorCore::for_arch(arch).unwrap(), core, "{arch}");
        }
        for arch in ["sm_75", "host", "sm_", "90"] {
            assert!(TensorCore::for_arch(arch).unwrap_err().to_string().contains("expected sm_80 or later"), "{arch}");
        }
    }

    /// A segment is off by less than its bound, on random operands of many sizes.
    #[test]
    fn a_segment_errs_within_its_bound() {
        let mut state = 1u32;
        let mut next = |spread: i32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let scale = ((state >> 8) as i32 % (2 * spread + 1) - spread) as f32;
            half::bf16::from_f32(((state >> 16) as f32 / 32768.0 - 1.0) * scale.exp2()).to_f32()
        };
        for core in [Ampere, Hopper] {
            for spread in [0, 3, 12] {
                let (x, w): (Vec<f32>, Vec<f32>) = (0..256).map(|_| (next(spread), next(spread))).unzip();
                let (mut exact, mut largest) = (0.0f64, 0.0f64);
                for (x, w) in x.iter().zip(&w) {
                    let product = f64::from(*x) * f64::from(*w);
                    exact += product;
                    largest = largest.max(product.abs()).max(exact.abs());
                }
                let error = (f64::from(core.dot(&x, &w)) - exact).abs();
                assert!(error > 0.0 && error <= core.segment_error() * largest, "{core:?}, {spread}: {error:e} of {largest:e}");
            }
        }
    }
}
