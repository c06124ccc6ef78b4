//! A weight as kernels read it: where it lies, and whether it is in floats or in groups.
#![forbid(unsafe_code)]

use crate::backend::DType;
use crate::backend::group_blocks::{Bits, matrix_words};
use crate::cuda::driver::interface::Address;

/// A weight on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightAt {
    pub address: Address,
    /// Those of a code, for a weight in blocks; `None` where it is row-major, in the type of x.
    pub bits: Option<Bits>,
}

impl WeightAt {
    /// A row-major weight in the type of x.
    pub fn floats(address: Address) -> WeightAt {
        WeightAt { address, bits: None }
    }
}

/// The kinds of weight that kernels are built for.
pub(in crate::cuda) const KINDS: [Option<Bits>; 3] = [None, Some(Bits::Eight), Some(Bits::Four)];

/// The number of a kind in a build: GROUP_BITS in `kernels/groups.cuh`.
pub(in crate::cuda) fn bits_define(bits: Option<Bits>) -> u32 {
    match bits {
        None => 0,
        Some(Bits::Eight) => 8,
        Some(Bits::Four) => 4,
    }
}

/// Bytes of an (n, k) weight; `dtype` is the type of x.
pub(in crate::cuda) fn weight_bytes(dtype: DType, bits: Option<Bits>, n: usize, k: usize) -> usize {
    match bits {
        None => n * k * dtype.bytes(),
        Some(bits) => matrix_words(bits, n, k) * size_of::<u32>(),
    }
}
