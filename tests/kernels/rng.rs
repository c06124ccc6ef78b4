//! The device generator and the device rounding, bit for bit against the published answers,
//! `rng.rs` and `half`.

use half::bf16;
use redraft::cuda::context::CudaContext;
use redraft::cuda::driver::Launch;
use redraft::cuda::{Edit, Emulator, EmulatorOptions};
use redraft::rng::{DrawKey, uniforms};

use crate::emulator::{Array, words};

/// Twin of the struct in `rng.cu`.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct RngParams {
    counters: u64,
    words: u64,
    uniforms: u64,
    rounded: u64,
    n: u32,
    padding: u32,
}

/// Counter and key words, and the answers published with Random123 (kat_vectors).
const KNOWN: [([u32; 6], [u32; 4]); 3] = [
    ([0; 6], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
    ([u32::MAX; 6], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
    ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0], [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]),
];

/// Known answers first; then every exponent with mantissas around the rounding boundary, both
/// signs, in the word that is rounded.
fn counters() -> Vec<[u32; 6]> {
    let mantissas = [0, 1, 0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x7f_7fff, 0x7f_8000, 0x7f_ffff];
    let words = (0..512u32).flat_map(|sign_exponent| mantissas.map(|m| sign_exponent << 23 | m));
    let rest = words.enumerate().map(|(i, word)| [word, i as u32, (i as u32 % 7) << 24 | 11, i as u32 % 3, 42, 1 << 20]);
    KNOWN.iter().map(|(counter, _)| *counter).chain(rest).collect()
}

/// The entry stands in a file of its own, so the machine is made here.
pub fn holds(edit: Option<Edit>) -> Result<(), String> {
    let emulator = Emulator::new(EmulatorOptions { edit, ..EmulatorOptions::default() }).map_err(|e| e.to_string())?;
    let function = emulator.function_in("rng.cu", include_str!("rng.cu"), &[("THREADS", 32)], "rng_probe").map_err(|e| e.to_string())?;
    let context = &CudaContext::new(Box::new(emulator)).map_err(|e| e.to_string())?;
    let counters = counters();
    let n = counters.len();
    {
        let input = Array::new(context, &counters.concat());
        let (output, draws) = (Array::<u32>::fresh(context, 4 * n), Array::<f64>::fresh(context, 2 * n));
        let rounded = Array::<u16>::fresh(context, n);
        let params = RngParams {
            counters: input.address(),
            words: output.address(),
            uniforms: draws.address(),
            rounded: rounded.address(),
            n: n as u32,
            padding: 0,
        };
        words(context.driver.launch(function, Launch::line((n as u32).div_ceil(32), 32), bytemuck::bytes_of(&params)))?;
        let (words, draws, rounded) = (output.read()?, draws.read()?, rounded.read()?);
        for (i, (_, answer)) in KNOWN.iter().enumerate() {
            if words[4 * i..4 * i + 4] != *answer {
                return Err(format!("known answer {i}: {:x?}", &words[4 * i..4 * i + 4]));
            }
        }
        for (i, c) in counters.iter().enumerate() {
            let key = DrawKey {
                seed: u64::from(c[5]) << 32 | u64::from(c[4]),
                sample: c[3],
                stage: (c[2] >> 24) as u8,
                block: c[2] & 0xff_ffff,
                step: c[1],
                position: c[0],
            };
            let twin = uniforms(key);
            if [twin.token, twin.order] != draws[2 * i..2 * i + 2] {
                return Err(format!("{key:?}: {:?}, rng.rs has {twin:?}", &draws[2 * i..2 * i + 2]));
            }
            let value = f32::from_bits(c[0]);
            // Every NaN becomes the one that the instruction gives.
            let expected = if value.is_nan() { 0x7fff } else { bf16::from_f32(value).to_bits() };
            if rounded[i] != expected {
                return Err(format!("bf16 of {:#010x}: {:#06x}, expected {expected:#06x}", c[0], rounded[i]));
            }
        }
    }
    Ok(())
}

#[test]
fn device_words_equal_the_published_ones() {
    holds(None).unwrap();
}
