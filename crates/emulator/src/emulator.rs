//! The host as a CUDA device: memory, functions, launches, recorded launches.
//!
//! Each OS thread that runs CTAs loads a copy of a kernel's library of its own, so that static
//! shared memory and the runtime's state are never shared. Buffers lie between inaccessible pages,
//! and the few bytes that alignment leaves around them are watched; fresh ones hold NaN. Work is
//! done when it is enqueued, errors included, so `synchronize` only looks at the guards.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use libloading::Library;

use crate::compile::{BuildCache, Compiler, Edit, Source, load, symbol};
use crate::error::{Error, Result};
use crate::tensor_core::TensorCore;

/// An address in the emulated device's memory, which is the host's.
pub type Address = u64;

/// How a launch is cut: CTAs in up to three dimensions, threads of a CTA in one, and the bytes of
/// dynamic shared memory of a CTA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: u32,
    pub shared_bytes: u32,
}

/// A loaded entry of a kernel, valid as long as the emulator that loaded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function(pub usize);

/// A recorded sequence of launches, valid as long as the emulator that recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// The order in which the runtime resumes the threads of a CTA. A missing barrier shows under at
/// least one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Forward,
    Reverse,
    Random,
    WarpGreedy,
}

/// When asynchronous copies happen: as late as the waits allow, or when they are issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    Late,
    Eager,
}

/// How an emulated device behaves.
#[derive(Clone, Copy, Debug)]
pub struct EmulatorOptions {
    /// The GPU that is emulated, such as `sm_90a`: its tensor cores' rounding. Memory and
    /// multiprocessors are the host's.
    pub arch: &'static str,
    pub schedule: Schedule,
    pub copies: Copies,
    /// OS threads over which the CTAs of a launch are spread.
    pub threads: usize,
    /// Whether threads of a CTA that touch the same shared memory must have a barrier between them.
    /// Several times slower.
    pub races: bool,
    pub edit: Option<Edit>,
}

/// What is emulated unless something else is asked for: H100 and H200.
const DEFAULT_ARCH: &str = "sm_90a";

impl Default for EmulatorOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        EmulatorOptions { arch: DEFAULT_ARCH, schedule: Schedule::Forward, copies: Copies::Eager, threads, races: false, edit: None }
    }
}

type Entry = unsafe extern "C" fn(*const c_void);
type CatchFn = unsafe extern "C" fn(*mut c_void);
#[rustfmt::skip]
type LaunchFn = unsafe extern "C" fn(
    *const c_char, Entry, *const c_void, *const c_uint, c_uint, c_uint, c_int, c_int, c_int, c_int, c_uint, c_uint, CatchFn,
) -> *const c_char;
type MapFn = unsafe extern "C" fn(usize) -> *mut c_void;
type UnmapFn = unsafe extern "C" fn(*mut c_void, usize);

/// What all emulators of the process share. Never unloaded: it owns the handler of faults.
struct Runtime {
    map: MapFn,
    unmap: UnmapFn,
    catch_faults: CatchFn,
    _library: Library,
}

impl Runtime {
    fn get(compiler: &Compiler) -> Result<&'static Runtime> {
        static RUNTIME: OnceLock<Result<Runtime>> = OnceLock::new();
        let open = || {
            let library = load(&compiler.runtime_alone()?)?;
            // SAFETY: signatures as in emulate.cpp; the library is kept beside them.
            let (map, unmap, catch_faults) = unsafe {
                (symbol(&library, "redraft_map")?, symbol(&library, "redraft_unmap")?, symbol(&library, "redraft_catch_faults")?)
            };
            Ok(Runtime { map, unmap, catch_faults, _library: library })
        };
        RUNTIME.get_or_init(open).as_ref().map_err(Error::clone)
    }
}

/// One build, loaded once per OS thread.
struct Module {
    copies: Vec<Library>,
}

/// An entry of a module.
struct EntryPoint {
    name: CString,
    module: Arc<Module>,
    /// The runtime's launch and the entry, in each copy.
    copies: Vec<(LaunchFn, Entry)>,
}

#[derive(Clone)]
struct RecordedLaunch {
    function: Function,
    launch: Launch,
    /// As words, so that they are aligned for any field.
    params: Vec<u64>,
}

/// A buffer between guards: `start..start + bytes` inside `mapped` bytes at `map`.
struct Allocation {
    bytes: usize,
    map: usize,
    mapped: usize,
}

/// The host as a CUDA device.
pub struct Emulator {
    options: EmulatorOptions,
    tensor_core: TensorCore,
    compiler: Compiler,
    runtime: &'static Runtime,
    /// By the identity of the build.
    modules: Mutex<HashMap<String, Arc<Module>>>,
    entries: Mutex<Vec<Arc<EntryPoint>>>,
    allocations: Mutex<BTreeMap<Address, Allocation>>,
    /// A guard that was found broken when its buffer was freed.
    damage: Mutex<Option<Error>>,
    capture: Mutex<Option<Vec<RecordedLaunch>>>,
    graphs: Mutex<Vec<Option<Vec<RecordedLaunch>>>>,
}

const PAGE: usize = 4096;
const ALIGNMENT: usize = 256;
/// NaN as a float, out of range as an index.
const GUARD_BYTE: u8 = 0xff;
/// What fresh memory holds: NaN as a float, out of range as an index.
const FRESH_WORD: u32 = 0x7fc0_dead;
/// Dynamic shared memory that a CTA may have on every architecture that is emulated, in bytes.
pub const SHARED_PER_CTA: u32 = 101_376;

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Emulator {
    /// A device of the host's memory and cores. Kernels include `headers`, given as (name, text);
    /// what g++ makes of them is kept in `cache`. Needs g++ (or what `CXX` names) and an x86-64
    /// Linux.
    ///
    /// Errors: [`Error::Architecture`] for an unknown one, [`Error::Device`] without a compiler,
    /// [`Error::Kernel`] with its words where it fails.
    pub fn new(options: EmulatorOptions, headers: &'static [(&'static str, &'static str)], cache: Box<dyn BuildCache>) -> Result<Emulator> {
        let compiler = Compiler { headers, edit: options.edit, races: options.races, cache };
        Ok(Emulator {
            options: EmulatorOptions { threads: options.threads.max(1), ..options },
            tensor_core: TensorCore::for_arch(options.arch)?,
            runtime: Runtime::get(&compiler)?,
            compiler,
            modules: Mutex::default(),
            entries: Mutex::default(),
            allocations: Mutex::default(),
            damage: Mutex::default(),
            capture: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// How it behaves.
    pub fn options(&self) -> &EmulatorOptions {
        &self.options
    }

    /// An `extern "C"` entry of a source, which is compiled and loaded at its first use.
    pub fn function(&self, source: &Source, entry: &str) -> Result<Function> {
        let build = self.compiler.build(source)?;
        let known = locked(&self.modules).get(&build.key).cloned();
        let module = match known {
            Some(module) => module,
            None => {
                let code = self.compiler.library(&build)?;
                let copies = (0..self.options.threads).map(|_| load(&code)).collect::<Result<_>>()?;
                let module = Arc::new(Module { copies });
                locked(&self.modules).insert(build.key, module.clone());
                module
            }
        };
        self.enter(module, entry)
    }

    fn enter(&self, module: Arc<Module>, entry: &str) -> Result<Function> {
        let find = |library: &Library| -> Result<(LaunchFn, Entry)> {
            // SAFETY: signatures as in emulate.cpp, where an entry takes its params struct by
            // reference; the entry point keeps the module and so the library.
            unsafe { Ok((symbol(library, "redraft_launch")?, symbol(library, entry)?)) }
        };
        let copies = module.copies.iter().map(find).collect::<Result<Vec<_>>>()?;
        let name = CString::new(entry).map_err(|_| Error::kernel(format!("{entry:?} is no entry")))?;
        let mut entries = locked(&self.entries);
        entries.push(Arc::new(EntryPoint { name, module, copies }));
        Ok(Function(entries.len() - 1))
    }

    /// Runs a launch to its end.
    fn run(&self, recorded: &RecordedLaunch) -> Result<()> {
        let RecordedLaunch { function, launch, params } = recorded;
        let entry = locked(&self.entries)[function.0].clone();
        debug_assert_eq!(entry.module.copies.len(), entry.copies.len());
        let Launch { grid, block, shared_bytes } = *launch;
        if shared_bytes > SHARED_PER_CTA || block == 0 || block > 1024 || block % 32 != 0 || grid.contains(&0) {
            return Err(Error::kernel(format!("{}: no machine launches {launch:?}", entry.name.to_string_lossy())));
        }
        let ctas: u64 = grid.iter().map(|n| u64::from(*n)).product();
        let workers = entry.copies.len().min(usize::try_from(ctas).unwrap_or(usize::MAX));
        let part = |worker: usize| {
            let (start, kernel) = entry.copies[worker];
            // SAFETY: the params are those of the entry by the contract of `Driver::launch`; a copy
            // of the library runs on one OS thread at a time, because launches follow each other
            // and workers of a launch take different copies.
            let failure = unsafe {
                start(
                    entry.name.as_ptr(),
                    kernel,
                    params.as_ptr().cast(),
                    grid.as_ptr(),
                    block,
                    shared_bytes,
                    self.options.schedule as c_int,
                    self.options.copies as c_int,
                    self.tensor_core.products_in_a_sum() as c_int,
                    self.tensor_core.fraction_bits(),
                    worker as c_uint,
                    workers as c_uint,
                    self.runtime.catch_faults,
                )
            };
            // SAFETY: not null, NUL-terminated, and in place until the copy's next launch.
            (!failure.is_null()).then(|| unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned())
        };
        let failure = if workers == 1 {
            part(0)
        } else {
            thread::scope(|scope| {
                let others: Vec<_> = (1..workers).map(|worker| scope.spawn(move || part(worker))).collect();
                let first = part(0);
                others.into_iter().map(|other| other.join().expect("a launch does not panic")).fold(first, Option::or)
            })
        };
        match failure {
            None => Ok(()),
            Some(what) => Err(Error::kernel(format!("{what} ({:?}, copies {:?})", self.options.schedule, self.options.copies))),
        }
    }

    /// Refuses a range that is not inside one buffer.
    fn check_range(&self, address: Address, bytes: usize, what: &str) -> Result<()> {
        let allocations = locked(&self.allocations);
        let inside = allocations.range(..=address).next_back().is_some_and(|(start, allocation)| {
            let offset = (address - start) as usize;
            offset <= allocation.bytes && bytes <= allocation.bytes - offset
        });
        if inside { Ok(()) } else { Err(Error::kernel(format!("{what} of {bytes} bytes at {address:#x}: outside of any buffer"))) }
    }

    /// A GPU refuses all but launches between begin_capture and end_capture, so this one does.
    fn check_recording(&self, what: &str) -> Result<()> {
        match *locked(&self.capture) {
            None => Ok(()),
            Some(_) => Err(Error::device(format!("emu: {what} between begin_capture and end_capture"))),
        }
    }

    fn check_guards(&self) -> Result<()> {
        if let Some(error) = locked(&self.damage).take() {
            return Err(error);
        }
        locked(&self.allocations).iter().try_for_each(|(start, allocation)| allocation.check(*start))
    }
}

impl Allocation {
    /// The bytes of its pages in front of and behind the buffer.
    fn guards(&self, start: Address) -> [&[u8]; 2] {
        let before = start as usize - self.map;
        let after = self.mapped - before - self.bytes;
        // SAFETY: the mapping is readable over `mapped` bytes and lives as long as the allocation.
        unsafe {
            [
                std::slice::from_raw_parts(self.map as *const u8, before),
                std::slice::from_raw_parts((start as usize + self.bytes) as *const u8, after),
            ]
        }
    }

    fn check(&self, start: Address) -> Result<()> {
        let [before, after] = self.guards(start);
        let touched = |guard: &[u8]| guard.iter().position(|byte| *byte != GUARD_BYTE);
        if let Some(at) = touched(before) {
            return Err(Error::kernel(format!("a write {} bytes in front of a buffer of {} bytes", before.len() - at, self.bytes)));
        }
        match touched(after) {
            Some(at) => Err(Error::kernel(format!("a write {at} bytes behind the end of a buffer of {} bytes", self.bytes))),
            None => Ok(()),
        }
    }
}

impl Emulator {
    /// At least `bytes` bytes, aligned to 256 and filled with NaN patterns.
    pub fn alloc(&self, bytes: usize) -> Result<Address> {
        let used = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mapped = used.next_multiple_of(PAGE);
        // SAFETY: maps fresh pages; a null answer is checked.
        let map = unsafe { (self.runtime.map)(mapped) };
        if map.is_null() {
            return Err(Error::device(format!("out of memory: {bytes} bytes asked for; shorten --length or the batch")));
        }
        let map = map as usize;
        let start = (map + mapped - used) as Address;
        // SAFETY: the mapping is writable over `mapped` bytes, which these two cover.
        unsafe {
            std::ptr::write_bytes(map as *mut u8, GUARD_BYTE, mapped);
            let whole = bytes / 4;
            std::slice::from_raw_parts_mut(start as *mut u32, whole).fill(FRESH_WORD);
        }
        locked(&self.allocations).insert(start, Allocation { bytes, map, mapped });
        Ok(start)
    }

    /// Gives back what [`Emulator::alloc`] gave. A guard that was overwritten is an error of the
    /// next call that waits.
    ///
    /// # Panics
    /// If `address` was not allocated, or was freed before.
    pub fn free(&self, address: Address) {
        let allocation = locked(&self.allocations).remove(&address);
        let allocation = allocation.unwrap_or_else(|| panic!("{address:#x} was not allocated, or was freed before"));
        if let Err(error) = allocation.check(address) {
            // The error is returned by the next call that waits.
            locked(&self.damage).get_or_insert(error);
        }
        // SAFETY: mapped by `alloc` with this size, unmapped once: the entry is gone.
        unsafe { (self.runtime.unmap)(allocation.map as *mut c_void, allocation.mapped) };
    }

    /// Copies to a buffer.
    pub fn write(&self, dst: Address, src: &[u8]) -> Result<()> {
        self.check_recording("write")?;
        self.check_range(dst, src.len(), "a write")?;
        // SAFETY: the range lies in one buffer, checked above, and Rust's memory never overlaps it.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst as *mut u8, src.len()) };
        Ok(())
    }

    /// Looks at the guards of all buffers, then copies from one.
    pub fn read(&self, src: Address, dst: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        self.check_range(src, dst.len(), "a read")?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    /// Copies between buffers.
    pub fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()> {
        self.check_recording("copy")?;
        self.check_range(src, bytes, "a copy from")?;
        self.check_range(dst, bytes, "a copy to")?;
        // SAFETY: both ranges lie in buffers, checked above.
        unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes) };
        Ok(())
    }

    /// Fills `words` 32-bit words.
    pub fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()> {
        self.check_recording("fill")?;
        self.check_range(dst, 4 * words, "a fill")?;
        // SAFETY: the range lies in one buffer, checked above; buffers are aligned and fills begin
        // at words.
        unsafe { std::slice::from_raw_parts_mut(dst as *mut u32, words) }.fill(word);
        Ok(())
    }

    /// Looks at the guards of all buffers.
    pub fn synchronize(&self) -> Result<()> {
        self.check_recording("synchronize")?;
        self.check_guards()
    }

    /// Runs one launch, or records it. `params` are the bytes of the kernel's one params struct.
    pub fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()> {
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        };
        let words = params.chunks(8).map(word).collect();
        let recorded = RecordedLaunch { function, launch, params: words };
        if let Some(capture) = locked(&self.capture).as_mut() {
            capture.push(recorded);
            return Ok(());
        }
        self.run(&recorded)
    }

    /// From here on launches are recorded instead of run, until [`Emulator::end_capture`].
    pub fn begin_capture(&self) -> Result<()> {
        *locked(&self.capture) = Some(Vec::new());
        Ok(())
    }

    /// True from [`Emulator::begin_capture`] to [`Emulator::end_capture`].
    pub fn is_capturing(&self) -> bool {
        locked(&self.capture).is_some()
    }

    /// The launches since [`Emulator::begin_capture`].
    pub fn end_capture(&self) -> Result<Graph> {
        let recorded = locked(&self.capture).take().ok_or_else(|| Error::kernel("no capture was begun"))?;
        let mut graphs = locked(&self.graphs);
        graphs.push(Some(recorded));
        Ok(Graph(graphs.len() - 1))
    }

    /// Runs recorded launches.
    pub fn launch_graph(&self, graph: Graph) -> Result<()> {
        self.check_recording("launch_graph")?;
        let recorded = locked(&self.graphs).get(graph.0).cloned().flatten();
        let recorded = recorded.ok_or_else(|| Error::kernel("a graph that was dropped cannot be replayed"))?;
        recorded.iter().try_for_each(|launch| self.run(launch))
    }

    /// Forgets recorded launches.
    pub fn drop_graph(&self, graph: Graph) {
        if let Some(slot) = locked(&self.graphs).get_mut(graph.0) {
            *slot = None;
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        for (_, allocation) in std::mem::take(&mut *locked(&self.allocations)) {
            // SAFETY: mapped by `alloc` with this size, unmapped once.
            unsafe { (self.runtime.unmap)(allocation.map as *mut c_void, allocation.mapped) };
        }
    }
}
