//! What a migration by pre-copy will likely take, by what was sampled of the guest and probed of the link.
//!
//! Rounds are gone through as the source would send them: what was dirtied while one was sent is the next. Done three times,
//! with what is likely and with what is as good and as bad as the sample and the probe leave room for. What it cannot know:
//! a guest that does something else by the time it moves, and links and hosts that others use.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// An amount that is not known: likely this, between the others.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Hardly less.
    pub low: f64,
    /// Most likely.
    pub likely: f64,
    /// Hardly more.
    pub high: f64,
}

impl Span {
    /// In order, whatever order it was found in.
    fn of(likely: f64, best: f64, worst: f64) -> Span {
        Span {
            low: best.min(likely).min(worst),
            likely,
            high: best.max(likely).max(worst),
        }
    }
}

/// A round 0 that is over, which need not be guessed any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FirstRound {
    /// Since the migration was begun.
    pub elapsed: Duration,
    /// Bytes of pages that were sent.
    pub bytes: u64,
    /// Bytes of pages that were written meanwhile.
    pub dirtied: u64,
}

/// What is known before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// What has been sent already, if it has.
    pub first: Option<FirstRound>,
    /// Bytes that the RAM files hold.
    pub populated: u64,
    /// Bytes of pages written, a second.
    pub dirty_bytes_s: f64,
    /// The same in the busiest interval.
    pub peak_bytes_s: f64,
    /// Bytes of different pages written while it was sampled.
    pub working_set: u64,
    /// How long that was.
    pub sampled: Duration,
    /// Bytes a second that the link carries.
    pub goodput: Span,
    /// There and back.
    pub round_trip: Duration,
    /// The part of the downtime that no bytes cause.
    pub fixed: Duration,
    /// The longest downtime that is wanted.
    pub limit: Duration,
    /// Rounds at most.
    pub max_rounds: u32,
}

/// What a migration will likely take.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Milliseconds in all.
    pub total_ms: Span,
    /// Milliseconds of them in which the guest stands still.
    pub downtime_ms: Span,
    /// Bytes of pages.
    pub bytes: Span,
    /// Whether the downtime gets below the limit, likely.
    pub converges: bool,
}

/// What making both sides ready takes: comparing, clearing, attaching. The first is likely.
const READY_MS: [f64; 3] = [50.0, 15.0, 300.0];
/// A working set is taken as known when what it consists of was written so many times over.
const KNOWN: f64 = 1.5;
/// Room for what a sample did not see of it.
const UNSEEN: f64 = 1.25;
/// The fixed downtime may be so much shorter, or longer: it is what the migrations before have measured.
const FIXED_ROOM: [f64; 2] = [0.4, 2.5];

/// How a migration would go.
#[derive(Clone, Copy)]
struct Course {
    total_ms: f64,
    downtime_ms: f64,
    bytes: f64,
    converges: bool,
}

/// What it will likely take.
#[allow(clippy::cast_precision_loss)] // Of a prediction the last digit says nothing.
pub fn predict(seen: &Seen) -> Predicted {
    let populated = seen.populated as f64;
    let working_set = seen.working_set as f64;
    let written = seen.dirty_bytes_s * seen.sampled.as_secs_f64();
    // Where hardly a page was written twice, more of the guest may be written in time.
    let (likely_cap, worst_cap) = if written >= working_set * KNOWN {
        (working_set, (working_set * UNSEEN).min(populated))
    } else {
        ((working_set * 8.0).min(populated), populated)
    };
    let [low, long] = FIXED_ROOM;
    let likely = course(
        seen,
        seen.goodput.likely,
        seen.dirty_bytes_s,
        likely_cap,
        [READY_MS[0], 1.0],
    );
    let best = course(
        seen,
        seen.goodput.high,
        seen.dirty_bytes_s * 0.8,
        working_set.min(likely_cap),
        [READY_MS[1], low],
    );
    let worst = course(
        seen,
        seen.goodput.low,
        seen.peak_bytes_s,
        worst_cap,
        [READY_MS[2], long],
    );
    let span = |of: fn(&Course) -> f64| Span::of(of(&likely), of(&best), of(&worst));
    Predicted {
        total_ms: span(|course| course.total_ms),
        downtime_ms: span(|course| course.downtime_ms),
        bytes: span(|course| course.bytes),
        converges: likely.converges,
    }
}

/// Goes through the rounds. `[ready, room]`: milliseconds before the first, and what the fixed downtime is multiplied by.
#[allow(clippy::cast_precision_loss)]
fn course(seen: &Seen, goodput: f64, rate: f64, cap: f64, [ready, room]: [f64; 2]) -> Course {
    let goodput = goodput.max(1.0);
    let round_trip = seen.round_trip.as_secs_f64();
    let fixed = seen.fixed.as_secs_f64() * room + round_trip;
    let limit = seen.limit.as_secs_f64();
    let mut course = Course {
        total_ms: ready,
        downtime_ms: 0.0,
        bytes: 0.0,
        converges: false,
    };
    // Sends a round; what was written meanwhile is returned.
    let send = |course: &mut Course, bytes: f64| {
        let took = bytes / goodput + round_trip;
        course.total_ms += took * 1e3;
        course.bytes += bytes;
        (rate * took).min(cap)
    };
    let (mut sending, mut dirtied) = match seen.first {
        None => (
            seen.populated as f64,
            send(&mut course, seen.populated as f64),
        ),
        Some(first) => {
            course.total_ms = first.elapsed.as_secs_f64() * 1e3;
            course.bytes = first.bytes as f64;
            (first.bytes as f64, first.dirtied as f64)
        }
    };
    let mut shortened = 0;
    for round in 0..seen.max_rounds {
        let by_bytes = dirtied / goodput;
        let downtime = by_bytes + fixed;
        course.downtime_ms = downtime * 1e3;
        let within = downtime <= limit;
        // A few rounds more are sent where they shorten it, as the source does.
        let pays = shortened < 4 && dirtied <= sending * 0.75 && by_bytes > fixed.max(0.005);
        shortened += u32::from(within);
        if within && !pays {
            course.converges = true;
            course.total_ms += downtime * 1e3;
            course.bytes += dirtied;
            return course;
        }
        if !within && round > 3 && dirtied >= sending * 0.95 {
            break;
        }
        sending = dirtied;
        dirtied = send(&mut course, sending);
    }
    course
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: f64 = 1e6;

    fn seen() -> Seen {
        Seen {
            first: None,
            populated: 1_000_000_000,
            dirty_bytes_s: 20.0 * MB,
            peak_bytes_s: 30.0 * MB,
            working_set: 8_000_000,
            sampled: Duration::from_millis(500),
            goodput: Span {
                low: 800.0 * MB,
                likely: 1000.0 * MB,
                high: 1200.0 * MB,
            },
            round_trip: Duration::from_micros(200),
            fixed: Duration::from_millis(10),
            limit: Duration::from_millis(300),
            max_rounds: 30,
        }
    }

    fn assert_ordered(predicted: &Predicted) {
        for span in [predicted.total_ms, predicted.downtime_ms, predicted.bytes] {
            assert!(
                span.low <= span.likely && span.likely <= span.high,
                "{predicted:?}"
            );
            assert!(span.low >= 0.0 && span.high.is_finite(), "{predicted:?}");
        }
    }

    fn assert_likely(predicted: &Predicted, span: Span, range: std::ops::Range<f64>) {
        assert!(range.contains(&span.likely), "{predicted:?}");
    }

    #[test]
    fn a_quiet_guest_takes_as_long_as_its_memory_does() {
        let predicted = predict(&seen());
        assert_ordered(&predicted);
        assert!(predicted.converges);
        assert_likely(&predicted, predicted.total_ms, 1000.0..1200.0);
        assert_likely(&predicted, predicted.downtime_ms, 10.0..60.0);
        assert_likely(&predicted, predicted.bytes, 1.0e9..1.1e9);
    }

    #[test]
    fn a_guest_that_outruns_the_link_does_not_converge() {
        let mut fast = seen();
        fast.dirty_bytes_s = 3000.0 * MB;
        fast.peak_bytes_s = 3500.0 * MB;
        fast.working_set = 900_000_000;
        let predicted = predict(&fast);
        assert_ordered(&predicted);
        assert!(!predicted.converges, "{predicted:?}");
        // The same rate in few pages does.
        fast.working_set = 50_000_000;
        let predicted = predict(&fast);
        assert!(predicted.converges, "{predicted:?}");
        assert!(predicted.downtime_ms.likely >= 50.0, "{predicted:?}");
    }

    #[test]
    fn a_first_round_that_is_over_is_taken_as_it_was() {
        let mut known = seen();
        known.first = Some(FirstRound {
            elapsed: Duration::from_millis(1700),
            bytes: 900_000_000,
            dirtied: 4_000_000,
        });
        let predicted = predict(&known);
        assert_ordered(&predicted);
        // 4 ms for what is left, and the fixed part of the downtime.
        assert_likely(&predicted, predicted.total_ms, 1705.0..1760.0);
        assert_likely(&predicted, predicted.downtime_ms, 10.0..30.0);
        assert_likely(&predicted, predicted.bytes, 904.0e6..910.0e6);
    }

    #[test]
    fn nothing_known_is_no_panic() {
        let mut none = seen();
        none.goodput = Span::default();
        none.populated = 0;
        none.dirty_bytes_s = 0.0;
        none.peak_bytes_s = f64::from(u32::MAX);
        none.max_rounds = 0;
        assert_ordered(&predict(&none));
        none.max_rounds = u32::MAX;
        assert_ordered(&predict(&none));
    }
}
