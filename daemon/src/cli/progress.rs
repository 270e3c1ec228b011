//! How a running migration is shown: a bar on a terminal, plain lines elsewhere, or JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pagecopy::engine::event::{PostcopyProgress, Progress as RoundProgress, Report};
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
        let bar = bar(vm);
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

/// A bar for one migration.
pub(super) fn bar(prefix: &str) -> ProgressBar {
    let bar = ProgressBar::new(100);
    let style = ProgressStyle::with_template("{prefix} {bar:24} {percent:>3}%  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(prefix.to_owned());
    bar
}

/// The `finished` event is no report, and is shown by the summary.
pub(super) fn report(event: &Value) -> Option<Report> {
    serde_json::from_value(event.clone()).ok()
}

pub(super) fn show_on_bar(bar: &ProgressBar, report: &Report) {
    match report {
        Report::Progress(progress) => {
            bar.set_position(u64::from(progress.percent));
            bar.set_message(progress_words(progress));
        }
        Report::Postcopy(progress) => bar.set_message(postcopy_words(progress)),
        Report::State { state } => bar.set_message(format!("{state:?}").to_lowercase()),
        other => {
            if let Some(line) = line(other) {
                bar.println(line);
            }
        }
    }
}

/// Whether a bar can show it; anything else is a line of its own.
pub(super) fn is_for_bar(report: &Report) -> bool {
    matches!(
        report,
        Report::Progress(_) | Report::Postcopy(_) | Report::State { .. }
    )
}

/// A plain line, for what deserves one.
pub(super) fn line(report: &Report) -> Option<String> {
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
        Report::Switched { mode, switch } => Some(format!(
            "{}: the guest goes first, {} were sent, {} are to come",
            mode.word(),
            show_bytes(switch.sent_bytes),
            show_bytes(switch.lacking_bytes)
        )),
        Report::Throttle {
            throttle_percent: 0,
        } => Some("the guest is not slowed any more".to_owned()),
        Report::Throttle { throttle_percent } => Some(format!(
            "the guest is kept from writing for {throttle_percent} % of its time"
        )),
        Report::Channels { channels, decision } => {
            Some(format!("{channels} data channels: {decision}"))
        }
        Report::Notice { text } => Some(text.clone()),
        Report::Paused { reason } => Some(reason.clone()),
        Report::Postcopy(progress) => Some(postcopy_words(progress)),
        Report::Progress(_) => None,
    }
}

fn postcopy_words(progress: &PostcopyProgress) -> String {
    let faults = &progress.faults;
    let mut words = format!(
        "the guest runs at the destination  {} to come",
        show_bytes(progress.lacking_bytes)
    );
    if faults.faults + faults.faults_waiting > 0 {
        words += &format!(
            "  {} page faults, {} wait  p99 {} us",
            faults.faults, faults.faults_waiting, faults.fault_us.p99
        );
    }
    words
}

fn progress_words(progress: &RoundProgress) -> String {
    let mut words = format!(
        "round {}  {} left  {}  dirty {}",
        progress.round,
        show_bytes(progress.remaining_bytes),
        show_rate(progress.goodput_bytes_s),
        show_rate(progress.dirty_bytes_s)
    );
    if let Some(ms) = progress.predicted_downtime_ms {
        words += &format!("  downtime ~{ms:.0} ms");
    }
    if progress.throttle_percent > 0 {
        words += &format!("  slowed {} %", progress.throttle_percent);
    }
    if let Some(seconds) = progress.eta_s {
        words += &format!("  ETA {seconds:.1} s");
    }
    words
}

#[cfg(test)]
mod tests {
    use pagecopy::engine::event::{FaultFigures, Way};

    use super::*;
    use pagecopy::engine::encoding::Encoded;

    #[test]
    fn progress_has_all_figures() {
        let words = progress_words(&RoundProgress {
            encoded: Encoded::default(),
            round: 2,
            remaining_bytes: 3 << 20,
            total_bytes: 1 << 30,
            percent: 50,
            goodput_bytes_s: 800_000_000,
            dirty_bytes_s: 50_000_000,
            predicted_downtime_ms: Some(12.3),
            throttle_percent: 40,
            channels: 2,
            eta_s: Some(0.5),
        });
        assert_eq!(
            words,
            "round 2  3.0 MiB left  800.0 MB/s  dirty 50.0 MB/s  downtime ~12 ms  slowed 40 %  ETA 0.5 s"
        );
    }

    #[test]
    fn page_faults_are_told_once_there_are_some() {
        let mut progress = PostcopyProgress {
            mode: Way::Postcopy,
            lacking_bytes: 3 << 20,
            postcopy_ms: 1000.0,
            paused_ms: 0.0,
            faults: FaultFigures::default(),
        };
        let begin = "the guest runs at the destination  3.0 MiB to come";
        assert_eq!(postcopy_words(&progress), begin);
        progress.faults.faults = 7;
        progress.faults.fault_us.p99 = 300;
        let faults = "  7 page faults, 0 wait  p99 300 us";
        assert_eq!(postcopy_words(&progress), format!("{begin}{faults}"));
    }
}
