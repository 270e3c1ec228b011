//! The ioctl `PAGEMAP_SCAN` of `/proc/PID/pagemap` (`linux/fs.h`, since Linux 6.7).
//!
//! Both questions asked here have one category in the mask and the same one in the answer. For `WRITTEN` that matters:
//! the kernel then takes a path on which a page-table entry that is empty and carries no marker counts as written.
//! With more categories some kernels say nothing of such entries, and a page that was written and then reclaimed
//! would be lost.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::ioc;
use crate::host::process::open_proc;

/// Extents of one call: as many as the kernel collects before it copies them out. With more, the `walk_end` of a call that
/// copied out several times can be stale (seen on Linux 6.18: smaller than the end of the last extent reported), and
/// what it had reported would be reported again by the next call.
const EXTENTS: usize = 512;

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Category {
    /// `PAGE_IS_WRITTEN`: not write-protected.
    Written,
    /// `PAGE_IS_PRESENT`: mapped in the process's page table.
    Present,
}

/// Whether what was found is write-protected in the same step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Look only.
    Leave,
    /// `PM_SCAN_WP_MATCHING`: protect what is reported, atomically.
    Protect,
}

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = ioc(3, b'f', 16, size_of::<ScanArgs>());

const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(size_of::<ScanArgs>() == 96);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);

/// The page table of a process.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// Opens `/proc/PID/pagemap`.
    pub(crate) fn open(pid: i32) -> io::Result<Pagemap> {
        Ok(Pagemap(open_proc(pid, "pagemap")?))
    }

    /// Appends to `found` the extents of `range` (addresses in the process) that are in `category`, in order; neighbours
    /// are one extent. The range must be registered for asynchronous write-protection: `PermissionDenied` if not.
    pub(crate) fn scan(
        &self,
        range: Range<u64>,
        category: Category,
        then: Then,
        found: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        let mask = match category {
            Category::Written => PAGE_IS_WRITTEN,
            Category::Present => PAGE_IS_PRESENT,
        };
        let protect = if then == Then::Protect {
            PM_SCAN_WP_MATCHING
        } else {
            0
        };
        let mut extents = [PageRegion::default(); EXTENTS];
        let mut start = range.start;
        while start < range.end {
            let mut args = ScanArgs {
                size: size_of::<ScanArgs>() as u64,
                flags: PM_SCAN_CHECK_WPASYNC | protect,
                start,
                end: range.end,
                walk_end: 0,
                vec: extents.as_mut_ptr() as u64,
                vec_len: EXTENTS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: mask,
                category_anyof_mask: 0,
                return_mask: mask,
            };
            let filled = self.ioctl(&mut args)?;
            for extent in &extents[..filled] {
                push_merged(found, extent.start..extent.end);
            }
            let reported = extents[..filled].last().map_or(start, |extent| extent.end);
            let walked = args.walk_end.max(reported);
            if walked <= start {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            start = walked;
        }
        Ok(())
    }

    fn ioctl(&self, args: &mut ScanArgs) -> io::Result<usize> {
        // SAFETY: the structure's size is in the request's number and in its first field; `vec` and `vec_len` describe
        // the caller's array, which outlives the call and holds plain numbers.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(args)) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// Whether the kernel has the ioctl. Asked about a page of this process that is never mapped.
pub(crate) fn has_scan() -> io::Result<bool> {
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let pagemap = Pagemap::open(own)?;
    let scanned = pagemap.scan(0..4096, Category::Present, Then::Leave, &mut Vec::new());
    Ok(scanned.err().and_then(|error| error.raw_os_error()) != Some(libc::ENOTTY))
}

/// Appends `extent`, as part of the last one where they touch.
pub(crate) fn push_merged(extents: &mut Vec<Range<u64>>, extent: Range<u64>) {
    match extents.last_mut() {
        Some(last) if last.end == extent.start => last.end = extent.end,
        _ => extents.push(extent),
    }
}
