//! `layer_norm` stays within twice the error of a plain f32 loop, and gives the same bits under every schedule.

use half::bf16;
use redraft::cpu::oracle;
use redraft::cuda::params::LayerNormParams;

use crate::emulator::{Emulated, Guarded, SCHEDULES, Schedule, noise, same_bits};

const ROWS: usize = 4;
const EPS: f32 = 1e-5;

/// Rows of one width: noise, noise on a mean a thousand times its spread, a constant, and numbers near the end of f32's squares.
fn rows(width: usize) -> Vec<f32> {
    let noise = noise(2, ROWS * width);
    let shape = |(i, v): (usize, &f32)| match i / width {
        0 => *v,
        1 => 1000.0 + *v,
        2 => 0.75,
        _ => 1e17 * *v,
    };
    noise.iter().enumerate().map(shape).collect()
}

/// The contract as a plain f32 loop: the yardstick of the tolerance.
fn plain(x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let scale = 1.0 / (variance + EPS).sqrt();
    x.iter().enumerate().map(|(i, v)| (v - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i])).collect()
}

struct Case {
    width: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Case {
    fn launch(&self, kernels: &Emulated, entry: &str, schedule: Schedule, x: u64, out: u64) -> Result<(), String> {
        let mut weight = Guarded::new(&self.weight);
        let mut bias = self.bias.as_ref().map(|b| Guarded::new(b));
        let bias = bias.as_mut().map_or(0, Guarded::address);
        let params = LayerNormParams { x, weight: weight.address(), bias, out, width: self.width as u32, eps: EPS };
        // SAFETY: the struct of `layer_norm`; the buffers have the shapes of its head and outlive the launch.
        unsafe { kernels.launch(entry, LayerNormParams::launch(ROWS as u32), schedule, &params) }
    }

    /// f32 output: into a buffer of its own, or over the input.
    fn run(&self, kernels: &Emulated, schedule: Schedule, in_place: bool) -> Result<Vec<f32>, String> {
        let mut x = Guarded::new(&self.x);
        let mut out = Guarded::new(&vec![0f32; self.x.len()]);
        let target = if in_place { x.address() } else { out.address() };
        self.launch(kernels, "layer_norm_f32", schedule, x.address(), target)?;
        if in_place { x.values() } else { out.values() }
    }
}

pub fn holds(kernels: &Emulated) -> Result<(), String> {
    for width in [1, 7, 32, 255, 256, 257, 768, 1000] {
        for with_bias in [false, true] {
            let bias = with_bias.then(|| noise(4, width));
            let case = Case { width, x: rows(width), weight: noise(3, width), bias };
            let found = case.run(kernels, Schedule::Forward, false)?;
            for (row, (x, found)) in case.x.chunks(width).zip(found.chunks(width)).enumerate() {
                let exact = oracle::layer_norm(x, &case.weight, case.bias.as_deref(), EPS);
                let error = |values: &[f32]| values.iter().zip(&exact).map(|(v, e)| (f64::from(*v) - e).abs()).fold(0.0, f64::max);
                let yardstick = error(&plain(x, &case.weight, case.bias.as_deref()));
                // The plain loop may be exact by luck: a few roundings of the largest element, and one of the mean, which moves every
                // element of the row by its size over the spread.
                let average = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / width as f64;
                let mean = average(&|v| v);
                let spread = (average(&|v| (v - mean).powi(2)) + f64::from(EPS)).sqrt();
                let largest = exact.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
                let rounding = f64::from(f32::EPSILON) * (4.0 * largest + mean.abs() / spread);
                // `max` drops NaN, so it is looked for by itself.
                if found.iter().any(|v| v.is_nan()) || error(found) > 2.0 * yardstick + rounding {
                    return Err(format!("width {width}, row {row}: error {:e}, a plain f32 loop has {yardstick:e}", error(found)));
                }
            }
            let rounded: Vec<bf16> = found.iter().map(|v| bf16::from_f32(*v)).collect();
            for schedule in SCHEDULES {
                let what = format!("width {width}, {schedule:?}");
                same_bits(&found, &case.run(kernels, schedule, false)?, &what)?;
                same_bits(&found, &case.run(kernels, schedule, true)?, &format!("{what}, in place"))?;
                let (mut x, mut out) = (Guarded::new(&case.x), Guarded::new(&vec![bf16::ZERO; case.x.len()]));
                case.launch(kernels, "layer_norm_bf16", schedule, x.address(), out.address())?;
                if out.values()? != rounded {
                    return Err(format!("{what}: bf16 output is not the rounded f32 output"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_normalised_as_exactly_as_f32_allows() {
    holds(Emulated::shipped()).unwrap();
}
