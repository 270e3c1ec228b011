//! `Commit` has come: it is recorded, then the guest runs here. A lost connection changes nothing any more.

use super::abort::Aborting;
use super::core::Core;
use super::fetching::{Fetching, fetch_on};
use super::interface::{Input, Output};
use super::{Phase, Step};
use crate::engine::doubt::memory_gone;
use crate::engine::end::End;
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::{AbortCode, Message};

/// `Committed` is being recorded. The guest has not been touched.
#[derive(Debug)]
pub(super) struct Committing {
    /// QEMU failed meanwhile: there is no guest to run.
    qemu_failed: Option<Failure>,
}

impl Committing {
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.out.enter(State::Completing);
        core.journal(Record::Committed);
        Phase::Committing(Committing { qemu_failed: None })
    }

    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::Committed) => match self.qemu_failed {
                None => return Ok(without_memory(core).unwrap_or_else(|| Starting::begin(core))),
                Some(failure) => {
                    return Ok(Aborting::after_commit(
                        core,
                        End::new(AbortCode::Qemu, failure),
                    ));
                }
            },
            // The guest may not run without the record. The disk may hold it all the same, so `Aborted` goes behind it.
            Input::JournalFailed(Record::Committed, failure) => {
                return Ok(Aborting::after_commit(
                    core,
                    End::new(AbortCode::Host, failure),
                ));
            }
            Input::QemuFailed(failure) => {
                return Ok(Phase::Committing(Committing {
                    qemu_failed: Some(failure),
                }));
            }
            other => after_commit(core, other),
        }
        Ok(Phase::Committing(self))
    }
}

/// What is the same in every phase after `Commit`.
fn after_commit(core: &mut Core, input: Input) {
    match input {
        Input::Cancel => core
            .out
            .notice("too late to cancel: the guest is committed to this host"),
        Input::LinkLost(_) => core.link_lost(),
        Input::SourceLost { reason, all_here } => {
            core.link_lost();
            let lacks = core.armed && !core.whole && !all_here;
            core.memory_gone = Some(reason).filter(|_| lacks);
        }
        Input::PullFailed(failure) => {
            core.out.notice(format!(
                "fetching has stopped, what the guest touches and lacks waits: {}",
                failure.what
            ));
            core.stop_serving();
        }
        Input::Poison { .. } => core.nothing_to_poison(),
        Input::Lacks { bytes, faults } => core.heard_of(bytes, faults),
        // A small guest lacks nothing before it has run for a moment.
        Input::Whole { faults } => {
            core.heard_of(0, faults);
            core.whole = true;
            core.memory_gone = None;
        }
        Input::Message(Message::Ping { nonce }) => core.send(Message::Pong { nonce }),
        _ => {}
    }
}

/// The guest is being started. It is tried again and again: the guest is here and nowhere else.
#[derive(Debug)]
pub(super) struct Starting {
    since: Time,
    again: Option<Time>,
}

impl Starting {
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.out.push(Output::RunGuest);
        Phase::Starting(Starting {
            since: core.now,
            again: None,
        })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        let timeouts = core.setup.timeouts;
        match input {
            Input::GuestRunning if core.armed => return Ok(Fetching::begin(core)),
            Input::GuestRunning => return Ok(Running::begin(core)),
            // QEMU may wait for a page that lacks, and not say whether the guest runs before it is here.
            Input::Served if core.armed => {
                core.link.restored(core.now);
                core.memory_gone = None;
                fetch_on(core);
            }
            Input::QemuFailed(failure) if self.again.is_none() => {
                if let Some(left) = without_memory(core) {
                    return Ok(left);
                }
                if core.now >= self.since.after(timeouts.run_most) {
                    return Ok(leave_to_operator(core, failure));
                }
                core.out.notice(format!(
                    "the guest does not start, trying again: {}",
                    failure.what
                ));
                self.again = Some(core.now.after(timeouts.run_again));
            }
            other => after_commit(core, other),
        }
        if self.again.is_some()
            && let Some(left) = without_memory(core)
        {
            return Ok(left);
        }
        if self.again.is_some_and(|again| core.now >= again) {
            self.again = None;
            core.out.push(Output::RunGuest);
        }
        Ok(Phase::Starting(self))
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.again
    }
}

/// The journal keeps saying `Committed`, so both sides stay in doubt: the source cannot know whether the guest ran for a
/// moment. The driver keeps the guest, and has it [run](super::Destination::recover) when the source asks.
fn leave_to_operator(core: &mut Core, failure: Failure) -> Phase {
    let failure = Failure::new(
        Fault::Qemu,
        format!(
            "the guest was committed to this host and does not start: {}",
            failure.what
        ),
        "see to this host's QEMU: the guest is tried again whenever the source asks. If it cannot run here, run `pagecopy \
         resolve ID --abandon` here, and the source takes it back",
    );
    core.finish(State::InDoubt, Some(failure));
    Phase::Ended
}

/// A guest that does not run yet is not run when the source has come without what it lacks: that is for people.
fn without_memory(core: &mut Core) -> Option<Phase> {
    let failure = memory_gone(core.memory_gone.as_deref()?);
    core.finish(State::InDoubt, Some(failure));
    Some(Phase::Ended)
}

/// The guest runs here. What is left is for the journals.
#[derive(Debug)]
pub(super) struct Running {
    recorded: bool,
    closed: bool,
    deadline: Time,
}

impl Running {
    fn begin(core: &mut Core) -> Phase {
        core.send(Message::Running);
        core.journal(Record::Running);
        let deadline = core.now.after(core.setup.timeouts.silence);
        Phase::Running(Running {
            recorded: false,
            closed: false,
            deadline,
        })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::Running) => self.recorded = true,
            // `Committed` is on disk and says as much to a restarted daemon: it looks and finds the guest running.
            Input::JournalFailed(Record::Running, failure) => {
                self.recorded = true;
                core.out.notice(format!(
                    "that the guest runs could not be recorded: {}",
                    failure.what
                ));
            }
            Input::Message(Message::Closed) if !self.closed => {
                self.closed = true;
                core.journal(Record::Closed);
            }
            Input::Journaled(Record::Closed) | Input::JournalFailed(Record::Closed, _) => {
                core.finish(State::Completed, None);
                return Ok(Phase::Ended);
            }
            Input::QemuFailed(failure) => {
                core.out.notice(format!(
                    "QEMU failed after the guest had arrived: {}",
                    failure.what
                ));
            }
            other => after_commit(core, other),
        }
        // Without `Closed` the journal stays for a source that will ask.
        let over = !core.link.is_up() || core.now >= self.deadline;
        if over && self.recorded && !self.closed {
            core.finish(State::Completed, None);
            return Ok(Phase::Ended);
        }
        Ok(Phase::Running(self))
    }

    pub(super) fn next(&self) -> Option<Time> {
        (self.recorded && !self.closed).then_some(self.deadline)
    }
}
