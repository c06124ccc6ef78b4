//! Which machines the CUDA tests of several binaries run on.
//!
//! `REDRAFT_TEST_MACHINES` unset: the emulated machines that a binary asks for, and the first GPU
//! where there is one. `gpu`: the GPU alone, for a machine without g++ and for compute-sanitizer.
//! The name of an architecture: one emulated machine that rounds as it does, which is how the tests
//! of a GPU machine are tried beforehand.

use redraft::cuda::{Driver, Emulator, EmulatorOptions, Gpu, device_count};

/// The drivers of the machines, of which `emulated` are the emulated ones where nothing else is
/// asked for.
pub fn drivers(emulated: impl IntoIterator<Item = EmulatorOptions>) -> Vec<Box<dyn Driver>> {
    let asked = std::env::var("REDRAFT_TEST_MACHINES").unwrap_or_default();
    match asked.as_str() {
        "" => emulated.into_iter().map(emulator).chain(device_count().is_ok().then(gpu)).collect(),
        "gpu" => vec![gpu()],
        arch => vec![emulator(EmulatorOptions { arch: arch.to_owned().leak(), ..EmulatorOptions::default() })],
    }
}

pub fn emulator(options: EmulatorOptions) -> Box<dyn Driver> {
    Box::new(Emulator::new(options).unwrap_or_else(|e| panic!("{e}")))
}

fn gpu() -> Box<dyn Driver> {
    Box::new(Gpu::open(0).unwrap_or_else(|e| panic!("{e}")))
}
