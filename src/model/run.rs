//! Owns the steps of a run: forwards, and the passes of a joint sampler behind them, that the machine decides by itself.
//!
//! ```text
//! layers -> (final rows of the windows and outside of them -> states) -> asked rows -> final norm -> head + decide, reveal
//!        -> (K/V of the sampler's layer outside) -> [ sampler over the windows -> asked states -> head + decide, reveal ] x passes
//! ```
//! All of a step, its passes too, is one recording.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::joint::{Joint, JointState};
use super::{Model, Scratch};
use crate::backend::{Backend, PassBatch, RowList, RunJoint, RunStep};
use crate::error::Result;

/// A timed run: long enough that one wait of 10 us is below a thousandth.
const TIMED_MS: f64 = 20.0;
const MAX_LAUNCHES: usize = 200;

/// A joint sampler, and the states that its passes carry on.
pub struct Sampler<'a, B: Backend> {
    pub sampler: &'a Joint<B>,
    /// Of the windows.
    pub state: &'a mut JointState<B>,
    /// Of rows outside them.
    pub outside: &'a mut JointState<B>,
}

impl<B: Backend> Model<B> {
    /// The steps of a run, one after the other, each decided where the network runs. Returns when each step began of those in which a
    /// sequence enters its next stage: there, once or twice in a request, the device is waited for, so that times belong to stages.
    ///
    /// Panics where a step is joint and there is no sampler.
    pub fn run(
        &self,
        backend: &B,
        run: &mut B::Run,
        steps: &[RunStep],
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        mut joint: Option<Sampler<B>>,
    ) -> Result<Vec<(usize, Instant)>> {
        let mut entered = Vec::new();
        let most = |count: &dyn Fn(&RunStep) -> usize| backend.padded_rows(steps.iter().map(count).max().unwrap_or(0));
        scratch.reserve(backend, &self.config, most(&|step| step.plan.num_rows()))?;
        let mut states = 0;
        if let Some(Sampler { state, outside, .. }) = &mut joint {
            let of = |step: &RunStep, list: fn(&RunJoint) -> &Vec<u32>| step.joint.as_ref().map_or(0, |joint| list(joint).len());
            state.reserve(backend, &self.config, most(&|step| of(step, |joint| &joint.inside)))?;
            outside.reserve(backend, &self.config, most(&|step| of(step, |joint| &joint.outside)))?;
            states = state.id << 32 | outside.id;
        }
        // Weights, K/V, scratch and states are this engine's; what is not weights or K/V moves.
        let key = |step: &RunStep| [self.id, scratch.id, if step.joint.is_some() { states } else { 0 }];
        let keys: Vec<[u64; 3]> = steps.iter().map(key).collect();
        for (index, step) in steps.iter().enumerate() {
            let stages = |step: &RunStep| step.sessions.iter().map(|s| s.stage).collect::<Vec<_>>();
            if index > 0 && stages(step) != stages(&steps[index - 1]) {
                backend.synchronize()?;
                entered.push((index, Instant::now()));
            }
            // Sessions of a batch share the forward; the first one names it.
            let (stage, block, count) = step.sessions.first().map(|s| (s.stage, s.block, s.step)).unwrap_or_default();
            let mut forward = || {
                let (batch, asked) = backend.step_run(run, index)?;
                backend.replay(&batch, keys[index], &mut || match &step.joint {
                    None => self.run_step(backend, run, step, &batch, &asked, kv, scratch),
                    Some(passes) => {
                        let sampler = joint.as_mut().expect("a joint step has its sampler");
                        self.run_joint(backend, run, step, passes, &batch, &asked, kv, scratch, sampler)
                    }
                })
            };
            backend.range(&format!("stage {stage}"), || {
                backend.range(&format!("block {block}"), || backend.range(&format!("step {count}"), &mut forward))
            })?;
        }
        Ok(entered)
    }

    /// Times the first step of a run: `runs` times the mean over many launches, in milliseconds,
    /// and how many launches that are. What a launch reveals on the canvas, the next one reveals
    /// again, so all do the same work.
    pub fn time_step(
        &self,
        backend: &B,
        run: &mut B::Run,
        step: &RunStep,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        runs: usize,
    ) -> Result<(Vec<f64>, usize)> {
        scratch.reserve(backend, &self.config, backend.padded_rows(step.plan.num_rows()))?;
        let (batch, asked) = backend.step_run(run, 0)?;
        let key = [self.id, scratch.id, 0];
        let mut launch = || backend.replay(&batch, key, &mut || self.run_step(backend, run, step, &batch, &asked, kv, scratch));
        let mut timed = |launches: usize| -> Result<f64> {
            backend.synchronize()?;
            let start = Instant::now();
            (0..launches).try_for_each(|_| launch())?;
            backend.synchronize()?;
            Ok(start.elapsed().as_secs_f64() * 1e3 / launches as f64)
        };
        // The first launch loads kernels and grows what must grow, so that the second may be
        // another first; the one after is recorded.
        timed(3)?;
        let launches = ((TIMED_MS / timed(1)?) as usize).clamp(1, MAX_LAUNCHES);
        Ok(((0..runs).map(|_| timed(launches)).collect::<Result<_>>()?, launches))
    }

    /// A forward that decides the asked rows of `batch`.
    #[allow(clippy::too_many_arguments)] // as the forward's
    fn run_step(
        &self,
        backend: &B,
        run: &mut B::Run,
        step: &RunStep,
        batch: &B::Batch,
        asked: &B::Rows,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        let rows = backend.padded_rows(step.plan.num_rows());
        self.layers(backend, rows, batch, (!asks_all(step)).then_some(asked), kv, scratch, None)?;
        let Scratch { x, h, .. } = &mut *scratch;
        self.final_norm.apply(backend, &self.config, asked.num_rows(), x, h)?;
        backend.decide_run(run, h, &self.head.weight, self.head.bias.as_ref())
    }

    /// The same, and the passes of a joint sampler behind it. All of the forward's rows are wanted.
    #[allow(clippy::too_many_arguments)] // as the forward's, and the sampler's
    fn run_joint(
        &self,
        backend: &B,
        run: &mut B::Run,
        step: &RunStep,
        joint: &RunJoint,
        batch: &B::Batch,
        asked: &B::Rows,
        kv: &mut B::KvCache,
        scratch: &mut Scratch<B>,
        sampler: &mut Sampler<B>,
    ) -> Result<()> {
        let Sampler { sampler, state, outside } = sampler;
        self.layers(backend, backend.padded_rows(step.plan.num_rows()), batch, None, kv, scratch, None)?;
        let (inside_rows, outside_rows, outside_batch) = backend.joint_run(run)?;
        sampler.start_rows(backend, self, &inside_rows, scratch, state)?;
        sampler.start_rows(backend, self, &outside_rows, scratch, outside)?;
        let (Scratch { x, h, qkv, .. }, asks) = (&mut *scratch, asked.num_rows());
        if asks_all(step) {
            self.final_norm.apply(backend, &self.config, asks, x, h)?;
        } else {
            backend.gather(asked, self.config.hidden_dim, x, qkv)?;
            self.final_norm.apply(backend, &self.config, asks, qkv, h)?;
        }
        backend.decide_run(run, h, &self.head.weight, self.head.bias.as_ref())?;
        if !joint.outside.is_empty() {
            sampler.keys(backend, self, outside_rows.num_rows(), &outside_batch, kv, scratch, outside)?;
        }
        for (index, pass) in joint.passes.iter().enumerate() {
            backend.range("joint", || {
                let PassBatch { batch, asked, kept } = backend.pass_run(run, index)?;
                if let Some(kept) = kept {
                    sampler.keep_rows(backend, self, &kept, scratch, state)?;
                }
                sampler.call_batch(backend, self, backend.padded_rows(pass.rows.len()), &batch, kv, scratch, state)?;
                sampler.decide_run(backend, self, run, &asked, scratch, state)
            })?;
        }
        Ok(())
    }
}

/// Whether every row of the forward is asked, in order, so that none has to be picked.
fn asks_all(step: &RunStep) -> bool {
    step.sessions.iter().map(|s| s.asks).sum::<usize>() == step.plan.num_rows()
}
