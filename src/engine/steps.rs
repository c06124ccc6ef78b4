//! The middle of a tick: steps are planned for the chosen sequences, run, and their outcomes
//! applied.
//!
//! Where the runner and every chosen sequence can plan ahead, several steps are planned
//! by rules; otherwise one is, with the draws of the host.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Instant;

use super::joint_steps::planned_joint;
use super::{Engine, RunningSequence};
use crate::backend::{
    Backend, BannedSet, HostPass, HostReason, HostRule, HostSampling, HostSequence, HostWindow, PlannedRun, PlannedStep, RowOutcome,
    RuleSampling, RunCanvas, Sequences, StepOutcome, StepRunner, StepSampling,
};
use crate::canvas::State;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::pages::PagePool;
use crate::plan::Plan;
use crate::sampling::SampledToken;
use crate::schedule::{Bans, Eos};
use crate::sequence::{JointPass, LookaheadStep, Next, SampleRow, Sequence};

/// Maximum number of steps submitted to a device at once, and the shorter one of a request's first
/// submission, so that its first tokens arrive early. Sixteen block-4 steps are four blocks; the
/// wait that a longer run would save is already below a tenth of its time.
const FIRST_RUN: usize = 4;
const LONGEST_RUN: usize = 16;

impl<B: Backend> Engine<B> {
    /// The next steps of the chosen sequences, with pages for all of their rows.
    pub(super) fn plan_steps(&mut self, chosen: &[usize], weights: usize) -> Result<Vec<PlannedStep>> {
        let mut because = None;
        if self.runner.looks_ahead(&self.backend) {
            // A request that joins waits for the end of a run, and tokens are streamed then.
            let young = chosen.iter().any(|i| self.active[*i].timings.first_token_ms == 0.0);
            let max = if young { FIRST_RUN } else { LONGEST_RUN };
            match chosen.iter().map(|i| self.active[*i].sequence.look_ahead(max)).collect() {
                Ok(lookahead) => return self.plan_by_rules(chosen, weights, lookahead),
                Err(reason) => because = Some(reason),
            }
        }
        let (plan, sampling) = self.plan_for_host(chosen, weights, because)?;
        Ok(vec![PlannedStep { plan, sampling: StepSampling::Draws(sampling) }])
    }

    /// Steps that all chosen sequences can plan ahead.
    fn plan_by_rules(&mut self, chosen: &[usize], weights: usize, lookahead: Vec<Vec<LookaheadStep>>) -> Result<Vec<PlannedStep>> {
        let count = lookahead.iter().map(Vec::len).min().unwrap_or(0);
        let mut steps = Vec::with_capacity(count);
        for index in 0..count {
            // A later step may need more rows than the scheduler allowed the first.
            let rows: usize = lookahead.iter().map(|steps| steps[index].rows.len()).sum();
            if index > 0 && chosen.len() > 1 && rows > self.options.budget.max_rows {
                break;
            }
            let mut plan = Plan::new();
            for (&i, steps) in chosen.iter().zip(&lookahead) {
                let step = &steps[index];
                self.make_writable(i, weights, step.rows.iter().copied())?;
                let rows: Vec<(usize, u32)> = step.rows.iter().map(|p| (*p, 0)).collect();
                plan.push(&rows, self.active[i].table.pages(), self.options.page_size, step.visibility, step.len);
            }
            let of: Vec<&LookaheadStep> = lookahead.iter().map(|steps| &steps[index]).collect();
            let joint = planned_joint(&plan, &of, self.models[weights].model.config().logits_rows());
            let sequences = of.iter().map(|step| step.part.clone()).collect();
            steps.push(PlannedStep { plan, sampling: StepSampling::Rules(RuleSampling { sequences, joint }) });
        }
        Ok(steps)
    }

    /// The pending step of the chosen sequences.
    fn plan_for_host(&mut self, chosen: &[usize], weights: usize, because: Option<HostReason>) -> Result<(Plan, HostSampling)> {
        let page_size = self.options.page_size;
        let (mut plan, mut guide, mut sequences) = (Plan::new(), Plan::new(), Vec::with_capacity(chosen.len()));
        for &i in chosen {
            let positions: Vec<usize> = self.active[i].step().rows.iter().map(|(position, _)| *position).collect();
            self.make_writable(i, weights, positions.into_iter())?;
            let active = &self.active[i];
            let (step, pages) = (active.step(), active.table.pages());
            plan.push(&step.rows, pages, page_size, step.visibility, step.len);
            if step.guidance > 0.0 {
                guide.push(&active.sequence.unprompted(), pages, page_size, step.visibility, step.len);
            }
            sequences.push(host_sequence(&active.sequence, self.models[weights].model.config()));
        }
        let guide = Some(guide).filter(|guide| guide.num_sequences() > 0);
        Ok((plan, HostSampling { sequences, guide, because }))
    }

    /// Pages of sequence `i` for these positions.
    fn make_writable(&mut self, i: usize, weights: usize, positions: impl Iterator<Item = usize>) -> Result<()> {
        for copy in self.active[i].table.make_writable(&mut self.pool, positions) {
            // Other models' pages need no copy: their stages write every row before reading it.
            self.backend.copy_page(&mut self.models[weights].kv, copy.src, copy.dst)?;
        }
        Ok(())
    }

    /// Runs the steps and applies their outcomes to the chosen sequences.
    pub(super) fn run_steps(&mut self, chosen: &[usize], weights: usize, steps: Vec<PlannedStep>) -> Result<()> {
        if let StepSampling::Draws(HostSampling { because: Some(reason), .. }) = &steps[0].sampling {
            *self.host_steps.entry(*reason).or_default() += 1;
        }
        let mask_id = self.hidden_id();
        let loaded = &mut self.models[weights];
        let model = (loaded.model.config().dir.clone(), self.backend.dtype().name());
        let run = PlannedRun { steps, banned: &self.banned, mask_id };
        let mut sequences = RunningSequences {
            active: &mut self.active,
            pool: &mut self.pool,
            page_size: self.options.page_size,
            chosen,
            over: vec![false; chosen.len()],
            waiting: chosen.iter().map(|_| None).collect(),
            freed: Vec::new(),
            model: &model,
        };
        let outcome = self.runner.run(&self.backend, &mut loaded.network(), &run, &mut sequences);
        outcome.map_err(|error| error.in_model(&model.0, model.1))?;
        let freed = sequences.freed;
        self.poison(&freed);
        Ok(())
    }
}

/// What the host samples of the pending step of a sequence.
fn host_sequence(sequence: &Sequence, config: &ModelConfig) -> HostSequence {
    let step = sequence.step().expect("chosen for its step");
    let banned = match step.eos {
        Eos::Free | Eos::Last => BannedSet::Never,
        Eos::Never | Eos::NeverLast => BannedSet::NeverAndEnd,
    };
    let window = sequence.is_joint().then(|| {
        let window = sequence.joint_window();
        let row = |position: usize| step.rows.binary_search_by_key(&position, |(p, _)| *p).expect("a row of the forward") as u32;
        HostWindow {
            start: window.start as u32,
            inside: window.clone().map(|position| row(config.logits_rows().logits_row_for(position))).collect(),
            outside: (0..).zip(&step.rows).filter(|(_, (position, _))| !window.contains(position)).map(|(row, _)| row).collect(),
            shortlist: sequence.joint_shortlist().filter(|n| *n < config.vocab_size),
        }
    });
    let ends_last = matches!(step.eos, Eos::Last | Eos::NeverLast);
    HostSequence { window, ..rows_to_sample(&step.sample_rows, HostRule { banned, ends_last, guidance: step.guidance }) }
}

fn rows_to_sample(sample_rows: &[SampleRow], rule: HostRule) -> HostSequence {
    HostSequence {
        positions: sample_rows.iter().map(|row| row.position).collect(),
        rows: sample_rows.iter().map(|row| row.row as u32).collect(),
        draws: sample_rows.iter().map(|row| row.draw).collect(),
        rule,
        window: None,
    }
}

/// The chosen sequences while their steps run.
struct RunningSequences<'a> {
    active: &'a mut [RunningSequence],
    pool: &'a mut PagePool,
    page_size: usize,
    chosen: &'a [usize],
    /// Sequences that left the run: finished, failed, or with a draft that ended early.
    over: Vec<bool>,
    /// Passes that sequences wait for.
    waiting: Vec<Option<JointPass>>,
    /// Pages of drafts that ended early.
    freed: Vec<u32>,
    /// Directory and type of the model that runs, for errors.
    model: &'a (PathBuf, &'static str),
}

impl Sequences for RunningSequences<'_> {
    fn canvases(&self) -> Vec<RunCanvas<'_>> {
        self.chosen.iter().map(|i| self.active[*i].sequence.run_canvas()).collect()
    }

    fn apply(&mut self, outcome: StepOutcome) {
        for (c, rows) in outcome.sequences.into_iter().enumerate() {
            if let Some(rows) = rows.filter(|_| !self.over[c]) {
                self.over[c] = !self.apply_to(c, outcome.pass.is_some(), outcome.began, rows);
            }
        }
    }

    fn next_pass(&mut self) -> Option<HostPass> {
        let (mut plan, mut sequences) = (Plan::new(), Vec::with_capacity(self.chosen.len()));
        for (c, &i) in self.chosen.iter().enumerate() {
            let RunningSequence { sequence, table, .. } = &self.active[i];
            self.waiting[c] = sequence.joint_pass().filter(|_| !self.over[c]);
            sequences.push(self.waiting[c].as_ref().map(|pass| {
                plan.push(&pass.rows, table.pages(), self.page_size, pass.visibility, pass.len);
                let banned = match (pass.eos, pass.bans) {
                    (Eos::Never, Bans::Every) => BannedSet::NeverAndEnd,
                    // What the request itself does not want is not drawn by a pass either.
                    (Eos::Never, Bans::First) => BannedSet::End,
                    (_, Bans::Every) => BannedSet::Never,
                    (_, Bans::First) => BannedSet::Nothing,
                };
                rows_to_sample(&pass.sample_rows, HostRule { banned, ..HostRule::default() })
            }));
        }
        sequences.iter().any(Option::is_some).then_some(HostPass { plan, sequences })
    }
}

impl RunningSequences<'_> {
    /// Applies what was sampled for one chosen sequence by a forward, or by a joint sampler's
    /// `pass`. What the device unmasked, the specification unmasks here as well, and both must
    /// agree. False where the sequence leaves the run.
    fn apply_to(&mut self, c: usize, pass: bool, began: Option<Instant>, rows: Result<Vec<RowOutcome>>) -> bool {
        let active = &mut self.active[self.chosen[c]];
        let mut events = Vec::new();
        // What lies between two steps: the end of a stage and its remask.
        if let Some(clock) = began
            && active.sequence.next_at(&mut events, clock) == Next::Finished
        {
            active.send(events);
            return false;
        }
        let len = active.sequence.canvas().len();
        let revealed: Vec<(usize, bool)> = rows.iter().flatten().filter_map(|row| Some((row.position, row.revealed?))).collect();
        let prefill = active.sequence.is_prefilling();
        let applied = rows.and_then(|rows| {
            if !pass {
                let sampled = accept(&active.sequence.step().expect("planned ahead").sample_rows, rows)?;
                return active.sequence.apply(&sampled, &mut events);
            }
            let waiting = self.waiting[c].take().or_else(|| active.sequence.joint_pass());
            let pass = waiting.ok_or_else(|| Error::kernel("the device ran a pass that the sequence does not wait for"))?;
            let sampled = accept(&pass.sample_rows, rows)?;
            active.sequence.apply_joint(&pass, &sampled, &mut events)
        });
        match applied {
            Err(error) => active.fail(error.in_model(&self.model.0, self.model.1)),
            Ok(()) => {
                if prefill && let Some(key) = &active.prefix {
                    self.pool.publish(key, active.id, active.table.pages());
                }
            }
        }
        let now = active.sequence.canvas().len();
        if now < len {
            self.freed.extend(active.shorten(self.pool));
        }
        active.send(events);
        let agree = |(position, chosen): &(usize, bool)| {
            *position >= now || (active.sequence.canvas().state(*position) == State::Revealed) == *chosen
        };
        if active.failed.is_none() && !revealed.iter().all(agree) {
            active.fail(Error::kernel("the device revealed other positions than the specification"));
        }
        // A draft that ended early leaves the rest of the run unused.
        active.failed.is_none() && now == len
    }
}

/// The sampled tokens of a sequence's own rows, which the rows must match.
fn accept(sample_rows: &[SampleRow], rows: Vec<RowOutcome>) -> Result<Vec<SampledToken>> {
    if !sample_rows.iter().map(|row| row.position).eq(rows.iter().map(|row| row.position)) {
        return Err(Error::kernel("the device sampled other positions than the sequence"));
    }
    Ok(rows.into_iter().map(|row| row.sampled).collect())
}
