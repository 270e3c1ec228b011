//! What no scan for dirty pages sees, and what makes the copy right all the same.
//!
//! Writes into pages that were pinned before they were protected (direct I/O in flight), holes (a balloon) and writes by
//! other processes (vhost-user). For each one: the gap is shown, then the rule that closes it, and that without the rule the
//! copy is wrong whenever the scan says nothing.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]

mod host_support;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use pagecopy::host::ram::MappedRam;
use pagecopy::host::{Placer, Ram, Tracker, process};
use pagecopy::limits::DIGEST_CHUNK;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use host_support::sys::{self, Map};
use host_support::{
    Command, FROM_DISK, HUGE, HugePages, PAGE, RamFile, Target, is_root, pages, populated, run,
    scan,
};

/// A page that the guest never writes itself.
const VICTIM: u64 = 9;

/// Pre-copy as the engine does it, without an engine: from one RAM file to another.
struct Transfer {
    source: MappedRam,
    destination: MappedRam,
    from: Map,
    to: Map,
    page: u64,
}

impl Transfer {
    fn new(source: &RamFile, destination: &RamFile) -> Transfer {
        let open = |file: &RamFile, writable| {
            MappedRam::open(&[(file.spec("ram"), file.path.clone())], writable).unwrap()
        };
        Transfer {
            source: open(source, false),
            destination: open(destination, true),
            from: source.map(),
            to: destination.map(),
            page: source.page_size,
        }
    }

    fn send(&self, runs: &[Run]) {
        let mut bytes = vec![0; self.page as usize];
        for (_, page) in pages(runs) {
            self.from.copy_out(page * self.page, &mut bytes);
            self.to.copy_in(page * self.page, &bytes);
        }
    }

    /// The last step with the guest stopped: what is a hole now becomes zero.
    fn send_holes(&self) {
        let populated = pages(&populated(&self.source));
        for first in 0..self.from.len() / self.page {
            if !populated.contains(&(0, first)) {
                self.destination.zero(run(0, first, 1)).unwrap();
            }
        }
    }

    /// The pages that differ, found as `--verify` finds them.
    fn differing(&self) -> Vec<u64> {
        let digests = |ram: &MappedRam| {
            let chunks = 0..self.from.len().div_ceil(DIGEST_CHUNK);
            chunks
                .flat_map(|chunk| ram.page_digests(BlockId(0), chunk))
                .collect::<Vec<_>>()
        };
        let (ours, theirs) = (digests(&self.source), digests(&self.destination));
        assert_eq!(ours.len(), theirs.len());
        (0..)
            .zip(ours.iter().zip(&theirs))
            .filter_map(|(page, (ours, theirs))| (ours != theirs).then_some(page))
            .collect()
    }
}

/// When a disk read starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Starts {
    BeforeTracking,
    InRoundZero,
}

/// Copies a guest with a disk read in flight when round 0 is read, or when the scan after it is made. With `ages` no page is
/// read before the I/O that was in flight has finished; without, it finishes once they have been read. Returns whether any
/// later scan reported the page that the disk wrote, and the pages that are wrong at the end.
fn copy_with_a_disk_read(
    file: &RamFile,
    other: &RamFile,
    starts: Starts,
    ages: bool,
) -> (bool, Vec<u64>) {
    let mut target = Target::new(&[file], Vec::new());
    target.write(0, 0, 12);
    let copy = Transfer::new(file, other);
    let start = Command::StartDiskRead {
        block: 0,
        page: VICTIM,
    };
    if starts == Starts::BeforeTracking {
        target.tell(start);
    }
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    let mut to_send = populated(&copy.source);
    if starts == Starts::InRoundZero {
        copy.send(&to_send);
        target.tell(start);
        to_send = scan(&mut tracker);
        // The rule rests on this: to pin a page for writing is to write it.
        assert!(pages(&to_send).contains(&(0, VICTIM)), "{to_send:?}");
    }
    if ages {
        target.tell(Command::FinishDiskRead);
    }
    copy.send(&to_send);
    if !ages {
        target.tell(Command::FinishDiskRead);
    }
    target.write(0, 3, 1);
    let last = scan(&mut tracker);
    assert!(pages(&last).contains(&(0, 3)));
    copy.send(&last);
    assert_eq!(copy.from.read_byte(VICTIM * copy.page), FROM_DISK);
    (pages(&last).contains(&(0, VICTIM)), copy.differing())
}

/// All four cases; `new` makes a RAM file.
fn disk_reads(new: impl Fn() -> RamFile) {
    for starts in [Starts::BeforeTracking, Starts::InRoundZero] {
        let (reported, wrong) = copy_with_a_disk_read(&new(), &new(), starts, true);
        println!("{starts:?}, waited for: reported again {reported}, wrong {wrong:?}");
        assert!(wrong.is_empty(), "{starts:?}: {wrong:?}");

        let (reported, wrong) = copy_with_a_disk_read(&new(), &new(), starts, false);
        println!("{starts:?}, not waited for: reported {reported}, wrong {wrong:?}");
        // Should a kernel ever report such a write, the copy is right without the rule, too.
        let expected: &[u64] = if reported { &[] } else { &[VICTIM] };
        assert_eq!(wrong, expected, "{starts:?}");
    }
}

#[test]
fn a_disk_read_in_flight_is_waited_for_before_its_page_is_read() {
    skip_unless!(is_root(), "needs root");
    disk_reads(|| RamFile::tmpfs(8 << 20));
}

#[test]
fn a_disk_read_in_flight_into_huge_pages_is_waited_for() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(64) else {
        return;
    };
    disk_reads(|| RamFile::at(&huge.mount.0, 16 * HUGE, HUGE));
}

/// How a page is taken out of the file.
#[derive(Clone, Copy, Debug)]
enum Punch {
    /// By the guest's process.
    Remove,
    /// By `fallocate`, as QEMU's balloon does for RAM in a file.
    Fallocate,
}

/// Copies a guest of which a page that was sent is punched out, and checks that the comparison of holes makes it right.
fn punched(file: &RamFile, other: &RamFile, punch: Punch) {
    let mut target = Target::new(&[file], Vec::new());
    target.write(0, 0, 12);
    let copy = Transfer::new(file, other);
    let taken = copy.source.watch().unwrap();
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    copy.send(&populated(&copy.source));
    target.write(0, 3, 1);
    assert_eq!(scan(&mut tracker), [run(0, 3, 1)]);
    copy.send(&[run(0, 3, 1)]);
    assert!(!taken.anything(), "a write through a mapping takes nothing");
    match punch {
        Punch::Remove => target.tell(Command::Discard {
            block: 0,
            page: VICTIM,
        }),
        Punch::Fallocate => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&file.file, flags, VICTIM * copy.page, copy.page).unwrap();
        }
    }
    assert!(taken.anything(), "{punch:?} is noticed at once");
    assert!(!taken.anything(), "and only once");
    let last = scan(&mut tracker);
    let reported = pages(&last).contains(&(0, VICTIM));
    assert!(
        !pages(&populated(&copy.source)).contains(&(0, VICTIM)),
        "the file is asked and has a hole"
    );
    // Nothing is sent of it, not even if it was reported: to read a hole would fill it.
    let without = copy.differing();
    println!("{punch:?}: reported {reported}, wrong without the holes {without:?}");
    assert_eq!(without, [VICTIM]);
    copy.send_holes();
    assert_eq!(copy.differing(), [] as [u64; 0]);
    assert_eq!(copy.to.read_byte(VICTIM * copy.page), 0);
}

#[test]
fn a_hole_punched_after_the_page_was_sent_is_found_by_comparing_holes() {
    skip_unless!(is_root(), "needs root");
    for punch in [Punch::Remove, Punch::Fallocate] {
        punched(&RamFile::tmpfs(8 << 20), &RamFile::tmpfs(8 << 20), punch);
    }
}

#[test]
fn a_hole_punched_into_huge_pages_is_found_by_comparing_holes() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(48) else {
        return;
    };
    let new = || RamFile::at(&huge.mount.0, 16 * HUGE, HUGE);
    for punch in [Punch::Remove, Punch::Fallocate] {
        punched(&new(), &new(), punch);
    }
}

/// Copies a guest that touches pages for the first time after the file was listed, up to the last scan: nothing was taken out,
/// so the file is not listed again, and the scans alone must tell of them.
fn first_touched(file: &RamFile, other: &RamFile, late: &[u64]) {
    let mut target = Target::new(&[file], Vec::new());
    target.write(0, 0, 4);
    let copy = Transfer::new(file, other);
    let taken = copy.source.watch().unwrap();
    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    copy.send(&populated(&copy.source));
    for page in late {
        target.write(0, *page, 1);
        let last = scan(&mut tracker);
        assert_eq!(pages(&last), [(0, *page)]);
        copy.send(&last);
        assert_eq!(copy.differing(), [] as [u64; 0]);
    }
    assert!(!taken.anything());
}

#[test]
fn pages_first_touched_just_before_the_stop_are_found_without_listing_the_file_again() {
    skip_unless!(is_root(), "needs root");
    let new = || RamFile::tmpfs(64 << 20);
    // Next to pages that it has, and far away, where the file has a large hole that was never protected.
    first_touched(&new(), &new(), &[5, 511, 512, 8192, 8193, 16383]);
}

#[test]
fn huge_pages_first_touched_just_before_the_stop_are_found_without_listing_the_file_again() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(48) else {
        return;
    };
    let new = || RamFile::at(&huge.mount.0, 16 * HUGE, HUGE);
    first_touched(&new(), &new(), &[5, 9, 15]);
}

/// The kernel tells nobody of what is taken out of a memfd through its own descriptor or through a mapping by it, so none is
/// watched, and the holes are found by listing them.
#[test]
fn a_memfd_of_which_the_kernel_does_not_tell_is_not_watched() {
    for name in ["guest", "huge"] {
        let flags = match name {
            "huge" => MemfdFlags::HUGETLB,
            _ => MemfdFlags::empty(),
        };
        let page_size = if name == "huge" { HUGE } else { PAGE };
        let Ok(memfd) = memfd_create(name, flags) else {
            continue; // No huge pages here.
        };
        let file = Arc::new(File::from(memfd));
        file.set_len(16 * page_size).unwrap();
        let map = Map::shared(file.as_fd(), 16 * page_size as usize);
        let spec = BlockSpec {
            name: name.into(),
            size: 16 * page_size,
            page_size,
        };
        let reopened = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        for file in [Arc::clone(&file), Arc::new(reopened)] {
            let ram = MappedRam::map([(spec.clone(), file)], false).unwrap();
            let refused = ram.watch().unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported, "{refused}");
        }
        if page_size == PAGE {
            let ram = MappedRam::map([(spec, Arc::clone(&file))], false).unwrap();
            (0..16).for_each(|page| map.write_byte(page * PAGE, 1));
            map.remove_pages(VICTIM * PAGE, PAGE);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&*file, flags, 3 * PAGE, PAGE).unwrap();
            assert_eq!(populated(&ram), [run(0, 0, 3), run(0, 4, 5), run(0, 10, 6)]);
        }
    }
}

#[test]
fn what_is_taken_out_of_any_block_by_any_means_is_noticed() {
    let (one, two) = (RamFile::tmpfs(1 << 20), RamFile::tmpfs(1 << 20));
    let open = |file: &RamFile| (file.spec("ram"), file.path.clone());
    let ram = MappedRam::open(&[open(&one), open(&two)], false).unwrap();
    let taken = ram.watch().unwrap();
    one.map().write_byte(0, 1);
    assert!(!taken.anything());
    // The name is of no matter: libvirt's and QEMU's own files have none any more.
    std::fs::remove_file(&two.path).unwrap();
    assert!(!taken.anything());
    two.file.set_len(4096).unwrap();
    assert!(taken.anything());
}

#[test]
fn a_second_process_that_writes_the_memory_is_found_because_its_writes_are_not() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(1 << 20);
    let mut target = Target::new(&[&file], Vec::new());
    target.write(0, 0, 12);
    let mapping = process::find_mapping(target.pid(), &file.path, file.size).unwrap();
    assert_eq!(process::other_writers(target.pid(), &mapping).unwrap(), []);

    let theirs = file.map();
    let second = sys::fork(move || {
        // Stopped by its own hand before and after it writes, so that the test knows.
        sys::stop_oneself();
        theirs.write_byte(VICTIM * PAGE, 0x99);
        sys::stop_oneself();
    });
    assert!(libc::WIFSTOPPED(second.wait(libc::WUNTRACED)));
    let writers = process::other_writers(target.pid(), &mapping).unwrap();
    let found: Vec<i32> = writers.iter().map(|writer| writer.pid).collect();
    assert_eq!(found, [second.pid]);

    let mut tracker = target.tracker();
    tracker.arm().unwrap();
    second.signal(libc::SIGCONT);
    assert!(libc::WIFSTOPPED(second.wait(libc::WUNTRACED)));
    assert_eq!(file.map().read_byte(VICTIM * PAGE), 0x99);
    let dirty = scan(&mut tracker);
    println!("written by another process: reported {dirty:?}");

    drop(second);
    assert_eq!(process::other_writers(target.pid(), &mapping).unwrap(), []);
}
