//! The bandwidth of this host, as sessions and their threads share it. What is shared out how is in `buckets`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::engine::Time;

use super::buckets::Buckets;

/// What all migrations that leave this host may send.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    buckets: Mutex<Buckets>,
    /// Without any limit nobody takes the lock.
    limited: AtomicBool,
    begun: Instant,
}

/// What one migration may send, whatever its channels; ends with it.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    key: u64,
    /// The memory is open to the destination's reads.
    serving: AtomicBool,
}

impl Budget {
    /// `limit` bytes a second for all together; none is unlimited.
    pub fn new(limit: Option<u64>) -> Budget {
        let buckets = Buckets::new(limit);
        Budget(Arc::new(Inner {
            limited: AtomicBool::new(buckets.is_limited()),
            buckets: Mutex::new(buckets),
            begun: Instant::now(),
        }))
    }

    /// The share of a migration that may send `limit` bytes a second at most.
    pub fn share(&self, priority: i32, limit: Option<u64>) -> Share {
        let key = self.change(|buckets, now| buckets.add(now, priority, limit));
        Share {
            budget: self.clone(),
            key,
            serving: AtomicBool::new(false),
        }
    }

    /// Another limit for all together, from now on.
    pub(crate) fn limit(&self, limit: Option<u64>) {
        self.change(|buckets, now| buckets.limit_all(now, limit));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Buckets, Time) -> T) -> T {
        let mut buckets = self.lock();
        let done = change(&mut buckets, self.now());
        self.0
            .limited
            .store(buckets.is_limited(), Ordering::Relaxed);
        done
    }

    /// The buckets, if anybody is limited.
    fn limited(&self) -> Option<(MutexGuard<'_, Buckets>, Time)> {
        let limited = self.0.limited.load(Ordering::Relaxed);
        limited.then(|| (self.lock(), self.now()))
    }

    fn now(&self) -> Time {
        Time::default().after(self.0.begun.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.0
            .buckets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Of a migration that shares with nobody.
    pub fn alone(limit: Option<u64>) -> Share {
        Budget::new(None).share(0, limit)
    }

    /// Bytes a second that it can count on; `None` is unlimited.
    pub fn rate(&self) -> Option<u64> {
        let (buckets, _) = self.budget.limited()?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Saturates.
        buckets.rate(self.key).map(|rate| rate as u64)
    }

    /// How many bytes may go at once; `None` is unlimited.
    pub fn quantum(&self) -> Option<u64> {
        let (buckets, _) = self.budget.limited()?;
        buckets.quantum(self.key)
    }

    /// How long nothing may go; `None`: something may.
    pub fn wait(&self) -> Option<Duration> {
        let (mut buckets, now) = self.budget.limited()?;
        buckets.wait(now, self.key)
    }

    /// `bytes` go, unless nothing may: then how long.
    pub fn take(&self, bytes: u64) -> Option<Duration> {
        let (mut buckets, now) = self.budget.limited()?;
        let wait = buckets.wait(now, self.key);
        if wait.is_none() {
            buckets.spend(self.key, bytes);
        }
        wait
    }

    /// `bytes` have gone.
    pub fn spend(&self, bytes: u64) {
        if let Some((mut buckets, _)) = self.budget.limited() {
            buckets.spend(self.key, bytes);
        }
    }

    /// `bytes` that were taken do not go.
    pub fn refund(&self, bytes: u64) {
        if let Some((mut buckets, _)) = self.budget.limited() {
            buckets.refund(self.key, bytes);
        }
    }

    /// `bytes` have gone to a guest that waits for them, without asking.
    pub fn spend_at_once(&self, bytes: u64) {
        if let Some((mut buckets, _)) = self.budget.limited() {
            buckets.spend_at_once(bytes);
        }
    }

    /// The guest stands still until its last pages are there, or goes on.
    pub fn urgent(&self, urgent: bool) {
        self.budget
            .change(|buckets, now| buckets.urgent(now, self.key, urgent));
    }

    /// Another limit of its own, from now on; not where the destination reads and keeps to it by itself.
    pub(crate) fn limit(&self, limit: Option<u64>) {
        if !self.is_serving() {
            self.budget
                .change(|buckets, now| buckets.limit(now, self.key, limit));
        }
    }

    /// Another priority, from now on.
    pub(crate) fn weigh(&self, priority: i32) {
        self.budget
            .change(|buckets, now| buckets.weigh(now, self.key, priority));
    }

    /// From now on the destination reads, and keeps to the operator's limit for that by itself.
    pub fn serve(&self) {
        self.serving.store(true, Ordering::Relaxed);
        self.budget.change(|buckets, now| {
            buckets.urgent(now, self.key, false);
            buckets.limit(now, self.key, None);
        });
    }

    /// Whether the destination reads.
    pub fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Relaxed)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget
            .change(|buckets, now| buckets.remove(now, self.key));
    }
}
