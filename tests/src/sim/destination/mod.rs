//! The destination's side of a run: its RAM, QEMU and disk, and the daemon that drives the engine.
//!
//! The daemon answers questions about a migration from its journal, as the real one does: one that is open while a
//! session serves it is answered with `Unknown`, and one that nobody serves any more is given up first, on disk.

mod channels;
mod outputs;
mod questions;

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Input, Output, Setup};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::{ChannelId, Fault as Blame, MigrationId, Timeouts};
use pagecopy::wire::Message;
use transport::Regions;
use transport::mem::MemChannel;

use super::disk::{Disk, Hand};
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
#[derive(Debug)]
struct DataLane {
    lane: Lane,
    zero_bytes: u64,
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
    questions: Vec<Lane>,
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
    setup: Setup,
    id: MigrationId,
    daemon: Option<Daemon>,
    /// Counts the engines.
    session: u32,
}

impl DestinationSide {
    /// A host whose QEMU waits for the guest.
    pub(super) fn new(env: &Env, seed: &Rng, ram: Arc<SimRam>, id: MigrationId) -> DestinationSide {
        ram.leave_garbage(&mut seed.stream("garbage"));
        DestinationSide {
            qemu: machine::Destination::new(),
            regions: Regions::new(),
            ended: None,
            host: Host::new(Disk::new(
                env.plan.destination.disk,
                seed.stream("destination disk"),
            )),
            setup: Setup {
                id,
                postcopy: false,
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
        };
        self.host.disk.begin(&journal::encode(&begun));
        let mut lanes = channels.into_iter().map(Lane::new);
        self.daemon = Some(Daemon {
            engine: Some(Destination::new(
                self.setup.clone(),
                env.clock(Side::Destination),
            )),
            control: lanes.next(),
            data: lanes
                .map(|lane| DataLane {
                    lane,
                    zero_bytes: 0,
                })
                .collect(),
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
            Some(daemon) => self.ended.is_some() || daemon.engine.is_none(),
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
            DestinationEvent::Close { session } => {
                if let Some(daemon) = self.daemon.as_mut().filter(|_| session == self.session) {
                    daemon.control = None;
                    daemon.data.clear();
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
        self.qemu.enter(DestinationState::Gone);
        env.checker.stopped(Side::Destination);
        env.qemu_lost[Side::Destination as usize] = true;
        self.input(
            env,
            Input::QemuFailed(failure(Blame::Qemu, "QEMU was made to die")),
        );
    }

    /// A step of QEMU's, if its command still counts.
    pub(super) fn qemu_steps(&mut self, env: &mut Env, command: u32, step: DestinationStep) {
        if command != self.qemu.command {
            return;
        }
        env.note("destination", format_args!("QEMU: {step:?}"));
        match step {
            DestinationStep::Loaded => {
                env.checker.load_ended();
                self.qemu.enter(DestinationState::Paused);
                if env.errs(Mistake::RunBeforeCommit) {
                    self.run_guest(env);
                }
                self.input(env, Input::DeviceStateLoaded);
            }
            DestinationStep::Runs => {
                self.qemu.enter(DestinationState::Running);
                env.checker.started(Side::Destination);
                if self.holds() {
                    // The operator had it run, and whatever its session said before is over.
                    self.ended = Some(State::Completed);
                    self.append(env, Record::Running, Hand::Daemon);
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
        if host {
            self.qemu_dies(env);
        } else if self.qemu.state == DestinationState::Loading && env.rng.chance(500) {
            // The stream broke: a QEMU that cannot load ends.
            self.qemu.enter(DestinationState::Gone);
        }
        self.start_again(env, restart);
    }
}
