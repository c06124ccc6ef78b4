//! The Llama layout: Llama (arXiv 2302.13971), Mistral (2310.06825), Qwen2 (2407.10671) and Qwen3 (2505.09388) as Hugging Face publishes them.
//! Config keys, tensor names, and how separate projections become the fused ones of the decoder.
//!
//! Pre-norm layers with RMS norms, separate q, k and v, SwiGLU of separate gate and up, half-split rotary positions, grouped K/V heads. Qwen2
//! gives q, k and v biases, Qwen3 norms the heads of q and k, a head may be the embedding table. All are autoregressive: row i predicts token
//! i + 1, and there is no mask token. Diffusion models made from them, and those with experts in the place of MLPs, load through here.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{Backend, HeadShape, NormKind, Rope, RopeScaling};
use crate::config::{Attention, Family, Keys, Mlp, ModelConfig, Moe, Sampling, Switches};
use crate::error::Result;
use crate::model::families::{llada, llada2};
use crate::model::reader::Reader;
use crate::model::{Dense, FeedForward, Layer, Linear, Model, Progress, moe};
use crate::weights::Weights;

/// Where a layout keeps what the decoder reads; names in a layer come behind `{layers}.{i}.`, projections without `.weight` and `.bias`.
pub(crate) struct Names {
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
pub(crate) enum Qkv {
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
pub(crate) const NAMES: Names = Names {
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

/// The layout of a family.
fn names(family: Family) -> &'static Names {
    match family {
        Family::Llada => &llada::NAMES,
        Family::Llada2 => &llada2::NAMES,
        _ => &NAMES,
    }
}

/// Reads the published keys with the defaults of the published configuration classes.
pub fn config(dir: &Path, keys: &Keys, family: Family) -> Result<ModelConfig> {
    let vocab_size = keys.size("vocab_size", 1 << 24)?;
    let hidden_dim = keys.size("hidden_size", 1 << 16)?;
    let num_layers = keys.size("num_hidden_layers", 1 << 10)?;
    let num_heads = keys.size("num_attention_heads", 1 << 12)?;
    let num_kv_heads = match family {
        Family::Llama | Family::LladaMoe => keys.optional_size("num_key_value_heads", 1 << 12)?.unwrap_or(num_heads),
        _ => keys.size("num_key_value_heads", 1 << 12)?,
    };
    let head_dim = match (keys.optional_size("head_dim", 1 << 12)?, family) {
        (Some(head_dim), _) => head_dim,
        (None, Family::Qwen3) => 128,
        (None, _) if hidden_dim.is_multiple_of(num_heads) => hidden_dim / num_heads,
        (None, _) => {
            return Err(keys.error(format!("hidden_size {hidden_dim} over num_attention_heads {num_heads}: expected a whole head width")));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.error(format!("head width {head_dim}: expected an even number, positions rotate pairs")));
    }
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.error(format!("num_attention_heads {num_heads}: expected a multiple of num_key_value_heads {num_kv_heads}")));
    }
    if let Some(act) = keys.text("hidden_act")?.filter(|act| *act != "silu") {
        return Err(keys.error(format!("key `hidden_act`: expected silu, found {act}")));
    }
    if keys.has("quantization_config") {
        return Err(keys.error("key `quantization_config`: quantised weights are not supported, expected f32, bf16 or f16 tensors"));
    }
    let model_length = keys.size("max_position_embeddings", 1 << 24)?;
    let attention_bias = match family {
        Family::Llama | Family::LladaMoe | Family::Qwen3 | Family::Qwen3Moe => keys.flag("attention_bias", false)?,
        _ => false,
    };
    let (qkv_bias, attn_out_bias) = match family {
        Family::Qwen2 => (true, false),
        Family::Llada2 => (keys.flag("use_qkv_bias", false)?, keys.flag("use_bias", true)?),
        _ => (attention_bias, attention_bias),
    };
    let qk_norm = match family {
        Family::Qwen3 | Family::Qwen3Moe => true,
        Family::Llada2 => keys.flag("use_qk_norm", true)?,
        Family::LladaMoe => keys.flag("qk_layernorm", false)?,
        _ => false,
    };
    let mlp_dim = match family {
        // Every layer may have experts; their families know.
        Family::LladaMoe => 0,
        Family::Llada2 => keys.optional_size("intermediate_size", 1 << 20)?.unwrap_or(0),
        Family::Qwen3Moe => keys.optional_size("intermediate_size", 1 << 20)?.unwrap_or(6144),
        _ => keys.size("intermediate_size", 1 << 20)?,
    };
    let norm_eps = if matches!(family, Family::Llada2 | Family::LladaMoe) { 1e-5 } else { 1e-6 };
    let eos_id = keys.first_token("eos_token_id", vocab_size)?;
    Ok(ModelConfig {
        family,
        dir: dir.to_path_buf(),
        vocab_size,
        hidden_dim,
        num_layers,
        heads: HeadShape { num_heads, num_kv_heads, head_dim },
        mlp_dim,
        moe: None,
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(norm_eps),
        rope: Rope { width: rotary_dim(keys, family, head_dim)?, ..rope(keys, family, model_length)? },
        switches: Switches {
            norm: NormKind::Rms,
            mlp: Mlp::SwiGlu,
            qkv_bias,
            attn_out_bias,
            mlp_bias: family == Family::Llama && keys.flag("mlp_bias", false)?,
            head_bias: false,
            qk_norm,
            tied_head: keys.flag("tie_word_embeddings", false)?,
            learned_positions: false,
        },
        model_length,
        sliding_window: sliding_window(keys, family, num_layers, model_length)?,
        attention: Attention::Causal,
        shift: false,
        cond_dim: None,
        mask_id: None,
        // Texts of models without a BOS of their own are scored behind an end of text, as their training joined documents.
        bos_id: keys.first_token("bos_token_id", vocab_size)?.or(eos_id),
        eos_id,
        stop_ids: Vec::new(),
        pad_id: keys.token("pad_token_id", vocab_size)?.filter(|id| Some(*id) != eos_id),
        sampling: Sampling::default(),
    })
}

/// Rotary positions: `rope_parameters` with everything, or `rope_theta` beside an optional `rope_scaling`.
fn rope(keys: &Keys, family: Family, model_length: usize) -> Result<Rope> {
    let theta = keys.number("rope_theta")?;
    let full = |keys: &Keys| match keys.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 && !rotates_parts(family) => {
            let what =
                format!("key `partial_rotary_factor`: expected 1, found {factor}; partly rotated heads are LLaDA2's and LLaDA-MoE's alone");
            Err(keys.error(what))
        }
        _ => Ok(()),
    };
    full(keys)?;
    // The published classes let the older key win where both are there.
    let object = match keys.object("rope_scaling.")? {
        Some(object) => Some(object),
        None => keys.object("rope_parameters.")?,
    };
    let Some(object) = object else { return Ok(Rope::plain(theta.unwrap_or(10_000.0))) };
    if object.is_nested() {
        return Err(keys.error("rotary positions that differ between layers (`rope_parameters` holds objects) are not supported"));
    }
    full(&object)?;
    let base = object.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let needed = |key: &str| object.number(key)?.ok_or_else(|| keys.error(format!("rotary positions: key `{key}` is missing")));
    let kind = match object.text("rope_type")? {
        Some(kind) => Some(kind),
        None => object.text("type")?,
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                let what = format!("high_freq_factor {high_freq_factor}: expected more than low_freq_factor {low_freq_factor}");
                return Err(keys.error(format!("rotary positions: {what}")));
            }
            let original_len = object.number("original_max_position_embeddings")?.unwrap_or(model_length as f32);
            RopeScaling::Llama3 { factor: needed("factor")?, low_freq_factor, high_freq_factor, original_len }
        }
        other => {
            return Err(keys.error(format!("rotary positions of type `{other}` are not supported; supported: default, linear, llama3")));
        }
    };
    Ok(Rope { base, scaling, width: None })
}

/// Families whose classes rotate the first elements of a head and leave the rest.
fn rotates_parts(family: Family) -> bool {
    matches!(family, Family::Llada2 | Family::LladaMoe)
}

/// Elements of a head that are rotated, where that is not the whole head.
fn rotary_dim(keys: &Keys, family: Family, head_dim: usize) -> Result<Option<usize>> {
    if !rotates_parts(family) {
        return Ok(None);
    }
    let default = if family == Family::Llada2 { 0.5 } else { 1.0 };
    let factor = keys.number("partial_rotary_factor")?.unwrap_or(default);
    let width = (f64::from(factor) * head_dim as f64) as usize;
    if factor > 1.0 || !width.is_multiple_of(2) {
        let what =
            format!("key `partial_rotary_factor`: {factor} of a head of {head_dim} is {width}: expected an even number, at most the head");
        return Err(keys.error(what));
    }
    Ok(Some(width).filter(|width| *width < head_dim))
}

/// The window of the layers that have one; an error where it is shorter than the model's length, as attention here has none.
fn sliding_window(keys: &Keys, family: Family, num_layers: usize, model_length: usize) -> Result<Option<usize>> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    let kinds = if family == Family::Llama { None } else { keys.texts("layer_types")? };
    if let Some(other) = kinds.iter().flatten().find(|kind| ![FULL, SLIDING].contains(*kind)) {
        return Err(keys.error(format!("key `layer_types`: expected {FULL} or {SLIDING}, found {other}")));
    }
    // RND1's is false.
    let window = if keys.is_false("sliding_window") { None } else { keys.optional_size("sliding_window", 1 << 24)? };
    let window = match family {
        Family::Mistral if !keys.has("sliding_window") => Some(4096),
        Family::Mistral => window,
        Family::Qwen2 | Family::Qwen3 if keys.flag("use_sliding_window", false)? => {
            let sliding = match kinds {
                Some(kinds) => kinds.contains(&SLIDING),
                // Layers before this one see everything.
                None => keys.optional_count("max_window_layers", 1 << 24)?.unwrap_or(28) < num_layers,
            };
            window.filter(|_| sliding)
        }
        Family::Qwen3Moe if keys.flag("use_sliding_window", false)? => window,
        _ => None,
    };
    match window {
        Some(window) if window < model_length => Err(keys.error(format!(
            "key `sliding_window`: attention that ends {window} positions back is not supported, the model's length is {model_length}"
        ))),
        window => Ok(window),
    }
}

/// Names and shapes of every tensor that [`load`] reads.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let names = names(config.family);
    let mut list = vec![(names.table.to_string(), vec![v, c])];
    for i in 0..config.num_layers {
        list.extend(layer_tensors(config, &format!("{}.{i}", names.layers), config.experts(i)));
    }
    list.push((names.final_norm.to_string(), vec![c]));
    if !config.switches.tied_head {
        list.push((names.head.to_string(), vec![v, c]));
    }
    list
}

/// Those of one layer, whose names begin with `prefix`.
pub(in crate::model) fn layer_tensors(config: &ModelConfig, prefix: &str, experts: Option<&Moe>) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let switches = config.switches;
    let names = names(config.family);
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

/// Packs a checkpoint. Errors name the missing or misshapen tensor.
pub(crate) fn load<B: Backend>(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    let (c, v) = (config.hidden_dim, config.vocab_size);
    let tied = config.switches.tied_head;
    let names = names(config.family);
    let mut r = Reader::new(backend, weights, progress, &tensors(&config))?;
    // A tied table is the head, and held as that alone: of a small model it is a sixth of all weights.
    let table = if tied { None } else { Some(r.table(names.table, v, c)?) };
    let mut layers = Vec::with_capacity(config.num_layers);
    for i in 0..config.num_layers {
        layers.push(load_layer(&mut r, &config, &format!("{}.{i}", names.layers), config.experts(i))?);
    }
    let final_norm = r.norm(names.final_norm, c)?;
    let head = r.matrix(if tied { names.table } else { names.head }, v, c, None)?;
    Ok(Model::new(config, table, layers, final_norm, Linear { weight: head, bias: None }))
}

/// Packs what [`layer_tensors`] lists.
pub(in crate::model) fn load_layer<B: Backend>(
    r: &mut Reader<B>,
    config: &ModelConfig,
    prefix: &str,
    experts: Option<&Moe>,
) -> Result<Layer<B>> {
    let (c, f) = (config.hidden_dim, config.mlp_dim);
    let switches = config.switches;
    let names = names(config.family);
    let name = |leaf: &str| format!("{prefix}.{leaf}");
    let parts: Vec<(String, usize)> = names.qkv.parts(config.heads).into_iter().map(|(part, width)| (name(part), width)).collect();
    let weights: Vec<(String, usize)> = parts.iter().map(|(part, width)| (format!("{part}.weight"), *width)).collect();
    let mut qkv = Linear { weight: r.stacked(&weights, c)?, bias: None };
    if switches.qkv_bias {
        let mut bias = Vec::with_capacity(config.heads.qkv_width());
        for (part, width) in &parts {
            bias.extend(r.values(&format!("{part}.bias"), *width)?);
        }
        qkv.bias = Some(r.backend.vector(&bias)?);
    }
    let mlp = match experts {
        Some(experts) => FeedForward::Experts(moe::load(r, experts, prefix)?),
        None => FeedForward::Dense(Dense {
            up: r.interleaved_linear(&name(names.gate), &name(names.up), f, c, switches.mlp_bias)?,
            down: r.linear(&name(names.down), c, f, switches.mlp_bias)?,
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
        attn_out: r.linear(&name(names.attn_out), c, config.heads.q_width(), switches.attn_out_bias)?,
        mlp_norm: r.norm(&name(names.mlp_norm), c)?,
        mlp,
    })
}
