//! cuBLASLt, which nobody has to have: its products on a GPU against a plain loop, and what asking for it means elsewhere.

use half::bf16;
use redraft::backend::{Backend, Epilogue};
use redraft::cuda::driver::{Address, Driver};
use redraft::cuda::linear::Linear;
use redraft::cuda::{Cuda, Emulator, EmulatorOptions, Gpu};
use redraft::{DType, Result};

/// Repeatable numbers in [-1, 1) that bf16 holds exactly.
fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 65_521 % 255) as f32 / 128.0 - 1.0).collect()
}

fn uploaded(gpu: &Gpu, bytes: &[u8]) -> Result<Address> {
    let address = gpu.alloc(bytes.len())?;
    gpu.write(address, bytes)?;
    Ok(address)
}

fn halves(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|v| bf16::from_f32(*v)).collect()
}

#[test]
fn products_of_the_library() {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) if std::env::var_os("REDRAFT_REQUIRE_CUDA").is_some() => panic!("REDRAFT_REQUIRE_CUDA is set: {error}"),
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let blas = match gpu.blas() {
        Ok(blas) => blas,
        Err(reason) => return eprintln!("skipped: no cuBLASLt: {reason}"),
    };
    for (rows, n, k) in [(65u32, 768u32, 768u32), (200, 2304, 768), (128, 768, 3072), (77, 1002, 64)] {
        for (epilogue, with_bias, out_dtype) in [
            (Epilogue::Store, false, DType::F32),
            (Epilogue::Store, false, DType::Bf16),
            (Epilogue::Store, true, DType::F32),
            (Epilogue::Add, false, DType::F32),
            (Epilogue::Add, true, DType::F32),
            (Epilogue::Gelu, false, DType::Bf16),
        ] {
            let what = format!("{rows} x {n} x {k}, {epilogue:?}, bias {with_bias}, {out_dtype:?}");
            let (rows, n, k) = (rows as usize, n as usize, k as usize);
            let (x, weight, bias, before) = (numbers(1, rows * k), numbers(2, n * k), numbers(3, n), numbers(4, rows * n));
            let before_bytes = match out_dtype {
                DType::F32 => bytemuck::cast_slice(&before).to_vec(),
                DType::Bf16 => bytemuck::cast_slice(&halves(&before)).to_vec(),
            };
            let upload = |bytes: &[u8]| uploaded(&gpu, bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
            let op = Linear {
                rows: rows as u32,
                n: n as u32,
                k: k as u32,
                dtype: DType::Bf16,
                x: upload(bytemuck::cast_slice(&halves(&x))),
                weight: upload(bytemuck::cast_slice(&halves(&weight))),
                bias: with_bias.then(|| upload(bytemuck::cast_slice(&bias))),
                epilogue,
                out: upload(&before_bytes),
                out_dtype,
            };
            let done = blas.product(&op).unwrap_or_else(|reason| panic!("{what}: {reason}"));
            let mut bytes = vec![0u8; before_bytes.len()];
            gpu.read(op.out, &mut bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
            [op.x, op.weight, op.out].into_iter().chain(op.bias).for_each(|address| gpu.free(address));
            if !done {
                // Which kinds have an algorithm is the library's business; what it leaves is ours.
                assert_eq!(bytes, before_bytes, "{what}: untouched");
                eprintln!("{what}: none of the library's");
                continue;
            }
            for (row, column) in
                (0..rows).flat_map(|row| (0..n).step_by(if row % 64 == 0 { 1 } else { 37 }).map(move |column| (row, column)))
            {
                let terms = (0..k).map(|p| f64::from(x[row * k + p]) * f64::from(weight[column * k + p]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let value = sum + if with_bias { f64::from(bias[column]) } else { 0.0 };
                let i = row * n + column;
                let (expected, out) = match (epilogue, out_dtype) {
                    (Epilogue::Add, _) => {
                        (value + f64::from(before[i]), f64::from(bytemuck::pod_read_unaligned::<f32>(&bytes[4 * i..4 * i + 4])))
                    }
                    (_, DType::F32) => (value, f64::from(bytemuck::pod_read_unaligned::<f32>(&bytes[4 * i..4 * i + 4]))),
                    (_, DType::Bf16) => {
                        let cubic = (2.0 / std::f64::consts::PI).sqrt() * (value + 0.044715 * value.powi(3));
                        let gelu = epilogue == Epilogue::Gelu;
                        let value = if gelu { value / 2.0 * (1.0 + cubic.tanh()) } else { value };
                        (value, f64::from(bytemuck::pod_read_unaligned::<bf16>(&bytes[2 * i..2 * i + 2]).to_f32()))
                    }
                };
                // Products are exact in f32, k additions are not; bf16 keeps eight bits, and a fast tanh about ten.
                let rounding = size * k as f64 * f64::from(f32::EPSILON);
                let kept = if out_dtype == DType::Bf16 { expected.abs() / 128.0 + 2e-3 } else { expected.abs() * 1e-6 };
                assert!((expected - out).abs() <= rounding + kept, "{what}: ({row}, {column}) is {out}, expected {expected}");
            }
        }
    }
}

/// Asking for a library that a machine does not have changes what the machine says of itself and not one bit.
#[test]
fn a_machine_without_the_library() {
    let emulator = Emulator::new(EmulatorOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    let cuda = Cuda::new(Box::new(emulator), DType::Bf16).unwrap_or_else(|e| panic!("{e}"));
    let product = || -> Result<Vec<f32>> {
        let weight = cuda.matrix(24, 40, &|first, values| {
            values.copy_from_slice(&numbers(2, 24 * 40)[first * 40..][..values.len()]);
            Ok(())
        })?;
        let (x, mut out) = (cuda.buffer_of(&numbers(1, 65 * 40))?, cuda.alloc(65 * 24)?);
        cuda.linear(65, &x, &weight, None, Epilogue::Store, &mut out)?;
        let mut values = vec![0.0; 65 * 24];
        cuda.download(&out, 0, &mut values)?;
        Ok(values)
    };
    cuda.set_cublaslt(false);
    let plain = product().unwrap_or_else(|e| panic!("{e}"));
    assert!(plain.iter().any(|v| *v != 0.0) && !cuda.name().contains("cuBLASLt"));
    cuda.set_cublaslt(true);
    assert_eq!(product().unwrap_or_else(|e| panic!("{e}")), plain);
    assert!(cuda.name().ends_with(", no cuBLASLt: this machine has none"), "{}", cuda.name());
}
