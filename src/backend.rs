//! The seam between the model and the machine: each method is a contract, and every backend is
//! tested against the plain loops in `cpu/oracle.rs` with the same test bodies.
//!
//! Buffers are contiguous, row-major and owned by the caller; inputs are `&`, outputs `&mut`;
//! shapes travel as small structs with named fields. Methods enqueue work; `download`,
//! `synchronize` and `sample` wait for it. The result of a row depends on that row and its own
//! sequence alone: every reduction has an order fixed by the row's own length, never by the number
//! of rows beside it or the number of threads (docs/architecture.md, determinism).
//!
//! Steps of a model over these ops have a protocol of their own:
//! ```text
//! engine    plans steps (PlannedStep), hands them to a runner, applies each StepOutcome
//! runner    makes a step's arrays and samples its rows (StepParts): on the host, or on a device
//!           that returns after the last step
//! network   a model and its K/V (Network): runs the layers over the runner's arrays and asks it
//!           to sample, once for the forward and once for each pass of a joint sampler
//! ```
//! On the host or on the device, the network runs the same ops in the same order.
#![forbid(unsafe_code)]

pub mod group_blocks;
pub mod groups;
pub mod host;
pub mod measure;
pub mod rope;
mod steps;

pub use rope::{Rope, RopeScaling};
pub use steps::{
    BannedIds, BannedSet, HostPass, HostReason, HostRule, HostSampling, HostSequence, HostWindow, PlannedJoint, PlannedPass, PlannedRun,
    PlannedStep, RowOutcome, RuleSampling, RunCanvas, SequenceStep, Sequences, StepOutcome, StepRows, StepSampling, Timing,
    WindowShortlist,
};

use crate::backend::groups::{Group4, Group8};
use crate::error::{Error, Result};
use crate::packed_weights::PackedWords;
use crate::plan::Plan;
use crate::sampling::{Draw, SampledToken};

/// Element type of weights and K/V. The residual stream is f32 everywhere, and so is accumulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// bfloat16: 16 bits, the exponent of f32.
    Bf16,
}

impl DType {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }
}

impl std::str::FromStr for DType {
    type Err = Error;

    /// Reads a [`DType::name`].
    fn from_str(text: &str) -> Result<DType> {
        let known = [DType::F32, DType::Bf16].into_iter().find(|dtype| dtype.name() == text);
        known.ok_or_else(|| Error::request(format!("dtype: expected f32 or bf16, found `{text}`")))
    }
}

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// Groups of 32 along k: codes of 8 bits and one scale, 8.5 bits a value.
    Q8,
    /// Groups of 32 along k: codes of 4 bits, one scale and one minimum, 5 bits a value.
    Q4,
}

impl WeightFormat {
    const ALL: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4];

    /// `f32`, `bf16`, `q8` or `q4`.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Q8 => "q8",
            WeightFormat::Q4 => "q4",
        }
    }

    /// Bits of a value, its share of scale and minimum included.
    pub fn bits(self) -> f64 {
        match self {
            WeightFormat::F32 => 32.0,
            WeightFormat::Bf16 => 16.0,
            WeightFormat::Q8 => 8.5,
            WeightFormat::Q4 => 5.0,
        }
    }

    /// The type of its numbers, where they are floats.
    pub fn float(self) -> Option<DType> {
        match self {
            WeightFormat::F32 => Some(DType::F32),
            WeightFormat::Bf16 => Some(DType::Bf16),
            WeightFormat::Q8 | WeightFormat::Q4 => None,
        }
    }
}

/// Types of the numbers that a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NumberTypes {
    /// Of K/V, and of weights that are floats.
    pub(crate) dtype: DType,
    /// Of weights that products read, where the caller chose one.
    pub(crate) weights: Option<WeightFormat>,
}

impl NumberTypes {
    /// `dtype` and `weights` as they were asked for; `default` is the dtype where neither says it.
    ///
    /// Errors: weights of one float type and a dtype of the other.
    pub(crate) fn of(dtype: Option<DType>, weights: Option<WeightFormat>, default: impl FnOnce() -> Result<DType>) -> Result<NumberTypes> {
        let dtype = match (dtype, weights.and_then(WeightFormat::float)) {
            (Some(dtype), Some(float)) if dtype != float => {
                let (dtype, float) = (dtype.name(), float.name());
                return Err(Error::request(format!("weights {float} and dtype {dtype}: expected one type, or weights q8 or q4")));
            }
            (Some(dtype), _) | (None, Some(dtype)) => dtype,
            (None, None) => default()?,
        };
        Ok(NumberTypes { dtype, weights })
    }

    /// `bf16`, or `q4 with bf16`.
    #[cfg(feature = "cli")]
    pub(crate) fn name(self) -> String {
        match self.weights.filter(|weights| weights.float().is_none()) {
            Some(weights) => format!("{} with {}", weights.name(), self.dtype.name()),
            None => self.dtype.name().into(),
        }
    }
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> WeightFormat {
        match dtype {
            DType::F32 => WeightFormat::F32,
            DType::Bf16 => WeightFormat::Bf16,
        }
    }
}

impl std::str::FromStr for WeightFormat {
    type Err = Error;

    /// Reads a [`WeightFormat::name`].
    fn from_str(text: &str) -> Result<WeightFormat> {
        let known = WeightFormat::ALL.into_iter().find(|format| format.name() == text);
        known.ok_or_else(|| Error::request(format!("weights: expected f32, bf16, q8 or q4, found `{text}`")))
    }
}

/// Shape of the paged K/V store. Slot s of a layer is page `s / page_size`, offset `s % page_size`;
/// how a page lies in memory is the backend's own business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub num_layers: usize,
    pub num_pages: usize,
    pub page_size: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

/// Head layout of a fused QKV row: `[H * D queries | K * D keys | K * D values]`, head-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl HeadShape {
    /// Width of a fused row.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
    /// Width of the attention output, H * D.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// What a norm divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `(x - mean) / sqrt(var + eps)`, biased variance.
    Layer,
    /// `x / sqrt(mean(x^2) + eps)`
    Rms,
}

/// A norm's parameters: `normalised x * weight + bias`, both (C) wide. `bias` carries a folded
/// adaLN shift.
pub struct Norm<'a, V: ?Sized> {
    pub kind: NormKind,
    pub eps: f32,
    pub weight: &'a V,
    pub bias: Option<&'a V>,
}

/// RMS norm of each head of q and k before they are rotated: `x / sqrt(mean(x^2) + eps) * weight`,
/// weights (D).
pub struct HeadNorm<'a, V: ?Sized> {
    pub q: &'a V,
    pub k: &'a V,
    pub eps: f32,
}

/// What `rope_append` does to q and k.
pub struct Rotation<'a, V: ?Sized> {
    pub rope: Rope,
    pub norm: Option<HeadNorm<'a, V>>,
}

impl<V: ?Sized> Rotation<'_, V> {
    /// Neither norm nor scaling.
    pub const fn plain(base: f32) -> Self {
        Rotation { rope: Rope::plain(base), norm: None }
    }
}

/// Elementwise tail of `linear`, applied after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x W^T + b`
    Store,
    /// `out = gelu_tanh(x W^T + b)`, `gelu_tanh(v) = v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`
    Gelu,
    /// `out += x W^T + b`
    Add,
    /// `out (rows, n / 2)[t, j] = silu(v[t, 2 j]) v[t, 2 j + 1]` with `v = x W^T + b` and
    /// `silu(g) = g / (1 + e^-g)`: gate and up of a column are neighbouring weight rows; n is
    /// even.
    SwiGlu,
}

impl Epilogue {
    /// Columns of `out` for n weight rows.
    pub fn out_width(self, n: usize) -> usize {
        if self == Epilogue::SwiGlu { n / 2 } else { n }
    }
}

/// Sizes of one layer's experts, each `down(silu(gate x) * up x)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// E.
    pub num_experts: usize,
    /// Experts that every row goes through.
    pub top_k: usize,
    /// C, the width of a row.
    pub hidden_dim: usize,
    /// F, the width between gate and down.
    pub expert_dim: usize,
}

/// How a router's logits become choices and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterScore {
    /// `p = softmax(logits)`; the k largest are chosen and weigh p, or p over the sum of the chosen
    /// where `renormalise` says so (Qwen3-MoE, arXiv 2505.09388).
    Softmax { renormalise: bool },
    /// `s = sigmoid(logits)`; choices are by `s + bias`, within the `top_groups` of `num_groups`
    /// groups of neighbouring experts whose two largest have the largest sum; a chosen expert
    /// weighs `s / (sum of the chosen + 1e-20) * scale`, without the bias (DeepSeek-V3, arXiv
    /// 2412.19437, equations 12 to 16; Ling 2.0 and LLaDA2).
    Sigmoid { num_groups: usize, top_groups: usize, scale: f32 },
}

/// A router: its rule, and where that is [`RouterScore::Sigmoid`] the (E) bias of the choice.
pub struct Router<'a, V: ?Sized> {
    pub score: RouterScore,
    pub bias: Option<&'a V>,
}

/// Experts of a layer at most: a warp holds the scores of a row.
pub const MAX_EXPERTS: usize = 1024;

impl ExpertShape {
    /// What makes a router of these sizes impossible, in words that begin with the offending
    /// number.
    pub fn check(&self, score: RouterScore) -> std::result::Result<(), String> {
        let ExpertShape { num_experts, top_k, hidden_dim, expert_dim } = *self;
        if !(1..=MAX_EXPERTS).contains(&num_experts) {
            return Err(format!("{num_experts} experts: expected 1 to {MAX_EXPERTS}"));
        }
        if hidden_dim == 0 || expert_dim == 0 {
            return Err(format!("experts of {hidden_dim} x {expert_dim}: expected sizes above 0"));
        }
        let mut choice = num_experts;
        if let RouterScore::Sigmoid { num_groups, top_groups, .. } = score {
            if !(1..=32).contains(&num_groups) || !num_experts.is_multiple_of(num_groups) {
                return Err(format!("{num_groups} groups: expected 1 to 32 of equal size, of {num_experts} experts"));
            }
            let size = num_experts / num_groups;
            if num_groups > 1 && size < 2 {
                return Err(format!("{num_groups} groups of one expert: a group counts by its two best"));
            }
            if !(1..=num_groups).contains(&top_groups) {
                return Err(format!("{top_groups} groups kept: expected 1 to {num_groups}"));
            }
            choice = top_groups * size;
        }
        if !(1..=choice).contains(&top_k) {
            return Err(format!("{top_k} experts for each row: expected 1 to {choice}"));
        }
        Ok(())
    }
}

/// One expert of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertChoice {
    pub expert: u32,
    pub weight: f32,
}

/// Activations of one kind, by their number of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    F32(usize),
    /// What only `linear` and `sample` read: they round to the weight dtype anyway, so a backend
    /// may store it in that.
    Input(usize),
}

/// Rows of a weight, read on demand by several threads at once. A closure of the signature of
/// [`RowSource::read`] is one.
pub trait RowSource: Sync {
    /// Writes `dst.len() / k` rows of k values, from `first_row` on.
    fn read(&self, first_row: usize, dst: &mut [f32]) -> Result<()>;

    /// Writes the groups of some rows as they are stored, from `first_row` on; false where they are
    /// not stored in groups of 8 bits.
    fn read_q8(&self, _first_row: usize, _dst: &mut [Group8]) -> Result<bool> {
        Ok(false)
    }

    /// The same of 4 bits.
    fn read_q4(&self, _first_row: usize, _dst: &mut [Group4]) -> Result<bool> {
        Ok(false)
    }
}

/// The rows of a source from one on.
pub struct RowsFrom<'a> {
    pub source: &'a dyn RowSource,
    pub first: usize,
}

impl RowSource for RowsFrom<'_> {
    fn read(&self, first_row: usize, dst: &mut [f32]) -> Result<()> {
        self.source.read(self.first + first_row, dst)
    }

    fn read_q8(&self, first_row: usize, dst: &mut [Group8]) -> Result<bool> {
        self.source.read_q8(self.first + first_row, dst)
    }

    fn read_q4(&self, first_row: usize, dst: &mut [Group4]) -> Result<bool> {
        self.source.read_q4(self.first + first_row, dst)
    }
}

impl<F: Fn(usize, &mut [f32]) -> Result<()> + Sync> RowSource for F {
    fn read(&self, first_row: usize, dst: &mut [f32]) -> Result<()> {
        self(first_row, dst)
    }
}

/// How a weight lies in memory, which follows from the ops that read it. Row-major at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightShape {
    /// (n, k) for `linear`, `sample`, `shortlist` and `embed`.
    Matrix { n: usize, k: usize },
    /// (n, k) for `embed` alone.
    Table { n: usize, k: usize },
    /// `num` weights of (n, k) for `experts`. Row r of the source is row `r % n` of weight `r / n`.
    Experts { num: usize, n: usize, k: usize },
}

/// Ids that `sample` may choose.
#[derive(Debug)]
pub enum Candidates<'a, L> {
    /// All ids but these.
    AllBut(&'a [u32]),
    /// Those of list `which[i]` for row i.
    Shortlists { lists: &'a L, which: &'a [u32] },
}

/// A list whose length the host knows.
pub trait RowList {
    /// Number of rows, padding included.
    fn num_rows(&self) -> usize;
}

impl RowList for Vec<u32> {
    fn num_rows(&self) -> usize {
        self.len()
    }
}

/// What `sample` says about a forced token that it cannot choose.
pub(crate) fn not_on_shortlist(row: usize, token: u32) -> Error {
    Error::request(format!("row {row}: token {token} is not on the shortlist of the row: it cannot be chosen there (shortlist=all)"))
}

/// A machine that can run the network: memory, and one method for each op.
pub trait Backend: Sized {
    /// f32 elements: activations and small parameters (norm weights, biases).
    type Buffer;
    /// A weight in the backend's weight dtype, or one for each expert.
    type Weight;
    /// All layers' pages.
    type KvCache;
    /// A plan where the kernels can read it.
    type Batch;
    /// A list of row indices where the kernels can read it.
    type Rows: RowList;
    /// Some ids for each of some rows, where the kernels can read them.
    type Shortlists;
    /// The experts of every row, in the order of the experts, and buffers for the rows on their way
    /// through them.
    type Routing;
    /// Runs planned steps, on the host or on a device that samples by itself.
    type Runner: StepRunner<Self> + Default;

    /// Maximum number of ids that a list of `shortlist` may hold.
    const MAX_SHORTLIST: usize;

    /// Device name for reports, e.g. `cpu (avx512-bf16, 2 threads)`.
    fn name(&self) -> String;
    /// Type of K/V, and of weights that are floats.
    fn dtype(&self) -> DType;
    /// What weights become that products read, where the caller chose a format; otherwise they are
    /// as the file has them.
    fn weight_format(&self) -> Option<WeightFormat>;

    /// Zeros for activations, from one allocation where the backend can.
    fn alloc<const N: usize>(&self, parts: [Activation; N]) -> Result<[Self::Buffer; N]>;
    /// A buffer of f32 elements with these values.
    fn upload(&self, src: &[f32]) -> Result<Self::Buffer>;
    /// Copies `dst.len()` elements starting at `offset`. Waits.
    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<()>;
    /// Waits for everything enqueued.
    fn synchronize(&self) -> Result<()>;
    /// Packs a weight, reading it some rows at a time so that no second full copy exists. Floats
    /// are of [`Backend::dtype`].
    fn weight_as(&self, format: WeightFormat, shape: WeightShape, source: &dyn RowSource) -> Result<Self::Weight>;
    /// Takes a weight in groups whose words lie ready, as [`Backend::words`] gives them.
    ///
    /// Errors: words of another weight.
    fn weight_of_words(&self, format: WeightFormat, shape: WeightShape, words: PackedWords) -> Result<Self::Weight>;
    /// The words of a weight in groups, one part after the other, and no parts for floats; `None`
    /// where they are not in the memory of the host.
    fn words<'w>(&self, weight: &'w Self::Weight) -> Option<Vec<&'w [u32]>>;
    /// Packs a weight in [`Backend::dtype`].
    fn weight(&self, shape: WeightShape, source: &dyn RowSource) -> Result<Self::Weight> {
        self.weight_as(self.dtype().into(), shape, source)
    }
    /// Buffers for the routing of up to `rows` rows through experts of this shape.
    fn routing(&self, rows: usize, shape: ExpertShape) -> Result<Self::Routing>;
    /// Pages filled with NaN: a slot that is read before it is written poisons the result instead
    /// of looking plausible.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache>;
    /// Copies all layers of page `src` to page `dst` (copy on write).
    fn copy_page(&self, kv: &mut Self::KvCache, src: u32, dst: u32) -> Result<()>;
    /// Makes a plan readable by the kernels; done once per forward.
    fn batch(&self, plan: &Plan) -> Result<Self::Batch>;
    /// Makes row indices readable by the kernels.
    fn rows(&self, rows: &[u32]) -> Result<Self::Rows>;

    /// `out[t, :] = table[ids[t], :]`, `+ positions[position of t, :]` where positions are learned;
    /// weights are tables, or matrices where they are also the head. T from the batch; `out` holds
    /// at least T * k.
    fn embed(&self, batch: &Self::Batch, table: &Self::Weight, positions: Option<&Self::Weight>, out: &mut Self::Buffer) -> Result<()>;
    /// `out (rows, C) = norm(x (rows, C))` row by row, C the width of the norm's weight; statistics
    /// in f32 or wider. With a residual (rows, C) first `x += residual`; without one x stays as it
    /// is.
    fn norm(
        &self,
        rows: usize,
        x: &mut Self::Buffer,
        residual: Option<&Self::Buffer>,
        norm: &Norm<Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out (rows, n) <- epilogue(x (rows, k) W^T + bias)`, n halved by [`Epilogue::SwiGlu`]. With
    /// bf16 weights x is rounded to bf16 (nearest even) first; f32 accumulation over k in a fixed
    /// order. With weights in groups ([`groups`]) a backend may round x to 8 bits a value, under a
    /// scale for each 32 of a row.
    fn linear(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The experts of each row from the router's `logits (rows, E)`, f32: k of them by the rule of
    /// `router`, ties to the lower expert, kept in ascending order. A NaN logit ranks below every
    /// number.
    fn route(&self, rows: usize, logits: &Self::Buffer, router: &Router<Self::Buffer>, routing: &mut Self::Routing) -> Result<()>;
    /// `out (rows, C) += sum over the row's experts e, ascending, of weight_e * down_e(silu(gate_e
    /// x) * up_e x)` for the rows of the last `route`: `up` is E x (2F, C) with gate and up of a
    /// column in neighbouring rows, `down` E x (C, F). Products as in `linear`, over the rows of an
    /// expert together; the sum starts from zero and is added to `out` at its end. A row's result
    /// does not depend on the rows that share its experts.
    fn moe(
        &self,
        routing: &mut Self::Routing,
        x: &Self::Buffer,
        up: &Self::Weight,
        down: &Self::Weight,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Norms the heads of q and k of each fused QKV row where the rotation says so, rotates the
    /// first R elements of q (in place) and k by the row's position (half-split RoPE: pairs (i, i +
    /// R/2), angle `position * frequency(i)`, f32), then writes k and v to the row's slot of
    /// `layer`. What stays in the place of k is unspecified.
    fn rope_append(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        rotation: &Rotation<Self::Buffer>,
        qkv: &mut Self::Buffer,
        layer: usize,
        kv: &mut Self::KvCache,
    ) -> Result<()>;
    /// `out (T, H * D)`: softmax(q k^T / sqrt(D)) v for each row over keys [0, visible) of its own
    /// sequence, through the page table. Head h reads K/V head `h / (H / K)`. A row with no visible
    /// key gives zeros. Slots at or beyond the end of a row's visible range are never read into its
    /// result.
    fn attention(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        qkv: &Self::Buffer,
        layer: usize,
        kv: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out[r, :] = x[rows[r], :]` for rows of `width` f32 elements.
    fn gather(&self, rows: &Self::Rows, width: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// `out[i] = base[i] + scale * (out[i] - base[i])` for the first `len` elements of f32 buffers.
    fn apply_guidance(&self, len: usize, scale: f32, base: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Copies the first `len` elements of an f32 buffer.
    fn copy(&self, len: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// LM head and token choice for `draws.len()` rows of `hidden` (width k of `head`): logits =
    /// hidden head^T + bias, those of ids that are no candidates -inf, then the rules of
    /// `sampling::sample_row`. Logits of all rows never exist at once. NaN logits are an error
    /// naming the row. Waits.
    ///
    /// Logits of a shortlist alone are products over k in a fixed order that may be another than
    /// that of all ids. A forced token that is not on the shortlist is an error.
    fn sample(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Weight,
        bias: Option<&Self::Buffer>,
        candidates: Candidates<Self::Shortlists>,
        draws: &[Draw],
    ) -> Result<Vec<SampledToken>>;
    /// The ids of the `n` largest logits of each of the first `rows` rows of `hidden`, as `sample`
    /// sees them: banned ids and logits of -inf excluded, ties to the lower id, fewer where there
    /// are fewer. Of a row with a NaN, which `sample` refuses, the list is any list. `n` is at most
    /// `MAX_SHORTLIST`.
    fn shortlist(
        &self,
        rows: usize,
        hidden: &Self::Buffer,
        head: &Self::Weight,
        bias: Option<&Self::Buffer>,
        banned: &[u32],
        n: usize,
    ) -> Result<Self::Shortlists>;
}

/// What tests read back of a backend beside its buffers.
pub trait Inspect: Backend {
    /// What the last `route` chose, (rows, k). Waits.
    fn expert_choices(&self, routing: &Self::Routing) -> Result<Vec<ExpertChoice>>;
    /// The ids of each list, ascending. Waits.
    fn shortlist_ids(&self, lists: &Self::Shortlists) -> Result<Vec<Vec<u32>>>;
}

/// Runs planned steps on a backend.
pub trait StepRunner<B: Backend> {
    /// Whether this runner takes several steps at once that are sampled by rules.
    fn looks_ahead(&self, backend: &B) -> bool;
    /// Runs the steps, and hands what was sampled to `sequences`.
    fn run(&mut self, backend: &B, network: &mut dyn Network<B>, run: &PlannedRun, sequences: &mut dyn Sequences) -> Result<()>;
    /// Times the run's one step: once unmeasured, then `runs` times.
    fn time(
        &mut self,
        backend: &B,
        network: &mut dyn Network<B>,
        run: &PlannedRun,
        sequences: &mut dyn Sequences,
        runs: usize,
    ) -> Result<Timing>;
}

/// A model with its K/V store, activations and joint sampler.
pub trait Network<B: Backend> {
    /// Reserves buffers; they move only where they were too small.
    fn reserve(&mut self, backend: &B, rows: StepRows) -> Result<()>;
    /// Names the weights and buffers that a step uses: those of the model, the activations, and the
    /// states of a joint sampler.
    fn key(&self, joint: bool) -> [u64; 3];
    /// Heads of its layers.
    fn heads(&self) -> HeadShape;
    /// Enqueues a step: forward, sampling, and a joint sampler's passes with theirs.
    fn step(&mut self, backend: &B, parts: &mut dyn StepParts<B>) -> Result<()>;
}

/// One step as its runner has it: where its arrays lie, and what samples its rows.
pub trait StepParts<B: Backend> {
    /// What the step's forward runs over; called once, at first.
    fn begin(&mut self, backend: &B) -> Result<StepBatches<B>>;
    /// Samples the rows to sample: of the forward, then of each pass.
    fn sample(&mut self, backend: &B, sample_rows: RowsToSample<B>) -> Result<()>;
    /// The next pass of a joint sampler; called where the step has windows.
    fn pass(&mut self, backend: &B) -> Result<Option<PassBatch<B>>>;
}

/// The batches of a step.
pub struct StepBatches<B: Backend> {
    /// The forward without the prompt, before the other, whose picked rows are those that are
    /// guided.
    pub guide: Option<ForwardBatch<B>>,
    pub forward: ForwardBatch<B>,
    /// Those of the picked rows that are sampled; `None`: all of them, in order.
    pub sample_rows: Option<B::Rows>,
    pub windows: Option<Windows<B>>,
}

/// A forward where the kernels can read it.
pub struct ForwardBatch<B: Backend> {
    pub batch: B::Batch,
    /// Rows of it, padding included.
    pub rows: usize,
    pub picked: Picked<B>,
}

/// Which rows go through the last layer; the others stop at its K/V.
pub enum Picked<B: Backend> {
    All,
    /// Rows, ascending, some maybe twice, and the batch of them alone, for `attention`.
    Rows(B::Rows, B::Batch),
    Nothing,
}

/// What a joint sampler takes from a forward.
pub struct Windows<B: Backend> {
    /// Among the picked rows: those that the states of the windows begin as.
    pub inside: B::Rows,
    /// Those outside, and the same as a batch, without a work list for `attention`.
    pub outside: B::Rows,
    pub outside_batch: B::Batch,
    /// Lists to make from the states while they are still the model's own rows.
    pub shortlists: Vec<WindowShortlist>,
}

/// A pass of a joint sampler where the kernels can read it.
pub struct PassBatch<B: Backend> {
    pub batch: B::Batch,
    /// Rows of it, padding included.
    pub rows: usize,
    /// Rows of it that are sampled.
    pub sample_rows: B::Rows,
    /// Which rows of the pass before it are its own, where not all are.
    pub kept: Option<B::Rows>,
}

/// The final hidden rows to sample from, and the head over them.
pub struct RowsToSample<'a, B: Backend> {
    /// (sampled rows, C), in f32 where the step is guided.
    pub hidden: &'a B::Buffer,
    /// C.
    pub width: usize,
    pub head: &'a B::Weight,
    pub bias: Option<&'a B::Buffer>,
    /// Final rows of the guide's picked rows, in f32.
    pub guide: Option<&'a B::Buffer>,
    /// Scratch buffers of (sampled rows, C) f32 each.
    pub scratch: [&'a mut B::Buffer; 2],
    /// Of [`Windows::shortlists`].
    pub lists: &'a [B::Shortlists],
}
