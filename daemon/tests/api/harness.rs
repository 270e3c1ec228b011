//! A daemon in a directory of its own, spoken to by HTTP and by the command line.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// The header of a body that is JSON.
pub(crate) const JSON: &str = "Content-Type: application/json";
const CONFIG: &str = "name = 'a'\nlisten = '127.0.0.1:0'\napi = 'api.sock'\nstate-dir = 'state'\ninsecure-plaintext = true\n";

/// What begins a migration that fails at once.
pub(crate) fn in_vain(vm: &str) -> String {
    format!(r#"{{"vm":"{vm}","qmp":"/nonexistent","to":"127.0.0.1:1"}}"#)
}

/// A daemon in a directory of its own, ended with the test.
pub(crate) struct Daemon {
    pub(crate) dir: PathBuf,
    pub(crate) child: Child,
}

impl Daemon {
    pub(crate) fn start(name: &str) -> Daemon {
        Daemon::with(name, "")
    }

    /// One whose configuration has `more` in it. `{dir}` in it is the daemon's folder.
    pub(crate) fn with(name: &str, more: &str) -> Daemon {
        let dir = std::env::temp_dir().join(format!("pagecopy-api-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let more = more.replace("{dir}", &dir.display().to_string());
        std::fs::write(dir.join("c.toml"), format!("{CONFIG}{more}")).unwrap();
        Daemon {
            child: start(&dir),
            dir,
        }
    }

    pub(crate) fn cli(&self, words: &[&str]) -> Output {
        let api = self.dir.join("api.sock");
        Command::new(env!("CARGO_BIN_EXE_pagecopy"))
            .arg("--api")
            .arg(api)
            .args(words)
            .output()
            .unwrap()
    }

    /// Sends a request with these header lines, and takes the whole answer.
    pub(crate) fn ask(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        self.asked_by("Host: localhost", method, path, headers, body)
    }

    /// The same with `who`, a header line that says for which host or from where; without one for a host it is localhost.
    pub(crate) fn asked_by(
        &self,
        who: &str,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> Answer {
        let host = if who.starts_with("Host:") {
            String::new()
        } else {
            "Host: localhost\r\n".to_owned()
        };
        let mut stream = UnixStream::connect(self.dir.join("api.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\n{host}{who}\r\nConnection: close\r\nContent-Length: {length}\r\n{lines}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A daemon that refuses by the head alone may not take the body.
        let _ = stream.write_all(body.as_bytes());
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        Answer::parse(&String::from_utf8_lossy(&text))
    }

    /// Posts JSON.
    pub(crate) fn post(&self, path: &str, body: &str) -> Answer {
        self.ask("POST", path, &[JSON], body)
    }

    /// Begins a migration that fails at once: no QEMU is there.
    pub(crate) fn begin_in_vain(&self, vm: &str) -> Answer {
        self.post("/v1/migrations", &in_vain(vm))
    }

    /// Begins one and waits for its end; its id.
    pub(crate) fn fail(&self, vm: &str) -> String {
        let begun = self.begin_in_vain(vm);
        let id = begun.json()["id"].as_str().unwrap().to_owned();
        self.get(&format!("/v1/migrations/{id}/events"));
        id
    }

    /// Gets what must be there.
    pub(crate) fn get(&self, path: &str) -> Answer {
        let answer = self.ask("GET", path, &[], "");
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The head, in lower case.
    head: String,
    pub(crate) body: String,
}

impl Answer {
    fn parse(text: &str) -> Answer {
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer {
            status,
            head: head.to_lowercase(),
            body: body.to_owned(),
        }
    }

    /// The value of a header, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        let line = self
            .head
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_default()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Starts the daemon and waits until it tells systemd (here: us) that it is ready.
pub(crate) fn start(dir: &Path) -> Child {
    let notify = dir.join("notify");
    let _ = std::fs::remove_file(&notify);
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_pagecopyd"))
        .arg("--config")
        .arg(dir.join("c.toml"))
        .env("NOTIFY_SOCKET", &notify)
        .env("NO_COLOR", "1")
        // Each thread's own cache of the allocator would count as allocated: without it `pagecopy_allocated_bytes` is exact.
        .env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut buffer = [0; 64];
    let got = socket.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..got].trim_ascii(), b"READY=1");
    child
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a tool that scripts/install brings, with this on its standard input.
pub(crate) fn fed(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: scripts/install brings it"));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}
