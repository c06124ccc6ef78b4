//! Qwen3-MoE (arXiv 2505.09388): the Qwen3 layout with softmax-routed experts in place of MLPs.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{ExpertShape, RouterScore};
use crate::config::{Classes, ConfigJson, Family, ModelConfig, Moe};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect, Window};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "qwen3-moe",
    model_type: "qwen3_moe",
    architectures: &["Qwen3MoeForCausalLM"],
    classes: Classes::Published,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

const DIALECT: Dialect = Dialect {
    qk_norm: |_| Ok(true),
    mlp_dim: |keys| Ok(keys.optional_size("intermediate_size", 1 << 20)?.unwrap_or(6144)),
    window: Window::All,
    ..llama::REQUIRED_KV_HEADS
};

/// Reads the keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    read(dir, keys, &FAMILY, false)
}

/// Those of the family, and of the ones made from it; `renormalise` is their default.
pub(in crate::model) fn read(dir: &Path, keys: &ConfigJson, family: &'static Family, renormalise: bool) -> Result<ModelConfig> {
    let base = llama::read(dir, keys, family, &DIALECT)?;
    let moe = moe(keys, renormalise, &base)?;
    // A checkpoint whose layers all have experts may still name a width of MLPs.
    let mlp_dim = if moe.sparse.iter().all(|sparse| *sparse) { 0 } else { base.mlp_dim };
    Ok(ModelConfig { mlp_dim, moe: Some(moe), ..base })
}

fn moe(keys: &ConfigJson, renormalise: bool, base: &ModelConfig) -> Result<Moe> {
    let num_layers = base.num_layers;
    // The class leaves the chosen weights as they are by default; every published checkpoint says
    // otherwise.
    let score = RouterScore::Softmax { renormalise: keys.flag("norm_topk_prob", renormalise)? };
    // transformers 5 writes the second name.
    let num_experts = match keys.optional_size("num_experts", 1 << 16)? {
        Some(number) => number,
        None => keys.optional_size("num_local_experts", 1 << 16)?.unwrap_or(128),
    };
    let shape = ExpertShape {
        num_experts,
        top_k: keys.optional_size("num_experts_per_tok", 1 << 16)?.unwrap_or(8),
        hidden_dim: base.hidden_dim,
        expert_dim: keys.optional_size("moe_intermediate_size", 1 << 20)?.unwrap_or(768),
    };
    let step = keys.optional_size("decoder_sparse_step", 1 << 10)?.unwrap_or(1);
    let mut sparse: Vec<bool> = (1..=num_layers).map(|layer| layer.is_multiple_of(step)).collect();
    for layer in keys.counts("mlp_only_layers", num_layers - 1)?.unwrap_or_default() {
        sparse[layer] = false;
    }
    keys.experts(Moe { shape, score, router_bias: false, shared_dim: None, sparse })
}
