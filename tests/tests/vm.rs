//! What needs more of a kernel than most machines of a test have: guests under KVM, a slow and lossy link, kernel TLS,
//! RDMA.
//!
//! `scripts/test-vm` runs these in the virtual machine of `scripts/vm`, where none may be skipped. Elsewhere each asks
//! for what it needs, and is skipped without it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{Tracker, process};
use pagecopy::memory::{BlockId, Run};
use pagecopy::wire::{AbortCode, Message};
use serde_json::Value;
use tests::real::{
    Accel, HostileSource, Machine, Mallory, Migration, Net, Outcome, PATIENCE, Qemu, Role, Scratch,
    Side, Trust, Version, World, assert_moved, assert_nothing_left_in, assert_stayed, certified,
    eventually, hardware_kvm, hello, kernel_tls, skipped,
};
use transport::Error;

const PAGE: u64 = 4096;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE;

/// A guest with 16 MiB of known words, in a machine that computes slowly.
fn small(version: Version, guest: &str) -> Machine {
    Machine::new(version, 48, guest)
}

/// Slow enough that round 0 takes some seconds.
const SLOWLY: [&str; 2] = ["--bandwidth-limit", "4MB/s"];

/// The core of what this project promises, with one guest: it stays when a migration is cancelled, it stays when the link
/// is cut, and then it moves there and back again, with both RAMs compared each time.
fn core(world: &World, machine: &Machine) {
    let mut source = world.guest("source", machine);
    let mut there = world.waiting("there", machine);

    let (migration, begun) = under_way(world, &source, &there);
    let id = world.cli(Side::A).id_of("vm");
    assert!(world.cli(Side::A).run(&["cancel", &id]).status.success());
    migration.finish().not_completed("cancelled");
    assert_stayed(&mut source, Some(&mut there), begun);

    let (migration, begun) = under_way(world, &source, &there);
    world.net.cut();
    migration.finish().not_completed("failed");
    assert_stayed(&mut source, Some(&mut there), begun);
    world.net.mend();

    receive(world, Side::B, &there);
    verified(world, Side::A, &mut source, &mut there);
    let mut back = world.waiting("back", machine);
    receive(world, Side::A, &back);
    verified(world, Side::B, &mut there, &mut back);
}

/// A migration in the middle of its first round, and when it began.
fn under_way(world: &World, source: &Qemu, destination: &Qemu) -> (Migration, Instant) {
    receive(world, Side::B, destination);
    let begun = Instant::now();
    let migration = world.cli(Side::A).migrate("vm", source, Side::B, &SLOWLY);
    migration.wait_mid_round();
    (migration, begun)
}

/// Makes `qemu` the destination. After an attempt that failed, the daemon says no until it has noticed.
fn receive(world: &World, side: Side, qemu: &Qemu) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(refusal) = world.cli(side).receive("vm", qemu.socket()) {
        assert!(Instant::now() < deadline, "{refusal}");
    }
}

/// Moves the guest to the other side, with both RAMs compared.
fn verified(world: &World, from: Side, source: &mut Qemu, destination: &mut Qemu) {
    let options = ["--verify", "--downtime-limit", "1s"];
    let migration = world
        .cli(from)
        .migrate("vm", source, from.other(), &options);
    let outcome = migration.finish();
    println!("{}", outcome.completed());
    assert_moved(source, destination);
}

#[test]
fn kvm_guest_stays_and_moves() {
    if let Err(reason) = hardware_kvm() {
        return skipped(&reason);
    }
    let mut machine = small(Version::V10_0, "rate=2 set=2");
    machine.accel = Accel::Kvm;
    core(&World::tls(), &machine);
}

#[test]
fn netem_guest_stays_and_moves_over_a_slow_and_lossy_link() {
    let world = World::tls();
    if let Err(reason) = world.net.impair(&["delay", "20ms", "loss", "0.5%"]) {
        return skipped(&reason);
    }
    core(&world, &small(Version::V7_2, "rate=1 set=1"));
    let dropped = [Side::A, Side::B].map(|side| world.net.dropped(side));
    println!("dropped {dropped:?} packets");
    assert!(dropped.iter().all(|&packets| packets > 0), "{dropped:?}");
}

#[test]
fn ktls_guest_stays_and_moves_where_the_kernel_has_tls() {
    if let Err(reason) = kernel_tls() {
        return skipped(&format!("this kernel has no TLS: {reason}"));
    }
    core(&World::tls(), &small(Version::V10_0, "rate=2 set=2"));
}

/// The pages of these runs.
fn pages(runs: &[Run]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.first..run.end()).collect()
}

/// A guest dirties its region in sequence and says how far it has come (`tests/guest/guest.c`): the scan reports exactly
/// those pages, those of the table with their generations, and the few with the guest's own counters and stack.
fn tracked_exactly(accel: Accel) {
    const IMAGE: u64 = PAGES_PER_MIB;
    const TABLE: u64 = 4 * PAGES_PER_MIB;
    const REGION: u64 = 16 * PAGES_PER_MIB;
    const GENERATIONS_PER_PAGE: u64 = PAGE / 4;
    let scratch = Scratch::new();
    let mut machine = small(Version::V10_0, "rate=0 pattern=seq");
    machine.accel = accel;
    let qemu = Qemu::start(&scratch, "tracked", &machine, Role::Source);
    qemu.serial.wait_filled();
    let pid = i32::try_from(qemu.pid()).unwrap();
    let mapping = process::find_mapping(pid, qemu.ram(), 48 << 20).unwrap();
    let block = TrackedBlock {
        block: BlockId(0),
        address: mapping.address,
        len: mapping.len,
        page_size: mapping.page_size,
    };
    let mut tracker = UffdTracker::new(pid, vec![block]).unwrap();
    tracker.arm().unwrap();
    let mut from = qemu.serial.rest();
    tracker.scan(&mut Vec::new()).unwrap();
    for (rate, pages_at_least) in [(1, 1), (4, 300), (0, 0), (2, 40), (8, 1000), (1, 5)] {
        qemu.serial.set_rate(rate);
        qemu.serial.wait_dirtied(from + pages_at_least);
        let to = qemu.serial.rest();
        let mut expected = BTreeSet::from_iter(REGION + from..REGION + to);
        expected.extend((from..to).map(|page| TABLE + page / GENERATIONS_PER_PAGE));
        let mut dirty = Vec::new();
        tracker.scan(&mut dirty).unwrap();
        let (own, reported): (BTreeSet<u64>, BTreeSet<u64>) = pages(&dirty)
            .into_iter()
            .partition(|page| (IMAGE..TABLE).contains(page));
        println!("{accel:?}: {} pages dirtied, and {own:x?}", to - from);
        assert_eq!(reported, expected, "dirtied from page {from} to {to}");
        assert!((1..8).contains(&own.len()), "its counters: {own:x?}");
        from = to;
    }
    qemu.serial.verify();
    drop(tracker);
    assert_nothing_left_in(qemu.pid());
}

#[test]
fn kvm_guest_is_tracked_exactly() {
    match hardware_kvm() {
        Ok(()) => tracked_exactly(Accel::Kvm),
        Err(reason) => skipped(&reason),
    }
}

#[test]
fn emulated_guest_is_tracked_exactly() {
    tracked_exactly(Accel::Tcg);
}

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
    for side in allowing {
        let config = world.daemon(*side).config().to_owned();
        let table = format!("[rdma]\nallow-plaintext = true\nnetworks = [{network:?}]\n");
        let text = std::fs::read_to_string(&config).unwrap() + &table;
        std::fs::write(&config, text).unwrap();
        world.restart(*side);
    }
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
fn assert_none_registered() {
    let gone = eventually(PATIENCE, || match registrations() {
        0 => Ok(()),
        left => Err(format!("{left} registrations")),
    });
    assert_eq!(gone, Ok(()), "memory stays registered");
}

/// It went over that, and says why if it does.
fn assert_went_over(outcome: &Outcome, transport: &str, why: &str) {
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

/// Waits for a notice that says that.
fn notice(migration: &Migration, what: &str) {
    migration.wait_event(what, PATIENCE, |event| {
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
    let mut here = world.guest("source", &machine);
    for from in [Side::A, Side::B] {
        let mut there = world.waiting(from.other().name(), &machine);
        receive(&world, from.other(), &there);
        let options = [
            "--verify",
            "--downtime-limit",
            "1s",
            "--channels",
            "2",
            "--bandwidth-limit",
            "1MB/s",
        ];
        let migration = world.cli(from).migrate("vm", &here, from.other(), &options);
        let percent = 5 + any_below(30);
        migration.wait_event("so far", PATIENCE, |event| {
            event["event"] == "progress" && event["percent"].as_u64() >= Some(percent)
        });
        break_rdma(&migration);
        let outcome = migration.finish();
        assert_went_over(&outcome, "rdma", "pages go over TCP");
        let end = outcome.completed();
        // All of its memory once, and what it has dirtied.
        assert!(end["bytes_on_wire"].as_u64() < Some(24 << 20), "{end}");
        assert_moved(&mut here, &mut there);
        assert_none_registered();
        here = there;
    }
}

/// A post-copy of which so much and no more is there.
fn postcopy_under_way(world: &World, from: Side, guest: &Qemu) -> Migration {
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
    let mut here = world.guest("source", &machine);
    for from in [Side::A, Side::B] {
        let mut there = world.waiting(from.other().name(), &machine);
        receive(&world, from.other(), &there);
        let migration = postcopy_under_way(&world, from, &here);
        break_rdma(&migration);
        let outcome = migration.finish();
        assert_went_over(&outcome, "rdma", "pages go over TCP");
        assert_eq!(outcome.completed()["paused_ms"], 0.0);
        assert_moved(&mut here, &mut there);
        assert_none_registered();
        here = there;
    }
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
    assert_eq!(outcome.completed()["paused_ms"], 0.0);
    assert_moved(&mut source, &mut there);
    assert_none_registered();
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
