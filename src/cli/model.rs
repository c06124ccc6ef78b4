//! `redraft forward` and `inspect`: commands about a model rather than a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::api::device::on_backend;
use crate::backend::{NormKind, RopeScaling};
use crate::cli::device::DeviceFlags;
use crate::cli::files::{model_dir, read_text, write_atomically};
use crate::cli::flags::Format;
use crate::cli::terminal::print;
use crate::config::{AttentionMask, Mlp, ModelConfig, Moe};
use crate::engine::Engine;
use crate::error::{Error, Result, Shown};
use crate::gguf;
use crate::gguf::model::TensorKind;
use crate::model::registry;
use crate::plan::Visibility;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

#[derive(Args)]
pub(super) struct ForwardFlags {
    /// Model directory or GGUF file [default: the model that ships]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Token ids, comma separated
    #[arg(long, value_name = "1,2,3", required_unless_present = "tokens_file", conflicts_with = "tokens_file", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// JSON array of token ids
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<PathBuf>,
    /// Visibility: a block length, or full [default: what the model was trained with]
    #[arg(long, value_name = "N|full", value_parser = parse_block_len)]
    block_len: Option<BlockLen>,
    /// Where the f32 tensor `logits` [T, V] goes, as safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceFlags,
}

#[derive(Clone, Copy)]
pub(super) struct BlockLen(Option<usize>);

impl BlockLen {
    pub(super) fn visibility(self) -> Visibility {
        self.0.map_or(Visibility::Full, Visibility::BlockCausal)
    }
}

pub(super) fn parse_block_len(text: &str) -> Result<BlockLen, String> {
    if text == "full" {
        return Ok(BlockLen(None));
    }
    text.parse().ok().filter(|n| *n > 0).map(|n| BlockLen(Some(n))).ok_or_else(|| "expected a block length of at least 1, or full".into())
}

pub(super) fn forward(flags: ForwardFlags) -> Result<()> {
    let dir = model_dir(flags.model.as_deref())?;
    let tokens = match &flags.tokens_file {
        None => flags.tokens.clone(),
        Some(path) => serde_json::from_str(&read_text(path)?)
            .map_err(|e| Error::io(path, &std::io::Error::other(format!("expected a JSON array of token ids: {e}"))))?,
    };
    let config = registry::read_config(&dir)?;
    Engine::<crate::cpu::Cpu>::check_tokens(&config, &tokens)?;
    let visibility = flags.block_len.map_or(config.attention.visibility(), BlockLen::visibility);
    let mut data = Vec::new();
    let bytes = tokens.len().saturating_mul(config.vocab_size).saturating_mul(4);
    data.try_reserve_exact(bytes).map_err(|e| Error::request(format!("logits of {} tokens are {bytes} bytes: {e}", tokens.len())))?;
    on_backend!(flags.device.backend(Some(&dir))?, |backend| {
        flags.device.engine(backend, &dir, None, tokens.len(), 1)?.logits(&tokens, visibility, &mut |_, logits| {
            data.extend(logits.iter().flat_map(|l| l.to_le_bytes()));
            Ok(())
        })?
    });
    let shape = vec![tokens.len(), config.vocab_size];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &data).map_err(|e| Error::kernel(e.to_string()))?;
    let bytes = safetensors::serialize([("logits", view)], None).map_err(|e| Error::kernel(e.to_string()))?;
    write_atomically(&flags.out, |out| out.write_all(&bytes))
}

#[derive(Args)]
pub(super) struct InspectFlags {
    /// Model directory or GGUF file [default: the model that ships]
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// table or json
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

pub(super) fn inspect(flags: InspectFlags) -> Result<()> {
    let dir = model_dir(flags.dir.as_deref())?;
    let config = registry::read_config(&dir)?;
    let weights = Weights::open(&dir)?;
    let tokenizer = Tokenizer::of(&dir, config.vocab_size, config.mask_id);
    let summary = gguf::summary(&dir)?;
    let problems = registry::check(&config, &weights);
    let attention = match config.attention {
        AttentionMask::BlockCausal(block_len) if config.guessed_block_len => format!("block-causal, block length {block_len} (a guess)"),
        AttentionMask::BlockCausal(block_len) => format!("block-causal, published block length {block_len}"),
        AttentionMask::Full => "full".into(),
        AttentionMask::Causal => "causal: generates left to right, one token a forward (`--preset ar`); a judge for `score`".into(),
    };
    let warnings: Vec<String> = config.warnings.iter().map(|warning| Shown::line(warning).to_string()).collect();
    let mut unsupported: Vec<String> = problems.iter().map(ToString::to_string).collect();
    unsupported.extend(tokenizer.as_ref().err().map(ToString::to_string));
    let kv = |bytes| config.kv_bytes_per_token(bytes);
    let huge_pages = crate::cpu::topology::huge_pages();
    let parameters = weights.num_elements();
    let rope = match config.rope.scaling {
        RopeScaling::None => format!("base {}", config.rope.base),
        RopeScaling::Linear { factor } => format!("base {}, linear scaling by {factor}", config.rope.base),
        RopeScaling::Llama3 { factor, .. } => format!("base {}, llama3 scaling by {factor}", config.rope.base),
    };
    let rope = match config.rope.width {
        Some(0) => "none, positions are learned".into(),
        Some(width) => format!("{rope}, {width} elements of a head"),
        None => rope,
    };
    let switches = config.switches;
    let id = |id: Option<u32>| id.map_or("none".into(), |id| id.to_string());
    if flags.format == Format::Json {
        let mut object = json!({
            "dir": dir.display().to_string(), "family": config.family.name, "parameters": parameters, "bytes": weights.num_bytes(),
            "dtypes": weights.dtypes(), "vocab_size": config.vocab_size, "hidden_dim": config.hidden_dim, "num_layers": config.num_layers,
            "num_heads": config.heads.num_heads, "num_kv_heads": config.heads.num_kv_heads, "head_dim": config.heads.head_dim,
            "mlp_dim": config.mlp_dim, "experts": experts(&config), "model_length": config.model_length, "attention": attention, "adaln": config.cond_dim.is_some(),
            "norm": match config.switches.norm { NormKind::Layer => "layer", NormKind::Rms => "rms" },
            "mlp": match config.switches.mlp { Mlp::Gelu => "gelu", Mlp::SwiGlu => "swiglu" },
            "qk_norm": config.switches.qk_norm, "tied_head": config.switches.tied_head, "shift": config.shift,
            "rope": rope,
            "mask_id": config.mask_id, "bos_id": config.bos_id, "eos_id": config.eos_id, "pad_id": config.pad_id,
            "kv_bytes_per_token": {"f32": kv(4), "bf16": kv(2)}, "unsupported": unsupported,
            "stop_ids": config.stop_ids, "warnings": warnings, "huge_pages": huge_pages,
        });
        if let Some(summary) = &summary {
            let tensors = summary
                .tensors
                .iter()
                .map(|t| json!({"name": t.name, "type": t.kind, "count": t.count, "elements": t.num_elements, "bytes": t.num_bytes}));
            object["gguf"] = json!({
                "name": summary.name, "version": summary.version, "files": summary.num_files, "architecture": summary.architecture,
                "tokenizer": summary.tokenizer, "tensors": tensors.collect::<Vec<_>>(),
            });
        }
        print(&format!("{object}\n"))?;
        return Ok(());
    }
    let mut inside = vec![
        match switches.norm {
            NormKind::Layer => "LayerNorm",
            NormKind::Rms => "RMSNorm",
        },
        match switches.mlp {
            Mlp::Gelu => "GELU",
            Mlp::SwiGlu => "SwiGLU",
        },
    ];
    let optional = [
        (switches.qkv_bias, "q/k/v bias"),
        (switches.qk_norm, "q/k norm"),
        (switches.tied_head, "tied head"),
        (config.shift, "shifted logits"),
    ];
    inside.extend(optional.iter().filter(|(on, _)| *on).map(|(_, name)| *name));
    let inside = inside.join(", ");
    let mut layers = format!("{} of width {}", config.num_layers, config.hidden_dim);
    if config.mlp_dim > 0 {
        layers += &format!(", MLP {}", config.mlp_dim);
    }
    if let Some(Moe { shape, shared_dim, sparse, .. }) = &config.moe {
        let count = sparse.iter().filter(|sparse| **sparse).count();
        layers += &format!(", {} of {} experts of {} in {count} of them", shape.top_k, shape.num_experts, shape.expert_dim);
        layers += &shared_dim.map_or(String::new(), |width| format!(", {width} shared"));
    }
    let mut rows = vec![
        (if summary.is_some() { "file" } else { "directory" }, dir.display().to_string()),
        ("family", config.family.name.into()),
        ("parameters", format!("{parameters} (buffers included), {} as {}", mib(weights.num_bytes()), weights.dtypes().join(", "))),
        ("layers", layers),
        ("heads", format!("{} (K/V {}) of {}", config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim)),
        ("inside", inside),
        ("rotation", rope),
        (
            "vocabulary",
            format!("{}; MASK {}, BOS {}, end of text {}", config.vocab_size, id(config.mask_id), id(config.bos_id), id(config.eos_id)),
        ),
        ("attention", attention),
        ("positions", format!("{} trained, up to {} served", config.model_length, config.max_len())),
        ("adaLN", config.cond_dim.map_or("none".into(), |d| format!("constant condition of width {d}, folded at load"))),
        ("K/V per token", format!("{} bytes in f32, {} in bf16", kv(4), kv(2))),
        ("K/V per sequence", format!("{} in f32, {} in bf16", mib(kv(4) * config.model_length), mib(kv(2) * config.model_length))),
        (
            "huge pages",
            match huge_pages.as_deref() {
                Some("never") => "the system gives none".into(),
                Some(word) => format!("for weights of 8 MiB and more (the system's choice: {word})"),
                None => "not known to this system".into(),
            },
        ),
        ("warnings", if warnings.is_empty() { "none".into() } else { warnings.join("; ") }),
        ("unsupported", if unsupported.is_empty() { "nothing".into() } else { unsupported.join("; ") }),
    ];
    if let Some(summary) = summary {
        let files = if summary.num_files == 1 { String::new() } else { format!(" in {} files", summary.num_files) };
        let tokenizer = summary.tokenizer.map_or("none".into(), |kind| Shown::line(&kind).to_string());
        rows.push(("GGUF", format!("version {}{files}, architecture {}", summary.version, summary.architecture)));
        rows.push(("tokenizer", tokenizer));
        for (i, TensorKind { name, kind, count, num_elements, num_bytes }) in summary.tensors.iter().enumerate() {
            let bits = *num_bytes as f64 * 8.0 / *num_elements as f64;
            let name = Shown::line(name).to_string();
            let label = if i == 0 { "tensors" } else { "" };
            rows.push((label, format!("{name:<24} {kind:<5} {count:>4} times, {:>9}, {bits:.2} bits a value", mib(*num_bytes))));
        }
    }
    let table: String = rows.iter().map(|(name, value)| format!("{name:<17} {value}\n")).collect();
    print(&table)?;
    Ok(())
}

/// The experts of a layer, null where there are none.
fn experts(config: &ModelConfig) -> Value {
    config.moe.as_ref().map_or(Value::Null, |Moe { shape, shared_dim, sparse, .. }| {
        json!({
            "num_experts": shape.num_experts, "top_k": shape.top_k, "expert_dim": shape.expert_dim, "shared_dim": shared_dim,
            "num_layers": sparse.iter().filter(|sparse| **sparse).count(),
        })
    })
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
