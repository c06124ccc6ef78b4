//! Stable-DiffCoder (ByteDance Seed, 2026): the Llama layout under block-causal attention, row i answers position i.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Attention, Family, Keys, ModelConfig};
use crate::error::Result;
use crate::model::families::llama;

/// Block length and MASK as the published sampler has them by default; config.json names neither.
const BLOCK_LEN: usize = 4;
const MASK_ID: u32 = 5;

/// Reads the keys of Llama, and MASK.
pub fn config(dir: &Path, keys: &Keys) -> Result<ModelConfig> {
    let base = llama::config(dir, keys, Family::Llama)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, Some(MASK_ID))?);
    Ok(ModelConfig { family: Family::StableDiffcoder, attention: Attention::BlockCausal(BLOCK_LEN), mask_id, ..base })
}
