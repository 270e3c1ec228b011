//! Migrations that do not complete: whatever goes wrong before the commit, the guest runs on at the source, whole, with
//! nothing left behind, and a second attempt works.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use tests::real::{Machine, Migration, Qemu, Side, Version, World, assert_stayed};

/// Slow enough that round 0 of a guest of 256 MiB takes five seconds.
const SLOWLY: [&str; 2] = ["--bandwidth-limit", "50MB/s"];

fn machine() -> Machine {
    Machine::new(Version::V10_0, 256, "rate=20 set=32")
}

/// A migration in the middle of its first round.
fn under_way(world: &World, source: &Qemu, destination: &Qemu) -> (Migration, Instant) {
    let begun = Instant::now();
    let migration = world.begin(Side::A, "vm", source, destination, &SLOWLY);
    migration.wait_mid_round();
    (migration, begun)
}

#[test]
fn cancel() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    let id = world.cli(Side::A).id_of("vm");
    let output = world.cli(Side::A).run(&["cancel", &id]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    migration.finish().not_completed("cancelled");
    assert_stayed(&mut source, Some(&mut destination), begun);
    assert_eq!(world.cli(Side::A).status(&id)["state"], "cancelled");
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn source_daemon_killed() {
    let mut world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    world.daemon_mut(Side::A).kill();
    let outcome = migration.finish();
    assert!(
        !outcome.status.success(),
        "the command line notices: {:?}",
        outcome.events.last()
    );
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.restart(Side::A);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn destination_daemon_killed() {
    let mut world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    world.daemon_mut(Side::B).kill();
    migration.finish().not_completed("failed");
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.restart(Side::B);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn link_cut() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    world.net.cut();
    migration.finish().not_completed("failed");
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.net.mend();
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn link_goes_silent() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    world.net.drop_arriving(Side::B);
    migration.finish().not_completed("failed");
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.net.accept_arriving(Side::B);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn destination_qemu_killed() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    destination.kill();
    migration.finish().failed_with(&["QEMU"]);
    assert_stayed(&mut source, None, begun);
    std::fs::remove_file(destination.ram()).unwrap();
    let mut other = world.waiting("other", &machine());
    world.moves_next(Side::A, "vm", &mut source, &mut other);
}

#[test]
fn source_daemon_ended_in_order() {
    let mut world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (migration, begun) = under_way(&world, &source, &destination);
    assert!(
        world.daemon_mut(Side::A).terminate(),
        "SIGTERM ends the daemon in order"
    );
    assert!(!migration.finish().status.success());
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.restart(Side::A);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn heavy_guest_that_cannot_converge() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 256, "rate=200 set=200");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let begun = Instant::now();
    let options = [
        "--bandwidth-limit",
        "100MB/s",
        "--downtime-limit",
        "20ms",
        "--max-rounds",
        "4",
    ];
    let outcome = world.migrate(Side::A, "vm", &source, &destination, &options);
    // Both figures of the verdict, and what to do.
    outcome.failed_with(&[
        "the guest dirties",
        "goodput",
        "4 rounds",
        "--downtime-limit",
    ]);
    assert_stayed(&mut source, Some(&mut destination), begun);
    source.serial.set_rate(10);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn time_runs_out() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let begun = Instant::now();
    let options = [SLOWLY[0], SLOWLY[1], "--timeout", "1s"];
    world
        .migrate(Side::A, "vm", &source, &destination, &options)
        .failed_with(&["--timeout"]);
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "the time-out came after {:?}",
        begun.elapsed()
    );
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}
