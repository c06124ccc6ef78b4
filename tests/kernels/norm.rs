//! `norm` stays within twice the error of a plain f32 loop, and gives the same bits on every
//! machine, in place, after a residual and at any alignment.

use half::bf16;
use redraft::backend::{self, DType, NormKind as Kind};
use redraft::cpu::oracle;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::norm::{NormOp, add_norm};

use crate::emulator::{Array, machines, noise, same_bits, words};

const ROWS: usize = 4;
const EPS: f32 = 1e-5;

/// Rows of one width: noise, noise on a mean a thousand times its spread, a constant, and numbers
/// near the end of f32's squares.
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
fn plain(kind: Kind, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let n = x.len() as f32;
    let mean = if kind == Kind::Layer { x.iter().sum::<f32>() / n } else { 0.0 };
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let scale = 1.0 / (variance + EPS).sqrt();
    x.iter().enumerate().map(|(i, v)| (v - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i])).collect()
}

/// The same in f64.
fn exact(kind: Kind, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    oracle::norm(x, &backend::Norm { kind, eps: EPS, weight, bias })
}

struct Case {
    kind: Kind,
    width: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// How a case is run.
#[derive(Clone, Copy, Debug, Default)]
struct How {
    /// Over the input instead of into a buffer of its own.
    in_place: bool,
    /// All of x comes from the residual, in halves.
    residual: bool,
    /// x starts one element behind an aligned address.
    skew: usize,
}

impl Case {
    fn launch(&self, context: &CudaContext, x: u64, residual: Option<u64>, out: u64, out_dtype: DType) -> Result<(), String> {
        let weight = Array::new(context, &self.weight);
        let bias = self.bias.as_ref().map(|b| Array::new(context, b));
        let op = NormOp {
            rows: ROWS as u32,
            width: self.width as u32,
            eps: EPS,
            x,
            weight: weight.address(),
            bias: bias.as_ref().map(Array::address),
            out,
            out_dtype,
        };
        words(add_norm(context, &op, self.kind, residual))
    }

    /// f32 output.
    fn run(&self, context: &CudaContext, how: How) -> Result<Vec<f32>, String> {
        let half: Vec<f32> = self.x.iter().map(|v| 0.5 * v).collect();
        let source = if how.residual { &half } else { &self.x };
        let x = Array::skewed(context, source, how.skew);
        let residual = how.residual.then(|| Array::new(context, &half));
        let out = Array::nan(context, self.x.len());
        let target = if how.in_place { x.address() } else { out.address() };
        self.launch(context, x.address(), residual.as_ref().map(Array::address), target, DType::F32)?;
        let after = x.read()?;
        if how.in_place {
            return Ok(after);
        }
        same_bits(&self.x, &after, "the sum written back")?;
        out.read()
    }
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    for width in [1, 6, 7, 32, 255, 256, 257, 768, 1000, 4100, 4103] {
        for (kind, with_bias) in [(Kind::Layer, false), (Kind::Layer, true), (Kind::Rms, false)] {
            let bias = with_bias.then(|| noise(4, width));
            let case = Case { kind, width, x: rows(width), weight: noise(3, width), bias };
            let found = case.run(context, How::default())?;
            for (row, (x, found)) in case.x.chunks(width).zip(found.chunks(width)).enumerate() {
                let exact = exact(kind, x, &case.weight, case.bias.as_deref());
                let error = |values: &[f32]| values.iter().zip(&exact).map(|(v, e)| (f64::from(*v) - e).abs()).fold(0.0, f64::max);
                let yardstick = error(&plain(kind, x, &case.weight, case.bias.as_deref()));
                // The plain loop may be exact by luck: a few roundings of the largest element, and
                // one of the mean, which moves every element of the row by its size over the
                // spread.
                let average = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / width as f64;
                let mean = average(&|v| v);
                let spread = (average(&|v| (v - mean).powi(2)) + f64::from(EPS)).sqrt();
                let largest = exact.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
                let rounding = f64::from(f32::EPSILON) * (4.0 * largest + mean.abs() / spread);
                // `max` drops NaN, so it is looked for by itself.
                if found.iter().any(|v| v.is_nan()) || error(found) > 2.0 * yardstick + rounding {
                    return Err(format!(
                        "{kind:?}, width {width}, row {row}: error {:e}, a plain f32 loop has {yardstick:e}",
                        error(found)
                    ));
                }
            }
            for how in [
                How { in_place: true, ..How::default() },
                How { residual: true, ..How::default() },
                How { in_place: true, residual: true, skew: 0 },
                How { skew: 1, ..How::default() },
                How { in_place: false, residual: true, skew: 1 },
            ] {
                same_bits(&found, &case.run(context, how)?, &format!("{kind:?}, width {width}, {how:?}"))?;
            }
            let rounded: Vec<bf16> = found.iter().map(|v| bf16::from_f32(*v)).collect();
            let (x, out) = (Array::new(context, &case.x), Array::new(context, &vec![bf16::NAN; case.x.len()]));
            case.launch(context, x.address(), None, out.address(), DType::Bf16)?;
            if out.read()? != rounded {
                return Err(format!("{kind:?}, width {width}: bf16 output is not the rounded f32 output"));
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_normalised_as_exactly_as_f32_allows() {
    let mut first = None;
    for context in machines() {
        holds(&context).unwrap();
        let case = Case { kind: Kind::Layer, width: 300, x: rows(300), weight: noise(3, 300), bias: None };
        let found = case.run(&context, How::default()).unwrap();
        same_bits(first.get_or_insert_with(|| found.clone()), &found, "two machines").unwrap();
    }
}
