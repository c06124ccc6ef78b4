//! Scheduling: which of the running sequences share this tick's forward. (Which requests are
//! admitted is decided in `engine`.)
//!
//! A tick takes sequences in turn while their rows fit the budget, and at least one, so a full pass
//! larger than the budget still runs. The choice never changes a result (docs/architecture.md,
//! determinism); taking turns only keeps waiting fair.
#![forbid(unsafe_code)]

/// Limits of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Query rows per forward, unless a single sequence needs more.
    pub max_rows: usize,
    /// Sequences in flight.
    pub max_sequences: usize,
}

/// What a sequence asks of the next forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    pub rows: usize,
    /// The model it wants; a forward runs one model.
    pub weights: usize,
}

/// The model that runs now, and the indices of the sequences that share its forward. `needs[i]` is
/// what sequence i wants, `None` if it waits; `turn` is who is asked first, and names the model.
pub fn schedule(needs: &[Option<Need>], turn: usize, budget: &Budget) -> (usize, Vec<usize>) {
    let mut chosen = Vec::new();
    let (mut total, mut weights) = (0, 0);
    for i in (0..needs.len()).map(|i| (i + turn) % needs.len()) {
        let Some(need) = needs[i] else { continue };
        if chosen.is_empty() {
            weights = need.weights;
        }
        if chosen.is_empty() || (need.weights == weights && total + need.rows <= budget.max_rows) {
            total += need.rows;
            chosen.push(i);
        }
    }
    chosen.sort_unstable();
    (weights, chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs<const N: usize>(rows: [Option<(usize, usize)>; N]) -> [Option<Need>; N] {
        rows.map(|r| r.map(|(rows, weights)| Need { rows, weights }))
    }

    #[test]
    fn fills_the_budget_in_turn_and_always_runs_one() {
        let budget = Budget { max_rows: 10, max_sequences: 8 };
        let four = needs([Some((4, 0)), None, Some((4, 0)), Some((4, 0)), Some((2, 0))]);
        assert_eq!(schedule(&four, 0, &budget), (0, vec![0, 2, 4]));
        assert_eq!(schedule(&four, 3, &budget), (0, vec![0, 3, 4]));
        assert_eq!(schedule(&needs([Some((99, 0)), Some((99, 0))]), 1, &budget), (0, vec![1]));
        assert_eq!(schedule(&[None, None], 0, &budget), (0, vec![]));
        assert_eq!(schedule(&[], 0, &budget), (0, vec![]));
    }

    #[test]
    fn a_forward_runs_one_model() {
        let budget = Budget { max_rows: 10, max_sequences: 8 };
        let mixed = needs([Some((1, 0)), Some((1, 1)), Some((1, 0)), Some((1, 1))]);
        assert_eq!(schedule(&mixed, 0, &budget), (0, vec![0, 2]));
        assert_eq!(schedule(&mixed, 1, &budget), (1, vec![1, 3]));
    }
}
