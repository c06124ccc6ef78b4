//! A forward that fails: every request of its engine, running or waiting, ends with the cause.

use std::cell::Cell;

use redraft::backend::host::HostSteps;
use redraft::backend::{
    Activation, Candidates, Epilogue, ExpertShape, HeadShape, KvShape, Norm, Rotation, Router, RowSource, WeightFormat, WeightShape,
};
use redraft::engine::Engine;
use redraft::error::Result;
use redraft::model::shapes;
use redraft::packed_weights::PackedWords;
use redraft::plan::Plan;
use redraft::sampling::{Draw, SampledToken};
use redraft::{Backend, Cpu, DType, EngineOptions, Error};

use crate::support::{budget, options, request, schedule};

/// The CPU, which fails once: at a forward of one's choice.
struct Failing {
    cpu: Cpu,
    forwards_before: Cell<usize>,
}

impl Failing {
    fn cause() -> Error {
        Error::device("the device fell off the bus")
    }

    fn is_due(&self) -> bool {
        let before = self.forwards_before.get();
        self.forwards_before.set(before.wrapping_sub(1));
        before == 0
    }
}

impl Backend for Failing {
    type Buffer = <Cpu as Backend>::Buffer;
    type Weight = <Cpu as Backend>::Weight;
    type KvCache = <Cpu as Backend>::KvCache;
    type Batch = <Cpu as Backend>::Batch;
    type Rows = <Cpu as Backend>::Rows;
    type Shortlists = <Cpu as Backend>::Shortlists;
    type Routing = <Cpu as Backend>::Routing;
    type Runner = HostSteps;

    const MAX_SHORTLIST: usize = Cpu::MAX_SHORTLIST;

    fn embed(&self, batch: &Self::Batch, table: &Self::Weight, positions: Option<&Self::Weight>, out: &mut Self::Buffer) -> Result<()> {
        if self.is_due() { Err(Failing::cause()) } else { self.cpu.embed(batch, table, positions, out) }
    }

    // Everything else is the CPU's.
    fn name(&self) -> String {
        self.cpu.name()
    }
    fn dtype(&self) -> DType {
        self.cpu.dtype()
    }
    fn alloc<const N: usize>(&self, parts: [Activation; N]) -> Result<[Self::Buffer; N]> {
        self.cpu.alloc(parts)
    }
    fn upload(&self, src: &[f32]) -> Result<Self::Buffer> {
        self.cpu.upload(src)
    }
    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<()> {
        self.cpu.download(src, offset, dst)
    }
    fn synchronize(&self) -> Result<()> {
        self.cpu.synchronize()
    }
    fn weight_as(&self, format: WeightFormat, shape: WeightShape, source: &dyn RowSource) -> Result<Self::Weight> {
        self.cpu.weight_as(format, shape, source)
    }
    fn weight_of_words(&self, format: WeightFormat, shape: WeightShape, words: PackedWords) -> Result<Self::Weight> {
        self.cpu.weight_of_words(format, shape, words)
    }
    fn words<'w>(&self, weight: &'w Self::Weight) -> Option<Vec<&'w [u32]>> {
        self.cpu.words(weight)
    }
    fn weight_format(&self) -> Option<WeightFormat> {
        self.cpu.weight_format()
    }
    fn routing(&self, rows: usize, shape: ExpertShape) -> Result<Self::Routing> {
        self.cpu.routing(rows, shape)
    }
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache> {
        self.cpu.kv_cache(shape)
    }
    fn copy_page(&self, kv: &mut Self::KvCache, src: u32, dst: u32) -> Result<()> {
        self.cpu.copy_page(kv, src, dst)
    }
    fn batch(&self, plan: &Plan) -> Result<Self::Batch> {
        self.cpu.batch(plan)
    }
    fn rows(&self, rows: &[u32]) -> Result<Self::Rows> {
        self.cpu.rows(rows)
    }
    fn norm(
        &self,
        rows: usize,
        x: &mut Self::Buffer,
        residual: Option<&Self::Buffer>,
        norm: &Norm<Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.cpu.norm(rows, x, residual, norm, out)
    }
    fn linear(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.cpu.linear(rows, x, weight, bias, epilogue, out)
    }
    fn route(&self, rows: usize, logits: &Self::Buffer, router: &Router<Self::Buffer>, routing: &mut Self::Routing) -> Result<()> {
        self.cpu.route(rows, logits, router, routing)
    }
    fn moe(
        &self,
        routing: &mut Self::Routing,
        x: &Self::Buffer,
        up: &Self::Weight,
        down: &Self::Weight,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.cpu.moe(routing, x, up, down, out)
    }
    fn rope_append(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        rotation: &Rotation<Self::Buffer>,
        qkv: &mut Self::Buffer,
        layer: usize,
        kv: &mut Self::KvCache,
    ) -> Result<()> {
        self.cpu.rope_append(batch, heads, rotation, qkv, layer, kv)
    }
    fn attention(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        qkv: &Self::Buffer,
        layer: usize,
        kv: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.cpu.attention(batch, heads, qkv, layer, kv, out)
    }
    fn gather(&self, rows: &Self::Rows, width: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()> {
        self.cpu.gather(rows, width, x, out)
    }
    fn apply_guidance(&self, len: usize, scale: f32, base: &Self::Buffer, out: &mut Self::Buffer) -> Result<()> {
        self.cpu.apply_guidance(len, scale, base, out)
    }
    fn copy(&self, len: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()> {
        self.cpu.copy(len, x, out)
    }
    fn sample(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Weight,
        bias: Option<&Self::Buffer>,
        candidates: Candidates<Self::Shortlists>,
        draws: &[Draw],
    ) -> Result<Vec<SampledToken>> {
        self.cpu.sample(hidden, head, bias, candidates, draws)
    }
    fn shortlist(
        &self,
        rows: usize,
        hidden: &Self::Buffer,
        head: &Self::Weight,
        bias: Option<&Self::Buffer>,
        banned: &[u32],
        n: usize,
    ) -> Result<Self::Shortlists> {
        self.cpu.shortlist(rows, hidden, head, bias, banned, n)
    }
}

#[test]
fn a_forward_that_fails_ends_every_request_with_its_cause() {
    let draft = schedule(&["block=4,unmask=uniform:1"]);
    for forwards_before in [0, 1, 5] {
        let backend = Failing { cpu: Cpu::new(1, DType::F32).expect("a CPU"), forwards_before: Cell::new(forwards_before) };
        let options = EngineOptions { budget: budget(64, 2), ..options() };
        let mut engine = Engine::random(shapes::config("tiny").expect("a known shape"), backend, options).expect("random weights");
        let free = engine.free_pages();
        // Two run, and five wait.
        let handles: Vec<_> = (0..7).map(|i| engine.submit(request(&[1, 2], 20, &draft, 1, i)).expect("queued")).collect();
        for _ in 0..forwards_before {
            assert_eq!(engine.tick(), Ok(true));
        }
        assert_eq!(engine.tick(), Err(Failing::cause()));
        for handle in &handles {
            handle.events().for_each(drop);
            assert_eq!(handle.take_output().expect("an outcome").err(), Some(Failing::cause()));
            handle.events().for_each(drop);
            assert!(handle.take_output().is_none(), "told once");
        }
        assert_eq!(engine.free_pages(), free, "their pages are free");
        // Nothing is in flight any more, and what comes next is served.
        assert_eq!(engine.tick(), Ok(false));
        let next = engine.submit(request(&[1, 2], 20, &draft, 1, 9)).expect("queued");
        engine.run().expect("the device is back");
        next.events().for_each(drop);
        assert_eq!(next.take_output().expect("an outcome").expect("a text").tokens.len(), 20);
    }
}
