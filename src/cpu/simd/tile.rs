//! The register tile under every matrix product: M rows by NV vectors of columns, accumulated over k in ascending order.
//!
//! Every (M, NV) does the same instruction sequence per output element, so a row's result does not depend on how many rows
//! or columns share its tile. Closed over words: one f32, or two bf16 of neighbouring k.

use super::{LANES, Simd};

/// `acc[m][v] += sum over steps of a[m][step] * b[v][step]`, steps ascending.
///
/// `a`: row m starts at word `m * a_stride`. `b[v]`: step s is sixteen words at `s * b_stride`. `ahead`: each
/// step prefetches PF lines from PF times the step lines past this address, which may be any.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn accumulate<S: Simd, const BF16: bool, const M: usize, const NV: usize, const PF: usize>(
    simd: S,
    steps: usize,
    a: &[u32],
    a_stride: usize,
    b: [&[u32]; NV],
    b_stride: usize,
    ahead: usize,
    acc: [[S::F; NV]; M],
) -> [[S::F; NV]; M] {
    check(M, steps, a, a_stride);
    let mut columns = [std::ptr::null(); NV];
    for v in 0..NV {
        check_columns(steps, b[v], b_stride);
        columns[v] = b[v].as_ptr();
    }
    // SAFETY: checked above.
    unsafe { walk::<S, BF16, M, NV, PF>(simd, steps, a.as_ptr(), a_stride, columns, b_stride, ahead, acc) }
}

/// As [`accumulate`] over the steps of several pieces of b, one after the other; the vectors of a piece begin at `column`
/// and lie side by side.
#[inline(always)]
pub fn accumulate_pieces<S: Simd, const BF16: bool, const M: usize, const NV: usize>(
    simd: S,
    a: &[u32],
    a_stride: usize,
    pieces: &[(usize, &[u32])],
    column: usize,
    b_stride: usize,
    mut acc: [[S::F; NV]; M],
) -> [[S::F; NV]; M] {
    let mut first = 0;
    for &(steps, b) in pieces {
        if steps == 0 {
            continue;
        }
        let b = &b[column..];
        check(M, first + steps, a, a_stride);
        check_columns(steps, &b[(NV - 1) * LANES..], b_stride);
        let mut columns = [b.as_ptr(); NV];
        for (v, column) in columns.iter_mut().enumerate() {
            *column = column.wrapping_add(v * LANES);
        }
        // SAFETY: checked above.
        acc = unsafe { walk::<S, BF16, M, NV, 0>(simd, steps, a.as_ptr().add(first), a_stride, columns, b_stride, 0, acc) };
        first += steps;
    }
    acc
}

#[inline(always)]
fn check(rows: usize, steps: usize, a: &[u32], a_stride: usize) {
    assert!((rows - 1) * a_stride + steps <= a.len(), "tile reads {rows} rows of {steps} words at stride {a_stride} from {}", a.len());
}

#[inline(always)]
fn check_columns(steps: usize, b: &[u32], b_stride: usize) {
    let read = if steps == 0 { 0 } else { (steps - 1) * b_stride + LANES };
    assert!(read <= b.len(), "tile reads {steps} vectors at stride {b_stride} from {} words", b.len());
}

/// # Safety
/// For every step below `steps`, `m < M` and `v < NV`: the word `a[m * a_stride + step]` and the sixteen words at
/// `b[v] + step * b_stride` can be read.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn walk<S: Simd, const BF16: bool, const M: usize, const NV: usize, const PF: usize>(
    simd: S,
    steps: usize,
    a: *const u32,
    a_stride: usize,
    b: [*const u32; NV],
    b_stride: usize,
    ahead: usize,
    acc: [[S::F; NV]; M],
) -> [[S::F; NV]; M] {
    // By value and indexed by constants once the loops unroll: behind a reference every sum is stored in every step.
    let mut sums = acc;
    for step in 0..steps {
        for line in 0..PF {
            simd.prefetch(ahead.wrapping_add((step * PF + line) * LANES * size_of::<u32>()));
        }
        let mut columns = [simd.word(0); NV];
        for v in 0..NV {
            // SAFETY: the caller's promise.
            columns[v] = simd.words(unsafe { &*b[v].add(step * b_stride).cast() });
        }
        for (m, row) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let x = simd.word(unsafe { *a.add(m * a_stride + step) });
            for v in 0..NV {
                row[v] = if BF16 { simd.step_bf16(row[v], x, columns[v]) } else { simd.step_f32(row[v], x, columns[v]) };
            }
        }
    }
    sums
}
