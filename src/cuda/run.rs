//! A run: several denoising steps of the same sequences that the device samples by itself, while
//! the host only enqueues.
//!
//! ```text
//! begin   canvases and the arrays of all steps go up in two copies
//! step    arrays -> the step buffers; (remask); select_masked: which positions are still masked, their draws
//! replay  embed .. layers .. final norm, sample, unmask, and all passes of a joint sampler, each with a selection of its own: one recorded graph per
//!         signature, reading the step buffers only
//! log     the step's sampled tokens move to their place in the log
//! end     the log comes down: the one time the host waits
//! ```
//! What a step needs from the host is known before the first one runs (`Sequence::look_ahead`). A
//! graph holds addresses, so what it reads or writes must lie where it lay when it was recorded:
//! canvases, the current step's arrays, draws and sampled tokens have fixed addresses
//! ([`StepBuffers`](super::step_buffers::StepBuffers)), laid out by nothing but the signature. The
//! counters of the random generator are part of those arrays, in device memory: a replay never
//! repeats numbers.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::context::{CudaContext, Memory};
use super::layout::{JointPlan, PartPlan, RuleStep, StepPlan, lay_out};
use super::packed_arrays::{PackedArrays, PlanOffsets, PlanPointers};
use super::signature::{Signature, TileShape};
use super::state::{Buffer, Cuda, Weight};
use crate::backend::{DType, ForwardBatch, HeadShape, PassBatch, Picked, PlannedRun, RowOutcome, RunCanvas, StepBatches, Windows};
use crate::canvas::{Canvas, State};
use crate::cuda::driver::interface::Address;
use crate::cuda::ops::attention::Regime;
use crate::cuda::ops::gather::{self, Gather};
use crate::cuda::ops::remask::{RemaskParams, state};
use crate::cuda::ops::sample::{DrawRecord, SampleOp, SampledRecord};
use crate::cuda::ops::select_masked::{SelectMasked, SequenceSummary, step_error};
use crate::cuda::ops::unmask::UnmaskParams;
use crate::cuda::ops::{remask, sample, select_masked, unmask};
use crate::error::{Error, Result};

/// What was sampled by one forward or pass, for each of its sequences.
type StepSamples = Vec<Option<Result<Vec<RowOutcome>>>>;

/// The canvases of a run, one after the other, as arrays over N positions, with capacity
/// for more.
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

    fn lay_out(base: Address, room: usize) -> CanvasArrays {
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

/// A run in progress.
pub struct DeviceRun {
    arena: Memory,
    log: Memory,
    canvas: CanvasArrays,
    arrays: Address,
    draws: Address,
    sampled: Address,
    summaries: Address,
    steps: Vec<StepPlan>,
    current: usize,
    /// Of the current step: the output of `sample`. A replay does not move it.
    part: usize,
    num_sequences: usize,
    banned: Vec<u32>,
    mask_id: u32,
}

impl DeviceRun {
    pub(super) fn begin(
        cuda: &Cuda,
        run: &PlannedRun,
        rule_steps: &[RuleStep],
        heads: HeadShape,
        canvases: &[RunCanvas],
    ) -> Result<DeviceRun> {
        let context = &cuda.context;
        let lens: Vec<usize> = canvases.iter().map(|s| s.canvas.len()).collect();
        let mut firsts = vec![0u32];
        lens.iter().for_each(|len| firsts.push(firsts[firsts.len() - 1] + *len as u32));

        let mut words = PackedArrays::default();
        let mut steps = Vec::with_capacity(rule_steps.len());
        let (mut log, mut most_words, mut max_sampled) = (0, 0, 0);
        for step in rule_steps {
            let plan = lay_out(cuda, &mut words, heads, canvases, step, &firsts, log);
            log += plan.num_sampled;
            most_words = most_words.max(plan.words.len());
            max_sampled = max_sampled.max(plan.num_sampled);
            steps.push(plan);
        }

        let positions = firsts[lens.len()] as usize;
        let mut fixed = cuda.step_buffers.borrow_mut();
        // Offsets within a canvas follow from its capacity, not from what is used: their addresses
        // stay.
        let base = fixed.canvas.reserve(context, CanvasArrays::BYTES * positions.next_multiple_of(4))?;
        let room = fixed.canvas.0.as_ref().expect("reserved").bytes() / CanvasArrays::BYTES / 4 * 4;
        let canvas = CanvasArrays::lay_out(base, room);
        let arrays = fixed.arrays.reserve(context, 4 * most_words)?;
        let draws = fixed.draws.reserve(context, max_sampled * size_of::<DrawRecord>())?;
        let sampled = fixed.sampled.reserve(context, max_sampled * size_of::<SampledRecord>())?;

        let summaries = fixed.summaries.reserve(context, lens.len() * size_of::<SequenceSummary>())?;
        context.driver.fill(summaries, 0, lens.len() * size_of::<SequenceSummary>() / 4)?;

        upload(context, canvas, canvases.iter().map(|s| s.canvas))?;
        let arena = cuda.upload_words(&words.0)?;
        let log = context.memory(log.max(1) * size_of::<SampledRecord>())?;
        Ok(DeviceRun {
            arena,
            log,
            canvas,
            arrays,
            draws,
            sampled,
            summaries,
            steps,
            current: 0,
            part: 0,
            num_sequences: lens.len(),
            banned: run.banned.never.clone(),
            mask_id: run.mask_id,
        })
    }

    /// Makes step `step` the current one: its arrays, and the rows that it samples. Steps follow in
    /// order.
    pub(super) fn step(&mut self, cuda: &Cuda, step: usize) -> Result<Arc<Signature>> {
        let context = &cuda.context;
        if step > 0 {
            self.keep(context, step - 1)?;
        }
        (self.current, self.part) = (step, 0);
        let plan = &self.steps[step];
        let at = |place: usize| self.arrays + 4 * place as u64;
        context.driver.copy(self.arena.address() + 4 * plan.words.start as u64, self.arrays, 4 * plan.words.len())?;
        if let Some(offsets) = plan.remask {
            let CanvasArrays { token, confidence, step, positions, state, stage } = self.canvas;
            let params = RemaskParams {
                indptr: at(offsets.indptr),
                count: at(offsets.count),
                token,
                confidence,
                state,
                stage,
                step,
                positions,
                taken: at(offsets.taken),
                mask_id: self.mask_id,
                next_stage: u32::from(offsets.stage),
            };
            remask::remask(context, self.num_sequences as u32, &params)?;
        }
        // The rows of the passes after the forward are padding until their pass selects them.
        let part = &plan.parts[0];
        self.select_masked(context, part, part.counts.iter().sum(), plan.num_sampled)?;
        Ok(plan.signature.clone())
    }

    /// Passes of the current step.
    pub(super) fn num_passes(&self) -> usize {
        self.steps[self.current].parts.len() - 1
    }

    /// The current step's forward, and what a sampler takes from it.
    pub(super) fn batches(&self, cuda: &Cuda) -> Result<StepBatches<Cuda>> {
        let plan = &self.steps[self.current];
        let (part, signature) = (&plan.parts[0], &plan.signature);
        let at = |place: usize| self.arrays + 4 * place as u64;
        let arrays = self.arrays_of(part.index, &part.offsets);
        let batch = Cuda::run_batch(arrays, part.shape.batch, (part.shape.tiles, at(part.tiles)));
        let sample_rows = Cuda::run_rows(at(plan.sample_rows), part.shape.num_sampled);
        let (picked, sample_rows) = match (signature.all, &plan.joint) {
            (true, _) => (Picked::All, None),
            // The states want all rows.
            (false, Some(_)) => (Picked::All, Some(sample_rows)),
            (false, None) => {
                // Everything else is known beforehand; how far a row sees moves with the row.
                let visible = at(plan.selected_visible);
                let op = Gather {
                    count: part.shape.num_sampled,
                    width: 1,
                    rows: Some(at(plan.sample_rows)),
                    x: arrays.visible,
                    x_dtype: DType::F32,
                    out: visible,
                    out_dtype: DType::F32,
                };
                gather::gather(&cuda.context, &op)?;
                let tiles = (signature.selected_tiles, at(plan.selected_tiles));
                (Picked::Rows(sample_rows, Cuda::run_batch(PlanPointers { visible, ..arrays }, signature.selected, tiles)), None)
            }
        };
        let forward = ForwardBatch { batch, rows: part.shape.batch.rows as usize, picked };
        Ok(StepBatches { guide: None, forward, sample_rows, windows: plan.joint.as_ref().map(|joint| self.windows(joint)) })
    }

    /// What a sampler takes from the current step's forward.
    fn windows(&self, joint: &JointPlan) -> Windows<Cuda> {
        let (at, no_tiles) = (|place: usize| self.arrays + 4 * place as u64, TileShape { regime: Regime::Few, num_tiles: 0 });
        let arrays = self.arrays_of(joint.outside_index, &joint.outside_offsets);
        Windows {
            inside: Cuda::run_rows(at(joint.inside), joint.inside_rows),
            outside: Cuda::run_rows(at(joint.outside), joint.outside_shape.rows),
            outside_batch: Cuda::run_batch(arrays, joint.outside_shape, (no_tiles, self.arrays)),
            shortlists: Vec::new(),
        }
    }

    /// Makes pass `pass` of the current step the one that is sampled next. Passes follow in order.
    pub(super) fn pass(&mut self, cuda: &Cuda, pass: usize) -> Result<PassBatch<Cuda>> {
        self.part = pass + 1;
        let plan = &self.steps[self.current];
        let part = &plan.parts[self.part];
        let at = |place: usize| self.arrays + 4 * place as u64;
        // Recorded, so it must not depend on how many there are: the padding is there already.
        self.select_masked(&cuda.context, part, part.shape.num_sampled as usize, part.shape.num_sampled as usize)?;
        let batch = Cuda::run_batch(self.arrays_of(part.index, &part.offsets), part.shape.batch, (part.shape.tiles, at(part.tiles)));
        let kept = part.shape.kept.map(|rows| Cuda::run_rows(at(part.kept), rows));
        let sample_rows = Cuda::run_rows(at(plan.sample_rows + part.first_sampled), part.shape.num_sampled);
        Ok(PassBatch { batch, rows: part.shape.batch.rows as usize, sample_rows, kept })
    }

    /// The arrays of a part, whose rows are at `index` on the canvas.
    fn arrays_of(&self, index: usize, offsets: &PlanOffsets) -> PlanPointers {
        PlanPointers { ids: self.canvas.token, index: Some(self.arrays + 4 * index as u64), ..offsets.pointers(self.arrays) }
    }

    /// Lists what a part samples, and padding from `num_sampled` to `bucket`.
    fn select_masked(&self, context: &CudaContext, part: &PartPlan, num_sampled: usize, bucket: usize) -> Result<()> {
        let op = SelectMasked {
            sequences: self.num_sequences as u32,
            num_sampled: num_sampled as u32,
            bucket: bucket as u32,
            steps: self.arrays + 4 * part.records as u64,
            summaries: self.summaries,
            state: self.canvas.state,
            rows: self.arrays + 4 * (self.steps[self.current].sample_rows + part.first_sampled) as u64,
            draws: self.draws + (part.first_sampled * size_of::<DrawRecord>()) as u64,
        };
        select_masked::select_masked(context, &op)
    }

    pub(super) fn sample(&mut self, cuda: &Cuda, hidden: Address, head: &Weight, bias: Option<&Buffer>) -> Result<()> {
        let part = &self.steps[self.current].parts[self.part];
        let sampled = self.sampled + (part.first_sampled * size_of::<SampledRecord>()) as u64;
        let op = SampleOp {
            rows: part.shape.num_sampled,
            k: head.k as u32,
            vocab: head.n as u32,
            hidden,
            dtype: cuda.weight_dtype(),
            head: head.at(),
            bias: bias.map(Buffer::address),
            banned: cuda.banned_mask(&self.banned, head.n)?,
            draws: self.draws + (part.first_sampled * size_of::<DrawRecord>()) as u64,
            sampled,
            any_fused: part.shape.any_fused,
            any_nucleus: part.shape.any_nucleus,
        };
        sample::sample(&cuda.context, &op)?;
        let CanvasArrays { token, confidence, state, stage, step, .. } = self.canvas;
        let (sequences, summaries) = (self.arrays + 4 * part.records as u64, self.summaries);
        let params = UnmaskParams { sequences, summaries, sampled, token, confidence, state, stage, step };
        unmask::unmask(&cuda.context, self.num_sequences as u32, &params)
    }

    /// Moves the sampled tokens of a step to the log.
    fn keep(&self, context: &CudaContext, step: usize) -> Result<()> {
        let StepPlan { num_sampled, log, .. } = self.steps[step];
        let record = size_of::<SampledRecord>();
        if num_sampled == 0 {
            return Ok(());
        }
        context.driver.copy(self.sampled, self.log.address() + (log * record) as u64, num_sampled * record)
    }

    pub(super) fn end(self, cuda: &Cuda) -> Result<Vec<StepSamples>> {
        let context = &cuda.context;
        if !self.steps.is_empty() {
            self.keep(context, self.current)?;
        }
        let last = self.steps.last().map_or(0, |plan| plan.log + plan.num_sampled);
        let mut records = vec![SampledRecord::default(); last];
        context.driver.read(self.log.address(), bytemuck::cast_slice_mut(&mut records))?;
        let mut summaries = vec![SequenceSummary::default(); self.num_sequences];
        context.driver.read(self.summaries, bytemuck::cast_slice_mut(&mut summaries))?;
        let mut outcomes = Vec::new();
        for plan in &self.steps {
            for (pass, part) in plan.parts.iter().enumerate() {
                let mut first = plan.log + part.first_sampled;
                let sequence = |(count, summary): (&usize, &SequenceSummary)| {
                    first += count;
                    // A sequence that is through takes no part in a pass.
                    (pass == 0 || *count > 0).then(|| row_outcomes(&records[first - count..first], summary))
                };
                outcomes.push(part.counts.iter().zip(&summaries).map(sequence).collect());
            }
        }
        Ok(outcomes)
    }
}

/// One sequence's part of a step. Records of steps after an error are undefined: the
/// first of them ends the sequence anyway.
fn row_outcomes(records: &[SampledRecord], summary: &SequenceSummary) -> Result<Vec<RowOutcome>> {
    let sampled: Result<Vec<RowOutcome>> = records
        .iter()
        .enumerate()
        .map(|(row, record)| {
            let sampled = record.sampled(row).map_err(|error| match error {
                Error::Kernel { what } => Error::kernel(format!("position {}: {what}", record.position)),
                other => other,
            })?;
            Ok(RowOutcome { position: record.position as usize, sampled, revealed: Some(record.chosen != 0) })
        })
        .collect();
    let sampled = sampled?;
    // Statistics that are NaN are an error of the reference, which the host finds when it applies
    // it; so is a row without a token, above.
    match summary.error {
        step_error::COUNT => {
            Err(Error::kernel(format!("the device found {} masked positions, the sequence foresaw another number", summary.detail)))
        }
        _ => Ok(sampled),
    }
}

/// The canvases as the arrays of the device.
fn upload<'a>(context: &CudaContext, arrays: CanvasArrays, canvases: impl Iterator<Item = &'a Canvas>) -> Result<()> {
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
    context.driver.write(arrays.token, bytemuck::cast_slice(&token))?;
    context.driver.write(arrays.confidence, bytemuck::cast_slice(&confidence))?;
    context.driver.write(arrays.step, bytemuck::cast_slice(&step))?;
    context.driver.write(arrays.state, &states)?;
    context.driver.write(arrays.stage, &stage)
}
