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
/// Bytes of a reason in words, in a refusal or a fault frame.
pub const MAX_REASON: usize = 1024;
/// Bytes of a peer that is turned away which are read, so that it gets to read why: a handshake's, at most.
pub const MAX_DROPPED: usize = 128 << 10;
/// Pieces of memory in one system call (the kernel's `UIO_MAXIOV`).
pub const MAX_IOVECS: usize = 1024;
/// Bytes handed to the kernel in one send: enough to keep a fast link busy, few enough that completions come often.
pub const MAX_SEND_BYTES: usize = 4 << 20;
/// Bytes of the buffer for headers, extent tables and small messages.
pub const INBOX_LEN: usize = 16 << 10;
/// Bytes received at a time when they are to be written to a file: so few that they are still in the processor's cache then.
pub const STAGE_LEN: usize = 256 << 10;
/// Bytes encrypted at a time, before the records' overhead.
pub const TLS_BATCH: usize = 256 << 10;

const _: () = assert!(
    MAX_EXTENTS <= 1024,
    "an extent table fits one vectored system call (IOV_MAX)"
);
const _: () = assert!(
    MAX_MESSAGE <= u32::MAX as usize,
    "a message's length fits its header field"
);
const _: () = assert!(
    INBOX_LEN >= 32 + 16 * MAX_EXTENTS,
    "the largest header with its extent table fits the inbox"
);
