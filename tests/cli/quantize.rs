//! Weights of 8 and 4 bits: made at load, and written by `redraft quantize`.

use crate::work::{Work, fixture, fixtures, repository};

fn forward(work: &Work, model: &str, more: &[&str]) -> Vec<f32> {
    let args = [&["forward", "--model", model, "--tokens", "5,6,7,8,9,10,11,3", "--out", "logits", "--device", "cpu"], more].concat();
    work.run(&args).ok();
    let file = std::fs::read(work.path("logits")).expect("a file");
    let tensors = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
    let data = tensors.tensor("logits").expect("logits").data();
    data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn quantize(work: &Work, model: &str, format: &str, out: &str) -> String {
    work.run(&["quantize", model, "--weights", format, "--out", out]).ok();
    work.path(out).display().to_string()
}

/// Of every family: what was written has the bits of what is made at load, and inspects alike.
#[test]
fn what_is_written_is_what_is_made_at_load() {
    for model in fixtures() {
        for format in ["q8", "q4"] {
            let work = Work::new();
            let out = quantize(&work, &model, format, "out");
            let at_load = forward(&work, &model, &["--weights", format]);
            assert_eq!(forward(&work, &out, &[]), at_load, "{model} in {format}");
            assert_eq!(forward(&work, &out, &["--weights", format, "--threads", "1"]), at_load, "{model} in {format}, named");
            let parameters = |dir: &str| work.run(&["inspect", dir, "--format", "json"]).json()[0]["parameters"].clone();
            assert_eq!(parameters(&out), parameters(&model), "{model}");
        }
    }
}

/// The further from floats, the further the logits; and near them all the same.
#[test]
fn losses_are_small_and_grow_with_fewer_bits() {
    let work = Work::new();
    let model = repository().join("models/redraft-stories-10m").display().to_string();
    let floats = forward(&work, &model, &["--weights", "f32"]);
    let spread = |logits: &[f32]| (logits.iter().map(|l| f64::from(*l).powi(2)).sum::<f64>() / logits.len() as f64).sqrt();
    let size = spread(&floats);
    let error = |format: &str| {
        let logits = forward(&work, &model, &["--weights", format]);
        spread(&logits.iter().zip(&floats).map(|(a, b)| a - b).collect::<Vec<_>>()) / size
    };
    let (q8, q4) = (error("q8"), error("q4"));
    assert!(q8 > 1e-4 && q8 < 0.02, "{q8}");
    assert!(q4 > 2.0 * q8 && q4 < 0.2, "{q4}");
}

/// The same tokens whoever shares the forward, and however many threads there are.
#[test]
fn texts_do_not_depend_on_batch_or_threads() {
    let work = Work::new();
    let common = ["generate", "--prompt", "One day", "--length", "48", "--seed", "3", "--format", "jsonl", "--device", "cpu"];
    let texts = |more: &[&str]| -> Vec<String> {
        let lines = work.run(&[&common[..], more].concat()).json();
        lines.iter().map(|line| line["text"].as_str().expect("a text").to_owned()).collect()
    };
    for format in ["q8", "q4"] {
        let many = texts(&["--weights", format, "--samples", "5"]);
        assert_eq!(texts(&["--weights", format, "--samples", "5", "--threads", "1"]), many, "{format}");
        assert_eq!(texts(&["--weights", format]), many[..1], "{format}");
    }
}

/// Errors of single weights name file and tensor: a value beyond a group, and words of other sizes
/// than config.json's.
#[test]
fn weights_that_do_not_fit_are_named() {
    let work = Work::new();
    let forward = |dir: &str, more: &[&str]| {
        work.run(&[&["forward", "--tokens", "5,6", "--out", "logits", "--device", "cpu", "--model", dir], more].concat())
    };
    std::fs::create_dir(work.path("large")).expect("a directory");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(std::path::Path::new(&fixture("dream")).join(name), work.path(&format!("large/{name}"))).expect("copied");
    }
    let path = work.path("large/model.safetensors");
    let mut bytes = std::fs::read(&path).expect("weights");
    let name = "model.layers.0.mlp.down_proj.weight";
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let at = tensors.tensor(name).expect("a tensor").data().as_ptr().addr() - bytes.as_ptr().addr();
    // The upper half of 1e8: a bf16.
    bytes[at..at + 2].copy_from_slice(&1e8f32.to_le_bytes()[2..]);
    std::fs::write(&path, &bytes).expect("written");
    let large = work.path("large").display().to_string();
    for format in ["q8", "q4"] {
        forward(&large, &["--weights", format]).fails(1, &["model.safetensors", name, "magnitude 99614720"]);
    }
    let q8 = quantize(&work, &fixture("dream"), "q8", "q8");
    let config = work.path("q8/config.json");
    let text = std::fs::read_to_string(&config).expect("a config");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["intermediate_size"] = (value["intermediate_size"].as_u64().expect("a size") + 32).into();
    std::fs::write(&config, value.to_string()).expect("written");
    forward(&q8, &[]).fails(1, &["model.safetensors", "gate_proj.weight and 1 more", "words: expected"]);
}

#[test]
fn what_cannot_be_quantised_says_why() {
    let work = Work::new();
    let model = fixture("llama");
    let q8 = quantize(&work, &model, "q8", "q8");
    let run = |args: &[&str]| work.run(args);
    run(&["quantize", &model, "--weights", "q8", "--out", "q8"]).fails(2, &["exists", "new directory"]);
    run(&["quantize", &q8, "--weights", "q4", "--out", "q4"]).fails(2, &["in q8 already"]);
    run(&["quantize", &model, "--weights", "bf16", "--out", "x"]).fails(2, &["expected q8 or q4"]);
    run(&["quantize", "nowhere", "--weights", "q8", "--out", "x"]).fails(1, &["nowhere"]);
    run(&["quantize", &model, "--weights", "q8", "--out", "no/such/place"]).ok();
    let forward = ["forward", "--tokens", "5,6", "--out", "logits", "--device", "cpu", "--model"];
    run(&[&forward[..], &[&q8, "--weights", "q4"]].concat()).fails(2, &["packed in q8", "q4"]);
    run(&[&forward[..], &[&model, "--weights", "f32", "--dtype", "bf16"]].concat()).fails(2, &["weights f32 and dtype bf16"]);
    // Cut short, and of a layout to come.
    let path = work.path("q8/model.safetensors");
    let bytes = std::fs::read(&path).expect("weights");
    std::fs::write(&path, &bytes[..bytes.len() - 64]).expect("written");
    run(&[&forward[..], &[&q8]].concat()).fails(1, &["cut short"]);
    let text = "\"redraft.layout\":\"1\"";
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).expect("the layout");
    let mut changed = bytes.clone();
    changed[at + text.len() - 2] = b'9';
    std::fs::write(&path, &changed).expect("written");
    run(&[&forward[..], &[&q8]].concat()).fails(1, &["layout 9", "expected 1"]);
    // Nothing is left behind by what failed.
    let names: Vec<String> = std::fs::read_dir(work.dir.path())
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    assert!(names.iter().all(|name| !name.contains(".part")), "{names:?}");
}
