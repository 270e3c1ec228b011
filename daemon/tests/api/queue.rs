//! Migrations that wait for their turn: who begins when, what is shown, a full queue, and what outlives the daemon.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::{Daemon, start};
use super::problems::assert_problem;

const GREETING: &[u8] = br#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":[]}}
"#;

/// QEMUs that greet and then say nothing: a migration of such a guest has begun, and does not come to anything.
pub(super) struct Mute {
    pub(super) socket: PathBuf,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Mute {
    pub(super) fn listen(dir: &Path) -> Mute {
        let socket = dir.join("mute.qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&streams);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let _ = (&stream).write_all(GREETING);
                theirs.lock().unwrap().push(stream);
            }
        });
        Mute { socket, streams }
    }

    /// Ends all that have begun.
    fn hang_up(&self) {
        self.streams.lock().unwrap().clear();
    }

    /// Waits until so many have begun.
    pub(super) fn wait_begun(&self, count: usize) {
        eventually(|| self.streams.lock().unwrap().len() == count);
    }
}

pub(super) fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Daemon {
    fn request(&self, mute: &Mute, vm: &str, more: &Value) -> super::harness::Answer {
        let mut body = json!({ "vm": vm, "qmp": mute.socket, "to": "127.0.0.1:1" });
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        self.post("/v1/migrations", &body.to_string())
    }

    pub(super) fn begin(&self, mute: &Mute, vm: &str, priority: i32) -> String {
        let answer = self.request(mute, vm, &json!({ "priority": priority }));
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    pub(super) fn shown(&self, id: &str) -> Value {
        self.get(&format!("/v1/migrations/{id}")).json()
    }

    pub(super) fn place(&self, id: &str) -> Option<u64> {
        self.shown(id)["place"].as_u64()
    }

    pub(super) fn cancel(&self, id: &str) {
        let answer = self.post(&format!("/v1/migrations/{id}/cancel"), "");
        assert_eq!(answer.status, 202, "{answer:?}");
    }
}

#[test]
fn the_most_urgent_begins_first_and_a_full_queue_says_so() {
    let daemon = Daemon::with("queue", "max-concurrent = 1\nmax-pending = 3\n");
    let mute = Mute::listen(&daemon.dir);
    let first = daemon.begin(&mute, "first", 0);
    mute.wait_begun(1);
    let [low, old, urgent] = [("low", -5), ("old", 0), ("urgent", 7)]
        .map(|(vm, priority)| daemon.begin(&mute, vm, priority));
    assert_eq!(
        [&first, &urgent, &old, &low].map(|id| daemon.place(id)),
        [None, Some(1), Some(2), Some(3)]
    );
    let list = daemon.cli(&["list"]);
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("pending 3"), "{list}");
    assert_eq!(daemon.shown(&urgent)["priority"], 7);

    let refused = daemon.request(&mute, "more", &json!({ "priority": 100 }));
    assert_problem(&refused, 429, "queue-full");
    let remedy = refused.json()["remedy"].as_str().unwrap().to_owned();
    assert!(remedy.contains("max-pending"), "{remedy}");
    let twice = daemon.request(&mute, "old", &json!({}));
    assert_problem(&twice, 400, "refused");

    // Cancelled, it waits no more and has left room.
    daemon.cancel(&old);
    eventually(|| daemon.shown(&old)["state"] == "cancelled");
    assert_eq!(daemon.place(&low), Some(2));
    daemon.begin(&mute, "more", 0);

    // The one that runs ends, and the next begins.
    daemon.cancel(&first);
    mute.wait_begun(2);
    assert_eq!([&urgent, &low].map(|id| daemon.place(id)), [None, Some(2)]);
}

#[test]
fn more_may_begin_after_a_reload() {
    let daemon = Daemon::with("queue-reload", "max-concurrent = 1\n");
    let mute = Mute::listen(&daemon.dir);
    for vm in ["one", "two", "three"] {
        daemon.begin(&mute, vm, 0);
    }
    mute.wait_begun(1);
    let file = daemon.dir.join("c.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(
        &file,
        text.replace("max-concurrent = 1", "max-concurrent = 3"),
    )
    .unwrap();
    daemon.signal(rustix::process::Signal::HUP);
    mute.wait_begun(3);
}

#[test]
fn what_a_request_may_say_of_it() {
    let daemon = Daemon::start("queue-requests");
    let mute = Mute::listen(&daemon.dir);
    for priority in [101, -101] {
        let answer = daemon.request(&mute, "vm", &json!({ "priority": priority }));
        assert_problem(&answer, 400, "refused");
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains("priority"), "{detail}");
    }
    for priority in [json!("high"), json!(1.5), json!(1_u64 << 40)] {
        let answer = daemon.request(&mute, "vm", &json!({ "priority": priority }));
        assert_problem(&answer, 422, "invalid");
    }
}

#[test]
fn those_that_wait_outlive_the_daemon_and_begin_under_the_id_that_was_told() {
    let mut daemon = Daemon::with("queue-restart", "max-concurrent = 1\n");
    let mute = Mute::listen(&daemon.dir);
    let first = daemon.begin(&mute, "first", 0);
    mute.wait_begun(1);
    let [later, gone, urgent] = [("later", 0), ("gone", 0), ("urgent", 9)]
        .map(|(vm, priority)| daemon.begin(&mute, vm, priority));
    daemon.cancel(&gone);
    eventually(|| daemon.shown(&gone)["state"] == "cancelled");
    daemon.signal(rustix::process::Signal::KILL);
    daemon.child.wait().unwrap();
    mute.hang_up();

    daemon.child = start(&daemon.dir);
    mute.wait_begun(1);
    assert_eq!(
        [&urgent, &later].map(|id| daemon.place(id)),
        [None, Some(1)]
    );
    // What was cancelled stays cancelled, and what had begun without a journal changed nothing.
    for id in [&gone, &first] {
        let answer = daemon.ask("GET", &format!("/v1/migrations/{id}"), &[], "");
        assert_problem(&answer, 404, "not-found");
    }

    // Ended in order, all the same; whoever follows one that waits is told that it will begin.
    let api = daemon.dir.join("api.sock");
    let mut follower = Command::new(env!("CARGO_BIN_EXE_pagecopy"));
    follower.arg("--api").arg(&api).args([
        "migrate",
        "--vm",
        "followed",
        "--to",
        "127.0.0.1:1",
        "--qmp",
    ]);
    let follower = follower
        .arg(&mute.socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let followed = || {
        let list = daemon.get("/v1/migrations").json();
        let one = list
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["vm"] == "followed");
        one.map(|one| {
            (
                one["id"].as_str().unwrap().to_owned(),
                one["place"].as_u64(),
            )
        })
    };
    eventually(|| followed().is_some_and(|(_, place)| place == Some(2)));
    let (followed, _) = followed().unwrap();
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    let follower = follower.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&follower.stderr).into_owned();
    assert_eq!(follower.status.code(), Some(4), "{errors}");
    assert!(errors.contains("waits for its turn"), "{errors}");

    mute.hang_up();
    daemon.child = start(&daemon.dir);
    mute.wait_begun(1);
    assert_eq!(
        [&later, &followed].map(|id| daemon.place(id)),
        [None, Some(1)],
        "the urgent one was under way when the daemon ended, and is cancelled"
    );
    mute.hang_up();
    eventually(|| daemon.shown(&later)["state"] == "failed");
    mute.wait_begun(1);
    mute.hang_up();
    eventually(|| daemon.shown(&followed)["state"] == "failed");
    let kept = std::fs::read_to_string(daemon.dir.join("state/pending.json")).unwrap();
    assert_eq!(kept, "[]");
}

#[test]
fn one_that_waits_is_changed_and_stays_so_over_a_restart() {
    let mut daemon = Daemon::with("queue-set", "max-concurrent = 1\n");
    let mute = Mute::listen(&daemon.dir);
    let first = daemon.begin(&mute, "first", 0);
    mute.wait_begun(1);
    let [old, young] = ["old", "young"].map(|vm| daemon.begin(&mute, vm, 0));
    let set = daemon.cli(&[
        "set",
        &young,
        "--priority",
        "7",
        "--bandwidth-limit",
        "5MB/s",
    ]);
    assert_eq!(set.status.code(), Some(0), "{set:?}");
    let said = String::from_utf8_lossy(&set.stdout).into_owned();
    assert!(said.contains("number 1"), "{said}");
    assert_eq!(
        [&young, &old].map(|id| daemon.place(id)),
        [Some(1), Some(2)]
    );
    assert_eq!(daemon.shown(&young)["priority"], 7);

    let patch = |id: &str, body: &str| {
        let path = format!("/v1/migrations/{id}");
        daemon.ask("PATCH", &path, &[super::harness::JSON], body)
    };
    assert_eq!(patch(&young, r#"{"bandwidth_limit":null}"#).status, 200);
    for (id, body, status, kind) in [
        (&young, "{}", 400, "refused"),
        (&young, r#"{"priority":101}"#, 400, "refused"),
        (&young, r#"{"speed":1}"#, 422, "invalid"),
        (&first, r#"{"priority":1}"#, 409, "conflict"),
    ] {
        assert_problem(&patch(id, body), status, kind);
    }
    let ended = daemon.begin(&mute, "ended", 0);
    daemon.cancel(&ended);
    eventually(|| daemon.shown(&ended)["state"] == "cancelled");
    assert_problem(&patch(&ended, r#"{"priority":1}"#), 409, "conflict");

    daemon.signal(rustix::process::Signal::KILL);
    daemon.child.wait().unwrap();
    mute.hang_up();
    daemon.child = start(&daemon.dir);
    mute.wait_begun(1);
    assert_eq!([&young, &old].map(|id| daemon.place(id)), [None, Some(1)]);
    assert_eq!(daemon.shown(&young)["priority"], 7);
}

/// Descriptors, threads and allocated bytes of a daemon.
fn levels(daemon: &Daemon) -> [u64; 3] {
    let pid = daemon.child.id();
    let count = |what: &str| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/{what}"));
        entries.unwrap().count() as u64
    };
    let metrics = daemon.get("/metrics").body;
    let mut lines = metrics.lines();
    let allocated = lines.find_map(|line| line.strip_prefix("pagecopy_allocated_bytes "));
    let allocated = allocated.and_then(|bytes| bytes.parse().ok());
    [count("fd"), count("task"), allocated.expect("its gauge")]
}

/// Two that come to nothing before they are cancelled, and 198 behind them that fail when their turns come; until all of it is over.
fn two_hundred(daemon: &Daemon, mute: &Mute, before: [u64; 3]) {
    let first = ["one", "two"].map(|vm| daemon.begin(mute, vm, 0));
    mute.wait_begun(2);
    let waiting: Vec<String> = (0..198)
        .map(|number| {
            let begun = daemon.begin_in_vain(&format!("vm{number}"));
            assert_eq!(begun.status, 201, "{begun:?}");
            begun.json()["id"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(daemon.place(&waiting[197]), Some(198));
    // Who waits holds no descriptor and no thread; a few belong to what is being asked just now.
    let [fds, threads, _] = levels(daemon);
    assert!(fds <= before[0] + 16, "{fds} descriptors after {before:?}");
    assert!(
        threads <= before[1] + 16,
        "{threads} threads after {before:?}"
    );
    first.iter().for_each(|id| daemon.cancel(id));
    for id in &first {
        eventually(|| daemon.shown(id)["state"] == "cancelled");
    }
    for id in &waiting {
        eventually(|| daemon.shown(id)["state"] == "failed");
    }
    let kept = std::fs::read_to_string(daemon.dir.join("state/pending.json")).unwrap();
    assert_eq!(kept, "[]");
    mute.hang_up();
}

/// What is kept of those that have ended fills in the first rounds: the latest 200, those that have ended since one was begun, and 1024
/// events. From then on as much is freed as is allocated.
#[test]
fn two_hundred_at_once_go_through_the_queue_again_and_again_and_leave_nothing_behind() {
    const WARM_UP: usize = 5;
    const ROUNDS: usize = 5;
    // 128 bytes a migration: tables grow to their sizes for a while, and connections are just ending.
    const SLACK: u64 = 128 * 200 * ROUNDS as u64;
    let mut daemon = Daemon::start("queue-many");
    // Nobody reads what it logs, and a pipe holds 64 KiB: it would stand still.
    let mut log = daemon.child.stderr.take().unwrap();
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    let mute = Mute::listen(&daemon.dir);
    let before = levels(&daemon);
    (0..WARM_UP).for_each(|_| two_hundred(&daemon, &mute, before));
    let full = levels(&daemon);
    (0..ROUNDS).for_each(|_| two_hundred(&daemon, &mute, before));
    let after = levels(&daemon);
    println!("descriptors, threads, bytes: {before:?} at first, {full:?} when full, {after:?}");
    // What was asked last may be just ending, and so may threads that nobody has needed for ten seconds.
    let mut last = after;
    let level = |last: &[u64; 3]| {
        last[0] <= before[0] && last[1] <= before[1] + 4 && last[2] <= full[2] + SLACK
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !level(&last) {
        assert!(
            Instant::now() < deadline,
            "{before:?}, {full:?}, then {last:?}"
        );
        std::thread::sleep(Duration::from_millis(100));
        last = levels(&daemon);
    }
}
