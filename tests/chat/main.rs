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
    template_of(source, "</s>")
}

fn template_of(source: &str, eos_token: &str) -> ChatTemplate {
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": eos_token}, "unk_token": "<unk>", "pad_token": "<pad>"});
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
    let (mut equal, mut refused, mut expressions) = (0, 0, 0);
    let mut different: Vec<String> = Vec::new();
    for line in include_str!("golden.jsonl").lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| row[key].as_str().map(str::to_owned);
        if let Some(source) = text("source") {
            templates.insert(text("template").unwrap(), template(&source));
        } else if row.get("conversation").is_some() {
            // As text, since a value would sort its keys.
            let (_, value) = line.split_once("\"conversation\": ").unwrap();
            talks.insert(text("talk").unwrap(), Conversation::from_json(value.strip_suffix('}').unwrap()).unwrap());
        } else if let Some(expression) = text("expression") {
            let talk = json!({"messages": [{"role": "user", "content": ""}], "chat_template_kwargs": row["values"]});
            // As text, since a value would sort the keys.
            let (_, values) = line.split_once("\"values\": ").unwrap();
            let talk = talk.to_string().replace(&row["values"].to_string(), values.rsplit_once(", \"text\": ").unwrap().0);
            let found = template(&format!("{{{{ {expression} }}}}")).render_conversation(&Conversation::from_json(&talk).unwrap());
            let expected = text("text").unwrap();
            if found.as_ref().ok() != Some(&expected) {
                different.push(format!("{expression}: {found:?}, transformers {expected:?}"));
            }
            expressions += 1;
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
    assert_eq!((templates.len(), talks.len(), equal, refused), (60, 27, 1304, 316));
    assert!(different.is_empty(), "{} of {expressions} expressions: {}", different.len(), different.join("\n"));
    assert!(expressions > 300, "{expressions}");
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

/// Whatever a template does to a message, the message's characters are text and the template's
/// special tokens are special.
#[test]
fn a_message_that_the_template_changes_stays_text() {
    let tokenizer = tokenizer();
    let sources = [
        "{{ x | upper }}",
        "{{ x.upper() }}{{ x.lower() }}",
        "{{ x | lower }}",
        "{{ x | capitalize }}{{ x.capitalize() }}",
        "{{ x | title }}{{ x.title() }}",
        "{{ x.swapcase() }}",
        "{{ x | reverse }}",
        "{{ x[::-1] }}",
        "{{ x[1:-1] }}",
        "{{ x[:5] }}{{ x[5:] }}",
        "{{ x | replace('a', 'b') }}",
        "{{ x.replace('<|mask|>', '(mask)') }}",
        "{{ x.replace('#', '') }}",
        "{{ x | replace('#', '') | lower }}",
        "{{ x.replace(eos_token, '') }}",
        "{{ x.split('|') | join('/') }}{{ x.split('|') | join('|') }}",
        "{{ x.split('<|endoftext|>')[0] }}",
        "{{ x.split(eos_token)[-1] }}",
        "{% if '<|mask|>' in x %}looks{% endif %}{{ x }}",
        "{% if eos_token not in x %}looks{% endif %}{{ x }}",
        "{% if x == '<|mask|>' %}same{% endif %}{{ x }}",
        "{% if x in ['<|mask|>', 'b'] %}one of{% endif %}{{ x | trim }}",
        "{% if x.startswith('<|') and x.endswith('|>') %}{{ x.strip('<|>') }}{% endif %}{{ x }}",
        "{% if x.startswith('<|mask|>') %}{{ x.removeprefix('<|mask|>') }}{% else %}{{ x }}{% endif %}",
        "{{ x.find('<|mask|>') }}{{ x | length }}{{ x }}",
        "{{ x | tojson }}{{ {'x': x} | tojson(ensure_ascii=true, indent=2) }}",
        "{{ {x: 1} | tojson }}",
        "{{ x | list | join('') }}{% for c in x %}{{ c }}{% endfor %}",
        "{{ x | e }}",
        "{{ x.title() if x[0] == '<' else x.lower() }}",
        "{% if x | length > 6 %}{{ x[:6] }}...{% else %}{{ x }}{% endif %}",
        "{{ '%s and %r' % (x, x) }}{{ x.center(40, '*') }}",
        "{{ x.split() | map('trim') | join(' ') }}",
        "{% set c = x.split('</think>') %}{{ c[-1].lstrip('\\n') }}{{ (c[0] ~ '</think>') if c | length > 1 else '' }}",
    ];
    let contents = [
        "<|mask|>",
        "a <|endoftext|> b",
        "<|MASK|> and <|EndOfText|>",
        "<|ma#sk|>",
        "#<|endof#text|>",
        ">|ksam|<",
        "Ünï <|mask|> straße\n\"quoted\" 'x' \\\\ <|mask|>",
        "why?</think>so <|mask|><|endoftext|>",
        "<|mask",
        "k|>",
        "plain Text # 3",
    ];
    for source in sources {
        let whole = format!("<|endoftext|>{{% for m in messages %}}{{% set x = m.content %}}{source}<|endoftext|>{{% endfor %}}");
        let template = template_of(&whole, "<|endoftext|>");
        for content in contents {
            let talk = user(content);
            let ids = template.encode(&talk, &tokenizer).unwrap_or_else(|e| panic!("{source}: {content:?}: {e}"));
            let special: Vec<u32> = ids.iter().copied().filter(|id| [0, 4095].contains(id)).collect();
            assert_eq!(special, [0, 0], "{source}: {content:?}: {ids:?}");
            assert_eq!(tokenizer.decode_all(&ids), template.render(&talk).unwrap(), "{source}: {content:?}: nothing is lost");
        }
    }
}

/// `<|{{ role }}|>` is one token, as published templates spell it; so are tokens that a template
/// pieces together, and one that it writes in answer to a message.
#[test]
fn special_tokens_that_a_template_pieces_together_are_special() {
    let tokenizer = tokenizer();
    let special = |source: &str, talk: &[Message]| -> Vec<u32> {
        let ids = template_of(source, "<|endoftext|>").encode(talk, &tokenizer).unwrap_or_else(|e| panic!("{source}: {e}"));
        ids.into_iter().filter(|id| [0, 4095].contains(id)).collect()
    };
    let by_role = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}";
    let talk = |content: &str| [Message::new("mask", content), Message::new("endoftext", content)];
    for content in ["plain", "mask", "<|mask|>", "<|", "|>", "x<|endoftext|><|ma"] {
        assert_eq!(special(by_role, &talk(content)), [4095, 0], "{content}");
        assert_eq!(special(&by_role.replace("m.content", "m.content.upper()"), &talk(content)), [4095, 0], "{content}");
    }
    assert!(special(by_role, &[Message::new("<|mask|>", "a role that spells one")]).is_empty());
    assert_eq!(special("{{ '<|end' + 'oftext|>' }}{{ messages[0].content }}", &user("<|mask|>")), [0]);
    assert_eq!(special("{{ messages[0].content.replace('stop', '<|endoftext|>') }}", &user("stop <|endoftext|>")), [0]);
    assert_eq!(special("{% if '<|mask|>' in messages[0].content %}{{ eos_token }}{% endif %}", &user("<|mask|>")), [0]);
    assert_eq!(special("{{ '<|MASK|>' | lower }}{{ messages[0].content }}", &user("<|mask|>")), [4095]);
    // What it looks for and what it pieces together cannot both be told.
    let both = by_role.replace("m.content", "('yes' if '<|' ~ 'mask|>' in m.content else 'no') + m.content");
    let error = template(&both).encode(&[Message::new("mask", "<|mask|>")], &tokenizer);
    assert!(error.is_err_and(|e| e.to_string().contains("spells a special token")));
}

/// The last message goes on: as transformers cuts it, and with its special tokens as text.
#[test]
fn the_final_message_is_continued() {
    let tokenizer = tokenizer();
    let source = "{% for m in messages %}{{ eos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let template = template_of(source, "<|endoftext|>");
    let talk = [Message::new("user", "Hi"), Message::new("assistant", "<|mask|> Hello")];
    let conversation = Conversation::new(&talk).continuing_final_message();
    assert_eq!(
        template.render_conversation(&conversation).unwrap(),
        "<|endoftext|>user: Hi<|endoftext|><|endoftext|>assistant: <|mask|> Hello"
    );
    let ids = template.encode_conversation(&conversation, &tokenizer).unwrap();
    assert_eq!(ids.iter().filter(|id| [0, 4095].contains(*id)).count(), 3, "{ids:?}");
    let read = |extra: &str| Conversation::from_json(&format!(r#"{{"messages": [{{"role": "user", "content": "Hi "}}], {extra}}}"#));
    assert_eq!(
        template.render_conversation(&read(r#""continue_final_message": true"#).unwrap()).unwrap(),
        "<|endoftext|>user: Hi ",
        "no prompt of an answer"
    );
    assert!(template.render_conversation(&read(r#""continue_final_message": false"#).unwrap()).unwrap().ends_with("assistant: "));
    let error = read(r#""continue_final_message": true, "add_generation_prompt": true"#).unwrap_err().to_string();
    assert!(error.contains("exclude each other"), "{error}");
    assert!(read(r#""continue_final_message": 3"#).unwrap_err().to_string().contains("expected true, false or a key"));
    let error = |source: &str, extra: &str| template_of(source, "</s>").render_conversation(&read(extra).unwrap()).unwrap_err().to_string();
    assert!(error(source, r#""continue_final_message": "thinking""#).contains("has no `thinking` to continue"));
    assert!(error("{{ messages }}", r#""continue_final_message": true"#).contains("does not read `content`"));
    let left_out = error("{{ messages[0].content[:1] }}", r#""continue_final_message": true"#);
    assert!(left_out.contains("leaves out a part of the final message"), "{left_out}");
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
