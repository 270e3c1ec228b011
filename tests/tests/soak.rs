//! One guest that goes back and forth for a long time: whole throughout, never two of it, and nothing piles up in either
//! daemon or in QEMU.
//!
//! Each hop needs a QEMU that was started anew, whose start takes longer than a short migration. What a daemon holds is
//! looked at after each hop, when nothing is under way. The levels of the second half of a run may not exceed those of the first
//! half, which begins when the daemon has warmed up, by more than what the allocator and the threads that tokio keeps
//! for ten seconds come to.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use tests::real::{Levels, Machine, Qemu, Role, Side, Version, World, assert_moved, skipped};

/// Hops before levels count: code is paged in, pools are filled.
const WARM_UP: usize = 20;
/// A daemon remembers this many migrations of its own and forgets the oldest: until then its memory grows by design.
const REMEMBERED: usize = 200;
/// What a remembered migration may hold: its events, mostly.
const KIB_REMEMBERED: u64 = 24;
/// What memory may differ by between two looks, in KiB: the allocator's arenas, one for each thread that ever ran.
const MEMORY_SLACK_KIB: u64 = 8 << 10;
/// What descriptors may differ by: a connection to the API, or the channels of a hop, that are just being closed.
const DESCRIPTOR_SLACK: u64 = 8;
/// What threads may differ by: tokio's for blocking calls, which linger.
const THREAD_SLACK: u64 = 8;

/// A guest that goes to and fro.
struct Shuttle {
    world: World,
    machine: Machine,
    /// Where the guest is.
    side: Side,
    here: Qemu,
    hops: Vec<Hop>,
}

/// What one hop took, and what was there after it.
struct Hop {
    total_ms: f64,
    downtime_ms: f64,
    daemons: [Levels; 2],
    /// Descriptors of the QEMU that the guest left and of the one that it is in.
    qemus: [u64; 2],
}

impl Shuttle {
    fn new(machine: Machine) -> Shuttle {
        let world = World::tls();
        let here = world.guest("start", &machine);
        Shuttle {
            world,
            machine,
            side: Side::A,
            here,
            hops: Vec::new(),
        }
    }

    fn hop(&mut self) {
        let name = format!("hop-{}", self.hops.len());
        let mut there = Qemu::start(&self.world.scratch, &name, &self.machine, Role::Destination);
        let outcome = self.world.migrate(self.side, "vm", &self.here, &there, &[]);
        let finished = outcome.completed();
        let figure = |name: &str| finished[name].as_f64().unwrap();
        let (total_ms, downtime_ms) = (figure("total_ms"), figure("downtime_ms"));
        assert_moved(&mut self.here, &mut there);
        let left = std::mem::replace(&mut self.here, there);
        self.side = self.side.other();
        self.hops.push(Hop {
            total_ms,
            downtime_ms,
            daemons: [Side::A, Side::B].map(|side| Levels::of(self.world.daemon(side).pid())),
            qemus: [&left, &self.here].map(|qemu| Levels::of(qemu.pid()).descriptors),
        });
        let (ram, folder) = (
            left.ram().to_owned(),
            left.socket().parent().unwrap().to_owned(),
        );
        drop(left);
        std::fs::remove_file(ram).unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// Prints the figures so far.
    fn tell(&self, begun: Instant) {
        let (Some(first), Some(last)) = (
            self.hops.get(WARM_UP).or(self.hops.first()),
            self.hops.last(),
        ) else {
            return;
        };
        println!(
            "{:.0} s: {} migrations; total {} ms; downtime {} ms",
            begun.elapsed().as_secs_f64(),
            self.hops.len(),
            spread(self.hops.iter().map(|hop| hop.total_ms)),
            spread(self.hops.iter().map(|hop| hop.downtime_ms)),
        );
        for (side, (was, is)) in first.daemons.iter().zip(&last.daemons).enumerate() {
            println!(
                "    daemon {}: {was} after the warm-up; now {is}",
                ["a", "b"][side]
            );
        }
        println!(
            "    QEMU: {:?} descriptors (left, arrived in), now {:?}",
            first.qemus, last.qemus
        );
    }

    /// Panics if anything has piled up.
    fn assert_level(&self) {
        let measured = self.hops.get(WARM_UP..).unwrap_or_default();
        assert!(
            measured.len() >= 10,
            "{} migrations are too few to tell whether anything piles up",
            self.hops.len()
        );
        let (early, late) = measured.split_at(measured.len() / 2);
        // Every hop is remembered by both daemons.
        let remembered = |hops: usize| hops.min(REMEMBERED) as u64 * KIB_REMEMBERED;
        let by_design = remembered(self.hops.len()) - remembered(WARM_UP + early.len());
        for side in [0, 1] {
            let highest = |hops: &[Hop]| {
                Levels::highest(&hops.iter().map(|hop| hop.daemons[side]).collect::<Vec<_>>())
            };
            let (was, is) = (highest(early), highest(late));
            println!(
                "daemon {}: at most {was} in the first half, {is} in the second",
                ["a", "b"][side]
            );
            assert!(
                is.memory_kib <= was.memory_kib + MEMORY_SLACK_KIB + by_design,
                "memory grows: {was}, then {is}"
            );
            assert!(
                is.descriptors <= was.descriptors + DESCRIPTOR_SLACK,
                "descriptors pile up: {was}, then {is}"
            );
            assert!(
                is.threads <= was.threads + THREAD_SLACK,
                "threads pile up: {was}, then {is}"
            );
        }
        // QEMU is another one each time, and does the same each time.
        for (index, hop) in measured.iter().enumerate() {
            assert_eq!(
                hop.qemus,
                measured[0].qemus,
                "QEMU's descriptors at hop {}",
                WARM_UP + index
            );
        }
    }
}

/// Smallest, median and largest.
fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.as_slice() {
        [] => "-".to_owned(),
        [only] => format!("{only:.0}"),
        [first, .., last] => {
            format!("{first:.0} / {:.0} / {last:.0}", values[values.len() / 2])
        }
    }
}

#[test]
fn soak() {
    let seconds = std::env::var("PAGECOPY_SOAK").ok();
    let Some(seconds) = seconds.and_then(|seconds| seconds.parse().ok()) else {
        return skipped(
            "the soak takes half an hour: ./scripts/test --soak runs it (PAGECOPY_SOAK=SECONDS)",
        );
    };
    let (begun, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut shuttle = Shuttle::new(Machine::new(Version::V10_0, 128, "rate=50 set=32"));
    let mut told = begun;
    while begun.elapsed() < limit {
        shuttle.hop();
        if told.elapsed() >= Duration::from_secs(60) {
            told = Instant::now();
            shuttle.tell(begun);
        }
    }
    println!("at the end:");
    shuttle.tell(begun);
    shuttle.assert_level();
}

#[test]
fn heavy_two_hundred_short_migrations() {
    if std::env::var_os("PAGECOPY_ALL").is_none() {
        return skipped(
            "200 migrations take minutes: ./scripts/test --all runs them (PAGECOPY_ALL=1)",
        );
    }
    let mut machine = Machine::new(Version::V10_0, 32, "");
    machine.guest = "mem=16..30 rate=0".to_owned();
    let begun = Instant::now();
    let mut shuttle = Shuttle::new(machine);
    for _ in 0..200 {
        shuttle.hop();
    }
    shuttle.tell(begun);
    shuttle.assert_level();
}
