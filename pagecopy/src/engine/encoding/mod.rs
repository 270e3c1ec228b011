//! Encodings of pages in pre-copy: what they are, and the rules that make them safe. Pure; the bytes of pages come in and go
//! out as slices.
//!
//! - [`delta`]: a page as what differs from another version of it.
//! - [`versions`]: the source's memory of the versions sent last.
//! - [`arriving`]: what the destination takes on a data channel.
//! - [`policy`]: which encoding pays now.
//!
//! **The invariant.** A delta goes only against the version of the page that was sent last, as a copy that the source kept of
//! exactly the bytes that it sent, in an *earlier* round. No page of a round leaves before `BarrierReached` of the round
//! before, which says that all of it is in place, whatever channel it took: so the destination holds that version. A page
//! that goes in another way (as zero, or straight from the guest's memory, where nobody knows which bytes were read) is
//! forgotten. What is kept is dropped with the connection. After the last round nothing is encoded.

pub mod arriving;
pub mod delta;
pub mod policy;
pub mod versions;

use serde::{Deserialize, Serialize};

use crate::wire::capability;

/// Bytes that are encoded as one: the smallest page, whatever the block's.
pub const UNIT: usize = 4096;

/// The bytes of one unit.
pub type Page = [u8; UNIT];

/// Which encodings may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encodings {
    /// Compressed.
    pub zstd: bool,
    /// As the difference to the version sent before.
    pub delta: bool,
}

impl Encodings {
    /// Both.
    pub const ALL: Encodings = Encodings {
        zstd: true,
        delta: true,
    };

    /// As capability bits.
    pub fn bits(self) -> u64 {
        let bit = |has: bool, bit: u64| if has { bit } else { 0 };
        bit(self.zstd, capability::ZSTD) | bit(self.delta, capability::DELTA)
    }

    /// Of capability bits.
    pub fn of_bits(bits: u64) -> Encodings {
        Encodings {
            zstd: bits & capability::ZSTD != 0,
            delta: bits & capability::DELTA != 0,
        }
    }

    /// Whether there is one.
    pub fn any(self) -> bool {
        self.zstd || self.delta
    }
}

/// What was encoded, and as how much.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoded {
    /// Bytes of pages that went compressed.
    pub zstd_bytes: u64,
    /// Bytes that they were compressed to.
    pub zstd_sent: u64,
    /// Bytes of pages that went as deltas.
    pub delta_bytes: u64,
    /// Bytes of the deltas.
    pub delta_sent: u64,
}

impl Encoded {
    /// Bytes of pages.
    pub fn bytes(&self) -> u64 {
        self.zstd_bytes + self.delta_bytes
    }

    /// Bytes that did not have to be sent.
    pub fn saved(&self) -> u64 {
        self.bytes()
            .saturating_sub(self.zstd_sent + self.delta_sent)
    }

    /// This and `other`.
    #[must_use]
    pub fn and(self, other: Encoded) -> Encoded {
        Encoded {
            zstd_bytes: self.zstd_bytes + other.zstd_bytes,
            zstd_sent: self.zstd_sent + other.zstd_sent,
            delta_bytes: self.delta_bytes + other.delta_bytes,
            delta_sent: self.delta_sent + other.delta_sent,
        }
    }
}
