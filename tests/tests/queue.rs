//! Many guests of one host: who waits, what outlives the daemon, and what leaves it.

#![allow(clippy::unwrap_used)]

use tests::real::{
    Machine, PATIENCE, Qemu, Side, Version, World, assert_moved, assert_stayed, eventually,
};

/// Slow enough that a migration is still in its first round when the test has done what it does meanwhile.
const SLOW: [&str; 2] = ["--bandwidth-limit", "2MB/s"];

fn machine() -> Machine {
    Machine::new(Version::V10_0, 48, "rate=5 set=8")
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
    let moved = eventually(PATIENCE, || {
        let shown = cli.status(&id);
        match shown["state"].as_str() {
            Some("completed") => Ok(()),
            _ => Err(shown.to_string()),
        }
    });
    assert_eq!(moved, Ok(()));
    drop((running, third));
    let [one, two, three] = &mut guests;
    let [source, destination] = three;
    assert_moved(source, destination);
    for [source, destination] in [one, two] {
        assert_stayed(source, Some(destination), begun);
    }
}
