//! Plain loops for every op of the seam: f64 accumulation, no tricks, simple enough to believe.
//! Every backend is tested against these on the same inputs; they ship so that a port can be
//! checked where it runs.
//!
//! Slices in, slices or vectors out; shapes are those of `Backend`. The oracle of `sample` is
//! [`crate::sampling::sample_row`].
#![forbid(unsafe_code)]

use crate::backend::groups::{GROUP, Group4, Group8};
use crate::backend::{
    DType, Epilogue, ExpertShape, HeadNorm, HeadShape, Norm, NormKind, Rope, Rotation, Router, RouterScore, WeightFormat,
};
use crate::cpu::simd::groups::ActivationGroup;
use crate::plan::Plan;

/// The value that `dtype` stores for `x`: bf16 rounds to nearest even.
pub fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// What `format` keeps of the rows of `values (n, k)`.
///
/// Panics: values that no group holds.
pub fn kept(format: WeightFormat, values: &[f32], k: usize) -> Vec<f32> {
    let group = |values: &[f32]| -> Vec<f32> {
        let mut group = [values[values.len() - 1]; GROUP];
        group[..values.len()].copy_from_slice(values);
        let kept = match format {
            WeightFormat::Q8 => Group8::of(&group).expect("values of a weight").values(),
            WeightFormat::Q4 => Group4::of(&group).expect("values of a weight").values(),
            WeightFormat::F32 => group.map(|x| stored(DType::F32, x)),
            WeightFormat::Bf16 => group.map(|x| stored(DType::Bf16, x)),
        };
        kept[..values.len()].to_vec()
    };
    values.chunks_exact(k).flat_map(|row| row.chunks(GROUP)).flat_map(group).collect()
}

/// What the CPU's products with weights in groups keep of the rows of `x (rows, k)`.
pub fn kept_activations(x: &[f32], k: usize) -> Vec<f32> {
    let group = |values: &[f32]| -> Vec<f32> {
        let mut group = [0.0; GROUP];
        group[..values.len()].copy_from_slice(values);
        let kept = ActivationGroup::of(&group);
        (0..values.len()).map(|i| kept.scale * kept.code(i) as f32).collect()
    };
    x.chunks_exact(k).flat_map(|row| row.chunks(GROUP)).flat_map(group).collect()
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

/// `epilogue(x (rows, k) weight (n, k)^T + bias)` onto a copy of `out (rows, n)`, (rows, n / 2)
/// under SwiGlu; x and weight as `dtype` stores them.
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

/// The experts of each row of `logits (T, E)` with their weights, (T, k), experts ascending.
pub fn route(shape: ExpertShape, router: &Router<[f32]>, logits: &[f32]) -> Vec<(u32, f64)> {
    let ExpertShape { num_experts, top_k, .. } = shape;
    let mut out = Vec::new();
    for row in logits.chunks_exact(num_experts) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scores: Vec<f64> = match router.score {
            RouterScore::Softmax { .. } => row.iter().map(|&l| (f64::from(l) - f64::from(max)).exp()).collect(),
            RouterScore::Sigmoid { .. } => row.iter().map(|&l| 1.0 / (1.0 + (-f64::from(l)).exp())).collect(),
        };
        let keys: Vec<f64> = match router.score {
            RouterScore::Softmax { .. } => row.iter().map(|&l| f64::from(l)).collect(),
            RouterScore::Sigmoid { .. } => {
                scores.iter().enumerate().map(|(e, s)| s + router.bias.map_or(0.0, |bias| f64::from(bias[e]))).collect()
            }
        };
        // The largest first, of equal ones the lower index.
        let ranked = |keys: &[f64]| {
            let mut order: Vec<usize> = (0..keys.len()).collect();
            order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]).then(a.cmp(&b)));
            order
        };
        let mut order = ranked(&keys);
        if let RouterScore::Sigmoid { num_groups, top_groups, .. } = router.score
            && num_groups > 1
        {
            let size = num_experts / num_groups;
            let two_best = |group: &[f64]| ranked(group).iter().take(2).map(|&e| group[e]).sum();
            let groups: Vec<f64> = keys.chunks_exact(size).map(two_best).collect();
            let kept = &ranked(&groups)[..top_groups];
            order.retain(|e| kept.contains(&(e / size)));
        }
        let mut chosen = order[..top_k].to_vec();
        chosen.sort_unstable();
        let all: f64 = scores.iter().sum();
        let sum: f64 = chosen.iter().map(|&e| scores[e]).sum();
        out.extend(chosen.iter().map(|&e| match router.score {
            RouterScore::Softmax { renormalise: true } => (e as u32, scores[e] / sum),
            RouterScore::Softmax { renormalise: false } => (e as u32, scores[e] / all),
            RouterScore::Sigmoid { scale, .. } => (e as u32, scores[e] / (sum + 1e-20) * f64::from(scale)),
        }));
    }
    out
}

/// `out (T, C)` plus what the chosen experts (T, k) make of `x (T, C)`; `up` (E, 2F, C), gate and
/// up in turn, `down` (E, C, F), as `dtype` stores them, and so are the F values between the two.
pub fn moe(dtype: DType, shape: ExpertShape, choices: &[(u32, f64)], x: &[f32], up: &[f32], down: &[f32], out: &[f32]) -> Vec<f64> {
    let ExpertShape { top_k, hidden_dim: c, expert_dim: f, .. } = shape;
    let mut result: Vec<f64> = out.iter().map(|&v| f64::from(v)).collect();
    for ((row, result), choices) in x.chunks_exact(c).zip(result.chunks_exact_mut(c)).zip(choices.chunks_exact(top_k)) {
        for &(expert, weight) in choices {
            let expert = expert as usize;
            let inner = linear(dtype, row, &up[expert * 2 * f * c..][..2 * f * c], c, None, Epilogue::SwiGlu, &[]);
            let inner: Vec<f32> = inner.iter().map(|&v| v as f32).collect();
            let outer = linear(dtype, &inner, &down[expert * c * f..][..c * f], f, None, Epilogue::Store, &[]);
            result.iter_mut().zip(outer).for_each(|(result, value)| *result += weight * value);
        }
    }
    result
}

/// The f32 angle of pair `i` at `position`: the frequency is rounded to f32 before the product, and
/// so is the product.
pub fn rope_angle(position: u32, rope: Rope, i: usize, head_dim: usize) -> f32 {
    position as f32 * rope.frequency(i, head_dim)
}

/// Norms and rotates q and k of every fused row in place and writes k and v as stored to `keys` and
/// `values`, both (slots, K, D): one layer.
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
            let half = rotation.rope.rotary_dim(head_dim) / 2;
            for i in 0..half {
                let (sin, cos) = f64::from(rope_angle(plan.positions[t], rotation.rope, i, head_dim)).sin_cos();
                let (a, b) = (exact[i], exact[i + half]);
                exact[i] = a * cos - b * sin;
                exact[i + half] = b * cos + a * sin;
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

/// `out (T, H * D)`: attention of each row over keys [0, visible) of its own sequence; `keys` and
/// `values` as in [`rope_append`].
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
