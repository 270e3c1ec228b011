//! What the destination takes on one data channel: encoded pages that were agreed on, inside their block, and deltas only
//! against versions of rounds that are in place.

use super::Encodings;
use crate::memory::{BlockSpec, Piece};

/// One data channel, as far as encoded pages are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Arriving {
    encodings: Encodings,
    /// Rounds whose barrier has come on this channel. The source sends nothing of the next before all of them are in place.
    rounds: u32,
}

impl Arriving {
    /// Nothing has come.
    pub fn new(encodings: Encodings) -> Arriving {
        Arriving {
            encodings,
            rounds: 0,
        }
    }

    /// The barrier of `round` came.
    pub fn barrier(&mut self, round: u32) {
        self.rounds = round.saturating_add(1);
    }

    /// `Copied` came.
    ///
    /// # Errors
    /// How it breaks the protocol.
    pub fn copied(
        &self,
        block: Option<&BlockSpec>,
        zstd: bool,
        pieces: &[Piece],
    ) -> Result<(), String> {
        if !self.encodings.any() || (zstd && !self.encodings.zstd) {
            return Err("pages came encoded as was not agreed on".to_owned());
        }
        inside(block, pieces)
    }

    /// `Deltas` came.
    ///
    /// # Errors
    /// How it breaks the protocol.
    pub fn deltas(
        &self,
        block: Option<&BlockSpec>,
        base_round: u32,
        pieces: &[Piece],
    ) -> Result<(), String> {
        if !self.encodings.delta {
            return Err("deltas came, which were not agreed on".to_owned());
        }
        if base_round >= self.rounds {
            return Err(format!(
                "a delta is against a version of round {base_round}, which is not in place: round {} is under way",
                self.rounds
            ));
        }
        inside(block, pieces)
    }
}

fn inside(block: Option<&BlockSpec>, pieces: &[Piece]) -> Result<(), String> {
    let block = block.ok_or("encoded pages are of a RAMBlock that does not exist")?;
    let outside = |piece: &&Piece| {
        piece
            .offset
            .checked_add(piece.len)
            .is_none_or(|end| end > block.size)
    };
    match pieces.iter().find(outside) {
        Some(piece) => Err(format!(
            "{} bytes at {} of RAMBlock {:?} are outside it",
            piece.len, piece.offset, block.name
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: Piece = Piece {
        offset: 4096,
        len: 4096,
    };

    fn block(size: u64) -> BlockSpec {
        BlockSpec {
            name: "ram".into(),
            size,
            page_size: 4096,
        }
    }

    #[test]
    fn a_delta_refers_to_a_round_that_is_in_place() {
        let (mut arriving, block) = (Arriving::new(Encodings::ALL), block(8192));
        let delta = |arriving: &Arriving, base| arriving.deltas(Some(&block), base, &[PIECE]);
        assert!(delta(&arriving, 0).is_err(), "nothing is in place");
        arriving.barrier(0);
        assert!(delta(&arriving, 0).is_ok());
        assert!(delta(&arriving, 1).is_err(), "the round under way");
        arriving.barrier(1);
        assert!(delta(&arriving, 0).is_ok() && delta(&arriving, 1).is_ok());
        assert!(delta(&arriving, u32::MAX).is_err());
    }

    #[test]
    fn nothing_is_taken_that_was_not_agreed_on() {
        let block = block(8192);
        let taken = |zstd, delta| {
            let mut arriving = Arriving::new(Encodings { zstd, delta });
            arriving.barrier(0);
            [
                arriving.copied(Some(&block), false, &[PIECE]).is_ok(),
                arriving.copied(Some(&block), true, &[PIECE]).is_ok(),
                arriving.deltas(Some(&block), 0, &[PIECE]).is_ok(),
            ]
        };
        assert_eq!(taken(false, false), [false, false, false]);
        assert_eq!(taken(true, false), [true, true, false]);
        assert_eq!(taken(false, true), [true, false, true]);
    }

    #[test]
    fn pieces_are_inside_their_block() {
        let arriving = Arriving::new(Encodings::ALL);
        assert!(arriving.copied(None, false, &[PIECE]).is_err());
        assert!(
            arriving
                .copied(Some(&block(4096)), false, &[PIECE])
                .is_err()
        );
        let far = Piece {
            offset: u64::MAX - 4095,
            len: 4096,
        };
        assert!(arriving.copied(Some(&block(8192)), false, &[far]).is_err());
    }
}
