//! Owns the facts of a checkpoint: `config.json` read into a validated [`ModelConfig`].
//!
//! Which keys a family has, and what they mean, is the family's file under `model/`; this room detects the family, reads
//! keys with types and ranges, and holds the result. Checkpoints are hostile: every size is bounded before it is used.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::backend::HeadShape;
use crate::error::{Error, Result};
use crate::model::{bd3lm, mdlm};

/// How far beyond the trained length positions may go before a request is refused: rotary angles further out were never seen.
pub const MAX_STRETCH: usize = 4;

/// Checkpoint families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bd3lm,
    Mdlm,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Family::Bd3lm => "bd3lm",
            Family::Mdlm => "mdlm",
        }
    }
}

/// The visibility a model was trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Block diffusion; the published block length.
    BlockCausal(usize),
    /// Masked diffusion over the whole sequence.
    Full,
    /// Autoregressive: row i predicts token i + 1. A judge, not a generator.
    Causal,
}

/// One decoder's shape and habits. Field names follow the checkpoint's where they have one.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// Directory the checkpoint lies in.
    pub dir: PathBuf,
    pub vocab_size: usize,
    pub hidden_dim: usize,
    pub num_layers: usize,
    pub heads: HeadShape,
    pub mlp_dim: usize,
    pub norm_eps: f32,
    pub rope_base: f32,
    /// Positions the model was trained on.
    pub model_length: usize,
    pub attention: Attention,
    /// Width of the conditioning vector whose adaLN modulation is folded at load; `None` without adaLN.
    pub cond_dim: Option<usize>,
    pub mask_id: u32,
    pub bos_id: u32,
    pub eos_id: u32,
    pub pad_id: Option<u32>,
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    pub fn load(dir: &Path) -> Result<ModelConfig> {
        let path = dir.join("config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(_) if !dir.is_dir() => return Err(Error::config(dir, "no such model directory")),
            Err(error) => return Err(Error::config(&path, format!("cannot read the model's configuration: {error}"))),
        };
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::config(&path, format!("not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::config(&path, "expected a JSON object"));
        };
        let keys = Keys { path: &path, map: &map };
        match keys.family()? {
            Family::Bd3lm => bd3lm::config(dir, &keys),
            Family::Mdlm => mdlm::config(dir, &keys),
        }
    }

    /// Positions served at most.
    pub fn max_len(&self) -> usize {
        self.model_length.saturating_mul(MAX_STRETCH)
    }

    /// Refuses sequences that are longer than this model is served with.
    pub fn check_len(&self, len: usize) -> Result<()> {
        if len > self.max_len() {
            let (trained, most) = (self.model_length, self.max_len());
            let what =
                format!("{len} positions asked for (prompt and --length): the model was trained on {trained}, at most {most} are served");
            return Err(Error::request(what));
        }
        Ok(())
    }

    /// K/V bytes per token over all layers.
    pub fn kv_bytes_per_token(&self, element_bytes: usize) -> usize {
        2 * self.num_layers * self.heads.num_kv_heads * self.heads.head_dim * element_bytes
    }
}

/// `config.json` with typed access; errors name the file and the key.
pub struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::config(self.path, what)
    }

    fn family(&self) -> Result<Family> {
        let model_type = self.map.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let architectures: Vec<&str> = self
            .map
            .get("architectures")
            .and_then(Value::as_array)
            .map(|a| a.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let known = [(Family::Bd3lm, "bd3lm", "BD3LM"), (Family::Mdlm, "mdlm", "MDLM")];
        known.iter().find(|(_, t, a)| model_type == *t || (model_type.is_empty() && architectures.contains(a))).map(|k| k.0).ok_or_else(|| {
            self.error(format!("model_type `{model_type}`, architectures {architectures:?}: not a supported family; supported: bd3lm (BD3LM), mdlm (MDLM)"))
        })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A required size, from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?.ok_or_else(|| self.error(format!("key `{key}` is missing; expected a number from 1 to {max}")))
    }

    /// An optional size, from 1 to `max`.
    pub fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| (1..=max).contains(n))
                    .ok_or_else(|| self.error(format!("key `{key}`: expected a number from 1 to {max}, found {v}")))
            })
            .transpose()
    }

    /// A boolean with the default of the published configuration class.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key)
            .map_or(Ok(default), |v| v.as_bool().ok_or_else(|| self.error(format!("key `{key}`: expected true or false, found {v}"))))
    }

    /// An optional token id below `vocab_size`.
    pub fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .filter(|id| *id < vocab_size as u64)
                    .map(|id| id as u32)
                    .ok_or_else(|| self.error(format!("key `{key}`: expected a token id below vocab_size {vocab_size}, found {v}")))
            })
            .transpose()
    }
}
