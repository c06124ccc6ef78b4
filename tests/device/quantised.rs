//! Weights in groups on the device: made at load and read from `redraft quantize`'s files they are
//! the same, near those of the CPU, and every way of running a request gives the same tokens.

use redraft::cuda::Cuda;
use redraft::engine::Engine;
use redraft::plan::Visibility;
use redraft::request::Request;
use redraft::{Cpu, DType, WeightFormat, quantize};

use crate::fixture::{self, relative};
use crate::support::{Essence, alone, options, preset, request, schedule, together};
use crate::{backends, drivers};

const FORMATS: [WeightFormat; 2] = [WeightFormat::Q8, WeightFormat::Q4];

fn load<B: redraft::Backend>(dir: &std::path::Path, backend: B) -> Engine<B> {
    Engine::load(dir, backend, options()).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// Fixtures with experts: a router's scores that are almost equal choose others where activations
/// differ in their last bits, so their logits are compared with no other machine's.
const ROUTED: [&str; 5] = ["llada-moe", "llada2", "qwen3-moe", "rnd1", "sdar-moe"];

/// Of every family: files give the bits of what is made at load, and both are near the CPU's
/// logits, whose activations have 8 bits.
#[test]
fn files_give_what_is_made_at_load_near_the_cpu() {
    for fixture in fixture::all() {
        for format in FORMATS {
            let scratch = tempfile::tempdir().expect("a directory");
            let dir = scratch.path().join("packed");
            quantize(&fixture.dir, format, &dir, None, &mut |_, _| {}).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
            let cpu = Cpu::new(2, DType::F32).expect("the CPU is always there").with_weights(Some(format));
            let mut on_cpu = load(&fixture.dir, cpu);
            let vocab = on_cpu.config().vocab_size;
            let tokens: Vec<u32> = (0..9).map(|i| (i * 5 + 1) % vocab as u32).collect();
            let expected = fixture::forward(&mut on_cpu, &tokens, Visibility::Full).1;
            for backend in backends(DType::F32) {
                let label = format!("{} in {} on {}", fixture.name, format.name(), redraft::Backend::name(&backend));
                let mut made = load(&fixture.dir, backend.with_weights(Some(format)));
                let found = fixture::forward(&mut made, &tokens, Visibility::Full).1;
                let error = relative(&found, &expected, vocab);
                let bound = if ROUTED.contains(&&*fixture.name) { f64::INFINITY } else { 0.1 };
                assert!(error > 0.0 && error < bound, "{label}: {error:.2e}");
                for backend in backends(DType::F32) {
                    let read = fixture::forward(&mut load(&dir, backend), &tokens, Visibility::Full).1;
                    let same = found.iter().zip(&read).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(found.len() == read.len() && same, "{label}: read from a file");
                }
            }
        }
    }
}

/// Together and alone, by recorded graphs and without, sampled on the device and by the host.
#[test]
fn tokens_do_not_depend_on_company_graphs_or_runs() {
    for name in ["bd3lm-adaln", "sdar-moe"] {
        let dir = fixture::Fixture::open(name).dir;
        let stages = [preset("did"), schedule(&["block=4,unmask=threshold:0.3,top_p=0.9"])];
        let requests: Vec<Request> = (0..4).map(|i| request(&[1, 2], 8 + i, &stages[i % 2], 1, i as u32)).collect();
        for format in FORMATS {
            for driver in drivers() {
                let device = Cuda::new(driver, DType::Bf16).expect("a device").with_weights(Some(format));
                let label = format!("{name} in {} on {}", format.name(), redraft::Backend::name(&device));
                let mut engine = load(&dir, device);
                let of = |found: Vec<_>| found.iter().map(Essence::of).collect::<Vec<Essence>>();
                let expected = of(together(&mut engine, &requests, &label));
                assert_eq!(of(alone(&mut engine, &requests, &label)), expected, "{label}: alone");
                engine.backend().set_runs(false);
                assert_eq!(of(together(&mut engine, &requests, &label)), expected, "{label}: sampled by the host");
                engine.backend().set_runs(true);
                engine.backend().set_replays(false);
                assert_eq!(of(together(&mut engine, &requests, &label)), expected, "{label}: without graphs");
            }
        }
    }
}
