//! Data channels that come and go, as the source's engine sees to it: in which phase, and what is owed on a channel that has just come.

use super::*;
use crate::engine::channels::Bounds;
use crate::engine::source::{ChannelLoad, Load};
use crate::wire::{Secret, capability};

const KEY: Secret = Secret([4; 32]);
const TENTH: Duration = Duration::from_millis(100);
/// The first channel that comes beside the two that there are.
const FIRST: u16 = 3;

struct Growing {
    source: Source,
    now: Time,
    looks: u32,
}

impl Growing {
    /// In round 0, with all of its pages to send.
    fn begin(capabilities: u64) -> Growing {
        let mut setup = setup();
        setup.data_channels = 2;
        setup.options.channels = Some(Bounds { least: 1, most: 8 });
        let source = Source::new(setup, Time(0));
        let mut growing = Growing {
            source,
            now: NOW,
            looks: 0,
        };
        growing.handle(Input::Message(Message::Accept {
            version: 1,
            capabilities,
            host: "beta".into(),
            reason: String::new(),
        }));
        let all = Run {
            block: BlockId(0),
            first: 0,
            pages: 2048,
        };
        growing.handle(Input::Attached {
            stopped: Duration::ZERO,
            populated: vec![all],
        });
        growing
    }

    fn handle(&mut self, input: Input) -> Vec<Output> {
        self.source.handle(self.now, input);
        outputs(&mut self.source)
    }

    /// A tenth of a second, in which the channels were busy and so many bytes left each.
    fn measure(&mut self, bytes: u64) -> Vec<Output> {
        self.now = self.now.after(TENTH);
        self.looks += 1;
        let channels = (1..=2).map(|number| ChannelLoad {
            channel: ChannelId(number),
            sent: bytes * u64::from(self.looks),
            busy: TENTH * self.looks,
            held: Duration::ZERO,
            cpu: Duration::ZERO,
        });
        let channels = channels.collect();
        self.handle(Input::Measured(Load {
            channels,
            idle: None,
        }))
    }

    /// Until more are wanted.
    fn wants_more(&mut self) -> u16 {
        for _ in 0..20 {
            let outputs = self.measure(10_000_000);
            let opened = outputs.iter().find_map(|output| match output {
                Output::OpenChannels { first, channels } => Some((*first, *channels)),
                _ => None,
            });
            if let Some((first, channels)) = opened {
                assert_eq!(first, FIRST);
                return channels;
            }
        }
        panic!("none are wanted");
    }

    /// All that is under way has gone, and what follows it.
    fn send_all(&mut self, mut pushes: Vec<Output>) -> Vec<Output> {
        let mut seen = Vec::new();
        while let Some(push) = pushes.pop() {
            if let Output::Push { channel, batch } = push {
                let bytes = batch.runs.iter().map(|run| run.pages * 4096).sum();
                let pushed = super::super::Pushed {
                    raw_bytes: bytes,
                    ..super::super::Pushed::default()
                };
                let batch = batch.id;
                pushes.extend(self.handle(Input::Pushed {
                    channel,
                    batch,
                    pushed,
                }));
            } else {
                seen.push(push);
            }
        }
        seen
    }
}

const ALL: u64 = capability::VERIFY | capability::CHANNELS;

fn taken(taken: bool) -> Input {
    Input::Message(Message::ChannelsTaken {
        first: FIRST,
        taken,
        reason: "no core".into(),
    })
}

fn opened() -> Input {
    Input::ChannelsOpened {
        first: FIRST,
        key: KEY,
    }
}

#[test]
fn more_are_opened_added_and_used_in_this_order() {
    let mut growing = Growing::begin(ALL);
    assert!(growing.source.measures());
    let channels = growing.wants_more();
    let added = growing.handle(opened());
    let add = Message::AddChannels {
        first: FIRST,
        channels,
        key: KEY,
    };
    assert_eq!(added, [Output::Send(add)]);
    let used = growing.handle(taken(true));
    assert_eq!(used[0], Output::UseChannels { first: FIRST });
    let told = |output: &Output| matches!(output, Output::Report(Report::Channels { channels: 3, decision }) if decision.contains("1 more"));
    assert!(used.iter().any(told), "{used:?}");
    assert_eq!(used.len(), 2, "no barrier is owed: {used:?}");
}

#[test]
fn one_that_comes_while_a_round_is_closed_owes_its_barrier() {
    let mut growing = Growing::begin(ALL);
    let mut pushes: Vec<Output> = Vec::new();
    growing.wants_more();
    growing.handle(opened());
    // What was put under way at first: at most so many batches, on either channel.
    for id in 1..=8 {
        for channel in [1, 2] {
            pushes.extend(growing.handle(Input::Pushed {
                channel: ChannelId(channel),
                batch: id,
                pushed: super::super::Pushed::default(),
            }));
        }
    }
    let closed = growing.send_all(pushes);
    let barrier = |channel| Output::SendOn(ChannelId(channel), Message::Barrier { round: 0 });
    assert!(
        closed.contains(&barrier(1)) && closed.contains(&barrier(2)),
        "{closed:?}"
    );
    let used = growing.handle(taken(true));
    assert!(used.contains(&barrier(3)), "{used:?}");
    // Not once the round is over.
    growing.handle(Input::Message(Message::BarrierReached { round: 0 }));
    assert_eq!(growing.source.core.closing, None);
}

#[test]
fn what_does_not_come_is_no_failure() {
    for (what, answer) in [
        (
            "refused",
            vec![Input::ChannelsRefused {
                first: FIRST,
                reason: "no route".into(),
            }],
        ),
        ("not taken", vec![opened(), taken(false)]),
    ] {
        let mut growing = Growing::begin(ALL);
        growing.wants_more();
        let outputs: Vec<Output> = answer
            .into_iter()
            .flat_map(|input| growing.handle(input))
            .collect();
        assert_eq!(phase(&growing.source), "Round", "{what}");
        let told = |output: &Output| matches!(output, Output::Report(Report::Channels { channels: 2, decision }) if decision.starts_with("no more"));
        assert!(outputs.iter().any(told), "{what}: {outputs:?}");
        let closed = outputs.contains(&Output::CloseChannels { first: FIRST });
        assert_eq!(closed, what == "not taken", "{outputs:?}");
    }
}

#[test]
fn an_answer_that_nobody_asked_for_is_an_offence() {
    let mut growing = Growing::begin(ALL);
    let outputs = growing.handle(taken(true));
    assert_eq!(aborts_with(&outputs), Some(AbortCode::Protocol));
    // Nor before they were asked to be taken.
    let mut growing = Growing::begin(ALL);
    growing.wants_more();
    let outputs = growing.handle(taken(true));
    assert_eq!(aborts_with(&outputs), Some(AbortCode::Protocol));
}

#[test]
fn one_fewer_says_leave_and_carries_nothing_more() {
    let mut growing = Growing::begin(ALL);
    let channels = growing.wants_more();
    growing.handle(opened());
    growing.handle(taken(true));
    assert_eq!((channels, growing.source.core.sender.count()), (1, 3));
    // Nothing more leaves with it than without.
    let mut left = Vec::new();
    for _ in 0..20 {
        left.extend(growing.measure(10_000_000));
        if growing.source.core.sender.count() == 2 {
            break;
        }
    }
    let leave = Output::SendOn(ChannelId(FIRST), Message::Leave { round: 0 });
    assert!(left.contains(&leave), "{left:?}");
    assert_eq!(growing.source.core.sender.count(), 2);
}

#[test]
fn the_number_is_fixed_where_the_other_side_cannot_or_nobody_wants_it() {
    let growing = Growing::begin(capability::VERIFY);
    assert!(!growing.source.measures());
    assert!(!after(2).0.measures());
    let mut growing = Growing::begin(ALL);
    growing.wants_more();
    // Once the guest is to go first none is added any more.
    growing.source.core.cut = true;
    let outputs = growing.handle(opened());
    assert_eq!(outputs, [Output::CloseChannels { first: FIRST }]);
}
