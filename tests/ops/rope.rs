//! `rope_append`: norm and rotation in place. What it wrote is seen through `attention`.

use redraft::backend::{Backend, HeadNorm, HeadShape, KvShape, Rope, RopeScaling, Rotation};
use redraft::cpu::oracle;
use redraft::plan::{Plan, Visibility};

use crate::{TestBackend, assert_close, assert_same, cpus, each, noise};

const SHAPES: [HeadShape; 4] = [
    HeadShape { num_heads: 1, num_kv_heads: 1, head_dim: 2 },
    HeadShape { num_heads: 4, num_kv_heads: 2, head_dim: 10 },
    HeadShape { num_heads: 3, num_kv_heads: 3, head_dim: 32 },
    HeadShape { num_heads: 4, num_kv_heads: 1, head_dim: 96 },
];

fn plan(rows: usize) -> Plan {
    let mut plan = Plan::new();
    let rows: Vec<_> = (0..rows).map(|i| (i, 0)).collect();
    let pages: Vec<u32> = (0..rows.len().div_ceil(16) as u32).rev().collect();
    plan.push(&rows, &pages, 16, Visibility::Full, rows.len());
    plan
}

/// The rows afterwards. What is left in the place of the keys is the backend's own business (they
/// are in their slots): where they are not rotated, they count as zeros.
fn rotate<B: TestBackend>(b: &B, plan: &Plan, heads: HeadShape, rotation: &Rotation<[f32]>, qkv: &[f32]) -> Vec<f32> {
    let HeadShape { num_kv_heads, head_dim, .. } = heads;
    let mut kv = b.kv_cache(KvShape { num_layers: 2, num_pages: 80, page_size: 16, num_kv_heads, head_dim }).unwrap();
    let mut buffer = b.put(qkv);
    let weights = rotation.norm.as_ref().map(|norm| (b.put(norm.q), b.put(norm.k), norm.eps));
    let norm = weights.as_ref().map(|(q, k, eps)| HeadNorm { q, k, eps: *eps });
    b.rope_append(&b.batch(plan).unwrap(), heads, &Rotation { rope: rotation.rope, norm }, &mut buffer, 1, &mut kv).unwrap();
    let mut rows = b.read(&buffer, qkv.len());
    if !b.rotates_keys_in_place() {
        forget_keys(heads, &mut rows);
    }
    rows
}

fn forget_keys(heads: HeadShape, rows: &mut [f32]) {
    let keys = heads.q_width()..heads.q_width() + heads.num_kv_heads * heads.head_dim;
    rows.chunks_exact_mut(heads.qkv_width()).for_each(|row| row[keys.clone()].fill(0.0));
}

#[test]
fn rotates_as_the_oracle_does() {
    each!(b in cpus(2), {
        let plain = Rope::plain;
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 100.0 };
        // The rope changes between calls, once by its scaling alone: the table of rotations must
        // follow.
        let ropes = [
            plain(10_000.0),
            plain(500_000.0),
            plain(10_000.0),
            plain(100.0),
            Rope { scaling: RopeScaling::Linear { factor: 2.5 }, ..plain(100.0) },
            Rope { scaling: llama3, ..plain(100.0) },
            // A part of each head, another part of it, none.
            Rope { width: Some(48), ..plain(100.0) },
            Rope { width: Some(10), ..plain(100.0) },
            Rope { width: Some(0), ..plain(100.0) },
        ];
        for (i, rope) in ropes.into_iter().enumerate() {
            let heads = SHAPES[i.min(SHAPES.len() - 1)];
            let plan = plan(1100);
            let weights = [5, 6].map(|seed| noise(heads.head_dim, seed).iter().map(|w| 1.0 + 0.5 * w).collect::<Vec<f32>>());
            let [q, k] = &weights;
            for normed in [false, true] {
            let rotation = Rotation { rope, norm: normed.then(|| HeadNorm { q: &q[..], k: &k[..], eps: 1e-6 }) };
            let qkv = noise(1100 * heads.qkv_width(), 1);
            let mut want = qkv.clone();
            let slots = 80 * 16 * heads.num_kv_heads * heads.head_dim;
            oracle::rope_append(b.dtype(), &plan, heads, &rotation, &mut want, &mut vec![0.0; slots], &mut vec![0.0; slots]);
            if !b.rotates_keys_in_place() {
                forget_keys(heads, &mut want);
            }
            let want: Vec<f64> = want.iter().map(|&v| f64::from(v)).collect();
            // Three roundings of values up to sqrt(2), and half a unit of the oracle's own store. A
            // normed element is up to 1.5 sqrt(D), and its scale has seen a sum of squares, a root
            // and a quotient in f32.
            let tolerance = if normed { 3e-7 * (1.0 + 4.0 * (heads.head_dim as f64).sqrt()) } else { 3e-7 };
            let what = format!("{} {heads:?} {rope:?}, norm {normed}", b.name());
            assert_close(&what, &rotate(b, &plan, heads, &rotation, &qkv), &want, |_| tolerance);
            }
        }
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    each!(b in cpus(2), {
        let heads = SHAPES[2];
        let width = heads.qkv_width();
        let qkv = noise(300 * width, 2);
        let weight = noise(heads.head_dim, 3);
        for norm in [None, Some(HeadNorm { q: &weight[..], k: &weight[..], eps: 1e-6 })] {
            let rotation = Rotation { rope: Rope::plain(10_000.0), norm };
            let all = rotate(b, &plan(300), heads, &rotation, &qkv);
            assert_same(&b.name(), &rotate(b, &plan(7), heads, &rotation, &qkv[..7 * width]), &all[..7 * width]);
        }
    });
}

/// Frequencies by hand: base 10^4, D = 8 turn by 1, 1/10, 1/100 and 1/1000 radians a position.
#[test]
fn scaled_frequencies() {
    let close = |scaling: RopeScaling, want: [f64; 4]| {
        for (i, want) in want.into_iter().enumerate() {
            let found = f64::from(Rope { scaling, ..Rope::plain(10_000.0) }.frequency(i, 8));
            assert!((found / want - 1.0).abs() < 1e-7, "{scaling:?}: pair {i}: {found}, expected {want}");
        }
    };
    close(RopeScaling::None, [1.0, 0.1, 0.01, 0.001]);
    close(RopeScaling::Linear { factor: 4.0 }, [0.25, 0.025, 0.0025, 0.00025]);
    // Over 40 pi positions they turn 20, 2, 0.2 and 0.02 times. Kept from 5 turns on, divided below
    // 1, in between by a quarter of the way.
    let original_len = (40.0 * std::f64::consts::PI) as f32;
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 5.0, original_len };
    close(llama3, [1.0, 0.75 * 0.1 / 8.0 + 0.25 * 0.1, 0.01 / 8.0, 0.001 / 8.0]);
    // Half of a head of 16 turns as a head of 8.
    let half = Rope { width: Some(8), ..Rope::plain(10_000.0) };
    assert_eq!([0, 1, 2, 3].map(|i| half.frequency(i, 16)), [0, 1, 2, 3].map(|i| Rope::plain(10_000.0).frequency(i, 8)));
}
