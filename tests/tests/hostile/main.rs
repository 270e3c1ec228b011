//! Hostile peers against real daemons with real guests: whatever a peer does, before the handshake and after it, as a
//! source and as a destination, the daemon's use of the machine stays bounded and goes back, honest peers are served, the
//! peer is blamed, and the guest is not harmed.
//!
//! What one channel does with bytes against the rules is held by `transport/tests/conformance/hostile.rs`, who is trusted
//! by `trust.rs`, and the decoders and engines by the fuzz targets (`tests/targets`).

#![allow(clippy::unwrap_used)]

mod another;
mod destination;
mod preflight;
mod source;
mod spawning;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::limits::{MAX_DEVICE_STATE, MAX_DEVICE_STATE_CHUNK};
use pagecopy::memory::{BlockId, Run};
use pagecopy::wire::{AbortCode, Message, Standing};
use serde_json::Value;
use tests::real::{
    Certs, Conduct, Ended, HostileDestination, HostileSource, Levels, Machine, Mallory, Migration,
    PATIENCE, Qemu, Scratch, Side, Trust, Version, Watch, World, assert_moved, assert_stayed,
    eventually, hello, stranger, wait_level,
};

/// RAM of the guests here.
const MIB: u64 = 64;
/// Where strangers come from: not from where the honest peer does.
const ELSEWHERE: &str = "10.77.0.66";

fn machine() -> Machine {
    Machine::new(Version::V10_0, MIB, "rate=5 set=4")
}

/// Two hosts that trust each other and, both, a third: mallory.
fn world() -> (World, Mallory, Mallory) {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let both = |peer: &str| vec![peer.to_owned(), "mallory".to_owned()];
    let a = Trust::Tls(certs.identity("a"), both("b"));
    let b = Trust::Tls(certs.identity("b"), both("a"));
    let identity = certs.identity("mallory");
    let (to_b, to_a) = (Mallory::with(&identity, "b"), Mallory::with(&identity, "a"));
    (World::with(scratch, &a, &b), to_b, to_a)
}

/// Has the daemon of B been answering its API all the while? Within a second, on a machine that may be busy.
fn assert_api_answers(world: &World, side: Side) {
    let begun = Instant::now();
    let output = world.cli(side).run(&["list"]);
    assert!(output.status.success(), "{output:?}");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "the API took {:?}",
        begun.elapsed()
    );
}

/// How a migration ended at a side, as the API tells; waits for it.
fn ended(world: &World, side: Side, id: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let end = &world.cli(side).status(id)["finished"];
        if end.is_object() {
            return end.clone();
        }
        assert!(Instant::now() < deadline, "it does not end");
    }
}

/// An honest migration of the guest to the waiting QEMU. Right after a hostile one the guest may still be said to arrive.
fn honest_migration(world: &World, source: &mut Qemu, destination: &mut Qemu) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(refusal) = world.cli(Side::B).receive("vm", destination.socket()) {
        assert!(Instant::now() < deadline, "{refusal}");
    }
    world
        .cli(Side::A)
        .migrate("vm", source, Side::B, &[])
        .finish()
        .completed();
    assert_moved(source, destination);
}

fn write(socket: &mut TcpStream, bytes: &[u8]) {
    // The daemon may have turned it away by now.
    let _ = socket.write_all(bytes);
}

/// Whatever strangers do who have no certificate, or the wrong one, or who never come to the point.
#[test]
fn strangers_before_the_handshake() {
    let (world, _, _) = world();
    world.net.add_address(Side::A, ELSEWHERE);
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let daemon = world.daemon(Side::B).pid();
    let before = Levels::of(daemon);
    let watch = Watch::over(daemon);
    let connect = || stranger(&world.net, Side::B, ELSEWHERE);

    // What is no TLS, too much of it, and too little.
    let hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 400]].concat();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PGCP\x01\x00",
        &[0x16, 3, 1, 0xff, 0xff],
        &[0x16; 4000],
        &hello,
        &[0; 70_000],
    ] {
        let mut socket = connect();
        write(&mut socket, bytes);
        let _ = socket.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert!(
            answer.len() <= 2048,
            "{} bytes for a stranger",
            answer.len()
        );
    }
    // A handshake without an end: records of a message that never is whole.
    let mut endless = connect();
    let record = [&[0x16, 3, 3, 0x40, 0][..], &[1; 0x4000]].concat();
    let mut sent = 0_usize;
    while sent < 64 << 20 && endless.write_all(&record).is_ok() {
        sent += record.len();
    }
    assert!(sent < 64 << 20, "all of {sent} bytes were taken");

    // As many as there is room for from one address, all of them slow; then a thousand more.
    let mut held: Vec<TcpStream> = (0..200)
        .map(|number| {
            let mut socket = connect();
            write(&mut socket, &hello[..number % 40]);
            socket
        })
        .collect();
    let migration = {
        world
            .cli(Side::B)
            .receive("vm", destination.socket())
            .unwrap();
        world.cli(Side::A).migrate("vm", &source, Side::B, &[])
    };
    for round in 0..40 {
        for socket in held.iter_mut().step_by(7) {
            write(socket, &hello[round..=round]);
        }
        held.extend((0..25).map(|_| connect()));
        assert_api_answers(&world, Side::B);
    }
    migration.finish().completed();
    assert_moved(&mut source, &mut destination);
    drop((held, endless));

    let most = watch.most();
    println!("{before} before, {most} at most");
    assert!(
        most.threads <= before.threads + 32 + 40,
        "{before} before, {most} at most"
    );
    assert!(
        most.memory_kib <= before.memory_kib + (64 << 10),
        "{before} before, {most} at most"
    );
    let after = wait_level(daemon, before, 32 << 10);
    println!("{after} after");
    world
        .daemon(Side::B)
        .assert_logs(&["turned away", "left_out"]);
}

/// Peers with a good certificate that connect, and never begin a migration.
#[test]
fn connections_that_come_to_nothing() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    let daemon = world.daemon(Side::B).pid();
    let before = Levels::of(daemon);
    let watch = Watch::over(daemon);
    let net = &world.net;

    let mut first = Vec::new();
    for message in [
        Message::Commit,
        Message::Closed,
        Message::Ping { nonce: 1 },
        Message::Running,
    ] {
        if let Ok(mut peer) = mallory.dial(net, Side::B, 1, [0]) {
            peer.say(0, &message).unwrap();
            first.push((message, peer));
        }
    }
    // Whole ones that say nothing, or have nothing to say.
    let silent: Vec<_> = (0..200)
        .map(|_| mallory.dial(net, Side::B, 1, [0]))
        .collect();
    // All of them greet, and no more than a peer's share is served.
    let served = Levels::of(daemon).threads - before.threads;
    assert!((100..=140).contains(&served), "{served} threads for them");
    // Connections that are never whole: so many of one peer, and no more.
    let half: Vec<_> = (0..40)
        .map(|_| mallory.dial(net, Side::B, 65, 1..4))
        .collect();
    let refused = half.iter().filter(|made| made.is_err()).count();
    assert!(refused >= 24, "only {refused} of 40 were turned away");
    // An honest peer is served meanwhile.
    honest_migration(&world, &mut source, &mut destination);
    assert_api_answers(&world, Side::B);
    for (message, mut peer) in first {
        peer.assert_blamed(message.name(), &["came first"]);
    }
    let most = watch.most();
    println!("{before} before, {most} at most");
    assert!(
        most.threads <= before.threads + 128 + 60,
        "{before} before, {most} at most"
    );
    assert!(
        most.memory_kib <= before.memory_kib + (96 << 10),
        "{before} before, {most} at most"
    );
    drop((half, silent));
    println!("{} after", wait_level(daemon, before, 32 << 10));
}
