//! Giving up at the destination: before `Commit` freely; after it only with `Aborted` on disk.

use super::core::Core;
use super::interface::Input;
use super::{Phase, Step};
use crate::engine::end::End;
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault};
use crate::wire::{AbortCode, Message};

/// What the source is told: the remedy, too, where this host or its QEMU has to be seen to.
fn message(end: &End, core: &Core) -> Option<Message> {
    let code = end.code?;
    let mut reason = format!("{}: {}", core.setup.host, end.failure.what);
    if matches!(code, AbortCode::Host | AbortCode::Qemu) && !end.failure.remedy.is_empty() {
        reason = format!("{reason}; {}", end.failure.remedy);
    }
    Some(Message::Abort { code, reason })
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
        if let Some(message) = message(&end, core) {
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
                if let Some(message) = message(&self.end, core).filter(|_| self.committed) {
                    core.send(message);
                }
            }
            Input::JournalFailed(Record::Aborted, failure) => {
                core.out.notice(format!(
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
        "the guest stands stopped on both hosts: repair this host's disk, and the source is answered when it asks; or end \
         this host's QEMU and pagecopyd for good, then run `pagecopy resolve ID --resume-here --peer-fenced` at the source",
    );
    core.finish(State::Failed, Some(failure));
    Phase::Ended
}
