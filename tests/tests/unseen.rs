//! What no scan for dirty pages sees, on real QEMU: disk reads in flight, holes, other processes; and `--verify`, which
//! would notice if one of them went wrong.
//!
//! `pagecopy/tests/host_unseen.rs` shows each gap itself; here it is shown that the whole of pagecopy closes it.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::json;
use tests::real::{
    Machine, Migration, Process, Qemu, Qmp, Role, Scratch, Side, Version, World, assert_moved,
    assert_stayed,
};

/// Slow enough that a round of 240 MiB takes five seconds.
const SLOWLY: [&str; 2] = ["--bandwidth-limit", "50MB/s"];
/// Where the guest's memory is its own but never used by it: below its region (`tests/guest/guest.c`).
const UNUSED: u64 = 13 << 20;
const PAGE: u64 = 4096;

/// How long the slow disk takes for a read.
const LATENCY: Duration = Duration::from_millis(2500);

/// A guest with a disk that answers each read after [`LATENCY`] with nothing.
fn with_slow_disk(version: Version, cache: &str) -> Machine {
    with_disk(version, LATENCY, cache)
}

fn with_disk(version: Version, latency: Duration, cache: &str) -> Machine {
    let mut machine = Machine::new(version, 128, "rate=20 set=32");
    let latency = latency.as_nanos();
    machine.extra = words(&[
        "-drive",
        &format!("if=none,id=d0,driver=null-co,size=1G,latency-ns={latency},{cache}"),
        "-device",
        "virtio-blk-pci,drive=d0",
    ]);
    machine
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Starts a read of the slow disk; returns the time before it, and makes sure that it was still in flight at the end.
fn start_read(qemu: &mut Qemu) -> Instant {
    let begun = Instant::now();
    let line = r#"qemu-io d0 "aio_read 0 4096""#;
    let answer = qemu
        .qmp
        .execute("human-monitor-command", json!({ "command-line": line }))
        .unwrap();
    assert_eq!(answer, "", "QEMU takes the read");
    assert!(begun.elapsed() < LATENCY, "the answer waited for the read");
    begun
}

/// The rule for direct I/O rests on it: an empty `transaction` returns when no read is in flight any more. A QEMU that
/// dropped this would fail here.
#[test]
fn an_empty_transaction_waits_for_disk_reads() {
    for version in [Version::V7_2, Version::V10_0] {
        let scratch = Scratch::new();
        let machine = with_slow_disk(version, "cache.direct=on");
        let mut qemu = Qemu::start(&scratch, "guest", &machine, Role::Source);
        let transaction = |qemu: &mut Qemu| {
            let actions = json!({ "actions": [] });
            qemu.qmp.execute("transaction", actions).unwrap();
        };
        let begun = Instant::now();
        transaction(&mut qemu);
        let still = begun.elapsed();
        let begun = start_read(&mut qemu);
        transaction(&mut qemu);
        let drained = begun.elapsed();
        println!(
            "{version:?}: an empty transaction takes {still:?}, and {drained:?} from the start of a read"
        );
        assert!(still < LATENCY, "{still:?} without any read");
        assert!(
            drained >= LATENCY,
            "{drained:?}: the read was not waited for"
        );
    }
}

/// Moves a guest whose slow disk is read: from before the migration, or from the middle of round 0 on. Returns how long
/// after the start of the read the first page of the next round left.
fn next_page_after_read(version: Version, cache: &str, in_round_0: bool) -> Duration {
    let world = World::plain();
    let machine = with_slow_disk(version, cache);
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let before = (!in_round_0).then(|| start_read(&mut source));
    let options = [SLOWLY[0], SLOWLY[1], "--downtime-limit", "150ms"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    let progress = |round: u32, percent: u64| {
        migration.wait_event("a page on its way", Duration::from_secs(60), |event| {
            event["event"] == "progress"
                && event["round"] == round
                && event["percent"]
                    .as_u64()
                    .is_some_and(|done| done >= percent)
        });
    };
    let begun = before.unwrap_or_else(|| {
        progress(0, 50);
        start_read(&mut source)
    });
    progress(u32::from(in_round_0), 0);
    let next = begun.elapsed();
    let gap = source.serial.longest_gap(begun);
    println!(
        "{version:?}, {cache}, in round 0: {in_round_0}: the next round's first page left {next:?} after the read began; \
         the guest stood still for {gap:?}"
    );
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
    next
}

#[test]
fn a_disk_read_in_flight_is_waited_for_before_round_0() {
    let first = next_page_after_read(Version::V7_2, "cache.direct=on", false);
    assert!(first >= LATENCY, "a page left after {first:?}");
    // Reads through the host's page cache write guest memory through the page table, where they are seen.
    let first = next_page_after_read(Version::V10_0, "cache.direct=off", false);
    assert!(first < LATENCY, "the first page left only after {first:?}");
}

#[test]
fn a_disk_read_that_begins_in_a_round_is_waited_for_before_the_next() {
    for version in [Version::V7_2, Version::V10_0] {
        let next = next_page_after_read(version, "cache.direct=on", true);
        assert!(next >= LATENCY, "{version:?}: a page left after {next:?}");
    }
}

#[test]
fn a_guest_with_a_disk_opened_for_direct_io() {
    let world = World::tls();
    let disk = world.scratch.files().join("disk.img");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let mut machine = Machine::new(Version::V10_0, 128, "rate=50 set=32");
    machine.extra = words(&[
        "-drive",
        &format!(
            "if=none,id=d0,file={},format=raw,cache=none",
            disk.display()
        ),
        "-device",
        "virtio-blk-pci,drive=d0",
    ]);
    world.move_and_check(&machine, &["--verify"]);
    world.daemon(Side::A).assert_logs(&["direct_io=true"]);
}

/// Puts something into pages that the guest does not use.
fn fill_unused(ram: &Path, pages: u64) {
    let file = File::options().write(true).open(ram).unwrap();
    file.write_all_at(&filled(pages), UNUSED).unwrap();
}

fn filled(pages: u64) -> Vec<u8> {
    vec![0xAB; usize::try_from(pages * PAGE).unwrap()]
}

/// Waits until these pages have been sent and have arrived; nobody writes them again.
fn wait_for_unused(migration: &Migration, ram: &Path, pages: u64) {
    migration.wait_event("a third of round 0", Duration::from_secs(60), |event| {
        event["event"] == "progress" && event["percent"].as_u64().is_some_and(|done| done >= 33)
    });
    assert_eq!(
        read_unused(ram, pages),
        filled(pages),
        "low pages go first in round 0"
    );
}

fn read_unused(ram: &Path, pages: u64) -> Vec<u8> {
    let mut bytes = filled(pages);
    bytes.fill(0);
    File::open(ram)
        .unwrap()
        .read_exact_at(&mut bytes, UNUSED)
        .unwrap();
    bytes
}

/// What a balloon does: the pages were sent, and then their memory is given back. No scan tells.
#[test]
fn pages_punched_out_after_they_were_sent_are_zero_at_the_destination() {
    const PAGES: u64 = 64;
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 256, "rate=20 set=32");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    fill_unused(source.ram(), PAGES);
    let options = [SLOWLY[0], SLOWLY[1], "--verify"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    wait_for_unused(&migration, destination.ram(), PAGES);
    let file = File::options().write(true).open(source.ram()).unwrap();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, flags, UNUSED, PAGES * PAGE).unwrap();

    let outcome = migration.finish();
    outcome.completed();
    assert_moved(&mut source, &mut destination);
    let arrived = read_unused(destination.ram(), PAGES);
    assert!(
        arrived.iter().all(|&byte| byte == 0),
        "the holes have arrived"
    );
}

/// A process that maps a guest's RAM writable, as a vhost-user back end does: a QEMU without a machine.
fn map_writable(scratch: &Scratch, ram: &Path, mib: u64) -> Process {
    let folder = scratch.folder("backend");
    let socket = folder.join("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = Command::new(Version::V10_0.binary());
    command.args([
        "-machine",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]);
    command.arg("-object").arg(format!(
        "memory-backend-file,id=shared,size={mib}M,mem-path={},share=on",
        ram.display()
    ));
    command.arg("-chardev").arg(format!(
        "socket,id=test,path={},server=off",
        socket.display()
    ));
    command.args(["-mon", "chardev=test,mode=control"]);
    let process = Process::spawn("the other process", &mut command, &folder.join("log"));
    // It answers when all that its command line asks for is there.
    let mut qmp = Qmp::accept(&listener);
    assert_eq!(
        qmp.execute("query-memdev", json!({})).unwrap()[0]["share"],
        true
    );
    process
}

#[test]
fn a_guest_whose_memory_another_process_writes_is_refused() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 128, "rate=20 set=32");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let begun = Instant::now();
    for ram in [source.ram(), destination.ram()] {
        let mut other = map_writable(&world.scratch, ram, 128);
        let pid = other.pid().to_string();
        let words = [&pid, "qemu-system-x86", "ram0", "vhost-user"];
        if ram == source.ram() {
            world
                .cli(Side::A)
                .migrate("vm", &source, Side::B, &[])
                .finish()
                .failed_with(&words);
        } else {
            let refusal = world
                .cli(Side::B)
                .receive("vm", destination.socket())
                .unwrap_err();
            assert!(words.iter().all(|word| refusal.contains(word)), "{refusal}");
        }
        other.kill();
        std::fs::remove_dir_all(world.scratch.files().join("backend")).unwrap();
    }
    assert_stayed(&mut source, Some(&mut destination), begun);
    world
        .migrate(Side::A, "vm", &source, &destination, &[])
        .completed();
    assert_moved(&mut source, &mut destination);
}

/// What comes in the middle of a migration fails it before the guest is stopped, and the next attempt knows.
#[test]
fn a_disk_with_direct_io_that_is_plugged_in_meanwhile_is_noticed() {
    for version in [Version::V7_2, Version::V10_0] {
        let world = World::plain();
        let machine = Machine::new(version, 128, "rate=20 set=32");
        let mut source = world.guest("source", &machine);
        let mut destination = world.waiting("destination", &machine);
        let begun = Instant::now();
        let migration = world.begin(Side::A, "vm", &source, &destination, &SLOWLY);
        migration.wait_mid_round();
        let node = json!({ "driver": "null-co", "node-name": "d1", "size": 1 << 20, "cache": { "direct": true } });
        source.qmp.execute("blockdev-add", node).unwrap();
        migration
            .finish()
            .failed_with(&["a disk with direct I/O came", "migrate again"]);
        assert_stayed(&mut source, Some(&mut destination), begun);
        world
            .migrate(Side::A, "vm", &source, &destination, &[])
            .completed();
        world.daemon(Side::A).assert_logs(&["direct_io=true"]);
        assert_moved(&mut source, &mut destination);
    }
}

#[test]
fn a_process_that_maps_the_guests_memory_meanwhile_is_noticed() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 128, "rate=20 set=32");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let begun = Instant::now();
    let migration = world.begin(Side::A, "vm", &source, &destination, &SLOWLY);
    migration.wait_mid_round();
    let mut other = map_writable(&world.scratch, source.ram(), 128);
    let pid = other.pid().to_string();
    migration
        .finish()
        .failed_with(&[&pid, "ram0", "vhost-user"]);
    other.kill();
    assert_stayed(&mut source, Some(&mut destination), begun);
    world
        .migrate(Side::A, "vm", &source, &destination, &[])
        .completed();
    assert_moved(&mut source, &mut destination);
}

/// QEMU finishes the disks' requests when it stops the guest, and answers nobody meanwhile: that takes as long as it takes.
#[test]
fn a_disk_that_is_slow_at_the_stop_is_waited_for() {
    // Longer than anything else in the switchover may stand still.
    let latency = Duration::from_secs(4);
    for version in [Version::V7_2, Version::V10_0] {
        let world = World::plain();
        let machine = with_disk(version, latency, "cache.direct=off");
        let mut source = world.guest("source", &machine);
        let mut destination = world.waiting("destination", &machine);
        let begun = start_read(&mut source);
        let outcome = world.migrate(Side::A, "vm", &source, &destination, &[]);
        let last = outcome.completed();
        println!(
            "{version:?}: downtime {} ms with a request of {latency:?}",
            last["downtime_ms"]
        );
        assert!(begun.elapsed() >= latency);
        assert!(last["downtime_ms"].as_f64().unwrap() > 3000.0, "{last}");
        assert_moved(&mut source, &mut destination);
    }
}

/// Something ruins one page at the destination after it has arrived: found before the commit, by its name.
#[test]
fn verify_names_the_page_that_differs_and_the_guest_stays() {
    const PAGES: u64 = 8;
    let world = World::tls();
    // Small: the guest stands still while it is verified.
    let machine = Machine::new(Version::V10_0, 64, "rate=5 set=4");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    fill_unused(source.ram(), PAGES);
    let begun = Instant::now();
    let options = ["--bandwidth-limit", "20MB/s", "--verify"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    wait_for_unused(&migration, destination.ram(), PAGES);
    let ruined = UNUSED + 5 * PAGE;
    let file = File::options().write(true).open(destination.ram()).unwrap();
    file.write_all_at(&[0xEE; 8], ruined + 256).unwrap();
    let page = format!("page {} (at byte {ruined:#x})", ruined / PAGE);
    migration
        .finish()
        .failed_with(&[&page, "\"ram0\"", "differs first"]);
    assert_stayed(&mut source, Some(&mut destination), begun);

    // The destination's QEMU still waits, and a second attempt overwrites what was ruined.
    world
        .migrate(Side::A, "vm", &source, &destination, &["--verify"])
        .completed();
    assert_moved(&mut source, &mut destination);
    assert_eq!(read_unused(destination.ram(), PAGES), filled(PAGES));
}
