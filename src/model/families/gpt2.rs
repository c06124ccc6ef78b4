//! GPT-2 (Radford et al. 2019) as Hugging Face publishes it: a judge with learned positions.
//!
//! LayerNorms with biases, biases everywhere but at the head, which is the embedding table; GELU in
//! its tanh form; a table of positions that is added to the embedding, and no rotation. Weights of
//! products are stored as (in, out), q, k and v as one. The published files name tensors without
//! the `transformer.` in front that the class itself saves.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::json;

use crate::backend::{Backend, HeadShape, NormKind, Rope};
use crate::config::{AttentionMask, Classes, ConfigJson, DecoderFlags, Family, Mlp, ModelConfig, SamplingDefaults};
use crate::error::Result;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::layers::{Dense, Linear, NormWeights};
use crate::model::llama_layout::tied;
use crate::model::weight_loader::{Progress, WeightLoader, WeightRole};
use crate::model::{FeedForward, Layer, Model};
use crate::weights::Weights;

pub static FAMILY: Family =
    Family { name: "gpt2", model_type: "gpt2", architectures: &["GPT2LMHeadModel"], classes: Classes::Published, begins_with_bos: false };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Gpt2 };

/// What `activation_function` may say: both are `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`.
const ACTIVATIONS: [&str; 2] = ["gelu_new", "gelu_pytorch_tanh"];

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    for (key, value) in
        [("scale_attn_weights", json!(true)), ("scale_attn_by_inverse_layer_idx", json!(false)), ("add_cross_attention", json!(false))]
    {
        keys.only(key, value)?;
    }
    if let Some(act) = keys.text("activation_function")?.filter(|act| !ACTIVATIONS.contains(act)) {
        return Err(keys.error(format!("key `activation_function`: expected {}, found {act}", ACTIVATIONS.join(" or "))));
    }
    let vocab_size = keys.size("vocab_size", 1 << 24)?;
    let hidden_dim = keys.size("n_embd", 1 << 16)?;
    let num_heads = keys.size("n_head", 1 << 12)?;
    if !hidden_dim.is_multiple_of(num_heads) || !(hidden_dim / num_heads).is_multiple_of(2) {
        return Err(keys.error(format!("n_embd {hidden_dim} over n_head {num_heads}: expected an even head width")));
    }
    let eos_id = keys.first_token("eos_token_id", vocab_size)?;
    Ok(ModelConfig {
        family: &FAMILY,
        dir: dir.to_path_buf(),
        vocab_size,
        hidden_dim,
        num_layers: keys.size("n_layer", 1 << 10)?,
        heads: HeadShape { num_heads, num_kv_heads: num_heads, head_dim: hidden_dim / num_heads },
        mlp_dim: keys.optional_size("n_inner", 1 << 20)?.unwrap_or(4 * hidden_dim),
        moe: None,
        norm_eps: keys.number("layer_norm_epsilon")?.unwrap_or(1e-5),
        rope: Rope { width: Some(0), ..Rope::plain(10_000.0) },
        switches: DecoderFlags {
            norm: NormKind::Layer,
            mlp: Mlp::Gelu,
            qkv_bias: true,
            attn_out_bias: true,
            mlp_bias: true,
            head_bias: false,
            qk_norm: false,
            tied_head: keys.flag("tie_word_embeddings", true)?,
            learned_positions: true,
        },
        model_length: keys.size("n_positions", 1 << 24)?,
        sliding_window: None,
        attention: AttentionMask::Causal,
        shift: false,
        cond_dim: None,
        mask_id: None,
        bos_id: keys.first_token("bos_token_id", vocab_size)?.or(eos_id),
        eos_id,
        stop_ids: Vec::new(),
        pad_id: keys.first_token("pad_token_id", vocab_size)?,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    })
}

/// Prefix of the names of this checkpoint.
fn prefix(weights: &Weights) -> &'static str {
    const SAVED: &str = "transformer.";
    if weights.contains(&format!("{SAVED}wte.weight")) { SAVED } else { "" }
}

/// Names and shapes of every tensor that [`load`] reads, in its order.
pub(crate) fn tensors(config: &ModelConfig, weights: &Weights) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let prefix = prefix(weights);
    let mut list: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| list.push((format!("{prefix}{name}"), shape.to_vec()));
    add("wte.weight".into(), &[config.vocab_size, c]);
    add("wpe.weight".into(), &[config.model_length, c]);
    for i in 0..config.num_layers {
        for (leaf, shape, width) in [
            ("ln_1", vec![c], c),
            ("attn.c_attn", vec![c, 3 * c], 3 * c),
            ("attn.c_proj", vec![c, c], c),
            ("ln_2", vec![c], c),
            ("mlp.c_fc", vec![c, f], f),
            ("mlp.c_proj", vec![f, c], c),
        ] {
            add(format!("h.{i}.{leaf}.weight"), &shape);
            add(format!("h.{i}.{leaf}.bias"), &[width]);
        }
    }
    add("ln_f.weight".into(), &[c]);
    add("ln_f.bias".into(), &[c]);
    if !config.switches.tied_head {
        list.push(("lm_head.weight".into(), vec![config.vocab_size, c]));
    }
    list
}

/// Packs a checkpoint. Errors name the missing or misshapen tensor.
pub(crate) fn load<B: Backend>(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    let (c, f, v) = (config.hidden_dim, config.mlp_dim, config.vocab_size);
    let mut config = config;
    let prefix = prefix(weights);
    let table_name = format!("{prefix}wte.weight");
    (config.switches.tied_head, _) = tied(&config, &table_name, "lm_head.weight", weights)?;
    let mut r = WeightLoader::new(backend, weights, progress, &tensors(&config, weights))?;
    let table = if config.switches.tied_head { None } else { Some(r.table(&table_name, v, c)?) };
    let positions = r.table(&format!("{prefix}wpe.weight"), config.model_length, c)?;
    let mut layers = Vec::with_capacity(config.num_layers);
    for i in 0..config.num_layers {
        let name = |leaf: &str| format!("{prefix}h.{i}.{leaf}");
        let mut linear = |leaf: &str, n: usize, k: usize| -> Result<Linear<B>> {
            let weight = r.transposed(&format!("{}.weight", name(leaf)), n, k)?;
            Ok(Linear { weight, bias: Some(r.vector(&format!("{}.bias", name(leaf)), n)?) })
        };
        let (qkv, attn_out) = (linear("attn.c_attn", 3 * c, c)?, linear("attn.c_proj", c, c)?);
        let mlp = FeedForward::Dense(Dense { up: linear("mlp.c_fc", f, c)?, down: linear("mlp.c_proj", c, f)? });
        let attn_norm = norm(&mut r, &name("ln_1"), c)?;
        layers.push(Layer { attn_norm, qkv, head_norm: None, attn_out, mlp_norm: norm(&mut r, &name("ln_2"), c)?, mlp });
    }
    let final_norm = norm(&mut r, &format!("{prefix}ln_f"), c)?;
    let head = r.matrix(WeightRole::Head, if config.switches.tied_head { &table_name } else { "lm_head.weight" }, v, c, None)?;
    Ok(Model { positions: Some(positions), ..Model::new(config, table, layers, final_norm, Linear { weight: head, bias: None }) })
}

/// A LayerNorm with its bias.
fn norm<B: Backend>(r: &mut WeightLoader<B>, name: &str, width: usize) -> Result<NormWeights<B>> {
    let weight = r.vector(&format!("{name}.weight"), width)?;
    Ok(NormWeights { weight, bias: Some(r.vector(&format!("{name}.bias"), width)?) })
}
