//! A joint distribution small enough to enumerate (`tests/toy`, made by
//! `tools/train_joint/toy.py`): tokens that a joint sampler unmasks together are far closer to it
//! than tokens revealed together each by its own distribution.

use std::path::Path;

use redraft::engine::Engine;
use redraft::request::Request;
use redraft::{Cpu, DType, EngineOptions, Schedule};

use crate::support::*;

const SAMPLES: u32 = 4000;

#[derive(serde::Deserialize)]
struct Distribution {
    first_symbol: u32,
    /// Of the 2^8 outcomes; the first position is the highest bit.
    probabilities: Vec<f64>,
}

/// Total variation between what a stage draws and the exact joint.
fn distance(engine: &mut Engine<Cpu>, exact: &Distribution, stage: &str) -> f64 {
    let spec = format!("{stage},temperature=1,top_p=1").parse().expect("a stage");
    let schedule = Schedule::resolve(&[spec], &Engine::<Cpu>::defaults(engine.config())).expect("a schedule");
    let length = exact.probabilities.len().ilog2() as usize;
    let requests: Vec<Request> = (0..SAMPLES).map(|sample| request(&[0], length, &schedule, 11, sample)).collect();
    let mut counts = vec![0u32; exact.probabilities.len()];
    for output in together(engine, &requests, stage) {
        let outcome = output.tokens.iter().try_fold(0, |outcome, token| match token.checked_sub(exact.first_symbol) {
            Some(symbol @ 0..=1) => Some(2 * outcome + symbol as usize),
            _ => None,
        });
        // Anything that is no symbol is mass that no outcome has.
        if let Some(outcome) = outcome {
            counts[outcome] += 1;
        }
    }
    let frequency = |count: &u32| f64::from(*count) / f64::from(SAMPLES);
    let lost = 1.0 - counts.iter().map(frequency).sum::<f64>();
    (counts.iter().zip(&exact.probabilities).map(|(count, p)| (frequency(count) - p).abs()).sum::<f64>() + lost) / 2.0
}

#[test]
fn joint_reveals_are_close_to_the_joint() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/toy");
    let text = std::fs::read_to_string(dir.join("distribution.json")).expect("beside the model");
    let exact: Distribution = serde_json::from_str(&text).expect("a distribution");
    let mut engine = engine_with(&dir, 2, DType::F32, EngineOptions { budget: budget(1024, 64), ..EngineOptions::default() });
    engine.attach_joint(&dir.join("joint"), &mut |_, _| {}).expect("a sampler of this model");
    let mut of = |stage: &str| distance(&mut engine, &exact, stage);
    let one = of("block=full,unmask=entropy:1");
    let rows: Vec<(usize, f64, f64)> = [2, 4, 8]
        .map(|k| (k, of(&format!("block=full,unmask=entropy:{k}")), of(&format!("block=full,unmask=entropy:{k},sampler=joint"))))
        .to_vec();
    println!("total variation to the exact joint: one token {one:.3}; (K, marginal, joint) {rows:.3?}");
    // As many exact draws are 0.04 away; a standard error is 0.006.
    assert!(one < 0.08, "one token a forward: {one}");
    for (k, marginal, joint) in rows {
        assert!(joint < marginal / 4.0, "{k} a forward: joint {joint}, marginal {marginal}");
    }
}
