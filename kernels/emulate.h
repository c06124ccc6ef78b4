// Host twin of the CUDA words that the kernels use: with it in front, the unmodified body of a .cu file is plain C++.
//
// A CUDA thread is a fiber; the runtime in emulate.cpp switches fibers at barriers and warp exchanges only, under four schedules.
// `__shared__` variables live in a linker section of their own, which is filled with NaN patterns before every CTA.
// To grow: a primitive gets its host twin here (or beside its asm in common.cuh); kernels never learn that they are emulated.
#pragma once

#define __global__
#define __device__ static inline
#define __forceinline__ __attribute__((always_inline))
#define __shared__ static __attribute__((section("redraft_shared")))
// By reference here, by value on the device: one C signature serves every entry.
#define KERNEL(name, Params) extern "C" void name(const Params& p)

struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Dim3 { unsigned x, y, z; };
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

// `site` is the source line: all threads of a barrier must stand at the same one.
void emulate_barrier(int site);
const unsigned* emulate_exchange(unsigned mask, unsigned value, int site);  // the 32 words deposited by the warp

#define __syncthreads() emulate_barrier(__LINE__)
#define __syncwarp(mask) ((void)emulate_exchange(mask, 0, __LINE__))
#define __shfl_sync(mask, value, lane) emulate_shuffle(mask, value, (lane) & 31u, __LINE__)
#define __shfl_xor_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) ^ (distance), __LINE__)
#define __shfl_up_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) - (distance), __LINE__)
#define __shfl_down_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) + (distance), __LINE__)
#define __ballot_sync(mask, flag) emulate_ballot(mask, flag, __LINE__)

template <typename T>
static inline T emulate_shuffle(unsigned mask, T value, unsigned source, int site) {
    static_assert(sizeof(T) == 4, "a shuffle moves one word");
    unsigned word;
    __builtin_memcpy(&word, &value, 4);
    const unsigned* words = emulate_exchange(mask, word, site);
    if (source < 32 && (mask >> source & 1u)) word = words[source];  // outside the warp: the own value, as the instruction does
    __builtin_memcpy(&value, &word, 4);
    return value;
}

static inline unsigned emulate_ballot(unsigned mask, bool flag, int site) {
    const unsigned* words = emulate_exchange(mask, flag, site);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1u) ballot |= words[lane] << lane;
    }
    return ballot;
}

static inline float __uint_as_float(unsigned bits) { float value; __builtin_memcpy(&value, &bits, 4); return value; }
static inline unsigned __float_as_uint(float value) { unsigned bits; __builtin_memcpy(&bits, &value, 4); return bits; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline float sqrtf(float value) { return __builtin_sqrtf(value); }
// Fibers switch at barriers and exchanges only, so a plain read-modify-write is atomic.
static inline unsigned atomicAdd(unsigned* target, unsigned value) { const unsigned old = *target; *target += value; return old; }
