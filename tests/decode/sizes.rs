//! A pool of as many pages as a request decodes serves it, whatever its length and schedule.

use redraft::config::AttentionMask;
use redraft::engine::Engine;
use redraft::model::shapes;
use redraft::schedule::PRESETS;
use redraft::scheduler::Budget;
use redraft::sequence::Sequence;
use redraft::{Backend, Cpu, DType, EngineOptions, Schedule};

use crate::support::request;

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
    let mut config = redraft::config::ModelConfig {
        num_layers: 1,
        vocab_size: 24,
        hidden_dim: 16,
        mlp_dim: 32,
        heads: redraft::backend::HeadShape { num_heads: 1, num_kv_heads: 1, head_dim: 16 },
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
pub fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name).filter(|name| *name != "did-joint")
}

#[test]
fn every_length_of_every_preset_is_served() {
    let cpu = || Cpu::new(1, DType::F32).expect("the CPU is always there");
    for preset in presets() {
        let fills = PRESETS.iter().any(|known| known.name == preset && known.stages[0].contains("last=fill"));
        // Presets that decode what they are asked for run the whole text at every step: writing
        // all of their lengths takes minutes.
        every_length(cpu, preset, 32, 1..=300, |length| fills || length <= 24 || length % 23 == 0);
        every_length(cpu, preset, 4, 1..=300, |length| length <= 9 || length % 41 == 0);
    }
}

/// What an engine makes room for where nothing is asked: the longest text that it serves.
#[test]
fn an_engine_for_one_request_serves_all_that_it_may() {
    let config = shapes::config("tiny").expect("a known shape");
    let longest = config.max_len();
    let options = EngineOptions { budget: Budget { max_rows: 512, max_sequences: 1 }, ..EngineOptions::default() };
    let mut engine = Engine::random(config, Cpu::new(1, DType::F32).expect("a CPU"), options).expect("random weights");
    let schedule = crate::support::schedule(&["block=full,visible=canvas,unmask=linear:1"]);
    let handle = engine.submit(request(&[1], longest - 1, &schedule, 0, 0)).expect("within what is served");
    engine.run().expect("runs");
    handle.events().for_each(drop);
    assert_eq!(handle.take_output().expect("finished").expect("a text").tokens.len(), longest - 1);
}
