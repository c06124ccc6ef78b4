//! The one place that knows everyone: [`Engine::tick`] batches, plans, runs the forward, decides, commits and streams.
//!
//! Requests are submitted at any time and come back through their [`Handle`]: events as they happen, then one [`Output`].
//! Requests of different lengths, schedules and stages share forwards. The engine prints nothing, starts no thread of its own
//! (the backend may), and holds memory for admitted requests only.
#![forbid(unsafe_code)]

mod joint;
mod joint_steps;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use crate::backend::{Backend, RunDecision, RunSpec, RunStep};
use crate::batcher::{self, Budget, Need};
use crate::canvas::State;
use crate::config::{Attention, ModelConfig};
use crate::error::{Error, Result};
use crate::model::registry;
use crate::model::{Model, Progress, Scratch};
use crate::pages::{PagePool, PageTable, PrefixKey, PrefixState};
use crate::plan::Plan;
use crate::request::{Handle, Output, Prompt, Request, Segment, Timings};
use crate::request::{Message, stop_at};
use crate::sampling::{Decision, Draw, TopKOrder, top_k_of};
use crate::schedule::{Defaults, Eos, Scope};
use crate::session::{Ask, Event, EventKind, ForeseenStep, Next, Session, SessionSpec, Stop};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Steps of a run that is decided on the device: of a request's first, which somebody waits for, and at most. Sixteen block-4 steps are
/// four blocks; the wait that a longer run would save is already below a tenth of its time.
const FIRST_RUN: usize = 4;
const LONGEST_RUN: usize = 16;

/// Habits of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    pub budget: Budget,
    /// K/V pages in the pool; `None` makes room for `budget.max_sessions` sequences of the model's length.
    pub kv_pages: Option<usize>,
    /// Positions per page.
    pub page_size: usize,
    /// Fill freed pages with NaN, so that a read of a stale slot shows (tests).
    pub poison_freed_pages: bool,
    /// Use this one instead of reading the directory's `tokenizer.json`.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

impl Default for EngineOptions {
    /// 512 rows a forward, 8 sessions, pages of 16.
    fn default() -> Self {
        EngineOptions {
            budget: Budget { max_rows: 512, max_sessions: 8 },
            kv_pages: None,
            page_size: 16,
            poison_freed_pages: false,
            tokenizer: None,
        }
    }
}

impl EngineOptions {
    /// Pages of a K/V store beyond those of the pool: one that is never written, and so holds NaN,
    /// where freed pages take its place.
    fn spare_pages(&self) -> usize {
        usize::from(self.poison_freed_pages)
    }
}

struct Active {
    id: u64,
    session: Session,
    table: PageTable,
    committed_pages: usize,
    prefix: Option<PrefixKey>,
    messages: Sender<Message>,
    cancel: Arc<AtomicBool>,
    submitted: Instant,
    admitted: Instant,
    timings: Timings,
    failed: Option<Error>,
}

/// One model with its own K/V store; page numbers mean the same in all of them.
pub(crate) struct Loaded<B: Backend> {
    pub(crate) model: Model<B>,
    pub(crate) kv: B::KvCache,
    pub(crate) scratch: Scratch<B>,
    pub(crate) joint: Option<joint_steps::LoadedJoint<B>>,
}

impl<B: Backend> Loaded<B> {
    fn new(backend: &B, model: Model<B>, pool: &PagePool, options: &EngineOptions) -> Result<Loaded<B>> {
        let (num_pages, page_size) = (pool.capacity(), pool.page_size());
        let bytes = model.config().kv_bytes_per_token(backend.dtype().bytes()).checked_mul(num_pages * page_size);
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize / 4) {
            return Err(Error::request(format!("{num_pages} K/V pages of {page_size} positions are more than can be addressed")));
        }
        let kv = backend.kv_cache(model.kv_shape(num_pages + options.spare_pages(), page_size, 0))?;
        let scratch = Scratch::new(backend, model.config(), 16)?;
        Ok(Loaded { model, kv, scratch, joint: None })
    }
}

/// What [`Eos`] is about. LLaDA (appendix B.4) bans the end of text alone, and holds back the end of a turn too.
struct Ends {
    /// Never drawn under [`Eos::Never`]: the end of text.
    never: Vec<u32>,
    /// Confidence 0 under [`Eos::Last`]: everything that ends a text, and the end of a turn.
    last: Vec<u32>,
}

/// A session's part of the rows that decide, and how they are asked.
#[derive(Clone)]
struct Part {
    /// Among the wanted rows of the forward.
    rows: Vec<u32>,
    /// Among all draws.
    draws: Range<usize>,
    /// First of its rows among those kept for guidance.
    guide: usize,
    eos: Eos,
    guidance: f32,
}

/// How LLaDA's tokenizer spells the end of a turn, which its config.json does not list.
const END_OF_TURN: &str = "<|eot_id|>";

/// Models on a backend, and everything in flight.
pub struct Engine<B: Backend> {
    pub(crate) backend: B,
    /// Never empty; 0 is the one the engine was loaded with, the others belong to stages that name them.
    pub(crate) models: Vec<Loaded<B>>,
    tokenizer: std::result::Result<Arc<Tokenizer>, Error>,
    pub(crate) banned: Vec<u32>,
    ends: Ends,
    pub(crate) options: EngineOptions,
    pub(crate) pool: PagePool,
    queue: VecDeque<Active>,
    active: Vec<Active>,
    turn: usize,
    next_id: u64,
}

impl<B: Backend> Engine<B> {
    /// Opens a Hugging Face directory. A missing tokenizer is an error only for calls that need text.
    pub fn load(model_dir: &Path, backend: B, options: EngineOptions) -> Result<Engine<B>> {
        Engine::load_with_progress(model_dir, backend, options, &mut |_, _| {})
    }

    /// [`Engine::load`], reporting bytes of tensors packed and bytes in all.
    pub fn load_with_progress(model_dir: &Path, backend: B, options: EngineOptions, progress: Progress) -> Result<Engine<B>> {
        let config = registry::read_config(model_dir)?;
        let tokenizer = match &options.tokenizer {
            Some(tokenizer) => Ok(tokenizer.clone()),
            None => Tokenizer::load(&model_dir.join("tokenizer.json"), config.vocab_size).map(Arc::new),
        };
        Engine::build(config, &Weights::open(model_dir)?, tokenizer, backend, options, progress)
    }

    /// Untrained weights of a given shape, for benches.
    pub fn random(config: ModelConfig, backend: B, options: EngineOptions) -> Result<Engine<B>> {
        let tokenizer = Err(Error::tokenizer(&config.dir, "random weights have no tokenizer"));
        Engine::build(config, &Weights::random(), tokenizer, backend, options, &mut |_, _| {})
    }

    fn build(
        config: ModelConfig,
        weights: &Weights,
        tokenizer: Result<Arc<Tokenizer>>,
        backend: B,
        options: EngineOptions,
        progress: Progress,
    ) -> Result<Engine<B>> {
        let model = registry::load(&backend, config, weights, progress)?;
        let config = model.config();
        if options.page_size == 0 || options.budget.max_rows == 0 || options.budget.max_sessions == 0 {
            return Err(Error::request("page size, row budget and session limit must be at least 1"));
        }
        let per_sequence = config.model_length.div_ceil(options.page_size);
        let num_pages = options.kv_pages.unwrap_or(per_sequence.saturating_mul(options.budget.max_sessions)).max(1);
        if num_pages > u32::MAX as usize / options.page_size {
            return Err(Error::request(format!("{num_pages} K/V pages of {} positions are more than can be addressed", options.page_size)));
        }
        // MASK, padding and embedding rows without a token are never drawn.
        let mut banned: Vec<u32> = config.mask_id.into_iter().chain(config.pad_id).collect();
        if let Ok(tokenizer) = &tokenizer {
            banned.extend(tokenizer.unused_ids(config.vocab_size));
        }
        banned.sort_unstable();
        banned.dedup();
        let mut ends = Ends { never: config.eos_id.into_iter().collect(), last: config.stop_ids.clone() };
        ends.last.extend(tokenizer.as_ref().ok().and_then(|tokenizer| tokenizer.id(END_OF_TURN)));
        let pool = PagePool::new(num_pages, options.page_size);
        let models = vec![Loaded::new(&backend, model, &pool, &options)?];
        Ok(Engine {
            backend,
            models,
            tokenizer,
            banned,
            ends,
            options,
            pool,
            queue: VecDeque::new(),
            active: Vec::new(),
            turn: 0,
            next_id: 0,
        })
    }

    /// Loads another model for stages that name it (`weights=INDEX`), with K/V pages of its own. Returns the index.
    ///
    /// Errors: as [`Engine::load`], or a vocabulary that differs from the first model's.
    pub fn add_model(&mut self, model_dir: &Path, progress: Progress) -> Result<usize> {
        let config = registry::read_config(model_dir)?;
        let first = self.config();
        if (config.vocab_size, config.mask_id) != (first.vocab_size, first.mask_id) {
            let mask = |config: &ModelConfig| config.mask_id.map_or("no MASK".into(), |id| format!("MASK {id}"));
            let found = format!("{} tokens, {}", config.vocab_size, mask(&config));
            let expected = format!("{}, {}", first.vocab_size, mask(first));
            return Err(Error::config(
                &model_dir.join("config.json"),
                format!("vocabulary of {found}: expected that of the first model, {expected}"),
            ));
        }
        if config.attention == Attention::Causal {
            return Err(Error::config(&model_dir.join("config.json"), "an autoregressive checkpoint cannot run a stage"));
        }
        let model = registry::load(&self.backend, config, &Weights::open(model_dir)?, progress)?;
        self.models.push(Loaded::new(&self.backend, model, &self.pool, &self.options)?);
        Ok(self.models.len() - 1)
    }

    /// The first model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.models[0].model.config()
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The tokenizer, or why there is none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().map_err(Clone::clone)
    }

    /// Ids that are never drawn, ascending.
    pub fn banned(&self) -> &[u32] {
        &self.banned
    }

    /// Sampling defaults that fit the model: what its directory recommends; block scope for block diffusion, canvas scope for full attention.
    pub fn defaults(config: &ModelConfig) -> Defaults {
        let scope = if config.attention == Attention::Full { Scope::Canvas } else { Scope::Block };
        let general = Defaults::default();
        Defaults {
            temperature: config.sampling.temperature.unwrap_or(general.temperature),
            top_p: config.sampling.top_p.unwrap_or(general.top_p),
            top_k: top_k_of(config.sampling.top_k.unwrap_or(0), TopKOrder::Before),
            scope,
            // Under full attention a block is only what is decided together.
            block_len: if let Attention::BlockCausal(len) = config.attention { len } else { general.block_len },
            ..general
        }
    }

    /// The canvas of a prompt: BOS first where the prompt is text.
    pub fn canvas(&self, prompt: &Prompt) -> Result<Vec<Option<u32>>> {
        let config = self.config();
        let holes = |length: usize, fixed: usize| -> Result<std::iter::RepeatN<Option<u32>>> {
            if length == 0 {
                return Err(Error::request("length: expected at least 1 generated token, found 0"));
            }
            self.check_len(length.saturating_add(fixed))?;
            Ok(std::iter::repeat_n(None, length))
        };
        let mut canvas = Vec::new();
        if matches!(prompt, Prompt::Text { .. } | Prompt::Infill(_)) {
            canvas.push(Some(config.first_id()?));
        }
        match prompt {
            Prompt::Text { text, length } => {
                canvas.extend(self.tokenizer()?.encode(text)?.into_iter().map(Some));
                canvas.extend(holes(*length, canvas.len())?);
            }
            Prompt::Tokens { tokens, length } => {
                canvas = tokens.iter().copied().map(Some).collect();
                canvas.extend(holes(*length, canvas.len())?);
            }
            Prompt::Infill(segments) => {
                for segment in segments {
                    match segment {
                        Segment::Text(text) => canvas.extend(self.tokenizer()?.encode(text)?.into_iter().map(Some)),
                        Segment::Hole(length) => canvas.extend(holes(*length, canvas.len())?),
                    }
                }
            }
            Prompt::Canvas(given) => canvas.clone_from(given),
        }
        self.check_len(canvas.len())?;
        if let Some(id) = canvas.iter().flatten().find(|id| **id as usize >= config.vocab_size) {
            return Err(Error::request(format!("token id {id} is outside the vocabulary of {}", config.vocab_size)));
        }
        Ok(canvas)
    }

    pub(crate) fn check_len(&self, len: usize) -> Result<()> {
        // Every stage's model sees every position.
        self.models.iter().try_for_each(|loaded| loaded.model.config().check_len(len))
    }

    /// Queues a request. Errors: a prompt or schedule that cannot be served, or more pages than the pool has in all.
    pub fn submit(&mut self, request: Request) -> Result<Handle> {
        let config = self.config();
        let mask_id = config.masking()?;
        if let Some(missing) = request.schedule.stages.iter().map(|s| s.weights).find(|w| *w >= self.models.len()) {
            return Err(Error::request(format!(
                "a stage names weights={missing}, {} models are loaded (counted from 0)",
                self.models.len()
            )));
        }
        let ends = |eos: Eos| match eos {
            Eos::Free => true,
            Eos::Never => !self.ends.never.is_empty(),
            Eos::Last => !self.ends.last.is_empty(),
            Eos::NeverLast => !self.ends.never.is_empty(),
        };
        if let Some(index) = request.schedule.stages.iter().position(|s| !ends(s.eos)) {
            let eos = request.schedule.stages[index].eos;
            return Err(Error::request(format!(
                "stage {index}: eos={eos}, but the checkpoint's `eos_token_id` names no token that ends a text"
            )));
        }
        let stages_joint = self.check_joint(&request.schedule)?;
        let fixed = self.canvas(&request.prompt)?;
        let mut stop = Stop { tokens: Vec::new(), entropy: request.stop.entropy, text: None };
        if !request.stop.ignore_eos {
            stop.tokens.extend(&config.stop_ids);
        }
        if let Some(empty) = request.stop.texts.iter().find(|t| t.is_empty()) {
            return Err(Error::request(format!("stop text `{empty}` is empty")));
        }
        if !request.stop.texts.is_empty() {
            let (tokenizer, texts) = (self.tokenizer()?.clone(), request.stop.texts.clone());
            stop.text = Some(Arc::new(move |tokens: &[u32]| stop_at(&tokenizer, &texts, tokens)));
        }
        let decoded = Session::decoded_len(&request.schedule, &fixed);
        self.check_len(decoded)?;
        let needed = self.pool.pages_for(decoded);
        if needed > self.pool.capacity() {
            return Err(Error::OutOfPages { needed, capacity: self.pool.capacity() });
        }
        let session = Session::new(SessionSpec {
            fixed,
            mask_id,
            schedule: request.schedule,
            shifted: self.models.iter().map(|loaded| loaded.model.config().shift).collect(),
            seed: request.seed,
            sample: request.sample,
            stop,
            separate_commit: request.separate_commit,
            forced: request.forced,
            draws: request.draws,
        })?;
        let (sender, messages) = channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let prefix_len = session.prefix_len();
        let prefix = (prefix_len > 0).then(|| PrefixKey {
            weights: session.prefix_weights(),
            block_len: session.prefix_block_len(),
            joint: stages_joint,
            tokens: session.canvas().tokens()[..prefix_len].to_vec(),
        });
        let now = Instant::now();
        self.queue.push_back(Active {
            id: self.next_id,
            session,
            table: PageTable::default(),
            committed_pages: needed,
            prefix,
            messages: sender,
            cancel: cancel.clone(),
            submitted: now,
            admitted: now,
            timings: Timings::default(),
            failed: None,
        });
        self.next_id += 1;
        Ok(Handle { messages, cancel, finished: RefCell::new(None) })
    }

    /// True while something is queued or in flight.
    pub fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.active.is_empty()
    }

    /// Pages not held by any sequence, for tests and reports.
    pub fn free_pages(&self) -> usize {
        self.pool.num_free()
    }

    /// Runs until nothing is left to do.
    pub fn run(&mut self) -> Result<()> {
        while self.tick()? {}
        Ok(())
    }

    /// One iteration: admit, batch, plan, forward, decide, commit, stream. False when idle. A request that fails ends with its
    /// error in its handle and leaves the others alone; an error here means the engine itself cannot go on.
    pub fn tick(&mut self) -> Result<bool> {
        self.drop_cancelled();
        self.admit();
        let needs = self.advance();
        let (weights, chosen) = batcher::choose(&needs, self.turn, &self.options.budget);
        self.turn = self.turn.wrapping_add(1) % self.active.len().max(1);
        if !chosen.is_empty() && !self.run_ahead(&chosen, weights)? {
            let plan = self.plan(&chosen, weights)?;
            let (rows, draws) = self.asks(&chosen, &plan);
            self.guide(&chosen, weights)?;
            let Loaded { model, kv, scratch, .. } = &mut self.models[weights];
            let backend = &self.backend;
            backend.range("forward", || model.forward(backend, &plan, &rows, kv, scratch, None))?;
            let windows = self.start_joint(&chosen, weights)?;
            let answers = self.decide(&chosen, weights, &draws);
            self.append_joint(&windows, weights)?;
            self.commit(&chosen, answers);
            self.finish_joint(windows, weights)?;
        }
        self.retire();
        Ok(self.is_busy())
    }

    /// Cancelled requests, and those whose handle is gone, end where they stand.
    fn drop_cancelled(&mut self) {
        let gone = |a: &Active| a.cancel.load(Ordering::Relaxed) || Arc::strong_count(&a.cancel) == 1;
        for active in self.active.iter_mut().chain(&mut self.queue).filter(|a| gone(a)) {
            active.session.cancel();
        }
    }

    fn admit(&mut self) {
        while self.active.len() < self.options.budget.max_sessions
            && let Some(waiting) = self.queue.front()
            && self.pool.commit(waiting.committed_pages)
        {
            let mut active = self.queue.pop_front().expect("looked at above");
            active.admitted = Instant::now();
            active.timings.queued_ms = ms(active.submitted, active.admitted);
            active.session.start();
            self.active.push(active);
        }
    }

    /// Brings every session to its next forward and says how many rows it needs; `None` for those that wait or are done.
    fn advance(&mut self) -> Vec<Option<Need>> {
        let mut needs = Vec::with_capacity(self.active.len());
        for active in &mut self.active {
            if active.session.wants_prefix()
                && active.session.step().is_none()
                && let Some(key) = &active.prefix
            {
                match self.pool.prefix(key, active.id) {
                    PrefixState::Yours => {}
                    PrefixState::Pending => {
                        needs.push(None);
                        continue;
                    }
                    PrefixState::Ready(pages) => {
                        active.table.adopt(pages);
                        active.session.skip_prefill();
                    }
                }
            }
            let mut events = Vec::new();
            let next = active.session.next(&mut events);
            active.send(events);
            needs.push(match next {
                Next::Forward => active.session.step().map(|s| Need { rows: s.rows.len(), weights: s.weights }),
                Next::Finished => None,
            });
        }
        needs
    }

    fn plan(&mut self, chosen: &[usize], weights: usize) -> Result<Plan> {
        let mut plan = Plan::new();
        for &i in chosen {
            let Active { session, table, .. } = &mut self.active[i];
            let step = session.step().expect("chosen for its step");
            for copy in table.make_writable(&mut self.pool, step.rows.iter().map(|(p, _)| *p)) {
                // Other models' pages need no copy: their stages write every row before reading it.
                self.backend.copy_page(&mut self.models[weights].kv, copy.src, copy.dst)?;
            }
            plan.push(&step.rows, table.pages(), self.options.page_size, step.visibility, step.len);
        }
        Ok(plan)
    }

    /// The forward without the prompt of those chosen sessions that want one. It writes the K/V of all of its rows to the sessions' own slots, where
    /// the forward with the prompt overwrites every one of them.
    fn guide(&mut self, chosen: &[usize], weights: usize) -> Result<()> {
        let step = |i: usize| self.active[i].session.step().expect("chosen for its step");
        let guided: Vec<usize> = chosen.iter().copied().filter(|i| step(*i).guidance > 0.0).collect();
        if guided.is_empty() {
            return Ok(());
        }
        let mut plan = Plan::new();
        for &i in &guided {
            let Active { session, table, .. } = &self.active[i];
            let step = step(i);
            plan.push(&session.unprompted(), table.pages(), self.options.page_size, step.visibility, step.len);
        }
        let (rows, _) = self.asks(&guided, &plan);
        let Loaded { model, kv, scratch, .. } = &mut self.models[weights];
        let backend = &self.backend;
        backend.range("guide", || model.forward(backend, &plan, &rows, kv, scratch, None))?;
        model.keep_guide(backend, rows.len(), scratch)
    }

    /// Several steps of the chosen sessions at once, where the backend decides by itself and the sessions can say what comes. The host
    /// follows behind: it applies the device's decisions step by step, and checks that the law chose what the device revealed.
    /// False: nothing was run.
    fn run_ahead(&mut self, chosen: &[usize], weights: usize) -> Result<bool> {
        if !self.backend.decides() {
            return Ok(false);
        }
        // A request that joins waits for the end of a run, and tokens are streamed then: the first run of a request is short.
        let young = chosen.iter().any(|i| self.active[*i].timings.first_token_ms == 0.0);
        let max = if young { FIRST_RUN } else { LONGEST_RUN };
        let foreseen: Vec<Vec<ForeseenStep>> = chosen.iter().map(|i| self.active[*i].session.foresee(max)).collect();
        let steps = self.run_steps(chosen, weights, &foreseen)?;
        if steps.is_empty() {
            return Ok(false);
        }
        let spec = RunSpec {
            sequences: chosen.iter().map(|i| self.active[*i].session.run_canvas()).collect(),
            steps,
            banned: &self.banned,
            mask_id: self.config().masking()?,
            heads: self.models[weights].model.config().heads,
        };
        let mut run = self.backend.begin_run(&spec)?;
        let steps = spec.steps;
        let Loaded { model, kv, scratch, joint } = &mut self.models[weights];
        let sampler = joint.as_mut().map(joint_steps::LoadedJoint::for_runs);
        let entered = model.run(&self.backend, &mut run, &steps, kv, scratch, sampler)?;
        // Sessions that left the run: finished, failed, or with a draft that ended early.
        let mut over = vec![false; chosen.len()];
        let mut decided = self.backend.end_run(run)?.into_iter();
        let mut next = || decided.next().expect("decisions of every forward and pass").into_iter().enumerate();
        for (index, step) in steps.iter().enumerate() {
            let clock = entered.iter().find(|(step, _)| *step == index).map_or_else(Instant::now, |(_, clock)| *clock);
            for (c, answer) in next() {
                let entered = (index > 0).then_some(clock);
                over[c] = over[c] || !self.follow(chosen[c], entered, step.sessions[c].range.end, answer);
            }
            for pass in step.joint.iter().flat_map(|joint| &joint.passes) {
                for (c, answer) in next() {
                    over[c] = over[c] || pass.sessions[c].asks > 0 && !self.follow_pass(chosen[c], answer);
                }
            }
        }
        Ok(true)
    }

    /// Applies one step of a run to session `i`, whose range ends at `end`; `entered`: when the step began, where it is not the first.
    /// False where the session leaves the run here or before.
    fn follow(&mut self, i: usize, entered: Option<Instant>, end: usize, answer: Result<Vec<RunDecision>>) -> bool {
        if let Some(clock) = entered {
            // What lies between two steps: the end of a stage and its remask.
            let mut events = Vec::new();
            let next = self.active[i].session.next_at(&mut events, clock);
            self.active[i].send(events);
            if next == Next::Finished {
                return false;
            }
        }
        let len = self.active[i].session.canvas().len();
        if len < end {
            return false;
        }
        let revealed = chosen_of(&answer);
        let answer = accept(&self.active[i].session.step().expect("foreseen").asks, answer);
        self.commit(&[i], vec![answer]);
        self.stays(i, len, &revealed)
    }

    /// Whether session `i`, whose canvas was `len` positions long, goes on in its run: what the device asked and revealed or not, by position, is what
    /// the law revealed.
    fn stays(&mut self, i: usize, len: usize, revealed: &[(usize, bool)]) -> bool {
        let Active { session, failed, .. } = &mut self.active[i];
        let now = session.canvas().len();
        let agree =
            |(position, chosen): &(usize, bool)| *position >= now || (session.canvas().state(*position) == State::Revealed) == *chosen;
        if failed.is_none() && !revealed.iter().all(agree) {
            *failed = Some(Error::kernel("the device revealed other positions than the law of the schedule"));
            session.cancel();
        }
        // A draft that ended early leaves the rest of the run behind.
        failed.is_none() && now == len
    }

    /// Steps that all chosen sessions foresee, with pages for all of their rows.
    fn run_steps(&mut self, chosen: &[usize], weights: usize, foreseen: &[Vec<ForeseenStep>]) -> Result<Vec<RunStep>> {
        let count = foreseen.iter().map(Vec::len).min().unwrap_or(0);
        let mut steps = Vec::with_capacity(count);
        for index in 0..count {
            // A later step may need more rows than the batcher allowed the first.
            let rows: usize = foreseen.iter().map(|steps| steps[index].rows.len()).sum();
            if index > 0 && chosen.len() > 1 && rows > self.options.budget.max_rows {
                break;
            }
            let mut plan = Plan::new();
            for (&i, steps) in chosen.iter().zip(foreseen) {
                let Active { table, .. } = &mut self.active[i];
                let step = &steps[index];
                for copy in table.make_writable(&mut self.pool, step.rows.iter().copied()) {
                    self.backend.copy_page(&mut self.models[weights].kv, copy.src, copy.dst)?;
                }
                let rows: Vec<(usize, u32)> = step.rows.iter().map(|p| (*p, 0)).collect();
                plan.push(&rows, table.pages(), self.options.page_size, step.visibility, step.len);
            }
            let of: Vec<&ForeseenStep> = foreseen.iter().map(|steps| &steps[index]).collect();
            let joint = joint_steps::run_joint(&plan, &of, |position| self.models[weights].model.answering(position));
            steps.push(RunStep { plan, sessions: of.iter().map(|step| step.part.clone()).collect(), joint });
        }
        Ok(steps)
    }

    /// Rows of the plan that are wanted, and what is asked of those that decide: the same rows, but where a joint sampler wants all of them.
    fn asks(&self, chosen: &[usize], plan: &Plan) -> (Vec<u32>, Vec<Draw>) {
        let (mut rows, mut draws) = (Vec::new(), Vec::new());
        for (&i, &first) in chosen.iter().zip(&plan.indptr) {
            let session = &self.active[i].session;
            let step = session.step().expect("chosen for its step");
            draws.extend(step.asks.iter().map(|ask| ask.draw));
            match session.is_joint() {
                true => rows.extend(first..first + step.rows.len() as u32),
                false => rows.extend(step.asks.iter().map(|ask| first + ask.row as u32)),
            }
        }
        (rows, draws)
    }

    /// Answers per chosen session. A row that cannot be decided fails its own session only.
    fn decide(&mut self, chosen: &[usize], weights: usize, draws: &[Draw]) -> Vec<Result<Vec<Decision>>> {
        let (mut first, mut wanted, mut guides) = (0, 0, 0);
        let parts: Vec<Part> = chosen
            .iter()
            .map(|i| {
                let session = &self.active[*i].session;
                let step = session.step().expect("chosen for its step");
                let asks = step.asks.len();
                first += asks;
                guides += if step.guidance > 0.0 { asks } else { 0 };
                let rows: Vec<u32> = match session.is_joint() {
                    true => step.asks.iter().map(|ask| wanted + ask.row as u32).collect(),
                    false => (wanted..wanted + asks as u32).collect(),
                };
                wanted += if session.is_joint() { step.rows.len() } else { asks } as u32;
                Part { rows, draws: first - asks..first, guide: guides.saturating_sub(asks), eos: step.eos, guidance: step.guidance }
            })
            .collect();
        let mut answers = Vec::with_capacity(chosen.len());
        // Sessions that ask alike are answered together.
        for group in parts.chunk_by(|a, b| (a.eos, a.guidance) == (b.eos, b.guidance)) {
            let first = group[0].draws.start;
            let rows = group.iter().flat_map(|part| part.rows.iter().copied()).collect();
            match self.answers(weights, &Part { rows, draws: first..group[group.len() - 1].draws.end, ..group[0].clone() }, draws) {
                Ok(all) => answers.extend(group.iter().map(|part| Ok(all[part.draws.start - first..part.draws.end - first].to_vec()))),
                // Found by asking again, one session at a time.
                Err(_) => answers.extend(group.iter().map(|part| self.answers(weights, part, draws))),
            }
        }
        answers
    }

    /// Answers to the draws of a part's rows, counted among the wanted rows of the last forward.
    fn answers(&mut self, weights: usize, part: &Part, draws: &[Draw]) -> Result<Vec<Decision>> {
        let Loaded { model, scratch, .. } = &mut self.models[weights];
        let backend = &self.backend;
        let (rows, draws) = (&part.rows, &draws[part.draws.clone()]);
        let guides: Vec<u32> = (part.guide..part.guide + rows.len()).map(|row| row as u32).collect();
        let mut ask = |draws: &[Draw], banned: &[u32]| match part.guidance {
            // [LLaDA] The published scale counts from 0.
            scale if scale > 0.0 => model.decide_guided(backend, rows, &guides, scale + 1.0, draws, banned, scratch),
            _ => model.decide(backend, rows, draws, banned, scratch),
        };
        let with = |ids: &[u32]| union(&self.banned, ids);
        match part.eos {
            Eos::Free => ask(draws, &self.banned),
            Eos::Never => ask(draws, &with(&self.ends.never)),
            Eos::Last | Eos::NeverLast => {
                let banned = if part.eos == Eos::Last { self.banned.clone() } else { with(&self.ends.never) };
                let mut answers = ask(draws, &banned)?;
                let ends = |answer: &Decision| self.ends.last.contains(&answer.token);
                // [LLaDA] Tokens first, from everything; then what each is worth where the ends do not count.
                let again = |(draw, answer): (&Draw, &Decision)| match ends(answer) {
                    true => Draw { temperature: 0.0, forced: None, ..*draw },
                    false => Draw { forced: Some(answer.token), ..*draw },
                };
                let others = ask(&draws.iter().zip(&answers).map(again).collect::<Vec<_>>(), &with(&self.ends.last))?;
                for (answer, other) in answers.iter_mut().zip(others) {
                    let (confidence, log_prob) = if ends(answer) { (0.0, answer.log_prob) } else { (other.confidence, other.log_prob) };
                    *answer = Decision { confidence, log_prob, ..*answer };
                }
                Ok(answers)
            }
        }
    }

    fn commit(&mut self, chosen: &[usize], answers: Vec<Result<Vec<Decision>>>) {
        for (&i, answer) in chosen.iter().zip(answers) {
            let active = &mut self.active[i];
            let prefill = active.session.is_prefilling();
            let mut events = Vec::new();
            let len = active.session.canvas().len();
            match answer.and_then(|decisions| active.session.apply(&decisions, &mut events)) {
                Err(error) => {
                    active.failed = Some(error);
                    active.session.cancel();
                }
                Ok(()) => {
                    if prefill && let Some(key) = &active.prefix {
                        let pages = active.table.pages().to_vec();
                        self.pool.publish(key, active.id, &pages);
                    }
                    if active.timings.first_token_ms == 0.0 && events.iter().any(|e| e.kind == EventKind::Reveal) {
                        active.timings.first_token_ms = ms(active.admitted, Instant::now());
                    }
                }
            }
            self.shorten(i, len);
            self.active[i].send(events);
        }
    }

    /// Gives back what lies beyond the end of session `i`, whose draft ended early where it was `len` positions long.
    fn shorten(&mut self, i: usize, len: usize) {
        let active = &mut self.active[i];
        let now = active.session.canvas().len();
        if now < len {
            let freed = active.table.truncate(&mut self.pool, now);
            self.poison(&freed);
            let active = &mut self.active[i];
            let needed = self.pool.pages_for(now);
            self.pool.uncommit(active.committed_pages - needed);
            active.committed_pages = needed;
        }
    }

    /// Finished sessions leave: their pages return, their output goes to the handle.
    fn retire(&mut self) {
        for queue in [true, false] {
            let count = if queue { self.queue.len() } else { self.active.len() };
            for i in (0..count).rev() {
                let active = if queue { &self.queue[i] } else { &self.active[i] };
                if active.session.is_finished() {
                    let mut done = if queue { self.queue.remove(i).expect("counted") } else { self.active.remove(i) };
                    let freed = done.table.truncate(&mut self.pool, 0);
                    self.pool.abandon(done.id);
                    if !queue {
                        self.pool.uncommit(done.committed_pages);
                    }
                    self.poison(&freed);
                    done.finish();
                }
            }
        }
    }

    pub(crate) fn poison(&mut self, pages: &[u32]) {
        if self.options.poison_freed_pages {
            let never_written = self.pool.capacity() as u32;
            for &page in pages {
                for loaded in &mut self.models {
                    self.backend.copy_page(&mut loaded.kv, never_written, page).expect("poisoning is for tests");
                }
            }
        }
    }
}

impl Active {
    fn send(&self, events: Vec<Event>) {
        for event in events {
            // A handle that is gone is noticed at the next tick.
            let _ = self.messages.send(Message::Event(event));
        }
    }

    fn finish(mut self) {
        let result = match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(self.output()),
        };
        let _ = self.messages.send(Message::Finished(Box::new(result)));
    }

    fn output(&self) -> Output {
        let canvas = self.session.canvas();
        let positions: Vec<usize> = canvas.generated().collect();
        let stages = self.session.reports().to_vec();
        let draft_ms = stages.first().map_or(0.0, |s| s.ms);
        let refine_ms = stages.iter().skip(1).map(|s| s.ms).sum();
        Output {
            sample: self.session.sample(),
            finish: self.session.finish(),
            prompt_tokens: self.session.prompt_len(),
            canvas: canvas.tokens().to_vec(),
            tokens: positions.iter().map(|p| canvas.tokens()[*p]).collect(),
            draft: self.session.draft().to_vec(),
            confidence: positions.iter().map(|p| canvas.confidence(*p)).collect(),
            revealed_at: positions.iter().map(|p| canvas.revealed_at(*p)).collect(),
            positions,
            stages,
            timings: Timings { draft_ms, refine_ms, total_ms: ms(self.admitted, Instant::now()), ..self.timings },
        }
    }
}

/// The device's decisions as answers to a session's own asks, which they must match.
fn accept(asks: &[Ask], answer: Result<Vec<RunDecision>>) -> Result<Vec<Decision>> {
    let decisions = answer?;
    if !asks.iter().map(|ask| ask.position).eq(decisions.iter().map(|d| d.position)) {
        return Err(Error::kernel("the device asked other positions than the session"));
    }
    Ok(decisions.into_iter().map(|d| d.decision).collect())
}

/// Positions that the device asked, and whether it revealed them.
fn chosen_of(answer: &Result<Vec<RunDecision>>) -> Vec<(usize, bool)> {
    answer.iter().flatten().map(|d| (d.position, d.chosen)).collect()
}

/// Both lists of ids, ascending.
fn union(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut all = [a, b].concat();
    all.sort_unstable();
    all.dedup();
    all
}

pub(crate) fn ms(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine may be built on one thread and ticked on another; its handles may live on a third.
    #[test]
    fn engines_and_handles_cross_threads() {
        fn crosses<T: Send>() {}
        crosses::<Engine<crate::cpu::Cpu>>();
        crosses::<Handle>();
    }
}
