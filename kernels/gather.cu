// gather: out[r, :] = x[rows[r], :] for `count` rows, from and to f32 or bf16; without `rows`, row
// r itself: a cast.
//
// Layout: one flat line of quads (four elements; the last of a row may be shorter), a thread per
// quad: short rows share a CTA, long ones spread over several. Vectors where rows are aligned for
// them.
// The launcher keeps the number of quads, rounded up to whole CTAs, within 32 bits.
// Cost: reads and writes count * width elements once; bound by memory. Between equal types the bits
// are copied unchanged.
#include "common.cuh"

struct GatherParams {
    const u32* rows;  // (count) rows of x, or null: row r
    const void* x;    // (.., width) f32 or bf16
    void* out;        // (count, width) f32 or bf16
    u32 count;
    u32 width;
};
FIELD(GatherParams, rows, 0);
FIELD(GatherParams, x, 8);
FIELD(GatherParams, out, 16);
FIELD(GatherParams, count, 24);
FIELD(GatherParams, width, 28);
LAYOUT(GatherParams, 32);

// Bits of a type as bits of another.
__device__ __forceinline__ void convert(u32* to, u32 from) { *to = from; }
__device__ __forceinline__ void convert(u16* to, u16 from) { *to = from; }
__device__ __forceinline__ void convert(u16* to, u32 from) { *to = bf16_from_f32(__uint_as_float(from)); }
__device__ __forceinline__ void convert(u32* to, u16 from) { *to = (u32)from << 16; }

// Four elements of one type as one access.
struct alignas(16) Words {
    u32 at[4];
};
struct alignas(8) Halves {
    u16 at[4];
};
template <typename T>
struct QuadOf;
template <>
struct QuadOf<u32> {
    typedef Words Quad;
};
template <>
struct QuadOf<u16> {
    typedef Halves Quad;
};

template <typename From, typename To>
__device__ __forceinline__ void gather_quad(const GatherParams& p) {
    typedef typename QuadOf<From>::Quad FromQuad;
    typedef typename QuadOf<To>::Quad ToQuad;
    const u32 quads = (p.width + 3) / 4;
    const u32 quad = blockIdx.x * THREADS + threadIdx.x;
    const u32 row = quad / quads;
    const u32 col = quad % quads * 4;
    if (row >= p.count) return;
    const From* from = (const From*)p.x + (u64)(p.rows ? p.rows[row] : row) * p.width + col;
    To* to = (To*)p.out + (u64)row * p.width + col;
    if (p.width % 4 == 0 && (u64)from % sizeof(FromQuad) == 0 && (u64)to % sizeof(ToQuad) == 0) {
        const FromQuad in = *(const FromQuad*)from;
        ToQuad out;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) convert(out.at + i, in.at[i]);
        *(ToQuad*)to = out;
        return;
    }
    for (u32 i = 0; i < 4 && col + i < p.width; ++i) convert(to + i, from[i]);
}

KERNEL(gather_f32_f32, GatherParams) { gather_quad<u32, u32>(p); }
KERNEL(gather_bf16_bf16, GatherParams) { gather_quad<u16, u16>(p); }
KERNEL(gather_f32_bf16, GatherParams) { gather_quad<u32, u16>(p); }
KERNEL(gather_bf16_f32, GatherParams) { gather_quad<u16, u32>(p); }
