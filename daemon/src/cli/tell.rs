//! What a command prints: lines for people, or events for programs.

use std::io::{self, Write};

use serde_json::Value;

/// What is told, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tell {
    as_json: bool,
}

impl Tell {
    pub(super) fn new(as_json: bool) -> Tell {
        Tell { as_json }
    }

    /// Something for people only.
    pub(super) fn note(self, text: &str) {
        eprintln!("pagecopy: {text}");
    }

    /// A line for people, and an event for programs. A reader that has left is no reason to leave the guests.
    pub(super) fn event(self, line: &str, event: impl FnOnce() -> Value) {
        let mut out = io::stdout().lock();
        let _ = match self.as_json {
            true => writeln!(out, "{}", event()),
            false if line.is_empty() => Ok(()),
            false => writeln!(out, "{line}"),
        };
        let _ = out.flush();
    }
}
