//! In doubt: `Commit` may have arrived and the guest may run at the destination. Nothing is resumed here before the
//! destination has said that it never will, or the operator has given a word that nothing contradicts.
//!
//! ```text
//! Connecting ──▶ Asking ──▶ Running: record it, done        Aborted: take the guest back
//!     ▲  ▲        ▲ │ └──▶ Served (post-copy): until it is said that the guest runs, or the connection is gone
//!     ▲  ▲          │
//!     │  └─ Waiting ◀┘  Unknown, Committed, NoJournal, Foreign, no answer, no connection
//!     │        │
//!     │      Silent: the operator's word is being recorded; from here on nothing is asked, for the destination runs a
//!     │        │     committed guest when it is asked
//!     └────────┘     (not recorded)
//! ```
//!
//! A post-copy's question is `Serve`: its destination cannot say that the guest runs before it has pages that lack. It is served in
//! doubt, and the doubt ends when the guest has run: until then everything here is as it was, and can be taken back.
//!
//! A decision of the operator makes the next question come at once; what the destination answers, or that it does not,
//! goes through [`doubt::at_source`]. A destination that lets the source in, or turns it away, is there: without an answer it
//! has not decided, and is not fenced.

use std::time::Duration;

use super::commit::{Moved, refuse_cancel};
use super::core::{Core, Intent};
use super::interface::{Input, Output, Resolution};
use super::reasons::by_peer;
use super::rollback::Rollback;
use super::{Phase, Step};
use crate::engine::doubt::{self, AtSource, Heard};
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
    /// The operator's decision, which waits for the destination's answer or for the journal.
    wish: Option<Resolution>,
    /// Since that wish, a connection came about: the destination's pagecopyd is there, whether it answers or not.
    met: bool,
}

/// Where the search for the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contact {
    /// `Connect` is under way.
    Connecting,
    /// `Query` was sent; no answer by then is no answer.
    Asking { deadline: Time },
    /// Post-copy: the destination fetches, and has not said yet that the guest runs.
    Served,
    /// Until the next attempt. With a connection, `Query` goes again on it.
    Waiting { until: Time },
    /// Nobody is asked: that the operator has taken the guest back is being recorded.
    Silent,
}

impl InDoubt {
    /// After `Commit`, without an answer.
    pub(super) fn begin(core: &mut Core, failure: Failure) -> Phase {
        core.finish(
            State::InDoubt,
            Some(Failure {
                what: format!("{}; the guest may run at the destination, so it is not resumed here", failure.what),
                remedy: "wait until the destination can be asked again: it is asked on and on. If its QEMU and its pagecopyd \
                         cannot run any more (powered off, disk gone), run `pagecopy resolve ID --resume-here --peer-fenced`; \
                         if the guest runs there, `pagecopy resolve ID --abandon`"
                    .to_owned(),
                ..failure
            }),
        );
        core.link_lost();
        let mut doubt = InDoubt {
            contact: Contact::Connecting,
            backoff: pauses(core).0,
            wish: None,
            met: false,
        };
        doubt.connect(core);
        Phase::InDoubt(doubt)
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Reconnected if self.contact == Contact::Connecting => {
                core.link.restored(core.now);
                self.met = true;
                self.ask(core);
            }
            Input::ReconnectFailed(why) if self.contact == Contact::Connecting => {
                core.out
                    .notice(format!("the destination cannot be asked yet: {why}"));
                return Ok(self.answered(core, Heard::Nothing));
            }
            Input::ReconnectRefused(why) if self.contact == Contact::Connecting => {
                core.out.notice(format!(
                    "the destination is there and cannot be asked yet: {why}"
                ));
                return Ok(self.answered(core, Heard::Presence));
            }
            Input::LinkLost(_) if core.link.is_up() => return Ok(self.link_lost(core)),
            Input::Message(message) => {
                core.link.heard(core.now);
                return Ok(self.message(core, message));
            }
            Input::GuestEnded { reason } if core.serves => {
                let code = AbortCode::Qemu;
                return Ok(self.has_run(core, Message::Abort { code, reason }));
            }
            Input::Resolve(resolution) => self.resolve(core, resolution),
            Input::Cancel => refuse_cancel(core),
            Input::StartPostcopy | Input::Recover | Input::Change(_) => core.nothing_to_resolve(
                "this migration is in doubt: the destination is asked on and on",
                "wait, or decide by `pagecopy resolve`",
            ),
            Input::Journaled(Record::TakenBack) if self.contact == Contact::Silent => {
                core.intent = Intent::Withdrawn;
                core.decided(Ok(
                    "the guest is taken back here; the destination is told as soon as it can be reached",
                ));
                return Ok(Rollback::begin(core, taken_back()));
            }
            Input::JournalFailed(Record::TakenBack, failure) if self.contact == Contact::Silent => {
                self.wish = None;
                core.decided(Err(doubt::refuse(
                    format!(
                        "the decision could not be recorded, so the guest is not resumed: {}",
                        failure.what
                    ),
                    failure.remedy,
                )));
                self.wait(core);
            }
            _ => {}
        }
        Ok(self.on_time(core))
    }

    fn message(mut self, core: &mut Core, message: Message) -> Phase {
        match message {
            // One that was not asked for and decides nothing is passed over: it may come any number of times.
            Message::Answer { id, standing }
                if id == core.setup.id
                    && (self.waits_for_an_answer(core)
                        || matches!(standing, Standing::Running | Standing::Aborted)) =>
            {
                if core.serves {
                    // The connection was for serving, and is of no use.
                    core.link_lost();
                }
                self.answered(core, Heard::Answer(standing))
            }
            Message::Resumed if core.serves && matches!(self.contact, Contact::Asking { .. }) => {
                self.served(core)
            }
            // It has run there, whatever became of it since: a destination whose guest lacks nothing, or is lost with its QEMU.
            Message::Whole { id, cost } if core.serves && id == core.setup.id => {
                self.has_run(core, Message::Whole { id, cost })
            }
            Message::Abort {
                code: AbortCode::Qemu,
                reason,
            } if core.serves && core.link.is_up() => {
                let code = AbortCode::Qemu;
                self.has_run(core, Message::Abort { code, reason })
            }
            // It says that the destination wants no more questions on this connection, and decides nothing: what the
            // destination has decided, it answers. But who says so is there, and not fenced.
            Message::Abort { .. } => {
                if self.contact != Contact::Silent
                    && let Some(ended) = self.look_into_wish(core, Heard::Presence)
                {
                    return ended;
                }
                self.link_lost(core)
            }
            // The first connection may come to life again with the answer to `Commit` itself.
            Message::Running => self.answered(core, Heard::Answer(Standing::Running)),
            Message::Ping { nonce } => {
                core.send(Message::Pong { nonce });
                Phase::InDoubt(self)
            }
            _ => self.on_time(core),
        }
    }

    /// Whether an answer is due. Where the memory is gone, the driver brings the answer to that, without a connection.
    fn waits_for_an_answer(&self, core: &Core) -> bool {
        match self.contact {
            Contact::Asking { .. } => true,
            Contact::Connecting => core.serves,
            Contact::Served | Contact::Waiting { .. } | Contact::Silent => false,
        }
    }

    /// The destination fetches. It was committed, so that nothing here is decided by a word against it.
    fn served(mut self, core: &mut Core) -> Phase {
        self.contact = Contact::Served;
        self.backoff = pauses(core).0;
        core.has_data = true;
        self.look_into_wish(core, Heard::Answer(Standing::Committed))
            .unwrap_or(Phase::InDoubt(self))
    }

    fn has_run(self, core: &mut Core, early: Message) -> Phase {
        self.tell_operator(core, Standing::Running);
        Moved::with(core, early)
    }

    /// The connection is gone, or of no use.
    fn link_lost(mut self, core: &mut Core) -> Phase {
        core.link_lost();
        match self.contact {
            // Who let us in and then went, or said nothing, is not fenced.
            Contact::Asking { .. } if self.met => self.answered(core, Heard::Presence),
            // The connection is older than the wish, and its end says nothing: another one will.
            Contact::Asking { .. } if self.wish.is_some() => {
                self.connect(core);
                Phase::InDoubt(self)
            }
            Contact::Asking { .. } => self.answered(core, Heard::Nothing),
            Contact::Served => {
                self.wait(core);
                Phase::InDoubt(self)
            }
            _ => Phase::InDoubt(self),
        }
    }

    /// What the question led to.
    fn answered(mut self, core: &mut Core, heard: Heard) -> Phase {
        match heard {
            Heard::Answer(Standing::Running) => {
                self.tell_operator(core, Standing::Running);
                return Moved::begin(core);
            }
            Heard::Answer(Standing::Aborted) => {
                self.tell_operator(core, Standing::Aborted);
                let end = by_peer(AbortCode::Aborted, "it has not committed and never will");
                return Rollback::begin(core, end);
            }
            // The operator's word is being recorded: an answer of this kind to an earlier question changes nothing.
            _ if self.contact == Contact::Silent => return Phase::InDoubt(self),
            Heard::Answer(Standing::Committed) => core
                .out
                .notice("the destination has committed but the guest does not run there yet"),
            Heard::Answer(Standing::Unknown) => core
                .out
                .notice("the destination has not decided yet what became of the migration"),
            Heard::Answer(Standing::NoJournal) => core
                .out
                .notice("the destination's pagecopyd knows nothing of this migration"),
            Heard::Answer(Standing::Foreign) => core.out.notice(foreign()),
            Heard::Nothing | Heard::Presence => {}
        }
        if let Some(ended) = self.look_into_wish(core, heard) {
            return ended;
        }
        if self.contact != Contact::Silent {
            self.wait(core);
        }
        Phase::InDoubt(self)
    }

    /// What becomes of the operator's wish, if there is one. Returns the phase that it leads to.
    fn look_into_wish(&mut self, core: &mut Core, heard: Heard) -> Option<Phase> {
        match self.wish.map(|wish| (wish, doubt::at_source(wish, heard))) {
            None => {}
            Some((Resolution::Abandon { .. }, AtSource::Granted)) => {
                core.decided(Ok(
                    "the guest is let go of here; QEMU keeps it, stopped, until it is ended",
                ));
                return Some(Moved::by_word(core));
            }
            Some((_, AtSource::Granted)) => {
                self.contact = Contact::Silent;
                core.journal(Record::TakenBack);
            }
            Some((_, AtSource::Decided(_))) => {}
            Some((_, AtSource::Refused(why))) => {
                self.wish = None;
                core.decided(Err(why));
            }
        }
        None
    }

    /// The destination's answer has ended the doubt: says what became of the operator's wish, if there is one.
    fn tell_operator(&self, core: &mut Core, answer: Standing) {
        if let Some(AtSource::Decided(result)) = self
            .wish
            .map(|wish| doubt::at_source(wish, Heard::Answer(answer)))
        {
            core.decided(result);
        }
    }

    /// The destination is asked first, now.
    fn resolve(&mut self, core: &mut Core, resolution: Resolution) {
        if self.wish.is_some() {
            return core.decided(Err(doubt::refuse(
                "another decision about this migration is being looked into",
                "wait for what becomes of it",
            )));
        }
        if let (Resolution::RunHere { .. }, AtSource::Refused(why)) =
            (resolution, doubt::at_source(resolution, Heard::Nothing))
        {
            return core.decided(Err(why));
        }
        self.wish = Some(resolution);
        self.met = false;
        match self.contact {
            Contact::Waiting { .. } => self.contact = Contact::Waiting { until: core.now },
            // It answers, by fetching.
            Contact::Served => {
                self.look_into_wish(core, Heard::Answer(Standing::Committed));
            }
            Contact::Connecting | Contact::Asking { .. } | Contact::Silent => {}
        }
    }

    fn ask(&mut self, core: &mut Core) {
        let id = core.setup.id;
        core.send(match core.serves {
            true => Message::Serve { id },
            false => Message::Query { id },
        });
        self.contact = Contact::Asking {
            deadline: core.now.after(core.setup.timeouts.silence),
        };
    }

    fn wait(&mut self, core: &mut Core) {
        self.contact = Contact::Waiting {
            until: core.now.after(self.backoff),
        };
        self.backoff = self.backoff.saturating_mul(2).min(pauses(core).1);
    }

    fn connect(&mut self, core: &mut Core) {
        self.contact = Contact::Connecting;
        core.out.push(match core.serves {
            true => Output::ConnectAll,
            false => Output::Connect,
        });
    }

    fn on_time(mut self, core: &mut Core) -> Phase {
        match self.contact {
            Contact::Waiting { until } if core.now >= until => {
                if core.link.is_up() {
                    self.ask(core);
                } else {
                    self.connect(core);
                }
            }
            Contact::Asking { deadline } if core.now >= deadline => return self.link_lost(core),
            Contact::Served => {
                let timeouts = core.setup.timeouts;
                if core.now >= core.link.deadline(timeouts.silence) {
                    return self.link_lost(core);
                }
                if let Some(ping) = core.link.ping(core.now, timeouts.ping_every) {
                    core.send(ping);
                }
            }
            _ => {}
        }
        Phase::InDoubt(self)
    }

    pub(super) fn next(&self, core: &Core) -> Option<Time> {
        match self.contact {
            Contact::Connecting | Contact::Silent => None,
            Contact::Served => Some(core.next_watch()),
            Contact::Asking { deadline: at } | Contact::Waiting { until: at } => Some(at),
        }
    }
}

/// The first pause between two attempts, and the longest. A guest in post-copy waits meanwhile.
fn pauses(core: &Core) -> (Duration, Duration) {
    let timeouts = &core.setup.timeouts;
    match core.serves {
        true => (timeouts.serve_first, timeouts.serve_most),
        false => (timeouts.reconnect_first, timeouts.reconnect_most),
    }
}

/// The names in the certificates do not fit any more.
pub(super) fn foreign() -> &'static str {
    "the destination does not take this host for the one that the guest came from: give pagecopyd the certificate back with \
     which the migration began, or one with the same DNS name"
}

fn taken_back() -> End {
    let failure = Failure::new(
        Fault::Operator,
        "the operator decided that the guest runs on here, and gave the word that the destination is fenced",
        "make sure that the destination's QEMU never runs it; a destination that comes back is told not to",
    );
    End {
        state: State::Failed,
        failure,
        code: None,
    }
}
