//! `Commit` is sent: the guest is the destination's, and the source waits to hear that it runs.

use super::core::{Core, millis};
use super::in_doubt::InDoubt;
use super::interface::{Input, Output};
use super::reasons::by_peer;
use super::rollback::Rollback;
use super::serving::Serving;
use super::{Phase, Step};
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::Message;

/// Waiting for `Running`.
#[derive(Debug)]
pub(super) struct Commit {
    deadline: Time,
}

impl Commit {
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.send(Message::Commit);
        Phase::Commit(Commit {
            deadline: core.now.after(core.setup.timeouts.running),
        })
    }

    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Message(Message::Running) => {
                measure_downtime(core);
                return Ok(Moved::begin(core));
            }
            // The destination could not record `Commit`, has recorded `Aborted` instead, and will not run the guest.
            Input::Message(Message::Abort { code, reason }) => {
                return Ok(Rollback::begin(core, by_peer(code, &reason)));
            }
            Input::Message(Message::Ping { nonce }) => core.send(Message::Pong { nonce }),
            Input::LinkLost(failure) => {
                core.link_lost();
                return Ok(InDoubt::begin(core, failure));
            }
            Input::Cancel => refuse_cancel(core),
            Input::Resolve(_) | Input::StartPostcopy | Input::Recover | Input::Change(_) => core.nothing_to_resolve(
                "not in doubt: the destination has been told to run the guest and may still answer",
                "wait for its answer",
            ),
            Input::QemuFailed(failure) => {
                core.out.notice(format!(
                    "this host's QEMU failed after the guest was handed over: {}",
                    failure.what
                ));
            }
            _ => {}
        }
        if core.now < self.deadline {
            return Ok(Phase::Commit(self));
        }
        let limit = millis(core.setup.timeouts.running);
        let failure = Failure::new(
            Fault::PeerHost,
            format!(
                "the destination did not say within {limit:.0} ms whether the guest runs there"
            ),
            "see to the destination; this host asks it on and on",
        );
        Ok(InDoubt::begin(core, failure))
    }

    pub(super) fn next(&self) -> Time {
        self.deadline
    }
}

/// Cancelling is over once `Commit` is sent.
pub(super) fn refuse_cancel(core: &mut Core) {
    core.out
        .notice("too late to cancel: the destination has been told to run the guest");
}

/// Downtime as this side saw it, and the part of it that did not depend on bytes.
fn measure_downtime(core: &mut Core) {
    let Some(ordered) = core.stop_ordered else {
        return;
    };
    let downtime = core.now.since(ordered);
    let bytes = core.sender.round().raw_bytes as f64 / core.convergence.goodput() * 1e3;
    let verify = core.figures.verify_ms.unwrap_or(0.0);
    core.figures.downtime_ms = Some(millis(downtime));
    core.figures.fixed_downtime_ms = Some((millis(downtime) - bytes - verify).max(0.0));
}

/// The guest runs at the destination; that is being recorded.
#[derive(Debug)]
pub(super) struct Moved {
    /// The destination said so. If only the operator did, QEMU is kept: it may hold the only copy of the guest.
    said_by_peer: bool,
    /// What the destination said meanwhile, for the phase that follows.
    early: Option<Message>,
}

impl Moved {
    /// The destination said that the guest runs there.
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.journal(Record::GuestMoved);
        Phase::Moved(Moved {
            said_by_peer: true,
            early: None,
        })
    }

    /// It runs there, or did, as the destination says by this message.
    pub(super) fn with(core: &mut Core, early: Message) -> Phase {
        core.journal(Record::GuestMoved);
        Phase::Moved(Moved {
            said_by_peer: true,
            early: Some(early),
        })
    }

    /// The operator said so.
    pub(super) fn by_word(core: &mut Core) -> Phase {
        core.journal(Record::GuestMoved);
        Phase::Moved(Moved {
            said_by_peer: false,
            early: None,
        })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::GuestMoved) => {
                if core.link.is_up() && self.said_by_peer && !core.serves {
                    core.send(Message::Closed);
                }
            }
            // Without the record nobody may be told that we will not ask again.
            Input::JournalFailed(Record::GuestMoved, failure) => {
                core.out
                    .notice(format!("the journal could not be closed: {}", failure.what));
            }
            Input::LinkLost(_) => {
                core.link_lost();
                return Ok(Phase::Moved(self));
            }
            Input::Cancel => {
                refuse_cancel(core);
                return Ok(Phase::Moved(self));
            }
            Input::Message(message @ (Message::Whole { .. } | Message::Abort { .. })) => {
                self.early = Some(message);
                return Ok(Phase::Moved(self));
            }
            Input::Resolve(_) | Input::StartPostcopy | Input::Recover | Input::Change(_) => {
                core.nothing_to_resolve("the guest runs at the destination", "nothing");
                return Ok(Phase::Moved(self));
            }
            _ => return Ok(Phase::Moved(self)),
        }
        if core.serves {
            return Ok(Serving::begin(core, self.early));
        }
        core.out.push(Output::Detach);
        if core.setup.options.quit_source && self.said_by_peer {
            core.out.push(Output::QuitGuest);
        }
        core.finish(State::Completed, None);
        Ok(Phase::Ended)
    }
}
