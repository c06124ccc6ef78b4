//! `linear` sums as `gemm.cuh` specifies, bit by bit, by every tile, whole and split, for a row
//! alone and among others, at any alignment; and errs at most twice as much as a plain f32 loop.
//! A weight in groups gives the bits of a weight of its values.

use redraft::backend::group_blocks::Bits;
use redraft::backend::{DType, Epilogue};
use redraft::cpu::oracle;
use redraft::cuda::context::{COUNTERS, CudaContext};
use redraft::cuda::ops::linear;
use redraft::cuda::ops::linear::Linear;

use crate::emulator::{Array, Operand, TestWeight, any_machine, gemm_dot, kept, machines, noise, same_bits, words};

/// Rows of NaN behind x and the weight, which nothing may read, and room behind the output, which
/// nothing may write.
const BEHIND: usize = 3;

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    n: usize,
    k: usize,
    dtype: DType,
    /// Of a weight in groups.
    bits: Option<Bits>,
    epilogue: Epilogue,
    with_bias: bool,
    out_dtype: DType,
    /// x, a weight of floats and out start one element behind an aligned address.
    skewed: bool,
}

/// The operands of a case, on the host.
struct Data {
    x: Vec<f32>,
    /// As it was before it was stored, and what it stands for.
    source: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    before: Vec<f32>,
}

impl Case {
    fn data(&self) -> Data {
        let Case { rows, n, k, dtype, epilogue, .. } = *self;
        let stored = |values: Vec<f32>| values.into_iter().map(|v| oracle::stored(dtype, v)).collect();
        let before = if epilogue == Epilogue::Add { noise(4, rows * n) } else { vec![f32::NAN; rows * epilogue.out_width(n)] };
        let source = noise(2, n * k);
        let weight = kept(dtype, self.bits, &source, k);
        Data { x: stored(noise(1, rows * k)), source, weight, bias: self.with_bias.then(|| noise(3, n)), before }
    }

    /// Rows `[first, first + rows)` of the product, cut as `shape` says.
    fn run(
        &self,
        context: &CudaContext,
        data: &Data,
        first: usize,
        rows: usize,
        shape: Option<&linear::Shape>,
    ) -> Result<Vec<f32>, String> {
        let Case { n, k, dtype, bits, epilogue, out_dtype, skewed, .. } = *self;
        let width = epilogue.out_width(n);
        let skew = usize::from(skewed);
        let extended = |values: &[f32], behind: usize| [values, &vec![f32::NAN; behind]].concat();
        let x = Operand::new(context, dtype, &extended(&data.x[first * k..(first + rows) * k], BEHIND * k), skew);
        let weight = TestWeight::new(context, dtype, bits, (1, n, k), &data.source, (skew, BEHIND * k));
        let bias = data.bias.as_ref().map(|bias| Array::new(context, bias));
        let before = extended(&data.before[first * width..(first + rows) * width], BEHIND * width);
        let out = Operand::new(context, out_dtype, &before, skew);
        let op = Linear {
            rows: rows as u32,
            n: n as u32,
            k: k as u32,
            dtype,
            x: x.address(),
            weight: weight.at(),
            bias: bias.as_ref().map(Array::address),
            epilogue,
            out: out.address(),
            out_dtype,
        };
        words(match shape {
            Some(shape) => linear::linear_as(context, &op, shape),
            None => linear::linear(context, &op),
        })?;
        let mut result = out.read()?;
        let behind = result.split_off(rows * width);
        if behind.iter().any(|v| !v.is_nan()) {
            return Err(format!("{self:?}: written behind the last row"));
        }
        Ok(result)
    }

    /// The contract as plain f32 loops: the yardstick of the tolerance.
    fn plain(&self, data: &Data) -> Vec<f32> {
        let Case { n, k, epilogue, out_dtype, .. } = *self;
        let mut out = Vec::new();
        for (t, x) in data.x.chunks_exact(k).enumerate() {
            let values = data.weight.chunks_exact(k).enumerate().map(|(j, w)| {
                let sum = x.iter().zip(w).fold(0.0f32, |sum, (a, b)| sum + a * b);
                sum + data.bias.as_ref().map_or(0.0, |bias| bias[j])
            });
            let values: Vec<f32> = values.collect();
            match epilogue {
                Epilogue::Store => out.extend(values),
                Epilogue::Gelu => out.extend(values.iter().map(|v| 0.5 * v * (1.0 + (0.797_884_6 * (v + 0.044_715 * v * v * v)).tanh()))),
                Epilogue::Add => out.extend(values.iter().enumerate().map(|(j, v)| data.before[t * n + j] + v)),
                Epilogue::SwiGlu => out.extend(values.chunks_exact(2).map(|pair| pair[0] / (1.0 + (-pair[0]).exp()) * pair[1])),
            }
        }
        out.into_iter().map(|v| oracle::stored(out_dtype, v)).collect()
    }

    /// What the bits must be, where the epilogue is plain.
    fn specified(&self, context: &CudaContext, data: &Data) -> Option<Vec<f32>> {
        let Case { n, k, dtype, epilogue, out_dtype, .. } = *self;
        if out_dtype != DType::F32 || !matches!(epilogue, Epilogue::Store | Epilogue::Add) {
            return None;
        }
        let mut out = Vec::new();
        for (t, x) in data.x.chunks_exact(k).enumerate() {
            for (j, w) in data.weight.chunks_exact(k).enumerate() {
                let value = gemm_dot(context, dtype, x, w) + data.bias.as_ref().map_or(0.0, |bias| bias[j]);
                out.push(if epilogue == Epilogue::Add { data.before[t * n + j] + value } else { value });
            }
        }
        Some(out)
    }

    fn is_exact(&self, data: &Data, found: &[f32]) -> Result<(), String> {
        let exact = oracle::linear(self.dtype, &data.x, &data.weight, self.k, data.bias.as_deref(), self.epilogue, &data.before);
        let error = |values: &[f32]| values.iter().zip(&exact).map(|(v, e)| (f64::from(*v) - e).abs()).fold(0.0, f64::max);
        let largest = exact.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
        // The plain loop may be exact by luck: a few roundings of the largest element, and half a
        // step of bf16 where that is stored.
        let stored = if self.out_dtype == DType::Bf16 { largest / 256.0 } else { 0.0 };
        let allowed = 2.0 * error(&self.plain(data)) + 4.0 * f64::from(f32::EPSILON) * largest + stored;
        // `max` drops NaN, so it is looked for by itself.
        if let Some(i) = found.iter().position(|v| v.is_nan()) {
            return Err(format!("{self:?}: element {i} is NaN"));
        }
        if error(found) > allowed {
            return Err(format!("{self:?}: error {:e} of {allowed:e}", error(found)));
        }
        Ok(())
    }

    fn holds(&self, context: &CudaContext) -> Result<(), String> {
        let data = self.data();
        let found = self.run(context, &data, 0, self.rows, None)?;
        self.is_exact(&data, &found)?;
        if let Some(specified) = self.specified(context, &data) {
            same_bits(&specified, &found, &format!("{self:?} against the specification"))?;
        }
        for shape in linear::every_shape(self.rows as u32, self.n as u32, self.k as u32) {
            let again = self.run(context, &data, 0, self.rows, Some(&shape))?;
            same_bits(&found, &again, &format!("{self:?} cut as {shape:?}"))?;
        }
        let width = self.epilogue.out_width(self.n);
        for first in [0, self.rows - 1] {
            let alone = self.run(context, &data, first, 1, None)?;
            same_bits(&found[first * width..][..width], &alone, &format!("{self:?}: row {first} alone"))?;
        }
        // Aligned to nothing: the path that copies element by element.
        let other = Case { skewed: !self.skewed, ..*self };
        same_bits(&found, &other.run(context, &data, 0, self.rows, None)?, &format!("{other:?} against its twin"))
    }
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    use DType::{Bf16, F32};
    use Epilogue::{Add, Gelu, Store, SwiGlu};
    let cases = [
        (1, 1, 1, Bf16, Store, F32),
        (3, 7, 33, Bf16, Add, F32),
        (3, 7, 33, F32, Gelu, Bf16),
        (8, 40, 64, F32, SwiGlu, F32),
        (9, 66, 255, Bf16, Gelu, Bf16),
        (17, 34, 257, F32, Add, F32),
        (64, 70, 256, Bf16, Store, Bf16),
        (65, 30, 520, Bf16, SwiGlu, Bf16),
        (65, 12, 600, F32, Store, F32),
        (4, 9, 770, Bf16, Store, F32),
        (130, 200, 72, Bf16, Add, F32),
        (2, 3, 1100, Bf16, Gelu, F32),
    ];
    for (i, (rows, n, k, dtype, epilogue, out_dtype)) in cases.into_iter().enumerate() {
        Case { rows, n, k, dtype, bits: None, epilogue, with_bias: i % 3 != 0, out_dtype, skewed: false }.holds(context)?;
    }
    let mut counters = vec![1u8; 4 * COUNTERS];
    words(context.driver.read(context.counters(), &mut counters))?;
    if counters.iter().any(|byte| *byte != 0) {
        return Err("a counter is not zero between two products".to_owned());
    }
    Ok(())
}

/// The same of weights in groups: a column and a group more or less than whole ones, both types of
/// x, tiles that turn codes into values in registers and those that do it in shared memory.
pub fn groups_hold(context: &CudaContext) -> Result<(), String> {
    use DType::{Bf16, F32};
    use Epilogue::{Add, Gelu, Store, SwiGlu};
    let cases = [
        (1, 1, 1, Bf16, Store, F32),
        (3, 7, 33, F32, Add, F32),
        (9, 66, 255, Bf16, Gelu, Bf16),
        (17, 34, 289, Bf16, Store, F32),
        (65, 30, 520, Bf16, SwiGlu, Bf16),
        (65, 12, 600, F32, Store, F32),
        (130, 200, 72, Bf16, Add, F32),
    ];
    for bits in [Bits::Eight, Bits::Four] {
        for (i, (rows, n, k, dtype, epilogue, out_dtype)) in cases.into_iter().enumerate() {
            let case = Case { rows, n, k, dtype, bits: Some(bits), epilogue, with_bias: i % 2 != 0, out_dtype, skewed: false };
            case.holds(context)?;
        }
    }
    Ok(())
}

#[test]
fn one_row_has_one_result() {
    machines().iter().for_each(|context| holds(context).unwrap());
}

#[test]
fn weights_in_groups_give_the_bits_of_their_values() {
    machines().iter().for_each(|context| groups_hold(context).unwrap());
}

#[test]
fn gelu_is_accurate_over_its_whole_range() {
    let context = &any_machine();
    let v: Vec<f32> = (-400..400).map(|i| i as f32 * 0.1).chain([0.0, -0.0, 1e-30, 1e4, -1e4, 1e30, -1e30]).collect();
    // x = v through a 1 x 1 identity, so the product is exact.
    let (rows, n, k, dtype) = (v.len(), 1, 1, DType::F32);
    let case = Case { rows, n, k, dtype, bits: None, epilogue: Epilogue::Gelu, with_bias: false, out_dtype: dtype, skewed: false };
    let data = Data { source: vec![1.0], weight: vec![1.0], bias: None, before: vec![f32::NAN; rows], x: v };
    let found = case.run(context, &data, 0, rows, None).unwrap();
    for (v, found) in data.x.iter().zip(found) {
        let exact = oracle::gelu_tanh(f64::from(*v));
        // Half a dozen roundings relative to the value, and the absolute size of a rounding near 0
        // on the far negative side.
        assert!((f64::from(found) - exact).abs() <= 1e-6 * exact.abs() + 1e-9, "gelu({v}) is {found}, expected {exact}");
    }
}
