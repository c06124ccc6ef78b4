//! Sixteen f32 lanes as a value: the operations that an instruction set gives, and code over them.
#![forbid(unsafe_code)]

use crate::cpu::simd::groups::{self, ActivationGroup, COLUMNS, Q4_WORDS, Q8_WORDS};

/// Lanes of one vector value.
pub const LANES: usize = 16;

/// Code written once for every instruction set. `run` must be `#[inline(always)]`, and so must
/// every generic function it calls and that touches vectors: only what is inlined below
/// [`crate::cpu::simd::Isa::run`] is compiled with the features.
pub trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Sixteen f32 lanes and the operations the kernels need. A word is 32 bits of a weight stream: one
/// f32 or a pair of bf16, the lower half first.
pub trait Simd: Copy {
    /// 16 x f32.
    type F: Copy;
    /// 16 x 32-bit words.
    type W: Copy;
    /// Whether the register file holds 24 accumulators beside the operands; else six, of two
    /// registers each.
    const WIDE: bool;
    /// Columns of a panel of a packed weight: those of the register tile, so that its steps read
    /// one contiguous stream. In panels of four tiles, each tile of AVX2 read every fourth line, at
    /// half the speed from memory.
    const PANEL: usize = if Self::WIDE { 4 * LANES } else { LANES };
    /// Whether one instruction multiplies bf16 pairs. Elsewhere both halves are widened, and the x
    /// of a product is given as the two f32 that its rounded pair stands for: as pairs, each row
    /// would be widened again for every panel, and the tile would have registers for four rows.
    const MULTIPLIES_PAIRS: bool;
    /// Rows of a register tile on bf16 pairs: six, or fewer where the halves of the columns would
    /// not find registers beside the sums.
    const BF16_ROWS: usize;

    /// Words of x in a step of a product.
    #[inline(always)]
    fn x_words(bf16: bool) -> usize {
        if bf16 && !Self::MULTIPLIES_PAIRS { 2 } else { 1 }
    }

    /// Runs `kernel` as a function of its own, compiled for this set.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, fused where the set has it.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: a NaN in either place gives `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Nearest integer, ties to even; |x| < 2^22.
    fn round(self, x: Self::F) -> Self::F;
    /// `x 2^n` for integral n in [-126, 127].
    fn scale(self, x: Self::F, n: Self::F) -> Self::F;
    /// Lane-wise `if a > b { x } else { y }`.
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Bit i is set iff lane i has `a >= b`.
    fn mask_ge(self, a: Self::F, b: Self::F) -> u32;
    /// Sum of the lanes, in an order fixed by the set.
    fn sum(self, x: Self::F) -> f32;
    /// Largest lane; a NaN may or may not win.
    fn max_lane(self, x: Self::F) -> f32;
    /// Rounds to bf16, nearest even.
    fn store_bf16(self, x: Self::F, to: &mut [u16; LANES]);
    /// Widens bf16.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F;

    fn word(self, x: u32) -> Self::W;
    fn words(self, x: &[u32; LANES]) -> Self::W;
    /// `acc + a b` on f32 words.
    fn step_f32(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F;
    /// `acc + a.low b.low + a.high b.high` on bf16 pairs.
    fn step_bf16(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F;
    /// The lower halves of bf16 pairs as f32.
    fn low_halves(self, pairs: Self::W) -> Self::F;
    /// The upper halves of bf16 pairs as f32.
    fn high_halves(self, pairs: Self::W) -> Self::F;
    /// Asks for the line at `address` in L2; any address is allowed.
    fn prefetch(self, address: usize);

    /// See [`groups::add_q8`], whose bits every set gives.
    #[inline(always)]
    fn add_q8(self, block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        groups::add_q8(block, x, sums);
    }
    /// See [`groups::add_q4`], whose bits every set gives.
    #[inline(always)]
    fn add_q4(self, block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        groups::add_q4(block, x, sums);
    }

    /// e^x with a relative error of at most 2^-22; below -87.3 it is 0, NaN stays NaN, and above
    /// 88.3 the result is meaningless.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        // Cephes expf: x = n ln 2 + r with ln 2 in two parts, a polynomial on |r| <= 0.35, then the
        // scale by 2^n.
        let low = self.splat(-87.3);
        // With x second, a NaN passes through `max`.
        let clamped = self.max(low, x);
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), clamped);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let y = self.add(self.fma(p, self.mul(r, r), r), self.splat(1.0));
        self.select_gt(low, x, self.splat(0.0), self.scale(y, n))
    }

    /// `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`, as `v / (1 + e^(-2u))`: no cancellation on
    /// the negative side.
    #[inline(always)]
    fn gelu_tanh(self, v: Self::F) -> Self::F {
        // -2 sqrt(2/pi) and the same times 0.044715.
        let square = self.mul(v, v);
        let slope = self.fma(square, self.splat(-0.071_354_82), self.splat(-1.595_769));
        let u = self.mul(v, slope);
        // Below -87.3 `exp` is 0 and the quotient is v; above 88 it would overflow and the value is
        // below 1e-36.
        let quotient = self.div(v, self.add(self.splat(1.0), self.exp(u)));
        self.select_gt(u, self.splat(88.0), self.splat(-0.0), quotient)
    }

    /// `v / (1 + e^-v)`.
    #[inline(always)]
    fn silu(self, v: Self::F) -> Self::F {
        let minus = self.mul(v, self.splat(-1.0));
        let quotient = self.div(v, self.add(self.splat(1.0), self.exp(minus)));
        // As above: beyond this `exp` would overflow, and the value is below 1e-36.
        self.select_gt(minus, self.splat(88.0), self.splat(-0.0), quotient)
    }
}
