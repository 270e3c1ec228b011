//! Dirty tracking by asynchronous write-protection.

use super::{AttachFigures, TrackError, Tracker};
use crate::memory::{BlockId, Run};

/// A RAMBlock as QEMU has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedBlock {
    /// The engine's number of it.
    pub block: BlockId,
    /// First address in QEMU.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// Tracks the writes to a running QEMU's RAM.
#[derive(Debug)]
pub struct UffdTracker {
    pid: i32,
    blocks: Vec<TrackedBlock>,
    figures: Option<AttachFigures>,
}

impl UffdTracker {
    /// A tracker of these blocks of process `pid`; nothing is touched before [`arm`](Tracker::arm).
    ///
    /// # Errors
    /// The process is gone, or may not be looked at.
    pub fn new(pid: i32, blocks: Vec<TrackedBlock>) -> Result<UffdTracker, TrackError> {
        Ok(UffdTracker { pid, blocks, figures: None })
    }

    /// How the attach of the last `arm` went.
    pub fn attach_figures(&self) -> Option<AttachFigures> {
        self.figures
    }
}

impl Tracker for UffdTracker {
    fn arm(&mut self) -> Result<(), TrackError> {
        let _ = &self.blocks;
        Err(TrackError::Gone(self.pid))
    }

    fn scan(&mut self, _dirty: &mut Vec<Run>) -> Result<(), TrackError> {
        Err(TrackError::Gone(self.pid))
    }

    fn disarm(&mut self) {}
}
