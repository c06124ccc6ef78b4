//! Files from outside: read up to a bound, regular files alone, and named for what they look like.
//!
//! A checkpoint's files are downloaded, copied and unpacked by hand. Each is opened here, so that a
//! pipe or a device in its place cannot hang the reader, a file without end cannot fill the memory,
//! an optional file is absent only if there is none, and the usual wrong contents (a Git LFS
//! pointer, a saved web page, a pickle) are told by name.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Bytes of a configuration, an index of shards, or a template.
pub(crate) const MAX_JSON_BYTES: u64 = 64 << 20;

/// Bytes of a tokenizer.json; the largest published ones have 40 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// Opens a file that must be a regular one, links followed.
pub(crate) fn open(path: &Path) -> Result<File> {
    // Looked at before it is opened: opening a pipe without a writer waits for one.
    let kind = match path.metadata() {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound && path.is_symlink() => {
            let target = path.read_link().map_or(String::new(), |target| format!(" to {}", target.display()));
            return Err(Error::new(ErrorKind::NotFound, format!("a link{target}, where nothing is: the download is not complete")));
        }
        Err(error) => return Err(error),
    };
    if !kind.is_file() {
        let found = if kind.is_dir() { "a directory" } else { "a pipe, socket or device" };
        return Err(Error::other(format!("expected a file, found {found}")));
    }
    File::open(path)
}

/// Whether there is something of that name: a file that may not be looked at is an error, and so
/// is a link to nothing. Nothing is in a file, as in one that is a whole model.
pub(crate) fn exists(path: &Path) -> Result<bool> {
    match path.try_exists() {
        Ok(exists) => Ok(exists || path.is_symlink()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(error),
    }
}

/// All bytes of a regular file.
///
/// Errors: what the system says, another kind of file, more than `max_bytes`.
pub(crate) fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_to_bound(open(path)?, max_bytes, &mut bytes)?;
    Ok(bytes)
}

/// The text of a regular file, without the mark that some editors put in front.
///
/// Errors: as [`read`]; bytes that are not UTF-8, with what they look like.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    text_of(read(path, max_bytes)?)
}

/// [`read_text`] of a file that may be absent. What is there and cannot be read is an error.
pub(crate) fn read_optional_text(path: &Path, max_bytes: u64) -> Result<Option<String>> {
    match exists(path)? {
        true => read_text(path, max_bytes).map(Some),
        false => Ok(None),
    }
}

/// Reads at a place of its own, so that threads share a file.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], at: usize) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at as u64)
}

/// Reads at a place of its own, so that threads share a file.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: usize) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at as u64)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => (bytes, at) = (&mut bytes[read..], at + read),
        }
    }
    Ok(())
}

/// Everything that `source` gives, up to a bound.
pub(crate) fn read_to_bound(source: impl Read, max_bytes: u64, bytes: &mut Vec<u8>) -> Result<()> {
    source.take(max_bytes.saturating_add(1)).read_to_end(bytes)?;
    match bytes.len() as u64 > max_bytes {
        true => Err(Error::other(format!("longer than {max_bytes} bytes, which is more than is read here"))),
        false => Ok(()),
    }
}

/// Bytes as text, without a UTF-8 mark in front.
pub(crate) fn text_of(mut bytes: Vec<u8>) -> Result<String> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    String::from_utf8(bytes).map_err(|error| {
        let looks = looks_like(error.as_bytes()).map_or(String::new(), |kind| format!(": {kind}"));
        let at = error.utf8_error().valid_up_to();
        Error::new(ErrorKind::InvalidData, format!("not UTF-8 text at byte {at}{looks}"))
    })
}

/// A JSON text as Python reads and writes it: numbers that are not finite, which JSON does not have
/// (`NaN`, `Infinity`, `-Infinity`), are null.
pub(crate) fn parse_json(text: &str) -> std::result::Result<serde_json::Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| {
        let (mut out, mut rest, mut found) = (String::with_capacity(text.len()), text, false);
        let (mut inside, mut escaped) = (false, false);
        while let Some(c) = rest.chars().next() {
            let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| !inside && rest.starts_with(word));
            match word {
                Some(word) => {
                    (found, rest) = (true, &rest[word.len()..]);
                    out.push_str("null");
                }
                None => {
                    inside ^= c == '"' && !escaped;
                    escaped = inside && c == '\\' && !escaped;
                    rest = &rest[c.len_utf8()..];
                    out.push(c);
                }
            }
        }
        // An error names its place in the text as it is.
        if found { serde_json::from_str(&out).map_err(|_| error) } else { Err(error) }
    })
}

/// What the first bytes of a file that is not what it should be look like, and the next move.
pub(crate) fn looks_like(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    let begins = |what: &str| text.get(..what.len()).is_some_and(|start| start.eq_ignore_ascii_case(what.as_bytes()));
    const SIGNATURES: [(&[u8], &str); 12] = [
        (b"PK\x03\x04", "a zip archive, as torch.save writes: save the weights again with safetensors"),
        (b"GGUF", "a GGUF file of llama.cpp: give its own path as the model's"),
        (b"ggml", "a GGML file: expected the Hugging Face directory with safetensors that it was made from"),
        (b"\x1f\x8b", "gzip data: unpack it first"),
        (b"\xfd7zXZ\x00", "xz data: unpack it first"),
        (b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
        (b"BZh", "bzip2 data: unpack it first"),
        (b"\x89HDF", "an HDF5 file of Keras: expected safetensors"),
        (b"\x93NUMPY", "a NumPy array: expected safetensors"),
        (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
        (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
        (b"%PDF", "a PDF document"),
    ];
    if bytes.is_empty() {
        return Some("an empty file: the download was not complete");
    }
    if begins("version https://git-lfs") || begins("version https://hawser") {
        return Some("a Git LFS pointer and not the file itself: run `git lfs pull` in the directory, or download it again");
    }
    if begins("<!doctype") || begins("<html") || begins("<head") || begins("<?xml") {
        return Some("a web page: the download was answered with one, as for a page of the Hub or a login");
    }
    if let Some((_, kind)) = SIGNATURES.iter().find(|(signature, _)| bytes.starts_with(signature)) {
        return Some(kind);
    }
    // Protocol 2 and later name themselves.
    if let [0x80, 2..=5, ..] = bytes {
        return Some("a pickle, as torch.save writes: save the weights again with safetensors");
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some("a tar archive: unpack it first");
    }
    let answers = ["entry not found", "repository not found", "access to", "invalid username", "unauthorized", "not found", "forbidden"];
    if answers.iter().any(|answer| begins(answer)) || begins("{\"error\"") {
        return Some("an error message of the server it was downloaded from");
    }
    if bytes[..bytes.len().min(64)].iter().all(|byte| *byte == 0) {
        return Some("zeros: the download was not complete");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_contents_are_named() {
        for (bytes, kind) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5\n"[..], "Git LFS pointer"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"<HTML lang=en>", "web page"),
            (b"PK\x03\x04\x00", "zip archive"),
            (b"\x80\x02}q\x00", "pickle"),
            (b"GGUF\x03\x00\x00\x00", "GGUF"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"", "empty file"),
            (&[0; 100], "zeros"),
            (b"\xff\xfe{\x00", "UTF-16"),
            (b"Entry not found", "error message"),
            (b"{\"error\":\"Repository not found\"}", "error message"),
        ] {
            assert!(looks_like(bytes).is_some_and(|found| found.contains(kind)), "{:?}", String::from_utf8_lossy(bytes));
        }
        for fine in [&b"{\"model_type\": \"sdar\"}"[..], b"\x40\x00\x00\x00\x00\x00\x00\x00{\"a\":", b"{}"] {
            assert_eq!(looks_like(fine), None);
        }
    }

    #[test]
    fn marks_are_skipped_and_bounds_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, b"\xef\xbb\xbf{}").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "{}");
        assert!(read_text(&path, 4).unwrap_err().to_string().contains("longer than 4 bytes"));
        std::fs::write(&path, b"\xff\xfe{\x00}\x00").unwrap();
        assert!(read_text(&path, 99).unwrap_err().to_string().contains("UTF-16"));
        assert_eq!(read_optional_text(&dir.path().join("none"), 9).unwrap(), None);
        assert!(read(dir.path(), 9).unwrap_err().to_string().contains("found a directory"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let text = r#"{"a": NaN, "b": [0.0, Infinity, -Infinity], "c": "NaN \" Infinity", "d": 1}"#;
        let expected = serde_json::json!({"a": null, "b": [0.0, null, null], "c": "NaN \" Infinity", "d": 1});
        assert_eq!(parse_json(text).unwrap(), expected);
        assert!(parse_json("{\"a\": NaN").is_err() && parse_json("[nan]").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn devices_and_dangling_links_are_refused_at_once() {
        assert!(read(Path::new("/dev/zero"), 9).unwrap_err().to_string().contains("device"));
        let dir = tempfile::tempdir().unwrap();
        let (link, pipe) = (dir.path().join("config.json"), dir.path().join("pipe"));
        std::os::unix::fs::symlink("../blobs/0", &link).unwrap();
        let error = read_optional_text(&link, 9).unwrap_err();
        assert!(error.to_string().contains("../blobs/0"), "{error}");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(read(&pipe, 9).unwrap_err().to_string().contains("a pipe"));
    }
}
