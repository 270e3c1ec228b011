//! Neighbours of page faults: a guest that touches a page that it lacks soon touches those beside it.
//!
//! As in the kernel's read-ahead (`mm/readahead.c`), a fault opens a *window* around its page, and one page of the window,
//! the *held* one, stays unmapped when it has come. If the guest gets there, the window was right: the next one, twice as
//! large, is fetched before the guest arrives at it. If it never does, nothing more is fetched for it. Several windows are
//! open at once, for several vCPUs and several streams of each.

use crate::memory::{BlockId, BlockSpec, Run};

/// Bytes of the first window of a stream, on each side of the page.
const FIRST_WINDOW_BYTES: u64 = 32 << 10;
/// Bytes of the largest window.
pub const MAX_WINDOW_BYTES: u64 = 1 << 20;
/// Streams that are followed at once: at least one for each vCPU of a large guest.
const MAX_STREAMS: usize = 512;

/// How useful neighbours were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// Windows that were fetched around page faults, or ahead of them.
    pub windows: u64,
    /// Those of them that the guest then got to.
    pub hits: u64,
}

/// Where a guest is going.
#[derive(Clone, Copy, Debug)]
struct Stream {
    block: BlockId,
    /// Its last window: first page, and the one behind the last.
    first: u64,
    end: u64,
    /// Pages of it.
    size: u64,
    /// Towards lower addresses.
    backwards: bool,
    /// The page that tells.
    held: Option<u64>,
    /// When it was last of use, counted in faults.
    used: u64,
}

/// All streams of a guest.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    streams: Vec<Stream>,
    /// Of each block: pages, and pages of the first and of the largest window.
    limits: Vec<(u64, u64, u64)>,
    clock: u64,
    figures: Prefetched,
}

impl Windows {
    pub(super) fn new(specs: &[BlockSpec]) -> Windows {
        let of = |spec: &BlockSpec| {
            let pages_of = |bytes: u64| bytes / spec.page_size;
            (
                spec.pages(),
                pages_of(FIRST_WINDOW_BYTES),
                pages_of(MAX_WINDOW_BYTES),
            )
        };
        Windows {
            streams: Vec::new(),
            limits: specs.iter().map(of).collect(),
            clock: 0,
            figures: Prefetched::default(),
        }
    }

    pub(super) fn figures(&self) -> Prefetched {
        self.figures
    }

    /// Forgets all streams: what they held will be fetched anew.
    pub(super) fn forget(&mut self) {
        self.streams.clear();
    }

    /// A page that lacks was touched: its neighbours. None where pages are so large that a window has none.
    pub(super) fn missed(&mut self, block: BlockId, page: u64) -> Option<Run> {
        let &(pages, first_window, most) = self.limits.get(usize::from(block.0))?;
        if first_window == 0 {
            return None;
        }
        self.clock += 1;
        // A guest that has run past its window, or jumped over a part of it, is still the same stream.
        let follows = |stream: &&mut Stream| {
            stream.block == block
                && if stream.backwards {
                    page < stream.first && page + stream.size >= stream.first
                } else {
                    page >= stream.end && page <= stream.end + stream.size
                }
        };
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            stream.used = self.clock;
            stream.size = (stream.size * 2).min(most);
            self.figures.hits += 1;
            let from = if stream.backwards { page } else { page + 1 };
            return stream.advance(from, pages, &mut self.figures);
        }
        let stream = Stream {
            block,
            first: page.saturating_sub(first_window),
            end: page.saturating_add(1 + first_window).min(pages),
            size: first_window,
            backwards: self.goes_down(block, page),
            held: None,
            used: self.clock,
        };
        self.open(page, stream)
    }

    /// A page that is here was touched. If it is one that tells, the guest goes on as foreseen: what it will want next.
    pub(super) fn touched(&mut self, block: BlockId, page: u64) -> Option<Run> {
        let &(pages, _, most) = self.limits.get(usize::from(block.0))?;
        let stream = self
            .streams
            .iter_mut()
            .find(|stream| stream.block == block && stream.held == Some(page))?;
        self.clock += 1;
        stream.used = self.clock;
        stream.size = (stream.size * 2).min(most);
        self.figures.hits += 1;
        let from = if stream.backwards {
            stream.first
        } else {
            stream.end
        };
        stream.advance(from, pages, &mut self.figures)
    }

    /// The pages of `run` that may stay unmapped.
    pub(super) fn held_in(&self, run: Run) -> impl Iterator<Item = (BlockId, u64)> {
        let here = move |stream: &&Stream| stream.block == run.block;
        let held = self
            .streams
            .iter()
            .filter(here)
            .filter_map(|stream| stream.held);
        held.filter(move |page| (run.first..run.end()).contains(page))
            .map(move |page| (run.block, page))
    }

    /// A new stream at `page`, in the place of the one that has been of no use for longest.
    fn open(&mut self, page: u64, mut stream: Stream) -> Option<Run> {
        stream.held = if stream.backwards {
            page.checked_sub(1).filter(|page| *page >= stream.first)
        } else {
            Some(page + 1).filter(|page| *page < stream.end)
        };
        self.figures.windows += 1;
        let window = stream.window();
        if self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = stream;
        }
        window
    }

    /// Whether the fault before this one was just above it.
    fn goes_down(&self, block: BlockId, page: u64) -> bool {
        self.streams.iter().any(|stream| {
            stream.block == block
                && stream.used + 1 == self.clock
                && page < stream.first
                && page + 2 * stream.size >= stream.first
        })
    }
}

impl Stream {
    /// The window from `from` on (or down to it), of its size; the page that tells is its first.
    fn advance(&mut self, from: u64, pages: u64, figures: &mut Prefetched) -> Option<Run> {
        (self.first, self.end) = if self.backwards {
            (from.saturating_sub(self.size), from)
        } else {
            (from.min(pages), from.saturating_add(self.size).min(pages))
        };
        let window = self.window();
        self.held = window.map(|run| {
            if self.backwards {
                run.end() - 1
            } else {
                run.first
            }
        });
        figures.windows += u64::from(window.is_some());
        window
    }

    fn window(&self) -> Option<Run> {
        (self.first < self.end).then(|| Run {
            block: self.block,
            first: self.first,
            pages: self.end - self.first,
        })
    }
}
