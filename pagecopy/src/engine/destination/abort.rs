//! Giving up at the destination: before `Commit` freely; after it only with `Aborted` on disk.

use super::core::Core;
use super::interface::{Input, Output};
use super::{Phase, Step};
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault};
use crate::wire::{AbortCode, Message};

/// Why a migration ends, and what the peer is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct End {
    /// `Failed` or `Cancelled`.
    pub(super) state: State,
    pub(super) failure: Failure,
    /// For the peer; none when it said so itself.
    pub(super) code: Option<AbortCode>,
}

impl End {
    pub(super) fn new(code: AbortCode, failure: Failure) -> End {
        End {
            state: State::Failed,
            failure,
            code: Some(code),
        }
    }

    pub(super) fn cancelled() -> End {
        let failure = Failure::new(
            Fault::Operator,
            "the operator cancelled the migration at the destination",
            "nothing: the guest runs on at the source",
        );
        End {
            state: State::Cancelled,
            failure,
            code: Some(AbortCode::Cancelled),
        }
    }

    pub(super) fn protocol(what: impl Into<String>) -> End {
        let remedy = "run the same version of pagecopyd on both hosts; report this";
        End::new(
            AbortCode::Protocol,
            Failure::new(Fault::PeerHost, what, remedy),
        )
    }

    /// The source gave up, in its words.
    pub(super) fn by_peer(code: AbortCode, reason: &str) -> End {
        let (state, fault) = match code {
            AbortCode::Cancelled => (State::Cancelled, Fault::Operator),
            AbortCode::NotConverging => (State::Failed, Fault::Guest),
            AbortCode::Qemu => (State::Failed, Fault::Qemu),
            _ => (State::Failed, Fault::PeerHost),
        };
        let remedy = "nothing here: the guest runs on at the source, which says more";
        End {
            state,
            failure: Failure::new(fault, format!("the source gave up: {reason}"), remedy),
            code: None,
        }
    }

    /// What the peer is told: the remedy, too, where this host or its QEMU has to be seen to.
    fn message(&self, core: &Core) -> Option<Message> {
        let code = self.code?;
        let mut reason = format!("{}: {}", core.setup.host, self.failure.what);
        if matches!(code, AbortCode::Host | AbortCode::Qemu) && !self.failure.remedy.is_empty() {
            reason = format!("{reason}; {}", self.failure.remedy);
        }
        Some(Message::Abort { code, reason })
    }
}

/// Given up; `Aborted` is being recorded.
#[derive(Debug)]
pub(super) struct Aborting {
    end: End,
    /// `Commit` has come: the peer may be told only when the record is on disk.
    committed: bool,
}

impl Aborting {
    /// Before `Commit` came. The peer is told at once: a crash before the record is on disk leaves an open journal,
    /// which a restarted daemon turns into an aborted one.
    pub(super) fn begin(core: &mut Core, end: End) -> Phase {
        if let Some(message) = end.message(core) {
            core.send(message);
        }
        if !core.greeted {
            core.finish(end.state, Some(end.failure));
            return Phase::Ended;
        }
        core.journal(Record::Aborted);
        Phase::Aborting(Aborting {
            end,
            committed: false,
        })
    }

    /// After `Commit` came, but before anything was done about the guest.
    pub(super) fn after_commit(core: &mut Core, end: End) -> Phase {
        core.journal(Record::Aborted);
        Phase::Aborting(Aborting {
            end,
            committed: true,
        })
    }

    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::Aborted) => {
                if let Some(message) = self.end.message(core).filter(|_| self.committed) {
                    core.send(message);
                }
            }
            Input::JournalFailed(Record::Aborted, failure) => {
                core.notice(format!(
                    "the end of the migration could not be recorded: {}",
                    failure.what
                ));
                if self.committed {
                    return Ok(undecided(core, self.end, failure));
                }
            }
            Input::LinkLost(_) => {
                core.link.lost();
                return Ok(Phase::Aborting(self));
            }
            // The source sent it before it heard that we gave up. It is refused once more, for good.
            Input::Message(Message::Commit) if !self.committed => {
                let reason = format!("{}: this migration was given up before", core.setup.host);
                core.send(Message::Abort {
                    code: AbortCode::Aborted,
                    reason,
                });
                return Ok(Phase::Aborting(self));
            }
            _ => return Ok(Phase::Aborting(self)),
        }
        core.finish(self.end.state, Some(self.end.failure));
        Ok(Phase::Ended)
    }
}

/// `Commit` came, and the disk takes neither `Committed` nor `Aborted`. The guest is not run, and the source is not told
/// that it never will be, for the disk may hold either. The source is in doubt, and people decide.
fn undecided(core: &mut Core, end: End, journal: Failure) -> Phase {
    let failure = Failure::new(
        Fault::ThisHost,
        format!(
            "{}; and that could not be recorded either: {}",
            end.failure.what, journal.what
        ),
        "the guest stands stopped on both hosts: end this host's QEMU, then run `pagecopy resolve ID --resume-here` at the \
         source; repair this host's disk before pagecopyd is started again",
    );
    core.output(Output::Report(crate::engine::event::Report::State {
        state: State::Failed,
    }));
    core.finish(State::Failed, Some(failure));
    Phase::Ended
}
