// norm: out[r, :] = normalised x[r, :] * weight + bias, after x[r, :] += residual[r, :] where there
// is one.
// - norm_layer: (x - mean) / sqrt(var + eps), biased variance
// - norm_rms: x / sqrt(mean(x^2) + eps)
//
// Layout: one CTA per row; thread i computes the four columns from 4 i, from 4 (i + THREADS) and so
// on, whether or not the row is aligned for vectors, so that alignment never changes a sum. Its
// first KEPT quads stay in registers: a row of up to 4 KEPT THREADS columns is read once, a longer
// one again from L1. Sums are in f32: in the thread by ascending column, then warp shuffles, then
// one word per warp.
// The mean is subtracted before squaring: the one-pass form E[x^2] - E[x]^2 loses all digits on
// rows with a large mean.
// Cost: one read of x (and of residual, and a write of x), one write of out; four barriers (rms:
// two); bound by memory.
// `bias` may be null; it carries a folded shift. `out` may be `x` itself where both are f32: a
// column belongs to one thread.
#include "common.cuh"

#define KEPT 4

struct NormParams {
    float* x;               // (rows, width); written where there is a residual
    const float* residual;  // (rows, width) or null
    const float* weight;    // (width)
    const float* bias;      // (width) or null
    void* out;              // (rows, width) f32 or bf16
    u32 width;
    float eps;
};
FIELD(NormParams, x, 0);
FIELD(NormParams, residual, 8);
FIELD(NormParams, weight, 16);
FIELD(NormParams, bias, 24);
FIELD(NormParams, out, 32);
FIELD(NormParams, width, 40);
FIELD(NormParams, eps, 44);
LAYOUT(NormParams, 48);

// Four columns; those past the end are zeros.
__device__ __forceinline__ float4 load_quad(const float* row, u32 col, u32 width, bool wide) {
    if (wide) return load4(row + col);
    return make_float4(row[col], col + 1 < width ? row[col + 1] : 0.0f, col + 2 < width ? row[col + 2] : 0.0f,
                       col + 3 < width ? row[col + 3] : 0.0f);
}

template <typename T>
__device__ __forceinline__ void store_quad(T* row, u32 col, u32 width, bool wide, float4 v) {
    if (wide) {
        store4(row + col, v);
        return;
    }
    store1(row + col, v.x);
    if (col + 1 < width) store1(row + col + 1, v.y);
    if (col + 2 < width) store1(row + col + 2, v.z);
    if (col + 3 < width) store1(row + col + 3, v.w);
}

// sum + (v - mean)^2 over the columns before the end.
__device__ __forceinline__ float add_squares(float sum, float4 v, float mean, u32 col, u32 width) {
    sum = fmaf(v.x - mean, v.x - mean, sum);
    if (col + 1 < width) sum = fmaf(v.y - mean, v.y - mean, sum);
    if (col + 2 < width) sum = fmaf(v.z - mean, v.z - mean, sum);
    if (col + 3 < width) sum = fmaf(v.w - mean, v.w - mean, sum);
    return sum;
}

template <bool layer, typename Out>
__device__ __forceinline__ void norm_row(const NormParams& p) {
    const u64 offset = (u64)blockIdx.x * p.width;
    float* x = p.x + offset;
    const float* residual = p.residual ? p.residual + offset : (const float*)0;
    Out* out = (Out*)p.out + offset;
    const u64 addresses = (u64)p.x | (u64)p.residual | (u64)p.weight | (u64)p.bias | (u64)p.out * (sizeof(float) / sizeof(Out));
    const bool wide = p.width % 4 == 0 && addresses % 16 == 0;
    constexpr u32 stride = 4 * THREADS;

    // The first visit: the residual is added and written back.
    const auto read = [&](u32 col) {
        float4 v = load_quad(x, col, p.width, wide);
        if (residual) {
            const float4 more = load_quad(residual, col, p.width, wide);
            v = make_float4(v.x + more.x, v.y + more.y, v.z + more.z, v.w + more.w);
            store_quad(x, col, p.width, wide, v);
        }
        return v;
    };
    float4 kept[KEPT];
    float sum = 0.0f;
    const auto add = [&](float4 v, u32 col) { sum = layer ? sum + v.x + v.y + v.z + v.w : add_squares(sum, v, 0.0f, col, p.width); };
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 col = 4 * threadIdx.x + i * stride;
        kept[i] = col < p.width ? read(col) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (col < p.width) add(kept[i], col);
    }
    for (u32 col = 4 * threadIdx.x + KEPT * stride; col < p.width; col += stride) add(read(col), col);
    const float average = block_sum(sum) / (float)p.width;

    float mean = 0.0f;
    float variance = average;
    if (layer) {
        mean = average;
        float squares = 0.0f;
#pragma unroll
        for (u32 i = 0; i < KEPT; ++i) {
            const u32 col = 4 * threadIdx.x + i * stride;
            if (col < p.width) squares = add_squares(squares, kept[i], mean, col, p.width);
        }
        for (u32 col = 4 * threadIdx.x + KEPT * stride; col < p.width; col += stride) {
            squares = add_squares(squares, load_quad(x, col, p.width, wide), mean, col, p.width);
        }
        variance = block_sum(squares) / (float)p.width;
    }
    const float scale = 1.0f / sqrtf(variance + p.eps);

    const auto write = [&](float4 v, u32 col) {
        const float4 weight = load_quad(p.weight, col, p.width, wide);
        const float4 shift = p.bias ? load_quad(p.bias, col, p.width, wide) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        v = make_float4(fmaf((v.x - mean) * scale, weight.x, shift.x), fmaf((v.y - mean) * scale, weight.y, shift.y),
                        fmaf((v.z - mean) * scale, weight.z, shift.z), fmaf((v.w - mean) * scale, weight.w, shift.w));
        store_quad(out, col, p.width, wide, v);
    };
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 col = 4 * threadIdx.x + i * stride;
        if (col < p.width) write(kept[i], col);
    }
    for (u32 col = 4 * threadIdx.x + KEPT * stride; col < p.width; col += stride) write(load_quad(x, col, p.width, wide), col);
}

KERNEL(norm_layer_f32, NormParams) { norm_row<true, float>(p); }
KERNEL(norm_layer_bf16, NormParams) { norm_row<true, u16>(p); }
KERNEL(norm_rms_f32, NormParams) { norm_row<false, float>(p); }
KERNEL(norm_rms_bf16, NormParams) { norm_row<false, u16>(p); }
