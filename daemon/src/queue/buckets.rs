//! Who may send how much: one bucket for each migration, filled from the host's budget in fair shares. Pure: the time comes
//! from outside.
//!
//! ```text
//!   budget ──▶ page faults, which never wait
//!         └──▶ guests that stand still for their last pages
//!             └──▶ everybody else, by weight
//!                    ├──▶ full, or at the limit of its own: what it does not take goes to the others
//!                    └──▶ what nobody takes is kept for a moment
//! ```
//!
//! So the shares are max-min fair: nobody can be given more without taking from one who has less for its weight. A bucket may
//! be overdrawn by what is sent at a time, [`Buckets::quantum`], and holds little: in any second all together send at most
//! 3 % more than the limit, and so does each. Reads of a destination are known only when they have been answered: they may
//! overdraw a bucket by more, and then wait until that is paid. Nobody waits for longer than [`PATIENCE`], though: no less than a
//! page can go, so under a smaller limit than a page in that time it is a page in that time, and not nothing for an hour.

use std::collections::BTreeMap;
use std::time::Duration;

use pagecopy::engine::Time;
use pagecopy::limits::{MAX_BATCH_BYTES, MIN_PAGE_SIZE};

/// A bucket holds what it is given in this time.
const HELD: f64 = 0.012;
/// What nobody takes is kept for this long.
const SPARE: f64 = 0.010;
/// So much time's worth goes at once, at least a page.
const QUANTUM: f64 = 0.0025;
/// Page faults are paid back for this long at most once they are over.
const DEBT: f64 = 0.1;
/// A bucket is overdrawn by no more than comes in this time.
const PATIENCE: f64 = 30.0;
/// How long somebody waits before it asks again: shares change.
const WAITS: (f64, f64) = (0.0001, 0.005);

/// All buckets.
#[derive(Debug)]
pub(super) struct Buckets {
    /// Bytes a second for all; none is unlimited.
    limit: Option<u64>,
    of: BTreeMap<u64, Bucket>,
    next: u64,
    /// Bytes that nobody took.
    spare: f64,
    /// Bytes that went for page faults and are not paid yet.
    debt: f64,
    at: Time,
}

/// A migration's.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    weight: f64,
    /// Bytes a second; none is unlimited.
    limit: Option<u64>,
    urgent: bool,
    /// Bytes that may go; negative when it is overdrawn.
    level: f64,
}

/// The weight of a priority: 100 counts four times as much as 0, and -100 a quarter.
fn weight(priority: i32) -> f64 {
    (f64::from(priority).clamp(-100.0, 100.0) / 50.0).exp2()
}

impl Buckets {
    pub(super) fn new(limit: Option<u64>) -> Buckets {
        Buckets {
            limit,
            of: BTreeMap::new(),
            next: 0,
            spare: 0.0,
            debt: 0.0,
            at: Time::default(),
        }
    }

    /// A bucket of a migration with a limit of its own.
    pub(super) fn add(&mut self, now: Time, priority: i32, limit: Option<u64>) -> u64 {
        self.fill(now);
        self.next += 1;
        let bucket = Bucket {
            weight: weight(priority),
            limit,
            urgent: false,
            level: 0.0,
        };
        self.of.insert(self.next, bucket);
        self.next
    }

    /// The migration has ended.
    pub(super) fn remove(&mut self, now: Time, key: u64) {
        self.fill(now);
        self.of.remove(&key);
    }

    /// Another limit of its own, from now on.
    pub(super) fn limit(&mut self, now: Time, key: u64, limit: Option<u64>) {
        self.fill(now);
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.limit = limit;
            bucket.level = bucket.level.min(0.0);
        }
    }

    /// Another priority, from now on.
    pub(super) fn weigh(&mut self, now: Time, key: u64, priority: i32) {
        self.fill(now);
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.weight = weight(priority);
        }
    }

    /// Another limit for all together, from now on. Nobody keeps more than fits into a bucket under it.
    pub(super) fn limit_all(&mut self, now: Time, limit: Option<u64>) {
        self.fill(now);
        self.limit = limit;
        self.spare = 0.0;
        self.debt = 0.0;
        let most: Vec<(u64, f64)> = self
            .of
            .keys()
            .map(|key| (*key, self.rate(*key).map_or(0.0, |rate| rate * HELD)))
            .collect();
        for (key, most) in most {
            if let Some(bucket) = self.of.get_mut(&key) {
                bucket.level = bucket.level.min(most);
            }
        }
    }

    /// Whether its guest stands still meanwhile.
    pub(super) fn urgent(&mut self, now: Time, key: u64, urgent: bool) {
        self.fill(now);
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.urgent = urgent;
        }
    }

    /// Whether anybody is limited at all.
    pub(super) fn is_limited(&self) -> bool {
        self.limit.is_some() || self.of.values().any(|bucket| bucket.limit.is_some())
    }

    /// Bytes a second that are its own when everybody wants all they can get; `None` is unlimited.
    pub(super) fn rate(&self, key: u64) -> Option<f64> {
        let bucket = self.of.get(&key)?;
        let all: f64 = self.of.values().map(|bucket| bucket.weight).sum();
        let share = self.limit.map(|limit| bytes(limit) * bucket.weight / all);
        match (share, bucket.limit.map(bytes)) {
            (Some(share), Some(own)) => Some(share.min(own)),
            (share, own) => share.or(own),
        }
    }

    /// How many bytes may go at once; `None` is unlimited.
    pub(super) fn quantum(&self, key: u64) -> Option<u64> {
        let quantum = self.rate(key)? * QUANTUM;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // Bounded, and not negative.
        let pages = quantum.clamp(0.0, MAX_BATCH_BYTES as f64) as u64 / MIN_PAGE_SIZE;
        Some(pages.max(1) * MIN_PAGE_SIZE)
    }

    /// How long it has to wait; `None`: something may go now.
    pub(super) fn wait(&mut self, now: Time, key: u64) -> Option<Duration> {
        let rate = self.rate(key)?;
        self.fill(now);
        let level = self.of.get(&key)?.level;
        let (least, most) = WAITS;
        (level <= 0.0).then(|| Duration::from_secs_f64((-level / rate).clamp(least, most)))
    }

    /// So many bytes go.
    pub(super) fn spend(&mut self, key: u64, sent: u64) {
        let least = self
            .rate(key)
            .map_or(f64::NEG_INFINITY, |rate| -rate * PATIENCE);
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.level = (bucket.level - bytes(sent)).max(least);
        }
    }

    /// So many bytes do not go, after all.
    pub(super) fn refund(&mut self, key: u64, unsent: u64) {
        let most = self.rate(key).map_or(0.0, |rate| rate * HELD);
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.level = (bucket.level + bytes(unsent)).min(most.max(bucket.level));
        }
    }

    /// So many bytes went to somebody who waits for them. Everybody pays, from what comes.
    pub(super) fn spend_at_once(&mut self, sent: u64) {
        if let Some(limit) = self.limit {
            self.debt = (self.debt + bytes(sent)).min(bytes(limit) * DEBT);
        }
    }

    /// Shares out what has come since the last time.
    fn fill(&mut self, now: Time) {
        let passed = now.since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        let wanting = |key: &u64, bucket: &Bucket| {
            let room = self.rate(*key).map_or(0.0, |rate| rate * HELD) - bucket.level;
            let own = bucket
                .limit
                .map_or(f64::INFINITY, |limit| bytes(limit) * passed);
            room.min(own).max(0.0)
        };
        let wants: Vec<(u64, f64)> = self
            .of
            .iter()
            .map(|(key, bucket)| (*key, wanting(key, bucket)))
            .collect();
        let Some(limit) = self.limit.map(bytes) else {
            for (key, want) in wants {
                self.give(key, want);
            }
            return;
        };
        let income = limit * passed;
        let paid = income.min(self.debt);
        self.debt -= paid;
        let mut pool = self.spare + income - paid;
        for urgent in [true, false] {
            let these = wants.iter().filter(|(key, _)| {
                self.of
                    .get(key)
                    .is_some_and(|bucket| bucket.urgent == urgent)
            });
            let these = these.copied().collect();
            pool = self.share_out(pool, these);
        }
        self.spare = pool.min(limit * SPARE);
    }

    /// Gives each in proportion to its weight, but not more than it wants. Returns what is left.
    fn share_out(&mut self, mut pool: f64, mut wants: Vec<(u64, f64)>) -> f64 {
        while pool > 0.0 && !wants.is_empty() {
            let weights = wants.iter().filter_map(|(key, _)| self.of.get(key));
            let each = pool / weights.map(|bucket| bucket.weight).sum::<f64>();
            let share = |key: &u64| self.of.get(key).map_or(0.0, |bucket| bucket.weight * each);
            let (less, more): (Vec<_>, Vec<_>) = wants
                .into_iter()
                .partition(|(key, want)| *want <= share(key));
            if less.is_empty() {
                for (key, _) in more {
                    let weight = self.of.get(&key).map_or(0.0, |bucket| bucket.weight);
                    self.give(key, weight * each);
                }
                return 0.0;
            }
            for (key, want) in less {
                self.give(key, want);
                pool -= want;
            }
            wants = more;
        }
        pool.max(0.0)
    }

    fn give(&mut self, key: u64, given: f64) {
        if let Some(bucket) = self.of.get_mut(&key) {
            bucket.level += given;
        }
    }
}

#[allow(clippy::cast_precision_loss)] // Exact up to 8 PiB.
fn bytes(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Who sends, and when: as much as it may, and not faster than its link.
    struct Sender {
        key: u64,
        link: f64,
        /// It asks for nothing before.
        begins: u64,
        again: u64,
        /// What went, and when.
        sent: Vec<(u64, u64)>,
    }

    impl Sender {
        fn new(key: u64) -> Sender {
            Sender {
                key,
                link: 1e11,
                begins: 0,
                again: 0,
                sent: Vec::new(),
            }
        }

        /// Sends, or waits: false.
        fn turn(&mut self, buckets: &mut Buckets, now: u64) -> bool {
            if let Some(wait) = buckets.wait(Time(now), self.key) {
                self.again = now + u64::try_from(wait.as_nanos()).unwrap();
                return false;
            }
            let quantum = buckets.quantum(self.key).unwrap();
            buckets.spend(self.key, quantum);
            self.sent.push((now, quantum));
            let took = Duration::from_secs_f64(bytes(quantum) / self.link);
            self.again = now + u64::try_from(took.as_nanos()).unwrap();
            true
        }

        fn between(&self, from: u64, to: u64) -> f64 {
            let then = self.sent.iter().filter(|(at, _)| (from..to).contains(at));
            then.map(|(_, sent)| bytes(*sent)).sum()
        }
    }

    /// Lets all send until `end`; who waits is woken up to 2 ms late.
    fn run(buckets: &mut Buckets, senders: &mut [Sender], end: u64) {
        let mut late = 7_u64;
        for sender in senders.iter_mut() {
            sender.again = sender.again.max(sender.begins);
        }
        loop {
            let next = senders
                .iter_mut()
                .min_by_key(|sender| sender.again)
                .unwrap();
            let now = next.again;
            if now >= end {
                return;
            }
            if next.turn(buckets, now) {
                continue;
            }
            late = late.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            next.again += (late >> 40) % 2_000_000;
        }
    }

    /// The most of all seconds, a hundredth apart, from `begin` to `end`.
    fn extremes(senders: &[Sender], begin: u64, end: u64) -> (f64, f64) {
        let step = SECOND / 100;
        let windows = (begin / step..=(end - SECOND) / step).map(|n| {
            let from = n * step;
            let all = senders
                .iter()
                .map(|sender| sender.between(from, from + SECOND));
            all.sum::<f64>()
        });
        windows.fold((f64::INFINITY, 0.0), |(least, most), sent| {
            (sent.min(least), sent.max(most))
        })
    }

    #[test]
    fn a_limit_is_kept_within_three_percent_over_any_second() {
        for limit in [1_000_000, 33_000_000, 500_000_000, 12_500_000_000] {
            let mut buckets = Buckets::new(None);
            let key = buckets.add(Time(0), 0, Some(limit));
            let mut senders = [Sender::new(key)];
            run(&mut buckets, &mut senders, 4 * SECOND);
            let (least, most) = extremes(&senders, 0, 4 * SECOND);
            let limit = bytes(limit);
            assert!(most <= 1.03 * limit, "{most} of {limit}");
            assert!(least >= 0.97 * limit, "{least} of {limit}");
        }
    }

    /// Under the smallest limit, and after a huge page.
    #[test]
    fn nobody_waits_for_longer_than_half_a_minute() {
        for limit in [1, 100, 10_000] {
            let mut buckets = Buckets::new(None);
            let key = buckets.add(Time(0), 0, Some(limit));
            for page in [4096, 2 << 20, u64::MAX] {
                buckets.limit(Time(0), key, Some(limit));
                buckets.spend(key, page);
                let at = buckets.at.after(Duration::from_secs(31));
                assert_eq!(buckets.wait(at, key), None, "{limit}: {page}");
            }
        }
        // What a second's worth of the limit is waited for in full.
        let mut buckets = Buckets::new(None);
        let key = buckets.add(Time(0), 0, Some(1_000_000));
        buckets.spend(key, 20_000_000);
        assert!(buckets.wait(Time(19 * SECOND), key).is_some());
        assert_eq!(buckets.wait(Time(21 * SECOND), key), None);
    }

    #[test]
    fn the_host_keeps_its_budget_and_wastes_none_of_it() {
        for priorities in [&[0][..], &[0, 0], &[0, 50, -50, 0, 100, 10, 3, 0]] {
            let limit = 400_000_000;
            let mut buckets = Buckets::new(Some(limit));
            let mut senders: Vec<Sender> = priorities
                .iter()
                .map(|priority| Sender::new(buckets.add(Time(0), *priority, None)))
                .collect();
            run(&mut buckets, &mut senders, 3 * SECOND);
            let (least, most) = extremes(&senders, 0, 3 * SECOND);
            assert!(most <= 1.03 * bytes(limit), "{most} of {limit}");
            assert!(least >= 0.97 * bytes(limit), "{least} of {limit}");
            let all: f64 = priorities.iter().map(|priority| weight(*priority)).sum();
            for (sender, priority) in senders.iter().zip(priorities) {
                let fair = bytes(limit) * weight(*priority) / all;
                let got = sender.between(SECOND, 2 * SECOND);
                assert!((got / fair - 1.0).abs() < 0.04, "{got} for {fair}");
            }
        }
    }

    #[test]
    fn what_one_does_not_use_is_the_others() {
        let mut buckets = Buckets::new(Some(300_000_000));
        let keys = [
            buckets.add(Time(0), 0, None),
            buckets.add(Time(0), 0, Some(20_000_000)),
            buckets.add(Time(0), 0, None),
            buckets.add(Time(0), 0, None),
        ];
        let mut senders = keys.map(Sender::new);
        // One has a limit of its own, one a slow link, and one nothing to send.
        senders[2].link = 50_000_000.0;
        senders[3].begins = 2 * SECOND;
        run(&mut buckets, &mut senders, 4 * SECOND);
        let got = |number: usize, from| senders[number].between(from, from + SECOND) / 1e6;
        let near = |is: f64, wanted: f64| (is / wanted - 1.0).abs() < 0.06;
        assert!(near(got(0, SECOND), 230.0), "{}", got(0, SECOND));
        assert!(near(got(1, SECOND), 20.0), "{}", got(1, SECOND));
        // Who begins late finds its share, and nobody goes without.
        let third = 3 * SECOND;
        assert!(near(got(0, third), 115.0), "{}", got(0, third));
        assert!(near(got(3, third), 115.0), "{}", got(3, third));
    }

    #[test]
    fn page_faults_go_first_and_are_paid_by_all() {
        let limit = 200_000_000;
        let mut buckets = Buckets::new(Some(limit));
        let mut senders = [0, 1].map(|_| Sender::new(buckets.add(Time(0), 0, None)));
        for tenth in 0..20 {
            buckets.spend_at_once(8_000_000);
            run(&mut buckets, &mut senders, (tenth + 1) * SECOND / 10);
        }
        let got = senders[0].between(SECOND, 2 * SECOND) + senders[1].between(SECOND, 2 * SECOND);
        let left = bytes(limit) - 80e6;
        assert!((got / left - 1.0).abs() < 0.06, "{got} of {left}");
        // However many there were: those who push do not starve when they are over.
        buckets.spend_at_once(u64::MAX);
        run(&mut buckets, &mut senders, 3 * SECOND);
        let got = senders
            .iter()
            .map(|sender| sender.between(2 * SECOND, 3 * SECOND));
        assert!(got.sum::<f64>() > 0.85 * bytes(limit));
    }

    #[test]
    fn a_guest_that_stands_still_goes_before_the_others() {
        let mut buckets = Buckets::new(Some(100_000_000));
        let keys = [0, 100].map(|priority| buckets.add(Time(0), priority, None));
        let mut senders = keys.map(Sender::new);
        run(&mut buckets, &mut senders, SECOND);
        buckets.urgent(Time(SECOND), keys[0], true);
        run(&mut buckets, &mut senders, 3 * SECOND);
        let got = senders[0].between(2 * SECOND, 3 * SECOND);
        assert!(got > 85e6, "{got}");
        buckets.urgent(Time(3 * SECOND), keys[0], false);
        run(&mut buckets, &mut senders, 5 * SECOND);
        let got = senders[0].between(4 * SECOND, 5 * SECOND);
        assert!(got < 23e6, "{got}");
    }

    #[test]
    fn the_hosts_budget_changes_at_once() {
        let mut buckets = Buckets::new(Some(200_000_000));
        let keys = [0, 0].map(|priority| buckets.add(Time(0), priority, None));
        let mut senders = keys.map(Sender::new);
        run(&mut buckets, &mut senders, SECOND);
        for (second, limit) in [(1, 20_000_000), (2, 400_000_000)] {
            buckets.limit_all(Time(second * SECOND), Some(limit));
            run(&mut buckets, &mut senders, (second + 1) * SECOND);
            let sent = senders.iter();
            let sent: f64 = sent
                .map(|sender| sender.between(second * SECOND, (second + 1) * SECOND))
                .sum();
            assert!(
                (sent / bytes(limit) - 1.0).abs() < 0.03,
                "{sent} of {limit}"
            );
        }
        buckets.limit_all(Time(3 * SECOND), None);
        assert!(!buckets.is_limited() && buckets.wait(Time(3 * SECOND), keys[0]).is_none());
        buckets.limit_all(Time(3 * SECOND), Some(20_000_000));
        for sender in &mut senders {
            sender.again = 3 * SECOND;
        }
        run(&mut buckets, &mut senders, 4 * SECOND);
        let sent: f64 = senders
            .iter()
            .map(|sender| sender.between(3 * SECOND, 4 * SECOND))
            .sum();
        assert!(sent <= 1.03 * 20e6, "{sent}");
    }

    #[test]
    fn a_limit_changes_at_once_and_whoever_leaves_leaves_its_share() {
        let mut buckets = Buckets::new(None);
        let key = buckets.add(Time(0), 0, Some(100_000_000));
        let mut senders = [Sender::new(key)];
        run(&mut buckets, &mut senders, SECOND);
        buckets.limit(Time(SECOND), key, Some(10_000_000));
        run(&mut buckets, &mut senders, 2 * SECOND);
        let got = senders[0].between(SECOND, 2 * SECOND);
        assert!((9.7e6..10.3e6).contains(&got), "{got}");
        buckets.limit(Time(2 * SECOND), key, None);
        assert!(!buckets.is_limited() && buckets.wait(Time(2 * SECOND), key).is_none());

        let mut buckets = Buckets::new(Some(100_000_000));
        let keys = [0, 0].map(|priority| buckets.add(Time(0), priority, None));
        assert_eq!(buckets.rate(keys[0]), Some(50e6));
        buckets.remove(Time(0), keys[1]);
        assert_eq!(buckets.rate(keys[0]), Some(100e6));
    }
}
