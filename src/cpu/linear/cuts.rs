//! Rows of several weights, cut into the tasks of one job.
#![forbid(unsafe_code)]

/// Bounds of the tasks' rows, from 0 on: rows `bounds[g]..bounds[g + 1]` of weight g in equal
/// pieces of at most `tallest` rows.
pub(super) fn cut_groups(bounds: &[usize], tallest: usize) -> Vec<usize> {
    let mut row_bounds = vec![0];
    for group in bounds.windows(2).filter(|group| group[0] < group[1]) {
        let (first, height) = (group[0], group[1] - group[0]);
        let cuts = height.div_ceil(tallest);
        row_bounds.extend((1..=cuts).map(|i| first + i * height / cuts));
    }
    row_bounds
}

/// The weight to which a row belongs.
pub(super) fn group_of(bounds: &[usize], row: usize) -> usize {
    bounds.partition_point(|bound| *bound <= row) - 1
}
