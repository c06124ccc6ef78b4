//! Owns the joint sampler beside a model: its weights, its layer's place in the K/V store, and what a window of rows carries from call to call.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::Path;

use crate::backend::{Backend, RunDecision};
use crate::engine::joint_steps::LoadedJoint;
use crate::engine::{Active, Engine, Loaded};
use crate::error::{Error, Result};
use crate::model::joint::{Joint, JointState};
use crate::model::{Progress, Scratch};
use crate::pages::PageTable;
use crate::plan::{Plan, Visibility};
use crate::sampling::{Decision, Draw};
use crate::schedule::{Bans, Eos, Schedule};
use crate::session::JointAsk;

/// The windows of a forward, one behind the other in the sampler's state.
pub(super) struct Windows<B: Backend> {
    sessions: Vec<Window>,
    /// Rows of the forward that lie outside of them.
    outside: Plan,
    /// Lists of ids to choose among, those of all sessions that list alike together.
    lists: Vec<B::Lists>,
}

/// The window of a session.
struct Window {
    session: usize,
    rows: usize,
    /// `None`: its positions choose among all ids.
    listed: Option<Listed>,
}

/// Where the lists of a session's masked positions are.
struct Listed {
    /// Among [`Windows::lists`].
    lists: usize,
    /// The list of the first of the positions; the others follow.
    first: u32,
    /// Ascending.
    positions: Vec<usize>,
}

/// How a session's rows are asked: what is banned, and the lists that are chosen from.
type How = (Eos, Bans, Option<usize>);

/// A session's part of the rows that a call of the sampler answers.
struct Part {
    how: How,
    /// Among those of the windows.
    rows: Vec<u32>,
    draws: Vec<Draw>,
    /// The list of each row, where rows have lists.
    which: Vec<u32>,
}

impl<B: Backend> Engine<B> {
    /// Whether the first stage is joint. Errors: a stage is, and there is no sampler for its model, or it could not be defined there.
    pub(super) fn check_joint(&self, schedule: &Schedule) -> Result<bool> {
        for (index, stage) in schedule.stages.iter().enumerate().filter(|(_, stage)| stage.joint) {
            let loaded = &self.models[stage.weights];
            let longest = B::MAX_SHORTLIST;
            if let Some(n) = stage.shortlist.filter(|n| *n > longest && *n < loaded.model.config().vocab_size) {
                return Err(Error::request(format!(
                    "stage {index}: shortlist={n}: {} lists at most {longest} ids, or all of them (shortlist=all)",
                    self.backend.name()
                )));
            }
            if loaded.joint.is_none() {
                return Err(Error::request(format!(
                    "stage {index}: sampler=joint, but no joint sampler is beside model {} (--joint DIR)",
                    stage.weights
                )));
            }
            if loaded.model.config().shift && stage.visibility() != Visibility::Full {
                let what =
                    "sampler=joint with shifted logits needs visible=canvas: the first position of a block is answered outside of it";
                return Err(Error::request(format!("stage {index}: {what}")));
            }
        }
        Ok(schedule.stages.first().is_some_and(|stage| stage.joint))
    }

    /// Takes from the forward that was just run what the sampler needs of it, for those chosen sessions whose reveals are joint.
    pub(super) fn start_joint(&mut self, chosen: &[usize], weights: usize) -> Result<Windows<B>> {
        let mut windows = Windows { sessions: Vec::new(), outside: Plan::new(), lists: Vec::new() };
        if chosen.iter().all(|i| !self.active[*i].session.is_joint()) {
            return Ok(windows);
        }
        let page_size = self.options.page_size;
        let never = super::union(&self.banned, &self.ends.never);
        let Loaded { model, scratch, joint, .. } = &mut self.models[weights];
        let (mut inside, mut outside, mut wanted) = (Vec::new(), Vec::new(), 0);
        // Rows of the windows that are listed alike.
        let mut lists: Vec<((usize, Eos), Vec<u32>)> = Vec::new();
        for &i in chosen {
            let Active { session, table, .. } = &self.active[i];
            let step = session.step().expect("chosen for its step");
            if !session.is_joint() {
                wanted += step.asks.len() as u32;
                continue;
            }
            let window = session.joint_window();
            let listed = session.joint_shortlist().filter(|n| *n < model.config().vocab_size).map(|n| {
                let at = lists.iter().position(|(how, _)| *how == (n, step.eos)).unwrap_or_else(|| {
                    lists.push(((n, step.eos), Vec::new()));
                    lists.len() - 1
                });
                let (rows, before) = (&mut lists[at].1, inside.len());
                let positions: Vec<usize> = step.asks.iter().map(|ask| ask.position).collect();
                let first = rows.len() as u32;
                rows.extend(positions.iter().map(|p| (before + p - window.start) as u32));
                Listed { lists: at, first, positions }
            });
            let row = |position: usize| step.rows.binary_search_by_key(&position, |(p, _)| *p).expect("a row of the forward") as u32;
            inside.extend(window.clone().map(|p| wanted + row(model.answering(p))));
            let rest: Vec<(usize, u32)> = step.rows.iter().copied().filter(|(p, _)| !window.contains(p)).collect();
            outside.extend(rest.iter().map(|(p, _)| wanted + row(*p)));
            windows.outside.push(&rest, table.pages(), page_size, step.visibility, step.len);
            if !window.is_empty() {
                windows.sessions.push(Window { session: i, rows: window.len(), listed });
            }
            wanted += step.rows.len() as u32;
        }
        let joint = joint.as_mut().expect("looked for when the request came");
        joint.sampler.start(&self.backend, model, &inside, scratch, &mut joint.state)?;
        joint.sampler.start(&self.backend, model, &outside, scratch, &mut joint.outside)?;
        for ((n, eos), rows) in &lists {
            // The states are still the model's own rows.
            let banned = if *eos == Eos::Never { &never } else { &self.banned };
            windows.lists.push(joint.sampler.shortlist(&self.backend, model, rows, *n, banned, scratch, &joint.state)?);
        }
        Ok(windows)
    }

    /// The sampler's K/V of finished positions.
    pub(super) fn append_joint(&mut self, windows: &Windows<B>, weights: usize) -> Result<()> {
        if windows.outside.num_rows() == 0 {
            return Ok(());
        }
        let Loaded { model, kv, scratch, joint } = &mut self.models[weights];
        let LoadedJoint { sampler, outside, .. } = joint.as_mut().expect("started");
        sampler.append(&self.backend, model, &windows.outside, kv, scratch, outside)
    }

    /// The sampler's passes until every session has revealed what its forward was to reveal.
    pub(super) fn finish_joint(&mut self, mut windows: Windows<B>, weights: usize) -> Result<()> {
        loop {
            // Sessions that are through leave, and the states of the others move up.
            let (mut asks, mut kept, mut first) = (Vec::new(), Vec::new(), 0);
            windows.sessions.retain(|window| {
                let active = &self.active[window.session];
                let ask = active.session.joint_ask().filter(|_| active.failed.is_none());
                let rows = first..first + window.rows as u32;
                first = rows.end;
                let stays = ask.is_some();
                if let Some(ask) = ask {
                    kept.extend(rows);
                    asks.push(ask);
                }
                stays
            });
            if asks.is_empty() {
                return Ok(());
            }
            let mut plan = Plan::new();
            for (window, ask) in windows.sessions.iter().zip(&asks) {
                let pages = self.active[window.session].table.pages();
                plan.push(&ask.rows, pages, self.options.page_size, ask.visibility, ask.len);
            }
            let backend = &self.backend;
            let Loaded { model, kv, scratch, joint } = &mut self.models[weights];
            let LoadedJoint { sampler, state, .. } = joint.as_mut().expect("started");
            if kept.len() < first as usize {
                sampler.keep(backend, model, &kept, scratch, state)?;
            }
            backend.range("joint", || sampler.call(backend, model, &plan, kv, scratch, state))?;
            let answers = self.joint_answers(weights, &windows, &asks);
            for ((window, ask), answer) in windows.sessions.iter().zip(&asks).zip(answers) {
                self.commit_pass(window.session, ask, answer);
            }
        }
    }

    /// Hands a session the answers of a pass.
    fn commit_pass(&mut self, i: usize, ask: &JointAsk, answer: Result<Vec<Decision>>) {
        let (mut events, len) = (Vec::new(), self.active[i].session.canvas().len());
        let active = &mut self.active[i];
        if let Err(error) = answer.and_then(|decisions| active.session.apply_joint(ask, &decisions, &mut events)) {
            active.failed = Some(error);
            active.session.cancel();
        }
        self.shorten(i, len);
        self.active[i].send(events);
    }

    /// Applies one pass of a run to session `i`, as [`Engine::follow`] does a forward. False where the session leaves the run here.
    pub(super) fn follow_pass(&mut self, i: usize, answer: Result<Vec<RunDecision>>) -> bool {
        let Active { session, failed, .. } = &mut self.active[i];
        let Some(ask) = session.joint_ask() else {
            *failed = Some(Error::kernel("the device ran a pass that the session does not wait for"));
            session.cancel();
            return false;
        };
        let (len, revealed) = (session.canvas().len(), super::chosen_of(&answer));
        self.commit_pass(i, &ask, super::accept(&ask.asks, answer));
        self.stays(i, len, &revealed)
    }

    /// Answers of the sampler's last call, session by session. Those that ask alike are answered together.
    fn joint_answers(&mut self, weights: usize, windows: &Windows<B>, asks: &[JointAsk]) -> Vec<Result<Vec<Decision>>> {
        let mut parts: Vec<Part> = Vec::with_capacity(asks.len());
        let mut first = 0;
        for (window, ask) in windows.sessions.iter().zip(asks) {
            let which = |listed: &Listed| -> Vec<u32> {
                let list = |position| listed.positions.binary_search(&position).expect("masked since the forward") as u32;
                ask.asks.iter().map(|a| listed.first + list(a.position)).collect()
            };
            parts.push(Part {
                how: (ask.eos, ask.bans, window.listed.as_ref().map(|listed| listed.lists)),
                rows: ask.asks.iter().map(|a| first + a.row as u32).collect(),
                draws: ask.asks.iter().map(|a| a.draw).collect(),
                which: window.listed.as_ref().map_or_else(Vec::new, which),
            });
            first += ask.rows.len() as u32;
        }
        let never = super::union(&self.banned, &self.ends.never);
        let Loaded { model, scratch, joint, .. } = &mut self.models[weights];
        let LoadedJoint { sampler, state, .. } = joint.as_ref().expect("started");
        let mut ask = |Part { how: (eos, bans, lists), rows, draws, which }: &Part| {
            if let Some(lists) = lists {
                return sampler.decide_listed(&self.backend, model, rows, draws, (&windows.lists[*lists], which), scratch, state);
            }
            let banned = match (eos, bans) {
                (Eos::Never, Bans::Every) => &never,
                // What the request itself does not want is not drawn by a pass either.
                (Eos::Never, Bans::First) => &self.ends.never,
                (_, Bans::Every) => &self.banned,
                (_, Bans::First) => &Vec::new(),
            };
            sampler.decide(&self.backend, model, rows, draws, banned, scratch, state)
        };
        let mut answers = Vec::with_capacity(asks.len());
        for group in parts.chunk_by(|a, b| a.how == b.how) {
            let all = Part {
                how: group[0].how,
                rows: group.iter().flat_map(|part| part.rows.iter().copied()).collect(),
                draws: group.iter().flat_map(|part| part.draws.iter().copied()).collect(),
                which: group.iter().flat_map(|part| part.which.iter().copied()).collect(),
            };
            match ask(&all) {
                Ok(all) => {
                    let mut rest = all.as_slice();
                    for part in group {
                        let (own, more) = rest.split_at(part.rows.len());
                        answers.push(Ok(own.to_vec()));
                        rest = more;
                    }
                }
                // Found by asking again, one session at a time.
                Err(_) => answers.extend(group.iter().map(&mut ask)),
            }
        }
        answers
    }

    /// Puts the joint sampler in `dir` beside the engine's first model.
    ///
    /// Errors: requests in flight (the K/V store is made anew, with the sampler's layer), and those of [`Joint::load`].
    pub fn attach_joint(&mut self, dir: &Path, progress: Progress) -> Result<()> {
        if self.is_busy() {
            return Err(Error::request("a joint sampler is attached before the first request: requests are in flight"));
        }
        let (num_pages, page_size) = (self.pool.capacity(), self.pool.page_size());
        let Loaded { model, kv, scratch, joint } = &mut self.models[0];
        let (backend, config) = (&self.backend, model.config());
        let sampler = Joint::load(backend, config, dir, progress)?;
        let state = |rows| JointState::new(backend, config, rows);
        *kv = backend.kv_cache(model.kv_shape(num_pages + self.options.spare_pages(), page_size, 1))?;
        // Recordings are known by the scratch that they use, and those made before name the store that is gone.
        *scratch = Scratch::new(backend, config, 16)?;
        *joint = Some(LoadedJoint { sampler, state: state(16)?, outside: state(0)? });
        Ok(())
    }

    /// Logits, before any ban, of the `window` (first and end position) after each call of the attached sampler: `states[0]` is what the model sees, `states[j]`
    /// what call j sees, after another reveal. Positions before the window keep the K/V of their first state.
    ///
    /// Errors: no sampler, states of different lengths, a window outside of them, and those of a forward.
    pub fn joint_logits(&mut self, states: &[Vec<u32>], window: Range<usize>, visibility: Visibility) -> Result<Vec<Vec<f32>>> {
        let len = states.first().map_or(0, Vec::len);
        for tokens in states {
            Self::check_tokens(self.config(), tokens)?;
            if tokens.len() != len || window.is_empty() || window.end > len {
                return Err(Error::request(format!("states of {} and {len} tokens, window {window:?}", tokens.len())));
            }
        }
        self.check_len(len)?;
        let needed = self.pool.pages_for(len);
        if self.models[0].joint.is_none() {
            return Err(Error::request("no joint sampler is attached to the model"));
        }
        if !self.pool.commit(needed) {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let mut table = PageTable::default();
        table.make_writable(&mut self.pool, 0..len);
        let outcome = self.chain(states, window, visibility, &table);
        let freed = table.truncate(&mut self.pool, 0);
        self.pool.uncommit(needed);
        self.poison(&freed);
        outcome
    }

    fn chain(&mut self, states: &[Vec<u32>], window: Range<usize>, visibility: Visibility, table: &PageTable) -> Result<Vec<Vec<f32>>> {
        let page_size = self.options.page_size;
        let plan = |tokens: &[u32], positions: Range<usize>| {
            let mut plan = Plan::new();
            let rows: Vec<(usize, u32)> = positions.map(|p| (p, tokens[p])).collect();
            plan.push(&rows, table.pages(), page_size, visibility, tokens.len());
            plan
        };
        let backend = &self.backend;
        let Loaded { model, kv, scratch, joint } = &mut self.models[0];
        let LoadedJoint { sampler, state, outside } = joint.as_mut().expect("looked at before");
        let len = states[0].len() as u32;
        model.forward(backend, &plan(&states[0], 0..len as usize), &(0..len).collect::<Vec<_>>(), kv, scratch, None)?;
        let answering = |positions: Range<usize>| -> Vec<u32> { positions.map(|p| model.answering(p) as u32).collect() };
        sampler.start(backend, model, &answering(window.clone()), scratch, state)?;
        if window.start > 0 {
            sampler.start(backend, model, &answering(0..window.start), scratch, outside)?;
            sampler.append(backend, model, &plan(&states[0], 0..window.start), kv, scratch, outside)?;
        }
        let mut logits = Vec::new();
        for tokens in &states[1..] {
            sampler.call(backend, model, &plan(tokens, window.clone()), kv, scratch, state)?;
            logits.push(sampler.logits(backend, model, window.len(), state)?);
        }
        Ok(logits)
    }
}
