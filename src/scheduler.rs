//! Scheduling: which of the running sequences share this tick's forward. (Which requests are
//! admitted is decided in `engine`.)
//!
//! A tick takes sequences in order while their rows fit the budget, and at least one, so a full
//! pass larger than the budget still runs. Lower priority values come first; among equals the
//! sequence that got the fewest rows so far. A draft of a few rows is therefore in every forward,
//! and a refining pass of many runs in what is left, or in its turn: neither starves. The choice
//! never changes a result (docs/architecture.md, determinism).
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    pub rows: usize,
    /// The model it wants; a forward runs one model.
    pub weights: usize,
    /// Lower values go first.
    pub priority: i32,
    /// Rows it got so far, counted from those that the sequence served least had when it came.
    pub served: usize,
}

/// The model that runs now, and the indices of the sequences that share its forward, ascending.
/// `needs[i]` is what sequence i wants, `None` if it waits.
pub fn schedule(needs: &[Option<Need>], budget: &Budget) -> (usize, Vec<usize>) {
    let mut order: Vec<(usize, Need)> = needs.iter().enumerate().filter_map(|(i, need)| Some((i, (*need)?))).collect();
    order.sort_by_key(|(i, need)| (need.priority, need.served, *i));
    let Some((_, first)) = order.first().copied() else { return (0, Vec::new()) };
    let mut chosen = Vec::new();
    let mut total = 0;
    for (i, need) in order {
        if chosen.is_empty() || (need.weights == first.weights && total + need.rows <= budget.max_rows) {
            total += need.rows;
            chosen.push(i);
        }
    }
    chosen.sort_unstable();
    (first.weights, chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(rows: usize, weights: usize, served: usize) -> Option<Need> {
        Some(Need { rows, weights, priority: 0, served })
    }

    #[test]
    fn fills_the_budget_by_what_was_served_and_always_runs_one() {
        let budget = Budget { max_rows: 10, max_sequences: 8 };
        let four = [need(4, 0, 0), None, need(4, 0, 0), need(4, 0, 0), need(2, 0, 0)];
        assert_eq!(schedule(&four, &budget), (0, vec![0, 2, 4]));
        let later = [need(4, 0, 4), None, need(4, 0, 4), need(4, 0, 0), need(2, 0, 2)];
        assert_eq!(schedule(&later, &budget), (0, vec![0, 3, 4]));
        assert_eq!(schedule(&[need(99, 0, 99), need(99, 0, 0)], &budget), (0, vec![1]));
        assert_eq!(schedule(&[None, None], &budget), (0, vec![]));
        assert_eq!(schedule(&[], &budget), (0, vec![]));
    }

    #[test]
    fn a_forward_runs_one_model() {
        let budget = Budget { max_rows: 10, max_sequences: 8 };
        let mixed = |served: [usize; 4]| [need(1, 0, served[0]), need(1, 1, served[1]), need(1, 0, served[2]), need(1, 1, served[3])];
        assert_eq!(schedule(&mixed([0, 0, 0, 0]), &budget), (0, vec![0, 2]));
        assert_eq!(schedule(&mixed([1, 0, 1, 0]), &budget), (1, vec![1, 3]));
    }

    #[test]
    fn lower_priorities_go_first() {
        let budget = Budget { max_rows: 4, max_sequences: 8 };
        let mut needs = [need(4, 0, 0), need(4, 0, 100)];
        needs[1].as_mut().unwrap().priority = -1;
        assert_eq!(schedule(&needs, &budget), (0, vec![1]));
    }

    /// Passes of many rows beside drafts of few: each kind gets its share of the rows.
    #[test]
    fn full_passes_and_short_drafts_do_not_starve_each_other() {
        let budget = Budget { max_rows: 64, max_sequences: 8 };
        let rows = [256, 256, 4, 4, 40];
        let mut served = [0; 5];
        let mut ticks = [0u32; 5];
        for _ in 0..1000 {
            let needs: Vec<_> = (0..5).map(|i| need(rows[i], 0, served[i])).collect();
            for i in schedule(&needs, &budget).1 {
                served[i] += rows[i];
                ticks[i] += 1;
            }
        }
        assert!(ticks[2] > 800 && ticks[3] > 800, "{ticks:?}");
        assert!(ticks[0] > 10 && ticks[1] > 10, "{ticks:?}");
        assert!(ticks[0].abs_diff(ticks[1]) <= 1, "{ticks:?}");
    }
}
