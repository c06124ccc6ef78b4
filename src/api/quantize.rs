//! A checkpoint directory written again with weights in groups.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Value, json};

use super::builder::dtype_of;
use crate::backend::WeightFormat;
use crate::config::QUANT_METHOD;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::gguf;
use crate::input_file::{self, MAX_JSON_BYTES};
use crate::model::registry;
use crate::packed_weights::{DTYPE_KEY, ELEMENTS_KEY, FORMAT_KEY, LAYOUT, LAYOUT_KEY, PackedFile};
use crate::weights::Weights;

/// What [`quantize`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quantized {
    /// Bytes of the weights that were read.
    pub bytes_read: u64,
    /// Bytes of the file that holds the new ones.
    pub bytes_written: u64,
}

/// Reads the checkpoint in `dir` and writes it to the new directory `out` with weights in `format`,
/// in the order in which products read them: opening `out` maps them, and nothing is converted any
/// more. Other files of the directory are copied, a joint sampler's directory too.
///
/// `threads` as in [`crate::EngineBuilder::threads`]; `progress` is called with the bytes that were
/// read and those in all. Nothing stands under the name `out` before everything is written.
///
/// Errors: as [`crate::Engine::open`]; [`Error::Request`] for a format of floats and for weights
/// that are packed already; [`Error::Io`] where `out` exists or cannot be written.
pub fn quantize(
    dir: impl AsRef<Path>,
    format: WeightFormat,
    out: impl AsRef<Path>,
    threads: Option<usize>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Quantized> {
    let (dir, out) = (dir.as_ref(), out.as_ref());
    if format.float().is_some() {
        return Err(Error::request(format!("weights {}: expected q8 or q4", format.name())));
    }
    if gguf::file_of(dir)?.is_some() {
        return Err(Error::request(format!("{}: a GGUF file is read as it is; expected a directory with safetensors", dir.display())));
    }
    let config = registry::read_config(dir)?;
    let weights = Weights::open(dir)?;
    if let Some((packed, _)) = weights.packed_types() {
        return Err(Error::request(format!("{}: its weights are in {} already", dir.display(), packed.name())));
    }
    if input_file::exists(out).map_err(|e| Error::io(out, &e))? {
        return Err(Error::request(format!("{}: exists; expected the name of a new directory", out.display())));
    }
    let name = out.file_name().ok_or_else(|| Error::request(format!("{}: not a directory's name", out.display())))?;
    let mut unfinished = name.to_os_string();
    unfinished.push(format!(".{}.part", std::process::id()));
    let unfinished = Unfinished(out.with_file_name(unfinished));
    let at = |path: &Path, error: std::io::Error| Error::io(path, &error);
    fs::create_dir_all(&unfinished.0).map_err(|e| at(out, e))?;

    copy_files(dir, &unfinished.0, &|name| !is_weights(name))?;
    let joint = dir.join("joint");
    if joint.is_dir() {
        let to = unfinished.0.join("joint");
        fs::create_dir(&to).map_err(|e| at(&to, e))?;
        copy_files(&joint, &to, &|_| true)?;
    }
    write_config(dir, &unfinished.0, format)?;

    let dtype = dtype_of(&weights);
    let cpu = Cpu::new(threads.unwrap_or(0), dtype)?.with_weights(Some(format));
    let path = unfinished.0.join("model.safetensors");
    let file = fs::File::create_new(&path).map_err(|e| at(&path, e))?;
    let (bytes_read, elements) = (weights.num_bytes() as u64, weights.num_elements().to_string());
    let packed = PackedFile::new(file, weights.names()).map_err(|e| at(&path, e))?;
    let packed = Rc::new(RefCell::new(packed));
    let (observer, shown) = (packed.clone(), path.clone());
    let weights = weights.observed_by(Box::new(move |loaded| observer.borrow_mut().put(loaded).map_err(|e| Error::io(&shown, &e))));
    drop(registry::load(&cpu, config, &weights, progress)?);
    drop(weights);
    let Ok(packed) = Rc::try_unwrap(packed) else { unreachable!("the observer is gone with the weights") };
    let texts = [(LAYOUT_KEY, LAYOUT), (FORMAT_KEY, format.name()), (DTYPE_KEY, dtype.name()), (ELEMENTS_KEY, &elements)];
    let (file, bytes_written) = packed.into_inner().finish(&texts).map_err(|e| at(&path, e))?;
    file.sync_all().map_err(|e| at(&path, e))?;
    fs::rename(&unfinished.0, out).map_err(|e| at(out, e))?;
    Ok(Quantized { bytes_read, bytes_written })
}

/// A directory that is removed unless it was renamed.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What led here matters, not whether the leftover could be removed.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Weights of any software, and their indices.
fn is_weights(name: &str) -> bool {
    const ENDS: [&str; 10] =
        [".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"];
    ENDS.iter().any(|end| name.ends_with(end))
}

/// Copies the files of a directory whose names are wanted.
fn copy_files(from: &Path, to: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
    let entries = fs::read_dir(from).map_err(|e| Error::io(from, &e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io(from, &e))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_file() && wanted(name) {
            fs::copy(&path, to.join(name)).map_err(|e| Error::io(&path, &e))?;
        }
    }
    Ok(())
}

/// `config.json` with a key that keeps other software from reading these weights as its own.
fn write_config(from: &Path, to: &Path, format: WeightFormat) -> Result<()> {
    let (from, to) = (from.join("config.json"), to.join("config.json"));
    let text = input_file::read_text(&from, MAX_JSON_BYTES).map_err(|e| Error::io(&from, &e))?;
    let mut config: Value = input_file::parse_json(&text).map_err(|e| Error::config(&from, e.to_string()))?;
    config["quantization_config"] = json!({"quant_method": QUANT_METHOD, "weights": format.name(), "group_size": 32});
    fs::write(&to, serde_json::to_string_pretty(&config).map_err(|e| Error::config(&from, e.to_string()))? + "\n")
        .map_err(|e| Error::io(&to, &e))
}
