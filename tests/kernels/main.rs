//! Every kernel, run on the CPU: the unmodified `kernels/*.cu` are compiled as host C++ and their
//! threads run as fibers, under four schedules and two timings of copies, over shared memory filled
//! with NaN, between guarded buffers, against plain Rust. Needs g++ on x86-64, no GPU.
//!
//! NVRTC compiles the same sources where it is found; `REDRAFT_REQUIRE_NVRTC=1` turns its absence
//! into a failure.
#![cfg(feature = "emulator")]

mod attention;
mod barriers;
mod ceilings;
mod driver_errors;
mod embed;
mod emulator;
mod gather;
mod guidance;
mod kernel_benches;
mod linear;
mod machines;
mod moe;
mod mutations;
mod norm;
mod nvrtc;
mod params;
mod remask;
mod rng;
mod rope_append;
mod route;
mod runtime;
mod sample;
mod sample_shortlist;
mod select_masked;
mod shortlist;
mod stubs;
mod tensor_core;
mod unmask;
