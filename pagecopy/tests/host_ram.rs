//! RAM files: what they hold, whether it is zero, digests, clearing, allocating, zeroing.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]

mod host_support;

use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use pagecopy::host::ram::MappedRam;
use pagecopy::host::{OutOfBounds, Placer, Ram};
use pagecopy::limits::DIGEST_CHUNK;
use pagecopy::memory::{BlockId, BlockSpec};

use host_support::{
    HUGE, HugePages, Mounted, PAGE, RamFile, is_root, open_ram, pages, populated, run,
};

const BLOCK: BlockId = BlockId(0);
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that the file really takes.
fn taken(file: &RamFile) -> u64 {
    file.file.metadata().unwrap().blocks() * 512
}

#[test]
fn what_a_file_holds_is_listed_block_by_block() {
    let (one, two) = (RamFile::tmpfs(8 << 20), RamFile::tmpfs(4 << 20));
    let ram = open_ram(&[&one, &two]);
    assert_eq!(populated(&ram), []);
    one.file.write_at(b"x", 5 * PAGE + 100).unwrap();
    one.file
        .write_at(&[1; 3 * PAGE as usize], 7 * PAGE)
        .unwrap();
    two.file.write_at(b"y", (4 << 20) - 1).unwrap();
    assert_eq!(
        populated(&ram),
        [run(0, 5, 1), run(0, 7, 3), run(1, 1023, 1)]
    );
}

#[test]
fn huge_pages_that_a_file_holds_are_listed_without_allocating_others() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(8) else {
        return;
    };
    let file = RamFile::at(&huge.mount.0, 8 * HUGE, HUGE);
    let ram = open_ram(&[&file]);
    assert_eq!(populated(&ram), []);
    let map = file.map();
    map.write_byte(HUGE, 1);
    map.write_byte(5 * HUGE, 1);
    map.write_byte(6 * HUGE + 77, 1);
    assert_eq!(populated(&ram), [run(0, 1, 1), run(0, 5, 2)]);
    assert_eq!(taken(&file), 3 * HUGE);
    let read_only = MappedRam::open(&[(file.spec("ram"), file.path.clone())], false).unwrap();
    assert_eq!(populated(&read_only), [run(0, 1, 1), run(0, 5, 2)]);

    assert_eq!(ram.digests(BLOCK).unwrap().len(), 4);
    assert_eq!(ram.page_digests(BLOCK, 0).len(), 2);
    ram.zero(run(0, 0, 8)).unwrap();
    assert_eq!(map.read_byte(6 * HUGE + 77), 0);
    assert_eq!(
        taken(&file),
        3 * HUGE,
        "zeroing neither allocates nor frees"
    );
    ram.allocate(run(0, 2, 2)).unwrap();
    assert_eq!(populated(&ram), [run(0, 1, 3), run(0, 5, 2)]);
    ram.clear().unwrap();
    assert_eq!((populated(&ram), taken(&file)), (vec![], 0));
}

#[test]
fn memory_that_is_to_stay_is_cleared_in_place_and_all_other_is_freed() {
    const SIZE: u64 = 40 << 20; // several pieces, the last one short
    let (kept, other) = (RamFile::tmpfs(SIZE), RamFile::tmpfs(SIZE));
    for file in [&kept, &other] {
        file.file.write_at(&vec![0; SIZE as usize], 0).unwrap();
        for at in [0, 5 * PAGE + 17, (16 << 20) - 1, 16 << 20, SIZE - 1] {
            file.file.write_at(b"x", at).unwrap();
        }
    }
    let ram = open_ram(&[&kept, &other]).keeping([BLOCK]);
    ram.clear().unwrap();
    assert_eq!([taken(&kept), taken(&other)], [SIZE, 0]);
    assert!(ram.is_zero(BLOCK, 0, SIZE), "it reads as zero");
    assert_eq!(populated(&ram), [run(0, 0, SIZE / PAGE)]);

    // A hole in it stays one.
    kept.map().remove_pages(3 * PAGE, 2 * PAGE);
    ram.clear().unwrap();
    assert_eq!(taken(&kept), SIZE - 2 * PAGE);
}

#[test]
fn huge_pages_that_are_to_stay_are_cleared_in_place() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(4) else {
        return;
    };
    let file = RamFile::at(&huge.mount.0, 4 * HUGE, HUGE);
    let ram = open_ram(&[&file]).keeping([BLOCK]);
    let map = file.map();
    map.write_byte(HUGE + 5, 1);
    map.write_byte(4 * HUGE - 1, 1);
    ram.clear().unwrap();
    assert_eq!(taken(&file), 2 * HUGE, "neither freed nor allocated");
    assert_eq!(
        [map.read_byte(HUGE + 5), map.read_byte(4 * HUGE - 1)],
        [0, 0]
    );
}

#[test]
fn zero_is_told_from_not_zero() {
    let file = RamFile::tmpfs(1 << 20);
    file.file.write_at(&[0; 8 * PAGE as usize], 0).unwrap();
    file.file.write_at(b"\x01", 6 * PAGE - 1).unwrap();
    let ram = open_ram(&[&file]);
    assert!(ram.is_zero(BLOCK, 0, 5 * PAGE));
    assert!(!ram.is_zero(BLOCK, 0, 6 * PAGE));
    assert!(!ram.is_zero(BLOCK, 5 * PAGE, PAGE));
    assert!(ram.is_zero(BLOCK, 6 * PAGE, 2 * PAGE));
    assert!(
        !ram.is_zero(BLOCK, 1 << 20, PAGE),
        "nothing is known of what is outside"
    );
    assert!(!ram.is_zero(BlockId(1), 0, PAGE));
}

#[test]
fn digests_depend_on_contents_and_not_on_holes() {
    const SIZE: u64 = 3 * DIGEST_CHUNK + 5 * PAGE;
    let (sparse, full) = (RamFile::tmpfs(SIZE), RamFile::tmpfs(SIZE));
    full.file.write_at(&vec![0; SIZE as usize], 0).unwrap();
    for file in [&sparse, &full] {
        file.file.write_at(b"same", 1000).unwrap();
        file.file.write_at(b"same", DIGEST_CHUNK - 2).unwrap();
        file.file.write_at(b"same", SIZE - 4).unwrap();
    }
    let ram = open_ram(&[&sparse, &full]);
    let before = taken(&sparse);
    let digests = ram.digests(BLOCK).unwrap();
    assert_eq!(digests.len(), 4);
    assert_eq!(digests, ram.digests(BlockId(1)).unwrap());
    assert_ne!(digests[0], digests[1]);
    for chunk in 0..5 {
        let pages = ram.page_digests(BLOCK, chunk);
        assert_eq!(pages.len() as u64, [1024, 1024, 1024, 5, 0][chunk as usize]);
        assert_eq!(pages, ram.page_digests(BlockId(1), chunk));
    }
    assert_eq!(taken(&sparse), before, "digesting allocates nothing");

    full.file.write_at(b"S", DIGEST_CHUNK + 7 * PAGE).unwrap();
    let changed = ram.digests(BlockId(1)).unwrap();
    assert_eq!(
        (changed[0], changed[2], changed[3]),
        (digests[0], digests[2], digests[3])
    );
    assert_ne!(changed[1], digests[1]);
    let (ours, theirs) = (ram.page_digests(BLOCK, 1), ram.page_digests(BlockId(1), 1));
    let differing: Vec<usize> = (0..1024)
        .filter(|&page| ours[page] != theirs[page])
        .collect();
    assert_eq!(differing, [7]);
}

#[test]
fn allocating_keeps_contents_and_zeroing_keeps_holes() {
    let file = RamFile::tmpfs(1 << 20);
    file.file.write_at(b"kept", 10 * PAGE).unwrap();
    let ram = open_ram(&[&file]);
    ram.allocate(run(0, 8, 4)).unwrap();
    assert_eq!(taken(&file), 4 * PAGE);
    let mut bytes = [0; 4];
    file.file.read_exact_at(&mut bytes, 10 * PAGE).unwrap();
    assert_eq!(&bytes, b"kept");

    file.file
        .write_at(&[7; 2 * PAGE as usize], 100 * PAGE)
        .unwrap();
    ram.zero(run(0, 101, 100)).unwrap();
    assert_eq!(taken(&file), 6 * PAGE, "holes stay holes, pages stay pages");
    assert!(ram.is_zero(BLOCK, 101 * PAGE, PAGE));
    assert!(!ram.is_zero(BLOCK, 100 * PAGE, PAGE));
    ram.zero(run(0, 0, 256)).unwrap();
    assert!(ram.is_zero(BLOCK, 8 * PAGE, 4 * PAGE));
    assert_eq!(taken(&file), 6 * PAGE);

    ram.clear().unwrap();
    assert_eq!((populated(&ram), taken(&file)), (vec![], 0));
}

#[test]
fn runs_outside_are_refused() {
    let file = RamFile::tmpfs(1 << 20);
    let ram = open_ram(&[&file]);
    for outside in [
        run(0, 256, 1),
        run(0, 255, 2),
        run(0, 0, 0),
        run(0, u64::MAX, 2),
        run(1, 0, 1),
    ] {
        assert_eq!(ram.zero(outside), Err(OutOfBounds(outside)));
        assert_eq!(
            ram.allocate(outside).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}

#[test]
fn a_full_file_system_is_a_clean_error() {
    skip_unless!(is_root(), "needs root");
    let Some(small) = Mounted::new("tmpfs", "size=4M") else {
        println!("SKIPPED: tmpfs cannot be mounted");
        return;
    };
    let file = RamFile::at(&small.0, 16 << 20, PAGE);
    let ram = open_ram(&[&file]);
    ram.allocate(run(0, 0, 512)).unwrap();
    let error = ram.allocate(run(0, 512, 3584)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    // Zeroing what is not there needs no room.
    ram.zero(run(0, 0, 4096)).unwrap();
    let mut rest = std::fs::File::create(small.0.join("rest")).unwrap();
    while rest.write_all(&[1; 4096]).is_ok() {}
    ram.zero(run(0, 0, 4096)).unwrap();
    assert_eq!(ram.digests(BLOCK).unwrap().len(), 4);
    drop((rest, ram, file));
}

#[test]
fn files_that_do_not_fit_their_block_are_refused() {
    let file = RamFile::tmpfs(1 << 20);
    let refused = |spec: BlockSpec, word: &str| {
        let error = MappedRam::open(&[(spec, file.path.clone())], false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(word) && error.contains(file.path.to_str().unwrap()),
            "{error}"
        );
    };
    refused(
        BlockSpec {
            size: 2 << 20,
            ..file.spec("ram")
        },
        "1048576 bytes where block ram has 2097152",
    );
    refused(
        BlockSpec {
            page_size: 0,
            ..file.spec("ram")
        },
        "pages of 0",
    );
    refused(
        BlockSpec {
            page_size: HUGE,
            ..file.spec("ram")
        },
        "pages of 2097152",
    );
    let absent = file.path.with_extension("absent");
    let error = MappedRam::open(&[(file.spec("ram"), absent)], false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn the_mapping_lives_as_long_as_its_keeper() {
    // A large one is unmapped by somebody else.
    for size in [1 << 20, 512 << 20] {
        let file = RamFile::tmpfs(size);
        file.file.write_at(b"z", PAGE).unwrap();
        let ram = open_ram(&[&file]);
        let (base, len, keeper) = ram.mapping(BLOCK).unwrap();
        assert_eq!(len as u64, size);
        assert!(ram.mapping(BlockId(1)).is_none());
        drop(ram);
        let mapped = || {
            let start = format!("{:x}-", base as usize);
            std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .any(|line| line.starts_with(&start))
        };
        assert!(mapped());
        drop(keeper);
        let begun = Instant::now();
        while mapped() {
            assert!(begun.elapsed() < PATIENCE, "{size} bytes are still mapped");
            std::thread::yield_now();
        }
    }
}

/// Figures, not limits: the machine may be busy.
#[test]
fn a_large_file_is_handled_at_speed() {
    const SIZE: u64 = 256 << 20;
    let file = RamFile::tmpfs(8 << 30);
    let ram = open_ram(&[&file]);
    let started = Instant::now();
    ram.allocate(run(0, 0, SIZE / PAGE)).unwrap();
    println!("allocated 256 MiB in {:?}", started.elapsed());
    let started = Instant::now();
    let runs = populated(&ram);
    println!("listed 256 MiB of 8 GiB in {:?}", started.elapsed());
    assert_eq!(pages(&runs).len() as u64, SIZE / PAGE);
    let started = Instant::now();
    assert!(ram.is_zero(BLOCK, 0, SIZE));
    println!("tested 256 MiB for zero in {:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(
        ram.digests(BLOCK).unwrap().len() as u64,
        (8 << 30) / DIGEST_CHUNK
    );
    println!("digested 256 MiB of 8 GiB in {:?}", started.elapsed());
    let started = Instant::now();
    ram.zero(run(0, 0, SIZE / PAGE)).unwrap();
    println!("zeroed 256 MiB of zeroes in {:?}", started.elapsed());
    let started = Instant::now();
    ram.clear().unwrap();
    println!("cleared in {:?}", started.elapsed());
}
