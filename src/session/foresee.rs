//! Owns foresight: the steps of a session that a device may run and decide by itself, before anybody knows what they reveal.
#![forbid(unsafe_code)]

use super::Session;
use crate::backend::{RunCanvas, SessionStep};
use crate::canvas::State;
use crate::plan::{Kind, Visibility};
use crate::sampling::{self, Decision, Rank, Reveal, Unmask};
use crate::schedule::{Eos, KvPolicy, RemaskBy, Stage};
use crate::session::forwards::{ForeseenJoint, ForeseenStep};
use crate::session::report::Stop;

impl Session {
    /// The pending step and the ones after it, at most `max`, as far as their rows and counts do not depend on what is revealed. Empty
    /// where the pending step itself needs the host: prefill, commits, scoring, injected draws and tokens, K/V policies whose rows
    /// follow the reveals.
    ///
    /// A joint sampler's passes belong to the step whose forward they follow.
    ///
    /// A copy of the session walks ahead and reveals anything: where a rule counts, only *which* positions remain is open, and rows of
    /// an exact forward do not depend on that. A stop condition may end the text earlier than foreseen.
    pub fn foresee(&self, max: usize) -> Vec<ForeseenStep> {
        let mut foreseen = Vec::new();
        if !self.spec.forced.is_empty() || self.spec.draws.is_some() {
            return foreseen;
        }
        let mut ghost = self.clone();
        ghost.spec.stop = Stop::default();
        let mut remask = None;
        while foreseen.len() < max {
            let Some(step) = ghost.pending.clone() else {
                let stage = ghost.stage;
                ghost.next(&mut Vec::new());
                if ghost.stage != stage {
                    // One remask that the device can do: by snapshot, where every later row is computed whatever is masked.
                    let by_snapshot = ghost.stage().remask.is_some_and(|remask| remask.by == RemaskBy::Snapshot);
                    if ghost.stage != stage + 1
                        || !by_snapshot
                        || ghost.stage().visibility() != Visibility::Full
                        || ghost.stage().block_len.is_some()
                    {
                        break;
                    }
                    remask = Some(ghost.reports.last().expect("opened with the stage").remasked.len());
                }
                if ghost.pending.is_none() {
                    break;
                }
                continue;
            };
            let stage = *ghost.stage();
            let kv = matches!(stage.kv, KvPolicy::Exact | KvPolicy::Recompute);
            if stage.hosts_passes() {
                break;
            }
            // Weights of another model are another forward.
            if !matches!(step.kind, Kind::Denoise | Kind::Lead) || !kv || step.weights != self.pending.as_ref().map_or(0, |s| s.weights) {
                break;
            }
            // No row is before position 0, so its own answers it: the device answers all of a step alike.
            let shifted = ghost.shifted();
            if shifted && ghost.canvas.state(0) != State::Fixed {
                break;
            }
            let rule = match step.kind {
                Kind::Lead => Some(Reveal::Best { rank: Rank::Left, n: 1 }),
                _ => device_rule(&stage, ghost.progress),
            };
            let Some(reveal) = rule else { break };
            let draw = step.asks.first().expect("a denoising step asks").draw;
            foreseen.push(ForeseenStep {
                part: SessionStep {
                    remask: remask.take(),
                    stage: ghost.stage as u8,
                    block: ghost.block as u32,
                    step: ghost.denoised,
                    range: ghost.unit.clone(),
                    asks: step.asks.len(),
                    shifted,
                    draw,
                    reveal,
                },
                rows: step.rows.iter().map(|(position, _)| *position).collect(),
                visibility: step.visibility,
                len: step.len,
                joint: stage.joint.then(|| ForeseenJoint { window: ghost.joint_window(), passes: Vec::new() }),
            });
            if !matches!(reveal, Reveal::Best { .. }) {
                break;
            }
            let anything = Decision { token: 0, confidence: 0.5, log_prob: 0.0, margin: 0.0, entropy: 0.0 };
            let len = ghost.canvas.len();
            if ghost.apply(&vec![anything; step.asks.len()], &mut Vec::new()).is_err() {
                break;
            }
            while let Some(ask) = ghost.joint_ask() {
                let pass = ghost.joint_pass(&ask);
                let step = foreseen.last_mut().and_then(|step| step.joint.as_mut()).expect("a round belongs to a joint stage");
                step.passes.push(pass);
                ghost.apply_joint(&ask, &vec![anything; ask.asks.len()], &mut Vec::new()).expect("answers without NaN");
            }
            // A last block that was decoded whole is cut.
            if ghost.canvas.len() != len {
                break;
            }
        }
        foreseen
    }

    /// What a run needs to know of this sequence.
    pub fn run_canvas(&self) -> RunCanvas<'_> {
        RunCanvas { canvas: &self.canvas, seed: self.spec.seed, sample: self.spec.sample }
    }
}

/// The rule of a step as the device knows it; `None` where the host decides.
fn device_rule(stage: &Stage, progress: sampling::BlockProgress) -> Option<Reveal> {
    if stage.order_temperature > 0.0 || stage.guidance > 0.0 || stage.eos != Eos::Free || stage.edit.is_some() {
        return None;
    }
    // The rest of a joint forward's quota is its sampler's.
    let quota = if stage.joint { 1 } else { sampling::quota(&stage.unmask, progress).unwrap_or(1).max(1) };
    match stage.unmask {
        Unmask::Count { rank, .. } | Unmask::Linear { rank, .. } | Unmask::Fixed { rank, .. } | Unmask::Timestep { rank, .. } => {
            Some(Reveal::Best { rank, n: quota })
        }
        Unmask::Threshold(t) => Some(Reveal::Threshold(t)),
        // The least f32 that is above.
        Unmask::Above { bound, .. } if quota == 1 => Some(Reveal::Threshold(bound.next_up())),
        Unmask::EntropyBound(bound) => Some(Reveal::EntropyBound(bound)),
        Unmask::Above { .. } | Unmask::Factor(_) | Unmask::Ancestral { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::{Next, SessionSpec};
    use super::*;
    use crate::schedule::{Defaults, Schedule};

    fn foreseen(stage: &str, given: usize) -> Vec<ForeseenStep> {
        foreseen_of(&[stage], given, true)
    }

    fn foreseen_of(stages: &[&str], given: usize, shifted: bool) -> Vec<ForeseenStep> {
        let stages: Vec<_> = stages.iter().map(|stage| stage.parse().unwrap()).collect();
        let schedule = Schedule::resolve(&stages, &Defaults::default()).unwrap();
        let fixed = (0..given as u32).map(Some).chain(std::iter::repeat_n(None, 12 - given)).collect();
        let mut session = Session::new(SessionSpec {
            fixed,
            mask_id: 99,
            schedule,
            shifted: vec![shifted],
            seed: 0,
            sample: 0,
            stop: Stop::default(),
            separate_commit: false,
            forced: Vec::new(),
            draws: None,
        })
        .unwrap();
        assert_eq!(session.next(&mut Vec::new()), Next::Forward);
        session.foresee(99)
    }

    /// Passes among listed ids, or without bans, are the host's; other passes are the device's.
    #[test]
    fn passes_of_the_hosts_kind_are_not_foreseen() {
        assert!(!foreseen("block=full,sampler=joint:2", 2).is_empty());
        for rest in ["shortlist=8", "bans=first"] {
            assert!(foreseen(&format!("block=full,sampler=joint:2,{rest}"), 2).is_empty(), "{rest}");
        }
    }

    /// Shifted logits: the row before a position is among the rows of its step, leads included.
    #[test]
    fn steps_of_shifted_models_hold_the_rows_that_answer() {
        let full = foreseen("block=full,unmask=uniform:3", 2);
        assert_eq!(full.iter().map(|s| s.part.asks).collect::<Vec<_>>(), [10, 7, 4, 1]);
        let blocks = foreseen("block=4,unmask=left:2", 3);
        let parts: Vec<_> = blocks.iter().map(|s| (s.part.range.clone(), s.part.asks, s.rows.clone())).collect();
        assert_eq!(parts[0], (0..4, 1, (0..4).collect()));
        assert_eq!(parts[1], (4..5, 1, (0..4).collect()), "a lead writes the block before it");
        assert_eq!(parts[2], (4..8, 3, (4..8).collect()));
        assert_eq!(blocks.len(), 7);
        for step in full.iter().chain(&blocks) {
            assert!(step.part.shifted && step.rows[0] < step.part.range.end, "{step:?}");
        }
        assert!(foreseen("block=full,unmask=uniform:3", 0).is_empty(), "position 0 is answered by its own row");
    }

    /// Asks and windows of a joint step: those of the forward, then those of its passes.
    fn joint_asks(step: &ForeseenStep) -> (Vec<usize>, Range<usize>) {
        let joint = step.joint.as_ref().expect("a joint stage");
        for (call, pass) in (1..).zip(&joint.passes) {
            assert_eq!((pass.step, pass.block, pass.stage), (step.part.step | call << 20, step.part.block, step.part.stage));
            assert_eq!((&pass.range, pass.reveal, pass.shifted), (&step.part.range, step.part.reveal, false), "{pass:?}");
        }
        assert!(matches!(step.part.reveal, Reveal::Best { n: 1, .. }));
        (std::iter::once(&step.part).chain(&joint.passes).map(|part| part.asks).collect(), joint.window.clone())
    }

    /// A forward reveals one of its quota, and every pass behind it one of what is left.
    #[test]
    fn passes_of_a_joint_sampler_belong_to_their_forward() {
        let full = foreseen("block=full,sampler=joint:3", 2);
        let expected = [vec![10, 9, 8], vec![7, 6, 5], vec![4, 3, 2], vec![1]];
        assert_eq!(full.iter().map(joint_asks).collect::<Vec<_>>(), expected.map(|asks| (asks, 0..12)));
        assert!(full.iter().all(|step| step.part.shifted && step.rows.len() == 12));

        // Three of the first block are given: its one mask needs no pass.
        let blocks = foreseen_of(&["block=4,unmask=linear:2,sampler=joint"], 3, false);
        let found: Vec<_> = blocks.iter().map(|step| (joint_asks(step), step.rows.clone())).collect();
        let expected = [(vec![1], 0..4, 0..4), (vec![4, 3], 4..8, 0..8), (vec![2, 1], 4..8, 4..8), (vec![4, 3], 8..12, 4..12)];
        let expected = expected.map(|(asks, window, rows)| ((asks, window), rows.collect::<Vec<usize>>()));
        assert_eq!(found[..4], expected);
        assert_eq!(found.len(), 5);
    }

    /// A stage without a sampler behind one that has it, and a remask in between that the device does.
    #[test]
    fn joint_and_other_stages_are_foreseen_together() {
        let steps = foreseen_of(&["block=4,sampler=joint:4", "block=full,remask=0.5,unmask=uniform:3"], 3, false);
        let joint: Vec<_> = steps.iter().map(|step| step.joint.as_ref().map(|joint| joint.passes.len())).collect();
        assert_eq!(joint, [Some(0), Some(3), Some(3), None, None]);
        assert_eq!(steps.iter().map(|step| step.part.remask).collect::<Vec<_>>(), [None, None, None, Some(4), None]);
    }
}
