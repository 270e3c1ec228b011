//! What only the in-process network does: virtual time, chance by seed, torn pages, cuts and silence.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::channel::{Channel, Event, Op, Token};
use crate::error::Error;
use crate::mem::{Faults, MemChannel, Network};
use crate::region::{Access, Extent, Region, RegionId, Regions};

const REGION: RegionId = RegionId(1);
const LEN: u64 = 1 << 20;

fn end() -> (Regions, Region) {
    let regions = Regions::new();
    let region = Region::anonymous(1 << 20).unwrap();
    regions.register(
        REGION,
        region.clone(),
        Access {
            peer_writes: true,
            peer_reads: true,
        },
    );
    (regions, region)
}

fn write(channel: &mut MemChannel, token: u64, offset: u64, len: u64) {
    let extents = vec![Extent { offset, len }];
    channel
        .submit(
            Token(token),
            Op::Write {
                region: REGION,
                extents,
            },
        )
        .unwrap();
}

fn poll(channel: &mut MemChannel) -> Option<Event> {
    channel.poll(Some(Duration::ZERO)).unwrap()
}

/// Runs until nothing is left to happen, and returns the times of all steps.
fn run(network: &Network) -> Vec<u64> {
    let mut times = Vec::new();
    while let Some(at) = network.next_event() {
        network.advance_to(at);
        times.push(at);
        assert!(times.len() < 100_000, "it comes to an end");
    }
    times
}

#[test]
fn the_seed_decides_everything() {
    let times = |seed| {
        let network = Network::new(seed, Faults::default());
        let ((a, _), (b, _)) = (end(), end());
        let (mut left, mut right) = network.pair(&a, &b);
        write(&mut left, 1, 0, LEN);
        write(&mut right, 1, 0, LEN);
        run(&network)
    };
    assert_eq!(times(5), times(5));
    assert_ne!(times(5), times(6));
}

#[test]
fn a_page_that_changes_meanwhile_arrives_torn() {
    let network = Network::new(
        1,
        Faults {
            piece: 512,
            ..Faults::default()
        },
    );
    let ((a, from), (b, to)) = (end(), end());
    let (mut left, _right) = network.pair(&a, &b);
    from.copy_in(0, &[1; 4096]);
    write(&mut left, 1, 0, 4096);
    // Some of its pieces have left when the guest writes all of the page.
    for _ in 0..4 {
        network.advance_to(network.next_event().unwrap());
    }
    from.copy_in(0, &[2; 4096]);
    run(&network);
    let mut got = [0; 4096];
    to.copy_out(0, &mut got);
    assert!(got.contains(&1) && got.contains(&2), "old and new bytes");
}

#[test]
fn sent_comes_before_arrival() {
    let faults = Faults {
        delay_min: 1_000,
        delay_max: 1_000_000,
        ..Faults::default()
    };
    let network = Network::new(3, faults);
    let ((a, from), (b, to)) = (end(), end());
    let (mut left, _right) = network.pair(&a, &b);
    from.copy_in(0, &[1; 4096]);
    write(&mut left, 1, 0, 4096);
    while poll(&mut left).is_none() {
        network.advance_to(network.next_event().unwrap());
    }
    let mut got = [9];
    to.copy_out(0, &mut got);
    assert_eq!(got, [0], "sent, and still on its way");
}

#[test]
fn speed_is_limited() {
    let faults = Faults {
        delay_min: 0,
        delay_max: 0,
        bytes_per_second: Some(1 << 20),
        piece: 4096,
    };
    let network = Network::new(1, faults);
    let ((a, _), (b, _)) = (end(), end());
    let (mut left, _right) = network.pair(&a, &b);
    write(&mut left, 1, 0, LEN);
    let last = *run(&network).last().unwrap();
    // The last piece of 256 leaves when those before it have had their time.
    assert!((990_000_000..1_010_000_000).contains(&last), "{last}");
}

#[test]
fn a_cut_is_seen_at_both_ends_and_new_channels_are_sound() {
    let network = Network::new(1, Faults::default());
    let ((a, from), (b, to)) = (end(), end());
    let (mut left, mut right) = network.pair(&a, &b);
    from.copy_in(0, &[1; 4096]);
    write(&mut left, 1, 0, 4096);
    network.cut();
    run(&network);
    for channel in [&mut left, &mut right] {
        assert!(matches!(channel.poll(None), Err(Error::Io { .. })));
    }
    let mut got = [9; 4096];
    to.copy_out(0, &mut got);
    assert_eq!(got, [0; 4096], "what was on its way is lost");
    let (mut left, _right) = network.pair(&a, &b);
    write(&mut left, 2, 0, 4096);
    run(&network);
    assert_eq!(poll(&mut left), Some(Event::Sent(Token(2))));
    to.copy_out(0, &mut got);
    assert_eq!(got, [1; 4096]);
}

#[test]
fn in_a_blackhole_nothing_arrives_and_nobody_is_told() {
    let network = Network::new(1, Faults::default());
    let ((a, _), (b, _)) = (end(), end());
    let (mut left, mut right) = network.pair(&a, &b);
    network.blackhole(true);
    left.submit(Token(1), Op::Send(vec![1].into())).unwrap();
    // The buffers fill: at some point nothing leaves any more.
    for token in 2..30 {
        write(&mut left, token, 0, LEN);
    }
    run(&network);
    network.advance_to(60_000_000_000);
    assert_eq!(poll(&mut right), None);
    let sent = std::iter::from_fn(|| poll(&mut left)).count();
    assert!(
        (4..=6).contains(&sent),
        "the message and about 4 MiB: {sent}"
    );
    network.blackhole(false);
    run(&network);
    assert_eq!(poll(&mut right), Some(Event::Message(vec![1].into())));
    assert_eq!(std::iter::from_fn(|| poll(&mut left)).count() + sent, 29);
}
