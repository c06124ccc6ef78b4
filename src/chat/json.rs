//! `tojson` of transformers: `json.dumps`.
#![forbid(unsafe_code)]

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::{Kwargs, ValueKind};

use super::python::{Budget, Charged, MAX_DEPTH, Outcome, PER_VALUE, fail, float, int, items, string, type_name};

/// How `json.dumps` writes.
struct Dump<'b> {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
    out: Charged<'b>,
}

impl Dump<'_> {
    fn line(&mut self, depth: usize) -> Outcome<()> {
        match &self.indent {
            Some(indent) => {
                self.out.budget.allows(indent.len().checked_mul(depth))?;
                let text = format!("\n{}", indent.repeat(depth));
                self.out.push(&text)
            }
            None => Ok(()),
        }
    }

    fn string(&mut self, text: &str) -> Outcome<()> {
        let mut out = String::with_capacity(text.len() + 2);
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
        self.out.push(&out)
    }

    fn scalar(value: &Value) -> Option<String> {
        match value.kind() {
            ValueKind::None => Some("null".into()),
            ValueKind::Bool => Some(if value.is_true() { "true" } else { "false" }.into()),
            ValueKind::Number if value.is_integer() => Some(value.to_string()),
            ValueKind::Number => f64::try_from(value.clone()).ok().map(|x| match float(x).as_str() {
                "nan" => "NaN".into(),
                "inf" => "Infinity".into(),
                "-inf" => "-Infinity".into(),
                text => text.to_owned(),
            }),
            _ => None,
        }
    }

    fn value(&mut self, value: &Value, depth: usize) -> Outcome<()> {
        if depth > MAX_DEPTH {
            return fail("values inside values without an end");
        }
        self.out.budget.charge(PER_VALUE)?;
        if let Some(text) = value.as_str() {
            return self.string(text);
        }
        if let Some(text) = Dump::scalar(value) {
            return self.out.push(&text);
        }
        match value.kind() {
            ValueKind::Seq => {
                self.out.push("[")?;
                let mut any = false;
                for item in value.try_iter()?.checked() {
                    if any {
                        let item = self.item.clone();
                        self.out.push(&item)?;
                    }
                    any = true;
                    self.line(depth + 1)?;
                    self.value(&item?, depth + 1)?;
                }
                if any {
                    self.line(depth)?;
                }
                self.out.push("]")
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    let name = match key.as_str() {
                        Some(name) => name.to_owned(),
                        None => Dump::scalar(&key).map_or_else(|| fail("keys must be str, int, float, bool or None"), Ok)?,
                    };
                    pairs.push((name, value.get_item(&key)?));
                }
                if self.sort {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.out.push("{")?;
                let any = !pairs.is_empty();
                for (i, (name, value)) in pairs.into_iter().enumerate() {
                    if i > 0 {
                        let item = self.item.clone();
                        self.out.push(&item)?;
                    }
                    self.line(depth + 1)?;
                    self.string(&name)?;
                    let key = self.key.clone();
                    self.out.push(&key)?;
                    self.value(&value, depth + 1)?;
                }
                if any {
                    self.line(depth)?;
                }
                self.out.push("}")
            }
            _ => fail(format!("Object of type {} is not JSON serializable", type_name(value))),
        }
    }
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, arguments: &[Value], kwargs: &Kwargs, budget: &Budget) -> Outcome {
    let argument = |index: usize, name: &str| -> Outcome<Option<Value>> {
        let value = arguments.get(index).cloned().map_or_else(|| kwargs.get::<Option<Value>>(name), |value| Ok(Some(value)));
        Ok(value?.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ascii = is_true(argument(0, "ensure_ascii")?);
    let indent = match argument(1, "indent")? {
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = int(&indent).map_or_else(|| fail("indent: expected a number or a text"), Ok)?;
                let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                budget.allows(Some(width))?;
                " ".repeat(width)
            }
        }),
        None => None,
    };
    let (item, key) = match argument(2, "separators")? {
        Some(pair) => match items(&pair)?.as_slice() {
            [item, key] => (string(item, budget)?, string(key, budget)?),
            _ => return fail("separators: expected two"),
        },
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let sort = is_true(argument(3, "sort_keys")?);
    kwargs.assert_all_used()?;
    let mut dump = Dump { ascii, indent, item, key, sort, out: Charged { text: String::new(), budget } };
    dump.value(value, 0)?;
    Ok(Value::from(dump.out.text))
}
