//! The destination's transition table: which message is legal in which phase, and where each phase leads.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;

use super::{Destination, Input, Output, Setup};
use crate::engine::encoding::Encodings;
use crate::engine::event::{Figures, State};
use crate::engine::journal::Record;
use crate::engine::{ChannelId, Failure, Fault, MigrationId, Time, Timeouts};
use crate::memory::{BlockId, BlockSpec, Run};
use crate::wire::{AbortCode, Message, Standing, VERSION_MAX, tests::one_of_each};

mod channels;
mod postcopy;

const NOW: Time = Time(1);

fn ram(name: &str, mib: u64) -> BlockSpec {
    BlockSpec {
        name: name.into(),
        size: mib << 20,
        page_size: 4096,
    }
}

fn setup(blocks: Vec<BlockSpec>) -> Setup {
    Setup {
        id: MigrationId([3; 16]),
        postcopy: Ok(()),
        host: "beta".into(),
        vm: "guest".into(),
        blocks,
        data_channels: 1,
        timeouts: Timeouts::default(),
    }
}

fn hello(blocks: Vec<BlockSpec>) -> Message {
    Message::Hello {
        version_min: 1,
        version_max: VERSION_MAX + 3,
        capabilities: u64::MAX,
        id: MigrationId([3; 16]),
        vm: "guest".into(),
        host: "alpha".into(),
        verify: false,
        blocks,
    }
}

/// What leads from each phase to the next, in the undisturbed case.
fn path() -> Vec<(&'static str, Vec<Input>)> {
    let bytes = Bytes::from_static(b"state");
    let crc = crc32c::crc32c(&bytes);
    vec![
        (
            "Preparing",
            vec![Input::Message(hello(vec![ram("a", 8), ram("b", 4)]))],
        ),
        ("Receive", vec![Input::Prepared]),
        (
            "Loading",
            vec![
                Input::Message(Message::Stopped { final_round: 0 }),
                Input::Barrier {
                    channel: ChannelId(1),
                    round: 0,
                    zero_bytes: 0,
                },
                Input::Message(Message::DeviceState(bytes)),
                Input::Message(Message::DeviceStateEnd { bytes: 5, crc }),
            ],
        ),
        ("Loaded", vec![Input::DeviceStateLoaded]),
        ("Committing", vec![Input::Message(Message::Commit)]),
        ("Starting", vec![Input::Journaled(Record::Committed)]),
        ("Running", vec![Input::GuestRunning]),
        (
            "Running",
            vec![
                Input::Journaled(Record::Running),
                Input::Message(Message::Closed),
            ],
        ),
        ("Ended", vec![Input::Journaled(Record::Closed)]),
    ]
}

fn outputs(destination: &mut Destination) -> Vec<Output> {
    std::iter::from_fn(|| destination.poll()).collect()
}

fn phase(destination: &Destination) -> String {
    let debug = format!("{:?}", destination.phase);
    debug.split(['(', ' ']).next().unwrap().to_owned()
}

/// A destination that has gone the first `steps` of the path.
fn after(steps: usize) -> Destination {
    let mut destination = Destination::new(setup(vec![ram("b", 4), ram("a", 8)]), NOW);
    for (name, inputs) in path().into_iter().take(steps) {
        for input in inputs {
            destination.handle(NOW, input);
        }
        assert_eq!(phase(&destination), name);
    }
    outputs(&mut destination);
    destination
}

fn aborts_with(outputs: &[Output]) -> Option<AbortCode> {
    outputs.iter().find_map(|output| match output {
        Output::Send(Message::Abort { code, .. }) => Some(*code),
        _ => None,
    })
}

#[test]
fn the_path_ends_completed() {
    let mut destination = Destination::new(setup(vec![ram("b", 4), ram("a", 8)]), NOW);
    for (_, inputs) in path() {
        for input in inputs {
            destination.handle(NOW, input);
        }
    }
    let outputs = outputs(&mut destination);
    assert!(outputs.contains(&Output::Prepare {
        order: vec![1, 0],
        encodings: Encodings::ALL,
    }));
    let sent: Vec<&str> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::Send(message) => Some(message.name()),
            _ => None,
        })
        .collect();
    assert_eq!(sent, ["Accept", "BarrierReached", "Loaded", "Running"]);
    let last = Output::Finished {
        state: State::Completed,
        failure: None,
        qemu_used: true,
        figures: Figures::default(),
    };
    assert_eq!(outputs.last(), Some(&last));
}

/// A row a phase. What is not named is answered with `Abort(Protocol)`. `Ping`, `Pong` and `Abort` are legal always.
#[test]
fn only_these_messages_are_legal_before_commit() {
    let table: [(&str, &[&str]); 5] = [
        ("Greeting", &["Hello"]),
        ("Preparing", &[]),
        ("Receive", &["Populate", "Stopped", "AddChannels"]),
        ("Loading", &[]),
        ("Loaded", &["Commit"]),
    ];
    for (steps, (name, legal)) in table.iter().enumerate() {
        for message in one_of_each() {
            // These must fit the guest of this test; the golden samples do not.
            let message = match message {
                Message::Hello { .. } => hello(vec![ram("a", 8), ram("b", 4)]),
                Message::Stopped { .. } => Message::Stopped { final_round: 0 },
                other => other,
            };
            let mut destination = after(steps);
            assert_eq!(phase(&destination), *name);
            let always = matches!(
                message,
                Message::Ping { .. } | Message::Pong { .. } | Message::Abort { .. }
            );
            let expected = always || legal.contains(&message.name());
            let what = message.name();
            destination.handle(NOW, Input::Message(message));
            let refused = aborts_with(&outputs(&mut destination)) == Some(AbortCode::Protocol);
            assert_eq!(refused, !expected, "{what} in {name}");
        }
    }
}

#[test]
fn nothing_that_the_peer_says_after_commit_ends_it() {
    for steps in 5..8 {
        for message in one_of_each()
            .into_iter()
            .filter(|message| *message != Message::Closed)
        {
            let mut destination = after(steps);
            let before = phase(&destination);
            destination.handle(NOW, Input::Message(message.clone()));
            assert_eq!(phase(&destination), before, "{}", message.name());
            assert_eq!(aborts_with(&outputs(&mut destination)), None);
        }
    }
}

#[test]
fn memory_that_differs_is_refused_with_both_figures() {
    let cases = [
        (
            vec![ram("a", 8)],
            "the destination has a RAMBlock \"b\", the source has none",
        ),
        (
            vec![ram("a", 8), ram("b", 4), ram("c", 4)],
            "RAMBlock \"c\", the destination has only [\"b\", \"a\"]",
        ),
        (
            vec![ram("a", 9), ram("b", 4)],
            "RAMBlock \"a\" has a size of 9437184 bytes at the source and of 8388608 bytes at the destination",
        ),
        (
            vec![
                ram("a", 8),
                BlockSpec {
                    page_size: 2 << 20,
                    ..ram("b", 4)
                },
            ],
            "RAMBlock \"b\" has a page size of 2097152 bytes at the source and of 4096 bytes",
        ),
    ];
    for (blocks, expected) in cases {
        let mut destination = after(0);
        destination.handle(NOW, Input::Message(hello(blocks)));
        let outputs = outputs(&mut destination);
        assert_eq!(aborts_with(&outputs), Some(AbortCode::MemoryMismatch));
        assert!(
            format!("{outputs:?}").replace('\\', "").contains(expected),
            "{outputs:?}"
        );
    }
}

#[test]
fn a_range_of_versions_that_does_not_meet_ours_is_refused() {
    for (min, max, code) in [
        (
            VERSION_MAX + 1,
            VERSION_MAX + 9,
            Some(AbortCode::Incompatible),
        ),
        (0, 0, Some(AbortCode::Incompatible)),
        (2, 1, Some(AbortCode::Protocol)),
        (0, VERSION_MAX, None),
    ] {
        let mut greeting = hello(vec![ram("a", 8), ram("b", 4)]);
        if let Message::Hello {
            version_min,
            version_max,
            ..
        } = &mut greeting
        {
            (*version_min, *version_max) = (min, max);
        }
        let mut destination = after(0);
        destination.handle(NOW, Input::Message(greeting));
        assert_eq!(
            aborts_with(&outputs(&mut destination)),
            code,
            "{min} to {max}"
        );
    }
}

#[test]
fn what_is_outside_the_guest_is_refused() {
    let outside = Run {
        block: BlockId(1),
        first: 1024,
        pages: 1,
    };
    let offences = [
        Input::Message(Message::Populate(vec![outside])),
        Input::Message(Message::Stopped { final_round: 5 }),
        Input::Barrier {
            channel: ChannelId(2),
            round: 0,
            zero_bytes: 0,
        },
        Input::Barrier {
            channel: ChannelId(1),
            round: 1,
            zero_bytes: 0,
        },
        Input::PeerMisbehaved("a write outside its region".into()),
    ];
    for offence in offences {
        let mut destination = after(2);
        let what = format!("{offence:?}");
        destination.handle(NOW, offence);
        assert_eq!(
            aborts_with(&outputs(&mut destination)),
            Some(AbortCode::Protocol),
            "{what}"
        );
    }
}

#[test]
fn device_state_that_arrived_changed_is_refused() {
    for (bytes, crc) in [(5, 0), (4, crc32c::crc32c(b"state"))] {
        let mut destination = after(2);
        for message in [
            Message::Stopped { final_round: 0 },
            Message::DeviceState(Bytes::from_static(b"state")),
            Message::DeviceStateEnd { bytes, crc },
        ] {
            destination.handle(NOW, Input::Message(message));
        }
        assert_eq!(
            aborts_with(&outputs(&mut destination)),
            Some(AbortCode::Protocol)
        );
    }
}

#[test]
fn the_last_barriers_may_overtake_stopped_and_none_may_follow() {
    let barrier = |round| Input::Barrier {
        channel: ChannelId(1),
        round,
        zero_bytes: 0,
    };
    let mut destination = after(2);
    destination.handle(NOW, barrier(0));
    destination.handle(NOW, Input::Message(Message::Stopped { final_round: 0 }));
    assert_eq!(aborts_with(&outputs(&mut destination)), None);
    destination.handle(NOW, barrier(1));
    assert_eq!(
        aborts_with(&outputs(&mut destination)),
        Some(AbortCode::Protocol)
    );
}

#[test]
fn the_first_barriers_may_overtake_populate() {
    let mut destination = after(2);
    let barrier = Input::Barrier {
        channel: ChannelId(1),
        round: 0,
        zero_bytes: 0,
    };
    destination.handle(NOW, barrier);
    outputs(&mut destination);
    let run = Run {
        block: BlockId(0),
        first: 3,
        pages: 4,
    };
    destination.handle(NOW, Input::Message(Message::Populate(vec![run])));
    assert_eq!(outputs(&mut destination), [Output::Allocate(vec![run])]);
}

#[test]
fn a_late_commit_is_refused_for_good() {
    let mut destination = after(4);
    destination.handle(NOW, Input::Cancel);
    assert_eq!(
        aborts_with(&outputs(&mut destination)),
        Some(AbortCode::Cancelled)
    );
    destination.handle(NOW, Input::Message(Message::Commit));
    assert_eq!(
        aborts_with(&outputs(&mut destination)),
        Some(AbortCode::Aborted)
    );
}

#[test]
fn after_commit_the_peer_hears_of_an_abort_only_when_it_is_on_disk() {
    let mut destination = after(5);
    let full = Failure::new(Fault::ThisHost, "the disk is full", "");
    destination.handle(NOW, Input::JournalFailed(Record::Committed, full));
    assert_eq!(
        outputs(&mut destination),
        [Output::Journal(Record::Aborted)]
    );
    destination.handle(NOW, Input::Journaled(Record::Aborted));
    assert_eq!(
        aborts_with(&outputs(&mut destination)),
        Some(AbortCode::Host)
    );
}

#[test]
fn standings_are_the_sources_to_hear() {
    let answer = Message::Answer {
        id: MigrationId([3; 16]),
        standing: Standing::Running,
    };
    let mut destination = after(4);
    destination.handle(NOW, Input::Message(answer));
    assert_eq!(
        aborts_with(&outputs(&mut destination)),
        Some(AbortCode::Protocol)
    );
}
