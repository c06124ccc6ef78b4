//! One square product by cuBLASLt: the rate of a device that its forwards are compared with.
//!
//! No model uses it: the library adds in another order for another number of rows. Every failure is
//! a sentence, since the ceiling is then measured by our own kernel. cuBLASLt counts column-major,
//! where a row-major array is its own transpose: `out = x weight^T` reads there as
//! `out = weight^T x`.

use std::ffi::{c_int, c_void};

use cudarc::cublaslt::sys;
use libloading::Library;

use crate::cuda::driver::interface::Address;
use crate::cuda::driver::libcuda::RawHandle;
use crate::cuda::driver::library::{loader_words, symbol};

/// The newest toolkit first; the bare name exists where development files are installed.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// What NVIDIA recommends on Hopper; algorithms that want more are not proposed.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// cublasOperation_t: the operand is transposed.
const CUBLAS_OP_T: c_int = 1;
const BF16: c_int = sys::cudaDataType_t::CUDA_R_16BF as c_int;

/// `cublasLtMatmulHeuristicResult_t`, which begins with a `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Default)]
struct Proposal {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Proposal>() == size_of::<sys::cublasLtMatmulHeuristicResult_t>());

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// Signatures from cublasLt.h; cublasStatus_t and the enumerations are int.
        struct CublasLtFunctions {
            $($(#[$doc])* $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl CublasLtFunctions {
            fn load(library: &'static Library) -> crate::error::Result<CublasLtFunctions> {
                // SAFETY: the signatures are those of cublasLt.h, and the library is never closed.
                unsafe { Ok(CublasLtFunctions { $($field: symbol(library, $symbol)?,)* }) }
            }
        }
    };
}

functions! {
    create = "cublasLtCreate" (*mut RawHandle);
    destroy = "cublasLtDestroy" (RawHandle);
    /// (description, compute type, type of the scalars).
    desc_create = "cublasLtMatmulDescCreate" (*mut RawHandle, c_int, c_int);
    desc_set = "cublasLtMatmulDescSetAttribute" (RawHandle, c_int, *const c_void, usize);
    desc_destroy = "cublasLtMatmulDescDestroy" (RawHandle);
    /// (layout, type, rows, columns, leading dimension).
    layout_create = "cublasLtMatrixLayoutCreate" (*mut RawHandle, c_int, u64, u64, i64);
    layout_destroy = "cublasLtMatrixLayoutDestroy" (RawHandle);
    preference_create = "cublasLtMatmulPreferenceCreate" (*mut RawHandle);
    preference_set = "cublasLtMatmulPreferenceSetAttribute" (RawHandle, c_int, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy" (RawHandle);
    /// (library, description, layouts of A B C D, preference, proposals wanted, proposals, given).
    propose = "cublasLtMatmulAlgoGetHeuristic"
        (RawHandle, RawHandle, RawHandle, RawHandle, RawHandle, RawHandle, RawHandle, c_int, *mut Proposal, *mut c_int);
    /// (library, description, alpha, A and its layout, B, beta, C, D, algorithm, workspace,
    /// stream).
    matmul = "cublasLtMatmul"
        (RawHandle, RawHandle, *const f32, Address, RawHandle, Address, RawHandle, *const f32, Address, RawHandle, Address, RawHandle,
         *const [u64; 8], Address, usize, RawHandle);
}

fn open() -> Result<CublasLtFunctions, String> {
    let mut reason = String::new();
    for name in NAMES {
        // SAFETY: NVIDIA's library by its own name; its initialisers may run at any time.
        match unsafe { Library::new(name) } {
            // Functions of it are kept for the life of the process.
            Ok(library) => return CublasLtFunctions::load(Box::leak(Box::new(library))).map_err(|error| error.to_string()),
            Err(error) if reason.is_empty() => reason = loader_words(&error),
            Err(_) => {}
        }
    }
    Err(format!("{reason}; it is in the CUDA toolkit and in the Python package nvidia-cublas, whose directory LD_LIBRARY_PATH names"))
}

fn checked(call: &str, status: c_int) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("cublasLt{call} failed: cublasStatus_t {status}")) }
}

/// `out (side, side) = x (side, side) weight (side, side)^T`, all bf16, by the first algorithm that
/// the library proposes.
pub(super) struct SquareProduct {
    functions: CublasLtFunctions,
    /// Library, description, layout and preference; 0 where not made.
    handles: [RawHandle; 4],
    proposal: Proposal,
}

impl SquareProduct {
    /// Opens the library on the current context.
    pub(super) fn open(side: u32) -> Result<SquareProduct, String> {
        let mut product = SquareProduct { functions: open()?, handles: [0; 4], proposal: Proposal::default() };
        let (f, [library, desc, layout, preference]) = (&product.functions, &mut product.handles);
        let (side, bytes, mut count) = (u64::from(side), WORKSPACE_BYTES as u64, 0);
        let (f32_type, compute) = (sys::cudaDataType_t::CUDA_R_32F as c_int, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as c_int);
        let transposed = CUBLAS_OP_T;
        let transa = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as c_int;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
        // SAFETY: results are writable, each handle is live when it is used, and both attributes,
        // which are copied, have the sizes that are said. There is space for the one proposal.
        unsafe {
            checked("Create", (f.create)(library))?;
            checked("MatmulDescCreate", (f.desc_create)(desc, compute, f32_type))?;
            checked("MatmulDescSetAttribute", (f.desc_set)(*desc, transa, (&raw const transposed).cast(), size_of::<c_int>()))?;
            checked("MatrixLayoutCreate", (f.layout_create)(layout, BF16, side, side, side as i64))?;
            checked("MatmulPreferenceCreate", (f.preference_create)(preference))?;
            checked("MatmulPreferenceSetAttribute", (f.preference_set)(*preference, most, (&raw const bytes).cast(), size_of::<u64>()))?;
            let square = *layout;
            let status = (f.propose)(*library, *desc, square, square, square, square, *preference, 1, &mut product.proposal, &mut count);
            checked("MatmulAlgoGetHeuristic", status)?;
        }
        if count == 0 || product.proposal.state != 0 || product.proposal.workspace_bytes > WORKSPACE_BYTES {
            return Err("it has no such product".to_owned());
        }
        Ok(product)
    }

    /// Enqueues the product on a stream of the context that was current when it was opened.
    /// `workspace` has [`WORKSPACE_BYTES`]; addresses are multiples of 256.
    pub(super) fn enqueue(&self, x: Address, weight: Address, out: Address, workspace: Address, stream: RawHandle) -> Result<(), String> {
        let ([library, desc, square, _], one, zero) = (self.handles, 1.0f32, 0.0f32);
        let algorithm = &self.proposal.algorithm;
        // SAFETY: the caller's arrays hold side x side bf16 values each as the layout says, the
        // scalars are on the host as is the default, and stream and workspace are of this context.
        let status = unsafe {
            (self.functions.matmul)(
                library,
                desc,
                &one,
                weight,
                square,
                x,
                square,
                &zero,
                out,
                square,
                out,
                square,
                algorithm,
                workspace,
                WORKSPACE_BYTES,
                stream,
            )
        };
        checked("Matmul", status)
    }
}

impl Drop for SquareProduct {
    fn drop(&mut self) {
        let f = &self.functions;
        let destroy = [f.destroy, f.desc_destroy, f.layout_destroy, f.preference_destroy];
        for (handle, destroy) in self.handles.into_iter().zip(destroy).rev().filter(|(handle, _)| *handle != 0) {
            // SAFETY: made by the library, destroyed once; calls in flight keep copies of
            // descriptions.
            unsafe { destroy(handle) };
        }
    }
}
