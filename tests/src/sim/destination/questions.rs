//! What the daemon does without an engine: answers sources in doubt, and takes up its journal after a restart.

use std::time::Duration;

use pagecopy::engine::destination::Input;
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{self, Outcome, Record};
use pagecopy::engine::{Fault as Blame, MigrationId};
use pagecopy::wire::{Message, Standing};
use transport::Op;

use super::super::env::{DestinationEvent, Env, Event, failure};
use super::super::lane::Report;
use super::super::plan::Side;
use super::super::qemu::DestinationState;
use super::DestinationSide;

impl DestinationSide {
    pub(super) fn poll_questions(&mut self, env: &mut Env) {
        let mut index = 0;
        while let Some(lane) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.questions.get_mut(index))
        {
            match lane.poll() {
                Ok(None) => index += 1,
                Ok(Some(Report::BatchSent(_))) => {}
                Ok(Some(Report::Message(bytes))) => match Message::decode(&bytes) {
                    Ok(message) => self.question(env, index, &message),
                    Err(error) => env
                        .checker
                        .violate(format!("a question cannot be read: {error}")),
                },
                Err(_) => {
                    if let Some(daemon) = &mut self.daemon {
                        daemon.questions.remove(index);
                    }
                }
            }
        }
    }

    fn question(&mut self, env: &mut Env, lane: usize, message: &Message) {
        env.trace.line(
            env.agenda.now(),
            "destination",
            format_args!("is asked: {message:?}"),
        );
        match message {
            Message::Query { id } => {
                self.end_session(env);
                self.give_up_unserved(env);
                let standing = self.standing(*id);
                self.answer_question(env, lane, Message::Answer { id: *id, standing });
            }
            Message::Ping { nonce } => {
                self.answer_question(env, lane, Message::Pong { nonce: *nonce })
            }
            Message::Closed => self.journal(env, Record::Closed, false),
            _ => {}
        }
    }

    /// A source that asks has lost the connection, though this side may not know it yet.
    fn end_session(&mut self, env: &mut Env) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        if daemon.control.take().is_some() {
            daemon.data.clear();
            self.input(
                env,
                Input::LinkLost(failure(
                    Blame::Network,
                    "the source has made a new connection",
                )),
            );
        }
    }

    /// A migration that no session serves any more, and of which the journal does not say for sure what became: the guest
    /// was not run, so it is given up, on disk. Whoever asks hears of it the next time.
    fn give_up_unserved(&mut self, env: &mut Env) {
        let served =
            self.daemon.as_ref().is_some_and(|daemon| daemon.recovering) || self.ended.is_none();
        let ran = self.ended == Some(State::Completed);
        if !served && !ran && self.standing(self.id) == Standing::Unknown {
            self.journal(env, Record::Aborted, false);
        }
    }

    fn answer_question(&mut self, env: &mut Env, lane: usize, answer: Message) {
        env.trace.line(
            env.agenda.now(),
            "destination",
            format_args!("answers: {answer:?}"),
        );
        let Some(lane) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.questions.get_mut(lane))
        else {
            return;
        };
        if let Err(why) = lane.enqueue(Op::Send(answer.encode()), None) {
            env.checker.violate(format!("an answer is refused: {why}"));
        }
    }

    /// By the part of the journal that is on disk for good: what is still being written may yet be lost.
    fn standing(&self, id: MigrationId) -> Standing {
        let records = journal::decode(self.disk.safe_bytes())
            .map(|decoded| decoded.records)
            .unwrap_or_default();
        journal::standing_for((id == self.id).then_some(&records[..]))
    }

    /// A daemon that was started again takes its journal up: what was not committed is given up, on disk, before anybody
    /// is told; what was is run.
    pub(super) fn recover(&mut self, env: &mut Env) {
        let records = match journal::decode(self.disk.bytes()) {
            Ok(decoded) => decoded.records,
            Err(error) => {
                return env
                    .checker
                    .violate(format!("the destination's journal cannot be read: {error}"));
            }
        };
        env.trace.line(
            env.agenda.now(),
            "destination",
            format_args!("takes up {records:?}"),
        );
        match journal::outcome(&records) {
            Outcome::Open => self.journal(env, Record::Aborted, false),
            Outcome::Here if !matches!(records.last(), Some(Record::Running | Record::Closed)) => {
                self.run_committed(env);
            }
            Outcome::NotHere | Outcome::Here => self.recovered(),
        }
    }

    fn run_committed(&mut self, env: &mut Env) {
        match self.qemu.state {
            DestinationState::Running => self.journal(env, Record::Running, false),
            DestinationState::Paused => self.run_guest(env),
            _ => self.recovered(),
        }
    }

    pub(super) fn recovery_recorded(&mut self, _env: &mut Env, record: &Record) {
        if matches!(record, Record::Aborted | Record::Running) {
            self.recovered();
        }
    }

    /// After a restart, without an engine.
    pub(super) fn recovered_guest_runs(&mut self, env: &mut Env) {
        if self.daemon.as_ref().is_some_and(|daemon| daemon.recovering) {
            self.journal(env, Record::Running, false);
        }
    }

    /// After a restart, without an engine: tries again, unless QEMU is gone.
    pub(super) fn recovered_guest_does_not_run(&mut self, env: &mut Env) {
        if self.daemon.as_ref().is_none_or(|daemon| !daemon.recovering) {
            return;
        }
        if self.qemu.state == DestinationState::Gone {
            env.qemu_lost[Side::Destination as usize] = true;
            return self.recovered();
        }
        let again = Duration::from_secs(1);
        env.agenda.after(
            again,
            Event::Destination(self.generation, DestinationEvent::Recover),
        );
    }

    fn recovered(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.recovering = false;
        }
    }
}
