//! The daemon as a service of its host: what systemd gives it and is told by it, reloads, and a log for programs.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use tests::real::{
    Cli, DAEMON_ID, Daemon, Machine, Manner, Net, PATIENCE, Process, Qemu, Role, RunAs, Scratch,
    Side, Trust, Version, World, certified, eventually, program, skipped,
};

/// A configuration without TLS, with its files in `folder`.
fn configuration(folder: &Path) -> String {
    format!(
        "name = 'a'\nlisten = '127.0.0.1:0'\napi = {:?}\nstate-dir = {:?}\ninsecure-plaintext = true\n",
        folder.join("api.sock"),
        folder.join("state")
    )
}

/// systemd's side of `NOTIFY_SOCKET`.
struct Told(UnixDatagram);

impl Told {
    fn listen(path: &Path) -> Told {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Told(socket)
    }

    fn next(&self) -> String {
        let mut bytes = [0; 4096];
        let length = self.0.recv(&mut bytes).expect("the daemon tells something");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// The next of which `wanted` is true.
    fn wait(&self, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told = self.next();
            if wanted(&told) {
                return told;
            }
            assert!(Instant::now() < deadline, "the last was {told:?}");
        }
    }
}

#[test]
fn systemd_is_told_of_the_start_of_reloads_and_that_it_lives() {
    let (scratch, net) = (Scratch::new(), Net::new());
    let folder = scratch.folder("a");
    let config = folder.join("pagecopyd.toml");
    fs::write(&config, configuration(&folder)).unwrap();
    let told = Told::listen(&folder.join("notify"));
    let mut command = RunAs::Root.command(&net, Side::A, &folder, &program("pagecopyd"));
    command
        .arg("--config")
        .arg(&config)
        .env("NOTIFY_SOCKET", folder.join("notify"))
        .env("WATCHDOG_USEC", "200000");
    let mut daemon = Process::spawn("daemon", &mut command, &folder.join("log"));
    told.wait(|told| told.contains("READY=1"));
    for _ in 0..5 {
        told.wait(|told| told == "WATCHDOG=1\n" || told == "WATCHDOG=1");
    }
    daemon.signal(Signal::HUP);
    let reloading = told.wait(|told| told.contains("RELOADING=1"));
    // What Type=notify-reload wants to see.
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    told.wait(|told| told.contains("READY=1"));
    told.wait(|told| told.contains("WATCHDOG=1"));
    daemon.signal(Signal::TERM);
    told.wait(|told| told.contains("STOPPING=1"));
    assert!(daemon.wait(PATIENCE).unwrap().success());
}

#[test]
fn the_apis_socket_may_be_systemds_and_outlives_the_daemon() {
    let activate = Path::new("/usr/bin/systemd-socket-activate");
    if !activate.exists() {
        return skipped("there is no systemd-socket-activate here");
    }
    let (scratch, net) = (Scratch::new(), Net::new());
    let folder = scratch.folder("a");
    let (config, api) = (folder.join("pagecopyd.toml"), folder.join("api.sock"));
    fs::write(&config, configuration(&folder)).unwrap();
    let start = |listen: &Path, log: &str| {
        let mut command = RunAs::Root.command(&net, Side::A, &folder, activate);
        command
            .arg("--listen")
            .arg(listen)
            .arg(program("pagecopyd"));
        command.arg("--config").arg(&config);
        Process::spawn("daemon", &mut command, &folder.join(log))
    };
    let mut daemon = start(&api, "log");
    assert!(
        daemon.wait_output(&["Listening on"], PATIENCE),
        "{}",
        daemon.output()
    );
    // It is started by its first client, who waits.
    let list = Cli::at(&api).run(&["list", "--json"]);
    assert!(list.status.success(), "{list:?}");
    assert!(daemon.output().contains("ready"), "{}", daemon.output());
    daemon.signal(Signal::TERM);
    assert!(daemon.wait(PATIENCE).unwrap().success());
    assert!(api.exists(), "the socket is systemd's to remove");

    // Another socket than the configuration's is no API.
    let other = folder.join("other.sock");
    let mut daemon = start(&other, "other.log");
    assert!(
        daemon.wait_output(&["Listening on"], PATIENCE),
        "{}",
        daemon.output()
    );
    assert!(!Cli::at(&other).run(&["list"]).status.success());
    assert!(!daemon.wait(PATIENCE).unwrap().success());
    assert!(
        daemon.output().contains("another socket than the API's"),
        "{}",
        daemon.output()
    );
}

/// Changes a daemon's configuration and has it read again; returns when the log has said `said`.
fn reload(daemon: &Daemon, change: impl FnOnce(String) -> String, said: &[&str]) {
    let text = fs::read_to_string(daemon.config()).unwrap();
    fs::write(daemon.config(), change(text)).unwrap();
    let before = daemon.log().len();
    daemon.signal(Signal::HUP);
    let logged = eventually(PATIENCE, || {
        let log = daemon.log();
        let new = &log[before..];
        let all = said.iter().all(|word| new.contains(word));
        if all { Ok(()) } else { Err(new.to_owned()) }
    });
    assert_eq!(logged, Ok(()), "{said:?}");
}

#[test]
fn who_may_send_is_changed_by_a_reload_and_a_bad_file_changes_nothing() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 48, "rate=5 set=8");
    let source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    let b = world.daemon(Side::B);
    let allow = |text: String, from: &str, to: &str| {
        let changed = text.replace(&format!("allow = [{from:?}]"), &format!("allow = [{to:?}]"));
        assert_ne!(changed, text);
        changed
    };
    let key = |text: &str| {
        text.lines()
            .find_map(|line| Some(line.strip_prefix("key = ")?.trim_matches('"').to_owned()))
    };
    let key = key(&fs::read_to_string(b.config()).unwrap()).unwrap();
    // Root reads it at the start, the daemon's user at a reload.
    chown(&key, Some(DAEMON_ID), None).unwrap();
    let a_name = Side::A.name();
    reload(
        b,
        |text| allow(text, a_name, "somebody.else"),
        &["reloaded", "tls"],
    );
    world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap();
    let refused = world
        .cli(Side::A)
        .migrate("vm", &source, Side::B, &[])
        .finish();
    refused.not_completed("failed");

    // Half of it is right, and none of it is taken.
    let bad = |text: String| allow(text, "somebody.else", a_name) + "no-such-key = 1\n";
    reload(b, bad, &["not reloaded", "no-such-key", "stays as it was"]);
    let refused = world
        .cli(Side::A)
        .migrate("vm", &source, Side::B, &[])
        .finish();
    refused.not_completed("failed");

    let good = |text: String| text.replace("no-such-key = 1\n", "");
    reload(b, good, &["reloaded"]);
    let kept = fs::read(&key).unwrap();
    fs::write(&key, "no key").unwrap();
    reload(b, |text| text, &["not reloaded", &key]);
    fs::write(&key, kept).unwrap();
    let listen = |text: String| {
        text.replace("listen = ", "bandwidth-limit = '1GB/s'\nlisten = ")
            .replace(":7700", ":7701")
    };
    reload(
        b,
        listen,
        &["bandwidth-limit", "not in force before", "listen"],
    );
    let moved = world
        .cli(Side::A)
        .migrate("vm", &source, Side::B, &[])
        .finish();
    moved.completed();
}

/// Lines that are about the daemon itself, or about a peer that has not said yet what it comes for.
const OF_NO_MIGRATION: [&str; 6] = [
    "ready",
    "ending",
    "a QEMU waits for a guest",
    "QMP event",
    "this limit could not be raised",
    "not looked into for mappings of guest memory",
];

/// Every line that `daemon` has logged, with the ids in them. None without that is about a migration.
fn lines(daemon: &Daemon, id: &str) -> usize {
    let log = daemon.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        for key in ["time", "level", "target", "message"] {
            assert!(line[key].is_string(), "no {key} in {line}");
        }
        let message = line["message"].as_str().unwrap();
        let ours = ["daemon", "pagecopy"]
            .iter()
            .any(|of| line["target"].as_str().unwrap().starts_with(of));
        // Who has asked for something that is about no migration.
        let is_other = line["fields"]["path"] == "/v1/receivers";
        if ours && !is_other && !OF_NO_MIGRATION.contains(&message) {
            assert_eq!(line["id"], id, "{line}");
        }
    }
    lines.iter().filter(|line| line["id"] == id).count()
}

#[test]
fn every_line_of_a_log_for_programs_has_the_migrations_id() {
    let (scratch, net) = (Scratch::new(), Net::new());
    let trusts = certified(&scratch);
    let start = |side: Side| {
        let manner = Manner {
            name: side.name().to_owned(),
            trust: Trust::clone(&trusts[side as usize]),
            steps: None,
            run_as: RunAs::User,
        };
        Daemon::start_with(
            &net,
            side,
            &scratch.folder(side.name()),
            &manner,
            |command| {
                command
                    .args(["--log-format", "json"])
                    .env("RUST_LOG", "daemon=trace,pagecopy=trace");
            },
        )
    };
    let daemons = [start(Side::A), start(Side::B)];
    let machine = Machine::new(Version::V10_0, 48, "rate=5 set=8");
    let source = Qemu::start(&scratch, "source", &machine, Role::Source);
    source.serial.wait_filled();
    let destination = Qemu::start(&scratch, "destination", &machine, Role::Destination);
    let [a, b] = daemons.each_ref().map(Cli::of);
    b.receive("vm", destination.socket()).unwrap();
    let moved = a
        .migrate(
            "vm",
            &source,
            Side::B,
            &["--mode", "hybrid", "--channels", "2"],
        )
        .finish();
    moved.completed();
    let id = a.id_of("vm");
    let ended = |daemon: &Daemon| daemon.assert_logs(&[&id]);
    daemons.iter().for_each(ended);
    for daemon in &daemons {
        let found = lines(daemon, &id);
        assert!(found > 20, "{found} lines of {id}: {}", daemon.log());
    }
}
