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
