//! Sources of the kernels that `build.rs` embeds: texts, hashes, and the identity of a build.
#![forbid(unsafe_code)]

use crate::cuda::driver::cache::fnv1a;
use crate::cuda::driver::interface::Build;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// One `kernels/<stem>.cu`.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub stem: &'static str,
    pub source: &'static str,
    /// FNV-1a of all headers and the source.
    pub hash: u64,
}

impl Kernel {
    /// The `extern "C"` entries, in the order of the source.
    pub fn entries(&self) -> Vec<&'static str> {
        let declared = self.source.lines().filter_map(|line| line.strip_prefix("KERNEL(").or_else(|| line.strip_prefix("KERNEL_BOUNDS(")));
        declared.filter_map(|rest| rest.split(',').next()).map(str::trim).collect()
    }
}

/// `-DNAME=VALUE` of a build's constants, in its order.
pub(in crate::cuda) fn define_options(build: &Build) -> impl Iterator<Item = String> {
    build.defines.iter().map(|(name, value)| format!("-D{name}={value}"))
}

/// Compiler options of a build for `arch`, word for word.
pub(in crate::cuda) fn options(build: &Build, arch: &str) -> Vec<String> {
    let fixed = ["--std=c++17", "--ptxas-options=-v"].map(str::to_owned);
    std::iter::once(format!("--gpu-architecture={arch}")).chain(fixed).chain(define_options(build)).collect()
}

/// Identity of a build: stem, defines, architecture, compiler, hash of the options, hash of the
/// source. It keys the cache and starts every compile error. `compiler` is
/// the identity of the compiler.
pub(in crate::cuda) fn identity(kernel: &Kernel, build: &Build, arch: &str, compiler: &str) -> String {
    format!("{}-{compiler}-{}", build_and_arch(kernel, build, arch), hashes(kernel, &options(build, arch)))
}

/// [`identity`] without the compiler, for machine code that one machine builds and another loads.
pub(in crate::cuda) fn portable_identity(kernel: &Kernel, build: &Build, arch: &str) -> String {
    format!("{}-{}", build_and_arch(kernel, build, arch), hashes(kernel, &options(build, arch)))
}

/// `embed-THREADS=128-sm_90a`.
fn build_and_arch(kernel: &Kernel, build: &Build, arch: &str) -> String {
    let defines = build.defines.iter().map(|(name, value)| format!("{name}={value}"));
    std::iter::once(kernel.stem.to_owned()).chain(defines).chain([arch.to_owned()]).collect::<Vec<_>>().join("-")
}

/// Hash of the compiler options word for word, then hash of the source. The same source under other
/// options is other machine code.
fn hashes(kernel: &Kernel, options: &[String]) -> String {
    let words = options.iter().flat_map(|option| option.as_bytes().iter().chain(b" "));
    format!("{:016x}-{:016x}", fnv1a(words), kernel.hash)
}

/// The kernel of a stem.
pub(in crate::cuda) fn kernel(stem: &str) -> Kernel {
    kernels().into_iter().find(|kernel| kernel.stem == stem).unwrap_or_else(|| panic!("no kernels/{stem}.cu"))
}

/// All kernels, by stem.
pub fn kernels() -> Vec<Kernel> {
    SOURCES.iter().map(|&(stem, source, hash)| Kernel { stem, source, hash }).collect()
}

/// Headers of all kernels as (name, text).
pub fn headers() -> &'static [(&'static str, &'static str)] {
    HEADERS
}

/// `NAME=VALUE NAME=VALUE`.
pub(in crate::cuda) fn constants(build: &Build) -> String {
    build.defines.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

/// 90 of `sm_90a`.
pub(in crate::cuda) fn arch_number(arch: &str) -> Option<u32> {
    let rest = arch.strip_prefix("sm_")?;
    let digits = rest.strip_suffix(['a', 'f']).unwrap_or(rest);
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arch_names() {
        let cases =
            [("sm_80", Some(80)), ("sm_90a", Some(90)), ("sm_100f", Some(100)), ("sm_", None), ("sm_+8", None), ("compute_80", None)];
        for (name, number) in cases {
            assert_eq!(arch_number(name), number, "{name}");
        }
    }

    /// Device code that is not portable C++ has one home, beside its host twin.
    #[test]
    fn inline_assembly_stays_in_the_header() {
        for kernel in kernels() {
            assert!(!kernel.source.contains("asm"), "{}", kernel.stem);
            assert!(!kernel.source.contains("REDRAFT_EMULATE"), "{}", kernel.stem);
        }
    }

    #[test]
    fn an_identity_holds_options_and_compiler() {
        let (kernel, build) = (kernel("embed"), Build { stem: "embed", defines: vec![("THREADS", 128)] });
        let found = identity(&kernel, &build, "sm_90a", "nvrtc13.0-0123456789abcdef");
        assert!(found.starts_with("embed-THREADS=128-sm_90a-nvrtc13.0-0123456789abcdef-"), "{found}");
        assert!(found.ends_with(&format!("-{:016x}", kernel.hash)), "{found}");
        assert_ne!(found, identity(&kernel, &build, "sm_90a", "nvrtc13.0-0123456789abcdee"));

        // One option more, one changed, and two that differ in where a word ends.
        let usual = options(&build, "sm_90a");
        let changed = |options: Vec<&str>| hashes(&kernel, &options.into_iter().map(String::from).collect::<Vec<_>>());
        let words: Vec<&str> = usual.iter().map(String::as_str).collect();
        assert!(found.ends_with(&changed(words.clone())));
        assert_ne!(changed(words.clone()), changed([&words[..], &["--use_fast_math"]].concat()));
        assert_ne!(changed(vec!["-DA=1", "-DB=2"]), changed(vec!["-DA=1", "-DB=3"]));
        assert_ne!(changed(vec!["-DA=1", "2"]), changed(vec!["-DA=12"]));
    }
}
