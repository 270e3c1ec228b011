//! The frames of a stream: a fixed header with its own checksum, an extent table, and the payload (`WIRE.md`,
//! "Frames"). Encoding and decoding of headers and tables are pure; every field of the peer's is checked here.

use crate::limits::{MAX_EXTENTS, MAX_MESSAGE, MAX_PAYLOAD, MAX_REASON};
use crate::region::{Extent, RegionId};

/// Bytes of a header.
pub(crate) const HEADER_LEN: usize = 32;
/// Bytes of an extent in the table.
pub(crate) const EXTENT_LEN: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Table, then the bytes for the extents in it.
    Write = 1,
    /// Table only: the extents wanted.
    Read = 2,
    /// The bytes for the extents of the oldest read that is unanswered.
    Reply = 3,
    /// A message.
    Message = 4,
    /// The sender found the receiver's bytes wrong, or has no memory for them, and gives up; the payload says why, in
    /// UTF-8.
    Fault = 5,
}

/// The header of a frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// Extents in the table; zero for kinds without one.
    pub(crate) extents: u16,
    /// The region of writes and reads; zero otherwise.
    pub(crate) region: RegionId,
    /// CRC-32C of the table (write, read) or of the payload (message, fault); zero for a reply.
    pub(crate) check: u32,
    /// Bytes after the table; of a read: bytes wanted.
    pub(crate) payload: u64,
    /// Number of a read, repeated in its reply; zero otherwise.
    pub(crate) number: u64,
}

impl Header {
    /// The header as it goes over the wire.
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[4] = self.kind as u8;
        out[6..8].copy_from_slice(&self.extents.to_le_bytes());
        out[8..12].copy_from_slice(&self.region.0.to_le_bytes());
        out[12..16].copy_from_slice(&self.check.to_le_bytes());
        out[16..24].copy_from_slice(&self.payload.to_le_bytes());
        out[24..32].copy_from_slice(&self.number.to_le_bytes());
        let crc = crc32c::crc32c(&out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a header. The error says which rule is broken.
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, &'static str> {
        if crc32c::crc32c(&bytes[4..]) != u32_at(bytes, 0) {
            return Err("a frame header's checksum is wrong");
        }
        let kind = match bytes[4] {
            1 => Kind::Write,
            2 => Kind::Read,
            3 => Kind::Reply,
            4 => Kind::Message,
            5 => Kind::Fault,
            _ => return Err("a frame of unknown type"),
        };
        let header = Header {
            kind,
            extents: u16::from_le_bytes([bytes[6], bytes[7]]),
            region: RegionId(u32_at(bytes, 8)),
            check: u32_at(bytes, 12),
            payload: u64_at(bytes, 16),
            number: u64_at(bytes, 24),
        };
        if bytes[5] != 0 {
            return Err("a frame with unknown flags");
        }
        header.check_limits()?;
        Ok(header)
    }

    fn check_limits(&self) -> Result<(), &'static str> {
        let has_table = matches!(self.kind, Kind::Write | Kind::Read);
        let most = match self.kind {
            Kind::Write | Kind::Read | Kind::Reply => MAX_PAYLOAD,
            Kind::Message => MAX_MESSAGE as u64,
            Kind::Fault => MAX_REASON as u64,
        };
        if has_table && (self.extents == 0 || usize::from(self.extents) > MAX_EXTENTS) {
            return Err("a frame with no extents or too many");
        }
        if !has_table && (self.extents != 0 || self.region.0 != 0) {
            return Err("a frame with extents or a region that its type does not have");
        }
        if self.payload == 0 || self.payload > most {
            return Err("a frame that is empty or too long");
        }
        if !matches!(self.kind, Kind::Read | Kind::Reply) && self.number != 0 {
            return Err("a frame with a number that its type does not have");
        }
        if self.kind == Kind::Reply && self.check != 0 {
            return Err("a reply with a checksum");
        }
        Ok(())
    }

    /// Bytes of the extent table.
    pub(crate) fn table_len(&self) -> usize {
        usize::from(self.extents) * EXTENT_LEN
    }
}

/// Header and table of a write or read, ready to send. The caller has checked the limits.
pub(crate) fn encode_extents(
    kind: Kind,
    region: RegionId,
    extents: &[Extent],
    number: u64,
) -> Vec<u8> {
    let mut out = vec![0; HEADER_LEN];
    out.reserve_exact(extents.len() * EXTENT_LEN);
    for extent in extents {
        out.extend_from_slice(&extent.offset.to_le_bytes());
        out.extend_from_slice(&extent.len.to_le_bytes());
    }
    let header = Header {
        kind,
        extents: u16::try_from(extents.len()).unwrap_or(u16::MAX),
        region,
        check: crc32c::crc32c(&out[HEADER_LEN..]),
        payload: extents.iter().map(|e| e.len).sum(),
        number,
    };
    out[..HEADER_LEN].copy_from_slice(&header.encode());
    out
}

/// The header of a message or fault.
pub(crate) fn encode_message(kind: Kind, payload: &[u8]) -> [u8; HEADER_LEN] {
    Header {
        kind,
        extents: 0,
        region: RegionId(0),
        check: crc32c::crc32c(payload),
        payload: payload.len() as u64,
        number: 0,
    }
    .encode()
}

/// The header of a reply.
pub(crate) fn encode_reply(payload: u64, number: u64) -> [u8; HEADER_LEN] {
    Header {
        kind: Kind::Reply,
        extents: 0,
        region: RegionId(0),
        check: 0,
        payload,
        number,
    }
    .encode()
}

/// Reads the table that belongs to `header` into `out`, and checks that it adds up. Bounds are the region's to check.
pub(crate) fn decode_table(
    header: &Header,
    table: &[u8],
    out: &mut Vec<Extent>,
) -> Result<(), &'static str> {
    if crc32c::crc32c(table) != header.check {
        return Err("an extent table's checksum is wrong");
    }
    out.clear();
    let mut total: u64 = 0;
    for entry in table.chunks_exact(EXTENT_LEN) {
        let extent = Extent {
            offset: u64_at(entry, 0),
            len: u64_at(entry, 8),
        };
        total = total
            .checked_add(extent.len)
            .ok_or("extents whose lengths overflow")?;
        out.push(extent);
    }
    if total != header.payload {
        return Err("extents that do not add up to the frame's payload");
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}
