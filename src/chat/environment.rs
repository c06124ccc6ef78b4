//! The environment of a template: Jinja2's filters, tests and functions as transformers has them.
#![forbid(unsafe_code)]

use std::sync::Arc;

use chrono::NaiveDateTime;
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, Value};

use super::date;
use super::filters::{self, bound};
use super::format::percent;
use super::json::tojson;
use super::marks::Marks;
use super::math::{math, slice};
use super::python::{Budget, Outcome, fail, int, items, measured, number, string, type_name};
use super::source::{EACH, JOIN, MATH, SLICE, SPELLED, TEXT, VALUE, is_space};
use super::text::{capitalize, joined, method, replace, strip, titled};

/// Methods whose first argument is looked for in the text.
const LOOKING: [&str; 17] = [
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "replace",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
    "strip",
    "lstrip",
    "rstrip",
];

/// Puts Python's rules into an environment. Everything that makes text takes its bytes off
/// `budget`. What is looked for in a text, or compared, is spelled without `marks`.
pub(super) fn install(env: &mut Environment, budget: &Budget, marks: &Arc<Marks>, now: NaiveDateTime, texts: Vec<String>) {
    let texts: Arc<[Value]> = texts.into_iter().map(Value::from).collect();
    env.add_function(TEXT, move |index: usize| texts.get(index).cloned().unwrap_or_default());
    let b = budget.clone();
    env.add_function(MATH, move |arguments: Rest<Value>| math(&arguments, &b));
    let b = budget.clone();
    env.add_function(JOIN, move |arguments: Rest<Value>| -> Outcome {
        let mut out = String::new();
        for value in arguments.iter() {
            out += &string(value, &b)?;
        }
        Ok(Value::from(out))
    });
    env.add_function(EACH, |values: &Value| -> Outcome {
        if values.is_none() { fail("'NoneType' object is not iterable") } else { Ok(values.clone()) }
    });
    let b = budget.clone();
    env.add_function(SLICE, move |value: &Value, bounds: Rest<Value>| slice(value, &bounds, &b));
    let b = budget.clone();
    env.add_function(VALUE, move |value: &Value| measured(value.clone(), &b));
    let m = marks.clone();
    env.add_function(SPELLED, move |value: &Value| m.spelled(value));
    env.add_function("raise_exception", |message: Value| -> Outcome { fail(message.to_string()) });
    env.add_function("strftime_now", move |format: &str| -> Outcome {
        date::strftime(now, format).map_or_else(fail, |text| Ok(Value::from(text)))
    });
    env.add_function("dict", |pairs: Option<&Value>, kwargs: Kwargs| -> Outcome {
        let mut all: Vec<(Value, Value)> = Vec::new();
        if let Some(pairs) = pairs {
            for key in pairs.try_iter()?.checked() {
                let key = key?;
                all.push(if pairs.kind() == ValueKind::Map {
                    (key.clone(), pairs.get_item(&key)?)
                } else {
                    (key.get_item_by_index(0)?, key.get_item_by_index(1)?)
                });
            }
        }
        for name in kwargs.args() {
            all.push((Value::from(name), kwargs.get(name)?));
        }
        Ok(Value::from_pairs(all))
    });
    let (b, m) = (budget.clone(), marks.clone());
    env.set_unknown_method_callback(move |state, value, name, arguments| {
        let needle = if LOOKING.contains(&name) { m.needle(value, arguments) } else { None };
        method(state, value, name, needle.as_deref().unwrap_or(arguments), &b)
    });
    let b = budget.clone();
    env.set_formatter(move |out, _, value| {
        let text = string(value, &b)?;
        out.write_str(&text).map_err(Error::from)
    });

    let b = budget.clone();
    env.add_filter("tojson", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| tojson(value, &arguments, &kwargs, &b));
    let b = budget.clone();
    env.add_filter("string", move |value: &Value| string(value, &b));
    let b = budget.clone();
    env.add_filter("join", move |values: &Value, separator: Option<&Value>, attribute: Option<&str>, kwargs: Kwargs| -> Outcome {
        let attribute = attribute.map_or_else(|| kwargs.get::<Option<&str>>("attribute"), |name| Ok(Some(name)))?;
        let separator = match separator {
            Some(separator) => string(separator, &b)?,
            None => kwargs.get::<Option<&str>>("d")?.unwrap_or_default().to_owned(),
        };
        kwargs.assert_all_used()?;
        match attribute {
            Some(name) => {
                let values: Vec<Value> = items(values)?.iter().map(|value| value.get_attr(name)).collect::<Outcome<_>>()?;
                joined(&separator, &Value::from(values), &b, false)
            }
            None => joined(&separator, values, &b, false),
        }
    });
    let (b, m) = (budget.clone(), marks.clone());
    env.add_filter("replace", move |value: &Value, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let [Some(old), Some(new), count] = bound(["old", "new", "count"], &arguments, &kwargs)? else {
            return fail("replace: expected what and by what");
        };
        let old = m.needle(value, std::slice::from_ref(&old)).map_or(old, |mut needle| needle.swap_remove(0));
        let count = count.as_ref().and_then(int).and_then(|count| i64::try_from(count).ok());
        replace(&string(value, &b)?, &string(&old, &b)?, &string(&new, &b)?, count, &b)
    });
    let b = budget.clone();
    env.add_filter("trim", move |value: &Value, set: Option<&str>, kwargs: Kwargs| -> Outcome {
        let set = set.map_or_else(|| kwargs.get::<Option<&str>>("chars"), |set| Ok(Some(set)))?;
        Ok(strip(&string(value, &b)?, set, true, true))
    });
    let b = budget.clone();
    env.add_filter(
        "indent",
        move |value: &Value, width: Option<&Value>, first: Option<bool>, blank: Option<bool>, kwargs: Kwargs| -> Outcome {
            let text = string(value, &b)?;
            let named;
            let width = match width {
                Some(width) => Some(width),
                None => {
                    named = kwargs.get::<Option<Value>>("width")?;
                    named.as_ref()
                }
            };
            let first = first.map_or_else(|| kwargs.get::<Option<bool>>("first"), |first| Ok(Some(first)))?.unwrap_or(false);
            let blank = blank.map_or_else(|| kwargs.get::<Option<bool>>("blank"), |blank| Ok(Some(blank)))?.unwrap_or(false);
            kwargs.assert_all_used()?;
            let indent = match width {
                None => "    ".to_owned(),
                Some(width) => match width.as_str() {
                    Some(text) => text.to_owned(),
                    None => {
                        let n = int(width).and_then(|n| usize::try_from(n).ok()).map_or_else(|| fail("indent: expected a width"), Ok)?;
                        b.allows(Some(n))?;
                        " ".repeat(n)
                    }
                },
            };
            let count = text.matches('\n').count() + 1;
            b.allows(indent.len().checked_mul(count).and_then(|bytes| bytes.checked_add(text.len())))?;
            // A line end at the end of the text begins a line.
            let mut out = String::new();
            for (i, line) in text.split('\n').enumerate() {
                if i > 0 {
                    out.push('\n');
                }
                if (i > 0 && (blank || !line.is_empty())) || (i == 0 && first) {
                    out += &indent;
                }
                out += line;
            }
            b.text(out)
        },
    );
    let b = budget.clone();
    env.add_filter("format", move |text: &str, arguments: Rest<Value>, kwargs: Kwargs| -> Outcome {
        let names: Vec<&str> = kwargs.args().collect();
        let whole = if names.is_empty() {
            Value::from(Tuple::from(arguments.to_vec()))
        } else {
            Value::from_pairs(names.iter().map(|name| Ok((*name, kwargs.get::<Value>(name)?))).collect::<Outcome<Vec<_>>>()?)
        };
        b.text(percent(text, &arguments, &whole, &b)?)
    });
    for (name, convert) in [
        ("upper", str::to_uppercase as fn(&str) -> String),
        ("lower", str::to_lowercase),
        ("capitalize", capitalize),
        ("title", filter_title),
    ] {
        let b = budget.clone();
        env.add_filter(name, move |value: &Value| b.text(convert(&string(value, &b)?)));
    }
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| -> Outcome {
            if value.is_undefined() {
                return Ok(Value::from(0));
            }
            value.len().map_or_else(|| fail(format!("object of type '{}' has no len()", type_name(value))), |len| Ok(Value::from(len)))
        });
    }
    let b = budget.clone();
    env.add_filter("list", move |value: &Value| -> Outcome {
        if value.is_undefined() {
            return Ok(Value::from(Vec::<Value>::new()));
        }
        let items = items(value)?;
        b.charge(items.len().saturating_mul(size_of::<Value>()))?;
        Ok(Value::from(items))
    });

    env.add_function("cycler", |values: Rest<Value>| minijinja_contrib::globals::cycler(values.to_vec()));
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    filters::install(env, budget);
    env.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    env.add_test("iterable", |value: &Value| !value.is_none() && (value.is_undefined() || value.try_iter().is_ok()));
    env.add_test("number", |value: &Value| number(value).is_some());
    env.add_test("integer", |value: &Value| value.kind() == ValueKind::Number && value.is_integer());
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// Jinja2's `title`: words begin after white space and some marks.
fn filter_title(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        if is_space(c) || "-({[<".contains(c) {
            out.push(c);
            inside = false;
        } else {
            if inside {
                out.extend(c.to_lowercase())
            } else {
                titled(c, &mut out)
            }
            inside = true;
        }
    }
    out
}
