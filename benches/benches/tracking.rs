//! What the guest's memory costs on both sides: scan-and-protect of a real QEMU, and placing at the destination.
//!
//! `cargo bench -p benches --bench tracking`, as root. The guests of 1 to 64 GiB hold 256 MiB each: a round should cost
//! what is dirty, not what there is.

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make public functions without words

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pagecopy::host::process::find_mapping;
use pagecopy::host::ram::MappedRam;
use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{Placer, Ram, Tracker};
use pagecopy::memory::{BlockId, BlockSpec, Run};
use tests::real::{Machine, Qemu, Role, Scratch, Version};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const BLOCK: BlockId = BlockId(0);

/// A guest and its tracker, armed.
struct Tracked {
    qemu: Qemu,
    tracker: UffdTracker,
    dirty: Vec<Run>,
    _scratch: Scratch,
}

impl Tracked {
    fn new(gib: u64, filled_mib: u64, load: &str) -> Tracked {
        let scratch = Scratch::new();
        let mut machine = Machine::new(Version::V10_0, gib * 1024, "");
        machine.guest = format!("mem=16..{} {load}", filled_mib - 16);
        let qemu = Qemu::start(&scratch, "guest", &machine, Role::Source);
        qemu.serial.wait_filled();
        let pid = i32::try_from(qemu.pid()).unwrap();
        let mapping = find_mapping(pid, qemu.ram(), gib * GIB).unwrap();
        let block = TrackedBlock {
            block: BLOCK,
            address: mapping.address,
            len: mapping.len,
            page_size: mapping.page_size,
        };
        let mut tracker = UffdTracker::new(pid, vec![block]).unwrap();
        tracker.arm().unwrap();
        let mut tracked = Tracked {
            qemu,
            tracker,
            dirty: Vec::new(),
            _scratch: scratch,
        };
        tracked.scan();
        tracked
    }

    /// Pages that were written since the scan before.
    fn scan(&mut self) -> u64 {
        self.dirty.clear();
        self.tracker.scan(&mut self.dirty).unwrap();
        self.dirty.iter().map(|run| run.pages).sum()
    }
}

fn scans(c: &mut Criterion) {
    let mut group = c.benchmark_group("scan and protect");
    group.sample_size(20);
    for (gib, filled_mib) in [(1, 1024), (1, 256), (8, 256), (64, 256)] {
        let mut guest = Tracked::new(gib, filled_mib, "rate=0 sweep=0");
        group.throughput(Throughput::Bytes(filled_mib << 20));
        group.bench_function(
            format!("idle, {gib} GiB of which {filled_mib} MiB are filled"),
            |b| {
                b.iter(|| black_box(guest.scan()));
            },
        );
    }
    // Only the scan is timed: the guest writes in between.
    let mut guest = Tracked::new(1, 1024, "rate=200 set=512");
    let mut pages = 0;
    let mut scans = 0;
    group.throughput(Throughput::Elements(1));
    group.bench_function("200 MB/s over 512 MiB, 50 ms after the last", |b| {
        b.iter_custom(|times| {
            let mut taken = Duration::ZERO;
            for _ in 0..times {
                guest.qemu.serial.wait_beats(50);
                let begun = Instant::now();
                pages += guest.scan();
                taken += begun.elapsed();
                scans += 1;
            }
            taken
        });
    });
    println!("pages in each scan: {}", pages / scans.max(1));
    group.finish();
}

/// The destination's memory: made, made zero, and what is zero already passed over.
fn placing(c: &mut Criterion) {
    const SIZE: u64 = 256 << 20;
    let scratch = Scratch::new();
    let path = scratch.ram().join("destination");
    std::fs::File::create(&path)
        .and_then(|file| file.set_len(SIZE))
        .unwrap();
    let spec = BlockSpec {
        name: "ram0".to_owned(),
        size: SIZE,
        page_size: PAGE,
    };
    let ram = MappedRam::open(&[(spec, path)], true).unwrap();
    let whole = Run {
        block: BLOCK,
        first: 0,
        pages: SIZE / PAGE,
    };
    let mut group = c.benchmark_group("placing");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(SIZE));
    group.bench_function("allocate", |b| {
        b.iter_batched(
            || ram.clear().unwrap(),
            |()| ram.allocate(whole).unwrap(),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("zero what is zero and there", |b| {
        b.iter(|| ram.zero(whole).unwrap());
    });
    ram.clear().unwrap();
    group.bench_function("zero what is a hole", |b| {
        b.iter(|| ram.zero(whole).unwrap());
    });
    let mut runs = Vec::new();
    group.bench_function("populated, of a hole", |b| {
        b.iter(|| {
            runs.clear();
            ram.populated(&mut runs).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, scans, placing);
criterion_main!(benches);
