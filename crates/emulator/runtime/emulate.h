// Host twin of `primitives.cuh` and of the CUDA built-ins that the kernels use: with it in front,
// the unmodified body of a .cu file is plain C++.
//
// A CUDA thread is a fiber; the runtime in emulate.cpp switches fibers at barriers and warp
// operations only, under four schedules.
// A warp operation (shuffle, vote, ldmatrix, mma) is joined by every lane of its mask; the last to
// arrive does the work for all of them.
// A build with -fsanitize=thread tells the runtime of every access, and no sanitizer library is
// linked: see "races" in emulate.cpp.
// Asynchronous copies are queued per thread and done either when they are issued or as late as the
// waits allow: what reads too early is caught by the one, what overwrites too early by the other.
// `__shared__` variables live in a linker section, which is filled with NaN patterns before every
// CTA, as the dynamic shared memory is. A primitive gets its host twin here; kernels never learn
// that they are emulated.
#pragma once

#define __global__
#define __device__ static inline
#define __forceinline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
// The driver renames the section of a kernel's zeroed variables; an attribute that names a section
// is lost inside of templates. Used: by others, for all the compiler knows, or it would take a
// variable that is never written for zero.
#define __shared__ static __attribute__((used, aligned(16)))
// By reference here, by value on the device: one C signature serves every entry.
#define KERNEL(name, Params) extern "C" void name(const Params& p)
#define KERNEL_BOUNDS(name, Params, threads, ctas) KERNEL(name, Params)
#define DYNAMIC_SHARED(name) unsigned char* const name = emulate_dynamic_shared()

struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
static inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
static inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

struct Dim3 { unsigned x, y, z; };
extern "C" {
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber
}

// `site` is the source line: all threads of a barrier, all lanes of a warp operation must be at the
// same one.
// The number of threads that came with a true flag.
unsigned emulate_barrier(bool flag, int site);
unsigned char* emulate_dynamic_shared();
void emulate_fail(const char* format, ...) __attribute__((format(printf, 1, 2), noreturn));

// What a lane brings to a warp operation: addresses of its registers, or plain words.
struct EmulatedLane {
    void* out;
    const void* in[2];
};
// Joins `work` with all lanes of `mask`; the last lane runs it over the 32 lanes, of which those
// outside the mask are stale. Null is __syncwarp, the one warp operation that orders memory.
void emulate_warp(unsigned mask, EmulatedLane lane, void (*work)(unsigned mask, EmulatedLane* lanes), int site);

#define __syncthreads() ((void)emulate_barrier(false, __LINE__))
#define __syncthreads_count(flag) ((int)emulate_barrier(flag, __LINE__))
#define __syncthreads_or(flag) ((int)(emulate_barrier(flag, __LINE__) > 0))
#define __syncthreads_and(flag) ((int)(emulate_barrier(!(flag), __LINE__) == 0))

static inline void __syncwarp(unsigned mask = 0xffffffffu, int site = __builtin_LINE()) { emulate_warp(mask, {}, nullptr, site); }

// ---- shuffles and votes ----

template <typename T>
static inline void emulate_shuffle_work(unsigned mask, EmulatedLane* lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        const unsigned source = *(const unsigned*)lanes[lane].in[1];
        // From outside the warp or the mask: the own value, as the instruction gives where it gives
        // anything.
        const unsigned from = source < 32 && (mask >> source & 1u) ? source : lane;
        *(T*)lanes[lane].out = *(const T*)lanes[from].in[0];
    }
}
template <typename T>
static inline T emulate_shuffle(unsigned mask, T value, unsigned source, int site) {
    T result;
    emulate_warp(mask, {&result, {&value, &source}}, emulate_shuffle_work<T>, site);
    return result;
}
#define __shfl_sync(mask, value, lane) emulate_shuffle(mask, value, (lane) & 31u, __LINE__)
#define __shfl_xor_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) ^ (distance), __LINE__)
#define __shfl_up_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) - (distance), __LINE__)
#define __shfl_down_sync(mask, value, distance) emulate_shuffle(mask, value, (threadIdx.x & 31u) + (distance), __LINE__)

static inline void emulate_ballot_work(unsigned mask, EmulatedLane* lanes) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1u) ballot |= (unsigned)*(const bool*)lanes[lane].in[0] << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1u) *(unsigned*)lanes[lane].out = ballot;
    }
}
static inline unsigned emulate_ballot(unsigned mask, bool flag, int site) {
    unsigned ballot;
    emulate_warp(mask, {&ballot, {&flag}}, emulate_ballot_work, site);
    return ballot;
}
#define __ballot_sync(mask, flag) emulate_ballot(mask, flag, __LINE__)
#define __any_sync(mask, flag) ((int)(emulate_ballot(mask, flag, __LINE__) != 0))
#define __all_sync(mask, flag) ((int)(emulate_ballot(mask, !(flag), __LINE__) == 0))

// ---- matrix fragments: the layouts are those that primitives.cuh states ----

template <int count, bool transposed>
static inline void emulate_ldmatrix_work(unsigned, EmulatedLane* lanes) {
    for (int m = 0; m < count; ++m) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            unsigned short pair[2];
            for (unsigned i = 0; i < 2; ++i) {
                const unsigned row = transposed ? lane % 4 * 2 + i : lane / 4;
                const unsigned column = transposed ? lane / 4 : lane % 4 * 2 + i;
                pair[i] = ((const unsigned short*)lanes[m * 8 + row].in[0])[column];
            }
            ((unsigned*)lanes[lane].out)[m] = (unsigned)pair[0] | (unsigned)pair[1] << 16;
        }
    }
}
template <int count, bool transposed>
static inline void emulate_ldmatrix(unsigned* out, const void* row, int site) {
    if ((threadIdx.x & 31u) < 8 * count && (unsigned long long)row % 16 != 0) {
        emulate_fail("ldmatrix of line %d reads from an address that is not aligned to 16 bytes", site);
    }
    emulate_warp(0xffffffffu, {out, {row}}, emulate_ldmatrix_work<count, transposed>, site);
}
static inline void ldmatrix_x4(unsigned (&out)[4], const void* row, int site = __builtin_LINE()) { emulate_ldmatrix<4, false>(out, row, site); }
static inline void ldmatrix_x2(unsigned (&out)[2], const void* row, int site = __builtin_LINE()) { emulate_ldmatrix<2, false>(out, row, site); }
static inline void ldmatrix_x4_trans(unsigned (&out)[4], const void* row, int site = __builtin_LINE()) { emulate_ldmatrix<4, true>(out, row, site); }
static inline void ldmatrix_x2_trans(unsigned (&out)[2], const void* row, int site = __builtin_LINE()) { emulate_ldmatrix<2, true>(out, row, site); }

// Sums as the tensor cores of the emulated architecture form them, bit for bit.
void emulate_mma_work(unsigned mask, EmulatedLane* lanes);
static inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int site = __builtin_LINE()) {
    emulate_warp(0xffffffffu, {d, {a, b}}, emulate_mma_work, site);
}

// ---- asynchronous copies ----

void emulate_cp_async(void* shared, const void* global, bool valid, int site);
void emulate_cp_async_commit();
void emulate_cp_async_wait(int pending);
static inline void cp_async16(void* shared, const void* global, bool valid, int site = __builtin_LINE()) {
    emulate_cp_async(shared, global, valid, site);
}
static inline void cp_async_commit() { emulate_cp_async_commit(); }
template <int pending>
static inline void cp_async_wait() { emulate_cp_async_wait(pending); }

// ---- numbers ----

static inline float __uint_as_float(unsigned bits) { float value; __builtin_memcpy(&value, &bits, 4); return value; }
static inline unsigned __float_as_uint(float value) { unsigned bits; __builtin_memcpy(&bits, &value, 4); return bits; }
static inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
static inline long long __double_as_longlong(double value) { long long bits; __builtin_memcpy(&bits, &value, 8); return bits; }
static inline double __longlong_as_double(long long bits) { double value; __builtin_memcpy(&value, &bits, 8); return value; }

static inline unsigned short bf16_from_f32(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline float f32_from_f16(unsigned short bits) {
    // The exponent's bias is 112 smaller; infinity and NaN keep theirs, and only they are that
    // large.
    const unsigned magnitude = (bits & 0x7fffu) << 13;
    const float value = magnitude < 0x7c00u << 13 ? __uint_as_float(magnitude) * 0x1p112f : __uint_as_float(magnitude | 0x7f800000u);
    return bits & 0x8000u ? -value : value;
}
static inline unsigned bf16x2_from_f32(float low, float high) { return (unsigned)bf16_from_f32(low) | (unsigned)bf16_from_f32(high) << 16; }

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
static inline int __clzll(long long bits) { return bits ? __builtin_clzll((unsigned long long)bits) : 64; }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

#define EMULATE_MATH1(name) \
    static inline float name##f(float v) { return __builtin_##name##f(v); } \
    static inline double name(double v) { return __builtin_##name(v); }
EMULATE_MATH1(sqrt) EMULATE_MATH1(exp) EMULATE_MATH1(exp2) EMULATE_MATH1(log) EMULATE_MATH1(log2) EMULATE_MATH1(log1p) EMULATE_MATH1(expm1)
EMULATE_MATH1(tanh) EMULATE_MATH1(sin) EMULATE_MATH1(cos) EMULATE_MATH1(fabs) EMULATE_MATH1(floor) EMULATE_MATH1(ceil) EMULATE_MATH1(rint)
static inline float rsqrtf(float v) { return 1.0f / __builtin_sqrtf(v); }
static inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
static inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
static inline double fmax(double a, double b) { return __builtin_fmax(a, b); }
static inline double fmin(double a, double b) { return __builtin_fmin(a, b); }
static inline float powf(float a, float b) { return __builtin_powf(a, b); }
static inline void sincosf(float v, float* s, float* c) { *s = __builtin_sinf(v); *c = __builtin_cosf(v); }
static inline void sincos(double v, double* s, double* c) { *s = __builtin_sin(v); *c = __builtin_cos(v); }
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float v) { return __builtin_sqrtf(v); }
static inline float __frcp_rn(float v) { return 1.0f / v; }
static inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
#undef isnan
#undef isinf
#undef isfinite
template <typename T> static inline bool isnan(T v) { return __builtin_isnan(v); }
template <typename T> static inline bool isinf(T v) { return __builtin_isinf(v); }
template <typename T> static inline bool isfinite(T v) { return __builtin_isfinite(v); }
template <typename T> static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> static inline T max(T a, T b) { return a < b ? b : a; }
template <typename T> static inline T __ldg(const T* pointer) { return *pointer; }

// ---- memory that CTAs share: two of them may run on different OS threads ----

static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() {}
template <typename T> static inline T atomicAdd(T* target, T value) { return __atomic_fetch_add(target, value, __ATOMIC_SEQ_CST); }
template <typename T> static inline T atomicSub(T* target, T value) { return __atomic_fetch_sub(target, value, __ATOMIC_SEQ_CST); }
template <typename T> static inline T atomicOr(T* target, T value) { return __atomic_fetch_or(target, value, __ATOMIC_SEQ_CST); }
template <typename T> static inline T atomicAnd(T* target, T value) { return __atomic_fetch_and(target, value, __ATOMIC_SEQ_CST); }
template <typename T> static inline T atomicExch(T* target, T value) { return __atomic_exchange_n(target, value, __ATOMIC_SEQ_CST); }
template <typename T> static inline T atomicCAS(T* target, T expected, T value) {
    __atomic_compare_exchange_n(target, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <typename T> static inline T atomicMax(T* target, T value) {
    T old = __atomic_load_n(target, __ATOMIC_SEQ_CST);
    while (old < value && !__atomic_compare_exchange_n(target, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <typename T> static inline T atomicMin(T* target, T value) {
    T old = __atomic_load_n(target, __ATOMIC_SEQ_CST);
    while (value < old && !__atomic_compare_exchange_n(target, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
// Of a counter that wraps: the old value, which becomes 0 where it was `limit`.
static inline unsigned atomicInc(unsigned* target, unsigned limit) {
    unsigned old = __atomic_load_n(target, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(target, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
