//! Products with weights in groups of 8 or 4 bits.
//!
//! A packed weight is a list of panels of blocks ([`crate::backend::group_blocks`];
//! [`crate::cpu::simd::groups`] defines the products). Rows of x become groups once. A task takes
//! some panels and some rows: block by block, it unpacks the codes once and takes every row past
//! them, so a single row runs at the speed of the memory and many at that of the integer units.
//! Sums wait in L1.
//!
//! Integer products serve many rows as well as few: a pass of 128 rows takes nine tenths of its
//! time with f32 tiles on AVX2 in q8 and seven tenths in q4 (docs/quantised.md), so nothing is
//! widened.
#![forbid(unsafe_code)]

use std::ops::Deref;
use std::sync::OnceLock;

pub use crate::backend::group_blocks::Bits;
use crate::backend::group_blocks::{
    self, COLUMNS, Group, RowGroup, column_of, each_stored_row, matrix_words, panel_words, quantise_panel, table_words, unpadded,
};
use crate::backend::groups::GROUP;
use crate::backend::{Epilogue, RowSource};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::cuts::{cut_groups, group_of};
use crate::cpu::linear::epilogue::Output;
use crate::cpu::linear::residence::{AHEAD, Residence};
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Order;
use crate::cpu::read_rows::{READ_VALUES, read_in_parts};
use crate::cpu::simd::groups::ActivationGroup;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::Result;
use crate::packed_weights::PackedWords;

/// Rows that pass a block at once: their sums take 8 KiB.
const ROWS: usize = 64;

/// Bytes of x that a task's rows may have, a part of L2: they are read again for every panel.
const X_BYTES: usize = 192 << 10;

/// Words of its own, or those of a file.
enum Words {
    Own(Aligned<u32>),
    File(PackedWords),
}

impl Deref for Words {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        match self {
            Words::Own(words) => words,
            Words::File(words) => words,
        }
    }
}

/// The words of a weight that has `expected` of them.
fn words_of_file(words: PackedWords, expected: usize) -> Result<Words> {
    let len = unpadded(words.len(), expected)?;
    Ok(Words::File(words.part(0..len)))
}

/// An (n, k) weight in panels.
pub struct Packed {
    pub n: usize,
    pub k: usize,
    bits: Bits,
    /// (panels, groups) blocks. Columns past n are zeros.
    words: Words,
    by_rows: OnceLock<ByRows>,
    residence: Residence,
}

impl Packed {
    /// Reads the (n, k) rows of a panel at a time, on all threads.
    pub fn new(context: &CpuContext, bits: Bits, n: usize, k: usize, source: &dyn RowSource) -> Result<Packed> {
        let panels = group_blocks::Panels { bits, n, k, source };
        let mut words = Aligned::zeroed(matrix_words(bits, n, k))?;
        read_in_parts(context, &mut words, panels.words(), &|i, panel, room| {
            panels.fill(i, panel, room, |rows, panel| context.isa.run(Quantise { bits, k, rows, panel }))
        })?;
        Ok(Packed::with(context, bits, n, k, Words::Own(words)))
    }

    /// See [`super::Packed::of_words`].
    pub fn of_words(context: &CpuContext, bits: Bits, n: usize, k: usize, words: PackedWords) -> Result<Packed> {
        Ok(Packed::with(context, bits, n, k, words_of_file(words, matrix_words(bits, n, k))?))
    }

    fn with(context: &CpuContext, bits: Bits, n: usize, k: usize, words: Words) -> Packed {
        let residence = Residence::new(&context.packed_words, words.len());
        Packed { n, k, bits, words, by_rows: OnceLock::new(), residence }
    }

    pub fn words(&self) -> &[u32] {
        &self.words
    }

    fn panel(&self, panel: usize) -> &[u32] {
        let words = panel_words(self.bits, self.k);
        &self.words[panel * words..][..words]
    }

    /// What [`AHEAD`] of the panel's words is to be asked for: as many words, or what is left of
    /// them.
    fn ahead(&self, panel: usize) -> &[u32] {
        let words = panel_words(self.bits, self.k);
        let first = (panel * words + AHEAD).min(self.words.len());
        &self.words[first..self.words.len().min(first + words)]
    }

    /// The groups of a row.
    fn row(&self, row: usize) -> impl Iterator<Item = RowGroup> {
        column_of(self.bits, self.panel(row / COLUMNS), row % COLUMNS).map(RowGroup::from)
    }

    /// See [`super::Packed::rows`].
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.k)) {
            assert!((id as usize) < self.n, "token id {id} of a table of {} rows", self.n);
            for (group, out) in self.row(id as usize).zip(out.chunks_mut(GROUP)) {
                group.values(out);
            }
        }
    }

    /// See [`super::Packed::by_rows`].
    pub fn by_rows(&self, context: &CpuContext) -> Result<&ByRows> {
        if let Some(rows) = self.by_rows.get() {
            return Ok(rows);
        }
        let mut words = Aligned::zeroed(table_words(self.n, self.k))?;
        context.pool.chunks(&mut words, table_words(1, self.k), &|row, words| {
            for (words, group) in words.chunks_exact_mut(RowGroup::WORDS).zip(self.row(row)) {
                words.copy_from_slice(bytemuck::cast_slice(&[group]));
            }
        });
        Ok(self.by_rows.get_or_init(|| ByRows { n: self.n, k: self.k, bits: self.bits, words: Words::Own(words) }))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.words.len() + self.by_rows.get().map_or(0, |rows| rows.words.len())) * size_of::<u32>()
    }
}

/// The rows of a panel, (rows, k), as blocks.
struct Quantise<'a> {
    bits: Bits,
    k: usize,
    rows: &'a [f32],
    panel: &'a mut [u32],
}

impl Kernel for Quantise<'_> {
    type Output = Result<()>;
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> Result<()> {
        quantise_panel(self.bits, self.k, self.rows, self.panel)
    }
}

/// Rows (rows, k) as [`RowGroup`] of each.
struct QuantiseRows<'a> {
    bits: Bits,
    k: usize,
    rows: &'a [f32],
    words: &'a mut [u32],
}

impl Kernel for QuantiseRows<'_> {
    type Output = Result<()>;
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> Result<()> {
        let values = self.rows.chunks_exact(self.k).flat_map(|row| row.chunks(GROUP));
        for (words, values) in self.words.chunks_exact_mut(RowGroup::WORDS).zip(values) {
            words.copy_from_slice(bytemuck::cast_slice(&[RowGroup::from(Group::of(self.bits, values)?)]));
        }
        Ok(())
    }
}

/// The same values row by row, for lookups and for products with few and scattered rows.
pub struct ByRows {
    n: usize,
    k: usize,
    bits: Bits,
    /// (n, groups) [`RowGroup`].
    words: Words,
}

impl ByRows {
    /// Reads the rows of an (n, k) weight some at a time, on all threads.
    pub fn new(context: &CpuContext, bits: Bits, n: usize, k: usize, source: &dyn RowSource) -> Result<ByRows> {
        let row_words = table_words(1, k);
        let mut words = Aligned::zeroed(table_words(n, k))?;
        let at_once = (READ_VALUES / k).max(1);
        read_in_parts(context, &mut words, at_once * row_words, &|i, words, room| {
            let num_groups = k.div_ceil(GROUP);
            let rows = words.len() / row_words;
            let is_stored = each_stored_row(source, bits, i * at_once..i * at_once + rows, num_groups, |row, groups| {
                let groups: Vec<RowGroup> = groups.into_iter().map(RowGroup::from).collect();
                words[row * row_words..][..row_words].copy_from_slice(bytemuck::cast_slice(&groups));
            })?;
            if is_stored {
                return Ok(());
            }
            room.resize(rows * k, 0.0);
            source.read(i * at_once, room)?;
            context.isa.run(QuantiseRows { bits, k, rows: room, words })
        })?;
        Ok(ByRows { n, k, bits, words: Words::Own(words) })
    }

    /// See [`super::Packed::of_words`].
    pub fn of_words(bits: Bits, n: usize, k: usize, words: PackedWords) -> Result<ByRows> {
        let words = words_of_file(words, table_words(n, k))?;
        Ok(ByRows { n, k, bits, words })
    }

    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Width of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.words[..])
    }

    /// See [`super::Packed::rows`].
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.k)) {
            assert!((id as usize) < self.n, "token id {id} of a table of {} rows", self.n);
            for (group, out) in self.row(id).iter().zip(out.chunks_mut(GROUP)) {
                group.values(out);
            }
        }
    }

    fn row(&self, id: u32) -> &[RowGroup] {
        let words = self.words.len() / self.n;
        bytemuck::cast_slice(&self.words[id as usize * words..][..words])
    }

    /// See [`super::ByRows::products`]; with the bits of [`linear`].
    pub fn products(&self, x: &[f32], ids: &[u32], out: &mut [f32]) {
        let x: Vec<ActivationGroup> = x.chunks(GROUP).map(activations).collect();
        for (&id, out) in ids.iter().zip(out) {
            *out = 0.0;
            for (group, x) in self.row(id).iter().zip(&x) {
                let codes: &[i8; GROUP] = bytemuck::cast_ref(&x.codes);
                let product: i32 = group.codes.iter().zip(codes).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
                *out += product as f32 * (group.scale * x.scale);
                if self.bits == Bits::Four {
                    *out += group.min * x.scaled_sum;
                }
            }
        }
    }
}

/// Up to 32 activations as a group, zeros behind them.
#[inline(always)]
fn activations(x: &[f32]) -> ActivationGroup {
    let mut group = [0.0; GROUP];
    group[..x.len()].copy_from_slice(x);
    ActivationGroup::of(&group)
}

/// Words of an [`ActivationGroup`].
const ACTIVATION_WORDS: usize = size_of::<ActivationGroup>() / size_of::<u32>();

/// `x (rows, k)` as groups (groups, rows) in `scratch`.
fn groups_of<'a>(context: &CpuContext, rows: usize, k: usize, x: &[f32], scratch: &'a mut Aligned<u32>) -> Result<&'a [ActivationGroup]> {
    let num_groups = k.div_ceil(GROUP);
    let words = scratch.reserve(num_groups * rows * ACTIVATION_WORDS)?;
    let groups: &mut [ActivationGroup] = bytemuck::cast_slice_mut(words);
    let at_once = num_groups.div_ceil(4 * context.pool.threads());
    // An element costs about as much as four multiply-adds of a product.
    context.pool_for(4 * rows * k).chunks(groups, at_once * rows, &|i, groups| {
        context.isa.run(Activations { x, k, rows, first: i * at_once, groups });
    });
    Ok(groups)
}

/// Groups from `first` on of every row, (groups, rows).
struct Activations<'a> {
    /// (rows, k)
    x: &'a [f32],
    k: usize,
    rows: usize,
    first: usize,
    groups: &'a mut [ActivationGroup],
}

impl Kernel for Activations<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (i, groups) in self.groups.chunks_exact_mut(self.rows).enumerate() {
            let columns = (self.first + i) * GROUP..self.k.min((self.first + i + 1) * GROUP);
            for (row, group) in self.x.chunks_exact(self.k).zip(groups) {
                *group = match row[columns.clone()].try_into() {
                    Ok(whole) => ActivationGroup::of(whole),
                    Err(_) => activations(&row[columns.clone()]),
                };
            }
        }
    }
}

/// See [`super::linear`].
pub fn linear(
    context: &CpuContext,
    rows: usize,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out: &mut [f32],
) -> Result<()> {
    let Packed { n, k, .. } = *weight;
    if rows == 0 {
        return Ok(());
    }
    let mut scratch = context.words();
    let x = groups_of(context, rows, k, &x[..rows * k], &mut scratch)?;
    let panels = n.div_ceil(COLUMNS);
    let pool = context.pool_for(work(rows, n, k));
    let mut cuts = rows.div_ceil(tallest(k));
    let panels_at_once = panels_of_a_task(pool.threads(), rows.div_ceil(cuts), panels, k);
    let columns = panels.div_ceil(panels_at_once);
    if pool.threads() > 1 && columns * cuts < 4 * pool.threads() {
        cuts = (4 * pool.threads()).div_ceil(columns).min(rows.div_ceil(16)).max(cuts);
    }
    let mut row_bounds = context.spare_list();
    row_bounds.extend((0..=cuts).map(|i| i * rows / cuts));
    let (width, tile_width) = (epilogue.out_width(n), epilogue.out_width(panels_at_once * COLUMNS));
    pool.tiles(&mut out[..rows * width], width, &row_bounds, tile_width, Order::ColumnsFirst, &|tile| {
        context.isa.run(Panels { x, rows, weight, output: Output { tile, bias, epilogue } });
    });
    context.keep_spare_list(row_bounds);
    Ok(())
}

/// See [`super::grouped`].
pub fn grouped(context: &CpuContext, bounds: &[usize], x: &[f32], weights: &[&Packed], epilogue: Epilogue, out: &mut [f32]) -> Result<()> {
    let (Some(&rows), Some(&&Packed { n, k, .. })) = (bounds.last(), weights.first()) else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    let mut scratch = context.words();
    let x = groups_of(context, rows, k, &x[..rows * k], &mut scratch)?;
    let pool = context.pool_for(work(rows, n, k));
    let row_bounds = cut_groups(bounds, tallest(k));
    let height = rows.div_ceil(row_bounds.len() - 1);
    let panels_at_once = panels_of_a_task(pool.threads(), height, n.div_ceil(COLUMNS), k);
    let (width, tile_width) = (epilogue.out_width(n), epilogue.out_width(panels_at_once * COLUMNS));
    pool.tiles(&mut out[..rows * width], width, &row_bounds, tile_width, Order::ColumnsFirst, &|tile| {
        let weight = weights[group_of(bounds, tile.rows.start)];
        context.isa.run(Panels { x, rows, weight, output: Output { tile, bias: None, epilogue } });
    });
    Ok(())
}

/// What a product costs beside one in f32, in its multiply-adds: the codes of a block are unpacked
/// once, which takes about as long as two rows.
fn work(rows: usize, n: usize, k: usize) -> usize {
    (rows + 2) * n * k / 2
}

/// Rows of a task at most.
fn tallest(k: usize) -> usize {
    (X_BYTES / (k.div_ceil(GROUP) * size_of::<ActivationGroup>())).clamp(16, 1024)
}

/// Panels of a task, so that the threads end together, and a task is worth a microsecond.
fn panels_of_a_task(threads: usize, rows: usize, panels: usize, k: usize) -> usize {
    if threads == 1 {
        return panels;
    }
    let smallest = 1 << 16;
    (panels / (8 * threads)).max(smallest / work(rows, COLUMNS, k).max(1)).clamp(1, panels)
}

/// The panels and rows of one output tile.
struct Panels<'a, 'b> {
    /// (groups, rows)
    x: &'a [ActivationGroup],
    rows: usize,
    weight: &'a Packed,
    output: Output<'a, 'b>,
}

impl Kernel for Panels<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.output.tile.rows.clone();
        let panel_width = self.output.epilogue.out_width(COLUMNS);
        let panels = self.output.tile.cols.start / panel_width..self.output.tile.cols.end.div_ceil(panel_width);
        let mut sums = Sums([[0.0; COLUMNS]; ROWS]);
        let streams = self.weight.residence.streams();
        for panel in panels {
            for first in rows.clone().step_by(ROWS) {
                let rows = first..rows.end.min(first + ROWS);
                let sums = &mut sums.0[..rows.len()];
                sums.fill([0.0; COLUMNS]);
                let x = &self.x[rows.start..];
                let words = self.weight.panel(panel);
                // The rows that pass first bring the panel for all.
                let ahead = if streams && rows.start == self.output.tile.rows.start { self.weight.ahead(panel) } else { &[] };
                simd.outlined(Panel { bits: self.weight.bits, words, ahead, x, x_stride: self.rows, sums });
                self.output.finish(simd, rows, panel * COLUMNS, COLUMNS / LANES, sums.as_flattened().as_chunks().0);
            }
        }
    }
}

/// Sums of the rows, on a cache line.
#[repr(align(64))]
struct Sums([[f32; COLUMNS]; ROWS]);

/// All groups of a panel.
struct Panel<'a> {
    bits: Bits,
    words: &'a [u32],
    /// Words to prefetch, a block of them with each block.
    ahead: &'a [u32],
    /// The rows' groups, `x_stride` apart.
    x: &'a [ActivationGroup],
    x_stride: usize,
    sums: &'a mut [[f32; COLUMNS]],
}

impl Kernel for Panel<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let block_words = self.bits.block_words();
        let blocks = self.words.chunks_exact(block_words).zip(self.x.chunks(self.x_stride));
        let mut ahead = self.ahead.chunks(block_words);
        // Not in closures, which would not be compiled for the instruction set.
        for (block, x) in blocks {
            for line in ahead.next().unwrap_or_default().chunks(LANES) {
                simd.prefetch(line.as_ptr().addr());
            }
            let x = &x[..self.sums.len()];
            match self.bits {
                Bits::Eight => simd.add_q8(block.try_into().expect("a block of q8"), x, self.sums),
                Bits::Four => simd.add_q4(block.try_into().expect("a block of q4"), x, self.sums),
            }
        }
    }
}
