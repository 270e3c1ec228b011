//! What a host has of what is needed: kernel, privileges, locked memory, free memory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use pagecopy::host::features::{self, Lacking};
use pagecopy::preflight::{Line, Whose};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::qemu::{Block, Guest};
use crate::units::show_bytes;

/// Less than this is no limit that somebody wanted. Since Linux 5.12 io_uring's rings do not count against it.
const LOCKED: u64 = 1 << 20;

/// The kernel, the privileges and the limits of this host.
pub(super) fn lines(side: Whose) -> Vec<Line> {
    vec![
        kernel(side, features::lacking()),
        privileges(side),
        locked_memory(side, getrlimit(Resource::Memlock).current),
    ]
}

/// Which boot of which kernel this is. Empty where it is not told.
pub(super) fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

fn kernel(side: Whose, lacking: io::Result<Lacking>) -> Line {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let remedy = "use Linux 6.7 or later with userfaultfd";
    let lacking = match lacking {
        Ok(lacking) => lacking,
        Err(error) => {
            let found = format!("Linux {release}: userfaultfd cannot be asked: {error}");
            return Line::warn("kernel", side, found, remedy);
        }
    };
    let found = |what: &[&str]| format!("Linux {release} lacks {}", what.join(", "));
    match side {
        Whose::Source if !lacking.tracking.is_empty() => {
            Line::fail("kernel", side, found(&lacking.tracking), remedy)
        }
        Whose::Destination if !lacking.faults.is_empty() => {
            let found = format!("{}: no post-copy", found(&lacking.faults));
            Line::warn("kernel", side, found, remedy)
        }
        _ => Line::pass(
            "kernel",
            side,
            format!("Linux {release} has what is needed"),
        ),
    }
}

fn privileges(side: Whose) -> Line {
    let permitted = capabilities(None).map_or(CapabilitySet::empty(), |all| all.permitted);
    if permitted.contains(CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH) {
        let found = "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";
        return Line::pass("privileges", side, found);
    }
    Line::warn(
        "privileges",
        side,
        "pagecopyd lacks CAP_SYS_PTRACE or CAP_DAC_READ_SEARCH: only a QEMU of its own user can be looked into, if that",
        "start pagecopyd by its unit, or as root",
    )
}

fn locked_memory(side: Whose, limit: Option<u64>) -> Line {
    match limit {
        None => Line::pass("memlock", side, "unlimited"),
        Some(bytes) if bytes >= LOCKED => Line::pass("memlock", side, show_bytes(bytes)),
        Some(bytes) => Line::warn(
            "memlock",
            side,
            format!(
                "pagecopyd may lock {}, and should be able to lock {}",
                show_bytes(bytes),
                show_bytes(LOCKED)
            ),
            "LimitMEMLOCK=infinity in the daemon's unit raises it (`ulimit -l unlimited` in a shell)",
        ),
    }
}

/// Whether the destination has room for a guest of `ram` bytes, by the QEMU that waits for it if there is one, and `margin`
/// beside it.
pub(super) fn memory(guest: Option<&Guest>, ram: u64, margin: u64) -> Vec<Line> {
    let blocks = guest.map_or(&[][..], |guest| guest.blocks.as_slice());
    let need = if blocks.is_empty() {
        ram
    } else {
        blocks.iter().map(lacks).sum()
    };
    let mut lines = vec![match available() {
        Ok(available) => free_memory(need, margin, available),
        Err(error) => Line::warn(
            "memory",
            Whose::Destination,
            format!("how much is free cannot be read: {error}"),
            "let pagecopyd read /proc/meminfo",
        ),
    }];
    lines.extend(file_systems(blocks));
    lines
}

/// What a RAMBlock does not have yet. A huge page is QEMU's from the moment on in which it maps the file.
fn lacks(block: &Block) -> u64 {
    if block.spec.page_size > 4096 {
        return 0;
    }
    let held = block
        .mapping
        .file
        .metadata()
        .map_or(0, |data| data.blocks() * 512);
    block.spec.size.saturating_sub(held)
}

fn free_memory(need: u64, margin: u64, available: u64) -> Line {
    let found = format!(
        "the guest takes {} more, {} are free (margin {})",
        show_bytes(need),
        show_bytes(available),
        show_bytes(margin)
    );
    if need == 0 || available >= need.saturating_add(margin) {
        return Line::pass("memory", Whose::Destination, found);
    }
    Line::fail(
        "memory",
        Whose::Destination,
        found,
        "free memory on the destination, choose another, or lower memory-margin in its configuration",
    )
}

/// Whether the file systems of RAM files have room: tmpfs takes half of the memory where nothing else is said.
fn file_systems(blocks: &[Block]) -> Vec<Line> {
    let mut needs: BTreeMap<u64, (u64, &Block)> = BTreeMap::new();
    for block in blocks.iter().filter(|block| block.spec.page_size == 4096) {
        needs.entry(block.mapping.device).or_insert((0, block)).0 += lacks(block);
    }
    let full = |(need, block): (u64, &Block)| {
        let system = rustix::fs::fstatvfs(&block.mapping.file).ok()?;
        let room = system.f_bavail.saturating_mul(system.f_frsize);
        // One without a limit says that it has no blocks at all.
        (system.f_blocks > 0 && room < need).then(|| {
            Line::fail(
                "memory",
                Whose::Destination,
                format!(
                    "the guest takes {} more, and the file system of {} has room for {}",
                    show_bytes(need),
                    block.mapping.path.display(),
                    show_bytes(room)
                ),
                "make it larger (mount -o remount,size=SIZE on a tmpfs)",
            )
        })
    };
    needs.into_values().filter_map(full).collect()
}

/// Memory that this host could give without swapping.
fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| io::Error::other("there is no MemAvailable in /proc/meminfo"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagecopy::preflight::Verdict;

    #[test]
    fn memory_is_enough_with_its_margin_or_not() {
        let verdict = |need, margin, available| free_memory(need, margin, available).verdict;
        assert_eq!(verdict(10, 2, 12), Verdict::Pass);
        assert_eq!(verdict(10, 2, 11), Verdict::Fail);
        assert_eq!(verdict(u64::MAX, 2, u64::MAX - 1), Verdict::Fail);
        // All of it is there already.
        assert_eq!(verdict(0, 2, 1), Verdict::Pass);
        assert!(available().is_ok_and(|bytes| bytes > 0));
    }

    #[test]
    fn what_a_kernel_lacks_matters_where_it_is_used() {
        let lacking = || {
            Ok(Lacking {
                tracking: vec!["PAGEMAP_SCAN"],
                faults: vec!["UFFD_FEATURE_MINOR_SHMEM"],
            })
        };
        let source = kernel(Whose::Source, lacking());
        assert!(source.found.contains("PAGEMAP_SCAN"), "{source:?}");
        assert_eq!(source.verdict, Verdict::Fail);
        assert_eq!(kernel(Whose::Destination, lacking()).verdict, Verdict::Warn);
        let unknown = kernel(Whose::Source, Err(io::Error::other("no")));
        assert_eq!(unknown.verdict, Verdict::Warn);
    }

    #[test]
    fn locked_memory_is_enough_or_not() {
        let verdict = |limit| locked_memory(Whose::Source, limit).verdict;
        assert_eq!(verdict(None), Verdict::Pass);
        assert_eq!(verdict(Some(LOCKED)), Verdict::Pass);
        assert_eq!(verdict(Some(64 << 10)), Verdict::Warn);
    }
}
