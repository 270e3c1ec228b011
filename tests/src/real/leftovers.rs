//! What a migration must not leave behind in a QEMU process or in a daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Panics if the process still has a userfaultfd, a write-protected or otherwise registered range, or a tracer.
pub fn assert_nothing_left_in(pid: u32) {
    if let Err(left) = nothing_left_in(pid) {
        panic!("{left}");
    }
}

/// Whether the process has no userfaultfd, no write-protected or otherwise registered range, and no tracer.
///
/// # Errors
/// In words, what it still has.
pub fn nothing_left_in(pid: u32) -> Result<(), String> {
    let proc = Path::new("/proc").join(pid.to_string());
    let descriptors: Vec<String> = fs::read_dir(proc.join("fd"))
        .expect("the process lives")
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.contains("userfaultfd"))
        .collect();
    if !descriptors.is_empty() {
        return Err(format!("QEMU still has {descriptors:?}"));
    }
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
    if registered > 0 {
        return Err(format!(
            "{registered} ranges of QEMU's memory are still registered with a userfaultfd"
        ));
    }
    let status = fs::read_to_string(proc.join("status")).expect("the process's state can be read");
    if !status.contains("TracerPid:\t0\n") {
        return Err("QEMU is still traced".to_owned());
    }
    if status.contains("State:\tT") || status.contains("State:\tt") {
        return Err("QEMU stands still".to_owned());
    }
    Ok(())
}

/// What a daemon holds: its descriptors by kind, and its threads but for the runtime's.
#[derive(Clone, Debug)]
pub struct Footprint {
    descriptors: BTreeMap<String, usize>,
    threads: Vec<String>,
    locks: usize,
    /// Where those threads stand: system call and stack, for whoever has to find out why one stays.
    #[expect(dead_code, reason = "it is printed")]
    stand: Vec<String>,
}

impl Footprint {
    /// Of the daemon with this process id, now.
    pub fn of(pid: u32) -> Footprint {
        let proc = Path::new("/proc").join(pid.to_string());
        let mut descriptors = BTreeMap::new();
        let links = fs::read_dir(proc.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for link in links.filter_map(|entry| fs::read_link(entry.path()).ok()) {
            let link = link.to_string_lossy().into_owned();
            let kind = link.split(":[").next().unwrap_or_default().to_owned();
            *descriptors.entry(kind).or_default() += 1;
        }
        let tasks = fs::read_dir(proc.join("task"))
            .into_iter()
            .flatten()
            .flatten();
        let mut threads = Vec::new();
        let mut stand = Vec::new();
        for task in tasks.map(|entry| entry.path()) {
            let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
            let name = read("comm").trim().to_owned();
            if !name.is_empty() && !name.starts_with("tokio") {
                stand.push(format!("{name}: {} {}", read("syscall"), read("stack")));
                threads.push(name);
            }
        }
        threads.sort();
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        let pid = pid.to_string();
        let locks = locks
            .lines()
            .filter(|line| line.split_whitespace().any(|word| word == pid))
            .count();
        Footprint {
            descriptors,
            threads,
            locks,
            stand,
        }
    }

    /// Whether this is no more than `before`, but for one socket: the harness's own that holds the daemon's steps.
    pub fn is_within(&self, before: &Footprint) -> bool {
        let fits = |(kind, count): (&String, &usize)| {
            let allowed = before.descriptors.get(kind).copied().unwrap_or(0);
            *count <= allowed + usize::from(kind == "socket")
        };
        self.descriptors.iter().all(fits)
            && self.threads == before.threads
            && self.locks == before.locks
    }
}
