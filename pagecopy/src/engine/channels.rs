//! How many data channels pay now. No clock: the figures come in.
//!
//! Whether one more would help cannot be seen, only tried: a channel that always has something under way may be held back by its
//! thread, by its window, or by a link that is full. So where all of them are busy and the processors have room, some more are tried
//! for a moment. What arrives with them against what arrived without them is the verdict:
//!
//! ```text
//!            all busy, room                        a tenth more arrives
//! Watching ─────────────────▶ Opening ──▶ Trying ────────────────────────▶ Watching, with more
//!    ▲                           │           │      otherwise: taken back, and a longer pause
//!    │                           ▼           ▼
//!    └──────────────────── refused: a pause ─┘
//! ```
//!
//! The other way is the same: where the limit is elsewhere (the operator's, a slow link, a slow source), one fewer is tried, and comes
//! back where less arrives without it. Each trial that fails doubles the pause before the next of its kind, for good, so that it settles.

use std::time::Duration;

use super::Time;

/// Data channels that are opened by measurement at most.
pub const MOST: u16 = 16;
/// Channels of a host for each of its cores at most: one that waits for its window needs little of one.
pub const MOST_PER_CORE: u16 = 4;
/// Bytes that a channel may need at either side: what is staged, encrypted, encoded and said on it.
pub const CHANNEL_BYTES: u64 = 2 << 20;
/// Bytes that all of them may: half of what a migration of a small guest may need (64 MiB).
pub const ALL_BYTES: u64 = 32 << 20;
const _: () = assert!(MOST as u64 * CHANNEL_BYTES <= ALL_BYTES);

/// Samples that a mean is made of.
const SAMPLES: usize = 6;
/// What is measured before this has passed is of connections that begin.
const SETTLE: Duration = Duration::from_millis(200);
/// A trial without enough samples in this time has failed.
const LONGEST: Duration = Duration::from_secs(10);
/// The pause after the first trial that fails, …
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// … and after the last.
const LAST_PAUSE: Duration = Duration::from_secs(80);
/// More channels are kept if so much more arrives.
const GAIN: f64 = 0.10;
/// Fewer are kept if no more than this is lost.
const LOSS: f64 = 0.05;
/// A difference counts that is so many times its standard error.
const SURE: f64 = 2.0;
/// A channel is busy that has something under way for this share of the time.
const BUSY: f64 = 0.8;
/// Where they are busy for less than this, the limit is elsewhere.
const SLACK: f64 = 0.6;
/// The operator's limit is what counts where channels wait for it for this share of the time.
const HELD: f64 = 0.2;
/// A channel that takes less than this share of a core is not held back by its thread, and another needs no core to itself.
const LITTLE_CPU: f64 = 0.2;

/// Between which numbers of channels is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// At least.
    pub least: u16,
    /// At most.
    pub most: u16,
}

impl Bounds {
    /// For a migration that begins with `first` channels, on a host of so many cores.
    pub fn of(first: u16, cores: usize) -> Bounds {
        let cores = u16::try_from(cores).unwrap_or(u16::MAX);
        Bounds {
            least: first.min(2),
            most: cores.saturating_mul(MOST_PER_CORE).min(MOST).max(first),
        }
    }
}

/// What was measured over a part of a second in which pages were being sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Bytes a second that left, over all channels.
    pub rate: f64,
    /// Share of the time in which a channel had something under way: of the one that had least.
    pub busy: f64,
    /// Share of the time in which channels waited for the operator's limit, on average.
    pub held: f64,
    /// Share of a core that a channel's thread took, on average.
    pub cpu: f64,
    /// Cores that had nothing to do; none where that is not known.
    pub idle: Option<f64>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// So many more, please. Answer: [`Policy::opened`] or [`Policy::refused`].
    Add(u16, String),
    /// So many fewer, from now on.
    Drop(u16, String),
    /// What was tried stays.
    Keep(String),
}

/// See the module's text.
#[derive(Debug)]
pub struct Policy {
    bounds: Bounds,
    channels: u16,
    stage: Stage,
    samples: Vec<Sample>,
    more: Pause,
    fewer: Pause,
    /// More were tried with this many, and did not help.
    enough: bool,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Watching,
    /// Asked for, with what there was before; none: they come back after a trial without them.
    Opening(Option<Mean>),
    /// More or fewer than there were.
    Trying {
        before: Mean,
        from: u16,
        since: Time,
    },
}

/// When the next trial of a kind may be.
#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Time,
    next: Duration,
}

impl Pause {
    fn over(self, now: Time) -> bool {
        now >= self.until
    }

    fn fails(&mut self, now: Time) {
        self.until = now.after(self.next);
        self.next = (self.next * 2).min(LAST_PAUSE);
    }
}

/// A mean rate, and how far it may be off.
#[derive(Clone, Copy, Debug)]
struct Mean {
    rate: f64,
    error: f64,
}

impl Policy {
    /// For a migration that begins with so many channels.
    pub fn new(bounds: Bounds, channels: u16, now: Time) -> Policy {
        let pause = Pause {
            until: now,
            next: FIRST_PAUSE,
        };
        Policy {
            bounds,
            channels,
            stage: Stage::Watching,
            samples: Vec::new(),
            more: pause,
            fewer: pause,
            enough: false,
        }
    }

    /// How many channels carry pages, as far as has been decided.
    pub fn channels(&self) -> u16 {
        self.channels
    }

    /// Another sample.
    pub fn sample(&mut self, now: Time, sample: Sample) -> Option<Decision> {
        match self.stage {
            Stage::Opening(_) => return None,
            Stage::Trying { since, .. } if now.since(since) < SETTLE => return None,
            Stage::Trying {
                before,
                from,
                since,
            } if now.since(since) > LONGEST => {
                let mean = Mean {
                    rate: 0.0,
                    error: 0.0,
                };
                return Some(self.verdict(now, before, from, mean));
            }
            _ => {}
        }
        if !sample.rate.is_finite() {
            return None;
        }
        if self.samples.len() == SAMPLES {
            self.samples.remove(0);
        }
        self.samples.push(sample);
        if self.samples.len() < SAMPLES {
            return None;
        }
        let mean = mean(&self.samples);
        match self.stage {
            Stage::Watching => self.watch(now, mean),
            Stage::Trying { before, from, .. } => Some(self.verdict(now, before, from, mean)),
            Stage::Opening(_) => None,
        }
    }

    /// What was asked for is there, and carries pages from now on.
    pub fn opened(&mut self, count: u16, now: Time) {
        let Stage::Opening(before) = self.stage else {
            return;
        };
        let from = self.channels;
        self.channels = self.channels.saturating_add(count);
        self.samples.clear();
        self.stage = match before {
            Some(before) => Stage::Trying {
                before,
                from,
                since: now,
            },
            None => Stage::Watching,
        };
    }

    /// What was asked for does not come.
    pub fn refused(&mut self, now: Time) {
        if let Stage::Opening(_) = self.stage {
            self.stage = Stage::Watching;
            self.samples.clear();
            self.more.fails(now);
            self.more.until = now.after(LAST_PAUSE);
        }
    }

    fn watch(&mut self, now: Time, mean: Mean) -> Option<Decision> {
        let of = |figure: fn(&Sample) -> f64| {
            self.samples.iter().map(figure).sum::<f64>() / self.samples.len() as f64
        };
        let (busy, held, cpu) = (of(|it| it.busy), of(|it| it.held), of(|it| it.cpu));
        let idle = of(|it| it.idle.unwrap_or(f64::INFINITY));
        let step = self
            .channels
            .div_ceil(3)
            .min(self.bounds.most.saturating_sub(self.channels));
        let room = cpu < LITTLE_CPU || idle >= f64::from(step) * cpu;
        if step > 0 && busy >= BUSY && held < HELD && room && self.more.over(now) {
            self.stage = Stage::Opening(Some(mean));
            let words = format!(
                "{} more: each of the {} is busy for {:.0} % of the time and takes {:.0} % of a core, and {} MB/s leave",
                step,
                self.channels,
                busy * 100.0,
                cpu * 100.0,
                megabytes(mean.rate)
            );
            return Some(Decision::Add(step, words));
        }
        let elsewhere = if held >= HELD {
            Some(format!(
                "they wait for the limit for {:.0} % of the time",
                held * 100.0
            ))
        } else if busy < SLACK {
            Some(format!("they are busy for {:.0} % of it", busy * 100.0))
        } else if self.enough {
            Some("more did not help".to_owned())
        } else {
            None
        };
        let elsewhere = elsewhere?;
        if self.channels <= self.bounds.least || !self.fewer.over(now) {
            return None;
        }
        self.begin_trial(now, mean, self.channels - 1);
        Some(Decision::Drop(
            1,
            format!(
                "one fewer is tried: {elsewhere}, and {} MB/s leave",
                megabytes(mean.rate)
            ),
        ))
    }

    fn begin_trial(&mut self, now: Time, before: Mean, channels: u16) {
        self.stage = Stage::Trying {
            before,
            from: self.channels,
            since: now,
        };
        self.channels = channels;
        self.samples.clear();
    }

    fn verdict(&mut self, now: Time, before: Mean, from: u16, mean: Mean) -> Decision {
        let words = format!(
            "{} MB/s leave over {}, and {} over {from}",
            megabytes(mean.rate),
            self.channels,
            megabytes(before.rate)
        );
        let sure = SURE * mean.error.hypot(before.error);
        self.stage = Stage::Watching;
        if self.channels > from {
            if mean.rate >= before.rate * (1.0 + GAIN) && mean.rate - before.rate > sure {
                self.enough = false;
                // Nor would fewer do.
                self.fewer.fails(now);
                return Decision::Keep(format!("they stay: {words}"));
            }
            let extra = self.channels - from;
            self.channels = from;
            self.samples.clear();
            self.enough = true;
            self.more.fails(now);
            return Decision::Drop(extra, format!("taken back: {words}"));
        }
        if mean.rate >= before.rate * (1.0 - LOSS) {
            self.more.fails(now);
            return Decision::Keep(format!("fewer will do: {words}"));
        }
        self.samples.clear();
        self.fewer.fails(now);
        self.stage = Stage::Opening(None);
        Decision::Add(
            from - self.channels,
            format!("it is wanted after all: {words}"),
        )
    }
}

fn mean(samples: &[Sample]) -> Mean {
    let count = samples.len() as f64;
    let rate = samples.iter().map(|it| it.rate).sum::<f64>() / count;
    let spread: f64 = samples.iter().map(|it| (it.rate - rate).powi(2)).sum();
    Mean {
        rate,
        error: (spread / (count - 1.0) / count).sqrt(),
    }
}

/// For people.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and figures are not negative"
)]
fn megabytes(rate: f64) -> u64 {
    (rate / 1e6) as u64
}

#[cfg(test)]
mod tests;
