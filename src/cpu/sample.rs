//! LM head and token choice. Rows go through in chunks, so only a chunk of logits exists at a time.
//!
//! A row is cut into vocabulary tiles of 2048 at fixed ids. One pass gives each tile its maximum,
//! its mass `sum exp(l - max)` and the moment that the entropy needs, all in f32 lanes over a tile
//! that stays in L1; tiles are joined in f64. The draw is the inverse CDF of `sampling::sample_row`
//! on two levels: the tile by cumulative mass, then the id inside it. The nucleus sorts nothing but
//! its own edge: tokens below `(1 - p) / V` can never be kept, since every token after a kept one
//! weighs at least `1 - p` together and no more than that token each; above that, thresholds close
//! in on the logit where the cumulative mass meets p, three per pass, until a few tokens are left
//! to put in order.
#![forbid(unsafe_code)]

use std::cmp::Ordering;

use crate::backend::Epilogue;
use crate::cpu::context::CpuContext;
use crate::cpu::linear::{self, Packed};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::error::{Error, Result};
use crate::sampling::{self, Draw, SampledToken, TopK, TopKOrder, TopPRule};

/// Rows whose logits exist at once: 64 rows of 50,258 are 12.9 MB, and the head is read once per 64
/// rows, which leaves the product bound by arithmetic.
pub const CHUNK: usize = 64;

/// Ids of a vocabulary tile: 8 KiB of logits.
const TILE: usize = 2048;

/// See [`crate::backend::Backend::sample`].
pub fn sample(
    context: &CpuContext,
    hidden: &[f32],
    head: &Packed,
    bias: Option<&[f32]>,
    banned: &[u32],
    draws: &[Draw],
) -> Result<Vec<SampledToken>> {
    let (vocab, k) = (head.n(), head.k());
    let mut sampled = Vec::with_capacity(draws.len());
    let mut scratch = context.logits();
    for (chunk, draws) in draws.chunks(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let logits = scratch.reserve(draws.len() * vocab)?;
        linear::linear(context, draws.len(), &hidden[first * k..], head, bias, Epilogue::Store, logits)?;
        let mut results: Vec<Option<Result<SampledToken>>> = vec![None; draws.len()];
        let mut rows: Vec<_> = logits.chunks_exact_mut(vocab).zip(&mut results).zip(draws).collect();
        context.pool_for(draws.len() * vocab * 4).chunks(&mut rows, 1, &|i, row| {
            let ((logits, result), draw) = &mut row[0];
            for &id in banned {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            **result = Some(sample_row(context, logits, banned, draw).map_err(|error| match error {
                Error::Kernel { what } => Error::kernel(format!("row {}: {what}", first + i)),
                Error::Request { what } => Error::request(format!("row {}: {what}", first + i)),
                other => other,
            }));
        });
        for result in results.into_iter().flatten() {
            sampled.push(result?);
        }
    }
    Ok(sampled)
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
pub fn sample_row(context: &CpuContext, logits: &[f32], banned: &[u32], draw: &Draw) -> Result<SampledToken> {
    let tiles = context.isa.run(Summarise { logits });
    let mut max = f32::NEG_INFINITY;
    let mut argtile = 0;
    for (i, tile) in tiles.iter().enumerate() {
        if tile.max > max {
            (max, argtile) = (tile.max, i);
        }
    }
    // NaN and +inf leave a NaN mass; the reference words the error, and that a row has nothing to
    // choose from.
    if max == f32::NEG_INFINITY || tiles.iter().any(|tile| tile.mass.is_nan()) {
        return sampling::sample_row(logits, banned, draw);
    }
    let (mut sum, mut moment) = (0.0, 0.0);
    for tile in tiles.iter().filter(|tile| tile.max > f32::NEG_INFINITY) {
        let below = f64::from(tile.max) - f64::from(max);
        let weight = below.exp();
        sum += tile.mass * weight;
        moment += (tile.moment + tile.mass * below) * weight;
    }
    let mut entropy = sum.ln() - moment / sum;
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

    let mut margin = (1.0 - (f64::from(second) - f64::from(max)).exp()) / sum;

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        // At temperatures 0 and 1, what is left where nothing is taken away is the raw
        // distribution.
        None if draw.truncated_confidence && (draw.top_p < 1.0 || draw.top_k.is_some() || ![0.0, 1.0].contains(&draw.temperature)) => {
            // At temperature 0 the nucleus is that of temperature 1, and its first token is taken.
            let temperature = if draw.temperature == 0.0 { 1.0 } else { draw.temperature };
            let kept = truncated_draw(context, logits, &tiles, max, argmax, &Draw { temperature, ..*draw });
            let greedy = draw.temperature == 0.0;
            kept_share = Some(if greedy { 1.0 / kept.mass } else { kept.share });
            (margin, entropy) = (kept.margin, kept.entropy);
            if greedy { argmax } else { kept.token }
        }
        None if draw.temperature == 0.0 => argmax,
        None => draw_token(context, logits, &tiles, max, argmax, draw),
    };
    let Some(&logit) = logits.get(token).filter(|_| !banned.contains(&(token as u32))) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - f64::from(max) - sum.ln();
    let confidence = kept_share.unwrap_or_else(|| log_prob.exp());
    Ok(SampledToken {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: margin as f32,
        entropy: entropy.max(0.0) as f32,
    })
}

/// What logits are multiplied by at a temperature. The inverse of one below 2.9e-39 is not a finite
/// f32: the largest stands for it, under which all that is not the maximum has no mass either.
fn inverse(temperature: f32) -> f32 {
    (1.0 / temperature).min(f32::MAX)
}

/// Mass of each tile after temperature, relative to the row's maximum.
fn tile_masses(context: &CpuContext, logits: &[f32], tiles: &[TileSums], max: f32, temperature: f32) -> Vec<f64> {
    if temperature == 1.0 {
        tiles.iter().map(|tile| if tile.max > f32::NEG_INFINITY { tile.mass * f64::from(tile.max - max).exp() } else { 0.0 }).collect()
    } else {
        context.isa.run(Masses { logits, max, inverse_temperature: inverse(temperature) })
    }
}

/// Draws a token after temperature and nucleus.
fn draw_token(context: &CpuContext, logits: &[f32], tiles: &[TileSums], max: f32, argmax: usize, draw: &Draw) -> usize {
    if draw.top_p < 1.0 || draw.top_k.is_some() {
        return truncated_draw(context, logits, tiles, max, argmax, draw).token;
    }
    let inverse_temperature = inverse(draw.temperature);
    let masses = tile_masses(context, logits, tiles, max, draw.temperature);
    let total: f64 = masses.iter().sum();
    let target = draw.u * total;
    let mut before = 0.0;
    let mut chosen = argmax;
    for (i, &mass) in masses.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
        let tile = &logits[i * TILE..logits.len().min((i + 1) * TILE)];
        if before + mass <= target {
            before += mass;
            // Should rounding leave the target past the last tile, its last token with any mass is
            // chosen.
            let floor = max - 87.0 * draw.temperature;
            chosen = tile.iter().rposition(|&l| l > floor).map_or(chosen, |at| i * TILE + at);
            continue;
        }
        let mut exponentials = tile.to_vec();
        context.isa.run(Exponentials { logits: &mut exponentials, max, inverse_temperature });
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
    chosen
}

/// A draw from what temperature, top-k and nucleus leave of a row.
struct TruncatedDraw {
    token: usize,
    /// Of the token, in what is left.
    share: f64,
    /// What is left, relative to the mass of the most probable token.
    mass: f64,
    /// Top-1 minus top-2 and entropy of what is left, where the draw asks for them.
    margin: f64,
    entropy: f64,
}

/// Draws from what top-k and nucleus leave, or from everything where there are none.
fn truncated_draw(context: &CpuContext, logits: &[f32], tiles: &[TileSums], max: f32, argmax: usize, draw: &Draw) -> TruncatedDraw {
    let mut total: f64 = tile_masses(context, logits, tiles, max, draw.temperature).iter().sum();
    let mut masses = context.spare_row();
    masses.clear();
    masses.extend_from_slice(logits);
    context.isa.run(Exponentials { logits: &mut masses, max, inverse_temperature: inverse(draw.temperature) });

    // Top-k keeps what is above this.
    let floor = draw.top_k.map_or(f32::NEG_INFINITY, |TopK { k, .. }| kth(context, logits, tiles, k as usize).next_down());
    if draw.top_k.is_some_and(|top_k| top_k.order == TopKOrder::Before) {
        total = context.isa.run(Above { logits, masses: &masses, threshold: floor }).iter().sum();
    }
    let mut cut = match draw.top_p < 1.0 {
        true => edge(context, logits, &masses, max, total, draw),
        false => Cut { logit: f32::NEG_INFINITY, at: Vec::new() },
    };
    // Both keep a prefix of the same order.
    if cut.logit <= floor {
        cut = Cut { logit: floor, at: Vec::new() };
    }
    let mut tiles = context.isa.run(Above { logits, masses: &masses, threshold: cut.logit });
    for &id in &cut.at {
        tiles[id as usize / TILE] += f64::from(masses[id as usize]);
    }
    let kept = |id: usize| logits[id] > cut.logit || logits[id] == cut.logit && cut.at.last().is_some_and(|&last| id <= last as usize);
    let kept_total: f64 = tiles.iter().sum();
    let target = draw.u * kept_total;
    let mut before = 0.0;
    let mut chosen = None;
    for (i, &mass) in tiles.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
        let ids = i * TILE..logits.len().min((i + 1) * TILE);
        if before + mass <= target {
            before += mass;
            // Should rounding leave the target past the last tile, its last kept token is
            // chosen.
            chosen = ids.rev().find(|&id| kept(id) && masses[id] > 0.0).or(chosen);
            continue;
        }
        let mut cumulative = before;
        for id in ids.filter(|&id| kept(id) && masses[id] > 0.0) {
            cumulative += f64::from(masses[id]);
            chosen = Some(id);
            if cumulative > target {
                break;
            }
        }
        break;
    }
    // The most probable token is always kept and weighs 1, so there is one.
    let chosen = chosen.unwrap_or(argmax);
    let share = f64::from(masses[chosen]) / kept_total;
    let (mut second, mut moment) = (0.0f32, 0.0f64);
    if draw.truncated_confidence {
        for (id, &mass) in masses.iter().enumerate().filter(|(id, mass)| **mass > 0.0 && kept(*id)) {
            moment += f64::from(mass) * (f64::from(logits[id]) - f64::from(max));
            if id != argmax {
                second = second.max(mass);
            }
        }
    }
    context.keep_spare_row(masses);
    let margin = (1.0 - f64::from(second)) / kept_total;
    let entropy = kept_total.ln() - moment / f64::from(draw.temperature) / kept_total;
    TruncatedDraw { token: chosen, share, mass: kept_total, margin, entropy }
}

/// The k-th largest logit, the smallest where there are fewer. No token of the k lies below the
/// k-th largest of the tiles' maxima.
fn kth(context: &CpuContext, logits: &[f32], tiles: &[TileSums], k: usize) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut maxima: Vec<f32> = tiles.iter().map(|tile| tile.max).collect();
    let floor = if k <= maxima.len() { *maxima.select_nth_unstable_by(k - 1, descending).1 } else { f32::NEG_INFINITY };
    let mut ids = Vec::new();
    for (i, tile) in logits.chunks(TILE).enumerate() {
        context.isa.run(Between { logits: tile, low: floor.next_down(), high: f32::INFINITY, first: i * TILE, ids: &mut ids });
    }
    let mut largest: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    let last = k.min(largest.len()) - 1;
    *largest.select_nth_unstable_by(last, descending).1
}

/// The end of the nucleus: tokens above `logit` are kept, and of those equal to it the ones in
/// `at`, ids ascending.
struct Cut {
    logit: f32,
    at: Vec<u32>,
}

/// Where the nucleus ends. In the order larger logit first, lower id first, a token is kept while
/// the cumulative probability obeys the rule, and the first always.
fn edge(context: &CpuContext, logits: &[f32], masses: &[f32], max: f32, total: f64, draw: &Draw) -> Cut {
    let top_p = f64::from(draw.top_p);
    // Whether the tokens above a threshold, of this mass together, are all kept. Where they are
    // not, what comes after them is not either: under the crossing rule they reach p, so nothing
    // may follow.
    let all_kept = |mass: f64| match draw.top_p_rule {
        TopPRule::Within => mass / total <= top_p,
        TopPRule::Crossing => mass / total < top_p,
    };
    // Logit at which the probability is (1 - p) / V, less a margin for the rounding of masses.
    let least = (total * (1.0 - top_p) / logits.len() as f64).ln().max(-87.0) * f64::from(draw.temperature);
    let room = 1e-4 * (1.0 + least.abs()) * f64::from(draw.temperature).max(1.0);
    // Tokens above `high` are kept, of mass `before` together; tokens at or below `low` are not.
    let mut high = max;
    let mut low = ((f64::from(max) + least - room) as f32).min(max.next_down());
    let mut before = 0.0;
    // A pass halves the interval twice: forty bring any two f32 together that a temperature would
    // tell apart.
    for _ in 0..40 {
        let middle = low + (high - low) / 2.0;
        let thresholds = [low + (middle - low) / 2.0, middle, middle + (high - middle) / 2.0];
        let above = context.isa.run(Thresholds { logits, masses, thresholds, low, high });
        if above.between <= 32 {
            break;
        }
        let (old_low, old_high) = (low, high);
        for (threshold, mass) in thresholds.into_iter().zip(above.mass) {
            if all_kept(mass) {
                // The lowest threshold above which all is kept; the higher ones bring nothing new.
                if threshold < high {
                    (high, before) = (threshold, mass);
                }
                break;
            }
            low = low.max(threshold);
        }
        if (old_low, old_high) == (low, high) {
            // Neighbours: one value is left.
            break;
        }
    }
    let mut order: Vec<u32> = Vec::new();
    for (i, tile) in logits.chunks(TILE).enumerate() {
        context.isa.run(Between { logits: tile, low, high, first: i * TILE, ids: &mut order });
    }
    // Stable, so equal logits stay by id; 0 and -0 are equal. None is NaN: the row was checked.
    order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap_or(Ordering::Equal));
    let mut cut = Cut { logit: high, at: Vec::new() };
    for id in order {
        let (logit, mass) = (logits[id as usize], f64::from(masses[id as usize]));
        let kept = match draw.top_p_rule {
            TopPRule::Within => (before + mass) / total <= top_p,
            TopPRule::Crossing => before / total < top_p,
        };
        // Under either rule the most probable token stays: nothing is before it.
        if !kept && before > 0.0 {
            break;
        }
        before += mass;
        if logit < cut.logit {
            cut.at.clear();
        }
        cut.logit = logit;
        cut.at.push(id);
    }
    cut
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

/// Mass of the tokens above `threshold`, of every tile.
struct Above<'a> {
    logits: &'a [f32],
    masses: &'a [f32],
    threshold: f32,
}

impl Kernel for Above<'_> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f64> {
        let mut sums = Vec::with_capacity(self.logits.len().div_ceil(TILE));
        for (logits, masses) in self.logits.chunks(TILE).zip(self.masses.chunks(TILE)) {
            let mut sum = simd.splat(0.0);
            for (logits, masses) in Lanes::of(logits, masses) {
                let mass = simd.select_gt(simd.load(&logits), simd.splat(self.threshold), simd.load(&masses), simd.splat(0.0));
                sum = simd.add(sum, mass);
            }
            sums.push(f64::from(simd.sum(sum)));
        }
        sums
    }
}

/// Mass of the tokens above each threshold, and how many lie in (low, high].
struct Thresholds<'a> {
    logits: &'a [f32],
    masses: &'a [f32],
    thresholds: [f32; 3],
    low: f32,
    high: f32,
}

struct AboveThresholds {
    mass: [f64; 3],
    between: usize,
}

impl Kernel for Thresholds<'_> {
    type Output = AboveThresholds;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> AboveThresholds {
        let mut above = AboveThresholds { mass: [0.0; 3], between: 0 };
        let thresholds = self.thresholds.map(|threshold| simd.splat(threshold));
        let (low, high, zero, one) = (simd.splat(self.low), simd.splat(self.high), simd.splat(0.0), simd.splat(1.0));
        for (logits, masses) in self.logits.chunks(TILE).zip(self.masses.chunks(TILE)) {
            let mut sums = [zero; 3];
            let mut between = zero;
            for (logits, masses) in Lanes::of(logits, masses) {
                let (logits, masses) = (simd.load(&logits), simd.load(&masses));
                for i in 0..3 {
                    sums[i] = simd.add(sums[i], simd.select_gt(logits, thresholds[i], masses, zero));
                }
                let above_low = simd.select_gt(logits, low, one, zero);
                between = simd.add(between, simd.select_gt(logits, high, zero, above_low));
            }
            for (mass, sum) in above.mass.iter_mut().zip(sums) {
                *mass += f64::from(simd.sum(sum));
            }
            above.between += simd.sum(between) as usize;
        }
        above
    }
}

/// Appends the ids, `first` onwards, of logits in (low, high], ascending.
pub struct Between<'a> {
    pub logits: &'a [f32],
    pub low: f32,
    pub high: f32,
    pub first: usize,
    pub ids: &'a mut Vec<u32>,
}

impl Kernel for Between<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (low, high) = (simd.splat(self.low), simd.splat(self.high));
        let mut at = self.first;
        for (logits, _) in Lanes::of(self.logits, self.logits) {
            let logits = simd.load(&logits);
            let mut mask = simd.mask_ge(high, logits) & !simd.mask_ge(low, logits);
            while mask != 0 {
                self.ids.push(at as u32 + mask.trailing_zeros());
                mask &= mask - 1;
            }
            at += LANES;
        }
    }
}

/// Sixteen elements of both at a time, the last ones padded with -inf.
///
/// A loop over them, and not a function that takes a closure: what a closure does with vectors is
/// not compiled for the instruction set, and each of its instructions becomes a call.
struct Lanes<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl<'a> Lanes<'a> {
    #[inline(always)]
    fn of(a: &'a [f32], b: &'a [f32]) -> Lanes<'a> {
        Lanes { a, b }
    }
}

impl Iterator for Lanes<'_> {
    type Item = ([f32; LANES], [f32; LANES]);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if let (Some((a, a_rest)), Some((b, b_rest))) = (self.a.split_first_chunk(), self.b.split_first_chunk()) {
            (self.a, self.b) = (a_rest, b_rest);
            return Some((*a, *b));
        }
        if self.a.is_empty() {
            return None;
        }
        let mut last = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        last.0[..self.a.len()].copy_from_slice(self.a);
        last.1[..self.b.len()].copy_from_slice(self.b);
        (self.a, self.b) = (&[], &[]);
        Some(last)
    }
}
