//! The tests of the tests: each planted bug must be caught. Most are barriers that a GPU would miss
//! only now and then.

use redraft::cuda::Edit;
use redraft::cuda::context::CudaContext;

use crate::emulator::{edited_machines, on_all_cores};
use crate::{
    attention, embed, gather, guidance, linear, moe, norm, remask, rng, rope_append, route, sample, sample_shortlist, select_masked,
    shortlist, unmask,
};

type Check = fn(&CudaContext) -> Result<(), String>;

/// What is broken, the test that must notice, and the edit: (file, text that occurs once,
/// replacement).
const BUGS: &[(&str, Check, (&str, &str, &str))] = &[
    (
        "sum read before every warp has written its part",
        norm::holds,
        (
            "common.cuh",
            "if (lane_id() == 0) partial[warp_id()] = value;\n    __syncthreads();",
            "if (lane_id() == 0) partial[warp_id()] = value;",
        ),
    ),
    (
        "parts rewritten while others still read them",
        norm::holds,
        ("common.cuh", "total += partial[w];\n    __syncthreads();", "total += partial[w];"),
    ),
    ("a level of the butterfly missing", norm::holds, ("common.cuh", "u32 distance = 16;", "u32 distance = 8;")),
    (
        "a barrier that only some threads reach",
        norm::holds,
        ("norm.cu", "= block_sum(sum) /", "= (threadIdx.x < p.width ? block_sum(sum) : 0.0f) /"),
    ),
    (
        "the last column counts for the mean but not for the variance",
        norm::holds,
        (
            "norm.cu",
            "if (col + 3 < width) sum = fmaf(v.w - mean, v.w - mean, sum);",
            "if (col + 4 < width) sum = fmaf(v.w - mean, v.w - mean, sum);",
        ),
    ),
    (
        "scan parts rewritten while others still read them",
        remask::holds,
        ("common.cuh", "        total += partial[w];\n    }\n    __syncthreads();", "        total += partial[w];\n    }"),
    ),
    (
        "histogram counted before it is cleared",
        remask::holds,
        ("select.cuh", "histogram[threadIdx.x] = 0;\n        __syncthreads();", "histogram[threadIdx.x] = 0;"),
    ),
    (
        "histogram read before it is complete",
        remask::holds,
        ("select.cuh", "        __syncthreads();\n        u32 total;", "        u32 total;"),
    ),
    (
        "bin read before it is chosen",
        remask::holds,
        ("select.cuh", "__syncthreads();  // the next digit rewrites these two only after its own barriers", ""),
    ),
    ("one tie too many", remask::holds, ("remask.cu", "(equal && equal_before < cut.equal)", "(equal && equal_before <= cut.equal)")),
    ("an id one past the vocabulary", embed::holds, ("embed.cu", "id >= p.vocab", "id > p.vocab")),
    ("a position one past its table", embed::holds, ("embed.cu", "position >= p.num_positions", "position > p.num_positions")),
    ("the row's place instead of its position", embed::holds, ("embed.cu", "p.positions[blockIdx.x]", "blockIdx.x")),
    (
        "one id more than the vocabulary has",
        sample::equals_the_reference,
        ("sample_tiles.cu", "if (id < p.vocab && !is_banned", "if (id <= p.vocab && !is_banned"),
    ),
    (
        "a tile reduced before all of it is laid out",
        sample::equals_the_reference,
        ("sample_tiles.cu", "lay_out<Tile>(total, tile);\n    __syncthreads();", "lay_out<Tile>(total, tile);"),
    ),
    (
        "half of each piece without mass",
        sample::equals_the_reference,
        ("sample_tiles.cu", "choice += __shfl_xor_sync(FULL_WARP, choice, 1);", ""),
    ),
    (
        "the second largest forgets the largest before it",
        sample::equals_the_reference,
        ("sample.cuh", "fmaxf(b.second, a.max)", "b.second"),
    ),
    ("ties to the higher id", sample::edges_of_nuclei, ("sample.cuh", "b.at < a.at", "b.at > a.at")),
    ("zero times infinity", sample::equals_the_reference, ("sample.cuh", "mass * fmaxf(below, -100.0f)", "mass * below")),
    (
        "logits of a piece read before they are laid out",
        sample::equals_the_reference,
        ("sample_draw.cu", "lay_out<Tile>(total, logits);\n    __syncthreads();", "lay_out<Tile>(total, logits);"),
    ),
    (
        "bias and bans not yet in the logits of a piece",
        sample::equals_the_reference,
        ("sample_draw.cu", "    __syncthreads();\n    return logits;", "    return logits;"),
    ),
    (
        "a boundary belongs to the lower id",
        sample::edges_of_nuclei,
        ("sample_draw.cu", "walk.before + mass > walk.target", "walk.before + mass >= walk.target"),
    ),
    ("the last group left out", sample::equals_the_reference, ("sample_draw.cu", "(num_tiles + 31) / 32", "(num_tiles + 30) / 32")),
    ("the token behind the edge kept", sample::edges_of_nuclei, ("sample_nucleus.cu", "        --limit;\n", "")),
    ("all equals of the last logit kept", sample::edges_of_nuclei, ("sample_nucleus.cu", "equals < left ? equals : left", "equals")),
    (
        "masses put into bins that are not empty yet",
        sample::edges_of_nuclei,
        ("sample_nucleus.cu", "histogram.high[i] = 0;\n    __syncthreads();", "histogram.high[i] = 0;"),
    ),
    ("a carry between the words of a mass lost", sample::edges_of_nuclei, ("sample_nucleus.cu", " + (before + low < before)", "")),
    ("keys read that had no room", sample::edges_of_nuclei, ("sample_nucleus.cu", "if (count <= KEYS)", "if (count <= 2 * KEYS)")),
    (
        "bins summed before they are full",
        sample::edges_of_nuclei,
        ("sample_nucleus.cu", "    __syncthreads();\n    u64 mass = 0;", "    u64 mass = 0;"),
    ),
    (
        "ranges of ids rewritten while others still read them",
        sample::walks,
        ("sample_nucleus.cu", "__syncthreads();  // all have read before the next round writes", ""),
    ),
    ("the token behind the k-th kept", sample::most_probable, ("sample_nucleus.cu", "u64 wanted = k - 1;", "u64 wanted = k;")),
    (
        "a nucleus of everything before top-k",
        sample::most_probable,
        ("sample_nucleus.cu", "draw.flags & DRAW_TOP_K_AFTER ? total : most_probable", "total"),
    ),
    (
        "top-k forgotten by the answer",
        sample::most_probable,
        ("sample.cuh", "draw.temperature == 0.0f && !is_cut(draw)", "draw.temperature == 0.0f && draw.top_p >= 1.0f"),
    ),
    ("a status without its token", sample::refusals, ("sample_nucleus.cu", "STATUS_BROKEN, (u32)broken", "STATUS_BROKEN, 0")),
    (
        "one equal too many on a list",
        shortlist::holds,
        ("shortlist.cu", "(equal && equal_before < cut.equal)", "(equal && equal_before <= cut.equal)"),
    ),
    ("banned ids listed", shortlist::holds, ("shortlist.cu", " && !is_banned(p.banned, id);", ";")),
    ("what can never be drawn listed", shortlist::holds, ("shortlist.cu", "return logit > -infinity() && !", "return !")),
    (
        "no end of a short list",
        shortlist::holds,
        ("shortlist.cu", "i < p.count; i += THREADS) ids[i] = NO_ID;", "i < p.count; i += THREADS) ;"),
    ),
    (
        "equals of the tiles before forgotten",
        shortlist::holds,
        ("shortlist.cu", "equal_seen += counts >> 16;", "equal_seen = counts >> 16;"),
    ),
    (
        "the list of the row's own number",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "p.which[blockIdx.x]", "blockIdx.x"),
    ),
    (
        "logits read before all are there",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "    __syncthreads();  // all logits are there\n", ""),
    ),
    (
        "an element past the end of a row",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "i < at + 4 && i < k;", "i < at + 4;"),
    ),
    ("a bias by place", sample_shortlist::equals_the_reference, ("sample_shortlist.cu", "logit += p.bias[id];", "logit += p.bias[i];")),
    (
        "zero times infinity",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "if (logits[i] == -infinity()) continue;\n", ""),
    ),
    (
        "sums of warps read before they are written",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "partial[warp_id()] = inclusive;\n    __syncthreads();", "partial[warp_id()] = inclusive;"),
    ),
    (
        "sorted while others still exchange",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "            __syncthreads();  // the next round reads what others exchanged\n", ""),
    ),
    (
        "drawn before what is cut off is gone",
        sample_shortlist::equals_the_reference,
        ("sample_shortlist.cu", "    __syncthreads();  // what is cut off has no mass any more\n", ""),
    ),
    (
        "the rank behind the edge kept",
        sample_shortlist::edges,
        ("sample_shortlist.cu", "outside < kept ? (u32)outside : kept;", "outside < kept ? (u32)outside + 1 : kept;"),
    ),
    (
        "a nucleus of everything before top-k",
        sample_shortlist::edges,
        ("sample_shortlist.cu", "draw.flags & DRAW_TOP_K_AFTER ? count : kept;", "count;"),
    ),
    ("the k-th left out", sample_shortlist::edges, ("sample_shortlist.cu", "above += logits[i] >= least;", "above += logits[i] > least;")),
    (
        "a boundary belongs to the lower id",
        sample_shortlist::edges,
        ("sample_shortlist.cu", "cumulative > draw.u * total", "cumulative >= draw.u * total"),
    ),
    (
        "ties to the higher id",
        sample_shortlist::edges,
        ("sample_shortlist.cu", "(u64)(u32)~ordered_bits(logit) << 32 | i;", "(u64)(u32)~ordered_bits(logit) << 32 | (size - 1 - i);"),
    ),
    ("a second token where one is left", sample_shortlist::edges, ("sample_shortlist.cu", "kept > 1 ? exp(", "kept > 0 ? exp(")),
    ("the end of a list forced", sample_shortlist::refusals, ("sample_shortlist.cu", " && ids[i] != NO_ID) place", ") place")),
    ("a place instead of an id refused", sample_shortlist::refusals, ("sample_shortlist.cu", "broken = ids[i];", "broken = i;")),
    ("rows beyond the prediction", select_masked::holds, ("select_masked.cu", "if (masked && i < s.sample_count)", "if (masked)")),
    (
        "every tile starts from the first row",
        select_masked::holds,
        ("select_masked.cu", "        seen += count;\n", "        seen = count;\n"),
    ),
    ("the wrong half of a key", select_masked::holds, ("select_masked.cu", "s.step, position).token", "s.step, position).order")),
    ("a later error hides the first", select_masked::holds, ("select_masked.cu", " && summary->error == 0", "")),
    ("one tie too many", unmask::holds, ("unmask.cu", "equal_before < cut.equal", "equal_before <= cut.equal")),
    ("above the threshold only", unmask::holds, ("unmask.cu", "confidence >= s.bound", "confidence > s.bound")),
    ("the newest entropy counted against itself", unmask::holds, ("unmask.cu", "sum - entropy <=", "sum <=")),
    ("confidence above one", unmask::holds, ("unmask.cu", "confidence > 1.0f ? 1.0f : confidence", "confidence")),
    (
        "minima rewritten while others still read them",
        unmask::holds,
        ("select.cuh", "partial[w] < value ? partial[w] : value;\n    __syncthreads();", "partial[w] < value ? partial[w] : value;"),
    ),
    (
        "stage multiplied before it has arrived for all",
        linear::holds,
        (
            "gemm.cuh",
            "            __syncthreads();  // this block has arrived for all, and all have left the slot that is filled next\n",
            "",
        ),
    ),
    (
        "one group of copies too many in flight",
        linear::holds,
        ("gemm.cuh", "cp_async_wait<(int)Tile::stages - 2>();", "cp_async_wait<(int)Tile::stages - 1>();"),
    ),
    ("slot filled that is still multiplied", linear::holds, ("gemm.cuh", "slot == 0 ? Tile::stages - 1 : slot - 1);", "slot);")),
    (
        "no group closed where nothing is left to load",
        linear::holds,
        ("gemm.cuh", "        }\n        cp_async_commit();\n    };", "            cp_async_commit();\n        }\n    };"),
    ),
    (
        "shared memory given back while others multiply",
        linear::holds,
        ("gemm.cuh", "    __syncthreads();  // `shared` is the caller's again\n", ""),
    ),
    (
        "piece of the weight not where it was put",
        linear::holds,
        ("gemm.cuh", "half * 4 + step * 2 + lane / 16));", "half * 4 + step * 2 + lane / 8 % 2));"),
    ),
    (
        "swizzled piece read where it would lie unswizzled",
        linear::holds,
        ("gemm.cuh", "piece_at(w, tile_col<Tile>(c, 2), piece)", "(w + tile_col<Tile>(c, 2) * STAGE_ROW + piece * 16)"),
    ),
    (
        "k past the end of a row",
        linear::holds,
        ("gemm.cuh", "const bool valid = first + local + i < rows && k < depth;", "const bool valid = first + local + i < rows;"),
    ),
    (
        "rows past the end",
        linear::holds,
        ("gemm.cuh", "const bool valid = first + local + i < rows && k < depth;", "const bool valid = k < depth;"),
    ),
    (
        "segments added from the last to the first",
        linear::holds,
        ("linear.cu", "for (u32 segment = 0; segment < segments; ++segment) {", "for (u32 segment = segments; segment-- > 0;) {"),
    ),
    ("segments longer than their number says", linear::holds, ("gemm.cuh", "#define K_SEGMENT 256", "#define K_SEGMENT 512")),
    (
        "sums that run on into the next segment",
        linear::holds,
        ("linear.cu", "            accumulate<Tile>(total, sums);", "            if (segment + 1 == last) accumulate<Tile>(total, sums);"),
    ),
    ("counter left behind", linear::holds, ("linear.cu", "    if (threadIdx.x == 0) p.counters[blockIdx.x] = 0;\n", "")),
    (
        "arrival read before it is known",
        linear::holds,
        ("linear.cu", "p.counters + blockIdx.x, 1u);\n    __syncthreads();", "p.counters + blockIdx.x, 1u);"),
    ),
    (
        "tile read before it is laid out",
        linear::holds,
        ("linear.cu", "    lay_out<Tile>(total, tile);\n    __syncthreads();", "    lay_out<Tile>(total, tile);"),
    ),
    ("row stored past the end", linear::holds, ("linear.cu", "if (row0 + row < p.rows && col0 + col < p.n)", "if (col0 + col < p.n)")),
    ("columns stored past the end", linear::holds, ("linear.cu", "if (i < count) store1(out + i,", "store1(out + i,")),
    (
        "codes multiplied before their values are there for all",
        linear::groups_hold,
        ("gemm.cuh", "                    __syncthreads();  // the values of this block are there for all\n", ""),
    ),
    ("halves of a byte in the wrong order", linear::groups_hold, ("groups.cuh", ">> quad % 2 * 4 &", ">> (1 - quad % 2) * 4 &")),
    ("minimum of a group left out", linear::groups_hold, ("groups.cuh", "fmaf(s.scale, code, s.min)", "s.scale * code")),
    ("codes of 8 bits off by one", linear::groups_hold, ("groups.cuh", "8388736.0f", "8388735.0f")),
    ("groups past the end of a panel", linear::groups_hold, ("gemm.cuh", " && first + at / block_bytes<Tile::bits>() < groups;", ";")),
    ("panels past the last column", linear::groups_hold, ("gemm.cuh", "valid = col0 + panel * BLOCK_COLUMNS < cols &&", "valid =")),
    (
        "scale of another column",
        linear::groups_hold,
        ("gemm.cuh", "scale_of<Tile::bits>(block, col % BLOCK_COLUMNS + 8)", "scale_of<Tile::bits>(block, col % BLOCK_COLUMNS)"),
    ),
    ("codes of another k", linear::groups_hold, ("gemm.cuh", "quad + 2, shift, high)", "quad + 1, shift, high)")),
    ("pair of a quad chosen by another lane", linear::groups_hold, ("gemm.cuh", "shift = lane % 2 * 16;", "shift = lane / 2 % 2 * 16;")),
    (
        "panels of an expert that are not whole",
        moe::groups_hold,
        ("groups.cuh", "(u64)((n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS)", "(u64)(n / BLOCK_COLUMNS)"),
    ),
    (
        "row of a table in the block of another",
        embed::groups_hold,
        ("groups.cuh", "(u64)(row / BLOCK_COLUMNS) * num_groups", "(u64)((row + 1) / BLOCK_COLUMNS) * num_groups"),
    ),
    (
        "value of a listed id not rounded",
        sample_shortlist::groups_hold,
        ("groups.cuh", "rounded(value_of<bits>(codes >> 24, s), type)", "value_of<bits>(codes >> 24, s)"),
    ),
    ("up of the neighbour", linear::holds, ("linear.cu", "silu(v[2]) * v[3]", "silu(v[2]) * v[1]")),
    ("sum with the residual not written back", norm::holds, ("norm.cu", "            store_quad(x, col, p.width, wide, v);\n", "")),
    (
        "residual added at every visit of a long row",
        norm::holds,
        ("norm.cu", "add_squares(squares, load_quad(x, col, p.width, wide), mean", "add_squares(squares, read(col), mean"),
    ),
    ("end of a long row not written", norm::holds, ("norm.cu", "write(load_quad(x, col, p.width, wide), col);", "(void)write;")),
    (
        "square past the end",
        norm::holds,
        ("norm.cu", "if (col + 2 < width) sum = fmaf(v.z - mean", "if (col + 1 < width) sum = fmaf(v.z - mean"),
    ),
    ("an element past the end", guidance::holds, ("guidance.cu", "if (i >= p.len) return;", "if (i > p.len) return;")),
    ("out itself scaled", guidance::holds, ("guidance.cu", "(p.out[i] - base)", "p.out[i]")),
    ("an element past the end", gather::holds, ("gather.cu", "col + i < p.width; ++i", "col + i <= p.width; ++i")),
    ("the row itself instead of the chosen one", gather::holds, ("gather.cu", "(p.rows ? p.rows[row] : row)", "row")),
    ("keys read before they have arrived", attention::holds, ("attention.cu", "cp_async_wait<RING - 2>();", "cp_async_wait<RING - 1>();")),
    (
        "a buffer of the ring filled while others still read it",
        attention::holds,
        ("attention.cu", "cp_async_wait<RING - 2>();\n        __syncthreads();", "cp_async_wait<RING - 2>();"),
    ),
    (
        "maxima read before the other warps have written theirs",
        attention::holds,
        (
            "attention.cu",
            "            __syncthreads();\n#pragma unroll\n            for (u32 w = 0; w < SHARERS; ++w) {",
            "            for (u32 w = 0; w < SHARERS; ++w) {",
        ),
    ),
    ("one key too many", attention::holds, ("attention.cu", "position < visible[i / 2] ?", "position <= visible[i / 2] ?")),
    (
        "the slot past the end is read",
        attention::holds,
        ("attention.cu", "const bool valid = first + key < queries.end;", "const bool valid = first + key <= queries.end;"),
    ),
    ("a mass that is not rescaled", attention::holds, ("attention.cu", "state.mass[i] *= rescale[i / 2];", "")),
    ("zero times NaN", attention::holds, ("attention.cu", "if (ends_differ) replace_non_finite", "if (false) replace_non_finite")),
    ("NaN that is visible taken away", attention::holds, ("attention.cu", "if (low_is_odd(pair)) state.sums[n][2 * h] = quiet_nan();", "")),
    ("NaN taken away before all have seen it", attention::holds, ("attention.cu", "__syncthreads();  // all have seen them", "")),
    (
        "values multiplied before NaN is taken away",
        attention::holds,
        ("attention.cu", "__syncthreads();  // no thread multiplies before they are replaced", ""),
    ),
    (
        "a chunk that begins with the sums of the one before",
        attention::holds,
        ("attention.cu", "keep(tile / CHUNK_TILES * CHUNK_KEYS);\n            clear();", "keep(tile / CHUNK_TILES * CHUNK_KEYS);"),
    ),
    (
        "chunks blended before the last has arrived",
        attention::holds,
        ("attention.cu", "arrived + 1 != chunks_of(queries.end)", "arrived + 2 != chunks_of(queries.end)"),
    ),
    ("a counter that stays", attention::holds, ("attention.cu", "if (threadIdx.x == 0) *counter = 0;", "")),
    (
        "f32 keys replaced while others still read them",
        attention::holds,
        ("attention.cu", "__syncthreads();  // the keys have been read, and the warp's weights are written", ""),
    ),
    (
        "f32 values replaced while others still read them",
        attention::holds,
        ("attention.cu", "__syncthreads();  // the values of the tile before have been read", ""),
    ),
    (
        "a tile finished before all of it is laid out",
        moe::holds,
        ("moe.cu", "lay_out<Tile>(total, tile);\n    __syncthreads();", "lay_out<Tile>(total, tile);"),
    ),
    ("tiles beyond the list", moe::holds, ("moe.cu", "if (index >= *p.num_tiles) return;", "")),
    ("rows of the next expert", moe::holds, ("moe.cu", "if (row >= count || col >= p.n) continue;", "if (col >= p.n) continue;")),
    ("everyone through the first expert", moe::holds, ("moe.cu", "(p.weight, of.x, p.n", "(p.weight, 0u, p.n")),
    ("up before gate", moe::holds, ("moe.cu", "silu(v.x) * v.y", "silu(v.y) * v.x")),
    ("a sum that starts from the residual", moe::holds, ("moe_combine.cu", "out[i] += sum;", "out[i] = sum;")),
    ("ties to the higher expert", route::holds, ("route.cu", "b.key == a.key && b.id < a.id", "b.key == a.key && b.id > a.id")),
    ("an expert chosen twice", route::holds, ("route.cu", "            open &= ~(1u << (best.id / 32));\n", "")),
    ("a group counts by its best alone", route::holds, ("route.cu", "sum = first + second;", "sum = first;")),
    ("weights with the bias in them", route::holds, ("route.cu", "float weight = scores[s];", "float weight = keys[s];")),
    ("groups that do not matter", route::holds, ("route.cu", "open &= ~(1u << s);", ";")),
    ("places that begin with the expert's own", route::holds, ("route.cu", "lower < expert; lower += 32", "lower <= expert; lower += 32")),
    (
        "a ragged tile as high as the others",
        route::holds,
        ("route.cu", "count - first < p.tile_rows ? count - first : p.tile_rows", "p.tile_rows"),
    ),
    ("choices written by rank of the lane alone", route::holds, ("route.cu", "        before += __popc(lanes);\n", "")),
    ("rotation the wrong way round", rope_append::holds, ("rope_append.cu", "-__fmul_rn(b, sine[i])", "__fmul_rn(b, sine[i])")),
    (
        "padding that is written",
        rope_append::holds,
        ("rope_append.cu", "const bool live = slot != NO_SLOT;", "const bool live = row < p.rows;"),
    ),
    ("values that are rotated", rope_append::holds, ("rope_append.cu", "if (!is_value && unit", "if (unit")),
    (
        "the rest of a head rotated too",
        rope_append::holds,
        ("rope_append.cu", "if (!is_value && unit * VECTOR < TURNING)", "if (!is_value)"),
    ),
    ("the rest of a head out of place", rope_append::holds, ("rope_append.cu", "pair : pair + TURNING;", "pair : pair;")),
    ("a level of the head's sum missing", rope_append::holds, ("rope_append.cu", "u32 distance = LANES / 2;", "u32 distance = LANES / 4;")),
    (
        "heads of a page on top of each other",
        rope_append::holds,
        ("rope_append.cu", "* p.num_kv_heads + kv_head) * PAGE_SIZE", "* p.num_kv_heads) * PAGE_SIZE"),
    ),
];

fn edit((file, from, to): (&'static str, &'static str, &'static str)) -> Option<Edit> {
    Some(Edit { file, from, to })
}

/// Who noticed a bug, and in what words.
fn caught(check: Check, change: (&'static str, &'static str, &'static str)) -> Option<(usize, String)> {
    edited_machines(edit(change)).iter().enumerate().find_map(|(i, context)| check(context).err().map(|words| (i, words)))
}

#[test]
fn every_planted_bug_is_caught() {
    // Most of the time goes into compiling each of them.
    let missed = on_all_cores(BUGS, |(bug, check, change)| match caught(*check, *change) {
        // One of the nine machines must notice; which one tells what kind of bug it is.
        Some((machine, words)) if !words.contains("g++ failed") && !words.contains(" stands ") => {
            println!("{bug}: machine {machine}: {}", words.chars().take(160).collect::<String>());
            None
        }
        Some((_, words)) => Some(format!("the edit itself is broken: {bug}: {words}")),
        None => Some(format!("not caught: {bug}")),
    });
    println!("{} planted, {} caught", BUGS.len(), BUGS.len() - missed.len());
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn a_generator_of_nine_rounds_is_caught() {
    assert!(rng::holds(edit(("common.cuh", "round < 10", "round < 9"))).is_err());
}
