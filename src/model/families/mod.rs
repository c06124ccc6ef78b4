//! Families of checkpoints, one file each.
#![forbid(unsafe_code)]

pub mod bd3lm;
pub mod dream;
pub mod fast_dllm;
pub mod gpt2;
pub mod llada;
pub mod llada2;
pub mod llada_moe;
pub mod llama;
pub mod mdlm;
pub mod qwen3_moe;
pub mod sdar;
pub mod stable_diffcoder;
