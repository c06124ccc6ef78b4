//! Builds of this binary: the list of them, lines that name builds, and compiling many at once.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::driver::cache::Cache;
use crate::cuda::driver::compile::{Compiled, compiler};
use crate::cuda::driver::interface::Build;
use crate::cuda::driver::prebuilt::EXTENSION;
use crate::cuda::driver::source::{kernel, kernels, portable_identity};
use crate::cuda::ops::{
    attention, embed, gather, guidance, linear, moe, norm, remask, rope_append, route, sample, select_masked, shortlist, unmask,
};
use crate::error::{Error, Result};

/// The builds that are checked and measured: every kernel with the constants that the supported
/// models ask for. A launcher may ask for others at load, such as an unusual page size.
pub fn builds() -> Vec<Build> {
    [
        attention::builds(),
        embed::builds(),
        gather::builds(),
        guidance::builds(),
        linear::builds(),
        moe::builds(),
        norm::builds(),
        remask::builds(),
        rope_append::builds(),
        route::builds(),
        sample::builds(),
        select_masked::builds(),
        shortlist::builds(),
        unmask::builds(),
    ]
    .concat()
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

/// One build, compiled for one architecture.
pub(in crate::cuda) struct CompiledBuild<'a> {
    pub arch: &'a str,
    pub build: &'a Build,
    pub compiled: Compiled,
}

/// Compiles each build for each architecture, and returns all in that order. All architectures are
/// checked before the first compilation.
pub(in crate::cuda) fn compile_all<'a>(archs: &'a [String], builds: &'a [Build]) -> Result<Vec<CompiledBuild<'a>>> {
    let compiler = compiler()?;
    archs.iter().try_for_each(|arch| compiler.check_arch(arch))?;
    let jobs: Vec<(&str, &Build)> = archs.iter().flat_map(|arch| builds.iter().map(move |build| (arch.as_str(), build))).collect();
    let compile = |&(arch, build): &(&'a str, &'a Build)| -> Result<CompiledBuild<'a>> {
        Ok(CompiledBuild { arch, build, compiled: compiler.compile(&kernel(build.stem), build, arch)? })
    };
    // NVRTC compiles different programs on different threads at once.
    let next = AtomicUsize::new(0);
    let worker = || -> Vec<(usize, Result<CompiledBuild>)> {
        let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|job| *job < jobs.len());
        std::iter::from_fn(take).map(|job| (job, compile(&jobs[job]))).collect()
    };
    let mut outcomes = std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(jobs.len());
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("compiling does not panic")).collect::<Vec<_>>()
    });
    outcomes.sort_by_key(|(job, _)| *job);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Compiles each of `builds` for each of `archs` into `dir`, and returns the files and their bytes
/// in all. All architectures are checked before the first compilation.
///
/// Errors: [`Error::Device`] without NVRTC, [`Error::Kernel`] with its log, [`Error::Io`] for a
/// file that cannot be written.
pub fn kernels_build(archs: &[String], builds: &[Build], dir: &Path) -> Result<(Vec<PathBuf>, u64)> {
    compiler()?;
    fs::create_dir_all(dir).map_err(|error| Error::io(dir, &error))?;
    let (files, kernels) = (Cache::in_dir(dir), kernels());
    let mut bytes = 0;
    let compiled = compile_all(archs, builds)?;
    let paths = compiled.into_iter().map(|CompiledBuild { arch, build, compiled }| {
        let kernel = kernels.iter().find(|kernel| kernel.stem == build.stem).expect("compiled from it");
        let key = portable_identity(kernel, build, arch);
        bytes += compiled.cubin.len() as u64;
        files.store(&key, EXTENSION, &compiled.cubin).ok_or_else(|| {
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
    use crate::cuda::driver::prebuilt::line_of;

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
            ("\nattend THREADS=1", "line 2: kernel \"attend\": expected one of attention, embed, "),
            ("gather", "line 1: gather: expected 1 constants: THREADS"),
            ("gather THREADS=128 MORE=1", "gather: expected 1 constants: THREADS"),
            ("gather THREAD=128", "gather: expected THREADS=NUMBER, found \"THREAD=128\""),
            ("gather THREADS=-1", "expected THREADS=NUMBER"),
            ("gather THREADS=4294967296", "expected THREADS=NUMBER"),
        ] {
            let text = parse_builds(line).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
