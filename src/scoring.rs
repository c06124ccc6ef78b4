//! Forwards outside of any request: logits of given tokens, likelihood under an autoregressive
//! judge, timed single forwards.
//!
//! Each takes pages of its own from the engine's pool and gives them back, so it may run between
//! ticks.
#![forbid(unsafe_code)]

use std::ops::Range;

pub use crate::backend::Timing;
use crate::backend::{
    Backend, HostPass, HostRule, HostSampling, HostSequence, PlannedRun, PlannedStep, RuleSampling, RunCanvas, SequenceStep, Sequences,
    StepOutcome, StepRunner, StepSampling,
};
use crate::canvas::Canvas;
use crate::config::{AttentionMask, ModelConfig};
use crate::engine::{Engine, LoadedModel};
use crate::error::{Error, Result};
use crate::model::{Model, Probe, Scratch};
use crate::pages::{PagePool, PageTable};
use crate::plan::{Plan, Visibility};
use crate::request::{Prompt, Request};
use crate::sampling::{Draw, Rank, TopPRule, UnmaskStep};
use crate::schedule::{Defaults, Schedule};

/// Draws of scoring and of benches: the plain distribution.
const PLAIN_DRAW: Draw =
    Draw { u: 0.0, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, top_k: None, forced: None, truncated_confidence: false };

/// The request by which a diffusion model scores `with_bos`, BOS first: every token is revealed in
/// turn, left to right, under `visibility`, and must be the given one. The confidences of its
/// output are the probabilities of the tokens after BOS: the chain rule in an order that the model
/// can decode.
pub fn scoring_request(with_bos: Vec<u32>, visibility: Visibility) -> Result<Request> {
    let stage = match visibility {
        Visibility::BlockCausal(block_len) => format!("block={block_len},visible=block,unmask=left:1"),
        Visibility::Full => "block=full,visible=canvas,unmask=left:1".into(),
    };
    let schedule = Schedule::resolve(&[stage.parse()?], &Defaults { top_p: 1.0, ..Defaults::default() })?;
    let canvas = with_bos.iter().enumerate().map(|(i, token)| (i == 0).then_some(*token)).collect();
    let mut request = Request::new(Prompt::Canvas(canvas), schedule, 0, 0);
    request.stop.ignore_eos = true;
    request.forced = with_bos;
    Ok(request)
}

/// A sequence that is being scored, in pages of its own.
struct Scored {
    /// Among those asked for.
    index: usize,
    /// Rows it takes.
    len: usize,
    pages: usize,
    table: PageTable,
}

/// Pages of a forward whose results a caller's function reads: they go back even where it panics.
struct Lease<'a> {
    table: PageTable,
    committed: usize,
    freed: Vec<u32>,
    pool: &'a mut PagePool,
}

impl Lease<'_> {
    fn give_back(&mut self) {
        self.freed.extend(self.table.truncate(self.pool, 0));
        self.pool.uncommit(std::mem::take(&mut self.committed));
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl<B: Backend> Engine<B> {
    /// Refuses ids outside the vocabulary, and nothing at all.
    pub fn check_tokens(config: &ModelConfig, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::request("tokens: expected at least one id, found none"));
        }
        if let Some((i, id)) = tokens.iter().enumerate().find(|(_, id)| **id as usize >= config.vocab_size) {
            return Err(Error::request(format!("tokens: id {id} at index {i} is outside the vocabulary of {}", config.vocab_size)));
        }
        Ok(())
    }

    /// One forward over all of `tokens` in pages of its own; what came of it is read from the
    /// scratch, then the pages are freed.
    fn once<T>(
        &mut self,
        tokens: &[u32],
        visibility: Visibility,
        probe: Option<Probe<B>>,
        read: impl FnOnce(&Model<B>, &B, &mut Scratch<B>) -> Result<T>,
    ) -> Result<T> {
        Self::check_tokens(self.config(), tokens)?;
        let len = tokens.len();
        self.check_len(len)?;
        let needed = self.pool.pages_for(len);
        if !self.pool.commit(needed) {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let mut lease = Lease { table: PageTable::default(), committed: needed, freed: Vec::new(), pool: &mut self.pool };
        lease.table.make_writable(lease.pool, 0..len);
        let mut plan = Plan::new();
        let rows: Vec<_> = tokens.iter().copied().enumerate().collect();
        plan.push(&rows, lease.table.pages(), self.options.page_size, visibility, len);
        let wanted: Vec<u32> = (0..len as u32).collect();
        let LoadedModel { model, kv, scratch, .. } = &mut self.models[0];
        let outcome = model.forward(&self.backend, &plan, &wanted, kv, scratch, probe).and_then(|()| read(model, &self.backend, scratch));
        lease.give_back();
        let freed = std::mem::take(&mut lease.freed);
        drop(lease);
        self.poison(&freed);
        outcome
    }

    /// Logits of all of `tokens` under `visibility`, before any ban or shift, a few rows at a time:
    /// `sink(first_row, logits)`.
    pub fn logits(&mut self, tokens: &[u32], visibility: Visibility, sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        self.logits_with_probe(tokens, visibility, None, sink)
    }

    /// [`Engine::logits`], with the residual stream after the embedding and after each layer shown
    /// to `probe`.
    pub fn logits_with_probe(
        &mut self,
        tokens: &[u32],
        visibility: Visibility,
        probe: Option<Probe<B>>,
        sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.once(tokens, visibility, probe, |model, backend, scratch| model.logits(backend, tokens.len(), scratch, sink))
    }

    /// [`Engine::causal_nlls`] of one sequence.
    pub fn causal_nll(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        Ok(self.causal_nlls(&[tokens])?.remove(0))
    }

    /// Negative log-likelihoods (nats) of tokens 1.. of each sequence under an autoregressive
    /// checkpoint: row i predicts token i + 1. A MASK, where the checkpoint has one, is excluded
    /// from every distribution.
    ///
    /// Sequences share forwards of up to `max_rows` rows and long ones take several, over their own
    /// K/V: neither changes a bit of the result.
    ///
    /// Errors: as [`Engine::check_tokens`], a sequence longer than the model serves or the pool
    /// holds, a checkpoint that is not autoregressive.
    pub fn causal_nlls(&mut self, sequences: &[&[u32]]) -> Result<Vec<Vec<f64>>> {
        if self.config().attention != AttentionMask::Causal {
            return Err(Error::request("this checkpoint is not autoregressive: it has no likelihood by next tokens alone"));
        }
        for tokens in sequences {
            Self::check_tokens(self.config(), tokens)?;
            self.check_len(tokens.len())?;
            let needed = self.pool.pages_for(tokens.len() - 1);
            if needed > self.pool.capacity() {
                return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
            }
        }
        let mut nlls: Vec<Vec<f64>> = sequences.iter().map(|tokens| Vec::with_capacity(tokens.len() - 1)).collect();
        // The last token of a sequence predicts nothing that is scored: it has no row.
        let mut waiting = (0..sequences.len()).filter(|s| sequences[*s].len() > 1).peekable();
        let mut open: Vec<Scored> = Vec::new();
        let mut outcome = Ok(());
        while outcome.is_ok() && (waiting.peek().is_some() || !open.is_empty()) {
            while let Some(&index) = waiting.peek().filter(|_| open.len() < self.options.budget.max_sequences) {
                let len = sequences[index].len() - 1;
                let pages = self.pool.pages_for(len);
                if !self.pool.commit(pages) {
                    break;
                }
                let mut table = PageTable::default();
                table.make_writable(&mut self.pool, 0..len);
                open.push(Scored { index, len, pages, table });
                waiting.next();
            }
            if open.is_empty() {
                // Requests in flight hold the pages.
                let needed = waiting.peek().map_or(0, |s| self.pool.pages_for(sequences[*s].len() - 1));
                return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
            }
            outcome = self.score_rows(sequences, &open, &mut nlls);
            for scored in open.extract_if(.., |scored| outcome.is_err() || nlls[scored.index].len() == scored.len) {
                let Scored { mut table, pages, .. } = scored;
                let freed = table.truncate(&mut self.pool, 0);
                self.pool.uncommit(pages);
                self.poison(&freed);
            }
        }
        outcome.map(|()| nlls)
    }

    /// One forward over the next rows of the open sequences, in turn, up to the row budget; what it
    /// says is appended to `nlls`.
    fn score_rows(&mut self, sequences: &[&[u32]], open: &[Scored], nlls: &mut [Vec<f64>]) -> Result<()> {
        let (mut plan, mut draws, mut parts) = (Plan::new(), Vec::new(), Vec::new());
        let mut room = self.options.budget.max_rows;
        for Scored { index, len, table, .. } in open {
            let (tokens, first) = (sequences[*index], nlls[*index].len());
            let rows: Vec<(usize, u32)> = (first..*len).take(room).map(|i| (i, tokens[i])).collect();
            if rows.is_empty() {
                break;
            }
            room -= rows.len();
            parts.push((*index, rows.len()));
            draws.extend(rows.iter().map(|(i, _)| Draw { forced: Some(tokens[i + 1]), ..PLAIN_DRAW }));
            plan.push(&rows, table.pages(), self.options.page_size, Visibility::BlockCausal(1), *len);
        }
        let all: Vec<u32> = (0..plan.num_rows() as u32).collect();
        let banned: Vec<u32> = self.config().mask_id.into_iter().collect();
        let LoadedModel { model, kv, scratch, .. } = &mut self.models[0];
        model.forward(&self.backend, &plan, &all, kv, scratch, None)?;
        let mut sampled = model.sample(&self.backend, &all, &draws, &banned, scratch)?.into_iter();
        for (index, count) in parts {
            nlls[index].extend(sampled.by_ref().take(count).map(|d| -f64::from(d.log_prob)));
        }
        Ok(())
    }

    /// Times one forward: once unmeasured, then `runs` times. Where the backend samples steps by
    /// itself, a run is many launches of the recorded forward between two waits, so that the time
    /// is the device's and not that of the calls.
    ///
    /// Errors: [`Error::OutOfPages`] for a sequence longer than the pool, and those of the forward.
    pub fn time_forward(&mut self, timed: &TimedForward, runs: usize) -> Result<Timing> {
        let mask_id = self.timed_id();
        let TimedForward { ref range, sampled, visibility, len, .. } = *timed;
        assert!(range.end <= len && (1..=range.len()).contains(&sampled), "{sampled} rows of {range:?} of {len}");
        let rows: Vec<_> = (0..len).map(|position| (position, mask_id)).collect();
        let needed = self.pool.pages_for(len);
        if !self.pool.commit(needed) {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let mut table = PageTable::default();
        table.make_writable(&mut self.pool, 0..len);
        let plan_of = |rows: &[(usize, u32)]| {
            let mut plan = Plan::new();
            plan.push(rows, table.pages(), self.options.page_size, visibility, len);
            plan
        };
        let (all, plan) = (plan_of(&rows), plan_of(&rows[range.clone()]));
        let measure = || -> Result<Timing> {
            // K/V of all positions.
            let LoadedModel { model, kv, scratch, .. } = &mut self.models[0];
            model.forward(&self.backend, &all, &[], kv, scratch, None)?;
            self.time_step(timed, plan, runs)
        };
        let outcome = measure();
        table.truncate(&mut self.pool, 0);
        self.pool.uncommit(needed);
        outcome
    }

    /// What the rows of a timed forward hold: any id that can be embedded.
    fn timed_id(&self) -> u32 {
        self.config().mask_id.unwrap_or(0)
    }

    /// The forward as a step, sampled by rules where the runner takes them. What was sampled last
    /// is checked: every sampled row has a token.
    fn time_step(&mut self, timed: &TimedForward, plan: Plan, runs: usize) -> Result<Timing> {
        let mask_id = self.timed_id();
        let TimedForward { ref range, sampled, len, .. } = *timed;
        let sampling = if self.runner.looks_ahead(&self.backend) {
            let logits = self.config().logits_rows();
            let sample_rows = logits.position_of(range.end - sampled)..range.end;
            let sequence = SequenceStep {
                remask: None,
                stage: 0,
                block: 0,
                step: 0,
                num_sampled: sample_rows.len(),
                range: sample_rows,
                logits,
                draw: timed.draw(),
                unmask: UnmaskStep::Best { rank: Rank::Confidence, n: 1 },
            };
            StepSampling::Rules(RuleSampling { sequences: vec![sequence], joint: None })
        } else {
            let rows = (range.len() - sampled) as u32..range.len() as u32;
            let (positions, draws) = ((range.end - sampled..range.end).collect(), vec![timed.draw(); sampled]);
            let sample_rows = HostSequence { positions, rows: rows.collect(), draws, rule: HostRule::default(), window: None };
            StepSampling::Draws(HostSampling { sequences: vec![sample_rows], guide: None, because: None })
        };
        let steps = vec![PlannedStep { plan, sampling }];
        let run = PlannedRun { steps, banned: &self.banned, mask_id };
        let mut sequence = TimedSequence { canvas: Canvas::new(&vec![None; len], mask_id), outcome: Ok(()) };
        let timing = self.runner.time(&self.backend, &mut self.models[0].network(), &run, &mut sequence, runs)?;
        sequence.outcome.map(|()| timing)
    }
}

/// A sequence of masks that a step is timed over: the outcome is looked at, and
/// forgotten.
struct TimedSequence {
    canvas: Canvas,
    outcome: Result<()>,
}

impl Sequences for TimedSequence {
    fn canvases(&self) -> Vec<RunCanvas<'_>> {
        vec![RunCanvas { canvas: &self.canvas, seed: 0, sample: 0 }]
    }

    fn apply(&mut self, outcome: StepOutcome) {
        let sampled: Result<()> = outcome.sequences.into_iter().flatten().try_for_each(|rows| rows.map(|_| ()));
        self.outcome = std::mem::replace(&mut self.outcome, Ok(())).and(sampled);
    }

    fn next_pass(&mut self) -> Option<HostPass> {
        None
    }
}

/// A forward to time, over a sequence of masks.
#[derive(Clone, Debug, PartialEq)]
pub struct TimedForward {
    /// Positions of its rows. K/V of the positions before are cached.
    pub range: Range<usize>,
    /// How many of its last rows draw a token; at least one.
    pub sampled: usize,
    pub visibility: Visibility,
    /// Positions of the sequence.
    pub len: usize,
    /// Of the draws; 1 draws from the whole distribution.
    pub top_p: f32,
}

impl TimedForward {
    fn draw(&self) -> Draw {
        Draw { u: 0.5, top_p: self.top_p, ..PLAIN_DRAW }
    }
}
