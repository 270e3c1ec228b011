//! Guests that move with their pages encoded, on real QEMU and real daemons: whole with each `--compress`, whatever they
//! write meanwhile.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use tests::real::{Machine, Version, World};

fn figure(finished: &Value, key: &str) -> u64 {
    finished[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} in {finished}"))
}

/// A guest with a hot spot that is written faster than a limited link takes it for some rounds.
fn dirtier() -> Machine {
    Machine::new(Version::V10_0, 256, "rate=40 set=48 pattern=hot fill=text")
}

#[test]
fn compressed_over_tls() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 256, "rate=50 set=64 fill=text");
    let moved = world.move_and_check(&machine, &["--compress", "zstd"]);
    let finished = moved.outcome.completed();
    assert!(figure(finished, "zstd_bytes") > 1 << 20, "{finished}");
    assert!(
        figure(finished, "zstd_sent") < figure(finished, "zstd_bytes"),
        "{finished}"
    );
    assert_eq!(figure(finished, "delta_bytes"), 0, "{finished}");
}

#[test]
fn deltas_over_tls_with_three_channels() {
    let world = World::tls();
    let options = [
        "--compress",
        "delta",
        "--bandwidth-limit",
        "100MB/s",
        "--channels",
        "3",
        "--downtime-limit",
        "20ms",
    ];
    let moved = world.move_and_check(&dirtier(), &options);
    let finished = moved.outcome.completed();
    assert_eq!(figure(finished, "zstd_bytes"), 0, "{finished}");
    let (bytes, sent) = (
        figure(finished, "delta_bytes"),
        figure(finished, "delta_sent"),
    );
    assert!(bytes > 1 << 20 && sent < bytes / 4, "{finished}");
}

#[test]
fn each_page_as_it_pays_on_a_limited_link() {
    let world = World::plain();
    let options = [
        "--compress",
        "auto",
        "--bandwidth-limit",
        "60MB/s",
        "--downtime-limit",
        "20ms",
    ];
    let moved = world.move_and_check(&dirtier(), &options);
    let finished = moved.outcome.completed();
    assert!(figure(finished, "delta_bytes") > 0, "{finished}");
}

#[test]
fn nothing_is_encoded_unasked() {
    let world = World::plain();
    let machine = Machine::new(Version::V7_2, 256, "rate=50 set=64");
    let moved = world.move_and_check(&machine, &["--bandwidth-limit", "100MB/s"]);
    let finished = moved.outcome.completed();
    let encoded =
        ["zstd_bytes", "zstd_sent", "delta_bytes", "delta_sent"].map(|key| figure(finished, key));
    assert_eq!(encoded, [0; 4], "{finished}");
}

#[test]
fn encoded_rounds_and_then_the_guest_first() {
    let world = World::tls();
    let options = [
        "--mode",
        "hybrid",
        "--postcopy-after",
        "3",
        "--compress",
        "auto",
        "--bandwidth-limit",
        "100MB/s",
    ];
    world.move_and_check(&dirtier(), &options);
}

#[test]
fn a_cache_for_a_few_pages_and_memories_that_are_compared() {
    let world = World::tls();
    let options = [
        "--compress",
        "auto",
        "--delta-cache",
        "200kB",
        "--bandwidth-limit",
        "80MB/s",
        "--verify",
    ];
    world.move_and_check(&dirtier(), &options);
}
