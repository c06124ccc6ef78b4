//! Counting judge: an interpolated n-gram model fitted to token ids.
//!
//! Witten-Bell interpolation (Witten and Bell, "The zero-frequency problem", IEEE Transactions on
//! Information Theory 37, 1991; in the form of Chen and Goodman, "An empirical study of smoothing
//! techniques for language modeling", 1998):
//!
//! ```text
//! p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),   T(h) = different tokens seen after h,   h' = h without its first token
//! p(w)     = (c(w) + T / V) / (N + T)
//! ```
//!
//! A history never seen says nothing: `p(w | h) = p(w | h')`. Nothing is tuned, and the
//! probabilities of the V tokens sum to one. Text before a document's first token, and before an
//! end-of-text token, reads as end of text.
#![forbid(unsafe_code)]

/// Bits of an id in a packed n-gram: three fit into a key.
const ID_BITS: u32 = 21;

/// Vocabularies that can be counted.
pub const MAX_VOCAB: usize = 1 << ID_BITS;

/// Longest n-grams a model may have.
const MAX_ORDER: usize = 3;

/// The n-grams of one order: different keys ascending, and how many n-grams lie before each (one
/// entry more than keys).
struct Grams {
    keys: Vec<u64>,
    before: Vec<u32>,
}

impl Grams {
    fn new(mut all: Vec<u64>) -> Grams {
        all.sort_unstable();
        let (mut keys, mut before) = (Vec::new(), vec![0]);
        let mut seen = 0;
        for run in all.chunk_by(|a, b| a == b) {
            keys.push(run[0]);
            seen += run.len() as u32;
            before.push(seen);
        }
        keys.shrink_to_fit();
        before.shrink_to_fit();
        Grams { keys, before }
    }

    /// c(h), T(h) and c(h w), where h is all of the key but its last id.
    fn counts(&self, key: u64) -> (f64, f64, f64) {
        let history = key >> ID_BITS;
        let start = self.keys.partition_point(|k| k >> ID_BITS < history);
        let end = start + self.keys[start..].partition_point(|k| k >> ID_BITS == history);
        let between = |from: usize, to: usize| f64::from(self.before[to] - self.before[from]);
        let found = self.keys[start..end].binary_search(&key).map_or(0.0, |at| between(start + at, start + at + 1));
        (between(start, end), (end - start) as f64, found)
    }
}

/// An n-gram model.
pub struct Interpolated {
    /// Unigrams first.
    orders: Vec<Grams>,
    vocab_size: usize,
    end_of_text: u32,
}

impl Interpolated {
    /// Counts n-grams up to `order` (2 or 3) in `texts`. A text may hold several documents, an
    /// end-of-text token after each but the last; that token is counted like any other.
    ///
    /// Panics if `order` is not 1 to 3, `vocab_size` is above [`MAX_VOCAB`], or an id is not below
    /// it: callers check.
    pub fn fit<'a>(order: usize, vocab_size: usize, end_of_text: u32, texts: impl Iterator<Item = &'a [u32]> + Clone) -> Interpolated {
        assert!((1..=MAX_ORDER).contains(&order) && vocab_size <= MAX_VOCAB, "order {order}, vocabulary of {vocab_size}");
        let orders = (1..=order)
            .map(|n| {
                // One order after the other: only one unsorted list is held at a time.
                let mut all = Vec::with_capacity(texts.clone().map(<[u32]>::len).sum());
                for text in texts.clone() {
                    assert!(text.iter().all(|id| (*id as usize) < vocab_size), "ids below {vocab_size}");
                    all.extend((0..text.len()).map(|i| key(text, i, n, end_of_text)));
                }
                Grams::new(all)
            })
            .collect();
        Interpolated { orders, vocab_size, end_of_text }
    }

    /// Probability of `text[i]` after what stands before it in `text`.
    pub fn probability(&self, text: &[u32], i: usize) -> f64 {
        let mut p = 1.0 / self.vocab_size as f64;
        for (n, grams) in self.orders.iter().enumerate() {
            let (history, different, found) = grams.counts(key(text, i, n + 1, self.end_of_text));
            if history > 0.0 {
                p = (found + different * p) / (history + different);
            }
        }
        p
    }

    /// Negative log-likelihood in nats of a text that begins a document: sum and number of its
    /// tokens, end-of-text targets left out.
    pub fn loss(&self, text: &[u32]) -> (f64, f64) {
        let targets = (0..text.len()).filter(|i| text[*i] != self.end_of_text);
        targets.fold((0.0, 0.0), |(sum, count), i| (sum - self.probability(text, i).ln(), count + 1.0))
    }
}

/// The n-gram that ends with `text[i]`, oldest id in the highest bits.
fn key(text: &[u32], i: usize, n: usize, end_of_text: u32) -> u64 {
    let mut packed = u64::from(text[i]);
    let mut ended = false;
    for back in 1..n {
        let id = i.checked_sub(back).map_or(end_of_text, |at| text[at]);
        ended |= id == end_of_text;
        packed |= u64::from(if ended { end_of_text } else { id }) << (ID_BITS * back as u32);
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u32 = 0;

    /// `1 2 1 3` then the end, V = 4. Unigrams: N = 5, T = 4 different. p(1) = (2 + 4/4) / 9 = 1/3,
    /// p(2) = p(3) = p(0) = 2/9. After 1 came 2 and 3: c = 2, T = 2. p(2 | 1) = (1 + 2 * 2/9) / 4 =
    /// 13/36. After 2 came 1: p(1 | 2) = (1 + 1/3) / 2 = 2/3.
    #[test]
    fn a_model_small_enough_for_the_hand() {
        let text = [1, 2, 1, 3, END];
        let model = Interpolated::fit(2, 4, END, std::iter::once(&text[..]));
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-15, "{a} {b}");
        close(model.probability(&[1, 2], 1), 13.0 / 36.0);
        close(model.probability(&[2, 1], 1), 2.0 / 3.0);
        // The start of a document is a history too, seen once, followed by 1: (1 + 1/3) / 2.
        close(model.probability(&[1], 0), 2.0 / 3.0);
        close(model.probability(&[3, END, 1], 2), 2.0 / 3.0);
        let (sum, count) = model.loss(&[1, 2, END]);
        close(sum, -(2.0f64 / 3.0).ln() - (13.0f64 / 36.0).ln());
        assert_eq!(count, 2.0, "end of text is no target");
    }

    #[test]
    fn what_stands_before_a_document_is_forgotten() {
        let text = [5, 6, END, 7];
        assert_eq!(key(&text, 3, 3, END), key(&[7], 0, 3, END));
        assert_ne!(key(&text, 1, 3, END), key(&[9, 5, 6], 2, 3, END));
    }

    #[test]
    fn a_longer_memory_knows_its_own_text_better() {
        // After 1 comes 2 or 4, in turn: the two ids before decide which.
        let text: Vec<u32> = (0..300).map(|i| [1, 2, 3, 1, 4][i % 5]).collect();
        let loss = |order| {
            let (sum, count) = Interpolated::fit(order, 8, END, std::iter::once(&text[..])).loss(&text);
            sum / count
        };
        // One id before leaves two choices at two places of five; nothing before, the entropy of
        // 2/5, 1/5, 1/5, 1/5.
        assert!((loss(2) - 0.4 * 2f64.ln()).abs() < 0.05, "{}", loss(2));
        assert!((loss(1) - (0.4 * 2.5f64.ln() + 0.6 * 5f64.ln())).abs() < 0.05, "{}", loss(1));
        assert!(loss(3) < 0.1, "{}", loss(3));
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(text in prop::collection::vec(0u32..6, 0..60), history in prop::collection::vec(0u32..9, 0..3), order in 1usize..4) {
            let model = Interpolated::fit(order, 9, END, std::iter::once(&text[..]));
            let total: f64 = (0..9).map(|w| {
                let mut asked = history.clone();
                asked.push(w);
                model.probability(&asked, history.len())
            }).sum();
            prop_assert!((total - 1.0).abs() < 1e-12, "{}", total);
        }

        #[test]
        fn counts_equal_a_recount(text in prop::collection::vec(0u32..4, 1..60)) {
            let grams = Grams::new((0..text.len()).map(|i| key(&text, i, 2, END)).collect());
            for a in 0..5u32 {
                for b in 0..5u32 {
                    let pairs: Vec<(u32, u32)> = (0..text.len()).map(|i| (if i == 0 { END } else { text[i - 1] }, text[i])).collect();
                    let after: Vec<u32> = pairs.iter().filter(|p| p.0 == a).map(|p| p.1).collect();
                    let different: std::collections::HashSet<_> = after.iter().collect();
                    let found = after.iter().filter(|w| **w == b).count();
                    prop_assert_eq!(grams.counts(u64::from(a) << ID_BITS | u64::from(b)), (after.len() as f64, different.len() as f64, found as f64));
                }
            }
        }
    }
}
