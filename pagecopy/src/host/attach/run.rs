//! One stop of QEMU's main thread from end to end: what is prepared before, what the child does, and what is made of its
//! answer.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::code::{self, Code};
use super::fault::{self, Fault};
use super::injected::StoppedThread;
use super::net::Net;
use super::{AttachOptions, Attached, STOP_LIMIT, Uffd};
use crate::host::process::Process;
use crate::host::sys::survivor::{Outcome, Survivor};
use crate::host::sys::uffd::{NEW_FROM_DEVICE, USER_MODE_ONLY};
use crate::host::{AttachFigures, TrackError};

/// How much longer than the thread's stop may take the child is waited for: it starts, and makes some system calls.
const GRACE: Duration = Duration::from_secs(2);

/// A process whose main thread is stopped now and then. What each stop needs is looked up once, for that takes longer than the
/// stops.
#[derive(Debug)]
pub(crate) struct Injector {
    process: Process,
    code: Code,
}

impl Injector {
    /// For process `pid`, which is not touched yet.
    ///
    /// # Errors
    /// `Gone`, or it cannot be looked at.
    pub(crate) fn of(pid: i32) -> Result<Injector, TrackError> {
        Ok(Injector {
            process: Process::open(pid)?,
            code: code::find(pid)?,
        })
    }

    /// Has it give `advice` (`MADV_…`) about each of `ranges`, whatever the kernel says to that, then makes a userfaultfd in it
    /// and takes it over.
    ///
    /// # Errors
    /// What is in the way, and what to do about it.
    pub(crate) fn attach(
        &self,
        options: AttachOptions,
        ranges: &[Range<u64>],
        advice: i32,
    ) -> Result<Attached, TrackError> {
        let ((descriptor, inside), figures) = self.stopped(options, &mut |thread| {
            for range in ranges {
                thread.call(libc::SYS_madvise, madvise(range, advice))?;
            }
            make_descriptor(thread, &self.process, options)
        })?;
        Ok(Attached {
            uffd: Uffd::from(descriptor),
            figures,
            inside: options.leave_open.then_some(inside),
        })
    }

    /// Has it give `advice` (`MADV_…`) about `range` of its memory, which the kernel takes from nobody else. Its main thread
    /// stands still meanwhile.
    ///
    /// # Errors
    /// What is in the way, or the kernel's refusal.
    pub(crate) fn advise(&self, range: &Range<u64>, advice: i32) -> Result<(), TrackError> {
        self.call(libc::SYS_madvise, madvise(range, advice))
    }

    /// Has it close a descriptor of its own.
    ///
    /// # Errors
    /// What is in the way, or the kernel's refusal.
    pub(crate) fn close(&self, inside: i32) -> Result<(), TrackError> {
        let number = u64::from(inside.unsigned_abs());
        self.call(libc::SYS_close, [number, 0, 0])
    }

    /// Has it execute a system call that answers 0.
    fn call(&self, call: i64, arguments: [u64; 3]) -> Result<(), TrackError> {
        let none = AttachOptions::default();
        let (answer, _) = self.stopped(none, &mut |thread| thread.call(call, arguments))?;
        if answer != 0 {
            return Err(Fault::Answer(answer).explain(self.process.pid(), none));
        }
        Ok(())
    }

    /// Stops the main thread for `work`; its answer, and how long the thread stood still.
    fn stopped<T>(
        &self,
        options: AttachOptions,
        work: &mut Work<'_, T>,
    ) -> Result<(T, AttachFigures), TrackError> {
        let pid = self.process.pid();
        if let Some(busy) = fault::traced_already(pid) {
            return Err(busy);
        }
        let mut net = Net::new();
        let child = Survivor::start(&mut || inject(&self.process, self.code, &mut net, work));
        let child = child.map_err(|source| TrackError::System {
            what: "starting a process to attach with",
            source,
        })?;
        match child.wait(STOP_LIMIT + GRACE) {
            Outcome::Done(Ok(done)) => Ok(done),
            Outcome::Done(Err(fault)) => Err(fault.explain(pid, options)),
            Outcome::Late => Err(fault::blocked(pid)),
            Outcome::Killed => Err(TrackError::Busy(
                "the process that was attaching to QEMU was killed; see that QEMU still runs, then try again".into(),
            )),
        }
    }
}

fn madvise(range: &Range<u64>, advice: i32) -> [u64; 3] {
    let advice = u64::from(advice.unsigned_abs());
    [range.start, range.end - range.start, advice]
}

/// What the child does with the thread, by the rules of a [`survivor`](crate::host::sys::survivor).
type Work<'a, T> = dyn FnMut(&mut StoppedThread<'_>) -> Result<T, Fault> + 'a;

/// What the child does, by the rules of a [`survivor`](crate::host::sys::survivor).
fn inject<T>(
    process: &Process,
    code: Code,
    net: &mut Net,
    work: &mut Work<'_, T>,
) -> Result<(T, AttachFigures), Fault> {
    net.touch();
    let deadline = Instant::now() + STOP_LIMIT;
    let mut thread = StoppedThread::seize(process, code, net, deadline)?;
    // Everything slow is done; from here to `release` every microsecond is QEMU's.
    let started = Instant::now();
    thread.stop()?;
    let done = work(&mut thread);
    thread.release()?;
    let stopped = started.elapsed();
    Ok((done?, AttachFigures { stopped }))
}

/// Has the stopped thread make the descriptor, takes it, and has it closed there unless it is to stay; what was taken, and
/// its number inside.
fn make_descriptor(
    thread: &mut StoppedThread<'_>,
    process: &Process,
    options: AttachOptions,
) -> Result<(OwnedFd, i32), Fault> {
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs());
    let made = match options.device {
        Some(device) => thread.call(
            libc::SYS_ioctl,
            [u64::from(device.unsigned_abs()), NEW_FROM_DEVICE, flags],
        )?,
        None => {
            let mode = if options.kernel_faults {
                0
            } else {
                USER_MODE_ONLY
            };
            thread.call(libc::SYS_userfaultfd, [flags | mode, 0, 0])?
        }
    };
    let Ok(inside) = i32::try_from(made) else {
        return Err(Fault::Answer(made));
    };
    if inside < 0 {
        return Err(Fault::Refused(inside.wrapping_neg()));
    }
    let taken = rustix::process::pidfd_getfd(
        process.handle(),
        inside,
        rustix::process::PidfdGetfdFlags::empty(),
    );
    if taken.is_err() || !options.leave_open {
        let closed = thread.call(libc::SYS_close, [u64::from(inside.unsigned_abs()), 0, 0])?;
        if closed != 0 {
            return Err(Fault::Answer(closed));
        }
    }
    match taken {
        Ok(taken) => Ok((taken, inside)),
        Err(error) => Err(Fault::Take(error.raw_os_error())),
    }
}
