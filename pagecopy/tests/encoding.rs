//! Encoded pages from one memory to another: whatever the choices are, the pages that were sent arrive; and what a hostile
//! source sends ends in an error that names it.
#![allow(clippy::disallowed_types, clippy::unwrap_used, missing_docs)]

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pagecopy::engine::encoding::policy::Choice;
use pagecopy::engine::encoding::versions::Versions;
use pagecopy::engine::encoding::{Encoded, Encodings, UNIT};
use pagecopy::host::decode::{DecodeError, Decoder};
use pagecopy::host::encode::{Encoder, Part, chunks};
use pagecopy::host::{Digest, OutOfBounds, Placer, Ram};
use pagecopy::limits::MAX_ENCODED;
use pagecopy::memory::{BlockId, BlockSpec, Piece, Run};
use pagecopy::wire::Message;
use proptest::prelude::*;

const UNITS: usize = 96;
const BLOCK: BlockId = BlockId(0);

/// One RAMBlock of bytes.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn new() -> Memory {
        Memory(Mutex::new(vec![0; UNITS * UNIT]))
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Ram for Memory {
    fn populated(&self, _: &mut Vec<Run>) -> io::Result<()> {
        Ok(())
    }

    fn is_zero(&self, _: BlockId, _: u64, _: u64) -> bool {
        false
    }

    fn read(&self, _: BlockId, offset: u64, into: &mut [u8]) {
        let at = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.0.lock().unwrap()[at..at + into.len()]);
    }

    fn digests(&self, _: BlockId) -> io::Result<Vec<Digest>> {
        Ok(Vec::new())
    }

    fn page_digests(&self, _: BlockId, _: u64) -> Vec<Digest> {
        Vec::new()
    }
}

impl Placer for Memory {
    fn clear(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _: Run) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ram::read(self, block, offset, into);
        Ok(())
    }

    fn place(&self, _: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, _: Run) -> Result<(), OutOfBounds> {
        Ok(())
    }
}

fn specs() -> Arc<[BlockSpec]> {
    let spec = BlockSpec {
        name: "ram".into(),
        size: (UNITS * UNIT) as u64,
        page_size: 4096,
    };
    Arc::new([spec])
}

/// A source with two channels, its destination, and the bytes that should be there.
struct Pair {
    source: Memory,
    destination: Memory,
    encoders: [Encoder; 2],
    decoders: [Decoder; 2],
    encoded: Encoded,
}

impl Pair {
    fn new(cache: u64) -> Pair {
        let versions = Arc::new(Mutex::new(Versions::new(cache)));
        Pair {
            source: Memory::new(),
            destination: Memory::new(),
            encoders: [(); 2].map(|()| Encoder::new(Arc::clone(&versions))),
            decoders: [(); 2].map(|()| Decoder::new(Encodings::ALL, specs())),
            encoded: Encoded::default(),
        }
    }

    /// Sends units on a channel.
    fn send(&mut self, channel: usize, round: u32, choice: Choice, units: &[usize]) {
        let extents: Vec<_> = units
            .iter()
            .map(|unit| (BLOCK, (unit * UNIT) as u64, UNIT as u64))
            .collect();
        let mut parts = Vec::new();
        for (block, pieces) in chunks(&extents) {
            let cost = self.encoders[channel].encode(
                &self.source,
                round,
                choice,
                block,
                pieces,
                &mut parts,
            );
            self.encoded = self.encoded.and(cost.encoded);
        }
        for part in parts {
            match part {
                Part::AsItIs(block, pieces) => {
                    for piece in pieces {
                        let mut bytes = vec![0; usize::try_from(piece.len).unwrap()];
                        Ram::read(&self.source, block, piece.offset, &mut bytes);
                        self.destination.place(block, piece.offset, &bytes).unwrap();
                    }
                }
                Part::Message(message, _) => {
                    let message = Message::decode(&message.encode()).unwrap();
                    self.decoders[channel]
                        .take(&message, &self.destination)
                        .unwrap();
                }
            }
        }
    }

    fn barrier(&mut self, round: u32) {
        for decoder in &mut self.decoders {
            decoder.barrier(round);
        }
    }

    fn write(&self, unit: usize, word: usize, value: u64, pattern: bool) {
        let mut bytes = self.source.0.lock().unwrap();
        let page = &mut bytes[unit * UNIT..][..UNIT];
        if pattern {
            let mut state = value | 1;
            for word in page.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
        }
        page[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }
}

fn choice() -> impl Strategy<Value = Choice> {
    (
        prop::option::of(prop::sample::select(vec![-4, 1, 3, 5])),
        any::<bool>(),
    )
        .prop_map(|(zstd, delta)| Choice { zstd, delta })
}

type Writes = Vec<(usize, usize, u64, bool)>;

fn writes() -> impl Strategy<Value = Writes> {
    prop::collection::vec(
        (
            0..UNITS,
            0..UNIT / 8,
            any::<u64>(),
            prop::bool::weighted(0.2),
        ),
        1..60,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_was_sent_arrives(
        cache in 0..600_000_u64,
        rounds in prop::collection::vec((writes(), choice(), choice(), any::<u8>()), 1..6),
    ) {
        let mut pair = Pair::new(cache);
        for (round, (writes, one, other, split)) in (0..).zip(rounds) {
            let mut dirty: Vec<usize> = writes.iter().map(|(unit, ..)| *unit).collect();
            dirty.sort_unstable();
            dirty.dedup();
            for (unit, word, value, pattern) in writes {
                pair.write(unit, word, value, pattern);
            }
            let (first, second) = dirty.split_at(usize::from(split) % (dirty.len() + 1));
            pair.send(0, round, one, first);
            pair.send(1, round, other, second);
            pair.barrier(round);
            prop_assert!(pair.source.bytes() == pair.destination.bytes());
        }
    }
}

const BEST: Choice = Choice {
    zstd: Some(1),
    delta: true,
};

#[test]
fn each_page_goes_by_what_is_smallest() {
    let mut pair = Pair::new(1 << 20);
    for unit in 0..UNITS {
        pair.write(unit, 0, unit as u64 + 7, unit % 2 == 0);
    }
    let all: Vec<usize> = (0..UNITS).collect();
    pair.send(0, 1, BEST, &all);
    pair.barrier(1);
    let first = pair.encoded;
    assert_eq!(first.delta_bytes, 0);
    pair.write(3, 9, 5, false);
    pair.write(4, 9, 5, false);
    pair.write(5, 0, 77, true);
    pair.send(1, 2, BEST, &[3, 4, 5]);
    assert_eq!(
        (pair.encoded.delta_bytes, pair.encoded.delta_sent),
        (2 * 4096, 2 * 21)
    );
    assert!(pair.source.bytes() == pair.destination.bytes());
}

#[test]
fn what_does_not_compress_goes_straight_from_the_guests_memory() {
    let mut pair = Pair::new(0);
    pair.write(0, 0, 9, true);
    let mut parts = Vec::new();
    let pieces = vec![Piece {
        offset: 0,
        len: 4096,
    }];
    let cost = pair.encoders[0].encode(&pair.source, 1, BEST, BLOCK, pieces.clone(), &mut parts);
    assert_eq!(parts, [Part::AsItIs(BLOCK, pieces)]);
    assert_eq!(
        (cost.encoded, cost.compressed.0),
        (Encoded::default(), 4096)
    );
}

fn taken(message: &Message) -> Result<(), String> {
    let memory = Memory::new();
    let mut decoder = Decoder::new(Encodings::ALL, specs());
    decoder.barrier(0);
    let result = decoder.take(message, &memory);
    if result.is_err() {
        assert!(
            memory.bytes().iter().all(|byte| *byte == 0),
            "something was placed"
        );
    }
    match result {
        Err(DecodeError::Host(error)) => panic!("not this host's fault: {error}"),
        other => other.map_err(|error| error.to_string()),
    }
}

fn packed(bytes: Vec<u8>, len: u64) -> Message {
    Message::Copied {
        block: 0,
        zstd: true,
        pieces: vec![Piece { offset: 4096, len }],
        bytes: bytes.into(),
    }
}

fn compressed(len: usize) -> Vec<u8> {
    zstd::bulk::compress(&vec![7; len], 1).unwrap()
}

#[test]
fn a_decompression_bomb_ends_in_an_error() {
    assert_eq!(taken(&packed(compressed(4096), 4096)), Ok(()));
    for len in [4097, MAX_ENCODED, 1 << 30] {
        let error = taken(&packed(compressed(len), 4096)).unwrap_err();
        assert!(error.contains("cannot be read"), "{error}");
    }
    // Frames one after the other: together they are too much.
    let two = [compressed(4096), compressed(4096)].concat();
    assert!(taken(&packed(two, 4096)).is_err());
    // Without the size in its head.
    let mut streamed = Vec::new();
    let mut encoder = zstd::stream::Encoder::new(&mut streamed, 1).unwrap();
    io::Write::write_all(&mut encoder, &vec![0; 50 << 20]).unwrap();
    encoder.finish().unwrap();
    assert!(streamed.len() < MAX_ENCODED && taken(&packed(streamed, 8192)).is_err());
}

#[test]
fn too_few_or_broken_bytes_end_in_an_error() {
    assert!(
        taken(&packed(compressed(4095), 4096))
            .unwrap_err()
            .contains("4095 bytes")
    );
    assert!(taken(&packed(vec![1, 2, 3], 4096)).is_err());
    let copied = |bytes: usize| Message::Copied {
        block: 0,
        zstd: false,
        pieces: vec![Piece {
            offset: 0,
            len: 4096,
        }],
        bytes: vec![1; bytes].into(),
    };
    assert_eq!(taken(&copied(4096)), Ok(()));
    assert!(taken(&copied(4095)).is_err() && taken(&copied(4097)).is_err());
    let deltas = |base_round, bytes: &[u8]| Message::Deltas {
        block: 0,
        base_round,
        pieces: vec![Piece {
            offset: 0,
            len: 4096,
        }],
        bytes: Bytes::copy_from_slice(bytes),
    };
    let same = [crc32c::crc32c(&[0; UNIT]).to_le_bytes().as_slice(), &[0; 8]].concat();
    assert_eq!(taken(&deltas(0, &same)), Ok(()));
    assert!(
        taken(&deltas(1, &same))
            .unwrap_err()
            .contains("not in place")
    );
    assert!(
        taken(&deltas(0, &[same.as_slice(), &[0]].concat()))
            .unwrap_err()
            .contains("follow")
    );
    assert!(
        taken(&deltas(0, &same[..11]))
            .unwrap_err()
            .contains("fewer")
    );
    assert!(taken(&deltas(0, &[1; 12])).is_err());
}
