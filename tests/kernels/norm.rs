//! `norm` stays within twice the error of a plain f32 loop, and gives the same bits under every schedule.

use half::bf16;
use redraft::DType;
use redraft::cpu::oracle;
use redraft::cuda::machine::Machine;
use redraft::cuda::norm::{Norm, norm};

use crate::emulator::{Array, machines, noise, same_bits, words};

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
    fn launch(&self, machine: &Machine, out_dtype: DType, x: u64, out: u64) -> Result<(), String> {
        let weight = Array::new(machine, &self.weight);
        let bias = self.bias.as_ref().map(|b| Array::new(machine, b));
        let (rows, width, bias) = (ROWS as u32, self.width as u32, bias.as_ref().map(Array::address));
        words(norm(machine, &Norm { rows, width, eps: EPS, x, weight: weight.address(), bias, out, out_dtype }))
    }

    /// f32 output: into a buffer of its own, or over the input.
    fn run(&self, machine: &Machine, in_place: bool) -> Result<Vec<f32>, String> {
        let (x, out) = (Array::new(machine, &self.x), Array::nan(machine, self.x.len()));
        let target = if in_place { x.address() } else { out.address() };
        self.launch(machine, DType::F32, x.address(), target)?;
        if in_place { x.read() } else { out.read() }
    }
}

pub fn holds(machine: &Machine) -> Result<(), String> {
    for width in [1, 7, 32, 255, 256, 257, 768, 1000] {
        for with_bias in [false, true] {
            let bias = with_bias.then(|| noise(4, width));
            let case = Case { width, x: rows(width), weight: noise(3, width), bias };
            let found = case.run(machine, false)?;
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
            same_bits(&found, &case.run(machine, true)?, &format!("width {width}, in place"))?;
            let (x, out) = (Array::new(machine, &case.x), Array::new(machine, &vec![bf16::NAN; case.x.len()]));
            case.launch(machine, DType::Bf16, x.address(), out.address())?;
            if out.read()? != rounded {
                return Err(format!("width {width}: bf16 output is not the rounded f32 output"));
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_normalised_as_exactly_as_f32_allows() {
    machines().iter().for_each(|machine| holds(machine).unwrap());
}
