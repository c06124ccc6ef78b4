//! `moe`: rows through the experts that were chosen for them.

use redraft::backend::{Backend, DType, ExpertShape, Router, RouterScore, WeightShape};
use redraft::cpu::oracle;

use crate::{TestBackend, assert_close, assert_same, cpus, each, noise};

const SCORE: RouterScore = RouterScore::Softmax { renormalise: true };

/// Weights of a layer's experts and the rows that go through them, on the host.
struct Layer {
    shape: ExpertShape,
    logits: Vec<f32>,
    x: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    before: Vec<f32>,
}

impl Layer {
    fn new(shape: ExpertShape, rows: usize) -> Layer {
        let ExpertShape { num_experts, hidden_dim: c, expert_dim: f, .. } = shape;
        // Scaled so that values stay near 1 through both products.
        let scaled = |len: usize, seed: u64, k: usize| noise(len, seed).iter().map(|v| v * 2.0 / (k as f32).sqrt()).collect();
        Layer {
            shape,
            logits: noise(rows * num_experts, 1).iter().map(|v| 3.0 * v).collect(),
            x: noise(rows * c, 2),
            up: scaled(num_experts * 2 * f * c, 3, c),
            down: scaled(num_experts * c * f, 4, f),
            before: noise(rows * c, 5),
        }
    }

    /// Rows `[first, first + rows)` on a backend with room for `room` rows.
    fn run<B: TestBackend>(&self, b: &B, first: usize, rows: usize, room: usize) -> Vec<f32> {
        let ExpertShape { num_experts, hidden_dim: c, expert_dim: f, .. } = self.shape;
        let experts = |weights: &[f32], n: usize, k: usize| {
            b.weight(WeightShape::Experts { num: num_experts, n, k }, &|first: usize, dst: &mut [f32]| {
                dst.copy_from_slice(&weights[first * k..][..dst.len()]);
                Ok(())
            })
            .unwrap()
        };
        let (up, down) = (experts(&self.up, 2 * f, c), experts(&self.down, c, f));
        let mut routing = b.routing(room, self.shape).unwrap();
        let logits = b.put(&self.logits[first * num_experts..][..rows * num_experts]);
        b.route(rows, &logits, &Router { score: SCORE, bias: None }, &mut routing).unwrap();
        // Behind the rows: what nobody may read, and what nobody may write.
        let x = b.put(&[&self.x[first * c..][..rows * c], &vec![f32::NAN; c]].concat());
        let mut out = b.put(&[&self.before[first * c..][..rows * c], &vec![7.0; c]].concat());
        b.moe(&mut routing, &x, &up, &down, &mut out).unwrap();
        let mut out = b.read(&out, (rows + 1) * c);
        let behind = out.split_off(rows * c);
        assert!(behind.iter().all(|v| *v == 7.0), "{}: written behind the last row", b.name());
        out
    }

    fn agrees<B: TestBackend>(&self, b: &B) {
        let (shape, dtype) = (self.shape, b.dtype());
        let rows = self.x.len() / shape.hidden_dim;
        let got = self.run(b, 0, rows, rows);
        let choices = oracle::route(shape, &Router { score: SCORE, bias: None }, &self.logits);
        let want = oracle::moe(dtype, shape, &choices, &self.x, &self.up, &self.down, &self.before);
        // f32 sums over C, then over F, of values near 1. In bf16 an inner value that lies between
        // two steps may be rounded to the other one: half a percent of one of F terms, and a few of
        // them.
        let roundings = 2.0 * f64::from(f32::EPSILON) * ((shape.hidden_dim + shape.expert_dim) as f64 + 8.0);
        let flips = if dtype == DType::Bf16 { 4.0 / 256.0 * 4.0 / (shape.expert_dim as f64).sqrt() } else { 0.0 };
        assert_close(&format!("{} {dtype:?} {shape:?} {rows} rows", b.name()), &got, &want, |_| 4.0 * roundings + flips);
    }
}

#[test]
fn agrees_with_the_oracle() {
    each!(b in cpus(1), {
        for (num_experts, top_k, hidden_dim, expert_dim, rows) in [(1, 1, 1, 1, 1), (4, 2, 17, 9, 5), (6, 3, 72, 40, 23), (40, 4, 32, 70, 3), (3, 1, 130, 66, 40)] {
            Layer::new(ExpertShape { num_experts, top_k, hidden_dim, expert_dim }, rows).agrees(b);
        }
    });
}

/// Law 1: alone, among others, and where the others prefer the same expert.
#[test]
fn a_row_does_not_depend_on_who_shares_its_experts() {
    let shape = ExpertShape { num_experts: 5, top_k: 2, hidden_dim: 40, expert_dim: 24 };
    let rows = 70;
    let mut layer = Layer::new(shape, rows);
    // Most rows share one expert: a group of many tiles beside groups of few rows.
    layer.logits.chunks_exact_mut(5).skip(7).for_each(|row| row[3] = 9.0);
    each!(b in cpus(1), {
        let all = layer.run(b, 0, rows, rows);
        for (first, count) in [(0, 1), (3, 1), (69, 1), (5, 2), (0, 9), (20, 33)] {
            let some = layer.run(b, first, count, rows);
            assert_same(&format!("{} {:?}: {count} rows from {first}", b.name(), b.dtype()), &some, &all[first * 40..][..count * 40]);
        }
    });
}

#[test]
fn threads_do_not_show() {
    let layer = Layer::new(ExpertShape { num_experts: 9, top_k: 3, hidden_dim: 200, expert_dim: 140 }, 30);
    for (one, two) in cpus(1).iter().zip(&cpus(2)) {
        assert_same(&one.name(), &layer.run(one, 0, 30, 30), &layer.run(two, 0, 30, 30));
    }
}

#[test]
fn no_rows_are_no_work() {
    let layer = Layer::new(ExpertShape { num_experts: 4, top_k: 2, hidden_dim: 8, expert_dim: 4 }, 3);
    each!(b in cpus(1), {
        assert!(layer.run(b, 0, 0, 3).is_empty(), "{}", b.name());
    });
}
