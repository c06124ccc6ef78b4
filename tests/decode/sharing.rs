//! Prompts computed once for many samples, and requests that end before their time.

use redraft::request::Request;
use redraft::schedule::{Decoding, KvPolicy, Schedule};
use redraft::{DType, EngineOptions, Finish, Output};

use crate::support::*;

fn prefills(outputs: &[Output]) -> usize {
    outputs.iter().flat_map(|o| &o.stages).map(|s| s.forwards.prefill).sum()
}

/// Nine tokens: two whole blocks of four and a ragged tail.
const PROMPT: [u32; 9] = [5, 9, 3, 17, 21, 2, 40, 8, 11];

fn samples(count: u32, length: usize) -> Vec<Request> {
    let schedule = schedule(&["block=4,unmask=uniform:1", "block=full,remask=0.35,unmask=linear:3,order=uniform"]);
    (0..count).map(|sample| request(&PROMPT, length, &schedule, 7, sample)).collect()
}

/// Eight samples of one prompt compute it once, and each writes what it writes alone. The shared
/// prompt ends inside a page of 16, so every sample but one copies before it writes.
#[test]
fn eight_samples_share_one_prefill() {
    for (name, dir) in [("tiny", fixture()), ("shipped", shipped())] {
        for page_size in [1, 4, 16] {
            let label = format!("{name}, pages of {page_size}");
            let options = || EngineOptions { page_size, ..options() };
            let requests = samples(8, 23);
            let mut one = engine_with(&dir, 1, DType::F32, options());
            let expected = alone(&mut one, &requests, &label);
            assert_eq!(prefills(&expected), 8, "{label}: alone, each computes its own");
            let mut engine = engine_with(&dir, 2, DType::F32, options());
            let free = engine.free_pages();
            let outputs = together(&mut engine, &requests, &label);
            same(&outputs, &expected, true, &label);
            assert_eq!(prefills(&outputs), 1, "{label}: one prefill for eight samples");
            for (i, (shared, own)) in outputs.iter().zip(&expected).enumerate() {
                let prefill = shared.stages[0].forwards.prefill;
                assert_eq!(own.stages[0].rows - shared.stages[0].rows, 8 * (1 - prefill), "{label}: sample {i}: the prompt's 8 rows");
                assert_eq!(own.stages[1].rows, shared.stages[1].rows, "{label}: sample {i}: the refine stage");
            }
            assert!(outputs.windows(2).all(|w| w[0].tokens != w[1].tokens), "{label}: samples differ");
            assert_eq!(engine.free_pages(), free, "{label}: every page is back");
        }
    }
}

/// The first sample owes the prompt to the others; it goes away before, while or after it computes
/// it.
#[test]
fn a_prompt_survives_its_owner() {
    let requests = samples(4, 14);
    let expected = alone(&mut engine(&fixture()), &requests, "alone");
    for ticks in 0..12 {
        for dropped in [false, true] {
            let label = format!("owner gone after {ticks} ticks, handle dropped: {dropped}");
            let mut engine = engine(&fixture());
            let free = engine.free_pages();
            let mut handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("served")).collect();
            for _ in 0..ticks {
                engine.tick().unwrap_or_else(|e| panic!("{label}: {e}"));
            }
            if dropped {
                drop(handles.remove(0));
            } else {
                handles[0].cancel();
            }
            let outputs = finish(&mut engine, &handles, &label);
            let rest = outputs.len() - 3;
            same(&outputs[rest..], &expected[1..], true, &label);
            if !dropped {
                assert_eq!(outputs[0].finish, Finish::Cancelled, "{label}");
                let held: Vec<usize> = outputs[0].revealed_positions();
                assert!(held.len() < outputs[0].tokens.len(), "{label}: it was cut short");
            }
            assert_eq!(engine.free_pages(), free, "{label}: every page is back");
        }
    }
}

trait Revealed {
    fn revealed_positions(&self) -> Vec<usize>;
}

impl Revealed for Output {
    /// Generated positions that held a token when the request ended.
    fn revealed_positions(&self) -> Vec<usize> {
        self.positions.iter().zip(&self.confidence).filter(|(_, c)| **c > 0.0).map(|(p, _)| *p).collect()
    }
}

/// A request that is cancelled, or whose handle is dropped, gives its pages back at the next tick
/// and leaves its neighbours alone: at every point of its life, also while it still waits.
#[test]
fn cancelling_frees_pages_and_leaves_neighbours_alone() {
    let dir = fixture();
    let schedule = schedule(&["block=4,unmask=uniform:1", "block=full,remask=0.5,by=post-hoc,unmask=uniform:2"]);
    let requests: Vec<Request> = (0..3u32).map(|i| request(&[i + 1, 5, 6], 15 + i as usize, &schedule, 3, i)).collect();
    let expected = alone(&mut engine(&dir), &requests, "alone");
    for max_sequences in [3, 1] {
        for ticks in [0, 1, 2, 9, 17, 19, 22] {
            for dropped in [false, true] {
                let label = format!("{max_sequences} sequences, gone after {ticks} ticks, handle dropped: {dropped}");
                let options = EngineOptions { budget: budget(512, max_sequences), ..options() };
                let mut engine = engine_with(&dir, 1, DType::F32, options);
                let free = engine.free_pages();
                let mut handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("served")).collect();
                for _ in 0..ticks {
                    engine.tick().unwrap_or_else(|e| panic!("{label}: {e}"));
                }
                let held = engine.free_pages();
                let victim = handles.remove(1);
                victim.cancel();
                if dropped {
                    drop(victim);
                    engine.tick().unwrap_or_else(|e| panic!("{label}: {e}"));
                } else {
                    engine.tick().unwrap_or_else(|e| panic!("{label}: {e}"));
                    victim.events().for_each(drop);
                    let output = victim.take_output().unwrap_or_else(|| panic!("{label}: no outcome")).expect("an outcome");
                    let (finish, whole) = (output.finish, output.tokens == expected[1].tokens);
                    assert!(finish == Finish::Cancelled || whole, "{label}: {finish:?}");
                    assert!(victim.take_output().is_none(), "{label}: the outcome is given once");
                }
                // Neighbours hold two pages at most by now; the third one's are free.
                assert!(engine.free_pages() + 2 * 2 >= free && engine.free_pages() + 2 >= held, "{label}: pages are held");
                same(&finish(&mut engine, &handles, &label), &[expected[0].clone(), expected[2].clone()], false, &label);
                assert_eq!(engine.free_pages(), free, "{label}: every page is back");
            }
        }
    }
}

/// Events arrive as they happen, in order, and join to the outcome.
#[test]
fn events_join_to_the_outcome() {
    use redraft::EventKind;
    let mut engine = engine(&fixture());
    let mask = engine.config().mask_id.expect("a diffusion model");
    let handle = engine.submit(samples(1, 23).remove(0)).expect("served");
    let mut canvas: Vec<u32> = PROMPT.iter().copied().chain(std::iter::repeat_n(mask, 23)).collect();
    let (mut confidence, mut num_unmasked, mut ended) = (vec![0.0f32; canvas.len()], 0, false);
    loop {
        let busy = engine.tick().expect("a tick");
        let before = num_unmasked;
        for event in handle.events() {
            assert!(!ended, "an event after the end: {event:?}");
            for (i, p) in event.positions.iter().enumerate() {
                match event.kind {
                    EventKind::Unmask | EventKind::Edit => (canvas[*p], confidence[*p]) = (event.tokens[i], event.confidence[i]),
                    EventKind::Remask => {
                        assert_eq!((canvas[*p], confidence[*p]), (event.tokens[i], event.confidence[i]), "remask of {p}");
                        canvas[*p] = mask;
                    }
                    EventKind::Commit | EventKind::Done => assert_eq!(canvas[*p], event.tokens[i], "{:?} of {p}", event.kind),
                }
            }
            num_unmasked += usize::from(event.kind == EventKind::Unmask);
            ended |= event.kind == EventKind::Done;
        }
        assert!(num_unmasked <= before + 1, "a tick runs one forward of a request");
        if !busy {
            break;
        }
    }
    let output = handle.take_output().expect("an outcome").expect("a text");
    assert!(ended);
    assert_eq!(output.canvas, canvas);
    assert_eq!(output.confidence, confidence[9..]);
    assert_eq!(num_unmasked, output.stages.iter().map(|s| s.nfe()).sum::<usize>());
    assert_eq!(output.draft.len(), 23);
}

/// Two models in one engine: each stage runs the model it names over K/V of its own, alone or
/// beside requests that name others, and a prompt that one model has computed is not taken for the
/// other's.
#[test]
fn stages_may_name_other_weights() {
    // Same vocabulary, nothing else in common.
    let (first, second) = (fixture().with_file_name("bd3lm-plain"), fixture().with_file_name("mdlm"));
    let schedules = [
        schedule(&["block=4,unmask=uniform:1"]),
        schedule(&["block=4,unmask=uniform:1,weights=1"]),
        schedule(&["block=4,unmask=uniform:1", "block=4,remask=0.5,unmask=uniform:1,weights=1", "block=4,remask=0.5,unmask=uniform:1"]),
        schedule(&["block=4,unmask=uniform:1,weights=1", "block=full,remask=0.5,by=post-hoc,unmask=uniform:2,kv=refresh:3"]),
    ];
    let requests: Vec<Request> = schedules.iter().zip(0..).map(|(s, i)| request(&PROMPT, 17, s, 7, i)).collect();
    let two = |threads| {
        let mut engine = engine_with(&first, threads, DType::F32, options());
        assert_eq!(engine.add_model(&second, &mut |_, _| {}).expect("a second model"), 1);
        engine
    };
    let expected = alone(&mut two(1), &requests, "two models, alone");
    let free = two(1).free_pages();
    let mut engine = two(2);
    same(&together(&mut engine, &requests, "two models"), &expected, true, "two models");
    assert_eq!(engine.free_pages(), free);
    // A schedule of one model is that model's, whatever its index.
    let only = |dir: &std::path::Path, sample| {
        let draft = request(&PROMPT, 17, &schedules[0], 7, sample);
        alone(&mut engine_with(dir, 1, DType::F32, options()), &[draft], "one model").remove(0)
    };
    same(&expected[..2], &[only(&first, 0), only(&second, 1)], true, "one model at a time");
    assert_ne!(expected[0].tokens, expected[1].tokens, "two models write two texts");
    // Reuse is exact across them.
    let mut slow = requests.clone();
    for request in &mut slow {
        let mut stages = request.schedule.stages().to_vec();
        for stage in stages.iter_mut().filter(|stage| stage.decoding == Decoding::Independent { kv: KvPolicy::Exact }) {
            stage.decoding = Decoding::Independent { kv: KvPolicy::Recompute };
        }
        request.schedule = Schedule::new(stages).unwrap();
    }
    same(&alone(&mut two(1), &slow, "recomputed"), &expected, true, "recomputed");

    let mut one = engine_with(&first, 1, DType::F32, options());
    let error = one.submit(requests[1].clone()).err().expect("one model is loaded").to_string();
    assert!(error.contains("weights=1") && error.contains("1 models"), "{error}");
    let error = one.add_model(&fixture(), &mut |_, _| {}).expect_err("another vocabulary").to_string();
    assert!(error.contains("131 tokens") && error.contains("67"), "{error}");
}
