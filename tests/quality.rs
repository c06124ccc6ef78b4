//! `redraft bench --quality` as scripts see it: the shipped model, a tiny judge of random weights,
//! figures that are counted again here.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use redraft::engine::Engine;
use redraft::rng::{DrawKey, uniforms};
use redraft::{Cpu, DType, EngineOptions};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// End of text of the shipped model.
const END: u64 = 0;

/// A fresh directory with a judge in it.
struct Work {
    dir: TempDir,
}

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn shipped() -> PathBuf {
    repository().join("models/redraft-stories-10m")
}

fn fixture(name: &str) -> String {
    repository().join("tests/fixtures").join(name).display().to_string()
}

impl Work {
    fn new() -> Work {
        let work = Work { dir: tempfile::tempdir().expect("a directory") };
        write_judge(&work.dir.path().join("judge"), 4096);
        work
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).expect("a file");
    }

    fn read(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.path().join(name)).expect("a file");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// `redraft` in the directory.
    fn run(&self, args: &[&str]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_redraft"))
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("the binary starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let ran = Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
        ran
    }

    /// `redraft bench --quality` with the judge, and more.
    fn quality(&self, more: &[&str]) -> Ran {
        self.run(&[&["bench", "--quality", "--judge", "judge"], more].concat())
    }

    fn json(&self, more: &[&str]) -> Value {
        let ran = self.quality(&[more, &["--format", "json"]].concat());
        assert_eq!(ran.code, Some(0), "{more:?}: {}", ran.stderr);
        assert_eq!(ran.stdout.lines().count(), 1, "one object");
        serde_json::from_str(&ran.stdout).expect("JSON")
    }
}

impl Ran {
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{words:?}: {}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no `{word}` in: {}", self.stderr);
        }
    }
}

/// A causal checkpoint of random weights in the published form, with the shipped model's tokenizer
/// and ids.
fn write_judge(dir: &Path, vocab_size: usize) {
    const C: usize = 32;
    std::fs::create_dir_all(dir).expect("a directory");
    std::fs::copy(shipped().join("tokenizer.json"), dir.join("tokenizer.json")).expect("a tokenizer");
    let config = json!({
        "architectures": ["BD3LM"], "model_type": "bd3lm", "causal": true, "cross_attn": false, "adaln": false, "block_size": 1,
        "vocab_size": vocab_size, "model_length": 64, "hidden_dim": C, "cond_dim": 8, "n_blocks": 1, "n_heads": 1,
        "bos_token_id": END, "eos_token_id": END, "pad_token_id": 1, "mask_token_id": vocab_size - 1
    });
    std::fs::write(dir.join("config.json"), config.to_string()).expect("a file");
    let shapes: [(&str, Vec<usize>); 12] = [
        ("vocab_embed.embedding", vec![vocab_size, C]),
        ("blocks.0.norm1.weight", vec![C]),
        ("blocks.0.attn_qkv.weight", vec![3 * C, C]),
        ("blocks.0.attn_out.weight", vec![C, C]),
        ("blocks.0.norm2.weight", vec![C]),
        ("blocks.0.mlp.0.weight", vec![4 * C, C]),
        ("blocks.0.mlp.0.bias", vec![4 * C]),
        ("blocks.0.mlp.2.weight", vec![C, 4 * C]),
        ("blocks.0.mlp.2.bias", vec![C]),
        ("output_layer.norm_final.weight", vec![C]),
        ("output_layer.linear.weight", vec![vocab_size, C]),
        ("output_layer.linear.bias", vec![vocab_size]),
    ];
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(tensor, (name, shape))| {
            let count: usize = shape.iter().product();
            // Uniform with the variance of 1 / fan-in, so that neither rows nor logits die out;
            // norms around 1.
            let (centre, scale) = if name.contains("norm") { (1.0, 0.2) } else { (0.0, (3.0 / *shape.last().unwrap() as f64).sqrt()) };
            let value = |position: usize| {
                let key = DrawKey { seed: 11, sample: tensor as u32, stage: 0, block: 0, step: 0, position: position as u32 };
                ((uniforms(key).token * 2.0 - 1.0) * scale + centre) as f32
            };
            (format!("backbone.{name}"), shape, (0..count).flat_map(|i| value(i).to_le_bytes()).collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor")));
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).expect("a container")).expect("a file");
}

const HUMAN: &str = "Once upon a time there was a girl named Sue. She had a cat, and Sue loved the cat.\n<|endoftext|>\n\
    One day Tim went to the park. \"Look, a frog!\" said Tim. The frog ran away, and Tim was sad.\n<|endoftext|>\n\
    The old man lived by the sea. He had a boat and a net. Every day the old man went out to fish.\n";

const ROWS: &str = r#"{"name": "draft", "preset": "draft"}
{"name": "refined", "stages": ["block=4,unmask=uniform:1", "block=full,remask=0.35,unmask=linear:3,order=uniform"]}

{"name": "cool", "preset": "draft", "temperature": 0.5, "seed": 9}
{"name": "cool refined", "preset": "did", "temperature": 0.5, "seed": 9}
"#;

const LENGTH: usize = 40;
const SAMPLES: usize = 5;

fn settings() -> Vec<&'static str> {
    vec!["--rows", "rows.jsonl", "--human", "human.txt", "--train", "train.txt", "--samples", "5", "--length", "40", "--seed", "3"]
}

fn prepared() -> Work {
    let work = Work::new();
    work.write("rows.jsonl", ROWS);
    work.write("human.txt", HUMAN);
    work.write("train.txt", &HUMAN.repeat(2).replace("Sue", "Ann"));
    work
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap_or_else(|| panic!("a list: {value}")).iter().map(|v| v.as_u64().expect("a number")).collect()
}

/// Everything that a clock does not decide.
fn without_times(mut report: Value) -> Value {
    for row in report["rows"].as_array_mut().expect("rows") {
        let cost = row["cost"].as_object_mut().expect("a cost");
        for key in ["ms_per_sample", "tokens_per_s"] {
            assert!(cost.remove(key).and_then(|v| v.as_f64()).is_some_and(|v| v > 0.0), "{key}");
        }
    }
    report
}

fn close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap_or_else(|| panic!("a number: {found}"));
    assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
}

fn entropy(tokens: &[u64]) -> f64 {
    let mut counts: HashMap<u64, f64> = HashMap::new();
    tokens.iter().for_each(|t| *counts.entry(*t).or_default() += 1.0);
    counts.values().map(|c| c / tokens.len() as f64).map(|p| -p * p.ln()).sum()
}

/// Every figure that can be counted from the saved samples is counted again; the rest is there,
/// finite, and inside its interval.
#[test]
fn figures_are_those_of_the_saved_samples() {
    let work = prepared();
    let report = work.json(&[settings(), vec!["--save", "saved.jsonl", "--per-sample"]].concat());
    assert_eq!((report["samples"].as_u64(), report["length"].as_u64(), report["seed"].as_u64()), (Some(5), Some(40), Some(3)));
    assert!(report["judge"] == "judge" && report["dtype"] == "f32" && report["device"].as_str().unwrap().starts_with("cpu"), "{report}");
    let saved = work.read("saved.jsonl");
    assert_eq!(saved.len(), 4 * SAMPLES);
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!(rows.iter().map(|r| r["name"].as_str().unwrap()).collect::<Vec<_>>(), ["draft", "refined", "cool", "cool refined"]);

    let cpu = Cpu::new(2, DType::F32).expect("a CPU");
    let mut judge = Engine::load(&work.dir.path().join("judge"), cpu, EngineOptions::default()).expect("a judge");
    for (row, saved) in rows.iter().zip(saved.chunks(SAMPLES)) {
        let name = row["name"].as_str().expect("a name");
        assert!(saved.iter().enumerate().all(|(i, s)| s["row"] == name && s["sample"] == i && s["seed"] == row["seed"]), "{name}");
        assert_eq!(row["seed"].as_u64(), Some(if name.starts_with("cool") { 9 } else { 3 }));
        let measures = &row["measures"];
        let tokens: Vec<Vec<u64>> = saved.iter().map(|s| ids(&s["tokens"])).collect();
        let drafts: Vec<Vec<u64>> = saved.iter().map(|s| ids(&s["draft"]["tokens"])).collect();
        assert!(tokens.iter().chain(&drafts).all(|t| t.len() == LENGTH));
        let mean = |f: &dyn Fn(usize) -> f64| (0..SAMPLES).map(f).sum::<f64>() / SAMPLES as f64;
        close(&measures["entropy"]["value"], mean(&|i| entropy(&tokens[i])));
        close(&measures["distinct_2"]["value"], mean(&|i| tokens[i].windows(2).collect::<HashSet<_>>().len() as f64 / (LENGTH - 1) as f64));
        let grams: HashSet<&[u64]> = tokens.iter().flat_map(|t| t.windows(4)).collect();
        close(&measures["set_distinct_4"]["value"], grams.len() as f64 / (SAMPLES * (LENGTH - 3)) as f64);
        let differ = |i: usize| tokens[i].iter().zip(&drafts[i]).filter(|(a, b)| a != b).count() as f64 / LENGTH as f64;
        close(&measures["changed"]["value"], mean(&differ));
        let refined = name.ends_with("refined");
        assert_eq!(measures["changed"]["value"].as_f64().unwrap() > 0.0, refined, "{name}");

        // The judge reads BOS and the sample; end of text is no target.
        let losses: Vec<Vec<f64>> = tokens
            .iter()
            .map(|sample| {
                let with_bos: Vec<u32> = std::iter::once(END).chain(sample.iter().copied()).map(|id| id as u32).collect();
                judge.causal_nll(&with_bos).expect("losses").iter().zip(sample).filter(|(_, id)| **id != END).map(|(l, _)| *l).collect()
            })
            .collect();
        let per_token = |i: usize| losses[i].iter().sum::<f64>() / losses[i].len() as f64;
        close(&measures["judge_nll"]["value"], mean(&per_token));
        close(&measures["judge_ppl_mean"]["value"], mean(&|i| per_token(i).exp()));
        let all: Vec<f64> = losses.concat();
        close(&measures["judge_ppl_pooled"]["value"], (all.iter().sum::<f64>() / all.len() as f64).exp());
        (0..SAMPLES).for_each(|i| close(&row["samples"]["judge_nll"][i], per_token(i)));

        for (key, figure) in measures.as_object().expect("measures") {
            // Five short samples may have no name and no finished paragraph.
            if (key == "names" || key == "quotes") && figure.is_null() {
                continue;
            }
            let value = figure["value"].as_f64().unwrap_or_else(|| panic!("{name}: {key}: {figure}"));
            assert!(value.is_finite(), "{name}: {key}: {figure}");
            if !["set_distinct_4", "self_bleu_4", "reverse_ppl"].contains(&key.as_str()) {
                let (low, high) = (figure["low"].as_f64().expect("low"), figure["high"].as_f64().expect("high"));
                assert!(low <= value && value <= high, "{name}: {key}: {figure}");
            }
        }
        assert!(measures["copied_run"]["max"].as_f64() >= measures["copied_run"]["high"].as_f64(), "{measures}");

        let stages = if refined { 2 } else { 1 };
        assert_eq!(row["schedule"].as_array().map(Vec::len), Some(stages));
        // 40 tokens one by one, then 14 masks in 3 forwards, or in the 12 of the preset.
        let nfe = LENGTH as f64 + [0.0, 3.0, 0.0, 12.0][rows.iter().position(|r| r == row).unwrap()];
        close(&row["cost"]["nfe"], nfe);
        close(&row["cost"]["forwards"], nfe);
        assert_eq!(row["paired"].is_null(), !refined, "{name}");
        if refined {
            let base = &rows[if name == "refined" { 0 } else { 2 }];
            assert_eq!(row["paired"]["to"], base["name"]);
            let minus = |i: usize| per_token(i) - base["samples"]["judge_nll"][i].as_f64().unwrap();
            close(&row["paired"]["judge_nll"]["value"], mean(&minus));
            close(&row["paired"]["improved"], mean(&|i| f64::from(u8::from(minus(i) < 0.0))));
        }
    }
    let human = &report["human"];
    assert_eq!(human["windows"].as_u64(), Some(3), "as many as documents");
    assert!(
        human["measures"]["judge_nll"]["value"].as_f64().is_some_and(f64::is_finite) && human["measures"]["changed"].is_null(),
        "{human}"
    );
    // The training text is the human text with another name: what stands between two names is
    // copied.
    assert!(human["measures"]["copied_run"]["max"].as_f64().is_some_and(|run| run >= 15.0), "{human}");
    // Text that the trigram model was fitted to, against a model of stories: the other way round
    // for the reverse.
    assert!(human["measures"]["trigram_ppl"]["value"].as_f64() < rows[0]["measures"]["trigram_ppl"]["value"].as_f64());
}

/// What is measured is what `generate` writes.
#[test]
fn samples_are_those_of_generate() {
    let work = Work::new();
    work.json(&["--preset", "did", "--samples", "2", "--length", "24", "--seed", "5", "--temperature", "0.7", "--save", "saved.jsonl"]);
    let args = "generate --preset did --samples 2 --length 24 --seed 5 --temperature 0.7 --ignore-eos --format jsonl";
    let args: Vec<&str> = args.split(' ').collect();
    let ran = work.run(&args);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let generated: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for (saved, generated) in work.read("saved.jsonl").iter().zip(&generated) {
        assert_eq!(
            (ids(&saved["tokens"]), ids(&saved["draft"]["tokens"])),
            (ids(&generated["tokens"]), ids(&generated["draft"]["tokens"]))
        );
    }
}

#[test]
fn figures_depend_on_the_request_alone() {
    let work = prepared();
    let run = |more: &[&str]| {
        let mut report = without_times(work.json(&[settings(), more.to_vec()].concat()));
        for key in ["device", "batch", "notes"] {
            assert!(report.as_object_mut().expect("an object").remove(key).is_some(), "{key}");
        }
        report.to_string()
    };
    let one = run(&["--threads", "1"]);
    for more in [&["--threads", "1"][..], &["--threads", "2"], &["--threads", "2", "--batch", "2"]] {
        assert_eq!(run(more), one, "{more:?}");
    }
}

/// Without flags, the headline: six rows over one set of drafts, and what is missing is said.
#[test]
fn the_headline_shares_its_drafts() {
    let work = Work::new();
    let report = work.json(&["--samples", "3", "--length", "21"]);
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!(
        rows.iter().map(|r| r["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["draft", "snapshot", "random", "post-hoc", "held-out:4", "did-lift"]
    );
    for row in &rows[1..5] {
        let refine = row["schedule"][1].as_str().expect("a stage");
        assert!(
            refine.contains("block=full") && refine.contains("remask=0.35") && refine.contains("unmask=linear:12,order=uniform"),
            "{refine}"
        );
        assert!(refine.contains(&format!("by={}", row["name"].as_str().unwrap())), "{refine}");
        assert_eq!(row["paired"]["to"], "draft");
        assert!(row["samples"].is_null(), "only with --per-sample");
    }
    let extra = |i: usize| rows[i]["cost"]["forwards"].as_f64().unwrap() - rows[i]["cost"]["nfe"].as_f64().unwrap();
    assert_eq!([0, 1, 2, 3, 4, 5].map(extra), [0.0, 0.0, 0.0, 1.0, 4.0, 4.0], "scoring forwards");
    assert_eq!(rows[5]["paired"]["to"], "draft");
    assert!(
        report["human"].is_null() && rows.iter().all(|r| r["measures"]["trigram_ppl"].is_null() && r["measures"]["reverse_ppl"].is_null())
    );
    let notes = report["notes"].to_string();
    assert!(notes.contains("--train") && notes.contains("--human") && notes.contains("3 samples"), "{notes}");
}

#[test]
fn the_table_has_a_line_for_every_row() {
    let work = prepared();
    let ran = work.quality(&settings());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for line in ["human *", "draft ", "refined ", "cool refined ", "judged by judge"] {
        assert!(ran.stdout.lines().any(|l| l.starts_with(line)), "{line}: {}", ran.stdout);
    }
    assert!(ran.stdout.contains("95 %") && ran.stdout.contains("throughput with 5 samples"), "{}", ran.stdout);
    // Progress: a line for human text and one for each row.
    assert_eq!(ran.stderr.lines().filter(|l| l.contains("pooled judge perplexity")).count(), 5, "{}", ran.stderr);
}

/// Rows may name models; drafts of different models are not pairs.
#[test]
fn rows_may_name_models() {
    let work = Work::new();
    let (plain, head64) = (fixture("bd3lm-plain"), fixture("bd3lm-head64"));
    work.write(
        "rows.jsonl",
        &format!("{{\"name\":\"a\",\"preset\":\"draft\"}}\n{}\n", json!({"name": "b", "preset": "did", "model": head64})),
    );
    let judge = fixture("bd3lm-ar");
    let args = [
        "bench",
        "--quality",
        "--model",
        &plain,
        "--judge",
        &judge,
        "--rows",
        "rows.jsonl",
        "--samples",
        "2",
        "--length",
        "20",
        "--format",
        "json",
    ];
    let ran = work.run(&args);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let report: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!((&report["rows"][0]["model"], &report["rows"][1]["model"]), (&json!(plain), &json!(head64)));
    assert!(report["rows"][1]["paired"].is_null(), "{report}");
    // A stage may name the second --model, and no third.
    let two = [
        "bench",
        "--quality",
        "--model",
        &plain,
        "--model",
        &head64,
        "--judge",
        &judge,
        "--samples",
        "2",
        "--length",
        "20",
        "--stage",
        "block=4",
    ];
    let ran = work.run(&[&two[..], &["--stage", "block=full,remask=0.5,weights=1"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    work.run(&[&two[..], &["--stage", "block=full,remask=0.5,weights=2"]].concat()).fails(2, &["weights=2", "2 models"]);
}

/// A copy of a fixture in which one weight is not a number, which shows only when it is read.
fn write_broken(dir: &Path) {
    std::fs::create_dir_all(dir).expect("a directory");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(Path::new(&fixture("bd3lm-plain")).join(name), dir.join(name)).expect("a copy");
    }
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("weights");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("a length")) as usize;
    let names: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let at = names["backbone.output_layer.linear.bias"]["data_offsets"][0].as_u64().expect("an offset") as usize;
    bytes[8 + header + at..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).expect("weights");
}

/// What was measured before a row failed is printed, and the failure is one.
#[test]
fn finished_rows_survive_a_row_that_fails() {
    let work = Work::new();
    write_broken(&work.dir.path().join("broken"));
    work.write("rows.jsonl", "{\"name\":\"good\",\"preset\":\"draft\"}\n{\"name\":\"bad\",\"preset\":\"draft\",\"model\":\"broken\"}\n");
    let (plain, judge) = (fixture("bd3lm-plain"), fixture("bd3lm-ar"));
    let args = ["bench", "--quality", "--model", &plain, "--judge", &judge, "--rows", "rows.jsonl", "--samples", "2", "--length", "20"];
    let ran = work.run(&[&args[..], &["--save", "saved.jsonl", "--format", "json"]].concat());
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("broken") && ran.stderr.contains("linear.bias"), "{}", ran.stderr);
    let report: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(1), "{report}");
    assert_eq!((&report["rows"][0]["name"], work.read("saved.jsonl").len()), (&json!("good"), 2));
    // Weights that are not there at all are missed before anything runs.
    std::fs::remove_file(work.dir.path().join("broken/model.safetensors")).expect("a file");
    work.run(&args).fails(1, &["broken", "no weights"]);
}

#[test]
fn mistakes_are_named_before_anything_runs() {
    let work = prepared();
    work.write("empty.txt", "<|endoftext|>\n \n");
    work.write("short.txt", "One day.");
    write_judge(&work.dir.path().join("smaller"), 4000);
    let tiny = ["--samples", "2", "--length", "16"];
    let with = |more: &[&str]| work.quality(&[&tiny[..], more].concat());
    with(&["--human", "empty.txt"]).fails(2, &["empty.txt", "expected text"]);
    with(&["--human", "short.txt"]).fails(2, &["--human short.txt", "16 tokens"]);
    with(&["--human", "absent.txt"]).fails(1, &["absent.txt"]);
    with(&["--train", "empty.txt"]).fails(2, &["empty.txt"]);
    for (rows, words) in [
        ("{\"name\":\"a\",\"preset\":\"draft\"}\n\nnonsense\n", &["rows.jsonl:3", "expected"][..]),
        ("{\"name\":\"a\",\"preset\":\"best\"}\n", &["rows.jsonl:1", "row `a`", "unknown preset `best`"]),
        ("{\"name\":\"a\",\"preset\":\"draft\"}\n{\"name\":\"b\",\"stages\":[\"block=0\"]}\n", &["rows.jsonl:2", "row `b`", "block"]),
        ("{\"name\":\"a\"}\n", &["rows.jsonl:1", "stages or preset"]),
        ("{\"name\":\"a\",\"preset\":\"draft\",\"stages\":[\"block=4\"]}\n", &["rows.jsonl:1", "both"]),
        ("{\"name\":\"a\",\"stages\":[]}\n", &["rows.jsonl:1", "at least one stage"]),
        ("{\"name\":\"\",\"preset\":\"draft\"}\n", &["rows.jsonl:1", "name"]),
        ("{\"preset\":\"draft\"}\n", &["rows.jsonl:1", "name"]),
        ("{\"name\":\"a\",\"preset\":\"draft\",\"colour\":1}\n", &["rows.jsonl:1", "colour"]),
        ("{\"name\":\"a\",\"preset\":\"draft\",\"temperature\":-1}\n", &["rows.jsonl:1", "temperature", "-1"]),
        ("{\"name\":\"a\",\"preset\":\"draft\",\"seed\":-1}\n", &["rows.jsonl:1", "-1"]),
        ("{\"name\":\"a\",\"preset\":\"draft\"}\n{\"name\":\"a\",\"preset\":\"did\"}\n", &["rows.jsonl:2", "two rows"]),
        ("\n", &["rows.jsonl", "found no row"]),
    ] {
        work.write("rows.jsonl", rows);
        with(&["--rows", "rows.jsonl"]).fails(2, words);
    }
    work.write("rows.jsonl", "{\"name\":\"a\",\"preset\":\"draft\",\"model\":\"nowhere\"}\n");
    with(&["--rows", "rows.jsonl"]).fails(1, &["nowhere", "no such model directory"]);
    work.write("rows.jsonl", "{\"name\":\"a\",\"preset\":\"did\",\"model\":\"judge\"}\n");
    with(&["--rows", "rows.jsonl"]).fails(2, &["judge", "autoregressive"]);

    let quality = |args: &[&str]| work.run(&[&["bench", "--quality"], &tiny[..], args].concat());
    quality(&["--judge", "nowhere"]).fails(1, &["nowhere", "no such model directory"]);
    quality(&["--judge", &shipped().display().to_string()]).fails(1, &["config.json", "autoregressive"]);
    quality(&["--judge", &fixture("bd3lm-ar")]).fails(1, &["bd3lm-ar", "end-of-text token", "vocabulary of"]);
    quality(&["--judge", "smaller"]).fails(1, &["smaller", "tokenizer.json"]);
    quality(&["--judge", "judge", "--model", &fixture("bd3lm-plain")]).fails(1, &["vocabulary"]);
    with(&["--temperature", "-1"]).fails(2, &["--temperature", "-1"]);
    with(&["--batch", "2,4"]).fails(2, &["--batch", "found 2"]);
    work.quality(&["--samples", "2", "--length", "64"]).fails(2, &["--length", "64 positions", "judge"]);
    for flags in
        [&["--shape", "tiny"][..], &["--runs", "2"], &["--plot", "p.svg"], &["--samples", "0"], &["--rows", "r", "--preset", "did"]]
    {
        with(flags).fails(2, &[]);
    }
    // The flags of one half of the command mean nothing in the other.
    work.run(&["bench", "--judge", "judge"]).fails(2, &["--quality"]);
    work.run(&["bench", "--model", "a", "--model", "b"]).fails(2, &["--quality"]);
}
