//! Decodes pages at the destination and places them. One decoder a channel; every length is known before it is used.

use std::io;
use std::sync::Arc;

use zstd::bulk::Decompressor;

use super::Placer;
use crate::engine::encoding::arriving::Arriving;
use crate::engine::encoding::{Encodings, UNIT, delta};
use crate::memory::{BlockId, BlockSpec, Piece};
use crate::wire::Message;

/// Why encoded pages were not placed.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The peer broke the protocol.
    #[error("{0}")]
    Peer(String),
    /// This host has no place for them.
    #[error("pages cannot be placed: {0}")]
    Host(#[from] io::Error),
}

/// Decodes and places. Made once for a channel: its buffer and the decompressor's context are used again.
pub struct Decoder {
    arriving: Arriving,
    specs: Arc<[BlockSpec]>,
    decompressor: Option<Decompressor<'static>>,
    pages: Vec<u8>,
}

impl Decoder {
    /// Takes what `encodings` allow. `specs` are in the order of the source's numbers.
    pub fn new(encodings: Encodings, specs: Arc<[BlockSpec]>) -> Decoder {
        Decoder {
            arriving: Arriving::new(encodings),
            specs,
            decompressor: None,
            pages: Vec::new(),
        }
    }

    /// The barrier of `round` came on the channel.
    pub fn barrier(&mut self, round: u32) {
        self.arriving.barrier(round);
    }

    /// Takes `Copied` or `Deltas`; others are not encoded pages.
    ///
    /// # Errors
    /// [`DecodeError`]: nothing of the message was placed if it is the peer's fault.
    pub fn take(&mut self, message: &Message, placer: &dyn Placer) -> Result<(), DecodeError> {
        match message {
            Message::Copied {
                block,
                zstd,
                pieces,
                bytes,
            } => {
                let spec = self.specs.get(usize::from(*block));
                self.arriving
                    .copied(spec, *zstd, pieces)
                    .map_err(DecodeError::Peer)?;
                let block = BlockId(*block);
                if *zstd {
                    self.decompress(pieces, bytes)?;
                    place(placer, block, pieces, &self.pages)
                } else if bytes.len() == len(pieces) {
                    place(placer, block, pieces, bytes)
                } else {
                    Err(DecodeError::Peer(format!(
                        "{} bytes came for pages of {}",
                        bytes.len(),
                        len(pieces)
                    )))
                }
            }
            Message::Deltas {
                block,
                base_round,
                pieces,
                bytes,
            } => {
                let spec = self.specs.get(usize::from(*block));
                self.arriving
                    .deltas(spec, *base_round, pieces)
                    .map_err(DecodeError::Peer)?;
                self.apply(placer, BlockId(*block), pieces, bytes)?;
                place(placer, BlockId(*block), pieces, &self.pages)
            }
            other => Err(DecodeError::Peer(format!(
                "{} carries no encoded pages",
                other.name()
            ))),
        }
    }

    fn decompress(&mut self, pieces: &[Piece], bytes: &[u8]) -> Result<(), DecodeError> {
        self.pages.resize(len(pieces), 0);
        if self.decompressor.is_none() {
            self.decompressor = Some(Decompressor::new()?);
        }
        let Some(decompressor) = &mut self.decompressor else {
            return Ok(());
        };
        let whole = self.pages.len();
        // It is given room for what must come out, so that a frame that says more, or holds more, ends in its error.
        match decompressor.decompress_to_buffer(bytes, &mut self.pages[..]) {
            Ok(found) if found == whole => Ok(()),
            Ok(found) => Err(DecodeError::Peer(format!(
                "{found} bytes were compressed where {whole} should be"
            ))),
            Err(error) => Err(DecodeError::Peer(format!(
                "compressed pages cannot be read: {error}"
            ))),
        }
    }

    /// Makes the pages of `pieces` of their versions before and the deltas.
    fn apply(
        &mut self,
        placer: &dyn Placer,
        block: BlockId,
        pieces: &[Piece],
        bytes: &[u8],
    ) -> Result<(), DecodeError> {
        if bytes.len() < len(pieces) / UNIT * delta::SMALLEST {
            return Err(DecodeError::Peer(
                "there are fewer deltas than pages".to_owned(),
            ));
        }
        self.pages.resize(len(pieces), 0);
        let mut left = self.pages.as_mut_slice();
        for piece in pieces {
            let (these, behind) = left.split_at_mut(len(&[*piece]));
            placer.read(block, piece.offset, these)?;
            left = behind;
        }
        let mut input = bytes;
        for page in self.pages.as_chunks_mut::<UNIT>().0 {
            delta::apply(page, &mut input).map_err(|error| DecodeError::Peer(error.to_string()))?;
        }
        if input.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Peer("bytes follow the last delta".to_owned()))
        }
    }
}

fn place(
    placer: &dyn Placer,
    block: BlockId,
    pieces: &[Piece],
    bytes: &[u8],
) -> Result<(), DecodeError> {
    let mut left = bytes;
    for piece in pieces {
        let (these, behind) = left.split_at(len(&[*piece]));
        placer.place(block, piece.offset, these)?;
        left = behind;
    }
    Ok(())
}

/// Bytes of pages. The wire's limit for them is far below what a `usize` holds.
fn len(pieces: &[Piece]) -> usize {
    let len: u64 = pieces.iter().map(|piece| piece.len).sum();
    usize::try_from(len).unwrap_or(usize::MAX)
}
