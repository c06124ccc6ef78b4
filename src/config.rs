//! Facts of a checkpoint: [`ModelConfig`], and the reader of `config.json` that fills it.
//!
//! Which keys a family has, and what they mean, is the family's file under `model/families/`; this
//! file knows none of them. Checkpoints are hostile: every size is bounded before it is used.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::backend::{ExpertShape, HeadShape, NormKind, Rope, RouterScore};
use crate::error::{Error, Result};
use crate::gguf;
use crate::input_file::{self, MAX_JSON_BYTES};
use crate::plan::{LogitsRows, Visibility};
use crate::sampling::{valid_temperature, valid_top_p};
use crate::tokenizer::{self, AddedToken, MASK_SPELLINGS, Tokenizer};

/// How far beyond the trained length positions may go before a request is refused: rotary angles
/// further out were never seen.
pub const MAX_STRETCH: usize = 4;

/// What `quantization_config` calls the weights that `redraft quantize` writes.
pub const QUANT_METHOD: &str = "redraft";

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
    /// The family's own script puts BOS before a text, whatever the tokenizer says.
    pub begins_with_bos: bool,
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
    /// Autoregressive: row i predicts token i + 1. It writes from left to right, one token a
    /// forward, and judges texts.
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
    /// Logits of a diffusion model are shifted, as in the autoregressive model that its weights
    /// were adapted from. Those of autoregressive checkpoints always are:
    /// [`ModelConfig::logits_rows`].
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
    /// generation_config.json, and the `eos_token` of tokenizer_config.json add.
    pub stop_ids: Vec<u32>,
    /// Padding that does not end a text: never drawn.
    pub pad_id: Option<u32>,
    /// What generation_config.json recommends.
    pub sampling: SamplingDefaults,
    /// The block length of [`AttentionMask::BlockCausal`] stands nowhere in the checkpoint: it is
    /// that of the family's published sampler.
    pub guessed_block_len: bool,
    /// What was found in the directory's configuration and passed over, for a user to read: advice
    /// that cannot be followed, and guesses.
    pub warnings: Vec<String>,
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
        (self.shift || self.is_autoregressive()).into()
    }

    /// Adds what every family has in common: every id that ends a text, recommended sampling, and
    /// what was passed over.
    pub fn complete(mut self, dir: &Path, keys: &ConfigJson) -> Result<ModelConfig> {
        self.stop_ids = self.eos_id.into_iter().collect();
        self.stop_ids.extend(keys.tokens("eos_token_id", self.vocab_size)?);
        self.read_generation(dir, keys)?;
        self.stop_ids.extend(tokenizer_eos(dir, self.vocab_size, keys)?);
        self.stop_ids.sort_unstable();
        self.stop_ids.dedup();
        // A model that was trained to end texts with its padding has to be able to write it.
        self.pad_id = self.pad_id.filter(|id| !self.stop_ids.contains(id));
        if self.guessed_block_len
            && let AttentionMask::BlockCausal(len) = self.attention
        {
            let what = format!("no key `block_size`, and no block length in the directory's name: {len} is a guess; add the key");
            keys.warn(what);
        }
        self.warnings = keys.warnings.take();
        Ok(self)
    }

    /// What `dir/generation_config.json` adds, where there is one: chat models name there what ends
    /// a turn. Its sampling is advice: a value that cannot be followed is passed over.
    fn read_generation(&mut self, dir: &Path, config: &ConfigJson) -> Result<()> {
        let Some((path, map)) = json_file(dir, "generation_config.json")? else { return Ok(()) };
        let keys = ConfigJson { path: &path, map: &map, inner: None, parent: "", warnings: config.warnings };
        self.stop_ids.extend(keys.tokens("eos_token_id", self.vocab_size)?);
        self.sampling = SamplingDefaults {
            temperature: keys.advice("temperature", valid_temperature, "a finite number of at least 0"),
            top_p: keys.advice("top_p", valid_top_p, "a number above 0, at most 1"),
            // Other engines say -1 for all of them.
            top_k: match keys.get("top_k").and_then(Value::as_f64) {
                Some(-1.0) => Some(0),
                _ => keys.advice("top_k", |k| k >= 0.0 && k.fract() == 0.0, "a number of tokens").map(|k| k as u32),
            },
        };
        Ok(())
    }

    /// Positions of a text of the trained length that is decoded to the end of its last block.
    pub fn decoded_length(&self) -> usize {
        // Schedules of published samplers have blocks of 32.
        let block_len = if let AttentionMask::BlockCausal(len) = self.attention { len.max(32) } else { 32 };
        if self.mask_id.is_some() { self.model_length.next_multiple_of(block_len).min(self.max_len()) } else { self.model_length }
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
        self.bos_id.ok_or_else(|| Error::config(&config_file(&self.dir), what))
    }

    /// Whether the model predicts each token from those before it alone.
    pub fn is_autoregressive(&self) -> bool {
        self.attention == AttentionMask::Causal
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
///
/// A key that is null is absent. Where the decoder's keys are nested in `text_config`, as
/// transformers 5 writes them for models of several parts, they are found there too.
pub struct ConfigJson<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// Looked at after `map`.
    inner: Option<&'a Map<String, Value>>,
    /// Where the object is a value itself: its key and a dot.
    parent: &'static str,
    warnings: &'a RefCell<Vec<String>>,
}

impl<'a> ConfigJson<'a> {
    /// What `read` makes of `dir/config.json`, or of what a GGUF file has in its place.
    pub fn read<T>(dir: &Path, read: impl FnOnce(&ConfigJson) -> Result<T>) -> Result<T> {
        if let Some(file) = gguf::file_of(dir)? {
            let map = gguf::json(&file, "config.json")?.unwrap_or_default();
            return read(&ConfigJson { path: &file, map: &map, inner: None, parent: "", warnings: &RefCell::default() });
        }
        let path = dir.join("config.json");
        if dir.is_file() || !input_file::exists(&path).unwrap_or(true) {
            return Err(no_config(dir, &path));
        }
        let text = input_file::read_text(&path, MAX_JSON_BYTES)
            .map_err(|e| Error::config(&path, format!("cannot read the model's configuration: {e}")))?;
        let value = input_file::parse_json(&text).map_err(|e| {
            let kind = input_file::looks_like(text.as_bytes()).map_or(String::new(), |kind| format!(": {kind}"));
            Error::config(&path, format!("not JSON{kind}: {e}"))
        })?;
        let Value::Object(map) = value else {
            return Err(Error::config(&path, "expected a JSON object"));
        };
        let inner = map.get("text_config").and_then(Value::as_object);
        let warnings = RefCell::default();
        let keys = ConfigJson { path: &path, map: &map, inner, parent: "", warnings: &warnings };
        keys.refuse_quantised()?;
        read(&keys)
    }

    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::config(self.path, what)
    }

    /// Keeps what was passed over, once, under the name of this file.
    pub fn warn(&self, what: impl AsRef<str>) {
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        let warning = format!("{file}: {}", what.as_ref());
        let mut warnings = self.warnings.borrow_mut();
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    /// Weights in integers or 8-bit floats have scales beside them that are not read here, but for
    /// those of `redraft quantize`.
    fn refuse_quantised(&self) -> Result<()> {
        let ours = |found: &&Value| found.get("quant_method").and_then(Value::as_str) == Some(QUANT_METHOD);
        let quantised = self.get("quantization_config").filter(|v| **v != Value::Bool(false) && !ours(v));
        quantised.map_or(Ok(()), |found| {
            let method = found.get("quant_method").map_or(String::new(), |method| format!(" ({method})"));
            let what = "quantised weights are not supported, expected f32, bf16 or f16 tensors";
            Err(self.error(format!("key `quantization_config`{method}: {what}")))
        })
    }

    /// What `model_type` says, empty where it is absent.
    pub fn model_type(&self) -> &str {
        self.get("model_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The classes that `architectures` names.
    pub fn architectures(&self) -> Vec<&str> {
        let list = self.get("architectures").and_then(Value::as_array);
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

    /// Whether the key has a value.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the key is there and null, for the few whose default is not absence.
    pub fn is_null(&self, key: &str) -> bool {
        self.get(key).is_none() && [Some(self.map), self.inner].into_iter().flatten().any(|map| map.contains_key(key))
    }

    /// Where values are objects themselves, one for each kind of layer: theirs if all are equal,
    /// `None` where they differ.
    pub fn shared(self) -> Option<Self> {
        match self.map.values().find_map(Value::as_object) {
            None => Some(self),
            Some(first) => self.map.values().all(|other| other.as_object() == Some(first)).then_some(ConfigJson { map: first, ..self }),
        }
    }

    /// Whether the object says nothing.
    pub fn is_empty(&self) -> bool {
        self.map.values().all(Value::is_null)
    }

    /// Whether the value is false, which some configurations say where others leave a number out.
    pub fn is_false(&self, key: &str) -> bool {
        self.get(key) == Some(&Value::Bool(false))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        let of = |map: Option<&'a Map<String, Value>>| map?.get(key).filter(|v| !v.is_null());
        of(Some(self.map)).or_else(|| of(self.inner))
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
                whole_number(v)
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
        let number = |v: &Value| whole_number(v).and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= max);
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
        let path = tokenizer::place(dir)?;
        let (added, absent) = added_tokens(dir)?;
        let spelled = |text: &str| added.iter().find(|(_, token)| token.content == text).map(|(id, _)| *id);
        match MASK_SPELLINGS.into_iter().find_map(spelled) {
            Some(id) if (id as usize) < vocab_size => Ok(id),
            Some(id) => {
                let what = format!("the mask token has id {id}: expected a token id below vocab_size {vocab_size}");
                Err(Error::tokenizer(&path, what))
            }
            None => published.filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
                let spellings = MASK_SPELLINGS.join(", ");
                let why = absent.map_or_else(
                    || format!("the tokenizer adds no token spelled {spellings}: add the key with the id that hides a token"),
                    |error| format!("no tokenizer says which token hides another: add the key, or the tokenizer ({error})"),
                );
                self.error(format!("key `mask_token_id` is missing, and {why}"))
            }),
        }
    }

    /// The block length of block-causal attention, and whether it is a guess: what one of `names`
    /// says, or the names of the directory and of `_name_or_path`, or the `published` one.
    ///
    /// Variants of one model are published with their block length in the name alone
    /// (`SDAR-1.7B-Chat-b32`).
    pub fn block_len(&self, dir: &Path, names: &[&str], published: usize) -> Result<(usize, bool)> {
        for name in names {
            if let Some(len) = self.optional_size(name, 1 << 24)? {
                return Ok((len, false));
            }
        }
        let path = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        // The cache of the Hub: models--OWNER--NAME/snapshots/REVISION.
        let repository = path.ancestors().nth(2).filter(|_| path.parent().is_some_and(|parent| parent.ends_with("snapshots")));
        let directories = [Some(dir), Some(&path), repository].into_iter().flatten().filter_map(Path::file_name);
        let mut named = directories.map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>();
        named.extend(
            self.text("_name_or_path").ok().flatten().and_then(|name| name.split('/').rfind(|part| !part.is_empty())).map(str::to_owned),
        );
        Ok(named.iter().find_map(|name| block_len_in(name)).map_or((published, true), |len| (len, false)))
    }

    /// A boolean with the default of the published configuration class.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |v| {
            v.as_bool().ok_or_else(|| self.error(format!("key `{}`: expected true or false, found {v}", self.name(key))))
        })
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
                Value::Object(map) => Ok(ConfigJson { map, inner: None, parent: dotted, ..*self }),
                _ => Err(self.error(format!("key `{key}`: expected an object, found {v}"))),
            })
            .transpose()
    }

    /// An optional token id below `vocab_size`, of a list the first, that a model can do without:
    /// a number that names no row of the vocabulary is passed over with a warning.
    ///
    /// Errors: no number.
    pub fn first_token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        Ok(self.tokens(key, vocab_size)?.first().copied())
    }

    /// [`ConfigJson::first_token`], all of them.
    fn tokens(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let values = match self.get(key) {
            None => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        for value in values.iter().filter(|value| !value.is_null()) {
            match token_id_of(value, vocab_size) {
                Some(id) => ids.push(id),
                // Files of other engines say -1 for none, and a tokenizer may have been given more
                // tokens than the weights have rows.
                None if value.as_f64().is_some_and(|id| id.fract() == 0.0) => {
                    self.warn(format!("key `{}`: {value} is no token id below vocab_size {vocab_size}: passed over", self.name(key)));
                }
                None => drop(self.token_id(key, value, vocab_size)?),
            }
        }
        Ok(ids)
    }

    /// An optional number that `valid` accepts; any other value is passed over with a warning.
    fn advice(&self, key: &str, valid: impl Fn(f32) -> bool, expected: &str) -> Option<f32> {
        let value = self.get(key)?;
        let number = value.as_f64().map(|n| n as f32).filter(|n| valid(*n));
        if number.is_none() {
            self.warn(format!("key `{}`: expected {expected}, found {value}: passed over", self.name(key)));
        }
        number
    }

    /// An optional token id below `vocab_size`.
    pub fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        self.get(key).map(|v| self.token_id(key, v, vocab_size)).transpose()
    }

    fn token_id(&self, key: &str, value: &Value, vocab_size: usize) -> Result<u32> {
        token_id_of(value, vocab_size).ok_or_else(|| {
            self.error(format!("key `{}`: expected a token id below vocab_size {vocab_size}, found {value}", self.name(key)))
        })
    }
}

/// A whole number, also where it is written as 50.0.
fn whole_number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n)).map(|n| n as u64))
}

fn token_id_of(value: &Value, vocab_size: usize) -> Option<u32> {
    whole_number(value).filter(|id| *id < vocab_size as u64).map(|id| id as u32)
}

/// The block length in the name of a published variant: `-b32`, `block_size16`, `block-len-8`.
fn block_len_in(name: &str) -> Option<usize> {
    let number = |rest: &str| {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let ends = !rest[digits..].starts_with(|c: char| c.is_alphanumeric());
        rest[..digits].parse().ok().filter(|len| ends && (1..=1 << 16).contains(len))
    };
    let name = name.to_ascii_lowercase();
    for marker in ["block_size", "block-size", "blocksize", "block_len", "block-len", "blocklen", "block_length", "block-length"] {
        let found = name.match_indices(marker).find_map(|(at, _)| number(name[at + marker.len()..].trim_start_matches(['-', '_', '='])));
        if found.is_some() {
            return found;
        }
    }
    // The last one: names count billions of parameters too, but with the letter at the end.
    name.rmatch_indices(['-', '_', '.']).find_map(|(at, _)| number(name[at + 1..].strip_prefix('b')?))
}

/// The file that errors about a model's configuration name.
pub fn config_file(model: &Path) -> PathBuf {
    if model.is_file() { model.to_path_buf() } else { model.join("config.json") }
}

/// A JSON object of a directory, or of what a GGUF file has in its place, and the file to name in
/// errors; none where there is no such file.
fn json_file(dir: &Path, name: &str) -> Result<Option<(PathBuf, Map<String, Value>)>> {
    if let Some(file) = gguf::file_of(dir)? {
        return Ok(gguf::json(&file, name)?.map(|map| (file, map)));
    }
    let path = dir.join(name);
    let text = input_file::read_optional_text(&path, MAX_JSON_BYTES).map_err(|e| Error::config(&path, format!("cannot read: {e}")))?;
    let Some(text) = text else { return Ok(None) };
    match input_file::parse_json(&text).map_err(|e| Error::config(&path, format!("expected a JSON object: {e}")))? {
        Value::Object(map) => Ok(Some((path, map))),
        value => Err(Error::config(&path, format!("expected a JSON object, found {value}"))),
    }
}

/// Tokens that the tokenizer of a directory adds, by id; none, and why, where it has no tokenizer:
/// another may be named with a flag.
fn added_tokens(dir: &Path) -> Result<(BTreeMap<u32, AddedToken>, Option<Error>)> {
    match tokenizer::added_tokens(&tokenizer::place(dir)?) {
        Ok(added) => Ok((added, None)),
        Err(error) if Tokenizer::is_in(dir) => Err(error),
        Err(error) => Ok((BTreeMap::new(), Some(error))),
    }
}

/// The id of the `eos_token` that `dir/tokenizer_config.json` names, where both are there: what
/// ends a text for programs that ask the tokenizer.
fn tokenizer_eos(dir: &Path, vocab_size: usize, config: &ConfigJson) -> Result<Option<u32>> {
    let Some((path, value)) = json_file(dir, "tokenizer_config.json")? else { return Ok(None) };
    let value = Value::Object(value);
    // A text, or an object that describes the token.
    let content = value["eos_token"].as_str().or_else(|| value["eos_token"]["content"].as_str());
    let Some(content) = content else { return Ok(None) };
    let decoder = value["added_tokens_decoder"].as_object();
    let listed = decoder.and_then(|tokens| tokens.iter().find(|(_, token)| token["content"].as_str() == Some(content)));
    let id = match listed {
        Some((id, _)) => id.parse().ok().filter(|id| (*id as usize) < vocab_size),
        None => {
            let (added, _) = added_tokens(dir)?;
            added.iter().find(|(_, token)| token.content == content).map(|(id, _)| *id).filter(|id| (*id as usize) < vocab_size)
        }
    };
    if id.is_none() {
        let file = ConfigJson { path: &path, map: &Map::new(), inner: None, parent: "", warnings: config.warnings };
        file.warn(format!("key `eos_token`: `{content}` has no token id below vocab_size {vocab_size}: passed over"));
    }
    Ok(id)
}

/// Why a directory has no configuration, and the next move.
fn no_config(dir: &Path, path: &Path) -> Error {
    if dir.is_file() {
        let what = "a file: expected the directory that it lies in, with config.json beside the weights, or a GGUF file";
        return Error::config(dir, what);
    }
    if !dir.exists() {
        let parts: Vec<_> = dir.components().collect();
        let text = dir.to_string_lossy();
        let hub = parts.len() == 2 && !dir.is_absolute() && !text.starts_with('.') && !text.contains('\\');
        let what = if hub {
            format!(
                "no such model directory; if it is a model of the Hugging Face Hub, download it first: `hf download {text} --local-dir DIR`"
            )
        } else {
            "no such model directory".into()
        };
        return Error::config(dir, what);
    }
    let snapshots = dir.join("snapshots");
    let newest = snapshots.read_dir().ok().and_then(|entries| entries.flatten().map(|entry| entry.path()).max());
    if let Some(snapshot) = newest {
        let what = format!("the root of an entry of the Hub's cache: the model is in {}", snapshot.display());
        return Error::config(dir, what);
    }
    let inside = |entry: std::fs::DirEntry| entry.path().join("config.json").exists().then(|| entry.path());
    let below = dir.read_dir().ok().and_then(|entries| entries.flatten().filter_map(inside).min());
    let what = match below {
        Some(below) => format!("no such file; there is one in {}", below.display()),
        None => "no such file: expected a Hugging Face directory with config.json, safetensors and tokenizer.json".into(),
    };
    Error::config(path, format!("cannot read the model's configuration: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_variants_give_block_lengths() {
        for (name, len) in [
            ("SDAR-1.7B-Chat-b32", Some(32)),
            ("models--JetLM--SDAR-30B-A3B-Chat-b16", Some(16)),
            ("SDAR-4B-Chat-b8-sft", Some(8)),
            ("bd3lm-owt-block_size16", Some(16)),
            ("model-block-len-4", Some(4)),
            ("SDAR-8B-Chat", None),
            ("SDAR-8b", None),
            ("model-b4x", None),
            ("model-b0", None),
            ("model-b99999999999999999999", None),
            ("blocksize", None),
        ] {
            assert_eq!(block_len_in(name), len, "{name}");
        }
    }

    #[test]
    fn whole_numbers_may_be_written_with_a_point() {
        for (text, number) in
            [("50", Some(50)), ("50.0", Some(50)), ("0", Some(0)), ("-1", None), ("2.5", None), ("1e300", None), ("\"5\"", None)]
        {
            assert_eq!(whole_number(&serde_json::from_str(text).unwrap()), number, "{text}");
        }
    }
}
