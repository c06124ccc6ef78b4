//! Products by cuBLASLt over stubs of driver and library: what the library is told makes the product, the choice follows the clock, and
//! whatever fails is ours again.
//!
//! A process opens each library once, so every case runs in a child: this test binary again, asked for `cublaslt::child` alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use half::bf16;
use redraft::backend::{Activation, Backend, DType, Epilogue};
use redraft::cuda::linear::{Linear, linear};
use redraft::cuda::machine::Machine;
use redraft::cuda::{Cuda, Gpu};
use redraft::error::Result;

use crate::emulator::{Array, gxx, here, noise, run, scratch};

const ASKED: &str = "REDRAFT_TEST_CUBLASLT";

/// (rows, n, k, dtype, epilogue, bias, out dtype)
type Case = (u32, u32, u32, DType, Epilogue, bool, DType);

const LIBRARY: [Case; 6] = [
    (65, 24, 40, DType::Bf16, Epilogue::Store, false, DType::F32),
    (65, 24, 40, DType::Bf16, Epilogue::Store, false, DType::Bf16),
    (70, 7, 33, DType::Bf16, Epilogue::Store, true, DType::F32),
    (129, 24, 8, DType::Bf16, Epilogue::Add, false, DType::F32),
    (129, 24, 8, DType::Bf16, Epilogue::Add, true, DType::F32),
    (66, 5, 16, DType::Bf16, Epilogue::Gelu, false, DType::Bf16),
];

/// Few rows, types that the library lacks, pairs of gate and up.
const OURS: [Case; 4] = [
    (64, 24, 40, DType::Bf16, Epilogue::Store, false, DType::F32),
    (65, 24, 40, DType::F32, Epilogue::Store, false, DType::F32),
    (65, 24, 40, DType::Bf16, Epilogue::Gelu, true, DType::Bf16),
    (65, 24, 40, DType::Bf16, Epilogue::SwiGlu, false, DType::Bf16),
];

/// Computes products of every kind, if a parent asked for it, and prints whose they were.
#[test]
fn child() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    let machine = Machine::new(Box::new(Gpu::open(0).expect("the stub"))).expect("the stub");
    for case in LIBRARY.iter().chain(&OURS) {
        println!("{case:?}: {}", twice(&machine, case).unwrap_or_else(|error| error.to_string()));
    }
    // A kind that is known, and one that is not, in a recording.
    let unknown = (65, 32, 40, DType::Bf16, Epilogue::Store, false, DType::F32);
    let recorded = [LIBRARY[0], unknown].map(|case| (case, Operands::new(&machine, &case)));
    machine.driver.begin_capture().expect("the stub");
    for (case, operands) in &recorded {
        product(&machine, case, operands).expect("the stub");
    }
    let graph = machine.driver.end_capture().expect("the stub");
    machine.driver.replay(graph).expect("the stub");
    machine.driver.drop_graph(graph);
    println!("backend: {}", backend().unwrap_or_else(|error| error.to_string()));
}

/// Operands of a case in device memory: x and weight in two bytes or four, the bias, and what stands where the product goes.
struct Operands<'m> {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    before: Vec<f32>,
    x_array: Array<'m, u8>,
    weight_array: Array<'m, u8>,
    bias_array: Array<'m, f32>,
    out_array: Array<'m, u8>,
}

fn bytes_of(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_ne_bytes()).collect(),
    }
}

fn numbers_of(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
    }
}

impl<'m> Operands<'m> {
    fn new(machine: &'m Machine, &(rows, n, k, dtype, _, _, out_dtype): &Case) -> Self {
        let (rows, n, k) = (rows as usize, n as usize, k as usize);
        // As they are once rounded, so that the plain loop sees what the device does.
        let rounded = |seed, len| noise(seed, len).into_iter().map(|v| bf16::from_f32(v).to_f32()).collect::<Vec<f32>>();
        let (x, weight, bias, before) = (rounded(1, rows * k), rounded(2, n * k), rounded(3, n), rounded(4, rows * n));
        Operands {
            x_array: Array::new(machine, &bytes_of(dtype, &x)),
            weight_array: Array::new(machine, &bytes_of(dtype, &weight)),
            bias_array: Array::new(machine, &bias),
            out_array: Array::new(machine, &bytes_of(out_dtype, &before)),
            x,
            weight,
            bias,
            before,
        }
    }

    /// The product by a plain loop.
    fn expected(&self, &(rows, n, k, _, epilogue, with_bias, _): &Case) -> Vec<f64> {
        let (n, k) = (n as usize, k as usize);
        let element = |i: usize| {
            let (row, column) = (i / n, i % n);
            let sum: f64 = (0..k).map(|p| f64::from(self.x[row * k + p]) * f64::from(self.weight[column * k + p])).sum();
            let value = sum + if with_bias { f64::from(self.bias[column]) } else { 0.0 };
            match epilogue {
                Epilogue::Add => f64::from(self.before[i]) + value,
                Epilogue::Gelu => value / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (value + 0.044715 * value.powi(3))).tanh()),
                Epilogue::Store | Epilogue::SwiGlu => value,
            }
        };
        (0..rows as usize * n).map(element).collect()
    }
}

fn product(machine: &Machine, &(rows, n, k, dtype, epilogue, with_bias, out_dtype): &Case, operands: &Operands) -> Result<()> {
    let op = Linear {
        rows,
        n,
        k,
        dtype,
        x: operands.x_array.address(),
        weight: operands.weight_array.address(),
        bias: with_bias.then(|| operands.bias_array.address()),
        epilogue,
        out: operands.out_array.address(),
        out_dtype,
    };
    linear(machine, &op)
}

/// Whose the product is, the first time and the second. The kernels of the stub driver write nothing.
fn twice(machine: &Machine, case: &Case) -> Result<String> {
    let once = || {
        let operands = Operands::new(machine, case);
        product(machine, case, &operands)?;
        let out = numbers_of(case.6, &operands.out_array.read().expect("its own range"));
        let expected = operands.expected(case);
        // Half a unit of the output's last place, and a few of f32.
        let tolerance = if case.6 == DType::Bf16 { 1.0 / 256.0 } else { 1e-6 };
        let close = |(e, o): (&f64, &f32)| (e - f64::from(*o)).abs() <= tolerance * (1.0 + e.abs());
        Ok(match () {
            () if out == operands.before => "ours",
            () if expected.iter().zip(&out).all(close) => "the library's",
            () => "wrong",
        })
    };
    Ok(format!("{}, {}", once()?, once()?))
}

/// What a backend says of itself before and after a product, and once the library is not wanted.
fn backend() -> Result<String> {
    let cuda = Cuda::new(Box::new(Gpu::open(0)?), DType::Bf16)?;
    let before = cuda.name();
    cuda.set_cublaslt(true);
    let weight = cuda.matrix(8, 16, &|_, values| {
        values.fill(1.0);
        Ok(())
    })?;
    let [x, mut out] = cuda.arena([Activation::Input(80 * 16), Activation::F32(80 * 8)])?;
    cuda.linear(80, &x, &weight, None, Epilogue::Store, &mut out)?;
    let after = cuda.name();
    cuda.set_cublaslt(false);
    Ok(format!("{before} | {after} | {}", cuda.name()))
}

/// Directories with the driver and a library of products, with a file in its place, and with the compiler.
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

/// What a child printed.
fn report(libraries: &Path, cache: &Path, env: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("the path of this test"));
    command.args(["--exact", "cublaslt::child", "--nocapture", "--test-threads=1"]).env(ASKED, "1").env("LD_LIBRARY_PATH", libraries);
    command.env("REDRAFT_NVRTC_DIR", &stubs().compiler).env("REDRAFT_CACHE_DIR", cache).env("STUB_DEVICES", "1");
    command.env("REDRAFT_CUBLASLT", "1").envs(env.iter().copied());
    let output = command.output().expect("a child process");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !errors.contains("panicked"), "{text}\n{errors}");
    has(&text, &["stub: 0 buffers and 0 handles left"]);
    text.into_owned()
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}

/// Every product that may be the library's has that answer, and every other one is ours.
fn products_are(text: &str, whose: &str) {
    LIBRARY.iter().for_each(|case| has(text, &[&format!("{case:?}: {whose}\n")]));
    OURS.iter().for_each(|case| has(text, &[&format!("{case:?}: ours, ours\n")]));
}

fn record(cache: &Path) -> PathBuf {
    let mut entries = std::fs::read_dir(cache).expect("a cache").map(|entry| entry.expect("an entry").path());
    entries.find(|path| path.extension().is_some_and(|extension| extension == "tuned")).expect("a record")
}

/// Long against what a busy machine takes from a process between two looks at the clock.
const OURS_SLOW: (&str, &str) = ("STUB_LAUNCH_MS", "25");
const LIBRARY_SLOW: (&str, &str) = ("STUB_BLAS_MS", "25");

#[test]
fn a_faster_library_makes_the_product_and_the_record_is_kept() {
    let cache = scratch("cache-blas-fast");
    let text = report(&stubs().whole, &cache, &[OURS_SLOW]);
    products_are(&text, "the library's, the library's");
    // In a recording: what is known goes to the library, what is not is ours. Seven runs under the clock and two products of each kind;
    // the backend's comes once more.
    has(&text, &["replayed cublasLtMatmul\n", "replayed linear_bf16 "]);
    has(
        &text,
        &["backend: cuda:0 Stub 9000 (sm_90, 8.0 GiB), cuBLASLt where faster above 64 rows | ", " | cuda:0 Stub 9000 (sm_90, 8.0 GiB)\n"],
    );
    let counts = |kinds: usize, timed: usize| format!("stub: {} products and {} queries", (2 + timed) * kinds + 1 + 1 + timed, kinds + 1);
    has(&text, &[&counts(LIBRARY.len(), 7), "by the library, 0 of its handles left"]);

    let kept = std::fs::read(record(&cache)).unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&kept[..kept.len() - 16]).expect("JSON before the trailer");
    let times = &kept["rows up to 256, n 24, k 8, add, bias, f32"];
    assert!(times["ours_us"].as_f64() > Some(2000.0) && times["library_us"].as_f64() > Some(0.0), "{kept}");
    assert_eq!(kept["rows up to 128, n 24, k 40, gelu, bias, bf16"]["library_us"], serde_json::Value::Null, "{kept}");

    // The next process believes it, whatever it would measure itself; a damaged record is measured again.
    let again = || report(&stubs().whole, &cache, &[LIBRARY_SLOW]);
    let text = again();
    products_are(&text, "the library's, the library's");
    has(&text, &[&counts(LIBRARY.len(), 0)]);
    let mut damaged = std::fs::read(record(&cache)).unwrap();
    damaged[20] ^= 1;
    std::fs::write(record(&cache), damaged).unwrap();
    products_are(&again(), "ours, ours");
}

#[test]
fn a_slower_library_is_left_alone() {
    let text = report(&stubs().whole, &scratch("cache-blas-slow"), &[LIBRARY_SLOW]);
    products_are(&text, "ours, ours");
    assert!(!text.contains("replayed cublasLtMatmul"), "{text}");
    // Measured, and that is all.
    has(&text, &[&format!("stub: {} products ", 7 * (LIBRARY.len() + 1))]);
}

#[test]
fn nobody_asked() {
    let text = report(&stubs().whole, &scratch("cache-blas-off"), &[OURS_SLOW, ("REDRAFT_CUBLASLT", "0")]);
    products_are(&text, "ours, ours");
    // The backend of the child asks by itself, for its one product.
    has(&text, &["stub: 8 products ", "backend: cuda:0 Stub 9000 (sm_90, 8.0 GiB) | cuda:0 Stub 9000 (sm_90, 8.0 GiB), cuBLASLt where"]);
}

#[test]
fn a_library_that_is_not_there_or_fails() {
    let text = report(&stubs().broken, &scratch("cache-blas-none"), &[OURS_SLOW]);
    products_are(&text, "ours, ours");
    has(&text, &[", no cuBLASLt: ", "libcublasLt.so.13: ", "nvidia-cublas, whose directory LD_LIBRARY_PATH names"]);
    for call in [
        "Create",
        "MatmulDescCreate",
        "MatmulDescSetAttribute",
        "MatrixLayoutCreate",
        "MatmulPreferenceCreate",
        "MatmulPreferenceSetAttribute",
        "MatmulAlgoGetHeuristic",
        "Matmul",
    ] {
        let text = report(&stubs().whole, &scratch("cache-blas-fails"), &[OURS_SLOW, ("STUB_BLAS_FAIL", &format!("{call}=14"))]);
        products_are(&text, "ours, ours");
        has(
            &text,
            &[&format!(", no cuBLASLt: cublasLt{call} failed: cublasStatus_t 14 | "), "stub: 0 products ", ", 0 of its handles left"],
        );
    }
}

/// A kind without an algorithm stays ours and costs the other kinds nothing; the first failure of a known kind does.
#[test]
fn a_kind_that_the_library_lacks() {
    let cache = scratch("cache-blas-lacks");
    let text = report(&stubs().whole, &cache, &[OURS_SLOW, ("STUB_BLAS_FAIL", "MatmulAlgoGetHeuristic=15")]);
    products_are(&text, "ours, ours");
    has(&text, &["cuBLASLt where faster above 64 rows | ", "stub: 0 products "]);
    let cache = scratch("cache-blas-later");
    report(&stubs().whole, &cache, &[OURS_SLOW]);
    let text = report(&stubs().whole, &cache, &[OURS_SLOW, ("STUB_BLAS_FAIL", "Matmul=13")]);
    products_are(&text, "ours, ours");
    has(&text, &[", no cuBLASLt: cublasLtMatmul failed: cublasStatus_t 13 | "]);
}

/// Without room for the workspace there is no library, and the backend works on.
#[test]
fn no_memory_for_a_workspace() {
    let text = report(&stubs().whole, &scratch("cache-blas-full"), &[OURS_SLOW, ("STUB_FULL", "33554432")]);
    products_are(&text, "ours, ours");
    has(&text, &[", no cuBLASLt: cuda:0: out of device memory: "]);
}

/// What `bench` holds a GPU's forwards against: the library's product where it is there, ours where
/// it is not, and a copy that no cache holds, as large as the memory allows.
#[test]
fn the_ceilings_of_a_bench_are_the_device_s() {
    let bench = |libraries: &Path, dtype: &str, env: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_redraft"));
        command.args(["bench", "--shape", "tiny", "--device", "cuda", "--dtype", dtype, "--no-schedules", "--forward", "4@16"]);
        command.args(["--format", "json", "--runs", "1"]).env("LD_LIBRARY_PATH", libraries).env("REDRAFT_NVRTC_DIR", &stubs().compiler);
        command
            .env("REDRAFT_CACHE_DIR", scratch("cache-bench"))
            .env("STUB_DEVICES", "1")
            .env("STUB_BLAS_EMPTY", "1")
            .envs(env.iter().copied());
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
    let (report, _) = bench(whole, "f32", &[]);
    assert_eq!(report["ceilings"]["matrix"], "4096 x 4096 x 4096 by our kernel, no cuBLASLt: it is used for bf16");
}
