//! What a journal says: the decisions of the commit protocol, written before they are acted on.
//!
//! A journal is one file a migration, one record a line, each line with its own checksum; a torn last line does not
//! count. [`encode`] and [`decode`] are the whole format; the daemon appends and syncs, the simulation keeps bytes.

use serde::{Deserialize, Serialize};

use super::MigrationId;

/// Which side a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The guest leaves here.
    Source,
    /// The guest arrives here.
    Destination,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// First line of every journal: what is needed to take the migration up again after a crash.
    Begun {
        /// The migration.
        id: MigrationId,
        /// The side that writes.
        side: Side,
        /// The guest's name.
        vm: String,
        /// QMP socket of this side's QEMU.
        qmp: String,
        /// The peer's address (source: where to reconnect; destination: for people).
        peer: String,
    },
    /// Source: from here on `Commit` may have been sent. After a crash the guest is not resumed before the destination
    /// was asked.
    CommitIntent,
    /// Source: the destination runs the guest (it said so, or the operator did).
    GuestMoved,
    /// Source: the guest runs here; no `Commit` is valid any more.
    RolledBack,
    /// Destination: `Commit` was received; the guest will run here.
    Committed,
    /// Destination: the guest runs here.
    Running,
    /// Destination: given up before `Commit`; a `Commit` that still arrives is refused.
    Aborted,
    /// Destination: the source has recorded that the guest moved. Nobody will ask again.
    Closed,
}

/// What a journal's records add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has not committed and never will.
    NotHere,
    /// The guest is committed to the destination (running, or about to be run).
    Here,
    /// Under way: no decision recorded.
    Open,
}
