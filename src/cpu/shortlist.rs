//! Shortlists: the most probable ids of each row, and the token choice among them.
//!
//! A list is found in the logits of its row: the n-th largest of the maxima of small groups is no
//! more than the n-th largest logit, so what is not below it is put in order and the rest is never
//! looked at again. Listed ids lie scattered over the vocabulary, and in the panels of a packed
//! weight every step of a row lies in a line of its own: the head is therefore kept a second time
//! by rows ([`linear::ByRows`]), and a logit is a dot product along k.
#![forbid(unsafe_code)]

use crate::backend::{Epilogue, not_on_shortlist};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::{self, Packed};
use crate::cpu::sample::{Between, CHUNK, sample_row};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::{Error, Result};
use crate::sampling::{Draw, SampledToken};

/// Ids of a group whose maximum is kept: four vectors.
const GROUP: usize = 4 * LANES;

/// Lists of ids, ascending.
pub struct Shortlists {
    ids: Vec<Vec<u32>>,
}

impl Shortlists {
    pub fn ids(&self) -> &[Vec<u32>] {
        &self.ids
    }
}

/// See [`crate::backend::Backend::shortlist`].
pub fn shortlist(
    context: &CpuContext,
    rows: usize,
    hidden: &[f32],
    head: &Packed,
    bias: Option<&[f32]>,
    banned: &[u32],
    n: usize,
) -> Result<Shortlists> {
    let (vocab, k) = (head.n(), head.k());
    let mut ids = vec![Vec::new(); rows];
    let mut scratch = context.logits();
    for (chunk, ids) in ids.chunks_mut(CHUNK).enumerate() {
        let logits = scratch.reserve(ids.len() * vocab)?;
        linear::linear(context, ids.len(), &hidden[chunk * CHUNK * k..], head, bias, Epilogue::Store, logits)?;
        let mut rows: Vec<_> = logits.chunks_exact_mut(vocab).zip(ids).collect();
        context.pool_for(rows.len() * vocab * 4).chunks(&mut rows, 1, &|_, row| {
            let (logits, ids) = &mut row[0];
            for &id in banned {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            **ids = largest(context, logits, n);
        });
    }
    Ok(Shortlists { ids })
}

/// The ids of the `n` largest finite logits, ascending; ties to the lower id.
fn largest(context: &CpuContext, logits: &[f32], n: usize) -> Vec<u32> {
    let mut maxima = context.isa.run(Maxima { logits });
    let floor = if n <= maxima.len() { *maxima.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1 } else { f32::NEG_INFINITY };
    let mut ids = Vec::new();
    context.isa.run(Between { logits, low: floor.next_down(), high: f32::MAX, first: 0, ids: &mut ids });
    if ids.len() > n {
        // None of them is NaN, which is no number in any range.
        let largest_first = |a: &u32, b: &u32| {
            let [a_logit, b_logit] = [a, b].map(|id| logits[*id as usize] + 0.0);
            b_logit.total_cmp(&a_logit).then(a.cmp(b))
        };
        ids.select_nth_unstable_by(n - 1, largest_first);
        ids.truncate(n);
        ids.sort_unstable();
    }
    ids
}

/// The maximum of every group; of a group with a NaN, any of its numbers.
struct Maxima<'a> {
    logits: &'a [f32],
}

impl Kernel for Maxima<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut maxima = Vec::with_capacity(self.logits.len().div_ceil(GROUP));
        for group in self.logits.chunks(GROUP) {
            let (blocks, tail) = group.as_chunks::<LANES>();
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..tail.len()].copy_from_slice(tail);
            let mut max = simd.load(&last);
            for block in blocks {
                max = simd.max(simd.load(block), max);
            }
            maxima.push(simd.max_lane(max));
        }
        maxima
    }
}

/// See [`crate::backend::Backend::sample`] with a list for each row.
pub fn sample_shortlist(
    context: &CpuContext,
    hidden: &[f32],
    head: &Packed,
    bias: Option<&[f32]>,
    lists: &Shortlists,
    which: &[u32],
    draws: &[Draw],
) -> Result<Vec<SampledToken>> {
    let by_rows = head.by_rows(context)?;
    let longest = which.iter().map(|list| lists.ids[*list as usize].len()).max().unwrap_or(0);
    let mut results: Vec<Option<Result<SampledToken>>> = vec![None; draws.len()];
    let mut rows: Vec<_> = results.iter_mut().zip(which).zip(draws).collect();
    context.pool_for(draws.len() * longest * head.k()).chunks(&mut rows, 1, &|i, row| {
        let ((result, which), draw) = &mut row[0];
        let ids = &lists.ids[**which as usize];
        let mut logits = vec![0.0; ids.len()];
        by_rows.products(context, &hidden[i * head.k()..][..head.k()], ids, &mut logits);
        if let Some(bias) = bias {
            logits.iter_mut().zip(ids).for_each(|(logit, id)| *logit += bias[*id as usize]);
        }
        **result = Some(sample_from_list(context, i, ids, &logits, draw));
    });
    results.into_iter().map(|result| result.expect("every row was sampled")).collect()
}

/// Row `row`, whose logits are those of `ids` and -inf elsewhere. Ids ascend, so ties and the
/// inverse CDF are those of whole rows.
fn sample_from_list(context: &CpuContext, row: usize, ids: &[u32], logits: &[f32], draw: &Draw) -> Result<SampledToken> {
    if let Some((id, logit)) = ids.iter().zip(logits).find(|(_, logit)| logit.is_nan() || **logit == f32::INFINITY) {
        return Err(Error::kernel(format!("row {row}: logit of token {id} is {logit}: the weights or activations are not finite")));
    }
    if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
        return Err(Error::kernel(format!("row {row}: no token of the shortlist has a finite logit")));
    }
    let place = |token: u32| ids.binary_search(&token).map(|at| at as u32).map_err(|_| not_on_shortlist(row, token));
    let forced = draw.forced.map(place).transpose()?;
    let sampled = sample_row(context, logits, &[], &Draw { forced, ..*draw })?;
    Ok(SampledToken { token: ids[sampled.token as usize], ..sampled })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DType;
    use crate::cpu::Cpu;

    /// Against sorting everything: ties, few groups and many, -inf, zeros of either sign.
    #[test]
    fn the_largest_are_those_of_a_sort() {
        let cpu = Cpu::new(1, DType::F32).expect("the CPU is always there");
        for vocab in [1usize, 15, 64, 65, 1000, 5003] {
            for levels in [3u32, 40, 1 << 20] {
                let mut logits: Vec<f32> = (0..vocab as u32)
                    .map(|id| match (id + 1).wrapping_mul(0x9E37_79B9) >> 8 {
                        h if h % 11 == 0 => f32::NEG_INFINITY,
                        h if h % 7 == 0 => -0.0,
                        h => (h % levels) as f32 - levels as f32 / 2.0,
                    })
                    .collect();
                logits[0] = 0.0;
                let mut order: Vec<u32> = (0..vocab as u32).filter(|id| logits[*id as usize] > f32::NEG_INFINITY).collect();
                order.sort_by(|a, b| (logits[*b as usize] + 0.0).total_cmp(&(logits[*a as usize] + 0.0)));
                for n in [1, 2, 15, 64, 300, vocab, vocab + 5] {
                    let mut expected = order[..n.min(order.len())].to_vec();
                    expected.sort_unstable();
                    assert_eq!(largest(&cpu.context, &logits, n), expected, "{vocab} ids on {levels} levels, {n}");
                }
            }
        }
    }
}
