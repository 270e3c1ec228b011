//! What the guest got done over time, from what it said every now and then.

use serde::{Deserialize, Serialize};

/// Loops a second, in steps of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// When the first step begins, in milliseconds from the beginning of the migration (so below zero).
    pub from_ms: f64,
    /// How long a step is, in milliseconds.
    pub step_ms: f64,
    /// When the migration had ended, in milliseconds from its beginning.
    pub done_ms: f64,
    /// Loops a second in each step.
    pub loops_s: Vec<u64>,
}

/// How much of the time before and after a migration is shown, in milliseconds.
pub const MARGIN_MS: f64 = 1000.0;
/// The most steps that are kept.
const STEPS: f64 = 200.0;
/// No step is shorter than what the guest says something after.
const SHORTEST_MS: f64 = 25.0;

/// Loops that the guest had made by some times, in milliseconds from the beginning of the migration; in order.
#[derive(Clone, Debug, Default)]
pub struct Progress(Vec<(f64, f64)>);

impl Progress {
    /// From times in milliseconds and loops; those that go back in time are left out.
    pub fn new(said: impl IntoIterator<Item = (f64, f64)>) -> Progress {
        let mut kept: Vec<(f64, f64)> = Vec::new();
        for (at, loops) in said {
            if kept.last().is_none_or(|last| at > last.0) {
                kept.push((at, loops));
            }
        }
        Progress(kept)
    }

    /// Loops by `at`, as if the guest worked evenly between two times; those known next to it outside of all times.
    fn by(&self, at: f64) -> f64 {
        let after = self.0.partition_point(|said| said.0 <= at);
        match (
            after.checked_sub(1).and_then(|before| self.0.get(before)),
            self.0.get(after),
        ) {
            (Some(before), Some(next)) => {
                before.1 + (next.1 - before.1) * (at - before.0) / (next.0 - before.0)
            }
            (Some(only), None) | (None, Some(only)) => only.1,
            (None, None) => 0.0,
        }
    }

    /// Loops a second from one time to another, both in milliseconds.
    pub fn rate(&self, from: f64, to: f64) -> f64 {
        if to <= from {
            return 0.0;
        }
        ((self.by(to) - self.by(from)) / (to - from) * 1e3).max(0.0)
    }

    /// The series around a migration that took `done_ms`.
    pub fn series(&self, done_ms: f64) -> Series {
        let span = done_ms + 2.0 * MARGIN_MS;
        let step_ms = (span / STEPS).max(SHORTEST_MS);
        let mut series = Series {
            from_ms: -MARGIN_MS,
            step_ms,
            done_ms,
            loops_s: Vec::new(),
        };
        let mut at = -MARGIN_MS;
        while at + step_ms <= done_ms + MARGIN_MS {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // no less than zero
            series
                .loops_s
                .push(self.rate(at, at + step_ms).round() as u64);
            at += step_ms;
        }
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that makes 1000 loops a second and stands still from 400 to 600 ms.
    fn standing_still() -> Progress {
        Progress::new((-100..250).map(|n| {
            let at = f64::from(n) * 10.0;
            (at, at - (at - 400.0).clamp(0.0, 200.0))
        }))
    }

    #[test]
    fn a_dip_is_seen_where_it_was() {
        let series = standing_still().series(1000.0);
        assert_eq!(series.loops_s.len(), 120);
        let step_at = |ms: f64| {
            let steps = series.loops_s.iter().enumerate();
            let mut in_time = steps.filter(|(n, _)| {
                let begun =
                    series.from_ms + f64::from(u32::try_from(*n).expect("few")) * series.step_ms;
                begun <= ms && ms < begun + series.step_ms
            });
            *in_time.next().expect("a step").1
        };
        assert_eq!(
            [-500.0, 300.0, 500.0, 700.0].map(step_at),
            [1000, 1000, 0, 1000]
        );
    }

    #[test]
    fn rates_are_of_what_was_done() {
        let progress = standing_still();
        assert!((progress.rate(-1000.0, 0.0) - 1000.0).abs() < 1e-6);
        assert!((progress.rate(0.0, 1000.0) - 800.0).abs() < 1e-6);
        assert!(progress.rate(5.0, 5.0).abs() < f64::EPSILON);
        assert!(Progress::default().rate(0.0, 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_long_migration_has_no_more_steps() {
        assert!(standing_still().series(600_000.0).loops_s.len() <= 201);
    }
}
