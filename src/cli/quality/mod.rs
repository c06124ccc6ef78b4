//! `redraft bench --quality`: samples of several schedules by the engine, measured for quality,
//! variety, coherence and cost beside each other. The crate `redraft-evaluation` has the measures;
//! this module reads the flags, generates, lets the judge score, and reports.
//!
//! Everything is checked before anything is generated. What was measured is printed even if a later
//! row fails.

mod report;
mod rows;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use redraft_evaluation::bootstrap::Resamples;
use redraft_evaluation::memorization::Training;
use redraft_evaluation::ngram_lm::{Interpolated, MAX_VOCAB};
use redraft_evaluation::reference_text::{self, Windows};
use redraft_evaluation::{self as evaluation, Measures, PerSample, Reference, Sample};
use serde::Serialize;

use self::report::{Cost, Human, PairedRow, Report};
use self::rows::{EvalRow, RowSampling, Rows};
use crate::api::device::on_backend;
use crate::backend::{Backend, NumberTypes};
use crate::cli::bench_flags::BenchFlags;
use crate::cli::device::{DeviceFlags, decoded_len};
use crate::cli::engine::{attach_joint, drain, load};
use crate::cli::files::{judge_dir, model_dir, read_text};
use crate::cli::flags::{DTypeFlag, Format};
use crate::cli::terminal::{Progress, note, print};
use crate::config::{AttentionMask, ModelConfig, config_file};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::registry;
use crate::request::{Output, Prompt, Request};
use crate::rng::{DrawKey, uniforms};
use crate::schedule::Schedule;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Samples in flight together where `--batch` does not say.
const DEFAULT_BATCH: u32 = 64;

/// Query rows per forward. Whole samples of 256 rows by the four: no slower than everything at once
/// (764-894 against 888-968 ms a sample, `did`, 32 in flight, one core), and activations stay
/// small.
const MAX_ROWS: usize = 1024;

/// Samples that share the judge's forwards.
const JUDGED_AT_ONCE: usize = 8;

/// Samples below which a note says that intervals are wide.
const ENOUGH_SAMPLES: u32 = 200;

/// Documents encoded between two looks at the clock.
const DOCUMENTS_AT_ONCE: usize = 256;

/// Key of the draws of intervals: an interval is a function of the values alone, for any seed that
/// the text was generated from.
const INTERVAL_SEED: u64 = 0x7265_6472_6166_7421;

/// Everything that is known before the first sample.
struct EvalRun<'a> {
    flags: &'a BenchFlags,
    /// Of `--model`: further ones are for stages that name them.
    more_models: &'a [PathBuf],
    rows: Rows,
    judge: ModelConfig,
    tokenizer: Arc<Tokenizer>,
    /// Of the generators' weights; the judge computes in f32.
    types: NumberTypes,
    /// Between documents.
    end_of_text: u32,
    length: usize,
    batch: usize,
    human: Option<Windows>,
    training: Option<Training>,
    trigram: Option<Interpolated>,
}

pub(super) fn run(flags: &BenchFlags) -> Result<()> {
    let job = EvalRun::resolve(flags)?;
    let mut save = flags.quality.save.as_deref().map(Save::create).transpose()?;
    let mut report = job.report();
    // Rows that were measured are worth having even if the next one fails.
    let outcome = job.measure(&mut report, save.as_mut());
    if outcome.is_ok() || !report.rows.is_empty() {
        let text = match flags.format {
            Format::Json => serde_json::to_string(&report).expect("plain data") + "\n",
            Format::Table => report::table(&report),
        };
        print(&text)?;
    }
    outcome
}

impl<'a> EvalRun<'a> {
    fn resolve(flags: &'a BenchFlags) -> Result<EvalRun<'a>> {
        let asked = &flags.quality;
        let first = registry::read_config(&model_dir(flags.model.first().map(PathBuf::as_path))?)?;
        let sampling = RowSampling { temperature: asked.temperature, top_p: asked.top_p, seed: asked.seed };
        let mut rows = Rows::new(first, flags.model.len(), sampling)?;
        match &asked.rows {
            Some(path) => rows.read(path)?,
            None if !flags.stage.is_empty() => rows.stages(&flags.stage)?,
            None if !flags.preset.is_empty() => rows.presets(&flags.preset)?,
            None => rows.headline()?,
        }
        let more_models = flags.model.get(1..).unwrap_or_default();
        let more: Vec<ModelConfig> = more_models.iter().map(|dir| registry::read_config(dir)).collect::<Result<_>>()?;
        let judge = registry::read_config(&judge_dir(asked.judge.as_deref())?)?;
        if judge.attention != AttentionMask::Causal {
            let what = "expected an autoregressive checkpoint as --judge, found one that is trained for diffusion";
            return Err(Error::config(&config_file(&judge.dir), what));
        }
        let batch = single_value("--batch", &flags.batch)?.unwrap_or(DEFAULT_BATCH).min(asked.samples) as usize;
        let trained = rows.models.iter().chain([&judge]).map(|config| config.model_length).min().expect("a judge");
        let length = single_value("--length", &flags.length)?.map_or(trained.max(2) - 1, |length| length as usize);
        rows.models.iter().chain(&more).try_for_each(|config| config.check_len(length + 1))?;
        if length + 1 > judge.model_length {
            let (positions, dir) = (judge.model_length, judge.dir.display());
            return Err(Error::request(format!(
                "--length: {length} tokens and BOS are more than the {positions} positions that the judge {dir} was trained on"
            )));
        }
        for config in rows.models.iter().chain(&more).chain([&judge]) {
            // Names and shapes only: what takes long to read is read when its row comes.
            registry::check(config, &Weights::open(&config.dir)?).into_iter().next().map_or(Ok(()), Err)?;
        }
        let writer = &rows.models[0];
        let end_of_text = writer.eos_id.ok_or_else(|| {
            Error::config(&config_file(&writer.dir), "key `eos_token_id` is missing: --quality tells documents apart by it")
        })?;
        let tokenizer = flags.device.tokenizer(writer)?;
        let types = flags.device.types(Some(&writer.dir))?;
        check_vocabularies(&rows, &judge, &tokenizer, &flags.device)?;

        let mut job = EvalRun {
            flags,
            more_models,
            rows,
            judge,
            tokenizer,
            types,
            end_of_text,
            length,
            batch,
            human: None,
            training: None,
            trigram: None,
        };
        if let Some(path) = &asked.human {
            let documents = job.documents(std::slice::from_ref(path))?;
            let windows = reference_text::windows(&documents, length, asked.samples as usize, job.end_of_text);
            let too_short = || Error::request(format!("--human {}: less text than one sample of {length} tokens", path.display()));
            job.human = Some(windows.ok_or_else(too_short)?);
        }
        if !asked.train.is_empty() {
            let end = job.end_of_text;
            let mut text = Vec::new();
            for document in job.documents(&asked.train)? {
                text.extend(document);
                text.push(end);
            }
            if u32::try_from(text.len()).is_err() {
                return Err(Error::request(format!("--train: {} tokens are more than can be sorted", text.len())));
            }
            let training = Training::new(text, length, end);
            job.trigram = Some(Interpolated::fit(3, job.vocab_size(), end, std::iter::once(training.text())));
            job.training = Some(training);
        }
        Ok(job)
    }

    /// The model of `--model`: rows of others have its vocabulary.
    fn model(&self) -> &ModelConfig {
        &self.rows.models[0]
    }

    fn vocab_size(&self) -> usize {
        self.model().vocab_size
    }

    /// Ids of the documents of some files.
    fn documents(&self, paths: &[PathBuf]) -> Result<Vec<Vec<u32>>> {
        let mut progress = Progress::new("encoding");
        let mut ids = Vec::new();
        for path in paths {
            let text = read_text(path)?;
            let documents = reference_text::documents(&text);
            if documents.is_empty() {
                return Err(Error::request(format!("{}: expected text, found none", path.display())));
            }
            for (i, some) in documents.chunks(DOCUMENTS_AT_ONCE).enumerate() {
                progress.show(|| format!("{}: {} of {} documents", path.display(), i * DOCUMENTS_AT_ONCE, documents.len()));
                ids.extend(self.tokenizer.encode_each(some)?);
            }
        }
        Ok(ids)
    }

    fn reference(&self) -> Reference<'_> {
        Reference {
            end_of_text: self.end_of_text,
            vocab_size: self.vocab_size(),
            trigram: self.trigram.as_ref(),
            training: self.training.as_ref(),
            human: self.human.as_ref().map(|windows| windows.rows.as_slice()),
        }
    }

    /// The report without its figures.
    fn report(&self) -> Report {
        let asked = &self.flags.quality;
        let name = |config: &ModelConfig| config.dir.display().to_string();
        let models = std::iter::once(name(self.model())).chain(self.more_models.iter().map(|dir| dir.display().to_string()));
        let mut notes = vec![format!("times are throughput with {} samples in flight, not the latency of one", self.batch)];
        if asked.samples < ENOUGH_SAMPLES {
            notes.push(format!("{} samples a row are few: read the intervals", asked.samples));
        }
        if asked.train.is_empty() {
            notes.push("without --train FILE: no trigram_ppl, no copied_run".into());
        }
        match &self.human {
            None => notes.push("without --human FILE: no human row, no reverse_ppl".into()),
            Some(windows) => {
                let (rows, samples) = (windows.rows.len(), asked.samples as usize);
                if rows < samples {
                    notes.push(format!(
                        "{rows} windows of human text against {samples} samples: set_distinct_4 and self_bleu_4 depend on the number"
                    ));
                }
                if windows.overlapping > 0 {
                    notes.push(format!("{} windows of human text share text with others, for want of text", windows.overlapping));
                }
                if windows.spare.is_empty() {
                    notes.push("too little human text for the reverse_ppl of human text: it is fitted to as many other windows".into());
                }
            }
        }
        Report {
            model: name(self.model()),
            models: (!self.more_models.is_empty()).then(|| models.collect()),
            judge: name(&self.judge),
            device: String::new(),
            dtype: self.types.name(),
            samples: asked.samples,
            length: self.length,
            seed: asked.seed,
            batch: self.batch,
            notes,
            human: None,
            rows: Vec::new(),
        }
    }

    /// Row by row: generate, judge, measure.
    fn measure(&self, report: &mut Report, mut save: Option<&mut Save>) -> Result<()> {
        let per_sample = self.flags.quality.per_sample;
        let mut judge = self.load_judge()?;
        report.device = judge.device();
        if let Some(windows) = &self.human {
            let mut set: Vec<Sample> = windows.rows.iter().map(|tokens| self.sample(tokens.clone(), None)).collect();
            self.ask(judge.as_mut(), &mut set)?;
            let mut reference = self.reference();
            reference.human = None;
            let (mut measures, single) = evaluation::measure(&set, &reference, &resamples(set.len()));
            if !windows.spare.is_empty() {
                let spare: Vec<&[u32]> = windows.spare.iter().map(Vec::as_slice).collect();
                measures.reverse_ppl = evaluation::reverse_perplexity(&spare, &windows.rows, &reference);
            }
            print_row("human text", &measures, None);
            let (windows, overlapping) = (windows.rows.len(), windows.overlapping);
            report.human = Some(Human { windows, overlapping, measures, samples: per_sample.then_some(single) });
        }
        let resamples = resamples(self.flags.quality.samples as usize);
        let mut done: Vec<(PerSample, Vec<Vec<u32>>)> = Vec::new();
        let mut writer: Option<(usize, Box<dyn Generator>)> = None;
        for row in &self.rows.rows {
            if writer.as_ref().is_none_or(|(model, _)| *model != row.model) {
                // Two generators are never held at once.
                writer = None;
            }
            let (_, engine) = match &mut writer {
                Some(writer) => writer,
                none => none.insert((row.model, self.load_writer(row.model)?)),
            };
            let failed = |error| name_row(row, error);
            let (outputs, wall_ms) = self.write(engine.as_mut(), row).map_err(failed)?;
            if let Some(save) = save.as_mut() {
                save.row(&self.rows.models[row.model], row, &outputs, &self.tokenizer)?;
            }
            let cost = cost(&outputs, wall_ms);
            let drafts: Vec<Vec<u32>> = outputs.iter().map(|output| output.draft.clone()).collect();
            let mut set: Vec<Sample> = outputs.into_iter().map(|output| self.sample(output.tokens, Some(output.draft))).collect();
            self.ask(judge.as_mut(), &mut set).map_err(failed)?;
            let (measures, single) = evaluation::measure(&set, &self.reference(), &resamples);
            print_row(&row.name, &measures, Some(&cost));
            let paired = self.rows.rows[..done.len()].iter().position(|base| shares_drafts(base, row)).and_then(|base| {
                let to = self.rows.rows[base].name.clone();
                if done[base].1 != drafts {
                    report.notes.push(format!("{}: drafts differ from those of {to}, no pairs", row.name));
                    return None;
                }
                Some(PairedRow { to, paired: evaluation::paired(&single, &done[base].0, &resamples) })
            });
            report.rows.push(report::ReportRow {
                name: row.name.clone(),
                model: self.rows.models[row.model].dir.display().to_string(),
                schedule: row.schedule.stages().iter().map(ToString::to_string).collect(),
                seed: row.seed,
                measures,
                paired,
                cost,
                samples: per_sample.then(|| single.clone()),
            });
            done.push((single, drafts));
        }
        Ok(())
    }

    fn sample(&self, tokens: Vec<u32>, draft: Option<Vec<u32>>) -> Sample {
        let documents = tokens.split(|id| *id == self.end_of_text).map(|document| self.tokenizer.decode(document)).collect();
        Sample { tokens, draft, documents, ..Sample::default() }
    }

    /// Fills in what the judge says about every sample, and about every second half after
    /// another's first half.
    fn ask(&self, judge: &mut dyn Scorer, set: &mut [Sample]) -> Result<()> {
        let mut progress = Progress::new("judging");
        let tokens: Vec<Vec<u32>> = set.iter().map(|sample| sample.tokens.clone()).collect();
        let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let grafted: Vec<Vec<u32>> =
            if set.len() > 1 { (0..set.len()).map(|i| evaluation::grafted(&tokens, i)).collect() } else { Vec::new() };
        let grafted: Vec<&[u32]> = grafted.iter().map(Vec::as_slice).collect();
        let (num, half) = (set.len(), evaluation::half(self.length));
        for (i, part) in set.chunks_mut(JUDGED_AT_ONCE).enumerate() {
            let first = i * JUDGED_AT_ONCE;
            progress.show(|| format!("sample {first} of {num}"));
            let range = first..first + part.len();
            for (sample, losses) in part.iter_mut().zip(judge.losses(&tokens[range.clone()])?) {
                sample.nll = losses;
            }
            let behind = grafted.get(range).map_or(Ok(Vec::new()), |grafted| judge.losses(grafted))?;
            for (sample, losses) in part.iter_mut().zip(behind) {
                sample.grafted_nll = Some(losses[half..].to_vec());
            }
        }
        Ok(())
    }

    /// All samples of a row, and the wall time in milliseconds that they took together.
    fn write(&self, engine: &mut dyn Generator, row: &EvalRow) -> Result<(Vec<Output>, f64)> {
        let samples = self.flags.quality.samples;
        // Kernels that a schedule is the first to use are not its cost.
        engine.write(&row.schedule, row.seed, samples..samples + 1, self.length)?;
        let start = Instant::now();
        let outputs = engine.write(&row.schedule, row.seed, 0..samples, self.length)?;
        Ok((outputs, start.elapsed().as_secs_f64() * 1e3))
    }

    fn load_writer(&self, model: usize) -> Result<Box<dyn Generator>> {
        let flags = &self.flags.device;
        let longest = self.rows.rows.iter().map(|row| decoded_len(&row.schedule, self.length + 1)).max().unwrap_or(self.length + 1);
        let mut options = flags.options(longest, self.batch);
        options.budget.max_sequences = self.batch;
        options.budget.max_rows = MAX_ROWS;
        options.tokenizer = Some(self.tokenizer.clone());
        let options = options.with_pages_for(longest);
        let dir = &self.rows.models[model].dir;
        on_backend!(flags.backend(Some(dir))?, |backend| {
            let mut engine = load(dir, backend, options)?;
            for other in self.more_models {
                engine.add_model(other, &mut |_, _| {})?;
            }
            let schedules = self.rows.rows.iter().filter(|row| row.model == model).map(|row| &row.schedule);
            attach_joint(&mut engine, self.flags.joint.as_deref().filter(|_| model == 0), dir, schedules)?;
            Ok(Box::new(engine))
        })
    }

    /// The judge computes in f32 whatever type the generator has: its figures are for comparing.
    fn load_judge(&self) -> Result<Box<dyn Scorer>> {
        let flags = DeviceFlags { dtype: Some(DTypeFlag::F32), weights: None, ..self.flags.device.clone() };
        on_backend!(flags.backend(Some(&self.judge.dir))?, |backend| {
            Ok(Box::new(flags.engine(backend, &self.judge.dir, Some(self.tokenizer.clone()), self.length + 1, JUDGED_AT_ONCE)?))
        })
    }
}

/// What generates, whichever machine it runs on.
trait Generator {
    /// Unconditional samples of full length, in order.
    fn write(&mut self, schedule: &Schedule, seed: u64, samples: std::ops::Range<u32>, length: usize) -> Result<Vec<Output>>;
}

impl<B: Backend> Generator for Engine<B> {
    fn write(&mut self, schedule: &Schedule, seed: u64, samples: std::ops::Range<u32>, length: usize) -> Result<Vec<Output>> {
        let mut handles = Vec::with_capacity(samples.len());
        for sample in samples {
            let prompt = Prompt::Tokens { tokens: vec![self.config().first_id()?], length };
            let mut request = Request::new(prompt, schedule.clone(), seed, sample);
            request.stop.ignore_eos = true;
            handles.push(self.submit(request)?);
        }
        drain(self, &handles)?;
        handles.iter().map(|handle| handle.take_output().expect("drained")).collect()
    }
}

/// What scores, whichever machine it runs on.
trait Scorer {
    /// Negative log-likelihood in nats of every token of every sample, given BOS and those before
    /// it.
    fn losses(&mut self, samples: &[&[u32]]) -> Result<Vec<Vec<f64>>>;

    fn device(&self) -> String;
}

impl<B: Backend> Scorer for Engine<B> {
    fn losses(&mut self, samples: &[&[u32]]) -> Result<Vec<Vec<f64>>> {
        let bos = [self.config().first_id()?];
        let with_bos: Vec<Vec<u32>> = samples.iter().map(|tokens| [&bos, *tokens].concat()).collect();
        let with_bos: Vec<&[u32]> = with_bos.iter().map(Vec::as_slice).collect();
        let losses = self.causal_nlls(&with_bos)?;
        for (tokens, losses) in samples.iter().zip(&losses) {
            if let Some(at) = losses.iter().position(|loss| !loss.is_finite()) {
                return Err(Error::kernel(format!(
                    "{}: the likelihood of token {} at position {} is {}",
                    self.config().dir.display(),
                    tokens[at],
                    at + 1,
                    losses[at]
                )));
            }
        }
        Ok(losses)
    }

    fn device(&self) -> String {
        self.backend().name()
    }
}

/// The one value of a flag that takes a list elsewhere.
fn single_value(flag: &str, values: &[u32]) -> Result<Option<u32>> {
    match values {
        [] => Ok(None),
        [value] => Ok(Some(*value)),
        more => Err(Error::request(format!("{flag}: expected one value with --quality, found {}", more.len()))),
    }
}

/// Ids are judged as they were drawn: an id that a row's model may draw must mean the same to all.
fn check_vocabularies(rows: &Rows, judge: &ModelConfig, tokenizer: &Tokenizer, flags: &DeviceFlags) -> Result<()> {
    let first = &rows.models[0];
    if first.vocab_size >= MAX_VOCAB {
        let what = format!("vocab_size {}: --quality counts n-grams of fewer than {MAX_VOCAB} different tokens", first.vocab_size);
        return Err(Error::config(&config_file(&first.dir), what));
    }
    for other in rows.models[1..].iter().chain([judge]) {
        let mean = |what: String| Error::config(&other.dir, format!("{what}: expected the vocabulary of {}", first.dir.display()));
        if rows.models.iter().any(|model| std::ptr::eq(model, other)) && other.vocab_size != first.vocab_size {
            return Err(mean(format!("vocab_size is {}, not {}", other.vocab_size, first.vocab_size)));
        }
        if other.eos_id != first.eos_id {
            let id = |config: &ModelConfig| config.eos_id.map_or("none".into(), |id| id.to_string());
            return Err(mean(format!("the end-of-text token has id {}, not {}", id(other), id(first))));
        }
        let theirs = flags.tokenizer(other)?;
        let drawn = (0..first.vocab_size as u32).filter(|id| ![first.mask_id, first.pad_id].contains(&Some(*id)));
        for id in drawn {
            let (ours, theirs) = (tokenizer.token(id), theirs.token(id).filter(|_| (id as usize) < other.vocab_size));
            if ours.is_some() && ours != theirs {
                let spelled = |token: Option<String>| token.map_or("no token".into(), |token| format!("{token:?}"));
                return Err(mean(format!("token {id} is {}, not {}", spelled(theirs), spelled(ours))));
            }
        }
    }
    Ok(())
}

/// Whether two rows must have the same drafts: the counter-based draws of a draft depend on nothing
/// else.
fn shares_drafts(a: &EvalRow, b: &EvalRow) -> bool {
    (a.model, a.seed, &a.schedule.stages()[0]) == (b.model, b.seed, &b.schedule.stages()[0])
}

fn name_row(row: &EvalRow, error: Error) -> Error {
    match error {
        Error::Request { what } => Error::request(format!("row `{}`: {what}", row.name)),
        Error::Kernel { what } => Error::kernel(format!("row `{}`: {what}", row.name)),
        other => other,
    }
}

/// Draws for intervals over `num_samples` samples.
fn resamples(num_samples: usize) -> Resamples {
    Resamples::draw(num_samples, |resample, position| {
        let drawn = uniforms(DrawKey { seed: INTERVAL_SEED, sample: resample, stage: 0, block: 0, step: 0, position });
        [drawn.token, drawn.order]
    })
}

fn cost(outputs: &[Output], wall_ms: f64) -> Cost {
    let num = outputs.len() as f64;
    let stages = || outputs.iter().flat_map(|output| &output.stages);
    let each = |count: usize| count as f64 / num;
    let tokens: usize = outputs.iter().map(|output| output.tokens.len()).sum();
    Cost {
        nfe: each(stages().map(|s| s.nfe()).sum()),
        forwards: each(stages().map(|s| s.forwards.total()).sum()),
        joint: each(stages().map(|s| s.forwards.joint).sum()),
        rows: each(stages().map(|s| s.rows).sum()),
        // Microseconds, and tenths of a token: more digits would only be noise.
        ms_per_sample: (wall_ms / num * 1e3).round() / 1e3,
        tokens_per_s: (tokens as f64 / (wall_ms / 1e3).max(1e-9) * 10.0).round() / 10.0,
    }
}

/// A line on stderr for each row as it is done.
fn print_row(name: &str, measures: &Measures, cost: Option<&Cost>) {
    let perplexity = measures.judge_ppl_pooled.map_or("-".into(), |figure| format!("{:.2}", figure.value));
    let speed = cost.map_or(String::new(), |cost| format!(", {:.0} tokens/s", cost.tokens_per_s));
    note(format_args!("{name}: pooled judge perplexity {perplexity}{speed}"));
}

/// The `--save` file: samples of finished rows are in it even if the next one fails.
struct Save {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
struct Saved<'a> {
    model: String,
    row: &'a str,
    sample: u32,
    seed: u64,
    /// End-of-text tokens spelled out.
    text: String,
    tokens: &'a [u32],
    draft: SavedDraft<'a>,
}

#[derive(Serialize)]
struct SavedDraft<'a> {
    text: String,
    tokens: &'a [u32],
}

impl Save {
    fn create(path: &Path) -> Result<Save> {
        let file = File::create(path).map_err(|e| Error::io(path, &e))?;
        Ok(Save { path: path.to_path_buf(), file })
    }

    fn row(&mut self, model: &ModelConfig, row: &EvalRow, outputs: &[Output], tokenizer: &Tokenizer) -> Result<()> {
        let mut lines = String::new();
        for output in outputs {
            let saved = Saved {
                model: model.dir.display().to_string(),
                row: &row.name,
                sample: output.sample,
                seed: row.seed,
                text: tokenizer.decode_all(&output.tokens),
                tokens: &output.tokens,
                draft: SavedDraft { text: tokenizer.decode_all(&output.draft), tokens: &output.draft },
            };
            lines += &serde_json::to_string(&saved).expect("plain data");
            lines.push('\n');
        }
        self.file.write_all(lines.as_bytes()).map_err(|e| Error::io(&self.path, &e))
    }
}
