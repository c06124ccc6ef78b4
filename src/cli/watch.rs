//! `--watch`: the canvas as a picture in the terminal, redrawn as events arrive.
//!
//! Masked positions are dots, unmasked tokens are tinted from red to green by snapshot confidence,
//! remasked positions are marked blocks, fixed text is plain. The picture is drawn on stderr and
//! never larger than its window, so that it can be drawn over. Without a terminal there, or on one
//! that cannot move its cursor (`TERM=dumb`), nothing is drawn; under `NO_COLOR` it has no colours.

use std::fmt::Write as _;
use std::io::Write;
use std::time::Duration;

use unicode_width::UnicodeWidthChar;

use crate::cli::terminal::stderr_moves;
use crate::schedule::Schedule;
use crate::sequence::{Event, EventKind};
use crate::tokenizer::Tokenizer;

/// Tokens that may make up one character: it has four bytes at most.
const TOKENS_OF_CHAR: usize = 4;

/// What one position shows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell {
    Fixed(u32),
    Masked,
    Remasked,
    Revealed(u32, f32),
}

impl Cell {
    fn token(self) -> Option<u32> {
        match self {
            Cell::Fixed(token) | Cell::Revealed(token, _) => Some(token),
            Cell::Masked | Cell::Remasked => None,
        }
    }
}

/// The picture of one sample.
pub(super) struct Watch {
    cells: Vec<Cell>,
    stages: Vec<String>,
    status: String,
    delay: Duration,
    colour: bool,
    /// The position that changed last: a picture that is too tall shows the lines around it.
    focus: usize,
    /// Columns of each line of the last picture, to draw over.
    drawn: Vec<usize>,
}

impl Watch {
    /// `None` where stderr is no terminal, or one that cannot draw over what it has drawn.
    pub(super) fn new(delay_ms: u64) -> Option<Watch> {
        // https://no-color.org: present and not empty.
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let delay = Duration::from_millis(delay_ms.min(10_000));
        stderr_moves().then(|| Watch {
            cells: Vec::new(),
            stages: Vec::new(),
            status: String::new(),
            delay,
            colour,
            focus: 0,
            drawn: Vec::new(),
        })
    }

    pub(super) fn start(&mut self, canvas: &[Option<u32>], tokenizer: &Tokenizer, schedule: &Schedule) {
        self.cells = canvas.iter().map(|c| c.map_or(Cell::Masked, Cell::Fixed)).collect();
        self.stages = schedule.stages().iter().map(ToString::to_string).collect();
        self.draw(tokenizer);
    }

    pub(super) fn event(&mut self, event: &Event, tokenizer: &Tokenizer) {
        self.apply(event);
        if matches!(event.kind, EventKind::Unmask | EventKind::Edit | EventKind::Remask) {
            self.draw(tokenizer);
            std::thread::sleep(if event.kind == EventKind::Remask { self.delay * 20 } else { self.delay });
        }
    }

    fn apply(&mut self, event: &Event) {
        for ((&position, &token), &confidence) in event.positions.iter().zip(&event.tokens).zip(&event.confidence) {
            let Some(cell) = self.cells.get_mut(position) else { continue };
            match event.kind {
                EventKind::Unmask | EventKind::Edit => *cell = Cell::Revealed(token, confidence),
                EventKind::Remask => *cell = Cell::Remasked,
                EventKind::Commit | EventKind::Done => continue,
            }
            self.focus = position;
        }
        if event.kind == EventKind::Done {
            // A draft that ended early leaves masks after its last token.
            let len = event.positions.last().map_or(0, |p| p + 1);
            let fixed = self.cells.iter().rposition(|c| matches!(c, Cell::Fixed(_))).map_or(0, |p| p + 1);
            self.cells.truncate(len.max(fixed));
        }
        let stage = self.stages.get(usize::from(event.stage)).map_or("", String::as_str);
        self.status = format!("stage {} step {} | {stage}", event.stage, event.step);
    }

    /// Leaves the terminal clean for the final text.
    pub(super) fn finish(&mut self) {
        let mut out = String::new();
        self.erase(&mut out, window());
        show(&out);
    }

    /// A window that became narrower since has broken the lines.
    fn erase(&mut self, out: &mut String, (columns, rows): (usize, usize)) {
        let lines: usize = self.drawn.drain(..).map(|width| width.div_ceil(columns.max(1)).max(1)).sum();
        if lines > 0 {
            let _ = write!(out, "\x1b[{}F\x1b[J", lines.min(rows.saturating_sub(1).max(1)));
        }
    }

    fn draw(&mut self, tokenizer: &Tokenizer) {
        let mut out = String::new();
        let (columns, rows) = window();
        self.erase(&mut out, (columns, rows));
        self.drawn = self.picture(&mut out, &|ids| tokenizer.decode(ids), columns, rows);
        show(&out);
    }

    /// Appends the picture for a window, and gives the columns of its lines.
    fn picture(&self, out: &mut String, decode: &dyn Fn(&[u32]) -> String, columns: usize, rows: usize) -> Vec<usize> {
        // The last column stays free: some terminals wrap when it is written. So does the last
        // line, where the cursor waits.
        let width = columns.saturating_sub(1).min(400);
        let Some(height) = rows.checked_sub(2).filter(|_| width > 0) else { return Vec::new() };
        let mut page = Page { width, colour: self.colour, lines: vec![Line::default()] };
        let mut focus = 0;
        for (position, (cell, text)) in self.cells.iter().zip(texts(&self.cells, decode)).enumerate() {
            match *cell {
                Cell::Fixed(_) => page.write(&text, ""),
                Cell::Masked => page.write("·", "\x1b[2m"),
                Cell::Remasked => page.write(" ? ", "\x1b[7;35m"),
                Cell::Revealed(_, confidence) => page.write(&text, &tint(confidence)),
            }
            if position == self.focus {
                focus = page.lines.len() - 1;
            }
        }
        let first = (focus + 2).saturating_sub(height).min(page.lines.len().saturating_sub(height));
        let mut status = Page { width, colour: self.colour, lines: vec![Line::default()] };
        status.write(&self.status, "\x1b[2m");
        let shown = page.lines.into_iter().skip(first).take(height).chain(status.lines.into_iter().take(1));
        shown
            .map(|line| {
                let _ = writeln!(out, "{}", line.text);
                line.columns
            })
            .collect()
    }
}

/// Columns and lines of the window that stderr shows.
fn window() -> (usize, usize) {
    terminal_size::terminal_size_of(std::io::stderr()).map_or((80, 24), |(width, height)| (usize::from(width.0), usize::from(height.0)))
}

fn show(text: &str) {
    let mut err = std::io::stderr().lock();
    // A terminal that is gone takes the picture with it; the text still goes to stdout.
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// What each position shows of its run of tokens. A character of several tokens stands at the last
/// of them; what is decoded alone may lack the space in front, so each is decoded after the tokens
/// before it.
fn texts(cells: &[Cell], decode: &dyn Fn(&[u32]) -> String) -> Vec<String> {
    let mut texts = vec![String::new(); cells.len()];
    let mut before: Vec<u32> = Vec::new();
    let mut at = 0;
    while at < cells.len() {
        let group: Vec<u32> = cells[at..].iter().take(TOKENS_OF_CHAR).map_while(|cell| cell.token()).collect();
        if group.is_empty() {
            before.clear();
            at += 1;
            continue;
        }
        let whole = |count: &usize| match (*count, decode(&group[..*count])) {
            (1, text) => !text.ends_with('\u{fffd}'),
            // A byte that begins no character is not mended by what follows.
            (_, text) => !text.contains('\u{fffd}'),
        };
        let group = &group[..(1..=group.len()).find(whole).unwrap_or(1)];
        let (prefix, both) = (decode(&before), decode(&[&before, group].concat()));
        at += group.len();
        texts[at - 1] = both.strip_prefix(prefix.as_str()).map_or_else(|| decode(group), str::to_owned);
        before = group.to_vec();
    }
    texts
}

/// Lines that are no wider than a window.
struct Page {
    width: usize,
    colour: bool,
    lines: Vec<Line>,
}

#[derive(Default)]
struct Line {
    text: String,
    columns: usize,
}

impl Page {
    /// Writes text in a style, on the next line where it does not fit on this one. Control
    /// characters of a model's text never reach the terminal.
    fn write(&mut self, text: &str, style: &str) {
        for (i, part) in text.split('\n').enumerate() {
            let part: Vec<char> = part.chars().filter(|c| !c.is_control()).collect();
            let columns: usize = part.iter().map(|c| columns_of(*c)).sum();
            if i > 0 || self.line().columns > 0 && self.line().columns + columns > self.width {
                self.lines.push(Line::default());
            }
            let styled = self.colour && !style.is_empty() && !part.is_empty();
            let (begin, end) = if styled { (style, "\x1b[0m") } else { ("", "") };
            self.line().text += begin;
            for mut c in part {
                if columns_of(c) > self.width {
                    c = '?';
                }
                if self.line().columns + columns_of(c) > self.width {
                    self.line().text += end;
                    self.lines.push(Line { text: begin.to_owned(), columns: 0 });
                }
                let line = self.line();
                line.text.push(c);
                line.columns += columns_of(c);
            }
            self.line().text += end;
        }
    }

    fn line(&mut self) -> &mut Line {
        self.lines.last_mut().expect("begins with one")
    }
}

/// Columns that a terminal gives a character at most: two for East Asian ones and emoji, none for
/// marks. A selector may turn the character before it into an emoji.
fn columns_of(c: char) -> usize {
    if c == '\u{fe0f}' { 1 } else { c.width().unwrap_or(0) }
}

/// Red at 0 over yellow to green at 1, by the square root: most snapshot confidences are small.
fn tint(confidence: f32) -> String {
    let c = confidence.clamp(0.0, 1.0).sqrt();
    let (red, green) = ((255.0 * (2.0 - 2.0 * c).min(1.0)) as u8, (220.0 * (2.0 * c).min(1.0)) as u8);
    format!("\x1b[38;2;{red};{green};60m")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(cells: Vec<Cell>) -> Watch {
        Watch {
            cells,
            stages: vec!["draft".into(), "refine".into()],
            status: "stage 0 step 1 | draft".into(),
            delay: Duration::ZERO,
            colour: true,
            focus: 0,
            drawn: Vec::new(),
        }
    }

    fn event(kind: EventKind, positions: Vec<usize>) -> Event {
        let n = positions.len();
        Event { sample: 0, stage: 1, block: 0, step: 3, kind, positions, tokens: vec![7; n], confidence: vec![0.25; n] }
    }

    #[test]
    fn cells_follow_the_events() {
        let mut w = watch(vec![Cell::Fixed(1), Cell::Masked, Cell::Masked]);
        w.apply(&event(EventKind::Unmask, vec![1]));
        assert_eq!((w.cells[1], w.focus), (Cell::Revealed(7, 0.25), 1));
        w.apply(&event(EventKind::Remask, vec![1]));
        assert_eq!(w.cells[1], Cell::Remasked);
        w.apply(&event(EventKind::Unmask, vec![1, 99]));
        w.apply(&event(EventKind::Done, vec![1]));
        assert_eq!(w.cells.len(), 2, "the mask after the end is gone");
        assert!(w.status.starts_with("stage 1 step 3 | refine"));
    }

    /// Byte-level tokens: 1, 2, 3 are the bytes of a character, 10 is a word, 11 two lines, 12 a
    /// picture, 13 escapes.
    fn decode(ids: &[u32]) -> String {
        let bytes = ids.iter().flat_map(|id| match id {
            1..=3 => vec!["日".as_bytes()[*id as usize - 1]],
            10 => b" word".to_vec(),
            11 => b"ab\ncd".to_vec(),
            12 => "❤\u{fe0f}👩‍👩‍👧e\u{301}".as_bytes().to_vec(),
            13 => b"\x1b[2J\rx".to_vec(),
            _ => b"0123456789".to_vec(),
        });
        String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
    }

    /// `text` without its escapes.
    fn plain(text: &str) -> String {
        let mut parts = text.split('\x1b');
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |all, part| all + part.split_once('m').expect("a style").1)
    }

    #[test]
    fn a_character_of_several_tokens_is_shown_once() {
        let run = [Cell::Fixed(1), Cell::Revealed(2, 0.5), Cell::Revealed(3, 0.5), Cell::Fixed(10)];
        assert_eq!(texts(&run, &decode), ["", "", "日", " word"]);
        // One that is not complete stays a mark, and does not hide what follows.
        let broken = [Cell::Fixed(1), Cell::Masked, Cell::Fixed(3), Cell::Fixed(10)];
        assert_eq!(texts(&broken, &decode), ["\u{fffd}", "", "\u{fffd}", " word"]);
        // Words that are decoded alone lose their space.
        let metaspace = |ids: &[u32]| ids.iter().map(|id| format!(" w{id}")).collect::<String>().trim_start().to_owned();
        assert_eq!(texts(&[Cell::Fixed(5), Cell::Fixed(6), Cell::Masked, Cell::Fixed(7)], &metaspace), ["w5", " w6", "", "w7"]);
    }

    /// Whatever the window, no line is wider and the picture is not taller: it can be drawn over.
    #[test]
    fn pictures_fit_their_windows() {
        let tokens = [1, 2, 3, 10, 11, 12, 13, 20, 1, 10, 10, 12, 12];
        let cells = tokens.iter().cycle().take(200).enumerate().map(|(i, token)| match i % 7 {
            5 => Cell::Masked,
            6 => Cell::Remasked,
            _ => Cell::Revealed(*token, 0.5),
        });
        let mut w = watch(cells.collect());
        for columns in [0, 1, 2, 3, 5, 10, 19, 20, 80, 1000] {
            for rows in [0, 1, 2, 3, 10, 24, 500] {
                for focus in [0, 100, 199] {
                    w.focus = focus;
                    let mut out = String::new();
                    let lines = w.picture(&mut out, &decode, columns, rows);
                    assert_eq!(out.matches('\n').count(), lines.len(), "{columns} x {rows}");
                    assert!(lines.is_empty() || lines.len() < rows, "{columns} x {rows}: {} lines", lines.len());
                    assert!(lines.iter().all(|line| *line < columns), "{columns} x {rows}: {lines:?}");
                    assert!(!out.contains('\r') && !out.contains("\x1b[2J"), "{out:?}");
                    for (line, columns) in plain(&out).lines().zip(&lines) {
                        assert!(unicode_width::UnicodeWidthStr::width(line) <= *columns, "{line:?}");
                    }
                    w.drawn = lines;
                    let mut erased = String::new();
                    w.erase(&mut erased, (columns, rows));
                    assert!(erased.is_empty() || erased.starts_with("\x1b["), "{erased:?}");
                }
            }
        }
    }

    /// The lines around what changed last are shown where not all of them are.
    #[test]
    fn tall_pictures_follow_the_work() {
        let mut w = watch(vec![Cell::Fixed(20); 30]);
        w.cells[0] = Cell::Remasked;
        w.cells[29] = Cell::Remasked;
        for (focus, begins) in [(0, true), (29, false)] {
            w.focus = focus;
            let mut out = String::new();
            assert_eq!(w.picture(&mut out, &decode, 12, 6).len(), 5);
            assert_eq!(plain(&out).starts_with(" ? "), begins, "{out}");
            assert_eq!(plain(&out).trim_end().lines().rev().nth(1).is_some_and(|line| line.contains(" ? ")), !begins, "{out}");
        }
    }

    #[test]
    fn no_colour_means_no_style() {
        let mut w = watch(vec![Cell::Fixed(10), Cell::Masked, Cell::Remasked, Cell::Revealed(10, 0.5)]);
        let mut out = String::new();
        w.picture(&mut out, &decode, 80, 24);
        assert!(out.contains("\x1b["));
        w.colour = false;
        out.clear();
        w.picture(&mut out, &decode, 80, 24);
        assert_eq!(out, " word· ?  word\nstage 0 step 1 | draft\n");
    }

    #[test]
    fn tints_run_from_red_to_green() {
        assert_eq!((tint(0.0), tint(1.0)), ("\x1b[38;2;255;0;60m".to_string(), "\x1b[38;2;0;220;60m".to_string()));
    }
}
