//! Products by cuBLASLt, where it is installed: one call per product, with the algorithm that the library itself proposes for the shape.
//! Whether that is worth it, and whether anyone asked for it, is `autotune.rs`'s business.
//!
//! Every failure is a sentence and never an [`Error`](crate::Error): whoever asked computes the product otherwise. cuBLASLt counts
//! column-major, where a row-major array is its own transpose: `out (rows, n) = x (rows, k) weight (n, k)^T` reads there as
//! `out (n x rows) = weight (k x n)^T x (k x rows)`, with the row lengths as leading dimensions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use cudarc::cublaslt::sys;
use libloading::Library;

use super::driver::Address;
use super::libcuda::Handle;
use super::linear::Linear;
use super::{loader_words, symbol};
use crate::backend::{DType, Epilogue};

/// The newest toolkit first; the bare name exists where development files are installed.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// What NVIDIA recommends on Hopper; algorithms that want more are not proposed.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// What the library takes for granted of every address unless told otherwise (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_*).
const ALIGNMENT: u64 = 256;

/// cublasOperation_t: the operand is transposed.
const CUBLAS_OP_T: c_int = 1;

/// Of cublasStatus_t, the two that are not failures.
const SUCCESS: c_int = sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS as c_int;
const NOT_SUPPORTED: c_int = sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED as c_int;

/// `cublasLtMatmulAlgo_t`: the library's own business.
type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Default)]
struct Proposal {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// Signatures from cublasLt.h; cublasStatus_t and the enumerations are int.
        struct Functions {
            get_version: unsafe extern "C" fn() -> usize,
            $($(#[$doc])* $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Functions {
            fn of(library: &'static Library) -> crate::Result<Functions> {
                // SAFETY: the signatures are those of cublasLt.h, and the library is never closed.
                unsafe { Ok(Functions { get_version: symbol(library, "cublasLtGetVersion")?, $($field: symbol(library, $symbol)?,)* }) }
            }
        }
    };
}

functions! {
    create = "cublasLtCreate" (*mut Handle);
    destroy = "cublasLtDestroy" (Handle);
    /// (description, compute type, type of the scalars).
    desc_create = "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int);
    desc_set = "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize);
    desc_destroy = "cublasLtMatmulDescDestroy" (Handle);
    /// (layout, type, rows, columns, leading dimension).
    layout_create = "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64);
    layout_destroy = "cublasLtMatrixLayoutDestroy" (Handle);
    preference_create = "cublasLtMatmulPreferenceCreate" (*mut Handle);
    preference_set = "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy" (Handle);
    /// (library, description, layouts of A B C D, preference, proposals wanted, proposals, proposals given).
    propose = "cublasLtMatmulAlgoGetHeuristic"
        (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Proposal, *mut c_int);
    /// (library, description, alpha, A and its layout, B, beta, C, D, algorithm, workspace and its bytes, stream).
    matmul = "cublasLtMatmul"
        (Handle, Handle, *const f32, Address, Handle, Address, Handle, *const f32, Address, Handle, Address, Handle, *const Algorithm,
         Address, usize, Handle);
}

/// The table, looked up once; where there is none, why.
fn functions() -> Result<&'static Functions, String> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    let found = FUNCTIONS.get_or_init(|| {
        let mut reason = String::new();
        for name in NAMES {
            // SAFETY: NVIDIA's library by its own name; its initialisers may run at any time.
            match unsafe { Library::new(name) } {
                // Functions of it are kept for the life of the process.
                Ok(library) => return Functions::of(Box::leak(Box::new(library))).map_err(|error| error.to_string()),
                Err(error) if reason.is_empty() => reason = loader_words(&error),
                Err(_) => {}
            }
        }
        Err(format!("{reason}; it is in the CUDA toolkit and in the Python package nvidia-cublas, whose directory LD_LIBRARY_PATH names"))
    });
    found.as_ref().map_err(String::clone)
}

fn checked(call: &str, status: c_int) -> Result<(), String> {
    if status == SUCCESS { Ok(()) } else { Err(format!("{call} failed: cublasStatus_t {status}")) }
}

/// Something made by the library, destroyed when dropped.
struct Made {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
}

impl Made {
    /// `create` fills the handle in.
    fn new(call: &str, destroy: unsafe extern "C" fn(Handle) -> c_int, create: impl FnOnce(&mut Handle) -> c_int) -> Result<Made, String> {
        let mut handle = 0;
        checked(call, create(&mut handle))?;
        Ok(Made { handle, destroy })
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // SAFETY: made by the library, destroyed once; calls in flight keep copies of descriptions.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// What the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: u32,
    n: u32,
    k: u32,
    /// Of cublasLtEpilogue_t.
    epilogue: u32,
    /// The product is added to what is there.
    adds: bool,
    out_bf16: bool,
}

impl Shape {
    /// None where cuBLASLt has no such product: its bias has the type of the output, and ours is f32; it has no gates in pairs.
    fn of(op: &Linear) -> Option<Shape> {
        use sys::cublasLtEpilogue_t::*;
        let Linear { rows, n, k, out_dtype, .. } = *op;
        if op.dtype != DType::Bf16 || rows == 0 || op.bias.is_some() && out_dtype != DType::F32 {
            return None;
        }
        let epilogue = match (op.epilogue, op.bias) {
            (Epilogue::Store | Epilogue::Add, None) => CUBLASLT_EPILOGUE_DEFAULT,
            // Under Add, the bias joins product and residual.
            (Epilogue::Store | Epilogue::Add, Some(_)) => CUBLASLT_EPILOGUE_BIAS,
            // The tanh form, as ours.
            (Epilogue::Gelu, None) => CUBLASLT_EPILOGUE_GELU,
            (Epilogue::Gelu, Some(_)) => CUBLASLT_EPILOGUE_GELU_BIAS,
            (Epilogue::SwiGlu, _) => return None,
        } as u32;
        Some(Shape { rows, n, k, epilogue, adds: op.epilogue == Epilogue::Add, out_bf16: out_dtype == DType::Bf16 })
    }
}

/// The library on one device.
pub(super) struct CublasLt {
    functions: &'static Functions,
    library: Made,
    /// [`WORKSPACE_BYTES`] that no one else uses: recorded graphs hold the address.
    workspace: Address,
    /// Proposals by shape; None where there was none.
    algorithms: RefCell<HashMap<Shape, Option<Algorithm>>>,
}

impl CublasLt {
    /// Opens the library on the current context; `workspace` gives [`WORKSPACE_BYTES`] of device memory.
    pub(super) fn open(workspace: impl FnOnce() -> Result<Address, String>) -> Result<CublasLt, String> {
        let f = functions()?;
        // SAFETY: the result is writable, and the caller made the context current.
        let library = Made::new("cublasLtCreate", f.destroy, |handle| unsafe { (f.create)(handle) })?;
        Ok(CublasLt { functions: f, library, workspace: workspace()?, algorithms: RefCell::default() })
    }

    /// As the library writes it: 130101 is 13.1.1.
    pub(super) fn version(&self) -> usize {
        // SAFETY: takes nothing.
        unsafe { (self.functions.get_version)() }
    }

    pub(super) fn workspace(&self) -> Address {
        self.workspace
    }

    /// Enqueues a product on `stream` of the current context. False where the library has none of this kind.
    pub(super) fn product(&self, op: &Linear, stream: Handle) -> Result<bool, String> {
        let Linear { x, weight, bias, out, .. } = *op;
        let aligned = [x, weight, out, bias.unwrap_or(0)].iter().all(|address| address % ALIGNMENT == 0);
        let Some(shape) = Shape::of(op).filter(|_| aligned) else { return Ok(false) };
        let call = self.describe(&shape, bias)?;
        let known = self.algorithms.borrow().get(&shape).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let algorithm = self.propose(&call)?;
                self.algorithms.borrow_mut().insert(shape, algorithm);
                algorithm
            }
        };
        let Some(algorithm) = algorithm else { return Ok(false) };
        let (alpha, beta) = (1.0f32, if shape.adds { 1.0 } else { 0.0 });
        let Call { desc, weight: a, x: b, out: d } = &call;
        // SAFETY: the layouts describe the caller's arrays as `Linear` states them, which hold as many elements; description and layouts
        // are live, the scalars are on the host as is the default, the workspace is this value's own and the stream of its context.
        let status = unsafe {
            (self.functions.matmul)(
                self.library.handle,
                desc.handle,
                &alpha,
                weight,
                a.handle,
                x,
                b.handle,
                &beta,
                out,
                d.handle,
                out,
                d.handle,
                &algorithm,
                self.workspace,
                WORKSPACE_BYTES,
                stream,
            )
        };
        checked("cublasLtMatmul", status).map(|()| true)
    }

    fn describe(&self, shape: &Shape, bias: Option<Address>) -> Result<Call, String> {
        use sys::cublasLtMatmulDescAttributes_t::*;
        let f = self.functions;
        let (compute, f32_type, bf16_type) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as c_int,
            sys::cudaDataType_t::CUDA_R_32F as c_int,
            sys::cudaDataType_t::CUDA_R_16BF as c_int,
        );
        // SAFETY: the result is writable.
        let desc = Made::new("cublasLtMatmulDescCreate", f.desc_destroy, |handle| unsafe { (f.desc_create)(handle, compute, f32_type) })?;
        let set = |attribute: sys::cublasLtMatmulDescAttributes_t, value: &[u8]| {
            // SAFETY: the description is live, and the value, which is copied, has the length that is said.
            let status = unsafe { (f.desc_set)(desc.handle, attribute as c_int, value.as_ptr().cast(), value.len()) };
            checked("cublasLtMatmulDescSetAttribute", status)
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, &CUBLAS_OP_T.to_ne_bytes())?;
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, &shape.epilogue.to_ne_bytes())?;
        if let Some(bias) = bias {
            set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.to_ne_bytes())?;
        }
        let layout = |kind: c_int, rows: u32, columns: u32| {
            // SAFETY: the result is writable.
            Made::new("cublasLtMatrixLayoutCreate", f.layout_destroy, |handle| unsafe {
                (f.layout_create)(handle, kind, rows.into(), columns.into(), rows.into())
            })
        };
        let Shape { rows, n, k, out_bf16, .. } = *shape;
        let out = layout(if out_bf16 { bf16_type } else { f32_type }, n, rows)?;
        Ok(Call { weight: layout(bf16_type, k, n)?, x: layout(bf16_type, k, rows)?, out, desc })
    }

    /// The first of the library's proposals.
    fn propose(&self, call: &Call) -> Result<Option<Algorithm>, String> {
        let f = self.functions;
        // SAFETY: the result is writable.
        let preference =
            Made::new("cublasLtMatmulPreferenceCreate", f.preference_destroy, |handle| unsafe { (f.preference_create)(handle) })?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
        let bytes = WORKSPACE_BYTES as u64;
        // SAFETY: the preference is live; the value is an unsigned 64-bit number and copied.
        let status = unsafe { (f.preference_set)(preference.handle, attribute, (&raw const bytes).cast(), size_of_val(&bytes)) };
        checked("cublasLtMatmulPreferenceSetAttribute", status)?;
        let (mut proposal, mut count) = (Proposal::default(), 0);
        let Call { desc, weight: a, x: b, out: d } = call;
        // SAFETY: everything named is live; there is room for the one proposal asked for.
        let status = unsafe {
            (f.propose)(
                self.library.handle,
                desc.handle,
                a.handle,
                b.handle,
                d.handle,
                d.handle,
                preference.handle,
                1,
                &mut proposal,
                &mut count,
            )
        };
        if status != NOT_SUPPORTED {
            checked("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        let usable = status == SUCCESS && count > 0 && proposal.state == SUCCESS && proposal.workspace_bytes <= WORKSPACE_BYTES;
        Ok(usable.then_some(proposal.algorithm))
    }
}

/// One product as the library describes it. C is D.
struct Call {
    desc: Made,
    weight: Made,
    x: Made,
    out: Made,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proposal_is_laid_out_as_the_header_says() {
        assert_eq!(size_of::<Proposal>(), size_of::<sys::cublasLtMatmulHeuristicResult_t>());
        assert_eq!(
            std::mem::offset_of!(Proposal, workspace_bytes),
            std::mem::offset_of!(sys::cublasLtMatmulHeuristicResult_t, workspaceSize)
        );
        assert_eq!(std::mem::offset_of!(Proposal, state), std::mem::offset_of!(sys::cublasLtMatmulHeuristicResult_t, state));
    }

    #[test]
    fn products_whose_types_do_not_fit_stay_ours() {
        let plain = Linear {
            rows: 65,
            n: 8,
            k: 16,
            dtype: DType::Bf16,
            x: 0,
            weight: 0,
            bias: None,
            epilogue: Epilogue::Store,
            out: 0,
            out_dtype: DType::Bf16,
        };
        let biased = Linear { bias: Some(0), out_dtype: DType::F32, ..plain };
        let epilogue = |op: &Linear| Shape::of(op).map(|shape| (shape.epilogue, shape.adds));
        assert_eq!(epilogue(&plain), Some((1, false)));
        assert_eq!(epilogue(&biased), Some((4, false)));
        assert_eq!(epilogue(&Linear { epilogue: Epilogue::Add, ..biased }), Some((4, true)));
        assert_eq!(epilogue(&Linear { epilogue: Epilogue::Gelu, ..plain }), Some((32, false)));
        assert_eq!(epilogue(&Linear { epilogue: Epilogue::Gelu, ..biased }), Some((36, false)));
        for other in [
            Linear { out_dtype: DType::Bf16, ..biased },
            Linear { epilogue: Epilogue::SwiGlu, ..plain },
            Linear { dtype: DType::F32, ..plain },
            Linear { rows: 0, ..plain },
        ] {
            assert_eq!(epilogue(&other), None);
        }
    }
}
