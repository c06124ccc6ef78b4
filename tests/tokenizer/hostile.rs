//! Files that are cut off, marked, mutated, or number their tokens in a way of their own.

use std::path::Path;

use redraft::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use crate::files;

fn built(kind: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(files(kind).join("tokenizer.json")).unwrap()).unwrap()
}

fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn load(dir: &Path) -> Result<Tokenizer, String> {
    Tokenizer::load(&dir.join("tokenizer.json"), 1 << 20).map_err(|error| error.to_string())
}

fn load_json(json: &Value) -> Result<Tokenizer, String> {
    load(directory(&[("tokenizer.json", json.to_string().as_bytes())]).path())
}

#[test]
fn marks_and_encodings_of_files() {
    let text = built("gpt2").to_string();
    let expected = load_json(&built("gpt2")).unwrap().encode("Hello the sea").unwrap();
    let marked = format!("\u{feff}{text}");
    let dir = directory(&[("tokenizer.json", marked.as_bytes())]);
    assert_eq!(load(dir.path()).unwrap().encode("Hello the sea").unwrap(), expected);
    for of in [u16::to_le_bytes, u16::to_be_bytes] {
        let wide: Vec<u8> = marked.encode_utf16().flat_map(of).collect();
        let error = load(directory(&[("tokenizer.json", &wide)]).path()).unwrap_err();
        assert!(error.contains("UTF-16 text: save it as UTF-8"), "{error}");
    }
    let error = load(directory(&[("tokenizer.json", &text.as_bytes()[..text.len() / 2])]).path()).unwrap_err();
    assert!(error.contains("tokenizer.json: not a tokenizer: not JSON: EOF") && error.contains("line 1 column"), "{error}");
    let latin = [&b"{\"a\": \"\xe9\"}"[..]].concat();
    let error = load(directory(&[("tokenizer.json", &latin)]).path()).unwrap_err();
    assert!(error.contains("not UTF-8 text at byte 7"), "{error}");
}

#[test]
fn a_mask_is_text_whatever_the_file_says_of_it() {
    for (kind, mask) in [
        ("gpt2", "<|mask|>"),
        ("qwen2", "<|mask|>"),
        ("gemma", "<mask>"),
        ("unigram", "<mask>"),
        ("wordpiece", "[MASK]"),
        ("wordlevel", "[MASK]"),
    ] {
        let mut json = built(kind);
        for token in json["added_tokens"].as_array_mut().unwrap() {
            token["special"] = false.into();
        }
        let tokenizer = load_json(&json).unwrap();
        let id = tokenizer.id(mask).unwrap();
        for text in [mask.to_owned(), format!("a {mask} b"), format!("{mask}{mask}")] {
            assert!(!tokenizer.encode(&text).unwrap().contains(&id), "{kind}: {text}");
            assert!(tokenizer.encode_with_special(&text).unwrap().contains(&id), "{kind}: {text}");
        }
    }
    // An id that config.json names, in whatever spelling.
    let mut json = built("qwen2");
    let token = json["added_tokens"].as_array_mut().unwrap().last_mut().unwrap();
    token["content"] = "<hidden>".into();
    let id = token["id"].as_u64().unwrap() as u32;
    let tokenizer = load_json(&json).unwrap();
    assert_eq!(tokenizer.encode("<hidden>").unwrap(), [id]);
    let tokenizer = tokenizer.masked_by(Some(id)).unwrap();
    assert!(!tokenizer.encode("a <hidden> b").unwrap().contains(&id));
}

#[test]
fn added_tokens_have_the_ids_of_the_file() {
    let gap = |json: &mut Value, from: u64, by: u64| {
        for token in json["added_tokens"].as_array_mut().unwrap() {
            let id = token["id"].as_u64().unwrap();
            token["id"] = (if id >= from { id + by } else { id }).into();
        }
    };
    for kind in ["gpt2", "qwen2", "llama3", "added", "gemma", "unigram"] {
        let whole = load_json(&built(kind)).unwrap();
        // A gap before the first added token, and one between them.
        let mut json = built(kind);
        let own = json["model"]["vocab"].as_object().map_or_else(|| json["model"]["vocab"].as_array().unwrap().len(), Map::len) as u64;
        let ids: Vec<u64> = json["added_tokens"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect();
        let (first, last) = (ids.iter().find(|id| **id >= own).copied(), *ids.iter().max().unwrap());
        let shifts: Vec<(u64, u64)> = first.into_iter().flat_map(|first| [(first, 5), (last.max(first), 3)]).collect();
        for (from, by) in shifts {
            gap(&mut json, from, by);
        }
        // A hole in the vocabulary, where it is a map: a token that no merge makes.
        let hole = json["model"]["vocab"].as_object_mut().filter(|_| kind == "gpt2").map(|vocab| {
            let name = vocab.iter().find(|(_, id)| id.as_u64() == Some(7)).unwrap().0.clone();
            vocab.remove(&name);
            7u32
        });
        let tokenizer = load_json(&json).unwrap();
        for token in json["added_tokens"].as_array().unwrap() {
            let (content, id) = (token["content"].as_str().unwrap(), token["id"].as_u64().unwrap() as u32);
            assert_eq!((tokenizer.id(content), tokenizer.token(id).is_some()), (Some(id), true), "{kind}: {content}");
            assert!(tokenizer.encode_with_special(&format!("a {content}.")).unwrap().contains(&id), "{kind}: {content}");
            // A model gives the unknown token itself.
            if token["special"] == json!(true) && content != "<unk>" {
                assert!(!tokenizer.encode(&format!("a {content}.")).unwrap().contains(&id), "{kind}: {content}");
                assert_eq!(tokenizer.decode(&[id]), "", "{kind}: {content}");
            }
        }
        if let Some(first) = first.map(|first| first as u32) {
            let expected: Vec<u32> = hole.into_iter().chain(first..first + 5).collect();
            assert_eq!(tokenizer.unused_ids(first as usize + 5), expected, "{kind}");
            assert_eq!(tokenizer.decode(&expected), "", "{kind}: they have no text");
        }
        let text = "Hello 123";
        assert_eq!(tokenizer.encode(text).unwrap(), whole.encode(text).unwrap(), "{kind}");
    }
    let error = |edit: fn(&mut Value)| {
        let mut json = built("gpt2");
        edit(&mut json);
        load_json(&json).unwrap_err()
    };
    assert!(error(|json| json["added_tokens"][0]["id"] = 3.into()).contains("which the vocabulary gives to"));
    assert!(error(|json| json["added_tokens"][0]["content"] = "a".into()).contains("among the added tokens and id"));
    assert!(error(|json| json["added_tokens"][0]["id"] = json["added_tokens"][1]["id"].clone()).contains("two added tokens"));
    assert!(error(|json| json["added_tokens"][0]["id"] = (1 << 21).into()).contains("the model's vocabulary has"));
    assert!(error(|json| json["added_tokens"][0]["id"] = (-1).into()).contains("expected an id and a content"));
}

#[test]
fn files_beside_it_add_tokens_and_flags() {
    let json = built("qwen2");
    let next = json["added_tokens"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).max().unwrap() as u32 + 1;
    let bytes = json.to_string();
    let config = json!({"added_tokens_decoder": {(next + 2).to_string(): {"content": "<new>", "special": true, "lstrip": true}},
                        "eos_token": "<think>", "extra_special_tokens": ["</think>"]});
    let dir = directory(&[("tokenizer.json", bytes.as_bytes()), ("tokenizer_config.json", config.to_string().as_bytes())]);
    let tokenizer = load(dir.path()).unwrap();
    assert_eq!(tokenizer.id("<new>"), Some(next + 2));
    assert_eq!(tokenizer.encode_with_special("a <new>").unwrap().len(), 2, "its flags are read");
    for special in ["<think>", "</think>", "<new>"] {
        assert!(tokenizer.specials().any(|(_, token)| token.content == special), "{special}: named tokens are special");
        assert!(tokenizer.encode(special).unwrap().len() > 1, "{special}");
    }
    assert_eq!(tokenizer.encode("<tool_call>").unwrap().len(), 1, "what is not special stays a token");
    // The older files, where there is no added_tokens_decoder.
    let dir = directory(&[
        ("tokenizer.json", bytes.as_bytes()),
        ("special_tokens_map.json", json!({"pad_token": {"content": "<pad>"}}).to_string().as_bytes()),
        ("added_tokens.json", json!({"<pad>": next}).to_string().as_bytes()),
    ]);
    let tokenizer = load(dir.path()).unwrap();
    assert_eq!(tokenizer.id("<pad>"), Some(next));
    assert!(tokenizer.encode("<pad>").unwrap().len() > 1);
    let dir = directory(&[("tokenizer.json", bytes.as_bytes()), ("tokenizer_config.json", b"{")]);
    assert!(load(dir.path()).unwrap_err().contains("tokenizer_config.json: not JSON"));
}

#[test]
fn vocabulary_files_load_or_say_what_to_do() {
    let read = |name: &str| std::fs::read(files("qwen_files").join(name)).unwrap();
    let (vocab, merges) = (read("vocab.json"), read("merges.txt"));
    let expected = crate::load("qwen_files").encode("The quick brown fox 123 😀").unwrap();
    // The class may be missing where config.json names the model.
    let dir = directory(&[("vocab.json", &vocab), ("merges.txt", &merges), ("config.json", b"{\"model_type\": \"Dream\"}")]);
    assert_eq!(load(dir.path()).unwrap().encode("The quick brown fox 123 😀").unwrap(), expected);
    let error = |files: &[(&str, &[u8])]| load(directory(files).path()).unwrap_err();
    let made = "AutoTokenizer.from_pretrained(";
    let found = error(&[("vocab.json", &vocab), ("merges.txt", &merges)]);
    assert!(found.contains("belong to no class") && found.contains(made), "{found}");
    let class = b"{\"tokenizer_class\": \"CLIPTokenizer\"}";
    let found = error(&[("vocab.json", &vocab), ("merges.txt", &merges), ("tokenizer_config.json", class)]);
    assert!(found.contains("`CLIPTokenizer`") && found.contains(made), "{found}");
    let found = error(&[("tokenizer.model", b"x")]);
    assert!(found.contains("only tokenizer.model") && found.contains(made), "{found}");
    assert!(error(&[]).contains("expected tokenizer.json, or vocab.json and merges.txt"));
}

#[test]
fn values_that_the_crate_does_not_check_are_errors() {
    let cases: [(&str, Value, &str); 12] = [
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "a map that holds what it says"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////////////w=="}), "a map that holds what it says"),
        ("normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}), "an empty one"),
        ("normalizer", json!({"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}), "not a tokenizer"),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers": vec![json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}); 40]}),
            "times longer",
        ),
        ("normalizer", json!({"type": "Unheard"}), "not a tokenizer"),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "a length of at least 1"),
        ("pre_tokenizer", json!(7), "not a tokenizer"),
        ("decoder", json!({"type": "Strip", "content": "a", "start": 0, "stop": 3}), "cannot decode the tokens"),
        ("decoder", json!({"type": "Strip"}), "not a tokenizer"),
        ("decoder", json!({"type": 7}), "not a tokenizer"),
        (
            "model",
            json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "##"}),
            "not a tokenizer",
        ),
    ];
    for (key, value, expected) in cases {
        let mut json = built("gpt2");
        json[key] = value.clone();
        let error = load_json(&json).map(|_| ()).unwrap_err();
        assert!(error.contains(expected), "{key} {value}: {error}");
        assert!(error.len() < 1000, "{error}");
    }
    // Padding of gigabytes, a stride beyond the truncation: neither is a prompt's.
    let mut json = built("trained");
    json["padding"]["strategy"]["Fixed"] = (1u64 << 40).into();
    json["truncation"]["stride"] = 99.into();
    assert!(load_json(&json).unwrap().encode("The quick brown fox jumps").unwrap().len() > 4);
}

/// Every value of the file below `depth`, as a path of keys.
fn paths(value: &Value, depth: usize, at: &str, out: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().take(12).map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect(),
        Value::Array(list) => list.iter().enumerate().take(3).map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        let path = format!("{at}/{key}");
        if depth > 0 {
            paths(child, depth - 1, &path, out);
        }
        out.push(path);
    }
}

#[test]
fn no_mutation_of_a_file_ends_the_process() {
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(u32::MAX),
        json!(""),
        json!("a"),
        json!([]),
        json!({}),
        json!(true),
        json!(["x", 3]),
    ];
    let (mut tried, mut refused) = (0, 0);
    for kind in ["gpt2", "llama_legacy", "unigram", "wordpiece"] {
        let json = built(kind);
        let mut all = Vec::new();
        paths(&json, 4, "", &mut all);
        for (i, path) in all.iter().enumerate() {
            // Each place with some of the values, all values over the places.
            for value in (0..3).map(|k| &values[(i * 3 + k) % values.len()]) {
                let mut json = json.clone();
                *json.pointer_mut(path).unwrap() = value.clone();
                tried += 1;
                match load_json(&json) {
                    Ok(tokenizer) => {
                        let ids = tokenizer.encode("The sea <s> <mask> 123 é 😀\n").unwrap_or_default();
                        let _ = tokenizer.decode(&ids);
                        let _ = tokenizer.encode_with_special("a </s>");
                    }
                    Err(error) => {
                        assert!(error.contains("tokenizer.json"), "{path} {value}: {error}");
                        refused += 1;
                    }
                }
            }
        }
    }
    println!("{tried} mutations, {refused} refused");
    assert!(tried > 400 && refused > 50 && refused < tried, "{tried} {refused}");
}
