//! What `bench --quality` prints: the JSON object, and the tables.

use std::fmt::Write as _;

use redraft_evaluation::bootstrap::Figure;
use redraft_evaluation::{Measures, Paired, PerSample};
use serde::Serialize;

/// Everything that was measured.
#[derive(Serialize)]
pub(super) struct Report {
    pub model: String,
    /// Where stages name more than one (`weights=INDEX`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    pub judge: String,
    pub device: String,
    pub dtype: String,
    pub samples: u32,
    pub length: usize,
    pub seed: u64,
    /// Samples in flight together.
    pub batch: usize,
    pub notes: Vec<String>,
    pub human: Option<Human>,
    pub rows: Vec<ReportRow>,
}

/// Human text, measured as the samples are.
#[derive(Serialize)]
pub(super) struct Human {
    pub windows: usize,
    /// Windows that share text with others.
    pub overlapping: usize,
    pub measures: Measures,
    /// With `--per-sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<PerSample>,
}

#[derive(Serialize)]
pub(super) struct ReportRow {
    pub name: String,
    pub model: String,
    pub schedule: Vec<String>,
    pub seed: u64,
    pub measures: Measures,
    pub paired: Option<PairedRow>,
    pub cost: Cost,
    /// With `--per-sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<PerSample>,
}

#[derive(Serialize)]
pub(super) struct PairedRow {
    /// Name of the row with the same drafts.
    pub to: String,
    #[serde(flatten)]
    pub paired: Paired,
}

/// Means over samples, but for the last two, which are the row's wall time shared out.
#[derive(Serialize)]
pub(super) struct Cost {
    pub nfe: f64,
    pub forwards: f64,
    /// Passes of a joint sampler, which `forwards` counts too.
    pub joint: f64,
    pub rows: f64,
    pub ms_per_sample: f64,
    pub tokens_per_s: f64,
}

/// A column of the table of measures: heading, width, and content.
type Column = (&'static str, usize, fn(&Measures) -> String);

fn number(figure: Option<Figure>, digits: usize) -> String {
    figure.map_or("-".into(), |f| format!("{:.digits$}", f.value))
}

fn interval(figure: Option<Figure>, digits: usize) -> String {
    match figure {
        Some(Figure { value, low: Some(low), high: Some(high), .. }) => format!("{value:.digits$} [{low:.digits$}, {high:.digits$}]"),
        other => number(other, digits),
    }
}

const COLUMNS: [Column; 14] = [
    ("judge ppl [95 %]", 20, |m| interval(m.judge_ppl_mean, 1)),
    ("pooled", 7, |m| number(m.judge_ppl_pooled, 2)),
    ("trigram", 8, |m| number(m.trigram_ppl, 1)),
    ("entropy", 8, |m| number(m.entropy, 3)),
    ("dist-2", 7, |m| number(m.distinct_2, 3)),
    ("set-4", 6, |m| number(m.set_distinct_4, 3)),
    ("s-bleu", 7, |m| number(m.self_bleu_4, 3)),
    ("reverse", 8, |m| number(m.reverse_ppl, 1)),
    ("copied", 7, |m| number(m.copied_run, 1)),
    ("most", 5, |m| m.copied_run.and_then(|f| f.max).map_or("-".into(), |max| format!("{max:.0}"))),
    ("changed", 8, |m| number(m.changed, 3)),
    ("names", 6, |m| number(m.names, 2)),
    ("quotes", 7, |m| number(m.quotes, 2)),
    ("gain [95 %]", 22, |m| interval(m.context_gain, 3)),
];

/// Two tables and the notes: measures, then what each row cost and how it compares with the row
/// that it refined.
pub(super) fn table(report: &Report) -> String {
    let Report { model, judge, device, dtype, samples, length, seed, batch, .. } = report;
    let mut out = format!(
        "{model}, {device}, {dtype}, {samples} samples of {length} tokens, seed {seed}, {batch} in flight\njudged by {judge} (f32); perplexities, entropy and context gain: docs/quality.md\n\n"
    );
    let names = report.rows.iter().map(|row| row.name.chars().count());
    let width = names.chain(["human *".len()]).max().unwrap_or(0);
    let _ = write!(out, "{:<width$}", "row");
    for (heading, column, _) in COLUMNS {
        let _ = write!(out, " {heading:>column$}");
    }
    out.push('\n');
    let human = report.human.iter().map(|human| ("human *", &human.measures));
    for (name, measures) in human.chain(report.rows.iter().map(|row| (row.name.as_str(), &row.measures))) {
        let _ = write!(out, "{name:<width$}");
        for (_, column, cell) in COLUMNS {
            let _ = write!(out, " {:>column$}", cell(measures));
        }
        out.push('\n');
    }
    let _ = write!(
        out,
        "\n{:<width$} {:>7} {:>8} {:>7} {:>8} {:>10} {:>9}  {:>26} {:>9} {:>24}  against",
        "row", "NFE", "forwards", "passes", "rows", "ms/sample", "tokens/s", "nll minus draft's [95 %]", "improved", "entropy [95 %]"
    );
    out.push('\n');
    for row in &report.rows {
        let Cost { nfe, forwards, joint, rows, ms_per_sample, tokens_per_s } = row.cost;
        let _ = write!(out, "{:<width$} {nfe:>7.1} {forwards:>8.1} {joint:>7.1} {rows:>8.0}", row.name);
        let _ = write!(out, " {ms_per_sample:>10.1} {tokens_per_s:>9.0}");
        if let Some(PairedRow { to, paired }) = &row.paired {
            let improved = paired.improved.map_or("-".into(), |share| format!("{:.0} %", share * 100.0));
            let _ = write!(out, "  {:>26} {improved:>9} {:>24}  {to}", interval(paired.judge_nll, 3), interval(paired.entropy, 3));
        }
        out.push('\n');
    }
    out.push('\n');
    for note in report.human.iter().map(|_| "* human text: the ceiling, not a row").chain(report.notes.iter().map(String::as_str)) {
        let _ = writeln!(out, "{note}");
    }
    out
}
