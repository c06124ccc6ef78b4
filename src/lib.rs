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
//! | `error`, `rng`, `canvas`, `pages`, `plan` | the error type; keyed randomness; a sequence's positions; page counting; one forward as data |
//! | `gguf` | a checkpoint in one file of llama.cpp, in the words of a directory |
//! | `file_bytes`, `packed_weights` | a file that is mapped; weights of 8 and 4 bits in files |
//! | `config`, `weights`, `tokenizer`, `chat` | a checkpoint, validated |
//! | `schedule`, `sampling` | what a request asks for; which token, which positions are unmasked, which masked again |
//! | `backend`, `cpu`, `cuda` | ops of a machine, runners of planned steps; the CPU; the CUDA backend |
//! | `model` | the forward pass and the families |
//! | `sequence`, `scheduler`, `request` | one request's life; which sequences advance; what callers hand in and get back |
//! | `api` | the public engine on a device chosen at run time, its requests, their streams |
//! | `engine`, `scoring` | the tick; likelihoods, logits and timed forwards outside of any request |
//! | `serve` | the HTTP server |
//! | `cli` | the command line |
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
// What a caller can reach is documented and has a name. The feature `testing` opens the rest, of
// which some is there for tests alone.
#![cfg_attr(not(feature = "testing"), warn(missing_docs, unnameable_types), allow(dead_code, unused_imports))]

pub mod sampling;
pub mod schedule;

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod file_bytes;
mod input_file;
#[cfg(feature = "serve")]
mod serve;

// The modules behind the public items. Tests and benches reach into them by the feature `testing`,
// which the package turns on for itself alone (`[dev-dependencies]`).
#[cfg(not(feature = "testing"))]
mod api;
#[cfg(feature = "testing")]
pub mod api;
#[cfg(not(feature = "testing"))]
mod backend;
#[cfg(feature = "testing")]
pub mod backend;
#[cfg(not(feature = "testing"))]
mod canvas;
#[cfg(feature = "testing")]
pub mod canvas;
#[cfg(not(feature = "testing"))]
mod chat;
#[cfg(feature = "testing")]
pub mod chat;
#[cfg(not(feature = "testing"))]
mod config;
#[cfg(feature = "testing")]
pub mod config;
#[cfg(not(feature = "testing"))]
mod cpu;
#[cfg(feature = "testing")]
pub mod cpu;
#[cfg(all(feature = "cuda", not(feature = "testing")))]
mod cuda;
#[cfg(all(feature = "cuda", feature = "testing"))]
pub mod cuda;
#[cfg(not(feature = "testing"))]
mod engine;
#[cfg(feature = "testing")]
pub mod engine;
#[cfg(not(feature = "testing"))]
mod error;
#[cfg(feature = "testing")]
pub mod error;
#[cfg(not(feature = "testing"))]
mod gguf;
#[cfg(feature = "testing")]
pub mod gguf;
#[cfg(not(feature = "testing"))]
mod model;
#[cfg(feature = "testing")]
pub mod model;
#[cfg(not(feature = "testing"))]
mod packed_weights;
#[cfg(feature = "testing")]
pub mod packed_weights;
#[cfg(not(feature = "testing"))]
mod pages;
#[cfg(feature = "testing")]
pub mod pages;
#[cfg(not(feature = "testing"))]
mod plan;
#[cfg(feature = "testing")]
pub mod plan;
#[cfg(not(feature = "testing"))]
mod request;
#[cfg(feature = "testing")]
pub mod request;
#[cfg(not(feature = "testing"))]
mod rng;
#[cfg(feature = "testing")]
pub mod rng;
#[cfg(not(feature = "testing"))]
mod scheduler;
#[cfg(feature = "testing")]
pub mod scheduler;
#[cfg(not(feature = "testing"))]
mod scoring;
#[cfg(feature = "testing")]
pub mod scoring;
#[cfg(not(feature = "testing"))]
mod sequence;
#[cfg(feature = "testing")]
pub mod sequence;
#[cfg(not(feature = "testing"))]
mod tokenizer;
#[cfg(feature = "testing")]
pub mod tokenizer;
#[cfg(not(feature = "testing"))]
mod weights;
#[cfg(feature = "testing")]
pub mod weights;

pub use api::json;
pub use api::{
    Device, Engine, EngineBuilder, EngineThread, Generation, ModelInfo, Options, Prompt, Quantized, RequestHandle, Snapshot, TextEvent,
    TextStream, quantize,
};
pub use backend::{DType, WeightFormat};
pub use chat::{Conversation, Message};
pub use engine::EngineStats;
pub use error::{Error, Result};
pub use plan::Visibility;
pub use request::{Bos, Output, Segment, Timings};
pub use schedule::{Defaults, Schedule, Stage, StageSpec};
pub use sequence::{Event, EventKind, Finish, Forwards, StageReport};
pub use tokenizer::{AddedToken, Tokenizer};
#[cfg(feature = "testing")]
pub use {backend::Backend, cpu::Cpu, engine::EngineOptions, scheduler::Budget};

/// The Rust of a page compiles.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
