//! Joint sampling: what it decodes is what its definition says, computed without any cache; and it keeps the laws of the engine.

use std::path::PathBuf;

use redraft::plan::Visibility;
use redraft::schedule::Schedule;
use redraft::{Cpu, DType, Engine, Request};

use crate::support::*;

fn root(name: &str) -> PathBuf {
    fixture().with_file_name(name)
}

fn with_sampler(name: &str, threads: usize) -> Engine<Cpu> {
    let mut engine = engine_with(&root(name), threads, DType::F32, options());
    engine.attach_joint(&root(name).join("joint"), &mut |_, _| {}).expect("a sampler of this model");
    engine
}

fn stages(engine: &Engine<Cpu>, stages: &[&str]) -> Schedule {
    let specs: Vec<_> = stages.iter().map(|s| s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))).collect();
    Schedule::resolve(&specs, &Engine::<Cpu>::defaults(engine.config())).unwrap_or_else(|e| panic!("{stages:?}: {e}"))
}

/// Of logits with MASK left out: the best token, and the entropy in nats.
fn best(logits: &[f32], mask_id: u32) -> (u32, f64) {
    let kept = || logits.iter().enumerate().filter(|(token, _)| *token as u32 != mask_id).map(|(token, v)| (token as u32, f64::from(*v)));
    let (token, top) = kept().fold((0, f64::MIN), |best, now| if now.1 > best.1 { now } else { best });
    let sum: f64 = kept().map(|(_, v)| (v - top).exp()).sum();
    let entropy = kept().map(|(_, v)| (v - top).exp() / sum).map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
    (token, entropy)
}

/// The definition: block by block, a forward over everything up to the block's end from scratch, then one reveal after the other at the lowest
/// entropy, the sampler chained from that forward's states over the block each time.
fn defined(engine: &mut Engine<Cpu>, prompt: &[u32], length: usize, block: Option<usize>, k: usize) -> Vec<u32> {
    let mask_id = engine.config().mask_id.expect("a diffusion model");
    let (vocab_size, shift) = (engine.config().vocab_size, engine.config().shift);
    let len = prompt.len() + length;
    let mut canvas = prompt.to_vec();
    canvas.resize(len, mask_id);
    let visibility = block.map_or(Visibility::Full, Visibility::BlockCausal);
    while let Some(first) = canvas.iter().position(|t| *t == mask_id) {
        let window = block.map_or(0..len, |b| first / b * b..(first / b * b + b).min(len));
        let seen = canvas[..window.end].to_vec();
        let mut states = vec![seen.clone()];
        let mut rows = Vec::new();
        engine
            .logits(&seen, visibility, &mut |_, logits| {
                rows.extend_from_slice(logits);
                Ok(())
            })
            .expect("a forward");
        let answering = |p: usize| if shift { p.saturating_sub(1) } else { p };
        let mut of: Vec<Vec<f32>> = window.clone().map(|p| rows[answering(p) * vocab_size..][..vocab_size].to_vec()).collect();
        for reveal in 0..k {
            let masked: Vec<usize> = window.clone().filter(|p| canvas[*p] == mask_id).collect();
            if masked.is_empty() {
                break;
            }
            if reveal > 0 {
                let logits = engine.joint_logits(&states, window.clone(), visibility).expect("calls").pop().expect("one at least");
                of = logits.chunks_exact(vocab_size).map(<[f32]>::to_vec).collect();
            }
            let answers = masked.iter().map(|p| (*p, best(&of[p - window.start], mask_id)));
            let (position, (token, _)) = answers.min_by(|a, b| a.1.1.total_cmp(&b.1.1)).expect("one is masked");
            canvas[position] = token;
            states.push(canvas[..window.end].to_vec());
        }
    }
    canvas
}

#[test]
fn decodes_are_those_of_the_definition() {
    for (name, block) in [("bd3lm-adaln", Some(4)), ("bd3lm-adaln", Some(6)), ("bd3lm-adaln", None), ("dream", None), ("llada", None)] {
        for (p, n) in [(1, 17), (6, 22), (8, 12)] {
            for k in [1, 2, 4, 9] {
                let mut engine = with_sampler(name, 1);
                let prompt: Vec<u32> = (0..p).map(|i| (5 * i + 3) % 60).collect();
                let expected = defined(&mut engine, &prompt, n, block, k);
                let unit = block.map_or("full".into(), |b| b.to_string());
                let schedule = stages(&engine, &[&format!("block={unit},sampler=joint:{k},temperature=0,top_p=1")]);
                let label = format!("{name}, {schedule:?}, {p} given, {n} generated");
                let found = alone(&mut engine, &[request(&prompt, n, &schedule, 3, 0)], &label).remove(0);
                assert_eq!(found.canvas, expected, "{label}");
            }
        }
    }
}

fn requests(engine: &Engine<Cpu>, kv: &str) -> Vec<Request> {
    let spelled = [
        vec![format!("block=4,sampler=joint:4,kv={kv}")],
        vec![format!("block=4,sampler=joint:3,kv={kv}"), format!("block=full,remask=0.4,sampler=joint:5,kv={kv}")],
        vec![format!("block=8,unmask=confidence:3,sampler=joint,kv={kv}")],
        // The same prompt, with and without a sampler's K/V in its pages.
        vec![format!("block=4,unmask=uniform:1,kv={kv}")],
        vec![format!("block=full,unmask=linear:4,order=margin,sampler=joint,kv={kv}")],
        // A joint stage behind one of the same attention that had no sampler, and the other way round.
        vec![format!("block=4,unmask=uniform:1,kv={kv}"), format!("block=4,remask=0.6,sampler=joint:3,kv={kv}")],
        vec![format!("block=4,sampler=joint:3,kv={kv}"), format!("block=4,remask=0.6,unmask=uniform:1,kv={kv}")],
        vec![format!("block=4,unmask=left:2,sampler=joint,kv={kv}"), format!("block=8,remask=0.5,by=held-out:2,unmask=entropy:2,kv={kv}")],
    ];
    let prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
    spelled
        .iter()
        .enumerate()
        .map(|(i, spelled)| {
            let spelled: Vec<&str> = spelled.iter().map(String::as_str).collect();
            request(&prompt, 14 + 3 * i, &stages(engine, &spelled), 9, i as u32)
        })
        .collect()
}

#[test]
fn neighbours_threads_and_caches_change_nothing() {
    let mut engine = with_sampler("bd3lm-adaln", 1);
    let exact = requests(&engine, "exact");
    let expected = alone(&mut engine, &exact, "alone");
    let mut two = with_sampler("bd3lm-adaln", 2);
    // What it cost may differ: together, equal prompts are prefilled once.
    same(&together(&mut two, &exact, "together"), &expected, true, "together, two threads");
    // What is reused is exact: final K/V of the sampler's layer too.
    let recomputed = requests(&engine, "recompute");
    same(&alone(&mut engine, &recomputed, "recomputed"), &expected, true, "recomputed");
    let mut separate = exact.clone();
    separate.iter_mut().for_each(|r| r.separate_commit = true);
    same(&together(&mut engine, &separate, "separate"), &expected, true, "separate commits");
    let capacity = engine.free_pages();
    assert_eq!(capacity, with_sampler("bd3lm-adaln", 1).free_pages(), "pages came back");
}

#[test]
fn one_at_a_time_needs_no_sampler() {
    let mut engine = with_sampler("bd3lm-adaln", 1);
    for block in ["4", "full"] {
        let run = |engine: &mut Engine<Cpu>, rest: &str| {
            let schedule = stages(engine, &[&format!("block={block},{rest}")]);
            alone(engine, &[request(&[1, 2, 3], 18, &schedule, 4, 0)], rest).remove(0)
        };
        let (joint, plain) = (run(&mut engine, "sampler=joint:1"), run(&mut engine, "unmask=entropy:1"));
        assert_eq!(joint.canvas, plain.canvas);
        assert_eq!(joint.stages[0].forwards, plain.stages[0].forwards);
    }
}

/// K reveals cost a forward and K - 1 passes; NFE counts the forwards.
#[test]
fn passes_are_counted_by_themselves() {
    let mut engine = with_sampler("bd3lm-adaln", 1);
    for (block, n, k, forwards, passes) in [("full", 18, 4, 5, 13), ("full", 16, 8, 2, 14), ("4", 16, 4, 4, 12), ("4", 16, 3, 8, 8)] {
        let schedule = stages(&engine, &[&format!("block={block},sampler=joint:{k}")]);
        let output = alone(&mut engine, &[request(&[1, 2, 3, 4], n, &schedule, 4, 0)], block).remove(0);
        let report = &output.stages[0];
        assert_eq!((report.nfe(), report.forwards.denoise, report.forwards.joint), (forwards, forwards, passes), "block {block}, {k}");
    }
}

#[test]
fn what_cannot_be_joint_is_refused() {
    let mut plain = engine(&fixture());
    let refused = |engine: &mut Engine<Cpu>, stage: &str, words: &[&str]| {
        let schedule = stages(engine, &[stage]);
        let error = engine.submit(request(&[1], 5, &schedule, 0, 0)).err().unwrap_or_else(|| panic!("{stage} is served")).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{stage}: {error}");
    };
    refused(&mut plain, "block=4,sampler=joint:2", &["stage 0", "no joint sampler", "--joint DIR"]);
    refused(&mut with_sampler("dream", 1), "block=4,visible=block,sampler=joint:2", &["shifted", "visible=canvas"]);
    let mut attach = |dir: PathBuf, words: &[&str]| {
        let error = plain.attach_joint(&dir, &mut |_, _| {}).expect_err("another model's").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{}: {error}", dir.display());
    };
    attach(root("dream").join("joint"), &["base_family", "bd3lm", "dream"]);
    attach(root("dream"), &["model_type", "joint-sampler", "Dream"]);
    attach(root("nowhere"), &["no such model directory"]);
}
