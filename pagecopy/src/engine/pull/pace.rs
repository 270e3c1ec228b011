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
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::engine::pacing::Pacer;

    /// Reads over a link: each takes half a round trip to the source, waits until the link has carried the replies before
    /// its own, is carried, and takes the other half.
    struct Link {
        bytes_s: f64,
        round_trip: Duration,
        free_at: Time,
        /// Of the background.
        limit: Pacer,
        noise: u64,
        /// A host is busy for up to so long with a reply.
        jitter: Duration,
        /// What is sent at one moment arrives as one.
        bursts: bool,
    }

    impl Link {
        fn new(gbit_s: f64, round_trip: Duration) -> Link {
            Link {
                bytes_s: gbit_s * 1e9 / 8.0,
                round_trip,
                free_at: Time(0),
                limit: Pacer::new(None, Time(0)),
                noise: 1,
                jitter: Duration::ZERO,
                bursts: false,
            }
        }

        /// When the reply to a read of so many bytes is here.
        fn read(&mut self, now: Time, bytes: u64) -> Time {
            let asked = now.after(self.round_trip / 2);
            let carried = Duration::from_secs_f64(bytes as f64 / self.bytes_s);
            self.free_at = self.free_at.max(asked).after(carried);
            self.noise = self
                .noise
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let share = (self.noise >> 40) as f64 / f64::from(1 << 24);
            self.free_at
                .after(self.round_trip / 2)
                .after(self.jitter.mul_f64(share))
        }
    }

    /// What a link did.
    #[derive(Debug)]
    struct Seen {
        /// Of what the link could carry.
        used: f64,
        /// A page fault's time without anything else on the link, and with the background that of the worst of 100.
        alone: Duration,
        p99: Duration,
        most_window: u64,
    }

    fn probe(pace: &mut Pace, link: &mut Link, pages: &mut VecDeque<(Time, Time)>, now: Time) {
        if link.limit.may_send(now) && pace.probe(now) {
            link.limit.spend(4096);
            pages.push_back((link.read(now, 4096), now));
        }
    }

    /// What was sent at one moment, after so many others, arrives as one for each 64 KiB.
    fn gather(replies: &mut VecDeque<(Time, Time, u64)>, sent_before: usize) {
        let (mut here, mut room) = (Time(0), 0);
        for (arrives, _, bytes) in replies.range_mut(sent_before..).rev() {
            if *bytes > room {
                (here, room) = (*arrives, 64 << 10);
            }
            room = room.saturating_sub(*bytes);
            *arrives = here;
        }
    }

    /// Keeps the link busy from `from` to `until`; every now and then a page is waited for.
    fn drive(pace: &mut Pace, link: &mut Link, from: Time, until: Time) -> Seen {
        let alone = Link::new(link.bytes_s * 8.0 / 1e9, link.round_trip).read(Time(0), 4096);
        let (mut now, mut in_flight, mut done) = (from, 0, 0);
        let mut replies = VecDeque::<(Time, Time, u64)>::new();
        // On the channel of the demand faults: probes and faults.
        let mut pages = VecDeque::<(Time, Time)>::new();
        let mut faults = Vec::new();
        let every = Duration::from_micros(7_919);
        let mut next_fault = from.after(every);
        let mut most_window = 0;
        while now < until {
            if link.bursts {
                // On another channel, which is served first.
                probe(pace, link, &mut pages, now);
            }
            let sent_before = replies.len();
            while link.limit.may_send(now)
                && let Some(bytes) = pace.may_request(in_flight)
            {
                link.limit.spend(bytes);
                let here = link.read(now, bytes);
                let last = replies.back().map_or(here, |(last, ..)| here.max(*last));
                replies.push_back((last, now, bytes));
                in_flight += bytes;
            }
            most_window = most_window.max(pace.window_bytes());
            if link.bursts {
                gather(&mut replies, sent_before);
            } else {
                probe(pace, link, &mut pages, now);
            }
            let probe_at = pace.probe_in(now).map(|wait| now.after(wait));
            let probe_at = probe_at.filter(|_| link.limit.may_send(now));
            let page_here = pages.front().map(|(here, _)| *here);
            let reply_here = replies.front().map(|(here, ..)| *here);
            let comes = [page_here, reply_here, link.limit.next(), probe_at];
            let soonest = comes.into_iter().flatten().min();
            if soonest.is_none_or(|soonest| next_fault < soonest) {
                now = next_fault;
                let here = link.read(now, 4096);
                let here = pages.back().map_or(here, |(last, _)| here.max(*last));
                pages.push_back((here, now));
                faults.push(here.since(now));
                next_fault = now.after(every);
            } else if page_here == soonest {
                let (here, sent_at) = pages.pop_front().unwrap();
                now = here;
                pace.on_probe(now, sent_at);
            } else if reply_here == soonest {
                now = replies.front().unwrap().0;
                while let Some((_, sent_at, bytes)) =
                    replies.pop_front_if(|(here, ..)| *here == now)
                {
                    in_flight -= bytes;
                    done += bytes;
                    pace.on_reply(now, sent_at, bytes);
                }
            } else {
                now = soonest.unwrap();
            }
        }
        // What is still under way is let go of.
        link.free_at = Time(0);
        faults.sort();
        Seen {
            used: done as f64 / until.since(from).as_secs_f64() / link.bytes_s,
            alone: alone.since(Time(0)),
            p99: faults[faults.len() * 99 / 100],
            most_window,
        }
    }

    const SECOND: u64 = 1_000_000_000;

    /// Of one channel, and small pages.
    fn unknown() -> Pace {
        Pace::new(1, 4096)
    }

    /// 1 Gbit/s between neighbours and in one rack, 10 Gbit/s between two cities, 30 Gbit/s on one host.
    fn links() -> [Link; 4] {
        [
            Link::new(1.0, Duration::from_micros(60)),
            Link::new(1.0, Duration::from_micros(200)),
            Link::new(10.0, Duration::from_millis(20)),
            Link::new(30.0, Duration::from_micros(50)),
        ]
    }

    #[test]
    fn the_link_is_full_and_a_fault_takes_at_most_three_times_as_long() {
        for mut link in links() {
            let mut pace = unknown();
            let begin = drive(&mut pace, &mut link, Time(0), Time(2 * SECOND));
            assert!(begin.used > 0.8, "{begin:?}");
            let seen = drive(&mut pace, &mut link, Time(2 * SECOND), Time(6 * SECOND));
            assert!(seen.used > 0.95, "{seen:?}");
            assert!(seen.p99 < seen.alone * 3, "{seen:?}");
        }
    }

    #[test]
    fn a_limit_is_kept_by_the_background_and_a_fault_waits_for_none() {
        let seconds = 4;
        for share in [0.1, 1e-3, 1e-6] {
            for mut link in links() {
                let rate = whole(link.bytes_s * share).max(1);
                link.limit = Pacer::new(Some(rate), Time(0));
                let mut pace = unknown();
                let seen = drive(&mut pace, &mut link, Time(0), Time(seconds * SECOND));
                // The burst that a bucket begins with: a batch, or 20 ms, and a request that overdraws it.
                let burst = (rate / 50).max(MAX_BATCH_BYTES) + MAX_BATCH_BYTES;
                let most = (rate * seconds + burst) as f64 / (link.bytes_s * seconds as f64);
                let least = share * 0.9;
                assert!((least..=most).contains(&seen.used), "{share}: {seen:?}");
                assert!(seen.p99 < seen.alone * 2, "{share}: {seen:?}");
            }
        }
    }

    #[test]
    fn it_holds_when_hosts_are_busy_now_and_then() {
        for mut link in links() {
            link.jitter = link.round_trip / 4;
            let mut pace = unknown();
            drive(&mut pace, &mut link, Time(0), Time(2 * SECOND));
            let seen = drive(&mut pace, &mut link, Time(2 * SECOND), Time(6 * SECOND));
            assert!(seen.used > 0.9, "{seen:?}");
            assert!(seen.p99 < (seen.alone + link.jitter) * 3, "{seen:?}");
        }
    }

    #[test]
    fn it_holds_when_replies_come_in_bursts() {
        for mut link in links() {
            link.bursts = true;
            let mut pace = unknown();
            drive(&mut pace, &mut link, Time(0), Time(2 * SECOND));
            let seen = drive(&mut pace, &mut link, Time(2 * SECOND), Time(6 * SECOND));
            assert!(seen.used > 0.95, "{seen:?}");
            assert!(seen.p99 < seen.alone * 3, "{seen:?}");
        }
    }

    #[test]
    fn a_path_that_becomes_longer_or_shorter_is_measured_anew() {
        for (before, after) in [(200, 2_000), (2_000, 200)] {
            let mut pace = unknown();
            let mut link = Link::new(10.0, Duration::from_micros(before));
            drive(&mut pace, &mut link, Time(0), Time(2 * SECOND));
            link.round_trip = Duration::from_micros(after);
            // As long as it takes to notice, and some more.
            drive(&mut pace, &mut link, Time(2 * SECOND), Time(15 * SECOND));
            let seen = drive(&mut pace, &mut link, Time(15 * SECOND), Time(20 * SECOND));
            assert!(seen.used > 0.9, "{before} to {after} us: {seen:?}");
            assert!(
                seen.p99 < seen.alone * 3,
                "{before} to {after} us: {seen:?}"
            );
        }
    }

    #[test]
    fn the_window_keeps_within_its_limits() {
        let mut pace = unknown();
        let mut far = Link::new(400.0, Duration::from_secs(1));
        let seen = drive(&mut pace, &mut far, Time(0), Time(60 * SECOND));
        assert_eq!(seen.most_window, MAX_WINDOW_BYTES);
        let mut pace = unknown();
        let mut slow = Link::new(0.01, Duration::from_millis(1));
        drive(&mut pace, &mut slow, Time(0), Time(20 * SECOND));
        assert_eq!(pace.window_bytes(), MIN_WINDOW_BYTES);
    }

    #[test]
    fn who_asks_for_little_is_given_no_larger_window() {
        let mut pace = unknown();
        for round in 0..10_000 {
            let sent_at = Time(round * 1_000_000);
            let bytes = pace.may_request(0).unwrap();
            let here = sent_at.after(Duration::from_micros(200));
            if pace.probe(sent_at) {
                pace.on_probe(here, sent_at);
            }
            pace.on_reply(here, sent_at, bytes);
        }
        assert_eq!(pace.window_bytes(), FIRST_WINDOW_BYTES);
    }

    #[test]
    fn several_requests_make_a_window_and_one_may_always_go() {
        let mut pace = unknown();
        let mut link = Link::new(1.0, Duration::from_micros(200));
        drive(&mut pace, &mut link, Time(0), Time(SECOND / 2));
        pace.window = FIRST_WINDOW_BYTES;
        let mut in_flight = 0;
        let mut requests = 0;
        while let Some(bytes) = pace.may_request(in_flight) {
            in_flight += bytes;
            requests += 1;
        }
        assert_eq!((requests, in_flight), (4, FIRST_WINDOW_BYTES));
        assert_eq!(pace.may_request(2 << 20), None);
        assert!(pace.may_request(0).is_some());
    }
}
