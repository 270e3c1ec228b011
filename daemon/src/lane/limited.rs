//! Tests of bandwidth limits on real sockets. A machine that is busy makes everything later, so what may not be exceeded is
//! what is looked at: bytes that have come by a time that is taken after they were counted.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use pagecopy::engine::encoding::Encodings;
use pagecopy::engine::source::Batch;
use pagecopy::host::ram::MappedRam;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use transport::{
    Access, Address, Extent, Greeting, Listener, Region, RegionId, Regions, Security, connect,
};

use super::source::{Command, Encoding, SourceData};
use super::*;
use crate::queue::budget::{Budget, Share};
use crate::sys::region;

const PAGE: u64 = 4096;
/// Pages of the guest, …
const PAGES: u64 = 1024;
/// … and its bytes.
const BYTES: usize = 4 << 20;
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest's memory without a zero in it, and a socket. Both are removed on drop.
struct Source {
    files: [PathBuf; 2],
    ram: MappedRam,
    specs: Arc<[BlockSpec]>,
    listener: Listener,
}

impl Source {
    fn new() -> Source {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pagecopy-limited-{}-{number}", std::process::id());
        let files = ["ram", "sock"].map(|kind| std::env::temp_dir().join(format!("{name}.{kind}")));
        std::fs::write(&files[0], vec![7; BYTES]).unwrap();
        let file = OpenOptions::new().read(true).open(&files[0]).unwrap();
        let spec = BlockSpec {
            name: "ram".into(),
            size: PAGES * PAGE,
            page_size: PAGE,
        };
        Source {
            ram: MappedRam::map([(spec.clone(), Arc::new(file))], false).unwrap(),
            specs: [spec].into(),
            listener: Listener::bind(&Address::Unix(files[1].clone())).unwrap(),
            files,
        }
    }

    /// A data channel of that number: its lane here, and its other end with the memory there.
    fn channel(
        &self,
        number: u16,
        share: &Arc<Share>,
        peer_reads: bool,
    ) -> (Lane<Command>, Box<dyn Channel>, Region) {
        let there = Region::anonymous(BYTES).unwrap();
        let (regions, theirs) = (Regions::new(), Regions::new());
        let access = |peer_writes, peer_reads| Access {
            peer_writes,
            peer_reads,
        };
        let here = region(&self.ram, BlockId(0)).unwrap();
        regions.register(RegionId(0), here, access(false, peer_reads));
        theirs.register(RegionId(0), there.clone(), access(!peer_reads, false));
        let address = Address::Unix(self.files[1].clone());
        let greeting = Greeting {
            session: [9; 16],
            channel: 1,
            channels: 2,
        };
        let (ours, other) = thread::scope(|scope| {
            let dial = || {
                connect(&address, &Security::Plaintext, &greeting, &theirs, PATIENCE)
                    .unwrap()
                    .0
            };
            let dialled = scope.spawn(dial);
            let pending = self.listener.accept(PATIENCE).unwrap().unwrap();
            let admit = |_: &Greeting, _: &transport::Peer| Ok(regions);
            let ours = pending.establish(&Security::Plaintext, PATIENCE, admit);
            (ours.unwrap().2, dialled.join().unwrap())
        });
        let id = ChannelId(number);
        let handler = SourceData::new(
            id,
            Arc::clone(&self.specs),
            Arc::new(self.ram.clone()),
            Encoding::none(),
            Arc::clone(share),
        );
        let lane = Lane::start("data", id, ours, handler, (), |_| ()).unwrap();
        (lane, other, there)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
    }
}

fn batch(id: u64, first: u64, pages: u64) -> Command {
    let run = Run {
        block: BlockId(0),
        first,
        pages,
    };
    Command::Push(Batch {
        id,
        round: 0,
        encodings: Encodings::default(),
        runs: vec![run],
    })
}

/// Takes what comes until `wanted` bytes of pages are there. By no moment more had come than `limit` allows.
fn receive(ends: &mut [(Lane<Command>, Box<dyn Channel>, Region)], begun: Instant, limit: f64) {
    let wanted = PAGES * PAGE;
    loop {
        let mut received = 0;
        for (_, channel, _) in ends.iter_mut() {
            channel.poll(Some(Duration::from_millis(1))).unwrap();
            received += channel.stats().received;
        }
        let passed = begun.elapsed().as_secs_f64();
        let most = limit * (passed + 0.03);
        assert!(received as f64 <= most, "{received} bytes after {passed} s");
        assert!(
            passed < PATIENCE.as_secs_f64(),
            "{received} of {wanted} bytes"
        );
        if received >= wanted {
            return;
        }
    }
}

#[test]
fn what_leaves_all_channels_of_a_migration_is_within_its_limit_and_whole() {
    let source = Source::new();
    let limit = 8_000_000;
    let begun = Instant::now();
    let share = Arc::new(Share::alone(Some(limit)));
    let mut ends = [1, 2].map(|number| source.channel(number, &share, false));
    let half = PAGES / 2;
    for (number, (lane, ..)) in (0..).zip(&ends) {
        lane.give(batch(number, number * half, half));
    }
    receive(&mut ends, begun, limit as f64);
    for (number, (_, _, there)) in (0..).zip(&ends) {
        let mut page = [0; 16];
        there.copy_out((number * half + half - 1) * PAGE, &mut page);
        assert_eq!(page, [7; 16]);
    }
}

#[test]
fn migrations_share_what_the_host_may_send() {
    let source = Source::new();
    let begun = Instant::now();
    let budget = Budget::new(Some(8_000_000));
    let shares = [0, 100].map(|priority| Arc::new(budget.share(priority, None)));
    let mut ends = [&shares[0], &shares[1]].map(|share| source.channel(1, share, false));
    for (number, (lane, ..)) in (0..).zip(&ends) {
        lane.give(batch(number, 0, PAGES / 2));
    }
    receive(&mut ends, begun, 8_000_000.0);
}

#[test]
fn what_somebody_waits_for_is_never_held_back_and_the_rest_is_but_not_for_ever() {
    let source = Source::new();
    // Nothing that anybody would wait for.
    let budget = Budget::new(Some(1));
    let share = Arc::new(budget.share(0, None));
    share.serve();
    let mut ends = [1, 2].map(|number| source.channel(number, &share, true));
    let read = |first: u64| Op::Read {
        region: RegionId(0),
        extents: vec![Extent {
            offset: first * PAGE,
            len: PAGE,
        }],
    };
    // The share is used up once and for all.
    let begun = Instant::now();
    let mut fetch = |end: usize, page| {
        ends[end].1.submit(Token(page), read(page)).unwrap();
        while ends[end].1.poll(Some(PATIENCE)).unwrap() != Some(Event::Fetched(Token(page))) {
            assert!(begun.elapsed() < PATIENCE);
        }
    };
    for page in 0..200 {
        fetch(0, page);
    }
    fetch(1, 0);
    // Once the lane has counted that, it looks at its share before it takes anything more.
    while share.wait().is_none() {
        assert!(begun.elapsed() < PATIENCE);
    }
    for page in 1..60 {
        ends[1].1.submit(Token(page), read(page)).unwrap();
    }
    let mut answered = 0;
    let looked = Instant::now();
    while looked.elapsed() < Duration::from_millis(200) {
        let event = ends[1].1.poll(Some(Duration::from_millis(10))).unwrap();
        answered += u32::from(matches!(event, Some(Event::Fetched(_))));
    }
    assert_eq!(answered, 0);
    // Somebody may have come to wait for one of them.
    while ends[1].1.poll(Some(PATIENCE)).unwrap() != Some(Event::Fetched(Token(1))) {
        assert!(begun.elapsed() < PATIENCE);
    }
}
