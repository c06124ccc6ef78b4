//! Forward pass, generic over the machine: one decoder with switches, in the order of the
//! papers.
//!
//! ```text
//! ids -> embed (+ positions) -> [ norm -> qkv -> (q/k norm,) rope + K/V append -> attention -> out (+x) -> norm -> up, activation -> down (+x) ] x N
//!     -> (sampled rows) -> final norm -> head + sample
//! ```
//! A file under `families/` maps config keys and tensor names onto it, and `registry.rs` finds the
//! family of a checkpoint; what families do differently is [`crate::config::DecoderFlags`], and
//! [`crate::config::Moe`] where experts (`moe.rs`) are in the place of an MLP. adaLN with a
//! constant condition is folded into the weights at load, so the decoder itself knows nothing of
//! it.
#![forbid(unsafe_code)]

pub mod families;
mod family;
pub mod joint;
mod layers;
mod llama_layout;
mod moe;
pub mod registry;
pub mod shapes;
pub mod step;
mod weight_loader;

pub use weight_loader::Progress;
#[cfg(feature = "cli")]
pub(crate) use weight_loader::WeightRole;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::host::forward_batch;
use crate::backend::{Activation, Backend, Candidates, Epilogue, ForwardBatch, HeadNorm, KvShape, Picked, Rotation, RowList};
use crate::config::{Mlp, ModelConfig};
use crate::error::{Error, Result};
use crate::model::layers::{Dense, Linear, NormWeights};
use crate::plan::Plan;
use crate::sampling::{Draw, SampledToken};

/// Rows whose logits are materialised together by [`Model::logits`].
const LOGIT_ROWS: usize = 64;

/// Sees the residual stream (T, C): 0 after the embedding, i after layer i.
pub type Probe<'a, B> = &'a mut dyn FnMut(&B, usize, &<B as Backend>::Buffer) -> Result<()>;

struct Layer<B: Backend> {
    attn_norm: NormWeights<B>,
    /// ((H + 2K) D, C): queries, keys, values.
    qkv: Linear<B>,
    /// Weights (D) of the norms of q and of k.
    head_norm: Option<[B::Buffer; 2]>,
    /// (C, H D).
    attn_out: Linear<B>,
    mlp_norm: NormWeights<B>,
    mlp: FeedForward<B>,
}

/// What rows go through between attentions.
enum FeedForward<B: Backend> {
    Dense(Dense<B>),
    Experts(moe::MoeLayer<B>),
}

impl<B: Backend> Layer<B> {
    /// The queries of `scratch.x`'s rows in `scratch.qkv`, and their K/V in the pages of `layer`.
    #[allow(clippy::too_many_arguments)] // as the forward's
    fn append_kv(
        &self,
        backend: &B,
        config: &ModelConfig,
        rows: usize,
        batch: &B::Batch,
        layer: usize,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        let Scratch { x, h, qkv, .. } = scratch;
        self.attn_norm.apply(backend, config, rows, x, h)?;
        self.qkv.apply(backend, rows, h, Epilogue::Store, qkv)?;
        let norm = self.head_norm.as_ref().map(|[q, k]| HeadNorm { q, k, eps: config.norm_eps });
        backend.rope_append(batch, config.heads, &Rotation { rope: config.rope, norm }, qkv, layer, kv)
    }

    /// From what attention left in `scratch.h` to the layer's output in `scratch.x`.
    fn project_and_mlp(&self, backend: &B, config: &ModelConfig, rows: usize, scratch: &mut Scratch<B>) -> Result<()> {
        let Scratch { x, h, qkv, mlp, routing, .. } = scratch;
        self.attn_out.apply(backend, rows, h, Epilogue::Add, x)?;
        self.mlp_norm.apply(backend, config, rows, x, h)?;
        match &self.mlp {
            FeedForward::Dense(dense) => {
                let activation = match config.switches.mlp {
                    Mlp::Gelu => Epilogue::Gelu,
                    Mlp::SwiGlu => Epilogue::SwiGlu,
                };
                dense.apply(backend, rows, activation, h, mlp, x)
            }
            FeedForward::Experts(experts) => {
                let (moe, routing) = config.moe.as_ref().zip(routing.as_mut()).expect("made with the layer");
                experts.apply(backend, moe, rows, h, moe::MoeScratch { logits: qkv, mlp, routing }, x)
            }
        }
    }
}

/// Weights of one checkpoint on a backend.
pub struct Model<B: Backend> {
    /// Names these weights among all that ever were.
    id: u64,
    config: ModelConfig,
    /// (V, C); none where the head is the table, which is then held once.
    table: Option<B::Weight>,
    /// (positions, C) where positions are learned.
    positions: Option<B::Weight>,
    layers: Vec<Layer<B>>,
    final_norm: NormWeights<B>,
    /// (V, C).
    head: Linear<B>,
}

/// Activations of a forward, reused between forwards and grown to the largest.
pub struct Scratch<B: Backend> {
    /// Names this set of buffers among all that ever were.
    id: u64,
    rows: usize,
    /// (T, C) residual stream.
    x: B::Buffer,
    /// (T, C) normed rows; attention output.
    h: B::Buffer,
    /// (T, (H + 2K) D); rows on their way between buffers; (T, E) of a router.
    qkv: B::Buffer,
    /// (T, (H + 2K) D) queries of the wanted rows in the last layer.
    picked: B::Buffer,
    /// (T, F).
    mlp: B::Buffer,
    /// Which rows go to which experts.
    routing: Option<B::Routing>,
    /// Rows and (rows, C) final rows of the last forward without the prompt, in f32.
    guide: Option<(usize, B::Buffer)>,
}

/// A number that no other call in this process returned.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<B: Backend> Scratch<B> {
    /// With buffers for `rows` rows.
    pub fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self> {
        let width = config.hidden_dim.max(config.heads.q_width());
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.shape.num_experts);
        let wide = config.heads.qkv_width().max(config.hidden_dim).max(num_experts);
        let [x, h, qkv, picked, mlp] = backend.alloc([
            Activation::F32(rows * width),
            Activation::Input(rows * width),
            Activation::F32(rows * wide),
            Activation::F32(rows * wide),
            Activation::Input(rows * config.widest_mlp()),
        ])?;
        let routing = match &config.moe {
            Some(moe) => Some(backend.routing(rows, moe.shape)?),
            None => None,
        };
        Ok(Scratch { id: unique(), rows, x, h, qkv, picked, mlp, routing, guide: None })
    }

    fn reserve(&mut self, backend: &B, config: &ModelConfig, rows: usize) -> Result<()> {
        if rows > self.rows {
            // Freed before the larger ones are made: the two sets never exist together.
            let guide = self.guide.take();
            *self = Scratch::new(backend, config, 0)?;
            *self = Scratch { guide, ..Scratch::new(backend, config, rows)? };
        }
        Ok(())
    }
}

impl<B: Backend> Model<B> {
    fn new(config: ModelConfig, table: Option<B::Weight>, layers: Vec<Layer<B>>, final_norm: NormWeights<B>, head: Linear<B>) -> Model<B> {
        Model { id: unique(), config, table, positions: None, layers, final_norm, head }
    }

    /// (V, C) for lookups.
    fn embedding(&self) -> &B::Weight {
        self.table.as_ref().unwrap_or(&self.head.weight)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Shape of the page store this model needs, with `more` layers after its own.
    pub fn kv_shape(&self, num_pages: usize, page_size: usize, more: usize) -> KvShape {
        KvShape {
            num_layers: self.config.num_layers + more,
            num_pages,
            page_size,
            num_kv_heads: self.config.heads.num_kv_heads,
            head_dim: self.config.heads.head_dim,
        }
    }

    /// Runs the plan's rows through all layers, writing their K/V. The residual stream of the
    /// `wanted` rows (ascending, some maybe twice) stays in `scratch`, one after the other, for
    /// [`Model::sample`] or [`Model::logits`].
    pub fn forward(
        &self,
        backend: &B,
        plan: &Plan,
        wanted: &[u32],
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        probe: Option<Probe<B>>,
    ) -> Result<()> {
        scratch.reserve(backend, &self.config, plan.num_rows())?;
        self.layers(backend, &forward_batch(backend, plan, wanted)?, kv, scratch, probe)
    }

    /// The forward itself. In the last layer a row that is not picked gives its K/V and stops:
    /// nothing reads the rest of it. A refining forward that samples a sixth of its rows saves most
    /// of one layer that way.
    fn layers(
        &self,
        backend: &B,
        forward: &ForwardBatch<B>,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        mut probe: Option<Probe<B>>,
    ) -> Result<()> {
        let (config, batch) = (&self.config, &forward.batch);
        let mut rows = forward.rows;
        let Scratch { x, .. } = &mut *scratch;
        backend.embed(batch, self.embedding(), self.positions.as_ref(), x)?;
        let mut look = |layer: usize, x: &B::Buffer| probe.as_mut().map_or(Ok(()), |probe| probe(backend, layer, x));
        look(0, x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            layer.append_kv(backend, config, rows, batch, i, kv, scratch)?;
            let Scratch { x, h, qkv, picked, .. } = &mut *scratch;
            match &forward.picked {
                Picked::Nothing if i + 1 == self.layers.len() => return Ok(()),
                Picked::Rows(wanted, selected) if i + 1 == self.layers.len() => {
                    // Queries and residuals of the picked rows move up; their K/V are in the pages
                    // like everyone's.
                    rows = wanted.num_rows();
                    backend.gather(wanted, config.heads.qkv_width(), qkv, picked)?;
                    backend.gather(wanted, config.hidden_dim, x, qkv)?;
                    backend.copy(rows * config.hidden_dim, qkv, x)?;
                    backend.attention(selected, config.heads, picked, i, kv, h)?;
                }
                _ => backend.attention(batch, config.heads, qkv, i, kv, h)?,
            }
            layer.project_and_mlp(backend, config, rows, scratch)?;
            look(i + 1, &scratch.x)?;
        }
        Ok(())
    }

    /// Final norm of the given rows, counted among the wanted ones of the last forward, into
    /// `scratch.h`.
    fn final_rows(&self, backend: &B, rows: &[u32], scratch: &mut Scratch<B>) -> Result<()> {
        backend.gather(&backend.rows(rows)?, self.config.hidden_dim, &scratch.x, &mut scratch.qkv)?;
        self.final_norm.apply(backend, &self.config, rows.len(), &mut scratch.qkv, &mut scratch.h)
    }

    /// Samples rows, counted among the wanted ones of the last forward: `rows[i]` is sampled with
    /// `draws[i]`.
    pub fn sample(&self, backend: &B, rows: &[u32], draws: &[Draw], banned: &[u32], scratch: &mut Scratch<B>) -> Result<Vec<SampledToken>> {
        assert_eq!(rows.len(), draws.len(), "one draw per row");
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.final_rows(backend, rows, scratch)?;
        let sampled = backend.sample(&scratch.h, &self.head.weight, self.head.bias.as_ref(), Candidates::AllBut(banned), draws);
        sampled.map_err(|error| error.in_model(&self.config.dir, backend.dtype().name()))
    }

    /// Logits of all `num_rows` wanted rows of the last forward, before any ban or shift, a few
    /// rows at a time: `sink(first_row, logits)`.
    ///
    /// Errors: [`Error::Kernel`] that names model, type, position and token where a logit is NaN or
    /// +inf.
    pub fn logits(
        &self,
        backend: &B,
        num_rows: usize,
        scratch: &mut Scratch<B>,
        sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        let [mut out] = backend.alloc([Activation::F32(LOGIT_ROWS.min(num_rows) * vocab_size)])?;
        let mut host = vec![0.0; LOGIT_ROWS.min(num_rows) * vocab_size];
        for first in (0..num_rows).step_by(LOGIT_ROWS) {
            let rows: Vec<u32> = (first..num_rows.min(first + LOGIT_ROWS)).map(|r| r as u32).collect();
            self.final_rows(backend, &rows, scratch)?;
            self.head.apply(backend, rows.len(), &scratch.h, Epilogue::Store, &mut out)?;
            let host = &mut host[..rows.len() * vocab_size];
            backend.download(&out, 0, host)?;
            for (row, logits) in host.chunks_exact(vocab_size).enumerate() {
                if let Some(token) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
                    let (position, logit) = (first + row, logits[token]);
                    let what = format!("position {position}: logit of token {token} is {logit}: the weights or activations are not finite");
                    return Err(Error::kernel(what).in_model(&self.config.dir, backend.dtype().name()));
                }
            }
            sink(first, host)?;
        }
        Ok(())
    }
}
