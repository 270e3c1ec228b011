//! Guests that write more than the link carries: they are slowed as far as it takes and no longer than it lasts, whoever ends it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::real::{
    Machine, Migration, PATIENCE, Qemu, Side, Version, World, assert_stayed, let_it_last,
};

/// It writes 200 MB/s, all over the 32 MiB that it has filled, with the first of its two vCPUs.
fn machine() -> Machine {
    let mut machine = Machine::new(Version::V10_0, 64, "rate=200 set=32");
    machine.vcpus = 2;
    machine
}

const AUTO: [&str; 4] = ["--mode", "precopy", "--throttle", "auto"];

/// The shares that a migration's events told.
fn told(events: &[Value]) -> Vec<u64> {
    let told = events.iter().filter(|event| event["event"] == "throttle");
    told.map(|event| event["throttle_percent"].as_u64().unwrap())
        .collect()
}

#[test]
fn a_guest_that_writes_more_than_the_link_carries_is_slowed_and_arrives_whole() {
    let world = World::tls();
    world.net.limit(400);
    let moved = world.move_and_check(&machine(), &AUTO);
    let (end, events) = (moved.outcome.finished(), &moved.outcome.events);
    let told = told(events);
    println!("{told:?} {end}");
    let most = end["throttle_percent"].as_u64().unwrap();
    assert_eq!(told.iter().max(), Some(&most), "{told:?}");
    assert!(most > 0, "{end}");
    assert_eq!(told.last(), Some(&0), "let go of once it stood still");
    let slowed = |event: &&Value| event["event"] == "round" && event["throttle_percent"] != 0;
    assert!(events.iter().any(|event| slowed(&event)), "{events:#?}");
    let shown = world.cli(Side::A).status(&world.cli(Side::A).id_of("vm"));
    assert_eq!(shown["throttle_percent"], 0, "{shown}");
}

#[test]
fn a_guest_that_converges_is_not_slowed() {
    let world = World::tls();
    let moved = world.move_and_check(&machine(), &AUTO);
    let end = moved.outcome.finished();
    assert_eq!(end["throttle_percent"], 0, "{end}");
    assert!(told(&moved.outcome.events).is_empty());
}

/// The threads of a process that stand still because somebody traces them.
fn standing(qemu: &Qemu) -> Vec<String> {
    let mut standing = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/task", qemu.pid())).unwrap() {
        let entry = entry.unwrap();
        // It may have ended.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if stat
            .rsplit_once(") ")
            .is_some_and(|(_, state)| state.starts_with('t'))
        {
            standing.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    standing
}

/// How long the guest takes to write so much.
fn writes(qemu: &Qemu) -> Duration {
    let begun = Instant::now();
    qemu.serial.wait_dirtied(qemu.serial.dirtied() + 20_000);
    begun.elapsed()
}

/// A guest that writes far more than its migration may send, and is slowed for that.
struct Slowed {
    world: World,
    source: Qemu,
    destination: Qemu,
    migration: Migration,
    id: String,
    begun: Instant,
    /// How long it takes to write so much, at full speed.
    took: Duration,
}

impl Slowed {
    fn begin() -> Slowed {
        let world = World::tls();
        let source = world.guest("source", &machine());
        let destination = world.waiting("destination", &machine());
        let took = writes(&source);
        let begun = Instant::now();
        let limits = ["--bandwidth-limit", "20MB/s", "--downtime-limit", "60ms"];
        let options = [&AUTO[..], &limits].concat();
        let migration = world.begin(Side::A, "vm", &source, &destination, &options);
        migration.wait_event("the guest is slowed", PATIENCE * 4, |event| {
            event["event"] == "throttle" && event["throttle_percent"].as_u64() >= Some(70)
        });
        let id = world.cli(Side::A).id_of("vm");
        let shown = world.cli(Side::A).status(&id);
        assert!(shown["throttle_percent"].as_u64() >= Some(70), "{shown}");
        // One of its threads stands still most of the time, and always the same.
        let samples: Vec<_> = (0..200)
            .map(|_| {
                let_it_last(Duration::from_millis(1));
                standing(&source)
            })
            .collect();
        let mut threads: Vec<_> = samples.iter().flatten().collect();
        let stood = threads.len();
        threads.dedup();
        assert!(threads.len() == 1 && stood > 50, "{stood} {threads:?}");
        Slowed {
            world,
            source,
            destination,
            migration,
            id,
            begun,
            took,
        }
    }

    /// Waits until it is told to be let go of.
    fn wait_lifted(&self) {
        self.migration
            .wait_event("it is let go of", PATIENCE, |event| {
                event["event"] == "throttle" && event["throttle_percent"] == 0
            });
    }

    /// Nobody holds it any more, since about `ended`: it writes as fast as before, and nothing is wrong with it.
    fn is_free(&mut self, ended: Instant) {
        while !standing(&self.source).is_empty() {
            assert!(ended.elapsed() < PATIENCE, "it is still held");
        }
        println!("let go of {:?} after the end", ended.elapsed());
        for _ in 0..200 {
            let_it_last(Duration::from_millis(1));
            assert!(standing(&self.source).is_empty(), "it is held again");
        }
        let takes = writes(&self.source);
        println!(
            "so many pages took {:?} before, and {takes:?} after",
            self.took
        );
        assert!(takes < self.took * 4, "{takes:?} {:?}", self.took);
        assert_stayed(&mut self.source, Some(&mut self.destination), self.begun);
    }
}

#[test]
fn it_goes_on_at_full_speed_when_the_daemon_is_killed() {
    let mut slowed = Slowed::begin();
    let killed = Instant::now();
    slowed.world.daemon_mut(Side::A).kill();
    slowed.is_free(killed);
}

#[test]
fn it_goes_on_at_full_speed_when_the_operator_cancels() {
    let mut slowed = Slowed::begin();
    let cancelled = Instant::now();
    let told = slowed.world.cli(Side::A).run(&["cancel", &slowed.id]);
    assert!(told.status.success(), "{told:?}");
    slowed.wait_lifted();
    slowed.is_free(cancelled);
    let shown = slowed.world.cli(Side::A).status(&slowed.id);
    assert_eq!(shown["state"], "cancelled", "{shown}");
    assert_eq!(shown["throttle_percent"], 0, "{shown}");
}

#[test]
fn it_goes_on_at_full_speed_when_the_destination_is_gone() {
    let mut slowed = Slowed::begin();
    let gone = Instant::now();
    slowed.world.daemon_mut(Side::B).kill();
    slowed.wait_lifted();
    slowed.is_free(gone);
    let shown = slowed.world.cli(Side::A).status(&slowed.id);
    assert_eq!(shown["state"], "failed", "{shown}");
}

/// What says two things is refused, and says which.
#[test]
fn a_guest_that_goes_first_is_not_slowed() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let destination = world.waiting("destination", &machine());
    let options = ["--mode", "hybrid", "--throttle", "auto"];
    let outcome = world.migrate(Side::A, "vm", &source, &destination, &options);
    assert!(!outcome.status.success());
    assert!(told(&outcome.events).is_empty());
    assert_eq!(source.qmp.status(), "running");
}
