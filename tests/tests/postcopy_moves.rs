//! Post-copy between two daemons, with a guest that checks each page that it reads: at once, after rounds, by hand, and
//! rather than fail.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tests::real::{
    Backing, Hugepages, Machine, Moved, PATIENCE, Qemu, Role, Side, Version, World, assert_moved,
    let_it_last, skipped,
};

fn machine() -> Machine {
    Machine::new(Version::V10_0, 128, "rate=50 set=32")
}

/// How it must have ended, in the mode that it was asked for.
fn assert_postcopy(moved: &Moved, mode: &str) {
    let end = moved.outcome.finished();
    println!("{end}");
    assert_eq!(end["mode"], mode, "{end}");
    assert!(end["lacking_bytes"].as_u64().unwrap() > 0, "{end}");
    assert!(end["postcopy_ms"].as_f64().unwrap() > 0.0, "{end}");
    assert_eq!(end["paused_ms"].as_f64(), Some(0.0), "{end}");
}

/// What the guest does not wait for comes so slowly that it waits for some of it, on any machine.
const SLOWLY: [&str; 4] = ["--mode", "postcopy", "--postcopy-bandwidth-limit", "60MB/s"];

#[test]
fn the_guest_goes_first() {
    let world = World::tls();
    let moved = world.move_and_check(&machine(), &SLOWLY);
    assert_postcopy(&moved, "postcopy");
    let id = world.cli(Side::B).id_of("vm");
    let shown = world.cli(Side::B).status(&id);
    let end = &shown["finished"];
    assert_eq!(end["status"], "completed", "{shown}");
    assert_eq!(shown["mode"], "postcopy", "{shown}");
    assert_eq!(end["sent_bytes"], 0, "{shown}");
    assert!(end["faults"].as_u64().unwrap() > 5, "{shown}");
    let [p50, max] = ["p50", "max"].map(|name| end["fault_us"][name].as_u64().unwrap());
    assert!(0 < p50 && p50 <= max, "{shown}");
    assert!(end["prefetch_windows"].as_u64().unwrap() > 0, "{shown}");
    assert!(end["postcopy_ms"].as_f64().unwrap() > 0.0, "{shown}");
    // The source has them from the destination, in its last event and for who asks later.
    let asked = world.cli(Side::A).status(&id);
    for told in [moved.outcome.finished(), &asked["finished"]] {
        for figure in ["faults", "fault_us", "mode", "sent_bytes", "lacking_bytes"] {
            assert_eq!(told[figure], end[figure], "{told} {shown}");
        }
    }
}

/// The RAM file is not listed anew at the stop: what was first touched after it was listed lacks at the destination all the same.
#[test]
fn a_guest_that_goes_on_to_touch_memory_for_the_first_time() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 256, "fill=none rate=40 set=192");
    let moved = world.move_and_check(&machine, &["--mode", "postcopy"]);
    assert_postcopy(&moved, "postcopy");
}

#[test]
fn in_the_clear_with_qemu_7_2_and_two_vcpus() {
    let mut machine = Machine::new(Version::V7_2, 128, "rate=50 set=32 cpus=2");
    machine.vcpus = 2;
    let world = World::plain();
    let moved = world.move_and_check(&machine, &SLOWLY);
    assert_postcopy(&moved, "postcopy");
    // Both run the guest's work, and each has its own figures.
    let end = world.cli(Side::B).last_finished("vm").unwrap();
    let vcpus = end["vcpu_faults"].as_array().unwrap();
    let named: Vec<_> = vcpus.iter().map(|one| one["vcpu"].as_u64()).collect();
    assert_eq!(named, [Some(0), Some(1)], "{end}");
    let others = vcpus.iter().chain([&end["other_faults"]]);
    let all: u64 = others.map(|one| one["faults"].as_u64().unwrap()).sum();
    assert_eq!(Some(all), end["faults"].as_u64(), "{end}");
}

/// It writes too much for 10 ms of downtime, so the rounds do not pay.
#[test]
fn after_rounds() {
    for after in [
        &["--postcopy-after", "1"][..],
        &["--postcopy-after", "300ms"],
        &[],
    ] {
        let machine = Machine::new(Version::V10_0, 128, "rate=400 set=64");
        let mut options = vec!["--mode", "hybrid", "--downtime-limit", "1ms"];
        options.extend_from_slice(after);
        let world = World::tls();
        let moved = world.move_and_check(&machine, &options);
        assert_postcopy(&moved, "hybrid");
        // Each side says so when it is switched over, and in the end, with the same figures.
        let here = moved.outcome.finished();
        let told = moved.outcome.events.iter();
        let mut switched = told.filter(|event| event["event"] == "switched");
        let first = switched.next().unwrap();
        let there = world.cli(Side::B).last_finished("vm").unwrap();
        for figure in ["mode", "sent_bytes", "lacking_bytes"] {
            assert_eq!(first[figure], here[figure], "{first} {here}");
            assert_eq!(there[figure], here[figure], "{there} {here}");
        }
        assert!(here["sent_bytes"].as_u64().unwrap() > 0, "{here}");
    }
}

/// Over a link that is slower than the guest writes, `auto` fails where post-copy is not allowed.
#[test]
fn rather_than_fail() {
    let machine = Machine::new(Version::V10_0, 64, "rate=100 set=32");
    let world = World::tls();
    world.net.limit(400);
    let options = [
        "--max-rounds",
        "3",
        "--downtime-limit",
        "50ms",
        "--allow-postcopy",
    ];
    let moved = world.move_and_check(&machine, &options);
    assert_postcopy(&moved, "hybrid");

    let refused = World::tls();
    refused.net.limit(400);
    let source = refused.guest("source", &machine);
    let destination = refused.waiting("destination", &machine);
    let outcome = refused.migrate(Side::A, "vm", &source, &destination, &options[..4]);
    outcome.failed_with(&["3 rounds were sent"]);
}

#[test]
fn by_hand() {
    let machine = Machine::new(Version::V10_0, 64, "rate=100 set=32");
    let world = World::tls();
    world.net.limit(400);
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let options = [
        "--allow-postcopy",
        "--downtime-limit",
        "20ms",
        "--max-rounds",
        "1000",
    ];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    migration.wait_event("a round", PATIENCE, |event| event["event"] == "round");
    let id = world.cli(Side::A).id_of("vm");
    let told = world.cli(Side::A).run(&["start-postcopy", &id]);
    assert!(told.status.success(), "{told:?}");
    let end = migration.finish();
    assert_eq!(end.completed()["mode"], "hybrid");
    assert_moved(&mut source, &mut destination);
    let late = world.cli(Side::A).run(&["start-postcopy", &id]);
    assert!(!late.status.success(), "{late:?}");
}

/// Next to nothing is fetched but what the guest touches, and that comes; nobody takes the destination for one that is stuck.
#[test]
fn a_limit_of_a_byte_a_second_holds_no_page_fault_back() {
    let machine = Machine::new(Version::V10_0, 64, "rate=5 set=4");
    let world = World::tls();
    let source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    let options = ["--mode", "postcopy", "--postcopy-bandwidth-limit", "1B/s"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    // It touches all that it has filled: half of its memory.
    destination.serial.wait_beats(1);
    destination.serial.verify();
    let id = world.cli(Side::A).id_of("vm");
    // It is told once a second.
    let_it_last(Duration::from_secs(2));
    let touched = world.cli(Side::B).status(&id);
    assert!(
        touched["progress"]["faults"].as_u64().unwrap() > 1000,
        "{touched}"
    );
    // Longer than a destination may read nothing that has no limit to keep to.
    let_it_last(Duration::from_secs(13));
    for side in [Side::A, Side::B] {
        let shown = world.cli(side).status(&id);
        assert_eq!(shown["state"], "migrating", "{shown}");
        assert!(
            shown["progress"]["lacking_bytes"].as_u64().unwrap() > 0,
            "{shown}"
        );
    }
    destination.serial.wait_beats(100);
    drop(migration);
}

#[test]
fn huge_pages_go_after_the_guest_too() {
    let world = World::tls();
    let hugepages = match Hugepages::reserve(128, &world.scratch.files().join("huge")) {
        Ok(hugepages) => hugepages,
        Err(why) => return skipped(&why),
    };
    let backing = Backing::Hugetlbfs(hugepages.mount().to_owned());
    let machine = machine().with_backing(&backing);
    let moved = world.move_and_check(&machine, &["--mode", "postcopy"]);
    assert_postcopy(&moved, "postcopy");
    // The files must go before the pages they hold are given back.
    drop(moved);
    for side in ["source", "destination"] {
        std::fs::remove_file(hugepages.mount().join(format!("{side}-ram0"))).unwrap();
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let world = World::plain();
    let machine = machine();
    let source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    for (options, word) in [
        (&["--mode", "postcopy", "--verify"][..], "--verify"),
        (&["--mode", "hybrid", "--channels", "1"], "--channels 2"),
        (&["--postcopy-after", "2"], "--mode hybrid"),
    ] {
        let outcome = world.migrate(Side::A, "vm", &source, &destination, options);
        assert!(!outcome.status.success(), "{outcome:?}");
        assert!(
            outcome.errors.contains(word),
            "{options:?}: {}",
            outcome.errors
        );
    }
}

/// There and back, again and again.
#[test]
fn heavy_there_and_back_in_hybrid_mode() {
    let hops = if std::env::var_os("PAGECOPY_ALL").is_some() {
        30
    } else {
        4
    };
    let machine = Machine::new(Version::V10_0, 64, "rate=200 set=32");
    let world = World::tls();
    let mut here = world.guest("start", &machine);
    let mut side = Side::A;
    for hop in 0..hops {
        let mut there = Qemu::start(
            &world.scratch,
            &format!("hop-{hop}"),
            &machine,
            Role::Destination,
        );
        let options = [
            "--mode",
            "hybrid",
            "--postcopy-after",
            "1",
            "--downtime-limit",
            "1ms",
        ];
        let outcome = world.migrate(side, "vm", &here, &there, &options);
        assert_eq!(outcome.completed()["mode"], "hybrid");
        assert_moved(&mut here, &mut there);
        (here, side) = (there, side.other());
    }
}
