//! Joint sampling: what it decodes is what its definition says, computed without any cache; and it
//! keeps the invariants of the engine.

use std::path::PathBuf;
use std::sync::Arc;

use redraft::engine::Engine;
use redraft::plan::Visibility;
use redraft::request::Request;
use redraft::rng::Uniforms;
use redraft::schedule::{Bans, Schedule};
use redraft::sequence::DrawSource;
use redraft::{Cpu, DType};

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

/// A joint decode as it is defined.
#[derive(Clone, Copy, Debug)]
struct Rules {
    block: Option<usize>,
    k: usize,
    bans: Bans,
    shortlist: Option<usize>,
    /// Of the draws by [`uniform`]; 0 takes the most probable tokens.
    temperature: f64,
}

impl Rules {
    fn stage(&self) -> String {
        let Rules { block, k, bans, shortlist, temperature } = *self;
        let block = block.map_or("full".into(), |b| b.to_string());
        let bans = if bans == Bans::First { ",bans=first" } else { "" };
        let shortlist = shortlist.map_or(String::new(), |n| format!(",shortlist={n}"));
        format!("block={block},sampler=joint:{k}{bans}{shortlist},temperature={temperature},top_p=1")
    }
}

/// What a decode came to: the canvas, forwards, and passes that drew MASK.
#[derive(Debug, PartialEq)]
struct Defined {
    canvas: Vec<u32>,
    forwards: usize,
    wasted: usize,
}

/// A uniform for each draw. A third of them lie at the end of the vocabulary, where some models
/// have MASK.
fn uniform(step: u32, position: usize) -> f64 {
    let mixed = u64::from(step).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (position as u64 + 1).wrapping_mul(0xD1B5_4A32_D192_ED03);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    if mixed.is_multiple_of(3) { 1.0 - 2e-4 } else { (mixed >> 11) as f64 / (1u64 << 53) as f64 }
}

fn draws() -> DrawSource {
    Arc::new(|key| Uniforms { token: uniform(key.step, key.position as usize), order: 0.5 })
}

/// Of the logits of the allowed ids: the best token, or that of a uniform at a temperature, and the
/// entropy in nats.
fn answer(logits: &[f32], allowed: &[u32], u: f64, temperature: f64) -> (u32, f64) {
    let of = |token: &u32| f64::from(logits[*token as usize]);
    let best = allowed.iter().copied().reduce(|best, now| if of(&now) > of(&best) { now } else { best }).expect("some id is allowed");
    let masses: Vec<f64> = allowed.iter().map(|token| (of(token) - of(&best)).exp()).collect();
    let sum: f64 = masses.iter().sum();
    let entropy = masses.iter().map(|m| m / sum).map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
    if temperature == 0.0 {
        return (best, entropy);
    }
    let masses: Vec<f64> = allowed.iter().map(|token| ((of(token) - of(&best)) / temperature).exp()).collect();
    let sum: f64 = masses.iter().sum();
    let mut cumulative = 0.0;
    let reached = allowed.iter().zip(&masses).find(|(_, mass)| {
        cumulative += *mass;
        cumulative > u * sum
    });
    (*reached.map_or(&allowed[allowed.len() - 1], |(token, _)| token), entropy)
}

/// The definition: block by block, a forward over everything up to the block's end from scratch,
/// then one token after the other at the lowest entropy, the sampler chained from that forward's
/// states over the block each time.
fn defined(engine: &mut Engine<Cpu>, prompt: &[u32], length: usize, rules: &Rules) -> Defined {
    let mask_id = engine.config().mask_id.expect("a diffusion model");
    let (vocab_size, shift, banned) = (engine.config().vocab_size, engine.config().shift, engine.banned().to_vec());
    let everything: Vec<u32> = (0..vocab_size as u32).collect();
    let drawable: Vec<u32> = everything.iter().copied().filter(|id| !banned.contains(id)).collect();
    let len = prompt.len() + length;
    let mut canvas = prompt.to_vec();
    canvas.resize(len, mask_id);
    let visibility = rules.block.map_or(Visibility::Full, Visibility::BlockCausal);
    let (mut forwards, mut wasted) = (0, 0);
    while let Some(first) = canvas.iter().position(|t| *t == mask_id) {
        let window = rules.block.map_or(0..len, |b| first / b * b..(first / b * b + b).min(len));
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
        let listed = |logits: &Vec<f32>| -> Vec<u32> {
            let mut ids = drawable.clone();
            ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            ids.truncate(rules.shortlist.unwrap_or(usize::MAX));
            ids.sort_unstable();
            ids
        };
        let lists: Vec<Vec<u32>> = of.iter().map(listed).collect();
        let num_unmasked = rules.k.min(window.clone().filter(|p| canvas[*p] == mask_id).count());
        for n in 0..num_unmasked {
            let masked: Vec<usize> = window.clone().filter(|p| canvas[*p] == mask_id).collect();
            if n > 0 {
                let logits = engine.joint_logits(&states, window.clone(), visibility).expect("calls").pop().expect("one at least");
                of = logits.chunks_exact(vocab_size).map(<[f32]>::to_vec).collect();
            }
            let answers = masked.iter().map(|p| {
                let allowed = match n {
                    0 => &drawable,
                    _ if rules.bans == Bans::First => &everything,
                    _ => &lists[p - window.start],
                };
                let u = uniform(forwards as u32 | (n as u32) << 20, *p);
                (*p, answer(&of[p - window.start], allowed, u, rules.temperature))
            });
            let (position, (token, _)) = answers.min_by(|a, b| a.1.1.total_cmp(&b.1.1)).expect("one is masked");
            wasted += usize::from(token == mask_id);
            canvas[position] = token;
            states.push(canvas[..window.end].to_vec());
        }
        forwards += 1;
    }
    Defined { canvas, forwards, wasted }
}

/// Runs a request that draws by [`uniform`], or takes the most probable tokens, alone and beside
/// another of other settings.
fn decoded(engine: &mut Engine<Cpu>, prompt: &[u32], length: usize, rules: &Rules, label: &str) -> Defined {
    let ask = |engine: &Engine<Cpu>, rules: &Rules| {
        let mut request = request(prompt, length, &stages(engine, &[&rules.stage()]), 3, 0);
        request.draws = Some(draws());
        request
    };
    let request = ask(engine, rules);
    let found = alone(engine, std::slice::from_ref(&request), label).remove(0);
    let others = [Rules { shortlist: Some(3), bans: Bans::Every, ..*rules }, Rules { shortlist: None, bans: Bans::First, ..*rules }];
    let [first, last] = others.map(|rules| ask(engine, &rules));
    let beside = together(engine, &[first, request, last], label).remove(1);
    same(&[beside], std::slice::from_ref(&found), true, label);
    let report = &found.stages[0];
    // Every forward unmasks once at least, and where it does not its passes drew MASK for.
    let wasted = report.forwards.denoise + report.forwards.joint - length;
    Defined { canvas: found.canvas, forwards: report.forwards.denoise, wasted }
}

const MODELS: [(&str, Option<usize>); 5] =
    [("bd3lm-adaln", Some(4)), ("bd3lm-adaln", Some(6)), ("bd3lm-adaln", None), ("dream", None), ("llada", None)];

fn prompt_of(p: u32) -> Vec<u32> {
    (0..p).map(|i| (5 * i + 3) % 60).collect()
}

#[test]
fn decodes_are_those_of_the_definition() {
    for (name, block) in MODELS {
        for (p, n) in [(1, 17), (6, 22), (8, 12)] {
            for k in [1, 2, 4, 9] {
                let mut engine = with_sampler(name, 1);
                let rules = Rules { block, k, bans: Bans::Every, shortlist: None, temperature: 0.0 };
                let expected = defined(&mut engine, &prompt_of(p), n, &rules);
                let label = format!("{name}, {rules:?}, {p} given, {n} generated");
                assert_eq!(decoded(&mut engine, &prompt_of(p), n, &rules, &label), expected, "{label}");
                assert_eq!(expected.wasted, 0, "{label}");
            }
        }
    }
}

/// Where the model's own rows alone ban MASK, passes may draw it: their position stays masked, and
/// the decode goes on.
#[test]
fn passes_without_bans_may_leave_a_position_masked() {
    let mut wasted = 0;
    for (name, block) in MODELS {
        for k in [2, 4, 9] {
            for temperature in [0.0, 3.0] {
                let mut engine = with_sampler(name, 1);
                let rules = Rules { block, k, bans: Bans::First, shortlist: None, temperature };
                let expected = defined(&mut engine, &prompt_of(5), 19, &rules);
                let label = format!("{name}, {rules:?}");
                assert_eq!(decoded(&mut engine, &prompt_of(5), 19, &rules, &label), expected, "{label}");
                wasted += expected.wasted;
            }
        }
    }
    assert!(wasted > 20, "{wasted} passes drew MASK");
}

/// Every pass of every forward draws MASK, the last id of the vocabulary: a forward then unmasks
/// its own token and no other.
#[test]
fn a_sampler_that_draws_mask_alone_ends_all_the_same() {
    for rule in ["sampler=joint:5", "unmask=linear:3,sampler=joint", "unmask=timestep:4,sampler=joint", "unmask=fixed:2,sampler=joint"] {
        for block in ["full", "6"] {
            let name = if block == "full" { "dream" } else { "bd3lm-adaln" };
            let mut engine = with_sampler(name, 1);
            let (mask_id, vocab_size) = (engine.config().mask_id.expect("a diffusion model"), engine.config().vocab_size);
            assert_eq!(mask_id as usize + 1, vocab_size, "{name}");
            let schedule = stages(&engine, &[&format!("block={block},{rule},bans=first,temperature=50,top_p=1")]);
            let mut request = request(&[1, 2, 3], 15, &schedule, 3, 0);
            request.draws = Some(Arc::new(|_| Uniforms { token: 1.0 - 1e-5, order: 0.5 }));
            let output = alone(&mut engine, &[request], rule).remove(0);
            let forwards = output.stages[0].forwards;
            assert!(output.tokens.iter().all(|token| *token != mask_id), "{rule}: {:?}", output.tokens);
            assert_eq!(forwards.denoise, 15, "{rule}, block {block}: {forwards:?}");
            assert!(forwards.joint >= 5, "{rule}, block {block}: {forwards:?}");
        }
    }
}

/// Passes that choose among the most probable ids of the model's own rows are what their definition
/// says, and among all ids they are what they were.
#[test]
fn shortlists_are_those_of_the_definition() {
    let mut changed = 0;
    for (name, block) in MODELS {
        for k in [2, 4, 9] {
            for temperature in [0.0, 1.0] {
                let mut engine = with_sampler(name, 1);
                let rules = Rules { block, k, bans: Bans::Every, shortlist: None, temperature };
                let whole = decoded(&mut engine, &prompt_of(5), 19, &rules, "all ids");
                for n in [2, 5, 40, engine.config().vocab_size - 1, engine.config().vocab_size, 100_000] {
                    let rules = Rules { shortlist: Some(n), ..rules };
                    let expected = defined(&mut engine, &prompt_of(5), 19, &rules);
                    let label = format!("{name}, {rules:?}");
                    let found = decoded(&mut engine, &prompt_of(5), 19, &rules, &label);
                    assert_eq!(found, expected, "{label}");
                    changed += usize::from(found != whole);
                    assert!(n < engine.config().vocab_size || found == whole, "{label}: all ids are listed");
                }
            }
        }
    }
    assert!(changed > 10, "{changed} decodes changed");
}

/// Bit for bit: a list of everything is no list.
#[test]
fn a_list_of_the_whole_vocabulary_changes_no_bit() {
    for (name, block) in MODELS {
        let mut engine = with_sampler(name, 2);
        let vocab_size = engine.config().vocab_size;
        let block = block.map_or("full".into(), |b| b.to_string());
        let run = |engine: &mut Engine<Cpu>, rest: &str| {
            let schedule = stages(engine, &[&format!("block={block},sampler=joint:4,top_p=0.8{rest}")]);
            alone(engine, &[request(&[1, 2, 3], 22, &schedule, 4, 0)], rest)
        };
        let plain = run(&mut engine, "");
        for rest in [format!(",shortlist={vocab_size}"), ",shortlist=4000000".into(), ",shortlist=all,bans=every".into()] {
            same(&run(&mut engine, &rest), &plain, false, &format!("{name}{rest}"));
        }
        let short = run(&mut engine, ",shortlist=2");
        assert_ne!(short[0].canvas, plain[0].canvas, "{name}");
    }
}

/// What is forced must be on the list; the model's own row knows no list.
#[test]
fn a_forced_token_off_the_list_fails_its_request_alone() {
    let mut engine = with_sampler("bd3lm-adaln", 1);
    let plain = stages(&engine, &["block=4,sampler=joint:4"]);
    let text = alone(&mut engine, &[request(&[1, 2, 3, 4], 16, &plain, 4, 0)], "plain").remove(0).canvas;
    let forced = |engine: &Engine<Cpu>, rest: &str| {
        let mut request = request(&text[..4], 16, &stages(engine, &[&format!("block=4,sampler=joint:4{rest}")]), 4, 0);
        request.forced = text.clone();
        request
    };
    let whole = forced(&engine, "");
    let whole = alone(&mut engine, &[whole], "forced").remove(0);
    assert_eq!(whole.canvas, text);
    let requests = [forced(&engine, ""), forced(&engine, ",shortlist=2"), request(&[1, 2, 3, 4], 16, &plain, 4, 0)];
    let handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("served")).collect();
    engine.run().expect("the engine goes on");
    // The outcome follows the events.
    handles.iter().for_each(|handle| handle.events().for_each(drop));
    let outcomes: Vec<_> = handles.iter().map(|handle| handle.take_output().expect("an outcome")).collect();
    let error = outcomes[1].as_ref().expect_err("two ids of 131 are listed").to_string();
    assert!(error.contains("shortlist") && error.contains("token"), "{error}");
    for i in [0, 2] {
        assert_eq!(outcomes[i].as_ref().expect("the others go on").canvas, text);
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
        // A joint stage behind one of the same attention that had no sampler, and the other way
        // round.
        vec![format!("block=4,unmask=uniform:1,kv={kv}"), format!("block=4,remask=0.6,sampler=joint:3,kv={kv}")],
        vec![format!("block=4,sampler=joint:3,kv={kv}"), format!("block=4,remask=0.6,unmask=uniform:1,kv={kv}")],
        vec![format!("block=4,sampler=joint:4,shortlist=6,kv={kv}")],
        vec![
            format!("block=8,sampler=joint:5,shortlist=6,eos=never,kv={kv}"),
            format!("block=full,remask=0.5,sampler=joint:4,shortlist=20,kv={kv}"),
        ],
        vec![format!("block=full,sampler=joint:6,bans=first,temperature=1.5,kv={kv}")],
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

/// K tokens cost a forward and K - 1 passes; NFE counts the forwards.
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
