//! `remask` takes what `sampling::remask` takes and leaves the canvas as `Canvas::remask` leaves
//! it.

use redraft::canvas::{Canvas, State};
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::remask::{RemaskParams, remask, state};
use redraft::sampling;

use crate::emulator::{Array, machines, noise, words};

const MASK: u32 = 50_257;
const NEXT_STAGE: u8 = 2;

/// One sequence and how many positions it gives up.
struct Sequence {
    canvas: Canvas,
    count: u32,
}

/// About a sixth fixed, a sixth masked, the rest revealed; `levels` distinct confidences, so that
/// few levels mean many ties.
fn sequence(seed: u64, len: usize, levels: u32, count: u32) -> Sequence {
    let roles = noise(seed, len);
    let fixed: Vec<Option<u32>> = (0..len).map(|i| (roles[i] < -0.7).then_some(i as u32)).collect();
    let mut canvas = Canvas::new(&fixed, MASK);
    for (i, (role, value)) in roles.iter().zip(noise(seed + 1, len)).enumerate() {
        if *role >= -0.7 && *role < 0.7 {
            let confidence = ((value + 1.0) / 2.0 * levels as f32).ceil() / levels as f32;
            canvas.unmask(i, 1000 + i as u32, confidence, 1, 3 * i as u32);
        }
    }
    Sequence { canvas, count }
}

/// Values whose order is easy to get wrong: zeros of both signs, infinities, NaN of both signs,
/// negatives, subnormals.
fn odd_values(count: u32) -> Sequence {
    let odd = [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, f32::MIN_POSITIVE, 1e-45, 1.0, -0.0, 0.0];
    let mut canvas = Canvas::new(&[None; 12], MASK);
    odd.iter().enumerate().for_each(|(i, v)| canvas.unmask(i, i as u32, *v, 0, 1));
    Sequence { canvas, count }
}

fn code(canvas: &Canvas, position: usize) -> u8 {
    match canvas.state(position) {
        State::Fixed => state::FIXED,
        State::Masked => state::MASKED,
        State::Revealed => state::REVEALED,
    }
}

/// The canvases as the flat arrays of the kernel.
#[derive(PartialEq, Debug)]
struct Flat {
    token: Vec<u32>,
    /// As bits, so that NaN equals itself.
    confidence: Vec<u32>,
    state: Vec<u8>,
    stage: Vec<u8>,
    step: Vec<u32>,
}

fn flat<'a>(canvases: impl Iterator<Item = &'a Canvas> + Clone) -> Flat {
    let each = || canvases.clone().flat_map(|c| (0..c.len()).map(move |i| (c, i)));
    Flat {
        token: each().map(|(c, i)| c.tokens()[i]).collect(),
        confidence: each().map(|(c, i)| c.confidence(i).to_bits()).collect(),
        state: each().map(|(c, i)| code(c, i)).collect(),
        stage: each().map(|(c, i)| c.revealed_at(i).0).collect(),
        step: each().map(|(c, i)| c.revealed_at(i).1).collect(),
    }
}

/// What the reference says: the canvases afterwards, and the positions taken from each.
fn reference(sequences: &[Sequence]) -> (Vec<Canvas>, Vec<Vec<u32>>) {
    let one = |s: &Sequence| {
        let mut canvas = s.canvas.clone();
        let revealed = (0..canvas.len()).filter(|i| canvas.state(*i) == State::Revealed);
        let scores: Vec<(usize, f64)> = revealed.map(|i| (i, f64::from(canvas.confidence(i)))).collect();
        // Half a position more than asked, so that the floor gives back the count.
        let ratio = if scores.is_empty() { 0.0 } else { (f64::from(s.count) + 0.5) / scores.len() as f64 };
        let taken = sampling::remask(ratio, &scores);
        taken.iter().for_each(|i| canvas.remask(*i, NEXT_STAGE));
        (canvas, taken.into_iter().map(|i| i as u32).collect())
    };
    sequences.iter().map(one).unzip()
}

fn check(context: &CudaContext, sequences: &[Sequence]) -> Result<(), String> {
    let indptr = sequences.iter().scan(0u32, |end, s| {
        *end += s.canvas.len() as u32;
        Some(*end)
    });
    let indptr: Vec<u32> = std::iter::once(0).chain(indptr).collect();
    let before = flat(sequences.iter().map(|s| &s.canvas));
    let untouched = vec![u32::MAX; before.token.len()];

    let offsets = Array::new(context, &indptr);
    let count = Array::new(context, &sequences.iter().map(|s| s.count).collect::<Vec<_>>());
    let (token, confidence) = (Array::new(context, &before.token), Array::new(context, &before.confidence));
    let (state, stage, step) = (Array::new(context, &before.state), Array::new(context, &before.stage), Array::new(context, &before.step));
    let (positions, taken) = (Array::new(context, &untouched), Array::new(context, &vec![u32::MAX; sequences.len()]));
    let params = RemaskParams {
        indptr: offsets.address(),
        count: count.address(),
        token: token.address(),
        confidence: confidence.address(),
        state: state.address(),
        stage: stage.address(),
        step: step.address(),
        positions: positions.address(),
        taken: taken.address(),
        mask_id: MASK,
        next_stage: u32::from(NEXT_STAGE),
    };
    words(remask(context, sequences.len() as u32, &params))?;

    let (canvases, expected) = reference(sequences);
    let after =
        Flat { token: token.read()?, confidence: confidence.read()?, state: state.read()?, stage: stage.read()?, step: step.read()? };
    let (positions, taken) = (positions.read()?, taken.read()?);
    for (s, expected) in expected.iter().enumerate() {
        let slots = &positions[indptr[s] as usize..indptr[s + 1] as usize];
        let (found, rest) = slots.split_at((taken[s] as usize).min(slots.len()));
        if taken[s] as usize != expected.len() || found != expected || rest.iter().any(|p| *p != u32::MAX) {
            return Err(format!("sequence {s}: took {} {found:?}, the reference takes {} {expected:?}", taken[s], expected.len()));
        }
    }
    if after != flat(canvases.iter()) {
        return Err("the right positions, but not the canvas that `Canvas::remask` leaves".into());
    }
    Ok(())
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    // Lengths around the CTA size, an empty sequence, nothing wanted, everything, and more than
    // there is; distinct values and ties.
    let ragged = [
        sequence(10, 1, 1, 1),
        sequence(20, 0, 1, 3),
        sequence(30, 255, 1 << 20, 60),
        sequence(40, 256, 3, 61),
        sequence(50, 257, 1, 100),
        sequence(60, 700, 7, 233),
        sequence(70, 700, 1 << 20, 0),
        sequence(80, 300, 5, 10_000),
        sequence(90, 1025, 1 << 12, 512),
        odd_values(3),
    ];
    check(context, &ragged)?;
    for count in 0..=12 {
        check(context, &[odd_values(count), sequence(u64::from(count), 40, 2, count)])?;
    }
    Ok(())
}

#[test]
fn the_lowest_confidences_are_masked_again() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
