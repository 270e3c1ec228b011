//! Encoded pages from a hostile source: nothing lands outside its place, what is refused is not placed at all and is the peer's
//! fault, and a delta that is taken makes the page that it was made of.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use pagecopy::engine::encoding::{Encodings, Page, UNIT, delta};
use pagecopy::host::decode::{DecodeError, Decoder};
use pagecopy::host::{OutOfBounds, Placer};
use pagecopy::memory::{BlockId, BlockSpec, Piece, Run};
use pagecopy::wire::Message;

use crate::words;

const UNITS: usize = 4;
/// Messages of one input.
const MOST: usize = 6;

/// One RAMBlock.
struct Memory(Mutex<[u8; UNITS * UNIT]>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, [u8; UNITS * UNIT]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An offset in the block; the slice that it is for panics where it is outside.
fn at(block: BlockId, offset: u64) -> usize {
    assert_eq!(block, BlockId(0), "a block that does not exist");
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl Placer for Memory {
    fn clear(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _: Run) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.lock()[at(block, offset)..][..into.len()]);
        Ok(())
    }

    fn place(&self, block: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.lock()[at(block, offset)..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, _: Run) -> std::result::Result<(), OutOfBounds> {
        Ok(())
    }
}

/// See the module's text.
///
/// # Panics
/// A rule is broken.
pub fn encoded(data: &[u8]) {
    // An input that ends early is a short run.
    let _ = run(&mut Unstructured::new(data));
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let memory = Memory(Mutex::new([0; UNITS * UNIT]));
    let spec = BlockSpec {
        name: "ram".to_owned(),
        size: (UNITS * UNIT) as u64,
        page_size: 4096,
    };
    let encodings = Encodings {
        zstd: u8::arbitrary(input)? < 0xf0,
        delta: u8::arbitrary(input)? < 0xf0,
    };
    let mut decoder = Decoder::new(encodings, Arc::new([spec]));
    for round in 0..MOST {
        let round = u32::try_from(round).unwrap_or(0);
        let before = *memory.lock();
        let (message, result) = message(input, round, &before)?;
        match decoder.take(&message, &memory) {
            Ok(())
                if result
                    .is_some_and(|(unit, page)| memory.lock()[unit * UNIT..][..UNIT] != page) =>
            {
                panic!("another page than was encoded")
            }
            Ok(()) => {}
            Err(DecodeError::Peer(what)) => {
                assert!(!what.is_empty());
                assert!(*memory.lock() == before, "what was refused was placed");
            }
            Err(DecodeError::Host(error)) => panic!("not this host's fault: {error}"),
        }
        if bool::arbitrary(input)? {
            decoder.barrier(round);
        }
    }
    Ok(())
}

type Expected = Option<(usize, Page)>;

/// A message, and what it must make of a page if it is taken.
fn message(
    input: &mut Unstructured<'_>,
    round: u32,
    memory: &[u8; UNITS * UNIT],
) -> Result<(Message, Expected)> {
    if u8::arbitrary(input)? < 0x60 {
        return Ok((words::encoded_message(input, round)?, None));
    }
    // A delta as it should be, or one that has a byte changed.
    let unit = input.int_in_range(0..=UNITS - 1)?;
    let Some(base) = memory[unit * UNIT..].first_chunk::<UNIT>() else {
        return Ok((words::encoded_message(input, round)?, None));
    };
    let mut page = *base;
    for _ in 0..input.int_in_range(0..=5)? {
        page[usize::from(u16::arbitrary(input)?) % UNIT] = u8::arbitrary(input)?;
    }
    let mut bytes = Vec::new();
    delta::encode(base, &page, 2 * UNIT, &mut bytes);
    let spoiled = u8::arbitrary(input)? < 0x40;
    if spoiled {
        let index = usize::from(u16::arbitrary(input)?) % bytes.len();
        bytes[index] ^= u8::arbitrary(input)?;
    }
    let message = Message::Deltas {
        block: 0,
        base_round: round.wrapping_sub(u32::from(u8::arbitrary(input)? % 3)),
        pieces: vec![Piece {
            offset: (unit * UNIT) as u64,
            len: UNIT as u64,
        }],
        bytes: Bytes::from(bytes),
    };
    Ok((message, (!spoiled).then_some((unit, page))))
}
