//! One kernel alone, over random inputs, in a loop: what `redraft kernels run` does, for timing and
//! for profilers.
//!
//! The table of kernels is `kernel_benches.rs`. Inputs are random, because zeros draw less power
//! and so run at higher clocks. Where a launch moves less memory than a cache holds, several sets
//! of buffers take turns, so that every launch finds its data where the engine would: in memory.
//! Launches are recorded in a graph, so that the time of a short kernel is its own and not that of
//! the calls.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::time::Instant;

use half::bf16;
use serde::Serialize;

use crate::backend::DType;
use crate::backend::group_blocks::{Bits, COLUMNS, panel_words, quantise_panel};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Driver, Graph, Limits};
use crate::cuda::ops::weight::{WeightAt, weight_bytes};
use crate::error::{Error, Result};

/// One number of a shape.
pub struct Key {
    pub name: &'static str,
    /// Default on a GPU: about what an 8B model asks for, a few hundred MB of traffic at most.
    pub device: u32,
    /// Default under emulation, which is a million times slower: ragged, a few CTAs.
    pub small: u32,
}

/// One kernel that can be run alone.
pub struct KernelBench {
    pub name: &'static str,
    /// Whether it has weights that may be in groups.
    pub reads_weights: bool,
    pub keys: &'static [Key],
    pub(in crate::cuda) prepare: fn(&Inputs, &Shape) -> Result<Op>,
}

impl KernelBench {
    /// `rows=4096,width=4096`: what `--shape` means on a GPU where it says nothing.
    pub fn defaults(&self) -> String {
        self.keys.iter().map(|key| format!("{}={}", key.name, key.device)).collect::<Vec<_>>().join(",")
    }
}

fn elements(rows: u32, width: u32) -> usize {
    rows as usize * width as usize
}

type Launcher = Box<dyn Fn(&CudaContext) -> Result<()>>;

/// One prepared launch and what it costs at least.
pub struct Op {
    launch: Launcher,
    /// False where it does something else than launch.
    recordable: bool,
    /// Where it writes numbers that must be finite, and how many.
    out: Option<(Address, u64, DType)>,
    /// Bytes that must come from or go to memory.
    bytes: u64,
    /// Multiplications and additions.
    flop: u64,
}

impl Op {
    pub(in crate::cuda) fn new(bytes: u64, launch: impl Fn(&CudaContext) -> Result<()> + 'static) -> Op {
        Op { launch: Box::new(launch), recordable: true, out: None, bytes, flop: 0 }
    }

    pub(in crate::cuda) fn unrecorded(self) -> Op {
        Op { recordable: false, ..self }
    }

    pub(in crate::cuda) fn flop(self, flop: u64) -> Op {
        Op { flop, ..self }
    }

    pub(in crate::cuda) fn result(self, address: Address, len: u64, dtype: DType) -> Op {
        Op { out: Some((address, len, dtype)), ..self }
    }
}

/// A resolved shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shape {
    #[serde(serialize_with = "name_of")]
    pub(in crate::cuda) dtype: DType,
    /// Of a code, where weights are in groups.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "name_of_bits")]
    pub(in crate::cuda) weights: Option<Bits>,
    #[serde(flatten)]
    values: serde_json::Map<String, serde_json::Value>,
}

fn name_of<S: serde::Serializer>(dtype: &DType, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn name_of_bits<S: serde::Serializer>(bits: &Option<Bits>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match bits {
        None => serializer.serialize_none(),
        Some(Bits::Eight) => serializer.serialize_str("q8"),
        Some(Bits::Four) => serializer.serialize_str("q4"),
    }
}

impl Shape {
    /// Defaults, with `given` ("KEY=VALUE") in their place.
    pub(super) fn resolve(bench: &KernelBench, given: &[String], dtype: DType, weights: Option<Bits>, small: bool) -> Result<Shape> {
        let default = |key: &Key| (key.name.to_owned(), if small { key.small } else { key.device }.into());
        let mut values: serde_json::Map<_, _> = bench.keys.iter().map(default).collect();
        for pair in given {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(slot) = values.get_mut(name) else {
                return Err(Error::request(format!("--shape {pair}: {} has {}", bench.name, bench.defaults())));
            };
            let number: u32 = value
                .parse()
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| Error::request(format!("--shape {pair}: expected {name}=N with N from 1 to {}", u32::MAX)))?;
            *slot = number.into();
        }
        if weights.is_some() && !bench.reads_weights {
            return Err(Error::request(format!("--weights: {} reads no weights in groups", bench.name)));
        }
        Ok(Shape { dtype, weights, values })
    }

    pub(in crate::cuda) fn get(&self, name: &str) -> u32 {
        let value = self.values.get(name).and_then(serde_json::Value::as_u64);
        value.and_then(|value| u32::try_from(value).ok()).unwrap_or_else(|| panic!("{name} is no key of this kernel"))
    }
}

/// Lends device memory with random content, and frees it when dropped.
pub struct Inputs<'a> {
    driver: &'a dyn Driver,
    lent: RefCell<Vec<Address>>,
    lent_bytes: Cell<u64>,
    /// Noise that all buffers repeat, as f32 and as bf16.
    tile: [Address; 2],
    random: RefCell<u64>,
}

/// Elements of the noise tile: a product of two of its stretches is no longer in step after 2^20
/// elements either.
const TILE: usize = 1 << 20;

impl<'a> Inputs<'a> {
    fn new(driver: &'a dyn Driver) -> Result<Inputs<'a>> {
        let mut inputs = Inputs { driver, lent: RefCell::default(), lent_bytes: Cell::new(0), tile: [0; 2], random: RefCell::new(1) };
        // Uniform in [-1, 1): 24 bits, all exact in f32.
        let noise: Vec<f32> = (0..TILE).map(|_| (inputs.next() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect();
        let rounded: Vec<bf16> = noise.iter().map(|value| bf16::from_f32(*value)).collect();
        inputs.tile = [inputs.upload(bytemuck::cast_slice(&noise))?, inputs.upload(bytemuck::cast_slice(&rounded))?];
        Ok(inputs)
    }

    /// splitmix64: the upper half of its output.
    pub(in crate::cuda) fn next(&self) -> u32 {
        let mut state = self.random.borrow_mut();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 32) as u32
    }

    pub(in crate::cuda) fn limits(&self) -> Limits {
        self.driver.limits()
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        let address = self.driver.alloc(bytes)?;
        self.lent.borrow_mut().push(address);
        self.lent_bytes.set(self.lent_bytes.get() + bytes as u64);
        Ok(address)
    }

    fn upload(&self, bytes: &[u8]) -> Result<Address> {
        let address = self.alloc(bytes.len())?;
        self.driver.write(address, bytes)?;
        Ok(address)
    }

    /// (rows, width) of nothing in particular.
    pub(in crate::cuda) fn space(&self, rows: u32, width: u32, dtype: DType) -> Result<Address> {
        self.alloc(elements(rows, width) * dtype.bytes())
    }

    /// (rows, width) numbers in [-1, 1).
    pub(in crate::cuda) fn noise(&self, rows: u32, width: u32, dtype: DType) -> Result<Address> {
        let (bytes, tile_bytes) = (elements(rows, width) * dtype.bytes(), TILE * dtype.bytes());
        let address = self.alloc(bytes)?;
        let tile = self.tile[usize::from(dtype == DType::Bf16)];
        for start in (0..bytes).step_by(tile_bytes) {
            self.driver.copy(tile, address + start as u64, tile_bytes.min(bytes - start))?;
        }
        Ok(address)
    }

    /// `num` weights of (n, k), one behind the other, of numbers in [-1, 1).
    pub(in crate::cuda) fn weights(&self, num: u32, n: u32, k: u32, shape: &Shape) -> Result<WeightAt> {
        let Some(bits) = shape.weights else {
            return Ok(WeightAt::floats(self.noise(num * n, k, shape.dtype)?));
        };
        // One panel, many times: its codes are random, and no cache sees that panels are alike.
        let values: Vec<f32> = (0..COLUMNS * k as usize).map(|_| (self.next() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect();
        let mut panel = vec![0u32; panel_words(bits, k as usize)];
        quantise_panel(bits, k as usize, &values, &mut panel)?;
        let panel: &[u8] = bytemuck::cast_slice(&panel);
        let bytes = num as usize * weight_bytes(shape.dtype, shape.weights, n as usize, k as usize);
        let address = self.alloc(bytes)?;
        for start in (0..bytes).step_by(panel.len()) {
            self.driver.write(address + start as u64, panel)?;
        }
        Ok(WeightAt { address, bits: Some(bits) })
    }

    /// Records as they are.
    pub(in crate::cuda) fn records<T: bytemuck::NoUninit>(&self, records: &[T]) -> Result<Address> {
        self.upload(bytemuck::cast_slice(records))
    }

    /// `len` 32-bit words, each made of its index and a random one.
    pub(in crate::cuda) fn words(&self, len: u32, word: impl Fn(u32, u32) -> u32) -> Result<Address> {
        let words: Vec<u32> = (0..len).map(|index| word(index, self.next())).collect();
        self.upload(bytemuck::cast_slice(&words))
    }
}

impl Drop for Inputs<'_> {
    fn drop(&mut self) {
        self.lent.take().into_iter().for_each(|address| self.driver.free(address));
    }
}

/// What [`crate::cuda::bench_kernel`] runs.
pub struct BenchRequest<'a> {
    pub name: &'a str,
    /// "KEY=VALUE".
    pub shape: &'a [String],
    pub dtype: DType,
    /// Of a code of its weights, where they are in groups.
    pub weights: Option<Bits>,
    /// Timed batches of launches.
    pub repeat: u32,
    /// Launch one by one instead of from a graph: profilers then see every launch by itself.
    pub plain: bool,
    /// The defaults of the emulation and one launch per batch, for tools that slow a kernel down.
    pub small: bool,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub kernel: &'static str,
    pub shape: Shape,
    pub device: String,
    pub arch: String,
    /// Launches in each timed batch, over `sets` sets of buffers that take turns.
    pub launches: usize,
    pub sets: usize,
    pub repeat: u32,
    /// Of one launch, over batches.
    pub median_us: f64,
    pub best_us: f64,
    /// What one launch must move and compute.
    pub bytes: u64,
    pub flop: u64,
    pub gb_per_s: f64,
    pub gflop_per_s: f64,
}

/// Traffic between two uses of one buffer: four times the largest cache in use (60 MB on H200, 126
/// MB on B200).
const COLD_BYTES: u64 = 512 << 20;
const MAX_SETS: u64 = 64;
/// A launch may read a small part of what it is given, as `embed` does of its table.
const MAX_HELD_BYTES: u64 = 3 << 30;
/// Long enough that one wait of 10 us is below a percent.
const BATCH_SECONDS: f64 = 2e-3;
const MAX_LAUNCHES: usize = 512;

/// Runs one kernel on a machine and times it.
pub(in crate::cuda) fn run(context: &CudaContext, bench: &KernelBench, request: &BenchRequest) -> Result<Report> {
    let driver = context.driver.as_ref();
    let small = request.small || driver.is_emulated();
    let shape = Shape::resolve(bench, request.shape, request.dtype, request.weights, small)?;
    let inputs = Inputs::new(driver)?;
    let before = inputs.lent_bytes.get();
    let mut ops = vec![(bench.prepare)(&inputs, &shape)?];
    let held = inputs.lent_bytes.get() - before;
    let (bytes, flop) = (ops[0].bytes, ops[0].flop);
    let sets = if small { 1 } else { (COLD_BYTES / bytes.max(1)).min(MAX_HELD_BYTES / held.max(1)).clamp(1, MAX_SETS) };
    for _ in 1..sets {
        ops.push((bench.prepare)(&inputs, &shape)?);
    }

    // Every set once: compiles, loads, grows the workspace, and says how long a launch takes at
    // most.
    ops.iter().try_for_each(|op| (op.launch)(context))?;
    driver.synchronize()?;
    check(driver, request.name, &ops[0])?;
    let start = Instant::now();
    ops.iter().try_for_each(|op| (op.launch)(context))?;
    driver.synchronize()?;
    let one = start.elapsed().as_secs_f64() / ops.len() as f64;
    let rounds = if small { 1 } else { ((BATCH_SECONDS / one) as usize).clamp(1, MAX_LAUNCHES).div_ceil(ops.len()) };

    let launches = rounds * ops.len();
    let batch = || (0..rounds).try_for_each(|_| ops.iter().try_for_each(|op| (op.launch)(context)));
    let recorded = if request.plain || !ops[0].recordable { None } else { Some(RecordedBatch { driver, graph: context.record(batch)? }) };
    let mut times = Vec::new();
    for timed in 0..=request.repeat {
        let start = Instant::now();
        match &recorded {
            Some(recorded) => driver.launch_graph(recorded.graph)?,
            None => batch()?,
        }
        driver.synchronize()?;
        if timed > 0 {
            times.push(start.elapsed().as_secs_f64() / launches as f64);
        }
    }
    check(driver, request.name, &ops[0])?;
    times.sort_by(f64::total_cmp);
    let (median, best) = (times[times.len() / 2], times[0]);
    Ok(Report {
        kernel: bench.name,
        shape,
        device: driver.name(),
        arch: driver.arch(),
        launches,
        sets: ops.len(),
        repeat: request.repeat,
        median_us: median * 1e6,
        best_us: best * 1e6,
        bytes,
        flop,
        gb_per_s: bytes as f64 / median / 1e9,
        gflop_per_s: flop as f64 / median / 1e9,
    })
}

/// A recorded batch, forgotten when dropped.
struct RecordedBatch<'a> {
    driver: &'a dyn Driver,
    graph: Graph,
}

impl Drop for RecordedBatch<'_> {
    fn drop(&mut self) {
        self.driver.drop_graph(self.graph);
    }
}

/// Numbers that come out must be finite: random inputs give no reason for anything else.
fn check(driver: &dyn Driver, name: &str, op: &Op) -> Result<()> {
    let Some((address, len, dtype)) = op.out else { return Ok(()) };
    let mut bytes = vec![0u8; len as usize * dtype.bytes()];
    driver.read(address, &mut bytes)?;
    let exponent_full = |i: usize| match dtype {
        DType::F32 => u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("four bytes")) & 0x7f80_0000 == 0x7f80_0000,
        DType::Bf16 => u16::from_le_bytes(bytes[2 * i..2 * i + 2].try_into().expect("two bytes")) & 0x7f80 == 0x7f80,
    };
    match (0..len as usize).find(|i| exponent_full(*i)) {
        None => Ok(()),
        Some(i) => Err(Error::kernel(format!("{name}: element {i} of {len} of the result is not finite"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernels::kernel_benches::kernel_bench_named;

    #[test]
    fn shapes_are_defaults_with_changes() {
        let embed = kernel_bench_named("embed").unwrap();
        let of = |given: &[&str], small| {
            Shape::resolve(embed, &given.iter().map(|pair| pair.to_string()).collect::<Vec<_>>(), DType::Bf16, None, small)
        };
        let shape = of(&["rows=7", "vocab=12"], false).unwrap();
        assert_eq!(["rows", "width", "vocab"].map(|name| shape.get(name)), [7, 4096, 12]);
        assert_eq!(of(&[], true).unwrap().get("width"), 66);
        for (given, part) in [
            ("heads=3", "--shape heads=3: embed has rows=4096,width=4096,vocab=50258"),
            ("rows", "expected rows=N with N from 1"),
            ("rows=0", "expected rows=N"),
            ("rows=-1", "expected rows=N"),
            ("rows=4294967296", "expected rows=N"),
        ] {
            let text = of(&[given], false).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
        assert!(kernel_bench_named("matmul").err().unwrap().to_string().contains("\"matmul\": there are attention, copy, embed, "));
    }
}
