//! GGUF files of llama.cpp: a checkpoint directory in one file.
//!
//! `container` takes a file apart and checks it; `blocks` makes values of its quantised tensors.
//! What a directory says in `config.json` and `tokenizer.json` stands in the metadata, and the
//! tensors have names and an order of rows of their own: `model` and `tensor_names` put both into
//! the words of the directory, so that no family knows of GGUF. `docs/gguf.md` lists what is read.
#![forbid(unsafe_code)]

pub mod architecture;
pub mod blocks;
pub mod container;
pub mod model;
pub mod pre_tokenizer;
pub mod rope_factors;
pub mod tensor_names;
pub mod tokenizer;

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::gguf::container::{Container, MAGIC};
use crate::gguf::model::{GgufModel, Summary, split_stem};
use crate::input_file;

/// The GGUF file that a path to a model names: itself, or the only one in a directory that has no
/// `config.json`, where the parts of a split model count as one. `None` is a directory of files.
///
/// Errors: several files to choose from.
pub fn file_of(model: &Path) -> Result<Option<PathBuf>> {
    if model.is_file() {
        return Ok(is_gguf(model).then(|| model.to_path_buf()));
    }
    // What cannot be listed is told by the reader of its configuration.
    let Ok(entries) = model.read_dir() else { return Ok(None) };
    if input_file::exists(&model.join("config.json")).unwrap_or(true) {
        return Ok(None);
    }
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    // Of a split model, the first part.
    let mut names: Vec<String> =
        names.filter(|name| name.ends_with(".gguf") && split_stem(name).is_none_or(|(_, part, _)| part == 1)).collect();
    names.sort();
    match names.as_slice() {
        [] => Ok(None),
        [name] => Ok(Some(model.join(name))),
        [first, ..] => {
            let count = names.len();
            let what = format!("{count} GGUF files and no config.json: name one of them, as in {}", model.join(first).display());
            Err(Error::config(model, what))
        }
    }
}

/// Whether a file begins as a GGUF file does, or has the name of one.
fn is_gguf(path: &Path) -> bool {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return true;
    }
    let mut first = [0; MAGIC.len()];
    input_file::open(path).and_then(|mut file| file.read_exact(&mut first)).is_ok() && first == *MAGIC
}

/// The object that a file of that name would hold, in the directory that a GGUF file stands for;
/// `None` where there would be no such file.
///
/// Errors: those of [`GgufModel::open`], and a key that is missing or not of its type.
pub fn json(file: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
    match name {
        "config.json" => GgufModel::open(file)?.config().map(Some),
        "generation_config.json" => {
            let metadata = Container::open(file)?;
            generation_config(&metadata).map(Some).map_err(|what| Error::config(file, what))
        }
        "tokenizer.json" | "tokenizer_config.json" => {
            let metadata = Container::open(file)?;
            let object = if name == "tokenizer.json" { tokenizer::tokenizer(&metadata) } else { tokenizer::tokenizer_config(&metadata) };
            object.map(Some).map_err(|what| Error::tokenizer(file, what))
        }
        _ => Ok(None),
    }
}

/// What a model's file is made of; `None` for a directory of files.
pub fn summary(model: &Path) -> Result<Option<Summary>> {
    file_of(model)?.map(|file| Ok(GgufModel::open(&file)?.summary())).transpose()
}

/// Whether a model is a GGUF file with tokens in it.
pub fn has_tokenizer(model: &Path) -> bool {
    let file = file_of(model).ok().flatten();
    file.and_then(|file| Container::open(&file).ok()).is_some_and(|metadata| metadata.has("tokenizer.ggml.tokens"))
}

/// Recommended sampling: `general.sampling.*`.
fn generation_config(metadata: &Container) -> std::result::Result<Map<String, Value>, String> {
    let mut config = Map::new();
    for (key, name) in [("temp", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")] {
        if let Some(number) = metadata.number(&format!("general.sampling.{key}"))? {
            config.insert(name.into(), json!(number));
        }
    }
    Ok(config)
}
