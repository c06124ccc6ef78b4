//! Products of groups ([`super::groups`]) on AVX2, and on AVX-512 with VNNI.
//!
//! AVX2 multiplies pairs of bytes into 16 bits, one factor unsigned. Codes of q4 are unsigned and
//! so small that eight such pairs add up within 16 bits (8 * 2 * 15 * 127 < 2^15); for q8 the sign
//! of the weight moves to x, and pairs (2 * 128 * 127 < 2^15) are added in 32 bits. VNNI adds four
//! products of bytes to 32 bits; codes of q8 become unsigned by adding 128, which
//! `ActivationGroup::offset` takes back.

use std::arch::x86_64::*;

use crate::cpu::simd::groups::{ActivationGroup, COLUMNS, Q4_WORDS, Q8_WORDS};

/// Steps of four k.
const STEPS: usize = 8;

/// See [`super::groups::add_q8`].
///
/// # Safety
///
/// Needs AVX2 and F16C.
#[inline(always)]
pub unsafe fn add_q8_avx2(block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    // SAFETY: registers, and memory of the arrays: a block has 16 words of scales and 8 steps of 32
    // words, a row of sums 32 values, of which eight lie at `8 * part`; features by the caller.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        for part in 0..COLUMNS / 8 {
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(4 * part).cast()));
            let codes = block.as_ptr().add(COLUMNS / 2 + 8 * part);
            let mut magnitudes = [_mm256_setzero_si256(); STEPS];
            for (step, magnitude) in magnitudes.iter_mut().enumerate() {
                *magnitude = _mm256_abs_epi8(_mm256_loadu_si256(codes.add(COLUMNS * step).cast()));
            }
            for (x, sums) in x.iter().zip(sums.iter_mut()) {
                let mut products = _mm256_setzero_si256();
                for (step, magnitude) in magnitudes.iter().enumerate() {
                    let signs = _mm256_loadu_si256(codes.add(COLUMNS * step).cast());
                    let signed = _mm256_sign_epi8(_mm256_set1_epi32(x.codes[step] as i32), signs);
                    products = _mm256_add_epi32(products, _mm256_madd_epi16(_mm256_maddubs_epi16(*magnitude, signed), ones));
                }
                let sum = sums.as_mut_ptr().add(8 * part);
                let scale = _mm256_mul_ps(scales, _mm256_set1_ps(x.scale));
                _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), _mm256_mul_ps(_mm256_cvtepi32_ps(products), scale)));
            }
        }
    }
}

/// See [`super::groups::add_q4`].
///
/// # Safety
///
/// Needs AVX2 and F16C.
#[inline(always)]
pub unsafe fn add_q4_avx2(block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    // SAFETY: registers, and memory of the arrays: a block has 16 words of scales, 16 of mins and 4
    // steps of 32 words, a row of sums 32 values, of which eight lie at `8 * part`; features by the
    // caller.
    unsafe {
        let (ones, low) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
        for part in 0..COLUMNS / 8 {
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(4 * part).cast()));
            let mins = _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(COLUMNS / 2 + 4 * part).cast()));
            let mut codes = [_mm256_setzero_si256(); STEPS];
            for (step, codes) in codes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let both = _mm256_loadu_si256(block.as_ptr().add(COLUMNS + COLUMNS * step + 8 * part).cast());
                *codes = [_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16::<4>(both), low)];
            }
            for (x, sums) in x.iter().zip(sums.iter_mut()) {
                let mut pairs = _mm256_maddubs_epi16(codes[0], _mm256_set1_epi32(x.codes[0] as i32));
                for (codes, x) in codes[1..].iter().zip(&x.codes[1..]) {
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(*codes, _mm256_set1_epi32(*x as i32)));
                }
                let products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                let sum = sums.as_mut_ptr().add(8 * part);
                let scale = _mm256_mul_ps(scales, _mm256_set1_ps(x.scale));
                let scaled = _mm256_add_ps(_mm256_loadu_ps(sum), _mm256_mul_ps(products, scale));
                _mm256_storeu_ps(sum, _mm256_add_ps(scaled, _mm256_mul_ps(mins, _mm256_set1_ps(x.scaled_sum))));
            }
        }
    }
}

/// See [`super::groups::add_q8`].
///
/// # Safety
///
/// Needs AVX-512 F and VNNI.
#[inline(always)]
pub unsafe fn add_q8_vnni(block: &[u32; Q8_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    // SAFETY: as in `add_q8_avx2`, sixteen columns at `16 * part`.
    unsafe {
        let middle = _mm512_set1_epi8(-128);
        for part in 0..COLUMNS / 16 {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.as_ptr().add(8 * part).cast()));
            let mut codes = [_mm512_setzero_si512(); STEPS];
            for (step, codes) in codes.iter_mut().enumerate() {
                let signed = _mm512_loadu_si512(block.as_ptr().add(COLUMNS / 2 + COLUMNS * step + 16 * part).cast());
                *codes = _mm512_xor_si512(signed, middle);
            }
            for (x, sums) in x.iter().zip(sums.iter_mut()) {
                let mut products = _mm512_set1_epi32(x.offset);
                for (step, codes) in codes.iter().enumerate() {
                    products = _mm512_dpbusd_epi32(products, *codes, _mm512_set1_epi32(x.codes[step] as i32));
                }
                let sum = sums.as_mut_ptr().add(16 * part);
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scale));
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_mul_ps(_mm512_cvtepi32_ps(products), scale)));
            }
        }
    }
}

/// See [`super::groups::add_q4`].
///
/// # Safety
///
/// Needs AVX-512 F and VNNI.
#[inline(always)]
pub unsafe fn add_q4_vnni(block: &[u32; Q4_WORDS], x: &[ActivationGroup], sums: &mut [[f32; COLUMNS]]) {
    // SAFETY: as in `add_q4_avx2`, sixteen columns at `16 * part`.
    unsafe {
        let low = _mm512_set1_epi32(0x0f0f_0f0f);
        for part in 0..COLUMNS / 16 {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.as_ptr().add(8 * part).cast()));
            let mins = _mm512_cvtph_ps(_mm256_loadu_si256(block.as_ptr().add(COLUMNS / 2 + 8 * part).cast()));
            let mut codes = [_mm512_setzero_si512(); STEPS];
            for (step, codes) in codes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let both = _mm512_loadu_si512(block.as_ptr().add(COLUMNS + COLUMNS * step + 16 * part).cast());
                *codes = [_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi32::<4>(both), low)];
            }
            for (x, sums) in x.iter().zip(sums.iter_mut()) {
                let mut products = _mm512_setzero_si512();
                for (step, codes) in codes.iter().enumerate() {
                    products = _mm512_dpbusd_epi32(products, *codes, _mm512_set1_epi32(x.codes[step] as i32));
                }
                let sum = sums.as_mut_ptr().add(16 * part);
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scale));
                let scaled = _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_mul_ps(_mm512_cvtepi32_ps(products), scale));
                _mm512_storeu_ps(sum, _mm512_add_ps(scaled, _mm512_mul_ps(mins, _mm512_set1_ps(x.scaled_sum))));
            }
        }
    }
}
