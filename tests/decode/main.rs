//! Invariants of decoding: a sequence over a symbolic network, where a stale or unwritten slot
//! cannot hide, and the engine over real checkpoints, where a result must depend on the request
//! alone and every forward and row is accounted for.

mod autoregressive;
mod counts;
mod ends;
mod failing;
mod gone;
mod invariants;
mod joint;
mod sharing;
mod sizes;
mod support;
mod symbolic;
mod toy;
