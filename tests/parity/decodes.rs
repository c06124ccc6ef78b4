//! Greedy decodes of the dense diffusion families: the published loops, canvas by canvas, and draft-then-refine on each.

use redraft::backend::DType;
use redraft::config::ModelConfig;
use redraft::cpu::Cpu;
use redraft::engine::Engine;
use redraft::request::{Output, Prompt, Request};
use redraft::schedule::Schedule;
use redraft::session::EventKind;
use serde_json::Value;

use crate::fixture::{Fixture, text};

const FAMILIES: [&str; 4] = ["dream", "fast-dllm", "llada", "sdar"];

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

/// The outcome, and the canvas after every reveal.
fn run(engine: &mut Engine<Cpu>, request: Request, label: &str) -> (Output, Vec<Vec<u32>>) {
    let mask_id = engine.config().mask_id.expect("a diffusion model");
    let mut canvas: Vec<u32> = engine.canvas(&request.prompt).expect("a prompt").iter().map(|token| token.unwrap_or(mask_id)).collect();
    let handle = engine.submit(request).unwrap_or_else(|e| panic!("{label}: {e}"));
    engine.run().unwrap_or_else(|e| panic!("{label}: {e}"));
    let mut canvases = Vec::new();
    for event in handle.events() {
        for (position, token) in event.positions.iter().zip(&event.tokens) {
            match event.kind {
                EventKind::Reveal => canvas[*position] = *token,
                EventKind::Remask => canvas[*position] = mask_id,
                EventKind::Commit | EventKind::Done => {}
            }
        }
        if event.kind == EventKind::Reveal {
            canvases.push(canvas.clone());
        }
    }
    let output = handle.take_output().unwrap_or_else(|| panic!("{label}: no output")).unwrap_or_else(|e| panic!("{label}: {e}"));
    (output, canvases)
}

fn prompts(fixture: &Fixture) -> Vec<Value> {
    let file = fixture.json("decode.json");
    file["runs"].as_array().expect("runs").clone()
}

/// With and without reuse of K/V, every canvas of every published loop.
#[test]
fn greedy_decodes_follow_the_published_loops() {
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let runs = prompts(&fixture);
        assert!(runs.len() >= 2, "{name}: runs");
        for recorded in &runs {
            for kv in ["exact", "recompute", "refresh:1"] {
                let label = format!("{name} {} kv={kv}", recorded["name"]);
                let prompt = ids(&recorded["prompt"]);
                let length = recorded["length"].as_u64().expect("a length") as usize;
                let stage = format!("{},temperature=0,kv={kv}", text(recorded, "stage"));
                let mut engine = fixture.engine(1, DType::F32);
                let request = request(&engine.config().clone(), &prompt, length, &[stage]);
                let (output, canvases) = run(&mut engine, request, &label);
                let expected: Vec<Vec<u32>> = recorded["canvases"].as_array().expect("canvases").iter().map(ids).collect();
                for (step, (found, expected)) in canvases.iter().zip(&expected).enumerate() {
                    assert_eq!(found, expected, "{label}: canvas after forward {step}");
                }
                assert_eq!(canvases.len(), expected.len(), "{label}: forwards that reveal");
                assert_eq!(output.stages[0].nfe(), expected.len(), "{label}: NFE");
                assert_eq!(&output.canvas, expected.last().expect("a canvas"), "{label}");
            }
        }
    }
}

/// A semi-autoregressive or block-causal draft, the weakest third by snapshot masked again, a global refine; reuse changes no bit.
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
fn neighbours_change_nothing_under_shifted_logits() {
    for name in ["dream", "fast-dllm"] {
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
