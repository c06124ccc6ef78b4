//! The Llama layout of tensors: names, shapes, and how separate projections become fused ones.
//!
//! A family of this layout says in a [`Names`] what its tensors are called;
//! most use those of Hugging Face, [`NAMES`].
#![forbid(unsafe_code)]

use crate::backend::{Backend, HeadShape};
use crate::config::{ModelConfig, Moe};
use crate::error::Result;
use crate::model::layers::{Dense, Linear};
use crate::model::moe;
use crate::model::weight_loader::{Progress, WeightLoader, WeightRole};
use crate::model::{FeedForward, Layer, Model};
use crate::weights::Weights;

/// Where a layout keeps what the decoder reads; names in a layer come after `{layers}.{i}.`,
/// projections without `.weight` and `.bias`.
#[derive(Clone, Copy)]
pub(super) struct Names {
    pub table: &'static str,
    pub layers: &'static str,
    pub attn_norm: &'static str,
    pub qkv: Qkv,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub attn_out: &'static str,
    pub mlp_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
}

/// The projections in front of attention.
#[derive(Clone, Copy)]
pub(super) enum Qkv {
    Separate {
        q: &'static str,
        k: &'static str,
        v: &'static str,
    },
    /// One, its rows those of q, of k and of v.
    Fused(&'static str),
}

impl Qkv {
    /// Each with its rows.
    fn parts(&self, heads: HeadShape) -> Vec<(&'static str, usize)> {
        let kv = heads.num_kv_heads * heads.head_dim;
        match *self {
            Qkv::Separate { q, k, v } => vec![(q, heads.q_width()), (k, kv), (v, kv)],
            Qkv::Fused(all) => vec![(all, heads.qkv_width())],
        }
    }
}

/// The names of Hugging Face's own classes.
pub(super) const NAMES: Names = Names {
    table: "model.embed_tokens.weight",
    layers: "model.layers",
    attn_norm: "input_layernorm.weight",
    qkv: Qkv::Separate { q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj" },
    q_norm: "self_attn.q_norm.weight",
    k_norm: "self_attn.k_norm.weight",
    attn_out: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm.weight",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
};

/// Names and shapes of every tensor that [`load`] reads.
pub(super) fn tensors(config: &ModelConfig, names: &Names) -> Vec<(String, Vec<usize>)> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let mut list = vec![(names.table.to_string(), vec![v, c])];
    for i in 0..config.num_layers {
        list.extend(layer_tensors(config, names, &format!("{}.{i}", names.layers), config.experts(i)));
    }
    list.push((names.final_norm.to_string(), vec![c]));
    if !config.switches.tied_head {
        list.push((names.head.to_string(), vec![v, c]));
    }
    list
}

/// Those of one layer, whose names begin with `prefix`.
pub(super) fn layer_tensors(config: &ModelConfig, names: &Names, prefix: &str, experts: Option<&Moe>) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let switches = config.switches;
    let mut list = Vec::new();
    let mut add = |leaf: &str, shape: &[usize]| list.push((format!("{prefix}.{leaf}"), shape.to_vec()));
    let mut linear = |name: &str, n: usize, k: usize, with_bias: bool| {
        add(&format!("{name}.weight"), &[n, k]);
        if with_bias {
            add(&format!("{name}.bias"), &[n]);
        }
    };
    for (name, width) in names.qkv.parts(config.heads) {
        linear(name, width, c, switches.qkv_bias);
    }
    linear(names.attn_out, c, config.heads.q_width(), switches.attn_out_bias);
    if experts.is_none() {
        for (name, n, k) in [(names.gate, f, c), (names.up, f, c), (names.down, c, f)] {
            linear(name, n, k, switches.mlp_bias);
        }
    }
    for norm in [names.attn_norm, names.mlp_norm] {
        add(norm, &[c]);
    }
    if switches.qk_norm {
        for norm in [names.q_norm, names.k_norm] {
            add(norm, &[config.heads.head_dim]);
        }
    }
    if let Some(experts) = experts {
        list.extend(moe::tensors(config, experts, prefix));
    }
    list
}

/// Whether the head is the table of embeddings, and the tensor that is the table.
///
/// As transformers 5 reads a tied checkpoint: a head that is there and differs from the table is
/// the head all the same, and one that is there alone is both.
pub(super) fn tied<'n>(config: &ModelConfig, table: &'n str, head: &'n str, weights: &Weights) -> Result<(bool, &'n str)> {
    if !config.switches.tied_head || !weights.contains(head) {
        return Ok((config.switches.tied_head, table));
    }
    if !weights.contains(table) {
        return Ok((true, head));
    }
    // A head of its own was packed because it differs.
    if weights.is_in_packed(head) {
        return Ok((false, table));
    }
    Ok((weights.are_equal(table, head, &[config.vocab_size, config.hidden_dim])?, table))
}

/// Packs a checkpoint. Errors name the missing or misshapen tensor.
pub(super) fn load<B: Backend>(backend: &B, config: ModelConfig, names: &Names, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let mut config = config;
    let mut names = *names;
    // LLaDA's own code passes over a head that is not asked for.
    if names.head == NAMES.head {
        (config.switches.tied_head, names.table) = tied(&config, names.table, names.head, weights)?;
    }
    let (tied, names) = (config.switches.tied_head, &names);
    let mut r = WeightLoader::new(backend, weights, progress, &tensors(&config, names))?;
    // A tied table is the head, and held as that alone: of a small model it is a sixth of all
    // weights.
    let table = if tied { None } else { Some(r.table(names.table, v, c)?) };
    let mut layers = Vec::with_capacity(config.num_layers);
    for i in 0..config.num_layers {
        layers.push(load_layer(&mut r, &config, names, &format!("{}.{i}", names.layers), config.experts(i))?);
    }
    let final_norm = r.norm(names.final_norm, c)?;
    let head = r.matrix(WeightRole::Head, if tied { names.table } else { names.head }, v, c, None)?;
    Ok(Model::new(config, table, layers, final_norm, Linear { weight: head, bias: None }))
}

/// Packs what [`layer_tensors`] lists.
pub(super) fn load_layer<B: Backend>(
    r: &mut WeightLoader<B>,
    config: &ModelConfig,
    names: &Names,
    prefix: &str,
    experts: Option<&Moe>,
) -> Result<Layer<B>> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let switches = config.switches;
    let name = |leaf: &str| format!("{prefix}.{leaf}");
    let parts: Vec<(String, usize)> = names.qkv.parts(config.heads).into_iter().map(|(part, width)| (name(part), width)).collect();
    let weights: Vec<(String, usize)> = parts.iter().map(|(part, width)| (format!("{part}.weight"), *width)).collect();
    let mut qkv = Linear { weight: r.stacked(&weights, c)?, bias: None };
    if switches.qkv_bias {
        let mut bias = Vec::with_capacity(config.heads.qkv_width());
        for (part, width) in &parts {
            bias.extend(r.values(&format!("{part}.bias"), *width)?);
        }
        qkv.bias = Some(r.backend.upload(&bias)?);
    }
    let mlp = match experts {
        Some(experts) => FeedForward::Experts(moe::load(r, experts, prefix)?),
        None => FeedForward::Dense(Dense {
            up: r.interleaved_linear(&name(names.gate), &name(names.up), f, c, switches.mlp_bias)?,
            down: r.linear(WeightRole::Layer, &name(names.down), c, f, switches.mlp_bias)?,
        }),
    };
    Ok(Layer {
        attn_norm: r.norm(&name(names.attn_norm), c)?,
        qkv,
        head_norm: if switches.qk_norm {
            let width = config.heads.head_dim;
            Some([r.vector(&name(names.q_norm), width)?, r.vector(&name(names.k_norm), width)?])
        } else {
            None
        },
        attn_out: r.linear(WeightRole::Layer, &name(names.attn_out), c, config.heads.q_width(), switches.attn_out_bias)?,
        mlp_norm: r.norm(&name(names.mlp_norm), c)?,
        mlp,
    })
}
