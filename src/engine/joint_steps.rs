//! The joint sampler of a loaded model, and what it does in the steps of a run, as data.
#![forbid(unsafe_code)]

use crate::backend::{Backend, PlannedJoint, PlannedPass, SequenceStep};
use crate::model::joint::{Joint, JointState};
use crate::model::step::Sampler;
use crate::plan::{LogitsRows, Plan};
use crate::sequence::{LookaheadJoint, LookaheadStep};

/// A sampler and its states.
pub(crate) struct LoadedJoint<B: Backend> {
    pub(super) sampler: Joint<B>,
    /// Of the windows.
    pub(super) state: JointState<B>,
    /// Of rows outside them.
    pub(super) outside: JointState<B>,
}

impl<B: Backend> LoadedJoint<B> {
    /// As the model's steps take it.
    pub(super) fn sampler(&mut self) -> Sampler<'_, B> {
        let LoadedJoint { sampler, state, outside } = self;
        Sampler { sampler, state, outside }
    }
}

/// What the sampler does after a planned forward over `plan`: `None` where no sequence samples
/// are joint. `logits` are the model's.
pub(super) fn planned_joint(plan: &Plan, steps: &[&LookaheadStep], logits: LogitsRows) -> Option<PlannedJoint> {
    if steps.iter().all(|step| step.joint.is_none()) {
        return None;
    }
    let row = |s: usize, position: usize| plan.indptr[s] + steps[s].rows.binary_search(&position).expect("a row of the forward") as u32;
    let joint = || steps.iter().enumerate().filter_map(|(s, step)| step.joint.as_ref().map(|joint| (s, joint)));
    let num_passes = joint().map(|(_, joint)| joint.passes.len()).max().unwrap_or(0);
    let windows = |pass: usize| joint().filter(move |(_, joint)| pass < joint.passes.len()).map(|(s, joint)| (s, joint.window.clone()));
    let pass = |index: usize| PlannedPass {
        rows: windows(index).flat_map(|(s, window)| window.map(move |p| row(s, p))).collect(),
        sequences: steps
            .iter()
            .map(|step| match step.joint.as_ref().and_then(|joint| joint.passes.get(index)) {
                Some(pass) => pass.clone(),
                None => SequenceStep { remask: None, range: 0..0, num_sampled: 0, ..step.part.clone() },
            })
            .collect(),
    };
    let outside = |(s, joint): (usize, &LookaheadJoint)| {
        steps[s].rows.iter().filter(|p| !joint.window.contains(p)).map(|p| row(s, *p)).collect::<Vec<u32>>()
    };
    Some(PlannedJoint {
        inside: windows(0).flat_map(|(s, window)| window.map(|p| row(s, logits.logits_row_for(p))).collect::<Vec<u32>>()).collect(),
        outside: joint().flat_map(outside).collect(),
        passes: (0..num_passes).map(pass).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::plan::Visibility;
    use crate::sampling::{Draw, Rank, TopPRule, UnmaskStep};

    fn sampling(num_sampled: usize, range: Range<usize>) -> SequenceStep {
        let draw = Draw {
            u: 0.0,
            temperature: 1.0,
            top_p: 1.0,
            top_p_rule: TopPRule::Within,
            top_k: None,
            forced: None,
            truncated_confidence: false,
        };
        let unmask = UnmaskStep::Best { rank: Rank::Entropy, n: 1 };
        SequenceStep { remask: None, stage: 0, block: 0, step: 0, range, num_sampled, logits: LogitsRows::Own, draw, unmask }
    }

    /// A block after the one before it, a neighbour without a sampler, and a whole canvas of
    /// shifted logits that is through after one pass.
    #[test]
    fn rows_of_windows_are_rows_of_the_forward() {
        let step = |rows: Range<usize>, joint: Option<(Range<usize>, usize)>| LookaheadStep {
            part: sampling(3, rows.clone()),
            rows: rows.clone().collect(),
            visibility: Visibility::Full,
            len: 8,
            joint: joint.map(|(window, passes)| LookaheadJoint {
                window: window.clone(),
                passes: (0..passes).map(|pass| sampling(2 - pass, window.clone())).collect(),
            }),
        };
        let steps = [step(2..8, Some((4..8, 2))), step(0..3, None), step(0..3, Some((0..3, 1)))];
        let mut plan = Plan::new();
        for step in &steps {
            let rows: Vec<(usize, u32)> = step.rows.iter().map(|p| (*p, 0)).collect();
            plan.push(&rows, &[0, 1], 4, step.visibility, step.len);
        }
        let joint = planned_joint(&plan, &steps.each_ref(), LogitsRows::Before).expect("two of them are joint");
        assert_eq!(joint.inside, [1, 2, 3, 4, 9, 9, 10], "position p is predicted by row p - 1, and 0 by itself");
        assert_eq!(joint.outside, [0, 1]);
        let rows: Vec<&[u32]> = joint.passes.iter().map(|pass| pass.rows.as_slice()).collect();
        assert_eq!(rows, [&[2, 3, 4, 5, 9, 10, 11][..], &[2, 3, 4, 5]]);
        let num_sampled: Vec<Vec<usize>> = joint.passes.iter().map(|pass| pass.sequences.iter().map(|s| s.num_sampled).collect()).collect();
        assert_eq!(num_sampled, [[2, 0, 2], [1, 0, 0]]);
        assert_eq!(planned_joint(&plan, &[&steps[1]], LogitsRows::Own), None);
    }
}
