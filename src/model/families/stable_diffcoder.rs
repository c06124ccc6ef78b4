//! Stable-DiffCoder (ByteDance Seed, 2026): the Llama layout under block-causal attention, row i
//! predicts position i.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::llama;
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

// Llama's type; the class tells them apart.
pub static FAMILY: Family = Family {
    name: "stable-diffcoder",
    model_type: "llama",
    architectures: &["StableDiffcoderForCausalLM"],
    classes: Classes::Own,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// Block length and MASK as the published sampler has them by default; config.json names neither.
const BLOCK_LEN: usize = 4;
const MASK_ID: u32 = 5;

/// Reads the keys of Llama, and MASK.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    let base = llama::read(dir, keys, &FAMILY, &llama::DIALECT)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    let (block_len, _) = keys.block_len(dir, &["block_size", "block_length"], BLOCK_LEN)?;
    Ok(ModelConfig { attention: AttentionMask::BlockCausal(block_len), mask_id, ..base })
}
