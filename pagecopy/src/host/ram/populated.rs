//! What a RAM file really holds.
//!
//! On tmpfs `SEEK_DATA` and `SEEK_HOLE` tell. On hugetlbfs they do not (every byte counts as data there, measured on Linux
//! 6.18), `cachestat` refuses, and `mincore` only knows this process's own page table. What does tell is `UFFDIO_CONTINUE`: it
//! maps a page that the file has and answers `EFAULT` for one that it lacks, without ever allocating. It is asked once for
//! each huge page, on a mapping made for the purpose, so nothing else of this process ever faults there.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use super::MappedBlock;
use crate::host::seek::DataCursor;
use crate::host::sys::map::SharedMap;
use crate::host::sys::pagemap::push_merged;
use crate::host::sys::uffd::{self, Uffd};

impl MappedBlock {
    /// Calls `found` with each extent of the file that holds something, in order; neighbours are one.
    pub(super) fn populated(&self, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        if !self.is_huge() {
            return DataCursor::new(&self.file).each_in(0..self.spec.size, found);
        }
        match self.huge_pages(&mut found) {
            // Not permitted here, or an old kernel: all of it may hold something.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOSYS)
                ) =>
            {
                tracing::warn!(block = self.spec.name, %error, "holes on hugetlbfs cannot be listed; all of it is sent");
                found(0..self.spec.size);
                Ok(())
            }
            result => result,
        }
    }

    /// The pages that a file on hugetlbfs has. Nothing is reported unless all of them could be asked for.
    fn huge_pages(&self, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        // A range can be registered only where its descriptor would allow writing; nothing is written.
        let probe = SharedMap::new(self.file.as_fd(), self.map.len(), true)?;
        let base = probe.base() as u64;
        let uffd = Uffd::own()?;
        uffd.enable(uffd::FEATURE_MINOR_HUGETLBFS)?;
        uffd.register(&(base..base + self.spec.size), uffd::MODE_MINOR)?;
        let page = self.spec.page_size;
        let mut extents: Vec<Range<u64>> = Vec::new();
        for offset in (0..self.spec.size).step_by(usize::try_from(page).unwrap_or(usize::MAX)) {
            if uffd.map_present(&(base + offset..base + offset + page))? {
                push_merged(&mut extents, offset..offset + page);
            }
        }
        extents.into_iter().for_each(found);
        Ok(())
    }
}
