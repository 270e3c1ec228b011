//! The source's transition table: which message is legal in which phase, and where each phase leads.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::{Input, Options, Output, Resolution, Setup, Source};
use crate::engine::event::State;
use crate::engine::journal::{Outcome, Record};
use crate::engine::{ChannelId, Failure, Fault, MigrationId, Time, Timeouts};
use crate::memory::{BlockId, BlockSpec, Run};
use crate::wire::{AbortCode, Message, Standing, tests::one_of_each};

const ID: MigrationId = MigrationId([3; 16]);
/// Later than the pause between two scans.
const NOW: Time = Time(1_000_000_000);

fn setup() -> Setup {
    Setup {
        id: ID,
        vm: "guest".into(),
        host: "alpha".into(),
        blocks: vec![BlockSpec {
            name: "ram".into(),
            size: 8 << 20,
            page_size: 4096,
        }],
        direct_io: false,
        data_channels: 1,
        fixed_downtime: Duration::from_millis(10),
        options: Options {
            downtime_limit: Duration::from_millis(300),
            bandwidth_limit: None,
            max_rounds: 10,
            timeout: None,
            verify: false,
            quit_source: true,
        },
        timeouts: Timeouts::default(),
    }
}

/// What leads from each phase to the next, in the undisturbed case with nothing to send.
fn path() -> Vec<(&'static str, Vec<Input>)> {
    let accept = Message::Accept {
        version: 1,
        capabilities: 1,
        host: "beta".into(),
    };
    let scanned = |populated| Input::Scanned {
        dirty: Vec::new(),
        populated,
        took: Duration::ZERO,
    };
    vec![
        ("Attaching", vec![Input::Message(accept)]),
        (
            "Round",
            vec![Input::Attached {
                stopped: Duration::ZERO,
                populated: Vec::new(),
            }],
        ),
        (
            "Switchover",
            vec![
                Input::Message(Message::BarrierReached { round: 0 }),
                Input::Tick,
                scanned(None),
            ],
        ),
        (
            "Commit",
            vec![
                Input::Unchanged,
                Input::GuestStopped,
                scanned(Some(Vec::new())),
                Input::DeviceState(bytes::Bytes::from_static(b"state")),
                Input::DeviceStateSaved,
                Input::Message(Message::BarrierReached { round: 1 }),
                Input::Message(Message::Loaded),
                Input::Journaled(Record::CommitIntent),
            ],
        ),
        ("Moved", vec![Input::Message(Message::Running)]),
        ("Ended", vec![Input::Journaled(Record::GuestMoved)]),
    ]
}

fn outputs(source: &mut Source) -> Vec<Output> {
    std::iter::from_fn(|| source.poll()).collect()
}

fn phase(source: &Source) -> String {
    let debug = format!("{:?}", source.phase);
    debug.split(['(', ' ']).next().unwrap().to_owned()
}

/// A source that has gone the first `steps` of the path, with what it asked for on the last of them.
fn after(steps: usize) -> (Source, Vec<Output>) {
    let mut source = Source::new(setup(), Time(0));
    let mut asked = outputs(&mut source);
    let mut now = NOW;
    for (name, inputs) in path().into_iter().take(steps) {
        asked.clear();
        for input in inputs {
            now = now.after(Duration::from_millis(6));
            source.handle(now, input);
            asked.extend(outputs(&mut source));
        }
        assert_eq!(phase(&source), name);
    }
    (source, asked)
}

fn sent(outputs: &[Output]) -> Vec<&'static str> {
    let name = |output: &Output| match output {
        Output::Send(message) | Output::SendOn(_, message) => Some(message.name()),
        _ => None,
    };
    outputs
        .iter()
        .filter_map(name)
        .filter(|name| *name != "Ping")
        .collect()
}

fn aborts_with(outputs: &[Output]) -> Option<AbortCode> {
    outputs.iter().find_map(|output| match output {
        Output::Send(Message::Abort { code, .. }) => Some(*code),
        _ => None,
    })
}

fn position(outputs: &[Output], wanted: &Output) -> usize {
    let position = outputs.iter().position(|output| output == wanted);
    position.unwrap_or_else(|| panic!("{wanted:?} is not among {outputs:?}"))
}

#[test]
fn each_step_asks_for_what_it_needs() {
    assert_eq!(sent(&after(0).1), ["Hello"]);
    assert!(after(1).1.contains(&Output::Attach));
    assert_eq!(sent(&after(2).1), ["Barrier"]);
    let (_, switchover) = after(3);
    assert!(switchover.contains(&Output::LookAgain) && !switchover.contains(&Output::StopGuest));
    let (_, switchover) = after(4);
    assert_eq!(
        sent(&switchover),
        [
            "Stopped",
            "Barrier",
            "DeviceState",
            "DeviceStateEnd",
            "Commit"
        ]
    );
    let (_, moved) = after(5);
    assert!(moved.contains(&Output::Journal(Record::GuestMoved)));
    let (_, ended) = after(6);
    assert_eq!(sent(&ended), ["Closed"]);
    assert!(position(&ended, &Output::Detach) < position(&ended, &Output::QuitGuest));
    assert!(matches!(ended.last(), Some(Output::Finished(f)) if f.state == State::Completed));
}

#[test]
fn commit_needs_both_the_answer_and_the_record() {
    let inputs = &path()[3].1;
    for missing in [4, 5, 6, 7] {
        let (mut source, _) = after(3);
        for (index, input) in inputs.iter().enumerate() {
            // Without the end of the device state, or the last barrier, `Loaded` would be a lie.
            let lie = matches!(input, Input::Message(Message::Loaded)) && missing < 6;
            if index != missing && !lie {
                source.handle(NOW.after(Duration::from_millis(20)), input.clone());
            }
        }
        assert!(
            !sent(&outputs(&mut source)).contains(&"Commit"),
            "without {:?}",
            inputs[missing]
        );
        assert_eq!(phase(&source), "Switchover");
    }
}

/// A row a phase. What is not named ends the migration with `Abort(Protocol)`; the guest runs on. `Ping` and `Pong` are
/// legal always, `Abort` ends it without an answer.
#[test]
fn only_these_messages_are_legal_before_commit() {
    let table: [(&str, &[&str]); 4] = [
        ("Greeting", &["Accept"]),
        ("Attaching", &[]),
        ("Round", &["BarrierReached"]),
        ("Switchover", &[]),
    ];
    for (steps, (name, legal)) in table.iter().enumerate() {
        for message in one_of_each() {
            let message = match message {
                Message::BarrierReached { .. } => Message::BarrierReached { round: 0 },
                other => other,
            };
            let (mut source, _) = after(steps);
            // The guest stands still only from the order to stop it on.
            source.handle(NOW, Input::Unchanged);
            outputs(&mut source);
            let always = matches!(
                message,
                Message::Ping { .. } | Message::Pong { .. } | Message::Abort { .. }
            );
            let expected = always || legal.contains(&message.name());
            let what = message.name();
            source.handle(NOW, Input::Message(message));
            let outputs = outputs(&mut source);
            assert_eq!(
                aborts_with(&outputs) == Some(AbortCode::Protocol),
                !expected,
                "{what} in {name}"
            );
            let resumes = outputs.contains(&Output::ResumeGuest);
            assert_eq!(
                resumes,
                *name == "Switchover" && !matches!(what, "Ping" | "Pong"),
                "{what} in {name}"
            );
        }
    }
}

#[test]
fn after_commit_nothing_but_the_peers_abort_or_answer_resumes_the_guest() {
    let failure = || Failure::new(Fault::Network, "something", "");
    let mut inputs: Vec<Input> = one_of_each()
        .into_iter()
        .filter(|message| !matches!(message, Message::Abort { .. }))
        .map(Input::Message)
        .collect();
    inputs.extend([
        Input::Tick,
        Input::Cancel,
        Input::LinkLost(failure()),
        Input::HostFailed(failure()),
        Input::QemuFailed(failure()),
        Input::JournalFailed(Record::CommitIntent, failure()),
        Input::Resolve(Resolution::ResumeHere { peer_fenced: true }),
        Input::Resolve(Resolution::Abandon),
    ]);
    for input in inputs {
        let (mut source, _) = after(4);
        source.handle(NOW, input.clone());
        assert!(
            !outputs(&mut source).contains(&Output::ResumeGuest),
            "{input:?}"
        );
        assert_eq!(aborts_with(&outputs(&mut source)), None, "{input:?}");
    }
    let (mut source, _) = after(4);
    let refused = Message::Abort {
        code: AbortCode::Host,
        reason: "its disk is full".into(),
    };
    source.handle(NOW, Input::Message(refused));
    let outputs = outputs(&mut source);
    assert!(
        position(&outputs, &Output::ResumeGuest)
            < position(&outputs, &Output::Journal(Record::RolledBack))
    );
}

/// In doubt, with a connection and a question.
fn asking() -> Source {
    let mut source = Source::recover(setup(), Outcome::Open, NOW);
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

    for standing in [Standing::Unknown, Standing::Committed, Standing::NoJournal] {
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
    source.handle(
        NOW,
        Input::LinkLost(Failure::new(Fault::Network, "cut", "")),
    );
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
    source.handle(NOW, Input::Resolve(Resolution::Abandon));
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
        source.handle(later, Input::Resolve(Resolution::Abandon));
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
    source.handle(NOW, Input::Resolve(Resolution::Abandon));
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
fn a_restarted_daemon_does_what_its_journal_says() {
    let mut back = Source::recover(setup(), Outcome::NotHere, NOW);
    assert_eq!(outputs(&mut back), [Output::ResumeGuest, Output::Detach]);
    back.handle(NOW, Input::GuestResumed);
    assert!(
        matches!(outputs(&mut back).last(), Some(Output::Finished(f)) if f.state == State::Failed)
    );

    let mut gone = Source::recover(setup(), Outcome::Here, NOW);
    assert_eq!(outputs(&mut gone), [Output::Journal(Record::GuestMoved)]);
    gone.handle(NOW, Input::Journaled(Record::GuestMoved));
    let outputs = outputs(&mut gone);
    assert!(outputs.contains(&Output::QuitGuest) && sent(&outputs).is_empty());
}

#[test]
fn digests_are_asked_for_only_behind_stopped() {
    let mut setup = setup();
    setup.options.verify = true;
    let mut source = Source::new(setup, Time(0));
    let mut now = NOW;
    for input in path()
        .into_iter()
        .take(3)
        .flat_map(|(_, inputs)| inputs)
        .chain([Input::Unchanged, Input::GuestStopped])
    {
        now = now.after(Duration::from_millis(6));
        source.handle(now, input);
    }
    assert!(!outputs(&mut source).contains(&Output::Digest));
    source.handle(now, path()[3].1[2].clone());
    let asked = outputs(&mut source);
    let stopped = Output::Send(Message::Stopped { final_round: 1 });
    assert!(position(&asked, &stopped) < position(&asked, &Output::Digest));
}

#[test]
fn with_direct_io_no_page_is_read_before_the_disk_is_still() {
    let mut setup = setup();
    setup.direct_io = true;
    let mut source = Source::new(setup, Time(0));
    let accept = Message::Accept {
        version: 1,
        capabilities: 1,
        host: "beta".into(),
    };
    source.handle(NOW, Input::Message(accept));
    let populated = vec![Run {
        block: BlockId(0),
        first: 0,
        pages: 9,
    }];
    source.handle(
        NOW,
        Input::Attached {
            stopped: Duration::ZERO,
            populated,
        },
    );
    let before = outputs(&mut source);
    assert!(
        before.contains(&Output::DrainIo)
            && !before.iter().any(|o| matches!(o, Output::Push { .. }))
    );
    source.handle(NOW, Input::IoDrained);
    let pushed: Vec<ChannelId> = outputs(&mut source)
        .into_iter()
        .filter_map(|output| match output {
            Output::Push { channel, .. } => Some(channel),
            _ => None,
        })
        .collect();
    assert_eq!(pushed, [ChannelId(1)]);
}

#[test]
fn what_came_since_the_start_and_is_not_seen_ends_it_before_the_guest_is_stopped() {
    let (mut source, _) = after(3);
    let other = Failure::new(
        Fault::Operator,
        "process 7 has the guest's RAM mapped, too",
        "",
    );
    source.handle(NOW, Input::HostFailed(other));
    let outputs = outputs(&mut source);
    assert!(!outputs.contains(&Output::StopGuest) && !outputs.contains(&Output::ResumeGuest));
    assert!(matches!(outputs.last(), Some(Output::Finished(f)) if f.state == State::Failed));
}

/// QEMU flushes the guest's disks when it stops it, and answers nobody meanwhile.
#[test]
fn a_slow_disk_is_waited_for_at_the_stop_and_blamed_in_the_end() {
    let begun = NOW.after(Duration::from_secs(1));
    let still_there = |source: &mut Source, at: Time| {
        source.handle(at, Input::Message(Message::Pong { nonce: 1 }));
        outputs(source)
    };
    let (mut source, _) = after(3);
    source.handle(begun, Input::Unchanged);
    for seconds in 1..10 {
        let asked = still_there(&mut source, begun.after(Duration::from_secs(seconds)));
        assert!(!asked.contains(&Output::ResumeGuest), "after {seconds} s");
    }
    let mut stopped = source;
    stopped.handle(begun.after(Duration::from_secs(9)), Input::GuestStopped);
    assert!(outputs(&mut stopped).contains(&Output::Scan { holes: true }));

    let (mut source, _) = after(3);
    source.handle(begun, Input::Unchanged);
    let mut asked = Vec::new();
    for seconds in 1..12 {
        asked.extend(still_there(
            &mut source,
            begun.after(Duration::from_secs(seconds)),
        ));
    }
    assert!(asked.contains(&Output::ResumeGuest));
    source.handle(begun.after(Duration::from_secs(12)), Input::GuestResumed);
    let ended = outputs(&mut source);
    let Some(Output::Finished(end)) = ended.last() else {
        panic!("{ended:?}")
    };
    let failure = end.failure.clone().unwrap();
    assert!(failure.what.contains("whose disks"), "{failure:?}");
    assert_eq!(failure.fault, Fault::Qemu);
}
