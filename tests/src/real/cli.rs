//! The command line, as a person or a tool would use it, and what it reports.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::daemon::{PORT, program};
use super::{Daemon, PATIENCE, Qemu, Side, eventually};

/// `pagecopy --api SOCKET …` of one daemon.
#[derive(Clone, Debug)]
pub struct Cli {
    api: PathBuf,
}

/// Where the daemon of a host takes guests.
pub fn listens_at(side: Side) -> String {
    format!("{}:{PORT}", side.address())
}

impl Cli {
    /// The command line of `daemon`.
    pub fn of(daemon: &Daemon) -> Cli {
        Cli {
            api: daemon.api().to_owned(),
        }
    }

    /// The command line of whatever listens at `api`.
    pub fn at(api: &Path) -> Cli {
        Cli {
            api: api.to_owned(),
        }
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .output()
            .expect("pagecopy can be called")
    }

    /// Makes `qemu` the destination for `vm`.
    ///
    /// # Errors
    /// What the command line printed as its error.
    pub fn receive(&self, vm: &str, qmp: &Path) -> Result<(), String> {
        let output = self
            .command(&["receive", "--vm", vm, "--qmp"])
            .arg(qmp)
            .output()
            .expect("pagecopy can be called");
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Starts to migrate `vm` to the daemon of `to`.
    pub fn migrate(&self, vm: &str, qemu: &Qemu, to: Side, options: &[&str]) -> Migration {
        self.migrate_socket(vm, qemu.socket(), &listens_at(to), options)
    }

    /// The same with a QMP socket and an address as given.
    pub fn migrate_socket(&self, vm: &str, qmp: &Path, to: &str, options: &[&str]) -> Migration {
        let mut command = self.command(&["migrate", "--vm", vm, "--to", to, "--json", "--qmp"]);
        Migration::start(command.arg(qmp).args(options))
    }

    /// Starts to evacuate the guests in the file `guests` to the daemons of these hosts.
    pub fn evacuate(&self, guests: &Path, to: &[Side], options: &[&str]) -> Migration {
        let to: Vec<String> = to.iter().map(|side| listens_at(*side)).collect();
        let to = to.join(",");
        let mut command = self.command(&["evacuate", "--to", &to, "--json", "--guests"]);
        Migration::start(command.arg(guests).args(options))
    }

    /// `pagecopy status ID --json`, parsed.
    pub fn status(&self, id: &str) -> Value {
        let output = self.run(&["status", id, "--json"]);
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(text.trim()).unwrap_or_else(|error| {
            panic!(
                "status prints no JSON: {error}: {text}{}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    /// `pagecopy status ID --json`, parsed, if the daemon knows the migration.
    pub fn find(&self, id: &str) -> Option<Value> {
        let output = self.run(&["status", id, "--json"]);
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Waits until a migration is in that state, and panics if it never is.
    pub fn wait_state(&self, id: &str, state: &str) {
        eventually(PATIENCE, || {
            let shown = self.find(id).unwrap_or_default();
            if shown["state"] == state {
                Ok(())
            } else {
                Err(shown.to_string())
            }
        })
        .unwrap_or_else(|shown| panic!("not {state}: {shown}"));
    }

    /// The id of the latest migration of `vm` here.
    pub fn id_of(&self, vm: &str) -> String {
        let shown = self.latest(|one| one["vm"] == vm);
        shown
            .and_then(|one| one["id"].as_str().map(str::to_owned))
            .expect("the daemon knows the migration")
    }

    /// The figures of the last migration of `vm` that ended here, as `pagecopy status --json` tells them.
    pub fn last_finished(&self, vm: &str) -> Option<Value> {
        let shown = self.latest(|one| one["vm"] == vm && one["finished"].is_object());
        shown.map(|one| one["finished"].clone())
    }

    fn latest(&self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let output = self.run(&["status", "--json"]);
        let all: Value = serde_json::from_slice(&output.stdout).ok()?;
        all.as_array()?.iter().rfind(|one| wanted(one)).cloned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("pagecopy"));
        command
            .arg("--api")
            .arg(&self.api)
            .args(arguments)
            .stdin(Stdio::null());
        command
    }
}

#[derive(Debug, Default)]
struct Told {
    events: Vec<Value>,
    /// Lines that are no JSON.
    strange: Vec<String>,
    ended: bool,
}

type Shared = Arc<(Mutex<Told>, Condvar)>;

/// A `pagecopy migrate --json` under way, or `evacuate`.
#[derive(Debug)]
pub struct Migration {
    child: Child,
    told: Shared,
    reader: Option<JoinHandle<()>>,
    errors: Option<JoinHandle<String>>,
}

impl Migration {
    fn start(command: &mut Command) -> Migration {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("pagecopy can be called");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut stderr = child.stderr.take().expect("a pipe");
        let told = Shared::default();
        let theirs = Arc::clone(&told);
        let reader = std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let mut told = theirs.0.lock().expect("no panic while held");
                match serde_json::from_str(&line) {
                    Ok(event) => told.events.push(event),
                    Err(_) => told.strange.push(line),
                }
                theirs.1.notify_all();
            }
            theirs.0.lock().expect("no panic while held").ended = true;
            theirs.1.notify_all();
        });
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Migration {
            child,
            told,
            reader: Some(reader),
            errors: Some(errors),
        }
    }

    /// Waits for an event that `wanted` accepts. Panics when the migration ends without it, or after `timeout`.
    pub fn wait_event(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + timeout;
        let mut told = self.told.0.lock().expect("no panic while held");
        loop {
            if let Some(event) = told.events.iter().find(|event| wanted(event)) {
                return event.clone();
            }
            assert!(
                !told.ended,
                "the migration ended before: {what}: {:?}",
                told.events.last()
            );
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "not within {timeout:?}: {what}: {:?}",
                told.events.last()
            );
            told = self
                .told
                .1
                .wait_timeout(told, left)
                .expect("no panic while held")
                .0;
        }
    }

    /// Waits until pages are on their way in round 0: in the middle of it, if it is slow enough.
    pub fn wait_mid_round(&self) {
        self.wait_event("a round under way", Duration::from_secs(60), |event| {
            event["event"] == "progress"
                && event["percent"]
                    .as_u64()
                    .is_some_and(|percent| percent >= 5)
        });
    }

    /// Whether `pagecopy` has ended, and if so, with success.
    pub fn ended(&mut self) -> Option<bool> {
        let status = self.child.try_wait().ok().flatten();
        status.map(|status| status.success())
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Outcome {
        let status = self.child.wait().expect("pagecopy ends");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
        let errors = self
            .errors
            .take()
            .and_then(|errors| errors.join().ok())
            .unwrap_or_default();
        let told = std::mem::take(&mut *self.told.0.lock().expect("no panic while held"));
        assert!(
            told.strange.is_empty(),
            "--json prints only JSON, but: {:?}",
            told.strange
        );
        Outcome {
            status,
            events: told.events,
            errors,
        }
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How a `pagecopy migrate --json` ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status.
    pub status: ExitStatus,
    /// All events.
    pub events: Vec<Value>,
    /// What it printed on its standard error.
    pub errors: String,
}

impl Outcome {
    /// The last event, which must be `finished`.
    pub fn finished(&self) -> &Value {
        let last = self
            .events
            .last()
            .unwrap_or_else(|| panic!("no event at all; {}", self.errors));
        assert_eq!(
            last["event"], "finished",
            "the last event is {last}; {}",
            self.errors
        );
        last
    }

    /// Panics unless the migration completed; returns the last event.
    pub fn completed(&self) -> &Value {
        let last = self.finished();
        assert_eq!(last["status"], "completed", "{last} {}", self.errors);
        assert!(
            self.status.success(),
            "completed, but pagecopy exits with {}",
            self.status
        );
        last
    }

    /// Panics unless it ended as `status`, with a failing exit status; returns the text of its error.
    pub fn not_completed(&self, status: &str) -> String {
        let last = self.finished();
        assert_eq!(last["status"], status, "{last} {}", self.errors);
        assert!(
            !self.status.success(),
            "not completed, but pagecopy exits with success"
        );
        last["error"]
            .as_str()
            .map_or_else(|| last["error"].to_string(), str::to_owned)
    }

    /// Panics unless it failed with an error that holds all of `words`.
    pub fn failed_with(&self, words: &[&str]) {
        let error = self.not_completed("failed");
        for word in words {
            assert!(
                error.contains(word),
                "the error does not say {word:?}: {error}"
            );
        }
    }
}
