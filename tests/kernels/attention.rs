//! `attention` against the f64 oracle, against itself in the other regime, and against a row on its
//! own.

use redraft::backend::{DType, HeadShape};
use redraft::cpu::oracle;
use redraft::cuda::context::{COUNTERS, CudaContext};
use redraft::cuda::ops::attention::{Attention, Regime, attention, tiles};
use redraft::plan::{Plan, Visibility};

use crate::emulator::{Array, any_machine, machines, noise};

/// One layer's store, NaN wherever no sequence has a key that somebody may see, and a plan over it.
struct Case {
    dtype: DType,
    heads: HeadShape,
    page_size: usize,
    plan: Plan,
    qkv: Vec<f32>,
    /// (slots, K, D), as the oracle has them; numbers that the dtype can hold.
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_heads, num_kv_heads, head_dim }
}

impl Case {
    /// Sequences as (rows, keys): each row with the end of its visible keys.
    fn new(dtype: DType, heads: HeadShape, page_size: usize, sequences: &[Vec<u32>]) -> Case {
        let pages_of = |visible: &[u32]| (visible.iter().copied().max().unwrap_or(0) as usize).div_ceil(page_size);
        let num_pages = sequences.iter().map(|visible| pages_of(visible)).sum::<usize>() + 1;
        let mut plan = Plan::new();
        let width = heads.num_kv_heads * heads.head_dim;
        let mut keys = vec![f32::NAN; num_pages * page_size * width];
        let mut values = keys.clone();
        let mut next = 0;
        for (s, visible) in sequences.iter().enumerate() {
            // Pages in falling order, so that neighbours in a sequence are not neighbours in
            // memory; page 0 belongs to nobody.
            let pages: Vec<u32> = (next..next + pages_of(visible)).map(|page| (num_pages - 1 - page) as u32).collect();
            next += pages.len();
            for position in 0..visible.iter().copied().max().unwrap_or(0) as usize {
                let slot = pages[position / page_size] as usize * page_size + position % page_size;
                let seed = (s * 1000 + position) as u64;
                for (store, seed) in [(&mut keys, seed), (&mut values, seed + 1_000_000)] {
                    let stored = noise(seed, width).into_iter().map(|x| oracle::stored(dtype, x));
                    store[slot * width..][..width].iter_mut().zip(stored).for_each(|(slot, x)| *slot = x);
                }
            }
            plan.ids.extend(visible.iter().map(|_| 0));
            plan.positions.extend(visible.iter().map(|_| 0));
            plan.slots.extend(visible.iter().map(|_| 0));
            plan.visible.extend(visible);
            plan.indptr.push(plan.ids.len() as u32);
            plan.pages.extend(pages);
            plan.page_indptr.push(plan.pages.len() as u32);
        }
        // Scores of some size, so that weights differ; keys and values of the rows themselves are
        // not for this kernel to read.
        let mut qkv: Vec<f32> = noise(7, plan.num_rows() * heads.qkv_width()).iter().map(|x| 3.0 * x).collect();
        qkv.chunks_exact_mut(heads.qkv_width()).for_each(|row| row[heads.q_width()..].fill(f32::NAN));
        Case { dtype, heads, page_size, plan, qkv, keys, values }
    }

    /// `(slots, K, D)` as [page][kv head][offset][D].
    fn paged(&self, store: &[f32]) -> Vec<f32> {
        let HeadShape { num_kv_heads, head_dim, .. } = self.heads;
        let page_elements = self.page_size * num_kv_heads * head_dim;
        let at = |i: usize| {
            let (page, rest) = (i / page_elements, i % page_elements);
            let (head, rest) = (rest / (self.page_size * head_dim), rest % (self.page_size * head_dim));
            page * page_elements + (rest / head_dim * num_kv_heads + head) * head_dim + rest % head_dim
        };
        (0..store.len()).map(|i| store[at(i)]).collect()
    }

    /// The result of the kernel. The list of tiles is padded and the bound on visible keys is not
    /// tight.
    fn run(&self, context: &CudaContext, plan: &Plan, qkv: &[f32], regime: Regime, out_dtype: DType) -> Result<Vec<f32>, String> {
        match self.dtype {
            DType::F32 => self.run_on(context, plan, qkv, regime, out_dtype, |x| x),
            DType::Bf16 => self.run_on(context, plan, qkv, regime, out_dtype, |x| half::bf16::from_f32(x).to_bits()),
        }
    }

    fn run_on<T: bytemuck::Pod>(
        &self,
        context: &CudaContext,
        plan: &Plan,
        qkv: &[f32],
        regime: Regime,
        out_dtype: DType,
        stored: impl Fn(f32) -> T,
    ) -> Result<Vec<f32>, String> {
        let store = |store: &[f32]| Array::new(context, &self.paged(store).into_iter().map(&stored).collect::<Vec<T>>());
        let (keys, values) = (store(&self.keys), store(&self.values));
        let mut list = tiles(&plan.indptr, self.heads, regime.tile_queries(self.dtype, self.heads));
        list.push([0; 4]);
        let (list, qkv) = (Array::new(context, &list.concat()), Array::new(context, qkv));
        let (visible, page_indptr) = (Array::new(context, &plan.visible), Array::new(context, &plan.page_indptr));
        // Never empty, as no device array is.
        let pages = Array::new(context, &[plan.pages.as_slice(), &[u32::MAX]].concat());
        let len = plan.num_rows() * self.heads.q_width();
        let (out, out_bf16) = (Array::<f32>::nan(context, len), Array::<u16>::fresh(context, len));
        let words = 1 << 18;
        let scratch = context.workspace(4 * words).map_err(|e| e.to_string())?;
        context.driver.fill(scratch, 0x7fc0_dead, words).map_err(|e| e.to_string())?;
        let op = Attention {
            heads: self.heads,
            page_size: self.page_size as u32,
            dtype: self.dtype,
            regime,
            tiles: list.address(),
            num_tiles: (tiles(&plan.indptr, self.heads, regime.tile_queries(self.dtype, self.heads)).len() + 1) as u32,
            max_visible: plan.visible.iter().max().unwrap() + 100,
            qkv: qkv.address(),
            keys: keys.address(),
            values: values.address(),
            visible: visible.address(),
            page_indptr: page_indptr.address(),
            pages: pages.address(),
            out: if out_dtype == DType::F32 { out.address() } else { out_bf16.address() },
            out_dtype,
        };
        attention(context, &op).map_err(|e| e.to_string())?;
        let result = match out_dtype {
            DType::F32 => out.read()?,
            DType::Bf16 => out_bf16.read()?.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
        };
        let mut counters = vec![0; 4 * COUNTERS];
        context.driver.read(context.counters(), &mut counters).map_err(|e| e.to_string())?;
        if counters.iter().any(|byte| *byte != 0) {
            return Err(format!("{regime:?}: counters are left behind"));
        }
        Ok(result)
    }

    /// A loop without any tricks in the arithmetic of the dtype.
    fn plain(&self) -> Vec<f32> {
        let HeadShape { num_heads, num_kv_heads, head_dim } = self.heads;
        let rounded = |x: f32| oracle::stored(self.dtype, x);
        let mut out = Vec::new();
        for s in 0..self.plan.num_sequences() {
            let pages = &self.plan.pages[self.plan.page_indptr[s] as usize..];
            for t in self.plan.indptr[s] as usize..self.plan.indptr[s + 1] as usize {
                for h in 0..num_heads {
                    let q = &self.qkv[t * self.heads.qkv_width() + h * head_dim..][..head_dim];
                    let at = |j: usize| {
                        let slot = pages[j / self.page_size] as usize * self.page_size + j % self.page_size;
                        (slot * num_kv_heads + h / (num_heads / num_kv_heads)) * head_dim
                    };
                    let visible = self.plan.visible[t] as usize;
                    let dot = |j: usize| q.iter().zip(&self.keys[at(j)..]).fold(0.0f32, |sum, (&a, &b)| sum + rounded(a) * b);
                    let scores: Vec<f32> = (0..visible).map(|j| dot(j) / (head_dim as f32).sqrt()).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let weights: Vec<f32> = scores.iter().map(|s| rounded((s - max).exp())).collect();
                    let mass: f32 = weights.iter().sum();
                    for i in 0..head_dim {
                        let sum: f32 = weights.iter().enumerate().map(|(j, weight)| weight * self.values[at(j) + i]).sum();
                        out.push(if visible == 0 { 0.0 } else { sum / mass });
                    }
                }
            }
        }
        out
    }

    fn holds(&self, context: &CudaContext) -> Result<(), String> {
        let what = format!("{:?}, {:?}, page size {}", self.dtype, self.heads, self.page_size);
        let rounded: Vec<f32> = self.qkv.iter().map(|&x| oracle::stored(self.dtype, x)).collect();
        let exact = oracle::attention(&self.plan, self.heads, self.page_size, &rounded, &self.keys, &self.values);
        let error = |got: &[f32]| {
            got.iter().zip(&exact).map(|(&g, &e)| (f64::from(g) - e).abs()).fold(0.0, |a, b| if b >= a || b.is_nan() { b } else { a })
        };
        let few = self.run(context, &self.plan, &self.qkv, Regime::Few, DType::F32)?;
        let many = self.run(context, &self.plan, &self.qkv, Regime::Many, DType::F32)?;
        // Few sums have an error by luck: an f32 epsilon is always granted.
        let (found, allowed) = (error(&few), 2.0 * error(&self.plain()) + f64::from(f32::EPSILON));
        if found.is_nan() || found > allowed {
            return Err(format!("{what}: error {found:e}, twice that of a plain loop is {allowed:e}"));
        }
        same(&format!("{what}: many against few"), &many, &few)?;
        for regime in [Regime::Few, Regime::Many] {
            let narrow = self.run(context, &self.plan, &self.qkv, regime, DType::Bf16)?;
            let expected: Vec<f32> = few.iter().map(|&x| oracle::stored(DType::Bf16, x)).collect();
            same(&format!("{what}: bf16 output, {regime:?}"), &narrow, &expected)?;
        }
        // Every third row, the others gone: tiles, neighbours and chunk counts differ.
        let rows: Vec<u32> = (0..self.plan.num_rows() as u32).filter(|row| row % 3 == 1).collect();
        let pick = |values: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|row| values[*row as usize * width..][..width].iter().copied()).collect()
        };
        if rows.is_empty() {
            return Ok(());
        }
        let (qkv, expected) = (pick(&self.qkv, self.heads.qkv_width()), pick(&few, self.heads.q_width()));
        for regime in [Regime::Few, Regime::Many] {
            let alone = self.run(context, &self.plan.select(&rows), &qkv, regime, DType::F32)?;
            same(&format!("{what}: without neighbours, {regime:?}"), &alone, &expected)?;
        }
        Ok(())
    }
}

fn same(what: &str, a: &[f32], b: &[f32]) -> Result<(), String> {
    let differs = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    differs.map_or(Ok(()), |i| Err(format!("{what}: element {i} is {} and {}", a[i], b[i])))
}

/// Ends of the visible keys of the given rows.
fn ends(rows: impl IntoIterator<Item = usize>, visibility: Visibility, len: usize) -> Vec<u32> {
    rows.into_iter().map(|position| visibility.end(position, len) as u32).collect()
}

/// Values that some rows see as NaN or infinite, beside rows that must not.
fn isolates(context: &CudaContext, dtype: DType, regime: Regime) -> Result<(), String> {
    let heads = shape(2, 1, 32);
    let visible = vec![37, 40, 35, 0, 36, 290];
    let clean = Case::new(dtype, heads, 16, std::slice::from_ref(&visible));
    let mut broken = Case::new(dtype, heads, 16, std::slice::from_ref(&visible));
    let (nan, infinite, key) = (slot_of(&broken, 38), slot_of(&broken, 288), slot_of(&broken, 39));
    broken.values[nan * 32 + 5] = f32::NAN;
    broken.values[infinite * 32 + 6] = f32::INFINITY;
    broken.keys[key * 32..][..32].fill(f32::NAN);
    let run = |case: &Case| case.run(context, &case.plan, &case.qkv, regime, DType::F32);
    let (before, after) = (run(&clean)?, run(&broken)?);
    for (row, end) in visible.into_iter().enumerate() {
        let width = heads.q_width();
        let (before, after) = (&before[row * width..][..width], &after[row * width..][..width]);
        if end <= 38 {
            same(&format!("{dtype:?}, {regime:?}: row {row} beside one that sees NaN"), after, before)?;
        } else if !after.iter().all(|x| x.is_nan()) {
            return Err(format!("{dtype:?}, {regime:?}: row {row} does not show the NaN that it sees"));
        }
    }
    // A single value that is not finite, in the first and the last column: it shows there and
    // nowhere else.
    for (column, odd) in [(0, f32::NAN), (31, f32::INFINITY)] {
        let mut broken = Case::new(dtype, heads, 16, &[vec![37, 40, 35]]);
        let clean = run(&broken)?;
        let slot = slot_of(&broken, 38);
        broken.values[slot * 32 + column] = odd;
        let after = run(&broken)?;
        for i in 0..after.len() {
            let (row, seen) = (i / heads.q_width(), i % 32 == column);
            let right = if row == 1 && seen { !after[i].is_finite() } else { after[i].to_bits() == clean[i].to_bits() };
            if !right {
                return Err(format!(
                    "{dtype:?}, {regime:?}: {odd} in column {column} makes element {i} {} instead of {}",
                    after[i], clean[i]
                ));
            }
        }
    }
    Ok(())
}

fn slot_of(case: &Case, position: usize) -> usize {
    case.plan.pages[position / case.page_size] as usize * case.page_size + position % case.page_size
}

/// Scores of a million and more, all of one size.
fn survives_huge_scores(context: &CudaContext, dtype: DType) -> Result<(), String> {
    let mut case = Case::new(dtype, shape(2, 2, 32), 16, &[vec![50, 50, 300]]);
    case.qkv.iter_mut().for_each(|x| *x *= 1e10);
    for regime in [Regime::Few, Regime::Many] {
        let got = case.run(context, &case.plan, &case.qkv, regime, DType::F32)?;
        if !got.iter().all(|x| x.abs() <= 1.0) {
            return Err(format!("{dtype:?}, {regime:?}: huge scores overflow"));
        }
    }
    Ok(())
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    for dtype in [DType::Bf16, DType::F32] {
        let lens = [1, 15, 17, 64, 65, 130];
        let full: Vec<_> = lens.iter().map(|&len| ends(0..len, Visibility::Full, len)).collect();
        Case::new(dtype, shape(2, 2, 32), 16, &full).holds(context)?;
        let blocks: Vec<_> = [17, 65, 130, 300].iter().map(|&len| ends(len - 17..len, Visibility::BlockCausal(4), len)).collect();
        Case::new(dtype, shape(2, 1, 64), 16, &blocks).holds(context)?;
        let causal: Vec<_> = [300, 15, 64].iter().map(|&len| ends((0..len).step_by(7), Visibility::BlockCausal(1), len)).collect();
        Case::new(dtype, shape(3, 1, 32), 16, &causal).holds(context)?;
        // Any ends in any order, a sequence without rows, one that sees nothing.
        let any = [(0..40).map(|i| (i * 37 + i % 5) % 301).collect(), vec![], vec![0, 0], vec![600, 256, 257, 512, 513]];
        Case::new(dtype, shape(3, 1, 96), 16, &any).holds(context)?;
        isolates(context, dtype, Regime::Few)?;
        isolates(context, dtype, Regime::Many)?;
        survives_huge_scores(context, dtype)?;
    }
    Ok(())
}

#[test]
fn rows_attend_to_what_they_see() {
    for context in machines() {
        holds(&context).unwrap();
    }
}

/// Head dimensions with an odd share of fragments, and page sizes: one machine is enough, the
/// threads meet as above.
#[test]
fn any_shape_that_the_launcher_accepts() {
    let context = &any_machine();
    for (dtype, head_dims) in [(DType::Bf16, &[16, 48, 112, 128, 144, 256][..]), (DType::F32, &[1, 7, 33, 128, 256])] {
        for (i, &head_dim) in head_dims.iter().enumerate() {
            let page_size = [1, 128, 2, 8, 64, 32][i];
            let sequences = [ends(60..70, Visibility::BlockCausal(3), 70), ends(0..9, Visibility::Full, 290)];
            Case::new(dtype, shape(2, 1, head_dim), page_size, &sequences).holds(context).unwrap();
        }
    }
}

#[test]
fn a_head_dim_without_a_kernel_is_refused() {
    let context = &any_machine();
    let case = Case::new(DType::Bf16, shape(1, 1, 24), 16, &[vec![3]]);
    let error = case.run(context, &case.plan, &case.qkv, Regime::Few, DType::F32).unwrap_err();
    assert!(error.contains("head_dim 24") && error.contains("multiples of 16"), "{error}");
}
