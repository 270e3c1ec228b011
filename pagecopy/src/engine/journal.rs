//! What a journal says: the decisions of the commit protocol, written before they are acted on.
//!
//! A journal is one file a migration, one record a line, each line with its own checksum: eight hex digits of CRC-32C, a
//! space, the record as JSON, a newline. A torn last line does not count. [`encode`] and [`decode`] are the whole format;
//! the daemon appends and syncs, the simulation keeps bytes. [`outcome`] and [`standing_for`] say what records mean.

use serde::{Deserialize, Serialize};

use super::event::Switch;
use super::{Failure, MigrationId};
use crate::memory::BlockSpec;
use crate::wire::Standing;

/// Which side a journal belongs to.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The guest leaves here.
    Source,
    /// The guest arrives here.
    Destination,
}

impl Side {
    /// The side in one word, as the API and the names of journals spell it.
    pub fn word(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// A RAM file, to be found again by a daemon that is started anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamFile {
    /// Its path on this host.
    pub path: String,
    /// The file system's number.
    pub device: u64,
    /// The file's number in it: another file under that path is not the guest's.
    pub inode: u64,
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
        /// The names by which the peer was let in: whoever speaks for it later has one of them. None without TLS.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        names: Vec<String>,
    },
    /// Source: from here on `Commit` may have been sent. After a crash the guest is not resumed before the destination
    /// was asked.
    CommitIntent,
    /// Source, before `CommitIntent` of a post-copy: the guest will depend on this memory until `Released`.
    Serving {
        /// RAMBlocks, in the order that numbers them.
        blocks: Vec<BlockSpec>,
        /// Their files, in the same order.
        ram: Vec<RamFile>,
        /// What it began with; daemons before this one did not write it.
        #[serde(default)]
        switched: Option<Switch>,
    },
    /// Source: the destination runs the guest (it said so, or the operator did).
    GuestMoved,
    /// Source, behind `GuestMoved` of a post-copy: the guest depends on nothing here any more.
    Released {
        /// Why it does not run at the destination, whole: it has ended there, or its operator let go of the memory here.
        /// Daemons before this one did not write it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
    },
    /// Source: the guest runs here; no `Commit` is valid any more.
    RolledBack,
    /// Source: the operator has taken the guest back and given the word that the destination is fenced. `RolledBack`
    /// follows when it runs; a destination that comes back after all is told by `Withdrawn`.
    TakenBack,
    /// Source, behind `TakenBack`: the destination has been told.
    Told,
    /// Destination: `Commit` was received; the guest will run here.
    Committed,
    /// Destination, before QEMU loads the guest of a post-copy: its page faults wait for us.
    Armed {
        /// QEMU's process: one that waits for a page may not answer on its monitor.
        pid: i32,
        /// Numbers of the userfaultfds that stay open inside it.
        inside: Vec<i32>,
        /// The files of the RAMBlocks.
        ram: Vec<RamFile>,
        /// RAMBlocks, in the source's order.
        blocks: Vec<BlockSpec>,
        /// Bytes a second that are fetched while nobody waits for them; none is unlimited.
        #[serde(default)]
        background: Option<u64>,
        /// What it began with; daemons before this one did not write it.
        #[serde(default)]
        switched: Option<Switch>,
    },
    /// Destination: the guest runs here.
    Running,
    /// Destination, behind `Armed`: the guest needs nothing more of the source: its memory is here, or was given up, or the
    /// guest has ended.
    Whole {
        /// Why it has ended, with its QEMU, before all of its memory had come. Daemons before this one did not write it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
    },
    /// Destination: given up before `Commit`; a `Commit` that still arrives is refused.
    Aborted,
    /// Destination: the source has recorded that the guest moved. Nobody will ask again.
    Closed,
}

/// What a journal's records add up to: where the guest is, seen from the destination ("here" is the destination,
/// whichever side wrote the journal).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has not committed and never will: the guest belongs to the source.
    NotHere,
    /// The guest is committed to the destination (running, or about to be run).
    Here,
    /// No decision recorded. Source: `Commit` may have been sent; it must ask. Destination: it has not been committed.
    Open,
}

/// A journal that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// A line that ends is damaged: the disk's fault, or somebody edited it.
    #[error("line {line} of the journal is damaged: {why}")]
    Damaged {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The first record is not `Begun`, or `Begun` comes again.
    #[error("the journal does not begin, once, with what was begun")]
    NoBeginning,
}

/// What a journal holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// The records, in order.
    pub records: Vec<Record>,
    /// Bytes of whole lines. Cut the file to this length before anything is appended, or the torn rest of a line would
    /// damage the next.
    pub whole_bytes: usize,
}

/// The line of a record, newline included.
pub fn encode(record: &Record) -> Vec<u8> {
    // A record has no map and no float: its JSON cannot fail.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes())).into_bytes()
}

/// Reads a journal. A torn last line (one that does not end) is left out: what it says was never acted upon, because a
/// record is synced first.
///
/// # Errors
/// [`JournalError`]: an operator has to look; nothing may be decided from it.
pub fn decode(bytes: &[u8]) -> Result<Decoded, JournalError> {
    let mut decoded = Decoded::default();
    let mut lines = bytes
        .split_inclusive(|byte| *byte == b'\n')
        .enumerate()
        .peekable();
    while let Some((index, line)) = lines.next() {
        match decode_line(line) {
            Ok(record) => {
                if matches!(record, Record::Begun { .. }) != decoded.records.is_empty() {
                    return Err(JournalError::NoBeginning);
                }
                decoded.records.push(record);
                decoded.whole_bytes += line.len();
            }
            Err(_) if lines.peek().is_none() && !line.ends_with(b"\n") => break,
            Err(why) => {
                return Err(JournalError::Damaged {
                    line: index + 1,
                    why,
                });
            }
        }
    }
    Ok(decoded)
}

fn decode_line(line: &[u8]) -> Result<Record, String> {
    let line = line.strip_suffix(b"\n").ok_or("it does not end")?;
    let (sum, json) = line.split_at_checked(9).ok_or("it is too short")?;
    let sum = str::from_utf8(sum)
        .ok()
        .and_then(|sum| sum.strip_suffix(' '));
    let sum = sum
        .and_then(|sum| u32::from_str_radix(sum, 16).ok())
        .ok_or("it has no checksum")?;
    if crc32c::crc32c(json) != sum {
        return Err("its checksum is wrong".to_owned());
    }
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// What the records add up to; the last decision counts.
///
/// At the source a journal without `CommitIntent` is `NotHere`: `Commit` cannot have been sent. At the destination
/// `Aborted` after `Committed` happens when the disk refused `Committed` and the record may be there all the same.
pub fn outcome(records: &[Record]) -> Outcome {
    let open = match records.first() {
        Some(Record::Begun {
            side: Side::Source, ..
        })
        | None => Outcome::NotHere,
        Some(_) => Outcome::Open,
    };
    records.iter().fold(open, |outcome, record| match record {
        Record::Begun { .. }
        | Record::Told
        | Record::Serving { .. }
        | Record::Released { .. }
        | Record::Armed { .. }
        | Record::Whole { .. } => outcome,
        Record::CommitIntent => Outcome::Open,
        Record::RolledBack | Record::TakenBack | Record::Aborted => Outcome::NotHere,
        Record::GuestMoved | Record::Committed | Record::Running | Record::Closed => Outcome::Here,
    })
}

/// Whether the operator has taken the guest back and the destination does not know it yet.
pub fn has_to_tell(records: &[Record]) -> bool {
    records.contains(&Record::TakenBack) && !records.contains(&Record::Told)
}

/// Whether a source's journal needs nothing more for its guest: it was let go of, or runs here and nothing has to be done
/// about it. A daemon that is started anew leaves such a guest alone.
///
/// The guest of a post-copy needs its source until `Released`.
pub fn is_settled(records: &[Record]) -> bool {
    match records.iter().rfind(|record| **record != Record::Told) {
        Some(Record::GuestMoved) => postcopy(records) != Postcopy::Open,
        last => matches!(last, Some(Record::Released { .. } | Record::RolledBack)),
    }
}

/// Whether a guest depends, or will depend, on both hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Postcopy {
    /// Its memory comes, or came, before it runs.
    No,
    /// It lacks pages, or will when it runs.
    Open,
    /// It depends on its source no more.
    Over,
}

/// What a journal of either side says about post-copy.
pub fn postcopy(records: &[Record]) -> Postcopy {
    records
        .iter()
        .fold(Postcopy::No, |postcopy, record| match record {
            Record::Serving { .. } | Record::Armed { .. } => Postcopy::Open,
            Record::Released { .. } | Record::Whole { .. } => Postcopy::Over,
            _ => postcopy,
        })
}

/// What a post-copy of that journal began with.
pub fn switched(records: &[Record]) -> Option<Switch> {
    records.iter().find_map(|record| match record {
        Record::Serving { switched, .. } | Record::Armed { switched, .. } => *switched,
        _ => None,
    })
}

/// Why the guest of a post-copy that is over does not run at the destination, by a journal of either side; `None`: it does, as far
/// as that journal knows, or it is not over.
pub fn lost(records: &[Record]) -> Option<&Failure> {
    records.iter().find_map(|record| match record {
        Record::Released { failure } | Record::Whole { failure } => failure.as_ref(),
        _ => None,
    })
}

/// What a destination's journal lets its daemon answer to `Query`; `None`: there is no journal of that name, which is
/// answered with `NoJournal`.
///
/// An open journal is answered with `Unknown`, so that the source asks again. That is right while a session still serves
/// the migration (end it with [`LinkLost`](super::destination::Input::LinkLost): a source that asks has lost the
/// connection). When no session does (the daemon was started anew), append [`Record::Aborted`], sync it, and ask this
/// function again: then the answer is `Aborted` for good, and a source that asks gets its guest back.
pub fn standing_for(records: Option<&[Record]>) -> Standing {
    let Some(records) = records else {
        return Standing::NoJournal;
    };
    if !matches!(
        records.first(),
        Some(Record::Begun {
            side: Side::Destination,
            ..
        })
    ) {
        return Standing::Unknown;
    }
    match outcome(records) {
        Outcome::NotHere => Standing::Aborted,
        Outcome::Open => Standing::Unknown,
        Outcome::Here
            if records
                .iter()
                .any(|r| matches!(r, Record::Running | Record::Closed)) =>
        {
            Standing::Running
        }
        Outcome::Here => Standing::Committed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn begun(side: Side) -> Record {
        Record::Begun {
            id: MigrationId([7; 16]),
            side,
            vm: "web\n1".into(),
            qmp: "/run/qmp".into(),
            peer: "192.0.2.1:7000".into(),
            names: vec!["alpha.example".into()],
        }
    }

    fn written(records: &[Record]) -> Vec<u8> {
        records.iter().flat_map(encode).collect()
    }

    #[test]
    fn a_line_looks_like_this() {
        assert_eq!(
            String::from_utf8(encode(&Record::CommitIntent)).unwrap(),
            "3129ab2d {\"record\":\"commit-intent\"}\n"
        );
    }

    /// What a post-copy began with is kept, and a journal of a daemon that did not write it yet is read.
    #[test]
    fn what_a_post_copy_began_with() {
        let switch = Switch {
            sent_bytes: 7,
            lacking_bytes: 8192,
        };
        let serving = |switched| Record::Serving {
            blocks: Vec::new(),
            ram: Vec::new(),
            switched,
        };
        let records = [begun(Side::Source), serving(Some(switch))];
        let read = decode(&written(&records)).unwrap().records;
        assert_eq!(switched(&read), Some(switch));
        let json = r#"{"record":"serving","blocks":[],"ram":[]}"#;
        let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
        let old = [&written(&[begun(Side::Source)]), line.as_bytes()].concat();
        let read = decode(&old).unwrap().records;
        assert_eq!(read[1], serving(None));
        assert_eq!(switched(&read), None);
    }

    /// How a post-copy went wrong in the end is kept, and a journal of a daemon that did not write it yet is read.
    #[test]
    fn how_a_post_copy_went_wrong() {
        let failure = Failure::new(
            crate::engine::Fault::Qemu,
            "QEMU has ended",
            "start it anew",
        );
        for (side, word, record) in [
            (
                Side::Source,
                "released",
                (|failure| Record::Released { failure }) as fn(_) -> Record,
            ),
            (Side::Destination, "whole", |failure| Record::Whole {
                failure,
            }),
        ] {
            let records = [begun(side), record(Some(failure.clone()))];
            let read = decode(&written(&records)).unwrap().records;
            assert_eq!(lost(&read), Some(&failure));
            assert_eq!(postcopy(&read), Postcopy::Over);
            let json = format!(r#"{{"record":"{word}"}}"#);
            let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
            // One that went well reads the same to daemons before this one, too.
            assert_eq!(encode(&record(None)), line.as_bytes());
            let old = [&written(&[begun(side)]), line.as_bytes()].concat();
            let read = decode(&old).unwrap().records;
            assert_eq!(read[1], record(None));
            assert_eq!((lost(&read), postcopy(&read)), (None, Postcopy::Over));
        }
    }

    #[test]
    fn every_torn_end_leaves_the_records_before_it() {
        let records = [
            begun(Side::Source),
            Record::CommitIntent,
            Record::GuestMoved,
        ];
        let bytes = written(&records);
        for len in 0..=bytes.len() {
            let decoded = decode(&bytes[..len]).unwrap();
            assert_eq!(written(&decoded.records), bytes[..decoded.whole_bytes]);
            let lines = bytes[..len].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(decoded.records, records[..lines]);
        }
    }

    #[test]
    fn every_flipped_bit_before_the_last_line_is_noticed() {
        let first = encode(&begun(Side::Source)).len();
        let mut bytes = written(&[begun(Side::Source), Record::CommitIntent]);
        for at in 0..first {
            bytes[at] ^= 1;
            assert!(decode(&bytes).is_err(), "byte {at}");
            bytes[at] ^= 1;
        }
    }

    #[test]
    fn a_journal_begins_once() {
        assert_eq!(
            decode(&written(&[Record::Aborted])),
            Err(JournalError::NoBeginning)
        );
        let twice = written(&[begun(Side::Source), begun(Side::Source)]);
        assert_eq!(decode(&twice), Err(JournalError::NoBeginning));
    }

    #[test]
    fn records_add_up() {
        use Outcome::{Here, NotHere, Open};
        use Record::{
            Aborted, Closed, CommitIntent, Committed, GuestMoved, RolledBack, Running, TakenBack,
            Told,
        };
        let source: [(&[Record], Outcome); 9] = [
            (&[], NotHere),
            (&[CommitIntent], Open),
            (&[CommitIntent, RolledBack], NotHere),
            (&[CommitIntent, GuestMoved], Here),
            (&[CommitIntent, RolledBack, GuestMoved], Here),
            (&[CommitIntent, TakenBack], NotHere),
            (&[CommitIntent, TakenBack, GuestMoved], Here),
            (&[CommitIntent, TakenBack, RolledBack], NotHere),
            (&[CommitIntent, TakenBack, Told, RolledBack], NotHere),
        ];
        for (records, expected) in source {
            let records = [&[begun(Side::Source)], records].concat();
            assert_eq!(outcome(&records), expected, "{records:?}");
            assert_eq!(standing_for(Some(&records)), Standing::Unknown);
        }
        let destination: [(&[Record], Outcome, Standing); 6] = [
            (&[], Open, Standing::Unknown),
            (&[Aborted], NotHere, Standing::Aborted),
            (&[Committed], Here, Standing::Committed),
            (&[Committed, Aborted], NotHere, Standing::Aborted),
            (&[Committed, Running], Here, Standing::Running),
            (&[Committed, Running, Closed], Here, Standing::Running),
        ];
        for (records, expected, standing) in destination {
            let records = [&[begun(Side::Destination)], records].concat();
            assert_eq!(outcome(&records), expected, "{records:?}");
            assert_eq!(standing_for(Some(&records)), standing, "{records:?}");
        }
        assert!(is_settled(&[TakenBack, RolledBack, Told]) && !is_settled(&[TakenBack, Told]));
        assert!(has_to_tell(&[TakenBack, RolledBack]) && !has_to_tell(&[TakenBack, Told]));
        assert_eq!(standing_for(None), Standing::NoJournal);
    }

    /// What a daemon that is started anew has to do for the guest of a post-copy.
    #[test]
    fn a_source_is_needed_until_it_is_released() {
        use Record::{
            Aborted, Armed, Closed, CommitIntent, Committed, GuestMoved, RolledBack, Running,
            Serving,
        };
        let released = || Record::Released { failure: None };
        let whole = || Record::Whole { failure: None };
        let serving = || Serving {
            blocks: Vec::new(),
            ram: Vec::new(),
            switched: None,
        };
        let armed = || Armed {
            pid: 1,
            ram: Vec::new(),
            inside: vec![7, 9],
            blocks: Vec::new(),
            background: None,
            switched: None,
        };
        let source = [
            (vec![serving()], Outcome::NotHere, Postcopy::Open, false),
            (
                vec![serving(), CommitIntent],
                Outcome::Open,
                Postcopy::Open,
                false,
            ),
            (
                vec![serving(), CommitIntent, RolledBack],
                Outcome::NotHere,
                Postcopy::Open,
                true,
            ),
            (
                vec![serving(), CommitIntent, GuestMoved],
                Outcome::Here,
                Postcopy::Open,
                false,
            ),
            (
                vec![serving(), CommitIntent, GuestMoved, released()],
                Outcome::Here,
                Postcopy::Over,
                true,
            ),
            (
                vec![CommitIntent, GuestMoved],
                Outcome::Here,
                Postcopy::No,
                true,
            ),
        ];
        for (records, expected, depends, settled) in source {
            let records = [vec![begun(Side::Source)], records].concat();
            let found = (outcome(&records), postcopy(&records), is_settled(&records));
            assert_eq!(found, (expected, depends, settled), "{records:?}");
            assert_eq!(decode(&written(&records)).unwrap().records, records);
        }
        let destination = [
            (vec![armed()], Standing::Unknown, Postcopy::Open),
            (vec![armed(), Aborted], Standing::Aborted, Postcopy::Open),
            (
                vec![armed(), Committed],
                Standing::Committed,
                Postcopy::Open,
            ),
            (
                vec![armed(), Committed, Running],
                Standing::Running,
                Postcopy::Open,
            ),
            (
                vec![armed(), Committed, Running, whole()],
                Standing::Running,
                Postcopy::Over,
            ),
            (
                vec![armed(), Committed, Running, whole(), Closed],
                Standing::Running,
                Postcopy::Over,
            ),
        ];
        for (records, standing, depends) in destination {
            let records = [vec![begun(Side::Destination)], records].concat();
            assert_eq!(standing_for(Some(&records)), standing, "{records:?}");
            assert_eq!(postcopy(&records), depends, "{records:?}");
        }
    }
}
