//! What a destination fetches next in post-copy, and what a page fault gets for an answer.
//!
//! The guest runs here already, and its source only answers. So one side decides: each page is *claimed* once, fetched,
//! placed, marked as received, and then mapped. A page is lacking, on its way, or here, and nothing else; what the kernel says
//! of the file (that it has the page) does not count, for a page may be there in part while its bytes still arrive.
//!
//! Three kinds of requests, in this order always: pages that somebody waits for ([`Class::Demand`]), their neighbours
//! ([`Class::Neighbour`], see [`window`](self)), and the rest in the order of the addresses ([`Class::Rest`]).
//!
//! ```text
//! driver: a page fault        ──▶ fault()    Map: it is here, map it. Fetch, Wait: it will come
//!         a channel has room  ──▶ next()     what to read, and under which number; the rest as much as `Pace` lets go
//!         a read has ended    ──▶ arrived()  mark these pages as received, then map them (but the held one)
//!         the connection ends ──▶ lost()     what was on its way lacks again; call it when nothing can arrive any more
//! ```

pub mod pace;
mod window;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use self::window::Windows;
pub use self::window::{MAX_WINDOW_BYTES, Prefetched};
use super::bitmap::{Bitmap, Outside};
use crate::limits::{MAX_BATCH_BYTES, MAX_RUNS};
use crate::memory::{BlockId, BlockSpec, Run};

/// How urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// Near what somebody waited for.
    Neighbour,
    /// Everything else.
    Rest,
}

/// Pages to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names it in [`Puller::arrived`].
    pub id: u64,
    /// How urgent it is.
    pub class: Class,
    /// At most `MAX_RUNS` runs and `MAX_BATCH_BYTES` bytes, of one block.
    pub runs: Vec<Run>,
}

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The page is here: map it now.
    Map,
    /// It will be fetched: [`Puller::next`] gives it before all else.
    Fetch,
    /// It is on its way.
    Wait,
}

/// Pages that have come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Mark these as received, then map them, but for `held`.
    pub runs: Vec<Run>,
    /// This page stays unmapped until it is touched: the fault, which costs no fetching, tells that neighbours fetched
    /// ahead are of use.
    pub held: Option<(BlockId, u64)>,
}

/// Decides what is fetched next.
#[derive(Clone, Debug)]
pub struct Puller {
    /// Neither here nor claimed.
    lacking: Bitmap,
    /// Claimed: to be requested, or on their way.
    claimed: Bitmap,
    demand: VecDeque<Run>,
    neighbours: VecDeque<Run>,
    flights: BTreeMap<u64, Request>,
    next_id: u64,
    /// Pages that somebody waits for: as many as there are threads at most.
    waited_for: BTreeSet<(BlockId, u64)>,
    windows: Windows,
    page_sizes: Vec<u64>,
}

impl Puller {
    /// A guest of these RAMBlocks that lacks these pages.
    ///
    /// # Errors
    /// [`Outside`]: a run does not exist.
    pub fn new(specs: &[BlockSpec], lacking: &[Run]) -> Result<Puller, Outside> {
        let mut bitmap = Bitmap::new(specs);
        for run in lacking {
            bitmap.insert(*run)?;
        }
        Ok(Puller::of(specs, bitmap))
    }

    /// A guest of these RAMBlocks that lacks what is in `lacking`, a bitmap of the same guest.
    pub fn of(specs: &[BlockSpec], lacking: Bitmap) -> Puller {
        Puller {
            lacking,
            claimed: Bitmap::new(specs),
            demand: VecDeque::new(),
            neighbours: VecDeque::new(),
            flights: BTreeMap::new(),
            next_id: 0,
            waited_for: BTreeSet::new(),
            windows: Windows::new(specs),
            page_sizes: specs.iter().map(|spec| spec.page_size).collect(),
        }
    }

    /// Somebody waits for a page. One that does not exist is answered like one that is here.
    pub fn fault(&mut self, block: BlockId, page: u64) -> Answer {
        if !self.lacking.contains(block, page) {
            if let Some(ahead) = self.windows.touched(block, page) {
                self.claim_neighbours(ahead);
            }
            if !self.claimed.contains(block, page) {
                return Answer::Map;
            }
            self.waited_for.insert((block, page));
            return if self.promote(block, page) {
                Answer::Fetch
            } else {
                Answer::Wait
            };
        }
        self.waited_for.insert((block, page));
        let wanted = Run {
            block,
            first: page,
            pages: 1,
        };
        let mut claimed = Vec::new();
        self.claim(wanted, &mut claimed);
        self.demand.extend(claimed);
        if let Some(around) = self.windows.missed(block, page) {
            self.claim_neighbours(around);
        }
        Answer::Fetch
    }

    /// Somebody waits now for a page that was to be fetched with its neighbours. False: it was requested already.
    fn promote(&mut self, block: BlockId, page: u64) -> bool {
        let has = |run: &Run| run.block == block && (run.first..run.end()).contains(&page);
        let Some(at) = self.neighbours.iter().position(has) else {
            return false;
        };
        let Some(run) = self.neighbours.remove(at) else {
            return false;
        };
        for (first, end) in [(page + 1, run.end()), (run.first, page)] {
            if first < end {
                self.neighbours.insert(
                    at,
                    Run {
                        block,
                        first,
                        pages: end - first,
                    },
                );
            }
        }
        self.demand.push_back(Run {
            block,
            first: page,
            pages: 1,
        });
        true
    }

    /// The next request of class `class` or a more urgent one; `None` when there is none now.
    pub fn next(&mut self, class: Class) -> Option<Request> {
        self.next_within(class, MAX_BATCH_BYTES)
    }

    /// The same; what nobody waits for, and is near nothing that somebody waited for, in requests of at most `most` bytes
    /// (but at least one page): see [`Pace`](pace::Pace).
    pub fn next_within(&mut self, class: Class, most: u64) -> Option<Request> {
        let (class, runs) = if let Some(run) = self.demand.pop_front() {
            (Class::Demand, vec![run])
        } else if let Some(run) = self.neighbours.pop_front_if(|_| class >= Class::Neighbour) {
            (Class::Neighbour, vec![run])
        } else if class == Class::Rest {
            let mut runs = Vec::new();
            self.lacking
                .take(MAX_RUNS, most.min(MAX_BATCH_BYTES), &mut runs);
            self.note_claimed(&runs);
            (Class::Rest, runs)
        } else {
            return None;
        };
        self.request(class, runs)
    }

    /// The next request of those that nobody waits for, of about `bytes` bytes at most; `None` when there is none now. For
    /// channels behind whose queues nobody is to wait.
    pub fn next_ahead(&mut self, bytes: u64) -> Option<Request> {
        if let Some(mut run) = self.neighbours.pop_front() {
            let most = (bytes / self.page_size(run.block).max(1)).max(1);
            if run.pages > most {
                self.neighbours.push_front(Run {
                    first: run.first + most,
                    pages: run.pages - most,
                    ..run
                });
                run.pages = most;
            }
            return self.request(Class::Neighbour, vec![run]);
        }
        let mut runs = Vec::new();
        let most = bytes.min(MAX_BATCH_BYTES);
        self.lacking.take(MAX_RUNS, most, &mut runs);
        self.note_claimed(&runs);
        self.request(Class::Rest, runs)
    }

    fn request(&mut self, class: Class, runs: Vec<Run>) -> Option<Request> {
        if runs.is_empty() {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        let request = Request { id, class, runs };
        self.flights.insert(id, request.clone());
        Some(request)
    }

    /// All bytes of a request are placed. `None` when it is not (or no longer) known.
    pub fn arrived(&mut self, id: u64) -> Option<Arrival> {
        let Request { runs, .. } = self.flights.remove(&id)?;
        let mut gone = Vec::new();
        for run in &runs {
            self.claimed.take_within(*run, &mut gone);
        }
        let held = runs.iter().find_map(|run| {
            let mut held = self.windows.held_in(*run);
            held.find(|page| !self.waited_for.contains(page))
        });
        for run in &runs {
            let (first, end) = ((run.block, run.first), (run.block, run.end()));
            let served: Vec<_> = self.waited_for.range(first..end).copied().collect();
            for page in served {
                self.waited_for.remove(&page);
            }
        }
        Some(Arrival { runs, held })
    }

    /// The connection is gone and nothing of it can arrive any more: what was claimed lacks again. Who waited is to be told
    /// to fault anew (`UFFDIO_WAKE`).
    pub fn lost(&mut self) {
        let flights = std::mem::take(&mut self.flights);
        let asked = flights.into_values().flat_map(|request| request.runs);
        let queued = self.demand.drain(..).chain(self.neighbours.drain(..));
        for run in asked.chain(queued) {
            // It was taken out of the same bitmap.
            let _ = self.lacking.insert(run);
        }
        self.claimed.clear();
        self.waited_for.clear();
        self.windows.forget();
    }

    /// Whether every page is here.
    pub fn is_whole(&self) -> bool {
        self.lacking.is_empty() && self.claimed.is_empty()
    }

    /// Bytes that are not here yet: for these the guest still depends on its source.
    pub fn lacking_bytes(&self) -> u64 {
        self.lacking.bytes() + self.claimed.bytes()
    }

    /// Bytes that were requested and have not arrived.
    pub fn flying_bytes(&self) -> u64 {
        let runs = self.flights.values().flat_map(|request| &request.runs);
        runs.map(|run| run.pages * self.page_size(run.block)).sum()
    }

    /// How useful neighbours were so far.
    pub fn prefetched(&self) -> Prefetched {
        self.windows.figures()
    }

    fn page_size(&self, block: BlockId) -> u64 {
        self.page_sizes
            .get(usize::from(block.0))
            .copied()
            .unwrap_or(0)
    }

    fn claim_neighbours(&mut self, around: Run) {
        let mut claimed = Vec::new();
        self.claim(around, &mut claimed);
        self.neighbours.extend(claimed);
    }

    /// Takes what of `wanted` lacks.
    fn claim(&mut self, wanted: Run, claimed: &mut Vec<Run>) {
        self.lacking.take_within(wanted, claimed);
        self.note_claimed(claimed);
    }

    fn note_claimed(&mut self, runs: &[Run]) {
        for run in runs {
            // It was taken out of a bitmap of the same guest.
            let _ = self.claimed.insert(*run);
        }
    }
}

#[cfg(test)]
mod tests;
