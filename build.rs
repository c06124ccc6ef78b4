//! Embeds `kernels/*` as two tables: headers as (name, text), kernels as (stem, text, hash). No
//! compiler of device code, no network, no probing of the machine: what the binary holds depends on
//! the sources alone.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

fn main() {
    let kernels = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", kernels.display()); // a file added or removed

    let entries = fs::read_dir(&kernels).unwrap_or_else(|e| panic!("{}: {e}", kernels.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable directory entry").path()).collect();
    paths.sort();

    // A header is part of every kernel, so its bytes open the hash of each.
    let mut header_hash = FNV_OFFSET;
    let (mut headers, mut sources) = (String::new(), String::new());
    for extension in ["cuh", "cu"] {
        for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == extension)) {
            println!("cargo::rerun-if-changed={}", path.display());
            let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let name = path.file_name().and_then(|name| name.to_str()).expect("a kernel file with a UTF-8 name");
            if extension == "cuh" {
                header_hash = fnv1a(header_hash, text.as_bytes());
                writeln!(headers, "    ({name:?}, {text:?}),").expect("write to a string");
            } else {
                let stem = name.trim_end_matches(".cu");
                writeln!(sources, "    ({stem:?}, {text:?}, {:#018x}),", fnv1a(header_hash, text.as_bytes())).expect("write to a string");
            }
        }
    }
    let table = format!(
        "/// Headers as (name, text).\npub(crate) static HEADERS: &[(&str, &str)] = &[\n{headers}];\n\
         /// Kernels as (stem, text, FNV-1a of all headers and the text).\npub(crate) static SOURCES: &[(&str, &str, u64)] = &[\n{sources}];\n"
    );
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.rs");
    fs::write(&out, table).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, 64 bits: names a build; nothing relies on it against an adversary.
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
