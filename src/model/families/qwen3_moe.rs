//! Qwen3-MoE (arXiv 2505.09388), and the diffusion models made from it: SDAR's mixture of experts (arXiv 2510.06303; block-causal) and RND1 (Radical
//! Numerics, 2025; full attention, shifted logits). The Qwen3 layout with softmax-routed experts in the place of MLPs.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{ExpertShape, RouterScore};
use crate::config::{Attention, Family, Keys, ModelConfig, Moe};
use crate::error::Result;
use crate::model::families::{llama, sdar};

/// MASK as RND1's published configuration class has it by default.
const RND1_MASK: u32 = 151_669;

/// Reads the keys of Qwen3-MoE with the defaults of its published configuration class; RND1's own where they differ.
pub fn config(dir: &Path, keys: &Keys, family: Family) -> Result<ModelConfig> {
    let base = llama::config(dir, keys, Family::Qwen3Moe)?;
    let moe = moe(keys, family, &base)?;
    // A checkpoint whose layers all have experts may still name a width of MLPs.
    let mlp_dim = if moe.sparse.iter().all(|sparse| *sparse) { 0 } else { base.mlp_dim };
    let base = ModelConfig { family, mlp_dim, moe: Some(moe), ..base };
    match family {
        Family::SdarMoe => sdar::block_causal(dir, keys, base),
        Family::Rnd1 => {
            let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(RND1_MASK))?);
            Ok(ModelConfig { attention: Attention::Full, shift: true, mask_id, ..base })
        }
        _ => Ok(base),
    }
}

fn moe(keys: &Keys, family: Family, base: &ModelConfig) -> Result<Moe> {
    let num_layers = base.num_layers;
    // The class leaves the chosen weights as they are by default; every published checkpoint says otherwise.
    let score = RouterScore::Softmax { renormalise: keys.flag("norm_topk_prob", family == Family::Rnd1)? };
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
    if family == Family::Rnd1 && sparse.contains(&false) {
        return Err(keys.error("RND1 has experts in every layer: expected no `mlp_only_layers` and a `decoder_sparse_step` of 1"));
    }
    keys.experts(Moe { shape, score, router_bias: false, shared_dim: None, sparse })
}
