//! What a family tells the registry: its names, its reader of config.json, its tensor layout.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::config::{ConfigJson, Family, ModelConfig};
use crate::error::Result;
use crate::model::llama_layout::Names;

/// A row of the registry's table.
pub(super) struct FamilyEntry {
    pub family: &'static Family,
    /// Reads the family's keys of `config.json` in a directory.
    pub config: fn(&Path, &ConfigJson) -> Result<ModelConfig>,
    pub layout: TensorLayout,
}

/// How the tensors of a checkpoint are named and packed.
#[derive(Clone, Copy)]
pub(super) enum TensorLayout {
    /// `families/bd3lm.rs`.
    Bd3lm,
    /// `families/gpt2.rs`.
    Gpt2,
    /// `llama_layout.rs` under these names.
    Llama(&'static Names),
}
