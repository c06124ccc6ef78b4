//! Rotary positions: norms (where asked) and rotates q and k of fused rows in place, then writes k
//! and v to their slots.
//!
//! Rotation runs over rows and the writes over K/V heads, each of which writes one region of the
//! store, so neither needs a lock.
#![forbid(unsafe_code)]

use crate::backend::{HeadNorm, HeadShape, Rotation};
use crate::cpu::context::CpuContext;
use crate::cpu::kv::{Append, Kind, KvCache};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::plan::Plan;

/// Elements of qkv a task takes, a few microseconds.
const TASK_ELEMENTS: usize = 1 << 14;

/// See [`crate::backend::Backend::rope_append`].
pub fn rope_append(
    context: &CpuContext,
    plan: &Plan,
    heads: HeadShape,
    rotation: &Rotation<[f32]>,
    qkv: &mut [f32],
    layer: usize,
    kv: &mut KvCache,
) {
    let HeadShape { num_kv_heads, head_dim, .. } = heads;
    let rows = plan.num_rows();
    let width = heads.qkv_width();
    let qkv = &mut qkv[..rows * width];
    let Some(&last) = plan.positions.iter().max() else { return };

    let mut rotations = context.rotations();
    let table = rotations.table(rotation.rope, head_dim, last as usize + 1);
    let half = rotation.rope.rotary_dim(head_dim) / 2;
    let rows_at_once = (TASK_ELEMENTS / width).max(1);
    // An element costs about as much as sixteen multiply-adds of a product.
    context.pool_for(16 * rows * width).chunks(qkv, rows_at_once * width, &|i, rows| {
        let positions = &plan.positions[i * rows_at_once..];
        context.isa.run(Rotate { rows, width, heads, norm: rotation.norm.as_ref(), half, positions, table });
    });

    let layout = kv.layout;
    let (key_words, value_words) = kv.head_words();
    let (keys, values) = kv.layer_mut(layer);
    let qkv = &*qkv;
    let first_key = heads.q_width();
    let first_value = first_key + num_kv_heads * head_dim;
    let append = |kind: Kind, head: usize, words: &mut [u32]| {
        let first = head * head_dim + if kind == Kind::Keys { first_key } else { first_value };
        context.isa.run(Append { layout, kind, rows: qkv, width, first, head_dim, slots: &plan.slots, words });
    };
    let pool = context.pool_for(32 * rows * num_kv_heads * head_dim);
    pool.chunks_of_two((keys, key_words), (values, value_words), &|head, keys, values| {
        append(Kind::Keys, head, keys);
        append(Kind::Values, head, values);
    });
}

/// Norms and rotates the queries and keys of each row, head by head.
struct Rotate<'a> {
    rows: &'a mut [f32],
    width: usize,
    heads: HeadShape,
    norm: Option<&'a HeadNorm<'a, [f32]>>,
    /// R / 2.
    half: usize,
    positions: &'a [u32],
    table: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let HeadShape { num_heads, num_kv_heads, head_dim } = self.heads;
        let half = self.half;
        for (row, &position) in self.rows.chunks_exact_mut(self.width).zip(self.positions) {
            let (cos, sin) = self.table[position as usize * 2 * half..][..2 * half].split_at(half);
            for (h, head) in row[..(num_heads + num_kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some(norm) = self.norm {
                    rms(simd, head, if h < num_heads { norm.q } else { norm.k }, norm.eps);
                }
                // Elements from R on stay as they are, and so does the last of an odd R.
                let (low, high) = head[..2 * half].split_at_mut(half);
                let ((low, low_tail), (high, high_tail)) = (low.as_chunks_mut::<LANES>(), high.as_chunks_mut::<LANES>());
                let ((cos, cos_tail), (sin, sin_tail)) = (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
                for i in 0..low.len() {
                    let (a, b) = (simd.load(&low[i]), simd.load(&high[i]));
                    let (c, s) = (simd.load(&cos[i]), simd.load(&sin[i]));
                    simd.store(simd.sub(simd.mul(a, c), simd.mul(b, s)), &mut low[i]);
                    simd.store(simd.add(simd.mul(b, c), simd.mul(a, s)), &mut high[i]);
                }
                for i in 0..low_tail.len() {
                    let (a, b) = (low_tail[i], high_tail[i]);
                    low_tail[i] = a * cos_tail[i] - b * sin_tail[i];
                    high_tail[i] = b * cos_tail[i] + a * sin_tail[i];
                }
            }
        }
    }
}

/// One head in place: `x / sqrt(mean(x^2) + eps) * weight`.
#[inline(always)]
fn rms<S: Simd>(simd: S, head: &mut [f32], weight: &[f32], eps: f32) {
    let count = head.len() as f32;
    let (head, head_tail) = head.as_chunks_mut::<LANES>();
    let (weight, weight_tail) = weight.as_chunks::<LANES>();
    let mut squares = simd.splat(0.0);
    for x in &*head {
        squares = simd.fma(simd.load(x), simd.load(x), squares);
    }
    let tail: f32 = head_tail.iter().map(|x| x * x).sum();
    let scale = 1.0 / ((simd.sum(squares) + tail) / count + eps).sqrt();
    for (x, w) in head.iter_mut().zip(weight) {
        let unit = simd.mul(simd.load(x), simd.splat(scale));
        simd.store(simd.mul(unit, simd.load(w)), x);
    }
    for (x, w) in head_tail.iter_mut().zip(weight_tail) {
        *x = *x * scale * w;
    }
}
