//! One run: two hosts, the network between them, and time, until both engines have ended.

mod operators;

use std::time::Duration;

use pagecopy::engine::destination::Input as ToDestination;
use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::source::{Change, Input as ToSource};
use pagecopy::engine::{Failure, Fault as Blame, Time};

use super::checker::{CHANNEL_LIMIT, Checker, Violation};
use super::destination::DestinationSide;
use super::driver::Driver;
use super::env::{Env, Event, failure};
use super::fault::{Fault, Micros, micros};
use super::mistake::Mistake;
use super::plan::{Plan, Side};
use super::ram::SimRam;
use super::rng::Rng;
use super::source::SourceSide;
use super::tally::{Happened, Tally};
use super::trace::Trace;

/// The guest has run for so long before the run begins.
const START: Time = Time(1_000_000_000);
/// Events of one run.
const MAX_STEPS: u64 = 100_000;
/// Virtual time of one run, doubt and operators included.
const MAX_TIME: Duration = Duration::from_secs(3_600);
/// Both sides have ended: so much longer, for what comes too late.
const AFTERMATH: Duration = Duration::from_secs(1);
/// The source is in doubt, and it looks as if nothing could end that: so much longer, to see whether something does.
const PATIENCE: Duration = Duration::from_secs(600);

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The state that the source ended in.
    pub state: State,
    /// Whether the source was in doubt on the way.
    pub doubted: bool,
    /// Where the guest runs at the end.
    pub guest: Option<Side>,
    /// Why it did not complete, in the source's words.
    pub failure: Option<Failure>,
    /// The figures of the source's engine.
    pub figures: Figures,
    /// Events that it took.
    pub steps: u64,
    /// Virtual time that it took.
    pub time: Duration,
    /// What happened to it.
    pub tally: Tally,
    /// The broken invariant, if one was.
    pub violation: Option<Violation>,
    /// What happened; empty unless asked for.
    pub trace: Vec<String>,
}

/// All of a run.
pub(super) struct World {
    env: Env,
    source: SourceSide,
    destination: DestinationSide,
    steps: u64,
    /// An operator has been told of a pause, and will look.
    operator_called: bool,
}

impl World {
    /// The world of a plan, with the migration about to begin.
    pub(super) fn new(plan: &Plan, mistake: Option<Mistake>, trace: bool) -> World {
        let seed = Rng::new(plan.chance);
        let source_ram = SimRam::new(&plan.blocks);
        let mut theirs = plan.blocks.clone();
        for (block, index) in plan.blocks.iter().zip(&plan.order) {
            theirs[*index] = block.clone();
        }
        let destination_ram = SimRam::new(&theirs);
        let checker = Checker::new(
            source_ram.clone(),
            destination_ram.clone(),
            plan.order.clone(),
        );
        let env = Env::new(
            plan.clone(),
            &seed,
            checker,
            Trace::new(trace),
            mistake,
            START,
        );
        let source = SourceSide::new(&env, &seed, source_ram);
        let destination = DestinationSide::new(
            &env,
            &seed,
            destination_ram,
            source.ram.clone(),
            source.id(),
        );
        World {
            env,
            source,
            destination,
            steps: 0,
            operator_called: false,
        }
    }

    /// Runs to the end.
    pub(super) fn run(mut self) -> Outcome {
        let env = &mut self.env;
        let (ours, theirs) = env
            .wires
            .connect(&self.source.regions, &self.destination.regions);
        self.destination.begin(env, theirs);
        self.source.begin(env, ours);
        let mut end = None;
        while self.env.checker.violation().is_none() {
            end = match end {
                _ if !self.ended() => None,
                None if self.source.settled() => Some(self.env.now().after(AFTERMATH)),
                None => Some(self.env.now().after(PATIENCE)),
                end => end,
            };
            let Some(next) = self.next_event() else { break };
            if end.is_some_and(|end| next > end) || self.gave_up() {
                break;
            }
            self.step(next);
        }
        self.check_end();
        self.outcome()
    }

    /// Nothing more is to be expected.
    fn ended(&self) -> bool {
        (self.destination.settled() && self.source.settled())
            || self.in_doubt_for_good()
            || self.paused_for_good()
    }

    fn next_event(&self) -> Option<Time> {
        self.env
            .agenda
            .next()
            .into_iter()
            .chain(self.env.wires.next_event())
            .min()
    }

    /// The budget of a run is used up.
    fn gave_up(&mut self) -> bool {
        self.steps += 1;
        let late = self.env.now().since(START) > MAX_TIME;
        if self.steps > MAX_STEPS || late {
            let what = format!(
                "no end after {} events and {:?}",
                self.steps,
                self.env.now().since(START)
            );
            self.env.checker.violate(what);
            return true;
        }
        false
    }

    /// All that happens at `now`: on the network, or one event of the agenda.
    fn step(&mut self, now: Time) {
        let of_agenda = self.env.agenda.next() == Some(now);
        let event = if of_agenda {
            self.env.agenda.take()
        } else {
            None
        };
        self.env.agenda.pass_to(now);
        let lives = self.source.qemu.running() && !self.env.stands_still(Side::Source);
        self.source.guest.live_until(now, lives);
        self.destination.live(&mut self.env);
        self.env.wires.advance_to(now);
        if let Some(event) = event {
            self.happens(event);
        }
        if !self.env.holds(Side::Source) {
            self.source.poll(&mut self.env);
        }
        if !self.env.holds(Side::Destination) {
            self.destination.poll(&mut self.env);
            while let Some(channels) = self.env.incoming.pop_front() {
                self.destination.accept(channels);
            }
        }
        self.call_the_operator();
        self.env.checker.tick(now);
    }

    fn happens(&mut self, event: Event) {
        let env = &mut self.env;
        if let Some(until) = env.waits_until(&event) {
            return env.agenda.at(until, event);
        }
        match event {
            Event::Source(generation, event) => self.source.happens(env, generation, event),
            Event::Destination(generation, event) => {
                self.destination.happens(env, generation, event)
            }
            Event::SourceQemu(command, step) => self.source.qemu_steps(env, command, step),
            Event::DestinationQemu(command, step) => {
                self.destination.qemu_steps(env, command, step)
            }
            Event::Fault(fault) => self.goes_wrong(fault),
            Event::Heal => {
                env.note("network", format_args!("is whole again"));
                env.wires.heal(env.agenda.now());
            }
            Event::HealOneWay(side) => {
                env.note("network", format_args!("what {side:?} sends arrives again"));
                env.wires.heal_one_way(side);
            }
            Event::GoesOn(side) => {
                env.goes_on(side);
                self.schedule_tick(side);
            }
            Event::Restart(Side::Source) => self.source.restart(env),
            Event::Restart(Side::Destination) => self.destination.restart(env),
            Event::Operator => self.operator_looks(),
        }
    }

    fn goes_wrong(&mut self, fault: Fault) {
        let open = !self.source.settled();
        let alive = [self.source.alive(), self.destination.alive()];
        let env = &mut self.env;
        env.note("fault", format_args!("{fault:?}"));
        let mut note = |what: Happened| {
            if open {
                env.tally.note(what);
            }
        };
        match fault {
            Fault::Cut => {
                note(Happened::Cut);
                env.wires.cut();
            }
            Fault::CutChannel(number) => {
                note(Happened::ChannelCut);
                env.wires.cut_channel(number);
            }
            Fault::CutSeenOnlyBy(side) => {
                note(Happened::CutSeenOnlyBy(side));
                env.wires.cut_seen_only_by(side);
            }
            Fault::Stall(time) => {
                note(Happened::Stalled);
                env.wires.stall_until(env.agenda.now().after(micros(time)));
            }
            Fault::Silence(time) => {
                note(Happened::Silence);
                env.wires.silence(time.is_some());
                if let Some(time) = time {
                    env.agenda.after(micros(time), Event::Heal);
                }
            }
            Fault::OneWay(side, time) => {
                note(Happened::OneWaySilence(side));
                env.wires.silence_one_way(side);
                env.agenda.after(micros(time), Event::HealOneWay(side));
            }
            Fault::ClockJumps(side, time) => {
                note(Happened::ClockJumped(side));
                env.jump(side, micros(time));
                self.schedule_tick(side);
            }
            Fault::Freeze(side, _) if !alive[side as usize] => {}
            Fault::Freeze(side, time) => {
                note(Happened::Frozen(side));
                env.freeze(side, micros(time));
            }
            Fault::Sleep {
                side,
                time,
                clock_goes,
            } => {
                note(if clock_goes {
                    Happened::SleptClockWent(side)
                } else {
                    Happened::SleptClockStood(side)
                });
                env.stand_still(side, micros(time), clock_goes);
            }
            Fault::DiskFills(side, time) => {
                let until =
                    time.map_or(Time(u64::MAX), |time| env.agenda.now().after(micros(time)));
                self.disk(side).fill_until(until);
            }
            Fault::DiskSlows(side, by) => self.disk(side).slow_down(micros(by)),
            Fault::HostFails(side) => {
                note(Happened::HostFailed(side));
                let why = failure(Blame::ThisHost, "the host was made to fail");
                match side {
                    Side::Source => self.source.input(env, ToSource::HostFailed(why)),
                    Side::Destination if self.destination.depends() => {
                        self.destination.input(env, ToDestination::PullFailed(why))
                    }
                    Side::Destination => {
                        self.destination.input(env, ToDestination::HostFailed(why))
                    }
                }
            }
            Fault::Cancel(Side::Source) => self.source.cancel(env),
            Fault::Cancel(Side::Destination) => self.destination.cancel(env),
            Fault::QemuDies(Side::Source) => self.source.qemu_dies(env),
            Fault::QemuDies(Side::Destination) => self.destination.qemu_dies(env),
            Fault::DaemonDies(side, restart) => self.dies(side, restart, false),
            Fault::HostDies(side, restart) => self.dies(side, restart, true),
            Fault::Ask(side, wish) => self.operator_asks(side, wish, false),
            Fault::FenceAndAsk(side, wish) => self.operator_asks(side, wish, true),
            Fault::StartPostcopy => {
                if self.source.state() == Some(State::Migrating) {
                    note(Happened::WentByHand);
                }
                self.source.input(env, ToSource::StartPostcopy);
            }
            Fault::Set {
                bandwidth,
                downtime_us,
            } => {
                let change = Change {
                    bandwidth_limit: bandwidth.map(|limit| Some(limit).filter(|limit| *limit > 0)),
                    downtime_limit: downtime_us.map(micros),
                };
                self.source.set(env, change);
            }
            Fault::Recover => self.source.input(env, ToSource::Recover),
            Fault::GiveUpPages { fenced } => self.give_pages_up(fenced),
        }
    }

    fn disk(&mut self, side: Side) -> &mut super::disk::Disk {
        match side {
            Side::Source => &mut self.source.host.disk,
            Side::Destination => &mut self.destination.host.disk,
        }
    }

    fn dies(&mut self, side: Side, restart: Option<Micros>, host: bool) {
        match side {
            Side::Source => self.source.die(&mut self.env, restart, host),
            Side::Destination => self.destination.die(&mut self.env, restart, host),
        }
    }

    fn schedule_tick(&mut self, side: Side) {
        match side {
            Side::Source => self.source.schedule_tick(&mut self.env),
            Side::Destination => self.destination.schedule_tick(&mut self.env),
        }
    }

    fn check_end(&mut self) {
        if self.env.checker.violation().is_some() {
            return;
        }
        let ended = self.source.ended;
        let here = self.env.checker.runs(Side::Source);
        let there = self.env.checker.runs(Side::Destination);
        let [lost_here, lost_there] = self.env.qemu_lost;
        // What came before its memory may be lost there, or be let go of by the operator's word.
        let went = self.destination.went_first() && self.env.checker.arrived();
        let excused = went && (lost_there || self.env.let_go_by_word);
        // It has run there, and ended with its host or QEMU: nobody could bring it back, whatever the source was told.
        let ended_there = lost_there && self.env.checker.arrived();
        let broken = match ended {
            _ if self.source.host.gone => None,
            _ if self.paused_for_good() => {
                self.env.tally.note(Happened::PausedForGood);
                None
            }
            None => Some("the source never ended".to_owned()),
            Some(State::Completed) if here => {
                Some("completed, and the guest runs at the source".to_owned())
            }
            Some(State::Completed) if !there && !lost_there && !self.env.let_go_by_word => {
                Some("completed, and no guest runs".to_owned())
            }
            Some(State::Failed | State::Cancelled) if there && !excused => {
                Some("failed, and the guest runs at the destination".to_owned())
            }
            Some(State::Failed | State::Cancelled)
                if !here
                    && !lost_here
                    && !self.source.resume_failed
                    && !excused
                    && !ended_there
                    && !self.env.let_go_by_word =>
            {
                Some("failed, and no guest runs".to_owned())
            }
            // The guest may run here all the same: taken back by a daemon that died before it could write that down.
            _ if self.in_doubt_for_good() => {
                self.env.tally.note(Happened::DoubtedForGood);
                None
            }
            _ if !self.source.settled() => Some(format!("the source is still {ended:?}")),
            _ if !self.destination.settled() => Some("the destination never ended".to_owned()),
            _ => self.source.left_behind().map(str::to_owned),
        };
        let broken = broken
            .or_else(|| self.destination.denies_its_guest(there))
            .or_else(|| self.destination.wrong_page());
        if let Some(what) = broken {
            self.env.checker.violate(what);
        }
    }

    fn outcome(mut self) -> Outcome {
        let clocks = [Side::Source, Side::Destination].map(|side| self.env.clock_error(side));
        if clocks[0].abs_diff(clocks[1]) > 1_000_000_000 {
            self.env.tally.note(Happened::ClocksDrifted);
        }
        if self.env.wires.partial_writes() > 0 {
            self.env.tally.note(Happened::PartialWrite);
        }
        if self.env.checker.most_in_flight() * 4 > CHANNEL_LIMIT * 3 {
            self.env.tally.note(Happened::NearlyFullChannel);
        }
        let guest = [Side::Source, Side::Destination]
            .into_iter()
            .find(|side| self.env.checker.runs(*side));
        Outcome {
            state: self.source.ended.unwrap_or(State::Pending),
            doubted: self.source.doubted,
            guest,
            failure: self.source.failure,
            figures: self.source.figures,
            steps: self.steps,
            time: self.env.now().since(START),
            tally: self.env.tally,
            violation: self.env.checker.violation().cloned(),
            trace: self.env.trace.into_lines(),
        }
    }
}
