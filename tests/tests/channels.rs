//! Data channels that come and go while a guest's memory moves, on real sockets: over links that carry more than one stream does, and
//! over such as one fills.

#![allow(clippy::unwrap_used)]

use std::time::Instant;

use serde_json::Value;
use tests::real::{
    Machine, Migration, PATIENCE, Qemu, Side, Version, World, assert_moved, assert_stayed,
};

/// How many channels there were after each decision, and why.
fn decisions(events: &[Value]) -> Vec<(u64, String)> {
    let told = events.iter().filter(|event| event["event"] == "channels");
    told.map(|event| {
        let decision = event["decision"].as_str().unwrap();
        (event["channels"].as_u64().unwrap(), decision.to_owned())
    })
    .collect()
}

fn most(decisions: &[(u64, String)]) -> u64 {
    decisions
        .iter()
        .map(|(channels, _)| *channels)
        .max()
        .unwrap_or(0)
}

/// A stream gets 200 Mbit/s, and the link has 800: two channels, of which one begins at each of the two cores at most, leave half of it.
fn of_streams(world: &World) {
    world.net.limit_streams(Side::A, 800, 200);
}

/// Of 384 MiB, of which two streams take 8 s.
fn machine() -> Machine {
    Machine::new(Version::V10_0, 384, "rate=4 set=32")
}

/// A migration to which more channels have come at this moment.
fn growing(world: &World, source: &Qemu, destination: &Qemu, options: &[&str]) -> Migration {
    of_streams(world);
    let options = [&["--channels", "auto"], options].concat();
    let migration = world.begin(Side::A, "vm", source, destination, &options);
    migration.wait_event("there are more channels", PATIENCE * 2, |event| {
        event["event"] == "channels" && event["channels"].as_u64() >= Some(3)
    });
    migration
}

#[test]
fn heavy_guest_for_whose_streams_the_link_has_more_gets_more_channels() {
    let world = World::tls();
    of_streams(&world);
    let machine = Machine::new(Version::V10_0, 640, "rate=4 set=32");
    let moved = world.move_and_check(&machine, &["--channels", "auto", "--mode", "precopy"]);
    let (end, events) = (moved.outcome.finished(), &moved.outcome.events);
    let seen = decisions(events);
    println!("{seen:#?} {end}");
    assert!(most(&seen) >= 3, "{seen:#?}");
    assert!(
        seen.iter().any(|(_, why)| why.contains("they stay")),
        "{seen:#?}"
    );
    // More than two streams carry, trials and all.
    let goodput = end["goodput_mbit_s"].as_f64().unwrap();
    assert!(goodput > 420.0, "{goodput}: {seen:#?}");
    let told =
        |event: &&Value| event["event"] == "progress" && event["channels"].as_u64() >= Some(3);
    assert!(events.iter().any(|event| told(&event)), "{seen:#?}");
    // The destination tells the same.
    let there = world.cli(Side::B);
    let shown = there.status(&there.id_of("vm"));
    assert!(shown["channels"].as_u64() >= Some(2), "{shown}");
}

#[test]
fn a_number_stays_unless_it_shall_be_measured() {
    let machine = Machine::new(Version::V10_0, 128, "rate=0");
    for options in [&[] as &[&str], &["--channels", "2"]] {
        let world = World::plain();
        of_streams(&world);
        let moved = world.move_and_check(&machine, options);
        assert_eq!(decisions(&moved.outcome.events), []);
        let end = moved.outcome.finished();
        let goodput = end["goodput_mbit_s"].as_f64().unwrap();
        assert!(goodput < 420.0, "{end}");
    }
}

#[test]
fn a_guest_that_goes_first_has_the_channels_that_joined() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let options = ["--mode", "hybrid", "--postcopy-after", "10"];
    let migration = growing(&world, &source, &destination, &options);
    let id = world.cli(Side::A).id_of("vm");
    let told = world.cli(Side::A).run(&["start-postcopy", &id]);
    assert!(told.status.success(), "{told:?}");
    let outcome = migration.finish();
    let end = outcome.completed();
    assert_eq!(end["mode"], "hybrid", "{end}");
    assert_moved(&mut source, &mut destination);
}

#[test]
fn cancelled_while_channels_join() {
    let world = World::tls();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let begun = Instant::now();
    let migration = growing(&world, &source, &destination, &[]);
    let id = world.cli(Side::A).id_of("vm");
    let told = world.cli(Side::A).run(&["cancel", &id]);
    assert!(told.status.success(), "{told:?}");
    migration.finish().not_completed("cancelled");
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn a_link_that_is_cut_while_channels_join_is_a_failure_as_ever() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let begun = Instant::now();
    let migration = growing(&world, &source, &destination, &[]);
    world.net.cut();
    migration.finish().not_completed("failed");
    world.net.mend();
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn either_daemon_killed_while_channels_join() {
    for side in [Side::A, Side::B] {
        let mut world = World::tls();
        let mut source = world.guest("source", &machine());
        let mut destination = world.waiting("destination", &machine());
        let begun = Instant::now();
        let migration = growing(&world, &source, &destination, &[]);
        world.daemon_mut(side).kill();
        let outcome = migration.finish();
        assert!(!outcome.status.success(), "{:?}", outcome.events.last());
        assert_stayed(&mut source, Some(&mut destination), begun);
        world.restart(side);
        world.moves_next(Side::A, "vm", &mut source, &mut destination);
    }
}
