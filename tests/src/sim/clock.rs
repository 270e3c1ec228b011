//! A host's monotonic clock as its daemon reads it: with an epoch and a rate of its own, and it may jump or stand still.

use pagecopy::engine::Time;
use serde::{Deserialize, Serialize};

/// How a host's clock goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Rate {
    /// Seconds that it shows at the start of the run.
    pub(super) epoch_s: u64,
    /// Millionths by which it is fast; slow when negative.
    pub(super) ppm: i64,
}

/// The clock of one host. The world's time is what really passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// What it showed at the world's time `since`, from where it has gone evenly.
    shown: u64,
    since: Time,
    ppm: i64,
    stands: bool,
}

impl Clock {
    /// Shows its epoch at the world's time `now`.
    pub(super) fn new(rate: Rate, now: Time) -> Clock {
        Clock {
            shown: rate.epoch_s.saturating_mul(1_000_000_000),
            since: now,
            ppm: rate.ppm.clamp(-500_000, 500_000),
            stands: false,
        }
    }

    /// What it shows at the world's time `now`.
    pub(super) fn at(&self, now: Time) -> Time {
        if self.stands {
            return Time(self.shown);
        }
        let passed = i128::from(now.0.saturating_sub(self.since.0));
        let gone = passed * i128::from(1_000_000 + self.ppm) / 1_000_000;
        Time(
            self.shown
                .saturating_add(u64::try_from(gone).unwrap_or(u64::MAX)),
        )
    }

    /// The first instant of the world at which it shows `shown` or more; now at the earliest. A clock that stands is
    /// taken as going.
    pub(super) fn when(&self, shown: Time, now: Time) -> Time {
        let ahead = i128::from(shown.0) - i128::from(self.shown);
        let rate = i128::from(1_000_000 + self.ppm);
        let passed = (ahead * 1_000_000 + rate - 1).div_euclid(rate);
        let passed = u64::try_from(passed.max(0)).unwrap_or(u64::MAX);
        Time(self.since.0.saturating_add(passed)).max(now)
    }

    /// Jumps ahead.
    pub(super) fn jump(&mut self, now: Time, nanos: u64) {
        self.shown = self.at(now).0.saturating_add(nanos);
        self.since = now;
    }

    /// Stands still until it is told to go on.
    pub(super) fn stand(&mut self, now: Time, stands: bool) {
        self.shown = self.at(now).0;
        self.since = now;
        self.stands = stands;
    }
}

#[cfg(test)]
mod tests {
    use super::{Clock, Rate, Time};

    #[test]
    fn what_it_shows_and_when_agree() {
        for ppm in [-50_000, -3, 0, 7, 50_000] {
            let mut clock = Clock::new(Rate { epoch_s: 9, ppm }, Time(5));
            for (now, jump) in [(5, 0), (1_000, 17), (123_456_789, 1_000_000_000)] {
                clock.jump(Time(now), jump);
                for wanted in [now, now + 1, now + 999_983] {
                    let shown = clock.at(Time(wanted));
                    let when = clock.when(shown, Time(0));
                    assert!(clock.at(when) >= shown, "{ppm}");
                    assert!(when <= Time(wanted), "{ppm}");
                }
            }
        }
    }

    #[test]
    fn it_stands_still_and_goes_on() {
        let mut clock = Clock::new(Rate::default(), Time(0));
        clock.stand(Time(100), true);
        assert_eq!(clock.at(Time(900)), Time(100));
        clock.stand(Time(900), false);
        assert_eq!(clock.at(Time(950)), Time(150));
    }
}
