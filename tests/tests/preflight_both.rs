//! `pagecopy preflight` between two real hosts: what is as it should be passes, and each thing that is not has its line, with whose
//! matter it is and what to do. Nothing of it touches the guest.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tests::real::{
    Backing, Machine, Qemu, Side, SmallFs, Version, World, assert_moved, assert_nothing_left_in,
    assert_stayed,
};

fn machine() -> Machine {
    Machine::new(Version::V10_0, 128, "rate=5 set=8")
}

fn with(extra: &[&str]) -> Machine {
    let mut machine = machine();
    machine.extra = extra.iter().map(|&word| word.to_owned()).collect();
    machine
}

/// What preflight says, with its exit status.
struct Said {
    report: Value,
    status: Option<i32>,
}

impl Said {
    /// Of the guest `vm` in the QEMU behind `qmp`, if it were to go `to`.
    fn of(world: &World, vm: &str, qmp: &Path, to: &str) -> Said {
        let qmp = qmp.to_str().unwrap();
        let words = ["preflight", "--vm", vm, "--qmp", qmp, "--to", to, "--json"];
        let output = world.cli(Side::A).run(&words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.is_empty(), "{errors}");
        let report = serde_json::from_slice(&output.stdout).unwrap();
        println!("{report:#}");
        Said {
            report,
            status: output.status.code(),
        }
    }

    /// Of both QEMUs, after B was told that the second waits.
    fn between(world: &World, source: &Qemu, destination: &Qemu) -> Said {
        let received = world.cli(Side::B).receive("vm", destination.socket());
        received.unwrap();
        Said::of(world, "vm", source.socket(), &to_b())
    }

    fn lines(&self, check: &str) -> Vec<&Value> {
        let lines = self.report["lines"].as_array().unwrap();
        lines.iter().filter(|line| line["check"] == check).collect()
    }

    /// The only line that does not pass is of `check`, on `side`, has all of `words`, and says what to do.
    fn only(&self, verdict: &str, check: &str, side: &str, words: &[&str]) {
        let lines = self.report["lines"].as_array().unwrap();
        let odd: Vec<&Value> = lines
            .iter()
            .filter(|line| line["verdict"] != "pass")
            .collect();
        assert!(odd.iter().all(|line| line["check"] == check), "{odd:#?}");
        let line = odd.first().unwrap_or_else(|| panic!("{check} passes"));
        assert_eq!(line["verdict"], verdict, "{line}");
        assert_eq!(line["side"], side, "{line}");
        for word in words {
            assert!(line.to_string().contains(word), "{word:?}: {line}");
        }
        assert!(!line["remedy"].as_str().unwrap().is_empty(), "{line}");
        assert_eq!(self.report["verdict"], verdict);
        let expected = if verdict == "fail" { 1 } else { 5 };
        assert_eq!(self.status, Some(expected));
    }
}

fn to_b() -> String {
    format!("{}:7700", Side::B.address())
}

/// Two QEMUs of which something does not fit: one line says so, and the guest runs on.
fn odd_pair(source: &Machine, destination: &Machine, verdict: &str, check: &str, words: &[&str]) {
    let world = World::plain();
    let mut source = world.guest("source", source);
    let mut destination = world.waiting("destination", destination);
    let begun = Instant::now();
    Said::between(&world, &source, &destination).only(verdict, check, "both", words);
    assert_stayed(&mut source, Some(&mut destination), begun);
}

fn a_good_pair_passes(source: Version, destination: Version, world: &World) {
    let mut versions =
        [source, destination].map(|version| Machine::new(version, 128, "rate=5 set=8"));
    if source != destination {
        versions
            .iter_mut()
            .for_each(|machine| machine.machine = "pc-q35-7.2".to_owned());
    }
    let [from, to] = versions;
    let (mut source, mut destination) = (
        world.guest("source", &from),
        world.waiting("destination", &to),
    );
    let begun = Instant::now();
    let said = Said::between(world, &source, &destination);
    let odd: Vec<&Value> = said.report["lines"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["verdict"] != "pass")
        .collect();
    assert!(odd.is_empty(), "{odd:#?}");
    assert_eq!(
        (said.status, &said.report["verdict"]),
        (Some(0), &"pass".into())
    );
    for check in [
        "guest",
        "capabilities",
        "blockers",
        "ram",
        "writers",
        "userfaultfd",
        "direct-io",
        "kernel",
        "privileges",
        "memlock",
        "receiver",
        "incoming",
        "post-copy",
        "memory",
        "qemu",
        "machine",
        "cpu",
        "ram-match",
        "disks",
        "network",
        "prediction",
    ] {
        assert!(!said.lines(check).is_empty(), "nothing is said of {check}");
    }
    assert_eq!(said.lines("kernel").len(), 2, "of both hosts");
    let predicted = &said.report["predicted"];
    for figure in ["total_ms", "downtime_ms", "bytes"] {
        let [low, likely, high] =
            ["low", "likely", "high"].map(|key| predicted[figure][key].as_f64().unwrap());
        assert!(
            0.0 < low && low <= likely && likely <= high,
            "{figure}: {predicted}"
        );
    }
    assert!(said.report["round_trip_us"].as_f64().unwrap() < 50_000.0);
    assert!(said.report["goodput_bytes_per_s"].as_f64().unwrap() > 20e6);
    // Nothing is left behind: not the sampling, and no hold on either monitor.
    assert_stayed(&mut source, Some(&mut destination), begun);
    world.moves_next(Side::A, "vm", &mut source, &mut destination);
}

#[test]
fn all_is_well_over_tls() {
    a_good_pair_passes(Version::V10_0, Version::V10_0, &World::tls());
}

#[test]
fn all_is_well_from_qemu_7_2_to_10_0() {
    a_good_pair_passes(Version::V7_2, Version::V10_0, &World::plain());
}

#[test]
fn another_machine_type() {
    let mut other = machine();
    other.machine = "pc-q35-9.0".to_owned();
    odd_pair(
        &machine(),
        &other,
        "fail",
        "machine",
        &["pc-q35-10.0", "pc-q35-9.0"],
    );
}

#[test]
fn a_cpu_that_lacks_what_the_guest_uses() {
    let source = with(&["-cpu", "qemu64,+ssse3,+sse4.2"]);
    odd_pair(&source, &machine(), "fail", "cpu", &["lacks ssse3, sse4.2"]);
}

#[test]
fn a_cpu_that_has_more() {
    let destination = with(&["-cpu", "qemu64,+ssse3"]);
    odd_pair(&machine(), &destination, "warn", "cpu", &["ssse3 come"]);
}

#[test]
fn another_number_of_cpus() {
    let mut other = machine();
    other.vcpus = 2;
    odd_pair(&machine(), &other, "fail", "vcpus", &["1 at the source, 2"]);
}

#[test]
fn another_size_of_memory() {
    let mut other = machine();
    other.ram[0].mib = 192;
    odd_pair(
        &machine(),
        &other,
        "fail",
        "ram-match",
        &["ram0", "128 MiB", "192 MiB"],
    );
}

fn disk(path: &Path) -> Machine {
    let drive = format!(
        "if=none,id=d0,file={},format=raw,cache=writeback",
        path.display()
    );
    with(&["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"])
}

#[test]
fn disks_that_are_the_same_another_and_none() {
    let world = World::plain();
    let [one, two] = ["one", "two"].map(|name| {
        let path = world.scratch.files().join(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    });
    let source = world.guest("source", &disk(&one));
    let same = world.waiting("same", &disk(&one));
    let said = Said::between(&world, &source, &same);
    assert_eq!(said.report["verdict"], "pass");
    let line = said.lines("disk")[0].to_string();
    assert!(line.contains("the same on both sides"), "{line}");
    drop(same);
    let another = world.waiting("another", &disk(&two));
    let said = Said::between(&world, &source, &another);
    said.only(
        "fail",
        "disk",
        "both",
        &["d0", "two files", "storage that both hosts reach"],
    );
    drop(another);
    let none = world.waiting("none", &machine());
    let said = Said::between(&world, &source, &none);
    said.only("fail", "disk", "destination", &["d0", "no such disk"]);
}

#[test]
fn memory_that_is_not_there() {
    let world = World::plain();
    let small = SmallFs::tmpfs(&world.scratch.files().join("small"), 64);
    let backing = Backing::TmpfsAt(small.path().to_owned());
    let source = world.guest("source", &machine());
    let destination = world.waiting("destination", &machine().with_backing(&backing));
    let said = Said::between(&world, &source, &destination);
    said.only(
        "fail",
        "memory",
        "destination",
        &["128.0 MiB more", "64.0 MiB", "remount"],
    );
    drop(destination);
}

/// A guest that cannot leave: what else there is to see is looked at all the same.
fn cannot_leave(source: &Machine, check: &str, words: &[&str]) {
    let world = World::plain();
    let source = world.guest("source", source);
    let destination = world.waiting("destination", &machine());
    let said = Said::between(&world, &source, &destination);
    said.only("fail", check, "source", words);
    assert!(!said.lines("network").is_empty());
    assert!(said.report["predicted"].is_null(), "it was not sampled");
    assert_nothing_left_in(source.pid());
}

#[test]
fn memory_that_is_not_shared() {
    let private = machine().with_backing(&Backing::FilePrivate);
    cannot_leave(&private, "ram", &["ram0", "share=on"]);
}

#[test]
fn a_device_that_blocks_it() {
    let world = World::plain();
    let folder = world.scratch.folder("fat");
    let drive = format!("if=none,id=fat,format=raw,file=fat:rw:{}", folder.display());
    let blocked = with(&["-drive", &drive, "-device", "virtio-blk-pci,drive=fat"]);
    let source = world.guest("source", &blocked);
    let said = Said::of(&world, "vm", source.socket(), &to_b());
    let line = said.lines("blockers")[0];
    assert_eq!(
        (&line["verdict"], &line["side"]),
        (&"fail".into(), &"source".into())
    );
    assert!(
        line["found"]
            .as_str()
            .unwrap()
            .contains("does not support live migration"),
        "{line}"
    );
    assert_eq!(said.status, Some(1));
}

#[test]
fn nobody_waits_there_or_listens_there() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let said = Said::of(&world, "vm", source.socket(), &to_b());
    said.only(
        "fail",
        "receiver",
        "destination",
        &["no QEMU waits", "pagecopy receive --vm vm"],
    );
    let nowhere = format!("{}:9", Side::B.address());
    let said = Said::of(&world, "vm", source.socket(), &nowhere);
    said.only(
        "fail",
        "network",
        "network",
        &[&nowhere, "check the network"],
    );
    assert_stayed(&mut source, None, begun);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_carries() {
    let world = World::plain();
    let machine = Machine::new(Version::V10_0, 512, "rate=100000 set=400 pattern=seq");
    let (source, destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    world.net.limit(200);
    let said = Said::between(&world, &source, &destination);
    said.only(
        "warn",
        "prediction",
        "both",
        &["too fast for pre-copy", "--allow-postcopy"],
    );
    assert_eq!(said.report["predicted"]["converges"], false);
}

/// By a preflight, or when round 0 is over; it stands beside what became of it in the result, and in the status.
#[test]
fn what_was_predicted_stands_beside_what_became_of_it() {
    foreseen("first-round", |_, _, _| {});
    foreseen("preflight", |world, source, destination| {
        Said::between(world, source, destination);
    });
}

fn foreseen(when: &str, before: fn(&World, &Qemu, &Qemu)) {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    before(&world, &source, &destination);
    let moved = world.migrate(Side::A, "vm", &source, &destination, &[]);
    let end = moved.completed().clone();
    let predicted = &end["predicted"];
    println!("{predicted}");
    assert_eq!(predicted["when"], when);
    for (figure, actual) in [
        ("total_ms", end["total_ms"].as_f64().unwrap()),
        ("downtime_ms", end["downtime_ms"].as_f64().unwrap()),
        ("bytes", end["pages_sent"].as_f64().unwrap() * 4096.0),
    ] {
        let [low, likely, high, told] =
            ["low", "likely", "high", "actual"].map(|key| predicted[figure][key].as_f64().unwrap());
        assert!(0.0 < low && low <= likely && likely <= high, "{predicted}");
        assert_eq!(told, actual, "{figure}");
    }
    // Most of it is what the memory holds.
    let [likely, actual] =
        ["likely", "actual"].map(|key| predicted["bytes"][key].as_f64().unwrap());
    assert!((0.7..1.4).contains(&(actual / likely)), "{predicted}");
    let id = end["id"].as_str().unwrap();
    assert_eq!(
        world.cli(Side::A).status(id)["finished"]["predicted"],
        *predicted
    );
    assert_moved(&mut source, &mut destination);
}

/// What would harm the guest ends the migration before anything is begun, also with `--force`; what is warned of is told, and it goes
/// on.
#[test]
fn a_migration_does_not_begin_where_both_sides_differ() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut other = machine();
    other.machine = "pc-q35-9.0".to_owned();
    let mut destination = world.waiting("other", &other);
    let begun = Instant::now();
    let refused = world.migrate(Side::A, "vm", &source, &destination, &["--force"]);
    refused.failed_with(&["machine", "pc-q35-9.0", "what to do"]);
    assert_stayed(&mut source, Some(&mut destination), begun);
    drop(destination);
    let mut more = world.waiting("more", &with(&["-cpu", "qemu64,+ssse3"]));
    let moved = world.migrate(Side::A, "vm", &source, &more, &[]);
    moved.completed();
    let notices = moved.events.iter().filter(|it| it["event"] == "notice");
    let notices: Vec<_> = notices.map(|it| it["text"].to_string()).collect();
    assert!(
        notices
            .iter()
            .any(|it| it.contains("ssse3 come") && it.contains("what to do")),
        "{notices:?}"
    );
    assert_moved(&mut source, &mut more);
}

/// Of several destinations the guest goes to one that can take it, and is told why not to the other; where none can, it stays.
#[test]
fn of_several_destinations_the_best_is_taken() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let (received, nobody) = (
        world.cli(Side::B).receive("vm", destination.socket()),
        |port: u16| format!("{}:{port}", Side::B.address()),
    );
    received.unwrap();
    let migrate = |to: &str| {
        let migration = world
            .cli(Side::A)
            .migrate_socket("vm", source.socket(), to, &[]);
        migration.finish()
    };
    let stays = migrate(&format!("{},{}", nobody(9), nobody(10)));
    let why = stays.not_completed("failed");
    assert!(why.contains("none of the 2"), "{why}");
    let chosen = &stays.events[0];
    assert!(
        chosen["event"] == "chosen" && chosen["to"].is_null(),
        "{chosen}"
    );
    assert!(stays.events.iter().all(|event| event["event"] != "begun"));
    let moves = migrate(&format!("{},{}", nobody(9), to_b()));
    moves.completed();
    let chosen = &moves.events[0];
    assert_eq!(chosen["event"], "chosen");
    assert_eq!(chosen["to"], to_b());
    let ranked = &chosen["ranked"];
    assert_eq!(ranked[0]["to"], to_b());
    assert!(
        ranked[0]["predicted_ms"].as_f64().unwrap() > 0.0,
        "{ranked}"
    );
    assert_eq!(ranked[1]["verdict"], "fail");
    let why = ranked[1]["why"].as_str().unwrap();
    assert!(why.starts_with("network"), "{why}");
    assert_moved(&mut source, &mut destination);
}

/// The first that arrives has reserved more than half of what is free: the second hears so, and comes with `--force`, since it fits but
/// for the margin.
#[test]
fn two_guests_do_not_count_on_the_same_memory() {
    let world = World::plain();
    world.keep_free(Side::B, 60);
    let first = world.guest("first", &machine());
    let mut second = world.guest("second", &machine());
    let to_first = world.waiting("to-first", &machine());
    let mut to_second = world.waiting("to-second", &machine());
    let slow = ["--bandwidth-limit", "10MB/s"];
    let one = world.begin(Side::A, "one", &first, &to_first, &slow);
    one.wait_mid_round();
    let refused = world.migrate(Side::A, "two", &second, &to_second, &[]);
    refused.failed_with(&["guests that arrive", "free memory", "--force"]);
    let said = Said::of(&world, "two", second.socket(), &to_b());
    said.only("warn", "memory", "destination", &["guests that arrive"]);
    let forced = world.migrate(Side::A, "two", &second, &to_second, &["--force"]);
    forced.completed();
    assert_moved(&mut second, &mut to_second);
    let id = world.cli(Side::A).id_of("one");
    assert!(world.cli(Side::A).run(&["cancel", &id]).status.success());
    one.finish().not_completed("cancelled");
}

#[test]
fn people_read_it_as_a_table_and_a_wrong_request_is_refused() {
    let world = World::plain();
    let source = world.guest("source", &machine());
    let qmp = source.socket().to_str().unwrap();
    let run = |words: &[&str]| {
        let output = world.cli(Side::A).run(words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let to = to_b();
    let (status, table, _) = run(&["preflight", "--vm", "vm", "--qmp", qmp, "--to", &to]);
    println!("{table}");
    assert_eq!(status, Some(1));
    for part in [
        "vm to ",
        "pass  source       guest",
        "FAIL  destination  receiver",
        "what to do: start one",
        "would fail",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    for (vm, qmp, to, word) in [
        ("", qmp, to.as_str(), "name"),
        ("vm", qmp, "b", "HOST:PORT"),
    ] {
        let (status, _, errors) = run(&["preflight", "--vm", vm, "--qmp", qmp, "--to", to]);
        assert_eq!(status, Some(1));
        assert!(
            errors.contains(word) && errors.contains("what to do"),
            "{errors}"
        );
    }
    // What cannot be looked at is a line, too.
    let said = Said::of(&world, "vm", Path::new("/nonexistent/q"), &to);
    let line = said.lines("qmp")[0];
    assert_eq!(line["verdict"], "fail");
    assert!(
        line["found"].as_str().unwrap().contains("/nonexistent/q"),
        "{line}"
    );
}
