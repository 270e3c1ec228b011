//! Every limit of the protocol and the engine. The peer's figures are checked against these before anything is allocated.

/// RAMBlocks of one guest.
pub const MAX_BLOCKS: usize = 64;
/// Bytes of a RAMBlock's or a guest's name.
pub const MAX_NAME: usize = 255;
/// Bytes of one RAMBlock: 64 TiB.
pub const MAX_BLOCK_SIZE: u64 = 64 << 40;
/// Runs in one message or batch.
pub const MAX_RUNS: usize = 256;
/// Bytes of pages in one batch. One 2 MiB page fits.
pub const MAX_BATCH_BYTES: u64 = 2 << 20;
/// Batches under way on one channel: enough to keep it busy, few enough that a cancel is prompt.
pub const MAX_BATCHES_PER_CHANNEL: usize = 4;
/// Bytes of device state of one guest. QEMU's is 0.3 MB for a small guest; devices with video memory have tens of MB.
pub const MAX_DEVICE_STATE: u64 = 1 << 30;
/// Bytes of device state in one message.
pub const MAX_DEVICE_STATE_CHUNK: usize = 256 << 10;
/// Bytes of a reason in words.
pub const MAX_REASON: usize = 1024;
/// Bytes over which one digest of `--verify` goes.
pub const DIGEST_CHUNK: u64 = 4 << 20;
/// Digests in one message.
pub const MAX_DIGESTS: usize = 2048;
/// Words of a bitmap in one message: 1 GiB of small pages.
pub const MAX_WORDS: usize = 4096;
/// Pieces of a RAMBlock in one encoded message.
pub const MAX_PIECES: usize = 64;
/// Bytes of pages in one encoded message, and bytes of what they are encoded as.
pub const MAX_ENCODED: usize = 256 << 10;
/// Data channels of one migration.
pub const MAX_DATA_CHANNELS: u16 = 64;
/// Words of a QEMU's command line.
pub const MAX_ARGUMENTS: usize = 1024;
/// Bytes of all of them.
pub const MAX_ARGUMENT_BYTES: usize = 256 << 10;
/// Parts that a QEMU is told to be made of.
pub const MAX_PARTS: usize = 1024;
/// Bytes of what one of them is.
pub const MAX_PART: usize = 4096;
/// Bytes of all parts' names and what they are.
pub const MAX_PARTS_BYTES: usize = 256 << 10;
/// A time that a peer tells, in microseconds: 35 years.
pub const MAX_TIME_US: u64 = 1 << 50;
/// Bytes of what a side tells of itself in preflight.
pub const MAX_FACTS: usize = 128 << 10;
/// Bytes of one word or sentence in it.
pub const MAX_FACT: usize = 2048;
/// Things of one kind in it: lines, disks, CPUID words.
pub const MAX_FACTS_EACH: usize = 256;
/// Bytes of the region that a peer may write to, to see what the link carries.
pub const PROBE_BYTES: u64 = 16 << 20;
/// Its number: that of no RAMBlock.
pub const PROBE_REGION: u32 = 64;
/// Rounds of such writes on one connection.
pub const MAX_PROBE_ROUNDS: u32 = 64;
/// The smallest page.
pub const MIN_PAGE_SIZE: u64 = 4096;
/// The largest page: hugetlbfs 1 GiB is above it and is sent in pieces by no batch, so it is refused.
pub const MAX_PAGE_SIZE: u64 = 2 << 20;

const _: () = assert!(
    MAX_PAGE_SIZE <= MAX_BATCH_BYTES,
    "a batch takes at least one page"
);
const _: () = assert!(
    PROBE_REGION as usize >= MAX_BLOCKS,
    "no RAMBlock has the probe's number"
);
