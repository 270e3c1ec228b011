//! What the guest's memory costs on both sides: scan-and-protect of a real QEMU, and placing at the destination.
//!
//! `cargo bench -p benches --bench tracking`, as root. The guests of 1 to 64 GiB hold 256 MiB each: a round should cost
//! what is dirty, not what there is. A table of all scans stands behind criterion's lines; `-- scan` measures them alone.

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make public functions without words

use std::hint::black_box;
use std::time::{Duration, Instant};

use benches::stats::Spread;
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

/// What the scans of one guest took, and what they found.
struct Row {
    guest: String,
    load: &'static str,
    taken: Vec<Duration>,
    extents: usize,
    pages: u64,
}

impl Row {
    /// One scan, timed.
    fn scan(&mut self, guest: &mut Tracked) -> Duration {
        let begun = Instant::now();
        self.pages += black_box(guest.scan());
        let taken = begun.elapsed();
        self.extents += guest.dirty.len();
        self.taken.push(taken);
        taken
    }
}

/// The guests: GiB of RAM, and MiB of it that hold something.
const GUESTS: [(u64, u64); 4] = [(1, 1024), (1, 256), (8, 256), (64, 256)];
/// What they do between two scans, and their command line.
const LOADS: [(&str, &str); 3] = [
    ("idle", "rate=0 sweep=0"),
    ("50 ms of 20 MB/s", "rate=20 set=128"),
    ("50 ms of 200 MB/s", "rate=200 set=128"),
];

fn scans(c: &mut Criterion) {
    let mut group = c.benchmark_group("scan and protect");
    group.sample_size(20);
    let mut rows = Vec::new();
    for (gib, filled_mib) in GUESTS {
        for (load, words) in LOADS {
            let mut row = Row {
                guest: format!("{gib} GiB of which {filled_mib} MiB are filled"),
                load,
                taken: Vec::new(),
                extents: 0,
                pages: 0,
            };
            let mut guest = None;
            group.bench_function(format!("{}, {load}", row.guest), |b| {
                let guest = guest.get_or_insert_with(|| Tracked::new(gib, filled_mib, words));
                // Only the scan is timed: the guest writes in between.
                b.iter_custom(|times| {
                    let timed = (0..times).map(|_| {
                        if load != "idle" {
                            guest.qemu.serial.wait_beats(50);
                        }
                        row.scan(guest)
                    });
                    timed.sum()
                });
            });
            rows.push(row);
        }
    }
    group.finish();
    print(&rows);
}

/// A table of all that were measured.
fn print(rows: &[Row]) {
    println!(
        "{:<36} {:<18} {:>7} {:>10} {:>10} {:>8} {:>8}",
        "guest", "between scans", "scans", "median ms", "least ms", "extents", "pages"
    );
    for row in rows.iter().filter(|row| !row.taken.is_empty()) {
        let ms: Vec<f64> = row.taken.iter().map(|it| it.as_secs_f64() * 1e3).collect();
        let spread = Spread::of(&ms).unwrap();
        let scans = row.taken.len();
        println!(
            "{:<36} {:<18} {scans:>7} {:>10.3} {:>10.3} {:>8} {:>8}",
            row.guest,
            row.load,
            spread.median,
            spread.least,
            row.extents / scans,
            row.pages / scans as u64
        );
    }
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
