//! The memory of a channel's sends and receives: slots of one size, in one registered piece.

use std::sync::Arc;

use crate::error::Error;
use crate::rdma::frame::SLOT_LEN;
use crate::rdma::sys::{Pd, Registration};
use crate::region::{Access, Extent, Region};

/// Slots, and the key to them.
pub(super) struct Slots {
    region: Region,
    registration: Registration,
    base: u64,
}

impl Slots {
    pub(super) fn new(pd: &Arc<Pd>, count: usize) -> Result<Slots, Error> {
        let region = Region::anonymous(count * SLOT_LEN)
            .map_err(|e| Error::io("taking memory for RDMA messages", &e))?;
        let whole = Extent {
            offset: 0,
            len: region.len(),
        };
        let nobody = Access {
            peer_writes: false,
            peer_reads: false,
        };
        let registration = Registration::new(pd, &region, whole, nobody, false)
            .map_err(|e| crate::rdma::memory::pin_error(&e, 0))?;
        let base = region.address(whole).map_or(0, |address| address as u64);
        Ok(Slots {
            region,
            registration,
            base,
        })
    }

    /// The device's key.
    pub(super) fn key(&self) -> u32 {
        self.registration.key.local
    }

    /// The address of a slot.
    pub(super) fn address(&self, slot: usize) -> u64 {
        self.base + (slot * SLOT_LEN) as u64
    }

    /// Fills the beginning of a slot with these pieces. Returns their bytes.
    pub(super) fn fill(&self, slot: usize, pieces: [&[u8]; 2]) -> u32 {
        let mut at = (slot * SLOT_LEN) as u64;
        let start = at;
        for piece in pieces {
            self.region.copy_in(at, piece);
            at += piece.len() as u64;
        }
        u32::try_from(at - start).unwrap_or(0)
    }

    /// A copy of the beginning of a slot.
    pub(super) fn take(&self, slot: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(SLOT_LEN)];
        self.region.copy_out((slot * SLOT_LEN) as u64, &mut bytes);
        bytes
    }
}
