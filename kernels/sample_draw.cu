// sample_draw: the sampled token of a row of route A from its tiles, as `sampling::sample_row`
// specifies.
//
// Second kernel of route A. Maximum, mass and moment of the tiles are joined in f64. A draw is an
// inverse CDF over ascending ids on four levels: groups of 32 tiles, tiles, pieces of 32 ids, ids.
// Only the logits of that last piece are needed, and they are computed again, by the product of
// `gemm.cuh` with this one row: the same bits as in `sample_tiles`. So is the one logit of a forced
// token. Temperature 0 needs none.
// Should the rounding of a sum leave the target past the last part of a level, its last part with
// any mass is chosen.
//
// Layout: one CTA of two warps per row. Every sum has a fixed order: tiles of a group in a
// butterfly, groups ascending, parts of the walk ascending.
// Cost: 32 bytes per tile read twice, 32 k weights (48 KiB for k = 768 in bf16, mostly from L2);
// bound by latency.
#include "sample.cuh"
#include "gemm.cuh"

struct SampleDrawParams {
    const void* hidden;         // (rows, k) f32 or bf16
    const void* head;           // (vocab, k), the same type or blocks
    const float* bias;          // (vocab) or null
    const u32* banned;          // a bit for every id, or null
    const DrawRecord* draws;    // (rows)
    const TileRecord* tiles;    // (rows, ceil(vocab / IDS))
    SampledRecord* sampled;  // (rows) out, for the rows of route A
    u32 vocab;                  // at most MAX_GROUPS * 32 * IDS
    u32 k;
};
FIELD(SampleDrawParams, hidden, 0);
FIELD(SampleDrawParams, head, 8);
FIELD(SampleDrawParams, bias, 16);
FIELD(SampleDrawParams, banned, 24);
FIELD(SampleDrawParams, draws, 32);
FIELD(SampleDrawParams, tiles, 40);
FIELD(SampleDrawParams, sampled, 48);
FIELD(SampleDrawParams, vocab, 56);
FIELD(SampleDrawParams, k, 60);
LAYOUT(SampleDrawParams, 64);

static_assert(THREADS == 64, "two warps side by side along the 32 ids of a piece");
#define STAGES 5
// CTAs of a multiprocessor that fit into shared memory. Without this bound the assembler aims at
// more and spills.
#define RESIDENT 6

// A step of the inverse CDF: `before` is the mass of everything lower, `at` the part in which it
// exceeds the target.
struct Walk {
    double target, before;
    u32 at;
    bool found;
};

// Takes part `at` of mass `mass`, unless an earlier one was chosen. Parts come in ascending order.
__device__ __forceinline__ void pass(Walk& walk, u32 at, double mass) {
    if (walk.found || !(mass > 0.0)) return;
    walk.at = at;
    walk.found = walk.before + mass > walk.target;
    if (!walk.found) walk.before += mass;
}

// Goes inside the part found, whose own parts follow. A target that no part exceeded goes out of
// reach: the last part of each level is taken.
__device__ __forceinline__ u32 enter(Walk& walk) {
    if (!walk.found) walk.target = (double)infinity();
    walk.found = false;
    return walk.at;
}

// exp((tile_max - max) / temperature). The inverse of an f32, subnormal or not, is a finite f64.
__device__ __forceinline__ double weight_of(float tile_max, float max, double inverse_temperature) {
    return exp(((double)tile_max - (double)max) * inverse_temperature);
}

// Mass of a tile at the draw's temperature, relative to the row's maximum.
__device__ __forceinline__ double choice_mass(const TileRecord& t, float max, double inverse_temperature) {
    if (t.max == -infinity()) return 0.0;
    double mass = 0.0;
    for (u32 i = 0; i < PIECES; ++i) mass += (double)t.choice[i];
    return mass * weight_of(t.max, max, inverse_temperature);
}

// The logits of a piece of ids, of one row: written to shared memory, -inf beyond the vocabulary
// and where banned.
template <typename T>
__device__ __forceinline__ const float* piece_logits(const SampleDrawParams& p, u32 piece, u8* shared) {
    typedef ProductTile<T, GROUP_BITS, 8, PIECE_IDS, 2, STAGES> Tile;
    typename Tile::Sums total;
    clear<Tile>(total);
    const T* row = (const T*)p.hidden + (u64)blockIdx.x * p.k;
    product<Tile>(operands<Tile>(row, p.head, 1, p.vocab, p.k), 0, piece * PIECE_IDS, 0, num_segments(p.k), shared,
                  [&](u32, typename Tile::Sums& sums) { accumulate<Tile>(total, sums); });
    float* logits = (float*)shared;
    lay_out<Tile>(total, logits);
    __syncthreads();
    if (threadIdx.x < PIECE_IDS) {
        const u32 id = piece * PIECE_IDS + threadIdx.x;
        float logit = -infinity();
        if (id < p.vocab && !is_banned(p.banned, id)) logit = p.bias ? logits[threadIdx.x] + p.bias[id] : logits[threadIdx.x];
        logits[threadIdx.x] = logit;
    }
    __syncthreads();
    return logits;
}

template <typename T>
__device__ __forceinline__ void sample_row(const SampleDrawParams& p, u8* shared) {
    __shared__ double group_mass[MAX_GROUPS];
    const DrawRecord draw = p.draws[blockIdx.x];
    if (!is_fused(draw)) return;
    SampledRecord* out = p.sampled + blockIdx.x;
    const u32 num_tiles = (p.vocab + IDS - 1) / IDS;
    const u32 num_groups = (num_tiles + 31) / 32;
    const TileRecord* tiles = p.tiles + (u64)blockIdx.x * num_tiles;

    Top top = no_top();
    u64 broken = NO_ID;  // the lowest id
    for (u32 t = threadIdx.x; t < num_tiles; t += THREADS) {
        const TileRecord& tile = tiles[t];
        top = join(top, Top{tile.max, tile.second, t});
        if (tile.mass != tile.mass && broken == NO_ID) broken = __float_as_uint(tile.choice[0]);
    }
    broken = block_min(broken);
    if (broken != NO_ID) return refuse(out, draw, STATUS_BROKEN, (u32)broken);
    top = block_join(top);
    if (top.max == -infinity()) return refuse(out, draw, STATUS_NOTHING, 0);
    if ((draw.flags & DRAW_FORCED) && (draw.forced >= p.vocab || is_banned(p.banned, draw.forced))) {
        return refuse(out, draw, STATUS_FORCED, draw.forced);
    }

    const double inverse_temperature = draws(draw) ? 1.0 / (double)draw.temperature : 1.0;
    double sum = 0.0, moment = 0.0;
    for (u32 g = warp_id(); g < num_groups; g += WARPS) {
        const u32 t = g * 32 + lane_id();
        double mass = 0.0;
        if (t < num_tiles && tiles[t].max != -infinity()) {
            const TileRecord& tile = tiles[t];
            const double weight = weight_of(tile.max, top.max, 1.0);
            sum += tile.mass * weight;
            moment += (tile.moment + tile.mass * ((double)tile.max - (double)top.max)) * weight;
            if (draws(draw)) mass = choice_mass(tile, top.max, inverse_temperature);
        }
        mass = warp_sum64(mass);
        if (lane_id() == 0) group_mass[g] = mass;
    }
    sum = block_sum64(sum);  // its barriers also publish `group_mass`
    moment = block_sum64(moment);

    u32 token, piece;
    Walk walk = {0.0, 0.0, 0, false};
    float tile_max = 0.0f;
    double total = 0.0, weight = 0.0;
    if (draws(draw)) {
        for (u32 g = 0; g < num_groups; ++g) total += group_mass[g];
        walk.target = draw.u * total;
        for (u32 g = 0; g < num_groups; ++g) pass(walk, g, group_mass[g]);
        const u32 group = enter(walk);
        const u32 mine = group * 32 + lane_id();
        const double mass = mine < num_tiles ? choice_mass(tiles[mine], top.max, inverse_temperature) : 0.0;
        for (u32 i = 0; i < 32; ++i) pass(walk, i, shuffle(mass, i));
        const TileRecord& tile = tiles[group * 32 + enter(walk)];
        tile_max = tile.max;
        weight = weight_of(tile_max, top.max, inverse_temperature);
        for (u32 i = 0; i < PIECES; ++i) pass(walk, i, tile.choice[i] * weight);
        piece = (u32)(&tile - tiles) * PIECES + enter(walk);
        token = 0;
    } else {
        token = draw.flags & DRAW_FORCED ? draw.forced : __float_as_uint(tiles[top.at].choice[0]);
        piece = token / PIECE_IDS;
    }
    float logit = top.max;
    double share = 1.0;
    if (draws(draw) || (draw.flags & DRAW_FORCED)) {
        const float* logits = piece_logits<T>(p, piece, shared);
        if (draws(draw)) {
            share = tempered(logits[lane_id()] - tile_max, draw.temperature) * weight;
            for (u32 i = 0; i < PIECE_IDS; ++i) pass(walk, i, shuffle(share, i));
            share = shuffle(share, walk.at) / total;
            token = piece * PIECE_IDS + walk.at;
        }
        logit = logits[token % PIECE_IDS];
    }
    if (threadIdx.x == 0) write_sampled(out, draw, token, logit, share, top.max, top.second, sum, moment);
}

KERNEL_BOUNDS(sample_draw_f32, SampleDrawParams, THREADS, RESIDENT) {
    DYNAMIC_SHARED(shared);
    sample_row<float>(p, shared);
}
KERNEL_BOUNDS(sample_draw_bf16, SampleDrawParams, THREADS, RESIDENT) {
    DYNAMIC_SHARED(shared);
    sample_row<u16>(p, shared);
}
