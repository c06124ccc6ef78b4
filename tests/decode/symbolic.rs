//! A sequence alone, over a network of hashes.
//!
//! Two layers, each with a store of one key per position. A row's output hashes everything it can
//! see, in order, so a run that reads one slot that is stale, missing or written under another
//! visibility takes other tokens from there on.
//!
//! ```text
//! k1[p] = H(token, p)      h1[p] = H(k1[p], k1[0..visible])      k2[p] = H(h1[p])      out[p] = H(h1[p], k2[0..visible])
//! ```

use proptest::prelude::*;
use redraft::canvas::State;
use redraft::plan::{Kind, Visibility};
use redraft::sampling::{Draw, SampledToken, ScoringForwards, Unmask};
use redraft::schedule::{Defaults, KvPolicy, Schedule, Stage};
use redraft::sequence::{Event, EventKind, Finish, Forwards, Next, Sequence, SequenceSpec, StageReport, Step, Stop};

const VOCAB: u64 = 60;
const MASK: u32 = 60;

fn mix(h: u64) -> u64 {
    let h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

fn hash(parts: impl IntoIterator<Item = u64>) -> u64 {
    parts.into_iter().fold(0x9e37_79b9_7f4a_7c15, |h, part| mix(h.rotate_left(5) ^ part).wrapping_add(0x1234_5678_9abc_def1))
}

/// One position's K/V: keys of both layers, and what they were made of.
#[derive(Clone, Copy, Debug)]
struct Slot {
    keys: [u64; 2],
    token: u32,
    visibility: Visibility,
}

/// The stores of one sequence, one for each of two models.
#[derive(Clone, Default)]
struct Network {
    slots: [Vec<Option<Slot>>; 2],
}

impl Network {
    /// Runs a step and samples its rows. `exact`: every slot read must hold the canvas's token,
    /// written under this step's visibility.
    fn forward(&mut self, step: &Step, canvas: &[u32], exact: bool, label: &str) -> Vec<SampledToken> {
        let weights = step.weights as u64;
        let slots = &mut self.slots[step.weights];
        slots.resize(step.len.max(slots.len()), None);
        let mut shown = canvas.to_vec();
        for &(position, token) in &step.rows {
            shown[position] = token;
        }
        for &(p, token) in &step.rows {
            let keys = [hash([1, weights, u64::from(token), p as u64]), 0];
            slots[p] = Some(Slot { keys, token, visibility: step.visibility });
        }
        let see = |slots: &[Option<Slot>], p: usize, layer: usize| -> Vec<u64> {
            (0..step.visibility.end(p, step.len))
                .map(|j| {
                    let slot = slots[j].unwrap_or_else(|| panic!("{label}: row {p} reads slot {j}, which was never written"));
                    if exact {
                        let found = (slot.token, slot.visibility);
                        assert_eq!(found, (shown[j], step.visibility), "{label}: row {p} reads slot {j} of another time");
                    }
                    slot.keys[layer]
                })
                .collect()
        };
        let middle: Vec<u64> =
            step.rows.iter().map(|&(p, token)| hash([2, u64::from(token), p as u64].into_iter().chain(see(slots, p, 0)))).collect();
        for (&(p, _), h1) in step.rows.iter().zip(&middle) {
            slots[p].as_mut().expect("just written").keys[1] = hash([3, *h1]);
        }
        let out = |row: usize| hash([4, middle[row]].into_iter().chain(see(slots, step.rows[row].0, 1)));
        let rows: Vec<(u64, Draw)> = step.sample_rows.iter().map(|row| (out(row.row), row.draw)).collect();
        rows.iter().map(|(out, draw)| sampled(*out, draw)).collect()
    }
}

/// Coarse values, so that ties are common.
fn sampled(out: u64, draw: &Draw) -> SampledToken {
    let token = draw.forced.unwrap_or((hash([5, out, draw.u.to_bits()]) % VOCAB) as u32);
    let eighths = |n: u64| (hash([n, out, u64::from(token)]) % 8) as f32 / 8.0;
    let confidence = eighths(6) + 0.125;
    SampledToken { token, confidence, log_prob: confidence.ln(), margin: eighths(7), entropy: 4.0 * eighths(8) }
}

/// What a run did.
struct Run {
    events: Vec<Event>,
    reports: Vec<StageReport>,
    tokens: Vec<u32>,
    finish: Finish,
}

/// A sequence and a shadow of its canvas that only events may change.
struct Watched {
    sequence: Sequence,
    network: Network,
    fixed: Vec<Option<u32>>,
    shadow: Vec<Option<u32>>,
    snapshots: Vec<f32>,
    stage: usize,
    rows: Vec<usize>,
    forwards: Vec<Forwards>,
    /// Masks that each block of a stage held when the stage began.
    masks: Vec<Vec<usize>>,
    /// Remasked positions of a stage with the tokens they held.
    before: Vec<Vec<(usize, u32)>>,
    /// Scores that scoring forwards of the stage gave.
    scored: Vec<(usize, f64)>,
    exact: bool,
    shifted: bool,
    label: String,
}

/// How to run a case.
#[derive(Clone, Copy, Debug)]
struct How {
    separate_commit: bool,
    /// Take the prompt's blocks from another sequence's store.
    shared_prompt: bool,
}

const PLAIN: How = How { separate_commit: false, shared_prompt: false };

fn spec(case: &Case, schedule: &Schedule, how: How) -> SequenceSpec {
    SequenceSpec {
        fixed: case.fixed.clone(),
        mask_id: MASK,
        schedule: schedule.clone(),
        shifted: vec![case.shifted; 2],
        seed: case.seed,
        sample: 3,
        stop: Stop { tokens: case.stop.into_iter().collect(), ..Stop::default() },
        separate_commit: how.separate_commit,
        forced: Vec::new(),
        draft: Vec::new(),
        draws: None,
    }
}

fn run(case: &Case, schedule: &Schedule, how: How) -> Run {
    let exact = schedule.stages().iter().all(|s| match s.kv() {
        KvPolicy::Refresh(forwards) => forwards.get() == 1,
        kv => matches!(kv, KvPolicy::Exact | KvPolicy::Recompute),
    });
    let mut watched = Watched {
        sequence: Sequence::new(spec(case, schedule, how)).expect("a sequence"),
        network: Network::default(),
        fixed: case.fixed.clone(),
        shadow: case.fixed.clone(),
        snapshots: vec![0.0; case.fixed.len()],
        stage: 0,
        rows: vec![0],
        forwards: vec![Forwards::default()],
        masks: vec![Vec::new()],
        before: vec![Vec::new()],
        scored: Vec::new(),
        exact,
        shifted: case.shifted,
        label: format!("{how:?} {:?}", schedule.stages().iter().map(ToString::to_string).collect::<Vec<_>>()),
    };
    if how.shared_prompt && watched.sequence.wants_prefix() {
        let other = Case { seed: case.seed ^ 1, ..case.clone() };
        let mut donor = Sequence::new(spec(&other, schedule, PLAIN)).expect("a sequence");
        assert_eq!(donor.next(&mut Vec::new()), Next::Forward);
        let step = donor.step().expect("a prefill");
        assert_eq!((step.kind, step.rows.len()), (Kind::Prefill, watched.sequence.prefix_len()));
        watched.network.forward(step, donor.canvas().tokens(), exact, "donor");
        watched.sequence.skip_prefill();
    }
    watched.masks[0] = watched.masks_by_block(&schedule.stages()[0]);
    watched.run(schedule)
}

impl Watched {
    /// Makes the counters of stages up to `stage` exist.
    fn open(&mut self, stage: usize) {
        let stages = self.rows.len().max(stage + 1);
        self.rows.resize(stages, 0);
        self.forwards.resize(stages, Forwards::default());
        self.masks.resize(stages, Vec::new());
        self.before.resize(stages, Vec::new());
    }

    fn masks_by_block(&self, stage: &Stage) -> Vec<usize> {
        let blockwise = matches!(stage.visibility(), Visibility::BlockCausal(_));
        // Where caches are filled for a block, the first one has a boundary forward too.
        let cached = !blockwise && matches!(stage.kv(), KvPolicy::Prefix | KvPolicy::Dual);
        let has_boundary = self.shifted && (blockwise || cached);
        let mut counts = Vec::new();
        for (b, block) in self.shadow[self.origin(stage)..].chunks(stage.block_len_in(self.shadow.len())).enumerate() {
            // A boundary forward costs what a block of one mask costs.
            let mut boundary = usize::from(has_boundary && (b > 0 || cached) && block[0].is_none());
            counts.push(boundary);
            for part in block.chunks(stage.sub_len().unwrap_or(block.len())) {
                counts.push(part.iter().filter(|t| t.is_none()).count() - boundary);
                boundary = 0;
            }
        }
        counts.retain(|n| *n > 0);
        counts
    }

    /// Where block 0 of a stage begins.
    fn origin(&self, stage: &Stage) -> usize {
        if stage.from_prompt() { self.fixed.iter().take_while(|f| f.is_some()).count() } else { 0 }
    }

    fn run(mut self, schedule: &Schedule) -> Run {
        let mut events = Vec::new();
        // Denoising, commit and scoring forwards there can be at most, over all stages.
        let limit = schedule.stages().len() * (3 * self.fixed.len() + 3);
        for forward in 0.. {
            assert!(forward <= limit, "{}: no end after {limit} forwards", self.label);
            let mut new = Vec::new();
            let next = self.sequence.next(&mut new);
            self.follow(&new, schedule);
            events.append(&mut new);
            if next == Next::Finished {
                break;
            }
            let step = self.sequence.step().expect("a forward").clone();
            self.check_step(&step);
            let label = format!("{} stage {} forward {forward}", self.label, self.stage);
            let sampled = self.network.forward(&step, self.sequence.canvas().tokens(), self.exact, &label);
            if step.kind == Kind::Score {
                let stage = &self.sequence.reports().last().expect("a stage").stage;
                let by = stage.remask.as_ref().expect("scored for a remask").by.to_string();
                self.scored.extend(step.sample_rows.iter().zip(&sampled).map(|(row, d)| {
                    let value = match by.split_once(",score=").map(|(_, score)| score) {
                        None => f64::from(d.confidence),
                        Some("typicality") => f64::from(d.log_prob) + f64::from(d.entropy),
                        Some("lift") => f64::from(d.log_prob) - f64::from(self.snapshots[row.position]).ln(),
                        Some(other) => panic!("{label}: score {other}"),
                    };
                    (row.position, value)
                }));
            }
            self.sequence.apply(&sampled, &mut new).unwrap_or_else(|e| panic!("{label}: {e}"));
            self.follow(&new, schedule);
            events.append(&mut new);
            self.check_canvas();
        }
        self.check_end(&events, schedule);
        Run {
            events,
            reports: self.sequence.reports().to_vec(),
            tokens: self.sequence.canvas().tokens().to_vec(),
            finish: self.sequence.finish(),
        }
    }

    /// A step's rows are ascending, hold what the canvas holds (or hide a group that is being
    /// scored), and include every sampled row.
    fn check_step(&mut self, step: &Step) {
        let stage = self.sequence.reports().len() - 1;
        self.stage = stage;
        self.open(stage);
        self.rows[stage] += step.rows.len();
        let label = format!("{} stage {stage} {:?}", self.label, step.kind);
        assert!(step.rows.windows(2).all(|w| w[0].0 < w[1].0), "{label}: rows {:?}", step.rows);
        assert!(!step.rows.is_empty() && step.rows.last().expect("a row").0 < step.len, "{label}: rows {:?}", step.rows);
        assert_eq!(step.len, self.sequence.canvas().len(), "{label}");
        for row in &step.sample_rows {
            // Under shifted logits the row before a position answers it, and the first row itself.
            let answering = if self.shifted { row.position.saturating_sub(1) } else { row.position };
            assert_eq!(step.rows[row.row].0, answering, "{label}: position {} is sampled from another row", row.position);
        }
        let sampled: Vec<usize> = step.sample_rows.iter().map(|a| a.position).collect();
        let hidden: Vec<usize> = step.rows.iter().filter(|(p, token)| *token == MASK && self.shadow[*p].is_some()).map(|r| r.0).collect();
        for &(p, token) in step.rows.iter().filter(|(p, _)| !hidden.contains(p)) {
            assert_eq!(token, self.shadow[p].unwrap_or(MASK), "{label}: token of row {p}");
        }
        let generated = self.generated();
        let counts = &mut self.forwards[stage];
        match step.kind {
            Kind::Prefill => counts.prefill += 1,
            Kind::Denoise | Kind::Boundary => counts.denoise += 1,
            Kind::Commit => counts.commit += 1,
            Kind::Score => {
                counts.score += 1;
                assert!(self.shadow.iter().all(Option::is_some), "{label}: scoring an unfinished text");
                assert_eq!(step.rows.len(), step.len, "{label}: scoring reads everything");
                let by = self.sequence.reports()[stage].stage.remask.as_ref().expect("scored for a remask").by.forwards();
                let group = counts.score - 1;
                let expected: Vec<usize> = match by {
                    ScoringForwards::Visible => generated,
                    ScoringForwards::HeldOut(g) => generated.into_iter().skip(group).step_by(g.get()).collect(),
                    ScoringForwards::None => panic!("{label}: the rule needs no forward"),
                };
                assert_eq!(sampled, expected, "{label}: group {group}");
                assert_eq!(hidden, if by == ScoringForwards::Visible { vec![] } else { expected }, "{label}: group {group}: hidden rows");
                let forced: Vec<_> = step.sample_rows.iter().map(|a| a.draw.forced).collect();
                assert_eq!(forced, sampled.iter().map(|p| self.shadow[*p]).collect::<Vec<_>>(), "{label}: scored tokens");
            }
        }
        if step.kind != Kind::Score {
            assert!(hidden.is_empty(), "{label}: rows {hidden:?} are hidden");
        }
        if step.kind == Kind::Boundary {
            let kv = self.sequence.reports()[stage].stage.kv();
            let block_len = self.sequence.reports()[stage].stage.block_len_in(step.len);
            let last = step.rows.last().expect("a row").0;
            assert!(self.shifted && sampled.len() == 1 && self.shadow[sampled[0]].is_none(), "{label}: samples {sampled:?}");
            if step.visibility == Visibility::Full {
                // The forward that fills the caches of a block computes everything.
                assert!(matches!(kv, KvPolicy::Prefix | KvPolicy::Dual), "{label}: {kv} has no caches to fill");
                assert_eq!(step.rows.len(), step.len, "{label}: it fills everything");
            } else {
                assert!(sampled == [last + 1] && (last + 1).is_multiple_of(block_len), "{label}: samples {sampled:?} of row {last}");
                assert!(step.visibility == Visibility::BlockCausal(block_len), "{label}: the last row of a block sees its block");
            }
            assert!(self.shadow[..sampled[0]].iter().all(Option::is_some), "{label}: a mask before position {}", sampled[0]);
        } else if step.kind == Kind::Denoise {
            assert!(!sampled.is_empty() && sampled.iter().all(|p| self.shadow[*p].is_none()), "{label}: samples {sampled:?}");
            let stage = self.sequence.reports()[stage].stage.clone();
            let (origin, block_len) = (self.origin(&stage), stage.block_len_in(step.len));
            let block = origin + (sampled[0] - origin) / block_len * block_len;
            let part = stage.sub_len().unwrap_or(block_len);
            let first = block + (sampled[0] - block) / part * part;
            let masked = (first..(first + part).min(step.len)).filter(|p| self.shadow[*p].is_none());
            assert_eq!(sampled, masked.collect::<Vec<_>>(), "{label}: every mask of the block is sampled, and nothing else");
            assert!(self.shadow[origin..first].iter().all(Option::is_some), "{label}: a mask before position {first}");
        } else if step.kind != Kind::Score {
            assert!(sampled.is_empty(), "{label}: samples {sampled:?}");
        }
    }

    fn generated(&self) -> Vec<usize> {
        (0..self.shadow.len()).filter(|p| self.fixed[*p].is_none()).collect()
    }

    /// Events are the only way in which the canvas changes, and each is a legal transition.
    fn follow(&mut self, events: &[Event], schedule: &Schedule) {
        for event in events {
            let stage = usize::from(event.stage);
            let label = format!("{} stage {stage} step {} {:?}", self.label, event.step, event.kind);
            assert!(stage < schedule.stages().len() && event.sample == 3, "{label}");
            assert_eq!(event.positions.len(), event.tokens.len(), "{label}");
            assert_eq!(event.positions.len(), event.confidence.len(), "{label}");
            assert!(event.positions.windows(2).all(|w| w[0] < w[1]), "{label}: positions {:?}", event.positions);
            assert!(event.positions.iter().all(|p| self.fixed[*p].is_none()), "{label}: a fixed position in {:?}", event.positions);
            match event.kind {
                EventKind::Unmask => {
                    assert!(!event.positions.is_empty(), "{label}: nothing revealed");
                    for ((p, token), confidence) in event.positions.iter().zip(&event.tokens).zip(&event.confidence) {
                        assert_eq!(self.shadow[*p], None, "{label}: position {p} was not masked");
                        assert!(*token != MASK && *confidence > 0.0 && *confidence <= 1.0, "{label}: {token} at {confidence}");
                        self.shadow[*p] = Some(*token);
                        self.snapshots[*p] = *confidence;
                    }
                }
                EventKind::Edit => panic!("{label}: no stage here edits"),
                EventKind::Remask => self.follow_remask(event, &schedule.stages()[stage], &label),
                EventKind::Commit => {
                    // A block that is finished holds no mask.
                    assert!(event.positions.iter().all(|p| self.shadow[*p].is_some()), "{label}: {:?}", event.positions);
                }
                EventKind::Done => {
                    assert_eq!(event.positions, self.generated()[..event.positions.len()], "{label}");
                    assert!(event.positions.iter().all(|p| self.shadow[*p].is_some()), "{label}: a mask is left");
                }
            }
        }
        // What a stop condition cut off is gone.
        let len = self.sequence.canvas().len();
        self.shadow.truncate(len);
        self.fixed.truncate(len);
    }

    fn follow_remask(&mut self, event: &Event, stage: &Stage, label: &str) {
        let remask = stage.remask.as_ref().expect("a refining stage");
        let generated = self.generated();
        let count = (remask.ratio * generated.len() as f64).floor() as usize;
        assert_eq!(event.positions.len(), count, "{label}: floor({} x {})", remask.ratio, generated.len());
        let index = usize::from(event.stage);
        self.open(index);
        // The lowest scores by (score, position); snapshot scores are those of the unmasked tokens,
        // others those of the scoring forwards.
        let scores: Option<Vec<(f64, usize)>> = match remask.by.value().split(':').next() {
            Some("snapshot") => Some(generated.iter().map(|p| (f64::from(self.snapshots[*p]), *p)).collect()),
            Some("post-hoc" | "held-out") => Some(self.scored.iter().map(|(p, s)| (*s, *p)).collect()),
            Some("random") => None,
            other => panic!("{label}: remask by {other:?}"),
        };
        if let Some(mut scores) = scores {
            assert_eq!(scores.len(), generated.len(), "{label}: every generated position has one score");
            scores.sort_by(|a, b| a.partial_cmp(b).expect("no NaN"));
            let mut lowest: Vec<(usize, f32)> = scores[..count].iter().map(|(s, p)| (*p, *s as f32)).collect();
            lowest.sort_by_key(|(p, _)| *p);
            let found: Vec<(usize, f32)> = event.positions.iter().copied().zip(event.confidence.iter().copied()).collect();
            assert_eq!(found, lowest, "{label}: the lowest scores");
        }
        self.scored.clear();
        for (p, token) in event.positions.iter().zip(&event.tokens) {
            assert_eq!(self.shadow[*p], Some(*token), "{label}: what position {p} held");
            self.before[index].push((*p, *token));
            self.shadow[*p] = None;
        }
        self.masks[index] = self.masks_by_block(stage);
        // The stage's changes are counted at its end; the shadow's are counted here, at its start.
        self.settle(index.wrapping_sub(1));
    }

    /// Checks the report of a stage that has ended.
    fn settle(&mut self, stage: usize) {
        let Some(report) = self.sequence.reports().get(stage) else { return };
        assert_eq!(report.rows, self.rows[stage], "{} stage {stage}: rows", self.label);
        assert_eq!(report.forwards, self.forwards[stage], "{} stage {stage}: forwards", self.label);
        assert_eq!(report.nfe(), report.forwards.denoise, "{} stage {stage}: NFE", self.label);
    }

    fn check_canvas(&self) {
        let canvas = self.sequence.canvas();
        let shown: Vec<u32> = self.shadow.iter().map(|t| t.unwrap_or(MASK)).collect();
        assert_eq!(canvas.tokens(), shown, "{} stage {}: the canvas changed without an event", self.label, self.stage);
        for (p, fixed) in self.fixed.iter().enumerate() {
            assert_eq!(fixed.is_some(), canvas.state(p) == State::Fixed, "{}: position {p}", self.label);
        }
    }

    fn check_end(&mut self, events: &[Event], schedule: &Schedule) {
        let label = self.label.clone();
        let done: Vec<usize> = (0..events.len()).filter(|i| events[*i].kind == EventKind::Done).collect();
        assert_eq!(done, [events.len() - 1], "{label}: one end, and it is last");
        assert_eq!(self.sequence.canvas().num_masks(), 0, "{label}: masks are left");
        assert!(self.sequence.is_finished(), "{label}");
        assert_eq!(self.sequence.reports().len(), schedule.stages().len(), "{label}: stages");
        self.open(schedule.stages().len() - 1);
        for k in 0..schedule.stages().len() {
            self.settle(k);
            let report = &self.sequence.reports()[k];
            let label = format!("{label} stage {k}");
            // The text may have been cut after a stage's masks were counted; then fewer forwards
            // are enough.
            let whole = k > 0 || self.sequence.finish() == Finish::Length;
            let (least, most) = nfe_bounds(&report.stage.unmask, &self.masks[k]);
            assert!(report.nfe() <= most && (!whole || report.nfe() >= least), "{label}: {} forwards, {least} to {most}", report.nfe());
            let groups = match report.stage.remask.as_ref().map(|r| r.by.forwards()) {
                Some(ScoringForwards::Visible) => 1,
                Some(ScoringForwards::HeldOut(g)) => g.get().min(self.generated().len()),
                _ => 0,
            };
            assert_eq!(report.forwards.score, groups, "{label}: scoring forwards");
            assert_eq!(report.forwards.joint, 0, "{label}");
            assert!(report.forwards.prefill <= usize::from(k == 0), "{label}: prefill");
        }
        self.check_changed(events);
    }

    /// Replays the events to count, per stage, the remasked positions that came back different.
    fn check_changed(&self, events: &[Event]) {
        let mut held: Vec<Option<u32>> = vec![None; self.fixed.len()];
        let mut changed = vec![0; self.sequence.reports().len()];
        let mut before: Vec<Option<u32>> = vec![None; self.fixed.len()];
        for event in events {
            let kept = held.len();
            for (p, token) in event.positions.iter().zip(&event.tokens).filter(|(p, _)| **p < kept) {
                match event.kind {
                    EventKind::Unmask => {
                        held[*p] = Some(*token);
                        if let Some(old) = before[*p].take() {
                            changed[usize::from(event.stage)] += usize::from(old != *token);
                        }
                    }
                    EventKind::Edit => held[*p] = Some(*token),
                    EventKind::Remask => before[*p] = held[*p],
                    EventKind::Commit | EventKind::Done => assert_eq!(held[*p], Some(*token), "{}: position {p}", self.label),
                }
            }
        }
        for (k, report) in self.sequence.reports().iter().enumerate() {
            assert_eq!(report.changed, changed[k], "{} stage {k}: changed", self.label);
            assert_eq!(report.remasked, self.before[k].iter().map(|(p, _)| *p).collect::<Vec<_>>(), "{}", self.label);
        }
    }
}

/// Fewest and most denoising forwards of a stage whose blocks start with these masks.
fn nfe_bounds(unmask: &Unmask, masks: &[usize]) -> (usize, usize) {
    let sum = |f: &dyn Fn(usize) -> usize| masks.iter().map(|m| f(*m)).sum::<usize>();
    let text = unmask.to_string();
    let mut parts = text.split([':', ',']);
    let (name, value) = (parts.next().expect("a name"), parts.next().expect("a value"));
    let number = || value.parse::<usize>().expect("a count");
    let steps = parts.find_map(|key| key.strip_prefix("steps=")).map(|steps| steps.parse::<usize>().expect("a count"));
    match (name, steps) {
        ("uniform" | "confidence" | "margin" | "entropy" | "left", _) => (sum(&|m| m.div_ceil(number())), sum(&|m| m.div_ceil(number()))),
        // A step whose quota is empty needs no forward.
        ("linear", _) => (sum(&|m| m.min(number())), sum(&|m| m.min(number()))),
        ("timestep" | "ancestral" | "fixed", _) => (masks.len(), sum(&|m| m.min(number()))),
        ("above", Some(steps)) => (masks.len(), sum(&|m| m.min(steps))),
        ("threshold" | "above" | "factor" | "entropy-bound", _) => (masks.len(), sum(&|m| m)),
        other => panic!("no bounds for {other:?}"),
    }
}

/// One request.
#[derive(Clone, Debug)]
struct Case {
    fixed: Vec<Option<u32>>,
    stages: Vec<String>,
    seed: u64,
    stop: Option<u32>,
    /// Whether the models' logits are shifted.
    shifted: bool,
}

impl Case {
    /// Whether stage k may reuse the K/V of the one before: same weights, and no scoring forward in
    /// between that hides tokens.
    fn may_keep(&self, k: usize) -> bool {
        let weights = |k: usize| self.stages[k].contains("weights=1");
        k > 0 && weights(k) == weights(k - 1) && !self.stages[k].contains("held-out")
    }

    /// The schedule with `kv` of stage k.
    fn schedule(&self, kv: impl Fn(usize) -> String) -> Schedule {
        let specs: Vec<_> = self
            .stages
            .iter()
            .enumerate()
            .map(|(k, s)| format!("{s},kv={}", kv(k)).parse().unwrap_or_else(|e| panic!("{s}: {e}")))
            .collect();
        Schedule::resolve(&specs, &Defaults::default()).unwrap_or_else(|e| panic!("{:?}: {e}", self.stages))
    }
}

fn rank() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("uniform"), Just("confidence"), Just("margin"), Just("entropy"), Just("left")]
}

fn unmask() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => (rank(), 1usize..5).prop_map(|(rank, n)| format!("{rank}:{n}")),
        1 => (rank(), 1usize..9).prop_map(|(rank, steps)| format!("linear:{steps},order={rank}")),
        1 => (rank(), 1usize..9).prop_map(|(rank, steps)| format!("timestep:{steps},order={rank}")),
        1 => (rank(), 1usize..9).prop_map(|(rank, steps)| format!("fixed:{steps},order={rank}")),
        1 => (1usize..9).prop_map(|steps| format!("ancestral:{steps},eps=0.05")),
        1 => (0usize..=8, 1usize..9).prop_map(|(t, steps)| format!("above:{},steps={steps}", t as f32 / 8.0)),
        1 => (0usize..=8).prop_map(|t| format!("above:{}", t as f32 / 8.0)),
        1 => (0usize..5).prop_map(|f| format!("factor:{f}")),
        1 => (1usize..5).prop_map(|n| format!("margin:{n},order_temperature=0.3")),
        1 => (0usize..=8).prop_map(|t| format!("threshold:{}", t as f32 / 8.0)),
        1 => (0usize..9).prop_map(|b| format!("entropy-bound:{b}")),
    ]
}

fn block() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => (1usize..=8).prop_map(|b| format!("block={b},visible=block")),
        1 => (1usize..=8).prop_map(|b| format!("block={b},visible=canvas")),
        1 => (1usize..=8).prop_map(|b| format!("block={b},visible=canvas,from=prompt")),
        1 => (1usize..=4, 1usize..=3).prop_map(|(sub, n)| format!("block={},sub={sub},visible=block", n * sub)),
        2 => Just("block=full".to_string()),
    ]
}

fn by() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just("snapshot".to_string()),
        1 => score().prop_map(|score| format!("post-hoc{score}")),
        1 => (2usize..6, score()).prop_map(|(g, score)| format!("held-out:{g}{score}")),
        1 => Just("random".to_string()),
    ]
}

fn score() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just(""), Just(",score=typicality"), Just(",score=lift")]
}

fn weights() -> impl Strategy<Value = &'static str> {
    prop_oneof![3 => Just(""), 1 => Just(",weights=1")]
}

fn case() -> impl Strategy<Value = Case> {
    let token = 0u32..VOCAB as u32;
    // A prompt, then anything: holes and fixed positions mixed, or holes alone.
    let tail = prop_oneof![
        proptest::collection::vec(proptest::option::weighted(0.3, token.clone()), 1..28),
        (1usize..28).prop_map(|n| vec![None; n]),
    ];
    let fixed = (proptest::collection::vec(token.clone(), 0..14), tail).prop_map(|(prompt, tail)| {
        let mut fixed: Vec<Option<u32>> = prompt.into_iter().map(Some).chain(tail).collect();
        if fixed.iter().all(Option::is_some) {
            fixed.push(None);
        }
        fixed
    });
    let draft = (block(), unmask(), weights()).prop_map(|(block, unmask, weights)| format!("{block},unmask={unmask}{weights}"));
    let ratio = prop_oneof![Just(0.0), Just(1.0), 0.0f64..=1.0];
    let refine = (block(), unmask(), ratio, by(), weights())
        .prop_map(|(block, unmask, ratio, by, weights)| format!("{block},unmask={unmask},remask={ratio},by={by}{weights}"));
    let stages = (draft, proptest::collection::vec(refine, 0..4)).prop_map(|(draft, mut refine)| {
        refine.insert(0, draft);
        refine
    });
    let rest = (any::<u64>(), proptest::option::weighted(0.4, token), any::<bool>());
    (fixed, stages, rest).prop_map(|(fixed, stages, (seed, stop, shifted))| Case { fixed, stages, seed, stop, shifted })
}

fn same(a: &Run, b: &Run, what: &str) -> Result<(), TestCaseError> {
    for (i, (x, y)) in a.events.iter().zip(&b.events).enumerate() {
        prop_assert_eq!(x, y, "{}: event {}, stage {} block {} step {}", what, i, x.stage, x.block, x.step);
    }
    prop_assert_eq!(a.events.len(), b.events.len(), "{}: events", what);
    prop_assert_eq!(&a.tokens, &b.tokens, "{}: tokens", what);
    prop_assert_eq!(a.finish, b.finish, "{}", what);
    Ok(())
}

fn case_of(fixed: &[Option<u32>], stages: &[&str]) -> Case {
    Case { fixed: fixed.to_vec(), stages: stages.iter().map(ToString::to_string).collect(), seed: 0, stop: None, shifted: false }
}

/// A full stage that remasks nothing runs no forward, so the fixed tail behind the last mask of the
/// draft has no K/V yet.
#[test]
fn kv_draft_after_a_full_stage_without_reveals_reads_only_written_slots() {
    let stages = ["block=1,visible=block", "block=1,visible=canvas,remask=0", "block=3,visible=block,remask=1"];
    let case = case_of(&[None, None, Some(0), Some(0)], &stages);
    run(&case, &case.schedule(|k| ["exact", "exact", "draft"][k].into()), PLAIN);
}

/// K/V below the first mask of a `kv=draft` stage is not final for the full stage after it.
#[test]
fn an_exact_full_stage_after_kv_draft_recomputes_every_row() {
    let stages =
        ["block=1,visible=block", "block=1,visible=canvas,remask=1", "block=1,visible=canvas,remask=0", "block=1,visible=canvas,remask=1"];
    let case = case_of(&[Some(0), Some(0), None], &stages);
    let last = |kv: &'static str| run(&case, &case.schedule(|k| ["exact", "draft", "draft", kv][k].into()), PLAIN);
    assert_eq!(last("exact").events, last("recompute").events);
}

/// K/V of other weights are nobody's: a stage of the same visibility with another model starts from
/// nothing.
#[test]
fn a_stage_with_other_weights_keeps_nothing() {
    let stages = ["block=2,visible=block", "block=2,visible=block,remask=0.5,weights=1", "block=2,visible=block,remask=0.5"];
    let case = case_of(&[Some(3), Some(4), Some(5), None, None, None, None, None], &stages);
    let all = |kv: &'static str| run(&case, &case.schedule(|_| kv.into()), PLAIN);
    assert_eq!(all("exact").events, all("recompute").events);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Reuse of K/V changes nothing: the cached run, the fused and the separate commit, a prompt
    /// computed by somebody else and a refresh before every forward all equal recomputing every
    /// visible row every time, event for event.
    #[test]
    fn exact_reuse_equals_recomputing(case in case(), mixed in proptest::collection::vec(0usize..3, 4)) {
        let slow = run(&case, &case.schedule(|_| "recompute".into()), PLAIN);
        let exact = case.schedule(|_| "exact".into());
        let fast = run(&case, &exact, PLAIN);
        same(&fast, &slow, "exact and recompute")?;
        let separate = run(&case, &exact, How { separate_commit: true, ..PLAIN });
        same(&separate, &slow, "separate commit and recompute")?;
        for (k, (fused, separate)) in fast.reports.iter().zip(&separate.reports).enumerate() {
            // The same rows in the same order, cut into more forwards.
            prop_assert_eq!(fused.rows, separate.rows, "stage {}: rows", k);
            prop_assert_eq!(fused.nfe(), separate.nfe(), "stage {}: NFE", k);
            prop_assert_eq!(fused.forwards.commit, 0, "stage {}: a commit of its own", k);
        }
        for (k, (fast, slow)) in fast.reports.iter().zip(&slow.reports).enumerate() {
            prop_assert!(fast.rows <= slow.rows + fast.forwards.prefill * case.fixed.len(), "stage {}: reuse costs rows", k);
        }
        let shared = run(&case, &exact, How { shared_prompt: true, ..PLAIN });
        same(&shared, &slow, "shared prompt and recompute")?;
        prop_assert_eq!(shared.reports[0].forwards.prefill, 0, "the prompt was there already");
        let refreshed = run(&case, &case.schedule(|_| "refresh:1".into()), PLAIN);
        same(&refreshed, &slow, "refresh:1 and recompute")?;
        let mixed = case.schedule(|k| ["exact", "recompute", "refresh:1"][mixed[k]].into());
        same(&run(&case, &mixed, PLAIN), &slow, "mixed policies and recompute")?;
        same(&run(&case, &mixed, How { separate_commit: true, shared_prompt: true }), &slow, "all at once and recompute")?;
    }

    /// Approximate policies keep every invariant but equality: they end, count honestly, touch
    /// nothing they may not, and never read a slot that was never written. (`run` checks all of
    /// it.)
    #[test]
    fn approximate_policies_keep_the_invariants(
        case in case(), kv in proptest::collection::vec((0usize..7, 2usize..6), 4), separate in any::<bool>()
    ) {
        let schedule = case.schedule(|k| match kv[k] {
            (5, _) if !case.stages[k].contains("visible=block") && !case.stages[k].contains("block=full") => "dual".into(),
            (5 | 6, _) if !case.stages[k].contains("visible=block") => "prefix".into(),
            (5 | 6, _) if case.stages[k].contains("sub=") => "dual".into(),
            (0, _) if case.may_keep(k) => "draft".into(),
            (0 | 1, _) => "exact".into(),
            (2, _) => "recompute".into(),
            (_, r) => format!("refresh:{r}"),
        });
        run(&case, &schedule, How { separate_commit: separate, ..PLAIN });
    }

    /// Wherever a stage stands, also between approximate ones, `exact` is the fast form of
    /// `recompute`.
    #[test]
    fn exact_equals_recomputing_between_approximate_stages(case in case(), kv in proptest::collection::vec((0usize..6, 2usize..6), 4)) {
        let schedule = |same: &str| case.schedule(|k| match kv[k] {
            (0 | 1, _) if case.may_keep(k) => "draft".into(),
            (0..=3, _) => same.into(),
            (_, r) => format!("refresh:{r}"),
        });
        same(&run(&case, &schedule("exact"), PLAIN), &run(&case, &schedule("recompute"), PLAIN), "exact and recompute")?;
    }

    /// The same request gives the same run; another seed, somewhere, another one.
    #[test]
    fn a_run_is_a_function_of_the_request(case in case()) {
        let schedule = case.schedule(|_| "exact".into());
        same(&run(&case, &schedule, PLAIN), &run(&case, &schedule, PLAIN), "twice the same")?;
    }

    /// NaN from the network is an error that names a position, and leaves the sequence where it
    /// was: no loop, no half-written step.
    #[test]
    fn nan_is_an_error_and_not_a_loop(case in case(), which in 0usize..3, at in 0usize..20) {
        let schedule = case.schedule(|_| "exact".into());
        let mut sequence = Sequence::new(spec(&case, &schedule, PLAIN)).unwrap();
        let mut network = Network::default();
        let mut events = Vec::new();
        let mut denoised = 0;
        while sequence.next(&mut events) == Next::Forward {
            let step = sequence.step().unwrap().clone();
            let mut sampled = network.forward(&step, sequence.canvas().tokens(), true, "nan");
            let canvas = sequence.canvas().clone();
            if matches!(step.kind, Kind::Denoise | Kind::Boundary) && denoised == at {
                let good = sampled.clone();
                let worst = sampled.last_mut().unwrap();
                *[&mut worst.confidence, &mut worst.margin, &mut worst.entropy][which] = f32::NAN;
                let before = events.clone();
                for _ in 0..3 {
                    let error = sequence.apply(&sampled, &mut events).expect_err("NaN").to_string();
                    let position = step.sample_rows.last().unwrap().position;
                    prop_assert!(error.contains(&format!("position {position}")) && error.contains("NaN"), "{}", error);
                    prop_assert_eq!(sequence.canvas(), &canvas);
                    prop_assert_eq!(sequence.step(), Some(&step));
                    prop_assert_eq!(&events, &before);
                }
                sampled = good;
            }
            denoised += usize::from(matches!(step.kind, Kind::Denoise | Kind::Boundary));
            sequence.apply(&sampled, &mut events).unwrap();
        }
        prop_assert_eq!(sequence.canvas().num_masks(), 0);
    }

    /// Forced tokens are what a left-to-right run writes, whatever the draws say.
    #[test]
    fn forced_tokens_are_written(case in case(), forced in proptest::collection::vec(0u32..VOCAB as u32, 48)) {
        let schedule = case.schedule(|_| "exact".into());
        let mut spec = spec(&case, &schedule, PLAIN);
        spec.stop = Stop::default();
        spec.forced = (0..case.fixed.len()).map(|p| forced[p % forced.len()]).collect();
        let expected: Vec<u32> = case.fixed.iter().zip(&spec.forced).map(|(f, forced)| f.unwrap_or(*forced)).collect();
        let mut sequence = Sequence::new(spec).unwrap();
        let mut network = Network::default();
        while sequence.next(&mut Vec::new()) == Next::Forward {
            let step = sequence.step().unwrap().clone();
            let sampled = network.forward(&step, sequence.canvas().tokens(), true, "forced");
            sequence.apply(&sampled, &mut Vec::new()).unwrap();
        }
        prop_assert_eq!(sequence.canvas().tokens(), expected);
        prop_assert!(sequence.reports().iter().all(|r| r.changed == 0));
    }
}

/// The network of hashes notices what it is there to notice: one stale slot, or one read under
/// another visibility.
#[test]
fn the_symbolic_network_is_sensitive() {
    let case =
        Case { fixed: vec![None; 12], stages: vec!["block=4,visible=block,unmask=left:1".into()], seed: 5, stop: None, shifted: false };
    let schedule = case.schedule(|_| "exact".into());
    let good = run(&case, &schedule, PLAIN).tokens;
    let stale = |damage: &dyn Fn(&mut Network)| {
        let mut sequence = Sequence::new(spec(&case, &schedule, PLAIN)).unwrap();
        let mut network = Network::default();
        let mut forwards = 0;
        while sequence.next(&mut Vec::new()) == Next::Forward {
            let step = sequence.step().unwrap().clone();
            if forwards == 6 {
                damage(&mut network);
            }
            forwards += 1;
            let sampled = network.forward(&step, sequence.canvas().tokens(), false, "damaged");
            sequence.apply(&sampled, &mut Vec::new()).unwrap();
        }
        sequence.canvas().tokens().to_vec()
    };
    assert_eq!(stale(&|_| {}), good);
    // Forward 6 is in the second block: the first block's slots are read and not written any more.
    for layer in 0..2 {
        let other = stale(&|network| network.slots[0][1].as_mut().unwrap().keys[layer] ^= 1);
        assert_eq!((&other[..6], other != good), (&good[..6], true), "layer {layer}");
    }
    let caught = std::panic::catch_unwind(|| {
        let mut network = Network::default();
        let mut sequence = Sequence::new(spec(&case, &schedule, PLAIN)).unwrap();
        sequence.next(&mut Vec::new());
        let mut step = sequence.step().unwrap().clone();
        step.rows.remove(0);
        step.sample_rows.clear();
        network.forward(&step, sequence.canvas().tokens(), false, "missing");
    });
    assert!(caught.unwrap_err().downcast_ref::<String>().unwrap().contains("slot 0, which was never written"));
}

/// What cannot be served is refused before the first forward.
#[test]
fn sequences_without_work_or_with_a_fixed_mask_are_refused() {
    let refuse = |fixed: Vec<Option<u32>>| {
        let case = Case { fixed, stages: vec!["block=4,visible=block".into()], seed: 0, stop: None, shifted: false };
        Sequence::new(spec(&case, &case.schedule(|_| "exact".into()), PLAIN)).err().expect("refused").to_string()
    };
    assert!(refuse(vec![Some(1), Some(2)]).contains("nothing to generate"));
    assert!(refuse(vec![]).contains("nothing to generate"));
    assert!(refuse(vec![Some(1), Some(MASK), None]).contains("position 1"));
    let case = Case { fixed: vec![None; 3], stages: vec!["block=4,visible=block".into()], seed: 0, stop: None, shifted: false };
    let schedule = case.schedule(|_| "exact".into());
    for (forced, draft, name) in [(vec![1, 2], vec![], "forced"), (vec![], vec![1; 4], "draft")] {
        let error = Sequence::new(SequenceSpec { forced, draft, ..spec(&case, &schedule, PLAIN) }).err().expect(name).to_string();
        assert!(error.starts_with(name) && error.contains("3 positions"), "{error}");
    }
}

/// A cancelled sequence stands still where it is.
#[test]
fn a_cancelled_sequence_is_finished() {
    let case = Case { fixed: vec![None; 12], stages: vec!["block=4,visible=block".into()], seed: 5, stop: None, shifted: false };
    let mut sequence = Sequence::new(spec(&case, &case.schedule(|_| "exact".into()), PLAIN)).unwrap();
    let mut events = Vec::new();
    assert_eq!(sequence.next(&mut events), Next::Forward);
    sequence.cancel();
    assert_eq!((sequence.next(&mut events), sequence.finish()), (Next::Finished, Finish::Cancelled));
    assert!(sequence.is_finished() && sequence.step().is_none() && events.is_empty());
    assert_eq!(sequence.canvas().num_masks(), 12);
}
