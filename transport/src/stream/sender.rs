//! The sending half of a stream: a queue of frames, and how far the first of them has gone. Pure bookkeeping.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::channel::{Event, Token};
use crate::limits::{MAX_QUEUED, MAX_SEND_BYTES};
use crate::region::{Extent, Region, RegionId};
use crate::stream::frame::{self, Kind};
use crate::stream::pipe::{Outlet, Pipe};
use crate::sys::iovecs::Gather;

/// Pieces of a region of fewer bytes, on average over a frame, are copied: a reference costs more than they do.
const LONG: u64 = 64 << 10;

/// What takes what is to be sent next, in order.
pub(crate) trait Pieces {
    /// Bytes in all.
    fn len(&self) -> usize;
    /// Whether no further piece fits.
    fn is_full(&self) -> bool;
    /// Adds shared bytes.
    fn push_bytes(&mut self, bytes: Bytes);
    /// Adds pieces of a region from byte `skip` of the first extent on, `most` bytes at the most. Extents outside of the
    /// region end it: they were checked when they came in.
    fn push_region(&mut self, region: &Region, extents: &[Extent], skip: u64, most: usize);
}

/// What follows a frame's head.
enum Body {
    Nothing,
    Message(Bytes),
    Memory {
        region: Region,
        extents: Vec<Extent>,
        len: u64,
    },
}

struct Frame {
    /// Header and extent table.
    head: Bytes,
    body: Body,
    /// Reported when the frame has left.
    token: Option<Token>,
}

/// Where the first frame stands.
#[derive(Default)]
struct Cursor {
    /// Bytes of the head that have left.
    head: usize,
    /// Bytes of the body that have left.
    body: u64,
    /// The extent that comes next, and the bytes of it that have left.
    extent: usize,
    skip: u64,
}

/// Frames to send, in order.
#[derive(Default)]
pub(crate) struct Sender {
    queue: VecDeque<Frame>,
    cursor: Cursor,
    /// Of the frames in the queue, those that the owner of the channel waits for.
    awaited: usize,
    replies: usize,
}

impl Sender {
    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Frames that end in a `Sent`.
    pub(crate) fn awaited(&self) -> usize {
        self.awaited
    }

    /// Whether the next byte begins a frame.
    pub(crate) fn at_boundary(&self) -> bool {
        self.cursor.head == 0
    }

    /// Queues a write. Its extents have been checked against the region.
    pub(crate) fn write(
        &mut self,
        token: Token,
        id: RegionId,
        region: Region,
        extents: Vec<Extent>,
    ) {
        let head = frame::encode_extents(Kind::Write, id, &extents, 0);
        self.push_memory(head.into(), region, extents, Some(token));
    }

    /// Queues the request of a read.
    pub(crate) fn read(&mut self, id: RegionId, extents: &[Extent], number: u64) {
        let head = frame::encode_extents(Kind::Read, id, extents, number);
        self.push(Frame {
            head: head.into(),
            body: Body::Nothing,
            token: None,
        });
    }

    /// Queues the answer to the peer's read. False: more reads are unanswered than the peer may have.
    #[must_use]
    pub(crate) fn reply(&mut self, region: Region, extents: Vec<Extent>, number: u64) -> bool {
        if self.replies == MAX_QUEUED {
            return false;
        }
        self.replies += 1;
        let head = frame::encode_reply(extents.iter().map(|e| e.len).sum(), number);
        self.push_memory(Bytes::copy_from_slice(&head), region, extents, None);
        true
    }

    /// Queues a message.
    pub(crate) fn message(&mut self, token: Token, message: Bytes) {
        let head = Bytes::copy_from_slice(&frame::encode_message(Kind::Message, &message));
        self.push(Frame {
            head,
            body: Body::Message(message),
            token: Some(token),
        });
    }

    fn push_memory(
        &mut self,
        head: Bytes,
        region: Region,
        extents: Vec<Extent>,
        token: Option<Token>,
    ) {
        let len = extents.iter().map(|e| e.len).sum();
        self.push(Frame {
            head,
            body: Body::Memory {
                region,
                extents,
                len,
            },
            token,
        });
    }

    fn push(&mut self, frame: Frame) {
        self.awaited += usize::from(frame.token.is_some());
        self.queue.push_back(frame);
    }

    /// Adds what comes next to `gather`, `most` bytes at the most (and never more than
    /// [`MAX_SEND_BYTES`]): the rest of the first frame, and as many frames more as fit.
    pub(crate) fn gather(&self, gather: &mut Gather, most: usize) {
        self.collect(gather, most, |_| true);
    }

    /// The same, but only up to the next frame that is better spliced.
    pub(crate) fn gather_short(&self, gather: &mut Gather) {
        self.collect(gather, MAX_SEND_BYTES, |frame| !frame.is_long());
    }

    /// Whether what comes next is better spliced: long pieces of a file.
    pub(crate) fn is_long(&self) -> bool {
        self.queue.front().is_some_and(Frame::is_long)
    }

    /// Puts what comes next into `pipe`, up to the next frame that is better copied.
    pub(crate) fn splice(&self, pipe: &mut Pipe) {
        self.collect(pipe, MAX_SEND_BYTES, Frame::is_long);
    }

    /// Adds the rest of the first frame, and as many frames more as fit and are `wanted`.
    fn collect(&self, pieces: &mut impl Pieces, most: usize, wanted: impl Fn(&Frame) -> bool) {
        let most = most.min(MAX_SEND_BYTES);
        let fresh = Cursor::default();
        for (index, frame) in self.queue.iter().enumerate() {
            if index > 0 && !wanted(frame) {
                break;
            }
            let cursor = if index == 0 { &self.cursor } else { &fresh };
            let room = most - pieces.len();
            let head = frame.head.slice(cursor.head..);
            let whole = head.len() as u64 + frame.body.len() - cursor.body;
            let first = pieces.len();
            pieces.push_bytes(head.slice(..head.len().min(room)));
            if pieces.len() - first < head.len() {
                break;
            }
            let room = most - pieces.len();
            match &frame.body {
                Body::Nothing => {}
                Body::Message(bytes) => {
                    let start = usize::try_from(cursor.body).unwrap_or(bytes.len());
                    let end = bytes.len().min(start + room);
                    pieces.push_bytes(bytes.slice(start..end));
                }
                Body::Memory {
                    region, extents, ..
                } => {
                    pieces.push_region(region, &extents[cursor.extent..], cursor.skip, room);
                }
            }
            let added = pieces.len() - first;
            if pieces.len() == most || (added as u64) < whole || pieces.is_full() {
                break;
            }
        }
    }

    /// Takes note that `n` bytes of what `gather` gave have left, and reports the frames that are whole by that.
    pub(crate) fn advance(&mut self, n: usize, events: &mut VecDeque<Event>) {
        let mut left = n as u64;
        while let Some(frame) = self.queue.front() {
            let head = (frame.head.len() - self.cursor.head) as u64;
            if left < head {
                self.cursor.head += usize::try_from(left).unwrap_or(0);
                return;
            }
            left -= head;
            self.cursor.head = frame.head.len();
            let body = frame.body.len() - self.cursor.body;
            if left < body {
                self.cursor.body += left;
                if let Body::Memory { extents, .. } = &frame.body {
                    skip(
                        extents,
                        left,
                        &mut self.cursor.extent,
                        &mut self.cursor.skip,
                    );
                }
                return;
            }
            left -= body;
            self.finish_first(events);
        }
    }

    fn finish_first(&mut self, events: &mut VecDeque<Event>) {
        self.cursor = Cursor::default();
        let Some(frame) = self.queue.pop_front() else {
            return;
        };
        if let Some(token) = frame.token {
            self.awaited -= 1;
            events.push_back(Event::Sent(token));
        } else if matches!(frame.body, Body::Memory { .. }) {
            self.replies -= 1;
        }
    }
}

impl Frame {
    /// Whether it is long pieces of a file that pages can be taken from.
    fn is_long(&self) -> bool {
        match &self.body {
            Body::Memory {
                region,
                extents,
                len,
            } => is_long(*len, extents.len()) && region.outlet().is_some_and(Outlet::is_open),
            Body::Nothing | Body::Message(_) => false,
        }
    }
}

impl Body {
    fn len(&self) -> u64 {
        match self {
            Body::Nothing => 0,
            Body::Message(bytes) => bytes.len() as u64,
            Body::Memory { len, .. } => *len,
        }
    }
}

/// Whether a payload of `len` bytes in so many extents is better spliced.
pub(crate) fn is_long(len: u64, extents: usize) -> bool {
    len >= LONG * extents as u64
}

/// Moves (`index`, `offset`) in `extents` on by `n` bytes. Stays within them.
pub(crate) fn skip(extents: &[Extent], n: u64, index: &mut usize, offset: &mut u64) {
    let mut left = n;
    while let Some(extent) = extents.get(*index) {
        let rest = extent.len - *offset;
        if left < rest {
            *offset += left;
            return;
        }
        left -= rest;
        *index += 1;
        *offset = 0;
    }
}
