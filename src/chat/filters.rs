//! Filters of Jinja2 that minijinja lacks, or reads in another way: the names of their arguments,
//! cutting and wrapping, rounding.
#![forbid(unsafe_code)]

use std::cmp::Ordering;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Environment, Value};

use super::python::{Budget, Outcome, fail, from_int, int, items, number, string};
use super::source::is_space;
use super::text::justify;

/// Arguments in the order of their names, given by place or by name. Errors: more of them.
pub(super) fn bound<const N: usize>(names: [&str; N], arguments: &[Value], kwargs: &Kwargs) -> Outcome<[Option<Value>; N]> {
    if arguments.len() > N {
        return fail(format!("too many arguments: at most {N}, found {}", arguments.len()));
    }
    let mut out = [const { None }; N];
    for (i, name) in names.iter().enumerate() {
        let named = kwargs.get::<Option<Value>>(name)?;
        out[i] = arguments.get(i).cloned().or(named);
    }
    kwargs.assert_all_used()?;
    Ok(out)
}

fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

fn count(value: Option<Value>, default: usize, what: &str) -> Outcome<usize> {
    let Some(value) = value else { return Ok(default) };
    int(&value).and_then(|n| usize::try_from(n).ok()).map_or_else(|| fail(format!("{what}: expected a count")), Ok)
}

/// Puts the filters into an environment.
pub(super) fn install(env: &mut Environment, budget: &Budget) {
    env.add_filter("int", |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [default, base] = bound(["default", "base"], &arguments, &kwargs)?;
        let base = base.as_ref().and_then(int).unwrap_or(10);
        Ok(whole(value, base).map_or_else(|| default.unwrap_or_else(|| Value::from(0)), from_int))
    });
    env.add_filter("float", |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [default] = bound(["default"], &arguments, &kwargs)?;
        let read = value.as_str().map_or_else(|| number(value), |text| text.trim_matches(is_space).replace('_', "").parse().ok());
        Ok(read.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from))
    });
    env.add_filter("round", |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [precision, method] = bound(["precision", "method"], &arguments, &kwargs)?;
        let precision = precision.as_ref().and_then(int).unwrap_or(0).clamp(-400, 400) as i32;
        round(value, precision, method.as_ref().and_then(Value::as_str).unwrap_or("common"))
    });
    env.add_filter("default", default);
    env.add_filter("d", default);
    env.add_filter("attr", |_: &Value, _: &Value| Value::UNDEFINED);
    env.add_filter("dictsort", dictsort);
    let b = budget.clone();
    env.add_filter("center", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [width] = bound(["width"], &arguments, &kwargs)?;
        let width = count(width, 80, "center")?;
        justify(&string(value, &b)?, width.try_into().unwrap_or(i64::MAX), None, |missing| missing / 2 + (missing & width & 1), &b)
    });
    let b = budget.clone();
    env.add_filter("batch", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [size, fill] = bound(["linecount", "fill_with"], &arguments, &kwargs)?;
        let size = count(size, 0, "batch")?.max(1);
        let mut rows: Vec<Vec<Value>> = items(value)?.chunks(size).map(<[Value]>::to_vec).collect();
        if let (Some(fill), Some(last)) = (fill.filter(|fill| !fill.is_none()), rows.last_mut()) {
            b.charge(size.saturating_mul(size_of::<Value>()))?;
            last.resize(size, fill);
        }
        Ok(Value::from(rows))
    });
    let b = budget.clone();
    env.add_filter("slice", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [slices, fill] = bound(["slices", "fill_with"], &arguments, &kwargs)?;
        let (slices, all) = (count(slices, 0, "slice")?, items(value)?);
        b.charge(slices.saturating_mul(size_of::<Value>()))?;
        let Some(each) = all.len().checked_div(slices) else { return fail("slice: expected at least one") };
        let longer = all.len() % slices;
        let fill = fill.filter(|fill| !fill.is_none());
        let mut rest = all.as_slice();
        let rows = (0..slices).map(|i| {
            let (row, after) = rest.split_at(each + usize::from(i < longer));
            rest = after;
            // Those that are one shorter than the first.
            let missing = fill.iter().filter(|_| longer > 0 && i >= longer);
            row.iter().chain(missing).cloned().collect::<Vec<Value>>()
        });
        Ok(Value::from(rows.collect::<Vec<_>>()))
    });
    let b = budget.clone();
    env.add_filter("wordcount", move |value: &Value| -> Outcome {
        let text = string(value, &b)?;
        let words = text.split(|c: char| c != '_' && !c.is_alphanumeric()).filter(|word| !word.is_empty());
        Ok(Value::from(words.count()))
    });
    let b = budget.clone();
    env.add_filter("truncate", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [length, kill, end, leeway] = bound(["length", "killwords", "end", "leeway"], &arguments, &kwargs)?;
        let (length, leeway) = (count(length, 255, "truncate")?, count(leeway, 5, "truncate")?);
        let (text, end) = (string(value, &b)?, end.map_or_else(|| Ok("...".to_owned()), |end| string(&end, &b))?);
        let Some(kept) = length.checked_sub(end.chars().count()) else { return fail("truncate: its end is longer than its length") };
        if text.chars().count() <= length.saturating_add(leeway) {
            return b.text(text);
        }
        let kept: String = text.chars().take(kept).collect();
        let kept = if is_true(kill) { &kept } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(before, _)| before) };
        b.text(format!("{kept}{end}"))
    });
    let b = budget.clone();
    env.add_filter("wordwrap", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
        let [width, breaks, end, hyphens] = bound(names, &arguments, &kwargs)?;
        let width = count(width, 79, "wordwrap")?.max(1);
        let end = end.filter(|end| !end.is_none()).map_or_else(|| Ok("\n".to_owned()), |end| string(&end, &b))?;
        let (breaks, hyphens) = (breaks.is_none_or(|value| value.is_true()), hyphens.is_none_or(|value| value.is_true()));
        let text = string(value, &b)?;
        b.allows(end.len().checked_mul(text.len()))?;
        let lines: Vec<String> = text.lines().flat_map(|line| wrapped(line, width, breaks, hyphens)).collect();
        b.text(lines.join(&end))
    });
    let b = budget.clone();
    env.add_filter("striptags", move |value: &Value| -> Outcome {
        let mut text = string(value, &b)?;
        for (open, close) in [("<!--", "-->"), ("<", ">")] {
            let mut out = String::with_capacity(text.len());
            let mut rest = text.as_str();
            while let Some((before, tag)) = rest.split_once(open) {
                let Some((_, after)) = tag.split_once(close) else { break };
                out.push_str(before);
                rest = after;
            }
            out.push_str(rest);
            text = out;
        }
        let words: Vec<&str> = text.split(is_space).filter(|word| !word.is_empty()).collect();
        let mut text = words.join(" ");
        for (name, c) in [("&lt;", "<"), ("&gt;", ">"), ("&#34;", "\""), ("&#39;", "'"), ("&quot;", "\""), ("&amp;", "&")] {
            text = text.replace(name, c);
        }
        b.text(text)
    });
    let b = budget.clone();
    env.add_filter("forceescape", move |value: &Value| -> Outcome {
        let mut out = String::new();
        for c in string(value, &b)?.chars() {
            match c {
                '&' => out.push_str("&amp;"),
                '<' => out.push_str("&lt;"),
                '>' => out.push_str("&gt;"),
                '\'' => out.push_str("&#39;"),
                '"' => out.push_str("&#34;"),
                c => out.push(c),
            }
        }
        b.text(out)
    });
    let b = budget.clone();
    env.add_filter("urlencode", move |value: &Value| -> Outcome {
        let quoted = |text: &str| -> String {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~/".contains(&byte);
            text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
        };
        if value.kind() != ValueKind::Map {
            return b.text(quoted(&string(value, &b)?));
        }
        let pair = |name: &Value| -> Outcome<String> {
            let both = [string(name, &b)?, string(&value.get_item(name)?, &b)?];
            // As in a query, where a slash is none of a path and a space is a plus.
            Ok(both.map(|text| quoted(&text).replace('/', "%2F").replace("%20", "+")).join("="))
        };
        let pairs: Vec<String> = items(value)?.iter().map(pair).collect::<Outcome<_>>()?;
        b.text(pairs.join("&"))
    });
    env.add_filter("filesizeformat", |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [binary] = bound(["binary"], &arguments, &kwargs)?;
        let bytes = value.as_str().map_or_else(|| number(value), |text| text.trim().parse().ok());
        let Some(bytes) = bytes else { return fail("filesizeformat: expected a number") };
        let (base, infix): (f64, &str) = if is_true(binary) { (1024.0, "i") } else { (1000.0, "") };
        if bytes == 1.0 {
            return Ok(Value::from("1 Byte"));
        }
        if bytes < base {
            return Ok(Value::from(format!("{} Bytes", bytes.trunc())));
        }
        let step = (1..8).find(|i| bytes < base.powi(i + 1)).unwrap_or(8);
        let prefix = if step == 1 && infix.is_empty() { 'k' } else { char::from(b"KMGTPEZY"[step as usize - 1]) };
        Ok(Value::from(format!("{:.1} {prefix}{infix}B", base * bytes / base.powi(step + 1))))
    });
}

/// `int(value, base)`, or that of its float.
fn whole(value: &Value, base: i128) -> Option<i128> {
    let finite = |x: &f64| x.is_finite();
    let Some(text) = value.as_str() else { return int(value).or_else(|| number(value).filter(finite).map(|x| x.trunc() as i128)) };
    let text = text.trim_matches(is_space).replace('_', "").to_ascii_lowercase();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefixed =
        [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(prefix, of)| digits.starts_with(prefix) && [0, *of].contains(&base));
    let (digits, radix) = match prefixed {
        Some((_, radix)) => (&digits[2..], radix),
        None if base == 0 => (digits, 10),
        None => (digits, base.clamp(2, 36)),
    };
    let read = if digits.starts_with(['-', '+']) { None } else { i128::from_str_radix(digits, radix as u32).ok() };
    read.map(|n| sign * n).or_else(|| text.parse().ok().filter(finite).map(|x: f64| x.trunc() as i128))
}

/// `round` of Jinja2, which gives a float for a float and, as Python, an int for an int.
fn round(value: &Value, precision: i32, method: &str) -> Outcome {
    let Some(x) = number(value) else { return fail("round: expected a number") };
    let scale = 10f64.powi(precision);
    match method {
        "common" => match int(value) {
            Some(n) if precision >= 0 => Ok(from_int(n)),
            Some(n) => {
                let unit = 10i128.checked_pow(precision.unsigned_abs()).unwrap_or(i128::MAX);
                let (down, rest) = (n.div_euclid(unit), n.rem_euclid(unit));
                let up = match rest.cmp(&(unit - rest)) {
                    Ordering::Less => 0,
                    Ordering::Equal => down.rem_euclid(2),
                    Ordering::Greater => 1,
                };
                Ok(from_int((down + up).saturating_mul(unit)))
            }
            // Digits of the number itself, ties to even.
            None if precision >= 0 => Ok(Value::from(format!("{x:.*}", precision as usize).parse::<f64>().unwrap_or(x))),
            None => Ok(Value::from((x * scale).round_ties_even() / scale)),
        },
        "ceil" => Ok(Value::from((x * scale).ceil() / scale)),
        "floor" => Ok(Value::from((x * scale).floor() / scale)),
        _ => fail("method must be common, ceil or floor"),
    }
}

fn default(value: &Value, arguments: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let [other, boolean] = bound(["default_value", "boolean"], &arguments, &kwargs)?;
    let missing = value.is_undefined() || is_true(boolean) && !value.is_true();
    Ok(if missing { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

fn dictsort(value: &Value, arguments: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let [exact, by, reverse] = bound(["case_sensitive", "by", "reverse"], &arguments, &kwargs)?;
    let at = match by.as_ref().and_then(Value::as_str).unwrap_or("key") {
        "key" => 0,
        "value" => 1,
        _ => return fail("You can only sort by either \"key\" or \"value\""),
    };
    if value.kind() != ValueKind::Map {
        return fail("dictsort: expected a dict");
    }
    let exact = is_true(exact);
    let key = |value: &Value| match value.as_str() {
        Some(text) if !exact => Value::from(text.to_lowercase()),
        _ => value.clone(),
    };
    let mut pairs: Vec<[Value; 2]> =
        items(value)?.into_iter().map(|name| Ok([name.clone(), value.get_item(&name)?])).collect::<Outcome<_>>()?;
    pairs.sort_by(|a, b| key(&a[at]).cmp(&key(&b[at])));
    if is_true(reverse) {
        pairs.reverse();
    }
    Ok(pairs.into_iter().map(|pair| Value::from(Tuple::from(pair))).collect())
}

/// A line as `textwrap.wrap` breaks it, white space kept between words and dropped at both ends of
/// a line.
fn wrapped(line: &str, width: usize, breaks: bool, hyphens: bool) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    for c in line.chars() {
        let space = is_space(c);
        let apart = chunks
            .last()
            .is_none_or(|last| last.ends_with(is_space) != space || hyphens && last.ends_with('-') && c.is_alphabetic() && last.len() > 1);
        match chunks.last_mut().filter(|_| !apart) {
            Some(last) => last.push(c),
            None => chunks.push(c.into()),
        }
    }
    let len = |text: &str| text.chars().count();
    let (mut lines, mut current) = (Vec::new(), String::new());
    let mut rest: std::collections::VecDeque<String> = chunks.into();
    while let Some(chunk) = rest.pop_front() {
        if current.is_empty() && !lines.is_empty() && chunk.trim_matches(is_space).is_empty() {
            continue;
        }
        let room = width.saturating_sub(len(&current));
        if len(&chunk) <= room {
            current.push_str(&chunk);
        } else if len(&chunk) > width && breaks {
            current.extend(chunk.chars().take(room));
            rest.push_front(chunk.chars().skip(room).collect());
            lines.push(std::mem::take(&mut current));
        } else if current.is_empty() {
            lines.push(chunk);
        } else {
            lines.push(std::mem::take(&mut current));
            rest.push_front(chunk);
        }
    }
    lines.push(current);
    let lines: Vec<String> = lines.into_iter().map(|line| line.trim_end_matches(is_space).to_owned()).collect();
    let kept: Vec<String> = lines.into_iter().filter(|line| !line.is_empty()).collect();
    if kept.is_empty() { vec![String::new()] } else { kept }
}
