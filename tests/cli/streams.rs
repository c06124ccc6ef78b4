//! Terminals, pipes, odd values and drivers: what goes wrong around the command never costs the
//! user a text.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::work::{Ran, Work, fixture, ids, repository};

/// Writes notes: the text is longer than the model was trained for.
fn long() -> [String; 12] {
    let model = fixture("bd3lm-plain");
    let flags = ["generate", "--device", "cpu", "--model", &model, "--prompt", "x", "--length", "40", "--ignore-eos", "--preset", "draft"];
    flags.map(String::from)
}

/// A log on a full disk, or one whose reader is gone.
#[cfg(unix)]
#[test]
fn stderr_that_cannot_be_written_costs_nothing() {
    let work = Work::new();
    let args = long();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let good = work.run(&args);
    assert!(good.stderr.contains("trained on"), "there is a note: {}", good.stderr);
    let full = work.command(&args).stderr(File::options().write(true).open("/dev/full").expect("a device")).output().expect("starts");
    assert_eq!((full.status.code(), String::from_utf8(full.stdout).expect("text")), (Some(0), good.stdout.clone()));
    let mut gone = Command::new("true").stdin(Stdio::piped()).spawn().expect("starts");
    let pipe = gone.stdin.take().expect("piped");
    gone.wait().expect("ends");
    let closed = work.command(&args).stderr(Stdio::from(pipe)).output().expect("starts");
    assert_eq!((closed.status.code(), String::from_utf8(closed.stdout).expect("text")), (Some(0), good.stdout));
    // Errors keep their codes.
    for (args, code) in [(&["inspect", "nowhere"][..], 1), (&["generate", "--length", "x"], 2), (&["generate", "--length", "0"], 2)] {
        let status = work.command(args).stderr(File::options().write(true).open("/dev/full").expect("a device")).status().expect("starts");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

/// Help that cannot be written is a failure like any other output; a closed pipe is none.
#[cfg(unix)]
#[test]
fn help_that_cannot_be_written_fails() {
    let work = Work::new();
    let full = || File::options().write(true).open("/dev/full").expect("a device");
    assert_eq!(work.command(&["--help"]).stdout(full()).status().expect("starts").code(), Some(1));
    assert_eq!(work.command(&["--version"]).stdout(full()).status().expect("starts").code(), Some(1));
    assert_eq!(work.command(&["--help"]).status().expect("starts").code(), Some(0));
}

#[test]
fn texts_may_begin_with_a_dash() {
    let work = Work::new();
    let text = |args: &[&str]| work.run(&[&["generate", "--device", "cpu", "--length", "4"], args].concat()).ok();
    for prompt in ["- milk", "-5 degrees", "--", "-", "--prompt"] {
        assert!(text(&["--prompt", prompt]).starts_with(prompt), "{prompt}");
    }
    text(&["--prompt", "x", "--stop", "--"]);
    text(&["--prompt", "x", "--stop", "-"]);
    let filled = work.run(&["generate", "--device", "cpu", "--infill", "- [_:3] -", "--preset", "draft"]).ok();
    assert!(filled.starts_with('-') && filled.trim_end().ends_with('-'), "{filled}");
    work.run(&["generate", "--", "-5 degrees"]).fails(2, &["--prompt TEXT"]);
}

/// Holes have lengths of their own: nothing ends them, and nothing cuts what stands after them.
#[test]
fn infilling_knows_no_stop() {
    let work = Work::new();
    let infill = ["generate", "--device", "cpu", "--infill", "The [_:6] sat on the [_:3].", "--preset", "draft"];
    work.run(&[&infill[..], &["--stop", "e"]].concat()).fails(2, &["--stop", "--infill"]);
    let object = work.run(&[&infill[..], &["--format", "json", "--seed", "3"]].concat()).json().remove(0);
    assert_eq!((ids(&object["tokens"]).len(), object["finish"].as_str()), (9, Some("length")));
    assert!(object["filled"].as_str().is_some_and(|text| text.contains(" sat on the") && text.ends_with('.')), "{object}");
}

/// A temperature whose inverse f32 cannot hold is the most probable token's, as 0 is.
#[test]
fn the_smallest_temperatures_are_greedy() {
    let work = Work::new();
    let run = |device: &str, temperature: &str, more: &[&str]| {
        let flags = ["generate", "--prompt", "Once", "--length", "6", "--preset", "draft", "--ignore-eos", "--format", "json"];
        let args = [&flags[..], &["--device", device, "--temperature", temperature], more].concat();
        ids(&work.run(&args).json()[0]["tokens"])
    };
    let greedy = run("cpu", "0", &[]);
    for temperature in ["1e-37", "2e-39", "1e-42", "1e-45"] {
        for more in [&[][..], &["--top-p", "1"], &["--top-k", "5"], &["--top-p", "1", "--top-k", "5"]] {
            assert_eq!(run("cpu", temperature, more), greedy, "{temperature} {more:?}");
        }
        if cfg!(feature = "cuda") {
            assert_eq!(run("emu", temperature, &[]), greedy, "{temperature} emulated");
        }
    }
}

/// Blocks that are decoded to their end need room beyond the length that is asked for.
#[test]
fn every_length_has_its_pages() {
    let work = Work::new();
    let model = fixture("llada2");
    for length in [1, 20, 30, 31, 40, 46, 47, 63] {
        let length = length.to_string();
        let args =
            ["generate", "--device", "cpu", "--model", &model, "--preset", "llada2", "--prompt", "a", "--ignore-eos", "--format", "json"];
        let object = work.run(&[&args[..], &["--length", &length]].concat()).json().remove(0);
        assert_eq!(ids(&object["tokens"]).len().to_string(), length);
    }
    let bench = ["bench", "--device", "cpu", "--runs", "1", "--model", &model, "--preset", "llada2,sdar", "--length", "37"];
    work.run(&bench).ok();
}

/// The model that ships, where " and" ends a text beside its own end of text.
fn model_that_ends_at_and(work: &Work) -> (String, u64) {
    let shipped = repository().join("models/redraft-stories-10m");
    std::fs::create_dir(work.path("m")).expect("a directory");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(shipped.join(file), work.path("m").join(file)).expect("a copy");
    }
    let tokenizer: Value = serde_json::from_slice(&std::fs::read(shipped.join("tokenizer.json")).expect("a file")).expect("JSON");
    let and = tokenizer["model"]["vocab"]["Ġand"].as_u64().expect("a word of stories");
    std::fs::write(work.path("m/generation_config.json"), format!("{{\"eos_token_id\": [0, {and}]}}")).expect("a file");
    (work.path("m").display().to_string(), and)
}

/// Every id that ends a text ends it in the draft and after every refinement.
#[test]
fn what_ends_a_text_ends_it_after_refinements_too() {
    let work = Work::new();
    let (model, and) = model_that_ends_at_and(&work);
    let args = ["generate", "--device", "cpu", "--model", &model, "--prompt", "Once upon a time", "--length", "40", "--preset", "did"];
    let objects = work.run(&[&args[..], &["--samples", "40", "--temperature", "1", "--format", "jsonl"]].concat()).json();
    let mut in_the_middle = 0;
    for object in &objects {
        let tokens = ids(&object["tokens"]);
        assert!(!object["text"].as_str().expect("a text").contains(" and "), "{object}");
        let ends = tokens.iter().any(|token| [0, and].contains(token));
        if ends {
            assert_eq!(object["finish"], "end-of-text", "{object}");
        }
        in_the_middle += usize::from(tokens[..tokens.len() - 1].contains(&and));
    }
    assert!(in_the_middle > 0, "no refinement wrote the id into the middle of a text: the test shows nothing");
    let text = work.run(&[&args[..], &["--samples", "4", "--temperature", "1"]].concat()).ok();
    assert!(!text.contains(" and "), "{text}");
}

/// Values of files cannot steer the terminal.
#[test]
fn control_characters_are_escaped() {
    let work = Work::new();
    work.write("config.json", r#"{"model_type": "\u001b[2J\u001b]0;owned\u0007"}"#);
    let ran = work.run(&["inspect", "."]);
    assert!(!ran.stderr.contains(['\x1b', '\x07']) && ran.stderr.contains(r"\u{1b}[2J"), "{:?}", ran.stderr);
    ran.fails(1, &["owned"]);
    work.write("config.json", &format!(r#"{{"model_type": "{}"}}"#, "x".repeat(200_000)));
    let ran = work.run(&["inspect", "."]);
    assert!(ran.stderr.len() < 4000, "{} bytes", ran.stderr.len());
    ran.fails(1, &["left out"]);
}

/// Warnings of a checkpoint are told once, and told by `inspect`.
#[test]
fn advice_that_is_passed_over_is_told() {
    let work = Work::new();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new(&fixture("bd3lm-plain")).join(file), work.path(file)).expect("a copy");
    }
    work.write("generation_config.json", r#"{"top_p": 0}"#);
    let ran = work.run(&["generate", "--device", "cpu", "--model", ".", "--length", "4"]);
    assert_eq!(ran.stderr.matches("top_p").count(), 1, "{}", ran.stderr);
    ran.ok();
    let object = work.run(&["inspect", ".", "--format", "json"]).json().remove(0);
    assert!(object["warnings"][0].as_str().is_some_and(|warning| warning.contains("top_p")), "{object}");
}

#[test]
fn more_threads_than_cores_are_told() {
    let cores = std::thread::available_parallelism().expect("cores").get();
    let work = Work::new();
    let ran = work.run(&["generate", "--device", "cpu", "--length", "4", "--threads", "1000"]);
    assert_eq!(cores < 1000, ran.stderr.contains("--threads 1000"), "{}", ran.stderr);
    ran.ok();
}

/// A driver that is there and does not start is told; its absence, and that of a GPU, are not.
#[cfg(all(target_os = "linux", feature = "cuda"))]
#[test]
fn auto_tells_of_a_driver_that_does_not_start() {
    let work = Work::new();
    for (code, told) in [(803, true), (999, true), (100, false)] {
        let mut source = format!("int cuInit(unsigned f) {{ return {code}; }}\n");
        source += "int cuGetErrorName(int e, const char **s) { *s = \"CUDA_ERROR_OF_THE_TEST\"; return 0; }\n";
        source += "int cuGetErrorString(int e, const char **s) { *s = \"a reason\"; return 0; }\n";
        for symbol in ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2"] {
            source += &format!("int {symbol}(void) {{ return 1; }}\n");
        }
        work.write("stub.c", &source);
        let compiler = std::env::var("CC").unwrap_or_else(|_| "gcc".into());
        let mut build = Command::new(compiler);
        build.current_dir(work.dir.path()).args(["-w", "-shared", "-fPIC", "stub.c", "-o", "libcuda.so.1"]);
        assert!(build.status().expect("gcc starts").success());
        std::fs::copy(work.path("libcuda.so.1"), work.path("libcuda.so")).expect("a copy");
        let run = |device: &str| {
            let args = ["generate", "--device", device, "--prompt", "Once", "--length", "4", "--preset", "draft"];
            Ran::new(&args, work.command(&args).env("LD_LIBRARY_PATH", work.dir.path()).output().expect("starts"))
        };
        let auto = run("auto");
        assert_eq!(auto.stderr.contains("CUDA_ERROR_OF_THE_TEST"), told, "{code}: {}", auto.stderr);
        assert_eq!(auto.stderr.contains("going on with the CPU"), told, "{code}: {}", auto.stderr);
        auto.ok();
        run("cuda").fails(1, &["CUDA_ERROR_OF_THE_TEST", "--device cpu"]);
    }
}

/// Whatever the system refuses, the command ends with an error of its own and never with a panic.
#[cfg(target_os = "linux")]
#[test]
fn little_memory_is_an_error() {
    let work = Work::new();
    let mut codes = std::collections::BTreeSet::new();
    for kib in (40_000..=200_000).step_by(8_000) {
        let command = format!("ulimit -v {kib}; ulimit -c 0; exec \"$0\" generate --length 8 --preset draft --device cpu --threads 1");
        let ran =
            Command::new("sh").args(["-c", &command, env!("CARGO_BIN_EXE_redraft")]).current_dir(work.dir.path()).output().expect("sh");
        let stderr = String::from_utf8_lossy(&ran.stderr).into_owned();
        // Below what the loader of the system needs nothing of ours runs.
        let ours = !stderr.contains("error while loading shared libraries") && ran.status.code() != Some(127);
        assert!(!ours || [Some(0), Some(1)].contains(&ran.status.code()), "{kib} KiB: {:?} {stderr}", ran.status);
        codes.insert(ran.status.code());
    }
    assert!(codes.contains(&Some(0)) && codes.len() > 1, "too much or too little memory to show anything: {codes:?}");
}
