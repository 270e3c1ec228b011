//! Keeps what the source pushes near a bandwidth limit, so that it decides no further ahead than the link takes: a bucket that
//! fills with bytes at the limit's rate and that every batch drains. To the byte the limit is kept where bytes are sent.

use std::time::Duration;

use crate::engine::Time;
use crate::limits::{MAX_BATCH_BYTES, MIN_PAGE_SIZE};

/// The bucket holds at most what flows in this time (but at least one batch), so that a pause is not made up for by a burst.
const BURST: Duration = Duration::from_millis(20);
/// A batch is what flows in a part of a second, of so many: one that is under way is waited for before the guest may go first.
const BATCHES_A_SECOND: u64 = 4;

/// A token bucket. Without a limit it never says no.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes a second; none is unlimited.
    rate: Option<u64>,
    /// Bytes that may go now, times a billion (so that nanoseconds times rate lose nothing). A batch is let go when this
    /// is positive and may overdraw it.
    level: i128,
    at: Time,
}

const SCALE: i128 = 1_000_000_000;

impl Pacer {
    /// Keeps to `rate` bytes a second; none, or zero, is unlimited.
    pub fn new(rate: Option<u64>, now: Time) -> Pacer {
        let mut pacer = Pacer {
            rate: rate.filter(|rate| *rate > 0),
            level: 0,
            at: now,
        };
        pacer.level = pacer.capacity();
        pacer
    }

    fn capacity(&self) -> i128 {
        let burst = i128::from(self.rate.unwrap_or(0)) * nanos(BURST);
        burst.max(i128::from(self.batch_bytes()) * SCALE)
    }

    /// The most that goes as one batch.
    pub fn batch_bytes(&self) -> u64 {
        self.rate.map_or(MAX_BATCH_BYTES, |rate| {
            (rate / BATCHES_A_SECOND).clamp(MIN_PAGE_SIZE, MAX_BATCH_BYTES)
        })
    }

    /// Whether a batch may go now.
    pub fn may_send(&mut self, now: Time) -> bool {
        let Some(rate) = self.rate else { return true };
        let flow = i128::from(rate) * nanos(now.since(self.at));
        self.level = self.level.saturating_add(flow).min(self.capacity());
        self.at = self.at.max(now);
        self.level > 0
    }

    /// A batch of so many bytes goes.
    pub fn spend(&mut self, bytes: u64) {
        self.level -= i128::from(bytes) * SCALE;
    }

    /// So many bytes of a batch did not go, because they were zero.
    pub fn refund(&mut self, bytes: u64) {
        self.level = (self.level + i128::from(bytes) * SCALE).min(self.capacity());
    }

    /// When a batch may go, if it may not now.
    pub fn next(&self) -> Option<Time> {
        let rate = self.rate.filter(|_| self.level <= 0)?;
        let wait = (-self.level) / i128::from(rate) + 1;
        Some(self.at.after(Duration::from_nanos(
            u64::try_from(wait).unwrap_or(u64::MAX),
        )))
    }
}

/// What goes under a limit, counted by those who hold a source to it (the simulation and the fuzzer).
#[derive(Clone, Copy, Debug)]
pub struct Ledger {
    rate: Option<u64>,
    since: Time,
    /// Bytes since then, without those that did not go after all.
    went: i128,
}

impl Ledger {
    /// Of a limit that holds from now on.
    pub fn new(rate: Option<u64>, now: Time) -> Ledger {
        let rate = rate.filter(|rate| *rate > 0);
        Ledger {
            rate,
            since: now,
            went: 0,
        }
    }

    /// A batch of so many bytes goes. Whether it may: a full bucket at first, what has flowed since, and one batch that overdraws.
    pub fn goes(&mut self, bytes: u64, now: Time) -> bool {
        self.went += i128::from(bytes);
        let Some(rate) = self.rate else { return true };
        let flowed = i128::from(rate) * nanos(now.since(self.since));
        let full = Pacer::new(self.rate, now).capacity();
        self.went <= (flowed + full) / SCALE + i128::from(MAX_BATCH_BYTES)
    }

    /// So many bytes of a batch did not go.
    pub fn comes_back(&mut self, bytes: u64) {
        self.went -= i128::from(bytes);
    }
}

fn nanos(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BATCH: u64 = MAX_BATCH_BYTES;

    /// Sends batches as fast as the pacer allows and returns how many bytes went until `end`.
    fn sent_until(pacer: &mut Pacer, end: Time) -> u64 {
        let (mut now, mut sent) = (Time(0), 0);
        while now < end {
            while pacer.may_send(now) {
                pacer.spend(BATCH);
                sent += BATCH;
            }
            now = pacer.next().unwrap();
        }
        sent
    }

    #[test]
    fn the_rate_is_kept() {
        let mut pacer = Pacer::new(Some(100_000_000), Time(0));
        let sent = sent_until(&mut pacer, Time(10_000_000_000));
        assert!(
            (1_000_000_000..=1_000_000_000 + 3 * BATCH).contains(&sent),
            "{sent}"
        );
    }

    #[test]
    fn the_ledger_lets_a_pacer_through_and_nobody_twice_as_fast() {
        let (rate, second) = (100_000_000, 1_000_000_000);
        let kept = |speed: u64| {
            let mut pacer = Pacer::new(Some(rate * speed), Time(0));
            let mut ledger = Ledger::new(Some(rate), Time(0));
            let mut now = Time(0);
            while now < Time(second) {
                while pacer.may_send(now) {
                    pacer.spend(BATCH);
                    if !ledger.goes(BATCH, now) {
                        return false;
                    }
                    // A quarter was zero.
                    pacer.refund(BATCH / 4);
                    ledger.comes_back(BATCH / 4);
                }
                now = pacer.next().unwrap();
            }
            true
        };
        assert!(kept(1) && !kept(2));
        assert!(Ledger::new(None, Time(0)).goes(u64::MAX, Time(0)));
    }

    #[test]
    fn a_batch_is_not_under_way_for_long_unless_it_is_one_page() {
        let batch = |rate| Pacer::new(rate, Time(0)).batch_bytes();
        assert_eq!(batch(None), MAX_BATCH_BYTES);
        assert_eq!(batch(Some(1 << 30)), MAX_BATCH_BYTES);
        assert_eq!(batch(Some(1 << 20)), 256 << 10);
        assert_eq!(batch(Some(1)), MIN_PAGE_SIZE);
    }

    #[test]
    fn zeroes_cost_nothing() {
        let mut pacer = Pacer::new(Some(1), Time(0));
        for _ in 0..1000 {
            assert!(pacer.may_send(Time(0)));
            pacer.spend(BATCH);
            pacer.refund(BATCH);
        }
        pacer.spend(BATCH);
        assert!(!pacer.may_send(Time(0)));
    }

    #[test]
    fn without_a_limit_everything_goes_at_once() {
        let mut pacer = Pacer::new(None, Time(0));
        pacer.spend(u64::MAX);
        assert!(pacer.may_send(Time(0)) && pacer.next().is_none());
    }
}
