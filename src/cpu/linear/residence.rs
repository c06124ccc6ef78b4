//! Where weights are found when a forward comes to them: in L3, or in memory.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where all packed weights together exceed this, a forward finds them in memory and not in L3. Few
/// rows then ask for what they will read, [`AHEAD`] in advance: 39 GB/s instead of 33 on one core
/// at four rows (f32, AVX-512) and 1.2 to 1.3 times as fast in groups of 4 and 8 bits (AVX2, one to
/// four rows), but up to a fifth slower from L3.
const STREAM_WORDS: usize = 8 << 20;

/// Words between what is read and what is asked for.
pub const AHEAD: usize = 4096 / size_of::<u32>();

/// Counts the words of one packed weight among those of all in a context, as long as it lives.
pub struct Residence {
    words: usize,
    all: Arc<AtomicUsize>,
}

impl Residence {
    pub fn new(all: &Arc<AtomicUsize>, words: usize) -> Residence {
        all.fetch_add(words, Ordering::Relaxed);
        Residence { words, all: all.clone() }
    }

    /// Whether weights come from memory.
    pub fn streams(&self) -> bool {
        self.all.load(Ordering::Relaxed) > STREAM_WORDS
    }
}

impl Drop for Residence {
    fn drop(&mut self) {
        self.all.fetch_sub(self.words, Ordering::Relaxed);
    }
}
