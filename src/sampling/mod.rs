//! Sampling of masked rows: the plain data that backends, schedules and rules share.
#![forbid(unsafe_code)]

pub mod types;

pub use types::{Decision, Draw, Rank, Reveal, Score, TopK, TopKOrder, TopPRule, Unmask, top_k_of, valid_temperature, valid_top_p};
