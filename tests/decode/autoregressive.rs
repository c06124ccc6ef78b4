//! Autoregressive checkpoints: blocks of one, decoded by boundary forwards alone.

use std::path::PathBuf;

use redraft::engine::Engine;
use redraft::plan::NO_MASK;
use redraft::request::{Bos, Prompt, Request, Segment};
use redraft::schedule::{Defaults, PRESETS};
use redraft::sequence::EventKind;
use redraft::{Cpu, DType, EngineOptions, Finish, Schedule};

use crate::support::{alone, budget, engine, engine_with, finish, options, preset, request, same, schedule, together};

const NAMES: [&str; 6] = ["bd3lm-ar", "gpt2", "llama", "qwen2", "qwen3", "qwen3-moe"];

fn checkpoint(name: &str) -> PathBuf {
    crate::support::fixture().with_file_name(name)
}

/// Prompts with common beginnings, so that pages are shared, and of different lengths.
fn ragged(stages: &Schedule) -> Vec<Request> {
    let long: Vec<u32> = (0..18).map(|i| 3 + i * 5 % 40).collect();
    let prompts: [&[u32]; 5] = [&long, &[7], &long, &long[..16], &[9, 2, 4]];
    (0..5).map(|i| request(prompts[i], 6 + 2 * i % 9, stages, 3, i as u32)).collect()
}

/// Alone, in batches of any shape, with pages for few, in fixed and in freed pages: the same bits,
/// with K/V and without.
#[test]
fn a_text_depends_on_its_request_alone() {
    let requests = ragged(&preset("ar"));
    let recomputed = ragged(&schedule(&["block=1,kv=recompute"]));
    for (name, dtype) in NAMES.into_iter().flat_map(|name| [(name, DType::F32), (name, DType::Bf16)]) {
        let dir = checkpoint(name);
        let expected = alone(&mut engine_with(&dir, 1, dtype, options()), &requests, name);
        assert!(expected.iter().flat_map(|output| &output.canvas).all(|id| *id < 67), "{name}: ids of the vocabulary");
        same(&together(&mut engine_with(&dir, 2, dtype, options()), &recomputed, name), &expected, true, &format!("{name}: recomputed"));
        for (max_rows, max_sequences, page_size, kv_pages) in [(512, 8, 16, 64), (3, 2, 4, 24), (1, 5, 1, 128)] {
            let options = EngineOptions { budget: budget(max_rows, max_sequences), page_size, kv_pages: Some(kv_pages), ..options() };
            let label = format!("{name} {dtype:?}: {max_rows} rows, {max_sequences} sequences, pages of {page_size}");
            let mut engine = engine_with(&dir, 2, dtype, options);
            same(&together(&mut engine, &requests, &label), &expected, true, &label);
            assert_eq!(engine.free_pages(), kv_pages, "{label}: pages are back");
        }
    }
}

/// A stage that separates commits has none to separate, and every token has a forward of its own.
#[test]
fn every_token_costs_one_forward_of_one_row() {
    let mut engine = engine(&checkpoint("qwen2"));
    let mut asked = request(&[1, 2, 3], 20, &preset("ar"), 0, 0);
    asked.separate_commit = true;
    let handle = engine.submit(asked).expect("a request");
    engine.run().expect("a run");
    let events: Vec<_> = handle.events().filter(|event| event.kind == EventKind::Unmask).collect();
    assert_eq!(events.iter().map(|event| event.positions.clone()).collect::<Vec<_>>(), (3..23).map(|p| vec![p]).collect::<Vec<_>>());
    let output = handle.take_output().expect("an outcome").expect("a text");
    let forwards = output.stages[0].forwards;
    assert_eq!((forwards.prefill, forwards.denoise, forwards.commit, output.stages[0].rows), (1, 20, 0, 23), "{forwards:?}");
}

/// What ends a text ends it here, at that token.
#[test]
fn ends_are_seen_at_once() {
    let mut engine = engine(&checkpoint("qwen3"));
    // Flat enough that ends come up.
    let stages = schedule(&["block=1,temperature=3,top_p=1"]);
    let asked = |seed| request(&[5, 6], 60, &stages, seed, 0);
    let end = engine.config().stop_ids.clone();
    let (seed, free, at) = (0..20)
        .find_map(|seed| {
            let free = alone(&mut engine, &[asked(seed)], "to the end").remove(0);
            let at = free.tokens.iter().position(|token| end.contains(token)).filter(|at| *at > 3)?;
            Some((seed, free, at))
        })
        .expect("an end among many tokens");
    let mut to_the_end = asked(seed);
    to_the_end.stop.ignore_eos = false;
    let ended = alone(&mut engine, &[to_the_end], "an end").remove(0);
    assert_eq!((ended.finish, &ended.tokens[..]), (Finish::EndOfText, &free.tokens[..=at]));
    assert_eq!(ended.stages[0].forwards.denoise, at + 1, "nothing is computed beyond");

    let spelled = engine.tokenizer().expect("a tokenizer").decode(&free.tokens[2..3]);
    let mut to_a_text = asked(seed);
    to_a_text.stop.texts = vec![spelled];
    let stopped = alone(&mut engine, &[to_a_text], "a stop text").remove(0);
    assert_eq!(stopped.finish, Finish::StopText);
    assert!(stopped.tokens.len() <= 3);
}

/// A cancelled text has the tokens that are there, and nothing of what hides the others.
#[test]
fn a_cancelled_text_holds_tokens_alone() {
    for ticks in [0, 1, 5] {
        let mut engine = engine(&checkpoint("llama"));
        let handle = engine.submit(request(&[1, 2, 3], 30, &preset("ar"), 0, 0)).expect("a request");
        for _ in 0..ticks {
            engine.tick().expect("a tick");
        }
        handle.cancel();
        let output = finish(&mut engine, std::slice::from_ref(&handle), "cancelled").remove(0);
        assert_eq!(output.finish, Finish::Cancelled);
        assert!(!output.canvas.contains(&NO_MASK) && !output.tokens.contains(&NO_MASK), "{:?}", output.canvas);
        assert!(output.tokens.len() < 30 && output.canvas.len() == 3 + output.tokens.len(), "{ticks} ticks: {:?}", output.tokens);
    }
}

/// Text without a prompt begins after BOS, or after the end of text where there is no BOS.
#[test]
fn a_text_from_nothing_begins_with_bos() {
    for (name, first) in [("qwen3", 64), ("qwen2", 65), ("gpt2", 65), ("llama", 65)] {
        let engine = engine(&checkpoint(name));
        let text = |text: &str| Prompt::Text { text: text.into(), length: 3 };
        assert_eq!(engine.canvas(&text("")).expect("a canvas"), [Some(first), None, None, None], "{name}");
        assert_ne!(engine.canvas(&text("a")).expect("a canvas")[0], Some(first), "{name}: a prompt stands alone");
        assert_eq!(engine.canvas_after(Bos::Yes, &text("a")).expect("a canvas")[0], Some(first), "{name}");
        let hole = Prompt::Infill(vec![Segment::Hole(2)]);
        assert_eq!(engine.canvas(&hole).expect("a canvas"), [Some(first), None, None], "{name}");
    }
}

/// What such a checkpoint cannot do is refused, and the error says what it can.
#[test]
fn other_schedules_and_holes_are_refused() {
    for name in NAMES {
        let mut engine = engine(&checkpoint(name));
        let mut refused = |asked: Request, words: &[&str]| {
            let error = engine.submit(asked).err().unwrap_or_else(|| panic!("{name}: {words:?} was served")).to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{name}: no {words:?} in: {error}");
        };
        let one = ["autoregressive", "block=1,visible=block", "preset ar"];
        for stages in [
            &["block=4,visible=block"][..],
            &["block=full"],
            &["block=1,visible=canvas"],
            &["block=1,visible=block,sampler=joint:1"],
            &["block=1,visible=block,edit=0.5"],
        ] {
            refused(request(&[1, 2], 4, &schedule(stages), 0, 0), &[&one[..], &["stage 0"]].concat());
        }
        let again = schedule(&["block=1,visible=block", "block=1,visible=block,remask=0.3,by=snapshot"]);
        refused(request(&[1, 2], 4, &again, 0, 0), &[&one[..], &["stage 1"]].concat());
        let canvas = |canvas: &[Option<u32>]| Request::new(Prompt::Canvas(canvas.to_vec()), preset("ar"), 0, 0);
        refused(canvas(&[Some(1), None, Some(3)]), &["position 2", "fills no holes"]);
        refused(canvas(&[None, None]), &["expected a prompt", "BOS"]);
        refused(request(&[], 4, &preset("ar"), 0, 0), &["expected a prompt", "BOS"]);
        refused(request(&[NO_MASK], 4, &preset("ar"), 0, 0), &["outside the vocabulary"]);
        assert!(!engine.is_busy(), "nothing was queued");
    }
}

/// Every preset is served or refused: served is what makes blocks of one of a checkpoint's length.
#[test]
fn presets_of_blocks_of_one_are_served() {
    let mut engine = engine(&checkpoint("llama"));
    let defaults: Defaults = Engine::<Cpu>::defaults(engine.config());
    let served = |name: &&str| {
        let schedule = Schedule::preset(name, &defaults).expect("a preset");
        engine.submit(request(&[1], 4, &schedule, 0, 0)).is_ok()
    };
    let served: Vec<&str> = PRESETS.iter().map(|preset| preset.name).filter(served).collect();
    assert_eq!(served, ["draft", "ar", "sdar", "llada2"]);
}

/// A diffusion model may be decoded so as well: with its own rows, and with shifted ones.
#[test]
fn diffusion_models_follow_the_preset_too() {
    for name in ["bd3lm-adaln", "sdar", "fast-dllm"] {
        let mut engine = engine(&checkpoint(name));
        let output = alone(&mut engine, &[request(&[1, 2, 3], 9, &preset("ar"), 4, 0)], name).remove(0);
        let order: Vec<u32> = output.revealed_at.iter().map(|(_, step)| *step).collect();
        assert_eq!(order, (0..9).collect::<Vec<_>>(), "{name}");
        let slow = alone(&mut engine, &[request(&[1, 2, 3], 9, &schedule(&["block=1,unmask=left:1,kv=recompute"]), 4, 0)], name);
        same(&slow, &[output], true, name);
    }
}

/// Injected tokens are scored as the judge scores them.
#[test]
fn forced_tokens_have_the_judges_likelihoods() {
    let mut engine = engine(&checkpoint("qwen2"));
    let tokens: Vec<u32> = (0..20).map(|i| 3 + i * 7 % 50).collect();
    let expected = engine.causal_nll(&tokens).expect("likelihoods");
    let stages = schedule(&["block=1,visible=block"]);
    let mut asked = request(&tokens[..1], 19, &stages, 0, 0);
    asked.forced = tokens.clone();
    let output = alone(&mut engine, &[asked], "forced").remove(0);
    for (i, (found, expected)) in output.log_prob.iter().zip(&expected).enumerate() {
        // The judge excludes no ids; generation bans the one id without a token.
        assert!(f64::from(-found) <= expected + 1e-5, "token {i}: {found}, judged {expected}");
    }
    assert_eq!(output.tokens, tokens[1..]);
}

/// Two models in one engine, an autoregressive one and a diffusion model, by the names of their
/// fixtures.
fn pair(first: &str, second: &str, threads: usize) -> Engine<Cpu> {
    let mut engine = engine_with(&checkpoint(first), threads, DType::F32, options());
    assert_eq!(engine.add_model(&checkpoint(second), &mut |_, _| {}).expect("the same vocabulary"), 1);
    engine
}

/// A draft by an autoregressive model is that model's text, and what a diffusion model refines are
/// the tokens of which the first was least sure, whichever of the two was loaded first.
#[test]
fn a_diffusion_model_refines_an_autoregressive_draft() {
    for (draws, refines, block) in
        [("qwen2", "dream", "full"), ("qwen3", "sdar", "full"), ("llama", "fast-dllm", "full"), ("qwen2", "sdar", "4")]
    {
        let label = format!("{draws}, then {refines}");
        let stages = |draft: usize, refine: usize| {
            let first = format!("block=1,visible=block,unmask=left:1,weights={draft}");
            schedule(&[&first, &format!("block={block},remask=0.4,by=snapshot,unmask=linear:3,weights={refine}")])
        };
        let only = schedule(&["block=1,visible=block,unmask=left:1"]);
        let requests: Vec<Request> = (0..3).map(|i| request(&[5, 6, 7, 8, 9][..2 + i as usize], 15, &stages(0, 1), 7, i)).collect();
        let expected = alone(&mut pair(draws, refines, 1), &requests, &label);
        let drafts: Vec<Request> = requests.iter().map(|asked| Request { schedule: only.clone(), ..asked.clone() }).collect();
        let drafts = alone(&mut pair(draws, refines, 1), &drafts, &label);
        for (output, draft) in expected.iter().zip(&drafts) {
            assert_eq!(output.draft, draft.tokens, "{label}");
            assert_eq!(output.stages[0].forwards.denoise, 15, "{label}: one forward a token");
            let mut weakest: Vec<usize> = (0..15).collect();
            weakest.sort_by(|&a, &b| draft.confidence[a].total_cmp(&draft.confidence[b]));
            let mut weakest: Vec<usize> = weakest[..6].iter().map(|i| draft.positions[*i]).collect();
            weakest.sort_unstable();
            let mut remasked = output.stages[1].remasked.clone();
            remasked.sort_unstable();
            assert_eq!(remasked, weakest, "{label}");
        }
        assert!(expected.iter().any(|output| output.tokens != output.draft), "{label}: nothing was written anew");

        let mut engine = pair(draws, refines, 2);
        let free = engine.free_pages();
        same(&together(&mut engine, &requests, &label), &expected, true, &label);
        assert_eq!(engine.free_pages(), free, "{label}: pages are back");
        let turned: Vec<Request> = requests.iter().map(|asked| Request { schedule: stages(1, 0), ..asked.clone() }).collect();
        same(&together(&mut pair(refines, draws, 2), &turned, &label), &expected, true, &format!("{label}, loaded the other way round"));
    }
}

/// What the pair cannot do is refused in words: an autoregressive model that refines, holes for one
/// that drafts; holes for a diffusion model are served beside it.
#[test]
fn an_autoregressive_model_of_a_pair_drafts_alone() {
    let mut engine = pair("dream", "qwen2", 1);
    let mut refused = |asked: Request, words: &[&str]| {
        let error = engine.submit(asked).err().unwrap_or_else(|| panic!("{words:?} was served")).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "no {words:?} in: {error}");
    };
    let after = schedule(&["block=full,unmask=linear:3", "block=1,visible=block,remask=0.3,by=snapshot,weights=1"]);
    refused(request(&[1, 2], 4, &after, 0, 0), &["qwen2", "stage 1", "first stage alone"]);
    let first = schedule(&["block=1,visible=block,unmask=left:1,weights=1", "block=full,remask=0.3,unmask=linear:2"]);
    let holes = |stages: &Schedule| Request::new(Prompt::Canvas(vec![Some(1), None, Some(3)]), stages.clone(), 0, 0);
    refused(holes(&first), &["position 2", "fills no holes"]);
    let filled = alone(&mut engine, &[holes(&schedule(&["block=full,unmask=linear:1"]))], "a hole").remove(0);
    assert_eq!((filled.canvas[0], filled.canvas[2]), (1, 3));

    // MASK of the one is no token of the other: neither draws it.
    assert!(engine.banned().contains(&66), "{:?}", engine.banned());
    let error = engine.add_model(&checkpoint("bd3lm-adaln"), &mut |_, _| {}).expect_err("another vocabulary").to_string();
    assert!(error.contains("expected"), "{error}");
}
