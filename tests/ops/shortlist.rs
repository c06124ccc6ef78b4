//! `shortlist` against a sort, and `sample` among the ids of a shortlist against
//! `sampling::sample_row` over the listed logits alone.

use redraft::backend::{Backend, Candidates, Epilogue, Inspect};
use redraft::cpu::{Cpu, oracle};
use redraft::sampling::{Draw, SampledToken, TopK, TopKOrder, TopPRule, sample_row};

use crate::sample::{PLAIN, assert_sampled, is_clear, stored};
use crate::{TestBackend, cpus, each, noise};

/// Hidden states and a head whose products are these rows: a one-hot state for each, so that they
/// are exact.
fn exact<B: TestBackend>(b: &B, rows: &[Vec<f32>]) -> (B::Buffer, B::Weight) {
    let (k, vocab) = (rows.len(), rows[0].len());
    let weight: Vec<f32> = (0..vocab * k).map(|i| rows[i % k][i / k]).collect();
    let hidden: Vec<f32> = (0..k * k).map(|i| f32::from(i / k == i % k)).collect();
    (b.put(&hidden), b.pack(&weight, vocab, k))
}

/// Ids of the largest finite logits, ties to the lower id, ascending.
fn largest(row: &[f32], banned: &[u32], n: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY && !banned.contains(id)).collect();
    ids.sort_by(|a, b| (row[*b as usize] + 0.0).total_cmp(&(row[*a as usize] + 0.0)));
    ids.truncate(n);
    ids.sort_unstable();
    ids
}

#[test]
fn lists_hold_the_largest_in_the_order_of_the_ids() {
    each!(b in cpus(2), {
        for vocab in [1, 2, 63, 64, 65, 1000, 5000] {
            // Many ties, and next to none.
            let rows: Vec<Vec<f32>> = [2.0, 30.0, 1e6, 7.0]
                .iter()
                .enumerate()
                .map(|(i, levels)| noise(vocab, 60 + i as u64).iter().map(|v| (v * levels).round() / levels).collect())
                .collect();
            let (hidden, head) = exact(b, &rows);
            for n in [1, 2, 40, 700] {
                for banned in [&[][..], &[0, 3, 64, 999]] {
                    let lists = b.shortlist(rows.len(), &hidden, &head, None, banned, n).unwrap();
                    let want: Vec<Vec<u32>> = rows.iter().map(|row| largest(&stored(b.dtype(), row), banned, n)).collect();
                    assert_eq!(b.shortlist_ids(&lists).unwrap(), want, "{}, V {vocab}, {n} of them", b.name());
                }
            }
        }
        // What can never be drawn is not listed, with one feature, so that nothing multiplies it by
        // zero.
        let mut row = vec![f32::NEG_INFINITY; 300];
        row[299] = -3.0;
        row[7] = -9.0;
        let lists = b.shortlist(1, &b.put(&[1.0]), &b.pack(&row, 300, 1), None, &[], 5).unwrap();
        assert_eq!(b.shortlist_ids(&lists).unwrap(), [[7, 299]], "{}", b.name());
        assert!(b.shortlist_ids(&b.shortlist(0, &b.put(&[1.0]), &b.pack(&row, 300, 1), None, &[], 5).unwrap()).unwrap().is_empty());
    });
}

/// Every kind of draw, among lists of different lengths that rows share and leave out.
#[test]
fn sampled_tokens_equal_the_reference_over_a_shortlist() {
    each!(b in cpus(2), {
        let (mut clear, mut total) = (0, 0);
        for (case, n) in [2, 15, 64, 1000].into_iter().enumerate() {
            let vocab = [40, 40, 3000, 3000][case];
            let spread = |i: usize| noise(vocab, 80 + i as u64).iter().map(|v| v * [3.0, 0.1, 12.0][i % 3]).collect();
            let rows: Vec<Vec<f32>> = (0..24).map(spread).collect();
            let (hidden, head) = exact(b, &rows);
            let bias: Vec<f32> = noise(vocab, 79).iter().map(|v| v.round() * 0.5).collect();
            let lists = b.shortlist(rows.len(), &hidden, &head, Some(&b.put(&bias)), &[2], n).unwrap();
            let ids = b.shortlist_ids(&lists).unwrap();
            // Lists of other rows.
            let which: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 24).collect();
            let kinds = [(1.0, 1.0), (0.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.7, 0.9), (0.0, 0.5)];
            let draw = |i: usize| Draw {
                u: 0.0171 + 0.0413 * i as f64,
                temperature: kinds[i % 6].0,
                top_p: kinds[i % 6].1,
                top_p_rule: [TopPRule::Within, TopPRule::Crossing][i / 6 % 2],
                top_k: (i % 4 == 3).then_some(TopK { k: 1 + i as u32, order: [TopKOrder::Before, TopKOrder::After][i / 4 % 2] }),
                forced: (i % 11 == 10).then(|| ids[which[i] as usize][i % ids[which[i] as usize].len()]),
                truncated_confidence: !i.is_multiple_of(3),
            };
            let draws: Vec<Draw> = (0..24).map(draw).collect();
            let got = b.sample(&hidden, &head, Some(&b.put(&bias)), Candidates::Shortlists { lists: &lists, which: &which }, &draws).unwrap();
            for i in 0..24 {
                let (ids, row) = (&ids[which[i] as usize], stored(b.dtype(), &rows[i]));
                let logits: Vec<f32> = ids.iter().map(|id| row[*id as usize] + bias[*id as usize]).collect();
                let place = |id: u32| ids.binary_search(&id).expect("a listed id") as u32;
                let held = Draw { forced: draws[i].forced.map(place), ..draws[i] };
                total += 1;
                if is_clear(&logits, &[], &held) {
                    clear += 1;
                    let got = SampledToken { token: place(got[i].token), ..got[i] };
                    let what = format!("{} {:?}, {n} of V {vocab}, {held:?}", b.name(), b.dtype());
                    assert_sampled(&what, &got, &sample_row(&logits, &[], &held).unwrap());
                }
            }
        }
        assert!(clear * 10 > total * 8, "{clear} of {total} draws were clear of boundaries");
    });
}

/// Sums over k: within the rounding of f32 sums of those of an oracle in f64, for widths that fill
/// no vector, and the same bits whoever is beside a row.
#[test]
fn products_are_close_and_rows_do_not_see_each_other() {
    each!(b in cpus(3), {
        for (vocab, k) in [(90, 1), (90, 7), (300, 33), (1500, 300)] {
            let (host, weight, bias) = (noise(6 * k, 4), noise(vocab * k, 5), noise(vocab, 6));
            let (hidden, head, bias_there) = (b.put(&host), b.pack(&weight, vocab, k), b.put(&bias));
            let lists = b.shortlist(6, &hidden, &head, Some(&bias_there), &[], 20).unwrap();
            let ids = b.shortlist_ids(&lists).unwrap();
            let which: Vec<u32> = (0..6).collect();
            let draws = vec![Draw { u: 0.3, ..PLAIN }; 6];
            let got = b.sample(&hidden, &head, Some(&bias_there), Candidates::Shortlists { lists: &lists, which: &which }, &draws).unwrap();
            for row in 0..6 {
                let x = &host[row * k..][..k];
                let logits = oracle::linear(b.dtype(), x, &weight, k, Some(&bias), Epilogue::Store, &vec![0.0; vocab]);
                let listed: Vec<f32> = ids[row].iter().map(|id| logits[*id as usize] as f32).collect();
                let least = listed.iter().copied().fold(f32::INFINITY, f32::min);
                let others = (0..vocab as u32).filter(|id| !ids[row].contains(id)).map(|id| logits[id as usize] as f32);
                assert!(others.fold(f32::NEG_INFINITY, f32::max) < least + 1e-4, "{}: V {vocab}, k {k}, row {row}", b.name());
                let place = ids[row].binary_search(&got[row].token).expect("a listed id") as u32;
                let want = sample_row(&listed, &[], &Draw { forced: Some(place), ..PLAIN }).unwrap();
                let off = [(got[row].log_prob, want.log_prob), (got[row].entropy, want.entropy), (got[row].margin, want.margin)];
                assert!(off.iter().all(|(got, want)| (got - want).abs() < 1e-4), "{}: V {vocab}, k {k}, row {row}: {off:?}", b.name());
                let alone = b.put(x);
                assert_eq!(b.shortlist_ids(&b.shortlist(1, &alone, &head, Some(&bias_there), &[], 20).unwrap()).unwrap()[0], ids[row], "{}", b.name());
                let again = b.sample(&alone, &head, Some(&bias_there), Candidates::Shortlists { lists: &lists, which: &[row as u32] }, &draws[..1]).unwrap();
                assert_eq!(again, got[row..row + 1], "{}: V {vocab}, k {k}, row {row}", b.name());
            }
        }
    });
}

#[test]
fn a_row_that_cannot_be_sampled_from_its_shortlist_is_named() {
    each!(b in cpus(1), {
        let rows: Vec<Vec<f32>> = (0..3).map(|i| noise(50, 90 + i)).collect();
        let (hidden, head) = exact(b, &rows);
        let lists = b.shortlist(3, &hidden, &head, None, &[], 8).unwrap();
        let ids = b.shortlist_ids(&lists).unwrap();
        let off = (0..50).find(|id| !ids[1].contains(id)).expect("eight of fifty are listed");
        let forced = |token| Draw { forced: Some(token), ..PLAIN };
        let ask = |draws: &[Draw]| b.sample(&hidden, &head, None, Candidates::Shortlists { lists: &lists, which: &[0, 1, 2] }, draws);
        for bad in [off, 50, u32::MAX] {
            let error = ask(&[PLAIN, forced(bad), PLAIN]).unwrap_err().to_string();
            assert!(["row 1", "shortlist", &bad.to_string()].iter().all(|word| error.contains(word)), "{}: {error}", b.name());
        }
        assert_eq!(ask(&[PLAIN, forced(ids[1][3]), PLAIN]).unwrap()[1].token, ids[1][3]);
        // One feature: a NaN in the head is seen by the rows that list it, and by no others.
        let broken = b.pack(&[0.1, f32::NAN, 0.3, 0.2], 4, 1);
        let one = b.put(&[1.0, 1.0]);
        let lists = |ids: [f32; 4]| b.shortlist(1, &b.put(&[1.0]), &b.pack(&ids, 4, 1), None, &[], 2).unwrap();
        let error = b.sample(&one, &broken, None, Candidates::Shortlists { lists: &lists([9.0, 8.0, 0.0, 0.0]), which: &[0] }, &[PLAIN]).unwrap_err().to_string();
        assert!(error.contains("row 0") && error.contains("token 1") && error.contains("NaN"), "{}: {error}", b.name());
        let fine = b.sample(&one, &broken, None, Candidates::Shortlists { lists: &lists([9.0, 0.0, 8.0, 0.0]), which: &[0, 0] }, &[PLAIN, Draw { u: 0.0, ..PLAIN }]).unwrap();
        assert!([0, 2].contains(&fine[0].token) && fine[1].token == 0, "{}: {fine:?}", b.name());
        let nothing = b.pack(&[f32::NEG_INFINITY; 4], 4, 1);
        let error = b.sample(&one, &nothing, None, Candidates::Shortlists { lists: &lists([9.0, 8.0, 0.0, 0.0]), which: &[0] }, &[PLAIN]).unwrap_err().to_string();
        assert!(error.contains("row 0") && error.contains("finite"), "{}: {error}", b.name());
    });
}

fn longest_list_of<B: Backend>(_: &B) -> usize {
    B::MAX_SHORTLIST
}

#[test]
fn a_list_has_a_longest_length_where_the_machine_needs_one() {
    let cpu = Cpu::new(1, redraft::DType::F32).expect("the CPU is always there");
    assert_eq!(longest_list_of(&cpu), usize::MAX);
    #[cfg(feature = "emulator")]
    for device in crate::devices() {
        assert_eq!(longest_list_of(&device), 1024);
    }
}
