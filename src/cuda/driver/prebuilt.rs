//! Kernels built beforehand: the lines that name builds, the log of builds that a process loads,
//! and a directory of cubins that a machine uses without NVRTC.
//!
//! ```text
//! REDRAFT_KERNEL_LOG=FILE        a workload appends `attention THREADS=128 HEAD_DIM=64 PAGE_SIZE=16`, ...
//! redraft kernels build --arch sm_90a --list FILE --out DIR
//! REDRAFT_KERNELS_DIR=DIR        another machine loads these cubins first
//! ```
//! A file of the directory is named after its build, architecture, and hashes of options and
//! source, without the compiler's version: the machine that loads it may have another compiler, or
//! none. Other sources or options have other names, so cubins of another version of this program
//! are not found. The checksum of the cache covers every file.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::{env, io};

use crate::cuda::driver::cache::Cache;
use crate::cuda::driver::compile::{arch_number, compiler};
use crate::cuda::driver::interface::Build;
use crate::cuda::kernels::report::{CompiledBuild, Kernel, builds, compile_all, constants, kernels, portable_identity};
use crate::error::{Error, Result};

const EXTENSION: &str = "cubin";

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

// ---- lines ----

/// `STEM NAME=VALUE NAME=VALUE`, constants in the order in which the compiler gets them.
pub fn line_of(build: &Build) -> String {
    format!("{} {}", build.stem, constants(build)).trim_end().to_owned()
}

/// The builds of a list, each once, in its order. `#` starts a comment.
///
/// Errors: [`Error::Request`] with the number of a line that names no build of this program.
pub fn parse_builds(text: &str) -> Result<Vec<Build>> {
    let mut found: Vec<Build> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            let build = parse_build(line).map_err(|what| Error::request(format!("line {}: {what}", number + 1)))?;
            found.extend((!found.contains(&build)).then_some(build));
        }
    }
    Ok(found)
}

fn parse_build(line: &str) -> Result<Build, String> {
    let mut words = line.split_whitespace();
    let stem = words.next().unwrap_or_default();
    let known = builds();
    let Some(like) = known.iter().find(|build| build.stem == stem) else {
        let stems: BTreeSet<&str> = known.iter().map(|build| build.stem).collect();
        return Err(format!("kernel {stem:?}: expected one of {}", stems.into_iter().collect::<Vec<_>>().join(", ")));
    };
    // A kernel's constants have the same names and order in every build.
    let mut defines = Vec::new();
    for ((name, _), word) in like.defines.iter().zip(words.by_ref()) {
        let value = word.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).and_then(|value| value.parse().ok());
        defines.push((*name, value.ok_or_else(|| format!("{stem}: expected {name}=NUMBER, found {word:?}"))?));
    }
    if defines.len() < like.defines.len() || words.next().is_some() {
        let names: Vec<&str> = like.defines.iter().map(|(name, _)| *name).collect();
        return Err(format!("{stem}: expected {} constants: {}", names.len(), names.join(", ")));
    }
    Ok(Build { stem: like.stem, defines })
}

/// Appends a build that a machine loads to the file that `REDRAFT_KERNEL_LOG` names, once.
///
/// Errors: [`Error::Io`] where the file cannot be read or written.
pub(in crate::cuda) fn log(build: &Build) -> Result<()> {
    static LOGGED: Mutex<Option<BTreeSet<String>>> = Mutex::new(None);
    let Some(path) = variable("REDRAFT_KERNEL_LOG").map(PathBuf::from) else { return Ok(()) };
    let failed = |error: io::Error| Error::io(&path, &error);
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    if logged.is_none() {
        // Earlier processes may have written there.
        *logged = Some(match fs::read_to_string(&path) {
            Ok(text) => text.lines().map(String::from).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => return Err(failed(error)),
        });
    }
    let line = line_of(build);
    if logged.as_mut().is_some_and(|known| known.insert(line.clone())) {
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        // One write: lines of processes that share the file do not mix.
        file.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
    }
    Ok(())
}

// ---- the directory ----

/// A directory of cubins.
pub(in crate::cuda) struct Prebuilt {
    dir: PathBuf,
    files: Cache,
    /// Architectures that its files name, such as `sm_90a`.
    archs: BTreeSet<String>,
}

impl Prebuilt {
    /// The directory that `REDRAFT_KERNELS_DIR` names; none where the variable is not set.
    ///
    /// Errors: [`Error::Device`] where it cannot be read.
    pub fn named() -> Result<Option<Prebuilt>> {
        variable("REDRAFT_KERNELS_DIR").map(|dir| Prebuilt::open(Path::new(&dir))).transpose()
    }

    fn open(dir: &Path) -> Result<Prebuilt> {
        let refuse = |error: io::Error| {
            let next = "set it to a directory that `redraft kernels build --out DIR` wrote";
            Error::device(format!("REDRAFT_KERNELS_DIR={}: {error}; {next}", dir.display()))
        };
        let entries = fs::read_dir(dir).map_err(refuse)?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let archs = names.filter_map(|name| name.split('-').find(|word| arch_number(word).is_some()).map(String::from)).collect();
        Ok(Prebuilt { dir: dir.to_path_buf(), files: Cache::at(dir), archs })
    }

    /// The newest of its architectures whose machine code a device of this compute capability runs:
    /// those of the same generation, up to the device's own.
    pub fn arch_for(&self, (major, minor): (u32, u32)) -> Option<&str> {
        let numbered = self.archs.iter().filter_map(|arch| Some((arch_number(arch)?, arch.as_str())));
        // sm_90a opens the instructions of one chip: it runs on 9.0 alone.
        let runs = |(number, arch): &(u32, &str)| {
            number / 10 == major && *number <= 10 * major + minor && (!arch.ends_with('a') || *number == 10 * major + minor)
        };
        numbered.filter(runs).max().map(|(_, arch)| arch)
    }

    /// `REDRAFT_KERNELS_DIR=DIR holds kernels for sm_80`.
    pub fn describe(&self) -> String {
        let archs = if self.archs.is_empty() { "no device".to_owned() } else { self.archs.iter().cloned().collect::<Vec<_>>().join(", ") };
        format!("REDRAFT_KERNELS_DIR={} holds kernels for {archs}", self.dir.display())
    }

    /// The cubin of a build, whole; or which file is missing or damaged.
    pub fn find(&self, kernel: &Kernel, build: &Build, arch: &str) -> Result<Vec<u8>, String> {
        let key = portable_identity(kernel, build, arch);
        self.files.get(&key, EXTENSION).ok_or_else(|| {
            let path = self.files.path(&key, EXTENSION).unwrap_or_default();
            let what = if path.exists() { "is damaged" } else { "is not there" };
            format!("{} of REDRAFT_KERNELS_DIR {what}", path.display())
        })
    }
}

/// Compiles each of `builds` for each of `archs` into `dir`, and returns the files and their bytes
/// in all. All architectures are checked before the first compilation.
///
/// Errors: [`Error::Device`] without NVRTC, [`Error::Kernel`] with its log, [`Error::Io`] for a
/// file that cannot be written.
pub fn kernels_build(archs: &[String], builds: &[Build], dir: &Path) -> Result<(Vec<PathBuf>, u64)> {
    compiler()?;
    fs::create_dir_all(dir).map_err(|error| Error::io(dir, &error))?;
    let (files, kernels) = (Cache::at(dir), kernels());
    let mut bytes = 0;
    let compiled = compile_all(archs, builds)?;
    let paths = compiled.into_iter().map(|CompiledBuild { arch, build, compiled }| {
        let kernel = kernels.iter().find(|kernel| kernel.stem == build.stem).expect("compiled from it");
        let key = portable_identity(kernel, build, arch);
        bytes += compiled.cubin.len() as u64;
        files.put(&key, EXTENSION, &compiled.cubin).ok_or_else(|| {
            let path = files.path(&key, EXTENSION).unwrap_or_default();
            Error::io(&path, &io::Error::other("cannot be written; is there room, and may this user write there?"))
        })
    });
    let paths = paths.collect::<Result<Vec<PathBuf>>>()?;
    Ok((paths, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_build_is_a_line_and_back() {
        let all = builds();
        let text: String = all.iter().map(|build| line_of(build) + "\n").collect();
        assert_eq!(parse_builds(&text).unwrap(), all);
        let other = parse_builds(
            "# of a workload\n\nattention THREADS=128 HEAD_DIM=32 PAGE_SIZE=8 # twice\nattention THREADS=128 HEAD_DIM=32 PAGE_SIZE=8\n",
        );
        assert_eq!(other.unwrap().iter().map(line_of).collect::<Vec<_>>(), ["attention THREADS=128 HEAD_DIM=32 PAGE_SIZE=8"]);
    }

    #[test]
    fn lines_that_name_no_build() {
        for (line, part) in [
            ("\nattend THREADS=1", "line 2: kernel \"attend\": expected one of ask, attention, blend, "),
            ("embed", "line 1: embed: expected 1 constants: THREADS"),
            ("embed THREADS=128 MORE=1", "embed: expected 1 constants: THREADS"),
            ("embed THREAD=128", "embed: expected THREADS=NUMBER, found \"THREAD=128\""),
            ("embed THREADS=-1", "expected THREADS=NUMBER"),
            ("embed THREADS=4294967296", "expected THREADS=NUMBER"),
        ] {
            let text = parse_builds(line).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn an_architecture_of_the_directory_runs_on_the_device() {
        let dir = tempfile::tempdir().unwrap();
        for arch in ["sm_80", "sm_86", "sm_90", "sm_90a"] {
            fs::write(dir.path().join(format!("embed-THREADS=128-{arch}-0-0.cubin")), "").unwrap();
        }
        fs::write(dir.path().join("README"), "").unwrap();
        let prebuilt = Prebuilt::open(dir.path()).unwrap();
        let arch = |major, minor| prebuilt.arch_for((major, minor));
        assert_eq!([arch(8, 0), arch(8, 6), arch(8, 9)], [Some("sm_80"), Some("sm_86"), Some("sm_86")]);
        assert_eq!([arch(9, 0), arch(9, 1), arch(10, 0), arch(7, 5)], [Some("sm_90a"), Some("sm_90"), None, None]);
        assert!(prebuilt.describe().ends_with(" holds kernels for sm_80, sm_86, sm_90, sm_90a"), "{}", prebuilt.describe());
        assert!(Prebuilt::open(&dir.path().join("README")).is_err());
    }
}
