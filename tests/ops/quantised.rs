//! Products with weights in groups of 8 and 4 bits.

use redraft::WeightFormat;
use redraft::backend::{Backend, DType, Epilogue, WeightShape};
use redraft::cpu::simd::Isa;
use redraft::cpu::{Cpu, Weight, oracle};

use crate::{TestBackend, assert_close, assert_same, noise};

const FORMATS: [WeightFormat; 2] = [WeightFormat::Q8, WeightFormat::Q4];

fn cpus(threads: usize) -> Vec<Cpu> {
    let sets = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    sets.map(|isa| Cpu::with_isa(threads, DType::F32, isa).unwrap()).collect()
}

fn pack(cpu: &Cpu, format: WeightFormat, weight: &[f32], shape: WeightShape) -> Weight {
    let (WeightShape::Matrix { k, .. } | WeightShape::Table { k, .. } | WeightShape::Experts { k, .. }) = shape;
    let source = |first: usize, dst: &mut [f32]| {
        dst.copy_from_slice(&weight[first * k..][..dst.len()]);
        Ok(())
    };
    cpu.weight_as(format, shape, &source).unwrap()
}

fn product(cpu: &Cpu, x: &[f32], weight: &Weight, rows: usize, n: usize, bias: Option<&[f32]>, epilogue: Epilogue) -> Vec<f32> {
    let width = epilogue.out_width(n);
    let mut out = cpu.put(&noise(rows * width, 9));
    let bias = bias.map(|bias| cpu.put(bias));
    cpu.linear(rows, &cpu.put(x), weight, bias.as_ref(), epilogue, &mut out).unwrap();
    cpu.read(&out, rows * width)
}

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (2, 15, 3),
    (3, 63, 17),
    (4, 64, 64),
    (5, 65, 33),
    (7, 130, 96),
    (13, 257, 129),
    (1, 200, 300),
    (70, 96, 64),
    (150, 40, 100),
];

#[test]
fn agrees_with_the_oracle() {
    for cpu in &cpus(2) {
        for format in FORMATS {
            for (rows, n, k) in SHAPES {
                let (x, w) = (noise(rows * k, 1), noise(2 * n * k, 2));
                for epilogue in [Epilogue::Store, Epilogue::Gelu, Epilogue::Add, Epilogue::SwiGlu] {
                    let n = if epilogue == Epilogue::SwiGlu { 2 * n } else { n };
                    let (w, bias) = (&w[..n * k], noise(n, 3));
                    let before = noise(rows * epilogue.out_width(n), 9);
                    let packed = pack(cpu, format, w, WeightShape::Matrix { n, k });
                    let got = product(cpu, &x, &packed, rows, n, Some(&bias), epilogue);
                    let (kept_x, kept_w) = (oracle::kept_activations(&x, k), oracle::kept(format, w, k));
                    let want = oracle::linear(DType::F32, &kept_x, &kept_w, k, Some(&bias), epilogue, &before);
                    // A rounding for each group, of sums that grow with the root of k.
                    let scale = if epilogue == Epilogue::SwiGlu { 2.0 + 2.0 * (k as f64).sqrt() } else { 1.0 };
                    let tolerance = scale * 1e-6 * (1.0 + (k as f64).sqrt() / 4.0);
                    assert_close(&format!("{} {format:?} {rows} x {n} x {k} {epilogue:?}", cpu.name()), &got, &want, |_| tolerance);
                }
            }
        }
    }
}

/// Every set of instructions gives the bits of the plain loops.
#[test]
fn all_instruction_sets_agree_to_the_bit() {
    for format in FORMATS {
        for (rows, n, k) in SHAPES {
            // Large codes on both sides, where 16 bits could overflow.
            let extreme =
                |len: usize, seed: u64| noise(len, seed).into_iter().map(|v| if v.abs() > 0.2 { v.signum() } else { v }).collect();
            let (x, w): (Vec<f32>, Vec<f32>) = (extreme(rows * k, 1), extreme(n * k, 2));
            let products: Vec<Vec<f32>> = cpus(1)
                .iter()
                .map(|cpu| product(cpu, &x, &pack(cpu, format, &w, WeightShape::Matrix { n, k }), rows, n, None, Epilogue::Store))
                .collect();
            for (product, cpu) in products.iter().zip(cpus(1)) {
                assert_same(&format!("{} {format:?} {rows} x {n} x {k}", cpu.name()), product, products.last().unwrap());
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_threads() {
    for format in FORMATS {
        for (one, two) in cpus(1).iter().zip(&cpus(2)) {
            for (n, k) in [(70, 50), (300, 2100)] {
                let (w, x) = (noise(n * k, 5), noise(200 * k, 6));
                let [packed_one, packed_two] = [one, two].map(|cpu| pack(cpu, format, &w, WeightShape::Matrix { n, k }));
                let all = product(one, &x, &packed_one, 200, n, None, Epilogue::Store);
                assert_same("two threads", &all, &product(two, &x, &packed_two, 200, n, None, Epilogue::Store));
                for rows in [1, 2, 5, 8, 31, 64, 65, 128] {
                    for first in [0, 199 - rows] {
                        let some = product(two, &x[first * k..], &packed_two, rows, n, None, Epilogue::Store);
                        assert_same(&format!("{} {format:?}: {rows} rows from {first}", one.name()), &some, &all[first * n..][..rows * n]);
                    }
                }
            }
        }
    }
}

/// What a table and a matrix keep of a row is the same.
#[test]
fn lookups_give_what_is_kept() {
    let (n, k) = (70, 77);
    let w = noise(n * k, 7);
    let ids = [0, 69, 31, 32, 33, 5, 5];
    for cpu in &cpus(2) {
        for format in FORMATS {
            let kept = oracle::kept(format, &w, k);
            let want: Vec<f32> = ids.iter().flat_map(|&id| kept[id as usize * k..][..k].to_vec()).collect();
            for shape in [WeightShape::Matrix { n, k }, WeightShape::Table { n, k }] {
                let weight = pack(cpu, format, &w, shape);
                let mut out = vec![0.0; ids.len() * k];
                weight.rows(&ids, &mut out);
                assert_same(&format!("{format:?} {shape:?}"), &out, &want);
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let (n, k) = (40, 70);
    for cpu in &cpus(1) {
        for format in FORMATS {
            let packed = pack(cpu, format, &noise(n * k, 8), WeightShape::Matrix { n, k });
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = noise(3 * k, 9);
                x[k + 66] = bad;
                let out = product(cpu, &x, &packed, 3, n, None, Epilogue::Store);
                assert!(out[..n].iter().chain(&out[2 * n..]).all(|v| v.is_finite()), "{format:?}: a neighbour of {bad}");
                assert!(out[n..2 * n].iter().all(|v| !v.is_finite()), "{format:?}: {bad} was lost");
            }
        }
    }
}

#[test]
fn weights_beyond_a_group_are_an_error() {
    let cpu = Cpu::new(1, DType::F32).unwrap();
    for format in FORMATS {
        for shape in [WeightShape::Matrix { n: 2, k: 40 }, WeightShape::Table { n: 2, k: 40 }] {
            let large = |_: usize, dst: &mut [f32]| {
                dst.fill(1e8);
                Ok(())
            };
            let Err(error) = cpu.weight_as(format, shape, &large) else { panic!("{format:?} took 1e8") };
            assert!(error.to_string().contains("magnitude 100000000"), "{error}");
        }
    }
}

/// Bytes as the documentation says: 8.5 and 5 bits a value.
#[test]
fn bytes_held() {
    let cpu = Cpu::new(1, DType::F32).unwrap();
    let (n, k) = (64, 320);
    let w = noise(n * k, 8);
    for (format, bits) in [(WeightFormat::Q8, 8.5), (WeightFormat::Q4, 5.0)] {
        let packed = pack(&cpu, format, &w, WeightShape::Matrix { n, k });
        assert_eq!(packed.bytes() as f64 * 8.0, (n * k) as f64 * bits, "{format:?}");
    }
}
