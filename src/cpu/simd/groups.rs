//! Products of weights in groups of 32, in blocks ([`crate::backend::group_blocks`]), with
//! activations in groups of 32: the layout of these, and the definition that every instruction set
//! follows to the bit.
//!
//! Activations of a group become int8 codes under a scale of their own, so a group's products are
//! integers and their sum is exact in any order. What is rounded is the same everywhere: one
//! multiplication and one addition for a group and output, in the order of the groups, never fused.
//! ```text
//! q8   sum += (Σ weight code * x code) * (weight scale * x scale)
//! q4   sum += (Σ weight code * x code) * (weight scale * x scale);  sum += min * (x scale * Σ x code)
//! ```
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

use crate::backend::group_blocks::half_at;
pub use crate::backend::group_blocks::{COLUMNS, Q4_WORDS, Q8_WORDS};
use crate::backend::groups::{GROUP, nearest};

/// 32 activations of a row, or fewer and zeros.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ActivationGroup {
    /// Four codes in -127..=127 a word, the lowest k in the lowest byte.
    pub codes: [u32; GROUP / 4],
    pub scale: f32,
    /// `scale * Σ codes`
    pub scaled_sum: f32,
    /// `-128 * Σ codes`: what codes of a weight that are 128 too large add.
    pub offset: i32,
    pub unused: u32,
}

/// Below this largest magnitude a group is zeros: 127 over it would overflow.
const SMALLEST: f32 = 1.0 / (1u128 << 100) as f32;

impl ActivationGroup {
    /// The nearest codes under the scale that gives the largest magnitude 127. With a NaN or an
    /// infinity among the values the scale is one, and so is every sum.
    #[inline(always)]
    pub fn of(x: &[f32; GROUP]) -> ActivationGroup {
        let largest = x.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
        let largest = f32::from_bits(largest);
        if largest < SMALLEST {
            return ActivationGroup::default();
        }
        let (scale, inverse) = (largest / 127.0, 127.0 / largest);
        let codes = x.map(|x| nearest(x * inverse, -127.0, 127.0) as u8);
        let sum: i32 = codes.iter().map(|code| i32::from(*code as i8)).sum();
        ActivationGroup {
            codes: std::array::from_fn(|i| u32::from_le_bytes([codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]])),
            scale,
            scaled_sum: scale * sum as f32,
            offset: -128 * sum,
            unused: 0,
        }
    }

    /// The code of k.
    #[inline(always)]
    pub fn code(&self, k: usize) -> i32 {
        i32::from((self.codes[k / 4] >> (8 * (k % 4))) as u8 as i8)
    }
}

/// The definition, over a block of q8 and the same group of several rows.
pub fn add_q8(block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    for (x, sums) in x.iter().zip(sums) {
        let mut products = [0; COLUMNS];
        for (step, words) in block[COLUMNS / 2..].chunks_exact(COLUMNS).enumerate() {
            for (product, word) in products.iter_mut().zip(words) {
                for (i, code) in word.to_le_bytes().into_iter().enumerate() {
                    *product += i32::from(code as i8) * x.code(4 * step + i);
                }
            }
        }
        for (column, (sum, product)) in sums.iter_mut().zip(products).enumerate() {
            let scale = half_at(block, column).to_f32() * x.scale;
            *sum += product as f32 * scale;
        }
    }
}

/// The definition, over a block of q4 and the same group of several rows.
pub fn add_q4(block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    for (x, sums) in x.iter().zip(sums) {
        let mut products = [0; COLUMNS];
        for (step, words) in block[COLUMNS..].chunks_exact(COLUMNS).enumerate() {
            for (product, word) in products.iter_mut().zip(words) {
                for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
                    *product += i32::from(byte & 15) * x.code(8 * step + i);
                    *product += i32::from(byte >> 4) * x.code(8 * step + 4 + i);
                }
            }
        }
        for (column, (sum, product)) in sums.iter_mut().zip(products).enumerate() {
            let (scale, min) = (half_at(block, column).to_f32() * x.scale, half_at(&block[COLUMNS / 2..], column).to_f32());
            *sum += product as f32 * scale;
            *sum += min * x.scaled_sum;
        }
    }
}
