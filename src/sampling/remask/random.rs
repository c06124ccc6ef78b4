//! `random`: every token is equally weak.
#![forbid(unsafe_code)]

use crate::sampling::remask::rule::{GeneratedToken, RemaskBy, RemaskRow, RemaskRule};

/// Uniformly random positions.
#[derive(Clone, Copy, Debug)]
pub struct Random;

/// Row of the table of rules.
pub const ROW: RemaskRow = RemaskRow {
    name: "random",
    argument: "",
    takes_score: false,
    doc: "uniformly random tokens; needs no forward",
    parse: |_, _| Ok(RemaskBy::new(Random)),
};

impl RemaskRule for Random {
    fn value(&self) -> String {
        "random".into()
    }

    fn score(&self, _token: &GeneratedToken, uniform: &dyn Fn() -> f64) -> f64 {
        uniform()
    }
}
