//! Facts of a checkpoint: [`ModelConfig`], and the reader of `config.json` that fills it.
//!
//! Which keys a family has, and what they mean, is the family's file under `model/families/`; this
//! file knows none of them. Checkpoints are hostile: every size is bounded before it is used.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::backend::{ExpertShape, HeadShape, NormKind, Rope, RouterScore};
use crate::error::{Error, Result};
use crate::plan::{LogitsRows, Visibility};
use crate::sampling::{valid_temperature, valid_top_p};

/// How far beyond the trained length positions may go before a request is refused: rotary angles
/// further out were never seen.
pub const MAX_STRETCH: usize = 4;

/// How tokenizers spell the token that hides another, in the order in which they are looked for.
const MASK_SPELLINGS: [&str; 6] = ["<|MASK|>", "<|mask|>", "|<MASK>|", "<|mdm_mask|>", "[MASK]", "<mask>"];

/// A family of checkpoints as their configurations name it.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// In reports, and in the configuration of a joint sampler.
    pub name: &'static str,
    /// What `model_type` says.
    pub model_type: &'static str,
    /// The classes that `architectures` may name, the published one first.
    pub architectures: &'static [&'static str],
    pub classes: Classes,
}

/// What the class of a checkpoint says about its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Classes {
    /// Nothing: the type decides where it is there.
    Any,
    /// Diffusion models and classifiers are published under the type of the decoder that they were
    /// made from: no other class, and no code beside the weights.
    Published,
    /// A class and code of its own over the decoder of another family, whose type may stay: the
    /// class decides.
    Own,
    /// As `Own`, but where no class is named, a checkpoint with this key is of a family that shares
    /// the type.
    OwnUnless(&'static str),
}

impl Family {
    /// Published under a class of its own over another family's decoder, with its own code beside
    /// the weights.
    pub fn is_adapted(&self) -> bool {
        matches!(self.classes, Classes::Own | Classes::OwnUnless(_))
    }
}

/// The visibility a model was trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionMask {
    /// Block diffusion; the published block length.
    BlockCausal(usize),
    /// Masked diffusion over the whole sequence.
    Full,
    /// Autoregressive: row i predicts token i + 1. A judge, not a generator.
    Causal,
}

impl AttentionMask {
    /// Which keys a query saw in training.
    pub fn visibility(self) -> Visibility {
        match self {
            AttentionMask::BlockCausal(block_len) => Visibility::BlockCausal(block_len),
            AttentionMask::Full => Visibility::Full,
            AttentionMask::Causal => Visibility::BlockCausal(1),
        }
    }
}

/// The two layers between attentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// `down(gelu_tanh(up x))`
    Gelu,
    /// `down(silu(gate x) * up x)`
    SwiGlu,
}

/// What families do differently inside the one decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderFlags {
    pub norm: NormKind,
    pub mlp: Mlp,
    /// Biases of the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias of the projection after attention.
    pub attn_out_bias: bool,
    /// Biases of all of the MLP's projections.
    pub mlp_bias: bool,
    pub head_bias: bool,
    /// RMS norm of every head of q and k before the rotation.
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tied_head: bool,
    /// Positions are rows of a table, as many as the model's length, added to the embedding;
    /// nothing is rotated.
    pub learned_positions: bool,
}

/// Experts in the place of MLPs.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    pub shape: ExpertShape,
    pub score: RouterScore,
    /// The router's choice has a bias of (E), a tensor of its own.
    pub router_bias: bool,
    /// Width between gate and down of the MLP that every row goes through beside its experts.
    pub shared_dim: Option<usize>,
    /// For each layer, whether it has experts.
    pub sparse: Vec<bool>,
}

/// One decoder's shape and habits. Field names follow the checkpoint's where they have one.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: &'static Family,
    /// Directory the checkpoint lies in.
    pub dir: PathBuf,
    pub vocab_size: usize,
    pub hidden_dim: usize,
    pub num_layers: usize,
    pub heads: HeadShape,
    /// F, the width between the MLP's products; 0 where every layer has experts.
    pub mlp_dim: usize,
    pub moe: Option<Moe>,
    pub norm_eps: f32,
    pub rope: Rope,
    pub switches: DecoderFlags,
    /// Positions the model was trained on.
    pub model_length: usize,
    /// Attention of the checkpoint ends this many positions back; here it does not, so no longer
    /// sequence is served.
    pub sliding_window: Option<usize>,
    pub attention: AttentionMask,
    /// Logits are shifted, as in the autoregressive model that the weights were adapted from:
    /// [`LogitsRows::Before`]. Autoregressive checkpoints do not say so here: scoring knows.
    pub shift: bool,
    /// Width of the conditioning vector whose adaLN modulation is folded at load; `None` without
    /// adaLN.
    pub cond_dim: Option<usize>,
    /// None in autoregressive checkpoints, which have no such token.
    pub mask_id: Option<u32>,
    /// The token before the first one of a text; where a checkpoint names no BOS, its end of
    /// text.
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
    /// Every id that ends a text, ascending: `eos_id`, and what lists in config.json and
    /// generation_config.json add.
    pub stop_ids: Vec<u32>,
    pub pad_id: Option<u32>,
    /// What generation_config.json recommends.
    pub sampling: SamplingDefaults,
}

/// Recommended sampling of a checkpoint: keys `temperature`, `top_p` and `top_k` of its
/// generation_config.json.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 keeps everything.
    pub top_k: Option<u32>,
}

impl ModelConfig {
    /// Which row of a forward holds the logits of a position.
    pub fn logits_rows(&self) -> LogitsRows {
        self.shift.into()
    }

    /// Adds what every family has in common: every id that ends a text, and recommended sampling.
    pub fn complete(mut self, dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
        self.stop_ids = self.eos_id.into_iter().collect();
        self.stop_ids.extend(keys.tokens("eos_token_id", self.vocab_size)?);
        self.read_generation(dir)?;
        self.stop_ids.sort_unstable();
        self.stop_ids.dedup();
        Ok(self)
    }

    /// What `dir/generation_config.json` adds, where there is one: chat models name there what ends
    /// a turn.
    fn read_generation(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join("generation_config.json");
        let Ok(text) = std::fs::read_to_string(&path) else {
            return Ok(());
        };
        let map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::config(&path, format!("expected a JSON object: {e}")))?;
        let keys = ConfigJson { path: &path, map: &map, parent: "" };
        self.stop_ids.extend(keys.tokens("eos_token_id", self.vocab_size)?);
        self.sampling = SamplingDefaults {
            temperature: keys.checked("temperature", valid_temperature, "a finite number of at least 0")?,
            top_p: keys.checked("top_p", valid_top_p, "a number above 0, at most 1")?,
            top_k: keys.optional_count("top_k", u32::MAX as usize)?.map(|k| k as u32),
        };
        Ok(())
    }

    /// Positions served at most.
    pub fn max_len(&self) -> usize {
        // A table of positions cannot be stretched.
        let stretch = if self.switches.learned_positions { 1 } else { MAX_STRETCH };
        self.model_length.saturating_mul(stretch).min(self.sliding_window.unwrap_or(usize::MAX))
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

    /// The id before the first token of a text.
    pub fn first_id(&self) -> Result<u32> {
        let what = "neither `bos_token_id` nor `eos_token_id`: no token stands before the first of a text";
        self.bos_id.ok_or_else(|| Error::config(&self.dir.join("config.json"), what))
    }

    /// The id that hides a token, or the news that this model cannot fill masks.
    pub fn masking(&self) -> Result<u32> {
        let what = "this checkpoint is autoregressive, it can score but not generate by diffusion";
        self.mask_id
            .filter(|_| self.attention != AttentionMask::Causal)
            .ok_or_else(|| Error::request(format!("{}: {what}", self.dir.display())))
    }

    /// The experts of a layer, where it has them.
    pub fn experts(&self, layer: usize) -> Option<&Moe> {
        self.moe.as_ref().filter(|moe| moe.sparse[layer])
    }

    /// Widest row between the products of any dense MLP, shared experts included.
    pub fn widest_mlp(&self) -> usize {
        self.mlp_dim.max(self.moe.as_ref().and_then(|moe| moe.shared_dim).unwrap_or(0))
    }

    /// K/V bytes per token over all layers.
    pub fn kv_bytes_per_token(&self, element_bytes: usize) -> usize {
        2 * self.num_layers * self.heads.num_kv_heads * self.heads.head_dim * element_bytes
    }
}

/// `config.json` with typed access; errors name the file and the key.
pub struct ConfigJson<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// Where the object is a value itself: its key and a dot.
    parent: &'static str,
}

impl ConfigJson<'_> {
    /// What `read` makes of `dir/config.json`.
    pub fn read<T>(dir: &Path, read: impl FnOnce(&ConfigJson) -> Result<T>) -> Result<T> {
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
        read(&ConfigJson { path: &path, map: &map, parent: "" })
    }

    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::config(self.path, what)
    }

    /// What `model_type` says, empty where it is absent.
    pub fn model_type(&self) -> &str {
        self.map.get("model_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The classes that `architectures` names.
    pub fn architectures(&self) -> Vec<&str> {
        let list = self.map.get("architectures").and_then(Value::as_array);
        list.map(|list| list.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
    }

    /// Whether the checkpoint brings code of its own.
    pub fn has_code(&self) -> bool {
        self.get("auto_map").is_some()
    }

    /// The key as errors name it.
    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.parent)
    }

    /// Whether the key is there, if only as null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Whether any value is an object itself.
    pub fn is_nested(&self) -> bool {
        self.map.values().any(Value::is_object)
    }

    /// Whether the value is false, which some configurations say where others leave a number out.
    pub fn is_false(&self, key: &str) -> bool {
        self.get(key) == Some(&Value::Bool(false))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A required size, from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .ok_or_else(|| self.error(format!("key `{}` is missing; expected a number from 1 to {max}", self.name(key))))
    }

    /// An optional size, from 1 to `max`.
    pub fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.whole(key, 1, max)
    }

    /// An optional count, from 0 to `max`.
    pub fn optional_count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.whole(key, 0, max)
    }

    fn whole(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| (min..=max).contains(n))
                    .ok_or_else(|| self.error(format!("key `{}`: expected a number from {min} to {max}, found {v}", self.name(key))))
            })
            .transpose()
    }

    /// The key is absent, null or the one value that is supported.
    pub fn only(&self, key: &str, supported: Value) -> Result<()> {
        match self.get(key) {
            Some(found) if *found != supported => {
                Err(self.error(format!("key `{}`: expected {supported}, found {found}: nothing else is supported", self.name(key))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses experts that no router can choose among, or that are too large to exist.
    pub fn experts(&self, moe: Moe) -> Result<Moe> {
        moe.shape.check(moe.score).map_err(|what| self.error(what))?;
        Ok(moe)
    }

    /// An optional list of numbers from 0 to `max`.
    pub fn counts(&self, key: &str, max: usize) -> Result<Option<Vec<usize>>> {
        let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= max);
        self.get(key)
            .map(|v| {
                let list: Option<Vec<usize>> = v.as_array().and_then(|list| list.iter().map(number).collect());
                list.ok_or_else(|| self.error(format!("key `{}`: expected a list of numbers up to {max}, found {v}", self.name(key))))
            })
            .transpose()
    }

    /// The id that hides a token: `mask_token_id`, or the added token of `tokenizer.json` that
    /// published tokenizers of such models spell so, or the `published` default of the family's
    /// sampler.
    ///
    /// Errors: none of them, or an id outside the vocabulary.
    pub fn mask_token(&self, dir: &Path, vocab_size: usize, published: Option<u32>) -> Result<u32> {
        if let Some(id) = self.token("mask_token_id", vocab_size)? {
            return Ok(id);
        }
        let path = dir.join("tokenizer.json");
        let added = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let value: Value = serde_json::from_str(&text).map_err(|e| Error::tokenizer(&path, format!("not JSON: {e}")))?;
                value["added_tokens"].as_array().cloned().unwrap_or_default()
            }
            Err(_) => Vec::new(),
        };
        let spelled = |text: &str| added.iter().find(|token| token["content"].as_str() == Some(text)).map(|token| &token["id"]);
        match MASK_SPELLINGS.into_iter().find_map(spelled) {
            Some(id) => id.as_u64().filter(|id| *id < vocab_size as u64).map(|id| id as u32).ok_or_else(|| {
                Error::tokenizer(&path, format!("the mask token has id {id}: expected a token id below vocab_size {vocab_size}"))
            }),
            None => published.filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
                self.error(format!(
                "key `mask_token_id` is missing, and tokenizer.json adds no token spelled {}: add the key with the id that hides a token",
                MASK_SPELLINGS.join(", ")
            ))
            }),
        }
    }

    /// A boolean with the default of the published configuration class.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key)
            .map_or(Ok(default), |v| v.as_bool().ok_or_else(|| self.error(format!("key `{key}`: expected true or false, found {v}"))))
    }

    /// An optional number above 0 that f32 holds.
    pub fn number(&self, key: &str) -> Result<Option<f32>> {
        self.get(key)
            .map(|v| {
                v.as_f64()
                    .map(|n| n as f32)
                    .filter(|n| n.is_finite() && *n > 0.0)
                    .ok_or_else(|| self.error(format!("key `{}`: expected a number above 0, found {v}", self.name(key))))
            })
            .transpose()
    }

    /// An optional text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key)
            .map(|v| v.as_str().ok_or_else(|| self.error(format!("key `{}`: expected a text, found {v}", self.name(key)))))
            .transpose()
    }

    /// An optional list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.get(key)
            .map(|v| {
                let list: Option<Vec<&str>> = v.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
                list.ok_or_else(|| self.error(format!("key `{}`: expected a list of texts, found {v}", self.name(key))))
            })
            .transpose()
    }

    /// An optional object, none where it is false; `dotted` is its key and a dot.
    pub fn object(&self, dotted: &'static str) -> Result<Option<ConfigJson<'_>>> {
        let key = dotted.trim_end_matches('.');
        self.get(key)
            .filter(|v| **v != Value::Bool(false))
            .map(|v| match v {
                Value::Object(map) => Ok(ConfigJson { path: self.path, map, parent: dotted }),
                _ => Err(self.error(format!("key `{key}`: expected an object, found {v}"))),
            })
            .transpose()
    }

    /// An optional token id below `vocab_size`; of a list, the first.
    pub fn first_token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        match self.get(key) {
            Some(Value::Array(list)) => match list.first() {
                Some(first) => self.token_id(key, first, vocab_size).map(Some),
                None => Ok(None),
            },
            _ => self.token(key, vocab_size),
        }
    }

    /// Token ids below `vocab_size`: one, a list, or none.
    fn tokens(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|id| self.token_id(key, id, vocab_size)).collect(),
            Some(id) => Ok(vec![self.token_id(key, id, vocab_size)?]),
        }
    }

    /// An optional number that `valid` accepts.
    fn checked(&self, key: &str, valid: impl Fn(f32) -> bool, expected: &str) -> Result<Option<f32>> {
        let read = |v: &Value| {
            let number = v.as_f64().map(|n| n as f32).filter(|n| valid(*n));
            number.ok_or_else(|| self.error(format!("key `{}`: expected {expected}, found {v}", self.name(key))))
        };
        self.get(key).map(read).transpose()
    }

    /// An optional token id below `vocab_size`.
    pub fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        self.get(key).map(|v| self.token_id(key, v, vocab_size)).transpose()
    }

    fn token_id(&self, key: &str, value: &Value, vocab_size: usize) -> Result<u32> {
        let id = value.as_u64().filter(|id| *id < vocab_size as u64).map(|id| id as u32);
        id.ok_or_else(|| self.error(format!("key `{}`: expected a token id below vocab_size {vocab_size}, found {value}", self.name(key))))
    }
}
