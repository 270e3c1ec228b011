//! Which QEMU waits for which guest, kept over restarts.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::files::Folder;

/// The file.
const NAME: &str = "receivers.json";

/// A QEMU that waits for a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receiver {
    /// The guest's name.
    pub vm: String,
    /// QEMU's QMP socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
}

/// All waiting QEMUs, by the name of the guest.
#[derive(Debug)]
pub struct Receivers {
    folder: Arc<Folder>,
    map: Mutex<BTreeMap<String, Receiver>>,
}

impl Receivers {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is none of ours.
    pub(crate) fn open(folder: Arc<Folder>) -> io::Result<Receivers> {
        let list: Vec<Receiver> = folder.read_json(NAME)?.unwrap_or_default();
        let map = list
            .into_iter()
            .map(|receiver| (receiver.vm.clone(), receiver))
            .collect();
        Ok(Receivers {
            folder,
            map: Mutex::new(map),
        })
    }

    /// The one that waits for `vm`.
    pub fn get(&self, vm: &str) -> Option<Receiver> {
        self.lock().get(vm).cloned()
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Receiver> {
        self.lock().values().cloned().collect()
    }

    /// Adds one; replaces an earlier one for the same guest.
    ///
    /// # Errors
    /// The disk refused; nothing has changed.
    pub fn insert(&self, receiver: Receiver) -> io::Result<()> {
        let mut map = self.lock();
        let mut new = map.clone();
        new.insert(receiver.vm.clone(), receiver);
        self.write(&new)?;
        *map = new;
        Ok(())
    }

    /// Removes the one that waits for `vm`. Says whether there was one.
    ///
    /// # Errors
    /// The disk refused; nothing has changed.
    pub fn remove(&self, vm: &str) -> io::Result<bool> {
        let mut map = self.lock();
        let mut new = map.clone();
        let found = new.remove(vm).is_some();
        if found {
            self.write(&new)?;
            *map = new;
        }
        Ok(found)
    }

    fn write(&self, map: &BTreeMap<String, Receiver>) -> io::Result<()> {
        self.folder
            .write_json(NAME, &map.values().collect::<Vec<_>>())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Receiver>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::test_dir;
    use super::*;

    #[test]
    fn receivers_survive_a_restart() {
        let dir = test_dir("receivers");
        let folder = Arc::new(Folder::open(&dir).unwrap());
        let receivers = Receivers::open(Arc::clone(&folder)).unwrap();
        let web = Receiver {
            vm: "web".into(),
            qmp: "/run/web.qmp".into(),
        };
        receivers.insert(web.clone()).unwrap();
        receivers
            .insert(Receiver {
                vm: "db".into(),
                qmp: "/run/db.qmp".into(),
            })
            .unwrap();
        assert!(receivers.remove("db").unwrap());
        assert!(!receivers.remove("db").unwrap());
        let again = Receivers::open(folder).unwrap();
        assert_eq!(again.get("web"), Some(web.clone()));
        assert_eq!(again.list(), [web]);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
