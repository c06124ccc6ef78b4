//! The tests of the tests: each planted bug must be caught. Most are barriers that a GPU would miss only now and then.

use redraft::cuda::Edit;
use redraft::cuda::machine::Machine;

use crate::emulator::edited_machines;
use crate::{ask, decide, embed, norm, remask, reveal, rng};

type Check = fn(&Machine) -> Result<(), String>;

/// What is broken, the test that must notice, and the edit: (file, text that occurs once, replacement).
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
        ("remask.cu", "histogram[threadIdx.x] = 0;\n        __syncthreads();", "histogram[threadIdx.x] = 0;"),
    ),
    (
        "histogram read before it is complete",
        remask::holds,
        ("remask.cu", "        __syncthreads();\n        u32 total;", "        u32 total;"),
    ),
    (
        "bin read before it is chosen",
        remask::holds,
        ("remask.cu", "__syncthreads();  // the next digit rewrites these two only after its own barriers", ""),
    ),
    ("one tie too many", remask::holds, ("remask.cu", "(equal && equal_before < wanted)", "(equal && equal_before <= wanted)")),
    ("an id one past the vocabulary", embed::holds, ("embed.cu", "id >= p.vocab", "id > p.vocab")),
    (
        "one id more than the vocabulary has",
        decide::the_law,
        ("decide_tiles.cu", "if (id < p.vocab && !is_banned", "if (id <= p.vocab && !is_banned"),
    ),
    (
        "a tile reduced before all of it is laid out",
        decide::the_law,
        ("decide_tiles.cu", "lay_out<Tile>(total, tile);\n    __syncthreads();", "lay_out<Tile>(total, tile);"),
    ),
    ("half of each piece without mass", decide::the_law, ("decide_tiles.cu", "choice += __shfl_xor_sync(FULL_WARP, choice, 1);", "")),
    ("the second largest forgets the largest before it", decide::the_law, ("decide.cuh", "fmaxf(b.second, a.max)", "b.second")),
    ("ties to the higher id", decide::edges_of_nuclei, ("decide.cuh", "b.at < a.at", "b.at > a.at")),
    ("zero times infinity", decide::the_law, ("decide.cuh", "mass * fmaxf(below, -100.0f)", "mass * below")),
    (
        "logits of a piece read before they are laid out",
        decide::the_law,
        ("decide_draw.cu", "lay_out<Tile>(total, logits);\n    __syncthreads();", "lay_out<Tile>(total, logits);"),
    ),
    (
        "bias and bans not yet in the logits of a piece",
        decide::the_law,
        ("decide_draw.cu", "    __syncthreads();\n    return logits;", "    return logits;"),
    ),
    (
        "a boundary belongs to the lower id",
        decide::edges_of_nuclei,
        ("decide_draw.cu", "walk.before + mass > walk.target", "walk.before + mass >= walk.target"),
    ),
    ("the last group left out", decide::the_law, ("decide_draw.cu", "(num_tiles + 31) / 32", "(num_tiles + 30) / 32")),
    ("the token behind the edge kept", decide::edges_of_nuclei, ("decide_nucleus.cu", "        --limit;\n", "")),
    ("all equals of the last logit kept", decide::edges_of_nuclei, ("decide_nucleus.cu", "equals < left ? equals : left", "equals")),
    (
        "masses put into bins that are not empty yet",
        decide::edges_of_nuclei,
        ("decide_nucleus.cu", "histogram[i] = 0;\n    __syncthreads();", "histogram[i] = 0;"),
    ),
    (
        "bins summed before they are full",
        decide::edges_of_nuclei,
        ("decide_nucleus.cu", "    __syncthreads();\n    u64 mass = 0;", "    u64 mass = 0;"),
    ),
    (
        "ranges of ids rewritten while others still read them",
        decide::walks,
        ("decide_nucleus.cu", "__syncthreads();  // all have read before the next round writes", ""),
    ),
    ("a status without its token", decide::refusals, ("decide_nucleus.cu", "STATUS_BROKEN, (u32)broken", "STATUS_BROKEN, 0")),
    ("asks beyond the prediction", ask::holds, ("ask.cu", "if (masked && i < s.ask_count)", "if (masked)")),
    ("every tile starts from the first ask", ask::holds, ("ask.cu", "        seen += count;\n", "        seen = count;\n")),
    ("the wrong half of a key", ask::holds, ("ask.cu", "s.step, position).token", "s.step, position).order")),
    ("a later trouble hides the first", ask::holds, ("ask.cu", " && summary->trouble == 0", "")),
    ("one tie too many", reveal::holds, ("reveal.cu", "equal_before < cut.equal", "equal_before <= cut.equal")),
    ("above the threshold only", reveal::holds, ("reveal.cu", "confidence >= s.bound", "confidence > s.bound")),
    ("the newest entropy counted against itself", reveal::holds, ("reveal.cu", "sum - entropy <=", "sum <=")),
    ("confidence above one", reveal::holds, ("reveal.cu", "confidence > 1.0f ? 1.0f : confidence", "confidence")),
    (
        "a digit read before it is chosen",
        reveal::holds,
        ("select.cuh", "__syncthreads();  // the next digit rewrites these two only after its own barriers", ""),
    ),
    (
        "minima rewritten while others still read them",
        reveal::holds,
        ("select.cuh", "partial[w] < value ? partial[w] : value;\n    __syncthreads();", "partial[w] < value ? partial[w] : value;"),
    ),
];

fn edit((file, from, to): (&'static str, &'static str, &'static str)) -> Option<Edit> {
    Some(Edit { file, from, to })
}

#[test]
fn every_planted_bug_is_caught() {
    for (bug, check, change) in BUGS {
        // One of the eight machines must notice; which one tells what kind of bug it is.
        let caught = edited_machines(edit(*change)).iter().enumerate().find_map(|(i, m)| check(m).err().map(|e| (i, e)));
        let (machine, words) = caught.unwrap_or_else(|| panic!("not caught: {bug}"));
        assert!(!words.contains("g++ failed") && !words.contains(" stands "), "the edit itself is broken: {bug}: {words}");
        println!("{bug}: machine {machine}: {}", words.chars().take(160).collect::<String>());
    }
    println!("{} planted, {} caught", BUGS.len(), BUGS.len());
}

#[test]
fn a_generator_of_nine_rounds_is_caught() {
    assert!(rng::holds(edit(("common.cuh", "round < 10", "round < 9"))).is_err());
}
