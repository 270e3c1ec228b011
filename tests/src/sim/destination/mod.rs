//! The destination's side of a run: its RAM, QEMU and disk, and the daemon that drives the engine.
//!
//! The daemon answers questions about a migration from its journal, as the real one does: one that is open while a
//! session serves it is answered with `Unknown`, and one that nobody serves any more is given up first, on disk.

mod channels;
mod outputs;
mod questions;

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Input, Setup};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::{Fault as Blame, MigrationId, Time, Timeouts};
use transport::Regions;
use transport::mem::MemChannel;

use super::disk::Disk;
use super::env::{DestinationEvent, DestinationStep, Env, Event, failure};
use super::lane::Lane;
use super::names;
use super::plan::Side;
use super::qemu::{self as machine, DestinationState};
use super::ram::SimRam;
use super::rng::Rng;

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
    tick_at: Option<Time>,
    device_state: Vec<u8>,
}

/// The destination's host.
pub(super) struct DestinationSide {
    pub(super) ram: Arc<SimRam>,
    pub(super) qemu: machine::Destination,
    pub(super) regions: Regions,
    /// The state that the engine finished with.
    pub(super) ended: Option<State>,
    disk: Disk,
    setup: Setup,
    id: MigrationId,
    daemon: Option<Daemon>,
    generation: u32,
    /// Counts the engines.
    session: u32,
    /// The daemon is not started again.
    gone: bool,
}

impl DestinationSide {
    /// A host whose QEMU waits for the guest.
    pub(super) fn new(env: &Env, seed: &Rng, ram: Arc<SimRam>, id: MigrationId) -> DestinationSide {
        ram.leave_garbage(&mut seed.stream("garbage"));
        DestinationSide {
            qemu: machine::Destination::new(),
            regions: Regions::new(),
            ended: None,
            disk: Disk::new(env.plan.destination.disk, seed.stream("destination disk")),
            setup: Setup {
                host: "destination".into(),
                vm: "guest".into(),
                blocks: ram.specs(),
                data_channels: env.plan.data_channels,
                timeouts: Timeouts::default(),
            },
            ram,
            id,
            daemon: None,
            generation: 0,
            session: 0,
            gone: false,
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
        self.disk.begin(&journal::encode(&begun));
        let mut lanes = channels.into_iter().map(Lane::new);
        self.daemon = Some(Daemon {
            engine: Some(Destination::new(self.setup.clone(), env.now())),
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

    /// Whether nothing more is to be expected of the daemon.
    pub(super) fn settled(&self) -> bool {
        match &self.daemon {
            None => self.gone,
            Some(daemon) => self.ended.is_some() || daemon.engine.is_none(),
        }
    }

    /// Whether a source that asks can never be answered by this host as it is.
    pub(super) fn cannot_help(&self) -> bool {
        self.gone || self.qemu.state == DestinationState::Gone
    }

    /// The operator makes sure that this host never runs the guest: ends its daemon and its QEMU.
    pub(super) fn shut_down(&mut self, env: &mut Env) {
        self.daemon = None;
        self.generation += 1;
        self.gone = true;
        env.destination_listens = false;
        self.qemu.enter(DestinationState::Gone);
        env.checker.stopped(Side::Destination);
    }

    /// Something for this daemon, of its generation.
    pub(super) fn happens(&mut self, env: &mut Env, generation: u32, event: DestinationEvent) {
        if generation != self.generation || self.daemon.is_none() {
            return;
        }
        match event {
            DestinationEvent::Tick => self.tick(env),
            DestinationEvent::Answer(input) => self.input(env, *input),
            DestinationEvent::Prepare => self.prepare(env),
            DestinationEvent::LateZero(runs) => self.place_zeroes(env, &runs),
            DestinationEvent::Synced(end, record, for_engine) => {
                self.disk.synced(end);
                if for_engine {
                    self.input(env, Input::Journaled(record));
                }
            }
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
        self.input(env, Input::Cancel);
    }

    /// The daemon dies.
    pub(super) fn die(&mut self, env: &mut Env, restart: Option<Duration>) {
        if self.daemon.take().is_none() {
            return;
        }
        env.note("destination", format_args!("the daemon dies"));
        self.generation += 1;
        self.regions.revoke_all();
        self.disk.crash();
        env.destination_listens = false;
        if self.qemu.state == DestinationState::Loading && env.rng.chance(500) {
            // The stream broke: a QEMU that cannot load ends.
            self.qemu.enter(DestinationState::Gone);
        }
        match restart {
            Some(delay) => env.agenda.after(delay, Event::Restart(Side::Destination)),
            None => self.gone = true,
        }
    }

    /// The daemon is started again.
    pub(super) fn restart(&mut self, env: &mut Env) {
        if self.daemon.is_some() || self.gone {
            return;
        }
        self.disk.repair();
        env.note("destination", format_args!("the daemon starts again"));
        env.destination_listens = true;
        self.daemon = Some(Daemon::default());
        self.ended = None;
        self.recover(env);
    }

    fn tick(&mut self, env: &mut Env) {
        let now = env.now();
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        daemon.tick_at = None;
        let Some(engine) = &mut daemon.engine else {
            return;
        };
        if engine.poll_timeout().is_some_and(|at| at <= now) {
            engine.handle(now, Input::Tick);
        }
        self.carry_out_all(env);
    }

    /// Tells the engine something, and does what it asks for then.
    fn input(&mut self, env: &mut Env, input: Input) {
        let Some(engine) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.engine.as_mut())
        else {
            return;
        };
        env.note("destination", format_args!("<- {input:?}"));
        engine.handle(env.now(), input);
        self.carry_out_all(env);
    }

    fn carry_out_all(&mut self, env: &mut Env) {
        while let Some(output) = self.engine().and_then(Destination::poll) {
            let name = names::of_destination(&output);
            env.note("destination", format_args!("-> {output:?}"));
            if let Some(restart) = env.output_given(Side::Destination, &name) {
                return self.die(env, restart);
            }
            self.carry_out(env, output);
        }
        self.schedule_tick(env);
    }

    fn engine(&mut self) -> Option<&mut Destination> {
        self.daemon.as_mut()?.engine.as_mut()
    }

    fn schedule_tick(&mut self, env: &mut Env) {
        let Some(at) = self.engine().and_then(|engine| engine.poll_timeout()) else {
            return;
        };
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        if let Some(at) = env.next_tick(at, daemon.tick_at) {
            daemon.tick_at = Some(at);
            self.event_at(env, at, DestinationEvent::Tick);
        }
    }

    /// Puts an answer on the agenda.
    fn answer_after(&self, env: &mut Env, delay: Duration, input: Input) {
        self.event_after(env, delay, DestinationEvent::Answer(Box::new(input)));
    }

    fn event_after(&self, env: &mut Env, delay: Duration, event: DestinationEvent) {
        env.agenda
            .after(delay, Event::Destination(self.generation, event));
    }

    fn event_at(&self, env: &mut Env, at: Time, event: DestinationEvent) {
        env.agenda
            .at(at, Event::Destination(self.generation, event));
    }

    /// The process dies.
    pub(super) fn qemu_dies(&mut self, env: &mut Env) {
        if self.qemu.state == DestinationState::Gone {
            return;
        }
        env.note("destination", format_args!("QEMU dies"));
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
                self.input(env, Input::DeviceStateLoaded);
            }
            DestinationStep::Runs => {
                self.qemu.enter(DestinationState::Running);
                env.checker.started(Side::Destination);
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
