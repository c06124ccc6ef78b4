//! `embed` copies rows exactly, whatever their width and alignment.

use half::bf16;
use redraft::cuda::params::EmbedParams;

use crate::emulator::{Emulated, Guarded, SCHEDULES, noise, same_bits};

const VOCAB: usize = 11;
/// The first and last row, a repeated one, and one id outside the vocabulary.
const IDS: [u32; 5] = [3, 0, VOCAB as u32 - 1, VOCAB as u32, 3];

pub fn holds(kernels: &Emulated) -> Result<(), String> {
    // Vector and scalar paths, more and fewer elements than threads, odd widths.
    for width in [1, 3, 4, 64, 130, 512, 770] {
        let table = noise(1, VOCAB * width);
        let rounded: Vec<bf16> = table.iter().map(|v| bf16::from_f32(*v)).collect();
        let row = |source: &dyn Fn(usize) -> f32| -> Vec<f32> {
            let element =
                |id: u32, i: usize| if id as usize >= VOCAB { f32::from_bits(0x7fc0_0000) } else { source(id as usize * width + i) };
            IDS.iter().flat_map(|id| (0..width).map(move |i| element(*id, i))).collect()
        };
        let (exact, widened) = (row(&|i| table[i]), row(&|i| rounded[i].to_f32()));
        for (schedule, skew) in SCHEDULES.into_iter().zip([0, 1, 0, 2]) {
            let mut ids = Guarded::new(&IDS);
            let mut table = Guarded::skewed(&table, skew);
            let mut rounded = Guarded::skewed(&rounded, skew);
            for (entry, address, expected) in [("embed_f32", table.address(), &exact), ("embed_bf16", rounded.address(), &widened)] {
                let mut out = Guarded::new(&vec![0f32; IDS.len() * width]);
                let params =
                    EmbedParams { ids: ids.address(), table: address, out: out.address(), width: width as u32, vocab: VOCAB as u32 };
                // SAFETY: the struct of `embed`; the buffers have the shapes of its head and outlive the launch.
                unsafe { kernels.launch(entry, EmbedParams::launch(IDS.len() as u32), schedule, &params)? };
                same_bits(expected, &out.values()?, &format!("{entry}, width {width}, {schedule:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_copied_exactly() {
    holds(Emulated::shipped()).unwrap();
}
