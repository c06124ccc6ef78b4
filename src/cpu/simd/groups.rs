//! Products of weights in groups of 32 ([`crate::backend::groups`]) with activations in groups of
//! 32: the layout of both, and the definition that every instruction set follows to the bit.
//!
//! Activations of a group become int8 codes under a scale of their own, so a group's products are
//! integers and their sum is exact in any order. What is rounded is the same everywhere: one
//! multiplication and one addition for a group and output, in the order of the groups, never fused.
//! ```text
//! q8   sum += (Σ weight code * x code) * (weight scale * x scale)
//! q4   sum += (Σ weight code * x code) * (weight scale * x scale);  sum += min * (x scale * Σ x code)
//! ```
//! A block is the group of each of 32 columns (rows of the weight), so that one vector lane serves
//! one column:
//! ```text
//! q8   scales (32) f16 | step s of 8: for each column four codes, k = 4 s ..
//! q4   scales (32) f16 | mins (32) f16 | step s of 4: for each column four bytes, whose low
//!      halves are the codes of k = 8 s .. and whose high halves those of k = 8 s + 4 ..
//! ```
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::backend::groups::{GROUP, Group4, Group8, nearest};

/// Columns of a block.
pub const COLUMNS: usize = 32;
/// Words of a block in q8: 1088 bytes.
pub const Q8_WORDS: usize = COLUMNS / 2 + COLUMNS * GROUP / 4;
/// Words of a block in q4: 640 bytes.
pub const Q4_WORDS: usize = COLUMNS + COLUMNS * GROUP / 8;

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

/// Puts the group of a column into a block.
#[inline(always)]
pub fn put_q8(block: &mut [u32; Q8_WORDS], column: usize, group: &Group8) {
    put_half(block, column, group.scale);
    for (step, codes) in group.codes.chunks_exact(4).enumerate() {
        block[COLUMNS / 2 + step * COLUMNS + column] = u32::from_le_bytes([codes[0] as u8, codes[1] as u8, codes[2] as u8, codes[3] as u8]);
    }
}

/// Puts the group of a column into a block.
#[inline(always)]
pub fn put_q4(block: &mut [u32; Q4_WORDS], column: usize, group: &Group4) {
    put_half(block, column, group.scale);
    put_half(&mut block[COLUMNS / 2..], column, group.min);
    for (step, codes) in group.codes.chunks_exact(8).enumerate() {
        let byte = |i: usize| codes[i] | codes[i + 4] << 4;
        block[COLUMNS + step * COLUMNS + column] = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
    }
}

/// The group of a column of a block.
pub fn get_q8(block: &[u32; Q8_WORDS], column: usize) -> Group8 {
    let codes = std::array::from_fn(|k| (block[COLUMNS / 2 + k / 4 * COLUMNS + column] >> (8 * (k % 4))) as u8 as i8);
    Group8 { scale: get_half(block, column), codes }
}

/// The group of a column of a block.
pub fn get_q4(block: &[u32; Q4_WORDS], column: usize) -> Group4 {
    let code = |k: usize| (block[COLUMNS + k / 8 * COLUMNS + column] >> (8 * (k % 4) + k % 8 / 4 * 4)) as u8 & 15;
    Group4 { scale: get_half(block, column), min: get_half(&block[COLUMNS / 2..], column), codes: std::array::from_fn(code) }
}

#[inline(always)]
fn put_half(words: &mut [u32], at: usize, value: f16) {
    let shift = 16 * (at % 2);
    words[at / 2] = words[at / 2] & !(0xffff << shift) | u32::from(value.to_bits()) << shift;
}

fn get_half(words: &[u32], at: usize) -> f16 {
    f16::from_bits((words[at / 2] >> (16 * (at % 2))) as u16)
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
            let scale = get_half(block, column).to_f32() * x.scale;
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
            let (scale, min) = (get_half(block, column).to_f32() * x.scale, get_half(&block[COLUMNS / 2..], column).to_f32());
            *sum += product as f32 * scale;
            *sum += min * x.scaled_sum;
        }
    }
}
