//! Token embeddings: rows of a table, read by id.
#![forbid(unsafe_code)]

use crate::backend::{RowSource, WeightFormat};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::{Bits, QuantisedTable, Round};
use crate::cpu::memory::Aligned;
use crate::cpu::read_rows::{READ_VALUES, read_in_parts};
use crate::error::Result;
use crate::packed_weights::PackedWords;

/// An (n, k) table, row-major.
pub enum Table {
    F32 { n: usize, k: usize, rows: Aligned<f32> },
    Bf16 { n: usize, k: usize, rows: Aligned<u16> },
    Quantised(QuantisedTable),
}

impl Table {
    pub fn new(context: &CpuContext, format: WeightFormat, n: usize, k: usize, source: &dyn RowSource) -> Result<Table> {
        let at_once = (READ_VALUES / k).max(1);
        let quantised = |bits| QuantisedTable::new(context, bits, n, k, source).map(Table::Quantised);
        match format {
            WeightFormat::Q8 => quantised(Bits::Eight),
            WeightFormat::Q4 => quantised(Bits::Four),
            WeightFormat::F32 => {
                let mut rows = Aligned::zeroed(n * k)?;
                read_in_parts(context, &mut rows, at_once * k, &|i, rows, _| source.read(i * at_once, rows))?;
                Ok(Table::F32 { n, k, rows })
            }
            WeightFormat::Bf16 => {
                let mut rows = Aligned::<u16>::zeroed(n * k)?;
                read_in_parts(context, &mut rows, at_once * k, &|i, rows, wide| {
                    wide.resize(rows.len(), 0.0);
                    source.read(i * at_once, wide)?;
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

    /// Takes words that lie ready.
    ///
    /// Errors: words of another table.
    pub fn of_words(format: WeightFormat, n: usize, k: usize, words: PackedWords) -> Result<Table> {
        QuantisedTable::of_words(Bits::of(format)?, n, k, words).map(Table::Quantised)
    }

    /// The words of a table in groups.
    pub fn words(&self) -> Option<&[u32]> {
        if let Table::Quantised(table) = self { Some(table.words()) } else { None }
    }

    /// Rows by their index, as f32: `out[i, :] = table[ids[i], :]`.
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        let (n, k) = match *self {
            Table::F32 { n, k, .. } | Table::Bf16 { n, k, .. } => (n, k),
            Table::Quantised(ref table) => return table.rows(ids, out),
        };
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(k)) {
            assert!((id as usize) < n, "token id {id} of a table of {n} rows");
            let at = id as usize * k;
            match self {
                Table::F32 { rows, .. } => out.copy_from_slice(&rows[at..at + k]),
                Table::Bf16 { rows, .. } => {
                    for (out, &half) in out.iter_mut().zip(&rows[at..at + k]) {
                        *out = f32::from_bits(u32::from(half) << 16);
                    }
                }
                Table::Quantised(_) => unreachable!("returned above"),
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Table::F32 { rows, .. } => size_of_val(&rows[..]),
            Table::Bf16 { rows, .. } => size_of_val(&rows[..]),
            Table::Quantised(table) => table.bytes(),
        }
    }

    pub fn width(&self) -> usize {
        match *self {
            Table::F32 { k, .. } | Table::Bf16 { k, .. } => k,
            Table::Quantised(ref table) => table.k(),
        }
    }
}

/// See [`crate::backend::Backend::gather`].
pub fn gather(rows: &[u32], width: usize, x: &[f32], out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[row as usize * width..][..width]);
    }
}
