//! Names of tensors: from llama.cpp's to those of a directory, and what is merged there apart.
//!
//! A file has `blk.3.attn_q.weight` for a directory's `model.layers.3.self_attn.q_proj.weight`. The
//! experts of a layer are one tensor of three dimensions, q, k and v may be one, and so may the
//! gates and the rest of the experts: each is rows of a file's tensor.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::gguf::architecture::{Architecture, Layout};
use crate::gguf::container::{TensorInfo, TensorType};

/// Query heads, K/V heads, and the width of each.
#[derive(Clone, Copy)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

/// In what order the rows of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    Plain,
    /// In each head of so many rows, row j of the first half and row j of the second lie one after
    /// the other.
    Interleaved {
        head_dim: usize,
    },
}

/// A tensor of a directory, in a file.
pub struct Leaf {
    pub name: String,
    pub shape: Vec<usize>,
    pub bytes: Range<usize>,
    pub order: RowOrder,
}

type Checked<T> = Result<T, String>;

/// What a tensor beside the layers is called.
fn whole_name(layout: Layout, stem: &str) -> Option<&'static str> {
    Some(match (layout, stem) {
        (Layout::HuggingFace, "token_embd") => "model.embed_tokens",
        (Layout::HuggingFace, "output_norm") => "model.norm",
        (Layout::HuggingFace, "output") => "lm_head",
        (Layout::Llada, "token_embd") => "model.transformer.wte",
        (Layout::Llada, "output_norm") => "model.transformer.ln_f",
        (Layout::Llada, "output") => "model.transformer.ff_out",
        _ => return None,
    })
}

/// What a tensor in a layer is called.
fn layer_name(layout: Layout, stem: &str) -> Option<&'static str> {
    Some(match (layout, stem) {
        (Layout::HuggingFace, "attn_norm") => "input_layernorm",
        (Layout::HuggingFace, "attn_q") => "self_attn.q_proj",
        (Layout::HuggingFace, "attn_k") => "self_attn.k_proj",
        (Layout::HuggingFace, "attn_v") => "self_attn.v_proj",
        (Layout::HuggingFace, "attn_q_norm") => "self_attn.q_norm",
        (Layout::HuggingFace, "attn_k_norm") => "self_attn.k_norm",
        (Layout::HuggingFace, "attn_output") => "self_attn.o_proj",
        (Layout::HuggingFace, "ffn_norm") => "post_attention_layernorm",
        (Layout::HuggingFace, "ffn_gate") => "mlp.gate_proj",
        (Layout::HuggingFace, "ffn_up") => "mlp.up_proj",
        (Layout::HuggingFace, "ffn_down") => "mlp.down_proj",
        (Layout::HuggingFace, "ffn_gate_inp") => "mlp.gate",
        (Layout::Llada, "attn_norm") => "attn_norm",
        (Layout::Llada, "attn_q") => "q_proj",
        (Layout::Llada, "attn_k") => "k_proj",
        (Layout::Llada, "attn_v") => "v_proj",
        (Layout::Llada, "attn_output") => "attn_out",
        (Layout::Llada, "ffn_norm") => "ff_norm",
        (Layout::Llada, "ffn_gate") => "ff_proj",
        (Layout::Llada, "ffn_up") => "up_proj",
        (Layout::Llada, "ffn_down") => "ff_out",
        _ => return None,
    })
}

/// Tensors of a directory that a tensor of a file holds.
///
/// Errors: a name that the architecture has not, or another number of dimensions or rows.
pub fn leaves(architecture: &Architecture, heads: &Heads, tensor: &TensorInfo) -> Checked<Vec<Leaf>> {
    let unknown = || format!("not a tensor of architecture {}", architecture.name);
    let (stem, end) = tensor.name.rsplit_once('.').filter(|(_, end)| ["weight", "bias"].contains(end)).ok_or_else(unknown)?;
    let layout = architecture.layout;
    let rows = Rows::of(tensor)?;
    if let Some(name) = whole_name(layout, stem) {
        return Ok(vec![rows.all(format!("{name}.{end}"), tensor, RowOrder::Plain)?]);
    }
    let (layer, stem) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
    // One spelling of each number, so that no two tensors have one name.
    let layer: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer).ok_or_else(unknown)?;
    let layers = if layout == Layout::Llada { "model.transformer.blocks" } else { "model.layers" };
    let full = |leaf: &str| format!("{layers}.{layer}.{leaf}.{end}");
    let order = |stem: &str| match stem {
        "attn_q" | "attn_k" if architecture.neighbours_rotate => RowOrder::Interleaved { head_dim: heads.head_dim },
        _ => RowOrder::Plain,
    };
    let named = |stem: &str| layer_name(layout, stem).ok_or_else(unknown);
    match stem {
        "attn_qkv" => {
            let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
            if rows.count != q + 2 * kv || rows.stacks != 1 {
                return Err(format!("expected {} rows of q, k and v, found {}", q + 2 * kv, rows.count * rows.stacks));
            }
            let parts = [("attn_q", 0..q), ("attn_k", q..q + kv), ("attn_v", q + kv..q + 2 * kv)];
            parts.into_iter().map(|(stem, range)| Ok(rows.some(full(named(stem)?), tensor, 0, range, order(stem)))).collect()
        }
        "ffn_gate_exps" | "ffn_up_exps" | "ffn_down_exps" | "ffn_gate_up_exps" if architecture.experts && end == "weight" => {
            if tensor.dims.len() != 3 {
                return Err(format!("expected three dimensions, the last of experts, found {:?}", tensor.dims));
            }
            let parts: &[(&str, Range<usize>)] = match stem {
                "ffn_gate_exps" => &[("gate_proj", 0..rows.count)],
                "ffn_up_exps" => &[("up_proj", 0..rows.count)],
                "ffn_down_exps" => &[("down_proj", 0..rows.count)],
                _ if rows.count.is_multiple_of(2) => &[("gate_proj", 0..rows.count / 2), ("up_proj", rows.count / 2..rows.count)],
                _ => return Err(format!("expected an even number of rows, those of gate and up, found {}", rows.count)),
            };
            let experts = (0..rows.stacks).flat_map(|expert| parts.iter().map(move |(leaf, range)| (expert, leaf, range.clone())));
            let name = |expert: usize, leaf: &str| full(&format!("mlp.experts.{expert}.{leaf}"));
            Ok(experts.map(|(expert, leaf, range)| rows.some(name(expert, leaf), tensor, expert, range, RowOrder::Plain)).collect())
        }
        _ => Ok(vec![rows.all(full(named(stem)?), tensor, order(stem))?]),
    }
}

/// Rows of a tensor: `stacks` times `count` of `width` values; a vector's values are its rows.
struct Rows {
    width: usize,
    count: usize,
    stacks: usize,
    is_vector: bool,
    /// Bytes of a row.
    bytes: usize,
}

impl Rows {
    fn of(tensor: &TensorInfo) -> Checked<Rows> {
        let dim = |i: usize| tensor.dims.get(i).copied().unwrap_or(1);
        let is_vector = tensor.dims.len() == 1;
        let (width, count, stacks) = if is_vector { (1, dim(0), 1) } else { (dim(0), dim(1), dim(2) * dim(3)) };
        if is_vector && matches!(tensor.kind, TensorType::Blocks(_)) {
            return Err(format!("a vector of type {}: expected F32, F16 or BF16", tensor.kind.name()));
        }
        Ok(Rows { width, count, stacks, is_vector, bytes: tensor.bytes.len() / (count * stacks) })
    }

    /// The whole tensor: a vector, or a matrix.
    fn all(&self, name: String, tensor: &TensorInfo, order: RowOrder) -> Checked<Leaf> {
        if self.stacks != 1 {
            return Err(format!("expected at most two dimensions, found {:?}", tensor.dims));
        }
        if let RowOrder::Interleaved { head_dim } = order
            && !self.count.is_multiple_of(head_dim)
        {
            return Err(format!("expected rows of whole heads of {head_dim}, found {}", self.count));
        }
        Ok(self.some(name, tensor, 0, 0..self.count, order))
    }

    /// Rows of one of the stacks.
    fn some(&self, name: String, tensor: &TensorInfo, stack: usize, rows: Range<usize>, order: RowOrder) -> Leaf {
        let first = tensor.bytes.start + (stack * self.count + rows.start) * self.bytes;
        let shape = if self.is_vector { vec![rows.len()] } else { vec![rows.len(), self.width] };
        Leaf { name, shape, bytes: first..first + rows.len() * self.bytes, order }
    }
}
