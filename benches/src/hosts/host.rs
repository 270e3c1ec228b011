//! A host, as whoever measures asks it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ask::{Answer, Ask, Hello, PROTOCOL};

/// How long an answer may take that does not say otherwise: a big guest fills its memory meanwhile.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long an agent has to greet.
const GREETING: Duration = Duration::from_secs(60);
/// How long its last words may take after its end.
const WORDS: Duration = Duration::from_secs(2);
/// How long it has to clean up.
const CLEANING: Duration = Duration::from_secs(20);

/// A host's agent. It ends, with all that it has started, when this is dropped.
#[derive(Debug)]
pub struct Host {
    name: String,
    /// What it said first.
    pub hello: Hello,
    child: Child,
    asks: Option<ChildStdin>,
    answers: Receiver<String>,
    words: Words,
    lost: Option<String>,
}

/// What the agent, and what leads to it, says to people.
#[derive(Debug)]
struct Words {
    last: Arc<Mutex<String>>,
    /// Closed when all was read.
    all: Receiver<()>,
    /// Whether it is handed on to the terminal.
    shown: Arc<AtomicBool>,
}

impl Host {
    /// Starts `command`, which is to lead to an agent that reads `before` first, and waits until that greets. `name` is
    /// what people call the host.
    ///
    /// # Errors
    /// It does not, and why.
    pub fn start(name: &str, mut command: Command, before: &[u8]) -> Result<Host, String> {
        command.stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            let program = command.get_program().to_string_lossy().into_owned();
            format!("{name}: {program:?} does not start: {error}; --ssh says what is called")
        })?;
        let answers = lines_of(child.stdout.take());
        let mut host = Host {
            name: name.to_owned(),
            hello: Hello {
                agent: 0,
                pid: 0,
                ssh_connection: String::new(),
            },
            asks: child.stdin.take(),
            words: Words::of(child.stderr.take()),
            answers,
            child,
            lost: None,
        };
        let sent = host.send(before);
        let line = match sent {
            Ok(()) => host.hear(GREETING)?,
            Err(_) => return Err(host.gone()),
        };
        host.hello = host.greeted(&line)?;
        host.words.shown.store(true, Ordering::Relaxed);
        Ok(host)
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process on this machine that leads to it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Why it answers no more.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Asks it, and waits for the answer.
    ///
    /// # Errors
    /// What the host says is in the way, with its name; or that it is lost.
    pub fn ask<T: DeserializeOwned>(&mut self, ask: &Ask) -> Result<T, String> {
        self.ask_within(PATIENCE, ask)
    }

    /// The same, where the answer may take longer by `more`.
    ///
    /// # Errors
    /// The same.
    pub fn ask_for<T: DeserializeOwned>(&mut self, more: Duration, ask: &Ask) -> Result<T, String> {
        self.ask_within(PATIENCE + more, ask)
    }

    fn ask_within<T: DeserializeOwned>(
        &mut self,
        patience: Duration,
        ask: &Ask,
    ) -> Result<T, String> {
        if let Some(why) = &self.lost {
            return Err(why.clone());
        }
        let mut line = serde_json::to_vec(ask).map_err(|error| error.to_string())?;
        line.push(b'\n');
        if self.send(&line).is_err() {
            return Err(self.gone());
        }
        let line = self.hear(patience)?;
        let strange = |error| format!("{}: a strange answer: {error}: {line}", self.name);
        match serde_json::from_str(&line).map_err(strange)? {
            Answer::Done(value) => serde_json::from_value(value).map_err(strange),
            Answer::Failed(why) => Err(format!("{}: {why}", self.name)),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.asks {
            Some(asks) => asks.write_all(bytes).and_then(|()| asks.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn hear(&mut self, patience: Duration) -> Result<String, String> {
        match self.answers.recv_timeout(patience) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone()),
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("{}: no answer within {patience:?}", self.name);
                self.lost = Some(why.clone());
                Err(why)
            }
        }
    }

    /// What the first line says.
    fn greeted(&self, line: &str) -> Result<Hello, String> {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        match value["agent"].as_u64() {
            Some(PROTOCOL) => serde_json::from_value(value).map_err(|error| error.to_string()),
            Some(other) => Err(format!(
                "{}: the bench there is another version (it speaks {other}, this one {PROTOCOL}): put the programs of one \
                 build on both hosts, or leave out --programs, so that they are copied",
                self.name
            )),
            None => Err(format!(
                "{}: something writes to the output of commands there ({line:?}): a shell's start-up file must not, when \
                 nobody is logged in at a terminal",
                self.name
            )),
        }
    }

    /// It has ended: why, as far as it said.
    fn gone(&mut self) -> String {
        self.asks = None;
        let status = self.child.wait().ok();
        let why = ended(
            &self.name,
            self.hello.agent != 0,
            status,
            &self.words.last(),
        );
        self.lost = Some(why.clone());
        why
    }
}

/// What it means that what led to the agent has ended.
fn ended(name: &str, greeted: bool, status: Option<ExitStatus>, said: &str) -> String {
    let said = match said {
        "" => "it says nothing",
        said => said,
    };
    if greeted {
        return format!("{name}: the agent there, or the way to it, has ended: {said}");
    }
    match status.and_then(|status| status.code()) {
        // ssh's own.
        Some(255) => format!("{name}: ssh does not get there: {said}; `ssh {name} true` must work"),
        _ if said.contains("sudo:") => {
            format!("{name}: {said}; log in as root there, or let sudo ask for no password")
        }
        Some(code) => {
            format!("{name}: the agent does not start there (exit status {code}): {said}")
        }
        None => format!("{name}: the agent does not start there: {said}"),
    }
}

fn lines_of(stream: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (heard, lines) = channel();
    std::thread::spawn(move || {
        let stream = stream.map(BufReader::new);
        let lines = stream.into_iter().flat_map(BufRead::lines);
        for line in lines.map_while(Result::ok) {
            if heard.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

impl Words {
    fn of(stream: Option<impl Read + Send + 'static>) -> Words {
        let last = Arc::new(Mutex::new(String::new()));
        let shown = Arc::new(AtomicBool::new(false));
        let (kept, show) = (Arc::clone(&last), Arc::clone(&shown));
        let (reading, all) = channel::<()>();
        std::thread::spawn(move || {
            let _reading = reading;
            let stream = stream.map(BufReader::new);
            let lines = stream.into_iter().flat_map(BufRead::lines);
            for line in lines.map_while(Result::ok) {
                if show.load(Ordering::Relaxed) {
                    eprintln!("{line}");
                }
                if let (Ok(mut kept), false) = (kept.lock(), line.trim().is_empty()) {
                    line.trim().clone_into(&mut kept);
                }
            }
        });
        Words { last, all, shown }
    }

    /// The last line, once all was read. What ssh leaves in the background may hold the other end for long.
    fn last(&self) -> String {
        let _ = self.all.recv_timeout(WORDS);
        let last = self.last.lock();
        last.map(|last| last.clone()).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.asks = None;
        // Its output ends when it has cleaned up.
        while let Ok(_late) = self.answers.recv_timeout(CLEANING) {}
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn shell(script: &str) -> Result<Host, String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Host::start("there", command, b"")
    }

    #[test]
    fn an_agent_that_does_not_greet_says_why() {
        for (script, words) in [
            (
                "echo 'Connection refused' >&2; exit 255",
                "ssh does not get there: Connection refused",
            ),
            (
                "echo 'sudo: a password is required' >&2; exit 1",
                "let sudo ask for no password",
            ),
            ("exit 3", "exit status 3"),
            ("echo Welcome", "\"Welcome\""),
            ("echo '{\"agent\":999}'", "another version (it speaks 999"),
        ] {
            let why = shell(script).expect_err(script);
            assert!(why.starts_with("there: ") && why.contains(words), "{why}");
            assert_eq!(why.lines().count(), 1, "{why}");
        }
        let missing = Host::start("there", Command::new("/no/ssh"), b"").expect_err("no program");
        assert!(missing.contains("--ssh"), "{missing}");
    }

    #[test]
    fn an_agent_that_ends_is_lost() {
        let hello = format!("echo '{{\"agent\":{PROTOCOL},\"pid\":1,\"ssh_connection\":\"\"}}'");
        let mut host = shell(&format!("{hello}; read ask; echo Killed >&2")).expect("it greets");
        let why = host.ask::<()>(&Ask::Stop).expect_err("no answer");
        assert!(why.contains("has ended: Killed"), "{why}");
        assert_eq!(host.lost(), Some(why.as_str()));
        assert_eq!(host.ask::<()>(&Ask::Stop), Err(why), "it stays lost");
    }

    #[test]
    fn an_end_by_a_signal_is_one() {
        let killed = ended("there", false, Some(ExitStatus::from_raw(9)), "");
        assert!(
            killed.contains("does not start there: it says nothing"),
            "{killed}"
        );
    }
}
