//! QEMU's device state as it arrives, in pieces that the peer chose. Small ones are put together: a gibibyte that comes byte
//! by byte would cost a hundred times as much otherwise.

use bytes::{Bytes, BytesMut};
use pagecopy::limits::MAX_DEVICE_STATE_CHUNK;

/// Pieces of at least this length are kept as they are.
const LARGE: usize = MAX_DEVICE_STATE_CHUNK / 4;

/// The pieces so far, in order.
#[derive(Debug, Default)]
pub(super) struct DeviceState {
    pieces: Vec<Bytes>,
    /// What follows them.
    small: BytesMut,
}

impl DeviceState {
    /// Adds a piece.
    pub(super) fn push(&mut self, piece: Bytes) {
        if piece.len() >= LARGE {
            self.put_together();
            self.pieces.push(piece);
            return;
        }
        if self.small.capacity() == 0 {
            self.small.reserve(MAX_DEVICE_STATE_CHUNK);
        }
        self.small.extend_from_slice(&piece);
        if self.small.len() > MAX_DEVICE_STATE_CHUNK - LARGE {
            self.put_together();
        }
    }

    /// All of it.
    pub(super) fn into_pieces(mut self) -> Vec<Bytes> {
        self.put_together();
        self.pieces
    }

    fn put_together(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(std::mem::take(&mut self.small).freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_stay_and_small_pieces_do_not() {
        let mut state = DeviceState::default();
        let mut all = Vec::new();
        for n in 0..20_000_u32 {
            let len = if n % 5000 == 0 {
                LARGE
            } else {
                1 + n as usize % 40
            };
            let piece = vec![n.to_le_bytes()[0]; len];
            all.extend_from_slice(&piece);
            state.push(piece.into());
        }
        let pieces = state.into_pieces();
        assert!(pieces.len() < 12, "{} pieces", pieces.len());
        assert_eq!(pieces.concat(), all);
    }
}
