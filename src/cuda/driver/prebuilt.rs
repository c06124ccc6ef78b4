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
use crate::cuda::driver::interface::Build;
use crate::cuda::driver::source::{Kernel, arch_number, constants, portable_identity};
use crate::error::{Error, Result};

/// Of a file of machine code.
pub(in crate::cuda) const EXTENSION: &str = "cubin";

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

// ---- lines ----

/// `STEM NAME=VALUE NAME=VALUE`, constants in the order in which the compiler gets them.
pub fn line_of(build: &Build) -> String {
    format!("{} {}", build.stem, constants(build)).trim_end().to_owned()
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
        Ok(Prebuilt { dir: dir.to_path_buf(), files: Cache::in_dir(dir), archs })
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

#[cfg(test)]
mod tests {
    use super::*;

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
