//! Interface of remask rules: what a rule is given, what it returns, its row in the table of rules.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::Result;
use crate::sampling::remask::score::Score;
use crate::sampling::types::SampledToken;

/// A generated token of the finished text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GeneratedToken {
    /// Index into the sequence.
    pub position: usize,
    /// The token's id.
    pub token: u32,
    /// Its probability in the forward that unmasked it: the snapshot confidence.
    pub snapshot: f32,
    /// Stage and step that unmasked it.
    pub unmasked_at: (u8, u32),
    /// The token's probability, and the entropy and margin of its row, in a scoring forward; `None`
    /// for rules that ask for none.
    pub scored: Option<SampledToken>,
}

/// Forwards over the finished text before its tokens are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoringForwards {
    /// None.
    None,
    /// One, in which nothing is masked.
    Visible,
    /// One for each of so many interleaved groups of generated positions, which it masks.
    HeldOut(NonZeroUsize),
}

/// How weak the tokens of a finished text are: the weakest are masked again.
///
/// A rule is a pure function, as an [unmask rule](crate::sampling::UnmaskRule) is.
///
/// ```
/// use redraft::sampling::{GeneratedToken, RemaskRule};
///
/// /// Masks the tokens again that the last steps of the draft unmasked.
/// #[derive(Debug)]
/// struct LatestFirst;
///
/// impl RemaskRule for LatestFirst {
///     fn value(&self) -> String {
///         "latest".into()
///     }
///     fn score(&self, token: &GeneratedToken, _uniform: &dyn Fn() -> f64) -> f64 {
///         -f64::from(token.unmasked_at.1)
///     }
/// }
///
/// # fn main() -> redraft::Result<()> {
/// let refine = "block=full,unmask=linear:4".parse::<redraft::StageSpec>()?;
/// let refine = refine.with_remask(0.2, LatestFirst);
/// let options = redraft::Options::default().stages(["block=trained".parse()?, refine]);
/// # Ok(())
/// # }
/// ```
pub trait RemaskRule: fmt::Debug + Send + Sync {
    /// The rule as reports print it and stages spell it, after `by=`: `held-out:4`.
    fn value(&self) -> String;

    /// Stage keys beside `by` that belong to the rule, with their values: `score=lift`.
    fn keys(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// The lowest scores are masked again; ties go to the lower position. `uniform` draws a number
    /// in [0, 1) for this position and stage, the same one however often it is called.
    fn score(&self, token: &GeneratedToken, uniform: &dyn Fn() -> f64) -> f64;

    /// Forwards that the scores need.
    fn forwards(&self) -> ScoringForwards {
        ScoringForwards::None
    }

    /// Whether the score is the snapshot confidence, which a device has at hand.
    fn is_snapshot(&self) -> bool {
        false
    }
}

/// A shared [`RemaskRule`]. Two are equal if they print the same.
#[derive(Clone, Debug)]
pub struct RemaskBy(Arc<dyn RemaskRule>);

impl RemaskBy {
    /// Shares `rule`.
    pub fn new(rule: impl RemaskRule + 'static) -> RemaskBy {
        RemaskBy(Arc::new(rule))
    }
}

// A rule is a pure function: a panic elsewhere leaves nothing of it half done.
impl std::panic::UnwindSafe for RemaskBy {}
impl std::panic::RefUnwindSafe for RemaskBy {}

impl Deref for RemaskBy {
    type Target = dyn RemaskRule;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for RemaskBy {
    fn eq(&self, other: &RemaskBy) -> bool {
        self.to_string() == other.to_string()
    }
}

/// `held-out:4,score=lift`: as a stage spells it after `by=`.
impl fmt::Display for RemaskBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.value())?;
        self.keys().iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

/// A rule's row in `REMASK_RULES`: how a stage spells it, and its line in docs/schedules.md.
#[derive(Clone, Copy, Debug)]
pub struct RemaskRow {
    /// What `by=` names: `held-out`.
    pub name: &'static str,
    /// What follows a colon: `GROUPS`; empty where nothing does.
    pub argument: &'static str,
    /// Whether the key `score` belongs to the rule.
    pub takes_score: bool,
    /// What the lowest scores are, and its source.
    pub doc: &'static str,
    /// Makes the rule of the text after the colon and the key `score`. Errors say what was expected
    /// and found.
    pub parse: fn(&str, Score) -> Result<RemaskBy>,
}

impl RemaskRow {
    /// `by=held-out:GROUPS`.
    pub fn usage(&self) -> String {
        let colon = if self.argument.is_empty() { "" } else { ":" };
        format!("by={}{colon}{}", self.name, self.argument)
    }
}
