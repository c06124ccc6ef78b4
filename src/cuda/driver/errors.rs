//! Words about a failing driver call: which call, what the driver says, what it means for
//! later calls, and the next move.
//!
//! Pure: codes and texts come in, an [`Error`] goes out, so every case is tested without a driver.
#![forbid(unsafe_code)]

use std::ffi::c_int;

use cudarc::driver::sys::CUresult;

use crate::error::Error;

/// What a failing code means for the calls after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) enum DriverError {
    /// Device memory is short. The context lives on.
    OutOfMemory,
    /// A kernel did what it must not; the context is gone with all its memory.
    Fault,
    /// The device went away; the context is gone with all its memory.
    Lost,
    /// The driver cannot use the machine code that NVRTC wrote.
    OldDriver,
    /// Another process holds the device for itself.
    Busy,
    /// This call alone failed.
    Other,
}

impl DriverError {
    pub(in crate::cuda) fn from_code(code: c_int) -> DriverError {
        // By number: a driver may return codes that this list of names does not have.
        const OUT_OF_MEMORY: c_int = CUresult::CUDA_ERROR_OUT_OF_MEMORY as c_int;
        const UNAVAILABLE: c_int = CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE as c_int;
        const UNKNOWN: c_int = CUresult::CUDA_ERROR_UNKNOWN as c_int;
        match code {
            OUT_OF_MEMORY => DriverError::OutOfMemory,
            UNAVAILABLE => DriverError::Busy,
            // Invalid image, no binary for this GPU, invalid PTX, unsupported PTX version.
            200 | 209 | 218 | 222 => DriverError::OldDriver,
            // Illegal address, timeout, assert, hardware stack, illegal instruction, misaligned
            // address, address space, pc, launch failed.
            700 | 702 | 710 | 714..=719 => DriverError::Fault,
            // Deinitialised, uncorrectable ECC and NVLink errors, contained and uncontained memory
            // errors, destroyed context.
            4 | 214 | 220 | 226 | 709 | UNKNOWN => DriverError::Lost,
            _ => DriverError::Other,
        }
    }

    /// True if the context does not survive it: every later call fails too.
    pub(in crate::cuda) fn is_sticky(self) -> bool {
        matches!(self, DriverError::Fault | DriverError::Lost)
    }

    fn next_move(self) -> &'static str {
        match self {
            DriverError::OutOfMemory => "use a smaller --length or --batch, --dtype bf16, or --device cpu",
            DriverError::Fault => {
                "a kernel failed, and everything on the device is lost; rerun with CUDA_LAUNCH_BLOCKING=1 to learn which, or under \
                 compute-sanitizer, and report it"
            }
            DriverError::Lost => {
                "the device is lost to this process; look at nvidia-smi and the kernel log for Xid messages, then start again"
            }
            DriverError::OldDriver => "update the NVIDIA driver, or use --device cpu",
            DriverError::Busy => "another process holds the device for itself; see nvidia-smi, or use --device cpu",
            DriverError::Other => "check nvidia-smi, or use --device cpu",
        }
    }
}

/// The error of one call: `cuda:0: cuLaunchKernel of embed_f32 failed: CUDA_ERROR_LAUNCH_FAILED,
/// unspecified launch failure; ...`. `what` is the driver's own description of the code.
pub(in crate::cuda) fn failed(ordinal: usize, call: &str, what: &str, code: c_int) -> Error {
    Error::device(format!("cuda:{ordinal}: {call} failed: {what}; {}", DriverError::from_code(code).next_move()))
}

/// The error of every call after a sticky one.
pub(in crate::cuda) fn lost(first: &str) -> Error {
    Error::device(format!("the device failed earlier, and this process cannot use it again: {first}"))
}

/// Not enough device memory for one buffer.
pub(in crate::cuda) fn out_of_memory(ordinal: usize, asked: usize, free: u64, total: u64) -> Error {
    Error::device(format!(
        "cuda:{ordinal}: out of device memory: {} asked for, {} of {} free; {}",
        bytes(asked as u64),
        bytes(free),
        bytes(total),
        DriverError::OutOfMemory.next_move()
    ))
}

/// A module that the driver cannot use. Versions are those of CUDA: what the driver speaks and what
/// NVRTC wrote.
pub(in crate::cuda) fn unusable_code(ordinal: usize, identity: &str, what: &str, driver: (u32, u32), nvrtc: (u32, u32)) -> Error {
    // The first driver branch of each CUDA generation on Linux.
    let branch = match nvrtc.0 {
        ..=11 => 450,
        12 => 525,
        _ => 580,
    };
    let next = if driver.0 < nvrtc.0 {
        format!(
            "the driver speaks CUDA {}.{} and this code is of CUDA {}.{}: update the driver to {branch} or later, or set REDRAFT_NVRTC_DIR \
             to an NVRTC of CUDA {}",
            driver.0, driver.1, nvrtc.0, nvrtc.1, driver.0
        )
    } else {
        format!("driver of CUDA {}.{}, NVRTC {}.{}; update the driver, or use --device cpu", driver.0, driver.1, nvrtc.0, nvrtc.1)
    };
    Error::device(format!("cuda:{ordinal}: {identity} cannot be loaded: {what}; {next}"))
}

/// `11.5 GiB`, `512.0 MiB`, `17 B`.
fn bytes(count: u64) -> String {
    let scaled = |shift: u32, unit: &str| format!("{:.1} {unit}", count as f64 / (1u64 << shift) as f64);
    match count {
        0..1024 => format!("{count} B"),
        1024..0x10_0000 => scaled(10, "KiB"),
        0x10_0000..0x4000_0000 => scaled(20, "MiB"),
        _ => scaled(30, "GiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sorted_by_what_they_mean_for_later_calls() {
        let cases = [
            (2, DriverError::OutOfMemory),
            (1, DriverError::Other),
            (701, DriverError::Other), // too many resources asked for: the context lives
            (700, DriverError::Fault),
            (719, DriverError::Fault),
            (999, DriverError::Lost),
            (209, DriverError::OldDriver),
            (222, DriverError::OldDriver),
            (46, DriverError::Busy),
            (-5, DriverError::Other),
        ];
        for (code, error) in cases {
            assert_eq!(DriverError::from_code(code), error, "{code}");
            assert_eq!(error.is_sticky(), [700, 719, 999].contains(&code), "{code}");
        }
    }

    #[test]
    fn texts_name_the_call_and_the_next_move() {
        let text = failed(1, "cuStreamSynchronize", "CUDA_ERROR_LAUNCH_FAILED, unspecified launch failure", 719).to_string();
        assert!(text.starts_with("cuda:1: cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED, unspecified"), "{text}");
        assert!(text.contains("compute-sanitizer") && text.contains("CUDA_LAUNCH_BLOCKING=1"), "{text}");
        let text = out_of_memory(0, 13 << 30, 512 << 20, 8 << 30).to_string();
        assert!(text.contains("13.0 GiB asked for, 512.0 MiB of 8.0 GiB free; use a smaller --length"), "{text}");
        let text = unusable_code(0, "kernel embed", "no binary", (12, 4), (13, 0)).to_string();
        assert!(text.contains("speaks CUDA 12.4") && text.contains("update the driver to 580 or later"), "{text}");
        let text = unusable_code(0, "kernel embed", "no binary", (13, 0), (13, 0)).to_string();
        assert!(!text.contains("speaks") && text.contains("update the driver"), "{text}");
        assert_eq!([bytes(17), bytes(2048)], ["17 B", "2.0 KiB"]);
    }
}
