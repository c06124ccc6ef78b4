// Kernels of tools/gpu_probe.py: each answers one question about a Hopper GPU. Compiled for sm_90a
// by NVRTC.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- bits of bf16 products: out (64, n) = a (64, K) b (n, K)^T, all row-major ----

static const int ROWS = 64;
static const int K = 256;
static const int DEPTH = 16;  // k of one instruction

// One warpgroup's product by mma.sync m16n8k16: warp w has rows 16 w to 16 w + 15, and takes 8
// columns at a time.
extern "C" __global__ void __launch_bounds__(128) product_mma(const u16* a, const u16* b, float* out, int n) {
    const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2;
    const int row = threadIdx.x / 32 * 16 + quad;
    for (int column = 0; column < n; column += 8) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int k = 0; k < K; k += DEPTH) {
            const u16* upper = a + row * K + k + pair;
            const u16* lower = upper + 8 * K;
            const u16* right = b + (column + quad) * K + k + pair;
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(*(const u32*)upper), "r"(*(const u32*)lower), "r"(*(const u32*)(upper + 8)), "r"(*(const u32*)(lower + 8)),
                  "r"(*(const u32*)right), "r"(*(const u32*)(right + 8)));
        }
        for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * n + column + pair + i % 2] = d[i];
    }
}

// Shared memory as wgmma reads it without a swizzle: core matrices of 8 rows by 16 bytes, 128 bytes
// apart along K and 256 bytes apart along rows. The descriptor counts in units of 16 bytes.
__device__ __forceinline__ u64 descriptor(const void* shared) {
    const u32 address = (u32)__cvta_generic_to_shared(shared);
    return (u64)((address & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
}
__device__ __forceinline__ int core_matrix_index(int row, int k) { return (row / 8 * 2 + k / 8) * 64 + row % 8 * 8 + k % 8; }

#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)

__device__ __forceinline__ void wgmma(float (&d)[4], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : FOUR(d, 0)
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
        : SIXTEEN(d, 0), SIXTEEN(d, 16)
        : "l"(a), "l"(b));
}

// The same product by wgmma: accumulators as those of mma.sync, N / 8 times.
template <int N>
__device__ __forceinline__ void product_by_wgmma(const u16* a, const u16* b, float* out) {
    __shared__ __align__(128) u16 left[ROWS * DEPTH];
    __shared__ __align__(128) u16 right[N * DEPTH];
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    for (int k = 0; k < K; k += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += 128) left[core_matrix_index(i / DEPTH, i % DEPTH)] = a[i / DEPTH * K + k + i % DEPTH];
        for (int i = threadIdx.x; i < N * DEPTH; i += 128) right[core_matrix_index(i / DEPTH, i % DEPTH)] = b[i / DEPTH * K + k + i % DEPTH];
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wgmma(d, descriptor(left), descriptor(right));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int i = 0; i < N / 2; ++i) out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
extern "C" __global__ void __launch_bounds__(128) product_wgmma8(const u16* a, const u16* b, float* out) { product_by_wgmma<8>(a, b, out); }
extern "C" __global__ void __launch_bounds__(128) product_wgmma64(const u16* a, const u16* b, float* out) { product_by_wgmma<64>(a, b, out); }

// ---- the gap between dependent kernels ----

extern "C" __global__ void tick(float* p) { p[threadIdx.x] += 1.0f; }

// The next kernel of the stream may start before this one ends; its writes become visible at the
// next one's wait.
extern "C" __global__ void tick_dependent(float* p) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    p[threadIdx.x] += 1.0f;
}

// ---- the cost of a fence before the last CTA of a group sums what the others wrote ----

static const u32 GROUPS = 72;
static const u32 FENCE_THREADS = 64;

template <bool SEQUENTIAL>
__device__ __forceinline__ void fence() {
    if (SEQUENTIAL) __threadfence();
    else asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

template <bool SEQUENTIAL>
__device__ __forceinline__ void sum_by_last(float4* partials, u32* counters) {
    __shared__ u32 arrived;
    const u32 group = blockIdx.x % GROUPS;
    partials[blockIdx.x * FENCE_THREADS + threadIdx.x] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    fence<SEQUENTIAL>();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(counters + group, 1u);
    __syncthreads();
    if (arrived + 1 != gridDim.x / GROUPS) return;
    fence<SEQUENTIAL>();
    if (threadIdx.x == 0) counters[group] = 0;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 cta = group; cta < gridDim.x; cta += GROUPS) {
        const float4 part = partials[cta * FENCE_THREADS + threadIdx.x];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    partials[(gridDim.x + blockIdx.x) * FENCE_THREADS + threadIdx.x] = sum;
}
extern "C" __global__ void __launch_bounds__(64) fence_sequential(float4* partials, u32* counters) { sum_by_last<true>(partials, counters); }
extern "C" __global__ void __launch_bounds__(64) fence_acquire_release(float4* partials, u32* counters) { sum_by_last<false>(partials, counters); }

// ---- a histogram of 64-bit masses by one CTA: eight copies of 256 bins, values in [0, 1) ----

static const int COPIES = 8;
static const int BINS = 256;
static const float UNIT = 2199023255552.0f;  // 2^41

__device__ __forceinline__ int bin_of(float value) { return threadIdx.x % COPIES * BINS + (int)(value * 255.0f); }

// 64-bit atomics in shared memory: a loop of compare and swap.
extern "C" __global__ void __launch_bounds__(512) histogram_wide(const float* values, u64* out, int n) {
    __shared__ u64 bins[COPIES * BINS];
    for (int i = threadIdx.x; i < COPIES * BINS; i += 512) bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 512) atomicAdd(bins + bin_of(values[i]), (u64)(values[i] * UNIT));
    __syncthreads();
    for (int i = threadIdx.x; i < COPIES * BINS; i += 512) out[i] = bins[i];
}

// Two 32-bit additions, the second with the first one's carry.
extern "C" __global__ void __launch_bounds__(512) histogram_carry(const float* values, u64* out, int n) {
    __shared__ u32 low[COPIES * BINS], high[COPIES * BINS];
    for (int i = threadIdx.x; i < COPIES * BINS; i += 512) low[i] = high[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 512) {
        const u64 mass = (u64)(values[i] * UNIT);
        const int bin = bin_of(values[i]);
        const u32 before = atomicAdd(low + bin, (u32)mass);
        atomicAdd(high + bin, (u32)(mass >> 32) + (before + (u32)mass < before));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COPIES * BINS; i += 512) out[i] = (u64)high[i] << 32 | low[i];
}

// ---- one pass of one CTA over a row of logits, some of them banned ----

static const float LEAST = -1e30f;

extern "C" __global__ void __launch_bounds__(512) row_scalar(const float* row, const u32* banned, float* out, int n) {
    float best = LEAST;
    for (int i = threadIdx.x; i < n; i += 512) {
        if (banned[i / 32] >> i % 32 & 1u) continue;
        best = fmaxf(best, row[i]);
    }
    out[threadIdx.x] = best;
}

extern "C" __global__ void __launch_bounds__(512) row_vector(const float4* row, const u32* banned, float* out, int n) {
    float best = LEAST;
#pragma unroll 4
    for (int i = threadIdx.x; i < n / 4; i += 512) {
        const float4 v = row[i];
        const u32 ban = banned[i / 8] >> i % 8 * 4;
        const float left = fmaxf(ban & 1u ? LEAST : v.x, ban & 2u ? LEAST : v.y);
        const float right = fmaxf(ban & 4u ? LEAST : v.z, ban & 8u ? LEAST : v.w);
        best = fmaxf(best, fmaxf(left, right));
    }
    out[threadIdx.x] = best;
}

// ---- reading a buffer that fits into L2, again and again; every round begins at another place ----

extern "C" __global__ void __launch_bounds__(512) read_l2(const uint4* data, u32* out, int quads, int rounds) {
    uint4 mixed = make_uint4(0, 0, 0, 0);
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 8
        for (int i = (blockIdx.x + round * 37) % gridDim.x * 512 + threadIdx.x; i < quads; i += gridDim.x * 512) {
            uint4 v;
            asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(data + i));
            mixed.x ^= v.x, mixed.y ^= v.y, mixed.z ^= v.z, mixed.w ^= v.w;
        }
    }
    // Never true, and the compiler cannot know.
    if (mixed.x == 12345u && mixed.y == 6789u && mixed.z == 1u) out[0] = mixed.w;
}
