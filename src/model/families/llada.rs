//! LLaDA (arXiv 2502.09992): the Llama layout under names of its own, full attention, row i
//! predicts position i.
//!
//! 8B Base, 8B Instruct and 1.5 share it. The published configuration class can say far more (fused
//! projections, ALiBi, layer groups); what no published checkpoint uses is refused by key.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::json;

use crate::backend::{HeadShape, NormKind, RopeScaling};
use crate::config::{AttentionMask, Classes, ConfigJson, DecoderFlags, Family, Mlp, ModelConfig, SamplingDefaults};
use crate::error::Result;
use crate::model::families::llama;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::{Names, Qkv};

// LLaDA-MoE has the type too: where no class is named, experts tell it apart.
pub static FAMILY: Family = Family {
    name: "llada",
    model_type: "llada",
    architectures: &["LLaDAModelLM"],
    classes: Classes::OwnUnless("num_experts"),
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// `ff_proj` is the gate; a layer's `ff_out` is its down-projection, the one beside the layers is
/// the head.
static NAMES: Names = Names {
    table: "model.transformer.wte.weight",
    layers: "model.transformer.blocks",
    attn_norm: "attn_norm.weight",
    qkv: Qkv::Separate { q: "q_proj", k: "k_proj", v: "v_proj" },
    q_norm: "q_norm.weight",
    k_norm: "k_norm.weight",
    attn_out: "attn_out",
    mlp_norm: "ff_norm.weight",
    gate: "ff_proj",
    up: "up_proj",
    down: "ff_out",
    final_norm: "model.transformer.ln_f.weight",
    head: "model.transformer.ff_out.weight",
};

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    if keys.has("num_experts") {
        return Err(keys.error("key `num_experts`: LLaDA-MoE shares LLaDA's model_type but not its class, LLaDAMoEModelLM"));
    }
    for (key, value) in [
        ("block_type", json!("llama")),
        ("block_group_size", json!(1)),
        ("layer_norm_type", json!("rms")),
        ("layer_norm_with_affine", json!(true)),
        ("activation_type", json!("silu")),
        ("rope", json!(true)),
        ("alibi", json!(false)),
        ("attention_layer_norm", json!(false)),
        ("input_emb_norm", json!(false)),
        ("scale_logits", json!(false)),
        ("include_bias", json!(false)),
        ("bias_for_layer_norm", json!(false)),
    ] {
        keys.only(key, value)?;
    }
    keys.only("clip_qkv", json!(null))?;
    // The table and the head may be padded beyond the tokenizer's ids.
    let vocab_size = keys.optional_size("embedding_size", 1 << 24)?.map_or_else(|| keys.size("vocab_size", 1 << 24), Ok)?;
    let hidden_dim = keys.size("d_model", 1 << 16)?;
    let num_heads = keys.size("n_heads", 1 << 12)?;
    let default = if keys.flag("multi_query_attention", false)? { 1 } else { num_heads };
    let num_kv_heads = keys.optional_size("n_kv_heads", 1 << 12)?.unwrap_or(default);
    if !hidden_dim.is_multiple_of(num_heads) || !(hidden_dim / num_heads).is_multiple_of(2) {
        return Err(keys.error(format!("d_model {hidden_dim} over n_heads {num_heads}: expected an even head width")));
    }
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.error(format!("n_heads {num_heads}: expected a multiple of n_kv_heads {num_kv_heads}")));
    }
    let mlp_dim = match keys.optional_size("mlp_hidden_size", 1 << 20)? {
        Some(width) => width,
        None => keys.optional_size("mlp_ratio", 1 << 6)?.unwrap_or(4) * hidden_dim,
    };
    let model_length = keys.size("max_sequence_length", 1 << 24)?;
    let rope = llama::rope(keys, &llama::DIALECT, model_length)?;
    if rope.scaling != RopeScaling::None {
        return Err(keys.error("key `rope_scaling`: LLaDA's code has no scaled rotary positions"));
    }
    let eos_id = keys.first_token("eos_token_id", vocab_size)?;
    Ok(ModelConfig {
        family: &FAMILY,
        dir: dir.to_path_buf(),
        vocab_size,
        hidden_dim,
        num_layers: keys.size("n_layers", 1 << 10)?,
        heads: HeadShape { num_heads, num_kv_heads, head_dim: hidden_dim / num_heads },
        mlp_dim,
        moe: None,
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-5),
        rope,
        switches: DecoderFlags {
            norm: NormKind::Rms,
            mlp: Mlp::SwiGlu,
            qkv_bias: keys.flag("include_qkv_bias", false)?,
            attn_out_bias: false,
            mlp_bias: false,
            head_bias: false,
            qk_norm: false,
            tied_head: keys.flag("weight_tying", true)?,
            learned_positions: false,
        },
        model_length,
        sliding_window: None,
        attention: AttentionMask::Full,
        shift: false,
        cond_dim: None,
        mask_id: Some(keys.mask_token(dir, vocab_size, None)?),
        bos_id: keys.first_token("bos_token_id", vocab_size)?.or(eos_id),
        eos_id,
        stop_ids: Vec::new(),
        pad_id: keys.first_token("pad_token_id", vocab_size)?,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    })
}
