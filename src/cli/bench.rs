//! `redraft bench`: where the time of a schedule goes, by stage, over presets, batch sizes and
//! lengths.
//!
//! Every figure is a median over `--runs` runs after one warm-up; end-of-text is ignored so that
//! all runs do the same work. With `--quality` the command measures text instead, which is the
//! module `quality` beside this one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use crate::api::device::on_backend;
use crate::backend::measure::{Ceilings, Measure};
use crate::backend::{Backend, ExpertShape, HostReason};
use crate::cli::bench_flags::{BenchFlags, Forward};
use crate::cli::device::decoded_len;
use crate::cli::engine::{attach_joint, drain, load};
use crate::cli::files::{model_dir, write_atomically};
use crate::cli::flags::Format;
use crate::cli::quality;
use crate::cli::terminal::{Progress, print};
use crate::config::{Mlp, ModelConfig};
use crate::cpu::Cpu;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::{WeightRole, registry, shapes};
use crate::plan::Visibility;
use crate::request::{Output, Prompt, Request};
use crate::schedule::Schedule;
use crate::scoring::{TimedForward, Timing};

/// What is measured without `--preset` and `--stage`, where the model fills masks.
const DEFAULT_PRESETS: [&str; 3] = ["draft", "did", "did-fast"];

/// One measured configuration.
#[derive(Serialize)]
struct ScheduleTimes {
    schedule: String,
    batch: u32,
    length: u32,
    tokens_per_s: f64,
    total_ms: f64,
    first_token_ms: f64,
    /// Steps of the measured runs that the host sampled beside a device that samples, by reason.
    host_steps: BTreeMap<&'static str, usize>,
    stages: Vec<StageRow>,
}

/// One stage of one sample (the first of the batch; all do the same).
#[derive(Serialize)]
struct StageRow {
    block_len: String,
    kv: String,
    nfe: usize,
    forwards: usize,
    rows: usize,
    ms: f64,
    ms_per_forward: f64,
}

/// Times of a single forward, outside any schedule.
#[derive(Serialize)]
struct Probe {
    name: String,
    rows: usize,
    /// Of the first row.
    position: usize,
    /// Rows that draw a token. The key is that of published reports.
    #[serde(rename = "decided")]
    sampled: usize,
    top_p: f32,
    median_ms: f64,
    best_ms: f64,
    /// Launched from a recording, as many times between two waits; otherwise the host launches and
    /// waits for the sampled tokens.
    recorded: bool,
    launches: usize,
    /// Weight products of the layers and the head over all rows.
    gflop: f64,
    gflop_per_s: f64,
    /// What the products and the reading of the weights take at the measured ceilings, whichever is
    /// more.
    floor_ms: f64,
    /// Median over floor.
    times_floor: f64,
}

/// What this machine does at best, measured in the same run.
#[derive(Serialize)]
struct CeilingsRow {
    matrix_gflop_per_s: f64,
    /// Size of the product and what computed it.
    matrix: String,
    /// Plain reading (CPU, all threads) or copying (GPU, bytes read and written).
    read_gb_per_s: f64,
    read: String,
}

impl From<Ceilings> for CeilingsRow {
    fn from(found: Ceilings) -> Self {
        let Ceilings { matrix_flop_per_s, matrix, bytes_per_s, traffic } = found;
        CeilingsRow { matrix_gflop_per_s: matrix_flop_per_s / 1e9, matrix, read_gb_per_s: bytes_per_s / 1e9, read: traffic }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let mid = values.len() / 2;
    if values.len() % 2 == 1 { values[mid] } else { (values[mid - 1] + values[mid]) / 2.0 }
}

pub(super) fn run(mut flags: BenchFlags) -> Result<()> {
    if flags.quality.quality {
        return quality::run(&flags);
    }
    if let [_, second, ..] = &flags.model[..] {
        return Err(Error::request(format!("--model {}: more than one model goes with --quality only", second.display())));
    }
    if flags.batch.is_empty() {
        flags.batch = vec![1];
    }
    let (label, config) = match &flags.shape {
        Some(name) => (name.clone(), shapes::config(name)?),
        None => {
            let dir = model_dir(flags.model.first().map(PathBuf::as_path))?;
            (dir.display().to_string(), registry::read_config(&dir)?)
        }
    };
    if flags.preset.is_empty() && !flags.no_schedules {
        let presets = if config.is_autoregressive() { &["ar"][..] } else { &DEFAULT_PRESETS };
        flags.preset = presets.iter().map(|name| name.to_string()).collect();
    }
    let lengths = if flags.length.is_empty() { vec![(config.model_length - 1) as u32] } else { flags.length.clone() };
    let longest_forward = flags.forward.iter().map(|forward| forward.len()).max();
    let longest_text = *lengths.iter().max().expect("not empty") as usize + 1;
    let longest = match longest_forward {
        Some(forward) if flags.no_schedules => forward,
        forward => forward.unwrap_or(0).max(longest_text),
    };
    let most = *flags.batch.iter().max().expect("not empty") as usize;
    let defaults = Engine::<Cpu>::defaults(&config);
    let schedules: Vec<(String, Schedule)> = if flags.stage.is_empty() {
        flags.preset.iter().map(|p| Ok((p.clone(), Schedule::preset(p, &defaults)?))).collect::<Result<_>>()?
    } else {
        vec![("stages".into(), Schedule::resolve(&flags.stage, &defaults)?)]
    };
    schedules.iter().try_for_each(|(_, schedule)| Engine::<Cpu>::check_schedule(&[&config], schedule))?;
    config.check_len(longest)?;
    // A last block that is decoded to its end needs pages for all of it.
    let longest = schedules.iter().map(|(_, schedule)| decoded_len(schedule, longest_text)).fold(longest, usize::max);
    let mut options = flags.device.options(longest, most);
    // All samples of a batch run together: that is what a batch means here.
    options.budget.max_sequences = most;
    options.budget.max_rows = usize::MAX;
    let options = options.with_pages_for(longest);
    // Random weights of a shape have no directory.
    let checkpoint = flags.shape.is_none().then_some(config.dir.as_path());
    let types = flags.device.types(checkpoint)?.name();
    let Measured { device, load_ms, ceilings, probes, rows } = on_backend!(flags.device.backend(checkpoint)?, |backend| {
        let loading = Instant::now();
        let mut engine = match &flags.shape {
            Some(_) => Engine::random(config.clone(), backend, options)?,
            None => load(&config.dir, backend, options)?,
        };
        attach_joint(&mut engine, flags.joint.as_deref(), &config.dir, schedules.iter().map(|(_, schedule)| schedule))?;
        let load_ms = loading.elapsed().as_secs_f64() * 1e3;
        sweep(&mut engine, load_ms, &flags, &schedules, &lengths)?
    });
    if let Some(path) = &flags.plot {
        let svg = plot(&rows, &format!("{label}, {device}, {types}"));
        write_atomically(path, |out| out.write_all(svg.as_bytes()))?;
    }
    let text = if flags.format == Format::Json {
        format!(
            "{}\n",
            json!({"model": label, "device": device, "dtype": types, "runs": flags.runs, "load_ms": load_ms, "ceilings": ceilings, "forwards": probes, "rows": rows})
        )
    } else {
        let head = format!("{label}, {device}, {types}, loaded in {:.1} s, medians of {} runs", load_ms / 1e3, flags.runs);
        table(&head, &ceilings, &probes, &rows)
    };
    print(&text)?;
    Ok(())
}

/// Everything that was measured on one machine.
struct Measured {
    device: String,
    load_ms: f64,
    ceilings: CeilingsRow,
    probes: Vec<Probe>,
    rows: Vec<ScheduleTimes>,
}

fn sweep<B: Measure>(
    engine: &mut Engine<B>,
    load_ms: f64,
    flags: &BenchFlags,
    schedules: &[(String, Schedule)],
    lengths: &[u32],
) -> Result<Measured> {
    let (config, backend) = (engine.config(), engine.backend());
    let ceilings = CeilingsRow::from(backend.ceilings(weight_bytes(config, backend, 1))?);
    let probes = probe(engine, &ceilings, flags, *lengths.iter().max().expect("not empty") as usize + 1)?;
    let mut progress = Progress::new("measuring");
    let mut rows = Vec::new();
    for (name, schedule) in schedules {
        for &batch in &flags.batch {
            for &length in lengths {
                progress.show(|| format!("{name} batch {batch} length {length}"));
                rows.push(measure(engine, name, schedule, batch, length, flags.runs)?);
            }
        }
    }
    Ok(Measured { device: engine.backend().name(), load_ms, ceilings, probes, rows })
}

/// Multiply-adds of the weight products over `rows` rows, of which `sampled` go on past the last
/// layer's K/V, in GFLOP.
fn gflop(config: &ModelConfig, rows: usize, sampled: usize) -> f64 {
    2.0 * products(config, rows as f64, sampled as f64, |rows, top_k, _| rows * top_k) / 1e9
}

/// Bytes of the weights a forward of `rows` rows reads: layers and head, without the embedding
/// table. Of experts those that rows go to, if every choice were as likely as any other.
fn weight_bytes(config: &ModelConfig, backend: &impl Backend, rows: usize) -> usize {
    let touched = |_: f64, top_k: f64, experts: f64| experts * (1.0 - (1.0 - top_k / experts).powi(rows as i32));
    let head = (config.hidden_dim * config.vocab_size) as f64;
    let bits = |role: WeightRole| role.format(backend.weight_format(), backend.dtype().into()).bits();
    let layers = products(config, 1.0, 1.0, touched) - head;
    ((layers * bits(WeightRole::Layer) + head * bits(WeightRole::Head)) / 8.0) as usize
}

/// Elements of the weights of a forward, each counted once for each of the rows that go through it;
/// those of an expert `experts(rows, k, E)` times for all of them together.
fn products(config: &ModelConfig, rows: f64, sampled: f64, experts: impl Fn(f64, f64, f64) -> f64) -> f64 {
    let c = config.hidden_dim;
    let products = match config.switches.mlp {
        Mlp::Gelu => 2,
        Mlp::SwiGlu => 3,
    };
    let layer = |i: usize| {
        // After the last layer's K/V only sampled rows go on.
        let on = if i + 1 == config.num_layers { sampled } else { rows };
        let mlp = match config.experts(i) {
            None => on * (products * c * config.mlp_dim) as f64,
            Some(moe) => {
                let ExpertShape { num_experts, top_k, expert_dim, .. } = moe.shape;
                let dense = c * num_experts + products * c * moe.shared_dim.unwrap_or(0);
                on * dense as f64 + experts(on, top_k as f64, num_experts as f64) * (products * c * expert_dim) as f64
            }
        };
        rows * (c * config.heads.qkv_width()) as f64 + on * (config.heads.q_width() * c) as f64 + mlp
    };
    (0..config.num_layers).map(layer).sum::<f64>() + sampled * (c * config.vocab_size) as f64
}

/// Forwards by name: those asked for, or over `len` positions a draft step of 4 rows over a cached
/// prefix, the same with a fused commit, and a full pass, each sampling its masked rows.
fn forwards(flags: &BenchFlags, len: usize) -> Vec<(String, TimedForward)> {
    let timed = |range: std::ops::Range<usize>, sampled: usize, visibility: Visibility, len: usize| TimedForward {
        range,
        sampled,
        visibility,
        len,
        top_p: 1.0,
    };
    if !flags.forward.is_empty() {
        let of = |forward: &Forward| {
            let Forward { rows, position } = *forward;
            let name = if position == 0 { format!("pass of {rows} rows") } else { format!("{rows} rows at position {position}") };
            (name, timed(position..forward.len(), rows, Visibility::Full, forward.len()))
        };
        return flags.forward.iter().map(of).collect();
    }
    let half = (len / 2 / 4 * 4).max(4).min(len);
    let mut cases = vec![("full pass, all rows sampled".to_string(), timed(0..len, len, Visibility::Full, len))];
    if len >= half + 4 {
        let step = |first: usize| timed(first..half + 4, 4, Visibility::BlockCausal(4), len);
        cases.push((format!("draft step at position {half}"), step(half)));
        cases.push((format!("draft step with fused commit at {half}"), step(half - 4)));
    }
    cases
}

fn probe<B: Backend>(engine: &mut Engine<B>, ceilings: &CeilingsRow, flags: &BenchFlags, len: usize) -> Result<Vec<Probe>> {
    let mut probes = Vec::new();
    let cases = forwards(flags, len);
    for (name, timed) in
        cases.iter().flat_map(|case| flags.forward_top_p.iter().map(move |p| (&case.0, TimedForward { top_p: *p, ..case.1.clone() })))
    {
        let Timing { mut times_ms, launches, recorded } = engine.time_forward(&timed, flags.runs.max(5) as usize)?;
        let (rows, median_ms) = (timed.range.len(), median(&mut times_ms));
        let gflop = gflop(engine.config(), rows, timed.sampled);
        let read_ms = weight_bytes(engine.config(), engine.backend(), rows) as f64 / ceilings.read_gb_per_s / 1e6;
        let floor_ms = (gflop / ceilings.matrix_gflop_per_s * 1e3).max(read_ms);
        probes.push(Probe {
            name: name.clone(),
            rows,
            position: timed.range.start,
            sampled: timed.sampled,
            top_p: timed.top_p,
            median_ms,
            best_ms: times_ms[0],
            recorded,
            launches,
            gflop,
            gflop_per_s: gflop / (median_ms / 1e3),
            floor_ms,
            times_floor: median_ms / floor_ms,
        });
    }
    Ok(probes)
}

fn measure<B: Backend>(
    engine: &mut Engine<B>,
    name: &str,
    schedule: &Schedule,
    batch: u32,
    length: u32,
    runs: u32,
) -> Result<ScheduleTimes> {
    let mut walls = Vec::new();
    let mut outputs: Vec<Output> = Vec::new();
    let mut before = BTreeMap::new();
    for run in 0..=runs {
        if run == 1 {
            before = engine.host_steps().clone();
        }
        let start = Instant::now();
        let mut handles = Vec::new();
        for sample in 0..batch {
            let mut canvas = vec![Some(engine.config().first_id()?)];
            canvas.resize(length as usize + 1, None);
            let mut request = Request::new(Prompt::Canvas(canvas), schedule.clone(), u64::from(run), sample);
            request.stop.ignore_eos = true;
            handles.push(engine.submit(request)?);
        }
        drain(engine, &handles)?;
        let wall = start.elapsed().as_secs_f64() * 1e3;
        for (i, handle) in handles.iter().enumerate() {
            let output = handle.take_output().expect("drained")?;
            if run > 0 && i == 0 {
                outputs.push(output);
            }
        }
        if run > 0 {
            walls.push(wall);
        }
    }
    let mid = |f: &dyn Fn(&Output) -> f64| median(&mut outputs.iter().map(f).collect::<Vec<_>>());
    let total_ms = median(&mut walls);
    let stages = (0..schedule.stages().len())
        .map(|k| {
            let report = &outputs[0].stages[k];
            let ms = mid(&|o| o.stages[k].ms);
            StageRow {
                block_len: report.stage.block_len().map_or("full".into(), |b| b.to_string()),
                kv: report.stage.kv().to_string(),
                nfe: report.nfe(),
                forwards: report.forwards.total(),
                rows: report.rows,
                ms,
                ms_per_forward: ms / report.forwards.total().max(1) as f64,
            }
        })
        .collect();
    let since = |(reason, count): (&HostReason, &usize)| (reason.name(), count - before.get(reason).unwrap_or(&0));
    let host_steps = engine.host_steps().iter().map(since).filter(|(_, count)| *count > 0).collect();
    Ok(ScheduleTimes {
        schedule: name.into(),
        batch,
        length,
        tokens_per_s: f64::from(batch) * f64::from(length) / (total_ms / 1e3),
        total_ms,
        first_token_ms: mid(&|o| o.timings.first_token_ms),
        host_steps,
        stages,
    })
}

fn table(head: &str, ceilings: &CeilingsRow, probes: &[Probe], rows: &[ScheduleTimes]) -> String {
    let mut out = format!("{head}\n");
    let CeilingsRow { matrix_gflop_per_s, matrix, read_gb_per_s, read } = ceilings;
    let _ = writeln!(out, "ceilings of this run: {matrix_gflop_per_s:.0} GFLOP/s ({matrix}), {read_gb_per_s:.0} GB/s ({read})\n");
    let _ = writeln!(
        out,
        "{:<42} {:>6} {:>6} {:>11} {:>9} {:>9} {:>9} {:>8}",
        "one forward", "rows", "top p", "median ms", "best ms", "GFLOP/s", "floor ms", "x floor"
    );
    for p in probes {
        let Probe { name, rows, top_p, median_ms, best_ms, gflop_per_s, floor_ms, times_floor, .. } = p;
        let _ = writeln!(
            out,
            "{name:<42} {rows:>6} {top_p:>6} {median_ms:>11.3} {best_ms:>9.3} {gflop_per_s:>9.1} {floor_ms:>9.3} {times_floor:>8.2}"
        );
    }
    if rows.is_empty() {
        return out;
    }
    let head = ["schedule", "batch", "length", "stage", "kv", "NFE", "forwards", "rows", "ms", "ms/fwd", "total ms", "tokens/s"];
    let _ = writeln!(
        out,
        "\n{:<10} {:>5} {:>6} {:>6} {:>11} {:>5} {:>8} {:>7} {:>9} {:>8} {:>9} {:>9}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7], head[8], head[9], head[10], head[11]
    );
    for row in rows {
        for (k, s) in row.stages.iter().enumerate() {
            let (lead, tail) = if k == 0 {
                (
                    format!("{:<10} {:>5} {:>6}", row.schedule, row.batch, row.length),
                    format!("{:>9.1} {:>9.1}", row.total_ms, row.tokens_per_s),
                )
            } else {
                (" ".repeat(23), String::new())
            };
            let line = format!(
                "{lead} {:>6} {:>11} {:>5} {:>8} {:>7} {:>9.1} {:>8.3} {tail}",
                s.block_len, s.kv, s.nfe, s.forwards, s.rows, s.ms, s.ms_per_forward
            );
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    for row in rows.iter().filter(|row| !row.host_steps.is_empty()) {
        let reasons: Vec<String> = row.host_steps.iter().map(|(reason, count)| format!("{count} for {reason}")).collect();
        let _ = writeln!(out, "{}: the host sampled steps, {}", row.schedule, reasons.join("; "));
    }
    out
}

/// Horizontal bars, one per row, split by stage.
fn plot(rows: &[ScheduleTimes], title: &str) -> String {
    const COLOURS: [&str; 4] = ["#4477aa", "#ee6677", "#228833", "#ccbb44"];
    let longest = rows.iter().map(|r| r.stages.iter().map(|s| s.ms).sum::<f64>()).fold(1e-9, f64::max);
    let height = 60 + 26 * rows.len();
    let escape = |t: &str| t.replace('&', "&amp;").replace('<', "&lt;");
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"860\" height=\"{height}\" fill=\"white\"/>\n<text x=\"10\" y=\"20\" font-size=\"14\">{}</text>\n\
         <text x=\"10\" y=\"38\">milliseconds per sample by stage (blue: draft; then refine stages)</text>\n",
        escape(title)
    );
    for (i, row) in rows.iter().enumerate() {
        let y = 50 + 26 * i;
        let _ = writeln!(svg, "<text x=\"10\" y=\"{}\">{} batch {} length {}</text>", y + 14, escape(&row.schedule), row.batch, row.length);
        let mut x = 230.0;
        for (k, stage) in row.stages.iter().enumerate() {
            let width = 460.0 * stage.ms / longest;
            let _ =
                writeln!(svg, "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{}\"/>", COLOURS[k % COLOURS.len()]);
            x += width;
        }
        let total: f64 = row.stages.iter().map(|s| s.ms).sum();
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\">{total:.0} ms, {:.0} tokens/s</text>", x + 6.0, y + 14, row.tokens_per_s);
    }
    svg.push_str("</svg>\n");
    svg
}
