//! Hidden states, logits and likelihoods against the official networks.

use redraft::backend::DType;
use redraft::cpu::Cpu;
use redraft::cpu::simd::Isa;
use redraft::engine::Engine;
use redraft::scheduler::Budget;
use redraft::{EngineOptions, Error};

use crate::fixture::{self, Fixture, argmax, relative, text, visibility};

/// Bound for f32. The golden values are f32 themselves and within 7e-6 of an f64 evaluation of the
/// same formulas (fixtures/README.md); another f32 order of summation may be as far off on its own
/// side, and half as much again is room. (Portable loops: 2e-6.)
const F32_BOUND: f64 = 2e-5;

/// Standard deviation, relative to a dot product's own scale, that rounding both operands to bf16
/// gives it: each operand's relative error is uniform within half a unit, 2^-9, so its deviation is
/// 2^-9 / sqrt 3, and there are two operands.
const BF16_DEVIATION: f64 = 1.0 / 512.0 * 0.816_496_580_927_726;

/// Bound for bf16 weights, K/V and operands after `layers` layers: each layer rounds seven times
/// (the operands of qkv, output, up and down; keys, values and attention weights), the embedding or
/// the head once more. Independent errors add in squares, a maximum over some thousand values
/// reaches about four deviations, and a norm or scale may enlarge the stream's error by half.
fn bf16_bound(layers: usize) -> f64 {
    4.0 * 1.5 * BF16_DEVIATION * ((7 * layers + 1) as f64).sqrt()
}

/// One line of the table: a fixture's case at a layer, or at the logits.
struct Row {
    fixture: String,
    case: String,
    layer: String,
    error: f64,
    bound: f64,
}

fn print(title: &str, rows: &[Row]) {
    println!("{title}\n{:<22} {:<7} {:<8} {:>10} {:>10}", "fixture", "case", "layer", "worst", "bound");
    for r in rows {
        println!("{:<22} {:<7} {:<8} {:>10.2e} {:>10.2e}", r.fixture, r.case, r.layer, r.error, r.bound);
    }
}

/// Compares every case of a fixture layer by layer and stops at the first difference, which it
/// names.
fn compare(fixture: &Fixture, backend: Cpu, dtype: DType, rows: &mut Vec<Row>) -> (usize, usize) {
    let mut engine = fixture.engine_on(backend);
    let (width, vocab) = (engine.config().hidden_dim, engine.config().vocab_size);
    let (mut equal, mut total) = (0, 0);
    for case in fixture.cases() {
        let name = text(case, "name");
        let tokens = fixture.tokens(text(case, "tokens"));
        assert_eq!(tokens.len() as u64, case["T"].as_u64().expect("T"), "{} {name}: length", fixture.name);
        let (hidden, logits) = fixture::forward(&mut engine, &tokens, visibility(&case["block_len"]));
        let mut check = |layer: String, depth: usize, found: &[f32], golden: &[f32], width: usize| {
            let bound = if dtype == DType::F32 { F32_BOUND } else { bf16_bound(depth) };
            let error = relative(found, golden, width);
            rows.push(Row { fixture: fixture.name.clone(), case: name.into(), layer: layer.clone(), error, bound });
            assert!(error <= bound, "{} {name}: first difference at {layer}: relative error {error:.2e}, bound {bound:.2e}", fixture.name);
        };
        let names = case["hidden"].as_array().expect("hidden");
        assert!(names.is_empty() || names.len() == hidden.len(), "{} {name}: one golden state per layer", fixture.name);
        for (i, golden) in names.iter().enumerate() {
            let (shape, golden) = fixture.floats(golden.as_str().expect("a name"));
            assert_eq!(shape, [tokens.len(), width], "{} {name}: hidden {i}", fixture.name);
            let layer = if i == 0 { "embed".to_string() } else { format!("layer {i}") };
            check(layer, i, &hidden[i], &golden, width);
        }
        let (shape, golden) = fixture.floats(text(case, "logits"));
        assert_eq!(shape, [tokens.len(), vocab], "{} {name}: logits", fixture.name);
        check("logits".into(), hidden.len(), &logits, &golden, vocab);

        let bound = rows.last().expect("just pushed").bound;
        for (t, (found, golden)) in logits.chunks_exact(vocab).zip(golden.chunks_exact(vocab)).enumerate() {
            let (found, best) = (argmax(found), argmax(golden));
            total += 1;
            equal += usize::from(found == best);
            // Two logits, each off by at most the bound, change places only if they were closer
            // than twice that.
            let scale = golden.iter().fold(0.0f64, |m, g| m.max(f64::from(g.abs())));
            let gap = f64::from(golden[best] - golden[found]);
            let slack = if dtype == DType::F32 { 0.0 } else { 2.0 * bound * scale };
            assert!(gap <= slack, "{} {name}: row {t}: argmax {found}, golden {best}, whose logit is {gap:.2e} higher", fixture.name);
        }
    }
    (equal, total)
}

/// Every fixture with every instruction set that this machine runs. Returns rows with the golden
/// argmax, and all rows.
fn all(threads: usize, dtype: DType) -> (usize, usize) {
    let (mut equal, mut total) = (0, 0);
    let sets: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    assert!(sets.contains(&Isa::Portable), "plain loops run everywhere");
    for isa in sets {
        let title = format!("{}, {threads} threads, {}", dtype.name(), isa.name());
        let mut rows = Vec::new();
        for fixture in fixture::all() {
            let backend = Cpu::with_isa(threads, dtype, isa).unwrap_or_else(|e| panic!("{title}: {e}"));
            let (e, t) = compare(&fixture, backend, dtype, &mut rows);
            (equal, total) = (equal + e, total + t);
        }
        print(&title, &rows);
        for fixture in fixture::all() {
            let worst = rows.iter().filter(|r| r.fixture == fixture.name).map(|r| r.error).fold(0.0, f64::max);
            println!("{title}: {:<20} worst relative error {worst:.2e}", fixture.name);
        }
    }
    println!("{}, {threads} threads: argmax equal in {equal} of {total} rows", dtype.name());
    (equal, total)
}

#[test]
fn every_layer_agrees_in_f32_on_one_thread() {
    let (equal, total) = all(1, DType::F32);
    assert_eq!(equal, total);
}

#[test]
fn every_layer_agrees_in_f32_on_two_threads() {
    let (equal, total) = all(2, DType::F32);
    assert_eq!(equal, total);
}

#[test]
fn every_layer_agrees_in_bf16_up_to_its_rounding() {
    let (equal, total) = all(2, DType::Bf16);
    // Rows whose two best logits lie within the rounding of each other may differ; they are few.
    assert!(equal * 100 >= total * 90, "argmax equal in {equal} of {total} rows");
}

/// The same weights in one file and in two, to the last bit.
#[test]
fn shards_are_the_same_model() {
    let (whole, sharded) = (Fixture::open("bd3lm-plain"), Fixture::open("bd3lm-plain-sharded"));
    assert!(sharded.dir.join("model.safetensors.index.json").exists() && !sharded.dir.join("model.safetensors").exists());
    for case in whole.cases() {
        let tokens = whole.tokens(text(case, "tokens"));
        let run = |f: &Fixture| fixture::forward(&mut f.engine(1, DType::F32), &tokens, visibility(&case["block_len"]));
        assert_eq!(run(&whole), run(&sharded), "{}", text(case, "name"));
    }
}

/// Stored as bf16, the weights are exactly the rounded ones: an f32 run of that file and of the
/// rounded values agree, and a bf16 run of the f32 file packs the same weights.
#[test]
fn weights_stored_in_bf16_are_the_rounded_ones() {
    let (whole, rounded) = (Fixture::open("bd3lm-plain"), Fixture::open("bd3lm-plain-bf16"));
    let mut differ = false;
    for case in whole.cases() {
        let tokens = whole.tokens(text(case, "tokens"));
        let embed = |f: &Fixture, dtype| fixture::forward(&mut f.engine(1, dtype), &tokens, visibility(&case["block_len"])).0.remove(0);
        assert_eq!(embed(&whole, DType::Bf16), embed(&rounded, DType::F32), "{}", text(case, "name"));
        differ |= embed(&whole, DType::F32) != embed(&rounded, DType::F32);
    }
    assert!(differ, "rounding changes nothing: the fixture tests nothing");
}

/// Per-token likelihoods of autoregressive checkpoints.
#[test]
fn likelihoods_of_autoregressive_checkpoints_agree() {
    for name in ["bd3lm-ar", "gpt2", "llama", "qwen2", "qwen3", "qwen3-moe"] {
        likelihoods_agree(&Fixture::open(name));
    }
}

fn likelihoods_agree(fixture: &Fixture) {
    let mut engine = fixture.engine(2, DType::F32);
    for case in fixture.cases() {
        let name = format!("{} {}", fixture.name, text(case, "name"));
        let tokens = fixture.tokens(text(case, "tokens"));
        let (_, golden) = fixture.floats(text(case, "nll"));
        let found = engine.causal_nll(&tokens).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(found.len(), tokens.len() - 1, "{name}");
        // A log-likelihood is a difference of logits: it inherits their absolute error, twice.
        let (_, logits) = fixture.floats(text(case, "logits"));
        let scale = logits.iter().fold(0.0f64, |m, l| m.max(f64::from(l.abs())));
        for (i, (found, golden)) in found.iter().zip(&golden).enumerate() {
            let error = (found - f64::from(*golden)).abs();
            assert!(error <= 2.0 * F32_BOUND * scale, "{name}: token {}: nll {found}, golden {golden}", i + 1);
        }
    }
}

/// Sequences that share forwards, wait for pages or are cut into many forwards have the likelihoods
/// of one alone, to the last bit.
#[test]
fn likelihoods_do_not_depend_on_what_shares_a_forward() {
    for (name, dtype) in
        ["bd3lm-ar", "gpt2", "llama", "qwen2", "qwen3"].into_iter().flat_map(|name| [(name, DType::F32), (name, DType::Bf16)])
    {
        let fixture = Fixture::open(name);
        let cases: Vec<Vec<u32>> = fixture.cases().iter().map(|case| fixture.tokens(text(case, "tokens"))).collect();
        let sequences: Vec<&[u32]> = (1..20).map(|len| &cases[len % cases.len()][..len.min(cases[len % cases.len()].len())]).collect();
        let mut one = fixture.engine(1, dtype);
        let alone: Vec<Vec<f64>> =
            sequences.iter().map(|tokens| one.causal_nll(tokens).unwrap_or_else(|e| panic!("{name}: {e}"))).collect();
        for (max_rows, max_sequences, kv_pages) in [(512, 8, 64), (7, 3, 4), (1, 1, 2), (64, 100, 3)] {
            let options = EngineOptions {
                budget: Budget { max_rows, max_sequences },
                kv_pages: Some(kv_pages),
                poison_freed_pages: true,
                ..EngineOptions::default()
            };
            let cpu = Cpu::new(2, dtype).expect("the CPU is always there");
            let mut engine = Engine::load(&fixture.dir, cpu, options).unwrap_or_else(|e| panic!("{name}: {e}"));
            let together = engine.causal_nlls(&sequences).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(together, alone, "{name} {dtype:?}: {max_rows} rows, {max_sequences} sequences, {kv_pages} pages");
            assert_eq!(engine.free_pages(), kv_pages, "{name}: pages are back");
        }
    }
}

#[test]
fn likelihoods_that_cannot_be_had_are_errors() {
    let mut judge = Fixture::open("qwen2").engine(1, DType::F32);
    let vocabulary = judge.causal_nlls(&[&[1, 2], &[1, 67]]).expect_err("an id outside").to_string();
    assert!(vocabulary.contains("67"), "{vocabulary}");
    assert!(judge.causal_nll(&[]).is_err() && judge.causal_nll(&[1; 257]).expect_err("too long").to_string().contains("256"));
    assert_eq!(judge.causal_nlls(&[]).expect("nothing"), Vec::<Vec<f64>>::new());
    assert_eq!(judge.causal_nlls(&[&[1], &[2]]).expect("nothing to predict"), vec![Vec::<f64>::new(); 2]);
    let mut small = Engine::load(
        &Fixture::open("qwen2").dir,
        Cpu::new(1, DType::F32).expect("the CPU is always there"),
        EngineOptions { kv_pages: Some(1), ..EngineOptions::default() },
    )
    .expect("a fixture");
    assert!(matches!(small.causal_nll(&[1; 18]), Err(Error::OutOfPages { needed: 2, capacity: 1 })));
    // A table of positions ends where it ends; rotary positions are stretched.
    let beyond = Fixture::open("gpt2").engine(1, DType::F32).causal_nll(&[1; 33]).expect_err("too long").to_string();
    assert!(beyond.contains("33 positions") && beyond.contains("at most 32 are served"), "{beyond}");
    let other = Fixture::open("mdlm").engine(1, DType::F32).causal_nll(&[1, 2]).expect_err("a diffusion model").to_string();
    assert!(other.contains("not autoregressive"), "{other}");
}
