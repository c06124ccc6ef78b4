//! `route` chooses as `oracle::route` does, gives every choice a place, and cuts the places into
//! tiles of one expert each.

use redraft::backend::{ExpertShape, Router, RouterScore};
use redraft::cpu::oracle;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::route;
use redraft::cuda::ops::route::Route;

use crate::emulator::{Array, machines, noise, words};

struct Case {
    num_experts: usize,
    top_k: usize,
    rows: usize,
    score: RouterScore,
    with_bias: bool,
    tile_rows: u32,
    /// Logits in few steps, so that many tie.
    coarse: bool,
}

impl Case {
    fn holds(&self, context: &CudaContext) -> Result<(), String> {
        let Case { num_experts, top_k, rows, score, with_bias, tile_rows, coarse } = *self;
        let what = format!("{num_experts} experts, {top_k} of {rows} rows, {score:?}, bias {with_bias}");
        let shape = ExpertShape { num_experts, top_k, hidden_dim: 1, expert_dim: 1 };
        let step = |v: f32| if coarse { (v * 2.0).round() } else { v };
        let logits: Vec<f32> = noise(1, rows * num_experts).iter().map(|v| step(4.0 * v)).collect();
        // Quarters: sums with equal scores are equal too.
        let bias: Option<Vec<f32>> = with_bias.then(|| noise(2, num_experts).iter().map(|v| step(*v) / 4.0).collect());
        let places = rows * top_k;
        let room = route::max_tiles(shape, rows as u32, tile_rows) as usize;
        let logits_at = Array::new(context, &logits);
        let bias_at = bias.as_ref().map(|bias| Array::new(context, bias));
        let words_of = |len: usize| Array::new(context, &vec![u32::MAX; len]);
        let [expert, token, place] = [(); 3].map(|()| words_of(places));
        let (count, tiles, num_tiles) = (words_of(num_experts), words_of(4 * room), words_of(1));
        let weight = Array::nan(context, places);
        words(route::route(
            context,
            &Route {
                shape,
                score,
                rows: rows as u32,
                tile_rows,
                logits: logits_at.address(),
                bias: bias_at.as_ref().map(Array::address),
                expert: expert.address(),
                weight: weight.address(),
                count: count.address(),
                token: token.address(),
                place: place.address(),
                tiles: tiles.address(),
                num_tiles: num_tiles.address(),
            },
        ))?;

        let want = oracle::route(shape, &Router { score, bias: bias.as_deref() }, &logits);
        let (experts, weights) = (expert.read()?, weight.read()?);
        for (i, (expert, weight)) in want.iter().enumerate() {
            if experts[i] != *expert {
                return Err(format!("{what}: choice {i} is {}, expected {expert}", experts[i]));
            }
            // A NaN is no number within the tolerance either.
            let error = (f64::from(weights[i]) - weight).abs();
            if error.is_nan() || error > 4e-6 * weight {
                return Err(format!("{what}: choice {i} weighs {}, expected {weight}", weights[i]));
            }
        }
        // The order, from the choices by plain loops.
        let (mut tokens, mut places_of, mut cut) = (Vec::new(), vec![0u32; places], Vec::new());
        let mut counts = Vec::new();
        for e in 0..num_experts as u32 {
            let first = tokens.len();
            for (i, _) in experts.iter().enumerate().filter(|(_, chosen)| **chosen == e) {
                places_of[i] = tokens.len() as u32;
                tokens.push((i / top_k) as u32);
            }
            counts.push((tokens.len() - first) as u32);
            let firsts = (first..tokens.len()).step_by(tile_rows as usize);
            cut.extend(firsts.map(|at| [e, at as u32, tile_rows.min((tokens.len() - at) as u32), 0]));
        }
        equal(&count.read()?, &counts, &format!("{what}: counts"))?;
        equal(&token.read()?, &tokens, &format!("{what}: tokens"))?;
        equal(&place.read()?, &places_of, &format!("{what}: places"))?;
        equal(&num_tiles.read()?, &[cut.len() as u32], &format!("{what}: number of tiles"))?;
        equal(&tiles.read()?[..4 * cut.len()], cut.as_flattened(), &format!("{what}: tiles"))
    }
}

fn equal(found: &[u32], expected: &[u32], what: &str) -> Result<(), String> {
    match found.iter().zip(expected).position(|(f, e)| f != e) {
        None if found.len() == expected.len() => Ok(()),
        None => Err(format!("{what}: {} of {}", found.len(), expected.len())),
        Some(i) => Err(format!("{what}: word {i} is {}, expected {}", found[i], expected[i])),
    }
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    let softmax = |renormalise| RouterScore::Softmax { renormalise };
    let sigmoid = |num_groups, top_groups, scale| RouterScore::Sigmoid { num_groups, top_groups, scale };
    for (num_experts, top_k, rows, score, with_bias, tile_rows, coarse) in [
        (1, 1, 3, softmax(false), false, 8, false),
        (6, 2, 5, softmax(true), false, 8, true),
        (40, 4, 9, softmax(false), false, 8, false),
        (128, 8, 13, softmax(true), false, 8, true),
        (5, 2, 90, softmax(true), false, 32, false),
        (3, 2, 70, sigmoid(1, 1, 2.5), true, 8, false),
        (64, 8, 6, sigmoid(8, 4, 2.5), true, 8, false),
        (72, 6, 7, sigmoid(4, 2, 1.0), true, 8, true),
        (256, 8, 5, sigmoid(8, 4, 2.5), false, 64, true),
    ] {
        Case { num_experts, top_k, rows, score, with_bias, tile_rows, coarse }.holds(context)?;
    }
    Ok(())
}

#[test]
fn every_choice_has_its_place() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
