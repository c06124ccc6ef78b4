//! The CPU backend: portable loops over flat buffers.
#![forbid(unsafe_code)]

pub mod oracle;

use crate::backend::{Backend, DType, Decision, Draw, Epilogue, HeadShape, KvShape, RowSource};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::policy;

/// The CPU as a [`Backend`].
pub struct Cpu {
    dtype: DType,
}

impl Cpu {
    /// `threads` counts the calling thread; 0 means one per available core.
    pub fn new(_threads: usize, dtype: DType) -> Result<Cpu> {
        Ok(Cpu { dtype })
    }
}

/// An (n, k) weight, row-major.
pub struct Matrix {
    n: usize,
    k: usize,
    data: Vec<f32>,
}

/// (layer, slot, K, D) keys and values.
pub struct KvCache {
    shape: KvShape,
    keys: Vec<f32>,
    values: Vec<f32>,
}

const LANES: usize = 16;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

fn gelu_tanh(v: f32) -> f32 {
    0.5 * v * (1.0 + (0.797_884_6 * (v + 0.044715 * v * v * v)).tanh())
}

impl Cpu {
    fn load(&self, n: usize, k: usize, source: &mut RowSource) -> Result<Matrix> {
        let mut data = vec![0.0; n * k];
        for first in (0..n).step_by(64) {
            source(first, &mut data[first * k..(first + 64).min(n) * k])?;
        }
        for x in &mut data {
            *x = oracle::stored(self.dtype, *x);
        }
        Ok(Matrix { n, k, data })
    }

    fn product(&self, rows: usize, x: &[f32], weight: &Matrix, mut emit: impl FnMut(usize, usize, f32)) {
        let x: Vec<f32> = x[..rows * weight.k].iter().map(|&v| oracle::stored(self.dtype, v)).collect();
        for (i, w) in weight.data.chunks_exact(weight.k).enumerate() {
            for (t, row) in x.chunks_exact(weight.k).enumerate() {
                emit(t, i, dot(row, w));
            }
        }
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type KvCache = KvCache;
    type Batch = Plan;

    fn name(&self) -> String {
        "cpu (portable, 1 thread)".into()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn alloc(&self, len: usize) -> Result<Self::Buffer> {
        Ok(vec![0.0; len])
    }

    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<()> {
        dst.copy_from_slice(&src[offset..offset + dst.len()]);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn vector(&self, src: &[f32]) -> Result<Self::Vector> {
        Ok(src.to_vec())
    }

    fn matrix(&self, n: usize, k: usize, source: &mut RowSource) -> Result<Self::Matrix> {
        self.load(n, k, source)
    }

    fn table(&self, n: usize, k: usize, source: &mut RowSource) -> Result<Self::Matrix> {
        self.load(n, k, source)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache> {
        let len = shape.num_layers * shape.num_pages * shape.page_size * shape.num_kv_heads * shape.head_dim;
        Ok(KvCache { shape, keys: vec![f32::NAN; len], values: vec![f32::NAN; len] })
    }

    fn copy_page(&self, kv: &mut Self::KvCache, src: u32, dst: u32) -> Result<()> {
        let s = kv.shape;
        let page = s.page_size * s.num_kv_heads * s.head_dim;
        for layer in 0..s.num_layers {
            let base = layer * s.num_pages;
            let (from, to) = ((base + src as usize) * page, (base + dst as usize) * page);
            kv.keys.copy_within(from..from + page, to);
            kv.values.copy_within(from..from + page, to);
        }
        Ok(())
    }

    fn poison_page(&self, kv: &mut Self::KvCache, page: u32) -> Result<()> {
        let s = kv.shape;
        let len = s.page_size * s.num_kv_heads * s.head_dim;
        for layer in 0..s.num_layers {
            let at = (layer * s.num_pages + page as usize) * len;
            kv.keys[at..at + len].fill(f32::NAN);
            kv.values[at..at + len].fill(f32::NAN);
        }
        Ok(())
    }

    fn batch(&self, plan: &Plan) -> Result<Self::Batch> {
        Ok(plan.clone())
    }

    fn embed(&self, batch: &Self::Batch, table: &Self::Matrix, out: &mut Self::Buffer) -> Result<()> {
        for (row, &id) in out.chunks_exact_mut(table.k).zip(&batch.ids) {
            row.copy_from_slice(&table.data[id as usize * table.k..][..table.k]);
        }
        Ok(())
    }

    fn layer_norm(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Vector,
        bias: Option<&Self::Vector>,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).take(rows) {
            let mean = (x.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64) as f32;
            let variance = x.iter().map(|&v| f64::from(v - mean) * f64::from(v - mean)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance as f32 + eps).sqrt();
            for i in 0..width {
                out[i] = (x[i] - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i]);
            }
        }
        Ok(())
    }

    fn linear(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let n = weight.n;
        self.product(rows, x, weight, |t, i, dot| {
            let value = dot + bias.map_or(0.0, |b| b[i]);
            let out = &mut out[t * n + i];
            *out = match epilogue {
                Epilogue::Store => value,
                Epilogue::Gelu => gelu_tanh(value),
                Epilogue::Add => *out + value,
            };
        });
        Ok(())
    }

    fn rope_append(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        base: f32,
        qkv: &mut Self::Buffer,
        layer: usize,
        kv: &mut Self::KvCache,
    ) -> Result<()> {
        let s = kv.shape;
        let len = s.num_pages * s.page_size * s.num_kv_heads * s.head_dim;
        let layer = layer * len..(layer + 1) * len;
        oracle::rope_append(self.dtype, batch, heads, base, qkv, &mut kv.keys[layer.clone()], &mut kv.values[layer]);
        Ok(())
    }

    fn attention(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        qkv: &Self::Buffer,
        layer: usize,
        kv: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let s = kv.shape;
        let len = s.num_pages * s.page_size * s.num_kv_heads * s.head_dim;
        let layer = layer * len..(layer + 1) * len;
        let result = oracle::attention(batch, heads, s.page_size, qkv, &kv.keys[layer.clone()], &kv.values[layer]);
        for (o, r) in out.iter_mut().zip(result) {
            *o = r as f32;
        }
        Ok(())
    }

    fn gather(&self, rows: &[u32], width: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()> {
        for (out, &row) in out.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&x[row as usize * width..][..width]);
        }
        Ok(())
    }

    fn decide(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Matrix,
        bias: Option<&Self::Vector>,
        banned: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<Decision>> {
        let mut decisions = Vec::with_capacity(draws.len());
        for (first, draws) in (0..).step_by(32).zip(draws.chunks(32)) {
            let mut logits = vec![0.0; draws.len() * head.n];
            self.product(draws.len(), &hidden[first * head.k..], head, |t, i, dot| {
                logits[t * head.n + i] = dot + bias.map_or(0.0, |b| b[i]);
            });
            for (t, (row, draw)) in logits.chunks_exact(head.n).zip(draws).enumerate() {
                let decision = policy::decide_row(row, banned, draw).map_err(|error| match error {
                    Error::Kernel { what } => Error::kernel(format!("row {}: {what}", first + t)),
                    other => other,
                })?;
                decisions.push(decision);
            }
        }
        Ok(decisions)
    }
}
