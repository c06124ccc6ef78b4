//! Built code on disk: one file per build, named after what it is, found again by the next
//! process.
//!
//! An entry is the payload followed by a trailer of sixteen bytes: a checksum over key and payload,
//! and a magic word. A loader of ELF images ignores what follows the image, so an entry can be
//! opened in place. Entries are written beside their name and renamed, so readers see all of one or
//! none; one that is cut short, changed or misnamed is not there, and is built and written again. A
//! directory that cannot be written costs a build per process and nothing else.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"redraft1";
const TRAILER: usize = 16;
/// File systems allow 255 bytes; the rest is for the extension and the names of unfinished files.
const MAX_NAME: usize = 180;

/// A directory of built code.
#[derive(Clone, Debug)]
pub struct Cache {
    /// None where no directory is known: nothing is found, nothing kept.
    dir: Option<PathBuf>,
}

impl Cache {
    /// The user's: `$REDRAFT_CACHE_DIR`, else `$XDG_CACHE_HOME/redraft`, else `~/.cache/redraft`.
    /// Made when something is first kept.
    pub fn open() -> Cache {
        let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let xdg = || var("XDG_CACHE_HOME").filter(|dir| dir.is_absolute()).map(|dir| dir.join("redraft"));
        let home = || var("HOME").map(|dir| dir.join(".cache/redraft"));
        Cache { dir: var("REDRAFT_CACHE_DIR").or_else(xdg).or_else(home) }
    }

    pub fn in_dir(dir: &Path) -> Cache {
        Cache { dir: Some(dir.to_path_buf()) }
    }

    /// The payload kept under `key`, if it is there and whole.
    pub fn get(&self, key: &str, extension: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key, extension)?).ok()?;
        let payload = bytes.len().checked_sub(TRAILER)?;
        (bytes[payload..] == trailer(key, &bytes[..payload])).then(|| {
            bytes.truncate(payload);
            bytes
        })
    }

    /// The file that holds the payload, and a trailer after it, if it is there and whole.
    pub fn path_of(&self, key: &str, extension: &str) -> Option<PathBuf> {
        self.get(key, extension).and_then(|_| self.path(key, extension))
    }

    /// Keeps `bytes` under `key` in place of an earlier entry. None where that is not possible.
    pub fn store(&self, key: &str, extension: &str, bytes: &[u8]) -> Option<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = self.path(key, extension)?;
        fs::create_dir_all(path.parent()?).ok()?;
        let part = path.with_extension(format!("{}-{}.part", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let whole = [bytes, &trailer(key, bytes)].concat();
        let kept = fs::write(&part, whole).and_then(|()| fs::rename(&part, &path));
        if kept.is_err() {
            // A full disk: what was written of it goes. If even that fails, it is the next one's to
            // overwrite.
            let _ = fs::remove_file(&part);
        }
        kept.ok().map(|()| path)
    }

    /// Where the payload of a key lies, whether or not it is there. None without a directory.
    pub fn path(&self, key: &str, extension: &str) -> Option<PathBuf> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "=._-".contains(c);
        let mut name: String = key.chars().map(|c| if plain(c) { c } else { '_' }).collect();
        if name.len() > MAX_NAME {
            name.truncate(MAX_NAME - 17);
            name = format!("{name}-{:016x}", fnv1a(key.as_bytes().iter()));
        }
        Some(self.dir.as_ref()?.join(format!("{name}.{extension}")))
    }
}

/// The key is part of the sum: two keys that happen to share a file name never share a payload.
fn trailer(key: &str, payload: &[u8]) -> [u8; TRAILER] {
    let sum = fnv1a(key.as_bytes().iter().chain(payload));
    let mut bytes = [0; TRAILER];
    bytes[..8].copy_from_slice(&sum.to_le_bytes());
    bytes[8..].copy_from_slice(MAGIC);
    bytes
}

/// FNV-1a, 64 bits: finds damage, not forgery. A process that can write the directory can run code
/// as its owner anyway.
pub(in crate::cuda) fn fnv1a<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::in_dir(&dir.path().join("made/when/needed"));
        let key = "embed-THREADS=128-sm_90a-nvrtc13.0-65be0db342ad51a0-0123456789abcdef-0123456789abcdef";
        assert_eq!(cache.get(key, "cubin"), None);
        let path = cache.store(key, "cubin", b"\x7fELF code").unwrap();
        assert_eq!(path.file_name().unwrap().to_str().unwrap(), format!("{key}.cubin"));
        assert_eq!(cache.get(key, "cubin").unwrap(), b"\x7fELF code");
        assert_eq!(cache.path_of(key, "cubin"), Some(path.clone()));
        assert_eq!(cache.get(key, "so"), None);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no unfinished file stays");

        let whole = fs::read(&path).unwrap();
        for cut in [0, 1, 8, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(cache.get(key, "cubin"), None, "{cut} bytes");
        }
        for flipped in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[flipped] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.get(key, "cubin"), None, "byte {flipped}");
        }
        cache.store(key, "cubin", b"again").unwrap();
        assert_eq!(cache.get(key, "cubin").unwrap(), b"again");
    }

    #[test]
    fn an_entry_belongs_to_its_own_key() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::in_dir(dir.path());
        cache.store("a b", "so", b"1").unwrap();
        assert_eq!(cache.get("a_b", "so"), None);
        let long = |end: &str| format!("{}{end}", "DEFINE=1-".repeat(60));
        cache.store(&long("x"), "so", b"2").unwrap();
        cache.store(&long("y"), "so", b"3").unwrap();
        assert_eq!(cache.get(&long("x"), "so").unwrap(), b"2");
    }

    #[test]
    fn a_directory_that_cannot_be_is_no_cache() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "not a directory").unwrap();
        for cache in [Cache::in_dir(&file.join("below")), Cache { dir: None }] {
            assert_eq!(cache.store("key", "so", b"1"), None);
            assert_eq!(cache.get("key", "so"), None);
        }
    }
}
