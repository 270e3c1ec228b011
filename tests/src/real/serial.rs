//! The guest's serial port: a thread that stamps what it reads with the time, and what can be asked of the record.
//!
//! The guest's words are in `tests/guest/guest.c`: bytes with the top bit set are beats, the rest are lines of text.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::PATIENCE;

#[derive(Debug, Default)]
struct Record {
    beats: Vec<(Instant, u8)>,
    lines: Vec<String>,
    states: Vec<State>,
    partial: Vec<u8>,
}

#[derive(Debug, Default)]
struct Shared {
    record: Mutex<Record>,
    changed: Condvar,
}

/// What a guest says of its work every now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// When it was read.
    pub at: Instant,
    /// Pages that the guest has checked so far: one each time around its loop.
    pub checked: u64,
}

/// One guest's serial port, as seen at one QEMU.
#[derive(Debug)]
pub struct Serial {
    shared: Arc<Shared>,
    writer: UnixStream,
    _reader: JoinHandle<()>,
}

impl Serial {
    /// Takes the connection that QEMU makes and starts reading.
    pub fn accept(listener: &UnixListener) -> Serial {
        let (stream, _) = listener.accept().expect("QEMU connects its serial port");
        let writer = stream.try_clone().expect("a second handle of a socket");
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        // Ends when QEMU does.
        let _reader = std::thread::spawn(move || read_all(stream, &theirs));
        Serial {
            shared,
            writer,
            _reader,
        }
    }

    /// Waits until the guest has filled its memory.
    pub fn wait_filled(&self) {
        self.wait_line("FILLED", 0, Duration::from_secs(120));
    }

    /// Waits for `count` more beats and returns how long they took.
    pub fn wait_beats(&self, count: usize) -> Duration {
        let from = Instant::now();
        let target = self.beats() + count;
        self.wait_for("beats", PATIENCE, |record| {
            (record.beats.len() >= target).then_some(())
        });
        from.elapsed()
    }

    /// Has the guest check every page now, and waits for its verdict. Panics if anything is corrupt.
    pub fn verify(&self) {
        let from = self.lines();
        self.command("V");
        let verdict = self.wait_line("VERIFIED", from, Duration::from_secs(120));
        self.assert_whole();
        assert!(verdict.ends_with(" corrupt=0"), "the guest says: {verdict}");
    }

    /// How long the first touch of a page took, each time since this was asked before.
    pub fn touches(&self) -> Touches {
        let from = self.lines();
        self.command("T");
        Touches::read(&self.wait_line("TOUCHED", from, PATIENCE))
    }

    /// Has the guest check every page now, and does not wait for it.
    pub fn touch_all(&self) {
        self.command("V");
    }

    /// Sets the rate at which the guest dirties memory, in MB/s.
    pub fn set_rate(&self, mb_s: u32) {
        self.command(&format!("R{mb_s}\n"));
    }

    /// Waits until the guest has dirtied so many pages in all.
    pub fn wait_dirtied(&self, pages: u64) {
        self.wait_for("pages dirtied", PATIENCE, |record| {
            (record.dirtied() >= pages).then_some(())
        });
    }

    /// Has the guest dirty nothing, and waits until it does so. Returns how many pages it has dirtied so far.
    pub fn rest(&self) -> u64 {
        self.set_rate(0);
        // While it dirties at any rate, no two of its lines, a tenth of a second apart, agree.
        let mut before = None;
        loop {
            self.wait_line("OK ", self.lines(), PATIENCE);
            let dirtied = Some(self.dirtied());
            if dirtied == before {
                return self.dirtied();
            }
            before = dirtied;
        }
    }

    /// Waits until the guest has found a wrong word, which it must. Gives what it says of it.
    pub fn wait_corrupt(&self) -> String {
        self.wait_line("CORRUPT", 0, PATIENCE)
    }

    /// Panics if the guest has ever found a wrong word here.
    pub fn assert_whole(&self) {
        let record = self.lock();
        let corrupt: Vec<&String> = record
            .lines
            .iter()
            .filter(|line| line.contains("CORRUPT"))
            .collect();
        assert!(
            corrupt.is_empty(),
            "the guest's memory is corrupt: {corrupt:#?}"
        );
    }

    /// Beats so far.
    pub fn beats(&self) -> usize {
        self.lock().beats.len()
    }

    /// Beats read after `time`.
    pub fn beats_after(&self, time: Instant) -> usize {
        let record = self.lock();
        record.beats.iter().filter(|beat| beat.0 > time).count()
    }

    /// When the last beat was read.
    pub fn last_beat(&self) -> Option<(Instant, u8)> {
        self.lock().beats.last().copied()
    }

    /// When the first beat was read.
    pub fn first_beat(&self) -> Option<(Instant, u8)> {
        self.lock().beats.first().copied()
    }

    /// The longest time between two beats since `from`, up to now.
    pub fn longest_gap(&self, from: Instant) -> Duration {
        let record = self.lock();
        let times = record
            .beats
            .iter()
            .map(|beat| beat.0)
            .filter(|&at| at >= from);
        let mut last = from;
        let mut longest = Duration::ZERO;
        for at in times.chain([Instant::now()]) {
            longest = longest.max(at.saturating_duration_since(last));
            last = at;
        }
        longest
    }

    /// Pages that the guest said it had dirtied by its last line of state.
    pub fn dirtied(&self) -> u64 {
        self.lock().dirtied()
    }

    /// All that the guest has said of its work here.
    pub fn states(&self) -> Vec<State> {
        self.lock().states.clone()
    }

    fn command(&self, text: &str) {
        (&self.writer)
            .write_all(text.as_bytes())
            .expect("QEMU takes serial input");
    }

    fn lines(&self) -> usize {
        self.lock().lines.len()
    }

    fn wait_line(&self, start: &str, from: usize, timeout: Duration) -> String {
        self.wait_for(start, timeout, |record| {
            // The BIOS may leave its own words before the guest's on a line.
            record.lines[from..]
                .iter()
                .find(|line| line.contains(start))
                .cloned()
        })
    }

    fn wait_for<T>(
        &self,
        what: &str,
        timeout: Duration,
        found: impl Fn(&Record) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + timeout;
        let mut record = self.lock();
        loop {
            if let Some(value) = found(&record) {
                return value;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let last = record.lines.last().cloned().unwrap_or_default();
            assert!(
                !left.is_zero(),
                "no {what} from the guest within {timeout:?}; its last line: {last}"
            );
            record = self
                .shared
                .changed
                .wait_timeout(record, left)
                .expect("the reader does not panic")
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.shared
            .record
            .lock()
            .expect("the reader does not panic")
    }
}

/// How long a guest's CPUs took to touch a page for the first time in a while: counts by time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Touches {
    /// The longest time that is counted there, in microseconds, and how many there are; in order.
    buckets: Vec<(f64, u64)>,
}

impl Touches {
    /// Reads the guest's line, in ticks of its time-stamp counter and four buckets for each power of two.
    fn read(line: &str) -> Touches {
        let mut ticks_per_us = 1.0;
        let mut touches = Touches::default();
        for field in line.split(' ') {
            if let Some(number) = field.strip_prefix("tsc_per_ms=") {
                ticks_per_us = number.parse().unwrap_or(1e3_f64) / 1e3;
            } else if let Some((bucket, count)) = field.split_once(':') {
                let bucket: u32 = bucket.parse().expect("a bucket's number");
                let count = count.parse().expect("how many it holds");
                touches.buckets.push((end_of(bucket) / ticks_per_us, count));
            }
        }
        touches
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// Microseconds within which this share of all touches ended (0.999: all but one of a thousand).
    pub fn quantile_us(&self, share: f64) -> f64 {
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let wanted = self.count() as f64 * share;
        let mut seen = 0.0;
        for (us, count) in &self.buckets {
            #[allow(clippy::cast_precision_loss)] // far below 2^53
            let count = *count as f64;
            seen += count;
            if seen >= wanted {
                return *us;
            }
        }
        0.0
    }
}

/// The first number of ticks behind a bucket of the guest's.
fn end_of(bucket: u32) -> f64 {
    if bucket < 4 {
        return f64::from(bucket + 1);
    }
    let (power, quarter) = (bucket / 4 + 1, bucket % 4);
    f64::from(5 + quarter) * 2_f64.powi(i32::try_from(power).unwrap_or(i32::MAX) - 2)
}

fn read_all(mut stream: UnixStream, shared: &Shared) {
    let mut bytes = [0_u8; 4096];
    while let Ok(n) = stream.read(&mut bytes) {
        let now = Instant::now();
        if n == 0 {
            return;
        }
        let mut record = shared
            .record
            .lock()
            .expect("no panic while the record is held");
        for &byte in &bytes[..n] {
            record.take(now, byte);
        }
        shared.changed.notify_all();
    }
}

impl Record {
    fn dirtied(&self) -> u64 {
        let mut lines = self.lines.iter().rev();
        let state = lines.find(|line| line.starts_with("OK "));
        state.and_then(|line| field(line, "dirtied=")).unwrap_or(0)
    }

    fn take(&mut self, now: Instant, byte: u8) {
        if byte & 0x80 != 0 {
            self.beats.push((now, byte & 0x7f));
        } else if byte == b'\n' {
            let line = String::from_utf8_lossy(&self.partial).trim().to_owned();
            self.partial.clear();
            let checked = line.starts_with("OK ").then(|| field(&line, "checked="));
            if let Some(checked) = checked.flatten() {
                self.states.push(State { at: now, checked });
            }
            self.lines.push(line);
        } else {
            self.partial.push(byte);
        }
    }
}

/// The number of a line that stands behind `name`.
fn field(line: &str, name: &str) -> Option<u64> {
    let field = line.split(' ').find_map(|field| field.strip_prefix(name));
    field.and_then(|number| number.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_touches_are_read() {
        // 1000 ticks a microsecond; 4096 = 4 * 2^10 is in bucket 4 * 11, which ends at 5 * 2^10.
        let touches = Touches::read("TOUCHED tsc_per_ms=1000000 3:1 44:998 47:1");
        assert_eq!(touches.count(), 1000);
        assert!((touches.quantile_us(0.0005) - 0.004).abs() < 1e-9);
        assert!((touches.quantile_us(0.5) - 5.12).abs() < 1e-9);
        assert!((touches.quantile_us(1.0) - 8.192).abs() < 1e-9);
    }

    #[test]
    fn the_work_done_is_kept_with_its_time() {
        let mut record = Record::default();
        let now = Instant::now();
        for byte in b"OK tick=9 dirtied=3 checked=7\nVERIFIED pages=1 checked=8\n" {
            record.take(now, *byte);
        }
        assert_eq!(
            record.states,
            [State {
                at: now,
                checked: 7
            }]
        );
        assert_eq!(record.dirtied(), 3);
    }

    #[test]
    fn beats_may_stand_inside_a_line() {
        let mut record = Record::default();
        let now = Instant::now();
        for byte in b"O\x81K tick=\x821\n" {
            record.take(now, *byte);
        }
        assert_eq!(record.lines, ["OK tick=1"]);
        assert_eq!(
            record.beats.iter().map(|beat| beat.1).collect::<Vec<_>>(),
            [1, 2]
        );
    }
}
