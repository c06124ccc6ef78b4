//! What a device does at best: a large copy and a large product, which bound the time of any
//! forward.
#![deny(unsafe_code)]

use std::time::Instant;

#[allow(unsafe_code)]
mod cublaslt;

use cublaslt::{SquareProduct, WORKSPACE_BYTES};

use super::state::Cuda;
use crate::backend::measure::{Ceilings, product_rate};
use crate::backend::{Backend, DType, Epilogue, WeightShape};
use crate::cuda::ops::linear;
use crate::cuda::ops::linear::Linear;
use crate::error::{Error, Result};

/// Bytes of a copy. Smaller ones partly stay in the L2 cache, 50 MB on an H100: a copy as large as
/// the weights of a 170M model reports eight times the bandwidth of the memory.
const COPY_BYTES: usize = 1 << 30;
/// Where a device has no room for two buffers of that size, halves are tried down to this one.
const LEAST_COPY_BYTES: usize = 64 << 20;
/// Rows, columns and depth of the product: 137 GFLOP, 0.2 ms at 700 TFLOP/s.
const SIDE: usize = 4096;
/// Launches between two waits: about 2 ms of either on an H100, against 10 us of a wait.
const COPIES: usize = 3;
const PRODUCTS: usize = 10;
/// Waits; the best counts.
const RUNS: usize = 5;

/// A GPU's ceilings; under emulation those of a product and a copy that end within a second.
pub(super) fn measure(cuda: &Cuda) -> Result<Ceilings> {
    if cuda.context.driver.is_emulated() {
        const PRODUCT: [usize; 3] = [32, 96, 256];
        let rate = product_rate(cuda, PRODUCT, 2)?;
        let bytes_per_s = copy_rate(cuda, 1 << 20)?;
        return Ok(Ceilings { matrix_flop_per_s: rate, matrix: "32 x 256 x 96".into(), bytes_per_s, traffic: "copy of 1 MiB".into() });
    }
    let (bytes_per_s, bytes) = large_copy(cuda)?;
    let (matrix_flop_per_s, by) = large_product(cuda)?;
    let matrix = format!("{SIDE} x {SIDE} x {SIDE} by {by}");
    Ok(Ceilings { matrix_flop_per_s, matrix, bytes_per_s, traffic: format!("copy of {} MiB", bytes >> 20) })
}

/// Seconds of one launch: the best mean over `launches` between two waits.
fn seconds(cuda: &Cuda, launches: usize, launch: &dyn Fn() -> Result<()>) -> Result<f64> {
    let driver = &cuda.context.driver;
    launch()?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        driver.synchronize()?;
        let start = Instant::now();
        (0..launches).try_for_each(|_| launch())?;
        driver.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / launches as f64);
    }
    Ok(best)
}

/// Bytes per second, read and written together, and the size of the copy.
fn large_copy(cuda: &Cuda) -> Result<(f64, usize)> {
    let mut bytes = COPY_BYTES;
    loop {
        match copy_rate(cuda, bytes) {
            Err(_) if bytes > LEAST_COPY_BYTES => bytes /= 2,
            rate => return rate.map(|rate| (rate, bytes)),
        }
    }
}

fn copy_rate(cuda: &Cuda, bytes: usize) -> Result<f64> {
    let (from, to) = (cuda.context.memory(bytes)?, cuda.context.memory(bytes)?);
    cuda.context.driver.fill(from.address(), 0x3f80_0001, bytes / 4)?;
    let one = seconds(cuda, COPIES, &|| cuda.context.driver.copy(from.address(), to.address(), bytes))?;
    Ok(2.0 * bytes as f64 / one)
}

/// Operations per second of the product, by the vendor's library where there is one for the dtype,
/// since that is what the device can do; and what computed it.
fn large_product(cuda: &Cuda) -> Result<(f64, String)> {
    let noise = |first: usize, dst: &mut [f32]| {
        // Zeros or a short pattern draw less power than data does, and run at a higher clock.
        let hash = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9) ^ ((i as u32) >> 7).wrapping_mul(0x85eb_ca6b);
        dst.iter_mut().enumerate().for_each(|(i, value)| *value = hash(first * SIDE + i) as f32 / u32::MAX as f32 - 0.5);
        Ok(())
    };
    let square = WeightShape::Matrix { n: SIDE, k: SIDE };
    let [x, weight] = [cuda.weight(square, &noise)?, cuda.weight(square, &noise)?];
    let (dtype, side) = (cuda.weight_dtype(), SIDE as u32);
    let out = cuda.context.memory(SIDE * SIDE * dtype.bytes())?;
    let op = Linear {
        rows: side,
        n: side,
        k: side,
        dtype,
        x: x.at().address,
        weight: weight.at(),
        bias: None,
        epilogue: Epilogue::Store,
        out: out.address(),
        out_dtype: dtype,
    };
    let flop = 2.0 * (SIDE * SIDE * SIDE) as f64;
    let library = || -> Result<f64, String> {
        if dtype != DType::Bf16 {
            return Err("it is used for bf16".to_owned());
        }
        let stream = cuda.context.driver.stream()?;
        let product = SquareProduct::open(side)?;
        let workspace = cuda.context.memory(WORKSPACE_BYTES).map_err(|error| error.to_string())?;
        let enqueue = || {
            let enqueued = product.enqueue(op.x, op.weight.address, op.out, workspace.address(), stream);
            enqueued.map_err(Error::device)
        };
        seconds(cuda, PRODUCTS, &enqueue).map_err(|error| error.to_string())
    };
    match library() {
        Ok(one) => Ok((flop / one, "cuBLASLt".to_owned())),
        Err(reason) => {
            let one = seconds(cuda, PRODUCTS, &|| linear::linear(&cuda.context, &op))?;
            Ok((flop / one, format!("our kernel, no cuBLASLt: {reason}")))
        }
    }
}
