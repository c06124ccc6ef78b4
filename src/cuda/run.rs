//! A run: several denoising steps of the same sequences that the device decides by itself, while the host only enqueues.
//!
//! ```text
//! begin   canvases and the arrays of all steps go up in two copies
//! step    arrays -> the fixed places; (remask); ask: which positions are still masked, their draws
//! replay  embed .. layers .. final norm, decide, reveal: one recorded graph per signature, reading the fixed places only
//! log     the step's decisions move to their place in the log
//! end     the log comes down: the one time the host waits
//! ```
//! What a step needs from the host is known before the first one runs (`Session::foresee`). A graph holds addresses, so whatever it
//! reads or writes lies where it lay when it was recorded: canvases, the current step's arrays, draws and decisions have fixed places
//! ([`Current`]), laid out by nothing but the signature. The counters of the random generator are part of those arrays, in device
//! memory: a replay never repeats numbers.
#![forbid(unsafe_code)]

use super::ask::{self, Ask, SessionSummary, trouble};
use super::backend::{Batch, BatchShape, Cuda, Matrix, Rows, RunPlaces, Signature, Vector};
use super::decide::{self, Decide, DecisionRecord, DrawRecord};
use super::driver::Address;
use super::machine::{Machine, Memory};
use super::remask::{self, RemaskParams, state};
use super::reveal::{self, RevealParams};
use super::words::{Arrays, Places, Words};
use crate::backend::{RunDecision, RunSpec, RunStep, SessionStep, StepDecisions};
use crate::canvas::{Canvas, State};
use crate::error::{Error, Result};

/// Rows of a step, rounded up so that few graphs serve many lengths: exact where a step is small, as a draft's always are.
pub(super) fn padded(rows: usize) -> usize {
    match rows {
        0..=16 => rows,
        17..=128 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(32),
    }
}

/// The fixed places of a run's current step. Each grows when it must, which outdates every recorded graph.
#[derive(Default)]
pub(super) struct Current {
    canvas: Place,
    arrays: Place,
    draws: Place,
    decisions: Place,
    summaries: Place,
}

#[derive(Default)]
struct Place(Option<Memory>);

impl Place {
    /// Its address, with room for `bytes`.
    fn reserve(&mut self, machine: &Machine, bytes: usize) -> Result<Address> {
        if self.0.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.0 = None;
            self.0 = Some(machine.memory(bytes.next_power_of_two().max(1 << 14))?);
            machine.moved();
        }
        Ok(self.0.as_ref().expect("just made").address())
    }
}

/// The canvases of a run, one after the other, as arrays over N positions of which there is room for more.
#[derive(Clone, Copy)]
struct CanvasArrays {
    token: Address,
    confidence: Address,
    step: Address,
    /// (N) u32 scratch of `remask`: the positions it took.
    positions: Address,
    state: Address,
    stage: Address,
}

impl CanvasArrays {
    /// Bytes of a position: four words and two bytes.
    const BYTES: usize = 18;

    fn at(base: Address, room: usize) -> CanvasArrays {
        let word = |index: usize| base + (4 * index * room) as u64;
        CanvasArrays {
            token: word(0),
            confidence: word(1),
            step: word(2),
            positions: word(3),
            state: word(4),
            stage: word(4) + room as u64,
        }
    }
}

/// Where one step lies in the arena, and what its launches depend on.
struct StepPlan {
    /// First word in the arena, and how many.
    words: std::ops::Range<usize>,
    signature: Signature,
    places: Places,
    index: usize,
    tiles: usize,
    /// The asked rows, found on the device, and how far they see.
    asked: usize,
    selected_visible: usize,
    selected_tiles: usize,
    /// Offsets and counts of a remask before the step.
    remask: Option<RemaskPlaces>,
    /// Padded.
    asks: usize,
    /// Asked positions of each sequence.
    counts: Vec<usize>,
    /// First record in the log.
    log: usize,
}

#[derive(Clone, Copy)]
struct RemaskPlaces {
    indptr: usize,
    count: usize,
    taken: usize,
    stage: u8,
}

/// A run in progress.
pub struct Run {
    arena: Memory,
    log: Memory,
    canvas: CanvasArrays,
    arrays: Address,
    draws: Address,
    decisions: Address,
    summaries: Address,
    steps: Vec<StepPlan>,
    current: usize,
    num_sequences: usize,
    banned: Vec<u32>,
    mask_id: u32,
}

impl Run {
    pub(super) fn begin(cuda: &Cuda, spec: &RunSpec) -> Result<Run> {
        let machine = &cuda.machine;
        let lens: Vec<usize> = spec.sequences.iter().map(|s| s.canvas.len()).collect();
        let mut firsts = vec![0u32];
        lens.iter().for_each(|len| firsts.push(firsts[firsts.len() - 1] + *len as u32));

        let mut words = Words::default();
        let mut steps = Vec::with_capacity(spec.steps.len());
        let (mut log, mut most_words, mut most_asks) = (0, 0, 0);
        for step in &spec.steps {
            let plan = lay_out(cuda, &mut words, spec, step, &firsts, log);
            log += plan.asks;
            most_words = most_words.max(plan.words.len());
            most_asks = most_asks.max(plan.asks);
            steps.push(plan);
        }

        let positions = firsts[lens.len()] as usize;
        let mut fixed = cuda.current.borrow_mut();
        // The arrays of a canvas lie by the room there is, not by what is used: their addresses stay.
        let base = fixed.canvas.reserve(machine, CanvasArrays::BYTES * positions.next_multiple_of(4))?;
        let room = fixed.canvas.0.as_ref().expect("reserved").bytes() / CanvasArrays::BYTES / 4 * 4;
        let canvas = CanvasArrays::at(base, room);
        let arrays = fixed.arrays.reserve(machine, 4 * most_words)?;
        let draws = fixed.draws.reserve(machine, most_asks * size_of::<DrawRecord>())?;
        let decisions = fixed.decisions.reserve(machine, most_asks * size_of::<DecisionRecord>())?;

        let summaries = fixed.summaries.reserve(machine, lens.len() * size_of::<SessionSummary>())?;
        machine.driver.fill(summaries, 0, lens.len() * size_of::<SessionSummary>() / 4)?;

        upload(machine, canvas, spec.sequences.iter().map(|s| s.canvas))?;
        let arena = cuda.upload_words(&words.0)?;
        let log = machine.memory(log.max(1) * size_of::<DecisionRecord>())?;
        Ok(Run {
            arena,
            log,
            canvas,
            arrays,
            draws,
            decisions,
            summaries,
            steps,
            current: 0,
            num_sequences: lens.len(),
            banned: spec.banned.to_vec(),
            mask_id: spec.mask_id,
        })
    }

    pub(super) fn step(&mut self, cuda: &Cuda, step: usize) -> Result<(Batch, Rows)> {
        let machine = &cuda.machine;
        if step > 0 {
            self.keep(machine, step - 1)?;
        }
        self.current = step;
        let plan = &self.steps[step];
        let at = |place: usize| self.arrays + 4 * place as u64;
        machine.driver.copy(self.arena.address() + 4 * plan.words.start as u64, self.arrays, 4 * plan.words.len())?;
        if let Some(places) = plan.remask {
            let CanvasArrays { token, confidence, step, positions, state, stage } = self.canvas;
            let params = RemaskParams {
                indptr: at(places.indptr),
                count: at(places.count),
                token,
                confidence,
                state,
                stage,
                step,
                positions,
                taken: at(places.taken),
                mask_id: self.mask_id,
                next_stage: u32::from(places.stage),
            };
            remask::remask(machine, self.num_sequences as u32, &params)?;
        }
        let op = Ask {
            sessions: self.num_sequences as u32,
            asks: plan.counts.iter().sum::<usize>() as u32,
            bucket: plan.asks as u32,
            steps: at(0),
            summaries: self.summaries,
            state: self.canvas.state,
            rows: at(plan.asked),
            draws: self.draws,
        };
        ask::ask(machine, &op)?;
        let arrays = Arrays { ids: self.canvas.token, index: Some(at(plan.index)), ..plan.places.at(self.arrays) };
        let places =
            RunPlaces { tiles: at(plan.tiles), selected_tiles: at(plan.selected_tiles), selected_visible: at(plan.selected_visible) };
        Ok(Cuda::run_batch(arrays, plan.signature, places, at(plan.asked)))
    }

    pub(super) fn decide(&mut self, cuda: &Cuda, hidden: Address, head: &Matrix, bias: Option<&Vector>) -> Result<()> {
        let plan = &self.steps[self.current];
        let op = Decide {
            rows: plan.asks as u32,
            k: head.k as u32,
            vocab: head.n as u32,
            hidden,
            dtype: cuda.weight_dtype(),
            head: head.memory.address(),
            bias: bias.map(Vector::address),
            banned: cuda.banned_mask(&self.banned, head.n)?,
            draws: self.draws,
            decisions: self.decisions,
            any_fused: plan.signature.any_fused,
            any_nucleus: plan.signature.any_nucleus,
        };
        decide::decide(&cuda.machine, &op)?;
        let CanvasArrays { token, confidence, state, stage, step, .. } = self.canvas;
        let (sessions, summaries, decisions) = (self.arrays, self.summaries, self.decisions);
        let params = RevealParams { sessions, summaries, decisions, token, confidence, state, stage, step };
        reveal::reveal(&cuda.machine, self.num_sequences as u32, &params)
    }

    /// Moves the decisions of a step to the log.
    fn keep(&self, machine: &Machine, step: usize) -> Result<()> {
        let StepPlan { asks, log, .. } = self.steps[step];
        let record = size_of::<DecisionRecord>();
        if asks == 0 {
            return Ok(());
        }
        machine.driver.copy(self.decisions, self.log.address() + (log * record) as u64, asks * record)
    }

    pub(super) fn end(self, cuda: &Cuda) -> Result<Vec<StepDecisions>> {
        let machine = &cuda.machine;
        if !self.steps.is_empty() {
            self.keep(machine, self.current)?;
        }
        let last = self.steps.last().map_or(0, |plan| plan.log + plan.asks);
        let mut records = vec![DecisionRecord::default(); last];
        machine.driver.read(self.log.address(), bytemuck::cast_slice_mut(&mut records))?;
        let mut summaries = vec![SessionSummary::default(); self.num_sequences];
        machine.driver.read(self.summaries, bytemuck::cast_slice_mut(&mut summaries))?;
        let answers = self.steps.iter().map(|plan| {
            let mut first = plan.log;
            let sequences = plan.counts.iter().zip(&summaries).map(|(count, summary)| {
                first += count;
                answer(&records[first - count..first], summary)
            });
            sequences.collect()
        });
        Ok(answers.collect())
    }
}

/// One sequence's part of a step. Records of steps behind a trouble hold whatever stood there: the first of them ends the session anyway.
fn answer(records: &[DecisionRecord], summary: &SessionSummary) -> Result<Vec<RunDecision>> {
    let decided: Result<Vec<RunDecision>> = records
        .iter()
        .enumerate()
        .map(|(row, record)| {
            let decision = record.decision(row).map_err(|error| match error {
                Error::Kernel { what } => Error::kernel(format!("position {}: {what}", record.position)),
                other => other,
            })?;
            Ok(RunDecision { position: record.position as usize, decision, chosen: record.chosen != 0 })
        })
        .collect();
    let decided = decided?;
    // Statistics that are NaN are the law's own error, which the host finds when it applies it; so is a row without a decision, above.
    match summary.trouble {
        trouble::COUNT => {
            Err(Error::kernel(format!("the device found {} masked positions, the session foresaw another number", summary.detail)))
        }
        _ => Ok(decided),
    }
}

/// Appends the arrays of one step to the arena. The order and the sizes follow from the signature up to the pages; what varies
/// otherwise stands behind their beginning.
fn lay_out(cuda: &Cuda, words: &mut Words, spec: &RunSpec, step: &RunStep, firsts: &[u32], log: usize) -> StepPlan {
    let RunStep { plan, sessions } = step;
    let rows = padded(plan.num_rows());
    let counts: Vec<usize> = sessions.iter().map(|s| s.asks).collect();
    let asks: usize = counts.iter().sum();
    let padded_asks = padded(asks);

    let start = words.0.len().next_multiple_of(4);
    words.0.resize(start, 0);
    let mut own = Words::default();
    let mut ask_first = 0;
    let records: Vec<ask::SessionStep> = sessions
        .iter()
        .enumerate()
        .map(|(i, part)| {
            let (row_first, end) = (plan.indptr[i], plan.indptr[i + 1]);
            let first_position = if row_first < end { plan.positions[row_first as usize] } else { 0 };
            ask_first += part.asks as u32;
            let draw = DrawRecord::from(&part.draw);
            let step = ask::SessionStep {
                seed: spec.sequences[i].seed,
                canvas_first: firsts[i],
                range_begin: part.range.start as u32,
                range_end: part.range.end as u32,
                row_first,
                // The row of a position; one that is answered by the row before it counts from one further on.
                rows_begin: first_position + u32::from(part.shifted),
                ask_first: ask_first - part.asks as u32,
                ask_count: part.asks as u32,
                sample: spec.sequences[i].sample,
                stage: u32::from(part.stage),
                block: part.block,
                step: part.step,
                temperature: draw.temperature,
                top_p: draw.top_p,
                flags: draw.flags,
                ..ask::SessionStep::default()
            };
            step.revealing(&part.reveal)
        })
        .collect();
    own.push(records.iter().flat_map(|record| bytemuck::bytes_of(record).as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word))));
    let sequence_of_row = (0..plan.num_sequences()).flat_map(|s| (plan.indptr[s]..plan.indptr[s + 1]).map(move |_| s));
    let canvas_places: Vec<u32> = sequence_of_row.zip(&plan.positions).map(|(s, p)| firsts[s] + p).collect();
    let index = own.push(canvas_places.into_iter().chain(std::iter::repeat_n(0, rows - plan.num_rows())));
    // Of the asked rows only their number is known.
    let mut ends = vec![0u32];
    counts.iter().for_each(|count| ends.push(ends[ends.len() - 1] + *count as u32));
    let (tile_shape, tile_list) = cuda.tiles_of(spec.heads, &plan.indptr);
    let (selected_shape, selected_list) = cuda.tiles_of(spec.heads, &ends);
    let tiles = own.push(tile_list.as_flattened().iter().copied());
    let selected_tiles = own.push(selected_list.as_flattened().iter().copied());
    let asked = own.push(std::iter::repeat_n(0, padded_asks));
    let selected_visible = own.push(std::iter::repeat_n(0, padded_asks));
    let places = own.plan(plan, rows);
    // Behind everything that a recorded graph addresses: a step with a remask has the signature of one without.
    let remask = sessions.iter().any(|s| s.remask.is_some()).then(|| RemaskPlaces {
        indptr: own.push(firsts.iter().copied()),
        count: own.push(sessions.iter().map(|s| s.remask.unwrap_or(0) as u32)),
        taken: own.push(sessions.iter().map(|_| 0)),
        stage: sessions.iter().find(|s| s.remask.is_some()).expect("one of them").stage,
    });

    let shape = Cuda::shape_of(plan, rows as u32);
    let nucleus = |s: &SessionStep| decide::needs_nucleus(&s.draw);
    words.0.extend(own.0);
    StepPlan {
        words: start..words.0.len(),
        signature: Signature {
            key: 0,
            generation: 0,
            shape,
            tiles: tile_shape,
            selected: BatchShape { rows: padded_asks as u32, ..shape },
            selected_tiles: selected_shape,
            all: asks == plan.num_rows(),
            any_fused: sessions.iter().any(|s| !nucleus(s)),
            any_nucleus: sessions.iter().any(nucleus),
        },
        places,
        index,
        tiles,
        asked,
        selected_visible,
        selected_tiles,
        remask,
        asks: padded_asks,
        counts,
        log,
    }
}

/// The canvases as the arrays of the device.
fn upload<'a>(machine: &Machine, arrays: CanvasArrays, canvases: impl Iterator<Item = &'a Canvas>) -> Result<()> {
    let (mut token, mut confidence, mut step) = (Vec::new(), Vec::new(), Vec::new());
    let (mut states, mut stage) = (Vec::new(), Vec::new());
    for canvas in canvases {
        token.extend_from_slice(canvas.tokens());
        for position in 0..canvas.len() {
            confidence.push(canvas.confidence(position));
            let (at_stage, at_step) = canvas.revealed_at(position);
            stage.push(at_stage);
            step.push(at_step);
            states.push(match canvas.state(position) {
                State::Fixed => state::FIXED,
                State::Masked => state::MASKED,
                State::Revealed => state::REVEALED,
            });
        }
    }
    machine.driver.write(arrays.token, bytemuck::cast_slice(&token))?;
    machine.driver.write(arrays.confidence, bytemuck::cast_slice(&confidence))?;
    machine.driver.write(arrays.step, bytemuck::cast_slice(&step))?;
    machine.driver.write(arrays.state, &states)?;
    machine.driver.write(arrays.stage, &stage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_to_few_counts_and_never_below_themselves() {
        assert_eq!([0, 1, 4, 16, 17, 90, 128, 129, 1000].map(padded), [0, 1, 4, 16, 24, 96, 128, 160, 1024]);
        let counts: std::collections::BTreeSet<usize> = (0..=1024).map(padded).collect();
        assert!(counts.len() < 64 && (0..=1024).all(|rows| padded(rows) >= rows));
    }
}
