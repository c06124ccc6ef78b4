//! Emulated machines for the kernel tests: every thread schedule with every timing of copies, and
//! buffers whose edges are watched.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

use bytemuck::Pod;
use half::bf16;
use redraft::WeightFormat;
use redraft::backend::group_blocks::{Bits, COLUMNS, Panels, quantise_panel};
use redraft::backend::{DType, RowsFrom};
use redraft::cpu::oracle;
use redraft::cuda::context::CudaContext;
use redraft::cuda::driver::{Address, Driver};
use redraft::cuda::ops::weight::WeightAt;
use redraft::cuda::tensor_core::TensorCore;
use redraft::cuda::{Copies, Edit, EmulatorOptions, Schedule};

use crate::machines::{drivers, emulator};

pub const SCHEDULES: [Schedule; 4] = [Schedule::Forward, Schedule::Reverse, Schedule::Random, Schedule::WarpGreedy];

/// A machine of every schedule with every timing of copies, and one that watches for races: what is
/// missing in a kernel shows under one of the nine. Or what `REDRAFT_TEST_MACHINES` asks for.
pub fn machines() -> Vec<CudaContext> {
    drivers(nine(None)).into_iter().map(context).collect()
}

/// One of [`machines`], for tests that have no use for all of them: of the nine, one with threads
/// in reverse.
pub fn any_machine() -> CudaContext {
    let mut machines = machines();
    machines.swap_remove(2 % machines.len())
}

/// The nine emulated machines with one edit of the sources: a planted bug.
pub fn edited_machines(edit: Option<Edit>) -> Vec<CudaContext> {
    nine(edit).into_iter().map(|options| context(emulator(options))).collect()
}

/// Those whose copies are late round as sm_80 does, the others as sm_90a does.
fn nine(edit: Option<Edit>) -> Vec<EmulatorOptions> {
    let plain = EmulatorOptions { threads: 1, edit, ..EmulatorOptions::default() };
    let both = |schedule| {
        [("sm_80", Copies::Late), ("sm_90a", Copies::Eager)].map(|(arch, copies)| EmulatorOptions { arch, schedule, copies, ..plain })
    };
    let watching = EmulatorOptions { races: true, copies: Copies::Late, ..plain };
    SCHEDULES.into_iter().flat_map(both).chain([watching]).collect()
}

fn context(driver: Box<dyn Driver>) -> CudaContext {
    CudaContext::new(driver).unwrap_or_else(|e| panic!("{e}"))
}

/// A sum of products as `gemm.cuh` specifies it, bit for bit: segments of 256, in f32 one product
/// at a time by fmaf, in bf16 as the tensor cores of the machine's architecture add. x and w hold
/// numbers of `dtype`.
pub fn gemm_dot(context: &CudaContext, dtype: DType, x: &[f32], w: &[f32]) -> f32 {
    if dtype == DType::Bf16 {
        return TensorCore::for_arch(&context.driver.arch()).expect("an architecture").dot(x, w);
    }
    let segments = x.chunks(256).zip(w.chunks(256));
    segments.fold(0.0, |total, (x, w)| total + x.iter().zip(w).fold(0.0f32, |sum, (x, w)| w.mul_add(*x, sum)))
}

/// Device memory of exactly these values. Accesses beyond it are errors of the launch or of the
/// next read.
pub struct Array<'m, T> {
    context: &'m CudaContext,
    base: Address,
    /// Bytes in front of the values.
    skew: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<'m, T: Pod> Array<'m, T> {
    pub fn new(context: &'m CudaContext, values: &[T]) -> Self {
        Self::skewed(context, values, 0)
    }

    /// The values begin `skew` elements behind an aligned address.
    pub fn skewed(context: &'m CudaContext, values: &[T], skew: usize) -> Self {
        let skew = skew * size_of::<T>();
        let base = context.driver.alloc(skew + size_of_val(values)).expect("host memory");
        let array = Array { context, base, skew, len: values.len(), element: PhantomData };
        context.driver.write(array.address(), bytemuck::cast_slice(values)).expect("its own range");
        array
    }

    /// As allocated: NaN, for what a kernel must write before anything reads it.
    pub fn fresh(context: &'m CudaContext, len: usize) -> Self {
        let base = context.driver.alloc(len * size_of::<T>()).expect("host memory");
        Array { context, base, skew: 0, len, element: PhantomData }
    }

    /// The address that a params struct carries.
    pub fn address(&self) -> Address {
        self.base + self.skew as u64
    }

    /// The values, once the edges of all buffers were found intact.
    pub fn read(&self) -> Result<Vec<T>, String> {
        let mut values = vec![T::zeroed(); self.len];
        self.context.driver.read(self.address(), bytemuck::cast_slice_mut(&mut values)).map_err(|e| e.to_string())?;
        Ok(values)
    }
}

impl Array<'_, f32> {
    /// NaN everywhere.
    pub fn nan(context: &CudaContext, len: usize) -> Array<'_, f32> {
        Array::new(context, &vec![f32::NAN; len])
    }
}

impl<T> Drop for Array<'_, T> {
    fn drop(&mut self) {
        self.context.driver.free(self.base);
    }
}

/// A directory of this test process. Those of earlier ones are removed after an hour.
pub fn scratch(name: &str) -> PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        let old =
            |path: &Path| path.metadata().is_ok_and(|m| m.modified().is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() > 3600)));
        let earlier = std::fs::read_dir(&all).into_iter().flatten().flatten().map(|entry| entry.path());
        earlier.filter(|path| old(path)).for_each(|path| drop(std::fs::remove_dir_all(path)));
        all.join(std::process::id().to_string())
    });
    let dir = root.join(name);
    std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    dir
}

/// The directory of these tests.
pub fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels")
}

/// A compiler for the stub libraries.
pub fn gxx() -> Command {
    let mut command = Command::new("g++");
    command.args(["-std=c++17", "-O1", "-g", "-fPIC", "-Wall"]);
    command
}

pub fn run(mut command: Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("g++ cannot be started ({e}): these tests compile the kernels for the host, install g++"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// What `work` makes of the items, on as many threads as there are cores, in the order in which
/// they are done.
pub fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Option<R> + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || std::iter::from_fn(|| items.get(next.fetch_add(1, Ordering::Relaxed))).filter_map(&work).collect::<Vec<R>>();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..available_parallelism().map_or(1, |n| n.get())).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker ends")).collect()
    })
}

/// Repeatable numbers in [-1, 1), different for every seed.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    };
    (0..len).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Equal bit for bit, or the first place where not.
pub fn same_bits(expected: &[f32], found: &[f32], what: &str) -> Result<(), String> {
    if expected.len() != found.len() {
        return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()));
    }
    match expected.iter().zip(found).position(|(e, f)| e.to_bits() != f.to_bits()) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: element {i} is {}, expected {}", found[i], expected[i])),
    }
}

/// The words of an error.
pub fn words(outcome: redraft::Result<()>) -> Result<(), String> {
    outcome.map_err(|e| e.to_string())
}

/// Numbers on the machine in either type.
pub enum Operand<'m> {
    F32(Array<'m, f32>),
    Bf16(Array<'m, bf16>),
}

impl<'m> Operand<'m> {
    /// The values begin `skew` elements behind an aligned address.
    pub fn new(context: &'m CudaContext, dtype: DType, values: &[f32], skew: usize) -> Self {
        match dtype {
            DType::F32 => Operand::F32(Array::skewed(context, values, skew)),
            DType::Bf16 => Operand::Bf16(Array::skewed(context, &values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>(), skew)),
        }
    }

    pub fn address(&self) -> Address {
        match self {
            Operand::F32(array) => array.address(),
            Operand::Bf16(array) => array.address(),
        }
    }

    pub fn read(&self) -> Result<Vec<f32>, String> {
        Ok(match self {
            Operand::F32(array) => array.read()?,
            Operand::Bf16(array) => array.read()?.into_iter().map(bf16::to_f32).collect(),
        })
    }
}

/// A weight on the machine: floats, or groups in blocks.
pub enum TestWeight<'m> {
    Floats(Operand<'m>),
    Blocks(Bits, Array<'m, u32>),
}

impl<'m> TestWeight<'m> {
    /// `num` weights of (n, k), one behind the other. Floats begin `skew` elements behind an
    /// aligned address; behind them lie `behind` of NaN, and behind blocks one of NaN.
    pub fn new(
        context: &'m CudaContext,
        dtype: DType,
        bits: Option<Bits>,
        (num, n, k): (usize, usize, usize),
        values: &[f32],
        (skew, behind): (usize, usize),
    ) -> Self {
        let Some(bits) = bits else {
            return TestWeight::Floats(Operand::new(context, dtype, &[values, &vec![f32::NAN; behind]].concat(), skew));
        };
        let read = |first: usize, dst: &mut [f32]| {
            dst.copy_from_slice(&values[first * k..][..dst.len()]);
            Ok(())
        };
        let mut words = Vec::new();
        for weight in 0..num {
            let rows = RowsFrom { source: &read, first: weight * n };
            let panels = Panels { bits, n, k, source: &rows };
            for i in 0..n.div_ceil(COLUMNS) {
                let mut panel = vec![0; panels.words()];
                panels.fill(i, &mut panel, &mut Vec::new(), |rows, panel| quantise_panel(bits, k, rows, panel)).expect("small values");
                words.extend(panel);
            }
        }
        words.resize(words.len() + bits.block_words(), u32::MAX);
        TestWeight::Blocks(bits, Array::new(context, &words))
    }

    pub fn at(&self) -> WeightAt {
        match self {
            TestWeight::Floats(operand) => WeightAt::floats(operand.address()),
            TestWeight::Blocks(bits, array) => WeightAt { address: array.address(), bits: Some(*bits) },
        }
    }
}

/// What a weight of these rows of k stands for: of floats and of the values of groups, what `dtype`
/// holds of them.
pub fn kept(dtype: DType, bits: Option<Bits>, values: &[f32], k: usize) -> Vec<f32> {
    let kept = match bits {
        None => values.to_vec(),
        Some(Bits::Eight) => oracle::kept(WeightFormat::Q8, values, k),
        Some(Bits::Four) => oracle::kept(WeightFormat::Q4, values, k),
    };
    kept.into_iter().map(|v| oracle::stored(dtype, v)).collect()
}
