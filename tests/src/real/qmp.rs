//! A QMP client for tests: QEMU connects to it, so that nothing has to be waited for.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::PATIENCE;

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Takes the connection that QEMU makes (`-chardev socket,server=off`), and leaves negotiation mode.
    pub fn accept(listener: &UnixListener) -> Qmp {
        let (stream, _) = listener.accept().expect("QEMU connects");
        Self::greeted(stream)
    }

    /// Connects to a monitor that nobody else uses now.
    pub fn connect(socket: &Path) -> Qmp {
        Self::greeted(UnixStream::connect(socket).expect("QEMU listens"))
    }

    fn greeted(stream: UnixStream) -> Qmp {
        let mut qmp = Qmp {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
        };
        qmp.patience(PATIENCE);
        let greeting = qmp.read().expect("QEMU greets");
        assert!(greeting.get("QMP").is_some(), "not a greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({}))
            .expect("QEMU leaves negotiation");
        qmp
    }

    /// Runs a command.
    ///
    /// # Errors
    /// QEMU's words.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(|error| format!("QMP: {error}"))?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error["desc"]
                    .as_str()
                    .unwrap_or("an error without words")
                    .to_owned());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event that `wanted` accepts, and returns its data. Panics after `timeout`.
    pub fn wait_event(
        &mut self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        self.event_within(name, timeout, wanted)
            .unwrap_or_else(|| panic!("no event {name} within {timeout:?}"))
    }

    /// The same; none after `timeout`, or when QEMU has ended.
    pub fn event_within(
        &mut self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Option<Value> {
        let deadline = Instant::now() + timeout;
        let fits = |event: &Value| event["event"] == name && wanted(&event["data"]);
        loop {
            if let Some(at) = self.events.iter().position(fits) {
                let event = self.events.remove(at);
                return event.map(|mut event| event["data"].take());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.patience(left);
            let answer = self.read();
            self.patience(PATIENCE);
            let answer = answer.ok()?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            }
        }
    }

    /// How long a read waits from now on.
    fn patience(&self, longest: Duration) {
        self.reader
            .get_ref()
            .set_read_timeout(Some(longest))
            .expect("a socket takes a time-out");
    }

    /// QEMU's run state: `running`, `paused`, `inmigrate`, `postmigrate`, …
    pub fn status(&mut self) -> String {
        let status = self
            .execute("query-status", json!({}))
            .expect("QEMU knows its state");
        status["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Switches migration capabilities on.
    pub fn capabilities(&mut self, names: &[&str]) {
        let list: Vec<Value> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.execute("migrate-set-capabilities", json!({"capabilities": list}))
            .expect("QEMU has these capabilities");
    }

    fn read(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err("QEMU closed its monitor".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| format!("QMP: {error}: {line}")),
            Err(error) => Err(format!("QMP: {error}")),
        }
    }
}
