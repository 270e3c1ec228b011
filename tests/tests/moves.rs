//! Guests that move: every kind of memory, load and QEMU that is promised to work, on real QEMU and real daemons.
//!
//! After each move the guest runs at the destination only, has checked every page, counts on where it stopped, and
//! nothing is left in either QEMU (`assert_moved`).

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use tests::real::{
    Backing, Hugepages, Machine, Qemu, Ram, Role, Side, Version, Watch, World, assert_moved,
    outside_downtime, skipped,
};

/// What a guest feels under no load must stay in this order of magnitude even on a busy machine.
const GENEROUS_DOWNTIME: Duration = Duration::from_millis(1000);

fn assert_figures(finished: &serde_json::Value, transport: &str) {
    assert_eq!(finished["mode"], "precopy");
    assert_eq!(finished["transport"], transport);
    assert_eq!(finished["transport_at_end"], transport);
    for figure in [
        "total_ms",
        "downtime_ms",
        "predicted_downtime_ms",
        "goodput_mbit_s",
    ] {
        assert!(
            finished[figure].as_f64().is_some_and(|value| value > 0.0),
            "{figure} in {finished}"
        );
    }
    for figure in ["rounds", "bytes_on_wire", "attach_stop_us"] {
        assert!(
            finished[figure].as_u64().is_some_and(|value| value > 0),
            "{figure} in {finished}"
        );
    }
    for figure in ["pages_sent", "pages_zero"] {
        assert!(
            finished[figure].as_u64().is_some(),
            "{figure} in {finished}"
        );
    }
    assert!(finished["error"].is_null(), "{finished}");
}

#[test]
fn idle_guest_over_tls() {
    let world = World::tls();
    let moved = world.move_and_check(&Machine::new(Version::V10_0, 256, "rate=0"), &[]);
    assert_figures(moved.outcome.finished(), "tls");
    let downtime = outside_downtime(&moved.source.serial, &moved.destination.serial);
    assert!(downtime < GENEROUS_DOWNTIME, "{downtime:?}");
}

#[test]
fn idle_guest_in_the_clear() {
    let world = World::plain();
    let moved = world.move_and_check(&Machine::new(Version::V7_2, 256, "rate=0"), &[]);
    assert_figures(moved.outcome.finished(), "tcp");
    world.daemon(Side::A).assert_logs(&["INSECURE"]);
}

#[test]
fn guest_dirtying_50_mb_s() {
    let world = World::tls();
    world.move_and_check(&Machine::new(Version::V7_2, 512, "rate=50 set=128"), &[]);
}

#[test]
fn heavy_guest_dirtying_400_mb_s() {
    let world = World::plain();
    world.move_and_check(&Machine::new(Version::V10_0, 512, "rate=400 set=96"), &[]);
}

/// The RAM file is not listed anew at the stop: what was never touched before, and is until the very end, must go all the same.
#[test]
fn guest_that_goes_on_to_touch_memory_for_the_first_time() {
    let world = World::tls();
    world.move_and_check(
        &Machine::new(Version::V10_0, 512, "fill=none rate=40 set=384"),
        &[],
    );
}

#[test]
fn guest_with_a_hot_spot() {
    let world = World::tls();
    world.move_and_check(
        &Machine::new(Version::V10_0, 512, "rate=100 set=256 pattern=hot"),
        &["--channels", "3"],
    );
}

#[test]
fn guest_that_writes_in_sequence() {
    let world = World::plain();
    world.move_and_check(
        &Machine::new(Version::V7_2, 512, "rate=100 set=64 pattern=seq"),
        &["--channels", "1"],
    );
}

#[test]
fn pages_of_zeroes_are_not_sent() {
    let world = World::plain();
    let moved = world.move_and_check(&Machine::new(Version::V10_0, 512, "rate=0 fill=zero"), &[]);
    let finished = moved.outcome.completed();
    assert!(
        finished["pages_zero"].as_u64().unwrap() > 120_000,
        "{finished}"
    );
    assert!(
        finished["bytes_on_wire"].as_u64().unwrap() < 32 << 20,
        "{finished}"
    );
}

/// Of its own: 64 MiB and 1/4096 of the guest's RAM, whichever way it moves.
#[test]
fn heavy_guest_for_which_a_daemon_holds_little_memory() {
    let machine = Machine::new(Version::V10_0, 1024, "rate=100 set=256");
    for mode in ["precopy", "postcopy"] {
        let world = World::tls();
        let watches = [Side::A, Side::B].map(|side| Watch::over(world.daemon(side).pid()));
        world.move_and_check(&machine, &["--mode", mode]);
        let held = watches.map(Watch::most);
        println!("{mode}: {} at the source; {}", held[0], held[1]);
        for held in held {
            assert!(held.memory_kib <= (64 << 10) + (1 << 20) / 4096, "{held}");
        }
    }
}

#[test]
fn heavy_mostly_empty_guest_of_8_gib() {
    let world = World::tls();
    let mut machine = Machine::new(Version::V10_0, 8192, "");
    machine.guest = "mem=16..1900 fill=none rate=20 set=64".to_owned();
    let moved = world.move_and_check(&machine, &[]);
    let finished = moved.outcome.completed();
    assert!(
        finished["bytes_on_wire"].as_u64().unwrap() < 400 << 20,
        "{finished}"
    );
    let allocated = std::fs::metadata(moved.destination.ram()).unwrap().blocks() * 512;
    assert!(
        allocated < 400 << 20,
        "the destination holds {allocated} bytes for a guest that is mostly empty"
    );
}

#[test]
fn guest_with_two_vcpus() {
    let world = World::tls();
    let mut machine = Machine::new(Version::V10_0, 512, "rate=100 set=128 cpus=2");
    machine.vcpus = 2;
    world.move_and_check(&machine, &[]);
}

#[test]
fn guest_on_an_i440fx_board() {
    let world = World::tls();
    let mut machine = Machine::new(Version::V7_2, 256, "rate=50 set=64");
    machine.machine = "pc".to_owned();
    world.move_and_check(&machine, &[]);
}

#[test]
fn guest_with_two_numa_nodes() {
    let world = World::tls();
    let mut machine = Machine::new(Version::V10_0, 512, "rate=50 set=300");
    let node = |id: &str, mib| Ram {
        id: id.to_owned(),
        mib,
        backing: Backing::Tmpfs,
    };
    machine.ram = vec![node("near", 192), node("far", 320)];
    world.move_and_check(&machine, &["--verify"]);
}

/// It is neither punched out and allocated anew, nor is what lies there taken for the guest's.
#[test]
fn memory_that_was_allocated_before_stays_so() {
    const SIZE: u64 = 128 << 20;
    const LEFT: u64 = 120 << 20; // the guest has nothing there
    let ways: [(Version, &[&str]); 2] = [
        (Version::V7_2, &["--verify"]),
        (Version::V10_0, &["--mode", "postcopy"]),
    ];
    for (version, options) in ways {
        let world = World::plain();
        let mut machine = Machine::new(version, SIZE >> 20, "rate=50 set=32");
        let mut here = world.guest("source", &machine);
        machine.prealloc = true;
        let mut there = world.waiting("destination", &machine);
        let mut readable = std::fs::File::options();
        let file = readable.read(true).write(true).open(there.ram()).unwrap();
        file.write_all_at(&[0xaa; 8192], LEFT).unwrap();
        world
            .migrate(Side::A, "vm", &here, &there, options)
            .completed();
        assert_moved(&mut here, &mut there);
        assert_eq!(file.metadata().unwrap().blocks() * 512, SIZE);
        let mut left = [1; 8192];
        file.read_exact_at(&mut left, LEFT).unwrap();
        assert_eq!(left, [0; 8192], "{options:?}");
    }
}

#[test]
fn guest_on_huge_pages() {
    let world = World::tls();
    let hugepages = match Hugepages::reserve(256, &world.scratch.files().join("huge")) {
        Ok(hugepages) => hugepages,
        Err(reason) => return skipped(&reason),
    };
    let backing = Backing::Hugetlbfs(hugepages.mount().to_owned());
    let machine = Machine::new(Version::V7_2, 256, "rate=20 set=32").with_backing(&backing);
    let moved = world.move_and_check(&machine, &["--verify"]);
    // The files must go before the pages they hold are given back.
    drop(moved);
    for side in ["source", "destination"] {
        std::fs::remove_file(hugepages.mount().join(format!("{side}-ram0"))).unwrap();
    }
}

#[test]
fn qemu_in_a_sandbox() {
    let world = World::tls();
    for version in [Version::V7_2, Version::V10_0] {
        let mut machine = Machine::new(version, 256, "rate=50 set=64");
        machine.sandbox = true;
        let moved = world.move_and_check(&machine, &[]);
        drop(moved);
        remove_sockets(&world);
    }
}

/// The same names are used again: their folders, with the sockets in them, go first.
fn remove_sockets(world: &World) {
    for side in ["source", "destination"] {
        std::fs::remove_dir_all(world.scratch.files().join(format!("qemu-{side}"))).unwrap();
    }
}

#[test]
fn both_rams_compared_while_the_guest_is_stopped() {
    let world = World::tls();
    let moved = world.move_and_check(
        &Machine::new(Version::V10_0, 256, "rate=100 set=64"),
        &["--verify"],
    );
    let finished = moved.outcome.completed();
    assert!(
        finished["verify_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "what it cost is told: {finished}"
    );
}

#[test]
fn source_quits_when_asked_to() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 256, "rate=20 set=64");
    let mut source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    world
        .migrate(Side::A, "vm", &source, &destination, &["--quit-source"])
        .completed();
    source.wait_end();
    destination.serial.wait_beats(100);
    destination.serial.verify();
}

#[test]
fn progress_and_rounds_are_reported() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 256, "rate=20 set=64");
    let moved = world.move_and_check(&machine, &["--bandwidth-limit", "200MB/s"]);
    let finished = moved.outcome.completed();
    let events = |name: &str| {
        moved
            .outcome
            .events
            .iter()
            .filter(|event| event["event"] == name)
            .count() as u64
    };
    assert!(events("progress") > 2, "{:?}", moved.outcome.events);
    assert!(events("round") >= 1 && events("round") <= finished["rounds"].as_u64().unwrap());
    // 224 MiB of random words at 200 MB/s take at least 1.17 s; some slack for the first burst.
    assert!(
        finished["total_ms"].as_f64().unwrap() > 1000.0,
        "the limit holds: {finished}"
    );
}

/// A guest with its QEMU sockets under a name of its own, moved from `from` to the other side.
fn hop(
    world: &World,
    from: Side,
    vm: &str,
    machine: &Machine,
    source: &mut Qemu,
    name: &str,
) -> (Qemu, u64) {
    let mut destination = Qemu::start(&world.scratch, name, machine, Role::Destination);
    let outcome = world.migrate(from, vm, source, &destination, &[]);
    let attach = outcome.completed()["attach_stop_us"].as_u64().unwrap();
    assert_moved(source, &mut destination);
    (destination, attach)
}

#[test]
fn heavy_there_and_back_ten_times() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 128, "rate=50 set=32");
    let mut here = world.guest("start", &machine);
    let mut stops = Vec::new();
    for n in 0..10 {
        for (from, to) in [(Side::A, "there"), (Side::B, "back")] {
            let (next, attach) = hop(
                &world,
                from,
                "vm",
                &machine,
                &mut here,
                &format!("{to}-{n}"),
            );
            let old = std::mem::replace(&mut here, next);
            std::fs::remove_file(old.ram()).unwrap();
            stops.push(attach);
        }
    }
    stops.sort_unstable();
    let median = stops[stops.len() / 2];
    println!(
        "QEMU's thread stood still for {median} us (median of {})",
        stops.len()
    );
    assert!(median < 1000, "{stops:?}");
}

#[test]
fn heavy_four_guests_at_once() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 128, "rate=20 set=32");
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (world, machine) = (&world, &machine);
            scope.spawn(move || {
                let mut source = world.guest(&format!("source-{n}"), machine);
                hop(
                    world,
                    Side::A,
                    &format!("vm-{n}"),
                    machine,
                    &mut source,
                    &format!("destination-{n}"),
                );
            });
        }
    });
}
