//! The CUDA backend: checks the contract of each op, then hands it to the launcher of the same
//! name. Which machine runs the launches, a GPU or the emulation, is the driver's business.
//!
//! Weights of floats lie row-major as in the checkpoint, those in groups in blocks. The residual
//! stream and fused QKV rows are f32; what only products read (normed rows, attention output, MLP)
//! is in the weight dtype. K/V: `[layer][page][kv head][offset][head_dim]`, keys and values apart.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use half::bf16;

use super::device_steps::DeviceSteps;
use super::packed_arrays::PackedArrays;
use super::shortlists::Shortlists;
use super::signature::{BatchShape, TileShape};
use super::state::{Batch, Buffer, Cuda, KvCache, Origin, Rows, Weight};
use crate::backend::group_blocks::{Bits, TableRows, matrix_words, unpadded};
use crate::backend::measure::{Ceilings, Measure};
use crate::backend::{
    Activation, Backend, Candidates, DType, Epilogue, ExpertChoice, ExpertShape, HeadShape, Inspect, KvShape, Norm, Rotation, Router,
    RowList, RowSource, WeightFormat, WeightShape,
};
use crate::cuda::driver::interface::Address;
use crate::cuda::ops::attention::Attention;
use crate::cuda::ops::embed::Embed;
use crate::cuda::ops::gather::Gather;
use crate::cuda::ops::linear::Linear;
use crate::cuda::ops::moe::Routing;
use crate::cuda::ops::rope_append::{HeadNorm, RopeAppend};
use crate::cuda::ops::sample::SampleOp;
use crate::cuda::ops::{attention, embed, gather, guidance, linear, norm, rope_append, sample, shortlist};
use crate::error::{Error, Result};
use crate::packed_weights::PackedWords;
use crate::plan::Plan;
use crate::sampling::{Draw, SampledToken};

impl Backend for Cuda {
    type Buffer = Buffer;
    type Weight = Weight;
    type KvCache = KvCache;
    type Batch = Batch;
    type Rows = Rows;
    type Shortlists = Shortlists;
    type Routing = Routing;
    type Runner = DeviceSteps;

    const MAX_SHORTLIST: usize = shortlist::MAX_SHORTLIST as usize;

    fn name(&self) -> String {
        self.context.driver.name()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn alloc<const N: usize>(&self, parts: [Activation; N]) -> Result<[Buffer; N]> {
        let shapes = parts.map(|part| match part {
            Activation::F32(len) => (len, DType::F32),
            Activation::Input(len) => (len, self.dtype),
        });
        // Parts begin where vectors of any width may.
        let bytes = shapes.map(|(len, dtype)| (len * dtype.bytes()).next_multiple_of(256));
        let total: usize = bytes.iter().sum();
        let memory = Arc::new(self.context.memory(total)?);
        self.context.driver.fill(memory.address(), 0, total / 4)?;
        let mut next = memory.address();
        Ok(std::array::from_fn(|i| {
            let (len, dtype) = shapes[i];
            next += bytes[i] as u64;
            Buffer { _memory: memory.clone(), address: next - bytes[i] as u64, len, dtype }
        }))
    }

    fn upload(&self, src: &[f32]) -> Result<Buffer> {
        let memory = self.context.memory(4 * src.len())?;
        self.context.driver.write(memory.address(), bytemuck::cast_slice(src))?;
        Ok(Buffer { address: memory.address(), _memory: Arc::new(memory), len: src.len(), dtype: DType::F32 })
    }

    fn download(&self, src: &Buffer, offset: usize, dst: &mut [f32]) -> Result<()> {
        assert!(offset + dst.len() <= src.len, "{} elements at {offset} of {}", dst.len(), src.len);
        let from = src.address + (offset * src.dtype.bytes()) as u64;
        match src.dtype {
            DType::F32 => self.context.driver.read(from, bytemuck::cast_slice_mut(dst)),
            DType::Bf16 => {
                let mut rounded = vec![bf16::ZERO; dst.len()];
                self.context.driver.read(from, bytemuck::cast_slice_mut(&mut rounded))?;
                dst.iter_mut().zip(rounded).for_each(|(wide, narrow)| *wide = narrow.to_f32());
                Ok(())
            }
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.context.driver.synchronize()
    }

    fn weight_as(&self, format: WeightFormat, shape: WeightShape, source: &dyn RowSource) -> Result<Weight> {
        let (num, n, k) = match shape {
            WeightShape::Matrix { n, k } | WeightShape::Table { n, k } => (1, n, k),
            WeightShape::Experts { num, n, k } => (num, n, k),
        };
        if let Some(dtype) = format.float() {
            assert!(dtype == self.dtype, "a weight in {} on {:?}", format.name(), self.dtype);
            return self.upload_rows(num * n, k, source);
        }
        self.upload_blocks(Bits::of(format)?, num, n, k, source)
    }

    fn weight_of_words(&self, format: WeightFormat, shape: WeightShape, words: PackedWords) -> Result<Weight> {
        let bits = Bits::of(format)?;
        let (num, n, k) = match shape {
            // A table lies row by row in the file, and in blocks on the device.
            WeightShape::Table { n, k } => return self.upload_blocks(bits, 1, n, k, &TableRows::new(bits, n, k, &words)?),
            WeightShape::Matrix { n, k } => (1, n, k),
            WeightShape::Experts { num, n, k } => (num, n, k),
        };
        let len = unpadded(words.len(), num * matrix_words(bits, n, k))?;
        Ok(Weight { memory: self.upload_words(&words[..len])?, bits: Some(bits), n: num * n, k })
    }

    fn words<'w>(&self, _weight: &'w Weight) -> Option<Vec<&'w [u32]>> {
        None
    }

    fn weight_format(&self) -> Option<WeightFormat> {
        self.weight_format
    }

    fn routing(&self, rows: usize, shape: ExpertShape) -> Result<Routing> {
        Routing::new(&self.context, self.dtype, rows, shape)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache> {
        let KvShape { num_layers, num_pages, page_size, num_kv_heads, head_dim } = shape;
        if !page_size.is_power_of_two() {
            return Err(Error::request(format!("page size {page_size} is not a power of two")));
        }
        assert!(num_kv_heads > 0 && head_dim > 0, "{shape:?} holds nothing");
        let bytes = num_layers * num_pages * page_size * num_kv_heads * head_dim * self.dtype.bytes();
        let kv = KvCache { keys: self.context.memory(bytes)?, values: self.context.memory(bytes)?, shape };
        for memory in [&kv.keys, &kv.values] {
            self.context.driver.fill(memory.address(), poison(self.dtype), bytes.div_ceil(4))?;
        }
        Ok(kv)
    }

    fn copy_page(&self, kv: &mut KvCache, src: u32, dst: u32) -> Result<()> {
        let (pages, page, layer) = (kv.shape.num_pages, kv.page_bytes(self.dtype), kv.layer_bytes(self.dtype));
        assert!((src as usize) < pages && (dst as usize) < pages, "copy of page {src} to {dst} of {pages}");
        for memory in [&kv.keys, &kv.values] {
            for base in (0..kv.shape.num_layers).map(|l| memory.address() + (l * layer) as u64) {
                self.context.driver.copy(base + u64::from(src) * page as u64, base + u64::from(dst) * page as u64, page)?;
            }
        }
        Ok(())
    }

    fn batch(&self, plan: &Plan) -> Result<Batch> {
        let mut words = PackedArrays::default();
        let offsets = words.plan(plan, plan.num_rows());
        let memory = self.upload_words(&words.0)?;
        Ok(Batch {
            arrays: offsets.pointers(memory.address()),
            shape: BatchShape::for_plan(plan, plan.num_rows() as u32),
            origin: Origin::Host { plan: Box::new(plan.clone()), _memory: memory, tiles: RefCell::new(None) },
        })
    }

    fn rows(&self, rows: &[u32]) -> Result<Rows> {
        let memory = self.upload_words(rows)?;
        Ok(Rows { address: memory.address(), len: rows.len(), _memory: Some(memory) })
    }

    fn embed(&self, batch: &Batch, table: &Weight, positions: Option<&Weight>, out: &mut Buffer) -> Result<()> {
        let rows = batch.shape.rows;
        assert!(positions.is_none_or(|p| p.k == table.k), "tables of widths {} and {:?}", table.k, positions.map(|p| p.k));
        assert!(out.dtype == DType::F32 && out.len >= rows as usize * table.k, "out of {} for {rows} rows of {}", out.len, table.k);
        let op = Embed {
            rows,
            width: table.k as u32,
            vocab: table.n as u32,
            dtype: self.dtype,
            ids: batch.arrays.ids,
            index: batch.arrays.index,
            table: table.at(),
            positions: positions.map(|p| (batch.arrays.positions, p.at(), p.n as u32)),
            out: out.address,
        };
        embed::embed(&self.context, &op)
    }

    fn norm(&self, rows: usize, x: &mut Buffer, residual: Option<&Buffer>, norm: &Norm<Buffer>, out: &mut Buffer) -> Result<()> {
        let Norm { kind, eps, weight, bias } = *norm;
        let width = weight.len;
        assert!(x.dtype == DType::F32 && width > 0 && bias.is_none_or(|b| b.len == width), "weight of {width}");
        assert!(x.len.min(out.len) >= rows * width, "x of {}, out of {} for {rows} rows of {width}", x.len, out.len);
        assert!(residual.is_none_or(|r| r.dtype == DType::F32 && r.len >= rows * width), "residual for {rows} rows of {width}");
        let op = norm::NormOp {
            rows: rows as u32,
            width: width as u32,
            eps,
            x: x.address,
            weight: weight.address(),
            bias: bias.map(Buffer::address),
            out: out.address,
            out_dtype: out.dtype,
        };
        norm::add_norm(&self.context, &op, kind, residual.map(|r| r.address))
    }

    fn linear(&self, rows: usize, x: &Buffer, weight: &Weight, bias: Option<&Buffer>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let Weight { n, k, .. } = *weight;
        let width = if epilogue == Epilogue::SwiGlu { n / 2 } else { n };
        assert!(x.len >= rows * k && out.len >= rows * width, "x of {}, out of {} for {rows} rows, {n} x {k}", x.len, out.len);
        assert!(bias.is_none_or(|b| b.len == n), "bias for {n} columns");
        let (x, _copy) = self.as_input(x, rows * k)?;
        let op = Linear {
            rows: rows as u32,
            n: n as u32,
            k: k as u32,
            x,
            weight: weight.at(),
            dtype: self.dtype,
            bias: bias.map(Buffer::address),
            epilogue,
            out: out.address,
            out_dtype: out.dtype,
        };
        linear::linear(&self.context, &op)
    }

    fn route(&self, rows: usize, logits: &Buffer, router: &Router<Buffer>, routing: &mut Routing) -> Result<()> {
        let num_experts = routing.arrays.shape.num_experts;
        assert!(logits.dtype == DType::F32 && logits.len >= rows * num_experts, "logits of {} for {rows} rows", logits.len);
        assert!(router.bias.is_none_or(|b| b.len == num_experts), "bias for {num_experts} experts");
        routing.route(&self.context, rows, logits.address, router.score, router.bias.map(Buffer::address))
    }

    fn moe(&self, routing: &mut Routing, x: &Buffer, up: &Weight, down: &Weight, out: &mut Buffer) -> Result<()> {
        let ExpertShape { num_experts, hidden_dim, expert_dim, .. } = routing.arrays.shape;
        let fits = |weight: &Weight, n: usize, k: usize| (weight.n, weight.k) == (num_experts * n, k);
        assert!(fits(up, 2 * expert_dim, hidden_dim) && fits(down, hidden_dim, expert_dim), "weights for {:?}", routing.arrays.shape);
        let len = routing.arrays.rows as usize * hidden_dim;
        assert!(out.dtype == DType::F32 && x.len.min(out.len) >= len, "x of {}, out of {} for {len} elements", x.len, out.len);
        routing.arrays.moe(&self.context, x.address, x.dtype, up.at(), down.at(), out.address)
    }

    fn rope_append(
        &self,
        batch: &Batch,
        heads: HeadShape,
        rotation: &Rotation<Buffer>,
        qkv: &mut Buffer,
        layer: usize,
        kv: &mut KvCache,
    ) -> Result<()> {
        self.check(batch, heads, qkv, layer, kv);
        let Rotation { rope, norm } = rotation;
        let norm = norm.as_ref().map(|norm| {
            assert!((norm.q.len, norm.k.len) == (heads.head_dim, heads.head_dim), "norms of {} and {}, {heads:?}", norm.q.len, norm.k.len);
            HeadNorm { q: norm.q.address(), k: norm.k.address(), eps: norm.eps }
        });
        // As far as any sequence of this store can reach: a recorded forward never outgrows the
        // table.
        let reach = kv.shape.num_pages * kv.shape.page_size;
        let mut known = self.rotations.borrow_mut();
        let rotary_dim = rope.rotary_dim(heads.head_dim);
        assert!(rotary_dim <= heads.head_dim, "{rotary_dim} elements of {heads:?} rotate");
        let entry = known.entry((heads.head_dim, rope.bits()));
        let rotations = match entry {
            Entry::Occupied(entry) if entry.get().0 >= reach => entry.get().1.address(),
            entry => {
                let mut table = Vec::new();
                crate::backend::rope::extend_rotations(*rope, heads.head_dim, reach, &mut table);
                // Never empty, as no device array is, even where nothing turns.
                let words: Vec<u32> = table.into_iter().chain([0.0]).map(f32::to_bits).collect();
                self.context.moved();
                entry.insert_entry((reach, self.upload_words(&words)?)).get().1.address()
            }
        };
        let offset = (layer * kv.layer_bytes(self.dtype)) as u64;
        let op = RopeAppend {
            rows: batch.shape.rows,
            heads,
            rotary_dim,
            page_size: kv.shape.page_size as u32,
            dtype: self.dtype,
            positions: batch.arrays.positions,
            slots: batch.arrays.slots,
            rotations,
            qkv: qkv.address,
            keys: kv.keys.address() + offset,
            values: kv.values.address() + offset,
            norm,
        };
        rope_append::rope_append(&self.context, &op)
    }

    fn attention(&self, batch: &Batch, heads: HeadShape, qkv: &Buffer, layer: usize, kv: &KvCache, out: &mut Buffer) -> Result<()> {
        self.check(batch, heads, qkv, layer, kv);
        let rows = batch.shape.rows as usize;
        assert!(out.len >= rows * heads.q_width(), "out of {} for {rows} rows of {}", out.len, heads.q_width());
        let offset = (layer * kv.layer_bytes(self.dtype)) as u64;
        let (shape, tiles) = self.work_list(batch, heads)?;
        let op = Attention {
            heads,
            page_size: kv.shape.page_size as u32,
            dtype: self.dtype,
            regime: shape.regime,
            tiles,
            num_tiles: shape.num_tiles,
            max_visible: batch.shape.max_visible,
            qkv: qkv.address,
            keys: kv.keys.address() + offset,
            values: kv.values.address() + offset,
            visible: batch.arrays.visible,
            page_indptr: batch.arrays.page_indptr,
            pages: batch.arrays.pages,
            out: out.address,
            out_dtype: out.dtype,
        };
        attention::attention(&self.context, &op)
    }

    fn gather(&self, rows: &Rows, width: usize, x: &Buffer, out: &mut Buffer) -> Result<()> {
        assert!(out.len >= rows.len * width, "out of {} for {} rows of {width}", out.len, rows.len);
        let op = Gather {
            count: rows.len as u32,
            width: width as u32,
            rows: Some(rows.address),
            x: x.address,
            x_dtype: x.dtype,
            out: out.address,
            out_dtype: out.dtype,
        };
        gather::gather(&self.context, &op)
    }

    fn apply_guidance(&self, len: usize, scale: f32, base: &Buffer, out: &mut Buffer) -> Result<()> {
        assert!(base.len.min(out.len) >= len && [base.dtype, out.dtype] == [DType::F32; 2], "{len} of {} and {}", base.len, out.len);
        guidance::apply_guidance(&self.context, len as u32, scale, base.address, out.address)
    }

    fn copy(&self, len: usize, x: &Buffer, out: &mut Buffer) -> Result<()> {
        assert!(x.len.min(out.len) >= len, "{len} of x of {}, out of {}", x.len, out.len);
        // A kernel and not the driver's copy: it may be part of a recorded graph.
        let op = Gather { count: 1, width: len as u32, rows: None, x: x.address, x_dtype: x.dtype, out: out.address, out_dtype: out.dtype };
        gather::gather(&self.context, &op)
    }

    fn sample(
        &self,
        hidden: &Buffer,
        head: &Weight,
        bias: Option<&Buffer>,
        candidates: Candidates<Shortlists>,
        draws: &[Draw],
    ) -> Result<Vec<SampledToken>> {
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let banned = match candidates {
            Candidates::AllBut(banned) => banned,
            Candidates::Shortlists { lists, which } => return self.sample_shortlist(hidden, head, bias, lists, which, draws),
        };
        let Weight { n, k, .. } = *head;
        assert!(hidden.len >= draws.len() * k, "hidden of {} for {} rows of {k}", hidden.len, draws.len());
        let draws_memory = self.upload_draws(draws)?;
        let output = self.context.memory(draws.len() * size_of::<sample::SampledRecord>())?;
        let (hidden, _copy) = self.as_input(hidden, draws.len() * k)?;
        let op = SampleOp {
            rows: draws.len() as u32,
            k: k as u32,
            vocab: n as u32,
            hidden,
            dtype: self.dtype,
            head: head.at(),
            bias: bias.map(Buffer::address),
            banned: self.banned_mask(banned, n)?,
            draws: draws_memory.address(),
            sampled: output.address(),
            any_fused: draws.iter().any(|draw| !sample::needs_nucleus(draw)),
            any_nucleus: draws.iter().any(sample::needs_nucleus),
        };
        sample::sample(&self.context, &op)?;
        let records = self.read_sampled(&output, draws.len())?;
        records.iter().enumerate().map(|(row, record)| record.sampled(row)).collect()
    }

    fn shortlist(
        &self,
        rows: usize,
        hidden: &Buffer,
        head: &Weight,
        bias: Option<&Buffer>,
        banned: &[u32],
        n: usize,
    ) -> Result<Shortlists> {
        self.make_shortlist(rows, hidden, head, bias, banned, n)
    }
}

impl Inspect for Cuda {
    fn expert_choices(&self, routing: &Routing) -> Result<Vec<ExpertChoice>> {
        routing.expert_choices(&self.context)
    }

    fn shortlist_ids(&self, lists: &Shortlists) -> Result<Vec<Vec<u32>>> {
        self.read_shortlist(lists)
    }
}

impl Measure for Cuda {
    fn ceilings(&self, _weight_bytes: usize) -> Result<Ceilings> {
        super::ceilings::measure(self)
    }
}

impl RowList for Rows {
    fn num_rows(&self) -> usize {
        self.len
    }
}

impl Cuda {
    /// The work list of a batch and where it lies.
    fn work_list(&self, batch: &Batch, heads: HeadShape) -> Result<(TileShape, Address)> {
        match &batch.origin {
            Origin::Run { tiles } => Ok(*tiles),
            Origin::Host { plan, tiles, .. } => {
                let mut known = tiles.borrow_mut();
                if known.as_ref().is_none_or(|(of, ..)| *of != heads) {
                    let (shape, list) = self.tiles_of(heads, &plan.indptr);
                    *known = Some((heads, shape, self.upload_words(list.as_flattened())?));
                }
                let (_, shape, memory) = known.as_ref().expect("just made");
                Ok((*shape, memory.address()))
            }
        }
    }

    /// Heads, layer and buffers agree with the store.
    fn check(&self, batch: &Batch, heads: HeadShape, qkv: &Buffer, layer: usize, kv: &KvCache) {
        let rows = batch.shape.rows as usize;
        assert!(qkv.dtype == DType::F32 && qkv.len >= rows * heads.qkv_width(), "qkv of {} for {rows} rows, {heads:?}", qkv.len);
        let shape = kv.shape;
        assert!(layer < shape.num_layers, "layer {layer} of {}", shape.num_layers);
        assert!((heads.num_kv_heads, heads.head_dim) == (shape.num_kv_heads, shape.head_dim), "{heads:?} in a store of {shape:?}");
    }
}

/// NaN in every element of a word.
fn poison(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => f32::NAN.to_bits(),
        DType::Bf16 => 0x7fc0_7fc0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As on the CPU, an engine may be built on one thread and ticked on another.
    #[test]
    fn an_engine_crosses_threads() {
        fn crosses<T: Send>() {}
        crosses::<crate::engine::Engine<Cuda>>();
    }
}
