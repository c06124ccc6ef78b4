//! The CUDA backend as a whole: launchers, kernels, runs sampled on the device, recorded graphs.
//! Every test runs under emulation, and on the first GPU where there is one;
//! `REDRAFT_REQUIRE_CUDA=1` turns the absence of a GPU into a failure.
#![cfg(feature = "emulator")]

#[path = "../parity/fixture.rs"]
#[allow(dead_code)] // shared with the parity tests, which need all of it
mod fixture;
#[path = "../parity/joint.rs"]
mod joint;
#[path = "../kernels/machines.rs"]
#[allow(dead_code)] // shared with the kernel tests, which need all of it
mod machines;
#[path = "../decode/support.rs"]
#[allow(dead_code)] // shared with the tests of the engine's invariants
mod support;

mod invariants;
mod parity;
mod passes;
mod quantised;
mod sizes;
mod tokens;

use redraft::DType;
use redraft::cuda::{Cuda, Driver, EmulatorOptions, device_count};

/// The machines at hand, by `REDRAFT_TEST_MACHINES`; `REDRAFT_REQUIRE_CUDA=1` demands a GPU among
/// them, unless an architecture is emulated in its place.
pub fn drivers() -> Vec<Box<dyn Driver>> {
    let drivers = machines::drivers([EmulatorOptions::default()]);
    if let Err(error) = device_count() {
        let is_emulated = std::env::var("REDRAFT_TEST_MACHINES").is_ok_and(|asked| !asked.is_empty());
        assert!(is_emulated || std::env::var_os("REDRAFT_REQUIRE_CUDA").is_none(), "a GPU was demanded: {error}");
        eprintln!("GPU part skipped: {error}");
    }
    drivers
}

/// A backend of each machine at hand.
pub fn backends(dtype: DType) -> Vec<Cuda> {
    drivers().into_iter().map(|driver| Cuda::new(driver, dtype).unwrap_or_else(|e| panic!("{e}"))).collect()
}
