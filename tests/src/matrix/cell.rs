//! Cells: the steps of a migration, the faults, and what may come of each pair.

use std::fmt;

use super::postcopy::POSTCOPY_STEPS;
use crate::real::Side;

/// Where a step lies with regard to the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// The guest runs at the source.
    Running,
    /// It has been told to stop; `Commit` has not been sent.
    Stopped,
    /// `Commit` was sent, or may be before the engine hears of a fault; `Committed` is not on the destination's disk.
    Sent,
    /// `Committed` is on disk; the destination has not run the guest.
    Committed,
    /// The guest runs at the destination.
    Moved,
}

/// Which way a migration goes when it comes to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It would complete.
    There,
    /// It was cancelled when the destination had loaded the guest, and goes back.
    Back,
    /// The guest goes first and its memory after it: post-copy.
    First,
}

/// A step at which a daemon is held, before it takes an input or does an output of its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The host: A is the source, B the destination.
    pub side: Side,
    /// As `daemon/src/steps.rs` names it.
    pub name: &'static str,
    /// Which time it comes there, from 1.
    pub nth: u32,
    /// Which way.
    pub way: Way,
    /// Where it lies.
    pub moment: Moment,
}

const fn step(side: Side, name: &'static str, nth: u32, moment: Moment) -> Step {
    Step {
        side,
        name,
        nth,
        way: Way::There,
        moment,
    }
}

const fn back(side: Side, name: &'static str) -> Step {
    Step {
        side,
        name,
        nth: 1,
        way: Way::Back,
        moment: Moment::Stopped,
    }
}

use Moment::{Committed, Moved, Running, Sent, Stopped};
use Side::{A, B};

/// All steps, in the order in which a migration comes to them.
pub const STEPS: [Step; 42] = [
    // Attach.
    step(A, "Journal(Begun)", 1, Running),
    step(B, "Journal(Begun)", 1, Running),
    step(B, "Prepare", 1, Running),
    step(A, "Attach", 1, Running),
    step(A, "Attached", 1, Running),
    // The first round.
    step(A, "Push", 1, Running),
    step(B, "Send(BarrierReached)", 1, Running),
    step(A, "Scanned", 1, Running),
    // A later one: the third barrier is the first of round 1 on two channels.
    step(A, "Send(Barrier)", 3, Running),
    step(B, "Send(BarrierReached)", 2, Running),
    // Stop, pre-switchover, the last scan and the last runs.
    step(A, "StopGuest", 1, Running),
    step(A, "GuestStopped", 1, Stopped),
    step(A, "Send(Stopped)", 1, Stopped),
    step(B, "Message(Stopped)", 1, Stopped),
    // Device state, with the source's intent beside it.
    step(A, "SaveDeviceState", 1, Stopped),
    step(A, "DeviceStateSaved", 1, Stopped),
    step(A, "Journal(CommitIntent)", 1, Stopped),
    step(B, "LoadDeviceState", 1, Stopped),
    step(B, "DeviceStateLoaded", 1, Stopped),
    // Commit sent and received. With the intent on disk and `Loaded` at hand, the engine sends it before it hears more.
    step(A, "Journaled(CommitIntent)", 1, Sent),
    step(A, "Message(Loaded)", 1, Sent),
    step(A, "Send(Commit)", 1, Sent),
    step(B, "Message(Commit)", 1, Sent),
    step(B, "Journal(Committed)", 1, Sent),
    step(B, "Journaled(Committed)", 1, Committed),
    step(B, "RunGuest", 1, Committed),
    // Running sent and received.
    step(B, "GuestRunning", 1, Moved),
    step(B, "Send(Running)", 1, Moved),
    step(B, "Journal(Running)", 1, Moved),
    step(B, "Journaled(Running)", 1, Moved),
    step(A, "Message(Running)", 1, Moved),
    // Detach, and the journals are closed.
    step(A, "Journal(GuestMoved)", 1, Moved),
    step(A, "Journaled(GuestMoved)", 1, Moved),
    step(A, "Detach", 1, Moved),
    step(B, "Journal(Closed)", 1, Moved),
    step(B, "Journaled(Closed)", 1, Moved),
    // The way back.
    back(A, "ResumeGuest"),
    back(A, "Journal(RolledBack)"),
    back(A, "Journaled(RolledBack)"),
    back(A, "Detach"),
    back(B, "Journal(Aborted)"),
    back(B, "Journaled(Aborted)"),
];

impl Step {
    /// As the daemon is told of it.
    pub fn hold(&self) -> String {
        format!("{} {} {}", role(self.side), self.name, self.nth)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.way {
            Way::There => "",
            Way::Back => "way back, ",
            Way::First => "post-copy, ",
        })?;
        write!(f, "{} {}", role(self.side), self.name)?;
        if self.nth > 1 {
            write!(f, " {}", self.nth)?;
        }
        Ok(())
    }
}

/// What a host is in the cell's migration.
pub(super) fn role(side: Side) -> &'static str {
    match side {
        Side::A => "source",
        Side::B => "destination",
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of that host's daemon, which is started again when the other has noticed.
    KillDaemon(Side),
    /// `kill -9` of both daemons, as by a power cut that spares the guests.
    KillBothDaemons,
    /// `kill -9` of that host's QEMU.
    KillQemu(Side),
    /// The link loses its carrier until everybody has noticed.
    LinkDown,
    /// Packets are dropped in silence for a second.
    DropBriefly,
    /// Packets are dropped in silence until every time-out has passed.
    DropLong,
    /// The file system of the destination's RAM is full.
    MemoryFull,
    /// The file system of the destination's journals is full.
    DiskFull,
    /// The operator cancels, on that host.
    Cancel(Side),
    /// SIGTERM to that host's daemon, which is then started again.
    Restart(Side),
    /// SIGSTOP of that host's daemon for longer than the peer bears silence, then SIGCONT.
    Pause(Side),
}

/// All faults.
pub(super) const FAULTS: [Fault; 16] = [
    Fault::KillDaemon(A),
    Fault::KillDaemon(B),
    Fault::KillBothDaemons,
    Fault::KillQemu(A),
    Fault::KillQemu(B),
    Fault::LinkDown,
    Fault::DropBriefly,
    Fault::DropLong,
    Fault::MemoryFull,
    Fault::DiskFull,
    Fault::Cancel(A),
    Fault::Cancel(B),
    Fault::Restart(A),
    Fault::Restart(B),
    Fault::Pause(A),
    Fault::Pause(B),
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillDaemon(side) => write!(f, "kill {} daemon", role(*side)),
            Fault::KillBothDaemons => f.write_str("kill both daemons"),
            Fault::KillQemu(side) => write!(f, "kill {} QEMU", role(*side)),
            Fault::LinkDown => f.write_str("link down"),
            Fault::DropBriefly => f.write_str("drop for 1 s"),
            Fault::DropLong => f.write_str("drop for long"),
            Fault::MemoryFull => f.write_str("destination memory full"),
            Fault::DiskFull => f.write_str("destination journal disk full"),
            Fault::Cancel(side) => write!(f, "cancel at {}", role(*side)),
            Fault::Restart(side) => write!(f, "restart {} daemon", role(*side)),
            Fault::Pause(side) => write!(f, "pause {} daemon", role(*side)),
        }
    }
}

/// How a cell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest runs at the source.
    Source,
    /// The guest runs at the destination.
    Destination,
    /// No guest runs: the fault itself killed the QEMU that had it.
    Lost,
    /// No guest ran, in doubt, until the destination's operator gave it up and the source took it back by itself.
    Resolved,
}

/// One fault at one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// When.
    pub step: Step,
    /// What.
    pub fault: Fault,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {}", self.step, self.fault)
    }
}

/// Every fault at every step.
pub fn cells() -> Vec<Cell> {
    STEPS
        .into_iter()
        .flat_map(|step| FAULTS.map(|fault| Cell { step, fault }))
        .collect()
}

impl Cell {
    /// How this cell may end: before `Commit` is sent the guest stays at the source, when `Committed` is on disk it is the
    /// destination's, in between it is at either; unless the fault takes a guest with it, or does no harm.
    ///
    /// `accepted`: the daemon took the order, where the fault is one.
    pub fn allows(&self, accepted: bool) -> &'static [End] {
        use End::{Destination, Lost, Resolved, Source};
        let Step { way, moment, .. } = self.step;
        let by_moment: &[End] = match moment {
            Running | Stopped => &[Source],
            Sent => &[Source, Destination],
            Committed | Moved => &[Destination],
        };
        match self.fault {
            // The only copy that may run goes with its QEMU, unless the commit is faster than the news.
            Fault::KillQemu(Side::A) if self.before("DeviceStateSaved") => &[Lost],
            Fault::KillQemu(Side::A) if way == Way::Back => &[Lost],
            Fault::KillQemu(Side::A) if self.before("Send(Commit)") => &[Lost, Destination],
            Fault::KillQemu(Side::A) => &[Destination],
            Fault::KillQemu(Side::B) if moment == Moved => &[Lost],
            // Nobody knows whether it has run, so a person decides.
            Fault::KillQemu(Side::B) if moment == Committed => &[Resolved],
            Fault::KillQemu(Side::B) => &[Source],
            _ if way == Way::Back => &[Source],
            Fault::DropBriefly => &[Destination],
            // What is allocated before the fault is enough from some moment on.
            Fault::MemoryFull if moment < Sent && !self.before("Push") => &[Source, Destination],
            Fault::MemoryFull if moment == Sent => &[Destination],
            // Nothing can be decided on the full disk, and all is well when it has room again.
            Fault::DiskFull if moment == Sent => &[Source],
            Fault::Cancel(_) if !accepted => &[Destination],
            _ => by_moment,
        }
    }

    /// Whether the source cannot know, while the fault lasts, what became of the guest.
    pub fn must_be_in_doubt(&self) -> bool {
        let answered_by_nobody =
            matches!(self.fault, Fault::KillDaemon(B) | Fault::KillBothDaemons);
        answered_by_nobody
            && !self.before("Send(Commit)")
            && matches!(self.step.moment, Sent | Committed)
    }

    /// Whether the step comes before the one of that name.
    fn before(&self, name: &str) -> bool {
        let steps: &[Step] = match self.step.way {
            Way::There | Way::Back => &STEPS,
            Way::First => &POSTCOPY_STEPS,
        };
        let at = |wanted: &dyn Fn(&Step) -> bool| steps.iter().position(wanted);
        at(&|step| *step == self.step) < at(&|step| step.name == name)
    }

    /// Records that the destination's full disk still takes after `Begun`: those that were written before the fault.
    pub fn records_before(&self) -> usize {
        match self.step.moment {
            Running | Stopped | Sent => 0,
            Committed => 1,
            Moved if self.before("Journaled(Running)") => 1,
            Moved => 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_a_name_of_its_own() {
        let mut names: Vec<String> = cells().iter().map(Cell::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), STEPS.len() * FAULTS.len());
    }

    #[test]
    fn who_may_run_the_guest_changes_at_the_commit_only() {
        let link = |name: &str, side| {
            let of_name = |step: &&Step| step.name == name && step.side == side;
            let step = *STEPS.iter().find(of_name).expect("a step");
            Cell {
                step,
                fault: Fault::LinkDown,
            }
            .allows(true)
        };
        assert_eq!(link("DeviceStateLoaded", B), [End::Source]);
        assert_eq!(link("Message(Commit)", B), [End::Source, End::Destination]);
        assert_eq!(link("Journaled(Committed)", B), [End::Destination]);
    }
}
