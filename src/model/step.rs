//! A step as the network runs it: a forward, and the passes of a joint sampler after it. Arrays and
//! sampling is the runner's.
//!
//! ```text
//! (layers without the prompt -> their final rows)
//! layers -> (final rows of the windows and outside of them -> states)
//!     -> sampled rows -> final norm -> head, sampled by the runner
//!     -> (K/V of the sampler's layer outside)
//!     -> [ sampler over the windows -> sampled states -> head, sampled by the runner ] x passes
//! ```
#![forbid(unsafe_code)]

use super::joint::{Joint, JointState};
use super::{Model, Scratch};
use crate::backend::{
    Activation, Backend, ForwardBatch, HeadShape, Network, PassBatch, Picked, RowList, RowsToSample, StepBatches, StepParts, StepRows,
    Windows,
};
use crate::error::Result;

/// A joint sampler, and the states that its passes carry on.
pub struct Sampler<'a, B: Backend> {
    pub sampler: &'a Joint<B>,
    /// Of the windows.
    pub state: &'a mut JointState<B>,
    /// Of rows outside them.
    pub outside: &'a mut JointState<B>,
}

/// A model with what its steps use.
pub struct StepNetwork<'a, B: Backend> {
    pub model: &'a Model<B>,
    pub kv: &'a mut B::KvCache,
    pub scratch: &'a mut Scratch<B>,
    pub joint: Option<Sampler<'a, B>>,
}

impl<B: Backend> Network<B> for StepNetwork<'_, B> {
    fn reserve(&mut self, backend: &B, rows: StepRows) -> Result<()> {
        let config = &self.model.config;
        self.scratch.reserve(backend, config, rows.forward)?;
        if let Some(Sampler { state, outside, .. }) = &mut self.joint {
            state.reserve(backend, config, rows.inside)?;
            outside.reserve(backend, config, rows.outside)?;
        }
        Ok(())
    }

    fn key(&self, joint: bool) -> [u64; 3] {
        let states = self.joint.as_ref().filter(|_| joint).map_or(0, |Sampler { state, outside, .. }| state.id << 32 | outside.id);
        [self.model.id, self.scratch.id, states]
    }

    fn heads(&self) -> HeadShape {
        self.model.config.heads
    }

    fn step(&mut self, backend: &B, parts: &mut dyn StepParts<B>) -> Result<()> {
        let StepBatches { guide, forward, sample_rows, windows } = parts.begin(backend)?;
        if let Some(guide) = &guide {
            self.guide_forward(backend, guide)?;
        }
        let StepNetwork { model, kv, scratch, .. } = &mut *self;
        model.layers(backend, &forward, kv, scratch, None)?;
        let lists = match &windows {
            Some(windows) => self.begin_windows(backend, windows)?,
            None => Vec::new(),
        };
        self.sample_forward(backend, parts, &forward, sample_rows.as_ref(), guide.is_some(), &lists)?;
        if let Some(Windows { outside, outside_batch, .. }) = &windows {
            let StepNetwork { model, kv, scratch, joint } = &mut *self;
            let Sampler { sampler, state, outside: outside_state } = joint.as_mut().expect("a joint step has its sampler");
            if outside.num_rows() > 0 {
                sampler.append_kv(backend, model, outside.num_rows(), outside_batch, kv, scratch, outside_state)?;
            }
            while let Some(PassBatch { batch, rows, sample_rows, kept }) = parts.pass(backend)? {
                if let Some(kept) = kept {
                    sampler.keep_rows(backend, model, &kept, scratch, state)?;
                }
                sampler.call_batch(backend, model, rows, &batch, kv, scratch, state)?;
                sampler.sample(backend, model, parts, &sample_rows, scratch, state, &lists)?;
            }
        }
        Ok(())
    }
}

impl<B: Backend> StepNetwork<'_, B> {
    /// The forward without the prompt. It writes the K/V of all of its rows to the sequences' own
    /// slots, where the forward with the prompt overwrites every one of them.
    fn guide_forward(&mut self, backend: &B, guide: &ForwardBatch<B>) -> Result<()> {
        let StepNetwork { model, kv, scratch, .. } = self;
        model.layers(backend, guide, kv, scratch, None)?;
        let num_rows = guide.num_picked();
        if scratch.guide.as_ref().is_none_or(|(rows, _)| *rows < num_rows) {
            let [kept] = backend.alloc([Activation::F32(num_rows * model.config.hidden_dim)])?;
            scratch.guide = Some((num_rows, kept));
        }
        let (_, kept) = scratch.guide.as_mut().expect("made above");
        model.final_norm.apply(backend, &model.config, num_rows, &mut scratch.x, kept)
    }

    /// The states before any pass, and the lists that are made from them.
    fn begin_windows(&mut self, backend: &B, windows: &Windows<B>) -> Result<Vec<B::Shortlists>> {
        let StepNetwork { model, scratch, joint, .. } = self;
        let Sampler { sampler, state, outside } = joint.as_mut().expect("a joint step has its sampler");
        sampler.start_rows(backend, model, &windows.inside, scratch, state)?;
        sampler.start_rows(backend, model, &windows.outside, scratch, outside)?;
        windows.shortlists.iter().map(|list| sampler.shortlist(backend, model, list, scratch, state)).collect()
    }

    /// The final norm of the rows to sample, and their tokens. The head is linear, so guidance
    /// combines final rows, in f32 so that nothing is rounded before it is scaled, and no logits
    /// are kept.
    fn sample_forward(
        &mut self,
        backend: &B,
        parts: &mut dyn StepParts<B>,
        forward: &ForwardBatch<B>,
        sample_rows: Option<&B::Rows>,
        guided: bool,
        lists: &[B::Shortlists],
    ) -> Result<()> {
        let Model { config, final_norm, head, .. } = self.model;
        let Scratch { x, h, qkv, picked, guide, .. } = &mut *self.scratch;
        let width = config.hidden_dim;
        let count = sample_rows.map_or(forward.num_picked(), B::Rows::num_rows);
        if count > 0 {
            match (sample_rows, guided) {
                (None, false) => final_norm.apply(backend, config, count, x, h)?,
                (None, true) => final_norm.apply(backend, config, count, x, qkv)?,
                (Some(sample_rows), false) => {
                    backend.gather(sample_rows, width, x, qkv)?;
                    final_norm.apply(backend, config, count, qkv, h)?;
                }
                (Some(sample_rows), true) => {
                    backend.gather(sample_rows, width, x, picked)?;
                    final_norm.apply(backend, config, count, picked, qkv)?;
                }
            }
        }
        let hidden = if guided { &*qkv } else { &*h };
        let guide = guide.as_ref().map(|(_, rows)| rows).filter(|_| guided);
        let (weight, bias) = (&head.weight, head.bias.as_ref());
        parts.sample(backend, RowsToSample { hidden, width, head: weight, bias, guide, scratch: [picked, x], lists })
    }
}

impl<B: Backend> ForwardBatch<B> {
    /// Rows that go through the last layer.
    pub(super) fn num_picked(&self) -> usize {
        match &self.picked {
            Picked::All => self.rows,
            Picked::Rows(rows, _) => rows.num_rows(),
            Picked::Nothing => 0,
        }
    }
}
