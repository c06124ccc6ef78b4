//! `snapshot`: the confidence with which a token was unmasked.
#![forbid(unsafe_code)]

use crate::sampling::remask::rule::{GeneratedToken, RemaskBy, RemaskRow, RemaskRule};

/// Lowest probability in the forward that unmasked the token (DiD, section 3.2). Runs no forward.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot;

/// Row of the table of rules.
pub const ROW: RemaskRow = RemaskRow {
    name: "snapshot",
    argument: "",
    takes_score: false,
    doc: "lowest probability in the forward that unmasked the token (Diffusion in Diffusion); needs no forward",
    parse: |_, _| Ok(RemaskBy::new(Snapshot)),
};

impl RemaskRule for Snapshot {
    fn value(&self) -> String {
        "snapshot".into()
    }

    fn score(&self, token: &GeneratedToken, _uniform: &dyn Fn() -> f64) -> f64 {
        f64::from(token.snapshot)
    }

    fn is_snapshot(&self) -> bool {
        true
    }
}
