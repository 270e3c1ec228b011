//! What happened in a run, kept so that a survey of many can show that nothing it promises is empty.

use super::fault::Wish;
use super::names::Name;
use super::plan::Side;

/// Something that a fault or chance did in a run, when it really took effect and not only stood in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happened {
    /// All channels broke while the migration was under way.
    Cut,
    /// One channel of several broke.
    ChannelCut,
    /// A connection broke, and only this side saw it.
    CutSeenOnlyBy(Side),
    /// A write was cut off when part of it had left.
    PartialWrite,
    /// Nothing moved on the network for a while.
    Stalled,
    /// What was on its way was lost, and nobody was told.
    Silence,
    /// Only what this side sent did not arrive for a while.
    OneWaySilence(Side),
    /// Pages were sent as what differs from the version before.
    WentAsDelta,
    /// The source tried to connect anew and could not.
    ReconnectFailed,
    /// A later round's or batch's barrier came on one channel before an earlier one's on another.
    ChannelsOvertook,
    /// The last round's barriers came before `Stopped`.
    StoppedOvertaken,
    /// The operator of that side cancelled while it could be.
    Cancelled(Side),
    /// QEMU of that side died.
    QemuDied(Side),
    /// The daemon of that side died.
    DaemonDied(Side),
    /// The host of that side died, QEMU and all, and what was not synced.
    HostDied(Side),
    /// A crash left a torn last line in the journal.
    TornLine(Side),
    /// A crash took a record that was not synced.
    LostRecord(Side),
    /// The journal's disk refused a record.
    DiskRefused(Side),
    /// A disk that was full refused a record.
    DiskFull(Side),
    /// A record took longer than a second to be synced.
    SlowDisk(Side),
    /// The host refused something that the engine asked for.
    HostFailed(Side),
    /// QEMU refused a command.
    QemuFailed(Side),
    /// The daemon was stopped and went on later (SIGSTOP).
    Frozen(Side),
    /// The whole host slept, and its clock stood still meanwhile.
    SleptClockStood(Side),
    /// The whole host slept, and its clock went on.
    SleptClockWent(Side),
    /// The clock jumped ahead.
    ClockJumped(Side),
    /// The two hosts' clocks differed by a second or more at the end of what both saw.
    ClocksDrifted,
    /// The source was in doubt.
    Doubted,
    /// The run ended in doubt, because nothing could end it.
    DoubtedForGood,
    /// An operator asked for something without having made sure of the other side, while the matter was open.
    AskedUnfenced(Side, Wish),
    /// An operator made sure of the other side and then asked.
    AskedFenced(Side, Wish),
    /// More than three quarters of the bytes that may be in flight on a channel were.
    NearlyFullChannel,
    /// The guest was slowed.
    Throttled,
    /// It was slowed, and moved.
    ThrottledAndMoved,
    /// The guest went before its memory.
    WentFirst,
    /// Its operator had it go in the middle of a round.
    WentByHand,
    /// Its operator changed its limits.
    LimitsChanged,
    /// Its operator wanted to change its limits, and was told that it was too late.
    LimitsRefused,
    /// It touched a page that was not on its way.
    Waited,
    /// It touched a page that was on its way.
    WaitedOnItsWay,
    /// Its devices touched a page that it lacked, while QEMU loaded them.
    DevicesWaited,
    /// The connection was lost, or let go of, while pages were fetched.
    Interrupted,
    /// Pages were fetched on over a new connection.
    FetchedOn,
    /// The destination's daemon was started again and took up a guest that lacked pages.
    TakenUp,
    /// The source's daemon was started again and served on.
    ServedOn,
    /// The source's QEMU was gone, and its memory was served all the same.
    ServedWithoutQemu,
    /// The source's host came back without the memory, and said so to the destination.
    SaidLost,
    /// The destination heard of that and was paused.
    HeardOfLoss,
    /// A guest that has not run is kept, for its memory is gone at the source.
    KeptWithoutMemory,
    /// One whose memory has all come is run though the source says that it has lost it.
    RunWithoutItsSource,
    /// The guest lacked nothing any more.
    BecameWhole,
    /// `Serve` or `Lost` was answered by `Whole`, from the journal.
    WasWholeBefore,
    /// `Serve` or `Lost` was answered by the guest's end, from the journal.
    HadEndedBefore,
    /// The guest went on without what it lacked.
    Poisoned,
    /// The run ended with a guest that lacks pages, because nothing could end that.
    PausedForGood,
    /// The source let go of memory that the guest lacked, on its operator's word.
    LetGoOf,
}

/// Where a daemon died: at which output, and how it lay to it.
pub type Crash = (Side, Name, &'static str);

/// What happened in one run.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    happened: Vec<Happened>,
    crashes: Vec<Crash>,
}

impl Tally {
    /// It happened.
    pub(super) fn note(&mut self, what: Happened) {
        if !self.happened.contains(&what) {
            self.happened.push(what);
        }
    }

    /// A daemon died at an output.
    pub(super) fn crashed(&mut self, crash: Crash) {
        self.crashes.push(crash);
    }

    /// What happened, each at most once.
    pub fn happened(&self) -> &[Happened] {
        &self.happened
    }

    /// The daemons' deaths at outputs.
    pub fn crashes(&self) -> &[Crash] {
        &self.crashes
    }
}
