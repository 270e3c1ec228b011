//! What is sent over a queue pair beside the one-sided operations. Pure.
//!
//! Each send is a header and a body, in one receive of the peer's. The device checks what arrives (ICRC), so there is no
//! checksum; nothing else of the peer's is trusted.

use crate::error::peer_text;
use crate::limits::{MAX_MESSAGE, MAX_REASON};
use crate::region::{Extent, RegionId};

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 16;
/// Bytes of a receive: a header and a body.
pub(super) const SLOT_BYTES: u32 = 16 << 10;
/// The same, as a length.
pub(super) const SLOT_LEN: usize = SLOT_BYTES as usize;
/// Bytes of a message in one send.
pub(super) const FRAGMENT_LEN: usize = SLOT_LEN - HEADER_LEN;

/// What stands before every body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u8,
    /// Sends that the receiver of this may make in addition.
    pub(super) credits: u16,
    /// With a message: its bytes that have not been sent before.
    pub(super) left: u32,
    /// All bytes that this side has written and sent so far, for the receiver cannot see what is written to it.
    pub(super) total: u64,
}

pub(super) const MESSAGE: u8 = 1;
const KEY_WANTED: u8 = 2;
const KEY: u8 = 3;
const CREDITS: u8 = 4;
const FAULT: u8 = 5;
const GOODBYE: u8 = 6;

/// A key to a piece of the sender's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) region: RegionId,
    pub(super) extent: Extent,
    pub(super) address: u64,
    pub(super) key: u32,
}

/// What a frame is, messages aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A key is asked for, to the chunk that holds `offset`, to write or to read.
    KeyWanted {
        region: RegionId,
        offset: u64,
        write: bool,
    },
    /// The answer.
    Key(Key),
    /// Nothing but the credits of its header.
    Credits,
    /// The sender gives up, and why.
    Fault(String),
    /// The sender ends the connection in order.
    Goodbye,
}

impl Frame {
    pub(super) fn kind(&self) -> u8 {
        match self {
            Frame::KeyWanted { .. } => KEY_WANTED,
            Frame::Key(_) => KEY,
            Frame::Credits => CREDITS,
            Frame::Fault(_) => FAULT,
            Frame::Goodbye => GOODBYE,
        }
    }

    /// Whether a send of this kind uses up a credit. The others are few, and receives are kept for them.
    pub(super) fn costs(kind: u8) -> bool {
        matches!(kind, MESSAGE | KEY_WANTED | KEY)
    }

    /// Whether a send of this kind is about the receiver's own sending, and goes on while it takes nothing else.
    pub(super) fn is_for_sending(kind: u8) -> bool {
        matches!(kind, KEY | CREDITS)
    }

    pub(super) fn body(&self) -> Vec<u8> {
        let mut body = Vec::new();
        match self {
            Frame::KeyWanted {
                region,
                offset,
                write,
            } => {
                body.extend(region.0.to_le_bytes());
                body.extend(u32::from(*write).to_le_bytes());
                body.extend(offset.to_le_bytes());
            }
            Frame::Key(key) => {
                body.extend(key.region.0.to_le_bytes());
                body.extend(key.key.to_le_bytes());
                body.extend(key.extent.offset.to_le_bytes());
                body.extend(key.extent.len.to_le_bytes());
                body.extend(key.address.to_le_bytes());
            }
            Frame::Fault(text) => body.extend(crate::connect::greeting::clip(text).as_bytes()),
            Frame::Credits | Frame::Goodbye => {}
        }
        body
    }

    /// Reads the body of a frame that is no message. The error says which rule is broken.
    pub(super) fn decode(kind: u8, body: &[u8]) -> Result<Frame, &'static str> {
        let wrong = "a frame of the wrong length";
        match kind {
            KEY_WANTED => {
                let body: &[u8; 16] = body.try_into().map_err(|_| wrong)?;
                Ok(Frame::KeyWanted {
                    region: RegionId(u32_at(body, 0)),
                    offset: u64_at(body, 8),
                    write: match u32_at(body, 4) {
                        0 => false,
                        1 => true,
                        _ => return Err("a key that is wanted for neither writes nor reads"),
                    },
                })
            }
            KEY => {
                let body: &[u8; 32] = body.try_into().map_err(|_| wrong)?;
                let (offset, len, address) = (u64_at(body, 8), u64_at(body, 16), u64_at(body, 24));
                if len == 0
                    || offset.checked_add(len).is_none()
                    || address.checked_add(len).is_none()
                {
                    return Err("a key to memory that cannot be");
                }
                Ok(Frame::Key(Key {
                    region: RegionId(u32_at(body, 0)),
                    key: u32_at(body, 4),
                    extent: Extent { offset, len },
                    address,
                }))
            }
            CREDITS if body.is_empty() => Ok(Frame::Credits),
            GOODBYE if body.is_empty() => Ok(Frame::Goodbye),
            FAULT if body.len() <= MAX_REASON => Ok(Frame::Fault(peer_text(body))),
            CREDITS | GOODBYE | FAULT => Err(wrong),
            _ => Err("a frame of unknown kind"),
        }
    }
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = self.kind;
        out[2..4].copy_from_slice(&self.credits.to_le_bytes());
        out[4..8].copy_from_slice(&self.left.to_le_bytes());
        out[8..].copy_from_slice(&self.total.to_le_bytes());
        out
    }

    /// Splits what was received into its header and body.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Header, &[u8]), &'static str> {
        let (head, body) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or("a send without a header")?;
        let header = Header {
            kind: head[0],
            credits: u16::from_le_bytes([head[2], head[3]]),
            left: u32_at(head, 4),
            total: u64_at(head, 8),
        };
        if header.kind == MESSAGE {
            let left = usize::try_from(header.left).unwrap_or(usize::MAX);
            if body.is_empty() || left > MAX_MESSAGE || body.len() > left {
                return Err("a message that is empty, too long, or longer than it says");
            }
        } else if header.left != 0 {
            return Err("a frame that says it is a message and is none");
        }
        Ok((header, body))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}
