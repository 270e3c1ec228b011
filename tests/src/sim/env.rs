//! What both sides of a run share: time, chance, the network, the checker, the trace, and what is still to go wrong.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use pagecopy::engine::bitmap::Bitmap;
use pagecopy::engine::journal::Record;
use pagecopy::engine::{ChannelId, Failure, Fault as Blame, Time, destination, source};
use pagecopy::memory::Run;
use transport::Regions;
use transport::mem::MemChannel;

use super::agenda::Agenda;
use super::checker::Checker;
use super::clock::Clock;
use super::disk::Hand;
use super::fault::{Fault, Micros, Moment, When, micros};
use super::mistake::Mistake;
use super::names::Name;
use super::network::Wires;
use super::plan::{Plan, Side};
use super::rng::Rng;
use super::tally::{Happened, Tally};
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
    /// What that side sends arrives again.
    HealOneWay(Side),
    /// A host or daemon that stood still goes on.
    GoesOn(Side),
    /// A daemon is started again.
    Restart(Side),
    /// The operator looks at a migration in doubt.
    Operator,
}

/// What happens in either daemon.
#[derive(Debug)]
pub(super) enum DaemonEvent<I> {
    /// The engine wanted to be called.
    Tick,
    /// An answer to an output is ready.
    Answer(Box<I>),
    /// A record is written that was said to be on the disk before. Only a planted mistake does so.
    Append(Record),
    /// A write to the journal is on the disk up to this byte.
    Synced(usize, Record, Hand),
}

/// What happens in the source's daemon.
#[derive(Debug)]
pub(super) enum SourceEvent {
    /// As in the other.
    Daemon(DaemonEvent<source::Input>),
    /// A channel's thread takes up what is next in its queue.
    Work(ChannelId),
    /// A channel has copied all of that batch.
    Handed(u64),
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
    /// A connection is tried, with that number; with all channels or only one.
    Connect(u32, bool),
    /// It cannot be made, and why.
    ConnectFails(u32, &'static str),
    /// The same, and somebody is there.
    ConnectRefused(u32, &'static str),
    /// What was still to be sent has had its time.
    Close,
}

impl From<DaemonEvent<source::Input>> for SourceEvent {
    fn from(event: DaemonEvent<source::Input>) -> SourceEvent {
        SourceEvent::Daemon(event)
    }
}

/// What happens in the destination's daemon.
#[derive(Debug)]
pub(super) enum DestinationEvent {
    /// As in the other.
    Daemon(DaemonEvent<destination::Input>),
    /// The RAM is cleared and registered.
    Prepare,
    /// A zero run is placed, later than it should be.
    LateZero(Vec<Run>),
    /// Page faults are made to wait.
    Arm(Bitmap),
    /// Somebody touched a page that is not mapped.
    PageFault(usize),
    /// Pages are marked as received, later than they should be.
    Mark(Vec<usize>),
    /// It is looked at what can be asked for.
    PullOn,
    /// It is said what lacks.
    Say,
    /// What was still to be sent has had its time.
    Close {
        /// Of which session.
        session: u32,
    },
}

impl From<DaemonEvent<destination::Input>> for DestinationEvent {
    fn from(event: DaemonEvent<destination::Input>) -> DestinationEvent {
        DestinationEvent::Daemon(event)
    }
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
    pub(super) tally: Tally,
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) mistake: Option<Mistake>,
    /// The destination's daemon is there to be connected to.
    pub(super) destination_listens: bool,
    /// Connections that the destination has not accepted yet.
    pub(super) incoming: VecDeque<Vec<MemChannel>>,
    /// What the destination lets its peer write and read.
    pub(super) destination_regions: Regions,
    /// Barriers that overtake what was sent before them; only a planted mistake makes them.
    pub(super) early_barriers: Vec<(ChannelId, u32)>,
    /// A QEMU with the guest in it was made to fail: the guest may be lost by no fault of ours.
    pub(super) qemu_lost: [bool; 2],
    /// The source's operator has said that the guest runs at the destination, be that true or not.
    pub(super) let_go_by_word: bool,
    /// The guest, at the destination, lacks pages.
    pub(super) guest_lacks: bool,
    clocks: [Clock; 2],
    /// The daemon does nothing before then.
    held: [Time; 2],
    /// The whole host does nothing before then.
    asleep: [Time; 2],
    outputs: [u64; 2],
    waiting: Vec<Waiting>,
}

/// A fault that waits for an output.
#[derive(Debug)]
struct Waiting {
    when: When,
    fault: Fault,
}

/// A daemon dies at an output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Death {
    /// Before the output is carried out; otherwise right after.
    pub(super) before: bool,
    /// The whole host does.
    pub(super) host: bool,
    /// When it is started again, if ever.
    pub(super) restart: Option<Micros>,
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
                When::Time(delay) => agenda.after(micros(*delay), Event::Fault(*fault)),
                _ => waiting.push(Waiting {
                    when: when.clone(),
                    fault: *fault,
                }),
            }
        }
        Env {
            agenda,
            wires: Wires::new(seed.stream("network"), plan.network, now),
            checker,
            trace,
            tally: Tally::default(),
            rng: seed.stream("run"),
            clocks: [
                Clock::new(plan.source.clock, now),
                Clock::new(plan.destination.clock, now),
            ],
            plan,
            mistake,
            destination_listens: true,
            incoming: VecDeque::new(),
            destination_regions: Regions::new(),
            early_barriers: Vec::new(),
            qemu_lost: [false; 2],
            let_go_by_word: false,
            guest_lacks: false,
            held: [Time(0); 2],
            asleep: [Time(0); 2],
            outputs: [0; 2],
            waiting,
        }
    }

    /// The time.
    pub(super) fn now(&self) -> Time {
        self.agenda.now()
    }

    /// The time by that side's clock.
    pub(super) fn clock(&self, side: Side) -> Time {
        self.clocks[side as usize].at(self.now())
    }

    /// By how many nanoseconds that side's clock has run ahead of the time that has passed.
    pub(super) fn clock_error(&self, side: Side) -> i64 {
        let epoch = self.plan.host(side).clock.epoch_s;
        let shown = i128::from(self.clock(side).0) - i128::from(epoch) * 1_000_000_000;
        i64::try_from(shown - i128::from(self.now().0)).unwrap_or(i64::MAX)
    }

    /// That side's clock jumps ahead.
    pub(super) fn jump(&mut self, side: Side, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.clocks[side as usize].jump(self.agenda.now(), nanos);
    }

    /// That side's daemon is stopped for a time.
    pub(super) fn freeze(&mut self, side: Side, time: Duration) {
        let until = self.now().after(time);
        let held = &mut self.held[side as usize];
        *held = until.max(*held);
        self.agenda.at(until, Event::GoesOn(side));
        self.checker.held(side, time);
    }

    /// That side's whole host stands still for a time.
    pub(super) fn stand_still(&mut self, side: Side, time: Duration, clock_goes: bool) {
        self.freeze(side, time);
        let until = self.now().after(time);
        let asleep = &mut self.asleep[side as usize];
        *asleep = until.max(*asleep);
        self.clocks[side as usize].stand(self.agenda.now(), !clock_goes);
    }

    /// A daemon or host may have stood still until now.
    pub(super) fn goes_on(&mut self, side: Side) {
        if !self.stands_still(side) {
            self.clocks[side as usize].stand(self.agenda.now(), false);
        }
    }

    /// Whether that side's daemon does nothing now.
    pub(super) fn holds(&self, side: Side) -> bool {
        self.held_until(side).is_some()
    }

    /// A daemon that dies need not be waited for, unless its host sleeps.
    pub(super) fn release(&mut self, side: Side) {
        self.held[side as usize] = self.asleep[side as usize];
    }

    /// Until when that side's daemon does nothing.
    pub(super) fn held_until(&self, side: Side) -> Option<Time> {
        Some(self.held[side as usize]).filter(|until| *until > self.now())
    }

    /// Whether that side's whole host sleeps.
    pub(super) fn stands_still(&self, side: Side) -> bool {
        self.asleep[side as usize] > self.now()
    }

    /// Until when an event has to wait, because that to which it happens stands still.
    pub(super) fn waits_until(&self, event: &Event) -> Option<Time> {
        let still_until =
            |side: Side| Some(self.asleep[side as usize]).filter(|at| *at > self.now());
        match event {
            Event::Source(..) => self.held_until(Side::Source),
            Event::Destination(..) => self.held_until(Side::Destination),
            Event::SourceQemu(..) => still_until(Side::Source),
            Event::DestinationQemu(..) => still_until(Side::Destination),
            Event::Restart(side) => still_until(*side),
            _ => None,
        }
    }

    /// A line of the trace, of now.
    pub(super) fn note(&mut self, who: &str, what: fmt::Arguments<'_>) {
        self.trace.line(self.agenda.now(), who, what);
    }

    /// When an engine that wants to be called at `at` by its clock will be, unless its call is `scheduled` before that
    /// already. A timer may be late, never early.
    pub(super) fn next_tick(
        &mut self,
        side: Side,
        at: Time,
        scheduled: Option<Time>,
    ) -> Option<Time> {
        let at = self.clocks[side as usize].when(at, self.now());
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

    /// A host's operation: what it takes.
    pub(super) fn operation(&mut self, side: Side) -> Duration {
        self.delay(self.plan.host(side).operation_us)
    }

    /// A host's operation: whether it fails.
    pub(super) fn operation_fails(&mut self, side: Side) -> bool {
        let fails = self.rng.chance(self.plan.host(side).operation_fails);
        if fails {
            self.tally.note(Happened::HostFailed(side));
        }
        fails
    }

    /// A QEMU command: what it takes.
    pub(super) fn qemu_delay(&mut self, side: Side) -> Duration {
        self.delay(self.plan.host(side).qemu_us)
    }

    /// A QEMU command: whether it fails.
    pub(super) fn qemu_fails(&mut self, side: Side) -> bool {
        let fails = self.rng.chance(self.plan.host(side).qemu_fails);
        if fails {
            self.tally.note(Happened::QemuFailed(side));
        }
        fails
    }

    /// An engine gave an output: whatever waited for that is put on the agenda. Returns whether and when the daemon dies
    /// of it.
    pub(super) fn output_given(&mut self, side: Side, name: Name) -> Option<Death> {
        let count = &mut self.outputs[side as usize];
        *count += 1;
        if self.waiting.is_empty() {
            return None;
        }
        let count = *count;
        let mut death = None;
        let mut due = Vec::new();
        self.waiting.retain_mut(|waiting| {
            let moment = match &mut waiting.when {
                When::Output(at, nth, moment) if *at == side && *nth == count => *moment,
                When::Named(at, wanted, left, moment) if *at == side && name.is(wanted) => {
                    *left = left.saturating_sub(1);
                    if *left > 0 {
                        return true;
                    }
                    *moment
                }
                _ => return true,
            };
            match (waiting.fault, moment) {
                (
                    Fault::DaemonDies(dies, restart) | Fault::HostDies(dies, restart),
                    Moment::Before | Moment::After,
                ) if dies == side && death.is_none() => {
                    death = Some(Death {
                        before: moment == Moment::Before,
                        host: matches!(waiting.fault, Fault::HostDies(..)),
                        restart,
                    });
                }
                (fault, Moment::Later(time)) => due.push((micros(time), fault)),
                (fault, _) => due.push((Duration::ZERO, fault)),
            }
            false
        });
        for (delay, fault) in due {
            if matches!(fault, Fault::DaemonDies(dies, _) | Fault::HostDies(dies, _) if dies == side)
            {
                self.tally.crashed((side, name, "later"));
            }
            self.agenda.after(delay, Event::Fault(fault));
        }
        if let Some(death) = &death {
            let moment = if death.before { "before" } else { "after" };
            self.tally.crashed((side, name, moment));
        }
        death
    }
}

/// A failure that the simulation made.
pub(super) fn failure(blame: Blame, what: &str) -> Failure {
    Failure::new(blame, what, "nothing: the simulation did it")
}
