// Order and selection: floats as ordered integers, reductions of 64-bit words over the CTA, and the
// radix select that finds the count-th smallest key without sorting. Everything but `double` is
// integer arithmetic, so nothing depends on timing.
#pragma once
#include "common.cuh"

// `f32::total_cmp` as the order of unsigned integers, and back.
__device__ __forceinline__ u32 ordered_bits(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(u32 ordered) {
    return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

// ---- 64-bit words; every thread of the warp or CTA takes part ----

__device__ __forceinline__ u64 shuffle_xor(u64 value, u32 distance) {
    const u32 low = __shfl_xor_sync(FULL_WARP, (u32)value, distance);
    const u32 high = __shfl_xor_sync(FULL_WARP, (u32)(value >> 32), distance);
    return (u64)high << 32 | low;
}
__device__ __forceinline__ u64 shuffle_up(u64 value, u32 distance) {
    const u32 low = __shfl_up_sync(FULL_WARP, (u32)value, distance);
    const u32 high = __shfl_up_sync(FULL_WARP, (u32)(value >> 32), distance);
    return (u64)high << 32 | low;
}
__device__ __forceinline__ u64 shuffle(u64 value, u32 lane) {
    const u32 low = __shfl_sync(FULL_WARP, (u32)value, lane);
    const u32 high = __shfl_sync(FULL_WARP, (u32)(value >> 32), lane);
    return (u64)high << 32 | low;
}
__device__ __forceinline__ double shuffle_xor(double value, u32 distance) {
    return __longlong_as_double((long long)shuffle_xor((u64)__double_as_longlong(value), distance));
}
__device__ __forceinline__ double shuffle(double value, u32 lane) {
    return __longlong_as_double((long long)shuffle((u64)__double_as_longlong(value), lane));
}

template <typename T>
__device__ __forceinline__ T warp_sum64(T value) {
    for (u32 distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
}

// Sum over the CTA, the same bits in every thread. Two barriers.
template <typename T>
__device__ __forceinline__ T block_sum64(T value) {
    __shared__ T partial[WARPS];
    value = warp_sum64(value);
    if (lane_id() == 0) partial[warp_id()] = value;
    __syncthreads();
    T total = 0;
    for (u32 w = 0; w < WARPS; ++w) total += partial[w];
    __syncthreads();  // `partial` may be rewritten by the next call
    return total;
}

// Smallest value over the CTA, in every thread. Two barriers.
__device__ __forceinline__ u64 block_min(u64 value) {
    __shared__ u64 partial[WARPS];
    for (u32 distance = 16; distance > 0; distance /= 2) {
        const u64 other = shuffle_xor(value, distance);
        value = other < value ? other : value;
    }
    if (lane_id() == 0) partial[warp_id()] = value;
    __syncthreads();
    value = partial[0];
    for (u32 w = 1; w < WARPS; ++w) value = partial[w] < value ? partial[w] : value;
    __syncthreads();  // `partial` may be rewritten by the next call
    return value;
}

// Sum of `value` over all lower threads of the CTA. Two barriers.
__device__ __forceinline__ u64 block_exclusive_sum64(u64 value) {
    __shared__ u64 partial[WARPS];
    u64 inclusive = value;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u64 lower = shuffle_up(inclusive, distance);
        if (lane_id() >= distance) inclusive += lower;
    }
    if (lane_id() == 31) partial[warp_id()] = inclusive;
    __syncthreads();
    u64 before = 0;
    for (u32 w = 0; w < warp_id(); ++w) before += partial[w];
    __syncthreads();  // `partial` may be rewritten by the next call
    return before + inclusive - value;
}

// ---- radix select ----

// The `wanted` smallest of some keys are those below `key` and the first `equal` of those equal to
// it.
struct Cut {
    u64 key;
    u32 equal;
};

// Eight bits at a time from the top of `bits`: the bin in which the wanted-th smallest key lies,
// among the keys that share the bins found before. key(i, k) gives element i < count its key, or
// says false if it has none; where fewer than `wanted` have one, all of those are wanted.
// THREADS is 256: a bin is a thread's. Five barriers a digit.
template <typename Key>
__device__ __forceinline__ Cut radix_select(u32 count, u32 wanted, int bits, Key key) {
    __shared__ u32 histogram[256];
    __shared__ u32 chosen_bin, chosen_before;
    u64 prefix = 0, fixed_bits = 0;
    for (int shift = bits - 8; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u64 k;
            if (key(i, k) && (k & fixed_bits) == prefix) atomicAdd(&histogram[(u32)(k >> shift) & 255u], 1u);
        }
        __syncthreads();
        u32 total;
        const u32 mine = histogram[threadIdx.x];
        const u32 before = block_exclusive_sum(mine, total);
        wanted = wanted < total ? wanted : total;
        if (wanted == 0) return Cut{0, 0};  // uniform over the CTA
        if (before < wanted && wanted <= before + mine) {  // one thread
            chosen_bin = threadIdx.x;
            chosen_before = before;
        }
        __syncthreads();  // the next digit rewrites these two only after its own barriers
        prefix |= (u64)chosen_bin << shift;
        fixed_bits |= (u64)255 << shift;
        wanted -= chosen_before;
    }
    return Cut{prefix, wanted};
}
