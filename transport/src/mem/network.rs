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
        self.lock().cut();
    }

    /// While on, nothing arrives, and nobody is told. Senders go on until 4 MiB are on their way in each direction of a
    /// channel. When it ends, what was held up arrives, as TCP sends lost segments again.
    pub fn blackhole(&self, on: bool) {
        self.lock().blackhole = on;
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
