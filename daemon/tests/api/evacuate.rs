//! Emptying a host, with QEMUs that say how they are and can do nothing else: who is found, in which order they are handed over, and
//! what is told at the end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::harness::{Daemon, fed, stderr};
use super::problems::assert_problem;
use super::queue::{Mute, eventually};

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":[]}}"#;

/// A QEMU in this state, of so many bytes; whatever else is asked, it refuses.
fn qemu(folder: &Path, name: &str, state: &'static str, bytes: u64) {
    let listener = UnixListener::bind(folder.join(name)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            // As QEMU does: one client at a time. Its end is the client's business.
            let _ = answer(&stream, state, bytes);
        }
    });
}

fn answer(stream: &UnixStream, state: &str, bytes: u64) -> std::io::Result<()> {
    let mut to = stream;
    writeln!(to, "{GREETING}")?;
    for line in BufReader::new(stream).lines() {
        let asked: Value = serde_json::from_str(&line?)?;
        let mut said = match asked["execute"].as_str() {
            Some("qmp_capabilities") => json!({ "return": {} }),
            Some("query-status") => {
                json!({ "return": { "status": state, "running": state == "running" } })
            }
            Some("query-memory-size-summary") => {
                json!({ "return": { "base-memory": bytes, "plugged-memory": 0 } })
            }
            _ => json!({ "error": { "class": "GenericError", "desc": "this QEMU is none" } }),
        };
        said["id"] = asked["id"].clone();
        writeln!(to, "{said}")?;
    }
    Ok(())
}

/// A daemon whose host has three guests, and other sockets.
fn host(name: &str, more: &str) -> Daemon {
    let daemon = Daemon::with(name, &format!("qmp-dir = 'guests'\n{more}"));
    let folder = daemon.dir.join("guests");
    std::fs::create_dir(&folder).unwrap();
    qemu(&folder, "large.qmp", "running", 8 << 30);
    qemu(&folder, "small.sock", "running", 1 << 30);
    qemu(&folder, "stopped", "paused", 2 << 30);
    qemu(&folder, "comes.qmp", "inmigrate", 1 << 30);
    qemu(&folder, "gone.qmp", "postmigrate", 1 << 30);
    drop(UnixListener::bind(folder.join("dead.qmp")).unwrap());
    std::fs::write(folder.join("notes"), "no socket").unwrap();
    daemon
}

fn evacuate(daemon: &Daemon, more: &[&str]) -> Output {
    let words = [&["evacuate", "--to", "127.0.0.1:1"], more].concat();
    daemon.cli(&words)
}

/// The events that a command has printed.
fn events(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn names(guests: &Value) -> Vec<&str> {
    let guests = guests.as_array().unwrap().iter();
    guests.map(|one| one["vm"].as_str().unwrap()).collect()
}

#[test]
fn the_guests_of_a_host_are_its_sockets() {
    let daemon = host("guests", "");
    let all = daemon.post("/v1/guests", "{}").json();
    let states: Vec<(&str, &str)> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["vm"].as_str().unwrap(), one["state"].as_str().unwrap()))
        .collect();
    let expected = [
        ("comes", "inmigrate"),
        ("dead", "ended"),
        ("gone", "postmigrate"),
        ("large", "running"),
        ("small", "running"),
        ("stopped", "paused"),
    ];
    assert_eq!(states, expected);
    assert_eq!(all[3]["ram_bytes"], json!(8_u64 << 30));

    let folder = daemon.dir.join("guests");
    let one = json!({ "guests": [{ "vm": "x", "qmp": folder.join("absent") }] });
    let one = daemon.post("/v1/guests", &one.to_string()).json();
    let error = one[0]["error"].as_str().unwrap();
    assert!(error.contains("there is no QMP socket"), "{error}");
    for (body, status, kind) in [
        (json!({ "folder": "/nonexistent" }), 500, "this-host"),
        (json!({ "folder": "here" }), 400, "refused"),
        (json!({ "folder": folder, "guests": [] }), 400, "refused"),
        (
            json!({ "guests": [{ "vm": "", "qmp": "/q" }] }),
            400,
            "refused",
        ),
        (json!({ "vms": [] }), 422, "invalid"),
    ] {
        assert_problem(&daemon.post("/v1/guests", &body.to_string()), status, kind);
    }
}

#[test]
fn all_are_tried_the_smallest_first_and_the_end_says_what_came_of_each() {
    let daemon = host("evacuate", "");
    let plan = evacuate(&daemon, &["--dry-run", "--json"]);
    assert_eq!(plan.status.code(), Some(0), "{}", stderr(&plan));
    let planned = events(&plan);
    assert_eq!(planned.len(), 1);
    assert_eq!(
        names(&planned[0]["guests"]),
        ["small", "stopped", "large"],
        "nothing can be predicted: by their memory"
    );
    assert_eq!(daemon.get("/v1/migrations").json(), json!([]));

    let done = evacuate(&daemon, &["--json"]);
    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
    let notes = stderr(&done);
    for left_out in ["comes", "gone", "dead"] {
        assert!(
            notes.contains(&format!("{left_out} does not run here")),
            "{notes}"
        );
    }
    let told = events(&done);
    let end = told.last().unwrap();
    assert_eq!(end["event"], "evacuated");
    assert_eq!([&end["moved"], &end["failed"]], [&json!(0), &json!(3)]);
    assert_eq!(names(&end["guests"]), ["small", "stopped", "large"]);
    let stopped = &end["guests"][1];
    let error = stopped["error"].as_str().unwrap();
    assert!(error.contains("does not run"), "{error}");
    assert!(stopped["id"].is_string() && stopped["remedy"].is_string());

    // For people, and some of them only.
    let done = evacuate(&daemon, &["--vms", "stopped,gone"]);
    assert_eq!(done.status.code(), Some(1));
    let table = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(table.contains("stopped  failed"), "{table}");
    assert!(table.contains("0 of 1 guests have moved"), "{table}");
    let nobody = evacuate(&daemon, &["--vms", "gone"]);
    assert_eq!(nobody.status.code(), Some(0), "it has left already");
}

#[test]
fn what_is_wrong_is_said_before_anybody_moves() {
    let daemon = host("evacuate-wrong", "");
    let wrong = evacuate(&daemon, &["--vms", "small,nobody"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("no such guest here: nobody"));
    let absent = evacuate(&daemon, &["--qmp-dir", "/nonexistent"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(
        stderr(&absent).contains("cannot be read"),
        "{}",
        stderr(&absent)
    );

    let api = daemon.dir.join("api.sock");
    let listed = |text: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagecopy"));
        command.arg("--api").arg(&api).args(["evacuate", "--to"]);
        fed(
            command.args(["127.0.0.1:1", "--dry-run", "--guests", "-"]),
            text,
        )
    };
    let wrong = listed("small /run/small.sock\n");
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("line 1"), "{}", stderr(&wrong));
    let socket = daemon.dir.join("guests/small.sock");
    let right = listed(&format!("# one\nother={}\n", socket.display()));
    let plan = String::from_utf8_lossy(&right.stdout).into_owned();
    assert!(plan.contains("other  1.0 GiB"), "{plan}");
    assert_eq!(daemon.get("/v1/migrations").json(), json!([]));

    let without = Daemon::start("evacuate-unknown");
    let unknown = evacuate(&without, &[]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(stderr(&unknown).contains("qmp-dir"), "{}", stderr(&unknown));
}

#[test]
fn a_full_queue_is_waited_for_and_a_client_that_is_killed_leaves_its_guests_in_it() {
    let daemon = host("evacuate-full", "max-concurrent = 1\nmax-pending = 1\n");
    let mute = Mute::listen(&daemon.dir);
    let ids = ["a", "b"].map(|vm| daemon.begin(&mute, vm, 0));
    mute.wait_begun(1);
    let socket = mute.socket.display();
    let start = |list: &str| {
        let file = daemon.dir.join("list");
        std::fs::write(&file, list).unwrap();
        Command::new(env!("CARGO_BIN_EXE_pagecopy"))
            .arg("--api")
            .arg(daemon.dir.join("api.sock"))
            .args(["evacuate", "--to", "127.0.0.1:1", "--json", "--guests"])
            .arg(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut killed = start(&format!("a={socket}\nb={socket}\n"));
    let mut planned = String::new();
    let mut told = BufReader::new(killed.stdout.take().unwrap());
    told.read_line(&mut planned).unwrap();
    for id in &ids {
        assert!(planned.contains(id), "followed, not begun anew: {planned}");
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(daemon.place(&ids[1]), Some(1), "it waits on");

    // One more than the queue takes is handed over when there is room.
    let small = daemon.dir.join("guests/small.sock");
    let mut waiting = start(&format!("a={socket}\nsmall={}\n", small.display()));
    let mut note = String::new();
    let mut notes = BufReader::new(waiting.stderr.take().unwrap());
    notes.read_line(&mut note).unwrap();
    assert!(note.contains("queue is full"), "{note}");
    daemon.cancel(&ids[0]);
    mute.wait_begun(2);
    daemon.cancel(&ids[1]);
    let done = waiting.wait_with_output().unwrap();
    let told = events(&done);
    let end = told.last().unwrap();
    assert_eq!(names(&end["guests"]), ["a", "small"]);
    assert_eq!(end["guests"][0]["status"], "cancelled");
    assert_eq!(end["guests"][1]["status"], "failed", "{end}");
    assert_eq!(done.status.code(), Some(1));
}

fn evacuate_to(daemon: &Daemon, to: &str, more: &[&str]) -> Output {
    daemon.cli(&[&["evacuate", "--to", to], more].concat())
}

#[test]
fn of_several_destinations_each_guest_has_its_own_and_stays_where_none_takes_it() {
    let daemon = host("evacuate-several", "");
    let done = evacuate_to(
        &daemon,
        "127.0.0.1:1,127.0.0.1:2",
        &["--json", "--retries", "3"],
    );
    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
    let told = events(&done);
    let chosen: Vec<&Value> = told
        .iter()
        .filter(|event| event["event"] == "chosen")
        .collect();
    let guests: Vec<&str> = chosen
        .iter()
        .map(|one| one["vm"].as_str().unwrap())
        .collect();
    let order = ["small", "stopped", "large"];
    assert_eq!(
        guests, order,
        "these QEMUs would not do another time, either"
    );
    for one in chosen {
        assert!(one["to"].is_null(), "{one}");
        assert_eq!(one["ranked"].as_array().map(Vec::len), Some(2), "{one}");
    }
    let end = told.last().unwrap();
    assert_eq!(end["to"], "127.0.0.1:1,127.0.0.1:2");
    assert_eq!([&end["moved"], &end["failed"]], [&json!(0), &json!(3)]);
    for guest in end["guests"].as_array().unwrap() {
        let error = guest["error"].as_str().unwrap();
        assert!(error.contains("none of the 2 destinations"), "{guest}");
        assert!(guest["id"].is_null() && guest["remedy"].is_string());
    }
    assert_eq!(daemon.get("/v1/migrations").json(), json!([]));
}

/// A command that has destinations to choose from.
fn started(daemon: &Daemon, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pagecopy"))
        .arg("--api")
        .arg(daemon.dir.join("api.sock"))
        .args(words)
        .args(["--to", "127.0.0.1:1,127.0.0.1:2", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Is interrupted, and ends. Nothing has begun.
fn interrupted(daemon: &Daemon, child: Child) -> Output {
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(daemon.get("/v1/migrations").json(), json!([]));
    output
}

#[test]
fn ctrl_c_while_a_destination_is_chosen_ends_it_and_nothing_has_begun() {
    let daemon = Daemon::start("interrupted");
    let mute = Mute::listen(&daemon.dir);
    let socket = mute.socket.to_str().unwrap();
    let child = started(&daemon, &["migrate", "--vm", "a", "--qmp", socket]);
    mute.wait_begun(1);
    let output = interrupted(&daemon, child);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("before it had begun"));
    assert_eq!(events(&output)[0]["status"], "cancelled");

    // A QEMU that is listed and, for the plan, looked at on the way to both, and answers nothing from then on.
    let socket = daemon.dir.join("b.qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let (silent, is_silent) = channel();
    std::thread::spawn(move || {
        let streams = listener.incoming().map_while(Result::ok);
        let mut kept = Vec::new();
        for (number, stream) in streams.enumerate() {
            if number < 3 {
                let _ = answer(&stream, "running", 1 << 30);
            } else {
                let _ = writeln!(&stream, "{GREETING}");
                kept.push(stream);
                // The test may have seen enough.
                let _ = silent.send(());
            }
        }
    });
    let list = daemon.dir.join("list");
    std::fs::write(&list, format!("b={}\n", socket.display())).unwrap();
    let child = started(&daemon, &["evacuate", "--guests", list.to_str().unwrap()]);
    is_silent.recv_timeout(Duration::from_secs(20)).unwrap();
    let output = interrupted(&daemon, child);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let told = events(&output);
    assert_eq!(told[0]["event"], "planned");
    let end = told.last().unwrap();
    assert_eq!(end["guests"][0]["status"], "cancelled", "{end}");
}

#[test]
fn the_destinations_of_the_configuration_are_those_of_auto() {
    let daemon = host("evacuate-auto", "");
    let none = evacuate_to(&daemon, "auto", &[]);
    assert_eq!(none.status.code(), Some(1));
    for part in ["names no destinations", "set destinations"] {
        assert!(stderr(&none).contains(part), "{}", stderr(&none));
    }
    let both = evacuate_to(&daemon, "auto,127.0.0.1:1", &[]);
    assert_eq!(both.status.code(), Some(1));
    assert!(
        stderr(&both).contains("give auto alone"),
        "{}",
        stderr(&both)
    );

    let file = daemon.dir.join("c.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let named = "destinations = ['127.0.0.1:1', '127.0.0.1:2']\n";
    std::fs::write(&file, format!("{text}{named}")).unwrap();
    daemon.signal(rustix::process::Signal::HUP);
    let expected = json!(["127.0.0.1:1", "127.0.0.1:2"]);
    eventually(|| daemon.get("/v1/destinations").json() == expected);
    let plan = evacuate_to(&daemon, "auto", &["--dry-run", "--json"]);
    assert_eq!(plan.status.code(), Some(0), "{}", stderr(&plan));
    assert_eq!(events(&plan)[0]["to"], "127.0.0.1:1,127.0.0.1:2");
    let socket = daemon.dir.join("guests/small.sock");
    let socket = socket.to_str().unwrap();
    let words = ["migrate", "--vm", "small", "--qmp", socket, "--to", "auto"];
    let migrated = daemon.cli(&words);
    assert_eq!(migrated.status.code(), Some(1));
    let why = stderr(&migrated);
    assert!(why.contains("none of the 2 destinations"), "{why}");
}
