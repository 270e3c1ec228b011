//! The steps and the faults of a post-copy: the guest goes first, and fetches its memory from where it was.
//!
//! What may come of a cell is the same as in pre-copy: who has the guest is decided by the same commit. Behind it comes
//! more: the destination's guest depends on the source until it is whole, and neither a daemon nor the link may be the
//! end of it.

use super::cell::Moment::{Committed, Moved, Running, Sent, Stopped};
use super::cell::{Cell, FAULTS, Fault, Moment, Step, Way};
use crate::real::Side::{self, A, B};

/// Mbit/s of the link: 32 MiB are on their way for two to three seconds.
pub(super) const LINK_MBIT: u32 = 100;

const fn step(side: Side, name: &'static str, moment: Moment) -> Step {
    Step {
        side,
        name,
        nth: 1,
        way: Way::First,
        moment,
    }
}

/// All steps, in the order in which a migration comes to them.
pub const POSTCOPY_STEPS: [Step; 42] = [
    // The guest stops, its memory is opened, and what will lack is said.
    step(A, "StopGuest", Running),
    step(A, "OpenReads", Stopped),
    step(A, "Send(Lacking)", Stopped),
    step(A, "Send(LackingEnd)", Stopped),
    // Device state, with the source's records beside it.
    step(A, "DeviceStateSaved", Stopped),
    step(A, "Journal(Serving)", Stopped),
    step(A, "Journaled(Serving)", Stopped),
    step(A, "Journal(CommitIntent)", Stopped),
    // Meanwhile page faults are made to wait, and only then QEMU loads.
    step(B, "Message(Lacking)", Stopped),
    step(B, "Message(LackingEnd)", Stopped),
    step(B, "Arm", Stopped),
    step(B, "Armed", Stopped),
    step(B, "Journal(Armed)", Stopped),
    step(B, "Journaled(Armed)", Stopped),
    step(B, "LoadDeviceState", Stopped),
    step(B, "DeviceStateLoaded", Stopped),
    // Commit sent and received.
    step(A, "Journaled(CommitIntent)", Sent),
    step(A, "Message(Loaded)", Sent),
    step(A, "Send(Commit)", Sent),
    step(B, "Message(Commit)", Sent),
    step(B, "Journal(Committed)", Sent),
    step(B, "Journaled(Committed)", Committed),
    step(B, "RunGuest", Committed),
    // Running sent and received: from here on the memory is served.
    step(B, "GuestRunning", Moved),
    step(B, "Send(Running)", Moved),
    step(B, "Journal(Running)", Moved),
    step(B, "Journaled(Running)", Moved),
    step(A, "Message(Running)", Moved),
    step(A, "Journal(GuestMoved)", Moved),
    step(A, "Journaled(GuestMoved)", Moved),
    step(A, "Message(Lacks)", Moved),
    // Nothing lacks any more.
    step(B, "Whole", Moved),
    step(B, "Journal(Whole)", Moved),
    step(B, "Journaled(Whole)", Moved),
    step(B, "Send(Whole)", Moved),
    step(A, "Message(Whole)", Moved),
    step(A, "Journal(Released)", Moved),
    step(A, "Journaled(Released)", Moved),
    step(A, "Send(Closed)", Moved),
    step(A, "Detach", Moved),
    step(B, "Message(Closed)", Moved),
    step(B, "Journal(Closed)", Moved),
];

/// All faults but a full disk or memory, which are left to pre-copy's matrix: its small disk is cut to that one's records.
fn faults() -> impl Iterator<Item = Fault> {
    FAULTS
        .into_iter()
        .filter(|fault| !matches!(fault, Fault::MemoryFull | Fault::DiskFull))
}

/// Every fault at every step.
pub fn postcopy_cells() -> Vec<Cell> {
    POSTCOPY_STEPS
        .into_iter()
        .flat_map(|step| faults().map(move |fault| Cell { step, fault }))
        .collect()
}
