//! Kernels as shared libraries of the host: g++ compiles a source with the caller's headers and
//! `runtime/emulate.h`, and links it with the runtime.
//!
//! What g++ made is kept in the caller's cache under a key that names sources, constants, options
//! and compiler. Threads of a process that need the same library wait for one of them to build it.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use libloading::Library;
use tempfile::TempDir;

use crate::emulator::locked;
use crate::error::{Error, Result};

/// The runtime's files as (name, text).
const RUNTIME: [(&str, &str); 2] =
    [("emulate.cpp", include_str!("../runtime/emulate.cpp")), ("emulate.h", include_str!("../runtime/emulate.h"))];

/// Where libraries are kept between processes.
pub trait BuildCache: Send + Sync {
    /// What was kept under a key, whole; or none.
    fn get(&self, key: &str, extension: &str) -> Option<Vec<u8>>;
    /// Keeps bytes under a key. Where that is not possible, every process builds anew.
    fn put(&self, key: &str, extension: &str, bytes: &[u8]);
}

/// One `.cu` file and the constants that it is compiled for.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// Such as `embed.cu`; errors name it.
    pub file: &'a str,
    pub text: &'a str,
    pub defines: &'a [(&'static str, u32)],
}

/// A change to one source file, for the tests of the tests: the text must occur exactly once.
#[derive(Clone, Copy, Debug)]
pub struct Edit {
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// How an emulator compiles its kernels.
pub(crate) struct Compiler {
    pub(crate) headers: &'static [(&'static str, &'static str)],
    pub(crate) edit: Option<Edit>,
    /// The compiled code tells the runtime of every access to memory.
    pub(crate) races: bool,
    pub(crate) cache: Box<dyn BuildCache>,
}

/// What g++ is given for one kernel.
pub(crate) struct Build {
    /// Names sources, constants, options and compiler.
    pub(crate) key: String,
    main: String,
    files: Vec<(String, String)>,
    defines: Vec<String>,
}

impl Compiler {
    /// The files of a kernel's library, with the edit applied.
    pub(crate) fn build(&self, source: &Source) -> Result<Build> {
        let mut files: Vec<(String, String)> = self.headers.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        files.push((source.file.to_owned(), source.text.to_owned()));
        if let Some(Edit { file: edited, from, to }) = self.edit
            && let Some((_, text)) = files.iter_mut().find(|(name, _)| name == edited)
        {
            if text.matches(from).count() != 1 {
                return Err(Error::kernel(format!("{from:?} stands {} times in {edited}", text.matches(from).count())));
            }
            *text = text.replacen(from, to, 1);
        }
        let defines: Vec<String> = source.defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let texts = RUNTIME.iter().map(|(_, text)| *text).chain(files.iter().map(|(_, text)| text.as_str()));
        let kind = if self.races { "emu races" } else { "emu" };
        let stem = source.file.trim_end_matches(".cu");
        let key = format!("{kind} {stem} {} {:016x} {}", defines.join(" "), fnv1a(texts), gxx()?.1);
        Ok(Build { key, main: source.file.to_owned(), files, defines })
    }

    /// The shared library of a kernel.
    pub(crate) fn library(&self, build: &Build) -> Result<Arc<Vec<u8>>> {
        let runtime = self.runtime()?;
        self.built(&build.key, "so", |dir| {
            write(dir, "emulate.o", &runtime)?;
            for (name, text) in &build.files {
                write(dir, name, text.as_bytes())?;
            }
            let mut arguments = words(&["-c", "-x", "c++", &build.main]);
            arguments.extend(build.defines.iter().cloned());
            // The compiler's half of the sanitizer: the calls. The other half is the runtime's own,
            // so the linker does not hear of it.
            arguments.extend(self.races.then(|| "-fsanitize=thread".to_owned()));
            run_gxx(dir, &build.key, "kernel.o", &arguments)?;
            // Zeroed variables of a kernel are its shared memory. A section whose name is a C word
            // has its ends known to the linker.
            let renamed = ["--rename-section", ".bss=redraft_shared,alloc,load,data,contents", "kernel.o"];
            run_tool(dir, &build.key, Command::new("objcopy").args(renamed))?;
            run_gxx(dir, &build.key, "kernel.so", &words(&["-shared", "-Wl,-Bsymbolic", "emulate.o", "kernel.o"]))
        })
    }

    /// The shared library of the runtime without a kernel.
    pub(crate) fn runtime_alone(&self) -> Result<Arc<Vec<u8>>> {
        let runtime = self.runtime()?;
        let key = format!("emu runtime {:016x} {}", fnv1a(RUNTIME.iter().map(|(_, text)| *text)), gxx()?.1);
        self.built(&key, "so", |dir| {
            write(dir, "emulate.o", &runtime)?;
            run_gxx(dir, &key, "kernel.so", &words(&["-shared", "-Wl,-Bsymbolic", "emulate.o"]))
        })
    }

    /// The runtime as an object file, which every library holds.
    fn runtime(&self) -> Result<Arc<Vec<u8>>> {
        let key = format!("emu runtime {:016x} {}", fnv1a(RUNTIME.iter().map(|(_, text)| *text)), gxx()?.1);
        self.built(&key, "o", |dir| run_gxx(dir, &key, "emulate.o", &words(&["-c", "emulate.cpp"])))
    }

    /// What `make` makes in a directory that holds the runtime's files: from the cache, or now and
    /// kept. Threads that need the same one wait for each other.
    fn built(&self, key: &str, extension: &str, make: impl FnOnce(&TempDir) -> Result<Vec<u8>>) -> Result<Arc<Vec<u8>>> {
        type Slot = Arc<OnceLock<Result<Arc<Vec<u8>>>>>;
        static BUILT: Mutex<Option<HashMap<String, Slot>>> = Mutex::new(None);
        let slot = locked(&BUILT).get_or_insert_default().entry(format!("{key}.{extension}")).or_default().clone();
        let find = || {
            if let Some(code) = self.cache.get(key, extension) {
                return Ok(Arc::new(code));
            }
            let dir = scratch()?;
            for (name, text) in RUNTIME {
                write(&dir, name, text.as_bytes())?;
            }
            let code = make(&dir)?;
            self.cache.put(key, extension, &code);
            Ok(Arc::new(code))
        };
        slot.get_or_init(find).clone()
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The compiler's name and version, for the identity of a build.
fn gxx() -> Result<&'static (String, String)> {
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

fn scratch() -> Result<TempDir> {
    TempDir::with_prefix("redraft-emu-").map_err(|e| Error::io(&env::temp_dir(), e))
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.path().join(name);
    fs::write(&path, bytes).map_err(|e| Error::io(&path, e))?;
    Ok(path)
}

/// Runs g++ with `arguments` in a directory and reads what it wrote to `out`.
fn run_gxx(dir: &TempDir, key: &str, out: &str, arguments: &[String]) -> Result<Vec<u8>> {
    let mut command = Command::new(&gxx()?.0);
    run_tool(dir, key, command.args(OPTIONS).args(machine_options()).args(arguments).args(["-o", out]))?;
    let path = dir.path().join(out);
    fs::read(&path).map_err(|e| Error::io(&path, e))
}

fn run_tool(dir: &TempDir, key: &str, command: &mut Command) -> Result<()> {
    let output = command.current_dir(dir.path()).output();
    let tool = command.get_program().to_string_lossy();
    let output = output.map_err(|e| Error::device(format!("{tool} cannot be started: {e}; emulation needs g++ and binutils")))?;
    if !output.status.success() {
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::kernel(format!("kernel {key}: {tool} failed\n{}", log.trim_end())));
    }
    Ok(())
}

/// Names a build by its sources and options.
fn fnv1a<'a>(texts: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = texts.chain(OPTIONS.iter().copied()).chain(machine_options().iter().copied()).flat_map(str::bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Loads a copy of a library that shares nothing with other copies: the loader knows libraries by
/// their file, so each gets one.
pub(crate) fn load(code: &[u8]) -> Result<Library> {
    let dir = scratch()?;
    let path = write(&dir, "kernel.so", code)?;
    // SAFETY: the library was built from the project's sources; it has no initialisers of its own
    // beyond those of its static vectors.
    unsafe { Library::new(&path) }.map_err(|e| Error::device(format!("an emulated kernel cannot be loaded: {}", loader_words(&e))))
}

/// One function of a library.
///
/// # Safety
/// `F` must be the C signature of `name`, and `library` must stay open as long as the function is
/// used.
pub(crate) unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: the caller vouches for the signature and the lifetime.
    let found = unsafe { library.get::<F>(name) };
    found.map(|f| *f).map_err(|e| Error::kernel(loader_words(&e)))
}

/// What the dynamic loader itself says, which libloading keeps one level below its own sentence.
fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}
