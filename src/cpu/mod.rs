//! The CPU backend: checks the contract of each op, then hands it to the module of the same name.
//!
//! Activations are f32 on cache lines; weights and K/V are words in the order the register tile
//! reads them. Modules: `simd` (the vector instructions, one choice at run time), `pool` (threads
//! and disjoint writes), `memory` (aligned buffers), one file per op, `context` (what the ops
//! share), and `oracle` (plain loops that every backend is tested against).
#![deny(unsafe_code)]

mod attention;
mod context;
mod embed;
mod guidance;
mod kv;
mod linear;
mod measure;
mod memory;
mod moe;
mod norm;
pub mod oracle;
#[allow(unsafe_code)]
pub mod pool;
mod read_rows;
mod rope;
mod route;
mod sample;
mod shortlist;
#[allow(unsafe_code)]
pub mod simd;
pub(crate) mod topology;

use std::sync::{Arc, Mutex};

use crate::backend::host::HostSteps;
use crate::backend::{
    Activation, Backend, Candidates, DType, Epilogue, ExpertChoice, ExpertShape, HeadNorm, HeadShape, Inspect, KvShape, Norm, Rotation,
    Router, RowSource, WeightFormat, WeightShape,
};
use crate::error::{Error, Result};
use crate::packed_weights::PackedWords;
use crate::plan::Plan;
use crate::sampling::{Draw, SampledToken};

use context::CpuContext;
use memory::Aligned;
use pool::Pool;
use simd::Isa;

/// The CPU as a [`Backend`].
pub struct Cpu {
    dtype: DType,
    weight_format: Option<WeightFormat>,
    context: CpuContext,
}

impl Cpu {
    /// `threads` counts the calling thread; 0 means one for each physical core that the process may
    /// use. The best instruction set of the machine is used.
    pub fn new(threads: usize, dtype: DType) -> Result<Cpu> {
        Cpu::with_isa(threads, dtype, Isa::detect())
    }

    /// As [`Cpu::new`] with a chosen instruction set. Fails where the machine lacks it.
    pub fn with_isa(threads: usize, dtype: DType, isa: Isa) -> Result<Cpu> {
        if !isa.is_available() {
            return Err(Error::device(format!("this machine lacks {}; it runs {}", isa.name(), Isa::detect().name())));
        }
        let threads = match threads {
            0 => topology::cores(),
            threads => threads,
        };
        let start = |threads| Pool::new(threads).map_err(|error| Error::device(format!("cannot start {threads} threads: {error}")));
        let context = CpuContext {
            isa,
            pool: start(threads)?,
            serial: start(1)?,
            l2_bytes: topology::l2_bytes(),
            packed_words: Arc::default(),
            spare_lists: Mutex::default(),
            words: Mutex::default(),
            logits: Mutex::default(),
            rotations: Mutex::default(),
            attention_states: Mutex::default(),
            spare_rows: Mutex::default(),
        };
        Ok(Cpu { dtype, weight_format: None, context })
    }

    /// Makes weights of models into this format, where it is one; floats are those of the dtype.
    pub fn with_weights(self, format: Option<WeightFormat>) -> Cpu {
        let float = format.and_then(WeightFormat::float);
        assert!(float.is_none_or(|dtype| dtype == self.dtype), "weights in {float:?} beside {:?}", self.dtype);
        Cpu { weight_format: format, ..self }
    }
}

/// Activations: f32 on cache lines.
pub struct Buffer(Aligned<f32>);

impl From<&[f32]> for Buffer {
    /// Panics where the system refuses the memory; [`Backend::upload`] says so instead.
    fn from(src: &[f32]) -> Buffer {
        Buffer(Aligned::copied(src).expect("memory for a buffer"))
    }
}

/// A weight, packed for products, kept as a table for lookups, or one for each expert.
pub struct Weight(WeightLayout);

enum WeightLayout {
    Packed(linear::Packed),
    Table(embed::Table),
    Experts(moe::ExpertWeights),
}

impl Weight {
    fn packed(&self) -> &linear::Packed {
        match &self.0 {
            WeightLayout::Packed(packed) => packed,
            WeightLayout::Table(_) => panic!("a product needs a matrix, this weight is a table"),
            WeightLayout::Experts(_) => panic!("a product needs a matrix, this weight is one of experts"),
        }
    }

    fn expert_weights(&self) -> &moe::ExpertWeights {
        match &self.0 {
            WeightLayout::Experts(experts) => experts,
            _ => panic!("experts need a weight of experts"),
        }
    }

    fn width(&self) -> usize {
        match &self.0 {
            WeightLayout::Table(table) => table.width(),
            _ => self.packed().k(),
        }
    }

    /// Rows by their index, as f32.
    pub fn rows(&self, ids: &[u32], out: &mut [f32]) {
        match &self.0 {
            WeightLayout::Table(table) => table.rows(ids, out),
            _ => self.packed().rows(ids, out),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            WeightLayout::Packed(packed) => packed.bytes(),
            WeightLayout::Table(table) => table.bytes(),
            WeightLayout::Experts(experts) => experts.0.iter().map(linear::Packed::bytes).sum(),
        }
    }
}

/// All layers' pages.
pub struct KvCache(kv::KvCache);

/// A plan whose arrays were checked against each other.
pub struct Batch(Plan);

/// Lists of ids.
pub struct Shortlists(shortlist::Shortlists);

/// The experts of some rows.
pub struct Routing(route::Routing);

impl Batch {
    /// Slots and pages lie in the store, heads agree with it.
    fn check(&self, heads: HeadShape, qkv: &Buffer, layer: usize, kv: &KvCache) {
        let (plan, shape) = (&self.0, kv.0.shape);
        let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
        assert!(num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads), "{heads:?}: H is not a multiple of K");
        assert!((num_kv_heads, head_dim) == (shape.num_kv_heads, shape.head_dim), "{heads:?} on {shape:?}");
        assert!(layer < shape.num_layers, "layer {layer} of {shape:?}");
        assert!(qkv.0.len() >= plan.num_rows() * heads.qkv_width(), "qkv of {} for {} rows of {heads:?}", qkv.0.len(), plan.num_rows());
        let slots = shape.num_pages * shape.page_size;
        assert!(plan.slots.iter().all(|&slot| (slot as usize) < slots), "a slot of the plan lies outside {shape:?}");
        assert!(plan.pages.iter().all(|&page| (page as usize) < shape.num_pages), "a page of the plan lies outside {shape:?}");
    }
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Weight = Weight;
    type KvCache = KvCache;
    type Batch = Batch;
    type Rows = Vec<u32>;
    type Shortlists = Shortlists;
    type Routing = Routing;
    /// The host is where the network runs: nothing is saved by sampling elsewhere.
    type Runner = HostSteps;

    const MAX_SHORTLIST: usize = usize::MAX;

    fn name(&self) -> String {
        let threads = self.context.pool.threads();
        format!("cpu ({}, {threads} thread{})", self.context.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weight_format(&self) -> Option<WeightFormat> {
        self.weight_format
    }

    fn alloc<const N: usize>(&self, parts: [Activation; N]) -> Result<[Buffer; N]> {
        // Inputs are f32 as well: the product rounds what it reads. Parts of their own begin at
        // cache lines.
        let mut buffers = Vec::with_capacity(N);
        for Activation::F32(len) | Activation::Input(len) in parts {
            buffers.push(Buffer(Aligned::zeroed(len)?));
        }
        buffers.try_into().map_err(|_| Error::device("as many buffers as parts"))
    }

    fn upload(&self, src: &[f32]) -> Result<Buffer> {
        Aligned::copied(src).map(Buffer)
    }

    fn download(&self, src: &Buffer, offset: usize, dst: &mut [f32]) -> Result<()> {
        dst.copy_from_slice(&src.0[offset..offset + dst.len()]);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn weight_as(&self, format: WeightFormat, shape: WeightShape, source: &dyn RowSource) -> Result<Weight> {
        let (WeightShape::Matrix { n, k } | WeightShape::Table { n, k } | WeightShape::Experts { n, k, .. }) = shape;
        assert!(n > 0 && k > 0, "a weight of {n} x {k}");
        assert!(format.float().is_none_or(|dtype| dtype == self.dtype), "a weight in {} on {:?}", format.name(), self.dtype);
        let context = &self.context;
        Ok(Weight(match shape {
            WeightShape::Matrix { .. } => WeightLayout::Packed(linear::Packed::new(context, format, n, k, source)?),
            WeightShape::Table { .. } => WeightLayout::Table(embed::Table::new(context, format, n, k, source)?),
            WeightShape::Experts { num, .. } => {
                assert!(num > 0, "{num} weights of {n} x {k}");
                WeightLayout::Experts(moe::ExpertWeights::new(context, format, num, n, k, source)?)
            }
        }))
    }

    fn weight_of_words(&self, format: WeightFormat, shape: WeightShape, words: PackedWords) -> Result<Weight> {
        Ok(Weight(match shape {
            WeightShape::Matrix { n, k } => WeightLayout::Packed(linear::Packed::of_words(&self.context, format, n, k, words)?),
            WeightShape::Table { n, k } => WeightLayout::Table(embed::Table::of_words(format, n, k, words)?),
            WeightShape::Experts { num, n, k } => {
                WeightLayout::Experts(moe::ExpertWeights::of_words(&self.context, format, num, n, k, words)?)
            }
        }))
    }

    fn words<'w>(&self, weight: &'w Weight) -> Option<Vec<&'w [u32]>> {
        Some(match &weight.0 {
            WeightLayout::Packed(packed) => packed.words().into_iter().collect(),
            WeightLayout::Table(table) => table.words().into_iter().collect(),
            WeightLayout::Experts(experts) => experts.0.iter().filter_map(linear::Packed::words).collect(),
        })
    }

    fn routing(&self, _rows: usize, shape: ExpertShape) -> Result<Routing> {
        Ok(Routing(route::Routing::new(shape)))
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache> {
        Ok(KvCache(kv::KvCache::new(self.dtype, shape)?))
    }

    fn copy_page(&self, kv: &mut KvCache, src: u32, dst: u32) -> Result<()> {
        let pages = kv.0.shape.num_pages;
        assert!((src as usize) < pages && (dst as usize) < pages, "copy of page {src} to {dst} of {pages}");
        kv.0.copy_page(src as usize, dst as usize);
        Ok(())
    }

    fn batch(&self, plan: &Plan) -> Result<Batch> {
        let (rows, sequences) = (plan.num_rows(), plan.num_sequences());
        let lens = [plan.positions.len(), plan.slots.len(), plan.visible.len()];
        assert!(lens == [rows; 3], "positions, slots, visible of {lens:?} for {rows} rows");
        let ends = |indptr: &[u32], end: usize| {
            indptr.len() == sequences + 1 && indptr[0] == 0 && indptr.is_sorted() && indptr[sequences] as usize == end
        };
        assert!(rows == 0 || ends(&plan.indptr, rows), "row offsets {:?} of {rows} rows", plan.indptr);
        assert!(
            rows == 0 || ends(&plan.page_indptr, plan.pages.len()),
            "page offsets {:?} of {} pages",
            plan.page_indptr,
            plan.pages.len()
        );
        Ok(Batch(plan.clone()))
    }

    fn embed(&self, batch: &Batch, table: &Weight, positions: Option<&Weight>, out: &mut Buffer) -> Result<()> {
        let (ids, width) = (&batch.0.ids, table.width());
        let out = &mut out.0[..ids.len() * width];
        table.rows(ids, out);
        if let Some(positions) = positions {
            assert!(positions.width() == width, "tables of widths {width} and {}", positions.width());
            let mut room = Aligned::zeroed(out.len())?;
            positions.rows(&batch.0.positions, &mut room);
            out.iter_mut().zip(&room[..]).for_each(|(out, position)| *out += position);
        }
        Ok(())
    }

    fn norm(&self, rows: usize, x: &mut Buffer, residual: Option<&Buffer>, norm: &Norm<Buffer>, out: &mut Buffer) -> Result<()> {
        let (width, bias) = (norm.weight.0.len(), norm.bias.map(|b| b.0.len()));
        let len = rows * width;
        assert!(width > 0 && bias.is_none_or(|b| b == width), "weight of {width}, bias of {bias:?}");
        assert!(x.0.len().min(out.0.len()) >= len, "x of {}, out of {} for {rows} rows of {width}", x.0.len(), out.0.len());
        if let Some(residual) = residual {
            assert!(residual.0.len() >= len, "residual of {} for {len} elements", residual.0.len());
            x.0[..len].iter_mut().zip(&residual.0[..len]).for_each(|(x, more)| *x += more);
        }
        let norm = Norm { kind: norm.kind, eps: norm.eps, weight: &norm.weight.0[..], bias: norm.bias.map(|b| &b.0[..]) };
        norm::norm(&self.context, &x.0[..len], &norm, &mut out.0[..len]);
        Ok(())
    }

    fn linear(&self, rows: usize, x: &Buffer, weight: &Weight, bias: Option<&Buffer>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let weight = weight.packed();
        let (n, k) = (weight.n(), weight.k());
        let width = epilogue.out_width(n);
        assert!(
            x.0.len() >= rows * k && out.0.len() >= rows * width,
            "x of {}, out of {} for {rows} rows, {n} x {k}",
            x.0.len(),
            out.0.len()
        );
        let bias = bias.map(|b| &b.0[..]);
        assert!(bias.is_none_or(|b| b.len() == n), "bias of {:?} for {n} columns", bias.map(<[f32]>::len));
        assert!(epilogue != Epilogue::SwiGlu || n % 2 == 0, "gate and up in pairs of {n} rows");
        linear::linear(&self.context, rows, &x.0, weight, bias, epilogue, &mut out.0)
    }

    fn route(&self, rows: usize, logits: &Buffer, router: &Router<Buffer>, routing: &mut Routing) -> Result<()> {
        let shape = routing.0.shape;
        shape.check(router.score).unwrap_or_else(|what| panic!("{what}"));
        let bias = router.bias.map(|bias| &bias.0[..]);
        assert!(bias.is_none_or(|b| b.len() == shape.num_experts), "bias of {:?} for {shape:?}", bias.map(<[f32]>::len));
        assert!(logits.0.len() >= rows * shape.num_experts, "logits of {} for {rows} rows of {shape:?}", logits.0.len());
        route::route(&self.context, rows, &logits.0, &Router { score: router.score, bias }, &mut routing.0);
        Ok(())
    }

    fn moe(&self, routing: &mut Routing, x: &Buffer, up: &Weight, down: &Weight, out: &mut Buffer) -> Result<()> {
        let ExpertShape { num_experts, top_k, hidden_dim, expert_dim } = routing.0.shape;
        let (up, down) = (up.expert_weights(), down.expert_weights());
        for (experts, n, k) in [(up, 2 * expert_dim, hidden_dim), (down, hidden_dim, expert_dim)] {
            let fits = experts.0.len() == num_experts && experts.0.iter().all(|weight| (weight.n(), weight.k()) == (n, k));
            assert!(fits, "weights for {:?}", routing.0.shape);
        }
        let len = routing.0.choices.len() / top_k * hidden_dim;
        assert!(x.0.len().min(out.0.len()) >= len, "x of {}, out of {} for {len} elements", x.0.len(), out.0.len());
        moe::moe(&self.context, &mut routing.0, &x.0, up, down, &mut out.0)
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
        batch.check(heads, qkv, layer, kv);
        let norm = rotation.norm.as_ref().map(|norm| HeadNorm { q: &norm.q.0[..], k: &norm.k.0[..], eps: norm.eps });
        let widths = norm.as_ref().map(|norm| (norm.q.len(), norm.k.len()));
        assert!(widths.is_none_or(|w| w == (heads.head_dim, heads.head_dim)), "norms of {widths:?} for {heads:?}");
        rope::rope_append(&self.context, &batch.0, heads, &Rotation { rope: rotation.rope, norm }, &mut qkv.0, layer, &mut kv.0);
        Ok(())
    }

    fn attention(&self, batch: &Batch, heads: HeadShape, qkv: &Buffer, layer: usize, kv: &KvCache, out: &mut Buffer) -> Result<()> {
        batch.check(heads, qkv, layer, kv);
        let rows = batch.0.num_rows();
        assert!(out.0.len() >= rows * heads.q_width(), "out of {} for {rows} rows of {}", out.0.len(), heads.q_width());
        attention::attention(&self.context, &batch.0, heads, &qkv.0, layer, &kv.0, &mut out.0);
        Ok(())
    }

    fn rows(&self, rows: &[u32]) -> Result<Vec<u32>> {
        Ok(rows.to_vec())
    }

    fn copy(&self, len: usize, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.0[..len].copy_from_slice(&x.0[..len]);
        Ok(())
    }

    fn apply_guidance(&self, len: usize, scale: f32, base: &Buffer, out: &mut Buffer) -> Result<()> {
        assert!(base.0.len().min(out.0.len()) >= len, "{len} of base of {}, out of {}", base.0.len(), out.0.len());
        guidance::apply_guidance(scale, &base.0[..len], &mut out.0[..len]);
        Ok(())
    }

    fn gather(&self, rows: &Vec<u32>, width: usize, x: &Buffer, out: &mut Buffer) -> Result<()> {
        assert!(out.0.len() >= rows.len() * width, "out of {} for {} rows of {width}", out.0.len(), rows.len());
        embed::gather(rows, width, &x.0, &mut out.0);
        Ok(())
    }

    fn sample(
        &self,
        hidden: &Buffer,
        head: &Weight,
        bias: Option<&Buffer>,
        candidates: Candidates<Shortlists>,
        draws: &[Draw],
    ) -> Result<Vec<SampledToken>> {
        let (head, bias, rows) = (head.packed(), bias.map(|b| &b.0[..]), draws.len());
        assert!(hidden.0.len() >= rows * head.k(), "hidden of {} for {rows} rows of {}", hidden.0.len(), head.k());
        assert!(bias.is_none_or(|b| b.len() == head.n()), "bias of {:?} for {} columns", bias.map(<[f32]>::len), head.n());
        match candidates {
            Candidates::AllBut(banned) => sample::sample(&self.context, &hidden.0, head, bias, banned, draws),
            Candidates::Shortlists { lists, which } => {
                let num_lists = lists.0.ids().len();
                assert!(which.len() == rows, "{} lists for {rows} rows", which.len());
                assert!(which.iter().all(|list| (*list as usize) < num_lists), "{which:?} of {num_lists} lists");
                shortlist::sample_shortlist(&self.context, &hidden.0, head, bias, &lists.0, which, draws)
            }
        }
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
        let (head, bias) = (head.packed(), bias.map(|b| &b.0[..]));
        assert!(n > 0 && hidden.0.len() >= rows * head.k(), "lists of {n}, hidden of {} for {rows} rows of {}", hidden.0.len(), head.k());
        assert!(bias.is_none_or(|b| b.len() == head.n()), "bias of {:?} for {} columns", bias.map(<[f32]>::len), head.n());
        shortlist::shortlist(&self.context, rows, &hidden.0, head, bias, banned, n).map(Shortlists)
    }
}

impl Inspect for Cpu {
    fn expert_choices(&self, routing: &Routing) -> Result<Vec<ExpertChoice>> {
        Ok(routing.0.choices.clone())
    }

    fn shortlist_ids(&self, lists: &Shortlists) -> Result<Vec<Vec<u32>>> {
        Ok(lists.0.ids().to_vec())
    }
}
