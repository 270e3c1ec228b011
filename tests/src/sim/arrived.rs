//! The guest at the destination while it lacks pages: what its virtual processors touch waits until it is mapped.
//!
//! [`Pager`] is what the kernel and QEMU hold: it outlives every daemon, because a descriptor of the userfaultfd stays open
//! inside QEMU. Pages are numbered as at the source.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::Time;
use pagecopy::memory::{BlockId, BlockSpec};

use super::guest::Habits;
use super::ram::{SimRam, Words};
use super::rng::Rng;

/// The most touches that are made up for at once.
const MOST_AT_ONCE: u64 = 64;

/// Which pages can be touched without waiting.
#[derive(Debug)]
pub(super) struct Pager {
    /// While it is, only mapped pages can be touched.
    armed: bool,
    mapped: Vec<bool>,
    poisoned: Vec<bool>,
}

impl Pager {
    /// No page of `pages` is mapped any more.
    pub(super) fn new(pages: usize) -> Pager {
        Pager {
            armed: true,
            mapped: vec![false; pages],
            poisoned: vec![false; pages],
        }
    }

    /// Whether page faults wait.
    pub(super) fn armed(&self) -> bool {
        self.armed
    }

    /// Nothing waits any more.
    pub(super) fn release(&mut self) {
        self.armed = false;
    }

    /// Touching `page` waits no longer.
    pub(super) fn map(&mut self, page: usize) {
        self.mapped[page] = true;
    }

    /// Touching `page` is a memory error from now on.
    pub(super) fn poison(&mut self, page: usize) {
        self.poisoned[page] = true;
    }

    /// Whether the guest may have touched `page`.
    pub(super) fn is_mapped(&self, page: usize) -> bool {
        self.mapped[page]
    }

    /// Whether touching `page` does not wait.
    pub(super) fn open(&self, page: usize) -> bool {
        !self.armed || self.mapped[page] || self.poisoned[page]
    }
}

/// What a virtual processor waits for.
#[derive(Clone, Copy, Debug)]
struct Touch {
    page: usize,
    writes: bool,
}

/// The guest.
#[derive(Debug)]
pub(super) struct Arrived {
    source: Arc<SimRam>,
    ram: Arc<SimRam>,
    /// For each block of the source, the index of ours.
    order: Vec<usize>,
    rng: Rng,
    habits: Habits,
    lived_until: Time,
    /// In page-nanoseconds.
    owed: u128,
    processors: Vec<Option<Touch>>,
    /// What it has written here.
    own: BTreeMap<usize, Words>,
    next_page: usize,
    writes: u64,
    /// Touches that had to wait.
    pub(super) waited: u64,
}

impl Arrived {
    /// A guest that has not run here yet.
    pub(super) fn new(
        source: Arc<SimRam>,
        ram: Arc<SimRam>,
        order: Vec<usize>,
        rng: Rng,
        habits: Habits,
    ) -> Arrived {
        let processors = usize::try_from(habits.processors.max(1)).unwrap_or(1);
        Arrived {
            source,
            ram,
            order,
            rng,
            habits,
            lived_until: Time(0),
            owed: 0,
            processors: vec![None; processors],
            own: BTreeMap::new(),
            next_page: 0,
            writes: 0,
            waited: 0,
        }
    }

    /// The blocks, as the source numbers them.
    pub(super) fn specs(&self) -> Vec<BlockSpec> {
        self.source.specs()
    }

    /// A page's block and its number in it, as the source numbers them.
    pub(super) fn place_of(&self, page: usize) -> (usize, u64) {
        self.source.place_of(page)
    }

    /// The number of a page among all, the other way around.
    pub(super) fn number(&self, block: BlockId, index: u64) -> usize {
        self.source.number(block, index)
    }

    /// Bytes of a page.
    pub(super) fn page_size(&self, page: usize) -> u64 {
        self.source.page_size(page)
    }

    /// Lets time pass to `now`, with the processors running or not. Returns the page faults.
    ///
    /// # Errors
    /// The guest has read something else than what was there.
    pub(super) fn live_until(
        &mut self,
        now: Time,
        running: bool,
        pager: &Pager,
    ) -> Result<Vec<usize>, String> {
        let elapsed = now.since(self.lived_until).min(Duration::from_secs(1));
        self.lived_until = now;
        let mut faults = Vec::new();
        if !running || elapsed.is_zero() {
            return Ok(faults);
        }
        self.owed += elapsed.as_nanos() * u128::from(self.habits.touches);
        let due = u64::try_from(self.owed / 1_000_000_000).unwrap_or(u64::MAX);
        self.owed %= 1_000_000_000;
        for _ in 0..due.min(MOST_AT_ONCE) {
            let Some(free) = self.processors.iter().position(Option::is_none) else {
                break;
            };
            let touch = Touch {
                page: self.habits.pattern.next(
                    self.source.pages(),
                    &mut self.next_page,
                    &mut self.rng,
                ),
                writes: self.rng.chance(500),
            };
            if pager.open(touch.page) {
                self.touch(touch, pager)?;
            } else {
                self.waited += 1;
                self.processors[free] = Some(touch);
                faults.push(touch.page);
            }
        }
        Ok(faults)
    }

    /// Processors whose pages can be touched now go on.
    ///
    /// # Errors
    /// As [`live_until`](Self::live_until).
    pub(super) fn go_on(&mut self, pager: &Pager) -> Result<(), String> {
        for index in 0..self.processors.len() {
            if let Some(touch) = self.processors[index].filter(|touch| pager.open(touch.page)) {
                self.processors[index] = None;
                self.touch(touch, pager)?;
            }
        }
        Ok(())
    }

    /// The pages that processors wait for.
    pub(super) fn waits_for(&self) -> Vec<usize> {
        let waiting = self.processors.iter().flatten();
        waiting.map(|touch| touch.page).collect()
    }

    /// A page that is not what it must be, of those for which `is_here` says that they are here.
    pub(super) fn wrong_page(
        &self,
        pager: &Pager,
        is_here: impl Fn(usize) -> bool,
    ) -> Option<String> {
        (0..self.source.pages())
            .filter(|page| is_here(*page))
            .find_map(|page| self.check(page, pager).err())
    }

    fn touch(&mut self, touch: Touch, pager: &Pager) -> Result<(), String> {
        self.check(touch.page, pager)?;
        if !touch.writes || pager.poisoned[touch.page] {
            return Ok(());
        }
        self.writes += 1;
        let (block, index) = self.source.place_of(touch.page);
        let ours = self.order[block];
        let mut words = self.ram.words_of(ours, index);
        // A word that no source ever had.
        let slot = self.rng.index(words.len());
        words[slot] = u64::MAX - self.writes;
        self.ram.set_words_of(ours, index, &words);
        self.own.insert(touch.page, words);
        Ok(())
    }

    /// What is read is what the guest wrote here, or else what the source's page is.
    fn check(&self, page: usize, pager: &Pager) -> Result<(), String> {
        if pager.poisoned[page] {
            return Ok(());
        }
        let (block, index) = self.source.place_of(page);
        let ours = self.order[block];
        let right = match self.own.get(&page) {
            Some(words) => *words == self.ram.words_of(ours, index),
            None => self.source.same_page(block, &self.ram, ours, index),
        };
        if right {
            return Ok(());
        }
        let what = if self.own.contains_key(&page) {
            "what it has written there"
        } else {
            "the source's"
        };
        let words = self.ram.words_of(ours, index);
        let zero = if words == Words::default() {
            ", but zeroes"
        } else {
            ""
        };
        Err(format!("page {index} of block {block} is not {what}{zero}"))
    }
}
