//! A waker for a channel of which now one, now another part is waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

/// Wakes whichever channel is waited for.
pub(super) struct Bell {
    rung: AtomicBool,
    inner: Mutex<Waker>,
}

impl Bell {
    pub(super) fn new(inner: Waker) -> Bell {
        Bell {
            rung: AtomicBool::new(false),
            inner: Mutex::new(inner),
        }
    }

    /// From now on that one is waited for.
    pub(super) fn set(&self, inner: Waker) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = inner;
    }

    /// Whether it was rung since the last time.
    pub(super) fn was_rung(&self) -> bool {
        self.rung.swap(false, Ordering::AcqRel)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // First, so that whoever is just turning to another channel sees it.
        self.rung.store(true, Ordering::Release);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.wake_by_ref();
    }
}
