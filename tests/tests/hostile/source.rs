//! Sources that do not keep to the protocol, against the daemon of the destination and the QEMU that waits there.

use super::*;

fn run(first: u64, pages: u64) -> Run {
    Run {
        block: BlockId(0),
        first,
        pages,
    }
}

fn barrier(round: u32) -> Message {
    Message::Barrier { round }
}

type Attack = fn(&mut HostileSource) -> Result<(), transport::Error>;

/// What a source may not do once it was accepted, and a word of what it is told.
const OFFENCES: [(&str, Attack, &str); 26] = [
    ("garbage", |s| s.raw(0, vec![0xa5; 300]), "type"),
    ("an empty type", |s| s.raw(0, vec![1]), "type"),
    (
        "a message cut short",
        |s| s.raw(0, barrier(0).encode().slice(..4)),
        "",
    ),
    (
        "a message with a tail",
        |s| s.raw(0, [&Message::Commit.encode()[..], b"x"].concat()),
        "follow",
    ),
    ("the largest message", |s| s.raw(0, vec![3; 1 << 20]), ""),
    (
        "too many runs",
        |s| {
            let mut bytes = vec![3, 0];
            bytes.extend(257_u32.to_le_bytes());
            bytes.resize(bytes.len() + 257 * 18, 1);
            s.raw(0, bytes)
        },
        "limit",
    ),
    ("Hello again", |s| s.say(0, &hello("vm", MIB)), "Hello"),
    ("Commit at once", |s| s.say(0, &Message::Commit), "Commit"),
    (
        "the destination's own words",
        |s| s.say(0, &Message::Running),
        "Running",
    ),
    (
        "Closed before Commit",
        |s| s.say(0, &Message::Closed),
        "Closed",
    ),
    (
        "Query in a migration",
        |s| {
            let Message::Hello { id, .. } = hello("vm", MIB) else {
                unreachable!()
            };
            s.say(0, &Message::Query { id })
        },
        "Query",
    ),
    (
        "device state before Stopped",
        |s| s.say(0, &Message::DeviceState(Bytes::from_static(b"x"))),
        "DeviceState",
    ),
    (
        "its end before it",
        |s| s.say(0, &Message::DeviceStateEnd { bytes: 0, crc: 0 }),
        "DeviceStateEnd",
    ),
    (
        "digests that were not agreed",
        |s| {
            let digests = vec![[0; 16]];
            s.say(
                0,
                &Message::Digests {
                    block: 0,
                    first: 0,
                    digests,
                },
            )
        },
        "Digests",
    ),
    (
        "pages that do not exist",
        |s| s.say(0, &Message::Populate(vec![run(MIB * 256 - 1, 2)])),
        "do not exist",
    ),
    (
        "a RAMBlock that does not exist",
        |s| {
            let stray = Run {
                block: BlockId(1),
                first: 0,
                pages: 1,
            };
            s.say(0, &Message::Populate(vec![stray]))
        },
        "RAMBlock 1",
    ),
    (
        "Stopped for a later round",
        |s| s.say(0, &Message::Stopped { final_round: 7 }),
        "last round",
    ),
    (
        "zeroes outside",
        |s| s.say(1, &Message::Zero(vec![run(MIB * 256, 1)])),
        "",
    ),
    (
        "a round that is skipped",
        |s| s.say(1, &barrier(1)),
        "barrier",
    ),
    (
        "a barrier twice",
        |s| {
            s.say(1, &barrier(0))?;
            s.say(1, &barrier(0))
        },
        "barrier",
    ),
    (
        "a barrier on the control channel",
        |s| s.say(0, &barrier(0)),
        "Barrier",
    ),
    (
        "control on a data channel",
        |s| s.say(2, &Message::Commit),
        "data channel",
    ),
    (
        "a write beyond the end",
        |s| {
            s.write(1, 0, (MIB << 20) - 4096, 4096).and_then(|()| {
                // The peer's own region is as large as the guest, so that the last page is right and the next is not.
                s.write(1, 1, 0, 4096)
            })
        },
        "region",
    ),
    (
        "a write on the control channel",
        |s| s.write(0, 2, 0, 4096),
        "region",
    ),
    (
        "a read of the guest's memory",
        |s| s.read(1, 0, 4096),
        "read",
    ),
    (
        "reads without end",
        |s| (0..500).try_for_each(|n| s.read(2, n * 4096, 4096)),
        "read",
    ),
];

/// Each offence ends the attempt with the blame on the peer, and the QEMU waits on, usable for the next.
#[test]
fn a_source_that_breaks_the_rules() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap();
    let daemon = world.daemon(Side::B).pid();
    let mut before = None;
    let watch = Watch::over(daemon);
    for (what, attack, word) in OFFENCES {
        let mut peer = connected(&world, &mallory);
        // It may be over before all of it was said.
        let _ = attack(&mut peer);
        peer.assert_blamed(what, &[word]);
        let id = peer.id.clone();
        drop(peer);
        let end = ended(&world, Side::B, &id);
        assert_eq!(end["fault"], "peer-host", "{what}: {end}");
        assert!(!end["remedy"].as_str().unwrap().is_empty(), "{what}: {end}");
        // The first attempt warms up what stays: threads of the runtime, QEMU's connection.
        before.get_or_insert_with(|| Levels::of(daemon));
    }
    let (before, most) = (before.unwrap(), watch.most());
    println!("{before} before, {most} at most");
    assert!(
        most.memory_kib <= before.memory_kib + (32 << 10),
        "{before} before, {most} at most"
    );
    println!("{} after", wait_level(daemon, before, 32 << 10));
    // A replay: the Hello of an attempt that has ended does not begin it anew.
    let replayed = hello("vm", MIB);
    let mut peer = connected_with(&world, &mallory, &replayed);
    peer.say(0, &Message::Commit).unwrap();
    peer.assert_blamed("Commit", &["Commit"]);
    ended(&world, Side::B, &peer.id);
    let mut again = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
    again.say(0, &replayed).unwrap();
    again.assert_blamed("a replay", &["known"]);
    honest_migration(&world, &mut source, &mut destination);
}

/// A hostile source that got as far as `Accept`.
fn connected(world: &World, mallory: &Mallory) -> HostileSource {
    connected_with(world, mallory, &hello("vm", MIB))
}

fn connected_with(world: &World, mallory: &Mallory, hello: &Message) -> HostileSource {
    // The attempt before may not be over in every respect.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut peer = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
        match peer.ask(hello, |_| true) {
            Message::Accept { .. } => return peer,
            Message::Abort {
                code: AbortCode::Busy,
                ..
            } => assert!(Instant::now() < deadline, "busy for ever"),
            other => panic!("{other:?}"),
        }
    }
}

/// Brings a peer to the point where device state may come: the last round is said to be over.
fn stopped(peer: &mut HostileSource) {
    peer.say(0, &Message::Stopped { final_round: 0 }).unwrap();
    for channel in [1, 2] {
        peer.say(channel, &barrier(0)).unwrap();
    }
}

#[test]
fn floods_from_a_source() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap();
    let daemon = world.daemon(Side::B).pid();
    drop(connected(&world, &mallory));
    let before = Levels::of(daemon);

    // (what, MiB that the daemon may hold, blamed at once, attack)
    type Flood = fn(&mut HostileSource) -> Result<(), transport::Error>;
    let floods: [(&str, u64, bool, Flood); 6] = [
        ("pings whose answers are not taken", 32, true, |s| {
            let ping = Message::Ping { nonce: 1 }.encode();
            (0..400_000).try_for_each(|_| s.blind(0, ping.clone()))
        }),
        ("pages to allocate", 32, false, |s| {
            let runs: Vec<Run> = (0..256).map(|n| run(n * 64, 1)).collect();
            let populate = Message::Populate(runs).encode();
            (0..20_000).try_for_each(|_| s.raw(0, populate.clone()))
        }),
        ("zeroes", 32, false, |s| {
            let zero = Message::Zero(vec![run(0, MIB * 256); 256]).encode();
            (0..40).try_for_each(|_| s.raw(1, zero.clone()))
        }),
        ("barriers", 32, true, |s| {
            (0..100_000).try_for_each(|_| s.say(1, &barrier(0)))
        }),
        ("device state, byte by byte", 32, false, |s| {
            stopped(s);
            let byte = Message::DeviceState(Bytes::from_static(b"x")).encode();
            (0..300_000).try_for_each(|_| s.raw(0, byte.clone()))
        }),
        (
            "device state beyond its limit",
            (MAX_DEVICE_STATE >> 20) + 64,
            true,
            |s| {
                stopped(s);
                let chunk = Bytes::from(vec![1; MAX_DEVICE_STATE_CHUNK]);
                let chunk = Message::DeviceState(chunk).encode();
                let count = MAX_DEVICE_STATE / MAX_DEVICE_STATE_CHUNK as u64;
                (0..=count).try_for_each(|_| s.raw(0, chunk.clone()))
            },
        ),
    ];
    for (what, mib, blamed, flood) in floods {
        let mut peer = connected(&world, &mallory);
        let watch = Watch::over(daemon);
        let begun = Instant::now();
        let _ = flood(&mut peer);
        assert_api_answers(&world, Side::B);
        if blamed {
            peer.assert_blamed(what, &[]);
        }
        let id = peer.id.clone();
        drop(peer);
        let end = ended(&world, Side::B, &id);
        assert!(!blamed || end["fault"] == "peer-host", "{what}: {end}");
        let most = watch.most();
        println!(
            "{what}: {:.1} s, {before} before, {most} at most",
            begun.elapsed().as_secs_f64()
        );
        assert!(
            most.memory_kib <= before.memory_kib + (mib << 10),
            "{what}: {before} before, {most} at most"
        );
        wait_level(daemon, before, 32 << 10);
    }

    // What is legal at any time, without end: the operator is heard all the same.
    let mut peer = connected(&world, &mallory);
    let id = peer.id.clone();
    let pong = Message::Pong { nonce: 1 }.encode();
    let cancelled = std::thread::scope(|scope| {
        scope.spawn(move || while peer.raw(0, pong.clone()).is_ok() {});
        let begun = Instant::now();
        let output = world.cli(Side::B).run(&["cancel", &id]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(ended(&world, Side::B, &id)["status"], "cancelled");
        begun.elapsed()
    });
    println!("cancelled in the middle of a flood within {cancelled:?}");
    wait_level(daemon, before, 32 << 10);
    honest_migration(&world, &mut source, &mut destination);
}

/// A peer that says nothing, or stops in the middle: each stage has its time, and meanwhile others are served.
#[test]
fn stalls_of_a_source() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap();
    let daemon = world.daemon(Side::B).pid();
    drop(connected(&world, &mallory));
    let before = Levels::of(daemon);

    // Nothing after the greeting.
    let mut mute = mallory.dial(&world.net, Side::B, 1, [0]).unwrap();
    // A question, and then none.
    let mut asker = mallory.dial(&world.net, Side::B, 1, [0]).unwrap();
    let Message::Hello { id, .. } = hello("vm", MIB) else {
        unreachable!()
    };
    let answer = asker.ask(&Message::Query { id }, |_| true);
    assert_eq!(
        answer,
        Message::Answer {
            id,
            standing: Standing::NoJournal
        }
    );
    // Accepted, with a write begun and never ended, and then silence. Nobody else may have the guest meanwhile.
    let mut stalled = connected(&world, &mallory);
    stalled.write(1, 0, 0, 1 << 20).unwrap();
    stopped(&mut stalled);
    let begun = Instant::now();
    let mut second = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
    let refused = second.ask(&hello("vm", MIB), |_| true);
    assert!(
        matches!(
            refused,
            Message::Abort {
                code: AbortCode::Busy,
                ..
            }
        ),
        "{refused:?}"
    );
    assert_api_answers(&world, Side::B);
    match mute.end(PATIENCE) {
        Ended::Aborted(AbortCode::TimedOut, reason) => assert!(reason.contains("nothing was said")),
        other => panic!("{other:?}"),
    }
    match stalled.end(PATIENCE) {
        Ended::Aborted(AbortCode::TimedOut, reason) => assert!(reason.contains("silent")),
        other => panic!("{other:?}"),
    }
    let took = begun.elapsed();
    assert!(
        (Duration::from_secs(8)..Duration::from_secs(20)).contains(&took),
        "silence was noticed after {took:?}"
    );
    // The control channel goes, and the data channels stay: that is the end, too.
    let mut halved = connected(&world, &mallory);
    let id = halved.id.clone();
    halved.close(0);
    let end = ended(&world, Side::B, &id);
    assert_eq!(end["fault"], "peer-host", "{end}");
    drop((mute, stalled, second, halved));
    honest_migration(&world, &mut source, &mut destination);
    drop(asker);
    println!("{} after", wait_level(daemon, before, 32 << 10));
}
