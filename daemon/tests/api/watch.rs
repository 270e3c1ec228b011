//! `pagecopy watch`: it follows all migrations, and outlives the daemon.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::harness::{Daemon, start};

/// One that runs, ended with the test.
struct Watch {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Watch {
    fn start(daemon: &Daemon, program: &str, words: &[&str]) -> Watch {
        let mut child = Command::new(program)
            .args(words)
            .env("PAGECOPY_API", daemon.dir.join("api.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Watch { child, out }
    }

    /// Reads up to the line that has all of `words`.
    fn wait(&mut self, words: &[&str]) -> String {
        let mut seen = Vec::new();
        for line in self.out.by_ref().lines() {
            let line = line.unwrap();
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
            seen.push(line);
        }
        panic!("{words:?} is not in {seen:?}");
    }

    /// Reads up to `text` on a terminal, which has no ends of lines where it moves on by itself.
    fn wait_shown(&mut self, text: &str) {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let byte = self.out.by_ref().bytes().next();
            let byte = byte.unwrap_or_else(|| panic!("{text:?} is not in {seen:?}"));
            seen.push(byte.unwrap());
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PAGECOPY: &str = env!("CARGO_BIN_EXE_pagecopy");

/// Begins a migration that fails at once.
fn begin(daemon: &Daemon, vm: &str) {
    let begun = daemon.begin_in_vain(vm);
    assert_eq!(begun.status, 201, "{begun:?}");
}

/// Waits until a watcher has its connection to the events.
fn is_followed(watch: &mut Watch, daemon: &Daemon) {
    let mut stderr = BufReader::new(watch.child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(
        line.contains("following pagecopyd"),
        "{line} {}",
        daemon.dir.display()
    );
    std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
}

#[test]
fn lines_for_people_and_for_programs() {
    let daemon = Daemon::start("watch");
    let mut lines = Watch::start(&daemon, PAGECOPY, &["watch"]);
    let mut json = Watch::start(&daemon, PAGECOPY, &["watch", "--json"]);
    is_followed(&mut lines, &daemon);
    is_followed(&mut json, &daemon);
    begin(&daemon, "web");
    let end = lines.wait(&["web (leaves): failed: ", "/nonexistent", "what to do:"]);
    assert!(!end.contains('{'), "{end}");
    let last: Value = serde_json::from_str(&json.wait(&["finished"])).unwrap();
    assert_eq!(
        (&last["vm"], &last["side"]),
        (&"web".into(), &"source".into())
    );
    assert_eq!(last["status"], "failed", "{last}");
}

#[test]
fn it_goes_on_when_the_daemon_is_back() {
    let mut daemon = Daemon::start("watch-back");
    let mut json = Watch::start(&daemon, PAGECOPY, &["watch", "--json"]);
    is_followed(&mut json, &daemon);
    begin(&daemon, "web");
    json.wait(&["finished", "web"]);
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    daemon.child = start(&daemon.dir);
    // Another daemon's numbers begin anew, so it may have missed something.
    json.wait(&[r#"{"event":"missed"}"#]);
    begin(&daemon, "db");
    json.wait(&["finished", "db"]);
}

#[test]
fn a_terminal_has_a_line_for_each_and_the_end_of_each() {
    let daemon = Daemon::start("watch-terminal");
    let command = format!("{PAGECOPY} watch");
    let mut terminal = Watch::start(&daemon, "script", &["-qfec", &command, "/dev/null"]);
    terminal.wait_shown("no migrations just now");
    begin(&daemon, "web");
    terminal.wait_shown("web (leaves): failed: ");
}

#[test]
fn without_a_daemon_it_says_so() {
    let output = Command::new(PAGECOPY)
        .args(["--api", "/nonexistent/api.sock", "watch"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("start pagecopyd"), "{said}");
}
