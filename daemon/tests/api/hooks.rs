//! Web hooks: what is told and how it is signed, again when it is not taken, and never so that anybody waits for it. Over TLS:
//! `tests/tests/hooks.rs`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::harness::{Daemon, stderr};

/// One who is told.
struct Receiver(TcpListener);

/// A request as it came.
#[derive(Debug)]
struct Posted {
    line: String,
    /// Lines of the head, in lower case.
    head: Vec<String>,
    body: String,
}

impl Receiver {
    fn new() -> Receiver {
        Receiver(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn url(&self) -> String {
        format!("http://{}/told?by=pagecopy", self.0.local_addr().unwrap())
    }

    /// Takes one request and answers it with `status`.
    fn take(&self, status: &str) -> Posted {
        let (mut stream, _) = self.0.accept().unwrap();
        let posted = read(&stream);
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nLocation: http://127.0.0.1:1/\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).unwrap();
        posted
    }
}

fn read(stream: &TcpStream) -> Posted {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_lowercase());
    }
    let mut posted = Posted {
        line,
        head,
        body: String::new(),
    };
    let length: usize = posted.header("content-length").parse().unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    posted.body = String::from_utf8(body).unwrap();
    posted
}

impl Posted {
    fn header(&self, name: &str) -> &str {
        let line = self
            .head
            .iter()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

const SECRET: &str = "the secret of this test";

fn with_hook(name: &str, url: &str, more: &str) -> Daemon {
    let secret = std::env::temp_dir().join(format!("pagecopy-hook-{}-{name}", std::process::id()));
    std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let hook = format!("[[hooks]]\nurl = {url:?}\nsecret-file = {secret:?}\n{more}");
    let daemon = Daemon::with(name, &hook);
    std::fs::remove_file(secret).unwrap();
    daemon
}

#[test]
fn the_end_is_told_and_signed() {
    let receiver = Receiver::new();
    let daemon = with_hook("hooks", &receiver.url(), "");
    let id = daemon.fail("web");
    let end = receiver.take("204 No Content");
    assert_eq!(end.line, "POST /told?by=pagecopy HTTP/1.1\r\n");
    assert_eq!(end.header("content-type"), "application/json");
    assert_eq!(end.header("pagecopy-event"), "finished");
    let told = end.json();
    assert_eq!(
        (&told["host"], &told["vm"], &told["id"], &told["status"]),
        (
            &"a".into(),
            &"web".into(),
            &id.as_str().into(),
            &"failed".into()
        )
    );
    // As its receiver checks it.
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, SECRET.as_bytes());
    let signed = format!("{}.{}", end.header("pagecopy-time"), end.body);
    let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
    let hex: String = tag
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(end.header("pagecopy-signature"), format!("sha256={hex}"));
}

#[test]
fn what_is_not_taken_is_told_again_and_what_is_refused_is_not() {
    let receiver = Receiver::new();
    let daemon = with_hook("hooks-again", &receiver.url(), "events = ['finished']\n");
    let first = daemon.fail("web");
    let posted = receiver.take("503 Service Unavailable");
    let again = receiver.take("200 OK");
    assert_eq!(again.body, posted.body);
    assert_eq!(
        again.header("pagecopy-delivery"),
        posted.header("pagecopy-delivery")
    );
    assert_eq!(again.json()["id"], first.as_str());
    // Neither a refusal nor a redirection is followed by anything.
    let refused = daemon.fail("web");
    let moved = daemon.fail("web");
    let last = daemon.fail("web");
    assert_eq!(
        receiver.take("404 Not Found").json()["id"],
        refused.as_str()
    );
    assert_eq!(receiver.take("302 Found").json()["id"], moved.as_str());
    assert_eq!(receiver.take("200 OK").json()["id"], last.as_str());
}

#[test]
fn nobody_waits_for_one_who_does_not_answer() {
    // It is connected to, and answers nothing.
    let receiver = Receiver::new();
    let mut daemon = with_hook("hooks-silent", &receiver.url(), "");
    // Or its log would be full.
    let mut stderr = daemon.child.stderr.take().unwrap();
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        stderr.read_to_string(&mut log).map(|_| log)
    });
    let from = Instant::now();
    for _ in 0..300 {
        daemon.fail("web");
    }
    assert!(
        from.elapsed() < Duration::from_secs(30),
        "{:?}",
        from.elapsed()
    );
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    let log = log.join().unwrap().unwrap();
    assert_eq!(log.matches("a hook does not keep up").count(), 1, "{log}");
}

#[test]
fn the_last_is_told_while_the_daemon_ends() {
    let receiver = Receiver::new();
    let mut daemon = with_hook("hooks-end", &receiver.url(), "events = ['finished']\n");
    let id = daemon.fail("web");
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(receiver.take("200 OK").json()["id"], id.as_str());
    assert!(daemon.child.wait().unwrap().success());
}

#[test]
fn a_hook_that_cannot_be_is_refused_at_the_start() {
    let dir = std::env::temp_dir().join(format!("pagecopy-api-hooks-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("short"), "short\n").unwrap();
    let start = |hook: &str| {
        let text = "name = 'a'\nlisten = '127.0.0.1:0'\napi = 'api.sock'\nstate-dir = 'state'\ninsecure-plaintext = true\n";
        std::fs::write(dir.join("c.toml"), format!("{text}[[hooks]]\n{hook}")).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pagecopyd"));
        let output = command
            .arg("--config")
            .arg(dir.join("c.toml"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{hook}");
        stderr(&output)
    };
    for (hook, word) in [
        ("url = 'http://a/'\nsecret-file = 'absent'", "absent"),
        (
            "url = 'http://a/'\nsecret-file = 'short'",
            "at least 16 bytes",
        ),
        (
            "url = 'https://a/'\nca = 'short'",
            "no certificate of an authority",
        ),
        ("url = 'gopher://a/'", "is no address for a hook"),
    ] {
        let said = start(hook);
        assert!(
            said.contains(word) && said.contains("what to do:"),
            "{said}"
        );
    }
    std::fs::remove_dir_all(dir).unwrap();
}
