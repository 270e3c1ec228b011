//! Whether to switch over now, send another round, or give up; with the figures that led there.

use std::time::Duration;

use super::heat::Scan;
use super::interface::{After, Options};
use super::sender::Sent;
use super::shortening::Shortening;
use super::throttle::Throttle;
use crate::engine::{Failure, Fault, Time};

/// A round counts as a measurement of the goodput when it sent at least this much…
const MEASURABLE_BYTES: u64 = 4 << 20;
/// …in at least this time. Smaller rounds measure latency.
const MEASURABLE_TIME: Duration = Duration::from_millis(2);
/// Bytes a second that are assumed while no byte has been sent yet (a guest whose pages are all zero).
const UNMEASURED: f64 = 50e6;
/// Bytes a second that both sides digest with `--verify`, assumed to tell people beforehand.
const DIGEST_BYTES_S: f64 = 1e9;
/// Rounds that do not improve the best prediction before it is said that none will…
const PATIENCE_ROUNDS: u32 = 10;
/// …which must also have taken this long, …
const PATIENCE_TIME: Duration = Duration::from_secs(3);
/// …where to improve is to come below this share of the best before.
const IMPROVED: f64 = 0.9;

/// What is known when a round and the scan after it are over.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundEnd {
    pub(super) round: u32,
    pub(super) now: Time,
    /// Since the migration began.
    pub(super) elapsed: Duration,
    /// What the scan found…
    pub(super) dirty: Scan,
    /// …in this time.
    pub(super) dirtied_in: Duration,
    /// Bytes to send, hot ones included.
    pub(super) remaining: u64,
    /// Whether every page that remains is hot.
    pub(super) all_hot: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Decision {
    /// Stop the guest and send the rest.
    SwitchOver,
    /// Send the cold pages.
    NextRound,
    /// Send the hot pages, too: there are no others.
    NextRoundHot,
    /// Stop the guest and let it go first.
    Postcopy,
    /// It will not become better.
    GiveUp(Failure),
}

/// Whether the guest may go before its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    /// It may not.
    Never,
    /// Where the migration would fail otherwise.
    RatherThanFail,
    /// The operator has said when.
    When(After),
}

/// Collects measurements and judges them.
#[derive(Debug)]
pub(super) struct Convergence {
    limit: Duration,
    max_rounds: u32,
    timeout: Option<Duration>,
    bandwidth_limit: Option<u64>,
    /// Bytes of pages for each one that was sent, in the last round.
    shrunk: f64,
    fixed: Duration,
    /// What `--verify` is expected to add. Shown, but not held against the limit: it was asked for.
    verify: Duration,
    goodput: Goodput,
    dirty_rate: f64,
    best: Option<Best>,
    predicted: Option<Duration>,
    shortening: Shortening,
    throttle: Throttle,
    postcopy: Policy,
}

#[derive(Clone, Copy, Debug)]
enum Goodput {
    Unmeasured,
    /// From rounds that were too small: at least this.
    AtLeast(f64),
    Measured(f64),
}

#[derive(Clone, Copy, Debug)]
struct Best {
    predicted: Duration,
    round: u32,
    at: Time,
}

impl Convergence {
    pub(super) fn new(options: &Options, fixed: Duration, ram_bytes: u64) -> Convergence {
        let verify = if options.verify {
            seconds(ram_bytes as f64 / DIGEST_BYTES_S)
        } else {
            Duration::ZERO
        };
        Convergence {
            limit: options.downtime_limit,
            max_rounds: options.max_rounds.max(1),
            timeout: options.timeout,
            bandwidth_limit: options.bandwidth_limit,
            shrunk: 1.0,
            fixed,
            verify,
            goodput: Goodput::Unmeasured,
            dirty_rate: 0.0,
            best: None,
            predicted: None,
            shortening: Shortening::default(),
            throttle: Throttle::new(options.throttle),
            postcopy: Policy::Never,
        }
    }

    /// Other limits, from now on. What was measured under a smaller one says nothing about what the link carries: it is measured
    /// anew.
    pub(super) fn limits(&mut self, downtime: Duration, bandwidth: Option<u64>) {
        self.limit = downtime;
        if self.bandwidth_limit != bandwidth {
            self.bandwidth_limit = bandwidth;
            self.goodput = Goodput::Unmeasured;
            // A best round of before was best under another limit.
            self.best = None;
        }
    }

    /// What both sides can, and the operator wants.
    pub(super) fn allow(&mut self, postcopy: Policy) {
        self.postcopy = postcopy;
    }

    /// Whether the guest goes first where the migration would fail otherwise.
    pub(super) fn falls_back(&self) -> bool {
        self.postcopy != Policy::Never
    }

    /// After how long the guest goes first, whatever the rounds say.
    pub(super) fn postcopy_after(&self) -> Option<Duration> {
        match self.postcopy {
            Policy::When(After::Time(time)) => {
                Some(self.timeout.map_or(time, |most| most.min(time)))
            }
            Policy::Never => None,
            _ => self.timeout,
        }
    }

    /// A round was sent, its barrier included.
    pub(super) fn sent(&mut self, sent: Sent, took: Duration) {
        if sent.raw_bytes == 0 || took.is_zero() {
            return;
        }
        let wire = sent.raw_bytes.saturating_sub(sent.encoded.saved());
        self.shrunk = sent.raw_bytes as f64 / wire.max(1) as f64;
        let rate = sent.raw_bytes as f64 / took.as_secs_f64();
        let measurable = sent.raw_bytes >= MEASURABLE_BYTES && took >= MEASURABLE_TIME;
        self.goodput = match self.goodput {
            Goodput::Measured(before) if measurable => Goodput::Measured((before + rate) / 2.0),
            Goodput::Measured(before) => Goodput::Measured(before.max(rate)),
            _ if measurable => Goodput::Measured(rate),
            Goodput::AtLeast(before) => Goodput::AtLeast(before.max(rate)),
            Goodput::Unmeasured => Goodput::AtLeast(rate),
        };
    }

    /// Bytes a second that arrive. A small round may have been measured within the limit's first burst.
    pub(super) fn goodput(&self) -> f64 {
        let measured = match self.goodput {
            Goodput::Unmeasured => UNMEASURED,
            Goodput::AtLeast(rate) | Goodput::Measured(rate) => rate,
        };
        let limit = self
            .bandwidth_limit
            .map_or(f64::INFINITY, |limit| limit as f64 * self.shrunk);
        measured.min(limit).max(1.0)
    }

    /// Bytes a second that the guest dirties, by the last scan.
    pub(super) fn dirty_rate(&self) -> f64 {
        self.dirty_rate
    }

    /// The last prediction, without `--verify`.
    pub(super) fn predicted(&self) -> Option<Duration> {
        self.predicted
    }

    /// What `--verify` is expected to add.
    pub(super) fn verify(&self) -> Duration {
        self.verify
    }

    /// Judges a round. Returns the decision and its reason in words.
    pub(super) fn decide(&mut self, end: &RoundEnd) -> (Decision, String) {
        if !end.dirtied_in.is_zero() {
            self.dirty_rate = end.dirty.bytes as f64 / end.dirtied_in.as_secs_f64();
        }
        let bytes = seconds(end.remaining as f64 / self.goodput());
        let predicted = self.fixed.saturating_add(bytes);
        self.predicted = Some(predicted);
        let improved = self.note_best(predicted, end);
        let figures = self.figures(end, predicted);
        if predicted <= self.limit {
            // A guest that is slowed is not kept so for a shorter downtime than was asked for.
            if self.throttle.percent() > 0 || !self.worth_a_round(end, predicted) {
                return (Decision::SwitchOver, format!("switch over: {figures}"));
            }
            return (
                if end.all_hot {
                    Decision::NextRoundHot
                } else {
                    Decision::NextRound
                },
                format!("within the limit, but another round will shorten the downtime: {figures}"),
            );
        }
        self.shortening.above_the_limit();
        let why = self.no_more_rounds(end, improved);
        if let Some(why) = why {
            return (Decision::Postcopy, format!("post-copy, {why}: {figures}"));
        }
        if let Some(why) = self.hopeless(end, improved) {
            if self.falls_back() {
                return (Decision::Postcopy, format!("post-copy, {why}: {figures}"));
            }
            return (
                Decision::GiveUp(self.verdict(&why)),
                format!("give up, {why}: {figures}"),
            );
        }
        self.slow_down(end);
        let slowed = match self.throttle.percent() {
            0 => String::new(),
            percent => format!(", with the guest kept from writing for {percent} % of its time"),
        };
        if end.all_hot {
            return (
                Decision::NextRoundHot,
                format!("another round with the hot pages, all others are sent{slowed}: {figures}"),
            );
        }
        (
            Decision::NextRound,
            format!("another round{slowed}: {figures}"),
        )
    }

    /// Sees to it that rounds become shorter, by the last one, unless the guest may go first.
    fn slow_down(&mut self, end: &RoundEnd) {
        let for_bytes = self.limit.saturating_sub(self.fixed);
        // Where the limit is below what does not depend on bytes, no guest is slow enough.
        if self.falls_back() || for_bytes.is_zero() || end.dirtied_in < for_bytes / 2 {
            return;
        }
        let before = self.throttle.percent();
        self.throttle.round(self.dirty_rate / self.goodput());
        if before == 0 && self.throttle.percent() > 0 {
            // It is given the time to show what it is good for.
            self.best = None;
        }
    }

    /// Percent of its time for which the guest is to be kept from writing.
    pub(super) fn throttle_percent(&self) -> u32 {
        self.throttle.percent()
    }

    /// Whether a round is worth it although the prediction is within the limit: never if it could cost the migration.
    fn worth_a_round(&mut self, end: &RoundEnd, predicted: Duration) -> bool {
        let bytes = predicted - self.fixed;
        let last = end.round + 2 >= self.max_rounds;
        let late = self
            .timeout
            .is_some_and(|timeout| end.elapsed.saturating_add(bytes.saturating_mul(4)) >= timeout);
        let dirtied = self.dirty_rate / self.goodput();
        !last && !late && self.shortening.worth_a_round(bytes, self.fixed, dirtied)
    }

    /// Gives up in the middle of a round, when the time is over.
    pub(super) fn out_of_time(&self, elapsed: Duration) -> Option<Failure> {
        self.timeout
            .filter(|timeout| elapsed >= *timeout)
            .map(|timeout| {
                self.verdict(&format!(
                    "the time limit of {:.1} s is over",
                    timeout.as_secs_f64()
                ))
            })
    }

    /// When [`Convergence::out_of_time`] has something to say.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn note_best(&mut self, predicted: Duration, end: &RoundEnd) -> Best {
        let best = match self.best {
            Some(best) if predicted.as_secs_f64() > best.predicted.as_secs_f64() * IMPROVED => best,
            _ => Best {
                predicted,
                round: end.round,
                at: end.now,
            },
        };
        *self.best.insert(best)
    }

    /// Whether a hybrid migration has had its rounds, and why.
    fn no_more_rounds(&self, end: &RoundEnd, best: Best) -> Option<String> {
        let Policy::When(after) = self.postcopy else {
            return None;
        };
        let rounds = end.round + 1;
        match after {
            After::Rounds(most) if rounds >= most => Some(format!("{rounds} rounds were sent")),
            After::Time(time) if end.elapsed >= time => {
                Some(format!("{:.1} s are over", time.as_secs_f64()))
            }
            After::Auto if end.all_hot => {
                Some("all that remains is written again and again".to_owned())
            }
            After::Auto if best.round != end.round => Some("the last round did not pay".to_owned()),
            _ => None,
        }
    }

    fn hopeless(&self, end: &RoundEnd, best: Best) -> Option<String> {
        let rounds = end.round + 1;
        if rounds >= self.max_rounds {
            return Some(format!("{rounds} rounds were sent, as many as are allowed"));
        }
        if let Some(timeout) = self.timeout.filter(|timeout| end.elapsed >= *timeout) {
            return Some(format!(
                "the time limit of {:.1} s is over",
                timeout.as_secs_f64()
            ));
        }
        let idle_rounds = end.round - best.round;
        if idle_rounds >= PATIENCE_ROUNDS && end.now.since(best.at) >= PATIENCE_TIME {
            return Some(format!(
                "the last {idle_rounds} rounds brought no improvement"
            ));
        }
        None
    }

    fn figures(&self, end: &RoundEnd, predicted: Duration) -> String {
        let verify = if self.verify.is_zero() {
            String::new()
        } else {
            format!(", and about {} more to verify", ms(self.verify))
        };
        format!(
            "{:.1} MB remain, the guest dirties {}, goodput {}, predicted downtime {} (of it {} whatever remains){verify}, limit {}",
            end.remaining as f64 / 1e6,
            mb_s(self.dirty_rate),
            mb_s(self.goodput()),
            ms(predicted),
            ms(self.fixed),
            ms(self.limit),
        )
    }

    fn verdict(&self, why: &str) -> Failure {
        let prediction = self.predicted.map_or_else(
            || "no downtime could be predicted yet".to_owned(),
            |p| format!("predicted downtime {}", ms(p)),
        );
        Failure::new(
            Fault::Guest,
            format!(
                "the guest dirties {}, goodput {}; {why}; {prediction}, limit {}",
                mb_s(self.dirty_rate),
                mb_s(self.goodput()),
                ms(self.limit)
            ),
            "have the guest slowed (--throttle auto), raise --downtime-limit, --max-rounds or --timeout, give the migration more \
             bandwidth (--bandwidth-limit, --channels), or move the guest when it writes less; it runs on here",
        )
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

fn mb_s(bytes_s: f64) -> String {
    format!("{:.1} MB/s", bytes_s / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::encoding::policy::Compress;

    const MS: Duration = Duration::from_millis(1);

    fn convergence(change: impl FnOnce(&mut Options)) -> Convergence {
        let mut options = Options {
            downtime_limit: 50 * MS,
            bandwidth_limit: None,
            background_limit: None,
            compress: Compress::Off,
            max_rounds: 1000,
            timeout: None,
            mode: super::super::Mode::Precopy,
            throttle: false,
            verify: false,
            quit_source: false,
            channels: None,
        };
        change(&mut options);
        let mut convergence = Convergence::new(&options, 20 * MS, 1 << 30);
        // 100 MB in 100 ms: 1 GB/s.
        convergence.sent(
            Sent {
                raw_bytes: 100_000_000,
                ..Sent::default()
            },
            100 * MS,
        );
        convergence
    }

    /// Round `round` at 100 ms each; `remaining` bytes were dirtied in it.
    fn end(round: u32, remaining: u64) -> RoundEnd {
        RoundEnd {
            round,
            now: Time(0).after(round * 100 * MS),
            elapsed: round * 100 * MS,
            dirty: Scan {
                pages: remaining / 4096,
                bytes: remaining,
            },
            dirtied_in: 100 * MS,
            remaining,
            all_hot: false,
        }
    }

    #[test]
    fn it_switches_over_exactly_when_the_prediction_is_within_the_limit() {
        let mut convergence = convergence(|options| options.downtime_limit = 40 * MS);
        assert_eq!(
            convergence.decide(&end(0, 20_100_000)).0,
            Decision::NextRound
        );
        let (decision, words) = convergence.decide(&end(1, 20_000_000));
        assert_eq!(decision, Decision::SwitchOver);
        assert_eq!(
            words,
            "switch over: 20.0 MB remain, the guest dirties 200.0 MB/s, goodput 1000.0 MB/s, \
             predicted downtime 40.0 ms (of it 20.0 ms whatever remains), limit 40.0 ms"
        );
    }

    #[test]
    fn within_the_limit_a_round_is_added_only_if_limits_leave_room_for_it() {
        type Change = fn(&mut Options);
        let limits: [(Change, Decision); 3] = [
            (|_| {}, Decision::NextRound),
            (|options| options.max_rounds = 2, Decision::SwitchOver),
            (
                |options| options.timeout = Some(100 * MS),
                Decision::SwitchOver,
            ),
        ];
        for (limit, expected) in limits {
            let mut convergence = convergence(limit);
            assert_eq!(convergence.decide(&end(0, 29_000_000)).0, expected);
        }
    }

    #[test]
    fn hot_pages_go_when_there_are_no_others() {
        let hot = RoundEnd {
            all_hot: true,
            ..end(0, 90_000_000)
        };
        assert_eq!(convergence(|_| {}).decide(&hot).0, Decision::NextRoundHot);
    }

    #[test]
    fn it_gives_up_at_each_limit_and_not_before() {
        let mut rounds = convergence(|options| options.max_rounds = 3);
        assert_eq!(rounds.decide(&end(1, 90_000_000)).0, Decision::NextRound);
        let (Decision::GiveUp(failure), _) = rounds.decide(&end(2, 90_000_000)) else {
            panic!("three rounds are allowed")
        };
        assert_eq!(
            failure.what,
            "the guest dirties 900.0 MB/s, goodput 1000.0 MB/s; 3 rounds were sent, as many as are \
             allowed; predicted downtime 110.0 ms, limit 50.0 ms"
        );
        let mut time = convergence(|options| options.timeout = Some(200 * MS));
        assert_eq!(time.decide(&end(1, 90_000_000)).0, Decision::NextRound);
        assert!(time.out_of_time(199 * MS).is_none() && time.out_of_time(200 * MS).is_some());
        assert!(matches!(
            time.decide(&end(2, 90_000_000)).0,
            Decision::GiveUp(_)
        ));
    }

    #[test]
    fn it_is_patient_as_long_as_things_improve() {
        let mut convergence = convergence(|_| {});
        let mut remaining = 900_000_000;
        for round in 0..40 {
            let decision = convergence.decide(&end(round, remaining)).0;
            assert_eq!(decision, Decision::NextRound, "round {round}");
            remaining = remaining / 100 * 98;
        }
        let stuck = (40..90).find(|round| {
            matches!(
                convergence.decide(&end(*round, 800_000_000)).0,
                Decision::GiveUp(_)
            )
        });
        assert!(
            stuck.is_some_and(|round| (60..=75).contains(&round)),
            "{stuck:?}"
        );
    }

    #[test]
    fn latency_is_not_taken_for_goodput() {
        let mut convergence = convergence(|_| {});
        convergence.sent(
            Sent {
                raw_bytes: 4096,
                ..Sent::default()
            },
            MS,
        );
        assert!((convergence.goodput() - 1e9).abs() < 1.0);
        convergence.sent(
            Sent {
                raw_bytes: 50_000_000,
                ..Sent::default()
            },
            100 * MS,
        );
        assert!((convergence.goodput() - 0.75e9).abs() < 1.0);
    }

    #[test]
    fn other_limits_are_in_force_at_once() {
        let mut convergence = convergence(|options| options.bandwidth_limit = Some(1_000_000));
        assert_eq!(
            convergence.decide(&end(1, 20_000_000)).0,
            Decision::NextRound
        );
        convergence.limits(50 * MS, None);
        assert!(convergence.goodput() > 1e6);
        convergence.sent(
            Sent {
                raw_bytes: 1_000_000_000,
                ..Sent::default()
            },
            1000 * MS,
        );
        convergence.limits(40 * MS, None);
        assert!((convergence.goodput() - 1e9).abs() < 1.0, "still measured");
        let (decision, _) = convergence.decide(&end(2, 20_000_000));
        assert_eq!(decision, Decision::SwitchOver);
    }

    #[test]
    fn a_bandwidth_limit_bounds_the_goodput() {
        let convergence = convergence(|options| options.bandwidth_limit = Some(1_000_000));
        assert!((convergence.goodput() - 1e6).abs() < 1.0);
    }
}
