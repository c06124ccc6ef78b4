//! LM head and token choice. Rows go through in chunks, so only a chunk of logits exists at a time.
//!
//! A row is cut into vocabulary tiles of 2048 at fixed ids. One pass gives each tile its maximum, its mass
//! `sum exp(l - max)` and the moment that the entropy needs, all in f32 lanes over a tile that stays in L1; tiles are joined
//! in f64. The draw is the inverse CDF of `policy::decide_row` on two levels: the tile by cumulative mass, then the id inside it.
//! The nucleus sorts nothing but its own edge: tokens below `(1 - p) / V` can never be kept, since whatever follows a kept
//! token weighs at least `1 - p` together and no more than that token each; the rest is counted into bins of logit, and only
//! the bin where the cumulative mass crosses p is put in order.
#![forbid(unsafe_code)]

use crate::backend::{Decision, Draw, Epilogue, TopPRule};
use crate::cpu::Machine;
use crate::cpu::linear::{self, Packed};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::{Error, Result};
use crate::policy;

/// Rows whose logits exist at once: 64 rows of 50,258 are 12.9 MB, and the head is read once per 64 rows, which leaves the
/// product bound by arithmetic.
const CHUNK: usize = 64;

/// Ids of a vocabulary tile: 8 KiB of logits.
const TILE: usize = 2048;

/// See [`crate::backend::Backend::decide`].
pub fn decide(
    machine: &Machine,
    hidden: &[f32],
    head: &Packed,
    bias: Option<&[f32]>,
    banned: &[u32],
    draws: &[Draw],
) -> Result<Vec<Decision>> {
    let Packed { n: vocab, k, .. } = *head;
    let mut decisions = Vec::with_capacity(draws.len());
    let mut scratch = machine.logits();
    for (chunk, draws) in draws.chunks(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let logits = scratch.reserve(draws.len() * vocab);
        linear::linear(machine, draws.len(), &hidden[first * k..], head, bias, Epilogue::Store, logits);
        let mut results: Vec<Option<Result<Decision>>> = vec![None; draws.len()];
        let mut rows: Vec<_> = logits.chunks_exact_mut(vocab).zip(&mut results).zip(draws).collect();
        machine.pool_for(draws.len() * vocab * 4).chunks(&mut rows, 1, &|i, row| {
            let ((logits, result), draw) = &mut row[0];
            for &id in banned {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            **result = Some(decide_row(machine, logits, banned, draw).map_err(|error| match error {
                Error::Kernel { what } => Error::kernel(format!("row {}: {what}", first + i)),
                Error::Request { what } => Error::request(format!("row {}: {what}", first + i)),
                other => other,
            }));
        });
        for result in results.into_iter().flatten() {
            decisions.push(result?);
        }
    }
    Ok(decisions)
}

/// What one pass leaves of a vocabulary tile.
#[derive(Clone, Copy, Default)]
struct TileSums {
    max: f32,
    /// `sum exp(l - max)`
    mass: f64,
    /// `sum exp(l - max) (l - max)`
    moment: f64,
}

/// One row whose banned logits are -inf.
fn decide_row(machine: &Machine, logits: &[f32], banned: &[u32], draw: &Draw) -> Result<Decision> {
    let tiles = machine.isa.run(Summarise { logits });
    let mut max = f32::NEG_INFINITY;
    let mut argtile = 0;
    for (i, tile) in tiles.iter().enumerate() {
        if tile.max > max {
            (max, argtile) = (tile.max, i);
        }
    }
    // NaN and +inf leave a NaN mass; the law words the error, and that a row has nothing to choose from.
    if max == f32::NEG_INFINITY || tiles.iter().any(|tile| tile.mass.is_nan()) {
        return policy::decide_row(logits, banned, draw);
    }
    let (mut sum, mut moment) = (0.0, 0.0);
    for tile in tiles.iter().filter(|tile| tile.max > f32::NEG_INFINITY) {
        let below = f64::from(tile.max) - f64::from(max);
        let weight = below.exp();
        sum += tile.mass * weight;
        moment += (tile.moment + tile.mass * below) * weight;
    }
    let entropy = sum.ln() - moment / sum;
    let in_argtile = &logits[argtile * TILE..logits.len().min((argtile + 1) * TILE)];
    let argmax_in_tile = in_argtile.iter().position(|&l| l == max).unwrap_or(0);
    let argmax = argtile * TILE + argmax_in_tile;
    let mut second = f32::NEG_INFINITY;
    for (i, &logit) in in_argtile.iter().enumerate() {
        if i != argmax_in_tile && logit > second {
            second = logit;
        }
    }
    for (i, tile) in tiles.iter().enumerate() {
        if i != argtile && tile.max > second {
            second = tile.max;
        }
    }

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        None if draw.temperature == 0.0 => argmax,
        None => {
            let (token, share) = sample(machine, logits, &tiles, max, argmax, draw);
            kept_share = Some(share);
            token
        }
    };
    let Some(&logit) = logits.get(token).filter(|_| !banned.contains(&(token as u32))) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - f64::from(max) - sum.ln();
    let confidence = match kept_share {
        Some(share) if draw.truncated_confidence => share,
        None if draw.truncated_confidence && draw.forced.is_none() => 1.0,
        _ => log_prob.exp(),
    };
    Ok(Decision {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: ((1.0 - (f64::from(second) - f64::from(max)).exp()) / sum) as f32,
        entropy: entropy.max(0.0) as f32,
    })
}

/// Draws a token after temperature and nucleus: its id and its share of what was kept.
fn sample(machine: &Machine, logits: &[f32], tiles: &[TileSums], max: f32, argmax: usize, draw: &Draw) -> (usize, f64) {
    let inverse_temperature = 1.0 / draw.temperature;
    // Mass of each tile relative to the row's maximum.
    let masses: Vec<f64> = if draw.temperature == 1.0 {
        tiles.iter().map(|tile| if tile.max > f32::NEG_INFINITY { tile.mass * f64::from(tile.max - max).exp() } else { 0.0 }).collect()
    } else {
        machine.isa.run(Masses { logits, max, inverse_temperature })
    };
    let total: f64 = masses.iter().sum();
    if draw.top_p < 1.0 {
        return nucleus(machine, logits, tiles, max, total, draw);
    }
    let target = draw.u * total;
    let mut before = 0.0;
    let mut chosen = argmax;
    for (i, &mass) in masses.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
        let tile = &logits[i * TILE..logits.len().min((i + 1) * TILE)];
        if before + mass <= target {
            before += mass;
            // Should rounding leave the target past the last tile, its last token with any mass is the answer.
            let floor = max - 87.0 * draw.temperature;
            chosen = tile.iter().rposition(|&l| l > floor).map_or(chosen, |at| i * TILE + at);
            continue;
        }
        let mut exponentials = tile.to_vec();
        machine.isa.run(Exponentials { logits: &mut exponentials, max, inverse_temperature });
        let mut cumulative = before;
        for (at, &e) in exponentials.iter().enumerate().filter(|(_, e)| **e > 0.0) {
            cumulative += f64::from(e);
            chosen = i * TILE + at;
            if cumulative > target {
                break;
            }
        }
        break;
    }
    let mut one = [logits[chosen]];
    machine.isa.run(Exponentials { logits: &mut one, max, inverse_temperature });
    (chosen, f64::from(one[0]) / total)
}

/// Draws from the nucleus; `total` is the mass of the whole row after temperature, relative to `max`.
fn nucleus(machine: &Machine, logits: &[f32], tiles: &[TileSums], max: f32, total: f64, draw: &Draw) -> (usize, f64) {
    let top_p = f64::from(draw.top_p);
    // Logit at which the probability is (1 - p) / V, with room for the rounding of masses. The most probable token stays in.
    let least = (total * (1.0 - top_p) / logits.len() as f64).ln().max(-87.0) * f64::from(draw.temperature);
    let room = 1e-4 * (1.0 + least.abs()) * f64::from(draw.temperature).max(1.0);
    let floor = (f64::from(max) + least - room).min(f64::from(max)) as f32;
    // Ids ascending, their logits and their masses.
    let mut ids = Vec::new();
    for (i, _) in tiles.iter().enumerate().filter(|(_, tile)| tile.max >= floor) {
        machine.isa.run(AtLeast { logits: &logits[i * TILE..logits.len().min((i + 1) * TILE)], floor, first: i * TILE, ids: &mut ids });
    }
    let values: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    let mut masses = values.clone();
    machine.isa.run(Exponentials { logits: &mut masses, max, inverse_temperature: 1.0 / draw.temperature });

    let (last_logit, last_id) = edge(&ids, &values, &masses, max, floor, total, draw);
    let kept = |i: usize| values[i] > last_logit || values[i] == last_logit && ids[i] <= last_id;
    let kept_total: f64 = (0..ids.len()).filter(|&i| kept(i)).map(|i| f64::from(masses[i])).sum();
    let target = draw.u * kept_total;
    let mut cumulative = 0.0;
    let mut chosen = 0;
    for i in (0..ids.len()).filter(|&i| kept(i) && masses[i] > 0.0) {
        cumulative += f64::from(masses[i]);
        chosen = i;
        if cumulative > target {
            break;
        }
    }
    (ids[chosen] as usize, f64::from(masses[chosen]) / kept_total)
}

/// The last kept token, as (logit, id), in the order larger logit first, lower id first. In that order a token is kept while
/// the cumulative probability obeys the rule, and the first always.
///
/// Tokens fall into bins by logit: a bin's tokens all come before the next one's. Whole bins are kept until one holds the
/// edge, and only that one is sorted.
fn edge(ids: &[u32], values: &[f32], masses: &[f32], max: f32, floor: f32, total: f64, draw: &Draw) -> (f32, u32) {
    const BINS: usize = 1024;
    let top_p = f64::from(draw.top_p);
    let within = |before: f64, mass: f64| match draw.top_p_rule {
        TopPRule::Within => (before + mass) / total <= top_p,
        TopPRule::Crossing => before / total < top_p,
    };
    let scale = (BINS - 1) as f32 / (max - floor).max(f32::MIN_POSITIVE);
    // Monotonic in the value: a difference, a product and a cut to an integer all are.
    let bin = |value: f32| (((max - value) * scale) as usize).min(BINS - 1);
    let mut bins = [0.0f64; BINS];
    for (&value, &mass) in values.iter().zip(masses) {
        bins[bin(value)] += f64::from(mass);
    }
    // The first bin that is not kept whole. For the crossing rule that is one whose end reaches p: its tokens may cross.
    let mut before = 0.0;
    let mut edge_bin = BINS - 1;
    for (i, &mass) in bins.iter().enumerate() {
        let whole = match draw.top_p_rule {
            TopPRule::Within => (before + mass) / total <= top_p,
            TopPRule::Crossing => (before + mass) / total < top_p,
        };
        if !whole {
            edge_bin = i;
            break;
        }
        before += if i + 1 < BINS { mass } else { 0.0 };
    }
    let mut order: Vec<usize> = (0..ids.len()).filter(|&i| bin(values[i]) == edge_bin).collect();
    order.sort_unstable_by(|&a, &b| values[b].total_cmp(&values[a]).then(ids[a].cmp(&ids[b])));
    // Whatever the rule says, the most probable token stays: nothing is before it.
    let mut last = None;
    for i in order {
        let mass = f64::from(masses[i]);
        if !within(before, mass) && (last.is_some() || before > 0.0) {
            break;
        }
        last = Some((values[i], ids[i]));
        before += mass;
    }
    // Nothing of this bin: the edge is the lowest token of the bins above it, which `values` above its own bin all beat.
    last.unwrap_or_else(|| {
        let above = (0..ids.len()).filter(|&i| bin(values[i]) < edge_bin);
        let lowest = above.min_by(|&a, &b| values[a].total_cmp(&values[b]).then(ids[b].cmp(&ids[a])));
        lowest.map_or((max, u32::MAX), |i| (values[i], ids[i]))
    })
}

/// Maximum, mass and moment of every tile.
struct Summarise<'a> {
    logits: &'a [f32],
}

impl Kernel for Summarise<'_> {
    type Output = Vec<TileSums>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<TileSums> {
        let mut sums = Vec::with_capacity(self.logits.len().div_ceil(TILE));
        for tile in self.logits.chunks(TILE) {
            let (blocks, tail) = tile.as_chunks::<LANES>();
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..tail.len()].copy_from_slice(tail);
            // Two chains hide the latency of the maximum.
            let mut largest = [simd.load(&last), simd.splat(f32::NEG_INFINITY)];
            let (pairs, single) = blocks.as_chunks::<2>();
            for pair in pairs {
                largest[0] = simd.max(largest[0], simd.load(&pair[0]));
                largest[1] = simd.max(largest[1], simd.load(&pair[1]));
            }
            for block in single {
                largest[0] = simd.max(largest[0], simd.load(block));
            }
            let max = simd.max_lane(simd.max(largest[0], largest[1]));
            if max == f32::NEG_INFINITY {
                let mut nan = false;
                for &l in tile {
                    nan |= l.is_nan();
                }
                let mass = if nan { f64::NAN } else { 0.0 };
                sums.push(TileSums { max, mass, moment: 0.0 });
                continue;
            }
            let mut mass = [simd.splat(0.0); 2];
            let mut moment = [simd.splat(0.0); 2];
            for pair in pairs {
                for i in 0..2 {
                    weigh(simd, simd.load(&pair[i]), max, &mut mass[i], &mut moment[i]);
                }
            }
            for block in single {
                weigh(simd, simd.load(block), max, &mut mass[0], &mut moment[0]);
            }
            weigh(simd, simd.load(&last), max, &mut mass[1], &mut moment[1]);
            let (mass, moment) = (simd.add(mass[0], mass[1]), simd.add(moment[0], moment[1]));
            sums.push(TileSums { max, mass: f64::from(simd.sum(mass)), moment: f64::from(simd.sum(moment)) });
        }
        sums
    }
}

#[inline(always)]
fn weigh<S: Simd>(simd: S, logits: S::F, max: f32, mass: &mut S::F, moment: &mut S::F) {
    let below = simd.sub(logits, simd.splat(max));
    let e = simd.exp(below);
    *mass = simd.add(*mass, e);
    // -inf times 0 would be NaN.
    *moment = simd.fma(e, simd.max(simd.splat(-100.0), below), *moment);
}

/// `sum exp((l - max) / temperature)` of every tile.
struct Masses<'a> {
    logits: &'a [f32],
    max: f32,
    inverse_temperature: f32,
}

impl Kernel for Masses<'_> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f64> {
        let mut masses = Vec::with_capacity(self.logits.len().div_ceil(TILE));
        for tile in self.logits.chunks(TILE) {
            let (blocks, tail) = tile.as_chunks::<LANES>();
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..tail.len()].copy_from_slice(tail);
            let mut mass = tempered(simd, &last, self.max, self.inverse_temperature);
            for block in blocks {
                mass = simd.add(mass, tempered(simd, block, self.max, self.inverse_temperature));
            }
            masses.push(f64::from(simd.sum(mass)));
        }
        masses
    }
}

#[inline(always)]
fn tempered<S: Simd>(simd: S, logits: &[f32; LANES], max: f32, inverse_temperature: f32) -> S::F {
    simd.exp(simd.mul(simd.sub(simd.load(logits), simd.splat(max)), simd.splat(inverse_temperature)))
}

/// Replaces each logit by `exp((l - max) / temperature)`.
struct Exponentials<'a> {
    logits: &'a mut [f32],
    max: f32,
    inverse_temperature: f32,
}

impl Kernel for Exponentials<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (blocks, tail) = self.logits.as_chunks_mut::<LANES>();
        for block in blocks {
            let e = tempered(simd, block, self.max, self.inverse_temperature);
            simd.store(e, block);
        }
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        let e = tempered(simd, &last, self.max, self.inverse_temperature);
        simd.store(e, &mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Appends the ids, `first` onwards, of logits at or above `floor`, ascending.
struct AtLeast<'a> {
    logits: &'a [f32],
    floor: f32,
    first: usize,
    ids: &'a mut Vec<u32>,
}

impl Kernel for AtLeast<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (blocks, tail) = self.logits.as_chunks::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        let floor = simd.splat(self.floor);
        for (i, block) in blocks.iter().chain([&last]).enumerate() {
            let mut mask = simd.mask_ge(simd.load(block), floor);
            while mask != 0 {
                self.ids.push((self.first + i * LANES) as u32 + mask.trailing_zeros());
                mask &= mask - 1;
            }
        }
    }
}
