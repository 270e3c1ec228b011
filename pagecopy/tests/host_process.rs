//! What is found out about a process before its guest is moved.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]

mod host_support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use pagecopy::host::TrackError;
use pagecopy::host::process::{self, Process};

use host_support::{HUGE, HugePages, PAGE, RamFile, Target, is_root};

/// The text of a `Memory` error.
fn memory_error(result: Result<process::RamMapping, TrackError>) -> String {
    match result.unwrap_err() {
        TrackError::Memory(text) => text,
        other => panic!("another error: {other}"),
    }
}

#[test]
fn a_mapped_file_is_found_and_others_are_refused_with_the_reason() {
    skip_unless!(is_root(), "needs root");
    let (file, other) = (RamFile::tmpfs(4 << 20), RamFile::tmpfs(4 << 20));
    let target = Target::new(&[&file], Vec::new());
    let found = process::find_mapping(target.pid(), &file.path, 4 << 20).unwrap();
    assert_eq!(
        (found.address, found.len),
        (target.blocks[0].address, 4 << 20)
    );
    assert_eq!((found.page_size, &found.path), (PAGE, &file.path));

    let refused = |path: &Path, size| memory_error(process::find_mapping(target.pid(), path, size));
    assert!(refused(&file.path, 8 << 20).contains("4194304 bytes"));
    assert!(refused(&other.path, 4 << 20).contains("has not mapped"));
    assert!(refused(Path::new("/dev/shm"), 4 << 20).contains("directory"));
    assert!(refused(Path::new("/dev/shm/absent"), 4 << 20).contains("not there"));
    let on_disk = std::env::temp_dir().join(format!("pagecopy-test-disk-{}", std::process::id()));
    File::create(&on_disk).unwrap();
    let text = refused(&on_disk, 4096);
    fs::remove_file(&on_disk).unwrap();
    assert!(
        text.contains("/dev/shm") || text.contains("has not mapped"),
        "{text}"
    );

    assert!(matches!(
        process::find_mapping(i32::MAX, &file.path, 4 << 20),
        Err(TrackError::Gone(_))
    ));
}

#[test]
fn the_page_size_of_hugetlbfs_is_told() {
    skip_unless!(is_root(), "needs root");
    let Some(huge) = HugePages::reserve(2) else {
        return;
    };
    let file = RamFile::at(&huge.mount.0, 2 * HUGE, HUGE);
    let target = Target::new(&[&file], Vec::new());
    let found = process::find_mapping(target.pid(), &file.path, 2 * HUGE).unwrap();
    assert_eq!(found.page_size, HUGE);
}

#[test]
fn other_writers_of_guest_memory_are_named() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(1 << 20);
    let target = Target::new(&[&file], Vec::new());
    let mapping = process::find_mapping(target.pid(), &file.path, 1 << 20).unwrap();
    assert_eq!(process::other_writers(target.pid(), &mapping).unwrap(), []);
    // Seen from a process that is neither: the target is one.
    let others = process::other_writers(1, &mapping).unwrap();
    assert_eq!(
        others.iter().map(|writer| writer.pid).collect::<Vec<_>>(),
        [target.pid()]
    );
    assert!(!others[0].name.is_empty());
}

#[test]
fn devices_and_userfaultfds_are_counted() {
    let own = std::process::id() as i32;
    assert_eq!(
        process::assigned_devices(own).unwrap(),
        Vec::<PathBuf>::new()
    );
    assert_eq!(process::userfaultfds(own).unwrap(), 0);
}

#[test]
fn a_process_that_has_ended_is_known_as_such() {
    let mut short = std::process::Command::new("true").spawn().unwrap();
    let process = Process::open(short.id() as i32).unwrap();
    short.wait().unwrap();
    assert!(!process.is_alive());
    assert!(Process::open(std::process::id() as i32).unwrap().is_alive());
    assert!(matches!(Process::open(0), Err(TrackError::Gone(0))));
}
