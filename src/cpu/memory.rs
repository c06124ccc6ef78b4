//! Buffers of 32-bit elements that begin on a cache line, so that vector loads never straddle two
//! lines.
//!
//! Large ones are mappings of their own that ask for huge pages: a weight of 100 MB then takes
//! fifty entries of the TLB instead of 25,000, fewer faults when it is filled, and goes back to the
//! system when it is dropped.
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// Bytes from which a buffer is a mapping of its own: four huge pages. Below, the allocator serves
/// better.
const MAPPED_BYTES: usize = 8 << 20;

/// One cache line, one AVX-512 register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct CacheLine([u32; 16]);

enum Lines {
    Allocated(Vec<CacheLine>),
    /// Begins on a page.
    Mapped(MmapMut),
}

/// A slice of `T` (f32, u32 or u16 elements) on cache-line boundaries.
pub struct Aligned<T> {
    lines: Lines,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    const PER_LINE: usize = size_of::<CacheLine>() / size_of::<T>();

    /// `len` zeros. What is never written to takes no memory.
    pub fn zeroed(len: usize) -> Self {
        let lines = len.div_ceil(Self::PER_LINE);
        let mapped = if lines * size_of::<CacheLine>() >= MAPPED_BYTES { map(lines * size_of::<CacheLine>()) } else { None };
        let lines = mapped.map_or_else(|| Lines::Allocated(bytemuck::zeroed_vec(lines)), Lines::Mapped);
        Aligned { lines, len, element: std::marker::PhantomData }
    }

    /// The first `len` elements. Where there are fewer, all are replaced by zeros; otherwise they
    /// keep their content. Never shrinks.
    pub fn reserve(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::zeroed(len);
        }
        &mut self[..len]
    }
}

/// Zeros on huge pages where the system has them. `None`: it refuses the mapping, and the allocator
/// is asked instead.
fn map(bytes: usize) -> Option<MmapMut> {
    let map = MmapMut::map_anon(bytes).ok()?;
    // Advice only: without huge pages everything works, a little slower.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(map)
}

impl<T: Pod> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        Self::from(&self[..])
    }
}

impl<T: Pod> Default for Aligned<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let all = match &self.lines {
            Lines::Allocated(lines) => bytemuck::cast_slice(lines),
            Lines::Mapped(map) => bytemuck::cast_slice(map),
        };
        &all[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let all = match &mut self.lines {
            Lines::Allocated(lines) => bytemuck::cast_slice_mut(lines),
            Lines::Mapped(map) => bytemuck::cast_slice_mut(map),
        };
        &mut all[..self.len]
    }
}

impl<T: Pod> From<&[T]> for Aligned<T> {
    fn from(src: &[T]) -> Self {
        let mut copy = Self::zeroed(src.len());
        copy.copy_from_slice(src);
        copy
    }
}
