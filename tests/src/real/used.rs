//! What a process uses while it is attacked, at most, and that it gives back what it took.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Levels, PATIENCE};

/// Waits until `pid` holds as many descriptors and threads as `before`, and `kib` more memory at most; panics when it does
/// not come to that.
pub fn wait_level(pid: u32, before: Levels, kib: u64) -> Levels {
    let (_never, idle) = channel::<()>();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = Levels::of(pid);
        // tokio keeps threads for blocking work for ten seconds; some come and go with whatever is looked at.
        let level = now.descriptors <= before.descriptors + 2
            && now.threads <= before.threads + 4
            && now.memory_kib <= before.memory_kib + kib;
        if level {
            return now;
        }
        assert!(
            Instant::now() < deadline,
            "not level again: {before} before, {now} now, {kib} KiB more are allowed"
        );
        let _ = idle.recv_timeout(Duration::from_millis(50));
    }
}

/// Looks at a process again and again, and keeps the highest of each figure.
#[derive(Debug)]
pub struct Watch {
    end: Sender<()>,
    thread: JoinHandle<Levels>,
}

impl Watch {
    /// Begins to look.
    pub fn over(pid: u32) -> Watch {
        let (end, ended) = channel();
        let thread = std::thread::spawn(move || watch(pid, &ended));
        Watch { end, thread }
    }

    /// The highest of each figure.
    pub fn most(self) -> Levels {
        drop(self.end);
        self.thread.join().expect("the watch does not panic")
    }
}

fn watch(pid: u32, ended: &Receiver<()>) -> Levels {
    let mut most = Levels::of(pid);
    loop {
        most = Levels::highest(&[most, Levels::of(pid)]);
        if ended.recv_timeout(Duration::from_millis(10)) != Err(RecvTimeoutError::Timeout) {
            return most;
        }
    }
}
