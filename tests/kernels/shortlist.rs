//! `shortlist` lists what a sort would: the largest finite logits that are not banned, ties to the
//! lower id, ascending.

use half::bf16;
use redraft::backend::DType;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::shortlist::{NO_ID, ShortlistOp, shortlist_in};
use redraft::cuda::ops::weight::WeightAt;

use crate::emulator::{Array, machines, noise, words};

/// Rows of given logits: row r is feature r of the head, chosen by a one-hot hidden state, so that
/// a product is exact.
fn lists(
    context: &CudaContext,
    dtype: DType,
    rows: &[Vec<f32>],
    banned: &[u32],
    count: usize,
    chunk_bytes: usize,
) -> Result<Vec<u32>, String> {
    let (k, vocab) = (rows.len(), rows[0].len());
    let head: Vec<f32> = (0..vocab * k).map(|i| rows[i % k][i / k]).collect();
    let hidden: Vec<f32> = (0..k * k).map(|i| f32::from(i / k == i % k)).collect();
    let half = |v: &[f32]| -> Vec<bf16> { v.iter().map(|v| bf16::from_f32(*v)).collect() };
    let (head32, hidden32) = (Array::new(context, &head), Array::new(context, &hidden));
    let (head16, hidden16) = (Array::new(context, &half(&head)), Array::new(context, &half(&hidden)));
    let mut mask = vec![0u32; vocab.div_ceil(32)];
    banned.iter().filter(|id| (**id as usize) < vocab).for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
    let mask = (!banned.is_empty()).then(|| Array::new(context, &mask));
    let ids = Array::new(context, &vec![77u32; k * count]);
    let wide = dtype == DType::F32;
    let op = ShortlistOp {
        rows: k as u32,
        k: k as u32,
        vocab: vocab as u32,
        hidden: if wide { hidden32.address() } else { hidden16.address() },
        dtype,
        head: WeightAt::floats(if wide { head32.address() } else { head16.address() }),
        bias: None,
        banned: mask.as_ref().map(Array::address),
        count: count as u32,
        ids: ids.address(),
    };
    words(shortlist_in(context, &op, chunk_bytes))?;
    ids.read()
}

fn expected(row: &[f32], banned: &[u32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY && !banned.contains(id)).collect();
    // Stable, so ties stay in the order of the ids.
    ids.sort_by(|a, b| (row[*b as usize] + 0.0).total_cmp(&(row[*a as usize] + 0.0)));
    ids.truncate(count);
    ids.sort_unstable();
    ids.resize(count, NO_ID);
    ids
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    for vocab in [1, 33, 256, 700] {
        // Quarters are exact in bf16; few levels are many ties.
        let level = |seed: u64, levels: f32| noise(seed, vocab).iter().map(|v| (v * levels).round() * 0.25).collect::<Vec<f32>>();
        let rows = [level(1, 3.0), level(2, 100.0), level(3, 12.0)];
        for count in [1, 2, 9, 300] {
            for banned in [&[][..], &[0, 5, 31, 32, 600]] {
                for dtype in [DType::F32, DType::Bf16] {
                    let found = lists(context, dtype, &rows, banned, count, 64 << 20)?;
                    for (row, found) in rows.iter().zip(found.chunks(count)) {
                        let expected = expected(row, banned, count);
                        if found != expected {
                            return Err(format!("V {vocab}, {count} ids, {dtype:?}, {banned:?} banned: {found:?}, expected {expected:?}"));
                        }
                    }
                }
            }
        }
    }
    // One feature: nothing multiplies an infinity by zero. Zeros of either sign are one logit.
    let mut row = vec![f32::NEG_INFINITY; 600];
    [7, 300, 299, 599].iter().for_each(|id| row[*id] = -2.0);
    row[450] = 3e38;
    let zeros: Vec<f32> = (0..600).map(|id| if id % 3 == 0 { 0.0 } else { -0.0 }).collect();
    for row in [row, zeros] {
        for count in [2, 5, 40] {
            let (found, expected) =
                (lists(context, DType::F32, std::slice::from_ref(&row), &[], count, 64 << 20)?, expected(&row, &[], count));
            if found != expected {
                return Err(format!("{count} ids: {found:?}, expected {expected:?}"));
            }
        }
    }
    // 128 rows are the least of a chunk: 150 go through in two.
    let rows: Vec<Vec<f32>> = (0..150).map(|i| noise(50 + i, 40)).collect();
    if lists(context, DType::F32, &rows, &[3], 4, 1)? != rows.iter().flat_map(|row| expected(row, &[3], 4)).collect::<Vec<_>>() {
        return Err("in chunks of rows: other lists".to_owned());
    }
    Ok(())
}

#[test]
fn lists_hold_the_largest() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
