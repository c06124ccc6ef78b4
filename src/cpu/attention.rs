//! Attention of each row over the visible prefix of its own sequence, through the page table.
//!
//! One task takes one K/V head and up to two dozen queries (rows of one sequence times the query
//! heads that share the K/V head) and walks the keys in tiles of 64 counted from position 0, with
//! an online softmax: scores of up to six queries by 64 keys in registers, then their exponentials
//! times the values. What a query computes, and in which order, is fixed by its own visible end,
//! never by the queries that share its tile: queries that see different counts of a tile's keys
//! share the scores and the values of the groups that all of them see whole, and take the rest
//! apart.
//!
//! Slots at or past the end are kept out twice: their scores become -inf before the maximum, and
//! their values are not among the steps of the second product, because 0 * NaN is NaN. In bf16,
//! where values come in pairs, an odd end masks the second half of a copy of the last pair.
//!
//! With bf16 pages, q and the exponentials are rounded to bf16 for the two products; sums and
//! maxima stay f32.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::backend::{DType, HeadShape};
use crate::cpu::context::{AttentionState, CpuContext};
use crate::cpu::kv::{Head, KvCache};
use crate::cpu::memory::Aligned;
use crate::cpu::pool::{Order, Tile};
use crate::cpu::simd::tile::{Piece, Product};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::plan::Plan;

/// Keys of a tile, four vectors of scores.
const TILE: usize = 64;
const GROUPS: usize = TILE / LANES;

/// Most queries of a register tile: 6 x 4 vectors of sums.
const MAX_ROWS: usize = 6;

/// Queries of a task: their accumulators at D = 64 are 6 KiB, beside 16 or 32 KiB of a tile's keys
/// and values in L1.
const TASK_QUERIES: usize = 24;

/// See [`crate::backend::Backend::attention`].
pub fn attention(context: &CpuContext, plan: &Plan, heads: HeadShape, qkv: &[f32], layer: usize, kv: &KvCache, out: &mut [f32]) {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let queries_per_head = num_heads / num_kv_heads;
    let rows_at_once = (TASK_QUERIES / queries_per_head).max(1);
    let (mut row_bounds, mut sequences) = (context.spare_list(), context.spare_list());
    row_bounds.push(0);
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
    let pool = context.pool_for(work * heads.q_width() * 2);
    let width = heads.q_width();
    pool.tiles(&mut out[..plan.num_rows() * width], width, &row_bounds, queries_per_head * head_dim, Order::RowsFirst, &|tile| {
        let s = sequences[row_bounds.partition_point(|&bound| bound <= tile.rows.start) - 1];
        let pages = &plan.pages[plan.page_indptr[s] as usize..plan.page_indptr[s + 1] as usize];
        let kv_head = tile.cols.start / (queries_per_head * head_dim);
        context.isa.run(Queries { context, heads, qkv, visible: &plan.visible, pages, head: kv.head(layer, kv_head), tile });
    });
    context.keep_spare_list(row_bounds);
    context.keep_spare_list(sequences);
}

/// The queries of one output tile: rows of one sequence, all heads that share one K/V head.
struct Queries<'a, 'b> {
    context: &'a CpuContext,
    heads: HeadShape,
    qkv: &'a [f32],
    visible: &'a [u32],
    pages: &'a [u32],
    head: Head<'a>,
    tile: Tile<'b, f32>,
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
        let mut state = self.context.attention_state();
        self.begin::<S, BF16>(simd, &mut state);
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
            // Runs of queries that see any key of this tile, in blocks of nearly equal height.
            let mut query = 0;
            while query < queries {
                if count(query) == 0 {
                    query += 1;
                    continue;
                }
                let mut run = 1;
                while query + run < queries && count(query + run) > 0 {
                    run += 1;
                }
                let blocks = run.div_ceil(if BF16 { S::BF16_ROWS } else { MAX_ROWS });
                for block in 0..blocks {
                    let (from, to) = (query + block * run / blocks, query + (block + 1) * run / blocks);
                    let mut counts = [0; MAX_ROWS];
                    for (m, count_of) in counts.iter_mut().enumerate().take(to - from) {
                        *count_of = count(from + m);
                    }
                    step::<S, BF16>(simd, &self.head, &groups, &mut state, from, &counts[..to - from], self.heads.head_dim);
                }
                query += run;
            }
        }
        self.write(simd, &state);
        self.context.keep_attention_state(state);
    }

    /// q as words and empty sums.
    #[inline(always)]
    fn begin<S: Simd, const BF16: bool>(&self, simd: S, state: &mut AttentionState) {
        let HeadShape { num_heads, num_kv_heads, head_dim } = self.heads;
        let layout = self.head.layout;
        let queries_per_head = num_heads / num_kv_heads;
        let queries = self.tile.rows.len() * queries_per_head;
        state.sums.reserve(queries * layout.value_width).expect(SMALL).fill(0.0);
        state.max.clear();
        state.max.resize(queries, f32::NEG_INFINITY);
        state.mass.clear();
        state.mass.resize(queries, 0.0);
        state.scores.reserve(MAX_ROWS * TILE).expect(SMALL);
        state.pairs.reserve(MAX_ROWS * TILE / 2).expect(SMALL);
        state.last_pair.reserve(layout.value_width).expect(SMALL);
        let stride = layout.key_steps * S::x_words(BF16);
        let q_words = state.q.reserve(queries * stride).expect(SMALL);
        for (query, words) in q_words.chunks_exact_mut(stride).enumerate() {
            let row = self.tile.rows.start + query / queries_per_head;
            let first = row * self.heads.qkv_width() + self.tile.cols.start + query % queries_per_head * head_dim;
            let q = &self.qkv[first..first + head_dim];
            if !BF16 {
                words.copy_from_slice(bytemuck::cast_slice(q));
                continue;
            }
            if !S::MULTIPLIES_PAIRS {
                // The half past an odd D is zero.
                let rounded = q.iter().map(|&q| half::bf16::from_f32(q).to_f32()).chain([0.0]);
                words.iter_mut().zip(rounded).for_each(|(word, q)| *word = q.to_bits());
                continue;
            }
            let (q, tail) = q.as_chunks::<LANES>();
            let (halves, halves_tail) = bytemuck::cast_slice_mut::<u32, u16>(words).as_chunks_mut::<LANES>();
            for (q, halves) in q.iter().zip(halves.iter_mut()) {
                simd.store_bf16(simd.load(q), halves);
            }
            // The half past an odd D is zero.
            let rest = halves.get_mut(q.len()).map_or(halves_tail, |halves| halves);
            for (i, half) in rest.iter_mut().enumerate() {
                *half = tail.get(i).map_or(0, |&q| half::bf16::from_f32(q).to_bits());
            }
        }
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
    fn write<S: Simd>(&mut self, simd: S, state: &AttentionState) {
        let head_dim = self.heads.head_dim;
        let queries_per_head = self.heads.num_heads / self.heads.num_kv_heads;
        for (query, &mass) in state.mass.iter().enumerate() {
            let sums = &state.sums[query * self.head.layout.value_width..][..self.head.layout.value_width];
            let row = self.tile.rows.start + query / queries_per_head;
            let out = self.tile.row(row);
            let out = &mut out[query % queries_per_head * head_dim..][..head_dim];
            if self.visible[row] == 0 {
                out.fill(0.0);
                continue;
            }
            let scale = simd.splat(1.0 / mass);
            let (out, tail) = out.as_chunks_mut::<LANES>();
            let (sums, _) = sums.as_chunks::<LANES>();
            for (out, sums) in out.iter_mut().zip(sums) {
                simd.store(simd.mul(simd.load(sums), scale), out);
            }
            if !tail.is_empty() {
                let mut lanes = [0.0; LANES];
                simd.store(simd.mul(simd.load(&sums[out.len()]), scale), &mut lanes);
                tail.copy_from_slice(&lanes[..tail.len()]);
            }
        }
    }
}

/// Up to six queries from `from` on meet a tile's keys: each the first `counts[m]`, at least one.
#[inline(always)]
fn step<S: Simd, const BF16: bool>(
    simd: S,
    head: &Head,
    groups: &Groups,
    state: &mut AttentionState,
    from: usize,
    counts: &[usize],
    head_dim: usize,
) {
    let layout = head.layout;
    let width = layout.value_width;
    let scale = simd.splat(1.0 / (head_dim as f32).sqrt());
    let (mut least, mut most) = (TILE, 0);
    for &count in counts {
        (least, most) = (least.min(count), most.max(count));
    }

    // Compute q.k for each group of keys that at least one query can see. Keys beyond a query's
    // own limit are masked below.
    let q = &state.q[from * layout.key_steps * S::x_words(BF16)..];
    let (scores, _) = state.scores.as_chunks_mut::<LANES>();
    let num_groups = most.div_ceil(LANES);
    let mut group = 0;
    while group < num_groups {
        group += if S::WIDE && num_groups - group == 4 {
            score::<S, BF16, 4>(simd, layout.key_steps, q, groups, group, counts.len(), scores)
        } else if S::WIDE && num_groups - group >= 2 {
            score::<S, BF16, 2>(simd, layout.key_steps, q, groups, group, counts.len(), scores)
        } else {
            score::<S, BF16, 1>(simd, layout.key_steps, q, groups, group, counts.len(), scores)
        };
    }

    // New maxima, with the sums so far rescaled to them.
    let mut shift = [0.0; MAX_ROWS];
    for (m, &count) in counts.iter().enumerate() {
        let row = &mut scores[m * GROUPS..][..count.div_ceil(LANES)];
        if !count.is_multiple_of(LANES) {
            row[count / LANES][count % LANES..].fill(f32::NEG_INFINITY);
        }
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for scores in row.iter() {
            largest = simd.max(largest, simd.load(scores));
        }
        let largest = simd.max_lane(simd.mul(largest, scale));
        let before = state.max[from + m];
        let max = if before > largest { before } else { largest };
        if before != max && before > f32::NEG_INFINITY {
            let factor = simd.exp(simd.splat(before - max));
            for sums in state.sums[(from + m) * width..][..width].as_chunks_mut::<LANES>().0 {
                simd.store(simd.mul(simd.load(sums), factor), sums);
            }
            let mut lanes = [0.0; LANES];
            simd.store(factor, &mut lanes);
            state.mass[from + m] *= lanes[0];
        }
        state.max[from + m] = max;
        shift[m] = max;
    }

    // Exponentials.
    let (pairs, _) = bytemuck::cast_slice_mut::<u32, u16>(&mut state.pairs).as_chunks_mut::<LANES>();
    for (m, &count) in counts.iter().enumerate() {
        let mut mass = simd.splat(0.0);
        let shift = simd.splat(shift[m]);
        for (g, scores) in scores[m * GROUPS..][..count.div_ceil(LANES)].iter_mut().enumerate() {
            let exponential = simd.exp(simd.sub(simd.mul(simd.load(scores), scale), shift));
            if BF16 {
                let pair = &mut pairs[m * GROUPS + g];
                simd.store_bf16(exponential, pair);
                let rounded = simd.load_bf16(pair);
                if !S::MULTIPLIES_PAIRS {
                    simd.store(rounded, scores);
                }
                mass = simd.add(mass, rounded);
            } else {
                simd.store(exponential, scores);
                mass = simd.add(mass, exponential);
            }
        }
        state.mass[from + m] += simd.sum(mass);
    }

    // Values: together as far as all see whole groups, then apart.
    let together = if least == most { most.div_ceil(LANES) } else { least / LANES };
    if together > 0 {
        values::<S, BF16>(simd, groups, state, width, from, 0..counts.len(), 0..together, most.min(together * LANES));
    }
    let mut m = 0;
    while m < counts.len() {
        let count = counts[m];
        let mut run = 1;
        while m + run < counts.len() && counts[m + run] == count {
            run += 1;
        }
        if count > together * LANES {
            values::<S, BF16>(simd, groups, state, width, from, m..m + run, together..count.div_ceil(LANES), count);
        }
        m += run;
    }
}

/// `sums (rows, D) += weights (rows, keys) values (keys, D)` over the keys of the groups in `range`
/// below `count`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn values<S: Simd, const BF16: bool>(
    simd: S,
    groups: &Groups,
    state: &mut AttentionState,
    width: usize,
    from: usize,
    rows: Range<usize>,
    range: Range<usize>,
    count: usize,
) {
    let per_word = if BF16 { 2 } else { 1 };
    // Steps and words of each group; an odd count of pairs ends in a masked copy of the last.
    let mut pieces = [(0, &[][..]); GROUPS + 1];
    let mut num_pieces = 0;
    for g in range.clone() {
        pieces[num_pieces] = ((count - g * LANES).min(LANES) / per_word, groups[g].1);
        num_pieces += 1;
    }
    if BF16 && !count.is_multiple_of(2) {
        let last = &groups[range.end - 1].1[(count - 1) % LANES / 2 * width..][..width];
        for (word, last) in state.last_pair.iter_mut().zip(last) {
            *word = last & 0xffff;
        }
        pieces[num_pieces] = (1, &state.last_pair);
        num_pieces += 1;
    }
    let in_pairs = BF16 && S::MULTIPLIES_PAIRS;
    let weights: &[u32] = if in_pairs { &state.pairs } else { bytemuck::cast_slice(&state.scores) };
    let a = &weights[(rows.start * TILE + range.start * LANES) / if in_pairs { 2 } else { 1 }..];
    let (sums, _) = state.sums[(from + rows.start) * width..].as_chunks_mut::<LANES>();
    let pieces = &pieces[..num_pieces];
    let mut vector = 0;
    while vector < width / LANES {
        let left = width / LANES - vector;
        vector += if S::WIDE && left >= 4 {
            weigh::<S, BF16, 4>(simd, rows.len(), a, pieces, width, vector, sums)
        } else if S::WIDE && left >= 2 {
            weigh::<S, BF16, 2>(simd, rows.len(), a, pieces, width, vector, sums)
        } else {
            weigh::<S, BF16, 1>(simd, rows.len(), a, pieces, width, vector, sums)
        };
    }
}

/// [`values`] for NV vectors of columns from `vector` on; returns NV.
#[inline(always)]
fn weigh<S: Simd, const BF16: bool, const NV: usize>(
    simd: S,
    rows: usize,
    a: &[u32],
    pieces: &[(usize, &[u32])],
    width: usize,
    vector: usize,
    sums: &mut [[f32; LANES]],
) -> usize {
    let mut columns = [Piece { steps: 0, b: [a; NV] }; GROUPS + 1];
    for (column, &(steps, words)) in columns.iter_mut().zip(pieces) {
        let mut b = [words; NV];
        for (v, b) in b.iter_mut().enumerate() {
            *b = &b[(vector + v) * LANES..];
        }
        *column = Piece { steps, b };
    }
    let a_stride = if BF16 && S::MULTIPLIES_PAIRS { TILE / 2 } else { TILE };
    let (pieces, sums, sums_stride) = (&columns[..pieces.len()], &mut sums[vector..], width / LANES);
    Product { a, a_stride, pieces, b_stride: width, sums, sums_stride, fresh: false, ahead: &[], ahead_step: 0 }
        .run::<S, BF16, 0>(simd, rows);
    NV
}

/// Scores, before the scale, of `rows` queries with NV groups of keys from `group` on; returns NV.
#[inline(always)]
fn score<S: Simd, const BF16: bool, const NV: usize>(
    simd: S,
    steps: usize,
    q: &[u32],
    groups: &Groups,
    group: usize,
    rows: usize,
    scores: &mut [[f32; LANES]],
) -> usize {
    let mut b = [groups[0].0; NV];
    for (v, b) in b.iter_mut().enumerate() {
        *b = groups[group + v].0;
    }
    let (pieces, sums) = (&[Piece { steps, b }], &mut scores[group..]);
    Product {
        a: q,
        a_stride: steps * S::x_words(BF16),
        pieces,
        b_stride: LANES,
        sums,
        sums_stride: GROUPS,
        fresh: true,
        ahead: &[],
        ahead_step: 0,
    }
    .run::<S, BF16, 0>(simd, rows);
    NV
}

/// Scratch of a tile is some hundred KiB, which no check could have foreseen to be refused.
const SMALL: &str = "memory for a tile's scratch";

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
        let room = |group: usize| Aligned::zeroed(len * group).expect(SMALL);
        Gathered { keys: room(key_group), values: room(value_group), key_group, value_group }
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
