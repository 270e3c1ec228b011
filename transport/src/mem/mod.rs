//! An in-process network with virtual time and seeded faults, for simulations. Nothing here blocks or reads a clock.

use std::task::Waker;
use std::time::Duration;

use crate::channel::{Channel, Event, Op, Stats, SubmitError, Token};
use crate::error::Error;
use crate::region::Regions;

/// What goes wrong, and how slow things are. Times are virtual nanoseconds.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Least delay of each piece of data.
    pub delay_min: u64,
    /// Greatest delay of each piece; drawn evenly between the two. Order within a channel is kept.
    pub delay_max: u64,
    /// Speed of each channel and direction; unlimited if none.
    pub bytes_per_second: Option<u64>,
    /// A write is read from the source's memory and placed in pieces of at most so many bytes, each at its own time.
    pub piece: u64,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            delay_min: 1_000,
            delay_max: 100_000,
            bytes_per_second: None,
            piece: 4096,
        }
    }
}

/// A network. Cheap to clone; all clones are the same network.
#[derive(Clone, Debug)]
pub struct Network {}

impl Network {
    /// A network whose chances all follow from `seed`.
    pub fn new(_seed: u64, _faults: Faults) -> Network {
        Network {}
    }

    /// A new channel: its two ends, with the regions of each end.
    pub fn pair(&self, _a: &Regions, _b: &Regions) -> (MemChannel, MemChannel) {
        (MemChannel {}, MemChannel {})
    }

    /// Moves virtual time to `now` (nanoseconds) and does all that happens until then. Never goes back.
    pub fn advance_to(&self, _now: u64) {}

    /// When the next thing happens, if anything will.
    pub fn next_event(&self) -> Option<u64> {
        None
    }

    /// Cuts every channel there is: both ends report an error. Channels made later are sound.
    pub fn cut(&self) {}

    /// While on, whatever is sent is lost without an error on either side (what is in flight included).
    pub fn blackhole(&self, _on: bool) {}
}

/// One end of a channel.
#[derive(Debug)]
pub struct MemChannel {}

impl Channel for MemChannel {
    fn submit(&mut self, _token: Token, _op: Op) -> Result<(), SubmitError> {
        Err(SubmitError::Closed)
    }

    fn poll(&mut self, _timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        Err(Error::Closed)
    }

    fn waker(&self) -> Waker {
        Waker::noop().clone()
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn kind(&self) -> &'static str {
        "mem"
    }
}
