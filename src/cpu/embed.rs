//! Token embeddings: rows of a table in the weight dtype, read by id.
#![forbid(unsafe_code)]

use crate::backend::{DType, RowSource};
use crate::cpu::memory::Aligned;
use crate::error::Result;

/// Rows converted at a time while a table is loaded.
const ROWS_AT_ONCE: usize = 256;

/// An (n, k) table, row-major.
pub enum Table {
    F32 { n: usize, k: usize, rows: Aligned<f32> },
    Bf16 { n: usize, k: usize, rows: Aligned<u16> },
}

impl Table {
    pub fn new(dtype: DType, n: usize, k: usize, source: &mut RowSource) -> Result<Table> {
        match dtype {
            DType::F32 => {
                let mut rows = Aligned::zeroed(n * k);
                for (i, rows) in rows.chunks_mut(ROWS_AT_ONCE * k).enumerate() {
                    source(i * ROWS_AT_ONCE, rows)?;
                }
                Ok(Table::F32 { n, k, rows })
            }
            DType::Bf16 => {
                let mut rows = Aligned::<u16>::zeroed(n * k);
                let mut wide = vec![0.0; ROWS_AT_ONCE.min(n) * k];
                for (i, rows) in rows.chunks_mut(ROWS_AT_ONCE * k).enumerate() {
                    let wide = &mut wide[..rows.len()];
                    source(i * ROWS_AT_ONCE, wide)?;
                    for (narrow, wide) in rows.iter_mut().zip(wide) {
                        *narrow = half::bf16::from_f32(*wide).to_bits();
                    }
                }
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
