//! Owns checkpoint files: safetensors, single or sharded with an index, mapped and read as named, shape-checked views.
//!
//! Weights are read once, straight into their packed form, and the mapped pages are handed back as they are read, so the file
//! and its packed copy are never resident together. Unsafe lives here for the mapping alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};

/// Reads of at least this much hand their pages back; below it the call costs more than the memory is worth.
const RELEASE_BYTES: usize = 1 << 16;

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
    pub fn open(dir: &Path) -> Result<Weights> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let (source, files) = if single.exists() {
            (single.clone(), vec![single])
        } else if index.exists() {
            (index.clone(), shard_files(dir, &index)?)
        } else {
            return Err(Error::weights(&single, "no weights: expected model.safetensors, or model.safetensors.index.json with its shards"));
        };
        let mut weights = Weights { shards: Vec::new(), tensors: BTreeMap::new(), source, random: false };
        for path in files {
            weights.add_shard(path)?;
        }
        Ok(weights)
    }

    /// Weights that were never trained: every tensor asked for exists, with small values that depend on its name and index alone.
    /// For benches, where the shape matters and the text does not.
    pub fn random() -> Weights {
        Weights { shards: Vec::new(), tensors: BTreeMap::new(), source: PathBuf::from("random weights"), random: true }
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|e| Error::weights(&path, format!("cannot open: {e}")))?;
        // SAFETY: the mapping is read-only and private to this process; as with every mapped file, another process that truncates it while
        // it is being read can raise SIGBUS. All offsets used below were validated against the mapped length by `read_metadata`.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::weights(&path, format!("cannot map: {e}")))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::weights(&path, format!("not a safetensors file of {} bytes: {e}", map.len())))?;
        let shard = self.shards.len();
        // `read_metadata` returns the header's own length; the 8-byte length field stands before it.
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            if end > map.len() {
                return Err(Error::weights(&path, format!("tensor {name} ends at byte {end}, the file has {}", map.len())));
            }
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::weights(&path, format!("tensor {name} appears in two shards")));
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

fn shard_files(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::weights(index, format!("cannot read: {e}")))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::weights(index, format!("not JSON: {e}")))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| Error::weights(index, "expected an object `weight_map`"))?;
    let mut files = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\']));
        let name = name.ok_or_else(|| {
            Error::weights(index, format!("weight_map[{tensor}]: expected a file name in the same directory, found {file}"))
        })?;
        files.push(dir.join(name));
    }
    files.sort();
    files.dedup();
    Ok(files)
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
        let bytes = &shard.map[range.clone()];
        match entry.dtype {
            Dtype::F32 => convert(bytes, dst, f32::from_le_bytes),
            Dtype::BF16 => convert(bytes, dst, |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f32()),
            _ => convert(bytes, dst, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
        }
        if let Some(at) = dst.iter().position(|v| !v.is_finite()) {
            return Err(Error::weights(&shard.path, format!("tensor {}: element {} is {}", self.name, first + at, dst[at])));
        }
        shard.release(range);
        Ok(())
    }

    /// The whole tensor.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.len];
        self.read(0, &mut values)?;
        Ok(values)
    }
}

impl Shard {
    /// Hands the pages of a byte range back to the system once they were read; reading again would fault them in anew.
    fn release(&self, bytes: Range<usize>) {
        if bytes.len() < RELEASE_BYTES {
            return;
        }
        // SAFETY: the mapping is read-only and file-backed, so dropped pages are read from the file again on the next access.
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
