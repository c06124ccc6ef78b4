//! Sampling of masked rows: which token a row takes, which positions are revealed or masked again.
//!
//! Pure functions over the plain data of [`types`]. They know no page, no tensor and no request.
#![forbid(unsafe_code)]

pub mod remask;
pub mod sample;
pub mod types;
pub mod unmask;

pub use remask::{remask, score};
pub use sample::sample_row;
pub use types::{Draw, Rank, SampledToken, Score, TopK, TopKOrder, TopPRule, Unmask, UnmaskStep, top_k_of, valid_temperature, valid_top_p};
pub use unmask::{BlockProgress, Candidate, edits, next_step, quota, select, select_tempered};
