//! Qwen2 (arXiv 2407.10671): the Llama layout with biases of q, k and v.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect, Window};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "qwen2",
    model_type: "qwen2",
    architectures: &["Qwen2ForCausalLM"],
    classes: Classes::Published,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

pub(in crate::model) const DIALECT: Dialect = Dialect { biases: |_| Ok((true, false)), window: Window::Some, ..llama::REQUIRED_KV_HEADS };

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    llama::read(dir, keys, &FAMILY, &DIALECT)
}
