//! `pagecopy watch`: all migrations of a daemon as they go, until it is ended.
//!
//! It follows `/v1/events`, and goes on where it was when the daemon is back after a restart.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};
use serde_json::Value;

use super::client::{CliError, Client, Events};
use super::progress;
use crate::migrations::Finished;

/// How long it waits before it asks a daemon again that does not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// Shows everything until it is interrupted.
///
/// # Errors
/// The daemon cannot be reached at the beginning.
pub(super) async fn watch(client: &Client, json: bool) -> Result<(), CliError> {
    let mut screen = Screen::new(json);
    tokio::select! {
        done = follow(client, &mut screen) => done,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn follow(client: &Client, screen: &mut Screen) -> Result<(), CliError> {
    let mut events = client.all_events(None).await?;
    loop {
        let why = match take(client, &mut events, screen).await {
            Ok(()) => "it has ended".to_owned(),
            Err(Stopped::Daemon(error)) => error.what,
            // Nobody reads on, and there is nobody to tell.
            Err(Stopped::Reader) => return Ok(()),
        };
        screen.note(&format!("pagecopyd is away ({why}); waiting for it"));
        let last = events.last_id().map(str::to_owned);
        events = loop {
            match client.all_events(last.as_deref()).await {
                Ok(events) => break events,
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        screen.note("pagecopyd is back");
    }
}

/// Why no more is shown.
enum Stopped {
    Daemon(CliError),
    Reader,
}

impl From<CliError> for Stopped {
    fn from(error: CliError) -> Stopped {
        Stopped::Daemon(error)
    }
}

impl From<io::Error> for Stopped {
    fn from(_: io::Error) -> Stopped {
        Stopped::Reader
    }
}

/// Shows events up to the end of the connection.
async fn take(client: &Client, events: &mut Events, screen: &mut Screen) -> Result<(), Stopped> {
    while let Some(event) = events.next().await? {
        let missed = event["missed"] == true || event["event"] == "missed";
        match event["event"].as_str() {
            Some("open" | "missed") => {
                if missed {
                    screen.missed()?;
                }
                if missed || screen.is_new() {
                    screen.list(&client.get("/v1/migrations").await?)?;
                }
            }
            _ => screen.event(&event)?,
        }
    }
    Ok(())
}

/// A migration: its id, and which side it is seen from.
type Key = (String, String);

/// How it is shown.
enum How {
    Json,
    Lines,
    Bars(MultiProgress, BTreeMap<Key, ProgressBar>),
}

/// Where it is shown.
struct Screen {
    how: How,
    is_new: bool,
}

impl Screen {
    fn new(json: bool) -> Screen {
        let how = match json {
            true => How::Json,
            false if io::stdout().is_terminal() && io::stderr().is_terminal() => {
                How::Bars(MultiProgress::new(), BTreeMap::new())
            }
            false => How::Lines,
        };
        Screen { how, is_new: true }
    }

    fn is_new(&self) -> bool {
        self.is_new
    }

    /// Something about the watching itself.
    fn note(&self, text: &str) {
        match &self.how {
            // A terminal that is gone is told nothing.
            How::Bars(all, _) => all.println(text).unwrap_or_default(),
            _ => eprintln!("pagecopy: {text}"),
        }
    }

    /// Some events were missed.
    fn missed(&self) -> io::Result<()> {
        match &self.how {
            How::Json => print(r#"{"event":"missed"}"#),
            _ => {
                self.note("more has happened than is kept; this is how it stands");
                Ok(())
            }
        }
    }

    /// How everything stands.
    fn list(&mut self, migrations: &Value) -> io::Result<()> {
        if self.is_new && !matches!(self.how, How::Bars(..)) {
            self.note("following pagecopyd");
        }
        self.is_new = false;
        if let How::Bars(_, bars) = &mut self.how {
            bars.values().for_each(ProgressBar::finish_and_clear);
            bars.clear();
        }
        let mut shown = false;
        for one in migrations.as_array().into_iter().flatten() {
            let state = one["state"].as_str().unwrap_or_default();
            if matches!(state, "completed" | "failed" | "cancelled") {
                continue;
            }
            shown = true;
            match &mut self.how {
                How::Json => {}
                How::Lines => print(&format!("{}: {state}", called(one)))?,
                How::Bars(all, bars) => bar(all, bars, one).set_message(state.to_owned()),
            }
        }
        if let (false, How::Bars(all, _)) = (shown, &self.how) {
            all.println("no migrations just now")?;
        }
        Ok(())
    }

    /// Shows one event.
    fn event(&mut self, event: &Value) -> io::Result<()> {
        let finished: Option<Finished> = match event["event"] == "finished" {
            true => serde_json::from_value(event.clone()).ok(),
            false => None,
        };
        match &mut self.how {
            How::Json => print(&event.to_string()),
            How::Lines => {
                let line = match &finished {
                    Some(finished) => Some(ended(finished)),
                    None => progress::report(event).and_then(|report| progress::line(&report)),
                };
                line.map_or(Ok(()), |line| print(&format!("{}: {line}", called(event))))
            }
            How::Bars(all, bars) => {
                if let Some(finished) = finished {
                    if let Some(bar) = bars.remove(&key(event)) {
                        bar.finish_and_clear();
                    }
                    return all.println(format!("{}: {}", called(event), ended(&finished)));
                }
                let bar = bar(all, bars, event);
                if let Some(report) = progress::report(event) {
                    match progress::is_for_bar(&report) {
                        true => progress::show_on_bar(bar, &report),
                        false => {
                            let line = progress::line(&report).unwrap_or_default();
                            all.println(format!("{}: {line}", called(event)))?;
                        }
                    }
                }
                Ok(())
            }
        }
    }
}

/// The bar of a migration, made when it is heard of for the first time.
fn bar<'a>(
    all: &MultiProgress,
    bars: &'a mut BTreeMap<Key, ProgressBar>,
    of: &Value,
) -> &'a ProgressBar {
    bars.entry(key(of))
        .or_insert_with(|| all.add(progress::bar(&called(of))))
}

fn key(of: &Value) -> Key {
    let text = |name: &str| of[name].as_str().unwrap_or_default().to_owned();
    (text("id"), text("side"))
}

/// A guest, and which way it goes.
fn called(of: &Value) -> String {
    let way = if of["side"] == "source" {
        "leaves"
    } else {
        "arrives"
    };
    format!("{} ({way})", of["vm"].as_str().unwrap_or_default())
}

/// How a migration ended, in a line.
fn ended(finished: &Finished) -> String {
    let mut line = finished.status.word().to_owned();
    match (&finished.error, finished.figures.downtime_ms) {
        (Some(error), _) => line += &format!(": {error}"),
        (None, Some(ms)) => {
            let total = finished.figures.total_ms / 1e3;
            line += &format!(", downtime {ms:.1} ms, total {total:.2} s");
        }
        (None, None) => {}
    }
    line
}

fn print(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use pagecopy::engine::MigrationId;
    use pagecopy::engine::event::{Figures, State};
    use serde_json::json;

    use super::*;
    use crate::failure::host;

    #[test]
    fn a_guest_and_its_end_in_words() {
        let event = json!({ "vm": "web", "side": "source", "id": "x" });
        assert_eq!(called(&event), "web (leaves)");
        assert_eq!(key(&event), ("x".to_owned(), "source".to_owned()));
        let figures = Figures {
            downtime_ms: Some(23.45),
            total_ms: 1500.0,
            ..Figures::default()
        };
        let finished = |state, failure: Option<&_>| {
            ended(&Finished::new(
                MigrationId([1; 16]),
                state,
                failure,
                figures.clone(),
            ))
        };
        assert_eq!(
            finished(State::Completed, None),
            "completed, downtime 23.4 ms, total 1.50 s"
        );
        let failure = host("no disk", "make room");
        let line = finished(State::Failed, Some(&failure));
        assert!(line.starts_with("failed: no disk"), "{line}");
        assert!(line.ends_with("make room"), "{line}");
    }
}
