//! The simulated guest: writes its RAM while it runs, gives pages back, and lets disks write into pinned pages.
//!
//! The guest lives between the events of the agenda: before each of them it does all that it had time for since the one
//! before. So a run costs no more events when the guest writes faster.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::Time;
use serde::{Deserialize, Serialize};

use super::ram::SimRam;
use super::rng::Rng;

/// Where a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Pattern {
    /// Any page.
    Uniform,
    /// Mostly a few pages.
    HotSpot {
        /// Pages in it.
        pages: usize,
    },
    /// One page after the other, around.
    Sequential,
}

impl Pattern {
    /// The next of so many pages to be written. `last` is where a sequential guest was.
    pub(super) fn next(self, pages: usize, last: &mut usize, rng: &mut Rng) -> usize {
        match self {
            Pattern::HotSpot { pages: hot } if rng.chance(950) => rng.index(hot.clamp(1, pages)),
            Pattern::Uniform | Pattern::HotSpot { .. } => rng.index(pages),
            Pattern::Sequential => {
                *last = (*last + 1) % pages;
                *last
            }
        }
    }
}

/// How a guest behaves. Rates are pages (or operations) a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Habits {
    /// Where it writes.
    pub(super) pattern: Pattern,
    /// Pages written.
    pub(super) writes: u64,
    /// Pages given back, which become holes unseen.
    pub(super) punches: u64,
    /// Disk reads into pinned pages.
    pub(super) reads: u64,
    /// The longest that such a read takes, in microseconds.
    pub(super) longest_read_us: u64,
    /// Of a hundred pages, how many the guest has touched before the migration.
    pub(super) touched_percent: u64,
    /// Virtual processors that touch pages at the destination while it lacks some.
    pub(super) processors: u64,
    /// Pages touched there, each to be read or written.
    pub(super) touches: u64,
}

impl Default for Habits {
    /// All of its memory was touched once, and it does nothing.
    fn default() -> Habits {
        Habits {
            pattern: Pattern::Uniform,
            writes: 0,
            punches: 0,
            reads: 0,
            longest_read_us: 1_000,
            touched_percent: 100,
            processors: 1,
            touches: 1_000,
        }
    }
}

/// A disk read in flight: the page is pinned, and is written at `lands`.
#[derive(Clone, Copy, Debug)]
struct Read {
    page: usize,
    lands: Time,
}

/// What the guest does at a rate, with what it is owed of it.
#[derive(Debug, Default)]
struct Rate {
    /// In page-nanoseconds: a page is due at each 10^9.
    owed: u128,
}

impl Rate {
    /// How many are due after `elapsed` at `per_second`, at most `most`.
    fn due(&mut self, per_second: u64, elapsed: Duration, most: u64) -> u64 {
        self.owed += elapsed.as_nanos() * u128::from(per_second);
        let due = u64::try_from(self.owed / 1_000_000_000).unwrap_or(u64::MAX);
        self.owed %= 1_000_000_000;
        due.min(most)
    }
}

/// The guest, with its virtual disk.
#[derive(Debug)]
pub(super) struct Guest {
    ram: Arc<SimRam>,
    rng: Rng,
    habits: Habits,
    lived_until: Time,
    /// Percent of its time for which it is kept from writing.
    pub(super) throttled: u32,
    writes: Rate,
    punches: Rate,
    reads: Rate,
    next_page: usize,
    in_flight: VecDeque<Read>,
}

impl Guest {
    /// A guest that has run for a while, up to `now`.
    pub(super) fn new(ram: Arc<SimRam>, mut rng: Rng, habits: Habits, now: Time) -> Guest {
        for page in 0..ram.pages() {
            if rng.chance(habits.touched_percent * 10) {
                if rng.chance(30) {
                    ram.write_zeroes(page);
                } else {
                    ram.write(page, u64::MAX, true);
                }
            }
        }
        Guest {
            ram,
            rng,
            habits,
            lived_until: now,
            throttled: 0,
            writes: Rate::default(),
            punches: Rate::default(),
            reads: Rate::default(),
            next_page: 0,
            in_flight: VecDeque::new(),
        }
    }

    /// Lets time pass to `now`, with the virtual processors running or not. Disk reads land either way.
    pub(super) fn live_until(&mut self, now: Time, running: bool) {
        let elapsed = now.since(self.lived_until);
        if elapsed.is_zero() {
            return;
        }
        self.land_reads(now);
        if running {
            self.run(now, elapsed);
        }
        self.lived_until = now;
    }

    /// When the last of the disk reads in flight lands; `None` when there is none.
    pub(super) fn reads_end(&self) -> Option<Time> {
        self.in_flight.iter().map(|read| read.lands).max()
    }

    fn run(&mut self, now: Time, elapsed: Duration) {
        let most = 2 * self.ram.pages() as u64;
        let writing = elapsed * 100u32.saturating_sub(self.throttled) / 100;
        for _ in 0..self.writes.due(self.habits.writes, writing, most) {
            let pages = self.ram.pages();
            let page = self
                .habits
                .pattern
                .next(pages, &mut self.next_page, &mut self.rng);
            // Often only part of a page changes, so that a copy may be torn.
            let mask = if self.rng.chance(500) {
                u64::MAX
            } else {
                self.rng.bits()
            };
            if self.rng.chance(20) {
                self.ram.write_zeroes(page);
            } else {
                self.ram.write(page, mask | 1 << self.rng.below(8), true);
            }
        }
        for _ in 0..self.punches.due(self.habits.punches, elapsed, most) {
            let page = self.rng.index(self.ram.pages());
            if self.in_flight.iter().all(|read| read.page != page) {
                self.ram.punch(page);
            }
        }
        for _ in 0..self.reads.due(self.habits.reads, elapsed, 8) {
            let page = self.rng.index(self.ram.pages());
            self.ram.pin(page);
            let longest = self.habits.longest_read_us.max(20);
            let lands = now.after(self.rng.micros(20, longest));
            self.in_flight.push_back(Read { page, lands });
        }
    }

    fn land_reads(&mut self, now: Time) {
        if self.in_flight.iter().all(|read| read.lands > now) {
            return;
        }
        let (landed, waiting) = self
            .in_flight
            .iter()
            .copied()
            .partition(|read: &Read| read.lands <= now);
        self.in_flight = waiting;
        let landed: VecDeque<Read> = landed;
        for read in landed {
            self.ram.write(read.page, u64::MAX, false);
        }
    }
}
