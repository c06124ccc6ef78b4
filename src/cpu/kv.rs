//! The paged K/V store: how a page lies in memory.
//!
//! A head of a layer is one contiguous region of pages. Inside a page, slots come in groups of
//! sixteen (fewer where the page is smaller), each laid out as the register tile wants to read it:
//!
//! | | words of a group | step of the product | columns |
//! |---|---|---|---|
//! | keys (q k^T) | (steps of D, lanes) | one d in f32, two neighbouring d in bf16 | slots |
//! | values (p v) | (steps of lanes, D padded to 16) | one slot in f32, two neighbouring slots in bf16 | d |
#![forbid(unsafe_code)]

use crate::backend::{DType, KvShape};
use crate::cpu::memory::Aligned;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::{Error, Result};

/// All layers' keys and values.
pub struct KvCache {
    pub shape: KvShape,
    pub layout: KvLayout,
    /// (layers, K, pages, words of a page)
    keys: Aligned<u32>,
    values: Aligned<u32>,
}

/// Sizes of a group of slots, in 32-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub dtype: DType,
    pub page_size: usize,
    /// Slots of a group.
    pub lanes: usize,
    /// D rounded up to whole vectors.
    pub value_width: usize,
    /// Steps of q k^T.
    pub key_steps: usize,
    /// Steps of p v over one group.
    pub value_steps: usize,
}

impl KvLayout {
    fn new(dtype: DType, page_size: usize, head_dim: usize) -> KvLayout {
        let lanes = page_size.min(LANES);
        let per_word = 4 / dtype.bytes();
        KvLayout {
            dtype,
            page_size,
            lanes,
            value_width: head_dim.next_multiple_of(LANES),
            key_steps: head_dim.div_ceil(per_word),
            value_steps: lanes.div_ceil(per_word),
        }
    }

    /// Words of a group's keys.
    pub fn key_group(&self) -> usize {
        self.key_steps * self.lanes
    }
    /// Words of a group's values.
    pub fn value_group(&self) -> usize {
        self.value_steps * self.value_width
    }
    fn key_page(&self) -> usize {
        self.page_size / self.lanes * self.key_group()
    }
    fn value_page(&self) -> usize {
        self.page_size / self.lanes * self.value_group()
    }
}

/// One head of one layer, to read.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    pub layout: KvLayout,
    keys: &'a [u32],
    values: &'a [u32],
}

impl<'a> Head<'a> {
    /// Keys and values of the group of slots that begins at `slot`.
    #[inline(always)]
    pub fn group(&self, slot: usize) -> (&'a [u32], &'a [u32]) {
        let group = slot / self.layout.lanes;
        let (keys, values) = (self.layout.key_group(), self.layout.value_group());
        (&self.keys[group * keys..][..keys], &self.values[group * values..][..values])
    }
}

impl KvCache {
    /// Pages full of NaN.
    pub fn new(dtype: DType, shape: KvShape) -> Result<KvCache> {
        let KvShape { num_layers, num_pages, page_size, num_kv_heads, head_dim } = shape;
        if !page_size.is_power_of_two() {
            return Err(Error::request(format!("page size {page_size} is not a power of two")));
        }
        assert!(num_kv_heads > 0 && head_dim > 0, "{shape:?} holds nothing");
        let layout = KvLayout::new(dtype, page_size, head_dim);
        let pages = num_layers * num_kv_heads * num_pages;
        let mut kv = KvCache {
            shape,
            layout,
            keys: Aligned::zeroed(pages * layout.key_page())?,
            values: Aligned::zeroed(pages * layout.value_page())?,
        };
        let poison = kv.poison();
        kv.keys.fill(poison);
        kv.values.fill(poison);
        Ok(kv)
    }

    /// NaN in every element of a word.
    fn poison(&self) -> u32 {
        match self.layout.dtype {
            DType::F32 => f32::NAN.to_bits(),
            DType::Bf16 => 0x7fc0_7fc0,
        }
    }

    pub fn copy_page(&mut self, src: usize, dst: usize) {
        let (keys, values) = (self.layout.key_page(), self.layout.value_page());
        for head in 0..self.shape.num_layers * self.shape.num_kv_heads {
            let (from, to) = (head * self.shape.num_pages + src, head * self.shape.num_pages + dst);
            self.keys.copy_within(from * keys..(from + 1) * keys, to * keys);
            self.values.copy_within(from * values..(from + 1) * values, to * values);
        }
    }

    /// Head `head` of `layer`.
    pub fn head(&self, layer: usize, head: usize) -> Head<'_> {
        let at = (layer * self.shape.num_kv_heads + head) * self.shape.num_pages;
        let (keys, values) = (self.layout.key_page(), self.layout.value_page());
        let len = self.shape.num_pages;
        Head { layout: self.layout, keys: &self.keys[at * keys..][..len * keys], values: &self.values[at * values..][..len * values] }
    }

    /// Keys and values of `layer`, (K, pages, words of a page), to write with [`Append`].
    pub fn layer_mut(&mut self, layer: usize) -> (&mut [u32], &mut [u32]) {
        let pages = self.shape.num_kv_heads * self.shape.num_pages;
        let (keys, values) = (pages * self.layout.key_page(), pages * self.layout.value_page());
        (&mut self.keys[layer * keys..][..keys], &mut self.values[layer * values..][..values])
    }

    /// Words of one head of one layer: keys, values.
    pub fn head_words(&self) -> (usize, usize) {
        (self.shape.num_pages * self.layout.key_page(), self.shape.num_pages * self.layout.value_page())
    }
}

/// Writes keys or values of one head: row t of `rows`, of `width` elements, holds D of them at
/// `first`, which go to `slots[t]` of the head's `words`.
pub struct Append<'a> {
    pub layout: KvLayout,
    pub kind: Kind,
    pub rows: &'a [f32],
    pub width: usize,
    pub first: usize,
    pub head_dim: usize,
    pub slots: &'a [u32],
    pub words: &'a mut [u32],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Keys,
    Values,
}

impl Kernel for Append<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let layout = self.layout;
        let lanes = layout.lanes;
        for (row, &slot) in self.rows.chunks_exact(self.width).zip(self.slots) {
            let (group, lane) = (slot as usize / lanes, slot as usize % lanes);
            let row = &row[self.first..][..self.head_dim];
            let group = match self.kind {
                Kind::Keys => &mut self.words[group * layout.key_group()..][..layout.key_group()],
                Kind::Values => &mut self.words[group * layout.value_group()..][..layout.value_group()],
            };
            match (self.kind, layout.dtype) {
                (Kind::Keys, DType::F32) => scatter(group, lanes, lane, row.iter().map(|key| key.to_bits())),
                (Kind::Values, DType::F32) => {
                    group[lane * layout.value_width..][..self.head_dim].copy_from_slice(bytemuck::cast_slice(row));
                }
                (kind, DType::Bf16) => {
                    for (block, row) in row.chunks(LANES).enumerate() {
                        // Zeros at the end: the half past an odd D meets a zero of q.
                        let (mut wide, mut narrow) = ([0.0; LANES], [0; LANES]);
                        wide[..row.len()].copy_from_slice(row);
                        simd.store_bf16(simd.load(&wide), &mut narrow);
                        if kind == Kind::Keys {
                            let pairs = narrow.as_chunks::<2>().0.iter();
                            let words = pairs.map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16);
                            scatter(&mut group[block * LANES / 2 * lanes..], lanes, lane, words);
                            continue;
                        }
                        let words = &mut group[lane / 2 * layout.value_width + block * LANES..][..row.len()];
                        if lane.is_multiple_of(2) {
                            words.iter_mut().zip(narrow).for_each(|(word, half)| *word = *word & 0xffff_0000 | u32::from(half));
                        } else {
                            words.iter_mut().zip(narrow).for_each(|(word, half)| *word = *word & 0x0000_ffff | u32::from(half) << 16);
                        }
                    }
                }
            }
        }
    }
}

/// `group (steps, lanes)`: column `lane` becomes `words`.
#[inline(always)]
fn scatter(group: &mut [u32], lanes: usize, lane: usize, words: impl Iterator<Item = u32>) {
    if lanes == LANES {
        // A constant stride for the usual page.
        for (step, word) in group.as_chunks_mut::<LANES>().0.iter_mut().zip(words) {
            step[lane] = word;
        }
    } else {
        for (step, word) in group.chunks_exact_mut(lanes).zip(words) {
            step[lane] = word;
        }
    }
}
