//! Reading a weight in parts, on all threads.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use crate::cpu::context::CpuContext;
use crate::error::{Error, Result};

/// Values that a thread reads at a time while weights are loaded: 1 MiB of f32, which stays in L2
/// until it is packed.
pub const READ_VALUES: usize = 1 << 18;

/// `fill(i, part, room)` writes part i, with `room` as scratch to read into.
type Fill<'a, T> = dyn Fn(usize, &mut [T], &mut Vec<f32>) -> Result<()> + Sync + 'a;

/// Fills `data` in parts of `part_len`, on all threads.
///
/// Errors: that of the first part that has one; some parts after it may not have been filled.
pub fn read_in_parts<T: Send>(context: &CpuContext, data: &mut [T], part_len: usize, fill: &Fill<T>) -> Result<()> {
    let rooms: Mutex<Vec<Vec<f32>>> = Mutex::default();
    let first_error: Mutex<Option<(usize, Error)>> = Mutex::default();
    // What a panic leaves there is complete: scratch holds nothing between parts.
    let failed = || first_error.lock().unwrap_or_else(PoisonError::into_inner);
    context.pool.chunks(data, part_len, &|i, part| {
        if failed().as_ref().is_some_and(|(at, _)| *at < i) {
            return;
        }
        let mut room = rooms.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if let Err(error) = fill(i, part, &mut room) {
            let mut failed = failed();
            if failed.as_ref().is_none_or(|(at, _)| i < *at) {
                *failed = Some((i, error));
            }
        }
        rooms.lock().unwrap_or_else(PoisonError::into_inner).push(room);
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}
