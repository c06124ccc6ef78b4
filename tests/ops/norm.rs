//! `norm`.

use redraft::backend::{Backend, Norm, NormKind};
use redraft::cpu::oracle;

use crate::{TestBackend, assert_close, assert_same, cpus, each, noise};

const KINDS: [NormKind; 2] = [NormKind::Layer, NormKind::Rms];

fn run<B: TestBackend>(b: &B, kind: NormKind, rows: usize, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let len = rows * weight.len();
    let mut out = b.zeros(len);
    let (weight, bias) = (b.put(weight), bias.map(|bias| b.put(bias)));
    b.norm(rows, &mut b.put(x), None, &Norm { kind, eps: 1e-5, weight: &weight, bias: bias.as_ref() }, &mut out).unwrap();
    b.read(&out, len)
}

#[test]
fn agrees_with_the_oracle() {
    each!(b in cpus(2), {
        for (rows, width) in [(1, 1), (3, 15), (2, 16), (5, 100), (4, 768), (70, 257)] {
            // An offset ten times the spread: the variance must not come from a difference of
            // squares.
            let x: Vec<f32> = noise(rows * width, 1).iter().map(|v| v + 10.0).collect();
            let (weight, bias) = (noise(width, 2), noise(width, 3));
            for (kind, bias) in KINDS.into_iter().flat_map(|kind| [(kind, None), (kind, Some(&bias[..]))]) {
                let want = oracle::norm(&x, &Norm { kind, eps: 1e-5, weight: &weight[..], bias });
                // The mean errs by a rounding of 10, 1e-6 at most, over a spread of 0.58; width 1
                // divides it by sqrt(eps).
                let scale = if width == 1 { 300.0 } else { 2.0 };
                let what = format!("{} {kind:?} {rows} x {width}", b.name());
                assert_close(&what, &run(b, kind, rows, &x, &weight, bias), &want, |_| 4e-6 * scale);
            }
        }
    });
}

/// The residual is added where the row lies, with one rounding, and the norm is that of the sum.
#[test]
fn a_residual_is_added_before_the_norm() {
    each!(b in cpus(2), {
        for (rows, width) in [(1, 1), (3, 15), (5, 100), (40, 257)] {
            let (x, more, weight) = (noise(rows * width, 1), noise(rows * width, 2), noise(width, 3));
            let sums: Vec<f32> = x.iter().zip(&more).map(|(x, more)| x + more).collect();
            for kind in KINDS {
                let (mut buffer, mut out, vector) = (b.put(&x), b.zeros(rows * width), b.put(&weight));
                let norm = Norm { kind, eps: 1e-5, weight: &vector, bias: None };
                b.norm(rows, &mut buffer, Some(&b.put(&more)), &norm, &mut out).unwrap();
                assert_same(&b.name(), &b.read(&buffer, rows * width), &sums);
                assert_same(&b.name(), &b.read(&out, rows * width), &run(b, kind, rows, &sums, &weight, None));
            }
        }
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_threads() {
    for (one, two) in cpus(1).iter().zip(&cpus(2)) {
        let (x, weight) = (noise(300 * 100, 4), noise(100, 5));
        for kind in KINDS {
            let all = run(one, kind, 300, &x, &weight, None);
            assert_same("two threads", &all, &run(two, kind, 300, &x, &weight, None));
            for row in [0, 1, 299] {
                assert_same(&one.name(), &run(one, kind, 1, &x[row * 100..], &weight, None), &all[row * 100..][..100]);
            }
        }
    }
}
