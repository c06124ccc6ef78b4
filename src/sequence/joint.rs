//! Rounds of a joint sampler within one forward: the first token is the model's, the
//! others follow one at a time, the sampler in between.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::Sequence;
use crate::backend::SequenceStep;
use crate::error::Result;
use crate::plan::{Kind, LogitsRows, Visibility};
use crate::sampling::{self, Candidate, Ranking, SampledToken, UnmaskStep};
use crate::sequence::forwards::{JointPass, Round, SampleRow};
use crate::sequence::report::Event;

/// Where a sampler's calls begin among the bits of a draw's step.
const CALL_BITS: u32 = 20;

impl Sequence {
    /// Whether the pending step belongs to a stage that samples jointly: all of its rows are
    /// wanted.
    pub fn is_joint(&self) -> bool {
        self.stage().is_joint() && self.pending.as_ref().is_some_and(|step| step.kind != Kind::Score)
    }

    /// Ids among which the sampler's calls after the pending step choose at each sampled position;
    /// `None`: all of them, or it makes no call.
    pub fn joint_shortlist(&self) -> Option<usize> {
        let step = self.pending.as_ref().filter(|step| step.kind == Kind::Denoise)?;
        self.stage().shortlist().filter(|_| self.round_quota(step.sample_rows.len()) > 1)
    }

    /// Positions whose states the sampler carries on after the pending step: its block, or under
    /// full visibility everything. Empty where the step unmasks nothing.
    pub fn joint_window(&self) -> Range<usize> {
        match self.pending.as_ref().map(|step| step.kind) {
            Some(Kind::Denoise) => self.window(),
            _ => 0..0,
        }
    }

    fn window(&self) -> Range<usize> {
        match self.stage().visibility() {
            Visibility::BlockCausal(_) => self.range(self.block),
            _ => 0..self.canvas.len(),
        }
    }

    /// The first token of a forward, of its quota; the others are up to the sampler.
    pub(super) fn first_of_round(&mut self, candidates: &[Candidate]) -> Result<Vec<usize>> {
        let quota = self.round_quota(candidates.len());
        let chosen = self.select_one(candidates)?;
        self.round = Some(Round { left: quota - 1, calls: 0 }).filter(|round| round.left > 0);
        Ok(chosen)
    }

    /// Tokens unmasked by a forward that samples `num_sampled` positions.
    fn round_quota(&self, num_sampled: usize) -> usize {
        self.stage().unmask.quota(self.progress).unwrap_or(1).clamp(1, num_sampled.max(1))
    }

    fn select_one(&self, candidates: &[Candidate]) -> Result<Vec<usize>> {
        sampling::select_best(self.ranking(), 1, candidates)
    }

    fn ranking(&self) -> Ranking {
        self.stage().unmask.ranking().expect("checked with the schedule")
    }

    /// The step that keys the draws of a round's next call.
    fn call_step(&self, round: Round) -> u32 {
        self.denoised | (round.calls + 1) << CALL_BITS
    }

    /// `pass` as a device runs it.
    pub(super) fn planned_pass(&self, pass: &JointPass) -> SequenceStep {
        let round = self.round.expect("a pass belongs to a round");
        SequenceStep {
            remask: None,
            stage: self.stage as u8,
            block: self.block as u32,
            step: self.call_step(round),
            range: self.unit.clone(),
            num_sampled: pass.sample_rows.len(),
            // A state belongs to its own position, whichever row it began as.
            logits: LogitsRows::Own,
            draw: pass.sample_rows.first().expect("a quota never exceeds the masks").draw,
            unmask: UnmaskStep::Best { rank: self.ranking().rank(), n: 1 },
        }
    }

    /// The next call of the sampler that this sequence waits for.
    pub fn joint_pass(&self) -> Option<JointPass> {
        let round = self.round?;
        let window = self.window();
        let step = self.call_step(round);
        let pass = |position: usize| {
            let draws = self.uniforms(self.block, step, position);
            let forced = self.forced(position);
            SampleRow { row: position - window.start, position, draw: self.draw(draws.token, forced), order: draws.order }
        };
        let sample_rows = self.canvas.masked_in(self.unit.clone()).map(pass).collect();
        let rows = window.clone().map(|p| (p, self.canvas.tokens()[p])).collect();
        let (eos, bans) = (self.stage().eos, self.stage().bans());
        Some(JointPass { rows, sample_rows, visibility: self.stage().visibility(), len: self.canvas.len(), eos, bans })
    }

    /// Takes the sampled tokens of [`Sequence::joint_pass`], in the order of its rows.
    pub fn apply_joint(&mut self, pass: &JointPass, sampled: &[SampledToken], events: &mut Vec<Event>) -> Result<()> {
        let candidates: Vec<Candidate> = pass
            .sample_rows
            .iter()
            .zip(sampled)
            .map(|(row, sampled)| Candidate { position: row.position, sampled: *sampled, order: row.order })
            .collect();
        let mut chosen = self.select_one(&candidates)?;
        // MASK may be drawn where it is not banned: the position stays as it is, and the token is
        // spent.
        chosen.retain(|i| candidates[*i].sampled.token != self.spec.mask_id);
        let report = self.reports.last_mut().expect("opened with the stage");
        report.rows += pass.rows.len();
        report.forwards.joint += 1;
        self.write(&candidates, &chosen, &[], events);
        let round = self.round.expect("a pass belongs to a round");
        self.round = Some(Round { left: round.left - 1, calls: round.calls + 1 }).filter(|round| round.left > 0);
        if self.round.is_none() {
            self.close(false, events);
        }
        Ok(())
    }
}
