//! Both engines in one world: virtual time, a network with latency, guests whose pages are numbers, journals that survive
//! crashes. Everything is deterministic, so a run can be repeated and disturbed at any of its steps.

mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use pagecopy::engine::destination::{self, Destination};
use pagecopy::engine::event::{Finished, Report, State};
use pagecopy::engine::journal::{self, Outcome, Record, Side};
use pagecopy::engine::source::{self, Pushed, Source};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Time, Timeouts};
use pagecopy::limits::DIGEST_CHUNK;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use pagecopy::wire::{Message, Standing};

pub use trouble::Trouble;

pub const PAGE: u64 = 4096;
pub const ID: MigrationId = MigrationId([9; 16]);
const LATENCY: Duration = Duration::from_micros(200);
const WORK: Duration = Duration::from_millis(1);

/// What is under way.
#[derive(Clone, Debug)]
enum Event {
    ToSource(source::Input),
    ToDestination(destination::Input),
    /// A batch lands at the destination: pages with the content they had when they were read.
    Land(Vec<(usize, u64)>),
    Reconnect,
    RestartSource,
    GuestWrites,
}

/// The world.
pub struct Pair {
    pub now: Time,
    pub steps: u64,
    pub source: Option<Source>,
    pub destination: Option<Destination>,
    pub source_runs: bool,
    pub destination_runs: bool,
    pub source_pages: Vec<u64>,
    pub destination_pages: Vec<u64>,
    pub finished: Vec<Finished>,
    pub destination_finished: Option<(State, Option<Failure>)>,
    pub notices: Vec<String>,
    pub rounds: u32,
    /// Pages that the guest writes every millisecond; it wanders over them.
    pub writes_per_ms: usize,
    /// Pages among which it writes.
    pub working_set: usize,
    /// Spoils a page on its way, for `--verify` to find.
    pub spoil: Option<usize>,
    pub network_gone: bool,
    /// Records that a disk refuses, and whether they are on it all the same.
    pub refused: Vec<Record>,
    pub refused_but_there: bool,
    /// QEMU's answers to `RunGuest` and `ResumeGuest` while this is set.
    pub qemu_refuses: bool,
    setup: source::Setup,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    dirty: BTreeSet<usize>,
    written: u64,
    link: bool,
    source_journal: Vec<u8>,
    destination_journal: Vec<u8>,
    /// When each data channel has carried what was given to it.
    lanes: Vec<Time>,
}

pub fn blocks(pages: usize) -> Vec<BlockSpec> {
    vec![BlockSpec {
        name: "ram".into(),
        size: pages as u64 * PAGE,
        page_size: PAGE,
    }]
}

impl Pair {
    pub fn new(pages: usize, change: impl FnOnce(&mut source::Setup)) -> Pair {
        let mut setup = source::Setup {
            id: ID,
            vm: "guest".into(),
            host: "alpha".into(),
            blocks: blocks(pages),
            direct_io: false,
            data_channels: 2,
            fixed_downtime: Duration::from_millis(10),
            options: source::Options {
                downtime_limit: Duration::from_millis(300),
                bandwidth_limit: None,
                max_rounds: 30,
                timeout: None,
                verify: false,
                quit_source: false,
            },
            timeouts: Timeouts::default(),
        };
        change(&mut setup);
        let now = Time(1_000_000_000);
        let arriving = destination::Setup {
            host: "beta".into(),
            vm: "guest".into(),
            blocks: blocks(pages),
            data_channels: 2,
            timeouts: Timeouts::default(),
        };
        let begun = |side| Record::Begun {
            id: ID,
            side,
            vm: "guest".into(),
            qmp: "/qmp".into(),
            peer: "peer".into(),
        };
        let mut pair = Pair {
            now,
            steps: 0,
            source: Some(Source::new(setup.clone(), now)),
            destination: Some(Destination::new(arriving, now)),
            source_runs: true,
            destination_runs: false,
            // Every third page is a hole.
            source_pages: (0..pages)
                .map(|p| if p % 3 == 0 { 0 } else { p as u64 + 1 })
                .collect(),
            destination_pages: vec![0; pages],
            finished: Vec::new(),
            destination_finished: None,
            notices: Vec::new(),
            rounds: 0,
            writes_per_ms: 0,
            working_set: pages,
            spoil: None,
            network_gone: false,
            refused: Vec::new(),
            refused_but_there: false,
            qemu_refuses: false,
            setup,
            queue: BTreeMap::new(),
            sequence: 0,
            dirty: BTreeSet::new(),
            written: 0,
            link: true,
            source_journal: journal::encode(&begun(Side::Source)),
            destination_journal: journal::encode(&begun(Side::Destination)),
            lanes: vec![now; 2],
        };
        pair.after(WORK, Event::GuestWrites);
        pair.drain();
        pair
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.at(self.now.after(delay), event);
    }

    fn at(&mut self, time: Time, event: Event) {
        self.sequence += 1;
        self.queue.insert((time, self.sequence), event);
    }

    /// The next thing happens. False: nothing will happen any more.
    pub fn step(&mut self) -> bool {
        let next_event = self.queue.keys().next().map(|(time, _)| *time);
        let source = self.source.as_ref().and_then(Source::poll_timeout);
        let destination = self
            .destination
            .as_ref()
            .and_then(Destination::poll_timeout);
        let Some(next) = [next_event, source, destination]
            .into_iter()
            .flatten()
            .min()
        else {
            return false;
        };
        self.now = self.now.max(next);
        self.steps += 1;
        let ticked = next_event.is_none_or(|time| time > self.now);
        if !ticked {
            let (_, event) = self.queue.pop_first().unwrap();
            self.happen(event);
        } else {
            if source.is_some_and(|time| time <= self.now) {
                self.tell_source(source::Input::Tick);
            }
            if destination.is_some_and(|time| time <= self.now) {
                self.tell_destination(destination::Input::Tick);
            }
        }
        self.drain();
        assert!(
            !(self.source_runs && self.destination_runs),
            "two guests run"
        );
        true
    }

    /// Runs until both sides have ended, or for so many steps.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            if self.ended() || !self.step() {
                return;
            }
        }
        panic!(
            "not over after {steps} steps: {:?}, {:?}",
            self.finished, self.notices
        );
    }

    pub fn ended(&self) -> bool {
        let source = self
            .finished
            .last()
            .is_some_and(|finished| finished.state != State::InDoubt);
        source && (self.destination.is_none() || self.destination_finished.is_some())
    }

    pub fn result(&self) -> &Finished {
        self.finished.last().unwrap()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToSource(source::Input::GuestStopped) => {
                self.source_runs = false;
                self.tell_source(source::Input::GuestStopped);
            }
            Event::ToSource(source::Input::GuestResumed) if self.qemu_refuses => {
                self.tell_source(source::Input::ResumeFailed(qemu_said_no()));
            }
            Event::ToDestination(destination::Input::GuestRunning) if self.qemu_refuses => {
                self.tell_destination(destination::Input::QemuFailed(qemu_said_no()));
            }
            Event::ToSource(source::Input::GuestResumed) => {
                self.source_runs = true;
                self.tell_source(source::Input::GuestResumed);
            }
            Event::ToSource(source::Input::Journaled(record)) => {
                let input = if self.write(Side::Source, &record) {
                    source::Input::Journaled(record)
                } else {
                    source::Input::JournalFailed(record, disk_full())
                };
                self.tell_source(input);
            }
            Event::ToSource(input) => self.tell_source(input),
            Event::ToDestination(destination::Input::GuestRunning) => {
                self.destination_runs = true;
                self.tell_destination(destination::Input::GuestRunning);
            }
            Event::ToDestination(destination::Input::Journaled(record)) => {
                let input = if self.write(Side::Destination, &record) {
                    destination::Input::Journaled(record)
                } else {
                    destination::Input::JournalFailed(record, disk_full())
                };
                self.tell_destination(input);
            }
            Event::ToDestination(input) => self.tell_destination(input),
            Event::Land(pages) => {
                for (page, content) in pages {
                    self.destination_pages[page] = content;
                }
            }
            Event::Reconnect => {
                let failed = source::Input::ReconnectFailed("no route".into());
                self.link = !self.network_gone;
                self.tell_source(if self.link {
                    source::Input::Reconnected
                } else {
                    failed
                });
            }
            Event::RestartSource => {
                let outcome =
                    journal::outcome(&journal::decode(&self.source_journal).unwrap().records);
                self.source = Some(Source::recover(self.setup.clone(), outcome, self.now));
            }
            Event::GuestWrites => self.guest_writes(),
        }
    }

    /// Writes a record. False: the disk refuses.
    fn write(&mut self, side: Side, record: &Record) -> bool {
        let refused = self.refused.contains(record);
        if !refused || self.refused_but_there {
            let journal = match side {
                Side::Source => &mut self.source_journal,
                Side::Destination => &mut self.destination_journal,
            };
            journal.extend(journal::encode(record));
        }
        !refused
    }

    fn guest_writes(&mut self) {
        if self.source_runs {
            for _ in 0..self.writes_per_ms {
                self.written += 1;
                let page = usize::try_from(self.written).unwrap() * 7 % self.working_set;
                self.source_pages[page] = 1 << 32 | self.written;
                self.dirty.insert(page);
            }
        }
        if self.writes_per_ms > 0 && !self.ended() {
            self.after(WORK, Event::GuestWrites);
        }
    }

    pub fn tell_source(&mut self, input: source::Input) {
        if let Some(source) = &mut self.source {
            source.handle(self.now, input);
        }
    }

    pub fn tell_destination(&mut self, input: destination::Input) {
        if let Some(destination) = &mut self.destination {
            destination.handle(self.now, input);
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.source.as_mut().and_then(Source::poll) {
            self.source_output(output);
        }
        while let Some(output) = self.destination.as_mut().and_then(Destination::poll) {
            self.destination_output(output);
        }
    }

    /// Every message crosses as bytes.
    fn crossing(message: &Message) -> Message {
        Message::decode(&message.encode()).unwrap()
    }

    fn source_output(&mut self, output: source::Output) {
        use source::{Input, Output};
        match output {
            Output::Send(Message::Query { id }) if self.link => self.answer_query(id),
            Output::Send(message) if self.link => {
                let message = Pair::crossing(&message);
                self.after(
                    LATENCY,
                    Event::ToDestination(destination::Input::Message(message)),
                );
            }
            Output::SendOn(channel, Message::Barrier { round }) if self.link => {
                let at = self.lane(channel).after(LATENCY);
                let barrier = destination::Input::Barrier {
                    channel,
                    round,
                    zero_bytes: 0,
                };
                self.at(at, Event::ToDestination(barrier));
            }
            Output::Push { channel, batch } => self.push(channel, &batch),
            Output::Attach => {
                let populated = self.populated();
                self.dirty.clear();
                let attached = Input::Attached {
                    stopped: Duration::from_micros(300),
                    populated,
                };
                self.after(WORK, Event::ToSource(attached));
            }
            Output::Scan { holes } => {
                let dirty = std::mem::take(&mut self.dirty)
                    .into_iter()
                    .map(run)
                    .collect();
                let populated = holes.then(|| self.populated());
                let scanned = Input::Scanned {
                    dirty,
                    populated,
                    took: WORK,
                };
                self.after(WORK, Event::ToSource(scanned));
            }
            Output::DrainIo => self.after(WORK, Event::ToSource(Input::IoDrained)),
            Output::StopGuest => self.after(WORK, Event::ToSource(Input::GuestStopped)),
            Output::SaveDeviceState => {
                self.after(
                    WORK,
                    Event::ToSource(Input::DeviceState(Bytes::from(vec![5; 300_000]))),
                );
                self.after(WORK, Event::ToSource(Input::DeviceStateSaved));
            }
            Output::Digest => {
                let digests = vec![digests(&self.source_pages)];
                self.after(WORK, Event::ToSource(Input::Digests(digests)));
            }
            Output::PageDigests { block, chunk } => {
                let digests = page_digests(&self.source_pages, chunk);
                self.after(
                    WORK,
                    Event::ToSource(Input::PageDigests {
                        block,
                        chunk,
                        digests,
                    }),
                );
            }
            Output::Journal(record) => self.after(WORK, Event::ToSource(Input::Journaled(record))),
            Output::ResumeGuest => {
                // QEMU does one thing after the other.
                self.queue
                    .retain(|_, event| !matches!(event, Event::ToSource(Input::GuestStopped)));
                self.after(WORK, Event::ToSource(Input::GuestResumed));
            }
            Output::Connect => self.after(WORK, Event::Reconnect),
            Output::Report(Report::Notice { text }) => self.notices.push(text),
            Output::Report(Report::Round { .. }) => self.rounds += 1,
            Output::Finished(finished) => self.finished.push(finished),
            Output::Send(_)
            | Output::SendOn(..)
            | Output::Detach
            | Output::QuitGuest
            | Output::Report(_) => {}
        }
    }

    /// What the destination's daemon does with a `Query`.
    fn answer_query(&mut self, id: MigrationId) {
        assert_eq!(id, ID);
        if self.destination.is_some() && self.destination_finished.is_none() {
            let lost = Failure::new(Fault::Network, "the source has made a new connection", "");
            self.tell_destination(destination::Input::LinkLost(lost));
        }
        let records = journal::decode(&self.destination_journal).unwrap().records;
        let served = self.destination.is_some() && self.destination_finished.is_none();
        let standing = match journal::standing_for(Some(&records)) {
            Standing::Unknown if journal::outcome(&records) == Outcome::Open && !served => {
                self.destination_journal
                    .extend(journal::encode(&Record::Aborted));
                Standing::Aborted
            }
            Standing::Committed if !served => {
                let setup = destination::Setup {
                    host: "beta".into(),
                    vm: "guest".into(),
                    blocks: Vec::new(),
                    data_channels: 0,
                    timeouts: Timeouts::default(),
                };
                self.destination = Some(Destination::recover(setup, self.now));
                self.destination_finished = None;
                Standing::Committed
            }
            standing => standing,
        };
        let answer = Message::Answer { id, standing };
        self.after(LATENCY, Event::ToSource(source::Input::Message(answer)));
    }

    /// 1 GB/s a channel; the content is that of the moment of reading.
    fn push(&mut self, channel: ChannelId, batch: &source::Batch) {
        let pages: Vec<usize> = batch
            .runs
            .iter()
            .flat_map(|run| run.first..run.end())
            .map(|p| usize::try_from(p).unwrap())
            .collect();
        let mut content: Vec<(usize, u64)> = pages
            .iter()
            .map(|page| (*page, self.source_pages[*page]))
            .collect();
        let zero = content.iter().filter(|(_, content)| *content == 0).count() as u64 * PAGE;
        let raw = pages.len() as u64 * PAGE - zero;
        if let Some(spoiled) = content
            .iter_mut()
            .find(|(page, _)| Some(*page) == self.spoil)
        {
            spoiled.1 ^= 1 << 40;
        }
        let done = self.lane(channel).after(Duration::from_nanos(raw));
        self.lanes[usize::from(channel.0) - 1] = done;
        let pushed = Pushed {
            raw_bytes: raw,
            zero_bytes: zero,
        };
        self.at(
            done,
            Event::ToSource(source::Input::Pushed {
                channel,
                batch: batch.id,
                pushed,
            }),
        );
        if self.link {
            self.at(done.after(LATENCY), Event::Land(content));
        }
    }

    fn lane(&self, channel: ChannelId) -> Time {
        self.lanes[usize::from(channel.0) - 1].max(self.now)
    }

    fn destination_output(&mut self, output: destination::Output) {
        use destination::{Input, Output};
        let answer = match output {
            Output::Send(message) => {
                if self.link {
                    let message = Pair::crossing(&message);
                    self.after(LATENCY, Event::ToSource(source::Input::Message(message)));
                }
                return;
            }
            Output::Journal(record) => Input::Journaled(record),
            Output::Prepare { .. } => Input::Prepared,
            Output::Digest => Input::Digests(vec![digests(&self.destination_pages)]),
            Output::PageDigests { block, chunk } => Input::PageDigests {
                block,
                chunk,
                digests: page_digests(&self.destination_pages, chunk),
            },
            Output::LoadDeviceState => Input::DeviceStateLoaded,
            Output::RunGuest => Input::GuestRunning,
            Output::Finished { state, failure, .. } => {
                self.destination_finished = Some((state, failure));
                return;
            }
            Output::Report(Report::Notice { text }) => {
                self.notices.push(text);
                return;
            }
            Output::Allocate(_) | Output::KeepDeviceState(_) | Output::Report(_) => return,
        };
        self.after(WORK, Event::ToDestination(answer));
    }

    fn populated(&self) -> Vec<Run> {
        let held = self
            .source_pages
            .iter()
            .enumerate()
            .filter(|(_, content)| **content != 0);
        held.map(|(page, _)| run(page)).collect()
    }
}

fn disk_full() -> Failure {
    Failure::new(Fault::ThisHost, "the disk is full", "free some of it")
}

fn qemu_said_no() -> Failure {
    Failure::new(Fault::Qemu, "QEMU said no", "ask it again")
}

fn run(page: usize) -> Run {
    Run {
        block: BlockId(0),
        first: page as u64,
        pages: 1,
    }
}

fn digest(pages: &[u64]) -> [u8; 16] {
    let sum = pages.iter().fold(7u128, |sum, page| {
        sum.wrapping_mul(0x1_0000_0000_01b3) ^ u128::from(*page)
    });
    sum.to_le_bytes()
}

fn digests(pages: &[u64]) -> Vec<[u8; 16]> {
    pages
        .chunks(usize::try_from(DIGEST_CHUNK / PAGE).unwrap())
        .map(digest)
        .collect()
}

fn page_digests(pages: &[u64], chunk: u64) -> Vec<[u8; 16]> {
    let per_chunk = usize::try_from(DIGEST_CHUNK / PAGE).unwrap();
    let start = usize::try_from(chunk).unwrap() * per_chunk;
    pages[start..]
        .iter()
        .take(per_chunk)
        .map(|page| digest(&[*page]))
        .collect()
}
