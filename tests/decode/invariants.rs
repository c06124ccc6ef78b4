//! A result depends on the request alone: not on neighbours, threads, page size, a tight pool, or
//! what pages held before.

use std::path::Path;

use redraft::request::{Prompt, Request};
use redraft::{DType, EngineOptions, Error, Finish, Schedule};

use crate::support::*;

/// Eight requests that have nothing in common: lengths, prompts, schedules, seeds.
fn mixed(vocab: u32) -> Vec<Request> {
    let schedules = [
        schedule(&["block=4,unmask=uniform:1"]),
        schedule(&["block=4,unmask=uniform:1", "block=full,remask=0.35,unmask=linear:4,order=uniform"]),
        schedule(&[
            "block=3,unmask=confidence:2",
            "block=8,remask=0.5,by=post-hoc,unmask=margin:2",
            "block=full,remask=0.3,unmask=entropy:3",
        ]),
        schedule(&["block=full,unmask=threshold:0.5"]),
        schedule(&["block=8,visible=canvas,unmask=linear:3"]),
        schedule(&["block=4,unmask=left:1", "block=full,remask=0.4,by=held-out:3,unmask=uniform:2,kv=refresh:3"]),
        schedule(&["block=2,unmask=uniform:2", "block=4,remask=0.5,by=random,unmask=uniform:1,kv=draft"]),
        schedule(&["block=5,unmask=uniform:1,temperature=0"]),
    ];
    let lengths = [21, 30, 17, 12, 24, 19, 33, 9];
    (0..8u32)
        .map(|i| {
            let prompt: Vec<u32> = (0..=2 * i).map(|p| (7 * p + 11 * i + 1) % (vocab - 2)).collect();
            request(&prompt, lengths[i as usize], &schedules[i as usize], u64::from(i) << 33 | 5, i)
        })
        .collect()
}

fn vocab(dir: &Path) -> u32 {
    engine(dir).config().vocab_size as u32
}

/// Alone, in a batch of eight, in a batch whose row budget makes sequences take turns, and joining
/// a batch that is under way.
fn neighbours(dir: &Path, dtype: DType) {
    let requests = mixed(vocab(dir));
    let label = format!("{} {}", dir.display(), dtype.name());
    let mut one = engine_with(dir, 1, dtype, options());
    let expected = alone(&mut one, &requests, &label);
    assert!(expected.iter().all(|o| o.finish == Finish::Length), "{label}: nothing ended early");
    for (max_rows, max_sequences) in [(512, 8), (24, 8), (1, 3)] {
        let label = format!("{label}, at most {max_rows} rows and {max_sequences} sequences");
        let mut engine = engine_with(dir, 1, dtype, EngineOptions { budget: budget(max_rows, max_sequences), ..options() });
        same(&together(&mut engine, &requests, &label), &expected, false, &label);
    }
    let label = format!("{label}, late");
    let mut engine = engine_with(dir, 1, dtype, options());
    let mut handles = Vec::new();
    for request in &requests {
        handles.push(engine.submit(request.clone()).expect("served"));
        for _ in 0..3 {
            engine.tick().unwrap_or_else(|e| panic!("{label}: {e}"));
        }
    }
    same(&finish(&mut engine, &handles, &label), &expected, false, &label);
}

#[test]
fn neighbours_change_nothing_on_a_tiny_model() {
    neighbours(&fixture(), DType::F32);
    neighbours(&fixture(), DType::Bf16);
}

#[test]
fn neighbours_change_nothing_on_the_shipped_model() {
    neighbours(&shipped(), DType::F32);
}

#[test]
fn neighbours_change_nothing_on_the_shipped_model_in_bf16() {
    neighbours(&shipped(), DType::Bf16);
}

#[test]
fn threads_change_nothing() {
    for dir in [fixture(), shipped()] {
        let requests = mixed(vocab(&dir));
        for dtype in [DType::F32, DType::Bf16] {
            let label = format!("{} {}", dir.display(), dtype.name());
            let run = |threads| together(&mut engine_with(&dir, threads, dtype, options()), &requests, &label);
            let one = run(1);
            for threads in [2, 3] {
                same(&run(threads), &one, false, &format!("{label}, {threads} threads"));
            }
        }
    }
}

#[test]
fn page_size_and_pool_change_nothing() {
    let dir = fixture();
    let requests = mixed(vocab(&dir));
    let expected = together(&mut engine(&dir), &requests, "pages of 16");
    let longest = expected.iter().map(|o| o.canvas.len()).max().expect("requests");
    for page_size in [1, 2, 4, 16, 64] {
        for sequences in [1, 2, 8] {
            let label = format!("pages of {page_size} for {sequences} sequences");
            let pages = longest.div_ceil(page_size) * sequences;
            let mut engine = engine_with(&dir, 1, DType::F32, EngineOptions { page_size, kv_pages: Some(pages), ..options() });
            assert_eq!(engine.free_pages(), pages, "{label}");
            // In a pool that holds one of them at a time, requests wait for each other and none for
            // ever.
            same(&together(&mut engine, &requests, &label), &expected, false, &label);
            assert_eq!(engine.free_pages(), pages, "{label}: every page is back");
        }
    }
}

/// What a page held before is never read.
#[test]
fn poison_changes_nothing() {
    for dir in [fixture(), shipped()] {
        let requests = mixed(vocab(&dir));
        let run = |poison_freed_pages| {
            let mut engine = engine_with(&dir, 2, DType::F32, EngineOptions { poison_freed_pages, ..options() });
            // Twice, so that the second round works on pages that the first has left.
            together(&mut engine, &requests, "first round");
            together(&mut engine, &requests, "second round")
        };
        same(&run(true), &run(false), false, &dir.display().to_string());
    }
}

#[test]
fn a_request_that_never_fits_is_refused_with_both_numbers() {
    let mut engine = engine_with(&fixture(), 1, DType::F32, EngineOptions { kv_pages: Some(3), ..options() });
    let long = request(&[1], 48, &preset("draft"), 0, 0);
    let error = engine.submit(long).err().expect("49 positions need 4 pages of 16");
    assert_eq!(error, Error::OutOfPages { needed: 4, capacity: 3 });
    let text = error.to_string();
    assert!(text.contains("needs 4") && text.contains("holds 3") && text.contains("kv_pages"), "{text}");
    // The engine goes on with what fits.
    let outputs = together(&mut engine, &[request(&[1], 47, &preset("draft"), 0, 0)], "what fits");
    assert_eq!((outputs[0].tokens.len(), engine.free_pages()), (47, 3));
}

/// Options and requests that mean nothing are errors that name what is wrong, before anything runs.
#[test]
fn impossible_requests_name_their_mistake() {
    let mut engine = engine(&fixture());
    let draft = preset("draft");
    let mut refused = |prompt: Prompt, word: &str| {
        let error = engine.submit(Request::new(prompt, draft.clone(), 0, 0)).err().unwrap_or_else(|| panic!("{word}: was served"));
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains(word), "{word}: {error}");
    };
    refused(Prompt::Tokens { tokens: vec![1], length: 0 }, "at least 1");
    refused(Prompt::Tokens { tokens: vec![131], length: 4 }, "token id 131");
    refused(Prompt::Tokens { tokens: vec![130], length: 4 }, "mask id 130");
    refused(Prompt::Tokens { tokens: vec![1], length: 256 }, "at most 256");
    refused(Prompt::Tokens { tokens: vec![1], length: usize::MAX }, "at most 256");
    refused(Prompt::Canvas(vec![Some(1), Some(2)]), "nothing to generate");
    refused(Prompt::Canvas(vec![]), "nothing to generate");
    assert!(engine.logits(&[], redraft::plan::Visibility::Full, &mut |_, _| Ok(())).unwrap_err().to_string().contains("at least one"));
    assert!(engine.logits(&[131], redraft::plan::Visibility::Full, &mut |_, _| Ok(())).unwrap_err().to_string().contains("131"));
    assert!(!engine.is_busy(), "nothing was queued");

    let mut judge = crate::support::engine(&fixture().with_file_name("bd3lm-ar"));
    let error = judge.submit(request(&[1], 4, &preset("did"), 0, 0)).err().expect("an autoregressive checkpoint").to_string();
    assert!(error.contains("autoregressive"), "{error}");
    for options in [
        EngineOptions { page_size: 0, ..options() },
        EngineOptions { budget: budget(0, 1), ..options() },
        EngineOptions { budget: budget(1, 0), ..options() },
        EngineOptions { kv_pages: Some(usize::MAX), ..options() },
    ] {
        let backend = redraft::Cpu::new(1, DType::F32).expect("the CPU is always there");
        let error = redraft::engine::Engine::load(&fixture(), backend, options.clone()).err().unwrap_or_else(|| panic!("{options:?}"));
        assert!(matches!(error, Error::Request { .. }), "{options:?}: {error}");
    }
}

const SEEDS: u64 = 20;

/// One draft per seed, run three ways over the model that ships: reuse, no reuse, and commits in
/// forwards of their own.
fn twenty_seeds(dtype: DType) {
    let mut engine = engine_with(&shipped(), 2, dtype, options());
    let requests = |kv: &str, separate: bool| -> Vec<Request> {
        let schedule: Schedule = schedule(&[&format!("block=4,unmask=uniform:1,kv={kv}")]);
        (0..SEEDS)
            .map(|seed| {
                // Prompts of 1 to 10 tokens: without, with one and with two whole blocks.
                let prompt: Vec<u32> = (0..=seed as u32 % 10).map(|p| 2 + (p * 131 + seed as u32 * 17) % 4000).collect();
                let mut request = request(&prompt, 22, &schedule, seed, 0);
                request.separate_commit = separate;
                request
            })
            .collect()
    };
    let label = dtype.name();
    let cached = together(&mut engine, &requests("exact", false), label);
    let slow = together(&mut engine, &requests("recompute", false), label);
    same(&cached, &slow, true, &format!("{label}: cached and recomputed"));
    let separate = together(&mut engine, &requests("exact", true), label);
    same(&separate, &cached, true, &format!("{label}: separate and fused commits"));
    for (seed, ((cached, slow), separate)) in cached.iter().zip(&slow).zip(&separate).enumerate() {
        let (c, s, r) = (&cached.stages[0], &separate.stages[0], &slow.stages[0]);
        assert_eq!((c.rows, c.nfe(), c.forwards.commit), (s.rows, s.nfe(), 0), "{label} seed {seed}: rows of fused and separate commits");
        assert!(s.forwards.commit > 0 && r.rows > c.rows, "{label} seed {seed}: {:?}, {} and {} rows", s.forwards, r.rows, c.rows);
    }
    let different = cached.iter().filter(|o| o.tokens != cached[0].tokens).count();
    assert_eq!(different as u64, SEEDS - 1, "{label}: seeds write different texts");
}

#[test]
fn a_cached_draft_equals_a_recomputed_one_over_twenty_seeds() {
    twenty_seeds(DType::F32);
}

#[test]
fn a_cached_draft_equals_a_recomputed_one_over_twenty_seeds_in_bf16() {
    twenty_seeds(DType::Bf16);
}

/// Refinement too: `exact`, `recompute` and `refresh:1` are one thing, whatever the stages.
#[test]
fn exact_refinement_equals_recomputing() {
    for dir in [fixture(), shipped()] {
        let mut engine = engine_with(&dir, 2, DType::F32, options());
        let runs: Vec<Vec<redraft::Output>> = ["exact", "recompute", "refresh:1"]
            .iter()
            .map(|kv| {
                let stages = [
                    format!("block=4,unmask=uniform:1,kv={kv}"),
                    format!("block=8,remask=0.5,unmask=uniform:2,kv={kv}"),
                    format!("block=8,remask=0.3,by=post-hoc,unmask=uniform:1,kv={kv}"),
                    format!("block=full,remask=0.35,unmask=linear:4,order=uniform,kv={kv}"),
                ];
                let schedule = schedule(&stages.each_ref().map(String::as_str));
                let requests: Vec<Request> = (0..4).map(|seed| request(&[3, 4, 5, 6, 7, 8], 26, &schedule, seed, 1)).collect();
                alone(&mut engine, &requests, kv)
            })
            .collect();
        same(&runs[1], &runs[0], true, &format!("{}: recompute", dir.display()));
        same(&runs[2], &runs[0], true, &format!("{}: refresh:1", dir.display()));
    }
}
