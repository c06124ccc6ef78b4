//! Sixteen lanes as an array: correct on any machine, and as fast as the compiler makes it.
#![forbid(unsafe_code)]

use crate::cpu::simd::vector::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub struct Portable;

type F = [f32; LANES];

impl Portable {
    #[inline(always)]
    fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
        std::array::from_fn(|i| f(a[i], b[i]))
    }
}

impl Simd for Portable {
    type F = F;
    type W = [u32; LANES];
    const WIDE: bool = false;
    const MULTIPLIES_PAIRS: bool = false;
    const BF16_ROWS: usize = 5;

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        *x
    }
    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // Not `mul_add`: without the instruction that is a call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn round(self, x: F) -> F {
        // Adding 1.5 * 2^23 leaves no fraction bits; the default rounding mode is ties to even.
        const MAGIC: f32 = 12_582_912.0;
        x.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn scale(self, x: F, n: F) -> F {
        Self::zip(x, n, |x, n| x * f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn select_gt(self, a: F, b: F, x: F, y: F) -> F {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn mask_ge(self, a: F, b: F) -> u32 {
        (0..LANES).fold(0, |mask, i| mask | u32::from(a[i] >= b[i]) << i)
    }
    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        let mut x = x;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }
    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn store_bf16(self, x: F, to: &mut [u16; LANES]) {
        *to = x.map(|x| half::bf16::from_f32(x).to_bits());
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> F {
        x.map(|x| f32::from_bits(u32::from(x) << 16))
    }

    #[inline(always)]
    fn word(self, x: u32) -> [u32; LANES] {
        [x; LANES]
    }
    #[inline(always)]
    fn words(self, x: &[u32; LANES]) -> [u32; LANES] {
        *x
    }
    #[inline(always)]
    fn step_f32(self, acc: F, a: [u32; LANES], b: [u32; LANES]) -> F {
        std::array::from_fn(|i| f32::from_bits(a[i]) * f32::from_bits(b[i]) + acc[i])
    }
    #[inline(always)]
    fn step_bf16(self, acc: F, a: [u32; LANES], b: [u32; LANES]) -> F {
        let acc = self.fma(self.low_halves(a), self.low_halves(b), acc);
        self.fma(self.high_halves(a), self.high_halves(b), acc)
    }
    #[inline(always)]
    fn low_halves(self, pairs: [u32; LANES]) -> F {
        pairs.map(|pair| f32::from_bits(pair << 16))
    }
    #[inline(always)]
    fn high_halves(self, pairs: [u32; LANES]) -> F {
        pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))
    }
    #[inline(always)]
    fn prefetch(self, _address: usize) {}
}
