//! Where a text ends, what infilling leaves alone, and what the sampling parameters mean.

use redraft::engine::Engine;
use redraft::request::{Prompt, Request};
use redraft::sequence::{ENTROPY_WINDOW, unigram_entropy};
use redraft::{Cpu, DType, EngineOptions, EventKind, Finish, Output, Segment};

use crate::support::*;

/// A draft that is made to write `tokens` after one given token.
fn writing(tokens: &[u32], stages: &[&str]) -> Request {
    let mut canvas = vec![None; tokens.len() + 1];
    canvas[0] = Some(1);
    let mut request = Request::new(Prompt::Canvas(canvas), schedule(stages), 0, 0);
    request.forced = std::iter::once(1).chain(tokens.iter().copied()).collect();
    request
}

fn one(engine: &mut Engine<Cpu>, request: Request, label: &str) -> Output {
    together(engine, &[request], label).remove(0)
}

/// The text ends with the first end-of-text token, when the block that holds it is finished, and
/// the rest of the canvas is gone.
#[test]
fn end_of_text_ends_the_draft() {
    let mut engine = engine(&fixture());
    let eos = engine.config().eos_id.expect("an end of text");
    for at in [0usize, 1, 2, 5, 6, 7, 18, 19] {
        let mut tokens: Vec<u32> = (2..22).collect();
        tokens[at] = eos;
        let label = format!("end of text after {at} tokens");
        let output = one(&mut engine, writing(&tokens, &["block=4,unmask=uniform:1"]), &label);
        assert_eq!(output.finish, Finish::EndOfText, "{label}");
        assert_eq!(output.tokens, tokens[..=at], "{label}: it is the last token");
        assert_eq!((output.canvas.len(), output.draft.len(), output.confidence.len()), (at + 2, at + 1, at + 1), "{label}");
        // Only blocks up to its own were denoised.
        let end = ((at + 1) / 4 * 4 + 4).min(21);
        assert_eq!(output.stages[0].nfe(), end - 1, "{label}: NFE");

        let mut whole = writing(&tokens, &["block=4,unmask=uniform:1"]);
        whole.stop.ignore_eos = true;
        let output = one(&mut engine, whole, &label);
        assert_eq!((output.finish, output.tokens), (Finish::Length, tokens), "{label}, ignored");
    }
}

/// Pages beyond an early end go back at once: a request that waits for them starts while the first
/// is still being refined.
#[test]
fn an_early_end_gives_its_pages_back_before_the_refinement() {
    let options = EngineOptions { page_size: 4, kv_pages: Some(11), ..options() };
    let mut engine = engine_with(&fixture(), 1, DType::F32, options);
    let mut tokens: Vec<u32> = (2..42).collect();
    tokens[9] = engine.config().eos_id.expect("an end of text");
    // 41 positions are promised all 11 pages; 11 positions are left and need 3.
    let first = writing(&tokens, &["block=8,unmask=left:8", "block=full,remask=0.5,unmask=uniform:1"]);
    let second = request(&[1], 31, &schedule(&["block=4,unmask=uniform:1"]), 0, 0);
    let handles = [engine.submit(first).expect("served"), engine.submit(second).expect("served")];
    let (mut ticks, mut started, mut ended) = (0, None, None);
    while engine.tick().expect("a tick") {
        ticks += 1;
        ended = ended.or(handles[0].events().any(|e| e.kind == EventKind::Done).then_some(ticks));
        started = started.or(handles[1].events().next().map(|_| ticks));
    }
    let (started, ended) = (started.expect("the second starts"), ended.expect("the first ends"));
    assert!(3 == started && started + 3 < ended, "the second starts at tick {started}, the first ends at {ended}");
    let outputs = finish(&mut engine, &handles, "early end");
    assert_eq!((outputs[0].finish, outputs[0].tokens.len()), (Finish::EndOfText, 10));
    assert_eq!((outputs[0].stages[1].remasked.len(), outputs[0].stages[1].rows), (5, 5 * 11));
    assert_eq!((outputs[1].tokens.len(), engine.free_pages()), (31, 11));
}

/// The fewest tokens whose text holds the stop text are kept.
#[test]
fn stop_texts_end_the_draft() {
    let mut engine = engine_with(&shipped(), 2, DType::F32, options());
    let tokenizer = engine.tokenizer().expect("a tokenizer").clone();
    let tokens = tokenizer.encode("One day a cat saw a dog. They went to the park and played all day.").expect("text");
    for (stops, finish) in [
        (vec!["dog"], Finish::StopText),
        (vec!["zebra", "They went"], Finish::StopText),
        (vec!["played", "saw a"], Finish::StopText),
        (vec!["zebra"], Finish::Length),
    ] {
        let mut request = writing(&tokens, &["block=4,unmask=uniform:1"]);
        request.stop.texts = stops.iter().map(ToString::to_string).collect();
        let output = one(&mut engine, request, &format!("{stops:?}"));
        assert_eq!(output.finish, finish, "{stops:?}");
        let text = tokenizer.decode(&output.tokens);
        let shorter = tokenizer.decode(&output.tokens[..output.tokens.len() - 1]);
        let holds = |text: &str| stops.iter().any(|s| text.contains(s));
        assert_eq!((holds(&text), holds(&shorter)), (finish == Finish::StopText, false), "{stops:?}: {text}");
        assert_eq!(output.tokens, tokens[..output.tokens.len()], "{stops:?}");
    }
    let mut request = writing(&tokens, &["block=4"]);
    request.stop.texts = vec![String::new()];
    assert!(engine.submit(request).err().expect("refused").to_string().contains("empty"));
}

/// [BD3-LM] stops where the last 256 tokens say too little.
#[test]
fn low_entropy_ends_the_draft() {
    assert_eq!(unigram_entropy(&[3; 50]), 0.0);
    assert!((unigram_entropy(&(0..256).collect::<Vec<_>>()) - 256f64.ln()).abs() < 1e-12);
    let mut engine = tiny();
    let dull = vec![7; 400];
    let lively: Vec<u32> = (0..400).map(|i| 2 + i % 300).collect();
    for (tokens, limit, finish, len) in [
        // The first block end beyond the window is position 264: everything before the last 256
        // tokens stays.
        (&dull, Some(4.0), Finish::LowEntropy, 264 - ENTROPY_WINDOW),
        (&dull, None, Finish::Length, 401),
        (&lively, Some(4.0), Finish::Length, 401),
        (&lively, Some(9.0), Finish::LowEntropy, 264 - ENTROPY_WINDOW),
    ] {
        let mut request = writing(tokens, &["block=8,unmask=left:8"]);
        request.stop.entropy = limit;
        let output = one(&mut engine, request, "entropy");
        assert_eq!((output.finish, output.canvas.len()), (finish, len), "limit {limit:?}");
        assert_eq!(output.tokens, tokens[..len - 1], "limit {limit:?}");
    }
}

/// Given tokens stay where they are, before and after the holes; only holes are generated, and no
/// early end drops what follows.
#[test]
fn infilling_leaves_given_tokens_alone() {
    for (name, dir) in [("tiny", fixture()), ("shipped", shipped())] {
        let mut engine = engine(&dir);
        let eos = engine.config().eos_id.expect("an end of text");
        for (i, name) in
            ["draft", "did", "did-fast", "did-lift", "three", "global", "semi-ar"].into_iter().map(|p| format!("{name} {p}")).enumerate()
        {
            let preset = preset(name.split(' ').next_back().expect("a name"));
            let canvas: Vec<Option<u32>> = (0..40).map(|p| (p % 7 == i || p >= 36 || p == 0).then_some(p as u32 + 2)).collect();
            let output = one(&mut engine, Request::new(Prompt::Canvas(canvas.clone()), preset, 9, 0), &name);
            assert_eq!(output.finish, Finish::Length, "{name}");
            let holes: Vec<usize> = (0..40).filter(|p| canvas[*p].is_none()).collect();
            assert_eq!(output.positions, holes, "{name}");
            for (p, (given, found)) in canvas.iter().zip(&output.canvas).enumerate() {
                assert!(given.is_none_or(|given| given == *found), "{name}: position {p}");
            }
            assert_eq!(output.tokens, holes.iter().map(|p| output.canvas[*p]).collect::<Vec<_>>(), "{name}");
            assert!(output.stages.iter().all(|s| s.remasked.iter().all(|p| holes.contains(p))), "{name}");

            // An end-of-text token in a hole before given text is text.
            let mut request = writing(&[eos, 5, 6, 7, 8, 9, 10, 11], &["block=4,unmask=left:1"]);
            request.prompt = Prompt::Canvas(vec![Some(1), None, None, None, None, None, None, None, Some(11)]);
            let output = one(&mut engine, request, &name);
            assert_eq!((output.finish, output.canvas), (Finish::Length, vec![1, eos, 5, 6, 7, 8, 9, 10, 11]), "{name}");
        }
    }
}

/// Text with holes becomes BOS, text and holes in turn; a literal mask in the text is text.
#[test]
fn infilling_of_text() {
    let engine = engine(&shipped());
    let tokenizer = engine.tokenizer().expect("a tokenizer");
    let text = |t: &str| Segment::Text(t.into());
    let canvas = engine.canvas(&Prompt::Infill(vec![text("The <|mask|>"), Segment::Hole(3), text(" end.")])).expect("a canvas");
    let given: Vec<Option<u32>> = tokenizer.encode("The <|mask|>").expect("text").into_iter().map(Some).collect();
    assert_eq!(canvas[0], engine.config().bos_id);
    assert_eq!(canvas[1..=given.len()], given);
    assert_eq!(canvas[given.len() + 1..given.len() + 4], [None; 3]);
    assert!(!canvas.contains(&engine.config().mask_id), "a mask in the text is letters");
    assert_eq!(tokenizer.decode(&canvas[1..=given.len()].iter().flatten().copied().collect::<Vec<_>>()), "The <|mask|>");
}

/// At temperature 0, left to right, nothing is left to chance; elsewhere seeds and samples are.
#[test]
fn temperature_zero_ignores_the_seed() {
    for dir in [fixture(), shipped()] {
        let mut engine = engine(&dir);
        let mut run = |temperature: f32, seed, sample| {
            let stage = format!("block=4,unmask=left:1,temperature={temperature}");
            one(&mut engine, request(&[3], 24, &schedule(&[&stage]), seed, sample), &stage).tokens
        };
        let greedy = run(0.0, 0, 0);
        assert_eq!((run(0.0, 1, 0), run(0.0, 0, 1)), (greedy.clone(), greedy.clone()), "{}", dir.display());
        let warm = run(1.0, 0, 0);
        assert!(warm != greedy && run(1.0, 1, 0) != warm && run(1.0, 0, 1) != warm, "{}", dir.display());
        assert_eq!(run(1.0, 0, 0), warm, "{}", dir.display());
    }
}

/// A nucleus too small for two tokens is greedy by either rule; a larger one is wider by the rule
/// that keeps the token that crosses it.
#[test]
fn nucleus_rules() {
    let mut engine = engine(&fixture());
    let mut run = |stage: &str, seed| {
        let stage = format!("block=4,unmask=left:1,{stage}");
        one(&mut engine, request(&[3], 40, &schedule(&[&stage]), seed, 0), &stage)
    };
    let greedy = run("temperature=0", 0).tokens;
    for rule in ["within", "crossing"] {
        let narrow = run(&format!("top_p=0.000001,top_p_rule={rule}"), 5);
        assert_eq!(narrow.tokens, greedy, "{rule}");
        // Truncated to one token, its probability is 1.
        let truncated = run(&format!("top_p=0.000001,top_p_rule={rule},confidence=truncated"), 5);
        assert!(truncated.confidence.iter().all(|c| *c == 1.0), "{rule}");
        assert!(narrow.confidence.iter().all(|c| *c < 1.0), "{rule}: the snapshot is the raw probability");
    }
    let different =
        (0..8).filter(|seed| run("top_p=0.5,top_p_rule=within", *seed).tokens != run("top_p=0.5,top_p_rule=crossing", *seed).tokens);
    assert!(different.count() >= 6, "the rules differ by a token in almost every row");
    let wide = (0..8).filter(|seed| run("top_p=1,top_p_rule=within", *seed).tokens == run("top_p=1,top_p_rule=crossing", *seed).tokens);
    assert_eq!(wide.count(), 8, "without a nucleus there is no rule");
}

/// Neither MASK nor an id without a token is ever drawn.
#[test]
fn banned_ids_are_never_drawn() {
    let mut engine = engine(&fixture());
    let banned = engine.banned().to_vec();
    assert!(engine.config().mask_id.is_some_and(|id| banned.contains(&id)) && banned.windows(2).all(|w| w[0] < w[1]), "{banned:?}");
    for seed in 0..4 {
        let hot = schedule(&["block=16,unmask=uniform:16,temperature=50,top_p=1"]);
        let output = one(&mut engine, request(&[3], 200, &hot, seed, 0), "hot");
        assert!(output.tokens.iter().all(|t| !banned.contains(t)), "seed {seed}");
        let distinct = output.tokens.iter().collect::<std::collections::BTreeSet<_>>().len();
        assert!(distinct > 60, "seed {seed}: {distinct} of 130 tokens in 200 almost uniform draws");
    }
}
