//! The emulated machine itself: every kind of mistake ends its launch with a sentence that names
//! the place, and right code runs.

use redraft::cuda::context::CudaContext;
use redraft::cuda::driver::{Function, Launch};
use redraft::cuda::{Copies, Edit, Emulator, EmulatorOptions, Schedule};

use crate::emulator::{Array, SCHEDULES, noise};

const SOURCE: &str = include_str!("faults.cu");
const THREADS: u32 = 64;
/// Of `in` and `out`: neither ends where a page does.
const LEN: usize = 100;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct FaultParams {
    input: u64,
    out: u64,
    counter: u64,
    n: u32,
    padding: u32,
}

/// One line of `faults.cu` that holds the text, as errors count lines.
fn line(text: &str) -> usize {
    1 + SOURCE.lines().position(|line| line.contains(text)).unwrap_or_else(|| panic!("{text}"))
}

fn options(schedule: Schedule, copies: Copies, races: bool) -> EmulatorOptions {
    EmulatorOptions { schedule, copies, races, threads: 2, ..EmulatorOptions::default() }
}

/// Every schedule and timing; with `races`, one machine that watches shared memory.
fn all(races: bool) -> Vec<EmulatorOptions> {
    let both = |schedule| [Copies::Late, Copies::Eager].map(|copies| options(schedule, copies, races));
    SCHEDULES.into_iter().flat_map(both).collect()
}

fn function(options: EmulatorOptions, entry: &str) -> (CudaContext, Function) {
    let emulator = Emulator::new(options).unwrap();
    let function = emulator.function_in("faults.cu", SOURCE, &[("THREADS", THREADS)], entry).unwrap();
    (CudaContext::new(Box::new(emulator)).unwrap(), function)
}

/// What an entry writes over `input`, or the words of the launch or the read.
fn outcome(options: EmulatorOptions, entry: &str, grid: [u32; 3], input: &[f32]) -> Result<Vec<f32>, String> {
    let (context, function) = function(options, entry);
    let (input, out) = (Array::new(&context, input), Array::nan(&context, LEN));
    let counter = Array::new(&context, &[0u32]);
    let params = FaultParams { input: input.address(), out: out.address(), counter: counter.address(), n: LEN as u32, padding: 0 };
    let launch = Launch { grid, block: THREADS, shared_bytes: 4 * THREADS * if entry.starts_with("copy") { 4 } else { 1 } };
    context.driver.launch(function, launch, bytemuck::bytes_of(&params)).map_err(|e| e.to_string())?;
    out.read()
}

fn fails(options: EmulatorOptions, entry: &str, expected: &[&str]) {
    let words = outcome(options, entry, [1; 3], &noise(3, LEN)).expect_err(entry);
    for part in expected {
        assert!(words.contains(part), "{entry} under {options:?}: {words:?} lacks {part:?}");
    }
}

#[test]
fn barriers_and_exchanges_want_everybody() {
    for options in all(false) {
        let head = "CTA (0, 0, 0), thread ";
        fails(options, "barrier_of_some", &["barrier_of_some, ", head, "waits for ever at the barrier", "32 of 64 threads have exited"]);
        fails(options, "barriers_of_two_lines", &[head, "one barrier joined from line"]);
        let place = format!("waits for ever at the warp operation of line {}", line("if (lane_id() < 16) p.out"));
        fails(options, "exchange_of_some", &[head, &place, "32 of 64 threads have exited"]);
        fails(options, "exchange_outside_of_its_mask", &[head, "not in its own mask 0000ffff"]);
        fails(options, "exchange_of_two_masks", &[head, "different masks"]);
    }
}

#[test]
fn accesses_outside_of_buffers_are_named() {
    for options in [options(Schedule::Forward, Copies::Late, false), options(Schedule::Random, Copies::Eager, true)] {
        for _ in 0..2 {
            // Twice: a failure leaves nothing behind.
            fails(options, "read_far_behind", &["read_far_behind, CTA (0, 0, 0), thread 5: access outside of any buffer, at 0x"]);
            fails(options, "write_far_in_front", &["thread 9: access outside of any buffer"]);
        }
        fails(options, "write_just_behind", &["a write 0 bytes behind the end of a buffer of 400 bytes"]);
        fails(options, "write_in_front", &["a write 4 bytes in front of a buffer of 400 bytes"]);
        fails(options, "dynamic_shared_too_small", &["thread 63: access outside of any buffer"]);
        // What lies between the end and the page's end reads as NaN, and so does shared memory that
        // nobody wrote.
        let behind = outcome(options, "read_just_behind", [1; 3], &noise(3, LEN)).unwrap();
        assert_eq!(behind[..64].iter().filter(|x| x.is_nan()).count(), 1);
        let unwritten = outcome(options, "dynamic_shared_unwritten", [1; 3], &noise(3, LEN)).unwrap();
        assert!(unwritten.iter().all(|x| x.is_nan()));
    }
}

#[test]
fn copies_arrive_at_their_wait() {
    let input = noise(4, LEN);
    let expected: Vec<f32> = (0..THREADS as usize).map(|i| input[4 * (i % 16) + i % 4]).collect();
    for options in all(false) {
        let run = |entry| outcome(options, entry, [1; 3], &input).unwrap()[..THREADS as usize].to_vec();
        assert_eq!(run("copy_read_in_time"), expected);
        match options.copies {
            Copies::Eager => assert_eq!(run("copy_read_early"), expected),
            Copies::Late => assert!(run("copy_read_early").iter().all(|x| x.is_nan())),
        }
        fails(options, "copy_unaligned", &["cp.async of line", "not aligned to 16 bytes"]);
    }
}

#[test]
fn threads_that_share_memory_need_a_barrier() {
    for options in all(true) {
        for (entry, what) in [
            ("race_of_read_and_write", "of the static shared memory"),
            ("race_of_warps", "of the static shared memory"),
            ("race_despite_shuffle", "of the static shared memory"),
            ("race_of_writes", "writes byte"),
            ("race_with_a_copy", "of the dynamic shared memory"),
            ("race_with_an_atomic", "of the static shared memory"),
        ] {
            fails(options, entry, &[entry, "CTA (0, 0, 0), thread ", "race: ", what, "with no barrier between"]);
        }
        fails(options, "race_of_arrival", &["global memory", "with no barrier between"]);
        fails(options, "race_without_fence", &["thread 40: race: an atomic on global memory, where thread 0 wrote, with no fence between"]);
        for entry in [
            "barrier_orders",
            "warp_barrier_orders",
            "atomics_order_themselves",
            "copy_read_in_time",
            "arrival_in_order",
            "one_fence_for_all",
        ] {
            assert!(outcome(options, entry, [2, 1, 1], &noise(5, LEN)).unwrap()[..64].iter().all(|x| !x.is_nan()), "{entry}");
        }
    }
}

#[test]
fn ctas_of_all_dimensions_run_and_meet() {
    for options in all(false) {
        let out = outcome(options, "last_arriver", [5, 3, 4], &noise(6, LEN)).unwrap();
        assert_eq!(out[0], 60.0 * 61.0 / 2.0, "{options:?}");
        assert!((1..=60).all(|i| out[i] == i as f32));
    }
}

#[test]
fn a_recording_takes_launches_only() {
    let (context, function) = function(EmulatorOptions::default(), "barrier_orders");
    let driver = &context.driver;
    let (input, out) = (Array::new(&context, &noise(7, LEN)), Array::nan(&context, LEN));
    let params = FaultParams { input: input.address(), out: out.address(), counter: 0, n: LEN as u32, padding: 0 };
    driver.begin_capture().unwrap();
    driver.launch(function, Launch::line(1, THREADS), bytemuck::bytes_of(&params)).unwrap();
    let refused = [
        driver.write(input.address(), &[0; 4]),
        driver.read(input.address(), &mut [0; 4]),
        driver.copy(input.address(), out.address(), 4),
        driver.fill(out.address(), 0, 1),
        driver.synchronize(),
    ];
    for outcome in refused {
        assert!(outcome.unwrap_err().to_string().contains("between begin_capture and end_capture"));
    }
    let graph = driver.end_capture().unwrap();
    assert!(out.read().unwrap().iter().all(|x| x.is_nan()), "nothing ran yet");
    driver.launch_graph(graph).unwrap();
    let first = out.read().unwrap();
    assert!(first[..64].iter().all(|x| !x.is_nan()));
    driver.fill(out.address(), 0x7fc0_0000, LEN).unwrap();
    driver.launch_graph(graph).unwrap();
    assert_eq!(out.read().unwrap()[..64], first[..64]);
    driver.drop_graph(graph);
    assert!(driver.launch_graph(graph).is_err());
}

/// A recording in which memory moves would be replayed over addresses that are gone.
#[test]
fn memory_must_not_move_while_launches_are_recorded() {
    let (context, function) = function(EmulatorOptions::default(), "barrier_orders");
    let (input, out) = (Array::new(&context, &noise(7, LEN)), Array::nan(&context, LEN));
    let params = FaultParams { input: input.address(), out: out.address(), counter: 0, n: LEN as u32, padding: 0 };
    let launch = || context.driver.launch(function, Launch::line(1, THREADS), bytemuck::bytes_of(&params));
    let graph = context.record(launch).unwrap();
    context.driver.launch_graph(graph).unwrap();
    assert!(out.read().unwrap()[..64].iter().all(|x| !x.is_nan()));
    // An error of the body leaves nothing open.
    let refused = context.record(|| context.driver.synchronize()).unwrap_err().to_string();
    assert!(refused.contains("between begin_capture and end_capture") && !context.driver.is_capturing(), "{refused}");
    let moving = std::panic::AssertUnwindSafe(|| context.record(|| context.workspace(1 << 20).map(drop)));
    let panic = std::panic::catch_unwind(moving).unwrap_err();
    assert!(panic.downcast_ref::<String>().is_some_and(|words| words.contains("memory moved while a step was recorded")));
}

#[test]
fn launches_that_no_machine_takes_are_refused() {
    let (context, function) = function(EmulatorOptions::default(), "barrier_orders");
    for launch in [Launch::line(1, 2048), Launch::line(1, 33), Launch { grid: [1; 3], block: 64, shared_bytes: 200_000 }] {
        assert!(context.driver.launch(function, launch, &[0; 32]).unwrap_err().to_string().contains("no machine launches"));
    }
}

/// A range that no buffer holds is an error of the copy, not of the process.
#[test]
fn host_copies_stay_inside_buffers() {
    let context = CudaContext::new(Box::new(Emulator::new(EmulatorOptions::default()).unwrap())).unwrap();
    let array = Array::new(&context, &[1.0f32; 8]);
    let driver = &context.driver;
    for outcome in [
        driver.write(array.address() + 4, &[0; 32]),
        driver.read(array.address(), &mut [0; 36]),
        driver.copy(array.address(), array.address() + 16, 20),
        driver.fill(array.address() + 16, 0, 5),
        driver.write(8, &[0]),
    ] {
        assert!(outcome.unwrap_err().to_string().contains("outside of any buffer"));
    }
}

#[test]
fn a_source_that_does_not_compile_is_quoted() {
    let emulator = Emulator::new(EmulatorOptions::default()).unwrap();
    let words = emulator.function_in("broken.cu", "#include \"common.cuh\"\nnonsense;\n", &[("THREADS", 32)], "x").unwrap_err().to_string();
    assert!(words.contains("broken") && words.contains("THREADS=32") && words.contains("broken.cu:2"), "{words}");
    let words = emulator.function_in("faults.cu", SOURCE, &[("THREADS", THREADS)], "no_such_entry").unwrap_err().to_string();
    assert!(words.contains("no_such_entry"), "{words}");

    let edit = Some(Edit { file: "faults.cu", from: "__syncthreads()", to: "" });
    let emulator = Emulator::new(EmulatorOptions { edit, ..EmulatorOptions::default() }).unwrap();
    let words = emulator.function_in("faults.cu", SOURCE, &[("THREADS", THREADS)], "x").unwrap_err().to_string();
    assert!(words.contains("\"__syncthreads()\" stands"), "{words}");
}
