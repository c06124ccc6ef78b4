//! Files of the commands: model directories, texts to read, files to write.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::input_file;

/// Directory under `models/` that is used without `--model`.
const SHIPPED_MODEL: &str = "redraft-stories-10m";

/// Directory under `models/` whose model scores text without `--judge`.
const SHIPPED_JUDGE: &str = "redraft-judge";

/// The directory asked for, or the model that ships: below the working directory, beside the
/// binary, or where it was built.
pub(crate) fn model_dir(model: Option<&Path>) -> Result<PathBuf> {
    model.map_or_else(
        || shipped(SHIPPED_MODEL, "the model that ships with redraft is not here; run from the repository or give --model DIR"),
        |dir| Ok(dir.to_path_buf()),
    )
}

/// The judge asked for, or the one that ships, which is looked for as the model is.
pub(crate) fn judge_dir(judge: Option<&Path>) -> Result<PathBuf> {
    judge.map_or_else(
        || shipped(SHIPPED_JUDGE, "the judge that ships with redraft is not here; run from the repository or give --judge DIR"),
        |dir| Ok(dir.to_path_buf()),
    )
}

fn shipped(name: &str, missing: &str) -> Result<PathBuf> {
    let relative = Path::new("models").join(name);
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.ancestors().skip(1).map(|dir| dir.join(&relative));
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(&relative);
    let found = std::iter::once(relative.clone()).chain(beside).chain([built]).find(|dir| dir.join("config.json").exists());
    found.ok_or_else(|| Error::config(&relative, missing))
}

/// Bytes of a text at most: a device without an end is refused before it fills the memory.
const MAX_TEXT_BYTES: u64 = 2 << 30;

/// The same of a device, as /dev/zero, which gives gigabytes before the bound is reached.
const MAX_DEVICE_BYTES: u64 = 1 << 20;

/// Whether it is a device; a terminal, where a person types, is none here.
fn has_no_end(file: &std::fs::File) -> bool {
    #[cfg(unix)]
    {
        use std::io::IsTerminal;
        use std::os::unix::fs::FileTypeExt;
        file.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device()) && !file.is_terminal()
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        false
    }
}

/// Reads a file, or stdin for `-`. Pipes are fine: a shell makes them of `<(...)`.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let outcome = if path == Path::new("-") {
        input_file::read_to_bound(std::io::stdin(), MAX_TEXT_BYTES, &mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| {
            let bound = if has_no_end(&file) { MAX_DEVICE_BYTES } else { MAX_TEXT_BYTES };
            input_file::read_to_bound(file, bound, &mut bytes)
        })
    };
    outcome.and_then(|()| input_file::text_of(bytes)).map_err(|e| Error::io(path, &e))
}

/// Writes through a temporary sibling, so that a full disk or an interruption never leaves half a
/// file under the asked name. Pipes and devices are written as they are: renaming over one would
/// replace it.
pub(crate) fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let special = path.metadata().is_ok_and(|m| !m.is_file());
    let target = if special {
        path.to_path_buf()
    } else {
        let mut name = path.file_name().ok_or_else(|| Error::request(format!("{}: not a file name", path.display())))?.to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        path.with_file_name(name)
    };
    let outcome = std::fs::OpenOptions::new().write(true).create(!special).truncate(!special).open(&target).and_then(|file| {
        let mut buffered = std::io::BufWriter::new(file);
        write(&mut buffered)?;
        let file = buffered.into_inner().map_err(|e| e.into_error())?;
        if special { Ok(()) } else { file.sync_all().and_then(|()| std::fs::rename(&target, path)) }
    });
    outcome.map_err(|e| {
        if !special {
            // The error matters, not whether the leftover could be removed.
            let _ = std::fs::remove_file(&target);
        }
        Error::io(path, &e)
    })
}
