//! The receiving half of a stream: says where the next bytes belong, and what they amount to once they are there.
//!
//! Bytes come in two ways. While the payload of a write or a reply, or a long message, is expected,
//! [`direct`](Receiver::direct) names their final places, and whoever does the I/O has them put there; otherwise, where a
//! region's file is to be written to, and always with TLS, they are [`feed`](Receiver::feed)-ed from a buffer. Nothing here
//! trusts a byte of the peer's.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;

use crate::channel::{Event, Token};
use crate::error::{Error, peer_text};
use crate::limits::{INBOX_LEN, STAGE_LEN};
use crate::region::{Extent, Region, RegionId, Regions};
use crate::stream::frame::{self, EXTENT_LEN, HEADER_LEN, Header, Kind};
use crate::stream::pipe::Pipe;
use crate::stream::sender::{is_long, skip};
use crate::sys::iovecs::Scatter;

/// A read of ours that the peer has not answered yet.
struct Awaited {
    number: u64,
    token: Token,
    region: Region,
    extents: Vec<Extent>,
}

/// A read of the peer's, checked.
pub(crate) struct Request {
    pub(crate) number: u64,
    pub(crate) region: Region,
    pub(crate) extents: Vec<Extent>,
}

/// What the next byte belongs to.
enum State {
    Head,
    Table(Header),
    /// Payload of a write (`read` is none) or a reply, into `extents` of the region.
    Memory {
        id: Option<RegionId>,
        region: Region,
        read: Option<Token>,
        left: u64,
    },
    Message(Header),
}

/// The state of the receiving half.
pub(crate) struct Receiver {
    regions: Regions,
    state: State,
    /// Bytes of the header, table or message so far.
    partial: Vec<u8>,
    /// Extents of the payload under way, and where in them the next byte goes.
    extents: Vec<Extent>,
    extent: usize,
    skip: u64,
    /// That payload is in long pieces: so, likely, is the next.
    long: bool,
    awaited: VecDeque<Awaited>,
    next_number: u64,
    requests: VecDeque<Request>,
    scratch: Scatter,
}

impl Receiver {
    /// At the start of a stream. The peer has access to `regions`.
    pub(crate) fn new(regions: Regions) -> Receiver {
        Receiver {
            regions,
            state: State::Head,
            partial: Vec::with_capacity(HEADER_LEN),
            extents: Vec::new(),
            extent: 0,
            skip: 0,
            long: false,
            awaited: VecDeque::new(),
            next_number: 0,
            requests: VecDeque::new(),
            scratch: Scatter::default(),
        }
    }

    /// The regions that the peer has access to.
    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Whether the next byte begins a frame.
    pub(crate) fn at_boundary(&self) -> bool {
        matches!(self.state, State::Head) && self.partial.is_empty()
    }

    /// Bytes that are held for a header, table or message that is not whole.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn held(&self) -> usize {
        self.partial.capacity()
    }

    /// Reads of ours without an answer.
    pub(crate) fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Expects the answer to a read. Returns the read's number.
    pub(crate) fn expect(&mut self, token: Token, region: Region, extents: Vec<Extent>) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.awaited.push_back(Awaited {
            number,
            token,
            region,
            extents,
        });
        number
    }

    /// The next read of the peer's that is to be answered.
    pub(crate) fn next_request(&mut self) -> Option<Request> {
        self.requests.pop_front()
    }

    /// Adds the final places of the bytes that come next, if they have any: then [`landed`](Self::landed) is told how
    /// many are there.
    pub(crate) fn direct(&mut self, scatter: &mut Scatter) -> Result<(), Error> {
        self.check_access()?;
        match &self.state {
            State::Memory { region, left, .. } if !is_staged(region) => {
                let most = usize::try_from(*left).unwrap_or(usize::MAX);
                scatter.push_region(region, &self.extents[self.extent..], self.skip, most);
            }
            State::Message(header) if message_len(header) - self.partial.len() > INBOX_LEN => {
                let filled = self.partial.len();
                let mut buffer = std::mem::take(&mut self.partial);
                buffer.resize(message_len(header), 0);
                let end = buffer.len();
                // `partial` comes back in `landed`.
                scatter.push_buffer(buffer, filled..end);
            }
            _ => {}
        }
        Ok(())
    }

    /// Bytes of payload that come next and are better spliced: into the file behind their region, in long pieces.
    pub(crate) fn spliced(&self) -> Option<usize> {
        match &self.state {
            State::Memory { region, left, .. } if self.long && is_staged(region) => {
                let most = usize::try_from(*left).unwrap_or(usize::MAX);
                region.backing()?.takes_pipes().then_some(most)
            }
            _ => None,
        }
    }

    /// Takes what is in `pipe`: no more than [`spliced`](Self::spliced) said.
    pub(crate) fn feed_pipe(
        &mut self,
        pipe: &mut Pipe,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Error> {
        self.check_access()?;
        if let State::Memory { region, .. } = &self.state
            && let Some(backing) = region.backing()
            && let Some(written) = backing.write_pipe(&self.extents[self.extent..], self.skip, pipe)
        {
            let n = written.map_err(|e| write_error(&e))?;
            return self.placed(n as u64, events);
        }
        // Others are at the file.
        let bytes = pipe.read_all().map_err(|e| receive_error(&e))?;
        self.feed(&bytes, events)
    }

    /// How many bytes behind those places are worth a look ahead: many, where they are to be written to a file. Of a long reply
    /// that goes to its final place only the header, so that its payload is copied from nowhere.
    pub(crate) fn look_ahead(&self) -> usize {
        if let State::Memory { region, .. } = &self.state
            && is_staged(region)
        {
            return STAGE_LEN;
        }
        if self.long && matches!(self.state, State::Head) {
            return HEADER_LEN + EXTENT_LEN;
        }
        let reply_is_next = match &self.state {
            State::Head => self.partial.is_empty(),
            State::Memory { .. } => true,
            State::Table(_) | State::Message(_) => false,
        };
        match self.awaited.front().filter(|_| reply_is_next) {
            Some(next) if is_staged(&next.region) => STAGE_LEN,
            Some(next) if payload_len(&next.extents) >= INBOX_LEN as u64 => HEADER_LEN,
            _ => INBOX_LEN,
        }
    }

    /// Takes note that the first `n` bytes of what `direct` added are in place.
    pub(crate) fn landed(
        &mut self,
        scatter: &mut Scatter,
        n: usize,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Error> {
        if let State::Message(header) = &self.state {
            let len = message_len(header);
            let direct = scatter.len();
            if let Some(mut buffer) = scatter.take_buffer() {
                buffer.truncate(len - direct + n);
                self.partial = buffer;
            }
        }
        self.placed(n as u64, events)
    }

    /// Takes `bytes`, copying what is payload to its place.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        events: &mut VecDeque<Event>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let n = match &self.state {
                State::Head => self.collect(bytes, HEADER_LEN),
                State::Table(header) => self.collect(bytes, header.table_len()),
                State::Message(header) => self.collect(bytes, message_len(header)),
                State::Memory { .. } => self.place(bytes)?,
            };
            self.placed(n as u64, events)?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Copies from `bytes` until `partial` has `len` bytes.
    fn collect(&mut self, bytes: &[u8], len: usize) -> usize {
        let n = bytes.len().min(len - self.partial.len());
        self.partial.extend_from_slice(&bytes[..n]);
        n
    }

    /// Copies payload to its place: by the region's file, or by the mapping.
    fn place(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        self.check_access()?;
        let State::Memory { region, left, .. } = &self.state else {
            return Ok(0);
        };
        let extents = &self.extents[self.extent..];
        let most = usize::try_from(*left)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        if let Some(backing) = region.backing()
            && let Some(written) = backing.write(extents, self.skip, &bytes[..most])
        {
            return written.map_err(|e| write_error(&e));
        }
        let mut scatter = std::mem::take(&mut self.scratch);
        // No more than there is: the kernel pins all pages named before it copies.
        scatter.push_region(region, extents, self.skip, most);
        let n = scatter.copy_from(bytes).map_err(|e| receive_error(&e))?;
        scatter.clear();
        self.scratch = scatter;
        Ok(n)
    }

    /// The access of the region under way may have been revoked since the frame began.
    fn check_access(&self) -> Result<(), Error> {
        if let State::Memory { id: Some(id), .. } = &self.state
            && !self
                .regions
                .get(*id)
                .is_some_and(|(_, access)| access.peer_writes)
        {
            return Err(misbehaved("a write into a region that was closed to it"));
        }
        Ok(())
    }

    /// Takes note that `n` bytes more are where they belong, and steps on when that completes something.
    fn placed(&mut self, n: u64, events: &mut VecDeque<Event>) -> Result<(), Error> {
        match &mut self.state {
            State::Head => {
                if let Ok(bytes) = <&[u8; HEADER_LEN]>::try_from(self.partial.as_slice()) {
                    let header = Header::decode(bytes).map_err(misbehaved)?;
                    self.partial.clear();
                    self.begin(header)?;
                }
            }
            State::Table(header) => {
                if self.partial.len() == header.table_len() {
                    let header = *header;
                    frame::decode_table(&header, &self.partial, &mut self.extents)
                        .map_err(misbehaved)?;
                    self.partial.clear();
                    self.begin_extents(&header)?;
                }
            }
            State::Memory { left, read, .. } => {
                *left -= n;
                skip(&self.extents, n, &mut self.extent, &mut self.skip);
                if *left == 0 {
                    events.extend(read.map(Event::Fetched));
                    self.state = State::Head;
                }
            }
            State::Message(header) => {
                if self.partial.len() == message_len(header) {
                    let header = *header;
                    self.end_message(&header, events)?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, header: Header) -> Result<(), Error> {
        self.state = match header.kind {
            Kind::Write | Kind::Read => State::Table(header),
            Kind::Message | Kind::Fault => State::Message(header),
            Kind::Reply => {
                let read = self
                    .awaited
                    .pop_front()
                    .ok_or_else(|| misbehaved("a reply to no read"))?;
                let len = payload_len(&read.extents);
                if read.number != header.number || len != header.payload {
                    return Err(misbehaved(
                        "a reply that does not belong to the oldest read",
                    ));
                }
                self.extents = read.extents;
                self.start_payload(None, read.region, Some(read.token), header.payload)
            }
        };
        Ok(())
    }

    fn begin_extents(&mut self, header: &Header) -> Result<(), Error> {
        let (region, access) = self
            .regions
            .get(header.region)
            .ok_or_else(|| misbehaved("a region that does not exist or is closed to it"))?;
        if self
            .extents
            .iter()
            .any(|extent| region.address(*extent).is_none())
        {
            return Err(misbehaved(
                "an extent that is empty or outside of its region",
            ));
        }
        if header.kind == Kind::Read {
            if !access.peer_reads {
                return Err(misbehaved("a read of a region that it may not read"));
            }
            let extents = std::mem::take(&mut self.extents);
            self.requests.push_back(Request {
                number: header.number,
                region,
                extents,
            });
            self.state = State::Head;
        } else {
            if !access.peer_writes {
                return Err(misbehaved("a write into a region that it may not write"));
            }
            self.state = self.start_payload(Some(header.region), region, None, header.payload);
        }
        Ok(())
    }

    fn start_payload(
        &mut self,
        id: Option<RegionId>,
        region: Region,
        read: Option<Token>,
        left: u64,
    ) -> State {
        self.extent = 0;
        self.skip = 0;
        self.long = is_long(left, self.extents.len());
        State::Memory {
            id,
            region,
            read,
            left,
        }
    }

    fn end_message(&mut self, header: &Header, events: &mut VecDeque<Event>) -> Result<(), Error> {
        if crc32c::crc32c(&self.partial) != header.check {
            return Err(misbehaved("a message's checksum is wrong"));
        }
        self.state = State::Head;
        if header.kind == Kind::Fault {
            return Err(Error::Refused(peer_text(&self.partial)));
        }
        // A short message is copied out, so that the collecting buffer is kept; a long one is handed over.
        let message = if self.partial.len() <= INBOX_LEN {
            let message = Bytes::copy_from_slice(&self.partial);
            self.partial.clear();
            message
        } else {
            Bytes::from(std::mem::take(&mut self.partial))
        };
        events.push_back(Event::Message(message));
        Ok(())
    }
}

/// Whether what arrives for `region` goes through a buffer now, and from there into its file.
fn is_staged(region: &Region) -> bool {
    region.backing().is_some_and(|backing| !backing.is_busy())
}

fn payload_len(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Bytes of the message that `header` announces; the header's check bounds it.
fn message_len(header: &Header) -> usize {
    usize::try_from(header.payload).unwrap_or(usize::MAX)
}

fn misbehaved(what: &'static str) -> Error {
    Error::PeerMisbehaved(what.to_owned())
}

/// What it means that a region's file does not take the peer's bytes: nothing of that is the peer's fault.
fn write_error(error: &io::Error) -> Error {
    Error::NoMemory(format!(
        "{error} while writing to the file of the guest's RAM; is its file system full?"
    ))
}

/// What an error of the kernel's means when it was to place the peer's bytes.
pub(crate) fn receive_error(error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM | libc::ENOSPC | libc::ENOBUFS) => Error::NoMemory(
            format!("{error} while placing them; is the file system of the guest's RAM full?"),
        ),
        _ => Error::io("receiving from the peer", error),
    }
}
