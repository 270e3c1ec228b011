//! The source's engine: pre-copy rounds, switchover, commit, rollback.
//!
//! ```text
//! Greeting ──▶ Attaching ──▶ Round ──▶ Switchover ──▶ Commit ──▶ Moved ──▶ (completed)
//!     │            │          │ ▲         │           │    │       ▲ │
//!     │            │          └─┘         │           │    ▼       │ └──▶ Serving ──▶ (completed, post-copy)
//!     └────────────┴──────────┴───────────┴──▶ Rollback ◀─ InDoubt ┘
//! ```
//!
//! Each phase is a struct of its own that an input turns into the next; before `Commit` every phase may end in
//! `Rollback`, after it none does unless the destination or the operator says so.

mod commit;
mod convergence;
mod core;
mod greeting;
mod growth;
mod heat;
mod in_doubt;
mod interface;
mod reasons;
mod rollback;
mod round;
mod sender;
mod serving;
mod shortening;
mod switchover;
#[cfg(test)]
mod tests;
mod throttle;

pub use interface::{
    After, Batch, Change, ChannelLoad, Input, Load, Mode, Options, Output, Populated, Pushed,
    Resolution, Setup,
};

use self::core::{Core, Intent};
use super::Time;
use super::end::End;
use super::event::{Figures, State, Switch};
use super::journal::{Outcome, Postcopy};
use crate::wire::AbortCode;

/// Moves one guest away. See [the engines' common shape](super).
#[derive(Debug)]
pub struct Source {
    core: Core,
    phase: Phase,
}

/// What an input makes of a phase: the next one, or the reason to go back.
type Step = Result<Phase, End>;

/// Where a migration is.
#[derive(Debug)]
enum Phase {
    Greeting(greeting::Greeting),
    Attaching(greeting::Attaching),
    Round(round::Round),
    Switchover(switchover::Switchover),
    Commit(commit::Commit),
    InDoubt(in_doubt::InDoubt),
    Moved(commit::Moved),
    Serving(serving::Serving),
    Releasing(serving::Releasing),
    Rollback(rollback::Rollback),
    Ended,
}

impl Source {
    /// Begins a migration over a connection that has just been made. The first outputs are there to be polled.
    pub fn new(setup: Setup, now: Time) -> Source {
        let mut core = Core::new(setup, now);
        let phase = greeting::Greeting::begin(&mut core);
        Source { core, phase }
    }

    /// Takes a migration up again after a crash of the daemon, by what its journal says
    /// ([`outcome`](super::journal::outcome)). There is no connection and nothing is attached.
    ///
    /// - `Open`: in doubt; connects and asks. Outputs `Finished` with `InDoubt` first.
    /// - `NotHere`: the guest is resumed, in case it was stopped.
    /// - `Here`: the guest has moved; only the rest of the closing is done. QEMU is not quit: the record does not say whether
    ///   the destination said so or only the operator, and then QEMU may hold the only copy of the guest.
    ///
    /// - `Here`, and the guest of a post-copy still depends on this host: its memory is served again.
    ///
    /// Of the set-up, only `id`, `vm`, `host` and `timeouts` matter, and `options.quit_source` as long as the destination
    /// can still be asked.
    pub fn recover(setup: Setup, outcome: Outcome, postcopy: Postcopy, now: Time) -> Source {
        let mut core = Core::new(setup, now);
        core.link.lost();
        core.stop_ordered = Some(now);
        core.serves = postcopy == Postcopy::Open;
        core.limits_background = true;
        let phase = match outcome {
            Outcome::Open => {
                core.intent = Intent::Written;
                in_doubt::InDoubt::begin(&mut core, reasons::restarted())
            }
            Outcome::NotHere => {
                core.intent = Intent::Withdrawn;
                let end = End::new(AbortCode::Cancelled, reasons::restarted());
                rollback::Rollback::begin(&mut core, end)
            }
            Outcome::Here if core.serves => serving::Serving::begin(&mut core, None),
            Outcome::Here => commit::Moved::by_word(&mut core),
        };
        Source { core, phase }
    }

    /// The same, with what the post-copy began with, which its journal says.
    #[must_use]
    pub fn switched(mut self, switch: Option<Switch>) -> Source {
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
            .unwrap_or_else(|end| rollback::Rollback::begin(&mut self.core, end));
    }

    /// The next thing to do, in order. Poll until `None` after every `handle`.
    pub fn poll(&mut self) -> Option<Output> {
        self.core.out.take()
    }

    /// When to call `handle` with [`Input::Tick`] at the latest, if nothing else happens. `None`: nothing is waited for
    /// by time.
    pub fn poll_timeout(&self) -> Option<Time> {
        let core = &self.core;
        let watched = |phase: Time| Some(phase.min(core.next_watch()));
        match &self.phase {
            Phase::Greeting(phase) => watched(phase.next()),
            Phase::Attaching(phase) => watched(phase.next()),
            Phase::Round(phase) => watched(phase.next(core)),
            Phase::Switchover(phase) => watched(phase.next(core)),
            Phase::Commit(phase) => Some(phase.next()),
            Phase::InDoubt(phase) => phase.next(&self.core),
            Phase::Rollback(phase) => phase.next(),
            Phase::Serving(phase) => phase.next(core),
            Phase::Moved(_) | Phase::Releasing(_) | Phase::Ended => None,
        }
    }

    /// Whether a daemon that is told to end leaves this migration to its journal and the next daemon: it is in doubt, or the
    /// guest depends on the memory here.
    pub fn outlives_the_daemon(&self) -> bool {
        matches!(self.phase, Phase::InDoubt(_) | Phase::Serving(_))
    }

    /// Whether [`Input::Measured`] is of use now.
    pub fn measures(&self) -> bool {
        matches!(self.phase, Phase::Round(_)) && self.core.growth.is_on()
    }

    /// The state as a person sees it.
    pub fn state(&self) -> State {
        self.core.out.state()
    }

    /// The figures so far; complete when [`Output::Finished`] has come.
    pub fn figures(&self) -> &Figures {
        &self.core.figures
    }
}

impl Phase {
    fn handle(self, core: &mut Core, input: Input) -> Step {
        match self {
            Phase::Commit(phase) => phase.handle(core, input),
            Phase::InDoubt(phase) => phase.handle(core, input),
            Phase::Moved(phase) => phase.handle(core, input),
            Phase::Serving(phase) => Ok(phase.handle(core, input)),
            Phase::Releasing(phase) => phase.handle(core, input),
            Phase::Rollback(phase) => phase.handle(core, input),
            Phase::Ended => {
                if let Input::Resolve(_)
                | Input::StartPostcopy
                | Input::Recover
                | Input::Change(_) = input
                {
                    core.nothing_to_resolve(
                        "this migration has ended",
                        "see `pagecopy status` for how",
                    );
                }
                Ok(Phase::Ended)
            }
            before_commit => {
                let phase = match core.before_commit(input)? {
                    Some(input) => before_commit.handle_its_own(core, input)?,
                    None => before_commit,
                };
                phase.on_time(core)
            }
        }
    }

    /// An input that is not handled alike in all phases before `Commit`.
    fn handle_its_own(self, core: &mut Core, input: Input) -> Step {
        match self {
            Phase::Greeting(phase) => phase.handle(core, input),
            Phase::Attaching(phase) => phase.handle(core, input),
            Phase::Round(phase) => phase.handle(core, input),
            Phase::Switchover(phase) => phase.handle(core, input),
            other => Ok(other),
        }
    }

    /// What is due by now, in a phase before `Commit`.
    fn on_time(self, core: &mut Core) -> Step {
        match self {
            Phase::Greeting(phase) => {
                core.watch_peer()?;
                phase.on_time(core)
            }
            Phase::Attaching(phase) => {
                core.watch_peer()?;
                phase.on_time(core)
            }
            Phase::Round(phase) => {
                core.watch_peer()?;
                phase.on_time(core)
            }
            Phase::Switchover(phase) => {
                core.watch_peer()?;
                phase.on_time(core)
            }
            other => Ok(other),
        }
    }
}
