//! What autoregressive checkpoints write, against transformers: greedy, and sampled from recorded
//! draws.

use std::path::Path;
use std::sync::Arc;

use redraft::backend::DType;
use redraft::cpu::Cpu;
use redraft::engine::Engine;
use redraft::request::{Output, Prompt, Request};
use redraft::rng::Uniforms;
use redraft::schedule::Schedule;
use serde_json::Value;

use crate::fixture::{Fixture, text};

const NAMES: [&str; 5] = ["gpt2", "llama", "qwen2", "qwen3", "qwen3-moe"];

/// As in `traces.rs`.
const CONFIDENCE: f64 = 1e-4;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

fn runs(fixture: &Fixture) -> Vec<Value> {
    fixture.json("autoregressive.json")["runs"].as_array().expect("runs").clone()
}

fn request(engine: &Engine<Cpu>, recorded: &Value, kv: &str) -> Request {
    let stage = format!("block=1,temperature={},top_p={},kv={kv}", recorded["temperature"], recorded["top_p"]);
    let defaults = Engine::<Cpu>::defaults(engine.config());
    let schedule = Schedule::resolve(&[stage.parse().expect("a stage")], &defaults).expect("a schedule");
    let (tokens, length) = (ids(&recorded["prompt"]), ids(&recorded["tokens"]).len());
    let first = tokens.len();
    let mut request = Request::new(Prompt::Tokens { tokens, length }, schedule, 0, 0);
    request.stop.ignore_eos = true;
    if !recorded["draws"].is_null() {
        let draws = numbers(&recorded["draws"]);
        request.draws = Some(Arc::new(move |key| Uniforms { token: draws[key.position as usize - first], order: 0.5 }));
    }
    request
}

fn together(engine: &mut Engine<Cpu>, requests: Vec<Request>, label: &str) -> Vec<Output> {
    let handles: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap_or_else(|e| panic!("{label}: {e}"))).collect();
    engine.run().unwrap_or_else(|e| panic!("{label}: {e}"));
    let output = |handle: &redraft::request::SubmittedRequest| {
        handle.events().for_each(drop);
        handle.take_output().unwrap_or_else(|| panic!("{label}: no output")).unwrap_or_else(|e| panic!("{label}: {e}"))
    };
    handles.iter().map(output).collect()
}

fn follows(output: &Output, recorded: &Value, label: &str) {
    assert_eq!(output.tokens, ids(&recorded["tokens"]), "{label}");
    for (i, (found, recorded)) in output.confidence.iter().zip(numbers(&recorded["confidence"])).enumerate() {
        assert!((f64::from(*found) - recorded).abs() <= CONFIDENCE, "{label}: confidence of token {i}: {found}, recorded {recorded}");
    }
}

/// With and without reuse of K/V, alone and together: the recorded tokens, the same bits, and one
/// row a forward where K/V is reused.
#[test]
fn texts_are_those_of_transformers() {
    for name in NAMES {
        let fixture = Fixture::open(name);
        let runs = runs(&fixture);
        assert_eq!(runs.len(), 3, "{name}: runs");
        assert!(name == "gpt2" || runs.iter().all(|run| ids(&run["tokens"]).len() == 100), "{name}: lengths");
        let mut engine = fixture.engine(2, DType::F32);
        let free = engine.free_pages();
        let all = |engine: &mut Engine<Cpu>, kv: &str| {
            let requests = runs.iter().map(|run| request(engine, run, kv)).collect();
            together(engine, requests, &format!("{name} kv={kv}"))
        };
        let (cached, recomputed) = (all(&mut engine, "exact"), all(&mut engine, "recompute"));
        for (recorded, (cached, recomputed)) in runs.iter().zip(cached.iter().zip(&recomputed)) {
            let label = format!("{name} {}", text(recorded, "name"));
            follows(cached, recorded, &label);
            let alone = request(&engine, recorded, "exact");
            let alone = together(&mut engine, vec![alone], &label).remove(0);
            for other in [recomputed, &alone] {
                assert_eq!((&other.tokens, &other.confidence), (&cached.tokens, &cached.confidence), "{label}");
                assert_eq!(other.log_prob, cached.log_prob, "{label}");
            }
            let (prompt, length) = (ids(&recorded["prompt"]).len(), cached.tokens.len());
            let (stage, forwards) = (&cached.stages[0], cached.stages[0].forwards);
            assert_eq!((forwards.prefill, forwards.denoise, forwards.commit), (1, length, 0), "{label}: {forwards:?}");
            assert_eq!(stage.rows, prompt + length, "{label}: rows");
        }
        assert_eq!(engine.free_pages(), free, "{name}: pages are back");
    }
}

/// Mistral's class over Llama's weights, which the writer runs as well.
#[test]
fn mistral_writes_what_llama_writes() {
    let fixture = Fixture::open("llama");
    let copy = tempfile::tempdir().expect("a directory");
    copy_as_mistral(&fixture.dir, copy.path());
    let mut engine =
        Engine::load(copy.path(), Cpu::new(1, DType::F32).expect("the CPU is always there"), Default::default()).expect("a model");
    assert_eq!(engine.config().family.name, "mistral");
    for recorded in &runs(&fixture) {
        let asked = request(&engine, recorded, "exact");
        follows(&together(&mut engine, vec![asked], "mistral")[0], recorded, text(recorded, "name"));
    }
}

fn copy_as_mistral(from: &Path, to: &Path) {
    for entry in from.read_dir().expect("a fixture") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
    let config = std::fs::read_to_string(from.join("config.json")).expect("a configuration");
    let config =
        config.replace("\"model_type\": \"llama\"", "\"model_type\": \"mistral\"").replace("LlamaForCausalLM", "MistralForCausalLM");
    std::fs::write(to.join("config.json"), config).expect("a file");
}
