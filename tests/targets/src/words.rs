//! Any values of the engines' words, most of them near those that mean something to the guest of these targets.

use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use pagecopy::engine::event::{FaultFigures, PostcopyCost, Quantiles};
use pagecopy::engine::{Failure, Fault, MigrationId};
use pagecopy::memory::{BlockId, BlockSpec, Piece, Run};
use pagecopy::wire::{AbortCode, Message, Secret, Standing};

/// The migration of every input.
pub(crate) const ID: MigrationId = MigrationId([7; 16]);

/// The guest's RAMBlocks: one of more than one digest's chunk, one of huge pages.
pub(crate) fn blocks() -> Vec<BlockSpec> {
    let spec = |name: &str, size, page_size| BlockSpec {
        name: name.to_owned(),
        size,
        page_size,
    };
    vec![spec("low", 5 << 20, 4096), spec("high", 8 << 20, 2 << 20)]
}

pub(crate) fn failure(what: &str) -> Failure {
    Failure::new(Fault::ThisHost, what, "nothing")
}

/// A pause: mostly none, sometimes longer than every time-out.
pub(crate) fn pause(input: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(match u8::arbitrary(input)? {
        0..=159 => Duration::ZERO,
        short @ 160..=239 => Duration::from_millis(u64::from(short) * 7),
        long => Duration::from_secs(u64::from(long) - 235),
    })
}

/// One of the things that nobody asked for; those of before post-copy as often as then.
pub(crate) fn sudden(choice: u8) -> u8 {
    match choice {
        0..=239 => choice % 10,
        _ => 10 + choice % 2,
    }
}

/// Runs inside the guest, or anywhere.
pub(crate) fn runs(input: &mut Unstructured<'_>, inside: bool) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for _ in 0..input.int_in_range(0..=6)? {
        let index = u16::from(u8::arbitrary(input)?);
        if !inside && index >= 0xf0 {
            runs.push(Run {
                block: BlockId(index),
                first: u64::arbitrary(input)?,
                pages: u64::arbitrary(input)?,
            });
            continue;
        }
        let index = index % 2;
        let pages = blocks()[usize::from(index)].pages();
        let first = u64::from(u16::arbitrary(input)?) % pages;
        let count = 1 + u64::from(u16::arbitrary(input)?) % (pages - first);
        runs.push(Run {
            block: BlockId(index),
            first,
            pages: count,
        });
    }
    Ok(runs)
}

/// Any digests.
pub(crate) fn digests(input: &mut Unstructured<'_>) -> Result<Vec<[u8; 16]>> {
    let (value, len) = (u8::arbitrary(input)? % 4, input.int_in_range(1..=3)?);
    Ok(vec![[value; 16]; len])
}

/// A piece or two, and perhaps one outside every block.
fn pieces(input: &mut Unstructured<'_>) -> Result<Vec<Piece>> {
    let mut end = 0;
    (0..input.int_in_range(1..=2)?)
        .map(|_| {
            let piece = Piece {
                offset: end + u64::from(u8::arbitrary(input)? % 5) * 4096,
                len: 4096 * input.int_in_range(1..=2)?,
            };
            end = piece.offset + piece.len;
            Ok(piece)
        })
        .collect()
}

fn encoded(input: &mut Unstructured<'_>) -> Result<Bytes> {
    let len = input.int_in_range(1..=40)?;
    Ok(Bytes::copy_from_slice(input.bytes(len)?))
}

/// `Copied` or `Deltas`.
pub(crate) fn encoded_message(input: &mut Unstructured<'_>, round: u32) -> Result<Message> {
    let block = u16::from(u8::arbitrary(input)? % 3);
    Ok(if bool::arbitrary(input)? {
        Message::Copied {
            block,
            zstd: bool::arbitrary(input)?,
            pieces: pieces(input)?,
            bytes: encoded(input)?,
        }
    } else {
        Message::Deltas {
            block,
            base_round: round,
            pieces: pieces(input)?,
            bytes: encoded(input)?,
        }
    })
}

/// Any message. `round` is one that the engine may be waiting for.
pub(crate) fn message(input: &mut Unstructured<'_>, round: u32) -> Result<Message> {
    let round = match u8::arbitrary(input)? {
        0 => u32::arbitrary(input)?,
        1 => round.wrapping_add(1),
        _ => round,
    };
    let kind = match u8::arbitrary(input)? {
        choice @ 0..=209 => choice % 21,
        choice @ 210..=251 => 21 + choice % 6,
        252 | 253 => 27,
        254 => 29,
        _ => 28,
    };
    Ok(match kind {
        0 => Message::Hello {
            version_min: u16::arbitrary(input)? % 3,
            version_max: u16::arbitrary(input)? % 3,
            capabilities: u64::arbitrary(input)?,
            id: ID,
            vm: "vm".to_owned(),
            host: "peer".to_owned(),
            verify: bool::arbitrary(input)?,
            blocks: blocks(),
        },
        1 => Message::Accept {
            version: u16::arbitrary(input)? % 3,
            capabilities: u64::from(u8::arbitrary(input)? % 3),
            host: "peer".to_owned(),
            reason: "no".to_owned(),
        },
        27 => encoded_message(input, round)?,
        2 => Message::Populate(runs(input, false)?),
        3 => Message::Zero(runs(input, false)?),
        4 => Message::Barrier { round },
        5 => Message::BarrierReached { round },
        6 => Message::Ping {
            nonce: u64::arbitrary(input)?,
        },
        7 => Message::Pong {
            nonce: u64::arbitrary(input)?,
        },
        8 => Message::Stopped { final_round: round },
        9 => Message::DeviceState(Bytes::from(vec![1; 1 + usize::from(u8::arbitrary(input)?)])),
        10 => Message::DeviceStateEnd {
            bytes: u64::from(u8::arbitrary(input)?),
            crc: u32::arbitrary(input)?,
        },
        11 => Message::Digests {
            block: u16::from(u8::arbitrary(input)? % 3),
            first: u64::from(u8::arbitrary(input)? % 3),
            digests: digests(input)?,
        },
        12 => Message::ChunkDiffers {
            block: u16::from(u8::arbitrary(input)? % 3),
            chunk: u64::from(u8::arbitrary(input)? % 3),
        },
        13 => Message::PageDigests {
            block: u16::from(u8::arbitrary(input)? % 3),
            chunk: u64::from(u8::arbitrary(input)? % 3),
            digests: digests(input)?,
        },
        14 => Message::Loaded,
        15 => Message::Commit,
        16 => Message::Running,
        17 => Message::Closed,
        18 => Message::Query { id: id(input)? },
        19 => Message::Answer {
            id: id(input)?,
            standing: *input.choose(&Standing::ALL)?,
        },
        21 => Message::Lacking {
            block: u16::from(u8::arbitrary(input)? % 3),
            first: u64::from(u8::arbitrary(input)?) * 32,
            words: vec![u64::arbitrary(input)?; input.int_in_range(1..=2)?],
        },
        22 => Message::LackingEnd {
            pages: u64::from(u8::arbitrary(input)?),
            background: u64::arbitrary(input)?,
            sent: u64::arbitrary(input)?,
        },
        23 => Message::Serve { id: id(input)? },
        24 => Message::Resumed,
        25 => Message::Lacks {
            bytes: u64::arbitrary(input)?,
            faults: faults(input)?,
        },
        26 => Message::Whole {
            id: id(input)?,
            cost: input.ratio(3, 4)?.then_some(PostcopyCost {
                faults: faults(input)?,
                postcopy_us: u64::arbitrary(input)?,
                paused_us: u64::arbitrary(input)?,
            }),
        },
        29 => match u8::arbitrary(input)? {
            0 => Message::Compare {
                vm: "vm".to_owned(),
                force: bool::arbitrary(input)?,
            },
            2 => Message::Join {
                id: id(input)?,
                first: u16::arbitrary(input)?,
                key: Secret([3; 32]),
            },
            4 => Message::AddChannels {
                first: u16::arbitrary(input)?,
                channels: u16::from(u8::arbitrary(input)? % 8),
                key: Secret([3; 32]),
            },
            6 => Message::ChannelsTaken {
                first: u16::arbitrary(input)?,
                taken: bool::arbitrary(input)?,
                reason: "because".to_owned(),
            },
            8 => Message::Leave { round },
            odd if odd % 2 == 1 => Message::Preflight {
                vm: "vm".to_owned(),
                host: "peer".to_owned(),
                ram: u64::arbitrary(input)?,
            },
            _ => Message::Findings {
                facts: "{}".to_owned(),
            },
        },
        28 => Message::Lost {
            id: id(input)?,
            reason: "gone".to_owned(),
        },
        _ => Message::Abort {
            code: *input.choose(&AbortCode::ALL)?,
            reason: "because".to_owned(),
        },
    })
}

/// Any figures, in no order.
pub(crate) fn faults(input: &mut Unstructured<'_>) -> Result<FaultFigures> {
    Ok(FaultFigures {
        faults: u64::arbitrary(input)?,
        faults_waiting: u64::from(u8::arbitrary(input)?),
        fault_us: Quantiles {
            p50: u64::arbitrary(input)?,
            max: u64::arbitrary(input)?,
            ..Quantiles::default()
        },
    })
}

/// The migration's, or another.
fn id(input: &mut Unstructured<'_>) -> Result<MigrationId> {
    Ok(if u8::arbitrary(input)? < 0xe0 {
        ID
    } else {
        MigrationId([9; 16])
    })
}
