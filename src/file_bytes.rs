//! A file's bytes, mapped where the system maps files, and read where it does not.
//!
//! A mapped file that another program cuts short ends the process that reads beyond its end. So
//! only files that are kept to be mapped are opened here; published checkpoints are read
//! ([`crate::weights`]).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Deref;

use memmap2::Mmap;

/// What bytes that are read lie on: a cache line.
const LINE: usize = 64;

/// A file's bytes, mapped or read.
pub struct FileBytes(Bytes);

enum Bytes {
    Mapped(Mmap),
    /// Whole words, so that they are aligned for their readers.
    Read(Vec<[u32; 16]>, usize),
}

impl FileBytes {
    /// Maps a file, or reads it where it cannot be mapped.
    ///
    /// Errors: those of reading.
    pub fn open(mut file: &File) -> std::io::Result<FileBytes> {
        // SAFETY: nothing here writes to the mapping. Another process may change or cut the file:
        // changed bytes are other weights, as in a file that is read, and a page beyond a cut end
        // ends the process (module documentation); no value is assumed of any byte.
        if let Ok(map) = unsafe { Mmap::map(file) } {
            return Ok(FileBytes(Bytes::Mapped(map)));
        }
        let len = file.metadata()?.len() as usize;
        let mut lines: Vec<[u32; 16]> = Vec::new();
        lines.try_reserve_exact(len.div_ceil(LINE)).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        lines.resize(len.div_ceil(LINE), [0; 16]);
        file.seek(SeekFrom::Start(0))?;
        file.read_exact(&mut bytemuck::cast_slice_mut(&mut lines)[..len])?;
        Ok(FileBytes(Bytes::Read(lines, len)))
    }

    /// Whether the system maps it.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Bytes::Mapped(_))
    }
}

impl Deref for FileBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Mapped(map) => map,
            Bytes::Read(lines, len) => &bytemuck::cast_slice(lines)[..*len],
        }
    }
}
