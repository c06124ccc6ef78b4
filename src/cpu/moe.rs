//! Rows through their experts: one grouped product for each projection, over the rows in the order
//! of the experts.
#![forbid(unsafe_code)]

use crate::backend::{Epilogue, ExpertShape, RowSource, RowsFrom, WeightFormat};
use crate::cpu::context::CpuContext;
use crate::cpu::linear::{self, Packed};
use crate::cpu::route::Routing;
use crate::cpu::simd::LANES;
use crate::error::Result;
use crate::packed_weights::PackedWords;

/// `num` weights of (n, k), packed each for itself: a panel never spans two experts.
pub struct ExpertWeights(pub Vec<Packed>);

impl ExpertWeights {
    pub fn new(
        context: &CpuContext,
        format: WeightFormat,
        num: usize,
        n: usize,
        k: usize,
        source: &dyn RowSource,
    ) -> Result<ExpertWeights> {
        let pack = |i: usize| Packed::new(context, format, n, k, &RowsFrom { source, first: i * n });
        (0..num).map(pack).collect::<Result<_>>().map(ExpertWeights)
    }

    /// Takes words that lie ready.
    pub fn of_words(
        context: &CpuContext,
        format: WeightFormat,
        num: usize,
        n: usize,
        k: usize,
        words: PackedWords,
    ) -> Result<ExpertWeights> {
        // Blocks are whole cache lines, so that nothing is padded.
        let each = words.len() / num;
        (0..num)
            .map(|i| Packed::of_words(context, format, n, k, words.part(i * each..(i + 1) * each)))
            .collect::<Result<_>>()
            .map(ExpertWeights)
    }
}

/// See [`crate::backend::Backend::moe`]. `x` and `out` hold the rows of the routing.
///
/// Errors: scratch memory that the system refuses.
pub fn moe(
    context: &CpuContext,
    routing: &mut Routing,
    x: &[f32],
    up: &ExpertWeights,
    down: &ExpertWeights,
    out: &mut [f32],
) -> Result<()> {
    let Routing { shape, choices, bounds, places, tokens, input, inner, output } = routing;
    let ExpertShape { top_k, hidden_dim: c, expert_dim: f, .. } = *shape;
    if choices.is_empty() {
        return Ok(());
    }
    let input = input.reserve(places.len() * c)?;
    context.pool_for(places.len() * c).chunks(input, c, &|place, row| row.copy_from_slice(&x[tokens[place] * c..][..c]));
    let inner = inner.reserve(places.len() * f)?;
    linear::grouped(context, bounds, input, &up.0, Epilogue::SwiGlu, inner)?;
    let output = output.reserve(places.len() * c)?;
    linear::grouped(context, bounds, inner, &down.0, Epilogue::Store, output)?;
    let output = &*output;
    let out = &mut out[..choices.len() / top_k * c];
    context.pool_for(places.len() * c).chunks(out, c, &|row, out| {
        let (choices, places) = (&choices[row * top_k..][..top_k], &places[row * top_k..][..top_k]);
        for (i, out) in out.chunks_mut(LANES).enumerate() {
            let mut sums = [0.0f32; LANES];
            for (choice, place) in choices.iter().zip(places) {
                let values = &output[place * c + i * LANES..][..out.len()];
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += choice.weight * value);
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    });
    Ok(())
}
