//! Settings of an engine as JSON, for bindings that name them.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Deserialize;

use super::builder::EngineBuilder;
use crate::error::{Error, Result};

/// Settings as one object; those that are absent or null keep their defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SettingsJson {
    device: Option<String>,
    dtype: Option<String>,
    weights: Option<String>,
    threads: Option<usize>,
    max_sequences: Option<usize>,
    max_rows: Option<usize>,
    max_positions: Option<usize>,
    kv_pages: Option<usize>,
    page_size: Option<usize>,
    tokenizer: Option<PathBuf>,
    models: Option<Vec<PathBuf>>,
    joint: Option<PathBuf>,
}

impl EngineBuilder {
    /// Reads settings from a JSON object: `device` (`"auto"`, `"cpu"`, `"cuda:0"`), `dtype`
    /// (`"f32"`, `"bf16"`), `weights` (`"f32"`, `"bf16"`, `"q8"`, `"q4"`), `threads`,
    /// `max_sequences`, `max_rows`, `max_positions`, `kv_pages` and `page_size`, which mean what
    /// the methods of the same names do; `tokenizer` (the path of a `tokenizer.json`), `models`
    /// (directories, as [`EngineBuilder::add_model`] takes them) and `joint` (a directory, as
    /// [`EngineBuilder::joint_sampler`] takes it).
    ///
    /// Errors: [`Error::Request`] that names the key, what was expected and what was found.
    pub fn json(mut self, text: &str) -> Result<EngineBuilder> {
        let settings: SettingsJson = serde_json::from_str(text).map_err(|e| Error::request(format!("settings: {e}")))?;
        if let Some(device) = settings.device {
            self = self.device(device.parse().map_err(|e| Error::request(format!("device: {e}, found `{device}`")))?);
        }
        if let Some(dtype) = settings.dtype {
            self = self.dtype(dtype.parse()?);
        }
        if let Some(weights) = settings.weights {
            self = self.weights(weights.parse()?);
        }
        type Set = fn(EngineBuilder, usize) -> EngineBuilder;
        let counts: [(Option<usize>, Set); 6] = [
            (settings.threads, EngineBuilder::threads),
            (settings.max_sequences, EngineBuilder::max_sequences),
            (settings.max_rows, EngineBuilder::max_rows),
            (settings.max_positions, EngineBuilder::max_positions),
            (settings.kv_pages, EngineBuilder::kv_pages),
            (settings.page_size, EngineBuilder::page_size),
        ];
        for (count, set) in counts {
            if let Some(count) = count {
                self = set(self, count);
            }
        }
        if let Some(path) = settings.tokenizer {
            self = self.tokenizer_file(path);
        }
        for dir in settings.models.unwrap_or_default() {
            self = self.add_model(dir);
        }
        if let Some(dir) = settings.joint {
            self = self.joint_sampler(dir);
        }
        Ok(self)
    }
}
