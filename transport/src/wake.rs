//! Ends the wait of a channel that waits in the kernel.

use std::sync::Arc;
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::Error;

/// An eventfd: ends a wait from any thread.
pub(crate) struct WakeFd(OwnedFd);

impl WakeFd {
    /// With these flags and close-on-exec.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn new(flags: EventfdFlags) -> Result<WakeFd, Error> {
        eventfd(0, EventfdFlags::CLOEXEC | flags)
            .map(WakeFd)
            .map_err(|e| Error::io("making an eventfd", &e.into()))
    }
}

impl AsFd for WakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wake for WakeFd {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // The counter cannot overflow in practice, and a full one wakes as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}
