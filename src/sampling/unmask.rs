//! Unmask rules, one file each: which masked positions a forward unmasks, and the table of rules.
//!
//! Plain numbers in, plain numbers out. Ties go to the lower position; at least one position is
//! unmasked per step; NaN is an error, never a loop (docs/architecture.md, progress).
#![forbid(unsafe_code)]

mod above;
mod ancestral;
mod candidate;
mod cosine;
mod count;
mod entropy_bound;
mod factor;
mod fixed;
mod linear;
mod ranking;
mod rule;
#[cfg(test)]
mod testing;
mod threshold;
mod times;
mod timestep;
pub(crate) mod values;

pub use above::Above;
pub use ancestral::Ancestral;
pub use candidate::{BlockProgress, Candidate};
pub use cosine::Cosine;
pub use count::Count;
pub use entropy_bound::EntropyBound;
pub use factor::Factor;
pub use fixed::Fixed;
pub use linear::Linear;
pub use ranking::Ranking;
pub use rule::{RuleArguments, Unmask, UnmaskRow, UnmaskRule};
pub use threshold::Threshold;
pub use times::Times;
pub use timestep::Timestep;

use crate::error::{Error, Result};
use crate::sampling::types::SampledToken;

/// Every rule that a stage can name. A new rule is a file beside this one, and its row here.
pub static UNMASK_RULES: [UnmaskRow; 14] = {
    let [uniform, confidence, margin, entropy, left] = count::ROWS;
    [
        uniform,
        confidence,
        margin,
        entropy,
        left,
        threshold::ROW,
        above::ROW,
        factor::ROW,
        entropy_bound::ROW,
        linear::ROW,
        fixed::ROW,
        cosine::ROW,
        timestep::ROW,
        ancestral::ROW,
    ]
};

/// The rule that a stage spells: `text` is what follows `unmask=`, `arguments` holds the keys
/// beside it.
///
/// Errors: [`Error::Request`] with what is known, where no rule has that name; with what the rule
/// expects, where its value or a key beside it is wrong.
pub fn parse_unmask(text: &str, arguments: RuleArguments) -> Result<Unmask> {
    let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
    let Some(row) = UNMASK_RULES.iter().find(|row| row.name == name) else {
        let known: Vec<_> = UNMASK_RULES.iter().map(|row| format!("{}:{}", row.name, row.argument)).collect();
        return Err(Error::request(format!("unmask wants one of {}; found `{text}`", known.join(", "))));
    };
    if let Some(key) = arguments.given().find(|key| !row.keys.contains(key)) {
        let takers: Vec<_> = UNMASK_RULES.iter().filter(|row| row.keys.contains(&key)).map(UnmaskRow::usage).collect();
        return Err(Error::request(format!("{key} goes with {}; found unmask={text}", takers.join(", "))));
    }
    (row.parse)(&RuleArguments { value, ..arguments }).map_err(|error| match error {
        Error::Request { what } => Error::request(format!("{}: {what}", row.usage())),
        other => other,
    })
}

/// Indices into `candidates` of the positions to unmask now, ascending; at least one.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence, margin or entropy is NaN;
/// [`Error::Request`] if the rule chose no position, or one that is not there.
pub fn select(rule: &Unmask, progress: BlockProgress, candidates: &[Candidate]) -> Result<Vec<usize>> {
    check_numbers(candidates)?;
    let mut chosen = rule.select(progress, candidates);
    chosen.sort_unstable();
    chosen.dedup();
    match chosen.last() {
        Some(last) if *last < candidates.len() => Ok(chosen),
        Some(last) => Err(Error::request(format!("unmask={rule}: expected an index below {}, the rule returned {last}", candidates.len()))),
        None => {
            Err(Error::request(format!("unmask={rule}: expected at least one of {} positions, the rule returned none", candidates.len())))
        }
    }
}

/// Indices of the best `n` candidates, ascending; at least one.
///
/// Errors: those of [`select`] about NaN.
pub fn select_best(ranking: Ranking, n: usize, candidates: &[Candidate]) -> Result<Vec<usize>> {
    check_numbers(candidates)?;
    let mut chosen = ranking.best(n, candidates);
    chosen.sort_unstable();
    Ok(chosen)
}

fn check_numbers(candidates: &[Candidate]) -> Result<()> {
    for c in candidates {
        let SampledToken { confidence, margin, entropy, .. } = c.sampled;
        if confidence.is_nan() || margin.is_nan() || entropy.is_nan() {
            return Err(Error::kernel(format!("position {}: confidence {confidence}, margin {margin}, entropy {entropy}", c.position)));
        }
    }
    Ok(())
}

/// Token editing (LLaDA2.1): indices, ascending, of unmasked positions whose sampled token differs
/// from the current one and has confidence > `bound`. Each candidate comes with its current token.
///
/// Errors: [`Error::Kernel`] naming the position if a confidence is NaN.
pub fn edits(bound: f32, unmasked: &[(Candidate, u32)]) -> Result<Vec<usize>> {
    if let Some((c, _)) = unmasked.iter().find(|(c, _)| c.sampled.confidence.is_nan()) {
        return Err(Error::kernel(format!("position {}: confidence NaN", c.position)));
    }
    let is_edited = |(c, token): &(Candidate, u32)| c.sampled.token != *token && c.sampled.confidence > bound;
    Ok((0..unmasked.len()).filter(|i| is_edited(&unmasked[*i])).collect())
}

#[cfg(test)]
mod tests {
    use super::testing::{block, candidates, confident};
    use super::*;

    #[test]
    fn another_token_above_the_bound_takes_the_place() {
        let unmasked = |confidence: f32, token: u32, current: u32| {
            let mut candidate = confident(&[confidence])[0];
            candidate.sampled.token = token;
            (candidate, current)
        };
        let all = [unmasked(0.9, 5, 5), unmasked(0.9, 6, 5), unmasked(0.5, 6, 5), unmasked(0.500_001, 6, 5), unmasked(0.1, 6, 5)];
        assert_eq!(edits(0.5, &all).unwrap(), [1, 3], "strictly above, and another token");
        assert_eq!(edits(0.0, &all).unwrap(), [1, 2, 3, 4]);
        assert_eq!(edits(0.0, &[]).unwrap(), Vec::<usize>::new());
        assert!(edits(0.5, &[all[1], unmasked(f32::NAN, 5, 5)]).unwrap_err().to_string().contains("NaN"));
    }

    /// What a stage may write for a rule: its name, a value that is in range, the keys it takes.
    fn spellings(row: &UnmaskRow) -> Vec<String> {
        let value = match row.argument {
            "N" | "STEPS" => "50",
            _ => "0.5",
        };
        let plain = format!("{}:{value}", row.name);
        if row.argument == "N" { vec![plain, row.name.to_owned()] } else { vec![plain] }
    }

    /// For every rule of the table, so a new one is tested too.
    #[test]
    fn nan_is_an_error_and_every_rule_unmasks_something() {
        let bad = candidates(&[(f32::NAN, 0.0, 0.0, 0.0)]);
        let good = candidates(&[(0.0, 0.0, 9.0, 0.5), (0.0, 0.0, 9.0, 0.5)]);
        for row in &UNMASK_RULES {
            for text in spellings(row) {
                let rule = parse_unmask(&text, RuleArguments::default()).unwrap_or_else(|error| panic!("{text}: {error}"));
                assert!(select(&rule, block(1, 1, 0), &bad).is_err(), "{text}");
                for step in 0..60 {
                    let chosen = select(&rule, block(2, 2, step), &good).unwrap();
                    assert!(!chosen.is_empty() && chosen.is_sorted(), "{text} at step {step}: {chosen:?}");
                    assert!(rule.next_step(block(2, 2, step), &mut [0.5, 0.5].into_iter()) >= step, "{text}");
                }
                assert!(row.doc.len() > 10 && rule.value().starts_with(row.name), "{text}: {rule}");
            }
        }
    }

    /// What a rule prints is read back as the same rule, with the keys beside it.
    #[test]
    fn rules_print_back() {
        let some = RuleArguments {
            value: None,
            order: Some("entropy".parse().unwrap()),
            order_temperature: Some(0.5),
            steps: std::num::NonZeroUsize::new(7),
            eps: Some(0.25),
        };
        for row in &UNMASK_RULES {
            for text in spellings(row) {
                for keys in 0..16 {
                    let given = |key: &str, bit: u32| keys >> bit & 1 == 1 && row.keys.contains(&key);
                    let arguments = RuleArguments {
                        value: None,
                        order: some.order.filter(|_| given("order", 0)),
                        order_temperature: some.order_temperature.filter(|_| given("order_temperature", 1)),
                        steps: some.steps.filter(|_| given("steps", 2)),
                        eps: some.eps.filter(|_| given("eps", 3)),
                    };
                    // A ranking without values is not drawn, and a count takes no steps.
                    let Ok(rule) = parse_unmask(&text, arguments) else {
                        assert!(row.argument == "N", "{text} {arguments:?}");
                        continue;
                    };
                    let printed = rule.to_string();
                    let mut parts = printed.split(',');
                    let value = parts.next().unwrap();
                    let mut read = RuleArguments::default();
                    for (key, value) in parts.map(|part| part.split_once('=').unwrap()) {
                        match key {
                            "order" => read.order = Some(value.parse().unwrap()),
                            "order_temperature" => read.order_temperature = Some(value.parse().unwrap()),
                            "steps" => read.steps = Some(value.parse().unwrap()),
                            "eps" => read.eps = Some(value.parse().unwrap()),
                            other => panic!("{printed}: {other}"),
                        }
                    }
                    assert_eq!(parse_unmask(value, read).unwrap(), rule, "{printed}");
                }
            }
        }
    }

    /// A rule of a caller's own that breaks the contract is an error of its request.
    #[test]
    fn choices_out_of_range_are_errors() {
        #[derive(Debug)]
        struct Fixed(Vec<usize>);
        impl UnmaskRule for Fixed {
            fn value(&self) -> String {
                "mine".into()
            }
            fn select(&self, _: BlockProgress, _: &[Candidate]) -> Vec<usize> {
                self.0.clone()
            }
        }
        let of = |chosen: &[usize]| select(&Unmask::new(Fixed(chosen.to_vec())), block(3, 3, 0), &confident(&[0.5; 3]));
        assert_eq!(of(&[2, 0, 2]).unwrap(), [0, 2]);
        assert!(of(&[]).unwrap_err().to_string().contains("returned none"));
        assert!(of(&[3]).unwrap_err().to_string().contains("below 3"));
    }
}
