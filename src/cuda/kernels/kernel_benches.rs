//! The table of what `redraft kernels run` can run: for each launcher, the numbers of its shape,
//! its inputs, and what it must move.
#![forbid(unsafe_code)]

use crate::backend::{DType, Epilogue, ExpertShape, HeadShape, NormKind, Rope, RouterScore};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::Address;
use crate::cuda::kernels::kernel_bench::{self, BenchRequest, Inputs, KernelBench, Key, Op, Report, Shape};
use crate::cuda::ops::attention::{Attention, Regime};
use crate::cuda::ops::embed::Embed;
use crate::cuda::ops::gather::Gather;
use crate::cuda::ops::linear::Linear;
use crate::cuda::ops::moe::MoeArrays;
use crate::cuda::ops::norm::NormOp;
use crate::cuda::ops::remask::{RemaskParams, state};
use crate::cuda::ops::rope_append::RopeAppend;
use crate::cuda::ops::sample::{DrawRecord, SampleOp, SampledRecord};
use crate::cuda::ops::select_masked::{SelectMasked, SequenceSummary, StepRecord};
use crate::cuda::ops::shortlist::{SampleShortlistOp, ShortlistOp};
use crate::cuda::ops::unmask::UnmaskParams;
use crate::cuda::ops::{
    attention, embed, gather, guidance, linear, moe, norm, remask, rope_append, route, sample, select_masked, shortlist, unmask, weight,
};
use crate::error::{Error, Result};
use crate::sampling::{Rank, UnmaskStep};

/// Of K/V, as the engine has it by default.
const PAGE_SIZE: u32 = 16;

const fn key(name: &'static str, device: u32, small: u32) -> Key {
    Key { name, device, small }
}

/// By name: those of a stem carry it. `copy` is no kernel of ours but the ceiling of those that
/// memory bounds.
pub static KERNEL_BENCHES: &[KernelBench] = &[
    KernelBench {
        name: "attention",
        reads_weights: false,
        keys: &[
            key("sequences", 8, 2),
            key("rows", 32, 5),
            key("len", 2048, 70),
            key("heads", 32, 4),
            key("kv_heads", 8, 2),
            key("head_dim", 128, 32),
        ],
        prepare: attention,
    },
    KernelBench { name: "copy", reads_weights: false, keys: &[key("mebibytes", 1024, 1)], prepare: copy },
    KernelBench {
        name: "embed",
        reads_weights: true,
        keys: &[key("rows", 4096, 5), key("width", 4096, 66), key("vocab", 50_258, 100)],
        prepare: embed,
    },
    KernelBench { name: "gather", reads_weights: false, keys: &[key("rows", 8192, 5), key("width", 8192, 66)], prepare: gather },
    KernelBench { name: "guidance", reads_weights: false, keys: &[key("rows", 128, 5), key("width", 4096, 66)], prepare: apply_guidance },
    KernelBench {
        name: "linear",
        reads_weights: true,
        keys: &[key("rows", 1024, 5), key("n", 12_288, 70), key("k", 4096, 300)],
        prepare: linear,
    },
    KernelBench {
        name: "moe",
        reads_weights: true,
        keys: &[key("rows", 64, 5), key("experts", 256, 6), key("top_k", 8, 2), key("hidden", 2048, 40), key("inner", 512, 24)],
        prepare: moe,
    },
    KernelBench {
        name: "norm",
        reads_weights: false,
        keys: &[key("rows", 4096, 5), key("width", 4096, 66), key("rms", 1, 1)],
        prepare: norm,
    },
    KernelBench { name: "remask", reads_weights: false, keys: &[key("sequences", 64, 3), key("len", 1024, 40)], prepare: remask },
    KernelBench {
        name: "rope_append",
        reads_weights: false,
        keys: &[key("rows", 1024, 5), key("heads", 32, 4), key("kv_heads", 8, 2), key("head_dim", 128, 32)],
        prepare: rope_append,
    },
    KernelBench {
        name: "route",
        reads_weights: false,
        keys: &[key("rows", 1024, 5), key("experts", 256, 6), key("top_k", 8, 2)],
        prepare: route,
    },
    KernelBench {
        name: "sample",
        reads_weights: true,
        keys: &[key("rows", 128, 5), key("k", 4096, 40), key("vocab", 126_464, 100), key("top_p_percent", 100, 100)],
        prepare: sample,
    },
    KernelBench {
        name: "sample_shortlist",
        reads_weights: true,
        keys: &[key("rows", 128, 5), key("k", 4096, 40), key("vocab", 126_464, 100), key("ids", 256, 9), key("top_p_percent", 100, 100)],
        prepare: sample_shortlist,
    },
    KernelBench {
        name: "select_masked",
        reads_weights: false,
        keys: &[key("sequences", 64, 3), key("rows", 32, 5)],
        prepare: select_masked,
    },
    KernelBench {
        name: "shortlist",
        reads_weights: true,
        keys: &[key("rows", 128, 5), key("k", 4096, 40), key("vocab", 126_464, 100), key("ids", 256, 9)],
        prepare: shortlist,
    },
    KernelBench { name: "unmask", reads_weights: false, keys: &[key("sequences", 64, 3), key("rows", 32, 5)], prepare: unmask },
];

/// The entry of a name.
pub(super) fn kernel_bench_named(name: &str) -> Result<&'static KernelBench> {
    let names = || KERNEL_BENCHES.iter().map(|bench| bench.name).collect::<Vec<_>>().join(", ");
    let found = KERNEL_BENCHES.iter().find(|bench| bench.name == name);
    found.ok_or_else(|| Error::request(format!("kernel {name:?}: there are {}", names())))
}

impl BenchRequest<'_> {
    /// Refuses names and shapes that are not there, before any machine is opened.
    pub fn check(&self) -> Result<()> {
        Shape::resolve(kernel_bench_named(self.name)?, self.shape, self.dtype, self.weights, self.small).map(drop)
    }
}

/// Runs one kernel on a machine and times it.
pub fn bench_kernel(context: &CudaContext, request: &BenchRequest) -> Result<Report> {
    kernel_bench::run(context, kernel_bench_named(request.name)?, request)
}

fn count(rows: u32, width: u32) -> u64 {
    u64::from(rows) * u64::from(width)
}

/// Canvas indices and the like have 32 bits.
fn small_count(rows: u32, width: u32) -> Result<u32> {
    let total = count(rows, width);
    u32::try_from(total).map_err(|_| Error::request(format!("{rows} x {width} are more than 32 bits number")))
}

/// Four canvas bytes.
fn bytes4(byte: u8) -> u32 {
    u32::from_ne_bytes([byte; 4])
}

/// Sequences whose ranges are masked throughout, one after the other on the canvas and in the plan.
fn sequences(inputs: &Inputs, shape: &Shape) -> Result<(u32, u32, u64)> {
    let (sequences, rows) = (shape.get("sequences"), shape.get("rows"));
    let total = small_count(sequences, rows)?;
    let steps: Vec<StepRecord> = (0..sequences)
        .map(|s| StepRecord {
            seed: 7,
            canvas_first: s * rows,
            range_end: rows,
            row_first: s * rows,
            sample_first: s * rows,
            sample_count: rows,
            sample: s,
            temperature: 1.0,
            top_p: 1.0,
            ..StepRecord::default()
        })
        .map(|step| step.unmasking(&UnmaskStep::Best { rank: Rank::Confidence, n: rows as usize / 2 }))
        .collect();
    Ok((sequences, total, inputs.records(&steps)?))
}

fn select_masked(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (sequences, rows, steps) = sequences(inputs, shape)?;
    let draws = inputs.records(&vec![DrawRecord::default(); rows as usize])?;
    let op = SelectMasked {
        sequences,
        num_sampled: rows,
        bucket: rows,
        steps,
        summaries: inputs.records(&vec![SequenceSummary::default(); sequences as usize])?,
        state: inputs.words(rows.div_ceil(4), |_, _| bytes4(state::MASKED))?,
        rows: inputs.words(rows, |_, _| 0)?,
        draws,
    };
    let bytes = u64::from(rows) * (1 + 4 + size_of::<DrawRecord>() as u64);
    Ok(Op::new(bytes, move |context| select_masked::select_masked(context, &op)))
}

fn heads(shape: &Shape) -> Result<HeadShape> {
    let [num_heads, num_kv_heads, head_dim] = ["heads", "kv_heads", "head_dim"].map(|name| shape.get(name) as usize);
    if num_heads % num_kv_heads != 0 {
        return Err(Error::request(format!("heads={num_heads}: not a multiple of kv_heads={num_kv_heads}")));
    }
    Ok(HeadShape { num_heads, num_kv_heads, head_dim })
}

/// Every row of a sequence sees all of it.
fn attention(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (sequences, rows, len, dtype) = (shape.get("sequences"), shape.get("rows"), shape.get("len"), shape.dtype);
    let heads = heads(shape)?;
    let total = small_count(sequences, rows)?;
    let indptr: Vec<u32> = (0..=sequences).map(|s| s * rows).collect();
    let regime = Regime::for_batch(&inputs.limits(), dtype, heads, &indptr);
    let tiles = attention::tiles(&indptr, heads, regime.tile_queries(dtype, heads));
    let pages = len.div_ceil(PAGE_SIZE);
    let width = (heads.num_kv_heads * heads.head_dim) as u32;
    let slots = small_count(sequences, pages)? * PAGE_SIZE;
    let out = inputs.space(total, heads.q_width() as u32, dtype)?;
    let op = Attention {
        heads,
        page_size: PAGE_SIZE,
        dtype,
        regime,
        tiles: inputs.records(&tiles)?,
        num_tiles: tiles.len() as u32,
        max_visible: len,
        qkv: inputs.noise(total, heads.qkv_width() as u32, DType::F32)?,
        keys: inputs.noise(slots, width, dtype)?,
        values: inputs.noise(slots, width, dtype)?,
        visible: inputs.words(total, |_, _| len)?,
        page_indptr: inputs.words(sequences + 1, |s, _| s * pages)?,
        pages: inputs.words(sequences * pages, |page, _| page)?,
        out,
        out_dtype: dtype,
    };
    let queries = count(total, heads.q_width() as u32);
    let kv = 2 * count(sequences, len) * u64::from(width);
    let bytes = queries * (4 + dtype.bytes() as u64) + kv * dtype.bytes() as u64;
    let launch = move |context: &_| attention::attention(context, &op);
    Ok(Op::new(bytes, launch).flop(4 * queries * u64::from(len)).result(out, queries, dtype))
}

fn rope_append(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, heads, dtype) = (shape.get("rows"), heads(shape)?, shape.dtype);
    let (q, kv) = (heads.q_width() as u32, (heads.num_kv_heads * heads.head_dim) as u32);
    let slots = rows.next_multiple_of(PAGE_SIZE);
    let mut rotations = Vec::new();
    crate::backend::rope::extend_rotations(Rope::plain(1e4), heads.head_dim, rows as usize, &mut rotations);
    let qkv = inputs.noise(rows, heads.qkv_width() as u32, DType::F32)?;
    let op = RopeAppend {
        rows,
        heads,
        rotary_dim: heads.head_dim,
        page_size: PAGE_SIZE,
        dtype,
        norm: None,
        qkv,
        positions: inputs.words(rows, |row, _| row)?,
        slots: inputs.words(rows, |row, _| row)?,
        rotations: inputs.records(&rotations)?,
        keys: inputs.space(slots, kv, dtype)?,
        values: inputs.space(slots, kv, dtype)?,
    };
    let bytes = count(rows, 2 * q) * 4 + 2 * count(rows, kv) * (4 + dtype.bytes() as u64);
    let launch = move |context: &_| rope_append::rope_append(context, &op);
    Ok(Op::new(bytes, launch).result(qkv, count(rows, heads.qkv_width() as u32), DType::F32))
}

fn copy(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let len = shape.get("mebibytes").checked_mul(1 << 18).ok_or_else(|| Error::request("copy: at most 16383 MiB"))?;
    let (src, dst) = (inputs.noise(1, len, DType::F32)?, inputs.space(1, len, DType::F32)?);
    let bytes = 4 * len as usize;
    Ok(Op::new(2 * bytes as u64, move |context| context.driver.copy(src, dst, bytes)).unrecorded())
}

fn top_p_of(shape: &Shape) -> f32 {
    shape.get("top_p_percent").min(100) as f32 / 100.0
}

/// A draw for each row.
fn draws(inputs: &Inputs, shape: &Shape) -> Result<Address> {
    let top_p = top_p_of(shape);
    let draw =
        |random: u32| DrawRecord { u: f64::from(random) / f64::from(u32::MAX) * 0.999, temperature: 1.0, top_p, ..DrawRecord::default() };
    inputs.records(&(0..shape.get("rows")).map(|_| draw(inputs.next())).collect::<Vec<DrawRecord>>())
}

fn sample(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, k, vocab, dtype) = (shape.get("rows"), shape.get("k"), shape.get("vocab"), shape.dtype);
    let (top_p, draws) = (top_p_of(shape), draws(inputs, shape)?);
    let sampled = inputs.records(&vec![SampledRecord::default(); rows as usize])?;
    let op = SampleOp {
        rows,
        k,
        vocab,
        hidden: inputs.noise(rows, k, dtype)?,
        dtype,
        head: inputs.weights(1, vocab, k, shape)?,
        bias: Some(inputs.noise(1, vocab, DType::F32)?),
        banned: Some(inputs.words(vocab.div_ceil(32), |index, _| u32::from(index == 0))?),
        draws,
        sampled,
        any_fused: top_p == 1.0,
        any_nucleus: top_p < 1.0,
    };
    let bytes = count(rows, k) * dtype.bytes() as u64 + weight_bytes(shape, vocab, k);
    let words = rows * (size_of::<SampledRecord>() / 4) as u32;
    Ok(Op::new(bytes, move |context| sample::sample(context, &op)).flop(2 * count(rows, k) * u64::from(vocab)).result(
        sampled,
        u64::from(words),
        DType::F32,
    ))
}

/// Bytes of an (n, k) weight.
fn weight_bytes(shape: &Shape, n: u32, k: u32) -> u64 {
    weight::weight_bytes(shape.dtype, shape.weights, n as usize, k as usize) as u64
}

/// The head of all rows, of which only the ids remain.
fn shortlist(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, k, vocab, dtype) = (shape.get("rows"), shape.get("k"), shape.get("vocab"), shape.dtype);
    let ids = list_len(shape)?;
    let op = ShortlistOp {
        rows,
        k,
        vocab,
        hidden: inputs.noise(rows, k, dtype)?,
        dtype,
        head: inputs.weights(1, vocab, k, shape)?,
        bias: Some(inputs.noise(1, vocab, DType::F32)?),
        banned: Some(inputs.words(vocab.div_ceil(32), |index, _| u32::from(index == 0))?),
        count: ids,
        ids: inputs.space(rows, ids, DType::F32)?,
    };
    let bytes = count(rows, k) * dtype.bytes() as u64 + weight_bytes(shape, vocab, k);
    Ok(Op::new(bytes, move |context| shortlist::shortlist(context, &op)).flop(2 * count(rows, k) * u64::from(vocab)))
}

fn list_len(shape: &Shape) -> Result<u32> {
    let (ids, vocab) = (shape.get("ids"), shape.get("vocab"));
    if ids > shortlist::MAX_SHORTLIST.min(vocab) {
        return Err(Error::request(format!("ids={ids}: at most {} of a vocabulary of {vocab}", shortlist::MAX_SHORTLIST)));
    }
    Ok(ids)
}

/// Every row has a list of its own, spread over the vocabulary.
fn sample_shortlist(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, k, vocab, dtype) = (shape.get("rows"), shape.get("k"), shape.get("vocab"), shape.dtype);
    let ids = list_len(shape)?;
    let draws = draws(inputs, shape)?;
    let sampled = inputs.records(&vec![SampledRecord::default(); rows as usize])?;
    let part = vocab / ids;
    let op = SampleShortlistOp {
        rows,
        k,
        hidden: inputs.noise(rows, k, dtype)?,
        dtype,
        head: inputs.weights(1, vocab, k, shape)?,
        bias: Some(inputs.noise(1, vocab, DType::F32)?),
        count: ids,
        ids: inputs.words(small_count(rows, ids)?, |at, random| at % ids * part + random % part)?,
        which: inputs.words(rows, |row, _| row)?,
        draws,
        sampled,
    };
    let (bytes, words) = (
        count(rows, k) * dtype.bytes() as u64 + count(rows, ids) * weight_bytes(shape, 32, k) / 32,
        rows * (size_of::<SampledRecord>() / 4) as u32,
    );
    let launch = move |context: &_| shortlist::sample_shortlist(context, &op);
    Ok(Op::new(bytes, launch).flop(2 * count(rows, ids) * u64::from(k)).result(sampled, u64::from(words), DType::F32))
}

fn embed(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, width, vocab, dtype) = (shape.get("rows"), shape.get("width"), shape.get("vocab"), shape.dtype);
    let ids = inputs.words(rows, |_, random| random % vocab)?;
    let (table, out) = (inputs.weights(1, vocab, width, shape)?, inputs.space(rows, width, DType::F32)?);
    let op = Embed { rows, width, vocab, dtype, ids, index: None, table, positions: None, out };
    let bytes = 4 * count(rows, width) + u64::from(rows) * weight_bytes(shape, 32, width) / 32;
    Ok(Op::new(bytes, move |context| embed::embed(context, &op)).result(out, count(rows, width), DType::F32))
}

/// Sizes, and the space of a routing of all rows. The keys of `route` name no widths.
fn places(inputs: &Inputs, shape: &Shape, hidden_dim: u32, expert_dim: u32) -> Result<MoeArrays> {
    let (rows, num_experts, top_k) = (shape.get("rows"), shape.get("experts"), shape.get("top_k"));
    let sizes = ExpertShape {
        num_experts: num_experts as usize,
        top_k: top_k as usize,
        hidden_dim: hidden_dim as usize,
        expert_dim: expert_dim as usize,
    };
    sizes.check(RouterScore::Softmax { renormalise: true }).map_err(|what| Error::request(format!("--shape: {what}")))?;
    let (count, dtype) = (small_count(rows, top_k)?, shape.dtype);
    let tiles = route::max_tiles(sizes, rows, moe::tile_rows(sizes, rows));
    let words = |len: u32| inputs.space(len, 1, DType::F32);
    Ok(MoeArrays {
        dtype,
        shape: sizes,
        rows,
        expert: words(count)?,
        weight: words(count)?,
        count: words(num_experts)?,
        token: words(count)?,
        place: words(count)?,
        tiles: inputs.space(tiles, 4, DType::F32)?,
        num_tiles: words(1)?,
        input: inputs.space(count, hidden_dim, dtype)?,
        inner: inputs.space(count, expert_dim, dtype)?,
        output: inputs.space(count, hidden_dim, DType::F32)?,
    })
}

/// Softmax scores; the widths are of no consequence.
fn route(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let places = places(inputs, shape, 1, 1)?;
    let (rows, num_experts) = (places.rows, shape.get("experts"));
    let logits = inputs.noise(rows, num_experts, DType::F32)?;
    let chosen = count(rows, shape.get("top_k"));
    let launch = move |context: &_| places.route(context, logits, RouterScore::Softmax { renormalise: true }, None);
    Ok(Op::new(4 * count(rows, num_experts) + 16 * chosen, launch).result(places.weight, chosen, DType::F32))
}

/// Every row through neighbouring experts from a random one on: gather, both products, the sum.
fn moe(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (c, f, dtype) = (shape.get("hidden"), shape.get("inner"), shape.dtype);
    let (rows, num_experts, top_k) = (shape.get("rows"), shape.get("experts"), shape.get("top_k"));
    let space = places(inputs, shape, c, f)?;
    let mut rows_of = vec![Vec::new(); num_experts as usize];
    for row in 0..rows {
        let first = inputs.next() % num_experts;
        (0..top_k).for_each(|j| rows_of[((first + j) % num_experts) as usize].push(row));
    }
    let tile_rows = moe::tile_rows(space.shape, rows);
    let (mut tiles, mut token, mut place) = (Vec::new(), Vec::new(), vec![Vec::new(); rows as usize]);
    for (expert, rows) in rows_of.iter().enumerate() {
        for tile in rows.chunks(tile_rows as usize) {
            tiles.push([expert as u32, token.len() as u32, tile.len() as u32, 0]);
            for row in tile {
                place[*row as usize].push(token.len() as u32);
                token.push(*row);
            }
        }
    }
    let places = MoeArrays {
        weight: inputs.noise(rows, top_k, DType::F32)?,
        num_tiles: inputs.records(&[tiles.len() as u32])?,
        tiles: inputs.records(&tiles)?,
        token: inputs.records(&token)?,
        place: inputs.records(&place.concat())?,
        ..space
    };
    let used = rows_of.iter().filter(|rows| !rows.is_empty()).count() as u64;
    let weights = |n: u32, k: u32| inputs.weights(num_experts, n, k, shape);
    let (up, down) = (weights(2 * f, c)?, weights(c, f)?);
    let (x, out) = (inputs.noise(rows, c, dtype)?, inputs.space(rows, c, DType::F32)?);
    let bytes = used * (weight_bytes(shape, 2 * f, c) + weight_bytes(shape, c, f)) + count(rows, c) * (dtype.bytes() as u64 + 8);
    let launch = move |context: &_| places.moe(context, x, dtype, up, down, out);
    Ok(Op::new(bytes, launch).flop(6 * count(rows, top_k) * count(c, f)))
}

fn apply_guidance(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, width) = (shape.get("rows"), shape.get("width"));
    let len = small_count(rows, width)?;
    let (base, out) = (inputs.noise(rows, width, DType::F32)?, inputs.noise(rows, width, DType::F32)?);
    Ok(Op::new(12 * u64::from(len), move |context| guidance::apply_guidance(context, len, 0.5, base, out)))
}

fn gather(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, width, dtype) = (shape.get("rows"), shape.get("width"), shape.dtype);
    let index = inputs.words(rows, |_, random| random % rows)?;
    let (x, out) = (inputs.noise(rows, width, dtype)?, inputs.space(rows, width, dtype)?);
    let op = Gather { count: rows, width, rows: Some(index), x, x_dtype: dtype, out, out_dtype: dtype };
    let bytes = 2 * count(rows, width) * dtype.bytes() as u64;
    Ok(Op::new(bytes, move |context| gather::gather(context, &op)).result(out, count(rows, width), dtype))
}

fn linear(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, n, k, dtype) = (shape.get("rows"), shape.get("n"), shape.get("k"), shape.dtype);
    let (x, weight) = (inputs.noise(rows, k, dtype)?, inputs.weights(1, n, k, shape)?);
    let bias = Some(inputs.noise(1, n, DType::F32)?);
    let out = inputs.space(rows, n, dtype)?;
    let op = Linear { rows, n, k, dtype, x, weight, bias, epilogue: Epilogue::Store, out, out_dtype: dtype };
    let bytes = (count(rows, k) + count(rows, n)) * dtype.bytes() as u64 + weight_bytes(shape, n, k);
    let launch = move |context: &_| linear::linear(context, &op);
    Ok(Op::new(bytes, launch).flop(2 * count(rows, n) * u64::from(k)).result(out, count(rows, n), dtype))
}

/// `rms` 1 is RMSNorm after a residual, anything else LayerNorm with a bias.
fn norm(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (rows, width, dtype) = (shape.get("rows"), shape.get("width"), shape.dtype);
    let rms = shape.get("rms") == 1;
    let x = inputs.noise(rows, width, DType::F32)?;
    let (weight, other) = (inputs.noise(1, width, DType::F32)?, inputs.noise(rows, width, DType::F32)?);
    let (bias, residual) = if rms { (None, Some(other)) } else { (Some(other), None) };
    let out = inputs.space(rows, width, dtype)?;
    let op = NormOp { rows, width, eps: 1e-5, x, weight, bias, out, out_dtype: dtype };
    let kind = if rms { NormKind::Rms } else { NormKind::Layer };
    // The residual is read, and x written back.
    let bytes = count(rows, width) * (4 + dtype.bytes() as u64 + if rms { 8 } else { 0 });
    Ok(Op::new(bytes, move |context| norm::add_norm(context, &op, kind, residual)).result(out, count(rows, width), dtype))
}

/// One position of each sequence at a time, so that many launches find something to take.
fn remask(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (sequences, len) = (shape.get("sequences"), shape.get("len"));
    let total = small_count(sequences, len)?;
    let params = RemaskParams {
        indptr: inputs.words(sequences + 1, |s, _| s * len)?,
        count: inputs.words(sequences, |_, _| 1)?,
        token: inputs.words(total, |_, random| random % 1000)?,
        confidence: inputs.noise(sequences, len, DType::F32)?,
        state: inputs.words(total.div_ceil(4), |_, _| bytes4(state::REVEALED))?,
        stage: inputs.words(total.div_ceil(4), |_, _| 0)?,
        step: inputs.words(total, |_, _| 1)?,
        positions: inputs.words(total, |_, _| 0)?,
        taken: inputs.words(sequences, |_, _| 0)?,
        mask_id: 1000,
        next_stage: 1,
    };
    let launch = move |context: &_| remask::remask(context, sequences, &params);
    Ok(Op::new(5 * u64::from(total), launch).result(params.confidence, u64::from(total), DType::F32))
}

fn unmask(inputs: &Inputs, shape: &Shape) -> Result<Op> {
    let (sequences, rows, steps) = sequences(inputs, shape)?;
    let per_sequence = shape.get("rows");
    let sampled = |row: u32| {
        let confidence = inputs.next() as f32 / u32::MAX as f32;
        SampledRecord { token: row, confidence, position: row % per_sequence, ..SampledRecord::default() }
    };
    let confidence = inputs.noise(1, rows, DType::F32)?;
    let params = UnmaskParams {
        sequences: steps,
        summaries: inputs.records(&vec![SequenceSummary::default(); sequences as usize])?,
        sampled: inputs.records(&(0..rows).map(sampled).collect::<Vec<_>>())?,
        token: inputs.words(rows, |_, _| 0)?,
        confidence,
        state: inputs.words(rows.div_ceil(4), |_, _| bytes4(state::MASKED))?,
        stage: inputs.words(rows.div_ceil(4), |_, _| 0)?,
        step: inputs.words(rows, |_, _| 0)?,
    };
    let bytes = u64::from(rows) * size_of::<SampledRecord>() as u64;
    let launch = move |context: &_| unmask::unmask(context, sequences, &params);
    Ok(Op::new(bytes, launch).result(confidence, u64::from(rows), DType::F32))
}
