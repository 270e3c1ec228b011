//! The source's transition table: which message is legal in which phase, and where each phase leads.
#![allow(clippy::unwrap_used)]

mod doubt;
mod growth;
mod postcopy;

use std::time::Duration;

use super::{Input, Mode, Options, Output, Populated, Resolution, Setup, Source};
use crate::engine::encoding::policy::Compress;
use crate::engine::event::{Report, State};
use crate::engine::journal::{Outcome, Postcopy, Record};
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
        ram: Vec::new(),
        direct_io: false,
        data_channels: 1,
        fixed_downtime: Duration::from_millis(10),
        options: Options {
            downtime_limit: Duration::from_millis(300),
            bandwidth_limit: None,
            background_limit: Some(1 << 20),
            compress: Compress::Off,
            max_rounds: 10,
            timeout: None,
            mode: Mode::Precopy,
            throttle: false,
            verify: false,
            quit_source: true,
            channels: None,
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
        reason: String::new(),
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
                scanned(Populated::NotAsked),
            ],
        ),
        (
            "Commit",
            vec![
                Input::Unchanged,
                Input::GuestStopped,
                scanned(Populated::NothingTaken),
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
fn limits_may_change_until_the_guest_is_handed_over() {
    let change = super::Change {
        downtime_limit: Some(Duration::from_millis(5)),
        bandwidth_limit: Some(None),
    };
    for steps in 0..=path().len() {
        let (mut source, _) = after(steps);
        let before = phase(&source);
        source.handle(NOW.after(Duration::from_millis(60)), Input::Change(change));
        let decided = outputs(&mut source)
            .into_iter()
            .find_map(|output| match output {
                Output::Decided(decided) => Some(decided.is_ok()),
                _ => None,
            });
        let taken = ["Greeting", "Attaching", "Round"].contains(&before.as_str());
        assert_eq!(decided, Some(taken), "{before}");
        assert_eq!(phase(&source), before);
        let limit = source.core.setup.options.downtime_limit;
        assert_eq!(limit == Duration::from_millis(5), taken, "{before}");
    }
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
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
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

#[test]
fn a_restarted_daemon_does_what_its_journal_says() {
    let mut back = Source::recover(setup(), Outcome::NotHere, Postcopy::No, NOW);
    assert_eq!(outputs(&mut back), [Output::ResumeGuest, Output::Detach]);
    back.handle(NOW, Input::GuestResumed);
    assert!(
        matches!(outputs(&mut back).last(), Some(Output::Finished(f)) if f.state == State::Failed)
    );

    let mut gone = Source::recover(setup(), Outcome::Here, Postcopy::No, NOW);
    assert_eq!(outputs(&mut gone), [Output::Journal(Record::GuestMoved)]);
    gone.handle(NOW, Input::Journaled(Record::GuestMoved));
    let outputs = outputs(&mut gone);
    // Whose word it was, the journal does not say: QEMU is kept.
    assert!(!outputs.contains(&Output::QuitGuest) && sent(&outputs).is_empty());
}

#[test]
fn a_guest_that_went_with_its_qemu_is_said_to_run_nowhere() {
    let mut source = Source::recover(setup(), Outcome::NotHere, Postcopy::No, NOW);
    outputs(&mut source);
    source.handle(NOW, Input::GuestLost);
    let Some(Output::Finished(end)) = outputs(&mut source).pop() else {
        panic!("it ends");
    };
    let failure = end.failure.unwrap();
    assert_eq!((end.state, failure.fault), (State::Failed, Fault::Qemu));
    assert!(failure.what.contains("runs nowhere") && !failure.remedy.contains("cont"));
}

#[test]
fn page_digests_are_asked_for_once() {
    let mut setup = setup();
    setup.options.verify = true;
    let mut source = Source::new(setup, Time(0));
    let mut now = NOW;
    // Up to the last round being in place.
    let inputs: Vec<Input> = path().into_iter().take(4).flat_map(|(_, i)| i).collect();
    for input in inputs.into_iter().take(11) {
        now = now.after(Duration::from_millis(6));
        source.handle(now, input);
    }
    outputs(&mut source);
    let differs = || Input::Message(Message::ChunkDiffers { block: 0, chunk: 1 });
    source.handle(now, differs());
    let asked = outputs(&mut source);
    assert_eq!(asked, [Output::PageDigests { block: 0, chunk: 1 }]);
    source.handle(now, differs());
    assert_eq!(
        aborts_with(&outputs(&mut source)),
        Some(AbortCode::Protocol)
    );
}

/// It answers pings, and says neither that the round is in place nor anything else.
#[test]
fn a_destination_that_only_keeps_the_connection_up_is_blamed() {
    let (mut source, _) = after(2);
    let mut now = NOW;
    while phase(&source) == "Round" {
        now = now.after(Duration::from_secs(1));
        source.handle(now, Input::Message(Message::Pong { nonce: 0 }));
        assert!(now.since(NOW) < Duration::from_secs(60), "never given up");
    }
    let end = outputs(&mut source)
        .into_iter()
        .find_map(|output| match output {
            Output::Finished(end) => end.failure,
            _ => None,
        });
    assert!(
        end.as_ref()
            .is_some_and(|f| f.fault == Fault::PeerHost && f.what.contains("confirm")),
        "{end:?}"
    );
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
        reason: String::new(),
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

#[test]
fn what_qemu_saves_during_the_last_scan_goes_when_the_scan_is_over() {
    let (mut source, _) = after(3);
    source.handle(NOW, Input::Unchanged);
    source.handle(NOW, Input::GuestStopped);
    assert!(outputs(&mut source).contains(&Output::SaveDeviceState));
    let state = bytes::Bytes::from_static(b"state");
    for input in [Input::DeviceState(state.clone()), Input::DeviceStateSaved] {
        source.handle(NOW, input);
        assert_eq!(outputs(&mut source), [], "`Stopped` goes first");
    }
    let scanned = Input::Scanned {
        dirty: Vec::new(),
        populated: Populated::NothingTaken,
        took: Duration::ZERO,
    };
    source.handle(NOW, scanned);
    let asked = outputs(&mut source);
    let messages = asked.iter().filter_map(|output| match output {
        Output::Send(message) => Some(message.clone()),
        _ => None,
    });
    let whole = Message::DeviceStateEnd {
        bytes: 5,
        crc: crc32c::crc32c(b"state"),
    };
    let stopped = Message::Stopped { final_round: 1 };
    assert!(messages.eq([stopped, Message::DeviceState(state), whole]));
    assert!(asked.contains(&Output::Journal(Record::CommitIntent)));
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
