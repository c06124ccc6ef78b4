//! Llama (arXiv 2302.13971), and the config keys that families of its layout share.
//!
//! Pre-norm layers with RMS norms, separate q, k and v, SwiGLU of separate gate and up, half-split
//! rotary positions, grouped K/V heads. A family says in its `Dialect` what it reads differently.
//! Without more, a model is autoregressive: row i predicts token i + 1, and there is no mask token.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{HeadShape, NormKind, Rope, RopeScaling};
use crate::config::{AttentionMask, Classes, ConfigJson, DecoderFlags, Family, Mlp, ModelConfig, SamplingDefaults};
use crate::error::Result;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "llama",
    model_type: "llama",
    architectures: &["LlamaForCausalLM"],
    classes: Classes::Published,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// What families of the layout read differently.
pub(in crate::model) struct Dialect {
    /// Width of a head where `head_dim` is absent; `None` shares the hidden width among the heads.
    pub head_dim: Option<usize>,
    /// Whether q, k and v, and the projection after attention, have biases.
    pub biases: fn(&ConfigJson) -> Result<(bool, bool)>,
    /// Whether the heads of q and k are normed.
    pub qk_norm: fn(&ConfigJson) -> Result<bool>,
    /// Width of dense MLPs; 0 where every layer may have experts.
    pub mlp_dim: fn(&ConfigJson) -> Result<usize>,
    pub mlp_bias: fn(&ConfigJson) -> Result<bool>,
    /// Epsilon of the norms where `rms_norm_eps` is absent.
    pub norm_eps: f32,
    /// The part of each head that is rotated where `partial_rotary_factor` is absent; `None` where
    /// whole heads are rotated.
    pub rotary_factor: Option<f32>,
    pub window: Window,
}

/// Which layers have attention that ends some positions back.
pub(in crate::model) enum Window {
    /// None, and `layer_types` is not read.
    Ignored,
    /// None.
    Never,
    /// All, and the window where `sliding_window` is absent.
    Always(usize),
    /// Where `use_sliding_window` says so: those of `layer_types`, or from `max_window_layers` on.
    Some,
    /// All, where `use_sliding_window` says so.
    All,
}

/// Llama's own, where others begin.
pub(in crate::model) const DIALECT: Dialect = Dialect {
    head_dim: None,
    biases: attention_bias,
    qk_norm: |_| Ok(false),
    mlp_dim: |keys| keys.size("intermediate_size", 1 << 20),
    mlp_bias: |keys| keys.flag("mlp_bias", false),
    norm_eps: 1e-6,
    rotary_factor: None,
    window: Window::Ignored,
};

/// What other families than Llama have in common.
pub(in crate::model) const REQUIRED_KV_HEADS: Dialect = Dialect { mlp_bias: |_| Ok(false), window: Window::Never, ..DIALECT };

/// One key for all projections of attention.
pub(in crate::model) fn attention_bias(keys: &ConfigJson) -> Result<(bool, bool)> {
    let bias = keys.flag("attention_bias", false)?;
    Ok((bias, bias))
}

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    read(dir, keys, &FAMILY, &DIALECT)
}

/// Reads the published keys with the defaults of the published configuration classes.
pub(in crate::model) fn read(dir: &Path, keys: &ConfigJson, family: &'static Family, dialect: &Dialect) -> Result<ModelConfig> {
    let vocab_size = keys.size("vocab_size", 1 << 24)?;
    let hidden_dim = keys.size("hidden_size", 1 << 16)?;
    let num_layers = keys.size("num_hidden_layers", 1 << 10)?;
    let num_heads = keys.size("num_attention_heads", 1 << 12)?;
    // Without the key every query head has its own K/V head; shapes show where a class has another
    // default.
    let num_kv_heads = keys.optional_size("num_key_value_heads", 1 << 12)?.unwrap_or(num_heads);
    let head_dim = match keys.optional_size("head_dim", 1 << 12)?.or(dialect.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_dim.is_multiple_of(num_heads) => hidden_dim / num_heads,
        None => {
            return Err(keys.error(format!("hidden_size {hidden_dim} over num_attention_heads {num_heads}: expected a whole head width")));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.error(format!("head width {head_dim}: expected an even number, positions rotate pairs")));
    }
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.error(format!("num_attention_heads {num_heads}: expected a multiple of num_key_value_heads {num_kv_heads}")));
    }
    // Two names of one function.
    if let Some(act) = keys.text("hidden_act")?.filter(|act| !["silu", "swish"].contains(act)) {
        return Err(keys.error(format!("key `hidden_act`: expected silu, found {act}")));
    }
    let model_length = keys.size("max_position_embeddings", 1 << 24)?;
    let (qkv_bias, attn_out_bias) = (dialect.biases)(keys)?;
    let qk_norm = (dialect.qk_norm)(keys)?;
    let mlp_dim = (dialect.mlp_dim)(keys)?;
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
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(dialect.norm_eps),
        rope: Rope { width: rotary_dim(keys, dialect, head_dim)?, ..rope(keys, dialect, model_length)? },
        switches: DecoderFlags {
            norm: NormKind::Rms,
            mlp: Mlp::SwiGlu,
            qkv_bias,
            attn_out_bias,
            mlp_bias: (dialect.mlp_bias)(keys)?,
            head_bias: false,
            qk_norm,
            tied_head: keys.flag("tie_word_embeddings", false)?,
            learned_positions: false,
        },
        model_length,
        sliding_window: sliding_window(keys, dialect, num_layers, model_length)?,
        attention: AttentionMask::Causal,
        shift: false,
        cond_dim: None,
        mask_id: None,
        // Texts of models without a BOS of their own are scored after an end of text, as their
        // training joined documents.
        bos_id: keys.first_token("bos_token_id", vocab_size)?.or(eos_id),
        eos_id,
        stop_ids: Vec::new(),
        pad_id: keys.first_token("pad_token_id", vocab_size)?,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    })
}

/// Rotary positions: `rope_parameters` with everything, or `rope_theta` beside an optional
/// `rope_scaling`.
pub(in crate::model) fn rope(keys: &ConfigJson, dialect: &Dialect, model_length: usize) -> Result<Rope> {
    let theta = keys.number("rope_theta")?;
    let full = |keys: &ConfigJson| match keys.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 && dialect.rotary_factor.is_none() => {
            let what =
                format!("key `partial_rotary_factor`: expected 1, found {factor}; partly rotated heads are LLaDA2's and LLaDA-MoE's alone");
            Err(keys.error(what))
        }
        _ => Ok(()),
    };
    full(keys)?;
    let Some(object) = rope_object(keys)? else { return Ok(Rope::plain(theta.unwrap_or(10_000.0))) };
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

/// `rope_scaling`, or `rope_parameters` as transformers 5 writes it. The published classes let the
/// older key win where both are there.
fn rope_object<'a>(keys: &'a ConfigJson) -> Result<Option<ConfigJson<'a>>> {
    let object = match keys.object("rope_scaling.")?.filter(|object| !object.is_empty()) {
        Some(object) => Some(object),
        None => keys.object("rope_parameters.")?.filter(|object| !object.is_empty()),
    };
    let differ = || keys.error("rotary positions that differ between layers (`rope_parameters` holds objects) are not supported");
    object.map(|object| object.shared().ok_or_else(differ)).transpose()
}

/// Elements of a head that are rotated, where that is not the whole head. What `rope_parameters`
/// says wins, as for `rope_theta`.
fn rotary_dim(keys: &ConfigJson, dialect: &Dialect, head_dim: usize) -> Result<Option<usize>> {
    let Some(default) = dialect.rotary_factor else { return Ok(None) };
    let nested = match rope_object(keys)? {
        Some(object) => object.number("partial_rotary_factor")?,
        None => None,
    };
    let factor = match nested {
        Some(factor) => factor,
        None => keys.number("partial_rotary_factor")?.unwrap_or(default),
    };
    let width = (f64::from(factor) * head_dim as f64) as usize;
    if factor > 1.0 || !width.is_multiple_of(2) {
        let what =
            format!("key `partial_rotary_factor`: {factor} of a head of {head_dim} is {width}: expected an even number, at most the head");
        return Err(keys.error(what));
    }
    Ok(Some(width).filter(|width| *width < head_dim))
}

/// The window of the layers that have one; an error where it is shorter than the model's length, as
/// attention here has none.
fn sliding_window(keys: &ConfigJson, dialect: &Dialect, num_layers: usize, model_length: usize) -> Result<Option<usize>> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    let kinds = if matches!(dialect.window, Window::Ignored) { None } else { keys.texts("layer_types")? };
    if let Some(other) = kinds.iter().flatten().find(|kind| ![FULL, SLIDING].contains(*kind)) {
        return Err(keys.error(format!("key `layer_types`: expected {FULL} or {SLIDING}, found {other}")));
    }
    // RND1's is false. Read only where attention has a window: a size that is not used may be 0.
    let window = || if keys.is_false("sliding_window") { Ok(None) } else { keys.optional_size("sliding_window", 1 << 24) };
    let window = match dialect.window {
        // Null says that there is none.
        Window::Always(_) if keys.is_null("sliding_window") => None,
        Window::Always(default) if !keys.has("sliding_window") => Some(default),
        Window::Always(_) => window()?,
        Window::Some if keys.flag("use_sliding_window", false)? => {
            let sliding = match kinds {
                Some(kinds) => kinds.contains(&SLIDING),
                // Layers before this one see everything.
                None => keys.optional_count("max_window_layers", 1 << 24)?.unwrap_or(28) < num_layers,
            };
            if sliding { window()? } else { None }
        }
        Window::All if keys.flag("use_sliding_window", false)? => window()?,
        _ => None,
    };
    match window {
        Some(window) if window < model_length => Err(keys.error(format!(
            "key `sliding_window`: attention that ends {window} positions back is not supported, the model's length is {model_length}"
        ))),
        window => Ok(window),
    }
}
