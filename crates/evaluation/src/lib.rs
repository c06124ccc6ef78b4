//! Measures of text given as token ids: what a judge's likelihoods, counts and comparisons say
//! about a set of samples, with intervals. Knows no engine: likelihoods and text come in with the
//! samples.
//!
//! | module | contains |
//! |---|---|
//! | [`bootstrap`] | intervals over samples |
//! | [`diversity`] | entropy, distinct n-grams, self-BLEU, tokens changed |
//! | [`ngram_lm`] | the interpolated n-gram model: the second judge, and reverse perplexity |
//! | [`memorization`] | the longest run of tokens that stands in the training text |
//! | [`coherence`] | names kept, quotation marks paired |
//! | [`reference_text`] | documents and windows of human text |
//!
//! All samples of a set have one length n. Losses are in nats. Targets that are end-of-text tokens
//! are left out of every figure of a judge: a model that ends documents elsewhere than its judge
//! would is not a worse writer for it.
#![forbid(unsafe_code)]

pub mod bootstrap;
pub mod coherence;
pub mod diversity;
pub mod memorization;
pub mod ngram_lm;
pub mod reference_text;

use serde::Serialize;

use bootstrap::{Figure, Part, Resamples};
use memorization::Training;
use ngram_lm::Interpolated;

/// Tokens at the head of the second half that [`Measures::context_gain`] leaves out: right after
/// the seam a judge is punished for the broken sentence, which is not what is asked.
pub const SEAM: usize = 8;

/// One sample with what others said about it.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Generated tokens (or those of a human window), n of them, BOS not included.
    pub tokens: Vec<u32>,
    /// The tokens as the draft left them; absent for human text.
    pub draft: Option<Vec<u32>>,
    /// Text between end-of-text tokens; the last piece is cut off by the length.
    pub documents: Vec<String>,
    /// The judge's negative log-likelihood of each token after BOS and all tokens before it (n).
    pub nll: Vec<f64>,
    /// The same of the second half, behind the first half of another sample: see [`grafted`].
    /// Absent in sets of one.
    pub grafted_nll: Option<Vec<f64>>,
}

/// Where the second half of n tokens begins.
pub fn half(n: usize) -> usize {
    n / 2
}

/// Sample i as its judge reads it for [`Measures::context_gain`]: the first half of sample i + 1
/// (the first, after the last), then the second half of sample i.
pub fn grafted(set: &[&[u32]], i: usize) -> Vec<u32> {
    let (own, other) = (set[i], set[(i + 1) % set.len()]);
    let middle = half(own.len());
    other[..middle].iter().chain(&own[middle..]).copied().collect()
}

/// What samples are compared with.
pub struct Reference<'a> {
    pub end_of_text: u32,
    pub vocab_size: usize,
    /// Fitted to the training text.
    pub trigram: Option<&'a Interpolated>,
    pub training: Option<&'a Training>,
    /// Windows of human text that reverse perplexity is measured on.
    pub human: Option<&'a [Vec<u32>]>,
}

/// Figures of a set. Absent where there is nothing to measure or to compare with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measures {
    /// Mean over samples of exp(loss per token) under the judge. A few bad samples weigh heavily.
    pub judge_ppl_mean: Option<Figure>,
    /// exp(loss over all tokens / tokens) under the judge.
    pub judge_ppl_pooled: Option<Figure>,
    /// Mean over samples of the loss per token under the judge.
    pub judge_nll: Option<Figure>,
    /// Pooled perplexity under the trigram model ([`ngram_lm`]).
    pub trigram_ppl: Option<Figure>,
    /// Mean of [`diversity::unigram_entropy`].
    pub entropy: Option<Figure>,
    /// Mean of [`diversity::distinct`], as the next three.
    pub distinct_1: Option<Figure>,
    pub distinct_2: Option<Figure>,
    pub distinct_3: Option<Figure>,
    pub distinct_4: Option<Figure>,
    /// [`diversity::set_distinct`]: depends on the number of samples, as the next two do.
    pub set_distinct_4: Option<Figure>,
    /// [`diversity::self_bleu`].
    pub self_bleu_4: Option<Figure>,
    /// Pooled perplexity, on human text, of an interpolated bigram model fitted to the set: falls
    /// with quality and with coverage (Zhao et al., "Adversarially regularized autoencoders", ICML
    /// 2018).
    pub reverse_ppl: Option<Figure>,
    /// Mean and largest of [`Training::longest_run`].
    pub copied_run: Option<Figure>,
    /// Mean of [`diversity::changed`].
    pub changed: Option<Figure>,
    /// Share of the names that come back ([`coherence::names`]), over all names of the set.
    pub names: Option<Figure>,
    /// Share of paragraphs with paired quotation marks ([`coherence::quotes`]), over all paragraphs
    /// of the set.
    pub quotes: Option<Figure>,
    /// Mean over samples of the loss per token of the second half behind another sample's first
    /// half, minus the same behind its own; without the first [`SEAM`] tokens of the half. What the
    /// text remembers of itself, which no local fluency can buy.
    pub context_gain: Option<Figure>,
}

/// Values of single samples, in their order; absent where a sample has nothing to measure.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PerSample {
    /// Loss per token under the judge, nats.
    pub judge_nll: Vec<Option<f64>>,
    /// Tokens behind it.
    pub judge_tokens: Vec<usize>,
    pub entropy: Vec<Option<f64>>,
    pub distinct_2: Vec<Option<f64>>,
    pub copied_run: Vec<Option<f64>>,
    pub changed: Vec<Option<f64>>,
    pub context_gain: Vec<Option<f64>>,
}

/// Sum and number of the losses at targets that are not end of text.
fn pooled(tokens: &[u32], nll: &[f64], end_of_text: u32) -> Part {
    let counted = tokens.iter().zip(nll).filter(|(id, _)| **id != end_of_text);
    counted.fold((0.0, 0.0), |(sum, count), (_, loss)| (sum + loss, count + 1.0))
}

fn mean((sum, count): Part) -> Option<f64> {
    (count > 0.0).then(|| sum / count)
}

/// Loss per token of the second half behind a stranger's first half, minus behind its own.
fn context_gain(sample: &Sample, end_of_text: u32) -> Option<f64> {
    let from = half(sample.tokens.len()) + SEAM;
    let tokens = sample.tokens.get(from..)?;
    let own = mean(pooled(tokens, &sample.nll[from..], end_of_text))?;
    let strange = mean(pooled(tokens, &sample.grafted_nll.as_ref()?[SEAM..], end_of_text))?;
    Some(strange - own)
}

/// Measures a set. Panics if `resamples` was made for another number of samples, or likelihoods
/// have other lengths than tokens.
pub fn measure(set: &[Sample], reference: &Reference, resamples: &Resamples) -> (Measures, PerSample) {
    let end = reference.end_of_text;
    let tokens: Vec<&[u32]> = set.iter().map(|s| s.tokens.as_slice()).collect();
    let each = |f: &dyn Fn(&Sample) -> Option<f64>| set.iter().map(f).collect::<Vec<_>>();
    let judged: Vec<Part> = set
        .iter()
        .map(|s| {
            assert_eq!(s.tokens.len(), s.nll.len(), "a loss for every token");
            pooled(&s.tokens, &s.nll, end)
        })
        .collect();
    let single = PerSample {
        judge_nll: judged.iter().copied().map(mean).collect(),
        judge_tokens: judged.iter().map(|(_, count)| *count as usize).collect(),
        entropy: each(&|s| diversity::unigram_entropy(&s.tokens)),
        distinct_2: each(&|s| diversity::distinct(&s.tokens, 2)),
        copied_run: each(&|s| Some(reference.training?.longest_run(&s.tokens) as f64)),
        changed: each(&|s| diversity::changed(&s.tokens, s.draft.as_ref()?)),
        context_gain: each(&|s| context_gain(s, end)),
    };
    let perplexities: Vec<Option<f64>> = single.judge_nll.iter().map(|nll| nll.map(f64::exp)).collect();
    let distinct = |n| resamples.mean(&each(&|s| diversity::distinct(&s.tokens, n)));
    let shares = |f: fn(&[String]) -> Part| resamples.figure(&set.iter().map(|s| f(&s.documents)).collect::<Vec<_>>(), |share| share);
    let trigram = |model: &Interpolated| resamples.figure(&tokens.iter().map(|t| model.loss(t)).collect::<Vec<_>>(), f64::exp);
    let measures = Measures {
        judge_ppl_mean: resamples.mean(&perplexities),
        judge_ppl_pooled: resamples.figure(&judged, f64::exp),
        judge_nll: resamples.mean(&single.judge_nll),
        trigram_ppl: reference.trigram.and_then(trigram),
        entropy: resamples.mean(&single.entropy),
        distinct_1: distinct(1),
        distinct_2: resamples.mean(&single.distinct_2),
        distinct_3: distinct(3),
        distinct_4: distinct(4),
        set_distinct_4: diversity::set_distinct(&tokens, diversity::ORDER).and_then(Figure::plain),
        self_bleu_4: diversity::self_bleu(&tokens).and_then(Figure::plain),
        reverse_ppl: reference.human.and_then(|human| reverse_perplexity(&tokens, human, reference)),
        copied_run: resamples
            .mean(&single.copied_run)
            .map(|figure| Figure { max: single.copied_run.iter().copied().flatten().reduce(f64::max), ..figure }),
        changed: resamples.mean(&single.changed),
        names: shares(coherence::names),
        quotes: shares(coherence::quotes),
        context_gain: resamples.mean(&single.context_gain),
    };
    (measures, single)
}

/// Pooled perplexity on `human` of a bigram model fitted to `set`: [`Measures::reverse_ppl`].
pub fn reverse_perplexity(set: &[&[u32]], human: &[Vec<u32>], reference: &Reference) -> Option<Figure> {
    let model = Interpolated::fit(2, reference.vocab_size, reference.end_of_text, set.iter().copied());
    let add = |sum: Part, part: Part| (sum.0 + part.0, sum.1 + part.1);
    let loss = human.iter().map(|window| model.loss(window)).fold((0.0, 0.0), add);
    mean(loss).and_then(|nll| Figure::plain(nll.exp()))
}

/// A row against the first that refined the same drafts: differences sample by sample, this row
/// minus that one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// Loss per token under the judge: negative is better.
    pub judge_nll: Option<Figure>,
    /// Share of the samples whose loss fell.
    pub improved: Option<f64>,
    pub entropy: Option<Figure>,
    pub context_gain: Option<Figure>,
}

/// Compares two measured sets whose samples belong together by index.
pub fn paired(row: &PerSample, base: &PerSample, resamples: &Resamples) -> Paired {
    let minus = |a: &[Option<f64>], b: &[Option<f64>]| -> Vec<Option<f64>> { a.iter().zip(b).map(|(a, b)| Some((*a)? - (*b)?)).collect() };
    let loss = minus(&row.judge_nll, &base.judge_nll);
    let fell: Vec<Part> = loss.iter().map(|d| bootstrap::part(d.map(|d| f64::from(d < 0.0)))).collect();
    Paired {
        improved: mean(fell.into_iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))),
        judge_nll: resamples.mean(&loss),
        entropy: resamples.mean(&minus(&row.entropy, &base.entropy)),
        context_gain: resamples.mean(&minus(&row.context_gain, &base.context_gain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws of a generator with a fixed seed.
    pub(crate) fn resamples(num_samples: usize) -> Resamples {
        Resamples::draw(num_samples, |resample, pair| {
            let mut random = fastrand::Rng::with_seed(u64::from(resample) << 32 | u64::from(pair));
            [random.f64(), random.f64()]
        })
    }

    const END: u32 = 0;
    const NOTHING: Reference = Reference { end_of_text: END, vocab_size: 10, trigram: None, training: None, human: None };

    fn sample(tokens: &[u32], nll: &[f64]) -> Sample {
        Sample { tokens: tokens.to_vec(), nll: nll.to_vec(), ..Sample::default() }
    }

    fn value(figure: Option<Figure>) -> f64 {
        figure.expect("a figure").value
    }

    #[test]
    fn judge_figures_leave_end_of_text_out() {
        let set = [sample(&[1, 2, END], &[1.0, 3.0, 99.0]), sample(&[3, 4, 5], &[0.0, 0.0, 3.0])];
        let (measures, single) = measure(&set, &NOTHING, &resamples(2));
        assert_eq!((single.judge_nll, single.judge_tokens), (vec![Some(2.0), Some(1.0)], vec![2, 3]));
        assert_eq!(value(measures.judge_nll), 1.5);
        assert!((value(measures.judge_ppl_mean) - (2.0f64.exp() + 1.0f64.exp()) / 2.0).abs() < 1e-12);
        assert!((value(measures.judge_ppl_pooled) - (7.0f64 / 5.0).exp()).abs() < 1e-12);
        // One of the two is the largest that a mean of resamples can be.
        assert_eq!(measures.judge_nll.unwrap().high, Some(2.0));
        assert_eq!((measures.trigram_ppl, measures.reverse_ppl, measures.copied_run), (None, None, None));
        assert_eq!((measures.changed, measures.context_gain, measures.distinct_4), (None, None, None));
    }

    #[test]
    fn a_sample_of_nothing_but_ends_says_nothing() {
        let set = [sample(&[END, END], &[1.0, 1.0]), sample(&[3, 4], &[2.0, 4.0])];
        let (measures, single) = measure(&set, &NOTHING, &resamples(2));
        assert_eq!(single.judge_nll, [None, Some(3.0)]);
        assert_eq!(value(measures.judge_nll), 3.0);
        assert!((value(measures.judge_ppl_pooled) - 3.0f64.exp()).abs() < 1e-12);
    }

    #[test]
    fn grafts_take_the_first_half_of_the_next() {
        let set: [&[u32]; 3] = [&[1, 2, 3, 4, 5], &[6, 7, 8, 9, 1], &[2, 2, 3, 3, 3]];
        assert_eq!(grafted(&set, 0), [6, 7, 3, 4, 5]);
        assert_eq!(grafted(&set, 2), [1, 2, 3, 3, 3]);
    }

    /// 20 tokens: the second half begins at 10, what counts at 18. Token 18 is an end of text and
    /// 19 counts alone.
    #[test]
    fn context_gain_counts_behind_the_seam() {
        let mut tokens = [1u32; 20];
        tokens[18] = END;
        let mut one = sample(&tokens, &[1.0; 20]);
        one.nll[19] = 2.0;
        let mut grafted_nll = vec![9.0; 10];
        grafted_nll[9] = 2.5;
        one.grafted_nll = Some(grafted_nll);
        assert_eq!(context_gain(&one, END), Some(0.5));
        one.tokens[19] = END;
        assert_eq!(context_gain(&one, END), None);
        // Too short to have anything behind the seam.
        let short = Sample { grafted_nll: Some(vec![0.0; 3]), ..sample(&[1; 6], &[0.0; 6]) };
        assert_eq!(context_gain(&short, END), None);
    }

    #[test]
    fn everything_that_is_compared() {
        let training = Training::new(vec![1, 2, 3, END], 8, END);
        let trigram = Interpolated::fit(3, 10, END, std::iter::once(training.text()));
        let human = [vec![1, 2, 3, END]];
        let reference = Reference { trigram: Some(&trigram), training: Some(&training), human: Some(&human), ..NOTHING };
        let mut set = [sample(&[1, 2, 3, 4], &[1.0; 4]), sample(&[7, 8, 2, 3], &[1.0; 4])];
        set[0].draft = Some(vec![1, 2, 9, 4]);
        set[1].draft = Some(vec![7, 8, 2, 3]);
        set[0].documents = vec!["Tom saw Tim and Tim.\n".into()];
        let (measures, _) = measure(&set, &reference, &resamples(2));
        let copied = measures.copied_run.unwrap();
        assert_eq!((copied.value, copied.max), (2.5, Some(3.0)));
        assert_eq!((value(measures.changed), value(measures.names), value(measures.quotes)), (0.125, 1.0, 1.0));
        // Every token of the first sample but the last follows the training text; 7 and 8 were
        // never seen.
        let loss = |tokens: &[u32]| trigram.loss(tokens).0;
        let both = (loss(&[1, 2, 3, 4]) + loss(&[7, 8, 2, 3])) / 8.0;
        assert!((value(measures.trigram_ppl) - both.exp()).abs() < 1e-9);
        let bigram = Interpolated::fit(2, 10, END, [&[1, 2, 3, 4][..], &[7, 8, 2, 3]].into_iter());
        assert!((value(measures.reverse_ppl) - (bigram.loss(&[1, 2, 3]).0 / 3.0).exp()).abs() < 1e-9);
        assert_eq!(value(measures.self_bleu_4), diversity::self_bleu(&[&[1, 2, 3, 4], &[7, 8, 2, 3]]).unwrap());
        assert_eq!(value(measures.set_distinct_4), 1.0);
    }

    #[test]
    fn pairs_are_differences_by_index() {
        let base = PerSample { judge_nll: vec![Some(2.0), Some(3.0), Some(4.0), None], ..PerSample::default() };
        let row = PerSample { judge_nll: vec![Some(1.5), Some(2.0), Some(4.5), Some(1.0)], ..PerSample::default() };
        let blank = |n| vec![None; n];
        let fill = |p: PerSample| PerSample { entropy: blank(4), context_gain: blank(4), ..p };
        let paired = paired(&fill(row), &fill(base), &resamples(4));
        assert!((value(paired.judge_nll) - (-1.0 / 3.0)).abs() < 1e-15);
        assert_eq!((paired.improved, paired.entropy), (Some(2.0 / 3.0), None));
    }
}
