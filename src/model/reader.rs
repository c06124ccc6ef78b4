//! Owns the way of a checkpoint's tensors into packed weights: which rows of which tensor become which rows of a matrix, and how far
//! loading is. Which tensors there are is a family's business.
#![forbid(unsafe_code)]

use crate::backend::Backend;
use crate::error::Result;
use crate::model::{Linear, Norm, Progress};
use crate::weights::{Tensor, Weights};

/// Reads tensors whole and packs matrices, counting progress.
pub(super) struct Reader<'a, B: Backend> {
    pub backend: &'a B,
    weights: &'a Weights,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

impl<'a, B: Backend> Reader<'a, B> {
    /// Shapes first: a checkpoint that lacks one of the `expected` tensors is refused before anything is packed.
    pub fn new(backend: &'a B, weights: &'a Weights, progress: Progress<'a>, expected: &[(String, Vec<usize>)]) -> Result<Self> {
        for (name, shape) in expected {
            weights.tensor(name, shape)?;
        }
        Ok(Reader { backend, weights, progress, done: 0, total: expected.len() })
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        self.done += 1;
        (self.progress)(self.done.min(self.total), self.total);
        self.weights.tensor(name, shape)
    }

    pub fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])?.to_vec()
    }

    /// An (n, k) table for lookups.
    pub fn table(&mut self, name: &str, n: usize, k: usize) -> Result<B::Matrix> {
        let tensor = self.tensor(name, &[n, k])?;
        self.backend.table(n, k, &mut |first, dst| tensor.read(first * k, dst))
    }

    /// Packs an (n, k) weight, each row multiplied by its gate.
    pub fn matrix(&mut self, name: &str, n: usize, k: usize, gate: Option<&[f32]>) -> Result<B::Matrix> {
        let tensor = self.tensor(name, &[n, k])?;
        self.backend.matrix(n, k, &mut |first, dst| {
            tensor.read(first * k, dst)?;
            if let Some(gate) = gate {
                for (row, gate) in dst.chunks_exact_mut(k).zip(&gate[first..]) {
                    row.iter_mut().for_each(|v| *v *= gate);
                }
            }
            Ok(())
        })
    }

    /// Packs weights of (rows, k) each as one matrix, one below the other.
    pub fn stacked(&mut self, parts: &[(String, usize)], k: usize) -> Result<B::Matrix> {
        let mut tensors = Vec::with_capacity(parts.len());
        let mut n = 0;
        for (name, rows) in parts {
            tensors.push((n..n + rows, self.tensor(name, &[*rows, k])?));
            n += rows;
        }
        self.backend.matrix(n, k, &mut |first, dst| {
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

    /// Packs two (n, k) weights as one of (2n, k): row 2j is row j of `even`, row 2j + 1 is row j of `odd`.
    pub fn interleaved(&mut self, even: &str, odd: &str, n: usize, k: usize) -> Result<B::Matrix> {
        let tensors = [self.tensor(even, &[n, k])?, self.tensor(odd, &[n, k])?];
        let mut rows = Vec::new();
        self.backend.matrix(2 * n, k, &mut |first, dst| {
            let end = first + dst.len() / k;
            for (parity, tensor) in tensors.iter().enumerate() {
                // Rows 2j + parity from `first` up to `end`.
                let (from, to) = ((first + 1 - parity) / 2, (end + 1 - parity) / 2);
                rows.resize((to - from) * k, 0.0);
                tensor.read(from * k, &mut rows)?;
                for (j, row) in (from..to).zip(rows.chunks_exact(k)) {
                    dst[(2 * j + parity - first) * k..][..k].copy_from_slice(row);
                }
            }
            Ok(())
        })
    }

    /// A small parameter vector.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector> {
        let values = self.values(name, len)?;
        self.backend.vector(&values)
    }

    /// A norm without bias.
    pub fn norm(&mut self, name: &str, width: usize) -> Result<Norm<B>> {
        Ok(Norm { weight: self.vector(name, width)?, bias: None })
    }

    /// A weight with its bias, both read under `name`.
    pub fn linear(&mut self, name: &str, n: usize, k: usize, with_bias: bool) -> Result<Linear<B>> {
        let weight = self.matrix(&format!("{name}.weight"), n, k, None)?;
        let bias = if with_bias { Some(self.vector(&format!("{name}.bias"), n)?) } else { None };
        Ok(Linear { weight, bias })
    }
}
