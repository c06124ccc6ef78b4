//! The command line as scripts see it: bytes on stdout, lines on stderr, exit codes. Every test has
//! a fresh directory.

mod quantize;
mod score;
mod streams;
mod work;

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use work::{Work, fixture, fixtures, ids};

/// JSON output without what a clock says, byte by byte otherwise.
fn without_times(text: &str) -> String {
    let mut text = text.to_string();
    for (key, ends) in [("\"timings\":{", "}"), ("\"ms\":", ",}"), ("\"tokens_per_s\":", ",}")] {
        let mut from = 0;
        while let Some(at) = text[from..].find(key) {
            let start = from + at + key.len();
            let end = start + text[start..].find(|c| ends.contains(c)).expect("a value ends");
            text.replace_range(start..end, "");
            from = start;
        }
    }
    text
}

const GENERATE: [&str; 9] = ["generate", "--prompt", "Once upon a time", "--length", "24", "--ignore-eos", "--format", "json", "--seed"];

fn generate<'a>(seed: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&GENERATE[..], &[seed], more].concat()
}

#[test]
fn the_same_command_writes_the_same_bytes() {
    let work = Work::new();
    let one = without_times(&work.run(&generate("3", &[])).ok());
    assert!(one.contains("\"timings\":{}") && one.contains("\"ms\":}") && one.contains("\"tokens_per_s\":}"), "{one}");
    for more in [vec![], vec!["--format", "jsonl"]] {
        // A repeated flag is a mistake, so the format is replaced and not added.
        let mut args = generate("3", &[]);
        if let [_, format] = more[..] {
            args[7] = format;
        }
        assert_eq!(without_times(&work.run(&args).ok()), one, "{more:?}");
    }
    assert_ne!(without_times(&work.run(&generate("4", &[])).ok()), one, "another seed");
}

#[test]
fn threads_change_nothing_but_the_name_of_the_device() {
    let work = Work::new();
    let run = |threads| {
        let mut objects = work.run(&generate("3", &["--samples", "2", "--threads", threads])).json();
        objects.iter_mut().for_each(|o| o["device"] = Value::Null);
        objects.iter().map(|o| without_times(&o.to_string())).collect::<Vec<_>>()
    };
    assert_eq!(run("1"), run("2"));
}

/// The object that scripts rely on.
#[test]
fn the_json_object_keeps_its_contract() {
    let work = Work::new();
    let object = work.run(&generate("5", &["--preset", "did"])).json().remove(0);
    let keys =
        ["model", "device", "dtype", "seed", "sample", "prompt_tokens", "tokens", "text", "draft", "confidence", "revealed_at", "stages"];
    for key in keys {
        assert!(!object[key].is_null(), "{key}");
    }
    for key in ["load_ms", "first_token_ms", "draft_ms", "refine_ms", "total_ms"] {
        assert!(object["timings"][key].as_f64().is_some_and(|ms| ms >= 0.0), "{key}");
    }
    assert!(object["tokens_per_s"].as_f64().is_some_and(|r| r > 0.0));
    assert_eq!((object["seed"].as_u64(), object["sample"].as_u64(), object["dtype"].as_str()), (Some(5), Some(0), Some("f32")));
    for list in ["tokens", "confidence", "revealed_at"] {
        assert_eq!(object[list].as_array().map(Vec::len), Some(24), "{list}");
    }
    assert_eq!(ids(&object["draft"]["tokens"]).len(), 24);
    let stages = object["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 2);
    for stage in stages {
        for key in ["block_len", "unmask", "kv", "nfe", "rows", "remasked", "changed", "ms"] {
            assert!(!stage[key].is_null(), "{key} of {stage}");
        }
        for kind in ["prefill", "denoise", "commit", "joint"] {
            assert!(stage["forwards"][kind].is_u64(), "{kind} of {stage}");
        }
    }
    assert_eq!((stages[0]["block_len"].as_u64(), stages[1]["block_len"].as_str()), (Some(4), Some("full")));
    assert_eq!((stages[0]["nfe"].as_u64(), stages[1]["nfe"].as_u64()), (Some(24), Some(8)));
    let remasked = ids(&stages[1]["remasked"]);
    assert_eq!(remasked.len(), 8, "floor(0.35 x 24)");
    let prompt = object["prompt_tokens"].as_u64().expect("a count");
    let changed = remasked.iter().filter(|p| {
        let at = (**p - prompt) as usize;
        assert_eq!(object["revealed_at"][at][0].as_u64(), Some(1), "position {p} was revealed by the refinement");
        object["tokens"][at] != object["draft"]["tokens"][at]
    });
    assert_eq!(stages[1]["changed"].as_u64(), Some(changed.count() as u64));
}

#[test]
fn many_samples_begin_with_the_one() {
    let work = Work::new();
    let alone = work.run(&generate("6", &[])).json();
    let eight = work.run(&generate("6", &["--samples", "8"])).json();
    assert_eq!(eight.len(), 8);
    let strip = |o: &Value| without_times(&o.to_string());
    assert_eq!(strip(&eight[0]), strip(&alone[0]));
    for (i, object) in eight.iter().enumerate() {
        assert_eq!(object["sample"].as_u64(), Some(i as u64), "samples are printed in order");
        assert!(eight[..i].iter().all(|other| other["tokens"] != object["tokens"]), "sample {i} is another text");
    }
    let prefills: u64 = eight.iter().map(|o| o["stages"][0]["forwards"]["prefill"].as_u64().expect("a count")).sum();
    assert_eq!(prefills, 1, "the prompt is computed once");
    let text = work.run(&["generate", "--prompt", "Once", "--length", "8", "--samples", "3"]).ok();
    assert_eq!(text.matches("=== sample ").count(), 3, "{text}");
}

#[test]
fn a_prompt_may_come_from_a_flag_a_file_or_stdin() {
    let work = Work::new();
    let prompt = "The little dog\nwanted to";
    let file = work.write("prompt.txt", prompt);
    let tail = ["--length", "12", "--seed", "2"];
    let with = |args: &[&str]| [&["generate"], args, &tail].concat().into_iter().map(String::from).collect::<Vec<_>>();
    let strs = |args: &Vec<String>| args.iter().map(String::as_str).map(String::from).collect::<Vec<_>>();
    let run = |args: Vec<String>, input: Option<&str>| {
        let args = strs(&args);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        input.map_or_else(|| work.run(&args), |input| work.feed(&args, input)).ok()
    };
    let flag = run(with(&["--prompt", prompt]), None);
    assert!(flag.starts_with(prompt) && flag.ends_with('\n'), "{flag:?}");
    assert_eq!(run(with(&["--prompt-file", &file]), None), flag);
    assert_eq!(run(with(&["--prompt-file", "-"]), Some(prompt)), flag);
    assert_eq!(run(with(&["-"]), Some(prompt)), flag);
}

/// Replaying a trace's reveals and remasks gives the text, step by step, for every sample in it.
#[test]
fn a_trace_joins_to_the_text() {
    let work = Work::new();
    let trace = work.path("trace.jsonl").display().to_string();
    let more = ["--samples", "3", "--trace", &trace];
    let objects = work.run(&generate("7", &more)).json();
    let lines = std::fs::read_to_string(&trace).expect("a trace");
    let prompt = objects[0]["prompt_tokens"].as_u64().expect("a count") as usize;
    let mut canvas = vec![vec![None::<u64>; prompt + 24]; 3];
    let mut confidence = vec![vec![0.0f64; prompt + 24]; 3];
    let (mut reveals, mut done) = (vec![[0u64; 2]; 3], [false; 3]);
    for line in lines.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let sample = event["sample"].as_u64().expect("a sample") as usize;
        let stage = event["stage"].as_u64().expect("a stage") as usize;
        let (positions, tokens) = (ids(&event["positions"]), ids(&event["tokens"]));
        assert!(event["block"].is_u64() && positions.len() == tokens.len(), "{line}");
        assert!(!done[sample], "an event after the end: {line}");
        for (i, (p, token)) in positions.iter().map(|p| *p as usize).zip(tokens).enumerate() {
            assert!(p >= prompt, "a prompt position: {line}");
            match event["event"].as_str().expect("a kind") {
                "reveal" => {
                    assert_eq!(canvas[sample][p], None, "position {p} is revealed twice: {line}");
                    canvas[sample][p] = Some(token);
                    confidence[sample][p] = event["confidence"][i].as_f64().expect("a number");
                }
                "remask" => assert_eq!(canvas[sample][p].take(), Some(token), "position {p}: {line}"),
                "commit" | "done" => assert_eq!(canvas[sample][p], Some(token), "position {p}: {line}"),
                other => panic!("{other}: {line}"),
            }
        }
        if event["event"] == "reveal" {
            assert_eq!(event["step"].as_u64(), Some(reveals[sample][stage]), "steps count through a stage: {line}");
            reveals[sample][stage] += 1;
        }
        done[sample] |= event["event"] == "done";
    }
    assert_eq!(done, [true; 3]);
    for (i, object) in objects.iter().enumerate() {
        let written: Vec<u64> = canvas[i][prompt..].iter().map(|t| t.expect("revealed")).collect();
        assert_eq!(written, ids(&object["tokens"]), "sample {i}");
        for (at, value) in object["confidence"].as_array().expect("a list").iter().enumerate() {
            assert_eq!(value.as_f64(), Some(confidence[i][prompt + at]), "sample {i}: confidence {at}");
        }
        for (stage, count) in reveals[i].iter().enumerate() {
            assert_eq!(object["stages"][stage]["nfe"].as_u64(), Some(*count), "sample {i} stage {stage}");
        }
    }
}

#[test]
fn infilling_keeps_the_given_text() {
    let work = Work::new();
    let infill = "The cat [____:5] sat on the [__:3].";
    let object = work.run(&["generate", "--infill", infill, "--format", "json", "--seed", "1"]).json().remove(0);
    assert_eq!(ids(&object["positions"]).len(), 8);
    assert_eq!(ids(&object["tokens"]).len(), 8);
    let filled = object["filled"].as_str().expect("text");
    assert!(filled.starts_with("The cat") && filled.contains(" sat on the") && filled.ends_with('.'), "{filled}");
    assert_eq!(work.run(&["generate", "--infill", infill, "--seed", "1"]).ok(), format!("{filled}\n"));
    work.run(&["generate", "--infill", "no hole"]).fails(2, &["no hole found", "[____:12]"]);
    work.run(&["generate", "--infill", "[_:2]", "--length", "4"]).fails(2, &["--length"]);
}

/// With a draft alone the text up to the stop is the text that would have been written.
#[test]
fn stop_texts_cut_the_text() {
    let work = Work::new();
    let args = ["generate", "--prompt", "Once upon a time", "--length", "40", "--preset", "draft", "--seed", "1", "--format", "json"];
    let whole = work.run(&args).json().remove(0);
    let text = whole["text"].as_str().expect("text");
    let word = text.split(' ').filter(|w| w.len() > 2).nth(4).expect("a word");
    let object = work.run(&[&args[..], &["--stop", "zzzz", "--stop", word]].concat()).json().remove(0);
    assert_eq!(object["finish"], "stop-text");
    let (before, _) = text.split_once(word).expect("the word");
    assert_eq!(object["text"].as_str(), Some(before), "before `{word}` in `{text}`");
    work.run(&[&args[..], &["--stop", ""]].concat()).fails(2, &["empty"]);
}

/// The schedule that JSON echoes is one that can be typed.
#[test]
fn the_echoed_schedule_can_be_typed() {
    let work = Work::new();
    for preset in ["did", "did-fast", "did-lift", "did-joint", "three"] {
        let tail = ["--length", "20", "--ignore-eos", "--format", "json", "--seed", "9"];
        let by_name = work.run(&[&["generate", "--preset", preset], &tail[..]].concat()).json().remove(0);
        let stages: Vec<&str> = by_name["schedule"].as_array().expect("stages").iter().map(|s| s.as_str().expect("a stage")).collect();
        let typed: Vec<&str> = stages.iter().flat_map(|s| ["--stage", s]).collect();
        let by_stage = work.run(&[&["generate"], &typed[..], &tail[..]].concat()).json().remove(0);
        assert_eq!(without_times(&by_stage.to_string()), without_times(&by_name.to_string()), "{preset}");
    }
}

/// `--model` again gives later stages other weights.
#[test]
fn stages_may_name_other_models() {
    let work = Work::new();
    let (first, second, other) = (fixture("bd3lm-plain"), fixture("mdlm"), fixture("bd3lm-adaln"));
    let run = |second: &str, weights: &str| {
        let stage = format!("block=full,remask=0.5,unmask=uniform:2,weights={weights}");
        let args = ["generate", "--model", &first, "--model", second, "--length", "12", "--ignore-eos", "--format", "json", "--stage"];
        work.run(&[&args[..], &["block=4,unmask=uniform:1", "--stage", &stage]].concat())
    };
    let object = run(&second, "1").json().remove(0);
    assert_eq!(object["models"], serde_json::json!([first, second]));
    assert!(object["schedule"][1].as_str().is_some_and(|s| s.contains("weights=1")), "{}", object["schedule"]);
    let same = run(&second, "0").json().remove(0);
    assert_eq!(same["draft"], object["draft"], "the first model drafts");
    assert_ne!(same["tokens"], object["tokens"], "another one refines");
    run(&second, "2").fails(2, &["weights=2", "2 models"]);
    run(&other, "1").fails(1, &[&other, "131"]);
}

/// 0 done, 1 failed, 2 misused; mistakes are named.
#[test]
fn exit_codes() {
    let work = Work::new();
    for (args, words) in [
        (vec!["generate", "--colour"], vec!["--colour"]),
        (vec![], vec!["Usage"]),
        (vec!["generate", "--preset", "best"], vec!["best", "did", "semi-ar"]),
        (vec!["generate", "--stage", "block=0"], vec!["block", "at least 1"]),
        (vec!["generate", "--stage", "block=4,remask=0.5"], vec!["drafts"]),
        (vec!["generate", "--length", "0"], vec!["at least 1"]),
        (vec!["generate", "--length", "100000"], vec!["100001", "at most"]),
        (vec!["generate", "--length", "18446744073709551615"], vec!["at most"]),
        (vec!["generate", "--length", "-3"], vec!["-3"]),
        (vec!["generate", "--temperature", "-1"], vec!["--temperature"]),
        // Numbers that begin with a dash are values.
        (vec!["generate", "--seed", "-1"], vec!["'-1'", "--seed"]),
        (vec!["generate", "--length", "-4"], vec!["'-4'", "--length"]),
        (vec!["generate", "--samples", "-2"], vec!["'-2'", "--samples"]),
        (vec!["generate", "--threads", "-2"], vec!["'-2'", "--threads"]),
        (vec!["generate", "--temperature", "nan"], vec!["--temperature"]),
        (vec!["generate", "--top-p", "0"], vec!["--top-p"]),
        (vec!["generate", "--top-k", "0"], vec!["--top-k", "all"]),
        (vec!["generate", "--top-k", "-2"], vec!["--top-k", "all"]),
        (vec!["generate", "--stage", "block=4,top_k_order=after"], vec!["top_k_order", "top_k=K"]),
        (vec!["generate", "--stage", "block=full,last=fill"], vec!["last=fill", "block=LENGTH"]),
        (vec!["generate", "--samples", "0"], vec!["--samples"]),
        (vec!["generate", "--threads", "0"], vec!["--threads"]),
        (vec!["generate", "--device", "tpu"], vec!["tpu", "cuda"]),
        (vec!["generate", "--dtype", "f64"], vec!["f64", "bf16"]),
        (vec!["generate", "--stop-entropy", "nan"], vec!["--stop-entropy"]),
        (vec!["generate", "--prompt", "a", "--prompt-file", "b"], vec!["--prompt-file"]),
        (vec!["forward", "--tokens", "999999", "--out", "x"], vec!["999999", "vocabulary"]),
        (vec!["forward", "--tokens", "1", "--block-len", "0", "--out", "x"], vec!["--block-len"]),
        (vec!["forward", "--out", "x"], vec!["--tokens"]),
        (vec!["score", "--visibility", "block:0"], vec!["block:N"]),
        (vec!["score"], vec!["no text"]),
        (vec!["bench", "--shape", "huge"], vec!["huge", "tiny"]),
        (vec!["bench", "--shape", "tiny", "--length", "4096"], vec!["--length"]),
        (vec!["bench", "--shape", "tiny", "--forward", "0@16"], vec!["--forward", "ROWS@POSITION", "32@512"]),
        (vec!["bench", "--shape", "tiny", "--forward", "4"], vec!["--forward", "ROWS@POSITION"]),
        (vec!["bench", "--shape", "tiny", "--forward", "4@4096", "--no-schedules"], vec!["4100 positions", "at most 512"]),
        (vec!["bench", "--shape", "tiny", "--forward-top-p", "0"], vec!["--forward-top-p", "above 0, at most 1"]),
        (vec!["bench", "--shape", "tiny", "--no-schedules", "--preset", "did"], vec!["--no-schedules", "--preset"]),
    ] {
        work.run(&args).fails(2, &words);
    }
    for (args, words) in [
        (vec!["generate", "--model", "nowhere"], vec!["nowhere", "no such model directory"]),
        (vec!["generate", "--model", "."], vec!["config.json"]),
        (vec!["generate", "--prompt-file", "missing.txt"], vec!["missing.txt"]),
        (vec!["generate", "--trace", "missing/trace"], vec!["missing/trace"]),
        (vec!["forward", "--tokens", "1", "--out", "missing/x"], vec!["missing/x"]),
        (vec!["forward", "--tokens-file", "missing.json", "--out", "x"], vec!["missing.json"]),
        (vec!["inspect", "nowhere"], vec!["nowhere"]),
    ] {
        work.run(&args).fails(1, &words);
    }
    let left: Vec<_> = std::fs::read_dir(work.dir.path()).expect("the directory").collect();
    assert!(left.is_empty(), "failures leave nothing behind: {left:?}");
}

#[test]
fn an_autoregressive_checkpoint_generates_and_judges() {
    let work = Work::new();
    for name in ["bd3lm-ar", "qwen2", "qwen3", "llama"] {
        let judge = fixture(name);
        let generate = |more: &[&str]| work.run(&[&["generate", "--model", &judge, "--length", "9", "--ignore-eos"], more].concat());
        let json = |more: &[&str]| generate(&[more, &["--format", "json"]].concat()).json().remove(0);
        let (nothing, after) = (json(&["--trace", "trace"]), json(&["--prompt", "the end", "--temperature", "0"]));
        assert_eq!(nothing["prompt_tokens"], 1, "{name}: BOS");
        for object in [&nothing, &after] {
            assert_eq!(object["tokens"].as_array().expect("ids").len(), 9, "{name}");
            let forwards = &object["stages"][0]["forwards"];
            assert_eq!((&forwards["denoise"], &forwards["prefill"]), (&9.into(), &1.into()), "{name}: {forwards}");
            assert_eq!((&object["stages"][0]["block_len"], &object["stages"][0]["nfe"]), (&1.into(), &9.into()), "{name}");
        }
        let trace = std::fs::read_to_string(work.path("trace")).expect("a trace");
        assert_eq!(trace.lines().filter(|line| line.contains("\"reveal\"")).count(), 9, "{name}");
        assert_eq!(json(&["--prompt", "the end", "--temperature", "0", "--preset", "ar"])["tokens"], after["tokens"], "{name}");

        let one = ["autoregressive", "block=1,visible=block", "preset ar", name];
        generate(&["--preset", "did-lift"]).fails(2, &one);
        generate(&["--stage", "block=4"]).fails(2, &one);
        generate(&["--stage", "block=1,visible=canvas"]).fails(2, &one);
        generate(&["--bos", "no"]).fails(2, &["expected a prompt, or BOS"]);
        work.run(&["generate", "--model", &judge, "--infill", "a [____:2] b"]).fails(2, &["fills no holes"]);
        let bench = work.run(&["bench", "--model", &judge, "--length", "8", "--runs", "1", "--format", "json"]).json().remove(0);
        assert_eq!((&bench["rows"][0]["schedule"], bench["rows"].as_array().map(Vec::len)), (&"ar".into(), Some(1)), "{bench}");
        work.run(&["bench", "--model", &judge, "--preset", "did"]).fails(2, &one);
        let inspect = work.run(&["inspect", &judge, "--format", "json"]).json().remove(0);
        assert!(inspect["attention"].as_str().expect("a text").contains("generates left to right"), "{inspect}");
        assert_eq!(inspect["unsupported"], serde_json::json!([]), "{name}");
        work.feed(&["score", "--model", &judge, "--visibility", "block:4"], "a").fails(2, &["--visibility", "causal"]);
        // Logits under causal visibility: what follows changes nothing.
        let forward = |tokens: &str| {
            work.run(&["forward", "--model", &judge, "--tokens", tokens, "--out", "logits"]).ok();
            let file = std::fs::read(work.path("logits")).expect("a file");
            let tensors = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
            tensors.tensor("logits").expect("logits").data()[..3 * 67 * 4].to_vec()
        };
        assert_eq!(forward("65,3,9,12"), forward("65,3,9,40"), "{name}");
    }
}

#[test]
fn help_and_version_are_answers() {
    let work = Work::new();
    let commands: [&[&str]; 8] = [
        &["--help"],
        &["generate", "--help"],
        &["forward", "--help"],
        &["score", "--help"],
        &["inspect", "--help"],
        &["bench", "--help"],
        &["help"],
        &["-h"],
    ];
    for args in commands {
        let ran = work.run(args);
        assert_eq!(ran.stderr, "", "{}", ran.label);
        let (label, text) = (ran.label.clone(), ran.ok());
        assert!(text.contains("Usage") && text.contains("redraft"), "{label}: {text}");
    }
    assert!(work.run(&["--version"]).ok().starts_with("redraft "));
}

/// Whoever reads has seen enough: exit code 0, and not a word.
#[test]
fn a_closed_pipe_is_success() {
    let work = Work::new();
    for (bytes, args) in [
        (0, vec!["generate", "--prompt", "Once", "--length", "8"]),
        (0, vec!["inspect"]),
        (0, vec!["--help"]),
        (1, vec!["generate", "--prompt", "Once", "--length", "8", "--samples", "64", "--format", "json"]),
    ] {
        let mut child = work.command(&args).spawn().expect("the binary starts");
        let mut pipe = child.stdout.take().expect("piped");
        pipe.read_exact(&mut vec![0; bytes]).expect("bytes");
        drop(pipe);
        let output = child.wait_with_output().expect("the binary ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.as_ref()), (Some(0), ""), "{args:?}");
    }
}

/// A full disk is an error with the file's name, and a trace that cannot be written does not cost
/// the text.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_not_a_panic() {
    let work = Work::new();
    let args = ["generate", "--prompt", "Once", "--length", "8", "--seed", "1"];
    let text = work.run(&args).ok();
    // A long trace fails while it is written, a short one when it is closed.
    for length in ["8", "200"] {
        let args = ["generate", "--prompt", "Once", "--length", length, "--seed", "1"];
        let good = if length == "8" { text.clone() } else { work.run(&args).ok() };
        let ran = work.run(&[&args[..], &["--trace", "/dev/full"]].concat());
        assert_eq!((ran.code, ran.stdout), (Some(1), good), "{length}: {}", ran.stderr);
        assert!(ran.stderr.contains("/dev/full"), "{}", ran.stderr);
    }
    for args in [&args[..], &["inspect"], &["bench", "--shape", "tiny", "--runs", "1", "--length", "8", "--preset", "draft"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = work.command(args).stdout(full).output().expect("the binary starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains("stdout") && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
    work.run(&["forward", "--tokens", "1,2", "--out", "/dev/full"]).fails(1, &["/dev/full"]);
}

/// `forward --out` writes the golden logits, from flags and from a file, and the same bytes twice.
#[test]
fn forward_writes_the_logits() {
    let work = Work::new();
    for name in ["bd3lm-adaln", "bd3lm-plain-sharded", "mdlm", "llama", "qwen2", "qwen3"] {
        let model = fixture(name);
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(Path::new(&model).join("golden.json")).expect("golden.json")).expect("JSON");
        let bytes = std::fs::read(Path::new(&model).join("golden.safetensors")).expect("golden.safetensors");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let values = |name: &Value| tensors.tensor(name.as_str().expect("a name")).expect("a tensor");
        for case in golden["cases"].as_array().expect("cases") {
            let label = format!("{name} {}", case["name"]);
            let tokens: Vec<String> =
                values(&case["tokens"]).data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).to_string()).collect();
            let block = case["block_len"].as_str().map_or_else(|| case["block_len"].to_string(), String::from);
            let (list, file) = (tokens.join(","), work.write("tokens.json", &format!("[{}]", tokens.join(", "))));
            let common = ["forward", "--model", &model, "--block-len", &block, "--out"];
            assert_eq!(work.run(&[&common[..], &["a", "--tokens", &list]].concat()).ok(), "", "{label}");
            assert_eq!(work.run(&[&common[..], &["b", "--tokens-file", &file]].concat()).ok(), "", "{label}");
            let found = std::fs::read(work.path("a")).expect("a file");
            assert_eq!(found, std::fs::read(work.path("b")).expect("a file"), "{label}: the same bytes");
            let found = safetensors::SafeTensors::deserialize(&found).expect("safetensors");
            let (found, golden) = (found.tensor("logits").expect("logits"), values(&case["logits"]));
            assert_eq!((found.shape(), found.dtype()), (golden.shape(), golden.dtype()), "{label}");
            let floats = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
            let vocab = golden.shape()[1];
            let (found, golden) = (floats(found.data()), floats(golden.data()));
            for (t, (found, golden)) in found.chunks(vocab).zip(golden.chunks(vocab)).enumerate() {
                let scale = golden.iter().fold(0.0f32, |m, g| m.max(g.abs()));
                // The bound of tests/parity.
                let worst = found.iter().zip(golden).fold(0.0f32, |m, (f, g)| m.max((f - g).abs()));
                assert!(worst <= 2e-5 * scale, "{label}: row {t}: {worst} of {scale}");
            }
        }
    }
    let left = std::fs::read_dir(work.dir.path()).expect("the directory").count();
    assert_eq!(left, 3, "no temporary file is left");
}

/// A GGUF file writes and scores what its directory does.
#[test]
fn a_gguf_file_is_a_model() {
    let work = Work::new();
    let file = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf/files").join(name).display().to_string();
    let text = work.write("text", "the men on the hill");
    let generated = |model: &str| {
        let args = ["generate", "--model", model, "--prompt", "the men", "--length", "24", "--seed", "5", "--format", "json"];
        let object = work.run(&args).json().remove(0);
        (object["text"].clone(), object["tokens"].clone())
    };
    assert_eq!(generated(&file("dream-f32.gguf")), generated(&fixture("dream")));
    let scored = |model: &str| work.run(&["score", "--model", model, "--file", &text]).ok();
    assert_eq!(scored(&file("llama-f32.gguf")), scored(&fixture("llama")));
    let out = work.path("logits").display().to_string();
    work.run(&["forward", "--model", &file("llada-f32.gguf"), "--tokens", "1,2,3", "--out", &out]).ok();
    let (table, object) = {
        let inspect = |more: &[&str]| work.run(&[&["inspect", &file("llama-q8_0.gguf")], more].concat());
        (inspect(&[]).ok(), inspect(&["--format", "json"]).json().remove(0))
    };
    for word in
        ["version 3, architecture llama", "gpt2 (gpt-2)", "ffn_down.weight          F16", "attn_q.weight            Q8_0", "8.50 bits"]
    {
        assert!(table.contains(word), "no `{word}` in:\n{table}");
    }
    assert_eq!(object["gguf"]["architecture"], "llama");
    assert_eq!(object["family"], "llama");
    let generate = |more: &[&str]| work.run(&[&["generate", "--model", &file("llama-q8_0.gguf"), "--prompt", "the"], more].concat());
    assert!(!generate(&["--length", "8", "--ignore-eos"]).ok().is_empty());
    generate(&["--preset", "did"]).fails(2, &["llama-q8_0.gguf", "autoregressive"]);
}

#[test]
fn inspect_says_what_a_directory_holds() {
    let work = Work::new();
    for dir in fixtures() {
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(Path::new(&dir).join("config.json")).expect("config.json")).expect("JSON");
        let object = work.run(&["inspect", &dir, "--format", "json"]).json().remove(0);
        let kind = config["model_type"].as_str().expect("a type");
        let family = match kind {
            "Fast_dLLM_Qwen" => "fast-dllm".into(),
            "llada2_moe" => "llada2".into(),
            "llama" if config["architectures"][0] == "StableDiffcoderForCausalLM" => "stable-diffcoder".into(),
            "llada" if config["num_experts"].is_u64() => "llada-moe".into(),
            _ => kind.to_lowercase().replace('_', "-"),
        };
        assert_eq!(object["family"], family, "{dir}");
        // Decoders with Hugging Face's keys, diffusion models made from them, and LLaDA, which has
        // keys of its own.
        let plain = config["hidden_size"].is_u64();
        let adapted =
            ["Dream", "Fast_dLLM_Qwen", "sdar", "llada", "llada2_moe", "sdar_moe", "rnd1"].contains(&kind) || family == "stable-diffcoder";
        let keys = if kind == "gpt2" {
            ["vocab_size", "n_embd", "n_layer", "n_head"]
        } else if family == "llada" {
            ["vocab_size", "d_model", "n_layers", "n_heads"]
        } else if plain {
            ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
        } else {
            ["vocab_size", "hidden_dim", "n_blocks", "n_heads"]
        };
        for (found, key) in ["vocab_size", "hidden_dim", "num_layers", "num_heads"].into_iter().zip(keys) {
            assert_eq!(object[found], config[key], "{dir}: {key}");
        }
        let size = |key: &str| object[key].as_u64().unwrap_or_else(|| panic!("{dir}: {key}"));
        assert_eq!(object["kv_bytes_per_token"]["f32"], 2 * size("num_layers") * size("num_kv_heads") * size("head_dim") * 4, "{dir}");
        if plain {
            assert_eq!(object["num_kv_heads"], config["num_key_value_heads"], "{dir}");
            let mask_id = if adapted { size("vocab_size").saturating_sub(1).into() } else { Value::Null };
            assert_eq!((&object["mask_id"], &object["tied_head"]), (&mask_id, &config["tie_word_embeddings"]), "{dir}");
            assert_eq!((&object["norm"], &object["mlp"]), (&"rms".into(), &"swiglu".into()), "{dir}");
            let normed = ["qwen3", "sdar", "llada-moe", "llada2", "qwen3-moe", "sdar-moe", "rnd1"].contains(&family.as_str());
            assert_eq!(object["qk_norm"], normed, "{dir}");
            let experts = config.get("num_experts").or(config.get("num_local_experts")).unwrap_or(&Value::Null);
            assert_eq!(&object["experts"]["num_experts"], experts, "{dir}");
        } else if adapted {
            assert_eq!(
                (size("mask_id"), &object["norm"], &object["mlp"]),
                (size("vocab_size") - 1, &"rms".into(), &"swiglu".into()),
                "{dir}"
            );
        } else if kind == "gpt2" {
            assert_eq!((&object["mask_id"], &object["tied_head"]), (&Value::Null, &true.into()), "{dir}");
            assert_eq!(
                (&object["norm"], &object["mlp"], size("mlp_dim")),
                (&"layer".into(), &"gelu".into(), 4 * size("hidden_dim")),
                "{dir}"
            );
            assert!(object["rope"].as_str().is_some_and(|text| text.contains("learned")), "{dir}");
        } else {
            assert_eq!((size("mask_id"), size("num_kv_heads")), (size("vocab_size") - 1, size("num_heads")), "{dir}");
            assert_eq!((&object["norm"], &object["mlp"], &object["tied_head"]), (&"layer".into(), &"gelu".into(), &false.into()), "{dir}");
        }
        let unsupported = object["unsupported"].as_array().expect("a list");
        assert_eq!(object["shift"], ["Dream", "Fast_dLLM_Qwen", "rnd1"].contains(&kind), "{dir}");
        assert!(unsupported.is_empty(), "{dir}: {unsupported:?}");
        let is_causal = plain && !adapted || dir.ends_with("bd3lm-ar") || kind == "gpt2";
        assert_eq!(object["attention"].as_str().map(|text| text.starts_with("causal:")), Some(is_causal), "{dir}");
        let table = work.run(&["inspect", &dir]).ok();
        assert!(table.contains("family") && table.contains("K/V per token"), "{dir}: {table}");
    }
    assert!(work.run(&["inspect"]).ok().contains("redraft-stories"), "the model that ships");
}

#[test]
fn an_unknown_family_is_refused_with_the_known_ones() {
    let work = Work::new();
    work.write("config.json", r#"{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 10}"#);
    let dir = work.dir.path().display().to_string();
    for args in [["inspect", &dir].as_slice(), &["generate", "--model", &dir]] {
        work.run(args).fails(1, &["config.json", "bert", "bd3lm", "mdlm", "qwen2 (Qwen2ForCausalLM)"]);
    }
}

/// Counts do not depend on weights, so a tiny random shape is enough (the formulas are those of
/// docs/schedules.md).
#[test]
fn bench_counts_what_it_measures() {
    let work = Work::new();
    let args = [
        "bench",
        "--shape",
        "tiny",
        "--runs",
        "1",
        "--length",
        "16",
        "--batch",
        "1,2",
        "--preset",
        "draft,did,did-fast",
        "--format",
        "json",
    ];
    let object = work.run(&args).json().remove(0);
    let rows = object["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 6, "three presets at two batch sizes");
    for row in rows {
        let label = format!("{} batch {}", row["schedule"], row["batch"]);
        assert_eq!(row["length"].as_u64(), Some(16), "{label}");
        assert!(row["tokens_per_s"].as_f64().is_some_and(|r| r > 0.0) && row["total_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{label}");
        let stages = row["stages"].as_array().expect("stages");
        // 17 positions: 3 masks of a block of 4, three whole blocks, a block of one; four finished
        // blocks ride along.
        assert_eq!((stages[0]["nfe"].as_u64(), stages[0]["rows"].as_u64()), (Some(16), Some(3 * 4 + 3 * 16 + 1 + 4 * 4)), "{label}");
        // floor(0.35 x 16) = 5 masks in 5 forwards.
        let refine = match row["schedule"].as_str() {
            Some("draft") => None,
            Some("did") => Some(5 * 17),
            _ => Some(17 + 5 + 4 + 3 + 2),
        };
        assert_eq!(stages.get(1).map(|s| s["rows"].as_u64().expect("rows")), refine, "{label}");
        assert!(stages.iter().all(|s| s["forwards"] == s["nfe"] && s["ms"].as_f64().is_some_and(|ms| ms > 0.0)), "{label}");
    }
    let plot = work.path("plot.svg").display().to_string();
    let table = work.run(&["bench", "--shape", "tiny", "--runs", "1", "--length", "8", "--preset", "did", "--plot", &plot]).ok();
    assert!(table.contains("tokens/s") && table.contains("NFE"), "{table}");
    assert!(std::fs::read_to_string(&plot).expect("a plot").starts_with("<svg"));
}

/// Forwards that were asked for, under each nucleus, and no schedule.
#[test]
fn bench_times_the_forwards_that_are_asked_for() {
    let work = Work::new();
    let args = ["bench", "--shape", "tiny", "--runs", "1", "--forward", "4@16,20@0", "--no-schedules", "--dtype", "bf16"];
    let machines: &[(&str, bool)] = if cfg!(feature = "emulator") { &[("cpu", false), ("emu", true)] } else { &[("cpu", false)] };
    for (device, recorded) in machines {
        let object = work.run(&[&args[..], &["--format", "json", "--device", device]].concat()).json().remove(0);
        let forwards = object["forwards"].as_array().expect("forwards");
        let facts = |key: &str| forwards.iter().map(|f| f[key].as_u64().expect("a number")).collect::<Vec<_>>();
        assert_eq!((facts("rows"), facts("position")), (vec![4, 4, 20, 20], vec![16, 16, 0, 0]));
        let nuclei: Vec<f32> = forwards.iter().map(|f| f["top_p"].as_f64().expect("a nucleus") as f32).collect();
        assert_eq!(nuclei, [1.0, 0.9, 1.0, 0.9]);
        assert!(
            forwards
                .iter()
                .all(|f| f["recorded"] == *recorded && f["median_ms"].as_f64() > Some(0.0) && f["floor_ms"].as_f64() > Some(0.0))
        );
        assert_eq!(object["rows"].as_array().map(Vec::len), Some(0));
        assert!(object["ceilings"]["matrix_gflop_per_s"].as_f64() > Some(0.0) && object["ceilings"]["read"].is_string(), "{object}");
    }
    let table = work.run(&[&args[..], &["--device", "cpu"]].concat()).ok();
    assert!(table.contains("4 rows at position 16") && table.contains("pass of 20 rows") && !table.contains("NFE"), "{table}");
}

/// Asking for a GPU that is not there is an error that says what to do instead.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_absent_is_a_clear_error() {
    let work = Work::new();
    let absent = redraft::cuda::device_count().unwrap_or(0);
    let device = format!("cuda:{absent}");
    let next_move = if absent == 0 { ["CUDA", "--device cpu"] } else { [device.as_str(), "no such device"] };
    work.run(&["generate", "--device", &device, "--length", "4"]).fails(1, &next_move);
    work.run(&["generate", "--device", "cuda:x"]).fails(2, &["index"]);
    work.run(&["generate", "--device", "emu:sm_70"]).fails(2, &["expected one of sm_90a, sm_80", "found `sm_70`"]);
}

/// The CUDA path on the host writes what the CPU writes.
#[cfg(feature = "emulator")]
#[test]
fn emulation_writes_the_same_text() {
    let work = Work::new();
    let run = |device: &str| {
        let args = ["generate", "--prompt", "Once upon a time", "--length", "10", "--seed", "3", "--format", "json", "--device", device];
        let mut object: Value = serde_json::from_str(&work.run(&args).ok()).expect("JSON");
        let name = object["device"].as_str().expect("a name").to_owned();
        assert!(name.starts_with(device), "{name}");
        for key in ["device", "timings", "tokens_per_s", "confidence", "log_prob", "stages"] {
            object.as_object_mut().expect("an object").remove(key);
        }
        object
    };
    assert_eq!(run("emu"), run("cpu"));
}

/// Emulation compiles the kernels: without a compiler it says so.
#[cfg(feature = "emulator")]
#[test]
fn emulation_without_a_compiler_is_a_clear_error() {
    let work = Work::new();
    let args = ["generate", "--length", "4", "--device", "emu"];
    let output = work.command(&args).env("CXX", "no-such-compiler").output().expect("the binary starts");
    work::Ran::new(&args, output).fails(1, &["no-such-compiler", "install g++"]);
}

/// No terminal, no pictures.
#[test]
fn watch_without_a_terminal_prints_plain_text_only() {
    let work = Work::new();
    let args = ["generate", "--prompt", "Once", "--length", "12", "--seed", "1"];
    let plain = work.run(&args).ok();
    let ran = work.run(&[&args[..], &["--watch", "--watch-delay", "0"]].concat());
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str(), ran.code), (plain.as_str(), "", Some(0)));
    assert!(!plain.contains('\x1b') && plain.starts_with("Once"), "{plain:?}");
}

/// A stage that cannot be fulfilled, a model directory without a tokenizer, a text longer than was
/// trained: each says so.
#[test]
fn models_without_a_tokenizer_say_so() {
    let work = Work::new();
    let model = fixture("bd3lm-plain");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&model).join(name), work.path(name)).expect("a copy");
    }
    let dir = work.dir.path().display().to_string();
    work.run(&["generate", "--model", &dir, "--length", "4"]).fails(1, &["tokenizer.json", "--tokenizer"]);
    // Logits need no text, and another place for the file will do.
    assert_eq!(work.run(&["forward", "--model", &dir, "--tokens", "1,2", "--out", "x"]).ok(), "");
    let tokenizer = Path::new(&model).join("tokenizer.json").display().to_string();
    let args = ["--length", "8", "--format", "json", "--ignore-eos"];
    let elsewhere = work.run(&[&["generate", "--model", &dir, "--tokenizer", &tokenizer], &args[..]].concat()).json().remove(0);
    let beside = work.run(&[&["generate", "--model", &model], &args[..]].concat()).json().remove(0);
    assert_eq!(elsewhere["tokens"], beside["tokens"]);
    // Beyond the trained length there is a word of warning on stderr, and text on stdout.
    let ran = work.run(&["generate", "--model", &model, "--length", "40"]);
    assert!(ran.stderr.contains("trained on 32"), "{}", ran.stderr);
    ran.ok();
}
