//! What templates expect of Python's values: arithmetic and printing; and the bound on the bytes
//! that they may make.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};

pub(super) type Outcome<T = Value> = Result<T, Error>;

pub(super) fn fail<T>(what: impl Into<String>) -> Outcome<T> {
    Err(Error::new(ErrorKind::InvalidOperation, what.into()))
}

/// Bytes that a rendering may still make.
#[derive(Clone)]
pub(super) struct Budget {
    left: Arc<AtomicUsize>,
    all: usize,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Budget {
        Budget { left: Arc::new(AtomicUsize::new(bytes)), all: bytes }
    }

    /// Takes `bytes` off. Errors: fewer are left.
    pub(super) fn charge(&self, bytes: usize) -> Outcome<()> {
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)) {
            Ok(_) => Ok(()),
            Err(_) => fail(format!("it makes more than {} bytes of text", self.all)),
        }
    }

    /// Refuses what takes more than is left, before it is made.
    pub(super) fn allows(&self, bytes: Option<usize>) -> Outcome<()> {
        match bytes {
            Some(bytes) if bytes <= self.left.load(Ordering::Relaxed) => Ok(()),
            _ => fail(format!("it makes more than {} bytes of text", self.all)),
        }
    }

    pub(super) fn text(&self, text: String) -> Outcome {
        self.charge(text.len())?;
        Ok(Value::from(text))
    }
}

/// A text that is charged as it grows.
pub(super) struct Charged<'b> {
    pub text: String,
    pub budget: &'b Budget,
}

impl Charged<'_> {
    pub(super) fn push(&mut self, text: &str) -> Outcome<()> {
        self.budget.charge(text.len())?;
        self.text.push_str(text);
        Ok(())
    }
}

/// `str(value)`.
pub(super) fn string(value: &Value, budget: &Budget) -> Outcome<String> {
    if let Some(text) = value.as_str() {
        budget.charge(text.len())?;
        return Ok(text.to_owned());
    }
    let mut out = Charged { text: String::new(), budget };
    if !value.is_undefined() {
        repr(value, &mut out, 0)?;
    }
    Ok(out.text)
}

/// Values inside values.
pub(super) const MAX_DEPTH: usize = 200;

/// Bytes that a value counts for where it is printed, beside its text.
pub(super) const PER_VALUE: usize = 16;

/// `repr(value)`.
pub(super) fn repr(value: &Value, out: &mut Charged, depth: usize) -> Outcome<()> {
    if depth > MAX_DEPTH {
        return fail("values inside values without an end");
    }
    out.budget.charge(PER_VALUE)?;
    match value.kind() {
        ValueKind::String => out.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Number if !value.is_integer() => out.push(&float(f64::try_from(value.clone())?)),
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { "(" } else { "[" })?;
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                if count > 0 {
                    out.push(", ")?;
                }
                repr(&item?, out, depth + 1)?;
                count += 1;
            }
            out.push(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                _ => "]",
            })
        }
        ValueKind::Map => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                if i > 0 {
                    out.push(", ")?;
                }
                repr(&key, out, depth + 1)?;
                out.push(": ")?;
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push("}")
        }
        ValueKind::Undefined => out.push("Undefined"),
        _ => out.push(&value.to_string()),
    }
}

/// `str.isprintable` of a character: neither white space but the space, nor of control, nor
/// private. Of what is not assigned, only the noncharacters.
pub(super) fn is_printable(c: char) -> bool {
    let code = u32::from(c);
    let hidden = matches!(code, 0xad | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff | 0xe000..=0xf8ff | 0xfff9..=0xfffb | 0xe0000..=0xe007f | 0xf_0000..);
    c == ' ' || !(c.is_control() || c.is_whitespace() || hidden || code & 0xfffe == 0xfffe)
}

/// `repr` of a string: in single quotes, unless only those are in it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        let code = c as u32;
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            ' ' => out.push(' '),
            _ if code < 0x20 || (0x7f..0xa1).contains(&code) || code == 0xad => {
                let _ = write!(out, "\\x{code:02x}");
            }
            c if !is_printable(c) => {
                let _ = if code > 0xffff { write!(out, "\\U{code:08x}") } else { write!(out, "\\u{code:04x}") };
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `repr` of a float: the shortest digits, with an exponent from 1e16 and below 1e-4.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let size = x.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        return format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    let text = x.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// The type's name as Python's errors give it.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Seq if value.is_tuple() => "tuple",
        ValueKind::Seq => "list",
        ValueKind::Map => "dict",
        _ => "object",
    }
}

/// An integer, which a bool is too.
pub(super) fn int(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

pub(super) fn number(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => int(value).map(|n| n as f64),
    }
}

pub(super) fn from_int(n: i128) -> Value {
    i64::try_from(n).map_or_else(|_| Value::from(n), Value::from)
}

pub(super) fn items(value: &Value) -> Outcome<Vec<Value>> {
    value.try_iter()?.checked().collect()
}

pub(super) fn sequence(items: Vec<Value>, tuple: bool) -> Value {
    if tuple { Value::from(Tuple::from(items)) } else { Value::from(items) }
}

/// Values inside a value, each as often as it is in it; a list may hold another one twice.
const MAX_VALUES: usize = 1 << 20;

/// Refuses a value that holds more than [`MAX_VALUES`]: comparing it would take as many steps.
pub(super) fn measured(value: Value, budget: &Budget) -> Outcome {
    fn count(value: &Value, depth: usize, left: &mut usize) -> Outcome<()> {
        if depth > MAX_DEPTH {
            return fail("values inside values without an end");
        }
        *left = left.checked_sub(1).map_or_else(|| fail(format!("it makes a value of more than {MAX_VALUES} others")), Ok)?;
        match value.kind() {
            ValueKind::Seq => value.try_iter()?.checked().try_for_each(|item| count(&item?, depth + 1, left)),
            ValueKind::Map => value.try_iter()?.checked().try_for_each(|key| count(&value.get_item(&key?)?, depth + 1, left)),
            _ => Ok(()),
        }
    }
    let mut left = MAX_VALUES;
    count(&value, 0, &mut left)?;
    budget.charge(MAX_VALUES - left)?;
    Ok(value)
}
