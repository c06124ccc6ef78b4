//! Reference of sampling: the logits of a row to a token, a confidence, a margin and an entropy.
//!
//! Plain numbers in, plain numbers out. The backends' `sample` kernels are tested against
//! [`sample_row`]. Ties go to the lower token id; NaN is an error (docs/architecture.md, one
//! specification of sampling).
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::sampling::types::{Draw, SampledToken, TopK, TopKOrder, TopPRule};

/// Token, confidence and shape of one row's distribution, in f64: the specification of
/// `Backend::sample`.
///
/// The draw is an inverse CDF over ascending token ids: the smallest kept id whose cumulative mass
/// exceeds `u * total`. One 53-bit uniform per row keeps the full resolution of the distribution
/// (docs/architecture.md, draws of full resolution).
///
/// Errors: [`Error::Kernel`] if a logit that is not banned is NaN or +inf, or if every id is
/// banned.
pub fn sample_row(logits: &[f32], banned: &[u32], draw: &Draw) -> Result<SampledToken> {
    let allowed = |id: usize| !banned.contains(&(id as u32));
    let mut top = [(f64::NEG_INFINITY, usize::MAX); 2];
    for (id, &logit) in logits.iter().enumerate() {
        if !allowed(id) {
            continue;
        }
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(Error::kernel(format!("logit of token {id} is {logit}: the weights or activations are not finite")));
        }
        let logit = f64::from(logit);
        if logit > top[0].0 || top[0].1 == usize::MAX {
            top = [(logit, id), top[0]];
        } else if logit > top[1].0 {
            top[1] = (logit, id);
        }
    }
    let (max, argmax) = top[0];
    if argmax == usize::MAX || max == f64::NEG_INFINITY {
        return Err(Error::kernel("no token has a finite logit that is not banned"));
    }
    let masses = |temperature: f64| -> Vec<f64> {
        logits.iter().enumerate().map(|(id, &l)| if allowed(id) { ((f64::from(l) - max) / temperature).exp() } else { 0.0 }).collect()
    };
    let raw = masses(1.0);
    let sum: f64 = raw.iter().sum();
    let mut entropy =
        sum.ln() - logits.iter().zip(&raw).filter(|(_, m)| **m > 0.0).map(|(&l, m)| m * (f64::from(l) - max)).sum::<f64>() / sum;
    let second = if top[1].1 == usize::MAX { 0.0 } else { (top[1].0 - max).exp() };
    let mut margin = (1.0 - second) / sum;

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        None if draw.temperature == 0.0 && !draw.truncated_confidence => argmax,
        None => {
            let greedy = draw.temperature == 0.0;
            let mut mass = masses(if greedy { 1.0 } else { f64::from(draw.temperature) });
            let top_k = |mass: &mut [f64], now: TopKOrder| match draw.top_k {
                Some(TopK { k, order }) if order == now => most_probable(mass, logits, banned, k as usize),
                _ => {}
            };
            top_k(&mut mass, TopKOrder::Before);
            if draw.top_p < 1.0 {
                nucleus(&mut mass, logits, f64::from(draw.top_p), draw.top_p_rule);
            }
            top_k(&mut mass, TopKOrder::After);
            let total: f64 = mass.iter().sum();
            let target = draw.u * total;
            let mut cumulative = 0.0;
            let mut token = argmax;
            for (id, m) in mass.iter().enumerate().filter(|(_, m)| **m > 0.0) {
                cumulative += m;
                token = id;
                if cumulative > target {
                    break;
                }
            }
            if greedy {
                token = argmax;
            }
            if draw.truncated_confidence {
                // [Dream] All three are of what is left of the distribution.
                kept_share = Some(mass[token] / total);
                margin = (mass[argmax] - mass.get(top[1].1).copied().unwrap_or(0.0)) / total;
                entropy = total.ln() - mass.iter().filter(|m| **m > 0.0).map(|m| m * m.ln()).sum::<f64>() / total;
            }
            token
        }
    };
    let Some(&logit) = logits.get(token).filter(|_| allowed(token)) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - max - sum.ln();
    let confidence = kept_share.unwrap_or_else(|| log_prob.exp());
    Ok(SampledToken {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: margin as f32,
        entropy: entropy.max(0.0) as f32,
    })
}

/// Zeroes the mass of every token outside the nucleus. Order: larger logit first, ties to the lower
/// id.
fn nucleus(mass: &mut [f64], logits: &[f32], top_p: f64, rule: TopPRule) {
    let total: f64 = mass.iter().sum();
    let mut order: Vec<usize> = (0..mass.len()).filter(|&id| mass[id] > 0.0).collect();
    // No NaN gets here; 0.0 and -0.0 are the same logit.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b)));
    let mut cumulative = 0.0;
    let mut open = true;
    for (rank, &id) in order.iter().enumerate() {
        let before = cumulative;
        cumulative += mass[id] / total;
        open = open
            && match rule {
                TopPRule::Within => cumulative <= top_p,
                TopPRule::Crossing => before < top_p,
            };
        if rank > 0 && !open {
            mass[id] = 0.0;
        }
    }
}

/// Zeroes the mass of every token whose logit is below the k-th largest that is not banned.
fn most_probable(mass: &mut [f64], logits: &[f32], banned: &[u32], k: usize) {
    let mut order: Vec<f32> = logits.iter().enumerate().filter(|(id, _)| !banned.contains(&(*id as u32))).map(|(_, l)| *l).collect();
    order.sort_by(|a, b| b.total_cmp(a));
    let last = order[k.clamp(1, order.len()) - 1];
    for (mass, _) in mass.iter_mut().zip(logits).filter(|(_, logit)| **logit < last) {
        *mass = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Draw =
        Draw { u: 0.0, temperature: 1.0, top_p: 1.0, top_p_rule: TopPRule::Within, top_k: None, forced: None, truncated_confidence: false };

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn draw_is_an_inverse_cdf_over_ascending_ids() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        for (u, token) in [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.5999, 2), (0.6001, 3), (0.9999, 3)] {
            assert_eq!(sample_row(&l, &[], &Draw { u, ..PLAIN }).unwrap().token, token, "u = {u}");
        }
        let d = sample_row(&l, &[], &Draw { u: 0.5, ..PLAIN }).unwrap();
        assert!((d.confidence - 0.3).abs() < 1e-6 && (d.margin - 0.1).abs() < 1e-6 && (d.log_prob - 0.3f32.ln()).abs() < 1e-6);
        let entropy: f32 = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| -p * p.ln()).sum();
        assert!((d.entropy - entropy).abs() < 1e-6);
    }

    /// Sorted 0.4 0.3 0.2 0.1: within 0.75 keeps two (0.7), crossing keeps three (0.9).
    #[test]
    fn the_two_nucleus_rules_differ_by_the_crossing_token() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        let token = |u, rule| sample_row(&l, &[], &Draw { u, top_p: 0.75, top_p_rule: rule, ..PLAIN }).unwrap().token;
        assert_eq!(token(0.0, TopPRule::Within), 2);
        assert_eq!(token(0.0, TopPRule::Crossing), 1);
        // Within: boundary at 0.3 / 0.7; crossing: 0.2 / 0.9 and 0.5 / 0.9.
        assert_eq!([0.428, 0.429].map(|u| token(u, TopPRule::Within)), [2, 3]);
        assert_eq!([0.222, 0.223, 0.555, 0.556].map(|u| token(u, TopPRule::Crossing)), [1, 2, 2, 3]);
        // The first is kept even where it alone exceeds p; its truncated confidence is 1, its raw
        // one is not.
        let draw = Draw { u: 0.99, top_p: 0.1, ..PLAIN };
        assert_eq!(sample_row(&l, &[], &draw).unwrap().confidence, 0.4);
        let d = sample_row(&l, &[], &Draw { truncated_confidence: true, ..draw }).unwrap();
        assert_eq!((d.token, d.confidence), (3, 1.0));
    }

    /// Sorted 0.4 0.3 0.2 0.1 at temperature 0.5 is 16 9 4 1 of 30; crossing 0.75 keeps two, 16 and
    /// 9 of 25.
    #[test]
    fn truncated_quantities_are_those_of_what_is_left() {
        let l = logits(&[0.1, 0.2, 0.3, 0.4]);
        let draw = Draw { temperature: 0.5, top_p: 0.75, top_p_rule: TopPRule::Crossing, truncated_confidence: true, ..PLAIN };
        let close = |d: SampledToken, p: [f64; 2], token, confidence: f64| {
            let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let found = [d.confidence, d.margin, d.entropy].map(f64::from);
            let wanted = [confidence, p[0] - p[1], entropy];
            assert!(d.token == token && found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-6), "{d:?}, expected {wanted:?}");
            assert!((f64::from(d.log_prob) - f64::from(l[token as usize])).abs() < 1e-6, "{d:?}: a log probability is raw");
        };
        close(sample_row(&l, &[], &Draw { u: 0.2, ..draw }).unwrap(), [0.64, 0.36], 2, 0.36);
        close(sample_row(&l, &[], &Draw { u: 0.5, ..draw }).unwrap(), [0.64, 0.36], 3, 0.64);
        // One is left.
        close(sample_row(&l, &[], &Draw { top_p: 0.1, ..draw }).unwrap(), [1.0, 0.0], 3, 1.0);
        // [Dream] At temperature 0 the nucleus is that of temperature 1: 0.4 and 0.3 reach 0.6, and
        // the first is taken.
        close(sample_row(&l, &[], &Draw { temperature: 0.0, top_p: 0.6, ..draw }).unwrap(), [4.0 / 7.0, 3.0 / 7.0], 3, 4.0 / 7.0);
        let forced = sample_row(&l, &[], &Draw { forced: Some(0), ..draw }).unwrap();
        assert_eq!(forced, sample_row(&l, &[], &Draw { forced: Some(0), ..PLAIN }).unwrap());
    }

    #[test]
    fn bans_ties_temperature_zero_and_forced_tokens() {
        let l = [1.0, 3.0, 3.0, 9.0];
        let d = sample_row(&l, &[3], &Draw { temperature: 0.0, u: 0.999, ..PLAIN }).unwrap();
        assert_eq!((d.token, d.margin), (1, 0.0));
        assert!(d.confidence < 0.5);
        let forced = sample_row(&l, &[3], &Draw { forced: Some(2), ..PLAIN }).unwrap();
        assert_eq!((forced.token, forced.confidence), (2, d.confidence));
        assert!(sample_row(&l, &[3], &Draw { forced: Some(3), ..PLAIN }).is_err());
        assert!(sample_row(&l, &[3], &Draw { forced: Some(4), ..PLAIN }).is_err());
        // Equal logits under nucleus: ties are kept from the lower id on. 4 x 0.25, within 0.6
        // keeps ids 0 and 1.
        let d = sample_row(&[2.0; 4], &[], &Draw { top_p: 0.6, u: 0.999, ..PLAIN }).unwrap();
        assert_eq!(d.token, 1);
    }

    #[test]
    fn broken_logits_are_errors() {
        assert!(sample_row(&[0.0, f32::NAN], &[], &PLAIN).is_err());
        assert!(sample_row(&[0.0, f32::INFINITY], &[], &PLAIN).is_err());
        assert!(sample_row(&[f32::NEG_INFINITY; 3], &[], &PLAIN).is_err());
        assert!(sample_row(&[0.0; 2], &[0, 1], &PLAIN).is_err());
        // A banned NaN is ignored; huge logits do not overflow.
        assert_eq!(sample_row(&[3e38, f32::NAN, -3e38], &[1], &Draw { u: 0.9, ..PLAIN }).unwrap().token, 0);
    }
}
