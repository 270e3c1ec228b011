//! A migration, a post-copy above all, that is given up before the guest was handed over: it goes on at the source, and QEMU
//! at the destination can wait for another as if nothing had been, or keeps nothing of it.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::json;

use tests::real::{
    Held, Machine, Manner, Migration, PATIENCE, Qemu, Role, RunAs, Scratch, Side, Steps, Version,
    World, assert_moved, assert_stayed, certified, eventually, let_it_last,
};

/// Long enough for the source's word to be there before the destination goes on; what is tested holds without it, too.
const ON_ITS_WAY: Duration = Duration::from_millis(300);

/// A peer that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(10);

/// Two hosts, of which the destination is held when it comes to `step`.
fn held_at(step: &str) -> (World, Steps) {
    held(Side::B, step)
}

/// Two hosts, of which the one on `held` is held when it comes to `step`.
fn held(held: Side, step: &str) -> (World, Steps) {
    let scratch = Scratch::new();
    let steps = Steps::listen(&scratch.files().join("steps"), &[step.to_owned()]);
    let trust = certified(&scratch);
    let manners = [Side::A, Side::B].map(|side| Manner {
        name: side.name().to_owned(),
        trust: trust[side as usize].clone(),
        steps: (side == held).then(|| steps.socket().to_owned()),
        run_as: RunAs::User,
    });
    (World::of(scratch, &manners), steps)
}

/// Its operator cancels it at the source; the destination, which is `held`, hears that before it goes on, and ends it, too.
fn give_up(world: &World, migration: Migration, held: Held) {
    let id = world.cli(Side::A).id_of("vm");
    let told = world.cli(Side::A).run(&["cancel", &id]);
    assert!(told.status.success(), "{told:?}");
    migration.finish().not_completed("cancelled");
    let_it_last(ON_ITS_WAY);
    held.go();
    eventually(PATIENCE, || {
        let shown = world.cli(Side::B).find(&id).unwrap_or_default();
        let over = shown["finished"].is_object();
        over.then_some(()).ok_or_else(|| shown.to_string())
    })
    .unwrap_or_else(|shown| panic!("it does not end: {shown}"));
}

/// Its disk may be slow to take the first record. The source is answered meanwhile, for longer than it would wait for one that is
/// gone, and what it says meanwhile is heard: given up, nothing is left of it.
#[test]
fn a_destination_that_takes_its_time_to_begin_is_there() {
    for given_up in [false, true] {
        let (world, steps) = held_at("destination Journal(Begun) 1");
        let machine = Machine::new(Version::V10_0, 64, "rate=20 set=16");
        let mut source = world.guest("source", &machine);
        let mut destination = world.waiting("destination", &machine);
        let migration = world.begin(Side::A, "vm", &source, &destination, &[]);
        let held = steps.wait(PATIENCE).unwrap();
        if !given_up {
            let_it_last(SILENCE + Duration::from_secs(2));
            held.go();
            migration.finish().completed();
            assert_moved(&mut source, &mut destination);
            continue;
        }
        let from = Instant::now();
        give_up(&world, migration, held);
        assert_stayed(&mut source, Some(&mut destination), from);
        world.moves_next(Side::A, "vm", &mut source, &mut destination);
    }
}

/// The source's, too, between its question and its `Hello`: the destination waits for it.
#[test]
fn a_source_that_takes_its_time_to_begin_is_waited_for() {
    let (world, steps) = held(Side::A, "source Journal(Begun) 1");
    let machine = Machine::new(Version::V10_0, 64, "rate=20 set=16");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let migration = world.begin(Side::A, "vm", &source, &destination, &[]);
    let held = steps.wait(PATIENCE).unwrap();
    let_it_last(SILENCE + Duration::from_secs(2));
    held.go();
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
}

/// While page faults are being made to wait, and when they do.
#[test]
fn nothing_is_left_of_it() {
    for step in [
        "destination Arm 1",
        "destination Armed 1",
        "destination LoadDeviceState 1",
    ] {
        let (world, steps) = held_at(step);
        let machine = Machine::new(Version::V10_0, 64, "rate=20 set=16");
        let mut source = world.guest("source", &machine);
        let mut destination = world.waiting("destination", &machine);
        let postcopy = ["--mode", "postcopy"];
        let migration = world.begin(Side::A, "vm", &source, &destination, &postcopy);
        let held = steps.wait(PATIENCE).unwrap();
        println!("{step}");
        let from = Instant::now();
        give_up(&world, migration, held);
        println!("{step}: given up");
        // One that was loading has had its device state, and ends.
        if step.contains("Load") {
            assert_stayed(&mut source, None, from);
            destination = Qemu::start(&world.scratch, "another", &machine, Role::Destination);
        } else {
            assert_stayed(&mut source, Some(&mut destination), from);
        }
        let again = world.migrate(Side::A, "vm", &source, &destination, &postcopy);
        again.completed();
        assert_moved(&mut source, &mut destination);
    }
}

/// A daemon that is killed while QEMU loads leaves it with a cut-off device state: it takes no guest any more, and the daemon
/// that is started anew gives back what came of this one.
#[test]
fn a_qemu_whose_load_was_cut_off_keeps_no_memory() {
    for mode in ["precopy", "postcopy"] {
        let (mut world, steps) = held_at("destination LoadDeviceState 1");
        let machine = Machine::new(Version::V10_0, 64, "rate=20 set=16");
        let mut source = world.guest("source", &machine);
        let mut destination = world.waiting("destination", &machine);
        let allocated = |qemu: &Qemu| std::fs::metadata(qemu.ram()).unwrap().blocks();
        let before = allocated(&destination);
        let from = Instant::now();
        let migration = world.begin(Side::A, "vm", &source, &destination, &["--mode", mode]);
        let held = steps.wait(PATIENCE).unwrap();
        assert!(allocated(&destination) > before, "{mode}: nothing came");
        world.daemon_mut(Side::B).kill();
        drop(held);
        let nothing = json!({ "uri": "exec:echo cut off here", "exit-on-error": false });
        destination
            .qmp
            .execute("migrate-incoming", nothing)
            .unwrap();
        let failed = eventually(PATIENCE, || {
            let told = destination.qmp.execute("query-migrate", json!({}))?;
            let failed = told["status"] == "failed";
            failed.then_some(()).ok_or_else(|| told.to_string())
        });
        assert_eq!(failed, Ok(()), "{mode}");
        assert_eq!(destination.qmp.status(), "inmigrate");
        world.restart(Side::B);
        let cleared = eventually(PATIENCE, || match allocated(&destination) {
            kept if kept > before => Err(format!("it keeps {} KiB", kept / 2)),
            _ => Ok(()),
        });
        assert_eq!(cleared, Ok(()), "{mode}");
        migration.finish().not_completed("failed");
        assert_stayed(&mut source, None, from);
        let refused = world.cli(Side::B).receive("vm", destination.socket());
        let refused = refused.unwrap_err();
        assert!(refused.contains("takes no other"), "{refused}");
    }
}
