//! The interface that every back end implements: one [`Channel`] is one ordered, reliable path to the peer.
//!
//! A channel is passive: it has no thread of its own. The thread that owns it submits operations and polls for events;
//! any other thread may only wake it. Operations of one channel take effect at the peer in the order in which they were
//! submitted: a message arrives after the writes submitted before it have landed. Between channels there is no order.

use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;

use crate::error::Error;
use crate::region::{Extent, RegionId};

/// Names an operation of the caller's, and comes back in the event that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// What a channel can be asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Copy `extents` of the local region to the same offsets of the peer's region of that name. At most
    /// [`MAX_EXTENTS`](crate::limits::MAX_EXTENTS) extents and [`MAX_PAYLOAD`](crate::limits::MAX_PAYLOAD) bytes.
    Write {
        /// The region on both sides.
        region: RegionId,
        /// What to copy.
        extents: Vec<Extent>,
    },
    /// Copy `extents` of the peer's region into the same offsets of the local one. Same limits as `Write`.
    Read {
        /// The region on both sides.
        region: RegionId,
        /// What to fetch.
        extents: Vec<Extent>,
    },
    /// Deliver a message of 1 to [`MAX_MESSAGE`](crate::limits::MAX_MESSAGE) bytes.
    Send(Bytes),
}

/// What a channel reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A write or a message was handed over whole: this side will not read the memory for it again. It does not say
    /// that the peer has it.
    Sent(Token),
    /// All bytes of a read are in the local region.
    Fetched(Token),
    /// The peer sent a message; its earlier writes on this channel have landed.
    Message(Bytes),
}

/// Why an operation was not taken. The channel is as before.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// [`MAX_QUEUED`](crate::limits::MAX_QUEUED) operations are under way: poll, then submit again.
    #[error("the channel's queue is full")]
    Full(Op),
    /// The operation itself is wrong: an unknown region, an extent outside it, a limit exceeded. The caller's fault.
    #[error("the operation is not valid: {0}")]
    Invalid(&'static str),
    /// The channel has failed before; `poll` says why.
    #[error("the channel is closed")]
    Closed,
}

/// Bytes that crossed the wire, headers and encryption included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes handed to the network.
    pub sent: u64,
    /// Bytes taken from the network.
    pub received: u64,
}

/// One ordered, reliable path to a peer. See the module's text for the rules.
pub trait Channel: Send {
    /// Takes an operation. Never blocks.
    ///
    /// # Errors
    /// [`SubmitError`]; the operation was not taken.
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError>;

    /// Moves bytes, and returns the next event. `timeout` bounds the wait for one: zero polls, `None` waits for an
    /// event or a wake-up. `Ok(None)`: nothing to report (time out, or woken).
    ///
    /// # Errors
    /// The channel is broken for good and every operation under way is lost: see [`Error`]. Repeats the error when
    /// called again.
    fn poll(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, Error>;

    /// While paused, nothing of the peer's is taken from the network and nothing of it lands in memory: the peer has to
    /// wait. Operations of this side go on, and what had been taken before is still reported. A receive that is under way
    /// is called back, so that this holds when the call returns. The in-process network takes no notice.
    fn pause(&mut self, paused: bool);

    /// Ends a `poll` that waits, now or the next one. May be used from any thread, and after the channel is gone.
    fn waker(&self) -> Waker;

    /// Bytes so far.
    fn stats(&self) -> Stats;

    /// `"tcp"`, `"tls"`, `"unix"`, `"mem"` or `"rdma"`.
    fn kind(&self) -> &'static str;
}
