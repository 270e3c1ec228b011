//! The record layer against rustls's own, and the change of keys under load.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConnection, Stream};

use crate::connect::socket::{Bounded, Deadline};
use crate::region::{Access, Extent, Region, RegionId, Regions};
use crate::tls::link::TlsLink;
use crate::tls::record::Content;
use crate::tls::{Identity, handshake};
use crate::{Event, Op, Security, Token};

const PATIENCE: Duration = Duration::from_secs(10);

/// Two identities that trust each other.
fn identities() -> [Arc<Identity>; 2] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "transport-tls-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let folder = std::env::temp_dir().join(name);
    fs::create_dir_all(&folder).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = folder.join("ca");
    fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    let identity = |name: &str, peer: &str| {
        let key = KeyPair::generate().unwrap();
        let signed = CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let (cert_file, key_file) = (folder.join("cert"), folder.join("key"));
        fs::write(&cert_file, signed.pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        Identity::load(&ca, &cert_file, &key_file, vec![peer.to_owned()]).unwrap()
    };
    let both = [identity("a.test", "b.test"), identity("b.test", "a.test")];
    fs::remove_dir_all(&folder).unwrap();
    both
}

/// For tests of other modules.
pub(crate) fn securities() -> (Security, Security) {
    let [a, b] = identities();
    (Security::Tls(a), Security::Tls(b))
}

fn bounded(socket: UnixStream) -> Bounded {
    Bounded::new(
        socket2::Socket::from(std::os::fd::OwnedFd::from(socket)),
        Deadline::after(PATIENCE),
    )
    .unwrap()
}

/// Our dialling side against rustls's accepting side.
fn against_rustls<T: Send>(
    ours: impl FnOnce(Box<TlsLink>) -> T,
    theirs: impl FnOnce(&mut Stream<'_, ServerConnection, UnixStream>) + Send,
) -> T {
    let [a, b] = identities();
    let (left, mut right) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut connection = ServerConnection::new(b.server_config()).unwrap();
            theirs(&mut Stream::new(&mut connection, &mut right));
        });
        let (link, names) = handshake::client(bounded(left), &a).unwrap();
        assert_eq!(names, ["b.test"]);
        ours(link)
    })
}

fn read_exact(link: &mut TlsLink, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        filled += link.read(&mut bytes[filled..], "testing").unwrap();
    }
    bytes
}

#[test]
fn rustls_reads_our_records_and_we_read_its() {
    let long: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    against_rustls(
        |mut link| {
            link.write_all(b"ping").unwrap();
            assert_eq!(read_exact(&mut link, 100_000), long);
            link.close_gently();
        },
        |stream| {
            let mut four = [0; 4];
            stream.read_exact(&mut four).unwrap();
            assert_eq!(&four, b"ping");
            stream.write_all(&long).unwrap();
            stream.flush().unwrap();
            assert_eq!(
                stream.read(&mut four).unwrap(),
                0,
                "an orderly end by close_notify"
            );
        },
    );
}

#[test]
fn keys_change_in_both_directions() {
    against_rustls(
        |mut link| {
            for _ in 0..3 {
                assert_eq!(read_exact(&mut link, 4), b"next");
                // rustls asks for a change of ours, too.
                assert!(link.records.owes_update());
                let update = link.records.key_update(1).unwrap().unwrap();
                link.write_sealed(&update).unwrap();
                assert!(link.records.key_update(1).unwrap().is_none());
                link.write_all(b"same").unwrap();
            }
        },
        |stream| {
            stream.conn.complete_io(stream.sock).unwrap();
            for _ in 0..3 {
                stream.conn.refresh_traffic_keys().unwrap();
                stream.write_all(b"next").unwrap();
                stream.flush().unwrap();
                let mut four = [0; 4];
                stream.read_exact(&mut four).unwrap();
                assert_eq!(&four, b"same");
            }
        },
    );
}

/// Both ends of ours.
fn pair() -> (Box<TlsLink>, Box<TlsLink>) {
    let [a, b] = identities();
    let (left, right) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            handshake::server(bounded(right), &b)
                .map_err(|(_, error)| error)
                .unwrap()
        });
        let client = handshake::client(bounded(left), &a).unwrap();
        (client.0, server.join().unwrap().0)
    })
}

#[test]
fn a_damaged_record_does_not_open() {
    let (mut a, mut b) = pair();
    let good = a.records.data(b"hello").unwrap();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        // Each attempt takes a number of its own, so the good one comes first.
        if byte == 0 {
            assert_eq!(
                b.records.open(&mut good.clone()).unwrap(),
                Content::Data(b"hello")
            );
        }
        assert!(b.records.open(&mut bad).is_err(), "byte {byte}");
    }
}

/// A limit of a few records: every batch of a busy channel changes the keys.
#[test]
fn a_busy_channel_changes_its_keys() {
    let (mut a, mut b) = pair();
    a.records.set_limit(20);
    b.records.set_limit(20);
    let id = RegionId(1);
    let region = |fill: u8| {
        let region = Region::anonymous(8 << 20).unwrap();
        region.copy_in(0, &vec![fill; 8 << 20]);
        let regions = Regions::new();
        regions.register(
            id,
            region.clone(),
            Access {
                peer_writes: true,
                peer_reads: true,
            },
        );
        (regions, region)
    };
    let ((from, _), (to, landed)) = (region(7), region(0));
    let (mut a, mut b) = (a.into_channel(from).unwrap(), b.into_channel(to).unwrap());
    let write = |offset| Op::Write {
        region: id,
        extents: vec![Extent {
            offset,
            len: 4 << 20,
        }],
    };
    for (channel, offset) in [(&mut a, 0), (&mut b, 4 << 20)] {
        channel.submit(Token(0), write(offset)).unwrap();
        channel
            .submit(Token(1), Op::Send(vec![1; 100].into()))
            .unwrap();
    }
    let mut arrived = [false; 2];
    while arrived != [true; 2] {
        for (channel, arrived) in [&mut a, &mut b].into_iter().zip(&mut arrived) {
            *arrived |= matches!(
                channel.poll(Some(Duration::ZERO)).unwrap(),
                Some(Event::Message(_))
            );
        }
    }
    let mut bytes = vec![0; 8 << 20];
    landed.copy_out(0, &mut bytes);
    assert!(bytes[..4 << 20].iter().all(|byte| *byte == 7));
    assert!(bytes[4 << 20..].iter().all(|byte| *byte == 0));
}
