//! What this host's kernel has of what is needed: asked of the kernel itself, for a version says little of a distribution's.

use std::io;

use super::sys::pagemap::has_scan;
use super::sys::uffd::{
    FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM, FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM,
    FEATURE_THREAD_ID, FEATURE_WP_ASYNC, FEATURE_WP_HUGETLBFS_SHMEM, FEATURE_WP_UNPOPULATED, Uffd,
};

/// What tracking needs.
const TRACKING: [(u64, &str); 3] = [
    (
        FEATURE_WP_HUGETLBFS_SHMEM,
        "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
    ),
    (FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED"),
    (FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC"),
];
/// What serving page faults needs.
const FAULTS: [(u64, &str); 5] = [
    (FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM"),
    (FEATURE_MISSING_HUGETLBFS, "UFFD_FEATURE_MISSING_HUGETLBFS"),
    (FEATURE_MINOR_SHMEM, "UFFD_FEATURE_MINOR_SHMEM"),
    (FEATURE_MINOR_HUGETLBFS, "UFFD_FEATURE_MINOR_HUGETLBFS"),
    (FEATURE_THREAD_ID, "UFFD_FEATURE_THREAD_ID"),
];

/// What the kernel lacks, by name; nothing where it has all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lacking {
    /// To track a guest's writes, at the source.
    pub tracking: Vec<&'static str>,
    /// To serve its page faults, at the destination of a post-copy.
    pub faults: Vec<&'static str>,
}

/// Asks the kernel. Nothing is registered, and no privilege is needed.
///
/// # Errors
/// It has no userfaultfd at all, or this process may not make one.
pub fn lacking() -> io::Result<Lacking> {
    let features = Uffd::for_questions()?.features()?;
    let lacks = |wanted: &[(u64, &'static str)]| {
        let missing = wanted.iter().filter(|(bit, _)| features & bit == 0);
        missing.map(|(_, name)| *name).collect::<Vec<_>>()
    };
    let mut lacking = Lacking {
        tracking: lacks(&TRACKING),
        faults: lacks(&FAULTS),
    };
    if !has_scan()? {
        lacking.tracking.push("PAGEMAP_SCAN");
    }
    Ok(lacking)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The tests of tracking need them, too.
    #[test]
    fn this_kernel_has_what_the_tests_need() {
        assert_eq!(lacking().unwrap(), Lacking::default());
    }
}
