//! What a migration must not leave behind in a QEMU process.

use std::fs;
use std::path::Path;

/// Panics if the process still has a userfaultfd, a write-protected or otherwise registered range, or a tracer.
pub fn assert_nothing_left_in(pid: u32) {
    let proc = Path::new("/proc").join(pid.to_string());
    let descriptors: Vec<String> = fs::read_dir(proc.join("fd"))
        .expect("the process lives")
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.contains("userfaultfd"))
        .collect();
    assert!(descriptors.is_empty(), "QEMU still has {descriptors:?}");

    let smaps = fs::read_to_string(proc.join("smaps")).expect("the process's maps can be read");
    // uw, um, ui: registered with a userfaultfd for write-protection, missing or minor faults.
    let registered = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"))
        .filter(|flags| {
            flags
                .split_whitespace()
                .any(|flag| ["uw", "um", "ui"].contains(&flag))
        })
        .count();
    assert_eq!(
        registered, 0,
        "ranges of QEMU's memory are still registered with a userfaultfd"
    );

    let status = fs::read_to_string(proc.join("status")).expect("the process's state can be read");
    assert!(status.contains("TracerPid:\t0\n"), "QEMU is still traced");
    assert!(
        !status.contains("State:\tT") && !status.contains("State:\tt"),
        "QEMU stands still"
    );
}
