//! Files that are cut, spoiled or made up: errors that name the culprit, no panics, little memory.

use std::path::{Path, PathBuf};

use redraft::model::registry;
use redraft::weights::Weights;
use redraft::{Error, Result};
use tempfile::TempDir;

use crate::build::{self, File, list, text, texts, u32_value};

struct Place {
    _dir: TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.gguf");
        Place { _dir: dir, path }
    }
}

/// Everything that is read of a model before its first forward, every value included.
fn load(path: &Path) -> Result<()> {
    let config = registry::read_config(path)?;
    let weights = Weights::open(path)?;
    if let Some(error) = registry::check(&config, &weights).into_iter().next() {
        return Err(error);
    }
    weights.tensor("model.embed_tokens.weight", &[config.vocab_size, config.hidden_dim])?.to_vec()?;
    weights.tensor("model.layers.0.self_attn.q_proj.weight", &[config.heads.q_width(), config.hidden_dim])?.to_vec()?;
    Ok(())
}

fn error_of(bytes: &[u8]) -> String {
    let place = Place::new();
    std::fs::write(&place.path, bytes).expect("a file");
    let error = load(&place.path).expect_err("an error").to_string();
    assert!(error.contains("a.gguf"), "no file in: {error}");
    error
}

/// The error of an edited file, which has all the words.
#[track_caller]
fn refused(edit: impl FnOnce(&mut File), words: &[&str]) {
    let mut file = File::llama();
    edit(&mut file);
    let error = error_of(&file.bytes());
    for word in words {
        assert!(error.contains(word), "no `{word}` in: {error}");
    }
}

#[test]
fn the_file_that_others_are_made_of_loads() {
    let place = Place::new();
    for version in [2, 3] {
        std::fs::write(&place.path, File { version, ..File::llama() }.bytes()).expect("a file");
        load(&place.path).expect("loads");
    }
    let mut file = File::llama();
    file.alignment = 64;
    file.set("general.alignment", u32_value(64));
    file.set("general.tags", list(9, 2, &[list(4, 1, &[1, 0, 0, 0]).1, list(8, 0, &[]).1].concat()));
    std::fs::write(&place.path, file.bytes()).expect("a file");
    load(&place.path).expect("loads with another alignment and lists of lists");
}

#[test]
fn headers_are_checked() {
    let whole = File::llama().bytes();
    assert!(error_of(b"").contains("empty file"));
    assert!(error_of(b"GGU").contains("not a GGUF file"));
    assert!(error_of(b"GGUF").contains("cut short: the version"));
    assert!(error_of(b"PK\x03\x04 and more").contains("zip archive"));
    let with = |at: usize, bytes: &[u8]| {
        let mut copy = whole.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        error_of(&copy)
    };
    assert!(with(4, &1u32.to_le_bytes()).contains("GGUF version 1: expected 2 or 3"));
    assert!(with(4, &4u32.to_le_bytes()).contains("GGUF version 4: expected 2 or 3"));
    assert!(with(4, &3u32.to_be_bytes()).contains("big-endian GGUF file (version 3)"));
    for count in [1 << 17, 1 << 40, u64::MAX] {
        assert!(with(8, &count.to_le_bytes()).contains("number of tensors"), "{count} tensors");
        assert!(with(16, &count.to_le_bytes()).contains("number of metadata keys"), "{count} keys");
    }
    assert!(with(8, &5000u64.to_le_bytes()).contains("cut short: number of tensors: 5000"));
    // The first key's length.
    for len in [1 << 20, u64::MAX] {
        assert!(with(24, &len.to_le_bytes()).contains("metadata key 0 would have"), "a key of {len} bytes");
    }
    assert!(with(24, &0u64.to_le_bytes()).contains("metadata key 0 is empty"));
}

#[test]
fn metadata_is_checked() {
    refused(|f| f.keys.push(f.keys[0].clone()), &["general.architecture", "twice"]);
    refused(|f| f.set("a", (13, Vec::new())), &["metadata key `a`", "type 13"]);
    refused(|f| f.set("a", (8, u64::MAX.to_le_bytes().to_vec())), &["metadata key `a` would have 18446744073709551615 bytes"]);
    refused(|f| f.set("a", list(10, 1 << 40, &[])), &["metadata key `a`", "cut short"]);
    refused(|f| f.set("a", list(8, 1 << 12, &[])), &["metadata key `a`", "cut short"]);
    let nested = (0..9).fold(list(4, 0, &[]), |inner, _| list(9, 1, &inner.1));
    refused(|f| f.set("a", nested), &["metadata key `a`", "lists inside of each other"]);
    refused(|f| f.set("general.alignment", u32_value(24)), &["general.alignment", "power of two"]);
    refused(|f| f.set("general.alignment", u32_value(0)), &["general.alignment", "power of two"]);
    refused(|f| f.set("general.alignment", text("32")), &["general.alignment", "power of two"]);
    refused(|f| f.set("general.architecture", text("gemma3")), &["`gemma3` is not supported", "llada-moe"]);
    refused(|f| f.set("general.architecture", u32_value(1)), &["general.architecture", "expected a text, found 1"]);
    refused(|f| f.set("general.type", text("adapter")), &["general.type", "expected a model, found `adapter`"]);
    refused(|f| f.set("general.architecture", text("\u{1b}[2J")), &["\\u{1b}[2J"]);
}

#[test]
fn the_model_that_metadata_describe_is_checked() {
    for key in ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let full = format!("llama.{key}");
        refused(|f| f.keys.retain(|(other, _)| *other != full), &[if key == "feed_forward_length" { "intermediate_size" } else { &full }]);
        refused(|f| f.set(&full, text("many")), &[&full, "found the text `many`"]);
    }
    refused(|f| f.set("llama.block_count", u32_value(0)), &["num_hidden_layers"]);
    refused(|f| f.set("llama.block_count", u32_value(u32::MAX)), &["num_hidden_layers"]);
    refused(|f| f.set("llama.block_count", u32_value(2)), &["model.layers.1"]);
    refused(|f| f.set("llama.attention.head_count", u32_value(0)), &["head_count", "from 1"]);
    refused(|f| f.set("llama.attention.head_count", u32_value(3)), &["head_count", "divide"]);
    refused(|f| f.set("llama.attention.head_count_kv", list(4, 2, &[1, 0, 0, 0, 2, 0, 0, 0])), &["head_count_kv", "differ between layers"]);
    refused(|f| f.set("llama.attention.head_count_kv", list(4, 0, &[])), &["head_count_kv", "empty list"]);
    refused(|f| f.set("llama.attention.value_length", u32_value(8)), &["value_length", "expected 16"]);
    refused(|f| f.set("llama.rope.dimension_count", u32_value(8)), &["rope.dimension_count", "whole heads of 16"]);
    refused(|f| f.set("llama.rope.scaling.type", text("yarn")), &["rope.scaling.type", "`yarn` is not supported"]);
    refused(|f| f.set("llama.rope.freq_base", build::f32_value(f32::NAN)), &["rope.freq_base", "finite"]);
    refused(|f| f.set("llama.attention.causal", build::bool_value(false)), &["attention.causal", "expected true"]);
    refused(|f| f.set("llama.attention.sliding_window", u32_value(16)), &["sliding_window", "16 positions back"]);
    refused(|f| f.set("llama.expert_count", u32_value(8)), &["expert_count", "experts of architecture llama"]);
    refused(|f| f.add("rope_freqs", &[8]), &["rope_freqs.weight", "Llama 3.1"]);
    refused(|f| f.add("rope_freqs", &[4]), &["rope_freqs.weight", "expected 8 values"]);
    refused(|f| f.set("split.count", u32_value(1 << 20)), &["split.count", "at most"]);
    refused(|f| f.set("split.count", u32_value(2)), &["part 1 of 2", "-00001-of-00002.gguf"]);
}

#[test]
fn tensors_are_checked() {
    const EMBEDDING: &str = "token_embd.weight";
    refused(|f| f.tensor(EMBEDDING).dims[1] = 0, &[EMBEDDING, "a dimension that is 0"]);
    refused(|f| f.tensor(EMBEDDING).dims[1] = u64::MAX, &[EMBEDDING, "beyond 64 bits"]);
    refused(|f| f.tensor(EMBEDDING).dims = vec![1 << 40, 1 << 40], &[EMBEDDING, "more elements than 64 bits"]);
    refused(|f| f.tensor(EMBEDDING).dims = vec![1 << 40, 1 << 22], &[EMBEDDING, "bytes"]);
    refused(|f| f.tensor(EMBEDDING).dims = vec![2; 5], &[EMBEDDING, "5 dimensions"]);
    refused(|f| f.tensor(EMBEDDING).dims = Vec::new(), &[EMBEDDING, "0 dimensions"]);
    refused(|f| f.tensor(EMBEDDING).dims = vec![256], &[EMBEDDING, "expected two dimensions"]);
    refused(|f| f.tensor(EMBEDDING).kind = 99, &[EMBEDDING, "type 99 is not known"]);
    for (kind, name, dims) in [(10, "Q2_K", [256, 1]), (20, "IQ4_NL", [32, 8]), (39, "MXFP4", [32, 8])] {
        refused(|f| (f.tensor(EMBEDDING).kind, f.tensor(EMBEDDING).dims) = (kind, dims.to_vec()), &[name]);
    }
    refused(|f| f.tensor("blk.0.attn_v.weight").kind = 34, &["TQ1_0", "blk.0.attn_v.weight", "multiple of 256"]);
    refused(|f| f.tensor("blk.0.attn_v.weight").kind = 20, &["IQ4_NL", "blk.0.attn_v.weight", "is not read", "Q4_K"]);
    refused(|f| (f.tensor("blk.0.attn_v.weight").kind, f.tensor("blk.0.attn_v.weight").dims[0]) = (8, 48), &["Q8_0", "multiple of 32"]);
    refused(|f| f.tensor("blk.0.attn_norm.weight").kind = 8, &["blk.0.attn_norm.weight", "a vector of type Q8_0"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").dims[1] = 24, &["blk.0.attn_q.weight", "whole heads of 16"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").dims[1] = 16, &["blk.0.attn_q.weight", "expected shape [32, 32], found [16, 32]"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").offset = Some(0), &["overlap"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").offset = Some(7), &["blk.0.attn_q.weight", "no multiple of the alignment"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").offset = Some(1 << 50), &["cut short: tensor blk.0.attn_q.weight"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").offset = Some(u64::MAX - 31), &["cut short: tensor blk.0.attn_q.weight"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").name = EMBEDDING.into(), &[EMBEDDING, "twice"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").name = String::new(), &["name of tensor 1 is empty"]);
    refused(
        |f| f.tensor("blk.0.attn_q.weight").name = "blk.0.ssm_a.weight".into(),
        &["blk.0.ssm_a.weight", "not a tensor of architecture llama"],
    );
    refused(|f| f.tensor("blk.0.attn_q.weight").name = "blk.00.attn_q.weight".into(), &["blk.00.attn_q.weight", "not a tensor"]);
    refused(|f| f.tensors.retain(|t| t.name != "blk.0.attn_q.weight"), &["model.layers.0.self_attn.q_proj.weight is missing"]);
    refused(|f| f.tensors.retain(|t| t.name != EMBEDDING), &["token_embd.weight is missing"]);
    refused(|f| f.tensor(EMBEDDING).bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes()), &["element 1 is NaN"]);
    refused(|f| f.tensor("blk.0.attn_q.weight").bytes[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes()), &["q_proj", "element 1 is inf"]);
}

/// Cut anywhere before its last tensor's end, a file is refused.
#[test]
fn cut_files_are_refused() {
    let whole = File::llama().bytes();
    let place = Place::new();
    let header = whole.len() - (8 + 32 + 16 + 16 + 32 + 3 * 32 + 3) * 32 * 4;
    for len in (0..header).chain((header..whole.len()).step_by(997)).chain([whole.len() - 1]) {
        std::fs::write(&place.path, &whole[..len]).expect("a file");
        let error = load(&place.path).expect_err("an error");
        let named = matches!(&error, Error::Weights { path, .. } | Error::Config { path, .. } if *path == place.path);
        assert!(named, "cut to {len}: {error}");
    }
}

/// Bytes of the header that are changed one by one, several at once, and replaced by extreme
/// lengths: what comes out is a model or an error, soon.
#[test]
fn changed_bytes_give_errors_and_no_panics() {
    let mut file = File::llama();
    file.set("tokenizer.ggml.model", text("gpt2"));
    file.set("tokenizer.ggml.pre", text("gpt-2"));
    file.set("tokenizer.ggml.tokens", texts(&["a", "b", "c", "ab", "Ġ", "Ċ", "<s>", "</s>"]));
    file.set("tokenizer.ggml.token_type", list(5, 8, &[1, 1, 1, 1, 1, 1, 3, 3].map(i32::to_le_bytes).concat()));
    file.set("tokenizer.ggml.merges", texts(&["a b"]));
    let whole = file.bytes();
    let header = whole.len() - (8 + 32 + 16 + 16 + 32 + 3 * 32 + 3) * 32 * 4;
    let place = Place::new();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let begin = std::time::Instant::now();
    let mut loaded = 0;
    const ROUNDS: usize = 3000;
    for round in 0..ROUNDS {
        let mut bytes = whole.clone();
        for _ in 0..1 + round % 3 {
            let at = random(header);
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                _ => {
                    let extreme = [0, 1, u64::MAX, i64::MAX as u64, 1 << 32, 1 << 62][random(6)].to_le_bytes();
                    let end = (at + 8).min(header);
                    bytes[at..end].copy_from_slice(&extreme[..end - at]);
                }
            }
        }
        std::fs::write(&place.path, &bytes).expect("a file");
        loaded += usize::from(load(&place.path).is_ok());
    }
    assert!(loaded > ROUNDS / 50 && loaded < ROUNDS / 2, "{loaded} of {ROUNDS} load");
    // A length that is believed would take seconds for each.
    assert!(begin.elapsed().as_secs() < 60, "{ROUNDS} files took {:?}", begin.elapsed());
}
