//! Fetching with a child process for QEMU and a thread for the source: who waits gets what belongs there, whatever is lost
//! meanwhile, and what the child has written since is never overwritten.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../pagecopy/tests/host_support/mod.rs"]
mod host_support;
mod source;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use pagecopy::engine::MigrationId;
use pagecopy::host::pager::share_out;
use pagecopy::host::process;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use transport::{Access, RegionId, Regions};

use self::host_support::sys::{self, Child};
use self::host_support::{Command, PAGE, RamFile, Target, is_registered, is_root, open_ram, pipe};
use self::source::{Serving, Source, byte, dial};
use super::*;
use crate::skip_unless;

const ID: MigrationId = MigrationId([5; 16]);
const PAGES: u64 = 1024;
/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Long enough for a thread that does not wait to be through, on a busy machine, too.
const A_WHILE: Duration = Duration::from_millis(200);
/// Far from each other, so that none is a neighbour of another.
const FAR: [u64; 3] = [100, 500, 900];

/// A destination: a child process whose RAM lacks pages, and what a daemon has of it.
struct Destination {
    target: Target,
    memory: Memory,
}

/// The RAM and the record of what has come of it.
struct Memory {
    file: RamFile,
    specs: Arc<[BlockSpec]>,
    record: Record,
    /// Bytes a second that nobody waits for.
    background: Option<u64>,
}

/// The file of what has come, removed on drop.
struct Record(PathBuf);

impl Record {
    fn open(&self, new: bool) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(new);
        options.open(&self.0).unwrap()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Memory {
    fn guest(&self, received: Received) -> Guest {
        Guest {
            specs: Arc::clone(&self.specs),
            ram: open_ram(&[&self.file]),
            received,
            background: self.background,
        }
    }

    /// Where replies land.
    fn regions(&self) -> Regions {
        let regions = Regions::new();
        let region = crate::sys::region(&open_ram(&[&self.file]), BlockId(0)).unwrap();
        let access = Access {
            peer_writes: false,
            peer_reads: false,
        };
        regions.register(RegionId(0), region, access);
        regions
    }

    /// Lacks these pages: the first, and how many.
    fn lacking(&self, runs: &[(u64, u64)]) -> Bitmap {
        let mut lacking = Bitmap::new(&self.specs);
        for (first, pages) in runs {
            lacking
                .insert(host_support::run(0, *first, *pages))
                .unwrap();
        }
        lacking
    }

    fn adopt(
        &self,
        pid: i32,
        shares: Vec<Vec<Stretch>>,
        inside: &[i32],
    ) -> Result<(Pull, UnboundedReceiver<PullEvent>), Failure> {
        let (sender, events) = unbounded_channel();
        let received = Received::open(&self.record.open(false), ID, &self.specs).unwrap();
        Pull::adopt(pid, shares, inside, self.guest(received), sender).map(|pull| (pull, events))
    }
}

impl Destination {
    fn new() -> Destination {
        let file = RamFile::tmpfs(PAGES * PAGE);
        let target = Target::new(&[&file], vec![]);
        let specs = vec![file.spec("ram")].into();
        let record = Record(file.path.with_extension("received"));
        Destination {
            target,
            memory: Memory {
                file,
                specs,
                record,
                background: None,
            },
        }
    }

    fn shares(&self, count: usize) -> Vec<Vec<Stretch>> {
        share_out(&self.target.blocks, count)
    }

    fn arm(&self, shares: usize, lacking: &[(u64, u64)]) -> (Pull, UnboundedReceiver<PullEvent>) {
        let (sender, events) = unbounded_channel();
        let Memory { specs, record, .. } = &self.memory;
        let received = Received::create(&record.open(true), ID, specs).unwrap();
        let guest = self.memory.guest(received);
        let lacking = self.memory.lacking(lacking);
        let (pid, shares) = (self.target.pid(), self.shares(shares));
        let pull = Pull::arm((pid, None), shares, guest, lacking, sender).unwrap();
        (pull, events)
    }

    fn get(&mut self, page: u64) -> u8 {
        self.target.orders.get(0, page)
    }

    /// Everything has come; what is at `written` is what the child wrote there, all else is the source's.
    fn assert_whole(&mut self, written: &[u64]) {
        assert!(!is_registered(self.target.pid()));
        assert_eq!(process::userfaultfds(self.target.pid()).unwrap(), 0);
        for page in 0..PAGES {
            let wanted = if written.contains(&page) {
                WRITTEN
            } else {
                byte(page)
            };
            assert_eq!(self.get(page), wanted, "page {page}");
        }
    }
}

/// What the child writes.
const WRITTEN: u8 = 0x5A;

fn next(events: &mut UnboundedReceiver<PullEvent>) -> PullEvent {
    let begun = Instant::now();
    loop {
        if let Ok(event) = events.try_recv() {
            return event;
        }
        assert!(begun.elapsed() < LIMIT, "nothing is told");
        thread::sleep(Duration::from_millis(1));
    }
}

fn assert_all_here(events: &mut UnboundedReceiver<PullEvent>) {
    let event = next(events);
    assert!(matches!(event, PullEvent::AllHere), "{event:?}");
}

fn wait_waiting(pull: &Pull, count: u64) {
    let begun = Instant::now();
    while pull.progress().1.faults_waiting != count {
        assert!(begun.elapsed() < LIMIT, "{:?}", pull.progress());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn everything_comes_and_who_waits_comes_first() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    // The last page is here, the one before it was a hole at the source.
    let map = destination.memory.file.map();
    map.write_byte((PAGES - 1) * PAGE, byte(PAGES - 1));
    let (mut pull, mut events) = destination.arm(3, &[(0, PAGES - 2)]);
    assert_eq!(pull.inside().len(), 3);
    assert_eq!(pull.progress().0, (PAGES - 2) * PAGE);
    // These need no connection.
    assert_eq!(destination.get(PAGES - 1), byte(PAGES - 1));
    assert_eq!(destination.get(PAGES - 2), 0);

    // One channel is for faults alone: only these come, and what they cost is known.
    let (ours, theirs) = source.connection(1, &destination.memory.regions());
    let serving = Serving::new(theirs);
    let thread = u32::try_from(destination.target.pid()).unwrap();
    pull.vcpus().name(vec![Vcpu { index: 7, thread }]);
    pull.start(ours).unwrap();
    for page in FAR {
        assert_eq!(destination.get(page), byte(page));
    }
    // Who waited goes on before it is counted.
    wait_waiting(&pull, 0);
    let report = pull.report();
    assert_eq!(pull.progress().1.faults, 3, "{report:?}");
    assert_eq!(report.fault_us_log2.iter().sum::<u64>(), 3);
    // The kernel names the thread as the child itself does, which has only one.
    let [vcpu] = &report.vcpu_faults[..] else {
        panic!("{report:?}")
    };
    assert_eq!((vcpu.vcpu, vcpu.waited.faults), (7, 3), "{report:?}");
    assert_eq!(report.other_faults.faults, 0, "{report:?}");
    assert!(report.prefetch_windows >= 3, "{report:?}");
    assert_eq!(pull.progress().0, (PAGES - 2 - 3) * PAGE);
    drop(serving);

    let (ours, theirs) = source.connection(3, &destination.memory.regions());
    let _serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    loop {
        match next(&mut events) {
            // Of the first connection.
            PullEvent::Broken(_) => {}
            PullEvent::AllHere => break,
            PullEvent::Failed(failure) => panic!("{failure:?}"),
        }
    }
    assert_eq!(pull.progress().0, 0);
    assert_eq!(pull.release().channels.len(), 3, "the channels come back");
    destination.target.write(0, PAGES - 2, 1);
    destination.assert_whole(&[PAGES - 2]);
}

/// A page on each channel comes, then next to nothing but what somebody waits for.
#[test]
fn a_limit_holds_back_what_nobody_waits_for_and_nothing_else() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    destination.memory.background = Some(1);
    let (mut pull, _events) = destination.arm(1, &[(0, PAGES)]);
    let (ours, theirs) = source.connection(3, &destination.memory.regions());
    let _serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    let begun = Instant::now();
    let held_back = loop {
        let lacks = pull.progress().0;
        thread::sleep(A_WHILE);
        if pull.progress().0 == lacks {
            break lacks;
        }
        assert!(begun.elapsed() < LIMIT, "it goes on: {lacks}");
    };
    let came = PAGES * PAGE - held_back;
    assert!(came <= 3 * PAGE, "{came} bytes came");
    let mut missing = Vec::new();
    let received = destination.memory.record.open(false);
    let received = Received::open(&received, ID, &destination.memory.specs).unwrap();
    received.missing(&mut missing);
    let lacks: Vec<_> = missing
        .iter()
        .flat_map(|run| run.first..run.end())
        .collect();
    for page in lacks.iter().step_by(lacks.len() / 8) {
        let begun = Instant::now();
        assert_eq!(destination.get(*page), byte(*page));
        assert!(begun.elapsed() < A_WHILE, "{:?}", begun.elapsed());
    }
    wait_waiting(&pull, 0);
    assert!(pull.progress().0 > 0);
}

#[test]
fn a_guest_that_lacks_nothing_is_whole_at_once() {
    skip_unless!(is_root(), "needs root");
    let destination = Destination::new();
    let (pull, mut events) = destination.arm(1, &[]);
    assert_all_here(&mut events);
    assert_eq!(pull.release().channels.len(), 0);
    assert!(!is_registered(destination.target.pid()));
}

/// A connection that falls silent with reads under way, and one that breaks: who waits goes on to wait, is served over the
/// next one, and what was written meanwhile stays.
#[test]
fn who_waits_outlives_connections() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    let (mut pull, mut events) = destination.arm(1, &[(0, PAGES)]);
    let regions = destination.memory.regions();
    let (ours, theirs) = source.connection(1, &regions);
    let serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    destination.target.write(0, FAR[0], 1);
    let silent = serving.silence();
    let orders = &mut destination.target.orders;
    thread::scope(|scope| {
        let toucher = scope.spawn(|| orders.get(0, FAR[1]));
        wait_waiting(&pull, 1);
        assert_eq!(pull.stop().len(), 1, "a silent channel is not broken");
        drop(silent);
        assert_eq!(pull.progress().1.faults_waiting, 1);

        // The next one breaks before it has answered.
        let (ours, theirs) = source.connection(1, &regions);
        pull.start(ours).unwrap();
        drop(theirs);
        let event = next(&mut events);
        assert!(matches!(event, PullEvent::Broken(_)), "{event:?}");
        assert_eq!(pull.stop().len(), 0);
        thread::sleep(A_WHILE);
        assert!(!toucher.is_finished(), "it waits for a connection");

        let (ours, theirs) = source.connection(1, &regions);
        let serving = Serving::new(theirs);
        pull.start(ours).unwrap();
        assert_eq!(toucher.join().unwrap(), byte(FAR[1]));
        wait_waiting(&pull, 0);
        pull.stop();
        drop(serving);
    });
    let (ours, theirs) = source.connection(2, &regions);
    let _serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    assert_all_here(&mut events);
    pull.release();
    destination.assert_whole(&FAR[..1]);
}

/// A daemon of its own: arms, fetches for who waits, and tells the number inside QEMU.
fn doomed_daemon(destination: &Destination, source: &Source) -> (Child, File) {
    let (tell, mut told) = pipe();
    let path = source.path.clone();
    let child = sys::fork(move || {
        let (mut pull, _events) = destination.arm(1, &[(0, PAGES)]);
        pull.start(dial(path, 1, &destination.memory.regions()))
            .unwrap();
        told.write_all(&pull.inside()[0].to_le_bytes()).unwrap();
        thread::sleep(LIMIT);
    });
    (child, tell)
}

#[test]
fn a_successor_goes_on_where_a_killed_daemon_was() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    let (child, mut told) = doomed_daemon(&destination, &source);
    let serving = Serving::new(source.accept(1));
    let mut inside = [0; 4];
    told.read_exact(&mut inside).unwrap();
    let inside = i32::from_le_bytes(inside);
    assert_eq!(destination.get(FAR[0]), byte(FAR[0]));
    destination.target.write(0, FAR[0], 1);
    let silent = serving.silence();

    let (pid, shares) = (destination.target.pid(), destination.shares(1));
    let Destination { target, memory } = &mut destination;
    let (pull, mut events, _serving) = thread::scope(|scope| {
        let orders = &mut target.orders;
        let toucher = scope.spawn(|| orders.get(0, FAR[1]));
        thread::sleep(A_WHILE);
        drop((child, silent));
        thread::sleep(A_WHILE);
        assert!(!toucher.is_finished(), "it waits for a successor");
        let (mut pull, events) = memory.adopt(pid, shares, &[inside]).unwrap();
        assert_eq!(pull.progress().0, (PAGES - 1) * PAGE, "what came has come");
        wait_waiting(&pull, 1);
        let (ours, theirs) = source.connection(2, &memory.regions());
        let serving = Serving::new(theirs);
        pull.start(ours).unwrap();
        assert_eq!(toucher.join().unwrap(), byte(FAR[1]));
        (pull, events, serving)
    });
    assert_all_here(&mut events);
    pull.release();
    destination.assert_whole(&FAR[..1]);
}

/// Dropped is not released: a session that ends leaves the guest waiting for whoever takes over.
#[test]
fn what_is_dropped_can_be_taken_over_and_nothing_else_can() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    let (pull, _) = destination.arm(2, &[(0, PAGES)]);
    let inside = pull.inside();
    drop(pull);
    assert!(is_registered(destination.target.pid()));
    let pid = destination.target.pid();
    let other = destination
        .memory
        .adopt(pid, destination.shares(1), &inside);
    assert!(other.is_err(), "the guest was shared out in two");

    let taken = destination
        .memory
        .adopt(pid, destination.shares(2), &inside);
    let (mut pull, mut events) = taken.unwrap();
    let (ours, theirs) = source.connection(2, &destination.memory.regions());
    let _serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    assert_all_here(&mut events);
    pull.release();
    destination.assert_whole(&[]);
}

#[test]
fn what_lacks_for_good_is_a_memory_error_and_never_zeroes() {
    skip_unless!(is_root(), "needs root");
    let (mut destination, source) = (Destination::new(), Source::new(PAGES));
    let (mut pull, _events) = destination.arm(2, &[(0, PAGES - 1)]);
    let (ours, theirs) = source.connection(1, &destination.memory.regions());
    let serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    destination.target.write(0, FAR[0], 1);
    pull.stop();
    drop(serving);
    assert_eq!(pull.poison().unwrap(), (PAGES - 2) * PAGE);
    pull.release();
    assert!(!is_registered(destination.target.pid()));
    assert_eq!(destination.get(FAR[0]), WRITTEN, "what was there stays");
    assert_eq!(destination.get(PAGES - 1), 0, "so does a hole");
    let (block, page) = (0, FAR[1]);
    let touched = destination
        .target
        .orders
        .answer(Command::Get { block, page });
    assert!(touched.is_err(), "{touched:?}");
    let status = destination.target.child.wait(0);
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGBUS);
}

/// Its end is for whoever watches QEMU to tell; nothing here hangs or fails because of it.
#[test]
fn a_qemu_that_ends_is_let_go_of() {
    skip_unless!(is_root(), "needs root");
    let (destination, source) = (Destination::new(), Source::new(PAGES));
    let (mut pull, mut events) = destination.arm(1, &[(0, PAGES)]);
    destination.target.child.signal(libc::SIGKILL);
    let ended = libc::__WALL | libc::WNOWAIT | libc::WEXITED;
    destination.target.child.wait(ended);
    let (ours, theirs) = source.connection(2, &destination.memory.regions());
    let _serving = Serving::new(theirs);
    pull.start(ours).unwrap();
    assert_all_here(&mut events);
    pull.release();
}
