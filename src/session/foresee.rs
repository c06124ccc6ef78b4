//! Owns foresight: the steps of a session that a device may run and decide by itself, before anybody knows what they reveal.
#![forbid(unsafe_code)]

use super::{Session, Stop};
use crate::backend::{Decision, Reveal, RunCanvas, SessionStep};
use crate::canvas::State;
use crate::plan::{Kind, Visibility};
use crate::policy;
use crate::schedule::{Eos, KvPolicy, Rank, RemaskBy, Stage, Unmask};

/// A step as far as it is known before the ones in front of it are decided.
#[derive(Clone, Debug, PartialEq)]
pub struct ForeseenStep {
    pub part: SessionStep,
    /// Positions of its rows, ascending.
    pub rows: Vec<usize>,
    pub visibility: Visibility,
    pub len: usize,
}

impl Session {
    /// The pending step and the ones after it, at most `max`, as far as their rows and counts do not depend on what is revealed. Empty
    /// where the pending step itself needs the host: prefill, commits, scoring, injected draws and tokens, K/V policies whose rows
    /// follow the reveals.
    ///
    /// A copy of the session walks ahead and reveals anything: where a rule counts, only *which* positions remain is open, and rows of
    /// an exact forward do not depend on that. A stop condition may end the text earlier than foreseen.
    pub fn foresee(&self, max: usize) -> Vec<ForeseenStep> {
        let mut foreseen = Vec::new();
        if !self.spec.forced.is_empty() || self.spec.draws.is_some() || self.spec.schedule.stages.iter().any(|stage| stage.joint) {
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
            });
            if !matches!(reveal, Reveal::Best { .. }) {
                break;
            }
            let anything = Decision { token: 0, confidence: 0.5, log_prob: 0.0, margin: 0.0, entropy: 0.0 };
            let len = ghost.canvas.len();
            if ghost.apply(&vec![anything; step.asks.len()], &mut Vec::new()).is_err() {
                break;
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
fn device_rule(stage: &Stage, progress: policy::BlockProgress) -> Option<Reveal> {
    if stage.order_temperature > 0.0 || stage.guidance > 0.0 || stage.eos != Eos::Free || stage.edit.is_some() {
        return None;
    }
    let quota = policy::quota(&stage.unmask, progress).unwrap_or(1).max(1);
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
    use super::super::{Next, SessionSpec};
    use super::*;
    use crate::schedule::{Defaults, Schedule};

    fn foreseen(stage: &str, given: usize) -> Vec<ForeseenStep> {
        let schedule = Schedule::resolve(&[stage.parse().unwrap()], &Defaults::default()).unwrap();
        let fixed = (0..given as u32).map(Some).chain(std::iter::repeat_n(None, 12 - given)).collect();
        let mut session = Session::new(SessionSpec {
            fixed,
            mask_id: 99,
            schedule,
            shifted: vec![true],
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
}
