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

use crate::error::{Error, Result};

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
    ///
    /// Errors: [`Error::Device`] with the bytes that the system refuses.
    pub fn zeroed(len: usize) -> Result<Self> {
        let lines = len.div_ceil(Self::PER_LINE);
        let refused = || Error::device(format!("cannot allocate {}: the system refuses the memory; {LESS}", amount(lines)));
        let bytes = lines.checked_mul(size_of::<CacheLine>()).ok_or_else(refused)?;
        let mapped = if bytes >= MAPPED_BYTES { map(bytes) } else { None };
        let lines = match mapped {
            Some(map) => Lines::Mapped(map),
            None => Lines::Allocated(bytemuck::try_zeroed_vec(lines).map_err(|()| refused())?),
        };
        Ok(Aligned { lines, len, element: std::marker::PhantomData })
    }

    /// A copy of `src`.
    ///
    /// Errors: as [`Aligned::zeroed`].
    pub fn copied(src: &[T]) -> Result<Self> {
        let mut copy = Self::zeroed(src.len())?;
        copy.copy_from_slice(src);
        Ok(copy)
    }

    /// The first `len` elements. Where there are fewer, all are replaced by zeros; otherwise they
    /// keep their content. Never shrinks.
    ///
    /// Errors: as [`Aligned::zeroed`].
    pub fn reserve(&mut self, len: usize) -> Result<&mut [T]> {
        if self.len < len {
            // Given back before the larger one is asked for.
            *self = Self::default();
            *self = Self::zeroed(len)?;
        }
        Ok(&mut self[..len])
    }
}

/// The next move where memory is refused.
const LESS: &str = "bf16, shorter texts or fewer sequences at once take less";

/// Lines as bytes: `12.3 GB`, `4.1 MB`.
fn amount(lines: usize) -> String {
    let bytes = lines as f64 * size_of::<CacheLine>() as f64;
    if bytes >= 1e9 { format!("{:.1} GB", bytes / 1e9) } else { format!("{:.1} MB", bytes / 1e6) }
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

impl<T: Pod> Default for Aligned<T> {
    /// Nothing, which takes no memory.
    fn default() -> Self {
        Aligned { lines: Lines::Allocated(Vec::new()), len: 0, element: std::marker::PhantomData }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_memory_is_an_error_with_its_size() {
        for len in [1 << 58, usize::MAX / 8, usize::MAX] {
            let Err(Error::Device { what }) = Aligned::<f32>::zeroed(len) else { panic!("{len} elements were allocated") };
            assert!(what.contains(" GB") && what.contains("refuses"), "{what}");
        }
        let mut kept = Aligned::<f32>::copied(&[1.0, 2.0]).unwrap();
        assert!(kept.reserve(1 << 58).is_err());
        assert_eq!(kept.reserve(3).unwrap(), [0.0; 3], "usable after a refusal");
    }
}
