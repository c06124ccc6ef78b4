//! Every request has exactly one outcome, also where its engine ends before it does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use redraft::Error;

use crate::support::{request, schedule, tiny};

const DRAFT: &[&str] = &["block=4,unmask=uniform:1"];

#[test]
fn a_dropped_engine_ends_its_requests() {
    let mut engine = tiny();
    let handles: Vec<_> = (0..12).map(|i| engine.submit(request(&[1], 40, &schedule(DRAFT), 1, i)).expect("queued")).collect();
    for _ in 0..5 {
        assert!(engine.tick().expect("runs"), "some are in flight, some wait");
    }
    drop(engine);
    for handle in handles {
        assert!(handle.take_output().is_none(), "its events were not read yet");
        handle.events().for_each(drop);
        assert_eq!(handle.take_output().expect("an outcome").err(), Some(Error::EngineGone));
        handle.events().for_each(drop);
        assert!(handle.take_output().is_none(), "told once");
    }
}

/// A request that was finished keeps its text.
#[test]
fn a_finished_request_outlives_its_engine() {
    let mut engine = tiny();
    let handle = engine.submit(request(&[1], 8, &schedule(DRAFT), 1, 0)).expect("queued");
    engine.run().expect("runs");
    drop(engine);
    handle.events().for_each(drop);
    assert_eq!(handle.take_output().expect("an outcome").expect("a text").tokens.len(), 8);
    handle.events().for_each(drop);
    assert!(handle.take_output().is_none(), "told once");
}

#[test]
fn a_panic_in_a_tick_ends_every_request_with_an_error() {
    let mut engine = tiny();
    let mut spoiled = request(&[1], 8, &schedule(DRAFT), 1, 0);
    spoiled.draws = Some(Arc::new(|_| panic!("a source of draws that fails")));
    let handles = [engine.submit(request(&[1], 8, &schedule(DRAFT), 1, 1)).expect("queued"), engine.submit(spoiled).expect("queued")];
    assert!(catch_unwind(AssertUnwindSafe(|| engine.run())).is_err());
    let error = engine.tick().expect_err("the engine stopped halfway").to_string();
    assert!(error.contains("panicked"), "{error}");
    for handle in handles {
        handle.events().for_each(drop);
        let outcome = handle.take_output().expect("an outcome").expect_err("an error").to_string();
        assert!(outcome.contains("panicked"), "{outcome}");
        assert!(handle.take_output().is_none(), "told once");
    }
    assert!(engine.tick().is_err(), "and does not go on");
}

/// Waiting is told from running, also for a request that never ran.
#[test]
fn a_request_that_is_cancelled_while_it_waits_only_waited() {
    let mut engine = tiny();
    let handles: Vec<_> = (0..9).map(|i| engine.submit(request(&[1], 20, &schedule(DRAFT), 1, i)).expect("queued")).collect();
    engine.tick().expect("runs");
    std::thread::sleep(std::time::Duration::from_millis(20));
    handles[8].cancel();
    engine.run().expect("runs");
    handles[8].events().for_each(drop);
    let timings = handles[8].take_output().expect("an outcome").expect("cancelled").timings;
    assert!(timings.queued_ms >= 20.0 && timings.total_ms < timings.queued_ms, "{timings:?}");
    // The sum of no stages is not -0.
    handles[0].events().for_each(drop);
    let timings = handles[0].take_output().expect("an outcome").expect("a text").timings;
    assert!(timings.refine_ms == 0.0 && timings.refine_ms.is_sign_positive(), "{timings:?}");
}

/// Pages of logits go back, whatever the caller does with them.
#[test]
fn a_sink_that_panics_loses_no_pages() {
    use redraft::plan::Visibility;
    let mut engine = tiny();
    let free = engine.free_pages();
    let run = catch_unwind(AssertUnwindSafe(|| engine.logits(&[1, 2, 3], Visibility::Full, &mut |_, _| panic!("a sink that fails"))));
    assert!(run.is_err());
    assert_eq!(engine.free_pages(), free);
    engine.logits(&[1, 2, 3], Visibility::Full, &mut |_, _| Ok(())).expect("serves on");
}

/// Memory that no machine has: an error with the size and the option, never a panic.
#[test]
fn refused_memory_is_an_error() {
    use redraft::engine::Engine;
    use redraft::model::shapes;
    use redraft::scheduler::Budget;
    use redraft::{Cpu, DType, EngineOptions};
    let config = || shapes::config("tiny").expect("a known shape");
    let defaults = EngineOptions::default;
    for options in [
        EngineOptions { kv_pages: Some(1 << 27), ..defaults() },
        EngineOptions { page_size: 1 << 31, kv_pages: Some(1), ..defaults() },
        EngineOptions { budget: Budget { max_rows: 512, max_sequences: 1 << 24 }, ..defaults() },
        EngineOptions { kv_pages: Some(usize::MAX), ..defaults() },
    ] {
        let text = format!("{options:?}");
        let error = Engine::random(config(), Cpu::new(1, DType::F32).expect("a CPU"), options).err().map(|e| e.to_string());
        let error = error.unwrap_or_else(|| panic!("{text}: was allocated"));
        assert!(error.contains("K/V"), "{text}: {error}");
    }
}
