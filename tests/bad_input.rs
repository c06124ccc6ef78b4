//! Checkpoints are hostile input: each spoiled copy of a good directory is refused with an error
//! that names the culprit, and none panics.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use redraft::config::AttentionMask;
use redraft::engine::Engine;
use redraft::{Cpu, DType, EngineOptions, Error, Schedule};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a fixture's checkpoint that may be spoiled.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn of(name: &str) -> Copy {
        let dir = tempfile::tempdir().expect("a directory");
        for entry in std::fs::read_dir(fixture(name)).expect("a fixture") {
            let path = entry.expect("an entry").path();
            let file = path.file_name().expect("a name").to_str().expect("a plain name").to_string();
            if file.starts_with("config") || file.starts_with("model") || file.starts_with("tokenizer") {
                std::fs::copy(&path, dir.path().join(file)).expect("a copy");
            }
        }
        Copy { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a file")
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).expect("a file");
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).expect("JSON")
    }

    /// Rewrites a JSON file.
    fn edit(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut value = self.json(name);
        edit(value.as_object_mut().expect("an object"));
        self.write(name, value.to_string());
    }

    /// Header and data of the weights.
    fn weights(&self) -> (Map<String, Value>, Vec<u8>) {
        let bytes = self.read("model.safetensors");
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let map = serde_json::from_slice::<Value>(&bytes[8..header]).expect("JSON").as_object().expect("an object").clone();
        (map, bytes[header..].to_vec())
    }

    fn set_weights(&self, header: &Map<String, Value>, data: &[u8]) {
        self.write("model.safetensors", container(&Value::Object(header.clone()).to_string(), data));
    }

    fn load(&self) -> Result<Engine<Cpu>, Error> {
        Engine::load(self.dir.path(), Cpu::new(1, DType::F32).expect("the CPU is always there"), EngineOptions::default())
    }

    /// Loading fails, and the error's text holds every word; `kind` names its variant.
    fn refused(&self, label: &str, kind: &str, words: &[&str]) {
        let error = self.load().err().unwrap_or_else(|| panic!("{label}: was loaded"));
        let (debug, text) = (format!("{error:?}"), error.to_string());
        assert!(debug.starts_with(kind), "{label}: expected {kind}, found {debug}");
        for word in words {
            assert!(text.contains(word), "{label}: no `{word}` in: {text}");
        }
    }
}

/// A safetensors file.
fn container(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

const WEIGHTS: &str = "model.safetensors";
const NORM: &str = "backbone.blocks.0.norm1.weight";
const EMBEDDING: &str = "backbone.vocab_embed.embedding";

/// The copy itself is good: what follows fails for its own reason.
#[test]
fn an_unspoiled_copy_loads() {
    for name in ["bd3lm-plain", "bd3lm-plain-sharded", "bd3lm-adaln", "mdlm", "llama", "qwen2", "qwen3"] {
        Copy::of(name).load().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn truncated_weights() {
    let copy = Copy::of("bd3lm-plain");
    let bytes = copy.read(WEIGHTS);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    for len in [0, 1, 7, 8, 9, header / 2, header - 1, header, header + 1, (header + bytes.len()) / 2, bytes.len() - 1] {
        copy.write(WEIGHTS, &bytes[..len]);
        let label = format!("{len} of {} bytes", bytes.len());
        copy.refused(&label, "Weights", &[WEIGHTS]);
    }
    let longer = [&bytes[..], &[0; 16]].concat();
    copy.write(WEIGHTS, longer);
    copy.refused("16 bytes too many", "Weights", &[WEIGHTS]);
}

#[test]
fn lying_headers() {
    let copy = Copy::of("bd3lm-plain");
    let (header, data) = copy.weights();
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 40, 1 << 32, i64::MAX as u64] {
        let mut bytes = copy.read(WEIGHTS);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        copy.write(WEIGHTS, bytes);
        copy.refused(&format!("header of {length} bytes"), "Weights", &[WEIGHTS]);
        copy.set_weights(&header, &data);
    }
    for text in ["", "{", "[]", "null", "{}x", "\u{0}", "{\"a\": 1}", "{\"a\": {\"dtype\": \"F32\"}}", &"[".repeat(100_000)] {
        copy.write(WEIGHTS, container(text, &data));
        copy.refused(&format!("header `{}`", &text[..text.len().min(20)]), "Weights", &[WEIGHTS]);
    }
    let norm = header[NORM]["data_offsets"].clone();
    let (start, end) = (norm[0].as_u64().expect("an offset"), norm[1].as_u64().expect("an offset"));
    for offsets in [
        json!([start - 4, end - 4]),
        json!([start + 4, end + 4]),
        json!([end, start]),
        json!([start, end + 4]),
        json!([u64::MAX - 3, u64::MAX]),
        json!([0, u64::MAX]),
        json!([-4, 0]),
        json!([start]),
    ] {
        let mut spoiled = header.clone();
        spoiled[NORM]["data_offsets"] = offsets.clone();
        copy.set_weights(&spoiled, &data);
        copy.refused(&format!("offsets {offsets}"), "Weights", &[WEIGHTS]);
    }
    // Two tensors over the same bytes.
    let mut spoiled = header.clone();
    spoiled[NORM]["data_offsets"] = header["backbone.blocks.0.norm2.weight"]["data_offsets"].clone();
    copy.set_weights(&spoiled, &data);
    copy.refused("overlapping tensors", "Weights", &[WEIGHTS]);
}

#[test]
fn wrong_tensors() {
    let copy = Copy::of("bd3lm-plain");
    let (header, data) = copy.weights();
    let spoil = |label: &str, words: &[&str], edit: &dyn Fn(&mut Map<String, Value>)| {
        let mut spoiled = header.clone();
        edit(&mut spoiled);
        copy.set_weights(&spoiled, &data);
        copy.refused(label, "Weights", &[&[WEIGHTS], words].concat());
    };
    for name in [NORM, EMBEDDING, "backbone.output_layer.linear.bias", "backbone.blocks.0.mlp.2.weight"] {
        spoil("renamed", &[name, "missing"], &|h| {
            let tensor = h.remove(name).expect("a tensor");
            h.insert(format!("{name}.old"), tensor);
        });
    }
    spoil("transposed", &[EMBEDDING, "[67, 32]", "[32, 67]"], &|h| h[EMBEDDING]["shape"] = json!([32, 67]));
    spoil("flat", &[EMBEDDING, "[67, 32]", "[2144]"], &|h| h[EMBEDDING]["shape"] = json!([67 * 32]));
    spoil("one more dimension", &[NORM, "[32]", "[1, 32]"], &|h| h[NORM]["shape"] = json!([1, 32]));
    // Several at once: the first few are named, the others counted.
    spoil("everything renamed", &[EMBEDDING, "; tensor backbone.", "missing", "; and 8 more"], &|h| {
        let renamed =
            h.iter().map(|(name, tensor)| (if name == "__metadata__" { name.clone() } else { format!("old.{name}") }, tensor.clone()));
        *h = renamed.collect();
    });
    spoil("two kinds of trouble", &[EMBEDDING, "[32, 67]", &format!("; tensor {NORM}: expected dtype"), "I32"], &|h| {
        h[EMBEDDING]["shape"] = json!([32, 67]);
        h[NORM]["dtype"] = json!("I32");
    });
    for dtype in ["I32", "U32"] {
        spoil("integers", &[NORM, dtype, "BF16"], &|h| h[NORM]["dtype"] = json!(dtype));
    }
    spoil("wide integers", &[WEIGHTS], &|h| h[NORM]["dtype"] = json!("I64"));
    spoil("no such dtype", &[WEIGHTS], &|h| h[NORM]["dtype"] = json!("F7"));
    spoil("a huge shape", &[WEIGHTS], &|h| h[NORM]["shape"] = json!([u64::MAX, 2]));

    // Integers and floats of other widths that fill their bytes honestly.
    for (dtype, size) in [("I64", 8), ("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U8", 1)] {
        let (mut spoiled, mut data) = (header.clone(), data.clone());
        let start = data.len() as u64;
        data.extend(vec![0; 32 * size]);
        let name = "backbone.extra";
        let end = start + 32 * size as u64;
        spoiled.insert(name.into(), json!({"dtype": dtype, "shape": [32], "data_offsets": [start, end]}));
        copy.set_weights(&spoiled, &data);
        copy.load().unwrap_or_else(|e| panic!("a tensor nobody asks for is nobody's business: {e}"));
        let good = spoiled.remove(NORM).expect("a tensor");
        let other = spoiled.remove(name).expect("a tensor");
        spoiled.insert(NORM.into(), other);
        spoiled.insert(name.into(), good);
        copy.set_weights(&spoiled, &data);
        copy.refused(dtype, "Weights", &[WEIGHTS, NORM, dtype, "F32, BF16 or F16"]);
    }
}

/// In every kind of tensor: packed matrices, tables, norms and biases, folded modulation.
#[test]
fn values_that_are_not_finite() {
    for (fixture, names) in [
        (
            "bd3lm-plain",
            &[NORM, EMBEDDING, "backbone.blocks.0.attn_qkv.weight", "backbone.blocks.0.mlp.2.bias", "backbone.output_layer.linear.weight"]
                [..],
        ),
        (
            "bd3lm-adaln",
            &["backbone.blocks.1.adaLN_modulation.weight", "backbone.sigma_map.mlp.0.bias", "backbone.output_layer.linear.bias"],
        ),
        ("bd3lm-head64", &["backbone.blocks.1.attn_out.weight"]),
    ] {
        for name in names {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let copy = Copy::of(fixture);
                let (header, mut data) = copy.weights();
                let tensor = &header[*name];
                let size = if tensor["dtype"] == "BF16" { 2 } else { 4 };
                let end = tensor["data_offsets"][1].as_u64().expect("an offset") as usize;
                let count = (end - tensor["data_offsets"][0].as_u64().expect("an offset") as usize) / size;
                // The last element: reading to the end is reading all of it. The upper half of an
                // f32 is its bf16.
                data[end - size..end].copy_from_slice(&value.to_le_bytes()[4 - size..]);
                copy.set_weights(&header, &data);
                let element = format!("element {}", count - 1);
                copy.refused(&format!("{value} in {name}"), "Weights", &[WEIGHTS, name, &element, &value.to_string()]);
            }
        }
    }
}

#[test]
fn broken_configurations() {
    let copy = Copy::of("bd3lm-adaln");
    let good = copy.json("config.json");
    for text in ["", "{", "[]", "null", "3", "\"bd3lm\"", "{\"model_type\": \"bd3lm\",}", "\u{feff}{}", &"[".repeat(100_000)] {
        copy.write("config.json", text);
        copy.refused(&format!("config `{}`", &text[..text.len().min(30)]), "Config", &["config.json"]);
    }
    copy.write("config.json", [0xff, 0xfe, 0x00]);
    copy.refused("config that is not UTF-8", "Config", &["config.json"]);
    let spoil = |key: &str, value: Option<Value>, words: &[&str]| {
        let label = format!("{key}: {value:?}");
        let mut spoiled = good.clone();
        let map = spoiled.as_object_mut().expect("an object");
        match value {
            None => map.remove(key).map(drop).unwrap_or_else(|| panic!("{label}: no such key")),
            Some(value) => drop(map.insert(key.into(), value)),
        }
        copy.write("config.json", spoiled.to_string());
        copy.refused(&label, "Config", &[&["config.json"], words].concat());
    };
    for key in ["vocab_size", "hidden_dim", "n_heads", "n_blocks", "model_length", "cond_dim"] {
        for value in [None, Some(Value::Null)] {
            spoil(key, value, &[key, "missing"]);
        }
        for value in [
            json!(0),
            json!(-4),
            json!(1u64 << 60),
            json!(u64::MAX),
            json!(1e300),
            json!(32.5),
            json!("32"),
            json!([32]),
            json!(true),
            json!({}),
        ] {
            spoil(key, Some(value.clone()), &[key, &value.to_string()]);
        }
    }
    for value in [json!(0), json!(-1), json!("4"), json!(u64::MAX)] {
        spoil("block_size", Some(value), &["block_size"]);
    }
    // Three heads of 32 are 96.
    for value in [5, 7, 96, 97] {
        spoil("n_heads", Some(json!(value)), &["hidden_dim 96", &format!("n_heads {value}"), "even"]);
    }
    for key in ["time_conditioning", "causal", "cross_attn", "adaln"] {
        for value in [json!(1), json!("true"), json!([])] {
            spoil(key, Some(value), &[key, "true or false"]);
        }
    }
    spoil("time_conditioning", Some(json!(true)), &["time_conditioning", "only models without"]);
    spoil("vocab_size", Some(json!(2)), &["vocab_size", "at least 3"]);
    for value in [json!(131), json!(-1), json!("x"), json!(u64::MAX)] {
        spoil("mask_token_id", Some(value), &["mask_token_id", "131"]);
    }
    for key in ["eos_token_id", "bos_token_id", "pad_token_id"] {
        for value in [json!("x"), json!(2.5), json!({})] {
            spoil(key, Some(value), &[key, "131"]);
        }
    }
    for value in [json!("bert"), json!("BD3LM"), json!("bd3lm ")] {
        let shown = value.as_str().expect("text").to_string();
        spoil("model_type", Some(value), &[&shown, "bd3lm", "mdlm"]);
    }
    copy.write("config.json", json!({"vocab_size": 131}).to_string());
    copy.refused("no family", "Config", &["config.json", "supported"]);
    std::fs::remove_file(copy.path("config.json")).expect("a file");
    copy.refused("no config", "Config", &["config.json"]);
    let nowhere = Engine::load(&copy.path("nowhere"), Cpu::new(1, DType::F32).expect("a CPU"), EngineOptions::default());
    assert!(nowhere.err().expect("refused").to_string().contains("nowhere"));
}

/// The keys of the Llama layout.
#[test]
fn broken_configurations_of_plain_decoders() {
    let spoil = |name: &str, key: &str, value: Option<Value>, words: &[&str]| {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| match value.clone() {
            None => drop(c.remove(key)),
            Some(value) => drop(c.insert(key.into(), value)),
        });
        copy.refused(&format!("{name} {key}: {value:?}"), "Config", &[&["config.json"], words].concat());
    };
    for name in ["llama", "qwen2", "qwen3"] {
        for key in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"]
        {
            spoil(name, key, None, &[key, "missing"]);
            for value in [json!(0), json!(-4), json!(u64::MAX), json!(1e300), json!(2.5), json!("32"), json!([2])] {
                spoil(name, key, Some(value.clone()), &[key, &value.to_string()]);
            }
        }
        spoil(name, "architectures", Some(json!([format!("{name}ForSequenceClassification")])), &["architectures", "ForCausalLM"]);
        spoil(name, "auto_map", Some(json!({"AutoModelForCausalLM": "modeling_other.Other"})), &["auto_map", "code of its own"]);
        spoil(name, "quantization_config", Some(json!({"bits": 4})), &["quantization_config", "quantised"]);
        spoil(name, "hidden_act", Some(json!("gelu")), &["hidden_act", "silu", "gelu"]);
        spoil(name, "hidden_act", Some(json!(1)), &["hidden_act", "text"]);
        spoil(name, "tie_word_embeddings", Some(json!(1)), &["tie_word_embeddings", "true or false"]);
        spoil(name, "num_key_value_heads", Some(json!(5)), &["num_key_value_heads 5", "multiple"]);
        spoil(name, "head_dim", Some(json!(15)), &["head width 15", "even"]);
        for value in [json!(0), json!(-1e-6), json!(1e300), json!("x"), json!([])] {
            spoil(name, "rms_norm_eps", Some(value.clone()), &["rms_norm_eps", "above 0", &value.to_string()]);
        }
        for value in [json!("x"), json!(["x"]), json!([2, 2.5])] {
            spoil(name, "eos_token_id", Some(value.clone()), &["eos_token_id", "67"]);
            spoil(name, "bos_token_id", Some(value), &["bos_token_id", "67"]);
        }
        for (key, value) in [("rope_parameters", json!(3)), ("rope_scaling", json!("llama3"))] {
            // The older key is looked at first.
            spoil(if key == "rope_scaling" { name } else { "qwen3" }, key, Some(value), &[key, "object"]);
        }
        for kind in ["yarn", "dynamic", "longrope", "mrope", "su"] {
            spoil(name, "rope_scaling", Some(json!({"type": kind, "factor": 2.0})), &["rotary", kind, "linear, llama3"]);
        }
        spoil(name, "rope_scaling", Some(json!({"rope_type": "linear"})), &["factor", "missing"]);
        spoil(name, "rope_scaling", Some(json!({"rope_type": "linear", "factor": 0})), &["rope_scaling.factor", "above 0"]);
        let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4});
        spoil(name, "rope_scaling", Some(llama3), &["high_freq_factor 4", "low_freq_factor 4"]);
        let kinds = json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}});
        spoil(name, "rope_scaling", Some(kinds), &["differ between layers"]);
        spoil(name, "rope_scaling", Some(json!({"full_attention": {}, "rope_theta": 1e4})), &["differ between layers"]);
        spoil(name, "partial_rotary_factor", Some(json!(0.5)), &["partial_rotary_factor", "0.5"]);
    }
    spoil("qwen2", "rope_theta", Some(json!("x")), &["rope_theta", "above 0"]);
    spoil("qwen2", "num_attention_heads", Some(json!(6)), &["hidden_size 64", "num_attention_heads 6"]);
}

/// Experts that no router can choose among, and what the published code does otherwise.
#[test]
fn broken_configurations_of_experts() {
    let refused = |name: &str, key: &str, value: Value, words: &[&str]| {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| drop(c.insert(key.into(), value.clone())));
        copy.refused(&format!("{name} {key} {value}"), "Config", &[&["config.json"], words].concat());
    };
    for name in ["llada2", "llada-moe", "sdar-moe", "rnd1"] {
        refused(name, "num_experts_per_tok", json!(9), &["9 experts for each row", "expected 1 to"]);
        refused(name, "num_experts_per_tok", json!(0), &["num_experts_per_tok", "from 1"]);
        refused(name, "num_experts", json!(2000), &["2000 experts", "1 to 1024"]);
        refused(name, "num_experts", json!("x"), &["num_experts", "from 1"]);
    }
    refused("llada2", "n_group", json!(3), &["3 groups", "equal size", "8 experts"]);
    refused("llada2", "n_group", json!(8), &["8 groups of one expert"]);
    refused("llada2", "topk_group", json!(5), &["5 groups kept", "1 to 4"]);
    refused("llada2", "topk_group", json!(1), &["3 experts for each row", "1 to 2"]);
    refused("llada2", "num_experts_per_tok", json!(1), &["num_experts_per_tok", "at least 2"]);
    refused("llada2", "moe_intermediate_size", json!(null), &["moe_intermediate_size", "missing"]);
    refused("llada2", "intermediate_size", json!(null), &["intermediate_size", "missing"]);
    refused("llada2", "routed_scaling_factor", json!(-1), &["routed_scaling_factor", "above 0"]);
    refused("llada2", "partial_rotary_factor", json!(1.5), &["partial_rotary_factor", "1.5", "at most the head"]);
    refused("llada2", "partial_rotary_factor", json!(0.2), &["partial_rotary_factor", "0.2", "even"]);
    for (key, value) in [("score_function", json!("softmax")), ("norm_topk_prob", json!(false)), ("use_sliding_window", json!(true))] {
        refused("llada2", key, value.clone(), &[key, &value.to_string(), "nothing else"]);
    }
    refused("llada-moe", "moe_layer_freq", json!([1]), &["moe_layer_freq", "2 layers", "found 1"]);
    refused("llada-moe", "moe_layer_freq", json!([1, 2]), &["moe_layer_freq", "up to 1"]);
    refused("llada-moe", "dense_intermediate_size", json!(null), &["dense_intermediate_size", "missing"]);
    refused("llada-moe", "shared_expert_intermediate_size", json!(48), &["shared_expert_intermediate_size", "48"]);
    refused("llada-moe", "moe_router_enable_expert_bias", json!(true), &["moe_router_enable_expert_bias", "true"]);
    refused("sdar-moe", "mlp_only_layers", json!([2]), &["mlp_only_layers", "up to 1"]);
    refused("sdar-moe", "decoder_sparse_step", json!(0), &["decoder_sparse_step", "from 1"]);
    refused("rnd1", "mlp_only_layers", json!([0]), &["mlp_only_layers", "every layer"]);
}

/// An expert's tensor that is missing or of another shape is named.
#[test]
fn broken_experts() {
    let copy = Copy::of("llada2");
    copy.edit("config.json", |c| drop(c.insert("num_experts".into(), json!(12))));
    copy.refused("more experts than there are", "Weights", &["model.layers.1.mlp.gate.weight", "[12, 32]", "[8, 32]"]);
    let copy = Copy::of("llada2");
    copy.edit("config.json", |c| drop(c.insert("moe_intermediate_size".into(), json!(20))));
    copy.refused("narrower experts", "Weights", &["model.layers.1.mlp.experts.0.gate_proj.weight", "[20, 32]", "[24, 32]"]);
}

/// Diffusion models over the decoders of autoregressive families.
#[test]
fn broken_configurations_of_adapted_decoders() {
    let refused = |name: &str, keys: Value, words: &[&str]| {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| c.extend(keys.as_object().expect("an object").clone()));
        copy.refused(&format!("{name} {keys}"), "Config", &[&["config.json"], words].concat());
    };
    for (key, value) in [
        ("block_type", json!("sequential")),
        ("block_group_size", json!(2)),
        ("layer_norm_type", json!("low_precision")),
        ("activation_type", json!("swiglu")),
        ("include_bias", json!(true)),
        ("attention_layer_norm", json!(true)),
        ("rope", json!(false)),
        ("clip_qkv", json!(8.0)),
    ] {
        refused("llada", json!({key: value}), &[key, &value.to_string(), "nothing else"]);
    }
    refused("llada", json!({"num_experts": 64}), &["num_experts", "LLaDA-MoE"]);
    // LLaDA-MoE by its class, and without one by its experts.
    refused("llada", json!({"architectures": ["LLaDAMoEModelLM"]}), &["hidden_size", "missing"]);
    refused("llada", json!({"architectures": null, "num_experts": 64}), &["hidden_size", "missing"]);
    refused("llada", json!({"n_heads": 5}), &["d_model 32", "n_heads 5"]);
    refused("llada", json!({"n_kv_heads": 3}), &["n_heads 2", "n_kv_heads 3"]);
    refused(
        "sdar",
        json!({"model_type": "sdar_vl", "architectures": ["SDARVLForCausalLM"]}),
        &["sdar_vl", "supported", "SDARForCausalLM", "SDARMoeForCausalLM"],
    );
    refused("sdar", json!({"block_size": 0}), &["block_size", "from 1"]);
    refused("fast-dllm", json!({"bd_size": "x"}), &["bd_size", "from 1"]);
    for name in ["llada", "dream", "sdar", "fast-dllm"] {
        refused(name, json!({"mask_token_id": 67}), &["mask_token_id", "67"]);
        refused(name, json!({"quantization_config": {"bits": 4}}), &["quantization_config"]);
    }
    // MASK is looked for in config.json, then among the tokenizer's added tokens.
    for name in ["llada", "dream", "fast-dllm"] {
        refused(name, json!({"mask_token_id": null}), &["mask_token_id", "missing", "<|MASK|>"]);
    }
    // Llama's keys and type; the class makes it a diffusion model, whose sampler has MASK.
    let copy = Copy::of("llama");
    copy.edit("config.json", |c| {
        c.insert("architectures".into(), json!(["StableDiffcoderForCausalLM"]));
        c.insert("auto_map".into(), json!({"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}));
    });
    let engine = copy.load().expect("Stable-DiffCoder");
    assert_eq!((engine.config().attention, engine.config().mask_id), (AttentionMask::BlockCausal(4), Some(5)));
    let copy = Copy::of("sdar");
    assert_eq!(copy.load().expect("MASK in the tokenizer").config().mask_id, Some(66));
    copy.edit("tokenizer.json", |t| {
        let added = t["added_tokens"].as_array_mut().expect("added tokens");
        added.iter_mut().filter(|token| token["content"] == "<|MASK|>").for_each(|token| token["id"] = json!(67));
    });
    copy.refused("MASK outside", "Tokenizer", &["tokenizer.json", "67"]);
}

/// Chat models name what ends a turn in generation_config.json.
#[test]
fn ids_that_end_a_text() {
    let copy = Copy::of("sdar");
    assert_eq!(copy.load().expect("one id").config().stop_ids, [65]);
    copy.write("generation_config.json", r#"{"eos_token_id": [65, 3], "temperature": 1.0}"#);
    assert_eq!(copy.load().expect("two ids").config().stop_ids, [3, 65]);
    copy.edit("config.json", |c| drop(c.insert("eos_token_id".into(), json!([65, 7]))));
    assert_eq!(copy.load().expect("three ids").config().stop_ids, [3, 7, 65]);
    for (text, words) in [
        (r#"{"eos_token_id": "x"}"#, ["eos_token_id", "67"]),
        (r#"{"eos_token_id": [3, 2.5]}"#, ["eos_token_id", "2.5"]),
        ("[]", ["JSON object", "generation_config.json"]),
    ] {
        copy.write("generation_config.json", text);
        copy.refused(text, "Config", &[["generation_config.json"].as_slice(), &words].concat());
    }
    // What the tokenizer calls its end of text ends one, however it is written.
    std::fs::remove_file(copy.path("generation_config.json")).expect("a file");
    let added = copy.json("tokenizer.json")["added_tokens"].clone();
    let mask = added.as_array().expect("a list").iter().find(|token| token["content"] == "<|MASK|>").expect("MASK").clone();
    for (tokenizer_config, ids) in [
        (json!({"eos_token": "<|end|>", "added_tokens_decoder": {"9": {"content": "<|end|>"}}}), vec![7, 9, 65]),
        (json!({"eos_token": {"content": "<|end|>"}, "added_tokens_decoder": {"9": {"content": "<|end|>"}}}), vec![7, 9, 65]),
        (json!({"eos_token": null}), vec![7, 65]),
        (json!({"eos_token": "<|MASK|>"}), vec![7, 65, mask["id"].as_u64().expect("an id") as u32]),
    ] {
        copy.write("tokenizer_config.json", tokenizer_config.to_string());
        assert_eq!(copy.load().expect("loads").config().stop_ids, ids, "{tokenizer_config}");
    }
}

/// Values that a model can do without are passed over with a warning that names file and key;
/// transformers and vLLM load such directories.
#[test]
fn advice_that_cannot_be_followed() {
    let warned = |name: &str, key: &str, value: Value| {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| drop(c.insert(key.into(), value.clone())));
        let engine = copy.load().unwrap_or_else(|e| panic!("{name} {key} {value}: {e}"));
        let warnings = engine.config().warnings.join("; ");
        assert!(warnings.contains("config.json") && warnings.contains(key), "{name} {key} {value}: {warnings}");
        engine.config().clone()
    };
    for name in ["sdar", "llama", "gpt2", "llada", "llada2", "mdlm", "bd3lm-plain"] {
        for value in [json!(-1), json!(1 << 23), json!(u64::MAX)] {
            assert_eq!(warned(name, "pad_token_id", value.clone()).pad_id, None, "{name} {value}");
            warned(name, "bos_token_id", value.clone());
            warned(name, "eos_token_id", json!([2, value])).stop_ids.binary_search(&2).expect("the other ends a text");
        }
    }
    for name in ["mdlm", "bd3lm-plain"] {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| drop(c.insert("eos_token_id".into(), json!([0, 2]))));
        let config = copy.load().expect("a list").config().clone();
        assert_eq!((config.eos_id, config.stop_ids), (Some(0), vec![0, 2]), "{name}");
    }
}

/// Null is absent, for every key whose absence has a meaning.
#[test]
fn null_is_absent() {
    for name in ["sdar", "llada", "llada2", "llada-moe", "dream", "fast-dllm", "gpt2", "llama", "qwen2", "qwen3", "rnd1", "bd3lm-plain"] {
        let copy = Copy::of(name);
        let before = copy.load().expect("loads").config().clone();
        let known = copy.json("config.json");
        copy.edit("config.json", |c| {
            for key in ["quantization_config", "rope_scaling", "rope_parameters", "text_config", "pad_token_id", "auto_map", "clip_qkv"] {
                if known.get(key).is_none() {
                    c.insert(key.into(), Value::Null);
                }
            }
        });
        let after = copy.load().unwrap_or_else(|e| panic!("{name}: {e}")).config().clone();
        assert_eq!(redraft::config::ModelConfig { dir: before.dir.clone(), ..after }, before, "{name}");
    }
    // LLaDA and LLaDA-MoE share a type: experts that are null are none.
    let copy = Copy::of("llada");
    copy.edit("config.json", |c| drop(c.insert("num_experts".into(), Value::Null)));
    copy.load().expect("LLaDA");
}

/// transformers 5 writes rotary keys into `rope_parameters`, and a decoder's keys into
/// `text_config`: they mean there what they mean at the top.
#[test]
fn keys_mean_the_same_where_they_are_nested() {
    for name in ["llada2", "llada-moe", "llada", "llama", "sdar", "qwen2"] {
        let top = Copy::of(name);
        let partial = top.json("config.json").get("partial_rotary_factor").is_some();
        top.edit("config.json", |c| {
            c.remove("rope_scaling");
            c.remove("rope_parameters");
            c.insert("rope_theta".into(), json!(12345.0));
            if partial {
                c.insert("partial_rotary_factor".into(), json!(0.25));
            }
        });
        let expected = top.load().expect("keys at the top").config().rope;
        let mut object = json!({"rope_type": "default", "rope_theta": 12345.0});
        if partial {
            object["partial_rotary_factor"] = json!(0.25);
        }
        for object in [object.clone(), json!({"full_attention": object, "sliding_attention": object})] {
            let nested = Copy::of(name);
            nested.edit("config.json", |c| {
                c.remove("rope_scaling");
                c.remove("rope_theta");
                c.remove("partial_rotary_factor");
                c.insert("rope_parameters".into(), object.clone());
            });
            assert_eq!(nested.load().unwrap_or_else(|e| panic!("{name} {object}: {e}")).config().rope, expected, "{name} {object}");
        }
        let inner = Copy::of(name);
        let before = inner.load().expect("loads").config().clone();
        inner.edit("config.json", |c| {
            let mut text = std::mem::take(c);
            for key in ["architectures", "model_type", "auto_map"] {
                c.extend(text.remove(key).map(|value| (key.to_owned(), value)));
            }
            c.insert("text_config".into(), Value::Object(text));
        });
        let after = inner.load().unwrap_or_else(|e| panic!("{name} in text_config: {e}")).config().clone();
        assert_eq!(after, before, "{name} in text_config");
    }
    let copy = Copy::of("llama");
    copy.edit("config.json", |c| {
        c.remove("rope_scaling");
        c.insert("rope_parameters".into(), json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}));
    });
    copy.refused("layers that differ", "Config", &["rope_parameters", "differ between layers"]);
}

/// SDAR's variants carry their block length in their name alone.
#[test]
fn block_lengths_are_found_or_guessed_aloud() {
    let root = tempfile::tempdir().expect("a directory");
    let config = |path: &str, edit: &dyn Fn(&mut Map<String, Value>)| {
        let dir = root.path().join(path);
        std::fs::create_dir_all(&dir).expect("a directory");
        let copy = Copy::of("sdar");
        copy.edit("config.json", edit);
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(copy.path(file), dir.join(file)).expect("a file");
        }
        let config = redraft::model::registry::read_config(&dir).expect("a configuration");
        (config.attention, config.guessed_block_len, config.warnings.join("; "))
    };
    let none = |_: &mut Map<String, Value>| {};
    let block = AttentionMask::BlockCausal;
    assert_eq!(config("SDAR-1.7B-Chat-b32", &none), (block(32), false, String::new()));
    assert_eq!(config("models--JetLM--SDAR-1.7B-Chat-b16/snapshots/0a1b", &none), (block(16), false, String::new()));
    let named = |c: &mut Map<String, Value>| drop(c.insert("_name_or_path".into(), json!("JetLM/SDAR-4B-Chat-b64")));
    assert_eq!(config("mine", &named), (block(64), false, String::new()));
    let keyed = |c: &mut Map<String, Value>| drop(c.insert("block_size".into(), json!(8)));
    assert_eq!(config("other-b32", &keyed), (block(8), false, String::new()), "the key goes before the name");
    let (attention, guessed, warnings) = config("SDAR-1.7B-Chat", &none);
    assert_eq!((attention, guessed), (block(4), true));
    assert!(warnings.contains("block_size") && warnings.contains("guess"), "{warnings}");
}

/// Padding that ends a text can be written, whichever file says so.
#[test]
fn padding_that_ends_a_text_is_not_banned() {
    let copy = Copy::of("sdar");
    let banned = |copy: &Copy, id: u32| copy.load().expect("loads").banned().contains(&id);
    copy.edit("config.json", |c| drop(c.insert("pad_token_id".into(), json!(9))));
    assert!(banned(&copy, 9), "padding alone");
    copy.write("generation_config.json", r#"{"eos_token_id": [65, 9]}"#);
    assert!(!banned(&copy, 9), "by generation_config.json");
    std::fs::remove_file(copy.path("generation_config.json")).expect("a file");
    copy.edit("config.json", |c| drop(c.insert("eos_token_id".into(), json!([65, 9]))));
    assert!(!banned(&copy, 9), "by config.json");
    copy.edit("config.json", |c| drop(c.insert("eos_token_id".into(), json!(65))));
    copy.write("tokenizer_config.json", r#"{"eos_token": "<end>", "added_tokens_decoder": {"9": {"content": "<end>"}}}"#);
    assert!(!banned(&copy, 9), "by the tokenizer");
}

/// What lies in a directory is named, with the next move.
#[test]
fn files_that_are_not_what_they_seem() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 554496\n";
    for (bytes, word) in [
        (lfs.as_bytes(), "git lfs pull"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00\x00", "zip archive"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00", "pickle"),
        (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00", "GGUF"),
        (b"Entry not found", "error message"),
        (&[0; 4096], "zeros"),
        (b"", "empty file"),
    ] {
        let copy = Copy::of("bd3lm-plain");
        copy.write(WEIGHTS, bytes);
        copy.refused(word, "Weights", &[WEIGHTS, word]);
        if word != "zeros" {
            let copy = Copy::of("bd3lm-plain");
            copy.write("config.json", bytes);
            copy.refused(word, "Config", &["config.json"]);
        }
    }
    let lone = |name: &str, word: &str| {
        let copy = Copy::of("bd3lm-plain");
        std::fs::rename(copy.path(WEIGHTS), copy.path(name)).expect("a file");
        copy.refused(name, "Weights", &["no weights", name, word]);
    };
    lone("pytorch_model.bin", "save_pretrained");
    lone("model.gguf", "llama.cpp");
    lone("model-00001-of-00002.safetensors", "index");
    lone("diffusion_pytorch_model.safetensors", "rename");
    lone("model.safetensors.incomplete", "not complete");
    let copy = Copy::of("bd3lm-plain");
    std::fs::remove_file(copy.path(WEIGHTS)).expect("a file");
    std::fs::create_dir(copy.path(WEIGHTS)).expect("a directory");
    copy.refused("a directory", "Weights", &[WEIGHTS, "found a directory"]);
    let load = |dir: &Path| Engine::load(dir, Cpu::new(1, DType::F32).expect("a CPU"), EngineOptions::default()).err().expect("refused");
    let copy = Copy::of("bd3lm-plain");
    assert!(load(&copy.path(WEIGHTS)).to_string().contains("expected the directory"), "a file");
    assert!(load(Path::new("GSAI-ML/LLaDA-8B-Instruct")).to_string().contains("hf download GSAI-ML/LLaDA-8B-Instruct"));
    let snapshot = copy.path("cache/snapshots/0a1b");
    std::fs::create_dir_all(&snapshot).expect("a directory");
    assert!(load(&copy.path("cache")).to_string().contains("snapshots/0a1b"), "the root of a cache entry");
}

/// Pipes and devices in the place of a file do not hang the loader; a link to nothing is not
/// absence.
#[cfg(unix)]
#[test]
fn special_files_are_refused_at_once() {
    use std::os::unix::fs::symlink;
    for (name, kind) in
        [(WEIGHTS, "Weights"), ("config.json", "Config"), ("generation_config.json", "Config"), ("tokenizer_config.json", "Config")]
    {
        for (target, word) in [("/dev/zero", "device"), ("../blobs/4d7a", "a link to ../blobs/4d7a")] {
            let copy = Copy::of("bd3lm-plain");
            let _ = std::fs::remove_file(copy.path(name));
            symlink(target, copy.path(name)).expect("a link");
            copy.refused(&format!("{name} -> {target}"), kind, &[name, word]);
        }
        let copy = Copy::of("bd3lm-plain");
        let _ = std::fs::remove_file(copy.path(name));
        assert!(std::process::Command::new("mkfifo").arg(copy.path(name)).status().expect("runs").success());
        copy.refused(&format!("{name} is a pipe"), kind, &[name, "a pipe"]);
    }
}

/// A file that another program cuts short, or removes, while it is read: an error or the whole
/// model, never a signal.
#[test]
fn a_file_that_shrinks_while_it_is_read() {
    let copy = Copy::of("bd3lm-plain");
    let (weights, whole) = (redraft::weights::Weights::open(copy.dir.path()).expect("opens"), copy.read(WEIGHTS));
    let tensor = weights.tensor(NORM, &[32]).expect("a tensor");
    let before = tensor.to_vec().expect("is read");
    std::fs::OpenOptions::new().write(true).open(copy.path(WEIGHTS)).expect("a file").set_len(1000).expect("shorter");
    let error = tensor.to_vec().expect_err("cut short").to_string();
    assert!(error.contains(WEIGHTS) && error.contains(NORM) && error.contains("cut short while it was read"), "{error}");
    copy.write(WEIGHTS, whole);
    assert_eq!(tensor.to_vec().expect("is whole again"), before);
    std::fs::remove_file(copy.path(WEIGHTS)).expect("a file");
    assert_eq!(tensor.to_vec().expect("is still open"), before);
}

/// Sampling that a checkpoint recommends is where its schedules start; what a stage says itself
/// goes before.
#[test]
fn recommended_sampling() {
    let copy = Copy::of("sdar");
    let draft = |copy: &Copy| {
        let engine = copy.load().expect("an engine");
        let stages = ["block=4", "block=4,remask=0.5,temperature=0.25,top_k=3"].map(|stage| stage.parse().unwrap());
        let schedule = Schedule::resolve(&stages, &Engine::<Cpu>::defaults(engine.config())).unwrap();
        [0, 1].map(|i| {
            let sampling = schedule.stages()[i].sampling;
            (sampling.temperature, sampling.top_p, sampling.top_k.map(|top_k| top_k.k))
        })
    };
    assert_eq!(draft(&copy), [(1.0, 0.9, None), (0.25, 0.9, Some(3))]);
    copy.write("generation_config.json", r#"{"temperature": 0.5, "top_p": null, "top_k": 20}"#);
    assert_eq!(draft(&copy), [(0.5, 0.9, Some(20)), (0.25, 0.9, Some(3))]);
    copy.write("generation_config.json", r#"{"temperature": 0, "top_p": 0.75, "top_k": 0}"#);
    assert_eq!(draft(&copy), [(0.0, 0.75, None), (0.25, 0.75, Some(3))]);
    copy.write("generation_config.json", r#"{"top_k": 50.0, "top_p": 1}"#);
    assert_eq!(draft(&copy), [(1.0, 1.0, Some(50)), (0.25, 1.0, Some(3))]);
    // Other engines say -1 for all tokens.
    copy.write("generation_config.json", r#"{"top_k": -1}"#);
    assert_eq!(draft(&copy)[0].2, None);
    for (text, key) in [
        (r#"{"temperature": -1}"#, "temperature"),
        (r#"{"temperature": "warm"}"#, "temperature"),
        (r#"{"top_p": 0}"#, "top_p"),
        (r#"{"top_k": 2.5}"#, "top_k"),
    ] {
        copy.write("generation_config.json", text);
        assert_eq!(draft(&copy), [(1.0, 0.9, None), (0.25, 0.9, Some(3))], "{text}");
        let warnings = copy.load().expect("loads").config().warnings.join("; ");
        assert!(warnings.contains("generation_config.json") && warnings.contains(key), "{text}: {warnings}");
    }
}

/// A window that ends before the model does would be ignored here; one that does not may be.
#[test]
fn sliding_windows() {
    type Case = (&'static str, Value, Result<usize, &'static str>);
    let cases: [Case; 9] = [
        ("qwen2", json!({"use_sliding_window": false, "sliding_window": 8}), Ok(256)),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 0, "layer_types": null}), Ok(64)),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2, "layer_types": null}), Ok(256)),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 63, "max_window_layers": 1, "layer_types": null}), Err("63")),
        (
            "qwen3",
            json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
            Err("8"),
        ),
        ("qwen3", json!({"layer_types": ["full_attention", "linear_attention"]}), Err("linear_attention")),
        ("mistral", json!({"sliding_window": 8}), Err("8")),
        ("mistral", json!({"sliding_window": 100}), Ok(100)),
        ("mistral", json!({"sliding_window": null}), Ok(256)),
    ];
    for (name, keys, expected) in cases {
        let copy = Copy::of(if name == "mistral" { "llama" } else { name });
        copy.edit("config.json", |c| {
            if name == "mistral" {
                c.insert("model_type".into(), json!("mistral"));
                c.insert("architectures".into(), json!(["MistralForCausalLM"]));
            }
            c.extend(keys.as_object().expect("an object").clone());
        });
        match expected {
            Err(word) => copy.refused(&format!("{name} {keys}"), "Config", &["config.json", word]),
            Ok(longest) => {
                let engine = copy.load().unwrap_or_else(|e| panic!("{name} {keys}: {e}"));
                assert_eq!(engine.config().max_len(), longest, "{name} {keys}");
            }
        }
    }
    let error = |keys: Value| {
        let copy = Copy::of("qwen2");
        copy.edit("config.json", |c| c.extend(keys.as_object().expect("an object").clone()));
        copy.load().err().expect("refused").to_string()
    };
    assert!(
        error(json!({"use_sliding_window": true, "sliding_window": 63, "max_window_layers": 0, "layer_types": null}))
            .contains("sliding_window")
    );
    assert!(error(json!({"layer_types": "full_attention"})).contains("layer_types"));
}

/// A configuration of the Llama layout that does not describe the weights beside it.
#[test]
fn plain_decoders_of_another_shape() {
    const Q: &str = "model.layers.0.self_attn.q_proj";
    for (name, key, value, words) in [
        ("qwen2", "vocab_size", json!(66), ["model.embed_tokens.weight", "[66, 64]", "[67, 64]"]),
        // As many as query heads, which null says too.
        ("qwen2", "num_key_value_heads", Value::Null, ["model.layers.0.self_attn.k_proj.weight", "[64, 64]", "[32, 64]"]),
        ("qwen2", "num_key_value_heads", json!(4), ["model.layers.0.self_attn.k_proj.weight", "[64, 64]", "[32, 64]"]),
        ("qwen2", "intermediate_size", json!(64), ["model.layers.0.mlp.gate_proj.weight", "[64, 64]", "[32, 64]"]),
        ("qwen2", "num_hidden_layers", json!(3), ["model.layers.2.", "missing", "expected shape"]),
        ("qwen2", "tie_word_embeddings", json!(false), ["lm_head.weight", "missing", "[67, 64]"]),
        ("qwen3", "head_dim", json!(32), [Q, "[96, 32]", "[48, 32]"]),
        ("qwen3", "attention_bias", json!(true), [Q, ".bias", "missing"]),
        ("llama", "mlp_bias", json!(true), ["model.layers.0.mlp.gate_proj.bias", "missing", "[48]"]),
    ] {
        let copy = Copy::of(name);
        copy.edit("config.json", |c| {
            c.insert(key.into(), value);
            c.retain(|k, _| !k.ends_with("_token_id"));
        });
        let file = if name == "llama" { "model.safetensors.index.json" } else { WEIGHTS };
        copy.refused(&format!("{name} {key}"), "Weights", &[&[file], &words[..]].concat());
    }
}

/// A configuration that does not describe the weights beside it: the first tensor that does not fit
/// is named, with both shapes. GPT-2: what would change its numbers is refused, names with and
/// without the class's prefix are the same model, other shapes run.
#[test]
fn gpt2() {
    let copy = Copy::of("gpt2");
    let good = copy.json("config.json");
    copy.load().expect("good");
    for (key, value, words) in [
        ("activation_function", json!("relu"), ["gelu_new", "relu"]),
        ("activation_function", json!("gelu"), ["gelu_pytorch_tanh", "found gelu"]),
        ("scale_attn_by_inverse_layer_idx", json!(true), ["expected false", "found true"]),
        ("scale_attn_weights", json!(false), ["expected true", "found false"]),
        ("add_cross_attention", json!(true), ["expected false", "found true"]),
        ("quantization_config", json!({"quant_method": "gptq"}), ["not supported", "gptq"]),
        ("n_head", json!(5), ["n_embd 48", "n_head 5"]),
        ("n_inner", json!(0), ["from 1", "found 0"]),
        ("n_positions", json!(null), ["n_positions", "missing"]),
        ("layer_norm_epsilon", json!(0), ["above 0", "found 0"]),
    ] {
        copy.edit("config.json", |map| drop(map.insert(key.into(), value.clone())));
        copy.refused(&format!("{key} {value}"), "Config", &[&["config.json", key], &words[..]].concat());
        copy.write("config.json", good.to_string());
    }
    // A table of positions of another length than the config says.
    copy.edit("config.json", |map| drop(map.insert("n_positions".into(), json!(31))));
    copy.refused("n_positions 31", "Weights", &["wpe.weight", "[31, 48]", "[32, 48]"]);
    copy.write("config.json", good.to_string());

    let tokens: Vec<u32> = (0..20).collect();
    let nll = |copy: &Copy| copy.load().expect("a judge").causal_nll(&tokens).expect("a likelihood");
    let published = nll(&copy);
    let (header, data) = copy.weights();
    let saved = header.iter().map(|(name, tensor)| match name.as_str() {
        "__metadata__" => (name.clone(), tensor.clone()),
        name => (format!("transformer.{name}"), tensor.clone()),
    });
    copy.set_weights(&saved.collect(), &data);
    assert_eq!(nll(&copy), published, "names as the class saves them");
    copy.set_weights(&header, &data);
    // Stored (in, out): the transpose is another tensor, and says so.
    let mut spoiled = header.clone();
    spoiled["h.0.attn.c_attn.weight"]["shape"] = json!([144, 48]);
    copy.set_weights(&spoiled, &data);
    copy.refused("transposed", "Weights", &["h.0.attn.c_attn.weight", "[48, 144]", "[144, 48]"]);

    // Untied: a head of its own is asked for, and makes another model.
    copy.set_weights(&header, &data);
    copy.edit("config.json", |map| drop(map.insert("tie_word_embeddings".into(), json!(false))));
    copy.refused("untied", "Weights", &["lm_head.weight", "missing"]);
    let mut untied = header.clone();
    let start = data.len() as u64;
    untied.insert("lm_head.weight".into(), json!({"dtype": "F32", "shape": [67, 48], "data_offsets": [start, start + 67 * 48 * 4]}));
    let head: Vec<u8> = (0..67 * 48).flat_map(|i| ((i % 7) as f32 * 0.1).to_le_bytes()).collect();
    copy.set_weights(&untied, &[&data[..], &head].concat());
    assert_ne!(nll(&copy), published, "a head of its own");
}

#[test]
fn configurations_of_another_model() {
    let copy = Copy::of("bd3lm-adaln");
    for (key, value, words) in [
        ("vocab_size", json!(130), [EMBEDDING, "[130, 96]", "[131, 96]"]),
        ("hidden_dim", json!(192), [EMBEDDING, "[131, 192]", "[131, 96]"]),
        ("n_blocks", json!(3), ["backbone.blocks.2.", "missing", "expected shape"]),
        ("cond_dim", json!(64), ["backbone.sigma_map.mlp.0.weight", "[64, 256]", "["]),
    ] {
        let good = copy.json("config.json");
        copy.edit("config.json", |c| {
            c.insert(key.into(), value);
            // The ids of the published defaults, wherever the vocabulary ends.
            c.retain(|k, _| !k.ends_with("_token_id"));
        });
        // A vocabulary smaller than the tokenizer's is the tokenizer's mistake; here the weights
        // are looked at.
        std::fs::rename(copy.path("tokenizer.json"), copy.path("aside")).expect("a file");
        copy.refused(key, "Weights", &[&[WEIGHTS], &words[..]].concat());
        std::fs::rename(copy.path("aside"), copy.path("tokenizer.json")).expect("a file");
        copy.write("config.json", good.to_string());
    }
    // adaLN where the checkpoint has none.
    let plain = Copy::of("bd3lm-plain");
    plain.edit("config.json", |c| {
        c.insert("adaln".into(), json!(true));
        c.insert("cond_dim".into(), json!(128));
    });
    plain.refused("adaLN without its tensors", "Weights", &[WEIGHTS, "sigma_map", "missing"]);
    // A config that asks for more layers than memory could hold is refused by the first tensor that
    // is not there.
    plain.edit("config.json", |c| {
        c.insert("adaln".into(), json!(false));
        c.insert("n_blocks".into(), json!(1024));
    });
    plain.refused("1024 layers", "Weights", &["backbone.blocks.1.", "missing"]);
}

/// A tokenizer is needed for text only, so its errors come with the first call that needs it.
#[test]
fn broken_tokenizers() {
    let refused = |copy: &Copy, label: &str, words: &[&str]| {
        let engine = copy.load().unwrap_or_else(|e| panic!("{label}: {e}"));
        let error = engine.tokenizer().err().unwrap_or_else(|| panic!("{label}: was loaded"));
        assert!(matches!(error, Error::Tokenizer { .. }), "{label}: {error:?}");
        for word in [&["tokenizer.json"], words].concat() {
            assert!(error.to_string().contains(word), "{label}: no `{word}` in: {error}");
        }
        let text = redraft::request::Prompt::Text { text: "a".into(), length: 2 };
        assert_eq!(engine.canvas(&text).expect_err("text"), error, "{label}");
        let stops = redraft::request::Request {
            stop: redraft::request::StopOptions { texts: vec!["a".into()], ..Default::default() },
            ..request()
        };
        let mut engine = engine;
        assert_eq!(engine.submit(stops).err().expect("a stop text"), error, "{label}");
        // Ids need none.
        let handle = engine.submit(request()).unwrap_or_else(|e| panic!("{label}: {e}"));
        engine.run().unwrap_or_else(|e| panic!("{label}: {e}"));
        handle.events().for_each(drop);
        assert_eq!(handle.take_output().expect("an outcome").expect("a text").tokens.len(), 4, "{label}");
    };
    for text in ["", "{", "[]", "null", "{}", "{\"version\": \"1.0\"}", &"[".repeat(100_000)] {
        let copy = Copy::of("bd3lm-plain");
        copy.write("tokenizer.json", text);
        refused(&copy, &format!("tokenizer `{}`", &text[..text.len().min(20)]), &["not a tokenizer"]);
    }
    let copy = Copy::of("bd3lm-plain");
    copy.write("tokenizer.json", [0xff, 0xfe]);
    refused(&copy, "not UTF-8", &["not a tokenizer"]);
    std::fs::remove_file(copy.path("tokenizer.json")).expect("a file");
    refused(&copy, "no tokenizer", &["no tokenizer", "--tokenizer"]);
    // A larger model's tokenizer: 130 tokens for a vocabulary of 67.
    std::fs::copy(fixture("bd3lm-adaln").join("tokenizer.json"), copy.path("tokenizer.json")).expect("a copy");
    refused(&copy, "too large", &["has id", "the model's vocabulary has 67"]);
}

fn request() -> redraft::request::Request {
    let schedule = redraft::Schedule::preset("draft", &redraft::Defaults::default()).expect("a preset");
    let mut request = redraft::request::Request::new(redraft::request::Prompt::Tokens { tokens: vec![1], length: 4 }, schedule, 0, 0);
    request.stop.ignore_eos = true;
    request
}

#[test]
fn broken_indices() {
    let index = "model.safetensors.index.json";
    let copy = Copy::of("bd3lm-plain-sharded");
    let good = copy.json(index);
    for text in ["", "{", "[]", "{}", "{\"weight_map\": []}", "{\"weight_map\": 3}", "null"] {
        copy.write(index, text);
        copy.refused(&format!("index `{text}`"), "Weights", &[index]);
    }
    copy.write(index, "{\"weight_map\": {}}");
    copy.refused("an empty index", "Weights", &[index, "missing"]);
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let point = |label: &str, file: Value, words: &[&str]| {
        let mut spoiled = good.clone();
        spoiled["weight_map"][NORM] = file;
        copy.write(index, spoiled.to_string());
        copy.refused(label, "Weights", words);
    };
    point(
        "a shard that is not there",
        json!("model-00003-of-00002.safetensors"),
        &["model-00003-of-00002.safetensors", "no such file", "1 tensors", NORM],
    );
    let outside = fixture("bd3lm-plain").join(WEIGHTS).display().to_string();
    for path in ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\model.safetensors", "", &outside] {
        point("a path", json!(path), &[index, NORM, "same directory"]);
    }
    for value in [json!(3), json!(null), json!(["a"])] {
        point("no name", value, &[index, NORM]);
    }
    point("a directory", json!("."), &["cannot"]);
    // The norm is in the first shard.
    point("another shard", json!(second), &[index, NORM, &format!("expected in {second}, found in {first}")]);
    let mut spoiled = good.clone();
    spoiled["weight_map"]["backbone.nowhere"] = json!(first);
    copy.write(index, spoiled.to_string());
    copy.refused("a tensor that no shard has", "Weights", &[index, &format!("backbone.nowhere: expected in {first}, found in no shard")]);
    copy.write(index, good.to_string());
    copy.load().expect("good again");
    let (a, b) = (copy.read(first), copy.read(second));
    copy.write(second, &a);
    copy.refused("the same shard twice", "Weights", &[second, "appears in two shards, the other is", first]);
    copy.write(second, &b[..b.len() - 3]);
    copy.refused("a truncated shard", "Weights", &[second, &format!("expected {} bytes", b.len()), &format!("found {}", b.len() - 3)]);
    std::fs::remove_file(copy.path(second)).expect("a file");
    copy.refused("a missing shard", "Weights", &[second, "no such file"]);
    std::fs::remove_file(copy.path(first)).expect("a file");
    copy.refused("both missing", "Weights", &[first, second, "no such file"]);
    std::fs::remove_file(copy.path(index)).expect("a file");
    copy.refused("no weights", "Weights", &["model.safetensors", "index"]);
}

/// Whatever loads runs: neither loading nor a forward over what was loaded panics.
fn load_and_run(copy: &Copy) -> Result<(), Error> {
    let mut engine = copy.load()?;
    engine.logits(&[1, 2], redraft::plan::Visibility::Full, &mut |_, _| Ok(()))?;
    let handle = engine.submit(request())?;
    engine.run()?;
    handle.events().for_each(drop);
    handle.take_output().expect("an outcome").map(drop)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn flipped_header_bytes_never_panic(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let copy = Copy::of("bd3lm-plain");
        let mut bytes = copy.read(WEIGHTS);
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in flips {
            bytes[at.index(header)] = value;
        }
        copy.write(WEIGHTS, bytes);
        let _ = load_and_run(&copy);
    }

    #[test]
    fn flipped_config_bytes_never_panic(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let copy = Copy::of("bd3lm-plain");
        let mut bytes = copy.read("config.json");
        let len = bytes.len();
        for (at, value) in flips {
            bytes[at.index(len)] = value;
        }
        copy.write("config.json", bytes);
        let _ = load_and_run(&copy);
    }

    #[test]
    fn flipped_config_bytes_of_a_plain_decoder_never_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let copy = Copy::of("qwen3");
        let mut bytes = copy.read("config.json");
        let len = bytes.len();
        for (at, value) in flips {
            bytes[at.index(len)] = value;
        }
        copy.write("config.json", bytes);
        if let Ok(mut engine) = copy.load() {
            let _ = engine.causal_nll(&[1, 2, 3]);
        }
    }

    /// Any bytes in any file of the directory.
    #[test]
    fn random_files_never_panic(which in 0usize..4, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let name = ["config.json", WEIGHTS, "tokenizer.json", "model.safetensors.index.json"][which];
        let copy = Copy::of(if which == 3 { "bd3lm-plain-sharded" } else { "bd3lm-plain" });
        copy.write(name, bytes);
        let _ = load_and_run(&copy);
    }
}

/// A copy whose head is the weights times `factor`.
fn loud(factor: f32) -> Copy {
    let copy = Copy::of("bd3lm-plain");
    let (header, mut data) = copy.weights();
    let tensor = &header["backbone.output_layer.linear.weight"];
    let offset = |i: usize| tensor["data_offsets"][i].as_u64().expect("an offset") as usize;
    assert_eq!(tensor["dtype"], "F32");
    for value in data[offset(0)..offset(1)].chunks_exact_mut(4) {
        let scaled = f32::from_le_bytes(value.try_into().expect("four bytes")) * factor;
        value.copy_from_slice(&scaled.clamp(-3e38, 3e38).to_le_bytes());
    }
    copy.set_weights(&header, &data);
    copy
}

/// Finite weights whose products are not: every way to the numbers is an error that names model,
/// type and position, and nothing is written.
#[test]
fn logits_that_are_not_finite() {
    use redraft::plan::Visibility;
    use redraft::request::{Prompt, Request};
    let copy = loud(f32::MAX);
    let dir = copy.dir.path().display().to_string();
    for dtype in [DType::F32, DType::Bf16] {
        let mut engine = Engine::load(copy.dir.path(), Cpu::new(1, dtype).expect("a CPU"), EngineOptions::default()).expect("loads");
        let mut rows = 0;
        let mut sink = |_: usize, _: &[f32]| {
            rows += 1;
            Ok(())
        };
        let error = engine.logits(&[1, 2, 3], Visibility::Full, &mut sink).expect_err("not finite");
        assert_eq!(rows, 0, "no row was handed on");
        let schedule = Schedule::preset("draft", &Engine::<Cpu>::defaults(engine.config())).expect("a preset");
        let request = Request::new(Prompt::Tokens { tokens: vec![1], length: 4 }, schedule, 0, 0);
        let handle = engine.submit(request).expect("queued");
        engine.run().expect("the engine goes on");
        handle.events().for_each(drop);
        let drawn = handle.take_output().expect("an outcome").expect_err("not finite");
        for error in [error, drawn] {
            let text = error.to_string();
            for word in [&dir, dtype.name(), "logit of token", "not finite"] {
                assert!(text.contains(word), "no `{word}` in: {text}");
            }
        }
    }
}

/// Costs of tokens are not cut where f32 has no probabilities any more.
#[test]
fn scores_see_below_the_smallest_probability() {
    use redraft::plan::Visibility;
    let copy = loud(4096.0);
    let mut engine = copy.load().expect("loads");
    let tokens: Vec<u32> = (0..12).collect();
    let request = redraft::scoring::scoring_request(tokens, Visibility::BlockCausal(4)).expect("a request");
    let handle = engine.submit(request).expect("queued");
    engine.run().expect("runs");
    handle.events().for_each(drop);
    let output = handle.take_output().expect("an outcome").expect("scores");
    let costs: Vec<f32> = output.log_prob.iter().map(|log_prob| -log_prob).collect();
    assert!(costs.iter().all(|cost| cost.is_finite() && *cost >= 0.0), "{costs:?}");
    assert!(costs.iter().any(|cost| *cost > 88.0), "-ln of the smallest f32 is 87.3: {costs:?}");
}
