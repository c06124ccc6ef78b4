//! The tests of the tests: each planted bug must be caught. Most are barriers that a GPU would miss only now and then.

use crate::emulator::{Edit, Emulated};
use crate::{embed, layer_norm, remask, rng};

type Check = fn(&Emulated) -> Result<(), String>;

const BUGS: [(&str, &str, Check, Edit); 12] = [
    (
        "sum read before every warp has written its part",
        "layer_norm",
        layer_norm::holds,
        (
            "common.cuh",
            "if (lane_id() == 0) partial[warp_id()] = value;\n    __syncthreads();",
            "if (lane_id() == 0) partial[warp_id()] = value;",
        ),
    ),
    (
        "parts rewritten while others still read them",
        "layer_norm",
        layer_norm::holds,
        ("common.cuh", "total += partial[w];\n    __syncthreads();", "total += partial[w];"),
    ),
    ("a level of the butterfly missing", "layer_norm", layer_norm::holds, ("common.cuh", "u32 distance = 16;", "u32 distance = 8;")),
    (
        "a barrier that only some threads reach",
        "layer_norm",
        layer_norm::holds,
        ("layer_norm.cu", "= block_sum(sum) /", "= (threadIdx.x < p.width ? block_sum(sum) : 0.0f) /"),
    ),
    (
        "the last column dropped",
        "layer_norm",
        layer_norm::holds,
        (
            "layer_norm.cu",
            "float squares = 0.0f;\n    for (u32 i = threadIdx.x; i < p.width;",
            "float squares = 0.0f;\n    for (u32 i = threadIdx.x; i + 1 < p.width;",
        ),
    ),
    (
        "scan parts rewritten while others still read them",
        "remask",
        remask::holds,
        ("common.cuh", "        total += partial[w];\n    }\n    __syncthreads();", "        total += partial[w];\n    }"),
    ),
    (
        "histogram counted before it is cleared",
        "remask",
        remask::holds,
        ("remask.cu", "histogram[threadIdx.x] = 0;\n        __syncthreads();", "histogram[threadIdx.x] = 0;"),
    ),
    (
        "histogram read before it is complete",
        "remask",
        remask::holds,
        ("remask.cu", "        __syncthreads();\n        u32 total;", "        u32 total;"),
    ),
    (
        "bin read before it is chosen",
        "remask",
        remask::holds,
        ("remask.cu", "__syncthreads();  // the next digit rewrites these two only after its own barriers", ""),
    ),
    ("one tie too many", "remask", remask::holds, ("remask.cu", "(equal && equal_before < wanted)", "(equal && equal_before <= wanted)")),
    ("an id one past the vocabulary", "embed", embed::holds, ("embed.cu", "id >= p.vocab", "id > p.vocab")),
    ("nine rounds", "rng", rng::holds, ("common.cuh", "round < 10", "round < 9")),
];

#[test]
fn every_planted_bug_is_caught() {
    for (i, (bug, stem, check, edit)) in BUGS.into_iter().enumerate() {
        let broken = Emulated::build(&format!("bug-{i}"), &[stem], Some(edit));
        let caught = check(&broken);
        assert!(caught.is_err(), "not caught: {bug}");
        println!("{bug}: {}", caught.unwrap_err().chars().take(160).collect::<String>());
    }
}
