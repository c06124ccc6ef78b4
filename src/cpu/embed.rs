//! Token embeddings: rows of a table in the weight dtype, read by id.
#![forbid(unsafe_code)]

use crate::backend::{DType, RowSource};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::{READ_VALUES, Round, read_in_parts};
use crate::cpu::memory::Aligned;
use crate::error::Result;

/// An (n, k) table, row-major.
pub enum Table {
    F32 { n: usize, k: usize, rows: Aligned<f32> },
    Bf16 { n: usize, k: usize, rows: Aligned<u16> },
}

impl Table {
    pub fn new(context: &CpuContext, dtype: DType, n: usize, k: usize, source: &RowSource) -> Result<Table> {
        let at_once = (READ_VALUES / k).max(1);
        match dtype {
            DType::F32 => {
                let mut rows = Aligned::zeroed(n * k)?;
                read_in_parts(context, &mut rows, at_once * k, &|i, rows, _| source(i * at_once, rows))?;
                Ok(Table::F32 { n, k, rows })
            }
            DType::Bf16 => {
                let mut rows = Aligned::<u16>::zeroed(n * k)?;
                read_in_parts(context, &mut rows, at_once * k, &|i, rows, wide| {
                    wide.resize(rows.len(), 0.0);
                    source(i * at_once, wide)?;
                    // As one row, because a row is padded to whole words; an odd value is left for
                    // the end.
                    let even = rows.len() / 2 * 2;
                    context.isa.run(Round { x: &wide[..even], k: even.max(1), words: &mut rows[..even] });
                    if let (Some(row), Some(wide)) = (rows.get_mut(even), wide.get(even)) {
                        *row = half::bf16::from_f32(*wide).to_bits();
                    }
                    Ok(())
                })?;
                Ok(Table::Bf16 { n, k, rows })
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Table::F32 { rows, .. } => size_of_val(&rows[..]),
            Table::Bf16 { rows, .. } => size_of_val(&rows[..]),
        }
    }

    pub fn width(&self) -> usize {
        match *self {
            Table::F32 { k, .. } | Table::Bf16 { k, .. } => k,
        }
    }
}

/// See [`crate::backend::Backend::embed`].
pub fn embed(ids: &[u32], table: &Table, out: &mut [f32]) {
    let k = table.width();
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(k)) {
        let at = id as usize * k;
        match table {
            Table::F32 { n, rows, .. } => {
                assert!((id as usize) < *n, "token id {id} of a table of {n} rows");
                out.copy_from_slice(&rows[at..at + k]);
            }
            Table::Bf16 { n, rows, .. } => {
                assert!((id as usize) < *n, "token id {id} of a table of {n} rows");
                for (out, &half) in out.iter_mut().zip(&rows[at..at + k]) {
                    *out = f32::from_bits(u32::from(half) << 16);
                }
            }
        }
    }
}

/// See [`crate::backend::Backend::gather`].
pub fn gather(rows: &[u32], width: usize, x: &[f32], out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[row as usize * width..][..width]);
    }
}
