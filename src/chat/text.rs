//! Methods of Python's strings, lists and dictionaries that templates may call: those that change
//! nothing.
#![forbid(unsafe_code)]

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::format::format_method;
use super::python::{Budget, Charged, Outcome, fail, is_printable, items, string, type_name};
use super::source::is_space;

/// `str.split` and `str.rsplit`.
fn split(text: &str, separator: Option<&str>, most: Option<i64>, from_end: bool) -> Outcome {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        Some("") => return fail("empty separator"),
        Some(separator) if from_end => text.rsplitn(most.saturating_add(1), separator).collect(),
        Some(separator) => text.splitn(most.saturating_add(1), separator).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text);
            loop {
                rest = if from_end { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
                if rest.is_empty() {
                    break;
                }
                if parts.len() == most {
                    parts.push(rest);
                    break;
                }
                let (part, after) = if from_end {
                    let at = rest.char_indices().rev().find(|(_, c)| is_space(*c)).map_or(0, |(at, c)| at + c.len_utf8());
                    (&rest[at..], &rest[..at])
                } else {
                    rest.split_at(rest.find(is_space).unwrap_or(rest.len()))
                };
                parts.push(part);
                rest = after;
            }
            parts
        }
    };
    if from_end {
        // What is left in front has lost its white space on both sides.
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// The title case of a character: a capital, and small letters where it is several.
pub(super) fn titled(c: char, out: &mut String) {
    match c {
        // Digraphs of two capitals have a form with one.
        '\u{1c4}'..='\u{1c6}' => out.push('\u{1c5}'),
        '\u{1c7}'..='\u{1c9}' => out.push('\u{1c8}'),
        '\u{1ca}'..='\u{1cc}' => out.push('\u{1cb}'),
        '\u{1f1}'..='\u{1f3}' => out.push('\u{1f2}'),
        _ => {
            let mut upper = c.to_uppercase();
            out.extend(upper.next());
            // An accent or apostrophe in front leaves the letter after it a capital.
            let small = out.ends_with(char::is_alphabetic) && out.chars().last().is_some_and(|c| c.is_uppercase());
            upper.for_each(|c| if small { out.extend(c.to_lowercase()) } else { out.push(c) });
        }
    }
}

fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            titled(c, &mut out)
        }
        inside = c.is_alphabetic();
    }
    out
}

pub(super) fn capitalize(text: &str) -> String {
    let (mut out, mut chars) = (String::with_capacity(text.len()), text.chars());
    if let Some(first) = chars.next() {
        titled(first, &mut out);
    }
    // As a whole, since a sigma at the end of a word has a form of its own.
    out + &text[text.len() - chars.as_str().len()..].to_lowercase()
}

/// The zeros of Unicode's decimal digits; nine others follow each.
const ZEROS: [u32; 62] = [
    0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090,
    0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0,
    0xff10, 0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0, 0x112f0, 0x11450, 0x114d0, 0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950,
    0x11c50, 0x11d50, 0x11da0, 0x16a60, 0x16ac0, 0x16b50, 0x1d7ce, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0,
];

/// Digits that are no decimal ones: small, in circles, in brackets, with a full stop.
const DIGITS: [std::ops::RangeInclusive<u32>; 20] = [
    0xb2..=0xb3,
    0xb9..=0xb9,
    0x1369..=0x1371,
    0x19da..=0x19da,
    0x2070..=0x2070,
    0x2074..=0x2079,
    0x2080..=0x2089,
    0x2460..=0x2468,
    0x2474..=0x247c,
    0x2488..=0x2490,
    0x24ea..=0x24ea,
    0x24f5..=0x24fd,
    0x24ff..=0x24ff,
    0x2776..=0x277e,
    0x2780..=0x2788,
    0x278a..=0x2792,
    0x10a40..=0x10a43,
    0x10e60..=0x10e68,
    0x11052..=0x1105a,
    0x1f100..=0x1f10a,
];

fn is_decimal(c: char) -> bool {
    let code = u32::from(c);
    // Those of mathematics come in five styles.
    ZEROS.iter().any(|zero| (*zero..zero + 10).contains(&code)) || (0x1d7ce..=0x1d7ff).contains(&code)
}

/// Lines as `str.splitlines` finds them.
fn lines(text: &str, keep: bool) -> Value {
    let is_end = |c: char| matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let len = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        out.push(Value::from(&rest[..if keep { at + len } else { at }]));
        rest = &rest[at + len..];
    }
    if !rest.is_empty() {
        out.push(Value::from(rest));
    }
    Value::from(out)
}

pub(super) fn justify(text: &str, width: i64, fill: Option<&str>, left: impl Fn(usize) -> usize, budget: &Budget) -> Outcome {
    let fill = match fill {
        None => " ",
        Some(fill) if fill.chars().count() == 1 => fill,
        Some(_) => return fail("The fill character must be exactly one character long"),
    };
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    budget.allows(missing.checked_mul(fill.len()).and_then(|bytes| bytes.checked_add(text.len())))?;
    let before = left(missing);
    budget.text(format!("{}{text}{}", fill.repeat(before), fill.repeat(missing - before)))
}

pub(super) fn strip(text: &str, set: Option<&str>, start: bool, end: bool) -> Value {
    let matches = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if start { text.trim_start_matches(matches) } else { text };
    Value::from(if end { text.trim_end_matches(matches) } else { text })
}

pub(super) fn replace(text: &str, old: &str, new: &str, count: Option<i64>, budget: &Budget) -> Outcome {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = text.matches(old).take(count).count();
    budget.allows(found.checked_mul(new.len()).and_then(|bytes| bytes.checked_add(text.len())))?;
    budget.text(text.replacen(old, new, count))
}

/// The part of a text between two indices of characters, as slices have them.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let count = text.chars().count() as i64;
    let index = |i: i64| (if i < 0 { (i + count).max(0) } else { i.min(count) }) as usize;
    let (start, end) = (index(start.unwrap_or(0)), index(end.unwrap_or(count)));
    let at = |i: usize| text.char_indices().nth(i).map_or(text.len(), |(at, _)| at);
    (start, if start < end { &text[at(start)..at(end)] } else { "" })
}

pub(super) fn joined(separator: &str, values: &Value, budget: &Budget, strict: bool) -> Outcome {
    let mut out = Charged { text: String::new(), budget };
    for (i, value) in values.try_iter()?.checked().enumerate() {
        let value = value?;
        if strict && value.as_str().is_none() {
            return fail(format!("sequence item {i}: expected str instance, {} found", type_name(&value)));
        }
        if i > 0 {
            out.push(separator)?;
        }
        let text = string(&value, budget)?;
        out.text.push_str(&text);
    }
    Ok(Value::from(out.text))
}

/// Methods of strings, lists and dictionaries that change nothing.
pub(super) fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value], budget: &Budget) -> Outcome {
    let Some(text) = value.as_str() else {
        match (value.kind(), name) {
            (ValueKind::Seq, "index") => {
                let (wanted,): (&Value,) = from_args(arguments)?;
                let at = items(value)?.iter().position(|item| item == wanted);
                return at.map_or_else(|| fail("value is not in list"), |at| Ok(Value::from(at)));
            }
            (ValueKind::Seq | ValueKind::Map, "copy") => return Ok(value.clone()),
            _ => {}
        }
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments);
    };
    let all = |test: fn(char) -> bool| Ok(Value::from(!text.is_empty() && text.chars().all(test)));
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<&str>,) = from_args(arguments)?;
            Ok(strip(text, set, name != "rstrip", name != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, most, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(arguments)?;
            let separator = separator.map_or_else(|| kwargs.get::<Option<&str>>("sep"), |separator| Ok(Some(separator)))?;
            let most = most.map_or_else(|| kwargs.get::<Option<i64>>("maxsplit"), |most| Ok(Some(most)))?;
            kwargs.assert_all_used()?;
            split(text, separator, most, name == "rsplit")
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return fail("empty separator");
            }
            let parts = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(arguments)?;
            Ok(lines(text, keep.map_or_else(|| kwargs.get::<Option<bool>>("keepends"), |keep| Ok(Some(keep)))?.unwrap_or(false)))
        }
        "removeprefix" | "removesuffix" => {
            let (affix,): (&str,) = from_args(arguments)?;
            let rest = if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "zfill" => {
            let (width,): (i64,) = from_args(arguments)?;
            let signs = usize::from(text.starts_with(['-', '+']));
            let padded = justify(&text[signs..], width - signs as i64, Some("0"), |missing| missing, budget)?;
            budget.text(format!("{}{padded}", &text[..signs]))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            justify(
                text,
                width,
                fill,
                |missing| match name {
                    "ljust" => 0,
                    "rjust" => missing,
                    // As CPython rounds.
                    _ => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
                },
                budget,
            )
        }
        "replace" => {
            let (old, new, count, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(arguments)?;
            let count = count.map_or_else(|| kwargs.get::<Option<i64>>("count"), |count| Ok(Some(count)))?;
            replace(text, old, new, count, budget)
        }
        "join" => {
            let (values,): (&Value,) = from_args(arguments)?;
            joined(text, values, budget, true)
        }
        "format" => {
            let (values, kwargs): (Rest<Value>, Kwargs) = from_args(arguments)?;
            format_method(text, &values, Some(&kwargs), budget)
        }
        "upper" => budget.text(text.to_uppercase()),
        "lower" | "casefold" => budget.text(text.to_lowercase()),
        "title" => budget.text(title(text)),
        "capitalize" => budget.text(capitalize(text)),
        "swapcase" => {
            let swap = |c: char| if c.is_uppercase() { c.to_lowercase().collect::<String>() } else { c.to_uppercase().collect() };
            budget.text(text.chars().map(swap).collect())
        }
        "expandtabs" => {
            let (size,): (Option<i64>,) = from_args(arguments)?;
            let size = usize::try_from(size.unwrap_or(8)).unwrap_or(0);
            budget.allows(size.checked_mul(text.len()))?;
            let (mut out, mut column) = (String::new(), 0);
            for c in text.chars() {
                let fill = if c == '\t' && size > 0 { size - column % size } else { 0 };
                match c {
                    '\t' => out += &" ".repeat(fill),
                    c => out.push(c),
                }
                column = if matches!(c, '\n' | '\r') { 0 } else { column + if c == '\t' { fill } else { 1 } };
            }
            budget.text(out)
        }
        "startswith" | "endswith" => {
            let (affixes, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (_, text) = part(text, start, end);
            let holds = |affix: &Value| match affix.as_str() {
                Some(affix) if name == "startswith" => Ok(text.starts_with(affix)),
                Some(affix) => Ok(text.ends_with(affix)),
                None => fail(format!("{name} first arg must be str or a tuple of str, not {}", type_name(affix))),
            };
            if !affixes.is_tuple() {
                return holds(affixes).map(Value::from);
            }
            Ok(Value::from(items(affixes)?.iter().map(holds).collect::<Outcome<Vec<bool>>>()?.contains(&true)))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (first, text) = part(text, start, end);
            if name == "count" {
                return Ok(Value::from(text.matches(wanted).count()));
            }
            let at = if name.starts_with('r') { text.rfind(wanted) } else { text.find(wanted) };
            match at {
                Some(at) => Ok(Value::from(first + text[..at].chars().count())),
                None if name.ends_with("index") => fail("substring not found"),
                None => Ok(Value::from(-1)),
            }
        }
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isnumeric" => all(char::is_numeric),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || DIGITS.iter().any(|range| range.contains(&u32::from(c)))),
        "isprintable" => Ok(Value::from(text.chars().all(is_printable))),
        "isascii" => Ok(Value::from(text.is_ascii())),
        "isidentifier" => {
            let first = text.chars().next().is_some_and(|c| c == '_' || c.is_alphabetic());
            Ok(Value::from(first && text.chars().all(|c| c == '_' || c.is_alphanumeric())))
        }
        "isupper" | "islower" => {
            let (upper, lower) = (text.chars().any(char::is_uppercase), text.chars().any(char::is_lowercase));
            Ok(Value::from(if name == "isupper" { upper && !lower } else { lower && !upper }))
        }
        "istitle" => Ok(Value::from(text.chars().any(char::is_alphabetic) && title(text) == text)),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}
