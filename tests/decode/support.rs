//! Engines, schedules and outcomes for the invariants of the engine.

use std::path::{Path, PathBuf};

use redraft::backend::HeadShape;
use redraft::config::{AttentionMask, ModelConfig};
use redraft::engine::Engine;
use redraft::model::registry;
use redraft::model::shapes;
use redraft::request::{Prompt, Request, SubmittedRequest};
use redraft::schedule::{Defaults, PRESETS};
use redraft::scheduler::Budget;
use redraft::sequence::{Forwards, Sequence};
use redraft::{Backend, Cpu, DType, EngineOptions, Finish, Output, Schedule};

/// A tiny checkpoint with odd shapes: 131 tokens, three heads of 32.
pub fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bd3lm-adaln")
}

/// The model that ships: the one directory under `models/` that generates; the judge beside it
/// scores.
pub fn shipped() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let generates = |dir: &PathBuf| {
        let config = registry::read_config(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        !config.is_autoregressive()
    };
    let dirs = entries.map(|e| e.expect("an entry").path()).filter(|p| p.join("config.json").exists());
    let dirs: Vec<PathBuf> = dirs.filter(generates).collect();
    assert_eq!(dirs.len(), 1, "one model ships, found {dirs:?}");
    dirs[0].clone()
}

/// Stale reads show: freed pages are filled with NaN.
pub fn options() -> EngineOptions {
    EngineOptions { poison_freed_pages: true, ..EngineOptions::default() }
}

pub fn budget(max_rows: usize, max_sequences: usize) -> Budget {
    Budget { max_rows, max_sequences }
}

pub fn engine_with(dir: &Path, threads: usize, dtype: DType, options: EngineOptions) -> Engine<Cpu> {
    let backend = Cpu::new(threads, dtype).expect("the CPU is always there");
    Engine::load(dir, backend, options).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

pub fn engine(dir: &Path) -> Engine<Cpu> {
    engine_with(dir, 1, DType::F32, options())
}

/// Untrained weights of the `tiny` shape (128 positions trained, 512 served), for counting.
pub fn tiny() -> Engine<Cpu> {
    let config = shapes::config("tiny").expect("a known shape");
    Engine::random(config, Cpu::new(1, DType::F32).expect("the CPU is always there"), options()).expect("random weights")
}

pub fn schedule(stages: &[&str]) -> Schedule {
    let specs: Vec<_> = stages.iter().map(|s| s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))).collect();
    Schedule::resolve(&specs, &Defaults::default()).unwrap_or_else(|e| panic!("{stages:?}: {e}"))
}

pub fn preset(name: &str) -> Schedule {
    Schedule::preset(name, &Defaults::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// `prompt` tokens, then `length` generated ones, always to the end.
pub fn request(prompt: &[u32], length: usize, schedule: &Schedule, seed: u64, sample: u32) -> Request {
    let mut request = Request::new(Prompt::Tokens { tokens: prompt.to_vec(), length }, schedule.clone(), seed, sample);
    request.stop.ignore_eos = true;
    request
}

/// What must not depend on anything but the request.
#[derive(Clone, Debug, PartialEq)]
pub struct Essence {
    pub finish: Finish,
    pub canvas: Vec<u32>,
    pub positions: Vec<usize>,
    pub tokens: Vec<u32>,
    pub draft: Vec<u32>,
    /// Bits of the snapshot confidences.
    pub confidence: Vec<u32>,
    pub revealed_at: Vec<(u8, u32)>,
    pub stages: Vec<StageEssence>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct StageEssence {
    pub forwards: Forwards,
    pub rows: usize,
    pub remasked: Vec<usize>,
    pub changed: usize,
}

impl Essence {
    pub fn of(output: &Output) -> Essence {
        Essence {
            finish: output.finish,
            canvas: output.canvas.clone(),
            positions: output.positions.clone(),
            tokens: output.tokens.clone(),
            draft: output.draft.clone(),
            confidence: output.confidence.iter().map(|c| c.to_bits()).collect(),
            revealed_at: output.revealed_at.clone(),
            stages: output
                .stages
                .iter()
                .map(|s| StageEssence { forwards: s.forwards, rows: s.rows, remasked: s.remasked.clone(), changed: s.changed })
                .collect(),
        }
    }

    /// What was written and how sure the model was, not what it cost.
    pub fn text(&self) -> Essence {
        Essence { stages: Vec::new(), ..self.clone() }
    }
}

/// Runs the engine to its end and takes the outcomes, with the label of a case in every failure.
pub fn finish<B: Backend>(engine: &mut Engine<B>, handles: &[SubmittedRequest], label: &str) -> Vec<Output> {
    engine.run().unwrap_or_else(|e| panic!("{label}: {e}"));
    handles
        .iter()
        .enumerate()
        .map(|(i, handle)| {
            // The outcome follows the events.
            handle.events().for_each(drop);
            handle
                .take_output()
                .unwrap_or_else(|| panic!("{label}: request {i}: no outcome"))
                .unwrap_or_else(|e| panic!("{label}: request {i}: {e}"))
        })
        .collect()
}

/// Runs requests together.
pub fn together<B: Backend>(engine: &mut Engine<B>, requests: &[Request], label: &str) -> Vec<Output> {
    let handles: Vec<SubmittedRequest> =
        requests.iter().map(|r| engine.submit(r.clone()).unwrap_or_else(|e| panic!("{label}: {e}"))).collect();
    finish(engine, &handles, label)
}

/// Runs requests one after the other, each with the engine to itself.
pub fn alone<B: Backend>(engine: &mut Engine<B>, requests: &[Request], label: &str) -> Vec<Output> {
    requests.iter().map(|r| together(engine, std::slice::from_ref(r), label).remove(0)).collect()
}

/// Compares outcomes case by case; `text`: what was written only.
pub fn same(found: &[Output], expected: &[Output], text: bool, label: &str) {
    assert_eq!(found.len(), expected.len(), "{label}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let (found, expected) = (Essence::of(found), Essence::of(expected));
        let (found, expected) = if text { (found.text(), expected.text()) } else { (found, expected) };
        assert_eq!(found.canvas, expected.canvas, "{label}: request {i}: canvas");
        assert_eq!(found, expected, "{label}: request {i}");
    }
}

/// Every length of a preset, over a model that was trained with blocks of `block_len`, in a pool
/// that is made for that length.
///
/// The network has one layer of width 16 and 24 tokens: what is tested is counting. Every length
/// is submitted, which is where pages are counted; those that `generates` picks are written too.
pub fn every_length<B: Backend>(
    backend: impl Fn() -> B,
    preset: &str,
    block_len: usize,
    lengths: impl Iterator<Item = usize>,
    generates: impl Fn(usize) -> bool,
) {
    let tiny = shapes::config("tiny").expect("a known shape");
    let mut config = ModelConfig {
        num_layers: 1,
        vocab_size: 24,
        hidden_dim: 16,
        mlp_dim: 32,
        heads: HeadShape { num_heads: 1, num_kv_heads: 1, head_dim: 16 },
        cond_dim: None,
        attention: AttentionMask::BlockCausal(block_len),
        ..tiny
    };
    (config.mask_id, config.bos_id, config.eos_id, config.stop_ids) = (Some(23), Some(22), Some(22), vec![22]);
    let schedule = Schedule::preset(preset, &Engine::<Cpu>::defaults(&config)).expect("a preset");
    for length in lengths {
        let prompt = [1, 2, 3];
        let mut canvas = vec![Some(0); prompt.len()];
        canvas.resize(prompt.len() + length, None);
        let budget = Budget { max_sequences: 1, ..EngineOptions::default().budget };
        let options = EngineOptions { budget, ..EngineOptions::default() }.with_pages_for(Sequence::decoded_len(&schedule, &canvas));
        let mut engine = Engine::random(config.clone(), backend(), options).expect("random weights");
        let handle = engine.submit(request(&prompt, length, &schedule, 1, 0)).unwrap_or_else(|e| panic!("{preset}, {length}: {e}"));
        if !generates(length) {
            continue;
        }
        engine.run().expect("runs");
        handle.events().for_each(drop);
        let output = handle.take_output().expect("finished").unwrap_or_else(|e| panic!("{preset}, {length}: {e}"));
        assert_eq!(output.tokens.len(), length, "{preset}");
    }
}

/// Presets that need nothing beside the model.
pub fn independent_presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name).filter(|name| *name != "did-joint")
}
