//! Ends the wait of a channel that waits in the kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::Error;

/// An eventfd: ends a wait from any thread.
pub(crate) struct WakeFd {
    fd: OwnedFd,
    /// For who does not wait in the kernel.
    rung: AtomicBool,
}

impl WakeFd {
    /// With these flags and close-on-exec.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn new(flags: EventfdFlags) -> Result<WakeFd, Error> {
        eventfd(0, EventfdFlags::CLOEXEC | flags)
            .map(|fd| WakeFd {
                fd,
                rung: AtomicBool::new(false),
            })
            .map_err(|e| Error::io("making an eventfd", &e.into()))
    }

    /// Whether it was called and not yet taken note of. Asks no kernel.
    #[cfg(feature = "rdma")]
    pub(crate) fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// Takes note of calls, where the eventfd does not block. Returns whether there were any.
    #[cfg(feature = "rdma")]
    pub(crate) fn take(&self) -> bool {
        self.rung.store(false, Ordering::Release);
        rustix::io::read(&self.fd, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for WakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Wake for WakeFd {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        // The counter cannot overflow in practice, and a full one wakes as well.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}
