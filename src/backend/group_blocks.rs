//! Weights in groups as every backend keeps them: blocks, panels of blocks, and tables by rows; and
//! how the rows of a source become them.
//!
//! A block is the group of each of 32 columns (rows of the weight), so that one lane of a vector or
//! a warp serves one column:
//! ```text
//! q8   scales (32) f16 | step s of 8: for each column four codes, k = 4 s ..
//! q4   scales (32) f16 | mins (32) f16 | step s of 4: for each column four bytes, whose low
//!      halves are the codes of k = 8 s .. and whose high halves those of k = 8 s + 4 ..
//! ```
//! A panel is one block after the other along k; a weight is its panels, one after the other.
//! Columns past n are zeros. What is only looked up lies row by row instead.
#![forbid(unsafe_code)]

use std::ops::Range;

use half::f16;

use crate::backend::groups::{GROUP, Group4, Group8};
use crate::backend::{RowSource, WeightFormat};
use crate::error::{Error, Result};

/// Columns of a block.
pub const COLUMNS: usize = 32;
/// Words of a block in q8: 1088 bytes.
pub const Q8_WORDS: usize = COLUMNS / 2 + COLUMNS * GROUP / 4;
/// Words of a block in q4: 640 bytes.
pub const Q4_WORDS: usize = COLUMNS + COLUMNS * GROUP / 8;

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Eight,
    Four,
}

impl Bits {
    /// Those of a format in groups.
    ///
    /// Errors: floats.
    pub fn of(format: WeightFormat) -> Result<Bits> {
        match format {
            WeightFormat::Q8 => Ok(Bits::Eight),
            WeightFormat::Q4 => Ok(Bits::Four),
            WeightFormat::F32 | WeightFormat::Bf16 => Err(Error::request(format!("expected a weight in groups, found {}", format.name()))),
        }
    }

    /// Words of a block.
    pub fn block_words(self) -> usize {
        match self {
            Bits::Eight => Q8_WORDS,
            Bits::Four => Q4_WORDS,
        }
    }
}

/// The rows of an (n, k) weight, and the blocks that they become.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    pub bits: Bits,
    pub n: usize,
    pub k: usize,
    pub source: &'a dyn RowSource,
}

impl Panels<'_> {
    /// Words of one.
    pub fn words(&self) -> usize {
        panel_words(self.bits, self.k)
    }

    /// Fills panel `i`, which is zeros: from groups as they are stored, or from values through
    /// `quantise`, such as [`quantise_panel`], which is handed (rows, k) values; `room` is scratch
    /// to read into.
    ///
    /// Errors: those of the source; a value too large for a group.
    pub fn fill(
        &self,
        i: usize,
        panel: &mut [u32],
        room: &mut Vec<f32>,
        quantise: impl FnOnce(&[f32], &mut [u32]) -> Result<()>,
    ) -> Result<()> {
        let Panels { bits, n, k, source } = *self;
        let (first, rows) = (i * COLUMNS, COLUMNS.min(n - i * COLUMNS));
        let is_stored = each_stored_row(source, bits, first..first + rows, k.div_ceil(GROUP), |column, groups| {
            panel.chunks_exact_mut(bits.block_words()).zip(groups).for_each(|(block, group)| group.put(block, column));
        })?;
        if is_stored {
            return Ok(());
        }
        room.resize(rows * k, 0.0);
        source.read(first, room)?;
        quantise(room, panel)
    }
}

/// Words of a panel of width k.
pub fn panel_words(bits: Bits, k: usize) -> usize {
    k.div_ceil(GROUP) * bits.block_words()
}

/// Words of an (n, k) weight.
pub fn matrix_words(bits: Bits, n: usize, k: usize) -> usize {
    n.div_ceil(COLUMNS) * panel_words(bits, k)
}

/// Puts (rows, k) values into a panel of zeros.
///
/// Errors: a value too large for a group.
#[inline(always)]
pub fn quantise_panel(bits: Bits, k: usize, rows: &[f32], panel: &mut [u32]) -> Result<()> {
    for (column, row) in rows.chunks_exact(k).enumerate() {
        for (block, values) in panel.chunks_exact_mut(bits.block_words()).zip(row.chunks(GROUP)) {
            Group::of(bits, values)?.put(block, column);
        }
    }
    Ok(())
}

/// The groups of a column of a panel.
pub fn column_of(bits: Bits, panel: &[u32], column: usize) -> impl Iterator<Item = Group> {
    panel.chunks_exact(bits.block_words()).map(move |block| match bits {
        Bits::Eight => Group::Eight(get_q8(block.try_into().expect("a block of q8"), column)),
        Bits::Four => Group::Four(get_q4(block.try_into().expect("a block of q4"), column)),
    })
}

/// Calls `take(i, groups)` with the groups of row i of `rows` as a file has them. False: they are
/// not stored in groups of so many bits, and it was not called.
pub fn each_stored_row(
    source: &dyn RowSource,
    bits: Bits,
    rows: Range<usize>,
    num_groups: usize,
    mut take: impl FnMut(usize, Vec<Group>),
) -> Result<bool> {
    for (i, row) in rows.enumerate() {
        let groups: Vec<Group> = match bits {
            Bits::Eight => {
                let mut groups = vec![Group8::ZERO; num_groups];
                if !source.read_q8(row, &mut groups)? {
                    return Ok(false);
                }
                groups.into_iter().map(Group::Eight).collect()
            }
            Bits::Four => {
                let mut groups = vec![Group4::ZERO; num_groups];
                if !source.read_q4(row, &mut groups)? {
                    return Ok(false);
                }
                groups.into_iter().map(Group::Four).collect()
            }
        };
        take(i, groups);
    }
    Ok(true)
}

/// A group of either kind.
pub enum Group {
    Eight(Group8),
    Four(Group4),
}

impl Group {
    /// Of 32 values, or of fewer: the last value fills what is short, which widens no range.
    #[inline(always)]
    pub fn of(bits: Bits, values: &[f32]) -> Result<Group> {
        let mut filled = [values[values.len() - 1]; GROUP];
        filled[..values.len()].copy_from_slice(values);
        Ok(match bits {
            Bits::Eight => Group::Eight(Group8::of(&filled)?),
            Bits::Four => Group::Four(Group4::of(&filled)?),
        })
    }

    /// Puts it into a block of its kind.
    #[inline(always)]
    fn put(&self, block: &mut [u32], column: usize) {
        match self {
            Group::Eight(group) => put_q8(block.try_into().expect("a block of q8"), column, group),
            Group::Four(group) => put_q4(block.try_into().expect("a block of q4"), column, group),
        }
    }
}

/// A group of a table: its codes lie side by side, `scale * code + min`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RowGroup {
    pub codes: [i8; GROUP],
    /// Those of an f16, as is `min`.
    pub scale: f32,
    pub min: f32,
}

impl RowGroup {
    /// Words of one.
    pub const WORDS: usize = size_of::<RowGroup>() / size_of::<u32>();

    /// The first values that it stands for.
    pub fn values(&self, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(self.codes) {
            *out = self.scale * f32::from(code) + self.min;
        }
    }
}

impl From<Group> for RowGroup {
    fn from(group: Group) -> RowGroup {
        match group {
            Group::Eight(group) => RowGroup { codes: group.codes, scale: group.scale.to_f32(), min: 0.0 },
            Group::Four(group) => {
                RowGroup { codes: group.codes.map(|code| code as i8), scale: group.scale.to_f32(), min: group.min.to_f32() }
            }
        }
    }
}

/// Puts a group of a column into a block.
#[inline(always)]
fn put_q8(block: &mut [u32; Q8_WORDS], column: usize, group: &Group8) {
    put_half(block, column, group.scale);
    for (step, codes) in group.codes.chunks_exact(4).enumerate() {
        block[COLUMNS / 2 + step * COLUMNS + column] = u32::from_le_bytes([codes[0] as u8, codes[1] as u8, codes[2] as u8, codes[3] as u8]);
    }
}

/// Puts the group of a column into a block.
#[inline(always)]
fn put_q4(block: &mut [u32; Q4_WORDS], column: usize, group: &Group4) {
    put_half(block, column, group.scale);
    put_half(&mut block[COLUMNS / 2..], column, group.min);
    for (step, codes) in group.codes.chunks_exact(8).enumerate() {
        let byte = |i: usize| codes[i] | codes[i + 4] << 4;
        block[COLUMNS + step * COLUMNS + column] = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
    }
}

/// The group of a column of a block.
fn get_q8(block: &[u32; Q8_WORDS], column: usize) -> Group8 {
    let codes = std::array::from_fn(|k| (block[COLUMNS / 2 + k / 4 * COLUMNS + column] >> (8 * (k % 4))) as u8 as i8);
    Group8 { scale: half_at(block, column), codes }
}

/// The group of a column of a block.
fn get_q4(block: &[u32; Q4_WORDS], column: usize) -> Group4 {
    let code = |k: usize| (block[COLUMNS + k / 8 * COLUMNS + column] >> (8 * (k % 4) + k % 8 / 4 * 4)) as u8 & 15;
    Group4 { scale: half_at(block, column), min: half_at(&block[COLUMNS / 2..], column), codes: std::array::from_fn(code) }
}

#[inline(always)]
fn put_half(words: &mut [u32], at: usize, value: f16) {
    let shift = 16 * (at % 2);
    words[at / 2] = words[at / 2] & !(0xffff << shift) | u32::from(value.to_bits()) << shift;
}

/// Number `at` of a list of f16 in words.
pub fn half_at(words: &[u32], at: usize) -> f16 {
    f16::from_bits((words[at / 2] >> (16 * (at % 2))) as u16)
}

/// Rows of a table in groups, as a source of other layouts.
pub struct TableRows<'a> {
    bits: Bits,
    k: usize,
    groups: &'a [RowGroup],
}

impl TableRows<'_> {
    /// The words of an (n, k) table.
    ///
    /// Errors: words of another.
    pub fn new(bits: Bits, n: usize, k: usize, words: &[u32]) -> Result<TableRows<'_>> {
        let words = unpadded(words.len(), table_words(n, k)).map(|len| &words[..len])?;
        Ok(TableRows { bits, k, groups: bytemuck::cast_slice(words) })
    }

    fn row(&self, row: usize) -> &[RowGroup] {
        let len = self.k.div_ceil(GROUP);
        &self.groups[row * len..][..len]
    }
}

/// Words of an (n, k) table.
pub fn table_words(n: usize, k: usize) -> usize {
    n * k.div_ceil(GROUP) * RowGroup::WORDS
}

/// Words of a weight that has `expected` of them, of `found` in a file: behind them, words may fill
/// a cache line.
///
/// Errors: other numbers of words.
pub fn unpadded(found: usize, expected: usize) -> Result<usize> {
    if found < expected || found - expected >= crate::packed_weights::ALIGNMENT / size_of::<u32>() {
        return Err(Error::request(format!("a packed weight of {found} words: expected {expected}")));
    }
    Ok(expected)
}

impl RowSource for TableRows<'_> {
    fn read(&self, first_row: usize, dst: &mut [f32]) -> Result<()> {
        for (i, row) in dst.chunks_exact_mut(self.k).enumerate() {
            row.chunks_mut(GROUP).zip(self.row(first_row + i)).for_each(|(out, group)| group.values(out));
        }
        Ok(())
    }

    fn read_q8(&self, first_row: usize, dst: &mut [Group8]) -> Result<bool> {
        if self.bits != Bits::Eight {
            return Ok(false);
        }
        let rows = self.groups[first_row * self.k.div_ceil(GROUP)..].iter();
        dst.iter_mut().zip(rows).for_each(|(to, from)| *to = Group8 { scale: f16::from_f32(from.scale), codes: from.codes });
        Ok(true)
    }

    fn read_q4(&self, first_row: usize, dst: &mut [Group4]) -> Result<bool> {
        if self.bits != Bits::Four {
            return Ok(false);
        }
        let rows = self.groups[first_row * self.k.div_ceil(GROUP)..].iter();
        let group = |from: &RowGroup| Group4 {
            scale: f16::from_f32(from.scale),
            min: f16::from_f32(from.min),
            codes: from.codes.map(|code| code as u8),
        };
        dst.iter_mut().zip(rows).for_each(|(to, from)| *to = group(from));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put into a block comes out of it, beside its neighbours.
    #[test]
    fn blocks_hold_the_group_of_each_column() {
        let codes = |column: usize, k: usize| column * 37 + k * 11;
        let eight = |column| Group8 {
            scale: f16::from_f32(column as f32 - 3.5),
            codes: std::array::from_fn(|k| (codes(column, k) % 255) as u8 as i8),
        };
        let four = |column| Group4 {
            scale: f16::from_f32(column as f32 * 0.25),
            min: f16::from_f32(-(column as f32)),
            codes: std::array::from_fn(|k| (codes(column, k) % 16) as u8),
        };
        let (mut q8, mut q4) = ([0; Q8_WORDS], [0; Q4_WORDS]);
        for column in (0..COLUMNS).rev() {
            put_q8(&mut q8, column, &eight(column));
            put_q4(&mut q4, column, &four(column));
        }
        for column in 0..COLUMNS {
            assert_eq!((get_q8(&q8, column), get_q4(&q4, column)), (eight(column), four(column)));
        }
    }

    /// A table of groups becomes panels of the same groups.
    #[test]
    fn tables_become_panels() {
        let (n, k) = (35, 70);
        for bits in [Bits::Eight, Bits::Four] {
            let values: Vec<f32> = (0..n * k).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
            let groups = values.chunks(k).flat_map(|row| row.chunks(GROUP)).map(|values| RowGroup::from(Group::of(bits, values).unwrap()));
            let mut words: Vec<u32> = bytemuck::cast_slice(&groups.collect::<Vec<_>>()).to_vec();
            words.extend([0; 5]);
            let table = TableRows::new(bits, n, k, &words).unwrap();
            let panels = Panels { bits, n, k, source: &table };
            let mut found = vec![0; panels.words()];
            panels.fill(1, &mut found, &mut Vec::new(), |_, _| panic!("values of groups that are stored")).unwrap();
            let mut expected = vec![0; panels.words()];
            quantise_panel(bits, k, &values[COLUMNS * k..], &mut expected).unwrap();
            assert_eq!(found, expected, "{bits:?}");
            assert!(TableRows::new(bits, n, k, &words[..words.len() - 6]).is_err());
        }
    }
}
