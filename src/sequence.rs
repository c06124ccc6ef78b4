//! One request's life: fixed tokens, place in the schedule, canvas, which K/V is final,
//! counters.
//!
//! A sequence is asked for its next forward ([`Sequence::next`]) and told what came of it
//! ([`Sequence::apply`]). It says which rows it needs, who sees whom, and which rows to sample; it
//! never touches a page, a tensor or another sequence, so the whole of draft-then-refine runs in
//! tests without a model.
//!
//! ```text
//! stage 0: Prefill -> [ Denoise ... (commit fused into the next block's first Denoise) ] -> finish
//! stage k: (Score ...) -> remask -> [ Denoise ... ] -> finish
//! ```
//!
//! One number, `committed`, carries the reuse: positions below it hold K/V that is final under the
//! stage's visibility. A denoising forward of a block that ends at `e` needs rows `committed..e`:
//! the block itself, and every finished block before it whose final K/V is not written yet. Prompt
//! blocks, finished blocks and infilled blocks are all the same case. [BD3-LM] A finished block
//! never sees a later one, so this equals recomputing everything. Under full visibility nothing is
//! ever final and every exact forward needs all rows.
//!
//! Where a model's logits are shifted ([`LogitsRows::Before`]), the row before a position holds its
//! logits. A forward over some rows computes those rows too. Under block-causal attention the last
//! row of a block holds the logits of the next block's first position, and sees nothing of that
//! block. One forward, the *boundary forward*, writes the finished blocks' final K/V and unmasks
//! that position; then the block is denoised. [Fast-dLLM v2] It is the commit and the next token of
//! the autoregressive reading in one. An autoregressive model is decoded by these alone: in blocks
//! of one position, no other forward is left, and no masked position is ever a row.
#![forbid(unsafe_code)]

mod forwards;
mod joint;
mod lookahead;
mod report;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub use forwards::{JointPass, LookaheadJoint, LookaheadStep, SampleRow};
pub use report::{ENTROPY_WINDOW, Event, EventKind, Finish, Forwards, StageReport, Stop, TextStop, unigram_entropy};

use crate::canvas::{Canvas, State};
use crate::error::{Error, Result};
use crate::plan::{Kind, LogitsRows, NO_MASK, Visibility};
use crate::rng::{self, DrawKey, STAGE_STEP, TIME_STEP, Uniforms};
use crate::sampling::{self, BlockProgress, Candidate, Draw, GeneratedToken, Rank, RemaskBy, SampledToken, ScoringForwards};
use crate::schedule::{Edit, Eos, KvPolicy, SamplingParams, Schedule, Stage};

/// What one sequence generates, fully resolved.
#[derive(Clone)]
pub struct SequenceSpec {
    /// The canvas: `Some(token)` fixed, `None` to be generated.
    pub fixed: Vec<Option<u32>>,
    /// MASK, or [`NO_MASK`] of a model that has none.
    pub mask_id: u32,
    pub schedule: Schedule,
    /// For each model that a stage may name: whether its logits are shifted
    /// ([`crate::config::ModelConfig::logits_rows`]).
    pub shifted: Vec<bool>,
    pub seed: u64,
    pub sample: u32,
    pub stop: Stop,
    /// Write a finished block's K/V in a forward of its own instead of together with the next
    /// block's first forward.
    pub separate_commit: bool,
    /// Per position: the token that must be chosen (likelihood scoring). Empty to sample.
    pub forced: Vec<u32>,
    /// Per position: the token that the first stage must choose, in the place of a
    /// draft by the model. Empty to sample.
    pub draft: Vec<u32>,
    /// Source of uniforms; `None` is [`rng::uniforms`]. Tests replay recorded draws through it.
    pub draws: Option<DrawSource>,
}

/// Replaces the counter RNG.
pub type DrawSource = Arc<dyn Fn(&DrawKey) -> Uniforms + Send + Sync>;

/// One forward of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub kind: Kind,
    /// (position, token id), positions ascending.
    pub rows: Vec<(usize, u32)>,
    pub visibility: Visibility,
    /// The model that runs it.
    pub weights: usize,
    /// Sequence length: no row sees a key at or beyond it.
    pub len: usize,
    pub sample_rows: Vec<SampleRow>,
    /// How rows are sampled where tokens end the text.
    pub eos: Eos,
    /// Above 0: the same rows run once more before, with every given position masked, and logits
    /// move away from those of that forward.
    pub guidance: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefill,
    /// Scoring forward `group` before the stage's remask.
    Score {
        group: usize,
    },
    Denoise,
    Finished,
}

/// What a sequence wants next.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Run the step of [`Sequence::step`].
    Forward,
    Finished,
}

/// One sequence on its way through a schedule.
#[derive(Clone)]
pub struct Sequence {
    spec: SequenceSpec,
    canvas: Canvas,
    /// Of each position's token, in the forward that wrote it, in nats: what confidences cannot
    /// hold, which round to 1 and end at 1e-38. 0 where nothing was written.
    log_probs: Vec<f32>,
    phase: Phase,
    stage: usize,
    /// Positions below hold final K/V under the current stage's visibility.
    committed: usize,
    block: usize,
    /// The positions that are sampled now: the block, or a part of it.
    unit: Range<usize>,
    progress: BlockProgress,
    /// Denoising forwards of this stage so far.
    denoised: u32,
    /// The block holds no mask any more but its tokens may still be overwritten: forwards over it
    /// since then.
    settling: Option<usize>,
    /// The block whose first position was revealed by the forward that filled the caches for it.
    boundary_done: Option<usize>,
    /// Forwards since all rows were recomputed, for `refresh:r`.
    since_full: Option<usize>,
    /// Positions revealed since the last forward that computed them.
    fresh: Vec<usize>,
    scores: Vec<(usize, f64)>,
    pending: Option<Step>,
    /// What the joint sampler still unmasks after the last forward.
    round: Option<forwards::Round>,
    reports: Vec<StageReport>,
    stage_start: Instant,
    /// What time it is for stages that end and begin: see [`Sequence::next_at`].
    clock: Instant,
    draft: Vec<u32>,
    finish: Finish,
    prompt_len: usize,
    /// Positions that the request asked for; until the first stage ends there may be more.
    requested_len: usize,
}

impl Sequence {
    /// Checks what only the whole request can tell. `fixed` must hold at least one position to
    /// generate.
    pub fn new(spec: SequenceSpec) -> Result<Sequence> {
        let mut fixed = spec.fixed.clone();
        fixed.resize(Sequence::decoded_len(&spec.schedule, &fixed), None);
        let canvas = Canvas::new(&fixed, spec.mask_id);
        if canvas.num_masks() == 0 {
            return Err(Error::request("nothing to generate: every position is fixed"));
        }
        if let Some(position) = spec.fixed.iter().position(|f| *f == Some(spec.mask_id)) {
            return Err(Error::request(format!("position {position} is fixed to the mask id {}", spec.mask_id)));
        }
        for (name, tokens) in [("forced", &spec.forced), ("draft", &spec.draft)] {
            if !tokens.is_empty() && tokens.len() != spec.fixed.len() {
                let (found, expected) = (tokens.len(), spec.fixed.len());
                return Err(Error::request(format!("{name}: expected one token for each of {expected} positions, found {found}")));
            }
        }
        if let Some(block_len) = spec.schedule.stages().iter().filter_map(Stage::block_len).min()
            && canvas.len() / block_len >= 1 << 24
        {
            return Err(Error::request(format!("{} positions make more than 2^24 blocks of {block_len}", canvas.len())));
        }
        let shifted = |stage: &Stage| spec.shifted[stage.weights] && matches!(stage.visibility(), Visibility::BlockCausal(_));
        if let Some(index) = spec.schedule.stages().iter().position(|stage| stage.edit().is_some() && shifted(stage)) {
            return Err(Error::request(format!(
                "stage {index}: edit samples a whole block again, and shifted logits predict its first position from the block before; use visible=canvas"
            )));
        }
        let prompt_len = canvas.fixed_prefix();
        let mut sequence = Sequence {
            log_probs: vec![0.0; canvas.len()],
            canvas,
            phase: Phase::Prefill,
            stage: 0,
            committed: 0,
            block: 0,
            unit: 0..0,
            progress: BlockProgress { block_len: 0, masks_at_start: 0, masks: 0, step: 0 },
            denoised: 0,
            settling: None,
            boundary_done: None,
            since_full: None,
            fresh: Vec::new(),
            scores: Vec::new(),
            pending: None,
            round: None,
            reports: Vec::new(),
            stage_start: Instant::now(),
            clock: Instant::now(),
            draft: Vec::new(),
            finish: Finish::Length,
            prompt_len,
            requested_len: spec.fixed.len(),
            spec,
        };
        sequence.open_report();
        Ok(sequence)
    }

    /// Positions of the canvas on which `schedule` decodes `fixed`: a last block that is generated
    /// to its end may be decoded whole.
    pub fn decoded_len(schedule: &Schedule, fixed: &[Option<u32>]) -> usize {
        match (schedule.stages().first(), fixed.last()) {
            (Some(stage), Some(None)) => stage.decoded_len(fixed.len()),
            _ => fixed.len(),
        }
    }

    pub fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    /// Log probability of a position's token, in nats, in the forward that wrote it.
    pub fn log_prob(&self, position: usize) -> f32 {
        self.log_probs[position]
    }

    pub fn sample(&self) -> u32 {
        self.spec.sample
    }

    /// Positions before the first generated one.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    pub fn finish(&self) -> Finish {
        self.finish
    }

    pub fn reports(&self) -> &[StageReport] {
        &self.reports
    }

    /// Tokens of the generated positions when stage 0 was done.
    pub fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// Length of the shareable prompt: its whole blocks under the draft's block-causal visibility,
    /// 0 where none is exact.
    pub fn prefix_len(&self) -> usize {
        let stage = &self.spec.schedule.stages()[0];
        match stage.visibility() {
            Visibility::BlockCausal(block_len) if stage.kv() != KvPolicy::Recompute => self.prompt_len / block_len * block_len,
            _ => 0,
        }
    }

    /// True until the prompt's whole blocks are in the pages.
    pub fn wants_prefix(&self) -> bool {
        self.phase == Phase::Prefill && self.prefix_len() > 0
    }

    /// Block length of the visibility that the prefix was computed under.
    pub fn prefix_block_len(&self) -> usize {
        self.spec.schedule.stages()[0].block_len().unwrap_or(usize::MAX)
    }

    /// Model that the prefix is computed with.
    pub fn prefix_weights(&self) -> usize {
        self.spec.schedule.stages()[0].weights
    }

    /// Whether what this stage commits is final.
    pub fn is_last_stage(&self, stage: u8) -> bool {
        usize::from(stage) + 1 == self.spec.schedule.stages().len()
    }

    /// True while the pending step is the prompt's prefill.
    pub fn is_prefilling(&self) -> bool {
        self.pending.as_ref().is_some_and(|s| s.kind == Kind::Prefill)
    }

    /// True once nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished && self.pending.is_none()
    }

    /// Another sequence's pages hold the prefix already.
    pub fn skip_prefill(&mut self) {
        assert!(self.wants_prefix());
        self.committed = self.prefix_len();
        self.phase = Phase::Denoise;
    }

    /// The clock of the first stage starts now: time spent waiting for admission is not the
    /// stage's.
    pub fn start(&mut self) {
        self.stage_start = Instant::now();
    }

    /// Ends the sequence with the tokens that it has now.
    pub fn cancel(&mut self) {
        self.pending = None;
        self.cut(self.requested_len);
        // A caller cannot read what hides a token there. All masks are at the end: nothing given is
        // cut.
        if self.spec.mask_id == NO_MASK
            && let Some(first) = self.canvas.next_masked(0)
        {
            self.cut(first);
        }
        self.finish = Finish::Cancelled;
        self.phase = Phase::Finished;
    }

    /// The forward wanted now; asking again before [`Sequence::apply`] gives the same one.
    pub fn step(&self) -> Option<&Step> {
        self.pending.as_ref()
    }

    /// Moves on to the next forward, through stage ends where there is nothing left to do. Events
    /// of remasking and of the end of the sequence are pushed on the way.
    pub fn next(&mut self, events: &mut Vec<Event>) -> Next {
        self.next_at(events, Instant::now())
    }

    /// [`Sequence::next`] for a host that applies steps after the device ran them: a stage that
    /// ends here ended at `clock`.
    pub fn next_at(&mut self, events: &mut Vec<Event>, clock: Instant) -> Next {
        self.clock = clock;
        while self.pending.is_none() {
            match self.phase {
                Phase::Finished => return Next::Finished,
                Phase::Prefill => {
                    let len = self.prefix_len();
                    self.phase = Phase::Denoise;
                    if len > 0 {
                        self.set_step(Kind::Prefill, 0..len, Vec::new());
                    }
                }
                Phase::Score { group } => self.set_score_step(group),
                Phase::Denoise => {
                    if !self.set_denoise_step() {
                        self.end_stage(events);
                    }
                }
            }
        }
        Next::Forward
    }

    /// The rows of the pending step with every given position masked.
    pub fn unprompted(&self) -> Vec<(usize, u32)> {
        let rows = self.step().map_or(&[][..], |step| &step.rows);
        let hide = |&(p, token): &(usize, u32)| (p, if self.canvas.state(p) == State::Fixed { self.spec.mask_id } else { token });
        rows.iter().map(hide).collect()
    }

    fn stage(&self) -> &Stage {
        &self.spec.schedule.stages()[self.stage]
    }

    /// Which rows hold the logits of a position in the stage's model.
    fn logits_rows(&self) -> LogitsRows {
        self.spec.shifted[self.stage().weights].into()
    }

    /// The position whose row holds the logits of `position`.
    fn logits_row_for(&self, position: usize) -> usize {
        self.logits_rows().logits_row_for(position)
    }

    fn uniforms(&self, block: usize, step: u32, position: usize) -> Uniforms {
        let key = DrawKey {
            seed: self.spec.seed,
            sample: self.spec.sample,
            stage: self.stage as u8,
            block: block as u32,
            step,
            position: position as u32,
        };
        self.spec.draws.as_ref().map_or_else(|| rng::uniforms(key), |draws| draws(&key))
    }

    /// The token that must be chosen at `position`.
    fn forced(&self, position: usize) -> Option<u32> {
        let draft = if self.stage == 0 { self.spec.draft.get(position) } else { None };
        draft.or(self.spec.forced.get(position)).copied()
    }

    fn draw(&self, u: f64, forced: Option<u32>) -> Draw {
        let SamplingParams { temperature, top_p, top_p_rule, top_k, truncated_confidence } = self.stage().sampling;
        Draw { u, temperature, top_p, top_p_rule, top_k, forced, truncated_confidence }
    }

    fn set_step(&mut self, kind: Kind, positions: impl IntoIterator<Item = usize>, sample_rows: Vec<SampleRow>) {
        let rows: Vec<_> = positions.into_iter().map(|p| (p, self.canvas.tokens()[p])).collect();
        let stage = self.stage();
        let (weights, eos, guidance) = (stage.weights, stage.eos, stage.guidance());
        // Scoring keeps the tokens that are there.
        let (eos, guidance) = if matches!(kind, Kind::Denoise | Kind::Boundary) { (eos, guidance) } else { (Eos::Free, 0.0) };
        self.pending =
            Some(Step { kind, rows, visibility: self.stage().visibility(), weights, len: self.canvas.len(), sample_rows, eos, guidance });
    }

    /// Positions of block `block` of the stage.
    fn range(&self, block: usize) -> Range<usize> {
        let (len, block_len) = (self.canvas.len(), self.stage().block_len_in(self.canvas.len()));
        let start = self.stage().origin(self.prompt_len) + block * block_len;
        start..start.saturating_add(block_len).min(len)
    }

    /// The next denoising (or separate commit) forward; false if no position of the stage is masked
    /// any more.
    fn set_denoise_step(&mut self) -> bool {
        let stage = self.stage().clone();
        let kv = stage.kv();
        let len = self.canvas.len();
        let block_len = stage.block_len_in(len);
        let from = self.range(self.block).start;
        let first = match self.settling {
            Some(_) => from,
            None => match self.canvas.next_masked(from) {
                Some(first) => first,
                None => return false,
            },
        };
        let block = (first - stage.origin(self.prompt_len)) / block_len;
        let range = self.range(block);
        let blockwise = matches!(stage.visibility(), Visibility::BlockCausal(_));
        if blockwise && self.logits_rows().are_shifted() && range.start > 0 && self.canvas.state(range.start) == State::Masked {
            self.set_boundary_forward(block, range.start);
            return true;
        }
        // [Fast-dLLM] Its loop for Dream.
        let cached = !blockwise && matches!(kv, KvPolicy::Prefix | KvPolicy::Dual);
        let entered = block != self.block || self.progress.masks_at_start == 0;
        if cached
            && self.logits_rows().are_shifted()
            && entered
            && self.boundary_done != Some(block)
            && self.canvas.state(range.start) == State::Masked
        {
            self.set_boundary_forward(block, range.start);
            self.boundary_done = Some(block);
            self.since_full = Some(1);
            return true;
        }
        if self.spec.separate_commit && blockwise && self.committed < range.start && kv != KvPolicy::Recompute {
            self.set_step(Kind::Commit, self.committed..range.start, Vec::new());
            return true;
        }
        let unit = match stage.sub_len() {
            Some(sub) => {
                let start = range.start + (first - range.start) / sub * sub;
                start..(start + sub).min(range.end)
            }
            None => range.clone(),
        };
        let masked: Vec<usize> = self.canvas.masked_in(unit.clone()).collect();
        // A block the stage has not entered yet has no K/V under the stage's visibility;
        // Fast-dLLM's caches are filled anew for every block.
        if entered && (cached && self.boundary_done != Some(block) || blockwise && kv != KvPolicy::Draft) {
            self.since_full = None;
        }
        if entered || unit != self.unit {
            let block_len = stage.sub_len().unwrap_or(block_len);
            self.progress = BlockProgress { block_len, masks_at_start: masked.len(), masks: masked.len(), step: 0 };
        }
        self.block = block;
        self.unit = unit;
        self.progress.masks = masked.len();
        let mut times = masked.iter().map(|p| self.time(block, *p));
        self.progress.step = stage.unmask.next_step(self.progress, &mut times);

        let end = if blockwise { range.end } else { len };
        let partial = match kv {
            KvPolicy::Exact | KvPolicy::Recompute => false,
            KvPolicy::Refresh(r) => self.since_full.is_some_and(|n| n < r.get()),
            KvPolicy::Draft => true,
            // [Fast-dLLM v2] The whole block until the first position of the part is there.
            KvPolicy::Dual if blockwise => self.since_full.is_some() && self.canvas.state(self.unit.start) != State::Masked,
            KvPolicy::Prefix | KvPolicy::Dual => self.since_full.is_some(),
        };
        let positions: Vec<usize> = if !partial {
            let first = if kv == KvPolicy::Recompute { 0 } else { self.committed };
            (first..end).collect()
        } else if cached {
            // [Fast-dLLM] The block; for the prefix cache also all positions after it, whose K/V
            // the dual cache keeps.
            let first = self.logits_row_for(first).min(range.start);
            (first..if kv == KvPolicy::Dual { range.end } else { len }).collect()
        } else if kv == KvPolicy::Dual {
            self.unit.clone().collect()
        } else {
            let mut rows = self.fresh.clone();
            rows.extend(&masked);
            rows.extend(masked.iter().map(|p| self.logits_row_for(*p)));
            rows.sort_unstable();
            rows.dedup();
            rows
        };
        let sample_rows = match stage.edit() {
            None => masked.iter().map(|p| self.sample_row(block, *p, &positions)).collect(),
            Some(_) => {
                self.unit.clone().filter(|p| self.canvas.state(*p) != State::Fixed).map(|p| self.sample_row(block, p, &positions)).collect()
            }
        };
        self.since_full = Some(if partial { self.since_full.unwrap_or(0) + 1 } else { 1 });
        self.set_step(Kind::Denoise, positions, sample_rows);
        true
    }

    /// The uniform of a position for rules that draw one for the whole stage.
    fn time(&self, block: usize, position: usize) -> f64 {
        self.uniforms(block, TIME_STEP, position).order
    }

    /// How the masked `position` is sampled in of a forward over the rows at `positions`
    /// (ascending).
    fn sample_row(&self, block: usize, position: usize, positions: &[usize]) -> SampleRow {
        let row = positions.binary_search(&self.logits_row_for(position)).expect("a row that answers is always computed");
        let Uniforms { token, order } = self.uniforms(block, self.denoised, position);
        let order = if self.stage().unmask.draws_times() { self.time(block, position) } else { order };
        let forced = self.forced(position);
        SampleRow { row, position, draw: self.draw(token, forced), order }
    }

    /// The forward that unmasks the first position of a block from the last row before it: of the
    /// finished blocks, or of everything where it fills the caches of full attention.
    fn set_boundary_forward(&mut self, block: usize, start: usize) {
        self.block = block;
        self.unit = start..start + 1;
        // Steps of the block's own schedule begin after it.
        self.progress = BlockProgress { block_len: 1, masks_at_start: 0, masks: 1, step: 0 };
        let last = self.logits_row_for(start);
        let blockwise = matches!(self.stage().visibility(), Visibility::BlockCausal(_));
        let positions: Vec<usize> = match self.stage().kv() {
            KvPolicy::Exact | KvPolicy::Refresh(_) => (self.committed.min(last)..start).collect(),
            KvPolicy::Dual if blockwise => (self.committed.min(last)..start).collect(),
            KvPolicy::Prefix | KvPolicy::Dual => (0..self.canvas.len()).collect(),
            KvPolicy::Recompute => (0..start).collect(),
            KvPolicy::Draft => self.fresh.iter().copied().filter(|p| *p < last).chain([last]).collect(),
        };
        let row = self.sample_row(block, start, &positions);
        self.set_step(Kind::Boundary, positions, vec![row]);
    }

    /// Scoring forward `group`: visible text for post-hoc, one interleaved group hidden for
    /// held-out.
    fn set_score_step(&mut self, group: usize) {
        let groups = match self.remask_by().forwards() {
            ScoringForwards::HeldOut(groups) => Some(groups.get()),
            ScoringForwards::None | ScoringForwards::Visible => None,
        };
        let scored: Vec<usize> =
            self.canvas.generated().enumerate().filter(|(i, _)| groups.is_none_or(|g| i % g == group)).map(|(_, p)| p).collect();
        let sample_rows = scored
            .iter()
            .map(|&position| SampleRow {
                row: self.logits_row_for(position),
                position,
                draw: self.draw(0.0, Some(self.canvas.tokens()[position])),
                order: 0.0,
            })
            .collect();
        self.set_step(Kind::Score, 0..self.canvas.len(), sample_rows);
        if groups.is_some() {
            let mask_id = self.spec.mask_id;
            let step = self.pending.as_mut().expect("just set");
            for position in scored {
                step.rows[position].1 = mask_id;
            }
        }
    }

    /// Takes the sampled tokens of the pending step, in the order of its rows. On an error the
    /// sequence is as before the call.
    pub fn apply(&mut self, sampled: &[SampledToken], events: &mut Vec<Event>) -> Result<()> {
        let step = self.pending.as_ref().expect("apply follows a step");
        assert_eq!(step.sample_rows.len(), sampled.len(), "one sampled token per row");
        let candidates: Vec<Candidate> = step
            .sample_rows
            .iter()
            .zip(sampled)
            .map(|(row, sampled)| Candidate { position: row.position, sampled: *sampled, order: row.order })
            .collect();
        let mut edits = Vec::new();
        let chosen = match step.kind {
            Kind::Denoise => {
                let unmask = self.stage().unmask.clone();
                match self.stage().edit() {
                    None if self.stage().is_joint() => self.first_of_round(&candidates)?,
                    None => sampling::select(&unmask, self.progress, &candidates)?,
                    Some(Edit { bound, .. }) => {
                        // Unmasked and edited tokens of a forward know nothing of each other.
                        let is_masked = |i: &usize| self.canvas.state(candidates[*i].position) == State::Masked;
                        let (masked, unmasked): (Vec<usize>, Vec<usize>) = (0..candidates.len()).partition(is_masked);
                        let current = |i: &usize| (candidates[*i], self.canvas.tokens()[candidates[*i].position]);
                        let unmasked_now: Vec<_> = unmasked.iter().map(current).collect();
                        edits.extend(sampling::edits(bound, &unmasked_now)?.into_iter().map(|i| unmasked[i]));
                        let open: Vec<Candidate> = masked.iter().map(|i| candidates[*i]).collect();
                        let chosen = match open.is_empty() {
                            true => Vec::new(),
                            false => sampling::select(&unmask, self.progress, &open)?,
                        };
                        chosen.into_iter().map(|i| masked[i]).collect()
                    }
                }
            }
            // The one candidate; the selection looks for NaN.
            Kind::Boundary => sampling::select_best(Rank::Left.into(), 1, &candidates)?,
            _ => Vec::new(),
        };
        let step = self.pending.take().expect("checked above");
        let report = self.reports.last_mut().expect("opened with the stage");
        report.rows += step.rows.len();
        if step.guidance > 0.0 {
            report.rows += step.rows.len();
            report.forwards.guide += 1;
        }
        match step.kind {
            Kind::Prefill => {
                report.forwards.prefill += 1;
                self.committed = step.rows.len();
            }
            Kind::Commit => {
                report.forwards.commit += 1;
                self.committed = step.rows.last().map_or(self.committed, |(p, _)| p + 1);
                self.fresh.clear();
            }
            Kind::Score => {
                report.forwards.score += 1;
                let scores: Vec<_> = candidates.iter().map(|c| (c.position, self.score(c.position, Some(c.sampled)))).collect();
                self.scores.extend(scores);
                self.end_score(events);
            }
            Kind::Denoise | Kind::Boundary => {
                report.forwards.denoise += 1;
                report.canvas_positions += self.unit.len();
                self.write(&candidates, &chosen, &edits, events);
                if self.round.is_none() {
                    self.close(!edits.is_empty(), events);
                }
            }
        }
        Ok(())
    }

    fn event(&self, kind: EventKind, step: u32, positions: Vec<usize>, confidence: Vec<f32>) -> Event {
        let tokens = positions.iter().map(|p| self.canvas.tokens()[*p]).collect();
        Event { sample: self.spec.sample, stage: self.stage as u8, block: self.block, step, kind, positions, tokens, confidence }
    }

    fn snapshots(&self, positions: &[usize]) -> Vec<f32> {
        positions.iter().map(|p| self.canvas.confidence(*p)).collect()
    }

    /// Writes the `chosen` candidates into masked positions, and the `edits` over current tokens.
    fn write(&mut self, candidates: &[Candidate], chosen: &[usize], edits: &[usize], events: &mut Vec<Event>) {
        let step = self.denoised;
        self.fresh.clear();
        // Below f32's normal range a probability is still not zero.
        let confidence = |sampled: &SampledToken| sampled.confidence.clamp(f32::MIN_POSITIVE, 1.0);
        for &i in chosen {
            let Candidate { position, sampled, .. } = candidates[i];
            self.canvas.unmask(position, sampled.token, confidence(&sampled), self.stage as u8, step);
            self.log_probs[position] = sampled.log_prob;
            self.fresh.push(position);
        }
        for &i in edits {
            let Candidate { position, sampled, .. } = candidates[i];
            self.canvas.edit(position, sampled.token, confidence(&sampled), self.stage as u8, step);
            self.log_probs[position] = sampled.log_prob;
        }
        self.reports.last_mut().expect("opened with the stage").edited += edits.len();
        let revealed = self.fresh.clone();
        let edited: Vec<usize> = edits.iter().map(|i| candidates[*i].position).collect();
        for (kind, positions) in [(EventKind::Unmask, revealed), (EventKind::Edit, edited)] {
            if !positions.is_empty() {
                let confidence = self.snapshots(&positions);
                events.push(self.event(kind, step, positions, confidence));
            }
        }
    }

    /// What follows once a forward has revealed everything it does, and `edited` tokens or not.
    fn close(&mut self, edited: bool, events: &mut Vec<Event>) {
        let (visibility, kv, step) = (self.stage().visibility(), self.stage().kv(), self.denoised);
        self.denoised += 1;
        self.progress.step += 1;
        let Range { start, end } = self.range(self.block);
        if matches!(visibility, Visibility::BlockCausal(_)) && matches!(kv, KvPolicy::Exact | KvPolicy::Refresh(_) | KvPolicy::Dual) {
            // Everything before the block went through this forward, or an earlier one, in its
            // final form.
            self.committed = self.committed.max(start);
        }
        if self.canvas.masked_in(start..end).next().is_none() && self.is_settled(edited) {
            self.progress.masks_at_start = 0;
            if self.stage == 0 {
                self.check_stop(end.min(self.requested_len));
                if self.canvas.num_masks() == 0 {
                    self.cut(self.requested_len);
                }
            }
            let end = end.min(self.canvas.len());
            let block: Vec<usize> = (start..end).filter(|p| self.canvas.state(*p) == State::Revealed).collect();
            let confidence = self.snapshots(&block);
            events.push(self.event(EventKind::Commit, step, block, confidence));
        }
    }

    /// Whether the block, in which nothing is masked, is finished: at once, or where its tokens may
    /// give way, after the first forward over it that `edited` nothing, or the last that is
    /// allowed.
    fn is_settled(&mut self, edited: bool) -> bool {
        if let Some(Edit { passes, .. }) = self.stage().edit() {
            let (ran, stable) = self.settling.map_or((0, false), |ran| (ran + 1, !edited));
            if ran < passes && !stable {
                self.settling = Some(ran);
                return false;
            }
            self.settling = None;
        }
        true
    }

    /// Drops every position from `len` on.
    fn cut(&mut self, len: usize) {
        if len < self.canvas.len() {
            self.canvas.truncate(len);
            self.fresh.retain(|p| *p < len);
            self.committed = self.committed.min(len);
        }
    }

    /// Ends the draft early where a stop condition holds for the tokens before `end`.
    fn check_stop(&mut self, end: usize) {
        let generated_to_the_end = (self.prompt_len..self.canvas.len()).all(|p| self.canvas.state(p) != State::Fixed);
        if !generated_to_the_end || self.canvas.masked_in(self.prompt_len..end).next().is_some() {
            return;
        }
        let tokens = &self.canvas.tokens()[..end];
        let generated = &tokens[self.prompt_len..];
        let cut = if let Some(at) = generated.iter().position(|t| self.spec.stop.tokens.contains(t)) {
            Some((self.prompt_len + at + 1, Finish::EndOfText))
        } else if let Some(keep) = self.spec.stop.text.as_ref().and_then(|stop| stop(generated)) {
            Some((self.prompt_len + keep.max(1), Finish::StopText))
        } else if let Some(limit) = self.spec.stop.entropy
            && end > ENTROPY_WINDOW
            && unigram_entropy(&tokens[end - ENTROPY_WINDOW..]) < limit
        {
            Some(((end - ENTROPY_WINDOW).max(self.prompt_len + 1), Finish::LowEntropy))
        } else {
            None
        };
        if let Some((len, finish)) = cut {
            self.cut(len);
            self.finish = finish;
        }
    }

    fn open_report(&mut self) {
        let report = StageReport {
            stage: self.stage().clone(),
            forwards: Forwards::default(),
            rows: 0,
            canvas_positions: 0,
            remasked: Vec::new(),
            changed: 0,
            edited: 0,
            ms: 0.0,
            before: Vec::new(),
        };
        self.reports.push(report);
        self.stage_start = self.clock;
    }

    /// The stage has no mask left: final K/V for a stage that wants to reuse it, then the next
    /// stage or the end.
    fn end_stage(&mut self, events: &mut Vec<Event>) {
        let next = self.spec.schedule.stages().get(self.stage + 1).map(Stage::kv);
        if next == Some(KvPolicy::Draft) {
            let len = self.canvas.len();
            let first = match self.stage().visibility() {
                Visibility::BlockCausal(_) => self.committed,
                // Under full visibility the last unmasked tokens changed what every row saw, and a
                // stage without unmasked tokens wrote nothing.
                Visibility::Full if self.committed == len => len,
                Visibility::Full => 0,
            };
            if first < len {
                return self.set_step(Kind::Commit, first..len, Vec::new());
            }
        }
        let report = self.reports.last_mut().expect("opened with the stage");
        report.changed = report.before.iter().filter(|(p, token)| self.canvas.tokens()[*p] != *token).count();
        report.ms = self.clock.saturating_duration_since(self.stage_start).as_secs_f64() * 1e3;
        if self.stage == 0 {
            self.draft = self.canvas.generated().map(|p| self.canvas.tokens()[p]).collect();
        }
        if next.is_none() {
            self.phase = Phase::Finished;
            let generated: Vec<usize> = self.canvas.generated().collect();
            let confidence = self.snapshots(&generated);
            events.push(self.event(EventKind::Done, self.denoised, generated, confidence));
            return;
        }
        let previous = self.stage().clone();
        self.stage += 1;
        self.open_report();
        self.block = 0;
        self.denoised = 0;
        self.scores.clear();
        if self.remask_by().forwards() != ScoringForwards::None {
            self.committed = 0;
            self.phase = Phase::Score { group: 0 };
            return;
        }
        self.scores = self.canvas.generated().map(|p| (p, self.score(p, None))).collect();
        let stage = self.stage();
        // Same weights and visibility as before: blocks before the first mask are still final.
        // Under full visibility none ever is.
        let same = (previous.weights, previous.visibility()) == (stage.weights, stage.visibility());
        let same = same && stage.visibility() != Visibility::Full;
        // A joint sampler's layer has K/V of its own there only where it ran before.
        let same = same && (previous.is_joint() || !stage.is_joint());
        let keep = if same { self.committed } else { 0 };
        self.remask(keep, events);
    }

    /// The remask rule of the current stage, which is not the first.
    fn remask_by(&self) -> &RemaskBy {
        &self.stage().remask.as_ref().expect("later stages remask").by
    }

    /// Score of the token at `position` by the stage's remask rule; the lowest are masked again.
    fn score(&self, position: usize, scored: Option<SampledToken>) -> f64 {
        let (token, snapshot) = (self.canvas.tokens()[position], self.canvas.confidence(position));
        let token = GeneratedToken { position, token, snapshot, unmasked_at: self.canvas.revealed_at(position), scored };
        self.remask_by().score(&token, &|| self.uniforms(0, STAGE_STEP, position).order)
    }

    fn end_score(&mut self, events: &mut Vec<Event>) {
        let Phase::Score { group } = self.phase else { unreachable!("a score step belongs to the score phase") };
        match self.remask_by().forwards() {
            ScoringForwards::HeldOut(groups) if group + 1 < groups.get().min(self.canvas.generated().count()) => {
                self.phase = Phase::Score { group: group + 1 }
            }
            _ => self.remask(0, events),
        }
    }

    /// Masks the lowest scores again and starts denoising. `final_before`: K/V below it is final
    /// under this stage's visibility.
    fn remask(&mut self, final_before: usize, events: &mut Vec<Event>) {
        let ratio = self.stage().remask.as_ref().expect("later stages remask").ratio;
        self.scores.sort_unstable_by_key(|(position, _)| *position);
        let positions = sampling::remask(ratio, &self.scores);
        let score_of = |p: &usize| self.scores[self.scores.binary_search_by_key(p, |s| s.0).expect("scored")].1 as f32;
        let scores = positions.iter().map(score_of).collect();
        events.push(self.event(EventKind::Remask, 0, positions.clone(), scores));
        for &position in &positions {
            let token = self.canvas.tokens()[position];
            self.reports.last_mut().expect("opened with the stage").before.push((position, token));
            self.canvas.remask(position, self.stage as u8);
        }
        let block_len = self.stage().block_len_in(self.canvas.len());
        let first_mask = positions.first().map_or(self.canvas.len(), |p| p / block_len * block_len);
        self.committed = final_before.min(first_mask);
        self.fresh.clear();
        self.since_full = None;
        self.boundary_done = None;
        self.progress.masks_at_start = 0;
        self.reports.last_mut().expect("opened with the stage").remasked = positions;
        self.phase = Phase::Denoise;
    }
}
