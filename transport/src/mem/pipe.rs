//! One direction of a channel, as data: what waits, what leaves, and what flies.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::channel::Token;
use crate::region::{Extent, Region, RegionId};

/// Bytes on their way in one direction of a channel, at most, as in the buffers of a socket.
pub(super) const BUFFER: u64 = 4 << 20;

/// What an end asks its pipe to send.
pub(super) enum Item {
    Write {
        token: Token,
        from: Region,
        region: RegionId,
        extents: Vec<Extent>,
    },
    Message {
        token: Token,
        message: Bytes,
    },
    /// A read's request; the answer goes through the pipe the other way.
    Request {
        token: Token,
        region: RegionId,
        extents: Vec<Extent>,
    },
    /// The answer, from the region of the one who is asked into the region of the one who asks.
    Reply {
        token: Token,
        from: Region,
        region: RegionId,
        extents: Vec<Extent>,
    },
}

/// What is on its way. It has left the sender's memory.
pub(super) enum Load {
    /// The head of a write.
    Announced {
        region: RegionId,
        extents: Vec<Extent>,
    },
    /// Some of a write's or reply's bytes.
    Piece {
        region: RegionId,
        offset: u64,
        data: Vec<u8>,
        write: bool,
    },
    /// A reply is whole.
    Fetched(Token),
    Message(Bytes),
    Request {
        token: Token,
        region: RegionId,
        extents: Vec<Extent>,
    },
    /// The sender found the receiver at fault, and says why.
    Fault(String),
    /// The sender is gone.
    End,
}

/// A load with its time of arrival.
pub(super) struct Flying {
    pub(super) at: u64,
    pub(super) load: Load,
    pub(super) bytes: u64,
}

/// The item that is leaving.
pub(super) struct Leaving {
    pub(super) item: Item,
    /// When its next piece leaves.
    pub(super) at: u64,
    /// The extent that comes next, and the bytes of it that have left.
    pub(super) extent: usize,
    pub(super) skip: u64,
}

/// One direction of a channel: what has not begun to leave, what is leaving, and what is on its way.
#[derive(Default)]
pub(super) struct Pipe {
    pub(super) queue: VecDeque<Item>,
    pub(super) leaving: Option<Leaving>,
    pub(super) flying: VecDeque<Flying>,
    pub(super) flying_bytes: u64,
}

/// What happens next in a pipe.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Arrive,
    Leave,
}

impl Item {
    /// How many extents' bytes go with it.
    pub(super) fn extents_to_carry(&self) -> usize {
        match self {
            Item::Write { extents, .. } | Item::Reply { extents, .. } => extents.len(),
            Item::Message { .. } | Item::Request { .. } => 0,
        }
    }
}
