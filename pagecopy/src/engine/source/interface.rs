//! What the source's engine is set up with, what it is told, and what it asks for.

use std::time::Duration;

use crate::engine::channels::Bounds;
pub use crate::engine::doubt::Resolution;
use crate::engine::encoding::policy::Compress;
use crate::engine::encoding::{Encoded, Encodings};
use crate::engine::event::{Finished, Report};
use crate::engine::journal::{RamFile, Record};
use crate::engine::{ChannelId, Failure, MigrationId, Timeouts};
use crate::memory::{BlockSpec, Run};
use crate::wire::{Message, Secret};

/// How the guest's memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All of it before the guest does.
    Precopy,
    /// The same; but where that would fail and `postcopy` allows it, the guest goes first.
    Auto {
        /// Whether it may depend on both hosts for a while.
        postcopy: bool,
    },
    /// Rounds, and then the guest before the rest.
    Hybrid(After),
    /// The guest first.
    Postcopy,
}

/// When a hybrid migration lets the guest go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// When a round does not pay any more.
    Auto,
    /// After so many rounds.
    Rounds(u32),
    /// After so long.
    Time(Duration),
}

/// What the operator asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Switch over when the predicted downtime is at most this.
    pub downtime_limit: Duration,
    /// Bytes a second for pages; none is unlimited.
    pub bandwidth_limit: Option<u64>,
    /// Bytes a second for what a guest that has gone first lacks and does not wait for; none is unlimited.
    pub background_limit: Option<u64>,
    /// Give up after so many rounds without a switchover.
    pub max_rounds: u32,
    /// Give up after so long without a switchover.
    pub timeout: Option<Duration>,
    /// How the memory moves. With `verify`, never after the guest.
    pub mode: Mode,
    /// Whether the guest may be slowed where pre-copy falls behind and it may not go before its memory.
    pub throttle: bool,
    /// Compare digests of both RAMs before the commit.
    pub verify: bool,
    /// How pages are encoded, where the destination can take it.
    pub compress: Compress,
    /// Quit the source QEMU once the guest has moved.
    pub quit_source: bool,
    /// Between which numbers data channels are chosen while pages are sent; none: there are as many as there were.
    pub channels: Option<Bounds>,
}

/// Limits that the operator may change while pages are sent; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Switch over when the predicted downtime is at most this.
    pub downtime_limit: Option<Duration>,
    /// Bytes a second for pages; `Some(None)` is unlimited.
    pub bandwidth_limit: Option<Option<u64>>,
}

/// All that an engine starts from.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The migration.
    pub id: MigrationId,
    /// The guest's name, the same on both sides.
    pub vm: String,
    /// This daemon's name, for the peer's messages.
    pub host: String,
    /// RAMBlocks, in the order that numbers them.
    pub blocks: Vec<BlockSpec>,
    /// The files of the RAMBlocks, in the same order: recorded, so that a daemon that is started anew can serve them.
    pub ram: Vec<RamFile>,
    /// Whether the guest has disks with direct I/O, so that dirty pages must age past the I/O in flight.
    pub direct_io: bool,
    /// Number of data channels.
    pub data_channels: u16,
    /// The part of the downtime that does not depend on bytes, as last measured on this host (or a first guess).
    pub fixed_downtime: Duration,
    /// Options.
    pub options: Options,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// Pages to push, all of one batch on one channel. Its dirty bits were cleared before it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Names the batch in [`Input::Pushed`].
    pub id: u64,
    /// The round that it is of: the rounds before are in place at the destination.
    pub round: u32,
    /// How its pages may be encoded.
    pub encodings: Encodings,
    /// At most `MAX_RUNS` runs and `MAX_BATCH_BYTES` bytes, of one block.
    pub runs: Vec<Run>,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Bytes that went as they are.
    pub raw_bytes: u64,
    /// Bytes that were zero and went as a run.
    pub zero_bytes: u64,
    /// What went encoded.
    pub encoded: Encoded,
}

/// What a data channel has done since it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelLoad {
    /// The channel.
    pub channel: ChannelId,
    /// Bytes that left.
    pub sent: u64,
    /// For so long it had something under way.
    pub busy: Duration,
    /// For so long it waited for the operator's limit.
    pub held: Duration,
    /// So much processor time its thread has taken.
    pub cpu: Duration,
}

/// What the data channels have done, and this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Each channel.
    pub channels: Vec<ChannelLoad>,
    /// For so long in all the processors have had nothing to do, since some moment; none where that is not known.
    pub idle: Option<Duration>,
}

/// What the RAM files hold, for a scan with the guest stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Populated {
    /// It was not asked for.
    NotAsked,
    /// Nothing was taken out of them since [`Input::Attached`]: they hold what was listed then, and what was found dirty
    /// since, this scan included.
    NothingTaken,
    /// These runs, and what this scan has found dirty. Nothing was taken out since they were listed.
    Runs(Vec<Run>),
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Nothing but time passed.
    Tick,
    /// The operator cancels.
    Cancel,
    /// The peer's message on the control channel.
    Message(Message),
    /// The connection is gone (any channel of it), with the reason.
    LinkLost(Failure),
    /// Post-copy: the answer to `Lost`, which the driver has said where [`Output::ConnectAll`] did not find the memory. The guest
    /// has run at the destination and ended with its QEMU: nothing is needed here any more.
    GuestEnded {
        /// In the destination's words.
        reason: String,
    },
    /// Post-copy: what the guest lacks is not here any more, or was not found. Until `Reconnected`.
    MemoryLost,
    /// Answer to [`Output::Connect`]: there is a control channel again.
    Reconnected,
    /// Answer to [`Output::Connect`]: not now.
    ReconnectFailed(String),
    /// The same, and the peer is there: its daemon refused, or ended what had begun.
    ReconnectRefused(String),
    /// Answer to [`Output::Attach`]: tracking is armed. Every page not in `populated` reads as zero.
    Attached {
        /// How long QEMU's thread stood still.
        stopped: Duration,
        /// What the RAM files hold, listed after arming.
        populated: Vec<Run>,
    },
    /// Answer to [`Output::Attach`], [`Output::Scan`], [`Output::Digest`] and the like: it cannot be done.
    HostFailed(Failure),
    /// Answer to [`Output::Scan`].
    Scanned {
        /// Runs written since the scan before.
        dirty: Vec<Run>,
        /// With `holes` asked for: what the RAM files hold.
        populated: Populated,
        /// How long it took.
        took: Duration,
    },
    /// Answer to [`Output::DrainIo`]: every disk read that was in flight when it was asked for has landed.
    IoDrained,
    /// Answer to [`Output::Push`]: this side has read the batch's memory for the last time.
    Pushed {
        /// The channel.
        channel: ChannelId,
        /// The batch.
        batch: u64,
        /// What went how.
        pushed: Pushed,
    },
    /// What the data channels have done. Wanted about ten times a second while [`Source::measures`](super::Source::measures).
    Measured(Load),
    /// Answer to [`Output::OpenChannels`]: they are there, the destination keeps them, and knows them by `key`.
    ChannelsOpened {
        /// The number of the first.
        first: u16,
        /// What their `Join` said.
        key: Secret,
    },
    /// Answer to [`Output::OpenChannels`]: there are none, and why.
    ChannelsRefused {
        /// The number of the first.
        first: u16,
        /// In words.
        reason: String,
    },
    /// Answer to [`Output::LookAgain`]: nothing has come that tracking does not see.
    Unchanged,
    /// Answer to [`Output::StopGuest`]: QEMU is at `pre-switchover`; the guest stands still and its RAM is final.
    GuestStopped,
    /// Answer to [`Output::SaveDeviceState`]: some of QEMU's stream, in order.
    DeviceState(bytes::Bytes),
    /// Answer to [`Output::SaveDeviceState`]: the stream is whole and QEMU says `completed`.
    DeviceStateSaved,
    /// QEMU failed or left, at any time after `StopGuest`; or while running.
    QemuFailed(Failure),
    /// Answer to [`Output::ResumeGuest`]: the guest runs here.
    GuestResumed,
    /// Answer to [`Output::ResumeGuest`]: it does not, and why.
    ResumeFailed(Failure),
    /// Answer to [`Output::ResumeGuest`]: its QEMU has ended, and the guest with it.
    GuestLost,
    /// Answer to [`Output::Journal`]: the record is on disk.
    Journaled(Record),
    /// Answer to [`Output::Journal`]: the disk refused.
    JournalFailed(Record, Failure),
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
    /// Post-copy, about once a second: so many bytes have gone out on this connection's data channels, all of them replies to
    /// the destination's reads.
    Read {
        /// Since the connection was made.
        bytes: u64,
    },
    /// The operator wants the guest switched over now, before its memory. Answer: [`Output::Decided`].
    StartPostcopy,
    /// The operator wants the destination of a paused post-copy dialled now. Answer: [`Output::Decided`].
    Recover,
    /// The operator wants other limits from now on. Answer: [`Output::Decided`].
    Change(Change),
    /// The operator decides an `InDoubt` migration. Answer: [`Output::Decided`], after the destination was asked.
    Resolve(Resolution),
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
    /// Send a message on a data channel, behind the batches pushed there before. With `Leave` the channel is closed in order when it
    /// has left, and that is no loss.
    SendOn(ChannelId, Message),
    /// Inject, register, protect all, and list what is populated. Answer: `Attached` or `HostFailed`.
    Attach,
    /// Scan for dirty pages; with `holes`, say what is populated, too: listed anew only if something was taken out of the RAM
    /// files since it was listed. Answer: `Scanned` or `HostFailed`.
    Scan {
        /// Whether `populated` is wanted.
        holes: bool,
    },
    /// Have QEMU finish the disk I/O that is in flight, with the guest running. Answer: `IoDrained` or `HostFailed`.
    DrainIo,
    /// Read, split into raw and zero, and send. Answer: `Pushed`.
    Push {
        /// The channel.
        channel: ChannelId,
        /// The pages.
        batch: Batch,
    },
    /// Make so many data channels more to the peer, and have it keep them (`Join`). Their end is nobody's failure before `UseChannels`.
    /// Answer: `ChannelsOpened` or `ChannelsRefused`.
    OpenChannels {
        /// The number of the first; no other has it, before or after.
        first: u16,
        /// How many.
        channels: u16,
    },
    /// From now on these channels are as the others. No answer.
    UseChannels {
        /// The number of the first; all from there on.
        first: u16,
    },
    /// Close these channels: they carry nothing. No answer.
    CloseChannels {
        /// The number of the first; all from there on.
        first: u16,
    },
    /// Look again for what tracking does not see and what may have come since the start: a disk with direct I/O where there
    /// was none, another process that maps the RAM, an assigned device. Answer: `Unchanged` or `HostFailed`.
    LookAgain,
    /// Keep whatever in the guest writes from running for this share of its time, in percent up to 99, until told otherwise: 0 is
    /// not at all. Told when it changes; lifted when the guest stands still, and before everything else on the way back. Whatever the driver
    /// does for it must end with its process. No answer.
    Throttle {
        /// Percent of its time.
        percent: u32,
    },
    /// QMP `migrate` with `pause-before-switchover`. Answer: `GuestStopped` or `QemuFailed`.
    StopGuest,
    /// QMP `migrate-continue`, beside the last scan. Answers: `DeviceState`…, `DeviceStateSaved`, or `QemuFailed`.
    SaveDeviceState,
    /// Post-copy: from now on answer the peer's reads of all RAM, which does not change any more. No answer; ended by
    /// `Detach`.
    OpenReads,
    /// Take digests of all RAM. Answer: `Digests` or `HostFailed`.
    Digest,
    /// Take digests of the pages of a chunk. Answer: `PageDigests`.
    PageDigests {
        /// The block's number.
        block: u16,
        /// The chunk.
        chunk: u64,
    },
    /// Write a record and sync it. Answer: `Journaled` or `JournalFailed`.
    Journal(Record),
    /// Take the guest back: QMP `migrate_cancel` or `cont`, whatever its state asks for. Answer: `GuestResumed`,
    /// `ResumeFailed` or `GuestLost`. The driver checks that it runs.
    ResumeGuest,
    /// End tracking, close the data channels, let go of QEMU's memory. No answer.
    Detach,
    /// QMP `quit`. No answer.
    QuitGuest,
    /// Make a control channel to the peer anew and say `Hello` is not needed: the engine asks by `Query`. Answer:
    /// `Reconnected`, `ReconnectFailed` or `ReconnectRefused`. An attempt that is given up for another, or by `Detach`, is not answered any more.
    Connect,
    /// Post-copy: let go of the connection that there was and of an attempt under way, and make control and data channels
    /// anew, with RAM open to the peer's reads. Answer: as to `Connect`; no connection is made, either, when a daemon
    /// that was started anew cannot open the RAM files: it tells the destination so (`Lost`), and people may see to that, or
    /// let go. Should the destination answer `Whole`, that is an input.
    ConnectAll,
    /// Answer to [`Input::Resolve`], `StartPostcopy`, `Recover`, `Change`: what is done, or why it is refused.
    Decided(Result<String, Failure>),
    /// Tell people.
    Report(Report),
    /// The last output, except in `InDoubt`, where a `Resolve` or the peer may still end it.
    Finished(Finished),
}

impl From<Report> for Output {
    fn from(report: Report) -> Output {
        Output::Report(report)
    }
}
