//! What needs more of a kernel than most machines of a test have: guests under KVM, a slow and lossy link, kernel TLS,
//! RDMA.
//!
//! `scripts/test-vm` runs these in the virtual machine of `scripts/vm`, where none may be skipped. Elsewhere each asks
//! for what it needs, and is skipped without it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{Tracker, process};
use pagecopy::memory::{BlockId, Run};
use tests::real::{
    Accel, Machine, Migration, Qemu, Role, Scratch, Side, Version, World, assert_moved,
    assert_nothing_left_in, assert_stayed, hardware_kvm, kernel_tls, skipped,
};

#[path = "vm/rdma.rs"]
mod rdma;
#[path = "vm/rdma_lost.rs"]
mod rdma_lost;

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
