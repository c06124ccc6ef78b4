//! Matrix products with weights packed once: `out (rows, n) <- epilogue(x (rows, k) W^T + bias)`.
//!
//! A packed weight is a list of panels of 64 columns; a panel is `(steps, 64)` words, a step being one k in f32 or two
//! neighbouring k in bf16 (the layout `vdpbf16ps` reads). One task takes a few panels and a range of rows: it walks the rows
//! in tiles of up to six, so the panel comes from memory once and from L2 afterwards. Accumulation over k is in ascending
//! order for every tile shape, hence a row's result does not depend on its neighbours.
#![forbid(unsafe_code)]

use crate::backend::{DType, Epilogue, RowSource};
use crate::cpu::Machine;
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Tile;
use crate::cpu::simd::tile::{MAX_ROWS, accumulate};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::Result;

/// Columns of a panel: four vectors, the width of the widest register tile.
pub const PANEL: usize = 64;

/// Steps accumulated before a tile moves on: 2048 steps of a panel are 512 KiB, half of a core's L2.
const MAX_STEPS: usize = 2048;

/// An (n, k) weight in panels.
pub struct Packed {
    pub n: usize,
    pub k: usize,
    dtype: DType,
    /// Words along k: k in f32, k / 2 rounded up in bf16.
    steps: usize,
    /// (panels, steps, 64); columns past n and the odd half past k are zero.
    words: Aligned<u32>,
}

impl Packed {
    /// Reads the (n, k) rows a few panels at a time.
    pub fn new(machine: &Machine, dtype: DType, n: usize, k: usize, source: &mut RowSource) -> Result<Packed> {
        let steps = steps(dtype, k);
        let mut packed = Packed { n, k, dtype, steps, words: Aligned::zeroed(n.div_ceil(PANEL) * steps * PANEL) };
        let panels_at_once = 2 * machine.pool.threads();
        let mut rows = vec![0.0; panels_at_once.min(n.div_ceil(PANEL)) * PANEL * k];
        if packed.words.is_empty() {
            return Ok(packed);
        }
        for (group, panels) in packed.words.chunks_mut(panels_at_once * steps * PANEL).enumerate() {
            let first = group * panels_at_once * PANEL;
            let rows = &mut rows[..(n - first).min(panels_at_once * PANEL) * k];
            source(first, rows)?;
            machine.pool.chunks(panels, steps * PANEL, &|i, panel| {
                pack_panel(dtype, &rows[i * PANEL * k..rows.len().min((i + 1) * PANEL * k)], k, panel);
            });
        }
        Ok(packed)
    }

    fn panel(&self, panel: usize) -> &[u32] {
        &self.words[panel * self.steps * PANEL..][..self.steps * PANEL]
    }

    /// Bytes of the packed weight.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }
}

/// Words that k values take.
fn steps(dtype: DType, k: usize) -> usize {
    k.div_ceil(4 / dtype.bytes())
}

/// `rows (up to 64, k)` into `panel (steps, 64)`.
fn pack_panel(dtype: DType, rows: &[f32], k: usize, panel: &mut [u32]) {
    // Sixteen steps at a time: the 4 KiB of the panel being written stay in L1 while the columns go by.
    const BLOCK: usize = 16;
    for (block, panel) in panel.chunks_mut(BLOCK * PANEL).enumerate() {
        for (column, row) in rows.chunks_exact(k).enumerate() {
            for (i, step) in panel.chunks_exact_mut(PANEL).enumerate() {
                let at = block * BLOCK + i;
                step[column] = match dtype {
                    DType::F32 => row[at].to_bits(),
                    DType::Bf16 => {
                        let half = |at: usize| row.get(at).map_or(0, |&x| u32::from(half::bf16::from_f32(x).to_bits()));
                        half(2 * at) | half(2 * at + 1) << 16
                    }
                };
            }
        }
    }
}

/// `x (rows, k)` as words `(rows, steps)`: itself in f32, rounded to bf16 pairs in `scratch` otherwise.
fn words_of<'a>(machine: &Machine, dtype: DType, rows: usize, k: usize, x: &'a [f32], scratch: &'a mut Aligned<u32>) -> &'a [u32] {
    let x = &x[..rows * k];
    if dtype == DType::F32 {
        return bytemuck::cast_slice(x);
    }
    let steps = steps(dtype, k);
    let words = scratch.reserve(rows * steps);
    // 16 KiB of x per task at least.
    let rows_at_once = (4096 / k.max(1)).max(rows.div_ceil(4 * machine.pool.threads())).max(1);
    machine.pool.chunks(words, rows_at_once * steps, &|i, words| {
        let x = &x[i * rows_at_once * k..];
        machine.isa.run(Round { x, k, words: bytemuck::cast_slice_mut(words) });
    });
    words
}

/// Rounds rows of k f32 to rows of k bf16, padded with a zero to a whole word.
struct Round<'a> {
    x: &'a [f32],
    k: usize,
    words: &'a mut [u16],
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
            // An odd k that fills its last vector up to one half leaves no tail in x's blocks but may in the words'.
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

/// What one product needs, shared by its tasks.
#[derive(Clone, Copy)]
struct Product<'a> {
    /// (rows, steps)
    x: &'a [u32],
    weight: &'a Packed,
    bias: Option<&'a [f32]>,
    epilogue: Epilogue,
}

/// See [`crate::backend::Backend::linear`]. `x` holds at least rows * k, `out` at least rows * n.
pub fn linear(machine: &Machine, rows: usize, x: &[f32], weight: &Packed, bias: Option<&[f32]>, epilogue: Epilogue, out: &mut [f32]) {
    let Packed { n, k, steps, .. } = *weight;
    if rows == 0 || n == 0 {
        return;
    }
    let mut scratch = machine.words();
    let x = words_of(machine, weight.dtype, rows, k, x, &mut scratch);
    let product = Product { x, weight, bias, epilogue };
    let panels = n.div_ceil(PANEL);
    let pool = machine.pool_for(rows * panels * PANEL * steps);
    let (row_bounds, panels_at_once) = divide(pool.threads(), rows, panels, steps);
    pool.tiles(&mut out[..rows * n], n, &row_bounds, panels_at_once * PANEL, &|tile| {
        machine.isa.run(Panels { product, tile });
    });
}

/// Row bounds and panels of a task. Enough tasks for the threads to end together, each worth at least half a microsecond;
/// rows are cut only when the panels are too few, since every cut reads the panel again.
fn divide(threads: usize, rows: usize, panels: usize, steps: usize) -> (Vec<usize>, usize) {
    if threads == 1 {
        return (vec![0, rows], panels);
    }
    let wanted = 8 * threads;
    let smallest = 1 << 16;
    let panel_work = rows * steps * PANEL;
    let panels_at_once = (panels / wanted).max(smallest / panel_work.max(1)).max(1);
    let columns = panels.div_ceil(panels_at_once);
    let cuts = if columns < 4 * threads { (4 * threads).div_ceil(columns).min(rows.div_ceil(4 * MAX_ROWS)) } else { 1 };
    ((0..=cuts).map(|i| i * rows / cuts).collect(), panels_at_once)
}

/// The panels and rows of one output tile.
struct Panels<'a, 'b> {
    product: Product<'a>,
    tile: Tile<'b, f32>,
}

impl Kernel for Panels<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        match self.product.weight.dtype {
            DType::F32 => self.panels::<S, false>(simd),
            DType::Bf16 => self.panels::<S, true>(simd),
        }
    }
}

impl Panels<'_, '_> {
    #[inline(always)]
    fn panels<S: Simd, const BF16: bool>(&mut self, simd: S) {
        let steps = self.product.weight.steps;
        // Sums of all k blocks but the last; (rows, 64). Empty where one block is enough.
        let mut partial = Aligned::<f32>::zeroed(if steps > MAX_STEPS { self.tile.rows.len() * PANEL } else { 0 });
        for first_col in self.tile.cols.clone().step_by(PANEL) {
            let panel = self.product.weight.panel(first_col / PANEL);
            let ahead = panel.as_ptr().wrapping_add(panel.len());
            let mut first_step = 0;
            loop {
                let last_step = steps.min(first_step + MAX_STEPS);
                let part = Part { first_col, panel, first_step, last_step, last: last_step == steps };
                self.rows::<S, BF16>(simd, part, ahead, &mut partial);
                if last_step == steps {
                    break;
                }
                first_step = last_step;
            }
        }
    }

    /// All rows of the tile over one part of a panel, in blocks of nearly equal height: 128 rows are 18 blocks of six and
    /// four of five, since a block of two would wait for its own sums.
    #[inline(always)]
    fn rows<S: Simd, const BF16: bool>(&mut self, simd: S, part: Part, ahead: *const u32, partial: &mut [f32]) {
        let rows = self.tile.rows.clone();
        let blocks = rows.len().div_ceil(MAX_ROWS);
        for block in 0..blocks {
            let first = rows.start + block * rows.len() / blocks;
            let last = rows.start + (block + 1) * rows.len() / blocks;
            // The first four blocks ask for the next panel, a line of 16 words per step each.
            let ahead =
                if block < 4 { ahead.wrapping_add((block * part.len() + 4 * part.first_step) * LANES) } else { part.panel.as_ptr() };
            match last - first {
                1 => self.block::<S, BF16, 1>(simd, part, first, ahead, partial),
                2 => self.block::<S, BF16, 2>(simd, part, first, ahead, partial),
                3 => self.block::<S, BF16, 3>(simd, part, first, ahead, partial),
                4 => self.block::<S, BF16, 4>(simd, part, first, ahead, partial),
                5 => self.block::<S, BF16, 5>(simd, part, first, ahead, partial),
                _ => self.block::<S, BF16, 6>(simd, part, first, ahead, partial),
            }
        }
    }

    #[inline(always)]
    fn block<S: Simd, const BF16: bool, const M: usize>(
        &mut self,
        simd: S,
        part: Part,
        row: usize,
        ahead: *const u32,
        partial: &mut [f32],
    ) {
        if S::NV == 4 {
            self.columns::<S, BF16, M, 4>(simd, part, row, 0, ahead, partial);
        } else {
            for column in (0..PANEL).step_by(LANES) {
                self.columns::<S, BF16, M, 1>(simd, part, row, column, ahead, partial);
            }
        }
    }

    /// M rows by NV vectors of columns, the first at `column` of the panel.
    #[inline(always)]
    fn columns<S: Simd, const BF16: bool, const M: usize, const NV: usize>(
        &mut self,
        simd: S,
        part: Part,
        row: usize,
        column: usize,
        ahead: *const u32,
        partial: &mut [f32],
    ) {
        let product = self.product;
        let steps = product.weight.steps;
        let mut acc = [[simd.splat(0.0); NV]; M];
        if part.first_step > 0 {
            for (m, acc) in acc.iter_mut().enumerate() {
                let sums = partial_row(partial, row + m - self.tile.rows.start);
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(&sums[column / LANES + v]);
                }
            }
        }
        let x = &product.x[row * steps + part.first_step..];
        let mut b = [part.panel; NV];
        for (v, b) in b.iter_mut().enumerate() {
            *b = &part.panel[part.first_step * PANEL + column + v * LANES..];
        }
        accumulate::<S, BF16, M, NV>(simd, part.len(), x, steps, b, PANEL, ahead, &mut acc);
        for (m, acc) in acc.iter().enumerate() {
            if !part.last {
                let sums = partial_row(partial, row + m - self.tile.rows.start);
                for (v, acc) in acc.iter().enumerate() {
                    simd.store(*acc, &mut sums[column / LANES + v]);
                }
                continue;
            }
            let in_tile = part.first_col - self.tile.cols.start + column;
            let out = self.tile.row(row + m);
            for (v, acc) in acc.iter().enumerate() {
                let col = part.first_col + column + v * LANES;
                finish(simd, *acc, product.bias.and_then(|b| b.get(col..)), product.epilogue, out.get_mut(in_tile + v * LANES..));
            }
        }
    }
}

/// Steps `first_step..last_step` of the panel at column `first_col`.
#[derive(Clone, Copy)]
struct Part<'a> {
    first_col: usize,
    panel: &'a [u32],
    first_step: usize,
    last_step: usize,
    last: bool,
}

impl Part<'_> {
    fn len(&self) -> usize {
        self.last_step - self.first_step
    }
}

#[inline(always)]
fn partial_row(partial: &mut [f32], row: usize) -> &mut [[f32; LANES]] {
    partial[row * PANEL..][..PANEL].as_chunks_mut().0
}

/// Bias, epilogue and store of up to sixteen columns; `out` and `bias` begin at the first one and may end early.
#[inline(always)]
fn finish<S: Simd>(simd: S, acc: S::F, bias: Option<&[f32]>, epilogue: Epilogue, out: Option<&mut [f32]>) {
    let Some(out) = out else { return };
    let mut value = acc;
    if let Some(bias) = bias {
        value = simd.add(value, load_up_to(simd, bias));
    }
    match epilogue {
        Epilogue::Store => {}
        Epilogue::Gelu => value = simd.gelu_tanh(value),
        Epilogue::Add => value = simd.add(load_up_to(simd, out), value),
    }
    match out.first_chunk_mut() {
        Some(out) => simd.store(value, out),
        None => {
            let mut lanes = [0.0; LANES];
            simd.store(value, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

/// The first sixteen values, zeros where there are fewer.
#[inline(always)]
fn load_up_to<S: Simd>(simd: S, x: &[f32]) -> S::F {
    match x.first_chunk() {
        Some(x) => simd.load(x),
        None => {
            let mut lanes = [0.0; LANES];
            lanes[..x.len()].copy_from_slice(x);
            simd.load(&lanes)
        }
    }
}
