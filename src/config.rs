//! Owns the facts of a checkpoint: `config.json` read into a validated [`ModelConfig`].
//!
//! Which keys a family has, and what they mean, is the family's file under `model/`; this room detects the family, reads
//! keys with types and ranges, and holds the result. Checkpoints are hostile: every size is bounded before it is used.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::backend::{ExpertShape, HeadShape, NormKind, Rope, RouterScore};
use crate::error::{Error, Result};
use crate::model::families::{bd3lm, dream, fast_dllm, gpt2, llada, llada_moe, llada2, llama, mdlm, qwen3_moe, sdar, stable_diffcoder};
use crate::sampling::{valid_temperature, valid_top_p};

/// How far beyond the trained length positions may go before a request is refused: rotary angles further out were never seen.
pub const MAX_STRETCH: usize = 4;

/// How tokenizers spell the token that hides another, in the order in which they are looked for.
const MASK_SPELLINGS: [&str; 6] = ["<|MASK|>", "<|mask|>", "|<MASK>|", "<|mdm_mask|>", "[MASK]", "<mask>"];

/// Checkpoint families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bd3lm,
    Mdlm,
    Llada,
    LladaMoe,
    Llada2,
    Dream,
    Sdar,
    SdarMoe,
    Rnd1,
    FastDllm,
    StableDiffcoder,
    Gpt2,
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Family::Bd3lm => "bd3lm",
            Family::Mdlm => "mdlm",
            Family::Llada => "llada",
            Family::LladaMoe => "llada-moe",
            Family::Llada2 => "llada2",
            Family::Dream => "dream",
            Family::Sdar => "sdar",
            Family::SdarMoe => "sdar-moe",
            Family::Rnd1 => "rnd1",
            Family::FastDllm => "fast-dllm",
            Family::StableDiffcoder => "stable-diffcoder",
            Family::Gpt2 => "gpt2",
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3-moe",
        }
    }

    /// What `model_type` says.
    fn model_type(self) -> &'static str {
        match self {
            Family::Dream => "Dream",
            Family::FastDllm => "Fast_dLLM_Qwen",
            // Llama's and LLaDA's own; the class tells them apart.
            Family::StableDiffcoder => "llama",
            Family::LladaMoe => "llada",
            Family::Llada2 => "llada2_moe",
            Family::SdarMoe => "sdar_moe",
            Family::Qwen3Moe => "qwen3_moe",
            other => other.name(),
        }
    }

    /// Published under a class of its own over the decoder of an autoregressive family, with its own code beside the weights.
    fn is_adapted(self) -> bool {
        use Family::{Dream, FastDllm, Llada, Llada2, LladaMoe, Rnd1, Sdar, SdarMoe, StableDiffcoder};
        matches!(self, Llada | LladaMoe | Llada2 | Dream | Sdar | SdarMoe | Rnd1 | FastDllm | StableDiffcoder)
    }

    /// The classes that `architectures` may name, the published one first.
    fn architectures(self) -> &'static [&'static str] {
        match self {
            Family::Bd3lm => &["BD3LM"],
            Family::Mdlm => &["MDLM"],
            Family::Llada => &["LLaDAModelLM"],
            Family::LladaMoe => &["LLaDAMoEModelLM", "LLaDAMoEModel"],
            Family::Llada2 => &["LLaDA2MoeModelLM"],
            Family::Dream => &["DreamModel"],
            Family::Sdar => &["SDARForCausalLM"],
            Family::SdarMoe => &["SDARMoeForCausalLM"],
            Family::Rnd1 => &["RND1LM"],
            Family::FastDllm => &["Fast_dLLM_QwenForCausalLM"],
            Family::StableDiffcoder => &["StableDiffcoderForCausalLM"],
            Family::Gpt2 => &["GPT2LMHeadModel"],
            Family::Llama => &["LlamaForCausalLM"],
            Family::Mistral => &["MistralForCausalLM"],
            Family::Qwen2 => &["Qwen2ForCausalLM"],
            Family::Qwen3 => &["Qwen3ForCausalLM"],
            Family::Qwen3Moe => &["Qwen3MoeForCausalLM"],
        }
    }

    const ALL: [Family; 17] = [
        Family::Bd3lm,
        Family::Mdlm,
        Family::Llada,
        Family::Llada2,
        Family::Dream,
        Family::Sdar,
        Family::SdarMoe,
        Family::Rnd1,
        Family::FastDllm,
        Family::Gpt2,
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Qwen3Moe,
        // Behind those whose type they share.
        Family::LladaMoe,
        Family::StableDiffcoder,
    ];
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
pub struct Switches {
    pub norm: NormKind,
    pub mlp: Mlp,
    /// Biases of the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias of the projection behind attention.
    pub attn_out_bias: bool,
    /// Biases of all of the MLP's projections.
    pub mlp_bias: bool,
    pub head_bias: bool,
    /// RMS norm of every head of q and k before the rotation.
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tied_head: bool,
    /// Positions are rows of a table, as many as the model's length, added to the embedding; nothing is rotated.
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
    pub family: Family,
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
    pub switches: Switches,
    /// Positions the model was trained on.
    pub model_length: usize,
    /// Attention of the checkpoint ends this many positions back; here it does not, so no longer sequence is served.
    pub sliding_window: Option<usize>,
    pub attention: Attention,
    /// The token at position i is answered by row i - 1, as in the autoregressive model that the weights were adapted from; position 0 by
    /// its own row. Autoregressive checkpoints do not say so here: scoring knows.
    pub shift: bool,
    /// Width of the conditioning vector whose adaLN modulation is folded at load; `None` without adaLN.
    pub cond_dim: Option<usize>,
    /// None in autoregressive checkpoints, which have no such token.
    pub mask_id: Option<u32>,
    /// What stands before the first token of a text; where a checkpoint names no BOS, its end of text.
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
    /// Every id that ends a text, ascending: `eos_id`, and what lists in config.json and generation_config.json add.
    pub stop_ids: Vec<u32>,
    pub pad_id: Option<u32>,
    /// What generation_config.json recommends.
    pub sampling: Sampling,
}

/// Recommended sampling of a checkpoint: keys `temperature`, `top_p` and `top_k` of its generation_config.json.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 keeps everything.
    pub top_k: Option<u32>,
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    pub fn load(dir: &Path) -> Result<ModelConfig> {
        Keys::of(dir, |keys| ModelConfig::of(dir, keys))
    }

    fn of(dir: &Path, keys: &Keys) -> Result<ModelConfig> {
        let mut config = match keys.family()? {
            Family::Bd3lm => bd3lm::config(dir, keys),
            Family::Mdlm => mdlm::config(dir, keys),
            Family::Llada => llada::config(dir, keys),
            Family::LladaMoe => llada_moe::config(dir, keys),
            Family::Llada2 => llada2::config(dir, keys),
            Family::Dream => dream::config(dir, keys),
            Family::Sdar => sdar::config(dir, keys),
            family @ (Family::SdarMoe | Family::Rnd1 | Family::Qwen3Moe) => qwen3_moe::config(dir, keys, family),
            Family::FastDllm => fast_dllm::config(dir, keys),
            Family::StableDiffcoder => stable_diffcoder::config(dir, keys),
            Family::Gpt2 => gpt2::config(dir, keys),
            family @ (Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3) => llama::config(dir, keys, family),
        }?;
        config.stop_ids = config.eos_id.into_iter().collect();
        config.stop_ids.extend(keys.tokens("eos_token_id", config.vocab_size)?);
        config.read_generation(dir)?;
        config.stop_ids.sort_unstable();
        config.stop_ids.dedup();
        Ok(config)
    }

    /// What `dir/generation_config.json` adds, where there is one: chat models name there what ends a turn.
    fn read_generation(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join("generation_config.json");
        let Ok(text) = std::fs::read_to_string(&path) else {
            return Ok(());
        };
        let map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::config(&path, format!("expected a JSON object: {e}")))?;
        let keys = Keys { path: &path, map: &map, parent: "" };
        self.stop_ids.extend(keys.tokens("eos_token_id", self.vocab_size)?);
        self.sampling = Sampling {
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
            .filter(|_| self.attention != Attention::Causal)
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
pub struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// Where the object is a value itself: its key and a dot.
    parent: &'static str,
}

impl Keys<'_> {
    /// What `read` makes of `dir/config.json`.
    pub fn of<T>(dir: &Path, read: impl FnOnce(&Keys) -> Result<T>) -> Result<T> {
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
        read(&Keys { path: &path, map: &map, parent: "" })
    }

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
        // Adapted checkpoints may keep the type of the decoder that they were made from: there the class decides.
        let named = |f: &Family| f.architectures().iter().any(|class| architectures.contains(class));
        let classed = |f: &Family| named(f) && (f.is_adapted() || model_type.is_empty());
        // Where no class is named, experts tell LLaDA-MoE from LLaDA.
        let plain = |f: &Family| *f != Family::Llada || !architectures.is_empty() || !self.has("num_experts");
        let typed = |f: &Family| model_type == f.model_type() && plain(f);
        let family = Family::ALL.into_iter().find(classed).or_else(|| Family::ALL.into_iter().find(typed)).ok_or_else(|| {
            let known = Family::ALL.map(|f| format!("{} ({})", f.model_type(), f.architectures()[0])).join(", ");
            self.error(format!("model_type `{model_type}`, architectures {architectures:?}: not a supported family; supported: {known}"))
        })?;
        if !matches!(family, Family::Bd3lm | Family::Mdlm) {
            // Diffusion models and classifiers are published under the type of the decoder that they were made from.
            let expected = family.architectures()[0];
            if !architectures.is_empty() && !named(&family) {
                return Err(
                    self.error(format!("key `architectures`: expected {expected} for model_type {model_type}, found {architectures:?}"))
                );
            }
            if self.get("auto_map").is_some() && !family.is_adapted() {
                let what = format!("key `auto_map`: the checkpoint brings code of its own; only the published {expected} is supported");
                return Err(self.error(what));
            }
        }
        Ok(family)
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

    /// The id that hides a token: `mask_token_id`, or the added token of `tokenizer.json` that published tokenizers of such models spell so, or
    /// the `published` default of the family's sampler.
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
    pub fn object(&self, dotted: &'static str) -> Result<Option<Keys<'_>>> {
        let key = dotted.trim_end_matches('.');
        self.get(key)
            .filter(|v| **v != Value::Bool(false))
            .map(|v| match v {
                Value::Object(map) => Ok(Keys { path: self.path, map, parent: dotted }),
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
