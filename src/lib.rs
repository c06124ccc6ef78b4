//! **redraft**: an embeddable inference engine for masked and block diffusion language models whose
//! signature is *draft-then-refine*. A draft is written with small diffusion blocks over a paged
//! K/V cache; the probability of each token at the forward that revealed it is kept (snapshot
//! confidence); the weakest tokens are masked again anywhere in the text; a global, bidirectional
//! pass regenerates them.
//!
//! ```no_run
//! use redraft::{Engine, Options};
//!
//! # fn main() -> redraft::Result<()> {
//! let mut engine = Engine::open("models/redraft-stories-10m")?;
//! let generation = engine.generate("Once upon a time", Options::default().length(128).seed(7))?;
//! println!("{}", generation.text);
//! # Ok(())
//! # }
//! ```
//!
//! # The path of data
//!
//! ```text
//! text -> tokenizer -> sequence (schedule) -> scheduler -> plan -> model on a Backend -> sample (sampling) -> canvas
//!                                                        | K/V                                   | block final
//!                                                        v                                       v
//!                                                      pages <------------- commit --------------+-> events, text
//! ```
//!
//! Leaves first; each module knows only those above it:
//!
//! | module | contains |
//! |---|---|
//! | [`error`], [`rng`], [`canvas`], [`pages`], [`plan`] | the error type; keyed randomness; a sequence's positions; page counting; one forward as data |
//! | [`config`], [`weights`], [`tokenizer`], [`chat`] | a checkpoint directory, validated |
//! | [`schedule`], [`sampling`] | what a request asks for; which token, which positions are unmasked, which masked again |
//! | [`backend`], [`cpu`], `cuda` | ops of a machine, runners of planned steps; the CPU; the CUDA backend |
//! | [`model`] | the forward pass and the families |
//! | [`sequence`], [`scheduler`], [`request`] | one request's life; which sequences advance; what callers hand in and get back |
//! | [`api`] | the public engine on a device chosen at run time, its requests, their streams |
//! | [`engine`], [`scoring`] | the tick; likelihoods, logits and timed forwards outside of any request |
//! | [`cli`] | the command line |
//!
//! The measures of text that `bench --quality` prints are the crate `redraft-evaluation`, which
//! knows no engine.
//!
//! # Sources
//!
//! | key in comments | |
//! |---|---|
//! | DiD | "Diffusion in Diffusion", arXiv 2601.13599 |
//! | BD3-LM | arXiv 2503.09573 |
//! | MDLM | arXiv 2406.07524 |
//! | LLaDA | arXiv 2502.09992 |
//! | Dream | arXiv 2508.15487 |
//! | Fast-dLLM | arXiv 2505.22618 |
//! | Fast-dLLM v2 | arXiv 2509.26328 |
//! | SDAR | arXiv 2510.06303 |
//! | ReMDM | arXiv 2503.00307 |

// What the library has to say it returns; the command writes to streams that may fail
// (`cli::terminal`).
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod api;
pub mod backend;
pub mod canvas;
pub mod chat;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod engine;
pub mod error;
mod input_file;
pub mod model;
pub mod pages;
pub mod plan;
pub mod request;
pub mod rng;
pub mod sampling;
pub mod schedule;
pub mod scheduler;
pub mod scoring;
pub mod sequence;
pub mod tokenizer;
pub mod weights;

pub use api::{Device, Engine, EngineBuilder, EngineThread, Generation, Options, Prompt, RequestHandle, Snapshot, TextEvent, TextStream};
pub use backend::{Backend, DType};
pub use chat::Message;
pub use cpu::Cpu;
pub use engine::EngineOptions;
pub use error::{Error, Result};
pub use request::{Output, Segment, Timings};
pub use schedule::{Defaults, Schedule, Stage, StageSpec};
pub use scheduler::Budget;
pub use sequence::{Event, EventKind, Finish, StageReport};
pub use tokenizer::Tokenizer;
