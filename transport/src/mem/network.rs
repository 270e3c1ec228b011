//! The network as its user sees it: channels, virtual time, and what goes wrong.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::mem::channel::MemChannel;
use crate::mem::state::State;
use crate::region::Regions;

/// What goes wrong, and how slow things are. Times are virtual nanoseconds.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Least delay of each piece of data on its way; also the longest pause between two pieces of a write that leave.
    pub delay_min: u64,
    /// Greatest delay of each piece; drawn evenly between the two. Order within a channel is kept.
    pub delay_max: u64,
    /// Speed of each channel and direction; unlimited if none.
    pub bytes_per_second: Option<u64>,
    /// A write is read from the source's memory and placed in pieces of at most so many bytes (at least 1), each at its
    /// own time.
    pub piece: u64,
}

impl Default for Faults {
    /// Some microseconds a piece, no limit of speed, pieces of 4 KiB.
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
#[derive(Clone)]
pub struct Network {
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").finish_non_exhaustive()
    }
}

impl Network {
    /// A network whose chances all follow from `seed`.
    pub fn new(seed: u64, faults: Faults) -> Network {
        Network {
            state: Arc::new(Mutex::new(State::new(seed, faults))),
        }
    }

    /// A new channel: its two ends, with the regions of each end.
    pub fn pair(&self, a: &Regions, b: &Regions) -> (MemChannel, MemChannel) {
        let first = self.lock().add_channel(a, b);
        (
            MemChannel::new(self.clone(), first),
            MemChannel::new(self.clone(), first + 1),
        )
    }

    /// Moves virtual time to `now` (nanoseconds) and does all that happens until then. Never goes back.
    pub fn advance_to(&self, now: u64) {
        self.lock().advance_to(now);
    }

    /// When the next thing happens, if anything will.
    pub fn next_event(&self) -> Option<u64> {
        self.lock().next_event()
    }

    /// Cuts every channel there is: both ends report an error. Channels made later are sound.
    pub fn cut(&self) {
        self.cut_where(|_, _| true);
    }

    /// Cuts the ends for which `which` is true of the channel's number, from 0 in the order in which they were made, and
    /// of the end, 0 for the first and 1 for the second. The other end of a channel of which only one is cut hears nothing
    /// more and is told nothing.
    pub fn cut_where(&self, which: impl Fn(usize, usize) -> bool) {
        self.lock().cut_where(which);
    }

    /// How many channels have been made.
    pub fn channels(&self) -> usize {
        self.lock().ends.len() / 2
    }

    /// How many writes had left in part, and not whole, when their end of the channel failed or was dropped.
    pub fn partial_writes(&self) -> u64 {
        self.lock().partial_writes
    }

    /// While on, nothing arrives, and nobody is told. Senders go on until 4 MiB are on their way in each direction of a
    /// channel. When it ends, what was held up arrives, as TCP sends lost segments again.
    pub fn blackhole(&self, on: bool) {
        self.lock().set_blackhole([on; 2]);
    }

    /// The same for what is sent by one end of each channel only, 0 for the first and 1 for the second.
    pub fn blackhole_from(&self, end: usize, on: bool) {
        let mut state = self.lock();
        let mut blackhole = state.blackhole();
        blackhole[end % 2] = on;
        state.set_blackhole(blackhole);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
