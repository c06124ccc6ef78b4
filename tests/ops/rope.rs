//! `rope_append`: rotation in place. What it wrote is seen through `attention`.

use redraft::backend::{Backend, HeadShape, KvShape};
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

/// The rows afterwards. What is left in the place of the keys is the backend's own business (they are in their slots): where they are not
/// rotated, they count as zeros.
fn rotate<B: TestBackend>(b: &B, plan: &Plan, heads: HeadShape, base: f32, qkv: &[f32]) -> Vec<f32> {
    let HeadShape { num_kv_heads, head_dim, .. } = heads;
    let mut kv = b.kv_cache(KvShape { num_layers: 2, num_pages: 80, page_size: 16, num_kv_heads, head_dim }).unwrap();
    let mut buffer = b.upload(qkv);
    b.rope_append(&b.batch(plan).unwrap(), heads, base, &mut buffer, 1, &mut kv).unwrap();
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
        // The base changes between calls: the table of rotations must follow.
        for (heads, base) in SHAPES.into_iter().zip([10_000.0, 500_000.0, 10_000.0, 100.0]) {
            let plan = plan(1100);
            let qkv = noise(1100 * heads.qkv_width(), 1);
            let mut want = qkv.clone();
            let slots = 80 * 16 * heads.num_kv_heads * heads.head_dim;
            oracle::rope_append(b.dtype(), &plan, heads, base, &mut want, &mut vec![0.0; slots], &mut vec![0.0; slots]);
            if !b.rotates_keys_in_place() {
                forget_keys(heads, &mut want);
            }
            let want: Vec<f64> = want.iter().map(|&v| f64::from(v)).collect();
            // Three roundings of values up to sqrt(2), and half a unit of the oracle's own store.
            assert_close(&format!("{} {heads:?}", b.name()), &rotate(b, &plan, heads, base, &qkv), &want, |_| 3e-7);
        }
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    each!(b in cpus(2), {
        let heads = SHAPES[2];
        let width = heads.qkv_width();
        let qkv = noise(300 * width, 2);
        let all = rotate(b, &plan(300), heads, 10_000.0, &qkv);
        assert_same(&b.name(), &rotate(b, &plan(7), heads, 10_000.0, &qkv[..7 * width]), &all[..7 * width]);
    });
}
