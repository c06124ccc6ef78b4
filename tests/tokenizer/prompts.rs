//! `generate` with tokenizers of other kinds: what stands first, what comes back, second models.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use redraft::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::{ROOT, files};

const SHIPPED: &str = "models/redraft-stories-10m";

fn generate(args: &[&str]) -> Output {
    let flags = ["generate", "--preset", "draft", "--device", "cpu", "--threads", "1"];
    Command::new(env!("CARGO_BIN_EXE_redraft")).current_dir(ROOT).args(flags).args(args).output().unwrap()
}

fn object(args: &[&str]) -> Value {
    let output = generate(&[args, &["--format", "json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The directory of a model with some of its files replaced.
fn with(model: &str, replaced: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(Path::new(ROOT).join(model)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && !replaced.iter().any(|(name, _)| path.ends_with(name)) {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    for (name, text) in replaced.iter().filter(|(_, text)| !text.is_empty()) {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn the_first_token_is_that_of_family_and_tokenizer() {
    const END: u64 = 65;
    let first = |model: &str, more: &[&str]| {
        let found = object(&[&["--model", model, "--prompt", "he was", "--length", "4"], more].concat());
        found["prompt"]["tokens"][0].as_u64().unwrap()
    };
    for family in ["llada", "sdar", "dream"] {
        let model = format!("tests/fixtures/{family}");
        assert_ne!(first(&model, &[]), END, "{family}: its script puts nothing there");
        assert_ne!(first(&model, &["--bos", "no"]), END, "{family}");
        assert_eq!(first(&model, &["--bos", "yes"]), END, "{family}");
    }
    assert_eq!(first("tests/fixtures/bd3lm-plain", &[]), END, "its script begins with BOS");
    assert_ne!(first("tests/fixtures/bd3lm-plain", &["--bos", "no"]), END);
    // What a post-processor says.
    let text = std::fs::read_to_string(Path::new(ROOT).join("tests/fixtures/sdar/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [END], "tokens": ["<|endoftext|>"]}}});
    let dir = with("tests/fixtures/sdar", &[("tokenizer.json", &tokenizer.to_string())]);
    assert_eq!(first(dir.path().to_str().unwrap(), &[]), END);
    assert_ne!(first(dir.path().to_str().unwrap(), &["--bos", "no"]), END);
    // Nothing at all may be given.
    let found = object(&["--model", "tests/fixtures/llada", "--prompt", "", "--length", "4"]);
    assert_eq!((&found["prompt_tokens"], found["tokens"].as_array().unwrap().len()), (&json!(0), 4));
}

#[test]
fn prompt_and_continuation_are_one_text() {
    for kind in ["llama_legacy", "llama_metaspace", "gemma", "unigram", "wordpiece", "qwen2"] {
        let path: PathBuf = files(kind).join("tokenizer.json");
        let tokenizer = Tokenizer::load(&path, 4096).unwrap();
        for seed in ["1", "2", "3"] {
            let args = [
                "--model",
                SHIPPED,
                "--tokenizer",
                path.to_str().unwrap(),
                "--prompt",
                "The quick brown",
                "--length",
                "24",
                "--ignore-eos",
                "--seed",
                seed,
            ];
            let found = object(&args);
            let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<u32>>();
            let (prompt, tokens) = (ids(&found["prompt"]["tokens"]), ids(&found["tokens"]));
            let whole = tokenizer.decode(&[prompt, tokens].concat());
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            assert_eq!(text(&found["prompt"]["text"]) + &text(&found["text"]), whole, "{kind}");
            let printed = generate(&args);
            assert_eq!(String::from_utf8(printed.stdout).unwrap(), whole + "\n", "{kind}");
        }
    }
}

/// As one text, cut wherever: the same ids, and each of the first ones lies in what comes before.
#[test]
fn a_text_after_another_is_encoded_with_it() {
    let text = "The quick brown fox — naïve 日本 👍🏽!\n  <|endoftext|> jumps</s>";
    for kind in ["gpt2", "qwen2", "llama3", "llama_legacy", "llama_metaspace", "gemma", "unigram", "wordpiece"] {
        let tokenizer = Tokenizer::load(&files(kind).join("tokenizer.json"), 4096).unwrap();
        let whole = tokenizer.encode(text).unwrap();
        let mut last = 0;
        for at in (0..=text.len()).filter(|at| text.is_char_boundary(*at)) {
            let (ids, first) = tokenizer.encode_after(&text[..at], &text[at..]).unwrap();
            assert_eq!(ids, whole, "{kind}: {at}");
            assert!(first >= last, "{kind}: {at}");
            last = first;
            // What the tokens before it decode to is in the text before; unknown ones are spelled.
            let given = tokenizer.decode_all(&ids[..first]);
            let given = given.trim_end_matches(char::REPLACEMENT_CHARACTER).trim().to_lowercase();
            assert!(given.chars().count() <= text[..at].chars().count() || given.contains("unk"), "{kind}: {at}: {given:?}");
        }
        assert_eq!(last, whole.len(), "{kind}: all are given");
        assert_eq!(tokenizer.encode_after("", text).unwrap().1, 0, "{kind}: none is given");
    }
}

#[test]
fn a_second_model_has_the_first_ones_vocabulary() {
    let text = std::fs::read_to_string(Path::new(ROOT).join(SHIPPED).join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab.insert("a".into(), b);
    vocab.insert("b".into(), a);
    let other = with(SHIPPED, &[("tokenizer.json", &tokenizer.to_string())]);
    let none = with(SHIPPED, &[("tokenizer.json", "")]);
    let run = |second: &Path| {
        let second = second.to_str().unwrap();
        let flags = [
            "generate",
            "--model",
            SHIPPED,
            "--model",
            second,
            "--prompt",
            "One day",
            "--length",
            "8",
            "--device",
            "cpu",
            "--threads",
            "1",
        ];
        let stages = ["--stage", "block=4", "--stage", "block=full,remask=0.5,weights=1"];
        Command::new(env!("CARGO_BIN_EXE_redraft")).current_dir(ROOT).args(flags).args(stages).output().unwrap()
    };
    let output = run(other.path());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("is `b`: expected the first model's vocabulary, where it is `a`"), "{error}");
    assert!(run(none.path()).status.success(), "one without a tokenizer is not asked");
}

#[test]
fn a_model_without_a_tokenizer_says_so() {
    let error = |model: &str, replaced: &[(&str, &str)]| {
        let dir = with(model, replaced);
        let output = generate(&["--model", dir.path().to_str().unwrap(), "--prompt", "he", "--length", "4"]);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let found = error("tests/fixtures/sdar", &[("tokenizer.json", "")]);
    assert!(found.contains("mask_token_id") && found.contains("no tokenizer: expected tokenizer.json"), "{found}");
    // Dream as it is published.
    let text = std::fs::read_to_string(Path::new(ROOT).join("tests/fixtures/dream/tokenizer.json")).unwrap();
    let vocab: Value = serde_json::from_str::<Value>(&text).unwrap()["model"]["vocab"].clone();
    let tokens = json!({"<|endoftext|>": 65, "<|mask|>": 66}).to_string();
    let vocab = vocab.to_string();
    let files =
        [("tokenizer.json", ""), ("vocab.json", vocab.as_str()), ("merges.txt", "#version: 0.2\n"), ("added_tokens.json", tokens.as_str())];
    let dir = with("tests/fixtures/dream", &files);
    let found = object(&["--model", dir.path().to_str().unwrap(), "--prompt", "he <|mask|>", "--length", "4"]);
    assert_eq!(found["prompt"]["text"], "he mask", "the letters that this vocabulary has: {found}");
}
