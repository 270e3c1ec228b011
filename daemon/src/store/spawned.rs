//! The QEMUs that this daemon has had started for guests that come, each written down before it is started.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use pagecopy::engine::MigrationId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::Folder;

/// The name of the folder.
pub(super) const NAME: &str = "spawned";

/// A QEMU that was, or was to be, started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpawnedQemu {
    /// The migration that it is for.
    pub id: Uuid,
    /// The guest's name.
    pub vm: String,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// What it prints.
    pub log: PathBuf,
    /// Its guest is here, and nowhere else: it is never ended, whatever becomes of the journal.
    pub arrived: bool,
}

/// All of them.
#[derive(Debug)]
pub struct SpawnedQemus {
    folder: Folder,
    path: PathBuf,
}

impl SpawnedQemus {
    pub(super) fn open(folder: Folder, state_dir: &Path) -> SpawnedQemus {
        let state_dir = std::path::absolute(state_dir).unwrap_or_else(|_| state_dir.to_owned());
        SpawnedQemus {
            folder,
            path: state_dir.join(NAME),
        }
    }

    /// Writes down that a QEMU is to be started, and makes its log.
    ///
    /// # Errors
    /// The disk refused, or there was one for this migration.
    pub(crate) fn begin(&self, id: MigrationId, vm: &str) -> io::Result<(SpawnedQemu, File)> {
        let id = Uuid::from_bytes(id.0);
        let spawned = SpawnedQemu {
            id,
            vm: vm.to_owned(),
            qmp: self.path.join(format!("{id}.qmp")),
            log: self.path.join(format!("{id}.log")),
            arrived: false,
        };
        let log = self.folder.create_new(&format!("{id}.log"))?;
        self.folder.write_json(&record_name(id), &spawned)?;
        Ok((spawned, log))
    }

    /// Writes down that the guest has come.
    ///
    /// # Errors
    /// The disk refused.
    pub(crate) fn arrived(&self, spawned: &SpawnedQemu) -> io::Result<()> {
        let arrived = SpawnedQemu {
            arrived: true,
            ..spawned.clone()
        };
        self.folder.write_json(&record_name(spawned.id), &arrived)
    }

    /// The one that was started for a migration, if there is one.
    ///
    /// # Errors
    /// What was written down cannot be read.
    pub(crate) fn get(&self, id: MigrationId) -> io::Result<Option<SpawnedQemu>> {
        self.folder.read_json(&record_name(Uuid::from_bytes(id.0)))
    }

    /// The migrations that one was started for.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn list(&self) -> io::Result<Vec<MigrationId>> {
        let names = self.folder.list()?.into_iter();
        let ids = names.filter_map(|(name, _)| {
            let id = name.strip_suffix(".json")?;
            Some(MigrationId(*Uuid::parse_str(id).ok()?.as_bytes()))
        });
        Ok(ids.collect())
    }

    /// It has ended: removes its socket and its log, and then that it was.
    pub(crate) fn forget(&self, id: MigrationId) {
        let id = Uuid::from_bytes(id.0);
        for name in [format!("{id}.qmp"), format!("{id}.log"), record_name(id)] {
            match self.folder.remove(&name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%id, name, %error, "a file of a QEMU that has ended is left");
                }
                _ => {}
            }
        }
    }
}

fn record_name(id: Uuid) -> String {
    format!("{id}.json")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::test_dir;
    use super::*;

    #[test]
    fn what_was_to_be_started_is_known_after_a_restart_and_forgotten_whole() {
        let dir = test_dir("spawned");
        let open = || {
            let folder = Folder::open(&dir).unwrap().folder(NAME).unwrap();
            SpawnedQemus::open(folder, &dir)
        };
        let id = MigrationId([7; 16]);
        let (spawned, _log) = open().begin(id, "../web\u{e4}").unwrap();
        assert_eq!(open().get(id).unwrap(), Some(spawned.clone()));
        open().arrived(&spawned).unwrap();
        assert!(open().get(id).unwrap().unwrap().arrived);
        assert_eq!(open().list().unwrap(), [id]);
        assert!(spawned.log.starts_with(dir.join(NAME)));
        assert!(open().begin(id, "web").is_err(), "one for each migration");
        std::fs::write(&spawned.qmp, "").unwrap();
        open().forget(id);
        assert_eq!(std::fs::read_dir(dir.join(NAME)).unwrap().count(), 0);
        open().forget(id);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
