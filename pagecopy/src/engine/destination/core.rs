//! What every phase of the destination shares, and the rules that hold in every phase before `Commit`.

use std::collections::VecDeque;

use super::abort::End;
use super::interface::{Input, Output, Setup};
use crate::engine::event::{Report, State};
use crate::engine::journal::Record;
use crate::engine::liveness::Liveness;
use crate::engine::{Failure, Fault, Time};
use crate::memory::BlockSpec;
use crate::wire::{AbortCode, Message};

/// Shared by all phases.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) setup: Setup,
    pub(super) now: Time,
    pub(super) link: Liveness,
    /// The source's RAMBlocks, in the order that numbers them; empty before `Hello`.
    pub(super) blocks: Vec<BlockSpec>,
    /// Whether digests are compared.
    pub(super) verify: bool,
    /// Whether a `Hello` came: before it there is nothing to record.
    pub(super) greeted: bool,
    /// Whether QEMU was given device state.
    pub(super) qemu_used: bool,
    state: State,
    outputs: VecDeque<Output>,
}

impl Core {
    pub(super) fn new(setup: Setup, now: Time) -> Core {
        Core {
            setup,
            now,
            link: Liveness::new(now),
            blocks: Vec::new(),
            verify: false,
            greeted: false,
            qemu_used: false,
            state: State::Pending,
            outputs: VecDeque::new(),
        }
    }

    pub(super) fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    pub(super) fn take_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link.is_up() {
            self.output(Output::Send(message));
        }
    }

    pub(super) fn journal(&mut self, record: Record) {
        self.output(Output::Journal(record));
    }

    pub(super) fn notice(&mut self, text: impl Into<String>) {
        self.output(Output::Report(Report::Notice { text: text.into() }));
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Tells people about a new state.
    pub(super) fn enter(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.output(Output::Report(Report::State { state }));
        }
    }

    /// The last output.
    pub(super) fn finish(&mut self, state: State, failure: Option<Failure>) {
        self.enter(state);
        self.output(Output::Finished {
            state,
            failure,
            qemu_used: self.qemu_used,
        });
    }

    /// The rules before `Commit` that are the same in every phase. Returns the input if it is for the phase itself.
    pub(super) fn before_commit(&mut self, input: Input) -> Result<Option<Input>, End> {
        match input {
            Input::Tick => Ok(None),
            Input::Cancel => Err(End::cancelled()),
            Input::LinkLost(failure) => {
                self.link.lost();
                Err(End::new(AbortCode::Host, failure))
            }
            Input::PeerMisbehaved(what) => Err(End::protocol(what)),
            Input::HostFailed(failure) => Err(End::new(AbortCode::Host, failure)),
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
            Message::Abort { code, reason } => Err(End::by_peer(code, &reason)),
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
