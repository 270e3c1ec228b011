//! RAM that reads as zero and stays allocated.
//!
//! Memory that QEMU was told to allocate (`prealloc=on`) is there because somebody wants it to be, and what is punched out has to be
//! allocated anew, page by page, as it is written. It is nearly always zero already: reading it costs a fraction of that.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::MappedBlock;

/// Bytes that a thread takes at a time.
const PIECE: u64 = 16 << 20;
/// Threads that share a block: more would wait for the memory.
const THREADS: usize = 8;

impl MappedBlock {
    /// Zeroes what is not zero, by several threads, and frees nothing. What the file does not have stays away.
    pub(super) fn clear_in_place(&self) -> io::Result<()> {
        let mut pieces = Vec::new();
        self.populated(|extent| {
            let mut start = extent.start;
            while start < extent.end {
                let end = extent.end.min(start + PIECE);
                pieces.push(start..end);
                start = end;
            }
        })?;
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.zero(piece.clone())?;
            }
            Ok(())
        };
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        thread::scope(|scope| {
            let threads = cores.min(THREADS).min(pieces.len());
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let mut done = workers.into_iter().map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            done.try_for_each(|outcome| outcome)
        })
    }
}
