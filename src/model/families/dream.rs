//! Dream (arXiv 2508.15487), Dream-Coder and DiffuCoder: the Qwen2 layout under full attention, with shifted logits.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Attention, Family, Keys, ModelConfig};
use crate::error::Result;
use crate::model::families::llama;

/// Reads the keys of Qwen2, and MASK.
pub fn config(dir: &Path, keys: &Keys) -> Result<ModelConfig> {
    let base = llama::config(dir, keys, Family::Qwen2)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, None)?);
    Ok(ModelConfig { family: Family::Dream, attention: Attention::Full, shift: true, mask_id, ..base })
}
