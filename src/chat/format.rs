//! Python's two languages of formats: `format % values`, and `str.format`.
#![forbid(unsafe_code)]

use minijinja::Value;
use minijinja::value::{Kwargs, ValueKind};

use super::python::{Budget, Charged, Outcome, fail, float, int, number, repr, string, type_name};

/// Widths and precisions that a format may ask for.
const MAX_WIDTH: usize = 1 << 16;

/// Flags, width and precision of a format.
#[derive(Default)]
struct Field {
    left: bool,
    sign: bool,
    space: bool,
    zero: bool,
    alternate: bool,
    width: usize,
    precision: Option<usize>,
}

impl Field {
    fn pad(&self, text: String, numeric: bool) -> String {
        let len = text.chars().count();
        let fill = self.width.saturating_sub(len);
        if fill == 0 {
            text
        } else if self.left {
            text + &" ".repeat(fill)
        } else if self.zero && numeric {
            let signs = text.len() - text.trim_start_matches(['-', '+', ' ']).len();
            format!("{}{}{}", &text[..signs], "0".repeat(fill), &text[signs..])
        } else {
            " ".repeat(fill) + &text
        }
    }

    fn signed(&self, negative: bool, digits: &str) -> String {
        let sign = match (negative, self.sign, self.space) {
            (true, ..) => "-",
            (_, true, _) => "+",
            (_, _, true) => " ",
            _ => "",
        };
        self.pad(format!("{sign}{digits}"), true)
    }
}

/// `format % arguments`.
pub(super) fn percent(format: &str, arguments: &[Value], whole: &Value, budget: &Budget) -> Outcome<String> {
    let mut out = String::new();
    let mut next = 0;
    let mut named = false;
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut field = Field::default();
        let mut key = None;
        if chars.next_if_eq(&'(').is_some() {
            let mut name = String::new();
            while let Some(c) = chars.next().filter(|c| *c != ')') {
                name.push(c);
            }
            key = Some(name);
            named = true;
        }
        while let Some(flag) = chars.next_if(|c| "-+ 0#".contains(*c)) {
            match flag {
                '-' => field.left = true,
                '+' => field.sign = true,
                ' ' => field.space = true,
                '0' => field.zero = true,
                _ => field.alternate = true,
            }
        }
        let mut argument = |key: Option<&String>| match key {
            Some(key) => whole.get_item(&Value::from(key.as_str())),
            None => {
                next += 1;
                arguments.get(next - 1).cloned().map_or_else(|| fail("not enough arguments for format string"), Ok)
            }
        };
        let mut digits = |chars: &mut std::iter::Peekable<std::str::Chars>| -> Outcome<Option<usize>> {
            if chars.next_if_eq(&'*').is_some() {
                let n = int(&argument(None)?).and_then(|n| usize::try_from(n).ok());
                return n.map_or_else(|| fail("* wants int"), |n| Ok(Some(n)));
            }
            let mut text = String::new();
            while let Some(c) = chars.next_if(char::is_ascii_digit) {
                text.push(c);
            }
            Ok(if text.is_empty() { None } else { Some(text.parse().unwrap_or(usize::MAX)) })
        };
        field.width = digits(&mut chars)?.unwrap_or(0);
        if chars.next_if_eq(&'.').is_some() {
            field.precision = Some(digits(&mut chars)?.unwrap_or(0));
        }
        if field.width > MAX_WIDTH || field.precision.is_some_and(|precision| precision > MAX_WIDTH) {
            return fail(format!("a format wider than {MAX_WIDTH}"));
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let Some(kind) = chars.next() else { return fail("incomplete format") };
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = argument(key.as_ref())?;
        let real = || number(&value).map_or_else(|| fail(format!("%{kind} format: a number is required, not {}", type_name(&value))), Ok);
        out += &match kind {
            's' | 'r' | 'a' => {
                let text = if kind == 's' {
                    string(&value, budget)?
                } else {
                    let mut out = Charged { text: String::new(), budget };
                    repr(&value, &mut out, 0)?;
                    out.text
                };
                let text = field.precision.map_or(text.clone(), |precision| text.chars().take(precision).collect());
                field.pad(text, false)
            }
            'd' | 'i' | 'u' => {
                let n = int(&value).map_or_else(|| real().map(|x| x.trunc() as i128), Ok)?;
                let digits = n.unsigned_abs().to_string();
                let zeros = field.precision.unwrap_or(0).saturating_sub(digits.len());
                field.signed(n < 0, &("0".repeat(zeros) + &digits))
            }
            'x' | 'X' | 'o' => {
                let Some(n) = int(&value) else { return fail(format!("%{kind} format: an integer is required")) };
                let (digits, mark) = match kind {
                    'x' => (format!("{:x}", n.unsigned_abs()), "0x"),
                    'X' => (format!("{:X}", n.unsigned_abs()), "0X"),
                    _ => (format!("{:o}", n.unsigned_abs()), "0o"),
                };
                field.signed(n < 0, &(if field.alternate { mark.to_owned() } else { String::new() } + &digits))
            }
            'f' | 'F' => {
                let x = real()?;
                field.signed(x.is_sign_negative(), &format!("{:.*}", field.precision.unwrap_or(6), x.abs()))
            }
            'e' | 'E' | 'g' | 'G' => {
                let x = real()?;
                let text = if kind.eq_ignore_ascii_case(&'e') {
                    exponential(x.abs(), field.precision.unwrap_or(6))
                } else {
                    general(x.abs(), field.precision.unwrap_or(6).max(1))
                };
                field.signed(x.is_sign_negative(), &if kind.is_uppercase() { text.to_uppercase() } else { text })
            }
            'c' => {
                let text = match int(&value) {
                    Some(n) => u32::try_from(n).ok().and_then(char::from_u32).map(String::from),
                    None => value.as_str().map(str::to_owned),
                };
                field.pad(text.filter(|text| text.chars().count() == 1).map_or_else(|| fail("%c requires int or char"), Ok)?, false)
            }
            other => return fail(format!("unsupported format character '{other}'")),
        };
        budget.allows(Some(out.len()))?;
    }
    if !named && next < arguments.len() && whole.kind() != ValueKind::Map {
        return fail("not all arguments converted during string formatting");
    }
    Ok(out)
}

fn exponential(x: f64, precision: usize) -> String {
    let text = format!("{x:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn general(x: f64, precision: usize) -> String {
    let scientific = exponential(x, precision - 1);
    let exponent: i32 = scientific.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
    let short = |text: &str| if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text.to_owned() };
    if exponent < -4 || exponent >= precision as i32 {
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "+00"));
        return format!("{}e{exponent}", short(digits));
    }
    short(&format!("{x:.*}", (precision as i32 - 1 - exponent).max(0) as usize))
}

/// `str.format`.
pub(super) fn format_method(text: &str, arguments: &[Value], kwargs: Option<&Kwargs>, budget: &Budget) -> Outcome {
    let mut out = String::new();
    let mut next = 0;
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push_str(brace);
            rest = &rest[1..];
            continue;
        }
        let Some((field, after)) = rest.split_once('}').filter(|_| brace == "{") else {
            return fail("Single '}' encountered in format string");
        };
        rest = after;
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
        let path = field.find(['.', '[']).unwrap_or(field.len());
        let (name, path) = field.split_at(path);
        let mut value = if name.is_empty() || name.bytes().all(|b| b.is_ascii_digit()) {
            let index = if name.is_empty() { next } else { name.parse().unwrap_or(usize::MAX) };
            next += 1;
            arguments.get(index).cloned()
        } else {
            kwargs.map(|kwargs| kwargs.get::<Option<Value>>(name)).transpose()?.flatten()
        };
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let step = step.trim_end_matches(']');
            let key = step.parse::<i64>().map_or_else(|_| Value::from(step), Value::from);
            value = value.map(|value| value.get_item(&key)).transpose()?;
        }
        let Some(value) = value else { return fail("Replacement index or name out of range in format string") };
        out += &formatted(&value, spec, conversion, budget)?;
        budget.allows(Some(out.len()))?;
    }
    out.push_str(rest);
    budget.text(out)
}

/// A value under a format specification: `[[fill]align][sign][0][width][,][.precision][type]`.
fn formatted(value: &Value, spec: &str, conversion: &str, budget: &Budget) -> Outcome<String> {
    let chars: Vec<char> = spec.chars().collect();
    let mut at = 0;
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>^=".contains(*c));
    let (mut fill, mut align) = (' ', None);
    if is_align(chars.get(1)) {
        (fill, align, at) = (chars[0], Some(chars[1]), 2);
    } else if is_align(chars.first()) {
        (align, at) = (Some(chars[0]), 1);
    }
    let mut field = Field::default();
    match chars.get(at) {
        Some('+') => (field.sign, at) = (true, at + 1),
        Some(' ') => (field.space, at) = (true, at + 1),
        Some('-') => at += 1,
        _ => {}
    }
    let prefixed = chars.get(at) == Some(&'#');
    at += usize::from(prefixed);
    if chars.get(at) == Some(&'0') {
        (fill, align, at) = ('0', align.or(Some('=')), at + 1);
    }
    let digits = |at: &mut usize| {
        let begin = *at;
        while chars.get(*at).is_some_and(char::is_ascii_digit) {
            *at += 1;
        }
        let text: String = chars[begin..*at].iter().collect();
        (begin < *at).then(|| text.parse().unwrap_or(usize::MAX))
    };
    let width = digits(&mut at).unwrap_or(0);
    let group = chars.get(at).copied().filter(|c| matches!(c, ',' | '_'));
    let grouped = group.is_some();
    at += usize::from(grouped);
    let mut precision = None;
    if chars.get(at) == Some(&'.') {
        at += 1;
        precision = digits(&mut at);
    }
    let kind = chars.get(at).copied();
    if width > MAX_WIDTH || precision.is_some_and(|precision| precision > MAX_WIDTH) || chars.len() > at + usize::from(kind.is_some()) {
        return fail(format!("Invalid format specifier '{spec}'"));
    }
    let numeric = conversion.is_empty() && number(value).is_some() && (value.kind() != ValueKind::Bool || kind.is_some());
    let text = if conversion == "r" {
        let mut out = Charged { text: String::new(), budget };
        repr(value, &mut out, 0)?;
        out.text
    } else if numeric && (kind.is_some() || precision.is_some() || grouped || field.sign || field.space) {
        let x = number(value).unwrap_or(0.0);
        let n = int(value);
        let (negative, digits) = match (kind, n) {
            (None | Some('d' | 'n'), Some(n)) if precision.is_none() => (n < 0, n.unsigned_abs().to_string()),
            (Some('o'), Some(n)) => (n < 0, format!("{:o}", n.unsigned_abs())),
            (Some('c'), Some(n)) => match u32::try_from(n).ok().and_then(char::from_u32) {
                Some(c) => (false, c.to_string()),
                None => return fail("%c arg not in range(0x110000)"),
            },
            (Some('x'), Some(n)) => (n < 0, format!("{:x}", n.unsigned_abs())),
            (Some('X'), Some(n)) => (n < 0, format!("{:X}", n.unsigned_abs())),
            (Some('b'), Some(n)) => (n < 0, format!("{:b}", n.unsigned_abs())),
            (Some('f' | 'F'), _) => (x.is_sign_negative(), format!("{:.*}", precision.unwrap_or(6), x.abs())),
            (Some('e'), _) => (x.is_sign_negative(), exponential(x.abs(), precision.unwrap_or(6))),
            (Some('%'), _) => (x.is_sign_negative(), format!("{:.*}%", precision.unwrap_or(6), x.abs() * 100.0)),
            (None, None) if precision.is_none() => (x.is_sign_negative(), float(x.abs())),
            (None | Some('g'), _) => (x.is_sign_negative(), general(x.abs(), precision.unwrap_or(6).max(1))),
            (Some(kind), _) => return fail(format!("Unknown format code '{kind}'")),
        };
        let digits = match kind {
            Some(kind @ ('x' | 'X' | 'o' | 'b')) if prefixed => format!("0{kind}{digits}"),
            _ => digits,
        };
        let digits = if grouped {
            let whole = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            let mut out = String::new();
            for (i, c) in digits[..whole].chars().enumerate() {
                if i > 0 && (whole - i) % 3 == 0 {
                    out.extend(group);
                }
                out.push(c);
            }
            out + &digits[whole..]
        } else {
            digits
        };
        field.signed(negative, &digits)
    } else {
        let text = string(value, budget)?;
        match kind {
            None | Some('s') => precision.map_or(text.clone(), |precision| text.chars().take(precision).collect()),
            Some(kind) => return fail(format!("Unknown format code '{kind}' for object of type '{}'", type_name(value))),
        }
    };
    let missing = width.saturating_sub(text.chars().count());
    let filled = |n: usize| fill.to_string().repeat(n);
    Ok(match align.unwrap_or(if numeric { '>' } else { '<' }) {
        '<' => text + &filled(missing),
        '^' => filled(missing / 2) + &text + &filled(missing - missing / 2),
        '=' => {
            let signs = text.len() - text.trim_start_matches(['-', '+', ' ']).len();
            format!("{}{}{}", &text[..signs], filled(missing), &text[signs..])
        }
        _ => filled(missing) + &text,
    })
}
