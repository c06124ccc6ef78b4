//! Device choice at run time, and the backend that it opens.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::backend::NumberTypes;
use crate::cpu::Cpu;
use crate::cpu::topology::logical_cores;
use crate::error::{Error, Result};

/// Where the network runs. Parses from and prints as `auto`, `cpu`, `cuda:0`, `emu:sm_90a`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU if there is one that can be used, else the CPU.
    #[default]
    Auto,
    /// Vector instructions of this machine, on several threads.
    Cpu,
    /// The GPU with this index, by the order of the CUDA driver.
    Cuda(usize),
    /// The CUDA kernels of this architecture, executed on the CPU: exact and slow, for tests. Needs
    /// `g++`, and the feature `emulator`.
    Emu(&'static str),
}

/// Architectures that can be emulated, the default first.
const EMULATED: [&str; 6] = ["sm_90a", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"];

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        match text.split_once(':').unwrap_or((text, "0")) {
            ("auto", "0") => Ok(Device::Auto),
            ("cpu", "0") => Ok(Device::Cpu),
            ("cuda", index) => index
                .parse()
                .map(Device::Cuda)
                .map_err(|_| Error::request(format!("expected a device index after `cuda:`, found `{index}`"))),
            ("emu", "0") => Ok(Device::Emu(EMULATED[0])),
            ("emu", arch) => EMULATED
                .iter()
                .find(|known| **known == arch)
                .map(|arch| Device::Emu(arch))
                .ok_or_else(|| Error::request(format!("expected one of {} after `emu:`, found `{arch}`", EMULATED.join(", ")))),
            _ => Err(Error::request("expected auto, cpu, cuda, cuda:INDEX or emu[:ARCH]")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
            Device::Emu(arch) => write!(f, "emu:{arch}"),
        }
    }
}

/// A backend, ready.
#[allow(clippy::large_enum_variant)] // one per engine, moved once
pub(crate) enum AnyBackend {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Cuda),
}

/// `body` with the backend under the given name, whichever it is.
macro_rules! on_backend {
    ($any:expr, |$backend:ident| $body:expr) => {
        match $any {
            crate::api::device::AnyBackend::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            crate::api::device::AnyBackend::Cuda($backend) => $body,
        }
    };
}
pub(crate) use on_backend;

/// A device that was opened, and why it is not the GPU that is there.
pub(crate) struct Opened {
    pub(crate) backend: AnyBackend,
    pub(crate) passed_over: Option<Error>,
}

impl Device {
    /// Opens the device for numbers of these types; `threads` of the CPU, as many as the process
    /// may run at once at most, and one for each physical core where none is named.
    ///
    /// Errors: [`Error::Device`] where the device is absent or refused.
    pub(crate) fn open(self, types: NumberTypes, threads: Option<usize>) -> Result<Opened> {
        let NumberTypes { dtype, weights } = types;
        let cpu = || -> Result<AnyBackend> {
            // Threads wait for each other at every product: more than there are would be slower.
            let threads = threads.map_or(0, |threads| threads.min(logical_cores()));
            Ok(AnyBackend::Cpu(Cpu::new(threads, dtype)?.with_weights(weights)))
        };
        let opened = |backend| Ok(Opened { backend, passed_over: None });
        #[cfg(feature = "cuda")]
        {
            use crate::cuda::{Cuda, Gpu, emulated, is_there};
            let gpu = |index| Ok(AnyBackend::Cuda(Cuda::new(Box::new(Gpu::open(index)?), dtype)?.with_weights(weights)));
            match self {
                Device::Cuda(index) => opened(gpu(index)?),
                Device::Emu(arch) => opened(AnyBackend::Cuda(Cuda::new(emulated(arch, threads)?, dtype)?.with_weights(weights))),
                Device::Auto => {
                    let gpu = match is_there() {
                        Ok(false) => return opened(cpu()?),
                        Ok(true) => gpu(0),
                        Err(error) => Err(error),
                    };
                    match gpu {
                        Ok(cuda) => opened(cuda),
                        Err(error) => Ok(Opened { backend: cpu()?, passed_over: Some(error) }),
                    }
                }
                Device::Cpu => opened(cpu()?),
            }
        }
        #[cfg(not(feature = "cuda"))]
        match self {
            Device::Cuda(_) | Device::Emu(_) => {
                Err(Error::device("this build has no CUDA backend: build with --features cuda, or use --device cpu"))
            }
            Device::Auto | Device::Cpu => opened(cpu()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_print_as_they_parse() {
        for (text, printed) in
            [("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:3", "cuda:3"), ("emu", "emu:sm_90a"), ("emu:sm_80", "emu:sm_80")]
        {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), printed);
        }
        for text in ["gpu", "cuda:x", "cpu:1", "emu:sm_70", ""] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
