//! Mistral (arXiv 2310.06825): the Llama layout without biases, with a window of attention.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{Classes, ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::families::llama::{self, Dialect, Window};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout::NAMES;

pub static FAMILY: Family = Family {
    name: "mistral",
    model_type: "mistral",
    architectures: &["MistralForCausalLM"],
    classes: Classes::Published,
    begins_with_bos: false,
};

pub(in crate::model) static ENTRY: FamilyEntry = FamilyEntry { family: &FAMILY, config, layout: TensorLayout::Llama(&NAMES) };

const DIALECT: Dialect = Dialect { biases: |_| Ok((false, false)), window: Window::Always(4096), ..llama::REQUIRED_KV_HEADS };

/// Reads the published keys with the defaults of the published configuration class.
fn config(dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
    llama::read(dir, keys, &FAMILY, &DIALECT)
}
