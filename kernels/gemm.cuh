// The matrix product of the project: a CTA computes a tile of out[r, c] = sum over k of x[r, k]
// w[c, k], both operands K-major, and keeps it in registers. `linear` stores it, `sample` reduces
// it without storing it. The weight is of x's type, or in groups (`groups.cuh`), whose values are
// rounded to x's type on their way to the same multiplications.
//
// The order of additions of an element, the same for every tile shape, element type, kind of weight
// and number of rows:
//   K is cut at multiples of K_SEGMENT = 256. Inside a segment a sum starts from zero and takes k
//   in ascending order: 16 at a time by mma_m16n8k16 (bf16), one at a time by fmaf (f32). The sums
//   of the segments are added in ascending order, starting from 0.0f.
// The weight is the first operand of the tensor core (16 columns of out) and x the second (8 rows),
// for every tile: the two sides never trade places, so that nothing rests on the machine treating
// them alike, and the fewest rows of a tile are eight.
// Rows at or beyond `rows`, columns at or beyond `cols` and k at or beyond `depth` enter as zeros
// and are never read.
//
// How to use it:
//   typedef ProductTile<T, bits, rows, cols, col_warps, stages> Tile;
//       T, of x, is float or u16 (bf16); bits are those of a code of the weight, 0 where it is of T
//   Tile::Sums total; clear<Tile>(total);
//   product<Tile>(operands<Tile>(..), row0, col0, 0, num_segments(depth), shared,
//                 [&](u32 segment, Tile::Sums& sums) { accumulate<Tile>(total, sums); });
// `shared` is Tile::shared_bytes of dynamic shared memory, free before the call and free again
// after it. All THREADS take part;
// row0 and col0 are the same for all. Afterwards total[c][r][e] of this thread is the element
//   row  row0 + tile_row<Tile>(r, e)     of rows     warp part + 8 r + 2 (lane % 4) + e % 2
//   col  col0 + tile_col<Tile>(c, e)     of columns  warp part + 16 c + lane / 4 + 8 (e / 2)
// for c < Tile::col_tiles, r < Tile::row_tiles, e < 4; it does not depend on T. Lanes that differ
// in lane / 4 only hold other columns of the same rows, so a reduction over the columns of a row
// is: c and e / 2 in the thread, xor 4, 8, 16 in the warp, then the warps with the same tile_row.
// `lay_out` writes the tile to shared memory as plain rows instead.
//
// Shared memory: `stages` stages of 128 bytes of K for each row of both operands; a row's eight
// 16-byte pieces are permuted by piece ^ (row % 8), so that the eight rows of an 8 x 8 matrix lie
// in different banks. cp.async fills stage s + stages - 1 while stage s is multiplied. Operands
// that are not aligned to 16 bytes (or whose rows are not) are copied element by element: slow,
// uniform, the same sums.
// Of a weight in groups a stage holds the blocks as they lie in memory, 40 or 68 bytes a column in
// place of 128. Where each column belongs to one warp, its lanes turn the codes that they multiply
// into bf16 in registers; where several warps share a column, the CTA turns a stage's codes into
// the layout above once, in an area behind the stages.
#pragma once
#include "groups.cuh"

#define K_SEGMENT 256
#define STAGE_ROW 128  // bytes of a row in a stage

// `col_warps_` of the CTA's warps lie side by side along the columns, the others along the rows.
template <typename T_, u32 bits_, u32 rows_, u32 cols_, u32 col_warps_, u32 stages_>
struct ProductTile {
    typedef T_ T;
    static constexpr u32 bits = bits_;
    static constexpr u32 rows = rows_, cols = cols_, col_warps = col_warps_, stages = stages_;
    static constexpr u32 row_warps = WARPS / col_warps;
    static constexpr u32 col_tiles = cols / col_warps / 16;  // of a warp
    static constexpr u32 row_tiles = rows / row_warps / 8;
    static constexpr u32 piece = 16 / sizeof(T);                // elements
    static constexpr u32 block_depth = STAGE_ROW / sizeof(T);  // k of a stage
    static constexpr u32 segment_blocks = K_SEGMENT / block_depth;
    static constexpr bool in_registers = bits != 0 && sizeof(T) == 2 && row_warps == 1;
    static constexpr bool widens = bits != 0 && !in_registers;
    static constexpr u32 panel_bytes = block_depth / GROUP * block_bytes<bits>();  // of a stage
    static constexpr u32 weight_bytes = bits == 0 ? cols * STAGE_ROW : cols / BLOCK_COLUMNS * panel_bytes;
    static constexpr u32 stage_bytes = (rows * STAGE_ROW + weight_bytes + 127) / 128 * 128;
    static constexpr u32 shared_bytes = stages * stage_bytes + (widens ? cols * STAGE_ROW : 0);
    static constexpr u32 laid_out_stride = cols + 4;  // floats; 4 more than whole bank rows: see `lay_out`
    typedef float Sums[col_tiles][row_tiles][4];

    static_assert(col_warps * row_warps == WARPS, "warps cover the tile");
    static_assert(col_tiles * col_warps * 16 == cols && row_tiles * row_warps * 8 == rows, "warps hold whole matrices");
    static_assert(cols % BLOCK_COLUMNS == 0, "whole panels of a weight in groups");
    static_assert(stages >= 2, "one stage is filled while another is multiplied");
    static_assert(rows * laid_out_stride * 4 <= shared_bytes, "the tile fits where its operands were");
};

template <typename T>
struct Operands {
    const T* x;      // (rows, depth)
    const void* w;   // (cols, depth)
    u32 rows, cols, depth;
    bool aligned;  // every row of x, and of a weight of floats, starts at a multiple of 16 bytes
};

template <typename Tile>
__device__ __forceinline__ Operands<typename Tile::T> operands(const void* x, const void* w, u32 rows, u32 cols, u32 depth) {
    typedef typename Tile::T T;
    const bool aligned = (u64)x % 16 == 0 && (Tile::bits != 0 || (u64)w % 16 == 0) && depth * sizeof(T) % 16 == 0;
    return Operands<T>{(const T*)x, w, rows, cols, depth, aligned};
}

__device__ __forceinline__ u32 num_segments(u32 depth) { return (depth + K_SEGMENT - 1) / K_SEGMENT; }

// ---- which element a register holds ----

template <typename Tile>
__device__ __forceinline__ u32 warp_row() {
    return warp_id() / Tile::col_warps * (Tile::row_tiles * 8);
}
template <typename Tile>
__device__ __forceinline__ u32 warp_col() {
    return warp_id() % Tile::col_warps * (Tile::col_tiles * 16);
}
template <typename Tile>
__device__ __forceinline__ u32 tile_row(u32 r, u32 e) {
    return warp_row<Tile>() + r * 8 + lane_id() % 4 * 2 + e % 2;
}
template <typename Tile>
__device__ __forceinline__ u32 tile_col(u32 c, u32 e) {
    return warp_col<Tile>() + c * 16 + lane_id() / 4 + e / 2 * 8;
}

template <typename Tile>
__device__ __forceinline__ void clear(typename Tile::Sums& sums) {
#pragma unroll
    for (u32 i = 0; i < sizeof(sums) / 4; ++i) (&sums[0][0][0])[i] = 0.0f;
}

// total += sums.
template <typename Tile>
__device__ __forceinline__ void accumulate(typename Tile::Sums& total, const typename Tile::Sums& sums) {
#pragma unroll
    for (u32 i = 0; i < sizeof(sums) / 4; ++i) (&total[0][0][0])[i] += (&sums[0][0][0])[i];
}

// Writes the tile to shared memory as (rows, laid_out_stride) floats; a barrier must follow. The
// stride makes the four rows of a store start eight banks apart, so that its 32 words lie in 32
// banks.
template <typename Tile>
__device__ __forceinline__ void lay_out(const typename Tile::Sums& total, float* to) {
#pragma unroll
    for (u32 c = 0; c < Tile::col_tiles; ++c) {
#pragma unroll
        for (u32 r = 0; r < Tile::row_tiles; ++r) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) to[tile_row<Tile>(r, e) * Tile::laid_out_stride + tile_col<Tile>(c, e)] = total[c][r][e];
        }
    }
}

// ---- filling a stage ----

// Where piece `piece` of row `row` of an operand's part of a stage lies.
__device__ __forceinline__ u8* piece_at(u8* part, u32 row, u32 piece) { return part + row * STAGE_ROW + ((piece ^ (row % 8)) * 16); }

// Rows [first, first + count) of one operand, k from `k0` on.
template <typename Tile, u32 count>
__device__ __forceinline__ void fill_part(const typename Tile::T* source, u32 first, u32 rows, u32 depth, u32 k0, bool aligned, u8* part) {
    typedef typename Tile::T T;
    if (aligned) {
        constexpr u32 at_once = THREADS / 8;  // rows
        const u32 piece = threadIdx.x % 8;
        const u32 k = k0 + piece * Tile::piece;
        const u32 local = threadIdx.x / 8;
        const T* from = source + (u64)(first + local) * depth + k;
#pragma unroll
        for (u32 i = 0; i < count; i += at_once) {
            if (count % at_once != 0 && i + local >= count) break;
            const bool valid = first + local + i < rows && k < depth;
            cp_async16(piece_at(part, local + i, piece), valid ? from + (u64)i * depth : source, valid);
        }
        return;
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count * Tile::block_depth; i += THREADS) {
        const u32 local = i / Tile::block_depth;
        const u32 within = i % Tile::block_depth;
        const u32 k = k0 + within;
        const bool valid = first + local < rows && k < depth;
        T* to = (T*)piece_at(part, local, within / Tile::piece) + within % Tile::piece;
        *to = valid ? source[(u64)(first + local) * depth + k] : (T)0;
    }
}

// The blocks of columns [col0, col0 + cols) and of a stage's k from block `first` on; zeros where
// there are none. `col0` is a multiple of BLOCK_COLUMNS.
template <typename Tile>
__device__ __forceinline__ void fill_blocks(const void* weight, u32 col0, u32 cols, u32 depth, u32 first, u8* part) {
    constexpr u32 pieces = Tile::panel_bytes / 16;
    const u32 groups = num_groups(depth);
    const u8* from = (const u8*)weight + ((u64)(col0 / BLOCK_COLUMNS) * groups + first) * block_bytes<Tile::bits>();
#pragma unroll
    for (u32 i = threadIdx.x; i < Tile::cols / BLOCK_COLUMNS * pieces; i += THREADS) {
        const u32 panel = i / pieces, at = i % pieces * 16;
        const bool valid = col0 + panel * BLOCK_COLUMNS < cols && first + at / block_bytes<Tile::bits>() < groups;
        cp_async16(part + panel * Tile::panel_bytes + at, valid ? from + (u64)panel * groups * block_bytes<Tile::bits>() + at : weight, valid);
    }
}

// ---- codes to values ----

// Where the group of a column of the tile lies in a stage; `half` is its number along k.
template <typename Tile>
__device__ __forceinline__ const u8* block_at(const u8* blocks, u32 col, u32 half) {
    return blocks + col / BLOCK_COLUMNS * Tile::panel_bytes + half * block_bytes<Tile::bits>();
}

// Two neighbouring values, from the byte `shift` bits up the codes of a quad on.
template <typename Tile>
__device__ __forceinline__ unsigned value_pair(const u8* block, u32 col, u32 quad, u32 shift, const Scale& s) {
    const u32 codes = quad_codes<Tile::bits>(block, col % BLOCK_COLUMNS, quad) >> shift;
    return bf16x2_from_f32(value_of<Tile::bits>(codes, s), value_of<Tile::bits>(codes >> 8, s));
}

// A stage's blocks as rows of values. A thread makes 16 bytes at a time: neighbouring lanes read
// neighbouring words, and the eight of a store reach all banks. Not unrolled: the sums of the tile
// take the registers.
template <typename Tile>
__device__ __forceinline__ void widen(const u8* blocks, u8* w) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < Tile::cols * 8; i += THREADS) {
        const u32 col = i % Tile::cols, piece = i / Tile::cols;
        const u32 k = piece * Tile::piece;
        const u8* block = block_at<Tile>(blocks, col, k / GROUP);
        const Scale s = scale_of<Tile::bits>(block, col % BLOCK_COLUMNS);
        const u32 quad = k % GROUP / 4;
        uint4 values;
        if constexpr (sizeof(typename Tile::T) == 4) {
            const u32 codes = quad_codes<Tile::bits>(block, col % BLOCK_COLUMNS, quad);
            values = make_uint4(__float_as_uint(value_of<Tile::bits>(codes, s)), __float_as_uint(value_of<Tile::bits>(codes >> 8, s)),
                                __float_as_uint(value_of<Tile::bits>(codes >> 16, s)), __float_as_uint(value_of<Tile::bits>(codes >> 24, s)));
        } else {
            values = make_uint4(value_pair<Tile>(block, col, quad, 0, s), value_pair<Tile>(block, col, quad, 16, s),
                                value_pair<Tile>(block, col, quad + 1, 0, s), value_pair<Tile>(block, col, quad + 1, 16, s));
        }
        *(uint4*)piece_at(w, col, piece) = values;
    }
}

// ---- multiplying a stage: sums += x w over its k, ascending ----

// bf16.
template <typename Tile>
__device__ __forceinline__ void multiply(u8* x, u8* w, typename Tile::Sums& sums, const u16*) {
    const u32 lane = lane_id();
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {  // 32 k: four 8 x 8 matrices of each eight rows of x
        unsigned b[Tile::row_tiles][4];
#pragma unroll
        for (u32 r = 0; r < Tile::row_tiles; ++r) ldmatrix_x4(b[r], piece_at(x, warp_row<Tile>() + r * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
        for (u32 step = 0; step < 2; ++step) {  // 16 k
            unsigned a[Tile::col_tiles][4];
#pragma unroll
            for (u32 c = 0; c < Tile::col_tiles; ++c) {
                ldmatrix_x4(a[c], piece_at(w, warp_col<Tile>() + c * 16 + lane % 16, half * 4 + step * 2 + lane / 16));
            }
#pragma unroll
            for (u32 c = 0; c < Tile::col_tiles; ++c) {
#pragma unroll
                for (u32 r = 0; r < Tile::row_tiles; ++r) {
                    const unsigned pair[2] = {b[r][2 * step], b[r][2 * step + 1]};
                    mma_m16n8k16(sums[c][r], a[c], pair);
                }
            }
        }
    }
}

// bf16 with a weight in groups: the same, the weight's matrices from codes. Of the 16 k of a step a
// lane multiplies 2 t, 2 t + 1 and eight more than those, t = lane % 4: one half of a quad each.
template <typename Tile>
__device__ __forceinline__ void multiply_blocks(u8* x, const u8* blocks, typename Tile::Sums& sums) {
    const u32 lane = lane_id();
    const u32 shift = lane % 2 * 16;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        unsigned b[Tile::row_tiles][4];
#pragma unroll
        for (u32 r = 0; r < Tile::row_tiles; ++r) ldmatrix_x4(b[r], piece_at(x, warp_row<Tile>() + r * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
        for (u32 c = 0; c < Tile::col_tiles; ++c) {
            const u32 col = warp_col<Tile>() + c * 16 + lane / 4;
            const u8* block = block_at<Tile>(blocks, col, half);
            const Scale low = scale_of<Tile::bits>(block, col % BLOCK_COLUMNS), high = scale_of<Tile::bits>(block, col % BLOCK_COLUMNS + 8);
#pragma unroll
            for (u32 step = 0; step < 2; ++step) {
                const u32 quad = step * 4 + lane % 4 / 2;
                const unsigned a[4] = {value_pair<Tile>(block, col, quad, shift, low), value_pair<Tile>(block, col + 8, quad, shift, high),
                                       value_pair<Tile>(block, col, quad + 2, shift, low), value_pair<Tile>(block, col + 8, quad + 2, shift, high)};
#pragma unroll
                for (u32 r = 0; r < Tile::row_tiles; ++r) {
                    const unsigned pair[2] = {b[r][2 * step], b[r][2 * step + 1]};
                    mma_m16n8k16(sums[c][r], a, pair);
                }
            }
        }
    }
}

// f32: the registers hold the same elements as above.
template <typename Tile>
__device__ __forceinline__ void multiply(u8* x, u8* w, typename Tile::Sums& sums, const float*) {
#pragma unroll 1
    for (u32 piece = 0; piece < 8; ++piece) {
        float4 a[Tile::col_tiles][2];
#pragma unroll
        for (u32 c = 0; c < Tile::col_tiles; ++c) {
            a[c][0] = *(const float4*)piece_at(w, tile_col<Tile>(c, 0), piece);
            a[c][1] = *(const float4*)piece_at(w, tile_col<Tile>(c, 2), piece);
        }
#pragma unroll
        for (u32 r = 0; r < Tile::row_tiles; ++r) {
#pragma unroll
            for (u32 odd = 0; odd < 2; ++odd) {
                const float4 b = *(const float4*)piece_at(x, tile_row<Tile>(r, odd), piece);
#pragma unroll
                for (u32 c = 0; c < Tile::col_tiles; ++c) {
#pragma unroll
                    for (u32 far = 0; far < 2; ++far) {
                        float sum = sums[c][r][2 * far + odd];
                        sum = fmaf(a[c][far].x, b.x, sum);
                        sum = fmaf(a[c][far].y, b.y, sum);
                        sum = fmaf(a[c][far].z, b.z, sum);
                        sums[c][r][2 * far + odd] = fmaf(a[c][far].w, b.w, sum);
                    }
                }
            }
        }
    }
}

// ---- the product ----

// Segments [first, last) of the tile at (row0, col0): calls on_segment(segment, sums) at the end of
// each, in ascending order. The sums are the caller's to change. Ends with a barrier.
template <typename Tile, typename OnSegment>
__device__ __forceinline__ void product(const Operands<typename Tile::T>& in, u32 row0, u32 col0, u32 first, u32 last, u8* shared,
                                        OnSegment on_segment) {
    const u32 all_blocks = (in.depth + Tile::block_depth - 1) / Tile::block_depth;
    const u32 end = last * Tile::segment_blocks < all_blocks ? last * Tile::segment_blocks : all_blocks;
    u32 block = first * Tile::segment_blocks;
    // A group is closed for every block, also where there is none left to load, so that the count
    // of pending groups is always the same.
    const auto fill = [&](u32 b, u32 slot) {
        if (b < end) {
            u8* stage = shared + slot * Tile::stage_bytes;
            fill_part<Tile, Tile::rows>(in.x, row0, in.rows, in.depth, b * Tile::block_depth, in.aligned, stage);
            u8* part = stage + Tile::rows * STAGE_ROW;
            if constexpr (Tile::bits == 0) {
                fill_part<Tile, Tile::cols>((const typename Tile::T*)in.w, col0, in.cols, in.depth, b * Tile::block_depth, in.aligned, part);
            } else {
                fill_blocks<Tile>(in.w, col0, in.cols, in.depth, b * (Tile::block_depth / GROUP), part);
            }
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (u32 ahead = 0; ahead + 1 < Tile::stages; ++ahead) fill(block + ahead, ahead);
    u32 slot = 0;
    for (u32 segment = first; segment < last; ++segment) {
        typename Tile::Sums sums;
        clear<Tile>(sums);
        const u32 segment_end = (segment + 1) * Tile::segment_blocks < end ? (segment + 1) * Tile::segment_blocks : end;
#pragma unroll 1
        for (; block < segment_end; ++block) {
            cp_async_wait<(int)Tile::stages - 2>();
            __syncthreads();  // this block has arrived for all, and all have left the slot that is filled next
            fill(block + Tile::stages - 1, slot == 0 ? Tile::stages - 1 : slot - 1);
            u8* stage = shared + slot * Tile::stage_bytes;
            u8* w = stage + Tile::rows * STAGE_ROW;
            if constexpr (Tile::in_registers) {
                multiply_blocks<Tile>(stage, w, sums);
            } else {
                if constexpr (Tile::widens) {
                    u8* area = shared + Tile::stages * Tile::stage_bytes;
                    widen<Tile>(w, area);
                    __syncthreads();  // the values of this block are there for all
                    w = area;
                }
                multiply<Tile>(stage, w, sums, (const typename Tile::T*)0);
            }
            slot = slot + 1 == Tile::stages ? 0 : slot + 1;
        }
        on_segment(segment, sums);
    }
    __syncthreads();  // `shared` is the caller's again
}
