// Weights in groups of 32 along k: where the group of a column lies, and what its codes stand for.
//
// The layout is that of `src/backend/group_blocks.rs`, on every device. An (n, k) weight is a list
// of panels of 32 columns (rows of the weight), a panel one block after the other along k, a block
// the group of each of its columns:
//   8 bits   scales (32) f16 | quad q of 8: for each column four codes, k = 4 q ..
//   4 bits   scales (32) f16 | minima (32) f16 | pair of quads s of 4: for each column four bytes,
//            whose low halves are the codes of quad 2 s and whose high halves those of quad 2 s + 1
// Columns past n are zeros; so are codes past k, where x must be zero.
//
// A value is `scale * code` (8 bits) or `scale * code + min` (4 bits), rounded to the type of x: a
// product has the bits of the same product over a weight of these values.
//
// `bits` is 8, 4, or 0 for a weight of floats, row-major.
#pragma once
#include "common.cuh"

#define GROUP 32
#define BLOCK_COLUMNS 32

// Bytes of a block.
template <u32 bits>
__device__ constexpr u32 block_bytes() {
    return bits == 8 ? 2 * BLOCK_COLUMNS + GROUP * BLOCK_COLUMNS : 4 * BLOCK_COLUMNS + GROUP * BLOCK_COLUMNS / 2;
}

__device__ __forceinline__ u32 num_groups(u32 k) { return (k + GROUP - 1) / GROUP; }

// Weight `index` of several (n, k) of x's type T, one behind the other.
template <typename T, u32 bits>
__device__ __forceinline__ const u8* weight_at(const void* weights, u32 index, u32 n, u32 k) {
    const u64 bytes = bits == 0 ? (u64)n * k * sizeof(T) : (u64)((n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS) * num_groups(k) * block_bytes<bits>();
    return (const u8*)weights + index * bytes;
}

struct Scale {
    float scale, min;
};

// Of a column of a block.
template <u32 bits>
__device__ __forceinline__ Scale scale_of(const u8* block, u32 column) {
    const u16* halves = (const u16*)block;
    return Scale{f32_from_f16(halves[column]), bits == 4 ? f32_from_f16(halves[BLOCK_COLUMNS + column]) : 0.0f};
}

// The codes of k = 4 quad .. of a column, a byte each; of 8 bits they are 128 too large.
template <u32 bits>
__device__ __forceinline__ u32 quad_codes(const u8* block, u32 column, u32 quad) {
    if constexpr (bits == 8) {
        return ((const u32*)(block + 2 * BLOCK_COLUMNS))[quad * BLOCK_COLUMNS + column] ^ 0x80808080u;
    } else {
        return ((const u32*)(block + 4 * BLOCK_COLUMNS))[quad / 2 * BLOCK_COLUMNS + column] >> quad % 2 * 4 & 0x0f0f0f0fu;
    }
}

// What the code in the lowest byte stands for. Below the exponent of 2^23 a code is a float that
// much larger: one subtraction, where a conversion runs at a quarter of its rate. The product is
// exact (11 bits by 8), so that one rounding is left, fused or not.
template <u32 bits>
__device__ __forceinline__ float value_of(u32 codes, const Scale& s) {
    const float code = __uint_as_float((codes & 0xffu) | 0x4b000000u) - (bits == 8 ? 8388736.0f : 8388608.0f);
    return bits == 8 ? s.scale * code : fmaf(s.scale, code, s.min);
}

// As a T holds it.
__device__ __forceinline__ float rounded(float value, const float*) { return value; }
__device__ __forceinline__ float rounded(float value, const u16*) { return f32_from_bf16(bf16_from_f32(value)); }

// A row of an (n, k) weight, whose values are of type T.
template <typename T, u32 bits>
struct WeightRow {
    const u8* at;  // the row, or its panel
    u32 column;    // of the panel
};

template <typename T, u32 bits>
__device__ __forceinline__ WeightRow<T, bits> weight_row(const void* weight, u32 row, u32 k) {
    if constexpr (bits == 0) return WeightRow<T, bits>{(const u8*)weight + (u64)row * k * sizeof(T), 0};
    return WeightRow<T, bits>{(const u8*)weight + (u64)(row / BLOCK_COLUMNS) * num_groups(k) * block_bytes<bits>(), row % BLOCK_COLUMNS};
}

// Whether `quad_at` may be called where k is a multiple of four.
template <typename T, u32 bits>
__device__ __forceinline__ bool has_quads(const WeightRow<T, bits>& row) {
    return bits != 0 || (u64)row.at % (4 * sizeof(T)) == 0;
}

// Values k .. k + 3, k a multiple of four.
template <typename T, u32 bits>
__device__ __forceinline__ float4 quad_at(const WeightRow<T, bits>& row, u32 k) {
    if constexpr (bits == 0) {
        return load4((const T*)row.at + k);
    } else {
        const u8* block = row.at + (u64)(k / GROUP) * block_bytes<bits>();
        const Scale s = scale_of<bits>(block, row.column);
        const u32 codes = quad_codes<bits>(block, row.column, k % GROUP / 4);
        const T* type = 0;
        return make_float4(rounded(value_of<bits>(codes, s), type), rounded(value_of<bits>(codes >> 8, s), type),
                           rounded(value_of<bits>(codes >> 16, s), type), rounded(value_of<bits>(codes >> 24, s), type));
    }
}

template <typename T, u32 bits>
__device__ __forceinline__ float value_at(const WeightRow<T, bits>& row, u32 k) {
    if constexpr (bits == 0) {
        return load1((const T*)row.at + k);
    } else {
        const u8* block = row.at + (u64)(k / GROUP) * block_bytes<bits>();
        const u32 codes = quad_codes<bits>(block, row.column, k % GROUP / 4) >> k % 4 * 8;
        return rounded(value_of<bits>(codes, scale_of<bits>(block, row.column)), (const T*)0);
    }
}
