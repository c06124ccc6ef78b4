//! `redraft kernels`: what the CUDA kernels are, and what NVRTC makes of them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use crate::api::Device;
use crate::backend::group_blocks::Bits;
use crate::backend::{NumberTypes, WeightFormat};
use crate::cli::files::read_text;
use crate::cli::flags::{DTypeFlag, Format, WeightsFlag};
use crate::cli::terminal::{Piped, print};
use crate::cuda;
use crate::cuda::context::CudaContext;
use crate::error::{Error, Result};

#[derive(Subcommand)]
pub(super) enum Command {
    /// The kernels that are built in
    List {
        /// table or json
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Compile every kernel with NVRTC and fail on any register spill, stack or broken budget
    Check {
        /// Architectures, comma separated
        #[arg(long, value_delimiter = ',', default_value = "sm_80,sm_86,sm_89,sm_90a,sm_100,sm_120")]
        arch: Vec<String>,
        /// Print registers, spills, shared memory and compile time of every entry
        #[arg(long)]
        report: bool,
        /// table or json
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Compile kernels into a directory that a GPU machine uses through REDRAFT_KERNELS_DIR,
    /// without NVRTC
    Build {
        /// Architectures, comma separated, as in sm_90a
        #[arg(long, value_delimiter = ',', required = true)]
        arch: Vec<String>,
        /// The directory, made where it is not there
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Builds beside those that `list` prints, one a line, as REDRAFT_KERNEL_LOG records them;
        /// - is stdin
        #[arg(long, value_name = "FILE")]
        list: Option<PathBuf>,
    },
    /// Run kernels alone in a loop, over random inputs, and time them
    Run(RunFlags),
}

#[derive(Args)]
pub(super) struct RunFlags {
    /// Which kernel; `redraft kernels list` says which there are and what shapes they have
    #[arg(required_unless_present = "list")]
    name: Option<String>,
    /// Kernels to run one after the other in this process, a line each: NAME [KEY=VAL,...]
    /// [dtype=bf16|f32] [weights=q8|q4]; - is stdin. Prints one JSON object a line, with "error"
    /// where a kernel failed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "shape", "format"])]
    list: Option<PathBuf>,
    /// Numbers of the shape, where the defaults do not fit
    #[arg(long, value_name = "KEY=VAL,...", value_delimiter = ',')]
    shape: Vec<String>,
    /// Type of activations, weights and K/V, where a line names none
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DTypeFlag,
    /// Format of weights, where it is another and a line names none
    #[arg(long, value_enum)]
    weights: Option<WeightsFlag>,
    /// cuda, cuda:INDEX, or emu[:ARCH]: the same kernels on the host, for correctness and not for
    /// speed
    #[arg(long, default_value = "cuda", value_parser = parse_place)]
    device: Place,
    /// Timed batches of launches
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000), allow_negative_numbers = true)]
    repeat: u32,
    /// Launch one by one instead of from a graph, for profilers that look at single launches
    #[arg(long)]
    plain: bool,
    /// A small shape, launched once per batch, for tools that slow kernels down
    #[arg(long)]
    small: bool,
    /// table or json
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// A machine that runs kernels.
#[derive(Clone, Copy)]
enum Place {
    Cuda(usize),
    Emu(&'static str),
}

fn parse_place(text: &str) -> Result<Place, String> {
    match text.parse::<Device>() {
        Ok(Device::Cuda(ordinal)) => Ok(Place::Cuda(ordinal)),
        Ok(Device::Emu(arch)) => Ok(Place::Emu(arch)),
        Ok(_) => Err("expected cuda, cuda:INDEX or emu[:ARCH]".into()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::List { format } => {
            let kernels = cuda::kernels_list();
            let text = if format == Format::Json { to_json(&kernels) } else { cuda::list_table(&kernels) };
            print(&text)?;
        }
        Command::Check { arch, report, format } => {
            let reports = cuda::kernels_check(&arch)?;
            if format == Format::Json {
                print(&to_json(&reports))?;
            } else if report {
                print(&cuda::report_table(&reports))?;
            } else {
                print(&format!("{} entries over {} compile\n", reports.len(), arch.join(", ")))?;
            }
            let over = cuda::over_budget(&reports);
            if !over.is_empty() {
                return Err(Error::kernel(format!("over budget:\n  {}", over.join("\n  "))));
            }
        }
        Command::Build { arch, out, list } => build(&arch, &out, list.as_deref())?,
        Command::Run(asked) => match &asked.list {
            Some(list) => bench_list(&asked, list)?,
            None => bench_kernel(&asked)?,
        },
    }
    Ok(())
}

fn build(archs: &[String], out: &Path, list: Option<&Path>) -> Result<()> {
    let start = Instant::now();
    let mut builds = cuda::builds();
    if let Some(list) = list {
        let named = cuda::parse_builds(&read_text(list)?).map_err(|error| in_file(list, error))?;
        builds.extend(named.into_iter().filter(|build| !cuda::builds().contains(build)));
    }
    let (files, bytes) = cuda::kernels_build(archs, &builds, out)?;
    let (mib, seconds) = (bytes as f64 / f64::from(1 << 20), start.elapsed().as_secs_f64());
    print(&format!("{}: {} kernels for {}, {mib:.1} MiB, {seconds:.1} s\n", out.display(), files.len(), archs.join(", "))).map(drop)
}

/// The error of a line, with the file in front.
fn in_file(file: &Path, error: Error) -> Error {
    match error {
        Error::Request { what } => Error::request(format!("{}: {what}", file.display())),
        other => other,
    }
}

fn context(place: Place) -> Result<CudaContext> {
    CudaContext::new(match place {
        Place::Cuda(ordinal) => Box::new(cuda::Gpu::open(ordinal)?),
        Place::Emu(arch) => cuda::emulated(arch, None)?,
    })
}

/// A line of a list: a kernel, changes to its shape, a type.
#[derive(Debug, PartialEq)]
struct ListLine<'a> {
    number: usize,
    text: &'a str,
    name: &'a str,
    shape: Vec<String>,
    /// As typed; none where the line names none.
    dtype: Option<&'a str>,
    /// The same.
    weights: Option<&'a str>,
}

/// Lines that are neither empty nor a `#` comment.
fn lines_of<'a>(text: &'a str) -> Vec<ListLine<'a>> {
    let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.split('#').next().unwrap_or_default().trim()));
    let parse = |(number, text): (usize, &'a str)| {
        let mut words = text.split_whitespace();
        let name = words.next().unwrap_or_default();
        let pairs: Vec<&str> = words.flat_map(|word| word.split(',')).filter(|pair| !pair.is_empty()).collect();
        let last = |key: &str| pairs.iter().filter_map(|pair| pair.strip_prefix(key)).next_back();
        let (dtype, weights) = (last("dtype="), last("weights="));
        let is_number = |pair: &&&str| !pair.starts_with("dtype=") && !pair.starts_with("weights=");
        let shape = pairs.iter().filter(is_number).map(|pair| pair.to_string()).collect();
        ListLine { number, text, name, shape, dtype, weights }
    };
    lines.filter(|(_, text)| !text.is_empty()).map(parse).collect()
}

/// Runs the kernels of a list in one process. Each line is an object on stdout as soon as it is
/// measured.
///
/// Errors: [`Error::Kernel`] at the end, where a line failed.
fn bench_list(asked: &RunFlags, list: &Path) -> Result<()> {
    let text = read_text(list)?;
    let lines = lines_of(&text);
    if lines.is_empty() {
        return Err(Error::request(format!(
            "{}: expected lines such as `linear rows=8,n=768,k=768 dtype=bf16`, found none",
            list.display()
        )));
    }
    let context = context(asked.device)?;
    let run = |line: &ListLine| -> Result<cuda::Report> {
        let dtype = match line.dtype {
            None => asked.dtype,
            Some(name) => DTypeFlag::from_str(name, false).map_err(|_| Error::request(format!("dtype={name}: expected bf16 or f32")))?,
        };
        let weights = match line.weights {
            None => asked.weights.map(WeightFormat::from),
            Some(name) => Some(name.parse::<WeightFormat>()?),
        };
        let (name, shape, weights) = (line.name, &line.shape[..], bits_of(dtype, weights)?);
        let RunFlags { repeat, plain, small, .. } = *asked;
        cuda::bench_kernel(&context, &cuda::BenchRequest { name, shape, dtype: dtype.into(), weights, repeat, plain, small })
    };
    let mut failed = 0;
    for line in &lines {
        let report = match run(line) {
            Ok(report) => json!(report),
            Err(error) => {
                failed += 1;
                json!({ "line": line.number, "text": line.text, "error": error.to_string() })
            }
        };
        if print(&format!("{report}\n"))? == Piped::Closed {
            return Ok(());
        }
    }
    if failed > 0 {
        return Err(Error::kernel(format!("{}: {failed} of {} lines failed", list.display(), lines.len())));
    }
    Ok(())
}

fn bench_kernel(asked: &RunFlags) -> Result<()> {
    let RunFlags { name, shape, repeat, plain, small, .. } = asked;
    let name = name.as_deref().expect("clap demands a name or a list");
    let weights = bits_of(asked.dtype, asked.weights.map(WeightFormat::from))?;
    let bench = cuda::BenchRequest { name, shape, dtype: asked.dtype.into(), weights, repeat: *repeat, plain: *plain, small: *small };
    bench.check()?;
    let report = cuda::bench_kernel(&context(asked.device)?, &bench)?;
    let text = if asked.format == Format::Json {
        to_json(&report)
    } else {
        let cuda::Report { kernel, median_us, best_us, gb_per_s, gflop_per_s, launches, sets, repeat, device, .. } = &report;
        let shape = serde_json::to_string(&report.shape).expect("plain data");
        format!(
            "{kernel} {shape} on {device}\n\
             median {median_us:.2} us, best {best_us:.2} us, {gb_per_s:.0} GB/s, {gflop_per_s:.0} GFLOP/s \
             ({repeat} batches of {launches} launches, {sets} sets of buffers)\n"
        )
    };
    print(&text).map(drop)
}

/// The bits of weights in groups; none for floats, which are of the dtype.
fn bits_of(dtype: DTypeFlag, weights: Option<WeightFormat>) -> Result<Option<Bits>> {
    let types = NumberTypes::of(Some(dtype.into()), weights, || Ok(dtype.into()))?;
    types.weights.filter(|format| format.float().is_none()).map(Bits::of).transpose()
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).expect("plain data") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_list() {
        let text = "# at three shapes\nlinear\n\n  linear rows=8,n=768  dtype=f32 weights=q4 # few rows\ncopy mebibytes=1 dtype=bf16\n";
        let lines = lines_of(text);
        assert_eq!(
            lines.iter().map(|line| (line.number, line.name, line.dtype, line.weights)).collect::<Vec<_>>(),
            [(2, "linear", None, None), (4, "linear", Some("f32"), Some("q4")), (5, "copy", Some("bf16"), None),]
        );
        assert_eq!(lines.iter().map(|line| line.shape.join(" ")).collect::<Vec<_>>(), ["", "rows=8 n=768", "mebibytes=1"]);
        assert!(lines_of("\n # nothing\n").is_empty());
    }
}
