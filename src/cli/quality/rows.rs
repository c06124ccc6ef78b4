//! What is compared: the rows of `bench --quality`, from a file, from flags, or the headline;
//! resolved and checked before anything is generated.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cli::files::read_text;
use crate::cli::generate;
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::registry;
use crate::schedule::{Schedule, StageSpec};

/// One line of `--rows`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowLine {
    name: String,
    stages: Option<Vec<String>>,
    preset: Option<String>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<u64>,
    model: Option<PathBuf>,
}

/// A schedule of one model, and the seed of its samples.
pub(super) struct EvalRow {
    pub name: String,
    /// Index into [`Rows::models`].
    pub model: usize,
    pub schedule: Schedule,
    pub seed: u64,
}

/// Sampling that holds where a row does not say otherwise.
#[derive(Clone, Copy)]
pub(super) struct RowSampling {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub seed: u64,
}

/// Rows and the models they name, each once. The first is the one of `--model`.
pub(super) struct Rows {
    pub models: Vec<ModelConfig>,
    pub rows: Vec<EvalRow>,
    /// Models that stages may name: 1 and those of further `--model` flags.
    num_weights: usize,
    sampling: RowSampling,
}

/// The headline: the draft, and a full refine of the draft by each way to choose what is masked
/// again.
const HEADLINE: [Option<&str>; 5] = [None, Some("snapshot"), Some("random"), Some("post-hoc"), Some("held-out:4")];

/// Share of tokens masked again in the headline rows.
const HEADLINE_RATIO: f64 = 0.35;

impl Rows {
    pub(super) fn new(model: ModelConfig, num_weights: usize, sampling: RowSampling) -> Result<Rows> {
        Ok(Rows { models: vec![model], rows: Vec::new(), num_weights: num_weights.max(1), sampling })
    }

    /// JSON lines. Errors name the file, the line and the row.
    pub(super) fn read(&mut self, path: &Path) -> Result<()> {
        let text = read_text(path)?;
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = format!("{}:{}", path.display(), number + 1);
            let parsed: RowLine = serde_json::from_str(line).map_err(|e| Error::request(format!("{place}: {e}")))?;
            let named = |error: Error| match error {
                // What is wrong with a model directory is already named by it, and is no misuse.
                Error::Request { what } => Error::request(format!("{place}: row `{}`: {what}", parsed.name)),
                other => other,
            };
            self.add(&parsed).map_err(named)?;
        }
        if self.rows.is_empty() {
            return Err(Error::request(format!("{}: expected a JSON object a line, found no row", path.display())));
        }
        Ok(())
    }

    /// One row for each preset.
    pub(super) fn presets(&mut self, names: &[String]) -> Result<()> {
        names.iter().try_for_each(|name| self.add(&RowLine { name: name.clone(), preset: Some(name.clone()), ..RowLine::default() }))
    }

    /// One row of `--stage` flags.
    pub(super) fn stages(&mut self, specs: &[StageSpec]) -> Result<()> {
        let schedule = Schedule::resolve(specs, &self.defaults(0, &RowLine::default())?)?;
        self.push("stages", 0, schedule, self.sampling.seed)
    }

    pub(super) fn headline(&mut self) -> Result<()> {
        let defaults = self.defaults(0, &RowLine::default())?;
        for by in HEADLINE {
            let refine = by.map(|by| format!("block=full,remask={HEADLINE_RATIO},by={by},unmask=linear:12,order=uniform,kv=refresh:12"));
            let stages = std::iter::once("block=trained,unmask=uniform:1").chain(refine.as_deref());
            let schedule = Schedule::resolve(&stages.map(str::parse).collect::<Result<Vec<_>>>()?, &defaults)?;
            self.push(by.unwrap_or("draft"), 0, schedule, self.sampling.seed)?;
        }
        self.push("did-lift", 0, Schedule::preset("did-lift", &defaults)?, self.sampling.seed)
    }

    fn defaults(&self, model: usize, line: &RowLine) -> Result<crate::schedule::Defaults> {
        let temperature = line.temperature.or(self.sampling.temperature);
        generate::defaults(&self.models[model], temperature, line.top_p.or(self.sampling.top_p), None, None)
    }

    fn add(&mut self, line: &RowLine) -> Result<()> {
        let model = line.model.as_deref().map_or(Ok(0), |dir| self.model(dir))?;
        let defaults = self.defaults(model, line)?;
        let schedule = match (&line.stages, &line.preset) {
            (Some(stages), None) => Schedule::resolve(&stages.iter().map(|s| s.parse()).collect::<Result<Vec<_>>>()?, &defaults)?,
            (None, Some(preset)) => Schedule::preset(preset, &defaults)?,
            (Some(_), Some(_)) => return Err(Error::request("expected stages or preset, found both")),
            (None, None) => return Err(Error::request("expected stages or preset, found neither")),
        };
        self.push(&line.name, model, schedule, line.seed.unwrap_or(self.sampling.seed))
    }

    fn push(&mut self, name: &str, model: usize, schedule: Schedule, seed: u64) -> Result<()> {
        if name.is_empty() {
            return Err(Error::request("name: expected a name, found an empty one"));
        }
        if self.rows.iter().any(|row| row.name == name) {
            return Err(Error::request(format!("name `{name}` is given to two rows")));
        }
        if let Some(missing) = schedule.stages().iter().map(|s| s.weights).find(|w| *w >= self.num_weights) {
            let known = self.num_weights;
            return Err(Error::request(format!("a stage names weights={missing}, {known} models are given with --model (counted from 0)")));
        }
        Engine::<Cpu>::check_schedule(&[&self.models[model]], &schedule)?;
        self.rows.push(EvalRow { name: name.into(), model, schedule, seed });
        Ok(())
    }

    /// Index of a model directory, whose configuration is read at its first mention.
    fn model(&mut self, dir: &Path) -> Result<usize> {
        if let Some(known) = self.models.iter().position(|config| config.dir == dir) {
            return Ok(known);
        }
        let config = registry::read_config(dir)?;
        self.models.push(config);
        Ok(self.models.len() - 1)
    }
}
