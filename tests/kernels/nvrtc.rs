//! The real compiler accepts every kernel for every architecture, without spilling. Skipped, with a
//! word, where NVRTC is absent.

use redraft::cuda::{Build, Compiler, Kernel, builds, compiler, kernels, kernels_check, over_budget, report_table};
use redraft::error::Error;

/// The oldest and the newest; `redraft kernels check` has all of them, and CI runs it.
const ARCHS: [&str; 2] = ["sm_80", "sm_120"];

fn found() -> Option<&'static Compiler> {
    match compiler() {
        Ok(compiler) => Some(compiler),
        Err(error) if std::env::var_os("REDRAFT_REQUIRE_NVRTC").is_some() => panic!("REDRAFT_REQUIRE_NVRTC is set: {error}"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

#[test]
fn every_kernel_compiles_within_its_budget() {
    if found().is_none() {
        return;
    }
    let reports = kernels_check(&ARCHS.map(String::from)).unwrap();
    println!("{}", report_table(&reports));
    let entries = |build: &Build| kernels().iter().find(|k| k.stem == build.stem).map_or(0, |k| k.entries().len());
    assert_eq!(reports.len(), builds().iter().map(entries).sum::<usize>() * ARCHS.len());
    assert_eq!(over_budget(&reports), [""; 0]);
    for report in &reports {
        assert!(report.registers > 0 && report.threads >= 32 && report.cubin_bytes > 0, "{report:?}");
        assert!(kernels().iter().any(|k| k.stem == report.stem && k.entries().contains(&report.entry.as_str())), "{report:?}");
    }
}

/// The parts of the header that no kernel uses yet.
#[test]
fn the_generator_compiles_without_spills() {
    let Some(compiler) = found() else { return };
    let probe = Kernel { stem: "rng", source: include_str!("rng.cu"), hash: 0 };
    let build = Build { stem: "rng", defines: vec![("THREADS", 32)] };
    for arch in ARCHS {
        let compiled = compiler.compile(&probe, &build, arch).unwrap();
        assert!(compiled.entries.len() == 1 && compiled.entries[0].spill_bytes == 0, "{arch}: {:?}", compiled.entries);
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{arch}");
    }
}

#[test]
fn an_error_names_the_build_and_carries_the_log() {
    let Some(compiler) = found() else { return };
    let broken = Kernel { stem: "broken", source: "#include \"common.cuh\"\nint x = undeclared;\n", hash: 0x17 };
    let build = Build { stem: "broken", defines: vec![("THREADS", 64)] };
    let Err(Error::Kernel { what }) = compiler.compile(&broken, &build, "sm_80") else { panic!("compiled") };
    for part in [
        "kernel broken-THREADS=64-sm_80-nvrtc",
        "-0000000000000017 [--gpu-architecture=sm_80",
        " -DTHREADS=64]",
        "broken.cu(2): error",
        "undeclared",
    ] {
        assert!(what.contains(part), "{part:?} in {what}");
    }
    // An interior NUL would be cut off silently by a C string.
    let nul = Kernel { source: "int a;\0int b;", ..broken };
    assert!(matches!(compiler.compile(&nul, &build, "sm_80"), Err(Error::Kernel { .. })));
}

#[test]
fn architectures_are_checked_before_anything_is_compiled() {
    if found().is_none() {
        return;
    }
    for (arch, part) in [("sm_9000", "compiles for sm_80"), ("sm_75", "need sm_80 or later"), ("90", "expected sm_"), ("", "expected sm_")]
    {
        let Err(Error::Request { what }) = kernels_check(&["sm_80".into(), arch.into()]) else { panic!("{arch} accepted") };
        assert!(what.contains(part), "{what}");
    }
}
