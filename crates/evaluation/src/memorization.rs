//! Search for copied text: the longest run of tokens that a sample shares with the
//! training text.
//!
//! A suffix array over the ids (Manber and Myers, "Suffix arrays: a new method for on-line string
//! searches", 1993), sorted once and to the depth that samples can ask for, so that repeated
//! documents cost no more than others. A suffix ends with its document.
#![forbid(unsafe_code)]

/// The training text, sorted.
pub struct Training {
    /// Documents, an end-of-text token after each.
    text: Vec<u32>,
    /// Starts of suffixes in the order of their first `depth` ids; suffixes that begin with end of
    /// text are left out.
    suffixes: Vec<u32>,
    depth: usize,
    end_of_text: u32,
}

/// The first three ids in one number: most comparisons end here, without a look at the text. An id
/// is below 2^21.
fn head(suffix: &[u32]) -> u64 {
    // One more than the id, so that a missing one sorts first.
    let id = |i: usize| suffix.get(i).map_or(0, |id| u64::from(*id) + 1);
    id(0) << 42 | id(1) << 21 | id(2)
}

impl Training {
    /// Sorts `text`, documents with an end-of-text token after each, for runs of up to `depth`
    /// tokens. Takes 24 bytes a token while it sorts and 8 after that.
    ///
    /// Panics if the text has 2^32 tokens or an id is not below 2^21 - 1: callers check.
    pub fn new(text: Vec<u32>, depth: usize, end_of_text: u32) -> Training {
        assert!(u32::try_from(text.len()).is_ok() && text.iter().all(|id| *id < (1 << 21) - 1), "a text that can be counted");
        let depth = depth.max(3);
        let mut keyed: Vec<(u64, u32)> = Vec::with_capacity(text.len());
        for start in (0..text.len()).filter(|i| text[*i] != end_of_text) {
            keyed.push((head(suffix(&text, start, 3, end_of_text)), start as u32));
        }
        // The start at last, so that equal suffixes have one order.
        keyed.sort_unstable_by(|a, b| {
            let rest = |start: u32| suffix(&text, start as usize, depth, end_of_text);
            a.0.cmp(&b.0).then_with(|| rest(a.1).cmp(rest(b.1))).then(a.1.cmp(&b.1))
        });
        let suffixes = keyed.iter().map(|(_, start)| *start).collect();
        Training { suffixes, text, depth, end_of_text }
    }

    /// Documents, an end-of-text token after each.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Length in tokens of the longest run of `sample` that stands in a training document,
    /// end-of-text tokens belonging to no run. Runs beyond the depth count as that long.
    pub fn longest_run(&self, sample: &[u32]) -> usize {
        let document = |run: &[u32]| (0..run.len()).map(|i| self.longest_prefix(&run[i..])).max().unwrap_or(0);
        sample.split(|id| *id == self.end_of_text).map(document).max().unwrap_or(0)
    }

    /// The longest prefix of `run` that a suffix begins with: the best match is a neighbour of the
    /// place where `run` would stand.
    fn longest_prefix(&self, run: &[u32]) -> usize {
        let run = &run[..run.len().min(self.depth)];
        let at = |i: usize| suffix(&self.text, self.suffixes[i] as usize, self.depth, self.end_of_text);
        let place = partition_point(self.suffixes.len(), |i| at(i) < run);
        let shared = |i: usize| at(i).iter().zip(run).take_while(|(a, b)| a == b).count();
        let neighbours = [place.checked_sub(1), Some(place).filter(|i| *i < self.suffixes.len())];
        neighbours.into_iter().flatten().map(shared).max().unwrap_or(0)
    }
}

/// Ids from `start`, at most `depth`, to the end of the document.
fn suffix(text: &[u32], start: usize, depth: usize, end_of_text: u32) -> &[u32] {
    let most = &text[start..text.len().min(start + depth)];
    &most[..most.iter().position(|id| *id == end_of_text).unwrap_or(most.len())]
}

/// The first of `0..len` for which `below` does not hold.
fn partition_point(len: usize, below: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low + (high - low) / 2;
        if below(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u32 = 0;

    #[test]
    fn runs_of_a_text_one_can_read() {
        let training = Training::new(vec![1, 2, 3, 4, END, 5, 6, 1, 2, END], 8, END);
        for (sample, longest) in [
            (&[1, 2, 3, 4][..], 4),
            (&[9, 2, 3, 9, 5, 6, 1], 3),
            // No document holds 4 5, nor 2 3 4 across the end of text.
            (&[4, 5], 1),
            (&[2, 3, END, 4], 2),
            (&[END, END], 0),
            (&[9], 0),
            (&[], 0),
        ] {
            assert_eq!(training.longest_run(sample), longest, "{sample:?}");
        }
        assert_eq!(Training::new(Vec::new(), 8, END).longest_run(&[1, 2]), 0);
    }

    #[test]
    fn runs_are_counted_to_the_depth() {
        let text: Vec<u32> = (0..50).map(|i| 1 + i % 3).collect();
        assert_eq!(Training::new(text.clone(), 10, END).longest_run(&text), 10);
        assert_eq!(Training::new(text.clone(), 50, END).longest_run(&text), 50);
    }

    proptest! {
        #[test]
        fn equals_a_search_of_every_place(text in prop::collection::vec(0u32..4, 0..120), sample in prop::collection::vec(0u32..5, 0..40), depth in 3usize..50) {
            let training = Training::new(text.clone(), depth, END);
            let mut longest = 0;
            for i in 0..sample.len() {
                for j in 0..text.len() {
                    let run = sample[i..].iter().zip(&text[j..]).take_while(|(a, b)| a == b && **a != END).count();
                    longest = longest.max(run.min(depth));
                }
            }
            prop_assert_eq!(training.longest_run(&sample), longest);
        }

        #[test]
        fn suffixes_ascend(text in prop::collection::vec(0u32..3, 0..200), depth in 3usize..20) {
            let training = Training::new(text.clone(), depth, END);
            prop_assert_eq!(training.suffixes.len(), text.iter().filter(|id| **id != END).count());
            for pair in training.suffixes.windows(2) {
                let [a, b] = [pair[0], pair[1]].map(|start| suffix(&text, start as usize, depth, END));
                prop_assert!(a < b || (a == b && pair[0] < pair[1]));
            }
        }
    }
}
