//! A model in one or several files, as a directory would describe it: the object of `config.json`,
//! and the name, shape and place of every tensor.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::gguf::architecture::{Architecture, Attention, Layout};
use crate::gguf::container::{Container, TensorInfo, TensorType};
use crate::gguf::rope_factors;
use crate::gguf::tensor_names::{self, Heads, Leaf, RowOrder};

/// Parts of a split model at most.
const MAX_PARTS: u64 = 1 << 12;
/// Tensors at most, experts counted one by one.
const MAX_TENSORS: usize = 1 << 18;
/// Layers at most, as the reader of config.json has it.
const MAX_LAYERS: u64 = 1 << 10;

/// The files of a model.
pub struct GgufModel {
    pub architecture: &'static Architecture,
    /// The first has the metadata.
    pub parts: Vec<Container>,
    heads: Heads,
}

/// A tensor in the words of a directory.
pub struct NamedTensor {
    pub name: String,
    /// Row-major, the innermost last.
    pub shape: Vec<usize>,
    pub kind: TensorType,
    /// Index into the files, and bytes of that file.
    pub part: usize,
    pub bytes: Range<usize>,
    pub order: RowOrder,
    /// What the file calls it, or that of which it is a piece.
    pub stored_as: String,
}

type Checked<T> = std::result::Result<T, String>;

impl GgufModel {
    /// Opens a file, and the others that it was split into.
    ///
    /// Errors: those of [`Container::open`], an architecture that is not read, parts that do not
    /// belong together.
    pub fn open(path: &Path) -> Result<GgufModel> {
        // Parts after the first have no metadata of the model.
        let parts = with_others(Container::open(path)?)?;
        let architecture = architecture(&parts[0]).map_err(|what| Error::config(path, what))?;
        let heads = heads(&parts[0], architecture).map_err(|what| Error::config(path, what))?;
        Ok(GgufModel { architecture, parts, heads })
    }

    /// The metadata.
    fn metadata(&self) -> &Container {
        &self.parts[0]
    }

    /// The tensor of a name, in any of the files.
    fn tensor(&self, name: &str) -> Option<(&Container, &TensorInfo)> {
        self.parts.iter().find_map(|part| Some((part, part.tensor(name)?)))
    }

    /// Every tensor of the model, experts one by one.
    ///
    /// Errors: a tensor that is none of the architecture's, or of another number of dimensions.
    pub fn tensors(&self) -> Result<Vec<NamedTensor>> {
        let mut named = Vec::new();
        for (index, part) in self.parts.iter().enumerate() {
            for tensor in part.tensors.iter().filter(|tensor| tensor.name != rope_factors::TENSOR) {
                let wrong = |what: String| Error::weights(&part.path, format!("tensor {}: {what}", tensor.name));
                let leaves = tensor_names::leaves(self.architecture, &self.heads, tensor).map_err(wrong)?;
                if named.len() + leaves.len() > MAX_TENSORS {
                    return Err(wrong(format!("with it there are more than {MAX_TENSORS} tensors, experts counted one by one")));
                }
                for Leaf { name, shape, bytes, order } in leaves {
                    named.push(NamedTensor { name, shape, kind: tensor.kind, part: index, bytes, order, stored_as: tensor.name.clone() });
                }
            }
        }
        Ok(named)
    }

    /// The object of `config.json`.
    pub fn config(&self) -> Result<Map<String, Value>> {
        self.checked_config().map_err(|what| Error::config(&self.metadata().path, what))
    }

    fn checked_config(&self) -> Checked<Map<String, Value>> {
        let (metadata, architecture) = (self.metadata(), self.architecture);
        let keys = Keys { metadata, prefix: architecture.name };
        let (_, table) = self.tensor("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
        let vocab_size = *table.dims.get(1).ok_or("tensor token_embd.weight: expected two dimensions, found one")?;
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let hidden_dim = keys.needed("embedding_length")?;
        let num_layers = keys.needed("block_count")?;
        let model_length = keys.needed("context_length")?;
        let is_there = |leaf: &str| self.tensor(&format!("blk.0.{leaf}")).is_some();
        let tied = self.tensor("output.weight").is_none();
        let qkv_bias = is_there("attn_q.bias") || is_there("attn_qkv.bias");
        self.check_attention(&keys, model_length)?;

        let mut config = Map::new();
        let mut set = |key: &str, value: Value| drop(config.insert(key.into(), value));
        set("model_type", architecture.model_type.into());
        set("architectures", json!([architecture.class]));
        // Whole numbers of 32 bits and f32 both pass through f64 unchanged.
        set(
            "rms_norm_eps",
            keys.number("attention.layer_norm_rms_epsilon")?.ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?.into(),
        );
        set("rope_theta", keys.number("rope.freq_base")?.unwrap_or(10_000.0).into());
        set("rope_scaling", self.rope_scaling(&keys)?);
        set("vocab_size", vocab_size.into());
        if architecture.layout == Layout::Llada {
            for (key, value) in [
                ("embedding_size", vocab_size as u64),
                ("d_model", hidden_dim),
                ("n_layers", num_layers),
                ("n_heads", num_heads as u64),
                ("n_kv_heads", num_kv_heads as u64),
                ("mlp_hidden_size", keys.needed("feed_forward_length")?),
                ("max_sequence_length", model_length),
            ] {
                set(key, value.into());
            }
            set("weight_tying", tied.into());
            set("include_qkv_bias", qkv_bias.into());
            if (num_heads * head_dim) as u64 != hidden_dim {
                return Err(format!("heads {num_heads} of {head_dim}: expected them to share embedding_length {hidden_dim}"));
            }
        } else {
            for (key, value) in [
                ("hidden_size", hidden_dim),
                ("num_hidden_layers", num_layers),
                ("num_attention_heads", num_heads as u64),
                ("num_key_value_heads", num_kv_heads as u64),
                ("head_dim", head_dim as u64),
                ("max_position_embeddings", model_length),
            ] {
                set(key, value.into());
            }
            if let Some(width) = keys.whole("feed_forward_length")? {
                set("intermediate_size", width.into());
            }
            set("tie_word_embeddings", tied.into());
            set("attention_bias", qkv_bias.into());
            set("mlp_bias", is_there("ffn_gate.bias").into());
        }
        if let Some(width) = keys.whole("rope.dimension_count")?.filter(|width| *width != head_dim as u64) {
            if architecture.name != "llada-moe" {
                return Err(format!("{}: expected whole heads of {head_dim} to rotate, found {width}", keys.name("rope.dimension_count")));
            }
            set("partial_rotary_factor", (width as f64 / head_dim as f64).into());
        }
        if architecture.experts {
            set("num_experts", keys.needed("expert_count")?.into());
            set("num_experts_per_tok", keys.needed("expert_used_count")?.into());
            let width = keys.needed("expert_feed_forward_length")?.into();
            if architecture.name == "llada-moe" {
                set("expert_intermediate_size", width);
                set("qk_layernorm", is_there("attn_q_norm.weight").into());
                if num_layers > MAX_LAYERS {
                    return Err(format!("{}: expected at most {MAX_LAYERS}, found {num_layers}", keys.name("block_count")));
                }
                let sparse = |layer: u64| u8::from(self.tensor(&format!("blk.{layer}.ffn_gate.weight")).is_none());
                set("moe_layer_freq", (0..num_layers).map(sparse).collect());
                if let Some(width) = keys.whole("feed_forward_length")? {
                    set("dense_intermediate_size", width.into());
                }
            } else {
                set("moe_intermediate_size", width);
                set("norm_topk_prob", true.into());
            }
        } else if keys.whole("expert_count")?.is_some_and(|count| count > 0) {
            return Err(format!("{}: experts of architecture {} are not supported", keys.name("expert_count"), architecture.name));
        }
        for (key, ids) in [("bos", &["bos"][..]), ("eos", &["eos", "eot"]), ("pad", &["padding"]), ("mask", &["mask"])] {
            let mut found = Vec::new();
            for id in ids {
                found.extend(special_id(metadata, id)?);
            }
            match found[..] {
                [] => {}
                [id] => set(&format!("{key}_token_id"), id.into()),
                _ => set(&format!("{key}_token_id"), found.into()),
            }
        }
        Ok(config)
    }

    /// Refuses attention that the architecture has not.
    fn check_attention(&self, keys: &Keys, model_length: u64) -> Checked<()> {
        let is_causal = self.architecture.attention == Attention::Causal;
        if let Some(causal) = keys.flag("attention.causal")?.filter(|causal| *causal != is_causal) {
            return Err(format!(
                "{}: expected {is_causal} of architecture {}, found {causal}",
                keys.name("attention.causal"),
                self.architecture.name
            ));
        }
        if let (Attention::Full { shifted }, Some(found)) = (self.architecture.attention, keys.metadata.flag("diffusion.shift_logits")?)
            && found != shifted
        {
            return Err(format!("metadata key `diffusion.shift_logits`: expected {shifted} of {}, found {found}", self.architecture.name));
        }
        match keys.whole("attention.sliding_window")? {
            Some(window) if window > 0 && window < model_length => {
                let what = format!("attention that ends {window} positions back is not supported, the model's length is {model_length}");
                Err(format!("{}: {what}", keys.name("attention.sliding_window")))
            }
            _ => Ok(()),
        }
    }

    /// `rope_scaling` of config.json, null where there is none.
    fn rope_scaling(&self, keys: &Keys) -> Checked<Value> {
        let kind = keys.text("rope.scaling.type")?.unwrap_or("none");
        // The second is the name of old files, for linear scaling alone.
        let factor = match keys.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => keys.number("rope.scale_linear")?,
        };
        if let Some(found) = keys.number("rope.scaling.attn_factor")?.filter(|factor| *factor != 1.0 && *factor != 0.0) {
            return Err(format!("{}: expected 1, found {found}", keys.name("rope.scaling.attn_factor")));
        }
        let scaling = match (kind, factor) {
            ("none" | "linear", None | Some(1.0)) => Value::Null,
            ("linear", Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
            ("none", Some(factor)) if keys.metadata.has(&format!("{}.rope.scale_linear", keys.prefix)) => {
                json!({"rope_type": "linear", "factor": factor})
            }
            ("none", Some(_)) => Value::Null,
            (other, _) => return Err(format!("{}: `{other}` is not supported; supported: none, linear", keys.name("rope.scaling.type"))),
        };
        let Some((part, tensor)) = self.tensor(rope_factors::TENSOR) else { return Ok(scaling) };
        let wrong = |what: String| format!("tensor {}: {what}", rope_factors::TENSOR);
        if self.architecture.name != "llama" || scaling != Value::Null {
            return Err(wrong("scaled frequencies are Llama's alone, and no other scaling is beside them".into()));
        }
        let factors = part.values(tensor).map_err(|error| error.to_string())?;
        if factors.len() != self.heads.head_dim / 2 {
            return Err(wrong(format!("expected {} values, half a head's width, found {}", self.heads.head_dim / 2, factors.len())));
        }
        let base = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
        rope_factors::scaling(&factors, base).map_err(wrong)
    }
}

/// Metadata keys of an architecture.
struct Keys<'a> {
    metadata: &'a Container,
    prefix: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    /// The key as errors name it.
    fn name(&self, key: &str) -> String {
        format!("metadata key `{}`", self.key(key))
    }

    fn missing(&self, key: &str) -> String {
        format!("{} is missing", self.name(key))
    }

    fn text(&self, key: &str) -> Checked<Option<&str>> {
        self.metadata.text(&self.key(key))
    }

    fn number(&self, key: &str) -> Checked<Option<f64>> {
        self.metadata.number(&self.key(key))
    }

    fn flag(&self, key: &str) -> Checked<Option<bool>> {
        self.metadata.flag(&self.key(key))
    }

    /// A whole number; where a list has one for each layer, the one that all of them are.
    fn whole(&self, key: &str) -> Checked<Option<u64>> {
        let full = self.key(key);
        if !self.metadata.is_list(&full) {
            return self.metadata.whole(&full);
        }
        let list = self.metadata.wholes(&full)?.unwrap_or_default();
        let Some(first) = list.first() else { return Err(format!("{}: an empty list", self.name(key))) };
        match u64::try_from(*first) {
            Ok(number) if list.iter().all(|other| other == first) => Ok(Some(number)),
            _ => Err(format!("{}: numbers that differ between layers are not supported", self.name(key))),
        }
    }

    fn needed(&self, key: &str) -> Checked<u64> {
        self.whole(key)?.ok_or_else(|| self.missing(key))
    }
}

/// What `general.architecture` names.
fn architecture(metadata: &Container) -> Checked<&'static Architecture> {
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(format!("metadata key `general.type`: expected a model, found `{kind}`"));
    }
    Architecture::named(metadata.text("general.architecture")?.ok_or("metadata key `general.architecture` is missing")?)
}

/// Query heads, K/V heads and the width of each.
fn heads(metadata: &Container, architecture: &'static Architecture) -> Checked<Heads> {
    const MAX: u64 = 1 << 16;
    let keys = Keys { metadata, prefix: architecture.name };
    let size = |key: &str, value: u64| match value {
        1..=MAX => Ok(value as usize),
        _ => Err(format!("{}: expected a number from 1 to {MAX}, found {value}", keys.name(key))),
    };
    let num_heads = size("attention.head_count", keys.needed("attention.head_count")?)?;
    let num_kv_heads = size("attention.head_count_kv", keys.whole("attention.head_count_kv")?.unwrap_or(num_heads as u64))?;
    let hidden_dim = size("embedding_length", keys.needed("embedding_length")?)?;
    let head_dim = match keys.whole("attention.key_length")? {
        Some(width) => size("attention.key_length", width)?,
        None if hidden_dim.is_multiple_of(num_heads) => hidden_dim / num_heads,
        None => return Err(format!("{}: expected {num_heads} to divide embedding_length {hidden_dim}", keys.name("attention.head_count"))),
    };
    if !head_dim.is_multiple_of(2) {
        return Err(format!("a head's width of {head_dim}: expected an even number, positions rotate pairs"));
    }
    if let Some(width) = keys.whole("attention.value_length")?.filter(|width| *width != head_dim as u64) {
        return Err(format!("{}: expected {head_dim}, the width of keys, found {width}", keys.name("attention.value_length")));
    }
    Ok(Heads { num_heads, num_kv_heads, head_dim })
}

/// What a file is made of, for reports.
pub struct Summary {
    /// `general.name`.
    pub name: Option<String>,
    pub version: u32,
    pub num_files: usize,
    pub architecture: &'static str,
    /// Kind and pre-tokenizer; `None` without a tokenizer.
    pub tokenizer: Option<String>,
    /// By name without layers.
    pub tensors: Vec<TensorKind>,
}

/// Tensors of one name and type over all layers.
pub struct TensorKind {
    pub name: String,
    pub kind: &'static str,
    pub count: usize,
    pub num_elements: usize,
    pub num_bytes: usize,
}

impl GgufModel {
    /// What the files are made of.
    pub fn summary(&self) -> Summary {
        let metadata = self.metadata();
        let text = |key: &str| metadata.text(key).ok().flatten();
        let tokenizer = text("tokenizer.ggml.model").map(|model| match text("tokenizer.ggml.pre").filter(|_| model == "gpt2") {
            Some(pre) => format!("{model} ({pre})"),
            None => model.to_owned(),
        });
        let mut kinds: BTreeMap<(&str, &str), TensorKind> = BTreeMap::new();
        for tensor in self.parts.iter().flat_map(|part| &part.tensors) {
            let name = match tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
                Some((_, name)) => name,
                None => &tensor.name,
            };
            let kind = kinds.entry((name, tensor.kind.name())).or_insert_with(|| TensorKind {
                name: name.to_owned(),
                kind: tensor.kind.name(),
                count: 0,
                num_elements: 0,
                num_bytes: 0,
            });
            kind.count += 1;
            kind.num_elements += tensor.dims.iter().product::<usize>();
            kind.num_bytes += tensor.bytes.len();
        }
        Summary {
            name: text("general.name").map(str::to_owned),
            version: metadata.version,
            num_files: self.parts.len(),
            architecture: self.architecture.name,
            tokenizer,
            tensors: kinds.into_values().collect(),
        }
    }
}

/// The id of a special token. SentencePiece files without the keys have BOS 1 and end of text 2, as
/// llama.cpp reads them.
pub fn special_id(metadata: &Container, name: &str) -> Checked<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    if let Some(id) = metadata.whole(&key)? {
        // Some writers put the largest number for none.
        return Ok(u32::try_from(id).ok().filter(|id| *id != u32::MAX));
    }
    let is_sentence_piece = metadata.text("tokenizer.ggml.model")? == Some("llama");
    Ok(match name {
        "bos" if is_sentence_piece => Some(1),
        "eos" if is_sentence_piece => Some(2),
        _ => None,
    })
}

/// The file and the others of a split model, in order.
fn with_others(first: Container) -> Result<Vec<Container>> {
    let path = first.path.clone();
    let wrong = |what: String| Error::weights(&path, what);
    let whole = |part: &Container, key: &str| part.whole(key).map_err(|what| Error::weights(&part.path, what));
    let count = whole(&first, "split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![first]);
    }
    if count > MAX_PARTS {
        return Err(wrong(format!("metadata key `split.count`: {count}, at most {MAX_PARTS} are read")));
    }
    let number = whole(&first, "split.no")?.unwrap_or(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = split_stem(&name).filter(|(_, part, parts)| (*part, *parts) == (number + 1, count));
    let Some((stem, ..)) = stem else {
        return Err(wrong(format!("part {} of {count}: expected a name that ends in -{:05}-of-{count:05}.gguf", number + 1, number + 1)));
    };
    let part_path = |number: u64| path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1));
    if number != 0 {
        return Err(wrong(format!("part {} of {count}: name the first, {}", number + 1, part_path(0).display())));
    }
    let total = whole(&first, "split.tensors.count")?;
    let mut parts = vec![first];
    for number in 1..count {
        let part = Container::open(&part_path(number))?;
        let found = (whole(&part, "split.no")?, whole(&part, "split.count")?);
        if found != (Some(number), Some(count)) {
            let shown = |n: Option<u64>| n.map_or("nothing".into(), |n| n.to_string());
            let what = format!("expected split.no {number} and split.count {count}, found {} and {}", shown(found.0), shown(found.1));
            return Err(Error::weights(&part.path, what));
        }
        parts.push(part);
    }
    let found: u64 = parts.iter().map(|part| part.tensors.len() as u64).sum();
    if let Some(total) = total.filter(|total| *total != found) {
        return Err(wrong(format!("metadata key `split.tensors.count`: {total}, the {count} parts have {found} tensors")));
    }
    let mut names: Vec<(&str, &PathBuf)> =
        parts.iter().flat_map(|part| part.tensors.iter().map(|t| (t.name.as_str(), &part.path))).collect();
    names.sort_unstable();
    if let Some([(name, _), (_, other)]) = names.array_windows().find(|[a, b]| a.0 == b.0) {
        return Err(wrong(format!("tensor {name} is in two parts, the other is {}", other.display())));
    }
    Ok(parts)
}

/// Of `NAME-00002-of-00003.gguf`: NAME, 2 and 3.
pub fn split_stem(name: &str) -> Option<(&str, u64, u64)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, parts) = rest.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| if text.len() == 5 { text.parse().ok() } else { None };
    Some((stem, number(part)?, number(parts)?))
}
