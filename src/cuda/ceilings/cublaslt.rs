//! One square product by cuBLASLt: the rate of a device that its forwards are compared with.
//!
//! No model uses it: the library adds in another order for another number of rows. Every failure is
//! a sentence, since the ceiling is then measured by our own kernel. cuBLASLt counts column-major,
//! where a row-major array is its own transpose: `out = x weight^T` reads there as
//! `out = weight^T x`.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use cudarc::cublaslt::sys;
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t,
    cublasStatus_t, cudaDataType_t, cudaStream_t,
};
use libloading::Library;

use crate::cuda::driver::interface::Address;
use crate::cuda::driver::library::{function_table, loader_words};

/// The newest toolkit first; the bare name exists where development files are installed.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// What NVIDIA recommends on Hopper; algorithms that want more are not proposed.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// cublasOperation_t: the operand is transposed.
const CUBLAS_OP_T: c_int = 1;
const BF16: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;

/// `cublasLtMatmulHeuristicResult_t` with its status as the plain integer that the library writes.
#[repr(C)]
struct Proposal {
    algorithm: cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Proposal>() == size_of::<cublasLtMatmulHeuristicResult_t>());

function_table! { CublasLtFunctions, cublasStatus_t;
    create = cublasLtCreate(*mut cublasLtHandle_t);
    destroy = cublasLtDestroy(cublasLtHandle_t);
    /// (description, compute type, type of the scalars).
    desc_create = cublasLtMatmulDescCreate(*mut cublasLtMatmulDesc_t, cublasComputeType_t, cudaDataType_t);
    desc_set = cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, *const c_void, usize);
    desc_destroy = cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t);
    /// (layout, type, rows, columns, leading dimension).
    layout_create = cublasLtMatrixLayoutCreate(*mut cublasLtMatrixLayout_t, cudaDataType_t, u64, u64, i64);
    layout_destroy = cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t);
    preference_create = cublasLtMatmulPreferenceCreate(*mut cublasLtMatmulPreference_t);
    preference_set =
        cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, *const c_void, usize);
    preference_destroy = cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t);
    /// (library, description, layouts of A B C D, preference, proposals wanted, proposals, given).
    propose = cublasLtMatmulAlgoGetHeuristic(
        cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, c_int, *mut cublasLtMatmulHeuristicResult_t, *mut c_int,
    );
    /// (library, description, alpha, A and its layout, B, beta, C, D, algorithm, workspace,
    /// stream).
    matmul = cublasLtMatmul(
        cublasLtHandle_t, cublasLtMatmulDesc_t, *const c_void, *const c_void, cublasLtMatrixLayout_t, *const c_void,
        cublasLtMatrixLayout_t, *const c_void, *const c_void, cublasLtMatrixLayout_t, *mut c_void, cublasLtMatrixLayout_t,
        *const cublasLtMatmulAlgo_t, *mut c_void, usize, cudaStream_t,
    );
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
    // Null where not made.
    library: cublasLtHandle_t,
    desc: cublasLtMatmulDesc_t,
    square: cublasLtMatrixLayout_t,
    preference: cublasLtMatmulPreference_t,
    proposal: Proposal,
}

impl SquareProduct {
    /// Opens the library on the current context.
    pub(super) fn open(side: u32) -> Result<SquareProduct, String> {
        let mut p = SquareProduct {
            functions: open()?,
            library: null_mut(),
            desc: null_mut(),
            square: null_mut(),
            preference: null_mut(),
            proposal: Proposal {
                algorithm: cublasLtMatmulAlgo_t { data: [0; 8] },
                workspace_bytes: 0,
                state: 0,
                waves: 0.0,
                reserved: [0; 4],
            },
        };
        let f = &p.functions;
        let (side, bytes, mut count) = (u64::from(side), WORKSPACE_BYTES as u64, 0);
        let (f32_type, compute) = (cudaDataType_t::CUDA_R_32F, cublasComputeType_t::CUBLAS_COMPUTE_32F);
        let transposed = CUBLAS_OP_T;
        let transa = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let most = cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: results are writable, each handle is live when it is used, and both attributes,
        // which are copied, have the sizes that are said. There is space for the one proposal.
        unsafe {
            checked("Create", (f.create)(&mut p.library))?;
            checked("MatmulDescCreate", (f.desc_create)(&mut p.desc, compute, f32_type))?;
            checked("MatmulDescSetAttribute", (f.desc_set)(p.desc, transa, (&raw const transposed).cast(), size_of::<c_int>()))?;
            checked("MatrixLayoutCreate", (f.layout_create)(&mut p.square, BF16, side, side, side as i64))?;
            checked("MatmulPreferenceCreate", (f.preference_create)(&mut p.preference))?;
            checked("MatmulPreferenceSetAttribute", (f.preference_set)(p.preference, most, (&raw const bytes).cast(), size_of::<u64>()))?;
            let proposals = (&raw mut p.proposal).cast();
            let square = p.square;
            let status = (f.propose)(p.library, p.desc, square, square, square, square, p.preference, 1, proposals, &mut count);
            checked("MatmulAlgoGetHeuristic", status)?;
        }
        if count == 0 || p.proposal.state != 0 || p.proposal.workspace_bytes > WORKSPACE_BYTES {
            return Err("it has no such product".to_owned());
        }
        Ok(p)
    }

    /// Enqueues the product on a stream of the context that was current when it was opened.
    /// `workspace` has [`WORKSPACE_BYTES`]; addresses are multiples of 256.
    pub(super) fn enqueue(&self, x: Address, weight: Address, out: Address, workspace: Address, stream: usize) -> Result<(), String> {
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the caller's arrays hold side x side bf16 values each as the layout says, the
        // scalars are on the host as is the default, and stream and workspace are of this context.
        let status = unsafe {
            (self.functions.matmul)(
                self.library,
                self.desc,
                (&raw const one).cast(),
                weight as *const c_void,
                self.square,
                x as *const c_void,
                self.square,
                (&raw const zero).cast(),
                out as *const c_void,
                self.square,
                out as *mut c_void,
                self.square,
                &self.proposal.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream as cudaStream_t,
            )
        };
        checked("Matmul", status)
    }
}

impl Drop for SquareProduct {
    fn drop(&mut self) {
        let f = &self.functions;
        // SAFETY: what is not null was made by the library and is destroyed once; calls in flight
        // keep copies of descriptions.
        unsafe {
            if !self.preference.is_null() {
                (f.preference_destroy)(self.preference);
            }
            if !self.square.is_null() {
                (f.layout_destroy)(self.square);
            }
            if !self.desc.is_null() {
                (f.desc_destroy)(self.desc);
            }
            if !self.library.is_null() {
                (f.destroy)(self.library);
            }
        }
    }
}
