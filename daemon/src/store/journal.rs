//! The journals: one append-only file a migration and side, each record synced before it is acted upon.
//!
//! What a record looks like and what records add up to is the engine's
//! ([`pagecopy::engine::journal`]); here is only how they get to the disk and back.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::SystemTime;

use pagecopy::engine::MigrationId;
use pagecopy::engine::journal::{
    Outcome, Record, Side, decode, encode, has_to_tell, is_settled, outcome,
};
use uuid::Uuid;

use super::files::Folder;
use crate::qemu::settings::Settings;

/// How many journals of ended migrations are kept.
const KEPT: usize = 100;

/// The directory of the journals.
#[derive(Clone, Debug)]
pub struct Journals {
    folder: Arc<Folder>,
}

/// A journal that is being written.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    records: Vec<Record>,
    /// Bytes of those records.
    whole: u64,
    /// A write failed, and what the disk holds of it is not known.
    damaged: bool,
}

impl JournalFile {
    /// What it says so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Adds a record and waits until the disk has it.
    ///
    /// # Errors
    /// The disk refused. The record may be there all the same, whole or in part, and is taken off before the next is added:
    /// a disk that was full for a moment does not make the journal useless.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        if self.damaged {
            self.file.set_len(self.whole)?;
            self.file.sync_all()?;
        }
        self.damaged = true;
        let line = encode(record);
        self.file.write_all(&line)?;
        self.file.sync_data()?;
        self.damaged = false;
        self.whole += line.len() as u64;
        self.records.push(record.clone());
        Ok(())
    }
}

impl Journals {
    /// In `folder`.
    pub(crate) fn open(folder: Folder) -> Journals {
        Journals {
            folder: Arc::new(folder),
        }
    }

    /// Begins a journal with its first record.
    ///
    /// # Errors
    /// The disk refused, or there is one already.
    pub fn create(&self, id: MigrationId, side: Side, begun: &Record) -> io::Result<JournalFile> {
        let name = name(id, side);
        let file = self.folder.create_new(&name)?;
        let mut journal = JournalFile {
            file,
            records: Vec::new(),
            whole: 0,
            damaged: false,
        };
        if let Err(error) = journal.append(begun).and_then(|()| self.folder.sync()) {
            // What was never begun has no journal. Should the file stay all the same, it says nothing that counts.
            let _ = self.folder.remove(&name);
            return Err(error);
        }
        Ok(journal)
    }

    /// Opens a journal to go on with it. A torn last line is cut off.
    ///
    /// # Errors
    /// There is none, it is damaged, or the disk refuses.
    pub fn reopen(&self, id: MigrationId, side: Side) -> io::Result<JournalFile> {
        let name = name(id, side);
        let bytes = self.folder.read(&name)?.ok_or(io::ErrorKind::NotFound)?;
        let decoded = decode(&bytes).map_err(io::Error::other)?;
        let file = self.folder.append(&name)?;
        file.set_len(decoded.whole_bytes as u64)?;
        Ok(JournalFile {
            file,
            records: decoded.records,
            whole: decoded.whole_bytes as u64,
            damaged: false,
        })
    }

    /// The records of a journal, or `None` when there is no such journal.
    ///
    /// # Errors
    /// It is damaged, or cannot be read: nothing may be decided from it.
    pub fn read(&self, id: MigrationId, side: Side) -> io::Result<Option<Vec<Record>>> {
        match self.folder.read(&name(id, side))? {
            Some(bytes) => Ok(Some(decode(&bytes).map_err(io::Error::other)?.records)),
            None => Ok(None),
        }
    }

    /// Every journal there is, the latest written last.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<(MigrationId, Side)>> {
        let mut found: Vec<(SystemTime, MigrationId, Side)> = Vec::new();
        for (name, modified) in self.folder.list()? {
            if let Some((id, side)) = parse_name(&name) {
                found.push((modified, id, side));
            }
        }
        found.sort_by_key(|(modified, id, _)| (*modified, *id));
        Ok(found.into_iter().map(|(_, id, side)| (id, side)).collect())
    }

    /// Removes the oldest journals of ended migrations; the latest hundred stay.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub fn prune(&self) -> io::Result<()> {
        self.prune_to(KEPT)
    }

    fn prune_to(&self, keep: usize) -> io::Result<()> {
        let mut ended = Vec::new();
        for (id, side) in self.list()? {
            if matches!(self.read(id, side), Ok(Some(records)) if has_ended(side, &records)) {
                ended.push((id, side));
            }
        }
        for (id, side) in ended.iter().take(ended.len().saturating_sub(keep)) {
            self.folder.remove(&name(*id, *side))?;
        }
        Ok(())
    }

    /// Keeps what QEMU had set before the migration `id`, so that a restarted daemon can put it back.
    ///
    /// # Errors
    /// The disk refused.
    pub fn keep_settings(&self, id: MigrationId, settings: &Settings) -> io::Result<()> {
        self.folder.write_json(&settings_name(id), settings)
    }

    /// What QEMU had set before the migration `id`, if it was not put back yet.
    pub fn settings(&self, id: MigrationId) -> Option<Settings> {
        self.folder.read_json(&settings_name(id)).ok().flatten()
    }

    /// Makes the file in which a post-copy keeps what it has received.
    ///
    /// # Errors
    /// The disk refused.
    pub(crate) fn create_received(&self, id: MigrationId) -> io::Result<File> {
        self.folder.create_to_map(&received_name(id))
    }

    /// The file in which a post-copy keeps what it has received.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn received(&self, id: MigrationId) -> io::Result<File> {
        self.folder.open_to_map(&received_name(id))
    }

    /// The post-copy is over.
    pub(crate) fn forget_received(&self, id: MigrationId) {
        // There is one only where there was a post-copy.
        let _ = self.folder.remove(&received_name(id));
    }

    /// The settings were put back, or QEMU is gone.
    pub fn forget_settings(&self, id: MigrationId) {
        // It may never have been written.
        let _ = self.folder.remove(&settings_name(id));
    }
}

/// The name of a journal. An id is 16 bytes, whoever chose them, so this is 36 hexadecimal digits and hyphens and a word.
fn name(id: MigrationId, side: Side) -> String {
    format!("{}.{}", Uuid::from_bytes(id.0), side.word())
}

fn settings_name(id: MigrationId) -> String {
    format!("{}.settings", Uuid::from_bytes(id.0))
}

fn received_name(id: MigrationId) -> String {
    format!("{}.received", Uuid::from_bytes(id.0))
}

/// Whether nothing will ever be asked of a journal again.
fn has_ended(side: Side, records: &[Record]) -> bool {
    match side {
        Side::Source => is_settled(records) && !has_to_tell(records),
        Side::Destination => {
            outcome(records) == Outcome::NotHere || matches!(records.last(), Some(Record::Closed))
        }
    }
}

fn parse_name(name: &str) -> Option<(MigrationId, Side)> {
    let (id, side) = name.split_once('.')?;
    let side = [Side::Source, Side::Destination]
        .into_iter()
        .find(|known| known.word() == side)?;
    Some((MigrationId(*Uuid::parse_str(id).ok()?.as_bytes()), side))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::{self, OpenOptions};
    use std::path::Path;

    use super::super::test_dir;
    use super::*;

    fn begun(id: MigrationId, side: Side) -> Record {
        Record::Begun {
            id,
            side,
            vm: "web".into(),
            qmp: "/run/qmp".into(),
            peer: "192.0.2.1:7070".into(),
            names: Vec::new(),
        }
    }

    fn journals_in(dir: &Path) -> Journals {
        Journals::open(Folder::open(dir).unwrap())
    }

    #[test]
    fn a_journal_survives_a_restart_and_a_torn_line() {
        let dir = test_dir("journal");
        let id = MigrationId([9; 16]);
        let journals = journals_in(&dir);
        let first = begun(id, Side::Source);
        let mut journal = journals.create(id, Side::Source, &first).unwrap();
        journal.append(&Record::CommitIntent).unwrap();
        drop(journal);
        assert!(
            journals.create(id, Side::Source, &first).is_err(),
            "a journal is never begun anew"
        );

        let path = dir.join(name(id, Side::Source));
        let mut torn = encode(&Record::GuestMoved);
        torn.truncate(torn.len() - 3);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(&torn)
            .unwrap();
        assert_eq!(
            journals.read(id, Side::Source).unwrap().unwrap(),
            [first.clone(), Record::CommitIntent]
        );

        let mut journal = journals.reopen(id, Side::Source).unwrap();
        journal.append(&Record::RolledBack).unwrap();
        let records = journals.read(id, Side::Source).unwrap().unwrap();
        assert_eq!(records, [first, Record::CommitIntent, Record::RolledBack]);
        assert_eq!(journals.read(id, Side::Destination).unwrap(), None);
        assert_eq!(journals.list().unwrap(), [(id, Side::Source)]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_record_that_was_refused_is_taken_off_before_the_next() {
        let dir = test_dir("refused");
        let id = MigrationId([4; 16]);
        let journals = journals_in(&dir);
        let first = begun(id, Side::Source);
        let mut journal = journals.create(id, Side::Source, &first).unwrap();
        let path = dir.join(name(id, Side::Source));
        let sound = std::mem::replace(&mut journal.file, File::open(&path).unwrap());
        assert!(journal.append(&Record::CommitIntent).is_err());
        assert!(journal.append(&Record::RolledBack).is_err());
        // The disk kept part of what it refused.
        (&sound)
            .write_all(&encode(&Record::CommitIntent)[..9])
            .unwrap();
        journal.file = sound;
        journal.append(&Record::RolledBack).unwrap();
        let records = journals.read(id, Side::Source).unwrap().unwrap();
        assert_eq!(records, [first, Record::RolledBack]);
        assert_eq!(records, journal.records());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_damaged_journal_decides_nothing() {
        let dir = test_dir("damaged");
        let id = MigrationId([3; 16]);
        let journals = journals_in(&dir);
        drop(
            journals
                .create(id, Side::Destination, &begun(id, Side::Destination))
                .unwrap(),
        );
        let path = dir.join(name(id, Side::Destination));
        let mut bytes = fs::read(&path).unwrap();
        bytes[12] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(journals.read(id, Side::Destination).is_err());
        assert!(journals.reopen(id, Side::Destination).is_err());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_ended_journals_are_pruned() {
        let dir = test_dir("prune");
        let journals = journals_in(&dir);
        let ids: Vec<MigrationId> = (0..6).map(|n| MigrationId([n; 16])).collect();
        for id in &ids {
            let mut journal = journals
                .create(*id, Side::Source, &begun(*id, Side::Source))
                .unwrap();
            if id.0[0] != 0 {
                journal.append(&Record::RolledBack).unwrap();
            }
        }
        journals.prune_to(2).unwrap();
        let left = journals.list().unwrap();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(
            left.contains(&(ids[0], Side::Source)),
            "an open journal was removed"
        );
        fs::remove_dir_all(dir).unwrap();
    }
}
