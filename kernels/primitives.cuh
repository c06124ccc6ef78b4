// PTX instructions that CUDA C++ has no name for: asynchronous copies, matrix fragments, ordered
// memory. All inline assembly of the project is in this file; its host twin is `emulate.h`, which
// the build for the host includes in its place.
//
// Baseline sm_80. Shared addresses are generic pointers here; each function converts them.
#pragma once

#ifdef REDRAFT_EMULATE
#include "emulate.h"
#define OFFSET_OF(Params, field) __builtin_offsetof(Params, field)
#else

// NVRTC has no offsetof; this is the constant expression that its front end offers in its place.
#define OFFSET_OF(Params, field) __INTADDR__(&((Params*)0)->field)
// One entry: parameters arrive by value in constant memory under the name `p`. THREADS is the CTA
// size of the build.
#define KERNEL(name, Params) extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Params p)
// The same for an entry of another CTA size, or with a minimum of resident CTAs per multiprocessor.
#define KERNEL_BOUNDS(name, Params, threads, ctas) \
    extern "C" __global__ void __launch_bounds__(threads, ctas) name(const __grid_constant__ Params p)
// The dynamic shared memory of the CTA, as bytes aligned to 128. Once per kernel body.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// Nearest even; NaN becomes 0x7fff.
__device__ __forceinline__ unsigned short bf16_from_f32(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Exact.
__device__ __forceinline__ float f32_from_f16(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Two at once: `low` in the low half.
__device__ __forceinline__ unsigned bf16x2_from_f32(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16. With `valid` false
// nothing is read and zeros are written.
// It is complete for the issuing thread after the matching `cp_async_wait`, for others after a
// barrier that follows.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    const unsigned bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// Closes the group of copies started since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the latest groups are unfinished.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane i names row i % 8 of matrix i / 8
// (16 bytes, aligned to 16); afterwards lane i holds in word m of `out` the elements (row i / 4,
// columns 2 (i % 4) and + 1) of matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&out)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// Two matrices: lanes 0 to 15 name the rows, the addresses of the others are ignored (but must be
// valid).
__device__ __forceinline__ void ldmatrix_x2(unsigned (&out)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// As ldmatrix_x4, each matrix transposed: lane i holds (rows 2 (i % 4) and + 1, column i / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&out)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&out)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// d += a b: a (16 x 16, row major) and b (16 x 8, column major) in bf16, d (16 x 8) in f32. With g
// = lane / 4 and t = lane % 4:
// a[0] = (row g, columns 2t, 2t + 1), a[1] = (row g + 8, the same), a[2] = (row g, columns 2t + 8,
// 2t + 9), a[3] = (row g + 8, those);
// b[0] = (rows 2t, 2t + 1, column g), b[1] = (rows 2t + 8, 2t + 9, column g); d[0], d[1] = (row g,
// columns 2t, 2t + 1), d[2], d[3] = (row g + 8, the same).
// An element depends on its own row of a and column of b alone, not on their neighbours.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
