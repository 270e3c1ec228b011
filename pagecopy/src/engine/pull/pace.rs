//! How much of the background is on its way at once: enough to keep the link full, and so little that a page which
//! somebody waits for finds no queue before it.
//!
//! Demand faults have a channel of their own and go first in every queue of both hosts, but not in those of the network
//! between them: what was asked for before lies there before them. So the background keeps these queues short. What a page
//! fault would find there is measured by what takes the same way: now and then a single page is fetched on the channel of
//! the demand faults, a *probe*, and those faults themselves are probes too. What most of a few probes take longer than the
//! shortest ever did is the queue, as in TCP Vegas. The window of bytes on their way is doubled at first and then grown while
//! that wait is short, and shrunk when it is long:
//!
//! ```text
//!   no wait        ─── short ───┤ keep ├─── long ───▶ a probe's wait behind the background
//!   double, later grow                     shrink until the wait is in the middle
//! ```
//!
//! Replies come in bursts, for a network card and its driver carry 64 KiB as one, and so do the requests that follow them.
//! What is asked for between two bursts finds no queue, however long it is otherwise. So a probe is sent at any moment, not
//! when a reply has come, and neither the quickest nor the slowest of them counts, but the one in the middle.
//!
//! A page that is touched while it is on its way with others comes with them. So a reply of the background may not take
//! long either, which limits the window where there is no queue to see: between processors of one host, say.
//!
//! Once in a while the window is small for a moment, so that the queue empties and the shortest probe is measured anew: the
//! path may have become another.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::Time;
use crate::limits::{MAX_BATCH_BYTES, MIN_PAGE_SIZE};

/// Bytes on their way at least (but always a page of each channel): 130 us of 1 Gbit/s. With four times as much a page fault
/// there took eight times as long as alone, and the link was as full.
pub const MIN_WINDOW_BYTES: u64 = 16 << 10;
/// Bytes on their way at first.
const FIRST_WINDOW_BYTES: u64 = 64 << 10;
/// Bytes on their way at most: 100 Gbit/s over 20 ms.
pub const MAX_WINDOW_BYTES: u64 = 256 << 20;
/// The smallest request.
const MIN_REQUEST_BYTES: u64 = 4 << 10;
/// So many requests make a channel's share of the window: while one is answered, the others keep the link full.
const REQUESTS: u64 = 4;
/// A wait below this is no queue but a host that was busy…
const NOISE: Duration = Duration::from_micros(30);
/// …and one above this is a queue.
const QUEUE: Duration = Duration::from_micros(90);
/// A reply of the background takes about so long at most, or four times the shortest probe…
const REPLY: Duration = Duration::from_micros(250);
/// …unless so few bytes are on their way that a host is slow, and not the way.
const REPLY_WINDOW_BYTES: u64 = 256 << 10;
/// How often there is a probe at most…
const PROBE_EVERY: Duration = Duration::from_millis(1);
/// …which fetches this share of what the background does at most, where pages are large.
const PROBE_SHARE: u64 = 16;
/// Of so many probes at least, and so many at most, the one in the middle counts.
const PROBES: [usize; 2] = [5, 31];
/// The golden ratio's part: its multiples are spread over a turn as evenly as can be.
const TURN: f64 = 0.618_033_988_749_895;
/// So long a stretch of time tells what the way carries: in a shorter one a limit may let a burst through.
const STRETCH: Duration = Duration::from_millis(10);
/// How often the shortest probe is measured anew.
const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// The background's window, for all channels of a connection together.
#[derive(Clone, Debug)]
pub struct Pace {
    channels: u64,
    page_bytes: u64,
    window: u64,
    /// The shortest probe: what a page fault takes that waits for nothing.
    base: Option<Duration>,
    /// The window has not met a queue yet.
    doubles: bool,
    measuring: Measuring,
    measured_at: Time,
    carried: Carried,
    probed: Probed,
    /// When the next probe is sent, and at which part of the time of a reply it was put.
    planned: Option<Time>,
    turn: f64,
    epoch: Epoch,
}

/// Whether the shortest probe is being measured anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measuring {
    No,
    /// The window is small, and the queue empties.
    Emptying {
        window: u64,
    },
    /// It is empty.
    Now {
        window: u64,
    },
}

/// The last probe.
#[derive(Clone, Copy, Debug, Default)]
struct Probed {
    at: Option<Time>,
    answered: bool,
    /// What the background has fetched since.
    bytes_since: u64,
}

/// What the way has carried.
#[derive(Clone, Copy, Debug, Default)]
struct Carried {
    /// Since then so many bytes.
    since: Time,
    bytes: u64,
    /// The most bytes a second that came in one stretch of time since the shortest probe was measured.
    fastest: f64,
}

/// A window's worth of replies, and some probes.
#[derive(Clone, Debug, Default)]
struct Epoch {
    /// What was asked for since then belongs to it.
    begun: Time,
    bytes: u64,
    probes: VecDeque<Duration>,
    quickest_reply: Option<Duration>,
    /// The window was used up: what was measured is about the window, and not about who asked for less.
    used_up: bool,
}

impl Pace {
    /// For a connection of which nothing is known, with so many channels for the background. `page_bytes` is the guest's
    /// largest page.
    pub fn new(channels: usize, page_bytes: u64) -> Pace {
        let mut pace = Pace {
            channels: u64::try_from(channels).unwrap_or(u64::MAX).max(1),
            page_bytes,
            window: 0,
            base: None,
            doubles: true,
            measuring: Measuring::No,
            measured_at: Time(0),
            carried: Carried::default(),
            probed: Probed::default(),
            planned: None,
            turn: 0.0,
            epoch: Epoch::default(),
        };
        // The first probes shall find no queue.
        pace.measuring = Measuring::Now {
            window: pace.bounded(FIRST_WINDOW_BYTES),
        };
        pace.window = 0;
        pace
    }

    /// How many bytes the next request of a channel may have, of which so many are on their way; `None`: wait for a reply.
    /// A page that is larger may be asked for all the same.
    pub fn may_request(&mut self, in_flight_bytes: u64) -> Option<u64> {
        let least = if self.measuring == Measuring::No {
            MIN_REQUEST_BYTES
        } else {
            MIN_PAGE_SIZE
        };
        let share = self.window / self.channels;
        let request = share / REQUESTS / MIN_PAGE_SIZE * MIN_PAGE_SIZE;
        let request = request.clamp(least, MAX_BATCH_BYTES);
        let room = share.saturating_sub(in_flight_bytes);
        if room < request && in_flight_bytes > 0 {
            self.epoch.used_up = true;
            return None;
        }
        Some(request)
    }

    /// When to fetch a single page on the channel of the demand faults; `None`: not before something has come.
    pub fn probe_in(&mut self, now: Time) -> Option<Duration> {
        self.plan_probe(now);
        self.planned.map(|at| at.since(now))
    }

    /// Whether that is now; then it is being fetched from now on.
    pub fn probe(&mut self, now: Time) -> bool {
        let due = self.probe_in(now) == Some(Duration::ZERO);
        if due {
            self.planned = None;
            self.probed = Probed {
                at: Some(now),
                ..Probed::default()
            };
        }
        due
    }

    /// Puts the next probe somewhere between two replies, if it is time for one. True: it was not put before.
    fn plan_probe(&mut self, now: Time) -> bool {
        if self.planned.is_some() || !self.probe_due(now) {
            return false;
        }
        let between = match (self.measuring, self.epoch.quickest_reply) {
            (Measuring::No, Some(reply)) if !self.doubles => reply,
            // Nothing before it that it would wait for, or the window is to grow fast.
            _ => Duration::ZERO,
        };
        self.turn = (self.turn + TURN).fract();
        self.planned = Some(now.after(between.mul_f64(self.turn)));
        true
    }

    fn probe_due(&self, now: Time) -> bool {
        match self.probed.at {
            None => true,
            Some(_) if self.measuring != Measuring::No => self.probed.answered,
            Some(at) => {
                // More of them at first: the window is to grow fast.
                let least = if self.doubles {
                    Duration::ZERO
                } else {
                    PROBE_EVERY
                };
                let every = self.base.map_or(least, |base| least.max(base / 4));
                now.since(at) >= every
                    && self.probed.bytes_since >= self.page_bytes.saturating_mul(PROBE_SHARE)
            }
        }
    }

    /// A single page has come on the channel of the demand faults.
    pub fn on_probe(&mut self, now: Time, sent_at: Time) {
        let took = now.since(sent_at);
        self.base = shorter(self.base, took);
        self.probed.answered |= self.probed.at.is_some_and(|at| sent_at >= at);
        if sent_at >= self.epoch.begun {
            let [_, most] = PROBES;
            self.epoch.probes.truncate(most - 1);
            self.epoch.probes.push_front(took);
        }
        self.end_epoch(now);
    }

    /// A request of the background was answered whole. True: [`probe_in`](Self::probe_in) has become sooner by that.
    pub fn on_reply(&mut self, now: Time, sent_at: Time, bytes: u64) -> bool {
        self.probed.bytes_since += bytes;
        // An older one tells of the window before.
        if sent_at >= self.epoch.begun {
            self.epoch.bytes += bytes;
            self.epoch.quickest_reply = shorter(self.epoch.quickest_reply, now.since(sent_at));
        }
        self.carried.note(now, bytes);
        let planned = self.plan_probe(now);
        self.end_epoch(now);
        planned
    }

    /// Bytes that may be on their way.
    pub fn window_bytes(&self) -> u64 {
        self.window
    }

    /// Adjusts the window when enough has come.
    fn end_epoch(&mut self, now: Time) {
        let Some(reply) = self.epoch.quickest_reply else {
            return;
        };
        let [few, _] = PROBES;
        // A large page has its probes seldom.
        let enough = if self.page_bytes > MIN_WINDOW_BYTES {
            1
        } else {
            few
        };
        let probes = self.epoch.probes.make_contiguous();
        if self.epoch.bytes < self.window || probes.len() < enough {
            return;
        }
        let middle = probes.len() / 2;
        let (_, probe, _) = probes.select_nth_unstable(middle);
        let (probe, used_up) = (*probe, self.epoch.used_up);
        self.adjust(now, probe, reply, used_up);
        self.epoch = Epoch {
            begun: now,
            ..Epoch::default()
        };
    }

    fn adjust(&mut self, now: Time, probe: Duration, reply: Duration, used_up: bool) {
        match self.measuring {
            Measuring::Emptying { window } => self.measuring = Measuring::Now { window },
            Measuring::Now { window } => {
                self.base = Some(probe);
                self.measured_at = now;
                self.carried.fastest = 0.0;
                self.measuring = Measuring::No;
                self.window = window;
            }
            Measuring::No if now.since(self.measured_at) >= MEASURE_EVERY => {
                self.measuring = Measuring::Emptying {
                    window: self.window,
                };
                // A page at a time: next to nothing of the background's is in the queue then.
                self.window = 0;
            }
            Measuring::No => self.follow(probe, reply, used_up),
        }
    }

    fn follow(&mut self, probe: Duration, reply: Duration, used_up: bool) {
        let base = self.base.unwrap_or(probe);
        // A page that somebody waits for takes the shortest probe and this wait. About as long as each other, they are twice
        // what it takes without a background; three times is the promise, and the rest is for who is busy now and then.
        let short = base + (base / 2).max(NOISE);
        let long = base + base.max(QUEUE);
        let slow = REPLY.max(base * 4);
        if probe > long {
            self.doubles = false;
            // The wait grows with the window: by so much less it will be in the middle.
            let share = ratio((short + long) / 2, probe);
            self.window = self.bounded(whole(self.window as f64 * share.max(0.5)));
        } else if reply > slow && self.window > REPLY_WINDOW_BYTES {
            self.doubles = false;
            let window = whole(self.window as f64 * ratio(slow, reply).max(0.5));
            self.window = self.bounded(window.max(REPLY_WINDOW_BYTES));
        } else if probe > short {
            self.doubles = false;
        } else if used_up {
            self.window = self.bounded(if self.doubles {
                self.window * 2
            } else {
                self.window + self.window / 8
            });
        }
    }

    fn bounded(&self, window: u64) -> u64 {
        // What the link carries within such a time makes no longer queue; where a wait is longer all the same, a host is busy,
        // and would be more so with smaller requests.
        let no_queue = whole(self.carried.fastest * QUEUE.as_secs_f64()).min(REPLY_WINDOW_BYTES);
        let page = self.page_bytes.saturating_mul(self.channels);
        let least = MIN_WINDOW_BYTES.max(page).max(no_queue);
        window.clamp(least.min(MAX_WINDOW_BYTES), MAX_WINDOW_BYTES)
    }
}

impl Carried {
    fn note(&mut self, now: Time, bytes: u64) {
        self.bytes += bytes;
        let took = now.since(self.since);
        if took >= STRETCH {
            self.fastest = self.fastest.max(self.bytes as f64 / took.as_secs_f64());
            (self.since, self.bytes) = (now, 0);
        }
    }
}

fn shorter(before: Option<Duration>, took: Duration) -> Option<Duration> {
    Some(before.map_or(took, |before| before.min(took)))
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

/// Whole bytes.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and it is not negative"
)]
fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests;
