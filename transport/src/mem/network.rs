//! The network: virtual time, and what is in flight on every channel.
//!
//! Each direction of a channel is a *pipe*, moved only by `advance_to`, one step at a time in the order of the steps'
//! times (ties go by the pipe's number). The first operation of its queue *leaves* piece by piece: each piece is read from
//! the sender's memory at that moment. It then *flies*, and is placed in the receiver's memory when it arrives. An
//! operation is `Sent` when its last piece has left, which may be long before that arrives, as with a socket.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::channel::{Event, Stats, Token};
use crate::error::Error;
use crate::mem::channel::MemChannel;
use crate::mem::random::Random;
use crate::region::{Extent, Region, RegionId, Regions};
use crate::stream::frame::{EXTENT_LEN, HEADER_LEN};

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

/// Bytes on their way in one direction of a channel, at most, as in the buffers of a socket.
const BUFFER: u64 = 4 << 20;

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
enum Load {
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
struct Flying {
    at: u64,
    load: Load,
    bytes: u64,
}

/// The item that is leaving.
struct Leaving {
    item: Item,
    /// When its next piece leaves.
    at: u64,
    /// The extent that comes next, and the bytes of it that have left.
    extent: usize,
    skip: u64,
}

/// One direction of a channel: what has not begun to leave, what is leaving, and what is on its way.
#[derive(Default)]
struct Pipe {
    queue: VecDeque<Item>,
    leaving: Option<Leaving>,
    flying: VecDeque<Flying>,
    flying_bytes: u64,
}

/// What happens next in a pipe.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Arrive,
    Leave,
}

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
    blackhole: bool,
    pub(super) ends: Vec<End>,
}

impl Network {
    /// A network whose chances all follow from `seed`.
    pub fn new(seed: u64, faults: Faults) -> Network {
        let state = State {
            now: 0,
            random: Random::new(seed),
            faults,
            blackhole: false,
            ends: Vec::new(),
        };
        Network {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// A new channel: its two ends, with the regions of each end.
    pub fn pair(&self, a: &Regions, b: &Regions) -> (MemChannel, MemChannel) {
        let mut state = self.lock();
        let first = state.ends.len();
        state.ends.push(End::new(a));
        state.ends.push(End::new(b));
        (
            MemChannel::new(self.clone(), first),
            MemChannel::new(self.clone(), first + 1),
        )
    }

    /// Moves virtual time to `now` (nanoseconds) and does all that happens until then. Never goes back.
    pub fn advance_to(&self, now: u64) {
        let mut state = self.lock();
        while let Some((at, end, step)) = state.next_step() {
            if at > now {
                break;
            }
            state.now = state.now.max(at);
            match step {
                Step::Leave => state.leave(end),
                Step::Arrive => state.arrive(end),
            }
        }
        state.now = state.now.max(now);
    }

    /// When the next thing happens, if anything will.
    pub fn next_event(&self) -> Option<u64> {
        self.lock().next_step().map(|(at, ..)| at)
    }

    /// Cuts every channel there is: both ends report an error. Channels made later are sound.
    pub fn cut(&self) {
        let mut state = self.lock();
        for end in &mut state.ends {
            end.fail(Error::Io {
                what: "receiving from the peer",
                kind: std::io::ErrorKind::ConnectionReset,
                message: "the simulated link was cut".to_owned(),
            });
            end.pipe.flying.clear();
        }
    }

    /// While on, nothing arrives, and nobody is told. Senders go on until 4 MiB are on their way in
    /// each direction of a channel. When it ends,
    /// what was held up arrives, as TCP sends lost segments again.
    pub fn blackhole(&self, on: bool) {
        self.lock().blackhole = on;
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    /// Ends the channel here. What has arrived can still be taken; what has not left is lost.
    fn fail(&mut self, error: Error) {
        if self.failed.is_none() {
            self.failed = Some(error);
        }
        self.pipe.queue.clear();
        self.pipe.leaving = None;
    }
}

impl State {
    /// Queues what end `end` sends.
    pub(super) fn send(&mut self, end: usize, item: Item) {
        self.ends[end].pipe.queue.push_back(item);
        self.begin_next(end);
    }

    /// End `end` is dropped: what has left still arrives, then the end.
    pub(super) fn close(&mut self, end: usize) {
        self.ends[end].events.clear();
        if self.ends[end].failed.is_none() {
            self.ends[end].fail(Error::Closed);
            self.fly(end, Load::End, 0);
        }
    }

    /// Makes the first item of the queue leave, if none does.
    fn begin_next(&mut self, end: usize) {
        if self.ends[end].pipe.leaving.is_none()
            && let Some(item) = self.ends[end].pipe.queue.pop_front()
        {
            let at = self.leave_time(0);
            self.ends[end].pipe.leaving = Some(Leaving {
                item,
                at,
                extent: 0,
                skip: 0,
            });
        }
    }

    /// The earliest step, and the end whose pipe takes it.
    fn next_step(&self) -> Option<(u64, usize, Step)> {
        let leaving = |(index, end): (usize, &End)| {
            let room = end.pipe.flying_bytes < BUFFER;
            end.pipe
                .leaving
                .as_ref()
                .filter(|_| room)
                .map(|leaving| (leaving.at, index, Step::Leave))
        };
        let flying = |(index, end): (usize, &End)| {
            let first = end.pipe.flying.front().filter(|_| !self.blackhole);
            first.map(|flying| (flying.at, index, Step::Arrive))
        };
        let first_leaving = self.ends.iter().enumerate().filter_map(leaving).min();
        let first_flying = self.ends.iter().enumerate().filter_map(flying).min();
        [first_leaving, first_flying].into_iter().flatten().min()
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
                self.ends[other].fail(Error::Refused(text));
                Ok(())
            }
            Load::End => {
                self.ends[other].fail(Error::Closed);
                Ok(())
            }
        };
        if let Err(text) = done {
            self.ends[other].fail(Error::PeerMisbehaved(text.to_owned()));
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

impl Item {
    /// How many extents' bytes go with it.
    fn extents_to_carry(&self) -> usize {
        match self {
            Item::Write { extents, .. } | Item::Reply { extents, .. } => extents.len(),
            Item::Message { .. } | Item::Request { .. } => 0,
        }
    }
}
