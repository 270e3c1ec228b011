//! One run: two hosts, the network between them, and time, until both engines have ended.

use std::time::Duration;

use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::source::Resolution;
use pagecopy::engine::{Failure, Time};

use super::checker::{Checker, Violation};
use super::destination::DestinationSide;
use super::env::{Env, Event};
use super::mistake::Mistake;
use super::plan::{Fault, Plan, Side, Theme};
use super::ram::SimRam;
use super::rng::Rng;
use super::source::SourceSide;
use super::trace::Trace;

/// The guest has run for so long before the run begins.
const START: Time = Time(1_000_000_000);
/// Events of one run; far more than any needs.
const MAX_STEPS: u64 = 400_000;
/// Virtual time of one run, doubt and operators included.
const MAX_TIME: Duration = Duration::from_secs(7_200);
/// Both sides have ended: so much longer, for what comes too late.
const AFTERMATH: Duration = Duration::from_secs(1);

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
}

impl World {
    /// The world of `seed`, with the migration about to begin.
    pub(super) fn new(theme: Theme, seed: u64, mistake: Option<Mistake>, trace: bool) -> World {
        let seed = Rng::new(seed);
        let plan = Plan::new(theme, &seed);
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
        let mut trace = Trace::new(trace);
        trace.line(START, "plan", format_args!("{plan:?}"));
        let env = Env::new(plan, &seed, checker, trace, mistake, START);
        let source = SourceSide::new(&env, &seed, source_ram);
        let destination = DestinationSide::new(&env, &seed, destination_ram, source.id());
        World {
            env,
            source,
            destination,
            steps: 0,
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
            if self.source.settled() && self.destination.settled() {
                end = end.or(Some(self.env.now().after(AFTERMATH)));
            } else {
                end = None;
            }
            let Some(next) = self.next_event() else { break };
            if end.is_some_and(|end| next > end) || self.gave_up() {
                break;
            }
            self.step(next);
        }
        self.check_end();
        self.outcome()
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
        self.source
            .guest
            .live_until(now, self.source.qemu.running());
        self.env.wires.advance_to(now);
        if let Some(event) = event {
            self.happens(event);
        }
        self.source.poll(&mut self.env);
        self.destination.poll(&mut self.env);
        while let Some(channel) = self.env.incoming.pop_front() {
            self.destination.accept(channel);
        }
        self.env.checker.tick(now);
    }

    fn happens(&mut self, event: Event) {
        let env = &mut self.env;
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
            Event::Restart(Side::Source) => self.source.restart(env),
            Event::Restart(Side::Destination) => self.destination.restart(env),
            Event::Operator => self.operator_looks(),
        }
    }

    fn goes_wrong(&mut self, fault: Fault) {
        let env = &mut self.env;
        env.note("fault", format_args!("{fault:?}"));
        match fault {
            Fault::Cut => env.wires.cut(),
            Fault::Stall(time) => env.wires.stall_until(env.agenda.now().after(time)),
            Fault::Silence(time) => {
                env.wires.silence(time.is_some());
                if let Some(time) = time {
                    env.agenda.after(time, Event::Heal);
                }
            }
            Fault::Cancel(Side::Source) => self.source.cancel(env),
            Fault::Cancel(Side::Destination) => self.destination.cancel(env),
            Fault::QemuDies(Side::Source) => self.source.qemu_dies(env),
            Fault::QemuDies(Side::Destination) => self.destination.qemu_dies(env),
            Fault::DaemonDies(Side::Source, restart) => self.source.die(env, restart),
            Fault::DaemonDies(Side::Destination, restart) => self.destination.die(env, restart),
        }
    }

    /// An operator finds the migration in doubt. As long as the other host can help, time will; otherwise the operator
    /// makes sure of the other host's state and decides.
    fn operator_looks(&mut self) {
        if self.source.ended != Some(State::InDoubt) {
            return;
        }
        let env = &mut self.env;
        let reachable = env.wires.reachable() && !self.destination.cannot_help();
        // What the operator wants may be refused, and time may be all that it takes: another look, later.
        env.agenda.after(Duration::from_secs(60), Event::Operator);
        if reachable {
            return;
        }
        if env.checker.runs(Side::Destination) {
            self.source.resolve(env, Resolution::Abandon);
        } else {
            self.destination.shut_down(env);
            let fenced = Resolution::ResumeHere { peer_fenced: true };
            self.source.resolve(env, fenced);
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
        let broken = match ended {
            None => Some("the source never ended".to_owned()),
            Some(State::Completed) if here => {
                Some("completed, and the guest runs at the source".to_owned())
            }
            Some(State::Completed) if !there && !lost_there => {
                Some("completed, and no guest runs".to_owned())
            }
            Some(State::Failed | State::Cancelled) if there => {
                Some("failed, and the guest runs at the destination".to_owned())
            }
            Some(State::Failed | State::Cancelled)
                if !here && !lost_here && !self.source.resume_failed =>
            {
                Some("failed, and no guest runs".to_owned())
            }
            _ if !self.source.settled() => Some(format!("the source is still {ended:?}")),
            _ if !self.destination.settled() => Some("the destination never ended".to_owned()),
            _ => self.source.left_behind().map(str::to_owned),
        };
        if let Some(what) = broken {
            self.env.checker.violate(what);
        }
    }

    fn outcome(self) -> Outcome {
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
            violation: self.env.checker.violation().cloned(),
            trace: self.env.trace.into_lines(),
        }
    }
}
