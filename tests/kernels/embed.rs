//! `embed` copies rows exactly, whatever their width and alignment, straight or through an index.

use half::bf16;
use redraft::DType;
use redraft::backend::group_blocks::Bits;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::embed::{Embed, embed};

use redraft::cuda::ops::weight::WeightAt;

use crate::emulator::{Array, TestWeight, kept, machines, noise, same_bits, words};

const VOCAB: usize = 11;
/// The first and last row, a repeated one, and one id outside the vocabulary.
const IDS: [u32; 5] = [3, 0, VOCAB as u32 - 1, VOCAB as u32, 3];

pub fn holds(context: &CudaContext) -> Result<(), String> {
    // Vector and scalar paths, more and fewer elements than threads, odd widths.
    for (width, skew) in [(1, 0), (3, 1), (4, 0), (64, 2), (130, 0), (512, 0), (770, 1)] {
        let values = noise(1, VOCAB * width);
        let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
        let row = |source: &dyn Fn(usize) -> f32| -> Vec<f32> {
            let element =
                |id: u32, i: usize| if id as usize >= VOCAB { f32::from_bits(0x7fc0_0000) } else { source(id as usize * width + i) };
            IDS.iter().flat_map(|id| (0..width).map(move |i| element(*id, i))).collect()
        };
        let (exact, widened) = (row(&|i| values[i]), row(&|i| rounded[i].to_f32()));
        // A canvas in which the ids stand backwards, every second place.
        let canvas: Vec<u32> = IDS.iter().rev().flat_map(|id| [*id, u32::MAX]).collect();
        let places: Vec<u32> = (0..IDS.len() as u32).rev().map(|i| 2 * i).collect();
        let (ids, canvas, places) = (Array::new(context, &IDS), Array::new(context, &canvas), Array::new(context, &places));
        let (wide, narrow) = (Array::skewed(context, &values, skew), Array::skewed(context, &rounded, skew));
        for (dtype, table, expected) in [(DType::F32, wide.address(), &exact), (DType::Bf16, narrow.address(), &widened)] {
            let table = WeightAt::floats(table);
            for (ids, index) in [(ids.address(), None), (canvas.address(), Some(places.address()))] {
                let out = Array::nan(context, IDS.len() * width);
                let (rows, vocab) = (IDS.len() as u32, VOCAB as u32);
                let op = Embed { rows, width: width as u32, vocab, dtype, ids, index, table, positions: None, out: out.address() };
                words(embed(context, &op))?;
                same_bits(expected, &out.read()?, &format!("{dtype:?}, width {width}, index {}", index.is_some()))?;
            }
        }
        learned_positions(context, width, skew)?;
    }
    Ok(())
}

/// The second table's rows are added; a position outside it gives NaN.
fn learned_positions(context: &CudaContext, width: usize, skew: usize) -> Result<(), String> {
    const NUM: u32 = 4;
    let places = [NUM - 1, 2, 0, 1, NUM];
    let (tokens, positions) = (noise(2, VOCAB * width), noise(3, NUM as usize * width));
    let sum = |narrow: bool| -> Vec<f32> {
        let read = |values: &[f32], row: u32, i: usize| {
            let value = values[row as usize * width + i];
            if narrow { bf16::from_f32(value).to_f32() } else { value }
        };
        let element = |id: u32, place: u32, i: usize| {
            let inside = (id as usize) < VOCAB && place < NUM;
            if inside { read(&tokens, id, i) + read(&positions, place, i) } else { f32::from_bits(0x7fc0_0000) }
        };
        IDS.iter().zip(places).flat_map(|(id, place)| (0..width).map(move |i| element(*id, place, i))).collect()
    };
    let narrow = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
    let (ids, places) = (Array::new(context, &IDS), Array::new(context, &places));
    let wide = [Array::skewed(context, &tokens, skew), Array::skewed(context, &positions, skew)];
    let halves = [Array::skewed(context, &narrow(&tokens), skew), Array::skewed(context, &narrow(&positions), skew)];
    for (dtype, [table, second]) in
        [(DType::F32, wide.each_ref().map(Array::address)), (DType::Bf16, halves.each_ref().map(Array::address))]
    {
        let out = Array::nan(context, IDS.len() * width);
        let (rows, vocab) = (IDS.len() as u32, VOCAB as u32);
        let (table, positions) = (WeightAt::floats(table), Some((places.address(), WeightAt::floats(second), NUM)));
        let op = Embed { rows, width: width as u32, vocab, dtype, ids: ids.address(), index: None, table, positions, out: out.address() };
        words(embed(context, &op))?;
        same_bits(&sum(dtype == DType::Bf16), &out.read()?, &format!("{dtype:?}, width {width}, learned positions"))?;
    }
    Ok(())
}

/// Tables in groups give what their groups stand for, as the type of the values holds it.
pub fn groups_hold(context: &CudaContext) -> Result<(), String> {
    const NUM: usize = 40;
    let ids = [3, 0, NUM as u32 - 1, 31, 32];
    for (width, dtype) in [(1, DType::F32), (33, DType::Bf16), (64, DType::F32), (132, DType::Bf16)] {
        for (bits, position_bits) in [(Some(Bits::Eight), Some(Bits::Eight)), (Some(Bits::Four), None), (None, Some(Bits::Four))] {
            let (tokens, positions) = (noise(2, NUM * width), noise(3, NUM * width));
            let (token_values, position_values) = (kept(dtype, bits, &tokens, width), kept(dtype, position_bits, &positions, width));
            let places: Vec<u32> = ids.iter().map(|id| NUM as u32 - 1 - id).collect();
            let row = |values: &[f32], row: u32| values[row as usize * width..][..width].to_vec();
            let expected = ids.iter().zip(&places).flat_map(|(id, place)| {
                let (token, position) = (row(&token_values, *id), row(&position_values, *place));
                token.into_iter().zip(position).map(|(a, b)| a + b).collect::<Vec<f32>>()
            });
            let table = TestWeight::new(context, dtype, bits, (1, NUM, width), &tokens, (0, 0));
            let second = TestWeight::new(context, dtype, position_bits, (1, NUM, width), &positions, (0, 0));
            let (ids_at, places_at, out) =
                (Array::new(context, &ids), Array::new(context, &places), Array::nan(context, ids.len() * width));
            let op = Embed {
                rows: ids.len() as u32,
                width: width as u32,
                vocab: NUM as u32,
                dtype,
                ids: ids_at.address(),
                index: None,
                table: table.at(),
                positions: Some((places_at.address(), second.at(), NUM as u32)),
                out: out.address(),
            };
            words(embed(context, &op))?;
            let what = format!("{dtype:?}, width {width}, {bits:?} and {position_bits:?}");
            same_bits(&expected.collect::<Vec<f32>>(), &out.read()?, &what)?;
        }
    }
    Ok(())
}

#[test]
fn tables_in_groups_give_their_values() {
    machines().iter().for_each(|context| groups_hold(context).unwrap());
}

#[test]
fn rows_are_copied_exactly() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
