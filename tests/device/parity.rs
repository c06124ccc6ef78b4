//! Hidden states and logits of the device against the official networks, as `tests/parity` holds
//! the CPU to them.

use redraft::DType;

use crate::backends;
use crate::fixture::{self, relative, text, visibility};
use crate::joint;

/// As for the CPU: the golden values' own rounding, and another order of summation.
const F32_BOUND: f64 = 2e-5;

/// Worst error relative to the scale of the state, over all layers and the logits of every case of
/// every fixture.
fn worst(dtype: DType, bound: impl Fn(usize) -> f64) {
    for fixture in fixture::all() {
        for backend in backends(dtype) {
            let mut engine = fixture.engine_on(backend);
            let (width, vocab) = (engine.config().hidden_dim, engine.config().vocab_size);
            let mut worst = 0.0f64;
            // The first cases have every layer; the longer ones would only take time under
            // emulation.
            for case in fixture.cases().iter().take(2) {
                let name = text(case, "name");
                let tokens = fixture.tokens(text(case, "tokens"));
                let (hidden, logits) = fixture::forward(&mut engine, &tokens, visibility(&case["block_len"]));
                let mut check = |layer: usize, found: &[f32], golden: &str, width: usize| {
                    let error = relative(found, &fixture.floats(golden).1, width);
                    worst = worst.max(error);
                    assert!(error <= bound(layer), "{} {name}: layer {layer}: {error:.2e}, bound {:.2e}", fixture.name, bound(layer));
                };
                for (i, golden) in case["hidden"].as_array().expect("hidden").iter().enumerate() {
                    check(i, &hidden[i], golden.as_str().expect("a name"), width);
                }
                check(hidden.len(), &logits, text(case, "logits"), vocab);
            }
            println!("{:<22} {dtype:?} worst relative error {worst:.2e}", fixture.name);
        }
    }
}

#[test]
fn every_layer_agrees_in_f32() {
    worst(DType::F32, |_| F32_BOUND);
}

/// Seven roundings to 8 bits a layer on top of one of the embedding or the head, four deviations,
/// and half as much again for what a norm enlarges; see the bound in `tests/parity/golden.rs`.
#[test]
fn every_layer_agrees_in_bf16_up_to_its_rounding() {
    worst(DType::Bf16, |layers| 4.0 * 1.5 * 0.8165 / 512.0 * ((7 * layers + 1) as f64).sqrt());
}

/// The joint sampler's layer, call by call.
#[test]
fn chained_calls_of_the_joint_sampler_agree_in_f32() {
    for name in ["bd3lm-adaln", "dream", "llada"] {
        for backend in backends(DType::F32) {
            let worst = joint::worst(name, backend);
            assert!(worst <= 5e-5, "{name}: {worst:.2e}");
        }
    }
}
