//! The date of `strftime_now`: local time in the format of Python's `strftime`.
#![forbid(unsafe_code)]

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};

/// `datetime.now()`.
pub(super) fn now() -> NaiveDateTime {
    Local::now().naive_local()
}

/// `time.strftime(format)`. Errors: a format that is not Python's.
pub(super) fn strftime(time: NaiveDateTime, format: &str) -> Result<String, String> {
    // Microseconds where chrono has nanoseconds; a time without a zone prints none.
    let micros = format!("{:06}", time.and_utc().timestamp_subsec_micros());
    let mut own = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, c == '%') {
            (_, true) => match chars.next() {
                Some('f') => own += &micros,
                Some('z' | 'Z' | ':') => {}
                Some(other) => own.extend(['%', other]),
                None => own += "%%",
            },
            (c, _) => own.push(c),
        }
    }
    let mut out = String::new();
    write!(out, "{}", time.format(&own)).map_err(|_| format!("strftime_now: `{format}` is no format of a date"))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_pythons() {
        let time = chrono::NaiveDate::from_ymd_opt(2024, 7, 4).and_then(|date| date.and_hms_micro_opt(15, 6, 7, 89)).expect("a date");
        assert_eq!(strftime(time, "%d %b %Y").as_deref(), Ok("04 Jul 2024"));
        assert_eq!(strftime(time, "%Y-%m-%d %H:%M:%S.%f%z").as_deref(), Ok("2024-07-04 15:06:07.000089"));
        assert_eq!(strftime(time, "%A %B %-d %I %p %j 100%%").as_deref(), Ok("Thursday July 4 03 PM 186 100%"));
        assert!(strftime(time, "%Q").is_err());
    }
}
