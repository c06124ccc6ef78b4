//! What a request asks for: stages, the schedules made of them, and the presets.
//!
//! ```text
//! block=4,unmask=uniform:1                                  a draft
//! block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=refresh:12
//! ```
#![forbid(unsafe_code)]

mod parse;
mod presets;
mod stage;

pub use parse::StageSpec;
pub use presets::{PRESETS, Schedule};
pub use stage::{Bans, Defaults, Edit, Eos, KvPolicy, MAX_MODELS, Remask, RemaskBy, Scope, Stage};
