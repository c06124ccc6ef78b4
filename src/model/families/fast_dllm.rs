//! Fast-dLLM v2 (arXiv 2509.26328): the Qwen2 layout under block-causal attention, with shifted
//! logits. The first position of a block is predicted by the last row of the finished block before
//! it, as in the autoregressive model that the weights were made from.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::{llama, qwen2};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "fast-dllm",
    model_type: "Fast_dLLM_Qwen",
    architectures: &["Fast_dLLM_QwenForCausalLM"],
    classes: Classes::Own,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// MASK as the published sampler has it by default; config.json does not name it.
const MASK_ID: u32 = 151_665;

/// Reads the keys of Qwen2, MASK, and the block length `bd_size` (32 in the published configuration
/// class).
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    let base = llama::read(dir, keys, &FAMILY, &qwen2::DIALECT)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    let (block_len, _) = keys.block_len(dir, &["bd_size", "block_size"], 32)?;
    Ok(ModelConfig { attention: AttentionMask::BlockCausal(block_len), shift: true, mask_id, ..base })
}
