//! The journals: one append-only file a migration and side, each record synced before it is acted upon.
//!
//! What a record looks like and what records add up to is the engine's
//! ([`pagecopy::engine::journal`]); here is only how they get to the disk and back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use pagecopy::engine::MigrationId;
use pagecopy::engine::journal::{
    Outcome, Record, Side, decode, encode, has_to_tell, is_settled, outcome,
};
use uuid::Uuid;

use super::files::{read_json, sync_parent, write_json};
use crate::qemu::settings::Settings;

/// How many journals of ended migrations are kept.
const KEPT: usize = 100;

/// The directory of the journals.
#[derive(Clone, Debug)]
pub struct Journals {
    dir: PathBuf,
}

/// A journal that is being written.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    records: Vec<Record>,
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
    /// The disk refused. Part of the record may be there; the journal takes nothing more.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        if self.damaged {
            return Err(io::Error::other("an earlier record could not be written"));
        }
        self.damaged = true;
        self.file.write_all(&encode(record))?;
        self.file.sync_data()?;
        self.damaged = false;
        self.records.push(record.clone());
        Ok(())
    }
}

impl Journals {
    /// Opens (and makes) the directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(dir: &Path) -> io::Result<Journals> {
        fs::create_dir_all(dir)?;
        sync_parent(dir)?;
        Ok(Journals {
            dir: dir.to_owned(),
        })
    }

    /// Begins a journal with its first record.
    ///
    /// # Errors
    /// The disk refused, or there is one already.
    pub fn create(&self, id: MigrationId, side: Side, begun: &Record) -> io::Result<JournalFile> {
        let path = self.path(id, side);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)?;
        let mut journal = JournalFile {
            file,
            records: Vec::new(),
            damaged: false,
        };
        journal.append(begun)?;
        sync_parent(&path)?;
        Ok(journal)
    }

    /// Opens a journal to go on with it. A torn last line is cut off.
    ///
    /// # Errors
    /// There is none, it is damaged, or the disk refuses.
    pub fn reopen(&self, id: MigrationId, side: Side) -> io::Result<JournalFile> {
        let path = self.path(id, side);
        let decoded = decode(&fs::read(&path)?).map_err(io::Error::other)?;
        let file = OpenOptions::new().append(true).open(&path)?;
        file.set_len(decoded.whole_bytes as u64)?;
        Ok(JournalFile {
            file,
            records: decoded.records,
            damaged: false,
        })
    }

    /// The records of a journal, or `None` when there is no such journal.
    ///
    /// # Errors
    /// It is damaged, or cannot be read: nothing may be decided from it.
    pub fn read(&self, id: MigrationId, side: Side) -> io::Result<Option<Vec<Record>>> {
        match fs::read(self.path(id, side)) {
            Ok(bytes) => Ok(Some(decode(&bytes).map_err(io::Error::other)?.records)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every journal there is, the latest written last.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<(MigrationId, Side)>> {
        let mut found: Vec<(SystemTime, MigrationId, Side)> = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if let Some((id, side)) = entry.file_name().to_str().and_then(parse_name) {
                found.push((entry.metadata()?.modified()?, id, side));
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
            fs::remove_file(self.path(*id, *side))?;
        }
        Ok(())
    }

    /// Keeps what QEMU had set before the migration `id`, so that a restarted daemon can put it back.
    ///
    /// # Errors
    /// The disk refused.
    pub fn keep_settings(&self, id: MigrationId, settings: &Settings) -> io::Result<()> {
        write_json(&self.settings_path(id), settings)
    }

    /// What QEMU had set before the migration `id`, if it was not put back yet.
    pub fn settings(&self, id: MigrationId) -> Option<Settings> {
        read_json(&self.settings_path(id)).ok().flatten()
    }

    /// The settings were put back, or QEMU is gone.
    pub fn forget_settings(&self, id: MigrationId) {
        // It may never have been written.
        let _ = fs::remove_file(self.settings_path(id));
    }

    fn path(&self, id: MigrationId, side: Side) -> PathBuf {
        self.dir
            .join(format!("{}.{}", Uuid::from_bytes(id.0), side_name(side)))
    }

    fn settings_path(&self, id: MigrationId) -> PathBuf {
        self.dir
            .join(format!("{}.settings", Uuid::from_bytes(id.0)))
    }
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

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

fn parse_name(name: &str) -> Option<(MigrationId, Side)> {
    let (id, side) = name.split_once('.')?;
    let side = [Side::Source, Side::Destination]
        .into_iter()
        .find(|known| side_name(*known) == side)?;
    Some((MigrationId(*Uuid::parse_str(id).ok()?.as_bytes()), side))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::test_dir;
    use super::*;

    fn begun(id: MigrationId, side: Side) -> Record {
        Record::Begun {
            id,
            side,
            vm: "web".into(),
            qmp: "/run/qmp".into(),
            peer: "192.0.2.1:7070".into(),
        }
    }

    #[test]
    fn a_journal_survives_a_restart_and_a_torn_line() {
        let dir = test_dir("journal");
        let id = MigrationId([9; 16]);
        let journals = Journals::open(&dir).unwrap();
        let first = begun(id, Side::Source);
        let mut journal = journals.create(id, Side::Source, &first).unwrap();
        journal.append(&Record::CommitIntent).unwrap();
        drop(journal);
        assert!(
            journals.create(id, Side::Source, &first).is_err(),
            "a journal is never begun anew"
        );

        let path = journals.path(id, Side::Source);
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
    fn a_damaged_journal_decides_nothing() {
        let dir = test_dir("damaged");
        let id = MigrationId([3; 16]);
        let journals = Journals::open(&dir).unwrap();
        drop(
            journals
                .create(id, Side::Destination, &begun(id, Side::Destination))
                .unwrap(),
        );
        let path = journals.path(id, Side::Destination);
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
        let journals = Journals::open(&dir).unwrap();
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
