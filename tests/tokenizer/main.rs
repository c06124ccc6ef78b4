//! Tokenizers of every published kind against transformers (`golden.jsonl`, written by
//! tools/fixtures/write_tokenizers.py), and files that are not as the tokenizers crate expects.

mod hostile;
mod prompts;

use std::path::{Path, PathBuf};

use redraft::tokenizer::Tokenizer;
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The tokenizer of a kind, or of a directory below the root.
fn load(name: &str) -> Tokenizer {
    let dir = if name.contains('/') { Path::new(ROOT).join(name) } else { files(name) };
    Tokenizer::load(&dir.join("tokenizer.json"), 1 << 20).unwrap()
}

fn files(kind: &str) -> PathBuf {
    Path::new(ROOT).join("tests/tokenizer/files").join(kind)
}

/// The texts, and a tokenizer and its rows for each of the other lines.
fn golden() -> (Vec<String>, Vec<Value>) {
    let mut lines = include_str!("golden.jsonl").lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let texts = lines.next().unwrap()["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect();
    (texts, lines.collect())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_are_those_of_transformers() {
    let (texts, kinds) = golden();
    assert_eq!((kinds.len(), texts.len()), (20, 200));
    let (mut compared, mut as_text, mut decoded) = (0, 0, 0);
    for kind in &kinds {
        let name = kind["name"].as_str().unwrap();
        let tokenizer = load(name);
        assert_eq!(tokenizer.prefix(), ids(&kind["prefix"]), "{name}");
        for (text, row) in texts.iter().zip(kind["rows"].as_array().unwrap()) {
            let expected = ids(&row["ids"]);
            assert_eq!(tokenizer.encode_with_special(text).unwrap(), expected, "{name}: {text:?}");
            let plain = tokenizer.encode(text).unwrap();
            // A model gives the unknown token itself, for characters that it does not know.
            let specials = tokenizer.specials().filter(|(_, token)| !["<unk>", "[UNK]"].contains(&token.content.as_str()));
            let specials: Vec<u32> = specials.map(|(id, _)| id).collect();
            let special = plain.iter().find(|id| specials.contains(id));
            assert_eq!(special, None, "{name}: {text:?}: no text spells a special token");
            match row.get("plain") {
                Some(Value::Null) => as_text += 1,
                other => {
                    let expected = other.map_or(expected, ids);
                    assert_eq!(plain, expected, "{name}: {text:?} as text");
                    assert_eq!(tokenizer.decode(&plain), row["decoded"].as_str().unwrap(), "{name}: {text:?} back");
                    decoded += 1;
                }
            }
            compared += 1;
        }
        let refs: Vec<&str> = texts.iter().map(String::as_str).collect();
        let each = tokenizer.encode_each(&refs).unwrap();
        assert!(refs.iter().zip(each).all(|(text, ids)| tokenizer.encode(text).unwrap() == ids), "{name}: side by side");
    }
    println!("{compared} texts compared, {decoded} also as text and back, {as_text} spell what is text here alone");
    assert_eq!((compared, decoded + as_text), (4000, 4000));
    assert!(decoded > 3700, "{decoded}");
}

#[test]
fn spans_are_special_and_the_same_letters_beside_them_are_text() {
    for kind in ["gpt2", "qwen2", "llama3", "deepseek", "llama_legacy", "llama_metaspace", "gemma", "unigram", "wordpiece", "added"] {
        let tokenizer = load(kind);
        let specials = tokenizer.specials().map(|(id, token)| (id, token.content.clone()));
        for (id, token) in specials.filter(|(_, token)| !["<unk>", "[UNK]"].contains(&token.as_str())).collect::<Vec<_>>() {
            let user = format!("Hello {token} the sea");
            let text = format!("{token}user\n{user}{token}\n");
            let end = text.len() - 1;
            let spans = [(0..token.len(), id), (end - token.len()..end, id)];
            let found = tokenizer.encode_spans(&text, &spans).unwrap();
            assert_eq!(found.iter().filter(|found| **found == id).count(), 2, "{kind}: {token}: {found:?}");
            // Where nothing in between spells one, the crate itself is right.
            let text = text.replacen(&user, "Hello the sea", 1);
            let end = text.len() - 1;
            let spans = [(0..token.len(), id), (end - token.len()..end, id)];
            assert_eq!(tokenizer.encode_spans(&text, &spans).unwrap(), tokenizer.encode_with_special(&text).unwrap(), "{kind}: {token}");
            // Private characters of the text's own are text.
            let private = format!("{token}\u{100000}\u{100001}");
            let found = tokenizer.encode_spans(&private, &[(0..token.len(), id)]).unwrap();
            assert_eq!(found.iter().filter(|found| **found == id).count(), 1, "{kind}: {token}: {found:?}");
        }
    }
}

#[test]
fn pieces_of_a_text_join_to_its_whole() {
    let (texts, _) = golden();
    let mut draw = 7u64;
    let mut next = |below: usize| {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (draw >> 33) as usize % below
    };
    let mut checked = 0;
    for kind in [
        "gpt2",
        "qwen2",
        "llama3",
        "deepseek",
        "neox",
        "llama_legacy",
        "llama_metaspace",
        "gemma",
        "unigram",
        "wordpiece",
        "wordlevel",
        "added",
    ] {
        let tokenizer = load(kind);
        let all: Vec<u32> = (0..700).filter(|id| tokenizer.token(*id).is_some()).collect();
        let written = texts.iter().map(|text| tokenizer.encode(text).unwrap()).filter(|ids| ids.len() > 1);
        let mut sequences: Vec<Vec<u32>> = written.collect();
        // Also what a model may write that no text is encoded to: bytes of no character.
        sequences.extend((0..200).map(|_| (0..12).map(|_| all[next(all.len())]).collect()));
        if ["llama_legacy", "llama_metaspace", "gemma"].contains(&kind) {
            let bytes: Vec<u32> = (0..=255u32).filter_map(|byte| tokenizer.id(&format!("<0x{byte:02X}>"))).collect();
            assert_eq!(bytes.len(), 256, "{kind}");
            sequences.extend((0..200).map(|_| (0..8).map(|_| bytes[next(256)]).collect()));
        }
        for ids in &sequences {
            let whole = tokenizer.decode(ids);
            for cut in [0, 1, ids.len() / 2] {
                let (before, after) = ids.split_at(cut);
                let joined = tokenizer.decode_before(before, after) + &tokenizer.decode_after(before, after);
                assert_eq!(joined, whole, "{kind}: {ids:?} at {cut}");
                let rest = tokenizer.decode_after(before, after);
                let mut sent = String::new();
                for n in 0..=after.len() {
                    let settled = tokenizer.decode_settled(before, &after[..n]);
                    assert!(settled.starts_with(&sent), "{kind}: {ids:?} at {cut}, {n} after it: {settled:?} takes {sent:?} back");
                    sent = settled;
                }
                assert!(rest.starts_with(&sent), "{kind}: {ids:?} at {cut}: {rest:?} takes {sent:?} back");
                let pieces = tokenizer.decode_pieces(before, after);
                assert_eq!((pieces.len(), pieces.concat()), (after.len(), rest), "{kind}: {ids:?} at {cut}");
                let longest = pieces.iter().map(|piece| piece.chars().count()).max().unwrap_or(0);
                assert!(longest <= 40, "{kind}: {ids:?} at {cut}: a piece of {longest} characters");
                checked += 1;
            }
        }
    }
    println!("{checked} texts in pieces");
    assert!(checked > 10_000, "{checked}");
}
