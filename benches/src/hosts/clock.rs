//! Clocks of two hosts, which nobody has set alike: how far they are apart is measured over the link itself.
//!
//! One side sends a byte, the other answers with its time. That answer was given at some moment between the byte and the
//! answer's arrival; so the distance is known to half the time that the quickest of many took, whatever way the rest of it
//! went. It is read before and after each migration, and what lies between is taken to lie on a straight line.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::stats::Spread;

/// How long a connection, or one answer, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A host's time: milliseconds since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// One that begins at `epoch`.
    pub fn from(epoch: Instant) -> Clock {
        Clock(epoch)
    }

    /// What it shows at a time.
    pub fn at(self, time: Instant) -> f64 {
        let before = self.0.saturating_duration_since(time);
        (time.saturating_duration_since(self.0).as_secs_f64() - before.as_secs_f64()) * 1e3
    }

    /// What it shows now.
    pub fn now(self) -> f64 {
        self.at(Instant::now())
    }
}

/// Another host's clock, as it was read over the link.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// When, by the clock of the side that asked.
    pub at_ms: f64,
    /// What the other clock shows more.
    pub ahead_ms: f64,
    /// How far that may be off: half of the shortest round trip.
    pub error_ms: f64,
    /// The median round trip, in microseconds.
    pub rtt_us: f64,
}

/// Answers the pings of one caller, from a thread.
///
/// # Errors
/// The address cannot be listened at.
pub fn listen(at: SocketAddr, clock: Clock) -> Result<SocketAddr, String> {
    let listener =
        TcpListener::bind(at).map_err(|error| format!("cannot listen at {at}: {error}"))?;
    let bound = listener.local_addr().map_err(|error| error.to_string())?;
    std::thread::spawn(move || {
        let Ok((mut caller, _)) = listener.accept() else {
            return;
        };
        drop(listener);
        let _ = caller.set_nodelay(true);
        let mut byte = [0];
        while caller.read_exact(&mut byte).is_ok() {
            if caller.write_all(&clock.now().to_le_bytes()).is_err() {
                return;
            }
        }
    });
    Ok(bound)
}

/// Pings whoever [listens](listen) at `to` so many times.
///
/// # Errors
/// Nobody answers there.
pub fn ping(to: SocketAddr, count: usize, clock: Clock) -> Result<Reading, String> {
    let gone = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(gone)?;
    stream.set_nodelay(true).map_err(gone)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(gone)?;
    let mut trips = Vec::with_capacity(count);
    let mut best: Option<Reading> = None;
    for _ in 0..count {
        let sent = clock.now();
        stream.write_all(&[0]).map_err(gone)?;
        let mut theirs = [0; 8];
        stream.read_exact(&mut theirs).map_err(gone)?;
        let trip = clock.now() - sent;
        trips.push(trip * 1e3);
        let middle = sent + trip / 2.0;
        if best.is_none_or(|best| trip / 2.0 < best.error_ms) {
            best = Some(Reading {
                at_ms: middle,
                ahead_ms: f64::from_le_bytes(theirs) - middle,
                error_ms: trip / 2.0,
                rtt_us: 0.0,
            });
        }
    }
    let median = Spread::of(&trips).map(|spread| spread.median);
    let reading = best
        .zip(median)
        .map(|(best, rtt_us)| Reading { rtt_us, ..best });
    reading.ok_or_else(|| "nothing was asked".to_owned())
}

/// Another host's clock over a while.
#[derive(Clone, Copy, Debug)]
pub struct Between {
    /// Before it.
    pub before: Reading,
    /// After it.
    pub after: Reading,
}

impl Between {
    /// A time of the other host's as one of ours, in milliseconds.
    pub fn ours(&self, theirs: f64) -> f64 {
        let (from, to) = (self.before, self.after);
        // The clocks drift by far less than they are apart: which of both distances finds the place does not matter.
        let span = to.at_ms - from.at_ms;
        let share = match span > 0.0 {
            true => ((theirs - from.ahead_ms - from.at_ms) / span).clamp(0.0, 1.0),
            false => 0.0,
        };
        theirs - (from.ahead_ms + (to.ahead_ms - from.ahead_ms) * share)
    }

    /// How far that may be off: by what was not known at either end, and by half of what the clocks have drifted meanwhile.
    pub fn error_ms(&self) -> f64 {
        let drift = (self.after.ahead_ms - self.before.ahead_ms).abs();
        self.before.error_ms.max(self.after.error_ms) + drift / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_ahead_is_read_within_the_error() {
        let epoch = Instant::now();
        let behind = epoch + Duration::from_millis(1500);
        let (ours, theirs) = (Clock::from(behind), Clock::from(epoch));
        let at = listen(SocketAddr::from(([127, 0, 0, 1], 0)), theirs).expect("a free port");
        let reading = ping(at, 50, ours).expect("it answers");
        let off = (reading.ahead_ms - 1500.0).abs();
        assert!(off <= reading.error_ms, "{off} ms off: {reading:?}");
        assert!(
            reading.rtt_us > 0.0 && reading.error_ms < 1000.0,
            "{reading:?}"
        );
        assert!(ours.at(epoch) < -1400.0, "a time before it began");
    }

    #[test]
    fn nobody_answers() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let at = taken.local_addr().expect("an address");
        assert!(listen(at, Clock::from(Instant::now())).is_err());
        drop(taken);
        let refused = ping(at, 1, Clock::from(Instant::now())).expect_err("nobody is there");
        assert!(refused.contains("refused"), "{refused}");
    }

    #[test]
    fn what_lies_between_two_readings_lies_on_a_line() {
        let reading = |at_ms, ahead_ms| Reading {
            at_ms,
            ahead_ms,
            error_ms: 0.25,
            rtt_us: 600.0,
        };
        let between = Between {
            before: reading(0.0, 1000.0),
            after: reading(100.0, 1001.0),
        };
        assert!((between.ours(1000.0) - 0.0).abs() < 1e-9);
        assert!((between.ours(1050.5) - 50.0).abs() < 0.01);
        assert!((between.ours(1101.0) - 100.0).abs() < 1e-9);
        assert!((between.error_ms() - 0.75).abs() < 1e-9);
    }
}
