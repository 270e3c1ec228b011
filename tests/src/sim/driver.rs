//! What the drivers of both engines do alike: they carry outputs out in their order, tell the engine what happens, call it
//! when it wants to be called, write its journal, and die at any output.

use std::fmt::Debug;
use std::time::Duration;

use pagecopy::engine::journal::{self, Record};
use pagecopy::engine::{Failure, Fault as Blame, Time, destination, source};

use super::disk::{Damage, Disk, Hand};
use super::env::{DaemonEvent, Death, Env, Event, failure};
use super::fault::{Micros, micros};
use super::mistake::Mistake;
use super::names::{self, Name};
use super::plan::Side;
use super::tally::Happened;

/// A record that takes so long to be written is a sign of a slow disk.
const SLOW: Duration = Duration::from_secs(1);

/// Either engine.
pub(super) trait Engine {
    /// What it is told.
    type Input: Debug;
    /// What it asks for.
    type Output: Debug;
    /// See the engines' common shape in `pagecopy::engine`.
    fn handle(&mut self, now: Time, input: Self::Input);
    /// The same.
    fn poll(&mut self) -> Option<Self::Output>;
    /// The same.
    fn poll_timeout(&self) -> Option<Time>;
    /// Nothing but time passed.
    fn tick() -> Self::Input;
    /// A record is on the disk.
    fn journaled(record: Record) -> Self::Input;
    /// A record is not.
    fn journal_failed(record: Record, why: Failure) -> Self::Input;
    /// What an output is called.
    fn name(output: &Self::Output) -> Name;
}

macro_rules! engine {
    ($module:ident, $engine:ident, $name:path) => {
        impl Engine for $module::$engine {
            type Input = $module::Input;
            type Output = $module::Output;

            fn handle(&mut self, now: Time, input: Self::Input) {
                $module::$engine::handle(self, now, input);
            }

            fn poll(&mut self) -> Option<Self::Output> {
                $module::$engine::poll(self)
            }

            fn poll_timeout(&self) -> Option<Time> {
                $module::$engine::poll_timeout(self)
            }

            fn tick() -> Self::Input {
                $module::Input::Tick
            }

            fn journaled(record: Record) -> Self::Input {
                $module::Input::Journaled(record)
            }

            fn journal_failed(record: Record, why: Failure) -> Self::Input {
                $module::Input::JournalFailed(record, why)
            }

            fn name(output: &Self::Output) -> Name {
                $name(output)
            }
        }
    };
}

engine!(source, Source, names::of_source);
engine!(destination, Destination, names::of_destination);

/// What every host has.
#[derive(Debug)]
pub(super) struct Host {
    /// The journal.
    pub(super) disk: Disk,
    /// Counts the daemons: one that was started anew does not get what was meant for the one before.
    pub(super) generation: u32,
    /// When the engine is called next.
    pub(super) tick_at: Option<Time>,
    /// The daemon is not started again.
    pub(super) gone: bool,
}

impl Host {
    /// With an empty journal.
    pub(super) fn new(disk: Disk) -> Host {
        Host {
            disk,
            generation: 0,
            tick_at: None,
            gone: false,
        }
    }
}

/// The driver of an engine.
pub(super) trait Driver: Sized {
    /// The engine.
    type Engine: Engine;
    /// What happens in this side's daemon.
    type Event: From<DaemonEvent<<Self::Engine as Engine>::Input>>;
    /// Which side it is.
    const SIDE: Side;
    /// The side in the trace.
    const WHO: &'static str;

    /// What every host has.
    fn host(&mut self) -> &mut Host;
    /// The engine, if there is a daemon with one.
    fn engine(&mut self) -> Option<&mut Self::Engine>;
    /// An event for the agenda.
    fn enter(generation: u32, event: Self::Event) -> Event;
    /// Begins to do what the engine asks for.
    fn carry_out(&mut self, env: &mut Env, output: <Self::Engine as Engine>::Output);
    /// The engine is about to be told.
    fn about_to_hear(&mut self, env: &mut Env, input: &<Self::Engine as Engine>::Input);
    /// The daemon dies, or the whole `host`, and the kernel closes what it had open.
    fn die(&mut self, env: &mut Env, restart: Option<Micros>, host: bool);

    /// Tells the engine something, and does what it asks for then.
    fn input(&mut self, env: &mut Env, input: <Self::Engine as Engine>::Input) {
        if self.engine().is_none() {
            return;
        }
        if let Some(until) = env.held_until(Self::SIDE) {
            return self.event_at(env, until, DaemonEvent::Answer(Box::new(input)));
        }
        env.note(Self::WHO, format_args!("<- {input:?}"));
        self.about_to_hear(env, &input);
        let now = env.clock(Self::SIDE);
        if let Some(engine) = self.engine() {
            engine.handle(now, input);
        }
        self.carry_out_all(env);
    }

    /// Carries all outputs out in their order, unless the daemon dies on the way.
    fn carry_out_all(&mut self, env: &mut Env) {
        while let Some(output) = self.engine().and_then(Self::Engine::poll) {
            env.note(Self::WHO, format_args!("-> {output:?}"));
            let death = env.output_given(Self::SIDE, Self::Engine::name(&output));
            match death {
                Some(Death {
                    before: true,
                    host,
                    restart,
                }) => return self.die(env, restart, host),
                _ => self.carry_out(env, output),
            }
            if let Some(Death { host, restart, .. }) = death {
                return self.die(env, restart, host);
            }
        }
        self.schedule_tick(env);
    }

    /// Sees to it that the engine is called when it wants to be.
    fn schedule_tick(&mut self, env: &mut Env) {
        if env.errs(Mistake::LostTimer) {
            return;
        }
        let Some(at) = self.engine().and_then(|engine| engine.poll_timeout()) else {
            return;
        };
        if let Some(at) = env.next_tick(Self::SIDE, at, self.host().tick_at) {
            self.host().tick_at = Some(at);
            self.event_at(env, at, DaemonEvent::Tick);
        }
    }

    /// Something that happens in either daemon.
    fn daemon_happens(
        &mut self,
        env: &mut Env,
        event: DaemonEvent<<Self::Engine as Engine>::Input>,
    ) {
        match event {
            DaemonEvent::Tick => self.tick(env),
            DaemonEvent::Answer(input) => self.input(env, *input),
            DaemonEvent::Append(record) => self.append(env, record, Hand::Daemon),
            DaemonEvent::Synced(end, record, hand) => {
                self.host().disk.synced(end);
                if hand == Hand::Session {
                    self.input(env, Self::Engine::journaled(record));
                }
            }
        }
    }

    /// Time may have come for what the engine waits for.
    fn tick(&mut self, env: &mut Env) {
        self.host().tick_at = None;
        let now = env.clock(Self::SIDE);
        if let Some(engine) = self.engine()
            && engine.poll_timeout().is_some_and(|at| at <= now)
        {
            engine.handle(now, Self::Engine::tick());
        }
        self.carry_out_all(env);
    }

    /// Puts an answer on the agenda.
    fn answer_after(
        &mut self,
        env: &mut Env,
        delay: Duration,
        input: <Self::Engine as Engine>::Input,
    ) {
        self.event_after(env, delay, DaemonEvent::Answer(Box::new(input)));
    }

    /// Puts something on the agenda that happens in this daemon only.
    fn event_after(&mut self, env: &mut Env, delay: Duration, event: impl Into<Self::Event>) {
        let at = env.now().after(delay);
        self.event_at(env, at, event);
    }

    /// The same, for a certain time.
    fn event_at(&mut self, env: &mut Env, at: Time, event: impl Into<Self::Event>) {
        let generation = self.host().generation;
        env.agenda.at(at, Self::enter(generation, event.into()));
    }

    /// Writes a record that the engine wants written.
    fn journal(&mut self, env: &mut Env, record: Record) {
        let planted = match record {
            Record::Committed => [Mistake::NoCommittedRecord, Mistake::LateCommittedRecord],
            Record::CommitIntent => [
                Mistake::NoCommitIntentRecord,
                Mistake::LateCommitIntentRecord,
            ],
            _ => return self.append(env, record, Hand::Session),
        };
        if !planted.iter().any(|mistake| env.errs(*mistake)) {
            return self.append(env, record, Hand::Session);
        }
        // It is said to be on the disk, and is not: it never will be, or only when it has been acted upon.
        let synced = env.delay(1_000);
        self.answer_after(env, synced, Self::Engine::journaled(record.clone()));
        if env.errs(planted[1]) {
            let late = env.rng.micros(5_000, 20_000);
            self.event_after(env, synced + late, DaemonEvent::Append(record));
        }
    }

    /// Appends a record to the journal. The engine hears of it if its session writes; the daemon's own records are logged
    /// as lost, and whoever asks makes it try again.
    fn append(&mut self, env: &mut Env, record: Record, hand: Hand) {
        let line = journal::encode(&record);
        let now = env.now();
        match self.host().disk.append(&line, hand, now) {
            Ok(taken) => {
                if taken.takes > SLOW {
                    env.tally.note(Happened::SlowDisk(Self::SIDE));
                }
                let synced = DaemonEvent::Synced(taken.end, record, hand);
                self.event_at(env, taken.at, synced);
            }
            Err(refused) => {
                env.tally.note(if refused.full {
                    Happened::DiskFull(Self::SIDE)
                } else {
                    Happened::DiskRefused(Self::SIDE)
                });
                if hand == Hand::Session {
                    let why = failure(Blame::ThisHost, "the journal's disk refuses");
                    let answer = Box::new(Self::Engine::journal_failed(record, why));
                    self.event_at(env, refused.at, DaemonEvent::Answer(answer));
                }
            }
        }
    }

    /// What the death of a daemon, or of a whole `host`, does on every host.
    fn end_daemon(&mut self, env: &mut Env, host: bool) {
        let side = Self::SIDE;
        env.tally.note(Happened::DaemonDied(side));
        if host {
            env.tally.note(Happened::HostDied(side));
            // Nobody is there to close its connections: the peer hears nothing.
            env.wires.cut_seen_only_by(side);
        }
        env.release(side);
        let Damage { torn, lost } = self.host().disk.crash(host);
        if torn {
            env.tally.note(Happened::TornLine(side));
        }
        if lost {
            env.tally.note(Happened::LostRecord(side));
        }
        self.host().generation += 1;
        self.host().tick_at = None;
    }

    /// The daemon is started again after the time; never, without one.
    fn start_again(&mut self, env: &mut Env, restart: Option<Micros>) {
        match restart {
            Some(delay) => env.agenda.after(micros(delay), Event::Restart(Self::SIDE)),
            None => self.host().gone = true,
        }
    }
}
