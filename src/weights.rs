//! Checkpoint files: safetensors, single or sharded with an index, mapped and read as named,
//! shape-checked views.
//!
//! Weights are read once, straight into their packed form, and the mapped pages are handed back as
//! they are read, so the file and its packed copy are never resident together. Unsafe lives here
//! for the mapping alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use memmap2::{Advice, Mmap};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};

/// Pages that were read are handed back by the stretch: a call for each read would interrupt the
/// other threads for little memory.
const RELEASE_BYTES: usize = 1 << 20;

/// Bytes requested from the disk ahead of a sequential read of a tensor. The system's own
/// read-ahead, 128 KiB where a mapping is concerned, leaves a fast disk idle.
const AHEAD_BYTES: usize = 16 << 20;

/// Problems of one checkpoint that an error names.
const NAMED_PROBLEMS: usize = 4;

/// All tensors of a model directory.
pub struct Weights {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    /// What to name in errors about absent tensors.
    source: PathBuf,
    /// Any tensor of any shape, with values of its own making ([`Weights::random`]).
    random: bool,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range in the shard's file.
    start: usize,
    end: usize,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// Errors: a file that is absent, cut short or no safetensors file; a tensor in two shards, or
    /// in another than the index says.
    pub fn open(dir: &Path) -> Result<Weights> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        if single.exists() {
            let mut weights = Weights { shards: Vec::new(), tensors: BTreeMap::new(), source: single.clone(), random: false };
            weights.add_shard(single)?;
            return Ok(weights);
        }
        if !index.exists() {
            return Err(Error::weights(&single, "no weights: expected model.safetensors, or model.safetensors.index.json with its shards"));
        }
        let named = Index::read(dir, &index)?;
        let mut weights = Weights { shards: Vec::new(), tensors: BTreeMap::new(), source: index.clone(), random: false };
        let mut problems = Vec::new();
        for (path, tensors) in named.files() {
            if path.exists() {
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
        Weights { shards: Vec::new(), tensors: BTreeMap::new(), source: PathBuf::from("random weights"), random: true }
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|e| Error::weights(&path, format!("cannot open: {e}")))?;
        // SAFETY: the mapping is read-only and private to this process; as with every mapped file,
        // another process that truncates it while it is being read can raise SIGBUS. All offsets
        // used below were validated against the mapped length by `read_metadata`.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::weights(&path, format!("cannot map: {e}")))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            let what = cut_short(&map).unwrap_or_else(|| format!("not a safetensors file of {} bytes: {e}", map.len()));
            Error::weights(&path, what)
        })?;
        let shard = self.shards.len();
        // `read_metadata` returns the header's own length; the 8-byte length field comes before
        // it.
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            if end > map.len() {
                return Err(Error::weights(&path, format!("tensor {name} ends at byte {end}, the file has {}", map.len())));
            }
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let other = self.shards[other.shard].path.file_name().unwrap_or_default().display();
                return Err(Error::weights(&path, format!("tensor {name} appears in two shards, the other is {other}")));
            }
        }
        self.shards.push(Shard { path, map });
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
        if entry.shape != shape {
            return Err(Error::weights(&shard.path, format!("tensor {name}: expected shape {shape:?}, found {:?}", entry.shape)));
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(Error::weights(&shard.path, format!("tensor {name}: expected dtype F32, BF16 or F16, found {:?}", entry.dtype)));
        }
        Ok(Tensor { name: name.to_string(), len: shape.iter().product(), data: Data::Mapped(entry, shard) })
    }

    /// Whether there is a tensor of the name.
    pub fn contains(&self, name: &str) -> bool {
        self.random || self.tensors.contains_key(name)
    }

    /// Every tensor is there, of its shape and of a dtype that is read; else the first few that are
    /// not.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        fail_if_any(expected.iter().filter_map(|(name, shape)| self.tensor(name, shape).err()).collect())
    }

    /// Number of elements over all tensors (buffers included).
    pub fn num_elements(&self) -> usize {
        self.tensors.values().map(|e| e.shape.iter().product::<usize>()).sum()
    }

    /// Bytes of tensor data.
    pub fn num_bytes(&self) -> usize {
        self.tensors.values().map(|e| e.end - e.start).sum()
    }

    /// The distinct dtypes, for reports.
    pub fn dtypes(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.values().map(|e| format!("{:?}", e.dtype)).collect();
        names.sort();
        names.dedup();
        names
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

/// Where a file whose header can be read ends before its tensors do.
fn cut_short(bytes: &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(rest.get(..length)?).ok()?;
    let end = |tensor: &Value| usize::try_from(tensor.get("data_offsets")?.get(1)?.as_u64()?).ok();
    let (end, name) = header.iter().filter_map(|(name, tensor)| Some((end(tensor)?, name))).max()?;
    let (expected, found) = (end.checked_add(8 + length)?, bytes.len());
    (found < expected).then(|| format!("cut short: expected {expected} bytes, up to the end of tensor {name}, found {found}"))
}

/// `model.safetensors.index.json`: the shard of every tensor.
struct Index {
    map: BTreeMap<String, PathBuf>,
}

impl Index {
    fn read(dir: &Path, index: &Path) -> Result<Index> {
        let text = std::fs::read_to_string(index).map_err(|e| Error::weights(index, format!("cannot read: {e}")))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::weights(index, format!("not JSON: {e}")))?;
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
    Mapped(&'a Entry, &'a Shard),
    Random(u64),
}

impl Tensor<'_> {
    /// Bytes in the file.
    pub fn num_bytes(&self) -> usize {
        match self.data {
            Data::Mapped(entry, _) => entry.end - entry.start,
            Data::Random(_) => self.len * size_of::<f32>(),
        }
    }

    /// Elements `first..first + dst.len()` in row-major order, as f32.
    ///
    /// Errors: a value that is NaN or infinite, named with its index.
    pub fn read(&self, first: usize, dst: &mut [f32]) -> Result<()> {
        let (entry, shard) = match self.data {
            Data::Mapped(entry, shard) => (entry, shard),
            Data::Random(seed) => {
                for (i, value) in dst.iter_mut().enumerate() {
                    let hash = (seed ^ (first + i) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    *value = ((hash >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1;
                }
                return Ok(());
            }
        };
        let size = match entry.dtype {
            Dtype::F32 => 4,
            _ => 2,
        };
        let range = entry.start + first * size..entry.start + (first + dst.len()) * size;
        assert!(range.end <= entry.end, "elements {first}..{} of tensor {}", first + dst.len(), self.name);
        shard.ask_ahead(&range, entry);
        let bytes = &shard.map[range.clone()];
        match entry.dtype {
            Dtype::F32 => convert(bytes, dst, f32::from_le_bytes),
            Dtype::BF16 => convert(bytes, dst, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            // Where the machine has an instruction for it. Tensors begin on a multiple of their
            // size in any file that was not made by hand.
            _ => match bytemuck::try_cast_slice::<u8, half::f16>(bytes) {
                Ok(halves) if cfg!(target_endian = "little") => halves.convert_to_f32_slice(dst),
                _ => convert(bytes, dst, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
            },
        }
        // Without an early end, so that it runs on vectors: the largest magnitude says whether to
        // look for the culprit.
        let largest = dst.iter().fold(0, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff));
        if largest >= f32::INFINITY.to_bits()
            && let Some(at) = dst.iter().position(|v| !v.is_finite())
        {
            return Err(Error::weights(&shard.path, format!("tensor {}: element {} is {}", self.name, first + at, dst[at])));
        }
        // The stretches that this read came to the end of; others may still read from the last one.
        let stretch = |at: usize| at / RELEASE_BYTES * RELEASE_BYTES;
        if stretch(range.start) < stretch(range.end) {
            shard.release(stretch(range.start).max(entry.start)..stretch(range.end));
        }
        Ok(())
    }

    /// The whole tensor.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.len];
        self.read(0, &mut values)?;
        Ok(values)
    }
}

/// Buffers that reading left are freed as a whole.
impl Drop for Tensor<'_> {
    fn drop(&mut self) {
        if let Data::Mapped(entry, shard) = self.data
            && entry.end - entry.start >= RELEASE_BYTES
        {
            shard.release(entry.start..entry.end);
        }
    }
}

impl Shard {
    /// Asks for what follows a read, whenever the reader comes to the next stretch of
    /// [`AHEAD_BYTES`] of a tensor.
    fn ask_ahead(&self, read: &Range<usize>, tensor: &Entry) {
        let stretch = |at: usize| (at - tensor.start) / AHEAD_BYTES;
        let end = tensor.end.min(read.end + 2 * AHEAD_BYTES);
        if read.end < end && (read.start == tensor.start || stretch(read.start) != stretch(read.end)) {
            // Advice only: a system that refuses it reads later.
            let _ = self.map.advise_range(Advice::WillNeed, read.start, end - read.start);
        }
    }

    /// Hands the pages of a byte range back to the system once they were read; reading again would
    /// fault them in anew.
    fn release(&self, bytes: Range<usize>) {
        // SAFETY: the mapping is read-only and file-backed, so dropped pages are read from the file
        // again on the next access.
        let advised = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        // Advice only: a system that refuses it keeps more memory, nothing else changes.
        let _ = advised;
    }
}

fn convert<const N: usize>(bytes: &[u8], dst: &mut [f32], to_f32: impl Fn([u8; N]) -> f32) {
    for (value, chunk) in dst.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = to_f32(*chunk);
    }
}
