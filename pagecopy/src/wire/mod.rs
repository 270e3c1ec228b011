//! The messages of `WIRE.md`. Encoding and decoding are pure; every length is bounded before anything is allocated.
//!
//! [`Message::encode`] and [`Message::decode`] are generated from one table (`table.rs`) that names, for each message, its
//! number and the codec of each field (`fields.rs`); the bytes themselves are read and written by `codec.rs`.

mod codec;
mod fields;
mod figures;
mod spawn;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub use codec::WireError;
pub use spawn::{Blame, Part, PartKind};

use bytes::Bytes;

use crate::engine::MigrationId;
use crate::engine::event::{FaultFigures, PostcopyCost};
use crate::memory::{BlockSpec, Piece, Run};

/// Lowest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Highest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 1;

/// Capability bits that both sides announce; what both have is used.
pub mod capability {
    /// `--verify`: digests before the commit.
    pub const VERIFY: u64 = 1 << 0;
    /// The guest may run at the destination before its memory is there, which then fetches it.
    pub const POSTCOPY: u64 = 1 << 1;
    /// Pages may come compressed.
    pub const ZSTD: u64 = 1 << 2;
    /// Pages may come as what differs from the version sent before.
    pub const DELTA: u64 = 1 << 3;
    /// Data channels may join and leave while pages are sent.
    pub const CHANNELS: u64 = 1 << 4;
}

/// Why a side gives up, as a number that tools can decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum AbortCode {
    /// The operator cancelled.
    Cancelled = 1,
    /// No QEMU waits here for a guest of that name.
    UnknownVm = 2,
    /// RAMBlocks, sizes or page sizes differ.
    MemoryMismatch = 3,
    /// No version in common, or a capability that is needed is missing.
    Incompatible = 4,
    /// The peer broke the protocol.
    Protocol = 5,
    /// Memory or storage is full.
    NoMemory = 6,
    /// QEMU failed.
    Qemu = 7,
    /// The digests of both RAMs differ.
    VerifyFailed = 8,
    /// The guest cannot be moved within the limits.
    NotConverging = 9,
    /// This side took too long for the other.
    TimedOut = 10,
    /// This side's host failed otherwise (kernel, disk, journal).
    Host = 11,
    /// This migration was given up before: a late `Commit` is refused.
    Aborted = 12,
    /// The guest of that name is already being received.
    Busy = 13,
}

impl AbortCode {
    /// Every code.
    pub const ALL: [AbortCode; 13] = [
        AbortCode::Cancelled,
        AbortCode::UnknownVm,
        AbortCode::MemoryMismatch,
        AbortCode::Incompatible,
        AbortCode::Protocol,
        AbortCode::NoMemory,
        AbortCode::Qemu,
        AbortCode::VerifyFailed,
        AbortCode::NotConverging,
        AbortCode::TimedOut,
        AbortCode::Host,
        AbortCode::Aborted,
        AbortCode::Busy,
    ];
}

/// What a destination answers to `Query`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// The guest runs here.
    Running = 1,
    /// Given up before `Commit`, for good.
    Aborted = 2,
    /// Not decided, or the journal cannot be read. Ask again.
    Unknown = 3,
    /// Committed, but the guest does not run here yet: it was told to, or will be. Ask again.
    Committed = 4,
    /// There is no journal of it here.
    NoJournal = 5,
    /// It came from another peer than the one that asks. Ask again, when certificates have been seen to.
    Foreign = 6,
}

impl Standing {
    /// Every standing.
    pub const ALL: [Standing; 6] = [
        Standing::Running,
        Standing::Aborted,
        Standing::Unknown,
        Standing::Committed,
        Standing::NoJournal,
        Standing::Foreign,
    ];
}

/// What both ends of a connection know and nobody else. Never shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// A message. Control messages go on channel 0; `Zero`, `Barrier`, `Copied`, `Deltas` and `Leave` on data channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source → destination, first: this guest, with this memory, wants to move to you.
    Hello {
        /// Versions that the source speaks.
        version_min: u16,
        /// See `version_min`.
        version_max: u16,
        /// Capability bits.
        capabilities: u64,
        /// The migration.
        id: MigrationId,
        /// The guest's name.
        vm: String,
        /// The source daemon's name.
        host: String,
        /// Whether digests will be compared.
        verify: bool,
        /// RAMBlocks, in the order that numbers them.
        blocks: Vec<BlockSpec>,
    },
    /// Destination → source: ready, send.
    Accept {
        /// The version both will speak.
        version: u16,
        /// Capability bits that both have.
        capabilities: u64,
        /// The destination daemon's name.
        host: String,
        /// Why capabilities that were offered are not among them; empty where there is nothing to say.
        reason: String,
    },
    /// Source → destination: these pages will come in round 0; allocate them.
    Populate(Vec<Run>),
    /// Source → destination, on a data channel: these pages are zero.
    Zero(Vec<Run>),
    /// Source → destination, on every data channel: round `round` has left on this channel.
    Barrier {
        /// The round.
        round: u32,
    },
    /// Destination → source: every channel's barrier of `round` has come, and all before it is in place.
    BarrierReached {
        /// The round.
        round: u32,
    },
    /// Either way: are you there? Answered by `Pong` at once.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// The answer to `Ping`.
    Pong {
        /// As in the ping.
        nonce: u64,
    },
    /// Source → destination: the guest stands still; `final_round` is its last.
    Stopped {
        /// The round whose barrier makes the RAM whole.
        final_round: u32,
    },
    /// Source → destination: some of QEMU's device state, in order.
    DeviceState(Bytes),
    /// Source → destination: the device state is whole.
    DeviceStateEnd {
        /// Bytes in all.
        bytes: u64,
        /// CRC-32C over all of them.
        crc: u32,
    },
    /// Source → destination: digests of a block's chunks, from chunk `first` on.
    Digests {
        /// The block's number.
        block: u16,
        /// Index of the first chunk.
        first: u64,
        /// In order.
        digests: Vec<[u8; 16]>,
    },
    /// Destination → source: that chunk differs; which page?
    ChunkDiffers {
        /// The block's number.
        block: u16,
        /// The chunk.
        chunk: u64,
    },
    /// Source → destination: digests of all pages of a chunk.
    PageDigests {
        /// The block's number.
        block: u16,
        /// The chunk.
        chunk: u64,
        /// In order.
        digests: Vec<[u8; 16]>,
    },
    /// Destination → source: device state is loaded, the guest could run.
    Loaded,
    /// Source → destination: the guest is yours. After it the source never resumes the guest by itself.
    Commit,
    /// Destination → source: the guest runs here.
    Running,
    /// Source → destination: recorded; nobody will ask again.
    Closed,
    /// Source → destination, first message of a new connection: what became of that migration?
    Query {
        /// The migration.
        id: MigrationId,
    },
    /// The answer to `Query`.
    Answer {
        /// The migration.
        id: MigrationId,
        /// What became of it.
        standing: Standing,
    },
    /// Source → destination, first message of a new connection: the operator has taken the guest back here. Answered as
    /// `Query` is, after `Aborted` was recorded unless the guest runs there.
    Withdrawn {
        /// The migration.
        id: MigrationId,
    },
    /// Source → destination: pages that will not come; the destination fetches them itself. Bit 0 of the first word is
    /// page `first`.
    Lacking {
        /// The block's number.
        block: u16,
        /// The first page, a multiple of 64.
        first: u64,
        /// One bit a page.
        words: Vec<u64>,
    },
    /// Source → destination: that was all that will not come. From here on the switchover is one of post-copy.
    LackingEnd {
        /// Pages in all.
        pages: u64,
        /// Bytes a second that the destination may fetch while nobody waits for them; 0: as many as it can.
        background: u64,
        /// Bytes of pages that were sent in the rounds before, for people.
        sent: u64,
    },
    /// Source → destination, first message of a new connection with data channels: the pages that the guest lacks are
    /// served here.
    Serve {
        /// The migration.
        id: MigrationId,
    },
    /// The answer to `Serve`: the destination fetches on over this connection.
    Resumed,
    /// Destination → source: what the guest still lacks.
    Lacks {
        /// Bytes.
        bytes: u64,
        /// What has waited for pages so far.
        faults: FaultFigures,
    },
    /// Destination → source: recorded; nothing more is needed of the source.
    Whole {
        /// The migration.
        id: MigrationId,
        /// What it cost; not known any more to a daemon that was started anew since.
        cost: Option<PostcopyCost>,
    },
    /// Source → destination, first on a new connection: the guest's memory is not there any more, and cannot be served.
    Lost {
        /// The migration.
        id: MigrationId,
        /// Why, for people.
        reason: String,
    },
    /// Source → destination, on a data channel: a copy of these pages.
    Copied {
        /// The block's number.
        block: u16,
        /// Whether `bytes` are compressed.
        zstd: bool,
        /// Where the pages go, in order.
        pieces: Vec<Piece>,
        /// The pages, or one zstd frame of them.
        bytes: Bytes,
    },
    /// Source → destination, on a data channel: what differs in these pages from the version that was sent before.
    Deltas {
        /// The block's number.
        block: u16,
        /// The newest round in which one of those versions was sent.
        base_round: u32,
        /// Where the pages are, in order.
        pieces: Vec<Piece>,
        /// A delta for each page.
        bytes: Bytes,
    },
    /// Source → destination, first message of a connection with data channels: they may go over RDMA.
    RdmaOffer {
        /// Data channels.
        channels: u16,
        /// Bytes of the guest's RAM.
        bytes: u64,
    },
    /// The answer to `RdmaOffer`.
    RdmaAnswer {
        /// Where to call, `IP:PORT`; empty: no RDMA.
        address: String,
        /// By which the destination knows the caller.
        secret: Secret,
        /// Why not, for people.
        reason: String,
    },
    /// Source → destination, first: what would a migration of this guest find there?
    Preflight {
        /// The guest's name.
        vm: String,
        /// The source daemon's name.
        host: String,
        /// Bytes of its RAM; 0 where it is not known.
        ram: u64,
    },
    /// The answer to `Preflight` and `Compare`.
    Findings {
        /// JSON, see `preflight::Facts`.
        facts: String,
    },
    /// Source → destination, first: start a QEMU for this guest, which comes on the same connection.
    Spawn {
        /// The migration.
        id: MigrationId,
        /// The guest's name.
        vm: String,
        /// The source daemon's name.
        host: String,
        /// The command line of its QEMU, the program first.
        arguments: Vec<String>,
        /// What its QEMU is made of now.
        parts: Vec<Part>,
    },
    /// The answer to `Spawn`: it waits for the guest, or why there is none.
    Spawned {
        /// The migration.
        id: MigrationId,
        /// Whose fault it is; nobody's when it waits.
        blame: Blame,
        /// What happened, for people.
        text: String,
        /// What to do, for people.
        remedy: String,
    },
    /// Either way, on a data channel over TCP: the one over RDMA beside it is no more at this side.
    RdmaBroken {
        /// Messages that came over it.
        received: u64,
    },
    /// Source → destination, on a data channel over TCP: nothing more goes over it, for RDMA is there again.
    RdmaBack,
    /// The answer to `RdmaBack`.
    RdmaTaken {
        /// All goes over RDMA from here on; otherwise over TCP, as before.
        taken: bool,
    },
    /// Source → destination, first: what is the QEMU like that waits for this guest, which comes on the same connection?
    Compare {
        /// The guest's name.
        vm: String,
        /// The guest may come where only the margin of free memory is missing.
        force: bool,
    },
    /// Source → destination, first message of a new connection with data channels: they are for that migration.
    Join {
        /// The migration.
        id: MigrationId,
        /// The number of the first of them there.
        first: u16,
        /// By which `AddChannels` knows them.
        key: Secret,
    },
    /// Source → destination: data channels that wait by `Join` carry pages and barriers from its answer on.
    AddChannels {
        /// The number of the first.
        first: u16,
        /// How many.
        channels: u16,
        /// As in their `Join`.
        key: Secret,
    },
    /// The answer to `Join`: they wait; and to `AddChannels`: they belong to the round under way.
    ChannelsTaken {
        /// The number of the first.
        first: u16,
        /// Otherwise nothing has changed.
        taken: bool,
        /// Why not, for people.
        reason: String,
    },
    /// Source → destination, on a data channel, the last on it: a barrier for round `round` and all that follow.
    Leave {
        /// The round under way.
        round: u32,
    },
    /// Either way, any time before `Commit`: given up.
    Abort {
        /// Why, for tools.
        code: AbortCode,
        /// Why, for people.
        reason: String,
    },
}
