//! An allowed peer that speaks for a migration which is not its own: it knows the id, and has a good certificate of another
//! name. It may end nothing, run nothing, and be fetched from by nobody.

use super::*;
use pagecopy::engine::MigrationId;

/// What the link carries while the guest goes, and once its memory is on the way: time for all that is to be seen.
const LINK_MBIT: u32 = 50;
const SLOW_MBIT: u32 = 4;

fn id_of(text: &str) -> MigrationId {
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap();
    }
    MigrationId(id)
}

/// Says all that a source may come back with, each on a connection of its own, and `Closed` on top.
fn speaks_for_it(world: &World, mallory: &Mallory, id: MigrationId) {
    let foreign = Message::Answer {
        id,
        standing: Standing::Foreign,
    };
    for (channels, question) in [
        (1, Message::Query { id }),
        (1, Message::Withdrawn { id }),
        (3, Message::Serve { id }),
        (3, Message::Query { id }),
    ] {
        let mut peer = mallory
            .dial(&world.net, Side::B, channels, 0..channels)
            .unwrap();
        assert_eq!(peer.ask(&question, |_| true), foreign, "{question:?}");
        // These may come again on the same connection.
        if !matches!(question, Message::Serve { .. }) {
            assert_eq!(peer.ask(&question, |_| true), foreign, "{question:?}");
        }
        peer.say(0, &Message::Closed).unwrap();
    }
}

/// A guest that runs at the destination, and lacks memory for some time: both QEMUs, and its migration.
fn gone_first(world: &World) -> (Qemu, Qemu, Migration) {
    world.net.limit(LINK_MBIT);
    let source = world.guest("source", &machine());
    let destination = world.waiting("destination", &machine());
    let first = ["--mode", "postcopy"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &first);
    destination.serial.wait_beats(1);
    world.net.limit(SLOW_MBIT);
    (source, destination, migration)
}

#[test]
fn another_allowed_peer_ends_no_migration() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let slow = ["--bandwidth-limit", "8MB/s"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &slow);
    migration.wait_mid_round();
    let id = world.cli(Side::A).id_of("vm");
    speaks_for_it(&world, &mallory, id_of(&id));
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
    world
        .daemon(Side::B)
        .assert_logs(&["not its own", "mallory"]);
}

/// The guest lacks memory: neither the daemon that fetches it nor the one after it takes any from another.
#[test]
fn another_allowed_peer_serves_no_guest() {
    let (mut world, mallory, _) = world();
    let (mut source, mut destination, migration) = gone_first(&world);
    let id = world.cli(Side::A).id_of("vm");
    speaks_for_it(&world, &mallory, id_of(&id));
    let state = |world: &World| world.cli(Side::B).status(&id)["state"].clone();
    assert_eq!(state(&world), "migrating");
    // The source does not come while it is stopped; the name is in the journal.
    world.daemon(Side::A).pause();
    world.restart(Side::B);
    speaks_for_it(&world, &mallory, id_of(&id));
    assert_eq!(state(&world), "paused");
    world.daemon(Side::A).signal(rustix::process::Signal::CONT);
    world.net.limit(LINK_MBIT);
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
    eventually(PATIENCE, || match state(&world) {
        state if state == "completed" => Ok(()),
        state => Err(state.to_string()),
    })
    .unwrap();
}

/// The same at the other end: a host with a good certificate, at the destination's address, gets nothing of the guest's memory.
#[test]
fn another_allowed_peer_is_served_no_guest() {
    let (mut world, _, _) = world();
    let (mut source, mut destination, migration) = gone_first(&world);
    world.daemon_mut(Side::B).kill();
    let config = world.folder(Side::B).join("pagecopyd.toml");
    let own = std::fs::read_to_string(&config).unwrap();
    let another = own.replace("-b-good", "-mallory-good");
    assert_ne!(own, another);
    std::fs::write(&config, another).unwrap();
    world.restart(Side::B);
    let words = [
        "is not the host that the migration was begun with",
        "mallory",
    ];
    migration.wait_event("another name is noticed", PATIENCE, |event| {
        let reason = event["reason"].as_str().unwrap_or_default();
        words.iter().all(|word| reason.contains(word))
    });
    assert_eq!(destination.qmp.status(), "running");
    std::fs::write(&config, own).unwrap();
    world.restart(Side::B);
    world.net.limit(LINK_MBIT);
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
}
