//! Threads of another process that lose a share of their time: those that write, no others, and only as long as somebody holds them.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]
#![cfg(target_arch = "x86_64")]

mod host_support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use pagecopy::host::Tracker;
use pagecopy::host::throttle::Throttle;
use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::memory::BlockId;

use host_support::sys::{self, Child, Map};
use host_support::{PAGE, RamFile, is_root};

const PATIENCE: Duration = Duration::from_secs(30);
/// Samples of what threads do, a millisecond apart.
const SAMPLES: usize = 400;

/// Words that the process shares with the test.
const WRITER: u64 = 0;
const OTHER: u64 = 8;
const WRITTEN: u64 = 16;
const SIGNALS: u64 = 24;
const ADDRESS: u64 = 32;

/// A process with a thread that writes its memory, page after page, and one that writes nothing.
struct Guest {
    child: Child,
    words: Map,
    ram: RamFile,
    _words: RamFile,
}

impl Guest {
    fn new() -> Guest {
        let (ram, file) = (RamFile::tmpfs(64 << 20), RamFile::tmpfs(PAGE));
        let words = file.map();
        let child = sys::fork(|| live(&ram, &file.map()));
        let guest = Guest {
            child,
            words,
            ram,
            _words: file,
        };
        guest.wait("it lives", |guest| {
            guest.word(WRITTEN) > 0 && guest.word(OTHER) > 0
        });
        guest
    }

    fn word(&self, at: u64) -> u64 {
        self.words.read_word(at)
    }

    fn thread(&self, at: u64) -> i32 {
        i32::try_from(self.word(at)).unwrap()
    }

    fn wait(&self, what: &str, so: impl Fn(&Guest) -> bool) -> Duration {
        let begun = Instant::now();
        while !so(self) {
            assert!(begun.elapsed() < PATIENCE, "not: {what}");
            thread::sleep(Duration::from_micros(100));
        }
        begun.elapsed()
    }

    fn tracked(&self) -> UffdTracker {
        let block = TrackedBlock {
            block: BlockId(0),
            address: self.word(ADDRESS),
            len: self.ram.size,
            page_size: PAGE,
        };
        UffdTracker::new(self.child.pid, vec![block]).unwrap()
    }

    /// Whether a thread stands still because somebody traces it.
    fn stands(&self, at: u64) -> bool {
        let stat = format!("/proc/{}/task/{}/stat", self.child.pid, self.thread(at));
        let stat = fs::read_to_string(stat).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('t')
    }

    /// How often of [`SAMPLES`] each of both stood still.
    fn stood(&self) -> [usize; 2] {
        let mut stood = [0; 2];
        for _ in 0..SAMPLES {
            for (count, at) in stood.iter_mut().zip([WRITER, OTHER]) {
                *count += usize::from(self.stands(at));
            }
            thread::sleep(Duration::from_millis(1));
        }
        stood
    }

    fn goes_on(&self) -> Duration {
        let before = self.word(WRITTEN);
        let took = self.wait("it writes on", |guest| guest.word(WRITTEN) > before + 1);
        assert_eq!(self.stood(), [0, 0]);
        took
    }

    fn threads(&self) -> [u32; 2] {
        [WRITER, OTHER].map(|at| self.thread(at).unsigned_abs())
    }
}

fn live(ram: &RamFile, words: &Map) {
    // Of this a handler that counts is wanted, and no timer.
    sys::interval_timer(999_999);
    let never = [0_u64; 4];
    sys::raw_syscall(
        libc::SYS_setitimer,
        [0, std::ptr::from_ref(&never) as usize, 0, 0, 0],
    );
    let memory = ram.map();
    words.write_word(ADDRESS, memory.address());
    let own = || {
        rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .unsigned_abs()
            .into()
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            words.write_word(WRITER, own());
            let pages = ram.size / PAGE;
            for turn in 1_u64.. {
                memory.write_word(turn % pages * PAGE, turn);
                words.write_word(WRITTEN, turn);
                words.write_word(SIGNALS, sys::signals_handled());
            }
        });
        scope.spawn(|| {
            words.write_word(OTHER, own());
            loop {
                std::hint::black_box(sys::churn_registers(1000));
            }
        });
    });
}

/// A process that slows another for ever.
fn slower(guest: &Guest, percent: u32) -> Child {
    let (mut ready, mut theirs) = UnixStream::pair().unwrap();
    let (pid, threads) = (guest.child.pid, guest.threads());
    let child = sys::fork(move || {
        let throttle = Throttle::new(percent);
        throttle.holder().start(pid, &threads).unwrap();
        theirs.write_all(&[1]).unwrap();
        thread::sleep(PATIENCE * 10);
    });
    ready.read_exact(&mut [0]).unwrap();
    child
}

#[test]
fn who_writes_loses_its_share_and_nobody_else_does() {
    skip_unless!(is_root(), "needs root");
    let guest = Guest::new();
    let mut tracker = guest.tracked();
    tracker.arm().unwrap();
    let throttle = Throttle::new(80);
    throttle
        .holder()
        .start(guest.child.pid, &guest.threads())
        .unwrap();
    let mut dirty = Vec::new();
    // On a busy machine it waits for a processor before it is seen to stand.
    for (percent, expected) in [(80, 0.3..0.95), (30, 0.05..0.6), (95, 0.4..1.0)] {
        throttle.set(percent);
        // Pages are protected again, as in a round, so that it is seen to write.
        tracker.scan(&mut dirty).unwrap();
        thread::sleep(Duration::from_millis(20));
        let [writer, other] = guest.stood();
        println!("{percent} %: stood still {writer} and {other} times of {SAMPLES}");
        #[allow(clippy::cast_precision_loss)]
        let share = writer as f64 / SAMPLES as f64;
        assert!(expected.contains(&share), "{percent} %: {share}");
        assert_eq!(other, 0, "{percent} %");
    }
    drop(throttle);
    guest.goes_on();
}

#[test]
fn a_throttle_that_is_lifted_before_it_has_begun_never_does() {
    skip_unless!(is_root(), "needs root");
    let guest = Guest::new();
    let throttle = Throttle::new(90);
    let holder = throttle.holder();
    drop(throttle);
    holder.start(guest.child.pid, &guest.threads()).unwrap();
    guest.goes_on();
}

#[test]
fn it_ends_with_the_process_that_holds_it_and_no_signal_is_lost() {
    skip_unless!(is_root(), "needs root");
    let guest = Guest::new();
    let mut longest = Duration::ZERO;
    for kill in 1..=100 {
        let slower = slower(&guest, 97);
        guest.wait("it stands still", |guest| guest.stands(WRITER));
        let (pid, thread) = (guest.child.pid as usize, guest.thread(WRITER) as usize);
        let sent = sys::raw_syscall(
            libc::SYS_tgkill,
            [pid, thread, libc::SIGALRM as usize, 0, 0],
        );
        assert_eq!(sent, 0);
        // At any moment of a period.
        thread::sleep(Duration::from_micros(kill * 97 % 10_000));
        let killed = Instant::now();
        slower.signal(libc::SIGKILL);
        let before = guest.word(WRITTEN);
        guest.wait("it writes on", |guest| guest.word(WRITTEN) > before + 1);
        longest = longest.max(killed.elapsed());
        guest.wait("it has had its signal", |guest| guest.word(SIGNALS) == kill);
        assert!(!guest.stands(WRITER));
    }
    println!("after a kill it went on within {longest:?}");
    guest.goes_on();
}

#[test]
fn what_ends_meanwhile_and_what_is_traced_is_told() {
    skip_unless!(is_root(), "needs root");
    let guest = Guest::new();
    let throttle = Throttle::new(90);
    let traced = sys::fork({
        let thread = guest.thread(WRITER);
        move || {
            sys::trace(thread);
            thread::sleep(PATIENCE * 10);
        }
    });
    guest.wait("it is traced", |guest| {
        let status = format!(
            "/proc/{}/task/{}/status",
            guest.child.pid,
            guest.thread(WRITER)
        );
        let status = fs::read_to_string(status).unwrap();
        !status.contains("TracerPid:\t0")
    });
    let refused = throttle
        .holder()
        .start(guest.child.pid, &guest.threads()[..1]);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("is traced by"), "{refused}");
    drop(traced);
    guest.wait("it is let go of", |guest| {
        throttle
            .holder()
            .start(guest.child.pid, &guest.threads())
            .is_ok()
    });
    guest.wait("it stands still", |guest| guest.stands(WRITER));
    // With a thread of it stopped, a process ends as it would.
    guest.child.signal(libc::SIGKILL);
    guest.child.wait(0);
    assert!(throttle.holder().start(guest.child.pid, &[1]).is_err());
}
