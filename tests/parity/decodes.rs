//! Decodes of the dense diffusion families: the published loops, canvas by canvas, and
//! draft-then-refine on each.

use std::sync::Arc;

use redraft::backend::DType;
use redraft::config::ModelConfig;
use redraft::cpu::Cpu;
use redraft::engine::Engine;
use redraft::plan::Visibility;
use redraft::request::{Output, Prompt, Request};
use redraft::rng::{DrawKey, TIME_STEP, Uniforms, uniforms};
use redraft::schedule::Schedule;
use redraft::sequence::{DrawSource, EventKind};
use serde_json::Value;

use crate::fixture::{Fixture, text};

const FAMILIES: [&str; 9] = ["dream", "fast-dllm", "llada", "llada-moe", "llada2", "rnd1", "sdar", "sdar-moe", "stable-diffcoder"];
/// Those whose authors' samplers are recorded.
const SAMPLED: [&str; 5] = ["dream", "fast-dllm", "llada", "llada2", "sdar"];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn request(config: &ModelConfig, prompt: &[u32], length: usize, stages: &[String]) -> Request {
    let specs: Vec<_> = stages.iter().map(|s| s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))).collect();
    let schedule = Schedule::resolve(&specs, &Engine::<Cpu>::defaults(config)).unwrap_or_else(|e| panic!("{stages:?}: {e}"));
    let mut request = Request::new(Prompt::Tokens { tokens: prompt.to_vec(), length }, schedule, 7, 0);
    request.stop.ignore_eos = true;
    request
}

/// The outcome, and the canvas after every unmasking step.
fn run(engine: &mut Engine<Cpu>, request: Request, label: &str) -> (Output, Vec<Vec<u32>>) {
    let mask_id = engine.config().mask_id.expect("a diffusion model");
    let mut canvas: Vec<u32> = engine.canvas(&request.prompt).expect("a prompt").iter().map(|token| token.unwrap_or(mask_id)).collect();
    let handle = engine.submit(request).unwrap_or_else(|e| panic!("{label}: {e}"));
    engine.run().unwrap_or_else(|e| panic!("{label}: {e}"));
    let mut canvases: Vec<Vec<u32>> = Vec::new();
    let mut step = None;
    for event in handle.events() {
        for (position, token) in event.positions.iter().zip(&event.tokens) {
            // The last block may be decoded whole.
            canvas.resize(canvas.len().max(position + 1), mask_id);
            match event.kind {
                EventKind::Unmask | EventKind::Edit => canvas[*position] = *token,
                EventKind::Remask => canvas[*position] = mask_id,
                EventKind::Commit | EventKind::Done => {}
            }
        }
        match event.kind {
            EventKind::Edit if step == Some(event.step) => {
                *canvases.last_mut().expect("the unmask event of the same forward") = canvas.clone()
            }
            EventKind::Unmask | EventKind::Edit => canvases.push(canvas.clone()),
            _ => {}
        }
        step = Some(event.step);
    }
    let output = handle.take_output().unwrap_or_else(|| panic!("{label}: no output")).unwrap_or_else(|e| panic!("{label}: {e}"));
    (output, canvases)
}

fn runs(fixture: &Fixture, file: &str) -> Vec<Value> {
    let file = fixture.json(file);
    file["runs"].as_array().expect("runs").clone()
}

/// The uniforms that a recorded run was drawn from, by forward and position.
fn draws(recorded: &Value) -> DrawSource {
    let numbers = |v: &Value| v.as_array().expect("a list").iter().map(|u| u.as_f64().expect("a uniform")).collect::<Vec<f64>>();
    let table = |key: &str| recorded["draws"][key].as_array().expect("a table").iter().map(numbers).collect::<Vec<_>>();
    let (token, order, time) = (table("token"), table("order"), numbers(&recorded["draws"]["time"]));
    Arc::new(move |key| {
        let position = key.position as usize;
        if key.step == TIME_STEP {
            return Uniforms { token: 0.0, order: time[position] };
        }
        Uniforms { token: token[key.step as usize][position], order: order[key.step as usize][position] }
    })
}

/// Runs what was recorded and compares every canvas.
fn follow(fixture: &Fixture, recorded: &Value, stage: String, draws: Option<DrawSource>, label: &str) -> Output {
    let prompt = ids(&recorded["prompt"]);
    let length = recorded["length"].as_u64().expect("a length") as usize;
    let mut engine = fixture.engine(1, DType::F32);
    let mut request = request(&engine.config().clone(), &prompt, length, &[stage]);
    request.draws = draws;
    let mask_id = engine.config().mask_id.expect("a diffusion model");
    let (output, mut canvases) = run(&mut engine, request, label);
    let expected: Vec<Vec<u32>> = recorded["canvases"].as_array().expect("canvases").iter().map(ids).collect();
    canvases.iter_mut().for_each(|canvas| canvas.resize(expected[0].len(), mask_id));
    for (step, (found, expected)) in canvases.iter().zip(&expected).enumerate() {
        assert_eq!(found, expected, "{label}: canvas after forward {step}");
    }
    assert_eq!(canvases.len(), expected.len(), "{label}: forwards that unmask");
    // Forwards of an editing loop that change nothing count too.
    let forwards = recorded["forwards"].as_u64().map_or(expected.len(), |forwards| forwards as usize);
    assert_eq!(output.stages[0].nfe(), forwards, "{label}: NFE");
    assert_eq!(output.canvas, expected.last().expect("a canvas")[..prompt.len() + length], "{label}");
    output
}

/// With and without reuse of K/V, every canvas of every published loop.
#[test]
fn greedy_decodes_follow_the_published_loops() {
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let runs = runs(&fixture, "decode.json");
        assert!(runs.len() >= 2, "{name}: runs");
        for recorded in &runs {
            for kv in ["exact", "recompute", "refresh:1"] {
                let stage = format!("{},temperature=0,kv={kv}", text(recorded, "stage"));
                follow(&fixture, recorded, stage, None, &format!("{name} {} kv={kv}", recorded["name"]));
            }
        }
    }
}

/// The samplers' own code, or their loops where that cannot run here; draws included. What reuses
/// K/V exactly does so without a trace.
#[test]
fn published_samplers_are_followed() {
    let mut names = Vec::new();
    for name in SAMPLED {
        let fixture = Fixture::open(name);
        for recorded in &runs(&fixture, "samplers.json") {
            let stage = text(recorded, "stage");
            let cached = stage.contains("kv=");
            // Guidance and edits take no refreshes.
            let all_rows = stage.contains("guidance") || stage.contains("edit");
            let exact = &[",kv=exact", ",kv=recompute", ",kv=refresh:1"][..if all_rows { 2 } else { 3 }];
            for kv in if cached { &[""][..] } else { exact } {
                let label = format!("{name} {}{kv}", recorded["name"]);
                let output = follow(&fixture, recorded, format!("{stage}{kv}"), Some(draws(recorded)), &label);
                // Fast-dLLM's caches compute less than everything, and the runs are there to show
                // it.
                let (all, stage) = (output.canvas.len() * output.stages[0].nfe(), &output.stages[0]);
                assert!(!cached || stage.rows < all, "{label}: {} of {all} rows", stage.rows);
            }
            names.push(text(recorded, "name").to_string());
        }
    }
    assert!(names.len() >= 20 && names.iter().any(|n| n.contains("dual cache")), "{names:?}");
}

/// Blocks that are edited until they are stable, last blocks that are decoded whole, and what comes
/// after them: alone, together, and with the K/V of finished blocks written by forwards of their
/// own.
#[test]
fn neighbours_change_nothing_where_tokens_give_way() {
    let fixture = Fixture::open("sdar");
    let config = fixture.engine(1, DType::F32).config().clone();
    let stages: [&[&str]; 5] = [
        &["block=8,unmask=above:0.3,edit=0.15,passes=3,last=fill"],
        &["block=8,unmask=above:0.3,steps=4,last=fill,top_k=5"],
        &["block=4,unmask=linear:2,order=confidence,edit=0.1,top_k=3,top_k_order=after,confidence=truncated"],
        &["block=8,unmask=uniform:2"],
        &["block=8,unmask=above:0.3,edit=0.1,last=fill", "block=full,remask=0.4,unmask=linear:3,edit=0.2"],
    ];
    let prompt: Vec<u32> = (0..16).collect();
    let requests: Vec<Request> = stages
        .iter()
        .enumerate()
        .map(|(i, stages)| {
            let stages: Vec<String> = stages.iter().map(|s| format!("{s},temperature=0.8")).collect();
            request(&config, &prompt[..3 + 2 * i], 14 + i, &stages)
        })
        .collect();
    let alone: Vec<Output> = requests.iter().map(|r| run(&mut fixture.engine(1, DType::F32), r.clone(), "alone").0).collect();
    let mut engine = fixture.engine(2, DType::F32);
    let free = engine.free_pages();
    for separate_commit in [false, true] {
        let handles: Vec<_> =
            requests.iter().map(|r| engine.submit(Request { separate_commit, ..r.clone() }).expect("a request")).collect();
        engine.run().expect("a run");
        for (i, (handle, alone)) in handles.iter().zip(&alone).enumerate() {
            handle.events().for_each(drop);
            let output = handle.take_output().expect("an outcome").expect("a text");
            assert_eq!((&output.canvas, &output.confidence), (&alone.canvas, &alone.confidence), "{:?}", stages[i]);
            assert_eq!((output.tokens.len(), output.canvas.len()), (14 + i, 3 + 2 * i + 14 + i), "{:?}: the length asked for", stages[i]);
            let edits: usize = output.stages.iter().map(|stage| stage.edited).sum();
            assert_eq!(edits > 0, i % 2 == 0, "{:?}: {edits} edits", stages[i]);
        }
    }
    // A request that is cancelled inside its last block has no positions that nobody asked for.
    for ticks in [0, 1, 4, 7] {
        let handle = engine.submit(requests[1].clone()).expect("a request");
        (0..ticks).for_each(|_| assert!(engine.tick().expect("a tick")));
        handle.cancel();
        engine.run().expect("a run");
        handle.events().for_each(drop);
        assert_eq!(handle.take_output().expect("an outcome").expect("a text").canvas.len(), 5 + 15, "after {ticks} ticks");
    }
    assert_eq!(engine.free_pages(), free);
}

/// The token before a block answers its first position, and the block cannot ask it again; under
/// full attention every row is there.
#[test]
fn edits_need_rows_of_their_own() {
    let edit = |name: &str, stage: &str| {
        let fixture = Fixture::open(name);
        let mut engine = fixture.engine(1, DType::F32);
        let request = request(&engine.config().clone(), &[1, 2, 3], 12, &[format!("{stage},temperature=0,edit=0.1")]);
        let handle = engine.submit(request)?;
        engine.run()?;
        handle.events().for_each(drop);
        handle.take_output().expect("an outcome")
    };
    let refused = edit("fast-dllm", "block=8,unmask=confidence:2").expect_err("shifted logits").to_string();
    assert!(refused.contains("stage 0") && refused.contains("shifted"), "{refused}");
    let output = edit("dream", "block=4,visible=canvas,unmask=confidence:2").expect("a text");
    assert!(output.stages[0].edited > 0 && output.stages[0].nfe() > 6, "{:?}", output.stages[0]);
}

/// An ending text is held back or never written, and an unknown one cannot be.
#[test]
fn ends_of_texts_are_last_or_never() {
    let fixture = Fixture::open("llada");
    let mut engine = fixture.engine(1, DType::F32);
    let config = engine.config().clone();
    let ends = [config.eos_id.expect("an end of text"), 64];
    let (mut free, mut steps) = (0, [Vec::new(), Vec::new()]);
    for seed in 0..40 {
        let mut written = |eos: &str| {
            let stage = format!("block=full,unmask=confidence:1,temperature=1.5,top_p=1,eos={eos}");
            let mut request = request(&config, &[seed % 60, 7], 12, &[stage]);
            request.seed = seed.into();
            run(&mut engine, request, eos).0
        };
        let ending = |output: &Output| output.tokens.iter().filter(|t| ends.contains(t)).count();
        free += ending(&written("free"));
        assert!(!written("never").tokens.contains(&ends[0]), "seed {seed}");
        let output = written("last");
        assert!(!written("never+last").tokens.contains(&ends[0]), "seed {seed}");
        for ((token, confidence), (_, step)) in output.tokens.iter().zip(&output.confidence).zip(&output.revealed_at) {
            let end = ends.contains(token);
            // Zero, as far as a snapshot can be.
            assert_eq!(*confidence == f32::MIN_POSITIVE, end, "seed {seed}: token {token} at {confidence}");
            steps[usize::from(end)].push(*step);
        }
    }
    // Held back, a position draws again with more around it, and seldom an end: they stand where
    // nothing else was left.
    let [others, ends] = steps;
    assert!(free > 3 && !ends.is_empty() && 2 * ends.len() < free && others.len() > 400, "{free} ends, {} held back", ends.len());
    assert!(ends.iter().all(|step| *step >= 9), "ends at steps {ends:?} of 12");
}

/// [LLaDA] The Gumbel draw at T > 0 is a draw from softmax(logits / T): counts of one masked
/// position against the softmax of the network's own logits, and against as many Gumbel draws in
/// f64.
#[test]
fn draws_have_the_distribution_of_gumbel_noise() {
    let fixture = Fixture::open("llada");
    let mut engine = fixture.engine(1, DType::F32);
    let config = engine.config().clone();
    let mask = config.mask_id.expect("a diffusion model");
    let (temperature, samples) = (0.7, 1500);
    let prompt = [3, 14, 15, 9, 2];
    let mut logits = Vec::new();
    let tokens: Vec<u32> = prompt.iter().copied().chain([mask]).collect();
    engine
        .logits(&tokens, Visibility::Full, &mut |_, rows| {
            logits.extend_from_slice(rows);
            Ok(())
        })
        .expect("a forward");
    let mut logits = logits.split_off(prompt.len() * config.vocab_size);
    logits[mask as usize] = f32::NEG_INFINITY;
    let mut counts = [vec![0.0; config.vocab_size], vec![0.0; config.vocab_size]];
    for sample in 0..samples {
        let stage = format!("block=full,unmask=confidence:1,temperature={temperature},top_p=1");
        let mut request = request(&config, &prompt, 1, &[stage]);
        request.sample = sample;
        counts[0][run(&mut engine, request, "one").0.tokens[0] as usize] += 1.0;
        let noisy = |id: usize| {
            let key = DrawKey { seed: 99, sample, stage: 0, block: 0, step: 0, position: id as u32 };
            f64::from(logits[id]).exp() / (-uniforms(key).token.ln()).powf(temperature)
        };
        let gumbel = (0..config.vocab_size).max_by(|a, b| noisy(*a).total_cmp(&noisy(*b))).expect("a token");
        counts[1][gumbel] += 1.0;
    }
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (counts, what) in counts.iter().zip(["the engine's draws", "Gumbel draws"]) {
        // Tokens expected five times at least are cells of their own, the others one together.
        let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        for (count, weight) in counts.iter().zip(&weights) {
            let expected = f64::from(samples) * weight / total;
            if expected >= 5.0 {
                chi += (count - expected).powi(2) / expected;
                cells += 1;
            } else {
                rest = (rest.0 + count, rest.1 + expected);
            }
        }
        chi += (rest.0 - rest.1).powi(2) / rest.1.max(1.0);
        // Mean `cells`, deviation sqrt(2 cells): five of them and room for the tail of few cells.
        let bound = f64::from(cells) + 5.0 * (2.0 * f64::from(cells)).sqrt() + 12.0;
        assert!(cells >= 4 && chi < bound, "{what}: chi-square {chi:.1} over {cells} cells, bound {bound:.1}");
    }
}

/// A semi-autoregressive or block-causal draft, the weakest third by snapshot masked again, a
/// global refine; reuse changes no bit.
#[test]
fn drafts_are_refined_on_every_family() {
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let mut engine = fixture.engine(1, DType::F32);
        let free = engine.free_pages();
        let config = engine.config().clone();
        for prompt in [vec![], vec![3, 1, 4, 1, 5], vec![2, 7, 1, 8, 2, 8, 1, 8]] {
            let stages = |kv: &str| {
                let draft = format!("block=4,unmask=uniform:1,kv={kv}");
                [draft, format!("block=full,remask=0.35,by=snapshot,unmask=linear:4,order=confidence,kv={kv}")]
            };
            let label = format!("{name} behind {} tokens", prompt.len());
            let (output, canvases) = run(&mut engine, request(&config, &prompt, 22, &stages("exact")), &label);
            assert_eq!((canvases.len(), output.stages[1].remasked.len(), output.stages[1].nfe()), (26, 7, 4), "{label}");
            let weakest = output.stages[1].remasked.clone();
            assert!(output.draft.len() == 22 && weakest.iter().all(|p| *p >= prompt.len()), "{label}: {weakest:?}");
            let (slow, others) = run(&mut engine, request(&config, &prompt, 22, &stages("recompute")), &label);
            assert_eq!((&slow.canvas, &others), (&output.canvas, &canvases), "{label}: reuse of K/V");
            let bits = |output: &Output| output.confidence.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&slow), bits(&output), "{label}: confidences");
            // The approximate policies run, and refreshing every time is exact.
            let (refreshed, _) = run(&mut engine, request(&config, &prompt, 22, &stages("refresh:1")), &label);
            assert_eq!(bits(&refreshed), bits(&output), "{label}: refresh:1");
            let (partial, _) = run(&mut engine, request(&config, &prompt, 22, &stages("refresh:3")), &label);
            assert!(partial.stages[1].rows < output.stages[1].rows, "{label}: rows of a partial refine");
        }
        assert_eq!(engine.free_pages(), free, "{name}: pages are back");
    }
}

/// Requests that share forwards, and prompts that share pages, leave no trace in each other.
#[test]
fn neighbours_change_nothing_under_shifted_logits_or_with_experts() {
    for name in ["dream", "fast-dllm", "llada2", "rnd1"] {
        let fixture = Fixture::open(name);
        let config = fixture.engine(1, DType::F32).config().clone();
        let stages = ["block=8,unmask=confidence:2".to_string(), "block=full,remask=0.4,unmask=linear:3".to_string()];
        let prompt: Vec<u32> = (0..16).collect();
        let requests: Vec<Request> = (0..6).map(|i| request(&config, &prompt[..[16, 8, 0][i % 3]], 20 + i, &stages)).collect();
        let alone: Vec<Output> = requests.iter().map(|r| run(&mut fixture.engine(1, DType::F32), r.clone(), name).0).collect();
        let mut engine = fixture.engine(2, DType::F32);
        let handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("a request")).collect();
        engine.run().expect("a run");
        for (handle, alone) in handles.iter().zip(&alone) {
            handle.events().for_each(drop);
            let output = handle.take_output().expect("an outcome").expect("a text");
            assert_eq!((&output.canvas, &output.confidence), (&alone.canvas, &alone.confidence), "{name}");
        }
    }
}

/// Requests with and without guidance, with their own ways of ending and of caching, in the same
/// forwards.
#[test]
fn neighbours_change_nothing_under_the_published_samplers() {
    let fixture = Fixture::open("llada");
    let config = fixture.engine(1, DType::F32).config().clone();
    let stages = [
        "block=8,from=prompt,unmask=linear:3,guidance=0.7",
        "block=8,from=prompt,unmask=linear:3",
        "block=8,from=prompt,unmask=linear:3,guidance=0.7,eos=last",
        "block=full,unmask=ancestral:6,guidance=2",
        "block=8,from=prompt,unmask=factor:2.5,kv=dual,eos=never",
        "block=8,from=prompt,unmask=above:0.2,steps=4,kv=prefix",
        "block=full,unmask=margin:2,order_temperature=0.1,guidance=0.7",
    ];
    let prompt: Vec<u32> = (0..16).collect();
    let requests: Vec<Request> = stages
        .iter()
        .enumerate()
        .map(|(i, stage)| request(&config, &prompt[..3 + 2 * i], 14 + i, &[format!("visible=canvas,{stage},temperature=0.8,top_p=0.95")]))
        .collect();
    let alone: Vec<Output> = requests.iter().map(|r| run(&mut fixture.engine(1, DType::F32), r.clone(), "alone").0).collect();
    let mut engine = fixture.engine(2, DType::F32);
    let free = engine.free_pages();
    let handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("a request")).collect();
    engine.run().expect("a run");
    for ((handle, alone), stage) in handles.iter().zip(&alone).zip(stages) {
        handle.events().for_each(drop);
        let output = handle.take_output().expect("an outcome").expect("a text");
        assert_eq!((&output.canvas, &output.confidence), (&alone.canvas, &alone.confidence), "{stage}");
        let (report, guided) = (&output.stages[0], stage.contains("guidance"));
        // Every denoising forward has its twin without the prompt, and both cost rows.
        assert_eq!(report.forwards.guide, if guided { report.nfe() } else { 0 }, "{stage}");
        if stage.starts_with("block=full") {
            assert_eq!(report.rows, 2 * report.nfe() * output.canvas.len(), "{stage}");
        }
    }
    assert_eq!(engine.free_pages(), free);
}
