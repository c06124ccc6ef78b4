//! State of the CUDA backend: weights, buffers, K/V and batches on the device, recorded graphs.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::thread;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::backend::group_blocks::{Bits, COLUMNS, Panels, panel_words, quantise_panel};
use crate::backend::{DType, HeadShape, KvShape, RowSource, RowsFrom, WeightFormat};
use crate::cuda::context::{CudaContext, Memory};
use crate::cuda::driver::interface::{Address, Driver, Graph};
use crate::cuda::ops::attention::{self, Regime};
use crate::cuda::ops::gather::{self, Gather};
use crate::cuda::ops::sample;
use crate::cuda::ops::weight::WeightAt;
use crate::cuda::packed_arrays::PlanPointers;
use crate::cuda::signature::{BatchShape, Signature, TileShape};
use crate::cuda::step_buffers::StepBuffers;
use crate::error::Result;
use crate::plan::Plan;
use crate::sampling::Draw;

/// Bytes of f32 that one thread reads and rounds at a time.
const UPLOAD_BYTES: usize = 4 << 20;

/// Recorded graphs kept at most. A did schedule with uniform quotas needs about twenty; beyond this
/// many, shapes do not repeat.
const MAX_GRAPHS: usize = 256;

/// Tables by (head_dim, bits of the rope), with the positions they reach.
pub(super) type Rotations = HashMap<(usize, [u32; 7]), (usize, Memory)>;

/// The engine's CUDA backend, on a driver.
pub struct Cuda {
    pub(super) context: CudaContext,
    pub(super) dtype: DType,
    pub(super) weight_format: Option<WeightFormat>,
    /// The bit mask of the last list of banned ids.
    pub(super) banned: RefCell<Option<(Vec<u32>, usize, Memory)>>,
    pub(super) rotations: RefCell<Rotations>,
    /// How often a step was seen, and its graph once that was twice.
    graphs: RefCell<HashMap<GraphKey, Option<Graph>>>,
    replays: Cell<bool>,
    runs: Cell<bool>,
    /// The buffers that the steps of a run use, at fixed addresses.
    pub(super) step_buffers: RefCell<StepBuffers>,
}

/// A step with everything that its launches depend on beside the contents of memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct GraphKey {
    key: [u64; 3],
    generation: u64,
    signature: Arc<Signature>,
}

/// Activations and small parameters.
pub struct Buffer {
    /// Shared by the parts of an arena.
    pub(super) _memory: Arc<Memory>,
    pub(super) address: Address,
    pub(super) len: usize,
    pub(super) dtype: DType,
}

impl Buffer {
    pub(super) fn address(&self) -> Address {
        self.address
    }
}

/// A weight (n, k), row-major or in blocks; of experts, those of all of them one below the other.
pub struct Weight {
    pub(super) memory: Memory,
    /// Of a code, where it is in blocks.
    pub(super) bits: Option<Bits>,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl Weight {
    pub(super) fn at(&self) -> WeightAt {
        WeightAt { address: self.memory.address(), bits: self.bits }
    }
}

/// Keys and values of all layers.
pub struct KvCache {
    pub(super) keys: Memory,
    pub(super) values: Memory,
    pub(super) shape: KvShape,
}

impl KvCache {
    pub(super) fn layer_bytes(&self, dtype: DType) -> usize {
        self.shape.num_pages * self.page_bytes(dtype)
    }
    pub(super) fn page_bytes(&self, dtype: DType) -> usize {
        self.shape.num_kv_heads * self.shape.page_size * self.shape.head_dim * dtype.bytes()
    }
}

/// A plan on the device.
pub struct Batch {
    pub(super) arrays: PlanPointers,
    pub(super) shape: BatchShape,
    pub(super) origin: Origin,
}

pub(super) enum Origin {
    /// Uploaded from a plan, in memory of its own; the work list of attention follows when its
    /// heads are known.
    Host { plan: Box<Plan>, _memory: Memory, tiles: RefCell<Option<(HeadShape, TileShape, Memory)>> },
    /// In the buffers of a run's current step.
    Run { tiles: (TileShape, Address) },
}

/// Row indices on the device.
pub struct Rows {
    pub(super) address: Address,
    pub(super) len: usize,
    /// None in a run, whose rows the device finds.
    pub(super) _memory: Option<Memory>,
}

impl Cuda {
    /// A backend on `driver` with weights and K/V in `dtype`.
    pub fn new(driver: Box<dyn Driver>, dtype: DType) -> Result<Cuda> {
        Ok(Cuda {
            context: CudaContext::new(driver)?,
            dtype,
            weight_format: None,
            banned: RefCell::default(),
            rotations: RefCell::default(),
            graphs: RefCell::default(),
            replays: Cell::new(true),
            runs: Cell::new(true),
            step_buffers: RefCell::default(),
        })
    }

    /// Makes weights of models into this format, where it is one; floats are those of the dtype.
    pub fn with_weights(self, format: Option<WeightFormat>) -> Cuda {
        let float = format.and_then(WeightFormat::float);
        assert!(float.is_none_or(|dtype| dtype == self.dtype), "weights in {float:?} beside {:?}", self.dtype);
        Cuda { weight_format: format, ..self }
    }

    /// Whether repeated steps are recorded and replayed as graphs (they are, unless a test
    /// compares).
    pub fn set_replays(&self, on: bool) {
        self.replays.set(on);
    }

    /// Whether steps are sampled on the device where the engine allows it (they are, unless a test
    /// compares).
    pub fn set_runs(&self, on: bool) {
        self.runs.set(on);
    }

    /// The dtype of weights, K/V and products' inputs.
    pub(super) fn weight_dtype(&self) -> DType {
        self.dtype
    }

    /// Graphs recorded so far, for tests and reports.
    pub fn num_graphs(&self) -> usize {
        self.graphs.borrow().values().flatten().count()
    }

    pub(super) fn upload_words(&self, words: &[u32]) -> Result<Memory> {
        let memory = self.context.memory(4 * words.len())?;
        if !words.is_empty() {
            self.context.driver.write(memory.address(), bytemuck::cast_slice(words))?;
        }
        Ok(memory)
    }

    /// The (n, k) values of `source`, in the weight dtype.
    pub(super) fn upload_rows(&self, n: usize, k: usize, source: &dyn RowSource) -> Result<Weight> {
        assert!(n > 0 && k > 0, "a weight of {n} x {k}");
        let dtype = self.dtype;
        let part = (UPLOAD_BYTES / (k * 4)).clamp(1, n);
        let memory = self.upload_parts(n, k * dtype.bytes(), part, &|first, bytes| read_rows(dtype, first, source, bytes))?;
        Ok(Weight { memory, bits: None, n, k })
    }

    /// `num` weights of (n, k) in blocks, one behind the other.
    pub(super) fn upload_blocks(&self, bits: Bits, num: usize, n: usize, k: usize, source: &dyn RowSource) -> Result<Weight> {
        assert!(num > 0 && n > 0 && k > 0, "{num} weights of {n} x {k}");
        let (panels, words) = (n.div_ceil(COLUMNS), panel_words(bits, k));
        let part = (UPLOAD_BYTES / (COLUMNS * k * 4)).clamp(1, num * panels);
        let fill = |first: usize, bytes: &mut [u8]| {
            let mut room = Vec::new();
            let parts: &mut [u32] = bytemuck::cast_slice_mut(bytes);
            // The buffer is used again and again, and a panel must begin as zeros.
            parts.fill(0);
            for (i, panel) in (first..).zip(parts.chunks_exact_mut(words)) {
                let rows = RowsFrom { source, first: i / panels * n };
                let of = Panels { bits, n, k, source: &rows };
                of.fill(i % panels, panel, &mut room, |rows, panel| quantise_panel(bits, k, rows, panel))?;
            }
            Ok(())
        };
        let memory = self.upload_parts(num * panels, words * size_of::<u32>(), part, &fill)?;
        Ok(Weight { memory, bits: Some(bits), n: num * n, k })
    }

    /// `len` items of `item_bytes`. Threads fill parts of some items each, from the first of a part
    /// on, and one copies them to the device. Bytes are aligned for words.
    fn upload_parts(&self, len: usize, item_bytes: usize, part: usize, fill: &FillPart) -> Result<Memory> {
        let memory = self.context.memory(len * item_bytes)?;
        let threads = thread::available_parallelism().map_or(1, |cores| cores.get());
        let at_once = (part * threads).min(len);
        let mut bytes = vec![0u64; (at_once * item_bytes).div_ceil(8)];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut bytes);
        for first in (0..len).step_by(at_once) {
            let bytes = &mut bytes[..at_once.min(len - first) * item_bytes];
            let parts: Vec<(usize, &mut [u8])> = (first..len).step_by(part).zip(bytes.chunks_mut(part * item_bytes)).collect();
            fill_parts(fill, parts)?;
            self.context.driver.write(memory.address() + (first * item_bytes) as u64, bytes)?;
        }
        Ok(memory)
    }

    /// The bit mask over `vocab` ids of the banned ones.
    pub(super) fn banned_mask(&self, banned: &[u32], vocab: usize) -> Result<Option<Address>> {
        if banned.is_empty() {
            return Ok(None);
        }
        let mut known = self.banned.borrow_mut();
        if !known.as_ref().is_some_and(|(ids, size, _)| ids == banned && *size == vocab) {
            let mut mask = vec![0u32; vocab.div_ceil(32)];
            banned.iter().filter(|id| (**id as usize) < vocab).for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
            *known = Some((banned.to_vec(), vocab, self.upload_words(&mask)?));
            self.context.moved();
        }
        Ok(known.as_ref().map(|(.., memory)| memory.address()))
    }

    /// x as the element type of the weights: itself, or a rounded copy that lives as long as the
    /// result.
    pub(super) fn as_input(&self, x: &Buffer, elements: usize) -> Result<(Address, Option<Memory>)> {
        if x.dtype == self.dtype {
            return Ok((x.address, None));
        }
        let copy = self.context.memory(elements * self.dtype.bytes())?;
        let cast = Gather {
            count: 1,
            width: elements as u32,
            rows: None,
            x: x.address,
            x_dtype: x.dtype,
            out: copy.address(),
            out_dtype: self.dtype,
        };
        gather::gather(&self.context, &cast)?;
        Ok((copy.address(), Some(copy)))
    }

    /// Attention's work list for rows with these offsets.
    pub(super) fn tiles_of(&self, heads: HeadShape, indptr: &[u32]) -> (TileShape, Vec<[u32; 4]>) {
        let regime = Regime::for_batch(&self.context.driver.limits(), self.dtype, heads, indptr);
        let tiles = attention::tiles(indptr, heads, regime.tile_queries(self.dtype, heads));
        (TileShape { regime, num_tiles: tiles.len() as u32 }, tiles)
    }

    /// A batch of a run's current step.
    pub(super) fn run_batch(arrays: PlanPointers, shape: BatchShape, tiles: (TileShape, Address)) -> Batch {
        Batch { arrays, shape, origin: Origin::Run { tiles } }
    }

    /// Rows of a run's current step.
    pub(super) fn run_rows(address: Address, len: u32) -> Rows {
        Rows { address, len: len as usize, _memory: None }
    }

    /// Whether steps are sampled on the device: see [`Cuda::set_runs`].
    pub(super) fn runs_steps(&self) -> bool {
        self.runs.get()
    }

    /// Enqueues what `body` enqueues, which belongs to the current step of a run. From the third
    /// time on a recording is replayed wherever the step's signature and `key`, which names the
    /// weights and buffers that `body` uses, say that it would enqueue the same again.
    pub(super) fn launch_recorded(&self, signature: &Arc<Signature>, key: [u64; 3], body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if !self.replays.get() {
            return body();
        }
        let recorded = GraphKey { key, generation: self.context.generation(), signature: signature.clone() };
        let known = self.graphs.borrow().get(&recorded).copied();
        match known {
            Some(Some(graph)) => self.context.driver.launch_graph(graph),
            Some(None) => {
                // The second time: everything is loaded, nothing grows any more.
                let graph = self.context.record(body)?;
                self.graphs.borrow_mut().insert(recorded, Some(graph));
                self.context.driver.launch_graph(graph)
            }
            None => {
                let mut graphs = self.graphs.borrow_mut();
                if graphs.len() >= MAX_GRAPHS {
                    graphs.drain().filter_map(|(_, graph)| graph).for_each(|graph| self.context.driver.drop_graph(graph));
                }
                graphs.insert(recorded, None);
                drop(graphs);
                body()
            }
        }
    }

    /// Names what is enqueued inside for profilers.
    pub(super) fn range<T>(&self, name: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.push_range(name);
        let outcome = body();
        self.pop_range();
        outcome
    }

    pub(super) fn push_range(&self, name: &str) {
        self.context.driver.push_range(name);
    }

    pub(super) fn pop_range(&self) {
        self.context.driver.pop_range();
    }

    /// How rows are sampled, for the kernels that sample.
    pub(super) fn upload_draws(&self, draws: &[Draw]) -> Result<Memory> {
        let records: Vec<sample::DrawRecord> = draws.iter().map(sample::DrawRecord::from).collect();
        self.upload_words(bytemuck::cast_slice(&records))
    }

    /// The records that a kernel wrote for `rows` rows. Waits.
    pub(super) fn read_sampled(&self, output: &Memory, rows: usize) -> Result<Vec<sample::SampledRecord>> {
        let mut records = vec![sample::SampledRecord::default(); rows];
        self.context.driver.read(output.address(), bytemuck::cast_slice_mut(&mut records))?;
        Ok(records)
    }
}

/// Fills items from one on, into bytes that are aligned for words.
type FillPart<'a> = dyn Fn(usize, &mut [u8]) -> Result<()> + Sync + 'a;

/// Rows of `source` from `first` on, in `dtype`.
fn read_rows(dtype: DType, first: usize, source: &dyn RowSource, bytes: &mut [u8]) -> Result<()> {
    match dtype {
        DType::F32 => source.read(first, bytemuck::cast_slice_mut(bytes)),
        DType::Bf16 => {
            let rounded: &mut [bf16] = bytemuck::cast_slice_mut(bytes);
            let mut values = vec![0.0f32; rounded.len()];
            source.read(first, &mut values)?;
            rounded.convert_from_f32_slice(&values);
            Ok(())
        }
    }
}

/// Fills each part, on a thread of its own.
fn fill_parts(fill: &FillPart, parts: Vec<(usize, &mut [u8])>) -> Result<()> {
    if parts.len() == 1 {
        return parts.into_iter().try_for_each(|(first, bytes)| fill(first, bytes));
    }
    thread::scope(|scope| {
        let threads: Vec<_> = parts.into_iter().map(|(first, bytes)| scope.spawn(move || fill(first, bytes))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("reading does not panic"))
    })
}
