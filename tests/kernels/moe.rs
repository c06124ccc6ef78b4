//! `moe` sums as `gemm.cuh` specifies, bit by bit, whatever the tile and however many rows
//! share an expert; `moe_combine` adds in the order of the experts.

use redraft::backend::DType;
use redraft::backend::group_blocks::Bits;
use redraft::cpu::oracle;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::moe::{Combine, Grouped, combine, every_tile_rows, grouped};

use crate::emulator::{Array, Operand, TestWeight, gemm_dot, kept, machines, noise, same_bits, words};

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Rows of each expert.
    counts: &'static [usize],
    n: usize,
    k: usize,
    dtype: DType,
    /// Of weights in groups.
    bits: Option<Bits>,
    swiglu: bool,
    out_dtype: DType,
}

impl Case {
    fn width(&self) -> usize {
        if self.swiglu { self.n / 2 } else { self.n }
    }

    fn run(&self, context: &CudaContext, x: &[f32], weight: &[f32], tile_rows: u32, skew: usize) -> Result<Vec<f32>, String> {
        let Case { counts, n, k, dtype, bits, swiglu, out_dtype } = *self;
        let (mut tiles, mut first) = (Vec::new(), 0);
        for (expert, count) in counts.iter().enumerate() {
            for at in (0..*count).step_by(tile_rows as usize) {
                tiles.push([expert as u32, (first + at) as u32, tile_rows.min((count - at) as u32), 0]);
            }
            first += count;
        }
        let num_tiles = Array::new(context, &[tiles.len() as u32]);
        // Room for more tiles, whose experts and places do not exist.
        tiles.resize(tiles.len() + 2, [u32::MAX; 4]);
        let tiles_at = Array::new(context, tiles.as_flattened());
        let x = Operand::new(context, dtype, x, skew);
        let weight = TestWeight::new(context, dtype, bits, (counts.len(), n, k), weight, (skew, 0));
        let out = Operand::new(context, out_dtype, &vec![f32::NAN; first * self.width()], skew);
        let op = Grouped {
            n: n as u32,
            k: k as u32,
            dtype,
            x: x.address(),
            weight: weight.at(),
            swiglu,
            out: out.address(),
            out_dtype,
            tiles: tiles_at.address(),
            num_tiles: num_tiles.address(),
            max_tiles: tiles.len() as u32,
            tile_rows,
        };
        words(grouped(context, &op))?;
        out.read()
    }

    fn holds(&self, context: &CudaContext) -> Result<(), String> {
        let Case { counts, n, k, dtype, bits, swiglu, out_dtype } = *self;
        let stored = |values: Vec<f32>| values.into_iter().map(|v| oracle::stored(dtype, v)).collect::<Vec<f32>>();
        let rows: usize = counts.iter().sum();
        let (x, source) = (stored(noise(1, rows * k)), noise(2, counts.len() * n * k));
        let weight = kept(dtype, bits, &source, k);
        let expert_of: Vec<usize> = counts.iter().enumerate().flat_map(|(e, count)| std::iter::repeat_n(e, *count)).collect();
        let mut specified = Vec::new();
        for (x, expert) in x.chunks_exact(k).zip(&expert_of) {
            specified.extend(weight[expert * n * k..][..n * k].chunks_exact(k).map(|w| gemm_dot(context, dtype, x, w)));
        }
        let first = self.run(context, &x, &source, every_tile_rows()[0], 0)?;
        if swiglu || out_dtype == DType::Bf16 {
            let exact = specified.chunks_exact(if swiglu { 2 } else { 1 }).map(|v| match v {
                [gate, up] => gate / (1.0 + (-gate).exp()) * up,
                value => value[0],
            });
            for (i, (found, exact)) in first.iter().zip(exact).enumerate() {
                let step = if out_dtype == DType::Bf16 { 1.0 / 256.0 } else { 1e-6 };
                let error = (found - exact).abs();
                if error.is_nan() || error > step * exact.abs() + 1e-6 {
                    return Err(format!("{self:?}: element {i} is {found}, expected {exact}"));
                }
            }
        } else {
            same_bits(&specified, &first, &format!("{self:?} against the specification"))?;
        }
        for tile_rows in every_tile_rows() {
            for skew in [0, 1] {
                let again = self.run(context, &x, &source, tile_rows, skew)?;
                same_bits(&first, &again, &format!("{self:?} in tiles of {tile_rows}, skew {skew}"))?;
            }
        }
        Ok(())
    }
}

fn sums(context: &CudaContext) -> Result<(), String> {
    for (rows, width, top_k, skew) in [(1, 1, 1, 0), (3, 66, 2, 0), (5, 132, 4, 0), (5, 132, 4, 1), (2, 1030, 8, 0)] {
        let places = rows * top_k;
        let (y, weight, before) = (noise(1, places * width), noise(2, places), noise(3, rows * width));
        // Places all over, each once.
        let place: Vec<u32> = (0..places).map(|i| ((i * 5 + 3) % places) as u32).collect();
        let distinct: std::collections::BTreeSet<u32> = place.iter().copied().collect();
        assert!(distinct.len() == places || places % 5 == 0);
        let (y_at, place_at, weight_at) = (Array::new(context, &y), Array::new(context, &place), Array::new(context, &weight));
        let out = Array::skewed(context, &before, skew);
        let op = Combine {
            rows: rows as u32,
            width: width as u32,
            top_k: top_k as u32,
            y: y_at.address(),
            place: place_at.address(),
            weight: weight_at.address(),
            out: out.address(),
        };
        words(combine(context, &op))?;
        let expected: Vec<f32> = (0..rows * width)
            .map(|i| {
                let (row, col) = (i / width, i % width);
                let sum = (row * top_k..(row + 1) * top_k)
                    .fold(0.0f32, |sum, choice| weight[choice].mul_add(y[place[choice] as usize * width + col], sum));
                before[i] + sum
            })
            .collect();
        same_bits(&expected, &out.read()?, &format!("{rows} x {width}, {top_k} experts, skew {skew}"))?;
    }
    Ok(())
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    use DType::{Bf16, F32};
    for (counts, n, k, dtype, swiglu, out_dtype) in [
        (&[1][..], 2, 1, F32, true, F32),
        (&[3, 0, 9], 34, 33, Bf16, false, F32),
        (&[0, 2, 17, 0, 1], 70, 64, Bf16, true, Bf16),
        (&[5, 8], 35, 264, F32, false, F32),
        (&[2, 33], 12, 600, Bf16, false, F32),
        (&[4, 1], 20, 72, F32, true, Bf16),
    ] {
        Case { counts, n, k, dtype, bits: None, swiglu, out_dtype }.holds(context)?;
    }
    sums(context)
}

/// The same of experts in groups, each in blocks of its own.
pub fn groups_hold(context: &CudaContext) -> Result<(), String> {
    use DType::{Bf16, F32};
    for bits in [Bits::Eight, Bits::Four] {
        for (counts, n, k, dtype, swiglu, out_dtype) in
            [(&[3, 0, 9][..], 34, 33, Bf16, false, F32), (&[0, 2, 17, 0, 1], 70, 64, Bf16, true, Bf16), (&[5, 8], 35, 264, F32, false, F32)]
        {
            Case { counts, n, k, dtype, bits: Some(bits), swiglu, out_dtype }.holds(context)?;
        }
    }
    Ok(())
}

#[test]
fn experts_in_groups_give_the_bits_of_their_values() {
    machines().iter().for_each(|context| groups_hold(context).unwrap());
}

#[test]
fn an_expert_has_one_result_for_a_row() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
