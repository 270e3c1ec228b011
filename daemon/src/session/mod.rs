//! Sessions: one for each migration and side, which owns an engine, tells it what happens and does what it decides.
//!
//! A session is one task. Whatever takes time is done elsewhere and comes back as an input: QEMU's orders in tasks, the
//! pages in the lanes' threads, scans and journal records in a worker thread each, which keeps their order.

mod answer;
pub(crate) mod arrive;
pub(crate) mod begin;
pub(crate) mod change;
mod destination;
pub(crate) mod held;
mod joining;
mod link;
mod looked_at;
pub(crate) mod recover;
pub(crate) mod resume;
mod source;
mod spawn;
pub(crate) mod spawned;
mod teller;
pub(crate) mod telling;
pub(crate) mod wait;
mod worker;

use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::engine::Time;
use pagecopy::host::Ram;
use pagecopy::memory::BlockId;
use tokio::task::JoinSet;

use crate::failure::{Failure, host};
use crate::log;

pub(crate) use joining::Joining;
pub(crate) use link::{Broken, link_failure};
pub(crate) use teller::{CANCELLED, Teller, end_early, tell};
pub(crate) use worker::Worker;

/// How long QEMU may take to end a load.
const LOAD_LIMIT: Duration = Duration::from_secs(5);

/// The engines' clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn now(self) -> Time {
        Time::default().after(self.0.elapsed())
    }

    /// Sleeps until `time`, or for ever when there is none.
    pub(crate) async fn sleep_until(self, time: Option<Time>) {
        match time {
            Some(time) => {
                tokio::time::sleep_until((self.0 + time.since(Time::default())).into()).await
            }
            None => std::future::pending().await,
        }
    }

    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

/// Digests of all RAM, by block.
pub(crate) fn digests(ram: &Arc<dyn Ram>, blocks: usize) -> Result<Vec<Vec<[u8; 16]>>, Failure> {
    let of_block = |block: usize| {
        let block = BlockId(u16::try_from(block).unwrap_or(u16::MAX));
        let digests = ram.digests(block).map_err(|error| {
            host(
                format!("the digests of RAM could not be taken: {error}"),
                "see the kernel's log",
            )
        })?;
        Ok(digests.into_iter().map(|digest| digest.0).collect())
    };
    (0..blocks).map(of_block).collect()
}

/// Digests of the pages of a chunk.
pub(crate) fn page_digests(ram: &Arc<dyn Ram>, block: u16, chunk: u64) -> Vec<[u8; 16]> {
    ram.page_digests(BlockId(block), chunk)
        .into_iter()
        .map(|digest| digest.0)
        .collect()
}

/// Does work that blocks, in the background. A panic in it is a failure of this host.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    log::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(host(error.to_string(), "report this")))
}

/// Lets go of channels, or of lanes with theirs, side by side: the kernel takes some milliseconds over each ring.
fn close_each<T: Send + 'static>(closing: &mut JoinSet<()>, all: impl IntoIterator<Item = T>) {
    for one in all {
        closing.spawn_blocking(log::inherited(move || drop(one)));
    }
}

/// The disk refused a record.
pub(crate) fn journal_failure(error: &std::io::Error) -> Failure {
    host(
        format!("the journal could not be written: {error}"),
        "see to the disk under state-dir",
    )
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of an input or output, without what is in it: for the log.
struct NameOf<'a, T>(&'a T);

impl<T: fmt::Debug> fmt::Display for NameOf<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Ends with an error where the name does; that is how the rest, which may be long, is never put into words.
        let _ = write!(UpToName(f), "{:?}", self.0);
        Ok(())
    }
}

struct UpToName<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for UpToName<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find(|c: char| !c.is_alphanumeric());
        self.0.write_str(&text[..end.unwrap_or(text.len())])?;
        end.map_or(Ok(()), |_| Err(fmt::Error))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Is closed when as many as there are have begun to be.
    struct Slow(Arc<[AtomicUsize; 2]>, usize);

    impl Drop for Slow {
        fn drop(&mut self) {
            let [begun, met] = &*self.0;
            begun.fetch_add(1, Ordering::SeqCst);
            let deadline = Instant::now() + Duration::from_secs(10);
            while begun.load(Ordering::SeqCst) < self.1 {
                if Instant::now() > deadline {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            met.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn channels_are_closed_side_by_side() {
        let counts = Arc::default();
        let all = (0..4).map(|_| Slow(Arc::clone(&counts), 4));
        let mut closing = JoinSet::new();
        close_each(&mut closing, all);
        closing.join_all().await;
        assert_eq!(counts[1].load(Ordering::SeqCst), 4);
    }
}
