//! Scores of a token in a scoring forward: `probability`, `typicality`, `lift`.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::sampling::types::SampledToken;

/// What a scoring forward (post-hoc, held-out) makes of its distribution p at a position; the
/// lowest are masked again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// `p(token)`: mistakes and rare words alike.
    #[default]
    Probability,
    /// `ln p(token) + H(p)`: less probable than a draw from p would be on average (after Meister et
    /// al., "Locally typical sampling", arXiv 2202.00666, equation 6, one-sided). A rare word among
    /// many possible ones is not low.
    Typicality,
    /// `ln p(token) - ln snapshot(token)`: what the forward that unmasked the token believed, and
    /// this one no longer does.
    Lift,
}

impl Score {
    /// Every score with its name in a stage and its line in docs/schedules.md.
    pub const ALL: [(Score, &str, &str); 3] = [
        (Score::Probability, "probability", "`p(token)`"),
        (Score::Typicality, "typicality", "`ln p(token) + H(p)`: improbable where p was sure, not merely rare (Meister et al.)"),
        (Score::Lift, "lift", "`ln p(token) - ln snapshot(token)`: believed when unmasked, not any more"),
    ];

    /// The score of a token whose snapshot confidence is `snapshot`; `scored` is the scoring
    /// forward's row, forced to the token.
    pub fn of(self, scored: &SampledToken, snapshot: f32) -> f64 {
        match self {
            // The probability itself, not its logarithm: what events report.
            Score::Probability => f64::from(scored.confidence),
            Score::Typicality => f64::from(scored.log_prob) + f64::from(scored.entropy),
            Score::Lift => f64::from(scored.log_prob) - f64::from(snapshot).ln(),
        }
    }

    /// The stage key of a score that is not the default.
    pub(super) fn key(self) -> Option<(&'static str, String)> {
        (self != Score::default()).then(|| ("score", self.to_string()))
    }
}

impl FromStr for Score {
    type Err = Error;

    fn from_str(text: &str) -> Result<Score> {
        let found = Score::ALL.iter().find(|(_, name, _)| *name == text);
        found.map(|(score, ..)| *score).ok_or_else(|| Error::request(format!("expected probability, typicality or lift, found `{text}`")))
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name, _) = Score::ALL.iter().find(|(score, ..)| score == self).expect("every score has a name");
        f.write_str(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_by_hand() {
        let scored = SampledToken { token: 1, confidence: 0.25, log_prob: 0.25f32.ln(), margin: 0.0, entropy: 1.5 };
        assert_eq!(Score::Probability.of(&scored, 0.5), 0.25);
        assert!((Score::Typicality.of(&scored, 0.5) - (0.25f64.ln() + 1.5)).abs() < 1e-6);
        assert!((Score::Lift.of(&scored, 0.5) - 0.5f64.ln()).abs() < 1e-6);
        for (score, name, _) in Score::ALL {
            assert_eq!((name.parse::<Score>().unwrap(), score.to_string()), (score, name.to_owned()));
        }
        assert!("best".parse::<Score>().is_err());
    }
}
