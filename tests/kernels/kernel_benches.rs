//! `kernels run` runs every kernel: random inputs of the right shapes, finite results, the same on
//! every device.

use std::collections::BTreeSet;

use redraft::backend::DType;
use redraft::backend::group_blocks::Bits;
use redraft::cuda::{BenchRequest, bench_kernel, kernels_list};

use crate::emulator::any_machine;

#[test]
fn every_launcher_runs_alone() {
    let context = any_machine();
    let names: BTreeSet<&str> = kernels_list().iter().map(|kernel| kernel.run).collect();
    assert!(names.len() >= 10, "{names:?}");
    let nucleus = ["top_p_percent=90".to_owned()];
    let layer = ["rms=2".to_owned()];
    let request = names.into_iter().map(|name| (name, &[][..])).chain([("copy", &[][..]), ("sample", &nucleus), ("norm", &layer)]);
    for (name, shape) in request {
        for dtype in [DType::F32, DType::Bf16] {
            let request = BenchRequest { name, shape, dtype, weights: None, repeat: 2, plain: dtype == DType::F32, small: true };
            let report = bench_kernel(&context, &request).unwrap_or_else(|e| panic!("{name} {shape:?} {}: {e}", dtype.name()));
            assert!(report.launches == 1 && report.sets == 1 && report.bytes > 0 && report.median_us > 0.0, "{report:?}");
        }
    }
}

/// Other bytes where weights are in groups, and an error of kernels that have none.
#[test]
fn weights_in_groups_run_alone() {
    let context = any_machine();
    for name in ["embed", "linear", "moe", "sample", "sample_shortlist", "shortlist"] {
        let of = |weights| BenchRequest { name, shape: &[], dtype: DType::Bf16, weights, repeat: 1, plain: false, small: true };
        let bytes = [None, Some(Bits::Eight), Some(Bits::Four)].map(|weights| bench_kernel(&context, &of(weights)).unwrap().bytes);
        // Ragged blocks may be larger than the floats were.
        assert!(bytes[1] > bytes[2] && bytes[1] != bytes[0], "{name}: {bytes:?}");
    }
    let weights = Some(Bits::Four);
    let request = BenchRequest { name: "norm", shape: &[], dtype: DType::Bf16, weights, repeat: 1, plain: false, small: true };
    let error = bench_kernel(&context, &request).unwrap_err().to_string();
    assert!(error.contains("norm reads no weights in groups"), "{error}");
}
