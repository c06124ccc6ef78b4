//! [`Gpu`] over a driver and a compiler that are stubs: what the driver is told, what is cached,
//! and what is said when a call fails.
//!
//! A process opens each library once, so every case runs in a child: this test binary again, asked
//! for `stubs::child` alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use redraft::backend::DType;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::embed::{Embed, EmbedParams, embed};
use redraft::cuda::ops::weight::WeightAt;
use redraft::cuda::params::Params;
use redraft::cuda::{Driver, Gpu};
use redraft::error::Result;

use crate::emulator::{gxx, here, run, scratch};

const ASKED: &str = "REDRAFT_TEST_STUBS";

/// Uses a GPU in every way, if a parent asked for it, and prints what came of it.
#[test]
fn child() {
    let Some(what) = std::env::var_os(ASKED) else { return };
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => return println!("open: {error}"),
    };
    let limits = gpu.limits();
    println!("open: {} as {}, {} multiprocessors, {} B shared", gpu.name(), gpu.arch(), limits.num_sms, limits.shared_per_cta);
    type Step<'a> = (&'a str, &'a dyn Fn(&Gpu) -> Result<String>);
    let mut steps: Vec<Step> = vec![("memory", &memory), ("too much", &too_much)];
    if what == "launches" {
        // Machines own their driver; this one is opened beside the first and shares its context.
        let context = Gpu::open(0).and_then(|gpu| CudaContext::new(Box::new(gpu)));
        match context.and_then(|context| launches(&context)) {
            Ok(()) => println!("launches: done"),
            Err(error) => println!("launches: {error}"),
        }
        steps.clear();
    }
    steps.push(("again", &|gpu| gpu.synchronize().map(|()| "alive".to_owned())));
    for (name, step) in steps {
        println!("{name}: {}", step(&gpu).unwrap_or_else(|error| error.to_string()));
    }
}

/// Writes larger and smaller than the ring whose sources change right after, copies, fills, and
/// reads of all sizes.
fn memory(gpu: &Gpu) -> Result<String> {
    let pattern = |len: usize, seed: usize| -> Vec<u8> { (0..len).map(|i| (i * 7 + i / 251 + seed) as u8).collect() };
    let large = 37_000_001;
    let (a, b) = (gpu.alloc(large)?, gpu.alloc(large)?);
    let mut source = pattern(large, 1);
    gpu.write(a, &source)?;
    source.fill(0xee);
    for i in 0..300 {
        let mut small = pattern(i * 131 % 3001, i);
        gpu.write(b + 4096 * i as u64, &small)?;
        small.fill(0xee);
    }
    let read = |address, len| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        gpu.read(address, &mut bytes)?;
        Ok(bytes)
    };
    assert_eq!(read(a, large)?, pattern(large, 1));
    for i in 0..300 {
        assert_eq!(read(b + 4096 * i as u64, i * 131 % 3001)?, pattern(i * 131 % 3001, i), "{i}");
    }
    gpu.copy(a + 256, b, 1 << 20)?;
    gpu.fill(b + 512, 0x0102_0304, 3)?;
    let mut expected = pattern(large, 1)[256..256 + (1 << 20)].to_vec();
    expected[512..524].copy_from_slice(&[4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1]);
    assert_eq!(read(b, 1 << 20)?, expected);
    gpu.copy(a, b, 0)?;
    gpu.fill(a, 0, 0)?;
    gpu.write(a, &[])?;
    gpu.free(a);
    gpu.free(b);
    Ok("whole".to_owned())
}

fn too_much(gpu: &Gpu) -> Result<String> {
    gpu.alloc(13 << 30).map(|_| "more than there is".to_owned())
}

fn launches(context: &CudaContext) -> Result<()> {
    let op = Embed {
        rows: 5,
        width: 64,
        vocab: 11,
        dtype: DType::Bf16,
        ids: 0x1000,
        index: None,
        table: WeightAt::floats(0x2000),
        positions: None,
        out: 0x3000,
    };
    embed(context, &op)?;
    embed(context, &Embed { rows: 0, ..op })?;
    context.driver.begin_capture()?;
    embed(context, &Embed { rows: 6, ..op })?;
    // The first use of another entry, and a workspace that moves, in the middle of a recording.
    embed(context, &Embed { rows: 7, dtype: DType::F32, ..op })?;
    context.workspace(5 << 20)?;
    context.workspace(9 << 20)?;
    for refused in [context.driver.synchronize(), context.driver.fill(context.counters(), 0, 1)] {
        println!("recording: {}", refused.expect_err("nothing but launches is recorded"));
    }
    let graph = context.driver.end_capture()?;
    context.driver.launch_graph(graph)?;
    context.driver.launch_graph(graph)?;
    context.driver.drop_graph(graph);
    context.driver.begin_capture()?;
    context.driver.begin_capture()?;
    let kept = context.driver.end_capture()?;
    context.driver.launch_graph(kept)?;
    context.driver.push_range("step");
    context.driver.pop_range();
    context.driver.synchronize()
}

/// Directories with the driver, with the compiler, and for built code.
struct Stubs {
    driver: PathBuf,
    compiler: PathBuf,
    /// As `compiler`, of the same major and minor version: another library of it, and one whose
    /// linker left no build ID.
    others: [PathBuf; 2],
}

fn stubs() -> &'static Stubs {
    static STUBS: OnceLock<Stubs> = OnceLock::new();
    STUBS.get_or_init(|| {
        let stubs = Stubs {
            driver: scratch("stub-driver"),
            compiler: scratch("stub-compiler"),
            others: ["stub-compiler-update", "stub-compiler-unnamed"].map(scratch),
        };
        let build = |source: &str, library: PathBuf, build_id: &str| {
            let mut command = gxx();
            command.args(["-shared", &format!("-Wl,--build-id={build_id}"), "-o"]).arg(library).arg(here().join(source));
            run(command);
        };
        build("stub_cuda.cpp", stubs.driver.join("libcuda.so"), "none");
        let [update, unnamed] = &stubs.others;
        for (dir, build_id) in [(&stubs.compiler, "0x130088aabbccddee"), (update, "0x130089aabbccddee"), (unnamed, "none")] {
            build("stub_nvrtc.cpp", dir.join("libnvrtc.so.13"), build_id);
            build("stub_nvrtc.cpp", dir.join("libnvrtc-builtins.so.13.0"), build_id);
        }
        stubs
    })
}

/// What a child printed that did `what` under the given environment and cache.
fn report(what: &str, cache: &Path, env: &[(&str, &str)]) -> String {
    let stubs = stubs();
    let mut command = Command::new(std::env::current_exe().expect("the path of this test"));
    command.args(["--exact", "stubs::child", "--nocapture", "--test-threads=1"]).env(ASKED, what).env("LD_LIBRARY_PATH", &stubs.driver);
    command.env("REDRAFT_NVRTC_DIR", &stubs.compiler).env("REDRAFT_CACHE_DIR", cache).env("STUB_DEVICES", "1").envs(env.iter().copied());
    let output = command.output().expect("a child process");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !errors.contains("panicked"), "{text}\n{errors}");
    text.into_owned()
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}

#[test]
fn memory_arrives_whole_and_is_given_back() {
    for env in [&[][..], &[("STUB_FAIL", "MemHostAlloc=2")], &[("STUB_FAIL", "EventCreate=2")]] {
        let text = report("memory", &scratch("cache-memory"), env);
        has(&text, &["open: cuda:0 Stub 9000 (sm_90, 8.0 GiB) as sm_90a, 132 multiprocessors, 232448 B shared", "memory: whole"]);
        has(&text, &["too much: cuda:0: out of device memory: 13.0 GiB asked for, 8.0 GiB of 8.0 GiB free; use a smaller --length"]);
        has(&text, &["again: alive", "stub: 0 buffers and 0 handles left"]);
    }
}

#[test]
fn a_launch_hands_over_grid_and_params() {
    let params = EmbedParams { ids: 0x1000, table: 0x2000, out: 0x3000, width: 64, vocab: 11, ..EmbedParams::default() };
    let hex: String = params.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let text = report("launches", &scratch("cache-launch"), &[]);
    has(&text, &[&format!("launched embed_bf16 5,1,1 x 128, 0 B: {hex}"), "launches: done", "again: alive"]);
    // 232,448 B of the device less the 1,000 static ones of the entry.
    has(&text, &["limit embed_bf16 8 231448", "stub: 0 buffers and 0 handles left"]);
    has(&text, &["recording: cuda:0: synchronize between begin_capture and end_capture", "recording: cuda:0: fill between"]);
    assert!(!text.contains("destroyed while it runs"), "{text}");
    for (line, times) in [
        ("launched embed", 1),
        (&format!("replayed embed_bf16 6,1,1 x 128, 0 B: {hex}"), 2),
        ("replayed embed_f32 7,1,1 x 128", 2),
        ("stub: compiles embed.cu with --gpu-architecture=sm_90a", 1),
    ] {
        assert_eq!(text.matches(line).count(), times, "{line} in\n{text}");
    }
}

#[test]
fn built_code_is_found_again() {
    let cache = scratch("cache-found");
    let compiles = |env: &[(&str, &str)]| {
        let text = report("launches", &cache, env);
        has(&text, &["launches: done"]);
        text.matches("stub: compiles").count()
    };
    let entry = || {
        std::fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).find(|p| p.to_string_lossy().contains("sm_90a-nvrtc13.0")).unwrap()
    };
    let _ = std::fs::remove_dir_all(&cache);
    assert_eq!([compiles(&[]), compiles(&[])], [1, 0]);
    let name = entry().file_name().unwrap().to_string_lossy().into_owned();
    assert!(
        name.starts_with("embed-GROUP_BITS=0-POSITION_BITS=0-THREADS=128-sm_90a-nvrtc13.0-130088aabbccddee-") && name.ends_with(".cubin"),
        "{name}"
    );
    // Another device, another compiler.
    assert_eq!([compiles(&[("STUB_CC", "80")]), compiles(&[("STUB_NVRTC", "124"), ("STUB_DRIVER", "12040")])], [1, 1]);
    std::fs::write(entry(), "damaged").unwrap();
    assert_eq!([compiles(&[]), compiles(&[])], [1, 0]);
    // Whole by its checksum, and still not machine code.
    redraft::cuda::driver::cache::Cache::in_dir(&cache).store(name.trim_end_matches(".cubin"), "cubin", b"not an image").unwrap();
    assert_eq!([compiles(&[]), compiles(&[])], [1, 0]);
}

/// 13.0.88 and 13.0.89 both call themselves 13.0 and write different machine code.
#[test]
fn an_update_of_the_compiler_builds_again() {
    let cache = scratch("cache-update");
    let compiles = |compiler: &Path| {
        let text = report("launches", &cache, &[("REDRAFT_NVRTC_DIR", compiler.to_str().expect("UTF-8"))]);
        has(&text, &["launches: done"]);
        text.matches("stub: compiles").count()
    };
    let Stubs { compiler, others: [update, unnamed], .. } = stubs();
    for library in [compiler, update, unnamed] {
        assert_eq!([compiles(library), compiles(library)], [1, 0], "{}", library.display());
    }
    assert_eq!(compiles(compiler), 0);
}

/// The command with the stub driver and, where there is a directory for it, a stub compiler: exit
/// code, stdout, stderr.
fn redraft(args: &[&str], compiler: Option<&Path>, env: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_redraft"));
    command.args(args).env("LD_LIBRARY_PATH", &stubs().driver).env("STUB_DEVICES", "1").env("REDRAFT_CACHE_DIR", scratch("cache-run"));
    command.env("REDRAFT_NVRTC_DIR", compiler.unwrap_or(Path::new("/nowhere"))).envs(env.iter().copied());
    let output = command.output().expect("the binary starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A fresh directory of kernels for `arch`, built by the stub compiler.
fn prebuilt(name: &str, arch: &str) -> PathBuf {
    let dir = scratch(name);
    let _ = std::fs::remove_dir_all(&dir);
    let (code, out, err) = redraft(&["kernels", "build", "--arch", arch, "--out", dir.to_str().unwrap()], Some(&stubs().compiler), &[]);
    assert!(code == Some(0) && out.contains(&format!("kernels for {arch}, ")), "{out}{err}");
    let files = std::fs::read_dir(&dir).unwrap().count();
    assert_eq!(files, redraft::cuda::builds().len(), "one file a build");
    dir
}

/// What a child says that has a directory of kernels, no cache, and no compiler.
fn without_compiler(dir: &Path, env: &[(&str, &str)]) -> String {
    let cache = scratch("cache-prebuilt");
    let _ = std::fs::remove_dir_all(&cache);
    let named = [("REDRAFT_KERNELS_DIR", dir.to_str().unwrap()), ("REDRAFT_NVRTC_DIR", "/nowhere")];
    report("launches", &cache, &[&named[..], env].concat())
}

#[test]
fn kernels_built_beforehand_need_no_compiler() {
    let dir = prebuilt("prebuilt-whole", "sm_90a");
    let text = without_compiler(&dir, &[]);
    has(&text, &["open: cuda:0 Stub 9000 (sm_90, 8.0 GiB) as sm_90a", "launched embed_bf16", "launches: done"]);
    assert!(!text.contains("stub: compiles"), "{text}");

    // A newer device of the generation runs the same code; another generation has none.
    let dir = prebuilt("prebuilt-older", "sm_80");
    has(&without_compiler(&dir, &[("STUB_CC", "86")]), &["(sm_86, 8.0 GiB) as sm_80", "launches: done"]);
    let text = without_compiler(&dir, &[]);
    has(
        &text,
        &["open: cuda:0 Stub 9000 (sm_90, 8.0 GiB): REDRAFT_KERNELS_DIR=", " holds kernels for sm_80, and REDRAFT_NVRTC_DIR=/nowhere"],
    );
    // With a compiler they are built for the device.
    let named = [("REDRAFT_KERNELS_DIR", dir.to_str().unwrap())];
    let text = report("launches", &scratch("cache-prebuilt-other"), &named);
    has(&text, &["as sm_90a", "stub: compiles embed.cu with --gpu-architecture=sm_90a", "launches: done"]);
    // Where nothing can be is no directory of kernels.
    has(
        &without_compiler(Path::new("/nowhere"), &[]),
        &["open: REDRAFT_KERNELS_DIR=/nowhere: ", "; set it to a directory that `redraft kernels build"],
    );
}

#[test]
fn a_kernel_built_beforehand_that_is_damaged() {
    let dir = prebuilt("prebuilt-damaged", "sm_90a");
    let files = || std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let embed = files().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("embed-GROUP_BITS=0-")).unwrap();
    let name = embed.file_name().unwrap().to_string_lossy().into_owned();
    let whole = std::fs::read(&embed).unwrap();
    let cut = &whole[..whole.len() - 1];
    let other = std::fs::read(files().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("norm-")).unwrap()).unwrap();
    for damaged in [cut, b"", &other] {
        std::fs::write(&embed, damaged).unwrap();
        has(
            &without_compiler(&dir, &[]),
            &["launches: ", &format!("{name} of REDRAFT_KERNELS_DIR is damaged, and REDRAFT_NVRTC_DIR=/nowhere")],
        );
        let cache = scratch("cache-prebuilt-damaged");
        let _ = std::fs::remove_dir_all(&cache);
        let text = report("launches", &cache, &[("REDRAFT_KERNELS_DIR", dir.to_str().unwrap())]);
        has(&text, &["stub: compiles embed.cu", "launches: done"]);
    }
    std::fs::remove_file(&embed).unwrap();
    has(&without_compiler(&dir, &[]), &["launches: ", &format!("{name} of REDRAFT_KERNELS_DIR is not there, and ")]);
    std::fs::write(&embed, &whole).unwrap();
    let env = [("STUB_FAIL", "ModuleLoadData=209")];
    has(
        &without_compiler(&dir, &env),
        &["launches: ", "cuModuleLoadData of embed-GROUP_BITS=0-POSITION_BITS=0-THREADS=128-sm_90a-", "CUDA_ERROR_NO_BINARY_FOR_GPU"],
    );
    has(&without_compiler(&dir, &[]), &["launches: done"]);
}

/// A workload's builds are recorded, once each, and built from what was recorded.
#[test]
fn what_a_workload_loads_can_be_recorded_and_built() {
    let log = scratch("kernel-log").join("builds.txt");
    let _ = std::fs::remove_file(&log);
    let run = |shape: &str| {
        let args = ["kernels", "run", "attention", "--shape", shape, "--small", "--device", "emu"];
        redraft(&args, None, &[("REDRAFT_KERNEL_LOG", log.to_str().unwrap())])
    };
    for _ in 0..2 {
        let (code, out, err) = run("head_dim=48");
        assert_eq!(code, Some(0), "{out}{err}");
    }
    let line = "attention THREADS=128 HEAD_DIM=48 PAGE_SIZE=16";
    assert_eq!(std::fs::read_to_string(&log).unwrap(), format!("{line}\n"));
    let dir = scratch("prebuilt-recorded");
    let args = ["kernels", "build", "--arch", "sm_90a,sm_80", "--out", dir.to_str().unwrap(), "--list", log.to_str().unwrap()];
    let (code, out, err) = redraft(&args, Some(&stubs().compiler), &[]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2 * (redraft::cuda::builds().len() + 1));
    // On a GPU as under emulation.
    report("launches", &scratch("cache-log"), &[("REDRAFT_KERNEL_LOG", log.to_str().unwrap())]);
    assert_eq!(std::fs::read_to_string(&log).unwrap(), format!("{line}\nembed GROUP_BITS=0 POSITION_BITS=0 THREADS=128\n"));

    std::fs::write(&log, "attention THREADS=128\n").unwrap();
    let (code, _, err) = redraft(&args, Some(&stubs().compiler), &[]);
    assert!(code == Some(2) && err.contains("builds.txt: line 1: attention: expected 3 constants: THREADS, HEAD_DIM, PAGE_SIZE"), "{err}");
    let (code, _, err) = redraft(&args[..6], None, &[]);
    assert!(code == Some(1) && err.contains("REDRAFT_NVRTC_DIR=/nowhere"), "{err}");
}

/// One process, one object a line; a line that fails does not end the list.
#[test]
fn many_kernels_run_in_one_process() {
    let list = scratch("list").join("list.txt");
    std::fs::write(
        &list,
        "embed rows=3,width=8,vocab=5 dtype=f32\n# no such kernel\nmatmul\ncopy mebibytes=1\nembed dtype=f64\nnorm rows=3,width=8\n",
    )
    .unwrap();
    let args = ["kernels", "run", "--list", list.to_str().unwrap(), "--repeat", "2"];
    let (code, out, err) = redraft(&args, Some(&stubs().compiler), &[]);
    assert!(code == Some(1) && err.contains("list.txt: 2 of 5 lines failed"), "{out}{err}");
    let objects: Vec<serde_json::Value> = out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |key: &str| objects.iter().map(|object| object[key].as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>();
    assert_eq!(of("kernel"), ["embed", "-", "copy", "-", "norm"]);
    assert_eq!(of("text"), ["-", "matmul", "-", "embed dtype=f64", "-"]);
    assert!(of("error")[1].contains("there are attention") && of("error")[3].contains("expected bf16 or f32"), "{objects:?}");
    assert_eq!((objects[0]["shape"]["dtype"].as_str(), objects[4]["shape"]["dtype"].as_str()), (Some("f32"), Some("bf16")));
    assert_eq!((objects[1]["line"].as_u64(), objects[3]["line"].as_u64()), (Some(3), Some(5)));
    assert_eq!(out.matches("stub: 0 buffers and 0 handles left").count(), 1, "{out}");

    // One by one, for profilers: recordings are replayed nowhere.
    let plain = [&args[..], &["--plain"]].concat();
    let (_, out, _) = redraft(&plain, Some(&stubs().compiler), &[]);
    assert!(out.contains("launched embed_f32") && !out.contains("replayed"), "{out}");
    let (code, _, err) = redraft(&["kernels", "run"], Some(&stubs().compiler), &[]);
    assert!(code == Some(2) && err.contains("<NAME>"), "{err}");
    std::fs::write(&list, "# nothing\n").unwrap();
    let (code, _, err) = redraft(&args, Some(&stubs().compiler), &[]);
    assert!(code == Some(2) && err.contains("expected lines such as"), "{err}");
}

#[test]
fn a_cache_that_cannot_be_written_costs_a_compilation() {
    let file = scratch("cache-none").join("file");
    std::fs::write(&file, "not a directory").unwrap();
    let text = report("launches", &file.join("below"), &[]);
    has(&text, &["stub: compiles embed.cu", "launches: done"]);
}

#[test]
fn a_failure_that_ends_the_context_is_repeated() {
    let lost = "again: the device failed earlier, and this process cannot use it again: cuda:0: ";
    for (fails, parts) in [
        (
            "StreamSynchronize=719",
            ["memory: cuda:0: cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED; a kernel failed", "compute-sanitizer"],
        ),
        ("StreamSynchronize=214", ["memory: cuda:0: cuStreamSynchronize failed: CUDA_ERROR_ECC_UNCORRECTABLE; the device is lost", "Xid"]),
        ("MemcpyDtoHAsync_v2=999", ["memory: cuda:0: cuMemcpyDtoHAsync failed: driver error 999; the device is lost", "start again"]),
        ("EventSynchronize=700", ["memory: cuda:0: cuEventSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS; ", "CUDA_LAUNCH_BLOCKING=1"]),
    ] {
        let text = report("memory", &scratch("cache-lost"), &[("STUB_FAIL", fails)]);
        has(&text, &parts);
        has(&text, &[lost]);
    }
    let text = report("memory", &scratch("cache-lost"), &[("STUB_FAIL", "MemsetD32Async=1")]);
    has(&text, &["memory: cuda:0: cuMemsetD32Async failed: ", "again: alive"]);
}

#[test]
fn a_failing_launch_names_the_kernel() {
    let text = report("launches", &scratch("cache-failing"), &[("STUB_FAIL", "LaunchKernel=701")]);
    has(
        &text,
        &["launches: cuda:0: cuLaunchKernel of embed_bf16 (grid 5 x 1 x 1, 128 threads, 0 B dynamic shared) failed: ", "again: alive"],
    );
    let text = report("launches", &scratch("cache-failing"), &[("STUB_FAIL", "StreamBeginCapture_v2=900")]);
    has(&text, &["launches: cuda:0: cuStreamBeginCapture failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "again: alive"]);
    let text = report("launches", &scratch("cache-failing"), &[("STUB_FAIL", "GraphInstantiateWithFlags=2")]);
    has(&text, &["launches: cuda:0: cuGraphInstantiate failed: CUDA_ERROR_OUT_OF_MEMORY", "0 buffers"]);
}

#[test]
fn a_driver_older_than_the_compiler() {
    let env = [("STUB_FAIL", "ModuleLoadData=209"), ("STUB_DRIVER", "12040")];
    let text = report("launches", &scratch("cache-old"), &env);
    has(
        &text,
        &[
            "launches: cuda:0: embed-GROUP_BITS=0-POSITION_BITS=0-THREADS=128-sm_90a-nvrtc13.0-",
            "cannot be loaded: CUDA_ERROR_NO_BINARY_FOR_GPU",
        ],
    );
    has(&text, &["the driver speaks CUDA 12.4 and this code is of CUDA 13.0: update the driver to 580 or later, or set REDRAFT_NVRTC_DIR"]);
}

#[test]
fn devices_that_cannot_be_opened() {
    for (env, part) in [
        (("STUB_CC", "75"), "open: cuda:0 Stub 9000 (sm_75, 8.0 GiB): the kernels need sm_80 or later; use --device cpu"),
        (("STUB_ARCH", "89"), "(sm_90, 8.0 GiB): NVRTC 13.0 is older than this device and knows up to sm_89; install a newer CUDA toolkit"),
        (("STUB_DEVICES", "0"), "open: no CUDA device: the driver reports none"),
        (("STUB_FAIL", "DevicePrimaryCtxRetain=46"), "CUDA_ERROR_DEVICE_UNAVAILABLE; another process holds the device for itself"),
        (("STUB_FAIL", "DevicePrimaryCtxRetain=2"), "cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY"),
        (("STUB_FAIL", "StreamCreate=999"), "open: cuda:0: cuStreamCreate failed: driver error 999"),
    ] {
        has(&report("memory", &scratch("cache-open"), &[env]), &[part]);
    }
}

#[test]
fn one_kernel_runs_alone() {
    let ran = |args: &[&str]| redraft(&[&["kernels", "run"], args].concat(), Some(&stubs().compiler), &[]);
    for (name, shape) in [("embed", "rows=3,width=8,vocab=5"), ("linear", "rows=3,n=8,k=16"), ("copy", "mebibytes=1")] {
        let (code, out, err) = ran(&[name, "--shape", shape, "--repeat", "3", "--format", "json"]);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
        let json = &out[out.find("{\n").expect("a report")..=out.rfind("\n}").expect("its end") + 1];
        let report: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {json}"));
        assert_eq!((report["kernel"].as_str(), report["repeat"].as_u64()), (Some(name), Some(3)));
        assert!(report["median_us"].as_f64() > Some(0.0) && report["gb_per_s"].as_f64() > Some(0.0), "{report}");
        // Small launches take turns over many sets of buffers, and everything goes back.
        assert_eq!(report["sets"].as_u64(), Some(64));
        has(&out, &["stub: 0 buffers and 0 handles left"]);
    }
    let (code, _, err) = ran(&["matmul"]);
    assert!(code == Some(2) && err.contains("kernel \"matmul\": there are attention, copy, embed, "), "{err}");
    let (code, _, err) = ran(&["embed", "--shape", "heads=3"]);
    assert!(code == Some(2) && err.contains("--shape heads=3: embed has rows=4096,width=4096,vocab=50258"), "{err}");
}
