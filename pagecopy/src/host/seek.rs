//! Where a file on tmpfs has data and where it has holes (`lseek` with `SEEK_DATA` and `SEEK_HOLE`).
//!
//! `SEEK_DATA` costs a look-up. `SEEK_HOLE` walks every page from the offset to the hole (about 8 ms a GiB), so it is asked
//! only where the end of the data matters, and its answer is used up before it is asked again.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::limits::MIN_PAGE_SIZE;

/// Offset of the first data at or after `offset`; `None` when there is none up to the end of the file. A page that was
/// allocated but never written counts as a hole.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Walks through a file's data in one direction.
#[derive(Debug)]
pub(crate) struct DataCursor<'a> {
    file: &'a File,
    /// The data found last.
    data: Range<u64>,
}

impl<'a> DataCursor<'a> {
    /// A cursor that has seen nothing yet.
    pub(crate) fn new(file: &'a File) -> DataCursor<'a> {
        DataCursor { file, data: 0..0 }
    }

    /// The first piece of data inside `range`. Ranges asked for must ascend.
    pub(crate) fn first_in(&mut self, range: &Range<u64>) -> io::Result<Option<Range<u64>>> {
        if self.data.end <= range.start {
            let Some(start) = next_data(self.file, range.start)? else {
                self.data = u64::MAX..u64::MAX;
                return Ok(None);
            };
            if start >= range.end {
                // How far it goes is not asked yet: nobody may want to know.
                return Ok(None);
            }
            let end = rustix::fs::seek(self.file, SeekFrom::Hole(start))?;
            // The page may have been punched out between the two calls: what was data a moment ago counts as data.
            self.data = start..end.max(start + MIN_PAGE_SIZE);
        }
        let (start, end) = (
            self.data.start.max(range.start),
            self.data.end.min(range.end),
        );
        Ok((start < end).then_some(start..end))
    }

    /// Calls `found` with each piece of data inside `range`, in order. Ranges asked for must ascend.
    pub(crate) fn each_in(
        &mut self,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut rest = range;
        while rest.start < rest.end {
            let Some(data) = self.first_in(&rest)? else {
                break;
            };
            rest.start = data.end;
            found(data);
        }
        Ok(())
    }
}
