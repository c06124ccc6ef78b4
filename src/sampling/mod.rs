//! Sampling of masked rows: which token a row takes, which positions are revealed or masked again.
//!
//! Pure functions over the plain data of [`types`]. They know no page, no tensor and no request.
#![forbid(unsafe_code)]

pub mod remask;
pub mod sample;
pub mod types;
pub mod unmask;

pub use remask::{GeneratedToken, REMASK_RULES, RemaskBy, RemaskRow, RemaskRule, Score, ScoringForwards, parse_remask, remask};
pub use sample::sample_row;
pub use types::{Draw, Rank, SampledToken, TopK, TopKOrder, TopPRule, UnmaskStep, top_k_of, valid_temperature, valid_top_p};
pub use unmask::{
    BlockProgress, Candidate, Ranking, RuleArguments, UNMASK_RULES, Unmask, UnmaskRow, UnmaskRule, edits, parse_unmask, select, select_best,
};
