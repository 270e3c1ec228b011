//! The migrations that wait for their turn, kept over restarts. One is on the disk from before its request is answered until
//! its journal has begun.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::Folder;
use crate::api::types::MigrationRequest;

/// The file.
const NAME: &str = "pending.json";

/// A migration that waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    /// The migration.
    pub(crate) id: Uuid,
    /// What was asked for.
    pub(crate) request: MigrationRequest,
}

/// All that wait, in the order in which they came.
#[derive(Debug)]
pub struct Pending {
    folder: Arc<Folder>,
    list: Mutex<Vec<Waiting>>,
}

impl Pending {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is none of ours.
    pub(crate) fn open(folder: Arc<Folder>) -> io::Result<Pending> {
        let list = folder.read_json(NAME)?.unwrap_or_default();
        Ok(Pending {
            folder,
            list: Mutex::new(list),
        })
    }

    /// All of them.
    pub(crate) fn list(&self) -> Vec<Waiting> {
        self.lock().clone()
    }

    /// One more, behind the others; it takes the place of an earlier self.
    ///
    /// # Errors
    /// The disk refused; nothing has changed.
    pub(crate) fn insert(&self, waiting: Waiting) -> io::Result<()> {
        self.change(|list| {
            match list.iter_mut().find(|one| one.id == waiting.id) {
                Some(one) => *one = waiting,
                None => list.push(waiting),
            }
            true
        })
    }

    /// It does not wait any more, if it did.
    ///
    /// # Errors
    /// The disk refused; nothing has changed.
    pub(crate) fn remove(&self, id: Uuid) -> io::Result<()> {
        self.change(|list| {
            let before = list.len();
            list.retain(|one| one.id != id);
            list.len() != before
        })
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Waiting>) -> bool) -> io::Result<()> {
        let mut list = self.lock();
        let mut new = list.clone();
        if change(&mut new) {
            self.folder.write_json(NAME, &new)?;
            *list = new;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::test_dir;
    use super::*;

    fn waiting(n: u128, vm: &str) -> Waiting {
        let request = format!(r#"{{"vm":"{vm}","qmp":"/q","to":"b:1","priority":{n}}}"#);
        Waiting {
            id: Uuid::from_u128(n),
            request: serde_json::from_str(&request).unwrap(),
        }
    }

    #[test]
    fn they_survive_a_restart_in_their_order() {
        let dir = test_dir("pending");
        let folder = Arc::new(Folder::open(&dir).unwrap());
        let pending = Pending::open(Arc::clone(&folder)).unwrap();
        for (n, vm) in [(9, "a"), (1, "b"), (5, "c")] {
            pending.insert(waiting(n, vm)).unwrap();
        }
        pending.remove(Uuid::from_u128(1)).unwrap();
        pending.remove(Uuid::from_u128(1)).unwrap();
        pending.insert(waiting(9, "changed")).unwrap();
        let again = Pending::open(Arc::clone(&folder)).unwrap();
        assert_eq!(again.list(), [waiting(9, "changed"), waiting(5, "c")]);
        std::fs::write(dir.join(NAME), "[{").unwrap();
        assert!(
            Pending::open(folder).is_err(),
            "nothing is forgotten in silence"
        );
        std::fs::remove_dir_all(dir).unwrap();
    }
}
