//! The daemon itself, without a guest: its API, its errors, its end.

#![allow(clippy::unwrap_used)]

mod access;
mod evacuate;
mod events;
mod harness;
mod hooks;
mod keys;
mod metrics;
mod openapi;
mod page;
mod problems;
mod queue;
mod watch;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::Value;

use harness::{Daemon, start, stderr};

#[test]
fn an_empty_daemon_answers_and_ends_in_order() {
    let mut daemon = Daemon::start("empty");
    let mode = std::fs::metadata(daemon.dir.join("api.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let list = daemon.cli(&["list"]);
    assert!(list.status.success(), "{}", stderr(&list));
    assert!(String::from_utf8_lossy(&list.stdout).contains("no migrations"));
    let status = daemon.cli(&["status", "--json"]);
    assert_eq!(
        serde_json::from_slice::<Value>(&status.stdout).unwrap(),
        serde_json::json!([])
    );

    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    assert!(!daemon.dir.join("api.sock").exists());
    let log = BufReader::new(daemon.child.stderr.take().unwrap());
    let lines: Vec<String> = log.lines().map(Result::unwrap).collect();
    assert!(
        lines.iter().any(|line| line.contains("INSECURE")),
        "{lines:?}"
    );
}

/// Its standard error is a pipe, as that of a program whose parent has lost interest.
#[test]
fn a_daemon_whose_log_nobody_reads_serves_and_ends() {
    let mut daemon = Daemon::start("unread");
    let vm = "x".repeat(200);
    for _ in 0..400 {
        daemon.fail(&vm);
    }
    assert_eq!(daemon.get("/v1/migrations").status, 200);
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    let mut log = Vec::new();
    let mut end = daemon.child.stderr.take().unwrap();
    end.read_to_end(&mut log).unwrap();
    assert!(log.len() > 60_000, "the pipe was not full: {}", log.len());
}

#[test]
fn requests_that_cannot_be_are_told_why() {
    let daemon = Daemon::start("requests");
    let told = |words: &[&str], part: &str| {
        let output = daemon.cli(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert!(
            stderr(&output).contains(part),
            "{words:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains("what to do:"),
            "{words:?}: {}",
            stderr(&output)
        );
    };
    told(
        &["receive", "--vm", "web", "--qmp", "/nonexistent"],
        "there is no QMP socket /nonexistent",
    );
    told(&["status", "nonsense"], "not the id of a migration");
    told(
        &["status", "6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e"],
        "there is no migration",
    );
    told(
        &["cancel", "6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e"],
        "there is no migration",
    );
    told(
        &["migrate", "--vm", "web", "--qmp", "/q", "--to", "nowhere"],
        "has no port",
    );
    told(
        &["migrate", "--vm", "", "--qmp", "/q", "--to", "b:1"],
        "name of the guest",
    );
    assert_eq!(
        daemon.cli(&["migrate", "--vm", "web"]).status.code(),
        Some(2)
    );
}

#[test]
fn a_migration_that_fails_ends_in_one_json_line() {
    let daemon = Daemon::start("json");
    let output = daemon.cli(&[
        "migrate",
        "--vm",
        "web",
        "--qmp",
        "/nonexistent",
        "--to",
        "127.0.0.1:1",
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "finished");
    assert_eq!(last["status"], "failed");
    assert_eq!(last["mode"], "precopy");
    assert!(
        last["error"].as_str().unwrap().contains("/nonexistent"),
        "{last}"
    );
    let keys = [
        "id",
        "transport",
        "total_ms",
        "downtime_ms",
        "predicted_downtime_ms",
        "rounds",
        "bytes_on_wire",
        "pages_sent",
        "pages_zero",
        "attach_stop_us",
        "goodput_mbit_s",
    ];
    for key in keys {
        assert!(last.get(key).is_some(), "{key} is not in {last}");
    }
    // A late reader of its events sees the same end, and its id is known.
    let shown = daemon.cli(&["status", last["id"].as_str().unwrap(), "--json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["state"], "failed");
    assert_eq!(shown["finished"], last);
    let cancel = daemon.cli(&["cancel", last["id"].as_str().unwrap()]);
    assert!(
        stderr(&cancel).contains("has ended already"),
        "{}",
        stderr(&cancel)
    );
    let resolve = daemon.cli(&["resolve", last["id"].as_str().unwrap(), "--abandon"]);
    assert!(
        stderr(&resolve).contains("not in doubt"),
        "{}",
        stderr(&resolve)
    );
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let daemon = Daemon::start("second");
    let output = Command::new(env!("CARGO_BIN_EXE_pagecopyd"))
        .arg("--config")
        .arg(daemon.dir.join("c.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("another pagecopyd runs on state-dir"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_killed_daemon_can_be_started_again() {
    let mut daemon = Daemon::start("killed");
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    assert!(
        daemon.dir.join("api.sock").exists(),
        "a killed daemon leaves its socket"
    );
    daemon.child = start(&daemon.dir);
    assert!(daemon.cli(&["list"]).status.success());
}

#[test]
fn without_a_daemon_the_remedy_is_to_start_one() {
    let output = Command::new(env!("CARGO_BIN_EXE_pagecopy"))
        .args(["list"])
        .env("PAGECOPY_API", "/nonexistent/api.sock")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/nonexistent/api.sock"),
        "{}",
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("start pagecopyd"),
        "{}",
        stderr(&output)
    );
}
