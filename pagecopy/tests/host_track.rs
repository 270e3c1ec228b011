//! Dirty tracking of a live process: exactly what it writes is reported, and nothing is left when tracking ends.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]

mod host_support;

use std::time::{Duration, Instant};

use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{TrackError, Tracker, process};
use pagecopy::memory::{BlockId, Run};

use host_support::Background;
use host_support::sys::{self, Map};
use host_support::{
    Command, HUGE, HugePages, PAGE, RamFile, Random, Target, is_registered, is_root,
};
use host_support::{Mounted, page_tables, pages, run, scan};

#[test]
fn exactly_the_written_pages_are_reported_once() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(64 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 100, 50);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    assert_eq!(scan(&mut tracker), []);

    // Pages that were there, pages of a hole next to them, and pages of a large hole.
    target.write(0, 110, 3);
    target.write(0, 149, 2);
    target.write(0, 9000, 1);
    target.write(0, 16383, 1);
    let expected = [
        run(0, 110, 3),
        run(0, 149, 2),
        run(0, 9000, 1),
        run(0, 16383, 1),
    ];
    assert_eq!(scan(&mut tracker), expected);
    assert_eq!(scan(&mut tracker), []);

    // Reading is not writing, be it of a page, of a hole beside pages or in the middle of nowhere.
    target.tell(Command::Read {
        block: 0,
        first: 100,
        count: 8,
        stride: 1,
    });
    assert_eq!(scan(&mut tracker), []);
    target.write(0, 9000, 1);
    assert_eq!(scan(&mut tracker), [run(0, 9000, 1)]);
}

#[test]
fn random_writes_into_a_sparse_file_are_all_reported() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(256 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    let mut random = Random(7);
    for _ in 0..200 {
        target.write(0, random.below(65536), 1);
    }
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    for round in 0..20 {
        let mut written: Vec<(u16, u64)> = (0..300).map(|_| (0, random.below(65536))).collect();
        for &(_, page) in &written {
            target.write(0, page, 1);
        }
        written.sort_unstable();
        written.dedup();
        assert_eq!(pages(&scan(&mut tracker)), written, "round {round}");
    }
}

#[test]
fn writes_by_the_kernel_are_reported_also_of_a_process_without_privileges() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(8 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 100);
    target.tell(Command::BecomeNobody);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    target.tell(Command::KernelWrite { block: 0, page: 17 });
    target.tell(Command::KernelWrite {
        block: 0,
        page: 1700,
    });
    assert_eq!(scan(&mut tracker), [run(0, 17, 1), run(0, 1700, 1)]);
}

#[test]
fn a_written_page_that_leaves_the_page_table_is_still_reported() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(8 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 10);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    target.write(0, 5, 1);
    target.tell(Command::Drop { block: 0, page: 5 });
    // A hole that was filled, and whose entry was dropped.
    target.write(0, 1500, 1);
    target.tell(Command::Drop {
        block: 0,
        page: 1500,
    });
    assert_eq!(scan(&mut tracker), [run(0, 5, 1), run(0, 1500, 1)]);
    assert_eq!(scan(&mut tracker), []);
}

#[test]
fn several_blocks_are_told_apart() {
    skip_unless!(is_root(), "needs root");
    let (one, two) = (RamFile::tmpfs(4 << 20), RamFile::tmpfs(6 << 20));
    let mut target = Target::new(&[&one, &two], Vec::new());
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    target.write(1, 1535, 1);
    target.write(0, 1023, 1);
    target.write(1, 0, 1);
    assert_eq!(
        scan(&mut tracker),
        [run(0, 1023, 1), run(1, 0, 1), run(1, 1535, 1)]
    );
}

#[test]
fn huge_pages_are_tracked_as_such() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(16) else {
        return;
    };
    let file = RamFile::at(&huge.mount.0, 16 * HUGE, HUGE);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 4);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    assert_eq!(scan(&mut tracker), []);
    target.write(0, 1, 1);
    target.write(0, 9, 2);
    target.tell(Command::Read {
        block: 0,
        first: 3,
        count: 1,
        stride: 1,
    });
    assert_eq!(scan(&mut tracker), [run(0, 1, 1), run(0, 9, 2)]);
    assert_eq!(scan(&mut tracker), []);
    target.tell(Command::KernelWrite { block: 0, page: 2 });
    assert_eq!(scan(&mut tracker), [run(0, 2, 1)]);
    tracker.disarm();
    assert!(!is_registered(target.pid()));
}

/// Copies what is reported while the target writes at full speed; when it has stopped, one more scan makes the copy whole.
fn copy_under_load(file: &RamFile, words: u64) {
    let control = RamFile::tmpfs(PAGE);
    // Word 0 of the control page: stop. Words 1 and 2: writers that have stopped.
    let writer = |seed: u64| -> Background {
        Box::new(move |maps: &[Map]| {
            let (ram, control) = (&maps[0], &maps[1]);
            let mut random = Random(seed);
            let mut version = seed << 32;
            while control.read_word(0) == 0 {
                version += 1;
                // Mostly a hot set, sometimes anywhere, holes included.
                let span = if version.is_multiple_of(8) {
                    words
                } else {
                    words / 16
                };
                ram.write_word((random.below(span / 2) * 2 + seed - 1) * 8, version);
            }
            control.write_word(seed * 8, 1);
        })
    };
    let target = Target::new(&[file, &control], vec![writer(1), writer(2)]);
    let (ram, flags) = (file.map(), control.map());
    let mut tracker = UffdTracker::new(target.pid(), target.blocks[..1].to_vec()).unwrap();
    tracker.arm().unwrap();
    let page = file.page_size;
    let mut copy = vec![0; file.size as usize];
    let mut take = |runs: &[Run]| {
        for run in runs {
            let bytes = (run.first * page) as usize..(run.end() * page) as usize;
            ram.copy_out(run.first * page, &mut copy[bytes]);
        }
    };
    take(&[run(0, 0, file.size / page)]);
    // The writers are given their time: on a busy machine they may not run at all during 60 scans. A slow one scans less.
    let limit = Duration::from_secs(30);
    let (begun, mut scans, mut reported) = (Instant::now(), 0, 0);
    while reported <= 60 || (scans < 60 && begun.elapsed() < limit) {
        assert!(
            reported > 60 || begun.elapsed() < limit,
            "the writers wrote only {reported} pages while they were tracked"
        );
        let dirty = scan(&mut tracker);
        scans += 1;
        reported += dirty.iter().map(|run| run.pages).sum::<u64>();
        take(&dirty);
    }
    flags.write_word(0, 1);
    while flags.read_word(8) == 0 || flags.read_word(16) == 0 {
        std::thread::yield_now();
    }
    take(&scan(&mut tracker));
    let mut now = vec![0; page as usize];
    for offset in (0..file.size).step_by(page as usize) {
        ram.copy_out(offset, &mut now);
        assert!(
            now == copy[offset as usize..(offset + page) as usize],
            "page {}",
            offset / page
        );
    }
    assert_eq!(scan(&mut tracker), []);
}

#[test]
fn no_write_is_ever_lost_under_full_load() {
    skip_unless!(is_root(), "needs root");
    copy_under_load(&RamFile::tmpfs(96 << 20), (96 << 20) / 8);
}

#[test]
fn no_write_into_huge_pages_is_ever_lost_under_full_load() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(16) else {
        return;
    };
    copy_under_load(&RamFile::at(&huge.mount.0, 16 * HUGE, HUGE), 16 * HUGE / 8);
}

/// Transparent huge pages come and go by themselves. A write to one may be reported with its neighbours, never less.
#[test]
fn no_write_into_transparent_huge_pages_is_ever_lost() {
    skip_unless!(is_root(), "needs root");
    let Some(mount) = Mounted::new("tmpfs", "size=256M,huge=always") else {
        println!("SKIPPED: tmpfs with huge=always cannot be mounted");
        return;
    };
    copy_under_load(&RamFile::at(&mount.0, 96 << 20, PAGE), (96 << 20) / 8);

    let file = RamFile::at(&mount.0, 32 << 20, PAGE);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 4096);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    assert_eq!(scan(&mut tracker), []);
    target.write(0, 1000, 1);
    target.write(0, 5000, 1);
    let dirty = scan(&mut tracker);
    println!("two pages written among transparent huge pages: {dirty:?}");
    let reported = pages(&dirty);
    assert!(reported.contains(&(0, 1000)) && reported.contains(&(0, 5000)));
    target.write(0, 1001, 1);
    assert!(pages(&scan(&mut tracker)).contains(&(0, 1001)));
}

#[test]
fn a_large_empty_guest_is_armed_quickly_and_without_page_tables() {
    skip_unless!(is_root(), "needs root");
    const SIZE: u64 = 8 << 30;
    let file = RamFile::tmpfs(SIZE);
    let mut target = Target::new(&[&file], Vec::new());
    target.tell(Command::Write {
        block: 0,
        first: 5,
        count: 8,
        stride: SIZE / PAGE / 8,
    });
    let before = page_tables(target.pid());
    let mut tracker = target.tracker();
    let started = Instant::now();
    tracker.arm().unwrap();
    let armed = started.elapsed();
    let grown = page_tables(target.pid()) - before;
    let started = Instant::now();
    assert_eq!(scan(&mut tracker), []);
    println!(
        "8 GiB, nearly empty: armed in {armed:?}, page tables grew by {grown} KiB, scan {:?}",
        started.elapsed()
    );
    assert!(grown <= 256, "page tables grew by {grown} KiB");
    target.write(0, 1_000_000, 3);
    target.write(0, SIZE / PAGE - 1, 1);
    assert_eq!(
        scan(&mut tracker),
        [run(0, 1_000_000, 3), run(0, SIZE / PAGE - 1, 1)]
    );
    assert_eq!(scan(&mut tracker), []);
}

#[test]
fn a_full_guest_is_scanned_quickly() {
    skip_unless!(is_root(), "needs root");
    const SIZE: u64 = 1 << 30;
    let file = RamFile::tmpfs(SIZE);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, SIZE / PAGE);
    let mut tracker = target.tracker();
    let started = Instant::now();
    tracker.arm().unwrap();
    let armed = started.elapsed();
    let started = Instant::now();
    assert_eq!(scan(&mut tracker), []);
    let clean = started.elapsed();
    target.tell(Command::Write {
        block: 0,
        first: 0,
        count: 16384,
        stride: 16,
    });
    let started = Instant::now();
    let dirty = scan(&mut tracker);
    let sparse = started.elapsed();
    assert_eq!(dirty.len(), 16384);
    target.write(0, 0, SIZE / PAGE);
    let started = Instant::now();
    assert_eq!(scan(&mut tracker), [run(0, 0, SIZE / PAGE)]);
    let all = started.elapsed();
    let started = Instant::now();
    tracker.disarm();
    println!(
        "1 GiB, full: armed in {armed:?}, scan clean {clean:?}, 16384 single pages {sparse:?}, all {all:?}, disarmed in {:?}",
        started.elapsed()
    );
}

#[test]
fn nothing_is_left_after_disarm() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(16 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 2000);
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    assert!(
        is_registered(target.pid()),
        "the test sees registered ranges"
    );
    assert_eq!(process::userfaultfds(target.pid()).unwrap(), 0);
    tracker.disarm();
    assert!(!is_registered(target.pid()));
    assert_eq!(process::userfaultfds(target.pid()).unwrap(), 0);
    target.write(0, 0, 4096);
    assert!(matches!(
        tracker.scan(&mut Vec::new()),
        Err(TrackError::Memory(_))
    ));
    // And it can be done again.
    tracker.arm().unwrap();
    target.write(0, 7, 1);
    assert_eq!(scan(&mut tracker), [run(0, 7, 1)]);
    drop(tracker);
    assert!(!is_registered(target.pid()));
}

#[test]
fn a_killed_tracker_leaves_the_target_as_it_was() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(16 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 2000);
    let blocks = target.blocks.clone();
    let pid = target.pid();
    let tracking = sys::fork(move || {
        let mut tracker = UffdTracker::new(pid, blocks).unwrap();
        tracker.arm().unwrap();
        // Stopped by its own hand, so that the test knows when it is armed.
        sys::stop_oneself();
        drop(tracker);
    });
    assert!(libc::WIFSTOPPED(tracking.wait(libc::WUNTRACED)));
    assert!(is_registered(pid));
    drop(tracking);
    assert!(!is_registered(pid));
    target.write(0, 0, 4096);
}

#[test]
fn a_target_that_ends_or_unplugs_is_noticed() {
    skip_unless!(is_root(), "needs root");
    let (one, two) = (RamFile::tmpfs(4 << 20), RamFile::tmpfs(4 << 20));
    let mut target = Target::new(&[&one, &two], Vec::new());
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    target.tell(Command::Unmap { block: 1 });
    assert!(matches!(
        tracker.scan(&mut Vec::new()),
        Err(TrackError::Memory(_))
    ));
    let pid = target.pid();
    target.child.signal(libc::SIGKILL);
    target.child.wait(libc::__WALL);
    assert!(matches!(tracker.scan(&mut Vec::new()), Err(TrackError::Gone(gone)) if gone == pid));
    tracker.disarm();
    assert!(matches!(tracker.arm(), Err(TrackError::Gone(_))));
}

#[test]
fn memory_that_another_tracks_is_refused() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(4 << 20);
    let target = Target::new(&[&file], Vec::new());
    let (mut first, mut second) = (target.tracker(), target.tracker());
    first.arm().unwrap();
    let refused = second.arm().unwrap_err();
    assert!(matches!(&refused, TrackError::Busy(_)), "{refused}");
    first.disarm();
    second.arm().unwrap();
}

#[test]
fn a_busy_thread_goes_on_while_the_process_is_attached_to() {
    skip_unless!(is_root(), "needs root");
    let (file, control) = (RamFile::tmpfs(4 << 20), RamFile::tmpfs(PAGE));
    let vcpu: Background = Box::new(|maps: &[Map]| {
        let mut beats = 0;
        loop {
            beats += 1;
            maps[1].write_word(0, beats);
        }
    });
    let target = Target::new(&[&file, &control], vec![vcpu]);
    let beats = control.map();
    let mut tracker = UffdTracker::new(target.pid(), target.blocks[..1].to_vec()).unwrap();
    for _ in 0..50 {
        let before = beats.read_word(0);
        tracker.arm().unwrap();
        // It writes memory next to what is tracked, and never stops doing so.
        while beats.read_word(0) == before {
            std::hint::spin_loop();
        }
        tracker.disarm();
    }
}

#[test]
fn blocks_that_are_not_whole_pages_are_refused() {
    let pid = std::process::id() as i32;
    let block = |address, len, page_size| TrackedBlock {
        block: BlockId(0),
        address,
        len,
        page_size,
    };
    for wrong in [
        block(0x1000, 0, PAGE),
        block(0x1001, PAGE, PAGE),
        block(0x1000, PAGE + 1, PAGE),
        block(0x1000, PAGE, 0),
        block(0x1000, PAGE, 3000),
        block(0x1000, HUGE, HUGE),
        block(u64::MAX - PAGE + 1, PAGE, PAGE),
    ] {
        assert!(
            matches!(
                UffdTracker::new(pid, vec![wrong]),
                Err(TrackError::Memory(_))
            ),
            "{wrong:?}"
        );
    }
}
