//! Fixed places of a run's current step, which recorded graphs hold addresses of.
#![forbid(unsafe_code)]

use crate::cuda::driver::interface::Address;
use crate::cuda::machine::{Machine, Memory};
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
    pub(super) fn reserve(&mut self, machine: &Machine, bytes: usize) -> Result<Address> {
        if self.0.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.0 = None;
            self.0 = Some(machine.memory(bytes.next_power_of_two().max(1 << 14))?);
            machine.moved();
        }
        Ok(self.0.as_ref().expect("just made").address())
    }
}
