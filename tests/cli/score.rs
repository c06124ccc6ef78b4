//! `redraft score`: texts and samples under every kind of judge.

use std::path::Path;

use serde_json::Value;

use crate::work::{Work, fixture, ids, repository};

/// A text in windows of the judge's length, each behind what stands before a text: BOS, or where
/// there is none the end of text. The likelihoods are those of the logits that `forward` writes.
#[test]
fn an_autoregressive_checkpoint_scores_text() {
    let work = Work::new();
    for (name, first) in [("qwen2", 65), ("qwen3", 64), ("llama", 65)] {
        let judge = fixture(name);
        let text = "the end of it, and then in! ".repeat(9);
        let object = work.feed(&["score", "--model", &judge, "--format", "json"], &text).json().remove(0);
        let nll: Vec<f64> = object["nll"].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect();
        let tokens = ids(&object["tokens"]);
        assert_eq!((tokens.len(), object["window"].as_u64()), (nll.len(), Some(63)), "{name}");
        assert!(tokens.len() > 2 * 63, "{name}: more than two windows");
        assert!((object["mean_nll"].as_f64().expect("a number") - nll.iter().sum::<f64>() / nll.len() as f64).abs() < 1e-12);
        // The same by logits, window by window.
        for (tokens, nll) in tokens.chunks(63).zip(nll.chunks(63)) {
            let list: Vec<String> = std::iter::once(&first).chain(tokens).map(u64::to_string).collect();
            work.run(&["forward", "--model", &judge, "--tokens", &list.join(","), "--out", "logits"]).ok();
            let file = std::fs::read(work.path("logits")).expect("a file");
            let tensors = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
            let logits: Vec<f64> = tensors
                .tensor("logits")
                .expect("logits")
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect();
            for (i, (row, found)) in logits.chunks_exact(67).zip(nll).enumerate() {
                let sum = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                let want = sum - row[tokens[i] as usize];
                assert!((found - want).abs() < 1e-4, "{name}: token {i}: {found}, by logits {want}");
            }
        }
    }
}

/// The shipped model judges its own samples here, left to right; a judge of its own kind goes the
/// same way.
#[test]
fn samples_are_scored_as_ids_behind_their_prompt() {
    let work = Work::new();
    let common = ["--length", "40", "--seed", "5", "--format", "jsonl", "--preset", "draft"];
    let written = work.run(&[&["generate", "--prompt", "One day a dog", "--samples", "3"], &common[..]].concat()).ok();
    let file = work.write("samples.jsonl", &written);
    let lines: Vec<Value> = written.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let score = |file: &str, more: &[&str]| work.run(&[&["score", "--samples", file, "--format", "json"], more].concat()).json();
    let found = score(&file, &[]);
    assert_eq!(found.len(), 4, "three samples and all of them together");
    let number = |object: &Value, key: &str| object[key].as_f64().unwrap_or_else(|| panic!("{key} of {object}"));
    let list =
        |object: &Value| -> Vec<f64> { object["nll"].as_array().expect("nll").iter().map(|v| v.as_f64().expect("a number")).collect() };
    let mut all = Vec::new();
    for (line, found) in lines.iter().zip(&found) {
        assert_eq!((&found["sample"], &found["seed"], &found["read_as"]), (&line["sample"], &line["seed"], &"ids".into()));
        let nll = list(found);
        assert_eq!((nll.len(), number(found, "num_tokens")), (ids(&line["tokens"]).len(), nll.len() as f64));
        let mean = nll.iter().sum::<f64>() / nll.len() as f64;
        assert!((number(found, "mean_nll") - mean).abs() < 1e-12 && (number(found, "perplexity") / mean.exp() - 1.0).abs() < 1e-12);
        // The same tokens as a text of their own: what the prompt's tokens cost is left out, the
        // rest is the same to the last bit.
        let prompt = &line["prompt"];
        assert_eq!(
            (ids(&prompt["tokens"]).len() as u64, prompt["text"].as_str()),
            (line["prompt_tokens"].as_u64().expect("a count"), Some("One day a dog"))
        );
        if line["finish"] == "length" {
            let whole = work
                .feed(&["score", "--format", "json"], &format!("One day a dog{}", line["text"].as_str().expect("text")))
                .json()
                .remove(0);
            let skip = ids(&prompt["tokens"]).len() - 1;
            if ids(&whole["tokens"])[skip..] == ids(&line["tokens"])[..] {
                assert_eq!(list(&whole)[skip..], nll[..]);
            }
        }
        all.extend(nll);
    }
    let total = &found[3];
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    assert!((number(total, "mean_nll") - mean).abs() < 1e-12 && (number(total, "perplexity") / mean.exp() - 1.0).abs() < 1e-12);
    let means = found[..3].iter().map(|f| number(f, "perplexity")).sum::<f64>() / 3.0;
    assert!((number(total, "mean_perplexity") / means - 1.0).abs() < 1e-12);
    assert_eq!((&total["samples"], &total["read_as_ids"], number(total, "num_tokens")), (&3.into(), &3.into(), all.len() as f64));
    // The judge that ships has the same vocabulary, and finds stories likelier than a shuffle of
    // their tokens.
    let judge = repository().join("models/redraft-judge").display().to_string();
    let judged = score(&file, &["--model", &judge]).remove(3);
    let mut backwards = lines.clone();
    for line in &mut backwards {
        line["tokens"].as_array_mut().expect("tokens").reverse();
    }
    let backwards: String = backwards.iter().map(|line| format!("{line}\n")).collect();
    let shuffled = score(&work.write("backwards.jsonl", &backwards), &["--model", &judge]).remove(3);
    assert_eq!((&judged["read_as_ids"], &judged["visibility"]), (&3.into(), &"causal".into()));
    assert!(number(&judged, "mean_nll") + 1.0 < number(&shuffled, "mean_nll"), "{judged}, backwards {shuffled}");
    // One alone is one of many.
    let one = work.write("one.jsonl", written.lines().nth(1).expect("three lines"));
    assert_eq!(score(&one, &[])[0], found[1]);
    let table = work.run(&["score", "--samples", &file]).ok();
    assert!(table.contains("ids scored as they are") && table.lines().count() == 6, "{table}");

    // A judge with other ids reads the text, and so does one that cannot find the generator.
    // Windows: 63 tokens and a BOS.
    let judge = fixture("qwen2");
    let encoded = score(&file, &["--model", &judge]);
    let moved = written.replace("redraft-stories", "nowhere-stories");
    let moved = score(&work.write("moved.jsonl", &moved), &["--model", &judge]);
    for (i, (encoded, moved)) in encoded.iter().zip(&moved).enumerate() {
        assert_eq!(encoded, moved);
        if let Some(line) = lines.get(i) {
            assert_eq!(encoded["read_as"], "text");
            // Letters outside of its alphabet are dropped by this tokenizer.
            assert!(
                number(encoded, "num_tokens") > 63.0 && line["text"].as_str().expect("text").len() as f64 >= number(encoded, "num_tokens")
            );
        }
    }
    assert_eq!(encoded[3]["read_as_ids"], 0);
    assert!(work.run(&["score", "--samples", &file, "--model", &judge]).ok().contains("texts encoded again"));
}

/// A text that is encoded again is one with its prompt: its tokens are those of the whole, and one
/// that begins in the prompt counts.
#[test]
fn a_sample_read_as_text_is_one_with_its_prompt() {
    let work = Work::new();
    for (prompt, text, counted) in [
        ("One day a dog", " ran home.", " ran home."),
        ("One day a do", "g ran home.", " dog ran home."),
        ("One day a ", "dog ran home.", " dog ran home."),
        ("", "One day a dog", "One day a dog"),
        ("One day", "", ""),
    ] {
        let line = serde_json::json!({"model": "nowhere", "prompt": {"tokens": [1], "text": prompt}, "tokens": [1], "text": text});
        let other = serde_json::json!({"tokens": [1], "text": "One day a dog"});
        let found = work.feed(&["score", "--samples", "-", "--format", "json"], &format!("{line}\n{other}\n")).json().remove(0);
        let whole = work.feed(&["score", "--format", "json"], &format!("{prompt}{text}")).json().remove(0);
        let tail = work.feed(&["score", "--format", "json"], if counted.is_empty() { "x" } else { counted }).json().remove(0);
        let len = if counted.is_empty() { 0 } else { ids(&tail["tokens"]).len() };
        let nll = whole["nll"].as_array().expect("a list");
        assert_eq!(found["nll"].as_array().expect("a list")[..], nll[nll.len() - len..], "{prompt:?} {text:?}");
        assert_eq!(found["read_as"], "text");
    }
}

/// Infilled samples count what was generated, wherever it stands; `bench --quality --save` writes
/// the same kind of lines.
#[test]
fn infilled_and_saved_samples_are_scored_too() {
    let work = Work::new();
    let infilled = work.run(&["generate", "--infill", "The [____:4] sat on the [____:3].", "--seed", "3", "--format", "jsonl"]).ok();
    let line: Value = serde_json::from_str(infilled.trim()).expect("JSON");
    let (canvas, tokens) = (ids(&line["canvas"]), ids(&line["tokens"]));
    let positions: Vec<usize> = ids(&line["positions"]).into_iter().map(|p| p as usize).collect();
    assert_eq!(positions.iter().map(|p| canvas[*p]).collect::<Vec<_>>(), tokens);
    let found = work.feed(&["score", "--samples", "-", "--format", "json"], &infilled).json();
    assert_eq!((&found[0]["num_tokens"], &found[1]["num_tokens"]), (&7.into(), &7.into()));
    work.feed(&["score", "--samples", "-", "--model", &fixture("qwen2")], &infilled).fails(2, &["line 1", "infilled", "vocabulary"]);
    let saved = json_line(&[("row", "\"a\"".into()), ("tokens", "[5, 9, 300]".into())]);
    work.feed(&["score", "--samples", "-"], &saved).fails(2, &["line 1", "`text`", "vocabulary"]);
    let dir = repository().join("models/redraft-stories-10m").display().to_string();
    let saved = json_line(&[("row", "\"a\"".into()), ("model", format!("{dir:?}")), ("tokens", "[5, 9, 300]".into())]);
    assert_eq!(work.feed(&["score", "--samples", "-", "--format", "json"], &saved).json()[0]["row"], "a");
    let outside = json_line(&[("model", format!("{dir:?}")), ("tokens", "[5, 9, 300000]".into())]);
    work.feed(&["score", "--samples", "-"], &(saved.clone() + &outside)).fails(2, &["line 2", "300000", "vocabulary"]);
    for (text, words) in
        [("", ["no samples", "-"]), ("{}\n", ["line 1", "tokens"]), ("\n[1]\n", ["line 2", "generate"]), ("x", ["line 1", "jsonl"])]
    {
        work.feed(&["score", "--samples", "-"], text).fails(2, &words);
    }
    let nothing = json_line(&[("model", format!("{dir:?}")), ("tokens", "[]".into())]);
    work.feed(&["score", "--samples", "-"], &nothing).fails(2, &["no generated token"]);
    let half = work.feed(&["score", "--samples", "-", "--format", "json"], &(nothing + &saved)).json();
    assert_eq!((&half[0]["mean_nll"], &half[0]["num_tokens"], &half[2]["num_tokens"]), (&Value::Null, &0.into(), &3.into()));
    work.run(&["score", "--samples", "x.jsonl", "--file", "y"]).fails(2, &["--samples", "--file"]);
}

fn json_line(entries: &[(&str, String)]) -> String {
    let body: Vec<String> = entries.iter().map(|(key, value)| format!("{key:?}: {value}")).collect();
    format!("{{{}}}\n", body.join(", "))
}

/// As transformers 5 reads `tie_word_embeddings`: a head that differs from the table is the head,
/// and either of the two alone is both.
#[test]
fn a_tied_head_is_the_one_that_is_there() {
    let work = Work::new();
    let file = std::fs::read(Path::new(&fixture("dream")).join("model.safetensors")).expect("weights");
    let tensors = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
    let config = std::fs::read_to_string(Path::new(&fixture("dream")).join("config.json")).expect("config.json");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let mut mean = |tied: bool, names: &[(&str, &str)]| {
        config["tie_word_embeddings"] = tied.into();
        work.write("config.json", &config.to_string());
        std::fs::copy(Path::new(&fixture("dream")).join("tokenizer.json"), work.path("tokenizer.json")).expect("a copy");
        let others = tensors.tensors().into_iter().filter(|(name, _)| name != table && name != head);
        let asked = names.iter().map(|(name, from)| (name.to_string(), tensors.tensor(from).expect("is there")));
        let all: Vec<_> = others.chain(asked).collect();
        std::fs::write(work.path("model.safetensors"), safetensors::serialize(all, None).expect("a file")).expect("written");
        let dir = work.dir.path().display().to_string();
        work.feed(&["score", "--model", &dir, "--format", "json"], "the end of it").json()[0]["mean_nll"].clone()
    };
    let apart = mean(false, &[(table, table), (head, head)]);
    assert_eq!(mean(true, &[(table, table), (head, head)]), apart, "they differ");
    let shared = mean(false, &[(table, table), (head, table)]);
    assert_ne!(shared, apart);
    for names in [&[(table, table)][..], &[(head, table)], &[(table, table), (head, table)]] {
        assert_eq!(mean(true, names), shared, "{names:?}");
    }
}

#[test]
fn a_judge_without_any_first_token_says_so() {
    let work = Work::new();
    for entry in std::fs::read_dir(fixture("qwen2")).expect("a fixture") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, work.path(path.file_name().expect("a name").to_str().expect("UTF-8"))).expect("a copy");
    }
    let config = std::fs::read_to_string(work.path("config.json")).expect("config.json");
    work.write("config.json", &config.replace("\"eos_token_id\": 65", "\"eos_token_id\": null"));
    let dir = work.dir.path().display().to_string();
    work.feed(&["score", "--model", &dir], "the end").fails(1, &["config.json", "bos_token_id", "eos_token_id"]);
    work.run(&["forward", "--model", &dir, "--tokens", "1,2", "--out", "logits"]).ok();
}

#[test]
fn sense_scores_better_than_its_shuffle() {
    let work = Work::new();
    let sense = "Once upon a time there was a little girl named Lily. She liked to play in the park with her mom.";
    let mut words: Vec<&str> = sense.split(' ').collect();
    words.reverse();
    let shuffled = words.join(" ");
    for visibility in [&[][..], &["--visibility", "causal"], &["--visibility", "full"], &["--visibility", "block:8"]] {
        let score = |text: &str| {
            let object = work.feed(&[&["score", "--format", "json"], visibility].concat(), text).json().remove(0);
            let nll: Vec<f64> = object["nll"].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect();
            assert_eq!(nll.len(), ids(&object["tokens"]).len());
            assert!(nll.iter().all(|n| *n >= 0.0 && n.is_finite()), "{nll:?}");
            let mean = object["mean_nll"].as_f64().expect("a number");
            assert!((mean - nll.iter().sum::<f64>() / nll.len() as f64).abs() < 1e-9);
            assert!((object["perplexity"].as_f64().expect("a number") / mean.exp() - 1.0).abs() < 1e-9);
            mean
        };
        let (good, bad) = (score(sense), score(&shuffled));
        assert!(good + 1.0 < bad, "{visibility:?}: {good} nats a token, reversed {bad}");
    }
    let file = work.write("story.txt", sense);
    let table = work.run(&["score", "--file", &file]).ok();
    assert!(table.contains("perplexity") && table.lines().count() > 20, "{table}");
}

/// A judge scores the same text on the CPU and on the emulated device, in both dtypes, up to their
/// rounding.
#[cfg(feature = "emulator")]
#[test]
fn emulation_scores_the_same_text() {
    let work = Work::new();
    let text = "the end of it, and then in! ".repeat(4);
    for (name, dtype, bound) in [("qwen2", "f32", 1e-4), ("qwen3", "f32", 1e-4), ("llama", "f32", 1e-4), ("qwen2", "bf16", 0.3)] {
        let judge = fixture(name);
        let score = |device: &str| -> Vec<f64> {
            let object =
                work.feed(&["score", "--model", &judge, "--device", device, "--dtype", dtype, "--format", "json"], &text).json().remove(0);
            object["nll"].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
        };
        let (cpu, emu) = (score("cpu"), score("emu"));
        assert!(cpu.len() > 63 && cpu.len() == emu.len(), "{name}: more than one window");
        assert!(cpu.iter().zip(&emu).all(|(cpu, emu)| (cpu - emu).abs() < bound), "{name} {dtype}: {cpu:?}, {emu:?}");
    }
}
