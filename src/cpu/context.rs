//! What the ops share: the instruction set, the threads, and scratch memory.
#![forbid(unsafe_code)]

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::rope::Rotations;
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Pool;
use crate::cpu::simd::Isa;

/// Microseconds of work below which sharing it costs more than it saves. A worker that is awake
/// joins within one where the cores share a cache and takes several where they do not, and what it
/// wrote has to come back.
const INLINE_US: usize = 2;

/// What the ops share: instructions, threads, scratch memory.
pub(super) struct CpuContext {
    pub(super) isa: Isa,
    pub(super) pool: Pool,
    pub(super) serial: Pool,
    /// Bytes of a core's L2.
    pub(super) l2_bytes: usize,
    /// Words of all packed weights that live.
    pub(super) packed_words: Arc<AtomicUsize>,
    /// x as words, of the product that runs.
    pub(super) words: Mutex<Aligned<u32>>,
    /// Logits of a chunk of rows.
    pub(super) logits: Mutex<Aligned<f32>>,
    pub(super) rotations: Mutex<Rotations>,
    /// One for each thread that was ever inside attention at once.
    pub(super) attention_states: Mutex<Vec<AttentionState>>,
    /// Empty lists of indices that ops fill, one for each that was ever in use at once.
    pub(super) spare_lists: Mutex<Vec<Vec<usize>>>,
    /// One for each thread that was ever inside a nucleus at once: as long as the vocabulary.
    pub(super) spare_rows: Mutex<Vec<Vec<f32>>>,
}

impl CpuContext {
    /// The threads where `work` multiply-adds are worth it, the calling thread alone where not.
    pub(super) fn pool_for(&self, work: usize) -> &Pool {
        if work < INLINE_US * self.isa.multiply_adds_per_us() { &self.serial } else { &self.pool }
    }

    // Scratch holds nothing between calls, so a panic that poisoned it did no damage.
    pub(super) fn words(&self) -> MutexGuard<'_, Aligned<u32>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn logits(&self) -> MutexGuard<'_, Aligned<f32>> {
        self.logits.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn attention_state(&self) -> AttentionState {
        self.attention_states.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }
    pub(super) fn keep_attention_state(&self, state: AttentionState) {
        self.attention_states.lock().unwrap_or_else(PoisonError::into_inner).push(state);
    }
    /// An empty list with the room of earlier ones.
    pub(super) fn spare_list(&self) -> Vec<usize> {
        self.spare_lists.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }
    pub(super) fn keep_spare_list(&self, mut list: Vec<usize>) {
        list.clear();
        self.spare_lists.lock().unwrap_or_else(PoisonError::into_inner).push(list);
    }
    pub(super) fn spare_row(&self) -> Vec<f32> {
        self.spare_rows.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }
    pub(super) fn keep_spare_row(&self, row: Vec<f32>) {
        self.spare_rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
    }
    pub(super) fn rotations(&self) -> MutexGuard<'_, Rotations> {
        self.rotations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Scratch of a task: the running state of its queries, and one register tile's scores. Kept
/// between tasks.
#[derive(Default)]
pub(super) struct AttentionState {
    /// (queries, key steps) q as words
    pub(super) q: Aligned<u32>,
    /// (queries, D padded) sums of exponentials times values
    pub(super) sums: Aligned<f32>,
    /// (queries) largest score so far
    pub(super) max: Vec<f32>,
    /// (queries) sum of exponentials
    pub(super) mass: Vec<f32>,
    /// (6, 64) scores, then their exponentials
    pub(super) scores: Aligned<f32>,
    /// (6, 32) exponentials as bf16 pairs
    pub(super) pairs: Aligned<u32>,
    /// (D padded) the last pair of values with its second half masked
    pub(super) last_pair: Aligned<u32>,
}
