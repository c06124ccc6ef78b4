//! `kernels run` runs every kernel: random inputs of the right shapes, finite results, the same on
//! every device.

use std::collections::BTreeSet;

use redraft::backend::DType;
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
            let request = BenchRequest { name, shape, dtype, repeat: 2, plain: dtype == DType::F32, small: true };
            let report = bench_kernel(&context, &request).unwrap_or_else(|e| panic!("{name} {shape:?} {}: {e}", dtype.name()));
            assert!(report.launches == 1 && report.sets == 1 && report.bytes > 0 && report.median_us > 0.0, "{report:?}");
        }
    }
}
