//! Fixture directories: golden values, traces, and an engine over them.

use std::path::{Path, PathBuf};

use redraft::backend::{Backend, DType};
use redraft::cpu::Cpu;
use redraft::engine::{Engine, EngineOptions};
use redraft::plan::Visibility;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Version of the files' schema that these tests read.
const VERSION: u64 = 1;

/// A directory with a checkpoint and its golden values.
pub struct Fixture {
    pub name: String,
    pub dir: PathBuf,
    pub golden: Value,
    tensors: Vec<u8>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(value["version"].as_u64(), Some(VERSION), "{}: version", path.display());
    value
}

/// Every fixture there is. A listed one that is missing fails, an unlisted one is run all the same.
pub fn all() -> Vec<Fixture> {
    let mut names: Vec<String> = std::fs::read_dir(root())
        .expect("tests/fixtures")
        .map(|entry| entry.expect("a readable directory"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().expect("a plain name"))
        .collect();
    names.sort();
    let expected = [
        "bd3lm-adaln",
        "bd3lm-ar",
        "bd3lm-head64",
        "bd3lm-plain",
        "bd3lm-plain-bf16",
        "bd3lm-plain-sharded",
        "dream",
        "fast-dllm",
        "gpt2",
        "llada",
        "llada-moe",
        "llada2",
        "llama",
        "mdlm",
        "qwen2",
        "qwen3",
        "qwen3-moe",
        "rnd1",
        "sdar",
        "sdar-moe",
        "stable-diffcoder",
    ]
    .map(String::from);
    let missing: Vec<&String> = expected.iter().filter(|name| !names.contains(name)).collect();
    assert!(missing.is_empty(), "fixtures are missing: {missing:?}");
    names.iter().map(|name| Fixture::open(name)).collect()
}

impl Fixture {
    pub fn open(name: &str) -> Fixture {
        let dir = root().join(name);
        let golden = json(&dir.join("golden.json"));
        let path = dir.join("golden.safetensors");
        let tensors = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Fixture { name: name.into(), dir, golden, tensors }
    }

    pub fn cases(&self) -> &[Value] {
        self.golden["cases"].as_array().expect("cases")
    }

    /// One of the directory's files.
    pub fn json(&self, file: &str) -> Value {
        json(&self.dir.join(file))
    }

    /// Shape and values in another of the directory's files.
    pub fn floats_of(&self, file: &str, name: &str) -> (Vec<usize>, Vec<f32>) {
        let path = self.dir.join(file);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (shape, words) = self.view(&bytes, name, Dtype::F32);
        (shape, words.into_iter().map(f32::from_le_bytes).collect())
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<[u8; 4]>) {
        self.view(&self.tensors, name, dtype)
    }

    fn view(&self, bytes: &[u8], name: &str, dtype: Dtype) -> (Vec<usize>, Vec<[u8; 4]>) {
        let tensors = SafeTensors::deserialize(bytes).expect("golden tensors");
        let view = tensors.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        assert_eq!(view.dtype(), dtype, "{}: {name}", self.name);
        (view.shape().to_vec(), view.data().as_chunks::<4>().0.to_vec())
    }

    pub fn tokens(&self, name: &str) -> Vec<u32> {
        self.tensor(name, Dtype::I32).1.into_iter().map(|b| u32::try_from(i32::from_le_bytes(b)).expect("a token id")).collect()
    }

    /// Shape and values.
    pub fn floats(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, bytes) = self.tensor(name, Dtype::F32);
        (shape, bytes.into_iter().map(f32::from_le_bytes).collect())
    }

    pub fn engine(&self, threads: usize, dtype: DType) -> Engine<Cpu> {
        self.engine_on(Cpu::new(threads, dtype).expect("the CPU is always there"))
    }

    pub fn engine_on<B: Backend>(&self, backend: B) -> Engine<B> {
        // A stale slot that is read shows as NaN.
        let options = EngineOptions { poison_freed_pages: true, ..EngineOptions::default() };
        Engine::load(&self.dir, backend, options).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
}

/// `block_len` of a golden case or a trace's stage.
pub fn block_len(value: &Value) -> Option<usize> {
    match value {
        Value::String(full) if full == "full" => None,
        _ => Some(value.as_u64().expect("a block length") as usize),
    }
}

pub fn visibility(value: &Value) -> Visibility {
    block_len(value).map_or(Visibility::Full, Visibility::BlockCausal)
}

pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("`{key}` of {value}"))
}

/// What the engine says about `tokens`: the residual stream after the embedding and after each
/// layer, then the logits; rows of `width`.
pub fn forward<B: Backend>(engine: &mut Engine<B>, tokens: &[u32], visibility: Visibility) -> (Vec<Vec<f32>>, Vec<f32>) {
    let width = engine.config().hidden_dim;
    let mut hidden: Vec<Vec<f32>> = Vec::new();
    let mut logits: Vec<f32> = Vec::new();
    let mut probe = |backend: &B, layer: usize, x: &B::Buffer| {
        assert_eq!(layer, hidden.len(), "layers are shown in order");
        let mut rows = vec![0.0; tokens.len() * width];
        backend.download(x, 0, &mut rows)?;
        hidden.push(rows);
        Ok(())
    };
    let mut sink = |first: usize, rows: &[f32]| {
        assert_eq!(first * (logits.len() / first.max(1)), logits.len(), "logits are shown in order");
        logits.extend_from_slice(rows);
        Ok(())
    };
    engine.logits_with_probe(tokens, visibility, Some(&mut probe), &mut sink).expect("a forward");
    (hidden, logits)
}

/// The one measure of these tests: the largest difference within a row over the largest golden
/// magnitude of that row, worst row. NaN anywhere is infinitely wrong.
pub fn relative(found: &[f32], golden: &[f32], width: usize) -> f64 {
    assert_eq!(found.len(), golden.len(), "as many values as golden ones");
    let row = |(found, golden): (&[f32], &[f32])| {
        let scale = golden.iter().fold(0.0f64, |m, g| m.max(f64::from(g.abs())));
        let worst = found
            .iter()
            .zip(golden)
            .map(|(f, g)| (f64::from(*f) - f64::from(*g)).abs())
            .fold(0.0f64, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
        worst / scale
    };
    found.chunks_exact(width).zip(golden.chunks_exact(width)).map(row).fold(0.0, f64::max)
}

pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a row")
}
