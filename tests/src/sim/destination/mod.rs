//! The destination's side of a run: its RAM, QEMU and disk, and the daemon that drives the engine.
//!
//! The daemon answers questions about a migration from its journal, as the real one does: one that is open while a
//! session serves it is answered with `Unknown`, and one that nobody serves any more is given up first, on disk.

mod channels;
mod outputs;
mod pull;
mod questions;

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Input, Output, Setup};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::{ChannelId, Fault as Blame, MigrationId, Timeouts};
use pagecopy::host::decode::Decoder;
use pagecopy::wire::Message;
use transport::Regions;
use transport::mem::MemChannel;

use super::arrived::{Arrived, Pager};
use super::disk::Disk;
use super::driver::{Driver, Host};
use super::env::{DestinationEvent, DestinationStep, Env, Event, failure};
use super::fault::Micros;
use super::lane::Lane;
use super::mistake::Mistake;
use super::plan::Side;
use super::qemu::{self as machine, DestinationState};
use super::ram::SimRam;
use super::rng::Rng;
use super::tally::Happened;

/// How long the daemon gives its last messages before it closes the connection.
const LINGER: Duration = Duration::from_millis(200);

/// A data channel, and the bytes of zero runs placed since its last barrier.
struct DataLane {
    lane: Lane,
    zero_bytes: u64,
    /// None before the source has said Hello.
    decoder: Option<Decoder>,
}

impl DataLane {
    fn of(lane: Lane) -> DataLane {
        DataLane {
            lane,
            zero_bytes: 0,
            decoder: None,
        }
    }
}

/// A connection whose first message is still to come, or that asks.
#[derive(Debug)]
struct Question {
    control: Lane,
    data: Vec<Lane>,
}

/// The daemon, while it lives.
#[derive(Default)]
struct Daemon {
    /// The session that receives the guest; none in a daemon that was started again.
    engine: Option<Destination>,
    control: Option<Lane>,
    data: Vec<DataLane>,
    /// The regions were closed: channels that the source closes now are no loss.
    closed: bool,
    /// Connections on which somebody asks about a migration.
    questions: Vec<Question>,
    /// What is fetched, if the guest goes before its memory.
    pull: Option<pull::Pull>,
    /// Data channels of the connection that the source has come with.
    served: Vec<Lane>,
    device_state: Vec<u8>,
    last_barrier: Option<(u32, ChannelId)>,
}

/// The destination's host.
pub(super) struct DestinationSide {
    pub(super) ram: Arc<SimRam>,
    pub(super) qemu: machine::Destination,
    pub(super) regions: Regions,
    /// The state that the engine finished with.
    pub(super) ended: Option<State>,
    pub(super) host: Host,
    /// The guest, while it lacks pages.
    pub(super) arrived: Arrived,
    /// What the kernel and QEMU hold of post-copy.
    pager: Option<Pager>,
    /// The file that says which pages were received, by their number at the source.
    received: Option<Vec<bool>>,
    /// QEMU's command that loads the device state, and the pages that its devices wait for.
    loads_when: Option<(u32, Vec<usize>)>,
    /// Its devices have touched what they touch.
    devices_touched: bool,
    /// The source has said that what the guest lacks is gone, and neither served since nor did an operator decide.
    memory_gone: bool,
    setup: Setup,
    id: MigrationId,
    daemon: Option<Daemon>,
    /// Counts the engines.
    session: u32,
}

impl DestinationSide {
    /// A host whose QEMU waits for the guest.
    pub(super) fn new(
        env: &Env,
        seed: &Rng,
        ram: Arc<SimRam>,
        source: Arc<SimRam>,
        id: MigrationId,
    ) -> DestinationSide {
        ram.leave_garbage(&mut seed.stream("garbage"));
        DestinationSide {
            qemu: machine::Destination::new(),
            regions: env.destination_regions.clone(),
            arrived: Arrived::new(
                source,
                ram.clone(),
                env.plan.order.clone(),
                seed.stream("arrived"),
                env.plan.habits,
            ),
            pager: None,
            received: None,
            loads_when: None,
            devices_touched: false,
            memory_gone: false,
            ended: None,
            host: Host::new(Disk::new(
                env.plan.destination.disk,
                seed.stream("destination disk"),
            )),
            setup: Setup {
                id,
                postcopy: Ok(()),
                host: "destination".into(),
                vm: "guest".into(),
                blocks: ram.specs(),
                data_channels: env.plan.data_channels,
                timeouts: Timeouts::default(),
            },
            ram,
            id,
            daemon: None,
            session: 0,
        }
    }

    /// The daemon begins to serve a new connection.
    pub(super) fn begin(&mut self, env: &mut Env, channels: Vec<MemChannel>) {
        let begun = Record::Begun {
            id: self.id,
            side: journal::Side::Destination,
            vm: self.setup.vm.clone(),
            qmp: String::new(),
            peer: String::new(),
            names: Vec::new(),
        };
        self.host.disk.begin(&journal::encode(&begun));
        let mut lanes = channels.into_iter().map(Lane::new);
        self.daemon = Some(Daemon {
            engine: Some(Destination::new(
                self.setup.clone(),
                env.clock(Side::Destination),
            )),
            control: lanes.next(),
            data: lanes.map(DataLane::of).collect(),
            ..Daemon::default()
        });
        self.carry_out_all(env);
    }

    /// Whether there is a daemon.
    pub(super) fn alive(&self) -> bool {
        self.daemon.is_some()
    }

    /// Whether nothing more is to be expected of the daemon.
    pub(super) fn settled(&self) -> bool {
        match &self.daemon {
            None => self.host.gone,
            // A disk that never takes the last record is tried for ever.
            Some(daemon) => {
                let whole = self.pager.as_ref().is_some_and(|pager| !pager.armed());
                let gone = self.qemu.state == DestinationState::Gone;
                let tries = (whole || gone) && self.host.disk.full_for_good();
                self.ended.is_some() || daemon.engine.is_none() || tries
            }
        }
    }

    /// Whether a source that asks can never be answered by this host as it is.
    pub(super) fn cannot_help(&self) -> bool {
        self.host.gone || self.qemu.state == DestinationState::Gone
    }

    /// A complaint if the session says that it has not got the guest that runs here.
    pub(super) fn denies_its_guest(&self, runs: bool) -> Option<String> {
        let denied = matches!(self.ended, Some(State::Failed | State::Cancelled));
        (runs && denied).then(|| {
            format!(
                "the destination is {:?}, and the guest runs there",
                self.ended
            )
        })
    }

    /// The operator makes sure that this host never runs the guest: ends its daemon and its QEMU.
    pub(super) fn fence(&mut self, env: &mut Env) {
        self.daemon = None;
        self.host.generation += 1;
        self.host.gone = true;
        env.destination_listens = false;
        if env.checker.runs(Side::Destination) {
            env.qemu_lost[Side::Destination as usize] = true;
        }
        self.guest_ends(env);
    }

    /// QEMU is gone, and the guest with it, if there is one.
    fn guest_ends(&mut self, env: &mut Env) {
        // A daemon that stands still meanwhile may find that all is here before it finds that QEMU is gone.
        let seen = !env.holds(Side::Destination);
        if env.checker.runs(Side::Destination) && self.depends() && seen {
            env.checker.ended_lacking();
        }
        self.qemu.enter(DestinationState::Gone);
        env.checker.stopped(Side::Destination);
    }

    /// Something for this daemon, of its generation.
    pub(super) fn happens(&mut self, env: &mut Env, generation: u32, event: DestinationEvent) {
        if generation != self.host.generation || self.daemon.is_none() {
            return;
        }
        match event {
            DestinationEvent::Daemon(event) => self.daemon_happens(env, event),
            DestinationEvent::Prepare => self.prepare(env),
            DestinationEvent::LateZero(runs) => self.place_zeroes(env, &runs),
            DestinationEvent::Arm(lacking) => self.arm(env, lacking),
            DestinationEvent::PageFault(page) => self.page_fault(env, page),
            DestinationEvent::Mark(pages) => self.mark(&pages),
            DestinationEvent::PullOn => self.pull_on(env),
            DestinationEvent::Say => self.say(env),
            DestinationEvent::Close { session } => {
                if let Some(daemon) = self.daemon.as_mut().filter(|_| session == self.session) {
                    daemon.control = None;
                    daemon.data.clear();
                    // A guest that is committed and may still run here has its page faults answered.
                    if !self.pager.as_ref().is_some_and(Pager::armed) {
                        daemon.pull = None;
                    }
                }
                self.regions.revoke_all();
            }
        }
    }

    /// The operator cancels.
    pub(super) fn cancel(&mut self, env: &mut Env) {
        if self.ended.is_none() && self.engine().is_some() {
            env.tally.note(Happened::Cancelled(Side::Destination));
        }
        self.input(env, Input::Cancel);
    }

    /// The daemon is started again.
    pub(super) fn restart(&mut self, env: &mut Env) {
        if self.daemon.is_some() || self.host.gone {
            return;
        }
        self.host.disk.reopen();
        env.note("destination", format_args!("the daemon starts again"));
        env.destination_listens = true;
        self.daemon = Some(Daemon::default());
        self.ended = None;
        self.recover(env);
    }

    /// The process dies.
    pub(super) fn qemu_dies(&mut self, env: &mut Env) {
        if self.qemu.state == DestinationState::Gone {
            return;
        }
        env.note("destination", format_args!("QEMU dies"));
        env.tally.note(Happened::QemuDied(Side::Destination));
        self.guest_ends(env);
        env.qemu_lost[Side::Destination as usize] = true;
        self.input(
            env,
            Input::QemuFailed(failure(Blame::Qemu, "QEMU was made to die")),
        );
    }

    /// Whether the guest runs here, or is to, and lacks pages.
    pub(super) fn depends(&self) -> bool {
        let there = matches!(
            self.qemu.state,
            DestinationState::Running | DestinationState::Paused
        );
        there && self.pager.as_ref().is_some_and(Pager::armed) && self.lacks() > 0
    }

    /// What this side's engine says of itself.
    pub(super) fn state(&self) -> Option<State> {
        let engine = self.daemon.as_ref()?.engine.as_ref()?;
        Some(engine.state()).filter(|_| self.ended.is_none())
    }

    /// Whether the guest went before its memory, and all of it is here now.
    pub(super) fn wrong_page(&self) -> Option<String> {
        let pager = self.pager.as_ref().filter(|pager| !pager.armed())?;
        let whole = self.qemu.state == DestinationState::Running && self.lacks() == 0;
        self.arrived.wrong_page(pager, |_| whole)
    }

    /// Whether the guest went before its memory.
    pub(super) fn went_first(&self) -> bool {
        self.pager.is_some()
    }

    /// The guest lives until now, and waits for what it lacks.
    pub(super) fn live(&mut self, env: &mut Env) {
        let Some(pager) = self.pager.as_ref().filter(|pager| pager.armed()) else {
            return;
        };
        let runs =
            self.qemu.state == DestinationState::Running && !env.stands_still(Side::Destination);
        match self.arrived.live_until(env.agenda.now(), runs, pager) {
            Ok(faults) => self.faults(env, &faults),
            Err(wrong) => env.checker.violate(format!("the guest reads: {wrong}")),
        }
    }

    /// QEMU's devices touch some pages while they are loaded. True: they wait.
    fn devices_wait(&mut self, env: &mut Env, command: u32) -> bool {
        if std::mem::replace(&mut self.devices_touched, true) {
            return false;
        }
        let Some(pager) = self.pager.as_ref().filter(|pager| pager.armed()) else {
            return false;
        };
        let touched: Vec<usize> = (0..env.rng.below(4))
            .map(|_| env.rng.index(self.ram.pages()))
            .filter(|page| !pager.open(*page))
            .collect();
        if touched.is_empty() {
            return false;
        }
        env.tally.note(Happened::DevicesWaited);
        self.loads_when = Some((command, touched.clone()));
        self.faults(env, &touched);
        true
    }

    /// The guest begins to run.
    fn guest_runs(&mut self, env: &mut Env) {
        self.qemu.enter(DestinationState::Running);
        let Some(pager) = &self.pager else {
            return env.checker.started(Side::Destination);
        };
        if !env.checker.arrived() {
            let received = self.received.as_deref().unwrap_or_default();
            let here = |page: usize| received.get(page).copied().unwrap_or(false);
            if let Some(wrong) = self.arrived.wrong_page(pager, here) {
                env.checker
                    .violate(format!("the guest starts, and {wrong}"));
            }
        }
        env.checker.started_lacking();
    }

    /// A step of QEMU's, if its command still counts.
    pub(super) fn qemu_steps(&mut self, env: &mut Env, command: u32, step: DestinationStep) {
        if command != self.qemu.command {
            return;
        }
        env.note("destination", format_args!("QEMU: {step:?}"));
        match step {
            DestinationStep::Loaded => {
                if self.devices_wait(env, command) {
                    return;
                }
                env.checker.load_ended();
                self.qemu.enter(DestinationState::Paused);
                if env.errs(Mistake::RunBeforeCommit) {
                    self.run_guest(env);
                }
                self.input(env, Input::DeviceStateLoaded);
            }
            DestinationStep::Runs => {
                self.guest_runs(env);
                if self.holds() {
                    // The operator had it run, or a daemon before this one, and whatever its session said is over.
                    self.ended = Some(State::Completed);
                    self.runs_after_all(env);
                }
                self.input(env, Input::GuestRunning);
            }
            DestinationStep::Fails { dies } => {
                if dies {
                    self.qemu.enter(DestinationState::Gone);
                    env.qemu_lost[Side::Destination as usize] = true;
                } else {
                    self.qemu.command += 1;
                }
                self.input(
                    env,
                    Input::QemuFailed(failure(Blame::Qemu, "the command was made to fail")),
                );
            }
        }
    }
}

impl Driver for DestinationSide {
    type Engine = Destination;
    type Event = DestinationEvent;
    const SIDE: Side = Side::Destination;
    const WHO: &'static str = "destination";

    fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    fn engine(&mut self) -> Option<&mut Destination> {
        self.daemon.as_mut()?.engine.as_mut()
    }

    fn enter(generation: u32, event: DestinationEvent) -> Event {
        Event::Destination(generation, event)
    }

    fn carry_out(&mut self, env: &mut Env, output: Output) {
        self.carry_out_one(env, output);
    }

    fn about_to_hear(&mut self, env: &mut Env, input: &Input) {
        if let (Input::Message(Message::Stopped { final_round }), Some(daemon)) =
            (input, &self.daemon)
            && daemon
                .last_barrier
                .is_some_and(|(round, _)| round == *final_round)
        {
            env.tally.note(Happened::StoppedOvertaken);
        }
    }

    fn die(&mut self, env: &mut Env, restart: Option<Micros>, host: bool) {
        if self.daemon.is_none() {
            return;
        }
        env.note("destination", format_args!("the daemon dies"));
        self.end_daemon(env, host);
        self.daemon = None;
        self.regions.revoke_all();
        env.destination_listens = false;
        if env.errs(Mistake::ReleaseOnDrop) {
            self.release(env);
        }
        if host {
            self.qemu_dies(env);
        } else if self.qemu.state == DestinationState::Loading && env.rng.chance(500) {
            // The stream broke: a QEMU that cannot load ends.
            self.qemu.enter(DestinationState::Gone);
        }
        self.start_again(env, restart);
    }
}
