//! One scan of a range: which pages were written, with exactly those protected again.
//!
//! 1. Look, without protecting: which extents are not protected?
//! 2. Leave out large holes of the file. Nothing was ever written there; they stay unprotected, and without page tables,
//!    until something is.
//! 3. Protect the rest, in windows around it that are no larger than need be (each call with protection drops KVM's
//!    second-level mappings of its whole window). What *these* calls report is what was written.
//! 4. Drop what is a hole of the file all the same (small ones, next to data). The file is asked *after* the protection: a page
//!    written before it is in the file, and one written after it is reported by the next scan.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::host::seek::{DataCursor, next_data};
use crate::host::sys::pagemap::{Category, Pagemap, Then, push_merged};

/// What a page table of 4 KiB pages spans: holes of whole chunks are left alone.
pub(super) const CHUNK: u64 = 2 << 20;
/// Extents closer than this are protected by one call at first.
const NEAR: u64 = 64 << 10;
/// The largest window of one protecting call.
const MAX_WINDOW: u64 = 64 << 20;
/// With more windows than this, nearness is taken more generously, so that calls do not cost more than what they spare.
const MANY_WINDOWS: usize = 8192;

/// Scans one block.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    pagemap: &'a Pagemap,
    /// Where the file begins in QEMU.
    base: u64,
    /// The file, when it can be asked for holes.
    file: Option<&'a File>,
}

impl<'a> Scanner<'a> {
    /// A scanner of the block at address `base`.
    pub(super) fn new(pagemap: &'a Pagemap, base: u64, file: Option<&'a File>) -> Scanner<'a> {
        Scanner {
            pagemap,
            base,
            file,
        }
    }

    /// Appends what was written in `range` (addresses in QEMU) since it was last reported, and protects it.
    pub(super) fn scan(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut written = Vec::new();
        self.pagemap
            .scan(range, Category::Written, Then::Leave, &mut written)?;
        let sparse = self
            .file
            .filter(|_| !written.is_empty())
            .filter(|file| has_holes(file));
        if let Some(file) = sparse {
            written = self.without_large_holes(file, written)?;
        }
        let windows = windows(&written);
        let mut reported = Vec::new();
        for window in &windows {
            self.pagemap.scan(
                window.clone(),
                Category::Written,
                Then::Protect,
                &mut reported,
            )?;
        }
        match sparse {
            Some(file) => self.without_holes(file, &windows, reported),
            None => Ok(reported),
        }
    }

    /// Step 2.
    fn without_large_holes(
        &self,
        file: &File,
        written: Vec<Range<u64>>,
    ) -> io::Result<Vec<Range<u64>>> {
        let mut rest = Vec::with_capacity(written.len());
        for extent in written {
            let mut start = extent.start;
            while start < extent.end {
                // Up to here a chunk cannot be left out as a whole: the extent starts inside it, or ends inside it.
                let chunk = self.chunk_after(start);
                if !(start - self.base).is_multiple_of(CHUNK) || chunk > extent.end {
                    push_merged(&mut rest, start..chunk.min(extent.end));
                    start = chunk;
                    continue;
                }
                let Some(data) = next_data(file, start - self.base)? else {
                    break;
                };
                let data = self.base + data;
                if data >= extent.end {
                    break;
                }
                // The data's own chunk is taken whole, so that its small holes get markers and are not found again.
                start = self.chunk_after(data) - CHUNK;
                let end = extent.end.min(start + CHUNK);
                push_merged(&mut rest, start..end);
                start = end;
            }
        }
        Ok(rest)
    }

    /// The end of the chunk in which `address` is.
    fn chunk_after(&self, address: u64) -> u64 {
        address - (address - self.base) % CHUNK + CHUNK
    }

    /// Step 4. What is mapped in QEMU is data; only of the rest is the file asked.
    fn without_holes(
        &self,
        file: &File,
        windows: &[Range<u64>],
        reported: Vec<Range<u64>>,
    ) -> io::Result<Vec<Range<u64>>> {
        let mut present = Vec::new();
        for window in windows {
            self.pagemap
                .scan(window.clone(), Category::Present, Then::Leave, &mut present)?;
        }
        let mut present = present.into_iter().peekable();
        let mut cursor = DataCursor::new(file);
        let mut dirty = Vec::with_capacity(reported.len());
        for extent in reported {
            let mut start = extent.start;
            while start < extent.end {
                while present.next_if(|mapped| mapped.end <= start).is_some() {}
                let mapped = present.peek().cloned().unwrap_or(u64::MAX..u64::MAX);
                if mapped.start <= start {
                    let end = extent.end.min(mapped.end);
                    push_merged(&mut dirty, start..end);
                    start = end;
                    continue;
                }
                let end = extent.end.min(mapped.start);
                cursor.each_in(start - self.base..end - self.base, |data| {
                    push_merged(&mut dirty, self.base + data.start..self.base + data.end);
                })?;
                start = end;
            }
        }
        Ok(dirty)
    }
}

/// Whether a file may have holes: it has fewer blocks than bytes.
fn has_holes(file: &File) -> bool {
    file.metadata()
        .map_or(true, |data| data.blocks().saturating_mul(512) < data.size())
}

/// Windows around `extents`, for step 3.
fn windows(extents: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut near = NEAR;
    loop {
        let mut windows: Vec<Range<u64>> = Vec::new();
        for extent in extents {
            match windows.last_mut() {
                Some(last)
                    if extent.start - last.end <= near && extent.end - last.start <= MAX_WINDOW =>
                {
                    last.end = extent.end;
                }
                _ => windows.extend(super::pieces(extent.clone(), MAX_WINDOW)),
            }
        }
        if windows.len() <= MANY_WINDOWS || near >= MAX_WINDOW {
            return windows;
        }
        near *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_extent_in_order_and_stay_bounded() {
        let near: Vec<Range<u64>> = (0..50_000)
            .map(|n| n * 0x9000..n * 0x9000 + 0x1000)
            .collect();
        let far: Vec<Range<u64>> = (0..50_000).map(|n| n << 20..(n << 20) + 0x1000).collect();
        let whole = std::iter::once(0..1 << 33).collect();
        for extents in [near, far, whole] {
            let windows = windows(&extents);
            assert!(
                windows
                    .iter()
                    .all(|window| window.end - window.start <= MAX_WINDOW)
            );
            assert!(windows.windows(2).all(|pair| pair[0].end <= pair[1].start));
            let covered = |extent: &Range<u64>| {
                let first = windows.partition_point(|window| window.end <= extent.start);
                windows[first].start <= extent.start
                    && (windows[first].end >= extent.end
                        || windows.last().map(|last| last.end) == Some(extent.end))
            };
            assert!(extents.iter().all(covered));
        }
    }

    #[test]
    fn windows_do_not_reach_over_wide_gaps() {
        let extents = [0..0x1000, 0x2000..0x3000, 0x10_0000..0x10_1000];
        assert_eq!(windows(&extents), [0..0x3000, 0x10_0000..0x10_1000]);
    }

    #[test]
    fn many_far_extents_make_a_bounded_number_of_calls() {
        let far: Vec<Range<u64>> = (0..50_000).map(|n| n << 17..(n << 17) + 0x1000).collect();
        assert!(windows(&far).len() <= MANY_WINDOWS);
    }
}
