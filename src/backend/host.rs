//! Steps that the host samples, one at a time, on any backend.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::time::Instant;

use crate::backend::steps::{
    BannedIds, HostRule, HostSampling, HostSequence, PlannedRun, PlannedStep, RowOutcome, Sequences, StepOutcome, StepRows, StepSampling,
    Timing, WindowShortlist,
};
use crate::backend::{
    Backend, Candidates, ForwardBatch, Network, PassBatch, Picked, RowsToSample, StepBatches, StepParts, StepRunner, Windows,
};
use crate::error::Result;
use crate::plan::Plan;
use crate::sampling::{Draw, SampledToken};

/// The runner that samples on the host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostSteps;

impl<B: Backend> StepRunner<B> for HostSteps {
    fn looks_ahead(&self, _backend: &B) -> bool {
        false
    }

    fn run(&mut self, backend: &B, network: &mut dyn Network<B>, run: &PlannedRun, sequences: &mut dyn Sequences) -> Result<()> {
        for PlannedStep { plan, sampling } in &run.steps {
            let StepSampling::Draws(sampling) = sampling else { panic!("steps by rules are a device's") };
            let mut parts = HostParts::new(plan, sampling, run.banned, sequences);
            network.reserve(backend, parts.rows_needed())?;
            network.step(backend, &mut parts)?;
        }
        Ok(())
    }

    fn time(
        &mut self,
        backend: &B,
        network: &mut dyn Network<B>,
        run: &PlannedRun,
        sequences: &mut dyn Sequences,
        runs: usize,
    ) -> Result<Timing> {
        let mut times_ms = Vec::with_capacity(runs);
        for index in 0..=runs {
            let start = Instant::now();
            self.run(backend, network, run, sequences)?;
            times_ms.extend((index > 0).then(|| start.elapsed().as_secs_f64() * 1e3));
        }
        Ok(Timing { times_ms, launches: 1, recorded: false })
    }
}

/// One step that the host samples.
struct HostParts<'a> {
    plan: &'a Plan,
    sampling: &'a HostSampling,
    banned: &'a BannedIds,
    sequences: &'a mut dyn Sequences,
    /// Of each sequence, where its positions choose among a shortlist.
    shortlists_of: Vec<Option<SequenceShortlists>>,
    /// Passes so far.
    passes: usize,
    /// Rows of each sequence in the pass before; those of its window ahead of the first.
    window_rows: Vec<usize>,
    /// What the current pass samples; `None`: the forward is current.
    pass: Option<Vec<Option<HostSequence>>>,
}

/// Where the lists of a sequence's masked positions are.
struct SequenceShortlists {
    /// Among [`Windows::shortlists`].
    lists: usize,
    /// The list of the first of the positions; the others follow.
    first: u32,
    /// Ascending.
    positions: Vec<usize>,
}

/// One sequence's part of the sampled rows, or neighbours' that are sampled together.
#[derive(Clone)]
struct SampleGroup {
    rule: HostRule,
    /// Among [`Windows::shortlists`].
    lists: Option<usize>,
    /// Among the sampled rows.
    rows: Range<usize>,
    /// First of its rows among those of the guide.
    guide: usize,
    draws: Vec<Draw>,
    /// The list of each row, where rows have lists.
    which: Vec<u32>,
}

impl<'a> HostParts<'a> {
    fn new(plan: &'a Plan, sampling: &'a HostSampling, banned: &'a BannedIds, sequences: &'a mut dyn Sequences) -> Self {
        let window = |sequence: &HostSequence| sequence.window.as_ref().map_or(0, |window| window.inside.len());
        let window_rows = sampling.sequences.iter().map(window).collect();
        let shortlists_of = sampling.sequences.iter().map(|_| None).collect();
        HostParts { plan, sampling, banned, sequences, shortlists_of, passes: 0, window_rows, pass: None }
    }

    fn rows_needed(&self) -> StepRows {
        let outside = |sequence: &HostSequence| sequence.window.as_ref().map_or(0, |window| window.outside.len());
        StepRows {
            forward: self.plan.num_rows(),
            inside: self.window_rows.iter().sum(),
            outside: self.sampling.sequences.iter().map(outside).sum(),
        }
    }

    /// The rows of each sequence in the plan.
    fn sequence_rows(&self) -> impl Iterator<Item = (&'a HostSequence, Range<u32>)> {
        let plan = self.plan;
        self.sampling.sequences.iter().enumerate().map(move |(s, sequence)| (sequence, plan.indptr[s]..plan.indptr[s + 1]))
    }

    /// The shortlists that the windows' masked positions will choose from; those of sequences that
    /// list alike are made together.
    fn shortlists(&mut self) -> Vec<WindowShortlist> {
        let mut shortlists: Vec<WindowShortlist> = Vec::new();
        let mut before = 0;
        for (sequence, shortlists_of) in self.sampling.sequences.iter().zip(&mut self.shortlists_of) {
            let Some(window) = &sequence.window else { continue };
            if let Some(n) = window.shortlist {
                let banned = self.banned.ids(sequence.rule.banned);
                let lists = shortlists.iter().position(|list| (list.n, &list.banned[..]) == (n, banned)).unwrap_or_else(|| {
                    shortlists.push(WindowShortlist { rows: Vec::new(), n, banned: banned.to_vec() });
                    shortlists.len() - 1
                });
                let rows = &mut shortlists[lists].rows;
                let start = window.start as usize;
                *shortlists_of = Some(SequenceShortlists { lists, first: rows.len() as u32, positions: sequence.positions.clone() });
                rows.extend(sequence.positions.iter().map(|position| (before + position - start) as u32));
            }
            before += window.inside.len();
        }
        shortlists
    }

    /// Where the hidden rows to sample from lie, sequence by sequence.
    fn parts(&self) -> Vec<(usize, SampleGroup)> {
        let forward = self.sampling.sequences.iter().map(Some);
        let sequence: Vec<Option<&HostSequence>> = match &self.pass {
            None => forward.collect(),
            Some(pass) => pass.iter().map(Option::as_ref).collect(),
        };
        let (mut first, mut guides) = (0, 0);
        let part = |(s, sequence): (usize, Option<&HostSequence>)| {
            let sequence = sequence?;
            let count = sequence.draws.len();
            let (rows, guide) = (first..first + count, guides);
            first += count;
            guides += if sequence.rule.guidance > 0.0 { count } else { 0 };
            let shortlists_of = self.shortlists_of[s].as_ref().filter(|_| self.pass.is_some());
            let which = shortlists_of.map_or_else(Vec::new, |shortlists_of| {
                let list = |p: &usize| shortlists_of.positions.binary_search(p).expect("masked since the forward") as u32;
                sequence.positions.iter().map(|position| shortlists_of.first + list(position)).collect()
            });
            let lists = shortlists_of.map(|shortlists_of| shortlists_of.lists);
            Some((s, SampleGroup { rule: sequence.rule, lists, rows, guide, draws: sequence.draws.clone(), which }))
        };
        sequence.into_iter().enumerate().filter_map(part).collect()
    }
}

impl<B: Backend> StepParts<B> for HostParts<'_> {
    fn begin(&mut self, backend: &B) -> Result<StepBatches<B>> {
        // Where sampling is joint the sampler wants all rows of the sequence, else those that are
        // sampled rows are all that is wanted.
        let (mut picked, mut sample_rows) = (Vec::new(), Vec::new());
        let (mut inside, mut outside, mut outside_rows, mut guided) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut guide_first = 0;
        for (sequence, rows) in self.sequence_rows() {
            let base = picked.len() as u32;
            match &sequence.window {
                None => {
                    sample_rows.extend(base..base + sequence.rows.len() as u32);
                    picked.extend(sequence.rows.iter().map(|row| rows.start + row));
                }
                Some(window) => {
                    sample_rows.extend(sequence.rows.iter().map(|row| base + row));
                    inside.extend(window.inside.iter().map(|row| base + row));
                    outside.extend(window.outside.iter().map(|row| base + row));
                    outside_rows.extend(window.outside.iter().map(|row| rows.start + row));
                    picked.extend(rows.clone());
                }
            }
            if sequence.rule.guidance > 0.0 {
                guided.extend(sequence.rows.iter().map(|row| guide_first + row));
                guide_first += rows.len() as u32;
            }
        }
        let guide = self.sampling.guide.as_ref().map(|plan| forward_batch(backend, plan, &guided)).transpose()?;
        let forward = forward_batch(backend, self.plan, &picked)?;
        let all = sample_rows.len() == picked.len() && sample_rows.iter().zip(0..).all(|(sampled, row)| *sampled == row);
        let sample_rows = if all { None } else { Some(backend.rows(&sample_rows)?) };
        let joint = self.sampling.sequences.iter().any(|sequence| sequence.window.is_some());
        let windows = match joint {
            true => Some(Windows {
                inside: backend.rows(&inside)?,
                outside: backend.rows(&outside)?,
                outside_batch: backend.batch(&self.plan.select(&outside_rows))?,
                shortlists: self.shortlists(),
            }),
            false => None,
        };
        Ok(StepBatches { guide, forward, sample_rows, windows })
    }

    /// A row that cannot be sampled fails its own sequence only.
    fn sample(&mut self, backend: &B, mut sample_rows: RowsToSample<B>) -> Result<()> {
        let parts = self.parts();
        let mut sampled: Vec<Result<Vec<SampledToken>>> = Vec::with_capacity(parts.len());
        let alike = |(_, a): &(usize, SampleGroup), (_, b): &(usize, SampleGroup)| (a.rule, a.lists) == (b.rule, b.lists);
        // Neighbours with equal rules are sampled together.
        for group in parts.chunk_by(alike) {
            let of = |list: fn(&SampleGroup) -> &[u32]| group.iter().flat_map(|(_, part)| list(part).iter().copied()).collect();
            let (first, last) = (&group[0].1, &group[group.len() - 1].1);
            let all = SampleGroup {
                rows: first.rows.start..last.rows.end,
                draws: group.iter().flat_map(|(_, part)| part.draws.iter().copied()).collect(),
                which: of(|part| &part.which),
                ..first.clone()
            };
            match sample_group(backend, &mut sample_rows, self.banned, &all) {
                Ok(all) => {
                    let own = |part: &SampleGroup| part.rows.start - first.rows.start..part.rows.end - first.rows.start;
                    sampled.extend(group.iter().map(|(_, part)| Ok(all[own(part)].to_vec())));
                }
                // Found by sampling again, one sequence at a time.
                Err(_) => sampled.extend(group.iter().map(|(_, part)| sample_group(backend, &mut sample_rows, self.banned, part))),
            }
        }
        let mut outcomes: Vec<Option<Result<Vec<RowOutcome>>>> = self.sampling.sequences.iter().map(|_| None).collect();
        for ((s, _), outcome) in parts.iter().zip(sampled) {
            let sequence = self.pass.as_ref().map_or(Some(&self.sampling.sequences[*s]), |pass| pass[*s].as_ref()).expect("it samples");
            let row = |(position, sampled): (&usize, SampledToken)| RowOutcome { position: *position, sampled, revealed: None };
            outcomes[*s] = Some(outcome.map(|sampled| sequence.positions.iter().zip(sampled).map(row).collect()));
        }
        let pass = self.pass.as_ref().map(|_| self.passes - 1);
        self.sequences.apply(StepOutcome { pass, began: None, sequences: outcomes });
        Ok(())
    }

    fn pass(&mut self, backend: &B) -> Result<Option<PassBatch<B>>> {
        let Some(pass) = self.sequences.next_pass() else { return Ok(None) };
        // Sequences that are through leave, and the states of the others move up.
        let (mut kept, mut sample_rows, mut row, mut first, mut next) = (Vec::new(), Vec::new(), 0, 0, 0);
        for (sequence, rows) in pass.sequences.iter().zip(&mut self.window_rows) {
            if let Some(sequence) = sequence {
                kept.extend(row..row + *rows as u32);
                sample_rows.extend(sequence.rows.iter().map(|row| first + row));
                first += pass.plan.indptr[next + 1] - pass.plan.indptr[next];
                next += 1;
            }
            row += *rows as u32;
            *rows = if sequence.is_some() { *rows } else { 0 };
        }
        let kept = if kept.len() < row as usize { Some(backend.rows(&kept)?) } else { None };
        let batch =
            PassBatch { batch: backend.batch(&pass.plan)?, rows: pass.plan.num_rows(), sample_rows: backend.rows(&sample_rows)?, kept };
        self.pass = Some(pass.sequences);
        self.passes += 1;
        Ok(Some(batch))
    }
}

/// A forward over the rows of `plan`, of which the `picked` ones go through the last layer.
pub(crate) fn forward_batch<B: Backend>(backend: &B, plan: &Plan, picked: &[u32]) -> Result<ForwardBatch<B>> {
    let (batch, rows) = (backend.batch(plan)?, plan.num_rows());
    // Shifted logits may want one row twice, so the count alone does not say that all are wanted.
    let picked = if picked.len() == rows && picked.iter().zip(0..).all(|(picked, row)| *picked == row) {
        Picked::All
    } else if picked.is_empty() {
        Picked::Nothing
    } else {
        Picked::Rows(backend.rows(picked)?, backend.batch(&plan.select(picked))?)
    };
    Ok(ForwardBatch { batch, rows, picked })
}

/// The sampled tokens of a part's rows.
fn sample_group<B: Backend>(
    backend: &B,
    sample_rows: &mut RowsToSample<B>,
    banned: &BannedIds,
    part: &SampleGroup,
) -> Result<Vec<SampledToken>> {
    let SampleGroup { rule, lists, ref rows, guide, ref draws, ref which } = *part;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let RowsToSample { hidden, width, head, bias, guide: guides, ref mut scratch, lists: made } = *sample_rows;
    let [mixed, base] = scratch;
    let list = |rows: Range<usize>| backend.rows(&rows.map(|row| row as u32).collect::<Vec<_>>());
    let mut hidden = hidden;
    if rows.start > 0 || rule.guidance > 0.0 {
        backend.gather(&list(rows.clone())?, width, hidden, mixed)?;
        if rule.guidance > 0.0 {
            let guides = guides.expect("a guided step has a guide");
            backend.gather(&list(guide..guide + rows.len())?, width, guides, base)?;
            // [LLaDA] The published scale counts from 0.
            backend.apply_guidance(rows.len() * width, rule.guidance + 1.0, base, mixed)?;
        }
        hidden = &**mixed;
    }
    if let Some(lists) = lists {
        return backend.sample(hidden, head, bias, Candidates::Shortlists { lists: &made[lists], which }, draws);
    }
    let mut sampled = backend.sample(hidden, head, bias, Candidates::AllBut(banned.ids(rule.banned)), draws)?;
    if rule.ends_last {
        let ends = |token: &SampledToken| banned.last.contains(&token.token);
        // [LLaDA] Tokens first, from everything; then what each is worth where the ends do not
        // count.
        let again = |(draw, token): (&Draw, &SampledToken)| match ends(token) {
            true => Draw { temperature: 0.0, forced: None, ..*draw },
            false => Draw { forced: Some(token.token), ..*draw },
        };
        let again: Vec<Draw> = draws.iter().zip(&sampled).map(again).collect();
        let others = backend.sample(hidden, head, bias, Candidates::AllBut(&banned.never_and_last), &again)?;
        for (token, other) in sampled.iter_mut().zip(others) {
            let (confidence, log_prob) = if ends(token) { (0.0, token.log_prob) } else { (other.confidence, other.log_prob) };
            *token = SampledToken { confidence, log_prob, ..*token };
        }
    }
    Ok(sampled)
}
