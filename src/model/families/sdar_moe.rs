//! SDAR's mixture of experts (arXiv 2510.06303): Qwen3-MoE under block-causal attention.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::{qwen3_moe, sdar};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "sdar-moe",
    model_type: "sdar_moe",
    architectures: &["SDARMoeForCausalLM"],
    classes: Classes::Own,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

/// Reads the keys of Qwen3-MoE, and those that SDAR adds.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    sdar::block_causal(dir, keys, qwen3_moe::read(dir, keys, &FAMILY, false)?)
}
