//! Sizes of pools on the device. The CPU's tests try every length from 1 to 300; emulation is some
//! hundred times slower, so lengths around the ends of blocks and pages are tried here.

use redraft::DType;

use crate::backends;
use crate::support::{every_length, independent_presets};

#[test]
fn lengths_around_blocks_and_pages_are_served() {
    for preset in independent_presets() {
        let backend = || backends(DType::F32).pop().expect("one machine at least");
        every_length(backend, preset, 32, [1, 13, 28, 29, 30, 45].into_iter(), |_| true);
    }
}
