//! A migration in doubt in the pair's world: what the operators ask for on both sides, and what the daemons do about it.

use pagecopy::engine::doubt::{Found, Resolution, Step, at_destination, when_withdrawn};
use pagecopy::engine::journal::{self, Outcome, Record, has_to_tell, standing_for};
use pagecopy::engine::{Failure, Fault, destination, source};
use pagecopy::wire::Standing;

use super::Pair;

impl Pair {
    /// The source's operator decides; what becomes of it, if that is known before the world has made `steps` steps.
    pub fn source_decides(
        &mut self,
        wish: Resolution,
        steps: u64,
    ) -> Option<Result<String, Failure>> {
        let before = self.decided.len();
        self.tell_source(source::Input::Resolve(wish));
        self.drain();
        for _ in 0..steps {
            if self.decided.len() > before || !self.step() {
                break;
            }
        }
        self.decided.get(before).cloned()
    }

    /// The destination's operator decides, as its daemon has it.
    pub fn destination_decides(&mut self, wish: Resolution) -> Result<Step, Failure> {
        if self.served() || self.standing() != Standing::Committed {
            return Err(Failure::new(Fault::Operator, "refused: not in doubt", ""));
        }
        let step = at_destination(wish, &self.found())?;
        self.take(step);
        Ok(step)
    }

    /// A source whose operator has taken the guest back tries to tell the destination.
    pub fn source_tells(&mut self) {
        let records = journal::decode(&self.source_journal).unwrap().records;
        if self.network_gone || !has_to_tell(&records) {
            return;
        }
        if self.served() {
            let lost = Failure::new(Fault::Network, "the source has made a new connection", "");
            self.tell_destination(destination::Input::LinkLost(lost));
            return self.drain();
        }
        match self.standing() {
            Standing::Committed => {
                if let Some(step) = when_withdrawn(&self.found()) {
                    self.take(step);
                }
            }
            _ if self.outcome() == Outcome::Open => self.take(Step::RecordAborted),
            _ => {}
        }
        if matches!(self.standing(), Standing::Aborted | Standing::Running) {
            self.source_journal.extend(journal::encode(&Record::Told));
        }
    }

    /// What the destination would answer.
    pub fn standing(&self) -> Standing {
        standing_for(Some(
            &journal::decode(&self.destination_journal).unwrap().records,
        ))
    }

    fn outcome(&self) -> Outcome {
        journal::outcome(&journal::decode(&self.destination_journal).unwrap().records)
    }

    fn served(&self) -> bool {
        self.destination.is_some() && self.destination_finished.is_none()
    }

    fn found(&self) -> Found {
        if self.destination_runs {
            Found::Runs
        } else {
            Found::StandsStill
        }
    }

    fn take(&mut self, step: Step) {
        self.destination_runs |= step == Step::Run;
        let record = match step {
            Step::Run | Step::RecordRunning => Record::Running,
            Step::RecordAborted => Record::Aborted,
        };
        self.destination_journal.extend(journal::encode(&record));
    }
}
