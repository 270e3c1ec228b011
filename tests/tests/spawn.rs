//! `migrate --spawn` on real QEMU: the destination starts what the guest comes to, keeps it when it has come and not otherwise.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::json;
use tests::real::{
    Machine, Migration, PATIENCE, QEMU_ID, Qemu, RunAs, Scratch, Side, SpawnAs, SpawnHost, Version,
    World, assert_stayed,
};

const SLOWLY: [&str; 3] = ["--spawn", "--bandwidth-limit", "50MB/s"];

fn machine() -> Machine {
    Machine::new(Version::V10_0, 128, "rate=20 set=16")
}

/// Two hosts, the second of which starts QEMUs for guests of the first.
fn hosts(version: Version, run_as: SpawnAs) -> (World, SpawnHost) {
    let scratch = Scratch::new();
    let ram = scratch.ram().to_owned();
    let host = SpawnHost::new(&scratch, Side::B, ("source", &ram), version, run_as);
    (World::tls_in(scratch, RunAs::User), host)
}

fn begin(world: &World, source: &Qemu, options: &[&str]) -> Migration {
    world.cli(Side::A).migrate("vm", source, Side::B, options)
}

/// Nobody waits at the one that starts it: that is no reason against it.
#[test]
fn of_several_destinations_one_that_starts_it_is_taken() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut source = world.guest("source", &machine());
    let (address, qmp) = (Side::B.address(), source.socket().to_owned());
    let to = format!("{address}:9,{address}:7700");
    let cli = world.cli(Side::A);
    let moved = cli.migrate_socket("vm", &qmp, &to, &["--spawn"]).finish();
    moved.completed();
    assert_eq!(moved.events[0]["to"], format!("{address}:7700"));
    host.arrived().assert_runs();
    assert_left(&mut source);
}

/// The migration is refused with `words`, and the guest does not notice; nothing is left at the destination.
fn refused(world: &World, host: &SpawnHost, source: &mut Qemu, words: &[&str]) {
    let begun = Instant::now();
    begin(world, source, &["--spawn"])
        .finish()
        .failed_with(words);
    assert_stayed(source, None, begun);
    host.assert_nothing_left();
}

/// One that waits for its turn is begun by the next daemon as it was asked for: its QEMU is started then, and not before.
#[test]
fn one_that_waits_is_started_when_its_turn_comes_after_a_restart() {
    let (mut world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let config = world.daemon(Side::A).config().to_owned();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("max-concurrent = 1\n{text}")).unwrap();
    world.restart(Side::A);
    let mut source = world.guest("source", &machine());
    let (mut first, mut to_first) = (
        world.guest("first", &machine()),
        world.waiting("to-first", &machine()),
    );
    let begun = Instant::now();
    let slow = ["--bandwidth-limit", "2MB/s"];
    let running = world.begin(Side::A, "first", &first, &to_first, &slow);
    running.wait_mid_round();
    let waiting = begin(&world, &source, &["--spawn", "--verify"]);
    waiting.wait_event("it waits", PATIENCE, |event| event["state"] == "pending");
    let id = world.cli(Side::A).id_of("vm");
    assert!(host.pids().is_empty(), "before its turn");

    world.restart(Side::A);
    drop((running, waiting));
    let cli = world.cli(Side::A);
    cli.wait_state(&id, "completed");
    let finished = &cli.status(&id)["finished"];
    assert!(finished["verify_ms"].as_f64().is_some(), "{finished}");
    host.arrived().assert_runs();
    assert_left(&mut source);
    assert_stayed(&mut first, Some(&mut to_first), begun);
}

fn assert_left(source: &mut Qemu) {
    assert_eq!(source.qmp.status(), "postmigrate", "at the source");
    source.serial.assert_whole();
}

#[test]
fn there_and_back() {
    let scratch = Scratch::new();
    let (ram, version, user) = (scratch.ram().to_owned(), Version::V10_0, SpawnAs::Root);
    let b = SpawnHost::new(&scratch, Side::B, ("source", &ram), version, user);
    let (there, from) = (SpawnHost::qemu(Side::B), b.ram().to_owned());
    let a = SpawnHost::new(&scratch, Side::A, (&there, &from), version, user);
    let mut world = World::tls_in(scratch, RunAs::User);
    let mut source = world.guest("source", &machine());
    begin(
        &world,
        &source,
        &["--spawn", "--mode", "precopy", "--verify"],
    )
    .finish()
    .completed();
    let guest = b.arrived();
    guest.assert_runs();
    assert_left(&mut source);
    world.daemon(Side::B).assert_logs(&["a QEMU was started"]);

    // What was started is no child of the daemon: a killed daemon and the next one leave it alone.
    world.restart(Side::B);
    guest.assert_runs();
    assert_eq!(b.files_with("json").len(), 1);

    let to = format!("{}:7700", Side::A.address());
    let options = ["--spawn", "--mode", "hybrid", "--quit-source"];
    world
        .cli(Side::B)
        .migrate_socket("vm", &guest.socket, &to, &options)
        .finish()
        .completed();
    let back = a.arrived();
    back.assert_runs();
    b.wait_ended();
    // What is left of it goes when the daemon looks again.
    world.restart(Side::B);
    b.assert_nothing_left();
    assert_eq!(fs::read_dir(a.ram()).unwrap().count(), 1);
}

#[test]
fn as_another_user_the_guest_goes_first() {
    let (world, host) = hosts(Version::V7_2, SpawnAs::QemuUser);
    let mut source = world.guest(
        "source",
        &Machine::new(Version::V7_2, 128, "rate=20 set=16"),
    );
    begin(&world, &source, &["--spawn", "--mode", "postcopy"])
        .finish()
        .completed();
    let guest = host.arrived();
    guest.assert_runs();
    assert_left(&mut source);
    let status = fs::read_to_string(format!("/proc/{}/status", guest.pid)).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let id = format!("{QEMU_ID} {QEMU_ID} {QEMU_ID} {QEMU_ID}");
    let none = "0000000000000000";
    for (name, value) in [
        ("Uid:", id.as_str()),
        ("Gid:", id.as_str()),
        ("Groups:", &QEMU_ID.to_string()),
        ("CapEff:", none),
        ("CapPrm:", none),
        ("CapInh:", none),
        ("CapAmb:", none),
        ("NoNewPrivs:", "1"),
        // Its own sandbox.
        ("Seccomp:", "2"),
    ] {
        assert_eq!(field(name), value, "{name} {status}");
    }
    let stat = fs::read_to_string(format!("/proc/{}/stat", guest.pid)).unwrap();
    let session = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, guest.pid.to_string(), "a session of its own");
}

#[test]
fn without_a_policy_nothing_is_started() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let outcome = begin(&world, &source, &["--spawn"]).finish();
    outcome.failed_with(&["no policy", "spawn-policy", "pagecopy receive"]);
    assert_stayed(&mut source, None, begun);
}

#[test]
fn what_the_policy_forbids_is_refused_with_what_would_allow_it() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut with_edu = machine();
    with_edu.extra = ["-device", "edu"].map(str::to_owned).to_vec();
    let mut source = world.guest("source", &with_edu);
    refused(
        &world,
        &host,
        &mut source,
        &["edu", "devices of the policy"],
    );
    let policy = host.policy();
    let elsewhere = policy.replace("qemu-source", "qemu-elsewhere");
    host.write_policy(&format!("devices = ['edu']\n{elsewhere}"));
    refused(&world, &host, &mut source, &["guest.elf", "[paths]"]);
    host.write_policy("user = 5");
    refused(&world, &host, &mut source, &["spawn-policy", "line 1"]);
    host.write_policy(&format!("devices = ['edu']\n{policy}"));
    begin(&world, &source, &["--spawn"]).finish().completed();
    host.arrived().assert_runs();
}

#[test]
fn a_program_that_is_not_there_and_one_that_dies_at_its_start() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut source = world.guest("source", &machine());
    let policy = host.policy();
    let binary = Version::V10_0.binary();
    host.write_policy(&policy.replace(binary.to_str().unwrap(), "/nonexistent/qemu"));
    refused(
        &world,
        &host,
        &mut source,
        &["/nonexistent/qemu", "[binaries]"],
    );
    host.write_policy(&policy);
    let image = host.folder().join("guest.elf");
    fs::remove_file(&image).unwrap();
    refused(&world, &host, &mut source, &["has ended", "guest.elf"]);
    // A link that leads out of what the policy names.
    std::os::unix::fs::symlink("/etc/passwd", &image).unwrap();
    refused(&world, &host, &mut source, &["leads out of"]);
}

#[test]
fn a_device_that_was_plugged_in_is_noticed() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut with_usb = machine();
    with_usb.extra = ["-device", "qemu-xhci,id=usb"].map(str::to_owned).to_vec();
    let mut source = world.guest("source", &with_usb);
    let late = json!({ "driver": "usb-tablet", "bus": "usb.0", "id": "late" });
    source.qmp.execute("device_add", late).unwrap();
    refused(&world, &host, &mut source, &["late", "unplug it"]);
}

/// A migration in the middle of its first round, into a QEMU that was started for it.
fn under_way(world: &World, host: &SpawnHost, source: &Qemu) -> Migration {
    let migration = begin(world, source, &SLOWLY);
    migration.wait_mid_round();
    assert_eq!(host.pids().len(), 1);
    migration
}

#[test]
fn cancelled_and_then_moved() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let migration = under_way(&world, &host, &source);
    let id = world.cli(Side::A).id_of("vm");
    assert!(world.cli(Side::A).run(&["cancel", &id]).status.success());
    migration.finish().not_completed("cancelled");
    host.assert_nothing_left();
    assert_stayed(&mut source, None, begun);
    begin(&world, &source, &["--spawn"]).finish().completed();
    // The serial port of the one that was ended is the first that connected.
    drop(host.serial());
    host.arrived().assert_runs();
}

#[test]
fn the_source_is_killed_before_the_commit() {
    let (mut world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let source = world.guest("source", &machine());
    let migration = under_way(&world, &host, &source);
    world.daemon_mut(Side::A).kill();
    assert!(!migration.finish().status.success());
    host.assert_nothing_left();
}

#[test]
fn the_destination_is_killed_before_the_commit_and_the_next_daemon_ends_what_it_finds() {
    let (mut world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let migration = under_way(&world, &host, &source);
    world.daemon_mut(Side::B).kill();
    migration.finish().not_completed("failed");
    assert_eq!(host.pids().len(), 1, "nobody is there to end it");
    world.restart(Side::B);
    host.assert_nothing_left();
    assert_stayed(&mut source, None, begun);
}

#[test]
fn a_daemon_that_ends_in_order_takes_along_what_has_no_guest() {
    let (mut world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let source = world.guest("source", &machine());
    let migration = under_way(&world, &host, &source);
    world.daemon(Side::B).signal(Signal::TERM);
    migration.finish().not_completed("cancelled");
    assert!(world.daemon_mut(Side::B).wait_end());
    assert!(host.pids().is_empty());
    host.assert_nothing_left();
}

#[test]
fn a_policy_that_others_may_write_is_none() {
    let (world, host) = hosts(Version::V10_0, SpawnAs::Root);
    let mut source = world.guest("source", &machine());
    let path = world.folder(Side::B).join("spawn.toml");
    let mode = |mode| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(Path::new(&path), fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(0o666);
    refused(&world, &host, &mut source, &["writable by nobody else"]);
}
