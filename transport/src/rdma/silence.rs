//! How long a device has had work and reported none of it.
//!
//! A device reports within about a second that the peer's does not answer. One that is lost may try on without end: rdma_rxe of
//! Linux 7.3 does, when nothing leaves the host any more and its driver is not told. What the device waits for is the peer's
//! device and never the peer's process, which may be slow, stopped or paused for as long as it likes.

use std::time::{Duration, Instant};

/// When a device that is silent counts as lost. A peer without receives for what it let us send is reported by then, after some
/// 2.6 s.
pub(super) const LONGEST: Duration = Duration::from_secs(3);
/// How often it is looked at while it is silent, at least.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// The time in which somebody looked and the device, with work, had nothing to report.
pub(super) struct Silence {
    looked: Instant,
    lasted: Duration,
}

impl Silence {
    pub(super) fn new() -> Silence {
        Silence {
            looked: Instant::now(),
            lasted: Duration::ZERO,
        }
    }

    /// It has reported something, or had nothing to do.
    pub(super) fn ended(&mut self, now: Instant) {
        self.looked = now;
        self.lasted = Duration::ZERO;
    }

    /// It has still reported nothing. Returns whether that is too long. Time in which nobody looked hardly counts: this host
    /// may have stood still, and its device with it.
    pub(super) fn goes_on(&mut self, now: Instant) -> bool {
        self.lasted += now.saturating_duration_since(self.looked).min(2 * LOOK);
        self.looked = now;
        self.lasted > LONGEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_silent_while_it_is_watched_is_lost() {
        let mut silence = Silence::new();
        let begun = Instant::now();
        silence.ended(begun);
        let looks = (1..).map(|look| begun + look * LOOK);
        let lost = looks.take(100).find(|now| silence.goes_on(*now));
        assert_eq!(lost, Some(begun + LONGEST + LOOK));
    }

    #[test]
    fn what_it_reports_ends_the_silence() {
        let mut silence = Silence::new();
        let mut now = Instant::now();
        for _ in 0..10 {
            silence.ended(now);
            now += LONGEST;
            assert!(!silence.goes_on(now));
        }
    }

    #[test]
    fn a_host_that_stood_still_has_not_lost_its_device() {
        let mut silence = Silence::new();
        let late = Instant::now() + Duration::from_secs(3600);
        assert!(!silence.goes_on(late));
        assert!(!silence.goes_on(late + LOOK));
    }
}
