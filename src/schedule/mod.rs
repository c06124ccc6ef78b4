//! What a request asks for: stages, the schedules made of them, and the presets.
//!
//! ```text
//! block=4,unmask=uniform:1                                  a draft
//! block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=refresh:12
//! ```
#![forbid(unsafe_code)]

mod keys;
mod presets;
mod spec;
mod stage;

#[cfg(feature = "testing")]
pub use keys::{STAGE_KEYS, StageKey};
pub use presets::{PRESETS, Preset, Schedule};
pub use spec::StageSpec;
pub use stage::{
    Bans, BlockLen, BlockOrigin, Blocks, Decoding, Defaults, Edit, Eos, ExactKv, JointChoice, KvPolicy, LastBlock, MAX_MODELS, Remask,
    SamplingParams, Scope, Stage,
};
