//! The same request gives the same tokens on the CPU and on the device, in f32, for every kind of
//! schedule.

use std::path::{Path, PathBuf};

use redraft::engine::Engine;
use redraft::request::Request;
use redraft::{Backend, Cpu, DType};

use crate::backends;
use crate::support::{Essence, StageEssence, alone, options, preset, request, schedule, shipped, together};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Runs requests together on the CPU and on every device; tokens, places of each token and costs
/// must be equal, confidences close.
fn agree(dir: &Path, requests: &[Request], label: &str) {
    agree_with(dir, None, requests, label);
}

/// The same with a joint sampler beside the model.
pub fn agree_with(dir: &Path, joint: Option<&Path>, requests: &[Request], label: &str) {
    agree_between(dir, None, joint, requests, label);
}

/// The same with another model beside the first.
fn agree_between(dir: &Path, other: Option<&Path>, joint: Option<&Path>, requests: &[Request], label: &str) {
    let cpu = Cpu::new(2, DType::F32).expect("the CPU is always there");
    let mut engine = Engine::load(dir, cpu, options()).unwrap_or_else(|e| panic!("{label}: {e}"));
    add(&mut engine, other);
    attach(&mut engine, joint);
    let expected = together(&mut engine, requests, label);
    for backend in backends(DType::F32) {
        let label = format!("{label} on {}", backend.name());
        let mut engine = Engine::load(dir, backend, options()).unwrap_or_else(|e| panic!("{label}: {e}"));
        add(&mut engine, other);
        attach(&mut engine, joint);
        let found = together(&mut engine, requests, &label);
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (f, e) in found.confidence.iter().zip(&expected.confidence) {
                assert!((f - e).abs() <= 1e-4 * e.max(0.01), "{label}: request {i}: confidence {f}, expected {e}");
            }
            let (found, expected) = (Essence::of(found), Essence::of(expected));
            assert_eq!(found.canvas, expected.canvas, "{label}: request {i}: canvas");
            let (found, expected) = (Essence { confidence: Vec::new(), ..found }, Essence { confidence: Vec::new(), ..expected });
            assert_eq!(found, expected, "{label}: request {i}");
        }
    }
}

fn add<B: Backend>(engine: &mut Engine<B>, other: Option<&Path>) {
    if let Some(dir) = other {
        engine.add_model(dir, &mut |_, _| {}).expect("a model of the same vocabulary");
    }
}

pub fn attach<B: Backend>(engine: &mut Engine<B>, joint: Option<&Path>) {
    if let Some(dir) = joint {
        engine.attach_joint(dir, &mut |_, _| {}).expect("a sampler of this model");
    }
}

/// Passes that choose among listed ids, and passes without bans, beside each other.
#[test]
fn tokens_equal_the_cpus_for_shortlists_and_late_bans() {
    for (name, rest) in [("bd3lm-adaln", "block=4"), ("dream", "block=full,visible=canvas"), ("llada", "block=8,visible=canvas")] {
        let dir = fixture(name);
        let stage = |keys: &str| schedule(&[&format!("{rest},sampler=joint:4,{keys}")]);
        let kinds =
            ["shortlist=6,top_p=0.8", "bans=first,temperature=2", "shortlist=20,top_k=5,confidence=truncated", "eos=never,shortlist=6"];
        let requests: Vec<Request> = kinds.iter().flat_map(|keys| ragged(&stage(keys), [8, 9, 12])).collect();
        agree_with(&dir, Some(&dir.join("joint")), &requests, &format!("{name} {rest}"));
    }
}

/// A device lists so many ids and no more; where all are wanted no list is made.
#[test]
fn a_list_that_is_too_long_is_refused_by_name() {
    for backend in backends(DType::F32) {
        let mut engine = Engine::load(&shipped(), backend, options()).expect("the model that ships");
        let mut refused = |n: usize| {
            let stages = schedule(&[&format!("block=4,sampler=joint:2,shortlist={n}")]);
            engine.submit(request(&[0], 4, &stages, 1, 0)).err().expect("there is no sampler, and at most 1024 are listed").to_string()
        };
        let long = refused(1025);
        assert!(["stage 0", "shortlist=1025", "at most 1024", "shortlist=all"].iter().all(|word| long.contains(word)), "{long}");
        assert!([refused(1024), refused(1 << 20)].iter().all(|error| error.contains("--joint")));
    }
}

/// Lengths, prompts and seeds of a ragged batch.
pub fn ragged(stages: &redraft::Schedule, lengths: [usize; 3]) -> Vec<Request> {
    let prompts: [&[u32]; 3] = [&[1, 5, 9, 3, 20], &[2], &[7, 7, 8, 30, 31, 2, 4, 11, 12]];
    (0..3).map(|i| request(prompts[i], lengths[i], stages, 11 + i as u64, i as u32)).collect()
}

const SCHEDULES: [&[&str]; 9] = [
    &["block=4,unmask=uniform:1"],
    &["block=4,unmask=uniform:1", "block=full,remask=0.35,by=snapshot,unmask=linear:6,order=uniform"],
    &["block=4,unmask=confidence:2,top_p=1", "block=full,remask=0.4,by=snapshot,unmask=confidence:3,kv=refresh:2,top_p=1"],
    &["block=4,unmask=threshold:0.1", "block=8,remask=0.5,by=snapshot,unmask=entropy:2,kv=exact"],
    &["block=8,unmask=margin:3,temperature=0", "block=full,remask=0.3,by=post-hoc,unmask=left:4,kv=draft"],
    &["block=4,unmask=entropy-bound:3,temperature=0.7", "block=full,remask=0.3,by=held-out:3,unmask=timestep:5"],
    &["block=4,unmask=uniform:2,kv=recompute", "block=full,remask=0.35,by=random,unmask=uniform:5"],
    &["block=full,unmask=linear:7,order=confidence,top_p=0.8,top_p_rule=crossing,confidence=truncated"],
    &["block=4", "block=16,remask=0.3,by=snapshot,unmask=confidence:2", "block=full,remask=0.2,by=snapshot,unmask=uniform:4"],
];

#[test]
fn tokens_equal_the_cpus_for_every_kind_of_schedule() {
    for stages in SCHEDULES {
        let requests = ragged(&schedule(stages), [22, 17, 30]);
        agree(&fixture("bd3lm-adaln"), &requests, &format!("{stages:?}"));
    }
}

#[test]
fn tokens_equal_the_cpus_for_every_checkpoint() {
    for name in ["bd3lm-plain", "bd3lm-plain-bf16", "bd3lm-plain-sharded", "bd3lm-head64", "mdlm"] {
        agree(&fixture(name), &ragged(&preset("did"), [12, 9, 20]), name);
    }
}

/// Other layouts and shifted logits, where the device is asked row by row.
#[test]
fn tokens_equal_the_cpus_for_the_adapted_families() {
    let dense = [("dream", "canvas"), ("fast-dllm", "block"), ("llada", "canvas"), ("sdar", "block")];
    let experts = [("llada-moe", "canvas"), ("llada2", "block"), ("rnd1", "canvas"), ("sdar-moe", "block")];
    for (name, scope) in dense.into_iter().chain(experts) {
        let draft = format!("block=8,visible={scope},unmask=confidence:3");
        let stages = schedule(&[&draft, "block=full,remask=0.4,by=snapshot,unmask=linear:2,kv=refresh:2"]);
        agree(&fixture(name), &ragged(&stages, [8, 9, 12]), name);
    }
}

/// Shifted logits where every row is computed: the device samples steps, boundary forwards and a
/// refine by itself.
#[test]
fn tokens_equal_the_cpus_under_shifted_logits() {
    for (name, scope) in [("dream", "canvas"), ("fast-dllm", "block"), ("rnd1", "canvas")] {
        let draft = format!("block=8,visible={scope},unmask=uniform:2");
        let stages = schedule(&[&draft, "block=full,remask=0.4,by=snapshot,unmask=linear:3"]);
        agree(&fixture(name), &ragged(&stages, [14, 9, 21]), name);
    }
}

/// What the published samplers add: some of it is sampled on the device, some by the host behind a
/// forward there.
#[test]
fn tokens_equal_the_cpus_for_the_published_samplers() {
    for (name, stage) in [
        ("llada", "block=8,visible=canvas,from=prompt,unmask=linear:3,guidance=0.7,eos=last"),
        ("llada", "block=8,visible=canvas,from=prompt,unmask=factor:2.5,kv=dual,eos=never"),
        ("dream", "block=full,visible=canvas,unmask=ancestral:6,eps=0.1"),
        ("sdar", "block=4,visible=block,unmask=above:0.25,steps=2"),
        ("sdar", "block=4,visible=block,sub=2,unmask=fixed:2,order=left"),
        ("fast-dllm", "block=8,visible=block,sub=4,unmask=above:0.2"),
        ("sdar", "block=8,visible=block,unmask=above:0.3,edit=0.15,passes=2,last=fill"),
        ("sdar", "block=8,visible=block,unmask=uniform:2,top_k=5,last=fill"),
        ("dream", "block=8,visible=canvas,from=prompt,unmask=threshold:0.25,kv=dual"),
        ("dream", "block=full,visible=canvas,unmask=timestep:5,order=entropy,top_p=0.8,top_k=6,top_k_order=after,confidence=truncated"),
    ] {
        agree(&fixture(name), &ragged(&schedule(&[stage]), [8, 9, 12]), &format!("{name} {stage}"));
    }
}

/// Blocks of one, whose steps are boundary forwards that the device runs ahead; no masked position
/// is ever embedded.
#[test]
fn tokens_equal_the_cpus_for_autoregressive_checkpoints() {
    for name in ["llama", "qwen3-moe", "gpt2"] {
        agree(&fixture(name), &ragged(&preset("ar"), [14, 9, 21]), name);
    }
}

/// A draft by one model, refined by another: each runs over K/V of its own.
#[test]
fn tokens_equal_the_cpus_for_a_draft_of_another_model() {
    let stages = schedule(&["block=1,visible=block,unmask=left:1", "block=full,remask=0.4,by=snapshot,unmask=linear:2,weights=1"]);
    agree_between(&fixture("qwen2"), Some(&fixture("dream")), None, &ragged(&stages, [8, 9, 12]), "qwen2, then dream");
}

#[test]
fn tokens_equal_the_cpus_on_the_shipped_model() {
    let requests = [request(&[0, 433, 257], 16, &preset("did"), 7, 0)];
    agree(&shipped(), &requests, "shipped");
}

/// The host samples the stage whose tokens are given, the device what refines them.
#[test]
fn a_given_draft_is_refined_as_on_the_cpu() {
    let stages = schedule(&["block=4,unmask=left:1", "block=full,remask=0.4,by=snapshot,unmask=uniform:3"]);
    let mut given = request(&[1, 2], 14, &stages, 3, 0);
    given.draft = (0..16).map(|position| 3 + position * 7 % 50).collect();
    agree(&fixture("bd3lm-plain"), &[given], "a given draft");
}

/// Confidence bits aside, nothing of a bf16 run depends on whether the host or the device samples.
#[test]
fn bf16_runs_sample_as_the_host_would() {
    let stages = schedule(SCHEDULES[1]);
    for backend in backends(DType::Bf16) {
        backend.set_runs(false);
        let mut host = Engine::load(&fixture("bd3lm-head64"), backend, options()).expect("a fixture");
        let requests = ragged(&stages, [14, 9, 21]);
        let expected: Vec<Essence> = alone(&mut host, &requests, "host").iter().map(Essence::of).collect();
        host.backend().set_runs(true);
        let found: Vec<Essence> = together(&mut host, &requests, "device").iter().map(Essence::of).collect();
        assert_eq!(found, expected);
        assert!(found.iter().all(|e| e.stages.iter().all(|s: &StageEssence| s.forwards.denoise > 0)));
    }
}
