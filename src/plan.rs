//! Description of one forward: which rows run, where their K/V goes, and which keys each
//! row sees.
//!
//! A plan is data. The scheduler concatenates what every sequence asks for; a backend uploads the
//! arrays once and each layer reads them. Visibility is a *prefix* of the own sequence for every
//! row: block-causal rows see up to the end of their block, rows of a full stage see the whole
//! sequence, so one exclusive end per row covers all of them ([BD3-LM] mask `M_BC`: a query in
//! block b sees blocks <= b).
#![forbid(unsafe_code)]

/// What a masked position holds where the model has no MASK: outside of every vocabulary, so that
/// no prompt names it and nothing samples it. Such a model is autoregressive; its forwards compute
/// given and unmasked positions alone, and [`Plan::push`] asserts it.
pub const NO_MASK: u32 = u32::MAX;

/// Which keys a query sees inside its sequence, in absolute positions from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Query i sees key j iff `j / B <= i / B`. B = 1 is causal.
    BlockCausal(usize),
    /// Every query sees every key of the sequence.
    Full,
}

impl Visibility {
    /// Exclusive end of the keys that the query at `position` sees in a sequence of `len`
    /// positions.
    pub fn end(self, position: usize, len: usize) -> usize {
        match self {
            Visibility::Full => len,
            Visibility::BlockCausal(block_len) => (position / block_len + 1).saturating_mul(block_len).min(len),
        }
    }
}

/// Which row of a forward holds the logits of a position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LogitsRows {
    /// The position's own.
    #[default]
    Own,
    /// Shifted logits: position p is predicted by row p - 1, position 0 by its own (Dream,
    /// Fast-dLLM v2).
    Before,
}

impl LogitsRows {
    /// The position whose row holds the logits of `position`.
    pub fn logits_row_for(self, position: usize) -> usize {
        match self {
            LogitsRows::Own => position,
            LogitsRows::Before => position.saturating_sub(1),
        }
    }

    /// The position whose logits the row at `row` holds: the inverse, but for position 0.
    pub fn position_of(self, row: usize) -> usize {
        match self {
            LogitsRows::Own => row,
            LogitsRows::Before => row + 1,
        }
    }

    /// Whether rows hold the logits of other positions than their own.
    pub fn are_shifted(self) -> bool {
        self == LogitsRows::Before
    }
}

/// Of a model whose logits are shifted, or not.
impl From<bool> for LogitsRows {
    fn from(shifted: bool) -> LogitsRows {
        if shifted { LogitsRows::Before } else { LogitsRows::Own }
    }
}

/// What a row is for. A column of the plan, not a separate code path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Prompt blocks entering the pages.
    Prefill,
    /// A block in which something may be revealed now.
    Denoise,
    /// Finished blocks whose last row predicts the first position of the next one (shifted logits):
    /// final K/V and an unmasked token.
    Boundary,
    /// A finished block whose final K/V is written.
    Commit,
    /// Visible tokens being scored for a later remask.
    Score,
}

/// One forward over T rows of S sequences. Flat arrays, CSR offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// (T) token ids.
    pub ids: Vec<u32>,
    /// (T) absolute positions, for RoPE.
    pub positions: Vec<u32>,
    /// (T) K/V slot of each row: `page * page_size + offset`.
    pub slots: Vec<u32>,
    /// (T) exclusive end of the visible keys, in positions of the row's own sequence.
    pub visible: Vec<u32>,
    /// (S + 1) row offsets of the sequences; first 0, last T.
    pub indptr: Vec<u32>,
    /// (S + 1) offsets into `pages`.
    pub page_indptr: Vec<u32>,
    /// Page tables of the sequences, one after the other: key j of sequence s lies in page
    /// `pages[page_indptr[s] + j / page_size]` at offset `j % page_size`.
    pub pages: Vec<u32>,
}

impl Default for Plan {
    fn default() -> Self {
        Plan::new()
    }
}

impl Plan {
    /// An empty plan, ready for [`Plan::push`].
    pub fn new() -> Self {
        Plan {
            ids: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            visible: Vec::new(),
            indptr: vec![0],
            page_indptr: vec![0],
            pages: Vec::new(),
        }
    }

    /// T.
    pub fn num_rows(&self) -> usize {
        self.ids.len()
    }

    /// S.
    pub fn num_sequences(&self) -> usize {
        self.indptr.len().saturating_sub(1)
    }

    /// The plan of the given rows alone (ascending), over the same pages.
    pub fn select(&self, rows: &[u32]) -> Plan {
        let pick = |values: &[u32]| rows.iter().map(|r| values[*r as usize]).collect();
        Plan {
            ids: pick(&self.ids),
            positions: pick(&self.positions),
            slots: pick(&self.slots),
            visible: pick(&self.visible),
            indptr: self.indptr.iter().map(|end| rows.partition_point(|r| r < end) as u32).collect(),
            page_indptr: self.page_indptr.clone(),
            pages: self.pages.clone(),
        }
    }

    /// Appends one sequence: `rows` as (position, token id), its page table, and which keys are
    /// visible in a sequence of `len` positions.
    pub fn push(&mut self, rows: &[(usize, u32)], pages: &[u32], page_size: usize, visibility: Visibility, len: usize) {
        for &(position, id) in rows {
            assert!(position < len, "row at position {position} of a sequence of {len}");
            assert_ne!(id, NO_MASK, "a row for the masked position {position} of a model without MASK");
            let page = pages[position / page_size] as usize;
            self.ids.push(id);
            self.positions.push(position as u32);
            self.slots.push((page * page_size + position % page_size) as u32);
            self.visible.push(visibility.end(position, len) as u32);
        }
        self.indptr.push(self.ids.len() as u32);
        self.pages.extend_from_slice(pages);
        self.page_indptr.push(self.pages.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Position 0 has no row before it.
    #[test]
    fn a_row_holds_the_logits_of_one_position() {
        assert_eq!([0, 1, 5].map(|p| LogitsRows::Own.logits_row_for(p)), [0, 1, 5]);
        assert_eq!([0, 1, 5].map(|p| LogitsRows::from(true).logits_row_for(p)), [0, 0, 4]);
        for rows in [LogitsRows::Own, LogitsRows::Before] {
            assert!((1..9).all(|p| rows.position_of(rows.logits_row_for(p)) == p));
        }
    }

    #[test]
    fn visibility_ends() {
        let b4 = Visibility::BlockCausal(4);
        assert_eq!([0, 3, 4, 9].map(|i| b4.end(i, 10)), [4, 4, 8, 10]);
        assert_eq!([0, 5].map(|i| Visibility::BlockCausal(1).end(i, 10)), [1, 6]);
        assert_eq!(Visibility::Full.end(0, 10), 10);
        assert_eq!(Visibility::BlockCausal(usize::MAX).end(3, 10), 10);
    }

    #[test]
    fn selected_rows_keep_their_sequence() {
        let mut plan = Plan::new();
        plan.push(&[(0, 1), (1, 2), (2, 3)], &[7], 4, Visibility::Full, 3);
        plan.push(&[(0, 4)], &[8], 4, Visibility::Full, 1);
        plan.push(&[(1, 5), (2, 6)], &[9], 4, Visibility::BlockCausal(2), 4);
        let part = plan.select(&[0, 2, 5]);
        assert_eq!((part.ids, part.positions, part.slots, part.visible), (vec![1, 3, 6], vec![0, 2, 2], vec![28, 30, 38], vec![3, 3, 4]));
        assert_eq!((part.indptr, part.page_indptr, part.pages), (vec![0, 2, 2, 3], vec![0, 1, 2, 3], vec![7, 8, 9]));
        assert_eq!(plan.select(&[0, 1, 2, 3, 4, 5]), plan);
    }

    #[test]
    fn push_maps_positions_to_slots() {
        let mut plan = Plan::new();
        plan.push(&[(3, 7), (4, 8)], &[5, 2], 4, Visibility::BlockCausal(4), 6);
        assert_eq!(plan.slots, [23, 8]);
        assert_eq!(plan.visible, [4, 6]);
        assert_eq!((plan.indptr.as_slice(), plan.page_indptr.as_slice()), (&[0, 2][..], &[0, 2][..]));
    }
}
