//! What has happened in a run so far, as the rules need it, and what it says of the inputs.

use pagecopy::engine::Time;
use pagecopy::engine::event::State;
use pagecopy::engine::journal::Record;
use pagecopy::engine::pacing::Ledger;
use pagecopy::engine::source::{Change, Input, Resolution};
use pagecopy::wire::{AbortCode, Message, Standing};

use super::CHANNELS;
use crate::words;

/// What has happened so far.
#[derive(Debug)]
pub(super) struct Facts {
    /// What is pushed under the bandwidth limit.
    pub(super) ledger: Ledger,
    /// The operator waits for the answer to this.
    pub(super) change: Option<Change>,
    /// The round that pages belong to, by the barriers sent.
    pub(super) round: u32,
    /// Every barrier of the round before was confirmed.
    pub(super) round_open: bool,
    pub(super) barriers_sent: u16,
    pub(super) under_way: [usize; CHANNELS as usize],
    pub(super) stop_ordered: bool,
    pub(super) resume_ordered: bool,
    pub(super) intent: bool,
    pub(super) loaded: bool,
    pub(super) commits: u32,
    /// The destination has given it up, or the operator has taken it back.
    pub(super) given_back: bool,
    /// The destination runs it, or the operator said so.
    pub(super) gone: bool,
    pub(super) moved_recorded: bool,
    /// It was in doubt: from then on nobody but the destination's answer, and the operator, gives the guest back.
    pub(super) doubted: bool,
    pub(super) finished: bool,
    /// Post-copy was offered.
    pub(super) offered: bool,
    pub(super) reads_open: bool,
    /// What lacks was said: the guest goes before its memory.
    pub(super) serves: bool,
    pub(super) serving_asked: bool,
    /// The destination needs nothing more, or the operator lets go.
    pub(super) may_release: bool,
    /// The disk was asked to record that, and has answered.
    pub(super) released: bool,
}

impl Facts {
    pub(super) fn new(ledger: Ledger) -> Facts {
        Facts {
            ledger,
            change: None,
            round: 0,
            round_open: false,
            barriers_sent: 0,
            under_way: [0; CHANNELS as usize],
            stop_ordered: false,
            resume_ordered: false,
            intent: false,
            loaded: false,
            commits: 0,
            given_back: false,
            gone: false,
            moved_recorded: false,
            doubted: false,
            finished: false,
            offered: false,
            reads_open: false,
            serves: false,
            serving_asked: false,
            may_release: false,
            released: false,
        }
    }

    /// The operator is told what has become of a change.
    pub(super) fn changed(&mut self, change: Change, taken: bool, now: Time) {
        if !taken {
            return;
        }
        assert!(
            !self.stop_ordered && self.commits == 0 && !self.finished,
            "limits are taken too late: {self:?}"
        );
        if let Some(limit) = change.bandwidth_limit {
            self.ledger = Ledger::new(limit, now);
        }
    }

    /// The engine is about to be told.
    pub(super) fn note(&mut self, input: &Input) {
        let facts = self;
        match input {
            Input::Message(Message::BarrierReached { round })
                if *round == facts.round && facts.barriers_sent == CHANNELS =>
            {
                facts.round_open = true;
            }
            Input::Message(Message::Loaded) => facts.loaded = true,
            Input::Message(Message::Running)
            | Input::Message(Message::Answer {
                id: words::ID,
                standing: Standing::Running,
            }) => facts.gone |= facts.commits > 0,
            Input::Resolve(Resolution::Abandon { .. }) => {
                facts.may_release |= facts.gone;
                facts.gone |= facts.commits > 0;
            }
            // It says that the guest has run, to a source in doubt, too.
            Input::Message(
                Message::Whole { id: words::ID, .. }
                | Message::Abort {
                    code: AbortCode::Qemu,
                    ..
                },
            ) => {
                facts.given_back |=
                    !facts.doubted && matches!(input, Input::Message(Message::Abort { .. }));
                facts.gone |= facts.doubted && facts.serves;
                facts.may_release |= facts.gone;
            }
            // It ends a connection, and decides nothing any more.
            Input::Message(Message::Abort { .. }) => facts.given_back |= !facts.doubted,
            Input::Journaled(Record::Released { .. })
            | Input::JournalFailed(Record::Released { .. }, _) => {
                facts.released |= facts.may_release;
            }
            Input::Message(Message::Answer {
                id: words::ID,
                standing: Standing::Aborted,
            }) => {
                // A guest that was heard to run ended before its destination had recorded that.
                facts.may_release |= facts.gone;
                facts.given_back = true;
            }
            // Without the word that the destination is fenced the operator's wish is not enough.
            Input::Resolve(Resolution::ResumeHere { peer_fenced: true }) => {
                facts.given_back |= facts.commits > 0;
            }
            Input::Journaled(Record::CommitIntent) => facts.intent = true,
            Input::Journaled(Record::GuestMoved) => facts.moved_recorded = true,
            Input::Change(change) => facts.change = Some(*change),
            Input::Pushed { pushed, .. } => {
                facts
                    .ledger
                    .comes_back(pushed.zero_bytes + pushed.encoded.saved());
            }
            _ => {}
        }
    }

    /// The engine says that it is over, or in doubt.
    pub(super) fn ends(&mut self, state: State) {
        let facts = self;
        match state {
            State::Completed => assert!(facts.gone, "{facts:?}"),
            State::InDoubt => assert!(facts.commits > 0 && !facts.resume_ordered, "{facts:?}"),
            _ => assert!(
                !facts.stop_ordered || facts.resume_ordered || facts.released,
                "the guest was left stopped: {facts:?}"
            ),
        }
        facts.finished = state != State::InDoubt;
        facts.doubted |= state == State::InDoubt;
    }
}
