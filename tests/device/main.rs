//! The CUDA backend as a whole: launchers, kernels, runs decided on the device, recorded graphs. Every test runs under emulation, and on
//! the first GPU where there is one; `REDRAFT_REQUIRE_CUDA=1` turns the absence of a GPU into a failure.
#![cfg(feature = "cuda")]

#[path = "../parity/fixture.rs"]
#[allow(dead_code)] // shared with the parity tests, which need all of it
mod fixture;
#[path = "../parity/joint.rs"]
mod joint;
#[path = "../decode/support.rs"]
#[allow(dead_code)] // shared with the tests of the engine's laws
mod support;

mod laws;
mod parity;
mod passes;
mod products;
mod tokens;

use redraft::DType;
use redraft::cuda::{Cuda, Driver, Emulator, EmulatorOptions, Gpu, device_count};

/// The machines at hand: the emulation, and the first GPU where there is one.
/// `REDRAFT_TEST_MACHINES` is as for the kernel tests: `gpu` leaves the GPU alone, the name of an
/// architecture an emulated machine that rounds as it does.
pub fn drivers() -> Vec<Box<dyn Driver>> {
    let asked = std::env::var("REDRAFT_TEST_MACHINES").unwrap_or_default();
    let emulator = |options| -> Box<dyn Driver> { Box::new(Emulator::new(options).unwrap_or_else(|e| panic!("{e}"))) };
    let mut drivers = Vec::new();
    match asked.as_str() {
        "gpu" => {}
        "" => drivers.push(emulator(EmulatorOptions::default())),
        arch => return vec![emulator(EmulatorOptions { arch: arch.to_owned().leak(), ..EmulatorOptions::default() })],
    }
    match device_count() {
        Ok(_) => drivers.push(Box::new(Gpu::open(0).unwrap_or_else(|e| panic!("{e}")))),
        Err(error) if drivers.is_empty() || std::env::var_os("REDRAFT_REQUIRE_CUDA").is_some() => panic!("a GPU was demanded: {error}"),
        Err(error) => eprintln!("GPU part skipped: {error}"),
    }
    drivers
}

/// A backend of each machine at hand.
pub fn backends(dtype: DType) -> Vec<Cuda> {
    drivers().into_iter().map(|driver| Cuda::new(driver, dtype).unwrap_or_else(|e| panic!("{e}"))).collect()
}
