//! Whether to switch over now, send another round, or give up; with the figures that led there.

use std::time::Duration;

use super::heat::Scan;
use super::interface::Options;
use super::sender::Sent;
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
    /// It will not become better.
    GiveUp(Failure),
}

/// Collects measurements and judges them.
#[derive(Debug)]
pub(super) struct Convergence {
    limit: Duration,
    max_rounds: u32,
    timeout: Option<Duration>,
    fixed: Duration,
    /// What `--verify` is expected to add. Shown, but not held against the limit: it was asked for.
    verify: Duration,
    goodput: Goodput,
    dirty_rate: f64,
    best: Option<Best>,
    predicted: Option<Duration>,
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
            fixed,
            verify,
            goodput: Goodput::Unmeasured,
            dirty_rate: 0.0,
            best: None,
            predicted: None,
        }
    }

    /// A round was sent, its barrier included.
    pub(super) fn sent(&mut self, sent: Sent, took: Duration) {
        if sent.raw_bytes == 0 || took.is_zero() {
            return;
        }
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

    /// Bytes a second that arrive.
    pub(super) fn goodput(&self) -> f64 {
        match self.goodput {
            Goodput::Unmeasured => UNMEASURED,
            Goodput::AtLeast(rate) | Goodput::Measured(rate) => rate.max(1.0),
        }
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
        let predicted = self.fixed + seconds(end.remaining as f64 / self.goodput());
        self.predicted = Some(predicted);
        let improved = self.note_best(predicted, end);
        let figures = self.figures(end, predicted);
        if predicted <= self.limit {
            return (Decision::SwitchOver, format!("switch over: {figures}"));
        }
        if let Some(why) = self.hopeless(end, improved) {
            return (
                Decision::GiveUp(self.verdict(&why)),
                format!("give up, {why}: {figures}"),
            );
        }
        if end.all_hot {
            return (
                Decision::NextRoundHot,
                format!("another round with the hot pages, all others are sent: {figures}"),
            );
        }
        (Decision::NextRound, format!("another round: {figures}"))
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
            "{:.1} MB remain, the guest dirties {} and {} arrive, predicted downtime {} (of it {} whatever remains){verify}, limit {}",
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
                "the guest dirties {} and {} arrive; {why}; {prediction}, limit {}",
                mb_s(self.dirty_rate),
                mb_s(self.goodput()),
                ms(self.limit)
            ),
            "raise --downtime-limit, --max-rounds or --timeout, give the migration more bandwidth (--bandwidth-limit, \
             --channels), or move the guest when it writes less; it runs on here",
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
