//! Guests over RDMA, on devices that `PAGECOPY_RDMA` names by their addresses.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pagecopy::wire::{AbortCode, Message};
use serde_json::Value;
use tests::real::{
    HostileSource, Machine, Mallory, Migration, Net, Outcome, PATIENCE, Qemu, Scratch, Side, Trust,
    Version, World, assert_moved, assert_stayed, certified, eventually, hello, skipped,
};
use transport::Error;

use super::{SLOWLY, receive, small, under_way, verified};

/// The network of the first RDMA device that `PAGECOPY_RDMA` names.
fn rail() -> Option<String> {
    network_of("PAGECOPY_RDMA")
}

fn network_of(variable: &str) -> Option<String> {
    let rails = std::env::var(variable).unwrap_or_default();
    let found = rails.split(',').next().and_then(|it| it.rsplit_once('.'));
    if found.is_none() {
        skipped(&format!("{variable} names no address of an RDMA device"));
    }
    found.map(|(network, _)| format!("{network}.0/24"))
}

/// Two hosts on the RDMA device of that network, of which these allow it.
fn on_rail(network: &str, plain: bool, allowing: &[Side]) -> World {
    let scratch = Scratch::new();
    let trust = if plain {
        [Trust::Plaintext, Trust::Plaintext]
    } else {
        certified(&scratch)
    };
    let mut world = World::on(Net::here(), scratch, &trust);
    world.allow_rdma(allowing, &[network]);
    world
}

/// Registrations of memory that the kernel has, of whatever process.
fn registrations() -> usize {
    let shown = Command::new("rdma")
        .args(["-j", "resource", "show", "mr"])
        .output();
    let shown: Value = serde_json::from_slice(&shown.unwrap().stdout).unwrap();
    shown.as_array().unwrap().len()
}

/// Waits until nothing is registered any more: a lane may take a moment to end.
pub(super) fn assert_none_registered() {
    let gone = eventually(PATIENCE, || match registrations() {
        0 => Ok(()),
        left => Err(format!("{left} registrations")),
    });
    assert_eq!(gone, Ok(()), "memory stays registered");
}

/// It went over that, and says why if it does.
pub(super) fn assert_went_over(outcome: &Outcome, transport: &str, why: &str) {
    for event in &outcome.events {
        if event["event"] != "progress" {
            println!("{event}");
        }
    }
    let end = outcome.completed();
    assert_eq!(end["transport"], transport, "{end}");
    let said = outcome.events.iter().any(|event| {
        event["event"] == "notice" && event["text"].as_str().is_some_and(|it| it.contains(why))
    });
    assert!(said, "nothing says {why:?}: {:?}", outcome.events);
}

fn moves_over(
    world: &World,
    from: Side,
    source: &mut Qemu,
    destination: &mut Qemu,
    options: &[&str],
) {
    receive(world, from.other(), destination);
    let migration = world.cli(from).migrate("vm", source, from.other(), options);
    assert_went_over(&migration.finish(), "rdma", "pages go over RDMA");
    assert_moved(source, destination);
}

#[test]
fn rdma_guest_moves_there_and_back() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=2 set=2");
    let (mut source, mut there) = (
        world.guest("source", &machine),
        world.waiting("there", &machine),
    );
    let must = ["--transport", "rdma", "--verify", "--downtime-limit", "1s"];
    moves_over(&world, Side::A, &mut source, &mut there, &must);
    assert_none_registered();
    // By default it goes the same way.
    let mut back = world.waiting("back", &machine);
    moves_over(&world, Side::B, &mut there, &mut back, &must[2..]);
    assert_none_registered();
}

#[test]
fn rdma_guest_goes_first_and_fetches_its_memory() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, true, &[Side::A, Side::B]);
    let machine = small(Version::V7_2, "rate=2 set=2");
    let (mut source, mut there) = (
        world.guest("source", &machine),
        world.waiting("there", &machine),
    );
    let hybrid = [
        "--mode",
        "hybrid",
        "--postcopy-after",
        "1",
        "--downtime-limit",
        "1ms",
        "--channels",
        "2",
    ];
    moves_over(&world, Side::A, &mut source, &mut there, &hybrid);
    let mut back = world.waiting("back", &machine);
    let first = ["--mode", "postcopy", "--channels", "3"];
    moves_over(&world, Side::B, &mut there, &mut back, &first);
    assert_none_registered();
}

/// Moves a guest there and back, each time by `go`, after which it is whole and nothing stays registered.
fn there_and_back(world: &World, machine: &Machine, go: impl Fn(Side, &Qemu)) {
    let mut here = world.guest("source", machine);
    for from in [Side::A, Side::B] {
        let mut there = world.waiting(from.other().name(), machine);
        receive(world, from.other(), &there);
        go(from, &here);
        assert_moved(&mut here, &mut there);
        assert_none_registered();
        here = there;
    }
}

/// Queue pairs that are connected, of each device, by its name.
fn connected() -> BTreeMap<String, usize> {
    let shown = Command::new("rdma")
        .args(["-j", "resource", "show", "qp"])
        .output();
    let shown: Value = serde_json::from_slice(&shown.unwrap().stdout).unwrap();
    let mut devices = BTreeMap::new();
    for pair in shown.as_array().unwrap() {
        if pair["type"] == "RC" && pair["state"] == "RTS" {
            let device = pair["ifname"].as_str().unwrap().to_owned();
            *devices.entry(device).or_default() += 1;
        }
    }
    devices
}

/// With two devices on each host the channels go over both in turn, there and back, in a round and in post-copy.
#[test]
fn rdma_guest_moves_over_two_devices() {
    let rails = std::env::var("PAGECOPY_RDMA").unwrap_or_default();
    let networks: Vec<String> = rails.split(',').map(|it| format!("{it}/32")).collect();
    let [first, second] = &networks[..] else {
        return skipped("PAGECOPY_RDMA names no two RDMA devices");
    };
    let mut world = on_rail(first, false, &[]);
    world.allow_rdma(&[Side::A, Side::B], &[first, second]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    there_and_back(&world, &machine, |from, here| {
        let mode = if from == Side::A {
            "precopy"
        } else {
            "postcopy"
        };
        let options = ["--mode", mode, "--channels", "4"];
        let options = [&options[..], &SLOWLY, &["--downtime-limit", "1s"]].concat();
        let migration = world.cli(from).migrate("vm", here, from.other(), &options);
        migration.wait_event("the first figures", PATIENCE, |event| {
            event["event"] == "progress" || event["event"] == "postcopy"
        });
        let connected = connected();
        // Both ends of two channels each.
        assert_eq!(connected.len(), 2, "{connected:?}");
        assert!(connected.values().all(|pairs| *pairs == 4), "{connected:?}");
        let outcome = migration.finish();
        assert_went_over(&outcome, "rdma", "pages go over RDMA");
    });
}

/// Where one of the two does not allow it, whoever insists is told, and whoever does not goes over TCP.
#[test]
fn rdma_is_not_used_where_a_host_does_not_allow_it() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, false, &[Side::A]);
    let machine = small(Version::V10_0, "rate=2 set=2");
    let (mut source, mut there) = (
        world.guest("source", &machine),
        world.waiting("there", &machine),
    );
    receive(&world, Side::B, &there);
    let begin = |options: &[&str]| world.cli(Side::A).migrate("vm", &source, Side::B, options);
    let begun = Instant::now();
    let refused = begin(&["--transport", "rdma"]).finish();
    refused.failed_with(&["no RDMA", "unencrypted", "allow-plaintext = true"]);
    let pinned = begin(&["--transport", "rdma", "--rdma-pin", "1MiB"]).finish();
    pinned.failed_with(&["--rdma-pin", "1.0 MiB"]);
    let outcome = begin(&["--downtime-limit", "1s"]).finish();
    assert_went_over(&outcome, "tls", "allow-plaintext = true");
    assert!(begun.elapsed() < PATIENCE);
    assert_moved(&mut source, &mut there);

    // The way back is the business of a host that does not allow it.
    let mut back = world.waiting("back", &machine);
    receive(&world, Side::A, &back);
    let insist = ["--transport", "rdma"];
    let refused = world.cli(Side::B).migrate("vm", &there, Side::A, &insist);
    let refused = refused.finish();
    refused.failed_with(&["no RDMA on this host", "allow-plaintext = true"]);
    verified(&world, Side::B, &mut there, &mut back);
}

/// Nothing is pinned for devices that fetch pages on demand: no limit on that is in the way, there and back, in a round and in
/// post-copy.
#[test]
fn rdma_on_demand_takes_no_pinned_memory() {
    if std::env::var_os("PAGECOPY_RDMA_ON_DEMAND").is_none() {
        return skipped(
            "PAGECOPY_RDMA_ON_DEMAND does not say that the devices fetch pages on demand",
        );
    }
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=2 set=2");
    there_and_back(&world, &machine, |from, here| {
        let mode = if from == Side::A {
            "precopy"
        } else {
            "postcopy"
        };
        let options = ["--transport", "rdma", "--rdma-pin", "1MiB", "--mode", mode];
        let options = [&options[..], &["--downtime-limit", "1s"]].concat();
        let migration = world.cli(from).migrate("vm", here, from.other(), &options);
        assert_went_over(&migration.finish(), "rdma", "pages go over RDMA");
    });
}

/// Either daemon is killed in the middle of a round: the guest stays, and nothing stays registered.
#[test]
fn rdma_daemon_killed_in_a_round_leaves_the_guest_and_no_registration() {
    let Some(rail) = rail() else { return };
    let mut world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut source = world.guest("source", &machine);
    for killed in [Side::B, Side::A] {
        let mut there = world.waiting(killed.name(), &machine);
        let (migration, begun) = under_way(&world, &source, &there);
        assert!(registrations() > 0);
        world.daemon_mut(killed).kill();
        drop(migration);
        world.restart(killed);
        assert_none_registered();
        assert_stayed(&mut source, Some(&mut there), begun);
    }
}

/// A number below `below` that nobody has chosen, and which is printed.
fn any_below(below: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let number = u64::from(now.subsec_micros()) % below;
    println!("at {number} of {below}");
    number
}

/// Waits for a notice that says that. What is tried again comes after pauses that become longer.
pub(super) fn notice(migration: &Migration, what: &str) {
    migration.wait_event(what, 4 * PATIENCE, |event| {
        event["event"] == "notice" && event["text"].as_str().is_some_and(|it| it.contains(what))
    });
}

/// Breaks a queue pair of one side, whichever, and waits until all goes over RDMA again.
fn break_rdma(migration: &Migration) {
    let broken = Instant::now();
    let file = std::env::var_os("PAGECOPY_BREAK_RDMA").unwrap();
    std::fs::write(file, "").unwrap();
    notice(migration, "RDMA broke, pages go over TCP");
    println!("over TCP {:?} after that", broken.elapsed());
    notice(migration, "RDMA is there again");
    println!("over RDMA {:?} after that", broken.elapsed());
}

/// A queue pair breaks in the middle of a round, whenever that is. Its pages go over TCP until there is another, and none of
/// those that have arrived goes again.
#[test]
fn rdma_queue_pair_breaks_in_a_round() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    there_and_back(&world, &machine, |from, here| {
        let options = [
            "--verify",
            "--downtime-limit",
            "1s",
            "--channels",
            "2",
            "--bandwidth-limit",
            "1MB/s",
        ];
        let migration = world.cli(from).migrate("vm", here, from.other(), &options);
        let percent = 5 + any_below(30);
        migration.wait_event("so far", PATIENCE, |event| {
            event["event"] == "progress" && event["percent"].as_u64() >= Some(percent)
        });
        break_rdma(&migration);
        let outcome = migration.finish();
        assert_went_over(&outcome, "rdma", "pages go over TCP");
        let end = outcome.completed();
        assert_eq!(end["transport_at_end"], "rdma", "{end}");
        // All of its memory once, and what it has dirtied.
        assert!(end["bytes_on_wire"].as_u64() < Some(24 << 20), "{end}");
    });
}

/// A post-copy of which so much and no more is there.
pub(super) fn postcopy_under_way(world: &World, from: Side, guest: &Qemu) -> Migration {
    let options = [
        "--mode",
        "postcopy",
        "--channels",
        "2",
        "--postcopy-bandwidth-limit",
        "1MB/s",
    ];
    let migration = world.cli(from).migrate("vm", guest, from.other(), &options);
    let lacking = (16 - any_below(4)) << 20;
    migration.wait_event("so far", PATIENCE, |event| {
        event["event"] == "postcopy"
            && event["lacking_bytes"]
                .as_u64()
                .is_some_and(|it| it <= lacking)
    });
    migration
}

/// The same in a post-copy: the guest is not paused.
#[test]
fn rdma_queue_pair_breaks_in_a_postcopy() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    there_and_back(&world, &machine, |from, here| {
        let migration = postcopy_under_way(&world, from, here);
        break_rdma(&migration);
        let outcome = migration.finish();
        assert_went_over(&outcome, "rdma", "pages go over TCP");
        assert_eq!(outcome.completed()["paused_ms"], 0.0);
    });
}

/// The device's link is cut in the middle of a post-copy, and stays so: the rest comes over TCP, and the guest is not paused.
#[test]
fn rdma_link_cut_in_a_postcopy_and_the_rest_comes_over_tcp() {
    let Some(rail) = network_of("PAGECOPY_RDMA_TO_CUT") else {
        return;
    };
    let world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut source = world.guest("source", &machine);
    let mut there = world.waiting("there", &machine);
    receive(&world, Side::B, &there);
    let migration = postcopy_under_way(&world, Side::A, &source);
    let cut = Command::new("ip")
        .args(["link", "set", "rail3", "down"])
        .status();
    assert!(cut.unwrap().success());
    let cut = Instant::now();
    notice(&migration, "RDMA broke, pages go over TCP");
    println!("over TCP {:?} after the link was cut", cut.elapsed());
    let outcome = migration.finish();
    assert_went_over(&outcome, "rdma", "pages go over TCP");
    let end = outcome.completed();
    assert_eq!(end["transport_at_end"], "tls", "{end}");
    assert_eq!(end["paused_ms"], 0.0);
    let received = world.cli(Side::B).last_finished("vm").unwrap();
    assert_eq!(received["transport"], "rdma", "{received}");
    assert_eq!(received["transport_at_end"], "tls", "{received}");
    assert_moved(&mut source, &mut there);
    assert_none_registered();
}

/// Either daemon is killed in the middle of a post-copy, and started again: that is a pause, and nothing stays registered.
#[test]
fn rdma_daemon_killed_in_a_postcopy_is_a_pause_and_leaves_no_registration() {
    let Some(rail) = rail() else { return };
    let mut world = on_rail(&rail, false, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut here = world.guest("source", &machine);
    for (from, killed) in [(Side::A, Side::B), (Side::B, Side::B)] {
        let mut there = world.waiting(from.other().name(), &machine);
        receive(&world, from.other(), &there);
        let migration = postcopy_under_way(&world, from, &here);
        assert!(registrations() > 0);
        let id = world.cli(from).id_of("vm");
        world.daemon_mut(killed).kill();
        drop(migration);
        world.restart(killed);
        for side in [Side::A, Side::B] {
            let done = eventually(PATIENCE * 2, || {
                let shown = world.cli(side).find(&id).unwrap_or_default();
                match shown["finished"]["status"] == "completed" {
                    true => Ok(()),
                    false => Err(format!("{side:?} says {shown}")),
                }
            });
            assert_eq!(done, Ok(()));
        }
        assert_moved(&mut here, &mut there);
        assert_none_registered();
        here = there;
    }
}

type Attack = fn(&mut HostileSource) -> Result<(), Error>;

/// What a source may not do over RDMA, and a word of what it is told.
const OFFENCES: [(&str, Attack, &str); 8] = [
    (
        "a write beyond the end",
        |s| {
            s.write(1, 0, 50 << 20, 4096)?;
            s.assert_broken(1);
            Ok(())
        },
        "outside",
    ),
    (
        "a write over the end",
        |s| {
            s.write(1, 0, (48 << 20) - 4096, 8192)?;
            s.assert_broken(1);
            Ok(())
        },
        "outside",
    ),
    (
        "a region that does not exist",
        |s| {
            s.write(1, 2, 0, 4096)?;
            s.assert_broken(1);
            Ok(())
        },
        "does not exist",
    ),
    (
        "a read of the guest's RAM",
        |s| {
            s.read(1, 0, 4096)?;
            s.assert_broken(1);
            Ok(())
        },
        "may not read",
    ),
    ("garbage", |s| s.raw(1, vec![0xa5; 300]), "type"),
    (
        "a flood",
        |s| (0..10_000).try_for_each(|_| s.say(1, &Message::Barrier { round: 0 })),
        "barrier",
    ),
    (
        "a message over TCP",
        |s| s.say_beside(&Message::Barrier { round: 0 }),
        "over TCP",
    ),
    (
        "a way back that was not lost",
        |s| s.say_beside(&Message::RdmaBack),
        "over TCP",
    ),
];

/// Sources that do over RDMA what they may not are ended, and told so; who does not know the secret is turned away. The QEMU
/// that waits is as it was, and takes an honest guest.
#[test]
fn rdma_hostile_sources_are_ended_and_an_honest_one_is_not() {
    let Some(rail) = rail() else { return };
    let world = on_rail(&rail, true, &[Side::A, Side::B]);
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut source = world.guest("source", &machine);
    let mut there = world.waiting("there", &machine);
    let accepted = || {
        receive(&world, Side::B, &there);
        let made = Mallory::plain().dial(&world.net, Side::B, 3, 0..3);
        let mut hostile = made.expect("the daemon listens");
        hostile.over_rdma(48);
        hostile.accepted(&hello("vm", 48));
        hostile
    };
    for (what, attack, word) in OFFENCES {
        println!("{what}");
        let mut hostile = accepted();
        // That it may not go on is the answer.
        let _ = attack(&mut hostile);
        hostile.assert_blamed(what, &[word]);
    }
    // With the key to a chunk that it has used, when all is over.
    let mut late = accepted();
    late.write(1, 0, 0, 4096).unwrap();
    late.say(
        0,
        &Message::Abort {
            code: AbortCode::Cancelled,
            reason: "enough".to_owned(),
        },
    )
    .unwrap();
    late.end(PATIENCE);
    let _ = late.write(1, 0, 0, 4096);
    late.assert_broken(1);
    drop(late);
    receive(&world, Side::B, &there);
    verified(&world, Side::A, &mut source, &mut there);
    assert_none_registered();
}
