//! Fast-dLLM v2 (arXiv 2509.26328): the Qwen2 layout under block-causal attention, with shifted logits. The first position of a block is
//! answered by the last row of the finished block before it, as in the autoregressive model that the weights were made from.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Attention, Family, Keys, ModelConfig};
use crate::error::Result;
use crate::model::families::llama;

/// MASK as the published sampler has it by default; config.json does not name it.
const MASK_ID: u32 = 151_665;

/// Reads the keys of Qwen2, MASK, and the block length `bd_size` (32 in the published configuration class).
pub fn config(dir: &Path, keys: &Keys) -> Result<ModelConfig> {
    let base = llama::config(dir, keys, Family::Qwen2)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    let block_len = keys.optional_size("bd_size", 1 << 24)?.unwrap_or(32);
    Ok(ModelConfig { family: Family::FastDllm, attention: Attention::BlockCausal(block_len), shift: true, mask_id, ..base })
}
