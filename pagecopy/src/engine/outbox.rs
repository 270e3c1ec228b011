//! What an engine asks for and nobody has taken yet, and the state that people were told last.

use std::collections::VecDeque;

use super::event::{Report, State};

/// Outputs of either engine, in order.
#[derive(Debug)]
pub(super) struct Outbox<Output> {
    state: State,
    /// Why it is `Paused`, as told last.
    paused: String,
    outputs: VecDeque<Output>,
}

impl<Output: From<Report>> Outbox<Output> {
    /// Nothing asked for; the state is `Pending`.
    pub(super) fn new() -> Outbox<Output> {
        Outbox {
            state: State::Pending,
            paused: String::new(),
            outputs: VecDeque::new(),
        }
    }

    pub(super) fn push(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    pub(super) fn extend(&mut self, outputs: impl IntoIterator<Item = Output>) {
        self.outputs.extend(outputs);
    }

    pub(super) fn take(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Tells people something.
    pub(super) fn notice(&mut self, text: impl Into<String>) {
        self.push(Report::Notice { text: text.into() }.into());
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Tells people about a new state.
    pub(super) fn enter(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.paused.clear();
            self.push(Report::State { state }.into());
        }
    }

    /// Tells people that it is paused, and why.
    pub(super) fn pause(&mut self, reason: impl Into<String>) {
        self.enter(State::Paused);
        let reason = reason.into();
        if self.paused != reason {
            self.paused.clone_from(&reason);
            self.push(Report::Paused { reason }.into());
        }
    }
}
