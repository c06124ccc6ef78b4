//! Reports about the kernels: what there is, and what compiling it costs.
#![forbid(unsafe_code)]

use serde::Serialize;

use crate::cuda::driver::compile::Compiled;
use crate::cuda::driver::source::{Kernel, constants, kernels};
use crate::cuda::kernels::builds::{CompiledBuild, builds, compile_all};
use crate::cuda::kernels::kernel_bench::KernelBench;
use crate::cuda::kernels::kernel_benches::KERNEL_BENCHES;
use crate::error::Result;

/// What `redraft kernels list` prints about one kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelInfo {
    pub stem: &'static str,
    pub entries: Vec<&'static str>,
    /// One line of constants for each build that `check` compiles.
    pub builds: Vec<String>,
    pub hash: String,
    /// Name under which `kernels run` runs it, alone or with the kernels of the same launcher, and
    /// the shape that it has by default.
    pub run: &'static str,
    pub shape: String,
    /// The first paragraph of its header comment, as one line.
    pub summary: String,
}

/// The kernels that this binary carries. Needs no library.
pub fn kernels_list() -> Vec<KernelInfo> {
    let part_of = |kernel: &Kernel, name: &str| kernel.stem.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    // `sample_shortlist` has a launcher of its own and is no part of `sample`.
    let bench = |kernel: &Kernel| KERNEL_BENCHES.iter().filter(|bench| part_of(kernel, bench.name)).max_by_key(|bench| bench.name.len());
    let info = |kernel: Kernel| KernelInfo {
        stem: kernel.stem,
        entries: kernel.entries(),
        builds: builds().iter().filter(|build| build.stem == kernel.stem).map(constants).collect(),
        hash: format!("{:016x}", kernel.hash),
        run: bench(&kernel).map_or("", |bench| bench.name),
        shape: bench(&kernel).map(KernelBench::defaults).unwrap_or_default(),
        summary: summary(kernel.source),
    };
    kernels().into_iter().map(info).collect()
}

/// The first paragraph of a source's header comment, as one line.
fn summary(source: &str) -> String {
    let lines = source.lines().map_while(|line| line.strip_prefix("//")).map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// What `redraft kernels check` prints about one entry of one build on one architecture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelReport {
    pub stem: &'static str,
    pub entry: String,
    /// The constants of the build.
    pub build: String,
    pub arch: String,
    /// Threads of a CTA.
    pub threads: u32,
    pub registers: u32,
    /// Spill stores and loads together; every kernel is written to have none.
    pub spill_bytes: u32,
    pub shared_bytes: u32,
    pub stack_bytes: u32,
    /// Of the whole file, which all its entries share.
    pub cubin_bytes: usize,
    pub compile_ms: f64,
}

/// Compiles every build for every architecture named, and reports in that order. All names are
/// checked before the first compilation.
pub fn kernels_check(archs: &[String]) -> Result<Vec<KernelReport>> {
    let builds = builds();
    let compiled = compile_all(archs, &builds)?;
    let reports = compiled.into_iter().flat_map(|CompiledBuild { arch, build, compiled: Compiled { cubin, entries, compile_ms, .. } }| {
        entries.into_iter().map(move |used| KernelReport {
            stem: build.stem,
            entry: used.entry,
            build: constants(build),
            arch: arch.to_owned(),
            threads: used.threads,
            registers: used.registers,
            spill_bytes: used.spill_bytes,
            shared_bytes: used.shared_bytes,
            stack_bytes: used.stack_bytes,
            cubin_bytes: cubin.len(),
            compile_ms,
        })
    });
    Ok(reports.collect())
}

/// Registers of a multiprocessor, on every architecture from sm_80 on.
const REGISTERS: u32 = 65_536;
/// Shared memory that a CTA may have on the smallest of them (sm_86, sm_89, sm_120).
const SHARED_BYTES: u32 = 99 << 10;

/// The most registers that entries of these names may use, where fewer than a whole
/// multiprocessor's share are part of the design. The longest matching name counts.
const REGISTER_BUDGETS: [(&str, u32); 15] = [
    ("embed", 40),
    ("gather", 32),
    ("guidance", 32),
    ("moe_combine", 40),
    ("norm", 64),
    ("remask", 48),
    ("rope_append", 40),
    ("route", 40),
    ("route_choose", 72),
    ("sample_draw", 128),
    ("sample_nucleus", 64),
    ("sample_shortlist", 96),
    ("select_masked", 40),
    ("shortlist", 48),
    ("unmask", 48),
];

/// The most registers that a thread of `entry` may use: its budget, else what lets one CTA run.
fn register_budget(entry: &str, threads: u32) -> u32 {
    let named = REGISTER_BUDGETS.iter().filter(|(name, _)| entry.starts_with(name)).max_by_key(|(name, _)| name.len());
    named.map_or_else(|| (REGISTERS / threads.max(1)).min(255), |(_, registers)| *registers)
}

/// What is over budget: no kernel spills or uses local memory, and a CTA of each fits every
/// architecture.
pub fn over_budget(reports: &[KernelReport]) -> Vec<String> {
    let lines = |r: &KernelReport| {
        let budget = register_budget(&r.entry, r.threads);
        let rules = [
            (r.spill_bytes > 0, format!("spills {} bytes of registers", r.spill_bytes)),
            (r.stack_bytes > 0, format!("has a stack of {} bytes", r.stack_bytes)),
            (r.registers > budget, format!("uses {} registers of {budget}", r.registers)),
            (
                r.registers * r.threads > REGISTERS,
                format!("asks for {} threads of {} registers, more than there are", r.threads, r.registers),
            ),
            (r.shared_bytes > SHARED_BYTES, format!("has {} bytes of shared memory of {SHARED_BYTES}", r.shared_bytes)),
        ];
        let head = format!("{} [{}] on {}", r.entry, r.build, r.arch);
        rules.into_iter().filter(|(broken, _)| *broken).map(move |(_, what)| format!("{head} {what}")).collect::<Vec<_>>()
    };
    reports.iter().flat_map(lines).collect()
}

/// The list as aligned text.
pub fn list_table(list: &[KernelInfo]) -> String {
    let row = |k: &KernelInfo| {
        vec![
            k.stem.into(),
            k.entries.join(" "),
            k.builds.join("; "),
            k.hash.clone(),
            format!("{} --shape {}", k.run, k.shape),
            k.summary.clone(),
        ]
    };
    table(&["kernel", "entries", "builds", "hash", "kernels run", "what"], list.iter().map(row))
}

/// The report as aligned text.
pub fn report_table(reports: &[KernelReport]) -> String {
    let row = |r: &KernelReport| {
        let numbers = [r.threads, r.registers, r.spill_bytes, r.shared_bytes, r.stack_bytes].map(|n| n.to_string());
        let mut cells = vec![r.entry.clone(), r.build.clone(), r.arch.clone()];
        cells.extend(numbers);
        cells.extend([r.cubin_bytes.to_string(), format!("{:.0}", r.compile_ms)]);
        cells
    };
    table(
        &["entry", "build", "arch", "threads", "registers", "spill B", "shared B", "stack B", "cubin B", "compile ms"],
        reports.iter().map(row),
    )
}

/// Columns as wide as their widest cell; numbers are aligned right.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = head.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = rows[0].len();
    let widths: Vec<usize> = (0..columns).map(|c| rows.iter().map(|row| row[c].len()).max().unwrap_or(0)).collect();
    let is_number: Vec<bool> = (0..columns).map(|c| rows.len() > 1 && rows[1..].iter().all(|row| row[c].parse::<f64>().is_ok())).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(c, cell)| {
            let width = widths[c];
            if is_number[c] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_complete() {
        let list = kernels_list();
        assert_eq!(
            list.iter().map(|k| k.stem).collect::<Vec<_>>(),
            [
                "attention",
                "embed",
                "gather",
                "guidance",
                "linear",
                "moe",
                "moe_combine",
                "norm",
                "remask",
                "rope_append",
                "route",
                "sample_draw",
                "sample_nucleus",
                "sample_shortlist",
                "sample_tiles",
                "select_masked",
                "shortlist",
                "unmask"
            ]
        );
        for kernel in &list {
            assert!(!kernel.entries.is_empty() && !kernel.builds.is_empty(), "{}", kernel.stem);
            assert!(!kernel.run.is_empty() && !kernel.shape.is_empty(), "{}: no entry of KERNEL_BENCHES", kernel.stem);
            assert!(kernel.entries.iter().all(|entry| entry.starts_with(kernel.stem)), "{}: {:?}", kernel.stem, kernel.entries);
            assert!(kernel.summary.starts_with(&format!("{}: ", kernel.stem)), "{}: {:?}", kernel.stem, kernel.summary);
        }
        let run_of = |stem: &str| list.iter().find(|kernel| kernel.stem == stem).map(|kernel| kernel.run);
        assert_eq!((run_of("sample_draw"), run_of("sample_shortlist")), (Some("sample"), Some("sample_shortlist")));
        let norm = list.iter().find(|kernel| kernel.stem == "norm").expect("norm");
        assert_eq!(norm.entries, ["norm_layer_f32", "norm_layer_bf16", "norm_rms_f32", "norm_rms_bf16"]);
    }

    fn report() -> KernelReport {
        KernelReport {
            stem: "remask",
            entry: "remask".into(),
            build: "THREADS=256".into(),
            arch: "sm_90a".into(),
            threads: 256,
            registers: 32,
            spill_bytes: 0,
            shared_bytes: 1064,
            stack_bytes: 0,
            cubin_bytes: 9000,
            compile_ms: 31.4,
        }
    }

    #[test]
    fn tables_align() {
        let text = report_table(&[report()]);
        assert_eq!(
            text,
            "entry   build        arch    threads  registers  spill B  shared B  stack B  cubin B  compile ms\n\
             remask  THREADS=256  sm_90a      256         32        0      1064        0     9000          31\n"
        );
        assert!(list_table(&kernels_list()).lines().count() == kernels().len() + 1);
    }

    #[test]
    fn budgets() {
        assert!(over_budget(&[report()]).is_empty());
        let broken = [
            (KernelReport { spill_bytes: 8, ..report() }, "remask [THREADS=256] on sm_90a spills 8 bytes of registers"),
            (KernelReport { stack_bytes: 16, ..report() }, "remask [THREADS=256] on sm_90a has a stack of 16 bytes"),
            (KernelReport { registers: 49, ..report() }, "remask [THREADS=256] on sm_90a uses 49 registers of 48"),
            (
                KernelReport { shared_bytes: 101_377, ..report() },
                "remask [THREADS=256] on sm_90a has 101377 bytes of shared memory of 101376",
            ),
            (
                KernelReport { entry: "other".into(), registers: 200, threads: 384, ..report() },
                "other [THREADS=256] on sm_90a asks for 384 threads of 200 registers, more than there are",
            ),
        ];
        for (report, line) in broken {
            assert_eq!(over_budget(&[report]).last().map(String::as_str), Some(line));
        }
        assert_eq!([register_budget("embed_f32", 128), register_budget("unnamed", 512), register_budget("unnamed", 32)], [40, 128, 255]);
    }
}
