//! `gather` copies rows exactly and rounds to nearest even, whatever width and alignment.

use half::bf16;
use redraft::backend::DType;
use redraft::cuda::context::CudaContext;
use redraft::cuda::driver::Address;
use redraft::cuda::ops::gather::{Gather, gather};

use crate::emulator::{Array, machines, noise, words};

const ROWS: usize = 7;
const INDEX: [u32; 5] = [3, 0, 6, 3, 1];

pub fn holds(context: &CudaContext) -> Result<(), String> {
    for width in [1, 3, 4, 66, 260, 1030] {
        // A NaN with a payload stands for words that are no numbers.
        let mut wide = noise(5, ROWS * width);
        wide[3 * width] = f32::from_bits(0x7fa1_2345);
        let narrow: Vec<u16> = wide.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
        for skew in [0, 1] {
            for index in [None, Some(Array::new(context, &INDEX))] {
                let from = |r: usize| if index.is_some() { INDEX[r] as usize } else { r };
                let what = format!("width {width}, skew {skew}, rows {}", index.is_some());
                let (x32, x16) = (Array::skewed(context, &bits(&wide), skew), Array::skewed(context, &narrow, skew));
                let run = |x: Address, x_dtype: DType, out: Address, out_dtype: DType| {
                    let op = Gather {
                        count: INDEX.len() as u32,
                        width: width as u32,
                        rows: index.as_ref().map(Array::address),
                        x,
                        x_dtype,
                        out,
                        out_dtype,
                    };
                    words(gather(context, &op))
                };
                for x_dtype in [DType::F32, DType::Bf16] {
                    let x = if x_dtype == DType::F32 { x32.address() } else { x16.address() };
                    let element = |r: usize, i: usize| from(r) * width + i;
                    let out = Array::skewed(context, &vec![0u32; INDEX.len() * width], skew);
                    run(x, x_dtype, out.address(), DType::F32)?;
                    let expected = expect(width, |r, i| match x_dtype {
                        DType::F32 => wide[element(r, i)].to_bits(),
                        DType::Bf16 => u32::from(narrow[element(r, i)]) << 16,
                    });
                    equal(&out.read()?, &expected, &format!("{what}, {x_dtype:?} to f32"))?;

                    let out = Array::skewed(context, &vec![0u16; INDEX.len() * width], skew);
                    run(x, x_dtype, out.address(), DType::Bf16)?;
                    let expected = expect(width, |r, i| match wide[element(r, i)] {
                        // The payload of a NaN is the rounding instruction's own.
                        v if v.is_nan() && x_dtype == DType::F32 => 0x7fff,
                        _ => narrow[element(r, i)],
                    });
                    equal(&out.read()?, &expected, &format!("{what}, {x_dtype:?} to bf16"))?;
                }
            }
        }
    }
    Ok(())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn expect<T>(width: usize, element: impl Fn(usize, usize) -> T) -> Vec<T> {
    (0..INDEX.len() * width).map(|at| element(at / width, at % width)).collect()
}

fn equal<T: PartialEq + std::fmt::LowerHex>(found: &[T], expected: &[T], what: &str) -> Result<(), String> {
    match found.iter().zip(expected).position(|(f, e)| f != e) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: element {i} is {:#x}, expected {:#x}", found[i], expected[i])),
    }
}

#[test]
fn rows_are_copied_exactly() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
