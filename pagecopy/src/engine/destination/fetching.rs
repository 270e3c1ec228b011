//! Post-copy: the guest runs here and lacks pages, which the driver fetches; until it lacks none.
//!
//! The driver serves page faults and fetches by itself, whatever happens here. This phase keeps the connection, says how
//! things stand, and records the end. A lost connection is a pause: the source dials, and fetching goes on.

use super::core::Core;
use super::interface::{Input, Output};
use super::{Phase, Step};
use crate::engine::course::Course;
use crate::engine::doubt::refuse;
use crate::engine::event::{FaultFigures, PostcopyProgress, Report, State, Switch, Way};
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::{AbortCode, Message};

/// The guest runs, and lacks pages.
#[derive(Debug)]
pub(super) struct Fetching {
    /// The operator's word to go on without what lacks is being carried out.
    poisoning: bool,
}

impl Fetching {
    /// The guest has just been started.
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.send(Message::Running);
        core.journal(Record::Running);
        core.course = Some(Course::begin(core.now));
        if core.whole {
            return Ending::begin(core, None);
        }
        Fetching::enter(core)
    }

    /// After a restart of the daemon: there is no connection.
    pub(super) fn resume(core: &mut Core, lacks: u64) -> Phase {
        core.lacks = lacks;
        core.course = Some(Course::begin(core.now));
        Fetching::enter(core)
    }

    fn enter(core: &mut Core) -> Phase {
        if let Some(course) = core.course.as_mut().filter(|_| !core.pulls) {
            course.lost(core.now);
        }
        if core.pulls {
            core.out.enter(State::Migrating);
        } else {
            core.out
                .pause("the source is not connected: it dials until it gets through");
        }
        Phase::Fetching(Fetching { poisoning: false })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Lacks { bytes, faults } => Self::progress(core, bytes, faults),
            Input::Whole { faults } => {
                core.heard_of(0, faults);
                return Ok(Ending::begin(core, None));
            }
            Input::Served => {
                core.link.restored(core.now);
                // What the guest goes on without is not fetched any more; then it is whole, and says so.
                if !self.poisoning {
                    fetch_on(core);
                    // A source that is in doubt has not heard it.
                    core.send(Message::Running);
                }
            }
            Input::PullFailed(failure) => {
                core.stop_pulling(format!(
                    "fetching has stopped, what the guest touches and lacks waits: {}; {}",
                    failure.what, failure.remedy
                ));
            }
            Input::LinkLost(failure) => core.stop_pulling(format!(
                "the source is away, and dials until it gets through: {}",
                failure.what
            )),
            Input::PeerMisbehaved(what) => {
                core.stop_pulling(format!("the source broke the protocol: {what}"));
            }
            // Nothing is needed of it: only that this is told is waited for.
            Input::SourceLost { all_here: true, .. } => core.stop_serving(),
            Input::SourceLost { reason, .. } => {
                let why = source_lost(core.lacks, &reason);
                core.stop_pulling(why);
            }
            Input::QemuFailed(failure) => {
                let lost = guest_lost(&failure);
                if self.poisoning {
                    core.out.push(Output::Decided(Err(ended_by_poison(&lost))));
                }
                return Ok(Ending::begin(core, Some(lost)));
            }
            Input::Journaled(Record::Running) => {}
            // `Committed` is on disk and says as much to a restarted daemon: it looks and finds the guest running.
            Input::JournalFailed(Record::Running, failure) => core.out.notice(format!(
                "that the guest runs could not be recorded: {}",
                failure.what
            )),
            Input::Poison { peer_fenced } => self.poison(core, peer_fenced),
            Input::Poisoned { bytes } if self.poisoning => {
                let what = format!(
                    "the guest goes on without {bytes} bytes of its memory: what touches them gets a memory error"
                );
                core.out.notice(what.clone());
                core.out.push(Output::Decided(Ok(what)));
                return Ok(Ending::begin(core, None));
            }
            Input::HostFailed(failure) if self.poisoning => {
                self.poisoning = false;
                core.out.push(Output::Decided(Err(failure)));
                if core.link.is_up() {
                    fetch_on(core);
                }
            }
            Input::Message(message) => self.message(core, message),
            Input::Cancel => core.out.notice("too late to cancel: the guest runs here"),
            _ => {}
        }
        if core.pulls && core.now >= core.next_watch() {
            core.stop_pulling("the source has been silent for too long: it dials when it is there");
        }
        Ok(Phase::Fetching(self))
    }

    pub(super) fn next(&self, core: &Core) -> Option<Time> {
        core.pulls.then(|| core.next_watch())
    }

    fn message(&self, core: &mut Core, message: Message) {
        core.link.heard(core.now);
        match message {
            Message::Ping { nonce } => core.send(Message::Pong { nonce }),
            Message::Pong { .. } => {}
            other => {
                core.stop_pulling(format!(
                    "the source sent {} while its pages were being fetched",
                    other.name()
                ));
            }
        }
    }

    fn progress(core: &mut Core, bytes: u64, faults: FaultFigures) {
        core.heard_of(bytes, faults);
        if core.pulls {
            core.send(Message::Lacks { bytes, faults });
        }
        let Some(took) = core.course.map(|course| course.took(core.now)) else {
            return;
        };
        core.out
            .push(Output::Report(Report::Postcopy(PostcopyProgress {
                mode: core.switch.map_or(Way::Postcopy, Switch::way),
                lacking_bytes: bytes,
                postcopy_ms: took.postcopy.as_secs_f64() * 1e3,
                paused_ms: took.paused.as_secs_f64() * 1e3,
                faults,
            })));
    }

    fn poison(&mut self, core: &mut Core, peer_fenced: bool) {
        let refused = if core.pulls {
            Some(refuse(
                "the source is there, and what the guest lacks is being fetched",
                "wait until it lacks nothing",
            ))
        } else if self.poisoning {
            Some(refuse("this is being done", "wait"))
        } else if !peer_fenced {
            Some(refuse(
                format!(
                    "{} bytes of the guest's memory are at the source only, and would be lost",
                    core.lacks
                ),
                "bring the source's pagecopyd back. Only if its memory is gone for good (powered off), say so by adding \
                 `--peer-fenced`",
            ))
        } else {
            None
        };
        match refused {
            Some(failure) => core.out.push(Output::Decided(Err(failure))),
            None => {
                self.poisoning = true;
                core.out.push(Output::Poison);
            }
        }
    }
}

/// Over the connection that has come.
pub(super) fn fetch_on(core: &mut Core) {
    core.pulls = true;
    if let Some(course) = &mut core.course {
        course.restored(core.now);
    }
    core.send(Message::Resumed);
    core.out.push(Output::Pull);
    core.out.enter(State::Migrating);
}

/// The source's host is there, and the guest's memory is not.
fn source_lost(lacks: u64, reason: &str) -> String {
    format!(
        "the source's host does not have the guest's memory any more, of which {lacks} bytes are missing here: {reason}; what to \
         do: bring its RAM file back there. If it is gone for good (that host was started anew, say), `pagecopy resolve ID \
         --poison --peer-fenced` is the last resort: the guest goes on without it"
    )
}

/// What is said of a guest that ended with its QEMU, here, before all of its memory had come; and `why` that is known.
pub fn guest_lost(why: &Failure) -> Failure {
    Failure::new(
        Fault::Qemu,
        format!(
            "this host's QEMU has ended, and the guest with it, which still lacked some of its memory: {}",
            why.what
        ),
        "see QEMU's log for why it ended, then start the guest anew",
    )
}

/// The answer to whoever had what the guest lacks poisoned.
fn ended_by_poison(lost: &Failure) -> Failure {
    Failure::new(
        lost.fault,
        format!(
            "the guest did not go on without what it lacked, and touched it: a memory error ends a QEMU without KVM; {}",
            lost.what
        ),
        lost.remedy.clone(),
    )
}

/// Nothing more is needed of the source; that is being recorded, and the source told.
#[derive(Debug)]
pub(super) struct Ending {
    /// Why the guest does not run here.
    failure: Option<Failure>,
    recorded: bool,
    /// The source may be told: it is recorded, or the disk refuses and nothing is needed of the source all the same.
    told: bool,
    closing: bool,
    deadline: Time,
    /// When the disk is tried again.
    again: Option<Time>,
}

impl Ending {
    fn begin(core: &mut Core, failure: Option<Failure>) -> Phase {
        if let Some(course) = &mut core.course {
            course.end(core.now);
        }
        let ending = Ending {
            failure,
            recorded: false,
            told: false,
            closing: false,
            deadline: core.now,
            again: None,
        };
        core.journal(ending.record());
        Phase::Ending(ending)
    }

    fn record(&self) -> Record {
        let failure = self.failure.clone();
        Record::Whole { failure }
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::Whole { .. }) => {
                self.recorded = true;
                self.tell(core);
            }
            // The journal would send a source that comes again away for good, so this stays until the disk takes it or the
            // source has let go. A daemon that is started anew finds that everything is here, or that QEMU has ended, and records
            // it then.
            Input::JournalFailed(Record::Whole { .. }, failure) => {
                core.out.notice(format!(
                    "that nothing more is needed of the source could not be recorded, trying again: {}",
                    failure.what
                ));
                self.again = Some(core.now.after(core.setup.timeouts.reconnect_most));
                self.tell(core);
            }
            Input::Message(Message::Closed) if self.told && !self.closing => {
                self.closing = true;
                core.journal(Record::Closed);
            }
            Input::Journaled(Record::Closed) | Input::JournalFailed(Record::Closed, _) => {
                return Ok(self.finish(core));
            }
            Input::Message(Message::Ping { nonce }) => core.send(Message::Pong { nonce }),
            Input::Served => {
                core.link.restored(core.now);
                if self.told {
                    self.tell(core);
                }
            }
            Input::LinkLost(_) | Input::PeerMisbehaved(_) => core.link.lost(),
            Input::Poison { .. } => core.out.push(Output::Decided(Err(refuse(
                "the guest lacks nothing any more",
                "nothing",
            )))),
            Input::Cancel => core.out.notice("too late to cancel: the guest runs here"),
            _ => {}
        }
        if self.again.is_some_and(|again| core.now >= again) && !self.closing {
            self.again = None;
            core.journal(self.record());
        }
        // Without `Closed` the journal stays for a source that comes again.
        let over = !core.link.is_up() || core.now >= self.deadline;
        if self.recorded && !self.closing && over {
            return Ok(self.finish(core));
        }
        Ok(Phase::Ending(self))
    }

    fn tell(&mut self, core: &mut Core) {
        self.told = true;
        self.deadline = core.now.after(core.setup.timeouts.silence);
        match &self.failure {
            None => core.send(Message::Whole {
                id: core.setup.id,
                cost: core.cost(),
            }),
            Some(failure) => {
                let reason = format!("{}: {}", core.setup.host, failure.what);
                core.send(Message::Abort {
                    code: AbortCode::Qemu,
                    reason,
                });
            }
        }
    }

    fn finish(self, core: &mut Core) -> Phase {
        let state = match self.failure {
            None => State::Completed,
            Some(_) => State::Failed,
        };
        core.finish(state, self.failure);
        Phase::Ended
    }

    pub(super) fn next(&self) -> Option<Time> {
        if self.closing {
            return None;
        }
        self.again.or(self.recorded.then_some(self.deadline))
    }
}
