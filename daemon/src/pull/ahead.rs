//! Memory for what lacks, allocated ahead of the bytes: clearing a huge page takes about as long as fetching it, and may as well
//! be done by another processor meanwhile.

use std::sync::atomic::Ordering;

use pagecopy::host::Placer;
use pagecopy::memory::{BlockId, BlockSpec};

use super::shared::Shared;

/// Bytes between two looks at what lacks and whether it is still wanted.
const PIECE: u64 = 2 << 20;

/// The nice value of a thread that may wait: about a tenth of a processor that others want.
const NOT_URGENT: i32 = 10;

impl Shared {
    /// Allocates what lacks, in the order in which the background fetches it, until the end. What was a hole at the source
    /// stays one. It is a help and no more: a page for which there is no memory fails when it comes. Where pages are written
    /// to the file it would be none: they come into being by that, and need not be cleared before.
    pub(super) fn allocate_ahead(&self, specs: &[BlockSpec]) {
        // On Linux of this thread alone. The guest's processors and who fetches for them go first.
        let _ = rustix::process::nice(NOT_URGENT);
        let mut lacking = Vec::new();
        let blocks = (0..)
            .map(BlockId)
            .zip(specs)
            .filter(|(block, _)| self.ram.written_to(*block).is_none());
        for piece in blocks.flat_map(|(block, spec)| spec.pieces(block, PIECE)) {
            lacking.clear();
            // It is inside its block.
            let _ = self.received.missing_within(piece, &mut lacking);
            for run in &lacking {
                if self.end.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.ram.allocate(*run) {
                    tracing::warn!(%error, "memory for the guest is not allocated ahead");
                    return;
                }
            }
        }
    }
}
