//! AVX-512 and AVX2 lanes. A token exists only where `detect` saw every feature its methods use.

use std::arch::x86_64::*;

use crate::cpu::simd::groups::{ActivationGroup, COLUMNS, Q4_WORDS, Q8_WORDS};
use crate::cpu::simd::vector::{Kernel, LANES, Simd};
use crate::cpu::simd::x86_groups;

/// AVX-512 F, BW, DQ, VL and, with `BF16`, `vdpbf16ps` and VNNI.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>(());

/// AVX2, FMA and F16C; sixteen lanes are two registers.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl<const BF16: bool> Avx512<BF16> {
    #[inline]
    pub fn detect() -> Option<Self> {
        // Each macro is one load and a bit test after its first use.
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let more = || is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
        (base && (!BF16 || more())).then_some(Self(()))
    }

    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn plain<K: Kernel, const BF16: bool>(simd: Avx512<BF16>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")]
        fn bf16<K: Kernel, const BF16: bool>(simd: Avx512<BF16>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so `detect` saw the features of the branch taken.
        unsafe { if BF16 { bf16(self, kernel) } else { plain(self, kernel) } }
    }
}

impl Avx2 {
    #[inline]
    pub fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }

    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn entry<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so `detect` saw its features.
        unsafe { entry(self, kernel) }
    }
}

/// One register instruction of a set whose token is `self`.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: register-only intrinsics whose features `detect` saw before it made `self`.
        unsafe { $e }
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type W = __m512i;
    // 24 accumulators, at most eight of B and one of A; 32 registers, B may come from memory.
    const WIDE: bool = true;
    const MULTIPLIES_PAIRS: bool = BF16;
    // Without the instruction, four registers of pairs, four of halves and twenty of sums.
    const BF16_ROWS: usize = if BF16 { 6 } else { 5 };

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: reads the sixteen floats at `x`, unaligned; features as in `op`.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; LANES]) {
        // SAFETY: writes the sixteen floats at `to`, unaligned; features as in `op`.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }
    #[inline(always)]
    fn scale(self, x: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(x, n))
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn mask_ge(self, a: __m512, b: __m512) -> u32 {
        op!(u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b)))
    }
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        op!(_mm512_reduce_add_ps(x))
    }
    #[inline(always)]
    fn max_lane(self, x: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(x))
    }
    #[inline(always)]
    fn store_bf16(self, x: __m512, to: &mut [u16; LANES]) {
        // SAFETY: writes the sixteen halves at `to`, unaligned; features as in `op`, the first
        // branch only with BF16.
        unsafe {
            let rounded = if BF16 {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))
            } else {
                let bits = _mm512_castps_si512(x);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                // A NaN keeps its upper half and becomes quiet; the addition above could carry it
                // to infinity.
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, nearest, quiet)))
            };
            _mm256_storeu_si256(to.as_mut_ptr().cast(), rounded);
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> __m512 {
        // SAFETY: reads the sixteen halves at `x`, unaligned; features as in `op`.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())))) }
    }

    #[inline(always)]
    fn word(self, x: u32) -> __m512i {
        op!(_mm512_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn words(self, x: &[u32; LANES]) -> __m512i {
        // SAFETY: reads the sixteen words at `x`, unaligned; features as in `op`.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn step_f32(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        op!(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc))
    }
    #[inline(always)]
    fn step_bf16(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: features as in `op`, the first branch only with BF16; the transmutes rename 512
        // bits.
        unsafe {
            if BF16 {
                _mm512_dpbf16_ps(acc, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
            } else {
                let acc = _mm512_fmadd_ps(self.low_halves(a), self.low_halves(b), acc);
                _mm512_fmadd_ps(self.high_halves(a), self.high_halves(b), acc)
            }
        }
    }
    #[inline(always)]
    fn low_halves(self, pairs: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)))
    }
    #[inline(always)]
    fn high_halves(self, pairs: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32))))
    }
    #[inline(always)]
    fn prefetch(self, address: usize) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
    }
    #[inline(always)]
    fn add_q8(self, block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        // SAFETY: features as in `op`; VNNI comes with BF16.
        unsafe { if BF16 { x86_groups::add_q8_vnni(block, x, sums) } else { x86_groups::add_q8_avx2(block, x, sums) } }
    }
    #[inline(always)]
    fn add_q4(self, block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        // SAFETY: features as in `op`; VNNI comes with BF16.
        unsafe { if BF16 { x86_groups::add_q4_vnni(block, x, sums) } else { x86_groups::add_q4_avx2(block, x, sums) } }
    }
}

/// The two halves of a sixteen-lane value.
type Pair<T> = [T; 2];

// Both halves are written out: a closure over one of them would not be compiled for AVX2, and each
// of its instructions would be a call.
impl Simd for Avx2 {
    type F = Pair<__m256>;
    type W = Pair<__m256i>;
    // Six values are twelve registers of sixteen.
    const WIDE: bool = false;
    const MULTIPLIES_PAIRS: bool = false;
    // 128 rows of 768 x 768, in percent of the peak: 97 with five rows, 89 with six.
    const BF16_ROWS: usize = 5;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: reads the sixteen floats at `x`, unaligned; features as in `op`.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        // SAFETY: writes the sixteen floats at `to`, unaligned; features as in `op`.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        op!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        op!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        op!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        op!([_mm256_round_ps::<NEAREST>(x[0]), _mm256_round_ps::<NEAREST>(x[1])])
    }
    #[inline(always)]
    fn scale(self, x: Self::F, n: Self::F) -> Self::F {
        op!({
            let bias = _mm256_set1_epi32(127);
            let biased = [_mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias), _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias)];
            let power = [_mm256_slli_epi32::<23>(biased[0]), _mm256_slli_epi32::<23>(biased[1])];
            self.mul(x, [_mm256_castsi256_ps(power[0]), _mm256_castsi256_ps(power[1])])
        })
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        op!([
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1]))
        ])
    }
    #[inline(always)]
    fn mask_ge(self, a: Self::F, b: Self::F) -> u32 {
        op!({
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[0], b[0]));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[1], b[1]));
            (low | high << 8) as u32
        })
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        op!({
            let eight = _mm256_add_ps(x[0], x[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        op!({
            let eight = _mm256_max_ps(x[0], x[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::F, to: &mut [u16; LANES]) {
        // SAFETY: writes the sixteen halves at `to`, unaligned; features as in `op`.
        unsafe {
            let mut halves = [_mm256_setzero_si256(); 2];
            for (half, x) in halves.iter_mut().zip(x) {
                let bits = _mm256_castps_si256(x);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                // A NaN keeps its upper half and becomes quiet; the addition above could carry it
                // to infinity.
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                *half = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(nearest, quiet, nan));
            }
            // packus works within 128-bit lanes: bring the quarters back in order.
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(halves[0], halves[1]));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), packed);
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        // SAFETY: reads the sixteen halves at `x`, unaligned; features as in `op`.
        unsafe {
            let halves = [_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast())];
            let wide = [_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])];
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[0])), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[1]))]
        }
    }

    #[inline(always)]
    fn word(self, x: u32) -> Self::W {
        op!([_mm256_set1_epi32(x as i32); 2])
    }
    #[inline(always)]
    fn words(self, x: &[u32; LANES]) -> Self::W {
        // SAFETY: reads the sixteen words at `x`, unaligned; features as in `op`.
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())] }
    }
    #[inline(always)]
    fn step_f32(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F {
        op!([
            _mm256_fmadd_ps(_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(b[0]), acc[0]),
            _mm256_fmadd_ps(_mm256_castsi256_ps(a[1]), _mm256_castsi256_ps(b[1]), acc[1])
        ])
    }
    #[inline(always)]
    fn step_bf16(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F {
        let acc = self.fma(self.low_halves(a), self.low_halves(b), acc);
        self.fma(self.high_halves(a), self.high_halves(b), acc)
    }
    #[inline(always)]
    fn low_halves(self, pairs: Self::W) -> Self::F {
        op!([_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[0])), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[1]))])
    }
    #[inline(always)]
    fn high_halves(self, pairs: Self::W) -> Self::F {
        op!({
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            [_mm256_castsi256_ps(_mm256_and_si256(pairs[0], high)), _mm256_castsi256_ps(_mm256_and_si256(pairs[1], high))]
        })
    }
    #[inline(always)]
    fn prefetch(self, address: usize) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
    }
    #[inline(always)]
    fn add_q8(self, block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        // SAFETY: features as in `op`.
        unsafe { x86_groups::add_q8_avx2(block, x, sums) }
    }
    #[inline(always)]
    fn add_q4(self, block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
        // SAFETY: features as in `op`.
        unsafe { x86_groups::add_q4_avx2(block, x, sums) }
    }
}
