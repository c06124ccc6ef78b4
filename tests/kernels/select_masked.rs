//! `select_masked` lists what `sequence.rs` would sample: masked positions ascending, with the
//! uniforms of their keys.

use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::remask::state;
use redraft::cuda::ops::sample::{DrawRecord, flag};
use redraft::cuda::ops::select_masked::{SelectMasked, SequenceSummary, StepRecord, select_masked, step_error};
use redraft::rng::{DrawKey, uniforms};

use crate::emulator::{Array, machines, noise, words};

/// Lengths around the CTA size, an empty range, a range inside the canvas; (length, range).
const SEQUENCES: [(u32, std::ops::Range<u32>); 6] =
    [(1, 0..1), (255, 0..255), (256, 256..256), (600, 10..523), (40, 32..40), (513, 0..513)];
const BUCKET: usize = 1000;

fn masked(states: &[u8], first: u32, range: std::ops::Range<u32>) -> Vec<u32> {
    range.filter(|p| states[(first + p) as usize] == state::MASKED).collect()
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    let total: u32 = SEQUENCES.iter().map(|(len, _)| len).sum();
    let roles = noise(1, total as usize);
    let role = |r: &f32| [state::FIXED, state::MASKED, state::REVEALED][usize::from(*r > -0.5) + usize::from(*r > 0.4)];
    let mut states: Vec<u8> = roles.iter().map(role).collect();
    states[0] = state::MASKED;
    let mut steps = Vec::new();
    let mut canvas_first = 0;
    for (i, (len, range)) in SEQUENCES.into_iter().enumerate() {
        let i = i as u32;
        let count = masked(&states, canvas_first, range.clone()).len() as u32;
        steps.push(StepRecord {
            seed: 1 << 40 | u64::from(i),
            canvas_first,
            range_begin: range.start,
            range_end: range.end,
            row_first: 100 * i,
            rows_begin: range.start / 2,
            // One prediction too low, one too high.
            sample_count: count + u32::from(i == 3) - u32::from(i == 1),
            sample: 2 + i,
            stage: i % 3,
            block: 5 + i,
            step: 9 * i,
            temperature: 0.25 * i as f32,
            top_p: 0.9,
            flags: flag::TRUNCATED * (i % 2),
            ..StepRecord::default()
        });
        canvas_first += len;
    }
    // Last sequence first: what sequence 1 samples beyond its count would land on the row of
    // sequence 0, which is written by then.
    let mut sample_first = 0;
    for step in steps.iter_mut().rev() {
        step.sample_first = sample_first;
        sample_first += step.sample_count;
    }
    let earlier = SequenceSummary { error: step_error::NAN, detail: 4, ..SequenceSummary::default() };
    let before: Vec<_> = (0..steps.len()).map(|i| if i == 3 { earlier } else { SequenceSummary::default() }).collect();

    let (device_steps, device_states) = (Array::new(context, &steps), Array::new(context, &states));
    let (summaries, rows, draws) =
        (Array::new(context, &before), Array::<u32>::fresh(context, BUCKET), Array::<DrawRecord>::fresh(context, BUCKET));
    let op = SelectMasked {
        sequences: steps.len() as u32,
        num_sampled: sample_first,
        bucket: BUCKET as u32,
        steps: device_steps.address(),
        summaries: summaries.address(),
        state: device_states.address(),
        rows: rows.address(),
        draws: draws.address(),
    };
    words(select_masked(context, &op))?;
    let (summaries, rows, draws) = (summaries.read()?, rows.read()?, draws.read()?);

    let padding = (0, DrawRecord { temperature: 0.0, top_p: 1.0, flags: flag::PADDING, ..DrawRecord::default() });
    let mut expected = vec![padding; BUCKET];
    for (s, step) in steps.iter().enumerate() {
        let positions = masked(&states, step.canvas_first, step.range_begin..step.range_end);
        for (i, &position) in positions.iter().take(step.sample_count as usize).enumerate() {
            let StepRecord { seed, sample, stage, block, step: n, temperature, top_p, flags, .. } = *step;
            let u = uniforms(DrawKey { seed, sample, stage: stage as u8, block, step: n, position }).token;
            let draw = DrawRecord { u, temperature, top_p, flags, forced: 0, position, sequence: s as u32 };
            expected[step.sample_first as usize + i] = (step.row_first + position - step.rows_begin, draw);
        }
        let sampled = positions.len() as u32;
        let differs = sampled != step.sample_count;
        let told = match s {
            3 => earlier,
            _ if differs => SequenceSummary { error: step_error::COUNT, detail: sampled, ..SequenceSummary::default() },
            _ => SequenceSummary::default(),
        };
        let told = SequenceSummary { sampled, ..told };
        if summaries[s] != told || differs != [1, 3].contains(&s) {
            return Err(format!("sequence {s}: {:?}, expected {told:?}", summaries[s]));
        }
    }
    match (0..BUCKET).find(|i| (rows[*i], draws[*i]) != expected[*i]) {
        None => Ok(()),
        Some(i) => Err(format!("row {i} of {sample_first}: {:?}, expected {:?}", (rows[i], draws[i]), expected[i])),
    }
}

#[test]
fn masked_positions_are_asked_in_order() {
    for context in machines() {
        holds(&context).unwrap();
    }
}
