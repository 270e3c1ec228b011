//! The codec against golden samples, against itself, against hostile bytes, and against `WIRE.md` (`document.rs`).
#![allow(clippy::unwrap_used)]

mod document;
mod strategies;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use self::strategies::{of_numbers, with_payload};
use super::table::TABLE;
use super::{AbortCode, Blame, Message, Part, PartKind, Secret, Standing, WireError, capability};
use crate::engine::MigrationId;
use crate::engine::event::{FaultFigures, PostcopyCost, Quantiles};
use crate::limits;
use crate::memory::{BlockId, BlockSpec, Piece, Run};

fn ram() -> BlockSpec {
    BlockSpec {
        name: "ram".into(),
        size: 0x20_0000,
        page_size: 0x1000,
    }
}

fn run() -> Run {
    Run {
        block: BlockId(1),
        first: 2,
        pages: 3,
    }
}

const PIECE: Piece = Piece {
    offset: 0x3000,
    len: 0x2000,
};

const ID: MigrationId = MigrationId([0xab; 16]);
const ID_HEX: &str = "abababababababababababababababab";

fn faults() -> FaultFigures {
    FaultFigures {
        faults: 7,
        faults_waiting: 1,
        fault_us: Quantiles {
            p50: 0x20,
            p99: 0x40,
            p999: 0x80,
            max: 0x100,
        },
    }
}

const FAULTS_HEX: &str = "0700000000000000 0100000000000000 2000000000000000 4000000000000000 8000000000000000 \
                          0001000000000000";

/// One of every message, for the engines' tables of what is legal when.
pub(crate) fn one_of_each() -> Vec<Message> {
    samples().into_iter().map(|(message, _)| message).collect()
}

/// One sample of every message, in the table's order, with its bytes in hex.
fn samples() -> Vec<(Message, String)> {
    let run_hex = "0100 0200000000000000 0300000000000000";
    let digest = "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd";
    vec![
        (
            Message::Hello {
                version_min: 1,
                version_max: 2,
                capabilities: capability::VERIFY,
                id: ID,
                vm: "vm".into(),
                host: "a".into(),
                verify: true,
                blocks: vec![ram()],
            },
            format!(
                "0100 0100 0200 0100000000000000 {ID_HEX} 02000000 766d 01000000 61 01 \
                 01000000 03000000 72616d 0000200000000000 0010000000000000"
            ),
        ),
        (
            Message::Accept {
                version: 1,
                capabilities: 1,
                host: "b".into(),
                reason: "no".into(),
            },
            "0200 0100 0100000000000000 01000000 62 02000000 6e6f".into(),
        ),
        (
            Message::Populate(vec![run()]),
            format!("0300 01000000 {run_hex}"),
        ),
        (
            Message::Zero(vec![run(), run()]),
            format!("0400 02000000 {run_hex} {run_hex}"),
        ),
        (Message::Barrier { round: 7 }, "0500 07000000".into()),
        (Message::BarrierReached { round: 7 }, "0600 07000000".into()),
        (
            Message::Ping { nonce: 1 << 40 },
            "0700 0000000000010000".into(),
        ),
        (
            Message::Pong { nonce: 1 << 40 },
            "0800 0000000000010000".into(),
        ),
        (Message::Stopped { final_round: 9 }, "0900 09000000".into()),
        (
            Message::DeviceState(Bytes::from_static(b"QEVM")),
            "0a00 04000000 5145564d".into(),
        ),
        (
            Message::DeviceStateEnd {
                bytes: 4,
                crc: 0x1234_5678,
            },
            "0b00 0400000000000000 78563412".into(),
        ),
        (
            Message::Digests {
                block: 1,
                first: 2,
                digests: vec![[0xcd; 16]],
            },
            format!("0c00 0100 0200000000000000 01000000 {digest}"),
        ),
        (
            Message::ChunkDiffers { block: 1, chunk: 2 },
            "0d00 0100 0200000000000000".into(),
        ),
        (
            Message::PageDigests {
                block: 1,
                chunk: 2,
                digests: vec![[0xcd; 16]],
            },
            format!("0e00 0100 0200000000000000 01000000 {digest}"),
        ),
        (Message::Loaded, "0f00".into()),
        (Message::Commit, "1000".into()),
        (Message::Running, "1100".into()),
        (Message::Closed, "1200".into()),
        (Message::Query { id: ID }, format!("1300 {ID_HEX}")),
        (
            Message::Answer {
                id: ID,
                standing: Standing::Aborted,
            },
            format!("1400 {ID_HEX} 02"),
        ),
        (
            Message::Abort {
                code: AbortCode::Qemu,
                reason: "no".into(),
            },
            "1500 0700 02000000 6e6f".into(),
        ),
        (Message::Withdrawn { id: ID }, format!("1600 {ID_HEX}")),
        (
            Message::Lacking {
                block: 1,
                first: 64,
                words: vec![1, 0x8000_0000_0000_0000],
            },
            "1700 0100 4000000000000000 02000000 0100000000000000 0000000000000080".into(),
        ),
        (
            Message::LackingEnd {
                pages: 2,
                background: 1 << 20,
                sent: 3 << 20,
            },
            "1800 0200000000000000 0000100000000000 0000300000000000".into(),
        ),
        (Message::Serve { id: ID }, format!("1900 {ID_HEX}")),
        (Message::Resumed, "1a00".into()),
        (
            Message::Lacks {
                bytes: 8192,
                faults: faults(),
            },
            format!("1b00 0020000000000000 {FAULTS_HEX}"),
        ),
        (
            Message::Whole {
                id: ID,
                cost: Some(PostcopyCost {
                    faults: faults(),
                    postcopy_us: 0x10_0000,
                    paused_us: 0x1000,
                }),
            },
            format!("1c00 {ID_HEX} 01 {FAULTS_HEX} 0000100000000000 0010000000000000"),
        ),
        (
            Message::Lost {
                id: ID,
                reason: "no".into(),
            },
            format!("1d00 {ID_HEX} 02000000 6e6f"),
        ),
        (
            Message::Copied {
                block: 1,
                zstd: true,
                pieces: vec![PIECE],
                bytes: Bytes::from_static(&[9, 8]),
            },
            "1e00 0100 01 01000000 0030000000000000 0020000000000000 02000000 0908".into(),
        ),
        (
            Message::Deltas {
                block: 1,
                base_round: 3,
                pieces: vec![PIECE],
                bytes: Bytes::from_static(&[7]),
            },
            "1f00 0100 03000000 01000000 0030000000000000 0020000000000000 01000000 07".into(),
        ),
        (
            Message::RdmaOffer {
                channels: 2,
                bytes: 1 << 30,
            },
            "2000 0200 0000004000000000".into(),
        ),
        (
            Message::RdmaAnswer {
                address: "[::1]:9".into(),
                secret: Secret([0xab; 32]),
                reason: "no".into(),
            },
            format!(
                "2100 07000000 5b3a3a315d3a39 {} 02000000 6e6f",
                "ab".repeat(32)
            ),
        ),
        (
            Message::Preflight {
                vm: "vm".into(),
                host: "a".into(),
                ram: 0x20_0000,
            },
            "2200 02000000 766d 01000000 61 0000200000000000".into(),
        ),
        (
            Message::Findings { facts: "{}".into() },
            "2300 02000000 7b7d".into(),
        ),
        (
            Message::Spawn {
                id: ID,
                vm: "vm".into(),
                host: "a".into(),
                arguments: vec!["q".into(), "-S".into(), String::new()],
                parts: vec![Part {
                    kind: PartKind::Image,
                    name: "d0".into(),
                    what: "/a".into(),
                }],
            },
            format!(
                "2400 {ID_HEX} 02000000 766d 01000000 61 03000000 01000000 71 02000000 2d53 00000000 \
                 01000000 04 02000000 6430 02000000 2f61"
            ),
        ),
        (
            Message::Spawned {
                id: ID,
                blame: Blame::Request,
                text: "no".into(),
                remedy: "do".into(),
            },
            format!("2500 {ID_HEX} 01 02000000 6e6f 02000000 646f"),
        ),
        (
            Message::RdmaBroken { received: 3 },
            "2600 0300000000000000".into(),
        ),
        (Message::RdmaBack, "2700".into()),
        (Message::RdmaTaken { taken: true }, "2800 01".into()),
        (
            Message::Compare {
                vm: "vm".into(),
                force: true,
            },
            "2900 02000000 766d 01".into(),
        ),
        (
            Message::Join {
                id: ID,
                first: 3,
                key: Secret([0xab; 32]),
            },
            format!("3500 {ID_HEX} 0300 {}", "ab".repeat(32)),
        ),
        (
            Message::AddChannels {
                first: 3,
                channels: 2,
                key: Secret([0xab; 32]),
            },
            format!("3600 0300 0200 {}", "ab".repeat(32)),
        ),
        (
            Message::ChannelsTaken {
                first: 3,
                taken: true,
                reason: "no".into(),
            },
            "3700 0300 01 02000000 6e6f".into(),
        ),
        (Message::Leave { round: 7 }, "3800 07000000".into()),
    ]
}

pub(super) fn from_hex(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn every_message_has_the_bytes_of_its_golden_sample() {
    let samples = samples();
    let names: Vec<&str> = samples.iter().map(|(message, _)| message.name()).collect();
    assert_eq!(
        names,
        TABLE.iter().map(|(_, name)| *name).collect::<Vec<_>>(),
        "one sample each"
    );
    for (message, hex) in samples {
        let bytes = from_hex(&hex);
        assert_eq!(message.encode(), bytes, "{message:?}");
        assert_eq!(Message::decode(&bytes), Ok(message));
    }
}

#[test]
fn a_message_cut_short_or_with_bytes_behind_it_is_refused() {
    for (message, hex) in samples() {
        let bytes = from_hex(&hex);
        for len in 0..bytes.len() {
            let error = Message::decode(&bytes[..len]).unwrap_err();
            assert!(
                matches!(error, WireError::Truncated(_)),
                "{} cut to {len}: {error}",
                message.name()
            );
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(
            Message::decode(&longer),
            Err(WireError::TrailingBytes(1)),
            "{}",
            message.name()
        );
    }
}

#[test]
fn an_unknown_type_is_refused() {
    for number in [0, 42, u16::MAX] {
        assert_eq!(
            Message::decode(&number.to_le_bytes()),
            Err(WireError::UnknownType(number))
        );
    }
}

/// Bytes that break one rule each.
#[test]
fn figures_outside_their_rules_are_refused() {
    let hello = |tail: &str| {
        format!("0100 0100 0100 0000000000000000 {ID_HEX} 01000000 76 01000000 61 {tail}")
    };
    // Enough bytes behind it that what is counted could be there.
    let copied = |tail: &str| format!("1e00 0000 00 {tail} {}", "00".repeat(0x500));
    let cases = [
        (hello("02"), "verify is not valid"),
        (hello("00 00000000"), "at least one RAMBlock"),
        (hello("00 41000000"), "blocks is 65, above its limit of 64"),
        (
            hello("00 01000000 00000000 0010000000000000 0010000000000000 00"),
            "a name is not empty",
        ),
        (
            hello("00 01000000 01000000 61 0010000000000000 0018000000000000"),
            "power of two",
        ),
        (
            hello("00 01000000 01000000 61 0000400000000000 0000400000000000"),
            "power of two",
        ),
        (
            hello("00 01000000 01000000 61 0018000000000000 0010000000000000"),
            "whole number of pages",
        ),
        (
            hello("00 01000000 01000000 61 0000000000000000 0010000000000000"),
            "whole number of pages",
        ),
        (
            hello("00 01000000 01000000 61 0010000000004000 0010000000000000"),
            "block size is",
        ),
        (
            hello(
                "00 02000000 01000000 61 0010000000000000 0010000000000000 \
                 01000000 61 0010000000000000 0010000000000000",
            ),
            "the same name",
        ),
        (
            "0200 0100 0000000000000000 00010000".into(),
            "host is 256, above its limit of 255",
        ),
        (
            "0200 0100 0000000000000000 01000000 0a".into(),
            "no control characters",
        ),
        ("0200 0100 0000000000000000 01000000 ff".into(), "UTF-8"),
        ("0400 00000000".into(), "a list of runs is not empty"),
        (
            "0400 01010000".into(),
            "runs is 257, above its limit of 256",
        ),
        (
            "0400 01000000 4000 0000000000000000 0100000000000000".into(),
            "run block is 64",
        ),
        (
            "0400 01000000 0000 0000000000000000 0000000000000000".into(),
            "a run has a page",
        ),
        (
            "0400 01000000 0000 ffffffffffffffff 0100000000000000".into(),
            "largest RAMBlock",
        ),
        ("0a00 00000000".into(), "not empty"),
        (
            "0a00 01000400".into(),
            "bytes is 262145, above its limit of 262144",
        ),
        (
            "0c00 0000 0000000000000000 01080000".into(),
            "digests is 2049, above its limit of 2048",
        ),
        ("1500 0000 00000000".into(), "no such abort code"),
        ("1500 0e00 00000000".into(), "no such abort code"),
        (
            "1500 0100 01040000".into(),
            "reason is 1025, above its limit of 1024",
        ),
        (format!("1400 {ID_HEX} 07"), "no such standing"),
        (
            "1700 0000 0000000000000000 00000000".into(),
            "a piece of a bitmap is not empty",
        ),
        (
            "1700 0000 0000000000000000 01100000".into(),
            "words is 4097, above its limit of 4096",
        ),
        ("2300 01000000 7b".into(), "two bytes at least"),
        ("2300 02000000 7b0a".into(), "no control characters"),
        (
            "2300 01000200".into(),
            "facts is 131073, above its limit of 131072",
        ),
        ("1e00 0000 02".into(), "a flag is 0 or 1"),
        (copied("00000000"), "a list of pieces is not empty"),
        (copied("41000000"), "pieces is 65, above its limit of 64"),
        (
            copied("01000000 0000000000000000 0010040000000000"),
            "piece length is 266240, above its limit of 262144",
        ),
        (
            copied("02000000 0000000000000000 0000040000000000 0000040000000000 0010000000000000"),
            "piece length is 4096, above its limit of 0",
        ),
        (
            copied("01000000 0000000000000000 0000000000000000"),
            "whole units of 4 KiB",
        ),
        (
            copied("01000000 0000000000000000 0108000000000000"),
            "whole units of 4 KiB",
        ),
        (
            copied("01000000 0008000000000000 0010000000000000"),
            "whole units of 4 KiB",
        ),
        (
            copied("02000000 0010000000000000 0010000000000000 0010000000000000 0010000000000000"),
            "in order and apart",
        ),
        (
            copied("01000000 00f0ffffffffffff 0010000000000000"),
            "piece offset is",
        ),
        (
            copied("01000000 0000000000000000 0010000000000000 00000000"),
            "no page is encoded as nothing",
        ),
        (
            copied("01000000 0000000000000000 0010000000000000 01000400"),
            "bytes is 262145, above its limit of 262144",
        ),
    ];
    for (hex, expected) in cases {
        let error = Message::decode(&from_hex(&hex)).unwrap_err().to_string();
        assert!(error.contains(expected), "{hex}: {error}");
    }
}

#[test]
fn a_reason_of_ours_is_cut_and_cleaned_rather_than_refused() {
    let long = format!("line\nline {}", "ü".repeat(2000));
    let abort = Message::Abort {
        code: AbortCode::Host,
        reason: long,
    };
    let Ok(Message::Abort { reason, .. }) = Message::decode(&abort.encode()) else {
        panic!()
    };
    assert!(reason.starts_with("line line ü") && reason.len() >= limits::MAX_REASON - 3);
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(message in prop_oneof![with_payload(), of_numbers()]) {
        prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn hostile_bytes_do_not_panic_and_what_they_mean_has_one_form(
        number in 0u16..40,
        rest in vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0..200),
    ) {
        let bytes = [number.to_le_bytes().as_slice(), &rest].concat();
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(message.encode(), bytes);
        }
    }

    #[test]
    fn a_spoiled_message_does_not_panic(message in with_payload(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = message.encode().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(message.encode(), bytes);
        }
    }
}
