//! `sample` against `sampling::sample_row`: both routes in one batch, every kind of draw, and what
//! each of them refuses.
//!
//! The reference sees logits that are computed here by the sums that `gemm.cuh` promises, so that
//! tokens compare exactly wherever a draw is clear of a boundary; statistics compare within the
//! rounding of f32 exponentials.

use half::bf16;
use redraft::backend::DType;
use redraft::backend::group_blocks::Bits;
use redraft::cuda::Edit;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::sample::{DrawRecord, SampleOp, SampledRecord, flag, needs_nucleus, sample_in, status};
use redraft::sampling::{Draw, SampledToken, TopK, TopKOrder, TopPRule, sample_row};

use crate::emulator::{Array, Operand, TestWeight, edited_machines, gemm_dot, kept, machines, noise, words};

pub const PLAIN: Draw =
    Draw { u: 0.5, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, top_k: None, forced: None, truncated_confidence: false };
const GREEDY: Draw = Draw { temperature: 0.0, ..PLAIN };
const NUCLEUS: Draw = Draw { top_p: 0.9, ..PLAIN };

/// A head and rows of hidden states for it, already rounded to `dtype`.
struct Case {
    dtype: DType,
    vocab: usize,
    k: usize,
    /// Of a head in groups.
    bits: Option<Bits>,
    /// As it was before it was stored, and what it stands for.
    source: Vec<f32>,
    head: Vec<f32>,
    hidden: Vec<f32>,
    bias: Option<Vec<f32>>,
    banned: Vec<u32>,
}

impl Case {
    /// Rows of given logits: row r is feature r of the head, chosen by a one-hot hidden state, so
    /// that a product is exact.
    fn of_rows(rows: &[Vec<f32>]) -> Case {
        let (k, vocab) = (rows.len(), rows[0].len());
        let head: Vec<f32> = (0..vocab * k).map(|i| rows[i % k][i / k]).collect();
        let hidden = (0..k * k).map(|i| f32::from(i / k == i % k)).collect();
        Case { dtype: DType::F32, vocab, k, bits: None, source: head.clone(), head, hidden, bias: None, banned: Vec::new() }
    }

    fn random(dtype: DType, bits: Option<Bits>, rows: usize, vocab: usize, k: usize) -> Case {
        let round = |v: Vec<f32>| -> Vec<f32> {
            v.into_iter().map(|v| if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v }).collect()
        };
        let (source, hidden) = (noise(31, vocab * k), round(noise(32, rows * k)));
        let head = kept(dtype, bits, &source, k);
        Case { dtype, vocab, k, bits, source, head, hidden, bias: Some(noise(33, vocab)), banned: vec![7] }
    }

    fn rows(&self) -> usize {
        self.hidden.len() / self.k
    }

    /// The logits of a row as the kernels sum them, then the bias.
    fn logits(&self, context: &CudaContext, row: usize) -> Vec<f32> {
        let x = &self.hidden[row * self.k..(row + 1) * self.k];
        let sums = self.head.chunks(self.k).map(|w| gemm_dot(context, self.dtype, x, w));
        match &self.bias {
            Some(bias) => sums.zip(bias).map(|(sum, bias)| sum + bias).collect(),
            None => sums.collect(),
        }
    }

    /// Runs rows `rows` of the case; a draw of `None` is a row of padding.
    fn run(
        &self,
        context: &CudaContext,
        rows: std::ops::Range<usize>,
        draws: &[Option<Draw>],
        chunk_bytes: usize,
    ) -> Result<Vec<SampledRecord>, String> {
        let asked: Vec<DrawRecord> = draws.iter().enumerate().map(|(i, draw)| record(i, draw.as_ref())).collect();
        let hidden = Operand::new(context, self.dtype, &self.hidden[rows.start * self.k..rows.end * self.k], 0);
        let head = TestWeight::new(context, self.dtype, self.bits, (1, self.vocab, self.k), &self.source, (0, 0));
        let bias = self.bias.as_ref().map(|bias| Array::new(context, bias));
        let mut mask = vec![0u32; self.vocab.div_ceil(32)];
        self.banned.iter().filter(|id| (**id as usize) < self.vocab).for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
        let banned = (!self.banned.is_empty()).then(|| Array::new(context, &mask));
        let draw_records = Array::new(context, &asked);
        let untouched = SampledRecord { token: 77, chosen: 77, ..SampledRecord::default() };
        let sampled = Array::new(context, &vec![untouched; draws.len()]);
        let op = SampleOp {
            rows: draws.len() as u32,
            k: self.k as u32,
            vocab: self.vocab as u32,
            hidden: hidden.address(),
            dtype: self.dtype,
            head: head.at(),
            bias: bias.as_ref().map(Array::address),
            banned: banned.as_ref().map(Array::address),
            draws: draw_records.address(),
            sampled: sampled.address(),
            any_fused: draws.iter().flatten().any(|draw| !needs_nucleus(draw)),
            any_nucleus: draws.iter().flatten().any(needs_nucleus),
        };
        words(sample_in(context, &op, chunk_bytes))?;
        let sampled = sampled.read()?;
        for (i, (draw, found)) in draws.iter().zip(&sampled).enumerate() {
            if draw.is_none() && *found != untouched {
                return Err(format!("row {i} is padding, but it was answered: {found:?}"));
            }
            if draw.is_some() && (found.position, found.chosen) != (asked[i].position, 0) {
                return Err(format!("row {i}: {found:?} does not pass on its position, or is chosen already"));
            }
        }
        Ok(sampled)
    }

    /// Every row of the case against the reference. Counts (draws clear of a boundary, draws).
    /// Entropies and log probabilities err, all rows together, at most twice as much as a plain
    /// loop in f32, plus the rounding of the answers.
    fn agrees(&self, context: &CudaContext, draws: &[Draw], what: &str) -> Result<(usize, usize), String> {
        let asked: Vec<_> = draws.iter().copied().map(Some).collect();
        let found = self.run(context, 0..self.rows(), &asked, 64 << 20)?;
        let mut clear = 0;
        let (mut errors, mut allowed) = ([0.0f64; 2], [0.0f64; 2]);
        for (row, (draw, found)) in draws.iter().zip(&found).enumerate() {
            let what = format!("{what}, V {}, row {row}, {draw:?}", self.vocab);
            let got = found.sampled(row).map_err(|e| format!("{what}: {e}"))?;
            let logits = self.logits(context, row);
            let mut held = *draw;
            if is_clear(&logits, &self.banned, draw) {
                clear += 1;
            } else if draw.truncated_confidence {
                continue;
            } else {
                // Compared in everything that does not depend on the boundary.
                held.forced = Some(got.token);
            }
            let want = sample_row(&logits, &self.banned, &held).map_err(|e| format!("{what}: {e}"))?;
            agree(&got, &want).map_err(|e| format!("{what}: {e}"))?;
            let loops = plain(&logits, &self.banned, got.token);
            // The loop knows nothing of what temperature and nucleus leave.
            let raw = !held.truncated_confidence || held.forced.is_some();
            for (i, (got, want)) in [(got.entropy, want.entropy), (got.log_prob, want.log_prob)].into_iter().enumerate() {
                if i == 0 && !raw {
                    continue;
                }
                let rounding = f64::from(f32::EPSILON) * f64::from(want.abs());
                errors[i] += if got == want { 0.0 } else { f64::from(got - want).abs() };
                allowed[i] += rounding + if loops[i] == want { 0.0 } else { 2.0 * f64::from(loops[i] - want).abs() };
            }
        }
        if errors.iter().zip(&allowed).any(|(error, allowed)| error > allowed) {
            return Err(format!("{what}, V {}: entropy and log probability err by {errors:?}, {allowed:?} are allowed", self.vocab));
        }
        Ok((clear, draws.len()))
    }
}

/// Positions differ from rows, so that they are seen to be passed on.
fn record(row: usize, draw: Option<&Draw>) -> DrawRecord {
    let empty = DrawRecord { flags: flag::PADDING, u: f64::NAN, ..DrawRecord::default() };
    DrawRecord { position: 1000 + row as u32, sequence: 3, ..draw.map_or(empty, DrawRecord::from) }
}

/// Whether the token of `draw`, and what it shares the nucleus with, stay the same when u and p
/// move by more than f32 sums err.
pub fn is_clear(logits: &[f32], banned: &[u32], draw: &Draw) -> bool {
    let sampled = |du: f64, dp: f32| {
        let top_p = if draw.top_p < 1.0 { (draw.top_p + dp).clamp(1e-9, 0.999_999_9) } else { 1.0 };
        sample_row(logits, banned, &Draw { u: (draw.u + du).clamp(0.0, 1.0 - 1e-9), top_p, ..*draw }).expect("finite logits")
    };
    let at = sampled(0.0, 0.0);
    let same = |moved: SampledToken| moved.token == at.token && moved.confidence == at.confidence;
    [(1e-5, 0.0), (-1e-5, 0.0), (0.0, 1e-5), (0.0, -1e-5), (1e-5, 1e-5), (-1e-5, -1e-5)].iter().all(|&(du, dp)| same(sampled(du, dp)))
}

/// Entropy, and log probability of a token, by one loop in f32.
fn plain(logits: &[f32], banned: &[u32], token: u32) -> [f32; 2] {
    let allowed = || logits.iter().enumerate().filter(|(id, _)| !banned.contains(&(*id as u32))).map(|(_, l)| *l);
    let max = allowed().fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut moment) = (0.0f32, 0.0f32);
    for below in allowed().map(|l| l - max).filter(|below| *below > -100.0) {
        sum += below.exp();
        moment += below.exp() * below;
    }
    [(sum.ln() - moment / sum).max(0.0), logits[token as usize] - max - sum.ln()]
}

pub fn agree(got: &SampledToken, want: &SampledToken) -> Result<(), String> {
    let close = |a: f32, b: f32, tolerance: f32| (a - b).abs() <= tolerance || a == b;
    // f32 exponentials with wider sums: 1e-6 relative; entropy sums terms of up to ln V.
    let holds = got.token == want.token
        && close(got.confidence, want.confidence, 2e-6 * (1e-3 + want.confidence))
        && close(got.log_prob, want.log_prob, 2e-6 * (1.0 + want.log_prob.abs()))
        && close(got.margin, want.margin, 2e-6)
        && close(got.entropy, want.entropy, 2e-5);
    if holds { Ok(()) } else { Err(format!("{got:?}, the reference says {want:?}")) }
}

/// Every kind of draw once.
pub fn kinds(seed: u64, vocab: usize) -> Vec<Draw> {
    let kinds = [
        (1.0, 1.0, TopPRule::Within),
        (0.0, 1.0, TopPRule::Within),
        (0.5, 1.0, TopPRule::Within),
        (2.0, 1.0, TopPRule::Within),
        (1.0, 0.9, TopPRule::Within),
        (2.0, 0.9, TopPRule::Crossing),
        (0.5, 0.3, TopPRule::Crossing),
        (1.0, 0.999, TopPRule::Crossing),
        (1.0, 1e-6, TopPRule::Within),
        (0.0, 0.5, TopPRule::Crossing),
    ];
    let uniforms = noise(seed, kinds.len());
    let draw = |(i, &(temperature, top_p, top_p_rule)): (usize, &(f32, f32, TopPRule))| Draw {
        u: f64::from(uniforms[i]) / 2.0 + 0.5,
        temperature,
        top_p,
        top_p_rule,
        top_k: None,
        forced: None,
        truncated_confidence: (i as u64 + seed).is_multiple_of(2),
    };
    let mut draws: Vec<Draw> = kinds.iter().enumerate().map(draw).collect();
    let forced = |t| Draw { forced: Some(t), truncated_confidence: true, temperature: 0.3, top_p: 0.1, ..PLAIN };
    for (k, order, draw) in [(5, TopKOrder::Before, 0), (40, TopKOrder::After, 4), (9, TopKOrder::Before, 5), (2, TopKOrder::After, 9)] {
        draws.push(Draw { top_k: Some(TopK { k, order }), truncated_confidence: true, ..draws[draw] });
    }
    draws.extend([forced(0), forced(vocab as u32 - 1), Draw { temperature: 1.0, ..forced(vocab as u32 / 2) }]);
    draws
}

/// Both routes in one batch over the sizes around a piece (32), a tile (128) and a group of tiles
/// (4096).
pub fn equals_the_reference(context: &CudaContext) -> Result<(), String> {
    let (mut clear, mut total) = (0, 0);
    for (seed, vocab) in [1, 33, 200, 1000, 5000].into_iter().enumerate() {
        let draws = kinds(seed as u64, vocab);
        // Spreads from nearly uniform to nearly certain.
        let spread = |i: usize| noise(100 + i as u64, vocab).iter().map(|v| v * [3.0, 0.1, 12.0][i % 3]).collect();
        let mut case = Case::of_rows(&(0..draws.len()).map(spread).collect::<Vec<_>>());
        if vocab == 200 {
            case.bias = Some(noise(5, vocab));
            case.banned = vec![3, 32, 198];
        }
        let (c, t) = case.agrees(context, &draws, "kinds of draws")?;
        (clear, total) = (clear + c, total + t);
    }
    if clear * 10 < total * 8 { Err(format!("{clear} of {total} draws are clear of boundaries")) } else { Ok(()) }
}

/// Uniforms over the whole range, its ends included, ascend through the ids of both routes.
pub fn walks(context: &CudaContext) -> Result<(), String> {
    let vocab = 4500;
    let case = Case { hidden: vec![1.0; 26], ..Case::of_rows(&[noise(11, vocab)]) };
    for base in [PLAIN, Draw { temperature: 0.7, ..PLAIN }, NUCLEUS] {
        let at = |i: usize| [0.0, (i as f64 - 0.5) / 24.0, 1.0 - f64::EPSILON / 2.0][usize::from(i > 0) + usize::from(i == 25)];
        let draws: Vec<Draw> = (0..26).map(|i| Draw { u: at(i), ..base }).collect();
        case.agrees(context, &draws, "a walk")?;
        let asked: Vec<_> = draws.into_iter().map(Some).collect();
        let tokens: Vec<u32> = case.run(context, 0..26, &asked, 64 << 20)?.iter().map(|d| d.token).collect();
        let last = tokens[25] as usize;
        if !tokens.is_sorted() || (base.top_p == 1.0 && (tokens[0] != 0 || last != vocab - 1)) {
            return Err(format!("{base:?}: tokens {tokens:?}"));
        }
    }
    Ok(())
}

/// Equal logits across pieces, tiles and warps, clusters, neighbouring floats: where a nucleus ends
/// among them.
pub fn edges_of_nuclei(context: &CudaContext) -> Result<(), String> {
    let vocab = 700;
    let mut peaks = vec![0.0; vocab];
    [127, 128, 300, 699].iter().for_each(|id| peaks[*id] = 5.0);
    let nucleus = |u, top_p_rule| Draw { u, top_p: 0.25, top_p_rule, truncated_confidence: true, ..PLAIN };
    // Four equal tokens of 0.115 each: p = 0.25 keeps two within, three crossing.
    let draws = [GREEDY, nucleus(0.99, TopPRule::Within), nucleus(0.99, TopPRule::Crossing), nucleus(0.0, TopPRule::Crossing)];
    let case = Case { hidden: vec![1.0; 4], ..Case::of_rows(&[peaks]) };
    case.agrees(context, &draws, "ties")?;
    let found = case.run(context, 0..4, &draws.map(Some), 64 << 20)?;
    if found.iter().map(|d| d.token).collect::<Vec<_>>() != [127, 128, 300, 127] || found[0].margin != 0.0 {
        return Err(format!("ties: {found:?}"));
    }
    // Exact quarters: p of exactly one half keeps two under both rules. Zeros of either sign are
    // one logit.
    let quarters = Case { hidden: vec![1.0; 4], ..Case::of_rows(&[vec![0.0, -0.0, -0.0, 0.0]]) };
    let half = |u, top_p_rule| Draw { u, top_p: 0.5, top_p_rule, truncated_confidence: true, ..PLAIN };
    let draws = [half(0.4, TopPRule::Within), half(0.9, TopPRule::Within), half(0.4, TopPRule::Crossing), half(0.9, TopPRule::Crossing)];
    let found = quarters.run(context, 0..4, &draws.map(Some), 64 << 20)?;
    if found.iter().map(|d| (d.token, d.confidence)).collect::<Vec<_>>() != [(0, 0.5), (1, 0.5), (0, 0.5), (1, 0.5)] {
        return Err(format!("quarters: {found:?}"));
    }
    // A target that equals a cumulative mass belongs to the next id.
    let draws = [0.0, 0.25, 0.5, 0.75].map(|u| Some(Draw { u, ..PLAIN }));
    let found = quarters.run(context, 0..4, &draws, 64 << 20)?;
    if found.iter().map(|d| d.token).collect::<Vec<_>>() != [0, 1, 2, 3] {
        return Err(format!("quarters without a nucleus: {found:?}"));
    }

    let levels = noise(21, vocab).iter().map(|v| (v * 4.0).round() * 0.5 + 0.0).collect();
    let clusters = noise(22, vocab).iter().map(|v| if *v > 0.9 { 5.0 + v * 1e-3 } else { -5.0 + v * 1e-3 }).collect();
    let neighbours = (0..vocab).map(|i| f32::from_bits(3.0f32.to_bits() + (i * 37 % vocab) as u32)).collect();
    // More keys in the last bin than the kernel copies.
    let crowd = (0..2500).map(|i| f32::from_bits(3.0f32.to_bits() + (i * 37 % 2500) as u32)).collect();
    let rows: [Vec<f32>; 4] = [levels, clusters, neighbours, crowd];
    let mut all = Vec::new();
    for (i, top_p) in [0.0531, 0.1234, 0.37, 0.5019, 0.71, 0.9003, 0.98765].into_iter().enumerate() {
        for top_p_rule in [TopPRule::Within, TopPRule::Crossing] {
            let u = 0.137 * (i + 1) as f64;
            all.push(Draw { u, temperature: [0.5, 1.0, 2.0][i % 3], top_p, top_p_rule, truncated_confidence: true, ..PLAIN });
        }
    }
    let mut clear = 0;
    for row in rows {
        let case = Case { hidden: vec![1.0; all.len()], ..Case::of_rows(&[row]) };
        clear += case.agrees(context, &all, "edges")?.0;
    }
    if clear < 30 { Err(format!("{clear} of 56 nuclei are clear of boundaries")) } else { Ok(()) }
}

/// Top-k with nuclei on either side of it, with ties at its end, of everything, and of what bans
/// leave.
pub fn most_probable(context: &CudaContext) -> Result<(), String> {
    let vocab = 700;
    let levels: Vec<f32> = noise(41, vocab).iter().map(|v| (v * 8.0).round() * 0.5 + 0.0).collect();
    let mut few = vec![f32::NEG_INFINITY; vocab];
    [3, 200, 650].iter().for_each(|id| few[*id] = *id as f32 * 0.001);
    let mut all = Vec::new();
    for (i, k) in [1, 2, 7, 100, 699, 1 << 24].into_iter().enumerate() {
        for (j, top_p) in [1.0, 0.3, 0.8].into_iter().enumerate() {
            for (n, order) in [TopKOrder::Before, TopKOrder::After].into_iter().enumerate() {
                let u = 0.021 + 0.027 * all.len() as f64;
                let top_p_rule = [TopPRule::Within, TopPRule::Crossing][(i + n) % 2];
                let top_k = Some(TopK { k, order });
                all.push(Draw {
                    u,
                    temperature: [1.0, 0.5, 2.0, 0.0][(i + j) % 4],
                    top_p,
                    top_p_rule,
                    top_k,
                    truncated_confidence: j < 2,
                    ..PLAIN
                });
            }
        }
    }
    let mut clear = 0;
    for row in [levels, noise(42, vocab).iter().map(|v| v * 5.0).collect(), few] {
        let case = Case { hidden: vec![1.0; all.len()], banned: vec![200, 611], ..Case::of_rows(&[row]) };
        clear += case.agrees(context, &all, "most probable")?.0;
    }
    if clear < 80 { Err(format!("{clear} of 108 draws are clear of boundaries")) } else { Ok(()) }
}

/// Logits at the ends of their range, and one token alone.
fn extremes(context: &CudaContext) -> Result<(), String> {
    let vocab = 300;
    let mut one_left = vec![f32::NEG_INFINITY; vocab];
    one_left[299] = -3.0;
    let mut far = vec![-3e38; vocab];
    far[130] = 3e38;
    for row in [vec![0.0; vocab], vec![1e30; vocab], vec![-1e30; vocab], one_left, far] {
        // One row and one feature: nothing multiplies an infinity by zero.
        let case = Case { hidden: vec![1.0; 4], ..Case::of_rows(&[row]) };
        let draws =
            [Draw { u: 0.3001, ..PLAIN }, GREEDY, Draw { top_p: 0.5003, temperature: 0.8, ..PLAIN }, Draw { forced: Some(299), ..PLAIN }];
        case.agrees(context, &draws, "extremes")?;
    }
    Ok(())
}

/// A row that cannot be sampled is a status that names the token, on both routes; bans hide
/// it.
pub fn refusals(context: &CudaContext) -> Result<(), String> {
    let vocab = 300;
    for draw in [PLAIN, GREEDY, NUCLEUS, Draw { forced: Some(1), ..PLAIN }] {
        let status_of = |row: Vec<f32>, banned: &[u32], draw: Draw| -> Result<(u32, u32), String> {
            let case = Case { banned: banned.to_vec(), ..Case::of_rows(&[row]) };
            let found = case.run(context, 0..1, &[Some(draw)], 64 << 20)?[0];
            Ok((found.status, found.token))
        };
        for bad in [f32::NAN, f32::INFINITY] {
            for (at, rest) in [(0, 0.0), (31, f32::NEG_INFINITY), (128, 0.0), (299, f32::NEG_INFINITY)] {
                let mut row = vec![rest; vocab];
                row[at] = bad;
                row[299] = bad;
                let found = status_of(row.clone(), &[], draw)?;
                if found != (status::BROKEN, at as u32) {
                    return Err(format!("{draw:?}: {bad} at {at} gives {found:?}"));
                }
                row[1] = 2.0;
                let found = status_of(row, &[at as u32, 299], draw)?;
                if found.0 != status::OK || [at as u32, 299].contains(&found.1) {
                    return Err(format!("{draw:?}: a banned {bad} at {at} gives {found:?}"));
                }
            }
        }
        let nothing = [status_of(vec![f32::NEG_INFINITY; vocab], &[], draw)?.0, status_of(vec![1.0; 3], &[0, 1, 2], draw)?.0];
        if nothing != [status::NOTHING; 2] {
            return Err(format!("{draw:?}: nothing to choose from gives {nothing:?}"));
        }
    }
    for bad in [5, 300, u32::MAX] {
        let case = Case { banned: vec![5], ..Case::of_rows(&[vec![0.5; vocab]]) };
        let found = case.run(context, 0..1, &[Some(Draw { forced: Some(bad), ..PLAIN })], 64 << 20)?[0];
        if (found.status, found.token) != (status::FORCED, bad) {
            return Err(format!("forced {bad}: {found:?}"));
        }
    }
    Ok(())
}

/// The same bits alone, in batches that take every tile, and beside rows of the other route or of
/// padding; those of the reference.
fn in_company(context: &CudaContext, dtype: DType, bits: Option<Bits>) -> Result<(), String> {
    // 304: two segments of K, and rows whose bytes are a multiple of 16; the cases of single
    // features cover what is not.
    let case = Case::random(dtype, bits, 70, 290, 304);
    let all_kinds = kinds(9, case.vocab);
    let draws: Vec<Option<Draw>> = (0..70).map(|i| (i % 9 != 4).then(|| all_kinds[i % all_kinds.len()])).collect();
    let all = case.run(context, 0..70, &draws, 64 << 20)?;
    let mut clear = 0;
    for row in [0, 1, 2, 3, 5, 14, 20, 69] {
        let logits = case.logits(context, row);
        let draw = draws[row].expect("not padding");
        if is_clear(&logits, &case.banned, &draw) {
            clear += 1;
            let want = sample_row(&logits, &case.banned, &draw).map_err(|e| e.to_string())?;
            let got = all[row].sampled(row).map_err(|e| e.to_string())?;
            agree(&got, &want).map_err(|e| format!("{dtype:?}, row {row}, {draw:?}: {e}"))?;
        }
    }
    if clear < 4 {
        return Err(format!("{clear} of 8 rows are clear of boundaries"));
    }
    for (rows, chunk_bytes) in [(0..1, 64 << 20), (69..70, 64 << 20), (5..17, 64 << 20), (30..60, 64 << 20), (6..70, 64 << 20)] {
        let part = case.run(context, rows.clone(), &draws[rows.clone()], chunk_bytes)?;
        for (i, (got, want)) in part.iter().zip(&all[rows.clone()]).enumerate() {
            if draws[rows.start + i].is_some() && (SampledRecord { position: want.position, ..*got }) != *want {
                return Err(format!("{dtype:?}, row {i} of {rows:?}: {got:?}, among all rows {want:?}"));
            }
        }
    }
    Ok(())
}

/// [`in_company`], and in chunks.
fn alone_as_in_company(context: &CudaContext) -> Result<(), String> {
    for dtype in [DType::F32, DType::Bf16] {
        in_company(context, dtype, None)?;
    }
    // 128 rows are the least of a chunk: 150 go through in two.
    let case = Case::random(DType::F32, None, 150, 40, 3);
    let draws: Vec<_> = (0..150).map(|i| Some([PLAIN, NUCLEUS][i % 2])).collect();
    if case.run(context, 0..150, &draws, 1)? != case.run(context, 0..150, &draws, 64 << 20)? {
        return Err("in chunks of rows: other sampled tokens".to_owned());
    }
    Ok(())
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    [equals_the_reference, walks, edges_of_nuclei, most_probable, extremes, refusals, alone_as_in_company]
        .iter()
        .try_for_each(|part| part(context))
}

/// Heads in groups: both routes see the logits of their values.
pub fn groups_hold(context: &CudaContext) -> Result<(), String> {
    [Bits::Eight, Bits::Four]
        .into_iter()
        .try_for_each(|bits| [DType::F32, DType::Bf16].into_iter().try_for_each(|dtype| in_company(context, dtype, Some(bits))))
}

#[test]
fn heads_in_groups_are_sampled_by_their_values() {
    machines().iter().for_each(|context| groups_hold(context).unwrap());
}

/// A row whose masses are fewer than they were a moment ago, as damaged memory would have it: a
/// status, and no loop without end.
#[test]
fn a_draw_that_reaches_no_token_ends() {
    let from = "if (target >= kept) target = kept - 1;";
    let edit = Edit { file: "sample_nucleus.cu", from, to: "target = kept + 5;" };
    let case = Case { hidden: vec![1.0; 2], ..Case::of_rows(&[noise(11, 4500)]) };
    for context in edited_machines(Some(edit)) {
        let found = case.run(&context, 0..2, &[Some(NUCLEUS), Some(PLAIN)], 64 << 20).unwrap();
        assert_eq!((found[0].status, found[1].status), (status::CHANGED, status::OK));
        assert!(found[0].sampled(0).unwrap_err().to_string().contains("logits changed"));
    }
    // So few that one warp's ids are all there is.
    let case = Case::of_rows(&[noise(12, 20)]);
    let found = case.run(&edited_machines(Some(edit))[0], 0..1, &[Some(NUCLEUS)], 64 << 20).unwrap();
    assert_eq!(found[0].status, status::CHANGED);
}

#[test]
fn sampled_tokens_equal_the_reference() {
    for context in machines() {
        holds(&context).unwrap();
    }
}
