//! NVRTC: finds and opens it, compiles one kernel for one architecture, and reads what the
//! assembler reports about it.
//!
//! Options are passed word for word, and every error is headed by the identity of the build: stem,
//! defines, compiler, hash of the options, hash of the source. `REDRAFT_NVRTC_DIR` names a
//! directory that holds libnvrtc and libnvrtc-builtins, such as the one inside the
//! `nvidia-cuda-nvrtc` Python package; without it the usual library search applies.

use std::env;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Instant, UNIX_EPOCH};

use cudarc::nvrtc::sys;
use cudarc::nvrtc::sys::{nvrtcProgram, nvrtcResult};
use libloading::Library;

use crate::cuda::driver::cache::fnv1a;
use crate::cuda::driver::elf::{build_id, max_threads};
use crate::cuda::driver::interface::Build;
use crate::cuda::driver::library::{function_table, loader_words, symbol};
use crate::cuda::driver::source::{Kernel, arch_number, headers, identity, options};
use crate::error::{Error, Result};

/// The oldest architecture that the kernels are written for.
const OLDEST_ARCH: u32 = 80;

/// What the assembler reports about one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryUse {
    pub entry: String,
    /// Most threads of a CTA, from its launch bounds.
    pub threads: u32,
    pub registers: u32,
    /// Spill stores and spill loads together.
    pub spill_bytes: u32,
    /// Static shared memory of a CTA.
    pub shared_bytes: u32,
    pub stack_bytes: u32,
}

/// One kernel, compiled for one architecture.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub cubin: Vec<u8>,
    pub entries: Vec<EntryUse>,
    /// Warnings and the assembler's report.
    pub log: String,
    /// Compiler and assembler together.
    pub compile_ms: f64,
}

/// NVRTC, opened.
pub struct Compiler {
    nvrtc: Nvrtc,
    version: (u32, u32),
    identity: String,
    /// Ascending: 80 is sm_80.
    architectures: Vec<u32>,
}

/// The compiler of this process, opened at the first call.
pub fn compiler() -> Result<&'static Compiler> {
    static COMPILER: OnceLock<Result<Compiler>> = OnceLock::new();
    COMPILER.get_or_init(Compiler::open).as_ref().map_err(Error::clone)
}

impl Compiler {
    /// Major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// `nvrtc13.0-65be0db342ad51a0`: major and minor, then which library of that version it is.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The architectures that this NVRTC compiles for, without suffix letters, ascending.
    pub fn architectures(&self) -> &[u32] {
        &self.architectures
    }

    /// Accepts `sm_80`, or `sm_90a` and `sm_100f` for the specific and family variants of a listed
    /// architecture.
    pub fn check_arch(&self, arch: &str) -> Result<()> {
        let number = arch_number(arch)
            .ok_or_else(|| Error::request(format!("architecture {arch:?}: expected sm_ and a number, as in sm_80 or sm_90a")))?;
        if number < OLDEST_ARCH {
            return Err(Error::request(format!("architecture {arch}: the kernels need sm_{OLDEST_ARCH} or later")));
        }
        if !self.architectures.contains(&number) {
            let list: Vec<String> = self.architectures.iter().filter(|n| **n >= OLDEST_ARCH).map(|n| format!("sm_{n}")).collect();
            let (major, minor) = self.version;
            return Err(Error::request(format!("architecture {arch}: NVRTC {major}.{minor} compiles for {}", list.join(", "))));
        }
        Ok(())
    }

    /// Compiles `build`, whose source is `kernel`, to machine code for `arch`.
    pub fn compile(&self, kernel: &Kernel, build: &Build, arch: &str) -> Result<Compiled> {
        self.check_arch(arch)?;
        let options = options(build, arch);
        let identity = format!("kernel {} [{}]", identity(kernel, build, arch, &self.identity), options.join(" "));
        let program = Program::new(&self.nvrtc, kernel).map_err(|what| Error::kernel(format!("{identity}: {what}")))?;
        let start = Instant::now();
        let outcome = program.compile(&options);
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        let log = program.log().unwrap_or_else(|what| format!("(no log: {what})"));
        if let Err(what) = outcome {
            return Err(Error::kernel(format!("{identity}: {what}\n{}", log.trim_end())));
        }
        let cubin = program.cubin().map_err(|what| Error::kernel(format!("{identity}: {what}")))?;
        let mut entries = entries_in(&log);
        for used in &mut entries {
            // Every entry is declared by a macro that sets bounds.
            used.threads = max_threads(&cubin, &used.entry).unwrap_or(0);
        }
        if entries.is_empty() {
            return Err(Error::kernel(format!("{identity}: the log names no entry\n{}", log.trim_end())));
        }
        Ok(Compiled { cubin, entries, log, compile_ms })
    }

    fn open() -> Result<Self> {
        let nvrtc = Nvrtc::open()?;
        let functions = &nvrtc.functions;
        let (mut major, mut minor, mut count): (c_int, c_int, c_int) = (0, 0, 0);
        // SAFETY: all three are writable for the calls.
        let codes = unsafe { [(functions.version)(&mut major, &mut minor), (functions.get_num_supported_archs)(&mut count)] };
        let mut archs: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: `archs` holds the number of elements that the library has just asked for.
        let last = unsafe { (functions.get_supported_archs)(archs.as_mut_ptr()) };
        for code in [codes[0], codes[1], last] {
            nvrtc.check(code).map_err(|what| Error::device(format!("NVRTC cannot describe itself: {what}")))?;
        }
        let mut architectures: Vec<u32> = archs.iter().filter_map(|arch| u32::try_from(*arch).ok()).collect();
        architectures.sort_unstable();
        let version = (major.unsigned_abs(), minor.unsigned_abs());
        let library = library_file(functions.version as *const c_void).and_then(|path| contents_of(&path));
        let identity = format!("nvrtc{}.{}{}", version.0, version.1, library.map_or(String::new(), |contents| format!("-{contents}")));
        Ok(Compiler { nvrtc, version, identity, architectures })
    }
}

// ---- which library it is ----
//
// nvrtcVersion tells 13.0 for 13.0.48 and for 13.0.88, whose machine code differs. The full version
// is in the header of the PTX that the library writes, at the price of a compilation of 70 ms in
// every process that finds all of its kernels in the cache. The build ID that the linker left in
// the library names its contents and costs one read of 64 KiB.

/// Sixteen hexadecimal digits that change with the contents of a library: the start of its GNU
/// build ID; where the linker left none, a hash of the file's length and time of change.
fn contents_of(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    let (mut head, metadata) = (Vec::new(), file.metadata().ok()?);
    file.take(1 << 16).read_to_end(&mut head).ok()?;
    build_id(&head).or_else(|| {
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        let words = [metadata.len(), changed.as_secs(), u64::from(changed.subsec_nanos())].map(u64::to_le_bytes);
        Some(format!("{:016x}", fnv1a(words.as_flattened().iter())))
    })
}

/// The file of the loaded library that holds the function at `address`.
#[cfg(unix)]
fn library_file(address: *const c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;

    use std::ptr::{null, null_mut};

    let mut found = libc::Dl_info { dli_fname: null(), dli_fbase: null_mut(), dli_sname: null(), dli_saddr: null_mut() };
    // SAFETY: `found` is writable, and any address may be looked up.
    if unsafe { libc::dladdr(address, &mut found) } == 0 || found.dli_fname.is_null() {
        return None;
    }
    // SAFETY: not null, and the loader keeps the name as long as the library is open, which is for
    // good.
    Some(PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(found.dli_fname) }.to_bytes())))
}

#[cfg(not(unix))]
fn library_file(_address: *const c_void) -> Option<PathBuf> {
    None
}

// ---- finding the library ----

fn open_library() -> Result<&'static Library> {
    if let Some(dir) = env::var_os("REDRAFT_NVRTC_DIR").filter(|dir| !dir.is_empty()) {
        return open_in(Path::new(&dir));
    }
    // SAFETY: opens and closes the library by name; its initialisers may run at any time before
    // use.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device(
            "no NVRTC: libnvrtc cannot be opened; install the CUDA toolkit or `pip install nvidia-cuda-nvrtc`, and set \
             REDRAFT_NVRTC_DIR to the directory that holds libnvrtc",
        ));
    }
    // SAFETY: the library is present by the check above, which is all that keeps this from
    // panicking.
    Ok(unsafe { sys::culib() })
}

/// Opens the compiler of one directory: first its built-in headers, which NVRTC looks up by bare
/// name and so would not find there.
fn open_in(dir: &Path) -> Result<&'static Library> {
    let refuse = |what: String| Error::device(format!("REDRAFT_NVRTC_DIR={}: {what}", dir.display()));
    let entries = std::fs::read_dir(dir).map_err(|e| refuse(format!("{e}; set it to the directory that holds libnvrtc")))?;
    let names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let find = |stem: &str| newest(&names, stem).map(|name| dir.join(name)).ok_or_else(|| refuse(format!("holds no {stem}")));
    let (builtins, compiler) = (find("libnvrtc-builtins.so")?, find("libnvrtc.so")?);
    // Both stay open for the life of the process: functions of theirs are kept.
    let open = |path: PathBuf| open_global(path.as_os_str()).map(|library| &*Box::leak(Box::new(library)));
    open(builtins).map_err(|e| refuse(loader_words(&e)))?;
    open(compiler).map_err(|e| refuse(loader_words(&e)))
}

/// The name that is `stem` or `stem.VERSION`, by the highest version.
fn newest<'a>(names: &'a [String], stem: &str) -> Option<&'a String> {
    let version = |name: &str| -> Option<Vec<u32>> {
        let rest = name.strip_prefix(stem)?;
        rest.split('.')
            .skip(1)
            .map(|part| part.parse().ok())
            .collect::<Option<Vec<u32>>>()
            .filter(|_| rest.is_empty() || rest.starts_with('.'))
    };
    names.iter().filter_map(|name| Some((version(name)?, name))).max().map(|(_, name)| name)
}

/// Opens a library so that later ones find its names and its SONAME.
#[cfg(unix)]
fn open_global(path: &OsStr) -> Result<Library, libloading::Error> {
    use libloading::os::unix::{Library as Unix, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the user names the directory as one that holds NVRTC, whose initialisers may run at
    // any time.
    unsafe { Unix::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map(Library::from)
}

#[cfg(not(unix))]
fn open_global(path: &OsStr) -> Result<Library, libloading::Error> {
    // SAFETY: the user names the directory as one that holds NVRTC, whose initialisers may run at
    // any time.
    unsafe { Library::new(path) }
}

// ---- the C interface ----

function_table! { NvrtcFunctions, nvrtcResult;
    version = nvrtcVersion(*mut c_int, *mut c_int);
    get_num_supported_archs = nvrtcGetNumSupportedArchs(*mut c_int);
    get_supported_archs = nvrtcGetSupportedArchs(*mut c_int);
    /// (program, source, name, number of headers, their texts, their names).
    create = nvrtcCreateProgram(*mut nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    destroy = nvrtcDestroyProgram(*mut nvrtcProgram);
    compile = nvrtcCompileProgram(nvrtcProgram, c_int, *const *const c_char);
    get_log_size = nvrtcGetProgramLogSize(nvrtcProgram, *mut usize);
    get_log = nvrtcGetProgramLog(nvrtcProgram, *mut c_char);
    get_cubin_size = nvrtcGetCUBINSize(nvrtcProgram, *mut usize);
    get_cubin = nvrtcGetCUBIN(nvrtcProgram, *mut c_char);
}

/// The library's text for a result code. It takes any code, so it is declared here: cudarc's takes
/// an enum.
type ErrorText = unsafe extern "C" fn(c_int) -> *const c_char;

/// The table, and the text of its codes.
struct Nvrtc {
    functions: NvrtcFunctions,
    error_text: ErrorText,
}

impl Nvrtc {
    fn open() -> Result<Nvrtc> {
        let library = open_library()?;
        // SAFETY: the signature of nvrtc.h, where nvrtcResult is an int-sized enum; the library is
        // never closed.
        let error_text = unsafe { symbol(library, "nvrtcGetErrorString")? };
        Ok(Nvrtc { functions: NvrtcFunctions::load(library)?, error_text })
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == nvrtcResult::NVRTC_SUCCESS as c_int {
            return Ok(());
        }
        // SAFETY: accepts any code and returns a static string.
        let text = unsafe { (self.error_text)(code) };
        if text.is_null() {
            return Err(format!("NVRTC error {code}"));
        }
        // SAFETY: not null, and NUL-terminated by the interface.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A program between creation and destruction.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: nvrtcProgram,
}

impl<'a> Program<'a> {
    fn new(nvrtc: &'a Nvrtc, kernel: &Kernel) -> Result<Self, String> {
        let c = |text: &str| CString::new(text).map_err(|_| "a NUL byte in the source".to_owned());
        let (name, source) = (c(&format!("{}.cu", kernel.stem))?, c(kernel.source)?);
        let texts = headers().iter().map(|(_, text)| c(text)).collect::<Result<Vec<_>, _>>()?;
        let names = headers().iter().map(|(name, _)| c(name)).collect::<Result<Vec<_>, _>>()?;
        let (text_pointers, name_pointers) = (pointers(&texts), pointers(&names));
        let mut handle: nvrtcProgram = std::ptr::null_mut();
        // SAFETY: all strings outlive the call, which copies them; both header arrays hold
        // `texts.len()` pointers.
        let code = unsafe {
            let count = texts.len() as c_int;
            (nvrtc.functions.create)(&mut handle, source.as_ptr(), name.as_ptr(), count, text_pointers.as_ptr(), name_pointers.as_ptr())
        };
        nvrtc.check(code)?;
        Ok(Program { nvrtc, handle })
    }

    fn compile(&self, options: &[String]) -> Result<(), String> {
        let options = options.iter().map(|o| CString::new(o.as_str()).map_err(|_| "a NUL byte in an option".to_owned()));
        let options = options.collect::<Result<Vec<_>, _>>()?;
        let option_pointers = pointers(&options);
        // SAFETY: the handle is live, and the array holds as many pointers to live strings as it
        // says.
        self.nvrtc.check(unsafe { (self.nvrtc.functions.compile)(self.handle, options.len() as c_int, option_pointers.as_ptr()) })
    }

    fn log(&self) -> Result<String, String> {
        let bytes = self.read(self.nvrtc.functions.get_log_size, self.nvrtc.functions.get_log)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        self.read(self.nvrtc.functions.get_cubin_size, self.nvrtc.functions.get_cubin)
    }

    /// A result of the program: first its size, then its bytes.
    fn read(
        &self,
        size_of: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> c_int,
        bytes_of: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut size = 0usize;
        // SAFETY: the handle is live and `size` is writable.
        self.nvrtc.check(unsafe { size_of(self.handle, &mut size) })?;
        let mut bytes = vec![0u8; size];
        // SAFETY: the handle is live and `bytes` holds the size that the library has just asked
        // for.
        self.nvrtc.check(unsafe { bytes_of(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from nvrtcCreateProgram and is destroyed once. Nothing can be
        // done about a failure here.
        let _ = unsafe { (self.nvrtc.functions.destroy)(&mut self.handle) };
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

// ---- the assembler's report ----

/// Entries of a log written under `--ptxas-options=-v`, in its order.
fn entries_in(log: &str) -> Vec<EntryUse> {
    let mut entries: Vec<EntryUse> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|(_, rest)| rest) {
            let entry = rest.split('\'').next().unwrap_or_default().to_owned();
            entries.push(EntryUse { entry, ..EntryUse::default() });
        } else if let Some(current) = entries.last_mut() {
            // "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" or "Used 16
            // registers, used 1 barriers, 32 bytes smem"
            for part in line.rsplit(" : ").next().unwrap_or(line).split(',') {
                let words: Vec<&str> = part.split_whitespace().collect();
                let number = |text: &str| text.parse::<u32>().unwrap_or(0);
                match words.as_slice() {
                    [n, "bytes", "stack", "frame"] => current.stack_bytes = number(n),
                    [n, "bytes", "spill", "stores" | "loads"] => current.spill_bytes += number(n),
                    ["Used", n, "registers"] => current.registers = number(n),
                    [n, "bytes", "smem"] => current.shared_bytes = number(n),
                    _ => {}
                }
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_library_of_a_directory() {
        let names =
            ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.sox"].map(String::from);
        assert_eq!(newest(&names, "libnvrtc.so").map(String::as_str), Some("libnvrtc.so.13"));
        assert_eq!(newest(&names, "libnvrtc-builtins.so").map(String::as_str), Some("libnvrtc-builtins.so.13.0"));
        assert_eq!(newest(&names, "libcuda.so"), None);
    }

    #[test]
    fn assembler_report() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    872 bytes stack frame, 1204 bytes spill stores, 1264 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 872 bytes cumulative stack size, 1060 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 3.018 ms
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 392 bytes cmem[0]
";
        let a = EntryUse { entry: "a".into(), threads: 0, registers: 32, spill_bytes: 2468, shared_bytes: 1060, stack_bytes: 872 };
        let b = EntryUse { entry: "b".into(), registers: 12, ..EntryUse::default() };
        assert_eq!(entries_in(log), [a, b]);
        assert!(entries_in("").is_empty());
    }
}
