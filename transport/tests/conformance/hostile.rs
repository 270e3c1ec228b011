//! Peers that do not keep to the protocol: silent, confused, cut off, or hostile. They speak through plain sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use transport::limits::{MAX_MESSAGE, MAX_PAYLOAD};
use transport::{
    Access, Address, Channel, Error, Event, Greeting, Listener, Peer, Regions, Security, connect,
};

use crate::harness::{PATIENCE, Pair, REGION, Sockets, greeting, loopback, memory, scattered};

type Established = Result<(Greeting, Peer, Box<dyn Channel>), Error>;

/// A greeting as bytes.
fn hello(version_min: u16, version_max: u16) -> Vec<u8> {
    let mut bytes = b"PGCP".to_vec();
    bytes.extend(version_min.to_le_bytes());
    bytes.extend(version_max.to_le_bytes());
    bytes.extend([7; 16]);
    bytes.extend(0u16.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// A header as bytes, with the right checksum whatever its fields.
fn header(kind: u8, extents: u16, check: u32, payload: u64) -> Vec<u8> {
    let mut fields = vec![kind, 0];
    fields.extend(extents.to_le_bytes());
    fields.extend(if extents > 0 { REGION.0 } else { 0 }.to_le_bytes());
    fields.extend(check.to_le_bytes());
    fields.extend(payload.to_le_bytes());
    fields.extend(0u64.to_le_bytes());
    [&crc32c::crc32c(&fields).to_le_bytes()[..], &fields].concat()
}

/// Runs `peer` against a listener.
fn against(
    deadline: Duration,
    regions: &Regions,
    peer: impl FnOnce(TcpStream) + Send,
) -> Established {
    let listener = Listener::bind(&loopback()).unwrap();
    let Address::Tcp(address) = listener.local_address() else {
        unreachable!()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| peer(TcpStream::connect(address).unwrap()));
        let pending = listener.accept(PATIENCE).unwrap().unwrap();
        pending.establish(&Security::Plaintext, deadline, |_, _| Ok(regions.clone()))
    })
}

/// A peer that has greeted properly, in a thread of its own, against a channel. Gives back what both bring.
fn greeted<P: Send, C>(
    regions: &Regions,
    peer: impl FnOnce(TcpStream) -> P + Send,
    channel: impl FnOnce(Box<dyn Channel>) -> C,
) -> (C, P) {
    let listener = Listener::bind(&loopback()).unwrap();
    let Address::Tcp(address) = listener.local_address() else {
        unreachable!()
    };
    std::thread::scope(|scope| {
        let peer = scope.spawn(move || {
            let mut socket = TcpStream::connect(address).unwrap();
            socket.write_all(&hello(1, 1)).unwrap();
            socket.read_exact(&mut [0; 16]).unwrap();
            peer(socket)
        });
        let pending = listener.accept(PATIENCE).unwrap().unwrap();
        let (_, _, established) = pending
            .establish(&Security::Plaintext, PATIENCE, |_, _| Ok(regions.clone()))
            .unwrap();
        (channel(established), peer.join().unwrap())
    })
}

/// Greets properly, sends `bytes`, ends, and gives back what the channel reports and what the peer got to read.
fn after_greeting(bytes: &[u8]) -> (Error, Vec<u8>) {
    let (regions, _) = memory(Access {
        peer_writes: true,
        peer_reads: true,
    });
    let peer = |mut socket: TcpStream| {
        // The channel may be gone before all is written.
        let _ = socket.write_all(bytes);
        let _ = socket.shutdown(Shutdown::Write);
        let mut got = Vec::new();
        let _ = socket.read_to_end(&mut got);
        got
    };
    greeted(&regions, peer, |mut channel| {
        loop {
            match channel.poll(Some(PATIENCE)) {
                Ok(Some(_)) => {}
                Ok(None) => panic!("no end"),
                Err(error) => break error,
            }
        }
    })
}

#[test]
fn a_silent_peer_costs_the_deadline_and_no_more() {
    for said in [&[][..], b"PGCP"] {
        let start = Instant::now();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let result = against(
            Duration::from_millis(100),
            &Regions::new(),
            move |mut socket| {
                socket.write_all(said).unwrap();
                // Until the listener has given up.
                let _ = socket.read(&mut [0; 64]);
                drop(done);
            },
        );
        assert!(
            matches!(
                result,
                Err(Error::Io {
                    kind: ErrorKind::TimedOut,
                    ..
                })
            ),
            "{:?}",
            result.err()
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(wait.recv().is_err());
    }
}

#[test]
fn a_peer_that_leaves_in_mid_greeting_is_gone() {
    for said in [&[][..], b"PGCP"] {
        let result = against(PATIENCE, &Regions::new(), move |mut socket| {
            socket.write_all(said).unwrap()
        });
        assert!(matches!(result, Err(Error::Closed)), "{:?}", result.err());
    }
}

#[test]
fn a_stranger_s_greeting_is_refused() {
    let result = against(PATIENCE, &Regions::new(), |mut socket| {
        socket
            .write_all(b"GET / HTTP/1.1\r\nHost: example.test\r\n\r\n")
            .unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        assert_eq!(&answer[..6], b"PGCP\x06\x00");
    });
    assert!(
        matches!(result, Err(Error::PeerMisbehaved(_))),
        "{:?}",
        result.err()
    );
}

#[test]
fn a_version_that_we_do_not_speak_is_refused() {
    let result = against(PATIENCE, &Regions::new(), |mut socket| {
        socket.write_all(&hello(2, 3)).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        assert_eq!(&answer[..6], b"PGCP\x04\x00");
        assert!(String::from_utf8_lossy(&answer[16..]).contains("versions 2 to 3"));
    });
    assert!(
        matches!(result, Err(Error::PeerIncompatible(_))),
        "{:?}",
        result.err()
    );
}

#[test]
fn a_refusal_is_told() {
    for sockets in [
        Sockets::tcp(),
        Sockets::unix(),
        crate::certificates::sockets(),
    ] {
        let listener = Listener::bind(&sockets.address).unwrap();
        let address = listener.local_address();
        std::thread::scope(|scope| {
            let acceptor = scope.spawn(|| {
                let pending = listener.accept(PATIENCE).unwrap().unwrap();
                let refused = |seen: &Greeting, _: &Peer| {
                    assert_eq!(*seen, greeting());
                    Err("no guest of that name".to_owned())
                };
                pending.establish(&sockets.accept, PATIENCE, refused).err()
            });
            let refused = connect(
                &address,
                &sockets.dial,
                &greeting(),
                &Regions::new(),
                PATIENCE,
            )
            .err();
            assert!(
                matches!(refused, Some(Error::Refused(text)) if text == "no guest of that name")
            );
            let denied = acceptor.join().unwrap();
            assert!(matches!(denied, Some(Error::Denied(text)) if text == "no guest of that name"));
        });
    }
}

#[test]
fn a_server_that_is_none_of_ours_is_noticed() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            socket.read_exact(&mut [0; 32]).unwrap();
            socket
                .write_all(b"220 mail.example.test ESMTP\r\n")
                .unwrap();
        });
        let error = connect(
            &address,
            &Security::Plaintext,
            &greeting(),
            &Regions::new(),
            PATIENCE,
        )
        .err();
        assert!(matches!(error, Some(Error::PeerMisbehaved(_))), "{error:?}");
    });
}

#[test]
fn nobody_at_the_address_is_told_apart() {
    let address = Listener::bind(&loopback()).unwrap().local_address();
    let error = connect(
        &address,
        &Security::Plaintext,
        &greeting(),
        &Regions::new(),
        PATIENCE,
    )
    .err();
    assert!(
        matches!(
            error,
            Some(Error::Unreached {
                kind: ErrorKind::ConnectionRefused,
                ..
            })
        ),
        "{error:?}"
    );
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let address = crate::harness::socket_path();
    let Address::Unix(path) = &address else {
        unreachable!()
    };
    drop(std::os::unix::net::UnixListener::bind(path).unwrap());
    assert!(path.exists());
    let live = Listener::bind(&address).unwrap();
    let second = Listener::bind(&address);
    assert!(
        matches!(
            second,
            Err(Error::Io {
                kind: ErrorKind::AddrInUse,
                ..
            })
        ),
        "{second:?}"
    );
    assert!(live.accept(Duration::from_millis(1)).is_ok());
    drop(live);
    assert!(!path.exists(), "the file goes with its listener");
}

#[test]
fn bytes_against_the_rules_end_the_channel() {
    let table = |extents: &[[u64; 2]]| -> Vec<u8> {
        extents
            .as_flattened()
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect()
    };
    let write = |extents: &[[u64; 2]], payload| {
        let table = table(extents);
        [
            header(1, extents.len() as u16, crc32c::crc32c(&table), payload),
            table,
        ]
        .concat()
    };
    let cases = [
        ("garbage", vec![0xa5; 200]),
        ("zeroes", vec![0; 200]),
        ("an unknown type", header(9, 0, 0, 1)),
        ("a huge message", header(4, 0, 0, MAX_MESSAGE as u64 + 1)),
        ("a message of 2^64 - 1 bytes", header(4, 0, 0, u64::MAX)),
        (
            "a huge write",
            write(&[[0, MAX_PAYLOAD + 1]], MAX_PAYLOAD + 1),
        ),
        (
            "a write beyond the region",
            write(&[[u64::MAX - 5, 4096]], 4096),
        ),
        ("a sum that does not fit", write(&[[0, 10]], 11)),
        ("a sum that overflows", write(&[[0, u64::MAX], [0, 2]], 1)),
        ("a reply to nothing", header(3, 0, 0, 4096)),
    ];
    for (what, bytes) in cases {
        let (error, got) = after_greeting(&bytes);
        assert!(
            matches!(error, Error::PeerMisbehaved(_)),
            "{what}: {error:?}"
        );
        // The culprit is told, unless its own excess made the kernel reset the connection.
        assert!(got.is_empty() || got[4] == 5, "{what}: a fault frame");
    }
}

#[test]
fn a_frame_cut_short_is_no_orderly_end() {
    let whole = [header(4, 0, crc32c::crc32c(b"hello"), 5), b"hello".to_vec()].concat();
    for len in [1, 31, 32, 36] {
        let (error, _) = after_greeting(&whole[..len]);
        assert!(
            matches!(
                error,
                Error::Io {
                    kind: ErrorKind::UnexpectedEof,
                    ..
                }
            ),
            "{len}: {error:?}"
        );
    }
    let (error, _) = after_greeting(&whole);
    assert!(matches!(error, Error::Closed), "{error:?}");
}

/// Operations in flight are called back before their memory goes: under a sanitizer or not, nothing is left behind.
#[test]
fn a_channel_dropped_in_full_flight_lets_go_of_its_memory() {
    for sockets in [
        Sockets::tcp(),
        Sockets::unix(),
        Sockets::tcp().of_files(),
        Sockets::unix().of_files(),
        crate::certificates::sockets(),
    ] {
        let mut pair = Pair::new(&sockets);
        for n in 0..40 {
            pair.a.write(n, scattered(0, 1, MAX_PAYLOAD, 1));
        }
        // Nobody receives at the other end, so the kernel is left with a send that cannot go on.
        for _ in 0..3 {
            pair.a.channel.poll(Some(Duration::from_millis(1))).unwrap();
        }
        let Pair { a, mut b, .. } = pair;
        drop(a);
        let end = loop {
            match b.channel.poll(Some(PATIENCE)) {
                Ok(event) => assert!(!matches!(event, Some(Event::Sent(_)))),
                Err(error) => break error,
            }
        };
        assert!(matches!(end, Error::Io { .. } | Error::Closed), "{end:?}");
    }
}

/// A region that is closed to the peer is closed also to the rest of a frame that it had begun: the kernel has no receive
/// under way that could place it.
#[test]
fn nothing_lands_in_a_channel_that_is_paused() {
    const HALF: usize = 4096;
    let (regions, region) = memory(Access {
        peer_writes: true,
        peer_reads: false,
    });
    let (more, next) = std::sync::mpsc::channel();
    let peer = move |mut socket: TcpStream| {
        let table: Vec<u8> = [0, 2 * HALF as u64]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        let head = header(1, 1, crc32c::crc32c(&table), 2 * HALF as u64);
        socket.write_all(&[head, table].concat()).unwrap();
        socket.write_all(&[7; HALF]).unwrap();
        next.recv().unwrap();
        socket.write_all(&[7; HALF]).unwrap();
        socket
            .write_all(&header(4, 0, crc32c::crc32c(b"hello"), 5))
            .unwrap();
        socket.write_all(b"hello").unwrap();
        // Until the channel is gone.
        let _ = socket.read(&mut [0; 64]);
    };
    let byte = |at: usize| {
        let mut byte = [0];
        region.copy_out(at as u64, &mut byte);
        byte[0]
    };
    greeted(&regions, peer, |mut channel| {
        let begun = Instant::now();
        while byte(HALF - 1) != 7 {
            assert!(begun.elapsed() < PATIENCE, "the first half does not come");
            assert_eq!(channel.poll(Some(Duration::from_millis(5))).unwrap(), None);
        }
        channel.pause(true);
        more.send(()).unwrap();
        let nothing = channel.poll(Some(Duration::from_millis(200))).unwrap();
        assert_eq!(nothing, None);
        assert_eq!(byte(HALF), 0, "the second half has landed all the same");
        channel.pause(false);
        let event = channel.poll(Some(PATIENCE)).unwrap();
        let hello = Event::Message(bytes::Bytes::from_static(b"hello"));
        assert_eq!(event, Some(hello));
        let last = byte(2 * HALF - 1);
        assert_eq!(last, 7, "what waited in the network comes after it");
    });
}

/// What is no TLS behind a header that promises it: an alert, and no harm to the thread that greets.
#[test]
fn broken_records_in_a_handshake_are_answered_by_an_alert() {
    let accept = crate::certificates::sockets().accept;
    for bytes in [
        &[0x16, 3, 1, 0xff, 0xff, 0, 0, 0][..],
        &[0x16, 9, 9, 0, 4, 1, 0, 0, 0],
        &[0x16, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        &[0x16; 400],
        &[0x16, 3, 3, 0, 1, 1, 0x17, 3, 3, 0, 1, 0],
    ] {
        let listener = Listener::bind(&loopback()).unwrap();
        let Address::Tcp(address) = listener.local_address() else {
            unreachable!()
        };
        std::thread::scope(|scope| {
            let peer = scope.spawn(move || {
                let mut socket = TcpStream::connect(address).unwrap();
                socket.write_all(bytes).unwrap();
                socket.shutdown(Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                let _ = socket.read_to_end(&mut answer);
                answer
            });
            let pending = listener.accept(PATIENCE).unwrap().unwrap();
            let result = pending.establish(&accept, PATIENCE, |_, _| Ok(Regions::new()));
            let error = result.err();
            assert!(
                matches!(error, Some(Error::PeerMisbehaved(_) | Error::Closed)),
                "{bytes:?}: {error:?}"
            );
            let answer = peer.join().unwrap();
            assert!(
                answer.is_empty() || answer[0] == 0x15,
                "{bytes:?}: answered by {answer:?}"
            );
        });
    }
}
