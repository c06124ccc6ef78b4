//! Published shapes by name, for benches with random weights.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::backend::{HeadShape, Rope};
use crate::config::{Attention, Family, ModelConfig, Sampling};
use crate::error::{Error, Result};
use crate::model::bd3lm;

/// Names that [`config`] knows.
pub const NAMES: [&str; 2] = ["bd3lm-owt", "tiny"];

/// The configuration of a named shape. Errors list the names.
pub fn config(name: &str) -> Result<ModelConfig> {
    // [BD3-LM] B.1: 12 layers of 768 over GPT-2's vocabulary and MASK, 169.6M parameters.
    let (vocab_size, hidden_dim, num_layers, num_heads, model_length) = match name {
        "bd3lm-owt" => (50258, 768, 12, 12, 1024),
        "tiny" => (512, 64, 2, 1, 128),
        _ => return Err(Error::request(format!("unknown shape `{name}`; shapes: {}", NAMES.join(", ")))),
    };
    Ok(ModelConfig {
        family: Family::Bd3lm,
        dir: PathBuf::from(format!("random {name}")),
        vocab_size,
        hidden_dim,
        num_layers,
        heads: HeadShape { num_heads, num_kv_heads: num_heads, head_dim: hidden_dim / num_heads },
        mlp_dim: 4 * hidden_dim,
        moe: None,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        switches: bd3lm::SWITCHES,
        model_length,
        sliding_window: None,
        attention: Attention::BlockCausal(4),
        shift: false,
        cond_dim: Some(128),
        mask_id: Some(vocab_size as u32 - 1),
        bos_id: Some(vocab_size as u32 - 2),
        eos_id: Some(vocab_size as u32 - 2),
        stop_ids: vec![vocab_size as u32 - 2],
        pad_id: None,
        sampling: Sampling::default(),
    })
}
