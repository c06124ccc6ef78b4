//! What follows a product: bias, activation or sum, and the store of its tile.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::backend::Epilogue;
use crate::cpu::pool::Tile;
use crate::cpu::simd::{LANES, Simd};

/// A tile of the output, and what is done to sums before they get there.
pub(super) struct Output<'a, 'b> {
    pub tile: Tile<'b, f32>,
    pub bias: Option<&'a [f32]>,
    pub epilogue: Epilogue,
}

impl Output<'_, '_> {
    /// Takes complete sums, (rows, vectors), of the columns from `col` on.
    #[inline(always)]
    pub fn finish<S: Simd>(&mut self, simd: S, rows: Range<usize>, col: usize, vectors: usize, sums: &[[f32; LANES]]) {
        if self.epilogue == Epilogue::SwiGlu {
            self.finish_swiglu(simd, rows, col, vectors, sums);
        } else {
            self.finish_columns(simd, rows, col, vectors, sums);
        }
    }

    #[inline(always)]
    fn finish_columns<S: Simd>(&mut self, simd: S, rows: Range<usize>, col: usize, vectors: usize, sums: &[[f32; LANES]]) {
        let in_tile = col - self.tile.cols.start;
        let (epilogue, has_bias) = (self.epilogue, self.bias.is_some());
        let bias = self.bias.map_or(&[][..], |bias| &bias[col..]);
        let (bias, bias_tail) = bias.as_chunks::<LANES>();
        for (row, sums) in rows.zip(sums.chunks_exact(vectors)) {
            let (out, out_tail) = self.tile.row(row)[in_tile..].as_chunks_mut::<LANES>();
            for (v, sums) in sums.iter().enumerate().take(out.len() + 1) {
                let mut value = simd.load(sums);
                if has_bias {
                    let bias = match bias.get(v) {
                        Some(bias) => simd.load(bias),
                        None => load_tail(simd, bias_tail),
                    };
                    value = simd.add(value, bias);
                }
                if epilogue == Epilogue::Gelu {
                    value = simd.gelu_tanh(value);
                }
                match out.get_mut(v) {
                    Some(out) => {
                        if epilogue == Epilogue::Add {
                            value = simd.add(simd.load(out), value);
                        }
                        simd.store(value, out);
                    }
                    None => {
                        if epilogue == Epilogue::Add {
                            value = simd.add(load_tail(simd, out_tail), value);
                        }
                        let mut lanes = [0.0; LANES];
                        simd.store(value, &mut lanes);
                        out_tail.copy_from_slice(&lanes[..out_tail.len()]);
                    }
                }
            }
        }
    }

    /// Sixteen columns of sums make eight of output.
    #[inline(always)]
    fn finish_swiglu<S: Simd>(&mut self, simd: S, rows: Range<usize>, col: usize, vectors: usize, sums: &[[f32; LANES]]) {
        const PAIRS: usize = LANES / 2;
        let in_tile = col / 2 - self.tile.cols.start;
        let bias = self.bias.map_or(&[][..], |bias| &bias[col..]);
        for (row, sums) in rows.zip(sums.chunks_exact(vectors)) {
            let out = &mut self.tile.row(row)[in_tile..];
            for (v, (sums, out)) in sums.iter().zip(out.chunks_mut(PAIRS)).enumerate() {
                let (mut gate, mut up, mut value) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
                for i in 0..out.len() {
                    let at = |side: usize| sums[2 * i + side] + bias.get(v * LANES + 2 * i + side).copied().unwrap_or(0.0);
                    (gate[i], up[i]) = (at(0), at(1));
                }
                simd.store(simd.mul(simd.silu(simd.load(&gate)), simd.load(&up)), &mut value);
                out.copy_from_slice(&value[..out.len()]);
            }
        }
    }
}

/// Up to fifteen values, then zeros.
#[inline(always)]
fn load_tail<S: Simd>(simd: S, x: &[f32]) -> S::F {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    simd.load(&lanes)
}
