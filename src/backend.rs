//! The seam between the model and the machine: each method is a contract, and every backend is tested against the
//! plain loops in `cpu/oracle.rs` with the same test bodies.
//!
//! Buffers are contiguous, row-major and owned by the caller; inputs are `&`, outputs `&mut`; shapes travel as small
//! structs with named fields. Methods enqueue work; `download`, `synchronize` and `decide` wait for it. The result of a
//! row depends on that row and its own sequence alone: every reduction has an order fixed by the row's own length,
//! never by the number of rows beside it or the number of threads (design section 5, law 1).
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::plan::Plan;

/// Element type of weights and K/V. Activations between ops are f32 on the CPU; accumulation is f32 everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    Bf16,
}

impl DType {
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }
}

/// Shape of the paged K/V store. Slot s of a layer is page `s / page_size`, offset `s % page_size`; how a page lies in
/// memory is the backend's own business.
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

/// Elementwise tail of `linear`, applied after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x W^T + b`
    Store,
    /// `out = gelu_tanh(x W^T + b)`, `gelu_tanh(v) = v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`
    Gelu,
    /// `out += x W^T + b`
    Add,
}

/// Which published nucleus rule applies (design section 3; did-bd3lm B.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TopPRule {
    /// Keep tokens, most probable first, while the cumulative sum *including* the token is <= p; always the first. [BD3-LM]
    Within,
    /// Also keep the token that crosses p (Hugging Face, Dream).
    Crossing,
}

/// What is asked of one masked row: a token draw, or the probability of a given token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Uniform in [0, 1) with 53 random bits.
    pub u: f64,
    /// 0 takes the most probable token (ties: lowest id) and ignores `u`.
    pub temperature: f32,
    /// In (0, 1]; 1 keeps everything.
    pub top_p: f32,
    pub top_p_rule: TopPRule,
    /// `Some(t)`: choose t instead of drawing (scoring, teacher forcing).
    pub forced: Option<u32>,
    /// Report the probability after temperature and nucleus instead of the raw one.
    pub truncated_confidence: bool,
}

/// The answer for one row. Raw quantities are under softmax(logits) with banned ids excluded, before temperature and nucleus.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub token: u32,
    /// Probability of `token`: raw, or after temperature and nucleus where the draw asks for it.
    pub confidence: f32,
    /// ln of the raw probability of `token`.
    pub log_prob: f32,
    /// Raw top-1 minus top-2 probability.
    pub margin: f32,
    /// Raw entropy in nats.
    pub entropy: f32,
}

/// Reads rows of a weight on demand: `fill(first_row, dst)` writes `dst.len() / k` rows of k f32 values.
pub type RowSource<'a> = dyn FnMut(usize, &mut [f32]) -> Result<()> + 'a;

/// A machine that can run the network.
pub trait Backend {
    /// Activations, f32 elements.
    type Buffer;
    /// A packed (n, k) weight in the backend's weight dtype.
    type Matrix;
    /// A small f32 parameter vector (norm weights, biases).
    type Vector;
    /// All layers' pages.
    type KvCache;
    /// A plan where the kernels can read it.
    type Batch;

    /// Device name for reports, e.g. `cpu (avx512-bf16, 2 threads)`.
    fn name(&self) -> String;
    /// Weight and K/V dtype.
    fn dtype(&self) -> DType;

    /// `len` zeros.
    fn alloc(&self, len: usize) -> Result<Self::Buffer>;
    /// Copies `dst.len()` elements starting at `offset`. Waits.
    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<()>;
    /// Waits for everything enqueued.
    fn synchronize(&self) -> Result<()>;
    /// Uploads a parameter vector.
    fn vector(&self, src: &[f32]) -> Result<Self::Vector>;
    /// Packs an (n, k) row-major weight for `linear`, reading it a panel of rows at a time so that no second full copy exists.
    fn matrix(&self, n: usize, k: usize, source: &mut RowSource) -> Result<Self::Matrix>;
    /// Stores an (n, k) table for `embed` in the weight dtype, row-major.
    fn table(&self, n: usize, k: usize, source: &mut RowSource) -> Result<Self::Matrix>;
    /// Pages filled with NaN: a slot that is read before it is written poisons the result instead of looking plausible.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache>;
    /// Copies all layers of page `src` to page `dst` (copy on write).
    fn copy_page(&self, kv: &mut Self::KvCache, src: u32, dst: u32) -> Result<()>;
    /// Fills all layers of a freed page with NaN (tests of the page laws).
    fn poison_page(&self, kv: &mut Self::KvCache, page: u32) -> Result<()>;
    /// Makes a plan readable by the kernels; done once per forward.
    fn batch(&self, plan: &Plan) -> Result<Self::Batch>;

    /// `out[t, :] = table[ids[t], :]`. T from the batch; `out` holds at least T * k.
    fn embed(&self, batch: &Self::Batch, table: &Self::Matrix, out: &mut Self::Buffer) -> Result<()>;
    /// LayerNorm over each of `rows` rows of width `weight.len()`: `(x - mean) / sqrt(var + eps) * weight + bias`, biased variance,
    /// statistics in f32 or wider. `bias` carries a folded adaLN shift.
    fn layer_norm(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Vector,
        bias: Option<&Self::Vector>,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out (rows, n) <- epilogue(x (rows, k) W^T + bias)`. With bf16 weights x is rounded to bf16 (nearest even) first; f32 accumulation over k in a fixed order.
    fn linear(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Rotates q (in place) and k of each fused QKV row by its position (half-split RoPE: pairs (i, i + D/2), angle `position * base^(-2i/D)`, f32), then writes
    /// k and v to the row's slot of `layer`.
    fn rope_append(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        base: f32,
        qkv: &mut Self::Buffer,
        layer: usize,
        kv: &mut Self::KvCache,
    ) -> Result<()>;
    /// `out (T, H * D)`: softmax(q k^T / sqrt(D)) v for each row over keys [0, visible) of its own sequence, through the page table. Head h reads
    /// K/V head `h / (H / K)`. A row with no visible key gives zeros. Slots at or beyond the end of a row's visible range are never read into its result.
    fn attention(
        &self,
        batch: &Self::Batch,
        heads: HeadShape,
        qkv: &Self::Buffer,
        layer: usize,
        kv: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out[r, :] = x[rows[r], :]` for rows of `width` elements.
    fn gather(&self, rows: &[u32], width: usize, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// LM head and token choice for `draws.len()` rows of `hidden` (width k of `head`): logits = hidden head^T + bias, banned ids excluded, then the law of
    /// `policy::decide_row`. Logits of all rows never exist at once. NaN logits are an error naming the row. Waits.
    fn decide(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Matrix,
        bias: Option<&Self::Vector>,
        banned: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<Decision>>;
}
