//! The source's session.

mod growth;
mod holes;
mod limits;
mod serve;
mod throttle;
mod unreached;
mod work;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagecopy::engine::event::{Finished as EngineEnd, State};
#[cfg(feature = "steps")]
use pagecopy::engine::journal::Side;
use pagecopy::engine::journal::{Outcome, Record, has_to_tell, outcome};
use pagecopy::engine::source::{Input, Output, Source};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId};
use pagecopy::host::ram::MappedRam;
use pagecopy::host::throttle::Throttle;
use pagecopy::host::track::UffdTracker;
use pagecopy::host::{Ram, Tracker};
use pagecopy::memory::BlockSpec;
use pagecopy::wire::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use transport::{Channel, Regions};

use self::growth::{Coming, Joined};
use self::holes::Holes;
use self::serve::Served;
use super::telling;
use super::{Broken, Clock, NameOf, Teller, Worker, close_each, link_failure, lock, tell};
use crate::api::types::ChangeRequest;
use crate::dial::{Target, Unreached, dial_control};
use crate::failure::{Shown, operator};
use crate::lane::control::Control;
use crate::lane::source::{Command, Encoding};
use crate::lane::{Lane, LaneEvent, Told};
use crate::log;
use crate::migrations::{Decided, Migration, Request};
use crate::qemu::Guest;
use crate::qemu::outgoing::Outgoing;
use crate::qemu::settings::Settings;
use crate::qmp::{Qmp, QmpError};
use crate::queue::budget::Share;
use crate::service::Service;
use crate::store::JournalFile;

/// In post-copy, what the destination has read is counted so often.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// While the number of data channels is open, what they have done is looked at so often.
const MEASURE_EVERY: Duration = Duration::from_millis(100);

/// What the session waits for.
enum Incoming {
    Engine(Input),
    /// A lane of this connection; earlier connections' lanes are not listened to any more.
    Lane(u32, Told),
    /// By the attempt of that number; earlier attempts do not count any more.
    Connected(u32, Result<Box<dyn Channel>, Unreached>),
    /// All channels, the control channel first.
    ConnectedAll(u32, Result<Vec<Box<dyn Channel>>, Unreached>),
    /// More data channels for the connection of that number, which the destination keeps, and the number of the first.
    Joined(u32, u16, Result<Joined, Failure>),
}

/// The guest's memory, as the session has it.
pub(crate) struct Memory {
    /// The pages.
    pub(crate) ram: Arc<dyn Ram>,
    /// The same, as they are mapped.
    pub(crate) mapped: MappedRam,
    /// Who watches them; none when they do not change any more.
    pub(crate) tracker: Option<UffdTracker>,
    /// The regions of the transfer.
    pub(crate) regions: Regions,
    /// RAMBlocks by number.
    pub(crate) specs: Arc<[BlockSpec]>,
}

/// All that a session starts from, besides its engine.
pub(crate) struct Parts {
    pub(crate) id: MigrationId,
    pub(crate) service: Arc<Service>,
    pub(crate) migration: Arc<Migration>,
    pub(crate) clock: Clock,
    /// None when a migration is taken up after a restart: QEMU is then connected to when it is needed.
    pub(crate) qmp: Option<Arc<Qmp>>,
    /// What QEMU was found to be at the start; none after a restart.
    pub(crate) guest: Option<Guest>,
    pub(crate) settings: Settings,
    pub(crate) journal: JournalFile,
    pub(crate) target: Target,
    /// None when a migration is taken up after a restart, unless a guest depends on it.
    pub(crate) memory: Option<Memory>,
    /// How pages are encoded.
    pub(crate) encoding: Encoding,
    /// What it may send.
    pub(crate) share: Share,
    /// Control channel first; empty after a restart.
    pub(crate) channels: Vec<Box<dyn Channel>>,
}

/// A running session.
pub(crate) struct Session {
    id: MigrationId,
    service: Arc<Service>,
    migration: Arc<Migration>,
    clock: Clock,
    qmp: Option<Arc<Qmp>>,
    guest: Option<Guest>,
    /// When the guest was last looked at.
    looked: Instant,
    outgoing: Option<Arc<Outgoing>>,
    settings: Settings,
    journal: Arc<Mutex<JournalFile>>,
    target: Target,
    ram: Option<(Arc<dyn Ram>, usize)>,
    /// The destination may read.
    serves: bool,
    /// What is served in post-copy.
    served: Option<Served>,
    regions: Regions,
    tracker: Option<Arc<Mutex<UffdTracker>>>,
    /// What the RAM files hold: of a guest that runs here.
    holes: Option<Arc<Mutex<Holes>>>,
    control: Option<Lane<Message>>,
    connection: u32,
    data: Vec<Lane<Command>>,
    /// Lanes that are being closed.
    closing: JoinSet<()>,
    /// Data channels that do not carry pages yet.
    coming: Coming,
    /// Of the connection on which pages are pushed: there is only one such.
    encoding: Encoding,
    share: Arc<Share>,
    /// While the guest is slowed.
    throttle: Option<Throttle>,
    teller: Teller,
    /// Scans, and everything else that touches QEMU's memory map.
    memory_worker: Worker,
    journal_worker: Worker,
    sender: UnboundedSender<Incoming>,
    incoming: UnboundedReceiver<Incoming>,
    broken: Broken,
    /// Connections over RDMA that broke.
    broken_rdma: u32,
    quit: bool,
    /// The guest could not be taken back: the next daemon tries again.
    resume_failed: bool,
    /// The operator who waits to hear what becomes of his decision.
    operator: Option<oneshot::Sender<Decided>>,
    /// What he wants to be changed, if that is it.
    changing: Option<ChangeRequest>,
}

impl Session {
    /// Starts the lanes and workers.
    pub(crate) fn start(parts: Parts) -> Result<Session, Failure> {
        let (sender, incoming) = unbounded_channel();
        let mut session = Session {
            id: parts.id,
            service: parts.service,
            migration: Arc::clone(&parts.migration),
            clock: parts.clock,
            outgoing: parts.qmp.clone().map(|qmp| Arc::new(Outgoing::new(qmp))),
            qmp: parts.qmp,
            guest: parts.guest,
            looked: Instant::now(),
            settings: parts.settings,
            journal: Arc::new(Mutex::new(parts.journal)),
            target: parts.target,
            ram: None,
            serves: false,
            served: None,
            regions: Regions::new(),
            tracker: None,
            holes: None,
            control: None,
            connection: 0,
            data: Vec::new(),
            closing: JoinSet::new(),
            coming: Coming::default(),
            encoding: parts.encoding,
            share: Arc::new(parts.share),
            throttle: None,
            teller: Teller::new(parts.id, Arc::clone(&parts.migration), parts.clock),
            memory_worker: Worker::start("memory")?,
            journal_worker: Worker::start("journal")?,
            sender,
            incoming,
            broken: Broken::default(),
            broken_rdma: 0,
            quit: false,
            resume_failed: false,
            operator: None,
            changing: None,
        };
        let mut channels = parts.channels.into_iter();
        if let Some(control) = channels.next() {
            session.start_control(control)?;
        }
        if let Some(memory) = parts.memory {
            session.take_memory(memory);
            session.start_data(channels)?;
        }
        Ok(session)
    }

    fn take_memory(&mut self, memory: Memory) {
        let holes = Holes::new(Arc::clone(&memory.ram), memory.mapped.clone());
        self.holes = Some(Arc::new(Mutex::new(holes)));
        self.ram = Some((memory.ram, memory.specs.len()));
        self.served = Some(Served {
            mapped: memory.mapped,
            specs: memory.specs,
        });
        self.regions = memory.regions;
        self.tracker = memory.tracker.map(|tracker| Arc::new(Mutex::new(tracker)));
    }

    fn start_control(&mut self, channel: Box<dyn Channel>) -> Result<(), Failure> {
        let lane = Lane::start(
            "control",
            ChannelId(0),
            channel,
            Control::default(),
            (),
            self.tell(),
        )?;
        self.teller.add_control(&lane);
        self.control = Some(lane);
        Ok(())
    }

    fn tell(&self) -> impl Fn(Told) + Send + use<> {
        let (sender, connection) = (self.sender.clone(), self.connection);
        move |told| {
            // A session that has ended needs no events.
            let _ = sender.send(Incoming::Lane(connection, told));
        }
    }

    /// Runs to the end of the migration.
    pub(crate) async fn run(
        mut self,
        mut engine: Source,
        mut requests: UnboundedReceiver<Request>,
    ) {
        let mut end = self.carry_out(&mut engine).await;
        let mut watched = self.qmp.clone();
        let mut every_second = tokio::time::interval(COUNT_EVERY);
        let mut often = tokio::time::interval(MEASURE_EVERY);
        often.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while end.is_none() {
            let broken = self.broken.overdue();
            let input = tokio::select! {
                biased;
                // First, so that no flood of the peer's keeps the operator waiting.
                request = requests.recv() => match request {
                    Some(Request::Cancel) | None => Some(Input::Cancel),
                    Some(Request::Resolve(resolution, reply)) => {
                        tracing::warn!(id = %self.migration.shown().id, ?resolution, "the operator decides");
                        self.asked(reply).then_some(Input::Resolve(resolution))
                    }
                    Some(Request::StartPostcopy(reply)) => self.asked(reply).then_some(Input::StartPostcopy),
                    Some(Request::Recover(to, reply)) => self.asked(reply).then(|| {
                        if let Some(to) = to {
                            self.target.to = to;
                        }
                        Input::Recover
                    }),
                    Some(Request::Change(change, reply)) => self.change(change, reply),
                    Some(Request::Poison(_, reply)) => {
                        // Whoever asked may have left.
                        let _ = reply.send(Err(not_here()));
                        None
                    }
                    // For a destination.
                    Some(
                        Request::Disconnect
                        | Request::Serve(_)
                        | Request::Join(_)
                        | Request::Lost(_)
                        | Request::Withdrawn(_),
                    ) => None,
                    Some(Request::Shutdown) if engine.outlives_the_daemon() => return self.leave().await,
                    Some(Request::Shutdown) => Some(Input::Cancel),
                },
                incoming = self.incoming.recv() => match incoming {
                    Some(incoming) => self.input(incoming),
                    None => None,
                },
                () = gone(watched.as_deref()) => {
                    watched = None;
                    Some(Input::QemuFailed(QmpError::Gone.into()))
                },
                () = broken => self.broken.take().map(Input::LinkLost),
                _ = every_second.tick(), if self.serves => Some(self.read()),
                _ = often.tick(), if engine.measures() => Some(self.measure()),
                () = self.clock.sleep_until(engine.poll_timeout()) => Some(Input::Tick),
            };
            if let Some(input) = input {
                tracing::trace!(input = %NameOf(&input));
                #[cfg(feature = "steps")]
                crate::steps::reached(Side::Source, &input).await;
                engine.handle(self.clock.now(), input);
                end = self.carry_out(&mut engine).await;
            }
        }
        if let Some(end) = end {
            self.finish(end).await;
        }
    }

    fn input(&mut self, incoming: Incoming) -> Option<Input> {
        match incoming {
            Incoming::Engine(input) => {
                self.resume_failed |= matches!(input, Input::ResumeFailed(_));
                Some(input)
            }
            Incoming::Connected(attempt, _) | Incoming::ConnectedAll(attempt, _)
                if attempt != self.connection =>
            {
                None
            }
            Incoming::Connected(_, Ok(channel)) => {
                self.connection += 1;
                match self.start_control(channel) {
                    Ok(()) => Some(Input::Reconnected),
                    Err(failure) => Some(Input::ReconnectFailed(failure.what)),
                }
            }
            Incoming::ConnectedAll(_, Ok(channels)) => {
                self.connection += 1;
                match self.start_all(channels) {
                    Ok(()) => Some(Input::Reconnected),
                    Err(failure) => Some(Input::ReconnectFailed(failure.what)),
                }
            }
            Incoming::Connected(_, Err(unreached)) | Incoming::ConnectedAll(_, Err(unreached)) => {
                Some(unreached.into())
            }
            Incoming::Joined(connection, first, joined) => {
                Some(self.joined(connection == self.connection, first, joined))
            }
            Incoming::Lane(connection, _) if connection != self.connection => None,
            Incoming::Lane(_, told) => self.lane_input(told.take()),
        }
    }

    fn lane_input(&mut self, event: LaneEvent) -> Option<Input> {
        match event {
            LaneEvent::Message(message) => Some(Input::Message(message)),
            LaneEvent::Pushed {
                channel,
                batch,
                pushed,
            } => Some(Input::Pushed {
                channel,
                batch,
                pushed,
            }),
            LaneEvent::Lost(ChannelId(0), error) => Some(Input::LinkLost(link_failure(&error))),
            LaneEvent::Lost(channel, error) => {
                self.lost(channel, error);
                None
            }
            LaneEvent::Left { channel, .. } => {
                self.left(channel);
                None
            }
            LaneEvent::Misbehaved(what) => Some(Input::LinkLost(misbehaved(what))),
            LaneEvent::Barrier { .. } | LaneEvent::NoPlace(_) => None,
        }
    }

    /// Does what the engine decided; returns the end when it is reached.
    async fn carry_out(&mut self, engine: &mut Source) -> Option<EngineEnd> {
        while let Some(output) = engine.poll() {
            tracing::trace!(output = %NameOf(&output));
            #[cfg(feature = "steps")]
            crate::steps::reached(Side::Source, &output).await;
            match output {
                Output::Finished(end) if end.state == State::InDoubt => self.teller.publish(&end),
                Output::Finished(end) => return Some(end),
                other => self.carry_out_one(other),
            }
        }
        None
    }

    fn carry_out_one(&mut self, output: Output) {
        match output {
            Output::Send(message) => {
                if let Some(control) = &self.control {
                    control.give(message);
                }
            }
            Output::SendOn(channel, message) => self.on_channel(channel, Command::Send(message)),
            Output::Push { channel, batch } => self.on_channel(channel, Command::Push(batch)),
            Output::OpenChannels { first, channels } => self.open_channels(first, channels),
            Output::UseChannels { first } => self.use_channels(first),
            Output::CloseChannels { first } => self.coming.close(first),
            Output::Attach => self.attach(),
            Output::Scan { holes } => {
                self.scan(holes);
                self.look_sometimes();
            }
            Output::OpenReads => self.open_reads(),
            Output::ConnectAll => self.connect_all(),
            Output::LookAgain => self.look_again(),
            Output::Throttle { percent } => self.throttle(percent),
            Output::DrainIo => self.drain_io(),
            Output::StopGuest => {
                self.share.urgent(true);
                self.stop_guest();
            }
            Output::SaveDeviceState => self.save_device_state(),
            Output::ResumeGuest => {
                self.share.urgent(false);
                self.resume_guest();
            }
            Output::Digest => self.digest(),
            Output::PageDigests { block, chunk } => self.page_digests(block, chunk),
            Output::Journal(record) => self.journal(record),
            Output::Detach => self.detach(),
            Output::QuitGuest => self.quit = true,
            Output::Connect => self.connect(),
            Output::Decided(decided) => self.decided(decided),
            Output::Report(report) => tell(&self.migration, &report),
            // Taken by the caller.
            Output::Finished(_) => {}
        }
    }

    /// One decision at a time: the engine looks into it and answers by `Decided`.
    fn asked(&mut self, reply: oneshot::Sender<Decided>) -> bool {
        if self.operator.is_some() {
            // Whoever asked may have left.
            let _ = reply.send(Err(operator(
                "refused: another decision about this migration is being looked into",
                "wait for what becomes of it",
            )));
            return false;
        }
        self.operator = Some(reply);
        true
    }

    fn decided(&mut self, decided: Decided) {
        if let Some(change) = self.changing.take().filter(|_| decided.is_ok()) {
            self.changed(&change);
        }
        let id = self.migration.shown().id;
        match &decided {
            Ok(done) => tracing::warn!(%id, done, "decided"),
            Err(failure) => tracing::warn!(%id, failure = %Shown(failure), "decided"),
        }
        if let Some(reply) = self.operator.take() {
            // Whoever asked may have left.
            let _ = reply.send(decided);
        }
    }

    fn on_channel(&self, channel: ChannelId, command: Command) {
        if let Some(lane) = self.data.iter().find(|lane| lane.id() == channel) {
            lane.give(command);
        }
    }

    fn detach(&mut self) {
        self.throttle = None;
        let mut lanes = std::mem::take(&mut self.data);
        lanes.extend(self.coming.take(0));
        self.regions.revoke_all();
        self.broken = Broken::default();
        let tracker = self.tracker.clone();
        self.memory_worker.run(move || {
            if let Some(tracker) = tracker {
                lock(&tracker).disarm();
            }
        });
        close_each(&mut self.closing, lanes);
    }

    fn connect(&mut self) {
        // What an earlier connection may still say is of no use: the engine asks anew.
        self.connection += 1;
        self.control = None;
        let (target, sender) = (self.target.clone(), self.sender.clone());
        let attempt = self.connection;
        log::spawn(async move {
            let dialled = dial_control(&target).await;
            let _ = sender.send(Incoming::Connected(attempt, dialled));
        });
    }

    /// Leaves nothing behind, then tells the end.
    async fn finish(mut self, end: EngineEnd) {
        self.detach();
        if let Some(control) = self.control.take() {
            control.close();
        }
        self.memory_worker.finish().await;
        self.closing.join_all().await;
        if end.state != State::Completed && !self.resume_failed {
            // The engine records it only when it had recorded the intent; a restarted daemon looks for it in any case.
            let journal = Arc::clone(&self.journal);
            self.journal_worker.run(move || {
                let mut journal = lock(&journal);
                let gone = outcome(journal.records()) == Outcome::Here;
                if !gone && journal.records().last() != Some(&Record::RolledBack) {
                    // Without it a restarted daemon looks after the guest once more, which does no harm.
                    let _ = journal.append(&Record::RolledBack);
                }
            });
        }
        self.journal_worker.finish().await;
        let restore = restore(self.settings, self.qmp, self.migration.shown().qmp);
        match (&self.outgoing, self.quit) {
            (Some(outgoing), true) => outgoing.quit().await,
            // QEMU may be stuck, or gone.
            _ => restore.await,
        }
        if !self.resume_failed {
            // Last: a daemon that is started anew and finds the settings knows that this was not done.
            self.service.store.journals.forget_settings(self.id);
        }
        self.service.prune();
        if let Some(fixed) = end
            .figures
            .fixed_downtime_ms
            .filter(|fixed| fixed.is_finite() && *fixed >= 0.0)
        {
            self.service
                .store
                .downtime
                .learn(Duration::from_secs_f64(fixed / 1e3));
        }
        self.teller.publish(&end);
        let has_to_tell = has_to_tell(lock(&self.journal).records());
        if has_to_tell {
            log::spawn(telling::tell(self.service, self.id, self.target));
        }
    }

    /// The daemon ends while the migration is in doubt: the journal knows, and the next daemon asks on.
    async fn leave(self) {
        self.memory_worker.finish().await;
        self.closing.join_all().await;
        self.journal_worker.finish().await;
    }
}

/// Puts QEMU's settings back, also after a restart of the daemon.
async fn restore(settings: Settings, qmp: Option<Arc<Qmp>>, path: PathBuf) {
    match qmp {
        Some(qmp) => settings.restore(&qmp).await,
        None => {
            if let Ok(qmp) = Qmp::connect(&path).await {
                settings.restore(&qmp).await;
            }
        }
    }
}

async fn gone(qmp: Option<&Qmp>) {
    match qmp {
        Some(qmp) => qmp.gone().await,
        None => std::future::pending().await,
    }
}

fn not_here() -> Failure {
    operator(
        "refused: this is the source of the migration, which lacks nothing",
        "run `pagecopy resolve ID --poison` at the destination",
    )
}

fn misbehaved(what: String) -> Failure {
    Failure::new(
        Fault::PeerHost,
        what,
        "run the same version of pagecopyd on both hosts; report this",
    )
}
