//! Every limit of this crate. The peer's lengths are checked against these before anything is allocated.

/// Extents in one write or read.
pub const MAX_EXTENTS: usize = 512;
/// Bytes in one write or read.
pub const MAX_PAYLOAD: u64 = 4 << 20;
/// Bytes in one message.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Operations under way on one channel.
pub const MAX_QUEUED: usize = 64;
/// Channels of one connection, the control channel included.
pub const MAX_CHANNELS: u16 = 65;

const _: () = assert!(
    MAX_EXTENTS <= 1024,
    "an extent table fits one vectored system call (IOV_MAX)"
);
const _: () = assert!(
    MAX_MESSAGE <= u32::MAX as usize,
    "a message's length fits its header field"
);
