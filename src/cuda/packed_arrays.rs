//! Arrays of a plan, packed for one copy to the device: the offset of each, and how padding is
//! spelled.
#![forbid(unsafe_code)]

use crate::cuda::driver::interface::Address;
use crate::cuda::ops::rope_append;
use crate::plan::Plan;

/// Addresses of the arrays of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PlanPointers {
    pub ids: Address,
    /// Places in the canvas, where `ids` is one.
    pub index: Option<Address>,
    pub positions: Address,
    pub slots: Address,
    pub visible: Address,
    pub page_indptr: Address,
    pub pages: Address,
}

/// PackedArrays on their way to the device.
#[derive(Default)]
pub(super) struct PackedArrays(pub Vec<u32>);

/// Where the arrays of a plan begin among the packed ones, in words of 4 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PlanOffsets {
    pub ids: usize,
    pub positions: usize,
    pub slots: usize,
    pub visible: usize,
    pub page_indptr: usize,
    pub pages: usize,
}

impl PackedArrays {
    /// Appends an array at the next 16 bytes; returns its place.
    pub fn push(&mut self, words: impl IntoIterator<Item = u32>) -> usize {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let place = self.0.len();
        self.0.extend(words);
        place
    }

    /// Appends a plan's arrays, padded to `rows` rows that write nothing and see nothing.
    pub fn plan(&mut self, plan: &Plan, rows: usize) -> PlanOffsets {
        let ids = self.push(plan.ids.iter().copied().chain(std::iter::repeat_n(0, rows - plan.num_rows())));
        let offsets = PlanOffsets { ids, ..self.rows(plan, rows) };
        PlanOffsets { page_indptr: self.push(plan.page_indptr.iter().copied()), pages: self.push(plan.pages.iter().copied()), ..offsets }
    }

    /// Appends what a plan says of its rows, padded as above, without ids and pages.
    pub fn rows(&mut self, plan: &Plan, rows: usize) -> PlanOffsets {
        let padded = |values: &[u32], fill: u32| {
            let padding = std::iter::repeat_n(fill, rows - values.len());
            values.iter().copied().chain(padding).collect::<Vec<u32>>()
        };
        PlanOffsets {
            positions: self.push(padded(&plan.positions, 0)),
            slots: self.push(padded(&plan.slots, rope_append::NO_SLOT)),
            visible: self.push(padded(&plan.visible, 0)),
            ..PlanOffsets::default()
        }
    }
}

impl PlanOffsets {
    /// The same as addresses from `base` on.
    pub fn pointers(&self, base: Address) -> PlanPointers {
        let at = |place: usize| base + 4 * place as u64;
        PlanPointers {
            ids: at(self.ids),
            index: None,
            positions: at(self.positions),
            slots: at(self.slots),
            visible: at(self.visible),
            page_indptr: at(self.page_indptr),
            pages: at(self.pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_a_plan_begin_at_sixteen_bytes_and_padding_writes_nothing() {
        let mut plan = Plan::new();
        plan.push(&[(3, 7), (4, 8), (5, 9)], &[5, 2], 4, crate::plan::Visibility::Full, 6);
        let mut words = PackedArrays::default();
        words.push([1]);
        let offsets = words.plan(&plan, 8);
        let at = |place: usize, count: usize| &words.0[place..place + count];
        assert_eq!(at(offsets.ids, 8), [7, 8, 9, 0, 0, 0, 0, 0]);
        assert_eq!(at(offsets.slots, 8), [23, 8, 9, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX]);
        assert_eq!(at(offsets.visible, 8), [6, 6, 6, 0, 0, 0, 0, 0]);
        assert_eq!((at(offsets.page_indptr, 2), at(offsets.pages, 2)), (&[0, 2][..], &[5, 2][..]));
        for place in [offsets.ids, offsets.positions, offsets.slots, offsets.visible, offsets.page_indptr, offsets.pages] {
            assert_eq!(place % 4, 0);
        }
        assert_eq!(offsets.pointers(0x1000).slots, 0x1000 + 4 * offsets.slots as u64);
    }
}
