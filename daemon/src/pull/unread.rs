//! How long page faults lay unread, as far as that can be known: the kernel does not say when a fault came.
//!
//! A fault that is there when the thread that reads them looks has come while it was at work: since it looked last, at most.
//! One that wakes the thread lay there for as long as the thread, ready to run, was kept waiting for a processor, which the
//! kernel counts (`/proc/thread-self/schedstat`; where it does not, that is taken as nothing). What the kernel itself takes
//! to put a fault into the queue, and to make the thread ready, is in no figure.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use pagecopy::host::{DemandFault, Pager, PagerError};

/// Reads the faults of one pager, on the thread that it was made on.
#[derive(Debug)]
pub(super) struct Reader {
    looked: Instant,
    schedstat: Option<File>,
}

impl Reader {
    pub(super) fn new() -> Reader {
        Reader {
            looked: Instant::now(),
            schedstat: File::open("/proc/thread-self/schedstat").ok(),
        }
    }

    /// Appends faults, and waits up to `limit` for the first; how long they lay unread.
    ///
    /// # Errors
    /// As [`Pager::faults`].
    pub(super) fn read(
        &mut self,
        pager: &dyn Pager,
        faults: &mut Vec<DemandFault>,
        limit: Duration,
    ) -> Result<Duration, PagerError> {
        pager.faults(faults, Duration::ZERO)?;
        let unread = if faults.is_empty() {
            let before = self.delayed();
            pager.faults(faults, limit)?;
            self.delayed().saturating_sub(before)
        } else {
            self.looked.elapsed()
        };
        self.looked = Instant::now();
        Ok(unread)
    }

    /// How long this thread was ready to run and did not, ever: the second figure, in nanoseconds.
    fn delayed(&self) -> Duration {
        let mut text = [0; 64];
        let read = self
            .schedstat
            .as_ref()
            .and_then(|file| file.read_at(&mut text, 0).ok());
        let text = text.get(..read.unwrap_or(0)).unwrap_or_default();
        str::from_utf8(text)
            .ok()
            .and_then(|text| text.split_whitespace().nth(1)?.parse().ok())
            .map_or(Duration::ZERO, Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread::sleep;

    use pagecopy::memory::{BlockId, Run};

    use super::*;

    const A_WHILE: Duration = Duration::from_millis(300);

    /// Has a fault at the look of this number, after that look has waited for a while.
    struct Late {
        looks: AtomicU32,
        at: u32,
    }

    impl Pager for Late {
        fn faults(&self, faults: &mut Vec<DemandFault>, limit: Duration) -> Result<(), PagerError> {
            if !limit.is_zero() {
                sleep(A_WHILE);
            }
            if self.looks.fetch_add(1, Ordering::Relaxed) == self.at {
                faults.push(DemandFault {
                    block: BlockId(0),
                    page: 0,
                    thread: 1,
                    present: false,
                });
            }
            Ok(())
        }

        fn map(&self, _: Run) -> Result<(), PagerError> {
            Ok(())
        }

        fn poison(&self, _: Run) -> Result<(), PagerError> {
            Ok(())
        }
    }

    fn late(at: u32) -> Late {
        let looks = AtomicU32::new(0);
        Late { looks, at }
    }

    #[test]
    fn what_came_while_the_thread_was_at_work_may_be_as_old_as_that_work() {
        let (mut reader, mut faults) = (Reader::new(), Vec::new());
        sleep(A_WHILE);
        let unread = reader.read(&late(0), &mut faults, A_WHILE).unwrap();
        assert!(faults.len() == 1 && unread >= A_WHILE, "{unread:?}");
    }

    #[test]
    fn what_was_waited_for_is_as_old_as_the_thread_was_kept_from_running() {
        let (mut reader, mut faults) = (Reader::new(), Vec::new());
        let unread = reader.read(&late(1), &mut faults, A_WHILE).unwrap();
        assert!(faults.len() == 1 && unread < A_WHILE, "{unread:?}");
    }

    /// On a kernel that counts it: two threads that want one processor keep each other from it.
    #[test]
    fn the_kernel_counts_what_a_thread_is_kept_from_running() {
        let reader = Reader::new();
        if reader.schedstat.is_none() {
            return;
        }
        let ends = Instant::now() + A_WHILE;
        let spin = move || while Instant::now() < ends {};
        let busy = std::thread::available_parallelism().map_or(1, usize::from);
        let others: Vec<_> = (0..busy).map(|_| std::thread::spawn(spin)).collect();
        spin();
        assert!(reader.delayed() > Duration::from_millis(1));
        others.into_iter().for_each(|other| other.join().unwrap());
    }
}
