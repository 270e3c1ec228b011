//! Stretches of a guest's RAM, and how they are shared out among pagers.

use std::ops::Range;

use super::PagerError;
use crate::host::TrackError;
use crate::host::track::TrackedBlock;
use crate::memory::Run;

/// Some of a RAMBlock, as QEMU has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which pages.
    pub run: Run,
    /// Address of the first, in QEMU.
    pub address: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

impl Stretch {
    /// Its addresses.
    pub(super) fn range(&self) -> Range<u64> {
        self.address..self.address + self.run.pages * self.page_size
    }

    /// Addresses of those pages of `run` that it has.
    pub(super) fn part(&self, run: Run) -> Option<Range<u64>> {
        let first = run.first.max(self.run.first);
        let end = run.first.saturating_add(run.pages).min(self.run.end());
        let at = |page: u64| self.address + (page - self.run.first) * self.page_size;
        (run.block == self.run.block && first < end).then(|| at(first)..at(end))
    }

    /// Its addresses in pieces of at most `len` bytes, a multiple of the page size.
    pub(super) fn pieces(&self, len: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let Range { start, end } = self.range();
        let count = (end - start).div_ceil(len);
        (0..count).map(move |index| {
            let from = start + index * len;
            from..end.min(from + len)
        })
    }
}

/// Shares the RAM of `blocks` out among `shares` pagers, in stretches of about the same number of bytes each. A guest with
/// many vCPUs is served better by several: one userfaultfd serves 150 to 200 thousand faults a second.
pub fn share_out(blocks: &[TrackedBlock], shares: usize) -> Vec<Vec<Stretch>> {
    let count = u64::try_from(shares.max(1)).unwrap_or(1);
    let bytes: u64 = blocks.iter().map(|block| block.len).sum();
    let share = bytes.div_ceil(count).max(1);
    let mut all = vec![Vec::new()];
    let mut left = share;
    for block in blocks {
        let pages = block.len / block.page_size;
        let mut first = 0;
        while first < pages {
            if left == 0 {
                all.push(Vec::new());
                left = share;
            }
            let take = left.div_ceil(block.page_size).min(pages - first);
            if let Some(last) = all.last_mut() {
                last.push(Stretch {
                    run: Run {
                        block: block.block,
                        first,
                        pages: take,
                    },
                    address: block.address + first * block.page_size,
                    page_size: block.page_size,
                });
            }
            first += take;
            left = left.saturating_sub(take * block.page_size);
        }
    }
    all
}

/// Puts stretches in the order of their addresses; none may be empty, cut a page, or overlap another.
pub(super) fn check(stretches: &mut [Stretch]) -> Result<(), PagerError> {
    stretches.sort_unstable_by_key(|stretch| stretch.address);
    let mut end = 0;
    for stretch in &*stretches {
        let page = stretch.page_size;
        let bytes = stretch.run.pages.checked_mul(page);
        let whole = page.is_power_of_two()
            && stretch.run.pages != 0
            && stretch.address.is_multiple_of(page)
            && stretch.address >= end
            && bytes.is_some_and(|bytes| stretch.address.checked_add(bytes).is_some());
        if !whole {
            return Err(TrackError::Memory(format!(
                "pages {} to {} of block {} at {:#x} are no stretch of whole pages of {page} bytes that is theirs alone",
                stretch.run.first,
                stretch.run.first.saturating_add(stretch.run.pages),
                stretch.run.block.0,
                stretch.address
            ))
            .into());
        }
        end = stretch.range().end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::memory::BlockId;

    fn block(number: u16, address: u64, pages: u64, page_size: u64) -> TrackedBlock {
        TrackedBlock {
            block: BlockId(number),
            address,
            len: pages * page_size,
            page_size,
        }
    }

    #[test]
    fn all_ram_is_shared_out_once() {
        let blocks = [
            block(0, 0x10_0000, 1000, 4096),
            block(1, 0x4000_0000, 7, 2 << 20),
            block(2, 0x8000_0000, 1, 4096),
        ];
        let bytes: u64 = blocks.iter().map(|block| block.len).sum();
        for shares in [1, 2, 3, 5, 16, 10_000] {
            let all = share_out(&blocks, shares);
            assert!(all.len() <= shares);
            let mut pages: Vec<(u16, u64)> = all
                .iter()
                .flatten()
                .flat_map(|stretch| {
                    (stretch.run.first..stretch.run.end()).map(|page| (stretch.run.block.0, page))
                })
                .collect();
            let count = pages.len();
            pages.sort_unstable();
            pages.dedup();
            assert_eq!((count, pages.len()), (1008, 1008), "{shares} shares");
            let largest = all
                .iter()
                .map(|share| share.iter().map(|s| s.run.pages * s.page_size).sum::<u64>())
                .max();
            // At most one page more than a fair share.
            assert!(largest.unwrap() <= bytes.div_ceil(shares as u64) + (2 << 20));
            for mut share in all {
                check(&mut share).unwrap();
            }
        }
    }

    #[test]
    fn stretches_that_overlap_or_cut_pages_are_refused() {
        let whole = share_out(&[block(0, 0x10_0000, 16, 4096)], 1).remove(0);
        check(&mut whole.clone()).unwrap();
        assert!(check(&mut [whole[0], whole[0]]).is_err());
        let cut = Stretch {
            address: whole[0].address + 1,
            ..whole[0]
        };
        assert!(check(&mut [cut]).is_err());
    }

    #[test]
    fn a_part_is_what_both_have() {
        let stretch = Stretch {
            run: Run {
                block: BlockId(3),
                first: 10,
                pages: 10,
            },
            address: 0x10_0000,
            page_size: 4096,
        };
        let part = |block, first, pages| {
            stretch.part(Run {
                block: BlockId(block),
                first,
                pages,
            })
        };
        assert_eq!(part(3, 0, 100), Some(stretch.range()));
        assert_eq!(part(3, 19, 5), Some(0x10_9000..0x10_A000));
        assert_eq!(part(3, 20, 5), None);
        assert_eq!(part(2, 10, 5), None);
        assert_eq!(part(3, 15, u64::MAX), Some(0x10_5000..0x10_A000));
    }
}
