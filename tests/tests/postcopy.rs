//! A real guest that runs on RAM that has not all arrived: the host's side of post-copy, without daemons.
//!
//! The device state goes from one QEMU to the other by itself; the pages are copied from file to file, as if by a network,
//! in the order that the puller decides. The guest checks each page that it reads, throughout.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagecopy::engine::MigrationId;
use pagecopy::engine::pull::{Answer, Class, Prefetched, Puller};
use pagecopy::host::pager::{Stretch, UffdPager, forsake, share_out};
use pagecopy::host::ram::MappedRam;
use pagecopy::host::received::Received;
use pagecopy::host::track::TrackedBlock;
use pagecopy::host::{Pager, Placer, Ram, process};
use pagecopy::memory::{BlockId, BlockSpec, Run};
use serde_json::json;
use tests::real::{
    Backing, Hugepages, Machine, Qemu, Role, Scratch, Version, assert_nothing_left_in,
    outside_downtime, skipped,
};

const ID: MigrationId = MigrationId([3; 16]);
/// How long one side may take for a step.
const LIMIT: Duration = Duration::from_secs(30);

/// A guest between two QEMUs: stopped at the source, its RAM final there.
struct Between {
    scratch: Scratch,
    source: Qemu,
    destination: Qemu,
    specs: Vec<BlockSpec>,
    from: File,
    to: MappedRam,
    stretches: Vec<Stretch>,
    lacking: Vec<Run>,
}

impl Between {
    fn new(machine: &Machine, ram: impl Fn(&Qemu, &str) -> PathBuf) -> Between {
        let scratch = Scratch::new();
        let mut source = Qemu::start(&scratch, "source", machine, Role::Source);
        source.serial.wait_filled();
        let mut destination = Qemu::start(&scratch, "destination", machine, Role::Destination);
        for qmp in [&mut source.qmp, &mut destination.qmp] {
            qmp.capabilities(&["events", "x-ignore-shared"]);
        }
        source.qmp.capabilities(&["pause-before-switchover"]);
        let uri = json!({ "uri": format!("unix:{}", scratch.files().join("state").display()) });
        destination
            .qmp
            .execute("migrate-incoming", uri.clone())
            .unwrap();
        source.qmp.execute("migrate", uri).unwrap();
        wait_migration(&mut source, "pre-switchover");

        let (from, to) = (ram(&source, "source"), ram(&destination, "destination"));
        let size = std::fs::metadata(&from).unwrap().len();
        let pid = i32::try_from(destination.pid()).unwrap();
        let mapping = process::find_mapping(pid, &to, size).unwrap();
        let spec = BlockSpec {
            name: "ram0".to_owned(),
            size,
            page_size: mapping.page_size,
        };
        let open = |path: &Path, writable| {
            MappedRam::open(&[(spec.clone(), path.to_owned())], writable).unwrap()
        };
        let to = open(&to, true);
        to.clear().unwrap();
        let mut lacking = Vec::new();
        open(&from, false).populated(&mut lacking).unwrap();
        let block = TrackedBlock {
            block: BlockId(0),
            address: mapping.address,
            len: mapping.len,
            page_size: mapping.page_size,
        };
        Between {
            source,
            destination,
            specs: vec![spec],
            from: File::open(from).unwrap(),
            to,
            stretches: share_out(&[block], 1).remove(0),
            lacking,
            scratch,
        }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.destination.pid()).unwrap()
    }

    fn received(&self, new: bool) -> File {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create_new(new);
        options.open(self.scratch.ram().join("received")).unwrap()
    }

    /// A pager and what it serves from, at the beginning. Faults on pages that the source never had are answered, too.
    fn begin(&self) -> Server {
        let received = Received::create(&self.received(true), ID, &self.specs).unwrap();
        let puller = Puller::new(&self.specs, &self.lacking).unwrap();
        let pager = UffdPager::arm(self.pid(), self.stretches.clone(), None).unwrap();
        self.server(received, puller, pager)
    }

    /// The same after the one before has died: nothing is known but what is in the file, and inside QEMU.
    fn go_on(&self, inside: i32) -> Server {
        let received = Received::open(&self.received(false), ID, &self.specs).unwrap();
        let mut puller_lacks = Vec::new();
        for run in &self.lacking {
            let lacks = (run.first..run.end()).filter(|page| !received.contains(run.block, *page));
            puller_lacks.extend(lacks.map(|first| Run {
                block: run.block,
                first,
                pages: 1,
            }));
        }
        let puller = Puller::new(&self.specs, &puller_lacks).unwrap();
        let pager = UffdPager::adopt(self.pid(), self.stretches.clone(), inside).unwrap();
        self.server(received, puller, pager)
    }

    fn server(&self, received: Received, puller: Puller, pager: UffdPager) -> Server {
        Server {
            received,
            puller,
            pager,
            from: self.from.try_clone().unwrap(),
            to: self.to.clone(),
            memory: std::fs::OpenOptions::new()
                .write(true)
                .open("/proc/self/mem")
                .unwrap(),
            page: self.specs[0].page_size,
            faults: 0,
            rested: Instant::now(),
        }
    }

    /// QEMU loads the device state, with its page faults served by `server`, and the guest runs on.
    fn hand_over(&mut self, server: &mut Server) {
        let loaded = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| server.serve(None, || loaded.load(Ordering::SeqCst)));
            let state = json!({ "state": "pre-switchover" });
            self.source.qmp.execute("migrate-continue", state).unwrap();
            wait_migration(&mut self.source, "completed");
            wait_migration(&mut self.destination, "completed");
            self.destination.qmp.execute("cont", json!({})).unwrap();
            loaded.store(true, Ordering::SeqCst);
        });
    }

    /// Everything has arrived, and the guest finds nothing wrong.
    fn check(&mut self, server: Server) {
        let Server {
            puller,
            pager,
            faults,
            ..
        } = server;
        assert!(puller.is_whole());
        pager.release().unwrap();
        self.destination.serial.wait_beats(200);
        self.destination.serial.verify();
        self.source.serial.assert_whole();
        assert_eq!(self.source.qmp.status(), "postmigrate");
        assert_nothing_left_in(self.destination.pid());
        assert!(faults >= 5, "the guest ran before its memory came");
        let Prefetched { windows, hits } = puller.prefetched();
        println!(
            "downtime {:?} from outside; {faults} faults; {hits} of {windows} windows were of use",
            outside_downtime(&self.source.serial, &self.destination.serial),
        );
    }
}

fn wait_migration(qemu: &mut Qemu, status: &str) {
    qemu.qmp
        .wait_event("MIGRATION", LIMIT, |data| data["status"] == status);
}

/// Serves a guest's faults, and fetches the rest.
struct Server {
    received: Received,
    puller: Puller,
    pager: UffdPager,
    from: File,
    to: MappedRam,
    /// This process's memory as a file: what is written there at an address of the mapping is in the RAM file. (A file on
    /// hugetlbfs itself cannot be written.)
    memory: File,
    page: u64,
    /// Faults that waited for a page to be fetched.
    faults: u64,
    /// When some of the rest was fetched last.
    rested: Instant,
}

impl Server {
    /// Serves until `enough`; the rest is fetched meanwhile with a pause of `pace` between requests, if there is one.
    fn serve(&mut self, pace: Option<Duration>, enough: impl Fn() -> bool) {
        let mut faults = Vec::new();
        while !enough() {
            let wait = Duration::from_millis(1);
            self.pager.faults(&mut faults, wait).unwrap();
            for fault in faults.drain(..) {
                match self.puller.fault(fault.block, fault.page) {
                    Answer::Map => self.map_here(fault.block, fault.page),
                    Answer::Fetch | Answer::Wait => self.faults += 1,
                }
            }
            while self.fetch(Class::Neighbour) {}
            if pace.is_some_and(|pace| self.rested.elapsed() >= pace) {
                self.fetch(Class::Rest);
                self.rested = Instant::now();
            }
        }
    }

    /// A page that is here, or that the source never had: then it is zero.
    fn map_here(&self, block: BlockId, page: u64) {
        let run = Run {
            block,
            first: page,
            pages: 1,
        };
        if !self.received.contains(block, page) {
            self.place(&vec![0; usize::try_from(self.page).unwrap()], page);
            self.received.insert(run).unwrap();
        }
        self.pager.map(run).unwrap();
    }

    /// Puts bytes into the destination's RAM file, from page `first` on.
    fn place(&self, bytes: &[u8], first: u64) {
        let (base, _, _alive) = self.to.mapping(BlockId(0)).unwrap();
        let address = base as u64 + first * self.page;
        self.memory.write_all_at(bytes, address).unwrap();
    }

    fn fetch(&mut self, class: Class) -> bool {
        let Some(request) = self.puller.next(class) else {
            return false;
        };
        for run in &request.runs {
            let mut bytes = vec![0; usize::try_from(run.pages * self.page).unwrap()];
            self.from
                .read_exact_at(&mut bytes, run.first * self.page)
                .unwrap();
            self.place(&bytes, run.first);
        }
        let arrival = self.puller.arrived(request.id).unwrap();
        for run in arrival.runs {
            self.received.insert(run).unwrap();
            match arrival.held {
                Some((block, page))
                    if block == run.block && (run.first..run.end()).contains(&page) =>
                {
                    for (first, end) in [(run.first, page), (page + 1, run.end())] {
                        if first < end {
                            let pages = end - first;
                            self.pager
                                .map(Run {
                                    first,
                                    pages,
                                    ..run
                                })
                                .unwrap();
                        }
                    }
                }
                _ => self.pager.map(run).unwrap(),
            }
        }
        true
    }

    /// Serves until all is here.
    fn finish(&mut self) {
        let begun = Instant::now();
        while !self.puller.is_whole() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
            let once = AtomicBool::new(false);
            self.serve(Some(Duration::from_millis(5)), || {
                once.swap(true, Ordering::SeqCst)
            });
        }
    }
}

fn on_tmpfs(qemu: &Qemu, _: &str) -> PathBuf {
    qemu.ram().to_owned()
}

/// From the source's stop to the last page.
fn move_and_check(machine: &Machine, ram: impl Fn(&Qemu, &str) -> PathBuf) {
    let mut between = Between::new(machine, ram);
    let mut server = between.begin();
    between.hand_over(&mut server);
    server.finish();
    between.check(server);
}

#[test]
fn a_guest_runs_on_memory_that_has_not_arrived() {
    let machine = Machine::new(Version::V10_0, 128, "rate=50 set=32");
    move_and_check(&machine, on_tmpfs);
}

#[test]
fn two_vcpus_and_qemu_7_2() {
    let mut machine = Machine::new(Version::V7_2, 128, "rate=50 set=32");
    machine.vcpus = 2;
    move_and_check(&machine, on_tmpfs);
}

/// Whoever serves dies again and again, with faults read and not answered; each successor knows only what is in the file and
/// inside QEMU.
#[test]
fn servers_die_and_the_guest_lives() {
    let machine = Machine::new(Version::V10_0, 128, "rate=50 set=32");
    let mut between = Between::new(&machine, on_tmpfs);
    let mut server = between.begin();
    between.hand_over(&mut server);
    let (mut deaths, mut faults) = (0, 0);
    while deaths < 20 {
        let until = Instant::now() + Duration::from_millis(10 + 7 * deaths % 30);
        server.serve(Some(Duration::from_millis(10)), || Instant::now() >= until);
        // A fault that is read and never answered, and a request that is under way.
        let mut lost = Vec::new();
        server
            .pager
            .faults(&mut lost, Duration::from_millis(20))
            .unwrap();
        server.puller.next(Class::Rest);
        faults += server.faults;
        let inside = server.pager.inside();
        drop(server);
        // QEMU goes on meanwhile.
        assert_eq!(between.destination.qmp.status(), "running");
        server = between.go_on(inside);
        deaths += 1;
    }
    server.finish();
    server.faults += faults;
    between.check(server);
}

/// The guard is real: the same guest, whose server dies just as above and without the descriptor inside QEMU, reads zeroes
/// where its memory has not come, and finds that out.
#[test]
fn without_the_descriptor_inside_the_guest_is_corrupted() {
    // It looks at all of its memory, so it comes to what lacks.
    let machine = Machine::new(Version::V10_0, 128, "rate=50 set=32");
    let mut between = Between::new(&machine, on_tmpfs);
    let mut server = between.begin();
    between.hand_over(&mut server);
    let beats = between.destination.serial.beats() + 100;
    server.serve(None, || between.destination.serial.beats() >= beats);
    assert!(!server.puller.is_whole());
    assert_eq!(forsake(between.pid()).unwrap(), 1);
    // Its page faults still wait for the server's own.
    server.serve(Some(Duration::from_millis(10)), || {
        between.destination.serial.beats() >= beats + 100
    });
    between.destination.serial.assert_whole();
    assert!(!server.puller.is_whole());
    drop(server);
    println!("{}", between.destination.serial.wait_corrupt());
}

#[test]
fn a_guest_on_huge_pages_runs_on_memory_that_has_not_arrived() {
    let scratch = Scratch::new();
    let huge = match Hugepages::reserve(2 * 64, &scratch.folder("huge")) {
        Ok(huge) => huge,
        Err(reason) => return skipped(&reason),
    };
    let backing = Backing::Hugetlbfs(huge.mount().to_owned());
    let machine = Machine::new(Version::V10_0, 128, "rate=50 set=32").with_backing(&backing);
    move_and_check(&machine, |_, name| {
        huge.mount().join(format!("{name}-ram0"))
    });
}
