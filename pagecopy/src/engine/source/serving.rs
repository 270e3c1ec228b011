//! Post-copy: the guest runs at the destination and depends on the memory here, which is served until it lacks nothing.
//!
//! ```text
//! Up ──▶ Waiting ──▶ Connecting ──▶ Asked ──▶ Up         Whole, in Up or Asked: record it, done
//!          ▲             │            │
//!          └─────────────┴────────────┘  no connection, or not now
//! ```
//!
//! Nothing is decided here: the transport answers the destination's reads by itself. This phase keeps the connection, says
//! how things stand, and lets go of the memory when the destination, or the operator, says so.

use std::time::Duration;

use super::commit::refuse_cancel;
use super::core::{Core, millis};
use super::in_doubt::foreign;
use super::interface::{Input, Output, Resolution};
use super::reasons::by_peer;
use super::{Phase, Step};
use crate::engine::course::Course;
use crate::engine::doubt::refuse;
use crate::engine::event::{PostcopyCost, PostcopyProgress, Report, State, Switch, Way};
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::wire::{AbortCode, Message, Standing};

/// The memory is served.
#[derive(Debug)]
pub(super) struct Serving {
    contact: Contact,
    /// How long to wait after the next failure.
    backoff: Duration,
    course: Course,
    /// What had gone out on this connection, and when that was different the last time.
    read: Option<(u64, Time)>,
    /// Bytes that lack there, as said last.
    lacking: Option<u64>,
    /// The driver has not found the memory.
    memory_lost: bool,
    /// The operator's word that the destination is gone for good.
    wish: Wish,
    /// What the destination said in the end.
    cost: Option<PostcopyCost>,
}

/// What becomes of the operator's word: the destination is dialled first, and must not be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    None,
    /// An attempt that is older than the word is under way.
    Given,
    /// An attempt that the word led to is.
    Tried,
}

/// Where the connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contact {
    /// The destination fetches.
    Up,
    /// Until the next attempt.
    Waiting { until: Time },
    /// `ConnectAll` is under way.
    Connecting,
    /// `Serve` was sent.
    Asked { deadline: Time },
}

impl Serving {
    /// The guest runs at the destination, and that is recorded. `early` is what the destination has said since.
    pub(super) fn begin(core: &mut Core, early: Option<Message>) -> Phase {
        let mut serving = Serving {
            contact: Contact::Up,
            backoff: core.setup.timeouts.serve_first,
            course: Course::begin(core.now),
            read: None,
            lacking: core.switch.map(|switch| switch.lacking_bytes),
            memory_lost: false,
            wish: Wish::None,
            cost: None,
        };
        // Then there is nobody to dial.
        if let Some(message) = early
            && let Some(ended) = serving.message(core, message)
        {
            return serving.release(core, ended);
        }
        if core.link.is_up() && core.has_data {
            // The journal's disk may have been slow.
            core.link.heard(core.now);
            core.out.enter(State::Migrating);
        } else {
            serving.away(core, "the destination is being dialled");
            serving.dial(core);
        }
        Phase::Serving(serving)
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Phase {
        match input {
            Input::Message(message) => {
                if let Some(ended) = self.message(core, message) {
                    return self.release(core, ended);
                }
            }
            Input::LinkLost(failure) if self.is_connected() => self.lost(core, &failure.what),
            Input::Reconnected if self.contact == Contact::Connecting => {
                self.memory_lost = false;
                core.link.restored(core.now);
                core.send(Message::Serve { id: core.setup.id });
                self.contact = Contact::Asked {
                    deadline: core.now.after(core.setup.timeouts.silence),
                };
            }
            Input::ReconnectFailed(why) if self.contact == Contact::Connecting => {
                if self.wish == Wish::Tried {
                    let failure = self.gone_for_good();
                    return self.let_go(core, failure);
                }
                core.out.pause(match self.memory_lost {
                    true => why,
                    false => self.nobody_there(&why),
                });
                self.wait(core);
            }
            Input::ReconnectRefused(why) if self.contact == Contact::Connecting => {
                self.met(core);
                core.out.pause(why);
                self.wait(core);
            }
            Input::GuestEnded { reason } => {
                return self.release(core, Some(ended_there(&reason)));
            }
            Input::Recover => self.recover(core),
            Input::Read { bytes } if self.contact == Contact::Up => self.read(core, bytes),
            Input::MemoryLost => self.memory_lost = true,
            Input::Resolve(Resolution::Abandon { peer_fenced })
                if self.contact != Contact::Up =>
            {
                if let Some(failure) = self.abandon(core, peer_fenced) {
                    return self.let_go(core, failure);
                }
            }
            Input::Resolve(_) => core.nothing_to_resolve(
                "the guest runs at the destination and depends on the memory here",
                "wait until it lacks nothing; if the destination never comes back, `pagecopy resolve ID --abandon --peer-fenced` lets go of it",
            ),
            Input::StartPostcopy => {
                core.nothing_to_resolve("it has begun: the guest runs at the destination", "nothing");
            }
            Input::Change(_) => core.nothing_to_resolve(
                "the guest runs at the destination, which fetches the rest under the limits that it was given",
                "wait until it lacks nothing",
            ),
            Input::Cancel => refuse_cancel(core),
            Input::QemuFailed(failure) => core.out.notice(format!(
                "this host's QEMU has ended; the guest's memory is served on from its files: {}",
                failure.what
            )),
            _ => {}
        }
        self.on_time(core);
        Phase::Serving(self)
    }

    /// Returns how it ended, if it did: `Some(None)` well.
    fn message(&mut self, core: &mut Core, message: Message) -> Option<Option<Failure>> {
        core.link.heard(core.now);
        match message {
            Message::Whole { id, cost } if id == core.setup.id => {
                self.cost = cost;
                return Some(None);
            }
            Message::Abort {
                code: AbortCode::Qemu,
                reason,
            } => {
                return Some(Some(ended_there(&reason)));
            }
            // Only the end of its guest ends that it needs the memory here.
            Message::Abort { code, reason } if self.is_connected() => {
                let why = by_peer(code, &reason).failure.what;
                self.lost(core, &why);
            }
            Message::Lacks { bytes, faults } => {
                core.figures.faults = Some(faults);
                let took = self.course.took(core.now);
                let report = Report::Postcopy(PostcopyProgress {
                    mode: core.switch.map_or(Way::Postcopy, Switch::way),
                    lacking_bytes: bytes,
                    postcopy_ms: millis(took.postcopy),
                    paused_ms: millis(took.paused),
                    faults,
                });
                core.out.push(Output::Report(report));
                let before = self.lacking.replace(bytes);
                if before.is_some_and(|before| bytes < before) {
                    self.reads_on(core);
                }
                self.look_whether_it_reads(core);
            }
            Message::Resumed if matches!(self.contact, Contact::Asked { .. }) => {
                self.met(core);
                self.contact = Contact::Up;
                self.backoff = core.setup.timeouts.serve_first;
                self.course.restored(core.now);
                core.has_data = true;
                core.out.enter(State::Migrating);
            }
            // Its guest has ended before that was recorded to run there, and its operator has said so; or it never ran there.
            Message::Answer {
                id,
                standing: Standing::Aborted,
            } if id == core.setup.id => return Some(Some(never_there())),
            Message::Answer { standing, .. } if matches!(self.contact, Contact::Asked { .. }) => {
                let why = match standing {
                    // The operator knows more than who says so.
                    Standing::NoJournal if self.wish == Wish::Tried => {
                        return Some(Some(self.gone_for_good()));
                    }
                    Standing::NoJournal => self.nobody_there(
                        "the destination's pagecopyd knows nothing of this migration",
                    ),
                    Standing::Foreign => foreign().to_owned(),
                    _ => format!("it does not take the guest up yet ({standing:?})"),
                };
                self.lost(core, &why);
            }
            Message::Ping { nonce } => core.send(Message::Pong { nonce }),
            _ => {}
        }
        None
    }

    fn read(&mut self, core: &mut Core, bytes: u64) {
        if self.read.is_some_and(|(before, _)| before == bytes) {
            return self.look_whether_it_reads(core);
        }
        self.read = Some((bytes, core.now));
        self.reads_on(core);
    }

    /// The destination has read something. Over RDMA it does so by itself, and only that it lacks less says so.
    fn reads_on(&mut self, core: &mut Core) {
        if let Some((_, since)) = &mut self.read {
            *since = core.now;
        }
        if self.course.is_away() {
            self.course.restored(core.now);
            core.out.enter(State::Migrating);
        }
    }

    /// A destination that lacks pages also reads them, and says each second what it lacks: otherwise its threads are stuck, or it
    /// answers for no good, and a person must know.
    fn look_whether_it_reads(&mut self, core: &mut Core) {
        let timeouts = core.setup.timeouts;
        let unread = match core.limits_background {
            true => timeouts.unread_limited,
            false => timeouts.unread,
        };
        let Some((_, since)) = self.read.filter(|_| self.lacking != Some(0)) else {
            return;
        };
        if self.contact == Contact::Up && core.now >= since.after(unread) {
            self.course.lost(core.now);
            core.out.pause(format!(
                "the destination answers and lacks memory, and has read none for {:.0} s: see its log; started anew, its \
                 pagecopyd reads on",
                unread.as_secs_f64()
            ));
        }
    }

    fn is_connected(&self) -> bool {
        matches!(self.contact, Contact::Up | Contact::Asked { .. })
    }

    /// The connection is of no use any more.
    fn lost(&mut self, core: &mut Core, why: &str) {
        if self.is_connected() {
            self.met(core);
        }
        self.away(
            core,
            format!("the destination is away: what the guest touches and lacks waits: {why}"),
        );
        self.wait(core);
    }

    fn away(&mut self, core: &mut Core, why: impl Into<String>) {
        core.link_lost();
        self.read = None;
        self.course.lost(core.now);
        core.out.pause(why);
    }

    fn wait(&mut self, core: &Core) {
        let pause = match self.wish {
            Wish::None => self.backoff,
            // An operator waits.
            Wish::Given | Wish::Tried => Duration::ZERO,
        };
        self.contact = Contact::Waiting {
            until: core.now.after(pause),
        };
        self.backoff = self
            .backoff
            .saturating_mul(2)
            .min(core.setup.timeouts.serve_most);
    }

    fn dial(&mut self, core: &mut Core) {
        if self.wish == Wish::Given {
            self.wish = Wish::Tried;
        }
        self.contact = Contact::Connecting;
        core.out.push(Output::ConnectAll);
    }

    /// The operator wants to let go of the memory. Returns how that ends, if it does at once.
    fn abandon(&mut self, core: &mut Core, peer_fenced: bool) -> Option<Failure> {
        if self.memory_lost {
            return Some(abandoned());
        }
        if !peer_fenced {
            core.decided(Err(refuse(
                format!(
                    "{} of the guest's memory are here only, and would be lost with the guest: the destination may come back",
                    self.bytes()
                ),
                "wait: the destination is dialled on and on (`pagecopy recover ID --to HOST:PORT` gives it another address). Only if its \
                 QEMU and pagecopyd cannot run any more (powered off, disk gone), say so by adding `--peer-fenced`",
            )));
            return None;
        }
        match self.contact {
            // Its answer decides.
            Contact::Asked { .. } => self.wish = Wish::Tried,
            Contact::Connecting => self.wish = Wish::Given,
            Contact::Waiting { .. } | Contact::Up => {
                self.wish = Wish::Given;
                self.dial(core);
            }
        }
        None
    }

    /// Somebody answers at the destination's address: the operator's word is wrong.
    fn met(&mut self, core: &mut Core) {
        if std::mem::replace(&mut self.wish, Wish::None) != Wish::None {
            core.decided(Err(still_there()));
        }
    }

    fn let_go(mut self, core: &mut Core, failure: Failure) -> Phase {
        self.wish = Wish::Tried;
        self.release(core, Some(failure))
    }

    fn bytes(&self) -> String {
        match self.lacking {
            Some(bytes) => format!("{bytes} bytes"),
            None => "some".to_owned(),
        }
    }

    fn nobody_there(&self, why: &str) -> String {
        format!(
            "{why}; {} of the guest's memory are here only. If that host is gone for good, and the guest with it, `pagecopy resolve ID \
             --abandon --peer-fenced` lets go of them",
            self.bytes()
        )
    }

    fn gone_for_good(&self) -> Failure {
        Failure::new(
            Fault::Operator,
            format!(
                "the operator let go of the guest's memory here, of which the destination, which is gone for good, lacked {} when it was \
                 heard last: the guest is lost with it",
                self.bytes()
            ),
            "start the guest anew, from its disks. Do not resume what this host's QEMU has, which is the guest as it was when it left: \
             its disks have gone on without it",
        )
    }

    fn recover(&mut self, core: &mut Core) {
        match self.contact {
            Contact::Up => core.nothing_to_resolve("the hosts are connected", "nothing"),
            Contact::Connecting | Contact::Asked { .. } => {
                self.backoff = core.setup.timeouts.serve_first;
                core.decided(Ok("the destination is being dialled at this moment"));
            }
            Contact::Waiting { .. } => {
                core.decided(Ok("the destination is dialled now"));
                self.backoff = core.setup.timeouts.serve_first;
                self.dial(core);
            }
        }
    }

    fn on_time(&mut self, core: &mut Core) {
        let timeouts = core.setup.timeouts;
        match self.contact {
            Contact::Up => {
                if core.now >= core.link.deadline(timeouts.silence) {
                    self.lost(core, "it has been silent for too long");
                } else if let Some(ping) = core.link.ping(core.now, timeouts.ping_every) {
                    core.send(ping);
                }
            }
            Contact::Asked { deadline } if core.now >= deadline => {
                self.lost(core, "it does not answer");
            }
            Contact::Waiting { until } if core.now >= until => self.dial(core),
            _ => {}
        }
    }

    pub(super) fn next(&self, core: &Core) -> Option<Time> {
        match self.contact {
            Contact::Up => Some(core.next_watch()),
            Contact::Waiting { until: at } | Contact::Asked { deadline: at } => Some(at),
            Contact::Connecting => None,
        }
    }

    /// Nothing here is needed any more; that is being recorded.
    fn release(mut self, core: &mut Core, failure: Option<Failure>) -> Phase {
        if self.wish != Wish::None {
            core.decided(Ok(match failure {
                Some(_) => {
                    "the guest's memory here is let go of; QEMU keeps it, as it was when the guest left, until it is ended"
                }
                None => "the destination answers that the guest lacks nothing any more",
            }));
        }
        self.course.end(core.now);
        let took = self.course.took(core.now);
        let (mut postcopy, mut paused) = (took.postcopy, took.paused);
        // Either daemon may have been started anew, and have seen the end only.
        if let Some(cost) = self.cost {
            core.figures.faults = Some(cost.faults);
            postcopy = postcopy.max(Duration::from_micros(cost.postcopy_us));
            paused = paused.max(Duration::from_micros(cost.paused_us));
        }
        core.figures.postcopy_ms = Some(millis(postcopy));
        core.figures.paused_ms = Some(millis(paused));
        core.journal(Record::Released {
            failure: failure.clone(),
        });
        Phase::Releasing(Releasing { failure })
    }
}

/// `Released` is being recorded.
#[derive(Debug)]
pub(super) struct Releasing {
    /// Why the guest does not run at the destination, whole.
    failure: Option<Failure>,
}

impl Releasing {
    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Journaled(Record::Released { .. }) => {
                if core.link.is_up() {
                    core.send(Message::Closed);
                }
            }
            // Without the record nobody may be told that we will not come again.
            Input::JournalFailed(Record::Released { .. }, failure) => {
                core.out
                    .notice(format!("the journal could not be closed: {}", failure.what));
            }
            Input::LinkLost(_) => {
                core.link_lost();
                return Ok(Phase::Releasing(self));
            }
            Input::Cancel => {
                refuse_cancel(core);
                return Ok(Phase::Releasing(self));
            }
            Input::Resolve(_) | Input::Recover | Input::StartPostcopy | Input::Change(_) => {
                core.nothing_to_resolve("this migration is ending", "nothing");
                return Ok(Phase::Releasing(self));
            }
            _ => return Ok(Phase::Releasing(self)),
        }
        core.out.push(Output::Detach);
        if core.setup.options.quit_source && self.failure.is_none() {
            core.out.push(Output::QuitGuest);
        }
        let state = match self.failure {
            None => State::Completed,
            Some(_) => State::Failed,
        };
        core.finish(state, self.failure);
        Ok(Phase::Ended)
    }
}

/// The guest has run at the destination, and ended there with its QEMU: nothing needs its memory any more.
fn ended_there(reason: &str) -> Failure {
    Failure::new(
        Fault::Qemu,
        format!("the guest has ended with its QEMU at the destination: {reason}"),
        "start the guest anew, from its disks. Do not resume what this host's QEMU has, which is the guest as it was when it left: \
         its disks have gone on without it",
    )
}

/// The destination has committed nothing that it will run, though it was heard, or said to be, where the guest is.
fn never_there() -> Failure {
    Failure::new(
        Fault::PeerHost,
        "the destination answers that the guest does not run there and never will: it has ended there, or was never run",
        "start the guest anew, from its disks. Only if it is certain that it never ran at the destination, what this host's QEMU has, \
         stopped, is the guest as it is",
    )
}

fn still_there() -> Failure {
    refuse(
        "the destination's pagecopyd is there, and has not let go of the guest",
        "wait until the guest lacks nothing, or see that pagecopyd's log. Only when nothing answers at that address any more, because its \
         pagecopyd and its QEMU are ended for good, let go here",
    )
}

fn abandoned() -> Failure {
    Failure::new(
        Fault::Operator,
        "the operator let go of the guest's memory here while the guest still lacked some of it",
        "at the destination, `pagecopy resolve ID --poison --peer-fenced` lets the guest go on without what it lacks, or end its QEMU",
    )
}
