//! Owns the forward pass, generic over the machine: one decoder with switches, in the order of the papers.
//!
//! ```text
//! ids -> embed -> [ norm -> qkv -> rope + K/V append -> attention -> out (+x) -> norm -> up, gelu -> down (+x) ] x N
//!     -> (deciding rows) -> final norm -> head + decide
//! ```
//! A family file (`bd3lm.rs`, `mdlm.rs`) maps config keys and tensor names onto it. adaLN with a constant condition is folded
//! into the weights at load, so the decoder itself knows nothing of it.
#![forbid(unsafe_code)]

pub mod bd3lm;
pub mod mdlm;
pub mod shapes;

use crate::backend::{Backend, Decision, Draw, Epilogue, KvShape};
use crate::config::{Family, ModelConfig};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::weights::Weights;

/// Rows whose logits are materialised together by [`Model::logits`].
const LOGIT_ROWS: usize = 64;

/// Called while weights are packed: tensors done, tensors in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Sees the residual stream (T, C): 0 after the embedding, i after layer i.
pub type Probe<'a, B> = &'a mut dyn FnMut(usize, &<B as Backend>::Buffer) -> Result<()>;

struct Norm<B: Backend> {
    weight: B::Vector,
    bias: Option<B::Vector>,
}

struct Layer<B: Backend> {
    attn_norm: Norm<B>,
    /// (3C or (H + 2K) D, C), no bias.
    qkv: B::Matrix,
    /// (C, H D), no bias.
    attn_out: B::Matrix,
    mlp_norm: Norm<B>,
    /// (F, C) and (F).
    up: B::Matrix,
    up_bias: B::Vector,
    /// (C, F) and (C).
    down: B::Matrix,
    down_bias: B::Vector,
}

/// Everything that keeps a checkpoint from loading: missing and misshapen tensors. Values are not read.
pub fn check(config: &ModelConfig, weights: &Weights) -> Vec<Error> {
    let tensors = match config.family {
        Family::Bd3lm | Family::Mdlm => bd3lm::tensors(config),
    };
    tensors.iter().filter_map(|(name, shape)| weights.tensor(name, shape).err()).collect()
}

/// Weights of one checkpoint on a backend.
pub struct Model<B: Backend> {
    config: ModelConfig,
    /// (V, C).
    table: B::Matrix,
    layers: Vec<Layer<B>>,
    final_norm: Norm<B>,
    /// (V, C) and (V).
    head: B::Matrix,
    head_bias: B::Vector,
}

/// Activations of a forward, reused between forwards and grown to the largest.
pub struct Scratch<B: Backend> {
    rows: usize,
    /// (T, C) residual stream.
    x: B::Buffer,
    /// (T, C) normed rows; attention output.
    h: B::Buffer,
    /// (T, (H + 2K) D).
    qkv: B::Buffer,
    /// (T, F); queries of the wanted rows in the last layer.
    mlp: B::Buffer,
}

impl<B: Backend> Scratch<B> {
    /// Room for `rows` rows.
    pub fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self> {
        let width = config.hidden_dim.max(config.heads.q_width());
        Ok(Scratch {
            rows,
            x: backend.alloc(rows * width)?,
            h: backend.alloc(rows * width)?,
            qkv: backend.alloc(rows * config.heads.qkv_width())?,
            mlp: backend.alloc(rows * config.mlp_dim.max(config.heads.qkv_width()))?,
        })
    }

    fn reserve(&mut self, backend: &B, config: &ModelConfig, rows: usize) -> Result<()> {
        if rows > self.rows {
            // Freed before the larger ones are made: the two sets never exist together.
            *self = Scratch { rows: 0, x: backend.alloc(0)?, h: backend.alloc(0)?, qkv: backend.alloc(0)?, mlp: backend.alloc(0)? };
            *self = Scratch::new(backend, config, rows)?;
        }
        Ok(())
    }
}

impl<B: Backend> Model<B> {
    /// Packs the checkpoint's weights for `backend`.
    pub fn load(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
        match config.family {
            Family::Bd3lm | Family::Mdlm => bd3lm::load(backend, config, weights, progress),
        }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Shape of the page store this model needs.
    pub fn kv_shape(&self, num_pages: usize, page_size: usize) -> KvShape {
        KvShape {
            num_layers: self.config.num_layers,
            num_pages,
            page_size,
            num_kv_heads: self.config.heads.num_kv_heads,
            head_dim: self.config.heads.head_dim,
        }
    }

    /// Runs the plan's rows through all layers, writing their K/V. The residual stream of the `wanted` rows (ascending) stays in
    /// `scratch`, one after the other, for [`Model::decide`] or [`Model::logits`].
    ///
    /// In the last layer a row that nobody wants gives its K/V and stops: nothing reads the rest of it. A refining forward that
    /// decides a sixth of its rows saves most of one layer that way.
    pub fn forward(
        &self,
        backend: &B,
        plan: &Plan,
        wanted: &[u32],
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        mut probe: Option<Probe<B>>,
    ) -> Result<()> {
        let config = &self.config;
        let mut rows = plan.num_rows();
        scratch.reserve(backend, config, rows)?;
        let Scratch { x, h, qkv, mlp, .. } = scratch;
        let mut batch = backend.batch(plan)?;
        backend.embed(&batch, &self.table, x)?;
        let mut look = |layer: usize, x: &B::Buffer| probe.as_mut().map_or(Ok(()), |probe| probe(layer, x));
        look(0, x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            backend.layer_norm(rows, x, &layer.attn_norm.weight, layer.attn_norm.bias.as_ref(), config.norm_eps, h)?;
            backend.linear(rows, h, &layer.qkv, None, Epilogue::Store, qkv)?;
            backend.rope_append(&batch, config.heads, config.rope_base, qkv, i, kv)?;
            if i + 1 == self.layers.len() && wanted.len() < rows {
                // Queries and residuals of the wanted rows move up; their K/V are in the pages like everyone's.
                rows = wanted.len();
                if rows == 0 {
                    return Ok(());
                }
                batch = backend.batch(&plan.select(wanted))?;
                backend.gather(wanted, config.heads.qkv_width(), qkv, mlp)?;
                backend.gather(wanted, config.hidden_dim, x, qkv)?;
                let all: Vec<u32> = (0..rows as u32).collect();
                backend.gather(&all, config.hidden_dim, qkv, x)?;
                backend.attention(&batch, config.heads, mlp, i, kv, h)?;
            } else {
                backend.attention(&batch, config.heads, qkv, i, kv, h)?;
            }
            backend.linear(rows, h, &layer.attn_out, None, Epilogue::Add, x)?;
            backend.layer_norm(rows, x, &layer.mlp_norm.weight, layer.mlp_norm.bias.as_ref(), config.norm_eps, h)?;
            backend.linear(rows, h, &layer.up, Some(&layer.up_bias), Epilogue::Gelu, mlp)?;
            backend.linear(rows, mlp, &layer.down, Some(&layer.down_bias), Epilogue::Add, x)?;
            look(i + 1, x)?;
        }
        Ok(())
    }

    /// Final norm of the given rows, counted among the wanted ones of the last forward, into `scratch.h`.
    fn final_rows(&self, backend: &B, rows: &[u32], scratch: &mut Scratch<B>) -> Result<()> {
        // The MLP buffer is free after the forward and at least as wide as a row.
        backend.gather(rows, self.config.hidden_dim, &scratch.x, &mut scratch.mlp)?;
        let Norm { weight, bias } = &self.final_norm;
        backend.layer_norm(rows.len(), &scratch.mlp, weight, bias.as_ref(), self.config.norm_eps, &mut scratch.h)
    }

    /// Decides rows, counted among the wanted ones of the last forward: `rows[i]` is answered by `draws[i]`.
    pub fn decide(&self, backend: &B, rows: &[u32], draws: &[Draw], banned: &[u32], scratch: &mut Scratch<B>) -> Result<Vec<Decision>> {
        assert_eq!(rows.len(), draws.len(), "one draw per row");
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.final_rows(backend, rows, scratch)?;
        backend.decide(&scratch.h, &self.head, Some(&self.head_bias), banned, draws)
    }

    /// Logits of all `num_rows` wanted rows of the last forward, before any ban or shift, a few rows at a time: `sink(first_row, logits)`.
    pub fn logits(
        &self,
        backend: &B,
        num_rows: usize,
        scratch: &mut Scratch<B>,
        sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        let mut out = backend.alloc(LOGIT_ROWS.min(num_rows) * vocab_size)?;
        let mut host = vec![0.0; LOGIT_ROWS.min(num_rows) * vocab_size];
        for first in (0..num_rows).step_by(LOGIT_ROWS) {
            let rows: Vec<u32> = (first..num_rows.min(first + LOGIT_ROWS)).map(|r| r as u32).collect();
            self.final_rows(backend, &rows, scratch)?;
            backend.linear(rows.len(), &scratch.h, &self.head, Some(&self.head_bias), Epilogue::Store, &mut out)?;
            let host = &mut host[..rows.len() * vocab_size];
            backend.download(&out, 0, host)?;
            sink(first, host)?;
        }
        Ok(())
    }
}
