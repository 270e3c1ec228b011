//! Stopping threads of another process and letting them go on, in one thread that traces them only meanwhile.

use std::io;

use crate::host::TrackError;
use crate::host::process::{self, Process};
use crate::host::sys::ptrace::{Stop, Traced};

/// Threads that stand still, or will.
#[derive(Debug)]
pub(super) struct Stops<'a> {
    process: &'a Process,
    asked: Vec<Traced>,
}

impl<'a> Stops<'a> {
    pub(super) fn new(process: &'a Process) -> Stops<'a> {
        Stops {
            process,
            asked: Vec::new(),
        }
    }

    /// Asks these to stop, which they do as soon as they are not in the kernel, and waits for none.
    ///
    /// # Errors
    /// None of them can be.
    pub(super) fn stop(&mut self, threads: &[i32]) -> Result<(), TrackError> {
        let mut refused = None;
        for &thread in threads {
            if self.asked.iter().any(|traced| traced.tid() == thread) {
                continue;
            }
            // The number still means a thread of the process that is held, if that one lives: it was looked up before.
            match Traced::seize(thread).and_then(|traced| traced.interrupt().map(|()| traced)) {
                Ok(traced) => self.asked.push(traced),
                // It has ended.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => refused = Some((thread, error)),
            }
        }
        match refused {
            Some((thread, error)) if self.asked.is_empty() => Err(self.explain(thread, error)),
            _ => Ok(()),
        }
    }

    /// Lets those go on that stand still.
    pub(super) fn let_go(&mut self) {
        // What cannot be let go of now is looked at again; it goes on with the end of this thread at the latest.
        self.asked
            .retain(|traced| !is_free(traced).unwrap_or(false));
    }

    /// Whether nobody stands still or will.
    pub(super) fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    fn explain(&self, thread: i32, error: io::Error) -> TrackError {
        let pid = self.process.pid();
        match process::tracer_of(thread) {
            Some(tracer) => TrackError::Busy(format!(
                "a vCPU of QEMU (process {pid}) is traced by {} (process {})",
                tracer.name, tracer.pid
            )),
            None => process::proc_error(pid, "tracing QEMU's vCPUs", error),
        }
    }
}

/// Ends the tracing of a thread that stands still. False: it does not yet.
fn is_free(traced: &Traced) -> io::Result<bool> {
    let signal = match traced.standing()? {
        None => return Ok(false),
        Some(Stop::Gone) => {
            traced.bury();
            return Ok(true);
        }
        Some(Stop::Signal(signal)) => signal,
        Some(Stop::Interrupt | Stop::Call | Stop::Group(_)) => 0,
    };
    traced.detach(signal)?;
    Ok(true)
}
