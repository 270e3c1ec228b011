//! The destination's session.

mod device_state;
mod fetch;
mod joined;
mod work;

use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Input, Output};
use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::encoding::Encodings;
use pagecopy::engine::event::{Finished as EngineEnd, State};
#[cfg(feature = "steps")]
use pagecopy::engine::journal::Side;
use pagecopy::engine::journal::{Outcome, Postcopy, lost, outcome, postcopy};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId};
use pagecopy::host::ram::MappedRam;
use pagecopy::host::{Placer, Ram};
use pagecopy::memory::BlockSpec;
use pagecopy::wire::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use transport::{Channel, Regions};

use self::device_state::DeviceState;
use self::fetch::Fetch;
pub(crate) use self::fetch::{TakenOver, has_all, has_ended};
use self::joined::Waiting;
use self::work::allocation_failure;
use super::{
    Broken, Clock, LOAD_LIMIT, NameOf, Teller, Worker, close_each, link_failure, lock, tell,
};
use crate::failure::operator;
use crate::lane::destination::Command;
use crate::lane::{Lane, LaneEvent, Told};
use crate::log;
use crate::migrations::{Decided, Migration, Request};
use crate::qemu::Block;
use crate::qemu::incoming::Incoming as Qemu;
use crate::qemu::settings::Settings;
use crate::qmp::{Qmp, QmpError};
use crate::service::Service;
use crate::store::JournalFile;

/// In post-copy, how things stand is told so often.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// All that a session starts from, besides its engine.
pub(crate) struct Parts {
    pub(crate) id: MigrationId,
    pub(crate) service: Arc<Service>,
    pub(crate) migration: Arc<Migration>,
    pub(crate) clock: Clock,
    pub(crate) qmp: Arc<Qmp>,
    pub(crate) settings: Settings,
    pub(crate) journal: JournalFile,
    /// The waiting QEMU's RAMBlocks; none when a committed guest is taken up after a restart.
    pub(crate) blocks: Vec<Block>,
    /// QEMU's process.
    pub(crate) pid: i32,
    /// None when a post-copy is taken up after a restart: the source comes.
    pub(crate) control: Option<Lane<Message>>,
    pub(crate) data: Vec<Box<dyn Channel>>,
    /// The page faults of a post-copy that is taken up after a restart.
    pub(crate) taken_over: Option<TakenOver>,
    pub(crate) regions: Regions,
}

/// A running session.
pub(crate) struct Session {
    id: MigrationId,
    service: Arc<Service>,
    migration: Arc<Migration>,
    clock: Clock,
    qmp: Arc<Qmp>,
    qemu: Arc<Qemu>,
    settings: Settings,
    journal: Arc<Mutex<JournalFile>>,
    blocks: Vec<Block>,
    pid: i32,
    control: Option<Lane<Message>>,
    fetch: Fetch,
    /// Channels before their lanes exist, and after their lanes were parked.
    idle: Vec<Box<dyn Channel>>,
    data: Vec<Lane<Command>>,
    /// Channels that may join.
    waiting: Option<Waiting>,
    /// How pages may come encoded.
    encodings: Encodings,
    regions: Regions,
    memory: Option<Memory>,
    device_state: DeviceState,
    allocator: Worker,
    /// Set when the bytes have come, or never will: what is still to be allocated is left.
    stop_allocating: Arc<AtomicBool>,
    /// Runs that wait for the allocator.
    allocating: Arc<AtomicUsize>,
    journal_worker: Worker,
    teller: Teller,
    sender: UnboundedSender<Input>,
    inputs: UnboundedReceiver<Input>,
    broken: Broken,
    /// QEMU's order to load the device state; one under way may outlast the migration.
    load: Option<JoinHandle<()>>,
    /// The operator who waits to hear what becomes of his decision.
    operator: Option<oneshot::Sender<Decided>>,
    /// QEMU's monitor has ended, and the engine does not know it.
    monitor_lost: bool,
    /// QEMU was given device state, as the engine said in the end.
    qemu_used: bool,
    lanes: UnboundedReceiver<Told>,
    lane_events: UnboundedSender<Told>,
}

/// The waiting guest's RAM, numbered as the source numbers it.
#[derive(Clone)]
struct Memory {
    ram: Arc<dyn Ram>,
    placer: Arc<dyn Placer>,
    specs: Arc<[BlockSpec]>,
    mapped: MappedRam,
    blocks: Vec<Block>,
}

impl Session {
    /// Starts the workers. Lanes of data channels start when the RAM is ready.
    pub(crate) fn start(parts: Parts) -> Result<Session, Failure> {
        let (sender, inputs) = unbounded_channel();
        let (lane_events, lanes) = unbounded_channel();
        let mut teller = Teller::new(parts.id, Arc::clone(&parts.migration), parts.clock);
        if let Some(control) = &parts.control {
            teller.add_control(control);
        }
        Ok(Session {
            id: parts.id,
            service: parts.service,
            migration: parts.migration,
            clock: parts.clock,
            qemu: Arc::new(Qemu::new(Arc::clone(&parts.qmp))),
            qmp: parts.qmp,
            settings: parts.settings,
            journal: Arc::new(Mutex::new(parts.journal)),
            blocks: parts.blocks,
            pid: parts.pid,
            control: parts.control,
            fetch: Fetch::new(parts.taken_over),
            idle: parts.data,
            data: Vec::new(),
            waiting: None,
            encodings: Encodings::default(),
            regions: parts.regions,
            memory: None,
            device_state: DeviceState::default(),
            allocator: Worker::start("allocate")?,
            stop_allocating: Arc::new(AtomicBool::new(false)),
            allocating: Arc::new(AtomicUsize::new(0)),
            journal_worker: Worker::start("journal")?,
            teller,
            sender,
            inputs,
            broken: Broken::default(),
            load: None,
            operator: None,
            monitor_lost: false,
            qemu_used: false,
            lanes,
            lane_events,
        })
    }

    /// Runs to the end of the migration. `control` are the control channel's events.
    pub(crate) async fn run(
        mut self,
        mut engine: Destination,
        mut control: UnboundedReceiver<Told>,
        requests: &mut UnboundedReceiver<Request>,
    ) {
        self.name_vcpus();
        if self.served_at_once() {
            engine.handle(self.clock.now(), Input::Served);
        }
        let mut end = self.carry_out(&mut engine).await;
        let mut qmp_there = true;
        let mut link_there = self.control.is_some();
        let mut every_second = tokio::time::interval(TELL_EVERY);
        while end.is_none() {
            let qmp = Arc::clone(&self.qmp);
            let broken = self.broken.overdue();
            let loading = self.load.as_ref().is_some_and(|load| !load.is_finished());
            let input = tokio::select! {
                biased;
                // First, so that no flood of the peer's keeps the operator waiting.
                request = requests.recv() => match request {
                    Some(Request::Shutdown) if engine.outlives_the_daemon() => return self.leave().await,
                    Some(Request::Cancel | Request::Shutdown) | None => Some(Input::Cancel),
                    Some(Request::Poison(peer_fenced, reply)) => {
                        self.operator = Some(reply);
                        Some(Input::Poison { peer_fenced })
                    }
                    Some(Request::StartPostcopy(reply) | Request::Recover(_, reply) | Request::Change(_, reply)) => {
                        // Whoever asked may have left.
                        let _ = reply.send(Err(at_the_source()));
                        None
                    }
                    Some(Request::Serve(caller)) => {
                        // The source has lost the connection that there was.
                        if self.control.is_some() {
                            engine.handle(self.clock.now(), Input::LinkLost(superseded()));
                            end = self.carry_out(&mut engine).await;
                        }
                        let visit = caller.take();
                        visit.and_then(|visit| self.served(&engine, visit)).map(|events| {
                            (control, link_there) = (events, true);
                            Input::Served
                        })
                    }
                    Some(Request::Resolve(resolution, reply)) => {
                        // Whoever asked may have left.
                        let _ = reply.send(Err(self.nothing_to_resolve(resolution)));
                        None
                    }
                    Some(Request::Disconnect) => Some(Input::LinkLost(superseded())),
                    Some(Request::Join(joining)) => {
                        self.join(joining);
                        None
                    }
                    Some(Request::Lost(reason)) => {
                        let all_here = self.fetch.all_here();
                        Some(Input::SourceLost { reason, all_here })
                    }
                    // For a guest that no session serves. Whoever asked, asks again.
                    Some(Request::Withdrawn(_)) => None,
                },
                told = control.recv(), if link_there => {
                    let event = told.map(Told::take);
                    link_there = !matches!(event, Some(LaneEvent::Lost(..)) | None);
                    event.and_then(|event| self.lane_input(event))
                }
                told = self.lanes.recv() => told.and_then(|told| self.lane_input(told.take())),
                input = self.inputs.recv() => input,
                // While QEMU loads, the answer to that says more; once it has loaded, that answer is an input above.
                () = qmp.gone(), if qmp_there && !loading => {
                    (qmp_there, self.monitor_lost) = (false, true);
                    self.qemu_gone()
                },
                Some(done) = self.fetch.done.recv() => Some(self.done(done)),
                Some(event) = self.fetch.events.recv() => self.pull_event(event),
                _ = every_second.tick() => {
                    self.forget_old();
                    self.qemu_gone().or_else(|| self.lacks())
                }
                () = broken => self.broken.take().map(Input::LinkLost),
                () = self.clock.sleep_until(engine.poll_timeout()) => Some(Input::Tick),
            };
            if let Some(input) = input {
                tracing::trace!(input = %NameOf(&input));
                #[cfg(feature = "steps")]
                crate::steps::reached(Side::Destination, &input).await;
                engine.handle(self.clock.now(), input);
                end = self.carry_out(&mut engine).await;
            }
        }
        if let Some(end) = end {
            self.finish(end).await;
        }
    }

    /// QEMU's monitor has ended, and QEMU with it. A guest that is here and lacks memory is lost only when its process is gone, too: the
    /// source lets go of what it lacks when it hears that.
    fn qemu_gone(&mut self) -> Option<Input> {
        if !self.monitor_lost {
            return None;
        }
        let lives = {
            let journal = lock(&self.journal);
            let records = journal.records();
            let lacks = outcome(records) == Outcome::Here && postcopy(records) == Postcopy::Open;
            lacks && !has_ended(records)
        };
        if lives {
            return None;
        }
        self.monitor_lost = false;
        Some(Input::QemuFailed(QmpError::Gone.into()))
    }

    /// A guest in post-copy has run here: it can go on nowhere else, and what ends it here is said.
    fn nothing_to_resolve(&self, resolution: Resolution) -> Failure {
        let paused = self.migration.shown().state == State::Paused;
        match (&self.fetch.pull, resolution) {
            (Some(pull), Resolution::Abandon { .. }) if paused => operator(
                format!(
                    "refused: the guest has run here, and cannot go back. It lacks {} bytes of its memory, which are at the source only",
                    pull.progress().0
                ),
                "wait: the source dials until it gets through. If it never comes back, `pagecopy resolve ID --poison --peer-fenced` lets the \
                 guest go on without what it lacks. Or end this host's QEMU, and the guest with it: the source, should it come, is told so",
            ),
            _ => not_in_doubt(),
        }
    }

    /// What the engine is told of a channel's event.
    pub(crate) fn lane_input(&mut self, event: LaneEvent) -> Option<Input> {
        match event {
            LaneEvent::Message(message) => Some(Input::Message(message)),
            LaneEvent::Barrier {
                channel,
                round,
                zero_bytes,
            } => Some(Input::Barrier {
                channel,
                round,
                zero_bytes,
            }),
            LaneEvent::Misbehaved(what) => Some(Input::PeerMisbehaved(what)),
            LaneEvent::Lost(_, transport::Error::PeerMisbehaved(what)) => {
                Some(Input::PeerMisbehaved(what))
            }
            LaneEvent::Lost(_, error @ transport::Error::NoMemory(_)) => {
                Some(Input::HostFailed(link_failure(&error)))
            }
            LaneEvent::Lost(ChannelId(0), error) => Some(Input::LinkLost(link_failure(&error))),
            LaneEvent::Lost(_, error) => {
                self.broken.set(&error);
                None
            }
            LaneEvent::Left { channel, round } => {
                self.left(channel);
                Some(Input::Left { channel, round })
            }
            LaneEvent::NoPlace(error) => Some(Input::HostFailed(allocation_failure(&error))),
            LaneEvent::Pushed { .. } => None,
        }
    }

    async fn carry_out(&mut self, engine: &mut Destination) -> Option<EngineEnd> {
        while let Some(output) = engine.poll() {
            tracing::trace!(output = %NameOf(&output));
            #[cfg(feature = "steps")]
            crate::steps::reached(Side::Destination, &output).await;
            match output {
                Output::Finished {
                    state,
                    failure,
                    qemu_used,
                    figures,
                } => {
                    tracing::debug!(id = %self.migration.shown().id, qemu_used, "the destination's engine has ended");
                    self.qemu_used = qemu_used;
                    return Some(EngineEnd {
                        state,
                        failure,
                        figures,
                    });
                }
                Output::Send(message) => {
                    if let Some(control) = &self.control {
                        control.give(message);
                    }
                }
                Output::Journal(record) => self.journal(record),
                Output::Prepare { order, encodings } => self.prepare(&order, encodings),
                Output::TakeChannels {
                    first,
                    channels,
                    key,
                    round,
                } => self.take_channels(first, channels, key, round),
                Output::Allocate(runs) => self.allocate(runs),
                Output::KeepDeviceState(piece) => self.device_state.push(piece),
                Output::Digest => self.digest(),
                Output::PageDigests { block, chunk } => self.page_digests(block, chunk),
                Output::LoadDeviceState => self.load(),
                Output::RunGuest => self.run_guest(),
                Output::Arm {
                    lacking,
                    background,
                } => self.arm(lacking, background),
                Output::StopPulling => self.stop_pulling(),
                Output::Pull => self.pull(),
                Output::Poison => self.poison(),
                Output::Decided(decided) => {
                    if let Some(reply) = self.operator.take() {
                        // Whoever asked may have left.
                        let _ = reply.send(decided);
                    }
                }
                Output::Report(report) => tell(&self.migration, &report),
            }
        }
        None
    }

    /// Leaves nothing behind, then tells the end.
    async fn finish(mut self, end: EngineEnd) {
        self.close_memory();
        if let Some(control) = self.control.take() {
            control.close();
        }
        self.fetch.armed_or_not().await;
        let (data, idle) = (self.data, self.idle);
        let (here, needs_no_more, is_lost) = {
            let journal = lock(&self.journal);
            let records = journal.records();
            let whole = end.state == State::Completed || postcopy(records) == Postcopy::Over;
            (outcome(records), whole, lost(records).is_some())
        };
        // A guest that was committed may wait for pages, and does so until somebody fetches them.
        let forsaken_faults = self.fetch.pull.take().filter(|_| here != Outcome::Here);
        let faults = self.fetch.faults();
        self.allocator.finish().await;
        self.journal_worker.finish().await;
        // A QEMU that goes on waiting keeps nothing of a guest that does not come.
        let forsaken = self
            .memory
            .filter(|_| end.state != State::Completed && !self.qemu_used);
        let mut closing = JoinSet::new();
        close_each(&mut closing, data);
        close_each(&mut closing, idle);
        // A panic has been told already.
        while closing.join_next().await.is_some() {}
        let tidy = move || {
            if let Some(pull) = forsaken_faults {
                pull.release();
            }
            forsaken.map_or(Ok(()), |memory| memory.placer.clear())
        };
        if let Ok(Err(error)) = log::spawn_blocking(tidy).await {
            tracing::warn!(%error, "the waiting guest's RAM could not be cleared");
        }
        // With the settings put back under it, QEMU would refuse the device state, and tell nobody.
        if let Some(mut load) = self.load.take()
            && tokio::time::timeout(LOAD_LIMIT, &mut load).await.is_err()
        {
            load.abort();
        }
        // A guest in doubt is taken up again, and whoever ends that puts the settings back.
        if end.state != State::InDoubt {
            // QEMU may be stuck, or gone.
            self.settings.restore(&self.qmp).await;
            // A guest that ended here had come, and nobody waits for it.
            if end.state == State::Completed || is_lost {
                self.service.received(&self.migration.shown().vm);
            }
            // Last: a daemon that is started anew and finds the settings knows that this was not done.
            self.service.store.journals.forget_settings(self.id);
        }
        if self.fetch.armed && (here != Outcome::Here || needs_no_more) {
            self.service.store.journals.forget_received(self.id);
        }
        self.service.prune();
        tracing::debug!(id = %self.migration.shown().id, ?here, "the journal's outcome");
        self.teller.publish_with_faults(&end, faults);
    }

    /// The daemon ends while the guest lacks pages: the journal knows, and the next daemon serves on.
    async fn leave(mut self) {
        let pull = self.fetch.pull.take();
        // Joining its threads may block for a moment; QEMU's memory is not let go of.
        let _ = log::spawn_blocking(move || drop(pull)).await;
        self.allocator.finish().await;
        self.journal_worker.finish().await;
    }
}

fn at_the_source() -> Failure {
    operator(
        "refused: this is the destination of the migration: the source begins, and dials",
        "run the same command at the source",
    )
}

fn not_in_doubt() -> Failure {
    operator(
        "refused: this migration is not in doubt: it is under way here",
        "wait for it",
    )
}

fn superseded() -> Failure {
    Failure::new(
        Fault::Network,
        "the source has lost this connection and asks on a new one",
        "",
    )
}
