//! Builds the kernels for the host with g++, launches them, and lends them guarded memory.

use std::ffi::{CStr, c_char, c_void};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use bytemuck::Pod;
use libloading::Library;
use redraft::cuda::params::{Launch, defines};
use redraft::cuda::{headers, kernels};

/// The order in which the runtime resumes the threads of a CTA. A missing barrier shows under at least one of them.
pub const SCHEDULES: [Schedule; 4] = [Schedule::Forward, Schedule::Reverse, Schedule::Random, Schedule::WarpGreedy];

#[derive(Clone, Copy, Debug)]
pub enum Schedule {
    Forward,
    Reverse,
    Random,
    WarpGreedy,
}

/// A change to one source file, for the tests of the tests: (file, text that occurs once, replacement).
pub type Edit = (&'static str, &'static str, &'static str);

/// Kernels as a shared library of host code.
pub struct Emulated {
    library: Library,
}

type Entry = unsafe extern "C" fn(*const c_void);
type LaunchFn = unsafe extern "C" fn(Entry, *const c_void, u32, u32, i32) -> *const c_char;

impl Emulated {
    /// The kernels that ship, and the test entries.
    pub fn shipped() -> &'static Emulated {
        static SHIPPED: OnceLock<Emulated> = OnceLock::new();
        SHIPPED.get_or_init(|| {
            let stems: Vec<&str> = kernels().iter().map(|k| k.stem).chain(["rng"]).collect();
            Emulated::build("shipped", &stems, None)
        })
    }

    /// Compiles `stems` from the sources that the library embeds, with one edit.
    pub fn build(name: &str, stems: &[&str], edit: Option<Edit>) -> Emulated {
        let dir = scratch(name);
        let write = |file: &str, text: &str| {
            let text = match edit {
                Some((edited, from, to)) if edited == file => {
                    assert_eq!(text.matches(from).count(), 1, "{name}: {from:?} in {file}");
                    text.replacen(from, to, 1)
                }
                _ => text.to_owned(),
            };
            std::fs::write(dir.join(file), text).unwrap_or_else(|e| panic!("{file}: {e}"));
        };
        headers().iter().for_each(|(file, text)| write(file, text));
        let mut objects = vec![runtime().to_owned()];
        for stem in stems {
            let file = format!("{stem}.cu");
            match kernels().iter().find(|k| k.stem == *stem) {
                Some(kernel) => write(&file, kernel.source),
                None => write(&file, &std::fs::read_to_string(here().join(&file)).unwrap_or_else(|e| panic!("{file}: {e}"))),
            }
            let constants = if *stem == "rng" { &[("THREADS", 32)][..] } else { defines(stem) };
            let object = dir.join(format!("{stem}.o"));
            let mut command = gxx();
            command.args(["-DREDRAFT_EMULATE", "-x", "c++", "-c"]).arg(dir.join(&file)).arg("-o").arg(&object);
            command.arg("-I").arg(&dir).arg("-I").arg(here()).args(constants.iter().map(|(name, value)| format!("-D{name}={value}")));
            run(command);
            objects.push(object);
        }
        let path = dir.join("kernels.so");
        let mut command = gxx();
        command.args(["-shared", "-Wl,-Bsymbolic", "-o"]).arg(&path).args(&objects);
        run(command);
        // SAFETY: the library was built just now from the project's sources; it has no initialisers of its own.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Emulated { library }
    }

    /// Runs one launch to its end; the error says which rule of the CUDA model the kernel broke.
    ///
    /// # Safety
    /// `P` must be the params struct of `entry`, and every address in it must hold what the kernel's head says.
    pub unsafe fn launch<P>(&self, entry: &str, launch: Launch, schedule: Schedule, params: &P) -> Result<(), String> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: signatures as in emulate.cpp; an entry takes its params struct by reference there. The caller vouches for the
        // params, and the runtime's globals are used by one launch at a time.
        unsafe {
            let start = self.library.get::<LaunchFn>("redraft_launch").expect("the runtime is linked in");
            let kernel = self.library.get::<Entry>(entry).unwrap_or_else(|e| panic!("{entry}: {e}"));
            let failure = start(*kernel, std::ptr::from_ref(params).cast(), launch.grid, launch.block, schedule as i32);
            if failure.is_null() { Ok(()) } else { Err(format!("{entry}, {schedule:?}: {}", CStr::from_ptr(failure).to_string_lossy())) }
        }
    }
}

/// The fiber runtime as an object file, compiled once.
fn runtime() -> &'static Path {
    static RUNTIME: OnceLock<PathBuf> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let object = scratch("runtime").join("emulate.o");
        let mut command = gxx();
        command.arg("-c").arg(here().join("emulate.cpp")).arg("-o").arg(&object);
        run(command);
        object
    })
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

pub fn gxx() -> Command {
    let mut command = Command::new("g++");
    command.args(["-std=c++17", "-O1", "-g", "-fPIC", "-fno-exceptions", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]);
    command
}

pub fn run(mut command: Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("g++ cannot be started ({e}): these tests compile the kernels for the host, install g++"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes on both sides of a [`Guarded`] payload.
const GUARD: usize = 64;
/// NaN as a float, out of range as an index.
const GUARD_BYTE: u8 = 0xff;

/// A buffer that a kernel may write, aligned to 16 bytes, between bytes that poison a result when read and are checked for writes.
pub struct Guarded<T> {
    storage: Vec<u128>,
    start: usize,
    bytes: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Guarded<T> {
    pub fn new(values: &[T]) -> Self {
        Self::skewed(values, 0)
    }

    /// The payload starts `skew` elements behind an aligned address.
    pub fn skewed(values: &[T], skew: usize) -> Self {
        let bytes = size_of_val(values);
        let start = GUARD + skew * size_of::<T>();
        let mut storage = vec![u128::from_ne_bytes([GUARD_BYTE; 16]); (start + bytes + GUARD).div_ceil(16)];
        bytemuck::cast_slice_mut::<u128, u8>(&mut storage)[start..start + bytes].copy_from_slice(bytemuck::cast_slice(values));
        Guarded { storage, start, bytes, element: PhantomData }
    }

    /// The address that a params struct carries.
    pub fn address(&mut self) -> u64 {
        // The pointer is derived from the whole vector, so that it may be used over all of it.
        self.storage.as_mut_ptr() as u64 + self.start as u64
    }

    /// The payload, once the guards were found intact.
    pub fn values(&self) -> Result<Vec<T>, String> {
        let all: &[u8] = bytemuck::cast_slice(&self.storage);
        let outside = all[..self.start].iter().chain(&all[self.start + self.bytes..]);
        if outside.into_iter().any(|byte| *byte != GUARD_BYTE) {
            return Err("a write outside the buffer".to_owned());
        }
        Ok(all[self.start..self.start + self.bytes].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
    }
}

/// `n` numbers in [-1, 1), the same on every run.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    use redraft::rng::{DrawKey, uniforms};
    let key = |position| DrawKey { seed, sample: 0, stage: 0, block: 0, step: 0, position };
    (0..n as u32).map(|position| (2.0 * uniforms(key(position)).token - 1.0) as f32).collect()
}

/// Bit for bit, so that NaN equals itself.
pub fn same_bits(expected: &[f32], found: &[f32], what: &str) -> Result<(), String> {
    assert_eq!(expected.len(), found.len(), "{what}");
    match expected.iter().zip(found).position(|(e, f)| e.to_bits() != f.to_bits()) {
        None => Ok(()),
        Some(i) => {
            let bits = |values: &[f32]| format!("{} ({:#010x})", values[i], values[i].to_bits());
            Err(format!("{what}: element {i} is {}, expected {}", bits(found), bits(expected)))
        }
    }
}
