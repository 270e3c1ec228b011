//! In doubt: `Commit` may have arrived and the guest may run at the destination. Nothing is resumed here before the
//! destination has said that it never will, or the operator has decided.
//!
//! ```text
//! Connecting ──▶ Asking ──▶ Running: record it, done        Aborted: take the guest back
//!     ▲  ▲          │
//!     │  └─ Waiting ◀┘  Unknown, Committed, no answer, no connection
//! ```

use std::time::Duration;

use super::commit::{Moved, refuse_cancel};
use super::core::{Core, Intent};
use super::interface::{Input, Output, Resolution};
use super::reasons::by_peer;
use super::rollback::Rollback;
use super::{Phase, Step};
use crate::engine::end::End;
use crate::engine::event::State;
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::{AbortCode, Message, Standing};

/// The source keeps everything and asks.
#[derive(Debug)]
pub(super) struct InDoubt {
    contact: Contact,
    /// How long to wait after the next failure.
    backoff: Duration,
    /// What the destination said last.
    heard: Option<Standing>,
    /// The operator has taken the guest back, and that is being recorded.
    taking_back: bool,
}

/// Where the search for the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contact {
    /// `Connect` is under way.
    Connecting,
    /// `Query` was sent; no answer by then is no answer.
    Asking { deadline: Time },
    /// Until the next attempt. With a connection, `Query` goes again on it.
    Waiting { until: Time },
}

impl InDoubt {
    /// After `Commit`, without an answer.
    pub(super) fn begin(core: &mut Core, failure: Failure) -> Phase {
        core.finish(
            State::InDoubt,
            Some(Failure {
                what: format!("{}; the guest may run at the destination, so it is not resumed here", failure.what),
                remedy: "wait until the destination can be asked again; if it never will be, make sure that its QEMU \
                         is gone and run `pagecopy resolve ID --resume-here`, or, if the guest runs there, `--abandon`"
                    .to_owned(),
                ..failure
            }),
        );
        InDoubt::connect(core)
    }

    fn connect(core: &mut Core) -> Phase {
        core.link.lost();
        core.out.push(Output::Connect);
        let backoff = core.setup.timeouts.reconnect_first;
        Phase::InDoubt(InDoubt {
            contact: Contact::Connecting,
            backoff,
            heard: None,
            taking_back: false,
        })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Reconnected if self.contact == Contact::Connecting => {
                core.link.restored(core.now);
                self.ask(core);
            }
            Input::ReconnectFailed(why) if self.contact == Contact::Connecting => {
                core.out
                    .notice(format!("the destination cannot be asked yet: {why}"));
                self.wait(core);
            }
            Input::LinkLost(_) if core.link.is_up() => {
                core.link.lost();
                self.wait(core);
            }
            Input::Message(message) => return self.message(core, message),
            Input::Resolve(resolution) => return self.resolve(core, resolution),
            Input::Cancel => refuse_cancel(core),
            Input::Journaled(Record::RolledBack) if self.taking_back => {
                core.intent = Intent::Withdrawn;
                return Ok(Rollback::begin(core, taken_back()));
            }
            Input::JournalFailed(Record::RolledBack, failure) if self.taking_back => {
                self.taking_back = false;
                core.out.notice(format!(
                    "the decision could not be recorded, the guest is not resumed: {}",
                    failure.what
                ));
            }
            _ => {}
        }
        Ok(self.on_time(core))
    }

    fn message(mut self, core: &mut Core, message: Message) -> Step {
        let standing = match message {
            Message::Answer { id, standing } if id == core.setup.id => standing,
            // The first connection may come to life again with the answer to `Commit` itself.
            Message::Running => Standing::Running,
            Message::Abort { code, reason } => {
                return Ok(Rollback::begin(core, by_peer(code, &reason)));
            }
            Message::Ping { nonce } => {
                core.send(Message::Pong { nonce });
                return Ok(Phase::InDoubt(self));
            }
            _ => return Ok(self.on_time(core)),
        };
        self.heard = Some(standing);
        match standing {
            Standing::Running => Ok(Moved::begin(core)),
            Standing::Aborted => {
                let end = by_peer(AbortCode::Aborted, "it has not committed and never will");
                Ok(Rollback::begin(core, end))
            }
            Standing::Unknown | Standing::Committed => {
                core.out.notice(match standing {
                    Standing::Committed => {
                        "the destination has committed but the guest does not run there yet"
                    }
                    _ => "the destination cannot tell what became of the migration",
                });
                self.wait(core);
                Ok(Phase::InDoubt(self))
            }
        }
    }

    fn resolve(mut self, core: &mut Core, resolution: Resolution) -> Step {
        match resolution {
            Resolution::Abandon => return Ok(Moved::begin(core)),
            // A destination that runs the guest is not in this phase any more: its answer ended it.
            Resolution::ResumeHere
                if self.heard == Some(Standing::Committed) && core.link.is_up() =>
            {
                core.out.notice(
                    "refused: the destination can be reached, has committed and may run the guest at any moment; \
                     end its QEMU and its pagecopyd first",
                );
            }
            Resolution::ResumeHere if matches!(self.contact, Contact::Asking { .. }) => {
                core.out.notice(
                    "refused: the destination is being asked at this moment, wait for its answer",
                );
            }
            Resolution::ResumeHere if !self.taking_back => {
                self.taking_back = true;
                core.journal(Record::RolledBack);
            }
            Resolution::ResumeHere => {}
        }
        Ok(self.on_time(core))
    }

    fn ask(&mut self, core: &mut Core) {
        core.send(Message::Query { id: core.setup.id });
        self.contact = Contact::Asking {
            deadline: core.now.after(core.setup.timeouts.silence),
        };
    }

    fn wait(&mut self, core: &mut Core) {
        self.contact = Contact::Waiting {
            until: core.now.after(self.backoff),
        };
        self.backoff = self
            .backoff
            .saturating_mul(2)
            .min(core.setup.timeouts.reconnect_most);
    }

    fn on_time(mut self, core: &mut Core) -> Phase {
        match self.contact {
            Contact::Waiting { until } if core.now >= until => {
                if core.link.is_up() {
                    self.ask(core);
                } else {
                    self.contact = Contact::Connecting;
                    core.out.push(Output::Connect);
                }
            }
            Contact::Asking { deadline } if core.now >= deadline => {
                core.link.lost();
                self.wait(core);
            }
            _ => {}
        }
        Phase::InDoubt(self)
    }

    pub(super) fn next(&self) -> Option<Time> {
        match self.contact {
            Contact::Connecting => None,
            Contact::Asking { deadline: at } | Contact::Waiting { until: at } => Some(at),
        }
    }
}

fn taken_back() -> End {
    let failure = Failure::new(
        Fault::Operator,
        "the operator decided that the guest runs on here",
        "make sure that the destination never runs it",
    );
    End {
        state: State::Failed,
        failure,
        code: None,
    }
}
