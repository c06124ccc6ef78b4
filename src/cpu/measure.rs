//! Ceilings of the CPU: one product, and memory that all threads read.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::Cpu;
use crate::backend::measure::{Ceilings, Measure, product_rate};
use crate::error::Result;

impl Measure for Cpu {
    /// All threads read their part, often enough that starting them does not count.
    fn ceilings(&self, weight_bytes: usize) -> Result<Ceilings> {
        const PRODUCT: [usize; 3] = [512, 3072, 768];
        // Up to 512 MiB: beyond that the rate no longer depends on the size.
        let bytes = weight_bytes.clamp(1 << 20, 1 << 29);
        let words = vec![1u64; bytes.div_ceil(8).max(1)];
        let threads = self.context.pool.threads();
        let repeats = ((1usize << 27) / words.len()).max(1);
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let start = Instant::now();
            let sum: u64 = std::thread::scope(|scope| {
                let read = |part: &[u64]| (0..repeats).map(|_| std::hint::black_box(part).iter().sum::<u64>()).sum::<u64>();
                let parts: Vec<_> = words.chunks(words.len().div_ceil(threads)).map(|part| scope.spawn(move || read(part))).collect();
                parts.into_iter().map(|part| part.join().expect("summing does not panic")).sum()
            });
            best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
            assert_eq!(sum, (words.len() * repeats) as u64);
        }
        Ok(Ceilings {
            matrix_flop_per_s: product_rate(self, PRODUCT, 8)?,
            matrix: "512 x 768 x 3072".into(),
            bytes_per_s: 8.0 * words.len() as f64 / best,
            traffic: format!("{} MiB read", bytes >> 20),
        })
    }
}
