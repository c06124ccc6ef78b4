//! Every op of the seam against its oracle. A test body is generic over the backend and runs on
//! each machine configuration that is present: every instruction set of the CPU, both dtypes.

mod attention;
mod embed;
mod linear;
#[cfg(feature = "emulator")]
#[path = "../kernels/machines.rs"]
#[allow(dead_code)] // shared with the kernel tests, which need all of it
mod machines;
mod moe;
mod norm;
mod pool;
mod quantised;
mod rope;
mod route;
mod sample;
mod shortlist;
mod simd;

use redraft::backend::{Activation, DType, HeadShape, Inspect, WeightShape};
use redraft::cpu::Cpu;
use redraft::cpu::simd::Isa;

/// A backend that a test can hand numbers to.
pub trait TestBackend: Inspect {
    fn put(&self, src: &[f32]) -> Self::Buffer {
        self.upload(src).unwrap()
    }

    fn zeros(&self, len: usize) -> Self::Buffer {
        let [buffer] = self.alloc([Activation::F32(len)]).unwrap();
        buffer
    }

    /// Whether attention over such heads is supported.
    fn runs(&self, _heads: HeadShape) -> bool {
        true
    }

    /// Whether `rope_append` leaves rotated keys in the rows.
    fn rotates_keys_in_place(&self) -> bool {
        true
    }

    fn read(&self, src: &Self::Buffer, len: usize) -> Vec<f32> {
        let mut dst = vec![0.0; len];
        self.download(src, 0, &mut dst).unwrap();
        dst
    }

    /// Packs an (n, k) weight that lies in memory.
    fn pack(&self, weight: &[f32], n: usize, k: usize) -> Self::Weight {
        self.weight(WeightShape::Matrix { n, k }, &|first: usize, dst: &mut [f32]| {
            dst.copy_from_slice(&weight[first * k..][..dst.len()]);
            Ok(())
        })
        .unwrap()
    }
}

impl TestBackend for Cpu {}

/// The CPU in every instruction set of this machine and both dtypes, with `threads` threads.
pub fn cpus(threads: usize) -> Vec<Cpu> {
    let sets = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    sets.flat_map(|isa| [DType::F32, DType::Bf16].map(|dtype| Cpu::with_isa(threads, dtype, isa).unwrap())).collect()
}

#[cfg(feature = "emulator")]
impl TestBackend for redraft::cuda::Cuda {
    fn rotates_keys_in_place(&self) -> bool {
        false
    }

    /// The matrix units multiply bf16 heads in steps of sixteen.
    fn runs(&self, heads: HeadShape) -> bool {
        redraft::Backend::dtype(self) == DType::F32 || heads.head_dim.is_multiple_of(16)
    }
}

/// The CUDA backend on the emulated machine and on the first GPU, in both dtypes, or on what
/// `REDRAFT_TEST_MACHINES` asks for.
#[cfg(feature = "emulator")]
pub fn devices() -> Vec<redraft::cuda::Cuda> {
    use redraft::cuda::{Cuda, EmulatorOptions};
    let on = |dtype| machines::drivers([EmulatorOptions::default()]).into_iter().map(move |driver| Cuda::new(driver, dtype).unwrap());
    [DType::F32, DType::Bf16].into_iter().flat_map(on).collect()
}

/// Runs a body with `b` a CPU of the list, then with `b` each device.
macro_rules! each {
    ($b:ident in $cpus:expr, $body:block) => {{
        for $b in &$cpus {
            $body
        }
        #[cfg(feature = "emulator")]
        for $b in &crate::devices() {
            $body
        }
    }};
}
pub(crate) use each;

/// Repeatable numbers in [-1, 1), different for every seed.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    };
    (0..len).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Every element within `tolerance(i)` of the oracle; a NaN on either side fails.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut worst = (0.0, 0);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(!error.is_nan(), "{what}: element {i} is {g}, expected {w}");
        let excess = error / tolerance(i);
        if excess > worst.0 {
            worst = (excess, i);
        }
    }
    let (excess, i) = worst;
    assert!(excess <= 1.0, "{what}: element {i} is {}, expected {}: {excess:.2} times the tolerance {:e}", got[i], want[i], tolerance(i));
}

/// Equal bit for bit.
#[track_caller]
pub fn assert_same(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i}: {a} and {b}");
    }
}
