//! Qwen3 (arXiv 2505.09388): the Llama layout with norms of the heads of q and k.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect, Window};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "qwen3",
    model_type: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    classes: Classes::Published,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

pub(in crate::model) const DIALECT: Dialect =
    Dialect { head_dim: Some(128), qk_norm: |_| Ok(true), window: Window::Some, ..llama::REQUIRED_KV_HEADS };

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    llama::read(dir, keys, &FAMILY, &DIALECT)
}
