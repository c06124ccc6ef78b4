//! The import graph of `src/`, read from the sources.
//!
//! A file imports another where its code names a path into it: a leaf of a `use` declaration, `pub
//! use` included, or a path in code whose first segment is `crate`, `super`, `self`, a module that
//! the file declares, or a name that the file imported. A path is followed as far as its segments
//! are modules with files of their own, and the last of these files is the one imported. So a path
//! to a re-exported item imports the file of the re-export, which itself imports the file of the
//! item. `mod x;` is no import, and neither is the path of a visibility, `pub(in path)`. Comments,
//! strings and what stands under `#[cfg(test)]` do not count.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A module's path from the root of the crate.
type Path = Vec<String>;

/// What the files of a crate import.
pub struct Graph {
    /// For each file, the files it imports, and one path that does so.
    edges: BTreeMap<String, BTreeMap<String, String>>,
    /// `use super::X` where the parent does not define X but imported it itself.
    pub through_parents: Vec<String>,
}

impl Graph {
    /// Of (path from the root of the repository, text).
    pub fn of(sources: &[(String, String)]) -> Graph {
        let modules: BTreeMap<Path, &str> = sources.iter().map(|(file, _)| (module_of(file), file.as_str())).collect();
        let parsed: Vec<(Path, File)> = sources.iter().map(|(file, text)| (module_of(file), File::parse(text))).collect();
        let mut graph = Graph { edges: BTreeMap::new(), through_parents: Vec::new() };
        // Names that a file imported from within the crate, with what they stand for.
        let names: BTreeMap<&Path, BTreeMap<String, Path>> =
            parsed.iter().map(|(module, file)| (module, file.names(module, &modules))).collect();
        for (module, file) in &parsed {
            let from = modules[module].to_owned();
            let used = file.uses.iter().filter_map(|leaf| resolve(&leaf.path, module, &modules, None));
            let named = file.paths.iter().filter_map(|path| resolve(path, module, &modules, Some(&names[module])));
            let edges = graph.edges.entry(from.clone()).or_default();
            for path in used.chain(named) {
                let depth = (0..=path.len()).rev().find(|depth| modules.contains_key(&path[..*depth])).expect("the root is a file");
                let (target, item) = (path[..depth].to_vec(), path.get(depth));
                if target == *module {
                    continue;
                }
                let spelled = format!("crate::{}", path.join("::"));
                if module.starts_with(&target) && item.is_some_and(|item| item == "*" || names[&target].contains_key(item)) {
                    let parent = modules[&target];
                    graph.through_parents.push(format!("{from}: {spelled} is not defined in {parent}, which imports it"));
                }
                edges.entry(modules[&target].to_owned()).or_insert(spelled);
            }
        }
        graph
    }

    pub fn num_edges(&self) -> usize {
        self.edges.values().map(BTreeMap::len).sum()
    }

    /// Files that `from` imports, also by way of others, each with the file that imports it.
    fn reached(&self, from: &str) -> BTreeMap<String, String> {
        let mut reached = BTreeMap::new();
        let mut open = VecDeque::from([from.to_owned()]);
        while let Some(file) = open.pop_front() {
            for target in self.edges.get(&file).into_iter().flat_map(BTreeMap::keys) {
                if !reached.contains_key(target) {
                    reached.insert(target.clone(), file.clone());
                    open.push_back(target.clone());
                }
            }
        }
        reached
    }

    /// The shortest chain of imports from one file to another, as text.
    fn chain(&self, from: &str, to: &str) -> Option<String> {
        let reached = self.reached(from);
        let mut files = vec![to.to_owned()];
        loop {
            let before = reached.get(files.last().expect("one file"))?.clone();
            files.push(before);
            if files.last().is_some_and(|file| file == from) {
                break;
            }
        }
        files.reverse();
        let steps = files.windows(2).map(|pair| format!(" -> {} ({})", pair[1], self.edges[&pair[0]][&pair[1]]));
        Some(std::iter::once(from.to_owned()).chain(steps).collect())
    }

    /// A shortest cycle through each file that is in one, each set of files once.
    pub fn cycles(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let cycles = self.edges.keys().filter_map(|file| self.chain(file, file));
        cycles.filter(|chain| seen.insert(chain.split(" -> ").skip(1).map(String::from).collect::<BTreeSet<_>>())).collect()
    }

    /// The shortest chain from a file of module `from` to one of module `to`, which are names below
    /// the root.
    pub fn knowledge(&self, from: &str, to: &str) -> Option<String> {
        let is_of = |file: &str, name: &str| module_of(file).first().is_some_and(|first| first == name);
        let sources = self.edges.keys().filter(|file| is_of(file, from));
        let pairs = sources.flat_map(|file| self.reached(file).into_keys().map(move |target| (file, target)));
        let chains = pairs.filter(|(_, target)| is_of(target, to)).filter_map(|(file, target)| self.chain(file, &target));
        chains.min_by_key(|chain| chain.matches(" -> ").count())
    }
}

/// `src/a/mod.rs` and `src/a.rs` are `a`; `src/lib.rs` is the root.
fn module_of(file: &str) -> Path {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs");
    let mut segments: Path = path.split('/').map(String::from).collect();
    if segments.last().is_some_and(|last| last == "mod") || path == "lib" {
        segments.pop();
    }
    segments
}

/// The path from the root of the crate, where a path leads into the crate.
fn resolve(path: &[String], module: &Path, modules: &BTreeMap<Path, &str>, names: Option<&BTreeMap<String, Path>>) -> Option<Path> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "crate" => Some(rest.to_vec()),
        "self" => Some([module, rest].concat()),
        "super" => {
            let parents = path.iter().take_while(|segment| *segment == "super").count();
            let above = &module[..module.len().checked_sub(parents)?];
            Some([above, &path[parents..]].concat())
        }
        name => {
            if let Some(known) = names.and_then(|names| names.get(name)) {
                return Some([known, rest].concat());
            }
            let child = [module.as_slice(), std::slice::from_ref(first)].concat();
            modules.contains_key(&child).then(|| [child.as_slice(), rest].concat())
        }
    }
}

/// A leaf of a `use` declaration, and the name that it gives.
struct Leaf {
    path: Path,
    name: String,
}

/// What a file says.
struct File {
    uses: Vec<Leaf>,
    /// Paths of at least two segments.
    paths: Vec<Path>,
}

impl File {
    fn parse(text: &str) -> File {
        let tokens = without_tests(&tokens_of(text));
        let mut file = File { uses: Vec::new(), paths: Vec::new() };
        let mut at = 0;
        while at < tokens.len() {
            match tokens[at].as_str() {
                "use" => {
                    let end = at + tokens[at..].iter().position(|token| token == ";").unwrap_or(tokens.len() - at);
                    leaves(&tokens[at + 1..end], &[], &mut file.uses);
                    at = end;
                }
                "pub" if tokens.get(at + 1).is_some_and(|token| token == "(") => {
                    at += tokens[at..].iter().position(|token| token == ")").unwrap_or(0);
                }
                token if is_name(token) => {
                    let mut path = vec![token.to_owned()];
                    while tokens.get(at + 1).is_some_and(|token| token == "::") && tokens.get(at + 2).is_some_and(|t| is_name(t)) {
                        path.push(tokens[at + 2].clone());
                        at += 2;
                    }
                    if path.len() > 1 {
                        file.paths.push(path);
                    }
                }
                _ => {}
            }
            at += 1;
        }
        file
    }

    /// What the names that this file imports stand for.
    fn names(&self, module: &Path, modules: &BTreeMap<Path, &str>) -> BTreeMap<String, Path> {
        let known = self.uses.iter().filter_map(|leaf| Some((leaf.name.clone(), resolve(&leaf.path, module, modules, None)?)));
        known.filter(|(name, _)| name != "*" && name != "_").collect()
    }
}

/// Appends the leaves of a tree behind `prefix`.
fn leaves(tree: &[String], prefix: &[String], found: &mut Vec<Leaf>) {
    let open = tree.iter().position(|token| token == "{");
    let head: Path = tree[..open.unwrap_or(tree.len())].iter().filter(|token| *token != "::").cloned().collect();
    let Some(open) = open else {
        let (path, renamed) = match head.iter().position(|token| token == "as") {
            Some(at) => (&head[..at], head.get(at + 1).cloned()),
            None => (&head[..], None),
        };
        let mut path = [prefix, path].concat();
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        if let Some(last) = path.last().cloned() {
            found.push(Leaf { name: renamed.unwrap_or(last), path });
        }
        return;
    };
    let prefix = [prefix, &head].concat();
    let inner = &tree[open + 1..tree.len() - 1];
    let (mut depth, mut first) = (0, 0);
    for (at, token) in inner.iter().enumerate() {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," if depth == 0 => {
                leaves(&inner[first..at], &prefix, found);
                first = at + 1;
            }
            _ => {}
        }
    }
    if first < inner.len() {
        leaves(&inner[first..], &prefix, found);
    }
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Names, `::` and single characters; without comments, literals and lifetimes.
fn tokens_of(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let is = |at: usize, expected: &str| expected.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let c = chars[at];
        if is(at, "//") {
            while at < chars.len() && chars[at] != '\n' {
                at += 1;
            }
        } else if is(at, "/*") {
            let mut depth = 0;
            loop {
                let step = if is(at, "/*") { 1 } else { -i32::from(is(at, "*/")) };
                depth += step;
                at += if step == 0 { 1 } else { 2 };
                if depth == 0 || at >= chars.len() {
                    break;
                }
            }
        } else if c == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if c == '\'' {
            if chars.get(at + 1) == Some(&'\\') {
                at += 3;
                while at < chars.len() && chars[at] != '\'' {
                    at += 1;
                }
                at += 1;
            } else if chars.get(at + 2) == Some(&'\'') {
                at += 3;
            } else {
                at += 1;
                while chars.get(at).is_some_and(|c| c.is_alphanumeric() || *c == '_') {
                    at += 1;
                }
            }
        } else if c.is_alphanumeric() || c == '_' {
            let first = at;
            while chars.get(at).is_some_and(|c| c.is_alphanumeric() || *c == '_') {
                at += 1;
            }
            let word: String = chars[first..at].iter().collect();
            let marks = chars[at..].iter().take_while(|c| **c == '#').count();
            if word.ends_with('r') && word.len() <= 2 && chars.get(at + marks) == Some(&'"') {
                let end: String = std::iter::once('"').chain(std::iter::repeat_n('#', marks)).collect();
                at += marks + 1;
                while at < chars.len() && !is(at, &end) {
                    at += 1;
                }
                at += end.len();
            } else if is_name(&word) {
                tokens.push(word);
            }
        } else if is(at, "::") {
            tokens.push("::".to_owned());
            at += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            at += 1;
        }
    }
    tokens
}

/// Without the items under `#[cfg(test)]`.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let marks = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].iter().map(String::as_str).take(marks.len()).eq(marks) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += marks.len();
        let mut depth = 0;
        while at < tokens.len() {
            let token = tokens[at].as_str();
            at += 1;
            depth += i32::from(["(", "[", "{"].contains(&token)) - i32::from([")", "]", "}"].contains(&token));
            if depth == 0 && (token == ";" || token == "}") {
                break;
            }
        }
    }
    kept
}

#[test]
fn the_graph_is_that_of_the_code() {
    let sources = [
        ("src/lib.rs", "pub mod a; pub mod b; pub use a::Thing;"),
        ("src/a/mod.rs", "mod one; pub(in crate::b) mod two; pub use one::{self, Thing as Named}; pub struct Own;"),
        (
            "src/a/one.rs",
            "// use crate::b;\nuse super::{Own, two::{T as _, *}}; const S: &str = \"crate::b::X\"; #[cfg(test)] mod t { use crate::b; }",
        ),
        ("src/a/two.rs", "fn f<'a>(c: char) -> bool { c == '\"' || c == '\\'' || crate::b::f(r#\"crate::a\"#) }"),
        ("src/b.rs", "/* use crate::a; /* */ */ use std::fmt; pub(crate) fn f() { fmt::g() }"),
    ];
    let graph = |sources: &[(&str, &str)]| {
        let sources: Vec<(String, String)> = sources.iter().map(|(file, text)| ((*file).into(), (*text).into())).collect();
        Graph::of(&sources)
    };
    let found = graph(&sources);
    let edges: Vec<String> =
        found.edges.iter().flat_map(|(from, to)| to.keys().map(move |to| format!("{from} {to}").replace("src/", ""))).collect();
    let expected = ["a/mod.rs a/one.rs", "a/one.rs a/mod.rs", "a/one.rs a/two.rs", "a/two.rs b.rs", "lib.rs a/mod.rs"];
    assert_eq!(edges, expected);
    assert_eq!(found.cycles(), ["src/a/mod.rs -> src/a/one.rs (crate::a::one) -> src/a/mod.rs (crate::a::Own)"]);
    assert!(found.through_parents.is_empty(), "{:?}", found.through_parents);
    assert_eq!(found.knowledge("b", "a"), None);
    assert_eq!(found.knowledge("a", "b").as_deref(), Some("src/a/two.rs -> src/b.rs (crate::b::f)"));

    // Through a parent, by an alias in code, and from the root.
    let mut sources = sources;
    sources[3].1 = "use super::Named; use crate::b as other; fn f() { other::f(); crate::Thing::new() }";
    let found = graph(&sources);
    let through: Vec<&str> = found.through_parents.iter().map(|what| what.split(" is ").next().expect("a path")).collect();
    assert_eq!(through, ["src/a/two.rs: crate::a::Named", "src/a/two.rs: crate::Thing::new"]);
    assert!(found.edges["src/a/two.rs"].contains_key("src/b.rs"));
}
