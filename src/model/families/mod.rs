//! Families of checkpoints, one file each: names, config keys, and what the tensors are called.
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
pub mod mistral;
pub mod qwen2;
pub mod qwen3;
pub mod qwen3_moe;
pub mod rnd1;
pub mod sdar;
pub mod sdar_moe;
pub mod stable_diffcoder;
