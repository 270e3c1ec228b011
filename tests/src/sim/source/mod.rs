//! The source's side of a run: its guest, QEMU, tracker and disk, and the daemon that drives the engine.
//!
//! The daemon here does what the contract in `pagecopy::engine` asks of any driver and no more: it carries outputs out in
//! their order and answers later. It can die at any output; what it leaves behind is the journal, QEMU as it stands, and
//! nothing armed in the kernel.

mod channels;
mod limits;
mod outputs;
mod qemu;
mod serving;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::encoding::versions::Versions;
use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::source::{Batch, Input, Output, Pushed, Setup, Source};
use pagecopy::engine::{ChannelId, Failure, Fault as Blame, MigrationId, Timeouts};
use pagecopy::host::Tracker;
use pagecopy::host::encode::Encoder;
use pagecopy::memory::Run;
use pagecopy::wire::{Message, Standing};
use transport::mem::MemChannel;
use transport::{Access, Regions};

use super::disk::Disk;
use super::driver::{Driver, Host};
use super::env::{Env, Event, SourceEvent, failure};
use super::fault::Micros;
use super::guest::Guest;
use super::lane::Lane;
use super::mistake::Mistake;
use super::plan::{Plan, Side};
use super::qemu::{self as machine, SourceState};
use super::ram::{SimRam, SimTracker};
use super::rng::Rng;
use super::tally::Happened;
use limits::Limits;

/// How long the daemon gives its last messages before it closes the connection.
const LINGER: Duration = Duration::from_millis(200);

/// What a channel's thread has to do next.
#[derive(Debug)]
enum Work {
    Batch(Batch),
    Message(Message),
}

/// A data channel: what waits for its thread, and the channel.
#[derive(Debug)]
struct DataLane {
    work: VecDeque<Work>,
    lane: Lane,
}

impl DataLane {
    fn of(lane: Lane) -> DataLane {
        DataLane {
            work: VecDeque::new(),
            lane,
        }
    }
}

/// The daemon, while it lives.
struct Daemon {
    engine: Source,
    control: Option<Lane>,
    data: Vec<DataLane>,
    /// Figures of the batches that are under way.
    batches: BTreeMap<u64, (ChannelId, Batch, Pushed)>,
    /// With what was sent last; it goes with the daemon.
    encoder: Encoder,
    detached: bool,
}

/// The source's host.
pub(super) struct SourceSide {
    pub(super) ram: Arc<SimRam>,
    pub(super) guest: Guest,
    pub(super) qemu: machine::Source,
    /// What each channel sends from.
    pub(super) regions: Vec<Regions>,
    /// The state that the engine finished with last.
    pub(super) ended: Option<State>,
    /// It was in doubt.
    pub(super) doubted: bool,
    /// The reason that it finished with.
    pub(super) failure: Option<Failure>,
    /// The figures that it finished with.
    pub(super) figures: Figures,
    /// `ResumeGuest` was made to fail.
    pub(super) resume_failed: bool,
    tracker: SimTracker,
    pub(super) host: Host,
    setup: Setup,
    daemon: Option<Daemon>,
    device_state: Vec<u8>,
    commit_sent: bool,
    /// The guest's memory can be read by the peer.
    reads_open: bool,
    /// A copy of the memory from before the guest stood still, and whether a page was left out: for planted mistakes.
    old: Option<Arc<SimRam>>,
    /// The connection that is being made; others are not wanted any more.
    attempt: u32,
    forgot: bool,
    /// Some daemon before this one has died.
    restarted: bool,
    /// The connection that there is was made to say that the memory is gone.
    said_lost: bool,
    /// How it went wrong, as the journal says since before this daemon.
    lost: Option<Failure>,
    /// The files of the guest's memory went with the host.
    files_gone: bool,
    /// How often something had been taken out of the RAM when it was last listed, and the list, unless it was that of the start.
    listed: (u64, Option<Vec<Run>>),
    /// Pages of which the version sent last is kept.
    versions: u64,
    /// Per data channel, if channels copy what they are given.
    buffers: Vec<Arc<SimRam>>,
    limits: Limits,
}

impl SourceSide {
    /// A host with a running guest and a daemon that has just connected by `channels`.
    pub(super) fn new(env: &Env, seed: &Rng, ram: Arc<SimRam>) -> SourceSide {
        let plan = &env.plan;
        let guest = Guest::new(ram.clone(), seed.stream("guest"), plan.habits, env.now());
        let order: Vec<usize> = (0..plan.blocks.len()).collect();
        let copies = if plan.buffered { plan.data_channels } else { 0 };
        let buffers: Vec<Arc<SimRam>> = (0..copies).map(|_| SimRam::buffer(&plan.blocks)).collect();
        let access = Access {
            peer_writes: false,
            peer_reads: false,
        };
        let regions = (0..=usize::from(plan.data_channels))
            .map(|channel| {
                let regions = Regions::new();
                let buffer = channel.checked_sub(1).and_then(|index| buffers.get(index));
                buffer.unwrap_or(&ram).register(&regions, &order, access);
                regions
            })
            .collect();
        SourceSide {
            tracker: SimTracker::new(ram.clone(), !env.errs(Mistake::ClearAfterRead)),
            ram,
            guest,
            qemu: machine::Source::new(),
            regions,
            ended: None,
            doubted: false,
            failure: None,
            figures: Figures::default(),
            resume_failed: false,
            host: Host::new(Disk::new(plan.source.disk, seed.stream("source disk"))),
            setup: setup(plan, seed, env.errs(Mistake::NoAgeing)),
            daemon: None,
            device_state: Vec::new(),
            commit_sent: false,
            reads_open: false,
            old: None,
            attempt: 0,
            forgot: false,
            restarted: false,
            said_lost: false,
            lost: None,
            files_gone: false,
            listed: (0, None),
            versions: plan.wanted.versions,
            buffers,
            limits: Limits::new(env),
        }
    }

    /// The daemon begins the migration over a new connection.
    pub(super) fn begin(&mut self, env: &mut Env, channels: Vec<MemChannel>) {
        let begun = Record::Begun {
            id: self.setup.id,
            side: journal::Side::Source,
            vm: self.setup.vm.clone(),
            qmp: String::new(),
            peer: String::new(),
            names: Vec::new(),
        };
        self.host.disk.begin(&journal::encode(&begun));
        let mut lanes = channels.into_iter().map(Lane::new);
        let control = lanes.next();
        let data = lanes.map(DataLane::of).collect();
        let now = env.clock(Side::Source);
        self.install(Source::new(self.setup.clone(), now), control, data);
        self.carry_out_all(env);
    }

    fn install(&mut self, engine: Source, control: Option<Lane>, data: Vec<DataLane>) {
        // A tag takes some room beside the page.
        let versions = Versions::new(self.versions * 4128);
        self.daemon = Some(Daemon {
            encoder: Encoder::new(Arc::new(Mutex::new(versions))),
            engine,
            control,
            data,
            batches: BTreeMap::new(),
            detached: false,
        });
    }

    /// The migration.
    pub(super) fn id(&self) -> MigrationId {
        self.setup.id
    }

    /// Whether there is a daemon.
    pub(super) fn alive(&self) -> bool {
        self.daemon.is_some()
    }

    /// Whether nothing more is to be expected of the daemon.
    pub(super) fn settled(&self) -> bool {
        match &self.daemon {
            None => self.host.gone,
            Some(_) => self.ended.is_some_and(|state| state != State::InDoubt),
        }
    }

    /// What must not be left behind at the end.
    pub(super) fn left_behind(&self) -> Option<&'static str> {
        if self.tracker.armed() {
            return Some("the guest is still tracked");
        }
        let open = self
            .daemon
            .as_ref()
            .is_some_and(|daemon| !daemon.data.is_empty());
        if self.reads_open {
            return Some("the memory can still be read");
        }
        open.then_some("data channels are still open")
    }

    /// Something for this daemon, of its generation.
    pub(super) fn happens(&mut self, env: &mut Env, generation: u32, event: SourceEvent) {
        if generation != self.host.generation || self.daemon.is_none() {
            return;
        }
        match event {
            SourceEvent::Daemon(event) => self.daemon_happens(env, event),
            SourceEvent::Work(channel) => self.work(env, channel),
            SourceEvent::Handed(batch) => self.batch_sent(env, batch),
            SourceEvent::Arm => self.arm(env),
            SourceEvent::ListAfterArm => self.list_after_arm(env),
            SourceEvent::Scan { holes } => self.scan(env, holes),
            SourceEvent::ScanEnds {
                dirty,
                holes,
                began,
            } => self.scan_ends(env, dirty, holes, began),
            SourceEvent::Connect(attempt, all) if attempt == self.attempt => {
                self.connect(env, attempt, all);
            }
            SourceEvent::ConnectFails(attempt, why) if attempt == self.attempt => {
                self.input(env, Input::ReconnectFailed(why.into()));
            }
            SourceEvent::ConnectRefused(attempt, why) if attempt == self.attempt => {
                self.input(env, Input::ReconnectRefused(why.into()));
            }
            // It was given up for another.
            SourceEvent::Connect(..)
            | SourceEvent::ConnectFails(..)
            | SourceEvent::ConnectRefused(..) => {}
            SourceEvent::Close => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.control = None;
                    daemon.data.clear();
                }
            }
        }
    }

    /// What this side's engine says of itself.
    pub(super) fn state(&self) -> Option<State> {
        self.daemon.as_ref().map(|daemon| daemon.engine.state())
    }

    /// Whether the files of the guest's memory went with the host.
    pub(super) fn files_gone(&self) -> bool {
        self.files_gone
    }

    /// Whether nobody will ever read the guest's memory here again.
    pub(super) fn cannot_serve(&self) -> bool {
        self.host.gone || self.files_gone || self.ended == Some(State::Failed)
    }

    /// The operator makes sure that this host never runs the guest: ends its daemon and its QEMU.
    pub(super) fn fence(&mut self, env: &mut Env) {
        self.daemon = None;
        self.host.generation += 1;
        self.host.gone = true;
        self.guest.throttled = 0;
        self.tracker.disarm();
        self.close_reads();
        self.files_gone = true;
        self.qemu.enter(SourceState::Gone);
        env.qemu_lost[Side::Source as usize] = true;
        env.checker.pushes_lost();
        env.checker.rollback_excused();
        env.checker.stopped(Side::Source);
    }

    /// The operator cancels.
    pub(super) fn cancel(&mut self, env: &mut Env) {
        if self.ended.is_none() && self.daemon.is_some() {
            env.tally.note(Happened::Cancelled(Side::Source));
        }
        self.input(env, Input::Cancel);
    }

    /// The operator decides.
    pub(super) fn resolve(&mut self, env: &mut Env, resolution: Resolution) {
        env.note("operator", format_args!("resolves: {resolution:?}"));
        self.input(env, Input::Resolve(resolution));
    }

    /// The daemon is started again and takes the migration up from its journal.
    pub(super) fn restart(&mut self, env: &mut Env) {
        if self.daemon.is_some() || self.host.gone {
            return;
        }
        self.host.disk.reopen();
        let records = match journal::decode(self.host.disk.bytes()) {
            Ok(decoded) => decoded.records,
            Err(error) => {
                return env
                    .checker
                    .violate(format!("the source's journal cannot be read: {error}"));
            }
        };
        env.note(
            "source",
            format_args!("the daemon starts again: {records:?}"),
        );
        self.restarted = true;
        match journal::outcome(&records) {
            journal::Outcome::NotHere if self.qemu.state == SourceState::Gone => {}
            journal::Outcome::NotHere => env.checker.failure_noticed(env.agenda.now()),
            // As far as it can know now, `Commit` was sent.
            journal::Outcome::Open | journal::Outcome::Here => self.commit_sent = true,
        }
        // Of a matter that is settled the daemon shows what the journal says, without an engine.
        self.lost = journal::lost(&records).cloned();
        self.ended = None;
        let now = env.clock(Side::Source);
        let engine = Source::recover(
            self.setup.clone(),
            journal::outcome(&records),
            journal::postcopy(&records),
            now,
        );
        self.install(engine, None, Vec::new());
        self.carry_out_all(env);
    }
}

impl Driver for SourceSide {
    type Engine = Source;
    type Event = SourceEvent;
    const SIDE: Side = Side::Source;
    const WHO: &'static str = "source";

    fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    fn engine(&mut self) -> Option<&mut Source> {
        self.daemon.as_mut().map(|daemon| &mut daemon.engine)
    }

    fn enter(generation: u32, event: SourceEvent) -> Event {
        Event::Source(generation, event)
    }

    fn carry_out(&mut self, env: &mut Env, output: Output) {
        self.carry_out_one(env, output);
    }

    fn about_to_hear(&mut self, env: &mut Env, input: &Input) {
        if let Some(state) = self.state() {
            self.limits.about_to_hear(env, input, state);
        }
        if self.qemu.state == SourceState::Gone {
            env.checker.rollback_excused();
        } else if is_failure(input) && !self.commit_sent && !self.resume_failed {
            env.checker.failure_noticed(env.agenda.now());
        }
        if let Input::Message(Message::Answer {
            standing: Standing::Aborted,
            ..
        }) = input
        {
            self.commit_sent = false;
        }
        let in_doubt = self.ended == Some(State::InDoubt);
        if let Input::Resolve(Resolution::Abandon { peer_fenced }) = input {
            let paused = self.state() == Some(State::Paused);
            env.let_go_by_word |= in_doubt || (paused && (*peer_fenced || self.files_gone));
        }
        if matches!(input, Input::LinkLost(_))
            && self.commit_sent
            && env.errs(Mistake::ResumeAfterCommit)
        {
            self.resume_guest(env);
        }
    }

    fn die(&mut self, env: &mut Env, restart: Option<Micros>, host: bool) {
        if self.daemon.is_none() {
            return;
        }
        env.note("source", format_args!("the daemon dies"));
        self.limits.forget();
        self.end_daemon(env, host);
        self.daemon = None;
        // What slows the guest is a thread of the daemon.
        self.guest.throttled = 0;
        self.tracker.disarm();
        self.close_reads();
        env.checker.pushes_lost();
        env.checker.rollback_excused();
        if host {
            self.files_gone = true;
            self.qemu_dies(env);
        }
        self.stream_breaks(env);
        // The host is looked after: its daemon is always started again, at the latest after a minute.
        self.start_again(env, restart.or(Some(60_000_000)));
    }
}

/// Inputs after which the guest has to run on here, if `Commit` was not sent.
fn is_failure(input: &Input) -> bool {
    matches!(
        input,
        Input::Cancel
            | Input::LinkLost(_)
            | Input::HostFailed(_)
            | Input::QemuFailed(_)
            | Input::JournalFailed(..)
            | Input::Message(
                Message::Abort { .. }
                    | Message::Answer {
                        standing: Standing::Aborted,
                        ..
                    }
            )
    )
}

fn setup(plan: &Plan, seed: &Rng, no_ageing: bool) -> Setup {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&seed.stream("id").bits().to_le_bytes());
    Setup {
        id: MigrationId(id),
        vm: "guest".into(),
        host: "source".into(),
        blocks: plan.blocks.clone(),
        ram: Vec::new(),
        direct_io: plan.direct_io && !no_ageing,
        data_channels: plan.data_channels,
        fixed_downtime: plan.fixed_downtime(),
        options: plan.options(),
        timeouts: Timeouts::default(),
    }
}

/// A failure of this host that the simulation made.
fn host_failure() -> Failure {
    failure(Blame::ThisHost, "the host operation was made to fail")
}
