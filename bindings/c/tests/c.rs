//! The C interface as C programs see it: installed, compiled as C99 and as C++, run, and run under
//! valgrind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn root() -> PathBuf {
    here().join("../..")
}

/// The target directory of this test, whatever it is called.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("a directory above")
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    output
}

fn text(output: Output) -> String {
    String::from_utf8(output.stdout).expect("UTF-8").trim_end().to_owned()
}

/// A tree that `make install` made, with the development build of the library.
fn installed() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c-install");
        let _ = std::fs::remove_dir_all(&tree);
        run(Command::new("make")
            .arg("-C")
            .arg(here())
            .args(["install", "PROFILE=dev", "PREFIX=/usr"])
            .arg(format!("DESTDIR={}", tree.display()))
            .arg(format!("CARGO={}", env!("CARGO")))
            .arg(format!("CARGO_TARGET_DIR={}", target().display())));
        tree
    })
}

/// Compiles a program of ours against the installed tree.
fn compiled(compiler: &str, source: &str, flags: &[&str], name: &str) -> PathBuf {
    let tree = installed();
    let program = tree.join(name);
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.args(["--cflags", "--libs", "redraft"]);
    let found = text(run(pkg_config.env("PKG_CONFIG_PATH", tree.join("usr/lib/pkgconfig")).env("PKG_CONFIG_SYSROOT_DIR", tree)));
    run(Command::new(compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-g", "-pthread"])
        .args(flags)
        .arg(here().join(source))
        .args(found.split_whitespace())
        .arg("-o")
        .arg(&program));
    program
}

/// `program` with the installed library.
fn with_library(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", installed().join("usr/lib"));
    command
}

/// A model and what `check.c` does with it.
struct Checked {
    dir: &'static str,
    length: u32,
    kv_pages: u32,
    /// Fits into the pages, and does not.
    long: u32,
    too_long: u32,
}

const STORIES: Checked = Checked { dir: "models/redraft-stories-10m", length: 24, kv_pages: 28, long: 400, too_long: 500 };
/// 17,000 parameters: valgrind emulates a fused multiplication by a call, and takes minutes for one
/// forward of the other.
const TINY: Checked = Checked { dir: "tests/fixtures/bd3lm-plain", length: 12, kv_pages: 7, long: 90, too_long: 120 };

impl Checked {
    /// Runs `command` with what `check.c` takes.
    fn run(&self, command: &mut Command) -> Output {
        let broken = broken_models();
        let numbers = [self.length, self.kv_pages, self.long, self.too_long].map(|number| number.to_string());
        run(command.arg(root().join(self.dir)).arg(self.text_of_the_command()).args(numbers).arg(broken.path()))
    }

    /// What the command writes for the prompt and the seed of `check.c`. REDRAFT_COMMAND names
    /// another binary than that of the README's build.
    fn text_of_the_command(&self) -> String {
        let binary = std::env::var_os("REDRAFT_COMMAND").map_or_else(
            || {
                // Nothing to do where the README's build is there.
                run(Command::new(env!("CARGO")).args(["build", "--release", "--locked", "--quiet"]).current_dir(root()));
                target().join("release/redraft")
            },
            PathBuf::from,
        );
        let mut command = Command::new(binary);
        command.args(["generate", "--prompt", "once upon a time", "--seed", "7", "--device", "cpu", "--format", "json", "--length"]);
        let object = text(run(command.arg(self.length.to_string()).arg("--model").arg(root().join(self.dir))));
        let object: serde_json::Value = serde_json::from_str(&object).expect("an object");
        object["text"].as_str().expect("a text").to_owned()
    }
}

/// Models that cannot be opened, or that compute what cannot be used.
fn broken_models() -> tempfile::TempDir {
    let broken = tempfile::tempdir().expect("a directory");
    let whole = root().join(TINY.dir);
    let [no_weights, linked, overflow] = ["no-weights", "loop", "overflow"].map(|name| {
        let dir = broken.path().join(name);
        std::fs::create_dir(&dir).expect("made");
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(whole.join(file), dir.join(file)).expect("copied");
        }
        dir.join("model.safetensors")
    });
    assert!(!no_weights.exists());
    std::os::unix::fs::symlink("model.safetensors", linked).expect("linked");
    let weights = std::fs::read(whole.join("model.safetensors")).expect("weights");
    std::fs::write(overflow, with_infinite_logits(weights)).expect("written");
    broken
}

/// A safetensors file, f32, with the largest numbers in the layer that computes the logits.
fn with_infinite_logits(mut file: Vec<u8>) -> Vec<u8> {
    let (len, rest) = file.split_first_chunk_mut::<8>().expect("a length");
    let (header, data) = rest.split_at_mut(u64::from_le_bytes(*len) as usize);
    let header: serde_json::Value = serde_json::from_slice(header).expect("a header");
    let place = &header["backbone.output_layer.linear.weight"]["data_offsets"];
    let [start, end] = [&place[0], &place[1]].map(|at| at.as_u64().expect("a place") as usize);
    data[start..end].as_chunks_mut().0.fill(f32::MAX.to_le_bytes());
    file
}

/// An error that the bindings have no number or class for would be told as a fault of the library.
#[test]
fn every_error_has_a_status_and_a_class() {
    let read = |path: &Path| std::fs::read_to_string(path).expect("a source");
    let source = read(&root().join("src/error.rs"));
    let (_, variants) = source.split_once("pub enum Error {\n").expect("the enum");
    let (variants, _) = variants.split_once("\n}\n").expect("its end");
    let names = variants.lines().filter_map(|line| line.strip_prefix("    ").filter(|line| line.starts_with(char::is_uppercase)));
    let names: Vec<&str> = names.map(|line| line.trim_end_matches([' ', '{', ','])).collect();
    assert!(names.contains(&"Config") && names.contains(&"EngineGone"), "{names:?}");
    for mapped in [here().join("src/status.rs"), root().join("bindings/python/src/errors.rs")] {
        let text = read(&mapped);
        for name in &names {
            let row = [" { .. } =>", " =>"].iter().any(|rest| text.contains(&format!("Error::{name}{rest}")));
            assert!(row, "{}: no row for Error::{name}", mapped.display());
        }
    }
}

/// `REDRAFT_WRITE_HEADER=1 cargo test -p redraft-c` writes it.
#[test]
fn the_header_is_that_of_the_sources() {
    let config = cbindgen::Config::from_file(here().join("cbindgen.toml")).expect("a configuration");
    let mut written = Vec::new();
    cbindgen::generate_with_config(here(), config).expect("bindings").write(&mut written);
    let written = String::from_utf8(written).expect("UTF-8");
    // What Rust callers must keep is said in words above it.
    let written = without_safety_sections(&written);
    let path = here().join("include/redraft.h");
    if std::env::var_os("REDRAFT_WRITE_HEADER").is_some() {
        std::fs::write(&path, &written).expect("written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = found.lines().zip(written.lines()).position(|(found, written)| found != written);
    assert!(found == written, "include/redraft.h differs at line {:?}: REDRAFT_WRITE_HEADER=1 writes it", differs.map(|line| line + 1));
}

/// Sections `# Safety` are for Rust's lints.
fn without_safety_sections(header: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut inside = false;
    for line in header.lines() {
        if line.trim() == "// # Safety" {
            inside = true;
            while kept.last().is_some_and(|line| line.trim() == "//") {
                kept.pop();
            }
        }
        inside &= line.starts_with("//");
        if !inside {
            kept.push(line);
        }
    }
    kept.join("\n") + "\n"
}

#[test]
fn a_program_in_c_and_in_cpp() {
    let programs = [
        compiled("gcc", "tests/check.c", &["-std=c99", "-pedantic"], "check-c"),
        compiled("g++", "tests/check.c", &["-x", "c++", "-std=c++11"], "check-cpp"),
    ];
    for program in programs {
        STORIES.run(&mut with_library(program));
    }
    // The static library alone.
    let program = installed().join("check-static");
    run(Command::new("gcc")
        .arg("-I")
        .arg(installed().join("usr/include"))
        .arg(here().join("tests/check.c"))
        .arg(installed().join("usr/lib/libredraft.a"))
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&program));
    STORIES.run(&mut Command::new(program));
}

/// `program` under valgrind, which ends with code 9 where it finds something.
///
/// Memory that is "possibly lost" has a pointer into its middle. So the tokenizer's statics, hash
/// tables and `Arc`s, are reached all their life, and how many there are depends on the thread that
/// tokenized; what nothing points at is "definitely lost", and what only that reaches "indirectly".
fn valgrind(program: &Path) -> Command {
    let kinds = "definite,indirect";
    let mut valgrind = with_library("valgrind");
    // Valgrind shows programs a processor without AVX-512, which it cannot run. Turns are fair: one
    // thread that looks for events must not starve the engine's.
    valgrind.args(["--fair-sched=yes", "--leak-check=full", "--error-exitcode=9"]);
    valgrind.arg(format!("--show-leak-kinds={kinds}")).arg(format!("--errors-for-leak-kinds={kinds}"));
    valgrind.arg(program);
    valgrind
}

/// No leak, no read of what is not there, no jump on what was not written; and a leak is found.
#[test]
fn no_leak_and_no_invalid_read() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("REDRAFT_REQUIRE_VALGRIND").is_none(), "valgrind is required and not there");
        return eprintln!("skipped: no valgrind");
    }
    let checked = compiled("gcc", "tests/check.c", &["-std=c99"], "check-valgrind");
    let output = TINY.run(&mut valgrind(&checked));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{said}");
    assert!(said.contains("ERROR SUMMARY: 0 errors"), "{said}");

    let leaking = compiled("gcc", "tests/leak.c", &["-std=c99"], "leak-valgrind");
    let output = valgrind(&leaking).arg(root().join(TINY.dir)).output().expect("valgrind runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(9), "{said}");
    for lost in ["redraft_submit", "redraft_tokenize"] {
        assert!(said.contains(lost), "{lost}: {said}");
    }
}

#[test]
fn only_our_names_are_exported() {
    let library = installed().join("usr/lib/libredraft.so");
    let symbols = text(run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library)));
    let names: Vec<&str> = symbols.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.len() > 20 && names.iter().all(|name| name.starts_with("redraft_")), "{names:?}");
    let header = std::fs::read_to_string(here().join("include/redraft.h")).expect("the header");
    for name in &names {
        assert!(header.contains(&format!("{name}(")), "{name} is exported and not in the header");
    }
    let version = header.lines().find_map(|line| line.strip_prefix("#define REDRAFT_ABI_VERSION ")).expect("a version");
    let dynamic = text(run(Command::new("readelf").arg("-d").arg(&library)));
    assert!(dynamic.contains(&format!("[libredraft.so.{version}]")), "{dynamic}");
}

#[test]
fn the_example_writes_a_text() {
    let program = compiled("gcc", "examples/stream.c", &["-std=c99"], "stream");
    let said = text(run(with_library(program).arg(root().join(STORIES.dir))));
    assert!(said.contains(" tokens, ") && said.lines().count() >= 2, "{said}");
}
