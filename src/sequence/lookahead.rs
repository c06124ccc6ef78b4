//! Lookahead: the steps of a sequence that a device may run and sample by itself, since their shape
//! does not depend on what they unmask.
#![forbid(unsafe_code)]

use super::{Sequence, Step};
use crate::backend::{HostReason, RunCanvas, SequenceStep};
use crate::canvas::State;
use crate::plan::{Kind, Visibility};
use crate::sampling::{BlockProgress, Rank, SampledToken, UnmaskStep};
use crate::schedule::{Bans, Eos, KvPolicy, Stage};
use crate::sequence::forwards::{LookaheadJoint, LookaheadStep};
use crate::sequence::report::Stop;

impl Sequence {
    /// The pending step and the ones after it, at most `max`, as far as their rows and counts do
    /// not depend on what is revealed. Errors: why the pending step itself needs the host.
    ///
    /// A joint sampler's passes belong to the step whose forward they follow.
    ///
    /// A copy of the sequence walks ahead and unmasks anything: where a rule counts, only *which*
    /// positions remain is open, and rows of an exact forward do not depend on that. A stop
    /// condition may end the text earlier than planned.
    pub fn look_ahead(&self, max: usize) -> Result<Vec<LookaheadStep>, HostReason> {
        let mut steps_ahead = Vec::new();
        if !self.spec.forced.is_empty() {
            return Err(HostReason::ForcedTokens);
        }
        // The tokens of the first stage are given; the steps of later stages are like any others.
        if !self.spec.draft.is_empty() && self.stage == 0 {
            return Err(HostReason::GivenDraft);
        }
        if self.spec.draws.is_some() {
            return Err(HostReason::InjectedDraws);
        }
        let mut copy = self.clone();
        copy.spec.stop = Stop::default();
        let mut remask = None;
        while steps_ahead.len() < max {
            let Some(step) = copy.pending.clone() else {
                let stage = copy.stage;
                copy.next(&mut Vec::new());
                if copy.stage != stage {
                    // One remask that the device can do: by snapshot, where every later row is
                    // computed whatever is masked.
                    let by_snapshot = copy.stage().remask.as_ref().is_some_and(|remask| remask.by.is_snapshot());
                    if copy.stage != stage + 1
                        || !by_snapshot
                        || copy.stage().visibility() != Visibility::Full
                        || copy.stage().block_len().is_some()
                    {
                        break;
                    }
                    remask = Some(copy.reports.last().expect("opened with the stage").remasked.len());
                }
                if copy.pending.is_none() {
                    break;
                }
                continue;
            };
            // Weights of another model are another forward.
            if step.weights != self.pending.as_ref().map_or(0, |s| s.weights) {
                break;
            }
            let unmask = match copy.device_rule(&step) {
                Ok(unmask) => unmask,
                Err(reason) if steps_ahead.is_empty() => return Err(reason),
                Err(_) => break,
            };
            let draw = step.sample_rows.first().expect("a denoising step samples").draw;
            steps_ahead.push(LookaheadStep {
                part: SequenceStep {
                    remask: remask.take(),
                    stage: copy.stage as u8,
                    block: copy.block as u32,
                    step: copy.denoised,
                    range: copy.unit.clone(),
                    num_sampled: step.sample_rows.len(),
                    logits: copy.logits_rows(),
                    draw,
                    unmask,
                },
                rows: step.rows.iter().map(|(position, _)| *position).collect(),
                visibility: step.visibility,
                len: step.len,
                joint: copy.stage().is_joint().then(|| LookaheadJoint { window: copy.joint_window(), passes: Vec::new() }),
            });
            if !matches!(unmask, UnmaskStep::Best { .. }) {
                break;
            }
            let anything = SampledToken { token: 0, confidence: 0.5, log_prob: 0.0, margin: 0.0, entropy: 0.0 };
            let len = copy.canvas.len();
            if copy.apply(&vec![anything; step.sample_rows.len()], &mut Vec::new()).is_err() {
                break;
            }
            while let Some(pass) = copy.joint_pass() {
                let planned = copy.planned_pass(&pass);
                let step = steps_ahead.last_mut().and_then(|step| step.joint.as_mut()).expect("a round belongs to a joint stage");
                step.passes.push(planned);
                copy.apply_joint(&pass, &vec![anything; pass.sample_rows.len()], &mut Vec::new()).expect("answers without NaN");
            }
            // A last block that was decoded whole is cut.
            if copy.canvas.len() != len {
                break;
            }
        }
        Ok(steps_ahead)
    }

    /// How a device samples the pending `step`, or why it cannot.
    fn device_rule(&self, step: &Step) -> Result<UnmaskStep, HostReason> {
        let stage = self.stage();
        match step.kind {
            Kind::Denoise | Kind::Boundary => {}
            Kind::Score => return Err(HostReason::Scoring),
            Kind::Prefill | Kind::Commit => return Err(HostReason::NothingToSample),
        }
        if stage.shortlist().is_some() {
            return Err(HostReason::Shortlist);
        }
        if stage.bans() != Bans::Every {
            return Err(HostReason::BansFirst);
        }
        if !matches!(stage.kv(), KvPolicy::Exact | KvPolicy::Recompute) {
            return Err(HostReason::KvPolicy);
        }
        // No row is before position 0, so its own holds its logits: the device samples all rows of
        // a step alike.
        if self.logits_rows().are_shifted() && self.canvas.state(0) != State::Fixed {
            return Err(HostReason::FirstPosition);
        }
        for (needs_host, reason) in [
            (step.guidance > 0.0, HostReason::Guidance),
            (step.eos != Eos::Free, HostReason::Eos),
            (stage.edit().is_some(), HostReason::Edit),
        ] {
            if needs_host {
                return Err(reason);
            }
        }
        match step.kind {
            Kind::Boundary => Ok(UnmaskStep::Best { rank: Rank::Left, n: 1 }),
            _ => stage_rule(stage, self.progress),
        }
    }

    /// What a run needs to know of this sequence.
    pub fn run_canvas(&self) -> RunCanvas<'_> {
        RunCanvas { canvas: &self.canvas, seed: self.spec.seed, sample: self.spec.sample }
    }
}

/// The unmask rule of a stage as the device knows it, or why the host samples.
fn stage_rule(stage: &Stage, progress: BlockProgress) -> Result<UnmaskStep, HostReason> {
    let ranking = stage.unmask.ranking();
    if ranking.is_some_and(|ranking| ranking.temperature() > 0.0) {
        return Err(HostReason::OrderTemperature);
    }
    match ranking {
        // The rest of a joint forward's quota is its sampler's.
        Some(ranking) if stage.is_joint() => Ok(UnmaskStep::Best { rank: ranking.rank(), n: 1 }),
        _ => stage.unmask.on_device(progress).ok_or(HostReason::UnmaskRule),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::{Next, SequenceSpec};
    use super::*;
    use crate::plan::LogitsRows;
    use crate::schedule::{Defaults, Schedule};

    fn steps_ahead(stage: &str, given: usize) -> Result<Vec<LookaheadStep>, HostReason> {
        steps_ahead_of(&[stage], given, true)
    }

    fn steps_ahead_of(stages: &[&str], given: usize, shifted: bool) -> Result<Vec<LookaheadStep>, HostReason> {
        let stages: Vec<_> = stages.iter().map(|stage| stage.parse().unwrap()).collect();
        let schedule = Schedule::resolve(&stages, &Defaults::default()).unwrap();
        let fixed = (0..given as u32).map(Some).chain(std::iter::repeat_n(None, 12 - given)).collect();
        let mut sequence = Sequence::new(SequenceSpec {
            fixed,
            mask_id: 99,
            schedule,
            shifted: vec![shifted],
            seed: 0,
            sample: 0,
            stop: Stop::default(),
            separate_commit: false,
            forced: Vec::new(),
            draft: Vec::new(),
            draws: None,
        })
        .unwrap();
        assert_eq!(sequence.next(&mut Vec::new()), Next::Forward);
        sequence.look_ahead(99)
    }

    /// Passes among listed ids, or without bans, are the host's; other passes are the device's.
    #[test]
    fn passes_of_the_hosts_kind_are_not_foreseen() {
        assert!(steps_ahead("block=full,sampler=joint:2", 2).is_ok());
        for (rest, reason) in [("shortlist=8", HostReason::Shortlist), ("bans=first", HostReason::BansFirst)] {
            assert_eq!(steps_ahead(&format!("block=full,sampler=joint:2,{rest}"), 2), Err(reason));
        }
    }

    /// What the host samples, and why.
    #[test]
    fn steps_of_the_host_say_why() {
        for (stage, reason) in [
            ("block=full,visible=canvas,guidance=1", HostReason::Guidance),
            ("block=full,visible=canvas,eos=never", HostReason::Eos),
            ("block=full,visible=canvas,unmask=ancestral:4", HostReason::UnmaskRule),
            ("block=full,visible=canvas,kv=refresh:2", HostReason::KvPolicy),
        ] {
            assert_eq!(steps_ahead_of(&[stage], 2, false), Err(reason), "{stage}");
        }
        // The boundary forward of the second block, which the first step is where nothing is
        // cached.
        assert_eq!(steps_ahead("block=4,unmask=left:2,kv=recompute,eos=never", 4), Err(HostReason::Eos));
        assert_eq!(steps_ahead("block=4,unmask=left:2,kv=recompute", 4).unwrap()[0].part.range, 4..5);
    }

    /// Shifted logits: the row before a position is among the rows of its step, boundary forwards
    /// included.
    #[test]
    fn steps_of_shifted_models_hold_the_rows_that_answer() {
        let full = steps_ahead("block=full,unmask=uniform:3", 2).unwrap();
        assert_eq!(full.iter().map(|s| s.part.num_sampled).collect::<Vec<_>>(), [10, 7, 4, 1]);
        let blocks = steps_ahead("block=4,unmask=left:2", 3).unwrap();
        let parts: Vec<_> = blocks.iter().map(|s| (s.part.range.clone(), s.part.num_sampled, s.rows.clone())).collect();
        assert_eq!(parts[0], (0..4, 1, (0..4).collect()));
        assert_eq!(parts[1], (4..5, 1, (0..4).collect()), "a boundary forward writes the block before it");
        assert_eq!(parts[2], (4..8, 3, (4..8).collect()));
        assert_eq!(blocks.len(), 7);
        for step in full.iter().chain(&blocks) {
            assert!(step.part.logits.are_shifted() && step.rows[0] < step.part.range.end, "{step:?}");
        }
        let host = Err(HostReason::FirstPosition);
        assert_eq!(steps_ahead("block=full,unmask=uniform:3", 0), host, "position 0 is answered by its own row");
    }

    /// Sampled rows and windows of a joint step: those of the forward, then those of its passes.
    fn joint_rows(step: &LookaheadStep) -> (Vec<usize>, Range<usize>) {
        let joint = step.joint.as_ref().expect("a joint stage");
        for (call, pass) in (1..).zip(&joint.passes) {
            assert_eq!((pass.step, pass.block, pass.stage), (step.part.step | call << 20, step.part.block, step.part.stage));
            assert_eq!((&pass.range, pass.unmask, pass.logits), (&step.part.range, step.part.unmask, LogitsRows::Own), "{pass:?}");
        }
        assert!(matches!(step.part.unmask, UnmaskStep::Best { n: 1, .. }));
        (std::iter::once(&step.part).chain(&joint.passes).map(|part| part.num_sampled).collect(), joint.window.clone())
    }

    /// A forward unmasks one of its quota, and every pass after it one of what is left.
    #[test]
    fn passes_of_a_joint_sampler_belong_to_their_forward() {
        let full = steps_ahead("block=full,sampler=joint:3", 2).unwrap();
        let expected = [vec![10, 9, 8], vec![7, 6, 5], vec![4, 3, 2], vec![1]];
        assert_eq!(full.iter().map(joint_rows).collect::<Vec<_>>(), expected.map(|sample_rows| (sample_rows, 0..12)));
        assert!(full.iter().all(|step| step.part.logits.are_shifted() && step.rows.len() == 12));

        // Three of the first block are given: its one mask needs no pass.
        let blocks = steps_ahead_of(&["block=4,unmask=linear:2,sampler=joint"], 3, false).unwrap();
        let found: Vec<_> = blocks.iter().map(|step| (joint_rows(step), step.rows.clone())).collect();
        let expected = [(vec![1], 0..4, 0..4), (vec![4, 3], 4..8, 0..8), (vec![2, 1], 4..8, 4..8), (vec![4, 3], 8..12, 4..12)];
        let expected = expected.map(|(sample_rows, window, rows)| ((sample_rows, window), rows.collect::<Vec<usize>>()));
        assert_eq!(found[..4], expected);
        assert_eq!(found.len(), 5);
    }

    /// A stage without a sampler after one that has it, and a remask in between that the device
    /// does.
    #[test]
    fn joint_and_other_stages_are_foreseen_together() {
        let steps = steps_ahead_of(&["block=4,sampler=joint:4", "block=full,remask=0.5,unmask=uniform:3"], 3, false).unwrap();
        let joint: Vec<_> = steps.iter().map(|step| step.joint.as_ref().map(|joint| joint.passes.len())).collect();
        assert_eq!(joint, [Some(0), Some(3), Some(3), None, None]);
        assert_eq!(steps.iter().map(|step| step.part.remask).collect::<Vec<_>>(), [None, None, None, Some(4), None]);
    }
}
