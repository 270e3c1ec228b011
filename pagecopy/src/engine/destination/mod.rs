//! The destination's engine: make ready, receive, load, commit, run.
//!
//! ```text
//! Greeting ──▶ Preparing ──▶ Receive ──▶ Loading ──▶ Loaded ──▶ Committing ──▶ Starting ──▶ Running ──▶ (completed)
//!    │             │            │           │          │            │
//!    └─────────────┴────────────┴───────────┴──────────┴────────────┴──▶ Aborting
//! ```
//!
//! With post-copy `Fetching` and `Ending` take the place of `Running`.
//!
//! Everything to the left of `Committing` may end in `Aborting` at any time. `Committing` ends there only when `Committed`
//! could not be recorded or QEMU is gone, before the guest was told to run; `Starting` and `Running` never do.

mod abort;
mod barriers;
mod commit;
mod core;
mod fetching;
mod greeting;
mod interface;
mod load;
mod reasons;
mod receive;
#[cfg(test)]
mod tests;
mod verify;

pub use fetching::guest_lost;
pub use interface::{Input, Output, Setup};

use self::core::Core;
use super::Time;
use super::end::End;
use super::event::{State, Switch};

/// Receives one guest. See [the engines' common shape](super).
#[derive(Debug)]
pub struct Destination {
    core: Core,
    phase: Phase,
}

/// What an input makes of a phase: the next one, or the reason to give up.
type Step = Result<Phase, End>;

/// Where a migration is.
#[derive(Debug)]
enum Phase {
    Greeting(greeting::Greeting),
    Preparing(greeting::Preparing),
    Receive(receive::Receive),
    Loading(load::Loading),
    Loaded(load::Loaded),
    Committing(commit::Committing),
    Starting(commit::Starting),
    Running(commit::Running),
    Fetching(fetching::Fetching),
    Ending(fetching::Ending),
    Aborting(abort::Aborting),
    Ended,
}

impl Destination {
    /// Waits for the `Hello` of a connection that has just been made.
    pub fn new(setup: Setup, now: Time) -> Destination {
        Destination {
            core: Core::new(setup, now),
            phase: Phase::Greeting(greeting::Greeting),
        }
    }

    /// Takes a migration up again after a crash of the daemon whose journal says `Committed` and not yet `Running`: runs
    /// the guest (`cont` on one that runs already does nothing), then says and records so. Of the set-up, `id`,
    /// `host` and `timeouts` matter.
    ///
    /// To be called when the source's `Query` has come, with that connection, and not before: a source that asks has not
    /// taken the guest back. A source whose operator has taken it back never asks.
    ///
    /// `armed`: it is a post-copy, and page faults wait for the driver again, which fetches nothing yet. If nothing lacks, the
    /// driver says [`Input::Whole`], also when an engine before this one has heard it.
    pub fn recover(setup: Setup, armed: bool, now: Time) -> Destination {
        let mut core = Core::known(setup, now);
        core.armed = armed;
        core.out.enter(State::Completing);
        let phase = commit::Starting::begin(&mut core);
        Destination { core, phase }
    }

    /// Takes a post-copy up again after a crash of the daemon: its guest runs here and lacks so many bytes. Page faults wait
    /// for the driver again. There is no connection: the source dials. If nothing lacks, the driver says [`Input::Whole`]. Of
    /// the set-up, `id`, `host` and `timeouts` matter.
    pub fn resume(setup: Setup, lacks: u64, now: Time) -> Destination {
        let mut core = Core::known(setup, now);
        core.armed = true;
        core.link.lost();
        let phase = fetching::Fetching::resume(&mut core, lacks);
        Destination { core, phase }
    }

    /// The same, with what the post-copy began with, which its journal says.
    #[must_use]
    pub fn switched(mut self, switch: Option<Switch>) -> Destination {
        if let Some(switch) = switch {
            self.core.switch_over(switch);
        }
        self
    }

    /// Takes something that happened. Late answers to what was given up are ignored; nothing panics.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.core.now = self.core.now.max(now);
        let phase = std::mem::replace(&mut self.phase, Phase::Ended);
        self.phase = phase
            .handle(&mut self.core, input)
            .unwrap_or_else(|end| abort::Aborting::begin(&mut self.core, end));
    }

    /// The next thing to do, in order. Poll until `None` after every `handle`.
    pub fn poll(&mut self) -> Option<Output> {
        self.core.out.take()
    }

    /// When to call `handle` with [`Input::Tick`] at the latest, if nothing else happens. `None`: nothing is waited for
    /// by time.
    pub fn poll_timeout(&self) -> Option<Time> {
        match &self.phase {
            Phase::Greeting(_)
            | Phase::Preparing(_)
            | Phase::Receive(_)
            | Phase::Loading(_)
            | Phase::Loaded(_) => Some(self.core.next_watch()),
            Phase::Starting(phase) => phase.next(),
            Phase::Running(phase) => phase.next(),
            Phase::Fetching(phase) => phase.next(&self.core),
            Phase::Ending(phase) => phase.next(),
            Phase::Committing(_) | Phase::Aborting(_) | Phase::Ended => None,
        }
    }

    /// Whether a source that comes with `Serve` can be given over by [`Input::Served`] now. Otherwise the journal says what
    /// it is answered.
    ///
    /// Also while it is being started: QEMU may not be able to say whether it runs before it has a page that lacks.
    pub fn takes_serve(&self) -> bool {
        match self.phase {
            Phase::Fetching(_) | Phase::Ending(_) => true,
            Phase::Starting(_) => self.core.armed,
            _ => false,
        }
    }

    /// Whether a daemon that is told to end leaves this migration to its journal and the next daemon: the guest runs here, and
    /// lacks pages.
    pub fn outlives_the_daemon(&self) -> bool {
        matches!(self.phase, Phase::Fetching(_))
    }

    /// The state as a person sees it.
    pub fn state(&self) -> State {
        self.core.out.state()
    }
}

impl Phase {
    fn handle(self, core: &mut Core, input: Input) -> Step {
        match self {
            Phase::Committing(phase) => phase.handle(core, input),
            Phase::Starting(phase) => phase.handle(core, input),
            Phase::Running(phase) => phase.handle(core, input),
            Phase::Fetching(phase) => phase.handle(core, input),
            Phase::Ending(phase) => phase.handle(core, input),
            Phase::Aborting(phase) => phase.handle(core, input),
            Phase::Ended => Ok(Phase::Ended),
            before_commit => {
                let phase = match core.before_commit(input)? {
                    Some(input) => before_commit.handle_its_own(core, input)?,
                    None => before_commit,
                };
                // A phase that `Commit` has just ended is not watched any more.
                if phase.is_before_commit() {
                    core.watch_peer()?;
                }
                Ok(phase)
            }
        }
    }

    /// An input that is not handled alike in all phases before `Commit`.
    fn handle_its_own(self, core: &mut Core, input: Input) -> Step {
        match self {
            Phase::Greeting(phase) => phase.handle(core, input),
            Phase::Preparing(phase) => phase.handle(core, input),
            Phase::Receive(phase) => phase.handle(core, input),
            Phase::Loading(phase) => phase.handle(core, input),
            Phase::Loaded(phase) => phase.handle(core, input),
            other => Ok(other),
        }
    }

    fn is_before_commit(&self) -> bool {
        matches!(
            self,
            Phase::Greeting(_)
                | Phase::Preparing(_)
                | Phase::Receive(_)
                | Phase::Loading(_)
                | Phase::Loaded(_)
        )
    }
}
