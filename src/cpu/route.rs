//! Experts of rows: which they are, and the order in which their products take the rows.
#![forbid(unsafe_code)]

use crate::backend::{ExpertChoice, ExpertShape, Router, RouterScore};
use crate::cpu::context::CpuContext;
use crate::cpu::memory::Aligned;

/// The choices of some rows, and the rows in the order of their experts: a *place* is a row before
/// one of its experts.
pub struct Routing {
    pub shape: ExpertShape,
    /// (rows, k), experts ascending.
    pub choices: Vec<ExpertChoice>,
    /// Places of expert e are `bounds[e]..bounds[e + 1]`, rows ascending.
    pub bounds: Vec<usize>,
    /// The place of each choice, (rows, k).
    pub places: Vec<usize>,
    /// The row at each place.
    pub tokens: Vec<usize>,
    /// Scratch of the products: (places, C) in, (places, F) between, (places, C) out.
    pub input: Aligned<f32>,
    pub inner: Aligned<f32>,
    pub output: Aligned<f32>,
}

impl Routing {
    pub fn new(shape: ExpertShape) -> Routing {
        Routing {
            shape,
            choices: Vec::new(),
            bounds: vec![0; shape.num_experts + 1],
            places: Vec::new(),
            tokens: Vec::new(),
            input: Aligned::default(),
            inner: Aligned::default(),
            output: Aligned::default(),
        }
    }

    /// Sorts the choices by expert, rows of one in their order.
    fn group(&mut self) {
        self.bounds.fill(0);
        for choice in &self.choices {
            self.bounds[choice.expert as usize + 1] += 1;
        }
        for e in 0..self.shape.num_experts {
            self.bounds[e + 1] += self.bounds[e];
        }
        let mut next = self.bounds.clone();
        self.tokens.clear();
        self.tokens.resize(self.choices.len(), 0);
        self.places.clear();
        for (i, choice) in self.choices.iter().enumerate() {
            let next = &mut next[choice.expert as usize];
            self.tokens[*next] = i / self.shape.top_k;
            self.places.push(*next);
            *next += 1;
        }
    }
}

/// See [`crate::backend::Backend::route`]. `logits` holds `rows` rows of E.
pub fn route(context: &CpuContext, rows: usize, logits: &[f32], router: &Router<[f32]>, routing: &mut Routing) {
    let ExpertShape { num_experts, top_k, .. } = routing.shape;
    routing.choices.clear();
    routing.choices.resize(rows * top_k, ExpertChoice::default());
    let rows_at_once = rows.div_ceil(4 * context.pool.threads()).max(1);
    // An exponential and a look at each expert for each choice.
    context.pool_for(rows * num_experts * (top_k + 16)).chunks(&mut routing.choices, rows_at_once * top_k, &|i, choices| {
        let mut scratch = Scores::default();
        let logits = logits[i * rows_at_once * num_experts..].chunks_exact(num_experts);
        for (logits, choices) in logits.zip(choices.chunks_exact_mut(top_k)) {
            scratch.choose(logits, router, choices);
        }
    });
    routing.group();
}

/// Scratch of a row.
#[derive(Default)]
struct Scores {
    /// What a choice weighs, before it is normalised.
    scores: Vec<f32>,
    /// What it is chosen by. Taken ones stay, as `open` knows them.
    keys: Vec<f32>,
    open: Vec<bool>,
}

impl Scores {
    fn choose(&mut self, logits: &[f32], router: &Router<[f32]>, choices: &mut [ExpertChoice]) {
        let Scores { scores, keys, open } = self;
        scores.clear();
        keys.clear();
        open.clear();
        open.resize(logits.len(), true);
        match router.score {
            RouterScore::Softmax { .. } => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.extend(logits.iter().map(|l| (l - max).exp()));
                keys.extend_from_slice(logits);
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|p| *p /= sum);
            }
            RouterScore::Sigmoid { .. } => {
                scores.extend(logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())));
                match router.bias {
                    Some(bias) => keys.extend(scores.iter().zip(bias).map(|(s, b)| s + b)),
                    None => keys.extend_from_slice(scores),
                }
            }
        }
        keys.iter_mut().filter(|key| key.is_nan()).for_each(|key| *key = f32::NEG_INFINITY);
        if let RouterScore::Sigmoid { num_groups, top_groups, .. } = router.score
            && num_groups > 1
        {
            let size = logits.len() / num_groups;
            let groups: Vec<f32> = keys.chunks_exact(size).map(two_best).collect();
            let mut dropped = vec![true; num_groups];
            for _ in 0..top_groups {
                let best = best(&groups, &dropped);
                dropped[best] = false;
            }
            open.iter_mut().enumerate().for_each(|(e, open)| *open = !dropped[e / size]);
        }
        for choice in choices.iter_mut() {
            let best = best(keys, open);
            open[best] = false;
            *choice = ExpertChoice { expert: best as u32, weight: scores[best] };
        }
        choices.sort_unstable_by_key(|choice| choice.expert);
        let sum: f32 = choices.iter().map(|choice| choice.weight).sum();
        match router.score {
            RouterScore::Softmax { renormalise: false } => {}
            RouterScore::Softmax { renormalise: true } => choices.iter_mut().for_each(|choice| choice.weight /= sum),
            RouterScore::Sigmoid { scale, .. } => {
                choices.iter_mut().for_each(|choice| choice.weight = choice.weight / (sum + 1e-20) * scale)
            }
        }
    }
}

/// The sum of the two largest.
fn two_best(keys: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &key in keys {
        if key > first {
            (first, second) = (key, first);
        } else if key > second {
            second = key;
        }
    }
    first + second
}

/// The largest of the open ones, of equal ones the first; there is an open one.
fn best(keys: &[f32], open: &[bool]) -> usize {
    let mut found: Option<usize> = None;
    for (i, key) in keys.iter().enumerate() {
        if open[i] && found.is_none_or(|best| *key > keys[best]) {
            found = Some(i);
        }
    }
    found.expect("no more choices than experts")
}
