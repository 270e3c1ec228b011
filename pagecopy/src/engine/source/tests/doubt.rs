//! In doubt: what the destination's answers and the operator's decisions lead to.

use super::*;
use crate::wire::Standing;

/// In doubt, with a connection and a question.
fn asking() -> Source {
    let mut source = Source::recover(setup(), Outcome::Open, Postcopy::No, NOW);
    let begun = outputs(&mut source);
    assert!(
        matches!(&begun[..], [.., Output::Finished(f), Output::Connect] if f.state == State::InDoubt)
    );
    source.handle(NOW, Input::Reconnected);
    assert_eq!(sent(&outputs(&mut source)), ["Query"]);
    source
}

fn answer(standing: Standing) -> Input {
    Input::Message(Message::Answer { id: ID, standing })
}

#[test]
fn an_answer_decides() {
    let mut source = asking();
    source.handle(NOW, answer(Standing::Running));
    assert_eq!(outputs(&mut source), [Output::Journal(Record::GuestMoved)]);

    let mut source = asking();
    source.handle(NOW, answer(Standing::Aborted));
    let rolled_back = outputs(&mut source);
    assert_eq!(
        rolled_back,
        [
            Output::ResumeGuest,
            Output::Journal(Record::RolledBack),
            Output::Detach
        ]
    );

    for standing in [
        Standing::Unknown,
        Standing::Committed,
        Standing::NoJournal,
        Standing::Foreign,
    ] {
        let mut source = asking();
        source.handle(NOW, answer(standing));
        assert!(
            matches!(outputs(&mut source)[..], [Output::Report(_)]),
            "{standing:?}"
        );
        let again = source.poll_timeout().unwrap();
        source.handle(again, Input::Tick);
        assert_eq!(sent(&outputs(&mut source)), ["Query"], "asked again");
    }
}

/// It crosses the question that an operator's wish has brought about, say: the connection was idle for too long.
#[test]
fn a_destination_that_ends_a_connection_is_not_fenced() {
    for resolution in [
        Resolution::ResumeHere { peer_fenced: true },
        Resolution::Abandon { peer_fenced: false },
    ] {
        let mut source = asking();
        source.handle(NOW, Input::Resolve(resolution));
        assert_eq!(outputs(&mut source), []);
        let abort = Message::Abort {
            code: AbortCode::TimedOut,
            reason: "no question has come for too long".into(),
        };
        source.handle(NOW, Input::Message(abort.clone()));
        assert!(
            matches!(&outputs(&mut source)[..], [Output::Decided(Err(_))]),
            "{resolution:?}"
        );
        // Who does not answer at all may be. What comes when that is decided changes nothing of it.
        source.handle(NOW, Input::Resolve(resolution));
        outputs(&mut source);
        source.handle(NOW, Input::Tick);
        source.handle(NOW, Input::ReconnectFailed("no route".into()));
        let granted = outputs(&mut source);
        assert!(
            granted.contains(&Output::Journal(match resolution {
                Resolution::Abandon { .. } => Record::GuestMoved,
                _ => Record::TakenBack,
            })),
            "{granted:?}"
        );
        source.handle(NOW, Input::Message(abort));
        assert_eq!(outputs(&mut source), [], "{resolution:?}");
    }
}

fn cut() -> Input {
    Input::LinkLost(Failure::new(Fault::Network, "cut", ""))
}

/// It lets the source in and then goes, or says nothing for as long as one waits, or turns it away.
#[test]
fn a_destination_that_is_there_and_does_not_answer_is_not_fenced() {
    for resolution in [FENCED, Resolution::Abandon { peer_fenced: false }] {
        let refused = |ends: &dyn Fn(&mut Source)| {
            let mut source = unanswered();
            source.handle(NOW, Input::Resolve(resolution));
            assert_eq!(outputs(&mut source), [Output::Connect]);
            ends(&mut source);
            let told = outputs(&mut source);
            assert!(
                matches!(decided(&told), Some(Err(why)) if why.what.contains("pagecopyd is there")),
                "{resolution:?}: {told:?}"
            );
            assert_eq!(phase(&source), "InDoubt");
            assert!(source.poll_timeout().is_some(), "it is asked on");
        };
        refused(&|source| {
            source.handle(NOW, Input::Reconnected);
            source.handle(NOW, cut());
        });
        refused(&|source| {
            source.handle(NOW, Input::Reconnected);
            source.handle(NOW.after(setup().timeouts.silence), Input::Tick);
        });
        refused(&|source| source.handle(NOW, Input::ReconnectRefused("too many channels".into())));
    }
}

/// The host may have been fenced since: only what is tried now can tell.
#[test]
fn a_connection_that_is_older_than_the_operators_wish_says_nothing() {
    for idle in [false, true] {
        let mut source = asking();
        if idle {
            source.handle(NOW, answer(Standing::Unknown));
        }
        source.handle(NOW, Input::Resolve(FENCED));
        source.handle(NOW, Input::Tick);
        outputs(&mut source);
        let later = NOW.after(setup().timeouts.silence);
        source.handle(later, Input::Tick);
        assert_eq!(outputs(&mut source), [Output::Connect], "idle: {idle}");
        source.handle(later, Input::ReconnectFailed("no route".into()));
        assert!(outputs(&mut source).contains(&Output::Journal(Record::TakenBack)));
    }
}

#[test]
fn an_answer_about_another_migration_decides_nothing() {
    let mut source = asking();
    let other = Message::Answer {
        id: MigrationId([4; 16]),
        standing: Standing::Aborted,
    };
    source.handle(NOW, Input::Message(other));
    assert_eq!(outputs(&mut source), []);
}

/// In doubt, with nobody there.
fn unanswered() -> Source {
    let mut source = asking();
    source.handle(NOW, cut());
    outputs(&mut source);
    source
}

const FENCED: Resolution = Resolution::ResumeHere { peer_fenced: true };

fn decided(outputs: &[Output]) -> Option<&Result<String, Failure>> {
    outputs.iter().find_map(|output| match output {
        Output::Decided(result) => Some(result),
        _ => None,
    })
}

#[test]
fn a_decision_makes_the_source_ask_now_and_a_question_on_its_way_is_waited_for() {
    let mut source = unanswered();
    source.handle(NOW, Input::Resolve(FENCED));
    assert_eq!(
        outputs(&mut source),
        [Output::Connect],
        "not at the next back-off"
    );
    source.handle(NOW, Input::Reconnected);
    assert_eq!(sent(&outputs(&mut source)), ["Query"]);

    let mut source = asking();
    source.handle(NOW, Input::Resolve(FENCED));
    assert_eq!(outputs(&mut source), []);
    source.handle(
        NOW,
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
    );
    let second = outputs(&mut source);
    assert!(
        matches!(decided(&second), Some(Err(why)) if why.what.contains("another decision")),
        "{second:?}"
    );
    source.handle(NOW, answer(Standing::Committed));
    let refused = outputs(&mut source);
    assert!(matches!(decided(&refused), Some(Err(_))) && !refused.contains(&Output::ResumeGuest));
    assert_eq!(phase(&source), "InDoubt");
}

#[test]
fn an_operators_decision_is_recorded_first_and_nobody_is_asked_meanwhile() {
    for no_answer in [
        Input::ReconnectFailed("no route".into()),
        Input::Reconnected,
    ] {
        let mut source = unanswered();
        source.handle(NOW, Input::Resolve(FENCED));
        source.handle(NOW, no_answer.clone());
        if matches!(no_answer, Input::Reconnected) {
            source.handle(NOW, answer(Standing::NoJournal));
        }
        let asked = outputs(&mut source);
        assert!(
            asked.contains(&Output::Journal(Record::TakenBack)),
            "{asked:?}"
        );
        assert!(!asked.contains(&Output::ResumeGuest) && decided(&asked).is_none());
        // The disk is slow. A question now would make a destination that is there after all run the guest.
        assert_eq!(source.poll_timeout(), None);
        let later = NOW.after(Duration::from_secs(3600));
        source.handle(later, Input::Tick);
        assert_eq!(outputs(&mut source), []);
        source.handle(later, Input::Journaled(Record::TakenBack));
        let taken = outputs(&mut source);
        assert!(matches!(decided(&taken), Some(Ok(_))), "{taken:?}");
        assert!(taken.contains(&Output::ResumeGuest) && sent(&taken).is_empty());
        source.handle(later, Input::GuestResumed);
        assert!(
            matches!(outputs(&mut source).last(), Some(Output::Finished(f)) if f.state == State::Failed)
        );
        source.handle(
            later,
            Input::Resolve(Resolution::Abandon { peer_fenced: false }),
        );
        assert!(matches!(decided(&outputs(&mut source)), Some(Err(_))));
    }
}

#[test]
fn a_destination_that_runs_the_guest_is_heard_while_the_decision_is_recorded() {
    let mut source = unanswered();
    source.handle(NOW, Input::Resolve(FENCED));
    source.handle(NOW, Input::Reconnected);
    source.handle(NOW, answer(Standing::NoJournal));
    outputs(&mut source);
    source.handle(NOW, Input::Message(Message::Running));
    source.handle(NOW, Input::Journaled(Record::TakenBack));
    let asked = outputs(&mut source);
    assert!(matches!(decided(&asked), Some(Err(_))), "{asked:?}");
    assert!(asked.contains(&Output::Journal(Record::GuestMoved)));
    assert!(!asked.contains(&Output::ResumeGuest));
}

#[test]
fn without_the_word_silence_is_no_reason_to_take_the_guest_back() {
    let mut source = unanswered();
    source.handle(
        NOW,
        Input::Resolve(Resolution::ResumeHere { peer_fenced: false }),
    );
    source.handle(NOW, Input::ReconnectFailed("no route".into()));
    let asked = outputs(&mut source);
    let Some(Err(why)) = decided(&asked) else {
        panic!("{asked:?}")
    };
    assert!(why.what.contains("two would run") && why.remedy.contains("--peer-fenced"));
    assert!(
        !asked
            .iter()
            .any(|o| matches!(o, Output::Journal(_) | Output::ResumeGuest))
    );
    assert!(source.poll_timeout().is_some(), "it is asked on");
}

#[test]
fn a_guest_let_go_of_by_a_word_alone_is_kept_stopped() {
    let mut source = unanswered();
    source.handle(
        NOW,
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
    );
    source.handle(NOW, Input::ReconnectFailed("no route".into()));
    let asked = outputs(&mut source);
    assert!(
        asked.contains(&Output::Journal(Record::GuestMoved)),
        "{asked:?}"
    );
    source.handle(NOW, Input::Journaled(Record::GuestMoved));
    let ended = outputs(&mut source);
    assert!(!ended.contains(&Output::QuitGuest) && !ended.contains(&Output::ResumeGuest));
    assert!(matches!(ended.last(), Some(Output::Finished(f)) if f.state == State::Completed));
}

#[test]
fn a_decision_that_cannot_be_recorded_is_not_acted_upon() {
    let mut source = unanswered();
    source.handle(NOW, Input::Resolve(FENCED));
    source.handle(NOW, Input::ReconnectFailed("no route".into()));
    outputs(&mut source);
    let full = Failure::new(Fault::ThisHost, "the disk is full", "");
    source.handle(NOW, Input::JournalFailed(Record::TakenBack, full));
    let refused = outputs(&mut source);
    assert!(matches!(decided(&refused), Some(Err(_))) && !refused.contains(&Output::ResumeGuest));
    assert_eq!(
        (phase(&source).as_str(), source.state()),
        ("InDoubt", State::InDoubt)
    );
    assert!(source.poll_timeout().is_some(), "it is asked on");
}

#[test]
fn answers_that_were_not_asked_for_are_not_told() {
    let mut source = asking();
    source.handle(NOW, answer(Standing::Unknown));
    assert_eq!(outputs(&mut source).len(), 1, "the one that was asked for");
    for _ in 0..100 {
        source.handle(NOW, answer(Standing::Unknown));
        source.handle(NOW, answer(Standing::Committed));
    }
    assert_eq!(outputs(&mut source), []);
    source.handle(NOW, answer(Standing::Running));
    assert_eq!(
        outputs(&mut source),
        [Output::Journal(Record::GuestMoved)],
        "one that decides is taken at any time"
    );
}
