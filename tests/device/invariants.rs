//! Determinism on the device, bit for bit: alone or in a batch, recorded or launched one by one,
//! sampled there or by the host.

use std::path::Path;

use redraft::backend::HostReason;
use redraft::engine::Engine;
use redraft::plan::Visibility;
use redraft::request::Request;
use redraft::scoring::TimedForward;
use redraft::{Backend, DType, Finish};

use crate::backends;
use crate::fixture::Fixture;
use crate::support::{Essence, alone, engine, fixture, options, request, schedule, together};

const DID: &[&str] = &["block=4,unmask=uniform:1", "block=full,remask=0.35,by=snapshot,unmask=linear:5,order=uniform"];

fn eight() -> Vec<Request> {
    let stages = schedule(DID);
    (0..8).map(|i| request(&[1, 2, 3, 4, 5][..1 + i % 5], 9 + 3 * i, &stages, 5, i as u32)).collect()
}

#[test]
fn alone_or_in_a_batch_of_eight() {
    for dtype in [DType::F32, DType::Bf16] {
        for backend in backends(dtype) {
            let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
            let requests = eight();
            // What it cost may differ: together, equal prompts are prefilled once.
            let one: Vec<Essence> = alone(&mut engine, &requests, "alone").iter().map(|o| Essence::of(o).text()).collect();
            let all: Vec<Essence> = together(&mut engine, &requests, "together").iter().map(|o| Essence::of(o).text()).collect();
            for (i, (one, all)) in one.iter().zip(&all).enumerate() {
                assert_eq!(one, all, "{dtype:?}, request {i}");
            }
        }
    }
}

/// One seed gives the same tokens every time, alone and in a batch of eight: fifty times on a GPU,
/// where a race would show as a change.
#[test]
fn repeats_of_one_seed() {
    for dtype in [DType::F32, DType::Bf16] {
        for backend in backends(dtype) {
            let repeats = if backend.name().starts_with("cuda") { 50 } else { 2 };
            let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
            let requests = eight();
            for batch in [1, 8] {
                let mut run = || together(&mut engine, &requests[..batch], "repeated").iter().map(Essence::of).collect::<Vec<_>>();
                let first = run();
                assert_eq!(first.len(), batch);
                for repeat in 1..repeats {
                    assert_eq!(run(), first, "{dtype:?}, batch {batch}, repeat {repeat}");
                }
            }
        }
    }
}

/// A forward that is timed is a recorded step; pages, recordings and later texts are as they were.
#[test]
fn a_timed_forward_is_recorded() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
        let request = || [request(&[1, 2], 30, &schedule(DID), 5, 0)];
        let before = Essence::of(&together(&mut engine, &request(), "before")[0]);
        let (free, graphs) = (engine.free_pages(), engine.backend().num_graphs());
        for (range, sampled, top_p) in [(8..12, 4, 1.0), (8..12, 4, 0.9), (0..20, 20, 0.9), (0..20, 1, 1.0)] {
            let timed = TimedForward { sampled, visibility: Visibility::Full, len: range.end, range, top_p };
            let timing = engine.time_forward(&timed, 3).unwrap_or_else(|e| panic!("{timed:?}: {e}"));
            assert!(timing.recorded && timing.launches > 0 && timing.times_ms.len() == 3, "{timing:?}");
            assert!(timing.times_ms.iter().all(|ms| *ms > 0.0), "{timing:?}");
        }
        assert_eq!(engine.free_pages(), free);
        assert!(engine.backend().num_graphs() >= graphs + 4, "{} graphs, {graphs} before", engine.backend().num_graphs());
        assert_eq!(Essence::of(&together(&mut engine, &request(), "after")[0]), before);
        // Sampled by the host, as a backend without runs samples.
        engine.backend().set_runs(false);
        let timed = TimedForward { range: 8..12, sampled: 4, visibility: Visibility::Full, len: 12, top_p: 0.9 };
        assert!(!engine.time_forward(&timed, 1).expect("a forward").recorded);
    }
}

#[test]
fn graph_or_no_graph() {
    graphs_change_nothing(&fixture());
}

/// How many rows an expert gets differs from step to step inside one recording.
#[test]
fn graph_or_no_graph_with_experts() {
    graphs_change_nothing(&Fixture::open("llada2").dir);
}

fn graphs_change_nothing(dir: &Path) {
    for dtype in [DType::F32, DType::Bf16] {
        for backend in backends(dtype) {
            let mut engine = Engine::load(dir, backend, options()).expect("a fixture");
            engine.backend().set_replays(false);
            let requests = &eight()[..3];
            let plain: Vec<Essence> = together(&mut engine, requests, "launched").iter().map(Essence::of).collect();
            assert_eq!(engine.backend().num_graphs(), 0);
            engine.backend().set_replays(true);
            // Seen, recorded, replayed.
            for round in 0..3 {
                let again: Vec<Essence> = together(&mut engine, requests, "replayed").iter().map(Essence::of).collect();
                assert_eq!(again, plain, "{dtype:?}, round {round}");
            }
            assert!(engine.backend().num_graphs() > 3, "{} graphs", engine.backend().num_graphs());
        }
    }
}

/// Two requests whose refining steps have one signature; in one of them the device masks again in
/// the middle of a run, in the other the host does between two. A graph recorded for either serves
/// both.
#[test]
fn a_graph_serves_steps_with_and_without_a_remask() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
        let stages = schedule(DID);
        // Runs of 4, then 16: the draft of 20 ends with a run, that of 21 does not; 23 positions
        // and 7 sampled ones in both.
        let both = [request(&[1, 2, 3], 20, &stages, 9, 0), request(&[1, 2], 21, &stages, 9, 0)];
        engine.backend().set_replays(false);
        let plain: Vec<Essence> = alone(&mut engine, &both, "launched").iter().map(Essence::of).collect();
        engine.backend().set_replays(true);
        for order in [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0]] {
            for i in order {
                let found = Essence::of(&together(&mut engine, &both[i..=i], "replayed")[0]);
                assert_eq!(found, plain[i], "request {i}");
            }
        }
    }
}

/// Other seeds through the same graphs give other tokens: nothing of a request is frozen in a
/// recording.
#[test]
fn a_replay_never_repeats_numbers() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
        let stages = schedule(DID);
        let mut run = |seed| Essence::of(&together(&mut engine, &[request(&[1, 2], 30, &stages, seed, 0)], "seed")[0]);
        let outcomes: Vec<Essence> = (0..6).map(&mut run).collect();
        for (i, a) in outcomes.iter().enumerate() {
            assert!(outcomes[..i].iter().all(|b| a.tokens != b.tokens), "seed {i} repeats another");
        }
        assert_eq!(run(0), outcomes[0]);
    }
}

/// A draft that ends early ends a run early, and what was computed beyond counts for nothing.
#[test]
fn a_stop_inside_a_run() {
    // Hot enough that every token comes now and then.
    let stages = schedule(&["block=4,unmask=uniform:1,temperature=5,top_p=1", DID[1]]);
    let ask = |seed| {
        let mut ask = request(&[1, 2], 24, &stages, seed, 0);
        ask.stop.ignore_eos = false;
        ask
    };
    let mut cpu = engine(&fixture());
    let stopping = (0..400).filter(|seed| together(&mut cpu, &[ask(*seed)], "cpu")[0].finish == Finish::EndOfText).take(4);
    let stopping: Vec<(u64, Essence)> =
        stopping.collect::<Vec<u64>>().into_iter().map(|seed| (seed, Essence::of(&together(&mut cpu, &[ask(seed)], "cpu")[0]))).collect();
    assert_eq!(stopping.len(), 4, "the end of text comes now and then");
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
        let free = engine.free_pages();
        for (seed, expected) in &stopping {
            let found = Essence::of(&together(&mut engine, &[ask(*seed)], "device")[0]);
            assert_eq!((&found.canvas, &found.stages, found.finish), (&expected.canvas, &expected.stages, expected.finish), "seed {seed}");
        }
        assert_eq!(engine.free_pages(), free);
    }
}

/// Judges: likelihoods of sequences that share forwards are those of one alone, to the last bit,
/// and close to the CPU's in f32.
#[test]
fn likelihoods_do_not_depend_on_what_shares_a_forward() {
    for (name, dtype) in ["llama", "qwen2", "qwen3"].into_iter().flat_map(|name| [(name, DType::F32), (name, DType::Bf16)]) {
        let fixture = Fixture::open(name);
        let long = fixture.tokens("case2.tokens");
        let sequences: Vec<&[u32]> = [2, 9, 28, 1, 17].into_iter().map(|len| &long[..len]).collect();
        let expected = fixture.engine(2, DType::F32).causal_nlls(&sequences).expect("likelihoods");
        for backend in backends(dtype) {
            let mut engine = fixture.engine_on(backend);
            let together = engine.causal_nlls(&sequences).unwrap_or_else(|e| panic!("{name}: {e}"));
            for ((tokens, together), expected) in sequences.iter().zip(&together).zip(&expected) {
                assert_eq!(engine.causal_nll(tokens).expect("likelihoods"), *together, "{name} {dtype:?}: {} tokens", tokens.len());
                // Logits reach about 6 here: f32 errs by some 1e-5, bf16 by the bound of the parity
                // tests.
                let bound = if dtype == DType::F32 { 2e-4 } else { 0.3 };
                assert!(together.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < bound), "{name} {dtype:?}");
            }
        }
    }
}

/// A step that the host samples beside a device that samples is counted by its reason; where
/// nothing looks ahead there is none.
#[test]
fn the_host_says_why_it_samples() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(), backend, options()).expect("a fixture");
        let mut run = |stage: &str| together(&mut engine, &[request(&[1, 2], 10, &schedule(&[stage]), 3, 0)], stage).len();
        run("block=4,unmask=uniform:2");
        run("block=4,unmask=uniform:2,kv=refresh:2");
        run("block=4,unmask=confidence:2,order_temperature=0.5");
        let mut given = request(&[1, 2], 10, &schedule(&["block=4,unmask=left:1"]), 3, 0);
        given.draft = vec![5; 12];
        together(&mut engine, &[given], "a given draft");
        let found: Vec<HostReason> = engine.host_steps().keys().copied().collect();
        assert_eq!(found, [HostReason::GivenDraft, HostReason::KvPolicy, HostReason::OrderTemperature]);
        let counts = engine.host_steps().clone();
        engine.backend().set_runs(false);
        let request = request(&[1, 2], 10, &schedule(&["block=4,unmask=uniform:2,kv=refresh:2"]), 3, 0);
        together(&mut engine, &[request], "host");
        assert_eq!(engine.host_steps(), &counts);
    }
}
