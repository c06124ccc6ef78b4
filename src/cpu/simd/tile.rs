//! The register tile under every matrix product: M rows by NV vectors of columns, accumulated over k in ascending order.
//!
//! Every (M, NV) does the same instruction sequence per output element, so a row's result does not depend on how many rows
//! or columns share its tile. Closed over words: one f32, or two bf16 of neighbouring k.

use super::{LANES, Simd};

/// Most rows of a tile.
pub const MAX_ROWS: usize = 6;

/// `acc[m][v] += sum over steps of a[m][step] * b[v][step]`, steps ascending.
///
/// `a`: row m starts at word `m * a_stride`. `b[v]`: step s is sixteen words at `s * b_stride`. `ahead` is where lines are
/// prefetched, one per step; it may point anywhere.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn accumulate<S: Simd, const BF16: bool, const M: usize, const NV: usize>(
    simd: S,
    steps: usize,
    a: &[u32],
    a_stride: usize,
    b: [&[u32]; NV],
    b_stride: usize,
    ahead: *const u32,
    acc: &mut [[S::F; NV]; M],
) {
    if steps == 0 {
        return;
    }
    assert!((M - 1) * a_stride + steps <= a.len(), "tile reads {M} rows of {steps} words at stride {a_stride} from {}", a.len());
    for b in b {
        assert!((steps - 1) * b_stride + LANES <= b.len(), "tile reads {steps} vectors at stride {b_stride} from {} words", b.len());
    }
    let (a, b) = (a.as_ptr(), b.map(<[u32]>::as_ptr));
    // A local copy, indexed by constants once the loops unroll: behind the reference every sum is stored in every step.
    let mut sums = *acc;
    for step in 0..steps {
        simd.prefetch(ahead.wrapping_add(step * LANES));
        let mut columns = [simd.word(0); NV];
        for v in 0..NV {
            // SAFETY: `step < steps`, and the assertion above bounds the last vector of each `b[v]`.
            columns[v] = simd.words(unsafe { &*b[v].add(step * b_stride).cast() });
        }
        for (m, row) in sums.iter_mut().enumerate() {
            // SAFETY: `m < M` and `step < steps`; the assertion above bounds the last word of the last row.
            let x = simd.word(unsafe { *a.add(m * a_stride + step) });
            for v in 0..NV {
                row[v] = if BF16 { simd.step_bf16(row[v], x, columns[v]) } else { simd.step_f32(row[v], x, columns[v]) };
            }
        }
    }
    *acc = sums;
}
