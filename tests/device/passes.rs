//! Joint sampling on the device: a forward and the sampler's passes behind it are foreseen, sampled
//! there, and recorded as one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use redraft::cuda::driver::{Address, Function, Graph, Launch, Limits};
use redraft::cuda::{Build, Cuda, Driver};
use redraft::engine::Engine;
use redraft::request::Request;
use redraft::{DType, Finish, Result};

use crate::support::{Essence, alone, engine, options, request, schedule, together};
use crate::tokens::{agree_with, attach, fixture, ragged};
use crate::{backends, drivers};

const BASE: &str = "bd3lm-adaln";

fn sampler(name: &str) -> PathBuf {
    fixture(name).join("joint")
}

/// Under block attention with final K/V of the sampler's layer, over the whole canvas, behind a
/// remask inside a run, and by rules whose quota changes.
#[test]
fn tokens_equal_the_cpus() {
    for (name, stages) in [
        (BASE, &["block=4,sampler=joint:4", "block=full,remask=0.4,sampler=joint:3"][..]),
        (BASE, &["block=4,sampler=joint:2,kv=recompute", "block=4,remask=0.5,by=random,sampler=joint:4"]),
        (BASE, &["block=8,unmask=timestep:3,order=margin,sampler=joint,temperature=0.8,top_p=0.9"]),
        (BASE, &["block=full,sampler=joint:8"]),
        ("dream", &["block=full,visible=canvas,sampler=joint:4"]),
        ("llada", &["block=8,visible=canvas,unmask=confidence:3,sampler=joint", "block=full,visible=canvas,remask=0.4,sampler=joint:2"]),
    ] {
        agree_with(&fixture(name), Some(&sampler(name)), &ragged(&schedule(stages), [8, 9, 12]), &format!("{name} {stages:?}"));
    }
}

/// Windows that end at different passes, and a neighbour that has none.
fn neighbours() -> Vec<Request> {
    let stages = ["block=4,sampler=joint:2", "block=full,sampler=joint:8", "block=4,unmask=uniform:1", "block=4,sampler=joint:4"];
    let prompts: [&[u32]; 4] = [&[1, 5, 9, 3, 20], &[2], &[7, 7, 8, 30, 31], &[4, 11]];
    (0..4).map(|i| request(prompts[i], [9, 11, 12, 10][i], &schedule(&[stages[i]]), 3, i as u32)).collect()
}

#[test]
fn tokens_equal_the_cpus_beside_other_schedules() {
    agree_with(&fixture(BASE), Some(&sampler(BASE)), &neighbours(), "neighbours");
}

/// Bit for bit: sampled by the host, launched pass by pass, recorded and replayed, alone or with
/// neighbours.
#[test]
fn the_tokens_are_equal_on_host_and_device_and_however_it_is_launched() {
    for dtype in [DType::F32, DType::Bf16] {
        for backend in backends(dtype) {
            let mut engine = Engine::load(&fixture(BASE), backend, options()).expect("a fixture");
            attach(&mut engine, Some(&sampler(BASE)));
            let requests = neighbours();
            engine.backend().set_runs(false);
            let expected: Vec<Essence> = alone(&mut engine, &requests, "host").iter().map(Essence::of).collect();
            engine.backend().set_runs(true);
            engine.backend().set_replays(false);
            let launched: Vec<Essence> = together(&mut engine, &requests, "launched").iter().map(Essence::of).collect();
            assert_eq!((&launched, engine.backend().num_graphs()), (&expected, 0), "{dtype:?}, launched");
            engine.backend().set_replays(true);
            for round in 0..3 {
                let found: Vec<Essence> = together(&mut engine, &requests, "replayed").iter().map(Essence::of).collect();
                assert_eq!(found, expected, "{dtype:?}, round {round}");
            }
            assert!(engine.backend().num_graphs() > 3, "{} graphs", engine.backend().num_graphs());
        }
    }
}

/// A sampler comes with a K/V store of its own, and what was recorded before names the one that is
/// gone.
#[test]
fn recordings_end_with_the_store_that_they_name() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(BASE), backend, options()).expect("a fixture");
        let stages = schedule(&["block=4,unmask=uniform:1"]);
        // Forwards of the same shapes behind prompts that differ.
        let [before, after] = [[7, 7, 8, 30, 31], [9, 40, 1, 6, 2]].map(|prompt: [u32; 5]| [request(&prompt, 7, &stages, 3, 0)]);
        for _ in 0..3 {
            together(&mut engine, &before, "before");
        }
        assert!(engine.backend().num_graphs() > 0);
        attach(&mut engine, Some(&sampler(BASE)));
        let found = Essence::of(&together(&mut engine, &after, "replayed")[0]);
        engine.backend().set_replays(false);
        assert_eq!(found, Essence::of(&together(&mut engine, &after, "launched")[0]));
    }
}

/// A draft that ends early ends it behind a pass, inside a run.
#[test]
fn a_stop_behind_a_pass() {
    // Hot enough that every token comes now and then.
    let stages = schedule(&["block=4,sampler=joint:4,temperature=5,top_p=1", "block=full,remask=0.4,sampler=joint:3"]);
    let ask = |seed| {
        let mut ask = request(&[1, 2], 24, &stages, seed, 0);
        ask.stop.ignore_eos = false;
        ask
    };
    let mut cpu = engine(&fixture(BASE));
    attach(&mut cpu, Some(&sampler(BASE)));
    let outcomes = (0..400).map(|seed| (seed, Essence::of(&together(&mut cpu, &[ask(seed)], "cpu")[0])));
    let stopping: Vec<(u64, Essence)> = outcomes.filter(|(_, outcome)| outcome.finish == Finish::EndOfText).take(3).collect();
    assert_eq!(stopping.len(), 3, "the end of text comes now and then");
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&fixture(BASE), backend, options()).expect("a fixture");
        attach(&mut engine, Some(&sampler(BASE)));
        let free = engine.free_pages();
        for (seed, expected) in &stopping {
            let found = Essence::of(&together(&mut engine, &[ask(*seed)], "device")[0]);
            assert_eq!((&found.canvas, &found.stages, found.finish), (&expected.canvas, &expected.stages, expected.finish), "seed {seed}");
        }
        assert_eq!(engine.free_pages(), free);
    }
}

#[derive(Default)]
struct Counts {
    waits: AtomicUsize,
    launches: AtomicUsize,
    replays: AtomicUsize,
}

impl Counts {
    fn take(&self) -> [usize; 3] {
        [&self.waits, &self.launches, &self.replays].map(|count| count.swap(0, Ordering::Relaxed))
    }
}

/// A driver that counts what the host does: waits, launches outside of a recording, and replays.
struct Counting {
    driver: Box<dyn Driver>,
    counts: Arc<Counts>,
}

impl Driver for Counting {
    fn name(&self) -> String {
        self.driver.name()
    }
    fn arch(&self) -> String {
        self.driver.arch()
    }
    fn is_emulated(&self) -> bool {
        self.driver.is_emulated()
    }
    fn limits(&self) -> Limits {
        self.driver.limits()
    }
    fn alloc(&self, bytes: usize) -> Result<Address> {
        self.driver.alloc(bytes)
    }
    fn free(&self, address: Address) {
        self.driver.free(address);
    }
    fn write(&self, dst: Address, src: &[u8]) -> Result<()> {
        self.driver.write(dst, src)
    }
    fn read(&self, src: Address, dst: &mut [u8]) -> Result<()> {
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        self.driver.read(src, dst)
    }
    fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()> {
        self.driver.copy(src, dst, bytes)
    }
    fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()> {
        self.driver.fill(dst, word, words)
    }
    fn synchronize(&self) -> Result<()> {
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        self.driver.synchronize()
    }
    fn function(&self, build: &Build, entry: &str) -> Result<Function> {
        self.driver.function(build, entry)
    }
    fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()> {
        if !self.is_capturing() {
            self.counts.launches.fetch_add(1, Ordering::Relaxed);
        }
        self.driver.launch(function, launch, params)
    }
    fn begin_capture(&self) -> Result<()> {
        self.driver.begin_capture()
    }
    fn end_capture(&self) -> Result<Graph> {
        self.driver.end_capture()
    }
    fn is_capturing(&self) -> bool {
        self.driver.is_capturing()
    }
    fn launch_graph(&self, graph: Graph) -> Result<()> {
        self.counts.replays.fetch_add(1, Ordering::Relaxed);
        self.driver.launch_graph(graph)
    }
    fn drop_graph(&self, graph: Graph) {
        self.driver.drop_graph(graph);
    }
}

/// A request that is recorded: its forwards with all of their passes are one replay each, and the
/// host waits at the end of a run alone, for the log and the summaries.
#[test]
fn a_forward_and_its_passes_are_one_replay_and_no_wait() {
    for driver in drivers() {
        one_replay_and_no_wait(driver);
    }
}

fn one_replay_and_no_wait(driver: Box<dyn Driver>) {
    let counts = Arc::new(Counts::default());
    let driver = Box::new(Counting { driver, counts: counts.clone() });
    let mut engine = Engine::load(&fixture(BASE), Cuda::new(driver, DType::F32).expect("a driver"), options()).expect("a fixture");
    attach(&mut engine, Some(&sampler(BASE)));
    // No whole block is given, so nothing is prefilled; four forwards are a request's first run.
    for (stage, forwards, passes) in [("block=4,sampler=joint:4", 4, 11), ("block=full,sampler=joint:4", 4, 11)] {
        let ask = [request(&[3], 15, &schedule(&[stage]), 5, 0)];
        let first = Essence::of(&together(&mut engine, &ask, "first")[0]);
        assert_eq!((first.stages[0].forwards.denoise, first.stages[0].forwards.joint), (forwards, passes), "{stage}");
        together(&mut engine, &ask, "recorded");
        counts.take();
        assert_eq!(Essence::of(&together(&mut engine, &ask, "replayed")[0]), first);
        // One launch a forward lists what it samples; the rest is in the recording.
        assert_eq!(counts.take(), [2, forwards, forwards], "{stage}: waits, launches, replays");
    }
}
