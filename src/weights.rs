//! Checkpoint files: safetensors, single or sharded with an index, or GGUF, read as named,
//! shape-checked tensors. Names, shapes and the order of rows are those of a directory, whatever
//! the file has.
//!
//! Weights are read once, straight into their packed form. They are read and not mapped: a file
//! that another program cuts short meanwhile gives an error that names the tensor, where a mapping
//! would end the process by SIGBUS, and file systems without shared mappings serve as well. After
//! loading nothing is read any more. A file that is overwritten in place while it is read may give
//! the values of either version: only its length and what is not finite are noticed.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use crate::backend::groups::{GROUP, Group8};
use crate::backend::{DType, WeightFormat};
use crate::error::{Error, Result};
use crate::file_bytes::FileBytes;
use crate::gguf;
use crate::gguf::blocks::{BlockType, Group4, Groups};
use crate::gguf::container::{READ_TYPES, TensorType};
use crate::gguf::model::GgufModel;
use crate::gguf::tensor_names::RowOrder;
use crate::input_file::{self, MAX_JSON_BYTES, read_exact_at};
use crate::packed_weights::{DTYPE_KEY, ELEMENTS_KEY, FORMAT_KEY, LAYOUT, LAYOUT_KEY, Loaded, Observer, PackedWords, SEPARATOR};

/// Bytes of a header at most, as the safetensors crate has it.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// Elements that are read at once, then converted and looked at while they are in L2. For 256 MiB
/// in the page cache that takes 38 ms of CPU in bf16 and 46 ms in f32; a mapping that is converted
/// by megabytes and then looked at takes 50 ms and 28 ms.
const AT_ONCE: usize = 32 << 10;

/// Bytes requested from the disk ahead of a sequential read of a tensor. The system's own
/// read-ahead of 128 KiB leaves a fast disk idle.
#[cfg(target_os = "linux")]
const AHEAD_BYTES: usize = 16 << 20;

/// Bytes at the beginning of a file that tell what it is.
const FIRST_BYTES: usize = 512;

/// Problems of one checkpoint that an error names.
const NAMED_PROBLEMS: usize = 4;

/// All tensors of a model.
#[derive(Default)]
pub struct Weights {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    /// What to name in errors about absent tensors.
    source: PathBuf,
    /// Any tensor of any shape, with values of its own making ([`Weights::random`]).
    random: bool,
    packed: Option<Packed>,
    observer: RefCell<Option<Observer>>,
}

/// Weights that lie packed in a file that `redraft quantize` wrote.
struct Packed {
    format: WeightFormat,
    dtype: DType,
    elements: usize,
    /// Byte ranges by joined names.
    weights: BTreeMap<String, Range<usize>>,
    /// Names of the tensors that they were made from.
    names: BTreeSet<String>,
    file: Arc<FileBytes>,
}

struct Shard {
    path: PathBuf,
    file: File,
}

struct Entry {
    shard: usize,
    format: Format,
    shape: Vec<usize>,
    /// Byte range in the shard's file.
    start: usize,
    end: usize,
    order: RowOrder,
    /// What a GGUF file calls it, or that of which it is a piece.
    stored_as: Option<String>,
}

/// What the elements of a stored tensor are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Format {
    F32,
    F16,
    Bf16,
    Blocks(BlockType),
    /// A type that is not read, with the name that its file format has for it.
    Other(String),
}

impl Format {
    fn of_safetensors(dtype: Dtype) -> Format {
        match dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            other => Format::Other(format!("{other:?}")),
        }
    }

    fn of_gguf(kind: TensorType) -> Format {
        match kind {
            TensorType::F32 => Format::F32,
            TensorType::F16 => Format::F16,
            TensorType::Bf16 => Format::Bf16,
            TensorType::Blocks(kind) => Format::Blocks(kind),
            TensorType::Other(name, ..) => Format::Other(name.into()),
        }
    }

    fn name(&self) -> &str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::Bf16 => "BF16",
            Format::Blocks(kind) => kind.name(),
            Format::Other(name) => name,
        }
    }

    /// Elements and bytes of the smallest piece that is read by itself.
    fn piece(&self) -> (usize, usize) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::Bf16 => (1, 2),
            Format::Blocks(kind) => (kind.num_values(), kind.num_bytes()),
            Format::Other(name) => unreachable!("tensors of type {name} are refused before they are read"),
        }
    }
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists, or the
    /// GGUF file that the path names ([`gguf::file_of`]).
    ///
    /// Errors: a file that is absent, cut short or of another format; a tensor in two shards, or
    /// in another than the index says.
    pub fn open(dir: &Path) -> Result<Weights> {
        if let Some(file) = gguf::file_of(dir)? {
            return Weights::open_gguf(&file);
        }
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let exists = |path: &Path| input_file::exists(path).map_err(|e| Error::io(path, &e));
        if exists(&single)? {
            let mut weights = Weights { source: single.clone(), ..Weights::default() };
            weights.add_shard(single)?;
            return Ok(weights);
        }
        if !exists(&index)? {
            return Err(Error::weights(&single, no_weights(dir)));
        }
        let named = Index::read(dir, &index)?;
        let mut weights = Weights { source: index.clone(), ..Weights::default() };
        let mut problems = Vec::new();
        for (path, tensors) in named.files() {
            if exists(&path)? {
                problems.extend(weights.add_shard(path).err());
            } else {
                let first = tensors.first().copied().unwrap_or_default();
                problems
                    .push(Error::weights(&path, format!("no such file; {} tensors are in it by the index, {first} first", tensors.len())));
            }
        }
        if problems.is_empty() {
            problems.extend(named.map.iter().filter_map(|(tensor, path)| weights.misplaced(tensor, path)));
        }
        fail_if_any(problems)?;
        Ok(weights)
    }

    /// The tensors of a GGUF file and of the others that it was split into.
    fn open_gguf(file: &Path) -> Result<Weights> {
        let model = GgufModel::open(file)?;
        let mut tensors = BTreeMap::new();
        for tensor in model.tensors()? {
            let entry = Entry {
                shard: tensor.part,
                format: Format::of_gguf(tensor.kind),
                shape: tensor.shape,
                start: tensor.bytes.start,
                end: tensor.bytes.end,
                order: tensor.order,
                stored_as: Some(tensor.stored_as.clone()),
            };
            if let Some(other) = tensors.insert(tensor.name.clone(), entry) {
                let what = format!("tensors {} and {} both hold {}", other.stored_as.unwrap_or_default(), tensor.stored_as, tensor.name);
                return Err(Error::weights(file, what));
            }
        }
        let shards = model.parts.into_iter().map(|part| Shard { path: part.path, file: part.file }).collect();
        Ok(Weights { shards, tensors, source: file.to_path_buf(), ..Weights::default() })
    }

    /// What is wrong where the index puts a tensor.
    fn misplaced(&self, tensor: &str, path: &Path) -> Option<Error> {
        let file = |path: &Path| path.file_name().unwrap_or_default().display().to_string();
        let found = match self.tensors.get(tensor).map(|entry| &self.shards[entry.shard].path) {
            Some(found) if found == path => return None,
            Some(found) => format!("found in {}", file(found)),
            None => "found in no shard".into(),
        };
        Some(Error::weights(&self.source, format!("tensor {tensor}: expected in {}, {found}", file(path))))
    }

    /// Weights that were never trained: every tensor asked for exists, with small values that
    /// depend on its name and index alone. For benches, where the shape matters and the text does
    /// not.
    pub fn random() -> Weights {
        Weights { source: PathBuf::from("random weights"), random: true, ..Weights::default() }
    }

    /// Tells `observer` what a load makes of these weights.
    pub fn observed_by(self, observer: Observer) -> Weights {
        Weights { observer: RefCell::new(Some(observer)), ..self }
    }

    pub(crate) fn is_observed(&self) -> bool {
        self.observer.borrow().is_some()
    }

    pub(crate) fn observe(&self, loaded: Loaded) -> Result<()> {
        self.observer.borrow_mut().as_mut().map_or(Ok(()), |observer| observer(loaded))
    }

    /// The words of a weight that lies packed, made from the tensors of these names, and the format
    /// that its file is in.
    ///
    /// Errors: words that do not lie on words.
    pub(crate) fn packed<N: AsRef<str>>(&self, names: &[N]) -> Result<Option<(WeightFormat, PackedWords)>> {
        let Some(packed) = &self.packed else { return Ok(None) };
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        let Some(bytes) = packed.weights.get(&names.join(&SEPARATOR.to_string())) else { return Ok(None) };
        let words = PackedWords::new(&packed.file, bytes.clone());
        let words = words.ok_or_else(|| Error::weights(&self.source, format!("packed weight {}: not on whole words", names[0])))?;
        Ok(Some((packed.format, words)))
    }

    /// An error that knows neither file nor tensor, of the weight that is made from the tensors of
    /// these names; others stay as they are.
    pub(crate) fn name_in<N: AsRef<str>>(&self, names: &[N], error: Error) -> Error {
        let Error::Request { what } = error else { return error };
        let first = names.first().map_or("", AsRef::as_ref);
        let path = self.tensors.get(first).map_or(&self.source, |entry| &self.shards[entry.shard].path);
        let more = if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
        Error::weights(path, format!("tensor {first}{more}: {what}"))
    }

    /// Whether a tensor is a part of a weight that lies packed.
    pub(crate) fn is_in_packed(&self, name: &str) -> bool {
        self.packed.as_ref().is_some_and(|packed| packed.names.contains(name))
    }

    /// Format of the weights that lie packed, and the type of the floats beside them.
    pub(crate) fn packed_types(&self) -> Option<(WeightFormat, DType)> {
        self.packed.as_ref().map(|packed| (packed.format, packed.dtype))
    }

    /// What of a file is packed.
    ///
    /// Errors: another layout than the one that is read here.
    fn add_packed(&mut self, file: &File, metadata: &Metadata, data: usize) -> std::result::Result<(), String> {
        let texts = metadata.metadata().as_ref();
        let Some(layout) = texts.and_then(|texts| texts.get(LAYOUT_KEY)) else { return Ok(()) };
        if layout != LAYOUT {
            return Err(format!("packed weights of layout {layout}: expected {LAYOUT}; quantise the checkpoint again"));
        }
        let text = |key: &str| texts.and_then(|texts| texts.get(key)).ok_or_else(|| format!("metadata `{key}` is missing"));
        let format = text(FORMAT_KEY)?.parse().map_err(|e| format!("metadata `{FORMAT_KEY}`: {e}"))?;
        let dtype = text(DTYPE_KEY)?.parse().map_err(|e| format!("metadata `{DTYPE_KEY}`: {e}"))?;
        let elements = text(ELEMENTS_KEY)?.parse().map_err(|e| format!("metadata `{ELEMENTS_KEY}`: {e}"))?;
        let file = Arc::new(FileBytes::open(file).map_err(|e| format!("cannot read: {e}"))?);
        let mut packed = Packed { format, dtype, elements, weights: BTreeMap::new(), names: BTreeSet::new(), file };
        for (name, info) in metadata.tensors().into_iter().filter(|(_, info)| info.dtype == Dtype::U32) {
            packed.names.extend(name.split(SEPARATOR).map(str::to_owned));
            packed.weights.insert(name, data + info.data_offsets.0..data + info.data_offsets.1);
        }
        self.packed = Some(packed);
        Ok(())
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<()> {
        let wrong = |what: String| Error::weights(&path, what);
        let file = input_file::open(&path).map_err(|e| wrong(format!("cannot open: {e}")))?;
        let len = file.metadata().map_err(|e| wrong(format!("cannot open: {e}")))?.len();
        let (metadata, data) = header(&file, len).map_err(wrong)?;
        self.add_packed(&file, &metadata, data).map_err(wrong)?;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            // Offsets lie within the file, whose length the header agrees with.
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let format = Format::of_safetensors(info.dtype);
            let entry = Entry { shard, format, shape: info.shape.clone(), start, end, order: RowOrder::Plain, stored_as: None };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let other = self.shards[other.shard].path.file_name().unwrap_or_default().display();
                return Err(Error::weights(&path, format!("tensor {name} appears in two shards, the other is {other}")));
            }
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }

    /// The tensor, if its shape is the expected one and its dtype is a float this crate reads.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        if self.random {
            let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
            return Ok(Tensor { name: name.to_string(), len: shape.iter().product(), data: Data::Random(seed) });
        }
        let Some(entry) = self.tensors.get(name) else {
            return Err(Error::weights(&self.source, format!("tensor {name} is missing; expected shape {shape:?}")));
        };
        let shard = &self.shards[entry.shard];
        let shown = || entry.stored_as.as_ref().map_or_else(|| name.to_owned(), |stored| format!("{stored} ({name})"));
        if let Format::Other(found) = &entry.format {
            let what = match entry.stored_as {
                Some(_) => format!("type {found} is not read; types that are read: {READ_TYPES}"),
                None => format!("expected dtype F32, BF16 or F16, found {found}"),
            };
            return Err(Error::weights(&shard.path, format!("tensor {}: {what}", shown())));
        }
        if entry.shape != shape {
            return Err(Error::weights(&shard.path, format!("tensor {}: expected shape {shape:?}, found {:?}", shown(), entry.shape)));
        }
        Ok(Tensor { name: name.to_string(), len: shape.iter().product(), data: Data::Stored(entry, shard) })
    }

    /// Whether there is a tensor of the name.
    pub fn contains(&self, name: &str) -> bool {
        self.random || self.tensors.contains_key(name) || self.is_in_packed(name)
    }

    /// Whether two tensors of a shape hold the same values.
    ///
    /// Errors: as [`Weights::tensor`] and [`Tensor::read`].
    pub fn are_equal(&self, a: &str, b: &str, shape: &[usize]) -> Result<bool> {
        if self.random {
            return Ok(true);
        }
        let (a, b) = (self.tensor(a, shape)?, self.tensor(b, shape)?);
        let (mut left, mut right) = (vec![0.0; a.len.min(AT_ONCE)], vec![0.0; a.len.min(AT_ONCE)]);
        for first in (0..a.len).step_by(AT_ONCE) {
            let len = AT_ONCE.min(a.len - first);
            a.read(first, &mut left[..len])?;
            b.read(first, &mut right[..len])?;
            if left[..len] != right[..len] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Every tensor is there, of its shape and of a dtype that is read; else the first few that are
    /// not.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let absent = |(name, shape): &(String, Vec<usize>)| if self.is_in_packed(name) { None } else { self.tensor(name, shape).err() };
        fail_if_any(expected.iter().filter_map(absent).collect())
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of elements over all tensors (buffers included).
    pub fn num_elements(&self) -> usize {
        let stored = || self.tensors.values().map(|e| e.shape.iter().product::<usize>()).sum();
        self.packed.as_ref().map_or_else(stored, |packed| packed.elements)
    }

    /// Bytes of tensor data.
    pub fn num_bytes(&self) -> usize {
        self.tensors.values().map(|e| e.end - e.start).sum()
    }

    /// The distinct dtypes, for reports.
    pub fn dtypes(&self) -> Vec<String> {
        let dtype = |(name, entry): (&String, &Entry)| match &self.packed {
            Some(packed) if packed.weights.contains_key(name) => packed.format.name().to_owned(),
            _ => entry.format.name().to_owned(),
        };
        let mut names: Vec<String> = self.tensors.iter().map(dtype).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Whether nearly all weights are stored in 16 bits or fewer: all but one in 16, since norms
    /// and routers of small files are often f32.
    pub fn are_narrow(&self) -> bool {
        let elements = |e: &Entry| e.shape.iter().product::<usize>();
        let is_wide = |e: &&Entry| !matches!(e.format, Format::F16 | Format::Bf16 | Format::Blocks(_));
        let wide: usize = self.tensors.values().filter(is_wide).map(elements).sum();
        wide.saturating_mul(16) <= self.num_elements() && self.num_elements() > 0
    }
}

/// Nothing, or the first few of many problems as one error: under the path of the first, the
/// others' files named where they differ.
fn fail_if_any(problems: Vec<Error>) -> Result<()> {
    let mut rest = problems.iter();
    let Some(Error::Weights { path, what }) = rest.next() else {
        return problems.into_iter().next().map_or(Ok(()), Err);
    };
    let mut text = what.clone();
    for problem in rest.clone().take(NAMED_PROBLEMS - 1) {
        match problem {
            Error::Weights { path: other, what } if other == path => text += &format!("; {what}"),
            Error::Weights { path: other, what } => text += &format!("; {}: {what}", other.file_name().unwrap_or_default().display()),
            other => text += &format!("; {other}"),
        }
    }
    match rest.len().saturating_sub(NAMED_PROBLEMS - 1) {
        0 => {}
        more => text += &format!("; and {more} more"),
    }
    Err(Error::weights(path, text))
}

/// The tensors of a safetensors file of `len` bytes, and where their data begins.
///
/// Errors: what is wrong with the file.
fn header(file: &File, len: u64) -> std::result::Result<(Metadata, usize), String> {
    let read = |bytes: &mut [u8], at: usize| read_exact_at(file, bytes, at).map_err(|e| format!("cannot read: {e}"));
    let mut first = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(FIRST_BYTES)];
    read(&mut first, 0)?;
    let unlike = |why: String| match input_file::looks_like(&first) {
        Some(kind) => format!("not a safetensors file: {kind}"),
        None => format!("not a safetensors file of {len} bytes: {why}"),
    };
    let Some((size, _)) = first.split_first_chunk::<8>() else { return Err(unlike("too short for a header".into())) };
    let size = u64::from_le_bytes(*size);
    if size > MAX_HEADER_BYTES as u64 {
        return Err(unlike(format!("its header would have {size} bytes, at most {MAX_HEADER_BYTES} are read")));
    }
    if size + 8 > len {
        return Err(unlike(format!("cut short: its header has {size} bytes")));
    }
    let mut text = vec![0; size as usize];
    read(&mut text, 8)?;
    // Checks offsets against each other, and lengths against shapes and types.
    let metadata: Metadata = serde_json::from_slice(&text).map_err(|e| unlike(format!("its header: {e}")))?;
    let (data, expected) = (8 + size as usize, 8 + size + metadata.data_len() as u64);
    if expected > len {
        let tensors = metadata.tensors();
        let last = tensors.iter().max_by_key(|(name, info)| (info.data_offsets.1, (*name).clone())).map_or("", |(name, _)| name);
        return Err(format!("cut short: expected {expected} bytes, up to the end of tensor {last}, found {len}"));
    }
    if expected < len {
        return Err(format!("expected {expected} bytes, up to the end of the last tensor, found {len}"));
    }
    Ok((metadata, data))
}

/// What stands in a directory that has no weights, and the next move.
fn no_weights(dir: &Path) -> String {
    const EXPECTED: &str = "no weights: expected model.safetensors, or model.safetensors.index.json with its shards";
    let mut names: Vec<String> = match dir.read_dir() {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        Err(_) => return EXPECTED.into(),
    };
    names.sort();
    let found = |suffix: &str| names.iter().find(|name| name.ends_with(suffix));
    if let Some(name) = names.iter().find(|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        return format!("{EXPECTED}; found {name} without the index: download model.safetensors.index.json too");
    }
    if let Some(name) = found(".safetensors") {
        return format!("{EXPECTED}; found {name}: rename it if it holds the whole model");
    }
    if let Some(name) = [".bin", ".pt", ".pth", ".ckpt"].into_iter().find_map(found) {
        return format!(
            "{EXPECTED}; found {name}, a PyTorch file: load it in transformers and call `save_pretrained(DIR, safe_serialization=True)`"
        );
    }
    if let Some(name) = found(".gguf") {
        return format!("{EXPECTED}; found {name}, a file of llama.cpp: name the file itself, {}", dir.join(name).display());
    }
    if let Some(name) = [".h5", ".msgpack", ".onnx"].into_iter().find_map(found) {
        return format!("{EXPECTED}; found {name}, weights of another framework");
    }
    if let Some(name) = [".incomplete", ".part", ".aria2", ".crdownload"].into_iter().find_map(found) {
        return format!("{EXPECTED}; found {name}: the download is not complete");
    }
    EXPECTED.into()
}

/// `model.safetensors.index.json`: the shard of every tensor.
struct Index {
    map: BTreeMap<String, PathBuf>,
}

impl Index {
    fn read(dir: &Path, index: &Path) -> Result<Index> {
        let text = input_file::read_text(index, MAX_JSON_BYTES).map_err(|e| Error::weights(index, format!("cannot read: {e}")))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| {
            let kind = input_file::looks_like(text.as_bytes()).map_or(String::new(), |kind| format!(": {kind}"));
            Error::weights(index, format!("not JSON{kind}: {e}"))
        })?;
        let map = value.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| Error::weights(index, "expected an object `weight_map`"))?;
        let path = |(tensor, file): (&String, &Value)| {
            let name = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\']));
            let what = || format!("weight_map[{tensor}]: expected a file name in the same directory, found {file}");
            name.map(|name| (tensor.clone(), dir.join(name))).ok_or_else(|| Error::weights(index, what()))
        };
        Ok(Index { map: map.iter().map(path).collect::<Result<_>>()? })
    }

    /// The shards, each with the tensors that it should hold.
    fn files(&self) -> BTreeMap<PathBuf, Vec<&str>> {
        let mut files: BTreeMap<PathBuf, Vec<&str>> = BTreeMap::new();
        for (tensor, path) in &self.map {
            files.entry(path.clone()).or_default().push(tensor);
        }
        files
    }
}

/// A named tensor.
pub struct Tensor<'a> {
    name: String,
    len: usize,
    data: Data<'a>,
}

enum Data<'a> {
    Stored(&'a Entry, &'a Shard),
    Random(u64),
}

impl Tensor<'_> {
    /// Bytes in the file.
    pub fn num_bytes(&self) -> usize {
        match self.data {
            Data::Stored(entry, _) => entry.end - entry.start,
            Data::Random(_) => self.len * size_of::<f32>(),
        }
    }

    /// Elements `first..first + dst.len()` in row-major order, as f32.
    ///
    /// Errors: a value that is NaN or infinite, named with its index.
    pub fn read(&self, first: usize, dst: &mut [f32]) -> Result<()> {
        let (entry, shard) = match self.data {
            Data::Stored(entry, shard) => (entry, shard),
            Data::Random(seed) => {
                for (i, value) in dst.iter_mut().enumerate() {
                    let hash = (seed ^ (first + i) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    *value = ((hash >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1;
                }
                return Ok(());
            }
        };
        let end = first + dst.len();
        assert!(end <= self.len, "elements {first}..{end} of tensor {}", self.name);
        let finite = match entry.order {
            RowOrder::Plain => self.read_stored(entry, shard, first, dst)?,
            RowOrder::Interleaved { .. } => self.read_rows(entry, shard, first, dst)?,
        };
        if !finite && let Some(at) = dst.iter().position(|v| !v.is_finite()) {
            return Err(Error::weights(&shard.path, format!("tensor {}: element {} is {}", self.name, first + at, dst[at])));
        }
        Ok(())
    }

    /// Elements from `first` on where rows are stored in another order. False: one that was read is
    /// not finite.
    fn read_rows(&self, entry: &Entry, shard: &Shard, first: usize, dst: &mut [f32]) -> Result<bool> {
        let width = entry.width();
        let (mut finite, mut at, mut rest) = (true, first, dst);
        let mut span = Vec::new();
        while !rest.is_empty() {
            let (row, column) = (at / width, at % width);
            let whole = if column == 0 { rest.len() / width } else { 0 };
            let run = entry.run(row, whole.clamp(1, (AT_ONCE / width).max(1)));
            let len = if whole == 0 { rest.len().min(width - column) } else { run.count * width };
            let (part, after) = rest.split_at_mut(len);
            if run.count == 1 {
                finite &= self.read_stored(entry, shard, run.stored * width + column, part)?;
            } else {
                span.resize(run.span() * width, 0.0);
                finite &= self.read_stored(entry, shard, run.stored * width, &mut span)?;
                for (row, stored) in part.chunks_exact_mut(width).zip(span.chunks(run.stride * width)) {
                    row.copy_from_slice(&stored[..width]);
                }
            }
            at += len;
            rest = after;
        }
        Ok(finite)
    }

    /// Elements from `first` on in the order of the file. False: one of them is not finite.
    fn read_stored(&self, entry: &Entry, shard: &Shard, first: usize, dst: &mut [f32]) -> Result<bool> {
        let (len, size) = entry.format.piece();
        let at = |element: usize| entry.start + element / len * size;
        shard.ask_ahead(&(at(first)..at((first + dst.len()).next_multiple_of(len))), entry);
        let mut finite = true;
        match entry.format {
            Format::F32 => {
                for (i, dst) in dst.chunks_mut(AT_ONCE).enumerate() {
                    shard.read(bytemuck::cast_slice_mut(dst), at(first + i * AT_ONCE), &self.name)?;
                    if cfg!(target_endian = "big") {
                        dst.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
                    }
                    finite &= are_finite(dst);
                }
            }
            Format::Blocks(kind) => {
                let mut bytes = vec![0; dst.len().div_ceil(len).min(AT_ONCE / len) * size];
                let mut edge = vec![0.0; len];
                let (mut element, mut rest) = (first, dst);
                while !rest.is_empty() {
                    let (inside, whole) = (element % len, (rest.len() / len).min(AT_ONCE / len));
                    let part = if inside > 0 || whole == 0 {
                        // A piece of one block.
                        shard.read(&mut bytes[..size], at(element), &self.name)?;
                        kind.decode(&bytes[..size], &mut edge);
                        let part = rest.split_off_mut(..rest.len().min(len - inside)).expect("a part");
                        part.copy_from_slice(&edge[inside..inside + part.len()]);
                        part
                    } else {
                        let bytes = &mut bytes[..whole * size];
                        shard.read(bytes, at(element), &self.name)?;
                        let part = rest.split_off_mut(..whole * len).expect("a part");
                        kind.decode(bytes, part);
                        part
                    };
                    finite &= are_finite(part);
                    element += part.len();
                }
            }
            Format::F16 | Format::Bf16 => {
                let mut halves = vec![0u16; dst.len().min(AT_ONCE)];
                for (i, dst) in dst.chunks_mut(AT_ONCE).enumerate() {
                    let halves = &mut halves[..dst.len()];
                    shard.read(bytemuck::cast_slice_mut(halves), at(first + i * AT_ONCE), &self.name)?;
                    if cfg!(target_endian = "big") {
                        halves.iter_mut().for_each(|half| *half = half.swap_bytes());
                    }
                    let largest = halves.iter().fold(0, |largest, half| largest.max(half & 0x7fff));
                    if entry.format == Format::Bf16 {
                        finite &= largest < half::bf16::INFINITY.to_bits();
                        dst.iter_mut().zip(&*halves).for_each(|(value, half)| *value = f32::from_bits(u32::from(*half) << 16));
                    } else {
                        // Where the machine has an instruction for it.
                        finite &= largest < half::f16::INFINITY.to_bits();
                        bytemuck::cast_slice::<u16, half::f16>(halves).convert_to_f32_slice(dst);
                    }
                }
            }
            Format::Other(ref name) => unreachable!("tensors of type {name} are refused before they are read"),
        }
        Ok(finite)
    }

    /// The groups of a matrix as they are stored, where its rows are groups of 32 values with codes
    /// of 4 or 8 bits.
    pub fn blocks(&self) -> Option<StoredBlocks<'_>> {
        let Data::Stored(entry, shard) = self.data else { return None };
        match entry.format {
            Format::Blocks(kind) if entry.shape.len() == 2 && kind.groups().is_some() => {
                Some(StoredBlocks { name: &self.name, kind, entry, shard })
            }
            _ => None,
        }
    }

    /// The format in memory that keeps a tensor in blocks best: groups as they are, and 8 bits for
    /// blocks of other kinds. `None` for floats.
    pub(crate) fn format(&self) -> Option<WeightFormat> {
        let Data::Stored(Entry { format: Format::Blocks(kind), .. }, _) = self.data else { return None };
        Some(if kind.groups() == Some(Groups::Four) { WeightFormat::Q4 } else { WeightFormat::Q8 })
    }

    /// The whole tensor.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        if values.try_reserve_exact(self.len).is_err() {
            let bytes = self.len * size_of::<f32>();
            return Err(Error::device(format!("tensor {}: cannot allocate {bytes} bytes: the system refuses the memory", self.name)));
        }
        values.resize(self.len, 0.0);
        self.read(0, &mut values)?;
        Ok(values)
    }
}

/// Whether all values are finite. Without an early end, so that it runs on vectors: the largest
/// magnitude says whether to look for the culprit.
fn are_finite(values: &[f32]) -> bool {
    let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff));
    largest < f32::INFINITY.to_bits()
}

impl Entry {
    /// Elements of a row; those of a vector are rows.
    fn width(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// The rows from `row` on, `most` of them at most, that lie a fixed number of rows apart.
    fn run(&self, row: usize, most: usize) -> Run {
        match self.order {
            RowOrder::Plain => Run { stored: row, count: most, stride: 1 },
            RowOrder::Interleaved { head_dim } => {
                let (half, inside) = (head_dim / 2, row % head_dim);
                let stored = row - inside + inside % half * 2 + inside / half;
                Run { stored, count: most.min(half - inside % half), stride: 2 }
            }
        }
    }
}

/// Rows of a tensor: `count` of them, `stride` apart from `stored` on.
struct Run {
    stored: usize,
    count: usize,
    stride: usize,
}

impl Run {
    /// Rows from the first to the last.
    fn span(&self) -> usize {
        (self.count - 1) * self.stride + 1
    }
}

/// A matrix whose rows are groups of 32 values, as the file has them.
pub struct StoredBlocks<'a> {
    name: &'a str,
    kind: BlockType,
    entry: &'a Entry,
    shard: &'a Shard,
}

impl StoredBlocks<'_> {
    /// The type: its [`BlockType::groups`] says whether [`StoredBlocks::read8`] or
    /// [`StoredBlocks::read4`] reads it.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Groups of a row.
    pub fn groups_per_row(&self) -> usize {
        self.entry.width() / GROUP
    }

    /// Groups of the rows from `first` on, as many rows as `dst` has groups for.
    ///
    /// Errors: a scale that is not finite, and those of reading.
    pub fn read8(&self, first: usize, dst: &mut [Group8]) -> Result<()> {
        self.read(first, dst, |bytes, dst| self.kind.groups8(bytes, dst), |group| group.scale.is_finite())
    }

    /// The same of 4 bits.
    pub fn read4(&self, first: usize, dst: &mut [Group4]) -> Result<()> {
        let finite = |group: &Group4| (group.scale * 15.0 + group.min).is_finite() && group.min.is_finite();
        self.read(first, dst, |bytes, dst| self.kind.groups4(bytes, dst), finite)
    }

    fn read<G>(&self, first: usize, dst: &mut [G], decode: impl Fn(&[u8], &mut [G]), finite: impl Fn(&G) -> bool) -> Result<()> {
        let groups = self.groups_per_row();
        let (rows, row_bytes) = (dst.len() / groups, self.entry.width() / self.kind.num_values() * self.kind.num_bytes());
        assert!(dst.len().is_multiple_of(groups) && first + rows <= self.entry.shape[0], "{rows} rows from {first} of {}", self.name);
        let mut bytes = Vec::new();
        let (mut row, mut rest) = (first, dst);
        while !rest.is_empty() {
            let run = self.entry.run(row, (rest.len() / groups).min((AT_ONCE / self.entry.width()).max(1)));
            bytes.resize(run.span() * row_bytes, 0);
            let start = self.entry.start + run.stored * row_bytes;
            self.shard.ask_ahead(&(start..start + bytes.len()), self.entry);
            self.shard.read(&mut bytes, start, self.name)?;
            let part = rest.split_off_mut(..run.count * groups).expect("as many rows");
            for (i, (dst, bytes)) in part.chunks_exact_mut(groups).zip(bytes.chunks(run.stride * row_bytes)).enumerate() {
                decode(&bytes[..row_bytes], dst);
                if let Some(at) = dst.iter().position(|group| !finite(group)) {
                    let what = format!("tensor {}: the scale of columns {} on of row {} is not finite", self.name, at * GROUP, row + i);
                    return Err(Error::weights(&self.shard.path, what));
                }
            }
            row += run.count;
        }
        Ok(())
    }
}

impl Shard {
    /// Bytes from `at` on, which belong to a tensor.
    fn read(&self, bytes: &mut [u8], at: usize, tensor: &str) -> Result<()> {
        read_exact_at(&self.file, bytes, at).map_err(|error| {
            let what = match error.kind() {
                ErrorKind::UnexpectedEof => format!("tensor {tensor}: the file was cut short while it was read"),
                _ => format!("tensor {tensor}: cannot read: {error}"),
            };
            Error::weights(&self.path, what)
        })
    }

    /// Asks for what follows a read, whenever the reader comes to the next stretch of
    /// `AHEAD_BYTES` of a tensor.
    #[cfg(target_os = "linux")]
    fn ask_ahead(&self, read: &Range<usize>, tensor: &Entry) {
        let stretch = |at: usize| (at - tensor.start) / AHEAD_BYTES;
        let end = tensor.end.min(read.end + 2 * AHEAD_BYTES);
        if read.end < end && (read.start == tensor.start || stretch(read.start) != stretch(read.end)) {
            let len = std::num::NonZeroU64::new((end - read.start) as u64);
            // Advice only: a system that refuses it reads later.
            let _ = rustix::fs::fadvise(&self.file, read.start as u64, len, rustix::fs::Advice::WillNeed);
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_ahead(&self, _read: &Range<usize>, _tensor: &Entry) {}
}
