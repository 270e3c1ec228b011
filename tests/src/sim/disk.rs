//! The journal of one side as bytes on a simulated disk: what is synced outlives a crash, the rest may be torn.

use pagecopy::engine::Time;

use super::rng::Rng;

/// How the disk treats writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Temper {
    /// The longest that a sync takes, in microseconds.
    pub(super) sync_us: u64,
    /// Of a thousand writes, how many are refused.
    pub(super) refuses: u64,
}

/// One journal file.
#[derive(Debug)]
pub(super) struct Disk {
    bytes: Vec<u8>,
    synced: usize,
    /// Syncs end in their order.
    busy_until: Time,
    temper: Temper,
    rng: Rng,
}

impl Disk {
    /// An empty journal.
    pub(super) fn new(temper: Temper, rng: Rng) -> Disk {
        Disk {
            bytes: Vec::new(),
            synced: 0,
            busy_until: Time(0),
            temper,
            rng,
        }
    }

    /// Writes the first line, synced.
    pub(super) fn begin(&mut self, line: &[u8]) {
        self.bytes = line.to_vec();
        self.synced = line.len();
    }

    /// Appends a line. Returns the length that will be safe, and when.
    ///
    /// # Errors
    /// The disk refuses, and says so at that time. The line may be in the file all the same, whole or torn; what is torn
    /// is cut off again.
    pub(super) fn append(&mut self, line: &[u8], now: Time) -> Result<(usize, Time), Time> {
        let sync = self.rng.micros(20, self.temper.sync_us.max(20));
        self.busy_until = self.busy_until.max(now).after(sync);
        if self.rng.chance(self.temper.refuses) {
            if self.rng.chance(300) {
                self.bytes.extend_from_slice(line);
            }
            return Err(self.busy_until);
        }
        self.bytes.extend_from_slice(line);
        Ok((self.bytes.len(), self.busy_until))
    }

    /// The first `end` bytes are safe.
    pub(super) fn synced(&mut self, end: usize) {
        self.synced = self.synced.max(end.min(self.bytes.len()));
    }

    /// The daemon dies: of what was not synced, a part from the start is there afterwards.
    pub(super) fn crash(&mut self) {
        let unsafe_bytes = self.bytes.len() - self.synced;
        let kept = match self.rng.below(3) {
            0 => 0,
            1 => unsafe_bytes,
            _ => self.rng.index(unsafe_bytes + 1),
        };
        self.bytes.truncate(self.synced + kept);
        self.synced = self.bytes.len();
    }

    /// Cuts a torn last line off, as the daemon does before it appends anew.
    pub(super) fn repair(&mut self) {
        let whole = self
            .bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        self.bytes.truncate(whole);
        self.synced = whole;
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
    use super::{Disk, Temper, Time};

    #[test]
    fn what_was_synced_outlives_every_crash() {
        for seed in 0..100 {
            let mut disk = Disk::new(
                Temper {
                    sync_us: 100,
                    refuses: 0,
                },
                Rng::new(seed),
            );
            let (end, _) = disk.append(b"one\n", Time(0)).unwrap();
            disk.synced(end);
            assert!(disk.append(b"two\n", Time(0)).is_ok());
            disk.crash();
            assert!(disk.bytes().starts_with(b"one\n"));
            disk.repair();
            assert!(disk.bytes() == b"one\n" || disk.bytes() == b"one\ntwo\n");
        }
    }
}
