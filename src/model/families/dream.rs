//! Dream (arXiv 2508.15487), Dream-Coder and DiffuCoder: the Qwen2 layout under full attention,
//! with shifted logits.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::{llama, qwen2};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family =
    Family { name: "dream", model_type: "Dream", architectures: &["DreamModel"], classes: Classes::Own, begins_with_bos: false };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// Reads the keys of Qwen2, and MASK.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    let base = llama::read(dir, keys, &FAMILY, &qwen2::DIALECT)?;
    let mask_id = Some(keys.mask_token(dir, base.vocab_size, None)?);
    Ok(ModelConfig { attention: AttentionMask::Full, shift: true, mask_id, ..base })
}
