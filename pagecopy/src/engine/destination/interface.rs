//! What the destination's engine is set up with, what it is told, and what it asks for.

use crate::engine::bitmap::Bitmap;
use crate::engine::encoding::Encodings;
use crate::engine::event::{FaultFigures, Figures, Report, State};
use crate::engine::journal::{RamFile, Record};
use crate::engine::{ChannelId, Failure, MigrationId, Timeouts};
use crate::memory::{BlockSpec, Run};
use crate::wire::{Message, Secret};

/// All that an engine starts from: a QEMU that waits for a guest.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The migration.
    pub id: MigrationId,
    /// This daemon's name, for the peer's messages.
    pub host: String,
    /// The guest's name.
    pub vm: String,
    /// RAMBlocks of the waiting QEMU, in any order; the source's order numbers them.
    pub blocks: Vec<BlockSpec>,
    /// Number of data channels that the connection has.
    pub data_channels: u16,
    /// Whether the guest may run here before its memory is here, or why not: the source is told.
    pub postcopy: Result<(), Failure>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Nothing but time passed.
    Tick,
    /// The operator cancels.
    Cancel,
    /// The peer's message on the control channel. The first is `Hello`.
    Message(Message),
    /// A barrier arrived on a data channel. All writes and zero runs before it on that channel have been placed.
    Barrier {
        /// The data channel.
        channel: ChannelId,
        /// The round that it ends.
        round: u32,
        /// Bytes of zero runs placed on this channel since its barrier before.
        zero_bytes: u64,
    },
    /// `Leave` arrived on a data channel, behind which nothing comes: all writes and zero runs before it have been placed. From now on
    /// its end is nobody's failure.
    Left {
        /// The data channel.
        channel: ChannelId,
        /// The round of which it is the barrier there.
        round: u32,
    },
    /// Answer to [`Output::TakeChannels`].
    ChannelsTaken {
        /// The number of the first.
        first: u16,
        /// Why they are not; none: they are.
        refused: Option<String>,
    },
    /// The peer broke the protocol on a data channel (a run outside a block, a message that does not belong there).
    PeerMisbehaved(String),
    /// The connection is gone (any channel of it), with the reason.
    LinkLost(Failure),
    /// Answer to [`Output::Prepare`]: the RAM is clear and its regions are registered.
    Prepared,
    /// Answer to `Prepare`, `Allocate`, `Digest`: it cannot be done.
    HostFailed(Failure),
    /// Answer to [`Output::Digest`]: digests of all chunks of all blocks, by block.
    Digests(Vec<Vec<[u8; 16]>>),
    /// Answer to [`Output::PageDigests`].
    PageDigests {
        /// The block's number.
        block: u16,
        /// The chunk.
        chunk: u64,
        /// Of every page in it.
        digests: Vec<[u8; 16]>,
    },
    /// Answer to [`Output::LoadDeviceState`]: QEMU has loaded it and stands paused.
    DeviceStateLoaded,
    /// Answer to [`Output::Arm`]: page faults wait, and pages are fetched. What a successor needs to take them over:
    Armed {
        /// QEMU's process.
        pid: i32,
        /// Numbers of the userfaultfds that stay open inside it.
        inside: Vec<i32>,
        /// The files of the RAMBlocks.
        ram: Vec<RamFile>,
    },
    /// Post-copy, about once a second: what lacks, and what waited.
    Lacks {
        /// Bytes.
        bytes: u64,
        /// Page faults so far.
        faults: FaultFigures,
    },
    /// Post-copy: every page is here, and QEMU's memory was let go of.
    Whole {
        /// All page faults.
        faults: FaultFigures,
    },
    /// Post-copy: this host cannot fetch on (the source's failures are `LinkLost` and `PeerMisbehaved`).
    PullFailed(Failure),
    /// Post-copy: the source has come with a new connection, whose data channels the driver holds.
    Served,
    /// Post-copy: the source has come, on a connection of its own, to say that it does not have the guest's memory any more.
    SourceLost {
        /// Why, in its words.
        reason: String,
        /// Whether everything has come all the same, though [`Whole`](Input::Whole) may still have to say so.
        all_here: bool,
    },
    /// Post-copy: the operator wants the guest to go on without what it lacks. Answer: [`Output::Decided`].
    Poison {
        /// The operator's word that the source's memory is gone for good.
        peer_fenced: bool,
    },
    /// Answer to [`Output::Poison`]: so many bytes were poisoned, and QEMU's memory was let go of. Or `HostFailed`.
    Poisoned {
        /// Bytes.
        bytes: u64,
    },
    /// QEMU failed or left, at any time.
    QemuFailed(Failure),
    /// Answer to [`Output::Journal`]: the record is on disk.
    Journaled(Record),
    /// Answer to [`Output::Journal`]: the disk refused.
    JournalFailed(Record, Failure),
    /// Answer to [`Output::RunGuest`]: the guest runs.
    GuestRunning,
}

/// Something to do.
#[allow(
    clippy::large_enum_variant,
    reason = "there are few at a time, and a message is taken out at once"
)]
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a message on the control channel.
    Send(Message),
    /// Write a record and sync it. Answer: `Journaled` or `JournalFailed`.
    Journal(Record),
    /// Clear the RAM, then register block `i` of `order` (an index into the set-up's blocks) as region `i`, writable by
    /// the peer. Answer: `Prepared` or `HostFailed`.
    Prepare {
        /// For each of the source's blocks, the index of ours.
        order: Vec<usize>,
        /// How pages may come encoded on the data channels.
        encodings: Encodings,
    },
    /// Place what comes on the data channels that wait by a `Join` with this key, so many, as on the others. Answer: `ChannelsTaken`.
    TakeChannels {
        /// The number of the first.
        first: u16,
        /// How many.
        channels: u16,
        /// What they are known by.
        key: Secret,
        /// The round under way, until they have brought its barrier: all before it is in place.
        round: u32,
    },
    /// Allocate these pages in the background. Answer only when it fails: `HostFailed`.
    Allocate(Vec<Run>),
    /// Keep these bytes of the device state, in order; `LoadDeviceState` gives them to QEMU.
    KeepDeviceState(bytes::Bytes),
    /// Take digests of all RAM. Answer: `Digests` or `HostFailed`.
    Digest,
    /// Take digests of the pages of a chunk. Answer: `PageDigests`.
    PageDigests {
        /// The block's number.
        block: u16,
        /// The chunk.
        chunk: u64,
    },
    /// Post-copy: close the regions to the peer's writes, keep a record of what has been received (all but `lacking`), make
    /// page faults in what lacks wait, and begin to serve them and to fetch. Answer: `Armed` or `HostFailed`; then `Lacks`
    /// and `Whole`, or `PullFailed`.
    Arm {
        /// Pages that are not here.
        lacking: Bitmap,
        /// Bytes a second of those that nobody waits for; none is unlimited. Who waits is never limited.
        background: Option<u64>,
    },
    /// Post-copy: let go of the connection. Page faults go on to wait.
    StopPulling,
    /// Post-copy: fetch on, over the connection that came with `Served`.
    Pull,
    /// Post-copy: poison what lacks, and let go of QEMU's memory. Answer: `Poisoned` or `HostFailed`.
    Poison,
    /// Answer to [`Input::Poison`]: what is done, or why it is refused.
    Decided(Result<String, Failure>),
    /// The guest's RAM is whole, or its page faults wait: close the regions to the peer's writes, give QEMU the device state. Answer: `DeviceStateLoaded`
    /// or `QemuFailed`.
    LoadDeviceState,
    /// QMP `cont`. Answer: `GuestRunning` or `QemuFailed`.
    RunGuest,
    /// Tell people.
    Report(Report),
    /// The last output: the migration ended here in this state.
    Finished {
        /// `Completed`, `Failed` or `Cancelled`; `InDoubt` when the guest is committed and does not start.
        state: State,
        /// Why, unless completed.
        failure: Option<Failure>,
        /// Whether QEMU has been given device state, so that it must be started anew for another attempt.
        qemu_used: bool,
        /// Of a post-copy, what it cost; else nothing.
        figures: Figures,
    },
}

impl From<Report> for Output {
    fn from(report: Report) -> Output {
        Output::Report(report)
    }
}
