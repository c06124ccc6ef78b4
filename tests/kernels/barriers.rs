//! Each barrier and each fence of every kernel is taken out in turn: a test must miss it. Whoever
//! writes one more is asked for that test.

use redraft::cuda::context::CudaContext;
use redraft::cuda::{Edit, headers, kernels};

use crate::emulator::{edited_machines, on_all_cores};
use crate::{attention, linear, moe, norm, sample, sample_shortlist, select_masked, unmask};

type Check = fn(&CudaContext) -> Result<(), String>;

/// Which tests run the code of a file.
const USERS: &[(&str, &[Check])] = &[
    ("attention.cu", &[attention::holds]),
    ("common.cuh", &[norm::holds, select_masked::holds]),
    ("sample.cuh", &[sample::equals_the_reference]),
    ("sample_draw.cu", &[sample::equals_the_reference]),
    ("sample_nucleus.cu", &[sample::edges_of_nuclei, sample::walks]),
    ("sample_tiles.cu", &[sample::equals_the_reference]),
    ("moe.cu", &[moe::holds]),
    ("gemm.cuh", &[linear::groups_hold, linear::holds]),
    ("linear.cu", &[linear::holds]),
    ("sample_shortlist.cu", &[sample_shortlist::equals_the_reference, sample_shortlist::edges]),
    ("select.cuh", &[unmask::holds, sample::edges_of_nuclei, sample::walks]),
];

/// Words that nothing here misses, by the end of their line or the line behind, and why they stand
/// all the same.
const SPARED: &[(&str, &str, &str)] = &[
    ("attention.cu", "__threadfence();  // the arrivals before", "the emulation does not reorder what the last CTA reads"),
    ("linear.cu", "__threadfence();  // the count before", "the emulation does not reorder what the last CTA reads"),
    ("linear.cu", "__syncthreads();\n    if (threadIdx.x == 0) arrived", "`product` ends with a barrier, behind the last partial result"),
    ("sample.cuh", "__syncthreads();  // `partial` may be", "callers of today have a barrier of their own between two calls"),
    ("select.cuh", "__syncthreads();  // `partial` may be rewritten by the next call\n    return before", "the same"),
    ("sample_shortlist.cu", "__syncthreads();  // `partial` may be", "the same"),
    ("sample_nucleus.cu", "__syncthreads();  // `found` may be", "the same"),
    ("sample_nucleus.cu", "__syncthreads();\n    return mass;", "the same"),
];

struct Removal {
    file: &'static str,
    line: usize,
    edit: Edit,
    checks: &'static [Check],
    /// Listed in [`SPARED`].
    spared: bool,
}

fn removals() -> Vec<Removal> {
    let named = kernels().into_iter().map(|k| (&*format!("{}.cu", k.stem).leak(), k.source));
    let files: Vec<(&str, &str)> = named.chain(headers().iter().copied()).collect();
    let mut removals = Vec::new();
    for (file, text) in files {
        for word in ["__syncthreads();", "__threadfence();"] {
            for (at, _) in text.match_indices(word) {
                let line = 1 + text[..at].matches('\n').count();
                let user = USERS.iter().find(|(user, _)| *user == file);
                let (_, checks) = user.unwrap_or_else(|| panic!("{file}:{line}: which test runs this {word}"));
                // A text that occurs once: the word with as many lines in front of it as that
                // takes.
                let starts = text[..at].match_indices('\n').map(|(i, _)| i).rev();
                let from = starts.map(|start| &text[start..at + word.len()]).find(|from| text.matches(from).count() == 1);
                let from = from.unwrap_or_else(|| panic!("{file}:{line} cannot be told from others"));
                let edit = Edit { file, from, to: &from[..from.len() - word.len()] };
                let spared = SPARED.iter().any(|(spared, text_at, _)| *spared == file && text[at..].starts_with(text_at));
                removals.push(Removal { file, line, edit, checks, spared });
            }
        }
    }
    removals
}

#[test]
fn no_barrier_can_be_spared() {
    let removals = removals();
    assert!(removals.len() > 30, "{} barriers and fences", removals.len());
    assert_eq!(removals.iter().filter(|removal| removal.spared).count(), SPARED.len(), "each exception names one place");
    let failures = on_all_cores(&removals, |Removal { file, line, edit, checks, spared }| {
        // The machine that watches for races comes last, and notices most.
        let machines = edited_machines(Some(*edit));
        let missed = machines.iter().rev().find_map(|context| checks.iter().find_map(|check| check(context).err()));
        match (missed, spared) {
            (None, true) => None,
            (None, false) => Some(format!("{file}:{line} is not missed by any test")),
            (Some(words), true) => Some(format!("{file}:{line} is missed, against its exception: {words}")),
            (Some(words), false) if words.contains("g++ failed") => Some(format!("{file}:{line}: {words}")),
            (Some(words), false) => {
                println!("{file}:{line}: {}", words.chars().take(200).collect::<String>());
                None
            }
        }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
