//! LLaDA-MoE (arXiv 2509.24389): the Llama layout with norms of the heads of q and k and
//! softmax-routed experts, full attention, row i predicts position i. It shares LLaDA's
//! `model_type` and nothing else.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::json;

use crate::backend::{ExpertShape, RouterScore};
use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig, Moe};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "llada-moe",
    model_type: "llada",
    architectures: &["LLaDAMoEModelLM", "LLaDAMoEModel"],
    classes: Classes::Own,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

const DIALECT: Dialect = Dialect {
    qk_norm: |keys| keys.flag("qk_layernorm", false),
    // Every layer may have experts.
    mlp_dim: |_| Ok(0),
    norm_eps: 1e-5,
    rotary_factor: Some(1.0),
    ..llama::REQUIRED_KV_HEADS
};

/// Reads the published keys. What the configuration class can say and no published checkpoint uses
/// is refused by key.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    for (key, value) in
        [("clip_qkv", json!(null)), ("shared_expert_intermediate_size", json!(null)), ("moe_router_enable_expert_bias", json!(false))]
    {
        keys.only(key, value)?;
    }
    let base = llama::read(dir, keys, &FAMILY, &DIALECT)?;
    let shape = ExpertShape {
        num_experts: keys.size("num_experts", 1 << 16)?,
        top_k: keys.size("num_experts_per_tok", 1 << 16)?,
        hidden_dim: base.hidden_dim,
        expert_dim: keys.size("expert_intermediate_size", 1 << 20)?,
    };
    let frequency = keys.counts("moe_layer_freq", 1)?.unwrap_or_else(|| vec![1; base.num_layers]);
    if frequency.len() != base.num_layers {
        let (found, expected) = (frequency.len(), base.num_layers);
        return Err(keys.error(format!("key `moe_layer_freq`: expected one entry for each of {expected} layers, found {found}")));
    }
    let sparse: Vec<bool> = frequency.into_iter().map(|experts| experts == 1).collect();
    let mlp_dim = if sparse.contains(&false) { keys.size("dense_intermediate_size", 1 << 20)? } else { 0 };
    let score = RouterScore::Softmax { renormalise: false };
    let moe = Some(keys.experts(Moe { shape, score, router_bias: false, shared_dim: None, sparse })?);
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, None)?);
    Ok(ModelConfig { mlp_dim, moe, attention: AttentionMask::Full, mask_id, ..base })
}
