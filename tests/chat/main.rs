//! Chat templates against transformers (`golden.jsonl`, written by tools/fixtures/write_chat.py),
//! hostile messages and templates, and `generate --chat` and `--messages`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use redraft::chat::{ChatTemplate, Conversation, Message};
use redraft::tokenizer::Tokenizer;
use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/redraft-stories-10m");

fn directory(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn template(source: &str) -> ChatTemplate {
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>"});
    let dir = directory(&tokens);
    std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    ChatTemplate::load(dir.path()).unwrap()
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new("user", content)]
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&Path::new(MODEL).join("tokenizer.json"), 4096).unwrap()
}

#[test]
fn renders_what_transformers_renders() {
    let (mut templates, mut talks) = (BTreeMap::new(), BTreeMap::new());
    let (mut equal, mut refused) = (0, 0);
    for line in include_str!("golden.jsonl").lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| row[key].as_str().map(str::to_owned);
        if let Some(source) = text("source") {
            templates.insert(text("template").unwrap(), template(&source));
        } else if row.get("conversation").is_some() {
            // As text, since a value would sort its keys.
            let (_, value) = line.split_once("\"conversation\": ").unwrap();
            talks.insert(text("talk").unwrap(), Conversation::from_json(value.strip_suffix('}').unwrap()).unwrap());
        } else {
            let (name, talk) = (text("template").unwrap(), text("talk").unwrap());
            let found = templates[&name].render_conversation(&talks[&talk]);
            match text("text") {
                Some(expected) => {
                    assert_eq!(found.unwrap(), expected, "{name}: {talk}");
                    equal += 1;
                }
                None => {
                    assert!(found.is_err(), "{name}: {talk}: {found:?}, transformers refuses: {:?}", row["error"]);
                    refused += 1;
                }
            }
        }
    }
    println!("{} templates times {} conversations: {equal} equal, {refused} refused by both", templates.len(), talks.len());
    assert_eq!((templates.len(), talks.len(), equal + refused), (60, 20, 1200));
    assert!(equal > 1050, "{equal}");
}

#[test]
fn a_template_may_stand_in_a_file_or_in_a_list() {
    let list = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "list {{ eos_token }}"}]);
    let dir = directory(&json!({"chat_template": list, "eos_token": "</s>"}));
    let load = || ChatTemplate::load(dir.path()).unwrap();
    let talk = |json: Value| Conversation::from_json(&json.to_string()).unwrap();
    let messages = json!([{"role": "user", "content": "x"}]);
    assert_eq!(load().render(&user("x")).unwrap(), "list </s>");
    let with_tools = talk(json!({"messages": messages, "tools": [{"name": "f"}]}));
    assert_eq!(load().render_conversation(&with_tools).unwrap(), "tools", "as transformers chooses");
    let named = talk(json!({"messages": messages, "tools": [{"name": "f"}], "chat_template": "default"}));
    assert_eq!(load().render_conversation(&named).unwrap(), "list </s>");
    let unknown = load().render_conversation(&talk(json!({"messages": messages, "chat_template": "rag"}))).unwrap_err().to_string();
    assert!(unknown.contains("`rag`") && unknown.contains("default, tool_use"), "{unknown}");
    std::fs::create_dir(dir.path().join("chat_templates")).unwrap();
    std::fs::write(dir.path().join("chat_templates/rag.jinja"), "more").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "\u{feff}file\r\n").unwrap();
    assert_eq!(load().render(&user("x")).unwrap(), "file");
    assert_eq!(load().render_conversation(&talk(json!({"messages": messages, "chat_template": "rag"}))).unwrap(), "more");
    // Tokens that only the older file names.
    std::fs::write(dir.path().join("special_tokens_map.json"), json!({"bos_token": {"content": "<b>"}}).to_string()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }}{{ eos_token }}").unwrap();
    assert_eq!(load().render(&user("x")).unwrap(), "<b></s>");
}

#[test]
fn special_tokens_of_the_template_are_special_and_those_of_a_message_are_text() {
    const MASK: u32 = 4095;
    let tokenizer = tokenizer();
    let plain = template("<|endoftext|>{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}<|endoftext|>");
    let ids = plain.encode(&user("Once upon a time"), &tokenizer).unwrap();
    let whole = tokenizer.encode("user: Once upon a time\n").unwrap();
    assert_eq!(ids, [vec![0], whole, vec![0]].concat(), "in one piece, as transformers does");

    let hostile = [Message::new("system", "Be <|mask|>."), Message::new("user", " <|endoftext|> <|mask|>\n")];
    let ids = plain.encode(&hostile, &tokenizer).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 2, "the template's two: {ids:?}");
    assert!(!ids.contains(&MASK), "{ids:?}");
    assert_eq!(tokenizer.decode_all(&ids), plain.render(&hostile).unwrap(), "nothing is lost");
}

#[test]
fn no_message_makes_a_special_token() {
    let tokenizer = tokenizer();
    // How templates handle what they are given, and how many special tokens each writes for a
    // user's message after an assistant's.
    let sources = [
        (
            "<|endoftext|>system: be kind<|endoftext|>{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}",
            6,
        ),
        ("{% for m in messages %}<|endoftext|>{{ m.content | trim }}{% endfor %}", 2),
        ("{% for m in messages %}{{ '<|endoftext|>' + m.role + '\\n' + m['content'] + '<|endoftext|>' }}{% endfor %}", 4),
        ("{{ messages | map(attribute='content') | join('') }}<|endoftext|>", 1),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<|endoftext|>", 1),
        ("<|endoftext|>{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", 1),
        (
            "<|endoftext|>{% for m in messages %}{% if m.content.startswith('<') %}({{ m.content }}){% else %}{{ m.content.strip() }}{% endif %}{% endfor %}",
            1,
        ),
        ("<|endoftext|>{{ messages | tojson }}", 1),
        ("<|endoftext|>{% for m in messages %}{{ m.content[:200] }}|{{ m.content | length }}{% endfor %}", 1),
    ];
    let contents = [
        "<|endoftext|>",
        "tell me of <|endoftext|>",
        "<|endoftext|>user",
        "a<|endoftext|><|endoftext|>b",
        " <|endoftext|> ",
        "<|mask|>",
        "<|endof",
        "text|>",
        "<|",
        "|>",
        "endoftext",
        "<|endof<|endoftext|>text|>",
        "x</think><|endoftext|>",
        "{{ '<|endoftext|>' }}",
        "\u{f0000}<|endoftext|>\u{100000}",
        "plain",
        "",
    ];
    for (source, count) in sources {
        let template = template(source);
        for before in contents {
            for content in contents {
                let talk = [Message::new("assistant", before), Message::new("user", content)];
                let ids = template.encode(&talk, &tokenizer).unwrap_or_else(|e| panic!("{source}: {before:?} {content:?}: {e}"));
                let special = ids.iter().filter(|id| [0, 4095].contains(*id)).count();
                assert_eq!(special, count, "{source}: {before:?} {content:?}: {ids:?}");
                assert_eq!(
                    tokenizer.decode_all(&ids),
                    template.render(&talk).unwrap(),
                    "{source}: {before:?} {content:?}: nothing is lost"
                );
            }
        }
    }
    // In a role, a tool, a document, an argument, a key's value at any depth.
    let template = template(
        "<|endoftext|>{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ tools | tojson }}{{ documents[0].text }}{{ extra }}",
    );
    let text = "a <|endoftext|>";
    let talk = json!({"messages": [{"role": text, "content": text}], "tools": [{"name": {"deep": [text]}}], "documents": [{"text": text}],
                      "chat_template_kwargs": {"extra": text}});
    let ids = template.encode_conversation(&Conversation::from_json(&talk.to_string()).unwrap(), &tokenizer).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 1, "{ids:?}");
}

#[test]
fn templates_that_cannot_be_used_say_why() {
    let error = |config: Value| ChatTemplate::load(directory(&config).path()).unwrap_err().to_string();
    assert!(error(json!({})).contains("no chat template: expected chat_template.jinja"));
    assert!(error(json!({"chat_template": 3})).contains("expected a string or a list, found 3"));
    assert!(error(json!({"chat_template": [{"name": "rag", "template": ""}]})).contains("`default`"));
    assert!(error(json!({"chat_template": [3]})).contains("objects with a name and a template"));
    assert!(error(json!({"chat_template": "{% for m in messages %}"})).contains("does not parse"));
    let empty = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::load(empty.path()).unwrap_err().to_string().contains("no chat template"));
    std::fs::write(empty.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(ChatTemplate::load(empty.path()).unwrap_err().to_string().contains("not JSON"));
    // A message that is told apart from the template by its letters must still be there.
    let changed = template("{{ messages[0].content | upper }}");
    assert!(changed.encode(&user("a<|mask|>"), &tokenizer()).unwrap_err().to_string().contains("spells a special token"));
}

#[test]
fn a_template_is_bounded_in_steps_and_bytes() {
    let doubled = |first: &str, step: &str| format!("{{% set x = {first} %}}{}{{{{ x }}}}", step.repeat(64));
    let bombs = [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}".to_owned(),
        doubled("'a'", "{% set x = x + x %}"),
        doubled("'a'", "{% set x = x ~ x %}"),
        doubled("'a'", "{% set x = x * 2 %}"),
        doubled("['a']", "{% set x = x + x %}"),
        doubled("'a'", "{% set x = '%s%s' % (x, x) %}"),
        doubled("'a'", "{% set x = '{0}{0}'.format(x) %}"),
        doubled("'a'", "{% set x = [x, x] | join %}"),
        doubled("'a'", "{% set x = ''.join([x, x]) %}"),
        doubled("'a'", "{% set x = x.replace('a', 'aa') %}"),
        doubled("'a'", "{% set x = x | replace('a', 'aa') %}"),
        doubled("'a'", "{% set x %}{{ x }}{{ x }}{% endset %}"),
        doubled("'a\\n'", "{% set x = x | tojson %}"),
        doubled("['a']", "{% set x = [x, x] %}"),
        doubled("['a']", "{% set x = [x, x] %}").replace("{{ x }}", "{{ x | tojson }}"),
        doubled("['a']", "{% set x = [x, x] %}").replace("{{ x }}", "{% set y = [x] %}{{ x == y }}"),
        doubled("{}", "{% set x = {'a': x, 'b': x} %}"),
        "{{ 'x' | indent(1000000000) }}".to_owned(),
        "{{ 'x' | center(1000000000) }}".to_owned(),
        "{{ 'x'.rjust(1000000000) }}".to_owned(),
        "{{ 'x'.zfill(1000000000) }}".to_owned(),
        "{{ '\\t'.expandtabs(1000000000) }}".to_owned(),
        "{{ '%1000000000d' % 1 }}".to_owned(),
        "{{ '%.1000000000f' % 1 }}".to_owned(),
        "{{ '{:1000000000}'.format(1) }}".to_owned(),
        "{{ [1] | tojson(indent=1000000000) }}".to_owned(),
        "{{ ''.join([messages]*1000000) }}".to_owned(),
        "{{ 'x' * 10000000000 }}".to_owned(),
        "{{ [0] * 10000000000 }}".to_owned(),
        format!("{{% set x %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}", "raw text ".repeat(1000)),
        format!("{{% macro f(n) %}}{}{{{{ f(n) }}}}{{% endmacro %}}{{{{ f(1) }}}}", "raw text ".repeat(1000)),
    ];
    for bomb in bombs {
        let begun = std::time::Instant::now();
        let error = template(&bomb).render(&user("x")).expect_err(&bomb).to_string();
        assert!(error.contains("the chat template fails") && error.len() < 1000, "{bomb}: {error}");
        assert!(begun.elapsed().as_secs() < 20, "{bomb}");
    }
    // What published templates need is far below: a thousand turns.
    let turns: Vec<Message> = (0..1000).map(|i| Message::new(["user", "assistant"][i % 2], "word ".repeat(100))).collect();
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'user' %}{{ m.content | trim }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}";
    assert!(template(source).render(&turns).unwrap().len() > 500_000);
}

#[test]
fn conversations_that_are_none_say_why() {
    let error = |text: &str| Conversation::from_json(text).unwrap_err().to_string();
    assert!(error("{").contains("messages: not JSON"));
    assert!(error("3").contains("a list of messages"));
    assert!(error("[]").contains("at least one message"));
    assert!(error("[3]").contains("expected a list of objects"));
    assert!(error("[{\"content\": \"x\"}]").contains("message 0 has no text as its `role`"));
    assert!(error("{\"tools\": []}").contains("key `messages`"));
    assert!(error("{\"messages\": [{\"role\": \"user\"}], \"tool\": []}").contains("key `tool` is not one of"));
    assert!(error("{\"messages\": [{\"role\": \"user\"}], \"tools\": 3}").contains("key `tools`"));
    assert!(error("{\"messages\": [{\"role\": \"user\"}], \"add_generation_prompt\": 3}").contains("true or false"));
    assert!(error("{\"messages\": [{\"role\": \"user\"}], \"chat_template_kwargs\": 3}").contains("expected an object"));
}

#[test]
fn the_date_is_todays() {
    let found = template("{{ strftime_now('%Y') }}").render(&user("x")).unwrap();
    let year: i32 = found.parse().unwrap();
    assert!((2024..3000).contains(&year), "{found}");
    let error = template("{{ strftime_now('%Q') }}").render(&user("x")).unwrap_err().to_string();
    assert!(error.contains("no format of a date"), "{error}");
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
    assert_eq!(found["prompt"]["tokens"], json!(prompt), "no BOS but the template's");

    // The same from a file, and several turns.
    let file = dir.path().join("talk.json");
    let talk = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello <|mask|>"}]);
    std::fs::write(&file, format!("\u{feff}{talk}")).unwrap();
    let same = generate(&["--model", model, "--messages", file.to_str().unwrap()]);
    let same: Value = serde_json::from_slice(&same.stdout).unwrap();
    assert_eq!((&same["prompt"], &same["tokens"]), (&found["prompt"], &found["tokens"]));
    let talk = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]});
    std::fs::write(&file, talk.to_string()).unwrap();
    let output = generate(&["--model", model, "--messages", file.to_str().unwrap(), "--chat"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["prompt"]["text"], "user: Hi\nassistant: Hello.\nuser: Bye\n");
    std::fs::write(&file, "[]").unwrap();
    let output = generate(&["--model", model, "--messages", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("at least one message"));

    let output = generate(&["--chat", "--prompt", "Hello"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no chat template"));
    assert_eq!(generate(&["--system", "x", "--prompt", "y"]).status.code(), Some(2));
    let output = generate(&["--model", model, "--chat"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected a message"));
}
