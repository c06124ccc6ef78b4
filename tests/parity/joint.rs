//! The joint sampler's layer against an independent implementation of its published equations, call
//! by call.

use redraft::backend::{Backend, DType};
use redraft::cpu::Cpu;
use serde_json::Value;

use crate::fixture::{Fixture, relative, text, visibility};

const BASES: [&str; 3] = ["bd3lm-adaln", "dream", "llada"];

/// Chained calls carry their own rounding on: the state of call eight has been through eight
/// layers.
const F32_BOUND: f64 = 5e-5;

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number") as u32).collect()
}

/// Worst relative error over all cases and calls.
pub fn worst<B: Backend>(name: &str, backend: B) -> f64 {
    let fixture = Fixture::open(name);
    let mut engine = fixture.engine_on(backend);
    engine.attach_joint(&fixture.dir.join("joint"), &mut |_, _| {}).expect("a sampler");
    let vocab_size = engine.config().vocab_size;
    let golden = fixture.json("joint/joint.json");
    let mut worst = 0.0f64;
    let mut calls = 0;
    for case in golden["cases"].as_array().expect("cases") {
        let states: Vec<Vec<u32>> = case["states"].as_array().expect("states").iter().map(numbers).collect();
        let window = numbers(&case["window"]);
        let window = window[0] as usize..window[1] as usize;
        let found = engine.joint_logits(&states, window.clone(), visibility(&case["block_len"])).expect("calls");
        let names = case["logits"].as_array().expect("logits");
        assert_eq!((found.len(), states.len()), (names.len(), names.len() + 1), "{name}: one golden state per call");
        for (call, (found, golden)) in found.iter().zip(names).enumerate() {
            let (shape, golden) = fixture.floats_of("joint/joint.safetensors", golden.as_str().expect("a name"));
            assert_eq!(shape, [window.len(), vocab_size]);
            let error = relative(found, &golden, vocab_size);
            worst = worst.max(error);
            assert!(error < 0.5, "{name} {}: call {}: relative error {error:.2e}", text(case, "name"), call + 1);
            calls += 1;
        }
    }
    assert!(calls >= 16, "{calls} calls");
    worst
}

#[test]
fn chained_calls_agree_in_f32() {
    for name in BASES {
        for threads in [1, 2] {
            let worst = worst(name, Cpu::new(threads, DType::F32).expect("the CPU is always there"));
            println!("{name}, {threads} threads: {worst:.2e}");
            assert!(worst <= F32_BOUND, "{name}, {threads} threads: relative error {worst:.2e}");
        }
    }
}
