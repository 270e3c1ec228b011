//! Limits that the operator changes while pages are sent: the source answers at once, takes them only before the guest is handed over,
//! and keeps the bandwidth limit from then on.

use pagecopy::engine::event::State;
use pagecopy::engine::pacing::Ledger;
use pagecopy::engine::source::{Change, Input};

use super::super::driver::Driver;
use super::super::env::Env;
use super::super::mistake::Mistake;
use super::super::plan::Side;
use super::super::tally::Happened;
use super::SourceSide;

/// What is watched of them.
#[derive(Debug)]
pub(super) struct Limits {
    ledger: Ledger,
    /// The operator waits for the answer to this, which was asked in that state.
    asked: Option<(Change, State)>,
}

impl Limits {
    /// Those that a migration begins with.
    pub(super) fn new(env: &Env) -> Limits {
        let now = env.clock(Side::Source);
        Limits {
            ledger: Ledger::new(env.plan.wanted.bandwidth_limit, now),
            asked: None,
        }
    }

    /// The engine wants a batch pushed.
    pub(super) fn push(&mut self, env: &mut Env, bytes: u64) {
        if !self.ledger.goes(bytes, env.clock(Side::Source)) {
            let what = format!("pages go faster than the limit: {:?}", self.ledger);
            env.checker.violate(what);
        }
    }

    /// The engine is about to be told.
    pub(super) fn about_to_hear(&mut self, env: &mut Env, input: &Input, state: State) {
        if let Some((change, _)) = self.asked.take() {
            let what = format!("the operator was not told what became of {change:?}");
            env.checker.violate(what);
        }
        match input {
            Input::Change(change) => self.asked = Some((*change, state)),
            Input::Pushed { pushed, .. } => {
                self.ledger
                    .comes_back(pushed.zero_bytes + pushed.encoded.saved());
            }
            _ => {}
        }
    }

    /// The operator is told what has become of something.
    pub(super) fn decided(&mut self, env: &mut Env, taken: bool, commit_sent: bool) {
        let Some((change, before)) = self.asked.take() else {
            return;
        };
        if !taken {
            return env.tally.note(Happened::LimitsRefused);
        }
        env.tally.note(Happened::LimitsChanged);
        let early = matches!(before, State::Pending | State::Preparing | State::Migrating);
        if !early || commit_sent {
            let what = format!("limits are taken while the migration is {before:?}");
            env.checker.violate(what);
        }
        if let Some(limit) = change.bandwidth_limit {
            self.ledger = Ledger::new(limit, env.clock(Side::Source));
        }
    }

    /// The daemon has died: nobody will answer.
    pub(super) fn forget(&mut self) {
        self.asked = None;
    }
}

impl SourceSide {
    /// The operator wants other limits.
    pub(in crate::sim) fn set(&mut self, env: &mut Env, mut change: Change) {
        env.note("operator", format_args!("sets {change:?}"));
        if env.errs(Mistake::OldLimit) {
            // Said to be taken, and never in force.
            if let (Some(limit), Some(State::Preparing | State::Migrating)) =
                (change.bandwidth_limit.take(), self.state())
            {
                self.limits.ledger = Ledger::new(limit, env.clock(Side::Source));
            }
        }
        self.input(env, Input::Change(change));
    }
}
