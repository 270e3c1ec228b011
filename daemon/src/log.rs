//! The log, on standard error: a line of text for people, or one of JSON for programs, with the migration's id in each that
//! is about one.
//!
//! Whatever is done for a migration is done in its span (`migration`), which tasks and threads take along to those that
//! they start (`spawn`, `inherited`). A line's id is the event's own field `id`, or else the span's.
//!
//! Nobody waits for a reader of the log (`behind.rs`): a line that finds no place is lost, and the next that does is behind one that
//! says how many were.

mod behind;

use std::fmt::{self, Write as _};
use std::fs::File;
use std::future::Future;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::ValueEnum;
use pagecopy::engine::MigrationId;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::task::JoinHandle;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Instrument, Level, Span, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, registry};
use uuid::Uuid;

use behind::Behind;

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A line for people
    #[default]
    Text,
    /// A JSON object a line: `time`, `level`, `target`, `message`, `id` (the migration's), `fields`
    Json,
}

/// Everything that is logged from now on goes to standard error, as far as `RUST_LOG` lets it ("info" by default).
pub fn init(format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = Lines {
        format,
        coloured: io::stderr().is_terminal(),
        to: |line: &str| STDERR.take(line),
        lost: AtomicU64::new(0),
    };
    registry().with(filter).with(lines).init();
}

static STDERR: Behind = Behind::new();

/// From now on whoever logs does not wait for whoever reads it. Not before privileges are given up: it takes a thread.
///
/// # Errors
/// The system has no thread left.
pub fn wait_for_nobody() -> io::Result<()> {
    // Not by way of `io::stderr`, whose lock it would hold for as long as nobody reads.
    let stderr = io::stderr().as_fd().try_clone_to_owned()?;
    STDERR.serve(File::from(stderr))
}

/// Waits for a moment until everything is written. Says whether it is: otherwise nobody reads standard error.
pub fn flush() -> bool {
    STDERR.flush()
}

/// The span of a migration.
pub(crate) fn migration(id: MigrationId) -> Span {
    // Whatever is logged at all shall have the id.
    tracing::error_span!("migration", id = %Uuid::from_bytes(id.0))
}

/// A task for a migration.
pub(crate) fn spawn_for<T: Send + 'static>(
    id: MigrationId,
    task: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    tokio::spawn(task.instrument(migration(id)))
}

/// A task for the migration that the caller works for, if it does for one.
pub(crate) fn spawn<T: Send + 'static>(
    task: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    tokio::spawn(task.in_current_span())
}

/// The same of something that blocks.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(inherited(work))
}

/// Work for the same in a thread of its own.
pub(crate) fn inherited<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let span = Span::current();
    move || span.in_scope(work)
}

/// The field that names a migration.
const ID: &str = "id";

/// Writes each event as a line.
struct Lines<W> {
    format: Format,
    coloured: bool,
    /// Takes a line, or says that it is lost.
    to: W,
    /// Lines that were lost, and of which that was not said.
    lost: AtomicU64,
}

impl<W: Fn(&str) -> bool> Lines<W> {
    fn put(&self, line: Line) -> bool {
        let mut text = match self.format {
            Format::Text => line.text(self.coloured),
            Format::Json => line.json(),
        };
        text.push('\n');
        (self.to)(&text)
    }
}

/// The migration that a span is about.
struct About(String);

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&str) -> bool + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let (Some(span), Some(about)) = (context.span(id), fields.id) {
            span.extensions_mut().insert(About(about));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if fields.id.is_none() {
            let mut spans = context.event_scope(event).into_iter().flatten();
            let about = spans.find_map(|span| Some(span.extensions().get::<About>()?.0.clone()));
            about.into_iter().for_each(|id| fields.name(id));
        }
        let metadata = event.metadata();
        let target = fields.target.take();
        let target = target.unwrap_or_else(|| metadata.target().to_owned());
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 && !self.put(Line::about_lost(lost)) {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        } else if !self.put(Line::new(*metadata.level(), target, fields)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One line.
struct Line {
    time: String,
    level: Level,
    target: String,
    fields: Fields,
}

impl Line {
    fn new(level: Level, target: String, fields: Fields) -> Line {
        let mut time = String::new();
        // A clock before 1970 is shown as none.
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        Line {
            time,
            level,
            target,
            fields,
        }
    }

    fn about_lost(lost: u64) -> Line {
        let fields = Fields {
            message: "lines of the log were lost: nobody read them in time".to_owned(),
            rest: vec![("lost", Said::Json(lost.into()))],
            ..Fields::default()
        };
        Line::new(Level::WARN, module_path!().to_owned(), fields)
    }

    fn json(self) -> String {
        let Fields {
            message, id, rest, ..
        } = self.fields;
        let rest = rest.into_iter().filter(|(name, _)| *name != ID);
        let rest = rest.map(|(name, said)| (name.to_owned(), said.into()));
        let line = Json {
            time: self.time,
            level: self.level.as_str(),
            target: self.target,
            message,
            id,
            fields: rest.collect(),
        };
        // Texts and numbers are never refused.
        serde_json::to_string(&line).unwrap_or_default()
    }

    fn text(&self, coloured: bool) -> String {
        let Line {
            time,
            level,
            target,
            fields,
        } = self;
        let colour = match *level {
            Level::ERROR => 31,
            Level::WARN => 33,
            Level::INFO => 32,
            _ => 34,
        };
        let mut text = match coloured {
            true => format!(
                "\x1b[2m{time}\x1b[0m \x1b[{colour}m{level:>5}\x1b[0m \x1b[2m{target}:\x1b[0m"
            ),
            false => format!("{time} {level:>5} {target}:"),
        };
        if !fields.message.is_empty() {
            let _ = write!(text, " {}", Printable(&fields.message));
        }
        for (name, value) in &fields.rest {
            let _ = match value {
                Said::Text(value) => write!(text, " {name}={value:?}"),
                Said::Shown(value) => write!(text, " {name}={}", Printable(value)),
                Said::Json(value) => write!(text, " {name}={value}"),
            };
        }
        text
    }
}

/// What an event or a span says.
#[derive(Default)]
struct Fields {
    message: String,
    /// The migration's.
    id: Option<String>,
    /// Where it comes from by way of the crate `log`.
    target: Option<String>,
    rest: Vec<(&'static str, Said)>,
}

/// The value of a field.
enum Said {
    /// A text.
    Text(String),
    /// Something as it shows itself.
    Shown(String),
    /// A number, or a truth.
    Json(Value),
}

impl From<Said> for Value {
    fn from(said: Said) -> Value {
        match said {
            Said::Text(text) | Said::Shown(text) => Value::String(text),
            Said::Json(value) => value,
        }
    }
}

impl Fields {
    /// They are about this migration.
    fn name(&mut self, id: String) {
        self.rest.push((ID, Said::Shown(id.clone())));
        self.id = Some(id);
    }

    fn take(&mut self, field: &Field, said: Said) {
        match (field.name(), said) {
            ("message", Said::Text(text) | Said::Shown(text)) => self.message = text,
            (ID, Said::Text(text) | Said::Shown(text)) => self.name(text),
            ("log.target", Said::Text(text)) => self.target = Some(text),
            (name, _) if name.starts_with("log.") => {}
            (name, said) => self.rest.push((name, said)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, Said::Shown(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, Said::Text(value.to_owned()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.take(field, Said::Json(value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.take(field, Said::Json(value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.take(field, Said::Json(value.into()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, Said::Json(value.into()));
    }
}

/// A line of JSON.
#[derive(Serialize)]
struct Json {
    time: String,
    level: &'static str,
    target: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    fields: Map<String, Value>,
}

/// Text that may be a peer's or QEMU's: it stays on its line, and commands no terminal.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);
    const NAMED: &str = "07070707-0707-0707-0707-070707070707";

    /// What is logged meanwhile.
    fn logged(format: Format, log: impl FnOnce()) -> String {
        let (mut written, end) = io::pipe().unwrap();
        let lines = Lines {
            format,
            coloured: false,
            to: move |line: &str| (&end).write_all(line.as_bytes()).is_ok(),
            lost: AtomicU64::new(0),
        };
        tracing::subscriber::with_default(registry().with(lines), log);
        let mut text = String::new();
        written.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_line_of_json_has_everything_in_its_place() {
        let line = logged(Format::Json, || {
            let _in_it = migration(ID).entered();
            tracing::warn!(peer = "b:1", rounds = 3_u64, ms = 1.5, whole = true, code = %"x", "a {}", "word");
        });
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        let line: Value = serde_json::from_str(&line).unwrap();
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
        assert_eq!(
            (&line["level"], &line["id"]),
            (&"WARN".into(), &NAMED.into())
        );
        assert_eq!(
            (&line["target"], &line["message"]),
            (&"daemon::log::tests".into(), &"a word".into())
        );
        let fields =
            serde_json::json!({"peer": "b:1", "rounds": 3, "ms": 1.5, "whole": true, "code": "x"});
        assert_eq!(line["fields"], fields);
    }

    #[test]
    fn a_line_of_text_says_the_id_once_and_stays_a_line() {
        let line = logged(Format::Text, || {
            let _in_it = migration(ID).entered();
            tracing::info!(peer = "b:1", why = %"a\nb\x1b[2J", "left");
        });
        let (_, said) = line.split_once("Z ").unwrap();
        assert_eq!(
            said,
            format!(
                " INFO daemon::log::tests: left peer=\"b:1\" why=a\\nb\\u{{1b}}[2J id={NAMED}\n"
            )
        );
    }

    #[test]
    fn an_event_that_is_about_another_migration_says_so() {
        let line = logged(Format::Json, || {
            let _in_it = migration(ID).entered();
            tracing::info!(id = "other", "asked");
        });
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["id"], "other");
        let line = logged(Format::Json, || tracing::info!("of none"));
        assert!(
            serde_json::from_str::<Value>(&line)
                .unwrap()
                .get("id")
                .is_none(),
            "{line}"
        );
    }

    #[test]
    fn how_many_lines_were_lost_is_said_as_soon_as_there_is_room() {
        let (mut written, end) = io::pipe().unwrap();
        let room = Arc::new(AtomicBool::new(true));
        let has_room = Arc::clone(&room);
        let lines = Lines {
            format: Format::Json,
            coloured: false,
            to: move |line: &str| {
                has_room.load(Ordering::Relaxed) && (&end).write_all(line.as_bytes()).is_ok()
            },
            lost: AtomicU64::new(0),
        };
        tracing::subscriber::with_default(registry().with(lines), || {
            tracing::info!("first");
            room.store(false, Ordering::Relaxed);
            (0..3).for_each(|_| tracing::info!("lost"));
            room.store(true, Ordering::Relaxed);
            tracing::info!("last");
        });
        let mut text = String::new();
        written.read_to_string(&mut text).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(
            (&lines[0]["message"], &lines[2]["message"]),
            (&"first".into(), &"last".into())
        );
        assert_eq!(
            (&lines[1]["fields"]["lost"], &lines[1]["level"]),
            (&3.into(), &"WARN".into())
        );
    }

    #[test]
    fn threads_take_the_id_along() {
        let line = logged(Format::Json, || {
            let work = migration(ID).in_scope(|| inherited(|| tracing::info!("elsewhere")));
            let dispatch = tracing::dispatcher::get_default(Clone::clone);
            let there =
                std::thread::spawn(move || tracing::dispatcher::with_default(&dispatch, work));
            there.join().unwrap();
        });
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["id"], NAMED);
    }
}
