//! BD3-LM (arXiv 2503.09573): config keys, tensor names, and the adaLN fold; MDLM shares the weight layout.
//!
//! The published models run with `time_conditioning: false`: sigma is forced to 0, so the condition
//! `c = silu(W2 silu(W1 [cos 0 x 128, sin 0 x 128] + b1) + b2)` is one constant vector per model and every adaLN shift, scale and
//! gate is a constant per layer. They are folded at load:
//! `LN(x) w (1 + scale) + shift` is a LayerNorm with weight `w (1 + scale)` and bias `shift`; a gate multiplies the rows of the
//! projection it follows, and that projection's bias.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::{Backend, HeadShape};
use crate::config::{Attention, Family, Keys, ModelConfig};
use crate::error::Result;
use crate::model::{Layer, Model, Norm, Progress, unique};
use crate::weights::{Tensor, Weights};

/// Width of the sinusoidal timestep embedding, fixed in the published `TimestepEmbedder`.
const TIMESTEP_DIM: usize = 256;

/// Reads the published keys with the defaults of the published configuration class.
pub fn config(dir: &Path, keys: &Keys) -> Result<ModelConfig> {
    let block_size = keys.optional_size("block_size", 1 << 24)?.unwrap_or(1);
    let attention = if keys.flag("causal", false)? {
        Attention::Causal
    } else if keys.flag("cross_attn", true)? {
        Attention::BlockCausal(block_size)
    } else {
        Attention::Full
    };
    shared_config(dir, keys, Family::Bd3lm, attention)
}

/// The keys that BD3-LM and MDLM have in common.
pub(crate) fn shared_config(dir: &Path, keys: &Keys, family: Family, attention: Attention) -> Result<ModelConfig> {
    if keys.flag("time_conditioning", false)? {
        return Err(
            keys.error("key `time_conditioning` is true: only models without time conditioning are supported (their adaLN is constant)")
        );
    }
    let vocab_size = keys.size("vocab_size", 1 << 24)?;
    let hidden_dim = keys.size("hidden_dim", 1 << 16)?;
    let num_heads = keys.size("n_heads", 1 << 12)?;
    if !hidden_dim.is_multiple_of(num_heads) || !(hidden_dim / num_heads).is_multiple_of(2) {
        return Err(keys.error(format!("hidden_dim {hidden_dim} over n_heads {num_heads}: expected an even head width")));
    }
    if vocab_size < 3 {
        return Err(keys.error(format!("key `vocab_size`: expected at least 3 (a token, end of text, MASK), found {vocab_size}")));
    }
    // [BD3-LM] MASK is one past the tokenizer's ids, so the last row; GPT-2's end of text, which is also BOS, is the row before it.
    let mask_id = keys.token("mask_token_id", vocab_size)?.unwrap_or(vocab_size as u32 - 1);
    let eos_id = keys.token("eos_token_id", vocab_size)?.unwrap_or(vocab_size as u32 - 2);
    Ok(ModelConfig {
        family,
        dir: dir.to_path_buf(),
        vocab_size,
        hidden_dim,
        num_layers: keys.size("n_blocks", 1 << 10)?,
        heads: HeadShape { num_heads, num_kv_heads: num_heads, head_dim: hidden_dim / num_heads },
        mlp_dim: 4 * hidden_dim,
        norm_eps: 1e-5,
        rope_base: 10_000.0,
        model_length: keys.size("model_length", 1 << 24)?,
        attention,
        cond_dim: if keys.flag("adaln", true)? { Some(keys.size("cond_dim", 1 << 16)?) } else { None },
        mask_id,
        bos_id: keys.token("bos_token_id", vocab_size)?.unwrap_or(eos_id),
        eos_id,
        pad_id: keys.token("pad_token_id", vocab_size)?.filter(|id| *id != eos_id),
    })
}

/// Names and shapes of every tensor that [`load`] reads, in its order.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (c, f, v) = (config.hidden_dim, config.mlp_dim, config.vocab_size);
    let mut list: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| list.push((format!("backbone.{name}"), shape.to_vec()));
    if let Some(d) = config.cond_dim {
        for (layer, shape) in [(0, [d, TIMESTEP_DIM]), (2, [d, d])] {
            add(format!("sigma_map.mlp.{layer}.weight"), &shape);
            add(format!("sigma_map.mlp.{layer}.bias"), &[d]);
        }
    }
    add("vocab_embed.embedding".into(), &[v, c]);
    for i in 0..config.num_layers {
        if let Some(d) = config.cond_dim {
            add(format!("blocks.{i}.adaLN_modulation.weight"), &[6 * c, d]);
            add(format!("blocks.{i}.adaLN_modulation.bias"), &[6 * c]);
        }
        let leaves: [(&str, &[usize]); 8] = [
            ("mlp.2.bias", &[c]),
            ("norm1.weight", &[c]),
            ("attn_qkv.weight", &[3 * c, c]),
            ("attn_out.weight", &[c, c]),
            ("norm2.weight", &[c]),
            ("mlp.0.weight", &[f, c]),
            ("mlp.0.bias", &[f]),
            ("mlp.2.weight", &[c, f]),
        ];
        for (leaf, shape) in leaves {
            add(format!("blocks.{i}.{leaf}"), shape);
        }
    }
    if let Some(d) = config.cond_dim {
        add("output_layer.adaLN_modulation.weight".into(), &[2 * c, d]);
        add("output_layer.adaLN_modulation.bias".into(), &[2 * c]);
    }
    add("output_layer.norm_final.weight".into(), &[c]);
    add("output_layer.linear.weight".into(), &[v, c]);
    add("output_layer.linear.bias".into(), &[v]);
    list
}

/// Reads whole tensors and packs matrices, counting progress.
struct Reader<'a, B: Backend> {
    backend: &'a B,
    weights: &'a Weights,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

impl<B: Backend> Reader<'_, B> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        self.done += 1;
        (self.progress)(self.done, self.total);
        self.weights.tensor(name, shape)
    }

    fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])?.to_vec()
    }

    /// Packs an (n, k) weight, each row multiplied by its gate.
    fn matrix(&mut self, name: &str, n: usize, k: usize, gate: Option<&[f32]>) -> Result<B::Matrix> {
        let backend = self.backend;
        let tensor = self.tensor(name, &[n, k])?;
        let packed = backend.matrix(n, k, &mut |first, dst| {
            tensor.read(first * k, dst)?;
            if let Some(gate) = gate {
                for (row, gate) in dst.chunks_exact_mut(k).zip(&gate[first..]) {
                    row.iter_mut().for_each(|v| *v *= gate);
                }
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// LayerNorm weight under a (shift, scale) pair; plain where there is no adaLN.
    fn norm(&mut self, name: &str, width: usize, modulation: Option<(&[f32], &[f32])>) -> Result<Norm<B>> {
        let mut weight = self.values(name, width)?;
        let bias = match modulation {
            None => None,
            Some((shift, scale)) => {
                weight.iter_mut().zip(scale).for_each(|(w, s)| *w *= 1.0 + s);
                Some(self.backend.vector(shift)?)
            }
        };
        Ok(Norm { weight: self.backend.vector(&weight)?, bias })
    }

    /// `W c + b` for a modulation of `parts` vectors of `width`.
    fn modulation(&mut self, name: &str, condition: &[f64], parts: usize, width: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(&format!("{name}.weight"), &[parts * width, condition.len()])?;
        let weight = tensor.to_vec()?;
        let bias = self.values(&format!("{name}.bias"), parts * width)?;
        Ok(affine(&weight, &bias, condition).map(|v| v as f32).collect())
    }
}

/// `W x + b` in f64, row by row.
fn affine<'a>(weight: &'a [f32], bias: &'a [f32], x: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
    weight
        .chunks_exact(x.len())
        .zip(bias)
        .map(move |(row, b)| f64::from(*b) + row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Packs a BD3-LM or MDLM checkpoint. Errors name the missing or misshapen tensor.
pub(crate) fn load<B: Backend>(backend: &B, config: ModelConfig, weights: &Weights, progress: Progress) -> Result<Model<B>> {
    let (c, f, v) = (config.hidden_dim, config.mlp_dim, config.vocab_size);
    let expected = tensors(&config);
    // Shapes first: a checkpoint that does not fit is refused before anything is packed.
    for (name, shape) in &expected {
        weights.tensor(name, shape)?;
    }
    let mut r = Reader { backend, weights, progress, done: 0, total: expected.len() };

    let condition = match config.cond_dim {
        None => None,
        Some(d) => {
            // sigma = 0: every cosine is 1, every sine 0, cosines first.
            let mut timestep = vec![1.0f64; TIMESTEP_DIM / 2];
            timestep.resize(TIMESTEP_DIM, 0.0);
            let w1 = r.tensor("backbone.sigma_map.mlp.0.weight", &[d, TIMESTEP_DIM])?.to_vec()?;
            let b1 = r.values("backbone.sigma_map.mlp.0.bias", d)?;
            let w2 = r.tensor("backbone.sigma_map.mlp.2.weight", &[d, d])?.to_vec()?;
            let b2 = r.values("backbone.sigma_map.mlp.2.bias", d)?;
            let hidden: Vec<f64> = affine(&w1, &b1, &timestep).map(silu).collect();
            // The backbone applies SiLU once more to the embedder's output.
            Some(affine(&w2, &b2, &hidden).map(silu).collect::<Vec<f64>>())
        }
    };

    let embedding = r.tensor("backbone.vocab_embed.embedding", &[v, c])?;
    let table = backend.table(v, c, &mut |first, dst| embedding.read(first * c, dst))?;

    let mut layers = Vec::with_capacity(config.num_layers);
    for i in 0..config.num_layers {
        let name = |leaf: &str| format!("backbone.blocks.{i}.{leaf}");
        // Order of the chunks: shift, scale, gate for attention, then for the MLP.
        let modulation = match &condition {
            None => None,
            Some(condition) => Some(r.modulation(&name("adaLN_modulation"), condition, 6, c)?),
        };
        let part = |index: usize| modulation.as_ref().map(|m| &m[index * c..(index + 1) * c]);
        let pair = |index: usize| part(index).zip(part(index + 1));
        let mut down_bias = r.values(&name("mlp.2.bias"), c)?;
        if let Some(gate) = part(5) {
            down_bias.iter_mut().zip(gate).for_each(|(b, g)| *b *= g);
        }
        layers.push(Layer {
            attn_norm: r.norm(&name("norm1.weight"), c, pair(0))?,
            qkv: r.matrix(&name("attn_qkv.weight"), 3 * c, c, None)?,
            attn_out: r.matrix(&name("attn_out.weight"), c, c, part(2))?,
            mlp_norm: r.norm(&name("norm2.weight"), c, pair(3))?,
            up: r.matrix(&name("mlp.0.weight"), f, c, None)?,
            up_bias: {
                let bias = r.values(&name("mlp.0.bias"), f)?;
                backend.vector(&bias)?
            },
            down: r.matrix(&name("mlp.2.weight"), c, f, part(5))?,
            down_bias: backend.vector(&down_bias)?,
        });
    }

    let modulation = match &condition {
        None => None,
        Some(condition) => Some(r.modulation("backbone.output_layer.adaLN_modulation", condition, 2, c)?),
    };
    let final_norm = r.norm("backbone.output_layer.norm_final.weight", c, modulation.as_ref().map(|m| m.split_at(c)))?;
    let head = r.matrix("backbone.output_layer.linear.weight", v, c, None)?;
    let head_bias = r.values("backbone.output_layer.linear.bias", v)?;
    Ok(Model { id: unique(), config, table, layers, final_norm, head, head_bias: backend.vector(&head_bias)? })
}
