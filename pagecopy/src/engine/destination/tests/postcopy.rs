//! Post-copy at the destination: what must come before what, and what the operator may do about pages that never come.

use std::time::Duration;

use super::*;
use crate::engine::bitmap::Bitmap;
use crate::engine::event::{FaultFigures, PostcopyCost, Report, Switch};

mod lost;

/// Everything is here.
const WHOLE: Record = Record::Whole { failure: None };

/// Of what nobody waits for: said by the source, and kept for a daemon that is started anew.
const LIMIT: u64 = 1 << 20;

fn armed_input() -> Input {
    Input::Armed {
        pid: 1,
        inside: vec![7],
        ram: Vec::new(),
    }
}

fn lacking(words: Vec<u64>) -> Input {
    let (block, first) = (0, 64);
    Input::Message(Message::Lacking {
        block,
        first,
        words,
    })
}

fn lacking_end(pages: u64) -> Input {
    Input::Message(Message::LackingEnd {
        pages,
        background: LIMIT,
        sent: 0,
    })
}

fn barrier(channel: u16) -> Input {
    Input::Barrier {
        channel: ChannelId(channel),
        round: 0,
        zero_bytes: 0,
    }
}

fn device_state() -> [Input; 2] {
    let bytes = Bytes::from_static(b"state");
    let crc = crc32c::crc32c(&bytes);
    [
        Input::Message(Message::DeviceState(bytes)),
        Input::Message(Message::DeviceStateEnd { bytes: 5, crc }),
    ]
}

fn whole() -> Input {
    Input::Whole { faults: some() }
}

/// Page faults that are no others.
fn some() -> FaultFigures {
    FaultFigures {
        faults: 5,
        ..FaultFigures::default()
    }
}

fn lacks(bytes: u64) -> Input {
    let faults = FaultFigures::default();
    Input::Lacks { bytes, faults }
}

/// A destination with two data channels that is told in this order what comes.
fn told(inputs: impl IntoIterator<Item = Input>) -> (Destination, Vec<Output>) {
    let mut setup = setup(vec![ram("a", 8), ram("b", 4)]);
    setup.data_channels = 2;
    let mut destination = Destination::new(setup, NOW);
    let hello = hello(vec![ram("a", 8), ram("b", 4)]);
    let before = [
        Input::Message(hello),
        Input::Prepared,
        Input::Message(Message::Stopped { final_round: 0 }),
    ];
    for input in before.into_iter().chain(inputs) {
        destination.handle(NOW, input);
    }
    let outputs = outputs(&mut destination);
    (destination, outputs)
}

fn armed() -> Record {
    Record::Armed {
        pid: 1,
        ram: Vec::new(),
        inside: vec![7],
        blocks: vec![ram("a", 8), ram("b", 4)],
        background: Some(LIMIT),
        switched: Some(Switch {
            sent_bytes: 0,
            lacking_bytes: 2 * 4096,
        }),
    }
}

/// Two pages lack, and everything is ready but that page faults wait.
fn arming() -> (Destination, Vec<Output>) {
    let [state, end] = device_state();
    told([
        lacking(vec![5]),
        lacking_end(2),
        state,
        end,
        barrier(1),
        barrier(2),
    ])
}

/// The guest is about to run.
fn committing() -> Destination {
    let (mut destination, _) = arming();
    for input in [
        armed_input(),
        Input::Journaled(armed()),
        Input::DeviceStateLoaded,
        Input::Message(Message::Commit),
    ] {
        destination.handle(NOW, input);
    }
    assert_eq!(phase(&destination), "Committing");
    outputs(&mut destination);
    destination
}

fn starting() -> Destination {
    let mut destination = committing();
    destination.handle(NOW, Input::Journaled(Record::Committed));
    assert_eq!(phase(&destination), "Starting");
    outputs(&mut destination);
    destination
}

fn fetching() -> Destination {
    let mut destination = starting();
    destination.handle(NOW, Input::GuestRunning);
    assert_eq!(phase(&destination), "Fetching");
    outputs(&mut destination);
    destination
}

fn paused() -> Destination {
    let mut destination = fetching();
    let lost = Failure::new(Fault::Network, "cut", "");
    destination.handle(NOW, Input::LinkLost(lost));
    assert_eq!(outputs(&mut destination)[0], Output::StopPulling);
    destination
}

fn sent(outputs: &[Output]) -> Vec<&'static str> {
    let name = |output: &Output| match output {
        Output::Send(message) => Some(message.name()),
        _ => None,
    };
    outputs.iter().filter_map(name).collect()
}

#[test]
fn qemu_loads_only_when_page_faults_wait_and_that_is_on_disk() {
    let (mut destination, asked) = arming();
    let mut expected = Bitmap::new(&[ram("a", 8), ram("b", 4)]);
    for first in [64, 66] {
        let run = Run {
            block: BlockId(0),
            first,
            pages: 1,
        };
        expected.insert(run).unwrap();
    }
    assert!(asked.contains(&Output::Arm {
        lacking: expected,
        background: Some(LIMIT),
    }));
    assert!(!asked.contains(&Output::LoadDeviceState));
    destination.handle(NOW, armed_input());
    assert_eq!(outputs(&mut destination), [Output::Journal(armed())]);
    destination.handle(NOW, Input::Journaled(armed()));
    assert_eq!(outputs(&mut destination), [Output::LoadDeviceState]);
}

/// Nothing orders the barriers against the control channel: what is armed is armed when both are there.
#[test]
fn nothing_is_armed_before_the_last_barrier_and_the_last_word_of_what_lacks() {
    let arms = |inputs: Vec<Input>| {
        let (_, outputs) = told(inputs);
        outputs
            .iter()
            .any(|output| matches!(output, Output::Arm { .. }))
    };
    assert!(!arms(vec![barrier(1), barrier(2), lacking(vec![1])]));
    assert!(!arms(vec![lacking(vec![1]), lacking_end(1), barrier(1)]));
    assert!(arms(vec![
        barrier(1),
        lacking(vec![1]),
        barrier(2),
        lacking_end(1)
    ]));
    assert!(arms(vec![lacking_end(0), barrier(1), barrier(2)]));
}

#[test]
fn what_lacks_is_said_once_and_in_its_place() {
    let [state, end] = device_state();
    let empty = Input::Message(Message::DeviceStateEnd { bytes: 0, crc: 0 });
    for offence in [
        vec![lacking(vec![1]), lacking_end(2)],
        vec![lacking_end(0), lacking_end(0)],
        vec![lacking_end(0), lacking(vec![1])],
        vec![state.clone(), lacking(vec![1])],
        vec![state.clone(), end, lacking_end(0)],
        vec![empty.clone(), lacking_end(0)],
        vec![lacking(vec![1]), state],
        vec![lacking(vec![1]), empty],
        vec![Input::Message(Message::Lacking {
            block: 2,
            first: 0,
            words: vec![1],
        })],
        vec![Input::Message(Message::Lacking {
            block: 0,
            first: 2048 - 64,
            words: vec![0, 1],
        })],
        vec![Input::Message(Message::Lacking {
            block: 0,
            first: 1,
            words: vec![1],
        })],
    ] {
        let (_, outputs) = told(offence.clone());
        assert_eq!(
            aborts_with(&outputs),
            Some(AbortCode::Protocol),
            "{offence:?}"
        );
    }
}

/// A small guest lacks nothing any more before it has run for a moment.
#[test]
fn a_guest_that_is_whole_before_it_runs_ends_at_once() {
    let mut early = starting();
    early.handle(NOW, whole());
    early.handle(NOW, Input::GuestRunning);
    assert_eq!(
        outputs(&mut early)
            .into_iter()
            .filter(|output| !matches!(output, Output::Report(_)))
            .collect::<Vec<_>>(),
        [
            Output::Send(Message::Running),
            Output::Journal(Record::Running),
            Output::Journal(WHOLE)
        ]
    );
    let (mut earlier, _) = arming();
    for input in [
        armed_input(),
        whole(),
        Input::Journaled(armed()),
        Input::DeviceStateLoaded,
        Input::Message(Message::Commit),
        Input::Journaled(Record::Committed),
        Input::GuestRunning,
    ] {
        earlier.handle(NOW, input);
    }
    assert!(outputs(&mut earlier).contains(&Output::Journal(WHOLE)));
}

/// Pauses count; what comes behind the end does not.
#[test]
fn the_source_and_people_are_told_what_it_cost() {
    let at = |seconds| NOW.after(Duration::from_secs(seconds));
    let mut destination = fetching();
    let cut = Failure::new(Fault::Network, "cut", "");
    destination.handle(at(2), Input::LinkLost(cut));
    destination.handle(at(5), Input::Served);
    destination.handle(at(6), lacks(4096));
    destination.handle(at(7), whole());
    destination.handle(at(9), Input::Journaled(WHOLE));
    let cost = outputs(&mut destination)
        .into_iter()
        .find_map(|output| match output {
            Output::Send(Message::Whole { cost, .. }) => Some(cost),
            _ => None,
        });
    let expected = PostcopyCost {
        faults: some(),
        postcopy_us: 7_000_000,
        paused_us: 3_000_000,
    };
    assert_eq!(cost, Some(Some(expected)));
    destination.handle(at(10), Input::Message(Message::Closed));
    destination.handle(at(11), Input::Journaled(Record::Closed));
    let Some(Output::Finished { figures, .. }) = outputs(&mut destination).pop() else {
        panic!()
    };
    assert_eq!(figures.faults, Some(some()));
    let times = [figures.postcopy_ms, figures.paused_ms];
    assert_eq!(times, [Some(7000.0), Some(3000.0)]);
}

#[test]
fn the_source_is_told_only_when_it_is_on_disk() {
    let mut destination = fetching();
    destination.handle(NOW, whole());
    assert_eq!(outputs(&mut destination), [Output::Journal(WHOLE)]);
    destination.handle(NOW, Input::Journaled(WHOLE));
    assert_eq!(sent(&outputs(&mut destination)), ["Whole"]);
    destination.handle(NOW, Input::Message(Message::Closed));
    destination.handle(NOW, Input::Journaled(Record::Closed));
    assert_eq!(destination.state(), State::Completed);
}

#[test]
fn a_source_that_comes_again_is_fetched_from_on() {
    let mut destination = paused();
    assert_eq!(destination.state(), State::Paused);
    assert!(destination.takes_serve() && !arming().0.takes_serve());
    destination.handle(NOW, Input::Served);
    let asked = outputs(&mut destination);
    assert_eq!(sent(&asked), ["Resumed", "Running"]);
    assert!(asked.contains(&Output::Pull));
    assert_eq!(destination.state(), State::Migrating);
}

/// While it is carried out, a source that comes is not fetched from; when it fails, it is.
#[test]
fn giving_up_what_lacks_and_fetching_it_do_not_mix() {
    let poison = Input::Poison { peer_fenced: true };
    let mut destination = paused();
    destination.handle(NOW, poison);
    assert_eq!(outputs(&mut destination).last(), Some(&Output::Poison));
    destination.handle(NOW, Input::Served);
    assert_eq!(outputs(&mut destination), []);
    let mut fails = destination;
    let failure = Failure::new(Fault::ThisHost, "no", "");
    fails.handle(NOW, Input::HostFailed(failure));
    let asked = outputs(&mut fails);
    assert!(matches!(asked[0], Output::Decided(Err(_))), "{asked:?}");
    assert!(asked.contains(&Output::Pull) && sent(&asked) == ["Resumed"]);
}

/// Whoever had it poisoned hears what became of the guest.
#[test]
fn a_guest_that_touches_what_it_has_lost_ends_and_the_operator_hears_it() {
    let mut destination = paused();
    destination.handle(NOW, Input::Poison { peer_fenced: true });
    outputs(&mut destination);
    let gone = Failure::new(Fault::Qemu, "QEMU is gone", "");
    destination.handle(NOW, Input::QemuFailed(gone));
    let asked = outputs(&mut destination);
    let [
        Output::Decided(Err(failure)),
        Output::Journal(Record::Whole { failure: Some(_) }),
    ] = &asked[..]
    else {
        panic!("{asked:?}");
    };
    assert!(failure.what.contains("a memory error"), "{failure:?}");
}

/// The source may be away: what it is told when it comes is in the journal.
#[test]
fn a_guest_that_ended_with_its_qemu_is_recorded_so() {
    for mut destination in [paused(), fetching()] {
        let connected = destination.state() == State::Migrating;
        let gone = Failure::new(Fault::Qemu, "QEMU is gone", "");
        destination.handle(NOW, Input::QemuFailed(gone));
        let asked = outputs(&mut destination);
        let [Output::Journal(record)] = &asked[..] else {
            panic!("{asked:?}");
        };
        let Record::Whole { failure: Some(why) } = record else {
            panic!("{record:?}");
        };
        assert!(why.what.contains("QEMU is gone"), "{why:?}");
        // A disk that refuses it is given the same again.
        let full = Failure::new(Fault::ThisHost, "the disk is full", "");
        destination.handle(NOW, Input::JournalFailed(record.clone(), full));
        outputs(&mut destination);
        let again = destination.poll_timeout().unwrap();
        destination.handle(again, Input::Tick);
        assert_eq!(outputs(&mut destination), [Output::Journal(record.clone())]);
        destination.handle(again, Input::Journaled(record.clone()));
        let told = sent(&outputs(&mut destination));
        assert_eq!(told, if connected { vec!["Abort"] } else { vec![] });
        if connected {
            destination.handle(again, Input::Message(Message::Closed));
            destination.handle(again, Input::Journaled(Record::Closed));
        }
        assert_eq!(destination.state(), State::Failed);
    }
}

/// The operator hears how much would be lost, also when the source went before anything was fetched.
#[test]
fn a_refusal_names_the_bytes_that_lack() {
    let refused = |destination: &mut Destination| {
        destination.handle(NOW, Input::Poison { peer_fenced: false });
        let asked = outputs(destination);
        asked.into_iter().find_map(|output| match output {
            Output::Decided(Err(failure)) => Some(failure.what),
            _ => None,
        })
    };
    let text = refused(&mut paused()).unwrap();
    assert!(text.contains("8192 bytes"), "{text}");
    let mut later = starting();
    later.handle(NOW, lacks(4096));
    later.handle(NOW, Input::GuestRunning);
    let lost = Failure::new(Fault::Network, "cut", "");
    later.handle(NOW, Input::LinkLost(lost));
    outputs(&mut later);
    let text = refused(&mut later).unwrap();
    assert!(text.contains("4096 bytes"), "{text}");
}

#[test]
fn before_commit_everything_may_end_and_after_it_a_lost_link_is_a_pause() {
    let lost = || Input::LinkLost(Failure::new(Fault::Network, "cut", ""));
    let (mut before, _) = arming();
    before.handle(NOW, lost());
    assert!(outputs(&mut before).contains(&Output::Journal(Record::Aborted)));
    let mut after = starting();
    after.handle(NOW, lost());
    assert_eq!(outputs(&mut after), [Output::StopPulling]);
    after.handle(NOW, Input::GuestRunning);
    assert_eq!(after.state(), State::Paused);
}

/// Its journal would send a source that comes again away for good.
#[test]
fn a_disk_that_refuses_the_end_is_tried_again_until_the_source_has_let_go() {
    let refused = || {
        let full = Failure::new(Fault::ThisHost, "the disk is full", "");
        Input::JournalFailed(WHOLE, full)
    };
    let lost = || Input::LinkLost(Failure::new(Fault::Network, "cut", ""));
    let mut destination = fetching();
    destination.handle(NOW, whole());
    outputs(&mut destination);
    destination.handle(NOW, refused());
    assert_eq!(sent(&outputs(&mut destination)), ["Whole"]);
    destination.handle(NOW, lost());
    assert_eq!(outputs(&mut destination), []);
    let mut comes_again = destination;
    let next = comes_again.poll_timeout().unwrap();
    comes_again.handle(next, Input::Tick);
    assert_eq!(outputs(&mut comes_again), [Output::Journal(WHOLE)]);
    comes_again.handle(next, refused());
    outputs(&mut comes_again);
    assert!(comes_again.takes_serve());
    comes_again.handle(next, Input::Served);
    assert_eq!(sent(&outputs(&mut comes_again)), ["Whole"]);
    comes_again.handle(next, Input::Message(Message::Closed));
    let full = Failure::new(Fault::ThisHost, "the disk is full", "");
    comes_again.handle(next, Input::JournalFailed(Record::Closed, full));
    assert_eq!(comes_again.state(), State::Completed);
}

/// QEMU may wait for a page that lacks before it can say that the guest runs.
#[test]
fn a_guest_that_is_being_started_is_fetched_for() {
    let mut destination = starting();
    outputs(&mut destination);
    destination.handle(
        NOW,
        Input::LinkLost(Failure::new(Fault::Network, "cut", "")),
    );
    assert_eq!(outputs(&mut destination), [Output::StopPulling]);
    assert!(destination.takes_serve());
    destination.handle(NOW, Input::Served);
    let served = outputs(&mut destination);
    assert!(served.contains(&Output::Send(Message::Resumed)) && served.contains(&Output::Pull));
    destination.handle(NOW, Input::GuestRunning);
    assert!(outputs(&mut destination).contains(&Output::Send(Message::Running)));
    assert_eq!(destination.state(), State::Migrating);
}

/// The source is told why, and nothing of post-copy is taken from it.
#[test]
fn a_destination_that_cannot_says_why_when_it_accepts() {
    let mut setup = setup(vec![ram("a", 8)]);
    setup.data_channels = 2;
    setup.postcopy = Err(Failure::new(Fault::ThisHost, "no device", "open it"));
    let mut destination = Destination::new(setup, NOW);
    destination.handle(NOW, Input::Message(hello(vec![ram("a", 8)])));
    destination.handle(NOW, Input::Prepared);
    let outputs = outputs(&mut destination);
    let accept = Message::Accept {
        version: VERSION_MAX,
        capabilities: crate::wire::capability::VERIFY
            | Encodings::ALL.bits()
            | crate::wire::capability::CHANNELS,
        host: "beta".into(),
        reason: "no device; what to do: open it".into(),
    };
    assert!(outputs.contains(&Output::Send(accept)), "{outputs:?}");
    destination.handle(NOW, lacking(vec![5]));
    assert_eq!(phase(&destination), "Aborting");
}
