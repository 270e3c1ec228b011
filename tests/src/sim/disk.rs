//! The journal of one side as bytes on a simulated disk: what is synced outlives a crash, the rest may be torn.

use std::time::Duration;

use pagecopy::engine::Time;
use serde::{Deserialize, Serialize};

use super::rng::Rng;

/// How the disk treats writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Temper {
    /// The longest that a sync takes, in microseconds.
    pub(super) sync_us: u64,
    /// Of a thousand writes, how many are refused.
    pub(super) refuses: u64,
}

impl Default for Temper {
    fn default() -> Temper {
        Temper {
            sync_us: 100,
            refuses: 0,
        }
    }
}

/// Who writes a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hand {
    /// The session, through the file that it holds open: after a failure it first cuts off what may be there of that record.
    Session,
    /// The daemon itself, which opens the file anew and cuts a torn end off first.
    Daemon,
}

/// A record that was taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// The length of the file that is safe then.
    pub(super) end: usize,
    /// When it is.
    pub(super) at: Time,
    /// What it takes.
    pub(super) takes: Duration,
}

/// A record that was refused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused {
    /// When that is said.
    pub(super) at: Time,
    /// The disk is full.
    pub(super) full: bool,
}

/// What a crash did to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    /// The last line is not whole.
    pub(super) torn: bool,
    /// At least one whole line is gone.
    pub(super) lost: bool,
}

/// One journal file.
#[derive(Debug)]
pub(super) struct Disk {
    bytes: Vec<u8>,
    /// So much is on the disk.
    synced: usize,
    /// So much is in the kernel's hands: it outlives the daemon, and not the host.
    written: usize,
    /// Syncs end in their order.
    busy_until: Time,
    temper: Temper,
    rng: Rng,
    /// The session's last record was refused: what is behind this is not known to it.
    damaged: Option<usize>,
    /// Full until then; `Time(u64::MAX)` is for good.
    full_until: Time,
    slower: Duration,
}

impl Disk {
    /// An empty journal.
    pub(super) fn new(temper: Temper, rng: Rng) -> Disk {
        Disk {
            bytes: Vec::new(),
            synced: 0,
            written: 0,
            busy_until: Time(0),
            temper,
            rng,
            damaged: None,
            full_until: Time(0),
            slower: Duration::ZERO,
        }
    }

    /// Writes the first line, synced.
    pub(super) fn begin(&mut self, line: &[u8]) {
        self.bytes = line.to_vec();
        self.synced = line.len();
        self.written = line.len();
    }

    /// Full until then.
    pub(super) fn fill_until(&mut self, until: Time) {
        self.full_until = self.full_until.max(until);
    }

    /// Whether it is full for good.
    pub(super) fn full_for_good(&self) -> bool {
        self.full_until == Time(u64::MAX)
    }

    /// Every sync takes so much longer from now on.
    pub(super) fn slow_down(&mut self, by: Duration) {
        self.slower = self.slower.max(by);
    }

    /// Appends a line.
    ///
    /// # Errors
    /// The disk refuses, and says so at that time. The line may be in the file all the same, whole or torn.
    pub(super) fn append(&mut self, line: &[u8], hand: Hand, now: Time) -> Result<Taken, Refused> {
        let takes = self.rng.micros(20, self.temper.sync_us.max(20)) + self.slower;
        self.busy_until = self.busy_until.max(now).after(takes);
        let at = self.busy_until;
        let full = now < self.full_until;
        let refuses = full || self.rng.chance(self.temper.refuses);
        match (hand, self.damaged) {
            (Hand::Session, None) => {}
            (Hand::Session, Some(_)) if refuses => return Err(Refused { at, full }),
            (Hand::Session, Some(whole)) => self.cut(whole),
            (Hand::Daemon, _) => self.repair(),
        }
        if refuses {
            if hand == Hand::Session {
                self.damaged = Some(self.bytes.len());
            }
            let kept = match self.rng.below(10) {
                0..3 if !full => line.len(),
                3..5 => self.rng.index(line.len()),
                _ => 0,
            };
            self.bytes.extend_from_slice(&line[..kept.min(line.len())]);
            self.written = self.bytes.len();
            return Err(Refused { at, full });
        }
        if hand == Hand::Session {
            self.damaged = None;
        }
        self.bytes.extend_from_slice(line);
        let end = self.bytes.len();
        Ok(Taken { end, at, takes })
    }

    /// The first `end` bytes are safe.
    pub(super) fn synced(&mut self, end: usize) {
        self.synced = self.synced.max(end.min(self.bytes.len()));
        self.written = self.written.max(self.synced);
    }

    /// The daemon dies, or the whole `host` does: of what was not safe, a part from the start is there afterwards.
    pub(super) fn crash(&mut self, host: bool) -> Damage {
        let safe = if host { self.synced } else { self.written };
        let unsafe_bytes = self.bytes.len() - safe;
        let kept = match self.rng.below(3) {
            0 => 0,
            1 => unsafe_bytes,
            _ => self.rng.index(unsafe_bytes + 1),
        };
        let lost = self.bytes[safe + kept..].contains(&b'\n');
        self.bytes.truncate(safe + kept);
        self.written = self.bytes.len();
        if host {
            self.synced = self.bytes.len();
        }
        Damage {
            torn: self.bytes.last().is_some_and(|byte| *byte != b'\n'),
            lost,
        }
    }

    /// The file is opened anew: a torn last line is cut off before anything is appended.
    pub(super) fn reopen(&mut self) {
        self.repair();
        self.damaged = None;
    }

    fn repair(&mut self) {
        let whole = self
            .bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        self.cut(whole);
    }

    fn cut(&mut self, whole: usize) {
        self.bytes.truncate(whole);
        self.synced = self.synced.min(whole);
        self.written = self.written.min(whole);
    }

    /// The file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::rng::Rng;
    use super::{Disk, Hand, Temper, Time};

    #[test]
    fn what_was_synced_outlives_every_crash() {
        for seed in 0..100 {
            let mut disk = Disk::new(Temper::default(), Rng::new(seed));
            let taken = disk.append(b"one\n", Hand::Session, Time(0)).unwrap();
            disk.synced(taken.end);
            assert!(disk.append(b"two\n", Hand::Session, Time(0)).is_ok());
            disk.crash(seed % 2 == 0);
            assert!(disk.bytes().starts_with(b"one\n"));
            disk.reopen();
            assert!(disk.bytes() == b"one\n" || disk.bytes() == b"one\ntwo\n");
        }
    }

    #[test]
    fn what_was_refused_is_cut_off_before_the_next_record() {
        for seed in 0..100 {
            let mut disk = Disk::new(Temper::default(), Rng::new(seed));
            disk.begin(b"begun\n");
            disk.fill_until(Time(10));
            assert!(disk.append(b"one\n", Hand::Session, Time(0)).is_err());
            assert!(disk.append(b"two\n", Hand::Session, Time(5)).is_err());
            assert!(disk.append(b"three\n", Hand::Session, Time(20)).is_ok());
            assert_eq!(disk.bytes(), b"begun\nthree\n");
        }
    }
}
