//! A pool of as many pages as a request decodes serves it, whatever its length and schedule.

use redraft::engine::Engine;
use redraft::model::shapes;
use redraft::schedule::PRESETS;
use redraft::scheduler::Budget;
use redraft::{Cpu, DType, EngineOptions};

use crate::support::{every_length, independent_presets, request};

#[test]
fn every_length_of_every_preset_is_served() {
    let cpu = || Cpu::new(1, DType::F32).expect("the CPU is always there");
    for preset in independent_presets() {
        let fills = PRESETS.iter().any(|known| known.name == preset && known.stages[0].contains("last=fill"));
        // Writing all of them takes minutes. Where a block is decoded to its end, all lengths over
        // two blocks are written; where it is not, what is decoded is what was asked for.
        let written = if fills { 66 } else { 12 };
        every_length(cpu, preset, 32, 1..=300, |length| length <= written || length % 37 == 0);
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
