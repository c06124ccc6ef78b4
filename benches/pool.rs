//! Fork and join of many short parallel loops, as a draft step of a few rows makes them: the CPU
//! backend's pool beside rayon, which is entered for every loop or once for all loops of a step.
//!
//! A step is a list of loops with a microsecond of one thread's work between them; a part of a loop
//! reads its own piece of memory, as a product of four rows reads its weights. Runners alternate,
//! each round times all of them, and the medians over the rounds and of the ratios within a round
//! are printed.
//!
//! `cargo bench --bench pool`; `THREADS=4`, `ROUNDS=21`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use redraft::cpu::pool::Pool;

/// `parts` parts of `words` words of 8 bytes each.
#[derive(Clone, Copy)]
struct Loop {
    parts: usize,
    words: usize,
}

/// Loops of a layer of width `hidden` whose weights are bf16 in panels of 64 columns: q, k and v;
/// attention; its projection; both products of an MLP four times as wide. Then the head.
fn network(layers: usize, hidden: usize, vocab: usize) -> Vec<Loop> {
    let product = |n: usize, k: usize| Loop { parts: n / 64, words: 64 * k * 2 / 8 };
    let attention = Loop { parts: hidden / 64, words: 2048 };
    let layer = [product(3 * hidden, hidden), attention, product(hidden, hidden), product(4 * hidden, hidden), product(hidden, 4 * hidden)];
    layer.repeat(layers).into_iter().chain([product(vocab, hidden)]).collect()
}

fn pause() {
    let start = Instant::now();
    while start.elapsed() < Duration::from_micros(1) {
        std::hint::spin_loop();
    }
}

type Part<'a> = dyn Fn(usize) + Sync + 'a;

/// One step: every loop in order, its parts by `run(parts, part)`.
fn step(loops: &[Loop], memory: &[u64], run: impl Fn(usize, &Part)) {
    let mut first = 0;
    for Loop { parts, words } in loops {
        let memory = &memory[first..first + parts * words];
        run(*parts, &|part| {
            let sum = memory[part * words..][..*words].iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
            black_box(sum);
        });
        first += parts * words;
        pause();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let number = |name: &str, default: usize| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let threads = number("THREADS", std::thread::available_parallelism().map_or(1, |n| n.get()));
    let rounds = number("ROUNDS", 11);
    let own = Pool::new(threads).expect("threads");
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    println!("{threads} threads, {rounds} rounds, medians in microseconds a step; ratios within a round");
    println!("{:<40} {:>9} {:>17} {:>16} {:>7} {:>7}", "step", "own pool", "rayon, each loop", "rayon, entered", "each/own", "entered/own");
    let empty = |parts| vec![Loop { parts, words: 1 }; 60];
    for (name, loops, steps) in [
        ("60 loops of 2 empty parts", empty(2), 300),
        ("60 loops of 16 empty parts", empty(16), 300),
        ("10 layers of 256, vocabulary 4,096", network(10, 256, 4096), 100),
        ("12 layers of 768, vocabulary 50,304", network(12, 768, 50304), 5),
    ] {
        let words: usize = loops.iter().map(|l| l.parts * l.words).sum();
        let memory: Vec<u64> = (0..words as u64).collect();
        let by_own = || step(&loops, &memory, |parts, part| own.run(parts, part));
        let by_each = || step(&loops, &memory, |parts, part| rayon.install(|| (0..parts).into_par_iter().for_each(part)));
        let entered = || rayon.install(|| step(&loops, &memory, |parts, part| (0..parts).into_par_iter().for_each(part)));
        let timed = |body: &dyn Fn()| {
            body();
            let start = Instant::now();
            (0..steps).for_each(|_| body());
            start.elapsed().as_secs_f64() * 1e6 / f64::from(steps)
        };
        let times: Vec<[f64; 3]> = (0..rounds).map(|_| [timed(&by_own), timed(&by_each), timed(&entered)]).collect();
        let of = |f: &dyn Fn(&[f64; 3]) -> f64| median(times.iter().map(f).collect());
        let [own, each, entered] = [0, 1, 2].map(|i| of(&|t| t[i]));
        let [each_ratio, entered_ratio] = [1, 2].map(|i| of(&|t| t[i] / t[0]));
        println!("{name:<40} {own:>9.1} {each:>17.1} {entered:>16.1} {each_ratio:>7.2} {entered_ratio:>7.2}");
    }
}
