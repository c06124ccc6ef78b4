//! The vector layer: every operation on every instruction set against plain arithmetic.

use redraft::cpu::simd::{Isa, Kernel, LANES, Simd};

use crate::noise;

fn sets() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

struct Exp<'a>(&'a [f32]);
impl Kernel for Exp<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![0.0; self.0.len()];
        for (x, out) in self.0.as_chunks::<LANES>().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
            simd.store(simd.exp(simd.load(x)), out);
        }
        out
    }
}

#[test]
fn exp_is_accurate_to_two_units() {
    let x: Vec<f32> = (0..1 << 20).map(|i| -87.29 + 175.0 * i as f32 / (1 << 20) as f32).collect();
    for isa in sets() {
        let worst = isa.run(Exp(&x)).iter().zip(&x).map(|(&y, &x)| (f64::from(y) / f64::from(x).exp() - 1.0).abs()).fold(0.0, f64::max);
        assert!(worst < 2.0f64.powi(-22), "{}: relative error {worst:e}", isa.name());
    }
}

#[test]
fn exp_at_its_edges() {
    let mut x = [0.0; LANES];
    x[..6].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, f32::NAN, -87.31, -1e30]);
    for isa in sets() {
        let y = isa.run(Exp(&x));
        assert_eq!((y[0], y[1], y[2], y[4], y[5]), (1.0, 1.0, 0.0, 0.0, 0.0), "{}", isa.name());
        assert!(y[3].is_nan(), "{}", isa.name());
    }
}

/// Everything that turns sixteen lanes into bits that can be compared.
struct Lanes<'a>(&'a [f32; LANES], &'a [f32; LANES]);
impl Kernel for Lanes<'_> {
    type Output = Vec<u32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<u32> {
        let (a, b) = (simd.load(self.0), simd.load(self.1));
        let mut out = Vec::new();
        let values = [
            simd.add(a, b),
            simd.sub(a, b),
            simd.mul(a, b),
            simd.div(a, b),
            simd.max(a, b),
            // Plus zero: the sets differ in the sign of a zero.
            simd.add(simd.round(simd.mul(a, simd.splat(100.0))), simd.splat(0.0)),
            simd.scale(a, simd.round(simd.mul(b, simd.splat(126.0)))),
            simd.select_gt(a, b, simd.splat(1.0), b),
            simd.splat(simd.max_lane(a)),
        ];
        let mut lanes = [0.0; LANES];
        for value in values {
            simd.store(value, &mut lanes);
            out.extend(lanes.map(f32::to_bits));
        }
        let mut halves = [0; LANES];
        simd.store_bf16(a, &mut halves);
        out.extend(halves.map(u32::from));
        simd.store(simd.load_bf16(&halves), &mut lanes);
        out.extend(lanes.map(f32::to_bits));
        out.push(simd.mask_ge(a, b));
        out
    }
}

#[test]
fn lanes_agree_with_the_portable_set() {
    for seed in 0..200 {
        let mut a: [f32; LANES] = noise(LANES, seed).try_into().unwrap();
        let b: [f32; LANES] = noise(LANES, seed + 1000).try_into().unwrap();
        // Halfway cases of bf16 rounding, both ways.
        a[3] = f32::from_bits(0x3f80_8000);
        a[4] = f32::from_bits(0x3f81_8000);
        a[5] = b[5];
        let want = Isa::Portable.run(Lanes(&a, &b));
        for isa in sets() {
            assert_eq!(isa.run(Lanes(&a, &b)), want, "{}", isa.name());
        }
    }
}

struct Sum<'a>(&'a [f32; LANES]);
impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        simd.sum(simd.load(self.0))
    }
}

#[test]
fn sums_agree_up_to_their_order() {
    for seed in 0..200 {
        let a: [f32; LANES] = noise(LANES, seed).try_into().unwrap();
        let want: f64 = a.iter().map(|&v| f64::from(v)).sum();
        for isa in sets() {
            assert!((f64::from(isa.run(Sum(&a))) - want).abs() < 2e-6, "{}", isa.name());
        }
    }
}

#[test]
fn nan_and_infinity_survive_bf16_rounding() {
    let mut a = [0.0; LANES];
    a[..5].copy_from_slice(&[f32::NAN, f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff), f32::INFINITY, f32::NEG_INFINITY]);
    for isa in sets() {
        let out = isa.run(Lanes(&a, &a));
        // The widened values are the sixteen words before the mask.
        let wide: Vec<f32> = out[out.len() - 17..out.len() - 1].iter().map(|&bits| f32::from_bits(bits)).collect();
        assert!(wide[..3].iter().all(|v| v.is_nan()), "{}: {wide:?}", isa.name());
        assert_eq!(wide[3..5], [f32::INFINITY, f32::NEG_INFINITY], "{}", isa.name());
    }
}

/// Names of the functions in an ELF image, mangled.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn function_names(image: &[u8]) -> Vec<&str> {
    const SYMBOL_TABLE: usize = 2;
    const FUNCTION: u8 = 2;
    let number = |at: usize, len: usize| image[at..][..len].iter().rev().fold(0usize, |number, byte| number << 8 | usize::from(*byte));
    let (sections, section_len, num_sections) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let header = |i: usize| sections + i * section_len;
    let content = |header: usize| &image[number(header + 0x18, 8)..][..number(header + 0x20, 8)];
    let tables = (0..num_sections).map(header).filter(|header| number(header + 4, 4) == SYMBOL_TABLE);
    let names_of = |table: usize| {
        let names = content(header(number(table + 0x28, 4)));
        let symbols = content(table).chunks_exact(24).filter(|symbol| symbol[4] & 15 == FUNCTION);
        symbols.map(|symbol| {
            let name = &names[u32::from_le_bytes([symbol[0], symbol[1], symbol[2], symbol[3]]) as usize..];
            std::str::from_utf8(&name[..name.iter().position(|byte| *byte == 0).unwrap()]).unwrap()
        })
    };
    tables.flat_map(names_of).collect()
}

/// A closure does not inherit the target features of the kernel around it. Where the compiler does
/// not inline one, each intrinsic in it is a call: 32 of them for 16 logits of a nucleus, once,
/// which took a quarter of a pass.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn no_vector_instruction_is_a_function() {
    let image = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let names = function_names(&image);
    assert!(names.iter().any(|name| name.contains("Avx2")), "no kernel among {} functions", names.len());
    // Those that ask which features there are.
    let asks = |name: &str| name.contains("xsave") || name.contains("cpuid");
    let outlined: Vec<_> = names.iter().filter(|name| name.contains("core_arch") && !asks(name)).collect();
    assert!(outlined.is_empty(), "{} intrinsics are functions of their own: {outlined:#?}", outlined.len());
}
