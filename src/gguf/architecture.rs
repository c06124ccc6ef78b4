//! Architectures that are read: what `general.architecture` names, in the words of Hugging Face.
#![forbid(unsafe_code)]

/// A row of [`ARCHITECTURES`].
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// What `general.architecture` says; metadata keys begin with it.
    pub name: &'static str,
    /// `model_type` and `architectures` of a published config.json.
    pub model_type: &'static str,
    pub class: &'static str,
    /// Names of tensors, and of the keys of config.json.
    pub layout: Layout,
    /// Rows of q and k are stored so that neighbours rotate together; in a directory, the halves of
    /// a head do.
    pub neighbours_rotate: bool,
    /// Whether layers may have experts.
    pub experts: bool,
    pub attention: Attention,
}

/// What tensors and keys are called in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As Hugging Face's own classes have it.
    HuggingFace,
    /// As LLaDA's class has it.
    Llada,
}

/// What a position sees, and which logits are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// An autoregressive model.
    Causal,
    /// A diffusion model; `shifted` where row i predicts position i + 1.
    Full { shifted: bool },
}

/// Classes and rotations are those of llama.cpp's converters (`conversion/*.py`), names those of
/// `src/llama-arch.cpp`.
pub static ARCHITECTURES: [Architecture; 8] = [
    Architecture {
        name: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        layout: Layout::HuggingFace,
        neighbours_rotate: true,
        experts: false,
        attention: Attention::Causal,
    },
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: false,
        attention: Attention::Causal,
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: false,
        attention: Attention::Causal,
    },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: true,
        attention: Attention::Causal,
    },
    Architecture {
        name: "dream",
        model_type: "Dream",
        class: "DreamModel",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: false,
        attention: Attention::Full { shifted: true },
    },
    Architecture {
        name: "llada",
        model_type: "llada",
        class: "LLaDAModelLM",
        layout: Layout::Llada,
        neighbours_rotate: true,
        experts: false,
        attention: Attention::Full { shifted: false },
    },
    Architecture {
        name: "llada-moe",
        model_type: "llada",
        class: "LLaDAMoEModelLM",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: true,
        attention: Attention::Full { shifted: false },
    },
    Architecture {
        name: "rnd1",
        model_type: "rnd1",
        class: "RND1LM",
        layout: Layout::HuggingFace,
        neighbours_rotate: false,
        experts: true,
        attention: Attention::Full { shifted: true },
    },
];

impl Architecture {
    /// The architecture of a name. Errors list all of them.
    pub fn named(name: &str) -> Result<&'static Architecture, String> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name).ok_or_else(|| {
            let known = ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>().join(", ");
            format!("metadata key `general.architecture`: `{name}` is not supported; supported: {known}")
        })
    }
}
