//! How a running migration is shown: a bar on a terminal, plain lines elsewhere, or JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pagecopy::engine::event::Report;
use serde_json::Value;

use crate::units::{show_bytes, show_rate};

/// Shows events.
#[derive(Debug)]
pub(super) struct Progress {
    how: How,
}

#[derive(Debug)]
enum How {
    Json,
    Bar(ProgressBar),
    Lines,
}

impl Progress {
    pub(super) fn new(json: bool, vm: &str, id: &str) -> Progress {
        if json {
            return Progress { how: How::Json };
        }
        if !std::io::stderr().is_terminal() {
            println!("migration {id} of {vm}");
            return Progress { how: How::Lines };
        }
        let bar = ProgressBar::new(100);
        let style = ProgressStyle::with_template("{prefix} {bar:24} {percent:>3}%  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(vm.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress { how: How::Bar(bar) }
    }

    /// Shows one event.
    pub(super) fn event(&mut self, event: &Value) {
        match &self.how {
            How::Json => {
                let mut out = std::io::stdout().lock();
                // A reader that has left is no reason to leave the migration.
                let _ = writeln!(out, "{event}");
                let _ = out.flush();
            }
            How::Bar(bar) => {
                if let Some(report) = report(event) {
                    show_on_bar(bar, &report);
                }
            }
            How::Lines => {
                if let Some(line) = report(event).and_then(|report| line(&report)) {
                    println!("{line}");
                }
            }
        }
    }

    /// Says something in between.
    pub(super) fn note(&self, text: &str) {
        match &self.how {
            How::Bar(bar) => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if let How::Bar(bar) = &self.how {
            bar.finish_and_clear();
        }
    }
}

/// The `finished` event is no report, and is shown by the summary.
fn report(event: &Value) -> Option<Report> {
    serde_json::from_value(event.clone()).ok()
}

fn show_on_bar(bar: &ProgressBar, report: &Report) {
    match report {
        Report::Progress { percent, .. } => {
            bar.set_position(u64::from(*percent));
            bar.set_message(progress_words(report));
        }
        Report::Postcopy { .. } => bar.set_message(postcopy_words(report)),
        Report::State { state } => bar.set_message(format!("{state:?}").to_lowercase()),
        other => {
            if let Some(line) = line(other) {
                bar.println(line);
            }
        }
    }
}

/// A plain line, for what deserves one.
fn line(report: &Report) -> Option<String> {
    match report {
        Report::State { state } => Some(format!("{state:?}").to_lowercase()),
        Report::Round {
            round,
            ms,
            pages_sent,
            pages_zero,
            pages_dirty,
            predicted_downtime_ms,
            decision,
            ..
        } => Some(format!(
            "round {round}: {:.2} s, {pages_sent} pages sent, {pages_zero} zero, {pages_dirty} dirty since; predicted \
                 downtime {predicted_downtime_ms:.1} ms: {decision}",
            ms / 1e3
        )),
        Report::Notice { text } => Some(text.clone()),
        Report::Postcopy { .. } => Some(postcopy_words(report)),
        Report::Progress { .. } => None,
    }
}

fn postcopy_words(report: &Report) -> String {
    let Report::Postcopy {
        lacking_bytes,
        faults,
    } = report
    else {
        return String::new();
    };
    let mut words = format!(
        "the guest runs at the destination  {} to come",
        show_bytes(*lacking_bytes)
    );
    if let Some(faults) = faults {
        words += &format!(
            "  {} page faults, {} wait  p99 {} us",
            faults.count, faults.waiting, faults.p99_us
        );
    }
    words
}

fn progress_words(report: &Report) -> String {
    let Report::Progress {
        round,
        remaining_bytes,
        goodput_bytes_s,
        dirty_bytes_s,
        predicted_downtime_ms,
        eta_s,
        ..
    } = report
    else {
        return String::new();
    };
    let mut words = format!(
        "round {round}  {} left  {}  dirty {}",
        show_bytes(*remaining_bytes),
        show_rate(*goodput_bytes_s),
        show_rate(*dirty_bytes_s)
    );
    if let Some(ms) = predicted_downtime_ms {
        words += &format!("  downtime ~{ms:.0} ms");
    }
    if let Some(seconds) = eta_s {
        words += &format!("  ETA {seconds:.1} s");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagecopy::engine::encoding::Encoded;

    #[test]
    fn progress_has_all_figures() {
        let words = progress_words(&Report::Progress {
            encoded: Encoded::default(),
            round: 2,
            remaining_bytes: 3 << 20,
            total_bytes: 1 << 30,
            percent: 50,
            goodput_bytes_s: 800_000_000,
            dirty_bytes_s: 50_000_000,
            predicted_downtime_ms: Some(12.3),
            eta_s: Some(0.5),
        });
        assert_eq!(
            words,
            "round 2  3.0 MiB left  800.0 MB/s  dirty 50.0 MB/s  downtime ~12 ms  ETA 0.5 s"
        );
    }
}
