//! What is looked at before a guest moves, on real QEMUs: how fast it writes its memory.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tests::real::{
    Machine, PATIENCE, Qemu, Side, Version, World, assert_nothing_left_in, eventually,
    nothing_left_in, program,
};

fn machine(version: Version, guest: &str) -> Machine {
    Machine::new(version, 128, guest)
}

fn dirty_rate(world: &World, vm: &str, qmp: &Path, length: &str) -> Output {
    let qmp = qmp.to_str().unwrap();
    let words = ["dirty-rate", "--vm", vm, "--qmp", qmp, "--for", length];
    world.cli(Side::A).run(&[&words[..], &["--json"]].concat())
}

fn sampled(world: &World, guest: &Qemu, length: &str) -> Value {
    let output = dirty_rate(world, "vm", guest.socket(), length);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// It fails with each of these words, and says what to do.
fn refused(output: &Output, words: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for word in words.iter().chain(&["what to do"]) {
        assert!(errors.contains(word), "does not say {word:?}: {errors}");
    }
}

/// A guest that goes round 32 MiB and writes 20 MB/s of it.
fn the_rate_is_what_the_guest_writes(version: Version) {
    let world = World::plain();
    let guest = world.guest("guest", &machine(version, "rate=20 set=32 pattern=seq"));
    let rate = sampled(&world, &guest, "2s");
    println!("{rate}");
    let number = |key: &str| rate[key].as_f64().unwrap();
    assert!((2000.0..3000.0).contains(&number("sampled_ms")), "{rate}");
    // A loaded machine runs the guest late, never early; and it writes a stack besides.
    assert!((4e6..24e6).contains(&number("dirty_bytes_per_s")), "{rate}");
    assert!(
        number("peak_bytes_per_s") >= number("dirty_bytes_per_s"),
        "{rate}"
    );
    assert!((8e6..34e6).contains(&number("working_set_bytes")), "{rate}");
    assert_eq!(rate["ram_bytes"], 128 << 20);
    assert!((90e6..135e6).contains(&number("populated_bytes")), "{rate}");
    assert!(rate["intervals"].as_array().unwrap().len() >= 5, "{rate}");
    assert_eq!(rate["direct_io"], false);
    assert_nothing_left_in(guest.pid());
    guest.serial.verify();
}

#[test]
fn dirty_rate_on_qemu_10_0() {
    the_rate_is_what_the_guest_writes(Version::V10_0);
}

#[test]
fn dirty_rate_on_qemu_7_2() {
    the_rate_is_what_the_guest_writes(Version::V7_2);
}

#[test]
fn a_guest_that_writes_nothing_has_a_rate_of_nearly_nothing() {
    let world = World::plain();
    let guest = world.guest("guest", &machine(Version::V10_0, "rate=0 sweep=0"));
    let rate = sampled(&world, &guest, "500ms");
    assert!(rate["dirty_bytes_per_s"].as_f64().unwrap() < 2e6, "{rate}");
    assert!(
        rate["working_set_bytes"].as_u64().unwrap() < 1 << 20,
        "{rate}"
    );
}

#[test]
fn what_cannot_be_sampled_is_refused_with_what_to_do() {
    let world = World::plain();
    let guest = world.guest("guest", &machine(Version::V10_0, "rate=0"));
    refused(
        &dirty_rate(&world, "vm", guest.socket(), "1ms"),
        &["1 ms", "100ms to 10min"],
    );
    refused(&dirty_rate(&world, "", guest.socket(), "1s"), &["name"]);
    refused(
        &dirty_rate(&world, "vm", Path::new("/nonexistent/q"), "1s"),
        &["/nonexistent/q"],
    );
    let waiting = world.waiting("waiting", &machine(Version::V10_0, "rate=0"));
    refused(
        &dirty_rate(&world, "vm", waiting.socket(), "1s"),
        &["inmigrate"],
    );
    assert_nothing_left_in(guest.pid());
}

/// Whoever asked has left: QEMU is let go of at once, and the guest can move.
#[test]
fn a_sampling_that_nobody_waits_for_ends() {
    let world = World::plain();
    let mut source = world.guest("source", &machine(Version::V10_0, "rate=5 set=16"));
    let mut destination = world.waiting("destination", &machine(Version::V10_0, "rate=5 set=16"));
    let mut asks = Command::new(program("pagecopy"))
        .arg("--api")
        .arg(world.daemon(Side::A).api())
        .args(["dirty-rate", "--vm", "vm", "--for", "10min", "--qmp"])
        .arg(source.socket())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually(PATIENCE, || match nothing_left_in(source.pid()) {
        Ok(()) => Err("nothing tracks the guest".to_owned()),
        Err(_) => Ok(()),
    })
    .unwrap();
    let busy = world.migrate(Side::A, "vm", &source, &destination, &[]);
    busy.failed_with(&["dirty rate", "wait"]);
    refused(
        &dirty_rate(&world, "vm", source.socket(), "1s"),
        &["sampled", "wait"],
    );
    asks.kill().unwrap();
    asks.wait().unwrap();
    eventually(PATIENCE, || nothing_left_in(source.pid())).unwrap();
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn a_guest_on_its_way_is_not_sampled() {
    let world = World::plain();
    let machine = machine(Version::V10_0, "rate=0");
    let (source, destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let slow = ["--bandwidth-limit", "10MB/s"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &slow);
    migration.wait_mid_round();
    refused(
        &dirty_rate(&world, "vm", source.socket(), "1s"),
        &["migrated", "wait"],
    );
    let id = world.cli(Side::A).id_of("vm");
    assert!(world.cli(Side::A).run(&["cancel", &id]).status.success());
    migration.finish().not_completed("cancelled");
}
