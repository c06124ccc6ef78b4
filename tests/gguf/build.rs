//! GGUF files byte by byte, for those that no writer makes.

/// A metadata value: its type's number and its bytes.
pub type Value = (u32, Vec<u8>);

pub fn text(text: &str) -> Value {
    (8, string(text))
}

pub fn u32_value(number: u32) -> Value {
    (4, number.to_le_bytes().to_vec())
}

pub fn f32_value(number: f32) -> Value {
    (6, number.to_le_bytes().to_vec())
}

pub fn bool_value(value: bool) -> Value {
    (7, vec![value.into()])
}

/// A list of values of one type, which come without it.
pub fn list(kind: u32, count: u64, bytes: &[u8]) -> Value {
    (9, [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat())
}

pub fn texts(texts: &[&str]) -> Value {
    list(8, texts.len() as u64, &texts.iter().flat_map(|text| string(text)).collect::<Vec<u8>>())
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A tensor's description and bytes.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Where the description says that it lies, if not where it does.
    pub offset: Option<u64>,
}

/// A file in parts.
#[derive(Clone)]
pub struct File {
    pub version: u32,
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
    pub alignment: usize,
}

impl File {
    /// A llama of one layer: hidden width 32, two heads of 16, MLP 32, eight tokens.
    pub fn llama() -> File {
        let mut keys = vec![("general.architecture".to_owned(), text("llama"))];
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            keys.push((format!("llama.{key}"), u32_value(value)));
        }
        keys.push(("llama.attention.layer_norm_rms_epsilon".into(), f32_value(1e-5)));
        let mut file = File { version: 3, keys, tensors: Vec::new(), alignment: 32 };
        let matrices = [("token_embd", 8), ("blk.0.attn_q", 32), ("blk.0.attn_k", 16), ("blk.0.attn_v", 16), ("blk.0.attn_output", 32)];
        let mlp = [("blk.0.ffn_gate", 32), ("blk.0.ffn_up", 32), ("blk.0.ffn_down", 32)];
        for (name, rows) in matrices.into_iter().chain(mlp) {
            file.add(name, &[32, rows]);
        }
        for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
            file.add(name, &[32]);
        }
        file
    }

    /// A tensor of f32 with values of its own.
    pub fn add(&mut self, name: &str, dims: &[u64]) {
        let count: u64 = dims.iter().product();
        let first = self.tensors.len();
        let value = |i: u64| ((first as u64 * 31 + i * 7) % 64) as f32 / 64.0 - 0.5;
        let bytes = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        self.tensors.push(Tensor { name: format!("{name}.weight"), dims: dims.to_vec(), kind: 0, bytes, offset: None });
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor")
    }

    /// Gives a key another value, or adds it.
    pub fn set(&mut self, key: &str, value: Value) {
        self.keys.retain(|(other, _)| other != key);
        self.keys.push((key.to_owned(), value));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [b"GGUF", &self.version.to_le_bytes()[..]].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, (kind, bytes)) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}
