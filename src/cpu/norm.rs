//! Norms of rows: one pass for the mean (LayerNorm alone), one for the squares, one to write.
#![forbid(unsafe_code)]

use crate::backend::{Norm, NormKind};
use crate::cpu::context::CpuContext;
use crate::cpu::simd::{Kernel, LANES, Simd};

/// Rows of a task: about 16 K elements, a few microseconds.
const TASK_ELEMENTS: usize = 1 << 14;

/// See [`crate::backend::Backend::norm`]; `x` and `out` are (rows, C), C the length of the norm's
/// weight.
pub fn norm(context: &CpuContext, x: &[f32], norm: &Norm<[f32]>, out: &mut [f32]) {
    let Norm { kind, eps, weight, bias } = *norm;
    let width = weight.len();
    let rows_at_once = (TASK_ELEMENTS / width).max(1);
    // An element costs about as much as sixteen multiply-adds of a product.
    context.pool_for(16 * out.len()).chunks(out, rows_at_once * width, &|i, out| {
        let x = &x[i * rows_at_once * width..][..out.len()];
        context.isa.run(Rows { kind, x, weight, bias, eps, out });
    });
}

struct Rows<'a> {
    kind: NormKind,
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let count = width as f32;
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        let (bias, bias_tail) = self.bias.unwrap_or(&[]).as_chunks::<LANES>();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (out, out_tail) = out.as_chunks_mut::<LANES>();

            let mean = if self.kind == NormKind::Layer {
                let mut sum = simd.splat(0.0);
                for x in x {
                    sum = simd.add(sum, simd.load(x));
                }
                let mut tail = 0.0;
                for x in x_tail {
                    tail += x;
                }
                (simd.sum(sum) + tail) / count
            } else {
                0.0
            };

            let mut squares = simd.splat(0.0);
            for x in x {
                let centred = simd.sub(simd.load(x), simd.splat(mean));
                squares = simd.fma(centred, centred, squares);
            }
            let mut tail = 0.0;
            for x in x_tail {
                tail += (x - mean) * (x - mean);
            }
            let scale = 1.0 / ((simd.sum(squares) + tail) / count + self.eps).sqrt();

            for (i, (x, out)) in x.iter().zip(out).enumerate() {
                let unit = simd.mul(simd.sub(simd.load(x), simd.splat(mean)), simd.splat(scale));
                let shift = match bias.get(i) {
                    Some(bias) => simd.load(bias),
                    None => simd.splat(0.0),
                };
                simd.store(simd.fma(unit, simd.load(&weight[i]), shift), out);
            }
            for (i, (x, out)) in x_tail.iter().zip(out_tail).enumerate() {
                *out = (x - mean) * scale * weight_tail[i] + bias_tail.get(i).copied().unwrap_or(0.0);
            }
        }
    }
}
