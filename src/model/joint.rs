//! The one-layer sampler over a frozen diffusion model that unmasks several tokens per full forward
//! (ADJUST, arXiv 2509.22738).
//!
//! ```text
//! h <- final rows of the model, those that predict each position
//! after every unmasked token, at every position i of the window:
//!     u = W_d [ rms_e(E[x_i]) ; rms_h(h_i) ] + b_d        v = layer(u)        h_i <- h_i + rms_p(v)
//!     the distribution at i: softmax(W h_i)
//! ```
//! E and W are the model's own table and head, the layer is one of its own kind (without
//! modulation) with weights of its own, and sees what the window sees. K/V of the layer lie in
//! the pages after the model's own layers. A position outside the window keeps the K/V that it had
//! when the model last computed it: those of the state that no call has changed yet
//! ([`Joint::append`]).
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{self, Activation, Backend, Epilogue, NormKind, RowList, RowsToSample, StepParts, WindowShortlist};
use crate::config::{ConfigJson, ModelConfig};
use crate::error::{Error, Result};
use crate::model::layers::Linear;
use crate::model::registry;
use crate::model::weight_loader::{Progress, WeightLoader};
use crate::model::{Layer, Model, Scratch, unique};
use crate::plan::Plan;
use crate::weights::Weights;

/// Names of the published checkpoints, without their prefix `drafter.`; the zeros are the copy that
/// all calls share and the only layer.
const DOWN: &str = "down_project.0";
const EMBED_NORM: &str = "norm_embed.0.weight";
const HIDDEN_NORM: &str = "norm_hidden.0.weight";
const OUT_NORM: &str = "norm_postattn.0.weight";
const LAYER: &str = "layers.0.0";

/// Weights of a sampler on a backend.
pub struct Joint<B: Backend> {
    embed_norm: B::Buffer,
    hidden_norm: B::Buffer,
    out_norm: B::Buffer,
    /// W_d's columns for the embedding, (C, C).
    embed_down: B::Weight,
    /// Those for the state, and b_d.
    hidden_down: Linear<B>,
    layer: Layer<B>,
}

/// What a window of rows carries from call to call.
pub struct JointState<B: Backend> {
    /// Names this pair of buffers among all that ever were.
    pub(super) id: u64,
    rows: usize,
    /// (rows, C) f32: h.
    hidden: B::Buffer,
    /// (rows, C): rms_h(h).
    normed: B::Buffer,
}

impl<B: Backend> JointState<B> {
    /// With buffers for `rows` rows.
    pub fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self> {
        let len = rows * config.hidden_dim;
        let [hidden, normed] = backend.alloc([Activation::F32(len), Activation::Input(len)])?;
        Ok(JointState { id: unique(), rows, hidden, normed })
    }

    /// Reserves buffers for `rows` rows; growing loses their content.
    pub(super) fn reserve(&mut self, backend: &B, config: &ModelConfig, rows: usize) -> Result<()> {
        if rows > self.rows {
            // Freed before the larger one is made.
            *self = JointState::new(backend, config, 0)?;
            *self = JointState::new(backend, config, rows)?;
        }
        Ok(())
    }
}

/// The sampler's own norms, independent of the model's.
fn rms<'a, V>(config: &ModelConfig, weight: &'a V) -> backend::Norm<'a, V> {
    backend::Norm { kind: NormKind::Rms, eps: config.norm_eps, weight, bias: None }
}

/// Where a sampler's layer lies in the pages of a model.
fn layer_index(base: &ModelConfig) -> usize {
    base.num_layers
}

impl<B: Backend> Joint<B> {
    /// Opens a sampler's directory: `config.json`, which names the model it belongs to, and
    /// `model.safetensors`.
    ///
    /// Errors: a model of another family or size, and those of loading weights.
    pub fn load(backend: &B, base: &ModelConfig, dir: &Path, progress: Progress) -> Result<Joint<B>> {
        ConfigJson::read(dir, |keys| check(keys, base))?;
        let c = base.hidden_dim;
        let weights = Weights::open(dir)?;
        let mut expected = vec![(format!("{DOWN}.weight"), vec![c, 2 * c]), (format!("{DOWN}.bias"), vec![c])];
        expected.extend([EMBED_NORM, HIDDEN_NORM, OUT_NORM].map(|name| (name.to_string(), vec![c])));
        expected.extend(registry::layer_tensors(base, LAYER));
        let mut r = WeightLoader::new(backend, &weights, progress, &expected)?;
        let (embed_norm, hidden_norm, out_norm) = (r.vector(EMBED_NORM, c)?, r.vector(HIDDEN_NORM, c)?, r.vector(OUT_NORM, c)?);
        let down = format!("{DOWN}.weight");
        let embed_down = r.columns(&down, c, 2 * c, 0, c)?;
        let hidden_down = Linear { weight: r.columns(&down, c, 2 * c, c, c)?, bias: Some(r.vector(&format!("{DOWN}.bias"), c)?) };
        let layer = registry::load_layer(&mut r, base, LAYER)?;
        Ok(Joint { embed_norm, hidden_norm, out_norm, embed_down, hidden_down, layer })
    }

    /// The state before any call: final rows of the model's last forward, `rows[i]` (counted among
    /// its wanted ones) for row i of the window. Reads the scratch of that forward and leaves its
    /// rows alone.
    pub fn start(&self, backend: &B, model: &Model<B>, rows: &[u32], scratch: &mut Scratch<B>, state: &mut JointState<B>) -> Result<()> {
        state.reserve(backend, &model.config, rows.len())?;
        self.start_rows(backend, model, &backend.rows(rows)?, scratch, state)
    }

    /// [`Joint::start`] from rows that the backend holds, at most as many as the state holds.
    pub(super) fn start_rows(
        &self,
        backend: &B,
        model: &Model<B>,
        rows: &B::Rows,
        scratch: &mut Scratch<B>,
        state: &mut JointState<B>,
    ) -> Result<()> {
        let (config, count) = (&model.config, rows.num_rows());
        if count == 0 {
            return Ok(());
        }
        assert!(count <= state.rows, "{count} rows where there is a state for {}", state.rows);
        let Scratch { x, qkv, .. } = scratch;
        backend.gather(rows, config.hidden_dim, x, qkv)?;
        model.final_norm.apply(backend, config, count, qkv, &mut state.hidden)?;
        backend.norm(count, &mut state.hidden, None, &rms(config, &self.hidden_norm), &mut state.normed)
    }

    /// Writes the K/V of the plan's rows, whose state is `state`, and changes nothing else: for
    /// positions outside any window.
    pub fn append(
        &self,
        backend: &B,
        model: &Model<B>,
        plan: &Plan,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        state: &JointState<B>,
    ) -> Result<()> {
        self.append_kv(backend, model, plan.num_rows(), &backend.batch(plan)?, kv, scratch, state)
    }

    /// One call: the plan's rows, with the tokens as they are now, carry their state on.
    pub fn call(
        &self,
        backend: &B,
        model: &Model<B>,
        plan: &Plan,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        state: &mut JointState<B>,
    ) -> Result<()> {
        self.call_batch(backend, model, plan.num_rows(), &backend.batch(plan)?, kv, scratch, state)
    }

    /// [`Joint::call`] over the `rows` rows of a batch.
    #[allow(clippy::too_many_arguments)] // as the model's forward
    pub(super) fn call_batch(
        &self,
        backend: &B,
        model: &Model<B>,
        rows: usize,
        batch: &B::Batch,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        state: &mut JointState<B>,
    ) -> Result<()> {
        let config = &model.config;
        self.append_kv(backend, model, rows, batch, kv, scratch, state)?;
        let Scratch { h, qkv, .. } = &mut *scratch;
        backend.attention(batch, config.heads, qkv, layer_index(config), kv, h)?;
        self.layer.project_and_mlp(backend, config, rows, scratch)?;
        let Scratch { x, qkv, .. } = &mut *scratch;
        backend.norm(rows, x, None, &rms(config, &self.out_norm), qkv)?;
        backend.norm(rows, &mut state.hidden, Some(qkv), &rms(config, &self.hidden_norm), &mut state.normed)
    }

    /// The layer up to its K/V.
    #[allow(clippy::too_many_arguments)] // as the model's forward
    pub(super) fn append_kv(
        &self,
        backend: &B,
        model: &Model<B>,
        rows: usize,
        batch: &B::Batch,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        state: &JointState<B>,
    ) -> Result<()> {
        let config = &model.config;
        assert!(rows <= state.rows, "{rows} rows where there is a state for {}", state.rows);
        scratch.reserve(backend, config, rows)?;
        let Scratch { x, h, .. } = &mut *scratch;
        backend.embed(batch, model.embedding(), None, x)?;
        backend.norm(rows, x, None, &rms(config, &self.embed_norm), h)?;
        backend.linear(rows, h, &self.embed_down, None, Epilogue::Store, x)?;
        self.hidden_down.apply(backend, rows, &state.normed, Epilogue::Add, x)?;
        self.layer.append_kv(backend, config, rows, batch, layer_index(config), kv, scratch)
    }

    /// Keeps the states of the given rows alone (ascending), one after the other.
    pub(super) fn keep_rows(
        &self,
        backend: &B,
        model: &Model<B>,
        rows: &B::Rows,
        scratch: &mut Scratch<B>,
        state: &mut JointState<B>,
    ) -> Result<()> {
        let (config, count) = (&model.config, rows.num_rows());
        backend.gather(rows, config.hidden_dim, &state.hidden, &mut scratch.qkv)?;
        backend.copy(count * config.hidden_dim, &scratch.qkv, &mut state.hidden)?;
        backend.norm(count, &mut state.hidden, None, &rms(config, &self.hidden_norm), &mut state.normed)
    }

    /// Samples the rows of a pass by their states, on the host or on the device.
    #[allow(clippy::too_many_arguments)] // as the model's forward
    pub(super) fn sample(
        &self,
        backend: &B,
        model: &Model<B>,
        parts: &mut dyn StepParts<B>,
        sample_rows: &B::Rows,
        scratch: &mut Scratch<B>,
        state: &JointState<B>,
        lists: &[B::Shortlists],
    ) -> Result<()> {
        let (Scratch { x, h, picked, .. }, width) = (scratch, model.config.hidden_dim);
        backend.gather(sample_rows, width, &state.hidden, h)?;
        let (head, bias) = (&model.head.weight, model.head.bias.as_ref());
        parts.sample(backend, RowsToSample { hidden: h, width, head, bias, guide: None, scratch: [picked, x], lists })
    }

    /// The most probable ids of rows of the window, by their states as they are now: what passes
    /// may choose among.
    pub(super) fn shortlist(
        &self,
        backend: &B,
        model: &Model<B>,
        list: &WindowShortlist,
        scratch: &mut Scratch<B>,
        state: &JointState<B>,
    ) -> Result<B::Shortlists> {
        let WindowShortlist { rows, n, banned } = list;
        backend.gather(&backend.rows(rows)?, model.config.hidden_dim, &state.hidden, &mut scratch.qkv)?;
        backend.shortlist(rows.len(), &scratch.qkv, &model.head.weight, model.head.bias.as_ref(), banned, *n)
    }

    /// Logits (rows, V) of the first `rows` rows of the window, before any ban; for checks.
    pub fn logits(&self, backend: &B, model: &Model<B>, rows: usize, state: &JointState<B>) -> Result<Vec<f32>> {
        let vocab_size = model.config.vocab_size;
        let ([mut out], mut host) = (backend.alloc([Activation::F32(rows * vocab_size)])?, vec![0.0; rows * vocab_size]);
        model.head.apply(backend, rows, &state.hidden, Epilogue::Store, &mut out)?;
        backend.download(&out, 0, &mut host)?;
        Ok(host)
    }
}

/// Refuses a sampler that was made for another model.
fn check(keys: &ConfigJson, base: &ModelConfig) -> Result<()> {
    match keys.text("model_type")? {
        Some("joint-sampler") => {}
        found => return Err(keys.error(format!("key `model_type`: expected joint-sampler, found {}", found.unwrap_or("nothing")))),
    }
    if base.moe.is_some() {
        return Err(Error::request("a joint sampler over a model with experts is not supported: its layer would be one of experts"));
    }
    let family = keys.text("base_family")?.unwrap_or_default();
    if family != base.family.name {
        return Err(keys.error(format!("key `base_family`: expected {}, the model's, found `{family}`", base.family.name)));
    }
    for (key, expected) in [
        ("hidden_size", base.hidden_dim),
        ("vocab_size", base.vocab_size),
        ("num_attention_heads", base.heads.num_heads),
        ("num_key_value_heads", base.heads.num_kv_heads),
        ("intermediate_size", base.mlp_dim),
    ] {
        let found = keys.size(key, 1 << 24)?;
        if found != expected {
            return Err(keys.error(format!("key `{key}`: expected {expected}, the model's, found {found}")));
        }
    }
    Ok(())
}
