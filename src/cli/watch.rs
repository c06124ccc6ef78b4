//! `--watch`: the canvas as a picture in the terminal, redrawn as events arrive.
//!
//! Masked positions are dots, revealed tokens are tinted from red to green by snapshot confidence,
//! remasked positions are marked blocks, fixed text is plain. The picture is drawn on stderr;
//! without a terminal there, nothing is drawn.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use crate::schedule::Schedule;
use crate::sequence::{Event, EventKind};
use crate::tokenizer::Tokenizer;

/// What one position shows.
#[derive(Clone, Debug, PartialEq)]
enum Cell {
    Fixed(String),
    Masked,
    Remasked,
    Revealed(String, f32),
}

/// The picture of one sample.
pub(super) struct Watch {
    cells: Vec<Cell>,
    stages: Vec<String>,
    status: String,
    delay: Duration,
    /// Lines of the last picture, to draw over.
    lines: usize,
}

impl Watch {
    /// `None` where stderr is no terminal.
    pub(super) fn new(delay_ms: u64) -> Option<Watch> {
        let delay = Duration::from_millis(delay_ms.min(10_000));
        std::io::stderr().is_terminal().then(|| Watch { cells: Vec::new(), stages: Vec::new(), status: String::new(), delay, lines: 0 })
    }

    pub(super) fn start(&mut self, canvas: &[Option<u32>], tokenizer: &Tokenizer, schedule: &Schedule) {
        self.cells = canvas.iter().map(|c| c.map_or(Cell::Masked, |id| Cell::Fixed(tokenizer.decode(&[id])))).collect();
        self.stages = schedule.stages.iter().map(ToString::to_string).collect();
        self.draw();
    }

    pub(super) fn event(&mut self, event: &Event, tokenizer: &Tokenizer) {
        self.apply(event, |id| tokenizer.decode(&[id]));
        if matches!(event.kind, EventKind::Unmask | EventKind::Edit | EventKind::Remask) {
            self.draw();
            std::thread::sleep(if event.kind == EventKind::Remask { self.delay * 20 } else { self.delay });
        }
    }

    fn apply(&mut self, event: &Event, piece: impl Fn(u32) -> String) {
        for ((&position, &token), &confidence) in event.positions.iter().zip(&event.tokens).zip(&event.confidence) {
            let Some(cell) = self.cells.get_mut(position) else { continue };
            match event.kind {
                EventKind::Unmask | EventKind::Edit => *cell = Cell::Revealed(piece(token), confidence),
                EventKind::Remask => *cell = Cell::Remasked,
                EventKind::Commit | EventKind::Done => {}
            }
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
        self.erase();
    }

    fn erase(&mut self) {
        if self.lines > 0 {
            let mut err = std::io::stderr().lock();
            // A terminal that is gone takes the picture with it; the text still goes to stdout.
            let _ = write!(err, "\x1b[{}F\x1b[J", self.lines);
            let _ = err.flush();
            self.lines = 0;
        }
    }

    fn draw(&mut self) {
        self.erase();
        let columns = terminal_size::terminal_size_of(std::io::stderr()).map_or(80, |(width, _)| usize::from(width.0));
        // The last column stays free: some terminals wrap when it is written.
        let width = columns.saturating_sub(1).clamp(20, 400);
        let (picture, lines) = render(&self.cells, width);
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "{picture}\x1b[2m{:.width$}\x1b[0m", self.status);
        let _ = err.flush();
        self.lines = lines + 1;
    }
}

/// The cells as lines of at most `width` columns with ANSI colours, and how many lines that is.
fn render(cells: &[Cell], width: usize) -> (String, usize) {
    let mut out = String::new();
    let (mut column, mut lines) = (0, 0);
    for cell in cells {
        let (style, text) = match cell {
            Cell::Fixed(text) => (String::new(), text.as_str()),
            Cell::Masked => ("\x1b[2m".to_string(), "·"),
            Cell::Remasked => ("\x1b[7;35m".to_string(), " ? "),
            Cell::Revealed(text, confidence) => (tint(*confidence), text.as_str()),
        };
        for (i, part) in text.split('\n').enumerate() {
            let part: String = part.chars().filter(|c| !c.is_control()).collect();
            let len = part.chars().count();
            if i > 0 || column + len > width {
                out.push('\n');
                lines += 1;
                column = 0;
            }
            if !part.is_empty() {
                let reset = if style.is_empty() { "" } else { "\x1b[0m" };
                let _ = write!(out, "{style}{part}{reset}");
                column += len;
            }
        }
    }
    out.push('\n');
    (out, lines + 1)
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
        Watch { cells, stages: vec!["draft".into(), "refine".into()], status: String::new(), delay: Duration::ZERO, lines: 0 }
    }

    fn event(kind: EventKind, positions: Vec<usize>) -> Event {
        let n = positions.len();
        Event { sample: 0, stage: 1, block: 0, step: 3, kind, positions, tokens: vec![7; n], confidence: vec![0.25; n] }
    }

    #[test]
    fn cells_follow_the_events() {
        let mut w = watch(vec![Cell::Fixed("a".into()), Cell::Masked, Cell::Masked]);
        w.apply(&event(EventKind::Unmask, vec![1]), |id| format!("t{id}"));
        assert_eq!(w.cells[1], Cell::Revealed("t7".into(), 0.25));
        w.apply(&event(EventKind::Remask, vec![1]), |_| unreachable!());
        assert_eq!(w.cells[1], Cell::Remasked);
        w.apply(&event(EventKind::Unmask, vec![1, 99]), |_| "x".into());
        w.apply(&event(EventKind::Done, vec![1]), |_| unreachable!());
        assert_eq!(w.cells.len(), 2, "the mask behind the end is gone");
        assert!(w.status.starts_with("stage 1 step 3 | refine"));
    }

    #[test]
    fn lines_wrap_and_are_counted() {
        let cells = vec![Cell::Fixed("0123456789".into()), Cell::Masked, Cell::Fixed("ab\ncd".into()), Cell::Remasked];
        let (picture, lines) = render(&cells, 10);
        assert_eq!(lines, 3, "{picture:?}");
        assert_eq!(picture.matches('\n').count(), 3);
        assert!(picture.contains('·') && picture.contains(" ? "));
        // Control characters of a model's text never reach the terminal.
        assert!(!render(&[Cell::Revealed("\x1b[2J\r".into(), 0.5)], 10).0.contains("\x1b[2J"));
    }

    #[test]
    fn tints_run_from_red_to_green() {
        assert_eq!((tint(0.0), tint(1.0)), ("\x1b[38;2;255;0;60m".to_string(), "\x1b[38;2;0;220;60m".to_string()));
    }
}
