//! Joint sampler beside a model: its weights, its layer's place in the K/V store, and what
//! a window of rows carries from call to call.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::Path;

use crate::backend::Backend;
use crate::engine::joint_steps::LoadedJoint;
use crate::engine::{Engine, LoadedModel};
use crate::error::{Error, Result};
use crate::model::joint::{Joint, JointState};
use crate::model::{Progress, Scratch};
use crate::pages::PageTable;
use crate::plan::{Plan, Visibility};
use crate::schedule::Schedule;

impl<B: Backend> Engine<B> {
    /// Whether the first stage is joint. Errors: a stage is, and there is no sampler for its model,
    /// or it could not be defined there.
    pub(super) fn check_joint(&self, schedule: &Schedule) -> Result<bool> {
        for (index, stage) in schedule.stages().iter().enumerate().filter(|(_, stage)| stage.is_joint()) {
            let loaded = &self.models[stage.weights];
            let longest = B::MAX_SHORTLIST;
            if let Some(n) = stage.shortlist().filter(|n| *n > longest && *n < loaded.model.config().vocab_size) {
                return Err(Error::request(format!(
                    "stage {index}: shortlist={n}: {} lists at most {longest} ids, or all of them (shortlist=all)",
                    self.backend.name()
                )));
            }
            if loaded.joint.is_none() {
                return Err(Error::request(format!(
                    "stage {index}: sampler=joint, but no joint sampler is beside model {} (--joint DIR)",
                    stage.weights
                )));
            }
            if loaded.model.config().logits_rows().are_shifted() && stage.visibility() != Visibility::Full {
                let what =
                    "sampler=joint with shifted logits needs visible=canvas: the first position of a block is predicted outside of it";
                return Err(Error::request(format!("stage {index}: {what}")));
            }
        }
        Ok(schedule.stages().first().is_some_and(|stage| stage.is_joint()))
    }

    /// Puts the joint sampler in `dir` beside the engine's first model.
    ///
    /// Errors: requests in flight (the K/V store is made anew, with the sampler's layer), and those
    /// of [`Joint::load`].
    pub fn attach_joint(&mut self, dir: &Path, progress: Progress) -> Result<()> {
        if self.is_busy() {
            return Err(Error::request("a joint sampler is attached before the first request: requests are in flight"));
        }
        let (num_pages, page_size) = (self.pool.capacity(), self.pool.page_size());
        let LoadedModel { model, kv, scratch, joint } = &mut self.models[0];
        let (backend, config) = (&self.backend, model.config());
        let sampler = Joint::load(backend, config, dir, progress)?;
        let state = |rows| JointState::new(backend, config, rows);
        *kv = backend.kv_cache(model.kv_shape(num_pages + self.options.spare_pages(), page_size, 1))?;
        // Recordings are known by the scratch that they use, and those made before name the store
        // that is gone.
        *scratch = Scratch::new(backend, config, 16)?;
        *joint = Some(LoadedJoint { sampler, state: state(16)?, outside: state(0)? });
        Ok(())
    }

    /// Logits, before any ban, of the `window` (first and end position) after each call of the
    /// attached sampler: `states[0]` is what the model sees, `states[j]` what call j sees, after
    /// another token is unmasked. Positions before the window keep the K/V of their first state.
    ///
    /// Errors: no sampler, states of different lengths, a window outside of them, and those of a
    /// forward.
    pub fn joint_logits(&mut self, states: &[Vec<u32>], window: Range<usize>, visibility: Visibility) -> Result<Vec<Vec<f32>>> {
        let len = states.first().map_or(0, Vec::len);
        for tokens in states {
            Self::check_tokens(self.config(), tokens)?;
            if tokens.len() != len || window.is_empty() || window.end > len {
                return Err(Error::request(format!("states of {} and {len} tokens, window {window:?}", tokens.len())));
            }
        }
        self.check_len(len)?;
        let needed = self.pool.pages_for(len);
        if self.models[0].joint.is_none() {
            return Err(Error::request("no joint sampler is attached to the model"));
        }
        if !self.pool.commit(needed) {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let mut table = PageTable::default();
        table.make_writable(&mut self.pool, 0..len);
        let outcome = self.chain(states, window, visibility, &table);
        let freed = table.truncate(&mut self.pool, 0);
        self.pool.uncommit(needed);
        self.poison(&freed);
        outcome
    }

    fn chain(&mut self, states: &[Vec<u32>], window: Range<usize>, visibility: Visibility, table: &PageTable) -> Result<Vec<Vec<f32>>> {
        let page_size = self.options.page_size;
        let plan = |tokens: &[u32], positions: Range<usize>| {
            let mut plan = Plan::new();
            let rows: Vec<(usize, u32)> = positions.map(|p| (p, tokens[p])).collect();
            plan.push(&rows, table.pages(), page_size, visibility, tokens.len());
            plan
        };
        let backend = &self.backend;
        let LoadedModel { model, kv, scratch, joint } = &mut self.models[0];
        let LoadedJoint { sampler, state, outside } = joint.as_mut().expect("looked at before");
        let len = states[0].len() as u32;
        model.forward(backend, &plan(&states[0], 0..len as usize), &(0..len).collect::<Vec<_>>(), kv, scratch, None)?;
        let logits_rows = model.config().logits_rows();
        let rows_for = |positions: Range<usize>| -> Vec<u32> { positions.map(|p| logits_rows.logits_row_for(p) as u32).collect() };
        sampler.start(backend, model, &rows_for(window.clone()), scratch, state)?;
        if window.start > 0 {
            sampler.start(backend, model, &rows_for(0..window.start), scratch, outside)?;
            sampler.append(backend, model, &plan(&states[0], 0..window.start), kv, scratch, outside)?;
        }
        let mut logits = Vec::new();
        for tokens in &states[1..] {
            sampler.call(backend, model, &plan(tokens, window.clone()), kv, scratch, state)?;
            logits.push(sampler.logits(backend, model, window.len(), state)?);
        }
        Ok(logits)
    }
}
