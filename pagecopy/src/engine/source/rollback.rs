//! The way back: whatever fails before `Commit`, the guest runs on here.

use super::core::{Core, Intent};
use super::interface::{Input, Output};
use super::{Phase, Step};
use crate::engine::end::End;
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::Message;

/// Going back: the guest is being resumed, if it was stopped, and the journal told, if it has to know.
#[derive(Debug)]
pub(super) struct Rollback {
    end: End,
    resuming: bool,
    recording: bool,
    deadline: Time,
}

impl Rollback {
    /// Does everything at once that has to be done; first of all the guest, which is neither slowed nor stopped any more.
    pub(super) fn begin(core: &mut Core, end: End) -> Phase {
        core.throttle(0);
        let resuming = core.stop_ordered.is_some();
        let recording = matches!(core.intent, Intent::Ordered | Intent::Written);
        if resuming {
            core.out.push(Output::ResumeGuest);
        }
        if let Some(code) = end.code.filter(|_| core.link.is_up()) {
            let reason = format!("{}: {}", core.setup.host, end.failure.what);
            core.send(Message::Abort { code, reason });
        }
        if recording {
            core.journal(Record::RolledBack);
        }
        core.out.push(Output::Detach);
        let deadline = core.now.after(core.setup.timeouts.resume);
        Rollback {
            end,
            resuming,
            recording,
            deadline,
        }
        .finish_if_done(core)
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::GuestResumed => self.resuming = false,
            Input::ResumeFailed(failure) if self.resuming => self.stands_still(&failure),
            Input::GuestLost if self.resuming => self.lost(),
            Input::Journaled(Record::RolledBack) => self.recording = false,
            // `Commit` was not sent or was refused for good: the guest is safe here without the record, too. A daemon
            // that is started anew will ask the destination and hear the same.
            Input::JournalFailed(Record::RolledBack, failure) => {
                self.recording = false;
                core.out
                    .notice(format!("the journal could not be closed: {}", failure.what));
            }
            Input::Resolve(_) | Input::StartPostcopy | Input::Recover | Input::Change(_) => {
                core.nothing_to_resolve("the guest is being taken back here", "nothing");
            }
            _ => {}
        }
        if self.resuming && core.now >= self.deadline {
            self.stands_still(&Failure::new(Fault::Qemu, "QEMU does not answer", ""));
        }
        Ok(self.finish_if_done(core))
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.resuming.then_some(self.deadline)
    }

    fn stands_still(&mut self, why: &Failure) {
        self.resuming = false;
        self.end.state = State::Failed;
        self.end.failure.what = format!(
            "{}; and the guest could not be resumed, it stands stopped here: {}",
            self.end.failure.what, why.what
        );
        self.end.failure.remedy = "send `cont` to this host's QEMU over QMP (`migrate_cancel` first if `query-migrate` says \
                                   that it still migrates); the destination will not run the guest"
            .to_owned();
    }

    fn lost(&mut self) {
        self.resuming = false;
        self.end.state = State::Failed;
        self.end.failure.fault = Fault::Qemu;
        self.end.failure.what = format!(
            "{}; and this host's QEMU has ended, and the guest with it: it runs nowhere",
            self.end.failure.what
        );
        self.end.failure.remedy =
            "see QEMU's log for why it ended, then start the guest anew; the destination will not run it".to_owned();
    }

    fn finish_if_done(self, core: &mut Core) -> Phase {
        if self.resuming || self.recording {
            return Phase::Rollback(self);
        }
        core.finish(self.end.state, Some(self.end.failure));
        Phase::Ended
    }
}
