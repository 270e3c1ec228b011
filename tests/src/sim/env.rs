//! What both sides of a run share: time, chance, the network, the checker, the trace, and what is still to go wrong.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use pagecopy::engine::journal::Record;
use pagecopy::engine::{ChannelId, Failure, Fault as Blame, Time, destination, source};
use pagecopy::memory::Run;
use transport::mem::MemChannel;

use super::agenda::Agenda;
use super::checker::Checker;
use super::mistake::Mistake;
use super::network::Wires;
use super::plan::{Fault, Plan, Side, When};
use super::rng::Rng;
use super::trace::Trace;

/// Something that will happen. Those of a daemon carry its generation: a daemon that was started anew does not get what
/// was meant for the one before. Those of a QEMU carry the number of the command.
#[derive(Debug)]
pub(super) enum Event {
    /// The source's daemon.
    Source(u32, SourceEvent),
    /// The destination's daemon.
    Destination(u32, DestinationEvent),
    /// The source's QEMU.
    SourceQemu(u32, SourceStep),
    /// The destination's QEMU.
    DestinationQemu(u32, DestinationStep),
    /// Something goes wrong.
    Fault(Fault),
    /// The path between the hosts is whole again.
    Heal,
    /// A daemon is started again.
    Restart(Side),
    /// The operator looks at a migration in doubt.
    Operator,
}

/// What happens in the source's daemon.
#[derive(Debug)]
pub(super) enum SourceEvent {
    /// The engine wanted to be called.
    Tick,
    /// A channel's thread takes up what is next in its queue.
    Work(ChannelId),
    /// A channel has copied all of that batch.
    Handed(u64),
    /// An answer to an output is ready.
    Answer(Box<source::Input>),
    /// The tracker is armed.
    Arm,
    /// What is populated is listed, after arming.
    ListAfterArm,
    /// The tracker is asked.
    Scan {
        /// Whether holes are wanted.
        holes: bool,
    },
    /// The scan is over.
    ScanEnds {
        /// What it found.
        dirty: Vec<Run>,
        /// Whether holes are wanted.
        holes: bool,
        /// When it began.
        began: Time,
    },
    /// A write to the journal is on the disk up to this byte.
    Synced(usize, Record),
    /// A connection is tried.
    Connect,
    /// What was still to be sent has had its time.
    Close,
}

/// What happens in the destination's daemon.
#[derive(Debug)]
pub(super) enum DestinationEvent {
    /// The engine wanted to be called.
    Tick,
    /// An answer to an output is ready.
    Answer(Box<destination::Input>),
    /// The RAM is cleared and registered.
    Prepare,
    /// A zero run is placed, later than it should be.
    LateZero(Vec<Run>),
    /// A write to the journal is on the disk up to this byte: the engine's, or the daemon's own.
    Synced(usize, Record, bool),
    /// What was still to be sent has had its time.
    Close {
        /// Of which session.
        session: u32,
    },
}

/// What happens in the source's QEMU.
#[derive(Debug)]
pub(super) enum SourceStep {
    /// The guest stands and its disk I/O is done.
    AtPreSwitchover,
    /// The command under way fails; the guest goes on running by itself if so.
    Fails {
        /// Whether QEMU lets the guest run again.
        goes_on: bool,
    },
    /// Some of the device state comes out; the last piece ends it.
    DeviceState {
        /// Where this piece begins.
        from: usize,
    },
    /// The guest runs again.
    Resumed,
    /// It cannot.
    ResumeFails,
    /// The process ends.
    Quits,
}

/// What happens in the destination's QEMU.
#[derive(Debug)]
pub(super) enum DestinationStep {
    /// The device state is loaded.
    Loaded,
    /// The guest runs.
    Runs,
    /// The command fails; QEMU dies of it if so.
    Fails {
        /// Whether the process ends.
        dies: bool,
    },
}

/// What both sides share.
#[derive(Debug)]
pub(super) struct Env {
    pub(super) agenda: Agenda<Event>,
    pub(super) wires: Wires,
    pub(super) checker: Checker,
    pub(super) trace: Trace,
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) mistake: Option<Mistake>,
    /// The destination's daemon is there to be connected to.
    pub(super) destination_listens: bool,
    /// Connections that the destination has not accepted yet.
    pub(super) incoming: VecDeque<MemChannel>,
    /// Barriers that overtake what was sent before them; only a planted mistake makes them.
    pub(super) early_barriers: Vec<(ChannelId, u32)>,
    /// A QEMU with the guest in it was made to fail: the guest may be lost by no fault of ours.
    pub(super) qemu_lost: [bool; 2],
    outputs: [u64; 2],
    waiting: Vec<(When, Fault)>,
}

impl Env {
    /// At time `now`, nothing has happened. The timed faults are on the agenda.
    pub(super) fn new(
        plan: Plan,
        seed: &Rng,
        checker: Checker,
        trace: Trace,
        mistake: Option<Mistake>,
        now: Time,
    ) -> Env {
        let mut agenda = Agenda::new(now);
        let mut waiting = Vec::new();
        for (when, fault) in &plan.faults {
            match when {
                When::Time(delay) => agenda.after(*delay, Event::Fault(*fault)),
                _ => waiting.push((*when, *fault)),
            }
        }
        Env {
            agenda,
            wires: Wires::new(seed.stream("network"), plan.network.clone(), now),
            checker,
            trace,
            rng: seed.stream("run"),
            plan,
            mistake,
            destination_listens: true,
            incoming: VecDeque::new(),
            early_barriers: Vec::new(),
            qemu_lost: [false; 2],
            outputs: [0; 2],
            waiting,
        }
    }

    /// The time.
    pub(super) fn now(&self) -> Time {
        self.agenda.now()
    }

    /// A line of the trace, of now.
    pub(super) fn note(&mut self, who: &str, what: fmt::Arguments<'_>) {
        self.trace.line(self.agenda.now(), who, what);
    }

    /// When an engine that wants to be called at `at` will be, unless its call is `scheduled` before that already. A timer
    /// may be late, never early.
    pub(super) fn next_tick(&mut self, at: Time, scheduled: Option<Time>) -> Option<Time> {
        let at = if self.rng.chance(100) {
            at.after(self.rng.micros(1, 2_000))
        } else {
            at
        };
        scheduled
            .is_none_or(|scheduled| at < scheduled || scheduled < self.now())
            .then_some(at)
    }

    /// Whether the planted mistake is this one.
    pub(super) fn errs(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    /// A delay of up to `most` microseconds.
    pub(super) fn delay(&mut self, most: u64) -> Duration {
        self.rng.micros((most / 20).max(1), most.max(1))
    }

    /// An engine gave an output: whatever waited for that is put on the agenda. Returns whether the daemon dies before it
    /// carries the output out, and when it is started again.
    pub(super) fn output_given(&mut self, side: Side, name: &str) -> Option<Option<Duration>> {
        let count = &mut self.outputs[side as usize];
        *count += 1;
        let count = *count;
        let mut death = None;
        let mut due = Vec::new();
        self.waiting.retain(|(when, fault)| {
            let delay = match when {
                When::Output(at, nth, delay) if *at == side && *nth == count => *delay,
                When::Named(at, wanted, delay) if *at == side && *wanted == name => *delay,
                _ => return true,
            };
            match fault {
                Fault::DaemonDies(dies, restart) if *dies == side && delay.is_zero() => {
                    death = Some(*restart)
                }
                _ => due.push((delay, *fault)),
            }
            false
        });
        for (delay, fault) in due {
            self.agenda.after(delay, Event::Fault(fault));
        }
        death
    }
}

/// A failure that the simulation made.
pub(super) fn failure(blame: Blame, what: &str) -> Failure {
    Failure::new(blame, what, "nothing: the simulation did it")
}
