//! Both engines in one world: virtual time, a network with latency, guests whose pages are numbers, journals that survive
//! crashes. Everything is deterministic, so a run can be repeated and disturbed at any of its steps.

mod channels;
mod doubt;
mod outputs;
mod postcopy;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pagecopy::engine::destination::{self, Destination};
use pagecopy::engine::encoding::policy::Compress;
use pagecopy::engine::event::{Finished, State};
use pagecopy::engine::journal::{self, Record, Side};
use pagecopy::engine::source::{self, Source};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Time, Timeouts};
use pagecopy::memory::BlockSpec;

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
    Land(ChannelId, Vec<(usize, u64)>),
    /// The source's driver looks at what its channels have done.
    Measure,
    Reconnect,
    /// All channels.
    ReconnectAll,
    /// Pages that lacked have come.
    Fetch,
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
    /// What became of the decisions of the source's operator.
    pub decided: Vec<Result<String, Failure>>,
    pub rounds: u32,
    /// Percent of its time for which the guest was kept from writing, as it was told.
    pub throttled: Vec<u32>,
    /// Pages that the guest writes every millisecond; it wanders over them.
    pub writes_per_ms: usize,
    /// Pages among which it writes.
    pub working_set: usize,
    /// Spoils a page on its way, for `--verify` to find.
    pub spoil: Option<usize>,
    pub network_gone: bool,
    /// An operator has called a host fenced that was not, and nobody could know: two guests may run.
    pub false_word: bool,
    /// Records that a disk refuses, and whether they are on it all the same.
    pub refused: Vec<Record>,
    pub refused_but_there: bool,
    /// QEMU's answers to `RunGuest` and `ResumeGuest` while this is set.
    pub qemu_refuses: bool,
    /// With post-copy: what outlives the daemons.
    pub moved: postcopy::Moved,
    /// Channels that come and go.
    pub channels: channels::Channels,
    /// How long a byte takes on a channel, in nanoseconds.
    pub byte_ns: u64,
    /// The guest writes so often.
    pub write_every: Duration,
    setup: source::Setup,
    arriving: destination::Setup,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    dirty: BTreeSet<usize>,
    written: u64,
    link: bool,
    source_journal: Vec<u8>,
    destination_journal: Vec<u8>,
    /// When each data channel has carried what was given to it.
    lanes: BTreeMap<ChannelId, Time>,
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
            ram: Vec::new(),
            direct_io: false,
            data_channels: 2,
            fixed_downtime: Duration::from_millis(10),
            options: source::Options {
                downtime_limit: Duration::from_millis(300),
                bandwidth_limit: None,
                background_limit: None,
                compress: Compress::Off,
                max_rounds: 30,
                timeout: None,
                throttle: false,
                verify: false,
                mode: source::Mode::Precopy,
                quit_source: false,
                channels: None,
            },
            timeouts: Timeouts::default(),
        };
        change(&mut setup);
        let now = Time(1_000_000_000);
        let arriving = destination::Setup {
            id: ID,
            postcopy: Ok(()),
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
            names: Vec::new(),
        };
        let mut pair = Pair {
            now,
            steps: 0,
            source: Some(Source::new(setup.clone(), now)),
            destination: Some(Destination::new(arriving.clone(), now)),
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
            decided: Vec::new(),
            rounds: 0,
            throttled: Vec::new(),
            writes_per_ms: 0,
            working_set: pages,
            spoil: None,
            network_gone: false,
            false_word: false,
            refused: Vec::new(),
            refused_but_there: false,
            qemu_refuses: false,
            moved: postcopy::Moved::default(),
            channels: channels::Channels::default(),
            byte_ns: 1,
            write_every: WORK,
            setup,
            arriving,
            queue: BTreeMap::new(),
            sequence: 0,
            dirty: BTreeSet::new(),
            written: 0,
            link: true,
            source_journal: journal::encode(&begun(Side::Source)),
            destination_journal: journal::encode(&begun(Side::Destination)),
            lanes: BTreeMap::new(),
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
            self.false_word || !(self.source_runs && self.destination_runs),
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
            Event::Measure => self.measure(),
            Event::Land(channel, pages) => {
                self.channels.carry(channel);
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
            Event::ReconnectAll => {
                self.link = !self.network_gone;
                // A daemon that is started anew opens the files again.
                self.moved.open = self.link;
                self.tell_source(if self.link {
                    source::Input::Reconnected
                } else {
                    source::Input::ReconnectFailed("no route".into())
                });
            }
            Event::Fetch => self.fetch(),
            Event::RestartSource => {
                let records = journal::decode(&self.source_journal).unwrap().records;
                let (outcome, postcopy) = (journal::outcome(&records), journal::postcopy(&records));
                let setup = self.setup.clone();
                self.source = Some(Source::recover(setup, outcome, postcopy, self.now));
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
            let kept_from = self.throttled.last().map_or(0, |percent| *percent as usize);
            for _ in 0..self.writes_per_ms * (100 - kept_from) / 100 {
                self.written += 1;
                let page = usize::try_from(self.written).unwrap() * 7 % self.working_set;
                self.source_pages[page] = 1 << 32 | self.written;
                self.dirty.insert(page);
            }
        }
        if self.destination_runs && self.moved.armed {
            self.guest_writes_there();
        }
        if self.writes_per_ms > 0 && !self.ended() {
            self.after(self.write_every, Event::GuestWrites);
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

    pub(crate) fn drain(&mut self) {
        while let Some(output) = self.source.as_mut().and_then(Source::poll) {
            self.source_output(output);
        }
        while let Some(output) = self.destination.as_mut().and_then(Destination::poll) {
            self.destination_output(output);
        }
    }
}

fn disk_full() -> Failure {
    Failure::new(Fault::ThisHost, "the disk is full", "free some of it")
}

fn qemu_said_no() -> Failure {
    Failure::new(Fault::Qemu, "QEMU said no", "ask it again")
}
