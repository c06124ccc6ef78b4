//! The second machine behind the launchers: kernels compiled for the host by g++ and run by
//! `kernels/emulate.cpp`.
//!
//! A build is compiled once and kept on disk beside the cubins; each OS thread that runs CTAs loads
//! a copy of the library of its own, so that a kernel's static shared memory and the runtime's
//! state are never shared. Buffers lie between inaccessible pages, and the few bytes that alignment
//! leaves around them are watched; fresh ones hold NaN. Work is done when it is enqueued, errors
//! included, so `synchronize` only looks at the guards.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::{env, fs, process, thread};

use libloading::Library;

use crate::cuda::driver::cache::Cache;
use crate::cuda::driver::interface::{Address, Build, Driver, Function, Graph, Launch, Limits};
use crate::cuda::driver::source::{EMULATION, define_options, headers, kernel};
use crate::cuda::tensor_core::TensorCore;
use crate::error::{Error, Result};

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

/// A change to one source file, for the tests of the tests: the text must occur exactly once.
#[derive(Clone, Copy, Debug)]
pub struct Edit {
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// How an emulated machine behaves.
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

/// What all machines of the process share. Never unloaded: it owns the handler of faults.
struct Runtime {
    map: MapFn,
    unmap: UnmapFn,
    catch_faults: CatchFn,
    _library: Library,
}

impl Runtime {
    fn get() -> Result<&'static Runtime> {
        static RUNTIME: OnceLock<Result<Runtime>> = OnceLock::new();
        let open = || {
            let library = load(&build_library("runtime", &[], None, false)?)?;
            // SAFETY: signatures as in emulate.cpp; the library is kept beside them.
            let (map, unmap, catch_faults) = unsafe {
                (
                    crate::cuda::driver::library::symbol(&library, "redraft_map")?,
                    crate::cuda::driver::library::symbol(&library, "redraft_unmap")?,
                    crate::cuda::driver::library::symbol(&library, "redraft_catch_faults")?,
                )
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
struct Recorded {
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

/// The host as a CUDA machine.
pub struct Emulator {
    options: EmulatorOptions,
    tensor_core: TensorCore,
    runtime: &'static Runtime,
    modules: Mutex<HashMap<Build, Arc<Module>>>,
    entries: Mutex<Vec<Arc<EntryPoint>>>,
    allocations: Mutex<BTreeMap<Address, Allocation>>,
    /// A guard that was found broken when its buffer was freed.
    damage: Mutex<Option<Error>>,
    capture: Mutex<Option<Vec<Recorded>>>,
    graphs: Mutex<Vec<Option<Vec<Recorded>>>>,
}

const PAGE: usize = 4096;
const ALIGNMENT: usize = 256;
/// NaN as a float, out of range as an index.
const GUARD_BYTE: u8 = 0xff;
/// What fresh memory holds: NaN as a float, out of range as an index.
const FRESH_WORD: u32 = 0x7fc0_dead;
/// What a launch may do at most on every supported machine.
const SHARED_PER_CTA: u32 = 101_376;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Emulator {
    /// A machine of the host's memory and cores. Needs g++ (or what `CXX` names) and an x86-64
    /// Linux.
    ///
    /// Errors: [`Error::Request`] for an unknown architecture, [`Error::Device`] without a
    /// compiler, [`Error::Kernel`] with its words where it fails.
    pub fn new(options: EmulatorOptions) -> Result<Emulator> {
        Ok(Emulator {
            options: EmulatorOptions { threads: options.threads.max(1), ..options },
            tensor_core: TensorCore::of(options.arch)?,
            runtime: Runtime::get()?,
            modules: Mutex::default(),
            entries: Mutex::default(),
            allocations: Mutex::default(),
            damage: Mutex::default(),
            capture: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// An entry of a source that is not among the kernels, for tests of the runtime.
    pub fn function_in(&self, file: &str, source: &str, defines: &[(&'static str, u32)], entry: &str) -> Result<Function> {
        let options: Vec<String> = defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let code =
            build_library(file.trim_end_matches(".cu"), &options, Some(&sources(file, source, self.options.edit)?), self.options.races)?;
        self.enter(Arc::new(self.load_copies(&code)?), entry)
    }

    fn load_copies(&self, code: &[u8]) -> Result<Module> {
        Ok(Module { copies: (0..self.options.threads).map(|_| load(code)).collect::<Result<_>>()? })
    }

    fn module(&self, build: &Build) -> Result<Arc<Module>> {
        if let Some(module) = locked(&self.modules).get(build) {
            return Ok(module.clone());
        }
        crate::cuda::driver::prebuilt::log(build)?;
        let file = format!("{}.cu", build.stem);
        let options: Vec<String> = define_options(build).collect();
        let code =
            build_library(build.stem, &options, Some(&sources(&file, kernel(build.stem).source, self.options.edit)?), self.options.races)?;
        let module = Arc::new(self.load_copies(&code)?);
        locked(&self.modules).insert(build.clone(), module.clone());
        Ok(module)
    }

    fn enter(&self, module: Arc<Module>, entry: &str) -> Result<Function> {
        let find = |library: &Library| -> Result<(LaunchFn, Entry)> {
            // SAFETY: signatures as in emulate.cpp, where an entry takes its params struct by
            // reference; the entry point keeps the module and so the library.
            unsafe {
                Ok((
                    crate::cuda::driver::library::symbol(library, "redraft_launch")?,
                    crate::cuda::driver::library::symbol(library, entry)?,
                ))
            }
        };
        let copies = module.copies.iter().map(find).collect::<Result<Vec<_>>>()?;
        let name = CString::new(entry).map_err(|_| Error::kernel(format!("{entry:?} is no entry")))?;
        let mut entries = locked(&self.entries);
        entries.push(Arc::new(EntryPoint { name, module, copies }));
        Ok(Function(entries.len() - 1))
    }

    /// Runs a launch to its end.
    fn run(&self, recorded: &Recorded) -> Result<()> {
        let Recorded { function, launch, params } = recorded;
        let entry = locked(&self.entries)[function.0].clone();
        debug_assert_eq!(entry.module.copies.len(), entry.copies.len());
        let Launch { grid, block, shared_bytes } = *launch;
        if shared_bytes > SHARED_PER_CTA || block == 0 || block > 1024 || block % 32 != 0 || launch.is_empty() {
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

impl Driver for Emulator {
    fn name(&self) -> String {
        let EmulatorOptions { arch, threads, .. } = self.options;
        format!("emu {arch} ({threads} thread{})", if threads == 1 { "" } else { "s" })
    }

    fn arch(&self) -> String {
        self.options.arch.into()
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits { num_sms: 4, shared_per_cta: SHARED_PER_CTA, memory_bytes: 1 << 40, free_bytes: 1 << 40 }
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
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

    fn free(&self, address: Address) {
        let allocation = locked(&self.allocations).remove(&address);
        let allocation = allocation.unwrap_or_else(|| panic!("{address:#x} was not allocated, or was freed before"));
        if let Err(error) = allocation.check(address) {
            // The error is returned by the next call that waits.
            locked(&self.damage).get_or_insert(error);
        }
        // SAFETY: mapped by `alloc` with this size, unmapped once: the entry is gone.
        unsafe { (self.runtime.unmap)(allocation.map as *mut c_void, allocation.mapped) };
    }

    fn write(&self, dst: Address, src: &[u8]) -> Result<()> {
        self.check_recording("write")?;
        self.check_range(dst, src.len(), "a write")?;
        // SAFETY: the range lies in one buffer, checked above, and Rust's memory never overlaps it.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst as *mut u8, src.len()) };
        Ok(())
    }

    fn read(&self, src: Address, dst: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        self.check_range(src, dst.len(), "a read")?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()> {
        self.check_recording("copy")?;
        self.check_range(src, bytes, "a copy from")?;
        self.check_range(dst, bytes, "a copy to")?;
        // SAFETY: both ranges lie in buffers, checked above.
        unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes) };
        Ok(())
    }

    fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()> {
        self.check_recording("fill")?;
        self.check_range(dst, 4 * words, "a fill")?;
        // SAFETY: the range lies in one buffer, checked above; buffers are aligned and fills begin
        // at words.
        unsafe { std::slice::from_raw_parts_mut(dst as *mut u32, words) }.fill(word);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.check_recording("synchronize")?;
        self.check_guards()
    }

    fn function(&self, build: &Build, entry: &str) -> Result<Function> {
        self.enter(self.module(build)?, entry)
    }

    fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()> {
        let mut words = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..params.len()].copy_from_slice(params);
        let recorded = Recorded { function, launch, params: words };
        if let Some(capture) = locked(&self.capture).as_mut() {
            capture.push(recorded);
            return Ok(());
        }
        self.run(&recorded)
    }

    fn begin_capture(&self) -> Result<()> {
        *locked(&self.capture) = Some(Vec::new());
        Ok(())
    }

    fn is_capturing(&self) -> bool {
        locked(&self.capture).is_some()
    }

    fn end_capture(&self) -> Result<Graph> {
        let recorded = locked(&self.capture).take().ok_or_else(|| Error::kernel("no capture was begun"))?;
        let mut graphs = locked(&self.graphs);
        graphs.push(Some(recorded));
        Ok(Graph(graphs.len() - 1))
    }

    fn launch_graph(&self, graph: Graph) -> Result<()> {
        self.check_recording("launch_graph")?;
        let recorded = locked(&self.graphs).get(graph.0).cloned().flatten();
        let recorded = recorded.ok_or_else(|| Error::kernel("a graph that was dropped cannot be replayed"))?;
        recorded.iter().try_for_each(|launch| self.run(launch))
    }

    fn drop_graph(&self, graph: Graph) {
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

// ---- building ----

/// The compiler's name and version, for the identity of a build.
fn compiler() -> Result<&'static (String, String)> {
    static COMPILER: OnceLock<Result<(String, String)>> = OnceLock::new();
    let find = || {
        let name = env::var("CXX").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "g++".into());
        let absent = |e: &dyn std::fmt::Display| {
            Error::device(format!("no C++ compiler: {name}: {e}; emulation compiles the kernels for the host: install g++, or set CXX"))
        };
        let output = Command::new(&name).arg("--version").output().map_err(|e| absent(&e))?;
        if !output.status.success() {
            return Err(absent(&output.status));
        }
        let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned();
        Ok((name, version))
    };
    COMPILER.get_or_init(find).as_ref().map_err(Error::clone)
}

/// Options of every compilation. No contraction: a kernel writes fmaf where it means it.
const OPTIONS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fno-exceptions",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-w",
    // Some distributions turn on a longjmp that allows no leap from fiber to fiber.
    "-U_FORTIFY_SOURCE",
    "-DREDRAFT_EMULATE",
];

/// With the instruction, fmaf is one; without it a slow and equal library call.
fn machine_options() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        return &["-mfma", "-mavx2"];
    }
    &[]
}

/// Files of a kernel's library, with the edit applied.
fn sources(file: &str, source: &str, edit: Option<Edit>) -> Result<Sources> {
    let mut files: Vec<(String, String)> = headers().iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    files.push((file.to_owned(), source.to_owned()));
    if let Some(Edit { file: edited, from, to }) = edit
        && let Some((_, text)) = files.iter_mut().find(|(name, _)| name == edited)
    {
        if text.matches(from).count() != 1 {
            return Err(Error::kernel(format!("{from:?} stands {} times in {edited}", text.matches(from).count())));
        }
        *text = text.replacen(from, to, 1);
    }
    Ok(Sources { main: file.to_owned(), files })
}

struct Sources {
    main: String,
    files: Vec<(String, String)>,
}

/// A directory that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("redraft-emu-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = env::temp_dir().join(name);
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, &e))?;
        Ok(Scratch(dir))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, bytes).map_err(|e| Error::io(&path, &e))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays in the temporary directory and is never read.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What g++ makes under a key: from the cache, or built now and kept. Threads that ask for the same
/// one wait for each other.
fn built(key: String, extension: &str, build: impl FnOnce(&Scratch) -> Result<Vec<u8>>) -> Result<Arc<Vec<u8>>> {
    type Slot = Arc<OnceLock<Result<Arc<Vec<u8>>>>>;
    static BUILT: Mutex<Option<HashMap<String, Slot>>> = Mutex::new(None);
    let slot = locked(&BUILT).get_or_insert_default().entry(key.clone()).or_default().clone();
    let make = || {
        let cache = Cache::open();
        if let Some(code) = cache.get(&key, extension) {
            return Ok(Arc::new(code));
        }
        let scratch = Scratch::new()?;
        for (name, text) in EMULATION {
            scratch.write(name, text.as_bytes())?;
        }
        let code = build(&scratch)?;
        // Without a cache every process builds anew.
        let _ = cache.put(&key, extension, &code);
        Ok(Arc::new(code))
    };
    slot.get_or_init(make).clone()
}

/// Runs g++ with `arguments` in a scratch directory and reads what it wrote to `out`.
fn run_compiler(scratch: &Scratch, key: &str, out: &str, arguments: &[String]) -> Result<Vec<u8>> {
    let mut command = Command::new(&compiler()?.0);
    run_tool(scratch, key, command.args(OPTIONS).args(machine_options()).args(arguments).args(["-o", out]))?;
    let path = scratch.0.join(out);
    fs::read(&path).map_err(|e| Error::io(&path, &e))
}

fn run_tool(scratch: &Scratch, key: &str, command: &mut Command) -> Result<()> {
    let output = command.current_dir(&scratch.0).output();
    let tool = command.get_program().to_string_lossy();
    let output = output.map_err(|e| Error::device(format!("{tool} cannot be started: {e}; emulation needs g++ and binutils")))?;
    if !output.status.success() {
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::kernel(format!("kernel {key}: {tool} failed\n{}", log.trim_end())));
    }
    Ok(())
}

/// The runtime as an object file, which every library holds.
fn runtime() -> Result<Arc<Vec<u8>>> {
    let key = format!("emu runtime {:016x} {}", fnv1a(EMULATION.iter().map(|(_, text)| *text)), compiler()?.1);
    built(key.clone(), "o", |scratch| run_compiler(scratch, &key, "emulate.o", &["-c".into(), "emulate.cpp".into()]))
}

/// The shared library of a kernel, or of the runtime alone. With `races` it tells the runtime of
/// every access to memory.
fn build_library(stem: &str, defines: &[String], kernel: Option<&Sources>, races: bool) -> Result<Arc<Vec<u8>>> {
    let texts = EMULATION.iter().map(|(_, text)| *text).chain(kernel.iter().flat_map(|k| k.files.iter().map(|(_, text)| text.as_str())));
    let kind = if races { "emu races" } else { "emu" };
    let key = format!("{kind} {stem} {} {:016x} {}", defines.join(" "), fnv1a(texts), compiler()?.1);
    let runtime = runtime()?;
    built(key.clone(), "so", |scratch| {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        scratch.write("emulate.o", &runtime)?;
        let mut objects = words(&["-shared", "-Wl,-Bsymbolic", "emulate.o"]);
        if let Some(kernel) = kernel {
            for (name, text) in &kernel.files {
                scratch.write(name, text.as_bytes())?;
            }
            let mut arguments = words(&["-c", "-x", "c++", &kernel.main]);
            arguments.extend(defines.iter().cloned());
            // The compiler's half of the sanitizer: the calls. The other half is the runtime's own,
            // so the linker does not hear of it.
            arguments.extend(races.then(|| "-fsanitize=thread".to_owned()));
            run_compiler(scratch, &key, "kernel.o", &arguments)?;
            // Zeroed variables of a kernel are its shared memory. A section whose name is a C word
            // has its ends known to the linker.
            let renamed = ["--rename-section", ".bss=redraft_shared,alloc,load,data,contents", "kernel.o"];
            run_tool(scratch, &key, Command::new("objcopy").args(renamed))?;
            objects.push("kernel.o".into());
        }
        run_compiler(scratch, &key, "kernel.so", &objects)
    })
}

/// Names a build by its sources and options.
fn fnv1a<'a>(texts: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = texts.chain(OPTIONS.iter().copied()).chain(machine_options().iter().copied()).flat_map(str::bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Loads a copy of a library that shares nothing with other copies: the loader knows libraries by
/// their file, so each gets one.
fn load(code: &[u8]) -> Result<Library> {
    let scratch = Scratch::new()?;
    let path = scratch.write("kernel.so", code)?;
    // SAFETY: the library was built from the project's sources; it has no initialisers of its own
    // beyond those of its static vectors.
    unsafe { Library::new(&path) }
        .map_err(|e| Error::device(format!("an emulated kernel cannot be loaded: {}", crate::cuda::driver::library::loader_words(&e))))
}
