//! SDAR (arXiv 2510.06303) and TraDo: the Qwen3 layout under block-causal attention, row i predicts
//! position i.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::{llama, qwen3};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family =
    Family { name: "sdar", model_type: "sdar", architectures: &["SDARForCausalLM"], classes: Classes::Own, begins_with_bos: false };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// Block length of the checkpoints whose names give none (`-b32`); it is not in their config.json.
const BLOCK_LEN: usize = 4;

/// Reads the keys of Qwen3, MASK, and the block length that derivatives add.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    block_causal(dir, keys, llama::read(dir, keys, &FAMILY, &qwen3::DIALECT)?)
}

/// SDAR over any Qwen3 decoder.
pub(in crate::model) fn block_causal(dir: &Path, keys: &ConfigJson, base: ModelConfig) -> Result<ModelConfig> {
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, None)?);
    let (block_len, guessed_block_len) = keys.block_len(dir, &["block_size", "block_length", "bd_size"], BLOCK_LEN)?;
    Ok(ModelConfig { guessed_block_len, attention: AttentionMask::BlockCausal(block_len), mask_id, ..base })
}
