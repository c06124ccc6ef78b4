//! Measures that count tokens: unigram entropy, distinct n-grams, self-BLEU, tokens changed.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};

/// Longest n-gram of [`self_bleu`] and of the set's distinct share.
pub const ORDER: usize = 4;

/// An n-gram of up to four tokens; the unused tail holds an id that no vocabulary has.
type Gram = [u32; ORDER];

fn grams(tokens: &[u32], n: usize) -> impl Iterator<Item = Gram> {
    tokens.windows(n).map(|window| {
        let mut gram = [u32::MAX; ORDER];
        gram[..window.len()].copy_from_slice(window);
        gram
    })
}

/// Entropy of a sample's token frequencies, in nats: `-sum over v of c_v / n * ln(c_v / n)`, as the
/// papers on diffusion language models report it beside generative perplexity (Zheng et al., arXiv
/// 2409.02908). Absent for no tokens.
pub fn unigram_entropy(tokens: &[u32]) -> Option<f64> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    let n = tokens.len() as f64;
    // Runs of equal ids in ascending order: the sum has one order, and so one rounding.
    let entropy: f64 = sorted.chunk_by(|a, b| a == b).map(|run| run.len() as f64 / n).map(|p| -p * p.ln()).sum();
    (!tokens.is_empty()).then_some(entropy)
}

/// Different n-grams over n-grams, for n from 1 to 4 (Li et al., "A diversity-promoting objective
/// function for neural conversation models", NAACL 2016). Absent where the text has no n-gram.
pub fn distinct(tokens: &[u32], n: usize) -> Option<f64> {
    let total = (tokens.len() + 1).saturating_sub(n);
    (total > 0).then(|| grams(tokens, n).collect::<HashSet<_>>().len() as f64 / total as f64)
}

/// [`distinct`] over a whole set: n-grams end with their sample. Falls as samples repeat each
/// other, and with the size of the set.
pub fn set_distinct(samples: &[&[u32]], n: usize) -> Option<f64> {
    let total: usize = samples.iter().map(|tokens| (tokens.len() + 1).saturating_sub(n)).sum();
    (total > 0).then(|| samples.iter().flat_map(|tokens| grams(tokens, n)).collect::<HashSet<_>>().len() as f64 / total as f64)
}

/// The two largest counts of an n-gram in any one sample, and who has the largest.
#[derive(Clone, Copy, Default)]
struct TopTwo {
    first: usize,
    owner: usize,
    second: usize,
}

/// Numerator of a precision that found nothing (Chen and Cherry, "A systematic comparison of
/// smoothing techniques for sentence-level BLEU", WMT 2014, method 1).
const NOTHING: f64 = 0.1;

/// Self-BLEU-4: the mean over samples of BLEU-4 with all other samples as references (Zhu et al.,
/// "Texygen", SIGIR 2018; BLEU: Papineni et al., ACL 2002). High where samples repeat each other.
///
/// `BLEU = brevity * exp(mean over n = 1..4 of ln p_n)`, `p_n` = matched n-grams over n-grams, a
/// match clipped by the largest count in any one reference; a `p_n` of zero has 0.1 for its
/// numerator; `brevity = min(1, exp(1 - r / c))`, `r` the length of the reference nearest to the
/// candidate's length c, the shorter of two. Samples of fewer than four tokens are neither
/// candidates nor references. Absent for fewer than two samples that are.
///
/// Linear in the tokens: the largest count over the *others* is the second largest over all for
/// the sample that has the largest.
pub fn self_bleu(samples: &[&[u32]]) -> Option<f64> {
    let samples: Vec<&[u32]> = samples.iter().copied().filter(|tokens| tokens.len() >= ORDER).collect();
    if samples.len() < 2 {
        return None;
    }
    let mut lengths: Vec<usize> = samples.iter().map(|tokens| tokens.len()).collect();
    lengths.sort_unstable();
    let mut log_precisions = vec![0.0f64; samples.len()];
    for n in 1..=ORDER {
        let counted: Vec<HashMap<Gram, usize>> = samples
            .iter()
            .map(|tokens| {
                let mut counts = HashMap::new();
                grams(tokens, n).for_each(|gram| *counts.entry(gram).or_insert(0) += 1);
                counts
            })
            .collect();
        let mut most: HashMap<Gram, TopTwo> = HashMap::new();
        for (owner, counts) in counted.iter().enumerate() {
            for (gram, count) in counts {
                let top = most.entry(*gram).or_default();
                if *count > top.first {
                    *top = TopTwo { first: *count, owner, second: top.first };
                } else {
                    top.second = top.second.max(*count);
                }
            }
        }
        for (i, counts) in counted.iter().enumerate() {
            let clip = |gram: &Gram| if most[gram].owner == i { most[gram].second } else { most[gram].first };
            let matched: usize = counts.iter().map(|(gram, count)| (*count).min(clip(gram))).sum();
            let matched = if matched == 0 { NOTHING } else { matched as f64 };
            log_precisions[i] += (matched / (samples[i].len() + 1 - n) as f64).ln();
        }
    }
    let bleu = |(tokens, log_precision): (&&[u32], &f64)| {
        let c = tokens.len() as f64;
        (1.0 - nearest_other(&lengths, tokens.len()) as f64 / c).min(0.0).exp() * (log_precision / ORDER as f64).exp()
    };
    Some(samples.iter().zip(&log_precisions).map(bleu).sum::<f64>() / samples.len() as f64)
}

/// Of the ascending lengths without one entry equal to `length`, the nearest to it, the shorter of
/// two.
fn nearest_other(sorted: &[usize], length: usize) -> usize {
    let own = sorted.partition_point(|l| *l < length);
    let below = own.checked_sub(1).map(|i| sorted[i]);
    let above = sorted.get(own + 1).copied();
    match (below, above) {
        (Some(below), Some(above)) => {
            if length - below <= above - length {
                below
            } else {
                above
            }
        }
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => length,
    }
}

/// Share of tokens that differ between two texts of one length. Absent for no tokens.
pub fn changed(tokens: &[u32], draft: &[u32]) -> Option<f64> {
    assert_eq!(tokens.len(), draft.len(), "a draft has the length of the text");
    let different = tokens.iter().zip(draft).filter(|(a, b)| a != b).count();
    (!tokens.is_empty()).then(|| different as f64 / tokens.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entropy_of_hand_counted_texts() {
        assert_eq!(unigram_entropy(&[]), None);
        assert_eq!(unigram_entropy(&[5, 5, 5]), Some(0.0));
        // Frequencies 1/2, 1/4, 1/4: ln(2) / 2 + 2 * ln(4) / 4 = 1.5 ln 2.
        assert!((unigram_entropy(&[1, 2, 1, 3]).unwrap() - 1.5 * 2.0f64.ln()).abs() < 1e-15);
    }

    #[test]
    fn distinct_counts_what_is_different() {
        let text = [1, 2, 1, 2, 1];
        assert_eq!([1, 2, 3, 4].map(|n| distinct(&text, n)), [Some(0.4), Some(0.5), Some(2.0 / 3.0), Some(1.0)]);
        assert_eq!(distinct(&[1, 2], 3), None);
        assert_eq!(distinct(&[1, 2, 3], 3), Some(1.0));
        // Over the set: the bigrams 12 23, 12 24, three different of four; none leads from one
        // sample to the next.
        assert_eq!(set_distinct(&[&[1, 2, 3], &[1, 2, 4]], 2), Some(0.75));
        assert_eq!(set_distinct(&[&[1], &[2]], 2), None);
    }

    /// Candidate `1 2 3 4 5`, reference `1 2 3 4 6` and the other way round: 4 of 5 unigrams, 3 of
    /// 4 bigrams, 2 of 3 trigrams, 1 of 2 4-grams match: (4/5 * 3/4 * 2/3 * 1/2)^(1/4) = 0.2^(1/4).
    #[test]
    fn self_bleu_of_a_worked_pair() {
        let bleu = self_bleu(&[&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 6]]).unwrap();
        assert!((bleu - 0.2f64.powf(0.25)).abs() < 1e-12, "{bleu}");
    }

    /// Clipping: `7 7 7 7` has four unigrams, of which `7 7 1 2` has two, and `7 8 9 1` one.
    /// Matched: 2 of 4 unigrams, 1 of 3 bigrams, nothing of 2 trigrams and of 1 4-gram.
    #[test]
    fn matches_are_clipped_by_one_reference() {
        let set: [&[u32]; 3] = [&[7, 7, 7, 7], &[7, 7, 1, 2], &[7, 8, 9, 1]];
        let first = (2.0 / 4.0 * 1.0 / 3.0 * 0.1 / 2.0 * 0.1f64).powf(0.25);
        // 7 7 1 2: both 7s and the 1 match, of the bigrams 7 7, then nothing. 7 8 9 1: the 7 and
        // the 1, then nothing.
        let second = (3.0 / 4.0 * 1.0 / 3.0 * 0.1 / 2.0 * 0.1f64).powf(0.25);
        let third = (2.0 / 4.0 * 0.1 / 3.0 * 0.1 / 2.0 * 0.1f64).powf(0.25);
        let bleu = self_bleu(&set).unwrap();
        assert!((bleu - (first + second + third) / 3.0).abs() < 1e-12, "{bleu}");
    }

    #[test]
    fn self_bleu_of_equal_different_and_too_few_samples() {
        assert_eq!(self_bleu(&[&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5]]), Some(1.0));
        let different = self_bleu(&[&[1, 2, 3, 4, 5], &[6, 7, 8, 9, 10]]).unwrap();
        assert!((different - (0.1f64.powi(4) / 120.0).powf(0.25)).abs() < 1e-12, "{different}");
        assert_eq!(self_bleu(&[&[1, 2, 3, 4, 5]]), None);
        assert_eq!(self_bleu(&[&[1, 2, 3, 4, 5], &[1, 2, 3]]), None);
    }

    #[test]
    fn a_short_candidate_pays_for_its_brevity() {
        // All of the short one matches; its only reference is 6 long: exp(1 - 6/4). The long one:
        // 4/6, 3/5, 2/4, 1/3.
        let bleu = self_bleu(&[&[1, 2, 3, 4], &[1, 2, 3, 4, 5, 6]]).unwrap();
        let long = (4.0 / 6.0 * 3.0 / 5.0 * 2.0 / 4.0 * 1.0 / 3.0f64).powf(0.25);
        assert!((bleu - ((-0.5f64).exp() + long) / 2.0).abs() < 1e-12, "{bleu}");
        assert_eq!(nearest_other(&[4, 6, 8], 6), 4);
        assert_eq!(nearest_other(&[3, 6, 8], 6), 8);
        assert_eq!(nearest_other(&[6, 6, 8], 6), 6);
    }

    #[test]
    fn changed_is_a_share() {
        assert_eq!(changed(&[1, 2, 3, 4], &[1, 9, 3, 9]), Some(0.5));
        assert_eq!(changed(&[], &[]), None);
    }

    /// The definition, in quadratic time.
    fn slow_self_bleu(samples: &[Vec<u32>]) -> f64 {
        let count = |tokens: &[u32], gram: &[u32]| tokens.windows(gram.len()).filter(|w| *w == gram).count();
        let mut sum = 0.0;
        for (i, candidate) in samples.iter().enumerate() {
            let others: Vec<&Vec<u32>> = samples.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, s)| s).collect();
            let mut log = 0.0;
            for n in 1..=4 {
                let different: HashSet<&[u32]> = candidate.windows(n).collect();
                let matched: usize = different
                    .iter()
                    .map(|gram| count(candidate, gram).min(others.iter().map(|other| count(other, gram)).max().unwrap_or(0)))
                    .sum();
                let matched = if matched == 0 { 0.1 } else { matched as f64 };
                log += (matched / (candidate.len() + 1 - n) as f64).ln() / 4.0;
            }
            let c = candidate.len() as i64;
            let r = others.iter().map(|o| o.len() as i64).min_by_key(|r| ((r - c).abs(), *r)).unwrap_or(c);
            sum += (1.0 - r as f64 / c as f64).min(0.0).exp() * log.exp();
        }
        sum / samples.len() as f64
    }

    proptest! {
        #[test]
        fn self_bleu_equals_its_definition(samples in prop::collection::vec(prop::collection::vec(0u32..4, 4..14), 2..7)) {
            let slices: Vec<&[u32]> = samples.iter().map(Vec::as_slice).collect();
            let (fast, slow) = (self_bleu(&slices).unwrap(), slow_self_bleu(&samples));
            prop_assert!((fast - slow).abs() < 1e-9, "{} {}", fast, slow);
        }
    }
}
