//! Forwards, NFE and rows against closed formulas (docs/schedules.md), written here a second time
//! and independently of the sequence.
//!
//! P positions are given, N generated, L = P + N; blocks of B from position 0; block b has s_b
//! positions, m_b of them masked at first.
//!
//! ```text
//! draft, uniform:1   prefill  floor(P/B) B rows in one forward, if P >= B
//!                    denoise  N forwards, sum m_b s_b rows, and (K - 1) B rows of finished blocks that ride along; K blocks hold a mask
//! full refine        denoise  n = min(S, R) forwards, R = floor(r N); exact: L n rows; refresh:S: L, and the masks before each forward
//!                             but the last
//! block refine       denoise  sum min(S, R_b) forwards; rows of a block's first forward reach back to the last block entered
//! scoring            post-hoc 1 forward of L rows, held-out:G min(G, N) of them
//! ```

use redraft::request::{Prompt, Request};
use redraft::sequence::Forwards;
use redraft::{Output, StageReport};

use crate::support::*;

/// (first, length, masks) of every block with a mask.
fn blocks(len: usize, block: usize, masked: impl Fn(usize) -> bool) -> Vec<(usize, usize, usize)> {
    (0..len.div_ceil(block))
        .map(|b| {
            let range = b * block..((b + 1) * block).min(len);
            (range.start, range.len(), range.filter(|p| masked(*p)).count())
        })
        .filter(|(.., masks)| *masks > 0)
        .collect()
}

fn check(report: &StageReport, forwards: Forwards, rows: usize, label: &str) {
    assert_eq!(report.forwards, forwards, "{label}: forwards");
    assert_eq!(report.nfe(), forwards.denoise, "{label}: NFE");
    assert_eq!(report.rows, rows, "{label}: rows");
}

/// The draft's formula. `n` tokens per forward.
fn draft(p: usize, len: usize, block: usize, n: usize, separate: bool) -> (Forwards, usize) {
    let entered = blocks(len, block, |at| at >= p);
    let prefill = p / block * block;
    let denoise: usize = entered.iter().map(|(.., m)| m.div_ceil(n)).sum();
    let rows: usize = entered.iter().map(|(_, s, m)| m.div_ceil(n) * s).sum();
    let commits = entered.len() - 1;
    let forwards =
        Forwards { prefill: usize::from(prefill > 0), denoise, commit: if separate { commits } else { 0 }, ..Forwards::default() };
    (forwards, prefill + rows + commits * block)
}

/// Masks revealed by forward i of `steps` over `masks`: the remainder first.
fn quota(masks: usize, steps: usize, i: usize) -> usize {
    masks / steps + usize::from(i < masks % steps)
}

/// Rows of `refresh` without a second refresh: all of them, then what is masked or was revealed by
/// the forward before.
fn refresh_rows(len: usize, masks: usize, steps: usize) -> usize {
    let n = steps.min(masks);
    let mut left = masks;
    let mut rows = if n > 0 { len } else { 0 };
    for i in 0..n.saturating_sub(1) {
        rows += left;
        left -= quota(masks, steps, i);
    }
    rows
}

fn one(engine: &mut redraft::engine::Engine<redraft::Cpu>, request: Request, label: &str) -> Output {
    together(engine, &[request], label).remove(0)
}

#[test]
fn drafts_cost_what_the_formula_says() {
    let mut engine = tiny();
    for block in [1, 3, 4, 8, 16] {
        for p in [0usize, 1, 3, 4, 5, 8, 17] {
            for n in [1, 5, 16, 31] {
                for (num_unmasked, separate) in [(1, false), (1, true), (2, false), (3, true)] {
                    let label = format!("block {block}, {p} given, {n} generated, {num_unmasked} a forward, separate {separate}");
                    let schedule = schedule(&[&format!("block={block},unmask=uniform:{num_unmasked}")]);
                    let canvas = (0..p + n).map(|at| (at < p).then_some(at as u32)).collect();
                    let mut request = Request::new(Prompt::Canvas(canvas), schedule, 1, 0);
                    request.stop.ignore_eos = true;
                    request.separate_commit = separate;
                    let output = one(&mut engine, request, &label);
                    let (forwards, rows) = draft(p, p + n, block, num_unmasked, separate);
                    check(&output.stages[0], forwards, rows, &label);
                    assert_eq!((output.prompt_tokens, output.tokens.len()), (p, n), "{label}");
                }
            }
        }
    }
}

#[test]
fn refinement_costs_what_the_formula_says() {
    let mut engine = tiny();
    for (p, n) in [(1, 40), (6, 17)] {
        let len = p + n;
        let prompt: Vec<u32> = (0..p as u32).collect();
        for ratio in [0.0, 0.1, 0.35, 1.0] {
            let masks = (ratio * n as f64).floor() as usize;
            for steps in [1, 4, 12, 64] {
                for (by, score) in [("snapshot", 0), ("random", 0), ("post-hoc", 1), ("held-out:5", 5), ("held-out:99", n)] {
                    for kv in ["exact", "recompute", "refresh:99", "draft"] {
                        if kv == "draft" && by.starts_with("held") {
                            continue;
                        }
                        let label = format!("{p} given, {n} generated, ratio {ratio}, {steps} steps, {by}, {kv}");
                        let refine = format!("block=full,remask={ratio},by={by},unmask=linear:{steps},order=uniform,kv={kv}");
                        let schedule = schedule(&["block=4,unmask=uniform:1", &refine]);
                        let output = one(&mut engine, request(&prompt, n, &schedule, 2, 0), &label);
                        let denoise = steps.min(masks);
                        let rows = match kv {
                            "refresh:99" => refresh_rows(len, masks, steps),
                            // No full forward: the first one computes the masked rows.
                            "draft" => refresh_rows(masks, masks, steps),
                            _ => len * denoise,
                        };
                        check(&output.stages[1], Forwards { denoise, score, ..Forwards::default() }, rows + score * len, &label);
                        assert_eq!(output.stages[1].remasked.len(), masks, "{label}");
                        // The draft writes its last block's K/V for a stage that will not.
                        let (mut forwards, mut rows) = draft(p, len, 4, 1, false);
                        if kv == "draft" {
                            let last = blocks(len, 4, |at| at >= p).last().expect("a block").0;
                            (forwards.commit, rows) = (1, rows + len - last);
                        }
                        check(&output.stages[0], forwards, rows, &format!("{label}: its draft"));
                    }
                }
            }
        }
    }
}

/// `refresh:R` computes everything again every R forwards.
#[test]
fn refresh_recomputes_all_rows_every_so_often() {
    let mut engine = tiny();
    for r in 1..=12 {
        let schedule = schedule(&["block=4,unmask=uniform:1", &format!("block=full,remask=0.5,unmask=uniform:1,kv=refresh:{r}")]);
        let output = one(&mut engine, request(&[1], 24, &schedule, 3, 0), "refresh");
        // Twelve forwards with 12, 11, ... masks; one more row where a token was just revealed and
        // everything was not computed since.
        let rows: usize = (0..12).map(|i| if i % r == 0 { 25 } else { 12 - i + 1 }).sum();
        check(&output.stages[1], Forwards { denoise: 12, ..Forwards::default() }, rows, &format!("refresh:{r}"));
    }
}

/// The table of docs/schedules.md, at length 256 from BOS alone.
#[test]
fn presets_cost_what_the_documentation_says() {
    let mut engine = tiny();
    let docs =
        std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schedules.md")).expect("docs/schedules.md");
    let run = |engine: &mut _, name: &str| one(engine, request(&[510], 256, &preset(name), 0, 0), name);
    let nfe = |denoise| Forwards { denoise, ..Forwards::default() };
    let documented = |row: &str| assert!(docs.contains(row), "docs/schedules.md has no `{row}`");

    assert_eq!(draft(1, 257, 4, 1, false), (nfe(256), 1277));
    let output = run(&mut engine, "draft");
    check(&output.stages[0], nfe(256), 1277, "draft");
    documented("| `draft` | 4 | 0 | 256 | 0 | 3·4 + 63·16 + 1·1 + 64·4 = 1277 |");

    let did = run(&mut engine, "did");
    check(&did.stages[0], nfe(256), 1277, "did, draft");
    check(&did.stages[1], nfe(12), 12 * 257, "did, refine");
    documented("| `did` | full | 0 | 12 | 0 | 12·257 = 3084 |");
    assert_eq!(did.draft, output.tokens, "the draft of did is the draft");

    let fast = run(&mut engine, "did-fast");
    check(&fast.stages[1], nfe(12), 811, "did-fast, refine");
    assert_eq!(refresh_rows(257, 89, 12), 811);
    documented("= 811 |");
    assert_eq!(fast.stages[1].remasked, did.stages[1].remasked, "both remask the same draft");

    let lift = run(&mut engine, "did-lift");
    assert_eq!(4 * 257 + refresh_rows(257, 25, 4), 1340);
    check(&lift.stages[1], Forwards { score: 4, ..nfe(4) }, 1340, "did-lift, refine");
    assert_eq!(lift.stages[1].remasked.len(), 25);
    documented("| `did-lift` | full | 0 | 4 | 0 | 4·257 + 257 + (25+18+12) = 1340 |");
}

/// Everything is one block, or everything is visible.
#[test]
fn global_and_semi_autoregressive_presets_see_everything() {
    let mut engine = tiny();
    let len = 65;
    let global = one(&mut engine, request(&[1], 64, &preset("global"), 0, 0), "global");
    check(&global.stages[0], Forwards { denoise: 64, ..Forwards::default() }, 64 * len, "global");
    let semi = one(&mut engine, request(&[1], 64, &preset("semi-ar"), 0, 0), "semi-ar");
    // Blocks of 32: 31, 32 and 1 masks, at most 32 forwards each.
    check(&semi.stages[0], Forwards { denoise: 31 + 32 + 1, ..Forwards::default() }, 64 * len, "semi-ar");
}

/// `three`: the middle stage enters blocks of 64 that hold a remasked token; its first forward
/// there reaches back to the block entered before.
#[test]
fn the_middle_stage_of_three_costs_what_its_blocks_do() {
    let mut engine = tiny();
    let (p, n) = (1, 200);
    let len = p + n;
    for seed in 0..4 {
        let output = one(&mut engine, request(&[1], n, &preset("three"), seed, 0), "three");
        let middle = &output.stages[1];
        assert_eq!(middle.remasked.len(), 70, "floor(0.35 x 200)");
        let (mut committed, mut rows, mut denoise) = (0, 0, 0);
        for (start, size, masks) in blocks(len, 64, |at| middle.remasked.contains(&at)) {
            let forwards = masks.min(6);
            rows += start + size - committed + (forwards - 1) * size;
            denoise += forwards;
            committed = start;
        }
        check(middle, Forwards { denoise, ..Forwards::default() }, rows, &format!("three, seed {seed}, middle"));
        check(&output.stages[2], Forwards { denoise: 12, ..Forwards::default() }, 12 * len, &format!("three, seed {seed}, last"));
        assert_eq!(output.stages[2].remasked.len(), 40, "floor(0.2 x 200)");
    }
}
