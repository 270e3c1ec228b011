//! Encodes the pages of a batch at the source, as the policy says. One encoder a channel; what was sent last is shared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use zstd::bulk::Compressor;

use super::Ram;
use crate::engine::encoding::policy::Choice;
use crate::engine::encoding::versions::{Key, Versions};
use crate::engine::encoding::{Encoded, Page, UNIT, delta};
use crate::limits::{MAX_ENCODED, MAX_PIECES};
use crate::memory::{BlockId, Piece};
use crate::wire::Message;

/// A delta that is larger than this does not pay beside compression.
const MAX_DELTA: usize = UNIT / 2;
/// Of 16 parts, what compressed pages may have at most: otherwise they go as they are.
const WORTH: usize = 15;
/// Bytes of a sample.
const SAMPLE: usize = 64 << 10;

/// How a part of a batch goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Straight from the guest's memory.
    AsItIs(BlockId, Vec<Piece>),
    /// As a message of so many bytes of pages.
    Message(Message, u64),
}

/// What encoding has cost, and what it was for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// What went encoded.
    pub encoded: Encoded,
    /// Bytes of pages that went as a copy, as they are.
    pub copied: u64,
    /// Time in which pages were compressed.
    pub compressing: Duration,
    /// Bytes that were compressed in it, worth it or not, and to how many.
    pub compressed: (u64, u64),
    /// Time in which pages were compared with their versions.
    pub comparing: Duration,
    /// Bytes that were compared.
    pub compared: u64,
}

/// Encodes. Made once for a channel: its buffers and the compressor's context are used again.
pub struct Encoder {
    versions: Arc<Mutex<Versions>>,
    /// There may be some: otherwise nobody waits for the others' lock.
    keeps: bool,
    compressor: Option<(i32, Compressor<'static>)>,
    sampler: Option<(i32, Compressor<'static>)>,
    /// Copies of the pages of one message.
    pages: Vec<u8>,
    packed: Vec<u8>,
}

impl Encoder {
    /// With what all channels of the connection have sent.
    pub fn new(versions: Arc<Mutex<Versions>>) -> Encoder {
        let keeps = lock(&versions).has_room();
        Encoder {
            versions,
            keeps,
            compressor: None,
            sampler: None,
            pages: Vec::new(),
            packed: Vec::new(),
        }
    }

    /// These go in another way: as zero, or straight from the guest's memory.
    pub fn forget(&self, pieces: impl IntoIterator<Item = (BlockId, Piece)>) {
        if !self.keeps {
            return;
        }
        let mut versions = lock(&self.versions);
        for (block, piece) in pieces {
            forget(&mut versions, block, piece);
        }
    }

    /// Encodes `pieces` of a block, at most [`MAX_ENCODED`] bytes and [`MAX_PIECES`] pieces, which are sent in `round`.
    pub fn encode(
        &mut self,
        ram: &dyn Ram,
        round: u32,
        choice: Choice,
        block: BlockId,
        pieces: Vec<Piece>,
        out: &mut Vec<Part>,
    ) -> Cost {
        let mut cost = Cost::default();
        if choice == Choice::default() {
            self.forget(pieces.iter().map(|piece| (block, *piece)));
            out.push(Part::AsItIs(block, pieces));
            return cost;
        }
        self.read(ram, block, &pieces);
        let (rest, kept) = if choice.delta {
            self.compare(round, block, &pieces, out, &mut cost)
        } else {
            self.forget(pieces.iter().map(|piece| (block, *piece)));
            (pieces, false)
        };
        if !rest.is_empty() {
            self.copy(choice.zstd, block, rest, kept, out, &mut cost);
        }
        cost
    }

    fn read(&mut self, ram: &dyn Ram, block: BlockId, pieces: &[Piece]) {
        let len: u64 = pieces.iter().map(|piece| piece.len).sum();
        self.pages.resize(as_usize(len), 0);
        let mut at = 0;
        for piece in pieces {
            let end = at + as_usize(piece.len);
            ram.read(block, piece.offset, &mut self.pages[at..end]);
            at = end;
        }
    }

    /// What has a version goes as a delta; the rest is moved together at the front of `pages`. Returns where that is, and
    /// whether some of it is kept, so that it must be sent as these bytes.
    fn compare(
        &mut self,
        round: u32,
        block: BlockId,
        pieces: &[Piece],
        out: &mut Vec<Part>,
        cost: &mut Cost,
    ) -> (Vec<Piece>, bool) {
        let begun = Instant::now();
        let (mut deltas, mut changed, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        let (mut newest, mut kept, mut left) = (0, false, 0);
        let mut versions = lock(&self.versions);
        let offsets = pieces
            .iter()
            .flat_map(|piece| (piece.offset..piece.offset + piece.len).step_by(UNIT));
        for (number, offset) in offsets.enumerate() {
            let Some(page) = self.pages[number * UNIT..].first_chunk::<UNIT>() else {
                break;
            };
            let key = Key {
                block,
                unit: offset / UNIT as u64,
            };
            let base = versions.base(key, round);
            let of = base
                .filter(|(base, _)| delta::encode(base, page, MAX_DELTA, &mut deltas))
                .map(|(_, of)| of);
            kept |= versions.sent(key, round, page) && of.is_none();
            if let Some(of) = of {
                newest = newest.max(of);
                push(&mut changed, offset);
            } else {
                push(&mut rest, offset);
                let from = number * UNIT;
                self.pages.copy_within(from..from + UNIT, left);
                left += UNIT;
            }
        }
        drop(versions);
        cost.comparing += begun.elapsed();
        cost.compared += self.pages.len() as u64;
        if !changed.is_empty() {
            let bytes = (self.pages.len() - left) as u64;
            cost.encoded.delta_bytes += bytes;
            cost.encoded.delta_sent += deltas.len() as u64;
            let message = Message::Deltas {
                block: block.0,
                base_round: newest,
                pieces: changed,
                bytes: deltas.into(),
            };
            out.push(Part::Message(message, bytes));
        }
        self.pages.truncate(left);
        (rest, kept)
    }

    /// What is in `pages` goes compressed, or as it is; as a copy if it is kept.
    fn copy(
        &mut self,
        zstd: Option<i32>,
        block: BlockId,
        pieces: Vec<Piece>,
        kept: bool,
        out: &mut Vec<Part>,
        cost: &mut Cost,
    ) {
        let begun = Instant::now();
        let worth = self.pages.len() / 16 * WORTH;
        let packed = zstd
            .and_then(|level| compress(&mut self.compressor, level, &self.pages, &mut self.packed));
        let bytes = self.pages.len() as u64;
        if let Some(len) = packed {
            cost.compressing += begun.elapsed();
            cost.compressed = (bytes, len as u64);
        }
        let copied = |zstd, bytes: &[u8]| Message::Copied {
            block: block.0,
            zstd,
            pieces: pieces.clone(),
            bytes: Bytes::copy_from_slice(bytes),
        };
        match packed {
            Some(len) if len < worth => {
                cost.encoded.zstd_bytes += bytes;
                cost.encoded.zstd_sent += len as u64;
                out.push(Part::Message(copied(true, &self.packed), bytes));
            }
            _ if kept => {
                cost.copied += bytes;
                out.push(Part::Message(copied(false, &self.pages), bytes));
            }
            _ => out.push(Part::AsItIs(block, pieces)),
        }
    }

    /// What the first bytes of `piece` compress to at `level`: bytes in, bytes out, and how long it took; with `current`, the
    /// same for that level on the same bytes.
    pub fn sample(
        &mut self,
        ram: &dyn Ram,
        block: BlockId,
        piece: Piece,
        level: i32,
        current: Option<i32>,
    ) -> Sample {
        let len = piece.len.min(SAMPLE as u64);
        self.read(ram, block, &[Piece { len, ..piece }]);
        // Once before: the first time costs the context and the caches.
        if self.sampler.is_none() {
            compress(&mut self.sampler, level, &self.pages, &mut self.packed);
        }
        let mut timed = |level| {
            let begun = Instant::now();
            let len = compress(&mut self.sampler, level, &self.pages, &mut self.packed)?;
            Some((len as u64, begun.elapsed()))
        };
        Sample {
            bytes: self.pages.len() as u64,
            found: timed(level),
            current: current.and_then(&mut timed),
        }
    }
}

/// What a sample has shown.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Bytes of pages.
    pub bytes: u64,
    /// Bytes that they were compressed to, and how long it took.
    pub found: Option<(u64, Duration)>,
    /// The same at the level in use.
    pub current: Option<(u64, Duration)>,
}

/// Compresses `pages` into `packed`, with the context of before. None when zstd fails, which it does for want of memory only.
fn compress(
    compressor: &mut Option<(i32, Compressor<'static>)>,
    level: i32,
    pages: &[u8],
    packed: &mut Vec<u8>,
) -> Option<usize> {
    if compressor.as_ref().is_none_or(|(of, _)| *of != level) {
        match compressor {
            Some((of, compressor)) => {
                compressor.set_compression_level(level).ok()?;
                *of = level;
            }
            None => *compressor = Some((level, Compressor::new(level).ok()?)),
        }
    }
    packed.clear();
    packed.reserve(zstd::zstd_safe::compress_bound(pages.len()));
    let (_, compressor) = compressor.as_mut()?;
    compressor.compress_to_buffer(pages, packed).ok()
}

/// Takes extents of a batch apart into pieces for one message each, all of one block.
pub fn chunks(extents: &[(BlockId, u64, u64)]) -> Vec<(BlockId, Vec<Piece>)> {
    chunks_of(extents, MAX_ENCODED as u64)
}

/// The same, of so many bytes at most, which are whole pages.
pub fn chunks_of(extents: &[(BlockId, u64, u64)], most: u64) -> Vec<(BlockId, Vec<Piece>)> {
    let most = most.min(MAX_ENCODED as u64);
    let mut chunks: Vec<(BlockId, Vec<Piece>)> = Vec::new();
    let mut room = 0;
    for &(block, mut offset, mut len) in extents {
        while len > 0 {
            let fits = room > 0
                && chunks
                    .last()
                    .is_some_and(|(of, pieces)| *of == block && pieces.len() < MAX_PIECES);
            if !fits {
                chunks.push((block, Vec::new()));
                room = most;
            }
            let part = len.min(room);
            if let Some((_, pieces)) = chunks.last_mut() {
                pieces.push(Piece { offset, len: part });
            }
            (offset, len, room) = (offset + part, len - part, room - part);
        }
    }
    chunks
}

fn push(pieces: &mut Vec<Piece>, offset: u64) {
    match pieces.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += UNIT as u64,
        _ => pieces.push(Piece {
            offset,
            len: UNIT as u64,
        }),
    }
}

fn forget(versions: &mut Versions, block: BlockId, piece: Piece) {
    if versions.kept() == 0 {
        return;
    }
    for offset in (piece.offset..piece.offset + piece.len).step_by(UNIT) {
        versions.forget(Key {
            block,
            unit: offset / UNIT as u64,
        });
    }
}

fn lock(versions: &Mutex<Versions>) -> MutexGuard<'_, Versions> {
    versions.lock().unwrap_or_else(PoisonError::into_inner)
}

fn as_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

const _: () = assert!(size_of::<Page>() == UNIT && MAX_ENCODED / UNIT * MAX_DELTA <= MAX_ENCODED);
