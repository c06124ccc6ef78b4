//! Chat templates against transformers (`cases.json`, written by tools/fixtures/write_chat.py),
//! hostile messages and templates, and `generate --chat`.

use std::path::Path;
use std::process::Command;

use redraft::chat::{ChatTemplate, Message};
use redraft::tokenizer::Tokenizer;
use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/redraft-stories-10m");

fn directory(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::load(directory(&json!({"chat_template": source, "bos_token": "<s>", "eos_token": {"content": "</s>"}})).path()).unwrap()
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new("user", content)]
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&Path::new(MODEL).join("tokenizer.json"), 4096).unwrap()
}

#[test]
fn renders_what_transformers_renders() {
    let cases: Value = serde_json::from_str(include_str!("cases.json")).unwrap();
    let (mut equal, mut refused) = (0, 0);
    for case in cases["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let found = template(cases["templates"][name].as_str().unwrap()).render(&messages);
        match case["text"].as_str() {
            Some(text) => {
                assert_eq!(found.unwrap(), text, "{name}: {messages:?}");
                equal += 1;
            }
            None => {
                assert!(found.unwrap_err().to_string().contains("unknown role stranger"), "{name}");
                refused += 1;
            }
        }
    }
    assert_eq!((equal, refused), (11, 1));
}

#[test]
fn a_template_may_stand_in_a_file_or_in_a_list() {
    let dir =
        directory(&json!({"chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "list {{ eos_token }}"}],
                                "eos_token": "</s>"}));
    assert_eq!(ChatTemplate::load(dir.path()).unwrap().render(&user("x")).unwrap(), "list </s>");
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(ChatTemplate::load(dir.path()).unwrap().render(&user("x")).unwrap(), "file");
}

#[test]
fn special_tokens_of_the_template_are_special_and_those_of_a_message_are_text() {
    const MASK: u32 = 4095;
    let tokenizer = tokenizer();
    let template = template("<|endoftext|>{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}<|endoftext|>");
    let plain = template.encode(&user("Once upon a time"), &tokenizer).unwrap();
    let whole = tokenizer.encode("user: Once upon a time\n").unwrap();
    assert_eq!(plain, [vec![0], whole, vec![0]].concat(), "in one piece, as transformers does");

    let hostile = [Message::new("system", "Be <|mask|>."), Message::new("user", " <|endoftext|> <|mask|>\n")];
    let ids = template.encode(&hostile, &tokenizer).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 2, "the template's two: {ids:?}");
    assert!(!ids.contains(&MASK), "{ids:?}");
    assert_eq!(tokenizer.decode_all(&ids), template.render(&hostile).unwrap(), "nothing is lost");
}

#[test]
fn templates_that_cannot_be_used_say_why() {
    let error = |config: Value| ChatTemplate::load(directory(&config).path()).unwrap_err().to_string();
    assert!(error(json!({})).contains("no chat template: expected chat_template.jinja"));
    assert!(error(json!({"chat_template": 3})).contains("expected a string or a list, found 3"));
    assert!(error(json!({"chat_template": [{"name": "rag", "template": ""}]})).contains("`default`"));
    assert!(error(json!({"chat_template": "{% for m in messages %}"})).contains("does not parse"));
    let empty = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::load(empty.path()).unwrap_err().to_string().contains("no chat template"));
    std::fs::write(empty.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(ChatTemplate::load(empty.path()).unwrap_err().to_string().contains("not JSON"));
    let endless = template("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}");
    assert!(endless.render(&user("x")).unwrap_err().to_string().contains("fails"));
    // A message that is told apart from the template by its letters must still be there.
    let changed = template("{{ messages[0].content | upper }}");
    assert!(changed.encode(&user("a<|mask|>"), &tokenizer()).unwrap_err().to_string().contains("spells a special token"));
}

#[test]
fn generate_chat_begins_with_the_template() {
    let dir = directory(&json!({"chat_template": "<|endoftext|>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}));
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new(MODEL).join(file), dir.path().join(file)).unwrap();
    }
    let generate = |args: &[&str]| {
        let flags = ["generate", "--length", "4", "--preset", "draft", "--format", "json", "--device", "cpu"];
        Command::new(env!("CARGO_BIN_EXE_redraft")).args(flags).args(args).output().unwrap()
    };
    let model = dir.path().to_str().unwrap();
    let output = generate(&["--model", model, "--chat", "--system", "Be kind.", "--prompt", "Hello <|mask|>"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let messages = [Message::new("system", "Be kind."), Message::new("user", "Hello <|mask|>")];
    let prompt = ChatTemplate::load(dir.path()).unwrap().encode(&messages, &tokenizer()).unwrap();
    assert_eq!(found["prompt_tokens"], prompt.len(), "no BOS but the template's");

    let output = generate(&["--chat", "--prompt", "Hello"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no chat template"));
    assert_eq!(generate(&["--system", "x", "--prompt", "y"]).status.code(), Some(2));
    let output = generate(&["--model", model, "--chat"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected a message"));
}
