//! Destinations that lie, against the daemon of the source and the guest that runs there.

use super::*;

type Lie = fn(&mut HostileDestination) -> Result<(), transport::Error>;

fn accept(version: u16, capabilities: u64) -> Message {
    Message::Accept {
        version,
        capabilities,
        host: "mallory".to_owned(),
        reason: String::new(),
    }
}

/// What a destination may not do before the guest is stopped, and a word of what the source's operator is told.
const LIES: [(&str, Lie, &str); 19] = [
    ("garbage", |d| d.raw(0, vec![0xa5; 300]), "type"),
    ("the largest message", |d| d.raw(0, vec![2; 1 << 20]), ""),
    (
        "a version that was not offered",
        |d| d.say(0, &accept(9, 1)),
        "version 9",
    ),
    (
        "capabilities that were not offered",
        |d| d.say(0, &accept(1, 3)),
        "capabilities",
    ),
    ("Loaded at once", |d| d.say(0, &Message::Loaded), "Loaded"),
    (
        "Running at once",
        |d| d.say(0, &Message::Running),
        "Running",
    ),
    (
        "the source's own words",
        |d| d.say(0, &Message::Commit),
        "Commit",
    ),
    (
        "a round before Accept",
        |d| d.say(0, &Message::BarrierReached { round: 0 }),
        "BarrierReached",
    ),
    (
        "Accept twice",
        |d| {
            d.say_accept();
            d.say(0, &accept(1, 1))
        },
        "Accept",
    ),
    (
        "a round that was not sent",
        |d| {
            d.say_accept();
            d.say(0, &Message::BarrierReached { round: 5 })
        },
        "BarrierReached",
    ),
    (
        "a round before it was whole",
        |d| {
            d.say_accept();
            d.say(0, &Message::BarrierReached { round: 0 })
        },
        "BarrierReached",
    ),
    (
        "Loaded in pre-copy",
        |d| {
            d.say_accept();
            d.say(0, &Message::Loaded)
        },
        "Loaded",
    ),
    (
        "Running without Commit",
        |d| {
            d.say_accept();
            d.say(0, &Message::Running)
        },
        "Running",
    ),
    (
        "digests that nobody compares",
        |d| {
            d.say_accept();
            d.say(0, &Message::ChunkDiffers { block: 0, chunk: 0 })
        },
        "ChunkDiffers",
    ),
    (
        "words on a data channel",
        |d| {
            d.say_accept();
            d.say(1, &Message::Loaded)
        },
        "data channel",
    ),
    (
        "a write into the source's memory",
        |d| {
            d.say_accept();
            d.touch(1, true)
        },
        "write",
    ),
    (
        "a read of the source's memory",
        |d| {
            d.say_accept();
            d.touch(1, false)
        },
        "read",
    ),
    (
        "pings whose answers are not taken",
        |d| {
            d.say_accept();
            let ping = Message::Ping { nonce: 1 }.encode();

            (0..400_000).try_for_each(|_| d.blind(0, ping.clone()))
        },
        "pings",
    ),
    (
        "the connection, closed",
        |d| {
            d.say_accept();
            d.hang_up();
            Ok(())
        },
        "closed",
    ),
];

/// Whatever the destination says, the guest runs on at the source, and the operator is told whose fault it was.
#[test]
fn a_destination_that_lies() {
    let (world, _, mallory) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let daemon = world.daemon(Side::A).pid();
    let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);
    let (to, mut before) = (peer.address(), None);
    let watch = Watch::over(daemon);
    let begun = Instant::now();
    for (what, lie, word) in LIES {
        let migration =
            world
                .cli(Side::A)
                .migrate_socket("vm", source.socket(), &to, &["--channels", "2"]);
        peer.accept();
        let _ = lie(&mut peer);
        peer.flush();
        let outcome = migration.finish();
        outcome.failed_with(&[word]);
        let end = outcome.finished();
        assert_eq!(end["fault"], "peer-host", "{what}: {end}");
        assert!(!end["remedy"].as_str().unwrap().is_empty(), "{what}: {end}");
        before.get_or_insert_with(|| Levels::of(daemon));
        assert_api_answers(&world, Side::A);
    }
    assert_stayed(&mut source, None, begun);
    let (before, most) = (before.unwrap(), watch.most());
    println!("{before} before, {most} at most");
    assert!(
        most.memory_kib <= before.memory_kib + (32 << 10),
        "{before} before, {most} at most"
    );
    println!("{} after", wait_level(daemon, before, 32 << 10));
    honest_migration(&world, &mut source, &mut destination);
}

/// Begins a migration to the hostile destination, which behaves until the guest stands still.
fn until_stopped(world: &World, source: &Qemu, peer: &mut HostileDestination) -> Migration {
    let options = ["--channels", "2"];
    let migration =
        world
            .cli(Side::A)
            .migrate_socket("vm", source.socket(), &peer.address(), &options);
    peer.accept();
    peer.say_accept();
    peer.honest_until(Conduct::Confirms, |message| {
        matches!(message, Message::Stopped { .. })
    });
    migration
}

/// The guest stands still, and everything hangs on the destination's word.
#[test]
fn a_destination_that_lies_at_the_switchover() {
    let (world, _, mallory) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);

    // What comes out of turn takes the guest back at once.
    let lies = [
        Message::Loaded,
        Message::Running,
        Message::BarrierReached { round: 4000 },
        Message::ChunkDiffers { block: 0, chunk: 0 },
        Message::DeviceState(Bytes::from_static(b"x")),
    ];
    for lie in lies {
        let begun = Instant::now();
        let migration = until_stopped(&world, &source, &mut peer);
        peer.say(0, &lie).unwrap();
        peer.flush();
        let outcome = migration.finish();
        outcome.failed_with(&[lie.name()]);
        assert_eq!(outcome.finished()["fault"], "peer-host");
        assert_stayed(&mut source, None, begun);
    }

    // It keeps the connection up, and never says that the last pages are in place: 3 s and the downtime limit.
    let migration = until_stopped(&world, &source, &mut peer);
    let stopped = Instant::now();
    peer.honest_until(Conduct::Stalls, |message| {
        matches!(message, Message::Abort { .. })
    });
    assert!(
        stopped.elapsed() < Duration::from_secs(6),
        "{:?}",
        stopped.elapsed()
    );
    let outcome = migration.finish();
    outcome.failed_with(&["did not confirm the last pages"]);
    assert_eq!(outcome.finished()["fault"], "peer-host");
    source.serial.wait_beats(300);
    source.serial.verify();

    honest_migration(&world, &mut source, &mut destination);
}

/// `Commit` was sent to a liar: the source keeps the guest stopped, asks, and believes only what decides.
#[test]
fn a_destination_that_lies_after_commit() {
    let (world, _, mallory) = world();
    let mut source = world.guest("source", &machine());
    let daemon = world.daemon(Side::A).pid();
    let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);
    let migration = until_stopped(&world, &source, &mut peer);
    peer.honest_until(Conduct::Loads, |message| *message == Message::Commit);
    // Not a word that answers it.
    let _ = peer.raw(0, vec![0xa5; 300]);
    peer.flush();
    let outcome = migration.finish();
    let error = outcome.not_completed("in-doubt");
    assert!(error.contains("may run at the destination"), "{error}");
    assert_ne!(
        source.qmp.status(),
        "running",
        "the guest was resumed in doubt"
    );

    let id = world.cli(Side::A).id_of("vm");
    let before = Levels::of(daemon);
    let watch = Watch::over(daemon);
    peer.accept();
    let query = peer.honest_until(Conduct::Stalls, |message| {
        matches!(message, Message::Query { .. })
    });
    let Message::Query { id: asked } = query else {
        unreachable!()
    };
    let answer = |standing| Message::Answer {
        id: asked,
        standing,
    };
    for _ in 0..100_000 {
        peer.say(0, &answer(Standing::Unknown)).unwrap();
        peer.say(0, &answer(Standing::Committed)).unwrap();
    }
    assert_api_answers(&world, Side::A);
    assert_ne!(
        source.qmp.status(),
        "running",
        "the guest was resumed in doubt"
    );
    let most = watch.most();
    println!("{before} before, {most} at most");
    assert!(
        most.memory_kib <= before.memory_kib + (32 << 10),
        "{before} before, {most} at most"
    );

    // Only this gives the guest back, however it was brought about.
    peer.say(0, &answer(Standing::Aborted)).unwrap();
    peer.flush();
    let deadline = Instant::now() + PATIENCE;
    while world.cli(Side::A).status(&id)["state"] != "failed" {
        assert!(Instant::now() < deadline, "the answer is not taken");
    }
    assert_eq!(source.qmp.status(), "running");
    source.serial.wait_beats(300);
    source.serial.verify();
}

/// What a destination may do that the guest has gone to, to look as if it went on; what the source's operator is told, and whether
/// the connection is still there.
const IDLE: [(&str, Lie, &str, bool); 2] = [
    (
        "asks for nothing",
        |_| Ok(()),
        "has read none for 10 s",
        true,
    ),
    (
        "asks, and takes no answer",
        |d| {
            d.deafen(1);
            (0..64).try_for_each(|_| d.touch(1, false))
        },
        "the destination is away",
        false,
    ),
];

/// The guest runs there, as it says; it answers pings, and takes nothing of what it lacks. The source says so, keeps the guest's
/// memory for a fetcher that comes to its senses, and its operator is not at the mercy of it.
#[test]
fn a_destination_that_answers_and_reads_nothing() {
    for (what, lie, word, connected) in IDLE {
        let (world, _, mallory) = world();
        let mut source = world.guest("source", &machine());
        let daemon = world.daemon(Side::A).pid();
        let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);
        let options = ["--mode", "postcopy", "--channels", "2"];
        let cli = world.cli(Side::A);
        let migration = cli.migrate_socket("vm", source.socket(), &peer.address(), &options);
        peer.accept();
        peer.say_accept_of(3);
        peer.honest_until(Conduct::Loads, |message| *message == Message::Commit);
        let id = cli.id_of("vm");
        peer.say(0, &Message::Running).unwrap();
        let _ = lie(&mut peer);
        let (before, watch) = (Levels::of(daemon), Watch::over(daemon));
        let begun = Instant::now();
        peer.idle_until(|| {
            let shown = cli.status(&id);
            assert!(begun.elapsed() < PATIENCE, "{what}: {shown}");
            shown["state"] == "paused"
        });
        let shown = eventually(PATIENCE, || match cli.status(&id) {
            shown if shown["state"] == "paused" => Ok(shown),
            shown => Err(shown.to_string()),
        })
        .unwrap();
        let reason = shown["reason"].as_str().unwrap();
        assert!(reason.contains(word), "{what}: {reason}");
        let most = watch.most();
        println!("{what}: {before} before, {most} at most");
        assert!(
            most.memory_kib <= before.memory_kib + (32 << 10),
            "{before} before, {most} at most"
        );
        assert_eq!(source.qmp.status(), "postmigrate", "{what}");
        // Who is connected may go on: only when it is ended is the memory let go of.
        if connected {
            let early = cli.run(&["resolve", &id, "--abandon"]);
            assert!(!early.status.success(), "{what}: {early:?}");
        }
        drop(peer);
        let_go(&world, &id);
        let end = ended(&world, Side::A, &id);
        assert_eq!(end["fault"], "operator", "{what}: {end}");
        migration.finish().not_completed("failed");
        source.serial.assert_whole();
    }
}

/// The source's operator lets go of a guest whose destination is ended: as soon as the daemon has noticed that.
fn let_go(world: &World, id: &str) {
    eventually(PATIENCE, || {
        let words = ["resolve", id, "--abandon", "--peer-fenced"];
        let done = world.cli(Side::A).run(&words);
        match done.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
        }
    })
    .unwrap_or_else(|why| panic!("{why}"));
}
