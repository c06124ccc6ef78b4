//! Steps that the device samples: several planned ones without returning, each a recorded graph
//! from its third time on.
//!
//! A step that is not sampled by rules goes to the host.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::layout::RuleStep;
use super::run::DeviceRun;
use super::signature::padded;
use super::state::Cuda;
use crate::backend::host::HostSteps;
use crate::backend::{
    Backend, Network, PassBatch, PlannedRun, RowsToSample, Sequences, StepBatches, StepOutcome, StepParts, StepRows, StepRunner,
    StepSampling, Timing,
};
use crate::error::Result;

/// A timed run: long enough that one wait of 10 us is below a thousandth.
const TIMED_MS: f64 = 20.0;
const MAX_LAUNCHES: usize = 200;

/// The runner that lets the device sample where it can.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceSteps {
    host: HostSteps,
}

/// The steps of a run; `None` where one of them is the host's.
fn by_rules<'a>(run: &'a PlannedRun) -> Option<Vec<RuleStep<'a>>> {
    let rules = |sampling: &'a StepSampling| match sampling {
        StepSampling::Rules(sampling) => Some(sampling),
        StepSampling::Draws(_) => None,
    };
    run.steps.iter().map(|step| Some(RuleStep { plan: &step.plan, sampling: rules(&step.sampling)? })).collect()
}

/// Rows that the step computes, padded.
fn rows_of(step: &RuleStep) -> StepRows {
    let joint = step.sampling.joint.as_ref();
    StepRows {
        forward: padded(step.plan.num_rows()),
        inside: padded(joint.map_or(0, |joint| joint.inside.len())),
        outside: padded(joint.map_or(0, |joint| joint.outside.len())),
    }
}

/// The stage of each sequence.
fn stages_of(step: &RuleStep) -> impl Iterator<Item = u8> {
    step.sampling.sequences.iter().map(|sequence| sequence.stage)
}

impl StepRunner<Cuda> for DeviceSteps {
    fn looks_ahead(&self, cuda: &Cuda) -> bool {
        cuda.runs_steps()
    }

    fn run(&mut self, cuda: &Cuda, network: &mut dyn Network<Cuda>, run: &PlannedRun, sequences: &mut dyn Sequences) -> Result<()> {
        let Some(steps) = by_rules(run) else {
            return cuda.range("forward", || self.host.run(cuda, network, run, sequences));
        };
        let mut device = DeviceRun::begin(cuda, run, &steps, network.heads(), &sequences.canvases())?;
        network.reserve(cuda, steps.iter().map(rows_of).fold(StepRows::default(), StepRows::max))?;
        // At the end of a stage, once or twice in a request, the device is waited for, so that
        // times belong to stages.
        let mut entered: Vec<Option<Instant>> = Vec::with_capacity(steps.len());
        for (index, step) in steps.iter().enumerate() {
            let enters = index > 0 && !stages_of(step).eq(stages_of(&steps[index - 1]));
            entered.push(if enters {
                cuda.synchronize()?;
                Some(Instant::now())
            } else {
                None
            });
            // Sequences of a batch share the forward; the first one names it.
            let (stage, block, count) = step.sampling.sequences.first().map(|s| (s.stage, s.block, s.step)).unwrap_or_default();
            let mut launch = || {
                let signature = device.step(cuda, index)?;
                let key = network.key(step.sampling.joint.is_some());
                cuda.launch_recorded(&signature, key, &mut || network.step(cuda, &mut DeviceParts::new(cuda, &mut device)))
            };
            cuda.range(&format!("stage {stage}"), || {
                cuda.range(&format!("block {block}"), || cuda.range(&format!("step {count}"), &mut launch))
            })?;
        }
        let mut sampled = device.end(cuda)?.into_iter();
        for (index, (step, entered)) in steps.iter().zip(entered).enumerate() {
            let began = (index > 0).then(|| entered.unwrap_or_else(Instant::now));
            let passes = step.sampling.joint.as_ref().map_or(0, |joint| joint.passes.len());
            for pass in std::iter::once(None).chain((0..passes).map(Some)) {
                let sequences_of = sampled.next().expect("sampled tokens of every forward and pass");
                sequences.apply(StepOutcome { pass, began: began.filter(|_| pass.is_none()), sequences: sequences_of });
            }
        }
        Ok(())
    }

    /// Many launches of the recorded step between two waits, so that the time is the device's and
    /// not that of the calls. What a launch unmasks on the canvas, the next one unmasks again, so
    /// all do the same work.
    fn time(
        &mut self,
        cuda: &Cuda,
        network: &mut dyn Network<Cuda>,
        run: &PlannedRun,
        sequences: &mut dyn Sequences,
        runs: usize,
    ) -> Result<Timing> {
        let Some(steps) = by_rules(run) else { return self.host.time(cuda, network, run, sequences, runs) };
        let mut device = DeviceRun::begin(cuda, run, &steps, network.heads(), &sequences.canvases())?;
        network.reserve(cuda, rows_of(&steps[0]))?;
        let signature = device.step(cuda, 0)?;
        let key = network.key(steps[0].sampling.joint.is_some());
        let mut launch = || cuda.launch_recorded(&signature, key, &mut || network.step(cuda, &mut DeviceParts::new(cuda, &mut device)));
        let mut timed = |launches: usize| -> Result<f64> {
            cuda.synchronize()?;
            let start = Instant::now();
            (0..launches).try_for_each(|_| launch())?;
            cuda.synchronize()?;
            Ok(start.elapsed().as_secs_f64() * 1e3 / launches as f64)
        };
        // The first launch loads kernels and grows what must grow, so that the second may be
        // another first; the one after is recorded.
        timed(3)?;
        let launches = ((TIMED_MS / timed(1)?) as usize).clamp(1, MAX_LAUNCHES);
        let times_ms = (0..runs).map(|_| timed(launches)).collect::<Result<_>>()?;
        for outcome in device.end(cuda)? {
            sequences.apply(StepOutcome { pass: None, began: None, sequences: outcome });
        }
        Ok(Timing { times_ms, launches, recorded: true })
    }
}

/// The current step of a run.
struct DeviceParts<'a> {
    cuda: &'a Cuda,
    run: &'a mut DeviceRun,
    /// Passes so far.
    passes: usize,
    /// A profiler's range is open.
    in_range: bool,
}

impl<'a> DeviceParts<'a> {
    fn new(cuda: &'a Cuda, run: &'a mut DeviceRun) -> Self {
        DeviceParts { cuda, run, passes: 0, in_range: false }
    }

    /// Closes the profiler's range of a pass.
    fn leave_range(&mut self) {
        if std::mem::take(&mut self.in_range) {
            self.cuda.pop_range();
        }
    }
}

impl Drop for DeviceParts<'_> {
    fn drop(&mut self) {
        self.leave_range();
    }
}

impl StepParts<Cuda> for DeviceParts<'_> {
    fn begin(&mut self, cuda: &Cuda) -> Result<StepBatches<Cuda>> {
        self.run.batches(cuda)
    }

    fn sample(&mut self, cuda: &Cuda, sample_rows: RowsToSample<Cuda>) -> Result<()> {
        let RowsToSample { hidden, head, bias, .. } = sample_rows;
        assert!(hidden.dtype == cuda.dtype(), "hidden states of a run are inputs of a product");
        let outcome = self.run.sample(cuda, hidden.address(), head, bias);
        self.leave_range();
        outcome
    }

    fn pass(&mut self, cuda: &Cuda) -> Result<Option<PassBatch<Cuda>>> {
        if self.passes == self.run.num_passes() {
            return Ok(None);
        }
        cuda.push_range("joint");
        self.in_range = true;
        self.passes += 1;
        self.run.pass(cuda, self.passes - 1).map(Some)
    }
}
