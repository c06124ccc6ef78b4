//! Launcher of `sample`: LM head and token choice of rows, as `sampling::sample_row` specifies.
//!
//! Two routes, chosen by each row's own draw. Most rows take A: `sample_tiles` computes logits tile
//! by tile and keeps a few sums, `sample_draw` samples from those, and the logits of a row never
//! exist. Draws from a nucleus (`top_p < 1`), and those that want the statistics of what is left of
//! a distribution (`truncated_confidence`), take B: the logits of a chunk of rows are written by
//! `linear`, and `sample_nucleus` reads them. Where both routes run, both compute all rows and each
//! samples its own.
#![forbid(unsafe_code)]

use crate::backend::group_blocks::Bits;
use crate::backend::{DType, Epilogue};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::ops::linear;
use crate::cuda::ops::linear::{Linear, Pipeline, pipeline};
use crate::cuda::ops::weight::{KINDS, WeightAt, bits_define};
use crate::cuda::params::params;
use crate::error::{Error, Result};
use crate::sampling::{Draw, SampledToken, TopK, TopKOrder, TopPRule};

params! {
    /// How a row is sampled.
    DrawRecord, 32 bytes {
        u: f64 = 0,
        temperature: f32 = 8,
        top_p: f32 = 12,
        /// See [`flag`].
        flags: u32 = 16,
        /// The token to choose under [`flag::FORCED`].
        forced: u32 = 20,
        /// Passed on to the record that is written.
        position: u32 = 24,
        sequence: u32 = 28,
    }
}

params! {
    /// The sampled token of a row.
    SampledRecord, 32 bytes {
        token: u32 = 0,
        confidence: f32 = 4,
        log_prob: f32 = 8,
        margin: f32 = 12,
        entropy: f32 = 16,
        /// See [`status`].
        status: u32 = 20,
        position: u32 = 24,
        /// 1 where `unmask` took the row.
        chosen: u32 = 28,
    }
}

/// Flags of a [`DrawRecord`], the `DRAW_*` of `kernels/sample.cuh`.
pub mod flag {
    pub const CROSSING: u32 = 1;
    pub const TRUNCATED: u32 = 2;
    pub const FORCED: u32 = 4;
    /// A padding row: nothing is written for it.
    pub const PADDING: u32 = 8;
    /// The nucleus is one of the whole distribution, not of what top-k leaves.
    pub const TOP_K_AFTER: u32 = 16;
    /// The bits above hold the k of top-k, 0 for none.
    pub const TOP_K_SHIFT: u32 = 8;
}

/// Status of a [`SampledRecord`], the `STATUS_*` of `kernels/sample.cuh`.
pub mod status {
    pub const OK: u32 = 0;
    /// A logit is NaN or +inf; `token` is the lowest id of such.
    pub const BROKEN: u32 = 1;
    /// No finite logit that is not banned.
    pub const NOTHING: u32 = 2;
    /// `token`, which was forced, is banned or outside the vocabulary.
    pub const FORCED: u32 = 3;
    /// The logits of the row differ between two passes over them: memory was overwritten meanwhile,
    /// or is damaged.
    pub const CHANGED: u32 = 4;
}

impl From<&Draw> for DrawRecord {
    fn from(draw: &Draw) -> Self {
        let rule = if draw.top_p_rule == TopPRule::Crossing { flag::CROSSING } else { 0 };
        let truncated = if draw.truncated_confidence { flag::TRUNCATED } else { 0 };
        let forced = if draw.forced.is_some() { flag::FORCED } else { 0 };
        // More than the ids that a vocabulary may have keeps everything.
        let top_k = draw.top_k.map_or(0, |TopK { k, order }| {
            let after = if order == TopKOrder::After { flag::TOP_K_AFTER } else { 0 };
            k.min(u32::MAX >> flag::TOP_K_SHIFT) << flag::TOP_K_SHIFT | after
        });
        DrawRecord {
            u: draw.u,
            temperature: draw.temperature,
            top_p: draw.top_p,
            flags: rule | truncated | forced | top_k,
            forced: draw.forced.unwrap_or(0),
            ..DrawRecord::default()
        }
    }
}

impl SampledRecord {
    /// As the backend's type.
    ///
    /// Errors: as `sampling::sample_row`, naming `row`.
    pub fn sampled(&self, row: usize) -> Result<SampledToken> {
        let SampledRecord { token, confidence, log_prob, margin, entropy, .. } = *self;
        match self.status {
            status::OK => Ok(SampledToken { token, confidence, log_prob, margin, entropy }),
            status::BROKEN => {
                Err(Error::kernel(format!("row {row}: logit of token {token} is NaN or inf: the weights or activations are not finite")))
            }
            status::NOTHING => Err(Error::kernel(format!("row {row}: no token has a finite logit that is not banned"))),
            status::FORCED => Err(Error::request(format!("row {row}: token {token} is banned or outside the vocabulary"))),
            status::CHANGED => Err(Error::kernel(format!(
                "row {row}: the logits changed while a token was drawn from them: device memory is damaged or overwritten"
            ))),
            other => Err(Error::kernel(format!("row {row}: nothing sampled, its status is {other}"))),
        }
    }
}

/// Whether a draw takes route B: [`SampleOp::any_nucleus`] if one does, [`SampleOp::any_fused`] if
/// one does not.
pub fn needs_nucleus(draw: &Draw) -> bool {
    // At temperatures 0 and 1, what is left where nothing is taken away is the raw distribution.
    let tempered = draw.temperature != 0.0 && draw.temperature != 1.0;
    let cut = draw.top_p < 1.0 || draw.top_k.is_some();
    draw.forced.is_none() && (draw.temperature != 0.0 && cut || draw.truncated_confidence && (tempered || cut))
}

params! {
    /// `sample_tiles`: entries `sample_tiles_f32` and `sample_tiles_bf16` by the type of hidden.
    SampleTilesParams, 64 bytes {
        /// (rows, k) f32 or bf16.
        hidden: u64 = 0,
        /// (vocab, k), the same type or blocks.
        head: u64 = 8,
        /// (vocab) f32, or 0 for none.
        bias: u64 = 16,
        /// A bit for every id, or 0 for none.
        banned: u64 = 24,
        /// (rows) [`DrawRecord`].
        draws: u64 = 32,
        /// (rows, tiles) records of 32 bytes.
        tiles: u64 = 40,
        rows: u32 = 48,
        vocab: u32 = 52,
        k: u32 = 56,
        padding: u32 = 60,
    }
}

params! {
    /// `sample_draw`: entries `sample_draw_f32` and `sample_draw_bf16`. Fields as in
    /// [`SampleTilesParams`].
    SampleDrawParams, 64 bytes {
        hidden: u64 = 0,
        head: u64 = 8,
        bias: u64 = 16,
        banned: u64 = 24,
        draws: u64 = 32,
        tiles: u64 = 40,
        /// (rows) [`SampledRecord`].
        sampled: u64 = 48,
        vocab: u32 = 56,
        k: u32 = 60,
    }
}

params! {
    /// `sample_nucleus`: one entry.
    SampleNucleusParams, 40 bytes {
        /// (rows, vocab) f32.
        logits: u64 = 0,
        banned: u64 = 8,
        draws: u64 = 16,
        sampled: u64 = 24,
        vocab: u32 = 32,
        padding: u32 = 36,
    }
}

/// Ids of a vocabulary tile, IDS in `kernels/sample.cuh`.
const IDS: u32 = 128;
/// Bytes of a TileRecord there.
const TILE_BYTES: usize = 32;
/// Groups of 32 tiles that `sample_draw` holds at most, 8 bytes each: 4,194,304 ids.
const MAX_GROUPS: u32 = 1024;
/// Threads of `sample_nucleus`, a row.
const NUCLEUS_THREADS: u32 = 512;
/// Workspace that tile records or logits may take; beyond it rows go through in chunks. 64 MiB are
/// 333 rows of 50,258 logits, or 5,336 rows of their tiles.
pub(in crate::cuda) const CHUNK_BYTES: usize = 64 << 20;

/// One build of `sample_tiles`: `rows` rows of IDS ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TilesBuild {
    rows: u32,
    threads: u32,
    /// Warps side by side along the ids.
    col_warps: u32,
    /// Where the head is of floats, and where it is in groups.
    floats: Pipeline,
    groups: Pipeline,
}

/// By rows; up to 64 all rows share one reading of the head. The last fills 96 of the 99 KiB that
/// every machine has.
const TILES: [TilesBuild; 5] = [
    TilesBuild { rows: 8, threads: 128, col_warps: 4, floats: pipeline(4, 3), groups: pipeline(6, 3) },
    TilesBuild { rows: 16, threads: 128, col_warps: 4, floats: pipeline(4, 3), groups: pipeline(6, 3) },
    TilesBuild { rows: 32, threads: 128, col_warps: 4, floats: pipeline(4, 2), groups: pipeline(6, 2) },
    TilesBuild { rows: 64, threads: 256, col_warps: 4, floats: pipeline(3, 2), groups: pipeline(4, 1) },
    TilesBuild { rows: 128, threads: 256, col_warps: 2, floats: pipeline(3, 1), groups: pipeline(3, 1) },
];

impl TilesBuild {
    fn pipeline(&self, bits: Option<Bits>) -> Pipeline {
        if bits.is_none() { self.floats } else { self.groups }
    }

    fn build(&self, bits: Option<Bits>) -> Build {
        let defines = vec![
            ("GROUP_BITS", bits_define(bits)),
            ("THREADS", self.threads),
            ("TILE_ROWS", self.rows),
            ("TILE_COL_WARPS", self.col_warps),
            ("TILE_STAGES", self.pipeline(bits).stages),
            ("TILE_CTAS", self.pipeline(bits).resident),
        ];
        Build { stem: "sample_tiles", defines }
    }

    fn launch(&self, rows: u32, vocab: u32, dtype: DType, bits: Option<Bits>) -> Launch {
        let shared_bytes =
            linear::product_bytes(dtype, bits, self.rows, IDS, self.threads / 32 / self.col_warps, self.pipeline(bits).stages);
        Launch { grid: [rows.div_ceil(self.rows) * vocab.div_ceil(IDS), 1, 1], block: self.threads, shared_bytes }
    }
}

/// The lowest tile that holds all rows, else the highest. Never changes a bit of the result.
fn tile(rows: u32) -> TilesBuild {
    *TILES.iter().find(|tile| rows <= tile.rows).unwrap_or(&TILES[TILES.len() - 1])
}

fn draw_build(bits: Option<Bits>) -> Build {
    Build { stem: "sample_draw", defines: vec![("GROUP_BITS", bits_define(bits)), ("THREADS", 64), ("MAX_GROUPS", MAX_GROUPS)] }
}

/// Five stages of a tile of 8 x 32.
fn draw_launch(rows: u32, dtype: DType, bits: Option<Bits>) -> Launch {
    Launch { grid: [rows, 1, 1], block: 64, shared_bytes: linear::product_bytes(dtype, bits, 8, 32, 1, 5) }
}

fn nucleus_build() -> Build {
    Build { stem: "sample_nucleus", defines: vec![("THREADS", NUCLEUS_THREADS)] }
}

/// The builds of these kernels.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    let of = |bits| TILES.iter().map(move |tile| tile.build(bits)).chain([draw_build(bits)]);
    KINDS.into_iter().flat_map(of).chain([nucleus_build()]).collect()
}

/// Rows of a chunk: as many as `bytes` hold at `row_bytes` each, in whole tiles of 128 where there
/// are several chunks.
pub(in crate::cuda) fn chunk_rows(rows: u32, row_bytes: usize, bytes: usize) -> u32 {
    let fit = u32::try_from(bytes / row_bytes.max(1)).unwrap_or(u32::MAX);
    if rows <= fit { rows } else { (fit / 128 * 128).max(128) }
}

/// `sampled[r] = sample_row(hidden[r] head^T + bias)` under `draws[r]`.
pub struct SampleOp {
    pub rows: u32,
    pub k: u32,
    pub vocab: u32,
    /// (rows, k) of `dtype`.
    pub hidden: Address,
    /// Of hidden, and of a head of floats.
    pub dtype: DType,
    /// (vocab, k).
    pub head: WeightAt,
    /// (vocab) f32.
    pub bias: Option<Address>,
    /// (vocab) bits, in whole words.
    pub banned: Option<Address>,
    /// (rows) [`DrawRecord`].
    pub draws: Address,
    /// (rows) [`SampledRecord`] out; rows of padding are left as they are.
    pub sampled: Address,
    /// Some row does not need route B.
    pub any_fused: bool,
    /// Some row does: [`needs_nucleus`].
    pub any_nucleus: bool,
}

pub fn sample(context: &CudaContext, op: &SampleOp) -> Result<()> {
    sample_in(context, op, CHUNK_BYTES)
}

/// [`sample`] with another bound on the bytes of a chunk, for tests.
pub fn sample_in(context: &CudaContext, op: &SampleOp, chunk_bytes: usize) -> Result<()> {
    let SampleOp { rows, vocab, k, .. } = *op;
    assert!(vocab > 0 && k > 0, "a head of {vocab} rows of {k}");
    if vocab > MAX_GROUPS * 32 * IDS {
        return Err(Error::request(format!("sample: a vocabulary of {vocab} ids, at most {} are supported", MAX_GROUPS * 32 * IDS)));
    }
    let tile_bytes = vocab.div_ceil(IDS) as usize * TILE_BYTES;
    let logit_bytes = vocab as usize * 4;
    let fused_rows = chunk_rows(rows, tile_bytes, chunk_bytes);
    let nucleus_rows = chunk_rows(rows, logit_bytes, chunk_bytes);
    // `linear` takes what it needs from the front of the same workspace.
    let front = [nucleus_rows, rows % nucleus_rows.max(1)].map(|rows| linear::workspace_bytes(context, rows, vocab, k));
    let front = front[0].max(front[1]).next_multiple_of(256);
    let fused_bytes = if op.any_fused { fused_rows as usize * tile_bytes } else { 0 };
    let nucleus_bytes = if op.any_nucleus { front + nucleus_rows as usize * logit_bytes } else { 0 };
    let workspace = context.workspace(fused_bytes.max(nucleus_bytes))?;
    if op.any_fused {
        chunks(op, fused_rows).try_for_each(|chunk| fused(context, &chunk, workspace))?;
    }
    if op.any_nucleus {
        chunks(op, nucleus_rows).try_for_each(|chunk| nucleus(context, &chunk, workspace + front as u64))?;
    }
    Ok(())
}

/// The op in pieces of at most `chunk` rows.
fn chunks(op: &SampleOp, chunk: u32) -> impl Iterator<Item = SampleOp> + '_ {
    (0..op.rows).step_by(chunk.max(1) as usize).map(move |first| SampleOp {
        rows: chunk.min(op.rows - first),
        hidden: op.hidden + u64::from(first) * u64::from(op.k) * op.dtype.bytes() as u64,
        draws: op.draws + u64::from(first) * size_of::<DrawRecord>() as u64,
        sampled: op.sampled + u64::from(first) * size_of::<SampledRecord>() as u64,
        ..*op
    })
}

fn fused(context: &CudaContext, op: &SampleOp, tiles: Address) -> Result<()> {
    let SampleOp { rows, k, vocab, hidden, dtype, head, bias, banned, draws, sampled, .. } = *op;
    let (bias, banned) = (bias.unwrap_or(0), banned.unwrap_or(0));
    let [tiles_entry, draw_entry] = match dtype {
        DType::F32 => ["sample_tiles_f32", "sample_draw_f32"],
        DType::Bf16 => ["sample_tiles_bf16", "sample_draw_bf16"],
    };
    let tile = tile(rows);
    let WeightAt { address: head, bits } = head;
    let params = SampleTilesParams { hidden, head, bias, banned, draws, tiles, rows, vocab, k, padding: 0 };
    context.launch(tile.build(bits), tiles_entry, tile.launch(rows, vocab, dtype, bits), &params)?;
    let params = SampleDrawParams { hidden, head, bias, banned, draws, tiles, sampled, vocab, k };
    context.launch(draw_build(bits), draw_entry, draw_launch(rows, dtype, bits), &params)
}

fn nucleus(context: &CudaContext, op: &SampleOp, logits: Address) -> Result<()> {
    let SampleOp { rows, k, vocab, hidden, dtype, head, bias, banned, draws, sampled, .. } = *op;
    let product =
        Linear { rows, n: vocab, k, dtype, x: hidden, weight: head, bias, epilogue: Epilogue::Store, out: logits, out_dtype: DType::F32 };
    linear::linear(context, &product)?;
    let params = SampleNucleusParams { logits, banned: banned.unwrap_or(0), draws, sampled, vocab, padding: 0 };
    context.launch(nucleus_build(), "sample_nucleus", Launch::line(rows, NUCLEUS_THREADS), &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_choose_the_tile_and_the_tile_covers_rows_and_ids() {
        for (rows, height) in [(0, 8), (1, 8), (8, 8), (9, 16), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 128)] {
            let tile = tile(rows);
            assert_eq!(tile.rows, height, "{rows} rows");
            for vocab in [1, 128, 129, 50_258] {
                let launch = tile.launch(rows, vocab, DType::Bf16, None);
                assert_eq!(launch.grid, [rows.div_ceil(height) * vocab.div_ceil(128), 1, 1]);
                assert!(launch.shared_bytes + 1024 <= 101_376 && launch.block == tile.threads, "{launch:?}");
            }
        }
        for (dtype, bits) in [DType::F32, DType::Bf16].into_iter().flat_map(|dtype| KINDS.map(|bits| (dtype, bits))) {
            let largest = TILES.iter().map(|tile| tile.launch(1, 1, dtype, bits).shared_bytes).max();
            assert!(largest.is_some_and(|bytes| bytes + 1024 <= 101_376), "{dtype:?} {bits:?}: {largest:?}");
        }
        assert!(tile(0).launch(0, 50_258, DType::F32, None).is_empty());
    }

    #[test]
    fn chunks_are_whole_tiles_that_fit() {
        assert_eq!(chunk_rows(100, 4 * 50_258, CHUNK_BYTES), 100);
        assert_eq!(chunk_rows(1000, 4 * 50_258, CHUNK_BYTES), 256);
        assert_eq!(chunk_rows(1000, 32 * 393, CHUNK_BYTES), 1000);
        assert_eq!(chunk_rows(1000, 1 << 30, CHUNK_BYTES), 128, "one tile is the least");
        let op = SampleOp {
            rows: 300,
            k: 10,
            vocab: 7,
            hidden: 1000,
            dtype: DType::Bf16,
            head: WeightAt::floats(1),
            bias: None,
            banned: None,
            draws: 0,
            sampled: 64,
            any_fused: true,
            any_nucleus: true,
        };
        let parts: Vec<_> = chunks(&op, 128).map(|c| (c.rows, c.hidden, c.draws, c.sampled)).collect();
        assert_eq!(parts, [(128, 1000, 0, 64), (128, 1000 + 2560, 4096, 64 + 4096), (44, 1000 + 5120, 8192, 64 + 8192)]);
    }

    #[test]
    fn the_route_of_a_row_is_its_own() {
        let draw = Draw {
            u: 0.5,
            temperature: 1.0,
            top_p: 0.9,
            top_p_rule: TopPRule::Crossing,
            top_k: None,
            forced: None,
            truncated_confidence: true,
        };
        let plain = Draw { truncated_confidence: false, ..draw };
        let top_k = Draw { top_p: 1.0, top_k: Some(TopK { k: 9, order: TopKOrder::After }), ..plain };
        let most = Draw { top_k: Some(TopK { k: u32::MAX, order: TopKOrder::Before }), ..draw };
        for asked in [
            draw,
            plain,
            top_k,
            Draw { temperature: 0.0, truncated_confidence: true, ..top_k },
            Draw { temperature: 0.7, top_p: 1.0, ..draw },
            Draw { temperature: 0.0, ..draw },
        ] {
            assert!(needs_nucleus(&asked));
        }
        let whole = Draw { top_p: 1.0, ..draw };
        for other in [whole, Draw { temperature: 0.0, ..whole }, Draw { temperature: 0.0, ..plain }, Draw { forced: Some(3), ..draw }] {
            assert!(!needs_nucleus(&other));
        }
        assert!(!needs_nucleus(&Draw { temperature: 0.0, ..top_k }) && !needs_nucleus(&Draw { forced: Some(3), ..top_k }));
        assert_eq!(DrawRecord::from(&draw).flags, flag::CROSSING | flag::TRUNCATED);
        assert_eq!(DrawRecord::from(&top_k).flags, flag::CROSSING | flag::TOP_K_AFTER | 9 << 8);
        assert_eq!(DrawRecord::from(&most).flags, flag::CROSSING | flag::TRUNCATED | 0xffff_ff00);
        let forced = DrawRecord::from(&Draw { forced: Some(3), top_p_rule: TopPRule::Within, ..draw });
        assert_eq!((forced.flags, forced.forced), (flag::TRUNCATED | flag::FORCED, 3));
    }

    #[test]
    fn every_status_has_its_words() {
        let record = |status| SampledRecord { token: 17, status, ..SampledRecord::default() };
        assert_eq!(record(status::OK).sampled(5).unwrap().token, 17);
        for (code, words) in [
            (status::BROKEN, "token 17 is NaN or inf"),
            (status::NOTHING, "no token"),
            (status::FORCED, "token 17"),
            (status::CHANGED, "changed"),
            (9, "is 9"),
        ] {
            let error = record(code).sampled(5).unwrap_err();
            assert!(error.to_string().contains("row 5") && error.to_string().contains(words), "{error}");
            assert_eq!(matches!(error, Error::Request { .. }), code == status::FORCED);
        }
    }
}
