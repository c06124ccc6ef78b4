//! Rules of the sources that a machine can check.

#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/schedule_tables.rs"]
mod schedule_tables;

use std::path::{Path, PathBuf};

use redraft::schedule::PRESETS;

use imports::Graph;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `dir`, as paths from the root of the repository, sorted.
fn files(dir: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else {
                let path = path.strip_prefix(root()).expect("below the root").to_str().expect("UTF-8");
                found.push(path.replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

/// Files of the package at the root, as (path, text).
fn sources() -> Vec<(String, String)> {
    let sources: Vec<_> = files("src").into_iter().filter(|f| f.ends_with(".rs")).map(|f| (read(&f), f)).map(|(t, f)| (f, t)).collect();
    assert!(sources.len() > 20, "src has files: {}", sources.len());
    sources
}

/// Those of every package of the workspace.
fn all_sources() -> Vec<(String, String)> {
    let members = files("crates").into_iter().chain(files("bindings")).filter(|f| f.ends_with(".rs") && f.contains("/src/"));
    let members: Vec<_> = members.map(|f| (f.clone(), read(&f))).collect();
    assert!(members.len() > 5, "crates have files: {}", members.len());
    sources().into_iter().chain(members).collect()
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn fail_on(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// `text` with comments taken out, line by line (strings with `//` in them lose their tail, which
/// no rule here minds).
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Modules where unsafe code may live: a mapped file, vector instructions, the thread pool's
/// handover, and foreign interfaces.
const FENCED: [&str; 7] =
    ["src/file_bytes.rs", "src/cpu/simd.rs", "src/cpu/simd/", "src/cpu/pool.rs", "src/cuda/", "crates/emulator/src/", "bindings/c/src/"];

#[test]
fn unsafe_code_stays_in_its_modules() {
    let broken = all_sources()
        .into_iter()
        .filter(|(file, _)| !FENCED.iter().any(|module| file.starts_with(module)))
        .filter(|(_, text)| !text.contains("#![forbid(unsafe_code)]") && words(&code(text)).any(|word| word == "unsafe"))
        .map(|(file, _)| file)
        .collect();
    fail_on("unsafe outside the fenced modules", broken);
    fail_on(
        "fenced, but not there",
        FENCED.iter().filter(|module| !root().join(module).exists()).map(|module| (*module).to_owned()).collect(),
    );
}

/// Every unsafe block says what makes it true (clippy checks blocks; this also covers builds that
/// nobody lints).
#[test]
fn unsafe_code_carries_its_reason() {
    let broken = all_sources()
        .into_iter()
        .filter(|(_, text)| words(&code(text)).any(|word| word == "unsafe") && !text.contains("SAFETY:") && !text.contains("# Safety"))
        .map(|(file, _)| file)
        .collect();
    fail_on("unsafe without a SAFETY comment", broken);
}

#[test]
fn modules_stay_small_and_say_what_they_contain() {
    let mut broken = Vec::new();
    for (file, text) in all_sources() {
        let lines = text.lines().count();
        if lines > 900 {
            broken.push(format!("{file}: {lines} lines, at most 900"));
        }
        if file != "src/main.rs" && !text.starts_with("//!") {
            broken.push(format!("{file}: no head comment"));
        }
    }
    fail_on("modules", broken);
}

/// The library prints nothing and leaves nothing unfinished; only the command line talks.
#[test]
fn only_the_command_line_prints() {
    let mut broken = Vec::new();
    for (file, text) in all_sources() {
        let body = code(&text);
        let talks = ["println!", "eprintln!", "print!", "eprint!"].iter().any(|m| body.contains(m));
        if talks && !file.starts_with("src/cli/") && file != "src/main.rs" && !text.contains("#[cfg(test)]") {
            broken.push(format!("{file}: prints"));
        }
        broken.extend(["todo!", "unimplemented!", "dbg!"].iter().filter(|m| body.contains(**m)).map(|m| format!("{file}: {m}")));
    }
    fail_on("printing and unfinished code", broken);
}

/// No file of `src/` imports itself, not even by way of others, and none takes from a module above
/// it what that module itself imported. `imports.rs` says what an import is.
#[test]
fn imports_have_no_cycle() {
    let graph = Graph::of(&sources());
    assert!(graph.num_edges() > 500, "{} imports", graph.num_edges());
    fail_on("imports in a circle", graph.cycles());
    fail_on("imports through a parent", graph.through_parents);
}

/// Modules that know nothing of the crate.
const LEAVES: [&str; 6] = ["error", "rng", "canvas", "pages", "plan", "scheduler"];

/// For a module, those that it never imports, not even by way of others: sampling knows no page,
/// the model no request, a sequence no tensor, and the backends nothing of each other.
const NEVER: [(&str, &[&str]); 9] = [
    ("sampling", &["backend", "scheduler", "canvas", "engine", "model", "pages", "plan", "schedule", "sequence"]),
    ("schedule", &["backend", "engine", "model", "pages", "sequence"]),
    ("config", &["model", "schedule", "sequence"]),
    ("backend", &["config", "cpu", "cuda", "engine", "model", "schedule", "sequence"]),
    ("cpu", &["cuda", "engine", "model", "schedule", "sequence"]),
    ("cuda", &["cpu", "engine", "model", "schedule", "sequence"]),
    ("model", &["scheduler", "cpu", "cuda", "engine", "request", "schedule", "sequence"]),
    ("sequence", &["scheduler", "cli", "config", "engine", "model", "pages"]),
    ("engine", &["cli", "cpu", "cuda"]),
];

#[test]
fn knowledge_points_down() {
    let graph = Graph::of(&sources());
    let text = read("src/lib.rs");
    let modules: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let leaves = LEAVES.map(|leaf| (leaf, modules.as_slice()));
    let mut broken = Vec::new();
    for (module, forbidden) in leaves.into_iter().chain(NEVER) {
        let named = std::iter::once(&module).chain(forbidden);
        broken.extend(named.filter(|name| !modules.contains(name)).map(|name| format!("{name} is not there")));
        let others = forbidden.iter().filter(|other| **other != module);
        broken.extend(others.filter_map(|other| graph.knowledge(module, other)));
    }
    fail_on("knowledge points down", broken);
}

#[test]
fn the_overview_lists_every_module() {
    let text = read("src/lib.rs");
    let modules = text.lines().filter_map(|line| line.trim().strip_prefix("pub mod ")).map(|name| name.trim_end_matches(';'));
    let head: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
    let broken: Vec<String> = modules.clone().filter(|module| !head.contains(&format!("`{module}`"))).map(String::from).collect();
    assert!(modules.count() > 10, "src/lib.rs is the table of contents");
    fail_on("modules that the head of src/lib.rs does not list", broken);
}

/// Text files of the repository: those that git tracks, or all of them where there is no git.
fn tracked() -> Vec<String> {
    let listed = std::process::Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let names: Vec<String> = match listed {
        Ok(output) if output.status.success() => {
            String::from_utf8(output.stdout).expect("UTF-8").split('\0').filter(|f| !f.is_empty()).map(String::from).collect()
        }
        _ => ["src", "crates", "tools", "docs", "kernels", "tests"].iter().flat_map(|dir| files(dir)).chain(["README.md".into()]).collect(),
    };
    assert!(names.iter().any(|f| f == "src/lib.rs"), "{} files", names.len());
    names.into_iter().filter(|f| root().join(f).is_file()).collect()
}

/// What is written here must mean something on another machine.
#[test]
fn no_file_names_a_machine() {
    let mut broken = Vec::new();
    for file in tracked().into_iter().filter(|f| f != "tests/tidy.rs") {
        // Weights and pictures are not text.
        let Ok(text) = std::fs::read_to_string(root().join(&file)) else { continue };
        for (number, line) in text.lines().enumerate() {
            if ["/work/", "/root/", "/tmp/", "/home/"].iter().any(|path| line.contains(path)) {
                broken.push(format!("{file}:{}: {}", number + 1, line.trim().chars().take(100).collect::<String>()));
            }
        }
    }
    fail_on("paths of one machine", broken);
}

/// Tables of stage keys, rules and presets in `docs/schedules.md` are those of the code.
/// `REDRAFT_WRITE_DOCS=1 cargo test --test tidy tables` writes them.
#[test]
fn tables_of_schedules_are_those_of_the_code() {
    let page = read(schedule_tables::PAGE);
    let written = schedule_tables::written_into(&page);
    if std::env::var_os("REDRAFT_WRITE_DOCS").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(schedule_tables::PAGE), &written).unwrap();
    } else if let Some((number, (found, expected))) =
        page.lines().zip(written.lines()).enumerate().find(|(_, (found, expected))| found != expected)
    {
        panic!("{}:{}: expected\n{expected}\nfound\n{found}\nREDRAFT_WRITE_DOCS=1 writes the tables", schedule_tables::PAGE, number + 1);
    } else {
        assert_eq!(page.len(), written.len(), "{}: a table is too short or too long", schedule_tables::PAGE);
    }
    let unnamed: Vec<_> = PRESETS
        .iter()
        .filter(|preset| !read("README.md").contains(&format!("`{}`", preset.name)))
        .map(|preset| preset.name.to_owned())
        .collect();
    fail_on("presets that README does not name", unnamed);
}

/// Links between our own pages lead somewhere.
#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    let mut links = 0;
    for page in tracked().into_iter().filter(|f| f.ends_with(".md")) {
        let text = read(&page);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split(['#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            links += 1;
            let path: PathBuf = root().join(&page).parent().expect("a directory").join(target);
            if !path.exists() {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(links > 10, "{links} links");
    fail_on("links to nothing", broken);
}

#[test]
fn every_dependency_has_its_reason() {
    let manifests =
        files("crates").into_iter().chain(files("bindings")).filter(|f| f.ends_with("/Cargo.toml")).chain(["Cargo.toml".to_owned()]);
    let (mut broken, mut count) = (Vec::new(), 0);
    for manifest in manifests {
        let text = read(&manifest);
        let lines: Vec<&str> = text.lines().collect();
        let mut section = "";
        for (i, line) in lines.iter().enumerate() {
            if line.starts_with('[') {
                section = line;
            } else if section.contains("dependencies") && line.contains('=') && !line.starts_with('#') {
                count += 1;
                // One reason may stand over several lines.
                let reason = lines[..i].iter().rev().find(|l| l.is_empty() || l.starts_with(['#', '[']));
                if !reason.is_some_and(|l| l.starts_with('#')) {
                    broken.push(format!("{manifest}: {line}"));
                }
            }
        }
    }
    assert!(count >= 10, "{count} dependencies");
    fail_on("dependencies without a reason beside them", broken);
}

/// A kernel has a test of its own name, or of the op that it is a part of (`sample_draw` belongs to
/// `sample`), which runs it on the CPU.
#[test]
fn every_kernel_has_its_test() {
    let stems =
        files("kernels").into_iter().filter_map(|f| f.strip_suffix(".cu").and_then(|f| f.strip_prefix("kernels/")).map(String::from));
    let tested = |stem: &str| root().join(format!("tests/kernels/{stem}.rs")).exists();
    let broken: Vec<String> =
        stems.clone().filter(|stem| !tested(stem) && !stem.split_once('_').is_some_and(|(op, _)| tested(op))).collect();
    assert!(stems.clone().count() >= 10);
    fail_on("kernels without a test", broken);
    // On a GPU they run under the sanitizer too, module by module.
    let listed = read("tools/device-check");
    fail_on(
        "kernels that device-check leaves out",
        stems.filter(|stem| tested(stem) && !listed.contains(&format!("\"{stem}::\""))).collect(),
    );
}

/// The commands for a lent GPU machine are short enough to paste, and name options that the script
/// has.
#[test]
fn commands_for_a_gpu_machine_work() {
    const MAX_SHORTLIST: usize = 2000;
    let (page, script) = (read("docs/cuda.md"), read("tools/device-check"));
    let block = page.split("```device-check\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of commands");
    let commands: Vec<&str> = block.lines().collect();
    assert_eq!(commands.len(), 2, "{block}");
    for (part, command) in (1..).zip(commands) {
        assert!(command.len() <= MAX_SHORTLIST, "{} characters: {command}", command.len());
        assert!(
            command.starts_with("python3 target/device-check/device-check run ") && command.contains(&format!("--part {part} ")),
            "{command}"
        );
        for option in words_of_options(command) {
            assert!(script.contains(&format!("runner.add_argument(\"{option}\"")), "{option} is no option of `device-check run`");
        }
        // Their times, as the page and the script have them.
        let seconds = script.split("SECONDS = {").nth(1).and_then(|rest| rest.split('}').next()).expect("times of the parts");
        let limit = seconds.split(", ").find_map(|entry| entry.strip_prefix(&format!("{part}: "))).expect("the part's time");
        assert!(page.contains(&format!("| {part} | {limit} s |")), "part {part} takes {limit} s by tools/device-check");
    }
}

fn words_of_options(command: &str) -> impl Iterator<Item = &str> {
    command.split_whitespace().filter(|word| word.starts_with("--"))
}

/// Tests and modules that tools/device-check names exist, and no module of the device tests is left
/// out.
#[test]
fn tests_for_a_gpu_machine_exist() {
    let script = read("tools/device-check");
    let names = |list: &str| -> Vec<String> {
        let line = script.lines().find(|line| line.starts_with(&format!("{list} = "))).unwrap_or_else(|| panic!("no {list}"));
        line.split('"').skip(1).step_by(2).map(String::from).collect()
    };
    let tests: Vec<(String, String)> =
        ["tests/kernels", "tests/device"].iter().flat_map(|dir| files(dir)).map(|file| (read(&file), file)).map(|(t, f)| (f, t)).collect();
    let has = |test: &str| tests.iter().any(|(_, text)| text.contains(&format!("fn {test}()")));
    let module_of = |dir: &str, module: &str| root().join(format!("tests/{dir}/{}.rs", module.trim_end_matches("::"))).exists();
    let mut broken: Vec<String> = names("EMULATION_ALONE").into_iter().filter(|test| !has(test)).collect();
    broken.extend(names("FIFTY").into_iter().filter(|test| !has(test.rsplit("::").next().expect("a name"))));
    broken.extend(names("KERNEL_TESTS").into_iter().filter(|module| !module_of("kernels", module)));
    broken.extend(names("DEVICE_TESTS").into_iter().filter(|module| !module_of("device", module)));
    let listed = names("DEVICE_TESTS");
    let main = read("tests/device/main.rs");
    // Those with a path of their own are helpers.
    let modules =
        main.split("\n\n").filter(|part| !part.contains("#[path")).flat_map(str::lines).filter_map(|line| line.strip_prefix("mod "));
    broken.extend(modules.map(|module| module.replace(';', "::")).filter(|module| !listed.contains(module)));
    assert!(names("KERNEL_TESTS").len() > 10 && listed.len() > 3);
    fail_on("tests that tools/device-check names and that are not there, or leaves out", broken);
}

/// What runs on a GPU machine was tried without one: results are read rightly, nothing absent is
/// passed, children end with their parent. The comparison of two builds reports a difference, a
/// failure and a time-out, and its requests name every fixture, preset and rule. The comparison
/// with other engines prints no speed where outputs differ.
#[test]
fn scripts_test_themselves() {
    let scripts = [
        &["tools/device-check", "self-test"][..],
        &["tools/gpu_probe.py", "--self-test"],
        &["tools/compare_outputs", "--self-test"],
        &["tools/compare/run", "--self-test"],
        &["tools/count_instructions", "--self-test"],
    ];
    for script in scripts {
        let output = match std::process::Command::new("python3").args(script).current_dir(root()).output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return eprintln!("skipped: no python3"),
            Err(error) => panic!("python3: {error}"),
        };
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success(), "{script:?}\n{said}");
    }
}

/// Columns of comments and prose. rustfmt does not wrap them.
const MAX_COLUMNS: usize = 100;

/// Lines of prose that are wider, by number. Tables, fenced code, headings and lines that are
/// aligned by runs of spaces cannot be wrapped.
fn too_wide<'a>(lines: impl Iterator<Item = (usize, &'a str, &'a str)>) -> Vec<usize> {
    let mut fenced = false;
    let mut wide = Vec::new();
    for (number, line, prose) in lines {
        if prose.starts_with("```") {
            fenced = !fenced;
        }
        let aligned = prose.contains("   ") || prose.starts_with('|') || prose.starts_with('#') || prose.starts_with("![");
        if !fenced && !aligned && line.chars().count() > MAX_COLUMNS && prose.contains(' ') {
            wide.push(number);
        }
    }
    wide
}

#[test]
fn comments_and_pages_wrap_at_100_columns() {
    let mut broken = Vec::new();
    for file in tracked() {
        // Generated reports and cards of models are as they were written.
        if file.starts_with("benches/reports/") || file.starts_with("models/") || file.starts_with("docs/evidence/") {
            continue;
        }
        // build.rs writes comments in strings.
        let kernel = (file.starts_with("kernels/") || file.starts_with("crates/emulator/runtime/"))
            && [".cu", ".cuh", ".h", ".cpp"].iter().any(|end| file.ends_with(end));
        let wide = if kernel || file.ends_with(".rs") && file != "build.rs" {
            let text = read(&file);
            let lines: Vec<(usize, &str, &str)> = text
                .lines()
                .enumerate()
                .filter_map(|(i, line)| {
                    let prose = line.trim_start().strip_prefix("//")?.trim_start_matches(['/', '!']);
                    // Indented by four: a formula or a picture.
                    (!prose.starts_with("     ")).then_some((i + 1, line, prose.trim_start()))
                })
                .collect();
            too_wide(lines.into_iter())
        } else if file.ends_with(".md") {
            let text = read(&file);
            let lines: Vec<(usize, &str, &str)> = text.lines().enumerate().map(|(i, line)| (i + 1, line, line.trim_start())).collect();
            too_wide(lines.into_iter().filter(|(_, line, _)| !line.starts_with("    ")))
        } else {
            continue;
        };
        broken.extend(wide.into_iter().map(|number| format!("{file}:{number}")));
    }
    fail_on("comments and prose wider than 100 columns", broken);
    assert_eq!(too_wide([(7, "x", "short"), (8, &"a ".repeat(60), "a a")].into_iter()), [8]);
}

/// Comments and pages explain themselves by what is in this repository, or by what is published.
#[test]
fn nothing_cites_a_document_outside_of_the_repository() {
    // In halves, or this file would be found.
    let elsewhere = [["design sec", "tion"], ["did-bd", "3lm"], ["adjust-dr", "eam"], ["mini-exp", "eriment"], ["limits-and", "-asks"]]
        .map(|halves| halves.concat());
    let texts = ["src", "crates", "bindings", "kernels", "tests", "tools", "docs", "benches"]
        .iter()
        .flat_map(|dir| files(dir))
        .chain(["README.md".to_owned()]);
    let texts = texts.filter(|f| [".rs", ".cu", ".cuh", ".cpp", ".h", ".py", ".md"].iter().any(|end| f.ends_with(end)));
    let cites = |file: String| {
        let text = read(&file);
        let cited: Vec<String> = elsewhere.iter().filter(|name| text.contains(*name)).map(|name| format!("{file}: {name}")).collect();
        cited
    };
    fail_on("cites a document that is not here", texts.flat_map(cites).collect());
}

/// Tests that docs/architecture.md names for an invariant exist.
#[test]
fn invariants_name_tests_that_exist() {
    let page = read("docs/architecture.md");
    let tests: String = files("tests").iter().filter(|file| file.ends_with(".rs")).map(|file| read(file)).collect();
    let paragraphs = page.split("\n\n").filter(|paragraph| paragraph.starts_with("Tests: "));
    let named: Vec<&str> = paragraphs.flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2)).collect();
    assert!(named.len() > 20, "{named:?}");
    let is_there = |name: &str| if name.contains('/') { root().join(name).exists() } else { tests.contains(&format!("fn {name}(")) };
    fail_on("named, but not there", named.into_iter().filter(|name| !is_there(name)).map(String::from).collect());
}

/// Types that docs/glossary.md names exist.
#[test]
fn the_glossary_names_types_that_exist() {
    let page = read("docs/glossary.md");
    let code: String = all_sources().into_iter().map(|(_, text)| text).collect();
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.ends_with("` |"));
    let types: Vec<&str> = rows.filter_map(|row| row.rsplit('`').nth(1)).collect();
    assert!(types.len() > 25, "{types:?}");
    let is_there = |name: &str| {
        let declared =
            ["struct", "enum", "trait"].iter().flat_map(|kind| [' ', '<', '(', ';', ':'].map(|end| format!("pub {kind} {name}{end}")));
        declared.into_iter().any(|declaration| code.contains(&declaration))
    };
    fail_on("in the glossary, but no public type", types.into_iter().filter(|name| !is_there(name)).map(String::from).collect());
}

/// Texts of errors and notes name flags: those exist. Flags of other programs stand in files that
/// speak to them.
#[cfg(feature = "cli")]
#[test]
fn flags_in_texts_exist() {
    let known: Vec<String> = redraft::cli::flag_names();
    assert!(known.len() > 30 && known.contains(&"device".to_owned()), "{known:?}");
    const FOREIGN: [(&str, &str); 6] = [
        ("src/cuda/emulated.rs", "features"),
        ("src/config.rs", "local-dir"),
        ("src/api/device.rs", "features"),
        ("src/cuda/driver/", ""),
        ("src/cuda/kernels/", ""),
        ("src/cuda/ceilings/", ""),
    ];
    let mut broken = Vec::new();
    for (file, text) in sources() {
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with("//")) {
            for (at, _) in line.match_indices("--") {
                let name: String = line[at + 2..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
                let before = line[..at].chars().last();
                // Part of a longer dash, of a number, or of a comment of another language.
                if name.is_empty() || name.starts_with('-') || before.is_some_and(|c| c == '-' || c.is_alphanumeric()) {
                    continue;
                }
                let foreign = FOREIGN.iter().any(|(place, flag)| file.starts_with(place) && (flag.is_empty() || name == *flag));
                // The driver's own words are for users of this command.
                if (!foreign || file.ends_with("driver/errors.rs")) && !known.contains(&name) {
                    broken.push(format!("{file}: --{name}"));
                }
            }
        }
    }
    fail_on("texts name flags that the command does not have", broken);
}
