//! Many guests of one host: who waits, what outlives the daemon, and what leaves it.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use tests::real::{
    Machine, PATIENCE, Qemu, Side, Version, World, assert_moved, assert_stayed, listens_at,
};

/// Slow enough that a migration is still in its first round when the test has done what it does meanwhile.
const SLOW: [&str; 2] = ["--bandwidth-limit", "2MB/s"];

fn machine() -> Machine {
    Machine::new(Version::V10_0, 48, "rate=5 set=8")
}

/// A file with these guests in it, for an evacuation.
fn listed(world: &World, guests: &[(&str, &Qemu)]) -> PathBuf {
    let lines = guests
        .iter()
        .map(|(vm, qemu)| format!("{vm}={}\n", qemu.socket().display()));
    let file = world.folder(Side::A).join("guests");
    std::fs::write(&file, lines.collect::<String>()).unwrap();
    file
}

/// A guest and the QEMU that waits for it.
fn pair(world: &World, vm: &str, machine: &Machine) -> [Qemu; 2] {
    let pair = [
        world.guest(&format!("{vm}-source"), machine),
        world.waiting(&format!("{vm}-destination"), machine),
    ];
    world.cli(Side::B).receive(vm, pair[1].socket()).unwrap();
    pair
}

#[test]
fn a_guest_that_waits_moves_after_the_daemon_was_killed_and_those_under_way_stay() {
    let mut world = World::tls();
    let machine = machine();
    let mut guests = ["one", "two", "three"].map(|vm| pair(&world, vm, &machine));
    let cli = world.cli(Side::A);
    let begun = std::time::Instant::now();
    let running: Vec<_> = ["one", "two"]
        .iter()
        .zip(&guests)
        .map(|(vm, [source, _])| cli.migrate(vm, source, Side::B, &SLOW))
        .collect();
    running.iter().for_each(|one| one.wait_mid_round());
    let third = cli.migrate("three", &guests[2][0], Side::B, &[]);
    third.wait_event("it waits", PATIENCE, |event| event["state"] == "pending");
    let id = cli.id_of("three");
    assert_eq!(cli.status(&id)["place"], 1);

    world.restart(Side::A);
    let cli = world.cli(Side::A);
    cli.wait_state(&id, "completed");
    drop((running, third));
    let [one, two, three] = &mut guests;
    let [source, destination] = three;
    assert_moved(source, destination);
    for [source, destination] in [one, two] {
        assert_stayed(source, Some(destination), begun);
    }
}

#[test]
fn a_host_is_emptied_past_a_failure_and_again() {
    let world = World::tls();
    let (small, large) = (
        machine(),
        Machine::new(Version::V10_0, 160, "rate=5 set=100"),
    );
    let mut one = pair(&world, "small", &small);
    let mut two = pair(&world, "large", &large);
    // Nothing waits for it.
    let mut stays = world.guest("stays-source", &small);
    let begun = std::time::Instant::now();
    let guests = [("large", &two[0]), ("small", &one[0]), ("stays", &stays)];
    let file = listed(&world, &guests);
    let cli = world.cli(Side::A);
    let to = listens_at(Side::B);
    let file = file.to_str().unwrap();
    let words = ["evacuate", "--to", &to, "--guests", file, "--json"];
    let done = cli.run(&words);
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert_eq!(done.status.code(), Some(1), "{text}");
    let event = |name: &str| {
        let events = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let found = events
            .into_iter()
            .find(|event: &serde_json::Value| event["event"] == name);
        found.unwrap_or_else(|| panic!("no {name}: {text}"))
    };
    let (planned, end) = (event("planned"), event("evacuated"));
    let place = |vm: &str| {
        let guests = planned["guests"].as_array().unwrap();
        guests.iter().position(|one| one["vm"] == vm).unwrap()
    };
    assert!(place("small") < place("large"), "{planned}");
    assert_eq!([&end["moved"], &end["failed"]], [2, 1], "{end}");
    for guest in end["guests"].as_array().unwrap() {
        assert!(guest["predicted_ms"].as_f64().unwrap() > 0.0, "{guest}");
        let moved = guest["vm"] != "stays";
        assert_eq!(guest["status"] == "completed", moved, "{guest}");
        assert_eq!(guest["downtime_ms"].is_number(), moved, "{guest}");
    }
    for [source, destination] in [&mut one, &mut two] {
        assert_moved(source, destination);
    }
    assert_stayed(&mut stays, None, begun);

    // Those that have left are left out, and the one that stayed goes when there is somebody who takes it.
    let mut waits = world.waiting("stays-destination", &small);
    world.cli(Side::B).receive("stays", waits.socket()).unwrap();
    let again = cli.run(&words);
    let notes = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(0), "{notes}");
    assert!(notes.contains("large does not run here"), "{notes}");
    assert_moved(&mut stays, &mut waits);
}

#[test]
fn a_migration_under_way_is_given_other_limits() {
    let world = World::tls();
    let machine = machine();
    let [mut source, mut destination] = pair(&world, "vm", &machine);
    let cli = world.cli(Side::A);
    // The guest writes faster than that.
    let slow = [&SLOW[..], &["--downtime-limit", "1ms"]].concat();
    let migration = cli.migrate("vm", &source, Side::B, &slow);
    migration.wait_mid_round();
    let id = cli.id_of("vm");
    let words = [
        "set",
        &id,
        "--bandwidth-limit",
        "unlimited",
        "--downtime-limit",
        "500ms",
        "--priority",
        "4",
    ];
    let set = cli.run(&words);
    assert_eq!(set.status.code(), Some(0), "{set:?}");
    assert_eq!(cli.status(&id)["priority"], 4);
    let outcome = migration.finish();
    let end = outcome.completed();
    assert!(end["total_ms"].as_f64().unwrap() < 60_000.0, "{end}");
    assert_moved(&mut source, &mut destination);
    let late = cli.run(&words);
    let why = String::from_utf8_lossy(&late.stderr).into_owned();
    assert!(why.contains("has ended already"), "{why}");
}

#[test]
fn what_failed_for_want_of_a_destination_is_tried_again() {
    let mut world = World::tls();
    let machine = machine();
    let [mut source, mut destination] = pair(&world, "vm", &machine);
    world.daemon_mut(Side::B).kill();
    let options = ["--retries", "20"];
    let migration = world.cli(Side::A).migrate("vm", &source, Side::B, &options);
    migration.wait_event("an attempt has failed", PATIENCE, |event| {
        event["event"] == "attempt-failed"
    });
    world.restart(Side::B);
    let outcome = migration.finish();
    let end = outcome.completed();
    let attempts = end["attempts"].as_array().unwrap();
    assert!(!attempts.is_empty() && attempts.len() < 20, "{end}");
    assert_eq!(attempts[0]["fault"], "network", "{end}");
    assert_ne!(attempts[0]["id"], end["id"], "a migration of its own");
    assert_moved(&mut source, &mut destination);
}

/// While the first arrives, what it and its margin take is more than half of what is free there: the second, which would have fitted
/// alone, is sent where there is room for it.
#[test]
fn of_a_host_that_is_emptied_no_two_guests_go_where_there_is_room_for_one() {
    let world = World::plain();
    world.keep_free(Side::B, 60);
    let mut one = pair(
        &world,
        "one",
        &Machine::new(Version::V10_0, 48, "rate=1 set=8"),
    );
    let larger = Machine::new(Version::V10_0, 160, "rate=1 set=100");
    let [mut two, mut at_b] = pair(&world, "two", &larger);
    let mut at_a = world.waiting("two-at-a", &larger);
    world.cli(Side::A).receive("two", at_a.socket()).unwrap();
    let file = listed(&world, &[("two", &two), ("one", &one[0])]);
    let cli = world.cli(Side::A);
    let slow = ["--bandwidth-limit", "8MB/s"];
    let evacuated = cli.evacuate(&file, &[Side::B, Side::A], &slow).finish();
    let (events, end) = (&evacuated.events, evacuated.events.last().unwrap());
    assert_eq!(
        evacuated.status.code(),
        Some(0),
        "{end} {}",
        evacuated.errors
    );
    assert_eq!([&end["moved"], &end["failed"]], [2, 0], "{end}");
    let (to_a, to_b) = (listens_at(Side::A), listens_at(Side::B));
    let chosen: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "chosen")
        .collect();
    assert_eq!(chosen.len(), 2, "{chosen:?}");
    assert_eq!([&chosen[0]["vm"], &chosen[0]["to"]], ["one", &to_b]);
    assert_eq!([&chosen[1]["vm"], &chosen[1]["to"]], ["two", &to_a]);
    let other = &chosen[1]["ranked"][1];
    assert_eq!([&other["to"], &other["verdict"]], [to_b.as_str(), "fail"]);
    let why = other["why"].as_str().unwrap();
    assert!(why.contains("for guests that arrive"), "{why}");
    let gone = end["guests"].as_array().unwrap();
    let gone = gone.iter().find(|guest| guest["vm"] == "two").unwrap();
    assert_eq!(gone["to"], to_a);
    let [source, destination] = &mut one;
    assert_moved(source, destination);
    assert_moved(&mut two, &mut at_a);
    assert_eq!(at_b.serial.beats(), 0, "a second guest ran");
    assert!(at_b.is_running());
}

/// Also where it is one of several, and nobody could be chosen.
#[test]
fn an_evacuation_tries_again_what_failed_for_want_of_a_destination() {
    for to in [&[Side::B][..], &[Side::A, Side::B]] {
        let mut world = World::tls();
        let [mut source, mut destination] = pair(&world, "vm", &machine());
        let file = listed(&world, &[("vm", &source)]);
        world.daemon_mut(Side::B).kill();
        let options = ["--retries", "20"];
        let evacuation = world.cli(Side::A).evacuate(&file, to, &options);
        let failed = evacuation.wait_event("an attempt has failed", PATIENCE, |event| {
            event["event"] == "attempt-failed"
        });
        assert_eq!([&failed["vm"], &failed["fault"]], ["vm", "network"]);
        assert_eq!(failed["id"].is_null(), to.len() > 1, "{failed}");
        world.restart(Side::B);
        let evacuated = evacuation.finish();
        let end = evacuated.events.last().unwrap();
        assert_eq!(
            evacuated.status.code(),
            Some(0),
            "{end} {}",
            evacuated.errors
        );
        assert_eq!([&end["moved"], &end["failed"]], [1, 0], "{end}");
        let guest = &end["guests"][0];
        let attempts = guest["attempts"].as_array().unwrap();
        assert!(!attempts.is_empty() && attempts.len() < 20, "{end}");
        assert_eq!(attempts[0]["id"], failed["id"]);
        assert_ne!(guest["id"], failed["id"], "a migration of its own");
        assert!(guest["error"].is_null(), "{guest}");
        assert_moved(&mut source, &mut destination);
    }
}
