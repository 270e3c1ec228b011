//! The source's side of a run: its guest, QEMU, tracker and disk, and the daemon that drives the engine.
//!
//! The daemon here does what the contract in `pagecopy::engine` asks of any driver and no more: it carries outputs out in
//! their order and answers later. It can die at any output; what it leaves behind is the journal, QEMU as it stands, and
//! nothing armed in the kernel.

mod channels;
mod outputs;
mod qemu;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::source::{Batch, Input, Pushed, Resolution, Setup, Source};
use pagecopy::engine::{ChannelId, Failure, Fault as Blame, MigrationId, Time, Timeouts};
use pagecopy::host::Tracker;
use pagecopy::memory::Run;
use pagecopy::wire::{Message, Standing};
use transport::mem::MemChannel;
use transport::{Access, Regions};

use super::disk::Disk;
use super::env::{Env, Event, SourceEvent, failure};
use super::guest::Guest;
use super::lane::Lane;
use super::mistake::Mistake;
use super::names;
use super::plan::{Plan, Side};
use super::qemu::{self as machine, SourceState};
use super::ram::{SimRam, SimTracker};
use super::rng::Rng;

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

/// The daemon, while it lives.
struct Daemon {
    engine: Source,
    control: Option<Lane>,
    data: Vec<DataLane>,
    /// Figures of the batches that are under way.
    batches: BTreeMap<u64, (ChannelId, Batch, Pushed)>,
    tick_at: Option<Time>,
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
    disk: Disk,
    setup: Setup,
    daemon: Option<Daemon>,
    generation: u32,
    device_state: Vec<u8>,
    commit_sent: bool,
    first_holes: Option<Vec<Run>>,
    /// Per data channel, if channels copy what they are given.
    buffers: Vec<Arc<SimRam>>,
}

impl SourceSide {
    /// A host with a running guest and a daemon that has just connected by `channels`.
    pub(super) fn new(env: &Env, seed: &Rng, ram: Arc<SimRam>) -> SourceSide {
        let plan = &env.plan;
        let guest = Guest::new(ram.clone(), seed.stream("guest"), plan.habits, env.now());
        let order: Vec<usize> = (0..plan.blocks.len()).collect();
        let copies = if plan.buffered { plan.data_channels } else { 0 };
        let buffers: Vec<Arc<SimRam>> = (0..copies).map(|_| SimRam::new(&plan.blocks)).collect();
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
            disk: Disk::new(plan.source.disk, seed.stream("source disk")),
            setup: setup(plan, seed, env.errs(Mistake::NoAgeing)),
            daemon: None,
            generation: 0,
            device_state: Vec::new(),
            commit_sent: false,
            first_holes: None,
            buffers,
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
        };
        self.disk.begin(&journal::encode(&begun));
        let mut lanes = channels.into_iter().map(Lane::new);
        let control = lanes.next();
        let data = lanes
            .map(|lane| DataLane {
                work: VecDeque::new(),
                lane,
            })
            .collect();
        self.install(Source::new(self.setup.clone(), env.now()), control, data);
        self.carry_out_all(env);
    }

    fn install(&mut self, engine: Source, control: Option<Lane>, data: Vec<DataLane>) {
        self.daemon = Some(Daemon {
            engine,
            control,
            data,
            batches: BTreeMap::new(),
            tick_at: None,
            detached: false,
        });
    }

    /// The migration.
    pub(super) fn id(&self) -> MigrationId {
        self.setup.id
    }

    /// Whether nothing more is to be expected of the daemon.
    pub(super) fn settled(&self) -> bool {
        self.daemon.is_some() && self.ended.is_some_and(|state| state != State::InDoubt)
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
        open.then_some("data channels are still open")
    }

    /// Something for this daemon, of its generation.
    pub(super) fn happens(&mut self, env: &mut Env, generation: u32, event: SourceEvent) {
        if generation != self.generation || self.daemon.is_none() {
            return;
        }
        match event {
            SourceEvent::Tick => self.tick(env),
            SourceEvent::Work(channel) => self.work(env, channel),
            SourceEvent::Handed(batch) => self.batch_sent(env, batch),
            SourceEvent::Answer(input) => self.input(env, *input),
            SourceEvent::Arm => self.arm(env),
            SourceEvent::ListAfterArm => self.list_after_arm(env),
            SourceEvent::Scan { holes } => self.scan(env, holes),
            SourceEvent::ScanEnds {
                dirty,
                holes,
                began,
            } => self.scan_ends(env, dirty, holes, began),
            SourceEvent::Synced(end, record) => {
                self.disk.synced(end);
                self.input(env, Input::Journaled(record));
            }
            SourceEvent::Connect => self.connect(env),
            SourceEvent::Close => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.control = None;
                    daemon.data.clear();
                }
            }
        }
    }

    /// The operator cancels.
    pub(super) fn cancel(&mut self, env: &mut Env) {
        self.input(env, Input::Cancel);
    }

    /// The operator decides.
    pub(super) fn resolve(&mut self, env: &mut Env, resolution: Resolution) {
        env.note("operator", format_args!("resolves: {resolution:?}"));
        self.input(env, Input::Resolve(resolution));
    }

    /// The daemon dies, and the kernel closes what it had open.
    pub(super) fn die(&mut self, env: &mut Env, restart: Option<Duration>) {
        if self.daemon.take().is_none() {
            return;
        }
        env.note("source", format_args!("the daemon dies"));
        self.generation += 1;
        self.tracker.disarm();
        self.disk.crash();
        env.checker.pushes_lost();
        env.checker.rollback_excused();
        self.stream_breaks(env);
        // The host is looked after: its daemon is always started again, at the latest after a minute.
        let restart = restart.unwrap_or(Duration::from_secs(60));
        env.agenda.after(restart, Event::Restart(Side::Source));
    }

    /// The daemon is started again and takes the migration up from its journal.
    pub(super) fn restart(&mut self, env: &mut Env) {
        if self.daemon.is_some() {
            return;
        }
        self.disk.repair();
        let records = match journal::decode(self.disk.bytes()) {
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
        match journal::outcome(&records) {
            journal::Outcome::NotHere => env.checker.failure_noticed(env.agenda.now()),
            // As far as it can know now, `Commit` was sent.
            journal::Outcome::Open | journal::Outcome::Here => self.commit_sent = true,
        }
        self.ended = None;
        let engine = Source::recover(self.setup.clone(), journal::outcome(&records), env.now());
        self.install(engine, None, Vec::new());
        self.carry_out_all(env);
    }

    fn tick(&mut self, env: &mut Env) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        daemon.tick_at = None;
        if daemon
            .engine
            .poll_timeout()
            .is_some_and(|at| at <= env.now())
        {
            daemon.engine.handle(env.now(), Input::Tick);
        }
        self.carry_out_all(env);
    }

    /// Tells the engine something, and does what it asks for then.
    fn input(&mut self, env: &mut Env, input: Input) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        env.note("source", format_args!("<- {input:?}"));
        if self.qemu.state == SourceState::Gone {
            env.checker.rollback_excused();
        } else if is_failure(&input) && !self.commit_sent && !self.resume_failed {
            env.checker.failure_noticed(env.agenda.now());
        }
        if let Input::Message(Message::Answer {
            standing: Standing::Aborted,
            ..
        }) = input
        {
            self.commit_sent = false;
        }
        daemon.engine.handle(env.now(), input);
        self.carry_out_all(env);
    }

    fn carry_out_all(&mut self, env: &mut Env) {
        while let Some(output) = self.daemon.as_mut().and_then(|daemon| daemon.engine.poll()) {
            let name = names::of_source(&output);
            env.note("source", format_args!("-> {output:?}"));
            if let Some(restart) = env.output_given(Side::Source, &name) {
                return self.die(env, restart);
            }
            self.carry_out(env, output);
        }
        self.schedule_tick(env);
    }

    fn schedule_tick(&mut self, env: &mut Env) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        let Some(at) = daemon.engine.poll_timeout() else {
            return;
        };
        if let Some(at) = env.next_tick(at, daemon.tick_at) {
            daemon.tick_at = Some(at);
            self.event_at(env, at, SourceEvent::Tick);
        }
    }

    /// Puts an answer on the agenda.
    fn answer_after(&self, env: &mut Env, delay: Duration, input: Input) {
        self.event_after(env, delay, SourceEvent::Answer(Box::new(input)));
    }

    fn event_after(&self, env: &mut Env, delay: Duration, event: SourceEvent) {
        env.agenda
            .after(delay, Event::Source(self.generation, event));
    }

    fn event_at(&self, env: &mut Env, at: Time, event: SourceEvent) {
        env.agenda.at(at, Event::Source(self.generation, event));
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
        direct_io: plan.direct_io && !no_ageing,
        data_channels: plan.data_channels,
        fixed_downtime: plan.fixed_downtime,
        options: plan.options.clone(),
        timeouts: Timeouts::default(),
    }
}

/// A failure of this host that the simulation made.
fn host_failure() -> Failure {
    failure(Blame::ThisHost, "the host operation was made to fail")
}
