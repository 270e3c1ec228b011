//! Whether to switch over now, send another round, or give up; with the figures that led there.

use std::time::Duration;

use super::early::Early;
use super::heat::Scan;
use super::interface::{After, Options, Prefer};
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
    prefer: Prefer,
    shortening: Shortening,
    early: Early,
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
            prefer: options.prefer,
            shortening: Shortening::default(),
            early: Early::default(),
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
        let measurable = is_measurable(sent, took);
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
        self.bounded(measured)
    }

    /// A rate that the operator's limit allows.
    fn bounded(&self, rate: f64) -> f64 {
        let limit = self
            .bandwidth_limit
            .map_or(f64::INFINITY, |limit| limit as f64 * self.shrunk);
        rate.min(limit).max(1.0)
    }

    /// Whether a round is to end before all of it is sent: what is `left`, and what the guest has dirtied since the last scan, fits
    /// into the limit, and a short total time is preferred to a short downtime. `sent` and `took` are the round's so far.
    pub(super) fn ends_early(
        &mut self,
        left: u64,
        sent: Sent,
        took: Duration,
        since_scan: Duration,
    ) -> bool {
        if self.prefer != Prefer::TotalTime || !is_measurable(sent, took) {
            return false;
        }
        let goodput = self.bounded(sent.raw_bytes as f64 / took.as_secs_f64());
        let dirty = self.dirty_rate * since_scan.as_secs_f64();
        let bytes = seconds((left as f64 + dirty) / goodput);
        self.fixed.saturating_add(bytes) <= self.limit && self.early.once_more()
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
            let shorten = self.throttle.percent() == 0 && self.prefer == Prefer::Downtime;
            if !shorten || !self.worth_a_round(end, predicted) {
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

/// Whether so much, sent in that time, says what arrives in a second.
fn is_measurable(sent: Sent, took: Duration) -> bool {
    sent.raw_bytes >= MEASURABLE_BYTES && took >= MEASURABLE_TIME
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
mod tests;
