//! Lines on their way to standard error, which a thread of their own writes: whoever logs never waits for whoever reads. What nobody
//! reads in time is lost, once there is more of it than is kept.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of lines that wait to be written.
const MOST: usize = 4 << 20;
/// How long what waits may take when the daemon ends.
const END: Duration = Duration::from_secs(2);

/// The lines that wait.
#[derive(Debug)]
pub(super) struct Behind {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug)]
struct Waiting {
    lines: VecDeque<Box<[u8]>>,
    /// Theirs, and those of the line that is being written.
    bytes: usize,
    /// There is a thread that writes them; before that they are written at once.
    is_served: bool,
}

impl Behind {
    pub(super) const fn new() -> Behind {
        Behind {
            waiting: Mutex::new(Waiting {
                lines: VecDeque::new(),
                bytes: 0,
                is_served: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Takes a line. `false`: it is lost.
    pub(super) fn take(&self, line: &str) -> bool {
        let mut waiting = self.lock();
        if !waiting.is_served {
            drop(waiting);
            // Where nobody takes it, nobody can be told either.
            let _ = io::stderr().write_all(line.as_bytes());
            return true;
        }
        if waiting.bytes + line.len() > MOST {
            return false;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line.as_bytes().into());
        self.changed.notify_all();
        true
    }

    /// From now on a thread writes the lines.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(super) fn serve(&'static self, to: impl Write + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || self.write_all(to))?;
        self.lock().is_served = true;
        Ok(())
    }

    fn write_all(&self, mut to: impl Write) {
        let mut waiting = self.lock();
        loop {
            let Some(line) = waiting.lines.pop_front() else {
                let changed = self.changed.wait(waiting);
                waiting = changed.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(waiting);
            // Where nobody takes it, nobody can be told either.
            let _ = to.write_all(&line);
            waiting = self.lock();
            waiting.bytes -= line.len();
            if waiting.lines.is_empty() {
                self.changed.notify_all();
            }
        }
    }

    /// Waits until everything is written, for a moment at most. Says whether it is.
    pub(super) fn flush(&self) -> bool {
        let is_left = |waiting: &mut Waiting| waiting.is_served && waiting.bytes > 0;
        let waited = self.changed.wait_timeout_while(self.lock(), END, is_left);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_up_and_what_was_taken_is_whole() {
        static LINES: Behind = Behind::new();
        let (mut end, to) = io::pipe().unwrap();
        LINES.serve(to).unwrap();
        let line = format!("{}\n", "x".repeat(999));
        let (done, is_done) = channel();
        let logging = line.clone();
        std::thread::spawn(move || {
            let taken = (0..2 * MOST / logging.len()).map(|_| LINES.take(&logging));
            done.send(taken.filter(|taken| *taken).count()).unwrap();
        });
        let taken = is_done.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!((MOST / 1000..MOST / 1000 + 70).contains(&taken), "{taken}");
        assert!(!LINES.flush(), "nobody has read it");

        // Read in the end, and there is room again.
        let mut read = vec![0; taken * line.len()];
        end.read_exact(&mut read).unwrap();
        assert!(read.chunks(line.len()).all(|one| one == line.as_bytes()));
        assert!(LINES.flush());
        assert!(LINES.take("more\n"));
        let mut more = [0; 5];
        end.read_exact(&mut more).unwrap();
        assert_eq!(&more, b"more\n");
    }
}
