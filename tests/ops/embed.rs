//! `embed`, `gather` and the memory methods.

use redraft::backend::{Backend, DType, WeightShape};
use redraft::cpu::{Cpu, oracle};
use redraft::error::Error;
use redraft::plan::{Plan, Visibility};

use crate::{TestBackend, assert_same, cpus, each, noise};

#[test]
fn embed_reads_rows_as_stored() {
    each!(b in cpus(1), {
        for (n, k) in [(1, 1), (7, 5), (600, 33)] {
            let values = noise(n * k, 1);
            let source = |first: usize, dst: &mut [f32]| {
                dst.copy_from_slice(&values[first * k..][..dst.len()]);
                Ok(())
            };
            let ids: Vec<u32> = (0..9).map(|i| (i * 131 % n) as u32).collect();
            let rows: Vec<_> = ids.iter().enumerate().map(|(i, &id)| (i, id)).collect();
            let mut plan = Plan::new();
            plan.push(&rows, &[0], 16, Visibility::Full, 9);
            // A tied table is packed as the head is.
            for shape in [WeightShape::Table { n, k }, WeightShape::Matrix { n, k }] {
                let table = b.weight(shape, &source).unwrap();
                let mut out = b.zeros(9 * k);
                b.embed(&b.batch(&plan).unwrap(), &table, None, &mut out).unwrap();
                assert_same(&b.name(), &b.read(&out, 9 * k), &oracle::embed(b.dtype(), &ids, &values, k));
            }
        }
    });
}

/// Each row by its own position, whatever its place in the batch, summed in f32.
#[test]
fn learned_positions_are_added() {
    each!(b in cpus(2), {
        let (n, k, num) = (11, 34, 20);
        let (values, places) = (noise(n * k, 1), noise(num * k, 2));
        let source = |values: &[f32], first: usize, dst: &mut [f32]| {
            dst.copy_from_slice(&values[first * k..][..dst.len()]);
            Ok(())
        };
        let table = b.weight(WeightShape::Matrix { n, k }, &|first, dst: &mut [f32]| source(&values, first, dst)).unwrap();
        let second = b.weight(WeightShape::Table { n: num, k }, &|first, dst: &mut [f32]| source(&places, first, dst)).unwrap();
        let rows: [(usize, u32); 4] = [(3, 10), (4, 0), (9, 7), (19, 7)];
        let mut plan = Plan::new();
        plan.push(&rows, &[0, 1], 16, Visibility::Full, 20);
        let mut out = b.zeros(4 * k);
        b.embed(&b.batch(&plan).unwrap(), &table, Some(&second), &mut out).unwrap();
        let tokens = oracle::embed(b.dtype(), &rows.map(|(_, id)| id), &values, k);
        let positions = oracle::embed(b.dtype(), &rows.map(|(position, _)| position as u32), &places, k);
        let sums: Vec<f32> = tokens.iter().zip(&positions).map(|(a, b)| a + b).collect();
        assert_same(&b.name(), &b.read(&out, 4 * k), &sums);
    });
}

#[test]
fn gather_copies_rows() {
    each!(b in cpus(1), {
        let x = noise(10 * 7, 2);
        let mut out = b.zeros(3 * 7);
        b.gather(&b.rows(&[9, 0, 9]).unwrap(), 7, &b.put(&x), &mut out).unwrap();
        assert_same(&b.name(), &b.read(&out, 21), &[&x[63..], &x[..7], &x[63..]].concat());
    });
}

#[test]
fn guidance_moves_away_from_the_base() {
    each!(b in cpus(1), {
        let (base, x) = (noise(300, 3), noise(300, 4));
        let mut out = b.put(&x);
        b.apply_guidance(299, 2.5, &b.put(&base), &mut out).unwrap();
        let got = b.read(&out, 300);
        for i in 0..299 {
            let want = base[i] + 2.5 * (x[i] - base[i]);
            assert!((got[i] - want).abs() < 1e-6, "{}: element {i} is {}, expected {want}", b.name(), got[i]);
        }
        assert_eq!(got[299], x[299], "{}: what lies behind stays", b.name());
    });
}

#[test]
fn a_failing_source_is_passed_on() {
    for dtype in [DType::F32, DType::Bf16] {
        let b = Cpu::new(2, dtype).unwrap();
        // Of many parts that fail on two threads, the error is that of the first.
        let fail = |first: usize, dst: &mut [f32]| {
            dst.fill(0.0);
            let end = first + dst.len() / 3000;
            if end > 1000 { Err(Error::kernel(format!("truncated before {}", end / 1000))) } else { Ok(()) }
        };
        let (n, k) = (9000, 3000);
        for shape in [WeightShape::Matrix { n, k }, WeightShape::Table { n, k }] {
            assert_eq!(b.weight(shape, &fail).err(), Some(Error::kernel("truncated before 1")));
        }
    }
}

#[test]
fn buffers_begin_at_zero_and_download_from_an_offset() {
    let b = Cpu::new(1, DType::F32).unwrap();
    assert_same("alloc", &b.read(&b.zeros(5), 5), &[0.0; 5]);
    let mut two = [0.0; 2];
    b.download(&b.put(&[1.0, 2.0, 3.0]), 1, &mut two).unwrap();
    assert_eq!(two, [2.0, 3.0]);
}
