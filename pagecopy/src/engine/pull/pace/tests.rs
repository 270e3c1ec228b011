//! Reads over links in virtual time: how full they are, and how long a page fault waits there.

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
            while let Some((_, sent_at, bytes)) = replies.pop_front_if(|(here, ..)| *here == now) {
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
