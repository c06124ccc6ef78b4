//! The tests of the tests: each planted bug must be caught. Most are barriers that a GPU would miss only now and then.

use redraft::cuda::Edit;
use redraft::cuda::machine::Machine;

use crate::emulator::edited_machines;
use crate::{embed, norm, remask, rng};

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
