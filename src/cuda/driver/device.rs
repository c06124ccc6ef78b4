//! CUDA driver and its devices: whether it is there, how many devices it has, what they are.
//! Creates no context.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys;
use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUresult};
use libloading::Library;
use serde::Serialize;

use crate::cuda::driver::libcuda::library;
use crate::cuda::driver::library::{function_table, symbol};
use crate::error::{Error, Result};

/// One CUDA device, as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    pub ordinal: usize,
    pub name: String,
    /// Major and minor: (9, 0) is sm_90.
    pub compute_capability: (u32, u32),
    pub memory_bytes: u64,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gib = self.memory_bytes as f64 / (1u64 << 30) as f64;
        write!(f, "cuda:{} {} (sm_{major}{minor}, {gib:.1} GiB)", self.ordinal, self.name)
    }
}

/// Whether there is a device to use. False without a driver, and where the driver reports none.
///
/// Errors: a driver that is there and does not start.
pub fn is_there() -> Result<bool> {
    match opened() {
        Opened::Driver(driver) => driver.count().map(|count| count > 0),
        Opened::NoDriver(_) | Opened::NoDevice(_) => Ok(false),
        Opened::Broken(error) => Err(error.clone()),
    }
}

/// How many CUDA devices this process sees. A driver that reports none is an error as well: zero
/// never comes back.
pub fn device_count() -> Result<usize> {
    match driver()?.count()? {
        0 => Err(no_device("the driver reports none")),
        count => Ok(count),
    }
}

/// Describes device `ordinal`.
pub fn probe(ordinal: usize) -> Result<DeviceInfo> {
    let count = device_count()?;
    if ordinal >= count {
        let valid = if count == 1 { "only cuda:0 exists".to_owned() } else { format!("cuda:0 to cuda:{} exist", count - 1) };
        return Err(Error::device(format!("cuda:{ordinal}: no such device, {valid}; choose one of them or --device cpu")));
    }
    let driver = driver()?;
    let mut device: c_int = 0;
    // SAFETY: `device` is writable; ordinal < count, which came from a c_int.
    driver.check("cuDeviceGet", unsafe { (driver.functions.device_get)(&mut device, ordinal as c_int) })?;
    let mut name = [0u8; 256];
    let (text, room) = (name.as_mut_ptr().cast(), name.len() as c_int);
    // SAFETY: the driver writes at most the given length, the terminating NUL included.
    driver.check("cuDeviceGetName", unsafe { (driver.functions.device_get_name)(text, room, device) })?;
    let mut memory_bytes = 0usize;
    // SAFETY: `memory_bytes` is writable; `device` came from cuDeviceGet.
    driver.check("cuDeviceTotalMem", unsafe { (driver.functions.device_total_mem)(&mut memory_bytes, device) })?;
    let attribute = |which: CUdevice_attribute| -> Result<u32> {
        let mut value: c_int = 0;
        // SAFETY: `value` is writable; `device` came from cuDeviceGet.
        driver.check("cuDeviceGetAttribute", unsafe { (driver.functions.device_get_attribute)(&mut value, which, device) })?;
        u32::try_from(value)
            .map_err(|_| Error::device(format!("cuda:{ordinal}: the driver reports {value} for attribute {}", which as c_int)))
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "unnamed".to_owned(), |name| name.to_string_lossy().into_owned());
    Ok(DeviceInfo { ordinal, name, compute_capability: (major, minor), memory_bytes: memory_bytes as u64 })
}

fn no_device(reason: &str) -> Error {
    Error::device(format!("no CUDA device: {reason}; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"))
}

/// What the driver says about a code: `CUDA_ERROR_NO_DEVICE, no CUDA-capable device is detected`,
/// or the bare number.
pub(in crate::cuda) fn describe(code: c_int) -> String {
    driver().map_or_else(|_| format!("driver error {code}"), |driver| driver.describe(code))
}

function_table! { DeviceFunctions, CUresult;
    device_get_count = cuDeviceGetCount(*mut c_int);
    device_get = cuDeviceGet(*mut CUdevice, c_int);
    device_get_name = cuDeviceGetName(*mut c_char, c_int, CUdevice);
    device_get_attribute = cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    device_total_mem = cuDeviceTotalMem_v2(*mut usize, CUdevice);
    init = cuInit(c_uint);
}

/// The driver, initialised, with the functions that describe its codes. They take any code, so they
/// are declared here: cudarc's take an enum.
struct Driver {
    functions: DeviceFunctions,
    error_name: CodeText,
    error_string: CodeText,
}

type CodeText = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

/// What came of looking for the driver.
enum Opened {
    Driver(Driver),
    /// There is no library of that name.
    NoDriver(Error),
    /// It starts and reports no device.
    NoDevice(Error),
    /// It is there and does not start: another version than the kernel's module, for one.
    Broken(Error),
}

/// The driver, opened and initialised once.
fn opened() -> &'static Opened {
    static OPENED: OnceLock<Opened> = OnceLock::new();
    OPENED.get_or_init(|| match library() {
        Ok(library) => open(library).unwrap_or_else(Opened::Broken),
        Err(error) => Opened::NoDriver(error),
    })
}

fn driver() -> Result<&'static Driver> {
    match opened() {
        Opened::Driver(driver) => Ok(driver),
        Opened::NoDriver(error) | Opened::NoDevice(error) | Opened::Broken(error) => Err(error.clone()),
    }
}

fn open(library: &'static Library) -> Result<Opened> {
    // SAFETY: signatures from cuda.h, where CUresult is an int-sized enum; `library` is 'static.
    let driver = unsafe {
        Driver {
            functions: DeviceFunctions::load(library)?,
            error_name: symbol(library, "cuGetErrorName")?,
            error_string: symbol(library, "cuGetErrorString")?,
        }
    };
    // SAFETY: cuInit takes flags that must be 0 and may be called again.
    let code = unsafe { (driver.functions.init)(0) };
    if code == CUresult::CUDA_ERROR_NO_DEVICE as c_int {
        return Ok(Opened::NoDevice(no_device(&driver.describe(code))));
    }
    driver.check("cuInit", code)?;
    Ok(Opened::Driver(driver))
}

impl Driver {
    /// Devices that this process sees; none is no error here.
    fn count(&self) -> Result<usize> {
        let mut count: c_int = 0;
        // SAFETY: `count` is writable for the call; the driver was initialised by `open`.
        let code = unsafe { (self.functions.device_get_count)(&mut count) };
        if code == CUresult::CUDA_ERROR_NO_DEVICE as c_int {
            return Ok(0);
        }
        self.check("cuDeviceGetCount", code)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    fn check(&self, call: &str, code: c_int) -> Result<()> {
        if code == CUresult::CUDA_SUCCESS as c_int {
            return Ok(());
        }
        Err(Error::device(format!("{call} failed: {}; check nvidia-smi, or use --device cpu", self.describe(code))))
    }

    /// Falls back to the bare number where the driver knows no name.
    fn describe(&self, code: c_int) -> String {
        let text = |function: CodeText| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: `text` is writable; the functions accept any code and return a static
            // string or null.
            let answer = unsafe { function(code, &mut text) };
            // SAFETY: a non-null result is a NUL-terminated static string.
            (answer == 0 && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        match (text(self.error_name), text(self.error_string)) {
            (Some(name), Some(what)) => format!("{name}, {what}"),
            (Some(name), None) => name,
            _ => format!("driver error {code}"),
        }
    }
}
