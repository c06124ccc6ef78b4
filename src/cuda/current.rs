//! Fixed places of a run's current step, which recorded graphs hold addresses of.
#![forbid(unsafe_code)]

use crate::cuda::context::{CudaContext, Memory};
use crate::cuda::driver::interface::Address;
use crate::error::Result;

/// The fixed places of a run's current step. Each grows when it must, which outdates every recorded
/// graph.
#[derive(Default)]
pub(super) struct Current {
    pub(super) canvas: Place,
    pub(super) arrays: Place,
    pub(super) draws: Place,
    pub(super) sampled: Place,
    pub(super) summaries: Place,
}

#[derive(Default)]
pub(super) struct Place(pub(super) Option<Memory>);

impl Place {
    /// Its address, with room for `bytes`.
    pub(super) fn reserve(&mut self, context: &CudaContext, bytes: usize) -> Result<Address> {
        if self.0.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.0 = None;
            self.0 = Some(context.memory(bytes.next_power_of_two().max(1 << 14))?);
            context.moved();
        }
        Ok(self.0.as_ref().expect("just made").address())
    }
}
