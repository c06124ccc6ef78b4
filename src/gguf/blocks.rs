//! Block types of GGUF tensors: their sizes, their values as f32, and their groups of 32 as stored.
//!
//! Values are computed as llama.cpp's plain loops compute them, every product and sum in f32 and in
//! that order (`ggml/src/ggml-quants.c`), so that a model has the same weights in both.
#![forbid(unsafe_code)]

use half::f16;

pub use crate::backend::groups::{GROUP, Group8};

/// Values of a block of the k-types, which have scales of scales.
const SUPER: usize = 256;

/// How blocks of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlockType {
    /// `d (q - 8)`: f16, 16 bytes of two codes.
    Q4_0,
    /// `d q + m`: two f16, 16 bytes of two codes.
    Q4_1,
    /// `d (q - 16)`: f16, the fifth bits, 16 bytes of two codes.
    Q5_0,
    /// `d q + m`: two f16, the fifth bits, 16 bytes of two codes.
    Q5_1,
    /// `d q`: f16, 32 signed bytes.
    Q8_0,
    /// Eight groups of `d s q - e m`: two f16, scales and minima of 6 bits, 128 bytes of two codes.
    Q4K,
    /// The same with a fifth bit of each code.
    Q5K,
    /// Sixteen groups of `d s (q - 32)`: low four bits, high two bits, signed scales, f16.
    Q6K,
}

/// How a tensor's blocks divide into groups of [`GROUP`] that kernels read as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// [`Group8`].
    Eight,
    /// [`Group4`].
    Four,
}

/// 32 values of 4 bits: value i is `scale * codes[i] + min`, codes from 0 to 15. Unlike in
/// [`crate::backend::groups::Group4`] scale and minimum may be products, which f16 rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group4 {
    pub scale: f32,
    pub min: f32,
    pub codes: [u8; GROUP],
}

impl Group4 {
    /// Zeros.
    pub const ZERO: Group4 = Group4 { scale: 0.0, min: 0.0, codes: [0; GROUP] };
}

impl BlockType {
    /// The name that llama.cpp prints.
    pub fn name(self) -> &'static str {
        match self {
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
        }
    }

    /// Values of a block.
    pub const fn num_values(self) -> usize {
        match self {
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0 => GROUP,
            BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => SUPER,
        }
    }

    /// Bytes of a block.
    pub const fn num_bytes(self) -> usize {
        match self {
            BlockType::Q4_0 => 2 + 16,
            BlockType::Q4_1 => 4 + 16,
            BlockType::Q5_0 => 2 + 4 + 16,
            BlockType::Q5_1 => 4 + 4 + 16,
            BlockType::Q8_0 => 2 + 32,
            BlockType::Q4K => 4 + 12 + 128,
            BlockType::Q5K => 4 + 12 + 32 + 128,
            BlockType::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// The groups that its blocks hold, where those have 32 values and codes of 4 or 8 bits.
    pub const fn groups(self) -> Option<Groups> {
        match self {
            BlockType::Q8_0 => Some(Groups::Eight),
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q4K => Some(Groups::Four),
            _ => None,
        }
    }

    /// Values of whole blocks: `dst` has [`BlockType::num_values`] of them for each block of
    /// `bytes`.
    pub fn decode(self, bytes: &[u8], dst: &mut [f32]) {
        assert_eq!(bytes.len() / self.num_bytes() * self.num_values(), dst.len(), "whole blocks of {}", self.name());
        match self {
            BlockType::Q4_0 => each(bytes, dst, |b: &[u8; 18], y: &mut [f32; GROUP]| {
                let d = half_at(b, 0);
                for (j, q) in nibbles(b, 2).into_iter().enumerate() {
                    y[j] = f32::from(q as i8 - 8) * d;
                }
            }),
            BlockType::Q4_1 => each(bytes, dst, |b: &[u8; 20], y: &mut [f32; GROUP]| {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                for (j, q) in nibbles(b, 4).into_iter().enumerate() {
                    y[j] = f32::from(q) * d + m;
                }
            }),
            BlockType::Q5_0 => each(bytes, dst, |b: &[u8; 22], y: &mut [f32; GROUP]| {
                let d = half_at(b, 0);
                for (j, q) in five_bits(b, 2).into_iter().enumerate() {
                    y[j] = f32::from(q as i8 - 16) * d;
                }
            }),
            BlockType::Q5_1 => each(bytes, dst, |b: &[u8; 24], y: &mut [f32; GROUP]| {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                for (j, q) in five_bits(b, 4).into_iter().enumerate() {
                    y[j] = f32::from(q) * d + m;
                }
            }),
            BlockType::Q8_0 => each(bytes, dst, |b: &[u8; 34], y: &mut [f32; GROUP]| {
                let d = half_at(b, 0);
                for (y, q) in y.iter_mut().zip(&b[2..]) {
                    *y = f32::from(*q as i8) * d;
                }
            }),
            BlockType::Q4K => each(bytes, dst, |b: &[u8; 144], y: &mut [f32; SUPER]| {
                for (group, y) in y.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                    let (scale, least) = scale_and_least(b, group);
                    let (codes, shift) = (&b[16 + group / 2 * 32..][..32], group % 2 * 4);
                    for (y, q) in y.iter_mut().zip(codes) {
                        *y = scale * f32::from(q >> shift & 15) - least;
                    }
                }
            }),
            BlockType::Q5K => each(bytes, dst, |b: &[u8; 176], y: &mut [f32; SUPER]| {
                for (group, y) in y.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                    let (scale, least) = scale_and_least(b, group);
                    let (codes, shift) = (&b[48 + group / 2 * 32..][..32], group % 2 * 4);
                    for ((y, q), high) in y.iter_mut().zip(codes).zip(&b[16..48]) {
                        *y = scale * f32::from((q >> shift & 15) + (high >> group & 1) * 16) - least;
                    }
                }
            }),
            BlockType::Q6K => each(bytes, dst, |b: &[u8; 210], y: &mut [f32; SUPER]| {
                let d = half_at(b, 208);
                // Rows of 32: four of each half share their low and high bits.
                for (row, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (part, row) = (row / 4, row % 4);
                    let (low, high) = (&b[part * 64 + row % 2 * 32..][..32], &b[128 + part * 32..][..32]);
                    let scales = &b[192 + part * 8 + row * 2..][..2];
                    for (j, y) in y.iter_mut().enumerate() {
                        let q = (low[j] >> (row / 2 * 4) & 15) | (high[j] >> (row * 2) & 3) << 4;
                        *y = d * f32::from(scales[j / 16] as i8) * f32::from(q as i8 - 32);
                    }
                }
            }),
        }
    }

    /// Groups of whole blocks of Q8_0.
    pub fn groups8(self, bytes: &[u8], dst: &mut [Group8]) {
        assert_eq!(self, BlockType::Q8_0, "a type of 8-bit groups");
        let (blocks, rest) = bytes.as_chunks::<34>();
        assert!(rest.is_empty() && blocks.len() == dst.len(), "{} bytes for {} groups", bytes.len(), dst.len());
        for (block, group) in blocks.iter().zip(dst) {
            group.scale = f16::from_le_bytes([block[0], block[1]]);
            group.codes = std::array::from_fn(|i| block[2 + i] as i8);
        }
    }

    /// Groups of whole blocks of Q4_0, Q4_1 or Q4_K. `scale * code + min` has the very bits of
    /// [`BlockType::decode`]: products of a code and a scale are exact, and so is the minimum of
    /// Q4_0, -8 scales.
    pub fn groups4(self, bytes: &[u8], dst: &mut [Group4]) {
        assert_eq!(bytes.len() / self.num_bytes() * (self.num_values() / GROUP), dst.len(), "whole blocks of {}", self.name());
        match self {
            BlockType::Q4_0 => each(bytes, dst, |b: &[u8; 18], [group]: &mut [Group4; 1]| {
                let scale = half_at(b, 0);
                *group = Group4 { scale, min: -8.0 * scale, codes: nibbles(b, 2) };
            }),
            BlockType::Q4_1 => each(bytes, dst, |b: &[u8; 20], [group]: &mut [Group4; 1]| {
                *group = Group4 { scale: half_at(b, 0), min: half_at(b, 2), codes: nibbles(b, 4) };
            }),
            BlockType::Q4K => each(bytes, dst, |b: &[u8; 144], groups: &mut [Group4; SUPER / GROUP]| {
                for (i, group) in groups.iter_mut().enumerate() {
                    let (scale, least) = scale_and_least(b, i);
                    let (codes, shift) = (&b[16 + i / 2 * 32..], i % 2 * 4);
                    *group = Group4 { scale, min: -least, codes: std::array::from_fn(|j| codes[j] >> shift & 15) };
                }
            }),
            _ => panic!("{} has no 4-bit groups", self.name()),
        }
    }
}

/// Calls `one` for each block of B bytes with its N elements of `dst`.
fn each<T, const B: usize, const N: usize>(bytes: &[u8], dst: &mut [T], one: impl Fn(&[u8; B], &mut [T; N])) {
    let (blocks, rest) = bytes.as_chunks::<B>();
    assert!(rest.is_empty(), "{} bytes are no whole blocks of {B}", bytes.len());
    for (block, dst) in blocks.iter().zip(dst.as_chunks_mut::<N>().0) {
        one(block, dst);
    }
}

fn half_at<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 codes of 16 bytes: all low halves, then all high ones.
fn nibbles<const B: usize>(block: &[u8; B], at: usize) -> [u8; GROUP] {
    std::array::from_fn(|j| if j < 16 { block[at + j] & 15 } else { block[at + j - 16] >> 4 })
}

/// 32 codes of five bits: four bytes of the highest, then the others as [`nibbles`].
fn five_bits<const B: usize>(block: &[u8; B], at: usize) -> [u8; GROUP] {
    let high = u32::from_le_bytes(std::array::from_fn(|i| block[at + i]));
    let low = nibbles(block, at + 4);
    std::array::from_fn(|j| low[j] | ((high >> j & 1) << 4) as u8)
}

/// Scale and minimum of a group of Q4_K or Q5_K, which begin with two f16 and twelve bytes that
/// hold eight scales and eight minima of 6 bits.
fn scale_and_least<const B: usize>(block: &[u8; B], group: usize) -> (f32, f32) {
    let s = &block[4..16];
    let (scale, least) = if group < 4 {
        (s[group] & 63, s[group + 4] & 63)
    } else {
        ((s[group + 4] & 15) | (s[group - 4] >> 6) << 4, (s[group + 4] >> 4) | (s[group] >> 6) << 4)
    };
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(least))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look like those of a model: any codes, scales of moderate size.
    fn blocks(kind: BlockType, count: usize) -> Vec<u8> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        let mut bytes: Vec<u8> = (0..count * kind.num_bytes()).map(|_| next()).collect();
        for block in bytes.chunks_exact_mut(kind.num_bytes()) {
            let at = if kind == BlockType::Q6K { [208, 208] } else { [0, 2] };
            for at in at {
                // Exponents around 1/16; bytes of codes that this overwrites are codes still.
                block[at + 1] = block[at + 1] & 0x83 | 0x2c;
            }
        }
        bytes
    }

    #[test]
    fn groups_have_the_values_of_their_blocks() {
        for kind in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q4K, BlockType::Q8_0] {
            let bytes = blocks(kind, 50);
            let mut values = vec![0.0; 50 * kind.num_values()];
            kind.decode(&bytes, &mut values);
            let num_groups = values.len() / GROUP;
            let from_groups: Vec<f32> = if kind.groups() == Some(Groups::Eight) {
                let mut groups = vec![Group8::ZERO; num_groups];
                kind.groups8(&bytes, &mut groups);
                groups.iter().flat_map(|g| g.codes.map(|code| g.scale.to_f32() * f32::from(code))).collect()
            } else {
                let mut groups = vec![Group4::ZERO; num_groups];
                kind.groups4(&bytes, &mut groups);
                assert!(groups.iter().all(|g| g.codes.iter().all(|code| *code < 16)));
                groups.iter().flat_map(|g| g.codes.map(|code| g.scale * f32::from(code) + g.min)).collect()
            };
            for (i, (value, other)) in values.iter().zip(&from_groups).enumerate() {
                assert!(value.is_finite() && value == other, "{} value {i}: {value} and {other}", kind.name());
            }
        }
    }

    /// One block of each type by hand: scale 2, minimum 1 and the codes of its first and last
    /// value.
    #[test]
    fn values_are_those_of_the_formulas() {
        let [two, one] = [2.0, 1.0].map(|value| f16::from_f32(value).to_le_bytes());
        let ends = |kind: BlockType, edit: &dyn Fn(&mut Vec<u8>)| {
            let mut block = vec![0; kind.num_bytes()];
            edit(&mut block);
            let mut values = vec![0.0; kind.num_values()];
            kind.decode(&block, &mut values);
            (values[0], values[kind.num_values() - 1])
        };
        let halves = |block: &mut Vec<u8>| {
            block[..2].copy_from_slice(&two);
            block[2..4].copy_from_slice(&one);
        };
        let found = ends(BlockType::Q4_0, &|b| {
            b[..2].copy_from_slice(&two);
            (b[2], b[17]) = (0x0f, 0x10);
        });
        assert_eq!(found, (14.0, -14.0));
        let found = ends(BlockType::Q4_1, &|b| {
            halves(b);
            (b[4], b[19]) = (0x0f, 0x10);
        });
        assert_eq!(found, (31.0, 3.0));
        let found = ends(BlockType::Q5_0, &|b| {
            b[..2].copy_from_slice(&two);
            (b[2], b[6], b[21]) = (1, 0x0f, 0x10);
        });
        assert_eq!(found, (30.0, -30.0));
        let found = ends(BlockType::Q5_1, &|b| {
            halves(b);
            (b[7], b[8], b[23]) = (0x80, 0x0f, 0x10);
        });
        assert_eq!(found, (31.0, 35.0));
        let found = ends(BlockType::Q8_0, &|b| {
            b[..2].copy_from_slice(&two);
            (b[2], b[33]) = (127, 128);
        });
        assert_eq!(found, (254.0, -256.0));
        // Group 0 has scale 3 and minimum 5, group 7 scale 0x21 and minimum 0x12.
        let scales = |b: &mut Vec<u8>| {
            halves(b);
            (b[4], b[8], b[7], b[11], b[15]) = (3, 5, 0x80, 0x40, 0x21);
        };
        let found = ends(BlockType::Q4K, &|b| {
            scales(b);
            (b[16], b[143]) = (0x0f, 0x10);
        });
        assert_eq!(found, (2.0 * 3.0 * 15.0 - 5.0, 2.0 * 33.0 - 18.0));
        let found = ends(BlockType::Q5K, &|b| {
            scales(b);
            (b[16], b[47], b[48], b[175]) = (0x01, 0x80, 0x0f, 0x10);
        });
        assert_eq!(found, (2.0 * 3.0 * 31.0 - 5.0, 2.0 * 33.0 * 17.0 - 18.0));
        let found = ends(BlockType::Q6K, &|b| {
            b[208..].copy_from_slice(&two);
            (b[0], b[128], b[192]) = (0x0f, 0x03, 2);
            (b[127], b[191], b[207]) = (0x10, 0x40, 0xff);
        });
        assert_eq!(found, (2.0 * 2.0 * 31.0, -2.0 * (17.0 - 32.0)));
    }
}
