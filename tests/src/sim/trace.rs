//! What happened in a run, line by line, for a person who looks into a failure.

use std::fmt::{self, Write as _};

use pagecopy::engine::Time;

/// Longest line kept; messages with device state or runs are longer.
const LINE: usize = 220;

/// The lines of a run. Off, it costs nothing: a failing seed is run again with it on.
#[derive(Debug, Default)]
pub(super) struct Trace {
    on: bool,
    lines: Vec<String>,
}

impl Trace {
    /// Keeps lines if `on`.
    pub(super) fn new(on: bool) -> Trace {
        Trace {
            on,
            lines: Vec::new(),
        }
    }

    /// One line, formatted only if it is kept.
    pub(super) fn line(&mut self, now: Time, who: &str, text: fmt::Arguments<'_>) {
        if !self.on {
            return;
        }
        let mut line = String::new();
        let ms = now.0 / 1_000_000;
        // Writing to a string cannot fail.
        let _ = write!(
            line,
            "{:>6}.{:06} ms {who:<11} {text}",
            ms,
            now.0 % 1_000_000
        );
        if line.len() > LINE {
            let end = (0..=LINE)
                .rev()
                .find(|end| line.is_char_boundary(*end))
                .unwrap_or(0);
            line.truncate(end);
            line.push('…');
        }
        self.lines.push(line);
    }

    /// All lines.
    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines
    }
}
