//! Choice of the emulator, in builds that have it.
#![forbid(unsafe_code)]

use crate::cuda::driver::interface::Driver;
use crate::error::Result;

/// The kernels of `arch`, executed on the host by `threads` threads, all cores where none is named.
///
/// Errors: [`crate::Error::Device`] in a build without the feature `emulator`, and on a host
/// without g++.
pub fn emulated(arch: &'static str, threads: Option<usize>) -> Result<Box<dyn Driver>> {
    #[cfg(feature = "emulator")]
    {
        use redraft_emulator::EmulatorOptions;

        use crate::cuda::driver::emu::Emulator;

        let defaults = EmulatorOptions::default();
        let options = EmulatorOptions { arch, threads: threads.unwrap_or(defaults.threads), ..defaults };
        Ok(Box::new(Emulator::new(options)?))
    }
    #[cfg(not(feature = "emulator"))]
    {
        let _ = (arch, threads);
        Err(crate::error::Error::device("this build has no emulator: build with --features emulator, or use --device cpu"))
    }
}
