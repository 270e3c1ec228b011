//! Which pages go next: cold ones now, hot ones later.
//!
//! A page found dirty by both of the last two scans is hot. It would be dirty again before the round is over, so it is
//! held back; when a scan does not find it, it has cooled down and goes. What is still held when the guest stops goes
//! then. Every page is in at most one of *to send* and *held*; a page in neither is at the destination as it was when it
//! was last found dirty.

use super::interface::Populated;
use crate::engine::bitmap::{Bitmap, Outside};
use crate::memory::{BlockId, BlockSpec, Run};

/// All pages of the guest, by what is to be done about them.
#[derive(Debug)]
pub(super) struct Pages {
    /// To send in this round.
    send: Bitmap,
    /// Hot: held back.
    held: Bitmap,
    /// Dirty in the scan before.
    last: Bitmap,
    /// Sent at least once: the destination may have something other than zeroes there.
    touched: Bitmap,
    /// Where a scan is put together; empty between two calls.
    scan: Bitmap,
    /// Pages of each block.
    sizes: Vec<u64>,
}

impl Pages {
    pub(super) fn new(specs: &[BlockSpec]) -> Pages {
        let empty = Bitmap::new(specs);
        Pages {
            send: empty.clone(),
            held: empty.clone(),
            last: empty.clone(),
            touched: empty.clone(),
            scan: empty,
            sizes: specs.iter().map(BlockSpec::pages).collect(),
        }
    }

    /// Round 0: everything that the RAM files hold.
    pub(super) fn populated(&mut self, runs: &[Run]) -> Result<(), Outside> {
        insert(&mut self.send, runs)
    }

    /// After a scan: sorts what is dirty into what goes and what is held. Returns the bytes that the scan found.
    pub(super) fn scanned(&mut self, dirty: &[Run]) -> Result<Scan, Outside> {
        insert(&mut self.scan, dirty)?;
        let found = Scan {
            pages: self.scan.pages(),
            bytes: self.scan.bytes(),
        };
        self.send.zip(
            [&mut self.held, &mut self.last, &mut self.scan],
            |send, [held, last, scan]| {
                let hot = *scan & *last;
                *send = (*send | *held | *scan) & !hot;
                (*held, *last, *scan) = (hot, *scan, 0);
            },
        );
        Ok(found)
    }

    /// When the guest stands still: everything dirty or held goes, and so does every page that was sent once and is a hole
    /// now (a balloon or free-page reporting punched it; no scan sees that). It goes as zero.
    pub(super) fn stopped(
        &mut self,
        dirty: &[Run],
        populated: &Populated,
    ) -> Result<Scan, Outside> {
        insert(&mut self.scan, dirty)?;
        let found = Scan {
            pages: self.scan.pages(),
            bytes: self.scan.bytes(),
        };
        self.send
            .zip([&mut self.held, &mut self.scan], |send, [held, scan]| {
                *send |= *held | *scan;
                (*held, *scan) = (0, 0);
            });
        // What is dirty besides goes in any case.
        if let Populated::Runs(populated) = populated {
            for (block, pages) in (0..).map(BlockId).zip(&self.sizes) {
                for hole in holes(block, *pages, populated) {
                    self.send.insert_common(hole, &self.touched)?;
                }
            }
        }
        Ok(found)
    }

    /// After [`stopped`](Self::stopped), with the same: takes those pages out that are in the RAM files; holes stay to be
    /// sent, as zero.
    pub(super) fn take_populated(
        &mut self,
        dirty: &[Run],
        populated: &Populated,
    ) -> Result<Bitmap, Outside> {
        let mut taken = self.scan.clone();
        let Populated::Runs(populated) = populated else {
            // Whatever is to be sent was listed at the start or found dirty since.
            std::mem::swap(&mut taken, &mut self.send);
            return Ok(taken);
        };
        for run in populated.iter().chain(dirty) {
            taken.insert_common(*run, &self.send)?;
        }
        self.send
            .zip([&mut taken], |send, [taken]| *send &= !*taken);
        Ok(taken)
    }

    /// Sends the hot pages after all: there is nothing else to send.
    pub(super) fn release_held(&mut self) {
        self.send.zip([&mut self.held], |send, [held]| {
            *send |= *held;
            *held = 0;
        });
    }

    /// Takes pages to send: their bits are cleared here, before they are read.
    pub(super) fn take(&mut self, max_runs: usize, max_bytes: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        self.send.take(max_runs, max_bytes, &mut runs);
        for run in &runs {
            // What was taken from one bitmap exists in the other.
            let inserted = self.touched.insert(*run);
            debug_assert_eq!(inserted, Ok(()));
        }
        runs
    }

    pub(super) fn send_bytes(&self) -> u64 {
        self.send.bytes()
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.held.bytes()
    }

    pub(super) fn held_pages(&self) -> u64 {
        self.held.pages()
    }

    pub(super) fn nothing_to_send(&self) -> bool {
        self.send.is_empty()
    }
}

/// How much a scan found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    pub(super) pages: u64,
    pub(super) bytes: u64,
}

fn insert(bitmap: &mut Bitmap, runs: &[Run]) -> Result<(), Outside> {
    runs.iter().try_for_each(|run| bitmap.insert(*run))
}

/// What is not populated of a block of `pages` pages, as runs in order.
fn holes(block: BlockId, pages: u64, populated: &[Run]) -> Vec<Run> {
    let mut held: Vec<Run> = populated
        .iter()
        .copied()
        .filter(|run| run.block == block)
        .collect();
    held.sort_unstable_by_key(|run| run.first);
    held.push(Run {
        block,
        first: pages,
        pages: 0,
    });
    let mut first = 0;
    let mut holes = Vec::new();
    for run in held {
        if run.first > first {
            holes.push(Run {
                block,
                first,
                pages: run.first - first,
            });
        }
        first = first.max(run.first.saturating_add(run.pages));
    }
    holes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn run(first: u64, pages: u64) -> Run {
        Run {
            block: BlockId(0),
            first,
            pages,
        }
    }

    fn pages() -> Pages {
        Pages::new(&[BlockSpec {
            name: "ram".into(),
            size: 100 * 4096,
            page_size: 4096,
        }])
    }

    #[test]
    fn a_page_dirty_twice_in_a_row_waits_and_goes_when_it_cools_down() {
        let mut pages = pages();
        pages.scanned(&[run(0, 10)]).unwrap();
        assert_eq!(pages.take(9, u64::MAX), [run(0, 10)]);
        pages.scanned(&[run(5, 10)]).unwrap();
        assert_eq!(
            (pages.held_pages(), pages.take(9, u64::MAX)),
            (5, vec![run(10, 5)])
        );
        pages.scanned(&[run(9, 1)]).unwrap();
        assert_eq!(
            (pages.held_pages(), pages.take(9, u64::MAX)),
            (1, vec![run(5, 4)])
        );
        pages.release_held();
        assert_eq!(
            (pages.held_pages(), pages.take(9, u64::MAX)),
            (0, vec![run(9, 1)])
        );
    }

    #[test]
    fn a_page_not_sent_yet_stays_to_be_sent() {
        let mut pages = pages();
        pages.populated(&[run(0, 4)]).unwrap();
        pages.scanned(&[]).unwrap();
        assert_eq!(pages.take(9, u64::MAX), [run(0, 4)]);
    }

    #[test]
    fn at_the_stop_held_dirty_and_punched_pages_go() {
        let mut pages = pages();
        pages.populated(&[run(0, 20)]).unwrap();
        pages.take(9, u64::MAX);
        pages.scanned(&[run(0, 2)]).unwrap();
        pages.take(9, u64::MAX);
        pages.scanned(&[run(0, 2)]).unwrap();
        // Pages 0 and 1 are held; 30 is dirty; 10 to 12 were sent and are holes now; 40 is a hole that was never sent.
        let populated = Populated::Runs(vec![run(0, 10), run(13, 20)]);
        pages.stopped(&[run(30, 1)], &populated).unwrap();
        assert_eq!(pages.take(9, u64::MAX), [run(0, 2), run(10, 3), run(30, 1)]);
        assert!(pages.nothing_to_send() && pages.held_pages() == 0);
    }

    /// Pages 0 to 19 were listed and sent, 50 and 51 were first written in a round and sent; 2 is held, 3 was not sent
    /// since it was dirty, and 70, a hole at the start, is first written just before the stop.
    fn about_to_stop() -> (Pages, [Run; 1]) {
        let mut pages = pages();
        pages.populated(&[run(0, 20)]).unwrap();
        pages.scanned(&[run(50, 2)]).unwrap();
        pages.take(9, u64::MAX);
        pages.scanned(&[run(2, 1)]).unwrap();
        pages.take(9, u64::MAX);
        pages.scanned(&[run(2, 2)]).unwrap();
        (pages, [run(70, 1)])
    }

    #[test]
    fn a_page_first_written_just_before_the_stop_goes_whether_or_not_the_list_has_it() {
        let old = Populated::Runs(vec![run(0, 20), run(50, 2)]);
        for populated in [Populated::NothingTaken, old] {
            let (mut pages, dirty) = about_to_stop();
            pages.stopped(&dirty, &populated).unwrap();
            assert_eq!(pages.take(9, u64::MAX), [run(2, 2), run(70, 1)]);
            let (mut pages, dirty) = about_to_stop();
            pages.stopped(&dirty, &populated).unwrap();
            let mut lacking = pages.take_populated(&dirty, &populated).unwrap();
            let mut runs = Vec::new();
            lacking.take(9, u64::MAX, &mut runs);
            assert_eq!(runs, [run(2, 2), run(70, 1)]);
            assert!(pages.nothing_to_send());
        }
    }

    #[test]
    fn with_post_copy_a_hole_is_sent_and_not_fetched() {
        let (mut pages, dirty) = about_to_stop();
        let punched = Populated::Runs(vec![run(0, 10), run(50, 1)]);
        pages.stopped(&dirty, &punched).unwrap();
        let lacking = pages.take_populated(&dirty, &punched).unwrap();
        assert_eq!(lacking.pages(), 3);
        assert_eq!(pages.take(9, u64::MAX), [run(10, 10), run(51, 1)]);
    }

    #[test]
    fn holes_are_what_is_between_the_runs_in_any_order() {
        let other = Run {
            block: BlockId(1),
            first: 0,
            pages: 100,
        };
        let populated = [run(50, 10), other, run(0, 10), run(5, 10), run(60, 40)];
        assert_eq!(holes(BlockId(0), 100, &populated), [run(15, 35)]);
        assert_eq!(holes(BlockId(0), 100, &[]), [run(0, 100)]);
        assert_eq!(
            holes(BlockId(0), 100, &[run(1, 98)]),
            [run(0, 1), run(99, 1)]
        );
    }

    #[test]
    fn a_run_outside_the_guest_is_refused() {
        assert_eq!(pages().scanned(&[run(99, 2)]), Err(Outside(run(99, 2))));
    }
}
