//! `sample` against `sampling::sample_row`. The head is an identity, so hidden rows are the logits.

use redraft::backend::{Backend, Candidates, DType, Epilogue};
use redraft::cpu::{Cpu, oracle};
use redraft::error::Error;
use redraft::sampling::{Draw, SampledToken, TopK, TopKOrder, TopPRule, sample_row};

use crate::{TestBackend, cpus, each, noise};

pub const PLAIN: Draw =
    Draw { u: 0.5, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, top_k: None, forced: None, truncated_confidence: false };

/// Runs rows of V logits through a head of 16 features whose products reproduce them: logits come
/// from the bias, rows from a one-hot hidden state. Each row then has its own weight column, exact
/// in f32; bf16 rounds the logits, which both sides see.
fn sample<B: TestBackend>(b: &B, rows: &[Vec<f32>], banned: &[u32], draws: &[Draw]) -> Result<Vec<SampledToken>, Error> {
    let (k, vocab) = (rows.len(), rows[0].len());
    let mut weight = vec![0.0; vocab * k];
    for (feature, row) in rows.iter().enumerate() {
        for (id, &logit) in row.iter().enumerate() {
            weight[id * k + feature] = logit;
        }
    }
    let mut hidden = vec![0.0; k * k];
    (0..k).for_each(|i| hidden[i * k + i] = 1.0);
    b.sample(&b.put(&hidden), &b.pack(&weight, vocab, k), None, Candidates::AllBut(banned), draws)
}

/// The logits as the backend sees them.
pub fn stored(dtype: DType, row: &[f32]) -> Vec<f32> {
    row.iter().map(|&v| oracle::stored(dtype, v)).collect()
}

/// Whether the token of `draw`, and what it shares the nucleus with, stay the same when u and p
/// move by more than f32 sums err.
pub fn is_clear(row: &[f32], banned: &[u32], draw: &Draw) -> bool {
    let sampled = |du: f64, dp: f32| {
        let moved = Draw { u: (draw.u + du).clamp(0.0, 1.0 - 1e-9), top_p: if draw.top_p < 1.0 { draw.top_p + dp } else { 1.0 }, ..*draw };
        sample_row(row, banned, &moved).unwrap()
    };
    let at = sampled(0.0, 0.0);
    let same = |moved: SampledToken| moved.token == at.token && moved.confidence == at.confidence;
    [(1e-5, 0.0), (-1e-5, 0.0), (0.0, 1e-5), (0.0, -1e-5), (1e-5, 1e-5), (-1e-5, -1e-5)].iter().all(|&(du, dp)| same(sampled(du, dp)))
}

#[track_caller]
pub fn assert_sampled(what: &str, got: &SampledToken, want: &SampledToken) {
    assert_eq!(got.token, want.token, "{what}: {got:?}, expected {want:?}");
    let close = |a: f32, b: f32, tolerance: f32| (a - b).abs() <= tolerance || a == b;
    // f32 exponentials with f64 sums: 1e-6 relative; entropy sums terms of up to ln V.
    assert!(close(got.confidence, want.confidence, 2e-6 * (1e-3 + want.confidence)), "{what}: {got:?}, expected {want:?}");
    assert!(close(got.log_prob, want.log_prob, 2e-6 * (1.0 + want.log_prob.abs())), "{what}: {got:?}, expected {want:?}");
    assert!(close(got.margin, want.margin, 2e-6), "{what}: {got:?}, expected {want:?}");
    assert!(close(got.entropy, want.entropy, 2e-5), "{what}: {got:?}, expected {want:?}");
}

#[test]
fn agrees_with_the_law_over_many_draws() {
    each!(b in cpus(2), {
        let (mut clear, mut total) = (0, 0);
        for vocab in [1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 5000] {
            // Spreads from nearly uniform to nearly certain.
            let rows: Vec<Vec<f32>> =
                (0..12).map(|i| noise(vocab, 100 + i).iter().map(|v| v * [0.1, 3.0, 12.0][i as usize % 3]).collect()).collect();
            for (variant, &(temperature, top_p, top_p_rule)) in [
                (1.0, 1.0, TopPRule::Within),
                (0.0, 1.0, TopPRule::Within),
                (0.7, 1.0, TopPRule::Within),
                (1.6, 0.9, TopPRule::Crossing),
                (1.0, 0.9, TopPRule::Within),
                (0.5, 0.3, TopPRule::Crossing),
                (1.0, 0.999, TopPRule::Within),
                (1.0, 1e-6, TopPRule::Within),
            ]
            .iter()
            .enumerate()
            {
                let uniforms = noise(12, variant as u64 + 7);
                let draw = |i: usize| Draw {
                    u: f64::from(uniforms[i]) / 2.0 + 0.5,
                    temperature,
                    top_p,
                    top_p_rule,
                    truncated_confidence: i.is_multiple_of(2),
                    ..PLAIN
                };
                let draws: Vec<Draw> = (0..12).map(draw).collect();
                let banned: &[u32] = if vocab > 2 { &[1, vocab as u32 - 1] } else { &[] };
                let got = sample(b, &rows, banned, &draws).unwrap();
                for i in 0..12 {
                    total += 1;
                    let row = stored(b.dtype(), &rows[i]);
                    let mut draw = draws[i];
                    if !is_clear(&row, banned, &draw) {
                        // Compared in everything that does not depend on the boundary.
                        draw.forced = Some(got[i].token);
                        draw.truncated_confidence = false;
                        if draws[i].truncated_confidence {
                            continue;
                        }
                    } else {
                        clear += 1;
                    }
                    let want = sample_row(&row, banned, &draw).unwrap();
                    assert_sampled(&format!("{} {:?} V {vocab} variant {variant} row {i}", b.name(), b.dtype()), &got[i], &want);
                }
            }
        }
        assert!(clear * 10 > total * 8, "{clear} of {total} draws were clear of boundaries");
    });
}

#[test]
fn draws_walk_the_whole_distribution() {
    // A thousand evenly spaced u over V = 5000: tokens ascend and every one equals the reference.
    each!(b in cpus(2), {
        if b.dtype() != DType::F32 {
            continue;
        }
        let row = noise(5000, 11);
        let draws: Vec<Draw> = (0..1000).map(|i| Draw { u: (f64::from(i) + 0.5) / 1000.0, ..PLAIN }).collect();
        let rows = vec![row.clone(); 1];
        for draws in draws.chunks(100) {
            let hidden = b.put(&vec![1.0; draws.len()]);
            let got = b.sample(&hidden, &b.pack(&rows[0], 5000, 1), None, Candidates::AllBut(&[]), draws).unwrap();
            assert!(got.is_sorted_by_key(|d| d.token));
            for (draw, got) in draws.iter().zip(&got).filter(|(draw, _)| is_clear(&row, &[], draw)) {
                assert_sampled(&b.name(), got, &sample_row(&row, &[], draw).unwrap());
            }
        }
    });
}

#[test]
fn ties_go_to_the_lower_id() {
    each!(b in cpus(1), {
        let mut row = vec![0.0; 5000];
        for id in [2047, 2048, 2500, 4999] {
            row[id] = 5.0;
        }
        let greedy = Draw { temperature: 0.0, ..PLAIN };
        // Four equal tokens of about 0.027 each: p = 0.06 keeps two within, three crossing.
        let nucleus = |u, top_p_rule| Draw { u, top_p: 0.06, top_p_rule, truncated_confidence: true, ..PLAIN };
        let draws = [greedy, nucleus(0.99, TopPRule::Within), nucleus(0.99, TopPRule::Crossing), nucleus(0.0, TopPRule::Crossing)];
        let rows = vec![row; 4];
        let got = sample(b, &rows, &[], &draws).unwrap();
        assert_eq!(got.iter().map(|d| d.token).collect::<Vec<_>>(), [2047, 2048, 2500, 2047], "{}", b.name());
        assert_eq!(got[0].margin, 0.0);
        assert_eq!((got[0].confidence > 0.02, got[1].confidence, got[2].confidence), (true, 0.5, 1.0 / 3.0));
        for (got, draw) in got.iter().zip(&draws) {
            assert_sampled(&b.name(), got, &sample_row(&rows[0], &[], draw).unwrap());
        }
    });
}

/// With and without a nucleus on either side of it, over few tiles and more than k of them, tied
/// and not.
#[test]
fn the_most_probable_tokens() {
    let vocab = 4500;
    let levels: Vec<f32> = noise(vocab, 51).iter().map(|v| (v * 40.0).round() * 0.25).collect();
    let (mut clear, mut total) = (0, 0);
    each!(b in cpus(2), {
        for (i, k) in [1, 3, 30, 4499, u32::MAX].into_iter().enumerate() {
            let mut draws = Vec::new();
            for (j, (temperature, top_p)) in [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.6, 0.97), (0.0, 1.0), (0.0, 0.5)].into_iter().enumerate() {
                for (n, order) in [TopKOrder::Before, TopKOrder::After].into_iter().enumerate() {
                    let top_p_rule = [TopPRule::Within, TopPRule::Crossing][(i + j) % 2];
                    let u = 0.0371 + 0.0731 * (j * 2 + n) as f64;
                    let top_k = Some(TopK { k, order });
                    draws.push(Draw { u, temperature, top_p, top_p_rule, top_k, truncated_confidence: (i + j) % 3 > 0, ..PLAIN });
                }
            }
            for row in [levels.clone(), noise(vocab, 52 + i as u64).iter().map(|v| v * 6.0).collect()] {
                let rows = vec![row; draws.len()];
                let banned = &[3, 77, 4499];
                let got = sample(b, &rows, banned, &draws).unwrap();
                for (draw, got) in draws.iter().zip(&got) {
                    let row = stored(b.dtype(), &rows[0]);
                    total += 1;
                    if is_clear(&row, banned, draw) {
                        clear += 1;
                        assert_sampled(&format!("{} {draw:?}", b.name()), got, &sample_row(&row, banned, draw).unwrap());
                    }
                }
            }
        }
    });
    assert!(clear * 10 > total * 8, "{clear} of {total} draws were clear of boundaries");
}

/// By hand: six tokens, the third as probable as the fourth.
#[test]
fn top_k_keeps_ties_and_has_an_order() {
    let row: Vec<f32> = [0.35f32, 0.05, 0.15, 0.25, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    each!(b in cpus(1), {
        if b.dtype() != DType::F32 {
            continue;
        }
        let draw = |k, order, top_p| Draw { top_k: Some(TopK { k, order }), top_p, top_p_rule: TopPRule::Crossing, truncated_confidence: true, ..PLAIN };
        let cases = [
            // Of the three most probable and the fourth, tied with the third: 0.35, 0.15, 0.25,
            // 0.15 in ascending order of ids.
            (draw(3, TopKOrder::Before, 1.0), 0.99, 4, 0.15 / 0.9),
            (draw(3, TopKOrder::Before, 1.0), 0.45, 2, 0.15 / 0.9),
            (draw(2, TopKOrder::After, 1.0), 0.99, 3, 0.25 / 0.6),
            // Of the two, 0.35 is 0.583 and reaches p = 0.55 alone; of all six it does not.
            (draw(2, TopKOrder::Before, 0.55), 0.99, 0, 1.0),
            (draw(2, TopKOrder::After, 0.55), 0.99, 3, 0.25 / 0.6),
            // A nucleus of three: top-k behind it takes nothing.
            (draw(5, TopKOrder::After, 0.7), 0.99, 3, 0.25 / 0.75),
        ];
        let draws = cases.map(|(draw, u, ..)| Draw { u, ..draw });
        let got = sample(b, &vec![row.clone(); 6], &[], &draws).unwrap();
        for ((got, (.., token, share)), draw) in got.iter().zip(cases).zip(&draws) {
            assert_eq!((got.token, (got.confidence - share).abs() < 1e-6), (token, true), "{} {draw:?}: {got:?}", b.name());
            assert_sampled(&b.name(), got, &sample_row(&row, &[], draw).unwrap());
        }
    });
}

#[test]
fn all_equal_huge_and_infinitely_small_logits() {
    each!(b in cpus(1), {
        let mut one_left = vec![f32::NEG_INFINITY; 3000];
        one_left[2999] = -3.0;
        let mut far = vec![-1e30; 3000];
        far[7] = 1e30;
        let rows = [vec![0.0; 3000], vec![1e30; 3000], vec![-1e30; 3000], one_left, far];
        for draw in [PLAIN, Draw { temperature: 0.0, ..PLAIN }, Draw { top_p: 0.5003, temperature: 0.8, ..PLAIN }] {
            for (row, u) in rows.iter().zip([0.3001, 0.60011, 0.9999, 0.5, 0.5]) {
                // -inf cannot come out of a product with zeros beside it: one row at a time, so
                // nothing multiplies it by 0.
                let hidden = b.put(&[1.0]);
                let draw = Draw { u, ..draw };
                let got = b.sample(&hidden, &b.pack(row, 3000, 1), None, Candidates::AllBut(&[]), &[draw]).unwrap()[0];
                assert_sampled(&format!("{} {draw:?}", b.name()), &got, &sample_row(&stored(b.dtype(), row), &[], &draw).unwrap());
            }
        }
    });
}

#[test]
fn banned_ids_are_never_chosen_and_take_no_mass() {
    each!(b in cpus(1), {
        let mut row = noise(4000, 12);
        row[3] = 50.0;
        row[2100] = f32::NAN;
        let banned = [3, 2100, 9999];
        for u in [0.0, 0.4, 0.999_999_9] {
            let draw = Draw { u, ..PLAIN };
            let got = b.sample(&b.put(&[1.0]), &b.pack(&row, 4000, 1), None, Candidates::AllBut(&banned), &[draw]).unwrap()[0];
            assert!(!banned.contains(&got.token));
            let want = sample_row(&stored(b.dtype(), &row), &banned, &draw).unwrap();
            assert!((got.entropy - want.entropy).abs() < 2e-5);
        }
    });
}

#[test]
fn forced_tokens_are_scored() {
    each!(b in cpus(1), {
        let rows = vec![noise(3000, 13); 3];
        let draws = [0, 1500, 2999].map(|t| Draw { forced: Some(t), truncated_confidence: true, temperature: 0.3, top_p: 0.1, ..PLAIN });
        for (got, draw) in sample(b, &rows, &[5], &draws).unwrap().iter().zip(&draws) {
            assert_sampled(&b.name(), got, &sample_row(&stored(b.dtype(), &rows[0]), &[5], draw).unwrap());
        }
        for bad in [5, 3000, u32::MAX] {
            let error = sample(b, &rows, &[5], &[Draw { forced: Some(bad), ..PLAIN }]).unwrap_err();
            assert!(matches!(&error, Error::Request { what } if what.contains(&bad.to_string()) && what.contains("row 0")), "{error:?}");
        }
    });
}

#[test]
fn logits_that_are_not_finite_are_an_error_that_names_the_row() {
    each!(b in cpus(2), {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 1, 17, 2047, 2048, 2999] {
                for rest in [0.0, f32::NEG_INFINITY] {
                    let mut weight = vec![rest; 3000];
                    weight[at] = bad;
                    let draws = vec![PLAIN; 70];
                    // Only row 66 meets the weight; elsewhere 0 * NaN would spread it, so logits
                    // come in by the bias.
                    let mut hidden = vec![0.0; 70];
                    hidden[66] = 1.0;
                    let one = b.sample(&b.put(&[1.0]), &b.pack(&weight, 3000, 1), None, Candidates::AllBut(&[]), &[PLAIN]);
                    assert!(
                        matches!(&one, Err(Error::Kernel { what }) if what.contains("row 0") && what.contains(&at.to_string())),
                        "{one:?}"
                    );
                    hidden.fill(1.0);
                    hidden[66] = f32::NAN;
                    let many = b.sample(&b.put(&hidden), &b.pack(&vec![1.0; 3000], 3000, 1), None, Candidates::AllBut(&[]), &draws);
                    assert!(matches!(&many, Err(Error::Kernel { what }) if what.contains("row 66")), "{many:?}");
                }
            }
        }
        let nothing = b.sample(&b.put(&[1.0]), &b.pack(&[f32::NEG_INFINITY; 20], 20, 1), None, Candidates::AllBut(&[]), &[PLAIN]);
        assert!(matches!(nothing, Err(Error::Kernel { .. })));
        let banned = b.sample(&b.put(&[1.0]), &b.pack(&[1.0, 2.0], 2, 1), None, Candidates::AllBut(&[0, 1]), &[PLAIN]);
        assert!(matches!(banned, Err(Error::Kernel { .. })));
    });
}

#[test]
fn a_sampled_token_does_not_depend_on_its_neighbours_or_on_threads() {
    let (vocab, k, rows) = (3001, 40, 130);
    let (weight, hidden, bias) = (noise(vocab * k, 14), noise(rows * k, 15), noise(vocab, 16));
    let draws: Vec<Draw> = noise(rows, 17)
        .iter()
        .enumerate()
        .map(|(i, &u)| Draw { u: f64::from(u) / 2.0 + 0.5, top_p: [1.0, 0.9][i % 2], temperature: [1.0, 0.8, 0.0][i % 3], ..PLAIN })
        .collect();
    for (one, two) in cpus(1).iter().zip(&cpus(2)) {
        let run = |b: &Cpu, rows: std::ops::Range<usize>| {
            let bias = b.put(&bias);
            let hidden = b.put(&hidden[rows.start * k..rows.end * k]);
            b.sample(&hidden, &b.pack(&weight, vocab, k), Some(&bias), Candidates::AllBut(&[7]), &draws[rows]).unwrap()
        };
        let all = run(one, 0..rows);
        assert_eq!(all, run(two, 0..rows));
        for rows in [0..1, 129..130, 60..70, 5..8] {
            assert_eq!(run(one, rows.clone()), all[rows], "{}", one.name());
        }
    }
}

#[test]
fn the_head_is_the_product_of_linear() {
    let (vocab, k) = (200, 30);
    each!(b in cpus(2), {
        let (weight, hidden, bias) = (noise(vocab * k, 18), noise(3 * k, 19), noise(vocab, 20));
        let (packed, hidden, bias) = (b.pack(&weight, vocab, k), b.put(&hidden), b.put(&bias));
        let mut logits = b.zeros(3 * vocab);
        b.linear(3, &hidden, &packed, Some(&bias), Epilogue::Store, &mut logits).unwrap();
        let logits = b.read(&logits, 3 * vocab);
        let greedy = Draw { temperature: 0.0, ..PLAIN };
        for (row, got) in logits.chunks(vocab).zip(b.sample(&hidden, &packed, Some(&bias), Candidates::AllBut(&[]), &[greedy; 3]).unwrap()) {
            assert_sampled(&b.name(), &got, &sample_row(row, &[], &greedy).unwrap());
        }
    });
}

#[test]
fn the_edge_of_a_nucleus_among_ties_and_clusters() {
    let vocab = 4000;
    // A few values many times over; two clusters far apart; one cluster of neighbouring floats.
    let levels: Vec<f32> = noise(vocab, 21).iter().map(|v| (v * 4.0).round() * 0.5 + 0.0).collect();
    let clusters: Vec<f32> = noise(vocab, 22).iter().map(|v| if *v > 0.9 { 5.0 + v * 1e-3 } else { -5.0 + v * 1e-3 }).collect();
    let neighbours: Vec<f32> = (0..vocab).map(|i| f32::from_bits(3.0f32.to_bits() + (i * 37 % vocab) as u32)).collect();
    each!(b in cpus(2), {
        if b.dtype() != DType::F32 {
            continue;
        }
        for row in [&levels, &clusters, &neighbours] {
            let packed = b.pack(row, vocab, 1);
            let mut clear = 0;
            for (i, top_p) in [0.013, 0.1234, 0.37, 0.5019, 0.71, 0.9003, 0.98765].into_iter().enumerate() {
                for top_p_rule in [TopPRule::Within, TopPRule::Crossing] {
                    for temperature in [0.5, 1.0, 2.0] {
                        let u = 0.137 * (i + 1) as f64;
                        let draw = Draw { u, temperature, top_p, top_p_rule, truncated_confidence: true, ..PLAIN };
                        let got = b.sample(&b.put(&[1.0]), &packed, None, Candidates::AllBut(&[]), &[draw]).unwrap()[0];
                        if is_clear(row, &[], &draw) {
                            clear += 1;
                            assert_sampled(&format!("{} {draw:?}", b.name()), &got, &sample_row(row, &[], &draw).unwrap());
                        }
                    }
                }
            }
            assert!(clear > 20, "{clear} of 42");
        }
    });
}
