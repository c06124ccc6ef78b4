//! What is said about drivers, devices and compilers that are absent, empty or broken: always an
//! error with the next move.
//!
//! A process opens each library once, so every case runs in a child: this test binary again, asked
//! for `driver_errors::child` alone, with a stub driver in front of the library path.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use redraft::cuda::{compiler, device_count, kernels_check, probe};

use crate::emulator::{gxx, here, run, scratch};

const ASKED: &str = "REDRAFT_TEST_DOOR";

/// Prints every answer of the door, if a parent asked for it.
#[test]
fn child() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    println!("count: {:?}", device_count());
    for ordinal in [0, 1, 99, usize::MAX] {
        println!("probe {ordinal}: {:?}", probe(ordinal).map(|device| device.to_string()));
    }
    println!("compiler: {:?}", compiler().map(|c| c.version()));
    println!("check: {:?}", kernels_check(&["sm_80".into()]).map(|r| r.len()));
}

/// The answers of the door in a fresh process.
fn answers(libraries: Option<&Path>, env: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("the path of this test"));
    command
        .args(["--exact", "driver_errors::child", "--nocapture"])
        .env(ASKED, "1")
        .env_remove("REDRAFT_NVRTC_DIR")
        .envs(env.iter().copied());
    if let Some(dir) = libraries {
        command.env("LD_LIBRARY_PATH", dir);
    }
    let output = command.output().expect("a child process");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{text}");
    text
}

/// A directory with the stub driver, and one with a driver that has no functions.
fn stubs() -> &'static (PathBuf, PathBuf) {
    static STUBS: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    STUBS.get_or_init(|| {
        let (whole, empty) = (scratch("driver"), scratch("empty-driver"));
        let mut command = gxx();
        command.args(["-shared", "-o"]).arg(whole.join("libcuda.so")).arg(here().join("stub_cuda.cpp"));
        run(command);
        let mut command = gxx();
        command.args(["-shared", "-x", "c++", "/dev/null", "-o"]).arg(empty.join("libcuda.so"));
        run(command);
        (whole, empty)
    })
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}

#[test]
fn whatever_this_machine_has_is_an_answer() {
    has(&answers(None, &[]), &["count: ", "probe 99: Err(Device", "--device cpu"]);
}

#[test]
fn a_driver_without_devices() {
    for devices in ["-1", "0"] {
        has(&answers(Some(&stubs().0), &[("STUB_DEVICES", devices)]), &["count: Err(Device", "no CUDA device: ", "CUDA_VISIBLE_DEVICES"]);
    }
    has(&answers(Some(&stubs().0), &[("STUB_DEVICES", "-1")]), &["CUDA_ERROR_NO_DEVICE, no CUDA-capable device is detected"]);
}

#[test]
fn a_driver_that_fails_with_an_unknown_code() {
    has(&answers(Some(&stubs().0), &[("STUB_DEVICES", "77")]), &["count: Err(Device", "cuInit failed: driver error 999"]);
}

#[test]
fn devices_are_described_and_their_limits_named() {
    let one = answers(Some(&stubs().0), &[("STUB_DEVICES", "1")]);
    has(&one, &["count: Ok(1)", "probe 0: Ok(\"cuda:0 Stub 9000 (sm_90, 8.0 GiB)\")", "cuda:99: no such device, only cuda:0 exists"]);
    let three = answers(Some(&stubs().0), &[("STUB_DEVICES", "3")]);
    has(&three, &["count: Ok(3)", "probe 1: Ok", "cuda:99: no such device, cuda:0 to cuda:2 exist; choose one of them or --device cpu"]);
}

#[test]
fn a_library_that_is_not_the_driver() {
    has(&answers(Some(&stubs().1), &[]), &["count: Err(Device", "cuDeviceGetCount", "too old or is not NVIDIA's"]);
}

#[test]
fn a_compiler_directory_that_cannot_serve() {
    let (empty, broken) = (scratch("no-nvrtc"), scratch("broken-nvrtc"));
    for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"] {
        std::fs::write(broken.join(name), "not a library").unwrap();
    }
    let cases = [
        (Path::new("/nonexistent/nvrtc"), "set it to the directory that holds libnvrtc"),
        (&empty, "holds no libnvrtc-builtins.so"),
        (&broken, "libnvrtc-builtins.so.13.0"),
    ];
    for (dir, part) in cases {
        let dir = dir.to_str().unwrap();
        has(
            &answers(None, &[("REDRAFT_NVRTC_DIR", dir)]),
            &["compiler: Err(Device", &format!("REDRAFT_NVRTC_DIR={dir}: "), part, "check: Err("],
        );
    }
}
