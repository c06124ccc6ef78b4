//! Where the arrays of a run's steps lie: of each forward, and of the passes of a joint sampler
//! behind it.
//!
//! ```text
//! forward  sequences, canvas places, work list, rows; of the sampled rows, their work list and how far they see
//! sampler  rows that the windows begin as, rows outside, and these as a batch; for each pass: sequences, canvas places, work list, rows, kept rows
//! all      sampled rows, pages, (remask)
//! ```
//! All of a step goes to the step buffers at once. Order and sizes follow from its [`Signature`] up
//! to the pages; what varies otherwise follows them, out of the sight of recorded graphs.
#![forbid(unsafe_code)]

use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

use super::packed_arrays::{PackedArrays, PlanOffsets};
use super::signature::{BatchShape, JointShape, PartShape, Signature, padded};
use super::state::Cuda;
use crate::backend::{HeadShape, PlannedJoint, PlannedPass, RuleSampling, RunCanvas, SequenceStep};
use crate::cuda::ops::sample::DrawRecord;
use crate::cuda::ops::{sample, select_masked};
use crate::plan::Plan;

/// A step that is sampled by rules.
#[derive(Clone, Copy)]
pub(super) struct RuleStep<'a> {
    pub plan: &'a Plan,
    pub sampling: &'a RuleSampling,
}

/// A forward or a pass: where it lies within its step's arrays, and how much each sequence samples.
pub(super) struct PartPlan {
    pub shape: PartShape,
    pub records: usize,
    pub index: usize,
    pub tiles: usize,
    pub offsets: PlanOffsets,
    /// Of `shape.kept`.
    pub kept: usize,
    /// First of its sampled rows among those of the step.
    pub first_sampled: usize,
    /// Sampled positions of each sequence.
    pub counts: Vec<usize>,
}

/// What a sampler takes from a forward.
pub(super) struct JointPlan {
    /// Rows that the windows' states begin as, and how many, padded.
    pub inside: usize,
    pub inside_rows: u32,
    /// Rows outside, and their batch.
    pub outside: usize,
    pub outside_shape: BatchShape,
    pub outside_index: usize,
    pub outside_offsets: PlanOffsets,
}

/// One step in the arena.
pub(super) struct StepPlan {
    /// In the arena.
    pub words: Range<usize>,
    pub signature: Arc<Signature>,
    /// The forward, and after it the passes of a sampler.
    pub parts: Vec<PartPlan>,
    /// The sampled rows, found on the device, of all parts; how far those of the forward see, and
    /// their work list.
    pub sample_rows: usize,
    pub selected_visible: usize,
    pub selected_tiles: usize,
    pub joint: Option<JointPlan>,
    /// A remask before the step.
    pub remask: Option<RemaskOffsets>,
    /// Of all parts, padded.
    pub num_sampled: usize,
    /// First record in the log.
    pub log: usize,
}

/// Offsets and counts of a remask.
#[derive(Clone, Copy)]
pub(super) struct RemaskOffsets {
    pub indptr: usize,
    pub count: usize,
    pub taken: usize,
    pub stage: u8,
}

/// Appends the arrays of one step to the arena. `firsts`: where each sequence begins in the canvas
/// arrays; `log`: the step's first record there.
pub(super) fn lay_out(
    cuda: &Cuda,
    words: &mut PackedArrays,
    heads: HeadShape,
    canvases: &[RunCanvas],
    step: &RuleStep,
    firsts: &[u32],
    log: usize,
) -> StepPlan {
    let (plan, sequences, joint) = (step.plan, &step.sampling.sequences, &step.sampling.joint);
    let start = words.0.len().next_multiple_of(4);
    words.0.resize(start, 0);
    let mut layout = StepLayout { cuda, heads, canvases, firsts, words: PackedArrays::default(), num_sampled: 0 };

    let mut parts = vec![layout.push_part(plan, sequences)];
    // Of the sampled rows only their number is known.
    let num_sampled = parts[0].counts.iter().sum::<usize>();
    let ends: Vec<u32> = offsets(parts[0].counts.iter().map(|count| *count as u32));
    let (selected_shape, selected_list) = cuda.tiles_of(heads, &ends);
    let selected_tiles = layout.words.push(selected_list.as_flattened().iter().copied());
    let selected_visible = layout.words.push(repeat_n(0, padded(num_sampled)));
    let mut joint = joint.as_ref().map(|joint| layout.joint(plan, joint, &mut parts));

    let StepLayout { words: mut own, num_sampled: all_sampled, .. } = layout;
    let sample_rows = own.push(repeat_n(0, all_sampled));
    // Of all sequences in every part, with or without rows.
    let (page_indptr, pages) = (own.push(plan.page_indptr.iter().copied()), own.push(plan.pages.iter().copied()));
    let outside = joint.as_mut().map(|joint| &mut joint.outside_offsets);
    for offsets in parts.iter_mut().map(|part| &mut part.offsets).chain(outside) {
        *offsets = PlanOffsets { page_indptr, pages, ..*offsets };
    }
    // A step with a remask has the signature of one without.
    let remask = sequences.iter().any(|s| s.remask.is_some()).then(|| RemaskOffsets {
        indptr: own.push(firsts.iter().copied()),
        count: own.push(sequences.iter().map(|s| s.remask.unwrap_or(0) as u32)),
        taken: own.push(sequences.iter().map(|_| 0)),
        stage: sequences.iter().find(|s| s.remask.is_some()).expect("one of them").stage,
    });
    words.0.extend(own.0);

    let forward = parts[0].shape;
    let signature = Signature {
        forward,
        selected: BatchShape { rows: forward.num_sampled, ..forward.batch },
        selected_tiles: selected_shape,
        all: num_sampled == plan.num_rows(),
        joint: joint.as_ref().map(|joint| JointShape {
            inside: joint.inside_rows,
            outside: joint.outside_shape,
            passes: parts[1..].iter().map(|part| part.shape).collect(),
        }),
    };
    StepPlan {
        words: start..words.0.len(),
        signature: Arc::new(signature),
        parts,
        sample_rows,
        selected_visible,
        selected_tiles,
        joint,
        remask,
        num_sampled: all_sampled,
        log,
    }
}

/// A step on its way into the arena.
struct StepLayout<'a> {
    cuda: &'a Cuda,
    heads: HeadShape,
    canvases: &'a [RunCanvas<'a>],
    firsts: &'a [u32],
    words: PackedArrays,
    /// Of the parts so far, padded.
    num_sampled: usize,
}

impl StepLayout<'_> {
    /// A forward or a pass over the rows of `plan`.
    fn push_part(&mut self, plan: &Plan, sequences: &[SequenceStep]) -> PartPlan {
        let rows = padded(plan.num_rows());
        let counts: Vec<usize> = sequences.iter().map(|s| s.num_sampled).collect();
        let num_sampled = padded(counts.iter().sum());
        let records = self.records(plan, sequences);
        let index = self.index(plan, rows);
        let (tiles, list) = self.cuda.tiles_of(self.heads, &plan.indptr);
        let nucleus = |s: &SequenceStep| sample::needs_nucleus(&s.draw);
        let mut sampling = sequences.iter().filter(|s| s.num_sampled > 0);
        let shape = PartShape {
            batch: BatchShape::for_plan(plan, rows as u32),
            tiles,
            num_sampled: num_sampled as u32,
            any_fused: sampling.clone().any(|s| !nucleus(s)),
            any_nucleus: sampling.any(nucleus),
            kept: None,
        };
        self.num_sampled += num_sampled;
        PartPlan {
            shape,
            records,
            index,
            tiles: self.words.push(list.as_flattened().iter().copied()),
            offsets: self.words.rows(plan, rows),
            kept: 0,
            first_sampled: self.num_sampled - num_sampled,
            counts,
        }
    }

    /// What a sampler takes from the forward over `plan`; its passes follow the parts.
    fn joint(&mut self, plan: &Plan, joint: &PlannedJoint, parts: &mut Vec<PartPlan>) -> JointPlan {
        let (selected, outside_rows) = (plan.select(&joint.outside), padded(joint.outside.len()));
        let offsets = JointPlan {
            inside: self.rows(&joint.inside),
            inside_rows: padded(joint.inside.len()) as u32,
            outside: self.rows(&joint.outside),
            outside_shape: BatchShape::for_plan(&selected, outside_rows as u32),
            outside_index: self.index(&selected, outside_rows),
            outside_offsets: self.words.rows(&selected, outside_rows),
        };
        let mut before: Option<&PlannedPass> = None;
        for pass in &joint.passes {
            let mut part = self.push_part(&plan.select(&pass.rows), &pass.sequences);
            if let Some(before) = before.filter(|before| before.rows != pass.rows) {
                let kept = |row: &u32| before.rows.binary_search(row).expect("a pass keeps rows of the one before") as u32;
                part.kept = self.rows(&pass.rows.iter().map(kept).collect::<Vec<_>>());
                part.shape.kept = Some(part.shape.batch.rows);
            }
            before = Some(pass);
            parts.push(part);
        }
        offsets
    }

    /// A list of rows. Padding is row 0, and its result is never read.
    fn rows(&mut self, rows: &[u32]) -> usize {
        self.words.push(rows.iter().copied().chain(repeat_n(0, padded(rows.len()) - rows.len())))
    }

    /// Index of each row in the canvas arrays.
    fn index(&mut self, plan: &Plan, rows: usize) -> usize {
        let sequence_of_row = (0..plan.num_sequences()).flat_map(|s| (plan.indptr[s]..plan.indptr[s + 1]).map(move |_| s));
        let offsets: Vec<u32> = sequence_of_row.zip(&plan.positions).map(|(s, p)| self.firsts[s] + p).collect();
        self.words.push(offsets.into_iter().chain(repeat_n(0, rows - plan.num_rows())))
    }

    /// The sequences as `select_masked` and `unmask` know them.
    fn records(&mut self, plan: &Plan, sequences: &[SequenceStep]) -> usize {
        let first_sampled = offsets(sequences.iter().map(|part| part.num_sampled as u32));
        let records: Vec<select_masked::StepRecord> = sequences
            .iter()
            .enumerate()
            .map(|(i, part)| {
                let (row_first, end) = (plan.indptr[i], plan.indptr[i + 1]);
                let first_position = if row_first < end { plan.positions[row_first as usize] } else { 0 };
                let draw = DrawRecord::from(&part.draw);
                let step = select_masked::StepRecord {
                    seed: self.canvases[i].seed,
                    canvas_first: self.firsts[i],
                    range_begin: part.range.start as u32,
                    range_end: part.range.end as u32,
                    row_first,
                    // The position whose logits the first row holds.
                    rows_begin: part.logits.position_of(first_position as usize) as u32,
                    sample_first: first_sampled[i],
                    sample_count: part.num_sampled as u32,
                    sample: self.canvases[i].sample,
                    stage: u32::from(part.stage),
                    block: part.block,
                    step: part.step,
                    temperature: draw.temperature,
                    top_p: draw.top_p,
                    flags: draw.flags,
                    ..select_masked::StepRecord::default()
                };
                step.unmasking(&part.unmask)
            })
            .collect();
        self.words
            .push(records.iter().flat_map(|record| bytemuck::bytes_of(record).as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word))))
    }
}

/// CSR offsets of these lengths.
fn offsets(lengths: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut ends = vec![0];
    lengths.for_each(|len| ends.push(ends[ends.len() - 1] + len));
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_to_few_counts_and_never_below_themselves() {
        assert_eq!([0, 1, 4, 16, 17, 90, 128, 129, 1000].map(padded), [0, 1, 4, 16, 24, 96, 128, 160, 1024]);
        let counts: std::collections::BTreeSet<usize> = (0..=1024).map(padded).collect();
        assert!(counts.len() < 64 && (0..=1024).all(|rows| padded(rows) >= rows));
    }
}
