//! `linear`: packed products with their epilogues.

use redraft::backend::{Backend, DType, Epilogue, WeightShape};
use redraft::cpu::{Cpu, oracle};

use crate::{TestBackend, assert_close, assert_same, cpus, each, noise};

const EPS: f64 = f32::EPSILON as f64;

fn agrees<B: TestBackend>(b: &B, rows: usize, n: usize, k: usize, with_bias: bool, epilogue: Epilogue) {
    let dtype = b.dtype();
    let (x, w) = (noise(rows * k, 1), noise(n * k, 2));
    let width = epilogue.out_width(n);
    let (bias, before) = (noise(n, 3), noise(rows * width, 4));
    let packed = b.pack(&w, n, k);
    let device_bias = b.put(&bias);
    let mut out = b.put(&before);
    b.linear(rows, &b.put(&x), &packed, with_bias.then_some(&device_bias), epilogue, &mut out).unwrap();
    let got = b.read(&out, rows * width);
    let want = oracle::linear(dtype, &x, &w, k, with_bias.then_some(&bias[..]), epilogue, &before);
    // A sequential f32 sum of k products errs by at most k eps/2 sum |a b|, typically sqrt(k) of
    // it; |a b| averages 1/4. bf16 products are exact in f32, but the pairs of `vdpbf16ps` round
    // once more each.
    let sum = 0.25 * k as f64;
    let tolerance = 2.0 * EPS * (sum * (k as f64).sqrt() / 2.0 + 2.0 + k as f64 / 16.0);
    // A product of two sums: each one's error is scaled by the other, whose size is at most a few
    // times the root of k.
    let scale = if epilogue == Epilogue::SwiGlu { 2.0 + 2.0 * (k as f64).sqrt() } else { 1.0 };
    assert_close(&format!("{} {dtype:?} {rows} x {n} x {k} {epilogue:?} bias {with_bias}", b.name()), &got, &want, |_| scale * tolerance);
}

#[test]
fn agrees_with_the_oracle() {
    each!(b in cpus(1), {
        for (rows, n, k) in [(1, 1, 1), (2, 15, 3), (3, 63, 17), (4, 64, 64), (5, 65, 33), (7, 130, 96), (13, 257, 129), (1, 200, 300)] {
            for epilogue in [Epilogue::Store, Epilogue::Gelu, Epilogue::Add, Epilogue::SwiGlu] {
                let n: usize = if epilogue == Epilogue::SwiGlu { 2 * n } else { n };
                for with_bias in [false, true] {
                    agrees(b, rows, n, k, with_bias, epilogue);
                }
            }
        }
    });
}

#[test]
fn long_rows_are_summed_in_parts() {
    each!(b in cpus(1), {
        for k in [511, 512, 513, 1024, 1025, 2049, 4097] {
            agrees(b, 20, 70, k, true, Epilogue::Add);
            agrees(b, 8, 70, k, true, Epilogue::Add);
            agrees(b, 8, 70, k, true, Epilogue::SwiGlu);
        }
    });
}

/// Runs `rows` rows of the same x.
fn product<B: TestBackend>(b: &B, x: &[f32], packed: &B::Weight, rows: usize, n: usize, epilogue: Epilogue) -> Vec<f32> {
    let mut out = b.put(&noise(rows * n, 9));
    b.linear(rows, &b.put(x), packed, None, epilogue, &mut out).unwrap();
    b.read(&out, rows * n)
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_threads() {
    for (one, two) in cpus(1).iter().zip(&cpus(2)) {
        for (n, k) in [(70, 50), (200, 4100)] {
            let w = noise(n * k, 5);
            let (packed_one, packed_two) = (one.pack(&w, n, k), two.pack(&w, n, k));
            let x = noise(300 * k, 6);
            let all = product(one, &x, &packed_one, 300, n, Epilogue::Gelu);
            assert_same("two threads", &all, &product(two, &x, &packed_two, 300, n, Epilogue::Gelu));
            for rows in [1, 2, 3, 4, 5, 6, 7, 8, 16, 31, 128] {
                for first in [0, 299 - rows] {
                    let some = product(one, &x[first * k..], &packed_one, rows, n, Epilogue::Gelu);
                    assert_same(
                        &format!("{} {:?}: {rows} rows from {first}", one.name(), one.dtype()),
                        &some,
                        &all[first * n..][..rows * n],
                    );
                }
            }
        }
    }
}

#[test]
fn rows_and_columns_that_are_not_asked_for_are_neither_read_nor_written() {
    each!(b in cpus(2), {
        let (n, k, rows) = (70, 33, 5);
        let mut x = noise((rows + 1) * k, 7);
        x[rows * k..].fill(f32::NAN);
        let packed = b.pack(&noise(n * k, 8), n, k);
        let mut out = b.put(&vec![7.0; rows * n + 64]);
        b.linear(rows, &b.put(&x), &packed, None, Epilogue::Store, &mut out).unwrap();
        let got = b.read(&out, rows * n + 64);
        assert!(got[..rows * n].iter().all(|v| v.is_finite()));
        assert!(got[rows * n..].iter().all(|v| *v == 7.0));
    });
}

#[test]
fn gelu_is_accurate_over_its_whole_range() {
    // x = v through a 1 x 1 identity, so the product is exact.
    each!(b in cpus(1), {
        if b.dtype() != DType::F32 {
            continue;
        }
        let packed = b.pack(&[1.0], 1, 1);
        let v: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.01).chain([0.0, -0.0, 1e-30, 1e4, -1e4, 1e30, -1e30]).collect();
        let mut out = b.zeros(v.len());
        b.linear(v.len(), &b.put(&v), &packed, None, Epilogue::Gelu, &mut out).unwrap();
        let want: Vec<f64> = v.iter().map(|&v| oracle::gelu_tanh(f64::from(v))).collect();
        // Half a dozen roundings relative to the value, and the absolute size of a rounding near 0
        // on the far negative side.
        assert_close(&b.name(), &b.read(&out, v.len()), &want, |i| 1e-6 * want[i].abs() + 1e-9);
    });
}

#[test]
#[should_panic(expected = "a product needs a matrix")]
fn a_table_is_not_a_weight() {
    let b = Cpu::new(1, DType::F32).unwrap();
    let table = b.weight(WeightShape::Table { n: 1, k: 1 }, &|_: usize, _: &mut [f32]| Ok(())).unwrap();
    let _ = b.linear(1, &b.put(&[0.0]), &table, None, Epilogue::Store, &mut b.put(&[0.0]));
}
