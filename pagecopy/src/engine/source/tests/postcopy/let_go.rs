//! How a source lets go of the memory that it serves: by its operator's word, or by what the destination answers.

use super::*;

/// It dials with growing pauses, at once when the operator says so; the operator alone may let go.
#[test]
fn a_destination_that_is_away_is_dialled_until_the_operator_lets_go() {
    let mut source = serving();
    let mut now = NOW.after(Duration::from_secs(2));
    source.handle(now, lost());
    assert_eq!(source.state(), State::Paused);
    outputs(&mut source);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let next = source.poll_timeout().unwrap();
        pauses.push(next.since(now).as_millis());
        now = next;
        source.handle(now, Input::Tick);
        assert!(outputs(&mut source).contains(&Output::ConnectAll));
        source.handle(now, Input::ReconnectFailed("no route".into()));
        outputs(&mut source);
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    source.handle(now, Input::Recover);
    let asked = outputs(&mut source);
    assert!(asked.contains(&Output::ConnectAll), "{asked:?}");
    source.handle(now, Input::Reconnected);
    assert_eq!(sent(&outputs(&mut source)), ["Serve"]);
    source.handle(now, Input::Message(Message::Resumed));
    assert_eq!(source.state(), State::Migrating);

    // It may come back: only a fenced word counts, and only if nobody is there then.
    source.handle(now, lost());
    source.handle(
        now,
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
    );
    let refusal = |asked: &[Output]| {
        asked.iter().find_map(|output| match output {
            Output::Decided(Err(failure)) => Some(failure.clone()),
            _ => None,
        })
    };
    let refused = refusal(&outputs(&mut source)).unwrap();
    assert!(refused.what.contains("8192 bytes"), "{refused:?}");
    assert!(refused.remedy.contains("--peer-fenced"), "{refused:?}");
    let fenced = || Input::Resolve(Resolution::Abandon { peer_fenced: true });
    source.handle(now, fenced());
    let asked = outputs(&mut source);
    assert!(asked.contains(&Output::ConnectAll), "{asked:?}");
    source.handle(now, Input::ReconnectRefused("full".into()));
    let refused = refusal(&outputs(&mut source)).unwrap();
    assert!(refused.what.contains("is there"), "{refused:?}");
    // An attempt that is older than the word says nothing.
    let next = source.poll_timeout().unwrap();
    source.handle(next, Input::Tick);
    source.handle(next, fenced());
    outputs(&mut source);
    source.handle(next, Input::ReconnectFailed("no route".into()));
    let asked = outputs(&mut source);
    assert!(asked.contains(&Output::ConnectAll), "{asked:?}");
    source.handle(next, Input::ReconnectFailed("no route".into()));
    let record = released(&outputs(&mut source)).unwrap();
    let Record::Released { failure: Some(why) } = &record else {
        panic!("{record:?}");
    };
    assert!(why.what.contains("8192 bytes"), "{why:?}");
    assert!(why.remedy.contains("Do not resume"), "{why:?}");
    source.handle(now, Input::Journaled(record));
    assert_eq!(source.state(), State::Failed);
    let end = outputs(&mut source);
    assert!(!end.contains(&Output::QuitGuest));
    let failure = end.iter().find_map(|output| match output {
        Output::Finished(finished) => finished.failure.clone(),
        _ => None,
    });
    let failure = failure.unwrap();
    assert!(failure.what.contains("lacked 8192 bytes"), "{failure:?}");
    assert!(failure.remedy.contains("Do not resume"), "{failure:?}");
}

/// Its host died with the guest before it had recorded that it runs, and its operator has said there that it never will.
#[test]
fn a_guest_that_never_will_run_at_the_destination_is_let_go_of_and_kept() {
    let mut source = serving();
    let now = NOW.after(Duration::from_secs(2));
    let answer = |standing| {
        let id = setup().id;
        Input::Message(Message::Answer { id, standing })
    };
    let again = |source: &mut Source| {
        let next = source.poll_timeout().unwrap();
        source.handle(next, Input::Tick);
        source.handle(next, Input::Reconnected);
        assert_eq!(sent(&outputs(source)).last(), Some(&"Serve"));
        next
    };
    source.handle(now, lost());
    let next = again(&mut source);
    source.handle(next, answer(Standing::Committed));
    assert_eq!(source.state(), State::Paused);
    let next = again(&mut source);
    source.handle(next, answer(Standing::Aborted));
    let record = released(&outputs(&mut source)).unwrap();
    assert!(matches!(record, Record::Released { failure: Some(_) }));
    source.handle(next, Input::Journaled(record));
    let asked = outputs(&mut source);
    // Nobody knows whether it ran there: it is neither run nor ended.
    assert!(!asked.contains(&Output::ResumeGuest) && !asked.contains(&Output::QuitGuest));
    assert_eq!(source.state(), State::Failed);
}

/// Who is there and has forgotten everything is not in the way of the operator's word; who has not, is.
#[test]
fn a_destination_that_answers_decides_about_the_operators_word() {
    let fenced = Resolution::Abandon { peer_fenced: true };
    for (answer, let_go) in [
        (Some(Standing::NoJournal), true),
        (Some(Standing::Committed), false),
        (Some(Standing::Running), false),
        (Some(Standing::Foreign), false),
        (None, false),
    ] {
        let mut source = serving();
        let now = NOW.after(Duration::from_secs(2));
        source.handle(now, lost());
        source.handle(now, Input::Resolve(fenced));
        source.handle(now, Input::Reconnected);
        outputs(&mut source);
        source.handle(
            now,
            match answer {
                Some(standing) => {
                    let id = setup().id;
                    Input::Message(Message::Answer { id, standing })
                }
                None => Input::Message(Message::Resumed),
            },
        );
        let asked = outputs(&mut source);
        let decided = asked.iter().find_map(|output| match output {
            Output::Decided(decided) => Some(decided.is_ok()),
            _ => None,
        });
        assert_eq!(decided, Some(let_go), "{answer:?}: {asked:?}");
        assert_eq!(released(&asked).is_some(), let_go, "{answer:?}: {asked:?}");
    }
}

/// Nothing is lost by letting go of what is not there.
#[test]
fn memory_that_is_lost_already_is_let_go_of_without_a_word() {
    let mut source = serving();
    source.handle(NOW, lost());
    source.handle(NOW, Input::MemoryLost);
    source.handle(
        NOW,
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
    );
    assert!(released(&outputs(&mut source)).is_some());
}

/// The same where there is no memory to serve, and the driver has only said so: the answer ends what nothing else would.
#[test]
fn a_guest_that_has_ended_is_let_go_of_by_a_source_without_its_memory() {
    let ended = || Input::GuestEnded {
        reason: "beta: QEMU has ended".into(),
    };
    let mut away = serving();
    away.handle(NOW.after(Duration::from_secs(2)), lost());
    let doubt = Source::recover(setup_of(Mode::Postcopy), Outcome::Open, Postcopy::Open, NOW);
    for mut source in [away, doubt] {
        outputs(&mut source);
        source.handle(NOW, ended());
        if phase(&source) == "Moved" {
            assert_eq!(outputs(&mut source), [Output::Journal(Record::GuestMoved)]);
            source.handle(NOW, Input::Journaled(Record::GuestMoved));
        }
        let record = released(&outputs(&mut source)).unwrap();
        let Record::Released { failure: Some(why) } = &record else {
            panic!("{record:?}");
        };
        assert_eq!(why.fault, Fault::Qemu);
        assert!(why.what.ends_with("beta: QEMU has ended"), "{why:?}");
        assert!(why.remedy.contains("start the guest anew"), "{why:?}");
        source.handle(NOW, Input::Journaled(record));
        let asked = outputs(&mut source);
        assert!(!asked.contains(&Output::ResumeGuest) && !asked.contains(&Output::QuitGuest));
        assert_eq!(source.state(), State::Failed);
    }
    // Of a guest that comes with all of its memory nothing of the kind is heard.
    let mut other = Source::recover(setup(), Outcome::Open, Postcopy::No, NOW);
    outputs(&mut other);
    other.handle(NOW, ended());
    assert_eq!(outputs(&mut other), []);
}
