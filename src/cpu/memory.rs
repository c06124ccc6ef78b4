//! Buffers of 32-bit elements that begin on a cache line, so that vector loads never straddle two lines.
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// One cache line, one AVX-512 register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A slice of `T` (f32, u32 or u16 elements) on cache-line boundaries.
#[derive(Clone)]
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    const PER_LINE: usize = size_of::<Line>() / size_of::<T>();

    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Aligned { lines: vec![Line([0; 16]); len.div_ceil(Self::PER_LINE)], len, element: std::marker::PhantomData }
    }

    /// At least `len` elements, keeping whatever is there; never shrinks.
    pub fn reserve(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::zeroed(len);
        }
        &mut self[..len]
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
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T: Pod> From<&[T]> for Aligned<T> {
    fn from(src: &[T]) -> Self {
        let mut copy = Self::zeroed(src.len());
        copy.copy_from_slice(src);
        copy
    }
}
