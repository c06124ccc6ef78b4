// Words shared by all kernels: integer names, the kernel and layout macros, bf16, warp and CTA
// reductions, the Philox generator.
//
// Plain CUDA C++ with builtin types only, no toolkit header: NVRTC alone compiles it, and compiles
// it fastest. Everything that is not portable C++ has a host twin (`primitives.cuh`), so that the
// unmodified body of every kernel also runs on a CPU, where the tests hold it to its twin.
// THREADS, the CTA size, arrives as a define.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xffffffffu
#define WARPS (THREADS / 32)
static_assert(THREADS % 32 == 0 && THREADS >= 32 && THREADS <= 1024, "a CTA is a whole number of warps");

// FIELD states where a field of a params struct lies. The Rust twin states the same numbers; both
// compilers check their own side and a test compares the two lists, so that a swapped pair of
// fields cannot compile happily on both sides.
#define FIELD(Params, field, offset) static_assert(OFFSET_OF(Params, field) == (offset), #Params "." #field)
#define LAYOUT(Params, size) static_assert(sizeof(Params) == (size), #Params)

#include "primitives.cuh"

// ---- numbers ----

__device__ __forceinline__ float f32_from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// Four consecutive elements, widened. `source` is aligned to four elements.
__device__ __forceinline__ float4 load4(const float* source) { return *(const float4*)source; }
__device__ __forceinline__ float4 load4(const u16* source) {
    const ushort4 v = *(const ushort4*)source;
    return make_float4(f32_from_bf16(v.x), f32_from_bf16(v.y), f32_from_bf16(v.z), f32_from_bf16(v.w));
}
__device__ __forceinline__ void store4(float* target, float4 v) { *(float4*)target = v; }
__device__ __forceinline__ void store4(u16* target, float4 v) {
    *(uint2*)target = make_uint2(bf16x2_from_f32(v.x, v.y), bf16x2_from_f32(v.z, v.w));
}
__device__ __forceinline__ float load1(const float* source) { return *source; }
__device__ __forceinline__ float load1(const u16* source) { return f32_from_bf16(*source); }
__device__ __forceinline__ void store1(float* target, float value) { *target = value; }
__device__ __forceinline__ void store1(u16* target, float value) { *target = bf16_from_f32(value); }

// ---- reductions; every thread of the warp or CTA takes part, in the order of thread numbers ----

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / 32; }

// Butterfly: every lane ends with the same bits, since each level adds the same two numbers on both
// sides.
__device__ __forceinline__ float warp_sum(float value) {
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

// Sum over the CTA, the same bits in every thread. Two barriers.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[WARPS];
    value = warp_sum(value);
    if (lane_id() == 0) partial[warp_id()] = value;
    __syncthreads();
    float total = 0.0f;
    for (u32 w = 0; w < WARPS; ++w) total += partial[w];
    __syncthreads();  // `partial` may be rewritten by the next call
    return total;
}

// Sum of `value` over all lower threads of the CTA; `total` is the sum over all. Two barriers.
__device__ __forceinline__ u32 block_exclusive_sum(u32 value, u32& total) {
    __shared__ u32 partial[WARPS];
    u32 inclusive = value;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 lower = __shfl_up_sync(FULL_WARP, inclusive, distance);
        if (lane_id() >= distance) inclusive += lower;
    }
    if (lane_id() == 31) partial[warp_id()] = inclusive;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 w = 0; w < WARPS; ++w) {
        if (w == warp_id()) before = total;
        total += partial[w];
    }
    __syncthreads();  // `partial` may be rewritten by the next call
    return before + inclusive - value;
}

// ---- randomness: the device side of `src/rng.rs`, bit for bit ----

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox4x32_10(uint4 counter, uint2 key) {
    for (u32 round = 0; round < 10; ++round) {
        const u64 a = (u64)counter.x * 0xD2511F53u;
        const u64 b = (u64)counter.z * 0xCD9E8D57u;
        counter = make_uint4((u32)(b >> 32) ^ counter.y ^ key.x, (u32)b, (u32)(a >> 32) ^ counter.w ^ key.y, (u32)a);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

// A uniform in [0, 1) with 53 random bits.
__device__ __forceinline__ double uniform53(u32 high, u32 low) {
    return (double)(((u64)high << 32 | low) >> 11) * (1.0 / 9007199254740992.0);  // 2^-53
}

struct Uniforms {
    double token;  // chooses the token
    double order;  // ranks the position wherever an order is random
};

// The key of a draw, as in `rng::DrawKey`.
__device__ __forceinline__ Uniforms draw_uniforms(u64 seed, u32 sample, u32 stage, u32 block, u32 step, u32 position) {
    const uint4 w = philox4x32_10(make_uint4(position, step, stage << 24 | block, sample), make_uint2((u32)seed, (u32)(seed >> 32)));
    return Uniforms{uniform53(w.x, w.y), uniform53(w.z, w.w)};
}
