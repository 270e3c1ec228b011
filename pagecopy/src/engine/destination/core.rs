//! What every phase of the destination shares, and the rules that hold in every phase before `Commit`.

use std::time::Duration;

use super::interface::{Input, Output, Setup};
use super::reasons::by_peer;
use crate::engine::course::Course;
use crate::engine::doubt::refuse;
use crate::engine::end::End;
use crate::engine::event::{FaultFigures, Figures, PostcopyCost, Report, State, Switch};
use crate::engine::journal::Record;
use crate::engine::liveness::Liveness;
use crate::engine::outbox::Outbox;
use crate::engine::{Failure, Fault, Time};
use crate::memory::BlockSpec;
use crate::wire::{AbortCode, Message};

/// Shared by all phases.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) setup: Setup,
    pub(super) now: Time,
    pub(super) out: Outbox<Output>,
    pub(super) link: Liveness,
    /// The source's RAMBlocks, in the order that numbers them; empty before `Hello`.
    pub(super) blocks: Vec<BlockSpec>,
    /// Whether both sides can do post-copy.
    pub(super) postcopy: bool,
    /// Whether the guest lacks pages, or will when it runs.
    pub(super) armed: bool,
    /// Whether pages are being fetched.
    pub(super) pulls: bool,
    /// Bytes that lack, as last heard.
    pub(super) lacks: u64,
    /// Bytes a second of them that may be fetched while nobody waits for them.
    pub(super) background: Option<u64>,
    /// What the post-copy began with, if that is known.
    pub(super) switch: Option<Switch>,
    /// Page faults, as last heard.
    pub(super) faults: FaultFigures,
    /// From the guest's first moment here on.
    pub(super) course: Option<Course>,
    /// Nothing lacks any more, and QEMU's memory was let go of.
    pub(super) whole: bool,
    /// The source has come without the memory that lacks, in its words.
    pub(super) memory_gone: Option<String>,
    /// Whether data channels may come and go.
    pub(super) channels: bool,
    /// Whether digests are compared.
    pub(super) verify: bool,
    /// Whether a `Hello` came: before it there is nothing to record.
    pub(super) greeted: bool,
    /// Whether QEMU was given device state.
    pub(super) qemu_used: bool,
}

impl Core {
    pub(super) fn new(setup: Setup, now: Time) -> Core {
        Core {
            setup,
            now,
            out: Outbox::new(),
            link: Liveness::new(now),
            blocks: Vec::new(),
            postcopy: false,
            armed: false,
            pulls: false,
            lacks: 0,
            background: None,
            switch: None,
            faults: FaultFigures::default(),
            course: None,
            whole: false,
            memory_gone: None,
            channels: false,
            verify: false,
            greeted: false,
            qemu_used: false,
        }
    }

    /// A migration that is taken up again.
    pub(super) fn known(setup: Setup, now: Time) -> Core {
        let mut core = Core::new(setup, now);
        core.greeted = true;
        core.qemu_used = true;
        core
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link.is_up() {
            self.out.push(Output::Send(message));
        }
    }

    pub(super) fn journal(&mut self, record: Record) {
        self.out.push(Output::Journal(record));
    }

    /// The connection is gone, or of no use. The guest goes on, and waits for what it lacks.
    pub(super) fn stop_pulling(&mut self, why: impl Into<String>) {
        self.stop_serving();
        self.out.pause(why);
    }

    /// The connection is gone, or of no use.
    pub(super) fn link_lost(&mut self) {
        if self.pulls {
            self.stop_serving();
        } else {
            self.link.lost();
        }
    }

    /// Lets go of the connection.
    pub(super) fn stop_serving(&mut self) {
        self.link.lost();
        if std::mem::take(&mut self.pulls) {
            if let Some(course) = &mut self.course {
                course.lost(self.now);
            }
            self.out.push(Output::StopPulling);
        }
    }

    /// Refuses the operator's word to go on without what lacks.
    pub(super) fn nothing_to_poison(&mut self) {
        self.out.push(Output::Decided(Err(refuse(
            "the guest does not run here, or lacks nothing",
            "see `pagecopy status`",
        ))));
    }

    /// The last output.
    pub(super) fn finish(&mut self, state: State, failure: Option<Failure>) {
        self.out.enter(state);
        self.out.push(Output::Finished {
            state,
            failure,
            qemu_used: self.qemu_used,
            figures: self.figures(),
        });
    }

    fn figures(&self) -> Figures {
        let took = self.course.map(|course| course.took(self.now));
        let mut figures = Figures {
            faults: self.armed.then_some(self.faults),
            postcopy_ms: took.map(|took| took.postcopy.as_secs_f64() * 1e3),
            paused_ms: took.map(|took| took.paused.as_secs_f64() * 1e3),
            ..Figures::default()
        };
        if let Some(switch) = self.switch {
            figures.switched(switch);
        }
        figures
    }

    /// The guest goes before its memory.
    pub(super) fn switch_over(&mut self, switch: Switch) {
        self.switch = Some(switch);
        let mode = switch.way();
        self.out
            .push(Output::Report(Report::Switched { mode, switch }));
    }

    /// What the post-copy cost, for the source.
    pub(super) fn cost(&self) -> Option<PostcopyCost> {
        let took = self.course?.took(self.now);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(PostcopyCost {
            faults: self.faults,
            postcopy_us: micros(took.postcopy),
            paused_us: micros(took.paused),
        })
    }

    /// How fetching stands, or stood in the end.
    pub(super) fn heard_of(&mut self, lacks: u64, faults: FaultFigures) {
        (self.lacks, self.faults) = (lacks, faults);
    }

    /// The rules before `Commit` that are the same in every phase. Returns the input if it is for the phase itself.
    pub(super) fn before_commit(&mut self, input: Input) -> Result<Option<Input>, End> {
        match input {
            Input::Tick => Ok(None),
            Input::Cancel => Err(End::cancelled(
                "the operator cancelled the migration at the destination",
                "nothing: the guest runs on at the source",
            )),
            Input::LinkLost(failure) => {
                self.link.lost();
                Err(End::new(AbortCode::Host, failure))
            }
            Input::PeerMisbehaved(what) => Err(End::protocol(what)),
            Input::HostFailed(failure) | Input::PullFailed(failure) => {
                Err(End::new(AbortCode::Host, failure))
            }
            Input::Poison { .. } => {
                self.nothing_to_poison();
                Ok(None)
            }
            Input::Lacks { bytes, faults } => {
                self.heard_of(bytes, faults);
                Ok(None)
            }
            Input::Whole { faults } => {
                self.heard_of(0, faults);
                self.whole = true;
                Ok(None)
            }
            Input::QemuFailed(failure) => Err(End::new(AbortCode::Qemu, failure)),
            Input::JournalFailed(_, failure) => Err(End::new(AbortCode::Host, failure)),
            Input::Message(message) => {
                self.link.heard(self.now);
                self.message_before_commit(message)
            }
            other => Ok(Some(other)),
        }
    }

    fn message_before_commit(&mut self, message: Message) -> Result<Option<Input>, End> {
        match message {
            Message::Ping { nonce } => {
                self.send(Message::Pong { nonce });
                Ok(None)
            }
            Message::Pong { .. } => Ok(None),
            Message::Abort { code, reason } => Err(by_peer(code, &reason)),
            other => Ok(Some(Input::Message(other))),
        }
    }

    /// Gives up when the source has been silent for too long. It pings every second.
    pub(super) fn watch_peer(&self) -> Result<(), End> {
        if self.now < self.next_watch() {
            return Ok(());
        }
        let silence = self.setup.timeouts.silence.as_secs_f64();
        Err(End::new(
            AbortCode::TimedOut,
            Failure::new(
                Fault::Network,
                format!("the source has been silent for {silence:.1} s"),
                "check the network between the hosts and the source's pagecopyd, then migrate again",
            ),
        ))
    }

    /// When [`Core::watch_peer`] gives up.
    pub(super) fn next_watch(&self) -> Time {
        self.link.deadline(self.setup.timeouts.silence)
    }

    /// A peer that sent what it may not.
    pub(super) fn out_of_place(&self, message: &Message, phase: &str) -> End {
        End::protocol(format!("the source sent {} while {phase}", message.name()))
    }
}
