//! Published shapes by name, for benches with random weights.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::backend::{HeadShape, NormKind, Rope};
use crate::config::{AttentionMask, DecoderFlags, Mlp, ModelConfig, SamplingDefaults};
use crate::error::{Error, Result};
use crate::model::families::{bd3lm, sdar};

/// Names that [`config`] knows.
pub const NAMES: [&str; 3] = ["bd3lm-owt", "sdar-8b", "tiny"];

/// The configuration of a named shape. Errors list the names.
pub fn config(name: &str) -> Result<ModelConfig> {
    match name {
        // [BD3-LM] B.1: 12 layers of 768 over GPT-2's vocabulary and MASK, 169.6M parameters.
        "bd3lm-owt" => Ok(bd3lm_shape(name, 50258, 768, 12, 12, 1024)),
        "tiny" => Ok(bd3lm_shape(name, 512, 64, 2, 1, 128)),
        "sdar-8b" => Ok(sdar_8b()),
        _ => Err(Error::request(format!("unknown shape `{name}`; shapes: {}", NAMES.join(", ")))),
    }
}

fn bd3lm_shape(name: &str, vocab_size: usize, hidden_dim: usize, num_layers: usize, num_heads: usize, model_length: usize) -> ModelConfig {
    ModelConfig {
        family: &bd3lm::FAMILY,
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
        attention: AttentionMask::BlockCausal(4),
        shift: false,
        cond_dim: Some(128),
        mask_id: Some(vocab_size as u32 - 1),
        bos_id: Some(vocab_size as u32 - 2),
        eos_id: Some(vocab_size as u32 - 2),
        stop_ids: vec![vocab_size as u32 - 2],
        pad_id: None,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    }
}

/// SDAR-8B (arXiv 2510.06303), which has the shape of Qwen3-8B: 8.2 billion parameters, 16.4 GB in
/// bf16.
fn sdar_8b() -> ModelConfig {
    ModelConfig {
        family: &sdar::FAMILY,
        dir: PathBuf::from("random sdar-8b"),
        vocab_size: 151_936,
        hidden_dim: 4096,
        num_layers: 36,
        heads: HeadShape { num_heads: 32, num_kv_heads: 8, head_dim: 128 },
        mlp_dim: 12_288,
        moe: None,
        norm_eps: 1e-6,
        rope: Rope::plain(1e6),
        switches: DecoderFlags {
            norm: NormKind::Rms,
            mlp: Mlp::SwiGlu,
            qkv_bias: false,
            attn_out_bias: false,
            mlp_bias: false,
            head_bias: false,
            qk_norm: true,
            tied_head: false,
            learned_positions: false,
        },
        model_length: 32_768,
        sliding_window: None,
        attention: AttentionMask::BlockCausal(4),
        shift: false,
        cond_dim: None,
        mask_id: Some(151_669),
        bos_id: Some(151_643),
        eos_id: Some(151_643),
        stop_ids: vec![151_643],
        pad_id: None,
        sampling: SamplingDefaults::default(),
        guessed_block_len: false,
        warnings: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As published: 169.6 million and 8.19 billion.
    #[test]
    fn parameters_are_those_of_the_published_models() {
        let count = |name: &str| -> usize {
            let ModelConfig { vocab_size, hidden_dim: c, num_layers, heads, mlp_dim, switches, .. } = config(name).unwrap();
            let products = if switches.mlp == Mlp::SwiGlu { 3 } else { 2 };
            let layer = c * heads.qkv_width() + heads.q_width() * c + products * c * mlp_dim;
            // Embedding and head, without norms, biases and conditioning.
            2 * vocab_size * c + num_layers * layer
        };
        assert_eq!(count("sdar-8b") / 1_000_000, 8190);
        assert_eq!(count("bd3lm-owt") / 1_000_000, 162);
        let text = config("huge").unwrap_err().to_string();
        assert!(text.contains("bd3lm-owt, sdar-8b, tiny"), "{text}");
    }
}
