// Test entries: one mistake each, which the runtime must name, beside their right twins. A CTA has
// 64 threads.
#include "common.cuh"

struct FaultParams {
    const float* in;  // (n)
    float* out;       // (n)
    u32* counter;     // zero
    u32 n;
};

KERNEL(barrier_of_some, FaultParams) {
    if (threadIdx.x < 32) __syncthreads();
}

KERNEL(barriers_of_two_lines, FaultParams) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

KERNEL(exchange_of_some, FaultParams) {
    if (lane_id() < 16) p.out[threadIdx.x] = __shfl_xor_sync(FULL_WARP, 1.0f, 1);
}

KERNEL(exchange_outside_of_its_mask, FaultParams) { p.out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

KERNEL(exchange_of_two_masks, FaultParams) { p.out[threadIdx.x] = __shfl_xor_sync(lane_id() < 16 ? FULL_WARP : 0xffff0001u, 1.0f, 1); }

KERNEL(read_far_behind, FaultParams) { p.out[threadIdx.x] = p.in[p.n + (threadIdx.x == 5 ? 2000 : 0) - 64 + threadIdx.x]; }
KERNEL(read_just_behind, FaultParams) { p.out[threadIdx.x] = p.in[p.n - 63 + threadIdx.x]; }
KERNEL(write_just_behind, FaultParams) { p.out[p.n - 63 + threadIdx.x] = 1.0f; }
KERNEL(write_in_front, FaultParams) {
    if (threadIdx.x == 9) p.out[-1] = 1.0f;
}
KERNEL(write_far_in_front, FaultParams) {
    if (threadIdx.x == 9) p.out[-5000] = 1.0f;
}

KERNEL(dynamic_shared_too_small, FaultParams) {
    DYNAMIC_SHARED(bytes);
    if (threadIdx.x == 63) ((float*)bytes)[64] = 1.0f;
}

KERNEL(dynamic_shared_unwritten, FaultParams) {
    DYNAMIC_SHARED(bytes);
    __shared__ float fixed[2];
    p.out[threadIdx.x] = ((const float*)bytes)[threadIdx.x] + fixed[threadIdx.x % 2];
}

// Each thread copies four numbers; EARLY reads them before they are there.
template <bool EARLY>
__device__ __forceinline__ void copied(const FaultParams& p) {
    DYNAMIC_SHARED(bytes);
    float* buffer = (float*)bytes + 4 * threadIdx.x;
    cp_async16(buffer, p.in + 4 * (threadIdx.x % 16), true);
    cp_async_commit();
    cp_async_wait<EARLY ? 1 : 0>();
    p.out[threadIdx.x] = buffer[threadIdx.x % 4];
    cp_async_wait<0>();
}
KERNEL(copy_read_early, FaultParams) { copied<true>(p); }
KERNEL(copy_read_in_time, FaultParams) { copied<false>(p); }

KERNEL(copy_unaligned, FaultParams) {
    DYNAMIC_SHARED(bytes);
    cp_async16(bytes, p.in + 1, true);
    cp_async_wait<0>();
}

// A neighbour's number, without a barrier, with one, with the barrier of the warp, and with that
// where it does not reach.
template <u32 DISTANCE, typename Barrier>
__device__ __forceinline__ void exchanged(const FaultParams& p, Barrier barrier) {
    __shared__ float numbers[THREADS];
    numbers[threadIdx.x] = p.in[threadIdx.x];
    barrier();
    p.out[threadIdx.x] = numbers[(threadIdx.x + DISTANCE) % THREADS];
}
KERNEL(race_of_read_and_write, FaultParams) {
    exchanged<1>(p, [] {});
}
KERNEL(race_of_warps, FaultParams) {
    exchanged<32>(p, [] { __syncwarp(); });
}
KERNEL(race_despite_shuffle, FaultParams) {
    __shared__ float numbers[THREADS];
    numbers[threadIdx.x] = p.in[threadIdx.x];
    __shfl_xor_sync(FULL_WARP, 0, 1);
    p.out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}
KERNEL(barrier_orders, FaultParams) {
    exchanged<33>(p, [] { __syncthreads(); });
}
KERNEL(warp_barrier_orders, FaultParams) {
    __shared__ float numbers[THREADS];
    numbers[threadIdx.x] = p.in[threadIdx.x];
    __syncwarp();
    const float other = numbers[threadIdx.x ^ 1];
    __syncwarp();
    numbers[threadIdx.x] = other;
    p.out[threadIdx.x] = other;
}
KERNEL(race_of_writes, FaultParams) {
    __shared__ float number;
    number = p.in[threadIdx.x];
}
// The barrier at the end of a round is missing: the copy for the next one begins while others still
// read.
KERNEL(race_with_a_copy, FaultParams) {
    DYNAMIC_SHARED(bytes);
    float* numbers = (float*)bytes;
    for (u32 round = 0; round < 2; ++round) {
        if (threadIdx.x < 16) cp_async16(numbers + 4 * threadIdx.x, p.in + 4 * threadIdx.x, true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        p.out[threadIdx.x] = numbers[63 - threadIdx.x];
    }
}
KERNEL(race_with_an_atomic, FaultParams) {
    __shared__ u32 sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, 1u);
    p.out[threadIdx.x] = (float)sum;
}
KERNEL(atomics_order_themselves, FaultParams) {
    __shared__ u32 sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, 1u);
    __syncthreads();
    p.out[threadIdx.x] = (float)sum;
}

// All threads write, one says that it is done.
template <bool BARRIER, bool FENCE>
__device__ __forceinline__ void arrival(const FaultParams& p) {
    p.out[threadIdx.x] = 1.0f;
    if (FENCE) __threadfence();
    if (BARRIER) __syncthreads();
    if (threadIdx.x == 40) atomicAdd(p.counter, 1u);
}
KERNEL(race_of_arrival, FaultParams) { arrival<false, true>(p); }
KERNEL(race_without_fence, FaultParams) { arrival<true, false>(p); }
KERNEL(arrival_in_order, FaultParams) { arrival<true, true>(p); }
KERNEL(one_fence_for_all, FaultParams) {
    p.out[threadIdx.x] = 1.0f;
    __syncthreads();
    if (threadIdx.x != 40) return;
    __threadfence();
    atomicAdd(p.counter, 1u);
}

// CTAs of a 3-D grid add up their numbers; the last to arrive sums them.
KERNEL(last_arriver, FaultParams) {
    __shared__ bool is_last;
    const u32 cta = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, ctas = gridDim.x * gridDim.y * gridDim.z;
    if (threadIdx.x == 0) {
        p.out[1 + cta] = (float)(cta + 1);
        __threadfence();
        is_last = atomicAdd(p.counter, 1u) + 1 == ctas;
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    __threadfence();
    float sum = 0.0f;
    for (u32 i = 0; i < ctas; ++i) sum += p.out[1 + i];
    p.out[0] = sum;
    *p.counter = 0;
}
