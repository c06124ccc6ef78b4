//! Matrix products with weights packed once: `out (rows, n) <- epilogue(x (rows, k) W^T + bias)`.
//!
//! `float` has the products with weights of f32 or bf16, `quantised` those with weights in groups
//! of 8 or 4 bits, `epilogue` what follows both, `cuts` how rows of several weights are shared out,
//! `residence` whether weights come from L3 or from memory.
//! In either the result of a row does not depend on its neighbours.
#![forbid(unsafe_code)]

mod cuts;
mod epilogue;
mod float;
mod quantised;
mod residence;

use crate::backend::{DType, Epilogue, RowSource, WeightFormat};
use crate::cpu::context::CpuContext;
use crate::error::Result;
use crate::packed_weights::PackedWords;

pub use float::Round;
pub use quantised::Bits;

/// An (n, k) weight, packed.
pub enum Packed {
    Float(float::Packed),
    Quantised(quantised::Packed),
}

/// A weight that is only looked up, in groups.
pub type QuantisedTable = quantised::ByRows;

/// The same values row by row, for products with few and scattered rows.
pub enum ByRows<'a> {
    Float(&'a float::ByRows),
    Quantised(&'a quantised::ByRows),
}

impl Packed {
    /// Reads the rows some at a time, on all threads.
    ///
    /// Errors: those of `source`; memory that the system refuses; a value too large for a group.
    pub fn new(context: &CpuContext, format: WeightFormat, n: usize, k: usize, source: &dyn RowSource) -> Result<Packed> {
        let float = |dtype| float::Packed::new(context, dtype, n, k, source).map(Packed::Float);
        match format {
            WeightFormat::F32 => float(DType::F32),
            WeightFormat::Bf16 => float(DType::Bf16),
            WeightFormat::Q8 => quantised::Packed::new(context, quantised::Bits::Eight, n, k, source).map(Packed::Quantised),
            WeightFormat::Q4 => quantised::Packed::new(context, quantised::Bits::Four, n, k, source).map(Packed::Quantised),
        }
    }

    /// Takes words that lie ready.
    ///
    /// Errors: words of another weight.
    pub fn of_words(context: &CpuContext, format: WeightFormat, n: usize, k: usize, words: PackedWords) -> Result<Packed> {
        quantised::Packed::of_words(context, Bits::of(format)?, n, k, words).map(Packed::Quantised)
    }

    /// The words of a weight in groups.
    pub fn words(&self) -> Option<&[u32]> {
        match self {
            Packed::Float(_) => None,
            Packed::Quantised(packed) => Some(packed.words()),
        }
    }

    /// Rows of the weight: columns of a product.
    pub fn n(&self) -> usize {
        match self {
            Packed::Float(packed) => packed.n,
            Packed::Quantised(packed) => packed.n,
        }
    }

    /// Width of a row.
    pub fn k(&self) -> usize {
        match self {
            Packed::Float(packed) => packed.k,
            Packed::Quantised(packed) => packed.k,
        }
    }

    /// Rows by their index, as f32: `out[i, :] = weight[ids[i], :]`.
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        match self {
            Packed::Float(packed) => packed.rows(ids, out),
            Packed::Quantised(packed) => packed.rows(ids, out),
        }
    }

    /// The weight by rows, made when it is first asked for.
    ///
    /// Errors: memory that the system refuses.
    pub fn by_rows(&self, context: &CpuContext) -> Result<ByRows<'_>> {
        Ok(match self {
            Packed::Float(packed) => ByRows::Float(packed.by_rows(context)?),
            Packed::Quantised(packed) => ByRows::Quantised(packed.by_rows(context)?),
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Packed::Float(packed) => packed.bytes(),
            Packed::Quantised(packed) => packed.bytes(),
        }
    }
}

impl ByRows<'_> {
    /// `out[i] = x . row ids[i]`.
    pub fn products(&self, context: &CpuContext, x: &[f32], ids: &[u32], out: &mut [f32]) {
        match self {
            ByRows::Float(rows) => rows.products(context, x, ids, out),
            ByRows::Quantised(rows) => rows.products(x, ids, out),
        }
    }
}

/// See [`crate::backend::Backend::linear`]. `x` holds at least rows * k, `out` at least rows times
/// the width of the epilogue.
///
/// Errors: scratch memory that the system refuses.
pub fn linear(
    context: &CpuContext,
    rows: usize,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out: &mut [f32],
) -> Result<()> {
    match weight {
        Packed::Float(weight) => float::linear(context, rows, x, weight, bias, epilogue, out),
        Packed::Quantised(weight) => quantised::linear(context, rows, x, weight, bias, epilogue, out),
    }
}

/// The products of several weights of one shape and format, each with rows of its own: rows
/// `bounds[g]..bounds[g + 1]` of x and `out` belong to `weights[g]`. One job for all of them, so
/// that small groups keep every thread busy. A row's result is that of [`linear`].
///
/// Errors: as [`linear`].
pub fn grouped(context: &CpuContext, bounds: &[usize], x: &[f32], weights: &[Packed], epilogue: Epilogue, out: &mut [f32]) -> Result<()> {
    let float: Vec<_> = weights.iter().filter_map(|weight| if let Packed::Float(weight) = weight { Some(weight) } else { None }).collect();
    if float.len() == weights.len() {
        return float::grouped(context, bounds, x, &float, epilogue, out);
    }
    let quantised: Vec<_> =
        weights.iter().filter_map(|weight| if let Packed::Quantised(weight) = weight { Some(weight) } else { None }).collect();
    assert!(quantised.len() == weights.len(), "weights of several formats in one product");
    quantised::grouped(context, bounds, x, &quantised, epilogue, out)
}
