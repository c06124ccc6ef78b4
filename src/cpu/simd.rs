//! CpuContext's vector instructions: sixteen f32 lanes as a value, over AVX-512, AVX2 or
//! plain arrays, chosen once at run time. Kernels elsewhere in `cpu` are written once against
//! [`Simd`] and stay free of `unsafe`: a token of an ISA can only be had where its features were
//! detected, so its methods are safe to call.
//!
//! Within one ISA every lane operation is a fixed instruction, so results are bitwise stable;
//! between ISAs they may differ in rounding (fused or separate multiply-add, the internal order of
//! `vdpbf16ps`).

pub mod groups;
mod portable;
pub mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_groups;

mod vector;

pub use vector::{Kernel, LANES, Simd};

use portable::Portable;
#[cfg(target_arch = "x86_64")]
use x86::{Avx2, Avx512};

/// Instruction sets with their own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with `vdpbf16ps` and VNNI, which no processor with the former lacks.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Plain Rust, any machine.
    Portable,
}

impl Isa {
    pub const ALL: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// The best set this machine runs.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Whether this machine runs the set.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::<true>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::<false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => false,
            Isa::Portable => true,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }

    /// [`Simd::PANEL`] of this set.
    pub fn panel(self) -> usize {
        struct Panel;
        impl Kernel for Panel {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _simd: S) -> usize {
                S::PANEL
            }
        }
        self.run(Panel)
    }

    /// [`Simd::x_words`] of this set.
    pub fn x_words(self, bf16: bool) -> usize {
        struct XWords(bool);
        impl Kernel for XWords {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _simd: S) -> usize {
                S::x_words(self.0)
            }
        }
        self.run(XWords(bf16))
    }

    /// Multiply-adds of a product that a core does in a microsecond, roughly: two instructions a
    /// cycle at 3.5 GHz, those of `vdpbf16ps` with pairs, the portable ones of four lanes and not
    /// fused.
    pub fn multiply_adds_per_us(self) -> usize {
        match self {
            Isa::Avx512Bf16 => 1 << 18,
            Isa::Avx512 => 1 << 17,
            Isa::Avx2 => 1 << 16,
            Isa::Portable => 1 << 14,
        }
    }

    /// Runs `kernel` compiled for this set; the best available one below it where the machine lacks
    /// it.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        match self {
            Isa::Avx512Bf16 => {
                if let Some(simd) = Avx512::<true>::detect() {
                    return simd.run(kernel);
                }
            }
            Isa::Avx512 => {
                if let Some(simd) = Avx512::<false>::detect() {
                    return simd.run(kernel);
                }
            }
            Isa::Avx2 => {
                if let Some(simd) = Avx2::detect() {
                    return simd.run(kernel);
                }
            }
            Isa::Portable => {}
        }
        kernel.run(Portable)
    }
}
