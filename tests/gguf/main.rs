//! GGUF files: what llama.cpp's converter writes of a directory is the same model here; every block
//! type has the values of llama.cpp; hostile files are refused.
//!
//! `files/` is written by `tools/fixtures/write_gguf.py`.

mod build;
mod hostile;
mod smollm2;
mod tokens;
mod weights;

use std::path::{Path, PathBuf};

use redraft::config::ModelConfig;
use redraft::engine::Engine;
use redraft::model::registry;
use redraft::{Cpu, DType, EngineOptions};
use serde_json::Value;
use tempfile::TempDir;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn file(name: &str) -> PathBuf {
    root().join("tests/gguf/files").join(name)
}

/// The published file that some tests take, where it is there; `.ci/run` fetches it. With
/// REDRAFT_REQUIRE_SMOLLM2 its absence is a failure.
fn smollm2() -> Option<PathBuf> {
    let path = std::env::var_os("REDRAFT_SMOLLM2_GGUF").map(PathBuf::from);
    if path.is_none() {
        assert!(std::env::var_os("REDRAFT_REQUIRE_SMOLLM2").is_none(), "REDRAFT_SMOLLM2_GGUF names no file");
        eprintln!("skipped: REDRAFT_SMOLLM2_GGUF names no file");
    }
    path
}

/// Names of the fixtures that are there in f32.
const FIXTURES: [&str; 8] = ["dream", "llada", "llada-moe", "llama", "qwen2", "qwen3", "qwen3-moe", "rnd1"];

/// The directory that a file was made from: of models with experts in one layer, that layer alone.
fn directory(name: &str) -> (PathBuf, Option<TempDir>) {
    let source = root().join("tests/fixtures").join(name);
    let kept = match name {
        "qwen3-moe" => 1,
        "llada-moe" => 0,
        _ => return (source, None),
    };
    let copy = tempfile::tempdir().expect("a directory");
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).expect("a file")).expect("JSON");
    config["num_hidden_layers"] = 1.into();
    config["moe_layer_freq"] = vec![1].into();
    config["mlp_only_layers"] = Vec::<u8>::new().into();
    // No key of llama.cpp: every published model says so.
    config["norm_topk_prob"] = (name == "qwen3-moe").into();
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("a file");
    std::fs::copy(source.join("tokenizer.json"), copy.path().join("tokenizer.json")).expect("a copy");
    // Names in the header of the weights, which keep their length.
    let mut bytes = std::fs::read(source.join("model.safetensors")).expect("a file");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let text = std::str::from_utf8(&bytes[8..header]).expect("UTF-8");
    let text = if kept == 1 { text.replace("layers.0.", "layers.9.").replace("layers.1.", "layers.0.") } else { text.to_owned() };
    bytes[8..header].copy_from_slice(text.as_bytes());
    std::fs::write(copy.path().join("model.safetensors"), bytes).expect("a file");
    (copy.path().to_path_buf(), Some(copy))
}

fn engine(model: &Path) -> Engine<Cpu> {
    let cpu = Cpu::new(1, DType::F32).expect("the CPU is always there");
    Engine::load(model, cpu, EngineOptions::default()).unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

/// Logits of a fixed text, as bits.
fn logits(model: &Path) -> Vec<u32> {
    let mut engine = engine(model);
    let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 64).collect();
    let visibility = engine.config().attention.visibility();
    let mut bits = Vec::new();
    let mut keep = |_: usize, logits: &[f32]| {
        bits.extend(logits.iter().map(|value| value.to_bits()));
        Ok(())
    };
    engine.logits(&tokens, visibility, &mut keep).expect("logits");
    bits
}

#[test]
fn logits_are_those_of_the_directory() {
    for name in FIXTURES {
        let (dir, _copy) = directory(name);
        assert!(logits(&file(&format!("{name}-f32.gguf"))) == logits(&dir), "{name}: logits differ");
    }
}

#[test]
fn parts_of_a_split_model_are_read_together() {
    let (first, whole) = (file("llada-split-00001-of-00003.gguf"), file("llada-f32.gguf"));
    assert!(logits(&first) == logits(&whole), "logits differ");
    let error = |path: &Path| registry::read_config(path).expect_err("an error").to_string();
    let second = error(&file("llada-split-00002-of-00003.gguf"));
    assert!(second.contains("part 2 of 3: name the first, ") && second.contains("llada-split-00001-of-00003.gguf"), "{second}");
    // A part that is absent, and one that was renamed.
    let dir = tempfile::tempdir().expect("a directory");
    let copy = |from: &str, to: &str| {
        std::fs::copy(file(from), dir.path().join(to)).expect("a copy");
    };
    copy("llada-split-00001-of-00003.gguf", "a-00001-of-00003.gguf");
    let missing = error(&dir.path().join("a-00001-of-00003.gguf"));
    assert!(missing.contains("a-00002-of-00003.gguf") && missing.contains("cannot open"), "{missing}");
    copy("llada-split-00003-of-00003.gguf", "a-00002-of-00003.gguf");
    let swapped = error(&dir.path().join("a-00001-of-00003.gguf"));
    assert!(swapped.contains("expected split.no 1"), "{swapped}");
    copy("llada-split-00001-of-00003.gguf", "b.gguf");
    let renamed = error(&dir.path().join("b.gguf"));
    assert!(renamed.contains("-00001-of-00003.gguf"), "{renamed}");
}

/// All of a configuration but where it lies, and what GGUF has no words for.
#[test]
fn configurations_are_those_of_the_directory() {
    for name in FIXTURES {
        let (dir, _copy) = directory(name);
        let read = |path: &Path| registry::read_config(path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (found, expected) = (read(&file(&format!("{name}-f32.gguf"))), read(&dir));
        let expected = ModelConfig { dir: found.dir.clone(), ..expected };
        // The converter passes over lists of ids.
        let ModelConfig { eos_id, stop_ids, .. } = found.clone();
        let expected = if name == "qwen3" { ModelConfig { eos_id, stop_ids, ..expected } } else { expected };
        assert_eq!(found, expected, "{name}");
    }
}

/// A directory that holds one file, or the parts of one model, is that model.
#[test]
fn a_directory_with_one_file_is_that_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let copy = |name: &str| {
        std::fs::copy(file(name), dir.path().join(name)).expect("a copy");
    };
    for number in 1..=3 {
        copy(&format!("llada-split-{number:05}-of-00003.gguf"));
    }
    assert!(logits(dir.path()) == logits(&file("llada-f32.gguf")));
    copy("llama-q8_0.gguf");
    let error = registry::read_config(dir.path()).expect_err("two to choose from").to_string();
    assert!(error.contains("2 GGUF files") && error.contains("llada-split-00001-of-00003.gguf"), "{error}");
    std::fs::write(dir.path().join("config.json"), "{}").expect("a file");
    let error = registry::read_config(dir.path()).expect_err("a directory of files").to_string();
    assert!(error.contains("model_type"), "{error}");
}
