//! What the daemon does without an engine: answers sources in doubt, and takes up its journal after a restart.

use pagecopy::engine::destination::{Destination, Input};
use pagecopy::engine::doubt::{Found, Resolution, Step, at_destination};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{self, Postcopy, Record};
use pagecopy::engine::{Fault as Blame, MigrationId};
use pagecopy::wire::{AbortCode, Message, Standing};
use transport::Op;

use super::super::disk::Hand;
use super::super::driver::Driver;
use super::super::env::{Env, failure};
use super::super::lane::Report;
use super::super::mistake::Mistake;
use super::super::plan::Side;
use super::super::qemu::DestinationState;
use super::super::tally::Happened;
use super::{DestinationSide, Question};

impl DestinationSide {
    pub(super) fn poll_questions(&mut self, env: &mut Env) {
        let mut index = 0;
        while let Some(question) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.questions.get_mut(index))
        {
            match question.control.poll() {
                Ok(None) => index += 1,
                Ok(Some(Report::BatchSent(_) | Report::Fetched(_))) => {}
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
        env.note("destination", format_args!("is asked: {message:?}"));
        match message {
            Message::Query { id } => {
                self.end_session(env);
                self.give_up_unserved(env);
                match self.standing(*id) {
                    Standing::Committed if self.holds() && self.has_guest() => {
                        self.run_committed(env, lane)
                    }
                    standing => {
                        self.answer_question(env, lane, Message::Answer { id: *id, standing })
                    }
                }
            }
            Message::Serve { id } => self.serve(env, lane, *id),
            Message::Lost { id, reason } => self.lost(env, lane, *id, reason),
            Message::Ping { nonce } => {
                self.answer_question(env, lane, Message::Pong { nonce: *nonce })
            }
            Message::Closed => self.append(env, Record::Closed, Hand::Daemon),
            _ => {}
        }
    }

    /// Whether no session serves the migration.
    fn unserved(&self) -> bool {
        self.ended.is_some()
            || self
                .daemon
                .as_ref()
                .is_none_or(|daemon| daemon.engine.is_none())
    }

    /// Whether the guest is committed to this host, and no session serves it.
    pub(in crate::sim) fn holds(&self) -> bool {
        self.daemon.is_some() && self.unserved() && self.standing(self.id) == Standing::Committed
    }

    /// Whether this host's QEMU is gone with a guest that the journal does not say to have run.
    pub(in crate::sim) fn knows_nothing_of_its_guest(&self) -> bool {
        self.qemu.state == DestinationState::Gone
            && self.unserved()
            && journal::postcopy(&self.records()) != Postcopy::Over
    }

    /// Whether the session has ended, and the guest neither runs here nor ever will.
    pub(super) fn never_runs_here(&self) -> bool {
        matches!(self.ended, Some(State::Failed | State::Cancelled))
            && self.qemu.state != DestinationState::Running
            && self.standing(self.id) != Standing::Committed
    }

    /// Whether a committed guest stands still here, and lacks pages.
    pub(in crate::sim) fn keeps_a_guest_that_lacks_pages(&self) -> bool {
        self.holds()
            && self.found() == Found::StandsStill
            && journal::postcopy(&self.records()) == Postcopy::Open
            && self.lacks() > 0
    }

    fn has_guest(&self) -> bool {
        matches!(self.found(), Found::Runs | Found::StandsStill)
    }

    /// What the daemon finds when it looks for the guest.
    fn found(&self) -> Found {
        match self.qemu.state {
            DestinationState::Running => Found::Runs,
            DestinationState::Paused => Found::StandsStill,
            DestinationState::InMigrate | DestinationState::Gone => Found::Gone,
            DestinationState::Loading => Found::Unclear("it is being loaded".into()),
        }
    }

    /// This host's operator decides about a committed guest that is not known to run.
    pub(in crate::sim) fn resolve(&mut self, env: &mut Env, resolution: Resolution) {
        if !self.holds() {
            return;
        }
        let found = self.found();
        let step = at_destination(resolution, &found);
        env.note(
            "operator",
            format_args!("resolves at the destination, {found:?}: {resolution:?}: {step:?}"),
        );
        match step {
            Ok(Step::Run) => {
                self.memory_gone = false;
                self.run_guest(env);
            }
            Ok(Step::RecordRunning) => self.runs_after_all(env),
            Ok(Step::RecordAborted) => self.append(env, Record::Aborted, Hand::Daemon),
            Err(_) if found == Found::Runs => self.runs_after_all(env),
            Err(_) => {}
        }
    }

    /// A guest of which no session knew turns out to run.
    pub(super) fn runs_after_all(&mut self, env: &mut Env) {
        self.append(env, Record::Running, Hand::Daemon);
        if journal::postcopy(&self.records()) == Postcopy::Open {
            self.ended = None;
            self.take_session_up(env);
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

    /// A migration that no session serves any more, and of which the journal says nothing: the guest was not run, so it
    /// is given up, on disk. Whoever asks hears of it the next time.
    fn give_up_unserved(&mut self, env: &mut Env) {
        if self.unserved() && self.standing(self.id) == Standing::Unknown {
            self.append(env, Record::Aborted, Hand::Daemon);
        }
    }

    fn answer_question(&mut self, env: &mut Env, lane: usize, answer: Message) {
        env.note("destination", format_args!("answers: {answer:?}"));
        let Some(question) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.questions.get_mut(lane))
        else {
            return;
        };
        if let Err(why) = question.control.enqueue(Op::Send(answer.encode()), None) {
            env.checker.violate(format!("an answer is refused: {why}"));
        }
    }

    /// The source has come to serve what the guest lacks.
    fn serve(&mut self, env: &mut Env, lane: usize, id: MigrationId) {
        self.end_session(env);
        self.give_up_unserved(env);
        if self.takes_serve() {
            let Some(daemon) = &mut self.daemon else {
                return;
            };
            let Question { control, data } = daemon.questions.remove(lane);
            daemon.control = Some(control);
            daemon.served = data;
            self.memory_gone = false;
            self.close_to_writes(env);
            return self.input(env, Input::Served);
        }
        if let Some(end) = self.needs_nothing(env, id) {
            return self.answer_question(env, lane, end);
        }
        match self.standing(id) {
            Standing::Committed if self.holds() && self.has_guest() => {
                self.run_committed(env, lane)
            }
            standing => self.answer_question(env, lane, Message::Answer { id, standing }),
        }
    }

    /// What a source is told of a guest that needs nothing more of it: that it is whole, or why it is not.
    fn needs_nothing(&self, env: &mut Env, id: MigrationId) -> Option<Message> {
        let records = self.records();
        if journal::postcopy(&records) != Postcopy::Over {
            return None;
        }
        let lost = journal::lost(&records).filter(|_| !env.errs(Mistake::ForgottenEnd));
        let (message, what) = match lost {
            None => (Message::Whole { id, cost: None }, Happened::WasWholeBefore),
            Some(failure) => {
                let (code, reason) = (AbortCode::Qemu, failure.what.clone());
                (Message::Abort { code, reason }, Happened::HadEndedBefore)
            }
        };
        env.tally.note(what);
        Some(message)
    }

    fn lost(&mut self, env: &mut Env, lane: usize, id: MigrationId, reason: &str) {
        if let Some(end) = self.needs_nothing(env, id) {
            return self.answer_question(env, lane, end);
        }
        let reason = reason.to_owned();
        let all_here = self.lacks() == 0 && !env.errs(Mistake::HeldWithoutNeed);
        if !self.unserved() {
            self.input(env, Input::SourceLost { reason, all_here });
            if self.state() == Some(State::Paused) {
                env.tally.note(Happened::HeardOfLoss);
            }
        }
        self.give_up_unserved(env);
        let standing = self.standing(id);
        self.memory_gone = self.lacks() > 0;
        self.answer_question(env, lane, Message::Answer { id, standing });
        if !self.holds() {
            return;
        }
        match self.found() {
            Found::Runs => self.runs_after_all(env),
            Found::StandsStill if all_here => {
                env.tally.note(Happened::RunWithoutItsSource);
                self.run_here(env, None);
            }
            _ => env.tally.note(Happened::KeptWithoutMemory),
        }
    }

    fn takes_serve(&self) -> bool {
        let engine = self
            .daemon
            .as_ref()
            .and_then(|daemon| daemon.engine.as_ref());
        self.ended.is_none() && engine.is_some_and(Destination::takes_serve)
    }

    fn records(&self) -> Vec<Record> {
        journal::decode(self.host.disk.bytes())
            .map(|decoded| decoded.records)
            .unwrap_or_default()
    }

    fn standing(&self, id: MigrationId) -> Standing {
        let records = self.records();
        journal::standing_for((id == self.id).then_some(&records[..]))
    }

    /// The guest is committed to this host and nobody has said yet that it runs. A source that asks has not taken it
    /// back: it is run now, and the source is told on the connection on which it asked.
    fn run_committed(&mut self, env: &mut Env, lane: usize) {
        let question = self
            .daemon
            .as_mut()
            .map(|daemon| daemon.questions.remove(lane));
        self.run_here(env, question);
    }

    /// The same, on the connection of that question; without one where all memory has come and the source has said that it has
    /// lost it.
    fn run_here(&mut self, env: &mut Env, question: Option<Question>) {
        let armed = journal::postcopy(&self.records()) == Postcopy::Open;
        // The session opens the journal, which cuts off what is no whole line.
        self.host.disk.reopen();
        let engine = Destination::recover(self.setup.clone(), armed, env.clock(Side::Destination));
        if let Some(daemon) = &mut self.daemon {
            let connected = question.is_some();
            let (control, data) = match question {
                Some(Question { control, data }) => (Some(control), data),
                None => (None, Vec::new()),
            };
            let serves = !data.is_empty();
            self.memory_gone &= !serves;
            daemon.control = control;
            daemon.served = data;
            daemon.engine = Some(engine);
            self.session += 1;
            self.ended = None;
            if !connected {
                let lost = failure(Blame::Network, "there is no connection");
                self.input(env, Input::LinkLost(lost));
            }
            self.carry_out_all(env);
            self.tell_again(env, armed);
            if armed && serves {
                self.close_to_writes(env);
                self.input(env, Input::Served);
            }
        }
    }

    /// A daemon that was started again takes its journal up: what was not committed is given up, on disk, before anybody
    /// is told. A guest that was committed is not run before the source asks, for its operator may have taken it back.
    pub(super) fn recover(&mut self, env: &mut Env) {
        let records = match journal::decode(self.host.disk.bytes()) {
            Ok(decoded) => decoded.records,
            Err(error) => {
                return env
                    .checker
                    .violate(format!("the destination's journal cannot be read: {error}"));
            }
        };
        env.note("destination", format_args!("takes up {records:?}"));
        let running = self.qemu.state == DestinationState::Running;
        match journal::standing_for(Some(&records)) {
            Standing::Unknown | Standing::Aborted => {
                if journal::standing_for(Some(&records)) == Standing::Unknown {
                    self.append(env, Record::Aborted, Hand::Daemon);
                }
                // The guest never runs here: zeroes hurt nobody.
                self.release(env);
                return;
            }
            Standing::Committed if running => self.append(env, Record::Running, Hand::Daemon),
            _ => {}
        }
        if journal::postcopy(&records) == Postcopy::Open {
            let runs = running || records.contains(&Record::Running);
            self.take_up(env, runs);
        }
    }

    /// A guest that lacks pages, or will when it runs: its page faults are answered again.
    fn take_up(&mut self, env: &mut Env, runs: bool) {
        env.tally.note(Happened::TakenUp);
        self.serve_faults(env);
        if runs {
            self.take_session_up(env);
        }
    }

    fn take_session_up(&mut self, env: &mut Env) {
        self.host.disk.reopen();
        let (lacks, now) = (self.lacks(), env.clock(Side::Destination));
        let engine = Destination::resume(self.setup.clone(), lacks, now);
        if let Some(daemon) = &mut self.daemon {
            daemon.engine = Some(engine);
        }
        self.session += 1;
        self.carry_out_all(env);
        self.tell_again(env, true);
        if self.qemu.state == DestinationState::Gone {
            let gone = failure(Blame::Qemu, "QEMU is gone");
            self.input(env, Input::QemuFailed(gone));
        }
    }
}
