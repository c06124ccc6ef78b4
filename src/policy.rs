//! Owns the law of decisions: which token a masked row takes, which rows are revealed, which positions are masked again.
//!
//! Plain numbers in, plain numbers out, no tensors and no pages. The backends' `decide` kernels are held to
//! [`decide_row`]; the engine calls [`select`] and [`remask`] directly. Ties go to the lower token id, then to the lower
//! position; at least one position is revealed per step; NaN is an error, never a loop (design section 5, law 3).
#![forbid(unsafe_code)]

use crate::backend::{Decision, Draw, TopPRule};
use crate::error::{Error, Result};

/// Token, confidence and shape of one row's distribution, in f64: the specification of `Backend::decide`.
///
/// The draw is an inverse CDF over ascending token ids: the smallest kept id whose cumulative mass exceeds `u * total`.
/// One 53-bit uniform per row keeps the full resolution of the distribution (law 2).
///
/// Errors: [`Error::Kernel`] if a logit that is not banned is NaN or +inf, or if every id is banned.
pub fn decide_row(logits: &[f32], banned: &[u32], draw: &Draw) -> Result<Decision> {
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
    let entropy = sum.ln() - logits.iter().zip(&raw).filter(|(_, m)| **m > 0.0).map(|(&l, m)| m * (f64::from(l) - max)).sum::<f64>() / sum;
    let second = if top[1].1 == usize::MAX { 0.0 } else { (top[1].0 - max).exp() };

    let mut kept_share = None;
    let token = match draw.forced {
        Some(token) => token as usize,
        None if draw.temperature == 0.0 => argmax,
        None => {
            let mut mass = masses(f64::from(draw.temperature));
            if draw.top_p < 1.0 {
                nucleus(&mut mass, logits, f64::from(draw.top_p), draw.top_p_rule);
            }
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
            kept_share = Some(mass[token] / total);
            token
        }
    };
    let Some(&logit) = logits.get(token).filter(|_| allowed(token)) else {
        return Err(Error::request(format!("token {token} is banned or outside the vocabulary of {}", logits.len())));
    };
    let log_prob = f64::from(logit) - max - sum.ln();
    let confidence = match kept_share {
        Some(share) if draw.truncated_confidence => share,
        None if draw.truncated_confidence && draw.forced.is_none() => 1.0,
        _ => log_prob.exp(),
    };
    Ok(Decision {
        token: token as u32,
        confidence: confidence as f32,
        log_prob: log_prob as f32,
        margin: ((1.0 - second) / sum) as f32,
        entropy: entropy.max(0.0) as f32,
    })
}

/// Zeroes the mass of every token outside the nucleus. Order: larger logit first, ties to the lower id.
fn nucleus(mass: &mut [f64], logits: &[f32], top_p: f64, rule: TopPRule) {
    let total: f64 = mass.iter().sum();
    let mut order: Vec<usize> = (0..mass.len()).filter(|&id| mass[id] > 0.0).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let mut cumulative = 0.0;
    let mut open = true;
    for (rank, &id) in order.iter().enumerate() {
        let before = cumulative;
        cumulative += mass[id] / total;
        open = open && match rule {
            TopPRule::Within => cumulative <= top_p,
            TopPRule::Crossing => before < top_p,
        };
        if rank > 0 && !open {
            mass[id] = 0.0;
        }
    }
}
