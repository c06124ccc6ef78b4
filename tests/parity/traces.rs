//! Whole draft-then-refine runs of the reference sampler over the official networks, replayed draw
//! by draw.

use std::sync::Arc;

use redraft::backend::DType;
use redraft::cpu::Cpu;
use redraft::engine::Engine;
use redraft::request::{Output, Prompt, Request, SubmittedRequest};
use redraft::rng::Uniforms;
use redraft::schedule::{Defaults, Schedule};
use redraft::sequence::{DrawSource, Event, EventKind, Finish};
use serde_json::Value;

use crate::fixture::{Fixture, block_len, text};

/// Largest difference of a confidence: p (1 - p) bounds how fast a probability follows a difference
/// of two logits, so it moves by at most half of what a logit moves, and logits of size 10 agree
/// within 2e-4 at the bound of `golden.rs`.
const CONFIDENCE: f64 = 1e-4;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn positions(value: &Value) -> Vec<usize> {
    ids(value).into_iter().map(|p| p as usize).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

fn stages(trace: &Value) -> &[Value] {
    trace["stages"].as_array().expect("stages")
}

fn steps(stage: &Value) -> &[Value] {
    stage["steps"].as_array().expect("steps")
}

fn canvas(trace: &Value) -> Vec<Option<u32>> {
    let mut canvas = vec![None; number(&trace["length"]) as usize];
    for fixed in trace["fixed"].as_array().expect("fixed") {
        let pair = ids(fixed);
        canvas[pair[0] as usize] = Some(pair[1]);
    }
    canvas
}

/// How a trace is run: K/V policies of draft and refine, and whether blocks are committed in
/// forwards of their own.
#[derive(Clone, Copy, Debug)]
struct Variant {
    draft: &'static str,
    refine: &'static str,
    separate_commit: bool,
}

fn schedule(trace: &Value, variant: Variant) -> Schedule {
    let specs: Vec<_> = stages(trace)
        .iter()
        .enumerate()
        .map(|(k, stage)| {
            let block = block_len(&stage["block_len"]).map_or("full".into(), |b| b.to_string());
            let remask = match &stage["remask"] {
                Value::Null => String::new(),
                remask => format!(",remask={},by={}", remask["ratio"], text(remask, "by")),
            };
            let spec = format!(
                "block={block},visible=block,unmask=uniform:1,temperature={},top_p={},top_p_rule={},kv={}{remask}",
                trace["temperature"],
                trace["top_p"],
                text(trace, "top_p_rule"),
                if k == 0 { variant.draft } else { variant.refine },
            );
            spec.parse().unwrap_or_else(|e| panic!("{spec}: {e}"))
        })
        .collect();
    Schedule::resolve(&specs, &Defaults::default()).expect("a schedule")
}

/// The recorded draws: the order uniform is 0 for the recorded position and 1 for all others, so
/// `uniform:1` takes that one.
fn draws(trace: &Value) -> DrawSource {
    let recorded: Vec<Vec<(usize, f64)>> = stages(trace)
        .iter()
        .map(|stage| steps(stage).iter().map(|s| (number(&s["position"]) as usize, number(&s["u_token"]))).collect())
        .collect();
    Arc::new(move |key| {
        // Recorded steps count from 0 in each block; the engine's count through the stage, as this
        // list does.
        let (position, token) = recorded[usize::from(key.stage)][key.step as usize];
        Uniforms { token, order: if key.position as usize == position { 0.0 } else { 1.0 } }
    })
}

fn request(trace: &Value, variant: Variant) -> Request {
    let mut request = Request::new(Prompt::Canvas(canvas(trace)), schedule(trace, variant), 0, 0);
    request.stop.ignore_eos = true;
    request.separate_commit = variant.separate_commit;
    request.draws = Some(draws(trace));
    request
}

/// Follows a run event by event and compares it with what was recorded.
struct Follower<'a> {
    label: String,
    trace: &'a Value,
    mask_id: u32,
    canvas: Vec<u32>,
    /// Unmask events seen per stage.
    seen: Vec<usize>,
    remasked: Vec<usize>,
    done: bool,
}

impl<'a> Follower<'a> {
    fn new(label: String, trace: &'a Value, mask_id: u32) -> Self {
        let start: Vec<u32> = canvas(trace).iter().map(|f| f.unwrap_or(mask_id)).collect();
        assert_eq!(start, ids(&stages(trace)[0]["canvas_start"]), "{label}: the canvas at the start");
        Follower { label, trace, mask_id, canvas: start, seen: vec![0; stages(trace).len()], remasked: Vec::new(), done: false }
    }

    fn event(&mut self, event: &Event) {
        let stage = usize::from(event.stage);
        let recorded = &stages(self.trace)[stage];
        match event.kind {
            EventKind::Unmask => {
                let at = self.seen[stage];
                let label = format!("{} stage {stage} step {at}", self.label);
                let step = steps(recorded).get(at).unwrap_or_else(|| panic!("{label}: the trace has no such step"));
                let block = block_len(&recorded["block_len"]).unwrap_or(usize::MAX);
                let masked: Vec<usize> = (0..self.canvas.len())
                    .filter(|p| self.canvas[*p] == self.mask_id && p / block == number(&step["block"]) as usize)
                    .collect();
                // The recorded position is the one that its uniform draws among the masks that the
                // engine has now.
                let drawn = masked[(number(&step["u_position"]) * masked.len() as f64) as usize];
                assert_eq!(drawn, number(&step["position"]) as usize, "{label}: masked {masked:?}");
                assert_eq!(event.block, number(&step["block"]) as usize, "{label}: block");
                assert_eq!(event.step as usize, at, "{label}: step of the event");
                assert_eq!(event.positions, [drawn], "{label}: position");
                assert_eq!(event.tokens, [number(&step["token"]) as u32], "{label}: token at position {drawn}");
                let error = (f64::from(event.confidence[0]) - number(&step["confidence"])).abs();
                assert!(error <= CONFIDENCE, "{label}: confidence {}, recorded {}", event.confidence[0], step["confidence"]);
                self.canvas[drawn] = event.tokens[0];
                assert_eq!(self.canvas, ids(&step["canvas_after"]), "{label}: canvas");
                self.seen[stage] += 1;
            }
            EventKind::Remask => {
                let label = format!("{} stage {stage} remask", self.label);
                assert_eq!(event.positions, positions(&recorded["remask"]["positions"]), "{label}: positions");
                for (position, token) in event.positions.iter().zip(&event.tokens) {
                    assert_eq!(self.canvas[*position], *token, "{label}: the token that position {position} held");
                    self.canvas[*position] = self.mask_id;
                }
                assert_eq!(self.canvas, ids(&recorded["canvas_start"]), "{label}: canvas");
                self.remasked.clone_from(&event.positions);
            }
            EventKind::Commit => {
                assert!(event.positions.iter().all(|p| self.canvas[*p] != self.mask_id), "{}: a committed mask", self.label);
            }
            EventKind::Edit => panic!("{}: an edit", self.label),
            EventKind::Done => self.done = true,
        }
    }

    fn finish(&self, output: &Output, variant: Variant) {
        let (label, trace) = (&self.label, self.trace);
        assert!(self.done, "{label}: no event of the end");
        assert_eq!(output.finish, Finish::Length, "{label}");
        let free: Vec<usize> = (0..self.canvas.len()).filter(|p| canvas(trace)[*p].is_none()).collect();
        let of = |tokens: &Value| -> Vec<u32> { free.iter().map(|p| ids(tokens)[*p]).collect() };
        assert_eq!(output.canvas, ids(&trace["tokens"]), "{label}: final canvas");
        assert_eq!(output.positions, free, "{label}: generated positions");
        assert_eq!(output.tokens, of(&trace["tokens"]), "{label}: final tokens");
        assert_eq!(output.draft, of(&trace["draft"]), "{label}: draft");
        for (i, position) in free.iter().enumerate() {
            let recorded = number(&trace["confidence"][*position]);
            let found = f64::from(output.confidence[i]);
            assert!((found - recorded).abs() <= CONFIDENCE, "{label}: confidence of position {position}: {found}, recorded {recorded}");
            assert_eq!(f64::from(output.revealed_at[i].0), number(&trace["stage_of"][*position]), "{label}: stage of position {position}");
        }
        for (k, (stage, report)) in stages(trace).iter().zip(&output.stages).enumerate() {
            assert_eq!(self.seen[k], steps(stage).len(), "{label} stage {k}: steps");
            assert_eq!(report.nfe() as f64, number(&stage["nfe"]), "{label} stage {k}: NFE");
            let forwards = report.forwards;
            assert_eq!(forwards.prefill + forwards.joint + forwards.score, 0, "{label} stage {k}: {forwards:?}");
            // The official cached sampler stores every block; nobody ever reads the last one's K/V.
            let blocks = block_len(&stage["block_len"]).map_or(1, |b| self.canvas.len().div_ceil(b));
            assert_eq!(forwards.commit, if variant.separate_commit && k == 0 { blocks - 1 } else { 0 }, "{label} stage {k}: commits");
        }
        let refine = &output.stages[1];
        assert_eq!(refine.remasked, self.remasked, "{label}: remasked");
        assert_eq!(refine.changed as f64, number(&trace["changed"]), "{label}: changed");
    }
}

fn outcome(handle: &SubmittedRequest, label: &str) -> Output {
    handle.take_output().unwrap_or_else(|| panic!("{label}: no output")).unwrap_or_else(|e| panic!("{label}: {e}"))
}

/// Runs `traces` together in one engine and follows each.
fn replay(fixture: &Fixture, engine: &mut Engine<Cpu>, traces: &[&Value], variant: Variant) {
    let mut runs: Vec<(Follower, SubmittedRequest)> = traces
        .iter()
        .map(|trace| {
            let label = format!("{} trace {} {variant:?}", fixture.name, trace["seed"]);
            let handle = engine.submit(request(trace, variant)).unwrap_or_else(|e| panic!("{label}: {e}"));
            (Follower::new(label, trace, engine.config().mask_id.expect("a diffusion model")), handle)
        })
        .collect();
    let mut busy = true;
    while busy {
        busy = engine.tick().unwrap_or_else(|e| panic!("{} {variant:?}: {e}", fixture.name));
        for (follower, handle) in &mut runs {
            for event in handle.events() {
                follower.event(&event);
            }
        }
    }
    for (follower, handle) in &runs {
        follower.finish(&outcome(handle, &follower.label), variant);
    }
}

const VARIANTS: [Variant; 6] = [
    Variant { draft: "exact", refine: "exact", separate_commit: false },
    Variant { draft: "recompute", refine: "recompute", separate_commit: false },
    Variant { draft: "exact", refine: "exact", separate_commit: true },
    // Refreshed before every forward: the approximation without its approximation.
    Variant { draft: "refresh:1", refine: "refresh:1", separate_commit: false },
    Variant { draft: "recompute", refine: "exact", separate_commit: false },
    Variant { draft: "exact", refine: "recompute", separate_commit: true },
];

fn replay_all(name: &str, expected: usize) {
    let fixture = Fixture::open(name);
    let file = fixture.json("trace.json");
    let traces: Vec<&Value> = file["traces"].as_array().expect("traces").iter().collect();
    assert_eq!(traces.len(), expected, "{name}: traces");
    for (i, variant) in VARIANTS.into_iter().enumerate() {
        let mut engine = fixture.engine(1 + i % 2, DType::F32);
        let free = engine.free_pages();
        for trace in &traces {
            replay(&fixture, &mut engine, &[trace], variant);
        }
        replay(&fixture, &mut engine, &traces, variant);
        assert_eq!(engine.free_pages(), free, "{name} {variant:?}: pages are back");
    }
}

/// Drafts of block 4 and 16 over block-causal attention, one whose length is not whole blocks, then
/// a global refine.
#[test]
fn block_diffusion_traces_replay_step_by_step() {
    replay_all("bd3lm-adaln", 5);
}

/// Both stages see everything.
#[test]
fn masked_diffusion_traces_replay_step_by_step() {
    replay_all("mdlm", 2);
}
