//! Tables of `docs/schedules.md`, made from the tables of the code.

use redraft::sampling::{REMASK_RULES, Score, UNMASK_RULES};
use redraft::schedule::{PRESETS, STAGE_KEYS};

pub const PAGE: &str = "docs/schedules.md";

/// The page with its tables as the code has them, each between two marks.
pub fn written_into(page: &str) -> String {
    let tables = [
        (
            "stage keys",
            table(
                &["key", "values and meaning", "default"],
                STAGE_KEYS.iter().map(|key| vec![code(key.name), key.doc.into(), key.default.into()]),
            ),
        ),
        ("unmask rules", table(&["rule", "a forward unmasks", "keys beside it"], UNMASK_RULES.iter().map(unmask_row))),
        ("remask rules", table(&["rule", "tokens masked again", "keys beside it"], REMASK_RULES.iter().map(remask_row))),
        (
            "scores",
            table(
                &["`score`", "of a token, p its distribution in the scoring forward"],
                Score::ALL.iter().map(|(_, name, doc)| vec![code(name), (*doc).into()]),
            ),
        ),
        (
            "presets",
            table(
                &["preset", "what it is", "stages"],
                PRESETS.iter().map(|preset| {
                    vec![
                        code(preset.name),
                        preset.doc.into(),
                        preset.stages.iter().map(|stage| code(stage)).collect::<Vec<_>>().join(" then "),
                    ]
                }),
            ),
        ),
    ];
    let mut page = page.to_owned();
    for (name, table) in tables {
        let (begin, end) = (format!("<!-- table of {name} -->\n"), format!("<!-- end of {name} -->\n"));
        let from = page.find(&begin).unwrap_or_else(|| panic!("{PAGE}: expected the line {begin}")) + begin.len();
        let to = page.find(&end).unwrap_or_else(|| panic!("{PAGE}: expected the line {end}"));
        page.replace_range(from..to, &table);
    }
    page
}

fn unmask_row(row: &redraft::sampling::UnmaskRow) -> Vec<String> {
    let keys: Vec<_> = row.keys.iter().map(|key| code(key)).collect();
    vec![code(&format!("{}:{}", row.name, row.argument)), row.doc.into(), keys.join(" ")]
}

fn remask_row(row: &redraft::sampling::RemaskRow) -> Vec<String> {
    let name = row.usage();
    vec![code(name.trim_start_matches("by=")), row.doc.into(), if row.takes_score { code("score") } else { String::new() }]
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let rules = format!("|{}\n", "---|".repeat(head.len()));
    let head = line(head.iter().map(|cell| (*cell).to_owned()).collect());
    [head, rules].into_iter().chain(rows.map(line)).collect()
}
