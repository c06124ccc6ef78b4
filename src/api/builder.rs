//! Settings of an engine before its model is loaded.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::core::AnyCore;
use super::device::{Device, on_backend};
use super::engine::Engine;
use crate::backend::{Backend, DType, NumberTypes, WeightFormat};
use crate::config::ModelConfig;
use crate::engine::{Engine as EngineCore, EngineOptions};
use crate::error::{Error, Result};
use crate::input_file;
use crate::model::registry;
use crate::scheduler::Budget;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Bytes of weights in f32 up to which [`EngineBuilder::dtype`] defaults to f32.
const SMALL_MODEL_BYTES: usize = 1 << 30;
/// Positions that the K/V pages of one sequence hold by default.
const DEFAULT_POSITIONS: usize = 4096;

/// Called before each tensor is read, with the bytes of the tensors before it and the bytes in all.
type ProgressFn = Box<dyn FnMut(usize, usize)>;

/// Settings of an engine. [`EngineBuilder::open`] loads the model.
pub struct EngineBuilder {
    dir: PathBuf,
    device: Device,
    dtype: Option<DType>,
    weights: Option<WeightFormat>,
    threads: Option<usize>,
    max_sequences: usize,
    max_rows: usize,
    max_positions: Option<usize>,
    kv_pages: Option<usize>,
    page_size: usize,
    tokenizer: Option<Arc<Tokenizer>>,
    tokenizer_file: Option<PathBuf>,
    more_models: Vec<PathBuf>,
    joint: Option<PathBuf>,
    progress: ProgressFn,
}

impl Engine {
    /// Opens a Hugging Face directory (`config.json`, `*.safetensors`, `tokenizer.json`) or a GGUF
    /// file on the best device.
    ///
    /// Errors: [`crate::Error::Config`], [`crate::Error::Weights`] or [`crate::Error::Tokenizer`]
    /// with the file and what it lacks.
    pub fn open(dir: impl AsRef<Path>) -> Result<Engine> {
        Engine::builder(dir.as_ref()).open()
    }

    /// Settings for [`Engine::open`]: device, type of the weights, threads, memory, progress, more
    /// models.
    pub fn builder(dir: impl Into<PathBuf>) -> EngineBuilder {
        EngineBuilder::new(dir.into())
    }
}

impl EngineBuilder {
    pub(super) fn new(dir: PathBuf) -> EngineBuilder {
        let EngineOptions { budget, page_size, .. } = EngineOptions::default();
        EngineBuilder {
            dir,
            device: Device::default(),
            dtype: None,
            weights: None,
            threads: None,
            max_sequences: budget.max_sequences,
            max_rows: budget.max_rows,
            max_positions: None,
            kv_pages: None,
            page_size,
            tokenizer: None,
            tokenizer_file: None,
            more_models: Vec::new(),
            joint: None,
            progress: Box::new(|_, _| {}),
        }
    }

    /// Where the network runs; [`Device::Auto`] by default.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Type of K/V and of weights that are floats. By default f32, and bf16 for checkpoints of
    /// 16-bit weights that would take more than 1 GiB in f32.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// What weights that products read become while they are loaded, from any checkpoint. By
    /// default floats of [`EngineBuilder::dtype`]. Table and head keep 8 bits under
    /// [`WeightFormat::Q4`]; norms, biases and routers of experts stay floats.
    pub fn weights(mut self, format: WeightFormat) -> Self {
        self.weights = Some(format);
        self
    }

    /// CPU threads, as many as the process may run at once at most; one for each physical core by
    /// default. The result does not depend on them.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Requests in flight at once; the others wait. 8 by default.
    pub fn max_sequences(mut self, count: usize) -> Self {
        self.max_sequences = count;
        self
    }

    /// Rows that requests may share in one forward; 512 by default.
    pub fn max_rows(mut self, rows: usize) -> Self {
        self.max_rows = rows;
        self
    }

    /// Positions, prompt included, that each of [`EngineBuilder::max_sequences`] has K/V pages for.
    /// By default what the model was trained on, and 4,096 at most.
    pub fn max_positions(mut self, positions: usize) -> Self {
        self.max_positions = Some(positions);
        self
    }

    /// K/V pages in all, instead of what [`EngineBuilder::max_positions`] asks for.
    pub fn kv_pages(mut self, pages: usize) -> Self {
        self.kv_pages = Some(pages);
        self
    }

    /// Positions of a K/V page; 16 by default.
    pub fn page_size(mut self, positions: usize) -> Self {
        self.page_size = positions;
        self
    }

    /// This tokenizer instead of the directory's `tokenizer.json`.
    pub fn tokenizer(mut self, tokenizer: Arc<Tokenizer>) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// The tokenizer of this `tokenizer.json` instead of the directory's own. One that is given by
    /// [`EngineBuilder::tokenizer`] goes first.
    pub fn tokenizer_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.tokenizer_file = Some(path.into());
        self
    }

    /// Another model with the same vocabulary, for stages that name it: `weights=1` is the first
    /// one added.
    pub fn add_model(mut self, dir: impl Into<PathBuf>) -> Self {
        self.more_models.push(dir.into());
        self
    }

    /// Joint sampler of the first model, for stages with `sampler=joint`. By default the directory
    /// `joint` in the model's own, where there is one.
    pub fn joint_sampler(mut self, dir: impl Into<PathBuf>) -> Self {
        self.joint = Some(dir.into());
        self
    }

    /// Is called before each tensor is read: bytes of the tensors before it, bytes in all.
    pub fn progress(mut self, progress: impl FnMut(usize, usize) + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Loads the model, and those added.
    ///
    /// Errors: [`crate::Error::Config`], [`crate::Error::Weights`] or [`crate::Error::Tokenizer`]
    /// with the file and what it lacks; [`crate::Error::Device`] for a device that is absent or has
    /// too little memory.
    pub fn open(mut self) -> Result<Engine> {
        let config = registry::read_config(&self.dir)?;
        if let (None, Some(path)) = (&self.tokenizer, &self.tokenizer_file) {
            self.tokenizer = Some(Arc::new(Tokenizer::load(path, config.vocab_size)?.masked_by(config.mask_id)?));
        }
        let types = NumberTypes::of(self.dtype, self.weights, || default_dtype(&self.dir))?;
        let opened = self.device.open(types, self.threads)?;
        let core = on_backend!(opened.backend, |backend| self.load(backend, &config)?.into());
        Ok(Engine { core, dir: self.dir, passed_over: opened.passed_over, thread: None, template: OnceCell::new() })
    }

    fn load<B: Backend>(&mut self, backend: B, config: &ModelConfig) -> Result<EngineCore<B>> {
        let default = || config.decoded_length().min(DEFAULT_POSITIONS.next_multiple_of(self.page_size.max(1)));
        let positions = self.max_positions.unwrap_or_else(default);
        let pages = positions.div_ceil(self.page_size.max(1)).saturating_mul(self.max_sequences);
        let options = EngineOptions {
            budget: Budget { max_rows: self.max_rows, max_sequences: self.max_sequences },
            kv_pages: Some(self.kv_pages.unwrap_or(pages)),
            page_size: self.page_size,
            tokenizer: self.tokenizer.clone(),
            ..EngineOptions::default()
        };
        let mut core = EngineCore::load_with_progress(&self.dir, backend, options, &mut self.progress)?;
        for dir in &self.more_models {
            core.add_model(dir, &mut |_, _| {})?;
        }
        let own = self.dir.join("joint");
        match &self.joint {
            Some(dir) => core.attach_joint(dir, &mut |_, _| {})?,
            None => {
                let config = own.join("config.json");
                if input_file::exists(&config).map_err(|e| Error::io(&config, &e))? {
                    core.attach_joint(&own, &mut |_, _| {})?;
                }
            }
        }
        Ok(core)
    }
}

impl From<EngineCore<crate::cpu::Cpu>> for AnyCore {
    fn from(core: EngineCore<crate::cpu::Cpu>) -> AnyCore {
        AnyCore::Cpu(core)
    }
}

#[cfg(feature = "cuda")]
impl From<EngineCore<crate::cuda::Cuda>> for AnyCore {
    fn from(core: EngineCore<crate::cuda::Cuda>) -> AnyCore {
        AnyCore::Cuda(core)
    }
}

/// f32, and bf16 where nearly all weights are stored in 16 bits or fewer and would take more than
/// [`SMALL_MODEL_BYTES`] in f32.
pub(crate) fn default_dtype(dir: &Path) -> Result<DType> {
    Weights::open(dir).map(|weights| dtype_of(&weights))
}

/// [`default_dtype`] of weights that are open.
pub(super) fn dtype_of(weights: &Weights) -> DType {
    if let Some((_, dtype)) = weights.packed_types() {
        return dtype;
    }
    let large = weights.num_elements().saturating_mul(4) > SMALL_MODEL_BYTES;
    if weights.are_narrow() && large { DType::Bf16 } else { DType::F32 }
}
