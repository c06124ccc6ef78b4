//! `sample_shortlist` against `sampling::sample_row` over the listed logits alone: every kind of
//! draw, lists of every length, and what it refuses.
//!
//! The reference sees logits that are computed here in the order that the kernel promises, so that
//! tokens compare exactly wherever a draw is clear of a boundary.

use half::bf16;
use redraft::backend::DType;
use redraft::backend::group_blocks::Bits;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::sample::{DrawRecord, SampledRecord, status};
use redraft::cuda::ops::shortlist::{NO_ID, SampleShortlistOp, sample_shortlist};
use redraft::sampling::{Draw, TopK, TopKOrder, TopPRule, sample_row};

use crate::emulator::{Array, Operand, TestWeight, kept, machines, noise, words};
use crate::sample::{PLAIN, agree, is_clear, kinds};

/// A head, rows of hidden states for it, already rounded to `dtype`, and lists of ids.
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
    count: usize,
    lists: Vec<Vec<u32>>,
}

impl Case {
    fn random(dtype: DType, bits: Option<Bits>, rows: usize, vocab: usize, k: usize, count: usize) -> Case {
        let scale = 4.0 / (k as f32).sqrt();
        let round = |v: Vec<f32>| -> Vec<f32> {
            v.into_iter().map(|v| if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v }).collect()
        };
        let source: Vec<f32> = noise(31, vocab * k).iter().map(|v| v * scale).collect();
        let head = kept(dtype, bits, &source, k);
        // Ascending, with gaps; the last ones are shorter than there is room.
        let list = |i: usize| -> Vec<u32> {
            let weight = noise(70 + i as u64, vocab);
            let mut ids: Vec<u32> = (0..vocab as u32).collect();
            ids.sort_by(|a, b| weight[*a as usize].total_cmp(&weight[*b as usize]));
            ids.truncate(if i == 0 { count } else { (count - count / (i + 1)).max(1) });
            ids.sort_unstable();
            ids
        };
        let hidden = round(noise(32, rows * k));
        Case { dtype, vocab, k, bits, source, head, hidden, bias: Some(noise(33, vocab)), count, lists: (0..3).map(list).collect() }
    }

    /// Lists of everything over logits that are given: one feature, so that products are exact.
    fn of_row(logits: Vec<f32>, rows: usize) -> Case {
        let vocab = logits.len();
        let lists = vec![(0..vocab as u32).collect()];
        let source = logits.clone();
        Case {
            dtype: DType::F32,
            vocab,
            k: 1,
            bits: None,
            source,
            head: logits,
            hidden: vec![1.0; rows],
            bias: None,
            count: vocab + 3,
            lists,
        }
    }

    /// Logits of a list, as the kernel sums them: lane l takes quads l, l + 32, ... of k, then the
    /// lanes meet in a butterfly.
    fn logits(&self, row: usize, list: usize) -> Vec<f32> {
        let x = &self.hidden[row * self.k..(row + 1) * self.k];
        let one = |id: &u32| {
            let w = &self.head[*id as usize * self.k..][..self.k];
            let mut lanes = [0.0f32; 32];
            for (at, (x, w)) in x.iter().zip(w).enumerate() {
                lanes[at / 4 % 32] = x.mul_add(*w, lanes[at / 4 % 32]);
            }
            for distance in [16, 8, 4, 2, 1] {
                lanes = std::array::from_fn(|l| lanes[l] + lanes[l ^ distance]);
            }
            self.bias.as_ref().map_or(lanes[0], |bias| lanes[0] + bias[*id as usize])
        };
        self.lists[list].iter().map(one).collect()
    }

    /// Rows `rows` of the case, row i by list `which[i]`.
    fn run(
        &self,
        context: &CudaContext,
        rows: std::ops::Range<usize>,
        which: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<SampledRecord>, String> {
        let hidden = Operand::new(context, self.dtype, &self.hidden[rows.start * self.k..rows.end * self.k], 0);
        let head = TestWeight::new(context, self.dtype, self.bits, (1, self.vocab, self.k), &self.source, (0, 0));
        let bias = self.bias.as_ref().map(|bias| Array::new(context, bias));
        let padded = |list: &Vec<u32>| list.iter().copied().chain(std::iter::repeat(NO_ID)).take(self.count).collect::<Vec<u32>>();
        let ids = Array::new(context, &self.lists.iter().flat_map(padded).collect::<Vec<u32>>());
        let which = Array::new(context, which);
        let records: Vec<DrawRecord> =
            draws.iter().enumerate().map(|(i, d)| DrawRecord { position: 1000 + i as u32, ..DrawRecord::from(d) }).collect();
        let draws = Array::new(context, &records);
        let sampled = Array::new(context, &vec![SampledRecord { token: 77, chosen: 77, ..SampledRecord::default() }; records.len()]);
        let op = SampleShortlistOp {
            rows: records.len() as u32,
            k: self.k as u32,
            hidden: hidden.address(),
            dtype: self.dtype,
            head: head.at(),
            bias: bias.as_ref().map(Array::address),
            count: self.count as u32,
            ids: ids.address(),
            which: which.address(),
            draws: draws.address(),
            sampled: sampled.address(),
        };
        words(sample_shortlist(context, &op))?;
        let found = sampled.read()?;
        match found.iter().enumerate().find(|(i, found)| (found.position, found.chosen) != (1000 + *i as u32, 0)) {
            Some((i, found)) => Err(format!("row {i}: {found:?} does not pass on its position, or is chosen already")),
            None => Ok(found),
        }
    }

    /// Every row against the reference. Forced tokens of `draws` are places in the list. Counts
    /// draws that are clear of a boundary.
    fn agrees(&self, context: &CudaContext, which: &[u32], draws: &[Draw], what: &str) -> Result<usize, String> {
        let ids = |row: usize| &self.lists[which[row] as usize];
        let asked: Vec<Draw> = draws
            .iter()
            .enumerate()
            .map(|(row, draw)| Draw { forced: draw.forced.map(|place| ids(row)[place as usize % ids(row).len()]), ..*draw })
            .collect();
        let found = self.run(context, 0..draws.len(), which, &asked)?;
        let mut clear = 0;
        for (row, (draw, found)) in draws.iter().zip(&found).enumerate() {
            let what = format!("{what}, {} of V {}, k {}, row {row}, {draw:?}", ids(row).len(), self.vocab, self.k);
            let mut got = found.sampled(row).map_err(|e| format!("{what}: {e}"))?;
            got.token = ids(row).binary_search(&got.token).map_err(|_| format!("{what}: {} is not listed", got.token))? as u32;
            let logits = self.logits(row, which[row] as usize);
            let mut held = Draw { forced: draw.forced.map(|place| place % ids(row).len() as u32), ..*draw };
            if is_clear(&logits, &[], &held) {
                clear += 1;
            } else if draw.truncated_confidence {
                continue;
            } else {
                held.forced = Some(got.token);
            }
            agree(&got, &sample_row(&logits, &[], &held).map_err(|e| format!("{what}: {e}"))?).map_err(|e| format!("{what}: {e}"))?;
        }
        Ok(clear)
    }
}

/// Every kind of draw, over lists that fill a part of a warp and several threads' spans, and
/// products that are aligned and not.
pub fn equals_the_reference(context: &CudaContext) -> Result<(), String> {
    let (mut clear, mut total) = (0, 0);
    for (seed, (vocab, k, count)) in [(5, 3, 2), (40, 40, 33), (700, 130, 300), (90, 268, 64)].into_iter().enumerate() {
        for dtype in [DType::F32, DType::Bf16] {
            let draws = kinds(seed as u64, count);
            let case = Case::random(dtype, None, draws.len(), vocab, k, count);
            let which: Vec<u32> = (0..draws.len() as u32).map(|row| (row + 1) % 3).collect();
            clear += case.agrees(context, &which, &draws, "kinds of draws")?;
            total += draws.len();
        }
    }
    // The longest list.
    let draws = [PLAIN, Draw { top_p: 0.7003, u: 0.4, truncated_confidence: true, ..PLAIN }];
    total += 2;
    clear += Case::random(DType::F32, None, 2, 1100, 8, 1024).agrees(context, &[0, 1], &draws, "the longest list")?;
    if clear * 10 < total * 8 { Err(format!("{clear} of {total} draws are clear of boundaries")) } else { Ok(()) }
}

/// Heads in groups: the logits of their values, at rows and widths that fill no block.
pub fn groups_hold(context: &CudaContext) -> Result<(), String> {
    for (vocab, k, count) in [(40, 40, 33), (90, 267, 64)] {
        for bits in [Bits::Eight, Bits::Four] {
            for dtype in [DType::F32, DType::Bf16] {
                let draws = kinds(k as u64, count);
                let case = Case::random(dtype, Some(bits), draws.len(), vocab, k, count);
                let which: Vec<u32> = (0..draws.len() as u32).map(|row| (row + 1) % 3).collect();
                let clear = case.agrees(context, &which, &draws, &format!("{bits:?}"))?;
                if clear * 10 < draws.len() * 8 {
                    return Err(format!("{clear} of {} draws are clear of boundaries", draws.len()));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn heads_in_groups_are_sampled_by_their_values() {
    machines().iter().for_each(|context| groups_hold(context).unwrap());
}

/// Equal logits, and boundaries that are met exactly: nuclei, top-k, uniforms at both ends.
pub fn edges(context: &CudaContext) -> Result<(), String> {
    // Exact quarters: p of exactly one half keeps two under both rules. Zeros of either sign are
    // one logit.
    let quarters = Case::of_row(vec![0.0, -0.0, -0.0, 0.0], 4);
    let half = |u, top_p_rule| Draw { u, top_p: 0.5, top_p_rule, truncated_confidence: true, ..PLAIN };
    let tokens = |case: &Case, draws: &[Draw]| -> Result<Vec<(u32, f32, f32)>, String> {
        let found = case.run(context, 0..draws.len(), &vec![0; draws.len()], draws)?;
        Ok(found.iter().map(|d| (d.token, d.confidence, d.margin)).collect())
    };
    let draws = [half(0.4, TopPRule::Within), half(0.9, TopPRule::Within), half(0.4, TopPRule::Crossing), half(0.9, TopPRule::Crossing)];
    let found = tokens(&quarters, &draws)?;
    if found != [(0, 0.5, 0.0), (1, 0.5, 0.0), (0, 0.5, 0.0), (1, 0.5, 0.0)] {
        return Err(format!("quarters: {found:?}"));
    }
    // A target that equals a cumulative mass belongs to the next id.
    let found = tokens(&quarters, &[0.0, 0.25, 0.5, 0.75].map(|u| Draw { u, ..PLAIN }))?;
    if found.iter().map(|(token, ..)| *token).collect::<Vec<_>>() != [0, 1, 2, 3] {
        return Err(format!("quarters without a nucleus: {found:?}"));
    }
    // One token is left, and nothing is beside it.
    let one = Draw { top_k: Some(TopK { k: 1, order: TopKOrder::Before }), truncated_confidence: true, u: 0.99, ..PLAIN };
    let found = tokens(&Case::of_row(vec![1.0, 3.0, 2.0], 1), &[one])?;
    if found != [(1, 1.0, 1.0)] {
        return Err(format!("one token: {found:?}"));
    }
    let vocab = 140;
    let levels: Vec<f32> = noise(41, vocab).iter().map(|v| (v * 8.0).round() * 0.5 + 0.0).collect();
    let mut few = vec![f32::NEG_INFINITY; vocab];
    [3, 70, 139].iter().for_each(|id| few[*id] = *id as f32 * 0.001);
    let mut all = vec![Draw { u: 0.0, ..PLAIN }, Draw { u: 1.0 - f64::EPSILON / 2.0, ..PLAIN }, Draw { temperature: 0.0, ..PLAIN }];
    for (i, k) in [1, 2, 7, 100, 1 << 24].into_iter().enumerate() {
        for (j, top_p) in [1.0, 0.3, 0.8].into_iter().enumerate() {
            for (n, order) in [TopKOrder::Before, TopKOrder::After].into_iter().enumerate() {
                let u = 0.021 + 0.027 * all.len() as f64;
                let top_p_rule = [TopPRule::Within, TopPRule::Crossing][(i + n) % 2];
                let temperature = [1.0, 0.5, 2.0, 0.0][(i + j) % 4];
                let top_k = Some(TopK { k, order });
                all.push(Draw { u, temperature, top_p, top_p_rule, top_k, truncated_confidence: j < 2, ..PLAIN });
            }
        }
    }
    let mut clear = 0;
    for row in [levels, noise(42, vocab).iter().map(|v| v * 5.0).collect(), few] {
        let case = Case::of_row(row, all.len());
        clear += case.agrees(context, &vec![0; all.len()], &all, "edges")?;
    }
    if clear < 70 { Err(format!("{clear} of 99 draws are clear of boundaries")) } else { Ok(()) }
}

/// A row that cannot be sampled is a status that names the token.
pub fn refusals(context: &CudaContext) -> Result<(), String> {
    let nucleus = Draw { top_p: 0.9, ..PLAIN };
    for draw in [PLAIN, Draw { temperature: 0.0, ..PLAIN }, nucleus, Draw { forced: Some(9), ..PLAIN }] {
        let status_of = |row: Vec<f32>, lists: Vec<u32>| -> Result<(u32, u32), String> {
            let found = Case { lists: vec![lists], ..Case::of_row(row, 1) }.run(context, 0..1, &[0], &[draw])?[0];
            Ok((found.status, found.token))
        };
        for bad in [f32::NAN, f32::INFINITY] {
            let mut row = vec![0.5; 300];
            row[40] = bad;
            row[299] = bad;
            let found = status_of(row.clone(), vec![9, 40, 299])?;
            if found != (status::BROKEN, 40) {
                return Err(format!("{draw:?}: {bad} gives {found:?}"));
            }
            if status_of(row, vec![9, 41, 298])?.0 != status::OK {
                return Err(format!("{draw:?}: {bad} off the list matters"));
            }
        }
        if status_of(vec![f32::NEG_INFINITY; 12], vec![2, 9])?.0 != status::NOTHING {
            return Err(format!("{draw:?}: nothing to choose from"));
        }
    }
    for bad in [8, 300, u32::MAX] {
        let case = Case { lists: vec![vec![2, 9]], ..Case::of_row(vec![0.5; 300], 1) };
        let found = case.run(context, 0..1, &[0], &[Draw { forced: Some(bad), ..PLAIN }])?[0];
        if (found.status, found.token) != (status::FORCED, bad) {
            return Err(format!("forced {bad}: {found:?}"));
        }
    }
    Ok(())
}

/// The same bits alone and in company.
fn alone_as_in_company(context: &CudaContext) -> Result<(), String> {
    let draws = kinds(9, 50);
    let case = Case::random(DType::Bf16, None, draws.len(), 200, 72, 50);
    let which: Vec<u32> = (0..draws.len() as u32).map(|row| row % 3).collect();
    let asked: Vec<Draw> =
        draws.iter().zip(&which).map(|(d, list)| Draw { forced: d.forced.map(|_| case.lists[*list as usize][0]), ..*d }).collect();
    let all = case.run(context, 0..asked.len(), &which, &asked)?;
    for row in 0..asked.len() {
        let found = case.run(context, row..row + 1, &which[row..row + 1], &asked[row..row + 1])?[0];
        if (SampledRecord { position: all[row].position, ..found }) != all[row] {
            return Err(format!("row {row}: {found:?}, among all rows {:?}", all[row]));
        }
    }
    Ok(())
}

#[test]
fn sampled_tokens_among_listed_ids_equal_the_reference() {
    for context in machines() {
        [equals_the_reference, edges, refusals, alone_as_in_company].iter().try_for_each(|part| part(&context)).unwrap();
    }
}
