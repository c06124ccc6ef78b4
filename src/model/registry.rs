//! Registry of families: which one a checkpoint belongs to, and how it is read and packed.
//!
//! A family is a file under `families/` and a row of `FAMILIES`.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::Backend;
use crate::config::{Classes, ConfigJson, Family, ModelConfig};
use crate::error::{Error, Result};
use crate::model::families::{
    bd3lm, dream, fast_dllm, gpt2, llada, llada_moe, llada2, llama, mdlm, mistral, qwen2, qwen3, qwen3_moe, rnd1, sdar, sdar_moe,
    stable_diffcoder,
};
use crate::model::family::{FamilyEntry, TensorLayout};
use crate::model::llama_layout;
use crate::model::weight_loader::{Progress, WeightLoader};
use crate::model::{Layer, Model};
use crate::weights::Weights;

/// In the order in which a checkpoint is compared with them.
static FAMILIES: [&FamilyEntry; 17] = [
    &bd3lm::ENTRY,
    &mdlm::ENTRY,
    &llada::ENTRY,
    &llada2::ENTRY,
    &dream::ENTRY,
    &sdar::ENTRY,
    &sdar_moe::ENTRY,
    &rnd1::ENTRY,
    &fast_dllm::ENTRY,
    &gpt2::ENTRY,
    &llama::ENTRY,
    &mistral::ENTRY,
    &qwen2::ENTRY,
    &qwen3::ENTRY,
    &qwen3_moe::ENTRY,
    // After those whose type they share.
    &llada_moe::ENTRY,
    &stable_diffcoder::ENTRY,
];

/// Reads `dir/config.json`.
pub fn read_config(dir: &Path) -> Result<ModelConfig> {
    ConfigJson::read(dir, |keys| (entry_of(keys)?.config)(dir, keys)?.complete(dir, keys))
}

/// The family that a configuration names.
fn entry_of(keys: &ConfigJson) -> Result<&'static FamilyEntry> {
    let (model_type, architectures) = (keys.model_type(), keys.architectures());
    // Adapted checkpoints may keep the type of the decoder that they were made from: there the
    // class decides.
    let named = |f: &Family| f.architectures.iter().any(|class| architectures.contains(class));
    let classed = |e: &&&FamilyEntry| named(e.family) && (e.family.is_adapted() || model_type.is_empty());
    let plain = |f: &Family| match f.classes {
        Classes::OwnUnless(key) => !architectures.is_empty() || !keys.has(key),
        _ => true,
    };
    let typed = |e: &&&FamilyEntry| model_type == e.family.model_type && plain(e.family);
    let entry = FAMILIES.iter().find(classed).or_else(|| FAMILIES.iter().find(typed)).ok_or_else(|| {
        let known = FAMILIES.map(|e| format!("{} ({})", e.family.model_type, e.family.architectures[0])).join(", ");
        keys.error(format!("model_type `{model_type}`, architectures {architectures:?}: not a supported family; supported: {known}"))
    })?;
    let family = entry.family;
    if family.classes != Classes::Any {
        let expected = family.architectures[0];
        if !architectures.is_empty() && !named(family) {
            let what = format!("key `architectures`: expected {expected} for model_type {model_type}, found {architectures:?}");
            return Err(keys.error(what));
        }
        if keys.has_code() && !family.is_adapted() {
            let what = format!("key `auto_map`: the checkpoint brings code of its own; only the published {expected} is supported");
            return Err(keys.error(what));
        }
    }
    Ok(entry)
}

fn layout_of(config: &ModelConfig) -> TensorLayout {
    FAMILIES.iter().find(|entry| entry.family == config.family).expect("a configuration is of a family in the table").layout
}

/// Everything that keeps a checkpoint from loading: missing and misshapen tensors. Values are not
/// read.
pub fn check(config: &ModelConfig, weights: &Weights) -> Vec<Error> {
    let tensors = match layout_of(config) {
        TensorLayout::Bd3lm => bd3lm::tensors(config),
        TensorLayout::Gpt2 => gpt2::tensors(config, weights),
        TensorLayout::Llama(names) => llama_layout::tensors(config, names),
    };
    tensors.iter().filter_map(|(name, shape)| weights.tensor(name, shape).err()).collect()
}

/// Packs the checkpoint's weights for `backend`.
pub fn load<B: Backend>(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    match layout_of(&config) {
        TensorLayout::Bd3lm => bd3lm::load(backend, config, weights, progress),
        TensorLayout::Gpt2 => gpt2::load(backend, config, weights, progress),
        TensorLayout::Llama(names) => llama_layout::load(backend, config, names, weights, progress),
    }
}

/// Names and shapes of a layer of the kind that the model has, without modulation and experts.
pub(super) fn layer_tensors(config: &ModelConfig, prefix: &str) -> Vec<(String, Vec<usize>)> {
    match layout_of(config) {
        TensorLayout::Bd3lm => bd3lm::layer_tensors(config, prefix),
        TensorLayout::Gpt2 => llama_layout::layer_tensors(config, &llama_layout::NAMES, prefix, None),
        TensorLayout::Llama(names) => llama_layout::layer_tensors(config, names, prefix, None),
    }
}

/// Packs what [`layer_tensors`] lists.
pub(super) fn load_layer<B: Backend>(r: &mut WeightLoader<B>, config: &ModelConfig, prefix: &str) -> Result<Layer<B>> {
    match layout_of(config) {
        TensorLayout::Bd3lm => bd3lm::load_layer(r, config, prefix, None),
        TensorLayout::Gpt2 => llama_layout::load_layer(r, config, &llama_layout::NAMES, prefix, None),
        TensorLayout::Llama(names) => llama_layout::load_layer(r, config, names, prefix, None),
    }
}
