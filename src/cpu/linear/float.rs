//! Products with weights of f32 or bf16.
//!
//! A packed weight is a list of panels; a panel is `(steps, columns)` words, a step being one k in
//! f32 or two neighbouring k in bf16 (the layout `vdpbf16ps` reads). It has the columns of the
//! register tile: 64 on AVX-512, 16 elsewhere ([`Simd::PANEL`]). One task takes some panels and a
//! range of rows and walks the rows in tiles, so a panel comes from memory once and from the caches
//! afterwards.
//!
//! A tile keeps its sums in registers: 6 rows by a panel, 24 vectors on AVX-512 and 6 elsewhere.
//! Few rows take several panels side by side, so that enough sums are in flight to hide the latency
//! of the multiply. On AVX-512, seven to twelve rows take one tall tile of half a panel: a panel's
//! words come from L2 at about 24 bytes a cycle, and each read then serves all rows. Accumulation
//! over k is in ascending order for every shape, hence a row's result does not depend on its
//! neighbours.
#![forbid(unsafe_code)]

use std::sync::OnceLock;

use crate::backend::{DType, Epilogue, RowSource};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::cuts::{cut_groups, group_of};
use crate::cpu::linear::epilogue::Output;
use crate::cpu::linear::residence::{AHEAD, Residence};
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Order;
use crate::cpu::read_rows::read_in_parts;
use crate::cpu::simd::tile::{self, Piece};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::Result;

/// What stays in a core's L2 while all rows of a task go by. More than L2 of 1 MiB gives was not
/// measured to help.
#[derive(Clone, Copy)]
struct Blocking {
    /// Words of a part of a panel. The part that comes next lies beside it, so that both take at
    /// most half of L2; shorter ones cost more calls of the tile.
    part_words: usize,
    /// Steps of x, over one part and the rows of a task.
    x_steps: usize,
}

impl Blocking {
    fn of(context: &CpuContext, dtype: DType) -> Blocking {
        let l2_words = context.l2_bytes / size_of::<u32>();
        let x_words = (l2_words * 2 / 5).min(100 << 10);
        Blocking { part_words: (l2_words / 4).min(32 << 10), x_steps: x_words / context.isa.x_words(dtype == DType::Bf16) }
    }

    /// Steps of a part: equal parts of at most `part_words`.
    fn part(self, steps: usize, panel_width: usize) -> usize {
        steps.div_ceil((steps * panel_width).div_ceil(self.part_words))
    }
}

/// Dot products that are computed side by side, so that the latency of one is hidden by the others.
const DOTS: usize = 8;

/// An (n, k) weight in panels.
pub struct Packed {
    pub n: usize,
    pub k: usize,
    dtype: DType,
    /// Words along k: k in f32, k / 2 rounded up in bf16.
    steps: usize,
    /// Columns of a panel: [`Simd::PANEL`] of the context.
    panel_width: usize,
    /// (panels, steps, panel width); columns past n and the odd half past k are zero.
    words: Aligned<u32>,
    by_rows: OnceLock<ByRows>,
    residence: Residence,
}

impl Packed {
    /// Reads the (n, k) rows sixteen at a time, a vector of columns of a panel, on all threads.
    pub fn new(context: &CpuContext, dtype: DType, n: usize, k: usize, source: &dyn RowSource) -> Result<Packed> {
        let (steps, panel_width) = (steps(dtype, k), context.isa.panel());
        let words = Aligned::zeroed(n.div_ceil(panel_width) * steps * panel_width)?;
        let residence = Residence::new(&context.packed_words, words.len());
        let mut packed = Packed { n, k, dtype, steps, panel_width, words, by_rows: OnceLock::new(), residence };
        read_in_parts(context, &mut packed.words, steps * panel_width, &|i, panel, room| {
            room.resize(LANES * (k + steps), 0.0);
            let (wide, words) = room.split_at_mut(LANES * k);
            let words: &mut [u32] = bytemuck::cast_slice_mut(words);
            for column in (0..panel_width.min(n - i * panel_width)).step_by(LANES) {
                let first = i * panel_width + column;
                let height = LANES.min(n - first);
                let wide = &mut wide[..height * k];
                source.read(first, wide)?;
                if dtype == DType::F32 {
                    pack_columns(bytemuck::cast_slice(wide), steps, panel_width, &mut panel[column..]);
                } else {
                    let words = &mut words[..height * steps];
                    context.isa.run(Round { x: wide, k, words: bytemuck::cast_slice_mut(words) });
                    pack_columns(words, steps, panel_width, &mut panel[column..]);
                }
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// Rows of the weight by their index, as f32: `out[i, :] = weight[ids[i], :]`. They lie a line
    /// of the panel apart, which costs a few microseconds a row.
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.k)) {
            let id = id as usize;
            assert!(id < self.n, "token id {id} of a table of {} rows", self.n);
            let words = self.panel(id / self.panel_width).iter().skip(id % self.panel_width).step_by(self.panel_width);
            match self.dtype {
                DType::F32 => out.iter_mut().zip(words).for_each(|(out, word)| *out = f32::from_bits(*word)),
                DType::Bf16 => {
                    for (out, word) in out.chunks_mut(2).zip(words) {
                        let pair = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
                        out.copy_from_slice(&pair[..out.len()]);
                    }
                }
            }
        }
    }

    fn panel(&self, panel: usize) -> &[u32] {
        let len = self.steps * self.panel_width;
        &self.words[panel * len..][..len]
    }

    /// The weight by rows, made of the panels when it is first asked for.
    ///
    /// Errors: memory that the system refuses.
    pub fn by_rows(&self, context: &CpuContext) -> Result<&ByRows> {
        if let Some(rows) = self.by_rows.get() {
            return Ok(rows);
        }
        let stride = self.steps.next_multiple_of(LANES);
        let mut words = Aligned::zeroed(self.n * stride)?;
        context.pool_for(self.words.len()).chunks(&mut words, self.panel_width * stride, &|panel, rows| {
            let count = rows.len() / stride;
            for (step, line) in self.panel(panel).chunks_exact(self.panel_width).enumerate() {
                for (row, word) in line[..count].iter().enumerate() {
                    rows[row * stride + step] = *word;
                }
            }
        });
        Ok(self.by_rows.get_or_init(|| ByRows { dtype: self.dtype, k: self.k, stride, words }))
    }

    /// Bytes of the packed weight.
    pub fn bytes(&self) -> usize {
        (self.words.len() + self.by_rows.get().map_or(0, |rows| rows.words.len())) * size_of::<u32>()
    }
}

/// The same (n, k) values row by row, for products with few and scattered rows.
pub struct ByRows {
    dtype: DType,
    k: usize,
    /// Words of a row: whole vectors, with zeros at its end.
    stride: usize,
    words: Aligned<u32>,
}

impl ByRows {
    /// See [`super::ByRows::products`].
    pub fn products(&self, context: &CpuContext, x: &[f32], ids: &[u32], out: &mut [f32]) {
        let x = self.words_of(context, x);
        context.isa.run(Dots { x: &x, weight: self, ids, out });
    }

    /// Row `id` in vectors.
    fn row(&self, id: u32) -> &[[u32; LANES]] {
        self.words[id as usize * self.stride..][..self.stride].as_chunks().0
    }

    /// `x (k)` as the words that a row is multiplied with: rounded to bf16 pairs where the weight
    /// is bf16.
    fn words_of(&self, context: &CpuContext, x: &[f32]) -> Vec<u32> {
        let mut words = vec![0; self.stride];
        match self.dtype {
            DType::F32 => words[..self.k].copy_from_slice(bytemuck::cast_slice(x)),
            DType::Bf16 => {
                let steps = steps(self.dtype, self.k);
                context.isa.run(Round { x, k: self.k, words: bytemuck::cast_slice_mut(&mut words[..steps]) });
            }
        }
        words
    }
}

/// Words that k values take.
fn steps(dtype: DType, k: usize) -> usize {
    k.div_ceil(4 / dtype.bytes())
}

/// `words (up to 16, steps)` into the first columns of `panel (steps, width)`.
fn pack_columns(words: &[u32], steps: usize, width: usize, panel: &mut [u32]) {
    // Sixteen steps at a time: what is read and what is written stay in L1, and all columns of a
    // step are one line.
    const BLOCK: usize = 16;
    for (block, panel) in panel.chunks_mut(BLOCK * width).enumerate() {
        for (column, words) in words.chunks_exact(steps).enumerate() {
            for (step, word) in panel.chunks_mut(width).zip(&words[block * BLOCK..]) {
                step[column] = *word;
            }
        }
    }
}

/// `x (rows, k)` as the words of a product, (rows, steps) or (rows, 2 steps): itself in f32; in
/// `scratch` and rounded to bf16 otherwise, as pairs or as f32 ([`Simd::x_words`]).
fn words_of<'a>(
    context: &CpuContext,
    dtype: DType,
    rows: usize,
    k: usize,
    x: &'a [f32],
    scratch: &'a mut Aligned<u32>,
) -> Result<&'a [u32]> {
    let x = &x[..rows * k];
    if dtype == DType::F32 {
        return Ok(bytemuck::cast_slice(x));
    }
    let steps = steps(dtype, k);
    let stride = steps * context.isa.x_words(true);
    let words = scratch.reserve(rows * stride)?;
    // 16 KiB of x per task at least.
    let rows_at_once = (4096 / k.max(1)).max(rows.div_ceil(4 * context.pool.threads())).max(1);
    // An element costs about as much as eight multiply-adds of a product.
    context.pool_for(8 * rows * k).chunks(words, rows_at_once * stride, &|i, words| {
        context.isa.run(XWords { x: &x[i * rows_at_once * k..], k, words });
    });
    Ok(words)
}

/// Rounds rows of k f32 to bf16, as x of a product wants them.
struct XWords<'a> {
    x: &'a [f32],
    k: usize,
    words: &'a mut [u32],
}

impl Kernel for XWords<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::MULTIPLIES_PAIRS {
            return Round { x: self.x, k: self.k, words: bytemuck::cast_slice_mut(self.words) }.run(simd);
        }
        let width = self.k.next_multiple_of(2);
        let words: &mut [f32] = bytemuck::cast_slice_mut(self.words);
        for (x, out) in self.x.chunks_exact(self.k).zip(words.chunks_exact_mut(width)) {
            let mut pairs = [0; LANES];
            let (blocks, tail) = x.as_chunks::<LANES>();
            let (out_blocks, out_tail) = out.as_chunks_mut::<LANES>();
            for (x, out) in blocks.iter().zip(out_blocks.iter_mut()) {
                simd.store_bf16(simd.load(x), &mut pairs);
                simd.store(simd.load_bf16(&pairs), out);
            }
            // An odd k has a zero at its end, which may complete a block.
            let mut last = [0.0; LANES];
            last[..tail.len()].copy_from_slice(tail);
            simd.store_bf16(simd.load(&last), &mut pairs);
            simd.store(simd.load_bf16(&pairs), &mut last);
            match out_blocks.get_mut(blocks.len()) {
                Some(out) => *out = last,
                None => out_tail.copy_from_slice(&last[..out_tail.len()]),
            }
        }
    }
}

/// Rounds rows of k f32 to rows of k bf16, padded with a zero to a whole word.
pub struct Round<'a> {
    pub x: &'a [f32],
    pub k: usize,
    pub words: &'a mut [u16],
}

impl Kernel for Round<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.k.next_multiple_of(2);
        for (x, words) in self.x.chunks_exact(self.k).zip(self.words.chunks_exact_mut(width)) {
            let (blocks, tail) = x.as_chunks::<LANES>();
            let (out_blocks, out_tail) = words.as_chunks_mut::<LANES>();
            for (x, out) in blocks.iter().zip(out_blocks.iter_mut()) {
                simd.store_bf16(simd.load(x), out);
            }
            // An odd k that fills its last vector up to one half leaves no tail in x's blocks but
            // may in the words'.
            let mut last = [0.0; LANES];
            last[..tail.len()].copy_from_slice(tail);
            let mut rounded = [0; LANES];
            simd.store_bf16(simd.load(&last), &mut rounded);
            match out_blocks.get_mut(blocks.len()) {
                Some(out) => *out = rounded,
                None => out_tail.copy_from_slice(&rounded[..out_tail.len()]),
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
    let Packed { n, k, steps, panel_width, .. } = *weight;
    if rows == 0 {
        return Ok(());
    }
    let mut scratch = context.words();
    let x = words_of(context, weight.dtype, rows, k, x, &mut scratch)?;
    let pool = context.pool_for(rows * n * steps);
    let blocking = Blocking::of(context, weight.dtype);
    let (cuts, columns) = divide(blocking, pool.threads(), rows, n, panel_width, steps);
    let mut row_bounds = context.spare_list();
    row_bounds.extend((0..=cuts).map(|i| i * rows / cuts));
    let (width, tile_width) = (epilogue.out_width(n), epilogue.out_width(columns));
    pool.tiles(&mut out[..rows * width], width, &row_bounds, tile_width, Order::ColumnsFirst, &|tile| {
        context.isa.run(Panels { blocking, x, weight, output: Output { tile, bias, epilogue } });
    });
    context.keep_spare_list(row_bounds);
    Ok(())
}

/// See [`super::grouped`].
pub fn grouped(context: &CpuContext, bounds: &[usize], x: &[f32], weights: &[&Packed], epilogue: Epilogue, out: &mut [f32]) -> Result<()> {
    let (Some(&rows), Some(&&Packed { n, k, steps, panel_width, dtype, .. })) = (bounds.last(), weights.first()) else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    let mut scratch = context.words();
    let x = words_of(context, dtype, rows, k, x, &mut scratch)?;
    let pool = context.pool_for(rows * n * steps);
    // Groups that outgrow L2 are cut as a product alone would be.
    let blocking = Blocking::of(context, dtype);
    let tallest = (blocking.x_steps / blocking.part(steps, panel_width)).clamp(1, 96);
    let row_bounds = cut_groups(bounds, tallest);
    let tasks = if pool.threads() > 1 { (8 * pool.threads()).div_ceil(row_bounds.len() - 1) } else { 1 };
    let columns = round_columns(n.div_ceil(tasks), panel_width);
    let (width, tile_width) = (epilogue.out_width(n), epilogue.out_width(columns));
    pool.tiles(&mut out[..rows * width], width, &row_bounds, tile_width, Order::ColumnsFirst, &|tile| {
        let weight = weights[group_of(bounds, tile.rows.start)];
        context.isa.run(Panels { blocking, x, weight, output: Output { tile, bias: None, epilogue } });
    });
    Ok(())
}

/// Into how many parts the rows are cut, and the columns of a task. Rows are cut where x outgrows
/// L2, or where the columns are too few for the threads (every cut reads the panels again). Columns
/// are cut so that the threads end together, into tasks worth half a microsecond at least.
fn divide(blocking: Blocking, threads: usize, rows: usize, n: usize, panel_width: usize, steps: usize) -> (usize, usize) {
    let mut cuts = (rows * blocking.part(steps, panel_width)).div_ceil(blocking.x_steps).min(rows.div_ceil(96));
    let mut columns = n;
    if threads > 1 {
        let smallest = 1 << 16;
        let column_work = rows.div_ceil(cuts) * steps;
        columns = round_columns((n / (8 * threads)).max(smallest / column_work.max(1)).min(n), panel_width);
        let tasks = n.div_ceil(columns);
        if tasks * cuts < 4 * threads {
            cuts = (4 * threads).div_ceil(tasks).min(rows.div_ceil(24)).max(cuts);
        }
    }
    (cuts, columns)
}

/// Columns of a task, at least one, as whole panels, and a multiple of what few rows read side by
/// side where there is more than one.
fn round_columns(columns: usize, panel_width: usize) -> usize {
    match columns.div_ceil(panel_width) {
        0 | 1 => panel_width,
        _ => columns.next_multiple_of(2 * panel_width),
    }
}

/// The panels and rows of one output tile.
struct Panels<'a, 'b> {
    blocking: Blocking,
    /// See [`words_of`].
    x: &'a [u32],
    weight: &'a Packed,
    output: Output<'a, 'b>,
}

impl Kernel for Panels<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        match self.weight.dtype {
            DType::F32 => self.panels::<S, false>(simd),
            DType::Bf16 => self.panels::<S, true>(simd),
        }
    }
}

/// Position of a register tile: `rows` rows from `row` on, panels from `panel` on, steps
/// `first_step..last_step`.
#[derive(Clone, Copy)]
struct At {
    row: usize,
    rows: usize,
    panel: usize,
    first_step: usize,
    last_step: usize,
    /// First word of what the tile prefetches, and words for each step.
    ahead: usize,
    ahead_step: usize,
}

/// Most vectors of sums of a tile.
const SUMS: usize = 24;

/// Sums of a tile, on a cache line.
#[repr(align(64))]
struct Sums([[f32; LANES]; SUMS]);

impl Panels<'_, '_> {
    #[inline(always)]
    fn panels<S: Simd, const BF16: bool>(&mut self, simd: S) {
        let steps = self.weight.steps;
        let rows = self.output.tile.rows.clone();
        assert!(self.weight.panel_width == S::PANEL, "panels of {} columns, packed for another set", self.weight.panel_width);
        let panel_width = self.output.epilogue.out_width(S::PANEL);
        let panels = self.output.tile.cols.start / panel_width..self.output.tile.cols.end.div_ceil(panel_width);
        let streams = self.weight.residence.streams();
        let tall = S::WIDE && !streams && (7..=12).contains(&rows.len());
        let tallest = if BF16 { S::BF16_ROWS } else { 6 };
        let blocks = if tall { 1 } else { rows.len().div_ceil(tallest) };
        let part = if blocks == 1 { steps } else { self.blocking.part(steps, S::PANEL) };
        // Where k is walked in parts, the sums of every block wait for the next part.
        let mut one = Sums([[0.0; LANES]; SUMS]);
        let mut all = Aligned::<f32>::zeroed(if part < steps { blocks * SUMS * LANES } else { 0 }).expect("a tile's sums fit");
        let (all, _) = all.as_chunks_mut::<LANES>();
        let mut panel = panels.start;
        while panel < panels.end {
            let width = if S::WIDE && rows.len() <= 2 { 2.min(panels.end - panel) } else { 1 };
            let mut first_step = 0;
            while first_step < steps {
                let last_step = steps.min(first_step + part);
                for block in 0..blocks {
                    // Blocks of nearly equal height: one of two rows would wait for its own sums.
                    let row = rows.start + block * rows.len() / blocks;
                    let height = rows.start + (block + 1) * rows.len() / blocks - row;
                    let here = (panel * steps + first_step) * S::PANEL;
                    let (ahead, ahead_step) = ahead::<S>(streams && width == 1, blocks, block, (last_step - first_step) * S::PANEL);
                    let at = At { row, rows: height, panel, first_step, last_step, ahead: here + ahead, ahead_step };
                    let sums = if all.is_empty() { &mut one.0 } else { &mut all[block * SUMS..] };
                    if !S::WIDE {
                        self.columns::<S, BF16, 1>(simd, at, 0, sums, |simd, rows, product| {
                            if ahead_step == 0 { product.run::<S, BF16, 0>(simd, rows) } else { product.run::<S, BF16, 1>(simd, rows) }
                        });
                        continue;
                    }
                    if tall {
                        let run = |simd, rows, product: tile::Product<2>| product.run_tall::<S, BF16>(simd, rows);
                        self.columns::<S, BF16, 2>(simd, at, 0, sums, run);
                        self.columns::<S, BF16, 2>(simd, at, S::PANEL / 2, sums, run);
                    } else if width == 2 {
                        self.columns::<S, BF16, 8>(simd, at, 0, sums, |simd, rows, product| product.run_wide::<S, BF16>(simd, rows));
                    } else {
                        self.columns::<S, BF16, 4>(simd, at, 0, sums, |simd, rows, product| match ahead_step {
                            0 => product.run::<S, BF16, 0>(simd, rows),
                            LANES => product.run::<S, BF16, 1>(simd, rows),
                            _ => product.run::<S, BF16, 4>(simd, rows),
                        });
                    }
                }
                first_step = last_step;
            }
            panel += width;
        }
    }

    /// One register tile from `column` of the panel on: the product by `run` into `sums`, then, at
    /// the end of k, the output.
    #[inline(always)]
    fn columns<S: Simd, const BF16: bool, const NV: usize>(
        &mut self,
        simd: S,
        at: At,
        column: usize,
        sums: &mut [[f32; LANES]],
        run: impl Fn(S, usize, tile::Product<NV>),
    ) {
        let per_panel = S::PANEL / LANES;
        let Panels { x, weight, .. } = *self;
        let steps = weight.steps;
        let col = at.panel * S::PANEL + column;
        if self.output.epilogue.out_width(col) >= self.output.tile.cols.end {
            return;
        }
        let mut b = [&weight.words[..]; NV];
        for (v, b) in b.iter_mut().enumerate() {
            *b = &weight.panel(at.panel + v / per_panel)[at.first_step * S::PANEL + column + v % per_panel * LANES..];
        }
        let pieces = [Piece { steps: at.last_step - at.first_step, b }];
        let a_stride = steps * S::x_words(BF16);
        let a = &x[at.row * a_stride + at.first_step * S::x_words(BF16)..];
        let fresh = at.first_step == 0;
        // What would lie past the weight is replaced by its end.
        let ahead_len = at.ahead_step * pieces[0].steps;
        let ahead = &weight.words[at.ahead.min(weight.words.len() - ahead_len)..][..ahead_len];
        let product = tile::Product {
            a,
            a_stride,
            pieces: &pieces,
            b_stride: S::PANEL,
            sums,
            sums_stride: NV,
            fresh,
            ahead,
            ahead_step: at.ahead_step,
        };
        run(simd, at.rows, product);
        if at.last_step == steps {
            self.output.finish(simd, at.row..at.row + at.rows, col, NV, sums);
        }
    }
}

/// What block `block` of `blocks` prefetches while it meets a part of a panel: words from the
/// part's beginning to the first, and words for each step. One block asks for what it will read
/// itself, several for the part that comes next.
#[inline(always)]
fn ahead<S: Simd>(greedy: bool, blocks: usize, block: usize, part_words: usize) -> (usize, usize) {
    match blocks {
        1 if S::WIDE && greedy => (AHEAD, 4 * LANES),
        1 => (AHEAD, LANES),
        // Of more than three blocks, the first four ask for a line a step and the others again for
        // the last lines; spread over all, the requests come 5 % too late.
        2 | 3 if S::WIDE => {
            if block == 0 {
                (part_words, 4 * LANES)
            } else {
                (0, 0)
            }
        }
        _ if S::WIDE => (part_words + block.min(3) * part_words / 4, LANES),
        // A step has one line, and one block would ask faster than the memory delivers.
        _ => {
            let asking = 1 << blocks.min(8).ilog2();
            if block < asking { (part_words + block * part_words / asking, LANES / asking) } else { (0, 0) }
        }
    }
}

/// `out[i] = x . row ids[i]`: lane l takes words l, l + 16, ... in ascending order, then the lanes
/// are summed.
struct Dots<'a> {
    x: &'a [u32],
    weight: &'a ByRows,
    ids: &'a [u32],
    out: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.dtype {
            DType::F32 => self.dots::<S, false>(simd),
            DType::Bf16 => self.dots::<S, true>(simd),
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn dots<S: Simd, const BF16: bool>(self, simd: S) {
        let (x, _) = self.x.as_chunks::<LANES>();
        for (ids, out) in self.ids.chunks(DOTS).zip(self.out.chunks_mut(DOTS)) {
            // The places of a short group hold its last row again.
            let mut rows = [&x[..0]; DOTS];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = self.weight.row(ids[i.min(ids.len() - 1)]);
            }
            let mut sums = [simd.splat(0.0); DOTS];
            for (block, x) in x.iter().enumerate() {
                let x = simd.words(x);
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let w = simd.words(&row[block]);
                    *sum = if BF16 { simd.step_bf16(*sum, x, w) } else { simd.step_f32(*sum, x, w) };
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = simd.sum(sum);
            }
        }
    }
}
