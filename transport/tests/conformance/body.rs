//! What every back end must do: one body, run over each of them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use transport::limits::{MAX_EXTENTS, MAX_MESSAGE, MAX_PAYLOAD, MAX_QUEUED};
use transport::{Access, Error, Event, Extent, Op, RegionId, SubmitError, Token};

use crate::harness::{Harness, Pair, REGION, REGION_LEN, fill, holds, scattered, untouched};

/// Runs all of it.
pub fn all(harness: &dyn Harness) {
    a_message_follows_the_writes_before_it(harness);
    writes_of_all_shapes_arrive(harness);
    messages_of_all_sizes_arrive_in_order(harness);
    reads_fetch_in_order(harness);
    both_directions_at_once(harness);
    wrong_operations_are_refused(harness);
    a_full_queue_gives_the_operation_back(harness);
    access_is_enforced_at_the_receiver(harness);
    a_revoked_region_is_closed(harness);
    the_end_is_seen(harness);
    bytes_are_counted(harness);
    if harness.waits() {
        a_wait_is_bounded(harness);
        a_waker_ends_a_wait(harness);
    }
}

fn a_message_follows_the_writes_before_it(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    for round in 0..20u64 {
        let extents = scattered(round * 4096, 64, 4096, 3 * 4096);
        fill(&pair.a.memory, &extents, round);
        pair.a.write(2 * round, extents.clone());
        pair.a.send(2 * round + 1, round.to_le_bytes().to_vec());
        let wanted = usize::try_from(round).unwrap() + 1;
        pair.until("the message arrives", |p| {
            let arrived = p.b.messages().len() == wanted;
            assert!(
                !arrived || holds(&p.b.memory, &extents, round),
                "the write landed before its message"
            );
            arrived
        });
    }
    pair.until("all is sent", |p| p.a.events.len() == 40);
    let tokens: Vec<Event> = (0..40).map(|n| Event::Sent(Token(n))).collect();
    assert_eq!(pair.a.events, tokens);
}

fn writes_of_all_shapes_arrive(harness: &dyn Harness) {
    let shapes = [
        scattered(5, 1, 1, 1),
        scattered(0, 1, MAX_PAYLOAD, 1),
        scattered(1 << 20, MAX_EXTENTS as u64, 1, 17),
        scattered(4096, MAX_EXTENTS as u64, 4096, 2 * 4096),
        scattered(4096, MAX_EXTENTS as u64, 4096, 4096),
        scattered(REGION_LEN - 10, 1, 10, 1),
        vec![
            Extent {
                offset: 9 << 20,
                len: 3 << 20,
            },
            Extent {
                offset: 2 << 20,
                len: 4096,
            },
        ],
    ];
    let mut pair = Pair::new(harness);
    for (index, extents) in shapes.iter().enumerate() {
        fill(&pair.a.memory, extents, index as u64);
        pair.a.write(index as u64, extents.clone());
        pair.a.send(100, Bytes::from_static(b"."));
        pair.until("the write lands", |p| p.b.messages().len() == index + 1);
        assert!(
            holds(&pair.b.memory, extents, index as u64),
            "shape {index}"
        );
    }
    assert!(
        untouched(
            &pair.b.memory,
            &[Extent {
                offset: 30 << 20,
                len: 1 << 20
            }]
        ),
        "nothing else was written"
    );
}

fn messages_of_all_sizes_arrive_in_order(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let sizes = [
        1,
        2,
        31,
        32,
        33,
        100,
        4096,
        16_384,
        16_385,
        65_536,
        MAX_MESSAGE - 1,
        MAX_MESSAGE,
        1,
        7,
    ];
    let messages: Vec<Bytes> = sizes
        .iter()
        .enumerate()
        .map(|(i, len)| vec![u8::try_from(i).unwrap(); *len].into())
        .collect();
    for (index, message) in messages.iter().enumerate() {
        pair.a.send(index as u64, message.clone());
        pair.b.send(index as u64, message.clone());
    }
    let count = messages.len();
    pair.until("all messages arrive", |p| {
        p.a.messages().len() == count && p.b.messages().len() == count
    });
    assert!(pair.a.messages() == messages && pair.b.messages() == messages);
}

fn reads_fetch_in_order(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let mut wanted = Vec::new();
    for n in 0..MAX_QUEUED as u64 {
        let extents = scattered(n * 65_536, 8, 4096, 8192);
        fill(&pair.b.memory, &extents, 5);
        pair.a.read(n, extents.clone());
        wanted.push(extents);
    }
    pair.until("all is fetched", |p| p.a.events.len() == MAX_QUEUED);
    let events: Vec<Event> = (0..MAX_QUEUED as u64)
        .map(|n| Event::Fetched(Token(n)))
        .collect();
    assert_eq!(pair.a.events, events);
    assert!(
        wanted
            .iter()
            .all(|extents| holds(&pair.a.memory, extents, 5))
    );
    assert!(pair.b.events.is_empty(), "serving reads is no event");
}

fn both_directions_at_once(harness: &dyn Harness) {
    const WRITES: u64 = 48;
    let mut pair = Pair::new(harness);
    let big = scattered(0, MAX_EXTENTS as u64, 8192, 16_384);
    let other = scattered(16 << 20, 1, MAX_PAYLOAD, 1);
    fill(&pair.a.memory, &big, 1);
    fill(&pair.b.memory, &other, 2);
    for n in 0..WRITES {
        pair.a.write(n, big.clone());
        pair.b.write(n, other.clone());
    }
    pair.a.send(WRITES, Bytes::from_static(b"end"));
    pair.b.send(WRITES, Bytes::from_static(b"end"));
    pair.a.read(WRITES + 1, scattered(24 << 20, 1, 4096, 1));
    pair.until("both ends have all", |p| {
        let done = WRITES as usize + 1;
        p.a.events.len() == done + 2 && p.b.events.len() == done + 1
    });
    assert!(holds(&pair.b.memory, &big, 1) && holds(&pair.a.memory, &other, 2));
}

fn wrong_operations_are_refused(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let one = |offset, len| vec![Extent { offset, len }];
    let wrong = [
        one(0, 0),
        one(REGION_LEN, 1),
        one(REGION_LEN - 1, 2),
        one(u64::MAX, 2),
        one(0, MAX_PAYLOAD + 1),
        Vec::new(),
        scattered(0, MAX_EXTENTS as u64 + 1, 1, 1),
    ];
    for extents in wrong {
        for op in [
            Op::Write {
                region: REGION,
                extents: extents.clone(),
            },
            Op::Read {
                region: REGION,
                extents: extents.clone(),
            },
        ] {
            let refused = pair.a.channel.submit(Token(1), op);
            assert!(
                matches!(refused, Err(SubmitError::Invalid(_))),
                "{extents:?}: {refused:?}"
            );
        }
    }
    let no_region = Op::Write {
        region: RegionId(99),
        extents: one(0, 1),
    };
    assert!(matches!(
        pair.a.channel.submit(Token(1), no_region),
        Err(SubmitError::Invalid(_))
    ));
    for len in [0, MAX_MESSAGE + 1] {
        let refused = pair
            .a
            .channel
            .submit(Token(1), Op::Send(vec![0; len].into()));
        assert!(matches!(refused, Err(SubmitError::Invalid(_))));
    }
    pair.a.send(2, Bytes::from_static(b"still fine"));
    pair.until("the channel still works", |p| {
        p.b.messages() == [b"still fine"]
    });
}

fn a_full_queue_gives_the_operation_back(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    for n in 0..MAX_QUEUED as u64 {
        pair.a.send(n, Bytes::from_static(b"x"));
    }
    let op = Op::Send(Bytes::from_static(b"one too many"));
    match pair.a.channel.submit(Token(99), op.clone()) {
        Err(SubmitError::Full(back)) => assert_eq!(back, op),
        other => panic!("{other:?}"),
    }
    pair.until("room again", |p| !p.a.events.is_empty());
    pair.a.channel.submit(Token(99), op).unwrap();
    pair.until("all arrive", |p| p.b.messages().len() == MAX_QUEUED + 1);
}

fn access_is_enforced_at_the_receiver(harness: &dyn Harness) {
    let extents = scattered(0, 4, 4096, 8192);
    let mut pair = Pair::with_access(
        harness,
        Access {
            peer_writes: false,
            peer_reads: true,
        },
    );
    fill(&pair.a.memory, &extents, 1);
    pair.a.write(1, extents.clone());
    expect_misbehaviour(&mut pair);
    assert!(untouched(&pair.b.memory, &extents));

    let mut pair = Pair::with_access(
        harness,
        Access {
            peer_writes: true,
            peer_reads: false,
        },
    );
    fill(&pair.b.memory, &extents, 1);
    pair.a.read(1, extents.clone());
    expect_misbehaviour(&mut pair);
    assert!(untouched(&pair.a.memory, &extents));
}

fn a_revoked_region_is_closed(harness: &dyn Harness) {
    let extents = scattered(0, 4, 4096, 8192);
    let mut pair = Pair::new(harness);
    fill(&pair.a.memory, &extents, 1);
    pair.a.write(1, extents.clone());
    pair.a.send(2, Bytes::from_static(b"landed"));
    pair.until("the first write lands", |p| p.b.messages().len() == 1);
    pair.b.regions.revoke(REGION);
    fill(&pair.a.memory, &extents, 2);
    pair.a.write(3, extents.clone());
    expect_misbehaviour(&mut pair);
    assert!(
        holds(&pair.b.memory, &extents, 1),
        "the second write did not land"
    );
}

/// The receiver blames the peer, and the peer's channel ends as well.
fn expect_misbehaviour(pair: &mut Pair<'_>) {
    pair.until("the receiver notices", |p| p.b.error.is_some());
    assert!(
        matches!(pair.b.error, Some(Error::PeerMisbehaved(_))),
        "{:?}",
        pair.b.error
    );
    assert!(matches!(
        pair.b.channel.submit(Token(9), Op::Send(vec![1].into())),
        Err(SubmitError::Closed)
    ));
    assert!(
        matches!(
            pair.b.channel.poll(Some(Duration::ZERO)),
            Err(Error::PeerMisbehaved(_))
        ),
        "it repeats"
    );
    let (regions, _) = crate::harness::memory(Access {
        peer_writes: false,
        peer_reads: false,
    });
    let (other, _) = pair.harness.pair(&regions, &regions);
    pair.b.channel = other;
    pair.until("the culprit is told", |p| p.a.error.is_some());
    assert!(
        matches!(pair.a.error, Some(Error::Refused(_))),
        "{:?}",
        pair.a.error
    );
}

fn the_end_is_seen(harness: &dyn Harness) {
    let Pair { mut a, b, .. } = Pair::new(harness);
    let mut b = b;
    b.send(1, Bytes::from_static(b"last words"));
    let end = Instant::now() + crate::harness::PATIENCE;
    while b.events.is_empty() {
        assert!(Instant::now() < end);
        b.poll();
        harness.pass();
    }
    drop(b);
    while a.error.is_none() {
        assert!(Instant::now() < end);
        a.poll();
        harness.pass();
    }
    assert_eq!(a.messages(), [b"last words"]);
    assert!(matches!(a.error, Some(Error::Closed)), "{:?}", a.error);
}

fn bytes_are_counted(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let before = pair.a.channel.stats().sent;
    pair.a.write(1, scattered(0, 1, 1 << 20, 1));
    pair.a.send(2, Bytes::from_static(b"x"));
    pair.until("it arrives", |p| p.b.messages().len() == 1);
    pair.until("it is sent", |p| p.a.events.len() == 2);
    let sent = pair.a.channel.stats().sent - before;
    assert!((1 << 20..(1 << 20) + 8192).contains(&sent), "{sent}");
    assert_eq!(pair.a.channel.stats().sent, pair.b.channel.stats().received);
}

fn a_wait_is_bounded(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let start = Instant::now();
    assert_eq!(
        pair.a
            .channel
            .poll(Some(Duration::from_millis(30)))
            .unwrap(),
        None
    );
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(30) && took < Duration::from_secs(5),
        "{took:?}"
    );
}

fn a_waker_ends_a_wait(harness: &dyn Harness) {
    let mut pair = Pair::new(harness);
    let waker = pair.a.channel.waker();
    // Before the wait.
    waker.wake_by_ref();
    assert_eq!(pair.a.channel.poll(None).unwrap(), None);
    // During it: the channel changes threads, too.
    let mut channel = pair.a.channel;
    let waiter = std::thread::spawn(move || channel.poll(None).map(|event| (event, channel)));
    waker.wake_by_ref();
    let (event, channel) = waiter.join().unwrap().unwrap();
    assert_eq!(event, None);
    // The thread that waited last is gone; the channel goes on elsewhere.
    pair.a.channel = channel;
    pair.b.send(1, Bytes::from_static(b"hello"));
    pair.until("the message arrives", |p| p.a.messages() == [b"hello"]);
    drop(pair);
    waker.wake();
}
