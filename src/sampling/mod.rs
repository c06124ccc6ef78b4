//! Sampling of masked rows: which token a row takes, which positions are unmasked or masked again.
//!
//! Pure functions over plain data. They know no page, no tensor and no request.
#![forbid(unsafe_code)]

pub(crate) mod remask;
pub(crate) mod sample;
pub(crate) mod types;
pub(crate) mod unmask;

pub use remask::{GeneratedToken, HeldOut, PostHoc, Random, RemaskBy, RemaskRule, Score, ScoringForwards, Snapshot};
pub use types::{Rank, SampledToken, TopK, TopKOrder, TopPRule, UnmaskStep};
pub use unmask::{
    Above, Ancestral, BlockProgress, Candidate, Cosine, Count, EntropyBound, Factor, Fixed, Linear, Ranking, Threshold, Times, Timestep,
    Unmask, UnmaskRule,
};

// What the engine and the tests use of the rules.
#[cfg(feature = "testing")]
pub use {
    remask::{REMASK_RULES, RemaskRow, parse_remask, remask},
    sample::sample_row,
    types::{Draw, top_k_of, valid_temperature, valid_top_p},
    unmask::{RuleArguments, UNMASK_RULES, UnmaskRow, edits, parse_unmask, select, select_best},
};
#[cfg(not(feature = "testing"))]
pub(crate) use {
    remask::{parse_remask, remask},
    sample::sample_row,
    types::{Draw, top_k_of, valid_temperature, valid_top_p},
    unmask::{RuleArguments, edits, parse_unmask, select, select_best},
};
