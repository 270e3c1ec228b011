//! Data channels that come and go, as the destination's engine counts them.

use super::*;
use crate::engine::event::Report;
use crate::wire::Secret;

const KEY: Secret = Secret([4; 32]);

/// One that takes pages over one channel, in round 0.
fn receiving() -> Destination {
    after(2)
}

fn add(first: u16, channels: u16) -> Input {
    Input::Message(Message::AddChannels {
        first,
        channels,
        key: KEY,
    })
}

fn barrier(channel: u16, round: u32) -> Input {
    Input::Barrier {
        channel: ChannelId(channel),
        round,
        zero_bytes: 0,
    }
}

fn left(channel: u16, round: u32) -> Input {
    Input::Left {
        channel: ChannelId(channel),
        round,
    }
}

fn taken(first: u16, refused: Option<&str>) -> Input {
    Input::ChannelsTaken {
        first,
        refused: refused.map(str::to_owned),
    }
}

fn reached(outputs: &[Output]) -> Vec<u32> {
    let round = |output: &Output| match output {
        Output::Send(Message::BarrierReached { round }) => Some(*round),
        _ => None,
    };
    outputs.iter().filter_map(round).collect()
}

fn tell(destination: &mut Destination, inputs: impl IntoIterator<Item = Input>) -> Vec<Output> {
    for input in inputs {
        destination.handle(NOW, input);
    }
    outputs(destination)
}

#[test]
fn the_round_under_way_waits_for_what_joins() {
    let mut destination = receiving();
    let asked = tell(&mut destination, [add(2, 2)]);
    let take = Output::TakeChannels {
        first: 2,
        channels: 2,
        key: KEY,
        round: 0,
    };
    assert_eq!(asked, [take]);
    // Also before it is known whether they are there.
    assert_eq!(reached(&tell(&mut destination, [barrier(1, 0)])), [0; 0]);
    let said = tell(&mut destination, [taken(2, None)]);
    let answer = Message::ChannelsTaken {
        first: 2,
        taken: true,
        reason: String::new(),
    };
    assert_eq!(said[0], Output::Send(answer));
    assert!(
        matches!(
            &said[1],
            Output::Report(Report::Channels { channels: 3, .. })
        ),
        "{said:?}"
    );
    assert_eq!(reached(&tell(&mut destination, [barrier(3, 0)])), [0; 0]);
    assert_eq!(reached(&tell(&mut destination, [barrier(2, 0)])), [0]);
}

#[test]
fn what_is_not_there_is_not_waited_for() {
    let mut destination = receiving();
    tell(&mut destination, [add(2, 1), barrier(1, 0)]);
    let said = tell(&mut destination, [taken(2, Some("no core"))]);
    let answer = Message::ChannelsTaken {
        first: 2,
        taken: false,
        reason: "no core".into(),
    };
    assert_eq!(said[0], Output::Send(answer));
    assert_eq!(reached(&said), [0]);
    assert_eq!(reached(&tell(&mut destination, [barrier(1, 1)])), [1]);
}

#[test]
fn one_that_leaves_brings_the_last_barrier() {
    let mut destination = receiving();
    tell(&mut destination, [add(2, 1), taken(2, None)]);
    assert_eq!(reached(&tell(&mut destination, [left(2, 0)])), [0; 0]);
    assert_eq!(reached(&tell(&mut destination, [barrier(1, 0)])), [0]);
    assert_eq!(reached(&tell(&mut destination, [barrier(1, 1)])), [1]);
    let late = tell(&mut destination, [barrier(2, 2)]);
    assert_eq!(aborts_with(&late), Some(AbortCode::Protocol));
}

#[test]
fn what_breaks_the_rules_is_an_offence() {
    for (what, inputs) in [
        ("a number that there is", vec![add(1, 1)]),
        ("none", vec![add(2, 0)]),
        ("too many", vec![add(2, 64)]),
        ("two at a time", vec![add(2, 1), add(3, 1)]),
        ("the last one leaves", vec![left(1, 0)]),
        (
            "of another round",
            vec![add(2, 1), taken(2, None), left(2, 1)],
        ),
        (
            "after the guest stands still",
            vec![
                Input::Message(Message::Stopped { final_round: 0 }),
                add(2, 1),
            ],
        ),
        (
            "when all is there",
            vec![
                add(2, 1),
                taken(2, None),
                Input::Message(Message::Stopped { final_round: 0 }),
                barrier(1, 0),
                barrier(2, 0),
                left(2, 1),
            ],
        ),
    ] {
        let outputs = tell(&mut receiving(), inputs);
        assert_eq!(aborts_with(&outputs), Some(AbortCode::Protocol), "{what}");
    }
}

#[test]
fn nothing_joins_where_that_was_not_agreed_on() {
    let mut destination = Destination::new(setup(vec![ram("a", 8)]), NOW);
    let Message::Hello {
        id,
        vm,
        host,
        blocks,
        ..
    } = hello(vec![ram("a", 8)])
    else {
        unreachable!("it is one");
    };
    let plain = Message::Hello {
        version_min: 1,
        version_max: 1,
        capabilities: 1,
        id,
        vm,
        host,
        verify: false,
        blocks,
    };
    tell(&mut destination, [Input::Message(plain), Input::Prepared]);
    let outputs = tell(&mut destination, [add(2, 1)]);
    assert_eq!(aborts_with(&outputs), Some(AbortCode::Protocol));
}
