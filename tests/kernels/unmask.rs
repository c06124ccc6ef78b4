//! `unmask` takes what `sampling::select` takes and leaves the canvas as `sequence.rs` leaves it.

use std::num::NonZeroUsize;

use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::remask::state;
use redraft::cuda::ops::sample::{SampledRecord, status};
use redraft::cuda::ops::select_masked::{SequenceSummary, StepRecord, step_error};
use redraft::cuda::ops::unmask::{UnmaskParams, unmask};
use redraft::rng::{DrawKey, uniforms};
use redraft::sampling::{BlockProgress, Candidate, Rank, SampledToken, Unmask, UnmaskStep, select};
use redraft::sampling::{Count, EntropyBound, Ranking, UnmaskRule};

use crate::emulator::{Array, machines, noise, words};

const CANVAS: u32 = 700;
const MASK: u32 = 50_257;

/// A sequence that num_sampled every second position from 1 on; `levels` distinct values, so that
/// few levels mean many ties.
struct Sequence {
    step: StepRecord,
    unmask: UnmaskStep,
    sampled: Vec<SampledRecord>,
    before: SequenceSummary,
}

fn sequence(seed: u64, num_sampled: u32, levels: f32, unmask: UnmaskStep) -> Sequence {
    let value = |n: u64, i: u32| (noise(1000 * seed + n, num_sampled as usize)[i as usize].abs() * levels).ceil() / levels;
    let sampled = |i: u32| SampledRecord {
        token: 40 + i,
        confidence: value(1, i),
        log_prob: -1.0,
        margin: value(2, i) - 0.5,
        entropy: value(3, i) * 0.1,
        status: status::OK,
        position: 1 + 2 * i,
        chosen: 0,
    };
    let step = StepRecord { seed, sample: 3, stage: 2, block: 1, step: 77, sample_count: num_sampled, ..StepRecord::default() };
    let step = step.unmasking(&unmask);
    Sequence {
        step,
        unmask,
        sampled: (0..num_sampled).map(sampled).collect(),
        before: SequenceSummary { sampled: num_sampled, ..SequenceSummary::default() },
    }
}

/// What the reference takes, or its error.
fn reference(sequence: &Sequence) -> (Vec<usize>, SequenceSummary) {
    let Sequence { step, unmask, sampled, before } = sequence;
    let nothing = |error, detail| (Vec::new(), SequenceSummary { error, detail, ..*before });
    if before.error != step_error::NONE || sampled.is_empty() {
        return (Vec::new(), *before);
    }
    let nan = |d: &SampledRecord| d.confidence.is_nan() || d.margin.is_nan() || d.entropy.is_nan();
    if let Some(i) = sampled.iter().position(|d| d.status != status::OK || nan(d)) {
        return nothing(if sampled[i].status != status::OK { step_error::SAMPLING } else { step_error::NAN }, i as u32);
    }
    let candidates: Vec<Candidate> = sampled
        .iter()
        .map(|d| {
            let StepRecord { seed, sample, stage, block, step, .. } = *step;
            let key = DrawKey { seed, sample, stage: stage as u8, block, step, position: d.position };
            let SampledRecord { token, confidence, log_prob, margin, entropy, position, .. } = *d;
            let sampled = SampledToken { token, confidence, log_prob, margin, entropy };
            Candidate { position: position as usize, sampled, order: uniforms(key).order }
        })
        .collect();
    let unmask = match *unmask {
        UnmaskStep::Best { rank, n } => Unmask::new(Count { ranking: rank.into(), n: NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN) }),
        UnmaskStep::Threshold(bound) => Unmask::new(Reaches(bound)),
        // Below 0 the first alone is within.
        UnmaskStep::EntropyBound(bound) if bound < 0.0 => Unmask::new(Count { ranking: Rank::Entropy.into(), n: NonZeroUsize::MIN }),
        UnmaskStep::EntropyBound(bound) => Unmask::new(EntropyBound::new(bound).expect("a bound")),
    };
    let progress = BlockProgress { block_len: candidates.len(), masks_at_start: candidates.len(), masks: candidates.len(), step: 0 };
    let chosen = select(&unmask, progress, &candidates).expect("no NaN");
    let revealed = chosen.len() as u32;
    (chosen, SequenceSummary { revealed, ..*before })
}

/// `threshold:T` for any T: a stage takes none that is not a probability, a kernel does.
#[derive(Debug)]
struct Reaches(f32);

impl UnmaskRule for Reaches {
    fn value(&self) -> String {
        format!("reaches:{}", self.0)
    }

    fn select(&self, _: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let best = Ranking::from(Rank::Confidence).best_first(candidates)[0];
        (0..candidates.len()).filter(|i| *i == best || candidates[*i].sampled.confidence >= self.0).collect()
    }
}

/// The canvas of one sequence, as the arrays of the kernel; confidences as bits.
#[derive(Clone, Debug, PartialEq)]
struct Flat {
    token: Vec<u32>,
    confidence: Vec<u32>,
    state: Vec<u8>,
    stage: Vec<u8>,
    step: Vec<u32>,
}

fn check(context: &CudaContext, mut sequences: Vec<Sequence>) -> Result<(), String> {
    let mut num_sampled = 0;
    for (s, sequence) in sequences.iter_mut().enumerate() {
        sequence.step.canvas_first = s as u32 * CANVAS;
        sequence.step.sample_first = num_sampled;
        num_sampled += sequence.step.sample_count;
    }
    let n = sequences.len() * CANVAS as usize;
    let mut expected =
        Flat { token: vec![MASK; n], confidence: vec![0; n], state: vec![state::MASKED; n], stage: vec![9; n], step: vec![0; n] };
    let mut sampled: Vec<SampledRecord> = sequences.iter().flat_map(|s| s.sampled.iter().copied()).collect();
    let steps = Array::new(context, &sequences.iter().map(|s| s.step).collect::<Vec<_>>());
    let summaries = Array::new(context, &sequences.iter().map(|s| s.before).collect::<Vec<_>>());
    let records = Array::new(context, &sampled);
    let token = Array::new(context, &expected.token);
    let confidence = Array::new(context, &expected.confidence);
    let (state, stage) = (Array::new(context, &expected.state), Array::new(context, &expected.stage));
    let step = Array::new(context, &expected.step);
    let params = UnmaskParams {
        sequences: steps.address(),
        summaries: summaries.address(),
        sampled: records.address(),
        token: token.address(),
        confidence: confidence.address(),
        state: state.address(),
        stage: stage.address(),
        step: step.address(),
    };
    words(unmask(context, sequences.len() as u32, &params))?;

    let summaries = summaries.read()?;
    for (s, sequence) in sequences.iter().enumerate() {
        let (chosen, summary) = reference(sequence);
        for &i in &chosen {
            let record = &mut sampled[sequence.step.sample_first as usize + i];
            record.chosen = 1;
            let at = (sequence.step.canvas_first + record.position) as usize;
            expected.token[at] = record.token;
            expected.confidence[at] = record.confidence.clamp(f32::MIN_POSITIVE, 1.0).to_bits();
            expected.state[at] = redraft::cuda::ops::remask::state::REVEALED;
            expected.stage[at] = sequence.step.stage as u8;
            expected.step[at] = sequence.step.step;
        }
        if summaries[s] != summary {
            return Err(format!("sequence {s}, {:?}: {:?}, expected {summary:?}", sequence.unmask, summaries[s]));
        }
    }
    let found = records.read()?;
    // By their bits: NaN equals itself.
    let bits = |records: &[SampledRecord]| bytemuck::cast_slice::<_, [u32; 8]>(records).to_vec();
    if let Some(i) = (0..found.len()).find(|i| bits(&found)[*i] != bits(&sampled)[*i]) {
        let s = sequences.iter().position(|s| i < (s.step.sample_first + s.step.sample_count) as usize).expect("a row of a sequence");
        return Err(format!("sequence {s}, {:?}: {:?}, expected {:?}", sequences[s].unmask, found[i], sampled[i]));
    }
    let after =
        Flat { token: token.read()?, confidence: confidence.read()?, state: state.read()?, stage: stage.read()?, step: step.read()? };
    if after != expected {
        return Err("the right sampled tokens, but not the canvas that a sequence leaves".to_owned());
    }
    Ok(())
}

/// Values whose order is easy to get wrong: zeros of both signs, infinities, negatives, subnormals,
/// more than one.
fn odd_values(unmask: UnmaskStep) -> Sequence {
    let odd = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, -1.0, f32::MIN_POSITIVE, 1e-45, 1.0, -0.0, 0.0, 1.5, 1e-45];
    let mut sequence = sequence(7, odd.len() as u32, 1.0, unmask);
    for (i, sampled) in sequence.sampled.iter_mut().enumerate() {
        (sampled.confidence, sampled.margin, sampled.entropy) = (odd[i], odd[(i + 3) % 12], odd[(i + 5) % 12]);
    }
    sequence
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    let ranks = [Rank::Uniform, Rank::Confidence, Rank::Margin, Rank::Entropy, Rank::Left];
    for rank in ranks {
        let best = |n| UnmaskStep::Best { rank, n };
        let mut sequences = vec![
            sequence(1, 1, 1.0, best(1)),
            sequence(2, 0, 1.0, best(3)),
            sequence(3, 300, 3.0, best(70)),
            sequence(4, 300, 1e6, best(257)),
            sequence(5, 256, 1.0, best(100)),
            sequence(6, 40, 4.0, best(0)),
            sequence(7, 40, 4.0, best(1000)),
        ];
        // Zeros and halves of every rank but the uniform's: all of its bits are random.
        sequences.extend((1..12).map(|n| odd_values(best(n))));
        check(context, sequences)?;
    }
    let bounds = [0.0, 1e-3, 0.3, 0.5, 0.9, 5.0, 1e6, -1.0];
    check(
        context,
        bounds.iter().flat_map(|b| [sequence(11, 300, 8.0, UnmaskStep::Threshold(*b)), odd_values(UnmaskStep::Threshold(*b))]).collect(),
    )?;
    check(context, bounds.iter().map(|b| sequence(12, 60, 50.0, UnmaskStep::EntropyBound(*b))).collect())?;
    check(context, bounds.iter().map(|b| sequence(13, 270, 1.0, UnmaskStep::EntropyBound(*b))).collect())?;

    // What stops a sequence stops it alone.
    let all = UnmaskStep::Best { rank: Rank::Confidence, n: 400 };
    let mut sequences: Vec<Sequence> = (0..8).map(|i| sequence(20 + i, 290, 9.0, all)).collect();
    sequences[1].sampled[288].confidence = f32::NAN;
    sequences[2].sampled[3].margin = -f32::NAN;
    sequences[3].sampled[289].entropy = f32::NAN;
    sequences[4].sampled[270].status = status::BROKEN;
    sequences[4].sampled[280].confidence = f32::NAN;
    sequences[5].sampled[0].status = status::FORCED;
    sequences[6].before = SequenceSummary { error: step_error::COUNT, detail: 12, sampled: 290, revealed: 0 };
    check(context, sequences)
}

#[test]
fn the_right_positions_are_revealed() {
    for context in machines() {
        holds(&context).unwrap();
    }
}
