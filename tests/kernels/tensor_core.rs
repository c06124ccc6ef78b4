//! The emulated tensor cores and their reference in `redraft_emulator::tensor_core`, bit for bit:
//! against what others published about the hardware, and against each other on random operands.
//!
//! The published examples are those by which MMA-Sim (arXiv 2511.10909, `tests/nv`) tells fused
//! sums, their width and their rounding on A100 and H100.

use half::bf16;
use redraft::cuda::context::CudaContext;
use redraft::cuda::driver::Launch;
use redraft::cuda::tensor_core::{MMA_K, TensorCore};
use redraft::cuda::{Emulator, EmulatorOptions};

use crate::emulator::{Array, noise, same_bits, words};

/// Twin of the struct in `mma.cu`.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct MmaParams {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
}

/// One instruction: d (16, 8) of a (16, 16), b (8, 16) and c (16, 8).
fn mma(arch: &'static str, a: &[f32], b: &[f32], c: &[f32]) -> Result<Vec<f32>, String> {
    let emulator = Emulator::new(EmulatorOptions { arch, threads: 1, ..EmulatorOptions::default() }).map_err(|e| e.to_string())?;
    let function = emulator.function_in("mma.cu", include_str!("mma.cu"), &[("THREADS", 32)], "mma").map_err(|e| e.to_string())?;
    let context = &CudaContext::new(Box::new(emulator)).map_err(|e| e.to_string())?;
    let stored = |values: &[f32]| Array::new(context, &values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>());
    let (a, b, c, d) = (stored(a), stored(b), Array::new(context, c), Array::nan(context, 16 * 8));
    let params = MmaParams { a: a.address(), b: b.address(), c: c.address(), d: d.address() };
    words(context.driver.launch(function, Launch::line(1, 32), bytemuck::bytes_of(&params)))?;
    d.read()
}

/// One element of one sum, once by the reference and once by an emulated instruction.
struct Example<'a> {
    c: f32,
    a: &'a [f32],
    b: &'a [f32],
    expected: f32,
}

fn check(arch: &'static str, examples: &[Example]) {
    let core = TensorCore::for_arch(arch).unwrap();
    // A diagonal element each; the rest of a pair's row and column is zero.
    for (at, Example { c, a, b, expected }) in examples.iter().enumerate() {
        let what = format!("{arch}, example {at}: {c:e} + {a:?} {b:?}");
        same_bits(&[*expected], &[core.mma(*c, a, b)], &format!("{what} by the reference")).unwrap();
        let (mut wide_a, mut wide_b, mut wide_c) = (vec![0.0; 256], vec![0.0; 128], vec![0.0; 128]);
        let (row, column) = (at % 16, at % 8);
        wide_a[row * 16..][..a.len()].copy_from_slice(a);
        wide_b[column * 16..][..b.len()].copy_from_slice(b);
        wide_c[row * 8 + column] = *c;
        let found = mma(arch, &wide_a, &wide_b, &wide_c).unwrap();
        same_bits(&[*expected], &found[row * 8 + column..][..1], &format!("{what} by the emulation")).unwrap();
    }
}

const ARCHS: [&str; 2] = ["sm_80", "sm_90a"];

/// 16 equal small products beside one large one that the accumulator cancels: what is added before
/// the large terms are gone is lost.
#[test]
fn how_many_products_share_a_sum() {
    let (large, small) = (128.0f32, (-9.0f32).exp2());
    for arch in ARCHS {
        for at in 0..MMA_K {
            let mut x = [small; MMA_K];
            x[at] = large;
            // On Ampere the second half is added behind the first, whose large terms have
            // cancelled.
            let expected = if arch == "sm_80" && at < 8 { 8.0 * small * small } else { 0.0 };
            check(arch, &[Example { c: -large * large, a: &x, b: &x, expected }]);
        }
    }
}

#[test]
fn how_many_bits_a_term_keeps_and_how_it_is_cut() {
    for (arch, bits) in [("sm_80", 24), ("sm_90a", 25)] {
        // x has its last bit 2^-24; a pair of products y z = 2^p that cancels hides it as soon as
        // 2^p is 2^(bits + 1) times that.
        let (x, last) = ((2.0 - (-10.0f32).exp2()) * (-14.0f32).exp2(), (-24.0f32).exp2());
        let hidden = |p: i32, times: f32| {
            let y = (p as f32).exp2();
            ([y, -y], [times; 2])
        };
        let p = bits + 1 - 24;
        let (pair, one) = hidden(p, 1.0);
        let (seen, _) = hidden(p - 1, 1.0);
        let two = [2.0; 2];
        let (wide, wide_by) = ([1.5 * pair[0], 1.5 * pair[1]], [1.5; 2]);
        let flat = [2.25 * pair[0], 2.25 * pair[1]];
        check(
            arch,
            &[
                Example { c: x, a: &seen, b: &one, expected: x },
                // Toward zero, on either side of it.
                Example { c: x, a: &pair, b: &one, expected: x - last },
                Example { c: -x, a: &pair, b: &one, expected: -x + last },
                Example { c: x, a: &pair, b: &two, expected: x - 3.0 * last },
                Example { c: -x, a: &pair, b: &two, expected: -x + 3.0 * last },
                // 1.5 y times 1.5 is aligned by its factors' exponents, though it is 2.25 y; 2.25 y
                // times 1 is one more.
                Example { c: x, a: &wide, b: &wide_by, expected: x - last },
                Example { c: x, a: &flat, b: &one, expected: x - 3.0 * last },
            ],
        );
        // The exponent of a subnormal factor is the least one.
        let (x, y) = ((-126.0f32).exp2(), 1.0f32);
        let z = ((bits + 1) as f32).exp2();
        check(
            arch,
            &[
                Example { c: 0.0, a: &[x; 4], b: &[z, -z, y, y], expected: 0.0 },
                Example { c: 0.0, a: &[x; 4], b: &[0.5 * z, -0.5 * z, y, y], expected: 2.0 * x },
                Example { c: 0.0, a: &[0.5 * x, 0.5 * x, x, x], b: &[z, -z, y, y], expected: 0.0 },
            ],
        );
    }
}

#[test]
fn how_a_result_is_cut() {
    let epsilon = f32::EPSILON;
    let top = 127.0f32.exp2();
    let (least, half_step) = (f32::from_bits(1), (-126.0f32).exp2());
    let below = f32::from_bits(0x7f_ffff);
    // 0.75 of the least subnormal number.
    let part = 0.75 * epsilon;
    for arch in ARCHS {
        check(
            arch,
            &[
                Example { c: 0.75 * epsilon, a: &[0.25; 4], b: &[1.0; 4], expected: 1.0 },
                Example { c: -0.75 * epsilon, a: &[-0.25; 4], b: &[1.0; 4], expected: -1.0 },
                // The largest number and most of a step do not overflow; 2^128 does.
                Example { c: 0.25 * f32::MAX, a: &[0.75; 2], b: &[top; 2], expected: f32::MAX },
                Example { c: -0.25 * f32::MAX, a: &[-0.75; 2], b: &[top; 2], expected: -f32::MAX },
                Example { c: 0.0, a: &[1.0; 2], b: &[top; 2], expected: f32::INFINITY },
                Example { c: 0.0, a: &[-1.0; 2], b: &[top; 2], expected: f32::NEG_INFINITY },
                // Subnormal results.
                Example { c: below, a: &[part], b: &[half_step], expected: below },
                Example { c: -below, a: &[-part], b: &[half_step], expected: -below },
                Example { c: 2.0 * least, a: &[part], b: &[half_step], expected: 2.0 * least },
                Example { c: 0.0, a: &[part], b: &[half_step], expected: 0.0 },
                // No sum is -0, and there is one NaN.
                Example { c: -0.0, a: &[-0.0; 16], b: &[1.0; 16], expected: 0.0 },
                Example { c: f32::NAN, a: &[1.0], b: &[1.0], expected: f32::from_bits(0x7fff_ffff) },
                Example { c: 0.0, a: &[f32::INFINITY, 1.0], b: &[0.0, 1.0], expected: f32::from_bits(0x7fff_ffff) },
                Example { c: f32::INFINITY, a: &[f32::NEG_INFINITY], b: &[1.0], expected: f32::from_bits(0x7fff_ffff) },
                Example { c: 1.0, a: &[f32::NEG_INFINITY], b: &[2.0], expected: f32::NEG_INFINITY },
            ],
        );
    }
}

/// Operands of many sizes, with zeros, subnormal numbers and cancellation; a few that are not
/// finite.
#[test]
fn the_emulation_equals_the_reference() {
    let mut generations_differ = 0;
    for seed in 0..60u64 {
        let spread = [0.0, 2.0, 10.0, 60.0, 120.0][seed as usize % 5];
        let scaled = |seed: u64, len: usize| -> Vec<f32> {
            let (values, sizes) = (noise(seed, len), noise(seed + 1, len));
            let sized = values.iter().zip(sizes).map(|(v, s)| if s > 0.9 { 0.0 } else { v * (s * spread).exp2() });
            sized.map(|v| bf16::from_f32(v).to_f32()).collect()
        };
        let (mut a, b) = (scaled(7 * seed, 256), scaled(7 * seed + 2, 128));
        let c: Vec<f32> =
            noise(7 * seed + 4, 128).iter().zip(noise(7 * seed + 5, 128)).map(|(v, s)| v * (s * 2.0 * spread).exp2()).collect();
        if seed % 6 == 5 {
            a[17] = f32::INFINITY;
            a[40] = f32::NAN;
        }
        let expected = |core: TensorCore| -> Vec<f32> {
            let one = |i: usize| core.mma(c[i], &a[i / 8 * 16..][..16], &b[i % 8 * 16..][..16]);
            (0..128).map(one).collect()
        };
        for arch in ARCHS {
            let expected = expected(TensorCore::for_arch(arch).unwrap());
            same_bits(&expected, &mma(arch, &a, &b, &c).unwrap(), &format!("{arch}, seed {seed}")).unwrap();
        }
        let both = ARCHS.map(|arch| expected(TensorCore::for_arch(arch).unwrap()));
        generations_differ += both[0].iter().zip(&both[1]).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    }
    assert!(generations_differ > 500, "{generations_differ} elements of 7,680");
}
