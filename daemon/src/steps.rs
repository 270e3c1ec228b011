//! Steps: a test harness is told the name of each step that a session reaches, and may hold the session there.
//!
//! Only with the feature `steps`, which no build for use has, and with `PAGECOPY_STEPS` naming the unix socket on which
//! the harness listens. A step is an input or an output of an engine, before it is taken or carried out: `Send(Commit)`,
//! `Journaled(CommitIntent)`, `GuestStopped`. The session waits at a step that the harness wants held; its engine stands
//! still then, while the API, the lanes and the workers go on. All other steps pass at the cost of a look into a list.
//!
//! ```text
//! daemon: (connects)                    harness: source Send(Commit) 1 \n … \n (empty line: that is all)
//! daemon: source Send(Commit) 1 \n      harness: go \n
//! ```
//!
//! A file that `PAGECOPY_BREAK_RDMA` names, once it is there, breaks a queue pair of whichever daemon removes it.

use std::collections::HashMap;
use std::fmt::{self, Debug, Write};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use pagecopy::engine::journal::Side;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

/// Names a harness's socket.
const VARIABLE: &str = "PAGECOPY_STEPS";
/// No name of a step is longer; what is said of an input beyond that is never put into words.
const LONGEST: usize = 64;

/// Whether a queue pair is to break now.
#[cfg(feature = "rdma")]
pub(crate) fn breaks_rdma() -> bool {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let file = FILE.get_or_init(|| std::env::var_os("PAGECOPY_BREAK_RDMA").map(PathBuf::from));
    file.as_ref()
        .is_some_and(|file| std::fs::remove_file(file).is_ok())
}

/// What this daemon shares with the harness.
#[derive(Debug)]
struct Harness {
    /// What is to be held: the step's name with its side, and the occurrence, from 1.
    holds: Vec<(String, u32)>,
    /// How often each of them was reached.
    reached: Mutex<HashMap<String, u32>>,
    /// Held by the session that waits.
    connection: tokio::sync::Mutex<BufReader<UnixStream>>,
}

/// A session has come to `step`. Returns when it may go on, which is at once without a harness.
pub(crate) async fn reached(side: Side, step: &impl Debug) {
    static HARNESS: OnceCell<Option<Harness>> = OnceCell::const_new();
    let Some(harness) = HARNESS.get_or_init(connect).await else {
        return;
    };
    if let Some(line) = harness.count(format!("{} {}", side.word(), name(step))) {
        // A harness that has gone holds nobody.
        let _ = harness.wait(&line).await;
    }
}

async fn connect() -> Option<Harness> {
    let path = std::env::var_os(VARIABLE)?;
    match converse(UnixStream::connect(&path).await).await {
        Ok(harness) => Some(harness),
        Err(error) => {
            tracing::error!(%error, socket = ?path, "no harness holds this daemon's steps");
            None
        }
    }
}

async fn converse(stream: std::io::Result<UnixStream>) -> std::io::Result<Harness> {
    let mut connection = BufReader::new(stream?);
    let mut holds = Vec::new();
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).await?;
        let Some((step, nth)) = line.trim().rsplit_once(' ') else {
            break;
        };
        holds.push((step.to_owned(), nth.parse().unwrap_or(1)));
    }
    Ok(Harness {
        holds,
        reached: Mutex::default(),
        connection: tokio::sync::Mutex::new(connection),
    })
}

impl Harness {
    /// Counts the step; the line to say when it is to be held.
    fn count(&self, step: String) -> Option<String> {
        if self.holds.iter().all(|(held, _)| *held != step) {
            return None;
        }
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let nth = reached.entry(step.clone()).or_default();
        *nth += 1;
        let held = (step, *nth);
        self.holds
            .contains(&held)
            .then(|| format!("{} {}\n", held.0, held.1))
    }

    async fn wait(&self, line: &str) -> std::io::Result<()> {
        let mut connection = self.connection.lock().await;
        connection.get_mut().write_all(line.as_bytes()).await?;
        connection.read_line(&mut String::new()).await.map(drop)
    }
}

/// The name of an input or output; of a message or record with what it is.
fn name(step: &impl Debug) -> String {
    let mut text = Beginning(String::new());
    // Ends with an error where there is enough; what follows may be long.
    let _ = write!(text, "{step:?}");
    let outer = word(&text.0);
    match outer {
        "Send" | "Message" | "Journal" | "Journaled" | "JournalFailed" => {
            let inner = text.0.get(outer.len() + 1..).map_or("", word);
            format!("{outer}({inner})")
        }
        // SendOn(ChannelId(1), Barrier { … })
        "SendOn" => {
            let message = text.0.split_once(", ").map_or("", |(_, message)| message);
            format!("Send({})", word(message))
        }
        other => other.to_owned(),
    }
}

/// The word that a text begins with.
fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric());
    &text[..end.unwrap_or(text.len())]
}

/// Takes the first [`LONGEST`] bytes of what is written to it, and refuses the rest.
struct Beginning(String);

impl Write for Beginning {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push_str(text);
        if self.0.len() > LONGEST {
            return Err(fmt::Error);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagecopy::engine::journal::Record;
    use pagecopy::engine::source::{Input, Output};
    use pagecopy::engine::{ChannelId, MigrationId};
    use pagecopy::wire::Message;

    #[test]
    fn names_are_those_of_the_simulation() {
        let query = Message::Query {
            id: MigrationId([7; 16]),
        };
        assert_eq!(name(&Output::Send(Message::Commit)), "Send(Commit)");
        assert_eq!(name(&Output::Send(query)), "Send(Query)");
        let barrier = Output::SendOn(ChannelId(1), Message::Barrier { round: 3 });
        assert_eq!(name(&barrier), "Send(Barrier)");
        assert_eq!(
            name(&Output::Journal(Record::CommitIntent)),
            "Journal(CommitIntent)"
        );
        assert_eq!(
            name(&Input::Journaled(Record::GuestMoved)),
            "Journaled(GuestMoved)"
        );
        assert_eq!(name(&Input::Message(Message::Loaded)), "Message(Loaded)");
        assert_eq!(name(&Output::Scan { holes: true }), "Scan");
        assert_eq!(name(&Input::GuestStopped), "GuestStopped");
        let state = Message::DeviceState(bytes::Bytes::from(vec![0; 1 << 20]));
        assert_eq!(name(&Output::Send(state)), "Send(DeviceState)");
    }
}
