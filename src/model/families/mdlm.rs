//! MDLM (arXiv 2406.07524): the layout of BD3-LM under full attention. Config keys only; weights
//! load through `bd3lm.rs`.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{AttentionMask, Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::bd3lm;
use crate::model::family::{FamilyEntry, TensorLayout};

pub static FAMILY: Family =
    Family { name: "mdlm", model_type: "mdlm", architectures: &["MDLM"], classes: Classes::Any, begins_with_bos: true };

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Bd3lm };

/// Reads the published keys. MDLM checkpoints have no `block_size` and no `cross_attn`, and always
/// carry adaLN.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    bd3lm::shared_config(dir, keys, &FAMILY, AttentionMask::Full)
}
