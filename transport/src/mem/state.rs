//! The inside of the network: virtual time, and what is in flight on every channel.
//!
//! Each direction of a channel is a *pipe*, moved only by `advance_to`, one step at a time in the order of the steps'
//! times (ties go by the pipe's number). The first operation of its queue *leaves* piece by piece: each piece is read from
//! the sender's memory at that moment. It then *flies*, and is placed in the receiver's memory when it arrives. An
//! operation is `Sent` when its last piece has left, which may be long before that arrives, as with a socket.

use std::collections::VecDeque;

use crate::channel::{Event, Stats};
use crate::error::Error;
use crate::mem::network::Faults;
use crate::mem::pipe::{BUFFER, Flying, Item, Leaving, Load, Pipe, Step};
use crate::mem::random::Random;
use crate::region::{Extent, Region, RegionId, Regions};
use crate::stream::frame::{EXTENT_LEN, HEADER_LEN};

/// One end of a channel.
pub(super) struct End {
    pub(super) regions: Regions,
    pub(super) events: VecDeque<Event>,
    pub(super) failed: Option<Error>,
    pub(super) woken: bool,
    pub(super) stats: Stats,
    /// Operations that have not ended.
    pub(super) pending: usize,
    /// What this end sends.
    pipe: Pipe,
}

impl End {
    fn new(regions: &Regions) -> End {
        End {
            regions: regions.clone(),
            events: VecDeque::new(),
            failed: None,
            woken: false,
            stats: Stats::default(),
            pending: 0,
            pipe: Pipe::default(),
        }
    }
}

/// All there is. Ends `2n` and `2n + 1` are a channel.
pub(super) struct State {
    now: u64,
    random: Random,
    faults: Faults,
    /// Whether nothing arrives of what the first ends send, and the second.
    blackhole: [bool; 2],
    pub(super) ends: Vec<End>,
    /// Writes that were cut off when part of them had left.
    pub(super) partial_writes: u64,
    /// The next step, if it was looked for since anything changed.
    next: Option<Option<Next>>,
}

/// When a step is taken, by the pipe of which end, and which.
type Next = (u64, usize, Step);

impl State {
    pub(super) fn new(seed: u64, faults: Faults) -> State {
        State {
            now: 0,
            random: Random::new(seed),
            faults,
            blackhole: [false; 2],
            ends: Vec::new(),
            partial_writes: 0,
            next: None,
        }
    }

    /// Adds two ends; returns the number of the first.
    pub(super) fn add_channel(&mut self, a: &Regions, b: &Regions) -> usize {
        let first = self.ends.len();
        self.ends.push(End::new(a));
        self.ends.push(End::new(b));
        first
    }

    /// See [`Network::advance_to`](crate::mem::Network::advance_to).
    pub(super) fn advance_to(&mut self, now: u64) {
        while let Some((at, end, step)) = self.next_step() {
            if at > now {
                break;
            }
            self.now = self.now.max(at);
            match step {
                Step::Leave => self.leave(end),
                Step::Arrive => self.arrive(end),
            }
        }
        self.now = self.now.max(now);
    }

    /// See [`Network::next_event`](crate::mem::Network::next_event).
    pub(super) fn next_event(&mut self) -> Option<u64> {
        self.next_step().map(|(at, ..)| at)
    }

    /// See [`Network::cut_where`](crate::mem::Network::cut_where).
    pub(super) fn cut_where(&mut self, which: impl Fn(usize, usize) -> bool) {
        for end in (0..self.ends.len()).filter(|end| which(end / 2, end % 2)) {
            let error = Error::Io {
                what: "receiving from the peer",
                kind: std::io::ErrorKind::ConnectionReset,
                message: "the simulated link was cut".to_owned(),
            };
            self.fail(end, error);
            let pipe = &mut self.ends[end].pipe;
            pipe.flying.clear();
            pipe.flying_bytes = 0;
        }
    }

    /// See [`Network::blackhole_from`](crate::mem::Network::blackhole_from).
    pub(super) fn blackhole(&self) -> [bool; 2] {
        self.blackhole
    }

    /// See [`Network::blackhole_from`](crate::mem::Network::blackhole_from).
    pub(super) fn set_blackhole(&mut self, blackhole: [bool; 2]) {
        self.blackhole = blackhole;
        self.next = None;
    }

    /// Ends the channel at `end`. What has arrived can still be taken; what has not left is lost.
    fn fail(&mut self, end: usize, error: Error) {
        self.next = None;
        let end = &mut self.ends[end];
        if end.failed.is_none() {
            end.failed = Some(error);
        }
        end.pipe.queue.clear();
        if let Some(leaving) = end.pipe.leaving.take() {
            let begun = leaving.extent > 0 || leaving.skip > 0;
            let write = matches!(leaving.item, Item::Write { .. });
            self.partial_writes += u64::from(begun && write);
        }
    }

    /// Queues what end `end` sends.
    pub(super) fn send(&mut self, end: usize, item: Item) {
        self.ends[end].pipe.queue.push_back(item);
        self.begin_next(end);
    }

    /// End `end` is dropped: what has left still arrives, then the end.
    pub(super) fn close(&mut self, end: usize) {
        self.ends[end].events.clear();
        if self.ends[end].failed.is_none() {
            self.fail(end, Error::Closed);
            self.fly(end, Load::End, 0);
        }
    }

    /// Makes the first item of the queue leave, if none does.
    fn begin_next(&mut self, end: usize) {
        if self.ends[end].pipe.leaving.is_none()
            && let Some(item) = self.ends[end].pipe.queue.pop_front()
        {
            let at = self.leave_time(0);
            self.next = None;
            self.ends[end].pipe.leaving = Some(Leaving {
                item,
                at,
                extent: 0,
                skip: 0,
            });
        }
    }

    /// The earliest step, and the end whose pipe takes it.
    fn next_step(&mut self) -> Option<Next> {
        if let Some(next) = self.next {
            return next;
        }
        let mut next: Option<Next> = None;
        for (index, end) in self.ends.iter().enumerate() {
            let leaving = end.pipe.leaving.as_ref();
            let room = end.pipe.flying_bytes < BUFFER;
            let leaves = leaving
                .filter(|_| room)
                .map(|leaving| (leaving.at, index, Step::Leave));
            let flying = end.pipe.flying.front();
            let arrives = flying
                .filter(|_| !self.blackhole[index % 2])
                .map(|flying| (flying.at, index, Step::Arrive));
            for step in [arrives, leaves].into_iter().flatten() {
                if next.is_none_or(|next| step < next) {
                    next = Some(step);
                }
            }
        }
        self.next = Some(next);
        next
    }

    /// When a piece leaves that comes after one of `bytes` bytes.
    fn leave_time(&mut self, bytes: u64) -> u64 {
        let pause = self.random.between(0, self.faults.delay_min);
        let sending = match self.faults.bytes_per_second {
            Some(speed) => bytes.saturating_mul(1_000_000_000) / speed.max(1),
            None => 0,
        };
        self.now.saturating_add(pause).saturating_add(sending)
    }

    /// Puts a load on its way from `end`.
    fn fly(&mut self, end: usize, load: Load, bytes: u64) {
        let delay = self
            .random
            .between(self.faults.delay_min, self.faults.delay_max);
        self.next = None;
        let pipe = &mut self.ends[end].pipe;
        let last = pipe.flying.back().map_or(0, |flying| flying.at);
        pipe.flying.push_back(Flying {
            at: self.now.saturating_add(delay).max(last),
            load,
            bytes,
        });
        pipe.flying_bytes += bytes;
        self.ends[end].stats.sent += bytes;
    }

    /// The next piece of what `end` sends leaves.
    fn leave(&mut self, end: usize) {
        self.next = None;
        let Some(mut leaving) = self.ends[end].pipe.leaving.take() else {
            return;
        };
        let first = leaving.extent == 0 && leaving.skip == 0;
        let mut bytes = if first {
            self.announce(end, &leaving.item)
        } else {
            0
        };
        if let Some(piece) = self.read_piece(end, &mut leaving) {
            bytes += piece;
        }
        if leaving.extent < leaving.item.extents_to_carry() {
            leaving.at = self.leave_time(bytes);
            self.ends[end].pipe.leaving = Some(leaving);
            return;
        }
        match leaving.item {
            Item::Write { token, .. } | Item::Message { token, .. } => {
                self.finish(end, Event::Sent(token))
            }
            Item::Reply { token, .. } => self.fly(end, Load::Fetched(token), 0),
            Item::Request { .. } => {}
        }
        self.begin_next(end);
    }

    /// The head of an item leaves. Returns its bytes.
    fn announce(&mut self, end: usize, item: &Item) -> u64 {
        let table = |extents: &[Extent]| (HEADER_LEN + extents.len() * EXTENT_LEN) as u64;
        let (load, bytes) = match item {
            Item::Write {
                region, extents, ..
            } => (
                Load::Announced {
                    region: *region,
                    extents: extents.clone(),
                },
                table(extents),
            ),
            Item::Request {
                token,
                region,
                extents,
            } => (
                Load::Request {
                    token: *token,
                    region: *region,
                    extents: extents.clone(),
                },
                table(extents),
            ),
            Item::Message { message, .. } => (
                Load::Message(message.clone()),
                (HEADER_LEN + message.len()) as u64,
            ),
            Item::Reply { .. } => return 0,
        };
        self.fly(end, load, bytes);
        bytes
    }

    /// Reads the next piece from the sender's memory, as it is now. Returns its bytes.
    fn read_piece(&mut self, end: usize, leaving: &mut Leaving) -> Option<u64> {
        let (from, region, extents, write) = match &leaving.item {
            Item::Write {
                from,
                region,
                extents,
                ..
            } => (from.clone(), *region, extents, true),
            Item::Reply {
                from,
                region,
                extents,
                ..
            } => (from.clone(), *region, extents, false),
            _ => return None,
        };
        let extent = extents.get(leaving.extent)?;
        let offset = extent.offset + leaving.skip;
        let len = (extent.len - leaving.skip).min(self.faults.piece.max(1));
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        from.copy_out(offset, &mut data);
        leaving.skip += len;
        if leaving.skip == extent.len {
            leaving.extent += 1;
            leaving.skip = 0;
        }
        self.fly(
            end,
            Load::Piece {
                region,
                offset,
                data,
                write,
            },
            len,
        );
        Some(len)
    }

    /// The first load that `end` has sent arrives at the other end.
    fn arrive(&mut self, end: usize) {
        self.next = None;
        let Some(flying) = self.ends[end].pipe.flying.pop_front() else {
            return;
        };
        self.ends[end].pipe.flying_bytes -= flying.bytes;
        let other = end ^ 1;
        if self.ends[other].failed.is_some() {
            return;
        }
        self.ends[other].stats.received += flying.bytes;
        let done = match flying.load {
            Load::Announced { region, extents } => {
                self.checked(other, region, &extents, true).map(|_| ())
            }
            Load::Piece {
                region,
                offset,
                data,
                write,
            } => self.place(other, region, offset, &data, write),
            Load::Fetched(token) => {
                self.finish(other, Event::Fetched(token));
                Ok(())
            }
            Load::Message(message) => {
                self.ends[other].events.push_back(Event::Message(message));
                Ok(())
            }
            Load::Request {
                token,
                region,
                extents,
            } => self.checked(other, region, &extents, false).map(|from| {
                self.send(
                    other,
                    Item::Reply {
                        token,
                        from,
                        region,
                        extents,
                    },
                )
            }),
            Load::Fault(text) => {
                self.fail(other, Error::Refused(text));
                Ok(())
            }
            Load::End => {
                self.fail(other, Error::Closed);
                Ok(())
            }
        };
        if let Err(text) = done {
            self.fail(other, Error::PeerMisbehaved(text.to_owned()));
            self.fly(other, Load::Fault(text.to_owned()), 0);
        }
    }

    fn place(
        &self,
        end: usize,
        region: RegionId,
        offset: u64,
        data: &[u8],
        write: bool,
    ) -> Result<(), &'static str> {
        let to = if write {
            let extent = Extent {
                offset,
                len: data.len() as u64,
            };
            self.checked(end, region, &[extent], true)?
        } else {
            // We asked for it; if the region is gone since, nobody wants it any more.
            let Some((to, _)) = self.ends[end].regions.get(region) else {
                return Ok(());
            };
            to
        };
        to.copy_in(offset, data);
        Ok(())
    }

    /// The region of end `end`, if its peer may write (or else read) those extents of it.
    fn checked(
        &self,
        end: usize,
        id: RegionId,
        extents: &[Extent],
        write: bool,
    ) -> Result<Region, &'static str> {
        let (region, access) = self.ends[end]
            .regions
            .get(id)
            .ok_or("a region that does not exist or is closed to it")?;
        if write && !access.peer_writes {
            return Err("a write into a region that it may not write");
        }
        if !write && !access.peer_reads {
            return Err("a read of a region that it may not read");
        }
        if extents
            .iter()
            .any(|extent| region.address(*extent).is_none())
        {
            return Err("an extent that is empty or outside of its region");
        }
        Ok(region)
    }

    /// An operation of `end`'s has ended.
    fn finish(&mut self, end: usize, event: Event) {
        self.ends[end].events.push_back(event);
        self.ends[end].pending -= 1;
    }
}
