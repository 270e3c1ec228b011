//! A queue pair that breaks where it likes, beside a real socket: what is written, read and sent arrives once and in order.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::thread;

use bytes::Bytes;
use transport::rdma::{Memory, Settings};
use transport::{
    Access, Address, Extent, Greeting, Listener, Peer, Region, RegionId, Regions, Security, connect,
};

use super::*;

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
/// What the dialling side writes, and what the other reads.
const WRITTEN: RegionId = RegionId(0);
const READ: RegionId = RegionId(1);
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A reliable connection as the devices see it.
#[derive(Default)]
struct Wire {
    /// Handed to a side's device, and not carried out.
    posted: [VecDeque<(Token, Op)>; 2],
    /// What a side's device reports.
    completed: [VecDeque<Event>; 2],
    /// Messages in a side's memory.
    arrived: [VecDeque<Bytes>; 2],
    /// Which side knows that it is broken.
    knows: [bool; 2],
    broken: bool,
    memory: Vec<[Region; 2]>,
}

impl Wire {
    /// Carries out what a side's device is to do next. The answer may be lost later.
    fn carry_out(&mut self, side: usize) {
        if self.broken {
            return;
        }
        let Some((token, op)) = self.posted[side].pop_front() else {
            return;
        };
        let event = match op {
            Op::Send(message) => {
                self.arrived[1 - side].push_back(message);
                Event::Sent(token)
            }
            Op::Write { region, extents } => {
                self.copy(region, &extents, side, 1 - side);
                Event::Sent(token)
            }
            Op::Read { region, extents } => {
                self.copy(region, &extents, 1 - side, side);
                Event::Fetched(token)
            }
        };
        self.completed[side].push_back(event);
    }

    fn copy(&self, region: RegionId, extents: &[Extent], from: usize, to: usize) {
        let ends = &self.memory[usize::try_from(region.0).unwrap()];
        for extent in extents {
            let mut bytes = vec![0; usize::try_from(extent.len).unwrap()];
            ends[from].copy_out(extent.offset, &mut bytes);
            ends[to].copy_in(extent.offset, &bytes);
        }
    }

    /// No work goes on, and reports under way are lost. These sides notice by themselves.
    fn end(&mut self, notice: [bool; 2]) {
        self.broken = true;
        for side in [0, 1] {
            self.knows[side] |= notice[side];
            self.posted[side].clear();
            self.completed[side].clear();
        }
    }
}

struct Fake {
    wire: Arc<Mutex<Wire>>,
    side: usize,
}

impl Fake {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap()
    }
}

impl Channel for Fake {
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        let mut wire = self.wire();
        if wire.knows[self.side] {
            return Err(SubmitError::Closed);
        }
        if !wire.broken {
            wire.posted[self.side].push_back((token, op));
        }
        Ok(())
    }

    fn poll(&mut self, _timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let mut wire = self.wire();
        if let Some(event) = wire.completed[self.side].pop_front() {
            return Ok(Some(event));
        }
        if let Some(message) = wire.arrived[self.side].pop_front() {
            return Ok(Some(Event::Message(message)));
        }
        if wire.knows[self.side] {
            return Err(Error::Io {
                what: "the queue pair",
                kind: std::io::ErrorKind::TimedOut,
                message: "it broke".to_owned(),
            });
        }
        Ok(None)
    }

    fn pause(&mut self, _paused: bool) {}

    fn waker(&self) -> Waker {
        Waker::noop().clone()
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn kind(&self) -> &'static str {
        "rdma"
    }
}

/// Without one end there is no connection.
impl Drop for Fake {
    fn drop(&mut self) {
        self.wire().end([true; 2]);
    }
}

impl Rail for Fake {
    fn break_off(&mut self) {
        let mut notice = [false; 2];
        notice[self.side] = true;
        self.wire().end(notice);
    }
}

/// Numbers that only the seed decides.
struct Dice(u64);

impl Dice {
    fn one_in(&mut self, sides: u64) -> bool {
        self.throw(sides) == 0
    }

    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

/// Two ends of a channel, the dialling one first, with the memory at both, and the queue pair between them.
struct Pair {
    ends: [Spared; 2],
    berths: [Arc<Berth>; 2],
    wire: Arc<Mutex<Wire>>,
    memory: Vec<[Region; 2]>,
    _calls: mpsc::Receiver<()>,
    socket: PathBuf,
}

impl Pair {
    fn new() -> Pair {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pagecopy-spared-{}-{number}.sock", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let regions = [Regions::new(), Regions::new()];
        let mut memory = Vec::new();
        for region in [WRITTEN, READ] {
            let ends = [0, 1].map(|side: usize| {
                let memory = Region::anonymous(usize::try_from(PAGES * PAGE).unwrap()).unwrap();
                let access = Access {
                    peer_writes: side == 1 && region == WRITTEN,
                    peer_reads: side == 0 && region == READ,
                };
                regions[side].register(region, memory.clone(), access);
                memory
            });
            memory.push(ends);
        }
        let tcp = sockets(&socket, &regions);
        let (bell, calls) = mpsc::channel();
        let berths = [0, 1].map(|side: usize| {
            let memory = Memory::new(&regions[side], Settings::default());
            Berth::new(memory, bell.clone())
        });
        let (wire, rails) = rails(&memory);
        let mut dials = [true, false].into_iter();
        let mut rails = rails.into_iter().zip(tcp).zip(&berths);
        let ends = [(); 2].map(|()| {
            let ((rail, tcp), berth) = rails.next().unwrap();
            let dials = dials.next().unwrap();
            Spared::new(
                Box::new(rail),
                tcp,
                dials,
                Arc::clone(berth),
                Arc::new(drop),
            )
        });
        Pair {
            ends,
            berths,
            wire,
            memory,
            _calls: calls,
            socket,
        }
    }

    /// What somebody out there does to the queue pair: lets it work on, breaks it, makes another.
    fn weather(&mut self, dice: &mut Dice, breaks: u64) {
        let mut wire = self.wire.lock().unwrap();
        for side in [0, 1] {
            if dice.one_in(2) {
                wire.carry_out(side);
            }
        }
        if !wire.broken && dice.one_in(breaks) {
            let first = dice.one_in(2);
            wire.end([first, !first || dice.one_in(2)]);
        }
        drop(wire);
        if self.berths.iter().all(|berth| berth.wants()) && dice.one_in(20) {
            let (wire, [here, there]) = rails(&self.memory);
            self.wire = wire;
            self.berths[0].put(Box::new(here));
            // Its peer's may be late, or never be known of.
            if !dice.one_in(10) {
                self.berths[1].put(Box::new(there));
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn rails(memory: &[[Region; 2]]) -> (Arc<Mutex<Wire>>, [Fake; 2]) {
    let wire = Arc::new(Mutex::new(Wire {
        memory: memory.to_vec(),
        ..Wire::default()
    }));
    let fakes = [0, 1].map(|side| Fake {
        wire: Arc::clone(&wire),
        side,
    });
    (wire, fakes)
}

fn sockets(path: &std::path::Path, regions: &[Regions; 2]) -> [Box<dyn Channel>; 2] {
    let address = Address::Unix(path.to_owned());
    let listener = Listener::bind(&address).unwrap();
    let greeting = Greeting {
        session: [9; 16],
        channel: 1,
        channels: 2,
    };
    let plain = Security::Plaintext;
    thread::scope(|scope| {
        let dial = || connect(&address, &plain, &greeting, &regions[0], PATIENCE);
        let dialled = scope.spawn(dial);
        let pending = listener.accept(PATIENCE).unwrap().unwrap();
        let admit = |_: &Greeting, _: &Peer| Ok(regions[1].clone());
        let there = pending.establish(&plain, PATIENCE, admit);
        [dialled.join().unwrap().unwrap().0, there.unwrap().2]
    })
}

fn page(number: u64) -> Vec<Extent> {
    vec![Extent {
        offset: number * PAGE,
        len: PAGE,
    }]
}

/// The version of a page, as its first bytes say.
fn version(region: &Region, number: u64) -> u64 {
    let mut bytes = [0; 8];
    region.copy_out(number * PAGE, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// One side writes pages, each time with a higher version, and says now and then which has what; the other looks at that, and
/// reads pages. Meanwhile the queue pair breaks and comes back.
fn run(seed: u64, breaks: u64) -> usize {
    let mut dice = Dice(seed);
    let mut pair = Pair::new();
    let steps = 600;
    for number in 0..PAGES {
        let filled = vec![u8::try_from(number).unwrap() + 1; usize::try_from(PAGE).unwrap()];
        pair.memory[1][0].copy_in(number * PAGE, &filled);
    }
    let (mut next, mut versions) = (0_u64, BTreeMap::<u64, u64>::new());
    let mut open = [BTreeSet::<u64>::new(), BTreeSet::new()];
    let (mut said, mut heard) = (VecDeque::<BTreeMap<u64, u64>>::new(), 0_u64);
    let (mut seen, mut told, mut falls) = (BTreeMap::<u64, u64>::new(), 0_u64, 0);
    let end = Instant::now() + PATIENCE;
    let mut over = ["rdma"; 2];
    while next < steps || open.iter().any(|open| !open.is_empty()) || heard < told {
        assert!(
            Instant::now() < end,
            "seed {seed}: {open:?}, {heard} of {told}"
        );
        pair.weather(&mut dice, breaks);
        if next < steps && open[0].len() < 20 {
            let number = dice.throw(PAGES);
            let op = if dice.one_in(4) {
                Op::Send(Bytes::copy_from_slice(
                    &[&[0xff, 0xff], &told.to_le_bytes()[..]].concat(),
                ))
            } else {
                pair.memory[0][0].copy_in(number * PAGE, &(next + 1).to_le_bytes());
                Op::Write {
                    region: WRITTEN,
                    extents: page(number),
                }
            };
            let is_message = matches!(op, Op::Send(_));
            if pair.ends[0].submit(Token(next), op).is_ok() {
                open[0].insert(next);
                if is_message {
                    said.push_back(versions.clone());
                    told += 1;
                } else {
                    versions.insert(number, next + 1);
                }
            }
            next += 1;
        }
        if next < steps && open[1].len() < 8 && dice.one_in(3) {
            let op = Op::Read {
                region: READ,
                extents: page(dice.throw(PAGES)),
            };
            if pair.ends[1].submit(Token(next), op).is_ok() {
                open[1].insert(next);
            }
            next += 1;
        }
        for side in [0, 1] {
            match pair.ends[side].poll(Some(Duration::ZERO)) {
                Ok(Some(Event::Sent(token) | Event::Fetched(token))) => {
                    assert!(
                        open[side].remove(&token.0),
                        "seed {seed}: {token:?} ended twice"
                    );
                }
                Ok(Some(Event::Message(message))) => {
                    assert_eq!(message[2..], heard.to_le_bytes(), "seed {seed}");
                    heard += 1;
                    for (number, at_least) in said.pop_front().unwrap() {
                        let found = version(&pair.memory[0][1], number);
                        assert!(
                            found >= at_least,
                            "seed {seed}: page {number} at message {heard}"
                        );
                    }
                }
                Ok(None) => {}
                Err(error) => panic!("seed {seed}: {error}"),
            }
            let kind = pair.ends[side].kind();
            falls += usize::from(kind != "rdma" && over[side] == "rdma");
            over[side] = kind;
        }
        for number in 0..PAGES {
            let found = version(&pair.memory[0][1], number);
            let before = seen.insert(number, found).unwrap_or(0);
            assert!(
                found >= before,
                "seed {seed}: page {number} went back to {found} from {before}"
            );
        }
    }
    for (number, last) in versions {
        assert_eq!(
            version(&pair.memory[0][1], number),
            last,
            "seed {seed}: page {number}"
        );
    }
    falls
}

#[test]
fn everything_arrives_once_and_in_order_however_often_the_queue_pair_breaks() {
    let falls: usize = (0..20).map(|seed| run(seed, 40 + 3 * seed)).sum();
    // That it broke and came back is what this is about.
    println!("{falls} falls");
    assert!(falls > 20, "{falls}");
}

#[test]
fn a_queue_pair_that_never_breaks_is_all_that_is_used() {
    assert_eq!(run(1, u64::MAX), 0);
}

/// Words of a rail's that are out of place.
#[test]
fn a_peer_that_says_what_it_may_not_is_told_off() {
    let hostile = [
        (true, Message::RdmaBroken { received: 1 }),
        (true, Message::RdmaBack),
        (true, Message::RdmaTaken { taken: true }),
        (false, Message::RdmaTaken { taken: false }),
        (false, Message::Loaded),
    ];
    for (dials, message) in hostile {
        let mut pair = Pair::new();
        let (victim, hostile) = if dials { (0, 1) } else { (1, 0) };
        pair.ends[hostile].say(&message).unwrap();
        let end = Instant::now() + PATIENCE;
        let error = loop {
            assert!(Instant::now() < end, "{message:?}");
            // It goes out only when the channel over TCP is looked at.
            let _ = pair.ends[hostile].tcp.poll(Some(Duration::ZERO));
            if let Err(error) = pair.ends[victim].poll(Some(Duration::ZERO)) {
                break error;
            }
        };
        assert!(
            matches!(error, Error::PeerMisbehaved(_)),
            "{message:?}: {error}"
        );
    }
}

/// The host that is called has no place for the call: the other goes on over TCP.
#[test]
fn a_way_back_that_the_other_does_not_know_of_is_given_up() {
    let mut pair = Pair::new();
    pair.wire.lock().unwrap().end([true, true]);
    let (_, [alone, _]) = rails(&pair.memory);
    let end = Instant::now() + PATIENCE;
    let mut left = Some(alone);
    let (mut asked, mut back) = (false, false);
    while !(asked && back) {
        assert!(Instant::now() < end, "asked: {asked}");
        for spared in &mut pair.ends {
            spared.poll(Some(Duration::ZERO)).unwrap();
        }
        if pair.berths[0].wants()
            && let Some(alone) = left.take()
        {
            pair.berths[0].put(Box::new(alone));
        }
        asked |= matches!(pair.ends[0].way, Way::Returning { said: true, .. });
        back = asked && matches!(pair.ends[0].way, Way::Tcp);
    }
    pair.ends[0]
        .submit(Token(0), Op::Send(Bytes::from_static(&[0xff, 0xff])))
        .unwrap();
    while !matches!(
        pair.ends[1].poll(Some(Duration::ZERO)).unwrap(),
        Some(Event::Message(_))
    ) {
        assert!(Instant::now() < end);
        pair.ends[0].poll(Some(Duration::ZERO)).unwrap();
    }
}
