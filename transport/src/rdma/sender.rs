//! The sending half: turns operations into work for the send queue, in order and within its bounds, and knows what each
//! completion ends.
//!
//! Few of the works are signalled: the last of an operation, and one in every [`SIGNAL_EVERY`], so that the queue never
//! fills with what nobody reports. A signalled completion ends all work before it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::channel::{Event, Token};
use crate::error::Error;
use crate::rdma::frame::{FRAGMENT_LEN, Frame, HEADER_LEN, Header, Key, MESSAGE};
use crate::rdma::memory::Memory;
use crate::rdma::slots::Slots;
use crate::rdma::sys::{Device, Kind, Registration, Work};
use crate::region::{Extent, RegionId};

/// Works in the send queue.
pub(super) const DEPTH: u32 = 512;
/// Slots for sends under way.
pub(super) const SEND_SLOTS: usize = 32;
/// One work in so many is signalled.
const SIGNAL_EVERY: usize = 32;
/// Bytes that somebody waits for, and reads nothing else meanwhile.
const LITTLE: u64 = 64 << 10;
/// Works handed to the device in one call.
const BATCH: usize = 64;

/// An operation, and how far it is.
enum Task {
    OneSided {
        token: Token,
        write: bool,
        region: RegionId,
        extents: Vec<Extent>,
        /// The extent under way, and its bytes that are done.
        at: usize,
        skip: u64,
    },
    Message {
        token: Token,
        bytes: Bytes,
        at: usize,
    },
}

/// What a signalled completion ends.
#[derive(Default)]
struct Record {
    works: u32,
    slots: usize,
    fetched: u64,
    used: Vec<Arc<Registration>>,
    event: Option<Event>,
}

/// What a completion amounts to.
pub(super) struct Done {
    pub(super) event: Option<Event>,
    /// Bytes that reads have brought.
    pub(super) fetched: u64,
}

/// The state of the sending half.
pub(super) struct Sender {
    memory: Memory,
    device: Device,
    tasks: VecDeque<Task>,
    control: VecDeque<Frame>,
    /// Operations that were submitted and have not ended.
    pub(super) awaited: usize,
    /// Sends that the peer has receives for.
    credits: usize,
    /// Credits that the peer is owed.
    owed: u16,
    keys: BTreeMap<(RegionId, u64), Key>,
    wanted: BTreeSet<(RegionId, u64)>,
    posted: VecDeque<Record>,
    open: Record,
    in_queue: u32,
    free_slots: usize,
    next_slot: usize,
    sequence: u64,
    /// Bytes written and sent.
    pub(super) total: u64,
}

impl Sender {
    pub(super) fn new(memory: Memory, device: Device, credits: usize) -> Sender {
        Sender {
            memory,
            device,
            tasks: VecDeque::new(),
            control: VecDeque::new(),
            awaited: 0,
            credits,
            owed: 0,
            keys: BTreeMap::new(),
            wanted: BTreeSet::new(),
            posted: VecDeque::new(),
            open: Record::default(),
            in_queue: 0,
            free_slots: SEND_SLOTS,
            next_slot: 0,
            sequence: 0,
            total: 0,
        }
    }

    /// Queues a write or a read, which has been checked.
    pub(super) fn one_sided(
        &mut self,
        token: Token,
        write: bool,
        region: RegionId,
        extents: Vec<Extent>,
    ) {
        self.awaited += 1;
        self.tasks.push_back(Task::OneSided {
            token,
            write,
            region,
            extents,
            at: 0,
            skip: 0,
        });
    }

    /// Queues a message, which has been checked.
    pub(super) fn message(&mut self, token: Token, bytes: Bytes) {
        self.awaited += 1;
        self.tasks.push_back(Task::Message {
            token,
            bytes,
            at: 0,
        });
    }

    /// Queues the answer to a question for a key. False: more of them wait than a peer that keeps to the rules asks for.
    pub(super) fn answer(&mut self, key: Key) -> bool {
        self.control.push_back(Frame::Key(key));
        self.control.len() <= 2 * SEND_SLOTS
    }

    /// Forgets all that has not been handed to the device; `last` is all that is still sent.
    pub(super) fn end(&mut self, last: Frame) {
        self.tasks.clear();
        self.control.clear();
        self.control.push_back(last);
    }

    /// The peer has receives for more sends. False: for more than there can be.
    pub(super) fn grant(&mut self, credits: u16, most: usize) -> bool {
        self.credits += usize::from(credits);
        self.credits <= most
    }

    /// A send of the peer's that cost a credit has been taken. `half` is when it is told without being asked.
    pub(super) fn owe(&mut self, half: u16) {
        self.owed += 1;
        if self.owed >= half && !self.control.contains(&Frame::Credits) {
            self.control.push_back(Frame::Credits);
        }
    }

    /// A key came. False: it was not asked for.
    pub(super) fn learn(&mut self, key: Key) -> bool {
        let (region, extent) = (key.region, key.extent);
        let within = (region, extent.offset)..(region, extent.offset + extent.len);
        let asked: Vec<_> = self.wanted.range(within).copied().collect();
        for offset in &asked {
            self.wanted.remove(offset);
        }
        self.keys.insert((region, extent.offset), key);
        !asked.is_empty()
    }

    /// The next works to hand to the device; none when nothing can go on.
    pub(super) fn next_batch(&mut self, slots: &Slots, inline: u32) -> Result<Vec<Work>, Error> {
        let mut batch = Vec::new();
        while batch.len() < BATCH && self.in_queue < DEPTH {
            let before = (batch.len(), self.control.len());
            if !self.control_frame(slots, inline, &mut batch) {
                self.task_step(slots, inline, &mut batch)?;
            }
            // A step that came to a question for a key goes on with that: nothing else would wake who waits for the answer.
            if (batch.len(), self.control.len()) == before {
                break;
            }
        }
        // What waits for room waits for a report: nothing may be left unreported when the queue has come to rest.
        if let Some(last) = batch.last_mut()
            && !last.signaled
        {
            last.signaled = true;
            self.close_record();
        }
        Ok(batch)
    }

    /// A signalled work has ended well.
    pub(super) fn completed(&mut self) -> Option<Done> {
        let record = self.posted.pop_front()?;
        self.in_queue -= record.works;
        self.free_slots += record.slots;
        if record.event.is_some() {
            self.awaited = self.awaited.saturating_sub(1);
        }
        Some(Done {
            event: record.event,
            fetched: record.fetched,
        })
    }

    /// Whether the device has work that it has not reported.
    pub(super) fn under_way(&self) -> bool {
        self.in_queue > 0
    }

    /// Whether all that the device has are reads of a few pages: somebody waits for each of them.
    pub(super) fn reads_little(&self) -> bool {
        let mut bytes = 0;
        let little = self.posted.iter().all(|record| {
            bytes += record.fetched;
            record.fetched > 0 && bytes <= LITTLE
        });
        little && bytes > 0
    }

    /// Whether the device has work, or will have.
    pub(super) fn busy(&self) -> bool {
        !self.posted.is_empty() || !self.control.is_empty()
    }

    fn close_record(&mut self) {
        self.posted.push_back(std::mem::take(&mut self.open));
    }

    fn push(&mut self, batch: &mut Vec<Work>, mut work: Work) {
        self.sequence += 1;
        work.id = self.sequence;
        self.in_queue += 1;
        self.open.works += 1;
        work.signaled |= self.open.works as usize >= SIGNAL_EVERY;
        let signaled = work.signaled;
        batch.push(work);
        if signaled {
            self.close_record();
        }
    }

    /// Puts a frame into a slot and on the queue.
    fn send(
        &mut self,
        slots: &Slots,
        inline: u32,
        batch: &mut Vec<Work>,
        (kind, left): (u8, u32),
        body: &[u8],
        event: Option<Event>,
    ) {
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % SEND_SLOTS;
        self.free_slots -= 1;
        if Frame::costs(kind) {
            self.credits -= 1;
            self.total += (HEADER_LEN + body.len()) as u64;
        }
        let header = Header {
            kind,
            credits: std::mem::take(&mut self.owed),
            left,
            total: self.total,
        };
        let len = slots.fill(slot, [&header.encode(), body]);
        self.open.slots += 1;
        let signaled = event.is_some() || kind != MESSAGE || self.open.slots >= SEND_SLOTS / 4;
        self.open.event = event;
        let work = Work {
            id: 0,
            kind: Kind::Send {
                inline: len <= inline,
            },
            local: slots.address(slot),
            len,
            key: slots.key(),
            signaled,
        };
        self.push(batch, work);
    }

    /// Sends the next frame of ours, if there is one that can go. Returns whether.
    fn control_frame(&mut self, slots: &Slots, inline: u32, batch: &mut Vec<Work>) -> bool {
        let Some(frame) = self.control.front() else {
            return false;
        };
        if self.free_slots == 0 || (Frame::costs(frame.kind()) && self.credits == 0) {
            // Credits need none themselves, and are what the peer may be waiting for.
            let credits = self.control.iter().position(|f| *f == Frame::Credits);
            match credits {
                Some(index) if self.free_slots > 0 => {
                    let frame = self.control.remove(index).unwrap_or(Frame::Credits);
                    self.control.push_front(frame);
                }
                _ => return false,
            }
        }
        let Some(frame) = self.control.pop_front() else {
            return false;
        };
        if frame == Frame::Credits && self.owed == 0 {
            return self.control_frame(slots, inline, batch);
        }
        self.send(slots, inline, batch, (frame.kind(), 0), &frame.body(), None);
        true
    }

    /// Takes one step of the first operation, if it can.
    fn task_step(
        &mut self,
        slots: &Slots,
        inline: u32,
        batch: &mut Vec<Work>,
    ) -> Result<(), Error> {
        match self.tasks.pop_front() {
            None => Ok(()),
            Some(Task::Message { token, bytes, at }) => {
                self.fragment(slots, inline, batch, token, bytes, at);
                Ok(())
            }
            Some(mut task) => {
                let ended = self.piece(&mut task, batch);
                if !matches!(ended, Ok(true)) {
                    self.tasks.push_front(task);
                }
                ended.map(|_| ())
            }
        }
    }

    fn fragment(
        &mut self,
        slots: &Slots,
        inline: u32,
        batch: &mut Vec<Work>,
        token: Token,
        bytes: Bytes,
        at: usize,
    ) {
        if self.free_slots == 0 || self.credits == 0 {
            self.tasks.push_front(Task::Message { token, bytes, at });
            return;
        }
        let end = bytes.len().min(at + FRAGMENT_LEN);
        let last = end == bytes.len();
        let left = u32::try_from(bytes.len() - at).unwrap_or(u32::MAX);
        let event = last.then_some(Event::Sent(token));
        self.send(
            slots,
            inline,
            batch,
            (MESSAGE, left),
            &bytes[at..end],
            event,
        );
        if !last {
            self.tasks.push_front(Task::Message {
                token,
                bytes,
                at: end,
            });
        }
    }

    /// Adds the next piece of a write or read, as far as one local chunk and one key of the peer's reach. Returns whether
    /// it was the last.
    fn piece(&mut self, task: &mut Task, batch: &mut Vec<Work>) -> Result<bool, Error> {
        let Task::OneSided {
            token,
            write,
            region,
            extents,
            at,
            skip,
        } = task
        else {
            return Ok(true);
        };
        let (extent, region, write) = (extents[*at], *region, *write);
        let offset = extent.offset + *skip;
        let Some(key) = self.key(region, offset) else {
            if self.wanted.insert((region, offset)) {
                self.control.push_back(Frame::KeyWanted {
                    region,
                    offset,
                    write,
                });
                self.control_to_front();
            }
            return Ok(false);
        };
        let local = self.memory.piece(self.device, region, offset, false)?;
        let end = (extent.offset + extent.len)
            .min(key.extent.offset + key.extent.len)
            .min(local.extent.offset + local.extent.len);
        let len = end - offset;
        *skip += len;
        if *skip == extent.len {
            *at += 1;
            *skip = 0;
        }
        let last = *at == extents.len();
        let remote = key.address + (offset - key.extent.offset);
        let kind = if write {
            self.total += len;
            Kind::Write {
                remote,
                key: key.key,
            }
        } else {
            self.open.fetched += len;
            Kind::Read {
                remote,
                key: key.key,
            }
        };
        if last {
            self.open.event = Some(if write {
                Event::Sent(*token)
            } else {
                Event::Fetched(*token)
            });
        }
        let work = Work {
            id: 0,
            kind,
            local: local.address + (offset - local.extent.offset),
            len: u32::try_from(len).unwrap_or(u32::MAX),
            key: local.registration.key.local,
            signaled: last,
        };
        self.open.used.push(local.registration);
        self.push(batch, work);
        Ok(last)
    }

    /// The question for a key is small, and all that comes after it waits for the answer.
    fn control_to_front(&mut self) {
        if let Some(frame) = self.control.pop_back() {
            self.control.push_front(frame);
        }
    }

    fn key(&self, region: RegionId, offset: u64) -> Option<Key> {
        let upto = (region, 0)..=(region, offset);
        let (_, key) = self.keys.range(upto).next_back()?;
        (key.extent.offset + key.extent.len > offset).then_some(*key)
    }

    /// Makes every key of the peer's reach `more` bytes further than was given, as a hostile peer would.
    #[cfg(test)]
    pub(super) fn stretch_keys(&mut self, more: u64) {
        for key in self.keys.values_mut() {
            key.extent.len += more;
        }
    }
}
