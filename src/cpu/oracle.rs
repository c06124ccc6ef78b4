//! Plain loops for every op of the seam: f64 accumulation, no tricks, simple enough to believe. Every backend is tested
//! against these on the same inputs; they ship so that a port can be checked where it runs.
//!
//! Slices in, slices or vectors out; shapes are those of `Backend`. The oracle of `decide` is [`crate::policy::decide_row`].
#![forbid(unsafe_code)]

use crate::backend::{DType, Epilogue, HeadNorm, HeadShape, Norm, NormKind, Rope, Rotation};
use crate::plan::Plan;

/// The value that `dtype` stores for `x`: bf16 rounds to nearest even.
pub fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// `out (T, k)`: row t is row `ids[t]` of `table (V, k)`, as stored.
pub fn embed(dtype: DType, ids: &[u32], table: &[f32], k: usize) -> Vec<f32> {
    ids.iter().flat_map(|&id| table[id as usize * k..][..k].iter().map(|&x| stored(dtype, x))).collect()
}

/// The norm of each row of `x (rows, C)`, C the length of its weight.
pub fn norm(x: &[f32], norm: &Norm<[f32]>) -> Vec<f64> {
    let Norm { kind, eps, weight, bias } = *norm;
    let width = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let mean = match kind {
            NormKind::Layer => row.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64,
            NormKind::Rms => 0.0,
        };
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        for (i, &v) in row.iter().enumerate() {
            out.push((f64::from(v) - mean) * scale * f64::from(weight[i]) + bias.map_or(0.0, |b| f64::from(b[i])));
        }
    }
    out
}

/// `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`.
pub fn gelu_tanh(v: f64) -> f64 {
    0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v)).tanh())
}

/// `epilogue(x (rows, k) weight (n, k)^T + bias)` onto a copy of `out (rows, n)`, (rows, n / 2) under SwiGlu; x and weight as `dtype` stores them.
pub fn linear(dtype: DType, x: &[f32], weight: &[f32], k: usize, bias: Option<&[f32]>, epilogue: Epilogue, out: &[f32]) -> Vec<f64> {
    let n = weight.len() / k;
    let mut result = Vec::with_capacity(out.len());
    for (t, row) in x.chunks_exact(k).enumerate() {
        let mut gate = 0.0;
        for (i, w) in weight.chunks_exact(k).enumerate() {
            let dot: f64 = row.iter().zip(w).map(|(&a, &b)| f64::from(stored(dtype, a)) * f64::from(stored(dtype, b))).sum();
            let value = dot + bias.map_or(0.0, |b| f64::from(b[i]));
            match epilogue {
                Epilogue::Store => result.push(value),
                Epilogue::Gelu => result.push(gelu_tanh(value)),
                Epilogue::Add => result.push(f64::from(out[t * n + i]) + value),
                Epilogue::SwiGlu if i % 2 == 0 => gate = value,
                Epilogue::SwiGlu => result.push(gate / (1.0 + (-gate).exp()) * value),
            }
        }
    }
    result
}

/// The f32 angle of pair `i` at `position`: the frequency is rounded to f32 before the product, and so is the product.
pub fn rope_angle(position: u32, rope: Rope, i: usize, head_dim: usize) -> f32 {
    position as f32 * rope.frequency(i, head_dim)
}

/// Norms and rotates q and k of every fused row in place and writes k and v as stored to `keys` and `values`, both (slots, K, D): one layer.
pub fn rope_append(
    dtype: DType,
    plan: &Plan,
    heads: HeadShape,
    rotation: &Rotation<[f32]>,
    qkv: &mut [f32],
    keys: &mut [f32],
    values: &mut [f32],
) {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let kv_width = num_kv_heads * head_dim;
    for (t, row) in qkv.chunks_exact_mut(heads.qkv_width()).take(plan.num_rows()).enumerate() {
        for (h, head) in row[..(num_heads + num_kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
            let mut exact: Vec<f64> = head.iter().map(|&v| f64::from(v)).collect();
            if let Some(HeadNorm { q, k, eps }) = &rotation.norm {
                let weight = if h < num_heads { q } else { k };
                exact = norm(head, &Norm { kind: NormKind::Rms, eps: *eps, weight, bias: None });
            }
            for i in 0..head_dim / 2 {
                let (sin, cos) = f64::from(rope_angle(plan.positions[t], rotation.rope, i, head_dim)).sin_cos();
                let (a, b) = (exact[i], exact[i + head_dim / 2]);
                exact[i] = a * cos - b * sin;
                exact[i + head_dim / 2] = b * cos + a * sin;
            }
            head.iter_mut().zip(exact).for_each(|(v, exact)| *v = exact as f32);
        }
        let slot = plan.slots[t] as usize;
        let kv = &row[heads.q_width()..];
        for j in 0..kv_width {
            keys[slot * kv_width + j] = stored(dtype, kv[j]);
            values[slot * kv_width + j] = stored(dtype, kv[kv_width + j]);
        }
    }
}

/// `out (T, H * D)`: attention of each row over keys [0, visible) of its own sequence; `keys` and `values` as in [`rope_append`].
pub fn attention(plan: &Plan, heads: HeadShape, page_size: usize, qkv: &[f32], keys: &[f32], values: &[f32]) -> Vec<f64> {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let mut out = vec![0.0; plan.num_rows() * heads.q_width()];
    for s in 0..plan.num_sequences() {
        let pages = &plan.pages[plan.page_indptr[s] as usize..plan.page_indptr[s + 1] as usize];
        for t in plan.indptr[s] as usize..plan.indptr[s + 1] as usize {
            for h in 0..num_heads {
                let q = &qkv[t * heads.qkv_width() + h * head_dim..][..head_dim];
                let at = |j: usize| {
                    let slot = pages[j / page_size] as usize * page_size + j % page_size;
                    (slot * num_kv_heads + h / (num_heads / num_kv_heads)) * head_dim
                };
                let visible = plan.visible[t] as usize;
                let dot = |j: usize| q.iter().zip(&keys[at(j)..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
                let scores: Vec<f64> = (0..visible).map(|j| dot(j) / (head_dim as f64).sqrt()).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let masses: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = masses.iter().sum();
                let row = &mut out[t * heads.q_width() + h * head_dim..][..head_dim];
                for (j, mass) in masses.iter().enumerate() {
                    for (o, &v) in row.iter_mut().zip(&values[at(j)..]) {
                        *o += mass / sum * f64::from(v);
                    }
                }
            }
        }
    }
    out
}
