//! The container: what a GGUF file says of itself, its metadata, and where its tensors lie.
//!
//! A file is a header (`GGUF`, the version, two counts), metadata (key, type, value), descriptions
//! of tensors (name, dimensions, type, offset) and, from a multiple of the alignment on, the
//! tensors' bytes. All of it is hostile: lengths and counts are compared with what is left of the
//! file before anything is allocated, and the tensors may neither overlap nor reach beyond the
//! file. What comes before the tensors is read once and kept; lists stay bytes of it until they are
//! asked for.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::gguf::blocks::BlockType;
use crate::input_file::{self, read_exact_at};

/// The first bytes of every file.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Bytes before the tensors at most. Vocabularies of 256,000 tokens take 12 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Keys and tensors at most; the largest published files have some thousands.
const MAX_ENTRIES: u64 = 1 << 16;
/// Bytes of a key, and of a tensor's name, at most. llama.cpp writes names of up to 63.
const MAX_NAME_BYTES: u64 = 1 << 16;
/// Dimensions of a tensor at most.
const MAX_DIMS: u32 = 4;
/// Lists of lists of ... at most.
const MAX_DEPTH: usize = 4;
/// Bytes that are read at once while the header is taken apart.
const AT_ONCE: u64 = 1 << 20;
/// Where a file names no alignment.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A file that was opened and checked.
pub struct Container {
    pub path: PathBuf,
    pub file: File,
    pub version: u32,
    /// In the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Everything before the tensors.
    header: Vec<u8>,
    metadata: BTreeMap<String, Value>,
}

/// A tensor as the file describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// Widths, the innermost first; none is 0.
    pub dims: Vec<usize>,
    pub kind: TensorType,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Blocks(BlockType),
    /// A type that is not read: its name, elements of a block, bytes of a block.
    Other(&'static str, usize, usize),
}

/// Types by their number in the file: those of `ggml_type` in llama.cpp.
fn tensor_type(code: u32) -> Option<TensorType> {
    use TensorType::{Bf16, Blocks, F16, F32, Other};
    Some(match code {
        0 => F32,
        1 => F16,
        2 => Blocks(BlockType::Q4_0),
        3 => Blocks(BlockType::Q4_1),
        6 => Blocks(BlockType::Q5_0),
        7 => Blocks(BlockType::Q5_1),
        8 => Blocks(BlockType::Q8_0),
        9 => Other("Q8_1", 32, 36),
        10 => Other("Q2_K", 256, 84),
        11 => Other("Q3_K", 256, 110),
        12 => Blocks(BlockType::Q4K),
        13 => Blocks(BlockType::Q5K),
        14 => Blocks(BlockType::Q6K),
        15 => Other("Q8_K", 256, 292),
        16 => Other("IQ2_XXS", 256, 66),
        17 => Other("IQ2_XS", 256, 74),
        18 => Other("IQ3_XXS", 256, 98),
        19 => Other("IQ1_S", 256, 50),
        20 => Other("IQ4_NL", 32, 18),
        21 => Other("IQ3_S", 256, 110),
        22 => Other("IQ2_S", 256, 82),
        23 => Other("IQ4_XS", 256, 136),
        24 => Other("I8", 1, 1),
        25 => Other("I16", 1, 2),
        26 => Other("I32", 1, 4),
        27 => Other("I64", 1, 8),
        28 => Other("F64", 1, 8),
        29 => Other("IQ1_M", 256, 56),
        30 => Bf16,
        34 => Other("TQ1_0", 256, 54),
        35 => Other("TQ2_0", 256, 66),
        39 => Other("MXFP4", 32, 17),
        40 => Other("NVFP4", 64, 36),
        41 => Other("Q1_0", 128, 18),
        42 => Other("Q2_0", 64, 18),
        _ => return None,
    })
}

/// The types that are read, for errors.
pub const READ_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";

impl TensorType {
    /// The name that llama.cpp prints.
    pub fn name(self) -> &'static str {
        match self {
            TensorType::F32 => "F32",
            TensorType::F16 => "F16",
            TensorType::Bf16 => "BF16",
            TensorType::Blocks(kind) => kind.name(),
            TensorType::Other(name, ..) => name,
        }
    }

    /// Elements and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            TensorType::F32 => (1, 4),
            TensorType::F16 | TensorType::Bf16 => (1, 2),
            TensorType::Blocks(kind) => (kind.num_values(), kind.num_bytes()),
            TensorType::Other(_, len, bytes) => (len, bytes),
        }
    }
}

/// A metadata value as stored.
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// Where in the header the text is.
    Text(Range<usize>),
    List {
        kind: Kind,
        len: usize,
        bytes: Range<usize>,
    },
}

/// Types of metadata values, by their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

const KINDS: [(Kind, &str); 13] = [
    (Kind::U8, "u8"),
    (Kind::I8, "i8"),
    (Kind::U16, "u16"),
    (Kind::I16, "i16"),
    (Kind::U32, "u32"),
    (Kind::I32, "i32"),
    (Kind::F32, "f32"),
    (Kind::Bool, "bool"),
    (Kind::Text, "text"),
    (Kind::List, "list"),
    (Kind::U64, "u64"),
    (Kind::I64, "i64"),
    (Kind::F64, "f64"),
];

impl Kind {
    fn name(self) -> &'static str {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    /// Bytes of a value, where all have as many.
    fn size(self) -> Option<usize> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::Text | Kind::List => None,
        }
    }

    /// A number of [`Kind::size`] bytes.
    fn number(self, bytes: &[u8]) -> Value {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        let shift = 64 - 8 * bytes.len() as u32;
        match self {
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Signed((unsigned << shift) as i64 >> shift),
            Kind::F32 => Value::Float(f64::from(f32::from_bits(unsigned as u32))),
            Kind::F64 => Value::Float(f64::from_bits(unsigned)),
            Kind::Bool => Value::Bool(unsigned != 0),
            _ => Value::Unsigned(unsigned),
        }
    }
}

type Checked<T> = std::result::Result<T, String>;

/// The part of a file before its tensors, read as far as it was taken apart.
struct Reader<'a> {
    file: &'a File,
    /// Bytes of the file.
    len: u64,
    bytes: Vec<u8>,
    at: usize,
}

impl Reader<'_> {
    /// The next `count` bytes, which are `what`.
    fn take(&mut self, count: u64, what: &str) -> Checked<Range<usize>> {
        let left = self.len - self.at as u64;
        if count > left {
            return Err(format!("cut short: {what} would have {count} bytes, {left} are left of {}", self.len));
        }
        let end = self.at as u64 + count;
        if end > MAX_HEADER_BYTES {
            return Err(format!("{what} would end at byte {end}: at most {MAX_HEADER_BYTES} bytes before the tensors are read"));
        }
        let known = self.bytes.len() as u64;
        if end > known {
            let wanted = end.max(known + AT_ONCE).min(self.len) as usize;
            self.bytes.resize(wanted, 0);
            read_exact_at(self.file, &mut self.bytes[known as usize..], known as usize).map_err(|e| format!("cannot read: {e}"))?;
        }
        let range = self.at..end as usize;
        self.at = range.end;
        Ok(range)
    }

    fn u32(&mut self, what: &str) -> Checked<u32> {
        let range = self.take(4, what)?;
        Ok(u32::from_le_bytes(self.bytes[range].try_into().expect("four bytes")))
    }

    fn u64(&mut self, what: &str) -> Checked<u64> {
        let range = self.take(8, what)?;
        Ok(u64::from_le_bytes(self.bytes[range].try_into().expect("eight bytes")))
    }

    /// How many there are of what takes at least `least` bytes each.
    fn count(&mut self, what: &str, least: u64, most: u64) -> Checked<u64> {
        let count = self.u64(what)?;
        let left = self.len - self.at as u64;
        if count > most {
            return Err(format!("{what}: {count}, at most {most} are read"));
        }
        if count.checked_mul(least).is_none_or(|bytes| bytes > left) {
            return Err(format!("cut short: {what}: {count}, of at least {least} bytes each; {left} bytes are left of {}", self.len));
        }
        Ok(count)
    }

    /// A text's place.
    fn text(&mut self, what: &str) -> Checked<Range<usize>> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// A key or a tensor's name.
    fn name(&mut self, what: &str) -> Checked<String> {
        let len = self.u64(what)?;
        if len > MAX_NAME_BYTES {
            return Err(format!("{what} would have {len} bytes, at most {MAX_NAME_BYTES} are read"));
        }
        let range = self.take(len, what)?;
        let text = std::str::from_utf8(&self.bytes[range]).map_err(|_| format!("{what} is not UTF-8"))?;
        if text.is_empty() {
            return Err(format!("{what} is empty"));
        }
        Ok(text.to_owned())
    }

    fn kind(&mut self, what: &str) -> Checked<Kind> {
        let code = self.u32(what)?;
        KINDS.get(code as usize).map(|(kind, _)| *kind).ok_or_else(|| format!("{what}: type {code} of a value is not known"))
    }

    fn value(&mut self, what: &str) -> Checked<Value> {
        match self.kind(what)? {
            Kind::Text => Ok(Value::Text(self.text(what)?)),
            Kind::List => {
                let (kind, len, bytes) = self.list(what, 1)?;
                Ok(Value::List { kind, len, bytes })
            }
            kind => {
                let range = self.take(kind.size().expect("a number") as u64, what)?;
                Ok(kind.number(&self.bytes[range]))
            }
        }
    }

    /// Passes over a list, whose parts it checks.
    fn list(&mut self, what: &str, depth: usize) -> Checked<(Kind, usize, Range<usize>)> {
        if depth > MAX_DEPTH {
            return Err(format!("{what}: lists inside of each other {depth} deep, at most {MAX_DEPTH} are read"));
        }
        let kind = self.kind(what)?;
        // A text is a length at least, a list a type and a length.
        let least = kind.size().unwrap_or(if kind == Kind::Text { 8 } else { 12 });
        let len = self.count(what, least as u64, u64::MAX)?;
        let first = self.at;
        match kind {
            Kind::Text => (0..len).try_for_each(|_| self.text(what).map(|_| ()))?,
            Kind::List => (0..len).try_for_each(|_| self.list(what, depth + 1).map(|_| ()))?,
            _ => {
                self.take(len * least as u64, what)?;
            }
        }
        Ok((kind, len as usize, first..self.at))
    }

    /// One tensor's description; the offset counts from where the tensors begin.
    fn tensor(&mut self, index: u64) -> Checked<(TensorInfo, u64)> {
        let name = self.name(&format!("name of tensor {index}"))?;
        let what = format!("tensor {name}");
        let num_dims = self.u32(&what)?;
        if !(1..=MAX_DIMS).contains(&num_dims) {
            return Err(format!("{what}: {num_dims} dimensions, expected 1 to {MAX_DIMS}"));
        }
        let mut dims = Vec::with_capacity(num_dims as usize);
        let mut elements = 1usize;
        for _ in 0..num_dims {
            let dim = self.u64(&what)?;
            let dim = usize::try_from(dim).ok().filter(|dim| *dim > 0 && i64::try_from(*dim).is_ok());
            let dim = dim.ok_or_else(|| format!("{what}: a dimension that is 0 or beyond 64 bits"))?;
            elements = elements.checked_mul(dim).ok_or_else(|| format!("{what}: more elements than 64 bits count"))?;
            dims.push(dim);
        }
        let code = self.u32(&what)?;
        let kind = tensor_type(code).ok_or_else(|| format!("{what}: type {code} is not known; types that are read: {READ_TYPES}"))?;
        let (len, bytes) = kind.block();
        if !dims[0].is_multiple_of(len) {
            return Err(format!("{what} of type {}: rows of {} values, expected a multiple of {len}", kind.name(), dims[0]));
        }
        let size = (elements / len).checked_mul(bytes).ok_or_else(|| format!("{what}: more bytes than 64 bits count"))?;
        let offset = self.u64(&what)?;
        Ok((TensorInfo { name, dims, kind, bytes: 0..size }, offset))
    }
}

impl Container {
    /// Opens a file and checks all of it but the tensors' values.
    ///
    /// Errors: [`Error::Weights`] with the file, and the key or tensor that is wrong.
    pub fn open(path: &Path) -> Result<Container> {
        let wrong = |what: String| Error::weights(path, what);
        let file = input_file::open(path).map_err(|e| wrong(format!("cannot open: {e}")))?;
        let len = file.metadata().map_err(|e| wrong(format!("cannot open: {e}")))?.len();
        parse(path, file, len).map_err(wrong)
    }

    /// The keys, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// What a value that is not as `expected` is.
    fn unexpected(&self, key: &str, expected: &str) -> String {
        let found = match self.metadata.get(key) {
            None => "nothing".into(),
            Some(Value::Unsigned(n)) => n.to_string(),
            Some(Value::Signed(n)) => n.to_string(),
            Some(Value::Float(n)) => n.to_string(),
            Some(Value::Bool(b)) => b.to_string(),
            Some(Value::Text(range)) => format!("the text `{}`", String::from_utf8_lossy(&self.header[range.clone()])),
            Some(Value::List { kind, len, .. }) => format!("a list of {len} values of type {}", kind.name()),
        };
        format!("metadata key `{key}`: expected {expected}, found {found}")
    }

    /// A text.
    pub fn text(&self, key: &str) -> Checked<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => std::str::from_utf8(&self.header[range.clone()])
                .map(Some)
                .map_err(|_| format!("metadata key `{key}`: the text is not UTF-8")),
            Some(_) => Err(self.unexpected(key, "a text")),
        }
    }

    /// A whole number that is not negative.
    pub fn whole(&self, key: &str) -> Checked<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(_) => Err(self.unexpected(key, "a whole number of at least 0")),
        }
    }

    /// A number.
    pub fn number(&self, key: &str) -> Checked<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(n)) if n.is_finite() => Ok(Some(*n)),
            Some(Value::Unsigned(n)) => Ok(Some(*n as f64)),
            Some(Value::Signed(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.unexpected(key, "a finite number")),
        }
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Checked<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.unexpected(key, "true or false")),
        }
    }

    /// Whether the key holds a list.
    pub fn is_list(&self, key: &str) -> bool {
        matches!(self.metadata.get(key), Some(Value::List { .. }))
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Checked<Option<Vec<&str>>> {
        let (len, bytes) = match self.metadata.get(key) {
            None => return Ok(None),
            Some(Value::List { kind: Kind::Text, len, bytes }) => (*len, bytes.clone()),
            Some(_) => return Err(self.unexpected(key, "a list of texts")),
        };
        let mut rest = &self.header[bytes];
        // Lengths were checked when the header was taken apart.
        let mut next = || {
            let (size, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(u64::from_le_bytes(*size) as usize)?;
            rest = after;
            Some(text)
        };
        let text = |i: usize| {
            let text = next().and_then(|text| std::str::from_utf8(text).ok());
            text.ok_or_else(|| format!("metadata key `{key}`: text {i} of the list is not UTF-8"))
        };
        (0..len).map(text).collect::<Checked<_>>().map(Some)
    }

    /// The values of a list of numbers, as `of` reads each.
    fn list<T>(&self, key: &str, expected: &str, of: impl Fn(&Value) -> Option<T>) -> Checked<Option<Vec<T>>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let Value::List { kind, bytes, .. } = value else { return Err(self.unexpected(key, expected)) };
        let Some(size) = kind.size() else { return Err(self.unexpected(key, expected)) };
        let values = self.header[bytes.clone()].chunks_exact(size).map(|bytes| of(&kind.number(bytes)));
        values.collect::<Option<Vec<T>>>().map(Some).ok_or_else(|| self.unexpected(key, expected))
    }

    /// A list of whole numbers.
    pub fn wholes(&self, key: &str) -> Checked<Option<Vec<i64>>> {
        self.list(key, "a list of whole numbers", |value| match value {
            Value::Unsigned(n) => i64::try_from(*n).ok(),
            Value::Signed(n) => Some(*n),
            _ => None,
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Checked<Option<Vec<f64>>> {
        self.list(key, "a list of numbers", |value| match value {
            Value::Float(n) => Some(*n),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The values of a small tensor of f32.
    pub fn values(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let wrong = |what: String| Error::weights(&self.path, format!("tensor {}: {what}", tensor.name));
        if tensor.kind != TensorType::F32 {
            return Err(wrong(format!("expected type F32, found {}", tensor.kind.name())));
        }
        if tensor.bytes.len() > 1 << 20 {
            return Err(wrong(format!("expected at most 1 MiB, found {} bytes", tensor.bytes.len())));
        }
        let mut bytes = vec![0; tensor.bytes.len()];
        read_exact_at(&self.file, &mut bytes, tensor.bytes.start).map_err(|e| wrong(format!("cannot read: {e}")))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// Takes a file of `len` bytes apart.
fn parse(path: &Path, file: File, len: u64) -> Checked<Container> {
    let mut reader = Reader { file: &file, len, bytes: Vec::new(), at: 0 };
    let magic = reader.take(reader.len.min(4), "the magic number")?;
    if reader.bytes[magic.clone()] != *MAGIC {
        let first = &reader.bytes[..reader.bytes.len().min(512)];
        return Err(match input_file::looks_like(first) {
            Some(kind) => format!("not a GGUF file: {kind}"),
            None => format!("not a GGUF file of {} bytes: expected it to begin with `GGUF`", reader.len),
        });
    }
    let version = reader.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => return Err("GGUF version 1: expected 2 or 3; convert the model again with a llama.cpp of today".into()),
        // Of other machines: the low half of a small number is in front.
        _ if version & 0xffff == 0 => {
            return Err(format!("a big-endian GGUF file (version {}): expected a little-endian one", version.swap_bytes()));
        }
        _ => return Err(format!("GGUF version {version}: expected 2 or 3")),
    }
    // The shortest key has nine bytes, its value a type and a byte; the shortest tensor has a name
    // of a byte and one dimension.
    let num_tensors = reader.count("number of tensors", 9 + 4 + 8 + 4 + 8, MAX_ENTRIES)?;
    let num_keys = reader.count("number of metadata keys", 9 + 4 + 1, MAX_ENTRIES)?;
    let mut metadata = BTreeMap::new();
    for index in 0..num_keys {
        let key = reader.name(&format!("metadata key {index}"))?;
        let value = reader.value(&format!("metadata key `{key}`"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata key `{key}` is there twice"));
        }
    }
    let mut tensors = Vec::new();
    for index in 0..num_tensors {
        tensors.push(reader.tensor(index)?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(_) => return Err("metadata key `general.alignment`: expected a power of two up to 1 MiB, as an unsigned number".into()),
    };
    let header_bytes = reader.at as u64;
    let tensors = place(tensors, header_bytes.next_multiple_of(alignment), alignment, len)?;
    let mut header = reader.bytes;
    header.truncate(header_bytes as usize);
    header.shrink_to_fit();
    Ok(Container { path: path.to_path_buf(), file, version, tensors, header, metadata })
}

/// Where tensors lie in a file of `len` bytes whose tensors begin at `data`.
fn place(tensors: Vec<(TensorInfo, u64)>, data: u64, alignment: u64, len: u64) -> Checked<Vec<TensorInfo>> {
    let mut placed = Vec::with_capacity(tensors.len());
    for (mut tensor, offset) in tensors {
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor {}: offset {offset} is no multiple of the alignment {alignment}", tensor.name));
        }
        let size = tensor.bytes.end as u64;
        let end = data.checked_add(offset).and_then(|start| start.checked_add(size)).filter(|end| *end <= len);
        let Some(end) = end else {
            let what = format!("{size} bytes at offset {offset} of the tensors, which begin at {data}; the file has {len}");
            return Err(format!("cut short: tensor {}: {what}", tensor.name));
        };
        tensor.bytes = (end - size) as usize..end as usize;
        placed.push(tensor);
    }
    let mut order: Vec<&TensorInfo> = placed.iter().collect();
    order.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    if let Some([a, b]) = order.array_windows().find(|[a, b]| a.bytes.end > b.bytes.start) {
        return Err(format!("tensors {} and {} overlap", a.name, b.name));
    }
    let mut names: Vec<&str> = placed.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
        return Err(format!("tensor {name} is there twice"));
    }
    Ok(placed)
}
