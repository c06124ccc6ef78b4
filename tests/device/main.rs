//! The CUDA backend as a whole: launchers, kernels, runs decided on the device, recorded graphs. Every test runs under emulation, and on
//! the first GPU where there is one; `REDRAFT_REQUIRE_CUDA=1` turns the absence of a GPU into a failure.

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

/// A backend of each machine at hand; with `REDRAFT_TEST_MACHINES=gpu` of the GPU alone.
pub fn backends(dtype: DType) -> Vec<Cuda> {
    let cuda = |driver: Box<dyn Driver>| Cuda::new(driver, dtype).unwrap_or_else(|e| panic!("{e}"));
    let mut backends = Vec::new();
    if !std::env::var("REDRAFT_TEST_MACHINES").is_ok_and(|which| which == "gpu") {
        backends.push(cuda(Box::new(Emulator::new(EmulatorOptions::default()).unwrap_or_else(|e| panic!("{e}")))));
    }
    match device_count() {
        Ok(_) => backends.push(cuda(Box::new(Gpu::open(0).unwrap_or_else(|e| panic!("{e}"))))),
        Err(error) if backends.is_empty() || std::env::var_os("REDRAFT_REQUIRE_CUDA").is_some() => panic!("a GPU was demanded: {error}"),
        Err(error) => eprintln!("GPU part skipped: {error}"),
    }
    backends
}
