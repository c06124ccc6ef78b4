//! BD3-LM (arXiv 2503.09573): config keys, tensor names, and the adaLN fold; MDLM shares the weight
//! layout.
//!
//! The published models run with `time_conditioning: false`: sigma is forced to 0, so the condition
//! `c = silu(W2 silu(W1 [cos 0 x 128, sin 0 x 128] + b1) + b2)` is one constant vector per model
//! and every adaLN shift, scale and gate is a constant per layer. They are folded at load: `LN(x) w
//! (1 + scale) + shift` is a LayerNorm with weight `w (1 + scale)` and bias `shift`; a gate
//! multiplies the rows of the projection it follows, and that projection's bias.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{Backend, HeadShape, NormKind, Rope};
use crate::config::{AttentionMask, Classes, ConfigJson, DecoderFlags, Family, Mlp, ModelConfig, SamplingDefaults};
use crate::error::Result;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::layers::{Dense, Linear, NormWeights};
use crate::model::weight_loader::{Progress, WeightLoader, WeightRole};
use crate::model::{FeedForward, Layer, Model};
use crate::weights::Weights;

pub static FAMILY: Family =
    Family { name: "bd3lm", model_type: "bd3lm", architectures: &["BD3LM"], classes: Classes::Any, begins_with_bos: true };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Bd3lm };

/// Width of the sinusoidal timestep embedding, fixed in the published `TimestepEmbedder`.
const TIMESTEP_DIM: usize = 256;

/// LayerNorm, GELU, biases in the MLP and at the head.
pub(crate) const SWITCHES: DecoderFlags = DecoderFlags {
    norm: NormKind::Layer,
    mlp: Mlp::Gelu,
    qkv_bias: false,
    attn_out_bias: false,
    mlp_bias: true,
    head_bias: true,
    qk_norm: false,
    tied_head: false,
    learned_positions: false,
};

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    let (block_size, guessed) = keys.block_len(dir, &["block_size"], 1)?;
    let attention = if keys.flag("causal", false)? {
        AttentionMask::Causal
    } else if keys.flag("cross_attn", true)? {
        AttentionMask::BlockCausal(block_size)
    } else {
        AttentionMask::Full
    };
    let guessed_block_len = guessed && matches!(attention, AttentionMask::BlockCausal(_));
    Ok(ModelConfig { guessed_block_len, ..shared_config(dir, keys, &FAMILY, attention)? })
}

/// The keys that BD3-LM and MDLM have in common.
pub(in crate::model) fn shared_config(
    dir: &Path,
    keys: &ConfigJson,
    family: &'static Family,
    attention: AttentionMask,
) -> Result<ModelConfig> {
    if keys.flag("time_conditioning", false)? {
        return Err(
            keys.error("key `time_conditioning` is true: only models without time conditioning are supported (their adaLN is constant)")
        );
    }
    let vocab_size = keys.size("vocab_size", 1 << 24)?;
    let hidden_dim = keys.size("hidden_dim", 1 << 16)?;
    let num_heads = keys.size("n_heads", 1 << 12)?;
    if !hidden_dim.is_multiple_of(num_heads) || !(hidden_dim / num_heads).is_multiple_of(2) {
        return Err(keys.error(format!("hidden_dim {hidden_dim} over n_heads {num_heads}: expected an even head width")));
    }
    if vocab_size < 3 {
        return Err(keys.error(format!("key `vocab_size`: expected at least 3 (a token, end of text, MASK), found {vocab_size}")));
    }
    // [BD3-LM] MASK is one past the tokenizer's ids, so the last row; GPT-2's end of text, which is
    // also BOS, is the row before it.
    let mask_id = keys.token("mask_token_id", vocab_size)?.unwrap_or(vocab_size as u32 - 1);
    let eos_id = keys.first_token("eos_token_id", vocab_size)?.unwrap_or(vocab_size as u32 - 2);
    Ok(ModelConfig {
        family,
        dir: dir.to_path_buf(),
        vocab_size,
        hidden_dim,
        num_layers: keys.size("n_blocks", 1 << 10)?,
        heads: HeadShape { num_heads, num_kv_heads: num_heads, head_dim: hidden_dim / num_heads },
        mlp_dim: 4 * hidden_dim,
        moe: None,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        switches: SWITCHES,
        model_length: keys.size("model_length", 1 << 24)?,
        sliding_window: None,
        attention,
        shift: false,
        cond_dim: if keys.flag("adaln", true)? { Some(keys.size("cond_dim", 1 << 16)?) } else { None },
        mask_id: Some(mask_id),
        bos_id: Some(keys.first_token("bos_token_id", vocab_size)?.unwrap_or(eos_id)),
        eos_id: Some(eos_id),
        stop_ids: Vec::new(),
        pad_id: keys.first_token("pad_token_id", vocab_size)?,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    })
}

/// Names and shapes of every tensor that [`load`] reads, in its order.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let mut list: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| list.push((format!("backbone.{name}"), shape.to_vec()));
    if let Some(d) = config.cond_dim {
        for (layer, shape) in [(0, [d, TIMESTEP_DIM]), (2, [d, d])] {
            add(format!("sigma_map.mlp.{layer}.weight"), &shape);
            add(format!("sigma_map.mlp.{layer}.bias"), &[d]);
        }
    }
    add("vocab_embed.embedding".into(), &[v, c]);
    for i in 0..config.num_layers {
        if let Some(d) = config.cond_dim {
            add(format!("blocks.{i}.adaLN_modulation.weight"), &[6 * c, d]);
            add(format!("blocks.{i}.adaLN_modulation.bias"), &[6 * c]);
        }
        for (name, shape) in layer_tensors(config, &format!("blocks.{i}")) {
            add(name, &shape);
        }
    }
    if let Some(d) = config.cond_dim {
        add("output_layer.adaLN_modulation.weight".into(), &[2 * c, d]);
        add("output_layer.adaLN_modulation.bias".into(), &[2 * c]);
    }
    add("output_layer.norm_final.weight".into(), &[c]);
    add("output_layer.linear.weight".into(), &[v, c]);
    add("output_layer.linear.bias".into(), &[v]);
    list
}

/// Those of one layer without its modulation, whose names begin with `prefix`.
pub(in crate::model) fn layer_tensors(config: &ModelConfig, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let leaves: [(&str, &[usize]); 8] = [
        ("mlp.2.bias", &[c]),
        ("norm1.weight", &[c]),
        ("attn_qkv.weight", &[3 * c, c]),
        ("attn_out.weight", &[c, c]),
        ("norm2.weight", &[c]),
        ("mlp.0.weight", &[f, c]),
        ("mlp.0.bias", &[f]),
        ("mlp.2.weight", &[c, f]),
    ];
    leaves.map(|(leaf, shape)| (format!("{prefix}.{leaf}"), shape.to_vec())).to_vec()
}

/// LayerNorm weight under a (shift, scale) pair; plain where there is no adaLN.
fn norm<B: Backend>(r: &mut WeightLoader<B>, name: &str, width: usize, modulation: Option<(&[f32], &[f32])>) -> Result<NormWeights<B>> {
    let Some((shift, scale)) = modulation else { return r.norm(name, width) };
    let mut weight = r.values(name, width)?;
    weight.iter_mut().zip(scale).for_each(|(w, s)| *w *= 1.0 + s);
    Ok(NormWeights { weight: r.backend.upload(&weight)?, bias: Some(r.backend.upload(shift)?) })
}

/// `W c + b` for a modulation of `parts` vectors of `width`.
fn modulation<B: Backend>(r: &mut WeightLoader<B>, name: &str, condition: &[f64], parts: usize, width: usize) -> Result<Vec<f32>> {
    let weight = r.numbers(&format!("{name}.weight"), &[parts * width, condition.len()])?;
    let bias = r.values(&format!("{name}.bias"), parts * width)?;
    Ok(affine(&weight, &bias, condition).map(|v| v as f32).collect())
}

/// `W x + b` in f64, row by row.
fn affine<'a>(weight: &'a [f32], bias: &'a [f32], x: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
    weight
        .chunks_exact(x.len())
        .zip(bias)
        .map(move |(row, b)| f64::from(*b) + row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Packs a BD3-LM or MDLM checkpoint. Errors name the missing or misshapen tensor.
pub(crate) fn load<B: Backend>(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let mut r = WeightLoader::new(backend, weights, progress, &tensors(&config))?;

    let condition = match config.cond_dim {
        None => None,
        Some(d) => {
            // sigma = 0: every cosine is 1, every sine 0, cosines first.
            let mut timestep = vec![1.0f64; TIMESTEP_DIM / 2];
            timestep.resize(TIMESTEP_DIM, 0.0);
            let w1 = r.numbers("backbone.sigma_map.mlp.0.weight", &[d, TIMESTEP_DIM])?;
            let b1 = r.values("backbone.sigma_map.mlp.0.bias", d)?;
            let w2 = r.numbers("backbone.sigma_map.mlp.2.weight", &[d, d])?;
            let b2 = r.values("backbone.sigma_map.mlp.2.bias", d)?;
            let hidden: Vec<f64> = affine(&w1, &b1, &timestep).map(silu).collect();
            // The backbone applies SiLU once more to the embedder's output.
            Some(affine(&w2, &b2, &hidden).map(silu).collect::<Vec<f64>>())
        }
    };

    let table = r.table("backbone.vocab_embed.embedding", v, c)?;

    let mut layers = Vec::with_capacity(config.num_layers);
    for i in 0..config.num_layers {
        layers.push(load_layer(&mut r, &config, &format!("backbone.blocks.{i}"), condition.as_deref())?);
    }

    let modulation = match &condition {
        None => None,
        Some(condition) => Some(modulation(&mut r, "backbone.output_layer.adaLN_modulation", condition, 2, c)?),
    };
    let final_norm = norm(&mut r, "backbone.output_layer.norm_final.weight", c, modulation.as_ref().map(|m| m.split_at(c)))?;
    let head = r.linear(WeightRole::Head, "backbone.output_layer.linear", v, c, true)?;
    Ok(Model::new(config, Some(table), layers, final_norm, head))
}

/// Packs what [`layer_tensors`] lists, under the modulation of `condition` where there is one.
pub(in crate::model) fn load_layer<B: Backend>(
    r: &mut WeightLoader<B>,
    config: &ModelConfig,
    prefix: &str,
    condition: Option<&[f64]>,
) -> Result<Layer<B>> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let name = |leaf: &str| format!("{prefix}.{leaf}");
    // Order of the chunks: shift, scale, gate for attention, then for the MLP.
    let modulation = match condition {
        None => None,
        Some(condition) => Some(modulation(r, &name("adaLN_modulation"), condition, 6, c)?),
    };
    let part = |index: usize| modulation.as_ref().map(|m| &m[index * c..(index + 1) * c]);
    let pair = |index: usize| part(index).zip(part(index + 1));
    let mut down_bias = r.values(&name("mlp.2.bias"), c)?;
    if let Some(gate) = part(5) {
        down_bias.iter_mut().zip(gate).for_each(|(b, g)| *b *= g);
    }
    Ok(Layer {
        attn_norm: norm(r, &name("norm1.weight"), c, pair(0))?,
        qkv: Linear { weight: r.matrix(WeightRole::Layer, &name("attn_qkv.weight"), 3 * c, c, None)?, bias: None },
        head_norm: None,
        attn_out: Linear { weight: r.matrix(WeightRole::Layer, &name("attn_out.weight"), c, c, part(2))?, bias: None },
        mlp_norm: norm(r, &name("norm2.weight"), c, pair(3))?,
        mlp: FeedForward::Dense(Dense {
            up: r.linear(WeightRole::Layer, &name("mlp.0"), f, c, true)?,
            down: Linear {
                weight: r.matrix(WeightRole::Layer, &name("mlp.2.weight"), c, f, part(5))?,
                bias: Some(r.backend.upload(&down_bias)?),
            },
        }),
    })
}
