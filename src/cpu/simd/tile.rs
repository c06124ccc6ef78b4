//! The register tile under every matrix product: M rows by NV vectors of columns, accumulated over
//! k in ascending order.
//!
//! Every (M, NV) does the same instruction sequence per output element, so a row's result does not
//! depend on how many rows or columns share its tile. Closed over words: one f32, or two bf16 of
//! neighbouring k. Each tile is a function of its own, called with its operands in memory: a call
//! costs a few nanoseconds, and the crate compiles in a third of the time.

use crate::cpu::simd::vector::{Kernel, LANES, Simd};

/// Some steps of b: vector v of step s is the sixteen words at `s * b_stride` of `b[v]`.
#[derive(Clone, Copy)]
pub struct Piece<'a, const NV: usize> {
    pub steps: usize,
    pub b: [&'a [u32]; NV],
}

/// `sums[m][v] (+)= sum over steps of a[m][step] b[v][step]`, steps ascending through the pieces.
pub struct Product<'a, const NV: usize> {
    /// Row m starts at word `m * a_stride`; [`Simd::x_words`] words a step.
    pub a: &'a [u32],
    pub a_stride: usize,
    pub pieces: &'a [Piece<'a, NV>],
    pub b_stride: usize,
    /// Row m starts at vector `m * sums_stride`.
    pub sums: &'a mut [[f32; LANES]],
    pub sums_stride: usize,
    /// Start from zeros instead of from `sums`.
    pub fresh: bool,
    /// Words that the steps prefetch: never what lies outside of a buffer, since an address that is
    /// not mapped costs a page walk (59 ns on a virtual machine, a step takes 2 to 5).
    pub ahead: &'a [u32],
    /// Words by which a step asks for more of them than the one before.
    pub ahead_step: usize,
}

impl<const NV: usize> Product<'_, NV> {
    /// One to six rows, up to `PF` lines prefetched per step.
    #[inline(always)]
    pub fn run<S: Simd, const BF16: bool, const PF: usize>(self, simd: S, rows: usize) {
        match rows {
            1 => simd.outlined(Tile::<BF16, 1, NV, PF>(self)),
            2 => simd.outlined(Tile::<BF16, 2, NV, PF>(self)),
            3 => simd.outlined(Tile::<BF16, 3, NV, PF>(self)),
            4 => simd.outlined(Tile::<BF16, 4, NV, PF>(self)),
            5 => simd.outlined(Tile::<BF16, 5, NV, PF>(self)),
            6 => simd.outlined(Tile::<BF16, 6, NV, PF>(self)),
            _ => panic!("a tile of {rows} rows"),
        }
    }
}

impl Product<'_, 2> {
    /// Seven to twelve rows.
    #[inline(always)]
    pub fn run_tall<S: Simd, const BF16: bool>(self, simd: S, rows: usize) {
        match rows {
            7 => simd.outlined(Tile::<BF16, 7, 2, 1>(self)),
            8 => simd.outlined(Tile::<BF16, 8, 2, 1>(self)),
            9 => simd.outlined(Tile::<BF16, 9, 2, 1>(self)),
            10 => simd.outlined(Tile::<BF16, 10, 2, 1>(self)),
            11 => simd.outlined(Tile::<BF16, 11, 2, 1>(self)),
            12 => simd.outlined(Tile::<BF16, 12, 2, 1>(self)),
            _ => panic!("a tall tile of {rows} rows"),
        }
    }
}

impl Product<'_, 8> {
    /// One or two rows; three would need 33 registers.
    #[inline(always)]
    pub fn run_wide<S: Simd, const BF16: bool>(self, simd: S, rows: usize) {
        match rows {
            1 => simd.outlined(Tile::<BF16, 1, 8, 1>(self)),
            2 => simd.outlined(Tile::<BF16, 2, 8, 1>(self)),
            _ => panic!("a wide tile of {rows} rows"),
        }
    }
}

struct Tile<'a, const BF16: bool, const M: usize, const NV: usize, const PF: usize>(Product<'a, NV>);

impl<const BF16: bool, const M: usize, const NV: usize, const PF: usize> Kernel for Tile<'_, BF16, M, NV, PF> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Product { a, a_stride, pieces, b_stride, sums: memory, sums_stride, fresh, ahead, ahead_step } = self.0;
        let mut sums = [[simd.splat(0.0); NV]; M];
        if !fresh {
            for (m, row) in sums.iter_mut().enumerate() {
                let memory = &memory[m * sums_stride..][..NV];
                for v in 0..NV {
                    row[v] = simd.load(&memory[v]);
                }
            }
        }
        let total: usize = pieces.iter().map(|piece| piece.steps).sum();
        assert!(PF == 0 || total * ahead_step <= ahead.len(), "a tile prefetches {total} x {ahead_step} of {} words", ahead.len());
        let mut first = 0;
        for piece in pieces {
            let steps = piece.steps;
            let reads = (M - 1) * a_stride + (first + steps) * S::x_words(BF16);
            assert!(reads <= a.len(), "a tile reads {M} rows of {steps} words at {first}, stride {a_stride}, from {}", a.len());
            let reads = if steps == 0 { 0 } else { (steps - 1) * b_stride + LANES };
            for b in piece.b {
                assert!(reads <= b.len(), "a tile reads {steps} vectors at stride {b_stride} from {} words", b.len());
            }
            for step in 0..steps {
                for line in 0..PF {
                    let word = (first + step) * ahead_step + line * LANES;
                    simd.prefetch(ahead.as_ptr().addr() + word * size_of::<u32>());
                }
                let mut columns = [simd.word(0); NV];
                for (column, b) in columns.iter_mut().zip(piece.b) {
                    // SAFETY: `step < steps`; the second assertion bounds the last vector of each
                    // `b[v]`.
                    *column = simd.words(unsafe { &*b.as_ptr().add(step * b_stride).cast() });
                }
                for half in 0..S::x_words(BF16) {
                    let mut halves = [simd.splat(0.0); NV];
                    if S::x_words(BF16) == 2 {
                        for (wide, pairs) in halves.iter_mut().zip(columns) {
                            *wide = if half == 0 { simd.low_halves(pairs) } else { simd.high_halves(pairs) };
                        }
                    }
                    for (m, row) in sums.iter_mut().enumerate() {
                        let word = m * a_stride + (first + step) * S::x_words(BF16) + half;
                        // SAFETY: `m < M`, `step < steps` and `half < x_words`; the first assertion
                        // bounds the last word of the last row.
                        let x = unsafe { *a.as_ptr().add(word) };
                        for v in 0..NV {
                            row[v] = match (BF16, S::MULTIPLIES_PAIRS) {
                                (false, _) => simd.step_f32(row[v], simd.word(x), columns[v]),
                                (true, true) => simd.step_bf16(row[v], simd.word(x), columns[v]),
                                (true, false) => simd.fma(simd.splat(f32::from_bits(x)), halves[v], row[v]),
                            };
                        }
                    }
                }
            }
            first += steps;
        }
        for (m, row) in sums.iter().enumerate() {
            let memory = &mut memory[m * sums_stride..][..NV];
            for v in 0..NV {
                simd.store(row[v], &mut memory[v]);
            }
        }
    }
}
