//! Ceilings of a device over stubs of driver and cuBLASLt: by the library, else by our kernel.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::emulator::{gxx, here, run, scratch};

/// Directories with the driver and a library of products, with a file in its place, and with the
/// compiler.
struct Stubs {
    whole: PathBuf,
    broken: PathBuf,
    compiler: PathBuf,
}

fn stubs() -> &'static Stubs {
    static STUBS: OnceLock<Stubs> = OnceLock::new();
    STUBS.get_or_init(|| {
        let stubs = Stubs { whole: scratch("blas"), broken: scratch("blas-broken"), compiler: scratch("blas-compiler") };
        for (source, library) in [
            ("stub_cuda.cpp", stubs.whole.join("libcuda.so")),
            ("stub_cublaslt.cpp", stubs.whole.join("libcublasLt.so.13")),
            ("stub_nvrtc.cpp", stubs.compiler.join("libnvrtc.so.13")),
            ("stub_nvrtc.cpp", stubs.compiler.join("libnvrtc-builtins.so.13.0")),
        ] {
            let mut command = gxx();
            command.args(["-shared", "-o"]).arg(library).arg(here().join(source));
            run(command);
        }
        std::fs::copy(stubs.whole.join("libcuda.so"), stubs.broken.join("libcuda.so")).expect("a copy");
        for name in ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"] {
            std::fs::write(stubs.broken.join(name), "not a library").expect("a file");
        }
        stubs
    })
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}

/// What `bench` holds a GPU's forwards against: the library's product where it is there, ours where
/// it is not, and a copy that no cache holds, as large as the memory allows.
#[test]
fn the_ceilings_of_a_bench_are_the_device_s() {
    let bench = |libraries: &Path, dtype: &str, env: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_redraft"));
        command.args(["bench", "--shape", "tiny", "--device", "cuda", "--dtype", dtype, "--no-schedules", "--forward", "4@16"]);
        command.args(["--format", "json", "--runs", "1"]).env("LD_LIBRARY_PATH", libraries).env("REDRAFT_NVRTC_DIR", &stubs().compiler);
        command.env("REDRAFT_CACHE_DIR", scratch("cache-bench")).env("STUB_DEVICES", "1").envs(env.iter().copied());
        let output = command.output().expect("the binary starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        let report = text.lines().find(|line| line.starts_with('{')).expect("a report");
        let report: serde_json::Value = serde_json::from_str(report).unwrap_or_else(|e| panic!("{e}: {report}"));
        (report, text)
    };
    let Stubs { whole, broken, .. } = stubs();
    let (report, text) = bench(whole, "bf16", &[("STUB_FULL", "1073741824")]);
    let ceilings = &report["ceilings"];
    assert_eq!(ceilings["matrix"], "4096 x 4096 x 4096 by cuBLASLt", "{ceilings}");
    assert_eq!(ceilings["read"], "copy of 512 MiB", "{ceilings}");
    has(&text, &["stub: 51 products"]);
    // A forward is timed from its recording, under both nuclei.
    let forwards = report["forwards"].as_array().expect("forwards");
    assert_eq!(forwards.iter().map(|f| f["top_p"].as_f64().expect("a nucleus") as f32).collect::<Vec<_>>(), [1.0, 0.9]);
    assert!(forwards.iter().all(|f| f["recorded"] == true && f["launches"].as_u64() > Some(0)), "{forwards:?}");
    assert!(text.matches("replayed linear_bf16").count() > text.matches("launched linear_bf16").count(), "launched one by one");

    let (report, text) = bench(broken, "bf16", &[]);
    let ceilings = &report["ceilings"];
    let matrix = ceilings["matrix"].as_str().expect("what computed it");
    assert!(matrix.starts_with("4096 x 4096 x 4096 by our kernel, no cuBLASLt: "), "{ceilings}");
    assert_eq!(ceilings["read"], "copy of 1024 MiB", "{ceilings}");
    has(&text, &["launched linear_bf16"]);
    let (report, text) = bench(whole, "bf16", &[("STUB_BLAS_FAIL", "MatmulAlgoGetHeuristic=15")]);
    let matrix = "4096 x 4096 x 4096 by our kernel, no cuBLASLt: cublasLtMatmulAlgoGetHeuristic failed: cublasStatus_t 15";
    assert_eq!(report["ceilings"]["matrix"], matrix);
    has(&text, &["stub: 0 products", "by the library, 0 of its handles left"]);
    let (report, _) = bench(whole, "f32", &[]);
    assert_eq!(report["ceilings"]["matrix"], "4096 x 4096 x 4096 by our kernel, no cuBLASLt: it is used for bf16");
}
