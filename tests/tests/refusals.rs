//! What is refused before a migration begins, each with a reason of its own, on both sides where there are two.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use tests::real::{
    Backing, Cli, Hugepages, Machine, Qemu, Role, Side, Version, World, assert_stayed, skipped,
};

fn machine() -> Machine {
    Machine::new(Version::V10_0, 128, "rate=0")
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "does not say {word:?}: {text}");
    }
}

/// Neither a source nor a destination with this RAM is taken, and both say why and which setting would help.
fn refused_ram(backing: &Backing, words: &[&str]) {
    let world = World::plain();
    let machine = machine().with_backing(backing);
    let mut source = world.guest("source", &machine);
    let begun = Instant::now();
    world
        .cli(Side::A)
        .migrate("vm", &source, Side::B, &[])
        .finish()
        .failed_with(words);
    assert_stayed(&mut source, None, begun);
    let destination = world.waiting("destination", &machine);
    let refusal = world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap_err();
    assert_says(&refusal, words);
}

#[test]
fn ram_in_a_file_but_not_shared() {
    refused_ram(&Backing::FilePrivate, &["ram0", "share=on"]);
}

#[test]
fn ram_in_a_memfd() {
    refused_ram(&Backing::Memfd, &["ram0", "memfd", "memory-backend-file"]);
}

#[test]
fn ram_without_a_file() {
    refused_ram(
        &Backing::Anonymous,
        &["ram0", "memory-backend-file", "share=on"],
    );
}

/// A guest and a destination that do not fit: the migration fails with `words` at the source, the destination's daemon
/// has them in its log, and the guest runs on.
fn refused_pair(source: &Machine, destination: &Machine, words: &[&str]) {
    let world = World::plain();
    refused_pair_in(&world, source, destination, words);
}

fn refused_pair_in(world: &World, source: &Machine, destination: &Machine, words: &[&str]) {
    let mut source = world.guest("source", source);
    let mut destination = world.waiting("destination", destination);
    let begun = Instant::now();
    world
        .migrate(Side::A, "vm", &source, &destination, &[])
        .failed_with(words);
    world.daemon(Side::B).assert_logs(words);
    assert_stayed(&mut source, Some(&mut destination), begun);
}

#[test]
fn sizes_that_differ() {
    let mut larger = machine();
    larger.ram[0].mib = 256;
    refused_pair(&machine(), &larger, &["ram0", "size"]);
}

#[test]
fn ids_that_differ() {
    let mut other = machine();
    other.ram[0].id = "memory".to_owned();
    refused_pair(&machine(), &other, &["ram0", "memory"]);
}

#[test]
fn page_sizes_that_differ() {
    let world = World::plain();
    let hugepages = match Hugepages::reserve(64, &world.scratch.files().join("huge")) {
        Ok(hugepages) => hugepages,
        Err(reason) => return skipped(&reason),
    };
    let huge = machine().with_backing(&Backing::Hugetlbfs(hugepages.mount().to_owned()));
    refused_pair_in(&world, &machine(), &huge, &["ram0", "page"]);
    std::fs::remove_file(hugepages.mount().join("destination-ram0")).unwrap();
}

/// In post-copy, too, where a touch of one would wait for a whole gibibyte.
#[test]
fn huge_pages_of_1_gib() {
    let world = World::plain();
    let hugepages = match Hugepages::reserve_gigantic(2, &world.scratch.files().join("gigantic")) {
        Ok(hugepages) => hugepages,
        Err(reason) => return skipped(&reason),
    };
    let backing = Backing::Hugetlbfs(hugepages.mount().to_owned());
    let machine = Machine::new(Version::V10_0, 1024, "rate=0").with_backing(&backing);
    let words = ["pages of 1 GiB", "2 MiB", "pagesize=2M"];
    let source = world.guest("source", &machine);
    for mode in ["precopy", "hybrid", "postcopy"] {
        let refused = world
            .cli(Side::A)
            .migrate("vm", &source, Side::B, &["--mode", mode])
            .finish();
        refused.failed_with(&words);
        assert_eq!(refused.finished()["fault"], "operator", "{mode}");
    }
    let destination = world.waiting("destination", &machine);
    let refusal = world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap_err();
    assert_says(&refusal, &words);
    drop((source, destination));
    for side in ["source", "destination"] {
        std::fs::remove_file(hugepages.mount().join(format!("{side}-ram0"))).unwrap();
    }
}

#[test]
fn destination_that_would_run_by_itself() {
    let world = World::plain();
    let destination = Qemu::start(
        &world.scratch,
        "destination",
        &machine(),
        Role::EagerDestination,
    );
    let refusal = world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap_err();
    assert_says(&refusal, &["-S"]);
}

#[test]
fn destination_that_runs_a_guest_already() {
    let world = World::plain();
    let running = world.guest("running", &machine());
    let refusal = world
        .cli(Side::B)
        .receive("vm", running.socket())
        .unwrap_err();
    assert_says(&refusal, &["-incoming defer"]);
}

#[test]
fn source_that_waits_for_a_guest_itself() {
    let world = World::plain();
    let waiting = world.waiting("waiting", &machine());
    world
        .cli(Side::A)
        .migrate("vm", &waiting, Side::B, &[])
        .finish()
        .failed_with(&["inmigrate"]);
}

#[test]
fn qmp_socket_taken() {
    let world = World::plain();
    let source = world.guest("source", &machine());
    let _holder = UnixStream::connect(source.socket()).unwrap();
    world
        .cli(Side::A)
        .migrate("vm", &source, Side::B, &[])
        .finish()
        .failed_with(&["QMP", "second"]);
    let destination = world.waiting("destination", &machine());
    let _holder = UnixStream::connect(destination.socket()).unwrap();
    let refusal = world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap_err();
    assert_says(&refusal, &["QMP", "second"]);
}

#[test]
fn qmp_socket_absent() {
    let world = World::plain();
    let nowhere = Path::new("/nonexistent/qmp.sock");
    let to = format!("{}:7700", Side::B.address());
    world
        .cli(Side::A)
        .migrate_socket("vm", nowhere, &to, &[])
        .finish()
        .failed_with(&["/nonexistent/qmp.sock"]);
    let refusal = world.cli(Side::B).receive("vm", nowhere).unwrap_err();
    assert_says(&refusal, &["/nonexistent/qmp.sock"]);
}

#[test]
fn api_socket_absent() {
    let output = Cli::at(Path::new("/nonexistent/api.sock")).run(&["list"]);
    assert!(!output.status.success());
    assert_says(
        &String::from_utf8_lossy(&output.stderr),
        &["/nonexistent/api.sock", "pagecopyd"],
    );
}

#[test]
fn nobody_listens_at_the_address() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let address = format!("{}:9", Side::B.address());
    let migration = world
        .cli(Side::A)
        .migrate_socket("vm", source.socket(), &address, &[]);
    migration.finish().failed_with(&[&address]);
    assert_stayed(&mut source, None, begun);
}

#[test]
fn destination_does_not_expect_this_guest() {
    let world = World::plain();
    let mut source = world.guest("source", &machine());
    let begun = Instant::now();
    let outcome = world
        .cli(Side::A)
        .migrate("stranger", &source, Side::B, &[])
        .finish();
    outcome.failed_with(&["stranger", "receive"]);
    world.daemon(Side::B).assert_logs(&["stranger"]);
    assert_stayed(&mut source, None, begun);
}

#[test]
fn options_that_make_no_sense() {
    let world = World::plain();
    let source = world.guest("source", &machine());
    for (options, word) in [
        (["--downtime-limit", "soon"], "soon"),
        (["--bandwidth-limit", "fast"], "fast"),
        (["--channels", "0"], "channels"),
        (["--mode", "teleport"], "teleport"),
    ] {
        let outcome = world
            .cli(Side::A)
            .migrate("vm", &source, Side::B, &options)
            .finish();
        assert!(!outcome.status.success());
        let said = format!("{} {:?}", outcome.errors, outcome.events.last());
        assert_says(&said, &[word]);
    }
}
