//! Python's operators, and its slices.
#![forbid(unsafe_code)]

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::format::percent;
use super::python::{Budget, Outcome, fail, from_int, int, items, measured, number, sequence, type_name};

/// `a op b op c ...`, from left to right.
pub(super) fn math(arguments: &[Value], budget: &Budget) -> Outcome {
    let [first, rest @ ..] = arguments else { return fail("expected operands") };
    let mut value = first.clone();
    for pair in rest.chunks(2) {
        let [op, other] = pair else { return fail("expected an operand") };
        value = binary(&value, op.as_str().unwrap_or_default(), other, budget)?;
    }
    Ok(value)
}

fn binary(a: &Value, op: &str, b: &Value, budget: &Budget) -> Outcome {
    if a.is_undefined() || b.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, format!("an operand of {op} is undefined")));
    }
    let wrong = || fail(format!("unsupported operand types for {op}: '{}' and '{}'", type_name(a), type_name(b)));
    if let Some(text) = a.as_str().filter(|_| op == "%") {
        let arguments = if b.is_tuple() { items(b)? } else { vec![b.clone()] };
        return budget.text(percent(text, &arguments, b, budget)?);
    }
    match op {
        "+" => {
            if let (Some(left), Some(right)) = (a.as_str(), b.as_str()) {
                budget.allows(left.len().checked_add(right.len()))?;
                // What `safe` marked makes the other side HTML.
                return match (a.is_safe(), b.is_safe()) {
                    (false, false) => budget.text([left, right].concat()),
                    (true, true) => budget.text([left, right].concat()).map(|text| Value::from_safe_string(text.to_string())),
                    (safe, _) => {
                        let (left, right) = if safe { (left.to_owned(), html(right)) } else { (html(left), right.to_owned()) };
                        budget.text(left + &right).map(|text| Value::from_safe_string(text.to_string()))
                    }
                };
            }
            if a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq {
                if a.is_tuple() != b.is_tuple() {
                    return wrong();
                }
                let size = a.len().zip(b.len()).and_then(|(a, b)| a.checked_add(b)?.checked_mul(size_of::<Value>()));
                budget.allows(size)?;
                budget.charge(size.unwrap_or(0))?;
                return measured(sequence([items(a)?, items(b)?].concat(), a.is_tuple()), budget);
            }
        }
        "*" => {
            let (many, count) = if int(b).is_some() { (a, int(b)) } else { (b, int(a)) };
            if let Some(count) = count {
                let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
                if let Some(text) = many.as_str() {
                    budget.allows(text.len().checked_mul(count))?;
                    return budget.text(text.repeat(count));
                }
                if many.kind() == ValueKind::Seq {
                    let size = many.len().and_then(|len| len.checked_mul(count)?.checked_mul(size_of::<Value>()));
                    budget.allows(size)?;
                    budget.charge(size.unwrap_or(0))?;
                    let one = items(many)?;
                    let repeated = (0..count).flat_map(|_| one.iter().cloned()).collect();
                    return measured(sequence(repeated, many.is_tuple()), budget);
                }
            }
        }
        _ => {}
    }
    if let (Some(x), Some(y)) = (int(a), int(b)) {
        let exact = match op {
            "+" => x.checked_add(y),
            "-" => x.checked_sub(y),
            "*" => x.checked_mul(y),
            "//" | "%" | "/" if y == 0 => return fail("division by zero"),
            "//" => Some(x.div_euclid(y) - i128::from(y < 0 && x.rem_euclid(y) != 0)),
            "%" => Some(x - y * (x.div_euclid(y) - i128::from(y < 0 && x.rem_euclid(y) != 0))),
            "**" if y >= 0 => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
            _ => return Ok(Value::from(if op == "/" { x as f64 / y as f64 } else { (x as f64).powf(y as f64) })),
        };
        return exact.map_or_else(|| fail("a number is too large"), |n| Ok(from_int(n)));
    }
    let (Some(x), Some(y)) = (number(a), number(b)) else { return wrong() };
    Ok(Value::from(match op {
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        "**" => x.powf(y),
        _ if y == 0.0 => return fail("division by zero"),
        "/" => x / y,
        "//" => (x / y).floor(),
        _ => x - y * (x / y).floor(),
    }))
}

/// Text with what HTML reads as markup spelled out.
fn html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;").replace('\'', "&#39;")
}

/// `value[start:end:step]`.
pub(super) fn slice(value: &Value, bounds: &[Value], budget: &Budget) -> Outcome {
    let bound = |index: usize| match bounds.get(index).filter(|bound| !bound.is_none()) {
        None => Ok(None),
        Some(bound) => int(bound).map_or_else(|| fail("slice indices must be integers or None"), |n| Ok(Some(n))),
    };
    let step = bound(2)?.unwrap_or(1);
    if step == 0 {
        return fail("slice step cannot be zero");
    }
    let pick = |len: usize, start: Option<i128>, end: Option<i128>| -> Vec<usize> {
        let len = len as i128;
        // Where a slice begins and ends when nothing is said, and the places that it may name.
        let (first, last, low, high) = if step > 0 { (0, len, 0, len) } else { (len - 1, -1, -1, len - 1) };
        let place = |bound: Option<i128>, otherwise: i128| match bound {
            None => otherwise,
            Some(n) => (if n < 0 { n.saturating_add(len) } else { n }).clamp(low, high),
        };
        let (mut at, end) = (place(start, first), place(end, last));
        let mut picked = Vec::new();
        while (step > 0 && at < end) || (step < 0 && at > end) {
            picked.extend(usize::try_from(at));
            at = at.saturating_add(step);
        }
        picked
    };
    let (start, end) = (bound(0)?, bound(1)?);
    if let Some(text) = value.as_str() {
        budget.allows(text.len().checked_mul(size_of::<char>()))?;
        let chars: Vec<char> = text.chars().collect();
        return budget.text(pick(chars.len(), start, end).into_iter().map(|i| chars[i]).collect());
    }
    if value.kind() != ValueKind::Seq {
        return fail(format!("'{}' object cannot be sliced", type_name(value)));
    }
    let all = items(value)?;
    let picked: Vec<Value> = pick(all.len(), start, end).into_iter().map(|i| all[i].clone()).collect();
    budget.charge(picked.len().saturating_mul(size_of::<Value>()))?;
    Ok(sequence(picked, value.is_tuple()))
}
