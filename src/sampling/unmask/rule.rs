//! Interface of unmask rules: what a rule is given, what it returns, its row in the table of rules.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::Result;
use crate::sampling::types::{Rank, UnmaskStep};
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;

/// Which masked positions of the current block a forward unmasks.
///
/// A rule is a pure function: equal arguments give equal results, on every machine, since the
/// tokens of a request depend on the request alone. The engine sorts what [`UnmaskRule::select`]
/// returns, and refuses an empty choice and an index out of range.
///
/// ```
/// use redraft::sampling::{BlockProgress, Candidate, UnmaskRule};
///
/// /// Unmasks the first and the last masked position of a block.
/// #[derive(Debug)]
/// struct BothEnds;
///
/// impl UnmaskRule for BothEnds {
///     fn value(&self) -> String {
///         "both-ends".into()
///     }
///     fn select(&self, _: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
///         vec![0, candidates.len() - 1]
///     }
/// }
///
/// # fn main() -> redraft::Result<()> {
/// let stage = "block=8".parse::<redraft::StageSpec>()?.with_unmask(BothEnds);
/// let options = redraft::Options::default().stages([stage]);
/// # Ok(())
/// # }
/// ```
pub trait UnmaskRule: fmt::Debug + Send + Sync {
    /// The rule as reports print it and stages spell it, after `unmask=`: `linear:12`.
    fn value(&self) -> String;

    /// Stage keys beside `unmask` that belong to the rule, with their values: `order=uniform`.
    fn keys(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Indices into `candidates` to unmask now, at least one, each at most once, in any order.
    /// `candidates` are all masked positions of the block in ascending order, at least one; none
    /// of their numbers is NaN.
    fn select(&self, progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize>;

    /// Ranking of a rule that unmasks a number of positions known before the forward. Joint
    /// sampling needs one.
    fn ranking(&self) -> Option<Ranking> {
        None
    }

    /// Positions to unmask at this step (0: the step needs no forward), or at least; `None` where
    /// the sampled tokens alone say it.
    fn quota(&self, _progress: BlockProgress) -> Option<usize> {
        None
    }

    /// Whether confidence alone orders the positions, so that a position of confidence 0 is last.
    fn by_confidence(&self) -> bool {
        self.ranking().is_some_and(|ranking| ranking.rank() == Rank::Confidence)
    }

    /// The first step at or after `progress.step` that unmasks a position; steps before it run no
    /// forward. `times` are the candidates' [`Candidate::order`] where
    /// [`UnmaskRule::draws_times`] holds.
    fn next_step(&self, progress: BlockProgress, _times: &mut dyn Iterator<Item = f64>) -> usize {
        progress.step
    }

    /// Whether [`Candidate::order`] is one number for the position, whatever the step.
    fn draws_times(&self) -> bool {
        false
    }

    /// The rule of this step as a device applies it (`kernels/`), or `None` where the host does.
    fn on_device(&self, _progress: BlockProgress) -> Option<UnmaskStep> {
        None
    }
}

/// A shared [`UnmaskRule`]. Two are equal if they print the same.
#[derive(Clone, Debug)]
pub struct Unmask(Arc<dyn UnmaskRule>);

impl Unmask {
    /// Shares `rule`.
    pub fn new(rule: impl UnmaskRule + 'static) -> Unmask {
        Unmask(Arc::new(rule))
    }
}

// A rule is a pure function: a panic elsewhere leaves nothing of it half done.
impl std::panic::UnwindSafe for Unmask {}
impl std::panic::RefUnwindSafe for Unmask {}

impl Deref for Unmask {
    type Target = dyn UnmaskRule;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for Unmask {
    fn eq(&self, other: &Unmask) -> bool {
        self.to_string() == other.to_string()
    }
}

/// `linear:12,order=uniform`: as a stage spells it after `unmask=`.
impl fmt::Display for Unmask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.value())?;
        self.keys().iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

/// A rule's row in `UNMASK_RULES`: how a stage spells it, and its line in docs/schedules.md.
#[derive(Clone, Copy, Debug)]
pub struct UnmaskRow {
    /// What `unmask=` names: `threshold`.
    pub name: &'static str,
    /// What follows a colon: `T`.
    pub argument: &'static str,
    /// Stage keys that the rule takes beside `unmask`.
    pub keys: &'static [&'static str],
    /// What it unmasks, and its source.
    pub doc: &'static str,
    /// Makes the rule. Errors say what was expected and found.
    pub parse: fn(&RuleArguments) -> Result<Unmask>,
}

impl UnmaskRow {
    /// `unmask=threshold:T`.
    pub fn usage(&self) -> String {
        format!("unmask={}:{}", self.name, self.argument)
    }
}

/// What a stage says about its unmask rule: the text after the colon, and the keys beside it.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuleArguments<'a> {
    /// Text after the colon.
    pub value: Option<&'a str>,
    /// Key `order`.
    pub order: Option<Rank>,
    /// Key `order_temperature`, where it is above 0.
    pub order_temperature: Option<f32>,
    /// Key `steps`.
    pub steps: Option<NonZeroUsize>,
    /// Key `eps`.
    pub eps: Option<f32>,
}

impl RuleArguments<'_> {
    /// Names of the keys that are given.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("order", self.order.is_some()),
            ("order_temperature", self.order_temperature.is_some()),
            ("steps", self.steps.is_some()),
            ("eps", self.eps.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(key, _)| key)
    }

    /// The ranking of `order` and `order_temperature`; by confidence where `order` is not given.
    pub fn ranking(&self) -> Result<Ranking> {
        Ranking::new(self.order.unwrap_or(Rank::Confidence), self.order_temperature.unwrap_or(0.0))
    }
}
