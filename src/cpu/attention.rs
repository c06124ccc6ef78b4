//! Attention of each row over the visible prefix of its own sequence, through the page table.
//!
//! One task takes one K/V head and up to two dozen queries (rows of one sequence times the query heads that share the K/V
//! head) and walks the keys in tiles of 64 counted from position 0, with an online softmax: scores of up to six queries by 64
//! keys in registers, then their exponentials times the values. A query sees `count` keys of a tile; neighbours with the
//! same count share the register tile. What a query computes is fixed by its own visible end, never by who shares its tile.
//!
//! Slots at or past the end are kept out twice: their scores become -inf before the maximum, and their values are not among
//! the steps of the second product, because 0 * NaN is NaN. In bf16, where values come in pairs, an odd end masks the second
//! half of a copy of the last pair.
//!
//! With bf16 pages, q and the exponentials are rounded to bf16 for the two products; sums and maxima stay f32.
#![forbid(unsafe_code)]

use crate::backend::{DType, HeadShape};
use crate::cpu::Machine;
use crate::cpu::kv::{Head, KvCache};
use crate::cpu::memory::Aligned;
use crate::cpu::pool::{Order, Tile};
use crate::cpu::simd::tile::{accumulate, accumulate_pieces};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::plan::Plan;

/// Keys of a tile, four vectors of scores.
const TILE: usize = 64;
const GROUPS: usize = TILE / LANES;

/// Queries of a register tile: 6 x 4 vectors of sums.
const MAX_ROWS: usize = 6;

/// Queries of a task: their accumulators at D = 64 are 6 KiB, beside 16 or 32 KiB of a tile's keys and values in L1.
const TASK_QUERIES: usize = 24;

/// See [`crate::backend::Backend::attention`].
pub fn attention(machine: &Machine, plan: &Plan, heads: HeadShape, qkv: &[f32], layer: usize, kv: &KvCache, out: &mut [f32]) {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let queries_per_head = num_heads / num_kv_heads;
    let rows_at_once = (TASK_QUERIES / queries_per_head).max(1);
    let mut row_bounds = vec![0];
    let mut sequences = Vec::new();
    let mut work = 0;
    for (s, rows) in plan.indptr.windows(2).enumerate() {
        let rows = rows[0] as usize..rows[1] as usize;
        work += rows.clone().map(|row| plan.visible[row] as usize).sum::<usize>();
        let tiles = rows.len().div_ceil(rows_at_once);
        for tile in 1..=tiles {
            row_bounds.push(rows.start + rows.len() * tile / tiles);
            sequences.push(s);
        }
    }
    let pool = machine.pool_for(work * heads.q_width() * 2);
    let width = heads.q_width();
    pool.tiles(&mut out[..plan.num_rows() * width], width, &row_bounds, queries_per_head * head_dim, Order::RowsFirst, &|tile| {
        let s = sequences[row_bounds.partition_point(|&bound| bound <= tile.rows.start) - 1];
        let pages = &plan.pages[plan.page_indptr[s] as usize..plan.page_indptr[s + 1] as usize];
        let kv_head = tile.cols.start / (queries_per_head * head_dim);
        machine.isa.run(Queries { heads, qkv, visible: &plan.visible, pages, head: kv.head(layer, kv_head), tile });
    });
}

/// The queries of one output tile: rows of one sequence, all heads that share one K/V head.
struct Queries<'a, 'b> {
    heads: HeadShape,
    qkv: &'a [f32],
    visible: &'a [u32],
    pages: &'a [u32],
    head: Head<'a>,
    tile: Tile<'b, f32>,
}

/// Running state of the queries of a task.
struct State {
    /// (queries, key steps) q as words
    q: Aligned<u32>,
    /// (queries, D padded) sums of exponentials times values
    sums: Aligned<f32>,
    /// (queries) largest score so far
    max: Vec<f32>,
    /// (queries) sum of exponentials
    mass: Vec<f32>,
    /// (6, 64) scores, then their exponentials
    scores: Aligned<f32>,
    /// (6, 32) exponentials as bf16 pairs
    pairs: Aligned<u32>,
    /// (D padded) the last pair of values with its second half masked
    last_pair: Aligned<u32>,
}

/// Keys and values of the groups of a tile; empty past the last visible key.
type Groups<'a> = [(&'a [u32], &'a [u32]); GROUPS];

impl Kernel for Queries<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.head.layout.dtype {
            DType::F32 => self.attend::<S, false>(simd),
            DType::Bf16 => self.attend::<S, true>(simd),
        }
    }
}

impl Queries<'_, '_> {
    #[inline(always)]
    fn attend<S: Simd, const BF16: bool>(mut self, simd: S) {
        let layout = self.head.layout;
        let mut state = self.state::<S, BF16>(simd);
        let queries_per_head = self.heads.num_heads / self.heads.num_kv_heads;
        let queries = self.tile.rows.len() * queries_per_head;
        let visible = &self.visible[self.tile.rows.clone()];
        let end = visible.iter().copied().max().unwrap_or(0) as usize;
        assert!(end <= self.pages.len() * layout.page_size, "{end} visible keys in {} pages of {}", self.pages.len(), layout.page_size);
        let mut gathered = Gathered::new(&self.head);
        for first in (0..end).step_by(TILE) {
            let groups = if layout.lanes == LANES {
                self.groups(first, end)
            } else {
                gathered.fill(&self.head, self.pages, first, end);
                gathered.groups()
            };
            let count = |query: usize| (visible[query / queries_per_head] as usize).saturating_sub(first).min(TILE);
            let mut query = 0;
            while query < queries {
                let count_here = count(query);
                let mut run = 1;
                while query + run < queries && count(query + run) == count_here {
                    run += 1;
                }
                if count_here > 0 {
                    let blocks = run.div_ceil(MAX_ROWS);
                    for block in 0..blocks {
                        let (from, to) = (query + block * run / blocks, query + (block + 1) * run / blocks);
                        match to - from {
                            1 => step::<S, BF16, 1>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                            2 => step::<S, BF16, 2>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                            3 => step::<S, BF16, 3>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                            4 => step::<S, BF16, 4>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                            5 => step::<S, BF16, 5>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                            _ => step::<S, BF16, 6>(simd, &self.head, &groups, &mut state, from, count_here, self.heads.head_dim),
                        }
                    }
                }
                query += run;
            }
        }
        self.write(&state);
    }

    /// q as words and empty sums.
    #[inline(always)]
    fn state<S: Simd, const BF16: bool>(&self, simd: S) -> State {
        let HeadShape { num_heads, num_kv_heads, head_dim } = self.heads;
        let layout = self.head.layout;
        let queries_per_head = num_heads / num_kv_heads;
        let queries = self.tile.rows.len() * queries_per_head;
        let mut state = State {
            q: Aligned::zeroed(queries * layout.key_steps),
            sums: Aligned::zeroed(queries * layout.value_width),
            max: vec![f32::NEG_INFINITY; queries],
            mass: vec![0.0; queries],
            scores: Aligned::zeroed(MAX_ROWS * TILE),
            pairs: Aligned::zeroed(if BF16 { MAX_ROWS * TILE / 2 } else { 0 }),
            last_pair: Aligned::zeroed(if BF16 { layout.value_width } else { 0 }),
        };
        for (query, words) in state.q.chunks_exact_mut(layout.key_steps).enumerate() {
            let row = self.tile.rows.start + query / queries_per_head;
            let first = row * self.heads.qkv_width() + self.tile.cols.start + query % queries_per_head * head_dim;
            let q = &self.qkv[first..first + head_dim];
            if !BF16 {
                words.copy_from_slice(bytemuck::cast_slice(q));
                continue;
            }
            let (q, tail) = q.as_chunks::<LANES>();
            let (halves, halves_tail) = bytemuck::cast_slice_mut::<u32, u16>(words).as_chunks_mut::<LANES>();
            for (q, halves) in q.iter().zip(halves.iter_mut()) {
                simd.store_bf16(simd.load(q), halves);
            }
            // The half past an odd D stays zero.
            let rest = halves.get_mut(q.len()).map_or(halves_tail, |halves| halves);
            for (half, q) in rest.iter_mut().zip(tail) {
                *half = half::bf16::from_f32(*q).to_bits();
            }
        }
        state
    }

    /// The groups of the tile at position `first`, read where they lie.
    #[inline(always)]
    fn groups(&self, first: usize, end: usize) -> Groups<'_> {
        let page_size = self.head.layout.page_size;
        let mut groups: Groups = [(&[], &[]); GROUPS];
        for (i, group) in groups.iter_mut().enumerate() {
            let position = first + i * LANES;
            if position < end {
                *group = self.head.group(self.pages[position / page_size] as usize * page_size + position % page_size);
            }
        }
        groups
    }

    /// Sums over masses; zeros where nothing was visible.
    #[inline(always)]
    fn write(&mut self, state: &State) {
        let head_dim = self.heads.head_dim;
        let queries_per_head = self.heads.num_heads / self.heads.num_kv_heads;
        for (query, sums) in state.sums.chunks_exact(self.head.layout.value_width).enumerate() {
            let row = self.tile.rows.start + query / queries_per_head;
            let out = self.tile.row(row);
            let out = &mut out[query % queries_per_head * head_dim..][..head_dim];
            if self.visible[row] == 0 {
                out.fill(0.0);
                continue;
            }
            let scale = 1.0 / state.mass[query];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * scale;
            }
        }
    }
}

/// M queries from `from` on meet the first `count` keys of a tile.
#[inline(always)]
fn step<S: Simd, const BF16: bool, const M: usize>(
    simd: S,
    head: &Head,
    groups: &Groups,
    state: &mut State,
    from: usize,
    count: usize,
    head_dim: usize,
) {
    let layout = head.layout;
    let num_groups = count.div_ceil(LANES);
    let scale = 1.0 / (head_dim as f32).sqrt();

    // Scores.
    let q = &state.q[from * layout.key_steps..];
    let (scores, _) = state.scores.as_chunks_mut::<LANES>();
    let mut group = 0;
    while group < num_groups {
        group += if S::WIDE && num_groups - group == 4 {
            score::<S, BF16, M, 4>(simd, layout.key_steps, q, groups, group, scale, scores)
        } else if S::WIDE && num_groups - group >= 2 {
            score::<S, BF16, M, 2>(simd, layout.key_steps, q, groups, group, scale, scores)
        } else {
            score::<S, BF16, M, 1>(simd, layout.key_steps, q, groups, group, scale, scores)
        };
    }
    if !count.is_multiple_of(LANES) {
        for m in 0..M {
            scores[m * GROUPS + num_groups - 1][count % LANES..].fill(f32::NEG_INFINITY);
        }
    }

    // Exponentials, with the sums so far rescaled to the new maximum.
    let mut rescale = [simd.splat(0.0); M];
    let (pairs, _) = bytemuck::cast_slice_mut::<u32, u16>(&mut state.pairs).as_chunks_mut::<LANES>();
    for m in 0..M {
        let row = &mut scores[m * GROUPS..][..num_groups];
        let mut largest = simd.load(&row[0]);
        for scores in &row[1..] {
            largest = simd.max(largest, simd.load(scores));
        }
        let largest = simd.max_lane(largest);
        let before = state.max[from + m];
        let max = if before > largest { before } else { largest };
        let mut mass = simd.splat(0.0);
        for (g, scores) in row.iter_mut().enumerate() {
            let exponential = simd.exp(simd.sub(simd.load(scores), simd.splat(max)));
            if BF16 {
                let pair = &mut pairs[m * GROUPS + g];
                simd.store_bf16(exponential, pair);
                mass = simd.add(mass, simd.load_bf16(pair));
            } else {
                simd.store(exponential, scores);
                mass = simd.add(mass, exponential);
            }
        }
        rescale[m] = simd.exp(simd.splat(before - max));
        let mut factor = [0.0; LANES];
        simd.store(rescale[m], &mut factor);
        state.mass[from + m] = state.mass[from + m] * factor[0] + simd.sum(mass);
        state.max[from + m] = max;
    }

    // Values.
    let width = layout.value_width;
    let per_word = if BF16 { 2 } else { 1 };
    if BF16 && !count.is_multiple_of(2) {
        let last = &groups[num_groups - 1].1[(count - 1) % LANES / 2 * width..][..width];
        for (word, last) in state.last_pair.iter_mut().zip(last) {
            *word = last & 0xffff;
        }
    }
    let mut pieces = [(0, &state.last_pair[..]); GROUPS + 1];
    for (g, group) in groups.iter().enumerate().take(num_groups) {
        pieces[g] = ((count - g * LANES).min(LANES) / per_word, group.1);
    }
    pieces[num_groups].0 = if BF16 { count % 2 } else { 0 };
    let pieces = &pieces[..=num_groups];
    let sums = &mut state.sums[from * width..][..M * width];
    let weights: &[u32] = if BF16 { &state.pairs } else { bytemuck::cast_slice(&state.scores) };
    let mut column = 0;
    while column < width {
        let vectors = (width - column) / LANES;
        column += LANES
            * if S::WIDE && vectors >= 4 {
                weigh::<S, BF16, M, 4>(simd, width, column, weights, pieces, rescale, sums)
            } else if S::WIDE && vectors >= 2 {
                weigh::<S, BF16, M, 2>(simd, width, column, weights, pieces, rescale, sums)
            } else {
                weigh::<S, BF16, M, 1>(simd, width, column, weights, pieces, rescale, sums)
            };
    }
}

/// Scaled scores of M queries with NV groups of keys from `group` on; returns NV.
#[inline(always)]
fn score<S: Simd, const BF16: bool, const M: usize, const NV: usize>(
    simd: S,
    steps: usize,
    q: &[u32],
    groups: &Groups,
    group: usize,
    scale: f32,
    scores: &mut [[f32; LANES]],
) -> usize {
    let mut keys = [groups[0].0; NV];
    for (v, keys) in keys.iter_mut().enumerate() {
        *keys = groups[group + v].0;
    }
    let acc = accumulate::<S, BF16, M, NV, 0>(simd, steps, q, steps, keys, LANES, 0, [[simd.splat(0.0); NV]; M]);
    for m in 0..M {
        let row = &mut scores[m * GROUPS + group..][..NV];
        for v in 0..NV {
            simd.store(simd.mul(acc[m][v], simd.splat(scale)), &mut row[v]);
        }
    }
    NV
}

/// `sums[m][column..] = sums * rescale + weights (M, keys) values (keys, D)` for NV vectors of columns; returns NV.
#[inline(always)]
fn weigh<S: Simd, const BF16: bool, const M: usize, const NV: usize>(
    simd: S,
    width: usize,
    column: usize,
    weights: &[u32],
    pieces: &[(usize, &[u32])],
    rescale: [S::F; M],
    sums: &mut [f32],
) -> usize {
    let stride = if BF16 { TILE / 2 } else { TILE };
    let mut acc = [[simd.splat(0.0); NV]; M];
    for m in 0..M {
        let row = &sums[m * width + column..][..NV * LANES].as_chunks::<LANES>().0[..NV];
        for v in 0..NV {
            acc[m][v] = simd.mul(simd.load(&row[v]), rescale[m]);
        }
    }
    acc = accumulate_pieces::<S, BF16, M, NV>(simd, weights, stride, pieces, column, width, acc);
    for m in 0..M {
        let row = &mut sums[m * width + column..][..NV * LANES].as_chunks_mut::<LANES>().0[..NV];
        for v in 0..NV {
            simd.store(acc[m][v], &mut row[v]);
        }
    }
    NV
}

/// A tile of pages smaller than a group, copied into whole groups.
struct Gathered {
    keys: Aligned<u32>,
    values: Aligned<u32>,
    key_group: usize,
    value_group: usize,
}

impl Gathered {
    fn new(head: &Head) -> Gathered {
        let layout = head.layout;
        let whole = layout.lanes == LANES;
        let (key_group, value_group) = (layout.key_steps * LANES, LANES * layout.dtype.bytes() / 4 * layout.value_width);
        let len = if whole { 0 } else { GROUPS };
        Gathered { keys: Aligned::zeroed(len * key_group), values: Aligned::zeroed(len * value_group), key_group, value_group }
    }

    fn fill(&mut self, head: &Head, pages: &[u32], first: usize, end: usize) {
        let layout = head.layout;
        let lanes = layout.lanes;
        for position in (first..end.min(first + TILE)).step_by(lanes) {
            let (group, lane) = ((position - first) / LANES, position % LANES);
            let (keys, values) = head.group(pages[position / lanes] as usize * lanes);
            let to = &mut self.keys[group * self.key_group..][..self.key_group];
            for (to, from) in to.chunks_exact_mut(LANES).zip(keys.chunks_exact(lanes)) {
                to[lane..lane + lanes].copy_from_slice(from);
            }
            let to = &mut self.values[group * self.value_group..][..self.value_group];
            let width = layout.value_width;
            if layout.dtype == DType::Bf16 && lanes == 1 {
                let (shift, other) = if lane.is_multiple_of(2) { (0, 0xffff_0000) } else { (16, 0x0000_ffff) };
                for (to, from) in to[lane / 2 * width..].iter_mut().zip(values) {
                    *to = *to & other | (from & 0xffff) << shift;
                }
            } else {
                let row = lane * layout.value_steps / lanes;
                to[row * width..][..values.len()].copy_from_slice(values);
            }
        }
    }

    fn groups(&self) -> Groups<'_> {
        let group =
            |i: usize| (&self.keys[i * self.key_group..][..self.key_group], &self.values[i * self.value_group..][..self.value_group]);
        [group(0), group(1), group(2), group(3)]
    }
}
