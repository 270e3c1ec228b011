//! The receiving half: slots that are offered to the peer's sends, and what the peer has sent in them.

use std::collections::VecDeque;

use crate::error::Error;
use crate::rdma::frame::{Frame, Header, Key, MESSAGE, SLOT_BYTES};
use crate::rdma::memory::Memory;
use crate::rdma::slots::Slots;
use crate::rdma::sys::{Device, QueuePair};
use crate::region::{Extent, RegionId};

/// Sends that cost a credit and may be under way to us.
pub(super) const RECEIVE_SLOTS: u16 = 32;
/// Receives for those that cost none: two of credits for each `RECEIVE_SLOTS` of ours, and a last word.
const SPARE_SLOTS: u16 = 8;
/// Marks the number of a receive.
const RECEIVE: u64 = 1 << 63;

/// Whether a completion is that of a receive.
pub(super) fn is_receive(id: u64) -> bool {
    id & RECEIVE != 0
}

/// What a send of the peer's has brought.
pub(super) struct Taken {
    pub(super) credits: u16,
    /// Whether it cost a credit.
    pub(super) cost: bool,
    /// A message that is whole now.
    pub(super) message: Option<Vec<u8>>,
    pub(super) frame: Option<Frame>,
}

/// The state of the receiving half.
pub(super) struct Receiver {
    slots: Slots,
    /// Slots that have been filled, with their bytes, in order.
    arrived: VecDeque<(usize, usize)>,
    paused: bool,
    /// The message so far.
    partial: Vec<u8>,
    /// Bytes of it that are to come.
    left: u32,
    total: u64,
}

impl Receiver {
    pub(super) fn new(slots: Slots) -> Receiver {
        Receiver {
            slots,
            arrived: VecDeque::new(),
            paused: false,
            partial: Vec::new(),
            left: 0,
            total: 0,
        }
    }

    /// All receives.
    pub(super) fn count() -> u32 {
        u32::from(RECEIVE_SLOTS + SPARE_SLOTS)
    }

    /// Offers every slot.
    pub(super) fn offer_all(&self, pair: &QueuePair) -> Result<(), Error> {
        (0..Self::count() as usize).try_for_each(|slot| self.offer(pair, slot))
    }

    fn offer(&self, pair: &QueuePair, slot: usize) -> Result<(), Error> {
        let address = self.slots.address(slot);
        pair.receive(RECEIVE | slot as u64, address, SLOT_BYTES, self.slots.key())
    }

    /// A slot was filled.
    pub(super) fn arrived(&mut self, id: u64, len: u32) {
        let slot = usize::try_from(id & !RECEIVE).unwrap_or(usize::MAX);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.arrived.push_back((slot, len));
    }

    /// While paused only what our own sending needs is taken.
    pub(super) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// What the peer says to have written and sent.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The next send of the peer's, if there is one that need not wait.
    pub(super) fn next(&mut self, pair: &QueuePair) -> Result<Option<Taken>, Error> {
        let wrong = |text: &str| Error::PeerMisbehaved(text.to_owned());
        let mut index = 0;
        let (slot, bytes) = loop {
            let Some(&(slot, len)) = self.arrived.get(index) else {
                return Ok(None);
            };
            let bytes = self.slots.take(slot, len);
            if !self.paused || Frame::is_for_sending(bytes.first().copied().unwrap_or(0)) {
                break (slot, bytes);
            }
            index += 1;
        };
        self.arrived.remove(index);
        self.offer(pair, slot)?;
        let (header, body) = Header::decode(&bytes).map_err(wrong)?;
        self.total = self.total.max(header.total);
        let mut taken = Taken {
            credits: header.credits,
            cost: Frame::costs(header.kind),
            message: None,
            frame: None,
        };
        if header.kind == MESSAGE {
            taken.message = self.fragment(header.left, body)?;
        } else {
            taken.frame = Some(Frame::decode(header.kind, body).map_err(wrong)?);
        }
        Ok(Some(taken))
    }

    /// Adds to the message. Gives it back when it is whole.
    fn fragment(&mut self, left: u32, body: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        if self.left != 0 && left != self.left {
            return Err(Error::PeerMisbehaved(
                "a message that begins within another".to_owned(),
            ));
        }
        self.partial.extend_from_slice(body);
        // `Header::decode` has seen to it that the body is no longer than what is left.
        self.left = left.saturating_sub(u32::try_from(body.len()).unwrap_or(u32::MAX));
        Ok((self.left == 0).then(|| std::mem::take(&mut self.partial)))
    }

    /// The key that the peer asks for, if it may have it.
    pub(super) fn key(
        &self,
        memory: &Memory,
        device: Device,
        region: RegionId,
        offset: u64,
        write: bool,
    ) -> Result<Key, Error> {
        let refuse = |text: &str| Error::PeerMisbehaved(text.to_owned());
        let (there, access) = memory
            .regions()
            .get(region)
            .ok_or_else(|| refuse("a region that does not exist or is closed to it"))?;
        if write && !access.peer_writes {
            return Err(refuse("a write into a region that it may not write"));
        }
        if !write && !access.peer_reads {
            return Err(refuse("a read of a region that it may not read"));
        }
        if there.address(Extent { offset, len: 1 }).is_none() {
            return Err(refuse("an extent that is outside of its region"));
        }
        let piece = memory.piece(device, region, offset, true)?;
        Ok(Key {
            region,
            extent: piece.extent,
            address: piece.address,
            key: piece.registration.key.remote,
        })
    }
}
