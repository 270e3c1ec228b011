//! Hot paths alone: taking runs out of a dirty bitmap, the zero test, and digests.
//!
//! `cargo bench -p benches`. Throughput is in bytes of guest memory, so that it can be held against the link: 100 Gbit/s
//! are 12.5 GB/s.

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make public functions without words

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::PathBuf;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pagecopy::engine::bitmap::Bitmap;
use pagecopy::host::Ram;
use pagecopy::host::ram::MappedRam;
use pagecopy::limits::{MAX_BATCH_BYTES, MAX_RUNS};
use pagecopy::memory::{BlockId, BlockSpec, Run};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const PAGE: u64 = 4096;
const BLOCK: BlockId = BlockId(0);

fn spec(size: u64) -> BlockSpec {
    BlockSpec {
        name: "ram0".to_owned(),
        size,
        page_size: PAGE,
    }
}

/// A file on tmpfs that goes away.
struct Ramfile(PathBuf);

impl Ramfile {
    fn new(name: &str, byte: u8) -> Ramfile {
        let path = PathBuf::from(format!("/dev/shm/pagecopy-{}-{name}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        let chunk = vec![byte; usize::try_from(MIB).unwrap()];
        for _ in 0..SIZE / MIB {
            file.write_all(&chunk).unwrap();
        }
        Ramfile(path)
    }

    fn open(&self) -> MappedRam {
        MappedRam::open(&[(spec(SIZE), self.0.clone())], true).unwrap()
    }
}

impl Drop for Ramfile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Empties a bitmap of 16 GiB, batch by batch, as a round does.
fn take_all(mut bitmap: Bitmap) -> u64 {
    let mut runs = Vec::with_capacity(MAX_RUNS);
    let mut pages = 0;
    while !bitmap.is_empty() {
        runs.clear();
        bitmap.take(MAX_RUNS, MAX_BATCH_BYTES, &mut runs);
        pages += runs.iter().map(|run| run.pages).sum::<u64>();
    }
    pages
}

fn bitmap(c: &mut Criterion) {
    const GUEST: u64 = 16 << 30;
    let mut group = c.benchmark_group("take runs");
    for (name, stride, pages) in [
        ("whole guest", 512, 512),
        ("every other page", 2, 1),
        ("one page in 100", 100, 1),
    ] {
        let mut full = Bitmap::new(&[spec(GUEST)]);
        for first in (0..GUEST / PAGE - pages).step_by(stride) {
            full.insert(Run {
                block: BLOCK,
                first,
                pages,
            })
            .unwrap();
        }
        group.throughput(Throughput::Bytes(full.bytes()));
        group.bench_function(name, |b| {
            b.iter_batched(
                || full.clone(),
                |bitmap| black_box(take_all(bitmap)),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

fn memory(c: &mut Criterion) {
    let zero = Ramfile::new("zero", 0);
    let ones = Ramfile::new("ones", 1);
    let (zero, ones) = (zero.open(), ones.open());
    let mut group = c.benchmark_group("memory");
    group.throughput(Throughput::Bytes(SIZE));
    let pages = |ram: &MappedRam| {
        (0..SIZE / PAGE)
            .filter(|page| ram.is_zero(BLOCK, page * PAGE, PAGE))
            .count()
    };
    group.bench_function("zero test, zero pages", |b| {
        b.iter(|| black_box(pages(&zero)))
    });
    group.bench_function("zero test, other pages", |b| {
        b.iter(|| black_box(pages(&ones)))
    });
    group.sample_size(20);
    group.bench_function("digests, all cores", |b| {
        b.iter(|| black_box(ones.digests(BLOCK).unwrap()))
    });
    group.finish();
}

criterion_group!(benches, bitmap, memory);
criterion_main!(benches);
