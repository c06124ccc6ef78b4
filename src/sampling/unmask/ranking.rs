//! Rankings of masked positions: by a number of the sampled token, by place, or at random.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::sampling::types::{Rank, valid_temperature};
use crate::sampling::unmask::candidate::Candidate;

/// A ranking, and how random it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranking {
    rank: Rank,
    temperature: f32,
}

impl From<Rank> for Ranking {
    fn from(rank: Rank) -> Ranking {
        Ranking { rank, temperature: 0.0 }
    }
}

impl Ranking {
    /// A ranking that at a `temperature` above 0 is a draw: positions one after the other, without
    /// replacement, with weights `exp(value / temperature)` (Dream's `alg_temp`; the value of an
    /// entropy is its negative).
    ///
    /// Errors: [`Error::Request`] where the temperature is negative or not finite, or where
    /// `rank` has no value to draw by.
    pub fn new(rank: Rank, temperature: f32) -> Result<Ranking> {
        if !valid_temperature(temperature) {
            return Err(Error::request(format!("order_temperature: expected a finite number of at least 0, found {temperature}")));
        }
        if temperature > 0.0 && matches!(rank, Rank::Uniform | Rank::Left) {
            return Err(Error::request("order_temperature goes with a ranking by confidence, margin or entropy"));
        }
        Ok(Ranking { rank, temperature })
    }

    /// By what positions are ranked.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// 0 where the ranking is not a draw.
    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// The stage key of a temperature above 0.
    pub(super) fn temperature_key(&self) -> Option<(&'static str, String)> {
        (self.temperature > 0.0).then(|| ("order_temperature", self.temperature.to_string()))
    }

    /// The stage keys of a rule that counts over a block: `order`, and a temperature above 0.
    pub(super) fn order_keys(&self) -> Vec<(&'static str, String)> {
        std::iter::once(("order", self.rank.to_string())).chain(self.temperature_key()).collect()
    }

    /// Indices of `candidates`, best first; ties go to the lower position.
    ///
    /// The n smallest of `E exp(-value / temperature)`, E exponential, are a draw of n without
    /// replacement (Efraimidis and Spirakis 2006; in logarithms, Gumbel-top-k).
    pub fn best_first(&self, candidates: &[Candidate]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        let key = |c: &Candidate| {
            let value = match self.rank {
                Rank::Uniform => return c.order,
                Rank::Left => return 0.0,
                Rank::Confidence => -f64::from(c.sampled.confidence),
                Rank::Margin => -f64::from(c.sampled.margin),
                Rank::Entropy => f64::from(c.sampled.entropy),
            };
            if self.temperature > 0.0 { (-(-c.order).ln_1p()).ln() + value / f64::from(self.temperature) } else { value }
        };
        order.sort_by(|&a, &b| {
            let (a, b) = (&candidates[a], &candidates[b]);
            key(a).total_cmp(&key(b)).then(a.position.cmp(&b.position))
        });
        order
    }

    /// The best `n` of `candidates`, at least one.
    pub fn best(&self, n: usize, candidates: &[Candidate]) -> Vec<usize> {
        let mut order = self.best_first(candidates);
        order.truncate(n.max(1));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{DrawKey, uniforms};
    use crate::sampling::unmask::testing::{candidates, confident};

    #[test]
    fn rankings_and_their_ties() {
        let c = candidates(&[(0.5, 0.1, 2.0, 0.9), (0.9, 0.1, 1.0, 0.2), (0.5, 0.4, 1.0, 0.1), (0.1, 0.0, 3.0, 0.5)]);
        let pick = |rank, n| Ranking::from(rank).best(n, &c);
        assert_eq!(pick(Rank::Uniform, 1), [2]);
        assert_eq!(pick(Rank::Uniform, 2), [2, 1]);
        assert_eq!(pick(Rank::Confidence, 3), [1, 0, 2], "a tie at 0.5 goes to the lower position");
        assert_eq!(pick(Rank::Margin, 2), [2, 0], "a tie at 0.1 goes to the lower position");
        assert_eq!(pick(Rank::Entropy, 1), [1], "a tie at 1.0 goes to the lower position");
        assert_eq!(pick(Rank::Left, 3), [0, 1, 2]);
        assert_eq!(pick(Rank::Left, 99), [0, 1, 2, 3]);
        assert_eq!(pick(Rank::Left, 0), [0], "at least one");
    }

    /// Draws without replacement: pairs of three positions with weights exp(c / 0.5), against
    /// their probabilities.
    #[test]
    fn tempered_rankings_draw_without_replacement() {
        let values = [0.9f32, 0.5, 0.1];
        let ranking = Ranking::new(Rank::Confidence, 0.5).unwrap();
        let (mut seen, draws) = ([0usize; 3], 20_000u32);
        for sample in 0..draws {
            let mut c = confident(&values);
            for (position, c) in c.iter_mut().enumerate() {
                c.order = uniforms(DrawKey { seed: 1, sample, stage: 0, block: 0, step: 0, position: position as u32 }).order;
            }
            let pair = ranking.best(2, &c);
            seen[3 - pair[0] - pair[1]] += 1;
        }
        let weights = values.map(|c| f64::from(c / 0.5).exp());
        let total: f64 = weights.iter().sum();
        for missing in 0..3 {
            let (a, b) = (weights[(missing + 1) % 3], weights[(missing + 2) % 3]);
            let p = a / total * b / (total - a) + b / total * a / (total - b);
            let share = seen[missing] as f64 / f64::from(draws);
            assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt(), "without {missing}: {share}, expected {p}");
        }
        // Temperature 0 is the ranking itself.
        assert_eq!(Ranking::new(Rank::Confidence, 0.0).unwrap().best(2, &confident(&values)), [0, 1]);
        for (rank, temperature) in [(Rank::Left, 0.5), (Rank::Uniform, 0.5), (Rank::Margin, -1.0), (Rank::Margin, f32::NAN)] {
            assert!(Ranking::new(rank, temperature).is_err(), "{rank:?} at {temperature}");
        }
    }
}
