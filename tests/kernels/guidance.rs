//! `guidance` goes from the base through `out`, and beyond it where the scale is above 1.

use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::guidance::apply_guidance;

use crate::emulator::{Array, machines, noise, words};

pub fn holds(context: &CudaContext) -> Result<(), String> {
    for len in [1usize, 255, 256, 257, 1000] {
        for scale in [0.0f32, 1.0, 2.5] {
            // One element more than is asked for, which stays as it is.
            let (base, out) = (noise(3, len + 1), noise(4, len + 1));
            let guided = Array::new(context, &out);
            words(apply_guidance(context, len as u32, scale, Array::new(context, &base).address(), guided.address()))?;
            for (i, found) in guided.read()?.iter().enumerate() {
                let scale = if i < len { f64::from(scale) } else { 1.0 };
                let expected = f64::from(base[i]) + scale * (f64::from(out[i]) - f64::from(base[i]));
                if (f64::from(*found) - expected).abs() > 1e-6 {
                    return Err(format!("len {len}, scale {scale}: element {i} is {found}, expected {expected}"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_led_away_from_their_base() {
    machines().iter().for_each(|context| holds(context).unwrap());
}
