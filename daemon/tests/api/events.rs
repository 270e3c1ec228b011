//! The events of all migrations, as a reader sees them that comes, goes and comes again.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use super::harness::Daemon;

/// A reader of `/v1/events`.
struct Reader {
    lines: BufReader<UnixStream>,
    /// The id of the last event that had one.
    last: String,
}

impl Reader {
    fn open(daemon: &Daemon, after: Option<&str>) -> Reader {
        let mut stream = UnixStream::connect(daemon.dir.join("api.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let after = after.map(|id| format!("Last-Event-ID: {id}\r\n"));
        let after = after.unwrap_or_default();
        let head = format!("GET /v1/events HTTP/1.1\r\nHost: localhost\r\n{after}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        Reader {
            lines: BufReader::new(stream),
            last: String::new(),
        }
    }

    /// The next event; nothing at the end.
    fn next(&mut self) -> Option<Value> {
        let mut data = None;
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(id) = line.strip_prefix("id: ") {
                self.last = id.trim().to_owned();
            }
            if let Some(text) = line.strip_prefix("data: ") {
                data = Some(serde_json::from_str(text).unwrap());
            }
            if line.trim().is_empty() && data.is_some() {
                return data;
            }
        }
    }

    /// Reads up to the end of a migration.
    fn up_to_finished(&mut self) -> Vec<Value> {
        let mut seen = Vec::new();
        loop {
            let event = self.next().expect("no end of the stream");
            let last = event["event"] == "finished";
            seen.push(event);
            if last {
                return seen;
            }
        }
    }
}

/// Begins a migration that fails at once; its id.
fn begin(daemon: &Daemon, vm: &str) -> String {
    let begun = daemon.begin_in_vain(vm).json();
    begun["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_reader_that_was_cut_off_goes_on_where_it_was() {
    let daemon = Daemon::start("feed");
    let mut reader = Reader::open(&daemon, None);
    let open = reader.next().unwrap();
    assert_eq!(
        (&open["event"], &open["missed"]),
        (&"open".into(), &false.into())
    );
    let first = begin(&daemon, "web");
    let seen = reader.up_to_finished();
    assert!(
        seen.iter().all(|event| event["id"] == first.as_str()),
        "{seen:?}"
    );
    assert!(seen.iter().all(|event| event["vm"] == "web"), "{seen:?}");
    assert!(
        seen.iter().all(|event| event["side"] == "source"),
        "{seen:?}"
    );
    let last = reader.last.clone();
    drop(reader);

    let second = begin(&daemon, "db");
    // Up to its end.
    daemon.get(&format!("/v1/migrations/{second}/events"));
    let mut again = Reader::open(&daemon, Some(&last));
    assert_eq!(again.next().unwrap()["missed"], false);
    let seen = again.up_to_finished();
    assert!(
        seen.iter().all(|event| event["id"] == second.as_str()),
        "{seen:?}"
    );

    // One that saw another daemon is told that it does not know all.
    let mut strange = Reader::open(&daemon, Some("0123456789ab-1"));
    assert_eq!(strange.next().unwrap()["missed"], true);
}

#[test]
fn readers_do_not_keep_a_daemon_from_ending() {
    let mut daemon = Daemon::start("feed-end");
    let mut reader = Reader::open(&daemon, None);
    reader.next().unwrap();
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(reader.next(), None);
    assert!(daemon.child.wait().unwrap().success());
}
