//! What outlives the daemon: everything under `state-dir`.
//!
//! ```text
//! state-dir/lock                       held while a daemon runs on it
//! state-dir/journal/UUID.source        the decisions of one migration, see pagecopy::engine::journal
//! state-dir/journal/UUID.destination
//! state-dir/journal/UUID.settings      what QEMU had set before a migration that is under way here
//! state-dir/receivers.json             which QEMU waits for which guest
//! state-dir/spawned/UUID.{json,qmp,log}  a QEMU that was started for a guest: that it is to be, its monitor, what it prints
//! state-dir/pending.json             the migrations that wait for their turn
//! state-dir/fixed-downtime.json        the part of the downtime that does not depend on bytes, as last measured
//! ```

mod downtime;
mod files;
mod journal;
mod keys;
mod pending;
mod receivers;
mod spawned;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

pub use downtime::FixedDowntime;
pub use journal::{JournalFile, Journals};
pub use keys::{Keys, Once};
pub use pending::Pending;
pub(crate) use pending::Waiting;
pub use receivers::{Receiver, Receivers};
pub use spawned::{SpawnedQemu, SpawnedQemus};

use crate::failure::{Failure, host, operator};
use files::Folder;

/// The state directory, held by this daemon alone.
#[derive(Debug)]
pub struct Store {
    /// The journals.
    pub journals: Journals,
    /// The waiting QEMUs.
    pub receivers: Receivers,
    /// The idempotency keys.
    pub keys: Keys,
    /// The migrations that wait for their turn.
    pub pending: Pending,
    /// The measured downtime.
    pub downtime: FixedDowntime,
    /// The QEMUs that were started for guests.
    pub spawned: SpawnedQemus,
    /// Holds the lock.
    _lock: File,
}

impl Store {
    /// Opens (and makes) `dir`.
    ///
    /// # Errors
    /// The directory cannot be used, or another daemon uses it.
    pub fn open(dir: &Path) -> Result<Store, Failure> {
        let cannot = |what: &str, error: &dyn std::fmt::Display| {
            host(
                format!("state-dir {}: {what}: {error}", dir.display()),
                "give a directory that belongs to the user that pagecopyd runs as, on a disk that is not full",
            )
        };
        let folder = Folder::open(dir).map_err(|error| cannot("cannot be used", &error))?;
        let lock = folder
            .create("lock")
            .map_err(|error| cannot("cannot be written", &error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| {
                operator(
                    format!("another pagecopyd runs on state-dir {}", dir.display()),
                    "end it, or give this one a state-dir of its own",
                )
            },
        )?;
        let journal = folder
            .folder("journal")
            .map_err(|error| cannot("journal", &error))?;
        let spawned = folder
            .folder(spawned::NAME)
            .map_err(|error| cannot(spawned::NAME, &error))?;
        let folder = Arc::new(folder);
        Ok(Store {
            spawned: SpawnedQemus::open(spawned, dir),
            journals: Journals::open(journal),
            receivers: Receivers::open(Arc::clone(&folder))
                .map_err(|error| cannot("receivers.json", &error))?,
            keys: Keys::open(Arc::clone(&folder)).map_err(|error| cannot("keys.json", &error))?,
            pending: Pending::open(Arc::clone(&folder)).map_err(|error| {
                cannot(
                    "pending.json (without that file the migrations that waited are forgotten)",
                    &error,
                )
            })?,
            downtime: FixedDowntime::open(folder),
            _lock: lock,
        })
    }
}

#[cfg(test)]
pub(crate) fn test_dir(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("pagecopy-test-{name}-{}", uuid::Uuid::new_v4()));
    #[allow(clippy::unwrap_used)] // A test without its directory cannot go on.
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_daemon_a_directory() {
        let dir = test_dir("lock");
        let first = Store::open(&dir).unwrap();
        let second = Store::open(&dir).unwrap_err();
        assert!(second.what.contains("another pagecopyd"), "{second:?}");
        drop(first);
        Store::open(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
