//! Parity with the official networks and their sampler: hidden states after every layer, logits,
//! likelihoods, autoregressive texts and whole draft-then-refine traces of every checkpoint under
//! `tests/fixtures`. See the README there for the files' schema.
//!
//! `cargo test --test parity -- --nocapture` prints the worst relative error per case and layer.

mod autoregressive;
mod decodes;
mod fixture;
mod golden;
mod joint;
mod traces;
