//! LLaDA2.0 and 2.1 (arXiv 2512.15745) over Ling 2.0's mixture of experts: fused q, k and v, norms
//! of their heads, rotary positions on a part of each head, sigmoid routing limited to groups,
//! shared experts, dense MLPs in the first layers; block-causal attention, row i predicts position
//! i.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::json;

use crate::backend::{ExpertShape, RouterScore};
use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig, Moe};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::{self, Names, Qkv};

pub static FAMILY: Family = Family {
    name: "llada2",
    model_type: "llada2_moe",
    architectures: &["LLaDA2MoeModelLM"],
    classes: Classes::Own,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

static NAMES: Names = Names {
    table: "model.word_embeddings.weight",
    qkv: Qkv::Fused("attention.query_key_value"),
    q_norm: "attention.query_layernorm.weight",
    k_norm: "attention.key_layernorm.weight",
    attn_out: "attention.dense",
    ..llama_layout::NAMES
};

const DIALECT: Dialect = Dialect {
    biases: |keys| Ok((keys.flag("use_qkv_bias", false)?, keys.flag("use_bias", true)?)),
    qk_norm: |keys| keys.flag("use_qk_norm", true),
    // Every layer may have experts.
    mlp_dim: |keys| Ok(keys.optional_size("intermediate_size", 1 << 20)?.unwrap_or(0)),
    norm_eps: 1e-5,
    rotary_factor: Some(0.5),
    ..llama::REQUIRED_KV_HEADS
};

/// Block length and MASK as the published sampler has them; config.json names neither.
const BLOCK_LEN: usize = 32;
const MASK_ID: u32 = 156_895;

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    for (key, value) in [
        ("norm_head", json!(false)),
        ("score_function", json!("sigmoid")),
        ("norm_topk_prob", json!(true)),
        ("use_sliding_window", json!(false)),
    ] {
        keys.only(key, value)?;
    }
    let base = llama::read(dir, keys, &FAMILY, &DIALECT)?;
    let num_layers = base.num_layers;
    let num_experts = keys.optional_size("num_experts", 1 << 16)?.unwrap_or(16);
    let top_k = keys.optional_size("num_experts_per_tok", 1 << 16)?.unwrap_or(2);
    if top_k == 1 {
        return Err(
            keys.error("key `num_experts_per_tok`: expected at least 2, found 1: the published router weighs a single expert otherwise")
        );
    }
    let expert_dim = keys.size("moe_intermediate_size", 1 << 20)?;
    let dense = keys.optional_count("first_k_dense_replace", 1 << 10)?.unwrap_or(0).min(num_layers);
    let scale = keys.number("routed_scaling_factor")?.unwrap_or(2.5);
    let groups = (keys.optional_size("n_group", 1 << 10)?.unwrap_or(8), keys.optional_size("topk_group", 1 << 10)?.unwrap_or(4));
    let shared = keys.optional_count("num_shared_experts", 1 << 10)?.unwrap_or(0);
    let moe = keys.experts(Moe {
        shape: ExpertShape { num_experts, top_k, hidden_dim: base.hidden_dim, expert_dim },
        score: RouterScore::Sigmoid { num_groups: groups.0, top_groups: groups.1, scale },
        router_bias: true,
        shared_dim: (shared > 0).then_some(shared * expert_dim),
        sparse: (0..num_layers).map(|layer| layer >= dense).collect(),
    })?;
    let mlp_dim = if dense == 0 { 0 } else { keys.size("intermediate_size", 1 << 20)? };
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    // All published variants have the sampler's.
    let (block_len, _) = keys.block_len(dir, &["block_size", "block_length"], BLOCK_LEN)?;
    // Published configurations name the end of text as padding alone.
    let eos_id = base.eos_id.or(keys.first_token("pad_token_id", base.vocab_size)?);
    let bos_id = base.bos_id.or(eos_id);
    Ok(ModelConfig { mlp_dim, moe: Some(moe), attention: AttentionMask::BlockCausal(block_len), mask_id, bos_id, eos_id, ..base })
}
