//! `route`: the experts of a row, their weights and their order.

use redraft::backend::{Backend, ExpertChoice, ExpertShape, Router, RouterScore};
use redraft::cpu::oracle;

use crate::{TestBackend, cpus, each, noise};

pub fn shape(num_experts: usize, top_k: usize) -> ExpertShape {
    ExpertShape { num_experts, top_k, hidden_dim: 1, expert_dim: 1 }
}

/// What a backend chooses for all rows of `logits`.
pub fn choices<B: TestBackend>(b: &B, shape: ExpertShape, score: RouterScore, bias: Option<&[f32]>, logits: &[f32]) -> Vec<ExpertChoice> {
    let rows = logits.len() / shape.num_experts;
    let bias = bias.map(|bias| b.put(bias));
    let mut routing = b.routing(rows, shape).unwrap();
    b.route(rows, &b.put(logits), &Router { score, bias: bias.as_ref() }, &mut routing).unwrap();
    b.expert_choices(&routing).unwrap()
}

fn agrees<B: TestBackend>(b: &B, shape: ExpertShape, score: RouterScore, bias: Option<&[f32]>, logits: &[f32]) {
    let what = format!("{} {shape:?} {score:?} bias {}", b.name(), bias.is_some());
    let got = choices(b, shape, score, bias, logits);
    let want = oracle::route(shape, &Router { score, bias }, logits);
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, (expert, weight))) in got.iter().zip(want).enumerate() {
        assert_eq!(got.expert, expert, "{what}: choice {i}");
        // A dozen roundings; the exponential of a large argument errs by the argument's own
        // rounding.
        assert!((f64::from(got.weight) - weight).abs() <= 4e-6 * weight, "{what}: choice {i} weighs {}, expected {weight}", got.weight);
    }
}

const SCORES: [RouterScore; 4] = [
    RouterScore::Softmax { renormalise: false },
    RouterScore::Softmax { renormalise: true },
    RouterScore::Sigmoid { num_groups: 1, top_groups: 1, scale: 2.5 },
    RouterScore::Sigmoid { num_groups: 4, top_groups: 2, scale: 1.0 },
];

#[test]
fn agrees_with_the_oracle() {
    each!(b in cpus(1)[..1], {
        for (num_experts, top_k, rows) in [(8, 1, 3), (8, 4, 5), (64, 8, 9), (72, 5, 2), (128, 8, 33), (256, 8, 6)] {
            let logits: Vec<f32> = noise(rows * num_experts, 1).iter().map(|v| 4.0 * v).collect();
            let bias: Vec<f32> = noise(num_experts, 2).iter().map(|v| 0.3 * v).collect();
            for score in SCORES {
                agrees(b, shape(num_experts, top_k), score, None, &logits);
                if matches!(score, RouterScore::Sigmoid { .. }) {
                    agrees(b, shape(num_experts, top_k), score, Some(&bias), &logits);
                }
            }
        }
        for (num_experts, top_k) in [(1, 1), (3, 3), (40, 40)] {
            for score in &SCORES[..3] {
                agrees(b, shape(num_experts, top_k), *score, None, &noise(2 * num_experts, 3));
            }
        }
    });
}

/// The bias decides which experts are chosen and is not in the weight: by hand.
#[test]
fn the_bias_is_for_the_choice_alone() {
    each!(b in cpus(1)[..1], {
        let score = RouterScore::Sigmoid { num_groups: 1, top_groups: 1, scale: 2.0 };
        // Sigmoids 1/2, 1/2, 3/4, 1/4.
        let three = 3.0f32.ln();
        let got = choices(b, shape(4, 2), score, Some(&[0.0, 0.0, -1.0, 1.0]), &[0.0, 0.0, three, -three]);
        assert_eq!(got.iter().map(|c| c.expert).collect::<Vec<_>>(), [0, 3], "{}", b.name());
        for (got, want) in got.iter().zip([4.0 / 3.0, 2.0 / 3.0]) {
            assert!((got.weight - want).abs() < 1e-6, "{}: {got:?}, expected {want}", b.name());
        }
    });
}

/// Groups count by their two best: one outstanding expert does not save its group. By hand.
#[test]
fn a_group_counts_by_its_two_best() {
    each!(b in cpus(1)[..1], {
        let score = RouterScore::Sigmoid { num_groups: 3, top_groups: 1, scale: 1.0 };
        // The groups: one very good and three bad; two good; two equal to those, later.
        let logits = [9.0, -9.0, -9.0, -9.0, -9.0, 2.0, -9.0, 2.0, 2.0, 2.0, -9.0, -9.0];
        let got = choices(b, shape(12, 2), score, None, &logits);
        assert_eq!(got.iter().map(|c| c.expert).collect::<Vec<_>>(), [5, 7], "{}", b.name());
    });
}

#[test]
fn ties_go_to_the_lower_expert() {
    each!(b in cpus(1)[..1], {
        for (num_experts, top_k) in [(8, 3), (40, 3), (128, 8)] {
            let mut logits = vec![0.5; num_experts];
            // Not the first by place, but the first by size.
            logits[num_experts - 1] = 0.75;
            let mut want: Vec<u32> = (0..top_k as u32 - 1).collect();
            want.push(num_experts as u32 - 1);
            for score in &SCORES[..3] {
                let got = choices(b, shape(num_experts, top_k), *score, None, &logits);
                assert_eq!(got.iter().map(|c| c.expert).collect::<Vec<_>>(), want, "{} {score:?}", b.name());
            }
        }
    });
}

/// Numbers of any size give weights that are numbers, and a NaN neither hangs nor leaves the
/// experts there are.
#[test]
fn hostile_logits_choose_experts_that_exist() {
    each!(b in cpus(1)[..1], {
        let (huge, nan) = (f32::MAX, f32::NAN);
        let rows = [[huge, -huge, 0.0, 88.0, -104.0, 1e30, 3.0, huge], [nan; 8], [1.0, nan, 2.0, nan, 3.0, nan, 4.0, nan]];
        for score in SCORES {
            let got = choices(b, shape(8, 4), score, None, rows.as_flattened());
            for (row, got) in got.chunks_exact(4).enumerate() {
                let experts: Vec<u32> = got.iter().map(|c| c.expert).collect();
                assert!(experts.is_sorted() && experts[3] < 8, "{} {score:?}: {experts:?}", b.name());
                assert!((1..4).all(|i| experts[i - 1] < experts[i]), "{} {score:?}: {experts:?}", b.name());
                assert!(row > 0 || got.iter().all(|c| c.weight.is_finite()), "{} {score:?}: {got:?}", b.name());
                assert!(row != 1 || got.iter().all(|c| c.weight.is_nan()), "{} {score:?}: {got:?}", b.name());
            }
            if !matches!(score, RouterScore::Sigmoid { num_groups: 4, .. }) {
                assert_eq!(got[8..].iter().map(|c| c.expert).collect::<Vec<_>>(), [0, 2, 4, 6], "{} {score:?}", b.name());
            }
        }
    });
}

#[test]
fn impossible_routers_are_refused_in_words() {
    let softmax = RouterScore::Softmax { renormalise: true };
    let groups = |num_groups, top_groups| RouterScore::Sigmoid { num_groups, top_groups, scale: 1.0 };
    for (num_experts, top_k, score, words) in [
        (0, 1, softmax, "0 experts: expected 1 to 1024"),
        (1025, 1, softmax, "1025 experts"),
        (8, 9, softmax, "9 experts for each row: expected 1 to 8"),
        (8, 0, softmax, "0 experts for each row"),
        (8, 2, groups(3, 1), "3 groups: expected 1 to 32 of equal size"),
        (8, 2, groups(8, 4), "8 groups of one expert"),
        (8, 2, groups(4, 5), "5 groups kept: expected 1 to 4"),
        (8, 2, groups(4, 0), "0 groups kept"),
        (8, 5, groups(4, 2), "5 experts for each row: expected 1 to 4"),
    ] {
        let found = shape(num_experts, top_k).check(score).unwrap_err();
        assert!(found.starts_with(words), "{found}");
    }
    assert!(shape(256, 8).check(groups(8, 4)).is_ok());
}
