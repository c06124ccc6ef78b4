//! Weights in groups as `redraft quantize` leaves them: words in the order in which products on a
//! CPU read them, in a safetensors file, mapped and used where they lie.
//!
//! Layout (docs/quantised.md): a safetensors file whose metadata has `redraft.layout` = `1`.
//! Tensors of type U32 are packed weights, each under the names of the published tensors that it
//! was made from, joined by `|`; they are padded with zeros to whole cache lines, on which they
//! begin. All others are f32, under their published names.
//!
//! The file is mapped, so pages come in when they are first read and processes share them. A file
//! that is cut short while it is in use ends the process, as it does every program that maps it;
//! where a system has no such mapping, it is read instead.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::{Deref, Range};
use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::file_bytes::FileBytes;

/// Metadata key of the layout's version.
pub const LAYOUT_KEY: &str = "redraft.layout";
/// The version that is written and read.
pub const LAYOUT: &str = "1";
/// Metadata key of the format.
pub const FORMAT_KEY: &str = "redraft.weights";
/// Metadata key of the number of elements of the published tensors.
pub const ELEMENTS_KEY: &str = "redraft.elements";
/// Metadata key of the type that floats have in memory.
pub const DTYPE_KEY: &str = "redraft.dtype";
/// Between the names of the tensors that one packed weight was made from.
pub const SEPARATOR: char = '|';
/// Data of packed weights begin at multiples of this in the file: a cache line.
pub const ALIGNMENT: usize = 64;

/// Words of a packed weight, a part of a file.
#[derive(Clone)]
pub struct PackedWords {
    file: Arc<FileBytes>,
    bytes: Range<usize>,
}

impl PackedWords {
    /// The words at a range of bytes of a file; `None` where they do not lie in it, or not on
    /// words.
    pub fn new(file: &Arc<FileBytes>, bytes: Range<usize>) -> Option<PackedWords> {
        let words: &[u8] = file.get(bytes.clone())?;
        bytemuck::try_cast_slice::<u8, u32>(words).ok()?;
        Some(PackedWords { file: file.clone(), bytes })
    }

    /// Some of them.
    ///
    /// Panics: a range beyond their end.
    pub fn part(&self, words: Range<usize>) -> PackedWords {
        assert!(words.start <= words.end && words.end <= self.len(), "words {words:?} of {}", self.len());
        let bytes = self.bytes.start + 4 * words.start..self.bytes.start + 4 * words.end;
        PackedWords { file: self.file.clone(), bytes }
    }
}

impl Deref for PackedWords {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        bytemuck::cast_slice(&self.file[self.bytes.clone()])
    }
}

/// What a load tells its observer about the model that it makes.
pub enum Loaded<'a> {
    /// Numbers that were read whole, of a tensor with this name.
    Values { name: &'a str, shape: &'a [usize], values: &'a [f32] },
    /// A weight in groups, made from the tensors of these names.
    Packed { names: &'a [&'a str], words: Vec<&'a [u32]> },
}

/// Is told what a load makes.
pub type Observer = Box<dyn FnMut(Loaded) -> crate::error::Result<()>>;

/// Writes a file of packed weights, part by part: the header's place first, then words as they
/// come, floats at the end, and the header last.
pub struct PackedFile {
    file: BufWriter<File>,
    /// Bytes before the data: what was reserved for the header.
    data: u64,
    /// Bytes of data written.
    len: usize,
    tensors: Vec<(String, TensorInfo)>,
    floats: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl PackedFile {
    /// `names`: those of the published tensors, each of which may stand in the header once.
    pub fn new<'n>(file: File, names: impl Iterator<Item = &'n str>) -> std::io::Result<PackedFile> {
        // Type, shape and offsets of a tensor take less than 200 bytes in JSON.
        let reserved = names.map(|name| 2 * name.len() + 200).sum::<usize>() + 1000;
        let data = (8 + reserved).next_multiple_of(ALIGNMENT) as u64;
        let mut file = BufWriter::new(file);
        file.seek(SeekFrom::Start(data))?;
        Ok(PackedFile { file, data, len: 0, tensors: Vec::new(), floats: Vec::new() })
    }

    /// Takes what a load made. Floats wait in memory, so that packed words stay on cache lines.
    pub fn put(&mut self, loaded: Loaded) -> std::io::Result<()> {
        let (names, words) = match loaded {
            Loaded::Values { name, shape, values } => {
                if !self.floats.iter().any(|(other, ..)| other == name) {
                    self.floats.push((name.to_owned(), shape.to_vec(), values.to_vec()));
                }
                return Ok(());
            }
            Loaded::Packed { names, words } => (names, words),
        };
        let len = words.iter().map(|words| words.len()).sum::<usize>();
        let padded = len.next_multiple_of(ALIGNMENT / size_of::<u32>());
        for words in words {
            self.file.write_all(bytemuck::cast_slice(words))?;
        }
        self.file.write_all(&vec![0; (padded - len) * size_of::<u32>()])?;
        self.describe(names.join(&SEPARATOR.to_string()), Dtype::U32, vec![padded], padded * size_of::<u32>());
        Ok(())
    }

    fn describe(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, bytes: usize) {
        self.tensors.push((name, TensorInfo { dtype, shape, data_offsets: (self.len, self.len + bytes) }));
        self.len += bytes;
    }

    /// Writes floats and header, and returns the file and its length.
    pub fn finish(mut self, texts: &[(&str, &str)]) -> std::io::Result<(File, u64)> {
        for (name, shape, values) in std::mem::take(&mut self.floats) {
            self.file.write_all(bytemuck::cast_slice(&values))?;
            self.describe(name, Dtype::F32, shape, size_of_val(&values[..]));
        }
        let texts = texts.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
        let invalid = |error: String| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
        let metadata = Metadata::new(Some(texts), self.tensors).map_err(|e| invalid(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| invalid(e.to_string()))?;
        let room = self.data as usize - 8;
        if header.len() > room {
            return Err(invalid(format!("a header of {} bytes in the place of {room}", header.len())));
        }
        header.resize(room, b' ');
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&(room as u64).to_le_bytes())?;
        self.file.write_all(&header)?;
        let file = self.file.into_inner().map_err(|e| e.into_error())?;
        Ok((file, self.data + self.len as u64))
    }
}
