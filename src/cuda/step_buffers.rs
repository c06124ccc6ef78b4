//! Buffers of a run's current step at fixed addresses, which recorded graphs hold.
#![forbid(unsafe_code)]

use crate::cuda::context::{CudaContext, Memory};
use crate::cuda::driver::interface::Address;
use crate::error::Result;

/// The buffers of a run's current step. Each grows when it must, which outdates every recorded
/// graph.
#[derive(Default)]
pub(super) struct StepBuffers {
    pub(super) canvas: StepBuffer,
    pub(super) arrays: StepBuffer,
    pub(super) draws: StepBuffer,
    pub(super) sampled: StepBuffer,
    pub(super) summaries: StepBuffer,
}

#[derive(Default)]
pub(super) struct StepBuffer(pub(super) Option<Memory>);

impl StepBuffer {
    /// Its address, with capacity for `bytes`.
    pub(super) fn reserve(&mut self, context: &CudaContext, bytes: usize) -> Result<Address> {
        if self.0.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.0 = None;
            self.0 = Some(context.memory(bytes.next_power_of_two().max(1 << 14))?);
            context.moved();
        }
        Ok(self.0.as_ref().expect("just made").address())
    }
}
