//! RND1 (Radical Numerics, 2025): Qwen3-MoE under full attention, with shifted logits.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::qwen3_moe;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family =
    Family { name: "rnd1", model_type: "rnd1", architectures: &["RND1LM"], classes: Classes::Own, begins_with_bos: false };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// MASK as the published configuration class has it by default.
const MASK_ID: u32 = 151_669;

/// Reads the keys of Qwen3-MoE with the defaults of the published configuration class, and MASK.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    let base = qwen3_moe::read(dir, keys, &FAMILY, true)?;
    if base.moe.as_ref().is_some_and(|moe| moe.sparse.contains(&false)) {
        return Err(keys.error("RND1 has experts in every layer: expected no `mlp_only_layers` and a `decoder_sparse_step` of 1"));
    }
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    Ok(ModelConfig { attention: AttentionMask::Full, shift: true, mask_id, ..base })
}
