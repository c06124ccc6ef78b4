//! Way of a checkpoint's tensors into packed weights: which rows of which tensor become
//! which rows of a matrix, and how far loading is. Which tensors there are is a family's business.
#![forbid(unsafe_code)]

use crate::backend::{Backend, WeightShape};
use crate::error::Result;
use crate::model::layers::{Linear, NormWeights};
use crate::weights::{Tensor, Weights};

/// Called before each tensor is read: bytes of the tensors before it, bytes in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Reads tensors whole and packs matrices, counting the bytes that were read.
pub(super) struct WeightLoader<'a, B: Backend> {
    pub backend: &'a B,
    weights: &'a Weights,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

impl<'a, B: Backend> WeightLoader<'a, B> {
    /// Shapes first: a checkpoint that lacks one of the `expected` tensors is refused before
    /// anything is packed.
    pub fn new(backend: &'a B, weights: &'a Weights, progress: Progress<'a>, expected: &[(String, Vec<usize>)]) -> Result<Self> {
        weights.check(expected)?;
        let bytes = |(name, shape): &(String, Vec<usize>)| weights.tensor(name, shape).map(|tensor| tensor.num_bytes());
        let total = expected.iter().map(bytes).sum::<Result<usize>>()?;
        Ok(WeightLoader { backend, weights, progress, done: 0, total })
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.weights.tensor(name, shape)?;
        // What was asked for before has been read by now; this one is about to be.
        (self.progress)(self.done.min(self.total), self.total);
        self.done += tensor.num_bytes();
        Ok(tensor)
    }

    pub fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])?.to_vec()
    }

    /// An (n, k) table for lookups.
    pub fn table(&mut self, name: &str, n: usize, k: usize) -> Result<B::Weight> {
        let tensor = self.tensor(name, &[n, k])?;
        self.backend.weight(WeightShape::Table { n, k }, &|first, dst| tensor.read(first * k, dst))
    }

    /// Packs an (n, k) weight, each row multiplied by its gate.
    pub fn matrix(&mut self, name: &str, n: usize, k: usize, gate: Option<&[f32]>) -> Result<B::Weight> {
        let tensor = self.tensor(name, &[n, k])?;
        self.backend.weight(WeightShape::Matrix { n, k }, &|first, dst| {
            tensor.read(first * k, dst)?;
            if let Some(gate) = gate {
                for (row, gate) in dst.chunks_exact_mut(k).zip(&gate[first..]) {
                    row.iter_mut().for_each(|v| *v *= gate);
                }
            }
            Ok(())
        })
    }

    /// Packs `k` columns from `first_column` on of an (n, width) weight.
    pub fn columns(&mut self, name: &str, n: usize, width: usize, first_column: usize, k: usize) -> Result<B::Weight> {
        let tensor = self.tensor(name, &[n, width])?;
        self.backend.weight(WeightShape::Matrix { n, k }, &|first, dst| {
            let mut rows = dst.chunks_exact_mut(k).enumerate();
            rows.try_for_each(|(i, row)| tensor.read((first + i) * width + first_column, row))
        })
    }

    /// Packs an (n, k) weight that is stored as (k, n).
    pub fn transposed(&mut self, name: &str, n: usize, k: usize) -> Result<B::Weight> {
        let values = self.tensor(name, &[k, n])?.to_vec()?;
        self.backend.weight(WeightShape::Matrix { n, k }, &|first, dst| {
            // Of each stored row, the stretch that belongs to the asked ones.
            let height = dst.len() / k;
            for (i, stored) in values.chunks_exact(n).enumerate() {
                for (row, value) in dst[i..].iter_mut().step_by(k).zip(&stored[first..first + height]) {
                    *row = *value;
                }
            }
            Ok(())
        })
    }

    /// Packs weights of (rows, k) each as one matrix, one below the other.
    pub fn stacked(&mut self, parts: &[(String, usize)], k: usize) -> Result<B::Weight> {
        let mut tensors = Vec::with_capacity(parts.len());
        let mut n = 0;
        for (name, rows) in parts {
            tensors.push((n..n + rows, self.tensor(name, &[*rows, k])?));
            n += rows;
        }
        self.backend.weight(WeightShape::Matrix { n, k }, &|first, dst| {
            let end = first + dst.len() / k;
            for (rows, tensor) in &tensors {
                let shared = rows.start.max(first)..rows.end.min(end);
                if !shared.is_empty() {
                    tensor.read((shared.start - rows.start) * k, &mut dst[(shared.start - first) * k..(shared.end - first) * k])?;
                }
            }
            Ok(())
        })
    }

    /// Packs two (n, k) weights as one of (2n, k): row 2j is row j of `even`, row 2j + 1 is row j
    /// of `odd`.
    pub fn interleaved(&mut self, even: &str, odd: &str, n: usize, k: usize) -> Result<B::Weight> {
        let tensors = [self.tensor(even, &[n, k])?, self.tensor(odd, &[n, k])?];
        self.backend.weight(WeightShape::Matrix { n: 2 * n, k }, &|first, dst| read_interleaved(&tensors, first, k, dst))
    }

    /// Packs (n, k) weights, one of each expert.
    pub fn stack(&mut self, names: &[String], n: usize, k: usize) -> Result<B::Weight> {
        let tensors = names.iter().map(|name| self.tensor(name, &[n, k])).collect::<Result<Vec<_>>>()?;
        let read = |expert: usize, row: usize, dst: &mut [f32]| tensors[expert].read(row * k, dst);
        self.backend.weight(WeightShape::Experts { num: names.len(), n, k }, &|first, dst| by_expert(first, n, k, dst, read))
    }

    /// Packs two (n, k) weights of each expert as one of (2n, k), as [`WeightLoader::interleaved`]
    /// does.
    pub fn interleaved_stack(&mut self, even: &[String], odd: &[String], n: usize, k: usize) -> Result<B::Weight> {
        let mut pairs = Vec::with_capacity(even.len());
        for (even, odd) in even.iter().zip(odd) {
            pairs.push([self.tensor(even, &[n, k])?, self.tensor(odd, &[n, k])?]);
        }
        self.backend.weight(WeightShape::Experts { num: even.len(), n: 2 * n, k }, &|first, dst| {
            by_expert(first, 2 * n, k, dst, |expert, row, dst| read_interleaved(&pairs[expert], row, k, dst))
        })
    }

    /// [`WeightLoader::interleaved`] with biases where there are any, all read under the two names.
    pub fn interleaved_linear(&mut self, even: &str, odd: &str, n: usize, k: usize, with_bias: bool) -> Result<Linear<B>> {
        let weight = self.interleaved(&format!("{even}.weight"), &format!("{odd}.weight"), n, k)?;
        if !with_bias {
            return Ok(Linear { weight, bias: None });
        }
        let (even, odd) = (self.values(&format!("{even}.bias"), n)?, self.values(&format!("{odd}.bias"), n)?);
        let bias: Vec<f32> = even.into_iter().zip(odd).flat_map(|(even, odd)| [even, odd]).collect();
        Ok(Linear { weight, bias: Some(self.backend.upload(&bias)?) })
    }

    /// A small parameter vector.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<B::Buffer> {
        let values = self.values(name, len)?;
        self.backend.upload(&values)
    }

    /// A norm without bias.
    pub fn norm(&mut self, name: &str, width: usize) -> Result<NormWeights<B>> {
        Ok(NormWeights { weight: self.vector(name, width)?, bias: None })
    }

    /// A weight with its bias, both read under `name`.
    pub fn linear(&mut self, name: &str, n: usize, k: usize, with_bias: bool) -> Result<Linear<B>> {
        let weight = self.matrix(&format!("{name}.weight"), n, k, None)?;
        let bias = if with_bias { Some(self.vector(&format!("{name}.bias"), n)?) } else { None };
        Ok(Linear { weight, bias })
    }
}

/// Rows from `first` on of two interleaved weights of width k.
fn read_interleaved(tensors: &[Tensor; 2], first: usize, k: usize, dst: &mut [f32]) -> Result<()> {
    let end = first + dst.len() / k;
    for (parity, tensor) in tensors.iter().enumerate() {
        // Rows 2j + parity from `first` up to `end`.
        let (from, to) = ((first + 1 - parity) / 2, (end + 1 - parity) / 2);
        let mut rows = vec![0.0; (to - from) * k];
        tensor.read(from * k, &mut rows)?;
        for (j, row) in (from..to).zip(rows.chunks_exact(k)) {
            dst[(2 * j + parity - first) * k..][..k].copy_from_slice(row);
        }
    }
    Ok(())
}

/// Rows from `first` on of weights of n rows each, one below the other: `read(weight, row, dst)`
/// for the part of each.
fn by_expert(first: usize, n: usize, k: usize, dst: &mut [f32], read: impl Fn(usize, usize, &mut [f32]) -> Result<()>) -> Result<()> {
    let mut rest = dst;
    let mut row = first;
    while !rest.is_empty() {
        let (part, after) = rest.split_at_mut(rest.len().min((n - row % n) * k));
        read(row / n, row % n, part)?;
        row += part.len() / k;
        rest = after;
    }
    Ok(())
}
