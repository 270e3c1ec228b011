//! Mistakes that can be planted in the simulated world, to show that the checker finds them.

/// A classic mistake of live migration. It is made by a driver or by the world, never by the engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// A page's dirty bit is cleared after its bytes were read: a write in between is forgotten.
    ClearAfterRead,
    /// A barrier is reported at once, before the batches ahead of it have landed.
    EarlyBarrier,
    /// A zero run is placed some time after it came, over what came since.
    LateZero,
    /// Disk I/O is said to be drained while it is in flight, also when the guest is stopped.
    NoDrain,
    /// The engine is not told that the guest's disks write into pinned pages, so that it does not let pages age.
    NoAgeing,
    /// The destination's `Committed` is not written, though it is said to be.
    NoCommittedRecord,
    /// One page in a few hundred is not sent.
    DroppedPage,
    /// A write of before lands while the device state is loaded.
    LateWrite,
    /// The source forgets its journal: a daemon that is started anew resumes the guest without asking.
    NoCommitIntentRecord,
    /// The destination does not clear the RAM that it is given.
    NoClear,
    /// That something was taken out of the RAM is not noticed: the list of holes at the end is that of before.
    OldHoles,
    /// The source takes the guest back when the connection breaks after `Commit`.
    ResumeAfterCommit,
    /// The destination runs the guest as soon as its devices are loaded.
    RunBeforeCommit,
    /// The source sends `Commit`, and writes `CommitIntent` after that.
    LateCommitIntentRecord,
    /// The destination runs the guest, and writes `Committed` after that.
    LateCommittedRecord,
    /// The destination says `Running` when it begins to run the guest.
    EarlyRunning,
    /// A batch is said to be sent when it is begun.
    EarlyPushed,
    /// The engines' timers are lost.
    LostTimer,
    /// A fetched page is mapped, and marked as received after that.
    MarkAfterMap,
    /// The destination's daemon, started again, does not look at what was received.
    ForgotReceived,
    /// QEMU loads, and page faults are made to wait after that.
    LateArm,
    /// Page faults do not wait any more when the destination's daemon dies.
    ReleaseOnDrop,
    /// The source answers reads from a copy that it has made before the guest was stopped.
    ServeOldCopy,
    /// The source does not say of one page that it lacks.
    ForgotLacking,
    /// The source lets go of the guest's memory as soon as the guest runs at the destination.
    DetachWhenMoved,
    /// The version of a page that was kept is not dropped when the page goes straight from the guest's memory.
    StaleVersion,
    /// An encoded message is not sent, and its pages are kept as if it was.
    LostVersion,
    /// A guest all of whose memory has come is taken for one that lacks some, and is not run when the source has lost it.
    HeldWithoutNeed,
    /// The guest is slowed, and not let go of any more.
    ThrottledForGood,
    /// A guest that ended with its QEMU while the source was away is said to be whole when the source comes.
    ForgottenEnd,
    /// A bandwidth limit that the operator sets is not told to the engine.
    OldLimit,
}

impl Mistake {
    /// All of them.
    pub const ALL: [Mistake; 31] = [
        Mistake::ClearAfterRead,
        Mistake::EarlyBarrier,
        Mistake::LateZero,
        Mistake::NoDrain,
        Mistake::NoAgeing,
        Mistake::NoCommittedRecord,
        Mistake::DroppedPage,
        Mistake::LateWrite,
        Mistake::NoCommitIntentRecord,
        Mistake::NoClear,
        Mistake::OldHoles,
        Mistake::ResumeAfterCommit,
        Mistake::RunBeforeCommit,
        Mistake::LateCommitIntentRecord,
        Mistake::LateCommittedRecord,
        Mistake::EarlyRunning,
        Mistake::EarlyPushed,
        Mistake::LostTimer,
        Mistake::MarkAfterMap,
        Mistake::ForgotReceived,
        Mistake::LateArm,
        Mistake::ReleaseOnDrop,
        Mistake::ServeOldCopy,
        Mistake::ForgotLacking,
        Mistake::DetachWhenMoved,
        Mistake::StaleVersion,
        Mistake::LostVersion,
        Mistake::HeldWithoutNeed,
        Mistake::ThrottledForGood,
        Mistake::ForgottenEnd,
        Mistake::OldLimit,
    ];
}
