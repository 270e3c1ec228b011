//! Shared mappings of guest memory, read and written by copies through raw pointers only.
//!
//! Others (the guest, QEMU, the kernel) write this memory at any time, so no reference into it ever exists. Every access is
//! volatile or a `memcpy` whose result is taken as "some bytes": a torn page is harmless, for its dirty bit is set again.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::zero;

/// Taking a mapping away takes the kernel some 60 ms for each GiB of it that was read. One of fewer bytes is not worth a thread.
const LARGE: usize = 256 << 20;

/// A whole file mapped `MAP_SHARED`; unmapped on drop, or soon after where that takes long: whoever lets go of it last may
/// have other things to do.
#[derive(Debug)]
pub(crate) struct SharedMap {
    map: ManuallyDrop<MmapRaw>,
    writable: bool,
}

impl SharedMap {
    /// Maps the first `len` bytes of `file`, left out of core dumps. Reserves nothing: on hugetlbfs QEMU's own mapping did.
    pub(crate) fn new(file: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<SharedMap> {
        let mut options = MmapOptions::new();
        options.len(len).no_reserve_swap();
        let map = if writable {
            options.map_raw(file.as_raw_fd())?
        } else {
            options.map_raw_read_only(file.as_raw_fd())?
        };
        // Only a courtesy to whoever collects core dumps; old kernels may refuse it.
        let _ = map.advise(Advice::DontDump);
        Ok(SharedMap {
            map: ManuallyDrop::new(map),
            writable,
        })
    }

    /// First address.
    pub(crate) fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Whether it may be written to.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Copies the bytes from `offset` on into `into`.
    ///
    /// # Panics
    /// When they are not inside the mapping.
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(&(offset..offset.saturating_add(into.len())));
        // SAFETY: `at` checked that the source is inside the mapping, which lives as long as `self`; the target is a
        // private slice, so the two do not overlap.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len()) }
    }

    /// Copies `bytes` to `offset`. Their pages must be in the file already, as for [`SharedMap::fill_zero`].
    ///
    /// # Panics
    /// When they are not inside the mapping, or the mapping is read-only.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(self.writable, "bytes are written to writable mappings only");
        let at = self.at(&(offset..offset.saturating_add(bytes.len())));
        // SAFETY: `at` checked that the target is inside the mapping, which is writable and lives as long as `self`; the
        // source is a private slice, so the two do not overlap.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) }
    }

    /// Whether all bytes of `range` are zero now.
    ///
    /// # Panics
    /// When it is not inside the mapping.
    pub(crate) fn is_zero(&self, range: Range<usize>) -> bool {
        let from = self.at(&range);
        // SAFETY: `at` checked that the range is inside the mapping, which lives as long as `self`.
        unsafe { zero::is_zero(from, range.len()) }
    }

    /// Writes zeroes to `range`. Its pages must be in the file already: where a page would have to be allocated and
    /// cannot be, the kernel raises SIGBUS.
    ///
    /// # Panics
    /// When the range is not inside the mapping, or the mapping is read-only.
    pub(crate) fn fill_zero(&self, range: Range<usize>) {
        assert!(
            self.writable,
            "zeroes are written to writable mappings only"
        );
        let at = self.at(&range);
        // SAFETY: `at` checked that the range is inside the mapping, which is writable and lives as long as `self`.
        unsafe { ptr::write_bytes(at, 0, range.len()) }
    }

    /// Allocates and maps the pages of `range` as a write to each would (`MADV_POPULATE_WRITE`); contents stay.
    pub(crate) fn populate_write(&self, range: Range<usize>) -> io::Result<()> {
        self.map
            .advise_range(Advice::PopulateWrite, range.start, range.len())
    }

    /// Address of a range that is inside the mapping.
    fn at(&self, range: &Range<usize>) -> *mut u8 {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "outside the mapping"
        );
        self.base().wrapping_add(range.start)
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: it is taken once, here, and nothing uses it after that.
        let map = unsafe { ManuallyDrop::take(&mut self.map) };
        if map.len() >= LARGE {
            // Without a thread it is unmapped here: an error drops what was to be run.
            let _ = std::thread::Builder::new()
                .name("unmap".to_owned())
                .spawn(move || drop(map));
        }
    }
}
