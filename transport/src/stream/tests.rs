//! The frames' codec and both state machines against known bytes, a naive model and hostile input.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::channel::{Event, Token};
use crate::error::Error;
use crate::limits::{MAX_EXTENTS, MAX_PAYLOAD, MAX_QUEUED};
use crate::region::{Access, Extent, Region, RegionId, Regions};
use crate::stream::frame::{self, HEADER_LEN, Header, Kind};
use crate::stream::receiver::Receiver;
use crate::stream::sender::Sender;
use crate::sys::iovecs::{Gather, Scatter};

const REGION: RegionId = RegionId(7);
const LEN: u64 = 1 << 20;

fn regions(access: Access) -> (Regions, Region) {
    let regions = Regions::new();
    let region = Region::anonymous(LEN as usize).unwrap();
    regions.register(REGION, region.clone(), access);
    (regions, region)
}

const FULL: Access = Access {
    peer_writes: true,
    peer_reads: true,
};

fn extent(offset: u64, len: u64) -> Extent {
    Extent { offset, len }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All that a sender has to send, `most` bytes at a time.
fn drain(sender: &mut Sender, most: usize, events: &mut VecDeque<Event>) -> Vec<u8> {
    let mut out = Vec::new();
    while !sender.is_empty() {
        let mut gather = Gather::default();
        sender.gather(&mut gather, most);
        let mut piece = vec![0; gather.len()];
        gather.copy_to(&mut [&mut piece]).unwrap();
        assert!(!piece.is_empty() && piece.len() <= most);
        sender.advance(piece.len(), events);
        out.extend(piece);
    }
    out
}

/// The samples of `WIRE.md`. A difference is a change of the wire.
#[test]
fn golden_samples() {
    let write = frame::encode_extents(
        Kind::Write,
        RegionId(2),
        &[extent(0x1000, 0x2000), extent(0x8000, 16)],
        0,
    );
    assert_eq!(hex(&write), include_str!("golden/write.hex").trim());
    let read = frame::encode_extents(Kind::Read, RegionId(2), &[extent(0x1000, 0x2000)], 5);
    assert_eq!(hex(&read), include_str!("golden/read.hex").trim());
    assert_eq!(
        hex(&frame::encode_reply(0x2000, 5)),
        include_str!("golden/reply.hex").trim()
    );
    let with = |kind, text: &[u8]| [&frame::encode_message(kind, text)[..], text].concat();
    assert_eq!(
        hex(&with(Kind::Message, b"hello")),
        include_str!("golden/message.hex").trim()
    );
    assert_eq!(
        hex(&with(Kind::Fault, b"why")),
        include_str!("golden/fault.hex").trim()
    );
}

#[test]
fn every_damaged_header_is_noticed() {
    let good = frame::encode_reply(9, 1);
    for byte in 0..HEADER_LEN {
        for bit in 0..8 {
            let mut bad = good;
            bad[byte] ^= 1 << bit;
            assert!(Header::decode(&bad).is_err(), "byte {byte}, bit {bit}");
        }
    }
}

/// Headers whose checksum is right and whose fields are not.
#[test]
fn headers_beyond_the_limits_are_refused() {
    let good = Header {
        kind: Kind::Write,
        extents: 1,
        region: REGION,
        check: 0,
        payload: 1,
        number: 0,
    };
    assert!(Header::decode(&good.encode()).is_ok());
    let message = Header {
        kind: Kind::Message,
        extents: 0,
        region: RegionId(0),
        ..good
    };
    let wrong = [
        Header { extents: 0, ..good },
        Header {
            extents: MAX_EXTENTS as u16 + 1,
            ..good
        },
        Header { payload: 0, ..good },
        Header {
            payload: MAX_PAYLOAD + 1,
            ..good
        },
        Header {
            payload: u64::MAX,
            ..good
        },
        Header { number: 1, ..good },
        Header {
            kind: Kind::Reply,
            ..good
        },
        Header {
            kind: Kind::Reply,
            extents: 0,
            region: RegionId(0),
            check: 1,
            ..good
        },
        Header {
            payload: (1 << 20) + 1,
            ..message
        },
        Header {
            extents: 1,
            ..message
        },
        Header {
            kind: Kind::Fault,
            payload: 1025,
            ..message
        },
    ];
    for header in wrong {
        assert!(Header::decode(&header.encode()).is_err(), "{header:?}");
    }
}

/// Feeds frames to a receiver with that access, and returns its error.
fn refused(access: Access, bytes: &[u8]) -> String {
    let (regions, _) = regions(access);
    let mut receiver = Receiver::new(regions);
    match receiver.feed(bytes, &mut VecDeque::new()) {
        Err(Error::PeerMisbehaved(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn extents_are_checked_against_the_region() {
    let write = |extents: &[Extent]| frame::encode_extents(Kind::Write, REGION, extents, 0);
    let none = Access {
        peer_writes: false,
        peer_reads: false,
    };
    assert!(refused(FULL, &write(&[extent(LEN, 1)])).contains("outside"));
    assert!(refused(FULL, &write(&[extent(LEN - 1, 2)])).contains("outside"));
    assert!(refused(FULL, &write(&[extent(u64::MAX, 2)])).contains("outside"));
    assert!(refused(FULL, &write(&[extent(0, 0), extent(0, 1)])).contains("empty"));
    assert!(refused(none, &write(&[extent(0, 1)])).contains("may not write"));
    let read = frame::encode_extents(Kind::Read, REGION, &[extent(0, 1)], 0);
    assert!(refused(none, &read).contains("may not read"));
    let unknown = frame::encode_extents(Kind::Write, RegionId(8), &[extent(0, 1)], 0);
    assert!(refused(FULL, &unknown).contains("does not exist"));
    assert!(refused(FULL, &frame::encode_reply(1, 0)).contains("no read"));
}

#[test]
fn a_damaged_table_or_message_is_refused() {
    let mut write = frame::encode_extents(Kind::Write, REGION, &[extent(0, 16)], 0);
    write[HEADER_LEN] ^= 1;
    assert!(refused(FULL, &write).contains("checksum"));
    let mut message = frame::encode_message(Kind::Message, b"hello").to_vec();
    message.extend_from_slice(b"hellO");
    assert!(refused(FULL, &message).contains("checksum"));
    // A table whose checksum is right and whose lengths overflow, or do not add up.
    for lens in [[u64::MAX, 2], [1, 1]] {
        let table: Vec<u8> = lens
            .iter()
            .flat_map(|len| [0u64.to_le_bytes(), len.to_le_bytes()])
            .flatten()
            .collect();
        let check = crc32c::crc32c(&table);
        let header = Header {
            kind: Kind::Write,
            extents: 2,
            region: REGION,
            check,
            payload: 1,
            number: 0,
        };
        assert!(refused(FULL, &[&header.encode()[..], &table].concat()).contains("extents"));
    }
}

#[test]
fn a_reply_must_fit_its_read() {
    for (payload, number) in [(4096, 1), (4095, 0)] {
        let (regions, region) = regions(FULL);
        let mut receiver = Receiver::new(regions);
        assert_eq!(receiver.expect(Token(1), region, vec![extent(0, 4096)]), 0);
        let error = receiver.feed(&frame::encode_reply(payload, number), &mut VecDeque::new());
        assert!(matches!(error, Err(Error::PeerMisbehaved(_))));
    }
}

#[test]
fn replies_are_bounded() {
    let (_, region) = regions(FULL);
    let mut sender = Sender::default();
    for number in 0..MAX_QUEUED as u64 {
        assert!(sender.reply(region.clone(), vec![extent(0, 1)], number));
    }
    assert!(!sender.reply(region, vec![extent(0, 1)], 99));
}

#[test]
fn a_fault_is_the_peer_s_refusal() {
    let (regions, _) = regions(FULL);
    let bytes = [&frame::encode_message(Kind::Fault, b"why")[..], b"why"].concat();
    match Receiver::new(regions).feed(&bytes, &mut VecDeque::new()) {
        Err(Error::Refused(text)) => assert_eq!(text, "why"),
        other => panic!("{other:?}"),
    }
}

/// What a test sends.
#[derive(Clone, Debug)]
enum Sent {
    Write(Vec<Extent>),
    Message(usize),
}

fn sent() -> impl Strategy<Value = Sent> {
    let extent = (0..LEN - 9000, 1..9000u64).prop_map(|(offset, len)| Extent { offset, len });
    prop_oneof![
        prop::collection::vec(extent, 1..40).prop_map(Sent::Write),
        prop_oneof![1..100usize, 1..60_000usize].prop_map(Sent::Message),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the bytes are cut on their way, and whether they are fed, placed directly or written to a file, what arrives is what
    /// a plain copy would have made.
    #[test]
    fn what_is_sent_arrives(
        frames in prop::collection::vec(sent(), 1..8),
        cuts in prop::collection::vec(1..20_000usize, 1..20),
        directly: bool,
        by_file: bool,
    ) {
        let (_, from) = regions(FULL);
        let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
        from.copy_in(0, &bytes);
        let mut model = vec![0; LEN as usize];
        let mut sender = Sender::default();
        let mut messages = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let token = Token(index as u64);
            match frame {
                Sent::Write(extents) => {
                    for extent in extents {
                        let range = extent.offset as usize..(extent.offset + extent.len) as usize;
                        model[range.clone()].copy_from_slice(&bytes[range]);
                    }
                    sender.write(token, REGION, from.clone(), extents.clone());
                }
                Sent::Message(len) => {
                    messages.push(Event::Message(vec![index as u8; *len].into()));
                    sender.message(token, Bytes::from(vec![index as u8; *len]));
                }
            }
        }
        let mut events = VecDeque::new();
        let wire = drain(&mut sender, cuts[0], &mut events);
        let tokens: Vec<Event> = (0..frames.len()).map(|index| Event::Sent(Token(index as u64))).collect();
        prop_assert_eq!(events, tokens);

        let (regions, to) = regions(FULL);
        let file = Arc::new(File::from(memfd_create("to", MemfdFlags::CLOEXEC).unwrap()));
        file.set_len(LEN).unwrap();
        if by_file {
            regions.register(REGION, to.clone().backed_by(Arc::clone(&file)), FULL);
        }
        let mut receiver = Receiver::new(regions);
        let mut events = VecDeque::new();
        let mut rest = &wire[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let mut scatter = Scatter::default();
            if directly {
                receiver.direct(&mut scatter).unwrap();
            }
            let n = (*cut).min(rest.len());
            if scatter.len() > 0 {
                let n = scatter.copy_from(&rest[..n]).unwrap();
                receiver.landed(&mut scatter, n, &mut events).unwrap();
                rest = &rest[n..];
            } else {
                receiver.feed(&rest[..n], &mut events).unwrap();
                rest = &rest[n..];
            }
        }
        prop_assert!(receiver.at_boundary());
        prop_assert_eq!(events, messages);
        let mut got = vec![0; LEN as usize];
        if by_file {
            file.read_exact_at(&mut got, 0).unwrap();
        } else {
            to.copy_out(0, &mut got);
        }
        prop_assert!(got == model);
    }

    /// Whatever comes: an error or not, but no panic.
    #[test]
    fn hostile_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let (regions, _) = regions(FULL);
        let _ = Receiver::new(regions).feed(&bytes, &mut VecDeque::new());
    }

    /// The same with headers whose checksums are right.
    #[test]
    fn hostile_headers_do_no_harm(
        heads in prop::collection::vec((any::<[u8; 28]>(), 0..6u8, prop::collection::vec(any::<u8>(), 0..64)), 1..8),
    ) {
        let (regions, region) = regions(FULL);
        let mut receiver = Receiver::new(regions);
        receiver.expect(Token(0), region, vec![extent(0, 64)]);
        for (mut fields, kind, rest) in heads {
            fields[0] = kind;
            fields[1] = 0;
            fields[2] &= 3;
            fields[3] = 0;
            fields[12..20].iter_mut().skip(1).for_each(|byte| *byte = 0);
            let bytes = [&crc32c::crc32c(&fields).to_le_bytes()[..], &fields, &rest].concat();
            if receiver.feed(&bytes, &mut VecDeque::new()).is_err() {
                break;
            }
        }
    }
}
