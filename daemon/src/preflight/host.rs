//! What a host has of what is needed: kernel, privileges, locked memory.

use std::fs;
use std::io;

use pagecopy::host::features::{self, Lacking};
use pagecopy::preflight::{Line, Whose};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

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

#[cfg(test)]
mod tests {
    use super::*;
    use pagecopy::preflight::Verdict;

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
