//! Page-locked host memory between the caller's buffers and the device, so that a write neither
//! waits for the device nor holds on to its source.
//!
//! Writes fill segments of a ring one after the other; small ones share a segment. A segment is
//! used again once the copies out of it are over, which an event after its last copy tells. A
//! separate area takes small reads: a copy into ordinary memory would go through the driver's own
//! staging and cost one more wait.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

use crate::cuda::driver::interface::Address;
use crate::cuda::driver::libcuda::CudaFunctions;
use crate::error::Result;

/// Four of 4 MiB: while one is copied out the next is filled, and PCIe at 50 GB/s empties one in 80
/// us.
const SEGMENTS: usize = 4;
const SEGMENT_BYTES: usize = 4 << 20;
/// Summaries and sampled tokens of one step are far smaller; a download of logits is far larger.
const READBACK_BYTES: usize = 64 << 10;
const EVENT_DISABLE_TIMING: c_uint = CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;

/// What is done with the code of a call.
pub(in crate::cuda) type Check<'a> = dyn Fn(&str, c_int) -> Result<()> + 'a;

pub(in crate::cuda) struct Staging {
    /// SEGMENTS * SEGMENT_BYTES for writes, then READBACK_BYTES for reads.
    memory: *mut c_void,
    /// After the last copy out of each segment; not recorded before the first.
    events: [CUevent; SEGMENTS],
    busy: [bool; SEGMENTS],
    /// The segment being filled, and how much of it is taken.
    segment: usize,
    taken: usize,
}

impl Staging {
    /// None where the machine gives no page-locked memory; writes then take the slow way.
    pub(in crate::cuda) fn new(f: &CudaFunctions) -> Option<Staging> {
        let mut staging = Staging { memory: null_mut(), events: [null_mut(); SEGMENTS], busy: [false; SEGMENTS], segment: 0, taken: 0 };
        // SAFETY: the result is writable and the context is current.
        let mut good = unsafe { (f.mem_host_alloc)(&mut staging.memory, SEGMENTS * SEGMENT_BYTES + READBACK_BYTES, 0) } == 0;
        for event in &mut staging.events {
            // SAFETY: the result is writable and the context is current.
            good = good && unsafe { (f.event_create)(event, EVENT_DISABLE_TIMING) } == 0;
        }
        if good {
            return Some(staging);
        }
        staging.release(f);
        None
    }

    /// Enqueues a copy of `src` to `dst`.
    pub(in crate::cuda) fn write(&mut self, f: &CudaFunctions, stream: CUstream, dst: Address, src: &[u8], check: &Check) -> Result<()> {
        let mut done = 0;
        while done < src.len() {
            if self.taken == SEGMENT_BYTES {
                self.next_segment(f, stream, check)?;
            }
            let start = self.segment * SEGMENT_BYTES + self.taken;
            let bytes = (SEGMENT_BYTES - self.taken).min(src.len() - done);
            let place = self.memory.cast::<u8>().wrapping_add(start);
            // SAFETY: [start, start + bytes) lies in the current segment, and no copy out of this
            // part of it is under way: the part is untouched since the segment's event was waited
            // for. `dst` holds `src.len()` bytes by the caller's word.
            let code = unsafe {
                std::ptr::copy_nonoverlapping(src[done..].as_ptr(), place, bytes);
                (f.copy_to_device)(dst + done as u64, place.cast(), bytes, stream)
            };
            check("cuMemcpyHtoDAsync", code)?;
            done += bytes;
            // 256: whole lines, so that neighbours never share one with a copy under way.
            self.taken = (self.taken + bytes).next_multiple_of(256).min(SEGMENT_BYTES);
        }
        Ok(())
    }

    /// Closes the current segment with its event and waits until the next one is free.
    fn next_segment(&mut self, f: &CudaFunctions, stream: CUstream, check: &Check) -> Result<()> {
        // SAFETY: events and stream are live.
        check("cuEventRecord", unsafe { (f.event_record)(self.events[self.segment], stream) })?;
        self.busy[self.segment] = true;
        let next = (self.segment + 1) % SEGMENTS;
        if self.busy[next] {
            // SAFETY: the event is live and was recorded.
            check("cuEventSynchronize", unsafe { (f.event_synchronize)(self.events[next]) })?;
            self.busy[next] = false;
        }
        (self.segment, self.taken) = (next, 0);
        Ok(())
    }

    /// Staging memory for a small read, `None` for a large one.
    pub(in crate::cuda) fn readback(&mut self, bytes: usize) -> Option<&mut [u8]> {
        // SAFETY: the area after the segments holds READBACK_BYTES that the driver has mapped and,
        // as zeros or by a copy, initialised; only one borrow of it exists.
        (bytes <= READBACK_BYTES)
            .then(|| unsafe { std::slice::from_raw_parts_mut(self.memory.cast::<u8>().add(SEGMENTS * SEGMENT_BYTES), bytes) })
    }

    /// Gives everything back. The stream must be done with it.
    pub(in crate::cuda) fn release(self, f: &CudaFunctions) {
        for event in self.events.into_iter().filter(|event| !event.is_null()) {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (f.event_destroy)(event) };
        }
        if !self.memory.is_null() {
            // SAFETY: allocated in `new`, freed once.
            unsafe { (f.mem_free_host)(self.memory) };
        }
    }
}
