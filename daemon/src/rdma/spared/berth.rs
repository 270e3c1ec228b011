//! The place between who makes channels over RDMA again and who uses them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use transport::rdma::Memory;

use super::Rail;

/// Where a channel that was made anew over RDMA waits for who is to use it.
pub(in crate::rdma) struct Berth {
    rail: Mutex<Option<Box<dyn Rail>>>,
    wanted: AtomicBool,
    /// What it is to use. Registered for as long as the channel is there, and no longer.
    memory: Memory,
    /// Rung when one is wanted. Who makes them ends when all bells are gone.
    bell: mpsc::Sender<()>,
}

impl Berth {
    pub(in crate::rdma) fn new(memory: Memory, bell: mpsc::Sender<()>) -> Arc<Berth> {
        Arc::new(Berth {
            rail: Mutex::new(None),
            wanted: AtomicBool::new(false),
            memory,
            bell,
        })
    }

    /// Whether a new channel is of use.
    pub(in crate::rdma) fn wants(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// What it is to use.
    pub(in crate::rdma) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Leaves one. One that was left before is closed: its peer has given it up.
    pub(in crate::rdma) fn put(&self, rail: Box<dyn Rail>) {
        let before = self.lock().replace(rail);
        // Which may take a moment.
        drop(before);
    }

    pub(super) fn take(&self) -> Option<Box<dyn Rail>> {
        self.lock().take()
    }

    pub(super) fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Release);
        if wanted {
            // Who would make one may be gone: then there is none.
            let _ = self.bell.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Rail>>> {
        self.rail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
