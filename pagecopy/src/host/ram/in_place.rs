//! RAM that reads as zero and stays allocated.
//!
//! Memory that QEMU was told to allocate (`prealloc=on`) is there because somebody wants it to be, and what is punched out has to be
//! allocated anew, page by page, as it is written. It is nearly always zero already: reading it costs a fraction of that.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::MappedBlock;
use crate::host::threads;

/// Bytes that a thread takes at a time.
const PIECE: usize = 16 << 20;
/// Threads that share a block: more would wait for the memory.
const THREADS: usize = 8;

impl MappedBlock {
    /// Zeroes what is not zero, by several threads, and frees nothing. What the file does not have stays away.
    pub(super) fn clear_in_place(&self) -> io::Result<()> {
        let mut pieces = Vec::new();
        self.populated(|extent| {
            let starts = extent.clone().step_by(PIECE);
            pieces.extend(starts.map(|start| start..extent.end.min(start + PIECE as u64)));
        })?;
        let next = AtomicUsize::new(0);
        let work = |_| {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.zero(piece.clone())?;
            }
            Ok(())
        };
        let most = threads::cores().min(THREADS).min(pieces.len());
        threads::on_each(most, work).into_iter().collect()
    }
}
