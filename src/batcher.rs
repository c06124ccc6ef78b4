//! Owns the choice of who advances: which waiting requests are admitted, and which sessions share this tick's forward.
//!
//! Admission promises pages for a session's whole length, so an admitted session never waits for memory. A tick takes
//! sessions in turn while their rows fit the budget, and at least one, so a full pass larger than the budget still runs.
//! Who shares a forward never changes a result (design section 5, law 1); the turn only keeps waiting fair.
#![forbid(unsafe_code)]

/// Limits of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Query rows per forward, unless a single session needs more.
    pub max_rows: usize,
    /// Sessions in flight.
    pub max_sessions: usize,
}

/// Indices of the sessions that run now. `rows[i]` is what session i needs, `None` if it waits; `turn` is who is asked first.
pub fn choose(rows: &[Option<usize>], turn: usize, budget: &Budget) -> Vec<usize> {
    let mut chosen = Vec::new();
    let mut total = 0;
    for i in (0..rows.len()).map(|i| (i + turn) % rows.len()) {
        let Some(need) = rows[i] else { continue };
        if chosen.is_empty() || total + need <= budget.max_rows {
            total += need;
            chosen.push(i);
        }
    }
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_the_budget_in_turn_and_always_runs_one() {
        let budget = Budget { max_rows: 10, max_sessions: 8 };
        let rows = [Some(4), None, Some(4), Some(4), Some(2)];
        assert_eq!(choose(&rows, 0, &budget), [0, 2, 4]);
        assert_eq!(choose(&rows, 3, &budget), [0, 3, 4]);
        assert_eq!(choose(&[Some(99), Some(99)], 1, &budget), [1]);
        assert_eq!(choose(&[None, None], 0, &budget), Vec::<usize>::new());
        assert_eq!(choose(&[], 0, &budget), Vec::<usize>::new());
    }
}
