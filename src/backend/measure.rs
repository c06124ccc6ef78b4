//! Ceilings of a machine: the rates that bound a forward, measured for benches.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{Activation, Backend, Epilogue, WeightShape};
use crate::error::Result;

/// The rates of a machine that bound a forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceilings {
    /// Multiplications and additions per second in one large product.
    pub matrix_flop_per_s: f64,
    /// Its size and what computed it: `4096 x 4096 x 4096 by cuBLASLt`.
    pub matrix: String,
    /// Bytes per second of plain memory traffic: read, or copied with read and written bytes
    /// counted.
    pub bytes_per_s: f64,
    /// What moved them: `copy of 1024 MiB`.
    pub traffic: String,
}

/// A machine whose best is measured: benches print it beside what they measure.
pub trait Measure: Backend {
    /// The ceilings. `weight_bytes`: what one forward reads.
    fn ceilings(&self, weight_bytes: usize) -> Result<Ceilings>;
}

/// Operations per second of `x (rows, k) weight (n, k)^T` on a backend, the weight in the format of
/// its models, the best of `runs` products of numbers that are not zero.
pub fn product_rate<B: Backend>(backend: &B, [rows, n, k]: [usize; 3], runs: usize) -> Result<f64> {
    let value = |i: usize| (i % 17) as f32 / 17.0 - 0.5;
    let source = |first: usize, dst: &mut [f32]| {
        dst.iter_mut().enumerate().for_each(|(i, v)| *v = value(first + i));
        Ok(())
    };
    let square = backend.weight(WeightShape::Matrix { n: k, k }, &source)?;
    let format = backend.weight_format().unwrap_or(backend.dtype().into());
    let weight = backend.weight_as(format, WeightShape::Matrix { n, k }, &source)?;
    // Rows that are not zero: a product of zeros with a bias.
    let bias = backend.upload(&(0..k).map(value).collect::<Vec<_>>())?;
    let zeros = [rows * k, rows * k, rows * n].map(Activation::F32);
    let [zeros, mut x, mut out] = backend.alloc(zeros)?;
    backend.linear(rows, &zeros, &square, Some(&bias), Epilogue::Store, &mut x)?;
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        backend.linear(rows, &x, &weight, None, Epilogue::Store, &mut out)?;
        backend.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (rows * n * k) as f64 / best)
}
